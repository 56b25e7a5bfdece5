//! Builds the comm region: what ranks exchange in a step.
//!
//! *Before*: gradients of this rank's part of the batch, in outputs `w.grad`.
//!
//! *After*: every `w.grad` is the mean over ranks (`%w.grad.mean`), output `loss` is the mean of the ranks' losses (`%loss.mean`),
//! and statistics that go into running state are means too, so that parameters and state stay the same on every rank. The number of
//! ranks is not in the graph: the mean over one rank is the value itself.
//!
//! *Why here*: after all gradients exist, before anything is updated by them.
//!
//! [`synchronize_statistics`] is the other half, for `--sync-batch-norm`: it stands before differentiation, because
//! gradients flow back through the exchange.

use crate::PassError;
use crate::builder::Builder;
use crate::differentiate;
use qcompile_ir::{CollectiveOp, Graph, NodeId, Op, ReduceOp, Region};

/// Makes gradients, loss and running statistics means over ranks.
///
/// # Errors
/// Only by a defect.
pub fn run(graph: &mut Graph) -> Result<(), PassError> {
    average_statistics(graph)?;
    let gradients: Vec<NodeId> =
        differentiate::gradients(graph).into_iter().map(|(_, gradient)| gradient).collect();
    let mut outputs = graph.outputs().to_vec();
    for (name, value) in &mut outputs {
        if name == "loss"
            || (name.ends_with(differentiate::GRADIENT_SUFFIX) && gradients.contains(value))
        {
            *value = mean(graph, *value, name)?;
        }
    }
    graph.set_outputs(outputs);
    Ok(())
}

/// `%name.mean`: the mean of this value over ranks.
fn mean(graph: &mut Graph, value: NodeId, name: &str) -> Result<NodeId, PassError> {
    Builder::new(graph, Region::Comm, name).add("mean", Op::AllReduce(CollectiveOp::Mean), &[value])
}

/// What the update region takes from the forward region are the batch statistics of running averages: each rank has
/// seen another part of the batch, and their mean keeps the state equal everywhere.
fn average_statistics(graph: &mut Graph) -> Result<(), PassError> {
    let statistics: Vec<NodeId> = graph
        .ids()
        .filter(|&id| {
            let node = graph.node(id);
            let computed = !node.op.is_leaf() && !matches!(node.op, Op::Size(_));
            computed
                && node.region == Region::Forward
                && node.ty.dtype.is_float()
                && node.ty.shape.batch_axis().is_none()
                && depends_on_data(graph, id)
        })
        .collect();
    for id in statistics {
        let users: Vec<_> = graph
            .uses(id)
            .into_iter()
            .filter(|(user, _)| graph.node(*user).region == Region::Update)
            .collect();
        let states: Vec<NodeId> = graph
            .next()
            .iter()
            .filter(|(_, value)| **value == id)
            .map(|(state, _)| *state)
            .collect();
        if users.is_empty() && states.is_empty() {
            continue;
        }
        let name = graph.node(id).name.as_str().to_owned();
        let mean = mean(graph, id, &name)?;
        for (user, position) in users {
            graph.set_operand(user, position, mean)?;
        }
        for state in states {
            graph.set_next(state, mean)?;
        }
    }
    Ok(())
}

fn depends_on_data(graph: &Graph, id: NodeId) -> bool {
    let mut seen = vec![false; graph.len()];
    let mut stack = vec![id];
    while let Some(at) = stack.pop() {
        if matches!(graph.op(at), Op::Input(_)) {
            return true;
        }
        for operand in graph.operands(at) {
            if !std::mem::replace(&mut seen[operand.index()], true) {
                stack.push(operand);
            }
        }
    }
    false
}

/// Makes batch statistics those of all ranks' samples: a forward sum over the batch that comes back to the samples
/// becomes the mean over ranks of that sum, so `sum / count` is the mean of all (ranks hold equally many samples).
/// The loss, which combines samples but does not come back to them, is left alone. Returns how many there are.
///
/// # Errors
/// [`PassError::Unsupported`] for a maximum over the batch, which has no gradient across ranks.
pub fn synchronize_statistics(graph: &mut Graph) -> Result<usize, PassError> {
    let mut synchronized = 0;
    for id in graph.order() {
        let (op, reduces_batch) = match graph.op(id) {
            Op::Reduce { op, axes } if graph.node(id).region == Region::Forward => {
                let operand = graph.operand(id, 0);
                let batch = graph.ty(operand).shape.batch_axis();
                (*op, batch.is_some_and(|batch| axes.contains(&batch)))
            }
            _ => continue,
        };
        if !reduces_batch || !graph.ty(id).dtype.is_float() || !returns_to_samples(graph, id) {
            continue;
        }
        let name = graph.node(id).name.clone();
        if op == ReduceOp::Max {
            return Err(PassError::Unsupported {
                pass: "distribute",
                reason: format!("{name}: a maximum over the batch cannot be synchronized"),
            });
        }
        let mut b = Builder::new(graph, Region::Forward, name.as_str());
        let mean = b.add("ranks", Op::AllReduce(CollectiveOp::Mean), &[id])?;
        graph.replace_uses_except(id, mean, &[mean])?;
        synchronized += 1;
    }
    Ok(synchronized)
}

/// Whether a value without batch axis flows into one with it, within the forward region.
fn returns_to_samples(graph: &Graph, id: NodeId) -> bool {
    let mut seen = vec![false; graph.len()];
    let mut stack = vec![id];
    while let Some(at) = stack.pop() {
        for (user, _) in graph.uses(at) {
            if graph.node(user).region != Region::Forward {
                continue;
            }
            if graph.ty(user).shape.batch_axis().is_some() {
                return true;
            }
            if !std::mem::replace(&mut seen[user.index()], true) {
                stack.push(user);
            }
        }
    }
    false
}
