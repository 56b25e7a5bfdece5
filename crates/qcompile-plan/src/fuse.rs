//! Which nodes share one kernel. Fusing only groups nodes that are there; it never adds or changes one.
//!
//! An elementwise node or a reduction joins a group that iterates over the same sizes in the same region, if it
//! uses a value of that group or reads what the group reads, and if no path leads from the group out and back to
//! it. Elementwise nodes join a matmul or convolution as its epilogue under the same conditions, and so do reductions
//! over its rows.

use crate::again::made_again;
use crate::attention::{incoming, narrowed};
use crate::bit_set::BitSet;
use crate::build::PlanError;
use crate::deviations::{self, crosses_rows, deviations};
use crate::live::live;
use crate::low::{Codes, LowOperands, Scales, attention_codes, exchanged_codes, low_products};
use crate::merge::merge;
use crate::recompute::{read_less, recomputed};
use crate::view::{View, first_parameter};
use qcompile_ir::{Dim, Graph, NodeId, Op, Region};
use std::collections::BTreeMap;

/// What kind of kernel a group becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Loop nests over a domain.
    Loop,
    /// A primitive; matmul and convolution with an epilogue, if the group has more members.
    Primitive,
    /// Parts written side by side (concat) or into a filled array (pad).
    Assembly,
    /// A dense copy of a view.
    Copy,
    /// An exchange between ranks.
    Collective,
}

/// Nodes that share one kernel.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    pub(crate) kind: Kind,
    pub(crate) region: Region,
    /// In order; of a primitive the first is the primitive itself.
    pub(crate) members: Vec<NodeId>,
    /// Sizes of the iteration domain.
    pub(crate) domain: Vec<Dim>,
    /// Bases that it reads from memory.
    pub(crate) reads: Vec<NodeId>,
    /// Position in the graph's order of its last member.
    pub(crate) position: usize,
    /// Whether its members make forward values again. They join their like only: where a gradient is summed, and so in
    /// which order, must not depend on what is made again.
    pub(crate) again: bool,
}

/// What groups that may be joined have in common.
pub(crate) type Domain = (Region, bool, Vec<Dim>);

/// Everything that fusing found out.
pub(crate) struct Fusion {
    pub(crate) groups: Vec<Group>,
    /// Which group computes a node, by node index.
    pub(crate) group_of: Vec<Option<usize>>,
    /// Which dense copy a view node has, by node index.
    pub(crate) copied: Vec<Option<usize>>,
    /// For each group, the groups that it needs, directly or not.
    pub(crate) needs: Vec<BitSet>,
    pub(crate) views: Vec<View>,
    pub(crate) low: BTreeMap<NodeId, LowOperands>,
    /// What attention with its products in i8 reads.
    pub(crate) codes: BTreeMap<NodeId, [Codes; 3]>,
    /// Attention, and gradients of it, whose kernel writes bf16, each with the cast that says so.
    pub(crate) narrowed: BTreeMap<NodeId, NodeId>,
    /// Sums of squared deviations that a product's kernel computes, each with the product, or with that rounded.
    pub(crate) deviations: BTreeMap<NodeId, NodeId>,
    /// For each node, by index, whether it belongs to no group: its readers compute it.
    pub(crate) recomputed: Vec<bool>,
    /// For each node, by index, whether it makes a forward value again.
    pub(crate) again: Vec<bool>,
}

/// Registers are few: a kernel with more operands than this spills more than it saves.
pub(crate) const MAX_READS: usize = 20;
pub(crate) const MAX_MEMBERS: usize = 64;
/// How many recent groups of the same domain are tried.
const MAX_CANDIDATES: usize = 12;
/// What each group needs is kept as a set of groups, which takes memory and time by the square of their number.
const MAX_GROUPS: usize = 1 << 15;

