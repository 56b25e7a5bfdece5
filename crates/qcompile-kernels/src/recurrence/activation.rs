//! Activations of recurrent cells over rows, and their derivatives from their values.

use crate::args::{ActivationArgs, ActivationKind};
use crate::lanes::{Lanes, Simd, Task};
use crate::softmax::exp_fused;

/// `1 / (1 + exp(-x))` to about 1 ulp.
#[inline(always)]
fn sigmoid(x: f32, fused: bool) -> f32 {
    let power = exp_fused(-x.abs(), fused);
    let part = 1.0 / (1.0 + power);
    if x < 0.0 { power * part } else { part }
}

/// The hyperbolic tangent to about 2 ulp.
#[inline(always)]
fn tanh(x: f32, fused: bool) -> f32 {
    let fma = |a: f32, b: f32, c: f32| if fused { a.mul_add(b, c) } else { a * b + c };
    // Near zero the quotient cancels; there the polynomial of Cephes tanhf.
    let z = x * x;
    let mut p = -5.704_988_7e-3;
    p = fma(p, z, 2.063_908_8e-2);
    p = fma(p, z, -5.373_971_6e-2);
    p = fma(p, z, 1.333_144_2e-1);
    p = fma(p, z, -3.333_328e-1);
    let near = fma(p * z, x, x);
    let power = exp_fused(-2.0 * x.abs(), fused);
    let far = ((1.0 - power) / (1.0 + power)).copysign(x);
    if x.abs() < 0.625 { near } else { far }
}

#[inline(always)]
fn map(values: &mut [f32], f: impl Fn(f32) -> f32) {
    for value in values {
        *value = f(*value);
    }
}

/// Replaces every value by the function of it. `fused` asks for fused multiply and add where the tier does without.
///
/// # Safety
/// The CPU supports the tier.
pub(super) unsafe fn activate<S: Simd>(
    activation: &ActivationArgs,
    fused: bool,
    values: &mut [f32],
) {
    // SAFETY: passed on from the caller.
    unsafe { BaseTier::<S>::enter(Activate { activation, fused, values }) }
}

/// The tier by its f32 lanes: tiers that multiply in other ways share the code.
type BaseTier<S> = <<S as Simd>::Real as Lanes>::Tier;

struct Activate<'a> {
    activation: &'a ActivationArgs,
    fused: bool,
    values: &'a mut [f32],
}

impl Task for Activate<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        activated(self.activation, S::FMA || self.fused, self.values);
    }
}

#[inline(always)]
fn activated(activation: &ActivationArgs, fused: bool, values: &mut [f32]) {
    let (alpha, beta) = (activation.alpha as f32, activation.beta as f32);
    match activation.kind {
        ActivationKind::Sigmoid => map(values, |x| sigmoid(x, fused)),
        ActivationKind::Tanh => map(values, |x| tanh(x, fused)),
        ActivationKind::Relu => map(values, |x| if x < 0.0 { 0.0 } else { x }),
        ActivationKind::Affine => map(values, |x| alpha * x + beta),
        ActivationKind::LeakyRelu => map(values, |x| if x < 0.0 { alpha * x } else { x }),
        ActivationKind::ThresholdedRelu => map(values, |x| if x <= alpha { 0.0 } else { x }),
        ActivationKind::ScaledTanh => map(values, |x| alpha * tanh(beta * x, fused)),
        ActivationKind::HardSigmoid => map(values, |x| (alpha * x + beta).clamp(0.0, 1.0)),
        ActivationKind::Elu => map(values, |x| if x < 0.0 { alpha * x.exp_m1() } else { x }),
        ActivationKind::Softsign => map(values, |x| x / (1.0 + x.abs())),
        ActivationKind::Softplus => map(values, |x| x.max(0.0) + (-x.abs()).exp().ln_1p()),
    }
}

#[inline(always)]
fn scale(gradient: &mut [f32], values: &[f32], slope: impl Fn(f32) -> f32) {
    for (gradient, &value) in gradient.iter_mut().zip(values) {
        *gradient *= slope(value);
    }
}

/// Multiplies a gradient by the derivative where the function has these values.
///
/// # Safety
/// The CPU supports the tier.
pub(super) unsafe fn multiply_slope<S: Simd>(
    activation: &ActivationArgs,
    values: &[f32],
    gradient: &mut [f32],
) {
    // SAFETY: passed on from the caller.
    unsafe { BaseTier::<S>::enter(MultiplySlope { activation, values, gradient }) }
}

struct MultiplySlope<'a> {
    activation: &'a ActivationArgs,
    values: &'a [f32],
    gradient: &'a mut [f32],
}

impl Task for MultiplySlope<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        sloped(self.activation, self.values, self.gradient);
    }
}

#[inline(always)]
fn sloped(activation: &ActivationArgs, values: &[f32], gradient: &mut [f32]) {
    let (alpha, beta) = (activation.alpha as f32, activation.beta as f32);
    let step = |above: bool, low: f32| if above { 1.0 } else { low };
    match activation.kind {
        ActivationKind::Sigmoid => scale(gradient, values, |y| y * (1.0 - y)),
        ActivationKind::Tanh => scale(gradient, values, |y| 1.0 - y * y),
        ActivationKind::Relu => scale(gradient, values, |y| step(y > 0.0, 0.0)),
        ActivationKind::Affine => scale(gradient, values, |_| alpha),
        ActivationKind::LeakyRelu => scale(gradient, values, |y| step(y >= 0.0, alpha)),
        ActivationKind::ThresholdedRelu => scale(gradient, values, |y| step(y != 0.0, 0.0)),
        ActivationKind::ScaledTanh => {
            scale(gradient, values, |y| beta * (alpha - y * y / alpha));
        }
        ActivationKind::HardSigmoid => {
            scale(gradient, values, |y| alpha * step((y > 0.0) & (y < 1.0), 0.0));
        }
        ActivationKind::Elu => scale(gradient, values, |y| step(y >= 0.0, y + alpha)),
        ActivationKind::Softsign => {
            scale(gradient, values, |y| (1.0 - y.abs()) * (1.0 - y.abs()));
        }
        ActivationKind::Softplus => scale(gradient, values, |y| 1.0 - (-y).exp()),
    }
}

/// Keeps values within ± `clip`, if that is finite.
#[inline(always)]
pub(super) fn clip(clip: f64, values: &mut [f32]) {
    if clip.is_finite() {
        let clip = clip as f32;
        // Comparisons pass a NaN on.
        map(values, |x| if x > clip { clip } else { x });
        map(values, |x| if x < -clip { -clip } else { x });
    }
}

/// As [`multiply_slope`], and by zero where what entered the function was clipped: at the ends of its values, which are
/// computed as [`activate`] does.
///
/// # Safety
/// The CPU supports the tier.
pub(super) unsafe fn multiply_clipped_slope<S: Simd>(
    activation: &ActivationArgs,
    clip: f64,
    fused: bool,
    values: &[f32],
    gradient: &mut [f32],
) {
    // SAFETY: passed on from the caller.
    unsafe { multiply_slope::<S>(activation, values, gradient) };
    if clip.is_finite() {
        let mut ends = [-clip as f32, clip as f32];
        // SAFETY: passed on from the caller.
        unsafe { activate::<S>(activation, fused, &mut ends) };
        scale(gradient, values, |y| if (y > ends[0]) & (y < ends[1]) { 1.0 } else { 0.0 });
    }
}
