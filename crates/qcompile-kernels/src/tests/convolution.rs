use super::check::{ALONE, Collector, Guarded, Random, assert_close, run, scratch, tables};
use super::matrix::exact;
use super::winograd::{is_transformed, unrounded};
use crate::args::{
    Conv2dArgs, Conv2dGradInputArgs, Conv2dGradInputI8Args, Conv2dGradWeightArgs,
    Conv2dGradWeightI8Args, Conv2dI8Args, ConvShape, MOST_I8_PIXELS,
};
use crate::lanes::Element;
use crate::{KernelId, Kernels};
use std::ptr::{from_mut, null, null_mut};

/// `[batch, height, width, cin, cout, kh, kw, sh, sw, top, left, bottom, right, dh, dw, groups]`
fn shape(words: [usize; 16]) -> ConvShape {
    let [batch, height, width, in_channels, out_channels, kernel_height, kernel_width, ..] = words;
    ConvShape {
        batch,
        height,
        width,
        in_channels,
        out_channels,
        kernel_height,
        kernel_width,
        stride_height: words[7],
        stride_width: words[8],
        pad_top: words[9],
        pad_left: words[10],
        pad_bottom: words[11],
        pad_right: words[12],
        dilation_height: words[13],
        dilation_width: words[14],
        groups: words[15],
    }
}

