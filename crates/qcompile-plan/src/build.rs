//! Graph to plan: fuse, order, allocate, lower.

use crate::fuse::{Fusion, fuse};
use crate::lower::lower;
use crate::memory::{Item, Placement, allocate, place, saved};
use crate::view::views;
use crate::{Binding, Plan, VerifyError};
use qcompile_ir::{Graph, Name, NodeId, Op, Region};
use thiserror::Error;

/// Why a graph has no plan.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PlanError {
    /// A leaf takes over another leaf's value.
    #[error("next {leaf} is the leaf {value}; only a computed value can be kept")]
    NextIsLeaf {
        /// The leaf.
        leaf: Name,
        /// What it would hold.
        value: Name,
    },
    /// An op on a type that no kernel has.
    #[error("{name}: {op} has no kernel for {ty}")]
    Unsupported {
        /// The value.
        name: Name,
        /// Its op.
        op: &'static str,
        /// The type.
        ty: String,
    },
    /// More kernels than are scheduled.
    #[error("the graph needs more than {limit} kernels")]
    TooLarge {
        /// How many there may be.
        limit: usize,
    },
    /// The plan that was made is wrong: a bug of this crate.
    #[error(transparent)]
    Verify(#[from] VerifyError),
}

/// How to build a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildOptions {
    /// The batch size that memory is shared for; any batch size runs.
    pub batch_size: usize,
}

impl Default for BuildOptions {
    fn default() -> BuildOptions {
        BuildOptions { batch_size: 32 }
    }
}

/// The plan of a verified graph. A pure function: equal graphs give equal plans.
///
/// # Errors
/// [`PlanError`] names the value that has no kernel.
pub fn build(graph: Graph, options: &BuildOptions) -> Result<Plan, PlanError> {
    for (&leaf, &value) in graph.next() {
        if leaf != value && graph.op(value).is_leaf() {
            let name = |id: NodeId| graph.node(id).name.clone();
            return Err(PlanError::NextIsLeaf { leaf: name(leaf), value: name(value) });
        }
    }
    let order = graph.order();
    let views = views(&graph, &order);
    let mut fusion = fuse(&graph, &order, views)?;
    let placement = place(&graph, &mut fusion);
    let schedule = schedule(&graph, &fusion, &placement);
    let saved = saved(&graph, &fusion);
    let memory = allocate(&graph, &fusion, &placement, &schedule, options.batch_size.max(1));
    let steps = lower(&graph, &fusion, &memory, &placement, &schedule)?;

    let binding = |id: NodeId| {
        let node = graph.node(id);
        let initial = match &node.op {
            Op::Param(tensor) | Op::State(tensor) | Op::Const(tensor) => Some(tensor.clone()),
            _ => None,
        };
        Binding {
            name: node.name.as_str().to_owned(),
            ty: node.ty.clone(),
            slot: memory.slot_of[&id],
            initial,
        }
    };
    let leaves =
        |kind: fn(&Op) -> bool| graph.leaves(kind).into_iter().map(binding).collect::<Vec<_>>();
    let inputs = leaves(|op| matches!(op, Op::Input(_)));
    let params = leaves(|op| matches!(op, Op::Param(_)));
    let states = leaves(|op| matches!(op, Op::State(_)));
    let consts = leaves(|op| matches!(op, Op::Const(_)));
    let outputs = graph
        .outputs()
        .iter()
        .zip(&memory.outputs)
        .map(|((name, id), &slot)| Binding {
            name: name.clone(),
            ty: graph.ty(*id).clone(),
            slot,
            initial: None,
        })
        .collect();
    let slots = memory.slots;
    let mut plan = Plan::assemble(graph, slots, steps, inputs, outputs, params, states, consts)?;
    plan.batch_size = options.batch_size.max(1);
    plan.saved = saved;
    Ok(plan)
}

/// Groups in a stable order: regions in order, otherwise as the graph has them, and before each what it needs. So what is
/// made again for the backward pass is made when it is read, not as soon as it can be. Copies of outputs end their
/// region; copies of next values end the step.
fn schedule(graph: &Graph, fusion: &Fusion, placement: &Placement) -> Vec<Item> {
    let groups = &fusion.groups;
    let place = |group: &usize| (groups[*group].region, groups[*group].position, *group);
    let mut wanted: Vec<usize> = (0..groups.len()).collect();
    wanted.sort_by_key(place);
    let mut ordered: Vec<usize> = Vec::with_capacity(groups.len());
    let mut placed = vec![false; groups.len()];
    for group in wanted {
        let mut stack = vec![group];
        while let Some(&group) = stack.last() {
            let missing = fusion.needs[group].iter().filter(|&need| !placed[need]);
            match missing.min_by_key(place).filter(|_| !placed[group]) {
                Some(need) => stack.push(need),
                None => {
                    if !std::mem::replace(&mut placed[group], true) {
                        ordered.push(group);
                    }
                    stack.pop();
                }
            }
        }
    }
    let mut schedule = Vec::with_capacity(groups.len());
    for region in Region::ALL {
        let members = ordered.iter().filter(|&&group| groups[group].region == region);
        schedule.extend(members.map(|&group| Item::Group(group)));
        for (position, (_, id)) in graph.outputs().iter().enumerate() {
            let direct = placement.direct_outputs.get(id) == Some(&position);
            if graph.node(*id).region == region && !direct {
                schedule.push(Item::Output(position));
            }
        }
    }
    schedule.extend(placement.copied.iter().map(|&(leaf, value)| Item::Next(leaf, value)));
    schedule
}
