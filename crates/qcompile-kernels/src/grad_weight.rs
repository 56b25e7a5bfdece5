//! Gradient of a convolution by its weights: sums of outer products over pixels.
//!
//! Rows of the tile are pairs of kernel position and input channel, columns are output channels, and K
//! runs over output pixels. Where a word holds two elements, they are pixels at the same place of two
//! parts of the same shape: then one interleaved window serves every stride, dilation and kernel
//! position. Images are cut into chunks by shape; every chunk has its own partial sums, and a last phase
//! adds them in order.

use crate::args::Conv2dGradWeightArgs;
use crate::buffer::{Buffer, Slot};
use crate::depthwise::{self, Reach};
use crate::geometry::{Geometry, Part, Parts};
use crate::lanes::{Element, Lanes, Simd, Task};
use crate::pack::{self, Right, Source};
use crate::tile::{Block, Depth, Panels, ROW_GROUP};
use crate::window::{Ahead, Extent, Window};
use crate::{Primitive, no_parts};

/// Most rows (kernel positions times input channels) of a unit.
const UNIT_ROWS: usize = 10 * ROW_GROUP;
/// Most output channels of a unit.
const UNIT_CHANNELS: usize = 256;
/// Pixels of one strip, about.
const STRIP_PIXELS: usize = 256;
/// Units wanted, for the threads to share.
const WANTED_UNITS: usize = 32;
/// Most words of partial sums.
const MOST_PARTIALS: usize = 8 << 20;
/// Input channels of a unit of the last phase.
const SUM_CHANNELS: usize = 4;

/// How the gradient is cut.
#[derive(Clone, Copy)]
struct Cut {
    g: Geometry,
    panels: Panels,
    /// Words of one output row of partial sums.
    stride: usize,
    /// Rows of a group: kernel positions times input channels.
    rows: usize,
    channels: usize,
    channel_blocks: usize,
    positions: usize,
    position_blocks: usize,
    columns: usize,
    column_blocks: usize,
    chunks: usize,
    depthwise: bool,
}

impl Cut {
    fn of<L: Lanes>(args: &Conv2dGradWeightArgs<L::Element>) -> Cut {
        let g = Geometry::new(&args.shape, false);
        let depthwise = g.is_depthwise();
        let width = Panels::width::<L>();
        let panels = Panels { k: 0, n: if depthwise { g.groups } else { g.target_channels } };
        let stride = panels.count::<L>() * width;
        let (input, kernel) = (g.source_channels, g.kernel);
        let rows = kernel * input;
        // All kernel positions of as many channels as fit; of one channel only some, if there are many.
        let channels = (UNIT_ROWS / kernel).clamp(1, input.max(1));
        let channel_blocks = input.div_ceil(channels);
        let channels = input.div_ceil(channel_blocks.max(1));
        let positions = kernel.min(UNIT_ROWS);
        let position_blocks = kernel.div_ceil(positions);
        let count = panels.count::<L>();
        let columns = count.min(UNIT_CHANNELS / width).max(1);
        let column_blocks = count.div_ceil(columns);
        let groups = if depthwise { 1 } else { g.groups };
        let blocks = (groups * channel_blocks * position_blocks * column_blocks).max(1);
        let size = (groups * rows * stride).max(1);
        let chunks = g.batch.min(WANTED_UNITS.div_ceil(blocks)).min(MOST_PARTIALS / size).max(1);
        let chunks = g.batch.div_ceil(g.batch.div_ceil(chunks).max(1)).max(1);
        Cut {
            g,
            panels,
            stride,
            rows,
            channels,
            channel_blocks,
            positions,
            position_blocks,
            columns,
            column_blocks,
            chunks,
            depthwise,
        }
    }

    fn groups(&self) -> usize {
        if self.depthwise { 1 } else { self.g.groups }
    }

    fn units(&self, phase: usize) -> usize {
        match (phase, self.depthwise) {
            (0, true) => self.chunks,
            (0, false) => {
                let blocks = self.channel_blocks * self.position_blocks * self.column_blocks;
                self.chunks * self.g.groups * blocks
            }
            (_, true) => 1,
            (_, false) => self.g.groups * self.g.source_channels.div_ceil(SUM_CHANNELS),
        }
    }

    /// First word of a row of partial sums.
    fn partial(&self, chunk: usize, group: usize, row: usize) -> usize {
        ((chunk * self.groups() + group) * self.rows + row) * self.stride
    }

    /// The images of a chunk.
    fn images(&self, chunk: usize) -> std::ops::Range<usize> {
        let size = self.g.batch.div_ceil(self.chunks);
        (chunk * size).min(self.g.batch)..((chunk + 1) * size).min(self.g.batch)
    }
}

