//! Gradients of attention in int8 (after SageBwd: Zhang et al. 2025, arXiv:2505.11594, section 4).
//!
//! Gradients of scores have a scale for each query, which the sum over keys leaves alone. In a sum over queries it goes
//! into the other operand: that is rounded again, by a scale for each of its columns, for every block of queries. So does
//! the sum of the exponentials, whose codes are those of the forward product. Values meet an incoming gradient of two
//! codes, since what is lost there would be lost twice. Blocks are summed in f32, in their order.

use super::Statistics;
use super::memory::Memory;
use crate::args::{AttentionArgs, AttentionKind};
use crate::attention::{
    BLOCK, CHUNK, Mask, STRIP, exponentials, fetch_next, finish_scores, head_of, score_stride,
    scores_of,
};
use crate::attention_kind::{Along, Int8, Kind, Matrix, Rows, pack_rows, write};
use crate::buffer::{Buffer, Slot};
use crate::lanes::{Element, Lanes, Simd, Task};
use crate::pack::{self, Left};
use crate::rounding::{
    LARGEST, SHIFT, add, add_by_columns, code, golden_multiples, largest_magnitude, magnitude,
    round, round_at_random, round_columns, scale_of,
};
use crate::seen::{Left as LeftOperand, Over, Product, Seen};
use crate::tile::{EVERY_GROUP, Panels};
use std::marker::PhantomData;

/// Queries of a strip: those of a block.
const QUERIES: usize = AttentionKind::INT8_QUERIES;
const FINE_STEPS: f32 = AttentionKind::INT8_FINE_STEPS;
const _: () = assert!(QUERIES.next_multiple_of(EVERY_GROUP) <= STRIP);
const _: () = assert!(CHUNK == AttentionKind::INT8_KEYS);

/// Gradients, of and by floats of type `F` in memory.
pub(super) struct Gradients<F> {
    pub(super) args: AttentionArgs,
    pub(super) begin: usize,
    pub(super) end: usize,
    pub(super) float: PhantomData<F>,
}

impl<F: Element> Task for Gradients<F> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Gradients { args, begin, end, float } = self;
        let (sizes, strides) = Memory::sizes::<S::Int8>(&args);
        let words = sizes.iter().map(|words| words.next_multiple_of(16)).sum();
        let mut buffer = Buffer::take(Slot::Result, words);
        let memory = Memory::new(buffer.words().cast(), sizes, strides);
        if !args.numbers.is_null() {
            // SAFETY: the buffer has room for as many.
            golden_multiples(unsafe {
                std::slice::from_raw_parts_mut(memory.multiples, Memory::multiples(&args))
            });
        }
        for unit in begin..end {
            let batch = unit / args.key_heads;
            let head = Head { args: &args, memory, batch, float };
            // SAFETY: the operands and results have the head, the buffers room for it.
            unsafe { head.run::<S>(unit % args.key_heads) };
        }
    }
}

/// The work on one head of keys.
#[derive(Clone, Copy)]
struct Head<'a, F> {
    args: &'a AttentionArgs,
    memory: Memory,
    batch: usize,
    float: PhantomData<F>,
}

/// One strip of queries: a block.
struct Strip {
    head: usize,
    row: usize,
    rows: usize,
    q: Rows,
    /// The two codes of dy.
    dy: [Rows; 2],
    /// What sums of each with codes of values are multiplied with, for each query.
    dy_scales: [[f32; 2]; QUERIES],
    /// For each query what gradients of scores, and what columns, are rounded with at random.
    numbers: [[f32; QUERIES]; 2],
}