/// Groups the live nodes of a verified graph.
///
/// # Errors
/// [`PlanError::TooLarge`].
pub(crate) fn fuse(graph: &Graph, order: &[NodeId], views: Vec<View>) -> Result<Fusion, PlanError> {
    let low = low_products(graph, &views);
    let codes = attention_codes(graph, &views);
    let deviations = deviations(graph, &views);
    let recomputed = recomputed(graph, order, &views);
    let live = live(graph, order, &views, (&low, &codes), &deviations);
    let narrowed = narrowed(graph, &views, &codes, &live, &recomputed);
    let mut fusion = Fusion {
        groups: Vec::new(),
        group_of: vec![None; graph.len()],
        copied: vec![None; graph.len()],
        needs: Vec::new(),
        views,
        low,
        codes,
        narrowed,
        deviations,
        recomputed,
        again: made_again(graph, order),
    };
    // Those of each product; what nobody uses is left out.
    let mut of_product: BTreeMap<NodeId, Vec<[NodeId; 2]>> = BTreeMap::new();
    for (&id, &value) in fusion.deviations.iter().filter(|(id, _)| live[id.index()]) {
        of_product.entry(deviations::product(graph, value)).or_default().push([value, id]);
    }
    let mut by_domain: BTreeMap<Domain, Vec<usize>> = BTreeMap::new();
    for (position, &id) in order.iter().enumerate() {
        let placed = fusion.group_of[id.index()].is_some() || fusion.recomputed[id.index()];
        if !live[id.index()] || graph.op(id).is_leaf() || fusion.is_view(graph, id) || placed {
            continue;
        }
        fusion.place(graph, id, position, &mut by_domain);
        if let Some(deviations) = of_product.get(&id) {
            fusion.place_deviations(id, deviations);
        }
        if fusion.groups.len() > MAX_GROUPS {
            return Err(PlanError::TooLarge { limit: MAX_GROUPS });
        }
    }
    merge(graph, order, &mut fusion);
    read_less(graph, order, &mut fusion);
    Ok(fusion)
}

impl Fusion {
    /// Whether a node only views another's memory.
    pub(crate) fn is_view(&self, graph: &Graph, id: NodeId) -> bool {
        !graph.op(id).is_leaf() && self.views[id.index()].base != id
    }

    /// A constant of one value, or a size: read as an immediate.
    pub(crate) fn is_immediate(graph: &Graph, id: NodeId) -> bool {
        match graph.op(id) {
            Op::Size(_) | Op::Training => true,
            Op::Const(tensor) => tensor.splat().is_some(),
            _ => false,
        }
    }

    /// Whether the memory that `id` views holds its type, not a narrower one.
    fn is_of_own_type(&self, graph: &Graph, id: NodeId) -> bool {
        graph.ty(self.views[id.index()].base).dtype == graph.ty(id).dtype
    }

    /// Whether the memory that `id` views is what a consumer needs that reads its type in row-major order.
    fn lies_dense(&self, graph: &Graph, id: NodeId) -> bool {
        self.views[id.index()].is_dense() && self.is_of_own_type(graph, id)
    }

    /// The view through which a consumer that needs row-major order reads `id`: itself if it is dense, else a copy.
    pub(crate) fn dense_view(&self, graph: &Graph, id: NodeId) -> View {
        if self.lies_dense(graph, id) {
            self.views[id.index()].clone()
        } else {
            View::dense(id, &graph.ty(id).shape)
        }
    }

    /// The view through which a matrix product reads its f32 operand `id`: itself if strides can say it, else a copy.
    pub(crate) fn matrix_view(&self, graph: &Graph, id: NodeId) -> View {
        let view = &self.views[id.index()];
        if view.as_matrices().is_some() && self.is_of_own_type(graph, id) {
            view.clone()
        } else {
            self.dense_view(graph, id)
        }
    }

    /// The view through which a consumer that takes any strides reads `id`: itself if it is of its type, else a copy.
    pub(crate) fn strided_view(&self, graph: &Graph, id: NodeId) -> View {
        if self.is_of_own_type(graph, id) {
            self.views[id.index()].clone()
        } else {
            self.dense_view(graph, id)
        }
    }

