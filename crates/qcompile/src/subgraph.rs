//! Parts of graphs.

use qcompile_ir::{Graph, GraphError, NodeId};
use std::collections::BTreeMap;

/// The part of `graph` that these values depend on, with them as outputs. What leaves hold after the step is not
/// part of it.
///
/// # Errors
/// Only by a defect.
pub(crate) fn part(graph: &Graph, outputs: &[(String, NodeId)]) -> Result<Graph, GraphError> {
    let mut wanted = vec![false; graph.len()];
    let mut stack: Vec<NodeId> = outputs.iter().map(|(_, id)| *id).collect();
    while let Some(id) = stack.pop() {
        if !std::mem::replace(&mut wanted[id.index()], true) {
            stack.extend(graph.operands(id));
        }
    }
    let mut copy = Graph::new(graph.name());
    let mut ids = BTreeMap::new();
    for id in graph.order().into_iter().filter(|id| wanted[id.index()]) {
        let node = graph.node(id);
        let operands: Vec<NodeId> = graph.operands(id).iter().map(|operand| ids[operand]).collect();
        let new = copy.add(node.op.clone(), &operands, node.name.clone(), node.region)?;
        *copy.note_mut(new) = node.note.clone();
        ids.insert(id, new);
    }
    copy.set_outputs(outputs.iter().map(|(name, id)| (name.clone(), ids[id])).collect());
    Ok(copy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcompile_ir::text;

    const GRAPH: &str = "graph @g {
  input %x : f32[N, 2]
  input %unused : f32[3]
  param %w : f32[2, 2] = [[1, 2], [3, 4]]
forward:
  %y : f32[N, 2] = matmul %x, %w
  %z : f32[N, 2] = relu %y
  %next : f32[2, 2] = neg %w
  return %z
  next %w = %next
}
";

    #[test]
    fn a_part_holds_what_its_outputs_need() {
        let graph = text::parse(GRAPH, &|_| None).unwrap();
        let y = graph.find("y").unwrap();
        let part = part(&graph, &[("out".to_owned(), y)]).unwrap();
        assert_eq!((part.len(), part.next().len()), (3, 0));
        assert_eq!(part.outputs()[0].0, "out");
    }
}
