//! Softmax, log-softmax, and the cross-entropy loss with its gradient.

use crate::args::{CrossEntropyArgs, CrossEntropyGradArgs, SoftmaxArgs};
use crate::lanes::{Simd, Task};
use crate::{Primitive, no_parts};
use std::sync::atomic::{AtomicU64, Ordering};

/// Accumulators of a row reduction; their number fixes the order of summation on every tier.
pub(crate) const LANES: usize = 16;

/// `exp(x)` to about 1 ulp for `x <= 0` down to -87; 0 below, NaN for NaN.
#[inline(always)]
pub(crate) fn exp<S: Simd>(x: f32) -> f32 {
    exp_fused(x, S::FMA)
}

/// [`exp`] with multiply and add fused or not.
#[inline(always)]
pub(crate) fn exp_fused(x: f32, fused: bool) -> f32 {
    let fma = |a: f32, b: f32, c: f32| if fused { a.mul_add(b, c) } else { a * b + c };
    // Adding 1.5 * 2^23 rounds to a whole number in the low mantissa bits.
    const SHIFT: f32 = 12_582_912.0;
    let clamped = if x < -87.3 { -87.3 } else { x };
    let shifted = fma(clamped, std::f32::consts::LOG2_E, SHIFT);
    let n = shifted - SHIFT;
    // ln 2 in two parts, the first exact in few bits.
    let r = fma(n, -0.693_359_4, clamped);
    let r = fma(n, 2.121_944_4e-4, r);
    // Minimax polynomial of Cephes expf.
    let mut p = 1.987_569_1e-4;
    p = fma(p, r, 1.398_2e-3);
    p = fma(p, r, 8.333_452e-3);
    p = fma(p, r, 4.166_579_6e-2);
    p = fma(p, r, 1.666_666_5e-1);
    p = fma(p, r, 0.5);
    let p = fma(p * r, r, r) + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    if x < -87.3 { 0.0 } else { p * power }
}

#[inline(always)]
pub(crate) fn reduce(values: &[f32], start: f32, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; LANES];
    let mut chunks = values.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = f(*lane, value);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane = f(*lane, value);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = f(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// The largest value; NaN if there is one.
#[inline(always)]
fn largest(values: &[f32]) -> f32 {
    reduce(values, f32::NEG_INFINITY, |a, b| if (b > a) | b.is_nan() { b } else { a })
}

/// The sum of `exp(value - max)`.
#[inline(always)]
fn sum_exp<S: Simd>(values: &[f32], max: f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let mut chunks = values.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += exp::<S>(value - max);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane += exp::<S>(value - max);
    }
    reduce(&lanes, 0.0, |a, b| a + b)
}

pub(crate) unsafe extern "C" fn no_scratch(_args: *const u64) -> usize {
    0
}

unsafe extern "C" fn units(args: *const u64, _phase: usize) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    unsafe { (*args.cast::<SoftmaxArgs>()).rows }
}

unsafe extern "C" fn run<S: Simd, const LOG: bool>(
    args: *const u64,
    _phase: usize,
    begin: usize,
    end: usize,
) {
    // SAFETY: the caller passes the argument block of this kernel, on a CPU of the tier.
    unsafe { S::enter(Softmax::<LOG> { args: *args.cast::<SoftmaxArgs>(), begin, end }) }
}

/// Softmax (or its logarithm) on a tier; a unit is a row.
pub(crate) const fn primitive<S: Simd, const LOG: bool>() -> Primitive {
    Primitive { phases: 1, units, run: run::<S, LOG>, scratch: no_scratch, parts: no_parts }
}

struct Softmax<const LOG: bool> {
    args: SoftmaxArgs,
    begin: usize,
    end: usize,
}

impl<const LOG: bool> Task for Softmax<LOG> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let cols = self.args.cols;
        for row in self.begin..self.end {
            // SAFETY: the row exists in both tensors; each value is read before it is overwritten.
            unsafe {
                let y = self.args.y.add(row * cols);
                if !std::ptr::eq(self.args.x, self.args.y) {
                    std::ptr::copy_nonoverlapping(self.args.x.add(row * cols), y, cols);
                }
                let y = std::slice::from_raw_parts_mut(y, cols);
                let max = largest(y);
                if LOG {
                    let shift = max + sum_exp::<S>(y, max).ln();
                    // Subtract in two steps where the maximum is large against the logarithm.
                    let rest = shift - max;
                    for value in y {
                        *value = (*value - max) - rest;
                    }
                } else {
                    for value in y.iter_mut() {
                        *value = exp::<S>(*value - max);
                    }
                    let factor = 1.0 / reduce(y, 0.0, |a, b| a + b);
                    for value in y {
                        *value *= factor;
                    }
                }
            }
        }
    }
}

