//! Chooses the cheapest forms of the values of a window and builds them.
//!
//! The cost of a term is the bytes that it reads and writes at batch size 64; at equal bytes the form that the graph
//! has already wins. A value is paid for once, however many use it: the cost of a choice is that of a DAG, not of
//! trees. Finding the cheapest DAG is NP-hard (Stepp 2011, section 5.3), so the choice is made greedily, value after
//! value, what is chosen costing nothing to those after it; then every value that several forms could share is tried
//! as one that is there from the beginning, and stays if that makes the whole cheaper. The number of trials is
//! limited by work, not by time, so that equal input gives equal output.

use super::language::{Facts, Leaf, Term};
use super::scale;
use crate::PassError;
use egg::{EGraph, Id, Language};
use qcompile_ir::{DType, Graph, NodeId, Op, Region, TensorType};
use std::collections::{BTreeMap, BTreeSet};

/// The batch size that costs are computed for.
const BATCH: usize = 64;

/// Forms that are looked at while values are tried as shared ones.
const WORK_LIMIT: usize = 4_000_000;

/// Bytes, then number of terms that the graph does not have.
type Cost = (u64, u64);

fn plus(a: Cost, b: Cost) -> Cost {
    (a.0.saturating_add(b.0), a.1.saturating_add(b.1))
}

/// One way to compute a value.
struct Form<'e> {
    term: &'e Term,
    /// What it costs by itself.
    cost: Cost,
    /// The values that it needs.
    operands: Vec<usize>,
}

/// Every way to compute the values of an e-graph; values are numbered in ascending order of their classes.
pub(super) struct Forms<'e> {
    numbers: BTreeMap<Id, usize>,
    forms: Vec<Vec<Form<'e>>>,
}

/// Which form each value that is needed has.
#[derive(Clone, Default)]
struct Selection {
    chosen: Vec<Option<usize>>,
    cost: Cost,
    /// Forms that were looked at.
    work: usize,
}

impl<'e> Forms<'e> {
    /// The forms of an e-graph that began with these terms.
    pub(super) fn new(egraph: &'e EGraph<Term, Facts>, terms: &[Term]) -> Forms<'e> {
        let canonical = |term: &Term| term.clone().map_children(|id| egraph.find(id));
        let originals: BTreeSet<Term> = terms.iter().map(canonical).collect();
        let mut classes: Vec<_> =
            egraph.classes().filter(|class| class.data.ty.is_some()).collect();
        classes.sort_by_key(|class| class.id);
        let numbers: BTreeMap<Id, usize> =
            classes.iter().enumerate().map(|(at, class)| (class.id, at)).collect();
        let form = |term: &'e Term, ty: &TensorType| {
            let operands = term.operands(egraph).into_iter();
            let operands: Option<Vec<usize>> =
                operands.map(|id| numbers.get(&egraph.find(id)).copied()).collect();
            let new = u64::from(!originals.contains(term) && !term.is_leaf());
            Some(Form { term, cost: (own_cost(egraph, term, ty), new), operands: operands? })
        };
        let forms = classes
            .iter()
            .map(|class| {
                let ty = class.data.ty.iter();
                ty.flat_map(|ty| class.nodes.iter().filter_map(|term| form(term, ty))).collect()
            })
            .collect();
        Forms { numbers, forms }
    }

    /// The cheapest forms found for these values and all that they need.
    fn cheapest(&self, roots: &[usize]) -> Selection {
        let mut best = self.select(&[], roots);
        let mut shared: Vec<usize> = Vec::new();
        let mut left = WORK_LIMIT;
        let candidates = self.candidates(roots);
        loop {
            let before = best.cost;
            for &candidate in &candidates {
                if best.chosen[candidate].is_some() || left == 0 {
                    continue;
                }
                let trial = self.select(&[shared.as_slice(), &[candidate]].concat(), roots);
                left = left.saturating_sub(trial.work);
                if trial.cost < best.cost {
                    shared.push(candidate);
                    best = trial;
                }
            }
            // One that helped may help no longer.
            for at in (0..shared.len()).rev() {
                let mut fewer = shared.clone();
                fewer.remove(at);
                let trial = self.select(&fewer, roots);
                left = left.saturating_sub(trial.work);
                if trial.cost <= best.cost {
                    shared = fewer;
                    best = trial;
                }
            }
            if best.cost == before || left == 0 {
                return best;
            }
        }
    }

