//! A unit's view of the source image: in place where no padding is met, else a padded copy.

use crate::buffer::Buffer;
use crate::geometry::{Geometry, Part};
use crate::lanes::{Lanes, Simd};
use crate::pack::{self, Left};

/// Extent of the source that a part of the target reads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    row: isize,
    column: isize,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    inside: bool,
}

impl Extent {
    /// The extent of a part's rows, over all columns.
    pub(crate) fn of(geometry: &Geometry, row_begin: usize, row_end: usize) -> Extent {
        let rows = geometry.rows.window(row_begin, row_end);
        let columns = geometry.columns.window(0, geometry.columns.target);
        let (Some((row, last_row)), Some((column, last_column))) = (rows, columns) else {
            return Extent { row: 0, column: 0, rows: 0, columns: 0, inside: true };
        };
        Extent {
            row,
            column,
            rows: (last_row - row + 1) as usize,
            columns: (last_column - column + 1) as usize,
            inside: row >= 0
                && column >= 0
                && last_row < geometry.rows.source as isize
                && last_column < geometry.columns.source as isize,
        }
    }

    /// The source rows of the extent that exist.
    pub(crate) fn source_rows(&self, geometry: &Geometry) -> std::ops::Range<usize> {
        let height = geometry.rows.source as isize;
        let begin = self.row.clamp(0, height) as usize;
        let end = (self.row + self.rows as isize).clamp(0, height) as usize;
        begin..end.max(begin)
    }

    /// Whether the source can be read in place.
    pub(crate) fn in_place<L: Lanes>(&self) -> bool {
        self.inside && L::GROUP == 1
    }
}

/// Memory to be fetched ahead of its use, a piece at each step.
#[derive(Clone, Copy)]
pub(crate) struct Ahead {
    next: *const u8,
    /// Cache lines left.
    lines: usize,
    /// Cache lines of a step.
    piece: usize,
}

impl Ahead {
    /// Nothing.
    pub(crate) const NONE: Ahead = Ahead { next: std::ptr::null(), lines: 0, piece: 0 };

    /// That many elements.
    pub(crate) fn of<E>(first: *const E, elements: usize) -> Ahead {
        let lines = (elements * size_of::<E>()).div_ceil(64);
        Ahead { next: first.cast(), lines, piece: lines }
    }

    /// In so many steps.
    pub(crate) fn steps(self, steps: usize) -> Ahead {
        Ahead { piece: self.lines.div_ceil(steps.max(1)), ..self }
    }

    /// The source rows of a part, all channels of them.
    pub(crate) fn source<E>(g: &Geometry, part: &Part, source: *const E, total: usize) -> Ahead {
        let read = Extent::of(g, part.row_begin, part.row_end).source_rows(g);
        let rows = (part.images - 1) * g.rows.source + read.len();
        let line = g.columns.source * total;
        let first = (part.image * g.rows.source + read.start) * line;
        Ahead::of(source.wrapping_add(first), rows * line)
    }

    /// Fetches a piece.
    #[inline(always)]
    pub(crate) fn step<S: Simd>(&mut self) {
        let piece = self.piece.min(self.lines);
        for line in 0..piece {
            S::prefetch(self.next.wrapping_add(line * 64));
        }
        self.next = self.next.wrapping_add(piece * 64);
        self.lines -= piece;
    }
}

/// A readable window; distances in words.
#[derive(Clone, Copy)]
pub(crate) struct Window {
    origin: *const u32,
    extent: Extent,
    pub(crate) image_pitch: usize,
    pub(crate) row_pitch: usize,
    pub(crate) pixel_pitch: usize,
}

impl Window {
    /// Opens the window of a part on channels `channel..channel + channels` of all `total`.
    ///
    /// # Safety
    /// `source` is the whole source image; the CPU supports the tier.
    #[inline(always)]
    pub(crate) unsafe fn open<L: Lanes>(
        geometry: &Geometry,
        part: &Part,
        source: *const L::Element,
        total: usize,
        channels: std::ops::Range<usize>,
        buffer: &mut Buffer,
    ) -> Window {
        let extent = Extent::of(geometry, part.row_begin, part.row_end);
        let (height, width) = (geometry.rows.source, geometry.columns.source);
        // SAFETY: granted by the caller; `words` below sized the buffer.
        unsafe {
            let first = source.add(part.image * height * width * total + channels.start);
            if extent.in_place::<L>() {
                let skip = extent.row as usize * width + extent.column as usize;
                return Window {
                    origin: first.add(skip * total).cast(),
                    extent,
                    image_pitch: height * width * total,
                    row_pitch: width * total,
                    pixel_pitch: total,
                };
            }
            let pixel_pitch = channels.len().div_ceil(L::GROUP);
            let row_pitch = extent.columns * pixel_pitch;
            let window = Window {
                origin: buffer.words(),
                extent,
                image_pitch: extent.rows * row_pitch,
                row_pitch,
                pixel_pitch,
            };
            // Columns of the source inside the extent.
            let begin = extent.column.clamp(0, width as isize) as usize;
            let end = (extent.column + extent.columns as isize).clamp(0, width as isize) as usize;
            let before = (begin as isize - extent.column).max(0) as usize * pixel_pitch;
            for image in 0..part.images {
                for r in 0..extent.rows {
                    let to = buffer.words().add(image * window.image_pitch + r * row_pitch);
                    let row = extent.row + r as isize;
                    if row < 0 || row >= height as isize || begin >= end {
                        fill(to, row_pitch, L::HALO);
                        continue;
                    }
                    let line = first.add(((image * height + row as usize) * width + begin) * total);
                    fill(to, before, L::HALO);
                    let words = (end - begin) * pixel_pitch;
                    if channels.len() == total && total.is_multiple_of(L::GROUP) {
                        pack::row::<L, Left>(line, (end - begin) * total, to.add(before));
                    } else {
                        for p in 0..end - begin {
                            let to = to.add(before + p * pixel_pitch);
                            pack::row::<L, Left>(line.add(p * total), channels.len(), to);
                        }
                    }
                    fill(to.add(before + words), row_pitch - before - words, L::HALO);
                }
            }
            window
        }
    }

    /// Words that the buffer of [`Window::open`] needs.
    pub(crate) fn words<L: Lanes>(geometry: &Geometry, part: &Part, channels: usize) -> usize {
        let extent = Extent::of(geometry, part.row_begin, part.row_end);
        if extent.in_place::<L>() {
            return 0;
        }
        part.images * extent.rows * extent.columns * channels.div_ceil(L::GROUP)
    }

    /// The pixel at a source position of an image of the part, which a tap's offset may leave.
    #[inline(always)]
    pub(crate) fn pixel(&self, image: usize, row: isize, column: isize) -> *const u32 {
        let (row, column) = (row - self.extent.row, column - self.extent.column);
        let offset = row * self.row_pitch as isize + column * self.pixel_pitch as isize;
        self.origin.wrapping_add(image * self.image_pitch).wrapping_offset(offset)
    }

    /// Distance in words for a shift in rows and columns.
    #[inline(always)]
    pub(crate) fn offset(&self, rows: isize, columns: isize) -> isize {
        rows * self.row_pitch as isize + columns * self.pixel_pitch as isize
    }
}

#[inline(always)]
unsafe fn fill(to: *mut u32, words: usize, value: u32) {
    // SAFETY: the caller grants the words.
    unsafe { std::slice::from_raw_parts_mut(to, words) }.fill(value);
}
