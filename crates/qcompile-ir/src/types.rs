//! Element types, dimensions, shapes.

use std::fmt;
use std::str::FromStr;

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// The upper half of binary32.
    BF16,
    /// IEEE 754 binary16.
    F16,
    /// OCP 8-bit float of 4 exponent and 3 mantissa bits (ONNX FLOAT8E4M3FN): largest 448, no infinity.
    F8E4M3,
    /// OCP 8-bit float of 5 exponent and 2 mantissa bits (ONNX FLOAT8E5M2): largest finite 57344.
    F8E5M2,
    /// Signed 8-bit integer.
    I8,
    /// Unsigned 8-bit integer.
    U8,
    /// Signed 4-bit integer, one in a byte.
    I4,
    /// Unsigned 4-bit integer, one in a byte.
    U4,
    /// Signed 32-bit integer.
    I32,
    /// Signed 64-bit integer.
    I64,
    /// One byte, 0 or 1.
    Bool,
}

impl DType {
    /// Every element type, in declaration order.
    pub const ALL: [DType; 12] = [
        DType::F32,
        DType::BF16,
        DType::F16,
        DType::F8E4M3,
        DType::F8E5M2,
        DType::I8,
        DType::U8,
        DType::I4,
        DType::U4,
        DType::I32,
        DType::I64,
        DType::Bool,
    ];

    /// The name in `.qir` text.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::BF16 => "bf16",
            DType::F16 => "f16",
            DType::F8E4M3 => "f8e4m3",
            DType::F8E5M2 => "f8e5m2",
            DType::I8 => "i8",
            DType::U8 => "u8",
            DType::I4 => "i4",
            DType::U4 => "u4",
            DType::I32 => "i32",
            DType::I64 => "i64",
            DType::Bool => "bool",
        }
    }

    /// Bytes of one element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            DType::F8E4M3
            | DType::F8E5M2
            | DType::I8
            | DType::U8
            | DType::I4
            | DType::U4
            | DType::Bool => 1,
            DType::BF16 | DType::F16 => 2,
            DType::F32 | DType::I32 => 4,
            DType::I64 => 8,
        }
    }

    /// Whether it is a floating-point type.
    #[must_use]
    pub const fn is_float(self) -> bool {
        match self {
            DType::F32 | DType::BF16 | DType::F16 | DType::F8E4M3 | DType::F8E5M2 => true,
            DType::I8
            | DType::U8
            | DType::I4
            | DType::U4
            | DType::I32
            | DType::I64
            | DType::Bool => false,
        }
    }

    /// Whether it is a float of 8 bits.
    #[must_use]
    pub const fn is_float8(self) -> bool {
        matches!(self, DType::F8E4M3 | DType::F8E5M2)
    }

    /// The smallest and the largest number of an integer type.
    #[must_use]
    pub const fn integer_range(self) -> Option<(i64, i64)> {
        match self {
            DType::I4 => Some((-8, 7)),
            DType::U4 => Some((0, 15)),
            DType::I8 => Some((i8::MIN as i64, i8::MAX as i64)),
            DType::U8 => Some((0, u8::MAX as i64)),
            DType::I32 => Some((i32::MIN as i64, i32::MAX as i64)),
            DType::I64 => Some((i64::MIN, i64::MAX)),
            DType::F32 | DType::BF16 | DType::F16 | DType::F8E4M3 | DType::F8E5M2 | DType::Bool => {
                None
            }
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for DType {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        DType::ALL.into_iter().find(|dtype| dtype.name() == text).ok_or(())
    }
}

/// One dimension: `scale`, or `scale`·N where N is the batch size that is known when a step runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Dim {
    /// The constant factor.
    pub scale: usize,
    /// Whether the factor multiplies the batch size N.
    pub batch: bool,
}

impl Dim {
    /// The batch size N itself.
    pub const N: Dim = Dim { scale: 1, batch: true };
    /// The dimension 1.
    pub const ONE: Dim = Dim { scale: 1, batch: false };

