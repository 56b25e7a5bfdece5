//! Quantization, dequantization and the gradient that passes through.

use super::value::round_float;
use super::{Data, Rounding, Value};
use crate::{DType, Op};

/// The scale of each element: one for all, or one for each index along `axis`.
fn scales(axis: Option<usize>, shape: &[usize], scale: &Value) -> impl Iterator<Item = f64> {
    let scales = scale.data.floats().to_vec();
    let (size, inner) = match axis {
        None => (1, usize::MAX),
        Some(axis) => (shape[axis].max(1), shape[axis + 1..].iter().product::<usize>().max(1)),
    };
    (0_usize..).map(move |flat| scales[flat / inner % size])
}

/// Largest magnitude of the type; typed nodes have one.
fn range(dtype: DType) -> f64 {
    Op::quantized_max(dtype).unwrap_or(0.0)
}

pub(super) fn quantize(
    dtype: DType,
    axis: Option<usize>,
    rounding: Rounding,
    x: &Value,
    scale: &Value,
) -> Data {
    let max = range(dtype);
    let rounded = |(&x, scale): (&f64, f64)| {
        let quotient = round_float(x / scale, DType::F32, rounding);
        if scale == 0.0 || quotient.is_nan() {
            return 0;
        }
        quotient.round_ties_even().clamp(-max, max) as i64
    };
    Data::Int(x.data.floats().iter().zip(scales(axis, &x.shape, scale)).map(rounded).collect())
}

pub(super) fn dequantize(axis: Option<usize>, q: &Value, scale: &Value) -> Data {
    let scaled = q.data.ints().iter().zip(scales(axis, &q.shape, scale));
    Data::Float(scaled.map(|(&q, scale)| q as f64 * scale).collect())
}

pub(super) fn straight_through(
    dtype: DType,
    axis: Option<usize>,
    rounding: Rounding,
    x: &Value,
    dy: &Value,
    scale: &Value,
) -> Data {
    let reach = range(dtype) + 0.5;
    let both = x.data.floats().iter().zip(dy.data.floats());
    let passed = both.zip(scales(axis, &x.shape, scale)).map(|((&x, &dy), scale)| {
        let limit = round_float(reach * scale, DType::F32, rounding);
        if x.abs() <= limit { dy } else { 0.0 }
    });
    Data::Float(passed.collect())
}
