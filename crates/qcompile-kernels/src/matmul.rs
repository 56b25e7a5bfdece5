//! Matrix products, f32 and int8.

use crate::Primitive;
use crate::args::{Epilogue, MatmulArgs, MatmulI8Args};
use crate::buffer::{Buffer, Slot};
use crate::lanes::{Lanes, Simd, Task};
use crate::pack::{self, Left, Right, Source};
use crate::tile::{Block, Depth, Finish, Panels, ROW_GROUP, Scale};

/// Most rows of a block.
const BLOCK_ROWS: usize = 96;
/// Most columns of a block.
const BLOCK_COLUMNS: usize = 256;
/// Most words of K handled at once: a panel of them stays in L1.
const BLOCK_WORDS: usize = 256;
/// Blocks are made smaller until there are this many, for the threads to share.
const WANTED_UNITS: usize = 48;

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
    scale: Option<Scale>,
    epilogue: Option<Epilogue>,
    epilogue_ctx: *const u8,
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
/// int8.
pub(crate) struct Int8Kind;

impl Kind for RealKind {
    type Lanes<S: Simd> = S::Real;
    unsafe fn read<S: Simd>(args: *const u64) -> ProductOf<S::Real> {
        // SAFETY: the caller passes the argument block of this kernel.
        let args = unsafe { &*args.cast::<MatmulArgs>() };
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
            scale: None,
            epilogue: args.epilogue,
            epilogue_ctx: args.epilogue_ctx,
            scratch: args.scratch.cast(),
        };
        ProductOf(product.folded())
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
            scale: Some(Scale {
                left: args.a_scale,
                left_period: 1,
                left_stride: args.a_scale_stride,
                right: args.b_scale,
                right_stride: args.b_scale_stride,
            }),
            epilogue: args.epilogue,
            epilogue_ctx: args.epilogue_ctx,
            scratch: args.scratch.cast(),
        };
        ProductOf(product.folded())
    }
}

/// How the left operand is read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum LeftForm {
    /// Where it is.
    InPlace,
    /// Packed row by row.
    Rows,
    /// Packed by groups of rows, a word of each row after the other.
    Groups,
}

/// How a product is cut into units.
struct Cut {
    panels: Panels,
    left: LeftForm,
    /// Packed copies of A.
    left_copies: usize,
    /// Words of one packed copy of A.
    left_words: usize,
    /// Packed copies of B.
    copies: usize,
    row_blocks: usize,
    rows: usize,
    column_blocks: usize,
    /// Panels of a column block.
    columns: usize,
}

impl Cut {
    fn of<L: Lanes>(p: &Product<L::Element>) -> Cut {
        let panels = Panels { k: p.k.div_ceil(L::GROUP), n: p.n };
        let count = panels.count::<L>();
        let (mut rows, mut columns) = (BLOCK_ROWS, BLOCK_COLUMNS / Panels::width::<L>());
        let units =
            |rows: usize, columns: usize| p.batch * p.m.div_ceil(rows) * count.div_ceil(columns);
        // Columns first: a narrow block costs less than a low one, whose panels are read more often.
        while units(rows, columns) < WANTED_UNITS && columns > 4 {
            columns /= 2;
        }
        while units(rows, columns) < WANTED_UNITS && rows > 2 * ROW_GROUP {
            rows -= ROW_GROUP;
        }
        // Equal blocks instead of full ones and a rest.
        let row_blocks = p.m.div_ceil(rows).max(1);
        let rows = p.m.div_ceil(row_blocks).next_multiple_of(ROW_GROUP);
        let column_blocks = count.div_ceil(columns).max(1);
        let columns = count.div_ceil(column_blocks);
        let adjacent = p.a_strides[2] == 1 || p.k <= 1;
        let left = match (L::GROUP == 1, adjacent) {
            (true, true) => LeftForm::InPlace,
            // A single panel reads A once, which is no more than packing does.
            (true, false) if count <= 1 => LeftForm::InPlace,
            (_, false) => LeftForm::Groups,
            (false, true) => LeftForm::Rows,
        };
        let packed = left != LeftForm::InPlace;
        Cut {
            panels,
            left,
            left_copies: if !packed {
                0
            } else if p.a_strides[0] == 0 {
                1
            } else {
                p.batch
            },
            left_words: p.m.next_multiple_of(ROW_GROUP) * panels.k,
            copies: if p.b_strides[0] == 0 { 1 } else { p.batch },
            row_blocks: p.m.div_ceil(rows),
            rows,
            column_blocks: if count == 0 { 0 } else { count.div_ceil(columns) },
            columns,
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
            cut.copies * cut.panels.count::<K::Lanes<S>>()
                + cut.left_copies * p.m.div_ceil(ROW_GROUP)
        }
        _ => p.batch * cut.row_blocks * cut.column_blocks,
    }
}

unsafe extern "C" fn scratch<K: Kind, S: Simd>(args: *const u64) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    let ProductOf(p) = unsafe { K::read::<S>(args) };
    let cut = Cut::of::<K::Lanes<S>>(&p);
    (cut.copies * cut.panels.words::<K::Lanes<S>>() + cut.left_copies * cut.left_words) * 4
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

/// The primitive of a kind on a tier.
pub(crate) const fn primitive<K: Kind, S: Simd>() -> Primitive {
    Primitive { phases: 2, units: units::<K, S>, run: run::<K, S>, scratch: scratch::<K, S> }
}

