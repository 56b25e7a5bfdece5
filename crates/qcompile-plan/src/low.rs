//! Products of low precision: what `dequantize`, or a cast that widens, hides from the product that follows it.

use crate::fuse::has_epilogue;
use crate::view::View;
use qcompile_ir::{DType, Graph, NodeId, Op};
use std::collections::BTreeMap;

/// The operands of a product as they are stored, where both are of low precision: under what `dequantize` or a
/// widening cast hides. See [`int8_operands`].
#[derive(Clone, Debug)]
pub(crate) struct LowOperands {
    pub(crate) a: View,
    pub(crate) b: View,
    /// Of integers; bf16 has none.
    pub(crate) scales: Option<Scales>,
}

/// The scales of integer operands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scales {
    pub(crate) a: NodeId,
    pub(crate) b: NodeId,
    pub(crate) per_channel: bool,
}

/// The products whose operands are both dequantized or both widened: they run on the integers, or on bf16.
pub(crate) fn low_products(graph: &Graph, views: &[View]) -> BTreeMap<NodeId, LowOperands> {
    let low = |id| int8_operands(graph, views, id).or_else(|| bf16_operands(graph, views, id));
    graph.ids().filter_map(|id| Some((id, low(id)?))).collect()
}

/// `product(cast f32 x, cast f32 y)` as a product of the bf16 values `x` and `y`.
fn bf16_operands(graph: &Graph, views: &[View], id: NodeId) -> Option<LowOperands> {
    let fits: fn(&View) -> bool = match graph.op(id) {
        Op::Matmul { .. } => |view| view.as_matrices().is_some(),
        Op::Conv2d(_) | Op::Conv2dGradInput(_) | Op::Conv2dGradWeight(_) => View::is_dense,
        _ => return None,
    };
    let [a, b] = [0, 1].map(|position| &views[graph.operand(id, position).index()]);
    let bf16 = |view: &View| graph.ty(view.base).dtype == DType::BF16 && fits(view);
    let f32 = graph.ty(id).dtype == DType::F32;
    (f32 && bf16(a) && bf16(b)).then(|| LowOperands { a: a.clone(), b: b.clone(), scales: None })
}

/// `product(dequantize(q, s), dequantize(r, t))` as a product of `q` and `r`, if the kernels have it: `s` one
/// scale; `t` one scale, or one for each result column of a forward product.
fn int8_operands(graph: &Graph, views: &[View], id: NodeId) -> Option<LowOperands> {
    if !has_epilogue(graph.op(id)) {
        return None;
    }
    let (a, scale_a, None) = hidden(graph, views, graph.operand(id, 0))? else { return None };
    let (b, scale_b, axis) = hidden(graph, views, graph.operand(id, 1))?;
    let per_channel = match (axis, graph.op(id)) {
        (None, _) => false,
        (Some(0), Op::Conv2d(_)) => true,
        (Some(axis), Op::Matmul { transpose_b, .. }) => {
            let rank = b.dims.len();
            let column = if *transpose_b { rank - 2 } else { rank - 1 };
            let base = graph.ty(b.base);
            let own = View::dense(b.base, &base.shape);
            if base.shape.rank() != 2
                || own.strides[axis] != b.strides[column]
                || own.dims[axis] != b.dims[column]
            {
                return None;
            }
            true
        }
        _ => return None,
    };
    let fits = match graph.op(id) {
        Op::Matmul { .. } => a.as_matrices().is_some() && b.as_matrices().is_some(),
        _ => a.is_dense() && b.is_dense(),
    };
    let scales = Some(Scales { a: scale_a, b: scale_b, per_channel });
    fits.then_some(LowOperands { a, b, scales })
}

/// If `id` views a `dequantize` of i8: the view of the integers, the scale and its axis.
fn hidden(graph: &Graph, views: &[View], id: NodeId) -> Option<(View, NodeId, Option<usize>)> {
    let view = &views[id.index()];
    let Op::Dequantize { axis } = *graph.op(view.base) else { return None };
    // With a zero point, the product is in f32.
    let [q, scale] = graph.operands(view.base)[..] else { return None };
    let under = &views[q.index()];
    if graph.ty(q).dtype != DType::I8 || !under.is_dense() {
        return None;
    }
    let offset = view.offset.plus(under.offset)?;
    let view = View { base: under.base, offset, ..view.clone() };
    // The axis of the scale counts dims of the dequantized value, which must be those of the integers' memory.
    let same_dims = graph.ty(under.base).shape == graph.ty(q).shape;
    (axis.is_none() || same_dims).then_some((view, scale, axis))
}
