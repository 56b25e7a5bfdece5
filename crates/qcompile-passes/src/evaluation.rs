//! Turns a training step into its evaluation form.
//!
//! *Before*: any graph with a forward region; batch normalization in training form normalizes by the statistics of the
//! batch, and `next %running = momentum · %running + (1 - momentum) · statistic`.
//!
//! *After*: the forward region alone, without any `next`, and with `training` false. Every forward value that a running average follows is that
//! running state instead, so that a sample's result does not depend on the batch it comes in. Of the outputs those
//! stay that the forward region computes, and means over ranks of such values as the value itself. Leaves and inputs
//! that only other regions used are gone.
//!
//! *Why here*: on a copy of the training graph, before its plan is built: parameters and running states have the
//! names they have in the training plan, so that the trained values fit.

use crate::PassError;
use crate::builder::Builder;
use crate::simplify::splat;
use qcompile_ir::{BinaryOp, CollectiveOp, DType, Graph, NodeId, Op, Region, Tensor, UnaryOp};
use std::collections::BTreeMap;
use std::sync::Arc;

/// How far the coefficients of an average may be from the sum 1, being rounded one by one.
const COEFFICIENT_ERROR: f64 = 1e-3;

/// Replaces the graph by its evaluation form. Returns whether statistics were replaced.
///
/// # Errors
/// [`PassError::Unsupported`] if two different running averages follow one value, or nothing is left to evaluate.
pub fn run(graph: &mut Graph) -> Result<bool, PassError> {
    still(graph)?;
    let followed = followed(graph)?;
    for (&statistic, average) in &followed {
        let ty = graph.ty(statistic).clone();
        let name = graph.node(average.state).name.as_str().to_owned();
        let mut b = Builder::new(graph, Region::Forward, &name);
        let state = b.cast("cast", average.state, ty.dtype)?;
        let state = b.reshape("statistic", state, ty.shape)?;
        graph.replace_uses(statistic, state)?;
    }
    *graph = forward_only(graph)?;
    Ok(!followed.is_empty())
}

/// Says that nothing trains: what `training` switches on is off. Returns whether there was any.
///
/// # Errors
/// None for a graph that is verified; its own checks are passed on.
pub fn still(graph: &mut Graph) -> Result<bool, PassError> {
    let off = Op::Const(Arc::new(Tensor::scalar(DType::Bool, 0.0)));
    let found: Vec<NodeId> = graph.ids().filter(|&id| *graph.op(id) == Op::Training).collect();
    for &id in &found {
        let name = graph.node(id).name.clone();
        let off = graph.add(off.clone(), &[], name, Region::Forward)?;
        graph.replace_uses(id, off)?;
    }
    Ok(!found.is_empty())
}

fn unsupported(reason: String) -> PassError {
    PassError::Unsupported { pass: "evaluation", reason }
}

/// A running average of a forward value.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Average {
    state: NodeId,
    /// The coefficient of the state.
    momentum: f64,
}

/// Each forward value that a running average follows.
fn followed(graph: &Graph) -> Result<BTreeMap<NodeId, Average>, PassError> {
    let mut followed: BTreeMap<NodeId, Average> = BTreeMap::new();
    for (&state, &next) in graph.next() {
        if !matches!(graph.op(state), Op::State(_)) {
            continue;
        }
        let Some((statistic, momentum)) = average(graph, state, next) else { continue };
        let average = Average { state, momentum };
        match followed.get(&statistic) {
            None => {
                followed.insert(statistic, average);
            }
            // Averages that start equal and move equally stay equal.
            Some(first)
                if graph.op(first.state) == graph.op(state) && first.momentum == momentum => {}
            Some(first) => {
                return Err(unsupported(format!(
                    "{} is averaged in two ways, as {} and as {}",
                    graph.node(statistic).name,
                    graph.node(first.state).name,
                    graph.node(state).name
                )));
            }
        }
    }
    Ok(followed)
}

/// `state · (coefficient of the state) + value · (coefficient of the value)`.
#[derive(Clone, Copy, Debug, Default)]
struct Combination {
    state: f64,
    value: Option<(NodeId, f64)>,
}

impl Combination {
    fn scaled(self, factor: f64) -> Combination {
        let value = self.value.map(|(id, coefficient)| (id, coefficient * factor));
        Combination { state: self.state * factor, value }
    }

    /// The sum, if it has one value.
    fn plus(self, other: Combination) -> Option<Combination> {
        let value = match (self.value, other.value) {
            (Some((a, x)), Some((b, y))) if a == b => Some((a, x + y)),
            (Some(_), Some(_)) => return None,
            (a, b) => a.or(b),
        };
        Some(Combination { state: self.state + other.state, value })
    }
}

