//! Where values live: which are stored at all, which share a slot, and what is updated in place.

use crate::fuse::{Fusion, Kind};
use crate::plan::bytes_of;
use crate::{Affine, Slot, SlotId, Storage};
use qcompile_ir::{Graph, NodeId, Op, Region};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

/// One place of the schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Item {
    /// A fused group.
    Group(usize),
    /// A dense copy of a value into an output's own slot.
    Output(usize),
    /// A copy of a next value into its leaf, where it could not be written in place.
    Next(NodeId, NodeId),
}

/// The slots and who is where.
pub(crate) struct Memory {
    pub(crate) slots: Vec<Slot>,
    /// The slot of each stored value (the base of views) or dense copy.
    pub(crate) slot_of: BTreeMap<NodeId, SlotId>,
    /// The slot of each output, in order.
    pub(crate) outputs: Vec<SlotId>,
    /// The all-reduces that exchange their operand's own memory.
    pub(crate) exchanged_in_place: BTreeSet<NodeId>,
}

/// Decisions that the schedule depends on.
pub(crate) struct Placement {
    /// `next` values that are written straight into their leaf.
    pub(crate) in_place: BTreeMap<NodeId, NodeId>,
    /// `(leaf, value)` copied at the end.
    pub(crate) copied: Vec<(NodeId, NodeId)>,
    /// Outputs (by position) that are computed into their own slot, by value.
    pub(crate) direct_outputs: BTreeMap<NodeId, usize>,
    /// Casts of parameters that last from step to step, with what is written there for the next one.
    pub(crate) lasting: BTreeMap<NodeId, NodeId>,
}

/// Decides what is written in place; orders every other reader of an overwritten leaf before its writer.
pub(crate) fn place(graph: &Graph, fusion: &mut Fusion) -> Placement {
    let mut placement = Placement {
        in_place: BTreeMap::new(),
        copied: Vec::new(),
        direct_outputs: BTreeMap::new(),
        lasting: BTreeMap::new(),
    };
    for (position, (_, id)) in graph.outputs().iter().enumerate() {
        let computed = fusion.group_of[id.index()].is_some();
        if computed && !placement.direct_outputs.contains_key(id) {
            placement.direct_outputs.insert(*id, position);
        }
    }
    let readers = readers(fusion);
    // A kernel that makes anything else, too, runs in every step.
    let lasts = |id: &NodeId| {
        let read = readers.contains_key(id) && !placement.direct_outputs.contains_key(id);
        read && graph.next().contains_key(id)
    };
    let all_last = |group: usize| fusion.groups[group].members.iter().all(lasts);
    let casts = graph
        .next()
        .iter()
        .filter(|&(id, value)| id != value && fusion.group_of[id.index()].is_some_and(all_last));
    placement.lasting = casts.map(|(&id, &value)| (id, value)).collect();
    for (&leaf, &value) in graph.next() {
        if leaf == value || !(graph.op(leaf).is_leaf() || placement.lasting.contains_key(&leaf)) {
            continue;
        }
        let taken = placement.direct_outputs.contains_key(&value)
            || placement.in_place.contains_key(&value);
        // Evaluation runs the forward region alone and must leave leaves as they are.
        let updates = |group: &usize| fusion.groups[*group].region == Region::Update;
        let group = fusion.group_of[value.index()].filter(|_| !taken).filter(updates);
        let in_place = group.is_some_and(|group| {
            let others = readers.get(&leaf).into_iter().flatten().copied();
            let others: Vec<usize> = others.filter(|&other| other != group).collect();
            let ordered = others.iter().all(|&other| !fusion.needs[other].contains(group));
            if ordered && same_index_only(graph, fusion, group, leaf) {
                others.into_iter().for_each(|other| fusion.depend(group, other));
                true
            } else {
                false
            }
        });
        if in_place {
            placement.in_place.insert(value, leaf);
        } else {
            placement.copied.push((leaf, value));
        }
    }
    placement
}

/// Which groups read the memory of each base.
pub(crate) fn readers(fusion: &Fusion) -> BTreeMap<NodeId, Vec<usize>> {
    let mut readers: BTreeMap<NodeId, Vec<usize>> = BTreeMap::new();
    for (position, group) in fusion.groups.iter().enumerate() {
        for &read in &group.reads {
            readers.entry(read).or_default().push(position);
        }
    }
    readers
}