    fn place(
        &mut self,
        graph: &Graph,
        id: NodeId,
        position: usize,
        by_domain: &mut BTreeMap<Domain, Vec<usize>>,
    ) {
        let region = graph.node(id).region;
        let kind = kind_of(graph.op(id));
        let domain = self.domain(graph, id);
        let reads = self.memory_reads(graph, id, position, kind);
        let again = self.again[id.index()];
        let key = (region, again, domain.clone());
        let may_join = |group: &usize| self.may_join(graph, *group, id, kind, &reads);
        let joined = match kind {
            Kind::Primitive => self.same_attention(graph, id),
            Kind::Loop | Kind::Collective => by_domain.get(&key).and_then(|candidates| {
                let recent = candidates.iter().rev().take(MAX_CANDIDATES);
                // A reduction goes where its operand is made, if it can.
                let own = matches!(graph.op(id), Op::Reduce { .. })
                    .then(|| self.group_of[self.views[graph.operand(id, 0).index()].base.index()])
                    .flatten()
                    .filter(|own| candidates.contains(own));
                own.iter().chain(recent).copied().find(may_join)
            }),
            Kind::Assembly | Kind::Copy => None,
        };
        let group = joined.unwrap_or_else(|| {
            self.groups.push(Group {
                kind,
                region,
                members: Vec::new(),
                domain,
                reads: Vec::new(),
                position,
                again,
            });
            self.needs.push(BitSet::default());
            by_domain.entry(key).or_default().push(self.groups.len() - 1);
            self.groups.len() - 1
        });
        self.groups[group].members.push(id);
        // A product does not wait for what only uses the sums over its rows.
        let sums = matches!(graph.op(id), Op::Reduce { .. });
        if !sums || self.groups[group].kind != Kind::Primitive {
            self.groups[group].position = position;
        }
        self.group_of[id.index()] = Some(group);
        if let Some(&cast) = self.narrowed.get(&id) {
            self.groups[group].members.push(cast);
            self.group_of[cast.index()] = Some(group);
        }
        for read in reads {
            if let Some(from) = self.producer(read)
                && from != group
            {
                self.depend(group, from);
            }
            let direct = self.group_of[read.index()] == Some(group);
            if !direct && !self.groups[group].reads.contains(&read) {
                self.groups[group].reads.push(read);
            }
        }
    }

    /// Adds the squared deviations that a product's kernel computes, each after the value that it is of, while nothing
    /// else has joined the product.
    fn place_deviations(&mut self, product: NodeId, deviations: &[[NodeId; 2]]) {
        let Some(group) = self.group_of[product.index()] else { return };
        for &member in deviations.iter().flatten() {
            if self.group_of[member.index()].is_none() {
                self.groups[group].members.push(member);
                self.group_of[member.index()] = Some(group);
            }
        }
    }

    /// The group of the other gradients of one attention: one kernel computes all that are wanted. They have the
    /// same operands, so none needs another.
    fn same_attention(&self, graph: &Graph, id: NodeId) -> Option<usize> {
        let attributes = |id| match *graph.op(id) {
            Op::AttentionGrad { of: _, scale, causal, products, rounding } => {
                Some((scale, causal, products, rounding))
            }
            _ => None,
        };
        let wanted = Some(attributes(id)?);
        let operands = graph.operands(id);
        let same = |group: &Group| {
            let first = group.members[0];
            attributes(first) == wanted
                && group.region == graph.node(id).region
                && graph.operands(first) == operands
        };
        self.groups.iter().position(same)
    }

    /// The group that writes the memory of `base`.
    pub(crate) fn producer(&self, base: NodeId) -> Option<usize> {
        self.group_of[base.index()].or(self.copied[base.index()])
    }

    /// Records that `group` runs after `from`.
    pub(crate) fn depend(&mut self, group: usize, from: usize) {
        if self.needs[group].contains(from) {
            return;
        }
        let mut gained = self.needs[from].clone();
        gained.insert(from);
        if group + 1 == self.groups.len() {
            // Nothing needs the newest group yet.
            return self.needs[group].union(&gained);
        }
        for at in 0..self.groups.len() {
            if at == group || self.needs[at].contains(group) {
                self.needs[at].union(&gained);
            }
        }
    }

    fn domain(&self, graph: &Graph, id: NodeId) -> Vec<Dim> {
        match graph.op(id) {
            Op::Reduce { .. } => graph.ty(graph.operand(id, 0)).shape.0.clone(),
            // All exchanges of one kind may share a step.
            Op::AllReduce(op) => vec![Dim::fixed(*op as usize)],
            _ if is_view_op(graph.op(id)) => self.views[graph.operand(id, 0).index()].dims.clone(),
            _ => graph.ty(id).shape.0.clone(),
        }
    }

