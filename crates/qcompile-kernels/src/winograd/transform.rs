//! The transforms of F(2x2, 3x3), on vectors of channels.

use super::{POSITIONS, TILE};
use crate::lanes::{Element, Lanes, MOST_LANES, Real, RealVector, Simd};

/// The same number in all lanes.
#[inline(always)]
fn number<L: Lanes>(number: f32) -> L::V {
    // SAFETY: one word; whoever has vectors of a tier runs on it.
    unsafe { L::splat((&raw const number).cast()) }
}

/// `a + b`: a product by one is exact.
#[inline(always)]
fn plus<L: Lanes>(a: L::V, b: L::V) -> L::V {
    // SAFETY: whoever has vectors of a tier runs on it.
    unsafe { L::dot(a, b, number::<L>(1.0)) }
}

/// `a - b`
#[inline(always)]
fn minus<L: Lanes>(a: L::V, b: L::V) -> L::V {
    // SAFETY: whoever has vectors of a tier runs on it.
    unsafe { L::dot(a, b, number::<L>(-1.0)) }
}

/// `a / 2`
#[inline(always)]
fn half<L: Lanes>(a: L::V) -> L::V {
    // SAFETY: whoever has vectors of a tier runs on it.
    unsafe { L::dot(L::zero(), a, number::<L>(0.5)) }
}

/// Applies a transform of one dimension to the columns, then to the rows.
#[inline(always)]
fn both<L: Lanes, const I: usize, const O: usize>(
    x: &[[L::V; I]; I],
    line: impl Fn([L::V; I]) -> [L::V; O],
) -> [[L::V; O]; O] {
    let zero = number::<L>(0.0);
    let (mut columns, mut rows) = ([[zero; O]; I], [[zero; O]; O]);
    for (c, column) in columns.iter_mut().enumerate() {
        let mut from = [zero; I];
        for (from, row) in from.iter_mut().zip(x) {
            *from = row[c];
        }
        *column = line(from);
    }
    for (r, row) in rows.iter_mut().enumerate() {
        let mut from = [zero; I];
        for (from, column) in from.iter_mut().zip(&columns) {
            *from = column[r];
        }
        *row = line(from);
    }
    rows
}

/// `B^T d`
#[inline(always)]
fn source<L: Lanes>([a, b, c, d]: [L::V; 4]) -> [L::V; 4] {
    [minus::<L>(a, c), plus::<L>(b, c), minus::<L>(c, b), minus::<L>(b, d)]
}

/// `A^T m`
#[inline(always)]
fn target<L: Lanes>([a, b, c, d]: [L::V; 4]) -> [L::V; TILE] {
    [plus::<L>(plus::<L>(a, b), c), minus::<L>(minus::<L>(b, c), d)]
}

/// `G g`
#[inline(always)]
fn kernel<L: Lanes>([a, b, c]: [L::V; 3]) -> [L::V; 4] {
    let ends = plus::<L>(a, c);
    [a, half::<L>(plus::<L>(ends, b)), half::<L>(minus::<L>(ends, b)), c]
}

/// `A y`, of which the last element is negative: nothing has to change its sign for that.
#[inline(always)]
fn target_gradient<L: Lanes>([a, b]: [L::V; TILE]) -> [L::V; 4] {
    [a, plus::<L>(a, b), minus::<L>(a, b), b]
}

/// `G^T s`, with the last element of `s` negative.
#[inline(always)]
fn weight_gradient<L: Lanes>([a, b, c, d]: [L::V; 4]) -> [L::V; 3] {
    let ends = half::<L>(plus::<L>(b, c));
    [plus::<L>(a, ends), half::<L>(minus::<L>(b, c)), minus::<L>(ends, d)]
}

/// A row of tiles, side by side.
#[derive(Clone, Copy)]
pub(super) struct Strip<E, const ROWS: usize> {
    /// The first channel of column 0 in each row.
    pub(super) rows: [*const E; ROWS],
    /// From one pixel to the next.
    pub(super) pitch: usize,
    /// Columns that there are; others are zeros.
    pub(super) width: usize,
    /// The first tile's first column.
    pub(super) column: isize,
    /// Tiles.
    pub(super) count: usize,
}

