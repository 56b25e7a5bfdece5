//! A nest as sections of straight-line code around the two loops.

use super::assembler::{self as asm, Code};
use super::body::{Divisor, Lane, has_lanes};
use super::straight::{Instruction, Is, Lanes, Memory, Name, Straight, Value, float};
use super::{Layout, sweep};
use crate::facts::{Facts, innermost, partial_type, written_once};
use crate::nest::{Accumulator, Rule};
use qcompile_ir::{DType, Dim, ReduceOp};
use qcompile_plan::{Access, LoopNest, Scalar, Write};
use std::collections::BTreeMap;

/// Columns up to which a nest goes down the rows of 16 or so columns at a time, so that what belongs to a column stays
/// in registers.
const FEW_COLUMNS: usize = 64;

/// Which loop is the outer one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Row by row.
    Rows,
    /// Some columns, all rows of these, then the next columns.
    Columns,
}

/// A view as the two loops see it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cursor {
    pub dtype: DType,
    /// Bytes of an element.
    pub bytes: u8,
    /// Whether it moves with the columns, to the next element.
    pub along: bool,
    /// Whether it moves with the rows.
    pub down: bool,
}

/// What there is to know of a nest before code is made.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub order: Order,
    /// Reads, writes, the tile of an epilogue, and its partial results in f64.
    pub cursors: Vec<Cursor>,
    /// Sizes in the body, in order.
    pub sizes: Vec<Dim>,
    epilogue: bool,
    partial: Vec<bool>,
}

/// Sections of straight-line code.
pub(crate) struct Sections {
    pub straight: Straight,
    pub order: Order,
    /// Vectors of the main loop.
    pub parts: usize,
    pub before: Vec<Instruction>,
    /// For the main loop, and for the end of rows: what comes before the inner loop, its turn, and what comes after.
    pub main: [Vec<Instruction>; 3],
    pub tail: [Vec<Instruction>; 3],
    pub after: Vec<Instruction>,
}

impl Shape {
    /// The shape of a nest that has a wide form. `partial` says which writes go to partial results of their own.
    pub(crate) fn of(
        nest: &LoopNest,
        facts: &Facts,
        partial: &[bool],
        epilogue: bool,
    ) -> Option<Shape> {
        let &last = nest.dims.last()?;
        let fixed = last.as_fixed();
        if fixed.is_some_and(|size| size < 4) || !facts.types.iter().all(|&dtype| has_lanes(dtype))
        {
            return None;
        }
        let cursor = |access: &Access, dtype: DType| {
            let along = innermost(&access.strides);
            let above = access.strides.len().checked_sub(2).map(|dim| access.strides[dim]);
            let known = has_lanes(dtype) && (along.scale == 0 || along == Dim::ONE);
            known.then(|| Cursor {
                dtype,
                bytes: dtype.size() as u8,
                along: along.scale != 0,
                down: above.is_some_and(|stride| stride.scale != 0),
            })
        };
        let mut cursors = Vec::new();
        for read in &nest.reads {
            cursors.push(cursor(read, read.dtype)?);
        }
        let mut order = Order::Rows;
        let few = fixed.is_some_and(|size| size <= FEW_COLUMNS);
        if epilogue || (nest.dims.len() > 1 && few) {
            order = Order::Columns;
        }
        for (write, &partial) in nest.writes.iter().zip(partial) {
            let dtype = write.access().dtype;
            let dtype = if partial { partial_type(dtype) } else { dtype };
            let place = cursor(write.access(), dtype)?;
            match write {
                Write::Store { .. } if place.along => {}
                Write::Store { .. } => return None,
                Write::Reduce { .. } if epilogue => {}
                Write::Reduce { .. } => {
                    if !facts.types[write.value()].is_float()
                        || (dtype != DType::F32 && !written_once(nest, write))
                    {
                        return None;
                    }
                    if place.down && !place.along {
                        order = Order::Rows;
                    }
                }
                Write::Deviations { .. } => {}
            }
            cursors.push(place);
        }
        if epilogue {
            cursors.push(Cursor { dtype: DType::F32, bytes: 4, along: true, down: true });
            let entry = Cursor { dtype: DType::F32, bytes: 8, along: true, down: false };
            cursors.extend(Accumulator::all(nest).iter().map(|_| entry));
        }
        let sizes = nest
            .body
            .iter()
            .filter_map(|scalar| match scalar {
                Scalar::Size(dim) => Some(*dim),
                _ => None,
            })
            .collect();
        Some(Shape { order, cursors, sizes, epilogue, partial: partial.to_vec() })
    }

