//! The AMX tier: bf16 and int8 products by `tdpbf16ps` and `tdpbssd`, which multiply blocks of up to 16 rows by 64
//! bytes; all else is AVX-512.
//!
//! A register tile is 32 x 32 (or 32 x 16): two blocks of 16 rows, each beside two (or one) of the right operand, whose
//! packed panels are laid out as the instructions want it. A block of the left operand is read where it is if its rows
//! are equally far apart and their words adjacent, else from a copy (see [`Place`]).

mod left;
mod registers;

pub(crate) use registers::is_supported;

use crate::avx512;
use crate::buffer::Buffer;
use crate::lanes::{Lanes, Simd, Task, Widened, word_of_bf16, word_of_i8};
use crate::tile::{Blocks, Depth, Place, Start, Tile, tile};
use registers::{Release, configure};
use std::arch::asm;
use std::arch::x86_64::{
    __m512, __m512i, _mm512_dpwssd_epi32, _mm512_slli_epi16, _mm512_srai_epi16,
};
use std::mem::MaybeUninit;

/// Rows of a block.
const BLOCK: usize = 16;
/// Rows of a register tile.
const ROWS: usize = 2 * BLOCK;
/// Words of K that one instruction takes, at most.
const DEPTH: usize = 16;
/// Fewer words at a time than this are not worth an instruction, if there are more.
const LEAST_DEPTH: usize = 8;

/// AVX-512 with BF16, and AMX.
#[derive(Clone, Copy)]
pub(crate) struct Amx;

impl Simd for Amx {
    type Real = avx512::Real;
    type Int8 = Int8;
    type Bf16 = Bf16;
    const FMA: bool = true;
    // So many lines keep those of the next tiles waiting.
    const FETCHES_WRITES: bool = false;

    unsafe fn enter<T: Task>(task: T) {
        #[target_feature(
            enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16"
        )]
        unsafe fn with_features<T: Task>(task: T) {
            // SAFETY: passed on from the caller.
            unsafe { task.run::<Amx>() }
        }
        let _release = Release;
        // SAFETY: the caller checked the CPU.
        unsafe { with_features(task) }
    }

    #[inline(always)]
    fn prefetch(address: *const u8) {
        avx512::Avx512::prefetch(address);
    }

    #[inline(always)]
    fn prefetch_near(address: *const u8) {
        avx512::Avx512::prefetch_near(address);
    }

    #[inline(always)]
    unsafe fn transpose8(src: *const u32, src_stride: usize, dst: *mut u32, dst_stride: usize) {
        // SAFETY: the caller grants both blocks and the CPU.
        unsafe { crate::avx2::transpose8(src, src_stride, dst, dst_stride) }
    }

    #[inline(always)]
    unsafe fn zip(first: *const u16, second: *const u16, count: usize, to: *mut u32) {
        // SAFETY: passed on from the caller.
        unsafe { avx512::Avx512Bf16::zip(first, second, count, to) }
    }
}

/// Runs an instruction on tile registers and rows in memory.
macro_rules! move_tile {
    ($text:literal, $rows:expr) => {
        asm!($text, r = in(reg) $rows.first, s = in(reg) $rows.stride, options(nostack, preserves_flags))
    };
}

