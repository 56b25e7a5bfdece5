//! The widths and word formats of AVX-512 on plain arrays, so that its algorithms run on any CPU.

use crate::Kernels;
use crate::lanes::{Element, Lanes, Simd, Task, Widened, tile_entries, word_of_bf16, word_of_i8};

#[derive(Clone, Copy)]
pub(crate) struct Emulated;

pub(crate) static TABLE: Kernels = crate::table::<Emulated>(crate::Tier::Avx512Bf16);

impl Simd for Emulated {
    type Real = Real;
    type Int8 = Int8;
    type Bf16 = Bf16;
    const FMA: bool = false;
    unsafe fn enter<T: Task>(task: T) {
        // SAFETY: passed on from the caller.
        unsafe { task.run::<Self>() }
    }
}

macro_rules! array_operations {
    ($element:ty) => {
        #[inline(always)]
        unsafe fn zero() -> Self::V {
            [<$element>::default(); 16]
        }
        #[inline(always)]
        unsafe fn load(from: *const u32) -> Self::V {
            // SAFETY: the caller grants the words.
            unsafe { from.cast::<Self::V>().read_unaligned() }
        }
        #[inline(always)]
        unsafe fn splat(from: *const u32) -> Self::V {
            // SAFETY: the caller grants the word.
            [unsafe { from.cast::<$element>().read_unaligned() }; 16]
        }
        #[inline(always)]
        unsafe fn store(to: *mut u32, value: Self::V) {
            // SAFETY: the caller grants the words.
            unsafe { to.cast::<Self::V>().write_unaligned(value) }
        }
    };
}

#[derive(Clone, Copy)]
pub(crate) struct Real;

impl Lanes for Real {
    type Tier = Emulated;
    type Element = f32;
    type V = [f32; 16];
    type Single = Self;
    const LANES: usize = 16;
    const GROUP: usize = 1;
    const HALO: u32 = 0;
    const HEADER: bool = false;
    const INTEGER: bool = false;
    tile_entries!(12, 12);
    array_operations!(f32);
    #[inline(always)]
    unsafe fn dot(sum: Self::V, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|l| sum[l] + a[l] * b[l])
    }
    #[inline(always)]
    unsafe fn scale(sum: Self::V, _left: *const f32, _right: *const f32) -> Self::V {
        sum
    }
    fn left_word(elements: &[f32; 4]) -> u32 {
        elements[0].to_bits()
    }
    fn right_word(elements: &[f32; 4]) -> u32 {
        elements[0].to_bits()
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Int8;

impl Lanes for Int8 {
    type Tier = Emulated;
    type Element = i8;
    type V = [u32; 16];
    type Single = Self;
    const LANES: usize = 16;
    const GROUP: usize = 4;
    const HALO: u32 = 0x8080_8080;
    const HEADER: bool = true;
    const INTEGER: bool = true;
    tile_entries!(12, 12);
    array_operations!(u32);
    #[inline(always)]
    unsafe fn dot(sum: Self::V, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|l| {
            let (a, b) = (a[l].to_le_bytes(), b[l].to_le_bytes());
            let products = (0..4).map(|i| i32::from(a[i]) * i32::from(b[i] as i8));
            sum[l].wrapping_add(products.sum::<i32>() as u32)
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
    fn left_word(elements: &[i8; 4]) -> u32 {
        word_of_i8(elements) ^ Self::HALO
    }
    fn right_word(elements: &[i8; 4]) -> u32 {
        word_of_i8(elements)
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Bf16;

impl Lanes for Bf16 {
    type Tier = Emulated;
    type Element = u16;
    type V = [u32; 16];
    type Single = Widened<Real>;
    const LANES: usize = 16;
    const GROUP: usize = 2;
    const HALO: u32 = 0;
    const HEADER: bool = false;
    const INTEGER: bool = false;
    tile_entries!(12, 12);
    array_operations!(u32);
    #[inline(always)]
    unsafe fn dot(sum: Self::V, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|l| {
            let product =
                |shift: u32| ((a[l] >> shift) as u16).real() * ((b[l] >> shift) as u16).real();
            (f32::from_bits(sum[l]) + product(16) + product(0)).to_bits()
        })
    }
    #[inline(always)]
    unsafe fn scale(sum: Self::V, _left: *const f32, _right: *const f32) -> Self::V {
        sum
    }
    fn left_word(elements: &[u16; 4]) -> u32 {
        word_of_bf16(elements)
    }
    fn right_word(elements: &[u16; 4]) -> u32 {
        word_of_bf16(elements)
    }
}
