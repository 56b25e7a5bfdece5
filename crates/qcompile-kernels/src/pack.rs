//! Packing of operands into words.

use crate::buffer::{Buffer, Slot};
use crate::lanes::{Codes, Element, Lanes, Simd};

/// Rows of fewer words are copied in place of a call.
const FEW_WORDS: usize = 16;

/// Which side of the product a packed word is for.
pub(crate) trait Side {
    /// Whether it is the left operand.
    const LEFT: bool;
}

/// The broadcast operand.
pub(crate) struct Left;
/// The operand in panels.
pub(crate) struct Right;

impl Side for Left {
    const LEFT: bool = true;
}
impl Side for Right {
    const LEFT: bool = false;
}

#[inline(always)]
fn word<L: Lanes, S: Side>(elements: &[L::Element; 4]) -> u32 {
    if S::LEFT { L::left_word(elements) } else { L::right_word(elements) }
}

/// Packs `k` adjacent elements, stored with `flip`, into words, the last one filled up: with zeros, or, of codes, with what
/// the packed rows of the other side multiply by zero.
///
/// # Safety
/// `from` holds `k` elements, `to` has room for `k / GROUP` words rounded up.
#[inline(always)]
pub(crate) unsafe fn row<L: Lanes, S: Side>(
    from: *const L::Element,
    k: usize,
    to: *mut u32,
    flip: u8,
) {
    // SAFETY: granted by the caller.
    unsafe {
        if L::PLAIN && flip == 0 {
            let words = k / L::GROUP;
            if L::GROUP > 1 && words < FEW_WORDS {
                for w in 0..words {
                    *to.add(w) = from.cast::<u32>().add(w).read_unaligned();
                }
            } else {
                std::ptr::copy_nonoverlapping(from.cast::<u8>(), to.cast(), words * 4);
            }
            if words * L::GROUP < k {
                let mut elements = [L::Element::default(); 4];
                for (g, element) in elements.iter_mut().enumerate().take(k - words * L::GROUP) {
                    *element = *from.add(words * L::GROUP + g);
                }
                *to.add(words) = word::<L, S>(&elements);
            }
            return;
        }
        if L::INTEGER && cfg!(target_endian = "little") {
            let from = std::slice::from_raw_parts(from.cast::<i8>(), k);
            let padded = k.next_multiple_of(L::GROUP);
            if L::GROUP == 4 {
                // The word of four bytes is these bytes, and what makes zero the halo.
                let flip = flip.cast_signed() ^ if S::LEFT { L::HALO as i8 } else { 0 };
                let to = std::slice::from_raw_parts_mut(to.cast::<i8>(), padded);
                for (to, from) in to.iter_mut().zip(from) {
                    *to = from ^ flip;
                }
                to[k..].fill(flip);
            } else {
                let to = std::slice::from_raw_parts_mut(to.cast::<i16>(), padded);
                for (to, from) in to.iter_mut().zip(from) {
                    *to = i16::from(from.flipped(flip));
                }
                to[k..].fill(0);
            }
            return;
        }
        let whole = k / L::GROUP;
        for w in 0..whole {
            let mut elements = [L::Element::default(); 4];
            for (g, element) in elements.iter_mut().enumerate().take(L::GROUP) {
                *element = (*from.add(w * L::GROUP + g)).flipped(flip);
            }
            *to.add(w) = word::<L, S>(&elements);
        }
        if whole * L::GROUP < k {
            let mut elements = [L::Element::default(); 4];
            for (g, element) in elements.iter_mut().enumerate().take(k - whole * L::GROUP) {
                *element = (*from.add(whole * L::GROUP + g)).flipped(flip);
            }
            *to.add(whole) = word::<L, S>(&elements);
        }
    }
}

/// A strided matrix of elements, K by columns.
#[derive(Clone, Copy)]
pub(crate) struct Source<E> {
    pub(crate) first: *const E,
    /// From one element of K to the next.
    pub(crate) k_stride: usize,
    /// From one column to the next.
    pub(crate) column_stride: usize,
    /// Bits that codes are stored with.
    pub(crate) flip: u8,
}

