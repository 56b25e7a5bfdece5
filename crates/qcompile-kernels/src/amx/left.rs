//! Blocks of rows of the left operand.

use super::{BLOCK, ROWS};
use crate::lanes::{Lanes, Simd};
use crate::pack;
use crate::tile::{Blocks, Depth};
use std::arch::x86_64::{_mm512_mask_storeu_epi32, _mm512_maskz_loadu_epi32};

/// Words of a vector.
const VECTOR: usize = 16;

/// Words from one copied row to the next.
fn pitch(depth: &Depth<'_>) -> usize {
    pack::row_pitch(depth.segments.len() * depth.length)
}

/// Words that [`blocks`] may copy.
pub(super) fn room(depth: &Depth<'_>) -> usize {
    ROWS * pitch(depth)
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
#[inline(always)]
pub(super) unsafe fn blocks<L: Lanes>(
    rows: *const *const u32,
    outs: *const *mut u32,
    depth: &Depth<'_>,
    copies: *mut u32,
) -> Blocks {
    let mut blocks =
        Blocks { first: [copies; 2], stride: [0; 2], copied: [false; 2], out_stride: [None; 2] };
    // SAFETY: granted by the caller.
    unsafe {
        for block in 0..2 {
            blocks.out_stride[block] = stride_of::<u32>(outs.add(block * BLOCK).cast());
            let rows = rows.add(block * BLOCK);
            if let Some(stride) = stride_of(rows).filter(|_| depth.step == 1) {
                (blocks.first[block], blocks.stride[block]) = (*rows, stride);
                continue;
            }
            let to = copies.add(block * BLOCK * pitch(depth));
            copy::<L>(rows, depth, to);
            blocks.first[block] = to;
            blocks.stride[block] = (pitch(depth) * 4) as isize;
            blocks.copied[block] = true;
        }
    }
    blocks
}

/// Copies the words of a block's rows, all segments one after the other.
#[inline(always)]
unsafe fn copy<L: Lanes>(rows: *const *const u32, depth: &Depth<'_>, to: *mut u32) {
    let pitch = pitch(depth);
    for (s, &segment) in depth.segments.iter().enumerate() {
        // SAFETY: granted by the caller.
        unsafe {
            let to = to.add(s * depth.length);
            if depth.step == 1 {
                for word in (0..depth.length).step_by(VECTOR) {
                    let words = (u32::MAX >> (32 - VECTOR.min(depth.length - word))) as u16;
                    for row in 0..BLOCK {
                        let from = (*rows.add(row)).wrapping_offset(segment).wrapping_add(word);
                        let vector = _mm512_maskz_loadu_epi32(words, from.cast());
                        _mm512_mask_storeu_epi32(to.add(row * pitch + word).cast(), words, vector);
                    }
                }
                continue;
            }
            for eight in (0..BLOCK).step_by(8) {
                let rows = rows.add(eight);
                let (first, to) = (*rows, to.add(eight * pitch));
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
