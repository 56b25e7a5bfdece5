//! The AVX2 + FMA tier: 8 lanes, 6 x 16 tiles; int8 as pairs of i16 (no saturation anywhere).

use crate::lanes::{Lanes, Simd, Task, Widened, tile_entries, word_of_i16};
use std::arch::x86_64::*;

/// AVX2 and FMA.
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

impl Simd for Avx2 {
    type Real = Real;
    type Int8 = Int8;
    type Bf16 = Widened<Real>;
    const FMA: bool = true;

    unsafe fn enter<T: Task>(task: T) {
        #[target_feature(enable = "avx2,fma")]
        unsafe fn with_features<T: Task>(task: T) {
            // SAFETY: passed on from the caller.
            unsafe { task.run::<Avx2>() }
        }
        // SAFETY: the caller checked the CPU.
        unsafe { with_features(task) }
    }

    #[inline(always)]
    fn prefetch(address: *const u8) {
        // SAFETY: a hint, which faults nowhere; every x86-64 CPU has the instruction.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
    }

    #[inline(always)]
    fn prefetch_near(address: *const u8) {
        // SAFETY: a hint, which faults nowhere; every x86-64 CPU has the instruction.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }

    #[inline(always)]
    unsafe fn transpose8(src: *const u32, src_stride: usize, dst: *mut u32, dst_stride: usize) {
        // SAFETY: the caller grants both blocks and the CPU.
        unsafe { transpose8(src, src_stride, dst, dst_stride) }
    }
}

/// Transposes 8 x 8 words in registers.
///
/// # Safety
/// As [`Simd::transpose8`].
#[inline(always)]
pub(crate) unsafe fn transpose8(
    src: *const u32,
    src_stride: usize,
    dst: *mut u32,
    dst_stride: usize,
) {
    // SAFETY: the caller grants both blocks and the CPU.
    unsafe {
        let row = |i: usize| _mm256_loadu_ps(src.add(i * src_stride).cast());
        let r = [row(0), row(1), row(2), row(3), row(4), row(5), row(6), row(7)];
        // Pairs of rows, then quadruples, then the two 128-bit halves.
        let a0 = _mm256_unpacklo_ps(r[0], r[1]);
        let a1 = _mm256_unpackhi_ps(r[0], r[1]);
        let a2 = _mm256_unpacklo_ps(r[2], r[3]);
        let a3 = _mm256_unpackhi_ps(r[2], r[3]);
        let a4 = _mm256_unpacklo_ps(r[4], r[5]);
        let a5 = _mm256_unpackhi_ps(r[4], r[5]);
        let a6 = _mm256_unpacklo_ps(r[6], r[7]);
        let a7 = _mm256_unpackhi_ps(r[6], r[7]);
        let b0 = _mm256_shuffle_ps::<0x44>(a0, a2);
        let b1 = _mm256_shuffle_ps::<0xee>(a0, a2);
        let b2 = _mm256_shuffle_ps::<0x44>(a1, a3);
        let b3 = _mm256_shuffle_ps::<0xee>(a1, a3);
        let b4 = _mm256_shuffle_ps::<0x44>(a4, a6);
        let b5 = _mm256_shuffle_ps::<0xee>(a4, a6);
        let b6 = _mm256_shuffle_ps::<0x44>(a5, a7);
        let b7 = _mm256_shuffle_ps::<0xee>(a5, a7);
        let put = |j: usize, v: __m256| _mm256_storeu_ps(dst.add(j * dst_stride).cast(), v);
        put(0, _mm256_permute2f128_ps::<0x20>(b0, b4));
        put(1, _mm256_permute2f128_ps::<0x20>(b1, b5));
        put(2, _mm256_permute2f128_ps::<0x20>(b2, b6));
        put(3, _mm256_permute2f128_ps::<0x20>(b3, b7));
        put(4, _mm256_permute2f128_ps::<0x31>(b0, b4));
        put(5, _mm256_permute2f128_ps::<0x31>(b1, b5));
        put(6, _mm256_permute2f128_ps::<0x31>(b2, b6));
        put(7, _mm256_permute2f128_ps::<0x31>(b3, b7));
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Real;

impl Lanes for Real {
    type Tier = Avx2;
    type Element = f32;
    type V = __m256;
    type Single = Self;
    const LANES: usize = 8;
    const GROUP: usize = 1;
    const HALO: u32 = 0;
    const HEADER: bool = false;
    const INTEGER: bool = false;
    tile_entries!(6, 12, "avx2,fma");

    #[inline(always)]
    unsafe fn zero() -> Self::V {
        // SAFETY: the caller checked the CPU.
        unsafe { _mm256_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn load(from: *const u32) -> Self::V {
        // SAFETY: the caller grants `LANES` words.
        unsafe { _mm256_loadu_ps(from.cast()) }
    }
    #[inline(always)]
    unsafe fn splat(from: *const u32) -> Self::V {
        // SAFETY: the caller grants one word.
        unsafe { _mm256_set1_ps(from.cast::<f32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut u32, value: Self::V) {
        // SAFETY: the caller grants `LANES` words.
        unsafe { _mm256_storeu_ps(to.cast(), value) }
    }
    #[inline(always)]
    unsafe fn dot(sum: Self::V, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the caller checked the CPU.
        unsafe { _mm256_fmadd_ps(a, b, sum) }
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
    type Tier = Avx2;
    type Element = i8;
    type V = __m256i;
    type Single = Self;
    const LANES: usize = 8;
    const GROUP: usize = 2;
    const HALO: u32 = 0;
    const HEADER: bool = true;
    const INTEGER: bool = true;
    tile_entries!(6, 12, "avx2,fma");

    #[inline(always)]
    unsafe fn zero() -> Self::V {
        // SAFETY: the caller checked the CPU.
        unsafe { _mm256_setzero_si256() }
    }
    #[inline(always)]
    unsafe fn load(from: *const u32) -> Self::V {
        // SAFETY: the caller grants `LANES` words.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }
    #[inline(always)]
    unsafe fn splat(from: *const u32) -> Self::V {
        // SAFETY: the caller grants one word.
        unsafe { _mm256_set1_epi32(from.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut u32, value: Self::V) {
        // SAFETY: the caller grants `LANES` words.
        unsafe { _mm256_storeu_si256(to.cast(), value) }
    }
    #[inline(always)]
    unsafe fn dot(sum: Self::V, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the caller checked the CPU.
        unsafe { _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)) }
    }
    #[inline(always)]
    unsafe fn scale(sum: Self::V, left: *const f32, right: *const f32) -> Self::V {
        // SAFETY: the caller grants one value on the left, `LANES` on the right.
        unsafe {
            let factor = _mm256_mul_ps(_mm256_set1_ps(*left), _mm256_loadu_ps(right));
            _mm256_castps_si256(_mm256_mul_ps(_mm256_cvtepi32_ps(sum), factor))
        }
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
