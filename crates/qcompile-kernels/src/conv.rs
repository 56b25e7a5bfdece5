//! Direct convolution, forward and gradient by the input, f32 and int8: no im2col in memory.
//!
//! A unit owns some target rows and a block of target channels. It reads the source through a padded
//! window, so that every tap of a pixel is a fixed offset from the pixel's pointer, and runs the
//! register tile over pixels. Weights are packed per phase and group in the order
//! `[channel chunk][tap][channel]`.

use crate::Primitive;
use crate::args::{Conv2dArgs, Conv2dGradInputArgs, Conv2dGradInputI8Args, Conv2dI8Args, Epilogue};
use crate::buffer::{Buffer, Slot};
use crate::depthwise;
use crate::geometry::{Geometry, Part, Parts, Tap};
use crate::lanes::{Lanes, Simd, Task};
use crate::pack::{self, Right, Source};
use crate::tile::{self, Block, Depth, Finish, Panels, ROW_GROUP};
use crate::window::{Ahead, Window};

/// Pixels whose pointers are set up at once.
const BATCH_PIXELS: usize = 10 * ROW_GROUP;
/// Pixels of a unit, about.
const UNIT_PIXELS: usize = 8 * ROW_GROUP;
/// Units wanted, for the threads to share.
const WANTED_UNITS: usize = 32;
/// Most target channels of a unit.
const UNIT_CHANNELS: usize = 256;
/// Most words of one tap handled at once.
const CHUNK_WORDS: usize = 256;
/// Words of K handled at once, about.
const PART_WORDS: usize = 320;
/// Most segments handled at once.
const MOST_SEGMENTS: usize = 64;

/// Scales of an int8 convolution.
#[derive(Clone, Copy)]
pub(crate) struct Scales {
    pub(crate) source: *const f32,
    pub(crate) source_stride: usize,
    pub(crate) weight: *const f32,
    pub(crate) weight_stride: usize,
}

/// A convolution in terms that all kinds share.
#[derive(Clone, Copy)]
pub(crate) struct Convolution<E> {
    pub(crate) geometry: Geometry,
    pub(crate) source: *const E,
    pub(crate) weights: *const E,
    pub(crate) result: *mut f32,
    pub(crate) scales: Option<Scales>,
    pub(crate) epilogue: Option<Epilogue>,
    pub(crate) epilogue_ctx: *const u8,
    pub(crate) scratch: *mut u32,
}

impl<E> Convolution<E> {
    pub(crate) fn source_total(&self) -> usize {
        self.geometry.groups * self.geometry.source_channels
    }

    pub(crate) fn target_total(&self) -> usize {
        self.geometry.groups * self.geometry.target_channels
    }

    /// Where the rows of a unit go; `columns` are target channels over all groups.
    pub(crate) fn finish(&self, part: &Part, columns: std::ops::Range<usize>) -> Finish {
        let g = &self.geometry;
        let image = g.rows.target * g.columns.target;
        let row = part.image * image + part.row_begin * g.columns.target;
        let total = self.target_total();
        Finish {
            epilogue: self.epilogue,
            epilogue_ctx: self.epilogue_ctx,
            row,
            column: columns.start,
            columns: columns.len(),
            result: self.result.wrapping_add(row * total + columns.start),
            result_stride: total,
        }
    }
}

/// A kind of convolution: direction and type.
pub(crate) trait Kind: 'static {
    type Lanes<S: Simd>: Lanes;
    /// Reads the argument block.
    unsafe fn read<S: Simd>(args: *const u64) -> Convolution<<Self::Lanes<S> as Lanes>::Element>;
}

