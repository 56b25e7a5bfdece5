//! Operators that change or read shapes and move no data between elements.

use super::Results;
use crate::build::broadcast_dims;
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::known::{Element, Known};
use crate::node::{OnnxNode, axes_of, axis_of, dims_from};
use qcompile_ir::{DType, Dim, Op, Shape};

/// The axes given as an attribute before an opset, as input 1 since.
pub(super) fn axes_before(
    draft: &Draft,
    node: &OnnxNode,
    opset: i64,
) -> Result<Option<Vec<i64>>, Obstacle> {
    if node.opset < opset {
        return Ok(node.attributes.ints("axes")?.map(<[i64]>::to_vec));
    }
    node.ints_input(draft, 1)
}

pub(super) fn shape(draft: &mut Draft, node: &OnnxNode) -> Results {
    let dims = draft.dims(node.input(0)?);
    let rank = i64::try_from(dims.len()).unwrap_or(i64::MAX);
    let bound = |at: i64| {
        let at = if at < 0 { at.saturating_add(rank) } else { at };
        usize::try_from(at.clamp(0, rank)).unwrap_or(0)
    };
    let start = bound(node.attributes.int("start", 0)?);
    let end = bound(node.attributes.int("end", rank)?).max(start);
    let known = Known::sizes(&dims[start..end]);
    Ok(vec![draft.add_known(known)])
}

pub(super) fn size(draft: &mut Draft, node: &OnnxNode) -> Results {
    let elements = draft.ty(node.input(0)?).shape.elements();
    let elements = elements.ok_or_else(|| Obstacle::unsupported("a size that overflows"))?;
    Ok(vec![draft.add_known(Known::new(DType::I64, Vec::new(), vec![elements.into()]))])
}

pub(super) fn reshape(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.input(0)?;
    let allow_zero = node.attributes.flag("allowzero", false)?;
    let wanted = node
        .shape_elements(draft, 1)?
        .ok_or_else(|| Obstacle::invalid("input 1 (shape) is missing"))?;
    let dims = reshaped(draft.dims(x), &wanted, allow_zero)?;
    if draft.ty(x).shape.elements() != Shape(dims.clone()).elements() {
        let (from, to) = (draft.ty(x).clone(), Shape(dims));
        let text = format!("{from} does not have the elements of {to}");
        return Err(match from.shape.batch_axis() {
            Some(_) => {
                Obstacle::batch(format!("{text}; the model seems to be made for one batch size"))
            }
            None => Obstacle::invalid(text),
        });
    }
    Ok(vec![draft.reshape(x, &dims)?])
}

/// The dimensions that a `Reshape` asks for: 0 copies one, -1 takes the rest.
fn reshaped(from: &[Dim], wanted: &[Element], allow_zero: bool) -> Result<Vec<Dim>, Obstacle> {
    let mut rest = None;
    let mut elements = wanted.to_vec();
    for (axis, element) in elements.iter_mut().enumerate() {
        match *element {
            Element::Int(-1) if rest.is_some() => {
                return Err(Obstacle::invalid("the shape has more than one -1"));
            }
            Element::Int(-1) => {
                rest = Some(axis);
                *element = Element::Int(1);
            }
            Element::Int(0) if !allow_zero => {
                let dim = from.get(axis).ok_or_else(|| {
                    Obstacle::invalid(format!(
                        "the shape copies axis {axis} of a value of rank {}",
                        from.len()
                    ))
                })?;
                *element = (*dim).into();
            }
            _ => {}
        }
    }
    let mut dims = dims_from(&elements)?;
    if let Some(axis) = rest {
        let total = Shape(from.to_vec()).elements();
        let others = Shape(dims.clone()).elements();
        let rest = total.zip(others).and_then(|(total, others)| {
            let divides = others.scale != 0 && total.scale % others.scale == 0;
            (divides && (total.batch || !others.batch)).then(|| Dim {
                scale: total.scale / others.scale,
                batch: total.batch && !others.batch,
            })
        });
        dims[axis] = rest.ok_or_else(|| {
            Obstacle::invalid(format!(
                "{} does not divide into {}",
                Shape(from.to_vec()),
                Shape(dims.clone())
            ))
        })?;
    }
    Ok(dims)
}

pub(super) fn flatten(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.input(0)?;
    let rank = draft.rank(x);
    let axis = node.attributes.int("axis", 1)?;
    let axis =
        if axis == i64::try_from(rank).unwrap_or(i64::MAX) { rank } else { axis_of(axis, rank)? };
    Ok(vec![as_matrix(draft, x, axis)?])
}

/// `x` as a matrix: the axes before `axis`, and those from it on.
pub(super) fn as_matrix(draft: &mut Draft, x: ValueId, axis: usize) -> Result<ValueId, Obstacle> {
    let dims = draft.dims(x);
    let product = |dims: &[Dim]| {
        Shape(dims.to_vec())
            .elements()
            .ok_or_else(|| Obstacle::unsupported("dimensions that overflow"))
    };
    let matrix = [product(&dims[..axis])?, product(&dims[axis..])?];
    draft.reshape(x, &matrix)
}

