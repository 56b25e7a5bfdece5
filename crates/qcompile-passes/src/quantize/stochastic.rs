//! Stochastic rounding as a composition of ops.

use crate::PassError;
use crate::builder::Builder;
use qcompile_ir::{BinaryOp, DType, Graph, NodeId, Op, Region, Shape, UnaryOp};

/// Where the numbers of [`quantize_stochastically`] come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draws {
    /// What tells one value's numbers from another's.
    pub seed: u64,
    /// The number of the step, `i64[]`.
    pub step: NodeId,
}

/// `x` rounded stochastically to codes of `dtype` by `scale` (one, or one for each index of `axis`): up with a
/// probability that is the distance from the code below, so that `dequantize` of it is `x` on average (Gupta et al. 2015,
/// arXiv:1502.02551).
///
/// It is rounding to nearest of `x + (u - 1/2) · scale`, with `u` uniform in [0, 1) from [`Op::Random`]: a function of
/// seed, step and place in the whole batch, so a step can be replayed, and threads and workers change nothing. Only
/// integer types have steps of one size, for which this holds. The noise has no gradient.
///
/// # Errors
/// [`PassError::Graph`] if the scale does not fit.
pub fn quantize_stochastically(
    graph: &mut Graph,
    x: NodeId,
    scale: NodeId,
    axis: Option<usize>,
    dtype: DType,
    draws: Draws,
    region: Region,
) -> Result<NodeId, PassError> {
    let name = graph.node(x).name.as_str().to_owned();
    let mut b = Builder::new(graph, region, &name);
    let ty = b.ty(x);
    let random = Op::Random { seed: draws.seed, shape: ty.shape.clone() };
    let u = b.add("draws", random, &[draws.step])?;
    let half = b.splat_like("half", u, 0.5)?;
    let centred = b.binary("centred", BinaryOp::Sub, u, half)?;
    let mut column = Shape(vec![1.into(); ty.shape.rank()]);
    if let Some(axis) = axis.filter(|&axis| axis < ty.shape.rank()) {
        column.0[axis] = ty.shape.0[axis];
    }
    let steps = b.reshape("steps", scale, column)?;
    let steps = b.broadcast("steps.all", steps, ty.shape.clone())?;
    let noise = b.binary("noise", BinaryOp::Mul, centred, steps)?;
    let noise = b.unary("noise.fixed", UnaryOp::StopGradient, noise)?;
    let noise = b.cast("noise.cast", noise, ty.dtype)?;
    let moved = b.binary("moved", BinaryOp::Add, x, noise)?;
    b.add("q", Op::Quantize { dtype, axis }, &[moved, scale])
}
