//! Annotations that never change what a graph means.

use crate::DType;

/// The precision of the five operations of one layer (forward, the two products of the backward pass, the mean of
/// gradients over ranks, and the update).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Precision {
    /// The forward product.
    pub forward: DType,
    /// The gradient of the layer's input.
    pub grad_input: DType,
    /// The gradient of the layer's weight.
    pub grad_weight: DType,
    /// The exchange of gradients between ranks.
    pub mean: DType,
    /// The weight update.
    pub update: DType,
}

impl Precision {
    /// The same type for all five operations.
    #[must_use]
    pub const fn uniform(dtype: DType) -> Precision {
        Precision {
            forward: dtype,
            grad_input: dtype,
            grad_weight: dtype,
            mean: dtype,
            update: dtype,
        }
    }

    /// Whether one of the three products runs in int8.
    #[must_use]
    pub fn has_int8(&self) -> bool {
        [self.forward, self.grad_input, self.grad_weight].contains(&DType::I8)
    }
}

/// What passes and people write beside a node. A graph without its notes computes the same values.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Note {
    /// Name of the ONNX node it came from.
    pub origin: Option<String>,
    /// Predicted increase of the loss when this layer is quantized.
    pub sensitivity: Option<f32>,
    /// Output channels that must stay in high precision, ascending.
    pub outliers: Vec<u32>,
    /// The decided precision of this layer.
    pub precision: Option<Precision>,
    /// The type in which what this layer reads and gives is stored, where that does not follow from `precision`: bf16
    /// around an int8 product.
    pub stored: Option<DType>,
}
