//! Max pooling and its gradient.

use crate::args::{MaxPoolArgs, MaxPoolGradArgs, PoolShape};
use crate::lanes::{Element, Simd, Task};
use crate::{Primitive, no_parts};
use std::marker::PhantomData;

/// Channels handled at once: their indices fit the stack and L1.
const CHANNELS: usize = 64;

impl PoolShape {
    /// Kernel positions (as input row or column) of one window along an axis, clipped to the input.
    #[inline(always)]
    pub(crate) fn taps(
        out: usize,
        stride: usize,
        pad: usize,
        kernel: usize,
        dilation: usize,
        size: usize,
    ) -> impl Iterator<Item = usize> + Clone {
        (0..kernel).filter_map(move |k| {
            (out * stride + k * dilation).checked_sub(pad).filter(|&at| at < size)
        })
    }

    /// Input rows of an output row's windows.
    #[inline(always)]
    pub(crate) fn rows(&self, out: usize) -> impl Iterator<Item = usize> + Clone + use<> {
        let s = self;
        Self::taps(out, s.stride_height, s.pad_top, s.kernel_height, s.dilation_height, s.height)
    }

    /// Input columns of an output column's windows.
    #[inline(always)]
    pub(crate) fn columns(&self, out: usize) -> impl Iterator<Item = usize> + Clone + use<> {
        let s = self;
        Self::taps(out, s.stride_width, s.pad_left, s.kernel_width, s.dilation_width, s.width)
    }
}

unsafe extern "C" fn no_scratch(_args: *const u64) -> usize {
    0
}

unsafe extern "C" fn units(args: *const u64, _phase: usize) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    let shape = unsafe { (*args.cast::<MaxPoolArgs>()).shape };
    shape.batch * shape.out_height
}

unsafe extern "C" fn run<E: Ordered, S: Simd>(
    args: *const u64,
    _phase: usize,
    begin: usize,
    end: usize,
) {
    // SAFETY: the caller passes the argument block of this kernel, on a CPU of the tier.
    let args = unsafe { *args.cast::<MaxPoolArgs>() };
    // SAFETY: as above.
    unsafe { S::enter(Forward::<E> { args, begin, end, element: PhantomData }) }
}

/// What a maximum is taken of.
pub(crate) trait Ordered: Copy + 'static {
    /// What every element displaces: the maximum of none.
    const LEAST: Self;
    /// Whether a later element of the window displaces the best so far.
    fn wins(self, best: Self) -> bool;
}

impl Ordered for f32 {
    const LEAST: f32 = f32::NEG_INFINITY;
    #[inline(always)]
    fn wins(self, best: f32) -> bool {
        (self > best) | (self.is_nan() & !best.is_nan())
    }
}

impl Ordered for i8 {
    const LEAST: i8 = i8::MIN;
    #[inline(always)]
    fn wins(self, best: i8) -> bool {
        self > best
    }
}

/// The bits of a bf16.
impl Ordered for u16 {
    const LEAST: u16 = 0xff80;
    #[inline(always)]
    fn wins(self, best: u16) -> bool {
        self.real().wins(best.real())
    }
}

/// Max pooling of an element type on a tier; a unit is an output row.
pub(crate) const fn primitive<E: Ordered, S: Simd>() -> Primitive {
    Primitive { phases: 1, units, run: run::<E, S>, scratch: no_scratch, parts: no_parts }
}

struct Forward<E> {
    args: MaxPoolArgs,
    begin: usize,
    end: usize,
    element: PhantomData<E>,
}

impl<E: Ordered> Task for Forward<E> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let s = self.args.shape;
        let c = s.channels;
        for unit in self.begin..self.end {
            let (image, row) = (unit / s.out_height, unit % s.out_height);
            for column in 0..s.out_width {
                // SAFETY: the window is clipped to the input, the output pixel exists.
                unsafe {
                    let at = (unit * s.out_width + column) * c;
                    let y = self.args.y.cast::<E>().add(at);
                    let out = std::slice::from_raw_parts_mut(y, c);
                    out.fill(E::LEAST);
                    for y in s.rows(row) {
                        for x in s.columns(column) {
                            let from = ((image * s.height + y) * s.width + x) * c;
                            let values = self.args.x.cast::<E>().add(from);
                            let values = std::slice::from_raw_parts(values, c);
                            for (best, &value) in out.iter_mut().zip(values) {
                                *best = if value.wins(*best) { value } else { *best };
                            }
                        }
                    }
                }
            }
        }
    }
}

unsafe extern "C" fn grad_units(args: *const u64, _phase: usize) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    let shape = unsafe { (*args.cast::<MaxPoolGradArgs>()).shape };
    shape.batch * shape.channels.div_ceil(CHANNELS)
}

unsafe extern "C" fn grad_run<S: Simd>(args: *const u64, _phase: usize, begin: usize, end: usize) {
    // SAFETY: the caller passes the argument block of this kernel, on a CPU of the tier.
    unsafe { S::enter(Grad { args: *args.cast::<MaxPoolGradArgs>(), begin, end }) }
}

/// The gradient on a tier; a unit is an image's block of channels.
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
    args: MaxPoolGradArgs,
    begin: usize,
    end: usize,
}

impl Task for Grad {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let s = self.args.shape;
        let blocks = s.channels.div_ceil(CHANNELS);
        for unit in self.begin..self.end {
            let (image, block) = (unit / blocks, unit % blocks);
            let first = block * CHANNELS;
            let c = CHANNELS.min(s.channels - first);
            let pixels = image * s.height * s.width;
            // SAFETY: windows are clipped to the input, and no other unit has these channels.
            unsafe {
                for pixel in pixels..pixels + s.height * s.width {
                    self.args.dx.add(pixel * s.channels + first).write_bytes(0, c);
                }
                for row in 0..s.out_height {
                    for column in 0..s.out_width {
                        let mut best = [f32::NEG_INFINITY; CHANNELS];
                        // The first pixel wins even with -inf; none does where all is padding.
                        let mut winner = [u32::MAX; CHANNELS];
                        for y in s.rows(row) {
                            for x in s.columns(column) {
                                let pixel = y * s.width + x;
                                let from = (pixels + pixel) * s.channels + first;
                                let values = std::slice::from_raw_parts(self.args.x.add(from), c);
                                for ((best, winner), &value) in
                                    best.iter_mut().zip(&mut winner).zip(values)
                                {
                                    let take = value.wins(*best) | (*winner == u32::MAX);
                                    *best = if take { value } else { *best };
                                    *winner = if take { pixel as u32 } else { *winner };
                                }
                            }
                        }
                        let at = (image * s.out_height + row) * s.out_width + column;
                        let dy = self.args.dy.add(at * s.channels + first);
                        for (i, &winner) in winner.iter().enumerate().take(c) {
                            if winner != u32::MAX {
                                let to = (pixels + winner as usize) * s.channels + first + i;
                                *self.args.dx.add(to) += *dy.add(i);
                            }
                        }
                    }
                }
            }
        }
    }
}
