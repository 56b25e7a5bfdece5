//! Normalizations: compositions whose gradients are exact through `stop_gradient`.

use super::Results;
use super::shape::as_matrix;
use crate::BatchNorm;
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::node::{OnnxNode, axis_of};
use qcompile_ir::{BinaryOp, Dim, Op, Region, UnaryOp};

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
            let result = draft.emit(op, &[matrix])?;
            return Ok(vec![draft.reshape(result, &dims)?]);
        }
        return Ok(vec![draft.emit(op, &[x])?]);
    }
    let axis = axis_of(node.attributes.int("axis", -1)?, rank)?;
    let moved = draft.move_axis(x, axis, rank - 1)?;
    let result = draft.emit(op, &[moved])?;
    Ok(vec![draft.move_axis(result, rank - 1, axis)?])
}

/// Statistics of a value over some of its axes, which stay with size 1.
struct Moments {
    mean: ValueId,
    variance: ValueId,
    centered: ValueId,
}

impl Moments {
    fn of(draft: &mut Draft, x: ValueId, axes: &[usize]) -> Result<Moments, Obstacle> {
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
fn inverse_deviation(draft: &mut Draft, variance: ValueId, epsilon: f64) -> Value {
    let shifted = draft.binary_scalar(BinaryOp::Add, variance, epsilon)?;
    let deviation = draft.unary(UnaryOp::Sqrt, shifted)?;
    draft.unary(UnaryOp::Reciprocal, deviation)
}

pub(super) fn batch_normalization(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.input(0)?;
    let rank = draft.rank(x);
    let epsilon = node.attributes.float("epsilon", 1e-5)?;
    let momentum = node.attributes.float("momentum", 0.9)?;
    let declared = if node.opset >= 14 {
        node.attributes.flag("training_mode", false)?
    } else {
        node.outputs.len() > 1
    };
    if node.opset < 9 && !node.attributes.flag("spatial", true)? {
        return Err(Obstacle::unsupported("statistics per place (spatial = 0)"));
    }
    if rank < 2 {
        return Err(Obstacle::invalid(format!("{} has no channels", draft.ty(x))));
    }
    let channels = draft.dims(x)[1];
    let mut operands = [x; 4];
    for (at, operand) in operands.iter_mut().enumerate() {
        *operand = node.input(at + 1)?;
        if draft.dims(*operand) != [channels] {
            return Err(Obstacle::invalid(format!(
                "input {} is {} for {channels} channels",
                at + 1,
                draft.ty(*operand)
            )));
        }
    }
    let [scale, bias, mean, variance] = operands;
    let training = match node.batch_norm {
        BatchNorm::Model => declared,
        BatchNorm::Train => true,
        BatchNorm::Frozen => false,
    };
    if !training
        && (1..node.outputs.len()).any(|at| node.wants(at))
        && node.batch_norm == BatchNorm::Model
    {
        return Err(Obstacle::invalid("statistics as results outside training mode"));
    }
    let last = draft.move_axis(x, 1, rank - 1)?;
    if training {
        let statistics = [("running_mean", mean), ("running_var", variance)];
        return trained(draft, node, last, [scale, bias], statistics, [epsilon, momentum]);
    }
    let (mean, variance) = (draft.frozen(mean)?, draft.frozen(variance)?);
    let centered = draft.sub(last, mean)?;
    let inverse = inverse_deviation(draft, variance, epsilon)?;
    let factor = draft.mul(inverse, scale)?;
    let scaled = draft.mul(centered, factor)?;
    let shifted = draft.add(scaled, bias)?;
    let result = draft.move_axis(shifted, rank - 1, 1)?;
    // Frozen on request: the statistics are what they were.
    Ok(vec![result, mean, variance])
}

/// Normalization by the statistics of the batch, of a value whose channels come last.
fn trained(
    draft: &mut Draft,
    node: &OnnxNode,
    x: ValueId,
    [scale, bias]: [ValueId; 2],
    statistics: [(&str, ValueId); 2],
    [epsilon, momentum]: [f64; 2],
) -> Results {
    let rank = draft.rank(x);
    let axes: Vec<usize> = (0..rank - 1).collect();
    let moments = Moments::of(draft, x, &axes)?;
    let inverse = inverse_deviation(draft, moments.variance, epsilon)?;
    let channels = draft.dims(scale).to_vec();
    let inverse = draft.reshape(inverse, &channels)?;
    let factor = draft.mul(inverse, scale)?;
    let scaled = draft.mul(moments.centered, factor)?;
    let shifted = draft.add(scaled, bias)?;
    let mut results = vec![draft.move_axis(shifted, rank - 1, 1)?];
    for ((role, running), current) in statistics.into_iter().zip([moments.mean, moments.variance]) {
        let state = draft.state(running, &format!("{}.{role}", node.base))?;
        let next = updated(draft, state, current, momentum)?;
        draft.set_next(state, next);
        results.push(next);
    }
    if node.outputs.len() > 3 {
        // Opset 7 to 13 also give the statistics of the batch.
        let channels = draft.dims(bias).to_vec();
        results.push(draft.reshape(moments.mean, &channels)?);
        results.push(draft.reshape(moments.variance, &channels)?);
    }
    Ok(results)
}

/// `state · momentum + current · (1 - momentum)`, in the region of updates.
fn updated(draft: &mut Draft, state: ValueId, current: ValueId, momentum: f64) -> Value {
    let dims = draft.dims(state).to_vec();
    let dtype = draft.dtype(state);
    let mut factor = |value: f64| {
        let scalar = draft.scalar(dtype, value);
        draft.broadcast(scalar, &dims)
    };
    let (keep, take) = (factor(momentum)?, factor(1.0 - momentum)?);
    let reshape = Op::Reshape(qcompile_ir::Shape(dims));
    let mut current = draft.emit_in(Region::Update, reshape, &[current])?;
    if draft.dtype(current) != dtype {
        current = draft.emit_in(Region::Update, Op::Cast(dtype), &[current])?;
    }
    let kept = draft.emit_in(Region::Update, Op::Binary(BinaryOp::Mul), &[state, keep])?;
    let taken = draft.emit_in(Region::Update, Op::Binary(BinaryOp::Mul), &[current, take])?;
    draft.emit_in(Region::Update, Op::Binary(BinaryOp::Add), &[kept, taken])
}

/// The last axes from the attribute `axis` on.
fn last_axes(draft: &Draft, node: &OnnxNode, x: ValueId) -> Result<Vec<usize>, Obstacle> {
    let rank = draft.rank(x);
    Ok((axis_of(node.attributes.int("axis", -1)?, rank)?..rank).collect())
}

/// Rejects the computation of statistics in another type than float32.
fn check_stash(node: &OnnxNode) -> Result<(), Obstacle> {
    match node.attributes.int("stash_type", 1)? {
        1 => Ok(()),
        other => Err(Obstacle::unsupported(format!("stash_type {other}"))),
    }
}

pub(super) fn layer_normalization(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.input(0)?;
    let axes = last_axes(draft, node, x)?;
    let epsilon = node.attributes.float("epsilon", 1e-5)?;
    check_stash(node)?;
    let dtype = draft.dtype(x);
    let wide = draft.cast(x, qcompile_ir::DType::F32)?;
    let moments = Moments::of(draft, wide, &axes)?;
    let inverse = inverse_deviation(draft, moments.variance, epsilon)?;
    let normalized = draft.mul(moments.centered, inverse)?;
    let normalized = draft.cast(normalized, dtype)?;
    let mut result = draft.mul(normalized, node.input(1)?)?;
    if let Some(bias) = node.optional(2) {
        result = draft.add(result, bias)?;
    }
    if draft.dims(result) != draft.dims(x) {
        return Err(Obstacle::invalid("scale or bias do not broadcast to the input"));
    }
    Ok(vec![result, moments.mean, inverse])
}

pub(super) fn rms_normalization(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.input(0)?;
    let axes = last_axes(draft, node, x)?;
    let epsilon = node.attributes.float("epsilon", 1e-5)?;
    check_stash(node)?;
    let dtype = draft.dtype(x);
    let wide = draft.cast(x, qcompile_ir::DType::F32)?;
    let squared = draft.mul(wide, wide)?;
    let mean = draft.mean(squared, &axes)?;
    let inverse = inverse_deviation(draft, mean, epsilon)?;
    let normalized = draft.mul(wide, inverse)?;
    let normalized = draft.cast(normalized, dtype)?;
    Ok(vec![draft.mul(normalized, node.input(1)?)?])
}

pub(super) fn instance_normalization(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.input(0)?;
    let rank = draft.rank(x);
    if rank < 3 {
        return Err(Obstacle::invalid(format!("{} has no spatial axes", draft.ty(x))));
    }
    let epsilon = node.attributes.float("epsilon", 1e-5)?;
    let last = draft.move_axis(x, 1, rank - 1)?;
    let axes: Vec<usize> = (1..rank - 1).collect();
    let moments = Moments::of(draft, last, &axes)?;
    let inverse = inverse_deviation(draft, moments.variance, epsilon)?;
    let (scale, bias) = (node.input(1)?, node.input(2)?);
    let channels: [Dim; 1] = [draft.dims(x)[1]];
    if draft.dims(scale) != channels || draft.dims(bias) != channels {
        return Err(Obstacle::invalid("scale and bias have one number for each channel"));
    }
    let factor = draft.mul(inverse, scale)?;
    let scaled = draft.mul(moments.centered, factor)?;
    let shifted = draft.add(scaled, bias)?;
    Ok(vec![draft.move_axis(shifted, rank - 1, 1)?])
}