pub(super) fn squeeze(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.input(0)?;
    let axes = match axes_before(draft, node, 13)? {
        Some(axes) => axes_of(&axes, draft.rank(x))?,
        None => (0..draft.rank(x)).filter(|&axis| draft.dims(x)[axis] == Dim::ONE).collect(),
    };
    if let Some(&axis) = axes.iter().find(|&&axis| draft.dims(x)[axis] != Dim::ONE) {
        return Err(Obstacle::invalid(format!("axis {axis} of {} is not 1", draft.ty(x))));
    }
    Ok(vec![draft.squeeze(x, &axes)?])
}

pub(super) fn unsqueeze(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.input(0)?;
    let axes =
        axes_before(draft, node, 13)?.ok_or_else(|| Obstacle::invalid("axes are missing"))?;
    let rank = draft.rank(x).saturating_add(axes.len());
    let axes = axes_of(&axes, rank)?;
    let mut dims = draft.dims(x).to_vec();
    for axis in axes {
        dims.insert(axis, Dim::ONE);
    }
    Ok(vec![draft.reshape(x, &dims)?])
}

pub(super) fn transpose(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.input(0)?;
    let rank = draft.rank(x);
    let permutation = match node.attributes.ints("perm")? {
        None => (0..rank).rev().collect(),
        Some(axes) => {
            axes_of(axes, rank)?;
            axes.iter().map(|&axis| axis_of(axis, rank)).collect::<Result<Vec<_>, _>>()?
        }
    };
    if permutation.len() != rank {
        return Err(Obstacle::invalid(format!("perm {permutation:?} for a value of rank {rank}")));
    }
    Ok(vec![draft.transpose(x, &permutation)?])
}

pub(super) fn expand(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.input(0)?;
    let wanted = node
        .shape_elements(draft, 1)?
        .ok_or_else(|| Obstacle::invalid("input 1 (shape) is missing"))?;
    let dims = broadcast_dims(draft.dims(x), &dims_from(&wanted)?)?;
    Ok(vec![draft.broadcast(x, &dims)?])
}

pub(super) fn tile(draft: &mut Draft, node: &OnnxNode) -> Results {
    let mut x = node.input(0)?;
    let repeats = node
        .shape_elements(draft, 1)?
        .ok_or_else(|| Obstacle::invalid("input 1 (repeats) is missing"))?;
    let repeats = dims_from(&repeats)?;
    if repeats.len() != draft.rank(x) {
        return Err(Obstacle::invalid(format!("{} repeats for {}", repeats.len(), draft.ty(x))));
    }
    for (axis, &repeat) in repeats.iter().enumerate().filter(|(_, repeat)| **repeat != Dim::ONE) {
        let dims = draft.dims(x).to_vec();
        let mut apart = dims.clone();
        apart.insert(axis, Dim::ONE);
        let mut repeated = apart.clone();
        repeated[axis] = repeat;
        let mut joined = dims;
        joined[axis] = repeat
            .times(joined[axis])
            .ok_or_else(|| Obstacle::batch("a size that depends on the batch size twice"))?;
        let one = draft.reshape(x, &apart)?;
        let many = draft.broadcast(one, &repeated)?;
        x = draft.reshape(many, &joined)?;
    }
    Ok(vec![x])
}

pub(super) fn concat(draft: &mut Draft, node: &OnnxNode) -> Results {
    let inputs = node.all_inputs()?;
    let axis = node
        .attributes
        .optional_int("axis")?
        .or((node.opset < 4).then_some(1))
        .ok_or_else(|| Obstacle::invalid("attribute axis is missing"))?;
    let axis = axis_of(axis, draft.rank(inputs[0]))?;
    if inputs.len() == 1 {
        return Ok(inputs);
    }
    Ok(vec![draft.emit(Op::Concat { axis }, &inputs)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reshape_divides_with_the_batch() {
        let from = [Dim::N, 128.into(), 256.into()];
        let int = Element::Int;
        let dims = reshaped(&from, &[int(-1), int(256)], false).expect("divides");
        assert_eq!(Shape(dims).to_string(), "[128N, 256]");
        let dims = reshaped(&from, &[int(0), Element::Int(-1)], false).expect("divides");
        assert_eq!(Shape(dims).to_string(), "[N, 32768]");
        let dims = reshaped(&from, &[Element::Batch(1), int(-1), int(4), int(64)], false)
            .expect("divides");
        assert_eq!(Shape(dims).to_string(), "[N, 128, 4, 64]");
        assert!(reshaped(&from, &[int(-1), int(-1)], false).is_err());
        assert!(reshaped(&from, &[int(-1), int(0), int(100)], false).is_err());
    }
}
