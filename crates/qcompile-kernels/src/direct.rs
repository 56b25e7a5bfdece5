//! The arithmetic of a direct convolution: units of the target, in batches of pixels.

use crate::buffer::{Buffer, Slot};
use crate::conv::{Convolution, Cut, Phase, phases};
use crate::geometry::{Geometry, Part};
use crate::lanes::{Lanes, Simd, Task};
use crate::tile::{self, Block, Depth, EVERY_GROUP, Finish, Panels};
use crate::window::{Ahead, Window};

/// Pixels whose pointers are set up at once.
const BATCH_PIXELS: usize = 3 * EVERY_GROUP;
/// Words of K handled at once, about.
const PART_WORDS: usize = 320;
/// Rows of narrow results that are finished at once, at most this many columns: so few values that a call for each row
/// group would cost much of what it does.
const NARROW_ROWS: usize = EVERY_GROUP;
const NARROW_COLUMNS: usize = 64;
/// Most segments handled at once.
const MOST_SEGMENTS: usize = 64;

/// Rows of results with this many columns that are finished at once.
pub(crate) fn finished_rows<L: Lanes>(columns: usize) -> usize {
    if columns <= NARROW_COLUMNS { NARROW_ROWS } else { L::ROW_GROUP }
}

/// Where a unit's tiles are stored.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    /// Straight in the result.
    Result,
    /// In a buffer of one row group (of several, if the result is narrow), finished at once.
    Group,
    /// In a buffer of one batch of pixels, since sums come in several parts.
    Batch,
    /// In a buffer of the whole unit, since its rows come out of order.
    Unit,
}

/// Computes units of the target.
pub(crate) struct Compute<L: Lanes> {
    pub(crate) convolution: Convolution<L::Element>,
    pub(crate) begin: usize,
    pub(crate) end: usize,
}

/// What the batches of one unit share.
struct Unit<'a> {
    /// Scale of the unit's first image, and from one image's scale to the next.
    source_scales: Option<(*const f32, usize)>,
    column_scales: *const f32,
    finish: Finish,
    target: Target,
    /// Rows that are finished at once, where they are held in a buffer of groups or of a batch.
    finished: usize,
    result: *mut u32,
    stride: usize,
    sink: *mut u32,
    packed: *const u32,
    panel_begin: usize,
    panel_end: usize,
    cut: &'a Cut,
}

impl<L: Lanes> Task for Compute<L> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let c = &self.convolution;
        let g = &c.geometry;
        let cut = Cut::of::<L>(g);
        let (phases, _) = phases::<L>(g);
        // Sums that take more than one pass have to be held for all pixels of a batch.
        let several = cut.chunk < cut.words
            || phases
                .iter()
                .any(|phase| phase.panels.k > PART_WORDS || phase.taps.len() > MOST_SEGMENTS);
        let target = if c.epilogue.is_none() {
            Target::Result
        } else if phases.len() > 1 {
            Target::Unit
        } else if several {
            Target::Batch
        } else {
            Target::Group
        };
        let mut segments = Vec::new();
        for unit_index in self.begin..self.end {
            let part_index = unit_index % cut.parts.count();
            let part = cut.parts.part(part_index);
            let block = unit_index / cut.parts.count();
            let (group, column_block) = (block / cut.column_blocks, block % cut.column_blocks);
            let panel_begin = column_block * cut.panels;
            let panel_end = (panel_begin + cut.panels).min(cut.panels_per_group);
            let column = panel_begin * Panels::width::<L>();
            let stride = (panel_end - panel_begin) * Panels::width::<L>();
            let columns = stride.min(g.target_channels - column);
            let first_column = group * g.target_channels + column;
            let pixels = part.images * (part.row_end - part.row_begin) * g.columns.target;
            let finished = finished_rows::<L>(stride);
            let held = match target {
                Target::Result => 0,
                Target::Group => finished,
                Target::Batch => BATCH_PIXELS,
                Target::Unit => pixels,
            };
            let mut result = Buffer::take(Slot::Result, (held + 1) * stride);
            let channels = group * g.source_channels..(group + 1) * g.source_channels;
            let words = Window::words::<L>(g, &part, c.codes, c.source_total(), &channels);
            let mut left = Buffer::take(Slot::Left, words);
            // SAFETY: the part lies in source and target; the buffers were sized for it above.
            unsafe {
                let source = (c.source, c.codes);
                let window =
                    Window::open::<L>(g, &part, source, c.source_total(), channels, &mut left);
                let finish = c.finish(&part, part_index, first_column..first_column + columns);
                // Scales of the columns, filled up to whole vectors.
                let mut scale_buffer = Buffer::take(Slot::Scales, stride);
                let column_scales = scale_buffer.words().cast::<f32>();
                if let Some(scales) = c.scales {
                    for c in 0..stride {
                        let from = (first_column + c.min(columns - 1)) * scales.weight_stride;
                        *column_scales.add(c) = *scales.weight.add(from);
                    }
                }
                let mut unit = Unit {
                    source_scales: c.scales.map(|scales| {
                        (scales.source.add(part.image * scales.source_stride), scales.source_stride)
                    }),
                    column_scales,
                    finish,
                    target,
                    finished,
                    result: result.words(),
                    stride,
                    sink: result.words().add(held * stride),
                    packed: c.scratch,
                    panel_begin,
                    panel_end,
                    cut: &cut,
                };
                // The next unit reads other pixels, unless it begins another block of channels.
                let mut ahead = Ahead::NONE;
                if unit_index + 1 < self.end && (unit_index + 1) % cut.parts.count() != 0 {
                    let next = cut.parts.part((unit_index + 1) % cut.parts.count());
                    let panels = Panels { k: 0, n: g.target_channels };
                    let tiles = panels.tiles::<L>(panel_begin..panel_end, pixels);
                    ahead = Ahead::source(g, &next, c.source, c.source_total()).steps(tiles);
                }
                for phase in &phases {
                    let skip = phase.packed + group * phase.panels.words::<L>();
                    unit.packed = c.scratch.add(skip);
                    unit.phase::<L>(g, &part, phase, &window, &mut segments, &mut ahead);
                }
                if target == Target::Unit {
                    for first in (0..pixels).step_by(L::ROW_GROUP) {
                        let rows = L::ROW_GROUP.min(pixels - first);
                        finish.rows(unit.result.add(first * stride), stride, first, rows);
                    }
                }
            }
        }
    }
}

