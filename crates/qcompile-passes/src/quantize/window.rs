//! The windows of a graph: connected parts that only move, round or scale values, each with its own e-graph.

use super::extract::{Extraction, Forms};
use super::language::{Fact, Facts, Leaf, Parameters, Term};
use super::rules::rules;
use super::scale::amax_operand;
use crate::PassError;
use egg::{EGraph, Id, Rewrite, Runner, SimpleScheduler, StopReason};
use qcompile_ir::{BinaryOp, DType, Graph, NodeId, Op, ReduceOp, UnaryOp};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// An e-graph stops growing at this many terms.
const NODE_LIMIT: usize = 50_000;
/// Larger windows stay as they are: the choice of the cheapest forms takes time by the square of their size.
const WINDOW_LIMIT: usize = 2_000;
/// Rules are tried at most this often.
const ITERATION_LIMIT: usize = 30;

/// What [`optimise`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moves {
    /// Windows that hold a `quantize`, a `dequantize` or a cast between floats.
    pub windows: usize,
    /// Values that are computed in another way than before.
    pub changed: usize,
    /// Windows whose e-graph met a limit before all rules were applied everywhere. What was found there is still
    /// exact, but may not be the cheapest.
    pub unsaturated: usize,
}

/// Moves, merges and cancels `quantize`, `dequantize`, casts, transposes and reshapes in all regions, by the rules of
/// docs/quantization.md. All values that are used elsewhere keep their bits. Call after `differentiate`.
///
/// # Errors
/// [`PassError::Graph`], a defect of this pass.
pub fn optimise(graph: &mut Graph) -> Result<Moves, PassError> {
    optimise_by(graph, &rules())
}

/// [`optimise`] by these rules only.
pub(super) fn optimise_by(
    graph: &mut Graph,
    rules: &[Rewrite<Term, Facts>],
) -> Result<Moves, PassError> {
    let mut moves = Moves::default();
    graph.sweep();
    for window in windows(graph) {
        moves.windows += 1;
        if window.nodes.len() > WINDOW_LIMIT {
            moves.unsaturated += 1;
            continue;
        }
        window.optimise(graph, rules, &mut moves)?;
    }
    graph.sweep();
    Ok(moves)
}

/// The operands of a node as a term, if it is one.
fn term_operands(graph: &Graph, id: NodeId) -> Option<Vec<NodeId>> {
    if let Some(x) = amax_operand(graph, id) {
        return Some(vec![x]);
    }
    let node = graph.node(id);
    let operands = graph.operands(id);
    let small = node.ty.dtype == DType::F32 && node.ty.shape.rank() <= 1;
    let movable = match &node.op {
        Op::Unary(UnaryOp::Relu)
        | Op::Reshape(_)
        | Op::Transpose(_)
        | Op::Slice { .. }
        | Op::MaxPool2d(_)
        | Op::Quantize { .. }
        | Op::Dequantize { .. } => true,
        Op::Cast(_) => is_float_cast(graph, id),
        Op::Concat { .. } => operands.len() > 1,
        // The arithmetic of scales.
        Op::Binary(BinaryOp::Div | BinaryOp::Max) => small,
        _ => false,
    };
    movable.then_some(operands)
}

/// Whether it converts a float to a float.
fn is_float_cast(graph: &Graph, id: NodeId) -> bool {
    matches!(graph.op(id), Op::Cast(to) if to.is_float())
        && graph.ty(graph.operand(id, 0)).dtype.is_float()
}

/// Nodes of one window in graph order, each with the operands of its term.
struct Window {
    nodes: Vec<NodeId>,
    operands: BTreeMap<NodeId, Vec<NodeId>>,
}

/// The windows that hold a rounding. Two nodes are in one window if one uses the other or both use
/// the same value that is not a constant.
fn windows(graph: &Graph) -> Vec<Window> {
    let order = graph.order();
    let movable: BTreeMap<NodeId, Vec<NodeId>> =
        order.iter().filter_map(|&id| Some((id, term_operands(graph, id)?))).collect();
    // Union-find over all nodes; the parent is never larger than the child.
    let mut parent: Vec<usize> = (0..graph.len()).collect();
    let find = |parent: &mut Vec<usize>, mut at: usize| {
        while parent[at] != at {
            parent[at] = parent[parent[at]];
            at = parent[at];
        }
        at
    };
    for (&id, operands) in &movable {
        for &operand in operands {
            if !matches!(graph.op(operand), Op::Const(_)) {
                let (a, b) = (find(&mut parent, id.index()), find(&mut parent, operand.index()));
                parent[a.max(b)] = a.min(b);
            }
        }
    }
    let mut members: BTreeMap<usize, Vec<NodeId>> = BTreeMap::new();
    for &id in order.iter().filter(|id| movable.contains_key(id)) {
        members.entry(find(&mut parent, id.index())).or_default().push(id);
    }
    let rounds = |&id: &NodeId| {
        matches!(graph.op(id), Op::Quantize { .. } | Op::Dequantize { .. })
            || is_float_cast(graph, id)
    };
    members
        .into_values()
        .filter(|nodes| nodes.iter().any(rounds))
        .map(|nodes| {
            let operands = nodes.iter().map(|id| (*id, movable[id].clone())).collect();
            Window { nodes, operands }
        })
        .collect()
}

