//! The tiles of some rows of some images.

use super::TILE;
use super::transform::Strip;
use crate::geometry::{Geometry, Part};
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
        self.strips_together(tiles).filter_map(|([place], count)| Some((place?, count)))
    }

    /// The same for as many equal parts of a range of tiles, walked together; where tiles run out there is no place.
    pub(super) fn strips_together<const N: usize>(
        &self,
        tiles: Range<usize>,
    ) -> impl Iterator<Item = ([Option<Place>; N], usize)> {
        let part = tiles.len().div_ceil(N);
        let mut done = 0;
        std::iter::from_fn(move || {
            let (mut places, mut count) = ([None; N], part - done);
            for (n, to) in places.iter_mut().enumerate() {
                let tile = tiles.start + n * part + done;
                if tile < tiles.end {
                    let place = self.place(tile);
                    count = count.min(self.size[1] - place.column).min(tiles.end - tile);
                    *to = Some(place);
                }
            }
            done += count;
            (count > 0).then_some((places, count))
        })
    }

    /// The first pixel of a tile.
    pub(super) fn pixel(&self, place: Place) -> usize {
        let [height, width] = self.area;
        (place.image * height + place.row * TILE) * width + place.column * TILE
    }

    /// The source of some tiles of a row, from a channel on; `zeros` are a row of it.
    pub(super) fn source<E>(
        &self,
        g: &Geometry,
        [source, zeros]: [*const E; 2],
        channel: usize,
        (place, count): (Option<Place>, usize),
    ) -> Strip<E, 4> {
        let (height, pitch) = (g.rows.source, g.source_channels);
        let mut strip = Strip { rows: [zeros; 4], pitch, width: 0, column: 0, count };
        let Some(place) = place else { return strip };
        let line = g.columns.source * pitch;
        let image = (self.image + place.image) * height;
        let first = ((self.first + place.row) * TILE) as isize + g.rows.origin(0);
        for (row, to) in (first..).zip(&mut strip.rows) {
            if (0..height as isize).contains(&row) {
                *to = source.wrapping_add((image + row.cast_unsigned()) * line + channel);
            }
        }
        let column = (place.column * TILE) as isize + g.columns.origin(0);
        Strip { width: g.columns.source, column, ..strip }
    }

    /// The gradient of the targets of some tiles of a row, from a channel on; the grid holds whole images.
    pub(super) fn target<E>(
        &self,
        g: &Geometry,
        [dy, zeros]: [*const E; 2],
        channel: usize,
        (place, count): (Option<Place>, usize),
    ) -> Strip<E, TILE> {
        let ([height, width], pitch) = (self.area, g.target_channels);
        let mut strip = Strip { rows: [zeros; TILE], pitch, width: 0, column: 0, count };
        let Some(place) = place else { return strip };
        let image = (self.image + place.image) * height;
        for (row, to) in (place.row * TILE..height).zip(&mut strip.rows) {
            *to = dy.wrapping_add((image + row) * width * pitch + channel);
        }
        Strip { width, column: (place.column * TILE) as isize, ..strip }
    }
}
