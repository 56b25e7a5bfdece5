//! Units of the target: rows of tiles by a block of target channels, in batches of tiles.

use super::grid::Grid;
use super::transform::{Transformed, source_tiles, store, target_tile};
use super::{APART, BATCH_TILES, Cut, POSITIONS, TILE};
use crate::buffer::{Buffer, Slot};
use crate::conv::Convolution;
use crate::direct::finished_rows;
use crate::geometry::Geometry;
use crate::lanes::{Element, Lanes, Real, Simd, Task};
use crate::tile::{Block, Depth, Finish, Panels};
use crate::window::Ahead;
use std::ops::Range;

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
            let grid = Grid::of(g, &tiles);
            let panel_begin = block * cut.unit_panels;
            let panel_end = (panel_begin + cut.unit_panels).min(cut.count::<L>());
            let column = panel_begin * Panels::width::<L>();
            let stride = (panel_end - panel_begin) * Panels::width::<L>();
            let columns = stride.min(g.target_channels - column);
            let finish = c.finish(&part, part_index, column..column + columns);
            let held = if c.epilogue.is_some() { grid.pixels() * stride } else { 0 };
            let mut result = Buffer::take(Slot::Result, held);
            // Equal batches, as far as whole row groups go.
            let batches = grid.tiles().div_ceil(BATCH_TILES);
            let batch = grid.tiles().div_ceil(batches).next_multiple_of(L::ROW_GROUP);
            let pitch = cut.chunk / L::GROUP;
            let (source_apart, target_apart) = (batch * pitch + APART, batch * stride + APART);
            let mut left = Buffer::take(Slot::Left, POSITIONS * source_apart);
            let mut products = Buffer::take(Slot::Products, POSITIONS * target_apart);
            let line = g.columns.source * g.source_channels;
            let mut zeros = Buffer::take(Slot::Zeros, line.div_ceil(L::GROUP));
            let mut ahead = Ahead::NONE;
            // The next unit reads other pixels, unless it begins another block of channels.
            if unit + 1 < self.end && (unit + 1) % parts != 0 {
                let (_, next) = cut.part(g, part_index + 1);
                let panels = Panels { k: 0, n: g.target_channels };
                let steps = panels.tiles::<L>(panel_begin..panel_end, grid.tiles());
                let source = Ahead::source(g, &next, c.source, g.source_channels);
                ahead = source.steps(POSITIONS * cut.chunks() * steps);
            }
            // SAFETY: the part lies in source and target; the buffers were sized for it above.
            unsafe {
                zeros.words().write_bytes(0, line.div_ceil(L::GROUP));
                let unit = Unit {
                    geometry: g,
                    cut: &cut,
                    grid,
                    source: [c.source, zeros.words().cast()],
                    weights: c.scratch,
                    left: Transformed { first: left.words(), pitch, apart: source_apart },
                    products: Transformed {
                        first: products.words(),
                        pitch: stride,
                        apart: target_apart,
                    },
                    panels: [panel_begin, panel_end],
                    finish,
                    result: result.words(),
                };
                unit.compute::<L>(batch, &mut ahead);
            }
        }
    }
}

/// What the batches of one unit share.
struct Unit<'a, E> {
    geometry: &'a Geometry,
    cut: &'a Cut,
    grid: Grid,
    /// The source, and a row of it beyond the border.
    source: [*const E; 2],
    weights: *const u32,
    /// A batch of transformed tiles.
    left: Transformed,
    /// Their products.
    products: Transformed,
    panels: [usize; 2],
    finish: Finish,
    /// All pixels of the unit, where an epilogue takes them.
    result: *mut u32,
}