impl Window {
    fn optimise(
        &self,
        graph: &mut Graph,
        rules: &[Rewrite<Term, Facts>],
        moves: &mut Moves,
    ) -> Result<(), PassError> {
        let mut terms = Terms::new(graph, &self.operands);
        for &id in &self.nodes {
            terms.add(graph, id, &self.operands[&id]);
        }
        let roots: Vec<NodeId> =
            self.nodes.iter().copied().filter(|&id| self.is_used_outside(graph, id)).collect();
        let Terms { egraph, classes, values, terms, .. } = terms;
        // The scheduler that tries every rule every time, so that nothing depends on how often one matched.
        let runner = Runner::default()
            .with_egraph(egraph)
            .with_scheduler(SimpleScheduler)
            .with_node_limit(NODE_LIMIT)
            .with_iter_limit(ITERATION_LIMIT)
            .with_time_limit(Duration::MAX)
            .run(rules);
        if !matches!(runner.stop_reason, Some(StopReason::Saturated)) {
            moves.unsaturated += 1;
        }
        let forms = Forms::new(&runner.egraph, &terms);
        let mut extraction =
            Extraction::new(&runner.egraph, &forms, &self.nodes, &values, &classes, &roots);
        for root in roots {
            let class = classes[&root];
            let region = graph.node(root).region;
            let new = match extraction.find(class) {
                Some(node) => Some(node),
                None => extraction.build(graph, class, region)?,
            };
            let Some(new) = new.filter(|&new| new != root) else { continue };
            // A replacement that the graph refuses (it would close a cycle) is not made.
            if graph.replace_uses(root, new).is_err() {
                extraction.set(class, root);
                continue;
            }
            moves.changed += 1;
            let origin = graph.node(root).note.origin.clone();
            let note = graph.note_mut(new);
            if note.origin.is_none() {
                note.origin = origin;
            }
        }
        Ok(())
    }

    /// Whether anything but terms of the window uses the node: then its value must be built.
    fn is_used_outside(&self, graph: &Graph, id: NodeId) -> bool {
        let inside: BTreeSet<NodeId> = graph
            .uses(id)
            .into_iter()
            .map(|(user, _)| amax_above(graph, user).unwrap_or(user))
            .filter(|user| self.operands.get(user).is_some_and(|operands| operands.contains(&id)))
            .collect();
        let outside = graph
            .uses(id)
            .into_iter()
            .any(|(user, _)| !inside.contains(&amax_above(graph, user).unwrap_or(user)));
        outside
            || graph.outputs().iter().any(|(_, output)| *output == id)
            || graph.next().values().any(|value| *value == id)
    }
}

/// The amax whose magnitudes `id` computes, if it does nothing else.
fn amax_above(graph: &Graph, id: NodeId) -> Option<NodeId> {
    if *graph.op(id) != Op::Unary(UnaryOp::Abs) {
        return None;
    }
    let only_user = |id: NodeId| match graph.uses(id)[..] {
        [(user, _)] if !graph.outputs().iter().any(|(_, output)| *output == id) => Some(user),
        _ => None,
    };
    let reduce = only_user(id)?;
    let head = only_user(reduce)?;
    let max = matches!(graph.op(reduce), Op::Reduce { op: ReduceOp::Max, .. });
    (max && amax_operand(graph, head).is_some()).then_some(head)
}

/// An e-graph in the making.
struct Terms<'w> {
    egraph: EGraph<Term, Facts>,
    classes: BTreeMap<NodeId, Id>,
    values: Vec<NodeId>,
    terms: Vec<Term>,
    inside: &'w BTreeMap<NodeId, Vec<NodeId>>,
}

