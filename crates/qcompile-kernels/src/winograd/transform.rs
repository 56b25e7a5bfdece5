//! The transforms of F(2x2, 3x3), on vectors of channels.

use super::{POSITIONS, TILE};
use crate::lanes::Lanes;

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

/// Where the pixels of a source tile are.
pub(super) trait Pixels {
    /// The first channel of a pixel.
    fn at(&self, row: usize, column: usize) -> *const f32;
}

/// A tile that lies inside the source.
pub(super) struct Inside {
    pub(super) first: *const f32,
    /// From row to row, and from pixel to pixel.
    pub(super) pitch: [usize; 2],
}

impl Pixels for Inside {
    #[inline(always)]
    fn at(&self, row: usize, column: usize) -> *const f32 {
        self.first.wrapping_add(row * self.pitch[0] + column * self.pitch[1])
    }
}

/// A tile of which some pixels are elsewhere: those beyond the border are zeros.
pub(super) struct Border(pub(super) [[*const f32; 4]; 4]);

impl Pixels for Border {
    #[inline(always)]
    fn at(&self, row: usize, column: usize) -> *const f32 {
        self.0[row][column]
    }
}

/// Writes `B^T d B` of a tile, `apart` words from position to position, filled up to whole vectors with zeros.
///
/// # Safety
/// Every pixel has the channels, and there is room for each position; the CPU supports the tier.
#[inline(always)]
pub(super) unsafe fn source_tile<L: Lanes>(
    pixels: &impl Pixels,
    channels: usize,
    to: *mut u32,
    apart: usize,
) {
    // SAFETY: granted by the caller.
    unsafe {
        let mut channel = 0;
        while channel + L::LANES <= channels {
            let mut tile = [[L::zero(); 4]; 4];
            for (r, row) in tile.iter_mut().enumerate() {
                for (c, value) in row.iter_mut().enumerate() {
                    *value = L::load(pixels.at(r, c).wrapping_add(channel).cast());
                }
            }
            store::<L>(&both::<L, 4, 4>(&tile, source::<L>), to.add(channel), apart);
            channel += L::LANES;
        }
        if channel < channels {
            let mut tile = [[L::zero(); 4]; 4];
            for (r, row) in tile.iter_mut().enumerate() {
                for (c, value) in row.iter_mut().enumerate() {
                    let from = pixels.at(r, c).wrapping_add(channel);
                    *value = load_some::<L>(from, channels - channel);
                }
            }
            store::<L>(&both::<L, 4, 4>(&tile, source::<L>), to.add(channel), apart);
        }
    }
}

/// Writes `G g G^T`; `from(row, column)` is where each weight stands for a vector of targets.
///
/// # Safety
/// As for [`source_tile`].
#[inline(always)]
pub(super) unsafe fn kernel_tile<L: Lanes>(
    from: impl Fn(usize, usize) -> *const u32,
    to: *mut u32,
    apart: usize,
) {
    // SAFETY: granted by the caller.
    unsafe {
        let mut tile = [[L::zero(); 3]; 3];
        for (r, row) in tile.iter_mut().enumerate() {
            for (c, value) in row.iter_mut().enumerate() {
                *value = L::load(from(r, c));
            }
        }
        store::<L>(&both::<L, 3, 4>(&tile, kernel::<L>), to, apart);
    }
}

/// `A^T m A` of a vector of target channels, `apart` words from position to position.
///
/// # Safety
/// As for [`source_tile`].
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

/// Stores all positions of a vector.
#[inline(always)]
unsafe fn store<L: Lanes>(tile: &[[L::V; 4]; 4], to: *mut u32, apart: usize) {
    debug_assert_eq!(tile.as_flattened().len(), POSITIONS);
    // SAFETY: granted by the caller.
    unsafe {
        for (position, &value) in tile.as_flattened().iter().enumerate() {
            L::store(to.add(position * apart), value);
        }
    }
}

/// Loads fewer elements than a vector has, and zeros for the rest.
#[inline(always)]
unsafe fn load_some<L: Lanes>(from: *const f32, count: usize) -> L::V {
    let mut words = [0.0_f32; 16];
    // SAFETY: granted by the caller; no vector has more words.
    unsafe {
        std::ptr::copy_nonoverlapping(from, words.as_mut_ptr(), count);
        L::load(words.as_ptr().cast())
    }
}

/// Stores the first elements of a vector.
///
/// # Safety
/// There is room for them.
#[inline(always)]
pub(super) unsafe fn store_some<L: Lanes>(to: *mut u32, value: L::V, count: usize) {
    let mut words = [0_u32; 16];
    // SAFETY: granted by the caller; no vector has more words.
    unsafe {
        L::store(words.as_mut_ptr(), value);
        std::ptr::copy_nonoverlapping(words.as_ptr(), to, count);
    }
}
