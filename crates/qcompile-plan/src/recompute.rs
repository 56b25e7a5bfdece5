//! Which forward values are computed again by whoever reads them, instead of being kept for the backward region.
//!
//! What the backward region reads lives through most of the step, so it decides how much memory a step takes. An
//! elementwise value (a normalized one, a mask, the error function of a GELU) is made again from what is kept anyway,
//! within the loop that reads it: a core computes one in less time than memory takes to write and read it.

use crate::fuse::{Fusion, Kind, MAX_READS, is_view_op, kind_of};
use crate::low::stored_operands;
use crate::memory::readers;
use crate::merge::drop_empty;
use crate::view::View;
use qcompile_ir::{BinaryOp, Graph, NodeId, Op, Region, UnaryOp};
use std::collections::BTreeSet;

/// The most work that is done again for one value, in additions, and the most large values that it may start from.
const MOST_WORK: usize = 16;
const MOST_SOURCES: usize = 4;
/// A value this many times smaller than another costs nothing beside it.
const SMALL: usize = 16;

/// What a value can be made from.
#[derive(Clone, Default)]
struct Recipe {
    /// Large values that are read.
    sources: BTreeSet<NodeId>,
    /// Values that are made on the way, the value itself included.
    made: BTreeSet<NodeId>,
}

/// For each node, by its index, whether its readers compute it.
pub(crate) fn recomputed(graph: &Graph, order: &[NodeId], views: &[View]) -> Vec<bool> {
    let mut recomputed = vec![false; graph.len()];
    let uses = uses(graph, views);
    let results = graph.outputs().iter().map(|(_, id)| id).chain(graph.next().values());
    let named: BTreeSet<NodeId> = results.map(|id| views[id.index()].base).collect();
    let may_recompute = |id: NodeId| !named.contains(&id) && may_recompute(graph, views, &uses, id);
    // Read by the backward region from memory, whatever is decided here.
    let mut kept: BTreeSet<NodeId> = BTreeSet::new();
    for &id in order {
        let cheap = may_recompute(id);
        if uses[id.index()].iter().any(|user| later(graph, *user)) && !cheap {
            kept.insert(id);
        }
    }
    let mut recipes: Vec<Recipe> = vec![Recipe::default(); graph.len()];
    for &id in order {
        let itself = || Recipe { sources: BTreeSet::from([id]), made: BTreeSet::new() };
        if !may_recompute(id) {
            recipes[id.index()] = if graph.op(id).is_leaf() { Recipe::default() } else { itself() };
            continue;
        }
        let mut recipe = Recipe { made: BTreeSet::from([id]), ..Recipe::default() };
        for operand in graph.operands(id) {
            let of = &recipes[views[operand.index()].base.index()];
            recipe
                .sources
                .extend(of.sources.iter().filter(|source| !is_small(graph, **source, id)));
            recipe.made.extend(&of.made);
        }
        let wanted = uses[id.index()].iter().any(|user| later(graph, *user));
        let new: Vec<NodeId> = recipe.sources.difference(&kept).copied().collect();
        let work: usize = recipe.made.iter().filter_map(|made| work(graph, *made)).sum();
        let short = work <= MOST_WORK && recipe.sources.len() <= MOST_SOURCES;
        // Another value is kept in its place only if the forward region stores that anyway: for several readers.
        let pays = match new[..] {
            [] => true,
            [source] => uses[source.index()].len() > 1 && !narrows(graph, id),
            _ => false,
        };
        recipes[id.index()] = match (wanted, short && pays) {
            (true, true) => {
                kept.extend(new);
                recipe.made.iter().for_each(|made| recomputed[made.index()] = true);
                recipe
            }
            (true, false) => {
                kept.insert(id);
                itself()
            }
            (false, _) if short => recipe,
            (false, _) => itself(),
        };
    }
    recomputed
}

/// Whether a node belongs to what follows the forward region.
fn later(graph: &Graph, id: NodeId) -> bool {
    graph.node(id).region != Region::Forward
}

/// For each value, by index, the nodes that read it, through views or not.
fn uses(graph: &Graph, views: &[View]) -> Vec<Vec<NodeId>> {
    let mut uses: Vec<Vec<NodeId>> = vec![Vec::new(); graph.len()];
    for id in graph.ids().filter(|id| views[id.index()].base == *id) {
        for operand in graph.operands(id) {
            uses[views[operand.index()].base.index()].push(id);
        }
    }
    uses
}

/// Whether a value is stored to take less memory than what it is made from.
fn narrows(graph: &Graph, id: NodeId) -> bool {
    let of = |id: NodeId| graph.ty(id).dtype;
    matches!(graph.op(id), Op::Cast(to) if to.size() < of(graph.operand(id, 0)).size())
}

fn is_small(graph: &Graph, id: NodeId, beside: NodeId) -> bool {
    let elements = |id: NodeId| graph.ty(id).shape.elements();
    match (elements(id), elements(beside)) {
        (Some(id), Some(beside)) if id.batch == beside.batch => {
            id.scale.saturating_mul(SMALL) <= beside.scale
        }
        (Some(id), Some(beside)) => !id.batch && beside.batch,
        _ => false,
    }
}

