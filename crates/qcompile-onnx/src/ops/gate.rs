//! Gated activations.

use super::Results;
use crate::draft::Draft;
use crate::error::Obstacle;
use crate::node::OnnxNode;
use qcompile_ir::{BinaryOp, UnaryOp};

/// `a · sigmoid(alpha · a) · b`
pub(super) fn swi_glu(draft: &mut Draft, node: &OnnxNode) -> Results {
    let (a, b) = (node.input(0)?, node.input(1)?);
    if draft.ty(a) != draft.ty(b) {
        let (a, b) = (draft.ty(a), draft.ty(b));
        return Err(Obstacle::invalid(format!("the gate {a} for {b}")));
    }
    let alpha = node.attributes.float("alpha", 1.0)?;
    let scaled = draft.binary_scalar(BinaryOp::Mul, a, alpha)?;
    let open = draft.unary(UnaryOp::Sigmoid, scaled)?;
    let gate = draft.mul(a, open)?;
    Ok(vec![draft.mul(gate, b)?])
}
