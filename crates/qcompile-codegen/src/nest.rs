//! One loop nest: loops, the innermost one on four lanes where it can be, and reductions.

use crate::emitter::Emitter;
use crate::facts::{Facts, innermost, partial_type, sum_of_deviations, written_once};
use crate::lanes::int_like;
use crate::wide::Wide;
use cranelift_codegen::ir::types::{F32, I64};
use cranelift_codegen::ir::{InstBuilder, Value};
use qcompile_ir::{DType, Dim, ReduceOp};
use qcompile_plan::{LoopNest, Scalar, Write};

/// Vectors that a loop over rows carries at most.
const MOST_CARRIED: usize = 12;

/// A range of one dimension.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Range {
    pub begin: Value,
    pub end: Value,
    /// How many, where that is known when code is emitted.
    pub size: Option<usize>,
}

/// The finished tile that an epilogue reads: element (0, 0) of the result and the bytes from row to row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tile {
    pub base: Value,
    pub row_bytes: Value,
}

/// Where a nest goes over which part of its domain.
pub(crate) struct Sweep<'n> {
    pub nest: &'n LoopNest,
    pub facts: &'n Facts,
    /// One for each dim.
    pub ranges: Vec<Range>,
    /// For each write: where partial results go instead, of [`partial_type`].
    pub partials: Vec<Option<Value>>,
    pub tile: Option<Tile>,
    /// The function for the two innermost dims, where there is one.
    pub wide: Option<&'n Wide>,
}

/// How a value joins what an accumulator holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    Reduce(ReduceOp),
    /// Adds its distance from a shift.
    Deviation,
    /// Adds the square of that.
    Square,
}

/// A reduction that stays in registers during a loop.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Accumulator {
    /// Index of the write.
    pub write: usize,
    pub rule: Rule,
    /// The type in registers.
    pub dtype: DType,
}

impl Accumulator {
    /// Those of all reductions of an epilogue, squared deviations as [`Rule::Deviation`] and [`Rule::Square`]. The
    /// deviations also give the sum of the same values.
    pub(crate) fn all(nest: &LoopNest) -> Vec<Accumulator> {
        let mut all = Vec::new();
        for (write, of) in nest.writes.iter().enumerate() {
            let rules: &[Rule] = match of {
                Write::Store { .. } => &[],
                Write::Reduce { .. } if sum_of_deviations(nest, of).is_some() => &[],
                Write::Reduce { op, .. } => &[Rule::Reduce(*op)],
                Write::Deviations { .. } => &[Rule::Deviation, Rule::Square],
            };
            all.extend(rules.iter().map(|&rule| Accumulator { write, rule, dtype: DType::F32 }));
        }
        all
    }

    fn identity(&self, e: &mut Emitter<'_, '_>, vector: bool) -> Value {
        let op = match self.rule {
            Rule::Reduce(op) => op,
            Rule::Deviation | Rule::Square => ReduceOp::Sum,
        };
        e.identity(op, self.dtype, vector)
    }

    fn join(
        &self,
        e: &mut Emitter<'_, '_>,
        sum: Value,
        value: Value,
        shift: Option<Value>,
    ) -> Value {
        let deviation = |e: &mut Emitter<'_, '_>| {
            let shift = shift.expect("squared deviations belong to an epilogue");
            e.sub(value, shift)
        };
        match self.rule {
            Rule::Reduce(op) => e.combine(op, self.dtype, sum, value),
            Rule::Deviation => {
                let deviation = deviation(e);
                e.add(sum, deviation)
            }
            Rule::Square => {
                let deviation = deviation(e);
                e.mul_add(deviation, deviation, sum)
            }
        }
    }
}

/// A view with its address at the current indices of the outer loops.
#[derive(Clone, Copy)]
pub(crate) struct Cursor {
    pub address: Value,
    pub dtype: DType,
}

