//! Quantization, dequantization and the gradient that passes through.

use super::value::round_float;
use super::{Data, Rounding, Value};
use crate::{DType, QuantizedRange};

/// The scale and zero point of each element: one for all, or one for each index along an axis.
pub(super) struct Parameters<'a> {
    scales: &'a [f64],
    zero_points: Option<&'a [i64]>,
    /// How many there are, and how many elements that follow one another share one.
    size: usize,
    inner: usize,
}

impl<'a> Parameters<'a> {
    pub(super) fn new(
        axis: Option<usize>,
        x: &Value,
        scale: &'a Value,
        zero_point: Option<&'a Value>,
    ) -> Parameters<'a> {
        let (size, inner) = match axis {
            None => (1, usize::MAX),
            Some(axis) => {
                (x.shape[axis].max(1), x.shape[axis + 1..].iter().product::<usize>().max(1))
            }
        };
        let zero_points = zero_point.map(|zero_point| zero_point.data.ints());
        Parameters { scales: scale.data.floats(), zero_points, size, inner }
    }

    /// Those of element `flat`.
    fn at(&self, flat: usize) -> (f64, i64) {
        let at = flat / self.inner % self.size;
        (self.scales[at], self.zero_points.map_or(0, |zero_points| zero_points[at]))
    }

    /// The codes of `dtype`; typed nodes have some.
    fn range(&self, dtype: DType) -> QuantizedRange {
        let none = QuantizedRange { low: 0.0, high: 0.0, half_step: 0.0 };
        QuantizedRange::of(dtype, self.zero_points.is_some()).unwrap_or(none)
    }
}

pub(super) fn quantize(
    dtype: DType,
    rounding: Rounding,
    x: &Value,
    parameters: &Parameters<'_>,
) -> Data {
    let range = parameters.range(dtype);
    let clamped = |(flat, &x): (usize, &f64)| {
        let (scale, zero_point) = parameters.at(flat);
        let range = range.less(zero_point as f32);
        let quotient = round_float(x / scale, DType::F32, rounding);
        let clamped = quotient.clamp(f64::from(range.low), f64::from(range.high));
        (if scale == 0.0 { 0.0 } else { clamped }, zero_point)
    };
    let clamped = x.data.floats().iter().enumerate().map(clamped);
    if dtype.is_float() {
        // Rounded even where floats stay exact: it is what the op does.
        return Data::Float(clamped.map(|(x, _)| round_float(x, dtype, Rounding::PerOp)).collect());
    }
    // NaN becomes 0.
    Data::Int(clamped.map(|(x, zero_point)| x.round_ties_even() as i64 + zero_point).collect())
}

pub(super) fn dequantize(q: &Value, parameters: &Parameters<'_>) -> Data {
    let scaled = |(flat, q): (usize, f64)| {
        let (scale, zero_point) = parameters.at(flat);
        // Exact for every type but i32, which becomes f32 first.
        f64::from((q - zero_point as f64) as f32) * scale
    };
    Data::Float(q.data.to_f64().into_iter().enumerate().map(scaled).collect())
}

pub(super) fn straight_through(
    dtype: DType,
    rounding: Rounding,
    x: &Value,
    dy: &Value,
    parameters: &Parameters<'_>,
) -> Data {
    let range = parameters.range(dtype);
    let both = x.data.floats().iter().zip(dy.data.floats());
    let passed = both.enumerate().map(|(flat, (&x, &dy))| {
        let (scale, zero_point) = parameters.at(flat);
        let range = range.less(zero_point as f32);
        let limit = |code: f32| round_float(f64::from(code) * scale, DType::F32, rounding);
        let inside =
            limit(range.low - range.half_step) <= x && x <= limit(range.high + range.half_step);
        if inside { dy } else { 0.0 }
    });
    Data::Float(passed.collect())
}
