//! Moves reshapes of matrices down, so that what follows a product runs over the rows and columns of the product (and
//! within its kernel), and the reshapes meet those before the next product.
//!
//! A model's linear layer over `[N, T, C]` comes as `reshape(matmul(reshape(x)))`: the result of the product is `[N·T, C]`,
//! and so can be everything that works on each element or along the last axis.

use super::replace;
use crate::PassError;
use qcompile_ir::{Graph, NodeId, Op, Shape};

/// Moves every reshape of a matrix below the ops that do not mind. Returns whether one moved.
pub(super) fn sink(graph: &mut Graph) -> Result<bool, PassError> {
    let mut changed = false;
    for id in graph.order() {
        changed |= sink_below(graph, id)?;
    }
    Ok(changed)
}

/// The matrix `[rows, columns]` that `id` is with its rows counted by several axes.
fn matrix(graph: &Graph, id: NodeId) -> Option<NodeId> {
    let Op::Reshape(shape) = graph.op(id) else { return None };
    let x = graph.operand(id, 0);
    let from = &graph.ty(x).shape;
    let splits = from.rank() == 2 && shape.rank() > 2 && from.0.last() == shape.0.last();
    splits.then_some(x)
}

/// The op that does to matrices what `op` does to values of several axes, and how many of its first operands are
/// data; `None` if there is none.
fn on_matrices(graph: &Graph, id: NodeId, rows: &Shape) -> Option<(Op, usize)> {
    let op = graph.op(id);
    let last = graph.ty(id).shape.rank().checked_sub(1)?;
    Some(match op {
        Op::Unary(_) | Op::Cast(_) => (op.clone(), 1),
        Op::Binary(_) | Op::Compare(_) => (op.clone(), 2),
        Op::Select => (op.clone(), 3),
        Op::Quantize { axis: None, .. } | Op::Dequantize { axis: None } => (op.clone(), 1),
        Op::StraightThrough { axis: None, .. } => (op.clone(), 2),
        Op::Softmax | Op::LogSoftmax => (op.clone(), 1),
        Op::Reduce { op, axes } if axes[..] == [last] => (Op::Reduce { op: *op, axes: vec![1] }, 1),
        // One value for each row, repeated along the row.
        Op::Broadcast(shape) => {
            let narrow = &graph.ty(graph.operand(id, 0)).shape;
            let along = narrow.rank() == shape.rank() && narrow.0[..last] == shape.0[..last];
            let wide = Shape(vec![rows.0[0], shape.0[last]]);
            return along.then_some((Op::Broadcast(wide), 1));
        }
        _ => return None,
    })
}

fn sink_below(graph: &mut Graph, id: NodeId) -> Result<bool, PassError> {
    let operands = graph.operands(id);
    let Some(first) = operands.iter().find_map(|&operand| matrix(graph, operand)) else {
        return Ok(false);
    };
    let rows = graph.ty(first).shape.clone();
    let Some((op, data)) = on_matrices(graph, id, &rows) else { return Ok(false) };
    let shape = &graph.ty(operands[0]).shape;
    let same = operands[..data].iter().all(|&operand| graph.ty(operand).shape == *shape);
    if !same || !operands[..data].iter().all(|&operand| flattens(graph, operand)) {
        return Ok(false);
    }
    let mut flat = Vec::with_capacity(operands.len());
    for (position, &operand) in operands.iter().enumerate() {
        flat.push(if position < data { flatten(graph, operand, &rows)? } else { operand });
    }
    let node = graph.node(id);
    let (name, region) = (node.name.clone(), node.region);
    let back = Op::Reshape(node.ty.shape.clone());
    let new = graph.add(op, &flat, name.clone(), region)?;
    let note = graph.node(id).note.clone();
    *graph.note_mut(new) = note;
    let back = graph.add(back, &[new], format!("{}.reshaped", name.as_str()), region)?;
    replace(graph, id, back)?;
    // The reshape will meet its inverse; what computes keeps the name.
    graph.swap_names(id, new);
    Ok(true)
}

/// Whether a value of several axes is a matrix of its rows without being moved in memory.
fn flattens(graph: &Graph, operand: NodeId) -> bool {
    match graph.op(operand) {
        Op::Transpose(_) | Op::Slice { .. } => false,
        Op::Broadcast(shape) => {
            let small = &graph.ty(graph.operand(operand, 0)).shape;
            let columns = small.elements() == shape.0.last().copied();
            columns && small.0.last() == shape.0.last()
                || small.elements() == Some(qcompile_ir::Dim::ONE)
        }
        _ => true,
    }
}

/// The operand as a matrix of this shape.
fn flatten(graph: &mut Graph, operand: NodeId, rows: &Shape) -> Result<NodeId, PassError> {
    if let Some(matrix) = matrix(graph, operand).filter(|&x| graph.ty(x).shape == *rows) {
        return Ok(matrix);
    }
    let node = graph.node(operand);
    let (name, region) = (node.name.as_str().to_owned(), node.region);
    if let Op::Broadcast(_) = node.op {
        let small = graph.operand(operand, 0);
        let (small_name, small_region) =
            (graph.node(small).name.as_str().to_owned(), graph.node(small).region);
        let elements = graph.ty(small).shape.elements();
        let one = elements == Some(qcompile_ir::Dim::ONE);
        let line = if one { Shape::scalar() } else { Shape(vec![rows.0[1]]) };
        let small = if graph.ty(small).shape == line {
            small
        } else {
            graph.add(Op::Reshape(line), &[small], small_name, small_region)?
        };
        return Ok(graph.add(
            Op::Broadcast(rows.clone()),
            &[small],
            format!("{name}.rows"),
            region,
        )?);
    }
    // The last axis may be narrower or wider than that of the others' (of a reduction, of a broadcast).
    let columns = *graph.ty(operand).shape.0.last().unwrap_or(&rows.0[1]);
    let shape = Shape(vec![rows.0[0], columns]);
    Ok(graph.add(Op::Reshape(shape), &[operand], format!("{name}.rows"), region)?)
}
