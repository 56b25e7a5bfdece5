//! Arrays of files as tensors of graphs, and back.
//!
//! A graph has fewer element types than files: float64 becomes f32 on the way in, and where the model declares
//! float64, f32 becomes float64 on the way out.

use crate::data::{Array, Dtype, InputType};
use crate::error::{Code, Error, Result};
use qcompile_ir::{DType, Tensor, TensorType};

/// The element type of a file for one of the graph.
#[must_use]
pub const fn file_type(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::BF16 => Dtype::Bf16,
        DType::F16 => Dtype::F16,
        DType::I8 => Dtype::I8,
        DType::U8 => Dtype::U8,
        DType::I32 => Dtype::I32,
        DType::I64 => Dtype::I64,
        DType::Bool => Dtype::Bool,
    }
}

/// The element type of the graph that holds exactly this one, if there is one.
const fn graph_type(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::F32 => DType::F32,
        Dtype::Bf16 => DType::BF16,
        Dtype::F16 => DType::F16,
        Dtype::I8 => DType::I8,
        Dtype::U8 => DType::U8,
        Dtype::I32 => DType::I32,
        Dtype::I64 => DType::I64,
        Dtype::Bool => DType::Bool,
        _ => return None,
    })
}

/// What an input takes from a file. An axis of several N is as open as one of N.
#[must_use]
pub fn input_type(ty: &TensorType) -> InputType {
    let shape = ty.shape.0.iter().map(|dim| dim.as_fixed()).collect();
    InputType { dtype: file_type(ty.dtype), shape }
}

/// An array as a tensor: float64 is rounded to f32, every other type is kept.
///
/// # Errors
/// [`Code::DataType`] for a type that graphs do not have.
pub fn to_tensor(name: &str, array: Array) -> Result<Tensor> {
    if array.dtype == Dtype::F64 {
        let (doubles, _) = array.bytes.as_chunks::<8>();
        let values = doubles.iter().map(|&double| f64::from_le_bytes(double));
        #[allow(clippy::cast_possible_truncation, reason = "the graph computes in f32")]
        let bytes = values.flat_map(|value| (value as f32).to_le_bytes()).collect();
        return tensor(name, DType::F32, array.shape, bytes);
    }
    match graph_type(array.dtype) {
        Some(dtype) => tensor(name, dtype, array.shape, array.bytes),
        None => {
            let cause = format!("array `{name}` is {}, which no input takes", array.dtype);
            Err(Error::new(Code::DataType, cause))
        }
    }
}

fn tensor(name: &str, dtype: DType, shape: Vec<usize>, bytes: Vec<u8>) -> Result<Tensor> {
    let made = Tensor::from_bytes(dtype, shape, bytes);
    made.ok_or_else(|| Error::new(Code::DataShape, format!("array `{name}` is too large")))
}

/// A tensor as an array, as float64 where `double` says that the model declares it so.
///
/// # Errors
/// Only by a defect.
pub fn to_array(tensor: &Tensor, double: bool) -> Result<Array> {
    let shape = tensor.shape().to_vec();
    if double && tensor.dtype() == DType::F32 {
        return Array::from_f64(shape, &tensor.to_f64());
    }
    Array::new(file_type(tensor.dtype()), shape, tensor.bytes().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_survive_the_way_in_and_out() {
        for dtype in DType::ALL {
            let tensor = Tensor::zeros(dtype, &[2, 0, 3]);
            let array = to_array(&tensor, false).unwrap();
            assert_eq!(to_tensor("x", array).unwrap(), tensor);
        }
        let doubles = Array::from_f64(vec![2], &[0.5, 1e-3]).unwrap();
        let tensor = to_tensor("x", doubles).unwrap();
        assert_eq!(tensor.dtype(), DType::F32);
        let back = to_array(&tensor, true).unwrap();
        assert_eq!(back.to_f64().unwrap(), [0.5, f64::from(1e-3_f32)]);
        let odd = Array::new(Dtype::U16, vec![1], vec![0, 0]).unwrap();
        assert_eq!(to_tensor("x", odd).unwrap_err().code(), Code::DataType);
    }
}