/// Lanes whose single vectors are those of AVX-512 and whose tiles are multiplied by AMX.
macro_rules! amx_lanes {
    ($name:ident, $under:ty, $v:ty, $element:ty, $instruction:literal, { $($own:tt)* }) => {
        #[derive(Clone, Copy)]
        pub(crate) struct $name;

        impl Lanes for $name {
            type Tier = Amx;
            type Element = $element;
            type V = $v;
            const LANES: usize = <$under>::LANES;
            const GROUP: usize = <$under>::GROUP;
            const ROW_GROUP: usize = ROWS;
            const ROWS_PAIR: usize = ROWS;
            const ROWS_SINGLE: usize = ROWS;
            const UNROLL: usize = <$under>::UNROLL;
            const HALO: u32 = 0;
            const HEADER: bool = <$under>::HEADER;
            const ALONG_K: bool = true;
            const INTEGER: bool = <$under>::INTEGER;
            $($own)*

            #[inline(always)]
            unsafe fn zero() -> Self::V {
                // SAFETY: passed on from the caller.
                unsafe { <$under>::zero() }
            }
            #[inline(always)]
            unsafe fn load(from: *const u32) -> Self::V {
                // SAFETY: passed on from the caller.
                unsafe { <$under>::load(from) }
            }
            #[inline(always)]
            unsafe fn splat(from: *const u32) -> Self::V {
                // SAFETY: passed on from the caller.
                unsafe { <$under>::splat(from) }
            }
            #[inline(always)]
            unsafe fn store(to: *mut u32, value: Self::V) {
                // SAFETY: passed on from the caller.
                unsafe { <$under>::store(to, value) }
            }
            #[inline(always)]
            unsafe fn scale(sum: Self::V, left: *const f32, right: *const f32) -> Self::V {
                // SAFETY: passed on from the caller.
                unsafe { <$under>::scale(sum, left, right) }
            }
            #[inline(always)]
            unsafe fn blocks(
                rows: *const *const u32,
                outs: *const *mut u32,
                depth: &Depth<'_>,
                copies: &mut Option<Buffer>,
            ) -> Option<Blocks> {
                // SAFETY: passed on from the caller.
                Some(unsafe { left::blocks::<Self>(rows, outs, depth, copies) })
            }
            unsafe fn tile_pair(tile: &Tile) {
                // SAFETY: passed on from the caller.
                unsafe { product::<Self, 2>(tile) }
            }
            unsafe fn tile_single(tile: &Tile) {
                // SAFETY: passed on from the caller.
                unsafe { product::<Self, 1>(tile) }
            }
        }

        impl Multiply for $name {
            #[inline(always)]
            unsafe fn first<const N: usize>(left: Rows, right: *const u32) {
                // SAFETY: the caller grants the rows and the panel, and configured the registers.
                unsafe {
                    if N == 2 {
                        asm!(
                            "tileloadd tmm4, [{a} + {s}*1]",
                            // A panel is read once for each tile, and would push the left operand out of L1.
                            "tileloaddt1 tmm6, [{r} + {p}*1]",
                            concat!($instruction, " tmm0, tmm4, tmm6"),
                            "tileloaddt1 tmm7, [{r} + {p}*1 + 64]",
                            concat!($instruction, " tmm1, tmm4, tmm7"),
                            a = in(reg) left.first,
                            s = in(reg) left.stride,
                            r = in(reg) right,
                            p = in(reg) 128_usize,
                            options(nostack, preserves_flags, readonly),
                        );
                    } else {
                        asm!(
                            "tileloadd tmm4, [{a} + {s}*1]",
                            "tileloadd tmm6, [{r} + {p}*1]",
                            concat!($instruction, " tmm0, tmm4, tmm6"),
                            a = in(reg) left.first,
                            s = in(reg) left.stride,
                            r = in(reg) right,
                            p = in(reg) 64_usize,
                            options(nostack, preserves_flags, readonly),
                        );
                    }
                }
            }
            #[inline(always)]
            unsafe fn second<const N: usize>(left: Rows) {
                // SAFETY: the caller grants the rows, configured the registers and loaded the right operand.
                unsafe {
                    move_tile!("tileloadd tmm5, [{r} + {s}*1]", left);
                    asm!(concat!($instruction, " tmm2, tmm5, tmm6"), options(nostack, preserves_flags, nomem));
                    if N == 2 {
                        asm!(concat!($instruction, " tmm3, tmm5, tmm7"), options(nostack, preserves_flags, nomem));
                    }
                }
            }
        }
    };
}

amx_lanes!(Bf16, avx512::Bf16, __m512, u16, "tdpbf16ps", {
    type Single = Widened<avx512::Real>;
    #[inline(always)]
    unsafe fn dot(sum: __m512, a: __m512, b: __m512) -> __m512 {
        // SAFETY: passed on from the caller.
        unsafe { avx512::Bf16::dot(sum, a, b) }
    }
    #[inline(always)]
    fn left_word(elements: &[u16; 4]) -> u32 {
        word_of_bf16(elements)
    }
    #[inline(always)]
    fn right_word(elements: &[u16; 4]) -> u32 {
        word_of_bf16(elements)
    }
});
amx_lanes!(Int8, avx512::Int8, __m512i, i8, "tdpbssd", {
    type Single = Self;
    /// AVX-512 multiplies signed bytes by unsigned ones only, and signed words by signed ones.
    #[inline(always)]
    unsafe fn dot(sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: the caller checked the CPU.
        unsafe {
            let even = |v: __m512i| _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(v));
            let odd = |v: __m512i| _mm512_srai_epi16::<8>(v);
            let sum = _mm512_dpwssd_epi32(sum, even(a), even(b));
            _mm512_dpwssd_epi32(sum, odd(a), odd(b))
        }
    }
    #[inline(always)]
    fn left_word(elements: &[i8; 4]) -> u32 {
        word_of_i8(elements)
    }
    #[inline(always)]
    fn right_word(elements: &[i8; 4]) -> u32 {
        word_of_i8(elements)
    }
});

