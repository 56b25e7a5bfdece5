//! Means and what normalizes by them.

use super::{Pattern, Statistics, binary, both, number, seen, unary};
use crate::export::elementwise::uniform;
use qcompile_ir::{BinaryOp, DType, Dim, Graph, NodeId, Op, ReduceOp, UnaryOp};

/// `sqrt(variance + epsilon)`: the variance and epsilon.
fn deviation(graph: &Graph, id: NodeId) -> Option<(NodeId, f64)> {
    let sum = unary(graph, seen(graph, id).source, UnaryOp::Sqrt)?;
    let sum = seen(graph, sum).source;
    both(graph, sum, BinaryOp::Add)
        .into_iter()
        .find_map(|[variance, epsilon]| Some((variance, number(graph, epsilon)?)))
}

/// `1 / sqrt(variance + epsilon)`.
fn inverse_deviation(graph: &Graph, id: NodeId) -> Option<(NodeId, f64)> {
    let source = seen(graph, id).source;
    deviation(graph, unary(graph, source, UnaryOp::Reciprocal)?)
}

pub(super) fn mean(graph: &Graph, id: NodeId) -> Option<Pattern> {
    let [sum, count] = binary(graph, id, BinaryOp::Div)?;
    let Op::Reduce { op: ReduceOp::Sum, axes } = graph.op(sum) else { return None };
    let x = graph.operand(sum, 0);
    let dims = &graph.ty(x).shape.0;
    let product = axes.iter().try_fold(Dim::ONE, |product, &axis| product.times(dims[axis]))?;
    let is_count = match graph.op(seen(graph, count).source) {
        Op::Size(dim) => *dim == product,
        op => product.as_fixed().is_some_and(|size| {
            #[allow(clippy::cast_precision_loss, reason = "the constant was rounded as well")]
            let size = size as f64;
            uniform(op) == Some(size)
        }),
    };
    let dtype = graph.ty(x).dtype;
    (is_count && dtype.is_float()).then(|| Pattern::Mean { x, axes: axes.clone() })
}

pub(super) fn batch_normalization(graph: &Graph, id: NodeId) -> Option<Pattern> {
    if graph.ty(id).dtype != DType::F32 || graph.ty(id).shape.rank() < 2 {
        return None;
    }
    for [product, bias] in both(graph, id, BinaryOp::Add) {
        let bias = seen(graph, bias);
        let Some(axis) = bias.only_axis(graph) else { continue };
        for [centered, factor] in both(graph, product, BinaryOp::Mul) {
            let factor = seen(graph, factor);
            if factor.only_axis(graph) != Some(axis) {
                continue;
            }
            let parts = both(graph, factor.source, BinaryOp::Mul);
            let parts = parts.into_iter().find_map(|[inverse, scale]| {
                let (variance, epsilon) = inverse_deviation(graph, inverse)?;
                Some((seen(graph, scale).source, Some((seen(graph, variance).source, epsilon))))
            });
            let constant = matches!(graph.op(factor.source), Op::Const(_));
            let folded = constant && is_convolved(graph, centered);
            let parts = parts.or_else(|| folded.then_some((factor.source, None)));
            let Some((scale, variance)) = parts else { continue };
            let channels = graph.ty(id).shape.0[axis];
            let is_vector = |id: NodeId| {
                let mut large = graph.ty(id).shape.0.iter().filter(|&&dim| dim != Dim::ONE);
                large.next() == Some(&channels) && large.next().is_none()
            };
            let operands = [Some(scale), Some(bias.source), variance.map(|(id, _)| id)];
            if !operands.into_iter().flatten().all(is_vector) {
                continue;
            }
            // A mean of zeros has gone.
            let (x, mean) = match binary(graph, centered, BinaryOp::Sub) {
                Some([x, mean]) if seen(graph, mean).only_axis(graph) == Some(axis) => {
                    (x, Some(seen(graph, mean).source))
                }
                _ => (centered, None),
            };
            let statistics = Statistics { mean, variance };
            let bias = bias.source;
            return Some(Pattern::BatchNormalization { x, axis, scale, bias, statistics });
        }
    }
    None
}

