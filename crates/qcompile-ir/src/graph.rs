//! Storage of a graph and the only doors of mutation: [`Graph::add`], [`Graph::set_operand`],
//! [`Graph::replace_uses`], [`Graph::sweep`] (and the footer: outputs and `next`).

use crate::{Name, Note, Op, TensorType, TypeError, infer};
use petgraph::Direction::{Incoming, Outgoing};
use petgraph::graph::{DiGraph, NodeIndex};
use petgraph::visit::EdgeRef;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use thiserror::Error;

/// Which part of a step computes a value. Edges never go back a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Region {
    /// From the inputs to the loss.
    Forward,
    /// From the loss to the gradients.
    Backward,
    /// From this rank's gradients to all ranks' gradients.
    Comm,
    /// From gradients to the next values of parameters and state.
    Update,
}

impl Region {
    /// Every region, in order.
    pub const ALL: [Region; 4] = [Region::Forward, Region::Backward, Region::Comm, Region::Update];

    /// The word in text.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Region::Forward => "forward",
            Region::Backward => "backward",
            Region::Comm => "comm",
            Region::Update => "update",
        }
    }
}

/// One value.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Its unique name.
    pub name: Name,
    /// What it computes.
    pub op: Op,
    /// Its type, derived by [`infer()`].
    pub ty: TensorType,
    /// Which part of the step computes it.
    pub region: Region,
    /// Annotations that change no meaning.
    pub note: Note,
}

/// The identity of a node, valid until the next [`Graph::sweep`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(NodeIndex<u32>);

impl NodeId {
    /// A dense index, below [`Graph::len`]: for side tables.
    #[must_use]
    pub fn index(self) -> usize {
        self.0.index()
    }
}

/// Edge weight: which operand of the target this edge feeds.
type Operand = u32;

/// Why a graph refused a change.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum GraphError {
    /// The node would have no type.
    #[error("{name}: {error}")]
    Type {
        /// The node.
        name: Name,
        /// What does not fit.
        error: TypeError,
    },
    /// An operand comes from a later region.
    #[error("{name} in region {} uses {operand} of the later region {}", region.name(), operand_region.name())]
    Region {
        /// The node.
        name: Name,
        /// Its region.
        region: Region,
        /// The operand.
        operand: Name,
        /// The operand's region.
        operand_region: Region,
    },
    /// The replacement has another type.
    #[error("{new} : {new_type} cannot replace {old} : {old_type}")]
    Replacement {
        /// The value that was to be replaced.
        old: Name,
        /// Its type.
        old_type: TensorType,
        /// The value that was to replace it.
        new: Name,
        /// Its type.
        new_type: TensorType,
    },
    /// The change would make a value depend on itself.
    #[error("{name} would depend on itself")]
    Cycle {
        /// The node.
        name: Name,
    },
}

/// A training step as a graph of values.
#[derive(Clone, Debug)]
pub struct Graph {
    name: String,
    dag: DiGraph<Node, Operand, u32>,
    by_name: BTreeMap<Name, NodeId>,
    /// For each name that was wanted again, the last suffix given: names become free in a sweep only.
    suffixes: BTreeMap<Name, usize>,
    outputs: Vec<(String, NodeId)>,
    next: BTreeMap<NodeId, NodeId>,
}

impl Graph {
    /// An empty graph.
    #[must_use]
    pub fn new(name: &str) -> Graph {
        Graph {
            name: name.to_owned(),
            dag: DiGraph::default(),
            by_name: BTreeMap::new(),
            suffixes: BTreeMap::new(),
            outputs: Vec::new(),
            next: BTreeMap::new(),
        }
    }

