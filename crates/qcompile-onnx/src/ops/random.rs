//! Operators that draw random numbers. What they draw is a function of a seed, the step and the place in the batch.

use super::Results;
use super::indexing::Value;
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::node::{OnnxNode, dims_from};
use crate::tensor;
use qcompile_ir::{BinaryOp, CompareOp, DType, Dim, Op, Shape, UnaryOp, fnv1a};

/// The seed of a node: its attribute, or one that belongs to its name.
fn seed(node: &OnnxNode) -> Result<u64, Obstacle> {
    let given = match node.op {
        "Dropout" => node.attributes.optional_int("seed")?.map(i64::cast_unsigned),
        _ => node.attributes.optional_float("seed")?.map(f64::to_bits),
    };
    Ok(given.unwrap_or_else(|| fnv1a(node.base.bytes())) >> 1)
}

/// Uniform numbers in [0, 1).
fn uniform(draft: &mut Draft, seed: u64, dims: &[Dim]) -> Value {
    let step = draft.step()?;
    draft.emit(Op::Random { seed, shape: Shape(dims.to_vec()) }, &[step])
}

pub(super) fn dropout(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.input(0)?;
    let ratio_attribute = node.attributes.float("ratio", 0.5)?;
    let training = match node.constant(draft, 2)? {
        Some(known) => known.len() == Some(1) && known.get(0).as_int() == Some(1),
        None => false,
    };
    let ratio = if node.opset >= 12 {
        node.number_input(draft, 1)?.unwrap_or(0.5)
    } else {
        ratio_attribute
    };
    if !(0.0..1.0).contains(&ratio) {
        return Err(Obstacle::invalid(format!("a ratio of {ratio}")));
    }
    let seed = seed(node)?;
    let dims = draft.dims(x).to_vec();
    if !training || ratio == 0.0 {
        let mut results = vec![x];
        if node.wants(1) {
            let all = draft.scalar(DType::Bool, 1.0);
            results.push(draft.broadcast(all, &dims)?);
        }
        return Ok(results);
    }
    let numbers = uniform(draft, seed, &dims)?;
    let training = draft.emit(Op::Training, &[])?;
    let still = draft.unary(UnaryOp::Not, training)?;
    let border = draft.scalar(DType::F32, ratio);
    let drawn = draft.compare(CompareOp::LessEqual, border, numbers)?;
    let kept = draft.binary(BinaryOp::Or, drawn, still)?;
    let dtype = draft.dtype(x);
    let (scale, one) = (draft.scalar(dtype, 1.0 / (1.0 - ratio)), draft.scalar(dtype, 1.0));
    let scale = draft.select(training, scale, one)?;
    let zero = draft.scalar(dtype, 0.0);
    let scaled = draft.mul(x, scale)?;
    Ok(vec![draft.select(kept, scaled, zero)?, kept])
}

/// The element type of the result: an attribute, or that of the operand, if there is one to be like.
fn dtype(draft: &Draft, node: &OnnxNode) -> Result<DType, Obstacle> {
    let dtype = match node.attributes.optional_int("dtype")? {
        Some(number) => tensor::dtype(i32::try_from(number).unwrap_or(0))?,
        None => node.optional(0).map_or(DType::F32, |x| draft.dtype(x)),
    };
    if dtype.is_float() || node.op == "Bernoulli" {
        Ok(dtype)
    } else {
        Err(Obstacle::invalid(format!("random numbers of {dtype}")))
    }
}

/// The shape of the result: an attribute, or that of the operand.
fn shape(draft: &Draft, node: &OnnxNode) -> Result<Vec<Dim>, Obstacle> {
    if let Some(x) = node.optional(0) {
        return Ok(draft.dims(x).to_vec());
    }
    let shape = node.attributes.ints("shape")?;
    let shape = shape.ok_or_else(|| Obstacle::invalid("attribute shape is missing"))?;
    dims_from(&shape.iter().map(|&size| size.into()).collect::<Vec<_>>())
}

/// `RandomUniform` and `RandomUniformLike`.
pub(super) fn random_uniform(draft: &mut Draft, node: &OnnxNode) -> Results {
    let (low, high) = (node.attributes.float("low", 0.0)?, node.attributes.float("high", 1.0)?);
    let (dims, dtype) = (shape(draft, node)?, dtype(draft, node)?);
    let numbers = uniform(draft, seed(node)?, &dims)?;
    let wide = draft.binary_scalar(BinaryOp::Mul, numbers, high - low)?;
    let moved = draft.binary_scalar(BinaryOp::Add, wide, low)?;
    Ok(vec![draft.cast(moved, dtype)?])
}

/// `RandomNormal` and `RandomNormalLike`, by the transform of Box and Muller.
pub(super) fn random_normal(draft: &mut Draft, node: &OnnxNode) -> Results {
    let (mean, scale) = (node.attributes.float("mean", 0.0)?, node.attributes.float("scale", 1.0)?);
    let (dims, dtype) = (shape(draft, node)?, dtype(draft, node)?);
    let seed = seed(node)?;
    let (radius, angle) = (uniform(draft, seed, &dims)?, uniform(draft, !seed >> 1, &dims)?);
    // 1 - u is never 0, so its logarithm is finite.
    let one = draft.scalar(DType::F32, 1.0);
    let part = draft.sub(one, radius)?;
    let log = draft.unary(UnaryOp::Log, part)?;
    let square = draft.binary_scalar(BinaryOp::Mul, log, -2.0)?;
    let radius = draft.unary(UnaryOp::Sqrt, square)?;
    let angle = draft.binary_scalar(BinaryOp::Mul, angle, std::f64::consts::TAU)?;
    let turned = draft.unary(UnaryOp::Cos, angle)?;
    let normal = draft.mul(radius, turned)?;
    let wide = draft.binary_scalar(BinaryOp::Mul, normal, scale)?;
    let moved = draft.binary_scalar(BinaryOp::Add, wide, mean)?;
    Ok(vec![draft.cast(moved, dtype)?])
}

/// 1 with the probability that the operand says, else 0.
pub(super) fn bernoulli(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x: ValueId = node.input(0)?;
    let (dims, dtype) = (draft.dims(x).to_vec(), dtype(draft, node)?);
    let numbers = uniform(draft, seed(node)?, &dims)?;
    let probability = draft.cast(x, DType::F32)?;
    let drawn = draft.compare(CompareOp::Less, numbers, probability)?;
    Ok(vec![draft.cast(drawn, dtype)?])
}