/// Where transformed tiles are, as vectors of channels, adjacent in each tile.
#[derive(Clone, Copy)]
pub(super) struct Transformed {
    /// The first tile.
    pub(super) first: *mut u32,
    /// From one tile to the next.
    pub(super) pitch: usize,
    /// From one position to the next.
    pub(super) apart: usize,
}

impl Transformed {
    /// From a later tile on.
    #[inline(always)]
    pub(super) fn skip(self, tiles: usize) -> Transformed {
        Transformed { first: self.first.wrapping_add(tiles * self.pitch), ..self }
    }
}

/// Writes a row of positions of one or two tiles: of one as adjacent channels of a left operand, of two as words of both.
#[inline(always)]
unsafe fn put_row<L: Lanes, const N: usize>(
    first: *mut u32,
    rows: [[RealVector<L>; 4]; N],
    apart: usize,
) {
    for (position, (&one, &other)) in rows[0].iter().zip(&rows[N - 1]).enumerate() {
        let to = first.wrapping_add(position * apart);
        // SAFETY: granted by the caller.
        unsafe {
            if N == 1 {
                L::store_elements(to, one);
            } else {
                L::store_words(to, [one, other]);
            }
        }
    }
}

/// Writes `B^T d B` of the tiles of one strip, as adjacent channels of a left operand, or of two equally long ones, as words
/// of both; filled up to whole vectors of channels with zeros.
///
/// # Safety
/// Every pixel has the channels, and there is room for each tile; the CPU supports the tier.
#[inline(always)]
pub(super) unsafe fn source_tiles<L: Lanes, const N: usize>(
    strips: [Strip<L::Element, 4>; N],
    channels: usize,
    to: Transformed,
) {
    // SAFETY: granted by the caller.
    unsafe {
        let mut channel = 0;
        while channel + L::LANES <= channels {
            source_vectors::<L, N, true>(strips, [channel, L::LANES], to);
            channel += L::LANES;
        }
        if channel < channels {
            source_vectors::<L, N, false>(strips, [channel, channels - channel], to);
        }
    }
}

/// One vector of channels of all tiles: neighbours share the transforms of two columns.
#[inline(always)]
unsafe fn source_vectors<L: Lanes, const N: usize, const WHOLE: bool>(
    strips: [Strip<L::Element, 4>; N],
    [channel, live]: [usize; 2],
    to: Transformed,
) {
    let strips = strips.map(|strip| strip.skip(channel));
    let mut first = to.first.wrapping_add(word::<L, N>(channel));
    let none = [number::<Real<L>>(0.0); 4];
    let (mut a, mut b, mut c, mut d) = ([none; N], [none; N], [none; N], [none; N]);
    // SAFETY: granted by the caller.
    unsafe {
        for (n, strip) in strips.iter().enumerate() {
            a[n] = source::<Real<L>>(strip.column::<L, WHOLE>(0, live));
            b[n] = source::<Real<L>>(strip.column::<L, WHOLE>(1, live));
        }
        for tile in 0..strips[0].count {
            for (n, strip) in strips.iter().enumerate() {
                c[n] = source::<Real<L>>(strip.column::<L, WHOLE>(tile * TILE + 2, live));
                d[n] = source::<Real<L>>(strip.column::<L, WHOLE>(tile * TILE + 3, live));
            }
            for r in 0..4 {
                let mut row = [none; N];
                for (n, row) in row.iter_mut().enumerate() {
                    *row = source::<Real<L>>([a[n][r], b[n][r], c[n][r], d[n][r]]);
                }
                put_row::<L, N>(first.wrapping_add(r * 4 * to.apart), row, to.apart);
            }
            (a, b) = (c, d);
            first = first.wrapping_add(to.pitch);
        }
    }
}

