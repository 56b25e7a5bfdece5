//! Depthwise convolution: every channel by itself, lanes are channels. The source is read in place, and
//! taps that would meet padding are left out.
//!
//! bf16 and int8 go through f32. For int8, products and their sums are whole numbers below 2^24, so the
//! sums are exact.

use crate::buffer::{Buffer, Slot};
use crate::conv::Convolution;
use crate::geometry::{Geometry, Parts, Tap};
use crate::lanes::{Codes, Element, Lanes, Simd, Task};
use crate::window::{Ahead, Extent};
use std::ops::Range;

/// Most values of a unit, about: they stay in L2 until its rows are finished.
const UNIT_VALUES: usize = 32 << 10;

/// Pixels that are finished at once.
const ROW_GROUP: usize = 24;

/// Units wanted, for the threads to share.
pub(crate) const WANTED_UNITS: usize = 32;

/// Parts of the target that make the units, at least so many if there are enough pixels.
pub(crate) fn parts(g: &Geometry, wanted: usize) -> Parts {
    let pixels = (UNIT_VALUES / g.groups.max(1)).clamp(ROW_GROUP, 256);
    Parts::new(g.batch, g.rows.target, g.columns.target, pixels, wanted)
}

/// One tap of a target row.
#[derive(Clone, Copy)]
pub(crate) struct Reach {
    /// Numbers of the columns whose source column exists.
    pub(crate) columns: (usize, usize),
    /// From the row's first source value to that of column number 0.
    pub(crate) offset: isize,
    /// The source row.
    pub(crate) row: usize,
    /// Position in the kernel.
    pub(crate) position: usize,
}

/// The taps that reach from row number `row` of a phase, for source rows that begin at `first_row`.
pub(crate) fn reaches(
    g: &Geometry,
    phases: (usize, usize),
    row: usize,
    first_row: usize,
    channels: usize,
    reaches: &mut Vec<Reach>,
) {
    reaches.clear();
    let (height, width) = (g.rows.source as isize, g.columns.source as isize);
    let count = g.columns.number(phases.1, g.columns.target) as isize;
    let step = g.columns.step() as isize;
    for down in g.rows.taps(phases.0) {
        let source = (row * g.rows.step()) as isize + down.shift;
        if source < 0 || source >= height {
            continue;
        }
        for across in g.columns.taps(phases.1) {
            let Tap { kernel, shift } = across;
            // 0 <= number * step + shift < width
            let begin = (-shift).max(0).unsigned_abs().div_ceil(step.unsigned_abs());
            let end = (width - shift).max(0).unsigned_abs().div_ceil(step.unsigned_abs());
            let end = end.min(count.unsigned_abs());
            if begin < end {
                reaches.push(Reach {
                    columns: (begin, end),
                    offset: ((source - first_row as isize) * width + shift) * channels as isize,
                    row: source.unsigned_abs(),
                    position: down.kernel * g.kernel_width + kernel,
                });
            }
        }
    }
}

/// The columns that all taps reach.
pub(crate) fn common(reaches: &[Reach], count: usize) -> Range<usize> {
    let begin = reaches.iter().map(|reach| reach.columns.0).max().unwrap_or(0);
    let end = reaches.iter().map(|reach| reach.columns.1).min().unwrap_or(count);
    begin.min(count)..end.max(begin).min(count)
}

/// Packs the weights as f32 `[kernel position][channel]`.
pub(crate) struct Pack<L: Lanes> {
    pub(crate) convolution: Convolution<L::Element>,
}

impl<L: Lanes> Task for Pack<L> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let c = &self.convolution;
        let (channels, kernel) = (c.geometry.groups, c.geometry.kernel);
        for channel in 0..channels {
            for position in 0..kernel {
                // SAFETY: inside the weights and the scratch.
                unsafe {
                    let value = (*c.weights.add(channel * kernel + position)).real();
                    *c.scratch.cast::<f32>().add(position * channels + channel) = value;
                }
            }
        }
    }
}

/// Computes units of the target.
pub(crate) struct Compute<L: Lanes> {
    pub(crate) convolution: Convolution<L::Element>,
    pub(crate) begin: usize,
    pub(crate) end: usize,
}

