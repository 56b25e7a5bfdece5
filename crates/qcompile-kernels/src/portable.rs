//! The tier of plain Rust: short arrays that the compiler vectorizes as far as the target allows.

use crate::lanes::{Lanes, Simd, Task, Widened, tile_entries, word_of_i16};

/// Plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

impl Simd for Portable {
    type Real = Real;
    type Int8 = Int8;
    type Bf16 = Widened<Real>;
    const FMA: bool = false;

    unsafe fn enter<T: Task>(task: T) {
        // SAFETY: passed on from the caller.
        unsafe { task.run::<Self>() }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Real;

impl Lanes for Real {
    type Tier = Portable;
    type Element = f32;
    type V = [f32; 4];
    type Single = Self;
    const LANES: usize = 4;
    const GROUP: usize = 1;
    const HALO: u32 = 0;
    const HEADER: bool = false;
    const INTEGER: bool = false;
    tile_entries!(4, 8);

    #[inline(always)]
    unsafe fn zero() -> Self::V {
        [0.0; 4]
    }
    #[inline(always)]
    unsafe fn load(from: *const u32) -> Self::V {
        // SAFETY: the caller grants `LANES` words.
        unsafe { from.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn splat(from: *const u32) -> Self::V {
        // SAFETY: the caller grants one word.
        [unsafe { from.cast::<f32>().read_unaligned() }; 4]
    }
    #[inline(always)]
    unsafe fn store(to: *mut u32, value: Self::V) {
        // SAFETY: the caller grants `LANES` words.
        unsafe { to.cast::<Self::V>().write_unaligned(value) }
    }
    #[inline(always)]
    unsafe fn dot(sum: Self::V, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|l| sum[l] + a[l] * b[l])
    }
    #[inline(always)]
    unsafe fn scale(sum: Self::V, _left: *const f32, _right: *const f32) -> Self::V {
        sum
    }
    #[inline(always)]
    fn left_word(elements: &[f32; 4]) -> u32 {
        elements[0].to_bits()
    }
    #[inline(always)]
    fn right_word(elements: &[f32; 4]) -> u32 {
        elements[0].to_bits()
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Int8;

impl Lanes for Int8 {
    type Tier = Portable;
    type Element = i8;
    type V = [u32; 4];
    type Single = Self;
    const LANES: usize = 4;
    const GROUP: usize = 2;
    const HALO: u32 = 0;
    const HEADER: bool = true;
    const INTEGER: bool = true;
    tile_entries!(4, 8);

    #[inline(always)]
    unsafe fn zero() -> Self::V {
        [0; 4]
    }
    #[inline(always)]
    unsafe fn load(from: *const u32) -> Self::V {
        // SAFETY: the caller grants `LANES` words.
        unsafe { from.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn splat(from: *const u32) -> Self::V {
        // SAFETY: the caller grants one word.
        [unsafe { from.read_unaligned() }; 4]
    }
    #[inline(always)]
    unsafe fn store(to: *mut u32, value: Self::V) {
        // SAFETY: the caller grants `LANES` words.
        unsafe { to.cast::<Self::V>().write_unaligned(value) }
    }
    #[inline(always)]
    unsafe fn dot(sum: Self::V, a: Self::V, b: Self::V) -> Self::V {
        let half = |word: u32, shift: u32| i32::from((word >> shift) as u16 as i16);
        std::array::from_fn(|l| {
            let low = half(a[l], 0) * half(b[l], 0);
            let high = half(a[l], 16) * half(b[l], 16);
            sum[l].wrapping_add((low + high) as u32)
        })
    }
    #[inline(always)]
    unsafe fn scale(sum: Self::V, left: *const f32, right: *const f32) -> Self::V {
        std::array::from_fn(|l| {
            // SAFETY: the caller grants one value on the left, `LANES` on the right.
            let factor = unsafe { *left * *right.add(l) };
            (sum[l] as i32 as f32 * factor).to_bits()
        })
    }
    #[inline(always)]
    fn left_word(elements: &[i8; 4]) -> u32 {
        word_of_i16(elements)
    }
    #[inline(always)]
    fn right_word(elements: &[i8; 4]) -> u32 {
        word_of_i16(elements)
    }
}