/// Packs `columns` columns of `k` elements as `to[word * width + column]`; columns up to `width` and
/// the end of the last word are zeros.
///
/// # Safety
/// `from` holds the matrix, `to` has room for `width` times the words; the CPU supports the tier.
#[inline(always)]
pub(crate) unsafe fn interleave<L: Lanes, S: Side>(
    from: Source<L::Element>,
    k: usize,
    columns: usize,
    to: *mut u32,
    width: usize,
) {
    let words = k.div_ceil(L::GROUP);
    // SAFETY: granted by the caller.
    unsafe {
        if from.k_stride == 1 && k > 1 {
            transposed::<L, S>(from, k, columns, to, width);
        } else {
            for w in 0..words {
                let live = L::GROUP.min(k - w * L::GROUP);
                let line = from.first.add(w * L::GROUP * from.k_stride);
                let out = to.add(w * width);
                if live == L::GROUP && from.column_stride == 1 {
                    if L::PLAIN && L::GROUP == 1 {
                        copy(line.cast(), out, columns);
                        continue;
                    }
                    if L::PLAIN && L::GROUP == 2 {
                        let second = line.add(from.k_stride);
                        L::Tier::zip(line.cast(), second.cast(), columns, out);
                        continue;
                    }
                    for c in 0..columns {
                        let mut elements = [L::Element::default(); 4];
                        for (g, element) in elements.iter_mut().enumerate().take(L::GROUP) {
                            *element = (*line.add(g * from.k_stride + c)).flipped(from.flip);
                        }
                        *out.add(c) = word::<L, S>(&elements);
                    }
                } else {
                    for c in 0..columns {
                        let mut elements = [L::Element::default(); 4];
                        for (g, element) in elements.iter_mut().enumerate().take(live) {
                            let at = g * from.k_stride + c * from.column_stride;
                            *element = (*line.add(at)).flipped(from.flip);
                        }
                        *out.add(c) = word::<L, S>(&elements);
                    }
                }
            }
        }
        let zero = word::<L, S>(&[L::Element::default(); 4]);
        for w in 0..words {
            for c in columns..width {
                *to.add(w * width + c) = zero;
            }
        }
    }
}

/// Makes words of as many rows of elements as a word holds, missing ones being zeros.
///
/// # Safety
/// The rows that are there hold `count` elements, `to` has room for as many words; the CPU supports the tier.
#[inline(always)]
pub(crate) unsafe fn zip<L: Lanes, S: Side>(
    rows: [Option<*const L::Element>; 4],
    count: usize,
    to: *mut u32,
) {
    // SAFETY: granted by the caller.
    unsafe {
        match rows {
            [Some(first), Some(second), ..] if L::PLAIN && L::GROUP == 2 => {
                L::Tier::zip(first.cast(), second.cast(), count, to);
            }
            [Some(a), Some(b), ..] if L::GROUP == 2 => {
                let none = L::Element::default();
                for i in 0..count {
                    *to.add(i) = word::<L, S>(&[*a.add(i), *b.add(i), none, none]);
                }
            }
            [Some(a), Some(b), Some(c), Some(d)] => {
                for i in 0..count {
                    let elements = [*a.add(i), *b.add(i), *c.add(i), *d.add(i)];
                    *to.add(i) = word::<L, S>(&elements);
                }
            }
            rows if rows.iter().all(Option::is_none) => {
                std::slice::from_raw_parts_mut(to, count).fill(word::<L, S>(&Default::default()));
            }
            rows => {
                for i in 0..count {
                    let mut elements = [L::Element::default(); 4];
                    for (element, row) in elements.iter_mut().zip(rows) {
                        *element = row.map_or(L::Element::default(), |row| *row.add(i));
                    }
                    *to.add(i) = word::<L, S>(&elements);
                }
            }
        }
    }
}

/// Copies words; the widths of full panels and row groups without a call.
#[inline(always)]
unsafe fn copy(from: *const u32, to: *mut u32, words: usize) {
    // SAFETY: granted by the caller.
    unsafe {
        match words {
            16 => to.cast::<[u32; 16]>().write_unaligned(from.cast::<[u32; 16]>().read_unaligned()),
            24 => to.cast::<[u32; 24]>().write_unaligned(from.cast::<[u32; 24]>().read_unaligned()),
            32 => to.cast::<[u32; 32]>().write_unaligned(from.cast::<[u32; 32]>().read_unaligned()),
            _ => std::ptr::copy_nonoverlapping(from, to, words),
        }
    }
}

