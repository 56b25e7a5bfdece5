//! Gradients of attention by queries, keys and values.
//!
//! A unit is a head of keys with all heads of queries that share it, so that the gradients of its keys and values
//! are summed in the order of the strips, whoever computes it. Probabilities are computed again, strip by strip:
//! with `p = softmax(scale q kᵀ + mask)`, `dp = dy vᵀ` and `ds = scale p (dp - Σ p dp)` the gradients are `dq = ds k`,
//! `dk = dsᵀ q` and `dv = pᵀ dy`. Where the keys are more than a chunk, a first round finds the maximum and the sums
//! of each row.

mod codes;
mod memory;

use crate::Primitive;
use crate::args::{AttentionArgs, AttentionKind};
use crate::attention::{
    BLOCK, CHUNK, Mask, Parts, STRIP, clear_rest, exponentials, fetch_next, filled, finish_scores,
    head_of, score_stride, scores_of, total,
};
use crate::attention_kind::{Along, Bf16, Kind, Real, Rows, Widened};
use crate::buffer::{Buffer, Slot};
use crate::lanes::{Lanes, Simd, Task};
use crate::pack::{self, Left};
use crate::seen::{Left as LeftOperand, Over, Product, Seen};
use crate::softmax::{exp, no_scratch};
use crate::tile::{EVERY_GROUP, Panels};
use codes::Gradients as CodedGradients;
use std::marker::PhantomData;

unsafe extern "C" fn units(args: *const u64, _phase: usize) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    let args = unsafe { &*args.cast::<AttentionArgs>() };
    args.batch * args.key_heads
}

unsafe extern "C" fn run<S: Simd>(args: *const u64, _phase: usize, begin: usize, end: usize) {
    // SAFETY: the caller passes the argument block of this kernel, on a CPU of the tier.
    unsafe {
        let args = *args.cast::<AttentionArgs>();
        match args.kind {
            AttentionKind::F32 => {
                S::enter(Gradients::<Real> { args, begin, end, kind: PhantomData })
            }
            AttentionKind::Bf16Operands => {
                S::enter(Gradients::<Widened> { args, begin, end, kind: PhantomData })
            }
            AttentionKind::Bf16 => {
                S::enter(Gradients::<Bf16> { args, begin, end, kind: PhantomData })
            }
            AttentionKind::Int8 => {
                S::enter(CodedGradients::<f32> { args, begin, end, float: PhantomData })
            }
            AttentionKind::Int8Bf16 => {
                S::enter(CodedGradients::<u16> { args, begin, end, float: PhantomData })
            }
        }
    }
}

/// Gradients of attention on a tier.
pub(crate) const fn primitive<S: Simd>() -> Primitive {
    Primitive { phases: 1, units, run: run::<S>, scratch: no_scratch, parts: crate::no_parts }
}

struct Gradients<K> {
    args: AttentionArgs,
    begin: usize,
    end: usize,
    kind: PhantomData<K>,
}

/// Buffers of a thread.
#[derive(Clone, Copy)]
struct Memory {
    /// Keys for scores.
    keys: *mut u32,
    /// Keys for the gradient of queries.
    key_rows: *mut u32,
    /// Values for the gradient of probabilities.
    values: *mut u32,
    /// The strip's queries, packed.
    queries: *mut u32,
    /// The strip's dy, packed.
    gradients: *mut u32,
    /// Scores, then probabilities.
    scores: *mut f32,
    /// Gradient of the probabilities, then of the scores.
    slopes: *mut f32,
    /// Probabilities as words along queries, where more than one value makes a word.
    score_words: *mut u32,
    /// The same of the gradient of the scores.
    slope_words: *mut u32,
    dq: *mut f32,
    dk: *mut f32,
    dv: *mut f32,
    staged_q: *mut f32,
    staged_dy: *mut f32,
    staged: *mut f32,
    /// Words of a row of `dq` and `dk`.
    stride: usize,
    /// Words of a row of `dv`.
    value_stride: usize,
}

