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

/// Channels of a layer that one int8 product does not serve.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Channels {
    /// Output channels that stay in high precision, ascending.
    pub outliers: Vec<u32>,
    /// Channels of the data that stay in high precision, ascending.
    pub input_outliers: Vec<u32>,
    /// Output channels whose weights are sums of several int8 points, ascending, each with the number of points.
    pub points: Vec<(u32, u32)>,
}

impl Channels {
    /// Whether int8 serves them all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.outliers.is_empty() && self.input_outliers.is_empty() && self.points.is_empty()
    }

    /// Why they are not what they should be, if so.
    #[must_use]
    pub fn defect(&self) -> Option<&'static str> {
        let Channels { outliers, input_outliers, points } = self;
        if !outliers.is_sorted_by(|a, b| a < b) {
            return Some("its outliers do not ascend");
        }
        if !input_outliers.is_sorted_by(|a, b| a < b) {
            return Some("its input outliers do not ascend");
        }
        if !points.is_sorted_by(|a, b| a.0 < b.0) {
            return Some("its channels of several points do not ascend");
        }
        let several = |&(_, count): &(u32, u32)| (2..=3).contains(&count);
        (!points.iter().all(several)).then_some("a channel has neither two points nor three")
    }
}

/// What passes and people write beside a node. A graph without its notes computes the same values.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Note {
    /// Name of the ONNX node it came from.
    pub origin: Option<String>,
    /// Predicted increase of the loss when this layer is quantized.
    pub sensitivity: Option<f32>,
    /// The channels of this layer that int8 alone does not serve.
    pub channels: Channels,
    /// The decided precision of this layer.
    pub precision: Option<Precision>,
    /// The type in which what this layer reads and gives is stored, where that does not follow from `precision`: bf16
    /// around an int8 product.
    pub stored: Option<DType>,
}