pub(super) fn shapes() -> Vec<ConvShape> {
    let mut shapes: Vec<_> = [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1],
        [2, 8, 8, 16, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 28, 28, 1, 7, 5, 5, 1, 1, 0, 0, 0, 0, 1, 1, 1],
        [3, 9, 7, 3, 19, 7, 7, 2, 2, 3, 3, 3, 3, 1, 1, 1],
        [2, 9, 11, 5, 33, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1],
        [2, 8, 6, 12, 10, 1, 1, 2, 2, 0, 0, 0, 0, 1, 1, 1],
        [1, 7, 7, 40, 24, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1],
        [1, 11, 13, 4, 6, 3, 2, 1, 3, 2, 0, 1, 2, 2, 3, 1],
        [2, 10, 10, 6, 9, 3, 3, 2, 1, 0, 2, 3, 1, 1, 2, 3],
        [1, 6, 5, 19, 19, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 19],
        [2, 9, 8, 32, 32, 3, 5, 2, 2, 1, 2, 1, 2, 1, 1, 32],
        [1, 7, 9, 21, 21, 3, 3, 1, 2, 2, 2, 2, 2, 2, 2, 21],
        [1, 5, 5, 8, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 8],
        [1, 4, 4, 270, 17, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 3, 3, 70, 290, 2, 2, 1, 1, 1, 0, 0, 1, 1, 1, 1],
        [1, 3, 300, 2, 3, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [40, 2, 3, 4, 5, 2, 2, 1, 1, 1, 1, 0, 0, 1, 1, 1],
        [1, 2, 2, 3, 4, 3, 3, 1, 1, 0, 0, 0, 0, 1, 1, 1],
        [1, 20, 20, 1, 2, 17, 17, 1, 1, 3, 3, 3, 3, 1, 1, 1],
        [1, 9, 9, 2, 3, 2, 2, 3, 3, 0, 0, 0, 0, 1, 1, 1],
        // Whole vectors of channels, as in the residual networks.
        [3, 10, 12, 32, 32, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [2, 8, 8, 16, 64, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1],
        [1, 40, 24, 3, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [2, 5, 5, 17, 17, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [2, 5, 6, 64, 48, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 2],
        [9, 7, 7, 33, 65, 1, 1, 2, 2, 0, 0, 0, 0, 1, 1, 1],
        // Tiles of 2 x 2 targets: odd sizes, uneven padding, channels beyond whole vectors and in several chunks,
        // several images, batches and blocks of channels, images wider than a batch.
        [3, 7, 7, 24, 32, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [2, 9, 12, 27, 37, 3, 3, 1, 1, 0, 2, 1, 0, 1, 1, 1],
        [5, 6, 5, 33, 25, 3, 3, 1, 1, 2, 0, 2, 1, 1, 1, 1],
        [1, 10, 9, 150, 300, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [70, 5, 4, 24, 29, 3, 3, 1, 1, 1, 2, 1, 0, 1, 1, 1],
        [1, 7, 131, 24, 24, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        // Depthwise: more taps than a sweep holds, borders that meet, a multiplier, a huge kernel.
        [2, 12, 13, 18, 18, 5, 5, 1, 1, 2, 2, 2, 2, 1, 1, 18],
        [1, 3, 2, 16, 16, 5, 5, 1, 1, 2, 2, 2, 2, 1, 1, 16],
        [1, 4, 4, 6, 6, 3, 3, 1, 1, 3, 4, 4, 3, 1, 1, 6],
        [3, 6, 7, 3, 9, 3, 2, 2, 1, 1, 0, 0, 1, 1, 1, 3],
        [1, 34, 33, 2, 2, 33, 33, 1, 1, 0, 0, 0, 0, 1, 1, 2],
        [2, 7, 9, 130, 130, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1, 130],
        // Nothing to do, or nothing to add up.
        [0, 4, 4, 3, 5, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 4, 4, 4, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 4],
        [2, 4, 4, 0, 5, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [2, 4, 4, 3, 0, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 2, 2, 5, 5, 4, 4, 1, 1, 0, 0, 0, 0, 1, 1, 5],
    ]
    .map(shape)
    .to_vec();
    let mut random = Random(11);
    for _ in 0..20 {
        let mut r = |low, high| random.between(low, high);
        let groups = r(1, 3);
        let words = [r(1, 3), r(3, 12), r(3, 12), groups * r(1, 9), groups * r(1, 20)];
        let [n, h, w, i, o] = words;
        let rest = [r(1, 3), r(1, 3), r(1, 3), r(1, 3), r(0, 2), r(0, 2), r(0, 2), r(0, 2)];
        let [kh, kw, sh, sw, t, l, b, e] = rest;
        shapes.push(shape([n, h, w, i, o, kh, kw, sh, sw, t, l, b, e, r(1, 2), r(1, 2), groups]));
    }
    shapes
}

/// Calls `f(x offset, w offset, y offset)` for every product of the convolution.
pub(super) fn products(s: &ConvShape, mut f: impl FnMut(usize, usize, usize)) {
    let (oh, ow) = (s.out_height(), s.out_width());
    let (inner, outer) = (s.in_channels / s.groups, s.out_channels / s.groups);
    for n in 0..s.batch {
        for (oy, ox) in (0..oh).flat_map(|y| (0..ow).map(move |x| (y, x))) {
            for (ky, kx) in
                (0..s.kernel_height).flat_map(|y| (0..s.kernel_width).map(move |x| (y, x)))
            {
                let y = (oy * s.stride_height + ky * s.dilation_height).wrapping_sub(s.pad_top);
                let x = (ox * s.stride_width + kx * s.dilation_width).wrapping_sub(s.pad_left);
                if y >= s.height || x >= s.width {
                    continue;
                }
                for o in 0..s.out_channels {
                    for i in 0..inner {
                        f(
                            ((n * s.height + y) * s.width + x) * s.in_channels
                                + o / outer * inner
                                + i,
                            ((o * inner + i) * s.kernel_height + ky) * s.kernel_width + kx,
                            ((n * oh + oy) * ow + ox) * s.out_channels + o,
                        );
                    }
                }
            }
        }
    }
}

pub(super) fn sizes(s: &ConvShape) -> (usize, usize, usize) {
    (
        s.batch * s.height * s.width * s.in_channels,
        s.out_channels * s.in_channels / s.groups * s.kernel_height * s.kernel_width,
        s.batch * s.out_height() * s.out_width() * s.out_channels,
    )
}

/// Runs a kernel four ways and checks values, split and epilogue. `args` builds the block from the
/// result, the collector (null for none) and the scratch.
macro_rules! check_kernel {
    ($tables:expr, $id:expr, $size:expr, $columns:expr, $check:expr, $what:expr, $args:expr) => {
        for table in $tables {
            let what = format!("{:?} {:?} on {}", $id, $what, table.tier);
            let mut result = Guarded::new($size);
            let mut space = scratch(table, $id, &$args(null_mut(), null_mut(), null_mut()));
            let space: *mut u8 = space.as_mut_ptr().cast();
            run(table, $id, &$args(result.as_mut_ptr(), null_mut(), space), 1);
            let result = result.checked(&what);
            let check: &dyn Fn(&[f32], &str) = &$check;
            check(&result, &what);
            for pieces in [7, ALONE] {
                let mut again = Guarded::new($size);
                run(table, $id, &$args(again.as_mut_ptr(), null_mut(), space), pieces);
                assert_eq!(result, again.checked(&what), "{what}: split");
            }
            let mut collector = Collector::new($size / $columns.max(1), $columns);
            run(table, $id, &$args(null_mut(), from_mut(&mut collector), space), 2);
            if !collector.seen.iter().all(|&seen| seen == 0) || $size == 0 {
                let args = $args(null_mut(), null_mut(), null_mut());
                collector.checked(table, $id, &args, &what);
                assert_eq!(collector.values, result, "{what}: epilogue");
            } else {
                panic!("{what}: epilogue not called");
            }
        }
    };
}

/// Both products of operands of one float type, of a shape on some tables.
fn check_forward_and_grad_input<E: Element>(
    [forward, grad_input]: [KernelId; 2],
    shape: ConvShape,
    tables: &[&'static Kernels],
    mut numbers: impl FnMut(usize) -> Vec<E>,
) {
    let (nx, nw, ny) = sizes(&shape);
    let (x, w, dy) = (numbers(nx), numbers(nw), numbers(ny));
    let (mut y, mut dx) = (vec![0.0_f64; ny], vec![0.0_f64; nx]);
    let (x_exact, w_exact, dy_exact) = (exact(&x), exact(&w), exact(&dy));
    products(&shape, |i, j, k| {
        y[k] += x_exact[i] * w_exact[j];
        dx[i] += dy_exact[k] * w_exact[j];
    });
    check_kernel!(
        tables.iter().copied(),
        forward,
        ny,
        shape.out_channels,
        |result: &[f32], what: &str| assert_close(result, &y, 1e-5, what),
        shape,
        |y: *mut f32, collector: *mut Collector, scratch: *mut u8| Conv2dArgs {
            x: x.as_ptr(),
            w: w.as_ptr(),
            y,
            shape,
            epilogue: (!collector.is_null()).then_some(Collector::collect),
            epilogue_ctx: collector.cast(),
            streams: null(),
            stream_count: 0,
            scratch,
        }
    );
    check_kernel!(
        tables.iter().copied(),
        grad_input,
        nx,
        shape.in_channels,
        |result: &[f32], what: &str| assert_close(result, &dx, 1e-5, what),
        shape,
        |dx: *mut f32, collector: *mut Collector, scratch: *mut u8| Conv2dGradInputArgs {
            dy: dy.as_ptr(),
            w: w.as_ptr(),
            dx,
            shape,
            epilogue: (!collector.is_null()).then_some(Collector::collect),
            epilogue_ctx: collector.cast(),
            streams: null(),
            stream_count: 0,
            scratch,
        }
    );
}

#[test]
fn f32_forward_and_grad_input() {
    let mut random = Random(3);
    for shape in shapes() {
        let kernels = [KernelId::Conv2d, KernelId::Conv2dGradInput];
        check_forward_and_grad_input(kernels, shape, &tables(), |count| random.reals(count));
    }
}

#[test]
fn bf16_forward_and_grad_input() {
    let mut random = Random(3);
    for shape in shapes() {
        let kernels = [KernelId::Conv2dBf16, KernelId::Conv2dGradInputBf16];
        let [transformed, _] = is_transformed(&shape);
        let exact = if transformed { unrounded() } else { tables() };
        check_forward_and_grad_input(kernels, shape, &exact, |count| random.halves(count));
        if transformed {
            let whole = |count| random.whole_halves(count);
            check_forward_and_grad_input(kernels, shape, &tables(), whole);
        }
    }
}

#[test]
fn f32_grad_weight() {
    let mut random = Random(4);
    for shape in shapes() {
        let (nx, nw, ny) = sizes(&shape);
        let (x, dy) = (random.reals(nx), random.reals(ny));
        let mut expected = vec![0.0_f64; nw];
        products(&shape, |i, j, k| expected[j] += f64::from(x[i]) * f64::from(dy[k]));
        for table in tables() {
            let what = format!("{shape:?} on {}", table.tier);
            let mut dw = Guarded::new(nw);
            let (x, dy) = (x.as_ptr(), dy.as_ptr());
            let mut args =
                Conv2dGradWeightArgs { x, dy, dw: dw.as_mut_ptr(), shape, scratch: null_mut() };
            let mut space = scratch(table, KernelId::Conv2dGradWeight, &args);
            args.scratch = space.as_mut_ptr().cast();
            run(table, KernelId::Conv2dGradWeight, &args, 1);
            let dw = dw.checked(&what);
            assert_close(&dw, &expected, 1e-5, &what);
            for pieces in [7, ALONE] {
                let mut again = Guarded::new(nw);
                args.dw = again.as_mut_ptr();
                run(table, KernelId::Conv2dGradWeight, &args, pieces);
                assert_eq!(dw, again.checked(&what), "{what}: split");
            }
        }
    }
}

#[test]
fn int8_is_exact_on_every_tier() {
    let mut random = Random(5);
    for (at, shape) in shapes().into_iter().enumerate() {
        let (nx, nw, ny) = sizes(&shape);
        let (x, w, dy) = (random.bytes(nx), random.bytes(nw), random.bytes(ny));
        let (mut y, mut dx) = (vec![0_i32; ny], vec![0_i32; nx]);
        let codes = random.codes();
        products(&shape, |i, j, k| {
            y[k] += codes.value(x[i]) * i32::from(w[j]);
            dx[i] += i32::from(dy[k]) * i32::from(w[j]);
        });
        let image_scale = random.reals(shape.batch);
        let channel_scale = random.reals(shape.in_channels.max(shape.out_channels));
        let (image_stride, channel_stride) = (at % 2, at / 2 % 2);
        let scaled = |sums: &[i32], channels: usize| -> Vec<f32> {
            let image = sums.len() / shape.batch.max(1);
            let scale = |i: usize| {
                image_scale[i / image.max(1) * image_stride]
                    * channel_scale[i % channels * channel_stride]
            };
            sums.iter().enumerate().map(|(i, &sum)| sum as f32 * scale(i)).collect()
        };
        let (y, dx) = (scaled(&y, shape.out_channels), scaled(&dx, shape.in_channels));
        check_kernel!(
            tables(),
            KernelId::Conv2dI8,
            ny,
            shape.out_channels,
            |result: &[f32], what: &str| assert_eq!(result, y, "{what}"),
            shape,
            |y: *mut f32, collector: *mut Collector, scratch: *mut u8| Conv2dI8Args {
                x: x.as_ptr(),
                w: w.as_ptr(),
                y,
                x_scale: image_scale.as_ptr(),
                x_scale_stride: image_stride,
                x_zero: codes.zero(),
                x_unsigned: usize::from(codes.unsigned),
                w_scale: channel_scale.as_ptr(),
                w_scale_stride: channel_stride,
                shape,
                epilogue: (!collector.is_null()).then_some(Collector::collect),
                epilogue_ctx: collector.cast(),
                streams: null(),
                stream_count: 0,
                scratch,
            }
        );
        check_kernel!(
            tables(),
            KernelId::Conv2dGradInputI8,
            nx,
            shape.in_channels,
            |result: &[f32], what: &str| assert_eq!(result, dx, "{what}"),
            shape,
            |dx: *mut f32, collector: *mut Collector, scratch: *mut u8| Conv2dGradInputI8Args {
                dy: dy.as_ptr(),
                w: w.as_ptr(),
                dx,
                dy_scale: image_scale.as_ptr(),
                dy_scale_stride: image_stride,
                w_scale: channel_scale.as_ptr(),
                w_scale_stride: channel_stride,
                shape,
                epilogue: (!collector.is_null()).then_some(Collector::collect),
                epilogue_ctx: collector.cast(),
                streams: null(),
                stream_count: 0,
                scratch,
            }
        );
    }
}

/// Checks an int8 gradient of the weight on every tier and split, bit for bit.
fn check_int8_grad_weight(
    shape: ConvShape,
    x: &[i8],
    dy: &[i8],
    [x_stride, dy_stride]: [usize; 2],
) {
    let (nx, nw, ny) = sizes(&shape);
    assert_eq!((x.len(), dy.len()), (nx, ny));
    let mut sums = vec![0_i64; nw];
    products(&shape, |i, j, k| sums[j] += i64::from(x[i]) * i64::from(dy[k]));
    let mut random = Random(8);
    let (x_scale, dy_scale) =
        (random.reals(shape.in_channels.max(1)), random.reals(shape.out_channels.max(1)));
    let kernel = shape.kernel_height * shape.kernel_width;
    let (inner, outer) = (shape.in_channels / shape.groups, shape.out_channels / shape.groups);
    let scale = |at: usize| {
        let (o, i) = (at / kernel / inner, at / kernel % inner);
        x_scale[(o / outer * inner + i) * x_stride] * dy_scale[o * dy_stride]
    };
    let scaled = sums.iter().enumerate().map(|(at, &sum)| (sum as f32 * scale(at)).to_bits());
    let expected: Vec<u32> = scaled.collect();
    for table in tables() {
        let what = format!("{shape:?} on {}", table.tier);
        let gradient = Conv2dGradWeightArgs {
            x: x.as_ptr(),
            dy: dy.as_ptr(),
            dw: null_mut(),
            shape,
            scratch: null_mut(),
        };
        let mut args = Conv2dGradWeightI8Args {
            gradient,
            x_scale: x_scale.as_ptr(),
            x_scale_stride: x_stride,
            dy_scale: dy_scale.as_ptr(),
            dy_scale_stride: dy_stride,
        };
        let mut space = scratch(table, KernelId::Conv2dGradWeightI8, &args);
        args.gradient.scratch = space.as_mut_ptr().cast();
        for pieces in [1, 7, ALONE] {
            let mut dw = Guarded::new(nw);
            args.gradient.dw = dw.as_mut_ptr();
            run(table, KernelId::Conv2dGradWeightI8, &args, pieces);
            let dw: Vec<u32> = dw.checked(&what).iter().map(|v| v.to_bits()).collect();
            assert_eq!(dw, expected, "{what}");
        }
    }
}

#[test]
fn int8_grad_weight_is_exact_on_every_tier() {
    let mut random = Random(6);
    for (at, shape) in shapes().into_iter().enumerate() {
        let (nx, _, ny) = sizes(&shape);
        let (x, dy) = (random.bytes(nx), random.bytes(ny));
        check_int8_grad_weight(shape, &x, &dy, [at % 2, at / 2 % 2]);
    }
}

/// Depthwise: rows whose products an f32 just sums exactly, longer ones, and channels beyond whole vectors.
#[test]
fn int8_grad_weight_of_depthwise_convolutions_is_exact() {
    for (width, channels) in [(1024, 19), (1025, 3), (40, 64), (3, 1)] {
        let words = [3, 4, width, channels, channels, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, channels];
        let shape = shape(words);
        let (nx, _, ny) = sizes(&shape);
        for strides in [[0, 0], [1, 0], [0, 1], [1, 1]] {
            check_int8_grad_weight(shape, &vec![-128; nx], &vec![-128; ny], strides);
        }
        let mut random = Random(7);
        check_int8_grad_weight(shape, &random.bytes(nx), &random.bytes(ny), [1, 1]);
    }
}

/// More pixels than an i32 holds products of, all as large as can be.
#[test]
fn int8_grad_weight_does_not_overflow() {
    let shape = shape([6, 210, 211, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1]);
    let (nx, _, ny) = sizes(&shape);
    assert!(ny > 2 * MOST_I8_PIXELS);
    check_int8_grad_weight(shape, &vec![-128; nx], &vec![-128; ny], [0, 0]);
}

#[test]
fn scratch_needs_no_tensors() {
    let args: Conv2dArgs = Conv2dArgs {
        x: null(),
        w: null(),
        y: null_mut(),
        shape: shapes()[1],
        epilogue: None,
        epilogue_ctx: null(),
        streams: null(),
        stream_count: 0,
        scratch: null_mut(),
    };
    let codes = Conv2dI8Args {
        x: null(),
        w: null(),
        y: null_mut(),
        x_scale: null(),
        x_scale_stride: 0,
        // Not to be read.
        x_zero: std::ptr::without_provenance(8),
        x_unsigned: 1,
        w_scale: null(),
        w_scale_stride: 0,
        shape: shapes()[1],
        epilogue: None,
        epilogue_ctx: null(),
        streams: null(),
        stream_count: 0,
        scratch: null_mut(),
    };
    for table in tables() {
        assert!(scratch(table, KernelId::Conv2d, &args).len() > 1);
        assert!(scratch(table, KernelId::Conv2dI8, &codes).len() > 1);
    }
}