    /// The bases that computing `id` reads. Makes dense copies where a primitive needs them.
    fn memory_reads(
        &mut self,
        graph: &Graph,
        id: NodeId,
        position: usize,
        kind: Kind,
    ) -> Vec<NodeId> {
        if let Some(low) = self.low.get(&id).cloned() {
            let mut reads = vec![low.a.base, low.b.base];
            for scale in low.scales.into_iter().flat_map(Scales::values) {
                reads.push(self.dense_base(graph, scale, position));
            }
            return reads;
        }
        let mut operands = graph.operands(id);
        let mut codes = Vec::new();
        if let Some(known) = self.codes.get(&id).cloned() {
            for Codes { view, scale } in known {
                let stored = self.views[view.base.index()].base == view.base;
                let base = view.base;
                codes.push(if stored { base } else { self.dense_base(graph, base, position) });
                codes.push(self.dense_base(graph, scale, position));
            }
            operands.drain(..3);
        }
        match (kind, graph.op(id)) {
            (Kind::Loop | Kind::Assembly | Kind::Copy, _) => {
                let sources = self.sources(graph, id).into_iter().map(|view| view.base);
                sources.filter(|&base| !Fusion::is_immediate(graph, base)).collect()
            }
            (Kind::Primitive, Op::Matmul { .. }) => operands
                .iter()
                .map(|&operand| {
                    let base = self.matrix_view(graph, operand).base;
                    if base == operand { self.dense_base(graph, operand, position) } else { base }
                })
                .collect(),
            // Its kernels take any strides.
            (Kind::Primitive, Op::Attention { .. } | Op::AttentionGrad { .. }) => {
                let mut reads = codes;
                let bf16 = incoming(graph, id).filter(|_| self.narrowed.contains_key(&id));
                for operand in operands {
                    if bf16 == Some(operand) {
                        reads.push(self.views[operand.index()].base);
                        continue;
                    }
                    let base = self.strided_view(graph, operand).base;
                    reads.push(if base == operand {
                        self.dense_base(graph, operand, position)
                    } else {
                        base
                    });
                }
                reads
            }
            (Kind::Primitive | Kind::Collective, _) => {
                let codes = (kind == Kind::Collective)
                    .then(|| exchanged_codes(graph, &self.views, operands[0]))
                    .flatten();
                let codes = codes.into_iter().flat_map(|(codes, scales, _)| [codes, scales]);
                operands
                    .iter()
                    .map(|&operand| self.dense_base(graph, operand, position))
                    .chain(codes)
                    .collect()
            }
        }
    }

    /// The base of a dense view of `id`, copying it if it has none.
    fn dense_base(&mut self, graph: &Graph, id: NodeId, position: usize) -> NodeId {
        let view = self.views[id.index()].clone();
        if self.lies_dense(graph, id) {
            return view.base;
        }
        if self.copied[id.index()].is_none() && self.group_of[id.index()].is_none() {
            let group = self.groups.len();
            self.groups.push(Group {
                kind: Kind::Copy,
                region: graph.node(id).region,
                members: vec![id],
                domain: view.dims.clone(),
                reads: vec![view.base],
                position,
                again: self.again[id.index()],
            });
            self.needs.push(BitSet::default());
            self.copied[id.index()] = Some(group);
            if let Some(from) = self.producer(view.base) {
                self.depend(group, from);
            }
        }
        id
    }

    fn may_join(
        &self,
        graph: &Graph,
        group: usize,
        id: NodeId,
        kind: Kind,
        reads: &[NodeId],
    ) -> bool {
        let into = &self.groups[group];
        if into.members.len() >= MAX_MEMBERS || into.reads.len() + reads.len() > MAX_READS {
            return kind == Kind::Collective
                && into.kind == kind
                && !reads.iter().any(|&read| self.needs_group(read, group));
        }
        // A path that leaves the group must not come back.
        if reads.iter().any(|&read| self.needs_group(read, group)) {
            return false;
        }
        if kind == Kind::Collective {
            return into.kind == kind;
        }
        let Some(uses) = self.uses_at_same_index(graph, group, id) else { return false };
        match into.kind {
            Kind::Loop => {
                uses || reads
                    .iter()
                    .any(|read| into.reads.contains(read) && !self.is_small(graph, *read))
            }
            Kind::Primitive => {
                uses && has_epilogue(graph.op(into.members[0])) && self.follows(graph, id)
            }
            Kind::Assembly | Kind::Copy | Kind::Collective => false,
        }
    }

