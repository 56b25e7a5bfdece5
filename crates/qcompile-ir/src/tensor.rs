//! Concrete values.

use crate::{DType, Shape, TensorType, float8, fnv1a};
use half::{bf16, f16};
use twox_hash::XxHash3_64;

/// A concrete, dense, row-major value: little-endian elements of one type.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Tensor {
    /// A tensor from little-endian bytes. `None` if their number is not what the shape needs, or a byte is no number of
    /// 4 bits where the type has such.
    #[must_use]
    pub fn from_bytes(dtype: DType, shape: Vec<usize>, bytes: Vec<u8>) -> Option<Tensor> {
        let elements = element_count(&shape)?;
        let valid = match dtype {
            DType::I4 => bytes.iter().all(|byte| byte.wrapping_add(8) < 16),
            DType::U4 => bytes.iter().all(|&byte| byte < 16),
            _ => true,
        };
        let fits = elements.checked_mul(dtype.size())? == bytes.len();
        (fits && valid).then_some(Tensor { dtype, shape, bytes })
    }

    /// A float32 tensor. `None` if the number of values is not what the shape needs.
    #[must_use]
    pub fn from_f32(shape: &[usize], values: &[f32]) -> Option<Tensor> {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Tensor::from_bytes(DType::F32, shape.to_vec(), bytes)
    }

    /// An int64 tensor. `None` if the number of values is not what the shape needs.
    #[must_use]
    pub fn from_i64(shape: &[usize], values: &[i64]) -> Option<Tensor> {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Tensor::from_bytes(DType::I64, shape.to_vec(), bytes)
    }

    /// Values of any element type from f64, rounded to nearest even, saturated for integers and floats of 8 bits.
    #[must_use]
    pub fn from_f64(dtype: DType, shape: &[usize], values: &[f64]) -> Option<Tensor> {
        let mut bytes = Vec::with_capacity(values.len().checked_mul(dtype.size())?);
        for &value in values {
            push_f64(dtype, value, &mut bytes);
        }
        Tensor::from_bytes(dtype, shape.to_vec(), bytes)
    }

    /// A scalar.
    #[must_use]
    pub fn scalar(dtype: DType, value: f64) -> Tensor {
        let mut bytes = Vec::with_capacity(dtype.size());
        push_f64(dtype, value, &mut bytes);
        Tensor { dtype, shape: Vec::new(), bytes }
    }

    /// A tensor of zeros.
    #[must_use]
    pub fn zeros(dtype: DType, shape: &[usize]) -> Tensor {
        let elements: usize = shape.iter().product();
        Tensor { dtype, shape: shape.to_vec(), bytes: vec![0; elements * dtype.size()] }
    }

    /// Element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Sizes, outermost first.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The little-endian elements.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Number of elements.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }

    /// Its type in a graph.
    #[must_use]
    pub fn ty(&self) -> TensorType {
        TensorType::new(self.dtype, Shape::fixed(&self.shape))
    }

    /// All elements as f64 (exact but for i64 beyond 2^53).
    #[must_use]
    pub fn to_f64(&self) -> Vec<f64> {
        (0..self.elements()).map(|index| self.get_f64(index)).collect()
    }

    /// All elements as f32; exact for a float32 tensor.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "the narrowing is what is asked for")]
    pub fn to_f32(&self) -> Vec<f32> {
        (0..self.elements()).map(|index| self.get_f64(index) as f32).collect()
    }

    /// All elements as i64; floats are truncated towards zero.
    #[must_use]
    #[allow(
        clippy::cast_possible_truncation,
        reason = "saturating conversion is what is asked for"
    )]
    pub fn to_i64(&self) -> Vec<i64> {
        if self.dtype == DType::I64 {
            let (words, _) = self.bytes.as_chunks::<8>();
            return words.iter().map(|&word| i64::from_le_bytes(word)).collect();
        }
        (0..self.elements()).map(|index| self.get_f64(index) as i64).collect()
    }

    /// Element `index` of the row-major order as f64. Panics if out of range.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "documented")]
    pub fn get_f64(&self, index: usize) -> f64 {
        let at = index * self.dtype.size();
        let b = |k: usize| self.bytes[at + k];
        match self.dtype {
            DType::F32 => f64::from(f32::from_le_bytes([b(0), b(1), b(2), b(3)])),
            DType::BF16 => bf16::from_le_bytes([b(0), b(1)]).to_f64(),
            DType::F16 => f16::from_le_bytes([b(0), b(1)]).to_f64(),
            DType::F8E4M3 => float8::E4M3.decode(b(0)),
            DType::F8E5M2 => float8::E5M2.decode(b(0)),
            DType::I8 | DType::I4 => f64::from(i8::from_le_bytes([b(0)])),
            DType::U8 | DType::U4 | DType::Bool => f64::from(b(0)),
            DType::I32 => f64::from(i32::from_le_bytes([b(0), b(1), b(2), b(3)])),
            DType::I64 => {
                i64::from_le_bytes([b(0), b(1), b(2), b(3), b(4), b(5), b(6), b(7)]) as f64
            }
        }
    }

    /// The same elements under another shape; `None` if their number differs.
    #[must_use]
    pub fn reshaped(&self, shape: &[usize]) -> Option<Tensor> {
        Tensor::from_bytes(self.dtype, shape.to_vec(), self.bytes.clone())
    }

    /// If all elements are the same bytes, that element as f64.
    #[must_use]
    pub fn splat(&self) -> Option<f64> {
        // Alike if each is like the one before.
        let after = self.bytes.get(self.dtype.size()..)?;
        (after == &self.bytes[..after.len()]).then(|| self.get_f64(0))
    }

    /// XXH3 (64 bits) of the bytes, with FNV-1a of type and shape as its seed: how text names a large tensor
    /// (`#0123456789abcdef`).
    #[must_use]
    pub fn digest(&self) -> u64 {
        let shape = self.shape.iter().flat_map(|&dim| (dim as u64).to_le_bytes());
        let seed = fnv1a(self.dtype.name().bytes().chain(shape));
        XxHash3_64::oneshot_with_seed(seed, &self.bytes)
    }
}

