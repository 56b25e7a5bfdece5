//! The register tile and the loops around it, shared by matrix products and convolutions.
//!
//! A left operand is any set of rows, each with its own pointer, read along K in equal segments (the
//! taps of a convolution; one segment for a matrix). The right operand is packed in panels of two
//! vectors' width: an optional header row, then one row of words for each word of K.

use crate::args::{Epilogue, Stream};
use crate::lanes::{Lanes, Simd};
use crate::window::Ahead;

/// A multiple of every tier's row group, and so of every tile height.
pub(crate) const EVERY_GROUP: usize = 96;
/// The largest row group.
pub(crate) const MOST_GROUP: usize = 32;

/// First values of a tile's accumulators.
#[derive(Clone, Copy)]
pub(crate) enum Start {
    /// Zeros.
    Zero,
    /// This row of words, for each row.
    Header(*const u32),
    /// What the output holds.
    Resume,
}

/// One register tile.
pub(crate) struct Tile {
    /// A pointer for each row of the left operand.
    pub(crate) rows: *const *const u32,
    /// A pointer for each row of the output.
    pub(crate) outs: *const *mut u32,
    /// Columns to skip in each row of the output.
    pub(crate) column: usize,
    /// Offset of each segment from the row's pointer, in words.
    pub(crate) segments: *const isize,
    /// Number of segments.
    pub(crate) segment_count: usize,
    /// Words in a segment.
    pub(crate) length: usize,
    /// From one word of a segment to the next.
    pub(crate) step: isize,
    /// The packed right operand.
    pub(crate) right: *const u32,
    /// First values.
    pub(crate) start: Start,
    /// What turns finished i32 sums into f32; none for f32 and for sums that go on.
    pub(crate) scales: Option<Scales>,
    /// Memory to be fetched ahead of its use, and so many cache lines of it with each segment.
    pub(crate) ahead: (*const u8, usize),
    /// Rows that count; what a tile stores for the others is arbitrary.
    pub(crate) live: usize,
    /// What [`Lanes::blocks`] made of the rows, if it was done once for several tiles.
    pub(crate) blocks: Option<Blocks>,
}

/// A tile's rows as a tier reads them that multiplies blocks of rows: each block's equally far apart.
#[derive(Clone, Copy)]
pub(crate) struct Blocks {
    /// Where each block is.
    pub(crate) place: [Place; 2],
    /// First word of each block.
    pub(crate) first: [*const u32; 2],
    /// From one row of a block to the next, in bytes.
    pub(crate) stride: [isize; 2],
    /// From one row of the output to the next in bytes, for each block, where they are equally far apart.
    pub(crate) out_stride: [Option<isize>; 2],
}

/// Scales of i32 sums.
#[derive(Clone, Copy)]
pub(crate) struct Scales {
    /// One for each row.
    pub(crate) left: *const f32,
    /// One for each column, in whole vectors.
    pub(crate) right: *const f32,
}

/// Computes `R` rows by `N` vectors; always stores whole vectors.
///
/// # Safety
/// All pointers of the tile are valid for its sizes, and the CPU supports the tier.
#[inline(always)]
pub(crate) unsafe fn tile<L: Lanes, const R: usize, const N: usize>(t: &Tile) {
    // SAFETY: granted by the caller.
    unsafe {
        let mut rows = [t.right; R];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = *t.rows.add(i);
        }
        let mut sums = [[L::zero(); N]; R];
        if !matches!(t.start, Start::Resume) {
            // The output is written much later, and may be far away.
            for i in 0..R {
                let out = (*t.outs.add(i)).wrapping_add(t.column);
                for j in 0..N {
                    L::Tier::prefetch_near(out.wrapping_add(j * L::LANES).cast());
                }
            }
        }
        match t.start {
            Start::Zero => {}
            Start::Header(header) => {
                for row in &mut sums {
                    for (j, sum) in row.iter_mut().enumerate() {
                        *sum = L::load(header.add(j * L::LANES));
                    }
                }
            }
            Start::Resume => {
                for (i, row) in sums.iter_mut().enumerate() {
                    let out = (*t.outs.add(i)).add(t.column);
                    for (j, sum) in row.iter_mut().enumerate() {
                        *sum = L::load(out.add(j * L::LANES));
                    }
                }
            }
        }
        let mut right = t.right;
        let (mut ahead, lines) = t.ahead;
        for s in 0..t.segment_count {
            for _ in 0..lines {
                L::Tier::prefetch(ahead);
                ahead = ahead.wrapping_add(64);
            }
            let mut at = *t.segments.add(s);
            let mut left = t.length;
            if t.step == 1 {
                while left >= L::UNROLL {
                    for u in 0..L::UNROLL {
                        multiply::<L, R, N>(&rows, at + u as isize, right, &mut sums);
                        right = right.add(N * L::LANES);
                    }
                    at = opaque(at + L::UNROLL as isize);
                    left -= L::UNROLL;
                }
            }
            for _ in 0..left {
                multiply::<L, R, N>(&rows, at, right, &mut sums);
                at = opaque(at + t.step);
                right = right.add(N * L::LANES);
            }
        }
        if L::INTEGER
            && let Some(scales) = t.scales
        {
            for (i, row) in sums.iter_mut().enumerate() {
                for (j, sum) in row.iter_mut().enumerate() {
                    let right = scales.right.add(t.column + j * L::LANES);
                    *sum = L::scale(*sum, scales.left.add(i), right);
                }
            }
        }
        for (i, row) in sums.iter().enumerate() {
            let out = (*t.outs.add(i)).add(t.column);
            for (j, &sum) in row.iter().enumerate() {
                L::store(out.add(j * L::LANES), sum);
            }
        }
    }
}

