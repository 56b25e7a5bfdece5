//! Blocks of rows of the left operand.

use super::{BLOCK, DEPTH, ROWS};
use crate::buffer::{Buffer, Slot};
use crate::lanes::{Lanes, Simd};
use crate::pack;
use crate::tile::{Blocks, Depth, Place};
use std::arch::x86_64::{_mm512_maskz_loadu_epi32, _mm512_store_si512};

/// Words from one copied row to the next.
fn pitch(depth: &Depth<'_>) -> usize {
    pack::row_pitch(depth.segments.len() * depth.length)
}

/// How far apart the rows of a block are in bytes, if equally far.
#[inline(always)]
unsafe fn stride_of<T>(pointers: *const *const T) -> Option<isize> {
    // SAFETY: the caller grants a block's pointers.
    let pointers = unsafe { &*pointers.cast::<[*const T; BLOCK]>() };
    let apart = |i: usize| (pointers[i] as isize).wrapping_sub(pointers[i - 1] as isize);
    let stride = apart(1);
    let mut equal = true;
    for i in 2..BLOCK {
        equal &= apart(i) == stride;
    }
    equal.then_some(stride)
}

/// See [`Lanes::blocks`].
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn blocks<L: Lanes>(
    rows: *const *const u32,
    outs: *const *mut u32,
    depth: &Depth<'_>,
    copies: &mut Option<Buffer>,
) -> Blocks {
    let mut blocks = Blocks {
        place: [Place::There; 2],
        first: [std::ptr::null(); 2],
        stride: [0; 2],
        out_stride: [None; 2],
    };
    // SAFETY: granted by the caller.
    unsafe {
        for block in 0..2 {
            blocks.out_stride[block] = stride_of::<u32>(outs.add(block * BLOCK).cast());
            let rows = rows.add(block * BLOCK);
            blocks.first[block] = *rows;
            if depth.step != 1 {
                let room = ROWS * pitch(depth);
                let buffer = copies.get_or_insert_with(|| Buffer::take(Slot::Blocks, room));
                let to = buffer.words().add(block * BLOCK * pitch(depth));
                copy::<L>(rows, depth, to);
                blocks.first[block] = to;
                blocks.stride[block] = (pitch(depth) * 4) as isize;
                blocks.place[block] = Place::Copied;
            } else if let Some(stride) = stride_of(rows) {
                blocks.stride[block] = stride;
            } else {
                blocks.place[block] = Place::Scattered;
            }
        }
    }
    blocks
}

/// Copies `depth` words of each row of a block from `at` on, [`DEPTH`] words apart.
#[inline(always)]
pub(super) unsafe fn gather(rows: *const *const u32, at: isize, depth: usize, to: *mut u32) {
    let words = (u32::MAX >> (32 - depth)) as u16;
    for row in 0..BLOCK {
        // SAFETY: granted by the caller.
        unsafe {
            let from = (*rows.add(row)).wrapping_offset(at);
            let vector = _mm512_maskz_loadu_epi32(words, from.cast());
            _mm512_store_si512(to.add(row * DEPTH).cast(), vector);
        }
    }
}

/// Copies the words of a block's rows, which are not adjacent, all segments one after the other.
#[inline(always)]
unsafe fn copy<L: Lanes>(rows: *const *const u32, depth: &Depth<'_>, to: *mut u32) {
    let pitch = pitch(depth);
    for (s, &segment) in depth.segments.iter().enumerate() {
        for eight in (0..BLOCK).step_by(8) {
            // SAFETY: granted by the caller.
            unsafe {
                let to = to.add(s * depth.length + eight * pitch);
                let rows = rows.add(eight);
                let first = *rows;
                let adjacent = (1..8).all(|row| *rows.add(row) == first.wrapping_add(row));
                let mut word = 0;
                if adjacent && depth.step > 0 {
                    while word + 8 <= depth.length {
                        let from = first.offset(segment + word as isize * depth.step);
                        L::Tier::transpose8(from, depth.step as usize, to.add(word), pitch);
                        word += 8;
                    }
                }
                for word in word..depth.length {
                    for row in 0..8 {
                        let from = (*rows.add(row)).offset(segment + word as isize * depth.step);
                        *to.add(row * pitch + word) = from.read_unaligned();
                    }
                }
            }
        }
    }
}
