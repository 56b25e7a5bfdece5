//! Normalizations: compositions whose gradients are exact through `stop_gradient`. Statistics are computed in f32.

use super::Results;
use super::shape::as_matrix;
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::node::{OnnxNode, axes_of, axis_of};
use crate::tensor;
use qcompile_ir::{BinaryOp, CompareOp, DType, Dim, Op, PoolGeometry, ReduceOp, Shape, UnaryOp};

type Value = Result<ValueId, Obstacle>;

pub(super) fn softmax(draft: &mut Draft, node: &OnnxNode, op: Op) -> Results {
    let x = node.input(0)?;
    let rank = draft.rank(x);
    if node.opset < 13 {
        // Before opset 13 everything from the axis on is one distribution.
        let axis = axis_of(node.attributes.int("axis", 1)?, rank)?;
        if axis + 1 != rank {
            let dims = draft.dims(x).to_vec();
            let matrix = as_matrix(draft, x, axis)?;
            let result = draft.emit_wide(op, &[matrix])?;
            return Ok(vec![draft.reshape(result, &dims)?]);
        }
        return Ok(vec![draft.emit_wide(op, &[x])?]);
    }
    let axis = axis_of(node.attributes.int("axis", -1)?, rank)?;
    Ok(vec![along(draft, x, axis, op)?])
}

/// An op over the last axis, over another one.
pub(super) fn along(draft: &mut Draft, x: ValueId, axis: usize, op: Op) -> Value {
    let last = draft.rank(x) - 1;
    let moved = draft.move_axis(x, axis, last)?;
    let result = draft.emit_wide(op, &[moved])?;
    draft.move_axis(result, last, axis)
}

/// Statistics of a value over some of its axes, which stay with size 1.
pub(super) struct Moments {
    pub(super) mean: ValueId,
    pub(super) variance: ValueId,
    pub(super) centered: ValueId,
}

impl Moments {
    pub(super) fn of(draft: &mut Draft, x: ValueId, axes: &[usize]) -> Result<Moments, Obstacle> {
        let mean = draft.mean(x, axes)?;
        let centered = draft.sub(x, mean)?;
        // The derivative of the variance by the mean is zero: stopping it there is exact and saves a reduction.
        let fixed_mean = draft.unary(UnaryOp::StopGradient, mean)?;
        let deviation = draft.sub(x, fixed_mean)?;
        let squared = draft.mul(deviation, deviation)?;
        let variance = draft.mean(squared, axes)?;
        Ok(Moments { mean, variance, centered })
    }
}

/// `1 / sqrt(variance + epsilon)`.
pub(super) fn inverse_deviation(draft: &mut Draft, variance: ValueId, epsilon: f64) -> Value {
    let shifted = draft.binary_scalar(BinaryOp::Add, variance, epsilon)?;
    let deviation = draft.unary(UnaryOp::Sqrt, shifted)?;
    draft.unary(UnaryOp::Reciprocal, deviation)
}

/// The last axes from the attribute `axis` on.
fn last_axes(draft: &Draft, node: &OnnxNode, x: ValueId) -> Result<Vec<usize>, Obstacle> {
    let rank = draft.rank(x);
    Ok((axis_of(node.attributes.int("axis", -1)?, rank)?..rank).collect())
}

/// The element type that statistics are computed in.
fn stash_type(node: &OnnxNode) -> Result<DType, Obstacle> {
    let number = node.attributes.int("stash_type", 1)?;
    i32::try_from(number)
        .map_err(|_| Obstacle::invalid(format!("attribute stash_type is {number}")))
        .and_then(tensor::dtype)
        .and_then(|dtype| {
            let wrong = || Obstacle::invalid(format!("attribute stash_type is {number} ({dtype})"));
            dtype.is_float().then_some(dtype).ok_or_else(wrong)
        })
}

/// A value normalized over its last axes, times the scale, plus the bias, with what it was normalized by.
pub(super) struct Normalized {
    pub(super) y: ValueId,
    /// None if only the mean square was divided by.
    pub(super) mean: Option<ValueId>,
    pub(super) inverse: ValueId,
}

/// How to normalize over last axes.
pub(super) struct LastAxes {
    pub(super) axes: Vec<usize>,
    pub(super) epsilon: f64,
    pub(super) stash: DType,
    /// Whether the mean is subtracted first.
    pub(super) centered: bool,
}

impl LastAxes {
    fn read(draft: &Draft, node: &OnnxNode, centered: bool) -> Result<LastAxes, Obstacle> {
        Ok(LastAxes {
            axes: last_axes(draft, node, node.input(0)?)?,
            epsilon: node.attributes.float("epsilon", 1e-5)?,
            stash: stash_type(node)?,
            centered,
        })
    }

