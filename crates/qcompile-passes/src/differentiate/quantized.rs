//! Straight-through estimation: rounding has gradient one within its range and zero beyond it
//! (Bengio et al. 2013, arXiv:1308.3432; Jacob et al. 2018, arXiv:1712.05877).
//!
//! The unit is `dequantize(quantize(x, s), s)`. The gradient of the integer value in between is held in units of
//! the dequantized value, so `dequantize` hands it on unchanged and `quantize` cuts what was clamped.
//! Scales have no gradient.

use super::rules::{Site, not_differentiable};
use crate::PassError;
use crate::builder::Builder;
use qcompile_ir::{DType, NodeId, Op};

type Gradient = Result<NodeId, PassError>;

pub(super) fn quantize(
    b: &mut Builder<'_>,
    site: &Site,
    dtype: DType,
    axis: Option<usize>,
) -> Gradient {
    let (x, parameters) = (site.operands[0], &site.operands[1..]);
    let wanted = b.graph.ty(x).dtype;
    let dy = b.cast("cast", site.dy, wanted)?;
    let operands = [&[x, dy], parameters].concat();
    b.add("", Op::StraightThrough { dtype, axis }, &operands)
}

pub(super) fn dequantize(b: &mut Builder<'_>, site: &Site, axis: Option<usize>) -> Gradient {
    let (q, parameters) = (site.operands[0], &site.operands[1..]);
    let pair = matches!(b.graph.op(q), Op::Quantize { axis: at, .. } if *at == axis)
        && b.graph.operands(q)[1..] == *parameters;
    if pair {
        Ok(site.dy)
    } else {
        let reason = "dequantize has a gradient only right after quantize with the same scale and zero point";
        Err(not_differentiable(b, site, reason))
    }
}