/// What the forward region stores for later regions, as far as it depends on the batch size: each value with its bytes.
pub(crate) fn saved(graph: &Graph, fusion: &Fusion) -> Vec<(NodeId, Affine)> {
    let region = |group: usize| fusion.groups[group].region;
    let saved = readers(fusion).into_iter().filter(|(id, readers)| {
        let computed = fusion.producer(*id).is_some_and(|from| region(from) == Region::Forward);
        let large = graph.ty(*id).shape.elements().is_some_and(|elements| elements.batch);
        computed && large && readers.iter().any(|&reader| region(reader) > Region::Forward)
    });
    saved.map(|(id, _)| (id, bytes_of(graph.ty(id)))).collect()
}

/// The bases that someone reads from memory; what only its own group uses stays in registers.
pub(crate) fn stored(graph: &Graph, fusion: &Fusion) -> BTreeSet<NodeId> {
    let mut stored: BTreeSet<NodeId> = readers(fusion).into_keys().collect();
    for id in graph.outputs().iter().map(|(_, id)| id).chain(graph.next().values()) {
        stored.insert(fusion.views[id.index()].base);
    }
    stored
}

/// Whether a group of loops reads `leaf` only at the index that it writes.
fn same_index_only(graph: &Graph, fusion: &Fusion, group: usize, leaf: NodeId) -> bool {
    let group = &fusion.groups[group];
    if !group.reads.contains(&leaf) {
        return matches!(group.kind, Kind::Loop | Kind::Primitive | Kind::Copy);
    }
    let elementwise = group.kind == Kind::Loop
        && !group.members.iter().any(|&id| matches!(graph.op(id), Op::Reduce { .. }));
    elementwise
        && group
            .members
            .iter()
            .flat_map(|&id| fusion.sources(graph, id))
            .all(|view| view.base != leaf || (view.is_whole(graph) && view.dims == group.domain))
}

/// Colours the values of a schedule: each gets a slot for its lifetime.
pub(crate) fn allocate(
    graph: &Graph,
    fusion: &Fusion,
    placement: &Placement,
    schedule: &[Item],
    batch: usize,
) -> Memory {
    let mut memory = Memory {
        slots: Vec::new(),
        slot_of: BTreeMap::new(),
        outputs: Vec::new(),
        exchanged_in_place: BTreeSet::new(),
    };
    for id in graph.ids() {
        let storage = match graph.op(id) {
            Op::Input(_) => Storage::Input,
            Op::Param(_) | Op::State(_) => Storage::Kept,
            Op::Const(_) => Storage::Const,
            _ => continue,
        };
        let slot = memory.new_slot(storage, bytes_of(graph.ty(id)));
        memory.slot_of.insert(id, slot);
    }
    for (_, id) in graph.outputs() {
        let slot = memory.new_slot(Storage::Output, bytes_of(graph.ty(*id)));
        memory.outputs.push(slot);
    }
    for (&id, &position) in &placement.direct_outputs {
        memory.slot_of.insert(id, memory.outputs[position]);
    }
    for (&value, leaf) in &placement.in_place {
        // That of a cast is coloured.
        if let Some(&slot) = memory.slot_of.get(leaf) {
            memory.slot_of.insert(value, slot);
        }
    }
    memory.exchange_in_place(graph, fusion);
    memory.colour(graph, fusion, placement, schedule, batch);
    memory
}

impl Memory {
    fn new_slot(&mut self, storage: Storage, bytes: Affine) -> SlotId {
        self.slots.push(Slot { storage, bytes });
        let index = u32::try_from(self.slots.len() - 1).expect("fewer slots than nodes");
        SlotId(index)
    }