    /// The graph's own name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Number of nodes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.dag.node_count()
    }

    /// Whether it has no nodes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds a node, inferring its type. A taken name gets the first free suffix `.1`, `.2`, ...
    ///
    /// # Errors
    /// [`GraphError::Type`] or [`GraphError::Region`]; the graph is unchanged.
    pub fn add(
        &mut self,
        op: Op,
        operands: &[NodeId],
        name: impl Into<Name>,
        region: Region,
    ) -> Result<NodeId, GraphError> {
        let name = self.free_name(name.into());
        let types: Vec<&TensorType> = operands.iter().map(|&id| self.ty(id)).collect();
        let ty =
            infer(&op, &types).map_err(|error| GraphError::Type { name: name.clone(), error })?;
        for &operand in operands {
            self.check_region(&name, region, operand)?;
        }
        let node = Node { name: name.clone(), op, ty, region, note: Note::default() };
        let id = NodeId(self.dag.add_node(node));
        for (position, &operand) in (0_u32..).zip(operands) {
            self.dag.add_edge(operand.0, id.0, position);
        }
        self.by_name.insert(name, id);
        Ok(id)
    }

    fn check_region(&self, name: &Name, region: Region, operand: NodeId) -> Result<(), GraphError> {
        let from = self.node(operand);
        if from.region <= region {
            return Ok(());
        }
        Err(GraphError::Region {
            name: name.clone(),
            region,
            operand: from.name.clone(),
            operand_region: from.region,
        })
    }

    fn free_name(&mut self, name: Name) -> Name {
        if !self.by_name.contains_key(&name) {
            return name;
        }
        let last = self.suffixes.entry(name.clone()).or_insert(0);
        loop {
            *last += 1;
            let suffixed = Name::from(format!("{}.{last}", name.as_str()));
            if !self.by_name.contains_key(&suffixed) {
                return suffixed;
            }
        }
    }

    /// Makes `new` the operand at `position` of `id`.
    ///
    /// # Errors
    /// If the node would change its type, get none, use a later region or itself; the graph is unchanged.
    pub fn set_operand(
        &mut self,
        id: NodeId,
        position: usize,
        new: NodeId,
    ) -> Result<(), GraphError> {
        let node = self.node(id);
        self.check_region(&node.name, node.region, new)?;
        let mut operands = self.operands(id);
        operands[position] = new;
        let types: Vec<&TensorType> = operands.iter().map(|&id| self.ty(id)).collect();
        let ty = infer(&node.op, &types)
            .map_err(|error| GraphError::Type { name: node.name.clone(), error })?;
        if ty != node.ty {
            return Err(GraphError::Replacement {
                old: node.name.clone(),
                old_type: node.ty.clone(),
                new: node.name.clone(),
                new_type: ty,
            });
        }
        if petgraph::algo::has_path_connecting(&self.dag, id.0, new.0, None) {
            return Err(GraphError::Cycle { name: node.name.clone() });
        }
        self.connect(id, position, new);
        Ok(())
    }

    /// Replaces one edge; types and acyclicity are the caller's.
    fn connect(&mut self, id: NodeId, position: usize, new: NodeId) {
        let edge = self
            .dag
            .edges_directed(id.0, Incoming)
            .find(|edge| *edge.weight() as usize == position)
            .map(|edge| edge.id());
        if let Some(edge) = edge {
            self.dag.remove_edge(edge);
        }
        #[allow(clippy::cast_possible_truncation, reason = "positions come from u32 edge weights")]
        self.dag.add_edge(new.0, id.0, position as u32);
    }

    /// Makes every user of `old` (operands, outputs, `next` values) use `new`, except `new` itself.
    ///
    /// # Errors
    /// If the types differ or a user would depend on itself; the graph is unchanged.
    pub fn replace_uses(&mut self, old: NodeId, new: NodeId) -> Result<(), GraphError> {
        self.replace_uses_except(old, new, &[])
    }

    /// [`Graph::replace_uses`] that leaves the uses by `except` and by `new` as they are: for inserting nodes
    /// between a value and its users.
    ///
    /// # Errors
    /// As [`Graph::replace_uses`].
    pub fn replace_uses_except(
        &mut self,
        old: NodeId,
        new: NodeId,
        except: &[NodeId],
    ) -> Result<(), GraphError> {
        if old == new {
            return Ok(());
        }
        if self.ty(old) != self.ty(new) {
            return Err(GraphError::Replacement {
                old: self.node(old).name.clone(),
                old_type: self.ty(old).clone(),
                new: self.node(new).name.clone(),
                new_type: self.ty(new).clone(),
            });
        }
        let users: Vec<(NodeId, usize)> = self
            .uses(old)
            .into_iter()
            .filter(|(user, _)| *user != new && !except.contains(user))
            .collect();
        let ancestors = if self.precedes(new, old) { Vec::new() } else { self.ancestors(new) };
        for &(user, _) in &users {
            if ancestors.get(user.index()).is_some_and(|&depends| depends) {
                return Err(GraphError::Cycle { name: self.node(user).name.clone() });
            }
            let node = self.node(user);
            self.check_region(&node.name, node.region, new)?;
        }
        for (user, position) in users {
            self.connect(user, position, new);
        }
        for (_, output) in &mut self.outputs {
            if *output == old {
                *output = new;
            }
        }
        for value in self.next.values_mut() {
            if *value == old {
                *value = new;
            }
        }
        Ok(())
    }

    /// Whether it is plain from the nodes just above `old` that `new` needs nothing that `old` does not need: then no
    /// user of `old` is above it. Spares most replacements a walk through the graph.
    fn precedes(&self, new: NodeId, old: NodeId) -> bool {
        const NEAR: usize = 32;
        let mut above = self.operands(old);
        let mut at = 0;
        while at < above.len() && above.len() < NEAR {
            above.extend(self.operands(above[at]));
            at += 1;
        }
        let known = |id: &NodeId| above.contains(id) || self.op(*id).is_leaf();
        known(&new) || self.operands(new).iter().all(known)
    }

    /// For each node index, whether `id` depends on it.
    fn ancestors(&self, id: NodeId) -> Vec<bool> {
        let mut seen = vec![false; self.len()];
        let mut stack: Vec<NodeIndex> = self.dag.neighbors_directed(id.0, Incoming).collect();
        while let Some(at) = stack.pop() {
            if !std::mem::replace(&mut seen[at.index()], true) {
                stack.extend(self.dag.neighbors_directed(at, Incoming));
            }
        }
        seen
    }

    /// Drops every node that no output or `next` value needs (inputs, params and states stay) and renumbers the
    /// rest in [`Graph::order`]. What a cast would hold after the step goes with the cast. Every [`NodeId`] held before
    /// is invalid after.
    pub fn sweep(&mut self) {
        let mut live = vec![false; self.len()];
        let mut stack: Vec<NodeId> = self.outputs.iter().map(|(_, id)| *id).collect();
        stack.extend(
            self.ids().filter(|&id| {
                matches!(self.node(id).op, Op::Input(_) | Op::Param(_) | Op::State(_))
            }),
        );
        while let Some(id) = stack.pop() {
            if !std::mem::replace(&mut live[id.index()], true) {
                stack.extend(self.operands(id));
                stack.extend(self.next.get(&id));
            }
        }
        let mut swept = Graph::new(&self.name);
        let mut renumbered: BTreeMap<NodeId, NodeId> = BTreeMap::new();
        for id in self.order().into_iter().filter(|id| live[id.index()]) {
            let node = self.node(id).clone();
            let name = node.name.clone();
            let new = NodeId(swept.dag.add_node(node));
            for (position, operand) in (0_u32..).zip(self.operands(id)) {
                swept.dag.add_edge(renumbered[&operand].0, new.0, position);
            }
            swept.by_name.insert(name, new);
            renumbered.insert(id, new);
        }
        let renumber = |id: &NodeId| renumbered[id];
        swept.outputs =
            self.outputs.iter().map(|(name, id)| (name.clone(), renumber(id))).collect();
        let next = self.next.iter().filter(|(kept, _)| live[kept.index()]);
        swept.next = next.map(|(kept, id)| (renumber(kept), renumber(id))).collect();
        *self = swept;
    }

    /// The node.
    #[must_use]
    pub fn node(&self, id: NodeId) -> &Node {
        &self.dag[id.0]
    }

    /// Its op.
    #[must_use]
    pub fn op(&self, id: NodeId) -> &Op {
        &self.node(id).op
    }

    /// Its type.
    #[must_use]
    pub fn ty(&self, id: NodeId) -> &TensorType {
        &self.node(id).ty
    }

    /// Another op of the same type and with the same operands is the caller's.
    pub(crate) fn op_mut(&mut self, id: NodeId) -> &mut Op {
        &mut self.dag[id.0].op
    }

    /// Its note, to be written.
    pub fn note_mut(&mut self, id: NodeId) -> &mut Note {
        &mut self.dag[id.0].note
    }

    /// Exchanges the names of two nodes: a value that takes another's place takes its name.
    pub fn swap_names(&mut self, a: NodeId, b: NodeId) {
        let (name_a, name_b) = (self.node(a).name.clone(), self.node(b).name.clone());
        self.by_name.insert(name_a.clone(), b);
        self.by_name.insert(name_b.clone(), a);
        self.dag[a.0].name = name_b;
        self.dag[b.0].name = name_a;
    }

    /// The node of this name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<NodeId> {
        self.by_name.get(name).copied()
    }

    /// Operands in order: the only way to read them.
    #[must_use]
    pub fn operands(&self, id: NodeId) -> Vec<NodeId> {
        let mut operands: Vec<(Operand, NodeId)> = self
            .dag
            .edges_directed(id.0, Incoming)
            .map(|edge| (*edge.weight(), NodeId(edge.source())))
            .collect();
        operands.sort_unstable();
        operands.into_iter().map(|(_, id)| id).collect()
    }

    /// The positions of the operands, ascending: 0, 1, 2, ... in a graph that verifies.
    pub(crate) fn operand_positions(&self, id: NodeId) -> Vec<usize> {
        let edges = self.dag.edges_directed(id.0, Incoming);
        let mut positions: Vec<usize> = edges.map(|edge| *edge.weight() as usize).collect();
        positions.sort_unstable();
        positions
    }

    /// The operand at `position`. Panics if there is none.
    #[must_use]
    pub fn operand(&self, id: NodeId, position: usize) -> NodeId {
        self.operands(id)[position]
    }

    /// Every use as an operand: user and position, in order of the users.
    #[must_use]
    pub fn uses(&self, id: NodeId) -> Vec<(NodeId, usize)> {
        let mut uses: Vec<(NodeId, usize)> = self
            .dag
            .edges_directed(id.0, Outgoing)
            .map(|edge| (NodeId(edge.target()), *edge.weight() as usize))
            .collect();
        uses.sort_unstable();
        uses
    }

    /// Every node, in order of creation.
    pub fn ids(&self) -> impl Iterator<Item = NodeId> + use<> {
        self.dag.node_indices().map(NodeId).collect::<Vec<_>>().into_iter()
    }

    /// Every node, operands first: leaves, then regions in order, then creation order as far as operands allow.
    /// The same for equal graphs. A node on a cycle (which no door can make) would be missing.
    #[must_use]
    pub fn order(&self) -> Vec<NodeId> {
        let key = |id: NodeId| {
            let node = self.node(id);
            Reverse((!node.op.is_leaf(), node.region, id))
        };
        let mut waiting: Vec<usize> =
            self.ids().map(|id| self.dag.edges_directed(id.0, Incoming).count()).collect();
        let mut ready: BinaryHeap<_> =
            self.ids().filter(|id| waiting[id.index()] == 0).map(key).collect();
        let mut order = Vec::with_capacity(self.len());
        while let Some(Reverse((_, _, id))) = ready.pop() {
            order.push(id);
            for edge in self.dag.edges_directed(id.0, Outgoing) {
                let user = NodeId(edge.target());
                waiting[user.index()] -= 1;
                if waiting[user.index()] == 0 {
                    ready.push(key(user));
                }
            }
        }
        order
    }

    /// What the step returns: names and values.
    #[must_use]
    pub fn outputs(&self) -> &[(String, NodeId)] {
        &self.outputs
    }

    /// Appends a returned value.
    pub fn add_output(&mut self, name: &str, id: NodeId) {
        self.outputs.push((name.to_owned(), id));
    }

    /// Replaces what the step returns.
    pub fn set_outputs(&mut self, outputs: Vec<(String, NodeId)>) {
        self.outputs = outputs;
    }

    /// What each parameter and state, and each lasting cast of one, holds after the step.
    #[must_use]
    pub fn next(&self) -> &BTreeMap<NodeId, NodeId> {
        &self.next
    }

    /// Says what `kept` holds after the step: a param, a state, or a cast of a param, which then lasts from step to
    /// step. That of such a cast is the same cast of the param's own next value, and so what it would be anyway.
    ///
    /// # Errors
    /// [`GraphError::Replacement`] if the types differ or `kept` is none of these.
    pub fn set_next(&mut self, kept: NodeId, value: NodeId) -> Result<(), GraphError> {
        let keeps = matches!(self.op(kept), Op::Param(_) | Op::State(_));
        if !(keeps || self.lasts(kept, value)) || self.ty(kept) != self.ty(value) {
            return Err(GraphError::Replacement {
                old: self.node(kept).name.clone(),
                old_type: self.ty(kept).clone(),
                new: self.node(value).name.clone(),
                new_type: self.ty(value).clone(),
            });
        }
        self.next.insert(kept, value);
        Ok(())
    }

    /// Whether a value is a cast of a param, and the other the same cast of that param's next value.
    pub(crate) fn lasts(&self, kept: NodeId, value: NodeId) -> bool {
        let casts = matches!(self.op(kept), Op::Cast(_)) && self.op(kept) == self.op(value);
        casts && {
            let param = self.operand(kept, 0);
            matches!(self.op(param), Op::Param(_))
                && self.next.get(&param) == Some(&self.operand(value, 0))
        }
    }

    /// Leaves of one kind in order of creation: `graph.leaves(|op| matches!(op, Op::Param(_)))`.
    #[must_use]
    pub fn leaves(&self, kind: impl Fn(&Op) -> bool) -> Vec<NodeId> {
        self.ids().filter(|&id| self.op(id).is_leaf() && kind(self.op(id))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BinaryOp, DType, Shape, Tensor, UnaryOp};
    use std::sync::Arc;

    fn input(graph: &mut Graph, name: &str) -> NodeId {
        let ty = TensorType::f32(Shape::fixed(&[2]));
        graph.add(Op::Input(ty), &[], name, Region::Forward).expect("no operands")
    }

    #[test]
    fn operands_keep_their_order_after_replacement() {
        let mut graph = Graph::new("g");
        let (a, b, c) = (input(&mut graph, "a"), input(&mut graph, "b"), input(&mut graph, "c"));
        let sub = Op::Binary(BinaryOp::Sub);
        let d = graph.add(sub, &[a, b], "d", Region::Forward).expect("fits");
        graph.replace_uses(a, c).expect("same type");
        assert_eq!(graph.operands(d), [c, b]);
        assert!(graph.set_operand(d, 0, d).is_err());
    }

    #[test]
    fn names_stay_unique_and_edges_monotone() {
        let mut graph = Graph::new("g");
        let a = input(&mut graph, "a");
        let relu = Op::Unary(UnaryOp::Relu);
        let b = graph.add(relu.clone(), &[a], "a", Region::Backward).expect("fits");
        assert_eq!(graph.node(b).name.as_str(), "a.1");
        assert!(graph.add(relu, &[b], "c", Region::Forward).is_err());
    }

    #[test]
    fn sweep_drops_what_nothing_needs() {
        let mut graph = Graph::new("g");
        let a = input(&mut graph, "a");
        let one = Op::Const(Arc::new(Tensor::scalar(DType::F32, 1.0)));
        graph.add(one, &[], "unused", Region::Forward).expect("no operands");
        let b = graph.add(Op::Unary(UnaryOp::Relu), &[a], "b", Region::Forward).expect("fits");
        graph.add_output("b", b);
        graph.sweep();
        assert_eq!(graph.len(), 2);
        assert_eq!(graph.find("unused"), None);
    }
}