impl<F: Element> Head<'_, F> {
    #[inline(always)]
    unsafe fn run<S: Simd>(&self, key_head: usize) {
        let Head { args, memory, batch, .. } = *self;
        let (keys, width, value_width) = (args.keys, args.width, args.value_width);
        let shared = args.heads / args.key_heads;
        let unstaged = std::ptr::null_mut();
        // SAFETY: granted by the caller.
        unsafe {
            let k = head_of(args.k, args.k_strides, [batch, 0, key_head]);
            Int8::<F>::right::<S>(k, Along::Columns, [keys, width], unstaged, memory.keys);
            if !args.dq.is_null() {
                Int8::<F>::right::<S>(k, Along::Rows, [keys, width], unstaged, memory.key_rows);
            }
            if self.args.needs_slopes() {
                let v = head_of(args.v, args.v_strides, [batch, 0, key_head]);
                let size = [keys, value_width];
                Int8::<F>::right::<S>(v, Along::Columns, size, unstaged, memory.values);
            }
            std::ptr::write_bytes(memory.dk, 0, keys * memory.stride);
            std::ptr::write_bytes(memory.dv, 0, keys * memory.value_stride);
            for head in key_head * shared..(key_head + 1) * shared {
                for row in (0..args.rows).step_by(QUERIES) {
                    let rows = QUERIES.min(args.rows - row);
                    self.fetch::<S>([head, key_head], row, rows);
                    let strip = self.strip_of::<S>(head, row, rows);
                    self.strip::<S>(&strip);
                    for r in 0..if args.dq.is_null() { 0 } else { rows } {
                        let at = ((batch * args.rows + row + r) * args.heads + head) * width;
                        let to = args.dq.cast::<F>().add(at);
                        write(memory.dq.add(r * memory.stride), width, to);
                    }
                }
            }
            for key in 0..keys {
                let at = (batch * keys + key) * args.key_heads + key_head;
                if !args.dk.is_null() {
                    let to = args.dk.cast::<F>().add(at * width);
                    write(memory.dk.add(key * memory.stride), width, to);
                }
                if !args.dv.is_null() {
                    let to = args.dv.cast::<F>().add(at * value_width);
                    write(memory.dv.add(key * memory.value_stride), value_width, to);
                }
            }
        }
    }

    /// Asks for what the next heads have in the strip's place.
    #[inline(always)]
    fn fetch<S: Simd>(&self, [head, key_head]: [usize; 2], row: usize, rows: usize) {
        let Head { args, batch, .. } = *self;
        let (width, value_width) = (args.width, args.value_width);
        let (next, next_keys) = ([batch, head, args.heads], [batch, key_head, args.key_heads]);
        for r in row..row + rows {
            fetch_next::<S, i8>(args.q, args.q_strides, r, next, width);
            fetch_next::<S, F>(args.dy, args.dy_strides, r, next, value_width);
            fetch_next::<S, i8>(args.k, args.k_strides, r, next_keys, width);
            fetch_next::<S, i8>(args.v, args.v_strides, r, next_keys, value_width);
        }
    }

    /// The strip's left operands, with dy rounded twice: what the first codes leave by a fraction of their scale.
    #[inline(always)]
    unsafe fn strip_of<S: Simd>(&self, head: usize, row: usize, rows: usize) -> Strip {
        let Head { args, memory, batch, .. } = *self;
        let width = args.value_width;
        let mut dy_scales = [[0.0; 2]; QUERIES];
        // SAFETY: granted by the caller.
        unsafe {
            let q = head_of(args.q, args.q_strides, [batch, row, head]);
            let q = pack_rows::<S::Int8>(q, [rows, args.width], memory.left_q);
            if self.args.needs_slopes() {
                let value_scale = *args.scales[2];
                self.copy_dy(head, row, rows);
                for (r, scales) in dy_scales.iter_mut().enumerate().take(rows) {
                    let real = std::slice::from_raw_parts(memory.real.add(r * width), width);
                    let scale = scale_of(largest_magnitude(real));
                    let fine = scale / FINE_STEPS;
                    let (inverse, inverse_fine) = (1.0 / scale, 1.0 / fine);
                    let [first, second] = memory.codes.map(|codes| codes.add(r * width));
                    for (c, &x) in real.iter().enumerate() {
                        let shifted = x * inverse + SHIFT;
                        *first.add(c) = shifted.to_bits() as i8;
                        *second.add(c) = code(x - (shifted - SHIFT) * scale, inverse_fine);
                    }
                    *scales = [scale * value_scale, fine * value_scale];
                }
            }
            let packed = |at: usize| {
                let first = memory.codes[at].cast_const();
                let codes = Matrix { first, row_stride: width, column_stride: 1 };
                pack_rows::<S::Int8>(codes, [rows, width], memory.left_dy[at])
            };
            let mut numbers = [[0.0; QUERIES]; 2];
            if !args.numbers.is_null() {
                let from =
                    head_of::<f32>(args.numbers.cast(), args.number_strides, [batch, row, head]);
                for (which, numbers) in numbers.iter_mut().enumerate() {
                    for (r, number) in numbers.iter_mut().enumerate().take(rows) {
                        *number = *from.first.add(r * from.row_stride + which * from.column_stride);
                    }
                }
            }
            Strip { head, row, rows, q, dy: [packed(0), packed(1)], dy_scales, numbers }
        }
    }

    /// Copies the strip's dy to the rows that are rounded.
    #[inline(always)]
    unsafe fn copy_dy(&self, head: usize, row: usize, rows: usize) {
        let Head { args, memory, batch, .. } = *self;
        let width = args.value_width;
        // SAFETY: granted by the caller.
        unsafe {
            let dy = head_of::<F>(args.dy, args.dy_strides, [batch, row, head]);
            for r in 0..rows {
                let (from, to) = (dy.first.add(r * dy.row_stride), memory.real.add(r * width));
                if dy.column_stride == 1 {
                    for c in 0..width {
                        *to.add(c) = (*from.add(c)).real();
                    }
                    continue;
                }
                for c in 0..width {
                    *to.add(c) = (*from.add(c * dy.column_stride)).real();
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn strip<S: Simd>(&self, strip: &Strip) {
        let Head { args, memory, .. } = *self;
        let rows = strip.rows;
        let mut seen = Seen { causal: args.causal != 0, keys: args.keys, row: strip.row, key: 0 };
        let all = seen.all(rows - 1);
        let mut known = Statistics::NONE;
        // SAFETY: granted by the caller.
        unsafe {
            std::ptr::write_bytes(memory.dq, 0, rows * memory.stride);
            let once = all <= CHUNK;
            if !once {
                for key in (0..all).step_by(CHUNK) {
                    seen.key = key;
                    self.scores::<S>(strip, seen);
                    for r in 0..rows {
                        self.real(strip, seen, r);
                        self.measure::<S>(strip, seen, r, &mut known);
                    }
                }
            }
            let mut scales = [0.0; QUERIES];
            for key in (0..all).step_by(CHUNK) {
                seen.key = key;
                self.scores::<S>(strip, seen);
                // Row by row, so that each stays near from its sums to its codes.
                for (r, scale) in scales.iter_mut().enumerate().take(rows) {
                    self.real(strip, seen, r);
                    if once {
                        self.measure::<S>(strip, seen, r, &mut known);
                    }
                    *scale = self.finish::<S>(strip, seen, r, &known, once);
                }
                if key == 0 && !args.dv.is_null() {
                    self.round_gradients::<S>(strip, &known);
                }
                self.multiply::<S>(strip, seen, &scales);
            }
        }
    }

    /// Sums of codes that scores and gradients of probabilities are, for the keys of a chunk.
    #[inline(always)]
    unsafe fn scores<S: Simd>(&self, strip: &Strip, seen: Seen) {
        let Head { args, memory, .. } = *self;
        let (rows, width) = (strip.rows, args.value_width);
        let [dy, fine] = strip.dy;
        // SAFETY: granted by the caller.
        unsafe {
            scores_of::<S::Int8>(args, memory.keys, args.width, strip.q, rows, seen, memory.scores);
            if self.args.needs_slopes() {
                let values = memory.values;
                scores_of::<S::Int8>(args, values, width, dy, rows, seen, memory.slopes);
                scores_of::<S::Int8>(args, values, width, fine, rows, seen, memory.fine_slopes);
            }
        }
    }

    /// Makes a row of sums scores before their scale, and gradients of probabilities.
    #[inline(always)]
    unsafe fn real(&self, strip: &Strip, seen: Seen, r: usize) {
        // SAFETY: granted by the caller.
        unsafe {
            let (count, [scores, slopes, fine]) = (seen.of_chunk(r), self.row(r));
            Int8::<F>::real(scores, count);
            if self.args.needs_slopes() {
                let [scale, fine_scale] = strip.dy_scales[r];
                for i in 0..count {
                    let first = *slopes.add(i).cast::<i32>() as f32;
                    let second = *fine.add(i).cast::<i32>() as f32;
                    *slopes.add(i) = first * scale + second * fine_scale;
                }
            }
        }
    }

    /// The rows of scores, slopes and fine slopes of a query.
    #[inline(always)]
    unsafe fn row(&self, r: usize) -> [*mut f32; 3] {
        let Memory { scores, slopes, fine_slopes, .. } = self.memory;
        let at = r * score_stride(self.args.keys);
        // SAFETY: the caller grants a row of the strip.
        unsafe { [scores.add(at), slopes.add(at), fine_slopes.add(at)] }
    }

    /// Scales and masks a row of scores; returns the largest.
    #[inline(always)]
    unsafe fn scaled(&self, strip: &Strip, seen: Seen, r: usize) -> f32 {
        let place = [self.batch, strip.head, strip.row + r, seen.key];
        // SAFETY: granted by the caller.
        unsafe {
            let mask = Mask::of(self.args, place);
            let [scale, _] = Int8::<F>::scales(self.args);
            finish_scores(self.row(r)[0], seen.of_chunk(r), scale, mask)
        }
    }

    /// Makes a row of scores exponentials and adds them to what is known of it.
    #[inline(always)]
    unsafe fn measure<S: Simd>(&self, strip: &Strip, seen: Seen, r: usize, known: &mut Statistics) {
        // SAFETY: granted by the caller.
        unsafe {
            let [scores, slopes, _] = self.row(r);
            let slopes = self.args.needs_slopes().then_some(slopes);
            let most = self.scaled(strip, seen, r);
            known.add::<S>(r, scores, slopes, seen.of_chunk(r), most);
        }
    }

    /// Makes codes of a row's exponentials and of its gradients of scores, and returns the scale of the latter; `done` says
    /// that the exponentials are there.
    #[inline(always)]
    unsafe fn finish<S: Simd>(
        &self,
        strip: &Strip,
        seen: Seen,
        r: usize,
        known: &Statistics,
        done: bool,
    ) -> f32 {
        let Head { args, memory, .. } = *self;
        let scale = f32::from_bits(args.scale as u32);
        let padded = seen.of_chunk(strip.rows - 1).next_multiple_of(BLOCK);
        let count = seen.of_chunk(r);
        let blocks = count.next_multiple_of(BLOCK);
        // SAFETY: granted by the caller.
        unsafe {
            let [scores, slopes, _] = self.row(r);
            if !done {
                self.scaled(strip, seen, r);
                exponentials::<S>(scores, count, known.largest[r]);
            }
            let codes = memory.score_codes.add(r * memory.code_stride);
            round(scores, blocks, LARGEST, codes);
            std::ptr::write_bytes(codes.add(blocks), 0, padded - blocks);
            if !self.args.needs_slopes() {
                return 0.0;
            }
            let factor = 1.0 / known.sums[r];
            let mean = known.slopes[r] * factor;
            for i in count..blocks {
                *slopes.add(i) = mean;
            }
            let mut most = [0_u32; BLOCK];
            for at in (0..count).step_by(BLOCK) {
                let powers = &*scores.add(at).cast::<[f32; BLOCK]>();
                let slopes = &mut *slopes.add(at).cast::<[f32; BLOCK]>();
                for i in 0..BLOCK {
                    slopes[i] = powers[i] * factor * scale * (slopes[i] - mean);
                    most[i] = most[i].max(magnitude(slopes[i]));
                }
            }
            let row_scale = scale_of(most.into_iter().fold(0, u32::max));
            let codes = memory.slope_codes.add(r * memory.code_stride);
            if args.numbers.is_null() {
                round(slopes, blocks, 1.0 / row_scale, codes);
            } else {
                // What is not seen is 0, and rounds to it.
                let multiples = std::slice::from_raw_parts(memory.multiples.add(seen.key), blocks);
                round_at_random(slopes, 1.0 / row_scale, strip.numbers[0][r], multiples, codes);
            }
            std::ptr::write_bytes(codes.add(blocks), 0, padded - blocks);
            row_scale
        }
    }

    /// Packs the strip's dy, each row over the sum of its exponentials.
    #[inline(always)]
    unsafe fn round_gradients<S: Simd>(&self, strip: &Strip, known: &Statistics) {
        let Memory { real, gradients, gradient_scales, .. } = self.memory;
        let (rows, width) = (strip.rows, self.args.value_width);
        // SAFETY: granted by the caller.
        unsafe {
            self.copy_dy(strip.head, strip.row, rows);
            for r in 0..rows {
                let factor = 1.0 / known.sums[r];
                for c in 0..width {
                    *real.add(r * width + c) *= factor;
                }
            }
            let scales = (gradient_scales, 1.0 / LARGEST);
            self.round_columns::<S>(strip, width, scales, gradients);
        }
    }

    /// Packs the strip's queries, each times the scale of its gradients of scores.
    #[inline(always)]
    unsafe fn round_queries<S: Simd>(&self, strip: &Strip, scales: &[f32; QUERIES]) {
        let Head { args, memory, batch, .. } = *self;
        let width = args.width;
        // SAFETY: granted by the caller.
        unsafe {
            let q = head_of::<i8>(args.q, args.q_strides, [batch, strip.row, strip.head]);
            for (r, scale) in scales.iter().enumerate().take(strip.rows) {
                let (from, to) = (q.first.add(r * q.row_stride), memory.real.add(r * width));
                if q.column_stride == 1 {
                    for c in 0..width {
                        *to.add(c) = f32::from(*from.add(c)) * scale;
                    }
                    continue;
                }
                for c in 0..width {
                    *to.add(c) = f32::from(*from.add(c * q.column_stride)) * scale;
                }
            }
            let scales = (memory.query_scales, *args.scales[0]);
            self.round_columns::<S>(strip, width, scales, memory.queries);
        }
    }

    /// Rounds the rows by a scale for each column, which is kept times a factor, and packs them as a right operand whose K
    /// are the rows.
    #[inline(always)]
    unsafe fn round_columns<S: Simd>(
        &self,
        strip: &Strip,
        width: usize,
        (scales, factor): (*mut f32, f32),
        to: *mut u32,
    ) {
        let Memory { real, codes: [codes, _], multiples, .. } = self.memory;
        let size = [strip.rows, width];
        // SAFETY: granted by the caller.
        unsafe {
            let numbers = (!self.args.numbers.is_null()).then(|| {
                (&strip.numbers[1][..], std::slice::from_raw_parts(multiples.cast_const(), width))
            });
            round_columns(real, size, scales, factor, numbers, codes);
            let codes = Matrix { first: codes.cast_const(), row_stride: size[1], column_stride: 1 };
            Int8::<F>::right::<S>(codes, Along::Rows, size, std::ptr::null_mut(), to);
        }
    }

    /// The three products of a chunk.
    #[inline(always)]
    unsafe fn multiply<S: Simd>(&self, strip: &Strip, seen: Seen, scales: &[f32; QUERIES]) {
        let Head { args, memory, .. } = *self;
        let (rows, columns) = (strip.rows, seen.of_chunk(strip.rows - 1));
        // SAFETY: granted by the caller.
        unsafe {
            let k_scale = *args.scales[1];
            if !args.dq.is_null() {
                self.multiply_keys::<S::Int8>(rows, columns, seen);
                for (r, scale) in scales.iter().enumerate().take(rows) {
                    let at = r * memory.stride;
                    let factor = scale * k_scale;
                    add(memory.dq.add(at), memory.sums.add(at), args.width, factor);
                }
            }
            if !args.dk.is_null() {
                self.round_queries::<S>(strip, scales);
                let size = [args.width, memory.stride];
                let right = (memory.queries, size);
                self.multiply_queries::<S::Int8>(memory.slope_codes, right, rows, columns, seen);
                let to = memory.dk.add(seen.key * memory.stride);
                self.add_sums(to, columns, size, memory.query_scales);
            }
            if !args.dv.is_null() {
                let size = [args.value_width, memory.value_stride];
                let right = (memory.gradients, size);
                self.multiply_queries::<S::Int8>(memory.score_codes, right, rows, columns, seen);
                let to = memory.dv.add(seen.key * memory.value_stride);
                self.add_sums(to, columns, size, memory.gradient_scales);
            }
        }
    }

    /// Adds the sums of so many keys to their rows of a gradient, by a scale for each column.
    #[inline(always)]
    unsafe fn add_sums(
        &self,
        to: *mut f32,
        keys: usize,
        [width, stride]: [usize; 2],
        scales: *const f32,
    ) {
        for at in (0..keys).map(|key| key * stride) {
            // SAFETY: granted by the caller.
            unsafe { add_by_columns(to.add(at), self.memory.sums.add(at), width, scales) };
        }
    }

    /// Codes of gradients of scores times keys.
    #[inline(always)]
    unsafe fn multiply_keys<L: Lanes<Element = i8>>(
        &self,
        rows: usize,
        columns: usize,
        seen: Seen,
    ) {
        let Head { args, memory, .. } = *self;
        let first = memory.slope_codes.cast_const();
        let codes = Matrix { first, row_stride: memory.code_stride, column_stride: 1 };
        let panels = Panels { k: args.keys.div_ceil(L::GROUP), n: args.width };
        let over = Over::All(seen.key, seen.key + columns);
        // SAFETY: granted by the caller.
        unsafe {
            let size = [rows, columns.next_multiple_of(BLOCK)];
            let product = Product {
                left: pack_rows::<L>(codes, size, memory.words),
                first: seen.key,
                rows,
                right: memory.key_rows,
                panels,
                panel_begin: 0,
                panel_end: panels.count::<L>(),
                out: memory.sums,
                out_stride: memory.stride,
                resume: false,
                kind: LeftOperand::Packed,
            };
            if seen.causal || args.keys > CHUNK {
                product.cover::<L>(over, seen);
            }
            product.run::<L>(over, seen);
        }
    }

    /// Codes, turned, times the packed rows of queries or of dy.
    #[inline(always)]
    unsafe fn multiply_queries<L: Lanes<Element = i8>>(
        &self,
        codes: *mut i8,
        (right, [width, stride]): (*mut u32, [usize; 2]),
        rows: usize,
        columns: usize,
        seen: Seen,
    ) {
        let Memory { words, sums, code_stride, .. } = self.memory;
        let panels = Panels { k: rows.div_ceil(L::GROUP), n: width };
        // SAFETY: granted by the caller.
        unsafe {
            for first in (0..rows).step_by(L::GROUP) {
                let mut together = [None; 4];
                let end = rows.min(first + L::GROUP);
                for (row, r) in together.iter_mut().zip(first..end) {
                    *row = Some(codes.add(r * code_stride).cast_const());
                }
                let to = words.add(first / L::GROUP * code_stride);
                pack::zip::<L, Left>(together, columns.next_multiple_of(BLOCK), to);
            }
            let product = Product {
                left: Rows { first: words, row_stride: 1, step: code_stride },
                first: 0,
                rows: columns,
                right,
                panels,
                panel_begin: 0,
                panel_end: panels.count::<L>(),
                out: sums,
                out_stride: stride,
                resume: false,
                kind: LeftOperand::Packed,
            };
            product.run::<L>(Over::All(0, rows), seen);
        }
    }
}