unsafe extern "C" fn units<L: Lanes>(args: *const u64, phase: usize) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    let cut = Cut::of::<L>(unsafe { &*args.cast() });
    if cut.rows == 0 || cut.panels.n == 0 { 0 } else { cut.units(phase) }
}

unsafe extern "C" fn scratch<L: Lanes>(args: *const u64) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    let cut = Cut::of::<L>(unsafe { &*args.cast() });
    cut.partial(cut.chunks, 0, 0) * 4
}

unsafe extern "C" fn run<L: Lanes>(args: *const u64, phase: usize, begin: usize, end: usize) {
    // SAFETY: the caller passes the argument block of this kernel, on a CPU of the tier.
    unsafe {
        let args = *args.cast::<Conv2dGradWeightArgs<L::Element>>();
        let cut = Cut::of::<L>(&args);
        match (phase, cut.depthwise) {
            (0, false) => L::Tier::enter(Outer::<L> { args, cut, begin, end }),
            (0, true) => L::Tier::enter(Depthwise { args, cut, begin, end }),
            _ => L::Tier::enter(Sum { args, cut, begin, end }),
        }
    }
}

/// The primitive on certain lanes.
pub(crate) const fn primitive<L: Lanes>() -> Primitive {
    Primitive {
        phases: 2,
        units: units::<L>,
        run: run::<L>,
        scratch: scratch::<L>,
        parts: no_parts,
    }
}

/// What is summed up at once: rows of one image, or several whole images.
#[derive(Clone, Copy)]
struct Strip {
    part: Part,
    /// Whose pixels are the second elements of the words; of the same shape.
    second: Option<Part>,
}

impl Strip {
    fn parts(self) -> [Option<Part>; 2] {
        [Some(self.part), self.second]
    }
}

/// The strips of a chunk of images.
fn strips<L: Lanes>(cut: &Cut, images: std::ops::Range<usize>, strips: &mut Vec<Strip>) {
    strips.clear();
    let (height, width) = (cut.g.rows.target, cut.g.columns.target);
    let pixels = (STRIP_PIXELS * L::GROUP).max(L::GROUP * width);
    let parts = Parts::new(images.len(), height, width, pixels, 1);
    for index in 0..parts.count() {
        let mut part = parts.part(index);
        part.image += images.start;
        if L::GROUP == 1 {
            strips.push(Strip { part, second: None });
            continue;
        }
        // Halves of the images, then of the rows of a single one.
        let half = part.images / 2;
        if half > 0 {
            let first = Part { images: half, ..part };
            let second = Part { image: part.image + half, ..first };
            strips.push(Strip { part: first, second: Some(second) });
        }
        if part.images.is_multiple_of(2) {
            continue;
        }
        let single = Part { image: part.image + 2 * half, images: 1, ..part };
        let half = (single.row_end - single.row_begin) / 2;
        let middle = single.row_begin + half;
        if half > 0 {
            let first = Part { row_end: middle, ..single };
            let second = Part { row_begin: middle, row_end: middle + half, ..single };
            strips.push(Strip { part: first, second: Some(second) });
        }
        if middle + half < single.row_end {
            strips.push(Strip { part: Part { row_begin: middle + half, ..single }, second: None });
        }
    }
}

/// Partial sums of outer products.
struct Outer<L: Lanes> {
    args: Conv2dGradWeightArgs<L::Element>,
    cut: Cut,
    begin: usize,
    end: usize,
}

impl<L: Lanes> Task for Outer<L> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let cut = &self.cut;
        let (mut lines, mut strips) = (Vec::new(), Vec::new());
        for unit in self.begin..self.end {
            let (rest, column_block) = (unit / cut.column_blocks, unit % cut.column_blocks);
            let (rest, positions) = (rest / cut.position_blocks, rest % cut.position_blocks);
            let (rest, channels) = (rest / cut.channel_blocks, rest % cut.channel_blocks);
            let (chunk, group) = (rest / cut.g.groups, rest % cut.g.groups);
            // SAFETY: the unit lies in the partial sums.
            unsafe {
                let block = [channels, positions, column_block];
                self.unit(chunk, group, block, &mut strips, &mut lines);
            }
        }
    }
}

