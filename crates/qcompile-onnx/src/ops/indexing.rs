//! Operators that pick, place or mask elements.

use super::Results;
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::known::{Element, FOLD_LIMIT, Known};
use crate::node::{OnnxNode, axis_of};
use qcompile_ir::{DType, Dim, Op, Shape, Tensor};
use std::sync::Arc;

pub(super) type Value = Result<ValueId, Obstacle>;

/// Elements of an index or mask constant made here.
const INDEX_LIMIT: usize = 1 << 24;

/// The rows of `x` along `axis` at `indices`, which replace the axis.
pub(super) fn take(draft: &mut Draft, x: ValueId, axis: usize, indices: ValueId) -> Value {
    let moved = draft.move_axis(x, axis, 0)?;
    let count = draft.rank(indices);
    let indices = draft.cast(indices, DType::I64)?;
    let rows = draft.emit(Op::Gather, &[moved, indices])?;
    // [indices, before, after] -> [before, indices, after]
    let rank = draft.rank(rows);
    let permutation: Vec<usize> =
        (count..count + axis).chain(0..count).chain(count + axis..rank).collect();
    draft.transpose(rows, &permutation)
}

/// [`take`] with constant indices.
pub(super) fn take_constant(
    draft: &mut Draft,
    x: ValueId,
    axis: usize,
    indices: Vec<i64>,
) -> Value {
    let indices = Tensor::from_i64(&[indices.len()], &indices)
        .ok_or_else(|| Obstacle::invalid("too many indices"))?;
    let indices = super::constant::add_tensor(draft, Arc::new(indices))?;
    take(draft, x, axis, indices)
}

pub(super) fn gather(draft: &mut Draft, node: &OnnxNode) -> Results {
    let (x, indices) = (node.input(0)?, node.input(1)?);
    if draft.rank(x) == 0 {
        return Err(Obstacle::invalid("the data is a scalar"));
    }
    let axis = axis_of(node.attributes.int("axis", 0)?, draft.rank(x))?;
    let size = fixed_axis(draft, x, axis, "gathers along")?;
    if let Some(known) = draft.known(indices) {
        let count = known.len().unwrap_or(0);
        for at in 0..count.min(known.elements.len()) {
            if let Some(index) = known.get(at).as_int() {
                check_index(index, size)?;
            }
        }
        // One row is a slice, whose gradient is a pad.
        if known.shape.is_empty()
            && let Some(index) = known.get(0).as_int()
        {
            let index = check_index(index, size)?;
            let row = draft.slice(x, axis, index, index + 1)?;
            return Ok(vec![draft.squeeze(row, &[axis])?]);
        }
    }
    Ok(vec![take(draft, x, axis, indices)?])
}

/// The size of an axis that must not depend on the batch size, which is what the operator does to it.
pub(super) fn fixed_axis(
    draft: &Draft,
    x: ValueId,
    axis: usize,
    does: &str,
) -> Result<usize, Obstacle> {
    draft.dims(x)[axis].as_fixed().ok_or_else(|| {
        Obstacle::batch(format!("{does} axis {axis}, which depends on the batch size"))
    })
}

fn check_index(index: i64, size: usize) -> Result<usize, Obstacle> {
    axis_of(index, size)
        .map_err(|_| Obstacle::invalid(format!("index {index} is outside an axis of {size}")))
}

pub(super) fn slice(draft: &mut Draft, node: &OnnxNode) -> Results {
    let mut x = node.input(0)?;
    let missing = || Obstacle::invalid("starts or ends are missing");
    let (starts, ends, axes, steps) = if node.opset < 10 {
        let ints = |name| Ok::<_, Obstacle>(node.attributes.ints(name)?.map(<[i64]>::to_vec));
        (ints("starts")?, ints("ends")?, ints("axes")?, None)
    } else {
        let ints = |at| node.ints_input(draft, at);
        (ints(1)?, ints(2)?, ints(3)?, ints(4)?)
    };
    let (starts, ends) = (starts.ok_or_else(missing)?, ends.ok_or_else(missing)?);
    let axes = axes.unwrap_or_else(|| (0..).take(starts.len()).collect());
    let steps = steps.unwrap_or_else(|| vec![1; starts.len()]);
    if [ends.len(), axes.len(), steps.len()] != [starts.len(); 3] {
        return Err(Obstacle::invalid("starts, ends, axes and steps differ in length"));
    }
    crate::node::axes_of(&axes, draft.rank(x))?;
    for (((&start, &end), &axis), &step) in starts.iter().zip(&ends).zip(&axes).zip(&steps) {
        let axis = axis_of(axis, draft.rank(x))?;
        x = slice_axis(draft, x, axis, [start, end, step])?;
    }
    Ok(vec![x])
}

/// No axis is as long: an end from here on is the end of the axis. Exporters write this number, or 2^31 - 1 and more.
const WHOLE_AXIS: i64 = 1_000_000_000;

