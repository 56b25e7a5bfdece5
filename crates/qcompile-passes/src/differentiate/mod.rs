//! Builds the backward region: reverse-mode differentiation of the loss.
//!
//! *Before*: a forward graph whose output `loss` is a float scalar.
//!
//! *After*: for every parameter `%w` that the loss depends on, a value of its type (named `%w.grad` unless it is the
//! gradient of something else too) that is the derivative of the loss with respect to it, and an output `w.grad` that keeps it
//! alive for the passes that follow. Only paths that lead to parameters are differentiated. A value that is used
//! several times has the sum of the gradients of its uses.
//!
//! *Why here*: after quantization, so that the gradient is that of what really runs (with rounding passed by
//! straight-through estimation on the plain `dequantize(quantize(x, s), s)`), and before anything consumes gradients.

mod elementwise;
mod indexing;
mod linear;
mod normalize;
mod quantized;
mod recurrence;
mod rules;
mod shape;

pub(crate) use quantized::{is_constant, learned};
pub use rules::carries_gradient;

use crate::PassError;
use crate::builder::Builder;
use qcompile_ir::{Channels, Graph, Name, Node, NodeId, Note, Op, Region};
use std::collections::BTreeMap;

/// What was built, by node (valid until the next sweep).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gradients {
    /// Each parameter that the loss depends on, and its gradient.
    pub by_param: Vec<(NodeId, NodeId)>,
    /// Parameters that the loss does not depend on: their gradient is zero and they are not trained.
    pub independent: Vec<Name>,
}

/// The suffix of the output that holds a parameter's gradient.
pub const GRADIENT_SUFFIX: &str = ".grad";

/// The gradients that the graph holds: each parameter `%w` with the value of output `w.grad`.
#[must_use]
pub fn gradients(graph: &Graph) -> Vec<(NodeId, NodeId)> {
    let outputs: BTreeMap<&str, NodeId> =
        graph.outputs().iter().map(|(name, id)| (name.as_str(), *id)).collect();
    graph
        .leaves(|op| matches!(op, Op::Param(_)))
        .into_iter()
        .filter_map(|param| {
            let output = format!("{}{GRADIENT_SUFFIX}", graph.node(param).name.as_str());
            Some((param, *outputs.get(output.as_str())?))
        })
        .collect()
}

/// Differentiates output `loss` with respect to every parameter it depends on.
///
/// # Errors
/// [`PassError::NothingToTrain`] without a scalar loss or a parameter it depends on;
/// [`PassError::NotDifferentiable`] names the value that has no gradient.
pub fn run(graph: &mut Graph) -> Result<Gradients, PassError> {
    let loss = scalar_loss(graph)?;
    let params = graph.leaves(|op| matches!(op, Op::Param(_)));
    let active = active_nodes(graph, loss);
    if !params.iter().any(|param| active[param.index()]) {
        return Err(nothing_to_train(if params.is_empty() {
            "the model has no trainable parameter (is everything frozen?)"
        } else {
            "the loss depends on no trainable parameter"
        }));
    }
    check_outputs(graph, &params)?;
    let contributions = contributions(graph, &active);
    let order: Vec<NodeId> =
        graph.order().into_iter().filter(|id| active[id.index()]).rev().collect();
    let mut parts: BTreeMap<NodeId, Vec<NodeId>> = BTreeMap::new();
    let mut gradient_of: BTreeMap<NodeId, NodeId> = BTreeMap::new();
    let seed = seed(graph, loss)?;
    parts.insert(loss, vec![seed]);
    for id in order {
        let Some(parts_of_id) = parts.remove(&id) else { continue };
        let dy = total(graph, id, &parts_of_id)?;
        gradient_of.insert(id, dy);
        for (position, operand) in graph.operands(id).into_iter().enumerate() {
            if !active[operand.index()] || !rules::carries_gradient(graph, id, position) {
                continue;
            }
            // `x.grad`, or `x.grad.part` if there are several.
            let part = if contributions[operand.index()] > 1 { ".part" } else { "" };
            let name = format!("{}{GRADIENT_SUFFIX}{part}", graph.node(operand).name.as_str());
            let before = graph.len();
            let part = rules::gradient(graph, id, position, dy, &name)?;
            if graph.len() > before {
                note_products(graph, id, before, part);
            }
            parts.entry(operand).or_default().push(part);
        }
    }
    let mut result = Gradients::default();
    for param in params {
        let name = graph.node(param).name.clone();
        match gradient_of.get(&param) {
            Some(&gradient) => {
                graph.add_output(&format!("{}{GRADIENT_SUFFIX}", name.as_str()), gradient);
                result.by_param.push((param, gradient));
            }
            None => result.independent.push(name),
        }
    }
    Ok(result)
}

