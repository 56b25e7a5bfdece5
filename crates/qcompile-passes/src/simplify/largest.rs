//! The largest magnitude of some columns of a product from the largest of each column.
//!
//! Queries, keys and values are often columns of one product, and each is rounded to int8 by its own largest magnitude.
//! That of each column is found within the kernel of the product, which saves a pass over the slices.

use super::replace;
use crate::PassError;
use qcompile_ir::{DType, Dim, Graph, NodeId, Op, ReduceOp, UnaryOp};

/// Columns `start..end` of a product, rounded or not.
struct Columns {
    product: NodeId,
    start: usize,
    end: usize,
}

/// Replaces every such maximum. Returns whether there was one.
pub(super) fn run(graph: &mut Graph) -> Result<bool, PassError> {
    let mut changed = false;
    for id in graph.order() {
        let Some(columns) = columns(graph, id) else { continue };
        changed = true;
        let Columns { product, start, end } = columns;
        let max = |axes| Op::Reduce { op: ReduceOp::Max, axes };
        let (name, region) = (graph.node(id).name.clone(), graph.node(id).region);
        let named = |what: &str| format!("{}.{what}", graph.node(product).name.as_str());
        let names = ["f32", "abs", "largest"].map(named);
        let slice = format!("{}.columns", name.as_str());
        let [real, magnitude, largest] = names;
        let real = match graph.ty(product).dtype {
            DType::F32 => product,
            _ => graph.add(Op::Cast(DType::F32), &[product], real, region)?,
        };
        let magnitude = graph.add(Op::Unary(UnaryOp::Abs), &[real], magnitude, region)?;
        let largest = graph.add(max(vec![0]), &[magnitude], largest, region)?;
        let some = Op::Slice { axis: 1, start, end, step: 1 };
        let some = graph.add(some, &[largest], slice, region)?;
        let one = graph.add(max(vec![0, 1]), &[some], name.clone(), region)?;
        let shape = Op::Reshape(graph.ty(id).shape.clone());
        let new = graph.add(shape, &[one], name, region)?;
        replace(graph, id, new)?;
        graph.swap_names(id, one);
    }
    Ok(changed)
}

/// What `id` is the largest magnitude of, if that is some columns of a product of matrices.
fn columns(graph: &Graph, id: NodeId) -> Option<Columns> {
    let Op::Reduce { op: ReduceOp::Max, axes } = graph.op(id) else { return None };
    let magnitude = graph.operand(id, 0);
    let all = axes.len() == graph.ty(magnitude).shape.rank();
    if !all || *graph.op(magnitude) != Op::Unary(UnaryOp::Abs) {
        return None;
    }
    let widened = |id: NodeId| match graph.op(id) {
        Op::Cast(DType::F32) if graph.ty(graph.operand(id, 0)).dtype.size() < 4 => {
            graph.operand(id, 0)
        }
        _ => id,
    };
    let slice = widened(graph.operand(magnitude, 0));
    let Op::Slice { axis, start, end, step: 1 } = *graph.op(slice) else { return None };
    let from = graph.operand(slice, 0);
    // The rows of the product may be counted by several axes.
    let x = match graph.op(from) {
        Op::Reshape(_) => graph.operand(from, 0),
        _ => from,
    };
    let (split, rows) = (&graph.ty(from).shape, &graph.ty(x).shape);
    let product = match graph.op(x) {
        Op::Cast(_) => graph.operand(x, 0),
        _ => x,
    };
    let fits = axis + 1 == split.rank()
        && rows.rank() == 2
        && rows.0.last() == split.0.last()
        && rows.0[0] != Dim::ONE
        && matches!(graph.ty(x).dtype, DType::F32 | DType::BF16 | DType::F16)
        && graph.ty(id).dtype == DType::F32
        && matches!(graph.op(product), Op::Matmul { .. })
        && graph.ty(product).dtype == DType::F32
        && graph.node(product).region == graph.node(id).region;
    fits.then_some(Columns { product: x, start, end })
}
