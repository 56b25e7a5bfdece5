//! Gradients of reductions and of what normalizes by them.

use super::rules::{Site, not_differentiable};
use crate::PassError;
use crate::builder::Builder;
use qcompile_ir::{
    AttentionOperand, BinaryOp, CompareOp, DType, GradientRounding, NodeId, Op, ReduceOp, UnaryOp,
};

type Gradient = Result<NodeId, PassError>;

pub(super) fn reduce(b: &mut Builder<'_>, site: &Site, op: ReduceOp) -> Gradient {
    let x = site.x();
    let shape = b.shape(x);
    match op {
        ReduceOp::Sum => b.broadcast("", site.dy, shape),
        ReduceOp::Max => {
            // Equal maxima share the gradient evenly, as torch.amax does.
            let Op::Reduce { axes, .. } = b.graph.op(site.y).clone() else {
                return Ok(site.dy);
            };
            let dtype = b.graph.ty(site.dy).dtype;
            let y = b.broadcast("maximum", site.y, shape.clone())?;
            let hit = b.compare("hit", CompareOp::Equal, x, y)?;
            let ones = b.cast("ones", hit, dtype)?;
            let count = b.sum("count", ones, axes)?;
            let share = b.binary("share", BinaryOp::Div, site.dy, count)?;
            let spread = b.broadcast("spread", share, shape)?;
            b.where_or_zero("", hit, spread)
        }
    }
}

/// `dx = y · (dy - Σ dy · y)`
pub(super) fn softmax(b: &mut Builder<'_>, site: &Site) -> Gradient {
    let shape = b.shape(site.y);
    let product = b.binary("product", BinaryOp::Mul, site.dy, site.y)?;
    let sum = b.sum("sum", product, vec![shape.rank() - 1])?;
    let spread = b.broadcast("spread", sum, shape)?;
    let centered = b.binary("centered", BinaryOp::Sub, site.dy, spread)?;
    b.binary("", BinaryOp::Mul, site.y, centered)
}

/// `dx = dy - exp(y) · Σ dy`
pub(super) fn log_softmax(b: &mut Builder<'_>, site: &Site) -> Gradient {
    let shape = b.shape(site.y);
    let sum = b.sum("sum", site.dy, vec![shape.rank() - 1])?;
    let spread = b.broadcast("spread", sum, shape)?;
    let softmax = b.unary("softmax", UnaryOp::Exp, site.y)?;
    let product = b.binary("product", BinaryOp::Mul, softmax, spread)?;
    b.binary("", BinaryOp::Sub, site.dy, product)
}

/// The mask has none: an attention whose mask is learned is left as its products. What the forward products run in says
/// nothing of these: the passes that round them say it.
pub(super) fn attention(b: &mut Builder<'_>, site: &Site, scale: f32, causal: bool) -> Gradient {
    let Some(&of) = AttentionOperand::ALL.get(site.position) else {
        return Err(not_differentiable(b, site, "the mask of an attention has no gradient"));
    };
    let mut operands = site.operands.clone();
    operands.push(site.dy);
    let rounding = GradientRounding::Nearest;
    let op = Op::AttentionGrad { of, scale, causal, products: DType::F32, rounding };
    b.add("", op, &operands)
}

pub(super) fn cross_entropy(b: &mut Builder<'_>, site: &Site) -> Gradient {
    b.add("", Op::CrossEntropyGrad, &[site.operands[0], site.operands[1], site.dy])
}
