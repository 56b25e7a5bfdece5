//! Compositions on a draft that several operators share: broadcasting, reshaping, layouts.

use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::known::Known;
use qcompile_ir::{BinaryOp, CompareOp, DType, Dim, Op, ReduceOp, Shape, UnaryOp};

type Result<T> = std::result::Result<T, Obstacle>;

/// The shape that both broadcast to.
pub(crate) fn broadcast_dims(a: &[Dim], b: &[Dim]) -> Result<Vec<Dim>> {
    let rank = a.len().max(b.len());
    let dim = |dims: &[Dim], axis: usize| {
        (axis + dims.len()).checked_sub(rank).map_or(Dim::ONE, |at| dims[at])
    };
    (0..rank)
        .map(|axis| match (dim(a, axis), dim(b, axis)) {
            (x, y) if x == y => Ok(x),
            (x, Dim::ONE) => Ok(x),
            (Dim::ONE, y) => Ok(y),
            (x, y) => Err(Obstacle::invalid(format!(
                "{} and {} do not broadcast: {x} against {y} at axis {axis}",
                Shape(a.to_vec()),
                Shape(b.to_vec())
            ))),
        })
        .collect()
}

impl Draft {
    /// A constant scalar.
    pub(crate) fn scalar(&mut self, dtype: DType, value: f64) -> ValueId {
        self.add_known(Known::scalar(dtype, value))
    }

    pub(crate) fn unary(&mut self, op: UnaryOp, x: ValueId) -> Result<ValueId> {
        self.emit(Op::Unary(op), &[x])
    }

    /// An op over floats that has a kernel of its own, which takes no f16: of such, through f32.
    pub(crate) fn emit_wide(&mut self, op: Op, operands: &[ValueId]) -> Result<ValueId> {
        if operands.iter().any(|&operand| self.dtype(operand) != DType::F16) {
            return self.emit(op, operands);
        }
        let wide: Result<Vec<ValueId>> =
            operands.iter().map(|&operand| self.cast(operand, DType::F32)).collect();
        let result = self.emit(op, &wide?)?;
        self.cast(result, DType::F16)
    }

    /// `x` converted, if it is not of the type already.
    pub(crate) fn cast(&mut self, x: ValueId, to: DType) -> Result<ValueId> {
        if self.dtype(x) == to {
            return Ok(x);
        }
        if to == DType::Bool {
            // True is anything but zero; truncation first would lose 0.5.
            let zero = self.scalar(self.dtype(x), 0.0);
            let equal = self.compare(CompareOp::Equal, x, zero)?;
            return self.unary(UnaryOp::Not, equal);
        }
        self.emit(Op::Cast(to), &[x])
    }

    /// `x` under numpy broadcasting to `dims`, if it does not have them already.
    pub(crate) fn broadcast(&mut self, x: ValueId, dims: &[Dim]) -> Result<ValueId> {
        if self.dims(x) == dims {
            return Ok(x);
        }
        self.emit(Op::Broadcast(Shape(dims.to_vec())), &[x])
    }

    /// Both operands under their common shape.
    pub(crate) fn broadcast_pair(&mut self, a: ValueId, b: ValueId) -> Result<[ValueId; 2]> {
        let dims = broadcast_dims(self.dims(a), self.dims(b))?;
        Ok([self.broadcast(a, &dims)?, self.broadcast(b, &dims)?])
    }

    /// `op` with broadcasting.
    pub(crate) fn binary(&mut self, op: BinaryOp, a: ValueId, b: ValueId) -> Result<ValueId> {
        let [a, b] = self.broadcast_pair(a, b)?;
        self.emit(Op::Binary(op), &[a, b])
    }

    pub(crate) fn add(&mut self, a: ValueId, b: ValueId) -> Result<ValueId> {
        self.binary(BinaryOp::Add, a, b)
    }

    pub(crate) fn sub(&mut self, a: ValueId, b: ValueId) -> Result<ValueId> {
        self.binary(BinaryOp::Sub, a, b)
    }

    pub(crate) fn mul(&mut self, a: ValueId, b: ValueId) -> Result<ValueId> {
        self.binary(BinaryOp::Mul, a, b)
    }

    /// `op` with a constant as second operand.
    pub(crate) fn binary_scalar(
        &mut self,
        op: BinaryOp,
        x: ValueId,
        value: f64,
    ) -> Result<ValueId> {
        let scalar = self.scalar(self.dtype(x), value);
        self.binary(op, x, scalar)
    }

