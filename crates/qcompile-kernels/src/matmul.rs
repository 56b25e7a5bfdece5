//! Matrix products, f32, bf16 and int8.

mod operands;

use crate::Primitive;
use crate::args::{Epilogue, MatmulArgs, MatmulBf16Args, MatmulI8Args, Stream};
use crate::buffer::{Buffer, Slot};
use crate::lanes::{Codes, Lanes, Simd, Task};
use crate::tile::{Block, Depth, EVERY_GROUP, Finish, Panels, Scales};
use operands::{LeftForm, pack_left, pack_right};

/// Most rows of a block, where there are several of them.
const BLOCK_ROWS: usize = EVERY_GROUP;
/// Products of no more rows than this keep them in one block.
const WHOLE_ROWS: usize = 3 * EVERY_GROUP;
/// Most columns of a block.
const BLOCK_COLUMNS: usize = 256;
/// Most words of a packed block of columns that only one unit reads: they stay in L2.
const ALONE_WORDS: usize = 96 << 10;
/// Most words of K handled at once: a panel of them stays in L1.
const BLOCK_WORDS: usize = 256;
/// Most columns of a block whose unit packs its rows of A for itself, a part of K at a time.
const ALONE_COLUMNS: usize = 512;
/// Blocks are made narrower until there are this many, for the threads to share.
const WANTED_UNITS: usize = 32;
/// Blocks are made lower until there are this many.
const LEAST_UNITS: usize = 16;

/// Scales of an int8 product: one value, or one for each row or column.
#[derive(Clone, Copy)]
struct Dequantize {
    left: *const f32,
    left_stride: usize,
    right: *const f32,
    right_stride: usize,
}

/// A product in terms that both types share.
#[derive(Clone, Copy)]
struct Product<E> {
    a: *const E,
    b: *const E,
    c: *mut f32,
    batch: usize,
    m: usize,
    n: usize,
    k: usize,
    a_strides: [usize; 3],
    b_strides: [usize; 3],
    c_batch_stride: usize,
    c_row_stride: usize,
    scale: Option<Dequantize>,
    codes: Codes,
    epilogue: Option<Epilogue>,
    epilogue_ctx: *const u8,
    streams: (*const Stream, usize),
    scratch: *mut u32,
}

impl<E> Product<E> {
    /// Sees a batch that shares B as one tall matrix, where the strides allow it.
    fn folded(mut self) -> Self {
        let row_scales = self.scale.is_some_and(|scale| scale.left_stride != 0);
        if self.batch > 1
            && self.b_strides[0] == 0
            && !row_scales
            && self.a_strides[0] == self.m * self.a_strides[1]
            && (self.epilogue.is_some() || self.c_batch_stride == self.m * self.c_row_stride)
        {
            self.m *= self.batch;
            self.batch = 1;
        }
        self
    }
}

/// A kind of product: which argument block, which lanes.
pub(crate) trait Kind: 'static {
    type Lanes<S: Simd>: Lanes;
    #[doc(hidden)]
    unsafe fn read<S: Simd>(args: *const u64) -> ProductOf<Self::Lanes<S>>;
}

/// Hides the private struct behind the trait.
pub(crate) struct ProductOf<L: Lanes>(Product<L::Element>);

/// f32.
pub(crate) struct RealKind;
/// bf16.
pub(crate) struct Bf16Kind;
/// int8.
pub(crate) struct Int8Kind;

impl<E> MatmulArgs<E> {
    fn product(&self) -> Product<E> {
        let product = Product {
            a: self.a,
            b: self.b,
            c: self.c,
            batch: self.batch,
            m: self.m,
            n: self.n,
            k: self.k,
            a_strides: [self.a_batch_stride, self.a_row_stride, self.a_col_stride],
            b_strides: [self.b_batch_stride, self.b_row_stride, self.b_col_stride],
            c_batch_stride: self.c_batch_stride,
            c_row_stride: self.c_row_stride,
            scale: None,
            codes: Codes::default(),
            epilogue: self.epilogue,
            epilogue_ctx: self.epilogue_ctx,
            streams: (self.streams, self.stream_count),
            scratch: self.scratch.cast(),
        };
        product.folded()
    }
}