macro_rules! kind {
    ($name:ident, $args:ident, $lanes:ident, $element:ty, $backward:literal,
     $source:ident, $result:ident, $scales:expr) => {
        #[doc = concat!("[`", stringify!($args), "`]")]
        pub(crate) struct $name;
        impl Kind for $name {
            type Lanes<S: Simd> = S::$lanes;
            unsafe fn read<S: Simd>(args: *const u64) -> Convolution<$element> {
                // SAFETY: the caller passes the argument block of this kernel.
                let args = unsafe { &*args.cast::<$args>() };
                let scales: fn(&$args) -> Option<Scales> = $scales;
                Convolution {
                    geometry: Geometry::new(&args.shape, $backward),
                    source: args.$source,
                    weights: args.w,
                    result: args.$result,
                    scales: scales(args),
                    epilogue: args.epilogue,
                    epilogue_ctx: args.epilogue_ctx,
                    scratch: args.scratch.cast(),
                }
            }
        }
    };
}

kind!(Forward, Conv2dArgs, Real, f32, false, x, y, |_| None);
kind!(GradInput, Conv2dGradInputArgs, Real, f32, true, dy, dx, |_| None);
kind!(ForwardI8, Conv2dI8Args, Int8, i8, false, x, y, |args| Some(Scales {
    source: args.x_scale,
    source_stride: args.x_scale_stride,
    weight: args.w_scale,
    weight_stride: args.w_scale_stride,
}));
kind!(GradInputI8, Conv2dGradInputI8Args, Int8, i8, true, dy, dx, |args| Some(Scales {
    source: args.dy_scale,
    source_stride: args.dy_scale_stride,
    weight: args.w_scale,
    weight_stride: args.w_scale_stride,
}));

/// How a convolution is cut.
struct Cut {
    panels_per_group: usize,
    /// Words of a source pixel's channels in one group.
    words: usize,
    /// Words of a channel chunk.
    chunk: usize,
    parts: Parts,
    /// Panels of a unit.
    panels: usize,
    column_blocks: usize,
}

impl Cut {
    fn of<L: Lanes>(g: &Geometry) -> Cut {
        let width = Panels::width::<L>();
        let words = g.source_channels.div_ceil(L::GROUP);
        let chunk = words.div_ceil(words.div_ceil(CHUNK_WORDS).max(1)).max(1);
        let panels_per_group = g.target_channels.div_ceil(width);
        let panels = panels_per_group.min(UNIT_CHANNELS / width).max(1);
        let column_blocks = panels_per_group.div_ceil(panels);
        let wanted = WANTED_UNITS.div_ceil((g.groups * column_blocks).max(1));
        let parts = Parts::new(g.batch, g.rows.target, g.columns.target, UNIT_PIXELS, wanted);
        Cut { panels_per_group, words, chunk, parts, panels, column_blocks }
    }
}

/// One phase of the target: its taps and its packed weights.
struct Phase {
    row: usize,
    column: usize,
    taps: Vec<(Tap, Tap)>,
    /// Taps of one kernel row, if they read adjacent pixels.
    run: Option<usize>,
    panels: Panels,
    /// First word of the weights of group 0 in the scratch.
    packed: usize,
}

/// The phases of a convolution, and the words that all packed weights take.
fn phases<L: Lanes>(g: &Geometry) -> (Vec<Phase>, usize) {
    let words = g.source_channels.div_ceil(L::GROUP);
    let (mut phases, mut total) = (Vec::with_capacity(g.phases()), 0);
    for row in 0..g.rows.phases() {
        for column in 0..g.columns.phases() {
            let across = g.columns.taps(column);
            let taps: Vec<_> = g
                .rows
                .taps(row)
                .flat_map(|down| across.clone().map(move |across| (down, across)))
                .collect();
            let count = across.clone().count();
            let adjacent = across.clone().zip(across.skip(1)).all(|(a, b)| b.shift == a.shift + 1);
            let panels = Panels { k: taps.len() * words, n: g.target_channels };
            let run = (adjacent && count > 0).then_some(count);
            phases.push(Phase { row, column, taps, run, panels, packed: total });
            total += g.groups * panels.words::<L>();
        }
    }
    (phases, total)
}

/// Whether the convolution goes to the depthwise kernels.
fn is_depthwise<E>(c: &Convolution<E>) -> bool {
    // In int8 the depthwise kernel sums products exactly in f32, up to 2^24 / 2^14 of them.
    c.geometry.is_depthwise() && (c.scales.is_none() || c.geometry.kernel <= 1024)
}