    /// A comparison with broadcasting.
    pub(crate) fn compare(&mut self, op: CompareOp, a: ValueId, b: ValueId) -> Result<ValueId> {
        let [a, b] = self.broadcast_pair(a, b)?;
        self.emit(Op::Compare(op), &[a, b])
    }

    /// `a` where `condition`, else `b`, with broadcasting.
    pub(crate) fn select(&mut self, condition: ValueId, a: ValueId, b: ValueId) -> Result<ValueId> {
        let [a, b] = self.broadcast_pair(a, b)?;
        let [condition, a] = self.broadcast_pair(condition, a)?;
        let dims = self.dims(a).to_vec();
        let b = self.broadcast(b, &dims)?;
        self.emit(Op::Select, &[condition, a, b])
    }

    /// `x` under another shape, if it does not have it already.
    pub(crate) fn reshape(&mut self, x: ValueId, dims: &[Dim]) -> Result<ValueId> {
        if self.dims(x) == dims {
            return Ok(x);
        }
        self.emit(Op::Reshape(Shape(dims.to_vec())), &[x])
    }

    /// Result axis `i` is axis `permutation[i]` of `x`.
    pub(crate) fn transpose(&mut self, x: ValueId, permutation: &[usize]) -> Result<ValueId> {
        if permutation.iter().enumerate().all(|(axis, &from)| axis == from) {
            return Ok(x);
        }
        self.emit(Op::Transpose(permutation.to_vec()), &[x])
    }

    /// `x` with axis `from` moved to position `to`.
    pub(crate) fn move_axis(&mut self, x: ValueId, from: usize, to: usize) -> Result<ValueId> {
        let mut permutation: Vec<usize> = (0..self.rank(x)).filter(|&axis| axis != from).collect();
        permutation.insert(to, from);
        self.transpose(x, &permutation)
    }

    /// The elements `start..end` along an axis.
    pub(crate) fn slice(
        &mut self,
        x: ValueId,
        axis: usize,
        start: usize,
        end: usize,
    ) -> Result<ValueId> {
        if start == 0 && self.dims(x).get(axis) == Some(&Dim::fixed(end)) {
            return Ok(x);
        }
        self.emit(Op::Slice { axis, start, end, step: 1 }, &[x])
    }

    /// A reduction; the axes stay with size 1.
    pub(crate) fn reduce(&mut self, op: ReduceOp, x: ValueId, axes: &[usize]) -> Result<ValueId> {
        if axes.is_empty() {
            return Ok(x);
        }
        self.emit(Op::Reduce { op, axes: axes.to_vec() }, &[x])
    }

    /// How many elements of `x` are along `axes`, as a scalar of its type.
    pub(crate) fn count(&mut self, x: ValueId, axes: &[usize]) -> Result<ValueId> {
        let dims = self.dims(x);
        let count = axes
            .iter()
            .try_fold(Dim::ONE, |count, &axis| count.times(dims[axis]))
            .ok_or_else(|| Obstacle::batch("a count that depends on the batch size twice"))?;
        let count = Known::new(DType::I64, Vec::new(), vec![count.into()]);
        let (count, dtype) = (self.add_known(count), self.dtype(x));
        self.cast(count, dtype)
    }

    /// The mean over axes, which stay with size 1.
    pub(crate) fn mean(&mut self, x: ValueId, axes: &[usize]) -> Result<ValueId> {
        let sum = self.reduce(ReduceOp::Sum, x, axes)?;
        let count = self.count(x, axes)?;
        self.binary(BinaryOp::Div, sum, count)
    }

    /// `x` without its axes `axes`, which have size 1.
    pub(crate) fn squeeze(&mut self, x: ValueId, axes: &[usize]) -> Result<ValueId> {
        let dims: Vec<Dim> = self
            .dims(x)
            .iter()
            .enumerate()
            .filter(|(axis, _)| !axes.contains(axis))
            .map(|(_, &dim)| dim)
            .collect();
        self.reshape(x, &dims)
    }

    /// `-1 - x`: every bit the other way, and the reverse order without overflow.
    pub(crate) fn complement(&mut self, x: ValueId) -> Result<ValueId> {
        let dtype = self.dtype(x);
        if dtype.is_float() || dtype == DType::Bool {
            return Err(Obstacle::invalid(format!("{} is not of integers", self.ty(x))));
        }
        let ones = self.scalar(dtype, -1.0);
        self.sub(ones, x)
    }

    /// Values in the reverse order: what is smallest becomes largest. Its own inverse.
    pub(crate) fn reversed(&mut self, x: ValueId) -> Result<ValueId> {
        if self.dtype(x).is_float() { self.unary(UnaryOp::Neg, x) } else { self.complement(x) }
    }
}
