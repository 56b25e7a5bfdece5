//! Parts of graphs, and graphs with other values in their leaves.

use qcompile_ir::{Graph, GraphError, NodeId, Op, Tensor};
use std::collections::BTreeMap;
use std::sync::Arc;

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
    let (mut copy, ids) = copied(graph, |id| wanted[id.index()], &BTreeMap::new())?;
    copy.set_outputs(outputs.iter().map(|(name, id)| (name.clone(), ids[id])).collect());
    Ok(copy)
}

/// `graph` whose parameters and states named in `values` start with those values.
///
/// # Errors
/// Where a value has another type than its leaf.
pub(crate) fn with_values(
    graph: &Graph,
    values: &BTreeMap<String, Tensor>,
) -> Result<Graph, GraphError> {
    let (mut copy, ids) = copied(graph, |_| true, values)?;
    let outputs = graph.outputs().iter().map(|(name, id)| (name.clone(), ids[id])).collect();
    copy.set_outputs(outputs);
    for (leaf, value) in graph.next() {
        copy.set_next(ids[leaf], ids[value])?;
    }
    Ok(copy)
}

fn copied(
    graph: &Graph,
    wanted: impl Fn(NodeId) -> bool,
    values: &BTreeMap<String, Tensor>,
) -> Result<(Graph, BTreeMap<NodeId, NodeId>), GraphError> {
    let mut copy = Graph::new(graph.name());
    let mut ids = BTreeMap::new();
    for id in graph.order().into_iter().filter(|&id| wanted(id)) {
        let node = graph.node(id);
        let op = match (&node.op, values.get(node.name.as_str())) {
            (Op::Param(_), Some(value)) => Op::Param(Arc::new(value.clone())),
            (Op::State(_), Some(value)) => Op::State(Arc::new(value.clone())),
            (op, _) => op.clone(),
        };
        let operands: Vec<NodeId> = graph.operands(id).iter().map(|operand| ids[operand]).collect();
        let new = copy.add(op, &operands, node.name.clone(), node.region)?;
        *copy.note_mut(new) = node.note.clone();
        ids.insert(id, new);
    }
    Ok((copy, ids))
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

    #[test]
    fn values_replace_those_of_leaves_and_nothing_else() {
        let graph = text::parse(GRAPH, &|_| None).unwrap();
        let same = with_values(&graph, &BTreeMap::new()).unwrap();
        assert_eq!(same.to_string(), graph.to_string());
        let w = Tensor::from_f32(&[2, 2], &[5.0, 6.0, 7.0, 8.0]).unwrap();
        let changed = with_values(&graph, &BTreeMap::from([("w".to_owned(), w)])).unwrap();
        assert_eq!(
            changed.to_string(),
            graph.to_string().replace("[[1, 2], [3, 4]]", "[[5, 6], [7, 8]]")
        );
        let wrong = Tensor::from_f32(&[2], &[5.0, 6.0]).unwrap();
        assert!(with_values(&graph, &BTreeMap::from([("w".to_owned(), wrong)])).is_err());
    }
}
