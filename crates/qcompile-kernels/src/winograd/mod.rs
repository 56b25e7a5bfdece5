//! Convolution by 3 x 3 kernels with fewer multiplications, of f32: Lavin and Gray, "Fast Algorithms for Convolutional
//! Neural Networks", 2016, F(2x2, 3x3).
//!
//! A tile of 2 x 2 targets reads 4 x 4 source pixels `d`. With the kernel `g` it is `A^T [(G g G^T) . (B^T d B)] A`
//! (equations 8 and 10 there), where `.` multiplies elements: 16 products for each pair of channels in place of 36. Summed
//! over channels, each of the 16 positions is a matrix product of its own, `[tiles x channels] x [channels x targets]`.
//! Weights are transformed once for each call, tiles in buffers of one thread.

mod compute;
mod transform;
mod weights;

pub(crate) use compute::Compute;
pub(crate) use weights::Pack;

use crate::geometry::{Geometry, Part, Parts};
use crate::lanes::{Element, Lanes};
use crate::tile::Panels;

/// Rows and columns of the targets of a tile.
pub(crate) const TILE: usize = 2;
/// Positions of a transformed tile, and so products.
pub(crate) const POSITIONS: usize = 16;
/// Fewest channels of source and target: with fewer, transforms take longer than the products that they save.
const FEWEST_CHANNELS: [usize; 2] = [8, 16];
/// Fewest tiles for which weights are transformed.
const FEWEST_TILES: usize = 16;
/// Tiles of a unit, about.
const UNIT_TILES: usize = 96;
/// Most tiles of a unit whose size suits the register tiles.
const MOST_TILES: usize = 200;
/// Units wanted, for the threads to share.
const WANTED_UNITS: usize = 32;
/// Tiles whose transforms are held at once; a multiple of every row group.
const BATCH_TILES: usize = 48;
/// Most target channels of a unit.
const UNIT_CHANNELS: usize = 128;
/// Most source channels handled at once.
const CHUNK_CHANNELS: usize = 64;
/// Source channels of a unit that transforms weights.
const WEIGHT_CHANNELS: usize = 64;
/// Words between what belongs to two positions, besides it: else all 16 would meet in one set of the cache.
const APART: usize = 16;

/// Whether a convolution of these lanes is faster this way.
pub(crate) fn suits<L: Lanes>(g: &Geometry) -> bool {
    let tiles = g.rows.target.div_ceil(TILE) * g.columns.target.div_ceil(TILE);
    let pixels = g.rows.target * g.columns.target;
    let [source, target] = FEWEST_CHANNELS;
    !L::Element::NARROW
        && g.groups == 1
        && g.rows.is_dense(3)
        && g.columns.is_dense(3)
        && g.source_channels >= source
        && g.target_channels >= target
        && g.batch * tiles >= FEWEST_TILES
        // Tiles that reach over the border compute more than they yield.
        && 20 * tiles <= 9 * pixels
}

/// How a convolution is cut.
pub(crate) struct Cut {
    /// Weights of one position.
    pub(crate) panels: Panels,
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
        let panels = Panels { k: g.source_channels, n: g.target_channels };
        let count = panels.count::<L>();
        let blocks = count.div_ceil((UNIT_CHANNELS / Panels::width::<L>()).max(1)).max(1);
        let unit_panels = count.div_ceil(blocks).max(1);
        let column_blocks = count.div_ceil(unit_panels);
        let chunks = g.source_channels.div_ceil(CHUNK_CHANNELS).max(1);
        let chunk = g.source_channels.div_ceil(chunks).next_multiple_of(L::LANES);
        let wanted = WANTED_UNITS.div_ceil(column_blocks.max(1));
        let parts = Parts::new(g.batch, down, across, UNIT_TILES, wanted);
        let parts = parts.filling(L::ROWS_PAIR / 3, across, MOST_TILES, wanted.div_ceil(4));
        Cut { panels, unit_panels, column_blocks, chunk, parts }
    }

    /// Parts of the target for the epilogue.
    pub(crate) fn parts(&self) -> usize {
        self.parts.count()
    }

    /// Units of a phase.
    pub(crate) fn units<L: Lanes>(&self, phase: usize) -> usize {
        match phase {
            0 => self.panels.count::<L>() * self.panels.k.div_ceil(WEIGHT_CHANNELS),
            _ => self.column_blocks * self.parts.count(),
        }
    }

    /// Words from the transformed weights of one position to those of the next.
    fn weights_apart<L: Lanes>(&self) -> usize {
        self.panels.words::<L>() + APART
    }

    /// Words of all transformed weights.
    pub(crate) fn weights<L: Lanes>(&self) -> usize {
        POSITIONS * self.weights_apart::<L>()
    }

    /// A part of the target in rows of tiles, and in rows of pixels.
    fn part(&self, g: &Geometry, index: usize) -> (Part, Part) {
        let tiles = self.parts.part(index);
        let row = |row: usize| (row * TILE).min(g.rows.target);
        let (row_begin, row_end) = (row(tiles.row_begin), row(tiles.row_end));
        (tiles, Part { row_begin, row_end, ..tiles })
    }
}