    pub(super) fn apply(
        &self,
        draft: &mut Draft,
        x: ValueId,
        scale: ValueId,
        bias: Option<ValueId>,
    ) -> Result<Normalized, Obstacle> {
        let dtype = draft.dtype(scale);
        let wide = draft.cast(x, self.stash)?;
        let (numerator, square, mean) = if self.centered {
            let moments = Moments::of(draft, wide, &self.axes)?;
            (moments.centered, moments.variance, Some(moments.mean))
        } else {
            let squared = draft.mul(wide, wide)?;
            (wide, draft.mean(squared, &self.axes)?, None)
        };
        let inverse = inverse_deviation(draft, square, self.epsilon)?;
        let normalized = draft.mul(numerator, inverse)?;
        let normalized = draft.cast(normalized, dtype)?;
        let mut y = draft.mul(normalized, scale)?;
        if let Some(bias) = bias {
            y = draft.add(y, bias)?;
        }
        if draft.dims(y) != draft.dims(x) {
            return Err(Obstacle::invalid("scale or bias do not broadcast to the input"));
        }
        Ok(Normalized { y, mean, inverse })
    }
}

pub(super) fn layer_normalization(draft: &mut Draft, node: &OnnxNode) -> Results {
    let how = LastAxes::read(draft, node, true)?;
    let result = how.apply(draft, node.input(0)?, node.input(1)?, node.optional(2))?;
    Ok([Some(result.y), result.mean, Some(result.inverse)].into_iter().flatten().collect())
}

/// Also `SimplifiedLayerNormalization`, which has the inverse deviation as its second result.
pub(super) fn rms_normalization(draft: &mut Draft, node: &OnnxNode) -> Results {
    let how = LastAxes::read(draft, node, false)?;
    let result = how.apply(draft, node.input(0)?, node.input(1)?, None)?;
    Ok(vec![result.y, result.inverse])
}

pub(super) fn instance_normalization(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.input(0)?;
    let rank = draft.rank(x);
    if rank < 3 {
        return Err(Obstacle::invalid(format!("{} has no spatial axes", draft.ty(x))));
    }
    let epsilon = node.attributes.float("epsilon", 1e-5)?;
    let dtype = draft.dtype(x);
    let last = draft.move_axis(x, 1, rank - 1)?;
    let last = draft.cast(last, DType::F32)?;
    let axes: Vec<usize> = (1..rank - 1).collect();
    let moments = Moments::of(draft, last, &axes)?;
    let inverse = inverse_deviation(draft, moments.variance, epsilon)?;
    let (scale, bias) = (node.input(1)?, node.input(2)?);
    let channels: [Dim; 1] = [draft.dims(x)[1]];
    if draft.dims(scale) != channels || draft.dims(bias) != channels {
        return Err(Obstacle::invalid(format!(
            "scale {} and bias {} for {} channels",
            draft.ty(scale),
            draft.ty(bias),
            channels[0]
        )));
    }
    let (scale, bias) = (draft.cast(scale, DType::F32)?, draft.cast(bias, DType::F32)?);
    let factor = draft.mul(inverse, scale)?;
    let scaled = draft.mul(moments.centered, factor)?;
    let shifted = draft.add(scaled, bias)?;
    let y = draft.cast(shifted, dtype)?;
    Ok(vec![draft.move_axis(y, rank - 1, 1)?])
}

pub(super) fn group_normalization(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.input(0)?;
    let dims = draft.dims(x).to_vec();
    let [batch, channels, ref places @ ..] = dims[..] else {
        return Err(Obstacle::invalid(format!("{} has no channels", draft.ty(x))));
    };
    let fixed = channels
        .as_fixed()
        .ok_or_else(|| Obstacle::batch("a number of channels that depends on the batch size"))?;
    let epsilon = node.attributes.float("epsilon", 1e-5)?;
    let stash = if node.opset >= 21 { stash_type(node)? } else { DType::F32 };
    let given = node.attributes.int("num_groups", 0)?;
    let groups = usize::try_from(given)
        .ok()
        .filter(|&groups| groups > 0 && fixed % groups == 0)
        .ok_or_else(|| Obstacle::invalid(format!("num_groups is {given} for {fixed} channels")))?;
    let mut grouped = vec![batch, Dim::fixed(groups), Dim::fixed(fixed / groups)];
    grouped.extend(places);
    let wide = draft.cast(x, stash)?;
    let wide = draft.reshape(wide, &grouped)?;
    let axes: Vec<usize> = (2..grouped.len()).collect();
    let moments = Moments::of(draft, wide, &axes)?;
    let inverse = inverse_deviation(draft, moments.variance, epsilon)?;
    let normalized = draft.mul(moments.centered, inverse)?;
    let dtype = draft.dtype(x);
    let mut y = draft.cast(normalized, dtype)?;
    // One number for each group before opset 21, for each channel since.
    let mut column = vec![Dim::ONE; grouped.len()];
    for (at, op) in [(1, BinaryOp::Mul), (2, BinaryOp::Add)] {
        let operand = node.input(at)?;
        column[1] = Dim::fixed(groups);
        column[2] = match draft.dims(operand) {
            [count] if *count == channels => grouped[2],
            [count] if *count == grouped[1] && node.opset < 21 => Dim::ONE,
            _ => {
                return Err(Obstacle::invalid(format!(
                    "input {at} is {} for {fixed} channels in {groups} groups",
                    draft.ty(operand)
                )));
            }
        };
        let operand = draft.reshape(operand, &column)?;
        y = draft.binary(op, y, operand)?;
    }
    Ok(vec![draft.reshape(y, &dims)?])
}

