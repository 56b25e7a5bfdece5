//! Straight-through estimation: rounding has gradient one within its range and zero beyond it
//! (Bengio et al. 2013, arXiv:1308.3432; Jacob et al. 2018, arXiv:1712.05877); and learned step sizes (Esser et al. 2020,
//! arXiv:1902.08153).
//!
//! The unit is `dequantize(quantize(x, s), s)`. The gradient of the codes in between is held in units of
//! the dequantized value, so `dequantize` hands it on unchanged and `quantize` cuts what was clamped.

use super::rules::{Site, not_differentiable};
use crate::PassError;
use crate::builder::Builder;
use qcompile_ir::{BinaryOp, DType, Dim, Graph, NodeId, Op, QuantizedRange, Shape, UnaryOp};

type Gradient = Result<NodeId, PassError>;

/// Whether a scale is trained: a parameter or its magnitude, perhaps under another shape or held above a constant. A scale
/// that is computed from what it scales has no gradient.
pub(crate) fn learned(graph: &Graph, mut scale: NodeId) -> bool {
    loop {
        scale = match graph.op(scale) {
            Op::Param(_) => return true,
            Op::Reshape(_) | Op::Broadcast(_) | Op::Cast(_) | Op::Unary(UnaryOp::Abs) => {
                graph.operand(scale, 0)
            }
            Op::Binary(BinaryOp::Max) if is_constant(graph, graph.operand(scale, 1)) => {
                graph.operand(scale, 0)
            }
            _ => return false,
        };
    }
}

/// Whether a value is a constant, perhaps repeated or under another shape.
pub(crate) fn is_constant(graph: &Graph, mut id: NodeId) -> bool {
    while let Op::Broadcast(_) | Op::Reshape(_) = graph.op(id) {
        id = graph.operand(id, 0);
    }
    matches!(graph.op(id), Op::Const(_))
}

pub(super) fn quantize(
    b: &mut Builder<'_>,
    site: &Site,
    dtype: DType,
    axis: Option<usize>,
) -> Gradient {
    let (x, parameters) = (site.operands[0], &site.operands[1..]);
    let wanted = b.graph.ty(x).dtype;
    let dy = b.cast("cast", site.dy, wanted)?;
    let operands = [&[x, dy], parameters].concat();
    b.add("", Op::StraightThrough { dtype, axis }, &operands)
}

pub(super) fn dequantize(b: &mut Builder<'_>, site: &Site, axis: Option<usize>) -> Gradient {
    let (q, parameters) = (site.operands[0], &site.operands[1..]);
    let of_scale = site.position == 1;
    let reason = match b.graph.op(q) {
        Op::Quantize { axis: at, .. } => {
            let others = &b.graph.operands(q)[1..];
            let equal = others.len() == parameters.len()
                && others.iter().zip(parameters).all(|(&a, &b_)| same(b.graph, a, b_));
            if equal && *at == axis {
                return if of_scale { step_size(b, site, axis) } else { Ok(site.dy) };
            }
            format!(
                "dequantize has a gradient only with the parameters of its quantize; {} is quantized by {}, and dequantized by {}",
                b.graph.node(q).name,
                told(b.graph, others, *at),
                told(b.graph, parameters, axis)
            )
        }
        _ if of_scale => return step_size(b, site, axis),
        op => format!(
            "dequantize has a gradient only after quantize, and {} comes between",
            op.name()
        ),
    };
    Err(not_differentiable(b, site, &reason))
}

/// Whether two parameters are one, or equal constants.
fn same(graph: &Graph, a: NodeId, b: NodeId) -> bool {
    a == b
        || matches!((graph.op(a), graph.op(b)), (Op::Const(left), Op::Const(right)) if left == right)
}

/// Scale, zero point and axis in words.
fn told(graph: &Graph, parameters: &[NodeId], axis: Option<usize>) -> String {
    let words: Vec<String> = ["scale", "zero point"]
        .iter()
        .zip(parameters)
        .map(|(what, &id)| match graph.op(id) {
            Op::Const(tensor) if tensor.splat().is_some() => {
                format!("{what} {}", tensor.to_f32().first().copied().unwrap_or_default())
            }
            _ => format!("{what} {}", graph.node(id).name),
        })
        .chain(axis.map(|axis| format!("axis {axis}")))
        .collect();
    words.join(", ")
}

/// The gradient of the scale of a pair, by LSQ: `Σ dy · (q - x / s)` where x was not clamped, `Σ dy · q` where it was, with q
/// less its zero point, times `1 / sqrt(n · q_max)` for n elements of one scale in one sample and the highest code less a fixed
/// zero point (Esser et al. 2020, equations 3 and 4 and section 2.2).
fn step_size(b: &mut Builder<'_>, site: &Site, axis: Option<usize>) -> Gradient {
    let (q, scale, dy) = (site.operands[0], site.operands[1], site.dy);
    let ty = b.ty(q);
    let range = QuantizedRange::of(ty.dtype, site.operands.len() > 2);
    let zero_point = site.operands.get(2).map(|&zero| match b.graph.op(zero) {
        Op::Const(zero) => zero.splat().unwrap_or(0.0),
        _ => 0.0,
    });
    let high =
        range.map_or(1.0, |range| f64::from(range.high) - zero_point.unwrap_or(0.0)).max(1.0);
    let ones = b.splat_like("one", scale, 1.0)?;
    let unscaled = [&[q, ones], &site.operands[2..]].concat();
    let mut slope = b.add("codes", Op::Dequantize { axis }, &unscaled)?;
    if let Op::Quantize { dtype, .. } = *b.graph.op(q) {
        let x = b.graph.operand(q, 0);
        let x = b.cast("wide", x, DType::F32)?;
        let mut column = Shape(vec![Dim::ONE; ty.shape.rank()]);
        if let Some(axis) = axis {
            column.0[axis] = ty.shape.0[axis];
        }
        let scales = b.reshape("steps", scale, column)?;
        let scales = b.broadcast("steps.all", scales, ty.shape.clone())?;
        let ratio = b.binary("ratio", BinaryOp::Div, x, scales)?;
        let operands = [&[x, ratio], &site.operands[1..]].concat();
        let inside = b.add("inside", Op::StraightThrough { dtype, axis }, &operands)?;
        slope = b.binary("slope", BinaryOp::Sub, slope, inside)?;
    }
    let part = b.binary("part", BinaryOp::Mul, dy, slope)?;
    let axes = (0..ty.shape.rank()).filter(|&at| Some(at) != axis).collect();
    let sum = b.sum("sum", part, axes)?;
    let scale_shape = b.shape(scale);
    let sum = b.reshape("total", sum, scale_shape.clone())?;
    let of = |shape: &Shape| shape.elements().map_or(1, |elements| elements.scale).max(1);
    #[allow(clippy::cast_precision_loss, reason = "a count of elements")]
    let count = (of(&ty.shape) / of(&scale_shape)).max(1) as f64;
    b.scaled("", sum, 1.0 / (count * high).sqrt())
}