impl Kind for RealKind {
    type Lanes<S: Simd> = S::Real;
    unsafe fn read<S: Simd>(args: *const u64) -> ProductOf<S::Real> {
        // SAFETY: the caller passes the argument block of this kernel.
        ProductOf(unsafe { &*args.cast::<MatmulArgs>() }.product())
    }
}

impl Kind for Bf16Kind {
    type Lanes<S: Simd> = S::Bf16;
    unsafe fn read<S: Simd>(args: *const u64) -> ProductOf<S::Bf16> {
        // SAFETY: the caller passes the argument block of this kernel.
        ProductOf(unsafe { &*args.cast::<MatmulBf16Args>() }.product())
    }
}

impl Kind for Int8Kind {
    type Lanes<S: Simd> = S::Int8;
    unsafe fn read<S: Simd>(args: *const u64) -> ProductOf<S::Int8> {
        // SAFETY: the caller passes the argument block of this kernel.
        let args = unsafe { &*args.cast::<MatmulI8Args>() };
        let product = Product {
            a: args.a,
            b: args.b,
            c: args.c,
            batch: args.batch,
            m: args.m,
            n: args.n,
            k: args.k,
            a_strides: [args.a_batch_stride, args.a_row_stride, args.a_col_stride],
            b_strides: [args.b_batch_stride, args.b_row_stride, args.b_col_stride],
            c_batch_stride: args.c_batch_stride,
            c_row_stride: args.c_row_stride,
            scale: Some(Dequantize {
                left: args.a_scale,
                left_stride: args.a_scale_stride,
                right: args.b_scale,
                right_stride: args.b_scale_stride,
            }),
            codes: Codes::new(args.a_zero, args.a_unsigned),
            epilogue: args.epilogue,
            epilogue_ctx: args.epilogue_ctx,
            streams: (args.streams, args.stream_count),
            scratch: args.scratch.cast(),
        };
        ProductOf(product.folded())
    }
}

/// How a product is cut into units.
struct Cut {
    panels: Panels,
    left: LeftForm,
    /// Packed copies of A that all units share.
    left_copies: usize,
    /// Words of one packed copy of A.
    left_words: usize,
    /// Packed copies of B that all units share.
    right_copies: usize,
    row_blocks: usize,
    rows: usize,
    column_blocks: usize,
    /// Panels of a column block.
    columns: usize,
    /// Whether a unit packs its rows of A for itself, since no other unit reads them.
    left_alone: bool,
    /// Whether a unit packs its columns of B for itself.
    right_alone: bool,
}

