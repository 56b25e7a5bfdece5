//! Vector operations that the algorithms are generic over.
//!
//! The dot-product kernels see both operands as 32-bit words along K: one f32, two i16 (widened i8) or
//! four bytes. One algorithm then serves every type and tier; a tier supplies these few operations.

use crate::tile::Tile;

/// A CPU tier.
pub(crate) trait Simd: Copy + 'static {
    /// f32 words.
    type Real: Lanes<Element = f32>;
    /// i8 operands packed into words, i32 sums.
    type Int8: Lanes<Element = i8>;
    /// Whether the tier fuses multiply and add.
    const FMA: bool;
    /// Runs a task compiled with the tier's target features.
    ///
    /// # Safety
    /// The CPU supports the tier, and the task's own requirements hold.
    unsafe fn enter<T: Task>(task: T);

    /// Asks for the cache line of an address, which may be any; nothing where the tier cannot.
    #[inline(always)]
    fn prefetch(_address: *const u8) {}

    /// The same, for the first level of the cache.
    #[inline(always)]
    fn prefetch_near(_address: *const u8) {}

    /// Transposes an 8 x 8 block of words: `dst[j * dst_stride + i] = src[i * src_stride + j]`.
    ///
    /// # Safety
    /// Both blocks are valid and do not overlap; the CPU supports the tier.
    #[inline(always)]
    unsafe fn transpose8(src: *const u32, src_stride: usize, dst: *mut u32, dst_stride: usize) {
        for i in 0..8 {
            for j in 0..8 {
                // SAFETY: inside the two blocks.
                unsafe {
                    *dst.add(j * dst_stride + i) = src.add(i * src_stride + j).read_unaligned()
                }
            }
        }
    }
}

/// A piece of work to be compiled for a tier; `run` must be `#[inline(always)]`.
pub(crate) trait Task {
    /// Does the work.
    ///
    /// # Safety
    /// Stated by the task.
    unsafe fn run<S: Simd>(self);
}

/// Dot products of 32-bit words.
pub(crate) trait Lanes: Copy + 'static {
    /// The tier it belongs to.
    type Tier: Simd;
    /// What the caller's tensors hold.
    type Element: Copy + Default + 'static;
    /// A vector of accumulators or operands.
    type V: Copy;
    /// Words in a vector.
    const LANES: usize;
    /// Elements in a word.
    const GROUP: usize;
    /// Rows of the tile that is two vectors wide; divides [`ROW_GROUP`](crate::tile::ROW_GROUP).
    const ROWS_PAIR: usize;
    /// Rows of the tile that is one vector wide; divides [`ROW_GROUP`](crate::tile::ROW_GROUP).
    const ROWS_SINGLE: usize;
    /// Words of K in one turn of the inner loop. More than one spoils sums made of two instructions:
    /// the compiler reorders the additions of a turn, and then lacks registers.
    const UNROLL: usize = if Self::INTEGER { 1 } else { 4 };
    /// The word of a left operand that stands for zeros.
    const HALO: u32;
    /// Whether a packed panel begins with the first values of its accumulators.
    const HEADER: bool;
    /// Whether sums are i32 (and want scales) rather than f32.
    const INTEGER: bool;

    /// Zeros.
    unsafe fn zero() -> Self::V;
    /// One word for each lane, unaligned.
    unsafe fn load(from: *const u32) -> Self::V;
    /// The same word for all lanes, unaligned.
    unsafe fn splat(from: *const u32) -> Self::V;
    /// Unaligned store.
    unsafe fn store(to: *mut u32, value: Self::V);
    /// `sum + a . b` in each lane.
    unsafe fn dot(sum: Self::V, a: Self::V, b: Self::V) -> Self::V;
    /// `sum as f32 * (left * right)` in each lane, for i32 sums, one `left` and a vector of `right`.
    unsafe fn scale(sum: Self::V, left: *const f32, right: *const f32) -> Self::V;

    /// The word of a left operand.
    fn left_word(elements: &[Self::Element; 4]) -> u32;
    /// The word of a right operand.
    fn right_word(elements: &[Self::Element; 4]) -> u32;

    /// Computes a tile of `ROWS_PAIR` rows by two vectors.
    unsafe fn tile_pair(tile: &Tile);
    /// Computes a tile of `ROWS_SINGLE` rows by one vector.
    unsafe fn tile_single(tile: &Tile);
}

/// Implements the two tile entries of [`Lanes`] for a row count of each and optional target features.
macro_rules! tile_entries {
    ($pair:literal, $single:literal $(, $feature:literal)?) => {
        const ROWS_PAIR: usize = $pair;
        const ROWS_SINGLE: usize = $single;
        unsafe fn tile_pair(tile: &crate::tile::Tile) {
            $(#[target_feature(enable = $feature)])?
            #[allow(unused_unsafe, reason = "needed where the tier has target features")]
            unsafe fn enter<L: Lanes>(tile: &crate::tile::Tile) {
                // SAFETY: passed on from the caller.
                unsafe { crate::tile::tile::<L, $pair, 2>(tile) }
            }
            // SAFETY: passed on from the caller.
            unsafe { enter::<Self>(tile) }
        }
        unsafe fn tile_single(tile: &crate::tile::Tile) {
            $(#[target_feature(enable = $feature)])?
            unsafe fn enter<L: Lanes>(tile: &crate::tile::Tile) {
                // SAFETY: passed on from the caller.
                unsafe { crate::tile::tile::<L, $single, 1>(tile) }
            }
            // SAFETY: passed on from the caller.
            unsafe { enter::<Self>(tile) }
        }
    };
}
pub(crate) use tile_entries;

/// Two i8 widened to i16, first element low.
#[inline(always)]
pub(crate) fn word_of_i16(elements: &[i8; 4]) -> u32 {
    u32::from(i16::from(elements[0]) as u16) | u32::from(i16::from(elements[1]) as u16) << 16
}

/// Four bytes, first element low.
#[inline(always)]
pub(crate) fn word_of_i8(elements: &[i8; 4]) -> u32 {
    u32::from_le_bytes(elements.map(|e| e as u8))
}