/// By the sum of magnitudes or the root of the sum of squares; where that is 0, the result is.
pub(super) fn lp_normalization(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.input(0)?;
    let axis = axis_of(node.attributes.int("axis", -1)?, draft.rank(x))?;
    let norm = match node.attributes.int("p", 2)? {
        1 => {
            let magnitudes = draft.unary(UnaryOp::Abs, x)?;
            draft.reduce(ReduceOp::Sum, magnitudes, &[axis])?
        }
        2 => {
            let squares = draft.mul(x, x)?;
            let sum = draft.reduce(ReduceOp::Sum, squares, &[axis])?;
            draft.root(sum)?
        }
        other => return Err(Obstacle::invalid(format!("attribute p is {other}, not 1 or 2"))),
    };
    let dtype = draft.dtype(x);
    let (zero, one) = (draft.scalar(dtype, 0.0), draft.scalar(dtype, 1.0));
    let null = draft.compare(CompareOp::Equal, norm, zero)?;
    let divisor = draft.select(null, one, norm)?;
    Ok(vec![draft.binary(BinaryOp::Div, x, divisor)?])
}

/// `x / (bias + alpha / size · Σ x²)^beta`, where the sum is over channels near by: an average over a window of the
/// channels as heights, with everything after them as channels.
pub(super) fn lrn(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.input(0)?;
    let alpha = node.attributes.float("alpha", 1e-4)?;
    let beta = node.attributes.float("beta", 0.75)?;
    let bias = node.attributes.float("bias", 1.0)?;
    let given = node.attributes.int("size", 0)?;
    let size = usize::try_from(given)
        .ok()
        .filter(|&size| size > 0)
        .ok_or_else(|| Obstacle::invalid(format!("attribute size is {given}")))?;
    let dims = draft.dims(x).to_vec();
    let [batch, channels, ref places @ ..] = dims[..] else {
        return Err(Obstacle::invalid(format!("{} has no channels", draft.ty(x))));
    };
    let places = Shape(places.to_vec()).elements().and_then(Dim::as_fixed);
    let (Some(count), Some(places)) = (channels.as_fixed(), places) else {
        return Err(Obstacle::batch("channels or places that depend on the batch size"));
    };
    // No window reaches further than all channels.
    let reach = |half: usize| half.min(count.saturating_sub(1));
    let (low, high) = (reach((size - 1) / 2), reach(size / 2));
    let square = draft.mul(x, x)?;
    let rows = draft.reshape(square, &[batch, channels, Dim::ONE, Dim::fixed(places)])?;
    let window = PoolGeometry {
        input: [count, 1],
        kernel: [low + high + 1, 1],
        strides: [1, 1],
        pads: [low, 0, high, 0],
        dilations: [1, 1],
        count_include_pad: true,
    };
    let average = draft.emit_wide(Op::AveragePool2d(window), &[rows])?;
    let average = draft.reshape(average, &dims)?;
    #[allow(clippy::cast_precision_loss, reason = "numbers of channels")]
    let factor = alpha * window.kernel[0] as f64 / size as f64;
    let scaled = draft.binary_scalar(BinaryOp::Mul, average, factor)?;
    let shifted = draft.binary_scalar(BinaryOp::Add, scaled, bias)?;
    let power = draft.binary_scalar(BinaryOp::Pow, shifted, beta)?;
    Ok(vec![draft.binary(BinaryOp::Div, x, power)?])
}

/// `(x - mean) / (deviation + 1e-9)`.
pub(super) fn mean_variance_normalization(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.input(0)?;
    let axes = axes_of(node.attributes.ints("axes")?.unwrap_or(&[0, 2, 3]), draft.rank(x))?;
    let dtype = draft.dtype(x);
    let wide = draft.cast(x, DType::F32)?;
    let moments = Moments::of(draft, wide, &axes)?;
    let deviation = draft.root(moments.variance)?;
    let divisor = draft.binary_scalar(BinaryOp::Add, deviation, 1e-9)?;
    let y = draft.binary(BinaryOp::Div, moments.centered, divisor)?;
    Ok(vec![draft.cast(y, dtype)?])
}