impl Cut {
    fn of<L: Lanes>(p: &Product<L::Element>) -> Cut {
        let panels = Panels { k: p.k.div_ceil(L::GROUP), n: p.n };
        let (count, width) = (panels.count::<L>(), Panels::width::<L>());
        let whole = p.m <= WHOLE_ROWS;
        let (mut rows, mut columns) =
            (if whole { p.m.max(1) } else { BLOCK_ROWS }, BLOCK_COLUMNS / width);
        let units =
            |rows: usize, columns: usize| p.batch * p.m.div_ceil(rows) * count.div_ceil(columns);
        let adjacent = p.a_strides[2] == 1 || p.k <= 1;
        let left = match adjacent {
            true if p.codes.are_plain::<L>() && p.k.is_multiple_of(L::GROUP) => LeftForm::InPlace,
            true => LeftForm::Rows,
            // A single panel reads A once, which is no more than packing does.
            false if L::PLAIN && L::GROUP == 1 && count <= 1 => LeftForm::InPlace,
            false if L::ALONG_K => LeftForm::Turned,
            false => LeftForm::Groups,
        };
        let in_place = left == LeftForm::InPlace;
        let fits = |columns: usize| !whole || panels.k * columns * width <= ALONE_WORDS;
        // Where a unit packs its columns of B for itself, it reads rows of B a piece at a time: of one panel, too little
        // for the prefetchers of the CPU.
        let narrowest = match whole {
            true if count < LEAST_UNITS || !fits(2) => 1,
            true => 2,
            false => 4,
        };
        // Fewer units will do where each packs its rows of A for itself.
        let enough = |columns: usize| {
            let wanted = if count <= columns && !in_place { LEAST_UNITS } else { WANTED_UNITS };
            units(rows, columns) >= wanted && fits(columns)
        };
        // Lower blocks will do, too: A is then read and packed where it is used, and not written to memory in between.
        let alone = !in_place
            && !L::ALONG_K
            && !whole
            && count * width <= ALONE_COLUMNS
            && units(2 * L::ROW_GROUP, count) >= LEAST_UNITS;
        if alone {
            columns = count.max(1);
        }
        while columns > narrowest && !alone && !enough(columns) {
            columns /= 2;
        }
        while units(rows, columns) < LEAST_UNITS && rows > 2 * L::ROW_GROUP {
            rows = rows.next_multiple_of(L::ROW_GROUP) - L::ROW_GROUP;
        }
        // Equal blocks instead of full ones and a rest.
        let row_blocks = p.m.div_ceil(rows).max(1);
        let rows = p.m.div_ceil(row_blocks).next_multiple_of(L::ROW_GROUP);
        let row_blocks = p.m.div_ceil(rows.max(1));
        let columns = count.div_ceil(count.div_ceil(columns).max(1));
        let column_blocks = if count == 0 { 0 } else { count.div_ceil(columns) };
        let copies = |stride: usize| if stride == 0 { 1 } else { p.batch };
        let (left_copies, right_copies) = (copies(p.a_strides[0]), copies(p.b_strides[0]));
        let left_alone = !in_place && column_blocks <= 1 && left_copies == p.batch;
        let right_alone = row_blocks <= 1 && right_copies == p.batch;
        Cut {
            panels,
            left,
            left_copies: if in_place || left_alone { 0 } else { left_copies },
            left_words: p.m.next_multiple_of(L::ROW_GROUP) * left.pitch(panels.k),
            right_copies: if right_alone { 0 } else { right_copies },
            row_blocks,
            rows,
            column_blocks,
            columns,
            left_alone,
            right_alone,
        }
    }
}

unsafe extern "C" fn units<K: Kind, S: Simd>(args: *const u64, phase: usize) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    let ProductOf(p) = unsafe { K::read::<S>(args) };
    if p.batch == 0 || p.m == 0 || p.n == 0 {
        return 0;
    }
    let cut = Cut::of::<K::Lanes<S>>(&p);
    match phase {
        0 => {
            cut.right_copies * cut.panels.count::<K::Lanes<S>>()
                + cut.left_copies * p.m.div_ceil(<K::Lanes<S> as Lanes>::ROW_GROUP)
        }
        _ => p.batch * cut.row_blocks * cut.column_blocks,
    }
}

unsafe extern "C" fn scratch<K: Kind, S: Simd>(args: *const u64) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    let ProductOf(p) = unsafe { K::read::<S>(args) };
    let cut = Cut::of::<K::Lanes<S>>(&p);
    (cut.right_copies * cut.panels.words::<K::Lanes<S>>() + cut.left_copies * cut.left_words) * 4
}

unsafe extern "C" fn run<K: Kind, S: Simd>(
    args: *const u64,
    phase: usize,
    begin: usize,
    end: usize,
) {
    // SAFETY: the caller passes the argument block of this kernel, on a CPU of the tier.
    unsafe {
        let ProductOf(product) = K::read::<S>(args);
        let cut = Cut::of::<K::Lanes<S>>(&product);
        if phase == 0 {
            S::enter(Pack::<K::Lanes<S>> { product, cut, begin, end });
        } else {
            S::enter(Compute::<K::Lanes<S>> { product, cut, begin, end });
        }
    }
}

unsafe extern "C" fn parts<K: Kind, S: Simd>(args: *const u64) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    let ProductOf(p) = unsafe { K::read::<S>(args) };
    p.batch * Cut::of::<K::Lanes<S>>(&p).row_blocks
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

/// Packs what all units share: panels of B, then row groups of A.
struct Pack<L: Lanes> {
    product: Product<L::Element>,
    cut: Cut,
    begin: usize,
    end: usize,
}

