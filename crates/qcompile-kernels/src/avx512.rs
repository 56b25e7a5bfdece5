//! The AVX-512 tiers: 16 lanes, 12 x 32 tiles; int8 by VNNI, bf16 by its own instruction or as f32.

use crate::lanes::{Lanes, Simd, Task, Widened, tile_entries, word_of_bf16, word_of_i8};
use std::arch::x86_64::*;

/// AVX-512 F, BW, VL, DQ and VNNI.
#[derive(Clone, Copy)]
pub(crate) struct Avx512;

impl Simd for Avx512 {
    type Real = Real;
    type Int8 = Int8;
    type Bf16 = Widened<Real>;
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

/// AVX-512 with the BF16 instructions.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Bf16;

impl Simd for Avx512Bf16 {
    type Real = Real;
    type Int8 = Int8;
    type Bf16 = Bf16;
    const FMA: bool = true;

    unsafe fn enter<T: Task>(task: T) {
        #[target_feature(
            enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16"
        )]
        unsafe fn with_features<T: Task>(task: T) {
            // SAFETY: passed on from the caller.
            unsafe { task.run::<Avx512Bf16>() }
        }
        // SAFETY: the caller checked the CPU.
        unsafe { with_features(task) }
    }

    #[inline(always)]
    fn prefetch(address: *const u8) {
        Avx512::prefetch(address);
    }

    #[inline(always)]
    fn prefetch_near(address: *const u8) {
        Avx512::prefetch_near(address);
    }

    #[inline(always)]
    unsafe fn transpose8(src: *const u32, src_stride: usize, dst: *mut u32, dst_stride: usize) {
        // SAFETY: the caller grants both blocks and the CPU.
        unsafe { crate::avx2::transpose8(src, src_stride, dst, dst_stride) }
    }

    #[inline(always)]
    unsafe fn zip(first: *const u16, second: *const u16, count: usize, to: *mut u32) {
        // Positions in the two rows, those of the second from 32 on.
        const LOW: [u16; 32] = zip_order(0, 32);
        const HIGH: [u16; 32] = zip_order(16, 32);
        // SAFETY: the caller grants the rows, the words and the CPU; masks leave out what is beyond.
        unsafe {
            let low = _mm512_loadu_si512(LOW.as_ptr().cast());
            let high = _mm512_loadu_si512(HIGH.as_ptr().cast());
            let mut i = 0;
            while i + 32 <= count {
                let a = _mm512_loadu_si512(first.add(i).cast());
                let b = _mm512_loadu_si512(second.add(i).cast());
                _mm512_storeu_si512(to.add(i).cast(), _mm512_permutex2var_epi16(a, low, b));
                _mm512_storeu_si512(to.add(i + 16).cast(), _mm512_permutex2var_epi16(a, high, b));
                i += 32;
            }
            if i < count {
                let mask = (1_u32 << (count - i)) - 1;
                let a = _mm512_maskz_loadu_epi16(mask, first.add(i).cast());
                let b = _mm512_maskz_loadu_epi16(mask, second.add(i).cast());
                let to = to.add(i).cast();
                _mm512_mask_storeu_epi32(to, mask as u16, _mm512_permutex2var_epi16(a, low, b));
                if mask >> 16 != 0 {
                    let (to, mask) = (to.add(16), (mask >> 16) as u16);
                    _mm512_mask_storeu_epi32(to, mask, _mm512_permutex2var_epi16(a, high, b));
                }
            }
        }
    }
}

/// Pairs from two rows, from position `first` on; the second row begins at position `apart`.
const fn zip_order(first: u16, apart: u16) -> [u16; 32] {
    let mut order = [0; 32];
    let mut i = 0;
    while i < 32 {
        order[i] = first + i as u16 / 2 + if i % 2 == 0 { 0 } else { apart };
        i += 1;
    }
    order
}

#[derive(Clone, Copy)]
pub(crate) struct Real;

impl Lanes for Real {
    type Tier = Avx512;
    type Element = f32;
    type V = __m512;
    type Single = Self;
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
    type Single = Self;
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

/// `vdpbf16ps` takes subnormal numbers for zeros and rounds to nearest even whatever the mode is.
#[derive(Clone, Copy)]
pub(crate) struct Bf16;

impl Lanes for Bf16 {
    type Tier = Avx512Bf16;
    type Element = u16;
    type V = __m512;
    type Single = Widened<Real>;
    const LANES: usize = 16;
    const GROUP: usize = 2;
    const HALO: u32 = 0;
    const HEADER: bool = false;
    const INTEGER: bool = false;
    tile_entries!(12, 12, "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16");

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
        unsafe { _mm512_castsi512_ps(_mm512_set1_epi32(from.cast::<i32>().read_unaligned())) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut u32, value: Self::V) {
        // SAFETY: the caller grants `LANES` words.
        unsafe { _mm512_storeu_ps(to.cast(), value) }
    }
    #[inline(always)]
    unsafe fn dot(sum: Self::V, a: Self::V, b: Self::V) -> Self::V {
        // The instruction can broadcast its last operand from memory, and only that one.
        // SAFETY: the caller checked the CPU; the types differ in name only.
        unsafe {
            let pairs = |v: __m512| std::mem::transmute::<__m512, __m512bh>(v);
            _mm512_dpbf16_ps(sum, pairs(b), pairs(a))
        }
    }
    #[inline(always)]
    unsafe fn scale(sum: Self::V, _left: *const f32, _right: *const f32) -> Self::V {
        sum
    }
    #[inline(always)]
    unsafe fn store_elements(to: *mut u32, numbers: __m512) {
        // SAFETY: the caller checked the CPU and grants the words; the types differ in name only.
        unsafe {
            let narrow = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(numbers));
            _mm256_storeu_si256(to.cast(), narrow);
        }
    }
    #[inline(always)]
    unsafe fn store_words(to: *mut u32, [first, second]: [__m512; 2]) {
        const ORDER: [u16; 32] = zip_order(0, 16);
        // SAFETY: the caller checked the CPU and grants the words; the types differ in name only.
        unsafe {
            let order = _mm512_loadu_si512(ORDER.as_ptr().cast());
            let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first));
            _mm512_storeu_si512(to.cast(), _mm512_permutexvar_epi16(order, both));
        }
    }
    #[inline(always)]
    fn left_word(elements: &[u16; 4]) -> u32 {
        word_of_bf16(elements)
    }
    #[inline(always)]
    fn right_word(elements: &[u16; 4]) -> u32 {
        word_of_bf16(elements)
    }
}