    /// Values that forms of several others need, what is needed first.
    fn candidates(&self, roots: &[usize]) -> Vec<usize> {
        let mut users = vec![0_usize; self.forms.len()];
        let reached = self.reached(roots, &[]);
        for &value in &reached {
            let mut needed: Vec<usize> =
                self.forms[value].iter().flat_map(|form| form.operands.iter().copied()).collect();
            needed.sort_unstable();
            needed.dedup();
            for operand in needed {
                users[operand] += 1;
            }
        }
        let is_computed = |value: usize| !self.forms[value].iter().any(|form| form.term.is_leaf());
        reached.into_iter().filter(|&value| users[value] > 1 && is_computed(value)).collect()
    }

    /// The values that forms of these may need and that are not chosen, operands before users as far as there is such
    /// an order.
    fn reached(&self, roots: &[usize], chosen: &[Option<usize>]) -> Vec<usize> {
        let mut seen = vec![false; self.forms.len()];
        let mut order = Vec::new();
        let is_chosen = |value: usize| chosen.get(value).is_some_and(Option::is_some);
        let mut stack: Vec<(usize, bool)> = roots.iter().rev().map(|&root| (root, false)).collect();
        while let Some((value, done)) = stack.pop() {
            if done {
                order.push(value);
                continue;
            }
            if is_chosen(value) || std::mem::replace(&mut seen[value], true) {
                continue;
            }
            stack.push((value, true));
            let operands = self.forms[value].iter().flat_map(|form| &form.operands);
            stack.extend(operands.map(|&operand| (operand, false)));
        }
        order
    }

    /// Chooses value after value the form that is cheapest with all that it needs, what is chosen costing nothing.
    /// Every form but a leaf costs something, so a choice has no cycles.
    fn select(&self, shared: &[usize], roots: &[usize]) -> Selection {
        let mut selection =
            Selection { chosen: vec![None; self.forms.len()], ..Selection::default() };
        let mut best: Vec<Option<(Cost, usize)>> = vec![None; self.forms.len()];
        for &root in shared.iter().chain(roots) {
            if selection.chosen[root].is_some() {
                continue;
            }
            let reached = self.reached(&[root], &selection.chosen);
            for &value in &reached {
                best[value] = None;
            }
            loop {
                let mut changed = false;
                for &value in &reached {
                    selection.work += self.forms[value].len();
                    for (at, form) in self.forms[value].iter().enumerate() {
                        let Some(cost) = cost(form, &best, &selection.chosen) else { continue };
                        if best[value].is_none_or(|(least, _)| cost < least) {
                            best[value] = Some((cost, at));
                            changed = true;
                        }
                    }
                }
                if !changed {
                    break;
                }
            }
            let mut stack = vec![root];
            while let Some(value) = stack.pop() {
                if selection.chosen[value].is_some() {
                    continue;
                }
                let Some((_, at)) = best[value] else { continue };
                selection.chosen[value] = Some(at);
                let form = &self.forms[value][at];
                selection.cost = plus(selection.cost, form.cost);
                stack.extend(&form.operands);
            }
        }
        selection
    }
}

/// The cost of a form with all it needs, as far as its operands have one.
fn cost(form: &Form<'_>, best: &[Option<(Cost, usize)>], chosen: &[Option<usize>]) -> Option<Cost> {
    form.operands.iter().try_fold(form.cost, |sum, &operand| match chosen[operand] {
        Some(_) => Some(sum),
        None => best[operand].map(|(cost, _)| plus(sum, cost)),
    })
}

