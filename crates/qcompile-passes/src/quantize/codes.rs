//! The codes that activations are rounded to by a known range.

use super::step_size;
use crate::PassError;
use crate::builder::Builder;
use crate::calibrate::Range;
use qcompile_ir::{BinaryOp, DType, NodeId, QuantizedRange, Tensor, UnaryOp};

const SMALLEST_SCALE: f32 = QuantizedRange::SMALLEST_SCALE as f32;

/// Codes of 8 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Codes {
    /// 0 to 255, affine: the zero point is where 0 is. A relu leaves the codes from the zero point on.
    #[default]
    Uint8,
    /// -128 to 127, symmetric: the zero point is 0.
    Int8,
}

/// The numbers that codes stand for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Grid {
    scale: f64,
    zero_point: f64,
    low: f64,
    high: f64,
}

impl Grid {
    /// The number that `x` is rounded to.
    pub(crate) fn rounded(self, x: f64) -> f64 {
        let code =
            ((x / self.scale).round_ties_even() + self.zero_point).clamp(self.low, self.high);
        (code - self.zero_point) * self.scale
    }
}

/// The scale and the zero point of a rounding, in a graph.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parameters {
    pub(super) scale: NodeId,
    pub(super) zero_point: Option<NodeId>,
}

impl Codes {
    /// Both kinds, the default first.
    pub const ALL: [Codes; 2] = [Codes::Uint8, Codes::Int8];

    /// The word on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Codes::Uint8 => "uint8",
            Codes::Int8 => "int8",
        }
    }

    /// The element type.
    #[must_use]
    pub const fn dtype(self) -> DType {
        match self {
            Codes::Uint8 => DType::U8,
            Codes::Int8 => DType::I8,
        }
    }

    /// Whether the zero point is 0.
    #[must_use]
    pub const fn is_symmetric(self) -> bool {
        matches!(self, Codes::Int8)
    }

    /// What the codes stand for, if they cover a range.
    pub(crate) fn grid(self, range: Range) -> Grid {
        match self {
            Codes::Uint8 => {
                let scale = ((range.high - range.low) / 255.0).max(SMALLEST_SCALE);
                let zero_point = f64::from((-range.low / scale).round_ties_even());
                Grid { scale: f64::from(scale), zero_point, low: 0.0, high: 255.0 }
            }
            Codes::Int8 => {
                let scale = (range.amax() / 127.0).max(SMALLEST_SCALE);
                Grid { scale: f64::from(scale), zero_point: 0.0, low: -128.0, high: 127.0 }
            }
        }
    }

    /// The range of a step size, which [`Codes::grid`] gives back: symmetric where the least value is below 0, so that the
    /// zero point is 0 or 128, else from 0 on.
    pub(crate) fn range_of_step(self, step: f32, least: f32) -> Range {
        match self {
            Codes::Uint8 if least >= 0.0 => Range::new(0.0, 255.0 * step),
            Codes::Uint8 => Range::new(-128.0 * step, 127.0 * step),
            Codes::Int8 => Range::new(-127.0 * step, 127.0 * step),
        }
    }

    /// The largest code of a value, less its zero point, in [`Codes::range_of_step`].
    pub(crate) fn largest(self, least: f32) -> f64 {
        if self == Codes::Uint8 && least >= 0.0 { 255.0 } else { 127.0 }
    }

    /// The scale of a range as a parameter, beside its zero point as a constant.
    pub(super) fn learned(self, b: &mut Builder, range: Range) -> Result<Parameters, PassError> {
        let grid = self.grid(range);
        let scale = step_size::parameter(b, Tensor::scalar(DType::F32, grid.scale))?;
        let zero_point = match self {
            Codes::Uint8 => Some(b.scalar(DType::U8, grid.zero_point)?),
            Codes::Int8 => None,
        };
        Ok(Parameters { scale, zero_point })
    }

    /// [`Codes::grid`] of a range that the graph holds, in the graph: `low` is at most 0, `high` at least. In training,
    /// symmetric codes leave -128 out, so that products run on them.
    pub(super) fn parameters(
        self,
        b: &mut Builder,
        [low, high]: [NodeId; 2],
        trained: bool,
    ) -> Result<Parameters, PassError> {
        let smallest = b.scalar(DType::F32, QuantizedRange::SMALLEST_SCALE)?;
        match self {
            Codes::Uint8 => {
                let span = b.binary("span", BinaryOp::Sub, high, low)?;
                let steps = b.scalar(DType::F32, 255.0)?;
                let step = b.binary("step", BinaryOp::Div, span, steps)?;
                let scale = b.binary("scale", BinaryOp::Max, step, smallest)?;
                let below = b.unary("below", UnaryOp::Neg, low)?;
                let place = b.binary("place", BinaryOp::Div, below, scale)?;
                let whole = b.unary("whole", UnaryOp::Round, place)?;
                let zero_point = b.cast("zero_point", whole, DType::U8)?;
                Ok(Parameters { scale, zero_point: Some(zero_point) })
            }
            Codes::Int8 => {
                let below = b.unary("below", UnaryOp::Neg, low)?;
                let amax = b.binary("amax", BinaryOp::Max, high, below)?;
                let steps = b.scalar(DType::F32, 127.0)?;
                let step = b.binary("step", BinaryOp::Div, amax, steps)?;
                let scale = b.binary("scale", BinaryOp::Max, step, smallest)?;
                let zero_point = if trained { None } else { Some(b.scalar(DType::I8, 0.0)?) };
                Ok(Parameters { scale, zero_point })
            }
        }
    }
}

impl std::str::FromStr for Codes {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        Codes::ALL.into_iter().find(|codes| codes.name() == text).ok_or(())
    }
}
