//! Which values of the backward region the forward region computes, too.

use qcompile_ir::{Graph, NodeId, Region};

/// For each node, by its index, whether it makes a forward value again: it has the op of a forward node, and the same
/// operands or ones that are made again.
pub(crate) fn made_again(graph: &Graph, order: &[NodeId]) -> Vec<bool> {
    let mut original: Vec<Option<NodeId>> = vec![None; graph.len()];
    let forward = |id: &NodeId| graph.node(*id).region == Region::Forward;
    for &id in order.iter().filter(|id| graph.node(**id).region == Region::Backward) {
        let operands = graph.operands(id).into_iter();
        let operands =
            operands.map(|of| if forward(&of) { Some(of) } else { original[of.index()] });
        let Some(operands) = operands.collect::<Option<Vec<NodeId>>>() else { continue };
        let Some(&first) = operands.first() else { continue };
        let uses = graph.uses(first).into_iter().map(|(user, _)| user).filter(forward);
        original[id.index()] = uses
            .filter(|user| graph.op(*user) == graph.op(id) && graph.operands(*user) == operands)
            .min();
    }
    original.iter().map(Option::is_some).collect()
}
