//! Direct convolution, forward and gradient by the input, f32, bf16 and int8: no im2col in memory.
//!
//! A unit owns some target rows and a block of target channels. It reads the source through a padded
//! window, so that every tap of a pixel is a fixed offset from the pixel's pointer, and runs the
//! register tile over pixels. Weights are packed per phase and group in the order
//! `[channel chunk][tap][channel]`.

use crate::Primitive;
use crate::args::{
    Conv2dArgs, Conv2dBf16Args, Conv2dGradInputArgs, Conv2dGradInputBf16Args,
    Conv2dGradInputI8Args, Conv2dI8Args, Epilogue, Stream,
};
use crate::depthwise;
use crate::direct;
use crate::geometry::{Geometry, Part, Parts, Tap};
use crate::lanes::{Codes, Lanes, Simd, Task};
use crate::pack::{self, Right, Source};
use crate::tile::{Finish, Panels};
use crate::winograd;

/// Pixels of a unit, about.
const UNIT_PIXELS: usize = 192;
/// Most pixels of a unit whose size suits the tiles.
const MOST_PIXELS: usize = 240;
/// Units wanted, for the threads to share.
const WANTED_UNITS: usize = 32;
/// Most target channels of a unit.
const UNIT_CHANNELS: usize = 256;
/// Most words of one tap handled at once.
const CHUNK_WORDS: usize = 256;

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
    pub(crate) codes: Codes,
    pub(crate) epilogue: Option<Epilogue>,
    pub(crate) epilogue_ctx: *const u8,
    pub(crate) streams: (*const Stream, usize),
    pub(crate) scratch: *mut u32,
}

impl<E> Convolution<E> {
    pub(crate) fn source_total(&self) -> usize {
        self.geometry.groups * self.geometry.source_channels
    }

    pub(crate) fn target_total(&self) -> usize {
        self.geometry.groups * self.geometry.target_channels
    }