impl Sweep<'_> {
    /// Emits the nest.
    pub(crate) fn emit(&self, e: &mut Emitter<'_, '_>) {
        let cursors = self.cursors(e);
        self.level(e, 0, &cursors);
    }

    /// Emits an epilogue whose reductions go down the rows: column by column, so that what they come to stays in
    /// registers until the last row. `finish` gets a column, the accumulators for it or for four columns from it
    /// on, and the shift of deviations: the first row's element of the tile.
    pub(crate) fn emit_by_columns(
        &self,
        e: &mut Emitter<'_, '_>,
        accumulators: &[Accumulator],
        finish: impl Fn(&mut Emitter<'_, '_>, Value, &[Value], Option<Value>),
    ) {
        let [rows, columns] = self.ranges[..] else { unreachable!("an epilogue has two dims") };
        let cursors = self.cursors(e);
        let down = self.strides(e, 0, &cursors);
        let across = self.strides(e, 1, &cursors);
        let zero = e.int(0);
        let shifted = accumulators.iter().any(|one| one.rule == Rule::Deviation);
        // What is carried from row to row has to fit the registers.
        let carried = accumulators.len() + usize::from(shifted);
        let mut parts = self.facts.parts;
        while parts > 1 && parts * carried > MOST_CARRIED {
            parts /= 2;
        }
        let mut begin = columns.begin;
        if parts > 0 {
            let step = 4 * parts;
            let count = e.b.ins().isub(columns.end, columns.begin);
            let mask = e.b.ins().iconst(I64, -(step as i64));
            let count = e.b.ins().band(count, mask);
            let end = e.b.ins().iadd(columns.begin, count);
            e.count((begin, end, step), None, &[], &mut |e, column, _| {
                let cursors = moved(e, column, &cursors, &across);
                let shifts: Vec<Value> = if shifted {
                    let first = moved(e, rows.begin, &cursors, &down);
                    let tile = first[first.len() - 1].address;
                    (0..parts).map(|part| e.load4(DType::F32, tile, 16 * part as i32)).collect()
                } else {
                    Vec::new()
                };
                let mut start: Vec<Value> = Vec::new();
                for accumulator in accumulators {
                    let identity = accumulator.identity(e, true);
                    start.extend(vec![identity; parts]);
                }
                let sums =
                    e.count((rows.begin, rows.end, 1), None, &start, &mut |e, row, carried| {
                        let cursors = moved(e, row, &cursors, &down);
                        let fixed = self.invariants(e, &cursors);
                        let splats = self.splats(e, &fixed);
                        let state = Carried { accumulators, values: carried, shifts: &shifts };
                        self.vectors(e, parts, zero, &cursors, &across, &splats, state)
                    });
                for part in 0..parts {
                    let column = e.plus(column, 4 * part);
                    let of_part: Vec<Value> =
                        sums.iter().skip(part).step_by(parts).copied().collect();
                    finish(e, column, &of_part, shifts.get(part).copied());
                }
                Vec::new()
            });
            begin = end;
        }
        e.count((begin, columns.end, 1), None, &[], &mut |e, column, _| {
            let cursors = moved(e, column, &cursors, &across);
            let shifts: Vec<Value> = if shifted {
                let first = moved(e, rows.begin, &cursors, &down);
                vec![e.load(DType::F32, first[first.len() - 1].address)]
            } else {
                Vec::new()
            };
            let start: Vec<Value> =
                accumulators.iter().map(|accumulator| accumulator.identity(e, false)).collect();
            let sums = e.count((rows.begin, rows.end, 1), None, &start, &mut |e, row, carried| {
                let cursors = moved(e, row, &cursors, &down);
                let fixed = self.invariants(e, &cursors);
                let state = Carried { accumulators, values: carried, shifts: &shifts };
                self.elements(e, zero, &cursors, &across, &fixed, state)
            });
            finish(e, column, &sums, shifts.first().copied());
            Vec::new()
        });
    }

    /// All views, at the first element.
    pub(crate) fn cursors(&self, e: &mut Emitter<'_, '_>) -> Vec<Cursor> {
        let mut cursors: Vec<Cursor> = Vec::new();
        for read in &self.nest.reads {
            let address = e.element(read.slot, read.offset, read.dtype.size());
            cursors.push(Cursor { address, dtype: read.dtype });
        }
        for (write, partial) in self.nest.writes.iter().zip(&self.partials) {
            let access = write.access();
            cursors.push(match *partial {
                Some(address) => Cursor { address, dtype: partial_type(access.dtype) },
                None => Cursor {
                    address: e.element(access.slot, access.offset, access.dtype.size()),
                    dtype: access.dtype,
                },
            });
        }
        if let Some(tile) = self.tile {
            cursors.push(Cursor { address: tile.base, dtype: DType::F32 });
        }
        cursors
    }

    /// Strides of all cursors along one dim, in bytes; `None` for 0.
    pub(crate) fn strides(
        &self,
        e: &mut Emitter<'_, '_>,
        dim: usize,
        cursors: &[Cursor],
    ) -> Vec<Option<Value>> {
        let accesses = self.nest.reads.iter().chain(self.nest.writes.iter().map(Write::access));
        let mut strides: Vec<Option<Value>> = Vec::with_capacity(cursors.len());
        for (access, cursor) in accesses.zip(cursors) {
            let stride = access.strides.get(dim).copied().unwrap_or(Dim::fixed(0));
            strides.push(if stride.scale == 0 {
                None
            } else {
                let stride = e.dim(stride);
                Some(e.times(stride, cursor.dtype.size()))
            });
        }
        if let Some(tile) = self.tile {
            strides.push(Some(if dim == 0 { tile.row_bytes } else { e.int(4) }));
        }
        strides
    }

    fn level(&self, e: &mut Emitter<'_, '_>, dim: usize, cursors: &[Cursor]) {
        if let Some(wide) = self.wide.filter(|_| dim + 2 >= self.ranges.len()) {
            return wide.call(e, self, dim, cursors, &[]);
        }
        if dim + 1 >= self.ranges.len() {
            self.innermost(e, cursors);
            return;
        }
        let strides = self.strides(e, dim, cursors);
        let Range { begin, end, size } = self.ranges[dim];
        e.count((begin, end, 1), size, &[], &mut |e, index, _| {
            let inner = moved(e, index, cursors, &strides);
            self.level(e, dim + 1, &inner);
            Vec::new()
        });
    }

    /// Reductions that stay in registers during the innermost loop.
    fn accumulators(&self) -> Vec<Accumulator> {
        let writes = self.nest.writes.iter().enumerate();
        writes
            .filter_map(|(index, write)| match write {
                Write::Reduce { access, op, value } if innermost(&access.strides).scale == 0 => {
                    let dtype = partial_type(self.facts.types[*value]);
                    Some(Accumulator { write: index, rule: Rule::Reduce(*op), dtype })
                }
                _ => None,
            })
            .collect()
    }

    fn innermost(&self, e: &mut Emitter<'_, '_>, cursors: &[Cursor]) {
        let last = self.ranges.len().saturating_sub(1);
        let (range, strides) = match self.ranges.last() {
            Some(&range) => (range, self.strides(e, last, cursors)),
            None => {
                let (begin, end) = (e.int(0), e.int(1));
                (Range { begin, end, size: Some(1) }, vec![None; cursors.len()])
            }
        };
        let accumulators = self.accumulators();
        let fixed = self.invariants(e, cursors);
        let parts = self.facts.parts;
        let step = 4 * parts;

        let mut scalars: Vec<Option<Value>> = vec![None; accumulators.len()];
        let (mut begin, mut left) = (range.begin, range.size);
        if parts > 0 && range.size.is_none_or(|size| size >= step) {
            let splats = self.splats(e, &fixed);
            let (end, turns) = match range.size {
                Some(size) => {
                    left = Some(size % step);
                    (e.plus(range.begin, size / step * step), Some(size / step))
                }
                None => {
                    let count = e.b.ins().isub(range.end, range.begin);
                    let mask = e.b.ins().iconst(I64, -(step as i64));
                    let count = e.b.ins().band(count, mask);
                    (e.b.ins().iadd(range.begin, count), None)
                }
            };
            let mut start: Vec<Value> = Vec::new();
            for accumulator in &accumulators {
                let identity = accumulator.identity(e, true);
                start.extend(vec![identity; parts]);
            }
            let sums =
                e.count((range.begin, end, step), turns, &start, &mut |e, index, carried| {
                    let state =
                        Carried { accumulators: &accumulators, values: carried, shifts: &[] };
                    self.vectors(e, parts, index, cursors, &strides, &splats, state)
                });
            begin = end;
            for (at, accumulator) in accumulators.iter().enumerate() {
                let vectors = &sums[at * parts..(at + 1) * parts];
                scalars[at] = Some(horizontal(e, *accumulator, vectors));
            }
        }
        let start: Vec<Value> = accumulators
            .iter()
            .zip(&scalars)
            .map(|(accumulator, &scalar)| match scalar {
                Some(scalar) => scalar,
                None => accumulator.identity(e, false),
            })
            .collect();
        let sums = e.count((begin, range.end, 1), left, &start, &mut |e, index, carried| {
            let state = Carried { accumulators: &accumulators, values: carried, shifts: &[] };
            self.elements(e, index, cursors, &strides, &fixed, state)
        });
        for (accumulator, &sum) in accumulators.iter().zip(&sums) {
            let index = accumulator.write;
            let write = &self.nest.writes[index];
            let cursor = cursors[self.nest.reads.len() + index];
            let sum = if self.partials[index].is_none() && written_once(self.nest, write) {
                sum
            } else {
                let old = e.load(cursor.dtype, cursor.address);
                accumulator.join(e, old, sum, None)
            };
            e.store(cursor.dtype, sum, cursor.address, false);
        }
    }

    /// Values that stay the same during the innermost loop, as scalars.
    fn invariants(&self, e: &mut Emitter<'_, '_>, cursors: &[Cursor]) -> Vec<Option<Value>> {
        let mut values: Vec<Option<Value>> = vec![None; self.nest.body.len()];
        for (at, &scalar) in self.nest.body.iter().enumerate() {
            if !self.facts.invariant[at] {
                continue;
            }
            values[at] = Some(match scalar {
                Scalar::Read(read) => {
                    let cursor = cursors[read];
                    e.load(cursor.dtype, cursor.address)
                }
                Scalar::Const(dtype, value) => e.constant(dtype, value, false),
                Scalar::Size(dim) => {
                    let size = e.dim(dim);
                    e.b.ins().fcvt_from_sint(F32, size)
                }
                _ => e.apply(self.nest, self.facts, at, &|x| {
                    values[x].expect("verified: operands come first")
                }),
            });
        }
        values
    }

    /// The same in all lanes, where the loop uses them.
    fn splats(&self, e: &mut Emitter<'_, '_>, fixed: &[Option<Value>]) -> Vec<Option<Value>> {
        let mut used = vec![false; self.nest.body.len()];
        for (at, &scalar) in self.nest.body.iter().enumerate() {
            if !self.facts.invariant[at] {
                scalar.operands().for_each(|x| used[x] = true);
            }
        }
        self.nest.writes.iter().for_each(|write| used[write.value()] = true);
        let mut splats = vec![None; self.nest.body.len()];
        for (at, value) in fixed.iter().enumerate() {
            if let (Some(value), true) = (*value, used[at]) {
                splats[at] = Some(match self.nest.body[at] {
                    Scalar::Const(dtype, constant) => e.constant(dtype, constant, true),
                    _ => e.spread(value),
                });
            }
        }
        splats
    }

    /// One turn on so many vectors; returns the new accumulators.
    #[allow(clippy::too_many_arguments, reason = "the state of one innermost loop")]
    fn vectors(
        &self,
        e: &mut Emitter<'_, '_>,
        parts: usize,
        index: Value,
        cursors: &[Cursor],
        strides: &[Option<Value>],
        splats: &[Option<Value>],
        state: Carried<'_>,
    ) -> Vec<Value> {
        let addresses = advance(e, index, cursors, strides);
        let mut values: Vec<Vec<Value>> = Vec::with_capacity(self.nest.body.len());
        for (at, &scalar) in self.nest.body.iter().enumerate() {
            let value = if self.facts.invariant[at] {
                match splats[at] {
                    Some(splat) => vec![splat; parts],
                    None => Vec::new(),
                }
            } else {
                (0..parts)
                    .map(|part| match scalar {
                        Scalar::Read(read) => {
                            let unit = innermost(&self.nest.reads[read].strides) == Dim::ONE;
                            let (address, dtype) = (addresses[read], cursors[read].dtype);
                            if unit {
                                let offset = (4 * part * dtype.size()) as i32;
                                e.load4(dtype, address, offset)
                            } else {
                                e.pick4(address, strides[read], part)
                            }
                        }
                        Scalar::Tile => {
                            let address = addresses[addresses.len() - 1];
                            e.load4(DType::F32, address, 16 * part as i32)
                        }
                        _ => e.apply(self.nest, self.facts, at, &|x| values[x][part]),
                    })
                    .collect()
            };
            values.push(value);
        }
        let mut sums = state.values.to_vec();
        for (at, accumulator) in state.accumulators.iter().enumerate() {
            let write = &self.nest.writes[accumulator.write];
            for (part, &value) in values[write.value()].iter().enumerate() {
                let sum = &mut sums[at * parts + part];
                *sum = accumulator.join(e, *sum, value, state.shifts.get(part).copied());
            }
        }
        for (index, write) in self.nest.writes.iter().enumerate() {
            if state.holds(index) {
                continue;
            }
            let parts_of = &values[write.value()];
            let at = self.nest.reads.len() + index;
            let (address, dtype) = (addresses[at], cursors[at].dtype);
            match write {
                Write::Store { value, .. } => {
                    e.store4(dtype, parts_of, address, self.facts.exact[*value]);
                }
                Write::Reduce { op, .. } => {
                    let kind = partial_type(dtype);
                    let mut new = Vec::with_capacity(parts);
                    for (part, &value) in parts_of.iter().enumerate() {
                        let old = e.load4(dtype, address, (4 * part * dtype.size()) as i32);
                        new.push(e.combine(*op, kind, old, value));
                    }
                    e.store4(dtype, &new, address, false);
                }
                Write::Deviations { .. } => unreachable!("verified: only in an epilogue"),
            }
        }
        sums
    }

    /// One turn on single elements; returns the new accumulators.
    fn elements(
        &self,
        e: &mut Emitter<'_, '_>,
        index: Value,
        cursors: &[Cursor],
        strides: &[Option<Value>],
        fixed: &[Option<Value>],
        state: Carried<'_>,
    ) -> Vec<Value> {
        let addresses = advance(e, index, cursors, strides);
        let mut values: Vec<Value> = Vec::with_capacity(self.nest.body.len());
        for (at, &scalar) in self.nest.body.iter().enumerate() {
            values.push(match (fixed[at], scalar) {
                (Some(value), _) => value,
                (None, Scalar::Read(read)) => e.load(cursors[read].dtype, addresses[read]),
                (None, Scalar::Tile) => e.load(DType::F32, addresses[addresses.len() - 1]),
                (None, _) => e.apply(self.nest, self.facts, at, &|x| values[x]),
            });
        }
        let mut sums = state.values.to_vec();
        for (sum, accumulator) in sums.iter_mut().zip(state.accumulators) {
            let value = values[self.nest.writes[accumulator.write].value()];
            *sum = accumulator.join(e, *sum, value, state.shifts.first().copied());
        }
        for (index, write) in self.nest.writes.iter().enumerate() {
            if state.holds(index) {
                continue;
            }
            let value = values[write.value()];
            let at = self.nest.reads.len() + index;
            let (address, dtype) = (addresses[at], cursors[at].dtype);
            match write {
                Write::Store { value: at, .. } => {
                    e.store(dtype, value, address, self.facts.exact[*at]);
                }
                Write::Reduce { op, .. } => {
                    let old = e.load(dtype, address);
                    let new = e.combine(*op, partial_type(dtype), old, value);
                    e.store(dtype, new, address, false);
                }
                Write::Deviations { .. } => unreachable!("verified: only in an epilogue"),
            }
        }
        sums
    }
}