impl<L: Lanes> Task for Compute<L> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let c = &self.convolution;
        let g = &c.geometry;
        let channels = g.groups;
        let parts = parts(g, WANTED_UNITS);
        let direct = c.epilogue.is_none() && !L::INTEGER;
        let (height, width) = (g.rows.source, g.columns.source);
        let mut taps = Vec::new();
        let mut some = Vec::new();
        for unit in self.begin..self.end {
            let part = parts.part(unit);
            let rows = part.row_end - part.row_begin;
            let pixels = part.images * rows * g.columns.target;
            let mut result = Buffer::take(Slot::Result, if direct { 0 } else { pixels * channels });
            let read = Extent::of(g, part.row_begin, part.row_end).source_rows(g);
            let line_values = width * channels;
            let size = read.len() * line_values;
            let narrow = L::Element::NARROW;
            let mut widened = Buffer::take(Slot::Right, if narrow { size } else { 0 });
            let mut scales = Buffer::take(Slot::Scales, if L::INTEGER { channels } else { 0 });
            // SAFETY: the part lies in source and target; the buffers were sized for it above.
            unsafe {
                let finish = c.finish(&part, unit, 0..channels);
                let out = if direct { finish.result } else { result.words().cast() };
                for image in 0..part.images {
                    let from = c.source.add((part.image + image) * height * line_values);
                    let (source, first_row) = if narrow {
                        let to = widened.words().cast::<f32>();
                        widen(from.add(read.start * line_values), size, to, c.codes);
                        (to.cast_const(), read.start)
                    } else {
                        (from.cast::<f32>(), 0)
                    };
                    for row_phase in 0..g.rows.phases() {
                        let begin = g.rows.number(row_phase, part.row_begin);
                        let end = g.rows.number(row_phase, part.row_end);
                        for (j, phase) in (begin..end)
                            .flat_map(|j| (0..g.columns.phases()).map(move |phase| (j, phase)))
                        {
                            reaches(g, (row_phase, phase), j, first_row, channels, &mut taps);
                            let row =
                                image * rows + row_phase + j * g.rows.phases() - part.row_begin;
                            let line = Line {
                                source,
                                weights: c.scratch.cast(),
                                out: out.add((row * g.columns.target + phase) * channels),
                                channels,
                                step: g.columns.step() * channels,
                                apart: g.columns.phases() * channels,
                            };
                            let count = g.columns.number(phase, g.columns.target);
                            // The source row that the next target row reads first.
                            let mut ahead = Ahead::NONE;
                            let next = taps.last().map_or(0, |tap| tap.row + 1);
                            if !narrow && phase == 0 && next < read.end {
                                let next = source.wrapping_add((next - first_row) * line_values);
                                let values = line_values * g.rows.step();
                                ahead = Ahead::of(next, values).steps(count.div_ceil(4));
                            }
                            line.compute::<S>(count, &taps, &mut some, &mut ahead);
                        }
                    }
                }
                if direct {
                    continue;
                }
                let right = scales.words().cast::<f32>();
                if let Some(scales) = c.scales {
                    for ch in 0..channels {
                        *right.add(ch) = *scales.weight.add(ch * scales.weight_stride);
                    }
                }
                for first in (0..pixels).step_by(ROW_GROUP) {
                    let count = ROW_GROUP.min(pixels - first);
                    let block = out.add(first * channels);
                    if let Some(scales) = c.scales {
                        for r in 0..count {
                            let image = (first + r) / (rows * g.columns.target);
                            let image = (part.image + image) * scales.source_stride;
                            let left = *scales.source.add(image);
                            let row = block.add(r * channels);
                            for ch in 0..channels {
                                *row.add(ch) *= left * *right.add(ch);
                            }
                        }
                    }
                    finish.rows(block.cast(), channels, first, count);
                }
            }
        }
    }
}

/// Turns elements into f32, codes less their zero.
///
/// # Safety
/// Both are valid for the count.
#[inline(always)]
pub(crate) unsafe fn widen<E: Element>(from: *const E, count: usize, to: *mut f32, codes: Codes) {
    // SAFETY: granted by the caller.
    unsafe {
        let from = std::slice::from_raw_parts(from, count);
        let to = std::slice::from_raw_parts_mut(to, count);
        let zero = E::zero(codes).real();
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.flipped(codes.flip).real() - zero;
        }
    }
}

/// The columns of one phase in one target row.
struct Line {
    /// What the taps' offsets count from.
    source: *const f32,
    weights: *const f32,
    out: *mut f32,
    channels: usize,
    /// From one column's source to the next one's.
    step: usize,
    /// From one column's place to the next one's.
    apart: usize,
}

impl Line {
    #[inline(always)]
    unsafe fn compute<S: Simd>(
        &self,
        count: usize,
        taps: &[Reach],
        some: &mut Vec<Reach>,
        ahead: &mut Ahead,
    ) {
        let inner = common(taps, count);
        // SAFETY: granted by the caller.
        unsafe {
            for column in (0..inner.start).chain(inner.end..count) {
                some.clear();
                let reached = |tap: &&Reach| (tap.columns.0..tap.columns.1).contains(&column);
                some.extend(taps.iter().filter(reached));
                self.pixels::<S, 1>(column, some);
            }
            let mut column = inner.start;
            while column + 4 <= inner.end {
                ahead.step::<S>();
                self.pixels::<S, 4>(column, taps);
                column += 4;
            }
            while column < inner.end {
                self.pixels::<S, 1>(column, taps);
                column += 1;
            }
        }
    }

    /// Computes `P` columns, which all taps reach.
    #[inline(always)]
    unsafe fn pixels<S: Simd, const P: usize>(&self, column: usize, taps: &[Reach]) {
        let lanes = S::Real::LANES;
        let source = self.source.wrapping_add(column * self.step);
        // SAFETY: granted by the caller.
        unsafe {
            let out = self.out.add(column * self.apart);
            let mut channel = 0;
            while channel + lanes <= self.channels {
                let from = source.wrapping_add(channel);
                let mut sums = [S::Real::zero(); P];
                for tap in taps {
                    let weight = self.weights.add(tap.position * self.channels + channel);
                    let weight = S::Real::load(weight.cast());
                    let from = from.wrapping_offset(tap.offset);
                    for (p, sum) in sums.iter_mut().enumerate() {
                        let x = S::Real::load(from.wrapping_add(p * self.step).cast());
                        *sum = S::Real::dot(*sum, x, weight);
                    }
                }
                for (p, &sum) in sums.iter().enumerate() {
                    S::Real::store(out.add(p * self.apart + channel).cast(), sum);
                }
                channel += lanes;
            }
            for channel in channel..self.channels {
                for p in 0..P {
                    let from = source.wrapping_add(p * self.step + channel);
                    let mut sum = 0.0_f32;
                    for tap in taps {
                        let weight = *self.weights.add(tap.position * self.channels + channel);
                        sum += *from.wrapping_offset(tap.offset) * weight;
                    }
                    *out.add(p * self.apart + channel) = sum;
                }
            }
        }
    }
}
