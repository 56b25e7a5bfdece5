//! Transformed weights: 16 right operands in panels.

use super::Cut;
use super::transform::kernel_tiles;
use crate::buffer::{Buffer, Slot};
use crate::conv::Convolution;
use crate::lanes::{Lanes, Simd, Task};
use crate::pack::{self, Right, Source};
use crate::tile::Panels;

/// Transforms weights, a panel of some source channels in each unit.
pub(crate) struct Pack<L: Lanes> {
    pub(crate) convolution: Convolution<L::Element>,
    pub(crate) begin: usize,
    pub(crate) end: usize,
}

impl<L: Lanes> Task for Pack<L> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let c = &self.convolution;
        let g = &c.geometry;
        let cut = Cut::of::<L>(g);
        let count = cut.count::<L>();
        let mut positions = [[0; 3]; 3];
        for (row, down) in positions.iter_mut().zip(g.rows.taps(0)) {
            for (position, across) in row.iter_mut().zip(g.columns.taps(0)) {
                *position = down.kernel * g.kernel_width + across.kernel;
            }
        }
        for unit in self.begin..self.end {
            let (panel, begin) = (unit % count, unit / count * cut.chunk);
            let (panels, first, apart) = cut.weights::<L>(begin);
            let channels = cut.chunk.min(g.source_channels - begin);
            let (stored, valid) = (panels.stored::<L>(panel), panels.valid::<L>(panel));
            let column = panel * Panels::width::<L>();
            // The last word of channels is filled up with zeros.
            let filled = panels.k * L::GROUP;
            let mut staging = Buffer::take(Slot::Right, filled * g.kernel * stored);
            // SAFETY: the panel lies in the scratch, its weights in the weights.
            unsafe {
                // `[channel][kernel position][target]`. A channel's positions are adjacent, and forward all channels.
                let (runs, length, column_stride) = if g.backward {
                    (channels, g.kernel, g.kernel)
                } else {
                    (1, channels * g.kernel, g.source_channels * g.kernel)
                };
                for run in 0..runs {
                    let at = if g.backward {
                        (begin + run) * g.target_channels + column
                    } else {
                        column * g.source_channels + begin
                    };
                    let first = c.weights.add(at * g.kernel);
                    let from = Source { first, k_stride: 1, column_stride, flip: 0 };
                    let to = staging.words().add(run * g.kernel * stored);
                    pack::interleave::<L::Single, Right>(from, length, valid, to, stored);
                }
                let words = channels * g.kernel * stored;
                let beyond = (filled - channels) * g.kernel * stored;
                staging.words().add(words).write_bytes(0, beyond);
                let to = c.scratch.add(first + panels.offset::<L>(panel));
                for word in 0..panels.k {
                    for column in (0..stored).step_by(L::LANES) {
                        let from = staging.words().add(word * L::GROUP * g.kernel * stored);
                        let weight = |channel: usize, r: usize, c: usize| {
                            let row = channel * g.kernel + positions[r][c];
                            from.wrapping_add(row * stored + column).cast_const()
                        };
                        let to = to.add(word * stored + column);
                        if L::GROUP == 1 {
                            kernel_tiles::<L, 1>(weight, to, apart);
                        } else {
                            kernel_tiles::<L, 2>(weight, to, apart);
                        }
                    }
                }
            }
        }
    }
}