    pub(crate) fn layout(&self) -> Layout {
        Layout { cursors: self.cursors.len(), sizes: self.sizes.len() }
    }
}

/// The function of a nest. `None` if the registers do not suffice or a value has no wide form.
pub(crate) fn compile(nest: &LoopNest, facts: &Facts, shape: &Shape) -> Option<Code> {
    let most = match facts.cost {
        0..=12 => 4,
        13..=30 => 2,
        _ => 1,
    };
    let columns = nest.dims.last().and_then(|dim| dim.as_fixed()).unwrap_or(usize::MAX);
    let attempts = [(4, true), (2, true), (1, true), (1, false)];
    let fitting =
        |&(parts, _): &(usize, bool)| parts == 1 || (parts <= most && 16 * parts <= columns);
    attempts.into_iter().filter(fitting).find_map(|(parts, hoist)| {
        let lowering = Lowering { nest, facts, shape, levels: levels(nest, shape, hoist) };
        let sections = lowering.sections(parts)?;
        sweep::emit(shape, &sections)
    })
}

/// Which loops a value changes in: 0 none, 1 the outer one, 2 the inner one.
fn levels(nest: &LoopNest, shape: &Shape, hoist: bool) -> Vec<usize> {
    let mut levels: Vec<usize> = Vec::with_capacity(nest.body.len());
    for &scalar in &nest.body {
        let level = match scalar {
            Scalar::Read(read) => {
                let Cursor { along, down, .. } = shape.cursors[read];
                let (outer, inner) = match shape.order {
                    Order::Rows => (down, along),
                    Order::Columns => (along, down),
                };
                if inner || !hoist { 2 } else { usize::from(outer) }
            }
            Scalar::Tile => 2,
            Scalar::Const(..) => 0,
            Scalar::Size(_) => {
                if hoist {
                    0
                } else {
                    2
                }
            }
            _ => scalar.operands().map(|x| levels[x]).max().unwrap_or(0),
        };
        levels.push(level);
    }
    levels
}

/// Where the result of a reduction is while the loops run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Home {
    /// In registers during both loops.
    Both,
    /// In registers during the inner loop.
    Inner,
    /// In memory.
    Memory,
}

/// A reduction in registers.
struct Sum {
    write: usize,
    rule: Rule,
    home: Home,
    names: Vec<Name>,
    /// What deviations are measured from.
    shifts: Vec<Value>,
}

struct Lowering<'n> {
    nest: &'n LoopNest,
    facts: &'n Facts,
    shape: &'n Shape,
    levels: Vec<usize>,
}

/// The values of a body so far, each for the vectors of its own.
#[derive(Clone)]
struct Values {
    lanes: Vec<Vec<Lane>>,
    /// Of quantizations, whose scale changes less often than they do.
    divisors: BTreeMap<usize, Vec<Divisor>>,
}

impl Values {
    /// The value of a vector: that of its own, or the one of all.
    fn of(&self, at: usize, part: usize) -> Lane {
        of_part(&self.lanes[at], part)
    }
}

fn of_part<T: Copy>(parts: &[T], part: usize) -> T {
    parts[part.min(parts.len() - 1)]
}

