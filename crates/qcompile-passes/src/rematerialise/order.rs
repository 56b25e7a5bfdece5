//! In which order values are given up.

use super::kept;
use qcompile_ir::{Graph, NodeId, Op, Region};
use std::collections::{BTreeMap, BTreeSet};

/// Operations of one random number: ten rounds of Philox.
const DRAW: f64 = 16.0;

/// A value that the plan of a graph holds for the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Saved {
    /// The value.
    pub value: NodeId,
    /// What it takes.
    pub bytes: usize,
}

/// The values of `saved` that may be made again, in the order in which they should be, for a plan at this batch size.
///
/// Those come first that free most bytes for an operation, as in DTR (Kirisame et al. 2021, arXiv:2006.09616):
/// elementwise values, then products. As in Chen et al. 2016 (arXiv:1604.06174), checkpoints stay between them: values
/// that are made one from another, and so are in memory together when they are made again, take at most `most` bytes.
#[must_use]
pub fn order(graph: &Graph, saved: &[Saved], most: usize, batch: usize) -> Vec<NodeId> {
    let all: BTreeSet<NodeId> = saved.iter().map(|one| one.value).collect();
    let bytes: BTreeMap<NodeId, usize> = saved.iter().map(|one| (one.value, one.bytes)).collect();
    let kept = kept(graph, &all, &BTreeSet::new());
    let mut candidates: Vec<(f64, usize, NodeId)> = Vec::new();
    let mut made_from: BTreeMap<NodeId, Vec<NodeId>> = BTreeMap::new();
    for (position, &Saved { value, bytes: size }) in saved.iter().enumerate() {
        if !super::may_copy(graph, value) {
            continue;
        }
        let recipe = Recipe::of(graph, value, &kept);
        // What else would have to be saved for it.
        let new: usize = recipe
            .sources
            .iter()
            .filter(|source| graph.node(**source).region == Region::Forward)
            .filter(|source| !graph.op(**source).is_leaf() && !all.contains(source))
            .map(|&source| size_of(graph, source, batch))
            .sum();
        let freed = size.saturating_sub(new);
        if freed == 0 {
            continue;
        }
        let operations: f64 = recipe.made.iter().map(|&id| operations(graph, id, batch)).sum();
        candidates.push((operations / freed as f64, position, value));
        let sources = recipe.sources.into_iter().filter(|source| all.contains(source));
        made_from.insert(value, sources.collect());
    }
    candidates.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let mut pieces = Pieces::default();
    let mut readers: BTreeMap<NodeId, Vec<NodeId>> = BTreeMap::new();
    for (value, sources) in &made_from {
        for source in sources {
            readers.entry(*source).or_default().push(*value);
        }
    }
    let mut order = Vec::new();
    for (_, _, value) in candidates {
        let neighbours = made_from[&value].iter().chain(readers.get(&value).into_iter().flatten());
        if pieces.join(value, bytes[&value], neighbours.copied(), most) {
            order.push(value);
        }
    }
    order
}

/// What a value is made from.
struct Recipe {
    /// The nodes on the way, the value itself among them.
    made: BTreeSet<NodeId>,
    /// What those read that is kept.
    sources: BTreeSet<NodeId>,
}

impl Recipe {
    fn of(graph: &Graph, value: NodeId, kept: &[bool]) -> Recipe {
        let mut recipe = Recipe { made: BTreeSet::from([value]), sources: BTreeSet::new() };
        let mut stack = vec![value];
        while let Some(id) = stack.pop() {
            for operand in graph.operands(id) {
                if kept[operand.index()] {
                    recipe.sources.insert(operand);
                } else if recipe.made.insert(operand) {
                    stack.push(operand);
                }
            }
        }
        recipe
    }
}

/// Values that are made again, in pieces that hang together.
#[derive(Default)]
struct Pieces {
    /// The piece of each value, by number.
    of: BTreeMap<NodeId, usize>,
    /// The values and the bytes of each piece; joined ones have none.
    members: Vec<(Vec<NodeId>, usize)>,
}

impl Pieces {
    /// Adds a value to the pieces that its neighbours are in, if that makes a piece of at most `most` bytes.
    fn join(
        &mut self,
        value: NodeId,
        bytes: usize,
        neighbours: impl Iterator<Item = NodeId>,
        most: usize,
    ) -> bool {
        let joined: BTreeSet<usize> =
            neighbours.filter_map(|neighbour| self.of.get(&neighbour).copied()).collect();
        let all =
            joined.iter().map(|&piece| self.members[piece].1).fold(bytes, usize::saturating_add);
        if all > most {
            return false;
        }
        let mut members = vec![value];
        for piece in joined {
            members.append(&mut std::mem::take(&mut self.members[piece]).0);
        }
        for member in &members {
            self.of.insert(*member, self.members.len());
        }
        self.members.push((members, all));
        true
    }
}

fn elements(graph: &Graph, id: NodeId, batch: usize) -> f64 {
    graph.ty(id).shape.elements().map_or(0.0, |elements| elements.size(batch) as f64)
}

fn size_of(graph: &Graph, id: NodeId, batch: usize) -> usize {
    let ty = graph.ty(id);
    let elements = ty.shape.elements().map_or(0, |elements| elements.size(batch));
    elements.saturating_mul(ty.dtype.size())
}

/// Operations that a node takes at this batch size: two for each term of a product, else one for each element.
pub(super) fn operations(graph: &Graph, id: NodeId, batch: usize) -> f64 {
    let of = |id: NodeId| elements(graph, id, batch);
    let operand = |position: usize| of(graph.operand(id, position));
    let last = |id: NodeId| graph.ty(id).shape.0.last().map_or(1.0, |dim| dim.size(batch) as f64);
    let result = of(id);
    // The terms of each output of a convolution with this weight.
    let window = |weight: NodeId| {
        let outputs = graph.ty(weight).shape.0.first().map_or(1, |dim| dim.size(batch));
        of(weight) / outputs.max(1) as f64
    };
    // Scores: rows of q, each with every key.
    let scores = || {
        let [query, key] = [graph.operand(id, 0), graph.operand(id, 1)];
        let keys = graph.ty(key).shape.0.get(1).map_or(1, |dim| dim.size(batch));
        of(query) / last(query).max(1.0) * keys as f64
    };
    match graph.op(id) {
        op if op.is_leaf() => 0.0,
        Op::Reshape(_) | Op::Transpose(_) | Op::Broadcast(_) | Op::Slice { .. } | Op::Size(_) => {
            0.0
        }
        Op::Training => 0.0,
        Op::Random { .. } => DRAW * result,
        Op::Reduce { .. } => operand(0),
        Op::Matmul { transpose_a, .. } => {
            let dims = &graph.ty(graph.operand(id, 0)).shape.0;
            let from_end = if *transpose_a { 2 } else { 1 };
            let terms = dims.len().checked_sub(from_end).map_or(1, |at| dims[at].size(batch));
            2.0 * result * terms as f64
        }
        Op::Conv2d(_) => 2.0 * result * window(graph.operand(id, 1)),
        Op::Conv2dGradInput(_) => 2.0 * operand(0) * window(graph.operand(id, 1)),
        Op::Conv2dGradWeight(_) => 2.0 * operand(1) * window(id),
        Op::Attention { .. } => 2.0 * scores() * (last(graph.operand(id, 0)) + last(id)),
        // The scores again and their gradients, and a product for the result.
        Op::AttentionGrad { .. } => 6.0 * scores() * last(graph.operand(id, 0)),
        Op::Recurrence(_) | Op::RecurrenceGrad { .. } => 2.0 * result * last(id),
        _ => result,
    }
}
