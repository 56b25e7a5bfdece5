//! Gradients of ops that move elements.

use super::rules::Site;
use crate::PassError;
use crate::builder::Builder;
use qcompile_ir::{Dim, NodeId, Op};

type Gradient = Result<NodeId, PassError>;

pub(super) fn reshape(b: &mut Builder<'_>, site: &Site) -> Gradient {
    let shape = b.shape(site.x());
    b.reshape("", site.dy, shape)
}

pub(super) fn transpose(b: &mut Builder<'_>, site: &Site, permutation: &[usize]) -> Gradient {
    let mut inverse = vec![0; permutation.len()];
    for (axis, &from) in permutation.iter().enumerate() {
        inverse[from] = axis;
    }
    b.add("", Op::Transpose(inverse), &[site.dy])
}

/// Sums over the axes that were repeated.
pub(super) fn broadcast(b: &mut Builder<'_>, site: &Site) -> Gradient {
    let (from, to) = (b.shape(site.x()), b.shape(site.y));
    let new = to.rank() - from.rank();
    let axes = (0..to.rank())
        .filter(|&axis| axis < new || (from.0[axis - new] == Dim::ONE && to.0[axis] != Dim::ONE))
        .collect();
    let suffix = if new == 0 { "" } else { "sum" };
    let sum = b.sum(suffix, site.dy, axes)?;
    b.reshape("", sum, from)
}

fn size(b: &Builder<'_>, id: NodeId, axis: usize) -> usize {
    b.graph.ty(id).shape.0[axis].scale
}

/// Puts the gradient back where the slice took from, with zeros between.
pub(super) fn slice(
    b: &mut Builder<'_>,
    site: &Site,
    axis: usize,
    start: usize,
    step: usize,
) -> Gradient {
    let (taken, all) = (size(b, site.y, axis), size(b, site.x(), axis));
    if taken == 0 {
        return b.splat_like("", site.x(), 0.0);
    }
    let reach = start + (taken - 1) * step + 1;
    let op = Op::Pad { axis, low: start, high: all - reach, interior: step - 1, value: 0.0 };
    b.add("", op, &[site.dy])
}

/// Takes the gradient of the elements that were padded.
pub(super) fn pad(
    b: &mut Builder<'_>,
    site: &Site,
    axis: usize,
    low: usize,
    interior: usize,
) -> Gradient {
    let inner = size(b, site.x(), axis);
    if inner == 0 {
        return b.splat_like("", site.x(), 0.0);
    }
    let end = low + (inner - 1) * (interior + 1) + 1;
    b.add("", Op::Slice { axis, start: low, end, step: interior + 1 }, &[site.dy])
}

pub(super) fn concat(b: &mut Builder<'_>, site: &Site, axis: usize) -> Gradient {
    let start: usize =
        site.operands[..site.position].iter().map(|&operand| size(b, operand, axis)).sum();
    let end = start + size(b, site.x(), axis);
    b.add("", Op::Slice { axis, start, end, step: 1 }, &[site.dy])
}