/// Rows that are equally far apart.
#[derive(Clone, Copy)]
struct Rows {
    first: *const u32,
    /// In bytes.
    stride: isize,
}

/// The products of blocks, added to the sums.
trait Multiply: Lanes {
    /// The first block of the left operand with `N` of the right one.
    unsafe fn first<const N: usize>(left: Rows, right: *const u32);
    /// The second block with those of the right one that [`Multiply::first`] read.
    unsafe fn second<const N: usize>(left: Rows);
}

/// How K is gone through: so many words at a time, and so many at the end of each segment by other means.
fn depth_of(length: usize) -> (usize, usize) {
    let divisor = (1..=DEPTH.min(length)).rev().find(|&depth| length.is_multiple_of(depth));
    match divisor {
        Some(depth) if depth >= LEAST_DEPTH || length <= DEPTH => (depth, 0),
        _ => (DEPTH, length % DEPTH),
    }
}

/// Room for a block of the result or of the left operand that is not where it is wanted.
#[repr(C, align(64))]
struct Staging<const WORDS: usize>(MaybeUninit<[u32; WORDS]>);

impl<const WORDS: usize> Staging<WORDS> {
    const NEW: Self = Staging(MaybeUninit::uninit());

    fn words(&mut self) -> *mut u32 {
        self.0.as_mut_ptr().cast()
    }
}

/// Computes `ROWS` rows by `N` vectors, or the first block of them if no other counts; always stores whole vectors.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")]
unsafe fn product<L: Multiply, const N: usize>(t: &Tile) {
    // SAFETY: granted by the caller: all pointers of the tile are valid for its sizes, and the CPU has the tier.
    unsafe {
        let (depth, tail) = depth_of(t.length);
        if t.length == 0 || t.segment_count == 0 {
            tile::<L, ROWS, N>(t);
            return;
        }
        configure(depth);
        if let Some(blocks) = t.blocks {
            block_product::<L, N>(t, &blocks, depth, tail);
            return;
        }
        let segments = std::slice::from_raw_parts(t.segments, t.segment_count);
        let of = Depth { segments, length: t.length, step: t.step, ..Depth::default() };
        let mut copies = None;
        let blocks = left::blocks::<L>(t.rows, t.outs, &of, &mut copies);
        block_product::<L, N>(t, &blocks, depth, tail);
    }
}

/// Computes a tile with its rows as blocks.
#[inline(always)]
unsafe fn block_product<L: Multiply, const N: usize>(
    t: &Tile,
    blocks: &Blocks,
    depth: usize,
    tail: usize,
) {
    let both = t.live > BLOCK;
    // SAFETY: passed on from the caller.
    unsafe {
        // Where sums are read and stored: in place, or beside it.
        let scaled = L::INTEGER && t.scales.is_some() && tail == 0;
        let mut beside = Staging::<{ ROWS * 32 }>::NEW;
        let beside = beside.words();
        let place = match blocks.out_stride {
            [Some(first), Some(second)] if !scaled => {
                let of = |row: usize, stride| Rows {
                    first: (*t.outs.add(row)).wrapping_add(t.column).cast_const(),
                    stride,
                };
                Some([of(0, first), of(BLOCK, second)])
            }
            _ => None,
        };
        let stored = place.unwrap_or_else(|| {
            let first = beside.cast_const();
            let stride = (N * 64) as isize;
            [Rows { first, stride }, Rows { first: first.add(BLOCK * N * 16), stride }]
        });
        let rows = if both { ROWS } else { BLOCK };
        match t.start {
            Start::Zero => zero(),
            Start::Header(header) => load::<N>([Rows { first: header, stride: 0 }; 2], both),
            Start::Resume => {
                if place.is_none() {
                    for i in 0..rows {
                        let from = (*t.outs.add(i)).add(t.column);
                        let to = beside.add(i * N * 16);
                        std::ptr::copy_nonoverlapping(from, to, N * 16);
                    }
                }
                load::<N>(stored, both);
            }
        }
        if both {
            multiply_all::<L, N, true>(t, blocks, depth, t.length - tail);
        } else {
            multiply_all::<L, N, false>(t, blocks, depth, t.length - tail);
        }
        store::<N>(stored, both);
        if place.is_none() {
            for i in 0..rows {
                let to = (*t.outs.add(i)).add(t.column);
                for j in 0..N {
                    let from = beside.add((i * N + j) * 16);
                    let mut sum = L::load(from);
                    if let Some(scales) = t.scales.filter(|_| scaled) {
                        let right = scales.right.add(t.column + j * L::LANES);
                        sum = L::scale(sum, scales.left.add(i), right);
                    }
                    L::store(to.add(j * L::LANES), sum);
                }
            }
        }
        if tail > 0 {
            rest::<L, N>(t, tail);
        }
    }
}