impl<L: Lanes> Outer<L> {
    #[inline(always)]
    unsafe fn unit(
        &self,
        chunk: usize,
        group: usize,
        [channel_block, position_block, column_block]: [usize; 3],
        strips: &mut Vec<Strip>,
        lines: &mut Vec<isize>,
    ) {
        let (cut, g, args) = (&self.cut, &self.cut.g, &self.args);
        let width = Panels::width::<L>();
        let first_channel = channel_block * cut.channels;
        let channels = cut.channels.min(g.source_channels - first_channel);
        let first_position = position_block * cut.positions;
        let positions = cut.positions.min(g.kernel - first_position);
        let panel_begin = column_block * cut.columns;
        let panel_end = (panel_begin + cut.columns).min(cut.panels.count::<L>());
        let count = positions * channels;
        let padded = count.next_multiple_of(ROW_GROUP);
        let mut rows = [std::ptr::null(); UNIT_ROWS];
        let mut outs = [std::ptr::null_mut(); UNIT_ROWS];
        let mut sink = Buffer::take(Slot::Staging, cut.stride);
        let images = cut.images(chunk);
        // SAFETY: rows lie in the partial sums; the buffers are sized for each strip.
        unsafe {
            let partial: *mut u32 = args.scratch.cast();
            for (i, out) in outs.iter_mut().enumerate().take(padded) {
                let (position, channel) = (i / channels, i % channels);
                let row = (first_position + position) * g.source_channels + first_channel + channel;
                *out = if i < count {
                    partial.add(cut.partial(chunk, group, row) + panel_begin * width)
                } else {
                    sink.words()
                };
            }
            self::strips::<L>(cut, images, strips);
            if strips.is_empty() {
                for out in &outs[..count] {
                    out.write_bytes(0, (panel_end - panel_begin) * width);
                }
            }
            for (index, strip) in strips.iter().enumerate() {
                let part = strip.part;
                let (input, output) = (g.groups * g.source_channels, g.groups * g.target_channels);
                let first = group * g.source_channels + first_channel;
                let range = first..first + channels;
                let words = if L::GROUP == 1 {
                    Window::words::<L>(g, &part, input, &range)
                } else {
                    Window::zipped_words(g, &part, channels)
                };
                let mut left = Buffer::take(Slot::Left, words);
                let window = if L::GROUP == 1 {
                    Window::open::<L>(g, &part, args.x, input, range, &mut left)
                } else {
                    Window::zipped::<L>(g, strip.parts(), args.x, input, range, &mut left)
                };
                lines.clear();
                for image in 0..part.images {
                    for row in part.row_begin..part.row_end {
                        let to = window.pixel(image, (row * g.rows.step()) as isize, 0);
                        let origin = window.pixel(0, 0, 0);
                        lines.push((to as isize).wrapping_sub(origin as isize) / 4);
                    }
                }
                for (i, pointer) in rows.iter_mut().enumerate().take(padded) {
                    let i = i.min(count - 1);
                    let (position, channel) = (first_position + i / channels, i % channels);
                    let down = g.rows.taps(0).nth(position / g.kernel_width);
                    let across = g.columns.taps(0).nth(position % g.kernel_width);
                    let shift = |tap: Option<crate::geometry::Tap>| tap.map_or(0, |tap| tap.shift);
                    *pointer = window.pixel(0, shift(down), shift(across)).wrapping_add(channel);
                }
                let pixels = lines.len() * g.columns.target;
                let panels = Panels { k: pixels, n: cut.panels.n };
                let (first_pixel, _) = self.pixel(&part);
                let column = panel_begin * width;
                let first = args.dy.add(first_pixel * output + group * g.target_channels + column);
                // A single panel that fills its vectors is packed already.
                let packed = L::PLAIN
                    && L::GROUP == 1
                    && cut.panels.n == output
                    && panels.stored::<L>(0) == output;
                let size = if packed { 0 } else { panels.words::<L>() };
                let mut right = Buffer::take(Slot::Right, size);
                let second = strip.second.map(|part| (self.pixel(&part).0 - first_pixel) * output);
                for panel in if packed { 0..0 } else { panel_begin..panel_end } {
                    let first = first.add((panel - panel_begin) * width);
                    let to = right.words().add(panels.offset::<L>(panel));
                    let stored = panels.stored::<L>(panel);
                    let valid = panels.valid::<L>(panel);
                    if L::GROUP == 1 {
                        let from = Source { first, k_stride: output, column_stride: 1 };
                        pack::interleave::<L, Right>(from, pixels, valid, to, stored);
                        continue;
                    }
                    // Without gaps, all pixels are one.
                    let (pixels, valid, stored) = if valid == output && stored == output {
                        (1, pixels * output, pixels * output)
                    } else {
                        (pixels, valid, stored)
                    };
                    for pixel in 0..pixels {
                        let first = first.add(pixel * output);
                        let second = second.map(|second| first.add(second));
                        let to = to.add(pixel * stored);
                        pack::zip::<L>([Some(first), second], valid, to);
                        to.add(valid).write_bytes(0, stored - valid);
                    }
                }
                let block = Block {
                    rows: &rows[..padded],
                    outs: &outs[..padded],
                    count,
                    packed: if packed { first.cast() } else { right.words() },
                    panels,
                    panel_begin,
                    panel_end,
                    exact: false,
                    scales: None,
                };
                // What the next strip reads.
                let mut ahead = [Ahead::NONE; 4];
                let next = strips.get(index + 1).map_or([None; 2], |strip| strip.parts());
                for (ahead, part) in ahead.chunks_mut(2).zip(next) {
                    let Some(part) = part else { continue };
                    let (pixel, count) = self.pixel(&part);
                    let x = Ahead::source(g, &part, args.x, input);
                    let dy = Ahead::of(args.dy.wrapping_add(pixel * output), count * output);
                    ahead.copy_from_slice(&[x, dy].map(|a| a.steps(padded / ROW_GROUP)));
                }
                let depth = Depth {
                    segments: lines,
                    length: g.columns.target,
                    step: (g.columns.step() * window.pixel_pitch) as isize,
                    begin: 0,
                    resume: index > 0,
                    last: true,
                };
                for first in (0..count).step_by(ROW_GROUP) {
                    for ahead in &mut ahead {
                        ahead.step::<L::Tier>();
                    }
                    block.sweep::<L>(first, &depth);
                }
            }
        }
    }

