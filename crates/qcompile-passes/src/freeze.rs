//! Computes what depends on nothing but stored values, once and for all.
//!
//! *Before*: a forward graph that computes with its parameters and states: weights that are scaled and rounded, scales,
//! running statistics. *After*: each value that is computed from leaves alone and used by anything else is a leaf of its
//! name itself: a parameter, if it depends on one. What stays are broadcasts and what `dequantize` gives, so that
//! integers are stored and not what they stand for. *Why here*: on a copy of the evaluation form that leaves for
//! programs that only run it.

use crate::PassError;
use qcompile_ir::{Graph, NodeId, Op, Region, Tensor};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

const PASS: &str = "freeze";

/// Computes the outputs of a graph without inputs, by name.
pub type Compute<'c> = &'c mut dyn FnMut(&Graph) -> Result<BTreeMap<String, Tensor>, String>;

/// Replaces computed values by leaves. Returns how many; invalidates every [`NodeId`].
///
/// # Errors
/// [`PassError::Evaluation`] if `compute` fails or leaves something out.
pub fn run(graph: &mut Graph, compute: Compute) -> Result<usize, PassError> {
    graph.sweep();
    let stored = stored(graph);
    let roots = roots(graph, &stored);
    if roots.is_empty() {
        return Ok(0);
    }
    let part = part(graph, &roots)?;
    let failed = |reason: String| PassError::Evaluation { pass: PASS, reason };
    let mut values = compute(&part).map_err(failed)?;
    for &root in &roots {
        let node = graph.node(root);
        let name = node.name.clone();
        let value = values.remove(name.as_str()).filter(|value| value.ty() == node.ty);
        let value = Arc::new(value.ok_or_else(|| failed(format!("{name} was not computed")))?);
        let learned = stored[root.index()] == Some(Stored::Parameter) && value.dtype().is_float();
        let leaf = if learned { Op::Param(value) } else { Op::Const(value) };
        let origin = node.note.origin.clone();
        let leaf = graph.add(leaf, &[], name, Region::Forward)?;
        graph.note_mut(leaf).origin = origin;
        graph.replace_uses(root, leaf)?;
        graph.swap_names(root, leaf);
    }
    graph.sweep();
    Ok(roots.len())
}

/// What a value depends on, if on stored values only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stored {
    Constant,
    Parameter,
}

/// For each node what it depends on; none where on more than stored values.
fn stored(graph: &Graph) -> Vec<Option<Stored>> {
    let mut stored = vec![None; graph.len()];
    for id in graph.order() {
        stored[id.index()] = match graph.op(id) {
            Op::Const(_) | Op::State(_) => Some(Stored::Constant),
            Op::Param(_) => Some(Stored::Parameter),
            Op::Random { .. } | Op::AllReduce(_) => None,
            op if op.is_leaf() || graph.ty(id).shape.batch_axis().is_some() => None,
            _ => {
                let operands = graph.operands(id);
                let of_operands = operands.iter().map(|operand| stored[operand.index()]);
                of_operands.min().flatten().and_then(|_| {
                    operands.iter().filter_map(|operand| stored[operand.index()]).max()
                })
            }
        };
    }
    stored
}

/// What is computed from stored values and used otherwise, in graph order.
fn roots(graph: &Graph, stored: &[Option<Stored>]) -> Vec<NodeId> {
    let mut roots = BTreeSet::new();
    let stays = |id: NodeId| {
        matches!(graph.op(id), Op::Dequantize { .. } | Op::Broadcast(_) | Op::Reshape(_))
    };
    let mut wanted: Vec<NodeId> = graph.outputs().iter().map(|(_, id)| *id).collect();
    for id in graph.order().into_iter().filter(|id| stored[id.index()].is_none()) {
        wanted.extend(graph.operands(id));
    }
    let mut seen = BTreeSet::new();
    while let Some(id) = wanted.pop() {
        if stored[id.index()].is_none() || graph.op(id).is_leaf() || !seen.insert(id) {
            continue;
        }
        if stays(id) || moves_dequantized(graph, id) {
            wanted.extend(graph.operands(id));
        } else {
            roots.insert(id);
        }
    }
    let place: BTreeMap<NodeId, usize> =
        graph.order().into_iter().enumerate().map(|(at, id)| (id, at)).collect();
    let mut roots: Vec<NodeId> = roots.into_iter().collect();
    roots.sort_by_key(|id| place[id]);
    roots
}

/// Whether the value has the elements of a dequantized one, in another order.
fn moves_dequantized(graph: &Graph, mut id: NodeId) -> bool {
    while matches!(graph.op(id), Op::Reshape(_) | Op::Transpose(_)) {
        id = graph.operand(id, 0);
    }
    matches!(graph.op(id), Op::Dequantize { .. })
}

/// What these values depend on, with them as outputs of their names.
pub(crate) fn part(graph: &Graph, roots: &[NodeId]) -> Result<Graph, PassError> {
    let mut wanted = vec![false; graph.len()];
    let mut stack = roots.to_vec();
    while let Some(id) = stack.pop() {
        if !std::mem::replace(&mut wanted[id.index()], true) {
            stack.extend(graph.operands(id));
        }
    }
    let mut part = Graph::new(graph.name());
    let mut copies: BTreeMap<NodeId, NodeId> = BTreeMap::new();
    for id in graph.order().into_iter().filter(|id| wanted[id.index()]) {
        let node = graph.node(id);
        let operands: Vec<NodeId> = graph.operands(id).iter().map(|id| copies[id]).collect();
        let copy = part.add(node.op.clone(), &operands, node.name.clone(), Region::Forward)?;
        copies.insert(id, copy);
    }
    for root in roots {
        part.add_output(graph.node(*root).name.as_str(), copies[root]);
    }
    Ok(part)
}