impl<K: Kind> Task for Gradients<K> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Gradients { args, begin, end, .. } = self;
        let (keys, width, value_width) = (args.keys, args.width, args.value_width);
        let group = K::Lanes::<S>::GROUP;
        let words = |k: usize, n: usize| Panels { k: k.div_ceil(group), n }.words::<K::Lanes<S>>();
        let width_of = Panels::width::<K::Lanes<S>>;
        let stride = |n: usize| n.div_ceil(width_of()) * width_of();
        let grouped = usize::from(group > 1) * (STRIP / group) * score_stride(keys);
        let padded = keys.next_multiple_of(EVERY_GROUP);
        let staged = usize::from(K::STAGED);
        let sizes = [
            words(width, keys),
            words(keys, width),
            words(value_width, keys),
            words(STRIP, width),
            words(STRIP, value_width),
            STRIP * score_stride(keys),
            STRIP * score_stride(keys),
            grouped,
            grouped,
            STRIP * stride(width),
            padded * stride(width),
            padded * stride(value_width),
            staged * STRIP * width,
            staged * STRIP * value_width,
            staged * keys * width.max(value_width),
        ];
        let words = sizes.iter().map(|words| words.next_multiple_of(16)).sum();
        let mut buffer = Buffer::take(Slot::Result, words);
        let mut parts = Parts(buffer.words().cast());
        let mut next = sizes.map(|size| parts.take(size)).into_iter();
        let mut part = || next.next().unwrap_or(std::ptr::null_mut());
        let memory = Memory {
            keys: part().cast(),
            key_rows: part().cast(),
            values: part().cast(),
            queries: part().cast(),
            gradients: part().cast(),
            scores: part(),
            slopes: part(),
            score_words: part().cast(),
            slope_words: part().cast(),
            dq: part(),
            dk: part(),
            dv: part(),
            staged_q: part(),
            staged_dy: part(),
            staged: part(),
            stride: stride(width),
            value_stride: stride(value_width),
        };
        for unit in begin..end {
            let head = Head { args: &args, memory, batch: unit / args.key_heads };
            // SAFETY: the operands and results have the head, the buffers room for it.
            unsafe { head.run::<S, K>(unit % args.key_heads) };
        }
    }
}

/// The work on one head of keys.
#[derive(Clone, Copy)]
struct Head<'a> {
    args: &'a AttentionArgs,
    memory: Memory,
    batch: usize,
}

/// One strip of queries.
#[derive(Clone, Copy)]
struct Strip {
    head: usize,
    row: usize,
    rows: usize,
    q: Rows,
    dy: Rows,
}

/// What is known of the rows of a strip.
struct Statistics {
    largest: [f32; STRIP],
    /// Sums of exponentials.
    sums: [f32; STRIP],
    /// Sums of exponentials times the gradient of their probabilities.
    slopes: [f32; STRIP],
}

impl Statistics {
    /// Before any key.
    const NONE: Statistics = Statistics {
        largest: [f32::NEG_INFINITY; STRIP],
        sums: [0.0; STRIP],
        slopes: [0.0; STRIP],
    };

    /// Makes the finished scores of a row, of which `most` is the largest, exponentials, and adds them; also times the
    /// gradients of their probabilities, if there are such.
    #[inline(always)]
    unsafe fn add<S: Simd>(
        &mut self,
        r: usize,
        scores: *mut f32,
        slopes: Option<*mut f32>,
        count: usize,
        most: f32,
    ) {
        let most = most.max(self.largest[r]);
        // SAFETY: granted by the caller.
        unsafe {
            let sum = exponentials::<S>(scores, count, most);
            if most == f32::NEG_INFINITY {
                // Nothing is seen up to here: exponentials of what is masked everywhere are NaN.
                return;
            }
            let factor = exp::<S>(self.largest[r] - most);
            self.largest[r] = most;
            self.sums[r] = self.sums[r] * factor + sum;
            if let Some(slopes) = slopes {
                self.slopes[r] = self.slopes[r] * factor + dot(scores, slopes, count);
            }
        }
    }
}

