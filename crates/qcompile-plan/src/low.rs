//! Products of low precision: what `dequantize`, or a cast that widens, hides from the product that follows it.

use crate::Affine;
use crate::view::{View, merged};
use qcompile_ir::{DType, Dim, Graph, NodeId, Op, QuantizedRange};
use std::collections::BTreeMap;
use std::ops::Range;

/// Most products of i8 that an i32 sums: more are not summed in int8.
pub const MOST_I8_PRODUCTS: usize = QuantizedRange::MOST_I8_PRODUCTS;
/// The same where the first operand is u8 or has a zero point, so that it is from -255 to 255 less that.
pub(crate) const MOST_AFFINE_PRODUCTS: usize = i32::MAX as usize >> 15;

/// Whether so many products may be summed. Where the number depends on the batch size, [`Plan::largest_batch`] says how
/// far, and a single sample must do.
///
/// [`Plan::largest_batch`]: crate::Plan::largest_batch
fn is_summed(count: Dim, affine: bool) -> bool {
    count.scale <= if affine { MOST_AFFINE_PRODUCTS } else { MOST_I8_PRODUCTS }
}

/// The operands of a product as they are stored, where both are of low precision: under what `dequantize` or a
/// widening cast hides. See [`int8_operands`].
#[derive(Clone, Debug)]
pub(crate) struct LowOperands {
    pub(crate) a: View,
    pub(crate) b: View,
    /// Of integers; bf16 has none.
    pub(crate) scales: Option<Scales>,
}

impl Scales {
    /// Every value that they are read from.
    pub(crate) fn values(self) -> impl Iterator<Item = NodeId> {
        [self.a, self.b].into_iter().chain(self.zero_a)
    }
}

impl LowOperands {
    /// Whether the rows of all matrices of the first operand have a scale each.
    pub(crate) fn runs_over_batch(&self) -> bool {
        self.scales.is_some_and(|scales| scales.over_batch)
    }
}

/// The scales of integer operands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scales {
    pub(crate) a: NodeId,
    /// The zero point of the first operand, if it has one other than 0.
    pub(crate) zero_a: Option<NodeId>,
    /// Whether the first operand is u8.
    pub(crate) unsigned_a: bool,
    /// Whether there is one for each row, image or input channel.
    pub(crate) per_row: bool,
    /// Whether those of rows go on from one matrix of the batch to the next.
    over_batch: bool,
    pub(crate) b: NodeId,
    pub(crate) per_channel: bool,
}

/// The products whose operands are both dequantized or both widened: they run on the integers, or on bf16.
pub(crate) fn low_products(graph: &Graph, views: &[View]) -> BTreeMap<NodeId, LowOperands> {
    let low = |id| int8_operands(graph, views, id).or_else(|| bf16_operands(graph, views, id));
    graph.ids().filter_map(|id| Some((id, low(id)?))).collect()
}

/// An operand of attention, or of a gradient of it, that `dequantize` hides: the codes and their one scale.
#[derive(Clone, Debug)]
pub(crate) struct Codes {
    pub(crate) view: View,
    pub(crate) scale: NodeId,
}

/// The codes of queries, keys and values of each attention, or gradient of one, whose products are in i8, where they have
/// one scale each. That an i32 holds their sums is a matter of its type.
pub(crate) fn attention_codes(graph: &Graph, views: &[View]) -> BTreeMap<NodeId, [Codes; 3]> {
    let codes = |id: NodeId| {
        let (Op::Attention { products: DType::I8, .. }
        | Op::AttentionGrad { products: DType::I8, .. }) = graph.op(id)
        else {
            return None;
        };
        let of = |position: usize| {
            let id = graph.operand(id, position);
            let (q, scale, zero_point, axis) = dequantized(graph, views[id.index()].base)?;
            let signed = matches!(graph.ty(q).dtype, DType::I8 | DType::I4);
            if axis.is_some() || zero_point.is_some() || !signed {
                return None;
            }
            let view = match hidden(graph, views, id) {
                Some(hidden) => hidden.view,
                // The kernel takes any strides of the codes.
                None if views[id.index()].base == id => views[q.index()].clone(),
                // A view of codes that do not lie dense: of a copy that does.
                None => View { base: q, ..views[id.index()].clone() },
            };
            Some(Codes { view, scale })
        };
        Some([of(0)?, of(1)?, of(2)?])
    };
    graph.ids().filter_map(|id| Some((id, codes(id)?))).collect()
}

