//! Types of ops that pick and place elements by index.

use super::{Types, axis_of, exactly, fixed};
use crate::{DType, Dim, Shape, TensorType};

pub(super) fn gather(operands: Types) -> Result<TensorType, String> {
    let [table, indices] = exactly(operands)?;
    if indices.dtype != DType::I64 {
        return Err(format!("indices are i64, not {indices}"));
    }
    axis_of(table, 0)?;
    let mut shape = indices.shape.0.clone();
    shape.extend(&table.shape.0[1..]);
    Ok(TensorType::new(table.dtype, Shape(shape)))
}

pub(super) fn scatter(rows: Dim, operands: Types) -> Result<TensorType, String> {
    let [indices, values] = exactly(operands)?;
    if !values.dtype.is_float() && values.dtype != DType::I64 {
        return Err(format!("needs float or i64 values, not {values}"));
    }
    let rank = indices.shape.rank();
    if indices.dtype != DType::I64 || values.shape.0.get(..rank) != Some(&indices.shape.0[..]) {
        return Err(format!("indices {indices} and values {values} do not fit"));
    }
    let mut shape = vec![rows];
    shape.extend(&values.shape.0[rank..]);
    Ok(TensorType::new(values.dtype, Shape(shape)))
}

pub(super) fn top_k(k: usize, operands: Types) -> Result<TensorType, String> {
    let [x] = exactly(operands)?;
    let Some((&last, lead)) = x.shape.0.split_last() else {
        return Err(format!("{x} has no axis"));
    };
    if !x.dtype.is_float() && x.dtype != DType::I64 {
        return Err(format!("needs a float or i64 operand, not {x}"));
    }
    if k > fixed(last, "a sorted axis")? {
        return Err(format!("{k} of the elements of a row of {x}"));
    }
    let mut shape = lead.to_vec();
    shape.push(Dim::fixed(k));
    Ok(TensorType::new(DType::I64, Shape(shape)))
}