/// Records that position `index` is bad; the smallest one stays, whatever the threads' order.
pub(crate) unsafe fn report(error: *mut u64, index: usize) {
    if error.is_null() {
        return;
    }
    // SAFETY: the caller grants an aligned word that other threads touch only by this function.
    let error = unsafe { AtomicU64::from_ptr(error) };
    let mark = index as u64 + 1;
    let mut seen = error.load(Ordering::Relaxed);
    while seen == 0 || seen > mark {
        match error.compare_exchange_weak(seen, mark, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => return,
            Err(now) => seen = now,
        }
    }
}

unsafe extern "C" fn loss_units(args: *const u64, _phase: usize) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    unsafe { (*args.cast::<CrossEntropyArgs>()).rows }
}

unsafe extern "C" fn loss_run<S: Simd>(args: *const u64, _phase: usize, begin: usize, end: usize) {
    // SAFETY: the caller passes the argument block of this kernel, on a CPU of the tier.
    unsafe { S::enter(Loss { args: *args.cast::<CrossEntropyArgs>(), begin, end }) }
}

/// Cross-entropy on a tier; a unit is a row.
pub(crate) const fn loss_primitive<S: Simd>() -> Primitive {
    Primitive {
        phases: 1,
        units: loss_units,
        run: loss_run::<S>,
        scratch: no_scratch,
        parts: no_parts,
    }
}

struct Loss {
    args: CrossEntropyArgs,
    begin: usize,
    end: usize,
}

impl Task for Loss {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let args = &self.args;
        for row in self.begin..self.end {
            // SAFETY: the row exists.
            unsafe {
                let label = *args.labels.add(row);
                let logits =
                    std::slice::from_raw_parts(args.logits.add(row * args.cols), args.cols);
                let loss = if label == args.ignore_index {
                    0.0
                } else if let Some(&logit) = usize::try_from(label).ok().and_then(|l| logits.get(l))
                {
                    let max = largest(logits);
                    sum_exp::<S>(logits, max).ln() - (logit - max)
                } else {
                    report(args.error, row);
                    f32::NAN
                };
                *args.losses.add(row) = loss;
            }
        }
    }
}

unsafe extern "C" fn grad_units(args: *const u64, _phase: usize) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    unsafe { (*args.cast::<CrossEntropyGradArgs>()).rows }
}

unsafe extern "C" fn grad_run<S: Simd>(args: *const u64, _phase: usize, begin: usize, end: usize) {
    // SAFETY: the caller passes the argument block of this kernel, on a CPU of the tier.
    unsafe { S::enter(Grad { args: *args.cast::<CrossEntropyGradArgs>(), begin, end }) }
}

/// The gradient of the cross-entropy on a tier; a unit is a row.
pub(crate) const fn grad_primitive<S: Simd>() -> Primitive {
    Primitive {
        phases: 1,
        units: grad_units,
        run: grad_run::<S>,
        scratch: no_scratch,
        parts: no_parts,
    }
}

struct Grad {
    args: CrossEntropyGradArgs,
    begin: usize,
    end: usize,
}

impl Task for Grad {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let args = &self.args;
        for row in self.begin..self.end {
            // SAFETY: the row exists; each logit is read before it is overwritten.
            unsafe {
                let out = args.dlogits.add(row * args.cols);
                if !std::ptr::eq(args.logits, args.dlogits) {
                    let from = args.logits.add(row * args.cols);
                    std::ptr::copy_nonoverlapping(from, out, args.cols);
                }
                let out = std::slice::from_raw_parts_mut(out, args.cols);
                let label = *args.labels.add(row);
                let class = usize::try_from(label).ok().filter(|&class| class < args.cols);
                let Some(class) = class.filter(|_| label != args.ignore_index) else {
                    if label != args.ignore_index {
                        report(args.error, row);
                    }
                    out.fill(0.0);
                    continue;
                };
                let dy = *args.dy.add(row * args.dy_stride);
                let max = largest(out);
                for value in out.iter_mut() {
                    *value = exp::<S>(*value - max);
                }
                let factor = 1.0 / reduce(out, 0.0, |a, b| a + b);
                for value in out.iter_mut() {
                    *value *= factor;
                }
                out[class] -= 1.0;
                for value in out {
                    *value *= dy;
                }
            }
        }
    }
}
