//! Ops over constants are constants.

use super::replace;
use crate::PassError;
use qcompile_ir::eval::{EvalOptions, eval};
use qcompile_ir::{Graph, NodeId, Op, Region, Tensor};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Larger results stay computed: a plan file should not hold what a loop gives at once.
const MOST_ELEMENTS: usize = 1 << 20;
/// Nor is it worth more elementary operations, of which the evaluator does some ten million in a second.
const MOST_WORK: u64 = 1 << 24;

/// Replaces every such node but broadcasts, which are cheaper to repeat than to store. Returns whether there was one.
pub(super) fn run(graph: &mut Graph) -> Result<bool, PassError> {
    let mut changed = false;
    for id in graph.order() {
        let Some(value) = folded(graph, id)? else { continue };
        let node = graph.node(id);
        let name = node.name.clone();
        let new = graph.add(Op::Const(Arc::new(value)), &[], name, Region::Forward)?;
        replace(graph, id, new)?;
        graph.swap_names(id, new);
        changed = true;
    }
    Ok(changed)
}

/// The value of a node all of whose operands are constants; `None` if it is not one, or has no value.
fn folded(graph: &Graph, id: NodeId) -> Result<Option<Tensor>, PassError> {
    let op = graph.op(id);
    let operands = graph.operands(id);
    if let Op::Size(dim) = op {
        #[allow(clippy::cast_precision_loss, reason = "sizes beyond 2^53 cannot be laid out")]
        let size = dim.as_fixed().map(|size| size as f64);
        return Ok(size.map(|size| Tensor::scalar(graph.ty(id).dtype, size)));
    }
    let constant = |id: &NodeId| matches!(graph.op(*id), Op::Const(_));
    if op.is_leaf()
        || matches!(op, Op::Broadcast(_) | Op::AllReduce(_))
        || graph.ty(id).shape.batch_axis().is_some()
        || operands.is_empty()
        || !operands.iter().all(constant)
        || graph.ty(id).shape.elements().is_none_or(|elements| elements.scale > MOST_ELEMENTS)
    {
        return Ok(None);
    }
    let mut single = Graph::new("fold");
    let mut copied = Vec::with_capacity(operands.len());
    for operand in operands {
        let leaf = graph.op(operand).clone();
        copied.push(single.add(leaf, &[], "operand", Region::Forward)?);
    }
    single.add(op.clone(), &copied, "value", Region::Forward)?;
    // What has no value (an index out of range) is for the step to refuse.
    let options = EvalOptions { max_work: MOST_WORK, ..EvalOptions::default() };
    let values = eval(&single, &BTreeMap::new(), 1, &options);
    Ok(values.ok().and_then(|values| values.get("value")))
}