/// Adds the products of the first `whole` words of all segments, `depth` at a time.
#[inline(always)]
unsafe fn multiply_all<L: Multiply, const N: usize, const BOTH: bool>(
    t: &Tile,
    blocks: &Blocks,
    depth: usize,
    whole: usize,
) {
    // SAFETY: granted by the caller.
    unsafe {
        let mut gathered = Staging::<{ ROWS * DEPTH }>::NEW;
        let gathered = gathered.words();
        let (mut ahead, lines) = t.ahead;
        let mut right = t.right;
        for s in 0..t.segment_count {
            for _ in 0..lines {
                L::Tier::prefetch(ahead);
                ahead = ahead.wrapping_add(64);
            }
            let mut at = *t.segments.add(s);
            let mut left = [0, 1].map(|block: usize| Rows {
                first: blocks.first[block].wrapping_offset(match blocks.place[block] {
                    Place::Copied => (s * t.length) as isize,
                    Place::There | Place::Scattered => at,
                }),
                stride: blocks.stride[block],
            });
            for _ in (0..whole).step_by(depth) {
                let mut rows = left;
                for (block, rows) in rows.iter_mut().take(if BOTH { 2 } else { 1 }).enumerate() {
                    if blocks.place[block] == Place::Scattered {
                        let to = gathered.add(block * BLOCK * DEPTH);
                        left::gather(t.rows.add(block * BLOCK), at, depth, to);
                        *rows = Rows { first: to, stride: (DEPTH * 4) as isize };
                    }
                }
                L::first::<N>(rows[0], right);
                if BOTH {
                    L::second::<N>(rows[1]);
                }
                at += depth as isize;
                left = left.map(|rows| Rows { first: rows.first.wrapping_add(depth), ..rows });
                right = right.add(depth * N * L::LANES);
            }
            right = right.add((t.length - whole) * N * L::LANES);
        }
    }
}

/// Adds the last `tail` words of each segment to what the output holds.
#[inline(always)]
unsafe fn rest<L: Multiply, const N: usize>(t: &Tile, tail: usize) {
    let whole = t.length - tail;
    for s in 0..t.segment_count {
        // SAFETY: granted by the caller: the segment's words lie in the rows and in the panel.
        unsafe {
            let segment = *t.segments.add(s) + whole as isize * t.step;
            let last = s + 1 == t.segment_count;
            tile::<L, ROWS, N>(&Tile {
                segments: &raw const segment,
                segment_count: 1,
                length: tail,
                right: t.right.add((s * t.length + whole) * N * L::LANES),
                start: Start::Resume,
                scales: t.scales.filter(|_| last),
                ahead: (std::ptr::null(), 0),
                ..*t
            });
        }
    }
}

/// Makes the sums zeros.
#[inline(always)]
unsafe fn zero() {
    // SAFETY: the caller configured the registers.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            options(nostack, preserves_flags, nomem),
        );
    }
}

/// Reads the sums of the first block, or of both.
#[inline(always)]
unsafe fn load<const N: usize>([first, second]: [Rows; 2], both: bool) {
    // SAFETY: the caller grants the rows and configured the registers.
    unsafe {
        move_tile!("tileloadd tmm0, [{r} + {s}*1]", first);
        if N == 2 {
            move_tile!("tileloadd tmm1, [{r} + {s}*1 + 64]", first);
        }
        if both {
            move_tile!("tileloadd tmm2, [{r} + {s}*1]", second);
            if N == 2 {
                move_tile!("tileloadd tmm3, [{r} + {s}*1 + 64]", second);
            }
        }
    }
}

/// Writes the sums of the first block, or of both.
#[inline(always)]
unsafe fn store<const N: usize>([first, second]: [Rows; 2], both: bool) {
    // SAFETY: the caller grants the rows and configured the registers.
    unsafe {
        move_tile!("tilestored [{r} + {s}*1], tmm0", first);
        if N == 2 {
            move_tile!("tilestored [{r} + {s}*1 + 64], tmm1", first);
        }
        if both {
            move_tile!("tilestored [{r} + {s}*1], tmm2", second);
            if N == 2 {
                move_tile!("tilestored [{r} + {s}*1 + 64], tmm3", second);
            }
        }
    }
}
