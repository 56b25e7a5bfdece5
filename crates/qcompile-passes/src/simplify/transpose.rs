//! Moves transposes down until they meet their inverses.
//!
//! `T(x, p)` is the transpose whose result axis `i` is axis `p[i]` of `x`.

use super::replace;
use crate::PassError;
use qcompile_ir::{Dim, Graph, NodeId, Op, Region, Shape};

/// Moves every transpose below the ops that do not mind. Returns whether one moved.
pub(super) fn sink(graph: &mut Graph) -> Result<bool, PassError> {
    let mut changed = false;
    for id in graph.order() {
        changed |= absorb(graph, id)? || sink_below(graph, id)?;
    }
    Ok(changed)
}

/// A transpose that keeps the order of all axes with more than one element is a reshape. Done only when nothing
/// moves any more, because reshapes do not. Returns whether there was one.
pub(super) fn flatten(graph: &mut Graph) -> Result<bool, PassError> {
    let mut changed = false;
    for id in graph.order() {
        let Op::Transpose(permutation) = graph.op(id) else { continue };
        let x = graph.operand(id, 0);
        let shape = &graph.ty(x).shape;
        if permutation.iter().filter(|&&axis| shape.0[axis] != Dim::ONE).is_sorted() {
            let node = graph.node(id);
            let (op, name) = (Op::Reshape(node.ty.shape.clone()), node.name.clone());
            let new = graph.add(op, &[x], name, node.region)?;
            replace(graph, id, new)?;
            graph.swap_names(id, new);
            changed = true;
        }
    }
    Ok(changed)
}

/// Moves the transposes that are left above products back up, over the casts and codes that only they read, so that a
/// product finds its operand in the type that it multiplies: what widens is then next to it. Done only when nothing moves
/// any more, because [`sink`] would undo it.
pub(super) fn raise_over_casts(graph: &mut Graph) -> Result<(), PassError> {
    for id in graph.order() {
        let of_product = |(user, _): (NodeId, usize)| {
            matches!(
                graph.op(user),
                Op::Conv2d(_) | Op::Conv2dGradInput(_) | Op::Conv2dGradWeight(_)
            )
        };
        let uses = graph.uses(id);
        if uses.is_empty() || !uses.into_iter().all(of_product) {
            continue;
        }
        let Some((mut x, permutation)) = transposed(graph, id) else { continue };
        let mut passed = Vec::new();
        while matches!(graph.op(x), Op::Cast(_) | Op::Quantize { .. } | Op::Dequantize { .. })
            && graph.uses(x).len() == 1
            && graph.outputs().iter().all(|&(_, output)| output != x)
        {
            passed.push(x);
            x = graph.operand(x, 0);
        }
        let Some(&top) = passed.last() else { continue };
        let (name, region) =
            (format!("{}.transposed", graph.node(x).name.as_str()), graph.node(top).region);
        let mut data = graph.add(Op::Transpose(permutation.clone()), &[x], name, region)?;
        for old in passed.into_iter().rev() {
            let place = |axis: usize| permutation.iter().position(|&from| from == axis);
            let mut op = graph.op(old).clone();
            if let Op::Quantize { axis, .. } | Op::Dequantize { axis } = &mut op {
                *axis = axis.and_then(place);
            }
            let mut operands = graph.operands(old);
            operands[0] = data;
            let node = graph.node(old);
            let (name, region, note) = (node.name.clone(), node.region, node.note.clone());
            data = graph.add(op, &operands, name, region)?;
            *graph.note_mut(data) = note;
            graph.swap_names(old, data);
        }
        graph.replace_uses(id, data)?;
    }
    Ok(())
}

fn inverse(permutation: &[usize]) -> Vec<usize> {
    let mut inverse = vec![0; permutation.len()];
    for (axis, &from) in permutation.iter().enumerate() {
        inverse[from] = axis;
    }
    inverse
}

/// The operand and permutation of a transpose.
fn transposed(graph: &Graph, id: NodeId) -> Option<(NodeId, Vec<usize>)> {
    match graph.op(id) {
        Op::Transpose(permutation) => Some((graph.operand(id, 0), permutation.clone())),
        _ => None,
    }
}