/// The word of a channel in vectors of one or two tiles.
#[inline(always)]
fn word<L: Lanes, const N: usize>(channel: usize) -> usize {
    if N == 1 { channel / L::GROUP } else { channel }
}

impl<E: Element, const ROWS: usize> Strip<E, ROWS> {
    /// From a later channel on.
    #[inline(always)]
    fn skip(self, channel: usize) -> Strip<E, ROWS> {
        Strip { rows: self.rows.map(|row| row.wrapping_add(channel)), ..self }
    }

    /// Asks for some channels of all pixels.
    #[inline(always)]
    pub(super) fn fetch<S: Simd>(&self, channels: usize) {
        const LINE: usize = 64;
        let begin = self.column.max(0).cast_unsigned();
        let end = self.column + (self.count * TILE + ROWS - TILE) as isize;
        let end = end.max(0).cast_unsigned().min(self.width);
        for row in self.rows {
            for column in begin..end {
                let pixel: *const u8 = row.wrapping_add(column * self.pitch).cast();
                for byte in (0..channels * size_of::<E>()).step_by(LINE) {
                    S::prefetch_near(pixel.wrapping_add(byte));
                }
            }
        }
    }

    /// A vector of the pixels of a column, counted from the first tile's first one.
    #[inline(always)]
    unsafe fn column<L: Lanes<Element = E>, const WHOLE: bool>(
        &self,
        column: usize,
        live: usize,
    ) -> [RealVector<L>; ROWS] {
        let mut values = [number::<Real<L>>(0.0); ROWS];
        let column = self.column.wrapping_add_unsigned(column);
        if column.cast_unsigned() < self.width {
            for (value, row) in values.iter_mut().zip(self.rows) {
                let from = row.wrapping_add(column.cast_unsigned() * self.pitch);
                // SAFETY: granted by the caller.
                *value = unsafe {
                    if WHOLE { L::load_elements(from) } else { load_some::<L>(from, live) }
                };
            }
        }
        values
    }
}

/// Writes `A dy A^T` of the tiles of one strip or two, as [`source_tiles`] does but always as words, the last row and column
/// of positions negative.
///
/// # Safety
/// As for [`source_tiles`].
#[inline(always)]
pub(super) unsafe fn gradient_tiles<L: Lanes, const N: usize>(
    strips: [Strip<L::Element, TILE>; N],
    channels: usize,
    to: Transformed,
) {
    // SAFETY: granted by the caller.
    unsafe {
        let mut channel = 0;
        while channel + L::LANES <= channels {
            gradient_vectors::<L, N, true>(strips, [channel, L::LANES], to);
            channel += L::LANES;
        }
        if channel < channels {
            gradient_vectors::<L, N, false>(strips, [channel, channels - channel], to);
        }
    }
}

/// One vector of channels of all tiles.
#[inline(always)]
unsafe fn gradient_vectors<L: Lanes, const N: usize, const WHOLE: bool>(
    strips: [Strip<L::Element, TILE>; N],
    [channel, live]: [usize; 2],
    to: Transformed,
) {
    let strips = strips.map(|strip| strip.skip(channel));
    let mut first = to.first.wrapping_add(word::<L, N>(channel));
    let none = [number::<Real<L>>(0.0); 4];
    let (mut a, mut b) = ([none; N], [none; N]);
    for tile in 0..strips[0].count {
        // SAFETY: granted by the caller.
        unsafe {
            for (n, strip) in strips.iter().enumerate() {
                let column = tile * TILE;
                a[n] = target_gradient::<Real<L>>(strip.column::<L, WHOLE>(column, live));
                b[n] = target_gradient::<Real<L>>(strip.column::<L, WHOLE>(column + 1, live));
            }
            for r in 0..4 {
                let mut row = [none; N];
                for (n, row) in row.iter_mut().enumerate() {
                    *row = target_gradient::<Real<L>>([a[n][r], b[n][r]]);
                }
                put_row::<L, N>(first.wrapping_add(r * 4 * to.apart), row, to.apart);
            }
        }
        first = first.wrapping_add(to.pitch);
    }
}

