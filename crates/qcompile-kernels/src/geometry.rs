//! How the pixels of a convolution meet, for the forward direction and the gradient by the input.
//!
//! Both directions are sums over taps of a *source* image (x, or dy) into a *target* image (y, or dx).
//! Along one axis, the targets of phase `p` are `t = p + phases * j`, and tap `k` reads the source at
//! `step * j + shift(k)`. Forward has one phase and `step = stride`; backward has `stride` phases,
//! `step = 1`, and only the taps that hit the phase.

use crate::args::ConvShape;

/// One tap of a phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tap {
    /// Position in the kernel.
    pub(crate) kernel: usize,
    /// Source position for target number 0 of the phase.
    pub(crate) shift: isize,
}

/// One axis.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Axis {
    pub(crate) source: usize,
    pub(crate) target: usize,
    kernel: usize,
    stride: usize,
    dilation: usize,
    pad: usize,
    backward: bool,
}

impl Axis {
    /// Number of phases.
    pub(crate) fn phases(&self) -> usize {
        if self.backward { self.stride } else { 1 }
    }

    /// Whether so many taps read as many adjacent source positions, and the next target reads from the next one on.
    pub(crate) fn is_dense(&self, taps: usize) -> bool {
        self.kernel == taps && self.stride == 1 && self.dilation == 1
    }

    /// From one target's source position to the next one's in the same phase.
    pub(crate) fn step(&self) -> usize {
        if self.backward { 1 } else { self.stride }
    }

    /// The tap of a kernel position, if it hits the phase.
    fn tap(&self, phase: usize, kernel: usize) -> Option<Tap> {
        let reach = (kernel * self.dilation) as isize;
        let pad = self.pad as isize;
        if !self.backward {
            return Some(Tap { kernel, shift: reach - pad });
        }
        let stride = self.stride as isize;
        let position = phase as isize + pad - reach;
        (position.rem_euclid(stride) == 0)
            .then(|| Tap { kernel, shift: position.div_euclid(stride) })
    }

    /// The taps of a phase in the order of their shifts.
    pub(crate) fn taps(&self, phase: usize) -> impl Iterator<Item = Tap> + Clone + use<> {
        let axis = *self;
        (0..axis.kernel).filter_map(move |i| {
            axis.tap(phase, if axis.backward { axis.kernel - 1 - i } else { i })
        })
    }

    /// Source position that the first tap of a phase reads for its target number 0.
    pub(crate) fn origin(&self, phase: usize) -> isize {
        self.taps(phase).next().map_or(0, |tap| tap.shift)
    }

    /// Numbers of the first target of a phase at or after `target`.
    pub(crate) fn number(&self, phase: usize, target: usize) -> usize {
        target.saturating_sub(phase).div_ceil(self.phases())
    }

    /// First and last source position (inclusive) that targets `begin..end` read; `None` if no tap reads.
    pub(crate) fn window(&self, begin: usize, end: usize) -> Option<(isize, isize)> {
        let mut window: Option<(isize, isize)> = None;
        for phase in 0..self.phases() {
            let (first, after) = (self.number(phase, begin), self.number(phase, end));
            if first == after {
                continue;
            }
            for tap in self.taps(phase) {
                let low = (first * self.step()) as isize + tap.shift;
                let high = ((after - 1) * self.step()) as isize + tap.shift;
                let (a, b) = window.unwrap_or((low, high));
                window = Some((a.min(low), b.max(high)));
            }
        }
        window
    }
}

/// A convolution in one of the two directions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    pub(crate) batch: usize,
    pub(crate) rows: Axis,
    pub(crate) columns: Axis,
    pub(crate) groups: usize,
    /// Source channels of a group.
    pub(crate) source_channels: usize,
    /// Target channels of a group.
    pub(crate) target_channels: usize,
    /// Kernel positions.
    pub(crate) kernel: usize,
    pub(crate) kernel_width: usize,
    pub(crate) backward: bool,
}

impl Geometry {
    /// The geometry of the forward direction, or of the gradient by the input.
    pub(crate) fn new(shape: &ConvShape, backward: bool) -> Geometry {
        let axis = |input, output, kernel, stride, dilation, pad| Axis {
            source: if backward { output } else { input },
            target: if backward { input } else { output },
            kernel,
            stride,
            dilation,
            pad,
            backward,
        };
        let (inner, outer) = (shape.in_channels / shape.groups, shape.out_channels / shape.groups);
        Geometry {
            batch: shape.batch,
            rows: axis(
                shape.height,
                shape.out_height(),
                shape.kernel_height,
                shape.stride_height,
                shape.dilation_height,
                shape.pad_top,
            ),
            columns: axis(
                shape.width,
                shape.out_width(),
                shape.kernel_width,
                shape.stride_width,
                shape.dilation_width,
                shape.pad_left,
            ),
            groups: shape.groups,
            source_channels: if backward { outer } else { inner },
            target_channels: if backward { inner } else { outer },
            kernel: shape.kernel_height * shape.kernel_width,
            kernel_width: shape.kernel_width,
            backward,
        }
    }

    /// Number of phases, both axes together.
    pub(crate) fn phases(&self) -> usize {
        self.rows.phases() * self.columns.phases()
    }

    /// Whether every channel is convolved by itself.
    pub(crate) fn is_depthwise(&self) -> bool {
        self.groups > 1 && self.source_channels == 1 && self.target_channels == 1
    }

