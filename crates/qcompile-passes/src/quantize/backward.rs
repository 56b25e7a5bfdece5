//! Quantizes the products of the backward pass.

use super::insert::{Inserted, Operand, Role, is_quantized, rows, with_op};
use super::layer::{Gradient, reads_quantized, unquantized};
use super::recurrence;
use super::scale;
use crate::PassError;
use crate::builder::Builder;
use crate::stochastic;
use qcompile_ir::{
    AttentionOperand, DType, GradientRounding, Graph, NodeId, Op, Precision, ReduceOp, Region,
    Shape,
};

/// Lets the gradient pass where its value was rounded by the scale of its own largest magnitude: nothing is clamped then,
/// so the gradient of the rounding is 1 everywhere.
pub(super) fn pass_straight(graph: &mut Graph) -> Result<(), PassError> {
    for id in graph.order() {
        let Op::StraightThrough { dtype, axis } = *graph.op(id) else { continue };
        let [x, dy, scale] = graph.operands(id)[..] else { continue };
        if scale::is_current(graph, scale, x, axis, dtype) {
            graph.replace_uses(id, dy)?;
        }
    }
    Ok(())
}

/// Rounds the operands of every product of the backward pass whose note says so. Of the gradient of an input: the incoming
/// gradient per tensor or row, and the weight per tensor, since the product sums over the weight's output channels. Of
/// the gradient of a weight, and of a product of two activations: the data and the incoming gradient, both per tensor, since
/// it sums over rows; in any other precision it sees the unrounded gradient. Attention and recurrent layers round the
/// gradients within. Returns the number of products quantized.
pub(super) fn insert(graph: &mut Graph) -> Result<usize, PassError> {
    let mut inserted = Inserted::default();
    let mut count = 0;
    for id in graph.order() {
        let node = graph.node(id);
        let Some(precision) = node.note.precision else { continue };
        if rounds_within(&node.op) {
            if precision.grad_input == DType::I8 {
                within(graph, id, &mut inserted)?;
                count += 1;
            }
            continue;
        }
        let Some(product) = Gradient::of(graph, id) else { continue };
        let dtype = product.precision(&precision);
        if !is_quantized(dtype) || node.ty.dtype != DType::F32 {
            continue;
        }
        let quantizer = node.note.quantizer.unwrap_or_default();
        let mut incoming = Operand { role: Role::Gradient, axis: None, dtype, quantizer };
        let gradient = match product {
            Gradient::Input { weight, gradient } => {
                let how = Operand { role: Role::Weight, dtype: quantizer.weight, ..incoming };
                let quantized = per_tensor(graph, graph.operand(id, weight), how, &mut inserted)?;
                graph.set_operand(id, weight, quantized)?;
                if gradient == 0 {
                    incoming.axis = rows(graph, id, quantizer);
                }
                gradient
            }
            Gradient::Weight { data, gradient } => {
                let dtype = activation(&precision);
                let how = Operand { role: Role::Activation, dtype, ..incoming };
                let quantized = per_tensor(graph, graph.operand(id, data), how, &mut inserted)?;
                graph.set_operand(id, data, quantized)?;
                gradient
            }
        };
        let operand = graph.operand(id, gradient);
        let quantized = inserted.quantized(graph, operand, incoming, Region::Backward)?;
        graph.set_operand(id, gradient, quantized)?;
        count += 1;
    }
    Ok(count)
}

/// Whether the op itself rounds gradients that enter its products.
fn rounds_within(op: &Op) -> bool {
    matches!(op, Op::AttentionGrad { .. } | Op::RecurrenceGrad { .. })
}

/// Makes the products of such an op read codes. A gradient of attention wants queries, keys and values per tensor, which
/// the forward product has already where it reads codes itself; what is f32 for it is so for that.
fn within(graph: &mut Graph, id: NodeId, inserted: &mut Inserted) -> Result<(), PassError> {
    let mut op = graph.op(id).clone();
    let Op::AttentionGrad { products, rounding, .. } = &mut op else {
        return recurrence::products(graph, id, Some(DType::I8));
    };
    let quantizer = graph.node(id).note.quantizer.unwrap_or_default();
    (*products, *rounding) = (DType::I8, quantizer.rounding);
    let how = Operand { role: Role::Activation, axis: None, dtype: DType::I8, quantizer };
    let narrow = graph.ty(id).dtype;
    let mut operands = graph.operands(id);
    let dy = operands[operands.len() - 1];
    for (position, operand) in operands.iter_mut().enumerate() {
        *operand = wide(graph, *operand)?;
        if position < AttentionOperand::ALL.len() && !reads_quantized(graph, *operand) {
            *operand = per_tensor(graph, *operand, how, inserted)?;
        }
    }
    if quantizer.rounding == GradientRounding::Stochastic {
        let mut each = graph.ty(operands[0]).shape.clone();
        each.0[3] = 2.into();
        operands.push(stochastic::numbers(graph, dy, each, Region::Backward)?);
    }
    let mut new = with_op(graph, id, op, &operands)?;
    if narrow != DType::F32 {
        let name = format!("{}.narrow", graph.node(new).name.as_str());
        new = graph.add(Op::Cast(narrow), &[new], name, Region::Backward)?;
    }
    graph.replace_uses(id, new)?;
    Ok(())
}

/// A value in f32.
fn wide(graph: &mut Graph, id: NodeId) -> Result<NodeId, PassError> {
    if graph.ty(id).dtype == DType::F32 {
        return Ok(id);
    }
    let name = graph.node(id).name.as_str().to_owned();
    Builder::new(graph, Region::Backward, &name).add("f32", Op::Cast(DType::F32), &[id])
}

/// The codes of a layer's data: those of its forward product; those of its gradients, where that has none.
fn activation(precision: &Precision) -> DType {
    if is_quantized(precision.forward) { precision.forward } else { precision.grad_weight }
}

/// The data or the weight below `operand` rounded per tensor, as the forward product has it where it has. Where that has a
/// scale of a weight for each channel, the largest of them is the scale of the tensor (division and maximum commute), which
/// spares a pass over the weight.
fn per_tensor(
    graph: &mut Graph,
    operand: NodeId,
    how: Operand,
    inserted: &mut Inserted,
) -> Result<NodeId, PassError> {
    if matches!(graph.op(operand), Op::Dequantize { axis: None }) {
        return Ok(operand);
    }
    let below = unquantized(graph, operand);
    if let Some(known) = inserted.find(below, None, how.dtype) {
        return Ok(known);
    }
    if below == operand || how.role != Role::Weight {
        return inserted.quantized(graph, below, how, Region::Backward);
    }
    let scale = graph.operand(operand, 1);
    let prefix = graph.node(scale).name.as_str().to_owned();
    let mut builder = Builder::new(graph, Region::Backward, &prefix);
    let peak = Op::Reduce { op: ReduceOp::Max, axes: vec![0] };
    let peak = builder.add("peak", peak, &[scale])?;
    let scale = builder.reshape("tensor", peak, Shape::scalar())?;
    inserted.rounded(graph, below, scale, how, Region::Backward)
}
