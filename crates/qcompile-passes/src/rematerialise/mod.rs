//! Makes forward values again for the backward pass, instead of saving them.
//!
//! *Before*: a graph with forward and backward region.
//!
//! *After*: where the backward region read a value that is to be made again, or one made from it, it reads a copy in its own
//! region: the forward nodes that lead to it, once more, from what is saved, inputs and parameters. The forward region
//! computes what it computed before. Every op is a function of its operands (random numbers of the seed, the step and the
//! place), so a copy has the bits of its original. What is never copied: a sum or another reduction, whose order of terms
//! the plan decides by what stands around it (batch statistics are among them, and small); an exchange between workers; and
//! what does not depend on the batch.
//!
//! Which values to make again, [`order`] says.
//!
//! *Why here*: last, because a copy is what sharing equal values would take away again, and because values are
//! computed in the order in which nodes were made: copies stand right before who reads them first.

mod order;

pub use order::{Saved, order};

use crate::PassError;
use crate::saved::late;
use qcompile_ir::{Graph, NodeId, Op, Region};
use std::collections::{BTreeMap, BTreeSet};

/// What was copied.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rematerialised {
    /// Saved values that are made again.
    pub values: usize,
    /// Operations of the copies, for each one of the step before.
    pub added: f64,
}

/// Makes the values of `again` again, from those of `saved` that are not among them. `saved` is what the plan of the
/// graph holds for the backward pass; operations are counted at this batch size.
///
/// # Errors
/// [`PassError::Graph`] by a defect only.
pub fn run(
    graph: &mut Graph,
    saved: &BTreeSet<NodeId>,
    again: &BTreeSet<NodeId>,
    batch: usize,
) -> Result<Rematerialised, PassError> {
    let kept = kept(graph, saved, again);
    let order = graph.order();
    // What leads from a value that is no longer there to a reader.
    let mut lost = vec![false; graph.len()];
    for &id in &order {
        let from_lost = graph.operands(id).iter().any(|of| lost[of.index()]);
        lost[id.index()] = !kept[id.index()] && (again.contains(&id) || from_lost);
    }
    let before: f64 = order.iter().map(|&id| order::operations(graph, id, batch)).sum();
    let mut rebuilt = Rebuilt {
        old: graph,
        new: Graph::new(graph.name()),
        ids: BTreeMap::new(),
        copies: BTreeMap::new(),
        kept,
        lost,
    };
    let late = late(graph, &order);
    order.iter().filter(|id| !late.contains(id)).try_for_each(|&id| rebuilt.place(id))?;
    // What nobody waits for.
    order.iter().try_for_each(|&id| rebuilt.place(id))?;
    let Rebuilt { mut new, ids, copies, .. } = rebuilt;
    let added: f64 = copies.keys().map(|&id| order::operations(graph, id, batch)).sum();
    let values = again.iter().filter(|id| copies.contains_key(id)).count();
    new.set_outputs(graph.outputs().iter().map(|(name, id)| (name.clone(), ids[id])).collect());
    for (leaf, value) in graph.next() {
        new.set_next(ids[leaf], ids[value])?;
    }
    *graph = new;
    graph.sweep();
    Ok(Rematerialised { values, added: if before > 0.0 { added / before } else { 0.0 } })
}

/// For each node, by index, whether a copy may read it: it is there for the backward region, or is never copied.
fn kept(graph: &Graph, saved: &BTreeSet<NodeId>, again: &BTreeSet<NodeId>) -> Vec<bool> {
    let mut kept = vec![true; graph.len()];
    for id in graph.ids() {
        let stays = saved.contains(&id) && !again.contains(&id);
        kept[id.index()] = stays || !may_copy(graph, id);
    }
    kept
}

/// Whether a forward value may be computed a second time.
fn may_copy(graph: &Graph, id: NodeId) -> bool {
    let node = graph.node(id);
    let large = node.ty.shape.elements().is_some_and(|elements| elements.batch);
    let fixed = matches!(
        node.op,
        Op::Size(_) | Op::Training | Op::Iota(_) | Op::Reduce { .. } | Op::AllReduce(_)
    );
    node.region == Region::Forward && large && !fixed && !node.op.is_leaf()
}

/// A copy of a graph, in which what is made again stands right before who reads it first.
struct Rebuilt<'g> {
    old: &'g Graph,
    new: Graph,
    ids: BTreeMap<NodeId, NodeId>,
    /// In the backward region, by the value that they are copies of.
    copies: BTreeMap<NodeId, NodeId>,
    kept: Vec<bool>,
    lost: Vec<bool>,
}

/// A node of the new graph: an old one, or the copy of one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Wanted {
    Node(NodeId),
    Copy(NodeId),
}

impl Rebuilt<'_> {
    /// Adds a node, and before it what it needs that is not there.
    fn place(&mut self, id: NodeId) -> Result<(), PassError> {
        let mut stack = vec![Wanted::Node(id)];
        while let Some(&wanted) = stack.last() {
            let operands = self.operands(wanted);
            let missing = operands.iter().rev().filter(|operand| self.made(**operand).is_none());
            let missing: Vec<Wanted> = missing.copied().collect();
            if missing.is_empty() || self.made(wanted).is_some() {
                self.add(wanted, &operands)?;
                stack.pop();
            } else {
                stack.extend(missing);
            }
        }
        Ok(())
    }

    fn made(&self, wanted: Wanted) -> Option<NodeId> {
        match wanted {
            Wanted::Node(id) => self.ids.get(&id).copied(),
            Wanted::Copy(id) => self.copies.get(&id).copied(),
        }
    }

    fn operands(&self, wanted: Wanted) -> Vec<Wanted> {
        let (id, copied): (NodeId, &dyn Fn(NodeId) -> bool) = match wanted {
            Wanted::Node(id) if self.old.node(id).region == Region::Backward => {
                (id, &|of| self.lost[of.index()])
            }
            Wanted::Node(id) => (id, &|_| false),
            Wanted::Copy(id) => (id, &|of| !self.kept[of.index()]),
        };
        let operands = self.old.operands(id).into_iter();
        operands.map(|of| if copied(of) { Wanted::Copy(of) } else { Wanted::Node(of) }).collect()
    }

    fn add(&mut self, wanted: Wanted, operands: &[Wanted]) -> Result<(), PassError> {
        if self.made(wanted).is_some() {
            return Ok(());
        }
        let operands: Vec<NodeId> = operands.iter().filter_map(|of| self.made(*of)).collect();
        match wanted {
            Wanted::Node(id) => {
                let node = self.old.node(id);
                let (op, name) = (node.op.clone(), node.name.clone());
                let new = self.new.add(op, &operands, name, node.region)?;
                *self.new.note_mut(new) = node.note.clone();
                self.ids.insert(id, new);
            }
            Wanted::Copy(id) => {
                let node = self.old.node(id);
                let name = format!("{}.again", node.name.as_str());
                let new = self.new.add(node.op.clone(), &operands, name, Region::Backward)?;
                self.new.note_mut(new).origin.clone_from(&node.note.origin);
                self.copies.insert(id, new);
            }
        }
        Ok(())
    }
}
