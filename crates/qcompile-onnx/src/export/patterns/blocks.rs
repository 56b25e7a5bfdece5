//! Weights that are rounded in blocks.

use super::Pattern;
use qcompile_ir::{Graph, NodeId, Op, Tensor};
use std::sync::Arc;

/// `reshape [rows, columns] (dequantize q[rows · columns / block, block], scale axis=0)`, perhaps transposed, of constants.
pub(super) fn blocks(graph: &Graph, id: NodeId) -> Option<Pattern> {
    let (matrix, transposed) = match graph.op(id) {
        Op::Transpose(axes) if *axes == [1, 0] => (graph.operand(id, 0), true),
        _ => (id, false),
    };
    let Op::Reshape(shape) = graph.op(matrix) else { return None };
    let dequantized = graph.operand(matrix, 0);
    if *graph.op(dequantized) != (Op::Dequantize { axis: Some(0) }) {
        return None;
    }
    let [q, scale] = graph.operands(dequantized)[..] else { return None };
    let (Op::Const(q), Op::Const(scale) | Op::Param(scale)) = (graph.op(q), graph.op(scale)) else {
        return None;
    };
    let sizes = shape.as_fixed()?;
    let (&[rows, columns], &[_, block]) = (sizes.as_slice(), q.shape()) else { return None };
    if block == 0 || columns % block != 0 {
        return None;
    }
    let mut q = q.reshaped(&[rows, columns])?;
    let mut scale = scale.reshaped(&[rows, columns / block])?;
    if transposed {
        (q, scale) = (across(&q)?, across(&scale)?);
    }
    Some(Pattern::Blocks { q: Arc::new(q), scale: Arc::new(scale), transposed })
}

/// The transposed matrix.
fn across(matrix: &Tensor) -> Option<Tensor> {
    let &[rows, columns] = matrix.shape() else { return None };
    let size = matrix.dtype().size();
    let mut bytes = Vec::with_capacity(matrix.bytes().len());
    for column in 0..columns {
        for row in 0..rows {
            let at = (row * columns + column) * size;
            bytes.extend_from_slice(&matrix.bytes()[at..at + size]);
        }
    }
    Tensor::from_bytes(matrix.dtype(), vec![columns, rows], bytes)
}