/// A matmul reads a transposed matrix as it is stored.
fn absorb(graph: &mut Graph, id: NodeId) -> Result<bool, PassError> {
    let Op::Matmul { mut transpose_a, mut transpose_b } = *graph.op(id) else { return Ok(false) };
    let mut operands = graph.operands(id);
    let mut changed = false;
    for (operand, flag) in operands.iter_mut().zip([&mut transpose_a, &mut transpose_b]) {
        let Some((x, permutation)) = transposed(graph, *operand) else { continue };
        let rank = permutation.len();
        let swaps = permutation[..rank - 2].iter().enumerate().all(|(axis, &from)| axis == from)
            && permutation[rank - 2] == rank - 1;
        if swaps {
            (*operand, *flag, changed) = (x, !*flag, true);
        }
    }
    if changed {
        let node = graph.node(id);
        let (name, region) = (node.name.clone(), node.region);
        let op = Op::Matmul { transpose_a, transpose_b };
        let new = graph.add(op, &operands, name, region)?;
        replace(graph, id, new)?;
        graph.swap_names(id, new);
    }
    Ok(changed)
}

/// The op that does above the transpose what `op` does below it, and how many of its first operands are data of the
/// transposed shape; `None` if there is none.
fn above(op: &Op, operands: usize, permutation: &[usize]) -> Option<(Op, usize)> {
    let last = permutation.len().checked_sub(1)?;
    let moved = |axis: &Option<usize>| axis.map(|axis| permutation[axis]);
    Some(match op {
        Op::Unary(_) | Op::Cast(_) | Op::AllReduce(_) => (op.clone(), 1),
        Op::Binary(_) | Op::Compare(_) => (op.clone(), 2),
        Op::Select => (op.clone(), 3),
        Op::Reduce { op, axes } => {
            let mut axes: Vec<usize> = axes.iter().map(|&axis| permutation[axis]).collect();
            axes.sort_unstable();
            (Op::Reduce { op: *op, axes }, 1)
        }
        Op::Slice { axis, start, end, step } => {
            let (start, end, step) = (*start, *end, *step);
            (Op::Slice { axis: permutation[*axis], start, end, step }, 1)
        }
        Op::Pad { axis, low, high, interior, value } => {
            let (low, high, interior, value) = (*low, *high, *interior, *value);
            (Op::Pad { axis: permutation[*axis], low, high, interior, value }, 1)
        }
        Op::Concat { axis } => (Op::Concat { axis: permutation[*axis] }, operands),
        Op::Softmax | Op::LogSoftmax if permutation[last] == last => (op.clone(), 1),
        Op::Quantize { dtype, axis } => (Op::Quantize { dtype: *dtype, axis: moved(axis) }, 1),
        Op::Dequantize { axis } => (Op::Dequantize { axis: moved(axis) }, 1),
        Op::StraightThrough { dtype, axis } => {
            (Op::StraightThrough { dtype: *dtype, axis: moved(axis) }, 2)
        }
        Op::Input(_)
        | Op::Param(_)
        | Op::State(_)
        | Op::Const(_)
        | Op::Size(_)
        | Op::Training
        | Op::Iota(_)
        | Op::Random { .. }
        | Op::Matmul { .. }
        | Op::Conv2d(_)
        | Op::Conv2dGradInput(_)
        | Op::Conv2dGradWeight(_)
        | Op::MaxPool2d(_)
        | Op::MaxPool2dGrad(_)
        | Op::AveragePool2d(_)
        | Op::AveragePool2dGrad(_)
        | Op::Reshape(_)
        | Op::Transpose(_)
        | Op::Broadcast(_)
        | Op::Gather
        | Op::Scatter { .. }
        | Op::TopK { .. }
        | Op::Attention { .. }
        | Op::AttentionGrad { .. }
        | Op::Recurrence(_)
        | Op::RecurrenceGrad { .. }
        | Op::Softmax
        | Op::LogSoftmax
        | Op::CrossEntropy
        | Op::CrossEntropyGrad => return None,
    })
}

