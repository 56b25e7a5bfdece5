//! Gradients of ops that pick and place rows by index.

use super::rules::Site;
use crate::PassError;
use crate::builder::Builder;
use qcompile_ir::{BinaryOp, CompareOp, Dim, NodeId, Op, ScatterOp};

type Gradient = Result<NodeId, PassError>;

pub(super) fn gather(b: &mut Builder<'_>, site: &Site) -> Gradient {
    let rows = b.shape(site.x()).0[0];
    b.add("", Op::Scatter { op: ScatterOp::Add, rows }, &[site.operands[1], site.dy])
}

pub(super) fn scatter(b: &mut Builder<'_>, site: &Site, op: ScatterOp, rows: Dim) -> Gradient {
    match op {
        ScatterOp::Add => b.add("", Op::Gather, &[site.dy, site.operands[0]]),
        ScatterOp::Mul => scatter_mul(b, site, rows),
        ScatterOp::Max => scatter_max(b, site, rows),
    }
}

/// `dy` times the product of the others of the row, which takes care where some are 0.
fn scatter_mul(b: &mut Builder<'_>, site: &Site, rows: Dim) -> Gradient {
    let [indices, x] = [site.operands[0], site.x()];
    let ty = b.ty(x);
    let (zero, one) = (b.splat("zero", &ty, 0.0)?, b.splat("one", &ty, 1.0)?);
    let is_zero = b.compare("is_zero", CompareOp::Equal, x, zero)?;
    let factor = b.select("factor", is_zero, one, x)?;
    let product = b.add("product", Op::Scatter { op: ScatterOp::Mul, rows }, &[indices, factor])?;
    let flags = b.cast("flags", is_zero, ty.dtype)?;
    let zeros = b.add("zeros", Op::Scatter { op: ScatterOp::Add, rows }, &[indices, flags])?;
    let row = b.binary("row", BinaryOp::Mul, site.dy, product)?;
    let row = b.add("spread", Op::Gather, &[row, indices])?;
    let zeros = b.add("zeros.spread", Op::Gather, &[zeros, indices])?;
    // The zeros among the others are those of the row without itself.
    let others = b.binary("others", BinaryOp::Sub, zeros, flags)?;
    let none = b.compare("none", CompareOp::Equal, others, zero)?;
    let share = b.binary("share", BinaryOp::Div, row, factor)?;
    b.select("", none, share, zero)
}

/// Equal maxima share the gradient evenly, as those of `reduce_max` do.
fn scatter_max(b: &mut Builder<'_>, site: &Site, rows: Dim) -> Gradient {
    let [indices, x] = [site.operands[0], site.x()];
    let maximum = b.add("maximum", Op::Gather, &[site.y, indices])?;
    let hit = b.compare("hit", CompareOp::Equal, x, maximum)?;
    let ones = b.cast("ones", hit, b.graph.ty(x).dtype)?;
    let count = b.add("count", Op::Scatter { op: ScatterOp::Add, rows }, &[indices, ones])?;
    let (dy, count) = (
        b.add("dy", Op::Gather, &[site.dy, indices])?,
        b.add("count.spread", Op::Gather, &[count, indices])?,
    );
    let share = b.binary("share", BinaryOp::Div, dy, count)?;
    b.where_or_zero("", hit, share)
}
