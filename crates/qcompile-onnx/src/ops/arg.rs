//! Where the largest or smallest element of an axis is.

use super::Results;
use super::shape::as_matrix;
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::node::{OnnxNode, axis_of};
use qcompile_ir::{BinaryOp, CompareOp, DType, Op, ReduceOp};

type Value = Result<ValueId, Obstacle>;

/// The numbers of an axis of `x`, which has size 1 along the others.
pub(super) fn positions(draft: &mut Draft, x: ValueId, axis: usize, dtype: DType) -> Value {
    let (dim, rank) = (draft.dims(x)[axis], draft.rank(x));
    let numbers = draft.iota_along(dim, axis, rank)?;
    draft.cast(numbers, dtype)
}

/// The position of the largest element along an axis, the first or the last of equal ones; i32, the axis stays with
/// size 1. Where there is a NaN, an end of the axis.
pub(super) fn arg_max_of(draft: &mut Draft, x: ValueId, axis: usize, last: bool) -> Value {
    let dim = draft.dims(x)[axis];
    if dim.scale == 0 {
        return Err(Obstacle::invalid(format!("axis {axis} of {} is empty", draft.ty(x))));
    }
    if dim.as_fixed().is_some_and(|size| i32::try_from(size).is_err()) {
        return Err(Obstacle::unsupported(format!("positions along an axis of {dim}")));
    }
    let mut positions = positions(draft, x, axis, DType::I32)?;
    if !last {
        positions = draft.reversed(positions)?;
    }
    let max = draft.reduce(ReduceOp::Max, x, &[axis])?;
    let less = draft.compare(CompareOp::Less, x, max)?;
    let never = draft.scalar(DType::I32, f64::from(i32::MIN));
    let chosen = draft.select(less, never, positions)?;
    let chosen = draft.reduce(ReduceOp::Max, chosen, &[axis])?;
    if last { Ok(chosen) } else { draft.reversed(chosen) }
}

/// `smallest`: of the smallest element.
pub(super) fn arg_max(draft: &mut Draft, node: &OnnxNode, smallest: bool) -> Results {
    let mut x = node.input(0)?;
    let axis = axis_of(node.attributes.int("axis", 0)?, draft.rank(x))?;
    let keep = node.attributes.flag("keepdims", true)?;
    let last = node.attributes.flag("select_last_index", false)?;
    if smallest {
        x = draft.reversed(x)?;
    }
    let index = arg_max_of(draft, x, axis, last)?;
    let index = draft.cast(index, DType::I64)?;
    Ok(vec![if keep { index } else { draft.squeeze(index, &[axis])? }])
}

/// One at the first of the largest elements, else zero.
pub(super) fn hardmax(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.input(0)?;
    let rank = draft.rank(x);
    let one_hot = |draft: &mut Draft, x: ValueId, axis: usize| {
        let index = arg_max_of(draft, x, axis, false)?;
        let positions = positions(draft, x, axis, DType::I32)?;
        let equal = draft.compare(CompareOp::Equal, positions, index)?;
        let dtype = draft.dtype(x);
        draft.cast(equal, dtype)
    };
    if node.opset >= 13 {
        let axis = axis_of(node.attributes.int("axis", -1)?, rank)?;
        return Ok(vec![one_hot(draft, x, axis)?]);
    }
    // Before opset 13 everything from the axis on is one row.
    let axis = axis_of(node.attributes.int("axis", 1)?, rank)?;
    let matrix = as_matrix(draft, x, axis)?;
    let dims = draft.dims(x).to_vec();
    let result = one_hot(draft, matrix, 1)?;
    Ok(vec![draft.reshape(result, &dims)?])
}

/// Sums or products of the elements up to each, by doubling: after step i, of the last `2^i`.
pub(super) fn cumulative(
    draft: &mut Draft,
    node: &OnnxNode,
    op: BinaryOp,
    neutral: f32,
) -> Results {
    let mut x = node.input(0)?;
    let axis = match node.ints_input(draft, 1)?.as_deref() {
        Some(&[axis]) => axis_of(axis, draft.rank(x))?,
        other => return Err(Obstacle::invalid(format!("input 1 (axis) is {other:?}"))),
    };
    let exclusive = node.attributes.flag("exclusive", false)?;
    let reverse = node.attributes.flag("reverse", false)?;
    let size = draft.dims(x)[axis].as_fixed().ok_or_else(|| {
        Obstacle::batch(format!("runs along axis {axis}, which depends on the batch size"))
    })?;
    let shifted = |draft: &mut Draft, x: ValueId, by: usize| {
        let (start, low, high) = if reverse { (by, 0, by) } else { (0, by, 0) };
        let kept = draft.slice(x, axis, start, start + size - by)?;
        draft.emit(Op::Pad { axis, low, high, interior: 0, value: neutral }, &[kept])
    };
    if exclusive && size > 0 {
        x = shifted(draft, x, 1)?;
    }
    let mut step = 1;
    while step < size {
        let before = shifted(draft, x, step)?;
        x = draft.binary(op, x, before)?;
        step = step.saturating_mul(2);
    }
    Ok(vec![x])
}