/// Writes `G^T s G`, of sums whose last row and column are negative, the positions of the kernel `step` words apart.
///
/// # Safety
/// As for [`source_tiles`].
#[inline(always)]
pub(super) unsafe fn kernel_gradient<L: Lanes>(
    from: *const u32,
    apart: usize,
    to: *mut u32,
    step: usize,
) {
    // SAFETY: granted by the caller.
    unsafe {
        let kernel = both::<L, 4, 3>(&load::<L>(from, apart), weight_gradient::<L>);
        for (position, &value) in kernel.as_flattened().iter().enumerate() {
            L::store(to.add(position * step), value);
        }
    }
}

/// Writes `G g G^T` of one or two kernels, as words; `from(kernel, row, column)` is where each weight stands as f32 for a
/// vector of targets.
///
/// # Safety
/// As for [`source_tiles`].
#[inline(always)]
pub(super) unsafe fn kernel_tiles<L: Lanes, const N: usize>(
    from: impl Fn(usize, usize, usize) -> *const u32,
    to: *mut u32,
    apart: usize,
) {
    let zero = number::<Real<L>>(0.0);
    let mut kernels = [[[zero; 4]; 4]; N];
    // SAFETY: granted by the caller.
    unsafe {
        for (n, transformed) in kernels.iter_mut().enumerate() {
            let mut tile = [[zero; 3]; 3];
            for (r, row) in tile.iter_mut().enumerate() {
                for (c, value) in row.iter_mut().enumerate() {
                    *value = Real::<L>::load(from(n, r, c));
                }
            }
            *transformed = both::<Real<L>, 3, 4>(&tile, kernel::<Real<L>>);
        }
        for position in 0..POSITIONS {
            let value = |n: usize| kernels[n][position / 4][position % 4];
            L::store_words(to.add(position * apart), [value(0), value(N - 1)]);
        }
    }
}

/// `A^T m A` of a vector of target channels, `apart` words from position to position.
///
/// # Safety
/// As for [`source_tiles`].
#[inline(always)]
pub(super) unsafe fn target_tile<L: Lanes>(from: *const u32, apart: usize) -> [[L::V; TILE]; TILE] {
    // SAFETY: granted by the caller.
    unsafe { both::<L, 4, TILE>(&load::<L>(from, apart), target::<L>) }
}

/// Loads all positions of a vector.
#[inline(always)]
unsafe fn load<L: Lanes>(from: *const u32, apart: usize) -> [[L::V; 4]; 4] {
    // SAFETY: granted by the caller.
    unsafe {
        let mut tile = [[L::zero(); 4]; 4];
        for (position, value) in tile.as_flattened_mut().iter_mut().enumerate() {
            *value = L::load(from.add(position * apart));
        }
        tile
    }
}

/// Loads fewer elements than a vector has, and zeros for the rest.
#[inline(always)]
unsafe fn load_some<L: Lanes>(from: *const L::Element, count: usize) -> RealVector<L> {
    let mut elements = [L::Element::default(); MOST_LANES];
    // SAFETY: granted by the caller; no vector has more lanes.
    unsafe {
        std::ptr::copy_nonoverlapping(from, elements.as_mut_ptr(), count);
        L::load_elements(elements.as_ptr())
    }
}

/// Stores the first elements of a vector, all that there are if `count` is greater.
///
/// # Safety
/// There is room for them.
#[inline(always)]
pub(super) unsafe fn store<L: Lanes>(to: *mut u32, value: L::V, count: usize) {
    // SAFETY: granted by the caller; no vector has more words.
    unsafe {
        if count >= L::LANES {
            L::store(to, value);
            return;
        }
        let mut words = [0_u32; MOST_LANES];
        L::store(words.as_mut_ptr(), value);
        std::ptr::copy_nonoverlapping(words.as_ptr(), to, count);
    }
}
