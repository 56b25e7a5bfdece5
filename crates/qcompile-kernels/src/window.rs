//! A unit's view of the source image: in place where no padding is met, else a padded copy.

use crate::buffer::Buffer;
use crate::geometry::{Geometry, Part};
use crate::lanes::{Codes, Lanes, Simd};
use crate::pack::{self, Left};
use std::ops::Range;

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
    /// Nothing.
    const NONE: Extent = Extent { row: 0, column: 0, rows: 0, columns: 0, inside: true };

    /// The extent of a part's rows, over all columns.
    pub(crate) fn of(geometry: &Geometry, row_begin: usize, row_end: usize) -> Extent {
        let rows = geometry.rows.window(row_begin, row_end);
        let columns = geometry.columns.window(0, geometry.columns.target);
        let (Some((row, last_row)), Some((column, last_column))) = (rows, columns) else {
            return Extent::NONE;
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
    pub(crate) fn source_rows(&self, geometry: &Geometry) -> Range<usize> {
        let height = geometry.rows.source as isize;
        let begin = self.row.clamp(0, height) as usize;
        let end = (self.row + self.rows as isize).clamp(0, height) as usize;
        begin..end.max(begin)
    }

    /// Columns of the extent before the source, and the source columns in it.
    fn source_columns(&self, geometry: &Geometry) -> (usize, Range<usize>) {
        let width = geometry.columns.source as isize;
        let begin = self.column.clamp(0, width) as usize;
        let end = (self.column + self.columns as isize).clamp(0, width) as usize;
        if begin >= end {
            return (0, 0..0);
        }
        ((begin as isize - self.column).unsigned_abs(), begin..end)
    }

    /// Whether channels of the source, of `total` in all, can be read in place.
    fn in_place<L: Lanes>(&self, codes: Codes, total: usize, channels: &Range<usize>) -> bool {
        let whole = |count: usize| count.is_multiple_of(L::GROUP);
        self.inside
            && codes.are_plain::<L>()
            && whole(total)
            && whole(channels.start)
            && whole(channels.len())
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

    /// Several, one after the other, in so many steps together.
    pub(crate) fn spread(ahead: &mut [Ahead], steps: usize) {
        let lines: usize = ahead.iter().map(|ahead| ahead.lines).sum();
        for ahead in ahead {
            ahead.piece = lines.div_ceil(steps.max(1));
        }
    }

    /// Whether nothing is left.
    pub(crate) fn is_empty(&self) -> bool {
        self.lines == 0
    }

    /// Takes a piece off: where it begins, and its cache lines.
    #[inline(always)]
    pub(crate) fn take(&mut self) -> (*const u8, usize) {
        let (from, piece) = (self.next, self.piece.min(self.lines));
        self.next = from.wrapping_add(piece * 64);
        self.lines -= piece;
        (from, piece)
    }

    /// Fetches a piece.
    #[inline(always)]
    pub(crate) fn step<S: Simd>(&mut self) {
        let (from, piece) = self.take();
        for line in 0..piece {
            S::prefetch(from.wrapping_add(line * 64));
        }
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
        (source, codes): (*const L::Element, Codes),
        total: usize,
        channels: Range<usize>,
        buffer: &mut Buffer,
    ) -> Window {
        // SAFETY: granted by the caller.
        let halo = unsafe { L::halo(codes) };
        let extent = Extent::of(geometry, part.row_begin, part.row_end);
        let (height, width) = (geometry.rows.source, geometry.columns.source);
        // SAFETY: granted by the caller; `words` below sized the buffer.
        unsafe {
            let first = source.add(part.image * height * width * total + channels.start);
            if extent.in_place::<L>(codes, total, &channels) {
                let skip = extent.row as usize * width + extent.column as usize;
                let pixel_pitch = total / L::GROUP;
                return Window {
                    origin: first.add(skip * total).cast(),
                    extent,
                    image_pitch: height * width * pixel_pitch,
                    row_pitch: width * pixel_pitch,
                    pixel_pitch,
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
            let (before, Range { start: begin, end }) = extent.source_columns(geometry);
            let before = before * pixel_pitch;
            for image in 0..part.images {
                for r in 0..extent.rows {
                    let to = buffer.words().add(image * window.image_pitch + r * row_pitch);
                    let row = extent.row + r as isize;
                    if row < 0 || row >= height as isize || begin >= end {
                        fill(to, row_pitch, halo);
                        continue;
                    }
                    let line = first.add(((image * height + row as usize) * width + begin) * total);
                    fill(to, before, halo);
                    let words = (end - begin) * pixel_pitch;
                    if channels.len() == total && total.is_multiple_of(L::GROUP) {
                        let to = to.add(before);
                        pack::row::<L, Left>(line, (end - begin) * total, to, codes.flip);
                    } else {
                        for p in 0..end - begin {
                            let to = to.add(before + p * pixel_pitch);
                            pack::row::<L, Left>(
                                line.add(p * total),
                                channels.len(),
                                to,
                                codes.flip,
                            );
                        }
                    }
                    fill(to.add(before + words), row_pitch - before - words, halo);
                }
            }
            window
        }
    }

    /// Words that the buffer of [`Window::open`] needs.
    pub(crate) fn words<L: Lanes>(
        geometry: &Geometry,
        part: &Part,
        codes: Codes,
        total: usize,
        channels: &Range<usize>,
    ) -> usize {
        let extent = Extent::of(geometry, part.row_begin, part.row_end);
        if extent.in_place::<L>(codes, total, channels) {
            return 0;
        }
        part.images * extent.rows * extent.columns * channels.len().div_ceil(L::GROUP)
    }

    /// Opens a window whose words are elements at the same place of several parts of the same shape; all but
    /// the first may be missing, which gives zeros. Positions are those of the first part.
    ///
    /// # Safety
    /// `source` is the whole source image; the CPU supports the tier.
    #[inline(always)]
    pub(crate) unsafe fn zipped<L: Lanes>(
        geometry: &Geometry,
        parts: [Option<Part>; 4],
        source: *const L::Element,
        total: usize,
        channels: Range<usize>,
        buffer: &mut Buffer,
    ) -> Window {
        let (height, width) = (geometry.rows.source, geometry.columns.source);
        let extents =
            parts.map(|part| part.map(|part| Extent::of(geometry, part.row_begin, part.row_end)));
        let extent = extents[0].unwrap_or(Extent::NONE);
        let pixel_pitch = channels.len();
        let row_pitch = extent.columns * pixel_pitch;
        let image_pitch = extent.rows * row_pitch;
        let window = Window { origin: buffer.words(), extent, image_pitch, row_pitch, pixel_pitch };
        let (before, columns) = extent.source_columns(geometry);
        let before = before * pixel_pitch;
        let images = parts[0].map_or(0, |part| part.images);
        // SAFETY: granted by the caller.
        unsafe {
            for (image, r) in (0..images).flat_map(|i| (0..extent.rows).map(move |r| (i, r))) {
                let to = buffer.words().add(image * image_pitch + r * row_pitch);
                // The row's first element in each part.
                let mut lines = [None; 4];
                for (line, (part, extent)) in lines.iter_mut().zip(parts.iter().zip(extents)) {
                    let (Some(part), Some(extent)) = (part, extent) else { continue };
                    let row = extent.row + r as isize;
                    if row >= 0 && row < height as isize {
                        let row = (part.image + image) * height + row as usize;
                        let pixel = row * width + columns.start;
                        *line = Some(source.add(pixel * total + channels.start));
                    }
                }
                fill(to, before, L::HALO);
                let words = columns.len() * pixel_pitch;
                if channels.len() == total {
                    pack::zip::<L, Left>(lines, words, to.add(before));
                } else {
                    for p in 0..columns.len() {
                        let lines = lines.map(|line| line.map(|line| line.add(p * total)));
                        pack::zip::<L, Left>(lines, pixel_pitch, to.add(before + p * pixel_pitch));
                    }
                }
                fill(to.add(before + words), row_pitch - before - words, L::HALO);
            }
        }
        window
    }

    /// Words that the buffer of [`Window::zipped`] needs.
    pub(crate) fn zipped_words(geometry: &Geometry, part: &Part, channels: usize) -> usize {
        let extent = Extent::of(geometry, part.row_begin, part.row_end);
        part.images * extent.rows * extent.columns * channels
    }

    /// The window of `pixels` pixels, whose words stand channel by channel there, with the pixels of each channel side by
    /// side, `pitch` words from channel to channel.
    ///
    /// # Safety
    /// `to` has room for all channels; the CPU supports the tier.
    #[inline(always)]
    pub(crate) unsafe fn turned<S: Simd>(
        self,
        pixels: usize,
        pitch: usize,
        to: *mut u32,
    ) -> Window {
        let channels = self.pixel_pitch;
        // SAFETY: granted by the caller; the window's words lie one after the other.
        unsafe { pack::transpose::<S>(self.origin, [pixels, channels], channels, to, pitch) };
        let over = |pitch: usize| pitch / channels.max(1);
        Window {
            origin: to,
            image_pitch: over(self.image_pitch),
            row_pitch: over(self.row_pitch),
            pixel_pitch: 1,
            ..self
        }
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
