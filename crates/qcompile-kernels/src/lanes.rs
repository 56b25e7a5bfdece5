//! Vector operations that the algorithms are generic over.
//!
//! The dot-product kernels see both operands as 32-bit words along K: one f32, two bf16, two i16
//! (widened i8) or four bytes. One algorithm then serves every type and tier; a tier supplies these few
//! operations. A tier that cannot multiply bf16 sees each as an f32 ([`Widened`]), which is exact.

use crate::buffer::Buffer;
use crate::rounding;
use crate::tile::{Blocks, Depth, Tile};
use std::marker::PhantomData;

/// A CPU tier.
pub(crate) trait Simd: Copy + 'static {
    /// f32 words.
    type Real: Lanes<Element = f32>;
    /// i8 operands packed into words, i32 sums.
    type Int8: Lanes<Element = i8>;
    /// bf16 operands, given as their bits, and f32 sums.
    type Bf16: Lanes<Element = u16>;
    /// Whether the tier fuses multiply and add.
    const FMA: bool;
    /// Whether tiles take long enough for what an epilogue will write to be fetched meanwhile.
    const FETCHES_WRITES: bool = true;
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

    /// Makes words of two rows of 16-bit elements: `to[i]` holds `first[i]` and, above it, `second[i]`.
    ///
    /// # Safety
    /// Both rows hold `count` elements and `to` has room for as many words; the CPU supports the tier.
    #[inline(always)]
    unsafe fn zip(first: *const u16, second: *const u16, count: usize, to: *mut u32) {
        // SAFETY: granted by the caller.
        unsafe {
            for i in 0..count {
                *to.add(i) = u32::from(*first.add(i)) | u32::from(*second.add(i)) << 16;
            }
        }
    }
}

/// What a tensor holds.
pub(crate) trait Element: Copy + Default + 'static {
    /// Whether it is narrower than a word.
    const NARROW: bool = size_of::<Self>() < 4;
    /// Whether it is an integer.
    const WHOLE: bool = false;
    /// Its value.
    fn real(self) -> f32;
    /// The nearest to a value, ties to even.
    fn nearest(value: f32) -> Self;
    /// A code that is stored with some bits flipped, as it is meant.
    #[inline(always)]
    fn flipped(self, _flip: u8) -> Self {
        self
    }
    /// The code that stands for 0.
    ///
    /// # Safety
    /// The zero point of the codes is null, or holds a code.
    #[inline(always)]
    unsafe fn zero(_codes: Codes) -> Self {
        Self::default()
    }
}

/// How the codes of a left operand are read: `(code ^ flip) - zero` as i8, so that u8 is i8 with another zero point.
/// Floats have neither.
#[derive(Clone, Copy)]
pub(crate) struct Codes {
    pub(crate) flip: u8,
    /// Where the zero point lies; null for none. Scratch is counted before there is memory, so it is not read at once.
    zero: *const u8,
}

impl Default for Codes {
    fn default() -> Self {
        Codes { flip: 0, zero: std::ptr::null() }
    }
}

impl Codes {
    /// The codes of an argument block, with a null zero point for none.
    pub(crate) fn new(zero: *const u8, unsigned: usize) -> Codes {
        Codes { flip: if unsigned == 0 { 0 } else { 0x80 }, zero }
    }

    /// The code that stands for 0.
    ///
    /// # Safety
    /// The zero point is null, or holds a code.
    #[inline(always)]
    unsafe fn zero(self) -> i8 {
        // SAFETY: granted by the caller.
        let zero = if self.zero.is_null() { 0 } else { unsafe { self.zero.read() } };
        (zero ^ self.flip).cast_signed()
    }

    /// Whether adjacent codes in memory are words as they are.
    pub(crate) fn are_plain<L: Lanes>(self) -> bool {
        L::PLAIN && self.flip == 0
    }
}

