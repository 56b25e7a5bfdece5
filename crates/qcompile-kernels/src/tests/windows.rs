use super::check::{ALONE, Guarded, Random, assert_close, run, tables};
use crate::KernelId;
use crate::args::{AveragePoolArgs, AveragePoolGradArgs, MaxPoolArgs, MaxPoolGradArgs, PoolShape};

fn shapes() -> Vec<PoolShape> {
    let mut shapes = Vec::new();
    let mut random = Random(21);
    for i in 0..24 {
        let mut r = |low, high| random.between(low, high);
        let (height, width) = (r(3, 11), r(3, 11));
        let (kernel_height, kernel_width) = (r(1, 3), r(1, 3));
        let (stride_height, stride_width) = (r(1, 3), r(1, 3));
        let (dilation_height, dilation_width) = (r(1, 2), r(1, 2));
        let pad = |kernel: usize| i % 3 % kernel;
        let out = |size: usize, kernel: usize, stride: usize, dilation: usize| {
            let padded = size + 2 * pad(kernel);
            let extent = dilation * (kernel - 1) + 1;
            // Every fourth shape has the extra row and column of `ceil_mode`.
            let room = padded.saturating_sub(extent);
            (if i % 4 == 0 { room.div_ceil(stride) } else { room / stride }) + 1
        };
        shapes.push(PoolShape {
            batch: r(1, 3),
            height,
            width,
            channels: [1, 3, 8, 17, 70][i % 5],
            out_height: out(height, kernel_height, stride_height, dilation_height),
            out_width: out(width, kernel_width, stride_width, dilation_width),
            kernel_height,
            kernel_width,
            stride_height,
            stride_width,
            pad_top: pad(kernel_height),
            pad_left: pad(kernel_width),
            pad_bottom: pad(kernel_height),
            pad_right: pad(kernel_width),
            dilation_height,
            dilation_width,
        });
    }
    shapes
}

/// For each window, its output offset, the input offsets in row-major order, and how many positions
/// lie in the padded input.
fn windows(s: &PoolShape) -> Vec<(usize, Vec<usize>, usize)> {
    let mut windows = Vec::new();
    for n in 0..s.batch {
        for oy in 0..s.out_height {
            for ox in 0..s.out_width {
                for c in 0..s.channels {
                    let (mut inputs, mut padded) = (Vec::new(), 0);
                    for ky in 0..s.kernel_height {
                        for kx in 0..s.kernel_width {
                            let y = oy * s.stride_height + ky * s.dilation_height;
                            let x = ox * s.stride_width + kx * s.dilation_width;
                            let inside = y < s.height + s.pad_top + s.pad_bottom
                                && x < s.width + s.pad_left + s.pad_right;
                            padded += usize::from(inside);
                            let (y, x) = (y.wrapping_sub(s.pad_top), x.wrapping_sub(s.pad_left));
                            if y < s.height && x < s.width {
                                inputs.push(((n * s.height + y) * s.width + x) * s.channels + c);
                            }
                        }
                    }
                    let out = ((n * s.out_height + oy) * s.out_width + ox) * s.channels + c;
                    windows.push((out, inputs, padded));
                }
            }
        }
    }
    windows
}

#[test]
fn max_pool_and_gradient() {
    let mut random = Random(22);
    for shape in shapes() {
        let nx = shape.batch * shape.height * shape.width * shape.channels;
        let ny = shape.batch * shape.out_height * shape.out_width * shape.channels;
        // Few distinct values, so that ties are common.
        let x: Vec<f32> = (0..nx).map(|_| (random.next() % 5) as f32 - 2.0).collect();
        let dy = random.reals(ny);
        let (mut y, mut dx) = (vec![f32::NEG_INFINITY; ny], vec![0.0_f64; nx]);
        for (out, inputs, _) in windows(&shape) {
            let mut winner = None;
            for i in inputs {
                if winner.is_none_or(|w: usize| x[i] > x[w]) {
                    winner = Some(i);
                }
            }
            if let Some(winner) = winner {
                y[out] = x[winner];
                dx[winner] += f64::from(dy[out]);
            }
        }
        for table in tables() {
            let what = format!("{shape:?} on {}", table.tier);
            let mut actual = vec![7.0; ny];
            let args = MaxPoolArgs { x: x.as_ptr().cast(), y: actual.as_mut_ptr().cast(), shape };
            run(table, KernelId::MaxPool, &args, 3);
            assert_eq!(actual, y, "{what}");
            // Small whole numbers are the same in every type.
            let (codes, mut small) = (x.iter().map(|&x| x as i8).collect::<Vec<i8>>(), vec![7; ny]);
            let args =
                MaxPoolArgs { x: codes.as_ptr().cast(), y: small.as_mut_ptr().cast(), shape };
            run(table, KernelId::MaxPoolI8, &args, 3);
            assert_eq!(
                small,
                y.iter().map(|&y| y.max(-128.0) as i8).collect::<Vec<i8>>(),
                "{what}"
            );
            let bits = |x: &f32| (x.to_bits() >> 16) as u16;
            let (narrow, mut half) = (x.iter().map(bits).collect::<Vec<u16>>(), vec![7; ny]);
            let args =
                MaxPoolArgs { x: narrow.as_ptr().cast(), y: half.as_mut_ptr().cast(), shape };
            run(table, KernelId::MaxPoolBf16, &args, 3);
            assert_eq!(half, y.iter().map(bits).collect::<Vec<u16>>(), "{what}");
            let mut actual = vec![7.0; nx];
            let (x, dy) = (x.as_ptr(), dy.as_ptr());
            let args = MaxPoolGradArgs { x, dy, dx: actual.as_mut_ptr(), shape };
            run(table, KernelId::MaxPoolGrad, &args, 3);
            assert_close(&actual, &dx, 1e-6, &what);
        }
    }
}

