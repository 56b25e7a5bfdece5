//! Attention: a strip of queries against all keys at a time, so that no whole matrix of scores is ever in memory.
//!
//! A unit is a strip of one head. The thread packs the keys and values of the head once for all strips that it is
//! given; what it computes does not depend on which those are. Scores of a strip are held for [`CHUNK`] keys: where
//! there are more, the result so far is brought to each new maximum. Masked parts of the products are left out.

use crate::Primitive;
use crate::args::{AttentionArgs, AttentionKind};
use crate::attention_kind::{Along, Bf16, Int8, Kind, Matrix, Real, Rows, Widened};
use crate::buffer::{Buffer, Slot};
use crate::lanes::{Lanes, Simd, Task};
use crate::seen::{Left, Over, Product, Seen, grain};
use crate::softmax::{exp, no_scratch};
use crate::tile::{EVERY_GROUP, MOST_GROUP, Panels};
use std::marker::PhantomData;

/// Most queries of a strip, a multiple of every tile's height.
pub(crate) const STRIP: usize = EVERY_GROUP;
/// Most keys whose scores are held at once, a multiple of every panel's width and every tile's height.
pub(crate) const CHUNK: usize = 960;
/// Scores of a row are handled in blocks of this many.
pub(crate) const BLOCK: usize = 32;

/// Rows of one head of an operand `[batch, rows, heads, width]`.
#[inline(always)]
pub(crate) unsafe fn head_of<E>(
    operand: *const u8,
    strides: [usize; 4],
    [batch, row, head]: [usize; 3],
) -> Matrix<E> {
    // SAFETY: the caller grants an operand of these strides that has the row.
    let first = unsafe {
        operand.cast::<E>().add(batch * strides[0] + row * strides[1] + head * strides[2])
    };
    Matrix { first, row_stride: strides[1], column_stride: strides[3] }
}

/// A row of an additive mask.
#[derive(Clone, Copy)]
pub(crate) struct Mask {
    pub(crate) first: *const f32,
    pub(crate) stride: usize,
}

impl Mask {
    /// The mask of a query from key `key` on, if there is one.
    #[inline(always)]
    pub(crate) unsafe fn of(
        args: &AttentionArgs,
        [batch, head, row, key]: [usize; 4],
    ) -> Option<Mask> {
        let [b, h, r, k] = args.mask_strides;
        // SAFETY: the caller grants a mask that has the place, or none.
        (!args.mask.is_null()).then(|| unsafe {
            let first = args.mask.add(batch * b + head * h + row * r + key * k);
            Mask { first, stride: k }
        })
    }
}

/// Scales and masks the scores of a row, fills them up to whole blocks with -inf, and returns the largest (a NaN does
/// not count: it comes back with the exponentials).
#[inline(always)]
pub(crate) unsafe fn finish_scores(
    row: *mut f32,
    count: usize,
    scale: f32,
    mask: Option<Mask>,
) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; BLOCK];
    let whole = count / BLOCK * BLOCK;
    // SAFETY: the caller grants a row with room for whole blocks and a mask of `count` values.
    unsafe {
        let mut scale = scale;
        if let Some(mask) = mask {
            if mask.stride == 1 {
                for i in 0..count {
                    *row.add(i) = *row.add(i) * scale + *mask.first.add(i);
                }
            } else {
                for i in 0..count {
                    *row.add(i) = *row.add(i) * scale + *mask.first.add(i * mask.stride);
                }
            }
            scale = 1.0;
        }
        for at in (0..whole).step_by(BLOCK) {
            let block = &mut *row.add(at).cast::<[f32; BLOCK]>();
            for i in 0..BLOCK {
                block[i] *= scale;
                lanes[i] = if block[i] > lanes[i] { block[i] } else { lanes[i] };
            }
        }
        if whole < count {
            let block = &mut *row.add(whole).cast::<[f32; BLOCK]>();
            for (i, x) in block.iter_mut().enumerate() {
                *x = if i < count - whole { *x * scale } else { f32::NEG_INFINITY };
            }
            for i in 0..BLOCK {
                lanes[i] = if block[i] > lanes[i] { block[i] } else { lanes[i] };
            }
        }
    }
    let mut width = BLOCK / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = if lanes[i + width] > lanes[i] { lanes[i + width] } else { lanes[i] };
        }
        width /= 2;
    }
    lanes[0]
}