/// Adds the products of one word of K.
#[inline(always)]
unsafe fn multiply<L: Lanes, const R: usize, const N: usize>(
    rows: &[*const u32; R],
    at: isize,
    right: *const u32,
    sums: &mut [[L::V; N]; R],
) {
    // SAFETY: granted by the caller.
    unsafe {
        let mut b = [L::zero(); N];
        for (j, b) in b.iter_mut().enumerate() {
            *b = L::load(right.add(j * L::LANES));
        }
        for i in 0..R {
            let a = L::splat(rows[i].offset(at));
            for j in 0..N {
                sums[i][j] = L::dot(sums[i][j], a, b[j]);
            }
        }
    }
}

/// Hides how an index moves. Otherwise the compiler turns one index and `R` fixed pointers into `R`
/// moving pointers, which costs `R` additions for each word of K.
#[inline(always)]
fn opaque(index: isize) -> isize {
    #[cfg(target_arch = "x86_64")]
    {
        let mut index = index;
        // SAFETY: no instruction at all; the operand only passes through a register.
        unsafe {
            std::arch::asm!("/* {0} */", inout(reg) index, options(pure, nomem, nostack, preserves_flags));
        }
        index
    }
    #[cfg(not(target_arch = "x86_64"))]
    index
}

/// Layout of a packed right operand of `k` words by `n` columns.
#[derive(Clone, Copy)]
pub(crate) struct Panels {
    pub(crate) k: usize,
    pub(crate) n: usize,
}

impl Panels {
    /// Columns of a full panel.
    pub(crate) const fn width<L: Lanes>() -> usize {
        2 * L::LANES
    }

    /// Number of tiles of so many rows.
    pub(crate) fn tiles<L: Lanes>(self, panels: std::ops::Range<usize>, rows: usize) -> usize {
        let single = |panel: usize| self.stored::<L>(panel) == L::LANES;
        let height = |panel: usize| if single(panel) { L::ROWS_SINGLE } else { L::ROWS_PAIR };
        panels.map(|panel| rows.div_ceil(height(panel))).sum()
    }

    /// Number of panels.
    pub(crate) fn count<L: Lanes>(self) -> usize {
        self.n.div_ceil(Self::width::<L>())
    }

    /// Columns that a panel stores, filled up with zeros: one vector or two.
    pub(crate) fn stored<L: Lanes>(self, panel: usize) -> usize {
        if self.valid::<L>(panel) <= L::LANES { L::LANES } else { Self::width::<L>() }
    }

    /// Columns of the operand in a panel.
    pub(crate) fn valid<L: Lanes>(self, panel: usize) -> usize {
        Self::width::<L>().min(self.n - panel * Self::width::<L>())
    }

    /// First word of a panel.
    pub(crate) fn offset<L: Lanes>(self, panel: usize) -> usize {
        panel * Self::width::<L>() * (self.k + usize::from(L::HEADER))
    }

    /// Words of the whole operand, a multiple of a cache line.
    pub(crate) fn words<L: Lanes>(self) -> usize {
        (self.count::<L>() * Self::width::<L>() * (self.k + usize::from(L::HEADER)))
            .next_multiple_of(16)
    }
}

/// A part of K.
#[derive(Clone, Copy, Default)]
pub(crate) struct Depth<'a> {
    /// Offset of each segment from a row's pointer, in words.
    pub(crate) segments: &'a [isize],
    /// Words in a segment.
    pub(crate) length: usize,
    /// From one word of a segment to the next.
    pub(crate) step: isize,
    /// First word of the part in the packed panels.
    pub(crate) begin: usize,
    /// Whether the output already holds the sum of earlier parts.
    pub(crate) resume: bool,
    /// Whether no later part follows.
    pub(crate) last: bool,
}

