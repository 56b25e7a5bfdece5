//! Quantizes the products that give the gradients of layer inputs.

use super::insert::Inserted;
use super::layer::{parameter, unquantized};
use crate::PassError;
use crate::builder::Builder;
use qcompile_ir::{DType, Graph, NodeId, Op, ReduceOp, Region, Shape};

/// Rounds the operands of every backward `conv2d_grad_input` and `matmul` whose note says that `grad_input` is int8:
/// the incoming gradient and the weight, both per tensor, since the product sums over the weight's output channels.
/// The gradient of the weight is not touched and sees the unrounded gradient. Returns the number of products quantized.
pub(super) fn insert(graph: &mut Graph) -> Result<usize, PassError> {
    let mut inserted = Inserted::default();
    let mut count = 0;
    for id in graph.order() {
        let node = graph.node(id);
        let product = matches!(node.op, Op::Conv2dGradInput(_) | Op::Matmul { .. });
        let asked = node.note.precision.is_some_and(|note| note.grad_input == DType::I8);
        if node.region != Region::Backward || !product || !asked || node.ty.dtype != DType::F32 {
            continue;
        }
        let operands = graph.operands(id);
        let of_weight: Vec<bool> = operands
            .iter()
            .map(|&operand| {
                graph.node(operand).region == Region::Forward && parameter(graph, operand).is_some()
            })
            .collect();
        let (weight, gradient) = match of_weight[..] {
            [false, true] => (1, 0),
            [true, false] => (0, 1),
            _ => continue,
        };
        let quantized = quantized_weight(graph, operands[weight], &mut inserted)?;
        graph.set_operand(id, weight, quantized)?;
        let quantized = inserted.quantized(graph, operands[gradient], None, Region::Backward)?;
        graph.set_operand(id, gradient, quantized)?;
        count += 1;
    }
    Ok(count)
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
