//! Gradient of the weights, F(3x3, 2x2): `G^T [sum over tiles of (A dy A^T) . (B^T d B)] G`, the adjoint of the forward
//! direction. Each position is a matrix product `[channels x tiles] x [tiles x targets]`, whose sums over the images of a
//! unit stay in a buffer of its thread.

use super::grid::{Grid, Place};
use super::transform::{Transformed, gradient_tiles, kernel_gradient, source_tiles};
use super::{APART, BATCH_TILES, GRADIENT_CHANNELS, POSITIONS, TILE};
use crate::args::Conv2dGradWeightArgs;
use crate::buffer::{Buffer, Slot};
use crate::geometry::{Geometry, Part};
use crate::grad_weight::Cut;
use crate::lanes::{Lanes, Real};
use crate::tile::{Block, Depth, EVERY_GROUP, Panels};
use crate::window::Ahead;
use std::ops::Range;

/// Rows of sums, filled up to whole row groups.
const ROWS: usize = GRADIENT_CHANNELS.next_multiple_of(EVERY_GROUP);

/// The partial gradient by some channels and panels of targets, over some images.
pub(crate) struct Gradient<'a, L: Lanes> {
    pub(crate) args: &'a Conv2dGradWeightArgs<L::Element>,
    pub(crate) cut: &'a Cut,
    pub(crate) channels: Range<usize>,
    pub(crate) panels: Range<usize>,
}

