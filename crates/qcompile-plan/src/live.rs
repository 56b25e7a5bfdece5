//! What has to be computed.

use crate::low::{Codes, LowOperands, Scales};
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
        if let Some(low) = low.get(&id) {
            let scales = low.scales.into_iter().flat_map(Scales::values);
            for needed in [low.a.base, low.b.base].into_iter().chain(scales) {
                live[needed.index()] = true;
            }
        } else if let Some(codes) = codes.get(&id) {
            let codes = codes.iter().flat_map(|codes| [codes.view.base, codes.scale]);
            let mask = graph.operands(id).into_iter().skip(3);
            for needed in codes.chain(mask) {
                live[needed.index()] = true;
                live[views[needed.index()].base.index()] = true;
            }
        } else if let Some(of) = deviations.get(&id) {
            live[of.index()] = true;
        } else if views[id.index()].base == id {
            for operand in graph.operands(id) {
                live[operand.index()] = true;
                live[views[operand.index()].base.index()] = true;
            }
        }
    }
    live
}