/// Whether a value is a convolution's, perhaps minus something.
fn is_convolved(graph: &Graph, id: NodeId) -> bool {
    let x = binary(graph, id, BinaryOp::Sub).map_or(id, |[x, _]| x);
    matches!(graph.op(seen(graph, x).source), Op::Conv2d(_))
}

/// A value without its mean over the last axes, times or divided by its deviation.
struct Normalized {
    x: NodeId,
    axes: Vec<usize>,
    epsilon: f64,
}

fn normalized(graph: &Graph, id: NodeId) -> Option<Normalized> {
    let products = both(graph, id, BinaryOp::Mul).into_iter();
    let products = products.map(|[x, factor]| (x, inverse_deviation(graph, factor)));
    let quotient = binary(graph, id, BinaryOp::Div).into_iter();
    let quotient = quotient.map(|[x, divisor]| (x, deviation(graph, divisor)));
    products.chain(quotient).find_map(|(centered, deviation)| {
        let (variance, epsilon) = deviation?;
        let [x, mean_of_x] = binary(graph, centered, BinaryOp::Sub)?;
        let Pattern::Mean { x: averaged, axes } = mean_of(graph, mean_of_x)? else { return None };
        let Pattern::Mean { x: squared, axes: same } = mean_of(graph, variance)? else {
            return None;
        };
        let square = binary(graph, squared, BinaryOp::Mul) == Some([centered, centered])
            || binary(graph, squared, BinaryOp::Pow).is_some_and(|[base, exponent]| {
                base == centered && number(graph, exponent) == Some(2.0)
            });
        let rank = graph.ty(x).shape.rank();
        let last = axes.iter().copied().eq(rank.checked_sub(axes.len())?..rank);
        (averaged == x && square && axes == same && last && !axes.is_empty())
            .then_some(Normalized { x, axes, epsilon })
    })
}

/// The mean that a value is, seen with its own axes in their places.
fn mean_of(graph: &Graph, id: NodeId) -> Option<Pattern> {
    let seen = seen(graph, id);
    let rank = graph.ty(seen.source).shape.rank();
    let in_place = seen.axes.len() == rank
        && seen.axes.iter().enumerate().all(|(axis, at)| at.is_none_or(|at| at == axis));
    mean(graph, seen.source).filter(|_| in_place)
}

pub(super) fn layer_normalization(graph: &Graph, id: NodeId) -> Option<Pattern> {
    if graph.ty(id).dtype != DType::F32 {
        return None;
    }
    // Weights that have the last axes, and repeat along the others.
    let weight = |value: NodeId, first: usize| {
        let seen = seen(graph, value);
        let rank = graph.ty(seen.source).shape.rank();
        let own = seen.axes[first..].iter().copied().eq((0..rank).map(Some));
        (own && seen.axes[..first].iter().all(Option::is_none)).then_some(seen.source)
    };
    let scaled = |value: NodeId| {
        both(graph, value, BinaryOp::Mul).into_iter().find_map(|[x, scale]| {
            let normalized = normalized(graph, x)?;
            let scale = weight(scale, normalized.axes[0])?;
            Some((normalized, scale))
        })
    };
    let biased = both(graph, id, BinaryOp::Add).into_iter().find_map(|[product, bias]| {
        let (normalized, scale) = scaled(product)?;
        let bias = weight(bias, normalized.axes[0])?;
        Some((normalized, scale, Some(bias)))
    });
    let found = biased.or_else(|| scaled(id).map(|(normalized, scale)| (normalized, scale, None)));
    let (Normalized { x, axes, epsilon }, scale, bias) = found?;
    // A bias that comes after belongs to it.
    let users = graph.uses(id);
    if bias.is_none()
        && let [(user, _)] = users.as_slice()
        && *graph.op(*user) == Op::Binary(BinaryOp::Add)
        && matches!(layer_normalization(graph, *user), Some(Pattern::LayerNormalization { .. }))
    {
        return None;
    }
    Some(Pattern::LayerNormalization { x, axis: axes[0], scale, bias, epsilon })
}
