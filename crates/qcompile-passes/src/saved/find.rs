//! Which forward values the backward region reads, and how each is saved.

use super::{Format, Rule};
use crate::PassError;
use crate::quantize::matches;
use qcompile_ir::{BinaryOp, DType, Graph, NodeId, Op, Region, UnaryOp};
use std::collections::{BTreeMap, BTreeSet};

/// The pass's word in errors.
pub(super) const PASS: &str = "saved";

/// Fewer elements for each sample are not worth a block.
const FEW: usize = 32;
/// A value this many times smaller than another costs nothing beside it.
const SMALL: usize = 16;

/// How a value is saved that the backward region reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Treatment {
    /// As it is.
    Plain,
    /// In this format.
    Stored(Format),
    /// Not at all: it is made again from what is restored.
    MadeAgain,
}

/// What is read.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Values that views lead to, by node.
    pub(super) values: BTreeMap<NodeId, Treatment>,
    /// Comparisons that the backward region reads.
    pub(super) masks: BTreeSet<NodeId>,
}

impl Found {
    /// Whether the backward region reads something else in its place.
    pub(super) fn is_read_restored(&self, id: NodeId) -> bool {
        let treatment = self.values.get(&id);
        self.masks.contains(&id) || treatment.is_some_and(|one| *one != Treatment::Plain)
    }
}

/// Whether a forward node only shows another value: its elements in other places, or widened.
pub(super) fn is_view(graph: &Graph, id: NodeId) -> bool {
    let node = graph.node(id);
    node.region == Region::Forward
        && match node.op {
            Op::Reshape(_) | Op::Transpose(_) | Op::Slice { .. } | Op::Broadcast(_) => true,
            Op::Cast(DType::F32) => {
                matches!(graph.ty(graph.operand(id, 0)).dtype, DType::BF16 | DType::F16)
            }
            _ => false,
        }
}

/// The value that views show.
pub(super) fn base(graph: &Graph, mut id: NodeId) -> NodeId {
    while is_view(graph, id) {
        id = graph.operand(id, 0);
    }
    id
}

/// Elementwise values of the backward region that are made of forward values alone (slopes): nothing holds them back,
/// so they would be computed, and kept, long before somebody needs them.
pub(crate) fn late(graph: &Graph, order: &[NodeId]) -> BTreeSet<NodeId> {
    let mut late = BTreeSet::new();
    for &id in order.iter().filter(|id| graph.node(**id).region == Region::Backward) {
        let elementwise = matches!(
            graph.op(id),
            Op::Unary(_)
                | Op::Binary(_)
                | Op::Compare(_)
                | Op::Select
                | Op::Cast(_)
                | Op::Reshape(_)
                | Op::Transpose(_)
                | Op::Broadcast(_)
                | Op::Slice { .. }
        );
        let free = |of: &NodeId| graph.node(*of).region == Region::Forward || late.contains(of);
        if elementwise && graph.operands(id).iter().all(free) {
            late.insert(id);
        }
    }
    late
}

/// Makes comparisons of forward values in the forward region: of a value that is rounded, they would come out
/// otherwise.
pub(super) fn hoist_comparisons(graph: &mut Graph, rules: &[Rule]) -> Result<(), PassError> {
    for id in graph.order() {
        let node = graph.node(id);
        if node.region != Region::Backward || !matches!(node.op, Op::Compare(_)) {
            continue;
        }
        let of_saved = |operand: NodeId| {
            let base = base(graph, operand);
            rules.iter().any(|rule| fits(graph, rule, base))
        };
        if !graph.operands(id).into_iter().any(of_saved) {
            continue;
        }
        let (op, name) = (node.op.clone(), node.name.clone());
        let mut operands = Vec::new();
        for operand in graph.operands(id) {
            operands.extend(forward(graph, operand)?);
        }
        if operands.len() == 2 {
            let new = graph.add(op, &operands, name, Region::Forward)?;
            graph.replace_uses(id, new)?;
        }
    }
    Ok(())
}

/// A value in the forward region: itself, or what a broadcast or reshape of the backward region shows.
fn forward(graph: &mut Graph, id: NodeId) -> Result<Option<NodeId>, PassError> {
    let mut chain = Vec::new();
    let mut at = id;
    while graph.node(at).region != Region::Forward {
        if !matches!(graph.op(at), Op::Broadcast(_) | Op::Reshape(_)) {
            return Ok(None);
        }
        chain.push(at);
        at = graph.operand(at, 0);
    }
    for view in chain.into_iter().rev() {
        let (op, name) = (graph.op(view).clone(), graph.node(view).name.clone());
        at = graph.add(op, &[at], name, Region::Forward)?;
    }
    Ok(Some(at))
}

