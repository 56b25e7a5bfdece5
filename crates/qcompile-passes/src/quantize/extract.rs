//! Chooses the cheapest form of every value of a window and builds it.
//!
//! The cost of a term is the bytes that it reads and writes at batch size 64; at equal bytes the form that the graph
//! has already wins. Values needed outside are built one after the other in graph order, and what is built costs
//! nothing to those after it: so a value with many users is paid for once. That is greedy, not optimal, and takes
//! time linear in the values needed times the size of the e-graph.

use super::language::{Facts, Leaf, Term};
use super::scale;
use crate::PassError;
use egg::{EGraph, Id, Language};
use qcompile_ir::{DType, Graph, NodeId, Op, Region, TensorType};
use std::collections::{BTreeMap, BTreeSet};

/// The batch size that costs are computed for.
const BATCH: usize = 64;

/// Bytes, then number of terms that the graph does not have.
type Cost = (u64, u64);

/// A saturated e-graph with what is built of it.
pub(super) struct Extraction<'e> {
    egraph: &'e EGraph<Term, Facts>,
    /// Terms that the graph had, with canonical children.
    originals: BTreeSet<Term>,
    /// Nodes of the window, for reuse.
    nodes: &'e [NodeId],
    /// Graph nodes of the values from outside.
    values: &'e [NodeId],
    /// The first node of the window in each class: what is built for the class takes its name.
    namesakes: BTreeMap<Id, NodeId>,
    /// What each class is in the graph.
    built: BTreeMap<Id, NodeId>,
}

