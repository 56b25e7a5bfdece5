//! Operators on truth values and on bits, and tests of floats.

use super::Results;
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::node::OnnxNode;
use qcompile_ir::{BinaryOp, CompareOp, DType, UnaryOp};

/// `And` and `Or`, which take truth values.
pub(super) fn logical(draft: &mut Draft, node: &OnnxNode, op: BinaryOp) -> Results {
    let (a, b) = (node.input(0)?, node.input(1)?);
    for operand in [a, b] {
        if draft.dtype(operand) != DType::Bool {
            return Err(Obstacle::invalid(format!("{} is not bool", draft.ty(operand))));
        }
    }
    Ok(vec![draft.binary(op, a, b)?])
}

pub(super) fn xor(draft: &mut Draft, node: &OnnxNode) -> Results {
    let equal = draft.compare(CompareOp::Equal, node.input(0)?, node.input(1)?)?;
    Ok(vec![draft.unary(UnaryOp::Not, equal)?])
}

/// Rejects what has no bits to work on.
fn integers(draft: &Draft, node: &OnnxNode) -> Result<[ValueId; 2], Obstacle> {
    let operands = [node.input(0)?, node.input(1)?];
    for operand in operands {
        if draft.dtype(operand).is_float() || draft.dtype(operand) == DType::Bool {
            return Err(Obstacle::invalid(format!("{} is not of integers", draft.ty(operand))));
        }
    }
    Ok(operands)
}

pub(super) fn bitwise(draft: &mut Draft, node: &OnnxNode, op: BinaryOp) -> Results {
    let [a, b] = integers(draft, node)?;
    Ok(vec![draft.binary(op, a, b)?])
}

/// The bits of either, less those of both.
pub(super) fn bitwise_xor(draft: &mut Draft, node: &OnnxNode) -> Results {
    let [a, b] = integers(draft, node)?;
    let (either, both) = (draft.binary(BinaryOp::Or, a, b)?, draft.binary(BinaryOp::And, a, b)?);
    Ok(vec![draft.sub(either, both)?])
}

pub(super) fn bitwise_not(draft: &mut Draft, node: &OnnxNode) -> Results {
    Ok(vec![draft.complement(node.input(0)?)?])
}

/// A product with or a quotient by a power of two. The power is 0 where every bit leaves (and for a negative amount),
/// and so are both; signed numbers keep their sign to the right, rounding down.
pub(super) fn bit_shift(draft: &mut Draft, node: &OnnxNode) -> Results {
    let [x, amount] = integers(draft, node)?;
    let dtype = draft.dtype(x);
    let right = match node.attributes.string("direction", "")?.as_str() {
        "LEFT" => false,
        "RIGHT" => true,
        other => return Err(Obstacle::invalid(format!("attribute direction is `{other}`"))),
    };
    let two = draft.scalar(dtype, 2.0);
    let power = draft.binary(BinaryOp::Pow, two, amount)?;
    if !right {
        return Ok(vec![draft.mul(x, power)?]);
    }
    let quotient = draft.binary(BinaryOp::Div, x, power)?;
    if dtype == DType::U8 {
        return Ok(vec![quotient]);
    }
    let complement = draft.complement(x)?;
    let below = draft.binary(BinaryOp::Div, complement, power)?;
    let below = draft.complement(below)?;
    let zero = draft.scalar(dtype, 0.0);
    let negative = draft.compare(CompareOp::Less, x, zero)?;
    Ok(vec![draft.select(negative, below, quotient)?])
}

/// Only a NaN differs from itself.
pub(super) fn is_nan(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = super::elementwise::float_input(draft, node, 0)?;
    let equal = draft.compare(CompareOp::Equal, x, x)?;
    Ok(vec![draft.unary(UnaryOp::Not, equal)?])
}

pub(super) fn is_inf(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = super::elementwise::float_input(draft, node, 0)?;
    let negative = node.attributes.flag("detect_negative", true)?;
    let positive = node.attributes.flag("detect_positive", true)?;
    let (x, infinity) = match (negative, positive) {
        (true, true) => (draft.unary(UnaryOp::Abs, x)?, f64::INFINITY),
        (false, true) => (x, f64::INFINITY),
        (true, false) => (x, f64::NEG_INFINITY),
        (false, false) => {
            let (none, dims) = (draft.scalar(DType::Bool, 0.0), draft.dims(x).to_vec());
            return Ok(vec![draft.broadcast(none, &dims)?]);
        }
    };
    let infinity = draft.scalar(draft.dtype(x), infinity);
    Ok(vec![draft.compare(CompareOp::Equal, x, infinity)?])
}
