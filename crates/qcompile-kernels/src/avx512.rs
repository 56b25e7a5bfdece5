//! The AVX-512 tier: 16 lanes, 12 x 32 tiles; int8 by VNNI.

use crate::lanes::{Lanes, Simd, Task, tile_entries, word_of_i8};
use std::arch::x86_64::*;

/// AVX-512 F, BW, VL, DQ and VNNI.
#[derive(Clone, Copy)]
pub(crate) struct Avx512;

impl Simd for Avx512 {
    type Real = Real;
    type Int8 = Int8;
    const FMA: bool = true;

    unsafe fn enter<T: Task>(task: T) {
        #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
        unsafe fn with_features<T: Task>(task: T) {
            // SAFETY: passed on from the caller.
            unsafe { task.run::<Avx512>() }
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
        unsafe { crate::avx2::transpose8(src, src_stride, dst, dst_stride) }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Real;

impl Lanes for Real {
    type Tier = Avx512;
    type Element = f32;
    type V = __m512;
    const LANES: usize = 16;
    const GROUP: usize = 1;
    const HALO: u32 = 0;
    const HEADER: bool = false;
    const INTEGER: bool = false;
    tile_entries!(12, 12, "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni");

    #[inline(always)]
    unsafe fn zero() -> Self::V {
        // SAFETY: the caller checked the CPU.
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn load(from: *const u32) -> Self::V {
        // SAFETY: the caller grants `LANES` words.
        unsafe { _mm512_loadu_ps(from.cast()) }
    }
    #[inline(always)]
    unsafe fn splat(from: *const u32) -> Self::V {
        // SAFETY: the caller grants one word.
        unsafe { _mm512_set1_ps(from.cast::<f32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut u32, value: Self::V) {
        // SAFETY: the caller grants `LANES` words.
        unsafe { _mm512_storeu_ps(to.cast(), value) }
    }
    #[inline(always)]
    unsafe fn dot(sum: Self::V, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the caller checked the CPU.
        unsafe { _mm512_fmadd_ps(a, b, sum) }
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

/// `vpdpbusd` multiplies u8 by i8: the left operand is stored with 128 added, and the header of a
/// panel takes `128 * sum(right)` off again.
#[derive(Clone, Copy)]
pub(crate) struct Int8;

impl Lanes for Int8 {
    type Tier = Avx512;
    type Element = i8;
    type V = __m512i;
    const LANES: usize = 16;
    const GROUP: usize = 4;
    const HALO: u32 = 0x8080_8080;
    const HEADER: bool = true;
    const INTEGER: bool = true;
    const UNROLL: usize = 4;
    tile_entries!(12, 12, "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni");

    #[inline(always)]
    unsafe fn zero() -> Self::V {
        // SAFETY: the caller checked the CPU.
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    unsafe fn load(from: *const u32) -> Self::V {
        // SAFETY: the caller grants `LANES` words.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn splat(from: *const u32) -> Self::V {
        // SAFETY: the caller grants one word.
        unsafe { _mm512_set1_epi32(from.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut u32, value: Self::V) {
        // SAFETY: the caller grants `LANES` words.
        unsafe { _mm512_storeu_si512(to.cast(), value) }
    }
    #[inline(always)]
    unsafe fn dot(sum: Self::V, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the caller checked the CPU.
        unsafe { _mm512_dpbusd_epi32(sum, a, b) }
    }
    #[inline(always)]
    unsafe fn scale(sum: Self::V, left: *const f32, right: *const f32) -> Self::V {
        // SAFETY: the caller grants one value on the left, `LANES` on the right.
        unsafe {
            let factor = _mm512_mul_ps(_mm512_set1_ps(*left), _mm512_loadu_ps(right));
            _mm512_castps_si512(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), factor))
        }
    }
    #[inline(always)]
    fn left_word(elements: &[i8; 4]) -> u32 {
        word_of_i8(elements) ^ Self::HALO
    }
    #[inline(always)]
    fn right_word(elements: &[i8; 4]) -> u32 {
        word_of_i8(elements)
    }
}