/// Makes finished scores `exp(score - largest)` and returns their sum.
#[inline(always)]
pub(crate) unsafe fn exponentials<S: Simd>(row: *mut f32, count: usize, largest: f32) -> f32 {
    let mut lanes = [0.0_f32; BLOCK];
    for at in (0..count).step_by(BLOCK) {
        // SAFETY: the caller grants whole blocks.
        let block = unsafe { &mut *row.add(at).cast::<[f32; BLOCK]>() };
        for i in 0..BLOCK {
            block[i] = exp::<S>(block[i] - largest);
            lanes[i] += block[i];
        }
    }
    total(lanes)
}

/// The sum of all lanes, in pairs.
#[inline(always)]
pub(crate) fn total(mut lanes: [f32; BLOCK]) -> f32 {
    let mut width = BLOCK / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Asks for a row of an operand of the head that comes next: it lies far from the row before, where no prefetcher
/// of the CPU looks.
#[inline(always)]
pub(crate) fn fetch_next<S: Simd, E>(
    operand: *const u8,
    strides: [usize; 4],
    row: usize,
    [batch, head, heads]: [usize; 3],
    width: usize,
) {
    let (batch, head) = if head + 1 == heads { (batch + 1, 0) } else { (batch, head + 1) };
    let at = batch * strides[0] + row * strides[1] + head * strides[2];
    let first = operand.wrapping_add(at * size_of::<E>());
    for line in (0..width * size_of::<E>()).step_by(64) {
        S::prefetch(first.wrapping_add(line));
    }
}

/// How many of `columns` values of a row a tile may read, whole blocks, where it and those that share its words have up
/// to `most` scores: to the end of the longest row of the tile, and to the end of a word and a depth.
#[inline(always)]
pub(crate) fn filled<L: Lanes>(most: usize, columns: usize) -> usize {
    (most + MOST_GROUP + grain::<L>() - 1).min(columns).next_multiple_of(BLOCK)
}

/// Clears a row from its last block of scores as far as it is [`filled`].
#[inline(always)]
pub(crate) unsafe fn clear_rest(row: *mut f32, count: usize, filled: usize) {
    for i in count.next_multiple_of(BLOCK)..filled {
        // SAFETY: the caller grants whole blocks.
        unsafe { *row.add(i) = 0.0 };
    }
}

/// Words from one row of a strip's scores to the next: an odd number of cache lines, so that a column of them does
/// not fall into few sets of the cache.
pub(crate) fn score_stride(keys: usize) -> usize {
    keys.min(CHUNK).next_multiple_of(BLOCK) + 16
}

/// Hands out parts of a buffer.
pub(crate) struct Parts(pub(crate) *mut f32);

impl Parts {
    /// The next `words` words, whole cache lines.
    pub(crate) fn take(&mut self, words: usize) -> *mut f32 {
        let part = self.0;
        self.0 = part.wrapping_add(words.next_multiple_of(16));
        part
    }
}

unsafe extern "C" fn units(args: *const u64, _phase: usize) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    let args = unsafe { &*args.cast::<AttentionArgs>() };
    args.batch * args.heads * args.rows.div_ceil(STRIP)
}

unsafe extern "C" fn run<S: Simd>(args: *const u64, _phase: usize, begin: usize, end: usize) {
    // SAFETY: the caller passes the argument block of this kernel, on a CPU of the tier.
    unsafe {
        let args = *args.cast::<AttentionArgs>();
        match args.kind {
            AttentionKind::F32 => S::enter(Forward::<Real> { args, begin, end, kind: PhantomData }),
            AttentionKind::Bf16Operands => {
                S::enter(Forward::<Widened> { args, begin, end, kind: PhantomData })
            }
            AttentionKind::Bf16 => {
                S::enter(Forward::<Bf16> { args, begin, end, kind: PhantomData })
            }
            AttentionKind::Int8 => {
                S::enter(Forward::<Int8<f32>> { args, begin, end, kind: PhantomData })
            }
            AttentionKind::Int8Bf16 => {
                S::enter(Forward::<Int8<u16>> { args, begin, end, kind: PhantomData })
            }
        }
    }
}

