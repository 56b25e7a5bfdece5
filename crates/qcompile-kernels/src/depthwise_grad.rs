//! Gradient of a depthwise convolution by its weights: lanes are channels. bf16 and int8 go through f32; sums of int8 are
//! exact there within a row, and i32 beyond.

use crate::args::Conv2dGradWeightArgs;
use crate::buffer::{Buffer, Slot};
use crate::depthwise::{self, Reach};
use crate::geometry::Geometry;
use crate::grad_weight::Cut;
use crate::lanes::{Codes, Element, Lanes, Simd, Task};
use crate::window::Extent;

/// Most taps whose sums one sweep over a row keeps in registers: those of a 3 x 3 kernel.
const MOST_TAPS: usize = 9;

/// Columns of a row whose products of i8 an f32 sums exactly.
pub(crate) const MOST_EXACT_COLUMNS: usize = 1 << 10;

/// Partial sums of a depthwise convolution: rows are kernel positions, columns are channels.
pub(crate) struct Depthwise<E> {
    pub(crate) args: Conv2dGradWeightArgs<E>,
    pub(crate) cut: Cut,
    pub(crate) begin: usize,
    pub(crate) end: usize,
}

impl<E: Element> Task for Depthwise<E> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (cut, args, g) = (&self.cut, &self.args, &self.cut.g);
        let channels = g.groups;
        let (height, columns) = (g.rows.target, g.columns.target);
        let mut taps = Vec::new();
        for chunk in self.begin..self.end {
            let images = cut.images(chunk);
            // What is widened at once stays near.
            let parts = depthwise::parts(&Geometry { batch: images.len(), ..*g }, 1);
            // SAFETY: rows lie in the partial sums, taps in the source.
            unsafe {
                let sums = args.scratch.cast::<f32>().add(cut.partial(chunk, 0, 0));
                sums.write_bytes(0, g.kernel * cut.stride);
                for (part, image) in (0..parts.count()).flat_map(|index| {
                    let part = parts.part(index);
                    (part.image..part.image + part.images).map(move |image| (part, image))
                }) {
                    let image = images.start + image;
                    let line_values = g.columns.source * channels;
                    let x = args.x.add(image * g.rows.source * line_values);
                    let dy = args.dy.add((image * height + part.row_begin) * columns * channels);
                    let read = Extent::of(g, part.row_begin, part.row_end).source_rows(g);
                    let size = if E::NARROW { read.len() * line_values } else { 0 };
                    let mut wide_x = Buffer::take(Slot::Left, size);
                    let size = (part.row_end - part.row_begin) * columns * channels;
                    let mut wide_dy = Buffer::take(Slot::Right, if E::NARROW { size } else { 0 });
                    let (x, dy, first_row) = if E::NARROW {
                        let (to_x, to_dy) = (wide_x.words().cast(), wide_dy.words().cast());
                        depthwise::widen(
                            x.add(read.start * line_values),
                            read.len() * line_values,
                            to_x,
                            Codes::default(),
                        );
                        depthwise::widen(dy, size, to_dy, Codes::default());
                        (to_x.cast_const(), to_dy.cast_const(), read.start)
                    } else {
                        (x.cast(), dy.cast(), 0)
                    };
                    for row in part.row_begin..part.row_end {
                        let line = Line {
                            x,
                            dy: dy.add((row - part.row_begin) * columns * channels),
                            sums,
                            stride: cut.stride,
                            channels,
                            step: g.columns.step() * channels,
                            whole: E::WHOLE,
                        };
                        depthwise::reaches(g, (0, 0), row, first_row, channels, &mut taps);
                        for taps in taps.chunks(MOST_TAPS) {
                            if let Ok(taps) = taps.try_into() {
                                line.add::<S, MOST_TAPS>(taps);
                                continue;
                            }
                            let mut threes = taps.chunks_exact(3);
                            for taps in &mut threes {
                                if let Ok(taps) = taps.try_into() {
                                    line.add::<S, 3>(taps);
                                }
                            }
                            for &tap in threes.remainder() {
                                line.add::<S, 1>(&[tap]);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// One row of output pixels.
struct Line {
    /// What the taps' offsets count from.
    x: *const f32,
    dy: *const f32,
    /// Sums of kernel position 0.
    sums: *mut f32,
    /// From one position's sums to the next one's.
    stride: usize,
    channels: usize,
    /// From one column's source to the next one's.
    step: usize,
    /// Whether the sums are i32.
    whole: bool,
}

/// The lanes of a vector, at most.
const MOST_LANES: usize = 16;

impl Line {
    /// The sums of some lanes so far, which those of this row go on from.
    ///
    /// # Safety
    /// `sums` holds the lanes.
    #[inline(always)]
    unsafe fn begin<L: Lanes>(&self, sums: *const f32) -> L::V {
        // SAFETY: granted by the caller.
        unsafe { if self.whole { L::zero() } else { L::load(sums.cast()) } }
    }

    /// Stores the sums, or adds those of this row.
    ///
    /// # Safety
    /// As for [`begin`](Self::begin); whole sums are within i32.
    #[inline(always)]
    unsafe fn end<L: Lanes>(&self, sum: L::V, sums: *mut f32) {
        // SAFETY: granted by the caller; a vector has at most so many lanes.
        unsafe {
            if !self.whole {
                L::store(sums.cast(), sum);
                return;
            }
            let mut row = [0.0_f32; MOST_LANES];
            L::store(row.as_mut_ptr().cast(), sum);
            for (at, sum) in row.iter().enumerate().take(L::LANES) {
                *sums.cast::<i32>().add(at) += sum.to_int_unchecked::<i32>();
            }
        }
    }

    /// Adds the row's products for some taps.
    #[inline(always)]
    unsafe fn add<S: Simd, const T: usize>(&self, taps: &[Reach; T]) {
        let lanes = S::Real::LANES;
        let inner = depthwise::common(taps, usize::MAX);
        // SAFETY: granted by the caller.
        unsafe {
            let mut channel = 0;
            while channel + lanes <= self.channels {
                let (x, dy) = (self.x.wrapping_add(channel), self.dy.add(channel));
                let out = |tap: &Reach| self.sums.add(tap.position * self.stride + channel);
                let mut sums = [S::Real::zero(); T];
                for (sum, tap) in sums.iter_mut().zip(taps) {
                    *sum = self.begin::<S::Real>(out(tap));
                    let (begin, end) = tap.columns;
                    let (before, after) = (inner.start.min(end), inner.end.max(begin));
                    for column in (begin..before).chain(after.max(before)..end) {
                        let from = x.wrapping_offset(tap.offset).wrapping_add(column * self.step);
                        let b = S::Real::load(dy.add(column * self.channels).cast());
                        *sum = S::Real::dot(*sum, S::Real::load(from.cast()), b);
                    }
                }
                for column in inner.clone() {
                    let b = S::Real::load(dy.add(column * self.channels).cast());
                    let from = x.wrapping_add(column * self.step);
                    for (sum, tap) in sums.iter_mut().zip(taps) {
                        let a = S::Real::load(from.wrapping_offset(tap.offset).cast());
                        *sum = S::Real::dot(*sum, a, b);
                    }
                }
                for (&sum, tap) in sums.iter().zip(taps) {
                    self.end::<S::Real>(sum, out(tap));
                }
                channel += lanes;
            }
            for channel in channel..self.channels {
                for tap in taps {
                    let out = self.sums.add(tap.position * self.stride + channel);
                    let x = self.x.wrapping_offset(tap.offset).wrapping_add(channel);
                    let mut sum = if self.whole { 0.0 } else { *out };
                    for column in tap.columns.0..tap.columns.1 {
                        let a = *x.wrapping_add(column * self.step);
                        sum += a * *self.dy.add(column * self.channels + channel);
                    }
                    if self.whole {
                        *out.cast::<i32>() += sum.to_int_unchecked::<i32>();
                    } else {
                        *out = sum;
                    }
                }
            }
        }
    }
}
