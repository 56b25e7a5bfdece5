//! Loop nests: everything that is not a primitive is emitted from these.

use crate::{Affine, SlotId};
use qcompile_ir::{BinaryOp, CompareOp, DType, Dim, ReduceOp, UnaryOp};

/// A rectangular iteration domain with a straight-line body.
///
/// Every point of `dims` (outermost first) evaluates `body` once; `reads` and `writes` say where the body's values
/// come from and go to. `dims[0]` is the dimension that is split over threads. A nest with no dims has one point.
#[derive(Clone, Debug, PartialEq)]
pub struct LoopNest {
    /// Sizes of the iteration domain.
    pub dims: Vec<Dim>,
    /// What [`Scalar::Read`] refers to.
    pub reads: Vec<Access>,
    /// Values in single assignment: value `i` uses only values below `i`.
    pub body: Vec<Scalar>,
    /// What leaves the nest.
    pub writes: Vec<Write>,
}

/// An affine view of a slot: element `offset + sum(index[d] * strides[d])`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Access {
    /// The slot.
    pub slot: SlotId,
    /// Type of its elements.
    pub dtype: DType,
    /// First element.
    pub offset: Affine,
    /// Elements from one index to the next, for each dim of the nest; 0 repeats an element.
    pub strides: Vec<Dim>,
}

/// One value of a body. Operands are indices of earlier values.
///
/// Floats of any width are computed in f32; a bool is 0 or 1. Types follow as in the IR: a read has the type of its
/// access, arithmetic that of its operands, a comparison is bool.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scalar {
    /// The element of `reads[i]`.
    Read(usize),
    /// In an epilogue: the f32 element of the finished tile.
    Tile,
    /// A constant of a type.
    Const(DType, f64),
    /// The size of a dimension as f32.
    Size(Dim),
    /// A function of one value.
    Unary(UnaryOp, usize),
    /// A function of two values of one type.
    Binary(BinaryOp, usize, usize),
    /// A comparison of two values of one type.
    Compare(CompareOp, usize, usize),
    /// Value 1 where value 0 is true, else value 2.
    Select(usize, usize, usize),
    /// Conversion.
    Cast(DType, usize),
    /// `clamp(round_ties_even(x / scale) + zero_point)` as the quantized type; operands x, scale, zero point. What
    /// dequantizes to 0 if the scale is 0.
    Quantize(DType, usize, usize, Option<usize>),
    /// `(q - zero_point) · scale` as f32; operands q, scale, zero point.
    Dequantize(usize, usize, Option<usize>),
    /// `dy` where `x / scale + zero_point` rounds into the range of the quantized type, else 0; operands x, dy, scale,
    /// zero point.
    StraightThrough(DType, usize, usize, usize, Option<usize>),
}

impl Scalar {
    /// Indices of the values that it uses.
    pub fn operands(self) -> impl Iterator<Item = usize> {
        let (list, count) = match self {
            Scalar::Read(_) | Scalar::Tile | Scalar::Const(..) | Scalar::Size(_) => ([0; 3], 0),
            Scalar::Unary(_, x) | Scalar::Cast(_, x) => ([x, 0, 0], 1),
            Scalar::Binary(_, x, y)
            | Scalar::Compare(_, x, y)
            | Scalar::Quantize(_, x, y, _)
            | Scalar::Dequantize(x, y, _) => ([x, y, 0], 2),
            Scalar::Select(x, y, z) | Scalar::StraightThrough(_, x, y, z, _) => ([x, y, z], 3),
        };
        let zero_point = match self {
            Scalar::Quantize(.., zero_point)
            | Scalar::Dequantize(.., zero_point)
            | Scalar::StraightThrough(.., zero_point) => zero_point,
            _ => None,
        };
        list.into_iter().take(count).chain(zero_point)
    }
}

/// Where a value of the body goes.
#[derive(Clone, Debug, PartialEq)]
pub enum Write {
    /// Stored at each point; no two points store to the same element.
    Store {
        /// Where.
        access: Access,
        /// Index into the body.
        value: usize,
    },
    /// Combined over all dims whose stride is 0, in an order that depends on the sizes only. Strides of the other
    /// dims are those of a dense row-major array in order of the dims.
    Reduce {
        /// Where.
        access: Access,
        /// How.
        op: ReduceOp,
        /// Index into the body.
        value: usize,
    },
    /// In an epilogue: the sum of the squares of the deviations from the mean, both over all dims whose stride is 0, in
    /// one pass. Strides as for a reduction; the value is the tile or casts of it.
    Deviations {
        /// Where.
        access: Access,
        /// Index into the body.
        value: usize,
    },
}

impl Write {
    /// Where the value goes.
    #[must_use]
    pub fn access(&self) -> &Access {
        match self {
            Write::Store { access, .. }
            | Write::Reduce { access, .. }
            | Write::Deviations { access, .. } => access,
        }
    }

    pub(crate) fn access_mut(&mut self) -> &mut Access {
        match self {
            Write::Store { access, .. }
            | Write::Reduce { access, .. }
            | Write::Deviations { access, .. } => access,
        }
    }

    /// Which value of the body it is.
    #[must_use]
    pub fn value(&self) -> usize {
        match self {
            Write::Store { value, .. }
            | Write::Reduce { value, .. }
            | Write::Deviations { value, .. } => *value,
        }
    }

    pub(crate) fn value_mut(&mut self) -> &mut usize {
        match self {
            Write::Store { value, .. }
            | Write::Reduce { value, .. }
            | Write::Deviations { value, .. } => value,
        }
    }
}

impl LoopNest {
    /// Whether a reduction crosses the split dimension, so that it needs partial results that are combined in a
    /// second phase.
    #[must_use]
    pub fn crosses_split(&self) -> bool {
        self.writes.iter().any(|write| {
            matches!(write, Write::Reduce { access, .. }
                if access.strides.first().is_some_and(|stride| stride.scale == 0))
        })
    }
}
