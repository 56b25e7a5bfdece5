//! Gradients of products, pools and collectives.

use super::rules::{Site, not_differentiable};
use crate::PassError;
use crate::builder::Builder;
use qcompile_ir::{CollectiveOp, ConvGeometry, NodeId, Op, PoolGeometry};

type Gradient = Result<NodeId, PassError>;

/// `y = A B` gives `dA = dy Bᵀ` and `dB = Aᵀ dy`; where an operand is stored transposed, so is its gradient.
pub(super) fn matmul(
    b: &mut Builder<'_>,
    site: &Site,
    transpose_a: bool,
    transpose_b: bool,
) -> Gradient {
    let (left, right, dy) = (site.operands[0], site.operands[1], site.dy);
    let product = |transpose_a, transpose_b| Op::Matmul { transpose_a, transpose_b };
    match (site.position, transpose_a, transpose_b) {
        (0, false, _) => b.add("", product(false, !transpose_b), &[dy, right]),
        (0, true, _) => b.add("", product(transpose_b, true), &[right, dy]),
        (_, _, false) => b.add("", product(!transpose_a, false), &[left, dy]),
        (_, _, true) => b.add("", product(true, transpose_a), &[dy, left]),
    }
}

pub(super) fn conv2d(b: &mut Builder<'_>, site: &Site, geometry: ConvGeometry) -> Gradient {
    let (x, weight) = (site.operands[0], site.operands[1]);
    if site.position == 0 {
        b.add("", Op::Conv2dGradInput(geometry), &[site.dy, weight])
    } else {
        b.add("", Op::Conv2dGradWeight(geometry), &[x, site.dy])
    }
}

/// The gradient of the input is linear in `dy` and in the weight; so its own gradients are the convolution and the
/// gradient of the weight, with the gradient in the place of the input.
pub(super) fn conv2d_grad_input(
    b: &mut Builder<'_>,
    site: &Site,
    geometry: ConvGeometry,
) -> Gradient {
    let (dy, weight) = (site.operands[0], site.operands[1]);
    if site.position == 0 {
        b.add("", Op::Conv2d(geometry), &[site.dy, weight])
    } else {
        b.add("", Op::Conv2dGradWeight(geometry), &[site.dy, dy])
    }
}

pub(super) fn max_pool2d(b: &mut Builder<'_>, site: &Site, geometry: PoolGeometry) -> Gradient {
    b.add("", Op::MaxPool2dGrad(geometry), &[site.x(), site.dy])
}

pub(super) fn average_pool2d(b: &mut Builder<'_>, site: &Site, geometry: PoolGeometry) -> Gradient {
    b.add("", Op::AveragePool2dGrad(geometry), &[site.dy])
}

/// Gradients are those of the mean of the ranks' losses, held by each rank times the number of ranks; so the
/// gradient of a mean over ranks is the mean over ranks of the gradients, and that of a sum is the sum.
pub(super) fn all_reduce(b: &mut Builder<'_>, site: &Site, op: CollectiveOp) -> Gradient {
    match op {
        CollectiveOp::Sum | CollectiveOp::Mean => b.add("", Op::AllReduce(op), &[site.dy]),
        CollectiveOp::Max => Err(not_differentiable(b, site, "all_reduce max has no gradient")),
    }
}
