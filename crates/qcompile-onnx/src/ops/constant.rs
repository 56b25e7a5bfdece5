//! Operators that make values from nothing: constants and ranges.

use super::Results;
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::known::{Element, FOLD_LIMIT, Known, from_f64, wrapped};
use crate::node::{OnnxNode, dims_from};
use crate::tensor;
use qcompile_ir::{DType, Dim, Op, Tensor};
use std::sync::Arc;

/// Floats beyond this number are no shape arithmetic: they stay a tensor.
const FLOAT_LIMIT: usize = 4096;

/// A tensor as a value: known if small, else a constant.
pub(crate) fn add_tensor(draft: &mut Draft, tensor: Arc<Tensor>) -> Result<ValueId, Obstacle> {
    if (!tensor.dtype().is_float() || tensor.elements() <= FLOAT_LIMIT)
        && let Some(known) = Known::from_tensor(&tensor)
    {
        return Ok(draft.add_known(known));
    }
    draft.emit(Op::Const(tensor), &[])
}

pub(super) fn constant(draft: &mut Draft, node: &mut OnnxNode) -> Results {
    let attributes = &mut node.attributes;
    if let Some(proto) = attributes.take_tensor("value")? {
        draft.note_type(proto.data_type);
        let tensor = tensor::decode(proto, node.external)?;
        return Ok(vec![add_tensor(draft, Arc::new(tensor))?]);
    }
    let float = |value: f32| Element::Float(f64::from(value));
    let known = if let Some(value) = attributes.optional_float("value_float")? {
        Known::scalar(DType::F32, value)
    } else if let Some(value) = attributes.optional_int("value_int")? {
        Known::new(DType::I64, Vec::new(), vec![Element::Int(value)])
    } else if let Some(values) = attributes.floats("value_floats")? {
        Known::new(
            DType::F32,
            vec![values.len()],
            values.iter().map(|&value| float(value)).collect(),
        )
    } else if let Some(values) = attributes.ints("value_ints")? {
        Known::ints(values.iter().map(|&value| Element::Int(value)).collect())
    } else if let Some(proto) = attributes.take_sparse("sparse_value")? {
        draft.note_type(proto.values.data_type);
        let tensor = tensor::decode_sparse(proto, node.external)?;
        return Ok(vec![add_tensor(draft, Arc::new(tensor))?]);
    } else {
        return Err(Obstacle::unsupported("a constant that is neither a tensor nor numbers"));
    };
    Ok(vec![draft.add_known(known)])
}

pub(super) fn constant_of_shape(draft: &mut Draft, node: &mut OnnxNode) -> Results {
    let known = match node.attributes.take_tensor("value")? {
        None => Known::scalar(DType::F32, 0.0),
        Some(proto) => {
            let tensor = tensor::decode(proto, node.external)?;
            if tensor.elements() != 1 {
                return Err(Obstacle::invalid("attribute value is not one element"));
            }
            let value = Known::from_tensor(&tensor).map_or(Element::Int(0), |known| known.get(0));
            Known::new(tensor.dtype(), Vec::new(), vec![value])
        }
    };
    let elements =
        node.shape_elements(draft, 0)?.ok_or_else(|| Obstacle::invalid("input 0 is missing"))?;
    let value = draft.add_known(known);
    Ok(vec![draft.broadcast(value, &dims_from(&elements)?)?])
}

pub(super) fn range(draft: &mut Draft, node: &OnnxNode) -> Results {
    let dtype = draft.dtype(node.input(0)?);
    let mut bounds = Vec::new();
    for at in 0..3 {
        let known = node.constant(draft, at)?.ok_or_else(|| Obstacle::invalid("takes 3 inputs"))?;
        if known.len() != Some(1) || known.dtype != dtype {
            return Err(Obstacle::invalid(format!(
                "input {at} is {}, not one {dtype}",
                known.ty()
            )));
        }
        bounds.push(known.get(0));
    }
    if let [Element::Int(0), Element::Batch(limit), Element::Int(delta)] = bounds[..]
        && delta > 0
        && limit % delta == 0
    {
        let count = Dim { scale: usize::try_from(limit / delta).unwrap_or(0), batch: true };
        let (numbers, delta) = (draft.iota(count)?, draft.integer(delta));
        let numbers = draft.mul(numbers, delta)?;
        return Ok(vec![draft.cast(numbers, dtype)?]);
    }
    let too_large = || Obstacle::unsupported(format!("a range of more than {FOLD_LIMIT} elements"));
    let elements: Vec<Element> = match bounds[..] {
        [Element::Int(start), Element::Int(limit), Element::Int(delta)] if delta != 0 => {
            let (start, limit, delta) = (i128::from(start), i128::from(limit), i128::from(delta));
            let count = ((limit - start + delta - delta.signum()) / delta).max(0);
            let count = i64::try_from(count).map_err(|_| too_large())?;
            if count > FOLD_LIMIT as i64 {
                return Err(too_large());
            }
            #[allow(clippy::cast_possible_truncation, reason = "within start..limit")]
            let at = |index: i64| (start + i128::from(index) * delta) as i64;
            (0..count).map(|index| wrapped(dtype, at(index))).collect()
        }
        [Element::Float(start), Element::Float(limit), Element::Float(delta)] if delta != 0.0 => {
            // The maximum with a NaN is 0.
            let count = ((limit - start) / delta).ceil().max(0.0);
            #[allow(clippy::cast_precision_loss, reason = "a small power of two")]
            if count > FOLD_LIMIT as f64 {
                return Err(too_large());
            }
            #[allow(clippy::cast_possible_truncation, reason = "bounded above")]
            #[allow(clippy::cast_sign_loss, reason = "bounded below")]
            let count = count as u32;
            (0..count).map(|index| from_f64(dtype, start + f64::from(index) * delta)).collect()
        }
        _ if bounds.iter().any(|bound| matches!(bound, Element::Batch(_))) => {
            return Err(Obstacle::batch("a range that depends on the batch size"));
        }
        _ => return Err(Obstacle::invalid("a range with step 0")),
    };
    Ok(vec![draft.add_known(Known::new(dtype, vec![elements.len()], elements))])
}

/// A matrix with ones on a diagonal.
pub(super) fn eye_like(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.input(0)?;
    let diagonal = node.attributes.int("k", 0)?;
    let dtype = match node.attributes.optional_int("dtype")? {
        None => draft.dtype(x),
        Some(number) => tensor::dtype(i32::try_from(number).unwrap_or(0))?,
    };
    let &[rows, columns] = draft.dims(x) else {
        return Err(Obstacle::invalid(format!("{} is no matrix", draft.ty(x))));
    };
    let (row, column) = (draft.iota_along(rows, 0, 2)?, draft.iota_along(columns, 1, 2)?);
    let diagonal = draft.integer(diagonal);
    let border = draft.add(row, diagonal)?;
    let ones = draft.compare(qcompile_ir::CompareOp::Equal, border, column)?;
    Ok(vec![draft.cast(ones, dtype)?])
}