/// Where a block of rows is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the left operand.
    There,
    /// In a copy of all segments, one after the other.
    Copied,
    /// In rows that are not equally far apart, to be gathered at each step: a copy would not stay in L1.
    Scattered,
}

/// One block of the output.
pub(crate) struct Block<'a> {
    /// A pointer for each row of the left operand, filled up to whole row groups.
    pub(crate) rows: &'a [*const u32],
    /// A pointer for each row of the output; rows without a result need room all the same.
    pub(crate) outs: &'a [*mut u32],
    /// Rows that count.
    pub(crate) count: usize,
    /// The packed right operand.
    pub(crate) packed: *const u32,
    /// Its layout.
    pub(crate) panels: Panels,
    /// First panel of the block; its first column is column 0 of `outs`.
    pub(crate) panel_begin: usize,
    /// End of the block's panels.
    pub(crate) panel_end: usize,
    /// Whether rows of the output end at the last column, so that no wider store may touch them.
    pub(crate) exact: bool,
    /// Scales of the block's rows and columns, for i32 sums.
    pub(crate) scales: Option<Scales>,
    /// Where rows go that are finished a group at a time, and which of its rows row 0 of the block is.
    pub(crate) finish: Option<(&'a Finish, usize)>,
}

impl Block<'_> {
    /// Adds a part of K to the rows of one group (`first` is a multiple of [`Lanes::ROW_GROUP`]), and fetches a
    /// piece of what lies ahead with each tile.
    ///
    /// # Safety
    /// The pointers are valid for the sizes, and the CPU supports the tier.
    pub(crate) unsafe fn sweep<L: Lanes>(
        &self,
        first: usize,
        depth: &Depth<'_>,
        ahead: &mut [Ahead],
    ) {
        let count = L::ROW_GROUP.min(self.count - first);
        let mut copies = None;
        // Cache lines of a tile, and with each of its segments.
        let mut pieces = (0, 0);
        // SAFETY: granted by the caller.
        unsafe {
            let (rows, outs) = (self.rows.as_ptr().add(first), self.outs.as_ptr().add(first));
            let blocks = L::blocks(rows, outs, depth, &mut copies);
            for panel in self.panel_begin..self.panel_end {
                let stored = self.panels.stored::<L>(panel);
                let valid = self.panels.valid::<L>(panel);
                let panel_words = self.packed.add(self.panels.offset::<L>(panel));
                let skip = (depth.begin + usize::from(L::HEADER)) * stored;
                let mut tile = Tile {
                    rows: self.rows.as_ptr(),
                    outs: self.outs.as_ptr(),
                    column: (panel - self.panel_begin) * Panels::width::<L>(),
                    segments: depth.segments.as_ptr(),
                    segment_count: depth.segments.len(),
                    length: depth.length,
                    step: depth.step,
                    right: panel_words.add(skip),
                    start: match (depth.resume, L::HEADER) {
                        (true, _) => Start::Resume,
                        (false, true) => Start::Header(panel_words),
                        (false, false) => Start::Zero,
                    },
                    scales: None,
                    ahead: (std::ptr::null(), 0),
                    live: 0,
                    blocks,
                };
                let single = stored == L::LANES;
                let height = if single { L::ROWS_SINGLE } else { L::ROWS_PAIR };
                // Not by `step_by`, which divides.
                let mut row = first;
                while row < first + count {
                    tile.rows = self.rows.as_ptr().add(row);
                    tile.outs = self.outs.as_ptr().add(row);
                    tile.live = height.min(self.count - row);
                    if let Some(ahead) = ahead.iter_mut().find(|ahead| !ahead.is_empty()) {
                        let (from, lines) = ahead.take();
                        if lines != pieces.0 {
                            pieces = (lines, lines.div_ceil(depth.segments.len().max(1)));
                        }
                        tile.ahead = (from, pieces.1);
                    } else {
                        tile.ahead.1 = 0;
                    }
                    if depth.last {
                        if let Some((finish, above)) = self.finish {
                            finish.fetch::<L::Tier>(above + row, tile.live, tile.column, stored);
                        }
                        let left = |scales: Scales| scales.left.add(row);
                        tile.scales = self.scales.map(|s| Scales { left: left(s), ..s });
                    }
                    if self.exact && valid < stored {
                        narrow::<L>(&mut tile, single, height, stored, valid);
                    } else if single {
                        L::tile_single(&tile);
                    } else {
                        L::tile_pair(&tile);
                    }
                    row += height;
                }
            }
        }
    }
}

