//! Recurrent layers: their products round inside the op, since each step rounds the state that the step before gave.

use super::decide::Options;
use super::insert::is_quantized;
use super::layer::Layer;
use crate::PassError;
use qcompile_ir::{DType, Granularity, Graph, NodeId, Note, Op};

/// Makes the products of a recurrent layer, or of its gradient, read a type.
pub(super) fn products(
    graph: &mut Graph,
    id: NodeId,
    products: Option<DType>,
) -> Result<(), PassError> {
    let node = graph.node(id).clone();
    let op = match node.op {
        Op::Recurrence(recurrence) => Op::Recurrence(recurrence.with_products(products)),
        Op::RecurrenceGrad { recurrence, cell } => {
            Op::RecurrenceGrad { recurrence: recurrence.with_products(products), cell }
        }
        _ => return Ok(()),
    };
    let operands = graph.operands(id);
    let new = graph.add(op, &operands, node.name, node.region)?;
    *graph.note_mut(new) = node.note;
    graph.replace_uses(id, new)?;
    graph.swap_names(id, new);
    Ok(())
}

/// Why the states of a layer cannot have int8 codes, if so.
pub(super) fn obstacle(graph: &Graph, layer: &Layer, options: &Options) -> Option<String> {
    let Op::Recurrence(recurrence) = graph.op(layer.node) else { return None };
    let types = options.numerics.types;
    if options.ranged {
        return Some("recurrent products have no integer operator in ONNX".to_owned());
    }
    if !options.operations.forward {
        return Some("of a recurrent layer only the forward product has an int8 kernel".to_owned());
    }
    if let Some(other) = [types.weight, types.activation].into_iter().find(|&ty| ty != DType::I8) {
        return Some(format!("recurrent products have no kernel for {other} codes"));
    }
    if options.numerics.granularity == Granularity::Tensor {
        return Some("R has a scale for each row of a gate, not one for the tensor".to_owned());
    }
    if !recurrence.is_bounded() {
        return Some("its activations let states exceed 1, the range of their codes".to_owned());
    }
    if !starts_within_range(graph, graph.operand(layer.node, 2)) {
        return Some("its first state may exceed 1, the range of the codes".to_owned());
    }
    None
}

/// Whether a value is a constant within ± 1, seen through any strides.
fn starts_within_range(graph: &Graph, mut id: NodeId) -> bool {
    loop {
        match graph.op(id) {
            Op::Const(tensor) => {
                return tensor.splat().is_some_and(|value| value.abs() <= 1.0);
            }
            Op::Reshape(_) | Op::Transpose(_) | Op::Broadcast(_) | Op::Slice { .. } => {
                id = graph.operand(id, 0);
            }
            _ => return false,
        }
    }
}

/// What the notes of a recurrent layer ask for that has no kernel.
pub(super) fn contradiction(note: &Note) -> Option<String> {
    let precision = note.precision?;
    if is_quantized(precision.forward) && precision.forward != DType::I8 {
        return Some(format!("recurrent products have no kernel for {} codes", precision.forward));
    }
    if is_quantized(precision.grad_input) {
        return Some("the way back through the steps has no kernel for codes".to_owned());
    }
    if !note.channels.is_empty() {
        return Some("a recurrent layer has no channels apart".to_owned());
    }
    None
}
