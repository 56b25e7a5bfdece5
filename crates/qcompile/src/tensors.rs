//! Arrays of files as tensors of graphs, and back.
//!
//! A graph has fewer element types than files: float64 becomes f32 on the way in, int16, uint16, uint32 and uint64
//! wider integers, and on the way out they become again what the model declares, wrapped as numpy does. Numbers of 4
//! bits are integers of 8 in files, floats of 8 bits their codes.

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
        DType::I8 | DType::I4 => Dtype::I8,
        DType::U8 | DType::U4 | DType::F8E4M3 | DType::F8E5M2 => Dtype::U8,
        DType::I32 => Dtype::I32,
        DType::I64 => Dtype::I64,
        DType::Bool => Dtype::Bool,
    }
}

/// What an input takes from a file. An axis of several N is as open as one of N.
#[must_use]
pub fn input_type(ty: &TensorType) -> InputType {
    let shape = ty.shape.0.iter().map(|dim| dim.as_fixed()).collect();
    InputType { dtype: file_type(ty.dtype), shape }
}

/// An array as a tensor: float64 is rounded to f32, integers that graphs do not have become wider (of uint64 the bits
/// stay), every other type is kept.
///
/// # Errors
/// [`Code::DataShape`] if it is too large.
pub fn to_tensor(name: &str, array: Array) -> Result<Tensor> {
    let Array { dtype, shape, bytes } = array;
    #[allow(clippy::cast_possible_truncation, reason = "the graph computes in f32")]
    let (dtype, bytes) = match dtype {
        Dtype::F64 => (DType::F32, each(&bytes, |b| (f64::from_le_bytes(b) as f32).to_le_bytes())),
        Dtype::I16 => {
            (DType::I32, each(&bytes, |b| i32::from(i16::from_le_bytes(b)).to_le_bytes()))
        }
        Dtype::U16 => {
            (DType::I32, each(&bytes, |b| i32::from(u16::from_le_bytes(b)).to_le_bytes()))
        }
        Dtype::U32 => {
            (DType::I64, each(&bytes, |b| i64::from(u32::from_le_bytes(b)).to_le_bytes()))
        }
        Dtype::F32 => (DType::F32, bytes),
        Dtype::Bf16 => (DType::BF16, bytes),
        Dtype::F16 => (DType::F16, bytes),
        Dtype::I8 => (DType::I8, bytes),
        Dtype::U8 => (DType::U8, bytes),
        Dtype::I32 => (DType::I32, bytes),
        Dtype::I64 | Dtype::U64 => (DType::I64, bytes),
        Dtype::Bool => (DType::Bool, bytes),
    };
    tensor(name, dtype, shape, bytes)
}

/// Each element converted.
fn each<const FROM: usize, const TO: usize>(
    bytes: &[u8],
    convert: impl Fn([u8; FROM]) -> [u8; TO],
) -> Vec<u8> {
    let (elements, _) = bytes.as_chunks::<FROM>();
    elements.iter().flat_map(|&element| convert(element)).collect()
}

/// A tensor of 8-bit integers as the type that files have no word for, where the graph has that.
///
/// # Errors
/// [`Code::DataShape`] for a number that does not fit into 4 bits.
pub fn retyped(name: &str, tensor: Tensor, dtype: DType) -> Result<Tensor> {
    if tensor.dtype() == dtype || file_type(tensor.dtype()) != file_type(dtype) {
        return Ok(tensor);
    }
    let made = Tensor::from_bytes(dtype, tensor.shape().to_vec(), tensor.bytes().to_vec());
    made.ok_or_else(|| {
        let cause = format!("array `{name}` has numbers that do not fit into {dtype}");
        Error::new(Code::DataShape, cause)
    })
}

fn tensor(name: &str, dtype: DType, shape: Vec<usize>, bytes: Vec<u8>) -> Result<Tensor> {
    let made = Tensor::from_bytes(dtype, shape, bytes);
    made.ok_or_else(|| Error::new(Code::DataShape, format!("array `{name}` is too large")))
}

/// A tensor as an array, of the type that it is `carried` for, if it is.
///
/// # Errors
/// Only by a defect.
pub fn to_array(tensor: &Tensor, carried: Option<Dtype>) -> Result<Array> {
    let (shape, bytes) = (tensor.shape().to_vec(), tensor.bytes());
    match (carried, tensor.dtype()) {
        (Some(Dtype::F64), DType::F32) => Array::from_f64(shape, &tensor.to_f64()),
        (Some(dtype @ (Dtype::I16 | Dtype::U16)), DType::I32) => {
            Array::new(dtype, shape, each(bytes, |[a, b, _, _]| [a, b]))
        }
        (Some(Dtype::U32), DType::I64) => {
            Array::new(Dtype::U32, shape, each(bytes, |[a, b, c, d, ..]: [u8; 8]| [a, b, c, d]))
        }
        (Some(Dtype::U64), DType::I64) => Array::new(Dtype::U64, shape, bytes.to_vec()),
        (_, dtype) => Array::new(file_type(dtype), shape, bytes.to_vec()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_survive_the_way_in_and_out() {
        for dtype in DType::ALL {
            let tensor = Tensor::zeros(dtype, &[2, 0, 3]);
            let array = to_array(&tensor, None).unwrap();
            let back = retyped("x", to_tensor("x", array).unwrap(), dtype).unwrap();
            assert_eq!(back, tensor);
        }
        let wide = Tensor::from_f64(DType::I8, &[1], &[8.0]).unwrap();
        assert!(retyped("x", wide, DType::I4).is_err());
        let doubles = Array::from_f64(vec![2], &[0.5, 1e-3]).unwrap();
        let tensor = to_tensor("x", doubles).unwrap();
        assert_eq!(tensor.dtype(), DType::F32);
        let back = to_array(&tensor, Some(Dtype::F64)).unwrap();
        assert_eq!(back.to_f64().unwrap(), [0.5, f64::from(1e-3_f32)]);
    }

    #[test]
    fn carried_integers_come_back() {
        for (dtype, carrier, bytes) in [
            (Dtype::U16, DType::I32, vec![0xff, 0xff, 1, 0]),
            (Dtype::I16, DType::I32, vec![0xff, 0xff, 1, 0x80]),
            (Dtype::U32, DType::I64, vec![0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]),
            (Dtype::U64, DType::I64, vec![0xff; 16]),
        ] {
            let array = Array::new(dtype, vec![2], bytes).unwrap();
            let tensor = to_tensor("x", array.clone()).unwrap();
            assert_eq!(tensor.dtype(), carrier);
            assert_eq!(to_array(&tensor, Some(dtype)).unwrap(), array);
        }
        let sum = Tensor::from_i64(&[1], &[(1 << 32) + 5]).unwrap();
        let wrapped = to_array(&sum, Some(Dtype::U32)).unwrap();
        assert_eq!(wrapped.bytes, [5, 0, 0, 0]);
    }
}