fn slice_axis(draft: &mut Draft, x: ValueId, axis: usize, [start, end, step]: [i64; 3]) -> Value {
    if step == 0 {
        return Err(Obstacle::invalid("a slice with step 0"));
    }
    let Some(size) = draft.dims(x)[axis].as_fixed() else {
        // All of the batch is the only part of it that has a fixed meaning here.
        if start == 0 && step == 1 && end >= WHOLE_AXIS {
            return Ok(x);
        }
        return Err(Obstacle::batch(format!(
            "slices axis {axis}, which depends on the batch size"
        )));
    };
    let signed = i64::try_from(size).map_err(|_| Obstacle::invalid("an axis beyond 2^63"))?;
    let from_start = |at: i64| if at < 0 { at.saturating_add(signed) } else { at };
    let index = |at: i64| usize::try_from(at).unwrap_or(0);
    if step > 0 {
        let start = from_start(start).clamp(0, signed);
        let end = from_start(end).clamp(start, signed);
        if step == 1 {
            return draft.slice(x, axis, index(start), index(end));
        }
        let op = Op::Slice { axis, start: index(start), end: index(end), step: index(step) };
        return draft.emit(op, &[x]);
    }
    let start = from_start(start).clamp(-1, signed - 1);
    let end = from_start(end).clamp(-1, signed - 1);
    let mut indices = Vec::new();
    let mut at = start;
    while at > end {
        bounded(indices.len())?;
        indices.push(at);
        at = at.saturating_add(step);
    }
    take_constant(draft, x, axis, indices)
}

pub(super) fn bounded(elements: usize) -> Result<(), Obstacle> {
    if elements < INDEX_LIMIT {
        Ok(())
    } else {
        Err(Obstacle::unsupported("more than 2^24 indices"))
    }
}

pub(super) fn split(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.input(0)?;
    let axis = axis_of(node.attributes.int("axis", 0)?, draft.rank(x))?;
    let parts = node.outputs.len();
    if let Some(asked) = node.attributes.optional_int("num_outputs")?
        && usize::try_from(asked) != Ok(parts)
    {
        return Err(Obstacle::invalid(format!(
            "num_outputs is {asked}, but there are {parts} outputs"
        )));
    }
    let size = fixed_axis(draft, x, axis, "splits")?;
    let given = if node.opset < 13 {
        node.attributes.ints("split")?.map(<[i64]>::to_vec)
    } else {
        node.ints_input(draft, 1)?
    };
    let lengths: Vec<usize> = match given {
        Some(lengths) => {
            let lengths: Option<Vec<usize>> =
                lengths.iter().map(|&length| usize::try_from(length).ok()).collect();
            lengths.ok_or_else(|| Obstacle::invalid("a part of negative length"))?
        }
        None => {
            // All equal, but the last, which takes what is left.
            let each = size.div_ceil(parts.max(1));
            (0..parts).map(|part| each.min(size.saturating_sub(part * each))).collect()
        }
    };
    let total = lengths.iter().try_fold(0_usize, |sum, &length| sum.checked_add(length));
    if lengths.len() != parts || total != Some(size) {
        return Err(Obstacle::invalid(format!(
            "parts of {lengths:?} of an axis of {size} for {parts} outputs"
        )));
    }
    let mut start = 0;
    let mut results = Vec::with_capacity(parts);
    for length in lengths {
        results.push(draft.slice(x, axis, start, start + length)?);
        start += length;
    }
    Ok(results)
}

pub(super) fn trilu(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.input(0)?;
    let upper = node.attributes.flag("upper", true)?;
    let diagonal = match node.ints_input(draft, 1)?.as_deref() {
        None => 0,
        Some(&[diagonal]) => diagonal,
        Some(other) => return Err(Obstacle::invalid(format!("input 1 (k) is {other:?}"))),
    };
    let [.., rows, columns] = draft.dims(x) else {
        return Err(Obstacle::invalid(format!("{} is no matrix", draft.ty(x))));
    };
    let (Some(rows), Some(columns)) = (rows.as_fixed(), columns.as_fixed()) else {
        return Err(Obstacle::batch("a triangle that depends on the batch size"));
    };
    let count = rows.saturating_mul(columns);
    bounded(count)?;
    let signed = |at: usize| i64::try_from(at).unwrap_or(i64::MAX);
    let kept = |at: usize| {
        let (row, column) = (signed(at / columns), signed(at % columns));
        let border = row.saturating_add(diagonal);
        if upper { column >= border } else { column <= border }
    };
    let mask = if count <= FOLD_LIMIT {
        let elements = (0..count).map(|at| Element::Int(i64::from(kept(at)))).collect();
        draft.add_known(Known::new(DType::Bool, vec![rows, columns], elements))
    } else {
        let bytes = (0..count).map(|at| u8::from(kept(at))).collect();
        let mask = Tensor::from_bytes(DType::Bool, vec![rows, columns], bytes);
        let mask = mask.ok_or_else(|| Obstacle::invalid("the mask is too large"))?;
        draft.emit(Op::Const(Arc::new(mask)), &[])?
    };
    let zero = draft.scalar(draft.dtype(x), 0.0);
    let dims: Vec<Dim> = draft.dims(x).to_vec();
    let zero = draft.emit(Op::Broadcast(Shape(dims)), &[zero])?;
    Ok(vec![draft.select(mask, x, zero)?])
}
