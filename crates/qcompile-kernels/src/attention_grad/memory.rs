//! What a thread holds while it computes gradients of attention in int8.

use crate::args::{AttentionArgs, AttentionKind};
use crate::attention::{BLOCK, CHUNK, Parts, STRIP, score_stride};
use crate::lanes::Lanes;
use crate::tile::{EVERY_GROUP, Panels};

const QUERIES: usize = AttentionKind::INT8_QUERIES;

/// Buffers of a thread.
#[derive(Clone, Copy)]
pub(super) struct Memory {
    /// Keys for scores.
    pub(super) keys: *mut u32,
    /// Keys for the gradient of queries.
    pub(super) key_rows: *mut u32,
    /// Values for the gradient of probabilities.
    pub(super) values: *mut u32,
    /// The strip's queries, with a scale for each column.
    pub(super) queries: *mut u32,
    pub(super) query_scales: *mut f32,
    /// The strip's dy, with a scale for each column.
    pub(super) gradients: *mut u32,
    pub(super) gradient_scales: *mut f32,
    /// Scores, then exponentials.
    pub(super) scores: *mut f32,
    /// Gradients of the probabilities, then of the scores.
    pub(super) slopes: *mut f32,
    /// What the second codes of dy give of them.
    pub(super) fine_slopes: *mut f32,
    /// Codes of the exponentials, and of the gradients of scores.
    pub(super) score_codes: *mut i8,
    pub(super) slope_codes: *mut i8,
    /// Codes as a left operand.
    pub(super) words: *mut u32,
    /// A product.
    pub(super) sums: *mut u32,
    pub(super) dq: *mut f32,
    pub(super) dk: *mut f32,
    pub(super) dv: *mut f32,
    /// Rows that are rounded, and two places for their codes.
    pub(super) real: *mut f32,
    pub(super) codes: [*mut i8; 2],
    /// Multiples of the golden ratio, of keys and of columns.
    pub(super) multiples: *mut f32,
    /// The strip's queries and the two codes of its dy, as left operands.
    pub(super) left_q: *mut u32,
    pub(super) left_dy: [*mut u32; 2],
    /// Words of a row of `dq` and `dk`.
    pub(super) stride: usize,
    /// Words of a row of `dv`.
    pub(super) value_stride: usize,
    /// Bytes of a row of codes.
    pub(super) code_stride: usize,
}

impl Memory {
    /// Multiples that are kept: of whole blocks of keys, and of all columns.
    pub(super) fn multiples(args: &AttentionArgs) -> usize {
        args.keys.next_multiple_of(BLOCK).max(args.width).max(args.value_width)
    }

    /// The sizes of the parts in words, in the order in which [`Memory::new`] takes them, and the three strides.
    pub(super) fn sizes<L: Lanes>(args: &AttentionArgs) -> ([usize; 21], [usize; 3]) {
        let (keys, width, value_width) = (args.keys, args.width, args.value_width);
        let words = |k: usize, n: usize| Panels { k: k.div_ceil(L::GROUP), n }.words::<L>();
        let stride = |n: usize| n.next_multiple_of(Panels::width::<L>());
        let strides = [stride(width), stride(value_width)];
        let code_stride = keys.min(CHUNK).next_multiple_of(BLOCK) + 64;
        let chunk = keys.min(CHUNK).next_multiple_of(EVERY_GROUP);
        let widest = width.max(value_width);
        let scores = STRIP * score_stride(keys);
        let sizes = [
            words(width, keys),
            words(keys, width),
            words(value_width, keys),
            words(QUERIES, width),
            words(QUERIES, value_width),
            width,
            value_width,
            scores,
            scores,
            scores,
            QUERIES * code_stride / 4,
            QUERIES * code_stride / 4,
            QUERIES.div_ceil(L::GROUP) * code_stride,
            chunk.max(STRIP) * strides[0].max(strides[1]),
            STRIP * strides[0],
            keys * strides[0],
            keys * strides[1],
            QUERIES * widest,
            2 * (QUERIES * widest).div_ceil(4).next_multiple_of(16),
            3 * (QUERIES * widest.div_ceil(L::GROUP)).next_multiple_of(16),
            if args.numbers.is_null() { 0 } else { Memory::multiples(args) },
        ];
        (sizes, [strides[0], strides[1], code_stride])
    }

    pub(super) fn new(buffer: *mut f32, sizes: [usize; 21], strides: [usize; 3]) -> Memory {
        let mut parts = Parts(buffer);
        let [
            keys,
            key_rows,
            values,
            queries,
            gradients,
            query_scales,
            gradient_scales,
            scores,
            slopes,
            fine_slopes,
            score_codes,
            slope_codes,
            words,
            sums,
            dq,
            dk,
            dv,
            real,
            codes,
            left,
            multiples,
        ] = sizes.map(|size| parts.take(size));
        let (codes, left) = (codes.cast::<i8>(), left.cast::<u32>());
        let [stride, value_stride, code_stride] = strides;
        let part = |at: usize| left.wrapping_add(at * (sizes[19] / 3));
        Memory {
            keys: keys.cast(),
            key_rows: key_rows.cast(),
            values: values.cast(),
            queries: queries.cast(),
            query_scales,
            gradients: gradients.cast(),
            gradient_scales,
            scores,
            slopes,
            fine_slopes,
            score_codes: score_codes.cast(),
            slope_codes: slope_codes.cast(),
            words: words.cast(),
            sums: sums.cast(),
            dq,
            dk,
            dv,
            real,
            codes: [codes, codes.wrapping_add(sizes[18] / 2 * 4)],
            multiples,
            left_q: part(0),
            left_dy: [part(1), part(2)],
            stride,
            value_stride,
            code_stride,
        }
    }
}