impl Element for f32 {
    #[inline(always)]
    fn real(self) -> f32 {
        self
    }
    #[inline(always)]
    fn nearest(value: f32) -> f32 {
        value
    }
}
/// The bits of a bf16.
impl Element for u16 {
    #[inline(always)]
    fn real(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }
    #[inline(always)]
    fn nearest(value: f32) -> u16 {
        rounding::bf16(value)
    }
}
impl Element for i8 {
    const WHOLE: bool = true;
    #[inline(always)]
    fn real(self) -> f32 {
        f32::from(self)
    }
    #[inline(always)]
    fn nearest(value: f32) -> i8 {
        value.round_ties_even() as i8
    }
    #[inline(always)]
    fn flipped(self, flip: u8) -> Self {
        (self.cast_unsigned() ^ flip).cast_signed()
    }
    #[inline(always)]
    unsafe fn zero(codes: Codes) -> Self {
        // SAFETY: granted by the caller.
        unsafe { codes.zero() }
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

/// The lanes of f32 on the tier of others, which are as many.
pub(crate) type Real<L> = <<L as Lanes>::Tier as Simd>::Real;
/// A vector of them.
pub(crate) type RealVector<L> = <Real<L> as Lanes>::V;

/// Words in the widest vector.
pub(crate) const MOST_LANES: usize = 16;

/// Dot products of 32-bit words.
pub(crate) trait Lanes: Copy + 'static {
    /// The tier it belongs to.
    type Tier: Simd;
    /// What the caller's tensors hold.
    type Element: Element;
    /// A vector of accumulators or operands.
    type V: Copy;
    /// Lanes of one element to a word, as f32; of integers themselves.
    type Single: Lanes<Element = Self::Element>;
    /// Words in a vector.
    const LANES: usize;
    /// Elements in a word.
    const GROUP: usize;
    /// Rows are handled in groups of this many, a multiple of the tile's heights.
    const ROW_GROUP: usize = 24;
    /// Rows of the tile that is two vectors wide.
    const ROWS_PAIR: usize;
    /// Rows of the tile that is one vector wide.
    const ROWS_SINGLE: usize;
    /// Words of K in one turn of the inner loop. More than one spoils sums made of two instructions:
    /// the compiler reorders the additions of a turn, and then lacks registers.
    const UNROLL: usize = if Self::INTEGER { 1 } else { 4 };
    /// The word of a left operand that stands for zeros, where the code of 0 is 0.
    const HALO: u32;
    /// Whether adjacent elements in memory are words as they are.
    const PLAIN: bool = size_of::<Self::Element>() * Self::GROUP == 4 && Self::HALO == 0;
    /// Whether a packed panel begins with the first values of its accumulators.
    const HEADER: bool;
    /// Whether tiles want words that follow one another along K adjacent in each row of the left operand, and rows
    /// equally far apart.
    const ALONG_K: bool = false;
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

    /// As many adjacent elements as there are lanes.
    ///
    /// # Safety
    /// They are there; the CPU supports the tier.
    #[inline(always)]
    unsafe fn load_elements(from: *const Self::Element) -> RealVector<Self> {
        let mut numbers = [0.0_f32; MOST_LANES];
        // SAFETY: granted by the caller.
        unsafe {
            for (lane, number) in numbers.iter_mut().enumerate().take(Self::LANES) {
                *number = from.add(lane).read_unaligned().real();
            }
            Real::<Self>::load(numbers.as_ptr().cast())
        }
    }
    /// Stores numbers as adjacent elements of a left operand: `LANES / GROUP` words.
    ///
    /// # Safety
    /// There is room for them; the CPU supports the tier.
    #[inline(always)]
    unsafe fn store_elements(to: *mut u32, numbers: RealVector<Self>) {
        let mut from = [0.0_f32; MOST_LANES];
        // SAFETY: granted by the caller.
        unsafe {
            Real::<Self>::store(from.as_mut_ptr().cast(), numbers);
            for (at, numbers) in from[..Self::LANES].chunks(Self::GROUP).enumerate() {
                let mut elements = [Self::Element::default(); 4];
                for (element, &number) in elements.iter_mut().zip(numbers) {
                    *element = Self::Element::nearest(number);
                }
                *to.add(at) = Self::left_word(&elements);
            }
        }
    }
    /// Stores words, of either side, of one element of each of the numbers; of the first only where a word has no more.
    ///
    /// # Safety
    /// There is room for `LANES` words; the CPU supports the tier.
    #[inline(always)]
    unsafe fn store_words(to: *mut u32, numbers: [RealVector<Self>; 2]) {
        let mut from = [[0.0_f32; MOST_LANES]; 2];
        // SAFETY: granted by the caller.
        unsafe {
            for (from, numbers) in from.iter_mut().zip(numbers) {
                Real::<Self>::store(from.as_mut_ptr().cast(), numbers);
            }
            for lane in 0..Self::LANES {
                let mut elements = [Self::Element::default(); 4];
                for (element, from) in elements.iter_mut().zip(&from).take(Self::GROUP) {
                    *element = Self::Element::nearest(from[lane]);
                }
                *to.add(lane) = Self::right_word(&elements);
            }
        }
    }

    /// The word of a left operand that stands for zeros, of these codes.
    ///
    /// # Safety
    /// As for [`Element::zero`].
    #[inline(always)]
    unsafe fn halo(codes: Codes) -> u32 {
        // SAFETY: granted by the caller.
        Self::left_word(&[unsafe { Self::Element::zero(codes) }; 4])
    }
    /// The word of a left operand.
    fn left_word(elements: &[Self::Element; 4]) -> u32;
    /// The word of a right operand.
    fn right_word(elements: &[Self::Element; 4]) -> u32;

    /// The rows of a group as blocks, for tiers that multiply those, whose tile is a row group. Rows whose words are not
    /// adjacent are copied, to a buffer that is taken for them.
    ///
    /// # Safety
    /// There are as many pointers as a group has rows, and the words of each row at the depth's segments may be read.
    #[inline(always)]
    unsafe fn blocks(
        _rows: *const *const u32,
        _outs: *const *mut u32,
        _depth: &Depth<'_>,
        _copies: &mut Option<Buffer>,
    ) -> Option<Blocks> {
        None
    }

    /// Computes a tile of `ROWS_PAIR` rows by two vectors.
    unsafe fn tile_pair(tile: &Tile);
    /// Computes a tile of `ROWS_SINGLE` rows by one vector.
    unsafe fn tile_single(tile: &Tile);
}

/// Implements the two tile entries of [`Lanes`] for a row count of each and optional target features. Tiles of which no more
/// than one or two thirds of the rows count compute only those.
macro_rules! tile_entries {
    ($pair:literal, $single:literal $(, $feature:literal)?) => {
        const ROWS_PAIR: usize = $pair;
        const ROWS_SINGLE: usize = $single;
        unsafe fn tile_pair(tile: &crate::tile::Tile) {
            $(#[target_feature(enable = $feature)])?
            #[allow(unused_unsafe, reason = "needed where the tier has target features")]
            unsafe fn enter<L: Lanes>(tile: &crate::tile::Tile) {
                const LOW: usize = $pair / 3;
                const HALF: usize = $pair * 2 / 3;
                // SAFETY: passed on from the caller.
                unsafe {
                    match tile.live {
                        ..=LOW => crate::tile::tile::<L, LOW, 2>(tile),
                        ..=HALF => crate::tile::tile::<L, HALF, 2>(tile),
                        _ => crate::tile::tile::<L, $pair, 2>(tile),
                    }
                }
            }
            // SAFETY: passed on from the caller.
            unsafe { enter::<Self>(tile) }
        }
        unsafe fn tile_single(tile: &crate::tile::Tile) {
            $(#[target_feature(enable = $feature)])?
            unsafe fn enter<L: Lanes>(tile: &crate::tile::Tile) {
                const LOW: usize = $single / 3;
                const HALF: usize = $single * 2 / 3;
                // SAFETY: passed on from the caller.
                unsafe {
                    match tile.live {
                        ..=LOW => crate::tile::tile::<L, LOW, 1>(tile),
                        ..=HALF => crate::tile::tile::<L, HALF, 1>(tile),
                        _ => crate::tile::tile::<L, $single, 1>(tile),
                    }
                }
            }
            // SAFETY: passed on from the caller.
            unsafe { enter::<Self>(tile) }
        }
    };
}
pub(crate) use tile_entries;

/// bf16 operands as f32 words, for tiers without an instruction for them.
#[derive(Clone, Copy)]
pub(crate) struct Widened<L>(PhantomData<L>);

impl<L: Lanes<Element = f32>> Lanes for Widened<L> {
    type Tier = L::Tier;
    type Element = u16;
    type V = L::V;
    type Single = Self;
    const LANES: usize = L::LANES;
    const GROUP: usize = 1;
    const ROW_GROUP: usize = L::ROW_GROUP;
    const ROWS_PAIR: usize = L::ROWS_PAIR;
    const ROWS_SINGLE: usize = L::ROWS_SINGLE;
    const HALO: u32 = 0;
    const HEADER: bool = false;
    const INTEGER: bool = false;

    #[inline(always)]
    unsafe fn zero() -> Self::V {
        // SAFETY: passed on from the caller.
        unsafe { L::zero() }
    }
    #[inline(always)]
    unsafe fn load(from: *const u32) -> Self::V {
        // SAFETY: passed on from the caller.
        unsafe { L::load(from) }
    }
    #[inline(always)]
    unsafe fn splat(from: *const u32) -> Self::V {
        // SAFETY: passed on from the caller.
        unsafe { L::splat(from) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut u32, value: Self::V) {
        // SAFETY: passed on from the caller.
        unsafe { L::store(to, value) }
    }
    #[inline(always)]
    unsafe fn dot(sum: Self::V, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: passed on from the caller.
        unsafe { L::dot(sum, a, b) }
    }
    #[inline(always)]
    unsafe fn scale(sum: Self::V, _left: *const f32, _right: *const f32) -> Self::V {
        sum
    }
    /// Not rounded: the words hold f32.
    #[inline(always)]
    unsafe fn store_elements(to: *mut u32, numbers: RealVector<Self>) {
        // SAFETY: granted by the caller.
        unsafe { Real::<Self>::store(to, numbers) }
    }
    /// Not rounded, either.
    #[inline(always)]
    unsafe fn store_words(to: *mut u32, [first, _]: [RealVector<Self>; 2]) {
        // SAFETY: granted by the caller.
        unsafe { Real::<Self>::store(to, first) }
    }
    #[inline(always)]
    fn left_word(elements: &[u16; 4]) -> u32 {
        elements[0].real().to_bits()
    }
    #[inline(always)]
    fn right_word(elements: &[u16; 4]) -> u32 {
        elements[0].real().to_bits()
    }
    #[inline(always)]
    unsafe fn tile_pair(tile: &Tile) {
        // SAFETY: passed on from the caller.
        unsafe { L::tile_pair(tile) }
    }
    #[inline(always)]
    unsafe fn tile_single(tile: &Tile) {
        // SAFETY: passed on from the caller.
        unsafe { L::tile_single(tile) }
    }
}

/// Two bf16, first element low.
#[inline(always)]
pub(crate) fn word_of_bf16(elements: &[u16; 4]) -> u32 {
    u32::from(elements[0]) | u32::from(elements[1]) << 16
}

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