/// The computed forward value that `next` moves `state` towards, and the coefficient of the state.
fn average(graph: &Graph, state: NodeId, next: NodeId) -> Option<(NodeId, f64)> {
    let mut known = BTreeMap::new();
    // Operands come first, so that no path is as deep as the stack.
    let mut stack = vec![(next, false)];
    while let Some((id, ready)) = stack.pop() {
        if known.contains_key(&id) {
            continue;
        }
        if ready {
            known.insert(id, combination(graph, state, id, &known));
            continue;
        }
        stack.push((id, true));
        if graph.node(id).region > Region::Forward {
            stack.extend(graph.operands(id).into_iter().map(|operand| (operand, false)));
        }
    }
    let Combination { state: momentum, value } = known.get(&next).copied().flatten()?;
    let (value, share) = value.filter(|(_, share)| *share > 0.0)?;
    let is_average = momentum >= 0.0 && (momentum + share - 1.0).abs() < COEFFICIENT_ERROR;
    (is_average && !graph.op(value).is_leaf()).then_some((value, momentum))
}

/// What `id` is in terms of the state, given what its operands are.
fn combination(
    graph: &Graph,
    state: NodeId,
    id: NodeId,
    known: &BTreeMap<NodeId, Option<Combination>>,
) -> Option<Combination> {
    if id == state {
        return Some(Combination { state: 1.0, value: None });
    }
    if graph.node(id).region == Region::Forward {
        return Some(Combination { state: 0.0, value: Some((id, 1.0)) });
    }
    let operands = graph.operands(id);
    let of = |position: usize| known.get(&operands[position]).copied().flatten();
    match graph.op(id) {
        // The mean over ranks of a statistic: each rank evaluates with the state, which has all of them.
        Op::Reshape(_) | Op::Cast(_) | Op::AllReduce(CollectiveOp::Mean) => of(0),
        Op::Unary(UnaryOp::StopGradient) => of(0),
        Op::Unary(UnaryOp::Neg) => Some(of(0)?.scaled(-1.0)),
        Op::Binary(BinaryOp::Add) => of(0)?.plus(of(1)?),
        Op::Binary(BinaryOp::Sub) => of(0)?.plus(of(1)?.scaled(-1.0)),
        Op::Binary(BinaryOp::Mul) => match (splat(graph, operands[0]), splat(graph, operands[1])) {
            (Some(factor), _) => Some(of(1)?.scaled(factor)),
            (None, Some(factor)) => Some(of(0)?.scaled(factor)),
            (None, None) => None,
        },
        Op::Binary(BinaryOp::Div) => Some(of(0)?.scaled(splat(graph, operands[1])?.recip())),
        // A refused step keeps the state.
        Op::Select if operands[2] == state => of(1),
        Op::Select if operands[1] == state => of(2),
        _ => None,
    }
}

/// The outputs that the forward region computes with everything they need, as a graph.
fn forward_only(graph: &Graph) -> Result<Graph, PassError> {
    let forward = |id: NodeId| graph.node(id).region == Region::Forward;
    let mut outputs = Vec::new();
    for (name, id) in graph.outputs() {
        let exchanged = matches!(graph.op(*id), Op::AllReduce(CollectiveOp::Mean));
        let value = if exchanged && !forward(*id) { graph.operand(*id, 0) } else { *id };
        if forward(value) {
            outputs.push((name, value));
        }
    }
    if outputs.is_empty() {
        return Err(unsupported("no output is computed by the forward region".to_owned()));
    }
    let mut live = vec![false; graph.len()];
    let mut stack: Vec<NodeId> = outputs.iter().map(|(_, id)| *id).collect();
    // An input that nothing uses is still one of the model's; one that only the optimizer uses is not.
    stack.extend(graph.leaves(|op| matches!(op, Op::Input(_))).into_iter().filter(|&id| {
        let uses = graph.uses(id);
        uses.is_empty() || uses.iter().any(|(user, _)| forward(*user))
    }));
    while let Some(id) = stack.pop() {
        if !std::mem::replace(&mut live[id.index()], true) {
            stack.extend(graph.operands(id));
        }
    }
    let mut evaluation = Graph::new(graph.name());
    let mut copies: BTreeMap<NodeId, NodeId> = BTreeMap::new();
    for id in graph.order().into_iter().filter(|id| live[id.index()]) {
        let node = graph.node(id);
        let operands: Vec<NodeId> = graph.operands(id).iter().map(|id| copies[id]).collect();
        let copy = evaluation.add(node.op.clone(), &operands, node.name.clone(), node.region)?;
        *evaluation.note_mut(copy) = node.note.clone();
        copies.insert(id, copy);
    }
    for (name, id) in outputs {
        evaluation.add_output(name, copies[&id]);
    }
    Ok(evaluation)
}
