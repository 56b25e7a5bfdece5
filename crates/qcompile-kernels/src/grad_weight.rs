//! Gradient of a convolution by its weights: sums of outer products over pixels.
//!
//! Rows of the tile are pairs of kernel position and input channel, columns are output channels, and K
//! runs over output pixels. Where a word holds several elements, they are pixels at the same place of as
//! many parts of the same shape: then one interleaved window serves every stride, dilation and kernel
//! position. Images are cut into chunks by shape; every chunk has its own partial sums, and a last phase
//! adds them in order. Those of int8 are i32, of so few pixels that none can overflow.

use crate::args::{Conv2dGradWeightArgs, Conv2dGradWeightI8Args};
use crate::buffer::{Buffer, Slot};
use crate::depthwise_grad::{Depthwise, MOST_EXACT_COLUMNS};
use crate::geometry::{Geometry, Part, Parts};
use crate::lanes::{Codes, Lanes, Simd, Task};
use crate::pack::{self, Right, Source};
use crate::tile::{Block, Depth, EVERY_GROUP, Panels};
use crate::window::{Ahead, Window};
use crate::winograd;
use crate::{Primitive, no_parts};

/// Most rows (kernel positions times input channels) of a unit.
const UNIT_ROWS: usize = 3 * EVERY_GROUP;
/// Most output channels of a unit.
const UNIT_CHANNELS: usize = 256;
/// Pixels of one strip, about.
const STRIP_PIXELS: usize = 256;
/// Units wanted, for the threads to share.
const WANTED_UNITS: usize = 32;
/// Most words of partial sums.
const MOST_PARTIALS: usize = 8 << 20;
/// Most pixels whose products of i8 an i32 holds, whatever they are.
pub const MOST_I8_PIXELS: usize = i32::MAX as usize >> 14;
/// Input channels of a unit of the last phase.
const SUM_CHANNELS: usize = 4;

/// How the gradient is cut.
#[derive(Clone, Copy)]
pub(crate) struct Cut {
    pub(crate) g: Geometry,
    panels: Panels,
    /// Words of one output row of partial sums.
    pub(crate) stride: usize,
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
    winograd: bool,
}

