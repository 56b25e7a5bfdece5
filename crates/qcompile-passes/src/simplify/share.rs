//! Equal ops over equal operands in one region are one value.

use super::replace;
use crate::PassError;
use qcompile_ir::{DType, Graph, NodeId, Op, Region};
use std::collections::BTreeMap;

/// What makes two nodes equal (constants by digest, compared in full on a hit).
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Const(u64),
    Computed(String, Option<DType>, Vec<NodeId>, Region),
}

/// Replaces every such node by the earliest. Returns whether there was one.
pub(super) fn run(graph: &mut Graph) -> Result<bool, PassError> {
    let mut first: BTreeMap<Key, NodeId> = BTreeMap::new();
    let mut changed = false;
    for id in graph.order() {
        let key = match graph.op(id) {
            Op::Input(_) | Op::Param(_) | Op::State(_) => continue,
            Op::Const(tensor) => Key::Const(tensor.digest()),
            op => Key::Computed(
                format!("{op:?}"),
                Some(graph.ty(id).dtype),
                graph.operands(id),
                graph.node(id).region,
            ),
        };
        match first.get(&key) {
            None => {
                first.insert(key, id);
            }
            Some(&same) if graph.op(same) == graph.op(id) => {
                // An unused twin would be replaced again in the next round.
                let used = !graph.uses(id).is_empty()
                    || graph.outputs().iter().any(|(_, output)| *output == id)
                    || graph.next().values().any(|value| *value == id);
                if used {
                    replace(graph, id, same)?;
                    changed = true;
                }
            }
            Some(_) => {}
        }
    }
    Ok(changed)
}
