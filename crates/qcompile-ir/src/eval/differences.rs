//! Central differences: gradients from forward evaluation alone.

use super::{Data, EvalError, EvalOptions, Evaluator, Rank, Rounding};
use crate::{Graph, NodeId, Tensor};
use std::collections::BTreeMap;

/// The gradient of the scalar value `loss` with respect to every element of the float leaf `leaf`, by central
/// differences in f64 without rounding: accurate to about 1e-9 relative where the loss is smooth. Only what lies
/// between the leaf and the loss is evaluated again for each element.
///
/// # Errors
/// As [`super::eval`]; also if a name means nothing, the loss is not one float, or the leaf is not a float leaf.
pub fn central_differences(
    graph: &Graph,
    inputs: &BTreeMap<String, Tensor>,
    batch: usize,
    loss: &str,
    leaf: &str,
) -> Result<Vec<f64>, EvalError> {
    let wrong = |name: &str, reason: &str| EvalError::Input {
        name: name.to_owned(),
        reason: reason.to_owned(),
    };
    let loss_id = graph.find(loss).ok_or_else(|| wrong(loss, "the graph has no such value"))?;
    let leaf_id = graph
        .find(leaf)
        .filter(|&id| graph.op(id).is_leaf() && graph.ty(id).dtype.is_float())
        .ok_or_else(|| wrong(leaf, "the graph has no such float leaf"))?;
    let options = EvalOptions {
        rounding: Rounding::Exact,
        targets: vec![loss.to_owned(), leaf.to_owned()],
        max_work: 1 << 38,
        ..EvalOptions::default()
    };
    let ranks = [Rank { inputs, batch }];
    let mut evaluator = Evaluator::new(graph, &ranks, &options);
    let wanted = evaluator.wanted()?;
    let mut depends = vec![false; graph.len()];
    depends[leaf_id.index()] = true;
    let mut between: Vec<NodeId> = Vec::new();
    for id in graph.order().into_iter().filter(|id| wanted[id.index()]) {
        evaluator.step(id)?;
        if graph.operands(id).iter().any(|operand| depends[operand.index()]) {
            depends[id.index()] = true;
            between.push(id);
        }
    }
    let float = |evaluator: &Evaluator<'_>, id: NodeId| match &evaluator.values[0][id.index()] {
        Some(value) => value.data.floats().to_vec(),
        None => Vec::new(),
    };
    if float(&evaluator, loss_id).len() != 1 {
        return Err(wrong(loss, "the loss is not one float"));
    }
    let start = float(&evaluator, leaf_id);
    let mut gradient = Vec::with_capacity(start.len());
    for (at, &x) in start.iter().enumerate() {
        // The cube root of the precision balances truncation (h²) and cancellation (1/h).
        let h = 6e-6 * x.abs().max(1.0);
        let mut moved = |to: f64| {
            set(&mut evaluator, leaf_id, at, to);
            for &id in &between {
                evaluator.step(id)?;
            }
            Ok(float(&evaluator, loss_id)[0])
        };
        let (above, below) = (x + h, x - h);
        let difference = moved(above)? - moved(below)?;
        set(&mut evaluator, leaf_id, at, x);
        gradient.push(difference / (above - below));
    }
    Ok(gradient)
}

fn set(evaluator: &mut Evaluator<'_>, leaf: NodeId, at: usize, to: f64) {
    if let Some(value) = &mut evaluator.values[0][leaf.index()]
        && let Data::Float(values) = &mut value.data
    {
        values[at] = to;
    }
}