fn sink_below(graph: &mut Graph, id: NodeId) -> Result<bool, PassError> {
    let operands = graph.operands(id);
    let Some(permutation) =
        operands.iter().find_map(|&operand| Some(transposed(graph, operand)?.1))
    else {
        return Ok(false);
    };
    // The permutation of a small operand must not decide for the others.
    if graph.ty(id).shape.rank() != permutation.len() {
        return Ok(false);
    }
    let Some((op, data)) = above(graph.op(id), operands.len(), &permutation) else {
        return Ok(false);
    };
    if !operands[..data].iter().all(|&operand| moves_freely(graph, operand, &permutation)) {
        return Ok(false);
    }
    let mut raised = Vec::with_capacity(operands.len());
    for (position, &operand) in operands.iter().enumerate() {
        raised.push(if position < data { raise(graph, operand, &permutation)? } else { operand });
    }
    let node = graph.node(id);
    let (name, region, note) = (node.name.clone(), node.region, node.note.clone());
    let back_name = format!("{}.transposed", name.as_str());
    let new = graph.add(op, &raised, name, region)?;
    *graph.note_mut(new) = note;
    let back = graph.add(Op::Transpose(permutation), &[new], back_name, region)?;
    graph.replace_uses(id, back)?;
    // The transpose will meet its inverse; what computes keeps the name.
    graph.swap_names(id, new);
    Ok(true)
}

/// Whether the inverse transpose of an operand costs nothing: it is transposed, constant, repeats something smaller,
/// or its inverse transpose is there already.
fn moves_freely(graph: &Graph, operand: NodeId, permutation: &[usize]) -> bool {
    match graph.op(operand) {
        Op::Transpose(own) => own == permutation,
        Op::Const(_) => true,
        Op::Broadcast(_) => {
            graph.ty(graph.operand(operand, 0)).shape.elements()
                != graph.ty(operand).shape.elements()
        }
        _ => {
            let inverse = inverse(permutation);
            graph.uses(operand).into_iter().any(
                |(user, _)| matches!(graph.op(user), Op::Transpose(other) if *other == inverse),
            )
        }
    }
}

/// The operand under the inverse permutation.
fn raise(graph: &mut Graph, operand: NodeId, permutation: &[usize]) -> Result<NodeId, PassError> {
    let node = graph.node(operand);
    let (region, name) = (node.region, node.name.as_str().to_owned());
    match &node.op {
        Op::Transpose(own) if own == permutation => Ok(graph.operand(operand, 0)),
        Op::Broadcast(shape) => {
            let shape = shape.clone();
            let small = graph.operand(operand, 0);
            let small = full_rank(graph, small, shape.rank(), region)?;
            let inverse = inverse(permutation);
            let wide = Shape(inverse.iter().map(|&axis| shape.0[axis]).collect());
            let small_name = graph.node(small).name.as_str().to_owned();
            let small_region = graph.node(small).region;
            let small = graph.add(Op::Transpose(inverse), &[small], small_name, small_region)?;
            Ok(graph.add(Op::Broadcast(wide), &[small], format!("{name}.moved"), region)?)
        }
        _ => {
            let inverse = Op::Transpose(inverse(permutation));
            Ok(graph.add(inverse, &[operand], format!("{name}.raised"), region)?)
        }
    }
}

/// The value with axes of size 1 before its own, up to this rank.
fn full_rank(
    graph: &mut Graph,
    id: NodeId,
    rank: usize,
    region: Region,
) -> Result<NodeId, PassError> {
    let ty = graph.ty(id);
    if ty.shape.rank() == rank {
        return Ok(id);
    }
    let mut dims = vec![Dim::ONE; rank - ty.shape.rank()];
    dims.extend(&ty.shape.0);
    let name = graph.node(id).name.as_str().to_owned();
    Ok(graph.add(Op::Reshape(Shape(dims)), &[id], name, region)?)
}