impl<'w> Terms<'w> {
    fn new(graph: &Graph, inside: &'w BTreeMap<NodeId, Vec<NodeId>>) -> Terms<'w> {
        let mut values: Vec<NodeId> =
            inside.values().flatten().copied().filter(|id| !inside.contains_key(id)).collect();
        values.sort_unstable();
        values.dedup();
        let facts = values.iter().map(|&id| value_fact(graph, id)).collect();
        let mut egraph = EGraph::new(Facts { values: facts });
        let classes = values
            .iter()
            .enumerate()
            .map(|(index, &id)| (id, egraph.add(Term::Leaf(Leaf::Value(index)))))
            .collect();
        Terms { egraph, classes, values, terms: Vec::new(), inside }
    }

    /// Adds a node whose operands are there.
    fn add(&mut self, graph: &Graph, id: NodeId, operands: &[NodeId]) {
        let class = |at: usize| self.classes[&operands[at]];
        let term = if amax_operand(graph, id).is_some() {
            Term::Amax([class(0)])
        } else {
            match graph.op(id) {
                Op::Unary(_) => Term::Relu([class(0)]),
                Op::Reshape(shape) => {
                    let (x, shape) = (class(0), Leaf::Shape(shape.clone()));
                    Term::Reshape([x, self.leaf(shape)])
                }
                Op::Transpose(axes) => {
                    let (x, axes) = (class(0), Leaf::Permutation(axes.clone()));
                    Term::Transpose([x, self.leaf(axes)])
                }
                &Op::Slice { axis, start, end, step } => {
                    let x = class(0);
                    Term::Slice([x, self.leaf(Leaf::Slice([axis, start, end, step]))])
                }
                &Op::Concat { axis } => return self.add_concat(id, operands, axis),
                &Op::Quantize { dtype, axis } => {
                    let (x, parameters) = (class(0), self.parameters(&operands[1..], axis));
                    Term::Quantize([x, parameters, self.leaf(Leaf::Type(dtype))])
                }
                &Op::Dequantize { axis } => {
                    let q = class(0);
                    Term::Dequantize([q, self.parameters(&operands[1..], axis)])
                }
                &Op::Cast(dtype) => {
                    let x = class(0);
                    Term::Cast([x, self.leaf(Leaf::Type(dtype))])
                }
                &Op::MaxPool2d(geometry) => {
                    let x = class(0);
                    Term::MaxPool([x, self.leaf(Leaf::Pool(geometry))])
                }
                Op::Binary(BinaryOp::Div) => Term::Div([class(0), class(1)]),
                _ => Term::Max([class(0), class(1)]),
            }
        };
        self.insert(id, term);
    }

    /// A concat of many as nested concats of two.
    fn add_concat(&mut self, id: NodeId, operands: &[NodeId], axis: usize) {
        let axis = self.leaf(Leaf::Axis(axis));
        let mut joined = self.classes[&operands[0]];
        for operand in &operands[1..] {
            self.insert(id, Term::Concat([joined, self.classes[operand], axis]));
            joined = self.classes[&id];
        }
    }

    /// A scale, and perhaps a zero point.
    fn parameters(&mut self, operands: &[NodeId], axis: Option<usize>) -> Id {
        let scale = self.classes[&operands[0]];
        let zero_point = operands.get(1).map(|id| self.classes[id]);
        let term = Parameters { scale, zero_point, axis }.term(&mut self.egraph);
        self.egraph.add(term)
    }

    fn leaf(&mut self, leaf: Leaf) -> Id {
        self.egraph.add(Term::Leaf(leaf))
    }

    fn insert(&mut self, id: NodeId, term: Term) {
        debug_assert!(self.inside.contains_key(&id), "only nodes of the window become terms");
        self.terms.push(term.clone());
        let class = self.egraph.add(term);
        self.classes.insert(id, class);
    }
}

/// What is known of a value from outside.
fn value_fact(graph: &Graph, id: NodeId) -> Fact {
    Fact {
        ty: Some(graph.ty(id).clone()),
        positive: is_positive(graph, id),
        in_range: matches!(graph.op(id), Op::Quantize { .. }) && graph.operands(id).len() == 2,
        ..Fact::default()
    }
}

/// Whether the value is a constant, perhaps reshaped, of normal numbers above 0, or held above such.
pub(super) fn is_positive(graph: &Graph, mut id: NodeId) -> bool {
    loop {
        match graph.op(id) {
            Op::Const(tensor) => {
                return tensor.dtype() == DType::F32
                    && tensor.to_f32().iter().all(|value| value.is_normal() && *value > 0.0);
            }
            Op::Reshape(_) | Op::Broadcast(_) => id = graph.operand(id, 0),
            Op::Binary(BinaryOp::Max) => id = graph.operand(id, 1),
            _ => return false,
        }
    }
}