unsafe extern "C" fn units<K: Kind, S: Simd>(args: *const u64, phase: usize) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    let c = unsafe { K::read::<S>(args) };
    let cut = Cut::of::<K::Lanes<S>>(&c.geometry);
    if c.target_total() == 0 || cut.parts.count() == 0 {
        return 0;
    }
    match (is_depthwise(&c), phase) {
        (true, 0) => 1,
        (true, _) => depthwise::parts(&c.geometry).count(),
        (false, 0) => c.geometry.phases() * c.geometry.groups * cut.panels_per_group,
        (false, _) => c.geometry.groups * cut.column_blocks * cut.parts.count(),
    }
}

unsafe extern "C" fn scratch<K: Kind, S: Simd>(args: *const u64) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    let c = unsafe { K::read::<S>(args) };
    if is_depthwise(&c) {
        c.geometry.kernel * c.geometry.groups * 4
    } else {
        phases::<K::Lanes<S>>(&c.geometry).1 * 4
    }
}

unsafe extern "C" fn run<K: Kind, S: Simd>(
    args: *const u64,
    phase: usize,
    begin: usize,
    end: usize,
) {
    if begin >= end {
        return;
    }
    // SAFETY: the caller passes the argument block of this kernel, on a CPU of the tier.
    unsafe {
        let convolution = K::read::<S>(args);
        match (is_depthwise(&convolution), phase) {
            (true, 0) => S::enter(depthwise::Pack::<K::Lanes<S>> { convolution }),
            (true, _) => {
                S::enter(depthwise::Compute::<K::Lanes<S>> { convolution, begin, end });
            }
            (false, 0) => S::enter(Pack::<K::Lanes<S>> { convolution, begin, end }),
            (false, _) => S::enter(Compute::<K::Lanes<S>> { convolution, begin, end }),
        }
    }
}

/// The primitive of a kind on a tier.
pub(crate) const fn primitive<K: Kind, S: Simd>() -> Primitive {
    Primitive { phases: 2, units: units::<K, S>, run: run::<K, S>, scratch: scratch::<K, S> }
}

/// Packs panels of weights.
struct Pack<L: Lanes> {
    convolution: Convolution<L::Element>,
    begin: usize,
    end: usize,
}

impl<L: Lanes> Task for Pack<L> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let c = &self.convolution;
        let g = &c.geometry;
        let cut = Cut::of::<L>(g);
        let (phases, _) = phases::<L>(g);
        for unit in self.begin..self.end {
            let (rest, panel) = (unit / cut.panels_per_group, unit % cut.panels_per_group);
            let (phase, group) = (&phases[rest / g.groups], rest % g.groups);
            let stored = phase.panels.stored::<L>(panel);
            let valid = phase.panels.valid::<L>(panel);
            // SAFETY: the panel lies in the scratch, the taps in the weights.
            unsafe {
                let panel_words = c.scratch.add(
                    phase.packed
                        + group * phase.panels.words::<L>()
                        + phase.panels.offset::<L>(panel),
                );
                let first_word = panel_words.add(if L::HEADER { stored } else { 0 });
                let mut to = first_word;
                for begin in (0..cut.words).step_by(cut.chunk) {
                    let channel = begin * L::GROUP;
                    let end = (begin + cut.chunk).min(cut.words);
                    let channels = (end * L::GROUP).min(g.source_channels) - channel;
                    for &tap in &phase.taps {
                        let column = panel * Panels::width::<L>();
                        let at = |source, target| g.weight(group, tap, source, target);
                        let first = at(channel, column);
                        let from = Source {
                            first: c.weights.add(first),
                            k_stride: at(channel + 1, column) - first,
                            column_stride: at(channel, column + 1) - first,
                        };
                        pack::interleave::<L, Right>(from, channels, valid, to, stored);
                        to = to.add((end - begin) * stored);
                    }
                }
                if L::HEADER {
                    pack::header::<L>(first_word, phase.panels.k, stored, panel_words);
                }
            }
        }
    }
}