    /// First pixel of a part in the output, and the number of its pixels.
    fn pixel(&self, part: &Part) -> (usize, usize) {
        let (height, width) = (self.cut.g.rows.target, self.cut.g.columns.target);
        (
            (part.image * height + part.row_begin) * width,
            part.images * (part.row_end - part.row_begin) * width,
        )
    }
}

/// Most taps whose sums one sweep over a row keeps in registers: those of a 3 x 3 kernel.
const MOST_TAPS: usize = 9;

/// Partial sums of a depthwise convolution: rows are kernel positions, columns are channels.
struct Depthwise<E> {
    args: Conv2dGradWeightArgs<E>,
    cut: Cut,
    begin: usize,
    end: usize,
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
                        );
                        depthwise::widen(dy, size, to_dy);
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
}

impl Line {
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
                    *sum = S::Real::load(out(tap).cast());
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
                    S::Real::store(out(tap).cast(), sum);
                }
                channel += lanes;
            }
            for channel in channel..self.channels {
                for tap in taps {
                    let out = self.sums.add(tap.position * self.stride + channel);
                    let x = self.x.wrapping_offset(tap.offset).wrapping_add(channel);
                    for column in tap.columns.0..tap.columns.1 {
                        let a = *x.wrapping_add(column * self.step);
                        *out += a * *self.dy.add(column * self.channels + channel);
                    }
                }
            }
        }
    }
}

/// Adds the partial sums of all chunks in order and writes them as OIHW.
struct Sum<E> {
    args: Conv2dGradWeightArgs<E>,
    cut: Cut,
    begin: usize,
    end: usize,
}

impl<E> Task for Sum<E> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (cut, g) = (&self.cut, &self.cut.g);
        let columns = cut.panels.n;
        let blocks = g.source_channels.div_ceil(SUM_CHANNELS);
        let mut total = Buffer::take(Slot::Result, cut.stride);
        for unit in self.begin..self.end {
            let (group, block) = (unit / blocks, unit % blocks);
            let begin = block * SUM_CHANNELS;
            let end = (begin + SUM_CHANNELS).min(g.source_channels);
            for channel in begin..end {
                for position in 0..g.kernel {
                    let row = position * g.source_channels + channel;
                    // SAFETY: inside the partial sums and the gradient.
                    unsafe {
                        let partial = self.args.scratch.cast::<f32>();
                        let total = total.words().cast::<f32>();
                        let first = partial.add(cut.partial(0, group, row));
                        std::ptr::copy_nonoverlapping(first, total, columns);
                        for chunk in 1..cut.chunks {
                            let next = partial.add(cut.partial(chunk, group, row));
                            for c in 0..columns {
                                *total.add(c) += *next.add(c);
                            }
                        }
                        for c in 0..columns {
                            let outer = group * g.target_channels + c;
                            let to = (outer * g.source_channels + channel) * g.kernel + position;
                            *self.args.dw.add(to) = *total.add(c);
                        }
                    }
                }
            }
        }
    }
}