impl<'e> Extraction<'e> {
    /// Nothing built yet but values from outside; `terms` are those the graph had, `classes` those of its nodes.
    pub(super) fn new(
        egraph: &'e EGraph<Term, Facts>,
        terms: &[Term],
        nodes: &'e [NodeId],
        values: &'e [NodeId],
        classes: &BTreeMap<NodeId, Id>,
    ) -> Extraction<'e> {
        let canonical = |term: &Term| term.clone().map_children(|id| egraph.find(id));
        let originals = terms.iter().map(canonical).collect();
        let mut namesakes = BTreeMap::new();
        for &node in nodes {
            namesakes.entry(egraph.find(classes[&node])).or_insert(node);
        }
        Extraction { egraph, originals, nodes, values, namesakes, built: BTreeMap::new() }
    }

    /// The node of this class, if it is built.
    pub(super) fn find(&self, class: Id) -> Option<NodeId> {
        self.built.get(&self.egraph.find(class)).copied()
    }

    /// Says that the class is this node, whatever was built for it.
    pub(super) fn set(&mut self, class: Id, node: NodeId) {
        self.built.insert(self.egraph.find(class), node);
    }

    /// Builds the cheapest form of a class; new nodes belong to `region`.
    pub(super) fn build(
        &mut self,
        graph: &mut Graph,
        class: Id,
        region: Region,
    ) -> Result<Option<NodeId>, PassError> {
        let root = self.egraph.find(class);
        let best = self.cheapest();
        let mut stack = vec![root];
        while let Some(&class) = stack.last() {
            if self.built.contains_key(&class) {
                stack.pop();
                continue;
            }
            let Some((_, term)) = best.get(&class) else { return Ok(None) };
            let operands = self.operands(term, &best);
            let waiting = operands.iter().filter(|id| !self.built.contains_key(id));
            let before = stack.len();
            stack.extend(waiting.copied());
            if stack.len() > before {
                continue;
            }
            let operands: Vec<NodeId> = operands.iter().map(|id| self.built[id]).collect();
            let before = graph.len();
            let Some(node) = self.node(graph, term, &operands, region)? else { return Ok(None) };
            if graph.len() > before
                && !matches!(term, Term::Amax(_))
                && let Some(&old) = self.namesakes.get(&class)
            {
                graph.swap_names(old, node);
            }
            self.built.insert(class, node);
            stack.pop();
        }
        Ok(self.find(root))
    }

    /// The cheapest term of every class that can be built, by its cost with all it needs. Every term but a leaf
    /// costs more than nothing, so the choice has no cycles.
    fn cheapest(&self) -> BTreeMap<Id, (Cost, &'e Term)> {
        let mut best: BTreeMap<Id, (Cost, &Term)> = BTreeMap::new();
        loop {
            let mut changed = false;
            for class in self.egraph.classes() {
                if class.data.ty.is_none() || self.built.contains_key(&class.id) {
                    continue;
                }
                for term in &class.nodes {
                    let Some(cost) = self.cost(term, class.data.ty.as_ref(), &best) else {
                        continue;
                    };
                    if best.get(&class.id).is_none_or(|(least, _)| cost < *least) {
                        best.insert(class.id, (cost, term));
                        changed = true;
                    }
                }
            }
            if !changed {
                return best;
            }
        }
    }

    /// The cost of a term with all it needs, as far as its operands have one.
    fn cost(
        &self,
        term: &Term,
        ty: Option<&TensorType>,
        best: &BTreeMap<Id, (Cost, &Term)>,
    ) -> Option<Cost> {
        if matches!(term, Term::Leaf(_)) {
            return Some((0, 0));
        }
        let new = u64::from(!self.originals.contains(term));
        let mut cost = (own_cost(self.egraph, term, ty?), new);
        for id in term.operands() {
            let id = self.egraph.find(*id);
            if !self.built.contains_key(&id) {
                let (bytes, terms) = best.get(&id)?.0;
                cost = (cost.0.saturating_add(bytes), cost.1.saturating_add(terms));
            }
        }
        Some(cost)
    }

    /// Classes of the operands of the op that is built for a term: nested concats are one op.
    fn operands(&self, term: &Term, best: &BTreeMap<Id, (Cost, &'e Term)>) -> Vec<Id> {
        let canonical = |ids: &[Id]| ids.iter().map(|&id| self.egraph.find(id)).collect();
        let mut operands: Vec<Id> = canonical(term.operands());
        let &Term::Concat([_, _, axis]) = term else { return operands };
        let mut tail = Vec::new();
        loop {
            let first = operands[0];
            let nested = match best.get(&first) {
                Some((_, Term::Concat([a, b, inner])))
                    if !self.built.contains_key(&first)
                        && self.egraph.find(*inner) == self.egraph.find(axis) =>
                {
                    [*a, *b]
                }
                _ => break,
            };
            tail.extend(operands.drain(1..).rev());
            operands = canonical(&nested);
        }
        operands.extend(tail.into_iter().rev());
        operands
    }

    /// The node for a term over built operands: one that the window has, else a new one.
    fn node(
        &self,
        graph: &mut Graph,
        term: &Term,
        operands: &[NodeId],
        region: Region,
    ) -> Result<Option<NodeId>, PassError> {
        match term {
            Term::Leaf(Leaf::Value(index)) => return Ok(self.values.get(*index).copied()),
            Term::Leaf(_) => return Ok(None),
            Term::Amax(_) => {
                let held = self.nodes.iter().copied().find(|&node| {
                    graph.node(node).region <= region
                        && scale::amax_operand(graph, node).is_some_and(|x| [x] == operands[..])
                });
                return match held {
                    Some(node) => Ok(Some(node)),
                    None => scale::amax(graph, operands[0], None, region).map(Some),
                };
            }
            _ => {}
        }
        let attribute = |id: Id| self.egraph[id].data.attribute.as_ref();
        let Some(op) = term.op(attribute) else { return Ok(None) };
        let held = self.nodes.iter().copied().find(|&node| {
            graph.node(node).region <= region
                && *graph.op(node) == op
                && graph.operands(node) == operands
        });
        if held.is_some() {
            return Ok(held);
        }
        let suffix = match op {
            Op::Quantize { .. } => "q",
            Op::Dequantize { .. } => "dq",
            _ => op.name(),
        };
        let name = format!("{}.{suffix}", graph.node(operands[0]).name.as_str());
        Ok(Some(graph.add(op, operands, name, region)?))
    }
}

/// Bytes that one term reads and writes. A reshape moves nothing: it costs less the smaller its elements are, so that
/// a `dequantize` ends up next to the product that takes it in.
fn own_cost(egraph: &EGraph<Term, Facts>, term: &Term, ty: &TensorType) -> u64 {
    if matches!(term, Term::Reshape(_)) {
        return ty.dtype.size() as u64;
    }
    let read = term.operands().iter().filter_map(|&id| egraph[id].data.ty.as_ref());
    read.map(bytes).fold(bytes(ty), u64::saturating_add).max(1)
}

fn bytes(ty: &TensorType) -> u64 {
    debug_assert!(ty.dtype.size() <= DType::I64.size());
    let elements = ty.shape.elements().map_or(usize::MAX, |dim| dim.size(BATCH));
    elements.saturating_mul(ty.dtype.size()) as u64
}
