//! Depthwise convolution: every channel by itself, lanes are channels.
//!
//! int8 goes through f32: products and their sums are whole numbers below 2^24, so the sums are exact.

use crate::buffer::{Buffer, Slot};
use crate::conv::Convolution;
use crate::geometry::{Geometry, Parts};
use crate::lanes::{Lanes, Simd, Task};
use crate::tile::ROW_GROUP;
use crate::window::Window;

/// Parts of the target that make the units.
pub(crate) fn parts(g: &Geometry) -> Parts {
    Parts::new(g.batch, g.rows.target, g.columns.target, 256, 32)
}

/// All channels as one group, which is how the window sees them.
fn ungrouped(g: &Geometry) -> Geometry {
    Geometry { groups: 1, source_channels: g.groups, target_channels: g.groups, ..*g }
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
                    let value = real::<L>(c.weights.add(channel * kernel + position));
                    *c.scratch.cast::<f32>().add(position * channels + channel) = value;
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn real<L: Lanes>(element: *const L::Element) -> f32 {
    // SAFETY: the element type is f32 or i8, as `INTEGER` says.
    unsafe {
        if L::INTEGER {
            f32::from(element.cast::<i8>().read())
        } else {
            element.cast::<f32>().read()
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
        let g = ungrouped(&c.geometry);
        let channels = g.source_channels;
        let parts = parts(&c.geometry);
        let direct = c.epilogue.is_none() && !L::INTEGER;
        for unit in self.begin..self.end {
            let part = parts.part(unit);
            let (height, width) = (part.row_end - part.row_begin, g.columns.target);
            let pixels = part.images * height * width;
            let mut left = Buffer::take(Slot::Left, Window::words::<S::Real>(&g, &part, channels));
            let held = if direct { 0 } else { pixels * channels };
            let mut result = Buffer::take(Slot::Result, held);
            let size = part.images * g.rows.source * g.columns.source * channels;
            let mut widened = Buffer::take(Slot::Right, if L::INTEGER { size } else { 0 });
            // SAFETY: the part lies in source and target; the buffers were sized for it above.
            unsafe {
                let image = g.rows.source * g.columns.source * channels;
                let mut from_first = part;
                let source = if L::INTEGER {
                    // The window opens on f32 images; these begin with the part's first one.
                    let from = c.source.add(part.image * image);
                    let to = widened.words().cast::<f32>();
                    for i in 0..size {
                        *to.add(i) = real::<L>(from.add(i));
                    }
                    from_first.image = 0;
                    to.cast_const()
                } else {
                    c.source.cast()
                };
                let window = Window::open::<S::Real>(
                    &g,
                    &from_first,
                    source,
                    channels,
                    0..channels,
                    &mut left,
                );
                let finish = c.finish(&part, 0..channels);
                let out = if direct { finish.result } else { result.words().cast() };
                for row_phase in 0..g.rows.phases() {
                    for column_phase in 0..g.columns.phases() {
                        for image in 0..part.images {
                            let begin = g.rows.number(row_phase, part.row_begin);
                            let end = g.rows.number(row_phase, part.row_end);
                            for j in begin..end {
                                let row = row_phase + j * g.rows.phases() - part.row_begin;
                                let line = Line {
                                    window: &window,
                                    source: window.pixel(image, (j * g.rows.step()) as isize, 0),
                                    weights: c.scratch.cast(),
                                    out: out.add((image * height + row) * width * channels),
                                    channels,
                                };
                                line.compute::<S>(&g, row_phase, column_phase);
                            }
                        }
                    }
                }
                if !direct {
                    for first in (0..pixels).step_by(ROW_GROUP) {
                        let rows = ROW_GROUP.min(pixels - first);
                        let block = out.add(first * channels);
                        if let Some(scales) = c.scales {
                            for r in 0..rows {
                                let image = part.image + (first + r) / (height * width);
                                let left = *scales.source.add(image * scales.source_stride);
                                for ch in 0..channels {
                                    let right = *scales.weight.add(ch * scales.weight_stride);
                                    *block.add(r * channels + ch) *= left * right;
                                }
                            }
                        }
                        finish.rows(block.cast(), channels, first, rows);
                    }
                }
            }
        }
    }
}

/// One target row of one phase.
struct Line<'a> {
    window: &'a Window,
    source: *const u32,
    weights: *const f32,
    out: *mut f32,
    channels: usize,
}

impl Line<'_> {
    #[inline(always)]
    unsafe fn compute<S: Simd>(&self, g: &Geometry, row_phase: usize, column_phase: usize) {
        let lanes = S::Real::LANES;
        let mut column = column_phase;
        let step = g.columns.step() * self.window.pixel_pitch;
        let mut source = self.source;
        // SAFETY: granted by the caller.
        unsafe {
            while column < g.columns.target {
                let left = (g.columns.target - column).div_ceil(g.columns.phases());
                let pixels = if left >= 4 { 4 } else { 1 };
                let mut channel = 0;
                while channel + lanes <= self.channels {
                    if pixels == 4 {
                        self.tile::<S, 4>(g, row_phase, column_phase, column, channel, source);
                    } else {
                        self.tile::<S, 1>(g, row_phase, column_phase, column, channel, source);
                    }
                    channel += lanes;
                }
                for p in 0..pixels {
                    for channel in channel..self.channels {
                        let from = source.wrapping_add(p * step + channel);
                        let mut sum = 0.0_f32;
                        for down in g.rows.taps(row_phase) {
                            for across in g.columns.taps(column_phase) {
                                let at = self.window.offset(down.shift, across.shift);
                                let x = from.wrapping_offset(at).cast::<f32>().read();
                                let position = down.kernel * g.kernel_width + across.kernel;
                                sum += x * *self.weights.add(position * self.channels + channel);
                            }
                        }
                        let to = (column + p * g.columns.phases()) * self.channels + channel;
                        *self.out.add(to) = sum;
                    }
                }
                column += pixels * g.columns.phases();
                source = source.wrapping_add(pixels * step);
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, const P: usize>(
        &self,
        g: &Geometry,
        row_phase: usize,
        column_phase: usize,
        column: usize,
        channel: usize,
        source: *const u32,
    ) {
        let step = g.columns.step() * self.window.pixel_pitch;
        // SAFETY: granted by the caller.
        unsafe {
            let from = source.wrapping_add(channel);
            let mut sums = [S::Real::zero(); P];
            for down in g.rows.taps(row_phase) {
                for across in g.columns.taps(column_phase) {
                    let at = self.window.offset(down.shift, across.shift);
                    let position = down.kernel * g.kernel_width + across.kernel;
                    let weight = self.weights.add(position * self.channels + channel);
                    let weight = S::Real::load(weight.cast());
                    for (p, sum) in sums.iter_mut().enumerate() {
                        let x = S::Real::load(from.wrapping_offset(at).wrapping_add(p * step));
                        *sum = S::Real::dot(*sum, x, weight);
                    }
                }
            }
            for (p, &sum) in sums.iter().enumerate() {
                let to = (column + p * g.columns.phases()) * self.channels + channel;
                S::Real::store(self.out.add(to).cast(), sum);
            }
        }
    }
}
