//! The operands of a matrix product as its tiles read them.

use super::Product;
use crate::lanes::Lanes;
use crate::pack::{self, Left, Right, Source};
use crate::tile::{MOST_GROUP, Panels};
use std::mem::MaybeUninit;
use std::ops::Range;

/// Words of K packed at once, over all panels of a block.
const PACK_WORDS: usize = 64;

/// How the left operand is read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum LeftForm {
    /// Where it is.
    InPlace,
    /// Packed row by row.
    Rows,
    /// Packed by groups of rows, a word of each row after the other.
    Groups,
    /// Packed row by row, where K was not adjacent.
    Turned,
}

impl LeftForm {
    /// Words from one packed row of so many to the next.
    pub(super) fn pitch(self, words: usize) -> usize {
        if self == LeftForm::Turned { pack::row_pitch(words) } else { words }
    }
}

/// Packs some words of K of `count` rows of A from `row` on, by groups where the form says so, into rows of `room` words.
#[inline(always)]
pub(super) unsafe fn pack_left<L: Lanes>(
    p: &Product<L::Element>,
    form: LeftForm,
    [matrix, row, count]: [usize; 3],
    part: Range<usize>,
    room: usize,
    to: *mut u32,
) {
    let (words, begin) = (part.len(), part.start * L::GROUP);
    let k = (part.end * L::GROUP).min(p.k) - begin;
    // SAFETY: granted by the caller.
    unsafe {
        let row = matrix * p.a_strides[0] + row * p.a_strides[1];
        let from = p.a.add(row + begin * p.a_strides[2]);
        if form == LeftForm::Rows {
            for r in 0..count {
                let row = from.add(r * p.a_strides[1]);
                pack::row::<L, Left>(row, k, to.add(r * room), p.codes.flip);
            }
            return;
        }
        if form == LeftForm::Turned {
            turn::<L>(p, from, [k, count], to, form.pitch(room));
            return;
        }
        // Groups side by side, so that a row of the transposed A is read as far as the rows go.
        // Lines so far apart push each other out of L1 before the next group takes the rest of them.
        let far = p.a_strides[1] == 1 && p.a_strides[2] * size_of::<L::Element>() >= 4096;
        let step = if L::PLAIN && L::GROUP > 1 && far { 1 } else { PACK_WORDS };
        for word in (0..words).step_by(step) {
            let at = word * L::GROUP;
            let length = (step * L::GROUP).min(k - at);
            for first in (0..count).step_by(L::ROW_GROUP) {
                let source = left_source(p, from, at, first);
                let live = L::ROW_GROUP.min(count - first);
                let to = to.add(first * room + word * L::ROW_GROUP);
                pack::interleave::<L, Left>(source, length, live, to, L::ROW_GROUP);
            }
        }
    }
}

/// What begins with element `k` of a row of A, `row` rows after `from`: columns of a packed group are rows of A.
fn left_source<E>(p: &Product<E>, from: *const E, k: usize, row: usize) -> Source<E> {
    let [_, column_stride, k_stride] = p.a_strides;
    let first = from.wrapping_add(k * k_stride + row * column_stride);
    Source { first, k_stride, column_stride, flip: p.codes.flip }
}

/// Packs `count` rows of A, whose `k` elements are not adjacent, row by row: a cache line of each at a time, by way of a
/// group's words.
///
/// # Safety
/// As of [`pack_left`], whose `to` has room for whole groups.
#[inline(always)]
unsafe fn turn<L: Lanes>(
    p: &Product<L::Element>,
    from: *const L::Element,
    [k, count]: [usize; 2],
    to: *mut u32,
    pitch: usize,
) {
    const LINE: usize = 16;
    let words = k.div_ceil(L::GROUP);
    let mut group = MaybeUninit::<[u32; LINE * MOST_GROUP]>::uninit();
    let group = group.as_mut_ptr().cast::<u32>();
    for word in (0..words).step_by(LINE) {
        let at = word * L::GROUP;
        let length = (LINE * L::GROUP).min(k - at);
        for first in (0..count).step_by(L::ROW_GROUP) {
            // SAFETY: granted by the caller.
            unsafe {
                let source = left_source(p, from, at, first);
                let live = L::ROW_GROUP.min(count - first);
                pack::interleave::<L, Left>(source, length, live, group, L::ROW_GROUP);
                let size = [length.div_ceil(L::GROUP), L::ROW_GROUP];
                let to = to.add(first * pitch + word);
                pack::transpose::<L::Tier>(group, size, L::ROW_GROUP, to, pitch);
            }
        }
    }
}

/// Packs the first panels of a matrix's columns from `column` on.
#[inline(always)]
pub(super) unsafe fn pack_right<L: Lanes>(
    p: &Product<L::Element>,
    matrix: usize,
    column: usize,
    panels: Panels,
    count: usize,
    to: *mut u32,
) {
    // SAFETY: granted by the caller.
    unsafe {
        let first = p.b.add(matrix * p.b_strides[0] + column * p.b_strides[2]);
        let header = usize::from(L::HEADER);
        // Panels side by side, so that a row of B is read as far as the block goes.
        for word in (0..panels.k).step_by(PACK_WORDS) {
            let k = word * L::GROUP;
            let length = (PACK_WORDS * L::GROUP).min(p.k - k);
            for panel in 0..count {
                let from = Source {
                    first: first
                        .add(k * p.b_strides[1] + panel * Panels::width::<L>() * p.b_strides[2]),
                    k_stride: p.b_strides[1],
                    column_stride: p.b_strides[2],
                    flip: 0,
                };
                let stored = panels.stored::<L>(panel);
                let to = to.add(panels.offset::<L>(panel) + (header + word) * stored);
                pack::interleave::<L, Right>(from, length, panels.valid::<L>(panel), to, stored);
            }
        }
        if L::HEADER {
            for panel in 0..count {
                let to = to.add(panels.offset::<L>(panel));
                let stored = panels.stored::<L>(panel);
                pack::header::<L>(to.add(stored), panels.k, stored, to, p.codes);
            }
        }
    }
}
