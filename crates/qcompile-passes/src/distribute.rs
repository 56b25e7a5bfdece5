//! Builds the comm region: what ranks exchange in a step.
//!
//! *Before*: gradients of this rank's part of the batch, in outputs `w.grad`.
//!
//! *After*: every `w.grad` is the mean over ranks (`%w.grad.mean`), output `loss` is the mean of the ranks' losses (`%loss.mean`),
//! and statistics that go into running state are means too, so that parameters and state stay the same on every rank. The number of
//! ranks is not in the graph: the mean over one rank is the value itself.
//!
//! Where the note of a parameter says `mean=i8`, ranks exchange codes: its gradient is rounded to i8 with a scale for
//! each block, up or down at random so that the mean over steps and ranks is that of the gradients (QSGD, Alistarh et
//! al. 2017, arXiv:1610.02132), and `all_reduce` takes the `dequantize`. It is rounded for one rank, too: the numbers of
//! a run do not depend on whether others are there in another way than by their samples.
//!
//! *Why here*: after all gradients exist, before anything is updated by them.
//!
//! [`synchronize_statistics`] is the other half, for `--sync-batch-norm`: it stands before differentiation, because
//! gradients flow back through the exchange.

use crate::builder::Builder;
use crate::{PassError, blocks, differentiate};
use qcompile_ir::{CollectiveOp, DType, Graph, NodeId, Op, ReduceOp, Region};

/// Makes gradients, loss and running statistics means over ranks.
///
/// # Errors
/// Only by a defect.
pub fn run(graph: &mut Graph) -> Result<(), PassError> {
    average_statistics(graph)?;
    let gradients = differentiate::gradients(graph);
    let mut outputs = graph.outputs().to_vec();
    for (name, value) in &mut outputs {
        let is_gradient = name.ends_with(differentiate::GRADIENT_SUFFIX);
        let of = gradients.iter().find(|(_, gradient)| is_gradient && gradient == value);
        let precision = of.and_then(|(param, _)| graph.node(*param).note.precision);
        if precision.is_some_and(|precision| precision.mean == DType::I8) {
            *value = mean_of_codes(graph, *value, name)?;
        } else if name == "loss" || of.is_some() {
            *value = mean(graph, *value, name)?;
        }
    }
    graph.set_outputs(outputs);
    Ok(())
}

/// The mean of this gradient over ranks, which exchange it as codes.
fn mean_of_codes(graph: &mut Graph, gradient: NodeId, name: &str) -> Result<NodeId, PassError> {
    let Some(shape) = blocks::shape(graph, gradient) else { return mean(graph, gradient, name) };
    let whole = graph.ty(gradient).clone();
    let mut b = Builder::new(graph, Region::Comm, name);
    let wide = b.cast("f32", gradient, DType::F32)?;
    let values = b.reshape("blocks", wide, shape.clone())?;
    let numbers = b.uniform_of_rank("numbers", &shape)?;
    let [codes, scale] = b.block_codes(values, numbers)?;
    let rounded = b.add("dq", Op::Dequantize { axis: Some(0) }, &[codes, scale])?;
    let mean = b.add("mean", Op::AllReduce(CollectiveOp::Mean), &[rounded])?;
    let mean = b.reshape("mean.whole", mean, whole.shape)?;
    b.cast("mean.cast", mean, whole.dtype)
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
