//! Convolution by 3 x 3 kernels with fewer multiplications: Lavin and Gray, "Fast Algorithms for Convolutional
//! Neural Networks", 2016, F(2x2, 3x3).
//!
//! A tile of 2 x 2 targets reads 4 x 4 source pixels `d`. With the kernel `g` it is `A^T [(G g G^T) . (B^T d B)] A`
//! (section 4.1 there), where `.` multiplies elements, 16 for each pair of channels in place of 36, and
//!
//! ```text
//!       1  0 -1  0         1    0    0
//! B^T = 0  1  1  0    G = 1/2  1/2  1/2    A^T = 1  1  1  0
//!       0 -1  1  0        1/2 -1/2  1/2          0  1 -1 -1
//!       0  1  0 -1         0    0    1
//! ```
//!
//! Summed over channels, each of the 16 positions is a matrix product of its own, `[tiles x channels] x [channels x targets]`.
//! Transforms are computed in f32, and those of bf16 rounded to that once, where the tier multiplies it. Weights are
//! transformed once for each call, tiles in buffers of one thread. The gradient of the input is the same with the kernel
//! turned around; the gradient of the weights is the adjoint, F(3x3, 2x2) (section 4.2).

mod compute;
mod gradient;
mod grid;
mod transform;
mod weights;

pub(crate) use compute::Compute;
pub(crate) use gradient::Gradient;
pub(crate) use weights::Pack;

use crate::geometry::{Geometry, Part, Parts};
use crate::lanes::Lanes;
use crate::tile::Panels;

/// Rows and columns of the targets of a tile.
pub(crate) const TILE: usize = 2;
/// Positions of a transformed tile, and so products.
pub(crate) const POSITIONS: usize = 16;
/// Fewest channels of source and target: with fewer, transforms take longer than the products that they save.
pub(crate) const FEWEST_CHANNELS: usize = 24;
/// The same for the gradient of the weights, whose products are as deep as there are tiles.
pub(crate) const FEWEST_GRADIENT_CHANNELS: usize = 16;
/// Most source and target channels of a unit of the gradient of the weights.
pub(crate) const GRADIENT_CHANNELS: usize = 64;
/// Fewest tiles for which weights are transformed.
const FEWEST_TILES: usize = 16;
/// Tiles of a unit, about.
const UNIT_TILES: usize = 96;
/// Most tiles of a unit whose size suits the register tiles.
const MOST_TILES: usize = 200;
/// Units wanted, for the threads to share.
const WANTED_UNITS: usize = 32;
/// Most tiles whose transforms are held at once, a multiple of the row group of every tier: they and their products stay in
/// L2 beside the weights of a position.
const BATCH_TILES: usize = 72;
/// Most target channels of a unit.
const UNIT_CHANNELS: usize = 128;
/// Most source channels handled at once.
const CHUNK_CHANNELS: usize = 128;
/// Words between what belongs to two positions, besides it: else all 16 would meet in one set of the cache.
const APART: usize = 16;

/// Whether a convolution of these lanes is faster this way, if it has so many channels.
pub(crate) fn suits<L: Lanes>(g: &Geometry, fewest_channels: usize) -> bool {
    let tiles = g.rows.target.div_ceil(TILE) * g.columns.target.div_ceil(TILE);
    let pixels = g.rows.target * g.columns.target;
    !L::INTEGER
        && !L::ALONG_K
        && g.groups == 1
        && g.rows.is_dense(3)
        && g.columns.is_dense(3)
        && g.source_channels.min(g.target_channels) >= fewest_channels
        && g.batch * tiles >= FEWEST_TILES
        // Tiles that reach over the border compute more than they yield.
        && 20 * tiles <= 9 * pixels
}

/// Into how many chunks the gradient of the weights cuts its images at most: less than a batch of tiles makes its products
/// shallow, and each chunk's partial sums must be added.
pub(crate) fn most_chunks<L: Lanes>(g: &Geometry) -> usize {
    let tiles = g.rows.target.div_ceil(TILE) * g.columns.target.div_ceil(TILE);
    g.batch * tiles / (BATCH_TILES * L::GROUP)
}

/// How a convolution is cut.
pub(crate) struct Cut {
    /// Source and target channels.
    sources: usize,
    targets: usize,
    /// Panels of a unit.
    unit_panels: usize,
    /// Blocks of target channels.
    column_blocks: usize,
    /// Source channels handled at once.
    chunk: usize,
    /// Parts of the target, in rows of tiles.
    parts: Parts,
}

impl Cut {
    pub(crate) fn of<L: Lanes>(g: &Geometry) -> Cut {
        let (down, across) = (g.rows.target.div_ceil(TILE), g.columns.target.div_ceil(TILE));
        let (sources, targets) = (g.source_channels, g.target_channels);
        let count = targets.div_ceil(Panels::width::<L>());
        let blocks = count.div_ceil((UNIT_CHANNELS / Panels::width::<L>()).max(1)).max(1);
        let unit_panels = count.div_ceil(blocks).max(1);
        let column_blocks = count.div_ceil(unit_panels);
        let chunks = sources.div_ceil(CHUNK_CHANNELS).max(1);
        let chunk = sources.div_ceil(chunks).next_multiple_of(L::LANES).max(1);
        let wanted = WANTED_UNITS.div_ceil(column_blocks.max(1));
        let parts = Parts::new(g.batch, down, across, UNIT_TILES, wanted);
        let parts = parts.filling(L::ROWS_PAIR / 3, across, MOST_TILES, wanted.div_ceil(4));
        Cut { sources, targets, unit_panels, column_blocks, chunk, parts }
    }

    /// Parts of the target for the epilogue.
    pub(crate) fn parts(&self) -> usize {
        self.parts.count()
    }

    /// Units of a phase.
    pub(crate) fn units<L: Lanes>(&self, phase: usize) -> usize {
        match phase {
            0 => self.count::<L>() * self.chunks(),
            _ => self.column_blocks * self.parts.count(),
        }
    }

    /// Columns of all panels.
    fn columns<L: Lanes>(&self) -> usize {
        self.count::<L>() * Panels::width::<L>()
    }

    /// Panels of one position.
    fn count<L: Lanes>(&self) -> usize {
        self.targets.div_ceil(Panels::width::<L>())
    }

    /// The right operands of the positions on the chunk of channels that begins with this one: their layout, the first word
    /// of the first, and the words from one to the next.
    fn weights<L: Lanes>(&self, channel: usize) -> (Panels, usize, usize) {
        let k = self.chunk.min(self.sources - channel).div_ceil(L::GROUP);
        let columns = self.columns::<L>();
        let before = columns * channel / L::GROUP + channel / self.chunk * APART;
        (Panels { k, n: self.targets }, POSITIONS * before, columns * k + APART)
    }

    /// Words of all transformed weights.
    pub(crate) fn words<L: Lanes>(&self) -> usize {
        POSITIONS * (self.columns::<L>() * self.sources.div_ceil(L::GROUP) + self.chunks() * APART)
    }

    fn chunks(&self) -> usize {
        self.sources.div_ceil(self.chunk)
    }

    /// A part of the target in rows of tiles, and in rows of pixels.
    fn part(&self, g: &Geometry, index: usize) -> (Part, Part) {
        let tiles = self.parts.part(index);
        let row = |row: usize| (row * TILE).min(g.rows.target);
        let (row_begin, row_end) = (row(tiles.row_begin), row(tiles.row_end));
        (tiles, Part { row_begin, row_end, ..tiles })
    }
}
