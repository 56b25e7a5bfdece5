//! Quantizes the products of the backward pass.

use super::insert::{Inserted, is_current_scale};
use super::layer::{Gradient, unquantized};
use crate::PassError;
use crate::builder::Builder;
use qcompile_ir::{DType, Graph, NodeId, Op, ReduceOp, Region, Shape};

/// Lets the gradient pass where its value was rounded by the scale of its own largest magnitude: nothing is clamped then,
/// so the gradient of the rounding is 1 everywhere.
pub(super) fn pass_straight(graph: &mut Graph) -> Result<(), PassError> {
    for id in graph.order() {
        let Op::StraightThrough { axis, .. } = *graph.op(id) else { continue };
        let [x, dy, scale] = graph.operands(id)[..] else { continue };
        if is_current_scale(graph, scale, x, axis) {
            graph.replace_uses(id, dy)?;
        }
    }
    Ok(())
}

/// Rounds the operands of every product of the backward pass whose note says int8. Of the gradient of an input: the
/// incoming gradient and the weight, both per tensor, since the product sums over the weight's output channels. Of the
/// gradient of a weight: the data and the incoming gradient, both per tensor, since it sums over samples; in any other
/// precision it sees the unrounded gradient. Returns the number of products quantized.
pub(super) fn insert(graph: &mut Graph) -> Result<usize, PassError> {
    let mut inserted = Inserted::default();
    let mut count = 0;
    for id in graph.order() {
        let node = graph.node(id);
        let (Some(gradient), Some(precision)) = (Gradient::of(graph, id), node.note.precision)
        else {
            continue;
        };
        if gradient.precision(&precision) != DType::I8 || node.ty.dtype != DType::F32 {
            continue;
        }
        let (other, gradient, is_weight) = match gradient {
            Gradient::Input { weight, gradient } => (weight, gradient, true),
            Gradient::Weight { data, gradient } => (data, gradient, false),
        };
        let operand = graph.operand(id, other);
        let quantized = if is_weight {
            quantized_weight(graph, operand, &mut inserted)?
        } else {
            quantized_data(graph, operand, &mut inserted)?
        };
        graph.set_operand(id, other, quantized)?;
        let operand = graph.operand(id, gradient);
        let quantized = inserted.quantized(graph, operand, None, Region::Backward)?;
        graph.set_operand(id, gradient, quantized)?;
        count += 1;
    }
    Ok(count)
}

/// The data below `operand` rounded per tensor, as the forward product has it where it has.
fn quantized_data(
    graph: &mut Graph,
    operand: NodeId,
    inserted: &mut Inserted,
) -> Result<NodeId, PassError> {
    if matches!(graph.op(operand), Op::Dequantize { axis: None }) {
        return Ok(operand);
    }
    let data = unquantized(graph, operand);
    inserted.quantized(graph, data, None, Region::Backward)
}

/// The weight below `operand` rounded per tensor. Where the forward product has a scale per channel, the largest of
/// them is the scale of the tensor (division and maximum commute), which spares a pass over the weight.
fn quantized_weight(
    graph: &mut Graph,
    operand: NodeId,
    inserted: &mut Inserted,
) -> Result<NodeId, PassError> {
    let weight = unquantized(graph, operand);
    if let Some(known) = inserted.find(weight, None) {
        return Ok(known);
    }
    if weight == operand {
        return inserted.quantized(graph, weight, None, Region::Backward);
    }
    let mut scale = graph.operand(operand, 1);
    if graph.ty(scale).shape.rank() > 0 {
        let prefix = graph.node(scale).name.as_str().to_owned();
        let mut builder = Builder::new(graph, Region::Backward, &prefix);
        let peak = Op::Reduce { op: ReduceOp::Max, axes: vec![0] };
        let peak = builder.add("peak", peak, &[scale])?;
        scale = builder.reshape("tensor", peak, Shape::scalar())?;
    }
    inserted.rounded(graph, weight, scale, None, Region::Backward)
}
