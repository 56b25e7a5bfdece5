//! Operators that add or cut borders.

use super::Results;
use super::indexing::{Value, bounded, fixed_axis, take_constant};
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::node::{OnnxNode, axis_of};
use qcompile_ir::{Dim, Op};

pub(super) fn pad(draft: &mut Draft, node: &OnnxNode) -> Results {
    let mut x = node.input(0)?;
    let rank = draft.rank(x);
    let mode = node.attributes.string("mode", "constant")?;
    let zero = draft.scalar(draft.dtype(x), 0.0);
    let (pads, value, axes) = if node.opset < 11 {
        let value = node.attributes.float("value", 0.0)?;
        let value = draft.scalar(draft.dtype(x), value);
        (node.attributes.ints("pads")?.map(<[i64]>::to_vec), value, None)
    } else {
        let value = match node.optional(2) {
            Some(value) if draft.ty(value).shape.elements() != Some(Dim::fixed(0)) => value,
            _ => zero,
        };
        (node.ints_input(draft, 1)?, value, node.ints_input(draft, 3)?)
    };
    if draft.dtype(value) != draft.dtype(x) || draft.ty(value).shape.elements() != Some(Dim::ONE) {
        let (value, x) = (draft.ty(value), draft.ty(x));
        return Err(Obstacle::invalid(format!("the value is {value} for {x}")));
    }
    let value = draft.reshape(value, &[])?;
    let pads = pads.ok_or_else(|| Obstacle::invalid("pads are missing"))?;
    let axes = match axes {
        None => (0..rank).collect(),
        Some(axes) => {
            crate::node::axes_of(&axes, rank)?;
            axes.iter().map(|&axis| axis_of(axis, rank)).collect::<Result<Vec<_>, _>>()?
        }
    };
    if pads.len() != axes.len() * 2 {
        return Err(Obstacle::invalid(format!("{} pads for {} axes", pads.len(), axes.len())));
    }
    for (at, &axis) in axes.iter().enumerate() {
        let ends = [pads[at], pads[at + axes.len()]];
        if ends == [0, 0] {
            continue;
        }
        let size = fixed_axis(draft, x, axis, "pads")?;
        x = match mode.as_str() {
            "constant" => pad_constant(draft, x, axis, size, ends, value)?,
            "reflect" | "edge" | "wrap" => {
                let indices = border_indices(&mode, size, ends)?;
                take_constant(draft, x, axis, indices)?
            }
            other => return Err(Obstacle::invalid(format!("attribute mode is `{other}`"))),
        };
    }
    Ok(vec![x])
}

fn pad_constant(
    draft: &mut Draft,
    x: ValueId,
    axis: usize,
    size: usize,
    ends: [i64; 2],
    value: ValueId,
) -> Value {
    // Negative padding cuts, before anything is added.
    let cut = ends.map(|end| usize::try_from(end.min(0).unsigned_abs()).unwrap_or(usize::MAX));
    let kept = size.checked_sub(cut[0]).and_then(|left| left.checked_sub(cut[1]));
    let kept =
        kept.ok_or_else(|| Obstacle::invalid(format!("pads {ends:?} cut more than {size}")))?;
    let x = draft.slice(x, axis, cut[0], cut[0] + kept)?;
    let [low, high] = ends.map(|end| usize::try_from(end.max(0)).unwrap_or(usize::MAX));
    if [low, high] == [0, 0] {
        return Ok(x);
    }
    let known = draft.constant(value).and_then(|known| known.get(0).as_f64());
    #[allow(clippy::cast_possible_truncation, reason = "it is checked that nothing is lost")]
    if let Some(known) = known
        && (draft.dtype(x).is_float() || (f64::from(known as f32) == known && known.abs() < 1e15))
    {
        let op = Op::Pad { axis, low, high, interior: 0, value: known as f32 };
        return draft.emit(op, &[x]);
    }
    let mut parts = vec![x];
    for (at, length) in [(0, low), (usize::MAX, high)] {
        if length > 0 {
            let mut dims = draft.dims(x).to_vec();
            dims[axis] = Dim::fixed(length);
            let part = draft.broadcast(value, &dims)?;
            parts.insert(at.min(parts.len()), part);
        }
    }
    draft.emit(Op::Concat { axis }, &parts)
}

/// Where each element of an axis padded from its own elements comes from.
fn border_indices(mode: &str, size: usize, [low, high]: [i64; 2]) -> Result<Vec<i64>, Obstacle> {
    let size = i64::try_from(size).map_err(|_| Obstacle::invalid("an axis beyond 2^63"))?;
    let end = size.checked_add(high).ok_or_else(|| Obstacle::invalid("pads overflow"))?;
    let count = end.checked_add(low).and_then(|count| usize::try_from(count).ok());
    bounded(count.ok_or_else(|| Obstacle::invalid("pads cut more than there is"))?)?;
    if size == 0 {
        return Err(Obstacle::invalid("pads an empty axis from itself"));
    }
    let start = low.checked_neg().ok_or_else(|| Obstacle::invalid("pads overflow"))?;
    Ok((start..end)
        .map(|at| match mode {
            "edge" => at.clamp(0, size - 1),
            "wrap" => at.rem_euclid(size),
            _ if size == 1 => 0,
            _ => {
                let period = 2 * (size - 1);
                let at = at.rem_euclid(period);
                if at < size { at } else { period - at }
            }
        })
        .collect())
}

/// The middle of `x`, cut or padded with zeros to a shape.
pub(super) fn center_crop_pad(draft: &mut Draft, node: &OnnxNode) -> Results {
    let mut x = node.input(0)?;
    let rank = draft.rank(x);
    let wanted = node
        .shape_elements(draft, 1)?
        .ok_or_else(|| Obstacle::invalid("input 1 (shape) is missing"))?;
    let wanted = crate::node::dims_from(&wanted)?;
    let axes = match node.attributes.ints("axes")? {
        None => (0..rank).collect(),
        Some(axes) => {
            crate::node::axes_of(axes, rank)?;
            axes.iter().map(|&axis| axis_of(axis, rank)).collect::<Result<Vec<_>, _>>()?
        }
    };
    if axes.len() != wanted.len() {
        return Err(Obstacle::invalid(format!("{} sizes for {} axes", wanted.len(), axes.len())));
    }
    for (&axis, &wanted) in axes.iter().zip(&wanted) {
        if draft.dims(x)[axis] == wanted {
            continue;
        }
        let size = fixed_axis(draft, x, axis, "crops or pads")?;
        let wanted = wanted.as_fixed().ok_or_else(|| {
            Obstacle::unsupported(format!("a size of {wanted} in the place of {size}"))
        })?;
        x = if wanted < size {
            let start = (size - wanted) / 2;
            draft.slice(x, axis, start, start + wanted)?
        } else {
            let low = (wanted - size) / 2;
            let high = wanted - size - low;
            draft.emit(Op::Pad { axis, low, high, interior: 0, value: 0.0 }, &[x])?
        };
    }
    Ok(vec![x])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn borders_repeat_reflect_and_wrap() {
        let of = |mode| border_indices(mode, 3, [2, 2]).expect("fits");
        assert_eq!(of("edge"), [0, 0, 0, 1, 2, 2, 2]);
        assert_eq!(of("reflect"), [2, 1, 0, 1, 2, 1, 0]);
        assert_eq!(of("wrap"), [1, 2, 0, 1, 2, 0, 1]);
    }
}
