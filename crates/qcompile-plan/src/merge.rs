//! Joins groups that were begun apart, loops to loops and to the epilogue of a product: a node is placed before it is
//! known who uses it.

use crate::bit_set::BitSet;
use crate::fuse::{Domain, Fusion, Group, Kind, MAX_MEMBERS, MAX_READS, has_epilogue};
use crate::low::stored_operands;
use qcompile_ir::{Graph, NodeId, Op};
use std::collections::BTreeMap;

/// How many neighbours of the same domain are tried.
const MAX_NEIGHBOURS: usize = 12;

/// Joins groups of the same region and domain: loops where one uses the other's values or both read the same memory, and
/// loops to the product whose values they use, or whose epilogue alone uses theirs.
pub(crate) fn merge(graph: &Graph, order: &[NodeId], fusion: &mut Fusion) {
    let mut positions = vec![0; graph.len()];
    for (position, id) in order.iter().enumerate() {
        positions[id.index()] = position;
    }
    let mut by_domain: BTreeMap<Domain, Vec<usize>> = BTreeMap::new();
    for (index, group) in fusion.groups.iter().enumerate() {
        let product = group.kind == Kind::Primitive && has_epilogue(graph.op(group.members[0]));
        if group.kind == Kind::Loop || product {
            let domain = (group.region, group.again, group.domain.clone());
            by_domain.entry(domain).or_default().push(index);
        }
    }
    for mut groups in by_domain.into_values() {
        let mut at = 0;
        while at < groups.len() {
            let first = groups[at];
            let later = at + 1..groups.len().min(at + 1 + MAX_NEIGHBOURS);
            match later.into_iter().find(|&next| may_merge(graph, fusion, first, groups[next])) {
                Some(next) => {
                    let mut second = groups.remove(next);
                    if fusion.groups[second].kind == Kind::Primitive {
                        std::mem::swap(&mut groups[at], &mut second);
                    }
                    join(fusion, &positions, groups[at], second);
                    // What could not join before may now join through the other.
                    at = at.saturating_sub(MAX_NEIGHBOURS);
                }
                None => at += 1,
            }
        }
    }
    drop_empty(fusion);
}

fn may_merge(graph: &Graph, fusion: &Fusion, a: usize, b: usize) -> bool {
    let (first, second) = (&fusion.groups[a], &fusion.groups[b]);
    let reads = second.reads.iter().filter(|read| !first.reads.contains(read)).count();
    if first.members.len() + second.members.len() > MAX_MEMBERS
        || first.reads.len() + reads > MAX_READS
    {
        return false;
    }
    let between = |from: usize, to: usize| {
        (0..fusion.groups.len()).any(|group| {
            group != to && fusion.needs[to].contains(group) && fusion.needs[group].contains(from)
        })
    };
    let users = |group: &Group, of: usize| {
        if !group.reads.iter().any(|read| fusion.group_of[read.index()] == Some(of)) {
            return Some(false);
        }
        let uses = |&id: &NodeId| fusion.uses_at_same_index(graph, of, id);
        group.members.iter().map(uses).try_fold(false, |any, uses| Some(any | uses?))
    };
    let (Some(forth), Some(back)) = (users(second, a), users(first, b)) else { return false };
    let shares = first
        .reads
        .iter()
        .any(|read| second.reads.contains(read) && !fusion.is_small(graph, *read));
    let follow = |group: &Group| group.members.iter().all(|&id| fusion.follows(graph, id));
    // What a product's epilogue reads may be made in it, too, if it alone does.
    let feeds = |from: usize, product: usize| {
        let members = &fusion.groups[from].members;
        let elementwise = members.iter().all(|&id| !matches!(graph.op(id), Op::Reduce { .. }));
        let first = fusion.groups[product].members[0];
        let operands = stored_operands(graph, &fusion.low, &fusion.codes, first);
        let base = |id: &NodeId| fusion.views[id.index()].base;
        let multiplied = operands.iter().any(|id| members.contains(&base(id)));
        let mut others = fusion.groups.iter().enumerate().filter(|(at, _)| *at != product);
        elementwise
            && !multiplied
            && follow(&fusion.groups[from])
            && others.all(|(_, other)| members.iter().all(|id| !other.reads.contains(id)))
    };
    let fits = match (first.kind, second.kind) {
        (Kind::Primitive, Kind::Loop) if back => !forth && feeds(b, a),
        (Kind::Loop, Kind::Primitive) if forth => !back && feeds(a, b),
        (Kind::Primitive, Kind::Loop) => forth && follow(second),
        (Kind::Loop, Kind::Primitive) => back && follow(first),
        (Kind::Primitive, _) | (_, Kind::Primitive) => false,
        _ => forth || back || shares,
    };
    fits && !between(a, b) && !between(b, a)
}

/// Moves the members of `b` to `a`.
fn join(fusion: &mut Fusion, positions: &[usize], a: usize, b: usize) {
    let moved = std::mem::take(&mut fusion.groups[b].members);
    let reads = std::mem::take(&mut fusion.groups[b].reads);
    for id in &moved {
        fusion.group_of[id.index()] = Some(a);
    }
    let position = fusion.groups[b].position;
    let into = &mut fusion.groups[a];
    into.members.extend(moved);
    // The product itself stays in front.
    let loops = usize::from(into.kind == Kind::Primitive);
    into.members[loops..].sort_by_key(|id| positions[id.index()]);
    into.position = into.position.max(position);
    for read in reads {
        if !into.reads.contains(&read) {
            into.reads.push(read);
        }
    }
    let group_of = &fusion.group_of;
    into.reads.retain(|read| group_of[read.index()] != Some(a));
    let mut needs = std::mem::take(&mut fusion.needs[b]);
    needs.union(&fusion.needs[a]);
    needs.remove(a);
    needs.remove(b);
    fusion.needs[a] = needs.clone();
    needs.insert(a);
    for group in (0..fusion.groups.len()).filter(|&group| group != a) {
        if fusion.needs[group].contains(a) || fusion.needs[group].contains(b) {
            fusion.needs[group].remove(b);
            fusion.needs[group].union(&needs);
        }
    }
}

/// Forgets groups without members.
pub(crate) fn drop_empty(fusion: &mut Fusion) {
    let mut renumbered: Vec<Option<usize>> = Vec::with_capacity(fusion.groups.len());
    let mut kept = 0;
    for group in &fusion.groups {
        renumbered.push((!group.members.is_empty()).then_some(kept));
        kept += usize::from(!group.members.is_empty());
    }
    for place in fusion.group_of.iter_mut().chain(&mut fusion.copied) {
        *place = place.and_then(|group| renumbered[group]);
    }
    let mut all_needs: Vec<BitSet> = Vec::with_capacity(kept);
    for (group, needs) in fusion.needs.iter().enumerate() {
        if renumbered[group].is_none() {
            continue;
        }
        let mut kept_needs = BitSet::default();
        for (old, new) in renumbered.iter().enumerate() {
            if let Some(new) = *new
                && needs.contains(old)
            {
                kept_needs.insert(new);
            }
        }
        all_needs.push(kept_needs);
    }
    fusion.needs = all_needs;
    fusion.groups.retain(|group| !group.members.is_empty());
}
