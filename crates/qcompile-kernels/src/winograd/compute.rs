//! Units of the target: rows of tiles by a block of target channels, in batches of tiles.

use super::transform::{Border, Inside, source_tile, store_some, target_tile};
use super::{APART, BATCH_TILES, Cut, POSITIONS, TILE};
use crate::buffer::{Buffer, Slot};
use crate::conv::Convolution;
use crate::direct::finished_rows;
use crate::geometry::{Geometry, Part};
use crate::lanes::{Lanes, Simd, Task};
use crate::tile::{Block, Depth, Finish, Panels};
use crate::window::Ahead;

/// Computes units of the target.
pub(crate) struct Compute<L: Lanes> {
    pub(crate) convolution: Convolution<L::Element>,
    pub(crate) begin: usize,
    pub(crate) end: usize,
}

impl<L: Lanes> Task for Compute<L> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let c = &self.convolution;
        let g = &c.geometry;
        let cut = Cut::of::<L>(g);
        let parts = cut.parts();
        for unit in self.begin..self.end {
            let (part_index, block) = (unit % parts, unit / parts);
            let (tiles, part) = cut.part(g, part_index);
            let grid = Grid::of(g, &tiles, &part);
            let panel_begin = block * cut.unit_panels;
            let panel_end = (panel_begin + cut.unit_panels).min(cut.panels.count::<L>());
            let column = panel_begin * Panels::width::<L>();
            let stride = (panel_end - panel_begin) * Panels::width::<L>();
            let columns = stride.min(g.target_channels - column);
            let finish = c.finish(&part, part_index, column..column + columns);
            let held = if c.epilogue.is_some() { grid.pixels() * stride } else { 0 };
            let mut result = Buffer::take(Slot::Result, held);
            let batch = BATCH_TILES.min(grid.tiles().next_multiple_of(L::ROW_GROUP));
            let (source_apart, target_apart) = (batch * cut.chunk + APART, batch * stride + APART);
            let mut left = Buffer::take(Slot::Left, POSITIONS * source_apart);
            let mut products = Buffer::take(Slot::Products, POSITIONS * target_apart);
            let mut zeros = Buffer::take(Slot::Zeros, g.source_channels);
            let mut ahead = Ahead::NONE;
            // The next unit reads other pixels, unless it begins another block of channels.
            if unit + 1 < self.end && (unit + 1) % parts != 0 {
                let (_, next) = cut.part(g, part_index + 1);
                let products = POSITIONS * g.source_channels.div_ceil(cut.chunk);
                let steps = cut.panels.tiles::<L>(panel_begin..panel_end, grid.tiles());
                let source = Ahead::source(g, &next, c.source, g.source_channels);
                ahead = source.steps(products * steps);
            }
            // SAFETY: the part lies in source and target; the buffers were sized for it above.
            unsafe {
                zeros.words().write_bytes(0, g.source_channels);
                let unit = Unit {
                    geometry: g,
                    cut: &cut,
                    grid,
                    // Elements that are not narrower than a word are f32.
                    source: c.source.cast(),
                    zeros: zeros.words().cast(),
                    weights: c.scratch,
                    left: left.words(),
                    source_apart,
                    products: products.words(),
                    target_apart,
                    stride,
                    panels: [panel_begin, panel_end],
                    finish,
                    result: result.words(),
                };
                unit.compute::<L>(batch, &mut ahead);
            }
        }
    }
}

/// The tiles of a unit, row by row and image by image.
struct Grid {
    /// First image.
    image: usize,
    images: usize,
    /// First row of tiles in each image.
    first: usize,
    /// Rows of tiles in each image, and tiles in a row.
    size: [usize; 2],
    /// Rows of pixels in each image, and pixels in a row.
    area: [usize; 2],
}

/// One tile: its image in the unit, its row in that, and its place in the row.
#[derive(Clone, Copy)]
struct Place {
    image: usize,
    row: usize,
    column: usize,
}

impl Grid {
    fn of(g: &Geometry, tiles: &Part, part: &Part) -> Grid {
        let width = g.columns.target;
        Grid {
            image: part.image,
            images: part.images,
            first: tiles.row_begin,
            size: [tiles.row_end - tiles.row_begin, width.div_ceil(TILE)],
            area: [part.row_end - part.row_begin, width],
        }
    }

