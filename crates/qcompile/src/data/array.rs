//! Arrays as numpy has them.

use crate::error::{Code, Error, Result};
use std::fmt;

/// Element type of an [`Array`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dtype {
    /// Truth value, one byte, 0 or 1.
    Bool,
    /// Signed 8 bits.
    I8,
    /// Signed 16 bits.
    I16,
    /// Signed 32 bits.
    I32,
    /// Signed 64 bits.
    I64,
    /// Unsigned 8 bits.
    U8,
    /// Unsigned 16 bits.
    U16,
    /// Unsigned 32 bits.
    U32,
    /// Unsigned 64 bits.
    U64,
    /// IEEE half.
    F16,
    /// bfloat16, which numpy stores as two raw bytes (`V2`).
    Bf16,
    /// IEEE single.
    F32,
    /// IEEE double.
    F64,
}

impl Dtype {
    /// Bytes of one element.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Dtype::Bool | Dtype::I8 | Dtype::U8 => 1,
            Dtype::I16 | Dtype::U16 | Dtype::F16 | Dtype::Bf16 => 2,
            Dtype::I32 | Dtype::U32 | Dtype::F32 => 4,
            Dtype::I64 | Dtype::U64 | Dtype::F64 => 8,
        }
    }

    /// Whether elements are floating-point numbers.
    #[must_use]
    pub fn is_float(self) -> bool {
        matches!(self, Dtype::F16 | Dtype::Bf16 | Dtype::F32 | Dtype::F64)
    }

    /// Short name: `f32`, `u8`, `bool`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Dtype::Bool => "bool",
            Dtype::I8 => "i8",
            Dtype::I16 => "i16",
            Dtype::I32 => "i32",
            Dtype::I64 => "i64",
            Dtype::U8 => "u8",
            Dtype::U16 => "u16",
            Dtype::U32 => "u32",
            Dtype::U64 => "u64",
            Dtype::F16 => "f16",
            Dtype::Bf16 => "bf16",
            Dtype::F32 => "f32",
            Dtype::F64 => "f64",
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A dense array: little-endian elements in C order, so `bytes.len() == elements * dtype.size()`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Array {
    /// Element type.
    pub dtype: Dtype,
    /// Extent of each axis; empty for a scalar.
    pub shape: Vec<usize>,
    /// The elements.
    pub bytes: Vec<u8>,
}

impl Array {
    /// An array of `bytes`.
    ///
    /// # Errors
    /// [`Code::DataShape`] when the number of bytes is not what type and shape say.
    pub fn new(dtype: Dtype, shape: Vec<usize>, bytes: Vec<u8>) -> Result<Self> {
        match elements(&shape).and_then(|n| n.checked_mul(dtype.size())) {
            Some(wanted) if wanted == bytes.len() => Ok(Array { dtype, shape, bytes }),
            _ => Err(Error::new(
                Code::DataShape,
                format!("{} bytes do not make an array {dtype}{shape:?}", bytes.len()),
            )),
        }
    }

    /// Number of elements.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }

    /// Extent of the first axis; a scalar has none.
    #[must_use]
    pub fn samples(&self) -> Option<usize> {
        self.shape.first().copied()
    }

    /// Bytes of one sample, a slice of the first axis.
    #[must_use]
    pub fn sample_bytes(&self) -> usize {
        self.shape.iter().skip(1).product::<usize>() * self.dtype.size()
    }

    /// The samples at `rows`, in that order, as an array with `rows.len()` for its first axis.
    ///
    /// # Errors
    /// [`Code::DataEmpty`] when a row is beyond the first axis or the array is a scalar.
    pub fn gather(&self, rows: &[usize]) -> Result<Array> {
        let samples = self.samples().unwrap_or(0);
        let size = self.sample_bytes();
        let mut bytes = Vec::with_capacity(rows.len() * size);
        for &row in rows {
            if row >= samples {
                return Err(Error::new(
                    Code::DataEmpty,
                    format!("sample {row} asked for, but there are {samples}"),
                ));
            }
            bytes.extend_from_slice(&self.bytes[row * size..(row + 1) * size]);
        }
        let mut shape = self.shape.clone();
        if let Some(first) = shape.first_mut() {
            *first = rows.len();
        }
        Ok(Array { dtype: self.dtype, shape, bytes })
    }
}

impl fmt::Display for Array {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}", self.dtype, self.shape)
    }
}

/// Product of the extents, unless the array would not fit in memory. The extents beside an empty axis count too, as
/// in numpy, so that no product of some of them overflows either.
pub(crate) fn elements(shape: &[usize]) -> Option<usize> {
    const MOST: usize = isize::MAX as usize / 8;
    let mut filled = shape.iter().filter(|&&extent| extent > 0);
    let product = filled.try_fold(1_usize, |n, &extent| n.checked_mul(extent))?;
    match product {
        n if n > MOST => None,
        _ if shape.contains(&0) => Some(0),
        n => Some(n),
    }
}

macro_rules! numbers {
    ($($of:ident, $to:ident, $number:ty, $dtype:ident;)*) => {
        impl Array {
            $(
                #[doc = concat!("An array of `", stringify!($number), "`; its shape must fit (see [`Array::new`]).")]
                ///
                /// # Errors
                /// [`Code::DataShape`] when the shape does not hold as many values.
                pub fn $of(shape: Vec<usize>, values: &[$number]) -> Result<Self> {
                    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                    Array::new(Dtype::$dtype, shape, bytes)
                }

                #[doc = concat!("The values, when the type is `", stringify!($number), "`.")]
                #[must_use]
                pub fn $to(&self) -> Option<Vec<$number>> {
                    (self.dtype == Dtype::$dtype).then(|| {
                        let (values, _) = self.bytes.as_chunks();
                        values.iter().map(|&bytes| <$number>::from_le_bytes(bytes)).collect()
                    })
                }
            )*
        }
    };
}

numbers! {
    from_f32, to_f32, f32, F32;
    from_f64, to_f64, f64, F64;
    from_i32, to_i32, i32, I32;
    from_i64, to_i64, i64, I64;
    from_u8, to_u8, u8, U8;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gathers_samples() {
        let array = Array::from_f32(vec![3, 2], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
        let picked = array.gather(&[2, 0, 2]).unwrap();
        assert_eq!(picked.shape, [3, 2]);
        assert_eq!(picked.to_f32().unwrap(), [4.0, 5.0, 0.0, 1.0, 4.0, 5.0]);
        assert_eq!(array.gather(&[3]).unwrap_err().code(), Code::DataEmpty);
        assert_eq!(array.to_i64(), None);
    }

    #[test]
    fn shape_must_fit_bytes() {
        assert!(Array::new(Dtype::F32, vec![2], vec![0; 8]).is_ok());
        assert!(Array::new(Dtype::F32, vec![3], vec![0; 8]).is_err());
        assert!(Array::new(Dtype::U8, vec![usize::MAX, 2], vec![0; 8]).is_err());
        assert!(Array::new(Dtype::U8, vec![usize::MAX, 2, 0], vec![]).is_err());
        assert!(Array::new(Dtype::U8, vec![7, 2, 0], vec![]).is_ok());
    }
}