#[test]
fn average_pool_and_gradient() {
    let mut random = Random(23);
    for (at, shape) in shapes().into_iter().enumerate() {
        let nx = shape.batch * shape.height * shape.width * shape.channels;
        let ny = shape.batch * shape.out_height * shape.out_width * shape.channels;
        let (x, dy) = (random.reals(nx), random.reals(ny));
        let count_include_pad = at % 2;
        let (mut y, mut dx) = (vec![0.0_f64; ny], vec![0.0_f64; nx]);
        for (out, inputs, padded) in windows(&shape) {
            let count = if count_include_pad == 1 { padded } else { inputs.len() }.max(1) as f64;
            for i in inputs {
                y[out] += f64::from(x[i]) / count;
                dx[i] += f64::from(dy[out]) / count;
            }
        }
        for table in tables() {
            let what = format!("{shape:?} on {}", table.tier);
            let mut actual = vec![7.0; ny];
            let y_out = actual.as_mut_ptr();
            let args = AveragePoolArgs { x: x.as_ptr(), y: y_out, count_include_pad, shape };
            run(table, KernelId::AveragePool, &args, 3);
            assert_close(&actual, &y, 1e-6, &what);
            let mut actual = vec![7.0; nx];
            let dx_out = actual.as_mut_ptr();
            let args =
                AveragePoolGradArgs { dy: dy.as_ptr(), dx: dx_out, count_include_pad, shape };
            run(table, KernelId::AveragePoolGrad, &args, 3);
            assert_close(&actual, &dx, 1e-6, &what);
        }
    }
}

/// One image of one channel and one row.
fn line(width: usize, out_width: usize, kernel_width: usize, pad_left: usize) -> PoolShape {
    PoolShape {
        batch: 1,
        height: 1,
        width,
        channels: 1,
        out_height: 1,
        out_width,
        kernel_height: 1,
        kernel_width,
        stride_height: 1,
        stride_width: 1,
        pad_top: 0,
        pad_left,
        pad_bottom: 0,
        pad_right: 0,
        dilation_height: 1,
        dilation_width: 1,
    }
}

/// Forward and gradient of max pooling along a line, with `dy` = 1, 2, 3 and so on.
fn max_line(table: &crate::Kernels, shape: PoolShape, x: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (mut y, mut dx) = (Guarded::new(shape.out_width), Guarded::new(x.len()));
    let args = MaxPoolArgs { x: x.as_ptr().cast(), y: y.as_mut_ptr().cast(), shape };
    run(table, KernelId::MaxPool, &args, 1);
    let dy: Vec<f32> = (0..shape.out_width).map(|i| i as f32 + 1.0).collect();
    let args = MaxPoolGradArgs { x: x.as_ptr(), dy: dy.as_ptr(), dx: dx.as_mut_ptr(), shape };
    run(table, KernelId::MaxPoolGrad, &args, 1);
    (y.checked("max"), dx.checked("max grad"))
}

#[test]
fn max_pool_passes_nan_on() {
    for table in tables() {
        let (y, dx) = max_line(table, line(3, 1, 3, 0), &[1.0, f32::NAN, 5.0]);
        assert!(y[0].is_nan());
        assert_eq!(dx, [0.0, 1.0, 0.0]);
        // The first of several, also where it comes first of all.
        let (y, dx) = max_line(table, line(4, 2, 3, 0), &[f32::NAN, f32::NAN, 5.0, 6.0]);
        assert!(y.iter().all(|v| v.is_nan()));
        assert_eq!(dx, [1.0, 2.0, 0.0, 0.0]);
    }
}

#[test]
fn max_pool_of_nothing_and_of_the_least() {
    let least = f32::NEG_INFINITY;
    for table in tables() {
        // Windows 0 and 1 lie in the padding and give their gradient to nobody.
        let (y, dx) = max_line(table, line(2, 4, 2, 3), &[-4.0, -3.0]);
        assert_eq!((y, dx), (vec![least, least, -4.0, -3.0], vec![3.0, 4.0]));
        // -inf wins against padding.
        let (y, dx) = max_line(table, line(2, 2, 2, 1), &[least, least]);
        assert_eq!((y, dx), (vec![least, least], vec![3.0, 0.0]));
    }
}

#[test]
fn pooling_splits_do_not_change_a_bit() {
    let mut random = Random(24);
    let mut shapes = shapes();
    shapes[0].batch = 0;
    for shape in shapes {
        let nx = shape.batch * shape.height * shape.width * shape.channels;
        let ny = shape.batch * shape.out_height * shape.out_width * shape.channels;
        let (x, dy) = (random.reals(nx), random.reals(ny));
        for table in tables() {
            let results = [1, ALONE].map(|pieces| {
                let mut out = [ny, nx, ny, nx].map(Guarded::new);
                let [max, max_grad, mean, mean_grad] = out.each_mut().map(Guarded::as_mut_ptr);
                let (x, dy) = (x.as_ptr(), dy.as_ptr());
                let args = MaxPoolArgs { x: x.cast(), y: max.cast(), shape };
                run(table, KernelId::MaxPool, &args, pieces);
                let args = MaxPoolGradArgs { x, dy, dx: max_grad, shape };
                run(table, KernelId::MaxPoolGrad, &args, pieces);
                let args = AveragePoolArgs { x, y: mean, count_include_pad: 0, shape };
                run(table, KernelId::AveragePool, &args, pieces);
                let args = AveragePoolGradArgs { dy, dx: mean_grad, count_include_pad: 0, shape };
                run(table, KernelId::AveragePoolGrad, &args, pieces);
                out.map(|out| out.checked("pooling"))
            });
            assert_eq!(results[0], results[1]);
        }
    }
}