fn element_count(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1_usize, |product, &dim| product.checked_mul(dim))
}

/// Appends `value` as one element of `dtype`.
#[allow(clippy::cast_possible_truncation, reason = "rounding to the element type is the purpose")]
fn push_f64(dtype: DType, value: f64, bytes: &mut Vec<u8>) {
    match dtype {
        DType::F32 => bytes.extend((value as f32).to_le_bytes()),
        DType::BF16 => bytes.extend(bf16::from_f64(value).to_le_bytes()),
        DType::F16 => bytes.extend(f16::from_f64(value).to_le_bytes()),
        DType::F8E4M3 => bytes.push(float8::E4M3.encode(value)),
        DType::F8E5M2 => bytes.push(float8::E5M2.encode(value)),
        DType::I8 => bytes.extend((value.round_ties_even() as i8).to_le_bytes()),
        DType::I4 => {
            bytes.extend((value.round_ties_even().clamp(-8.0, 7.0) as i8).to_le_bytes());
        }
        DType::U4 => {
            #[allow(clippy::cast_sign_loss, reason = "saturates at 0")]
            bytes.push(value.round_ties_even().clamp(0.0, 15.0) as u8);
        }
        DType::U8 => {
            #[allow(clippy::cast_sign_loss, reason = "saturates at 0")]
            bytes.push(value.round_ties_even() as u8);
        }
        DType::I32 => bytes.extend((value.round_ties_even() as i32).to_le_bytes()),
        DType::I64 => bytes.extend((value.round_ties_even() as i64).to_le_bytes()),
        DType::Bool => bytes.push(u8::from(value != 0.0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dtype_keeps_small_integers() {
        for dtype in DType::ALL {
            let tensor = Tensor::from_f64(dtype, &[2], &[0.0, 1.0]).expect("two values");
            assert_eq!(tensor.to_f64(), [0.0, 1.0], "{dtype}");
        }
        assert_eq!(Tensor::from_f32(&[3], &[1.0]), None);
        assert_eq!(Tensor::zeros(DType::I8, &[2, 2]).splat(), Some(0.0));
    }

    #[test]
    fn numbers_of_4_bits_stay_in_their_range() {
        let values = [-9.0, -8.0, -0.5, 7.4, 100.0, f64::NAN];
        let signed = Tensor::from_f64(DType::I4, &[6], &values).expect("six values");
        assert_eq!(signed.to_f64(), [-8.0, -8.0, 0.0, 7.0, 7.0, 0.0]);
        let unsigned = Tensor::from_f64(DType::U4, &[6], &values).expect("six values");
        assert_eq!(unsigned.to_f64(), [0.0, 0.0, 0.0, 7.0, 15.0, 0.0]);
        for (dtype, good, bad) in [(DType::I4, 0xf8, 0xf7), (DType::I4, 7, 8), (DType::U4, 15, 16)]
        {
            assert!(Tensor::from_bytes(dtype, vec![1], vec![good]).is_some());
            assert_eq!(Tensor::from_bytes(dtype, vec![1], vec![bad]), None);
        }
    }
}