/// Pointers of a batch of pixels.
struct Batch {
    rows: [*const u32; BATCH_PIXELS],
    outs: [*mut u32; BATCH_PIXELS],
    /// Scales of the pixels' images, for int8.
    scales: [f32; BATCH_PIXELS],
    count: usize,
    /// First pixel in the unit.
    first: usize,
}

impl Unit<'_> {
    /// Computes the target pixels of one phase.
    #[inline(always)]
    unsafe fn phase<L: Lanes>(
        &self,
        g: &Geometry,
        part: &Part,
        phase: &Phase,
        window: &Window,
        segments: &mut Vec<isize>,
        ahead: &mut Ahead,
    ) {
        // Taps that read adjacent pixels make one long segment, if all their words are adjacent.
        let words = self.cut.words;
        let run = phase.run.filter(|&run| {
            self.cut.chunk == words && window.pixel_pitch == words && run * words <= PART_WORDS
        });
        segments.clear();
        for &(down, across) in phase.taps.iter().step_by(run.unwrap_or(1)) {
            segments.push(window.offset(down.shift, across.shift));
        }
        let mut batch = Batch {
            rows: [std::ptr::null(); BATCH_PIXELS],
            outs: [std::ptr::null_mut(); BATCH_PIXELS],
            scales: [0.0; BATCH_PIXELS],
            count: 0,
            first: 0,
        };
        let (height, width) = (part.row_end - part.row_begin, g.columns.target);
        let (down, across) =
            (g.rows.number(phase.row, part.row_begin), g.rows.number(phase.row, part.row_end));
        let (columns, apart) = (g.columns.number(phase.column, width), g.columns.phases());
        let step = g.columns.step() * window.pixel_pitch;
        // From one pixel's place to the next one's.
        let (out, out_step) = match self.target {
            Target::Result => (self.finish.result.cast(), self.finish.result_stride),
            Target::Group | Target::Batch | Target::Unit => (self.result, self.stride),
        };
        // SAFETY: granted by the caller.
        unsafe {
            if matches!(self.target, Target::Group | Target::Batch) {
                // As many pixels as are held at once, again and again.
                let held = if self.target == Target::Group { self.finished } else { BATCH_PIXELS };
                for outs in batch.outs.chunks_mut(held) {
                    for (i, to) in outs.iter_mut().enumerate() {
                        *to = out.add(i * out_step);
                    }
                }
            }
            for image in 0..part.images {
                let scale = self.source_scales.map(|(first, stride)| *first.add(image * stride));
                for j in down..across {
                    let row = phase.row + j * g.rows.phases() - part.row_begin;
                    let line = (image * height + row) * width + phase.column;
                    let source = window.pixel(image, (j * g.rows.step()) as isize, 0);
                    let mut done = 0;
                    while done < columns {
                        let some = (columns - done).min(BATCH_PIXELS - batch.count);
                        let pixel = line + done * apart;
                        if batch.count == 0 {
                            batch.first = pixel;
                        }
                        let range = batch.count..batch.count + some;
                        for (i, to) in batch.rows[range.clone()].iter_mut().enumerate() {
                            *to = source.wrapping_add((done + i) * step);
                        }
                        if matches!(self.target, Target::Result | Target::Unit) {
                            let first = out.add(pixel * out_step);
                            for (i, to) in batch.outs[range.clone()].iter_mut().enumerate() {
                                *to = first.wrapping_add(i * apart * out_step);
                            }
                        }
                        if let Some(scale) = scale {
                            batch.scales[range].fill(scale);
                        }
                        done += some;
                        batch.count += some;
                        if batch.count == BATCH_PIXELS {
                            self.flush::<L>(phase, run, segments, &mut batch, ahead);
                        }
                    }
                }
            }
            self.flush::<L>(phase, run, segments, &mut batch, ahead);
        }
    }

    /// Computes a batch of pixels and empties it.
    #[inline(always)]
    unsafe fn flush<L: Lanes>(
        &self,
        phase: &Phase,
        run: Option<usize>,
        segments: &[isize],
        batch: &mut Batch,
        ahead: &mut Ahead,
    ) {
        let count = batch.count;
        if count == 0 {
            return;
        }
        for i in count..count.next_multiple_of(L::ROW_GROUP) {
            batch.rows[i] = batch.rows[count - 1];
            if matches!(self.target, Target::Result | Target::Unit) {
                batch.outs[i] = self.sink;
            }
        }
        let padded = count.next_multiple_of(L::ROW_GROUP);
        let block = Block {
            rows: &batch.rows[..padded],
            outs: &batch.outs[..padded],
            count,
            packed: self.packed,
            panels: phase.panels,
            panel_begin: self.panel_begin,
            panel_end: self.panel_end,
            exact: self.target == Target::Result,
            scales: self
                .source_scales
                .map(|_| tile::Scales { left: batch.scales.as_ptr(), right: self.column_scales }),
            finish: matches!(self.target, Target::Group | Target::Batch)
                .then_some((&self.finish, batch.first)),
        };
        let (words, chunk) = (self.cut.words, self.cut.chunk);
        let mut shifted = [0_isize; MOST_SEGMENTS];
        let mut resume = false;
        let mut begin = 0;
        // SAFETY: granted by the caller.
        unsafe {
            for first_word in (0..words).step_by(chunk) {
                let length = run.unwrap_or(1) * chunk.min(words - first_word);
                let most = (PART_WORDS / length).clamp(1, shifted.len());
                let parts = segments.len().div_ceil(most).max(1);
                for part in segments.chunks(segments.len().div_ceil(parts).max(1)) {
                    for (to, from) in shifted.iter_mut().zip(part) {
                        *to = from + first_word as isize;
                    }
                    let segments = &shifted[..part.len()];
                    let last = begin + part.len() * length == phase.panels.k;
                    let depth = Depth { segments, length, step: 1, begin, resume, last };
                    begin += part.len() * length;
                    for first in (0..count).step_by(L::ROW_GROUP) {
                        let ahead = if last { std::slice::from_mut(ahead) } else { &mut [] };
                        block.sweep::<L>(first, &depth, ahead);
                        let end = (first + L::ROW_GROUP).min(count);
                        if last && (end == count || end.is_multiple_of(self.finished)) {
                            self.finish_until(batch, end);
                        }
                    }
                    resume = true;
                }
            }
            if !resume {
                // No tap reaches this phase: its pixels are zeros.
                for &out in &batch.outs[..count] {
                    std::slice::from_raw_parts_mut(out, self.finish.columns).fill(0);
                }
                for end in (self.finished..count).step_by(self.finished).chain([count]) {
                    self.finish_until(batch, end);
                }
            }
        }
        batch.count = 0;
    }

    /// Finishes the last rows of a batch before row `end`, if they are held for it.
    #[inline(always)]
    unsafe fn finish_until(&self, batch: &Batch, end: usize) {
        if matches!(self.target, Target::Group | Target::Batch) {
            let first = (end - 1) / self.finished * self.finished;
            // SAFETY: granted by the caller: the rows are in the buffer, one after another.
            unsafe {
                self.finish.rows(batch.outs[first], self.stride, batch.first + first, end - first);
            }
        }
    }
}
