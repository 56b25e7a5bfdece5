//! Transformed weights: 16 right operands in panels.

use super::{Cut, transform};
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
            let channels = panels.k;
            let (stored, valid) = (panels.stored::<L>(panel), panels.valid::<L>(panel));
            let column = panel * Panels::width::<L>();
            let mut staging = Buffer::take(Slot::Right, channels * g.kernel * stored);
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
                    pack::interleave::<L, Right>(from, length, valid, to, stored);
                }
                let to = c.scratch.add(first + panels.offset::<L>(panel));
                for channel in 0..channels {
                    for column in (0..stored).step_by(L::LANES) {
                        let from = staging.words().add(channel * g.kernel * stored + column);
                        let weight = |r: usize, c: usize| {
                            from.wrapping_add(positions[r][c] * stored).cast_const()
                        };
                        let to = to.add(channel * stored + column);
                        transform::kernel_tile::<L>(weight, to, apart);
                    }
                }
            }
        }
    }
}