    /// Where the rows of a unit go, of the part with this index; `columns` are target channels over all groups.
    pub(crate) fn finish(
        &self,
        part: &Part,
        index: usize,
        columns: std::ops::Range<usize>,
    ) -> Finish {
        let g = &self.geometry;
        let image = g.rows.target * g.columns.target;
        let row = part.image * image + part.row_begin * g.columns.target;
        let total = self.target_total();
        Finish {
            epilogue: self.epilogue,
            epilogue_ctx: self.epilogue_ctx,
            streams: self.streams,
            part: index,
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
     $source:ident, $result:ident, $scales:expr, $codes:expr) => {
        #[doc = concat!("[`", stringify!($args), "`]")]
        pub(crate) struct $name;
        impl Kind for $name {
            type Lanes<S: Simd> = S::$lanes;
            unsafe fn read<S: Simd>(args: *const u64) -> Convolution<$element> {
                // SAFETY: the caller passes the argument block of this kernel.
                let args = unsafe { &*args.cast::<$args>() };
                let scales: fn(&$args) -> Option<Scales> = $scales;
                let codes: fn(&$args) -> Codes = $codes;
                Convolution {
                    geometry: Geometry::new(&args.shape, $backward),
                    source: args.$source,
                    weights: args.w,
                    result: args.$result,
                    scales: scales(args),
                    codes: codes(args),
                    epilogue: args.epilogue,
                    epilogue_ctx: args.epilogue_ctx,
                    streams: (args.streams, args.stream_count),
                    scratch: args.scratch.cast(),
                }
            }
        }
    };
}

kind!(Forward, Conv2dArgs, Real, f32, false, x, y, |_| None, |_| Codes::default());
kind!(GradInput, Conv2dGradInputArgs, Real, f32, true, dy, dx, |_| None, |_| Codes::default());
kind!(ForwardBf16, Conv2dBf16Args, Bf16, u16, false, x, y, |_| None, |_| Codes::default());
kind!(GradInputBf16, Conv2dGradInputBf16Args, Bf16, u16, true, dy, dx, |_| None, |_| {
    Codes::default()
});
kind!(
    ForwardI8,
    Conv2dI8Args,
    Int8,
    i8,
    false,
    x,
    y,
    |args| Some(Scales {
        source: args.x_scale,
        source_stride: args.x_scale_stride,
        weight: args.w_scale,
        weight_stride: args.w_scale_stride,
    }),
    |args| Codes::new(args.x_zero, args.x_unsigned)
);
kind!(
    GradInputI8,
    Conv2dGradInputI8Args,
    Int8,
    i8,
    true,
    dy,
    dx,
    |args| Some(Scales {
        source: args.dy_scale,
        source_stride: args.dy_scale_stride,
        weight: args.w_scale,
        weight_stride: args.w_scale_stride,
    }),
    |_| Codes::default()
);

/// How a convolution is cut.
pub(crate) struct Cut {
    pub(crate) panels_per_group: usize,
    /// Words of a source pixel's channels in one group.
    pub(crate) words: usize,
    /// Words of a channel chunk.
    pub(crate) chunk: usize,
    pub(crate) parts: Parts,
    /// Panels of a unit.
    pub(crate) panels: usize,
    pub(crate) column_blocks: usize,
}

impl Cut {
    pub(crate) fn of<L: Lanes>(g: &Geometry) -> Cut {
        let width = Panels::width::<L>();
        let words = g.source_channels.div_ceil(L::GROUP);
        let chunk = words.div_ceil(words.div_ceil(CHUNK_WORDS).max(1)).max(1);
        let panels_per_group = g.target_channels.div_ceil(width);
        let panels = panels_per_group.min(UNIT_CHANNELS / width).max(1);
        let column_blocks = panels_per_group.div_ceil(panels);
        let wanted = WANTED_UNITS.div_ceil((g.groups * column_blocks).max(1));
        let parts = Parts::new(g.batch, g.rows.target, g.columns.target, UNIT_PIXELS, wanted);
        let height = if g.target_channels <= L::LANES { L::ROWS_SINGLE } else { L::ROWS_PAIR };
        let parts = if g.phases() == 1 && parts.count() > 0 {
            parts.filling(height, g.columns.target, MOST_PIXELS, wanted.div_ceil(4))
        } else {
            parts
        };
        Cut { panels_per_group, words, chunk, parts, panels, column_blocks }
    }
}

/// One phase of the target: its taps and its packed weights.
pub(crate) struct Phase {
    pub(crate) row: usize,
    pub(crate) column: usize,
    pub(crate) taps: Vec<(Tap, Tap)>,
    /// Taps of one kernel row, if they read adjacent pixels.
    pub(crate) run: Option<usize>,
    pub(crate) panels: Panels,
    /// First word of the weights of group 0 in the scratch.
    pub(crate) packed: usize,
}

/// The phases of a convolution, and the words that all packed weights take.
pub(crate) fn phases<L: Lanes>(g: &Geometry) -> (Vec<Phase>, usize) {
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

/// How a convolution is computed.
#[derive(Clone, Copy)]
enum Way {
    /// Tap by tap, every channel by itself.
    Depthwise,
    /// Tiles of pixels by products of their transforms.
    Winograd,
    /// Tap by tap.
    Direct,
}

impl Way {
    /// The way of a convolution, which its shape and type determine.
    fn of<L: Lanes>(c: &Convolution<L::Element>) -> Way {
        let g = &c.geometry;
        // In int8 the depthwise kernel sums products exactly in f32, up to 2^24 / 2^15 of them.
        if g.is_depthwise() && (c.scales.is_none() || g.kernel <= 512) {
            Way::Depthwise
        } else if winograd::suits::<L>(g, winograd::FEWEST_CHANNELS) {
            Way::Winograd
        } else {
            Way::Direct
        }
    }
}

unsafe extern "C" fn units<K: Kind, S: Simd>(args: *const u64, phase: usize) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    let c = unsafe { K::read::<S>(args) };
    let g = &c.geometry;
    let cut = Cut::of::<K::Lanes<S>>(g);
    if c.target_total() == 0 || cut.parts.count() == 0 {
        return 0;
    }
    match (Way::of::<K::Lanes<S>>(&c), phase) {
        (Way::Depthwise, 0) => 1,
        (Way::Depthwise, _) => depthwise::parts(g, depthwise::WANTED_UNITS).count(),
        (Way::Winograd, _) => winograd::Cut::of::<K::Lanes<S>>(g).units::<K::Lanes<S>>(phase),
        (Way::Direct, 0) => g.phases() * g.groups * cut.panels_per_group,
        (Way::Direct, _) => g.groups * cut.column_blocks * cut.parts.count(),
    }
}

unsafe extern "C" fn scratch<K: Kind, S: Simd>(args: *const u64) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    let c = unsafe { K::read::<S>(args) };
    let g = &c.geometry;
    let words = match Way::of::<K::Lanes<S>>(&c) {
        Way::Depthwise => g.kernel * g.groups,
        Way::Winograd => winograd::Cut::of::<K::Lanes<S>>(g).words::<K::Lanes<S>>(),
        Way::Direct => phases::<K::Lanes<S>>(g).1,
    };
    words * 4
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
        match (Way::of::<K::Lanes<S>>(&convolution), phase) {
            (Way::Depthwise, 0) => S::enter(depthwise::Pack::<K::Lanes<S>> { convolution }),
            (Way::Depthwise, _) => {
                S::enter(depthwise::Compute::<K::Lanes<S>> { convolution, begin, end });
            }
            (Way::Winograd, 0) => {
                S::enter(winograd::Pack::<K::Lanes<S>> { convolution, begin, end });
            }
            (Way::Winograd, _) => {
                S::enter(winograd::Compute::<K::Lanes<S>> { convolution, begin, end });
            }
            (Way::Direct, 0) => S::enter(Pack::<K::Lanes<S>> { convolution, begin, end }),
            (Way::Direct, _) => {
                S::enter(direct::Compute::<K::Lanes<S>> { convolution, begin, end });
            }
        }
    }
}

unsafe extern "C" fn parts<K: Kind, S: Simd>(args: *const u64) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    let c = unsafe { K::read::<S>(args) };
    let g = &c.geometry;
    match Way::of::<K::Lanes<S>>(&c) {
        Way::Depthwise => depthwise::parts(g, depthwise::WANTED_UNITS).count(),
        Way::Winograd => winograd::Cut::of::<K::Lanes<S>>(g).parts(),
        Way::Direct => Cut::of::<K::Lanes<S>>(g).parts.count(),
    }
}

/// The primitive of a kind on a tier.
pub(crate) const fn primitive<K: Kind, S: Simd>() -> Primitive {
    Primitive {
        phases: 2,
        units: units::<K, S>,
        run: run::<K, S>,
        scratch: scratch::<K, S>,
        parts: parts::<K, S>,
    }
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
                            flip: 0,
                        };
                        pack::interleave::<L, Right>(from, channels, valid, to, stored);
                        to = to.add((end - begin) * stored);
                    }
                }
                if L::HEADER {
                    pack::header::<L>(first_word, phase.panels.k, stored, panel_words, c.codes);
                }
            }
        }
    }
}
