//! Recurrent layers: their products round inside the op, since each step rounds the state that the step before gave.

use crate::PassError;
use qcompile_ir::{DType, Graph, NodeId, Op};

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