/// The accumulators of a loop and what they hold at the start of a turn.
#[derive(Clone, Copy)]
struct Carried<'a> {
    accumulators: &'a [Accumulator],
    values: &'a [Value],
    /// What deviations are measured from, for each vector or for the element.
    shifts: &'a [Value],
}

impl Carried<'_> {
    fn holds(&self, write: usize) -> bool {
        self.accumulators.iter().any(|accumulator| accumulator.write == write)
    }
}

/// The cursors at an index of a loop.
pub(crate) fn moved(
    e: &mut Emitter<'_, '_>,
    index: Value,
    cursors: &[Cursor],
    strides: &[Option<Value>],
) -> Vec<Cursor> {
    let addresses = advance(e, index, cursors, strides);
    let at = |(cursor, address): (&Cursor, Value)| Cursor { address, ..*cursor };
    cursors.iter().zip(addresses).map(at).collect()
}

/// Addresses at an index of the innermost loop.
fn advance(
    e: &mut Emitter<'_, '_>,
    index: Value,
    cursors: &[Cursor],
    strides: &[Option<Value>],
) -> Vec<Value> {
    cursors
        .iter()
        .zip(strides)
        .map(|(cursor, stride)| match *stride {
            Some(stride) => {
                let offset = e.b.ins().imul(index, stride);
                e.b.ins().iadd(cursor.address, offset)
            }
            None => cursor.address,
        })
        .collect()
}

/// All lanes of all vectors combined, in a fixed order.
fn horizontal(e: &mut Emitter<'_, '_>, accumulator: Accumulator, vectors: &[Value]) -> Value {
    let mut level = vectors.to_vec();
    while level.len() > 1 {
        level = level
            .chunks(2)
            .map(|pair| accumulator.join(e, pair[0], pair[pair.len() - 1], None))
            .collect();
    }
    debug_assert!(level.len() == 1 && int_like(e.ty(level[0])).is_vector());
    let lanes: Vec<Value> = (0..4_u8).map(|lane| e.b.ins().extractlane(level[0], lane)).collect();
    let low = accumulator.join(e, lanes[0], lanes[1], None);
    let high = accumulator.join(e, lanes[2], lanes[3], None);
    accumulator.join(e, low, high, None)
}
