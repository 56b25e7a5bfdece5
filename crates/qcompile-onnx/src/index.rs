//! Positions of elements, computed: numbers along an axis, and places in a flattened value.

use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::known::{Element, FOLD_LIMIT, Known};
use qcompile_ir::{BinaryOp, CompareOp, DType, Dim, Op, ScatterOp, Shape};

type Value = Result<ValueId, Obstacle>;

/// The product of dimensions.
pub(crate) fn product(dims: &[Dim]) -> Result<Dim, Obstacle> {
    Shape(dims.to_vec()).elements().ok_or_else(|| {
        Obstacle::batch(format!(
            "{} has too many elements, or depends on the batch size twice",
            Shape(dims.to_vec())
        ))
    })
}

impl Draft {
    /// An i64 scalar.
    pub(crate) fn integer(&mut self, value: impl Into<Element>) -> ValueId {
        self.add_known(Known::new(DType::I64, Vec::new(), vec![value.into()]))
    }

    /// `i64[dim]`: 0, 1, 2, ...
    pub(crate) fn iota(&mut self, dim: Dim) -> Value {
        match dim.as_fixed() {
            Some(size) if size <= FOLD_LIMIT => {
                Ok(self.add_known(Known::ints((0..).take(size).map(Element::Int).collect())))
            }
            _ => self.emit(Op::Iota(dim), &[]),
        }
    }

    /// The numbers 0, 1, 2, ... along one axis of a value of rank `rank`, whose other axes are 1.
    pub(crate) fn iota_along(&mut self, dim: Dim, axis: usize, rank: usize) -> Value {
        let numbers = self.iota(dim)?;
        let mut dims = vec![Dim::ONE; rank];
        dims[axis] = dim;
        self.reshape(numbers, &dims)
    }

    /// Indices that may count from the end as numbers from 0, and whether each is within an axis of `size`.
    pub(crate) fn resolved(
        &mut self,
        indices: ValueId,
        size: usize,
    ) -> Result<[ValueId; 2], Obstacle> {
        let (indices, zero) = (self.cast(indices, DType::I64)?, self.integer(0_i64));
        let size = self.integer(Dim::fixed(size));
        let negative = self.compare(CompareOp::Less, indices, zero)?;
        let counted = self.add(indices, size)?;
        let at = self.select(negative, counted, indices)?;
        let begins = self.compare(CompareOp::LessEqual, zero, at)?;
        let ends = self.compare(CompareOp::Less, at, size)?;
        Ok([at, self.binary(BinaryOp::And, begins, ends)?])
    }

    /// `place` where it is `inside`, else what is outside of everything: the step that uses it is refused.
    pub(crate) fn checked(&mut self, place: ValueId, inside: ValueId) -> Value {
        let outside = self.integer(i64::MIN);
        self.select(inside, place, outside)
    }

    /// Where in the rows of a flattened `[lead.., size]` the elements are that `numbers[taken.., k]` names in their
    /// rows: row · size + number. `taken` is no larger than `lead`.
    pub(crate) fn places(&mut self, lead: &[Dim], size: usize, numbers: ValueId) -> Value {
        let rows = self.iota(product(lead)?)?;
        let mut rows = self.reshape(rows, lead)?;
        for (axis, &all) in lead.iter().enumerate() {
            let taken = self.dims(numbers)[axis];
            if taken != all {
                let (Some(end), Some(_)) = (taken.as_fixed(), all.as_fixed()) else {
                    return Err(Obstacle::unsupported(format!(
                        "indices of {taken} for an axis of {all}"
                    )));
                };
                rows = self.slice(rows, axis, 0, end)?;
            }
        }
        let mut dims = self.dims(rows).to_vec();
        dims.push(Dim::ONE);
        let rows = self.reshape(rows, &dims)?;
        let size = self.integer(Dim::fixed(size));
        let first = self.mul(rows, size)?;
        self.add(first, numbers)
    }

    /// The rows of `table` at `indices`.
    pub(crate) fn rows(&mut self, table: ValueId, indices: ValueId) -> Value {
        self.emit(Op::Gather, &[table, indices])
    }

    /// `table` with the rows at `indices[i]` combined with `updates[i]` by `reduction`, or replaced by the last of
    /// them if there is none.
    pub(crate) fn scattered(
        &mut self,
        table: ValueId,
        indices: ValueId,
        updates: ValueId,
        reduction: Option<BinaryOp>,
    ) -> Value {
        let rows = self.dims(table)[0];
        let Some(reduction) = reduction else {
            // Which update is the last of each row; none gives a negative number.
            let count = self.dims(indices)[0];
            if count == Dim::fixed(0) {
                return Ok(table);
            }
            let order = self.iota(count)?;
            let last = self.emit(Op::Scatter { op: ScatterOp::Max, rows }, &[indices, order])?;
            let zero = self.integer(0_i64);
            let at = self.binary(BinaryOp::Max, last, zero)?;
            let update = self.rows(updates, at)?;
            let kept = self.compare(CompareOp::Less, last, zero)?;
            let mut dims = vec![Dim::ONE; self.rank(table)];
            dims[0] = rows;
            let kept = self.reshape(kept, &dims)?;
            return self.select(kept, table, update);
        };
        let dtype = self.dtype(table);
        let wide = if dtype.is_float() { DType::F32 } else { DType::I64 };
        let (table, updates) = (self.cast(table, wide)?, self.cast(updates, wide)?);
        let combined = match reduction {
            BinaryOp::Min => {
                let (table, updates) = (self.reversed(table)?, self.reversed(updates)?);
                let largest = self.combined(table, indices, updates, BinaryOp::Max)?;
                self.reversed(largest)?
            }
            other => self.combined(table, indices, updates, other)?,
        };
        self.cast(combined, dtype)
    }

    fn combined(
        &mut self,
        table: ValueId,
        indices: ValueId,
        updates: ValueId,
        reduction: BinaryOp,
    ) -> Value {
        let op = match reduction {
            BinaryOp::Mul => ScatterOp::Mul,
            BinaryOp::Max => ScatterOp::Max,
            _ => ScatterOp::Add,
        };
        let rows = self.dims(table)[0];
        let scattered = self.emit(Op::Scatter { op, rows }, &[indices, updates])?;
        self.binary(reduction, table, scattered)
    }
}