/// Whether a node takes only the value that was there: not one near it.
fn needs_exact(op: &Op, position: usize) -> bool {
    match op {
        Op::Compare(_)
        | Op::TopK { .. }
        | Op::Gather
        | Op::Scatter { .. }
        | Op::Quantize { .. }
        | Op::StraightThrough { .. }
        | Op::Recurrence(_)
        | Op::RecurrenceGrad { .. }
        | Op::CrossEntropy
        | Op::CrossEntropyGrad => true,
        Op::Reduce { op, .. } => *op == qcompile_ir::ReduceOp::Max,
        Op::MaxPool2d(_) | Op::MaxPool2dGrad(_) => position == 0,
        Op::Select => position == 0,
        Op::Cast(to) => !to.is_float(),
        Op::Unary(op) => matches!(
            op,
            UnaryOp::Floor | UnaryOp::Ceil | UnaryOp::Round | UnaryOp::Sign | UnaryOp::Not
        ),
        Op::Binary(op) => matches!(op, BinaryOp::Max | BinaryOp::Min),
        _ => false,
    }
}

/// Every forward value that the backward region reads, and what becomes of it.
pub(super) fn find(graph: &Graph, rules: &[Rule]) -> Result<Found, PassError> {
    let mut found = Found::default();
    let mut uses: BTreeMap<NodeId, Vec<(NodeId, usize)>> = BTreeMap::new();
    for id in graph.ids().filter(|id| graph.node(*id).region == Region::Backward) {
        for (position, operand) in graph.operands(id).into_iter().enumerate() {
            let base = base(graph, operand);
            let node = graph.node(base);
            if node.region == Region::Forward && !node.op.is_leaf() {
                uses.entry(base).or_default().push((id, position));
            }
        }
    }
    let kept: BTreeSet<NodeId> = graph.outputs().iter().map(|(_, id)| base(graph, *id)).collect();
    let mut matched = vec![false; rules.len()];
    for id in graph.order() {
        let Some(users) = uses.get(&id) else { continue };
        let ty = graph.ty(id);
        let per_sample = ty.shape.elements().filter(|elements| elements.batch);
        let Some(per_sample) = per_sample.map(|elements| elements.scale) else { continue };
        if ty.dtype == DType::Bool {
            // What is saved as it is can be compared again.
            let plain =
                |operand| found.values.get(&base(graph, operand)) == Some(&Treatment::Plain);
            let compares = matches!(graph.op(id), Op::Compare(_));
            if compares && graph.operands(id).into_iter().any(plain) {
                continue;
            }
            if compares && per_sample >= FEW {
                found.masks.insert(id);
            } else {
                found.values.insert(id, Treatment::Plain);
            }
            continue;
        }
        if matches!(graph.op(id), Op::Dequantize { .. }) {
            // Its codes are smaller than itself, and it comes out the same again.
            found.values.insert(base(graph, graph.operand(id, 0)), Treatment::Plain);
            found.values.insert(id, Treatment::MadeAgain);
            continue;
        }
        let exact = users.iter().any(|(user, position)| needs_exact(graph.op(*user), *position));
        let wide = ty.dtype.is_float() && per_sample >= FEW && !kept.contains(&id);
        let mut treatment = Treatment::Plain;
        if !exact && wide {
            if is_made_of_restored(graph, &found, id) {
                treatment = Treatment::MadeAgain;
            } else if let Some(at) = rules.iter().rposition(|rule| fits(graph, rule, id)) {
                for (matched, rule) in matched.iter_mut().zip(rules) {
                    *matched |= fits(graph, rule, id);
                }
                let format = rules[at].format;
                let gains = format.float().is_none() || ty.dtype == DType::F32;
                if gains {
                    treatment = Treatment::Stored(format);
                }
            }
        }
        found.values.insert(id, treatment);
    }
    for (rule, matched) in rules.iter().zip(matched) {
        if let Some(pattern) = rule.pattern.as_ref().filter(|_| !matched) {
            let reason = format!(
                "no saved value that can be compressed matches `{pattern}`, which is to be saved in {}",
                rule.format.name()
            );
            return Err(PassError::Unsupported { pass: PASS, reason });
        }
    }
    Ok(found)
}

/// Whether the rule is for this value: its name, or that of the ONNX node it came from.
fn fits(graph: &Graph, rule: &Rule, id: NodeId) -> bool {
    let node = graph.node(id);
    rule.pattern.as_ref().is_none_or(|pattern| {
        matches(pattern, node.name.as_str())
            || node.note.origin.as_ref().is_some_and(|origin| matches(pattern, origin))
    })
}

/// Whether a value is a sum, product or quotient of restored values or inputs, and small ones.
fn is_made_of_restored(graph: &Graph, found: &Found, id: NodeId) -> bool {
    let arithmetic = matches!(
        graph.op(id),
        Op::Unary(UnaryOp::Neg)
            | Op::Binary(BinaryOp::Add | BinaryOp::Sub | BinaryOp::Mul | BinaryOp::Div)
    );
    let elements = |id: NodeId| graph.ty(id).shape.elements().map_or(0, |e| e.size(SMALL));
    let mut large = 0;
    let operands = graph.operands(id);
    let fit = operands.iter().all(|&operand| {
        let base = base(graph, operand);
        // An input stays there for the whole step.
        let there = matches!(graph.op(base), Op::Input(_)) && elements(base) == elements(id);
        if there || found.is_read_restored(base) {
            large += 1;
            return true;
        }
        graph.op(base).is_leaf() || elements(base) * SMALL <= elements(id)
    });
    arithmetic && fit && large > 0
}