/// A saturated e-graph with what is built of it.
pub(super) struct Extraction<'e> {
    egraph: &'e EGraph<Term, Facts>,
    /// The term that is built for each class.
    chosen: BTreeMap<Id, &'e Term>,
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
    /// Nothing built yet; the cheapest forms are chosen for the values `roots` of the window, whose nodes are in
    /// `classes`.
    pub(super) fn new(
        egraph: &'e EGraph<Term, Facts>,
        forms: &Forms<'e>,
        nodes: &'e [NodeId],
        values: &'e [NodeId],
        classes: &BTreeMap<NodeId, Id>,
        roots: &[NodeId],
    ) -> Extraction<'e> {
        let number = |node: &NodeId| forms.numbers.get(&egraph.find(classes[node])).copied();
        let roots: Vec<usize> = roots.iter().filter_map(number).collect();
        let selection = forms.cheapest(&roots);
        let chosen = forms.numbers.iter().filter_map(|(&id, &value)| {
            selection.chosen[value].map(|at| (id, forms.forms[value][at].term))
        });
        let mut namesakes = BTreeMap::new();
        for &node in nodes {
            namesakes.entry(egraph.find(classes[&node])).or_insert(node);
        }
        let (chosen, built) = (chosen.collect(), BTreeMap::new());
        Extraction { egraph, chosen, nodes, values, namesakes, built }
    }

    /// The node of this class, if it is built.
    pub(super) fn find(&self, class: Id) -> Option<NodeId> {
        self.built.get(&self.egraph.find(class)).copied()
    }

    /// Says that the class is this node, whatever was built for it.
    pub(super) fn set(&mut self, class: Id, node: NodeId) {
        self.built.insert(self.egraph.find(class), node);
    }

    /// Builds the chosen form of a class; new nodes belong to `region`.
    pub(super) fn build(
        &mut self,
        graph: &mut Graph,
        class: Id,
        region: Region,
    ) -> Result<Option<NodeId>, PassError> {
        let root = self.egraph.find(class);
        let mut stack = vec![root];
        while let Some(&class) = stack.last() {
            if self.built.contains_key(&class) {
                stack.pop();
                continue;
            }
            let Some(&term) = self.chosen.get(&class) else { return Ok(None) };
            let operands = self.operands(term);
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

    /// Classes of the operands of the op that is built for a term: nested concats are one op.
    fn operands(&self, term: &Term) -> Vec<Id> {
        let canonical =
            |ids: Vec<Id>| -> Vec<Id> { ids.iter().map(|&id| self.egraph.find(id)).collect() };
        let mut operands = canonical(term.operands(self.egraph));
        let &Term::Concat([_, _, axis]) = term else { return operands };
        let mut tail = Vec::new();
        loop {
            let first = operands[0];
            let nested = match self.chosen.get(&first) {
                Some(Term::Concat([a, b, inner]))
                    if !self.built.contains_key(&first)
                        && self.egraph.find(*inner) == self.egraph.find(axis) =>
                {
                    vec![*a, *b]
                }
                _ => break,
            };
            tail.extend(operands.drain(1..).rev());
            operands = canonical(nested);
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
        let Some(op) = term.op(self.egraph) else { return Ok(None) };
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
            Op::Cast(dtype) => dtype.name(),
            _ => op.name(),
        };
        let name = format!("{}.{suffix}", graph.node(operands[0]).name.as_str());
        Ok(Some(graph.add(op, operands, name, region)?))
    }
}

/// Bytes that one term reads and writes. A relu is computed in registers by whoever reads or writes its value. A
/// reshape moves nothing: it costs less the smaller its elements are, so that a `dequantize` ends up next to the
/// product that takes it in. A slice reads what it takes.
fn own_cost(egraph: &EGraph<Term, Facts>, term: &Term, ty: &TensorType) -> u64 {
    match term {
        Term::Leaf(_) => 0,
        Term::Relu(_) => 1,
        Term::Reshape(_) => ty.dtype.size() as u64,
        Term::Slice(_) => bytes(ty).saturating_mul(2).max(1),
        _ => {
            let operands = term.operands(egraph).into_iter();
            let read = operands.filter_map(|id| egraph[id].data.ty.as_ref().map(bytes));
            read.fold(bytes(ty), u64::saturating_add).max(1)
        }
    }
}

fn bytes(ty: &TensorType) -> u64 {
    debug_assert!(ty.dtype.size() <= DType::I64.size());
    let elements = ty.shape.elements().map_or(usize::MAX, |dim| dim.size(BATCH));
    elements.saturating_mul(ty.dtype.size()) as u64
}