    /// An all-reduce works on its operand's memory if nobody else reads that.
    fn exchange_in_place(&mut self, graph: &Graph, fusion: &Fusion) {
        let readers = readers(fusion);
        for group in fusion.groups.iter().filter(|group| group.kind == Kind::Collective) {
            for &id in &group.members {
                let operand = graph.operand(id, 0);
                let view = &fusion.views[operand.index()];
                let alone = readers.get(&view.base).is_some_and(|readers| readers.len() == 1)
                    && group
                        .members
                        .iter()
                        .filter(|&&other| {
                            fusion.views[graph.operand(other, 0).index()].base == view.base
                        })
                        .count()
                        == 1;
                let computed = fusion.producer(view.base).is_some();
                let free =
                    !self.slot_of.contains_key(&view.base) && !self.slot_of.contains_key(&id);
                let whole = view.is_dense()
                    && view.offset == Affine::ZERO
                    && bytes_of(graph.ty(view.base)) == bytes_of(graph.ty(id));
                if alone && computed && free && whole {
                    self.exchanged_in_place.insert(id);
                }
            }
        }
    }

    fn colour(
        &mut self,
        graph: &Graph,
        fusion: &Fusion,
        placement: &Placement,
        schedule: &[Item],
        batch: usize,
    ) {
        // An exchanged value lives in its operand's memory.
        let owner = |id: NodeId| -> NodeId {
            if self.exchanged_in_place.contains(&id) {
                fusion.views[graph.operand(id, 0).index()].base
            } else {
                id
            }
        };
        let mut first: BTreeMap<NodeId, usize> = BTreeMap::new();
        let mut last: BTreeMap<NodeId, usize> = BTreeMap::new();
        for (at, item) in schedule.iter().enumerate() {
            let (written, read) = touched(graph, fusion, item);
            for id in written {
                let id = owner(id);
                first.entry(id).or_insert(at);
                last.entry(id).or_insert(at);
            }
            for id in read {
                last.insert(owner(id), at);
            }
        }
        let exchanged: Vec<(NodeId, NodeId)> =
            self.exchanged_in_place.iter().map(|&id| (id, owner(id))).collect();
        let mut starting: Vec<Vec<NodeId>> = vec![Vec::new(); schedule.len()];
        let mut ending: Vec<Vec<NodeId>> = vec![Vec::new(); schedule.len()];
        let stored = stored(graph, fusion);
        // Written before the first step or by an update, read up to its last reader: in between its memory is free.
        let lasting = placement.lasting.iter().map(|(&id, &next)| {
            let in_place = placement.in_place.get(&next) == Some(&id);
            let group = fusion.group_of[next.index()].filter(|_| in_place);
            let writer = group.map_or(Item::Next(id, next), Item::Group);
            let written = schedule.iter().position(|item| *item == writer);
            let written = written.expect("every next value is scheduled");
            let spans = vec![0..=last[&id], written..=schedule.len()];
            (id, next, Piece { spans, bytes: bytes_of(graph.ty(id)) })
        });
        let lasting: Vec<(NodeId, NodeId, Piece)> = lasting.collect();
        for (&id, &at) in &first {
            let lasts = placement.lasting.contains_key(&id) || placement.in_place.contains_key(&id);
            if !lasts && !self.slot_of.contains_key(&id) && stored.contains(&id) {
                starting[at].push(id);
                ending[last[&id]].push(id);
            }
        }
        let mut pieces: Vec<Piece> = Vec::new();
        let mut piece_of: BTreeMap<NodeId, usize> = BTreeMap::new();
        for at in 0..schedule.len() {
            for &id in &starting[at] {
                let over = |&dying: &NodeId| {
                    first[&dying] < at && may_overwrite(graph, fusion, &schedule[at], id, dying)
                };
                let piece = match ending[at].iter().position(over) {
                    Some(dying) => piece_of[&ending[at].swap_remove(dying)],
                    None => {
                        pieces.push(Piece { spans: Vec::new(), bytes: Affine::ZERO });
                        pieces.len() - 1
                    }
                };
                pieces[piece].spans.push(at..=last[&id]);
                pieces[piece].bytes = pieces[piece].bytes.max(bytes_of(graph.ty(id)));
                piece_of.insert(id, piece);
            }
        }
        for (id, next, piece) in lasting {
            piece_of.insert(id, pieces.len());
            if placement.in_place.get(&next) == Some(&id) {
                piece_of.insert(next, pieces.len());
            }
            pieces.push(piece);
        }
        let slots = self.share(&pieces, batch);
        self.slot_of.extend(piece_of.into_iter().map(|(id, piece)| (id, slots[piece])));
        for (id, owner) in exchanged {
            self.slot_of.insert(id, self.slot_of[&owner]);
        }
    }

