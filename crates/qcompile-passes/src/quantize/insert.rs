//! Puts `quantize`, `dequantize` pairs before the operands of a product, with the scales they need.

use super::layer::{Layer, unquantized};
use crate::PassError;
use crate::builder::Builder;
use crate::simplify::splat;
use qcompile_ir::{BinaryOp, DType, Graph, NodeId, Op, ReduceOp, Region, Shape, UnaryOp};
use std::collections::BTreeMap;

/// Largest magnitude of the symmetric range of i8.
const I8_MAX: f64 = 127.0;

/// The smallest scale: an all-zero tensor quantizes to zeros instead of dividing zero by zero.
const SMALLEST_SCALE: f64 = 1e-30;

/// Rounded values inserted so far by the value and the axis of its scale, so that none is rounded twice.
#[derive(Debug, Default)]
pub(crate) struct Inserted(BTreeMap<(NodeId, Option<usize>), NodeId>);

impl Inserted {
    /// `x` rounded to i8 by its own absolute maximum: per tensor, or per index of `axis`.
    pub(super) fn quantized(
        &mut self,
        graph: &mut Graph,
        x: NodeId,
        axis: Option<usize>,
        region: Region,
    ) -> Result<NodeId, PassError> {
        if let Some(&known) = self.0.get(&(x, axis)) {
            return Ok(known);
        }
        let scale = scale(graph, x, axis, region)?;
        self.rounded(graph, x, scale, axis, region)
    }

    /// `x` rounded to i8 by this scale.
    pub(super) fn rounded(
        &mut self,
        graph: &mut Graph,
        x: NodeId,
        scale: NodeId,
        axis: Option<usize>,
        region: Region,
    ) -> Result<NodeId, PassError> {
        let mut builder = Builder::new(graph, region, &name(graph, x));
        let q = builder.add("q", Op::Quantize { dtype: DType::I8, axis }, &[x, scale])?;
        let value = builder.add("dq", Op::Dequantize { axis }, &[q, scale])?;
        self.0.insert((x, axis), value);
        Ok(value)
    }

    /// What is known of `x` along `axis`.
    pub(super) fn find(&self, x: NodeId, axis: Option<usize>) -> Option<NodeId> {
        self.0.get(&(x, axis)).copied()
    }
}

fn name(graph: &Graph, id: NodeId) -> String {
    graph.node(id).name.as_str().to_owned()
}

/// The largest magnitude of `x`, per tensor (a scalar) or per index of `axis`.
pub(super) fn amax(
    graph: &mut Graph,
    x: NodeId,
    axis: Option<usize>,
    region: Region,
) -> Result<NodeId, PassError> {
    let shape = graph.ty(x).shape.clone();
    let kept = axis.map_or(Shape::scalar(), |axis| Shape(vec![shape.0[axis]]));
    let axes = (0..shape.rank()).filter(|&at| Some(at) != axis).collect();
    let mut builder = Builder::new(graph, region, &name(graph, x));
    let magnitude = builder.unary("abs", UnaryOp::Abs, x)?;
    let peak = builder.add("peak", Op::Reduce { op: ReduceOp::Max, axes }, &[magnitude])?;
    builder.reshape("amax", peak, kept)
}

/// The operand x, if `id` is the scalar [`amax`] of it.
pub(super) fn amax_operand(graph: &Graph, id: NodeId) -> Option<NodeId> {
    if !matches!(graph.op(id), Op::Reshape(shape) if shape.rank() == 0) {
        return None;
    }
    let peak = graph.operand(id, 0);
    let Op::Reduce { op: ReduceOp::Max, axes } = graph.op(peak) else { return None };
    let magnitude = graph.operand(peak, 0);
    let of_all = axes.len() == graph.ty(magnitude).shape.rank();
    let of_f32 = graph.ty(magnitude).dtype == DType::F32;
    let is_abs = *graph.op(magnitude) == Op::Unary(UnaryOp::Abs);
    (of_all && of_f32 && is_abs).then(|| graph.operand(magnitude, 0))
}

/// `max(amax / 127, tiny)` where amax is the largest magnitude of `x`, per tensor or per index of `axis`.
fn scale(
    graph: &mut Graph,
    x: NodeId,
    axis: Option<usize>,
    region: Region,
) -> Result<NodeId, PassError> {
    let amax = amax(graph, x, axis, region)?;
    let kept = graph.ty(amax).shape.clone();
    let mut builder = Builder::new(graph, region, &name(graph, x));
    let limit = builder.scalar(DType::F32, I8_MAX)?;
    let limit = builder.broadcast("limit", limit, kept.clone())?;
    let step = builder.binary("step", BinaryOp::Div, amax, limit)?;
    let smallest = builder.scalar(DType::F32, SMALLEST_SCALE)?;
    let smallest = builder.broadcast("smallest", smallest, kept)?;
    builder.binary("scale", BinaryOp::Max, step, smallest)
}

/// Whether `scale` is the [`scale`] of `x` along `axis` itself, so that rounding by it clamps nothing.
pub(super) fn is_current_scale(
    graph: &Graph,
    scale: NodeId,
    x: NodeId,
    axis: Option<usize>,
) -> bool {
    let below = |id: NodeId, op: &Op| (graph.op(id) == op).then(|| graph.operand(id, 0));
    let amax = below(scale, &Op::Binary(BinaryOp::Max))
        .and_then(|step| below(step, &Op::Binary(BinaryOp::Div)));
    let Some(amax) = amax else { return false };
    let step = graph.operand(scale, 0);
    let limit = splat(graph, graph.operand(step, 1));
    let peak = match graph.op(amax) {
        Op::Reshape(_) => graph.operand(amax, 0),
        _ => amax,
    };
    let Op::Reduce { op: ReduceOp::Max, axes } = graph.op(peak) else { return false };
    let rank = graph.ty(x).shape.rank();
    let all_but_axis = (0..rank).filter(|&at| Some(at) != axis);
    limit == Some(I8_MAX)
        && axes.iter().copied().eq(all_but_axis)
        && below(graph.operand(peak, 0), &Op::Unary(UnaryOp::Abs)) == Some(x)
}

/// Rounds both operands of a layer's product: data per tensor, weight per output channel. A layer whose operands
/// are quantized already stays as it is.
pub(crate) fn forward(
    graph: &mut Graph,
    layer: &Layer,
    inserted: &mut Inserted,
) -> Result<(), PassError> {
    for (position, axis) in [(0, None), (1, Some(layer.weight_axis))] {
        let operand = graph.operand(layer.node, position);
        if unquantized(graph, operand) != operand {
            continue;
        }
        let quantized = inserted.quantized(graph, operand, axis, Region::Forward)?;
        graph.set_operand(layer.node, position, quantized)?;
    }
    Ok(())
}