impl Cut {
    fn of<L: Lanes>(args: &Conv2dGradWeightArgs<L::Element>) -> Cut {
        let g = Geometry::new(&args.shape, false);
        // Sums of int8 that f32 rounds would depend on their order, and so on the tier.
        let exact = !L::INTEGER || g.columns.target <= MOST_EXACT_COLUMNS;
        let depthwise = g.is_depthwise() && exact;
        let winograd = winograd::suits::<L>(&g, winograd::FEWEST_GRADIENT_CHANNELS);
        let width = Panels::width::<L>();
        let panels = Panels { k: 0, n: if depthwise { g.groups } else { g.target_channels } };
        let stride = panels.count::<L>() * width;
        let (input, kernel) = (g.source_channels, g.kernel);
        let rows = kernel * input;
        // All kernel positions of as many channels as fit; of one channel only some, if there are many.
        let most = if winograd { winograd::GRADIENT_CHANNELS } else { UNIT_ROWS / kernel };
        let channels = most.clamp(1, input.max(1));
        let channel_blocks = input.div_ceil(channels);
        let channels = input.div_ceil(channel_blocks.max(1));
        let positions = kernel.min(UNIT_ROWS);
        let position_blocks = kernel.div_ceil(positions);
        let count = panels.count::<L>();
        let most = if winograd { winograd::GRADIENT_CHANNELS } else { UNIT_CHANNELS };
        let columns = count.min(most / width).max(1);
        let column_blocks = count.div_ceil(columns);
        let groups = if depthwise { 1 } else { g.groups };
        let blocks = (groups * channel_blocks * position_blocks * column_blocks).max(1);
        let size = (groups * rows * stride).max(1);
        let mut most = g.batch;
        if winograd {
            most = most.min(winograd::most_chunks::<L>(&g));
        }
        let chunks = most.min(WANTED_UNITS.div_ceil(blocks)).min(MOST_PARTIALS / size).max(1);
        let mut images = g.batch.div_ceil(chunks);
        if L::INTEGER {
            images = images.min(MOST_I8_PIXELS / (g.rows.target * g.columns.target).max(1));
        }
        let chunks = g.batch.div_ceil(images.max(1)).max(1);
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
            winograd,
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
    pub(crate) fn partial(&self, chunk: usize, group: usize, row: usize) -> usize {
        ((chunk * self.groups() + group) * self.rows + row) * self.stride
    }

    /// The images of a chunk.
    pub(crate) fn images(&self, chunk: usize) -> std::ops::Range<usize> {
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

unsafe extern "C" fn run<L: Lanes>(args_of: *const u64, phase: usize, begin: usize, end: usize) {
    // SAFETY: the caller passes the argument block of this kernel, on a CPU of the tier.
    unsafe {
        let args = *args_of.cast::<Conv2dGradWeightArgs<L::Element>>();
        let cut = Cut::of::<L>(&args);
        match (phase, cut.depthwise) {
            (0, false) => L::Tier::enter(Outer::<L> { args, cut, begin, end }),
            (0, true) => L::Tier::enter(Depthwise { args, cut, begin, end }),
            _ => {
                // The block of int8 goes on with scales.
                let scales = L::INTEGER.then(|| Scales::of(&*args_of.cast()));
                L::Tier::enter(Sum { args, cut, scales, begin, end });
            }
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

/// What is summed up at once: rows of one image, or several whole images; for each element of a word, all of the same
/// shape. The first is there.
type Strip = [Option<Part>; 4];

/// The strips of a chunk of images.
fn strips<L: Lanes>(cut: &Cut, images: std::ops::Range<usize>, strips: &mut Vec<Strip>) {
    strips.clear();
    let (height, width) = (cut.g.rows.target, cut.g.columns.target);
    let pixels = (STRIP_PIXELS * L::GROUP).max(L::GROUP * width);
    let parts = Parts::new(images.len(), height, width, pixels, 1);
    // Equal parts, each `step` images and rows behind the one before.
    let equal = |part: Part, images: usize, rows: usize| {
        let at = |index: usize| Part {
            image: part.image + index * images,
            row_begin: part.row_begin + index * rows,
            row_end: part.row_end + index * rows,
            ..part
        };
        std::array::from_fn(|index| (index < L::GROUP).then(|| at(index)))
    };
    for index in 0..parts.count() {
        let mut part = parts.part(index);
        part.image += images.start;
        // Equal numbers of the images, then of the rows of each that is left.
        let each = part.images / L::GROUP;
        if each > 0 {
            strips.push(equal(Part { images: each, ..part }, each, 0));
        }
        for image in part.image + each * L::GROUP..part.image + part.images {
            let single = Part { image, images: 1, ..part };
            let rows = (single.row_end - single.row_begin) / L::GROUP;
            let left = single.row_begin + rows * L::GROUP;
            if rows > 0 {
                let first = Part { row_end: single.row_begin + rows, ..single };
                strips.push(equal(first, 0, rows));
            }
            if left < single.row_end {
                strips.push([Some(Part { row_begin: left, ..single }), None, None, None]);
            }
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
                if cut.winograd {
                    self.transformed(chunk, channels, column_block);
                    continue;
                }
                let block = [channels, positions, column_block];
                self.unit(chunk, group, block, &mut strips, &mut lines);
            }
        }
    }
}

impl<L: Lanes> Outer<L> {
    /// A unit by products of transforms.
    #[inline(always)]
    unsafe fn transformed(&self, chunk: usize, channel_block: usize, column_block: usize) {
        let (cut, args) = (&self.cut, &self.args);
        let block =
            |block: usize, size: usize, total: usize| block * size..((block + 1) * size).min(total);
        let channels = block(channel_block, cut.channels, cut.g.source_channels);
        let panels = block(column_block, cut.columns, cut.panels.count::<L>());
        // SAFETY: granted by the caller.
        unsafe { winograd::Gradient::<L> { args, cut, channels, panels }.compute(chunk) };
    }

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
        let padded = count.next_multiple_of(L::ROW_GROUP);
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
                let Some(part) = strip[0] else { continue };
                let (input, output) = (g.groups * g.source_channels, g.groups * g.target_channels);
                let first = group * g.source_channels + first_channel;
                let range = first..first + channels;
                let words = if L::GROUP == 1 {
                    Window::words::<L>(g, &part, Codes::default(), input, &range)
                } else {
                    Window::zipped_words(g, &part, channels)
                };
                let mut left = Buffer::take(Slot::Left, words);
                let window = if L::GROUP == 1 {
                    Window::open::<L>(g, &part, (args.x, Codes::default()), input, range, &mut left)
                } else {
                    Window::zipped::<L>(g, *strip, args.x, input, range, &mut left)
                };
                // Where K runs along pixels one by one, those of each channel side by side, for all kernel positions.
                let turns = L::ALONG_K && L::GROUP > 1 && g.columns.step() == 1;
                let (pitch, mut turned) = match turns {
                    true => {
                        let pitch = pack::row_pitch(words / channels);
                        (pitch, Buffer::take(Slot::Turned, channels * pitch))
                    }
                    false => (1, Buffer::take(Slot::Turned, 0)),
                };
                let window = match turns {
                    true => window.turned::<L::Tier>(words / channels, pitch, turned.words()),
                    false => window,
                };
                lines.clear();
                for image in 0..part.images {
                    for row in part.row_begin..part.row_end {
                        let to = window.pixel(image, (row * g.rows.step()) as isize, 0);
                        let origin = window.pixel(0, 0, 0);
                        lines.push((to as isize).wrapping_sub(origin as isize) / 4);
                    }
                }
                let mut pointers = rows.chunks_mut(channels);
                for position in first_position..first_position + positions {
                    let Some(pointers) = pointers.next() else { continue };
                    let down = g.rows.taps(0).nth(position / g.kernel_width);
                    let across = g.columns.taps(0).nth(position % g.kernel_width);
                    let shift = |tap: Option<crate::geometry::Tap>| tap.map_or(0, |tap| tap.shift);
                    let from = window.pixel(0, shift(down), shift(across));
                    for (channel, pointer) in pointers.iter_mut().enumerate() {
                        *pointer = from.wrapping_add(channel * pitch);
                    }
                }
                let last = rows[count - 1];
                rows[count..padded].fill(last);
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
                // From the first part's first element to that of each.
                let apart =
                    strip.map(|part| part.map(|part| (self.pixel(&part).0 - first_pixel) * output));
                for panel in if packed { 0..0 } else { panel_begin..panel_end } {
                    let first = first.add((panel - panel_begin) * width);
                    let head = right.words().add(panels.offset::<L>(panel));
                    let stored = panels.stored::<L>(panel);
                    let valid = panels.valid::<L>(panel);
                    let to = head.add(if L::HEADER { stored } else { 0 });
                    if L::GROUP == 1 {
                        let from = Source { first, k_stride: output, column_stride: 1, flip: 0 };
                        pack::interleave::<L, Right>(from, pixels, valid, to, stored);
                        continue;
                    }
                    // Without gaps, all pixels are one.
                    let (lines, line, pitch) = if valid == output && stored == output {
                        (1, pixels * output, pixels * output)
                    } else {
                        (pixels, valid, stored)
                    };
                    for pixel in 0..lines {
                        let first = first.add(pixel * output);
                        let to = to.add(pixel * pitch);
                        let rows = apart.map(|apart| apart.map(|apart| first.add(apart)));
                        pack::zip::<L, Right>(rows, line, to);
                        to.add(line).write_bytes(0, pitch - line);
                    }
                    if L::HEADER {
                        pack::header::<L>(to, pixels, stored, head, Codes::default());
                    }
                    if L::HEADER && index > 0 {
                        // The sums go on from what they are, so the header joins them here.
                        let skip = (panel - panel_begin) * width;
                        for out in &outs[..count] {
                            for column in 0..stored {
                                let sum = out.add(skip + column);
                                *sum = (*sum).wrapping_add(*head.add(column));
                            }
                        }
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
                    finish: None,
                };
                // What the next strip reads.
                let mut ahead = [Ahead::NONE; 8];
                let next = strips.get(index + 1).copied().unwrap_or_default();
                for (ahead, part) in ahead.chunks_mut(2).zip(next) {
                    let Some(part) = part else { continue };
                    let (pixel, count) = self.pixel(&part);
                    let x = Ahead::source(g, &part, args.x, input);
                    let dy = Ahead::of(args.dy.wrapping_add(pixel * output), count * output);
                    ahead.copy_from_slice(&[x, dy]);
                }
                Ahead::spread(&mut ahead, panels.tiles::<L>(panel_begin..panel_end, count));
                let depth = Depth {
                    segments: lines,
                    length: g.columns.target,
                    step: (g.columns.step() * window.pixel_pitch) as isize,
                    begin: 0,
                    resume: index > 0,
                    last: true,
                };
                for first in (0..count).step_by(L::ROW_GROUP) {
                    block.sweep::<L>(first, &depth, &mut ahead);
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

/// Scales of an int8 gradient.
#[derive(Clone, Copy)]
struct Scales {
    x: *const f32,
    x_stride: usize,
    dy: *const f32,
    dy_stride: usize,
}

impl Scales {
    fn of(args: &Conv2dGradWeightI8Args) -> Scales {
        Scales {
            x: args.x_scale,
            x_stride: args.x_scale_stride,
            dy: args.dy_scale,
            dy_stride: args.dy_scale_stride,
        }
    }
}

/// Adds the partial sums of all chunks in order and writes them as OIHW.
struct Sum<E> {
    args: Conv2dGradWeightArgs<E>,
    cut: Cut,
    /// Where the sums are i32.
    scales: Option<Scales>,
    begin: usize,
    end: usize,
}

impl<E> Task for Sum<E> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (cut, g) = (&self.cut, &self.cut.g);
        let columns = cut.panels.n;
        let blocks = g.source_channels.div_ceil(SUM_CHANNELS);
        let rows = SUM_CHANNELS.min(g.source_channels) * g.kernel;
        let mut total = Buffer::take(Slot::Result, rows * cut.stride);
        let mut exact = Buffer::take(Slot::Staging, 2 * columns);
        for unit in self.begin..self.end {
            let (group, block) = (unit / blocks, unit % blocks);
            let begin = block * SUM_CHANNELS;
            let end = (begin + SUM_CHANNELS).min(g.source_channels);
            let rows = (end - begin) * g.kernel;
            // SAFETY: inside the partial sums, the buffers and the gradient.
            unsafe {
                // In the order of the gradient: all positions of a channel, then the next channel.
                for row in 0..rows {
                    let (channel, position) = (begin + row / g.kernel, row % g.kernel);
                    let from = position * g.source_channels + channel;
                    let partial =
                        |chunk: usize| self.args.scratch.add(4 * cut.partial(chunk, group, from));
                    let total = total.words().cast::<f32>().add(row * cut.stride);
                    if let Some(scales) = self.scales {
                        let channel = group * g.source_channels + channel;
                        // Columns of a depthwise convolution are channels of the data, too.
                        let along = if cut.depthwise { scales.x_stride } else { 0 };
                        let left = (scales.x.add(channel * scales.x_stride), along);
                        let right = scales.dy.add(group * g.target_channels * scales.dy_stride);
                        let exact = std::slice::from_raw_parts_mut(exact.words().cast(), columns);
                        self.dequantized(&partial, exact, left, (right, scales.dy_stride), total);
                        continue;
                    }
                    std::ptr::copy_nonoverlapping(partial(0).cast(), total, columns);
                    for chunk in 1..cut.chunks {
                        let next = partial(chunk).cast::<f32>();
                        for c in 0..columns {
                            *total.add(c) += *next.add(c);
                        }
                    }
                }
                let first = (group * g.target_channels * g.source_channels + begin) * g.kernel;
                let to = self.args.dw.add(first);
                pack::transpose::<S>(
                    total.words(),
                    [rows, columns],
                    cut.stride,
                    to.cast(),
                    g.source_channels * g.kernel,
                );
            }
        }
    }
}

impl<E> Sum<E> {
    /// Adds a row of i32 sums, exactly, and scales it.
    ///
    /// # Safety
    /// `exact` and `total` hold the columns, and the scales have their strides for each.
    #[inline(always)]
    unsafe fn dequantized(
        &self,
        partial: &impl Fn(usize) -> *mut u8,
        exact: &mut [f64],
        (left, left_stride): (*const f32, usize),
        (right, right_stride): (*const f32, usize),
        total: *mut f32,
    ) {
        exact.fill(0.0);
        for chunk in 0..self.cut.chunks {
            // SAFETY: granted by the caller.
            let next =
                unsafe { std::slice::from_raw_parts(partial(chunk).cast::<i32>(), exact.len()) };
            for (sum, next) in exact.iter_mut().zip(next) {
                *sum += f64::from(*next);
            }
        }
        for (column, sum) in exact.iter().enumerate() {
            // SAFETY: granted by the caller.
            unsafe {
                let scale = *left.add(column * left_stride) * *right.add(column * right_stride);
                *total.add(column) = *sum as f32 * scale;
            }
        }
    }
}