impl Head<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, K: Kind>(&self, key_head: usize) {
        let Head { args, memory, batch } = *self;
        let (keys, width, value_width) = (args.keys, args.width, args.value_width);
        let shared = args.heads / args.key_heads;
        // SAFETY: granted by the caller.
        unsafe {
            let k = head_of(args.k, args.k_strides, [batch, 0, key_head]);
            let size = [keys, width];
            K::right::<S>(k, Along::Columns, size, memory.staged, memory.keys);
            if !args.dq.is_null() {
                K::right::<S>(k, Along::Rows, size, memory.staged, memory.key_rows);
            }
            if self.args.needs_slopes() {
                let v = head_of(args.v, args.v_strides, [batch, 0, key_head]);
                let size = [keys, value_width];
                K::right::<S>(v, Along::Columns, size, memory.staged, memory.values);
            }
            std::ptr::write_bytes(memory.dk, 0, keys * memory.stride);
            std::ptr::write_bytes(memory.dv, 0, keys * memory.value_stride);
            for head in key_head * shared..(key_head + 1) * shared {
                for row in (0..args.rows).step_by(STRIP) {
                    let rows = STRIP.min(args.rows - row);
                    let q = head_of(args.q, args.q_strides, [batch, row, head]);
                    let dy = head_of(args.dy, args.dy_strides, [batch, row, head]);
                    let (q_size, dy_size) = ([rows, width], [rows, value_width]);
                    let (staged_q, staged_dy) = (memory.staged_q, memory.staged_dy);
                    if !args.dk.is_null() {
                        K::right::<S>(q, Along::Rows, q_size, staged_q, memory.queries);
                    }
                    if !args.dv.is_null() {
                        K::right::<S>(dy, Along::Rows, dy_size, staged_dy, memory.gradients);
                    }
                    let q = K::left::<S>(q, q_size, staged_q);
                    let dy = K::left::<S>(dy, dy_size, staged_dy);
                    for r in row..row + rows {
                        let next = [batch, head, args.heads];
                        fetch_next::<S, K::Stored>(args.q, args.q_strides, r, next, width);
                        fetch_next::<S, K::Stored>(args.dy, args.dy_strides, r, next, value_width);
                        let next = [batch, key_head, args.key_heads];
                        fetch_next::<S, K::Stored>(args.k, args.k_strides, r, next, width);
                        fetch_next::<S, K::Stored>(args.v, args.v_strides, r, next, value_width);
                    }
                    self.strip::<S, K>(Strip { head, row, rows, q, dy });
                    for r in 0..if args.dq.is_null() { 0 } else { rows } {
                        let at = ((batch * args.rows + row + r) * args.heads + head) * width;
                        let from = memory.dq.add(r * memory.stride);
                        K::store(from, width, 1.0, args.dq.cast::<K::Result>().add(at));
                    }
                }
            }
            // Rows that only fill up the last tile of a strip were added where no query sees the key.
            let seen = Seen { causal: args.causal != 0, keys, row: 0, key: 0 };
            let last = if args.rows == 0 { 0 } else { seen.all(args.rows - 1) };
            std::ptr::write_bytes(
                memory.dk.add(last * memory.stride),
                0,
                (keys - last) * memory.stride,
            );
            let rest = (keys - last) * memory.value_stride;
            std::ptr::write_bytes(memory.dv.add(last * memory.value_stride), 0, rest);
            for key in 0..keys {
                let at = (batch * keys + key) * args.key_heads + key_head;
                if !args.dk.is_null() {
                    let to = args.dk.cast::<K::Result>().add(at * width);
                    K::store(memory.dk.add(key * memory.stride), width, 1.0, to);
                }
                if !args.dv.is_null() {
                    let to = args.dv.cast::<K::Result>().add(at * value_width);
                    K::store(memory.dv.add(key * memory.value_stride), value_width, 1.0, to);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn strip<S: Simd, K: Kind>(&self, strip: Strip) {
        let Head { args, memory, .. } = *self;
        let rows = strip.rows;
        let mut seen = Seen { causal: args.causal != 0, keys: args.keys, row: strip.row, key: 0 };
        let all = seen.all(rows - 1);
        let mut known = Statistics::NONE;
        // SAFETY: granted by the caller.
        unsafe {
            if all == 0 {
                std::ptr::write_bytes(memory.dq, 0, rows * memory.stride);
            }
            let once = all <= CHUNK;
            if !once {
                for key in (0..all).step_by(CHUNK) {
                    seen.key = key;
                    self.scores::<K::Lanes<S>>(&strip, seen);
                    self.measure::<S>(&strip, seen, &mut known);
                }
            }
            for key in (0..all).step_by(CHUNK) {
                seen.key = key;
                self.scores::<K::Lanes<S>>(&strip, seen);
                if once {
                    self.measure::<S>(&strip, seen, &mut known);
                }
                self.finish::<S, K>(&strip, seen, &known, once);
                self.multiply::<K::Lanes<S>>(&strip, seen, all);
            }
        }
    }

    /// Scores and gradients of probabilities for the keys of a chunk.
    #[inline(always)]
    unsafe fn scores<L: Lanes>(&self, strip: &Strip, seen: Seen) {
        let Head { args, memory, .. } = *self;
        let Strip { rows, q, dy, .. } = *strip;
        // SAFETY: granted by the caller.
        unsafe {
            scores_of::<L>(args, memory.keys, args.width, q, rows, seen, memory.scores);
            if self.args.needs_slopes() {
                let (values, width) = (memory.values, args.value_width);
                scores_of::<L>(args, values, width, dy, rows, seen, memory.slopes);
            }
        }
    }

    /// Makes scores exponentials and adds them to what is known of their rows.
    #[inline(always)]
    unsafe fn measure<S: Simd>(&self, strip: &Strip, seen: Seen, known: &mut Statistics) {
        for r in 0..strip.rows {
            // SAFETY: granted by the caller.
            unsafe {
                let (scores, slopes) = self.row(r);
                let slopes = self.args.needs_slopes().then_some(slopes);
                let most = self.scaled(strip, seen, r);
                known.add::<S>(r, scores, slopes, seen.of_chunk(r), most);
            }
        }
    }

    /// The rows of scores and slopes of a query.
    #[inline(always)]
    unsafe fn row(&self, r: usize) -> (*mut f32, *mut f32) {
        let at = r * score_stride(self.args.keys);
        // SAFETY: the caller grants a row of the strip.
        unsafe { (self.memory.scores.add(at), self.memory.slopes.add(at)) }
    }

    /// Scales and masks a row of scores; returns the largest.
    #[inline(always)]
    unsafe fn scaled(&self, strip: &Strip, seen: Seen, r: usize) -> f32 {
        let place = [self.batch, strip.head, strip.row + r, seen.key];
        // SAFETY: granted by the caller.
        unsafe {
            let mask = Mask::of(self.args, place);
            let scale = f32::from_bits(self.args.scale as u32);
            finish_scores(self.row(r).0, seen.of_chunk(r), scale, mask)
        }
    }

    /// Makes probabilities and gradients of scores; `done` says that the exponentials are there.
    #[inline(always)]
    unsafe fn finish<S: Simd, K: Kind>(
        &self,
        strip: &Strip,
        seen: Seen,
        known: &Statistics,
        done: bool,
    ) {
        let scale = f32::from_bits(self.args.scale as u32);
        let columns = seen.of_chunk(strip.rows - 1);
        for r in 0..strip.rows {
            let count = seen.of_chunk(r);
            // SAFETY: granted by the caller.
            unsafe {
                let (scores, slopes) = self.row(r);
                if !done {
                    self.scaled(strip, seen, r);
                    exponentials::<S>(scores, count, known.largest[r]);
                }
                let factor = 1.0 / known.sums[r];
                let group = <K::Lanes<S> as Lanes>::GROUP;
                let longest = seen.of_chunk((r / group * group + group).min(strip.rows) - 1);
                let filled = filled::<K::Lanes<S>>(longest, columns);
                clear_rest(scores, count, filled);
                if !self.args.needs_slopes() {
                    for at in (0..count).step_by(BLOCK) {
                        for p in &mut *scores.add(at).cast::<[f32; BLOCK]>() {
                            *p *= factor;
                        }
                    }
                    K::narrow::<S>(scores, filled);
                    continue;
                }
                clear_rest(slopes, count, filled);
                let mean = known.slopes[r] * factor;
                for i in count..count.next_multiple_of(BLOCK) {
                    *slopes.add(i) = mean;
                }
                for at in (0..count).step_by(BLOCK) {
                    let block = &mut *scores.add(at).cast::<[f32; BLOCK]>();
                    let slopes = &mut *slopes.add(at).cast::<[f32; BLOCK]>();
                    for i in 0..BLOCK {
                        block[i] *= factor;
                        slopes[i] = block[i] * scale * (slopes[i] - mean);
                    }
                }
                K::narrow::<S>(scores, filled);
                K::narrow::<S>(slopes, filled);
            }
        }
    }

    /// The narrow rows `from` as words along queries.
    #[inline(always)]
    unsafe fn group<L: Lanes>(&self, from: *const f32, strip: &Strip, seen: Seen, to: *mut u32) {
        let stride = score_stride(self.args.keys);
        let columns = seen.of_chunk(strip.rows - 1);
        for first in (0..strip.rows).step_by(L::GROUP) {
            let end = strip.rows.min(first + L::GROUP);
            let mut rows = [None; 4];
            for (row, r) in rows.iter_mut().zip(first..end) {
                *row = Some(from.wrapping_add(r * stride).cast());
            }
            let count = filled::<L>(seen.of_chunk(end - 1), columns);
            // SAFETY: the caller grants rows of so many elements, and room for as many words.
            unsafe { pack::zip::<L, Left>(rows, count, to.add(first / L::GROUP * stride)) };
        }
    }

    /// The three products of a chunk whose last key but one is `all`.
    #[inline(always)]
    unsafe fn multiply<L: Lanes>(&self, strip: &Strip, seen: Seen, all: usize) {
        let Head { args, memory, .. } = *self;
        let (rows, stride) = (strip.rows, score_stride(args.keys));
        let panels = Panels { k: args.keys.div_ceil(L::GROUP), n: args.width };
        let by_queries =
            Rows { first: memory.slopes.cast_const().cast(), row_stride: stride, step: 1 };
        let of_queries = Product {
            left: by_queries,
            first: seen.key,
            rows,
            right: memory.key_rows,
            panels,
            panel_begin: 0,
            panel_end: panels.count::<L>(),
            out: memory.dq.cast(),
            out_stride: memory.stride,
            resume: seen.key > 0,
            kind: LeftOperand::Plain,
        };
        let by_keys = |narrow: *mut f32, words: *mut u32| {
            let first = if L::GROUP == 1 { narrow.cast() } else { words };
            Rows { first, row_stride: 1, step: stride }
        };
        let panels = Panels { k: rows.div_ceil(L::GROUP), n: args.width };
        let of_keys = Product {
            left: by_keys(memory.slopes, memory.slope_words),
            first: 0,
            rows: CHUNK.min(all - seen.key),
            right: memory.queries,
            panels,
            panel_end: panels.count::<L>(),
            out: memory.dk.wrapping_add(seen.key * memory.stride).cast(),
            resume: true,
            ..of_queries
        };
        let panels = Panels { n: args.value_width, ..panels };
        let of_values = Product {
            left: by_keys(memory.scores, memory.score_words),
            right: memory.gradients,
            panels,
            panel_end: panels.count::<L>(),
            out: memory.dv.wrapping_add(seen.key * memory.value_stride).cast(),
            out_stride: memory.value_stride,
            ..of_keys
        };
        // SAFETY: granted by the caller.
        unsafe {
            if !args.dq.is_null() {
                of_queries.run::<L>(Over::Keys, seen);
            }
            if !args.dk.is_null() {
                if L::GROUP > 1 {
                    self.group::<L>(memory.slopes, strip, seen, memory.slope_words);
                }
                of_keys.run::<L>(Over::Queries(rows), seen);
            }
            if !args.dv.is_null() {
                if L::GROUP > 1 {
                    self.group::<L>(memory.scores, strip, seen, memory.score_words);
                }
                of_values.run::<L>(Over::Queries(rows), seen);
            }
        }
    }
}

/// The dot product of the first `count` values of rows of whole blocks.
#[inline(always)]
unsafe fn dot(a: *const f32, b: *const f32, count: usize) -> f32 {
    let mut lanes = [0.0_f32; BLOCK];
    let whole = count / BLOCK * BLOCK;
    // SAFETY: granted by the caller.
    unsafe {
        for at in (0..whole).step_by(BLOCK) {
            let (a, b) = (&*a.add(at).cast::<[f32; BLOCK]>(), &*b.add(at).cast::<[f32; BLOCK]>());
            for i in 0..BLOCK {
                lanes[i] += a[i] * b[i];
            }
        }
        if whole < count {
            // Lanes stay in registers as long as all are added to.
            let (a, b) = (a.add(whole).cast::<[f32; BLOCK]>(), b.add(whole).cast::<[f32; BLOCK]>());
            let (a, b) = (&*a, &*b);
            for i in 0..BLOCK {
                lanes[i] += if i < count - whole { a[i] * b[i] } else { 0.0 };
            }
        }
    }
    total(lanes)
}