    /// The slot of each piece: the largest pieces first, each where none is in its way, in the smallest slot of those (greedy
    /// by size: Pisarchyk and Lee 2020, arXiv:2001.03288).
    fn share(&mut self, pieces: &[Piece], batch: usize) -> Vec<SlotId> {
        let mut sorted: Vec<usize> = (0..pieces.len()).collect();
        sorted.sort_by_key(|&piece| (Reverse(pieces[piece].bytes.at(batch)), piece));
        let mut shared: Vec<(Affine, Vec<usize>)> = Vec::new();
        for piece in sorted {
            let wanted = pieces[piece].bytes;
            // What a fixed size and one by the batch size share is as large as both.
            let grown = |slot: &(Affine, Vec<usize>)| {
                let free = slot.1.iter().all(|&other| !pieces[other].lives_with(&pieces[piece]));
                let growth = slot.0.max(wanted).at(batch).saturating_sub(slot.0.at(batch));
                (free && growth < wanted.at(batch)).then_some((growth, slot.0.at(batch)))
            };
            let fitting = shared.iter_mut().filter_map(|slot| Some((grown(slot)?, slot)));
            match fitting.min_by_key(|(waste, _)| *waste) {
                Some((_, (bytes, members))) => {
                    *bytes = (*bytes).max(wanted);
                    members.push(piece);
                }
                None => shared.push((wanted, vec![piece])),
            }
        }
        // Numbered as they are used.
        shared.sort_by_key(|(_, members)| members.iter().copied().min());
        let mut slots = vec![SlotId(0); pieces.len()];
        for (bytes, members) in shared {
            let slot = self.new_slot(Storage::Shared, bytes);
            members.into_iter().for_each(|piece| slots[piece] = slot);
        }
        slots
    }
}

/// Memory of a value, and of those that are written over it as it dies, for their part of the schedule.
struct Piece {
    spans: Vec<RangeInclusive<usize>>,
    bytes: Affine,
}

impl Piece {
    fn lives_with(&self, other: &Piece) -> bool {
        let meet = |a: &RangeInclusive<usize>, b: &RangeInclusive<usize>| {
            a.start() <= b.end() && b.start() <= a.end()
        };
        self.spans.iter().any(|span| other.spans.iter().any(|other| meet(span, other)))
    }
}

/// Whether an item may write a value over another that it reads for the last time: it reads that at the index where it
/// writes only, and their elements lie alike.
fn may_overwrite(graph: &Graph, fusion: &Fusion, item: &Item, id: NodeId, dying: NodeId) -> bool {
    let Item::Group(group) = *item else { return false };
    let group = &fusion.groups[group];
    let loops = match group.kind {
        Kind::Loop => &group.members[..],
        Kind::Primitive => &group.members[1..],
        Kind::Assembly | Kind::Copy | Kind::Collective => return false,
    };
    let (own, other) = (graph.ty(id), graph.ty(dying));
    let sources = |id: NodeId| fusion.sources(graph, id).into_iter();
    // A product reads its operands at many indices.
    let product = group.members[0];
    let apart = group.kind == Kind::Loop
        || match fusion.low.get(&product) {
            Some(low) => low.a.base != dying && low.b.base != dying,
            None => sources(product).all(|view| view.base != dying),
        };
    let mut reads =
        loops.iter().flat_map(|&id| sources(id)).filter(|view| view.base == dying).peekable();
    group.reads.contains(&dying)
        && !matches!(graph.op(id), Op::Reduce { .. })
        && own.shape.0 == group.domain
        && own.shape == other.shape
        && own.dtype.size() == other.dtype.size()
        && apart
        && reads.peek().is_some()
        && reads.all(|view| view.is_whole(graph) && view.dims == group.domain)
}

/// The bases that an item writes and reads.
fn touched(graph: &Graph, fusion: &Fusion, item: &Item) -> (Vec<NodeId>, Vec<NodeId>) {
    match *item {
        Item::Group(group) => {
            let group = &fusion.groups[group];
            (group.members.clone(), group.reads.clone())
        }
        Item::Output(position) => {
            let (_, id) = &graph.outputs()[position];
            (Vec::new(), vec![fusion.views[id.index()].base])
        }
        Item::Next(_, value) => (Vec::new(), vec![fusion.views[value.index()].base]),
    }
}
