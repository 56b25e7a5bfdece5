//! What has to be computed.

use crate::low::{Codes, LowOperands, stored_operands};
use crate::view::View;
use qcompile_ir::{Graph, NodeId};
use std::collections::BTreeMap;

/// Which nodes some output or next value needs.
pub(crate) fn live(
    graph: &Graph,
    order: &[NodeId],
    views: &[View],
    (low, codes): (&BTreeMap<NodeId, LowOperands>, &BTreeMap<NodeId, [Codes; 3]>),
    deviations: &BTreeMap<NodeId, NodeId>,
) -> Vec<bool> {
    let mut live = vec![false; graph.len()];
    for id in graph.outputs().iter().map(|(_, id)| id).chain(graph.next().values()) {
        live[id.index()] = true;
    }
    for &id in order.iter().rev().filter(|id| !graph.op(**id).is_leaf()) {
        if !live[id.index()] {
            continue;
        }
        live[views[id.index()].base.index()] = true;
        if let Some(of) = deviations.get(&id) {
            live[of.index()] = true;
        } else if views[id.index()].base == id {
            for operand in stored_operands(graph, low, codes, id) {
                live[operand.index()] = true;
                live[views[operand.index()].base.index()] = true;
            }
        }
    }
    live
}
