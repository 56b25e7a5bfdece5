//! Finds variances that the kernel of a product computes by the way.
//!
//! A variance is written as two passes: the mean, then the squared deviations from it. Where the values are those of a
//! product, its epilogue has both at once: it sums deviations from a value of the same column and
//! corrects for that in f64, which loses nothing where the mean is far larger than the deviations.

use crate::fuse::has_epilogue;
use crate::view::View;
use qcompile_ir::{BinaryOp, DType, Dim, Graph, NodeId, Op, ReduceOp};
use std::collections::BTreeMap;

/// Sums of squared deviations over the rows of a product (or over all of it), each with the value whose deviations they
/// are: the product, or the product rounded to 16 bits.
pub(crate) fn deviations(graph: &Graph, views: &[View]) -> BTreeMap<NodeId, NodeId> {
    graph.ids().filter_map(|id| Some((id, deviation(graph, views, id)?))).collect()
}

/// The product that a value is, rounded or not.
pub(crate) fn product(graph: &Graph, value: NodeId) -> NodeId {
    match graph.op(value) {
        Op::Cast(DType::BF16 | DType::F16) => graph.operand(value, 0),
        _ => value,
    }
}

/// `x` where `id` is `sum((x - mean(x))²)` and `x` a product of the same region, perhaps rounded.
fn deviation(graph: &Graph, views: &[View], id: NodeId) -> Option<NodeId> {
    let Op::Reduce { op: ReduceOp::Sum, axes } = graph.op(id) else { return None };
    let square = binary(graph, graph.operand(id, 0), BinaryOp::Mul)?;
    let [x, mean] = binary(graph, square[0], BinaryOp::Sub)?;
    let value = views[x.index()].base;
    let product = product(graph, value);
    let fits = square[0] == square[1]
        && crosses_rows(axes, graph.ty(x).shape.rank())
        && has_epilogue(graph.op(product))
        && views[x.index()].is_whole(graph)
        && graph.node(product).region == graph.node(id).region;
    let mean = &views[mean.index()];
    let [sum, count] = binary(graph, mean.base, BinaryOp::Div)?;
    let sum = &views[sum.index()];
    let same = matches!(graph.op(sum.base), Op::Reduce { op: ReduceOp::Sum, axes: others } if others == axes)
        && views[graph.operand(sum.base, 0).index()] == views[x.index()]
        && sum.is_whole(graph);
    // Each column (or all) has the mean of its own.
    let result = View::dense(mean.base, &graph.ty(id).shape);
    let own = mean.offset == result.offset
        && mean.strides == result.strides
        && graph.ty(mean.base).shape == graph.ty(id).shape;
    (fits && same && own && counts(graph, views, count, x, axes)).then_some(value)
}

/// Whether `count` is the number of elements that are summed.
fn counts(graph: &Graph, views: &[View], count: NodeId, x: NodeId, axes: &[usize]) -> bool {
    let dims = &graph.ty(x).shape.0;
    let number = axes.iter().try_fold(Dim::ONE, |product, &axis| product.times(dims[axis]));
    let Some(number) = number else { return false };
    match graph.op(views[count.index()].base) {
        Op::Size(dim) => *dim == number,
        Op::Const(tensor) => {
            !number.batch && tensor.splat().is_some_and(|value| value == number.scale as f64)
        }
        _ => false,
    }
}

/// Whether these axes are all but perhaps the last.
pub(crate) fn crosses_rows(axes: &[usize], rank: usize) -> bool {
    (0..rank.saturating_sub(1)).all(|axis| axes.contains(&axis))
}

fn binary(graph: &Graph, id: NodeId, op: BinaryOp) -> Option<[NodeId; 2]> {
    (*graph.op(id) == Op::Binary(op)).then(|| [graph.operand(id, 0), graph.operand(id, 1)])
}