    /// A dimension of constant size.
    #[must_use]
    pub const fn fixed(scale: usize) -> Dim {
        Dim { scale, batch: false }
    }

    /// Its size when the batch size is `batch`.
    #[must_use]
    pub const fn size(self, batch: usize) -> usize {
        if self.batch { self.scale.saturating_mul(batch) } else { self.scale }
    }

    /// The constant size, if it does not depend on N.
    #[must_use]
    pub const fn as_fixed(self) -> Option<usize> {
        if self.batch { None } else { Some(self.scale) }
    }

    /// The product; `None` if it would be N² or overflow.
    #[must_use]
    pub fn times(self, other: Dim) -> Option<Dim> {
        if self.batch && other.batch {
            return None;
        }
        let scale = self.scale.checked_mul(other.scale)?;
        Some(Dim { scale, batch: self.batch || other.batch })
    }
}

impl From<usize> for Dim {
    fn from(scale: usize) -> Dim {
        Dim::fixed(scale)
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.batch, self.scale) {
            (false, scale) => write!(f, "{scale}"),
            (true, 1) => f.write_str("N"),
            (true, scale) => write!(f, "{scale}N"),
        }
    }
}

/// The dimensions of a tensor, outermost first. At most one depends on N.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Shape(pub Vec<Dim>);

impl Shape {
    /// The shape of a scalar.
    #[must_use]
    pub fn scalar() -> Shape {
        Shape(Vec::new())
    }

    /// A shape whose dimensions are all constant.
    #[must_use]
    pub fn fixed(dims: &[usize]) -> Shape {
        Shape(dims.iter().map(|&dim| Dim::fixed(dim)).collect())
    }

    /// Number of dimensions.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.0.len()
    }

    /// Number of elements; `None` if it overflows or two dimensions depend on N.
    #[must_use]
    pub fn elements(&self) -> Option<Dim> {
        self.0.iter().try_fold(Dim::ONE, |product, &dim| product.times(dim))
    }

    /// Sizes when the batch size is `batch`.
    #[must_use]
    pub fn sizes(&self, batch: usize) -> Vec<usize> {
        self.0.iter().map(|dim| dim.size(batch)).collect()
    }

    /// Constant sizes, if none depends on N.
    #[must_use]
    pub fn as_fixed(&self) -> Option<Vec<usize>> {
        self.0.iter().map(|dim| dim.as_fixed()).collect()
    }

    /// The axis that depends on N, if there is one.
    #[must_use]
    pub fn batch_axis(&self) -> Option<usize> {
        self.0.iter().position(|dim| dim.batch)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (position, dim) in self.0.iter().enumerate() {
            if position > 0 {
                f.write_str(", ")?;
            }
            write!(f, "{dim}")?;
        }
        f.write_str("]")
    }
}

/// What a value is: element type and shape.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TensorType {
    /// Element type.
    pub dtype: DType,
    /// Dimensions.
    pub shape: Shape,
}

impl TensorType {
    /// A type from its parts.
    #[must_use]
    pub fn new(dtype: DType, shape: Shape) -> TensorType {
        TensorType { dtype, shape }
    }

    /// A float32 type.
    #[must_use]
    pub fn f32(shape: Shape) -> TensorType {
        TensorType { dtype: DType::F32, shape }
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.dtype, self.shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dimensions_multiply_and_print() {
        assert_eq!(Dim::N.times(Dim::fixed(128)).expect("linear").to_string(), "128N");
        assert_eq!(Dim::N.times(Dim::N), None);
        assert_eq!(Dim::fixed(usize::MAX).times(Dim::fixed(2)), None);
        let shape = Shape(vec![Dim::N, Dim::fixed(3)]);
        assert_eq!(TensorType::f32(shape.clone()).to_string(), "f32[N, 3]");
        assert_eq!(shape.sizes(5), [5, 3]);
    }
}