/// The case of [`interleave`] where K is adjacent in memory: words first, then 8 x 8 transposes.
#[inline(always)]
unsafe fn transposed<L: Lanes, S: Side>(
    from: Source<L::Element>,
    k: usize,
    columns: usize,
    to: *mut u32,
    width: usize,
) {
    let words = k.div_ceil(L::GROUP);
    let in_place =
        L::PLAIN && k.is_multiple_of(L::GROUP) && from.column_stride.is_multiple_of(L::GROUP);
    let in_place = in_place && from.flip == 0;
    let mut staging = Buffer::take(Slot::Staging, if in_place { 0 } else { 8 * words });
    // SAFETY: granted by the caller; the staging rows are `words` long.
    unsafe {
        for c0 in (0..columns).step_by(8) {
            let live = 8.min(columns - c0);
            let first = from.first.add(c0 * from.column_stride);
            let (rows, stride) = if in_place {
                (first.cast::<u32>(), from.column_stride / L::GROUP)
            } else {
                for c in 0..live {
                    let line = first.add(c * from.column_stride);
                    row::<L, S>(line, k, staging.words().add(c * words), from.flip);
                }
                (staging.words().cast_const(), words)
            };
            let mut w = 0;
            if live == 8 {
                while w + 8 <= words {
                    L::Tier::transpose8(rows.add(w), stride, to.add(w * width + c0), width);
                    w += 8;
                }
            }
            for w in w..words {
                for c in 0..live {
                    *to.add(w * width + c0 + c) = rows.add(c * stride + w).read_unaligned();
                }
            }
        }
    }
}

/// Writes the header of a panel: what its accumulators begin with, the sum of each column times what the left operand has
/// in the place of 0, negative.
///
/// # Safety
/// `panel` holds `words` packed rows of `stored` columns, `to` has room for one; the CPU supports the
/// tier.
#[inline(always)]
pub(crate) unsafe fn header<L: Lanes>(
    panel: *const u32,
    words: usize,
    stored: usize,
    to: *mut u32,
    codes: Codes,
) {
    // SAFETY: granted by the caller; `stored` is a multiple of the vector's width.
    unsafe {
        let word = L::halo(codes);
        if word == 0 {
            to.write_bytes(0, stored);
            return;
        }
        let halo = L::splat(&raw const word);
        for column in (0..stored).step_by(L::LANES) {
            let mut sum = L::zero();
            for w in 0..words {
                sum = L::dot(sum, halo, L::load(panel.add(w * stored + column)));
            }
            L::store(to.add(column), sum);
        }
        for word in std::slice::from_raw_parts_mut(to, stored) {
            *word = word.wrapping_neg();
        }
    }
}

/// Words from one row to the next of a left operand whose rows are of so many words: whole cache lines, and an odd number
/// of them, as rows that are a power of two apart push each other out of L1.
pub(crate) fn row_pitch(words: usize) -> usize {
    (words.div_ceil(16) | 1) * 16
}

/// Writes a matrix's columns as rows.
///
/// # Safety
/// `from` holds the matrix, `to` has room for the rows; the CPU supports the tier.
#[inline(always)]
pub(crate) unsafe fn transpose<S: Simd>(
    from: *const u32,
    [rows, columns]: [usize; 2],
    from_stride: usize,
    to: *mut u32,
    to_stride: usize,
) {
    // SAFETY: granted by the caller.
    unsafe {
        for column in (0..columns).step_by(8) {
            for row in (0..rows).step_by(8) {
                let from = from.add(row * from_stride + column);
                let to = to.add(column * to_stride + row);
                if row + 8 <= rows && column + 8 <= columns {
                    S::transpose8(from, from_stride, to, to_stride);
                    continue;
                }
                for c in 0..8.min(columns - column) {
                    for r in 0..8.min(rows - row) {
                        *to.add(c * to_stride + r) = *from.add(r * from_stride + c);
                    }
                }
            }
        }
    }
}
