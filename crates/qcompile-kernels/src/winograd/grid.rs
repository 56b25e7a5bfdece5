//! The tiles of some rows of some images.

use super::TILE;
use super::transform::{Strip, Transformed, source_tiles};
use crate::geometry::{Geometry, Part};
use crate::lanes::Lanes;
use std::ops::Range;

/// Tiles, row by row and image by image.
pub(super) struct Grid {
    /// First image.
    pub(super) image: usize,
    pub(super) images: usize,
    /// First row of tiles in each image.
    pub(super) first: usize,
    /// Rows of tiles in each image, and tiles in a row.
    pub(super) size: [usize; 2],
    /// Rows of pixels in each image, and pixels in a row.
    pub(super) area: [usize; 2],
}

/// One tile: its image in the grid, its row in that, and its place in the row.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) image: usize,
    pub(super) row: usize,
    pub(super) column: usize,
}

impl Grid {
    /// The grid of a part of the target in rows of tiles.
    pub(super) fn of(g: &Geometry, tiles: &Part) -> Grid {
        let width = g.columns.target;
        let rows = (tiles.row_end * TILE).min(g.rows.target) - tiles.row_begin * TILE;
        Grid {
            image: tiles.image,
            images: tiles.images,
            first: tiles.row_begin,
            size: [tiles.row_end - tiles.row_begin, width.div_ceil(TILE)],
            area: [rows, width],
        }
    }

    pub(super) fn tiles(&self) -> usize {
        self.images * self.size[0] * self.size[1]
    }

    pub(super) fn pixels(&self) -> usize {
        self.images * self.area[0] * self.area[1]
    }

    pub(super) fn place(&self, tile: usize) -> Place {
        let [rows, across] = self.size;
        let row = tile / across;
        Place { image: row / rows, row: row % rows, column: tile % across }
    }

    /// The rows of tiles in a range of tiles: where each begins, and its tiles.
    pub(super) fn strips(&self, tiles: Range<usize>) -> impl Iterator<Item = (Place, usize)> {
        let mut tile = tiles.start;
        std::iter::from_fn(move || {
            let place = self.place(tile);
            let count = (self.size[1] - place.column).min(tiles.end - tile);
            tile += count;
            (count > 0).then_some((place, count))
        })
    }

    /// The first pixel of a tile.
    pub(super) fn pixel(&self, place: Place) -> usize {
        let [height, width] = self.area;
        (place.image * height + place.row * TILE) * width + place.column * TILE
    }

    /// Transforms some channels of the source of a range of tiles; `zeros` are a row of it.
    ///
    /// # Safety
    /// `source` is the whole source, `to` has room for the tiles; the CPU supports the tier.
    #[inline(always)]
    pub(super) unsafe fn transform<L: Lanes>(
        &self,
        g: &Geometry,
        [source, zeros]: [*const f32; 2],
        tiles: Range<usize>,
        channels: Range<usize>,
        mut to: Transformed,
    ) {
        let (height, pitch) = (g.rows.source, g.source_channels);
        let line = g.columns.source * pitch;
        for (place, count) in self.strips(tiles) {
            let image = (self.image + place.image) * height;
            let first = ((self.first + place.row) * TILE) as isize + g.rows.origin(0);
            let mut rows = [zeros; 4];
            for (row, to) in (first..).zip(&mut rows) {
                if (0..height as isize).contains(&row) {
                    let from = (image + row.cast_unsigned()) * line + channels.start;
                    *to = source.wrapping_add(from);
                }
            }
            let column = (place.column * TILE) as isize + g.columns.origin(0);
            let strip = Strip { rows, pitch, width: g.columns.source, column, count };
            // SAFETY: granted by the caller.
            unsafe { source_tiles::<L>(strip, channels.len(), to) };
            to = to.skip(count);
        }
    }
}