/// Packs panels of B, then row groups of A.
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
        let right_units = cut.copies * count;
        for unit in begin..end {
            if unit >= right_units {
                // SAFETY: the group lies in A and in the scratch.
                unsafe { pack_left::<L>(&p, &cut, unit - right_units) };
                continue;
            }
            let (copy, panel) = (unit / count, unit % count);
            let stored = cut.panels.stored::<L>(panel);
            let valid = cut.panels.valid::<L>(panel);
            // SAFETY: the panel lies in the scratch, the columns in B.
            unsafe {
                let column = panel * Panels::width::<L>();
                let from = Source {
                    first: p.b.add(copy * p.b_strides[0] + column * p.b_strides[2]),
                    k_stride: p.b_strides[1],
                    column_stride: p.b_strides[2],
                };
                let mut to =
                    p.scratch.add(copy * cut.panels.words::<L>() + cut.panels.offset::<L>(panel));
                if L::HEADER {
                    to.write_bytes(0, stored);
                    pack::add_header::<L>(from, p.k, valid, to);
                    to = to.add(stored);
                }
                pack::interleave::<L, Right>(from, p.k, valid, to, stored);
            }
        }
    }
}

/// Packs a group of rows of A.
#[inline(always)]
unsafe fn pack_left<L: Lanes>(p: &Product<L::Element>, cut: &Cut, unit: usize) {
    let groups = p.m.div_ceil(ROW_GROUP);
    let (copy, row) = (unit / groups, unit % groups * ROW_GROUP);
    let live = ROW_GROUP.min(p.m - row);
    let words = cut.panels.k;
    // SAFETY: granted by the caller.
    unsafe {
        let from = p.a.add(copy * p.a_strides[0] + row * p.a_strides[1]);
        let to = p
            .scratch
            .add(cut.copies * cut.panels.words::<L>() + copy * cut.left_words + row * words);
        if cut.left == LeftForm::Rows {
            for r in 0..live {
                pack::row::<L, Left>(from.add(r * p.a_strides[1]), p.k, to.add(r * words));
            }
        } else {
            let source =
                Source { first: from, k_stride: p.a_strides[2], column_stride: p.a_strides[1] };
            pack::interleave::<L, Left>(source, p.k, live, to, ROW_GROUP);
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
        let padded = rows.next_multiple_of(ROW_GROUP);
        let panel_begin = column_block * cut.columns;
        let panel_end = (panel_begin + cut.columns).min(cut.panels.count::<L>());
        let column = panel_begin * Panels::width::<L>();
        let stride = (panel_end - panel_begin) * Panels::width::<L>();
        let columns = stride.min(p.n - column);
        let words = cut.panels.k;
        let direct = p.epilogue.is_none() && !L::INTEGER;
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
            ROW_GROUP
        };
        let mut result = Buffer::take(Slot::Result, held * stride);
        let mut row_pointers = [std::ptr::null(); BLOCK_ROWS + ROW_GROUP];
        let mut out_pointers = [std::ptr::null_mut(); BLOCK_ROWS + ROW_GROUP];
        // SAFETY: rows lie in A, C and the buffers taken above.
        unsafe {
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
                scale: p.scale.map(|scale| Scale {
                    left: scale.left.add(row * scale.left_stride),
                    right: scale.right.add(column * scale.right_stride),
                    ..scale
                }),
                epilogue: p.epilogue,
                epilogue_ctx: p.epilogue_ctx,
                row: matrix * p.m + row,
                column,
                columns,
                result: c,
                result_stride: p.c_row_stride,
            };
            let copy = if cut.copies == 1 { 0 } else { matrix };
            let packed = p.scratch.add(copy * cut.panels.words::<L>()).cast_const();
            let left_copy = if cut.left_copies == 1 { 0 } else { matrix };
            let left = p.scratch.wrapping_add(
                cut.copies * cut.panels.words::<L>() + left_copy * cut.left_words + row * words,
            );
            // Distance from one word of a row to the next.
            let step = match cut.left {
                LeftForm::InPlace => p.a_strides[2],
                LeftForm::Rows => 1,
                LeftForm::Groups => ROW_GROUP,
            };
            for (r, pointer) in row_pointers.iter_mut().enumerate().take(padded) {
                *pointer = match cut.left {
                    LeftForm::InPlace => a.add(r.min(rows - 1) * p.a_strides[1]).cast(),
                    LeftForm::Rows => left.add(r.min(rows - 1) * words),
                    LeftForm::Groups => left.add(r / ROW_GROUP * ROW_GROUP * words + r % ROW_GROUP),
                };
            }
            for at in 0..parts {
                let begin = at * part;
                let length = part.min(words - begin);
                let segments = [(begin * step) as isize];
                let block = Block {
                    rows: &row_pointers[..padded],
                    outs: &out_pointers[..padded],
                    count: rows,
                    packed,
                    panels: cut.panels,
                    panel_begin,
                    panel_end,
                    exact: direct,
                };
                let step = step as isize;
                let depth = Depth { segments: &segments, length, step, begin, resume: at > 0 };
                for first in (0..rows).step_by(ROW_GROUP) {
                    block.sweep::<L>(first, &depth);
                    if !direct && at + 1 == parts {
                        let live = ROW_GROUP.min(rows - first);
                        finish.rows(out_pointers[first].cast(), stride, first, live);
                    }
                }
            }
        }
    }
}