impl<L: Lanes> Gradient<'_, L> {
    /// Computes the partial gradient of a chunk of images.
    ///
    /// # Safety
    /// The arguments are valid for their shape; the CPU supports the tier.
    #[inline(always)]
    pub(crate) unsafe fn compute(&self, chunk: usize) {
        let (cut, g) = (self.cut, &self.cut.g);
        let images = cut.images(chunk);
        let grid = Grid::of(
            g,
            &Part {
                image: images.start,
                images: images.len(),
                row_begin: 0,
                row_end: g.rows.target.div_ceil(TILE),
            },
        );
        let width = Panels::width::<L>();
        let column = self.panels.start * width;
        let stride = self.panels.len() * width;
        let columns = stride.min(g.target_channels - column);
        let channels = self.channels.len();
        let pitch = channels.next_multiple_of(L::LANES);
        // Equal batches.
        let tiles = grid.tiles();
        let batch = tiles.div_ceil(tiles.div_ceil(BATCH_TILES * L::GROUP).max(1)).max(1);
        let words = batch.div_ceil(L::GROUP);
        let apart = [words * pitch + APART, words * stride + APART, channels * stride + APART];
        let mut left = Buffer::take(Slot::Left, POSITIONS * apart[0]);
        let mut right = Buffer::take(Slot::Right, POSITIONS * apart[1]);
        let mut sums = Buffer::take(Slot::Products, POSITIONS * apart[2]);
        let mut sink = Buffer::take(Slot::Staging, stride);
        let line = (g.columns.source * g.source_channels).max(g.columns.target * g.target_channels);
        let mut zeros = Buffer::take(Slot::Zeros, line.div_ceil(L::GROUP));
        // SAFETY: the buffers were sized for it above; the rest is granted by the caller.
        unsafe {
            zeros.words().write_bytes(0, line.div_ceil(L::GROUP));
            let zeros: *const L::Element = zeros.words().cast();
            if tiles == 0 {
                sums.words().write_bytes(0, POSITIONS * apart[2]);
            }
            let left = Transformed { first: left.words(), pitch, apart: apart[0] };
            let mut rows = [std::ptr::null(); ROWS];
            let mut outs = [sink.words(); ROWS];
            for (channel, row) in rows.iter_mut().enumerate() {
                *row = left.first.wrapping_add(channel.min(channels - 1)).cast_const();
            }
            let padded = channels.next_multiple_of(L::ROW_GROUP);
            for first in (0..tiles).step_by(batch) {
                let some = first..(first + batch).min(tiles);
                let panels = Panels { k: some.len().div_ceil(L::GROUP), n: columns };
                let to = [left, Transformed { first: right.words(), pitch: 0, apart: apart[1] }];
                if L::GROUP == 1 {
                    self.transform::<1>(&grid, zeros, some.clone(), to, panels);
                } else {
                    self.transform::<2>(&grid, zeros, some.clone(), to, panels);
                }
                let mut ahead = self.ahead_of_batch(&grid, chunk, some.end, batch);
                let steps = panels.tiles::<L>(0..self.panels.len(), channels);
                Ahead::spread(&mut ahead, POSITIONS * steps);
                for position in 0..POSITIONS {
                    let to = sums.words().wrapping_add(position * apart[2]);
                    for (channel, out) in outs[..channels].iter_mut().enumerate() {
                        *out = to.wrapping_add(channel * stride);
                    }
                    let block = Block {
                        rows: &rows[..padded],
                        outs: &outs[..padded],
                        count: channels,
                        packed: right.words().wrapping_add(position * apart[1]),
                        panels,
                        panel_begin: 0,
                        panel_end: self.panels.len(),
                        exact: false,
                        scales: None,
                        finish: None,
                    };
                    let depth = Depth {
                        segments: &[(position * left.apart) as isize],
                        length: panels.k,
                        step: pitch as isize,
                        begin: 0,
                        resume: first > 0,
                        last: true,
                    };
                    for row in (0..channels).step_by(L::ROW_GROUP) {
                        block.sweep::<L>(row, &depth, &mut ahead);
                    }
                }
            }
            let partial: *mut u32 = self.args.scratch.cast();
            for (channel, row) in self.channels.clone().zip(0..) {
                let to = partial.add(cut.partial(chunk, 0, channel) + column);
                let from = sums.words().add(row * stride);
                let position = g.source_channels * cut.stride;
                for column in (0..columns).step_by(L::LANES) {
                    let (from, to) = (from.add(column), to.add(column));
                    kernel_gradient::<Real<L>>(from, apart[2], to, position);
                }
            }
        }
    }

    /// Transforms a range of tiles, of which a word holds one or two: the channels of the source, and the panels of targets.
    ///
    /// # Safety
    /// There is room for the tiles, and `zeros` are a row of either; the rest as for [`Gradient::compute`].
    #[inline(always)]
    unsafe fn transform<const N: usize>(
        &self,
        grid: &Grid,
        zeros: *const L::Element,
        tiles: Range<usize>,
        [mut left, right]: [Transformed; 2],
        panels: Panels,
    ) {
        let g = &self.cut.g;
        // SAFETY: granted by the caller.
        unsafe {
            let strips = |(places, count): ([Option<Place>; N], usize)| {
                let from = [self.args.x, zeros];
                let channel = self.channels.start;
                places.map(|place| grid.source(g, from, channel, (place, count)))
            };
            let mut runs = grid.strips_together::<N>(tiles.clone()).map(strips).peekable();
            while let Some(strips) = runs.next() {
                let some = self.channels.len() < g.source_channels;
                for next in runs.peek().filter(|_| some).into_iter().flatten() {
                    next.fetch::<L::Tier>(self.channels.len());
                }
                source_tiles::<L, N>(strips, self.channels.len(), left);
                left = left.skip(strips[0].count);
            }
            for panel in 0..panels.count::<L>() {
                let channel = (self.panels.start + panel) * Panels::width::<L>();
                let first = right.first.wrapping_add(panels.offset::<L>(panel));
                let mut to = Transformed { first, pitch: panels.stored::<L>(panel), ..right };
                let strips = |(places, count): ([Option<Place>; N], usize)| {
                    let from = [self.args.dy, zeros];
                    places.map(|place| grid.target(g, from, channel, (place, count)))
                };
                let mut runs = grid.strips_together::<N>(tiles.clone()).map(strips).peekable();
                while let Some(strips) = runs.next() {
                    let some = panels.n < g.target_channels;
                    for next in runs.peek().filter(|_| some).into_iter().flatten() {
                        next.fetch::<L::Tier>(panels.valid::<L>(panel));
                    }
                    gradient_tiles::<L, N>(strips, panels.valid::<L>(panel), to);
                    to = to.skip(strips[0].count);
                }
            }
        }
    }

    /// What so many tiles from the first in a row of tiles on read for the first time, about; nothing where only some channels
    /// of each pixel are wanted.
    fn ahead(&self, image: usize, row: usize, tiles: usize) -> [Ahead; 2] {
        let g = &self.cut.g;
        if self.channels.len() < g.source_channels {
            return [Ahead::NONE; 2];
        }
        let pixels = tiles * TILE * TILE;
        let ahead = |first: *const L::Element, height: usize, width: usize, total: usize| {
            let row = (image * height + row * TILE) * width;
            Ahead::of(first.wrapping_add(row * total), pixels * total)
        };
        let Geometry { rows, columns, .. } = g;
        [
            ahead(self.args.x, rows.source, columns.source, g.source_channels),
            ahead(self.args.dy, rows.target, columns.target, g.target_channels),
        ]
    }

    /// The same of the batch of tiles from this one on, which may be the first of the next chunk.
    fn ahead_of_batch(&self, grid: &Grid, chunk: usize, tile: usize, batch: usize) -> [Ahead; 2] {
        let tiles = grid.tiles();
        if tile < tiles {
            let place = grid.place(tile);
            return self.ahead(grid.image + place.image, place.row, batch.min(tiles - tile));
        }
        let all_targets = self.panels.len() * Panels::width::<L>() >= self.cut.g.target_channels;
        let next = self.cut.images(chunk + 1);
        if next.is_empty() || !all_targets {
            return [Ahead::NONE; 2];
        }
        self.ahead(next.start, 0, batch)
    }
}
