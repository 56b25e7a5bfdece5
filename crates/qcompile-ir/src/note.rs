//! Annotations that never change what a graph means.

use crate::{DType, QuantizedRange};

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

    /// Whether one of the three products reads codes of a quantized type.
    #[must_use]
    pub fn is_quantized(&self) -> bool {
        let products = [self.forward, self.grad_input, self.grad_weight];
        products.into_iter().any(|dtype| QuantizedRange::of(dtype, false).is_some())
    }
}

/// How far one scale reaches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Granularity {
    /// One scale for each tensor.
    Tensor,
    /// One for each row (token, image) of activations and gradients, and for each output channel of weights.
    Row,
    /// One for each tensor of activations and gradients, and for each output channel of weights.
    #[default]
    Channel,
}

impl Granularity {
    /// Every granularity.
    pub const ALL: [Granularity; 3] = [Granularity::Tensor, Granularity::Row, Granularity::Channel];

    /// The word in text.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Granularity::Tensor => "tensor",
            Granularity::Row => "row",
            Granularity::Channel => "channel",
        }
    }
}

/// How gradients are rounded; everything else is rounded to nearest even.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum GradientRounding {
    /// To nearest even.
    #[default]
    Nearest,
    /// Up or down by chance, so that the mean is what was rounded.
    Stochastic,
}

impl GradientRounding {
    /// Every rounding.
    pub const ALL: [GradientRounding; 2] =
        [GradientRounding::Nearest, GradientRounding::Stochastic];

    /// The word in text.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            GradientRounding::Nearest => "nearest",
            GradientRounding::Stochastic => "stochastic",
        }
    }
}

/// What the scales of activations and gradients follow; those of weights follow the weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scaling {
    /// The values of the step.
    #[default]
    Current,
    /// The largest magnitudes of the steps before.
    Delayed,
}

impl Scaling {
    /// Every scaling.
    pub const ALL: [Scaling; 2] = [Scaling::Current, Scaling::Delayed];

    /// The word in text.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Scaling::Current => "current",
            Scaling::Delayed => "delayed",
        }
    }
}

/// How the operands of a layer's quantized products are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Quantizer {
    /// The codes of weights. Those of activations and gradients are the layer's [`Precision`].
    pub weight: DType,
    /// How far one scale reaches.
    pub granularity: Granularity,
    /// How gradients are rounded.
    pub rounding: GradientRounding,
    /// What scales follow.
    pub scaling: Scaling,
}

impl Default for Quantizer {
    /// i8 to nearest, by a scale for each tensor or output channel of a weight that the values of the step give.
    fn default() -> Self {
        Quantizer {
            weight: DType::I8,
            granularity: Granularity::default(),
            rounding: GradientRounding::default(),
            scaling: Scaling::default(),
        }
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
    /// How operands are rounded, where that is not [`Quantizer::default`].
    pub quantizer: Option<Quantizer>,
}