fn nothing_to_train(reason: &str) -> PassError {
    PassError::NothingToTrain { reason: reason.to_owned() }
}

fn scalar_loss(graph: &Graph) -> Result<NodeId, PassError> {
    let loss = graph.outputs().iter().find(|(name, _)| name == "loss").map(|(_, id)| *id);
    let loss = loss.ok_or_else(|| nothing_to_train("the graph has no output `loss`"))?;
    let ty = graph.ty(loss);
    if ty.dtype.is_float() && ty.shape.rank() == 0 {
        Ok(loss)
    } else {
        Err(nothing_to_train(&format!("the loss is {ty}, not a float scalar")))
    }
}

/// Output names are how later passes find gradients, so the model must not use them.
fn check_outputs(graph: &Graph, params: &[NodeId]) -> Result<(), PassError> {
    for &param in params {
        let name = format!("{}{GRADIENT_SUFFIX}", graph.node(param).name.as_str());
        if graph.outputs().iter().any(|(output, _)| *output == name) {
            let reason = format!("the graph has an output `{name}` already");
            return Err(PassError::Unsupported { pass: "differentiate", reason });
        }
    }
    Ok(())
}

/// For each node index: whether the loss depends on it and it depends on a parameter, both through operands that
/// carry gradients.
fn active_nodes(graph: &Graph, loss: NodeId) -> Vec<bool> {
    let order = graph.order();
    let from_param = trained(graph);
    let mut to_loss = vec![false; graph.len()];
    to_loss[loss.index()] = true;
    for &id in order.iter().rev().filter(|id| from_param[id.index()]) {
        if to_loss[id.index()] {
            for (position, operand) in graph.operands(id).into_iter().enumerate() {
                to_loss[operand.index()] |= rules::carries_gradient(graph, id, position);
            }
        }
    }
    from_param.iter().zip(&to_loss).map(|(&from, &to)| from && to).collect()
}

/// For each node index: whether it depends on a parameter through operands that carry gradients.
pub(crate) fn trained(graph: &Graph) -> Vec<bool> {
    let mut trained = vec![false; graph.len()];
    for id in graph.order() {
        trained[id.index()] = matches!(graph.op(id), Op::Param(_))
            || graph.operands(id).into_iter().enumerate().any(|(position, operand)| {
                trained[operand.index()] && rules::carries_gradient(graph, id, position)
            });
    }
    trained
}

/// The derivative of the loss with respect to itself.
fn seed(graph: &mut Graph, loss: NodeId) -> Result<NodeId, PassError> {
    let dtype = graph.ty(loss).dtype;
    Builder::new(graph, Region::Backward, "").scalar(dtype, 1.0)
}

/// For each node index, how many uses contribute to its gradient.
fn contributions(graph: &Graph, active: &[bool]) -> Vec<usize> {
    let mut contributions = vec![0; graph.len()];
    for id in graph.ids().filter(|id| active[id.index()]) {
        for (position, operand) in graph.operands(id).into_iter().enumerate() {
            contributions[operand.index()] +=
                usize::from(rules::carries_gradient(graph, id, position));
        }
    }
    contributions
}

/// The sum of the contributions to the gradient of `id`.
fn total(graph: &mut Graph, id: NodeId, parts: &[NodeId]) -> Result<NodeId, PassError> {
    let name = format!("{}{GRADIENT_SUFFIX}", graph.node(id).name.as_str());
    let [first, rest @ ..] = parts else { return Err(nothing_to_train("no gradient to add")) };
    let mut builder = Builder::new(graph, Region::Backward, &name);
    let mut sum = *first;
    for (index, &part) in rest.iter().enumerate() {
        let suffix = if index + 1 == rest.len() { "" } else { "sum" };
        sum = builder.binary(suffix, qcompile_ir::BinaryOp::Add, sum, part)?;
    }
    Ok(sum)
}

/// The products of the backward pass belong to the layer of their forward product: they carry its origin and its
/// precision, so that the precision of each can be decided with it.
fn note_products(graph: &mut Graph, forward: NodeId, first: usize, part: NodeId) {
    let Node { op, note, .. } = graph.node(forward);
    let products = match op {
        Op::Matmul { .. } | Op::Conv2d(_) | Op::Attention { .. } => vec![part],
        // The way back through the steps, and those of the gradient of R, which may be joined.
        Op::Recurrence(_) => {
            let new = graph.ids().skip(first);
            new.filter(|&id| matches!(graph.op(id), Op::RecurrenceGrad { .. } | Op::Matmul { .. }))
                .collect()
        }
        _ => return,
    };
    let note = Note { sensitivity: None, channels: Channels::default(), ..note.clone() };
    for product in products {
        *graph.note_mut(product) = note.clone();
    }
}

#[cfg(test)]
pub(crate) mod tests;