impl<L: Lanes> Task for Pack<L> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Pack { product: p, cut, begin, end } = self;
        let count = cut.panels.count::<L>();
        let right_units = cut.right_copies * count;
        let mut unit = begin;
        while unit < end {
            // SAFETY: panels and groups lie in B, in A and in the scratch.
            unsafe {
                if unit < right_units {
                    // As many panels of one matrix as are asked for, side by side.
                    let (copy, panel) = (unit / count, unit % count);
                    let panels = (end - unit).min(count - panel).min(cut.columns);
                    let to = p.scratch.add(copy * cut.panels.words::<L>());
                    let skip = panel * Panels::width::<L>();
                    let part = Panels { n: p.n - skip, ..cut.panels };
                    let to = to.add(cut.panels.offset::<L>(panel));
                    pack_right::<L>(&p, copy, skip, part, panels, to);
                    unit += panels;
                } else {
                    // As many groups of one matrix as are asked for, side by side.
                    let all = p.m.div_ceil(L::ROW_GROUP);
                    let (copy, group) = ((unit - right_units) / all, (unit - right_units) % all);
                    let groups = (end - unit).min(all - group).min(BLOCK_ROWS / L::ROW_GROUP);
                    let (row, pitch) = (group * L::ROW_GROUP, cut.left.pitch(cut.panels.k));
                    let to = cut.right_copies * cut.panels.words::<L>() + copy * cut.left_words;
                    let to = p.scratch.add(to + row * pitch);
                    let rows = (groups * L::ROW_GROUP).min(p.m - row);
                    let words = cut.panels.k;
                    pack_left::<L>(&p, cut.left, [copy, row, rows], 0..words, words, to);
                    unit += groups;
                }
            }
        }
    }
}

/// Computes blocks of C.
struct Compute<L: Lanes> {
    product: Product<L::Element>,
    cut: Cut,
    begin: usize,
    end: usize,
}

impl<L: Lanes> Task for Compute<L> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let per_matrix = self.cut.row_blocks * self.cut.column_blocks;
        for unit in self.begin..self.end {
            let (matrix, block) = (unit / per_matrix, unit % per_matrix);
            // Neighbouring units share columns, so that a thread keeps its panels in L2.
            let (column_block, row_block) =
                (block / self.cut.row_blocks, block % self.cut.row_blocks);
            // SAFETY: the block lies in C.
            unsafe { self.block(matrix, row_block, column_block) };
        }
    }
}

