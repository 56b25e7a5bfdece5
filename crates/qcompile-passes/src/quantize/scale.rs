//! The scales that values are rounded by.

use crate::PassError;
use crate::builder::Builder;
use crate::simplify::splat;
use qcompile_ir::{
    BinaryOp, CollectiveOp, CompareOp, DType, Graph, NodeId, Op, QuantizedRange, ReduceOp, Region,
    Shape, Tensor, UnaryOp,
};
use std::sync::Arc;

/// Steps that a delayed scale looks back on.
const HISTORY: usize = 16;

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
    let name = graph.node(x).name.as_str().to_owned();
    let mut builder = Builder::new(graph, region, &name);
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

/// The largest code of a type that products read; that of i8 for others, which are none.
fn largest(dtype: DType) -> f64 {
    QuantizedRange::of(dtype, false).map_or(127.0, |range| f64::from(range.high))
}

/// `max(amax / largest, tiny)` for codes up to `largest`, where amax is the largest magnitude of `x`, per tensor or per
/// index of `axis`.
pub(super) fn current(
    graph: &mut Graph,
    x: NodeId,
    axis: Option<usize>,
    dtype: DType,
    region: Region,
) -> Result<NodeId, PassError> {
    let amax = amax(graph, x, axis, region)?;
    of_amax(graph, x, amax, dtype, region)
}

fn of_amax(
    graph: &mut Graph,
    x: NodeId,
    amax: NodeId,
    dtype: DType,
    region: Region,
) -> Result<NodeId, PassError> {
    let kept = graph.ty(amax).shape.clone();
    let name = graph.node(x).name.as_str().to_owned();
    let mut builder = Builder::new(graph, region, &name);
    let limit = builder.scalar(DType::F32, largest(dtype))?;
    let limit = builder.broadcast("limit", limit, kept.clone())?;
    let step = builder.binary("step", BinaryOp::Div, amax, limit)?;
    let smallest = builder.scalar(DType::F32, QuantizedRange::SMALLEST_SCALE)?;
    let smallest = builder.broadcast("smallest", smallest, kept)?;
    builder.binary("scale", BinaryOp::Max, step, smallest)
}

/// The same with the largest magnitude that `x` had in the [`HISTORY`] steps before, which a state holds; in the first
/// step with its own. What a step adds is the maximum over ranks; a magnitude that is not finite adds the last one again.
pub(super) fn delayed(
    graph: &mut Graph,
    x: NodeId,
    dtype: DType,
    region: Region,
) -> Result<NodeId, PassError> {
    let amax = amax(graph, x, None, region)?;
    let name = graph.node(x).name.as_str().to_owned();
    let zeros = Tensor::from_f64(DType::F32, &[HISTORY], &[0.0; HISTORY]);
    let zeros = Arc::new(zeros.ok_or_else(|| PassError::Unsupported {
        pass: super::PASS,
        reason: "a history is no tensor".to_owned(),
    })?);
    let history =
        graph.add(Op::State(zeros), &[], format!("{name}.amax_history"), Region::Forward)?;
    let mut b = Builder::new(graph, region, &name);
    let peak = Op::Reduce { op: ReduceOp::Max, axes: vec![0] };
    let peak = b.add("before.peak", peak, &[history])?;
    let before = b.reshape("before", peak, Shape::scalar())?;
    let zero = b.scalar(DType::F32, 0.0)?;
    let known = b.compare("known", CompareOp::Less, zero, before)?;
    let delayed = b.select("delayed", known, before, amax)?;
    let span = |start, end| Op::Slice { axis: 0, start, end, step: 1 };
    let last = b.add("last.slice", span(0, 1), &[history])?;
    let last = b.reshape("last", last, Shape::scalar())?;
    let infinity = b.scalar(DType::F32, f64::INFINITY)?;
    let finite = b.compare("finite", CompareOp::Less, amax, infinity)?;
    let finite = b.select("newest", finite, amax, last)?;
    let mut b = Builder::new(graph, Region::Comm, &name);
    let newest = b.add("newest.max", Op::AllReduce(CollectiveOp::Max), &[finite])?;
    let mut b = Builder::new(graph, Region::Update, &name);
    let newest = b.reshape("newest.first", newest, Shape::fixed(&[1]))?;
    let older = b.add("older", span(0, HISTORY - 1), &[history])?;
    let next = b.add("amax_history.next", Op::Concat { axis: 0 }, &[newest, older])?;
    graph.set_next(history, next)?;
    of_amax(graph, x, delayed, dtype, region)
}

/// Whether `scale` is the [`current`] one of `x` along `axis` for codes of `dtype`, so that rounding by it clamps nothing.
pub(super) fn is_current(
    graph: &Graph,
    scale: NodeId,
    x: NodeId,
    axis: Option<usize>,
    dtype: DType,
) -> bool {
    let below = |id: NodeId, op: &Op| (graph.op(id) == op).then(|| graph.operand(id, 0));
    let Some(step) = below(scale, &Op::Binary(BinaryOp::Max)) else { return false };
    let Some(amax) = below(step, &Op::Binary(BinaryOp::Div)) else { return false };
    let peak = match graph.op(amax) {
        Op::Reshape(_) => graph.operand(amax, 0),
        _ => amax,
    };
    let Op::Reduce { op: ReduceOp::Max, axes } = graph.op(peak) else { return false };
    let rank = graph.ty(x).shape.rank();
    let all_but_axis = (0..rank).filter(|&at| Some(at) != axis);
    splat(graph, graph.operand(step, 1)) == Some(largest(dtype))
        && axes.iter().copied().eq(all_but_axis)
        && below(graph.operand(peak, 0), &Op::Unary(UnaryOp::Abs)) == Some(x)
}
