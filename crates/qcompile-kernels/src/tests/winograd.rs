//! What products of transforms round, beside the direct sums.

use super::check::{Random, run, scratch, tables};
use super::convolution::{products, sizes};
use super::matrix::exact;
use crate::args::{Conv2dArgs, Conv2dGradInputArgs, Conv2dGradWeightArgs, ConvShape};
use crate::geometry::Geometry;
use crate::lanes::{Element, Simd};
use crate::portable::Portable;
use crate::winograd::{FEWEST_CHANNELS, FEWEST_GRADIENT_CHANNELS, suits};
use crate::{KernelId, Kernels, Tier};
use std::ptr::{null, null_mut};

/// Whether products of transforms compute a convolution of bf16, forward or the gradient of its input, or the gradient of its
/// weight, on tiers without AMX.
pub(super) fn is_transformed(shape: &ConvShape) -> [bool; 2] {
    let suits = |backward: bool, fewest: usize| {
        suits::<<Portable as Simd>::Bf16>(&Geometry::new(shape, backward), fewest)
    };
    let data = [false, true].iter().any(|&backward| suits(backward, FEWEST_CHANNELS));
    [data, suits(false, FEWEST_GRADIENT_CHANNELS)]
}

/// The tables whose transforms of bf16 are not rounded: the others have products of it.
pub(super) fn unrounded() -> Vec<&'static Kernels> {
    tables().into_iter().filter(|table| table.tier != Tier::Avx512Bf16).collect()
}

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
fn results<E: Element>(
    table: &'static Kernels,
    kernels: [KernelId; 3],
    shape: ConvShape,
    [x, w, dy]: [&[E]; 3],
) -> [Vec<f32>; 3] {
    let (nx, nw, ny) = sizes(&shape);
    let (mut y, mut dx, mut dw) = (vec![0.0; ny], vec![0.0; nx], vec![0.0; nw]);
    macro_rules! call {
        ($id:expr, $args:expr) => {
            let mut args = $args;
            let mut space = scratch(table, $id, &args);
            args.scratch = space.as_mut_ptr().cast();
            run(table, $id, &args, 1);
        };
    }
    let (epilogue, epilogue_ctx, streams, stream_count) = (None, null(), null(), 0);
    let (x, w, dy, scratch_pointer) = (x.as_ptr(), w.as_ptr(), dy.as_ptr(), null_mut());
    call!(
        kernels[0],
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
        kernels[1],
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
        kernels[2],
        Conv2dGradWeightArgs { x, dy, dw: dw.as_mut_ptr(), shape, scratch: scratch_pointer }
    );
    [y, dx, dw]
}

/// A convolution that is transformed.
fn shape() -> ConvShape {
    ConvShape {
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
    }
}

/// What [`results`] approximates.
fn sums<E: Element>(shape: &ConvShape, [x, w, dy]: [&[E]; 3]) -> [Vec<f64>; 3] {
    let (nx, nw, ny) = sizes(shape);
    let mut sums = [vec![0.0; ny], vec![0.0; nx], vec![0.0; nw]];
    let [x, w, dy] = [x, w, dy].map(exact);
    products(shape, |i, j, k| {
        sums[0][k] += x[i] * w[j];
        sums[1][i] += dy[k] * w[j];
        sums[2][j] += x[i] * dy[k];
    });
    sums
}

#[test]
fn products_of_transforms_round_about_as_direct_sums() {
    let shape = shape();
    let wide = ConvShape { kernel_width: 4, pad_right: 2, ..shape };
    let (nx, nw, ny) = sizes(&shape);
    let mut random = Random(9);
    let (x, w, dy) = (normal(&mut random, nx), normal(&mut random, nw), normal(&mut random, ny));
    let expected = sums(&shape, [&x, &w, &dy]);
    let kernels = [KernelId::Conv2d, KernelId::Conv2dGradInput, KernelId::Conv2dGradWeight];
    for table in tables() {
        let transformed = results(table, kernels, shape, [&x, &w, &dy]);
        let mut direct = results(table, kernels, wide, [&x, &widened(&w), &dy]);
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

/// Rounding the result to bf16, which usually follows, is off by 1.6e-3.
#[test]
fn transforms_of_bf16_are_rounded_once() {
    let shape = shape();
    let (nx, nw, ny) = sizes(&shape);
    let mut random = Random(10);
    let halves = |values: Vec<f32>| values.into_iter().map(u16::nearest).collect::<Vec<u16>>();
    let mut numbers = |count| halves(normal(&mut random, count));
    let (x, w, dy) = (numbers(nx), numbers(nw), numbers(ny));
    let expected = sums(&shape, [&x, &w, &dy]);
    let kernels =
        [KernelId::Conv2dBf16, KernelId::Conv2dGradInputBf16, KernelId::Conv2dGradWeightBf16];
    for table in tables() {
        let actual = results(table, kernels, shape, [&x, &w, &dy]);
        let errors: Vec<_> = (0..3).map(|at| error(&actual[at], &expected[at])).collect();
        let rounded = table.tier == Tier::Avx512Bf16;
        let range = if rounded { 1e-3..4.5e-3 } else { 0.0..1e-6 };
        let within = errors.iter().all(|error| range.contains(error));
        assert!(within, "{}: {errors:?}", table.tier);
    }
}