    /// Whether a node can be computed by rows and columns, in an epilogue.
    pub(crate) fn follows(&self, graph: &Graph, id: NodeId) -> bool {
        let down = match graph.op(id) {
            Op::Reduce { axes, .. } => {
                let rank = graph.ty(graph.operand(id, 0)).shape.rank();
                crosses_rows(axes, rank) && graph.ty(id).dtype.is_float()
            }
            _ => true,
        };
        let (op, dims) = (graph.op(id), &graph.ty(id).shape.0);
        let fits = |(position, operand): (usize, NodeId)| {
            let view = &self.views[operand.index()];
            let is_matrix = |view: &View| view.as_matrix().is_some();
            match self.recomputed[view.base.index()] {
                _ if position >= first_parameter(op) => is_matrix(&view.along_axis(op, dims)),
                true => self.follows(graph, view.base),
                false => is_matrix(view) || Fusion::is_immediate(graph, view.base),
            }
        };
        down && graph.operands(id).into_iter().enumerate().all(fits)
    }

    /// What a node reads: its operands, or in place of one that it computes for itself, the operands of that.
    pub(crate) fn sources(&self, graph: &Graph, id: NodeId) -> Vec<&View> {
        let mut sources = Vec::new();
        for operand in graph.operands(id) {
            let view = &self.views[operand.index()];
            if self.recomputed[view.base.index()] {
                sources.extend(self.sources(graph, view.base));
            } else {
                sources.push(view);
            }
        }
        sources
    }

    /// Whether `id` uses a value that the group computes; `None` if it does so at another index than it computes.
    pub(crate) fn uses_at_same_index(
        &self,
        graph: &Graph,
        group: usize,
        id: NodeId,
    ) -> Option<bool> {
        let mut uses = false;
        for view in self.sources(graph, id) {
            if self.group_of[view.base.index()] != Some(group) {
                continue;
            }
            let reduced = matches!(graph.op(view.base), Op::Reduce { .. });
            if reduced || !view.is_whole(graph) || view.dims != self.groups[group].domain {
                return None;
            }
            uses = true;
        }
        Some(uses)
    }

    /// Whether the memory of `base` comes from a group that needs `group` (other than that group itself).
    fn needs_group(&self, base: NodeId, group: usize) -> bool {
        self.producer(base).is_some_and(|from| from != group && self.needs[from].contains(group))
    }

    /// Sharing the read of a small operand is no reason to share a kernel.
    pub(crate) fn is_small(&self, graph: &Graph, base: NodeId) -> bool {
        let elements = graph.ty(base).shape.elements();
        elements.is_some_and(|elements| !elements.batch && elements.scale < 1024)
    }
}

pub(crate) fn is_view_op(op: &Op) -> bool {
    matches!(op, Op::Reshape(_) | Op::Transpose(_) | Op::Broadcast(_) | Op::Slice { .. })
}

/// Whether elementwise nodes may follow within the kernel of this op.
pub(crate) fn has_epilogue(op: &Op) -> bool {
    matches!(op, Op::Matmul { .. } | Op::Conv2d(_) | Op::Conv2dGradInput(_))
}

pub(crate) fn kind_of(op: &Op) -> Kind {
    match op {
        Op::Size(_)
        | Op::Training
        | Op::Unary(_)
        | Op::Cast(_)
        | Op::Binary(_)
        | Op::Compare(_)
        | Op::Select
        | Op::Reduce { .. }
        | Op::Quantize { .. }
        | Op::Dequantize { .. }
        | Op::StraightThrough { .. } => Kind::Loop,
        Op::Matmul { .. }
        | Op::Conv2d(_)
        | Op::Conv2dGradInput(_)
        | Op::Conv2dGradWeight(_)
        | Op::MaxPool2d(_)
        | Op::MaxPool2dGrad(_)
        | Op::AveragePool2d(_)
        | Op::AveragePool2dGrad(_)
        | Op::Gather
        | Op::Scatter { .. }
        | Op::TopK { .. }
        | Op::Iota(_)
        | Op::Random { .. }
        | Op::Attention { .. }
        | Op::AttentionGrad { .. }
        | Op::Recurrence(_)
        | Op::RecurrenceGrad { .. }
        | Op::Softmax
        | Op::LogSoftmax
        | Op::CrossEntropy
        | Op::CrossEntropyGrad => Kind::Primitive,
        Op::Pad { .. } | Op::Concat { .. } => Kind::Assembly,
        Op::AllReduce(_) => Kind::Collective,
        Op::Reshape(_) | Op::Transpose(_) | Op::Broadcast(_) | Op::Slice { .. } => Kind::Copy,
        Op::Input(_) | Op::Param(_) | Op::State(_) | Op::Const(_) => {
            unreachable!("verified: leaves are not computed")
        }
    }
}