impl<E: Element> Unit<'_, E> {
    #[inline(always)]
    unsafe fn compute<L: Lanes<Element = E>>(&self, batch: usize, ahead: &mut Ahead) {
        let (g, tiles) = (self.geometry, self.grid.tiles());
        let mut finished = 0;
        // SAFETY: granted by the caller.
        unsafe {
            for first in (0..tiles).step_by(batch) {
                let some = first..(first + batch).min(tiles);
                for channel in (0..g.source_channels).step_by(self.cut.chunk) {
                    let channels = channel..(channel + self.cut.chunk).min(g.source_channels);
                    let mut to = self.left;
                    for (place, count) in self.grid.strips(some.clone()) {
                        let strip = (Some(place), count);
                        let source = self.grid.source(g, self.source, channel, strip);
                        source_tiles::<L, 1>([source], channels.len(), to);
                        to = to.skip(count);
                    }
                    self.multiply::<L>(some.clone(), channel, ahead);
                }
                self.gather::<L>(some.clone());
                if self.finish.epilogue.is_some() {
                    // Rows of tiles that are complete.
                    let done = some.end;
                    let place = self.grid.place(done - done % self.grid.size[1]);
                    let end =
                        if done == tiles { self.grid.pixels() } else { self.grid.pixel(place) };
                    while finished < end {
                        let rows = finished_rows::<L>(self.products.pitch).min(end - finished);
                        let from = self.result.add(finished * self.products.pitch);
                        self.finish.rows(from, self.products.pitch, finished, rows);
                        finished += rows;
                    }
                }
            }
        }
    }

    /// Adds the products of some channels of a batch of tiles.
    #[inline(always)]
    unsafe fn multiply<L: Lanes>(&self, tiles: Range<usize>, channel: usize, ahead: &mut Ahead) {
        let (panels, packed, weights_apart) = self.cut.weights::<L>(channel);
        let count = tiles.len();
        let padded = count.next_multiple_of(L::ROW_GROUP);
        let mut rows = [std::ptr::null(); BATCH_TILES];
        let mut outs = [std::ptr::null_mut(); BATCH_TILES];
        for (tile, row) in rows.iter_mut().enumerate() {
            *row = self.left.skip(tile).first.cast_const();
        }
        let last = channel + self.cut.chunk >= self.geometry.source_channels;
        let [panel_begin, panel_end] = self.panels;
        let first = self.weights.wrapping_add(packed);
        // The weights of a position, and of one after the last one.
        let weights = |position: usize| {
            let first = first.wrapping_add(position * weights_apart);
            let words = panels.offset::<L>(panel_end) - panels.offset::<L>(panel_begin);
            let next = Ahead::of(first.wrapping_add(panels.offset::<L>(panel_begin)), words);
            (first, next.steps(panels.tiles::<L>(panel_begin..panel_end, count)))
        };
        let above = self.grid.pixel(self.grid.place(tiles.start));
        for position in 0..POSITIONS {
            let to = self.products.first.wrapping_add(position * self.products.apart);
            for (tile, out) in outs.iter_mut().enumerate() {
                *out = to.wrapping_add(tile * self.products.pitch);
            }
            let block = Block {
                rows: &rows[..padded],
                outs: &outs[..padded],
                count,
                packed: weights(position).0,
                panels,
                panel_begin,
                panel_end,
                exact: false,
                scales: None,
                finish: None,
            };
            let segments = [(position * self.left.apart) as isize];
            let (length, resume) = (panels.k, channel > 0);
            let depth = Depth { segments: &segments, length, step: 1, begin: 0, resume, last };
            let mut both = [weights(position + 1).1, *ahead];
            // SAFETY: granted by the caller.
            unsafe {
                if last {
                    // About the pixels that these tiles become.
                    let at = |position: usize| position * count * TILE * TILE / POSITIONS;
                    let (from, some) = (above + at(position), at(position + 1) - at(position));
                    let some = some.min(self.grid.pixels().saturating_sub(from));
                    self.fetch::<L::Tier>(from, some);
                }
                for row in (0..count).step_by(L::ROW_GROUP) {
                    block.sweep::<L>(row, &depth, &mut both);
                }
            }
            *ahead = both[1];
        }
    }

    /// Asks for what some pixels of the unit will be written to, or what the epilogue touches with them.
    #[inline(always)]
    unsafe fn fetch<S: Simd>(&self, first: usize, pixels: usize) {
        let finish = &self.finish;
        // SAFETY: granted by the caller.
        unsafe { finish.fetch::<S>(first, pixels, 0, finish.columns) };
        if finish.epilogue.is_none() {
            for row in first..first + pixels {
                let row = finish.result.wrapping_add(row * finish.result_stride);
                for column in (0..finish.columns).step_by(16) {
                    S::prefetch(row.wrapping_add(column).cast());
                }
            }
        }
    }

    /// Makes pixels of the products of a batch of tiles.
    #[inline(always)]
    unsafe fn gather<L: Lanes>(&self, tiles: Range<usize>) {
        let [height, width] = self.grid.area;
        let columns = self.finish.columns;
        let (out, step) = match self.finish.epilogue {
            Some(_) => (self.result, self.products.pitch),
            None => (self.finish.result.cast(), self.finish.result_stride),
        };
        let whole = self.finish.epilogue.is_some();
        let mut from = self.products;
        for (place, count) in self.grid.strips(tiles) {
            let to = out.wrapping_add(self.grid.pixel(place) * step);
            let down = TILE.min(height - place.row * TILE);
            let across = (count * TILE).min(width - place.column * TILE);
            for column in (0..columns).step_by(L::LANES) {
                let live = if whole { L::LANES } else { columns - column };
                let (to, line) = (to.wrapping_add(column), width * step);
                for tile in 0..count {
                    let pixel = tile * TILE;
                    let to = to.wrapping_add(pixel * step);
                    // SAFETY: granted by the caller.
                    unsafe {
                        let from = from.skip(tile).first.add(column);
                        let [above, below] = target_tile::<Real<L>>(from, self.products.apart);
                        store::<Real<L>>(to, above[0], live);
                        if pixel + 1 < across {
                            store::<Real<L>>(to.add(step), above[1], live);
                        }
                        if down > 1 {
                            store::<Real<L>>(to.add(line), below[0], live);
                            if pixel + 1 < across {
                                store::<Real<L>>(to.add(line + step), below[1], live);
                            }
                        }
                    }
                }
            }
            from = from.skip(count);
        }
    }
}