/// Where a unit's tiles are stored.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    /// Straight in the result.
    Result,
    /// In a buffer of one row group, finished at once.
    Group,
    /// In a buffer of one batch of pixels, since sums come in several parts.
    Batch,
    /// In a buffer of the whole unit, since its rows come out of order.
    Unit,
}

/// Computes units of the target.
struct Compute<L: Lanes> {
    convolution: Convolution<L::Element>,
    begin: usize,
    end: usize,
}

/// What the batches of one unit share.
struct Unit<'a> {
    /// Scale of the unit's first image, and from one image's scale to the next.
    source_scales: Option<(*const f32, usize)>,
    column_scales: *const f32,
    finish: Finish,
    target: Target,
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
        let several = phases
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
            let part = cut.parts.part(unit_index % cut.parts.count());
            let block = unit_index / cut.parts.count();
            let (group, column_block) = (block / cut.column_blocks, block % cut.column_blocks);
            let panel_begin = column_block * cut.panels;
            let panel_end = (panel_begin + cut.panels).min(cut.panels_per_group);
            let column = panel_begin * Panels::width::<L>();
            let stride = (panel_end - panel_begin) * Panels::width::<L>();
            let columns = stride.min(g.target_channels - column);
            let first_column = group * g.target_channels + column;
            let pixels = part.images * (part.row_end - part.row_begin) * g.columns.target;
            let held = match target {
                Target::Result => 0,
                Target::Group => ROW_GROUP,
                Target::Batch => BATCH_PIXELS,
                Target::Unit => pixels,
            };
            let mut result = Buffer::take(Slot::Result, (held + 1) * stride);
            let mut left =
                Buffer::take(Slot::Left, Window::words::<L>(g, &part, g.source_channels));
            let channels = group * g.source_channels..(group + 1) * g.source_channels;
            // SAFETY: the part lies in source and target; the buffers were sized for it above.
            unsafe {
                let window =
                    Window::open::<L>(g, &part, c.source, c.source_total(), channels, &mut left);
                let finish = c.finish(&part, first_column..first_column + columns);
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
                    let groups = phases.len() + pixels / ROW_GROUP;
                    ahead = Ahead::source(g, &next, c.source, c.source_total()).steps(groups);
                }
                for phase in &phases {
                    let skip = phase.packed + group * phase.panels.words::<L>();
                    unit.packed = c.scratch.add(skip);
                    unit.phase::<L>(g, &part, phase, &window, &mut segments, &mut ahead);
                }
                if target == Target::Unit {
                    for first in (0..pixels).step_by(ROW_GROUP) {
                        let rows = ROW_GROUP.min(pixels - first);
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
                let held = if self.target == Target::Group { ROW_GROUP } else { BATCH_PIXELS };
                for (i, to) in batch.outs.iter_mut().enumerate() {
                    *to = out.add(i % held * out_step);
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
        for i in count..count.next_multiple_of(ROW_GROUP) {
            batch.rows[i] = batch.rows[count - 1];
            if matches!(self.target, Target::Result | Target::Unit) {
                batch.outs[i] = self.sink;
            }
        }
        let padded = count.next_multiple_of(ROW_GROUP);
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
                    for first in (0..count).step_by(ROW_GROUP) {
                        if last {
                            ahead.step::<L::Tier>();
                        }
                        block.sweep::<L>(first, &depth);
                        if last && matches!(self.target, Target::Group | Target::Batch) {
                            let live = ROW_GROUP.min(count - first);
                            let rows = batch.outs[first];
                            self.finish.rows(rows, self.stride, batch.first + first, live);
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
                for first in (0..count).step_by(ROW_GROUP) {
                    if matches!(self.target, Target::Group | Target::Batch) {
                        let live = ROW_GROUP.min(count - first);
                        let rows = batch.outs[first];
                        self.finish.rows(rows, self.stride, batch.first + first, live);
                    }
                }
            }
        }
        batch.count = 0;
    }
}