impl<L: Lanes> Compute<L> {
    #[inline(always)]
    unsafe fn block(&self, matrix: usize, row_block: usize, column_block: usize) {
        let (p, cut) = (&self.product, &self.cut);
        let row = row_block * cut.rows;
        let rows = cut.rows.min(p.m - row);
        let padded = rows.next_multiple_of(L::ROW_GROUP);
        let panel_begin = column_block * cut.columns;
        let panel_end = (panel_begin + cut.columns).min(cut.panels.count::<L>());
        let column = panel_begin * Panels::width::<L>();
        let stride = (panel_end - panel_begin) * Panels::width::<L>();
        let columns = stride.min(p.n - column);
        let words = cut.panels.k;
        let direct = p.epilogue.is_none();
        // K runs in equal parts.
        let parts = words.div_ceil(BLOCK_WORDS).max(1);
        let part = words.div_ceil(parts);
        let parts = if part == 0 { 1 } else { words.div_ceil(part) };
        // Either the whole block, or one row group where nothing has to wait for a later part of K.
        let held = if direct {
            1
        } else if parts > 1 {
            padded
        } else {
            L::ROW_GROUP
        };
        let mut result = Buffer::take(Slot::Result, held * stride);
        let mut scale_buffer = Buffer::take(Slot::Scales, padded + stride);
        let mut row_pointers = [std::ptr::null(); WHOLE_ROWS];
        let mut out_pointers = [std::ptr::null_mut(); WHOLE_ROWS];
        // The block's panels, packed by this unit or by all.
        let local = Panels { k: words, n: columns };
        let right_words = if cut.right_alone { local.words::<L>() } else { 0 };
        let mut right = Buffer::take(Slot::Right, right_words);
        // A unit that packs its rows of A for itself holds a part of K of them.
        let room = if cut.left_alone { part } else { words };
        let pitch = cut.left.pitch(room);
        let left_words = if cut.left_alone { padded * pitch } else { 0 };
        let mut left = Buffer::take(Slot::Left, left_words);
        // SAFETY: rows lie in A, C and the buffers taken above.
        unsafe {
            let packed = if cut.right_alone {
                let to = right.words();
                pack_right::<L>(p, matrix, column, local, panel_end - panel_begin, to);
                to.cast_const()
            } else {
                let copy = if cut.right_copies == 1 { 0 } else { matrix };
                let skip = copy * cut.panels.words::<L>() + cut.panels.offset::<L>(panel_begin);
                p.scratch.add(skip).cast_const()
            };
            let own = left.words();
            let left = if cut.left_alone {
                own.cast_const()
            } else {
                let copy = if cut.left_copies == 1 { 0 } else { matrix };
                let skip = cut.right_copies * cut.panels.words::<L>() + copy * cut.left_words;
                p.scratch.wrapping_add(skip + row * pitch).cast_const()
            };
            let a = p.a.add(matrix * p.a_strides[0] + row * p.a_strides[1]);
            let c = p.c.wrapping_add(matrix * p.c_batch_stride + row * p.c_row_stride + column);
            for (r, out) in out_pointers.iter_mut().enumerate().take(padded) {
                *out = match (direct, r < rows) {
                    (true, true) => c.add(r * p.c_row_stride).cast(),
                    (true, false) => result.words(),
                    (false, _) => result.words().add(r % held * stride),
                };
            }
            let finish = Finish {
                epilogue: p.epilogue,
                epilogue_ctx: p.epilogue_ctx,
                streams: p.streams,
                part: matrix * cut.row_blocks + row_block,
                row: matrix * p.m + row,
                column,
                columns,
                result: c,
                result_stride: p.c_row_stride,
            };
            let scales = p.scale.map(|scale| {
                let to = scale_buffer.words().cast::<f32>();
                for r in 0..padded {
                    *to.add(r) = *scale.left.add((row + r.min(rows - 1)) * scale.left_stride);
                }
                for c in 0..stride {
                    let from = (column + c.min(columns - 1)) * scale.right_stride;
                    *to.add(padded + c) = *scale.right.add(from);
                }
                Scales { left: to, right: to.add(padded) }
            });
            // Distance from one word of a row to the next.
            let step = match cut.left {
                LeftForm::InPlace => p.a_strides[2],
                LeftForm::Rows | LeftForm::Turned => 1,
                LeftForm::Groups => L::ROW_GROUP,
            };
            for (r, pointer) in row_pointers.iter_mut().enumerate().take(padded) {
                *pointer = match cut.left {
                    LeftForm::InPlace => a.add(r.min(rows - 1) * p.a_strides[1]).cast(),
                    LeftForm::Rows | LeftForm::Turned => left.add(r.min(rows - 1) * pitch),
                    LeftForm::Groups => {
                        left.add(r / L::ROW_GROUP * L::ROW_GROUP * room + r % L::ROW_GROUP)
                    }
                };
            }
            let block = Block {
                rows: &row_pointers[..padded],
                outs: &out_pointers[..padded],
                count: rows,
                packed,
                // Panels of the block; the last one of B may be narrower.
                panels: local,
                panel_begin: 0,
                panel_end: panel_end - panel_begin,
                exact: direct,
                scales,
                finish: (!direct).then_some((&finish, 0)),
            };
            for at in 0..parts {
                let begin = at * part;
                let length = part.min(words - begin);
                if cut.left_alone {
                    let which = [matrix, row, rows];
                    pack_left::<L>(p, cut.left, which, begin..begin + length, room, own);
                }
                let first_word = if cut.left_alone { 0 } else { begin };
                let segments = [(first_word * step) as isize];
                let (resume, last) = (at > 0, at + 1 == parts);
                let step = step as isize;
                let depth = Depth { segments: &segments, length, step, begin, resume, last };
                for first in (0..rows).step_by(L::ROW_GROUP) {
                    block.sweep::<L>(first, &depth, &mut []);
                    if !direct && last {
                        let live = L::ROW_GROUP.min(rows - first);
                        finish.rows(out_pointers[first].cast(), stride, first, live);
                    }
                }
            }
        }
    }
}
