//! What products of transforms round, beside the direct sums.

use super::check::{Random, run, scratch, tables};
use super::convolution::{products, sizes};
use crate::KernelId;
use crate::args::{Conv2dArgs, Conv2dGradInputArgs, Conv2dGradWeightArgs, ConvShape};
use std::ptr::{null, null_mut};

/// Numbers of about normal distribution.
fn normal(random: &mut Random, count: usize) -> Vec<f32> {
    (0..count).map(|_| random.reals(12).iter().sum::<f32>() / 2.0).collect()
}

/// The root of the mean square of the error, relative to that of the values.
fn error(actual: &[f32], expected: &[f64]) -> f64 {
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let off = squares(&mut actual.iter().zip(expected).map(|(&a, &e)| f64::from(a) - e));
    (off / squares(&mut expected.iter().copied())).sqrt()
}

/// The kernel `[..][3][3]` with a fourth column of zeros, which no transform is for.
fn widened(kernel: &[f32]) -> Vec<f32> {
    kernel.chunks(3).flat_map(|row| [row[0], row[1], row[2], 0.0]).collect()
}

/// Forward, gradient of the input and of the weight.
fn results(
    table: &'static crate::Kernels,
    shape: ConvShape,
    [x, w, dy]: [&[f32]; 3],
) -> [Vec<f32>; 3] {
    let (nx, nw, ny) = sizes(&shape);
    let (mut y, mut dx, mut dw) = (vec![0.0; ny], vec![0.0; nx], vec![0.0; nw]);
    macro_rules! call {
        ($id:ident, $args:expr) => {
            let mut args = $args;
            let mut space = scratch(table, KernelId::$id, &args);
            args.scratch = space.as_mut_ptr().cast();
            run(table, KernelId::$id, &args, 1);
        };
    }
    let (epilogue, epilogue_ctx, streams, stream_count) = (None, null(), null(), 0);
    let (x, w, dy, scratch_pointer) = (x.as_ptr(), w.as_ptr(), dy.as_ptr(), null_mut());
    call!(
        Conv2d,
        Conv2dArgs {
            x,
            w,
            y: y.as_mut_ptr(),
            shape,
            epilogue,
            epilogue_ctx,
            streams,
            stream_count,
            scratch: scratch_pointer
        }
    );
    call!(
        Conv2dGradInput,
        Conv2dGradInputArgs {
            dy,
            w,
            dx: dx.as_mut_ptr(),
            shape,
            epilogue,
            epilogue_ctx,
            streams,
            stream_count,
            scratch: scratch_pointer
        }
    );
    call!(
        Conv2dGradWeight,
        Conv2dGradWeightArgs { x, dy, dw: dw.as_mut_ptr(), shape, scratch: scratch_pointer }
    );
    [y, dx, dw]
}

#[test]
fn products_of_transforms_round_about_as_direct_sums() {
    let shape = ConvShape {
        batch: 2,
        height: 14,
        width: 14,
        in_channels: 64,
        out_channels: 64,
        kernel_height: 3,
        kernel_width: 3,
        stride_height: 1,
        stride_width: 1,
        pad_top: 1,
        pad_left: 1,
        pad_bottom: 1,
        pad_right: 1,
        dilation_height: 1,
        dilation_width: 1,
        groups: 1,
    };
    let wide = ConvShape { kernel_width: 4, pad_right: 2, ..shape };
    let (nx, nw, ny) = sizes(&shape);
    let mut random = Random(9);
    let (x, w, dy) = (normal(&mut random, nx), normal(&mut random, nw), normal(&mut random, ny));
    let mut expected = [vec![0.0_f64; ny], vec![0.0; nx], vec![0.0; nw]];
    products(&shape, |i, j, k| {
        let [a, b, c] = [x[i], w[j], dy[k]].map(f64::from);
        expected[0][k] += a * b;
        expected[1][i] += c * b;
        expected[2][j] += a * c;
    });
    for table in tables() {
        let transformed = results(table, shape, [&x, &w, &dy]);
        let mut direct = results(table, wide, [&x, &widened(&w), &dy]);
        direct[2] = direct[2].chunks(4).flat_map(|row| [row[0], row[1], row[2]]).collect();
        let errors: Vec<_> = (0..3)
            .map(|at| (error(&transformed[at], &expected[at]), error(&direct[at], &expected[at])))
            .collect();
        for &(transformed, direct) in &errors {
            // Else the direct kernels have computed both.
            assert!(transformed != direct, "{}: {errors:?}", table.tier);
            assert!(transformed <= 1.5 * direct, "{}: {errors:?}", table.tier);
        }
    }
}
