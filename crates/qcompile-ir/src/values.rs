//! Graphs with other values in their leaves.

use crate::{Graph, GraphError, Op, Tensor};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Values of parameters and states by name.
pub type LeafValues = BTreeMap<String, Arc<Tensor>>;

impl Graph {
    /// The same graph, whose parameters and states that are named begin with these values. Other names do not matter.
    ///
    /// # Errors
    /// [`GraphError::Replacement`] where a value has another type than its leaf.
    pub fn with_values(&self, values: &LeafValues) -> Result<Graph, GraphError> {
        let mut graph = self.clone();
        for (name, value) in values {
            let Some(leaf) = graph.find(name) else { continue };
            let (old, old_type, new_type) =
                (graph.node(leaf).name.clone(), graph.ty(leaf).clone(), value.ty());
            let held = match graph.op_mut(leaf) {
                Op::Param(held) | Op::State(held) => held,
                _ => continue,
            };
            if old_type != new_type {
                return Err(GraphError::Replacement { new: old.clone(), old, old_type, new_type });
            }
            *held = Arc::clone(value);
        }
        Ok(graph)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text;

    const GRAPH: &str = "graph @g {
  param %w : f32[2, 2] = [[1, 2], [3, 4]]
forward:
  %y : f32[2, 2] = relu %w
  %next : f32[2, 2] = neg %w
  return %y
  next %w = %next
}
";

    #[test]
    fn values_replace_those_of_leaves_and_nothing_else() {
        let graph = text::parse(GRAPH, &|_| None).unwrap();
        assert_eq!(graph.with_values(&LeafValues::new()).unwrap().to_string(), graph.to_string());
        let named = |name: &str, shape: &[usize], values: &[f32]| {
            let tensor = Tensor::from_f32(shape, values).unwrap();
            LeafValues::from([(name.to_owned(), Arc::new(tensor))])
        };
        let changed = graph.with_values(&named("w", &[2, 2], &[5.0, 6.0, 7.0, 8.0])).unwrap();
        assert_eq!(
            changed.to_string(),
            graph.to_string().replace("[[1, 2], [3, 4]]", "[[5, 6], [7, 8]]")
        );
        for name in ["y", "other"] {
            let same = graph.with_values(&named(name, &[1], &[5.0])).unwrap();
            assert_eq!(same.to_string(), graph.to_string());
        }
        assert!(graph.with_values(&named("w", &[2], &[5.0, 6.0])).is_err());
    }
}