    /// Offset in the OIHW weights of a group's kernel position, source and target channel.
    pub(crate) fn weight(
        &self,
        group: usize,
        tap: (Tap, Tap),
        source: usize,
        target: usize,
    ) -> usize {
        let position = tap.0.kernel * self.kernel_width + tap.1.kernel;
        let (outer, inner, inners) = if self.backward {
            (group * self.source_channels + source, target, self.target_channels)
        } else {
            (group * self.target_channels + target, source, self.source_channels)
        };
        (outer * inners + inner) * self.kernel + position
    }
}

/// A unit's part of the target: whole rows of one image, or several whole images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) image: usize,
    pub(crate) images: usize,
    pub(crate) row_begin: usize,
    pub(crate) row_end: usize,
}

/// How the target pixels are cut into parts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parts {
    batch: usize,
    height: usize,
    images: usize,
    rows: usize,
}

impl Parts {
    /// Parts of about `pixels` pixels, smaller if there would be fewer than `wanted`.
    pub(crate) fn new(
        batch: usize,
        height: usize,
        width: usize,
        pixels: usize,
        wanted: usize,
    ) -> Parts {
        let image = height * width;
        if image == 0 || batch == 0 {
            return Parts { batch: 0, height, images: 1, rows: 1 };
        }
        let (mut images, mut rows) = (1, height);
        if image < pixels {
            images = (pixels / image).min(batch.div_ceil(wanted)).max(1);
        }
        if images == 1 {
            let per_image = wanted.div_ceil(batch);
            let target = pixels.min((image / per_image).max(48));
            let blocks = height.div_ceil((target / width).max(1));
            rows = height.div_ceil(blocks);
        }
        Parts { batch, height, images, rows }
    }

    /// Larger parts where they waste less of tiles that are `tile` pixels high: up to `pixels` pixels in a
    /// part, and no fewer than `least` parts.
    pub(crate) fn filling(self, tile: usize, width: usize, pixels: usize, least: usize) -> Parts {
        let padded = |parts: &Parts| -> usize {
            // Sizes of the parts: full ones, and a rest of images or of rows.
            let whole = |images: usize, rows: usize| (images * rows * width).next_multiple_of(tile);
            let images = self.batch / parts.images * whole(parts.images, parts.rows)
                + whole(self.batch % parts.images, parts.rows);
            let rest = self.height % parts.rows;
            images * (self.height / parts.rows) + self.batch * whole(1, rest)
        };
        let images = (1..=self.batch).map(|images| Parts { images, rows: self.height, ..self });
        let rows = (1..=self.height).rev().map(|rows| Parts { images: 1, rows, ..self });
        let fits = |parts: &Parts| {
            let size = parts.images * parts.rows * width;
            size <= pixels && parts.count() >= least.min(self.count())
        };
        let current = padded(&self);
        // A few percent are not worth a change.
        let candidates = images.take_while(|p| p.images * p.rows * width <= pixels).chain(rows);
        let best = candidates.filter(fits).min_by_key(padded);
        best.filter(|best| padded(best) * 33 <= current * 32).unwrap_or(self)
    }

    /// Number of parts.
    pub(crate) fn count(&self) -> usize {
        self.batch.div_ceil(self.images) * self.height.div_ceil(self.rows)
    }

    /// One part.
    pub(crate) fn part(&self, index: usize) -> Part {
        let blocks = self.height.div_ceil(self.rows);
        let (image, row_begin) = (index / blocks * self.images, index % blocks * self.rows);
        Part {
            image,
            images: self.images.min(self.batch - image),
            row_begin,
            row_end: (row_begin + self.rows).min(self.height),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_every_row_once() {
        for (batch, height, width) in
            [(1, 1, 1), (7, 8, 8), (128, 7, 7), (2, 224, 224), (3, 5, 700)]
        {
            let parts = Parts::new(batch, height, width, 192, 32);
            for parts in [parts, parts.filling(12, width, 240, 8)] {
                let mut seen = vec![0; batch * height];
                for index in 0..parts.count() {
                    let part = parts.part(index);
                    assert!(part.images == 1 || part.row_end - part.row_begin == height);
                    for image in part.image..part.image + part.images {
                        for row in part.row_begin..part.row_end {
                            seen[image * height + row] += 1;
                        }
                    }
                }
                assert!(seen.iter().all(|&n| n == 1), "{batch} x {height} x {width}");
            }
        }
    }

    #[test]
    fn parts_fill_tiles() {
        // Images of 64 pixels: one is 5 tiles of 12 and a third, three are 16.
        let parts = Parts::new(32, 8, 8, 192, 32);
        assert_eq!((parts.images, parts.rows), (1, 8));
        let filled = parts.filling(12, 8, 240, 8);
        assert_eq!((filled.images, filled.rows, filled.count()), (3, 8, 11));
        // Few images stay apart, so that threads have something to share.
        let filled = Parts::new(8, 8, 8, 192, 32).filling(12, 8, 240, 8);
        assert_eq!(filled.count(), 8 * filled.height.div_ceil(filled.rows));
        // Half of an image of 196 pixels is 9 tiles for 8 and a sixth; the whole is 17 for 16 and a third.
        let filled = Parts::new(16, 14, 14, 192, 32).filling(12, 14, 240, 8);
        assert_eq!((filled.images, filled.rows), (1, 14));
    }
}
