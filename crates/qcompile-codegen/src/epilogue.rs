//! What follows a product: blocks of its result, and reductions down its columns.
//!
//! Each part of the rows (see [`Primitive::parts`](qcompile_kernels::Primitive)) has partial results of its own at the
//! front of the step's scratch, f64 `[part][entry][column]`, an entry for each reduction (two for squared deviations).
//! They start at the identity before the first phase, a block adds what its rows come to, and after the last phase
//! and a barrier they are combined in the order of the parts. So results do not depend on the number of threads.

use crate::emitter::{Emitter, trusted};
use crate::facts::{Facts, sum_of_deviations};
use crate::frame::Frame;
use crate::nest::{Accumulator, Range, Rule, Sweep, Tile};
use crate::wide::Wide;
use cranelift_codegen::ir::types::{F32, F32X4, F64, F64X2, I8X16, I64};
use cranelift_codegen::ir::{ConstantData, InstBuilder, Value};
use qcompile_ir::{Dim, ReduceOp};
use qcompile_plan::{LoopNest, Write};

/// Columns that are combined side by side.
const COMBINED: usize = 8;

/// The partial results of an epilogue in the scratch of its step.
pub(crate) struct Partials<'n> {
    nest: &'n LoopNest,
    entries: Vec<Accumulator>,
}

