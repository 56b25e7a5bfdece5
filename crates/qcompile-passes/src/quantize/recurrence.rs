//! Recurrent layers: their products round inside the op, since each step rounds the state that the step before gave.

use crate::PassError;
use crate::stochastic;
use qcompile_ir::{DType, GradientRounding, Graph, NodeId, Op, Shape};

/// Makes the products of a recurrent layer, or of its gradient, read a type. Codes of gradients are rounded as the note of the
/// gradient says.
pub(super) fn products(
    graph: &mut Graph,
    id: NodeId,
    products: Option<DType>,
) -> Result<(), PassError> {
    let node = graph.node(id).clone();
    let mut operands = graph.operands(id);
    let op = match node.op {
        Op::Recurrence(recurrence) => Op::Recurrence(recurrence.with_products(products)),
        Op::RecurrenceGrad { recurrence, cell, .. } => {
            let rounding = node.note.quantizer.unwrap_or_default().rounding;
            if rounding == GradientRounding::Stochastic {
                let [steps, batch, _] = graph.ty(operands[2]).shape.0[..] else { return Ok(()) };
                let each = Shape(vec![batch, steps, recurrence.cell.gradients().into()]);
                operands.push(stochastic::numbers(graph, id, each, node.region)?);
            }
            let recurrence = recurrence.with_products(products);
            Op::RecurrenceGrad { recurrence, cell, rounding }
        }
        _ => return Ok(()),
    };
    let new = graph.add(op, &operands, node.name, node.region)?;
    *graph.note_mut(new) = node.note;
    graph.replace_uses(id, new)?;
    graph.swap_names(id, new);
    Ok(())
}
