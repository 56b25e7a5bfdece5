//! Products between queries and keys, of which a mask may leave only parts: what a query does not see is not computed.

use crate::attention::CHUNK;
use crate::attention_kind::Rows;
use crate::lanes::{Codes, Lanes};
use crate::pack::header;
use crate::tile::{MOST_GROUP, Panels, Start, Tile};

/// `out (+)= left · right`, of which each tile may need only a part.
#[derive(Clone, Copy)]
pub(crate) struct Product {
    /// Begins at element `first` of K, a multiple of [`grain`].
    pub(crate) left: Rows,
    pub(crate) first: usize,
    pub(crate) rows: usize,
    pub(crate) right: *const u32,
    pub(crate) panels: Panels,
    /// Panels that are wanted; the first is column 0 of `out`.
    pub(crate) panel_begin: usize,
    pub(crate) panel_end: usize,
    /// Has whole panels, and rows up to a multiple of [`EVERY_GROUP`](crate::tile::EVERY_GROUP).
    pub(crate) out: *mut u32,
    pub(crate) out_stride: usize,
    /// Whether to add to what `out` holds.
    pub(crate) resume: bool,
    pub(crate) kind: Left,
}

/// What the words of a left operand of bytes hold.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Left {
    /// What packing makes of them, over all of K: panels with a header take off again what it adds.
    Packed,
    /// The bytes themselves, not below 0.
    Plain,
}

/// Elements of K that products begin and end at: whole words, and as many as tiles take at once.
#[inline(always)]
pub(crate) const fn grain<L: Lanes>() -> usize {
    if L::GROUP == 1 { 1 } else { 32 }
}

/// What a tile needs: columns from 0 on, and a range of K.
#[derive(Clone, Copy)]
pub(crate) struct Part {
    pub(crate) columns: usize,
    pub(crate) begin: usize,
    pub(crate) end: usize,
}

/// What is seen of keys by queries: which parts of the products are wanted.
#[derive(Clone, Copy)]
pub(crate) struct Seen {
    pub(crate) causal: bool,
    pub(crate) keys: usize,
    /// First query of the strip.
    pub(crate) row: usize,
    /// First key of the chunk.
    pub(crate) key: usize,
}

impl Seen {
    /// How many of all keys query `r` of the strip sees.
    #[inline(always)]
    pub(crate) fn all(self, r: usize) -> usize {
        if self.causal { self.keys.min(self.row + r + 1) } else { self.keys }
    }

    /// How many of the chunk's.
    #[inline(always)]
    pub(crate) fn of_chunk(self, r: usize) -> usize {
        self.all(r).saturating_sub(self.key).min(CHUNK)
    }

    /// The first query of the strip that sees key `c` of the chunk.
    #[inline(always)]
    fn first(self, c: usize) -> usize {
        if self.causal { (self.key + c).saturating_sub(self.row) } else { 0 }
    }
}

/// Which of the three kinds of products, for the parts that masks leave.
#[derive(Clone, Copy)]
pub(crate) enum Over {
    /// Rows are queries, columns are keys.
    Scores,
    /// Rows are queries, K is keys.
    Keys,
    /// Rows are keys, K is queries: so many.
    Queries(usize),
    /// All rows, and K from the first of these to before the second.
    All(usize, usize),
}

impl Over {
    #[inline(always)]
    fn part(self, seen: Seen, row: usize, end: usize) -> Part {
        match self {
            Over::Scores => Part { columns: seen.of_chunk(end - 1), begin: 0, end: usize::MAX },
            Over::Keys => {
                let keys = seen.of_chunk(end - 1);
                Part { columns: usize::MAX, begin: seen.key, end: seen.key + keys }
            }
            Over::Queries(queries) => {
                Part { columns: usize::MAX, begin: seen.first(row), end: queries }
            }
            Over::All(begin, end) => Part { columns: usize::MAX, begin, end },
        }
    }
}

impl Product {
    /// The words of K from the first that a part needs to after the last.
    #[inline(always)]
    fn words<L: Lanes>(&self, part: Part) -> [usize; 2] {
        let words = grain::<L>() / L::GROUP;
        let end = part.end.div_ceil(grain::<L>()).saturating_mul(words).min(self.panels.k);
        [part.begin / grain::<L>() * words, end]
    }

    /// Makes the headers of the packed right operand those of a part of K, which [`Left::Packed`] wants.
    ///
    /// # Safety
    /// The packed operand may be written; else as [`Product::run`].
    #[inline(always)]
    pub(crate) unsafe fn cover<L: Lanes>(&self, over: Over, seen: Seen) {
        if !L::HEADER {
            return;
        }
        let [begin, end] = self.words::<L>(over.part(seen, 0, self.rows));
        for panel in self.panel_begin..self.panel_end {
            let stored = self.panels.stored::<L>(panel);
            // SAFETY: granted by the caller.
            unsafe {
                let to = self.right.cast_mut().add(self.panels.offset::<L>(panel));
                let words = to.add((begin + 1) * stored);
                header::<L>(words, end.saturating_sub(begin), stored, to, Codes::default());
            }
        }
    }

    /// Computes the parts that are seen.
    ///
    /// # Safety
    /// The pointers are valid for the sizes, and the CPU supports the tier.
    #[inline(always)]
    pub(crate) unsafe fn run<L: Lanes>(&self, over: Over, seen: Seen) {
        let header = usize::from(L::HEADER);
        for panel in self.panel_begin..self.panel_end {
            let stored = self.panels.stored::<L>(panel);
            let single = stored == L::LANES;
            let height = if single { L::ROWS_SINGLE } else { L::ROWS_PAIR };
            let column = (panel - self.panel_begin) * Panels::width::<L>();
            for row in (0..self.rows).step_by(height) {
                let part = over.part(seen, row, self.rows.min(row + height));
                let [begin, end] = self.words::<L>(part);
                let length = end.saturating_sub(begin);
                if column >= part.columns || (length == 0 && self.resume) {
                    continue;
                }
                // SAFETY: granted by the caller: rows of the left operand are repeated, those of the result padded.
                unsafe {
                    let (mut rows, mut outs) =
                        ([std::ptr::null(); MOST_GROUP], [std::ptr::null_mut(); MOST_GROUP]);
                    for i in 0..height {
                        let live = (row + i).min(self.rows - 1);
                        rows[i] = self.left.first.add(live * self.left.row_stride);
                        outs[i] = self.out.add((row + i) * self.out_stride);
                    }
                    let skipped = begin.saturating_sub(self.first / L::GROUP) * self.left.step;
                    let segments = [skipped as isize];
                    let panel_words = self.right.add(self.panels.offset::<L>(panel));
                    let tile = Tile {
                        rows: rows.as_ptr(),
                        outs: outs.as_ptr(),
                        column,
                        segments: segments.as_ptr(),
                        segment_count: 1,
                        length,
                        step: self.left.step as isize,
                        right: panel_words.wrapping_add((begin + header) * stored),
                        start: match (self.resume, self.kind) {
                            (true, _) => Start::Resume,
                            (false, Left::Packed) if L::HEADER => Start::Header(panel_words),
                            (false, _) => Start::Zero,
                        },
                        scales: None,
                        ahead: (std::ptr::null(), 0),
                        live: height,
                        blocks: None,
                    };
                    if single { L::tile_single(&tile) } else { L::tile_pair(&tile) }
                }
            }
        }
    }
}