/// Attention on a tier.
pub(crate) const fn primitive<S: Simd>() -> Primitive {
    Primitive { phases: 1, units, run: run::<S>, scratch: no_scratch, parts: crate::no_parts }
}

struct Forward<K> {
    args: AttentionArgs,
    begin: usize,
    end: usize,
    kind: PhantomData<K>,
}

/// Buffers of a thread.
#[derive(Clone, Copy)]
struct Memory {
    keys: *mut u32,
    values: *mut u32,
    scores: *mut f32,
    score_stride: usize,
    out: *mut f32,
    out_stride: usize,
    staged_rows: *mut f32,
}

impl<K: Kind> Task for Forward<K> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Forward { args, begin, end, .. } = self;
        let group = K::Lanes::<S>::GROUP;
        let key_panels = Panels { k: args.width.div_ceil(group), n: args.keys };
        let value_panels = Panels { k: args.keys.div_ceil(group), n: args.value_width };
        let score_stride = score_stride(args.keys);
        let out_stride = value_panels.count::<K::Lanes<S>>() * Panels::width::<K::Lanes<S>>();
        let staged = usize::from(K::STAGED);
        let sizes = [
            key_panels.words::<K::Lanes<S>>(),
            value_panels.words::<K::Lanes<S>>(),
            STRIP * score_stride,
            STRIP * out_stride,
            staged * STRIP * args.width,
            staged * args.keys * args.width.max(args.value_width),
        ];
        let words = sizes.iter().map(|words| words.next_multiple_of(16)).sum();
        let mut buffer = Buffer::take(Slot::Result, words);
        let mut parts = Parts(buffer.words().cast());
        let [keys, values, scores, out, staged_rows, staged] = sizes.map(|size| parts.take(size));
        let (keys, values) = (keys.cast(), values.cast());
        let memory = Memory { keys, values, scores, score_stride, out, out_stride, staged_rows };
        let strips = args.rows.div_ceil(STRIP);
        let mut packed = None;
        for unit in begin..end {
            let (head, strip) = (unit / strips, unit % strips);
            // The first strip beside the last: under a causal mask both together are as much work as the others.
            let strip = if strip % 2 == 0 { strip / 2 } else { strips - 1 - strip / 2 };
            let (batch, head) = (head / args.heads, head % args.heads);
            let key_head = head / (args.heads / args.key_heads);
            // SAFETY: the head has the rows; the buffers have room for them.
            unsafe {
                if packed != Some((batch, key_head)) {
                    packed = Some((batch, key_head));
                    let k = head_of(args.k, args.k_strides, [batch, 0, key_head]);
                    let size = [args.keys, args.width];
                    K::right::<S>(k, Along::Columns, size, staged, keys);
                    let v = head_of(args.v, args.v_strides, [batch, 0, key_head]);
                    let size = [args.keys, args.value_width];
                    K::right::<S>(v, Along::Rows, size, staged, values);
                }
                strip_of::<S, K>(&args, &memory, [batch, head, strip * STRIP]);
            }
        }
    }
}