    fn tiles(&self) -> usize {
        self.images * self.size[0] * self.size[1]
    }

    fn pixels(&self) -> usize {
        self.images * self.area[0] * self.area[1]
    }

    fn place(&self, tile: usize) -> Place {
        let [rows, across] = self.size;
        let row = tile / across;
        Place { image: row / rows, row: row % rows, column: tile % across }
    }

    fn next(&self, place: &mut Place) {
        place.column += 1;
        if place.column == self.size[1] {
            (place.column, place.row) = (0, place.row + 1);
            if place.row == self.size[0] {
                (place.row, place.image) = (0, place.image + 1);
            }
        }
    }

    /// The first pixel of a tile.
    fn pixel(&self, place: Place) -> usize {
        let [height, width] = self.area;
        (place.image * height + place.row * TILE) * width + place.column * TILE
    }
}

/// What the batches of one unit share.
struct Unit<'a> {
    geometry: &'a Geometry,
    cut: &'a Cut,
    grid: Grid,
    source: *const f32,
    /// As many as a pixel has channels.
    zeros: *const f32,
    weights: *const u32,
    /// Transformed tiles, `[position][tile][channel]`.
    left: *mut u32,
    source_apart: usize,
    /// Their products, `[position][tile][target channel]`.
    products: *mut u32,
    target_apart: usize,
    /// Words of one row of products.
    stride: usize,
    panels: [usize; 2],
    finish: Finish,
    /// All pixels of the unit, where an epilogue takes them.
    result: *mut u32,
}

