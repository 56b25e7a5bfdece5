//! Values known at compile time: constants, and shapes that may contain the batch size.

use qcompile_ir::{DType, Dim, Shape, Tensor, TensorType};
use std::sync::Arc;

/// One element of a value known at compile time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Element {
    /// An integer, or a bool as 0 or 1.
    Int(i64),
    /// A multiple of the batch size N.
    Batch(i64),
    /// A float, already rounded to the element type.
    Float(f64),
}

impl Element {
    /// The element as f64; `None` if it depends on N.
    #[allow(clippy::cast_precision_loss, reason = "float arithmetic is what is asked for")]
    pub(crate) fn as_f64(self) -> Option<f64> {
        match self {
            Element::Int(value) => Some(value as f64),
            Element::Float(value) => Some(value),
            Element::Batch(_) => None,
        }
    }

    /// The element as an integer; `None` if it depends on N or is a float.
    pub(crate) fn as_int(self) -> Option<i64> {
        match self {
            Element::Int(value) => Some(value),
            _ => None,
        }
    }
}

impl From<i64> for Element {
    fn from(value: i64) -> Element {
        Element::Int(value)
    }
}

impl From<Dim> for Element {
    fn from(dim: Dim) -> Element {
        let scale = i64::try_from(dim.scale).unwrap_or(i64::MAX);
        if dim.batch { Element::Batch(scale) } else { Element::Int(scale) }
    }
}

/// A value known at compile time.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Known {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    /// Row-major; a single element stands for all.
    pub(crate) elements: Arc<[Element]>,
}

/// Largest number of elements that is computed with at compile time.
pub(crate) const FOLD_LIMIT: usize = 1 << 18;

impl Known {
    pub(crate) fn new(dtype: DType, shape: Vec<usize>, elements: Vec<Element>) -> Known {
        Known { dtype, shape, elements: elements.into() }
    }

    /// A 1-D int64 value.
    pub(crate) fn ints(elements: Vec<Element>) -> Known {
        Known::new(DType::I64, vec![elements.len()], elements)
    }

    /// The sizes of a shape.
    pub(crate) fn sizes(shape: &[Dim]) -> Known {
        Known::ints(shape.iter().map(|&dim| dim.into()).collect())
    }

    /// A scalar, rounded to its type.
    pub(crate) fn scalar(dtype: DType, value: f64) -> Known {
        Known::new(dtype, Vec::new(), vec![from_f64(dtype, value)])
    }

    /// The elements of a tensor; `None` if there are more than [`FOLD_LIMIT`].
    pub(crate) fn from_tensor(tensor: &Tensor) -> Option<Known> {
        if tensor.elements() > FOLD_LIMIT {
            return None;
        }
        let elements = if tensor.dtype().is_float() {
            tensor.to_f64().into_iter().map(Element::Float).collect()
        } else {
            tensor.to_i64().into_iter().map(Element::Int).collect()
        };
        Some(Known::new(tensor.dtype(), tensor.shape().to_vec(), elements))
    }

    /// The value as a tensor; `None` if it depends on N.
    pub(crate) fn to_tensor(&self) -> Option<Tensor> {
        let count = self.len()?;
        if self.dtype == DType::I64 {
            let values: Option<Vec<i64>> = (0..count).map(|at| self.get(at).as_int()).collect();
            return Tensor::from_i64(&self.shape, &values?);
        }
        let values: Option<Vec<f64>> = (0..count).map(|at| self.get(at).as_f64()).collect();
        Tensor::from_f64(self.dtype, &self.shape, &values?)
    }

    /// Number of elements of its shape.
    pub(crate) fn len(&self) -> Option<usize> {
        self.shape.iter().try_fold(1_usize, |count, &dim| count.checked_mul(dim))
    }

    /// Element `at` of the row-major order.
    pub(crate) fn get(&self, at: usize) -> Element {
        if self.elements.len() == 1 { self.elements[0] } else { self.elements[at] }
    }

    /// The first element; `None` if there is none.
    pub(crate) fn get_first(&self) -> Option<Element> {
        self.elements.first().copied()
    }

    /// Whether one element stands for all.
    pub(crate) fn is_uniform(&self) -> bool {
        self.elements.len() == 1
    }

    pub(crate) fn ty(&self) -> TensorType {
        TensorType::new(self.dtype, Shape::fixed(&self.shape))
    }
}

/// `value` as an element of `dtype`: rounded for floats, truncated for integers.
#[allow(clippy::cast_possible_truncation, reason = "rounding to the element type is the purpose")]
pub(crate) fn from_f64(dtype: DType, value: f64) -> Element {
    match dtype {
        DType::F32 => Element::Float(f64::from(value as f32)),
        DType::BF16 | DType::F16 | DType::F8E4M3 | DType::F8E5M2 => {
            Element::Float(Tensor::scalar(dtype, value).get_f64(0))
        }
        DType::Bool => Element::Int(i64::from(value != 0.0)),
        DType::I64 => Element::Int(value as i64),
        DType::I32 => Element::Int(i64::from(value as i32)),
        DType::I8 | DType::U8 | DType::I4 | DType::U4 => wrapped(dtype, value as i64),
    }
}

/// `value` wrapped to the range of an integer type.
#[allow(clippy::cast_possible_truncation, reason = "wrapping is the purpose")]
#[allow(clippy::cast_sign_loss, reason = "wrapping is the purpose")]
pub(crate) fn wrapped(dtype: DType, value: i64) -> Element {
    Element::Int(match dtype {
        DType::I32 => i64::from(value as i32),
        DType::I8 => i64::from(value as i8),
        DType::U8 => i64::from(value as u8),
        DType::I4 => (value << 60) >> 60,
        DType::U4 => value & 15,
        DType::Bool => i64::from(value != 0),
        _ => value,
    })
}