/// What an element of an elementwise value takes to make, in additions, about; none of what is never made again.
fn work(graph: &Graph, id: NodeId) -> Option<usize> {
    match *graph.op(id) {
        Op::Unary(op) => match op {
            UnaryOp::Neg | UnaryOp::Abs | UnaryOp::Relu => Some(1),
            UnaryOp::Sqrt | UnaryOp::Reciprocal => Some(2),
            UnaryOp::Exp => Some(4),
            UnaryOp::Sigmoid | UnaryOp::Tanh | UnaryOp::Erf => Some(6),
            _ => None,
        },
        Op::Binary(op) => match op {
            BinaryOp::Add | BinaryOp::Sub | BinaryOp::Mul | BinaryOp::Max | BinaryOp::Min => {
                Some(1)
            }
            BinaryOp::Div => Some(2),
            _ => None,
        },
        Op::Compare(_) | Op::Select | Op::Cast(_) => Some(1),
        _ => None,
    }
}

/// Lets other groups compute a value for themselves, instead of reading it, where all that it is made from is in memory
/// for others anyway.
pub(crate) fn read_less(graph: &Graph, order: &[NodeId], fusion: &mut Fusion) {
    let results = graph.outputs().iter().map(|(_, id)| id).chain(graph.next().values());
    let named: BTreeSet<NodeId> = results.map(|id| fusion.views[id.index()].base).collect();
    let mut readers = readers(fusion);
    let cheap = |id: NodeId| work(graph, id) == Some(1) && !named.contains(&id);
    for &id in order.iter().filter(|id| cheap(**id)) {
        let Some(group) = fusion.group_of[id.index()] else { continue };
        let Some(others) = readers.get(&id) else { continue };
        let sources: BTreeSet<NodeId> = fusion
            .sources(graph, id)
            .iter()
            .map(|view| view.base)
            .filter(|&base| !Fusion::is_immediate(graph, base))
            .collect();
        // A small value may be stored for this; a large one must be read by others.
        let large = graph.ty(id).shape.elements().is_some_and(|elements| elements.batch);
        let pays = large
            && !narrows(graph, id)
            && sources
                .iter()
                .all(|source| is_small(graph, *source, id) || readers.contains_key(source));
        let follows = fusion.follows(graph, id);
        let fits = others.iter().all(|&other| {
            let other = &fusion.groups[other];
            let loops = match other.kind {
                Kind::Loop => &other.members[..],
                Kind::Primitive => &other.members[1..],
                Kind::Assembly | Kind::Copy | Kind::Collective => return false,
            };
            let first = other.members[0];
            let product = other.kind == Kind::Primitive
                && stored_operands(graph, &fusion.low, &fusion.codes, first)
                    .iter()
                    .any(|read| fusion.views[read.index()].base == id);
            other.region <= Region::Backward
                && other.reads.len() + sources.len() <= MAX_READS
                && !product
                && (other.kind != Kind::Primitive || follows)
                && loops.iter().flat_map(|&member| fusion.sources(graph, member)).all(|view| {
                    view.base != id || (view.is_whole(graph) && view.dims == other.domain)
                })
        });
        let is_product =
            fusion.groups[group].kind == Kind::Primitive && fusion.groups[group].members[0] == id;
        if !(pays && fits && !is_product) {
            continue;
        }
        let others = readers.remove(&id).unwrap_or_default();
        fusion.recomputed[id.index()] = true;
        fusion.group_of[id.index()] = None;
        fusion.groups[group].members.retain(|member| *member != id);
        for other in others {
            fusion.groups[other].reads.retain(|read| *read != id);
            for &source in &sources {
                let producer = fusion.producer(source);
                if producer == Some(other) {
                    continue;
                }
                if !fusion.groups[other].reads.contains(&source) {
                    fusion.groups[other].reads.push(source);
                    readers.entry(source).or_default().push(other);
                }
                if let Some(from) = producer {
                    fusion.depend(other, from);
                }
            }
        }
    }
    drop_empty(fusion);
}

/// Whether a value is an elementwise one of the forward region that only loops read, element by element.
fn may_recompute(graph: &Graph, views: &[View], uses: &[Vec<NodeId>], id: NodeId) -> bool {
    let node = graph.node(id);
    let large = graph.ty(id).shape.elements().is_some_and(|elements| elements.batch);
    work(graph, id).is_some()
        && large
        && node.region == Region::Forward
        && uses[id.index()].iter().all(|&user| {
            let region = matches!(graph.node(user).region, Region::Forward | Region::Backward);
            let scaled = matches!(
                graph.op(user),
                Op::Quantize { .. } | Op::Dequantize { .. } | Op::StraightThrough { .. }
            );
            let loops = kind_of(graph.op(user)) == Kind::Loop && !is_view_op(graph.op(user));
            region
                && loops
                && !scaled
                && graph.operands(user).iter().all(|operand| {
                    let view = &views[operand.index()];
                    view.base != id || view.is_whole(graph)
                })
        })
}