impl<'n> Partials<'n> {
    /// Those of a nest; `None` if it reduces nothing.
    pub(crate) fn of(nest: &'n LoopNest) -> Option<Partials<'n>> {
        let entries = Accumulator::all(nest);
        (!entries.is_empty()).then_some(Partials { nest, entries })
    }

    fn columns(&self, e: &mut Emitter<'_, '_>) -> Value {
        e.dim(self.nest.dims[1])
    }

    /// Bytes of one part.
    fn part_bytes(&self, e: &mut Emitter<'_, '_>) -> Value {
        let columns = self.columns(e);
        e.times(columns, 8 * self.entries.len())
    }

    /// Bytes of so many parts, a multiple of 64: the kernel's own scratch follows.
    pub(crate) fn bytes(&self, e: &mut Emitter<'_, '_>, parts: Value) -> Value {
        let part = self.part_bytes(e);
        let bytes = e.b.ins().imul(parts, part);
        let bytes = e.plus(bytes, 63);
        let mask = e.b.ins().iconst(I64, -64);
        e.b.ins().band(bytes, mask)
    }

    /// The address of an entry of a part.
    fn entry(&self, e: &mut Emitter<'_, '_>, part: Value, entry: usize) -> Value {
        let scratch = e.field(Frame::SCRATCH);
        let bytes = self.part_bytes(e);
        let above = e.b.ins().imul(part, bytes);
        let columns = self.columns(e);
        let left = e.times(columns, 8 * entry);
        let address = e.b.ins().iadd(scratch, above);
        e.b.ins().iadd(address, left)
    }

    /// Stores the identities, this thread's share of the parts.
    pub(crate) fn start(
        &self,
        e: &mut Emitter<'_, '_>,
        parts: Value,
        thread: Value,
        threads: Value,
    ) {
        let (begin, end) = e.share(parts, thread, threads);
        let columns = self.columns(e);
        e.count((begin, end, 1), None, &[], &mut |e, part, _| {
            for (at, entry) in self.entries.iter().enumerate() {
                let to = self.entry(e, part, at);
                let identity = identity(e, entry.rule);
                let zero = e.int(0);
                e.count((zero, columns, 1), None, &[], &mut |e, column, _| {
                    let at = element(e, to, column);
                    e.b.ins().store(trusted(), identity, at, 0);
                    Vec::new()
                });
            }
            Vec::new()
        });
    }

    /// Adds what the rows of a block come to, in one column or four.
    fn add(
        &self,
        e: &mut Emitter<'_, '_>,
        part: Value,
        column: Value,
        rows: Value,
        sums: &[Value],
        shift: Option<Value>,
    ) {
        let mut deviation: Vec<Value> = Vec::new();
        for (at, (entry, &sum)) in self.entries.iter().zip(sums).enumerate() {
            let row = self.entry(e, part, at);
            let address = element(e, row, column);
            let wide = promote(e, sum);
            let shift = shift.map(|shift| promote(e, shift)).unwrap_or_default();
            for (half, &wide_sum) in wide.iter().enumerate() {
                let ty = e.ty(wide_sum);
                let offset = 16 * i32::try_from(half).expect("two halves");
                let old = e.b.ins().load(ty, trusted(), address, offset);
                let new = match entry.rule {
                    Rule::Reduce(ReduceOp::Sum) => e.add(old, wide_sum),
                    Rule::Reduce(ReduceOp::Max) => e.maximum(old, wide_sum),
                    // The sum of x from that of d = x - shift.
                    Rule::Deviation => {
                        let shifts = times_count(e, shift[half], rows);
                        let sum = e.add(wide_sum, shifts);
                        e.add(old, sum)
                    }
                    // The sum of x² is that of d², of 2 · shift · d and of shift²: of shift · (d + x) and d².
                    Rule::Square => {
                        let shifts = times_count(e, shift[half], rows);
                        let twice = e.add(deviation[half], deviation[half]);
                        let inner = e.add(twice, shifts);
                        let product = e.mul(shift[half], inner);
                        let sum = e.add(wide_sum, product);
                        e.add(old, sum)
                    }
                };
                e.b.ins().store(trusted(), new, address, offset);
            }
            deviation = wide;
        }
    }

    /// Combines the parts, each thread some of the results.
    pub(crate) fn finish(
        &self,
        e: &mut Emitter<'_, '_>,
        parts: Value,
        thread: Value,
        threads: Value,
    ) {
        for (index, write) in
            self.nest.writes.iter().enumerate().filter(|(_, write)| reduces(write))
        {
            let source = sum_of_deviations(self.nest, write).unwrap_or(index);
            let at = self.entries.iter().position(|entry| entry.write == source);
            let at = at.expect("every reduction has an entry");
            let access = write.access().clone();
            let result = e.element(access.slot, access.offset, access.dtype.size());
            // Squared deviations take the squares, too.
            let taken = if matches!(write, Write::Deviations { .. }) { 2 } else { 1 };
            let rules: Vec<Rule> =
                self.entries[at..at + taken].iter().map(|entry| entry.rule).collect();
            let columns = self.columns(e);
            let rows = e.dim(self.nest.dims[0]);
            if access.strides[1] == Dim::ONE {
                let (begin, end) = e.share_in_groups(columns, 2 * COMBINED, thread, threads);
                let length = e.b.ins().isub(end, begin);
                let mask = e.b.ins().iconst(I64, -(COMBINED as i64));
                let whole = e.b.ins().band(length, mask);
                let whole = e.b.ins().iadd(begin, whole);
                for (begin, end, step) in [(begin, whole, COMBINED), (whole, end, 1)] {
                    e.count((begin, end, step), None, &[], &mut |e, column, _| {
                        let zero = e.int(0);
                        let start = starts(e, &rules, step);
                        let sums = e.count((zero, parts, 1), None, &start, &mut |e, part, sums| {
                            self.combined(e, at, &rules, part, column, step, sums)
                        });
                        let sums = lanes(e, &sums);
                        for lane in 0..step {
                            let of_lane: Vec<Value> =
                                (0..taken).map(|rule| sums[rule * step + lane]).collect();
                            let value = total(e, &of_lane, rows);
                            let index = e.plus(column, lane);
                            let offset = e.times(index, access.dtype.size());
                            let to = e.b.ins().iadd(result, offset);
                            e.store(access.dtype, value, to, false);
                        }
                        Vec::new()
                    });
                }
                continue;
            }
            // One result of all columns: the first thread adds them up.
            let first = e.is_zero(thread);
            e.when(first, |e| {
                let zero = e.int(0);
                let mask = e.b.ins().iconst(I64, -(COMBINED as i64));
                let whole = e.b.ins().band(columns, mask);
                let mut sums: Vec<Value> = starts(e, &rules, 1);
                for (begin, end, step) in [(zero, whole, COMBINED), (whole, columns, 1)] {
                    let start = starts(e, &rules, step);
                    let some = e.count((zero, parts, 1), None, &start, &mut |e, part, sums| {
                        e.count((begin, end, step), None, sums, &mut |e, column, sums| {
                            self.combined(e, at, &rules, part, column, step, sums)
                        })
                    });
                    let some = lanes(e, &some);
                    for (rule, sum) in sums.iter_mut().enumerate() {
                        for &value in &some[rule * step..(rule + 1) * step] {
                            *sum = combine(e, rules[rule], *sum, value);
                        }
                    }
                }
                let count = e.b.ins().imul(rows, columns);
                let value = total(e, &sums, count);
                e.store(access.dtype, value, result, false);
            });
        }
    }

    /// The sums with those of one part added, of `step` columns for each rule.
    #[allow(clippy::too_many_arguments, reason = "a position in the partial results")]
    fn combined(
        &self,
        e: &mut Emitter<'_, '_>,
        first: usize,
        rules: &[Rule],
        part: Value,
        column: Value,
        step: usize,
        sums: &[Value],
    ) -> Vec<Value> {
        let each = sums.len() / rules.len();
        let mut result = Vec::with_capacity(sums.len());
        for (at, &rule) in rules.iter().enumerate() {
            let row = self.entry(e, part, first + at);
            let address = element(e, row, column);
            for vector in 0..each {
                let sum = sums[at * each + vector];
                let offset = i32::try_from(8 * step / each * vector).expect("a few columns");
                let ty = e.ty(sum);
                let value = e.b.ins().load(ty, trusted(), address, offset);
                result.push(combine(e, rule, sum, value));
            }
        }
        result
    }
}

/// Emits an epilogue: the parameters are those of [`Epilogue`](qcompile_kernels::args::Epilogue) after the frame.
pub(crate) fn emit(
    e: &mut Emitter<'_, '_>,
    nest: &LoopNest,
    wide: Option<&Wide>,
    params: &[Value],
) {
    let [tile, tile_stride, row, rows, column, columns, part] = *params else {
        unreachable!("the signature has eight parameters")
    };
    let row_bytes = e.times(tile_stride, 4);
    let above = e.b.ins().imul(row, row_bytes);
    let left = e.times(column, 4);
    let base = e.b.ins().isub(tile, above);
    let base = e.b.ins().isub(base, left);
    let end_row = e.b.ins().iadd(row, rows);
    let end_column = e.b.ins().iadd(column, columns);
    let facts = Facts::of(nest);
    let ranges = vec![
        Range { begin: row, end: end_row, size: None },
        Range { begin: column, end: end_column, size: None },
    ];
    let partials = vec![None; nest.writes.len()];
    let tile = Some(Tile { base, row_bytes });
    let sweep = Sweep { nest, facts: &facts, ranges, partials, tile, wide };
    match (Partials::of(nest), wide) {
        (None, _) => sweep.emit(e),
        (Some(partials), Some(wide)) => {
            let entries: Vec<Value> = (0..partials.entries.len())
                .map(|at| {
                    let row = partials.entry(e, part, at);
                    element(e, row, column)
                })
                .collect();
            let cursors = sweep.cursors(e);
            wide.call(e, &sweep, 0, &cursors, &entries);
        }
        (Some(partials), None) => {
            sweep.emit_by_columns(e, &partials.entries, |e, column, sums, shift| {
                partials.add(e, part, column, rows, sums, shift);
            })
        }
    }
}

/// Whether a write is a reduction.
pub(crate) fn reduces(write: &Write) -> bool {
    !matches!(write, Write::Store { .. })
}

/// The address of an f64.
fn element(e: &mut Emitter<'_, '_>, address: Value, index: Value) -> Value {
    let offset = e.times(index, 8);
    e.b.ins().iadd(address, offset)
}

fn identity(e: &mut Emitter<'_, '_>, rule: Rule) -> Value {
    e.b.ins().f64const(match rule {
        Rule::Reduce(ReduceOp::Max) => f64::NEG_INFINITY,
        Rule::Reduce(ReduceOp::Sum) | Rule::Deviation | Rule::Square => 0.0,
    })
}

/// Identities for `step` columns of each rule: vectors of two, or single values.
fn starts(e: &mut Emitter<'_, '_>, rules: &[Rule], step: usize) -> Vec<Value> {
    let mut starts = Vec::new();
    for &rule in rules {
        let identity = identity(e, rule);
        let (value, count) =
            if step == 1 { (identity, 1) } else { (e.b.ins().splat(F64X2, identity), step / 2) };
        starts.extend(vec![value; count]);
    }
    starts
}

fn combine(e: &mut Emitter<'_, '_>, rule: Rule, x: Value, y: Value) -> Value {
    match rule {
        Rule::Reduce(ReduceOp::Max) => e.maximum(x, y),
        Rule::Reduce(ReduceOp::Sum) | Rule::Deviation | Rule::Square => e.add(x, y),
    }
}

/// The lanes of all values in order.
fn lanes(e: &mut Emitter<'_, '_>, values: &[Value]) -> Vec<Value> {
    let mut lanes = Vec::new();
    for &value in values {
        if e.ty(value).is_vector() {
            lanes.extend((0..2_u8).map(|lane| e.b.ins().extractlane(value, lane)));
        } else {
            lanes.push(value);
        }
    }
    lanes
}

/// The f32 result of the sums of `count` values: one sum, or Σx and Σx², which give Σ(x - mean)².
fn total(e: &mut Emitter<'_, '_>, sums: &[Value], count: Value) -> Value {
    let result = match *sums {
        [sum, squares] => {
            let count = e.b.ins().fcvt_from_sint(F64, count);
            let square = e.mul(sum, sum);
            let mean = e.div(square, count);
            let rest = e.sub(squares, mean);
            let zero = e.b.ins().f64const(0.0);
            e.larger(rest, zero)
        }
        _ => sums[0],
    };
    e.b.ins().fdemote(F32, result)
}

/// f32 as f64: one value, or two vectors of two.
fn promote(e: &mut Emitter<'_, '_>, value: Value) -> Vec<Value> {
    if !e.ty(value).is_vector() {
        return vec![e.b.ins().fpromote(F64, value)];
    }
    let low = e.b.ins().fvpromote_low(value);
    let upper: Vec<u8> = (8..16).chain(8..16).collect();
    let upper = e.b.func.dfg.immediates.push(ConstantData::from(upper));
    let bytes = e.cast_bits(I8X16, value);
    let bytes = e.b.ins().shuffle(bytes, bytes, upper);
    let high = e.cast_bits(F32X4, bytes);
    vec![low, e.b.ins().fvpromote_low(high)]
}

/// `x · count` in f64.
fn times_count(e: &mut Emitter<'_, '_>, x: Value, count: Value) -> Value {
    let count = e.b.ins().fcvt_from_sint(F64, count);
    let count = if e.ty(x).is_vector() { e.b.ins().splat(F64X2, count) } else { count };
    e.mul(x, count)
}