impl Unit<'_> {
    #[inline(always)]
    unsafe fn compute<L: Lanes>(&self, batch: usize, ahead: &mut Ahead) {
        let (g, tiles) = (self.geometry, self.grid.tiles());
        let mut finished = 0;
        // SAFETY: granted by the caller.
        unsafe {
            for first in (0..tiles).step_by(batch) {
                let count = batch.min(tiles - first);
                for channel in (0..g.source_channels).step_by(self.cut.chunk) {
                    self.transform::<L>(first, count, channel);
                    self.multiply::<L>(first, count, channel, ahead);
                }
                self.gather::<L>(first, count);
                if self.finish.epilogue.is_some() {
                    // Rows of tiles that are complete.
                    let done = first + count;
                    let place = self.grid.place(done - done % self.grid.size[1]);
                    let end =
                        if done == tiles { self.grid.pixels() } else { self.grid.pixel(place) };
                    while finished < end {
                        let rows = finished_rows::<L>(self.stride).min(end - finished);
                        let from = self.result.add(finished * self.stride);
                        self.finish.rows(from, self.stride, finished, rows);
                        finished += rows;
                    }
                }
            }
        }
    }

    /// Transforms some channels of a batch of tiles.
    #[inline(always)]
    unsafe fn transform<L: Lanes>(&self, first: usize, count: usize, channel: usize) {
        let g = self.geometry;
        let (height, width) = (g.rows.source, g.columns.source);
        let chunk = self.cut.chunk.min(g.source_channels - channel);
        let (down, across) = (g.rows.origin(0), g.columns.origin(0));
        let mut place = self.grid.place(first);
        for tile in 0..count {
            let row = ((self.grid.first + place.row) * TILE) as isize + down;
            let column = (place.column * TILE) as isize + across;
            let image = self.source.wrapping_add(
                (self.grid.image + place.image) * height * width * g.source_channels + channel,
            );
            let pitch = [width * g.source_channels, g.source_channels];
            let at = |row: isize, column: isize| {
                image
                    .wrapping_offset(row * pitch[0] as isize)
                    .wrapping_offset(column * pitch[1] as isize)
            };
            // SAFETY: granted by the caller.
            unsafe {
                let to = self.left.add(tile * self.cut.chunk);
                if row >= 0
                    && column >= 0
                    && row + 4 <= height as isize
                    && column + 4 <= width as isize
                {
                    let inside = Inside { first: at(row, column), pitch };
                    source_tile::<L>(&inside, chunk, to, self.source_apart);
                } else {
                    let mut pixels = [[self.zeros; 4]; 4];
                    for (r, pixels) in (row..).zip(&mut pixels) {
                        for (c, pixel) in (column..).zip(pixels) {
                            if (0..height as isize).contains(&r)
                                && (0..width as isize).contains(&c)
                            {
                                *pixel = at(r, c);
                            }
                        }
                    }
                    source_tile::<L>(&Border(pixels), chunk, to, self.source_apart);
                }
            }
            self.grid.next(&mut place);
        }
    }

    /// Adds the products of some channels of a batch of tiles.
    #[inline(always)]
    unsafe fn multiply<L: Lanes>(
        &self,
        first: usize,
        count: usize,
        channel: usize,
        ahead: &mut Ahead,
    ) {
        let channels = self.geometry.source_channels;
        let length = self.cut.chunk.min(channels - channel);
        let padded = count.next_multiple_of(L::ROW_GROUP);
        let mut rows = [std::ptr::null(); BATCH_TILES];
        let mut outs = [std::ptr::null_mut(); BATCH_TILES];
        for (tile, row) in rows.iter_mut().enumerate() {
            *row = self.left.wrapping_add(tile * self.cut.chunk).cast_const();
        }
        let last = channel + length == channels;
        let pixels = (self.grid.pixel(self.grid.place(first)), count * TILE * TILE);
        for position in 0..POSITIONS {
            let to = self.products.wrapping_add(position * self.target_apart);
            for (tile, out) in outs.iter_mut().enumerate() {
                *out = to.wrapping_add(tile * self.stride);
            }
            let block = Block {
                rows: &rows[..padded],
                outs: &outs[..padded],
                count,
                packed: self.weights.wrapping_add(position * self.cut.weights_apart::<L>()),
                panels: self.cut.panels,
                panel_begin: self.panels[0],
                panel_end: self.panels[1],
                exact: false,
                scales: None,
                finish: None,
            };
            let segments = [(position * self.source_apart) as isize];
            let depth = Depth {
                segments: &segments,
                length,
                step: 1,
                begin: channel,
                resume: channel > 0,
                last,
            };
            // SAFETY: granted by the caller.
            unsafe {
                if last {
                    // About the pixels that these tiles become.
                    let at = |position: usize| position * pixels.1 / POSITIONS;
                    let some = at(position + 1) - at(position);
                    let above = pixels.0 + at(position);
                    let some = some.min(self.grid.pixels().saturating_sub(above));
                    self.finish.fetch::<L::Tier>(above, some, 0, self.finish.columns);
                }
                for row in (0..count).step_by(L::ROW_GROUP) {
                    block.sweep::<L>(row, &depth, std::slice::from_mut(ahead));
                }
            }
        }
    }

    /// Makes pixels of the products of a batch of tiles.
    #[inline(always)]
    unsafe fn gather<L: Lanes>(&self, first: usize, count: usize) {
        let [height, width] = self.grid.area;
        let columns = self.finish.columns;
        let (out, step) = match self.finish.epilogue {
            Some(_) => (self.result, self.stride),
            None => (self.finish.result.cast(), self.finish.result_stride),
        };
        let mut place = self.grid.place(first);
        for tile in 0..count {
            let down = TILE.min(height - place.row * TILE);
            let across = TILE.min(width - place.column * TILE);
            let to = out.wrapping_add(self.grid.pixel(place) * step);
            // SAFETY: granted by the caller.
            unsafe {
                let from = self.products.add(tile * self.stride);
                for column in (0..columns).step_by(L::LANES) {
                    let pixels = target_tile::<L>(from.add(column), self.target_apart);
                    let live = columns - column;
                    for (r, row) in pixels.iter().enumerate().take(down) {
                        for (c, &pixel) in row.iter().enumerate().take(across) {
                            let to = to.add((r * width + c) * step + column);
                            if live >= L::LANES || self.finish.epilogue.is_some() {
                                L::store(to, pixel);
                            } else {
                                store_some::<L>(to, pixel, live);
                            }
                        }
                    }
                }
            }
            self.grid.next(&mut place);
        }
    }
}