impl Lowering<'_> {
    fn sections(&self, parts: usize) -> Option<Sections> {
        let mut s = Straight::default();
        let lanes = vec![Vec::new(); self.nest.body.len()];
        let mut values = Values { lanes, divisors: BTreeMap::new() };
        self.lower(&mut s, 0, 1, &mut values)?;
        let mut totals = self.sums(&mut s, Home::Both, parts);
        let before = s.section();
        let mut sections: [[Vec<Instruction>; 3]; 2] = Default::default();
        if self.shape.order == Order::Rows {
            self.lower(&mut s, 1, 1, &mut values)?;
            let sums = self.sums(&mut s, Home::Inner, parts);
            sections[0][0] = s.section();
            for (section, tail) in sections.iter_mut().zip([false, true]) {
                s.tail = tail;
                let parts = if tail { 1 } else { parts };
                self.turn(&mut s, parts, &values, &mut [&sums, &totals])?;
                section[1] = s.section();
            }
            s.tail = false;
            self.finish(&mut s, &sums)?;
            sections[0][2] = s.section();
        } else {
            for (section, tail) in sections.iter_mut().zip([false, true]) {
                s.tail = tail;
                let parts = if tail { 1 } else { parts };
                let mut values = values.clone();
                self.lower(&mut s, 1, parts, &mut values)?;
                let sums = self.sums(&mut s, Home::Inner, parts);
                section[0] = s.section();
                self.turn(&mut s, parts, &values, &mut [&sums, &totals])?;
                section[1] = s.section();
                if self.shape.epilogue {
                    self.finish_entries(&mut s, &sums);
                } else {
                    self.finish_columns(&mut s, &sums)?;
                }
                section[2] = s.section();
            }
            s.tail = false;
        }
        self.finish(&mut s, &totals)?;
        totals.clear();
        let after = s.section();
        let [main, tail] = sections;
        Some(Sections { straight: s, order: self.shape.order, parts, before, main, tail, after })
    }

    fn memory(&self, cursor: usize, part: usize) -> Memory {
        let Cursor { bytes, along, .. } = self.shape.cursors[cursor];
        let size = if along { bytes } else { 0 };
        Memory::Cursor { cursor, offset: 16 * part as i32 * i32::from(size), size }
    }

    fn tile(&self) -> usize {
        self.nest.reads.len() + self.nest.writes.len()
    }

    /// The values of a level, for so many vectors.
    fn lower(
        &self,
        s: &mut Straight,
        level: usize,
        parts: usize,
        values: &mut Values,
    ) -> Option<()> {
        let mut size = 0;
        for (at, &scalar) in self.nest.body.iter().enumerate() {
            let this_size = size;
            size += usize::from(matches!(scalar, Scalar::Size(_)));
            if self.levels[at] != level {
                continue;
            }
            let mut lanes = Vec::with_capacity(parts);
            for part in 0..parts {
                lanes.push(match scalar {
                    Scalar::Read(read) => {
                        s.load(self.nest.reads[read].dtype, self.memory(read, part))?
                    }
                    Scalar::Tile => s.load(DType::F32, self.memory(self.tile(), part))?,
                    Scalar::Size(_) => {
                        let word = self.shape.layout().size(this_size);
                        Lane::Number(s.read(asm::BROADCAST, Memory::Word(word)))
                    }
                    _ => {
                        let divisor = values.divisors.get(&at).map(|parts| of_part(parts, part));
                        s.apply(self.nest, self.facts, at, &|x| values.of(x, part), divisor)?
                    }
                });
            }
            values.lanes[at] = lanes;
        }
        for (at, &scalar) in self.nest.body.iter().enumerate() {
            if self.divided_at(at) != Some(level) {
                continue;
            }
            let Scalar::Quantize(dtype, _, scale, zero_point) = scalar else { continue };
            let mut divisors = Vec::with_capacity(parts);
            for part in 0..parts {
                let zero_point = zero_point.map(|zero_point| values.of(zero_point, part));
                divisors.push(s.divisor(dtype, values.of(scale, part), zero_point)?);
            }
            values.divisors.insert(at, divisors);
        }
        Some(())
    }

    /// The level that knows the scale of a quantization to few codes, if that is not its own.
    fn divided_at(&self, at: usize) -> Option<usize> {
        let Scalar::Quantize(dtype, _, scale, zero_point) = self.nest.body[at] else {
            return None;
        };
        let level =
            [Some(scale), zero_point].into_iter().flatten().map(|x| self.levels[x]).max()?;
        let few = matches!(dtype, DType::I8 | DType::U8 | DType::I4 | DType::U4);
        (few && level < self.levels[at]).then_some(level)
    }

    fn home(&self, write: usize) -> Home {
        let Cursor { along, down, .. } = self.shape.cursors[self.nest.reads.len() + write];
        match (self.shape.order, down, along) {
            _ if self.shape.epilogue => Home::Inner,
            (_, false, false) => Home::Both,
            (Order::Rows, true, false) | (Order::Columns, false, true) => Home::Inner,
            (Order::Columns, true, false) | (_, true, true) | (Order::Rows, false, true) => {
                Home::Memory
            }
        }
    }

    /// Reductions of a home, at their identities.
    fn sums(&self, s: &mut Straight, home: Home, parts: usize) -> Vec<Sum> {
        let all: Vec<(usize, Rule)> = if self.shape.epilogue {
            Accumulator::all(self.nest).iter().map(|one| (one.write, one.rule)).collect()
        } else {
            let rule = |(index, write): (usize, &Write)| match write {
                Write::Reduce { op, .. } => Some((index, Rule::Reduce(*op))),
                Write::Store { .. } | Write::Deviations { .. } => None,
            };
            self.nest.writes.iter().enumerate().filter_map(rule).collect()
        };
        let here = all.into_iter().filter(|&(write, _)| self.home(write) == home);
        let here: Vec<(usize, Rule)> = here.collect();
        let shifted = here.iter().any(|&(_, rule)| rule == Rule::Deviation);
        let shifts: Vec<Value> = if shifted {
            (0..parts).map(|part| s.read(asm::LOAD, self.memory(self.tile(), part))).collect()
        } else {
            Vec::new()
        };
        let mut sums = Vec::new();
        for (write, rule) in here {
            let identity = match rule {
                Rule::Reduce(ReduceOp::Max) => f32::NEG_INFINITY,
                Rule::Reduce(ReduceOp::Sum) | Rule::Deviation | Rule::Square => 0.0,
            };
            let names = (0..parts).map(|_| s.name(float(identity))).collect();
            sums.push(Sum { write, rule, home, names, shifts: shifts.clone() });
        }
        sums
    }

    /// One turn of the inner loop.
    fn turn(
        &self,
        s: &mut Straight,
        parts: usize,
        values: &Values,
        sums: &mut [&Vec<Sum>],
    ) -> Option<()> {
        let mut values = values.clone();
        self.lower(s, 2, parts, &mut values)?;
        for sum in sums.iter().copied().flatten() {
            let across = sum.home == Home::Both || self.shape.order == Order::Rows;
            let lanes = if s.tail && across { Lanes::Tail } else { Lanes::All };
            for part in 0..parts {
                let value = values.of(self.nest.writes[sum.write].value(), part);
                let Lane::Number(value) = value else { return None };
                join(s, sum.rule, sum.names[part], value, sum.shifts.get(part).copied(), lanes);
            }
        }
        for (index, write) in self.nest.writes.iter().enumerate() {
            let cursor = self.nest.reads.len() + index;
            let dtype = self.shape.cursors[cursor].dtype;
            let lanes = if s.tail { Lanes::Tail } else { Lanes::All };
            for part in 0..parts {
                let value = values.of(write.value(), part);
                let to = self.memory(cursor, part);
                match write {
                    Write::Store { value: at, .. } => {
                        s.store(dtype, value, to, self.facts.exact[*at], lanes)?;
                    }
                    Write::Reduce { op, .. } if self.home(index) == Home::Memory => {
                        let (Lane::Number(value), Lane::Number(old)) = (value, s.load(dtype, to)?)
                        else {
                            return None;
                        };
                        let new = combine(s, *op, old, value);
                        s.store(dtype, Lane::Number(new), to, false, lanes)?;
                    }
                    Write::Reduce { .. } | Write::Deviations { .. } => {}
                }
            }
        }
        Some(())
    }

    /// Stores reductions over all columns; the mask of the last columns has the first one alone.
    fn finish(&self, s: &mut Straight, sums: &[Sum]) -> Option<()> {
        for sum in sums {
            let Rule::Reduce(op) = sum.rule else { return None };
            let mut level: Vec<Value> = sum.names.iter().map(|&name| Value::Name(name)).collect();
            while level.len() > 1 {
                level = level
                    .chunks(2)
                    .map(|pair| combine(s, op, pair[0], pair[pair.len() - 1]))
                    .collect();
            }
            let mut result = level[0];
            for (opcode, order) in [
                (asm::SHUFFLE_QUARTERS, 0x4e),
                (asm::SHUFFLE_QUARTERS, 0xb1),
                (asm::SHUFFLE_LANES, 0x4e),
                (asm::SHUFFLE_LANES, 0xb1),
            ] {
                let other = s.shuffle(opcode, result, order);
                result = combine(s, op, result, other);
            }
            let cursor = self.nest.reads.len() + sum.write;
            let (to, dtype) = (self.memory(cursor, 0), self.shape.cursors[cursor].dtype);
            let write = &self.nest.writes[sum.write];
            if self.shape.partial[sum.write] || !written_once(self.nest, write) {
                let Lane::Number(old) = s.load(dtype, to)? else { return None };
                result = combine(s, op, old, result);
            }
            s.store(dtype, Lane::Number(result), to, false, Lanes::Tail)?;
        }
        Some(())
    }

    /// Adds reductions over the rows to what memory holds.
    fn finish_columns(&self, s: &mut Straight, sums: &[Sum]) -> Option<()> {
        for sum in sums {
            let Rule::Reduce(op) = sum.rule else { return None };
            let cursor = self.nest.reads.len() + sum.write;
            let dtype = self.shape.cursors[cursor].dtype;
            for (part, &name) in sum.names.iter().enumerate() {
                let to = self.memory(cursor, part);
                let Lane::Number(old) = s.load(dtype, to)? else { return None };
                let new = combine(s, op, old, Value::Name(name));
                let lanes = if s.tail { Lanes::Tail } else { Lanes::All };
                s.store(dtype, Lane::Number(new), to, false, lanes)?;
            }
        }
        Some(())
    }

    /// Adds reductions over the rows to partial results in f64, by the rules of [`epilogue`](crate::epilogue).
    fn finish_entries(&self, s: &mut Straight, sums: &[Sum]) {
        if sums.is_empty() {
            return;
        }
        let rows = s.read(asm::BROADCAST_F64, Memory::Word(Layout::COUNT));
        for (part, upper) in (0..sums[0].names.len()).flat_map(|part| [(part, false), (part, true)])
        {
            let mut deviation = None;
            for (at, sum) in sums.iter().enumerate() {
                let wide = s.widened(Value::Name(sum.names[part]), upper);
                let shift = match sum.rule {
                    Rule::Reduce(_) => None,
                    Rule::Deviation | Rule::Square => {
                        sum.shifts.get(part).map(|&shift| s.widened(shift, upper))
                    }
                };
                let cursor = self.tile() + 1 + at;
                let offset = 128 * part as i32 + if upper { 64 } else { 0 };
                let to = Memory::Cursor { cursor, offset, size: 8 };
                let (load, store) = match (s.tail, upper) {
                    (false, _) => (Lanes::All, Lanes::All),
                    (true, false) => (Lanes::TailZero, Lanes::Tail),
                    (true, true) => {
                        let mask = s.upper_mask();
                        (Lanes::Upper(mask), Lanes::Upper(mask))
                    }
                };
                let old = s.read_lanes(asm::LOAD_F64, to, load);
                let new = match (sum.rule, shift) {
                    (Rule::Reduce(ReduceOp::Max), _) => {
                        let result = s.two(asm::MAX_F64, wide, old);
                        let strange = s.compare_f64(Is::Unordered, wide, wide);
                        s.choose_f64(strange, wide, result)
                    }
                    (Rule::Deviation, Some(shift)) => {
                        let shifts = s.two(asm::MUL_F64, shift, rows);
                        let sum = s.two(asm::ADD_F64, wide, shifts);
                        s.two(asm::ADD_F64, old, sum)
                    }
                    (Rule::Square, Some(shift)) => {
                        let shifts = s.two(asm::MUL_F64, shift, rows);
                        let deviation = deviation.unwrap_or(wide);
                        let twice = s.two(asm::ADD_F64, deviation, deviation);
                        let inner = s.two(asm::ADD_F64, twice, shifts);
                        let product = s.two(asm::MUL_F64, shift, inner);
                        let sum = s.two(asm::ADD_F64, wide, product);
                        s.two(asm::ADD_F64, old, sum)
                    }
                    _ => s.two(asm::ADD_F64, old, wide),
                };
                let new = s.name(new);
                s.write(asm::STORE_F64, new, to, store);
                deviation = Some(wide);
            }
        }
    }
}

/// Two partial results as one.
fn combine(s: &mut Straight, op: ReduceOp, x: Value, y: Value) -> Value {
    match op {
        ReduceOp::Sum => s.add(x, y),
        ReduceOp::Max => s.extreme(true, x, y),
    }
}

/// A value joins a reduction.
fn join(
    s: &mut Straight,
    rule: Rule,
    place: Name,
    value: Value,
    shift: Option<Value>,
    lanes: Lanes,
) {
    let deviation = |s: &mut Straight| match shift {
        Some(shift) => s.sub(value, shift),
        None => value,
    };
    match rule {
        Rule::Reduce(ReduceOp::Sum) => s.update(asm::ADD, place, Some(place), value, lanes),
        Rule::Reduce(ReduceOp::Max) => {
            let new = s.extreme(true, Value::Name(place), value);
            s.update(asm::MOVE, place, None, new, lanes);
        }
        Rule::Deviation => {
            let deviation = deviation(s);
            s.update(asm::ADD, place, Some(place), deviation, lanes);
        }
        Rule::Square => {
            let deviation = deviation(s);
            let second = s.name(deviation);
            s.update(asm::MUL_ADD_231, place, Some(second), deviation, lanes);
        }
    }
}