/// What the kernel of a product or of attention reads: its operands, or codes, scales and bf16 values beneath them.
pub(crate) fn stored_operands(
    graph: &Graph,
    low: &BTreeMap<NodeId, LowOperands>,
    codes: &BTreeMap<NodeId, [Codes; 3]>,
    id: NodeId,
) -> Vec<NodeId> {
    if let Some(low) = low.get(&id) {
        let scales = low.scales.into_iter().flat_map(Scales::values);
        return [low.a.base, low.b.base].into_iter().chain(scales).collect();
    }
    let operands = graph.operands(id);
    match codes.get(&id) {
        Some(codes) => {
            let codes = codes.iter().flat_map(|codes| [codes.view.base, codes.scale]);
            codes.chain(operands.into_iter().skip(3)).collect()
        }
        None => operands,
    }
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

/// `product(dequantize(q, s), dequantize(r, t))` as a product of `q` and `r`, if the kernels have it: a scale may belong
/// to whatever the sums do not run over, and what is first in a matrix product or a forward convolution may be u8 and have
/// a zero point.
fn int8_operands(graph: &Graph, views: &[View], id: NodeId) -> Option<LowOperands> {
    let product = matches!(
        graph.op(id),
        Op::Matmul { .. } | Op::Conv2d(_) | Op::Conv2dGradInput(_) | Op::Conv2dGradWeight(_)
    );
    if !product {
        return None;
    }
    let [first, second] = [0, 1].map(|position| hidden(graph, views, graph.operand(id, position)));
    let (first, second) = (first?, second?);
    let (zero_a, unsigned_a) = (first.zero_point, first.is_unsigned(graph));
    let affine = unsigned_a || zero_a.is_some();
    let of_affine = matches!(graph.op(id), Op::Matmul { .. } | Op::Conv2d(_));
    if affine && !of_affine || second.is_unsigned(graph) || second.zero_point.is_some() {
        return None;
    }
    let Hidden { view: a, scale: scale_a, axis: axis_a, .. } = first;
    let Hidden { view: b, scale: scale_b, axis: axis_b, .. } = second;
    let along = |view: &View, dim: usize, axis: Option<usize>| {
        axis.is_none_or(|axis| runs_along(graph, view, dim..dim + 1, axis))
    };
    let mut over_batch = false;
    let fits = match graph.op(id) {
        Op::Matmul { transpose_a, transpose_b } => {
            a.as_matrices()?;
            b.as_matrices()?;
            let last = a.dims.len() - 1;
            let (row, inner) = if *transpose_a { (last, last - 1) } else { (last - 1, last) };
            let column = if *transpose_b { last - 1 } else { last };
            if let Some(axis) = axis_a.filter(|_| !along(&a, row, axis_a)) {
                let shared = b.strides[..last - 1].iter().all(|stride| stride.scale == 0);
                over_batch = shared && !transpose_a && runs_along(graph, &a, 0..last, axis);
                if !over_batch {
                    return None;
                }
            }
            along(&b, column, axis_b) && is_summed(a.dims[inner], affine)
        }
        Op::Conv2d(geometry) => {
            let inputs = graph.ty(graph.operand(id, 1)).shape.0[1];
            let [height, width] = geometry.kernel;
            along(&a, 0, axis_a)
                && along(&b, 0, axis_b)
                && inputs
                    .times(height.checked_mul(width)?.into())
                    .is_some_and(|count| is_summed(count, affine))
        }
        Op::Conv2dGradInput(geometry) => {
            // Weights are OIHW. Where every channel is convolved by itself, it has the same number on both sides.
            let groups = Some(&geometry.groups.into());
            let alone = graph.ty(id).shape.0.last() == groups && b.dims.first() == groups;
            let of_group = !alone && geometry.groups > 1;
            let outputs = graph.ty(graph.operand(id, 1)).shape.0[0];
            let [height, width] = geometry.kernel;
            along(&a, 0, axis_a)
                && along(&b, usize::from(!alone), axis_b)
                && (axis_b.is_none() || !of_group)
                && outputs
                    .times(height.checked_mul(width)?.into())
                    .is_some_and(|count| is_summed(count, false))
        }
        Op::Conv2dGradWeight(geometry) => {
            let [height, width] = geometry.output()?;
            along(&a, 3, axis_a)
                && along(&b, 3, axis_b)
                && height.checked_mul(width)? <= MOST_I8_PRODUCTS
        }
        _ => return None,
    };
    let fits = fits && (matches!(graph.op(id), Op::Matmul { .. }) || a.is_dense() && b.is_dense());
    let scales = Scales {
        a: scale_a,
        zero_a,
        unsigned_a,
        per_row: axis_a.is_some(),
        over_batch,
        b: scale_b,
        per_channel: axis_b.is_some(),
    };
    fits.then_some(LowOperands { a, b, scales: Some(scales) })
}

/// Whether these dims of a view, one after the other, are an axis of the value beneath, as it lies in memory.
fn runs_along(graph: &Graph, view: &View, dims: Range<usize>, axis: usize) -> bool {
    let own = View::dense(view.base, &graph.ty(view.base).shape);
    let run = merged(&view.dims[dims.clone()], &view.strides[dims]);
    run == Some((own.dims[axis], own.strides[axis]))
}

/// What an exchange sends of `id` where that is `dequantize(q[rows, row], scale[rows])`, whole: the memory of the codes
/// and of the scales, and the codes of a row.
pub(crate) fn exchanged_codes(
    graph: &Graph,
    views: &[View],
    id: NodeId,
) -> Option<(NodeId, NodeId, usize)> {
    let view = &views[id.index()];
    let Hidden { view: q, scale, zero_point, axis } = hidden(graph, views, id)?;
    let scale = &views[scale.index()];
    let shape = graph.ty(view.base).shape.as_fixed()?;
    let whole = |view: &View| view.is_dense() && view.offset == Affine::ZERO;
    let fits = axis == Some(0)
        && zero_point.is_none()
        && graph.ty(q.base).dtype != DType::U8
        && whole(view)
        && whole(&q)
        && whole(scale)
        && graph.ty(scale.base).dtype == DType::F32
        && graph.ty(id).shape.elements() == graph.ty(q.base).shape.elements()
        && !graph.op(scale.base).is_leaf();
    match shape[..] {
        [_, row] if fits && row > 0 => Some((q.base, scale.base, row)),
        _ => None,
    }
}

/// What a `dequantize` hides.
struct Hidden {
    /// The codes.
    view: View,
    scale: NodeId,
    /// If it is not 0; one for all.
    zero_point: Option<NodeId>,
    /// The axis of the scale.
    axis: Option<usize>,
}

impl Hidden {
    /// Whether the codes are from 0 on.
    fn is_unsigned(&self, graph: &Graph) -> bool {
        matches!(graph.ty(self.view.base).dtype, DType::U8 | DType::U4)
    }
}

/// What is under `id`, if that views a `dequantize` of codes of a byte.
fn hidden(graph: &Graph, views: &[View], id: NodeId) -> Option<Hidden> {
    let view = &views[id.index()];
    let (q, scale, zero_point, axis) = dequantized(graph, view.base)?;
    let under = &views[q.index()];
    if !under.is_dense() || (zero_point.is_some() && axis.is_some()) {
        return None;
    }
    let offset = view.offset.plus(under.offset)?;
    let view = View { base: under.base, offset, ..view.clone() };
    // The axis of the scale counts dims of the dequantized value, which must be those of the integers' memory.
    let same_dims = graph.ty(under.base).shape == graph.ty(q).shape;
    (axis.is_none() || same_dims).then_some(Hidden { view, scale, zero_point, axis })
}

/// What a `dequantize` of codes of a byte reads: the codes, the scale, the zero point if it is not 0, and the axis.
fn dequantized(
    graph: &Graph,
    id: NodeId,
) -> Option<(NodeId, NodeId, Option<NodeId>, Option<usize>)> {
    let Op::Dequantize { axis } = *graph.op(id) else { return None };
    let operands = graph.operands(id);
    let zero_point = operands.get(2).copied().filter(|&zero_point| !is_zero(graph, zero_point));
    // Codes of 4 bits are a byte each, and small codes of 8.
    let dtype = graph.ty(operands[0]).dtype;
    matches!(dtype, DType::I8 | DType::I4 | DType::U8 | DType::U4).then_some((
        operands[0],
        operands[1],
        zero_point,
        axis,
    ))
}

/// Whether a value is a constant 0 throughout.
fn is_zero(graph: &Graph, mut id: NodeId) -> bool {
    while let Op::Broadcast(_) | Op::Reshape(_) = graph.op(id) {
        id = graph.operand(id, 0);
    }
    matches!(graph.op(id), Op::Const(tensor) if tensor.splat() == Some(0.0))
}
