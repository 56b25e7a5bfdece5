//! Average pooling and its gradient.

use crate::args::{AveragePoolArgs, AveragePoolGradArgs, PoolShape};
use crate::lanes::{Simd, Task};
use crate::{Primitive, no_parts};

/// Channels of a unit of the gradient.
const CHANNELS: usize = 64;

/// What a window's sum is divided by.
fn divisor(s: &PoolShape, row: usize, column: usize, count_include_pad: bool) -> f32 {
    let (rows, columns) = if count_include_pad {
        let (height, width) =
            (s.height + s.pad_top + s.pad_bottom, s.width + s.pad_left + s.pad_right);
        (
            PoolShape::taps(row, s.stride_height, 0, s.kernel_height, s.dilation_height, height)
                .count(),
            PoolShape::taps(column, s.stride_width, 0, s.kernel_width, s.dilation_width, width)
                .count(),
        )
    } else {
        (s.rows(row).count(), s.columns(column).count())
    };
    (rows * columns).max(1) as f32
}

unsafe extern "C" fn no_scratch(_args: *const u64) -> usize {
    0
}

unsafe extern "C" fn units(args: *const u64, _phase: usize) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    let shape = unsafe { (*args.cast::<AveragePoolArgs>()).shape };
    shape.batch * shape.out_height
}

unsafe extern "C" fn run<S: Simd>(args: *const u64, _phase: usize, begin: usize, end: usize) {
    // SAFETY: the caller passes the argument block of this kernel, on a CPU of the tier.
    unsafe { S::enter(Forward { args: *args.cast::<AveragePoolArgs>(), begin, end }) }
}

/// Average pooling on a tier; a unit is an output row.
pub(crate) const fn primitive<S: Simd>() -> Primitive {
    Primitive { phases: 1, units, run: run::<S>, scratch: no_scratch, parts: no_parts }
}

struct Forward {
    args: AveragePoolArgs,
    begin: usize,
    end: usize,
}

impl Task for Forward {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let s = self.args.shape;
        let c = s.channels;
        for unit in self.begin..self.end {
            let (image, row) = (unit / s.out_height, unit % s.out_height);
            for column in 0..s.out_width {
                let factor = 1.0 / divisor(&s, row, column, self.args.count_include_pad != 0);
                // SAFETY: the window is clipped to the input, the output pixel exists.
                unsafe {
                    let at = (unit * s.out_width + column) * c;
                    let out = std::slice::from_raw_parts_mut(self.args.y.add(at), c);
                    out.fill(0.0);
                    for y in s.rows(row) {
                        for x in s.columns(column) {
                            let from = ((image * s.height + y) * s.width + x) * c;
                            let values = std::slice::from_raw_parts(self.args.x.add(from), c);
                            for (sum, &value) in out.iter_mut().zip(values) {
                                *sum += value;
                            }
                        }
                    }
                    for sum in out {
                        *sum *= factor;
                    }
                }
            }
        }
    }
}

unsafe extern "C" fn grad_units(args: *const u64, _phase: usize) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    let shape = unsafe { (*args.cast::<AveragePoolGradArgs>()).shape };
    shape.batch * shape.channels.div_ceil(CHANNELS)
}

unsafe extern "C" fn grad_run<S: Simd>(args: *const u64, _phase: usize, begin: usize, end: usize) {
    // SAFETY: the caller passes the argument block of this kernel, on a CPU of the tier.
    unsafe { S::enter(Grad { args: *args.cast::<AveragePoolGradArgs>(), begin, end }) }
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
    args: AveragePoolGradArgs,
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
                        let include = self.args.count_include_pad != 0;
                        let factor = 1.0 / divisor(&s, row, column, include);
                        let at = (image * s.out_height + row) * s.out_width + column;
                        let dy = self.args.dy.add(at * s.channels + first);
                        let dy = std::slice::from_raw_parts(dy, c);
                        for y in s.rows(row) {
                            for x in s.columns(column) {
                                let to = (pixels + y * s.width + x) * s.channels + first;
                                let dx = std::slice::from_raw_parts_mut(self.args.dx.add(to), c);
                                for (sum, &value) in dx.iter_mut().zip(dy) {
                                    *sum += value * factor;
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}