/// Computes a tile of which only the live rows and `valid` columns may be stored.
///
/// # Safety
/// As [`Block::sweep`].
unsafe fn narrow<L: Lanes>(
    tile: &mut Tile,
    single: bool,
    height: usize,
    stored: usize,
    valid: usize,
) {
    let mut words = [0_u32; MOST_GROUP * 32];
    let mut outs = [std::ptr::null_mut(); MOST_GROUP];
    for (i, out) in outs.iter_mut().take(height).enumerate() {
        *out = words[i * stored..].as_mut_ptr();
    }
    let (column, real, scales, blocks) = (tile.column, tile.outs, tile.scales, tile.blocks);
    tile.blocks =
        blocks.map(|blocks| Blocks { out_stride: [Some((stored * 4) as isize); 2], ..blocks });
    // SAFETY: `height * stored` words fit the local buffer; the rest is granted by the caller.
    unsafe {
        if matches!(tile.start, Start::Resume) {
            for (i, &out) in outs.iter().take(tile.live).enumerate() {
                std::ptr::copy_nonoverlapping((*real.add(i)).add(column), out, valid);
            }
        }
        (tile.outs, tile.column) = (outs.as_ptr(), 0);
        tile.scales = scales.map(|s| Scales { right: s.right.add(column), ..s });
        if single {
            L::tile_single(tile);
        } else {
            L::tile_pair(tile);
        }
        for (i, &out) in outs.iter().take(tile.live).enumerate() {
            std::ptr::copy_nonoverlapping(out, (*real.add(i)).add(column), valid);
        }
    }
    (tile.outs, tile.column, tile.scales, tile.blocks) = (real, column, scales, blocks);
}

/// Where finished rows go.
#[derive(Clone, Copy)]
pub(crate) struct Finish {
    /// Takes the rows, if present.
    pub(crate) epilogue: Option<Epilogue>,
    /// First argument of the epilogue.
    pub(crate) epilogue_ctx: *const u8,
    /// What the epilogue touches.
    pub(crate) streams: (*const Stream, usize),
    /// The unit's range of rows.
    pub(crate) part: usize,
    /// Row 0 of the unit in the numbering of the epilogue.
    pub(crate) row: usize,
    /// Column 0 of the unit.
    pub(crate) column: usize,
    /// Columns of the unit.
    pub(crate) columns: usize,
    /// Row 0, column 0 of the unit in the result.
    pub(crate) result: *mut f32,
    /// From one row of the result to the next.
    pub(crate) result_stride: usize,
}

impl Finish {
    /// Asks for what the epilogue will touch with some rows and columns of the unit.
    ///
    /// # Safety
    /// The streams are there.
    #[inline(always)]
    pub(crate) unsafe fn fetch<S: Simd>(
        &self,
        first: usize,
        rows: usize,
        column: usize,
        columns: usize,
    ) {
        const LINE: usize = 64;
        for at in 0..self.streams.1 {
            // SAFETY: granted by the caller.
            let stream = unsafe { *self.streams.0.add(at) };
            if !S::FETCHES_WRITES && stream.written != 0 {
                continue;
            }
            let row = (self.row + first) * stream.row_bytes;
            let left = (self.column + column) * stream.column_bytes;
            let from = stream.first.wrapping_add(row + left);
            // Rows shorter than a line share it with their neighbours.
            let (bytes, step) = if stream.row_bytes < LINE {
                (rows * stream.row_bytes, rows)
            } else {
                (columns * stream.column_bytes, 1)
            };
            for r in (0..rows).step_by(step.max(1)) {
                let row = from.wrapping_add(r * stream.row_bytes);
                for line in (0..bytes).step_by(LINE) {
                    S::prefetch_near(row.wrapping_add(line));
                }
            }
        }
    }

    /// Hands over or stores `rows` rows that begin at row `first` of the unit.
    ///
    /// # Safety
    /// `buffer` holds the rows; the destination is valid.
    #[inline(always)]
    pub(crate) unsafe fn rows(&self, buffer: *mut u32, stride: usize, first: usize, rows: usize) {
        // SAFETY: granted by the caller.
        unsafe {
            if let Some(epilogue) = self.epilogue {
                epilogue(
                    self.epilogue_ctx,
                    buffer.cast(),
                    stride,
                    self.row + first,
                    rows,
                    self.column,
                    self.columns,
                    self.part,
                );
            } else {
                for r in 0..rows {
                    let to = self.result.add((first + r) * self.result_stride);
                    std::ptr::copy_nonoverlapping(buffer.add(r * stride).cast(), to, self.columns);
                }
            }
        }
    }
}