/// Computes the strip of one head that begins with row `row`.
#[inline(always)]
unsafe fn strip_of<S: Simd, K: Kind>(
    args: &AttentionArgs,
    memory: &Memory,
    [batch, head, row]: [usize; 3],
) {
    let rows = STRIP.min(args.rows - row);
    let (mut largest, mut sums) = ([f32::NEG_INFINITY; STRIP], [0.0_f32; STRIP]);
    let mut seen = Seen { causal: args.causal != 0, keys: args.keys, row, key: 0 };
    let all = seen.all(rows - 1);
    let shared = args.heads / args.key_heads;
    // SAFETY: the rows lie in the operands and the result; the buffers have room for a strip.
    unsafe {
        let q = head_of(args.q, args.q_strides, [batch, row, head]);
        let q = K::left::<S>(q, [rows, args.width], memory.staged_rows);
        if all == 0 {
            std::ptr::write_bytes(memory.out, 0, rows * memory.out_stride);
            sums = [1.0; STRIP];
        }
        let [scale, value_scale] = K::scales(args);
        // Integers want the maximum before their first product: then there is a round that finds it.
        let first = usize::from(K::INTEGER && all > CHUNK);
        let chunks = all.div_ceil(CHUNK);
        for step in 0..(first + 1) * chunks {
            let key = step % chunks * CHUNK;
            let measures = step < first * chunks;
            seen.key = key;
            let columns = CHUNK.min(all - key);
            let (keys, width) = (memory.keys, args.width);
            scores_of::<K::Lanes<S>>(args, keys, width, q, rows, seen, memory.scores);
            for r in 0..rows {
                if key == 0 {
                    let next = [batch, head, args.heads];
                    let key_next = [batch, head / shared, args.key_heads];
                    fetch_next::<S, K::Stored>(args.q, args.q_strides, row + r, next, args.width);
                    fetch_next::<S, K::Stored>(
                        args.k,
                        args.k_strides,
                        row + r,
                        key_next,
                        args.width,
                    );
                    fetch_next::<S, K::Stored>(
                        args.v,
                        args.v_strides,
                        row + r,
                        key_next,
                        args.value_width,
                    );
                }
                let count = seen.of_chunk(r);
                let scores = memory.scores.add(r * memory.score_stride);
                let filled = filled::<K::Lanes<S>>(count, columns);
                clear_rest(scores, count, filled);
                let mask = Mask::of(args, [batch, head, row + r, key]);
                K::real(scores, count);
                let most = finish_scores(scores, count, scale, mask).max(largest[r]);
                if most == f32::NEG_INFINITY {
                    // Nothing is seen up to here.
                    std::ptr::write_bytes(scores, 0, count.next_multiple_of(BLOCK));
                    continue;
                }
                if measures {
                    largest[r] = most;
                    continue;
                }
                let sum = exponentials::<S>(scores, count, most);
                K::narrow::<S>(scores, filled);
                if key > 0 && !K::INTEGER {
                    let factor = exp::<S>(largest[r] - most);
                    sums[r] *= factor;
                    for c in 0..memory.out_stride {
                        *memory.out.add(r * memory.out_stride + c) *= factor;
                    }
                }
                largest[r] = most;
                sums[r] += sum;
            }
            if measures {
                continue;
            }
            let panels =
                Panels { k: args.keys.div_ceil(K::Lanes::<S>::GROUP), n: args.value_width };
            let left = memory.scores.cast_const().cast();
            let product = Product {
                left: Rows { first: left, row_stride: memory.score_stride, step: 1 },
                first: key,
                rows,
                right: memory.values,
                panels,
                panel_begin: 0,
                panel_end: panels.count::<K::Lanes<S>>(),
                out: memory.out.cast(),
                out_stride: memory.out_stride,
                resume: key > 0,
                kind: Left::Plain,
            };
            product.run::<K::Lanes<S>>(Over::Keys, seen);
        }
        for (r, sum) in sums.iter().enumerate().take(rows) {
            let at = ((batch * args.rows + row + r) * args.heads + head) * args.value_width;
            let out = memory.out.add(r * memory.out_stride);
            let factor = value_scale / sum;
            K::store(out, args.value_width, factor, args.y.cast::<K::Result>().add(at));
        }
    }
}

/// `out = left · packedᵀ` for the keys of a chunk, where `packed` holds `width` elements of each key.
#[inline(always)]
pub(crate) unsafe fn scores_of<L: Lanes>(
    args: &AttentionArgs,
    packed: *const u32,
    width: usize,
    left: Rows,
    rows: usize,
    seen: Seen,
    out: *mut f32,
) {
    let panels = Panels { k: width.div_ceil(L::GROUP), n: args.keys };
    let (begin, end) = (seen.key, args.keys.min(seen.key + CHUNK));
    let product = Product {
        left,
        first: 0,
        rows,
        right: packed,
        panels,
        panel_begin: begin / Panels::width::<L>(),
        panel_end: end.div_ceil(Panels::width::<L>()),
        out: out.cast(),
        out_stride: score_stride(args.keys),
        resume: false,
        kind: Left::Packed,
    };
    // SAFETY: granted by the caller.
    unsafe { product.run::<L>(Over::Scores, seen) };
}
