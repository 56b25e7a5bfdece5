//! Scales of rows, carried out of the products that kernels run on integers.

use super::insert::is_quantized;
use crate::PassError;
use crate::builder::Builder;
use qcompile_ir::{BinaryOp, DType, Graph, NodeId, Op, Shape};

/// Products whose left operand has a scale for each row become products of its codes, times the scales afterwards: kernels
/// take one scale of the left operand, and what follows a product costs nothing. `(s · q) W = s · (q W)` holds but for
/// the rounding of floats. Returns how many there were.
///
/// # Errors
/// [`PassError::Graph`], a defect of this pass.
pub(super) fn carry_out(graph: &mut Graph) -> Result<usize, PassError> {
    let mut count = 0;
    for id in graph.order() {
        let product = match graph.op(id) {
            Op::Matmul { transpose_a: false, .. } => graph.ty(id).shape.rank() == 2,
            Op::Conv2d(_) | Op::Conv2dGradInput(_) => true,
            _ => false,
        };
        if !product || !is_integer_weight(graph, graph.operand(id, 1)) {
            continue;
        }
        let rows = graph.operand(id, 0);
        if *graph.op(rows) != (Op::Dequantize { axis: Some(0) }) {
            continue;
        }
        let [q, scale] = graph.operands(rows)[..] else { continue };
        if !is_integer(graph.ty(q).dtype) {
            continue;
        }
        let (name, region) = (graph.node(rows).name.as_str().to_owned(), graph.node(id).region);
        let mut b = Builder::new(graph, region, &name);
        let one = b.scalar(DType::F32, 1.0)?;
        let codes = b.add("codes", Op::Dequantize { axis: None }, &[q, one])?;
        graph.set_operand(id, 0, codes)?;
        let name = graph.node(id).name.as_str().to_owned();
        let mut b = Builder::new(graph, region, &name);
        let shape = b.shape(id);
        let mut column = Shape(vec![1.into(); shape.rank()]);
        column.0[0] = shape.0[0];
        let column = b.reshape("rows", scale, column)?;
        let factor = b.broadcast("scales", column, shape)?;
        let scaled = b.binary("scaled", BinaryOp::Mul, id, factor)?;
        graph.replace_uses_except(id, scaled, &[scaled])?;
        count += 1;
    }
    Ok(count)
}

fn is_integer(dtype: DType) -> bool {
    is_quantized(dtype) && !dtype.is_float()
}

/// Whether the right operand has codes, too: else the product is of floats, and nothing is won.
fn is_integer_weight(graph: &Graph, mut id: NodeId) -> bool {
    loop {
        match graph.op(id) {
            Op::Dequantize { .. } => return is_integer(graph.ty(graph.operand(id, 0)).dtype),
            Op::Reshape(_) | Op::Transpose(_) => id = graph.operand(id, 0),
            _ => return false,
        }
    }
}
