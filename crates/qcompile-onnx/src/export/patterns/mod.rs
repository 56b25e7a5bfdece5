//! What ONNX has one operator for and the graph several ops: normalizations, means, biases, GELU, clipping, the product
//! in front of a recurrent layer. Each function looks at a value and what computes it, and changes nothing; what a
//! pattern covers and nobody else uses is not written.

mod blocks;
mod normalizations;
mod products;
mod write;

use super::elementwise::uniform;
use super::view::unit_reshape;
use blocks::blocks;
use normalizations::{batch_normalization, layer_normalization, mean};
use products::{bias, recurrence};
use qcompile_ir::{BinaryOp, Dim, Graph, NodeId, Op, Tensor, UnaryOp};
use std::sync::Arc;

/// A value as ONNX can say it in one operator.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::export) enum Pattern {
    /// A product or convolution, seen with its axes `axes`, plus a number for each column or channel.
    Bias { product: NodeId, operands: Vec<NodeId>, axes: Vec<Option<usize>>, bias: NodeId },
    /// The mean of `x` over axes that stay with size 1.
    Mean { x: NodeId, axes: Vec<usize> },
    /// `(x - mean) / sqrt(variance + epsilon) · scale + bias`, one number for each index of `axis`.
    BatchNormalization {
        x: NodeId,
        axis: usize,
        scale: NodeId,
        bias: NodeId,
        statistics: Statistics,
    },
    /// `(x - mean(x)) / sqrt(variance(x) + epsilon) · scale + bias` over the axes from `axis` on.
    LayerNormalization { x: NodeId, axis: usize, scale: NodeId, bias: Option<NodeId>, epsilon: f64 },
    /// `x · (1 + erf(x / √2)) / 2`
    Gelu { x: NodeId },
    /// `min(max(x, low), high)`
    Clip { x: NodeId, low: f64, high: f64 },
    /// A stored matrix of codes, each row of which has a scale for each block of its elements; or that transposed.
    Blocks { q: Arc<Tensor>, scale: Arc<Tensor>, transposed: bool },
    /// A recurrence whose gates are a product.
    Recurrence { gates: Gates, operands: Vec<NodeId> },
}

/// What a batch normalization normalizes by.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::export) struct Statistics {
    /// None where it is zero.
    mean: Option<NodeId>,
    /// None where the scale holds it already.
    variance: Option<(NodeId, f64)>,
}

/// What enters the gates of a recurrent layer from outside: `rows · weight + bias`.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::export) struct Gates {
    pub(in crate::export) rows: NodeId,
    pub(in crate::export) weight: NodeId,
    /// Whether the weight is `[gates, inputs]`.
    pub(in crate::export) transposed: bool,
    pub(in crate::export) bias: RecurrentBias,
}

/// The bias of a recurrent layer.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::export) enum RecurrentBias {
    None,
    /// ONNX's two, one after the other.
    Both(NodeId),
    /// Their sum.
    Sum(NodeId),
}

impl RecurrentBias {
    fn operand(&self) -> Option<NodeId> {
        match self {
            RecurrentBias::None => None,
            RecurrentBias::Both(id) | RecurrentBias::Sum(id) => Some(*id),
        }
    }
}

impl Pattern {
    /// The values that must be written before it.
    pub(in crate::export) fn operands(&self) -> Vec<NodeId> {
        match self {
            Pattern::Bias { operands, bias, .. } => {
                operands.iter().copied().chain([*bias]).collect()
            }
            Pattern::Blocks { .. } => Vec::new(),
            Pattern::Mean { x, .. } | Pattern::Gelu { x } | Pattern::Clip { x, .. } => vec![*x],
            Pattern::BatchNormalization { x, scale, bias, statistics, .. } => {
                let Statistics { mean, variance } = statistics;
                let variance = variance.map(|(variance, _)| variance);
                [*x, *scale, *bias].into_iter().chain(*mean).chain(variance).collect()
            }
            Pattern::LayerNormalization { x, scale, bias, .. } => {
                [*x, *scale].into_iter().chain(*bias).collect()
            }
            Pattern::Recurrence { gates, operands } => {
                let own = [gates.rows, gates.weight].into_iter().chain(gates.bias.operand());
                own.chain(operands.iter().copied()).collect()
            }
        }
    }
}

/// The pattern that a value is, if it is one.
pub(in crate::export) fn find(graph: &Graph, id: NodeId, opset: u32) -> Option<Pattern> {
    match graph.op(id) {
        Op::Binary(BinaryOp::Add) => batch_normalization(graph, id)
            .or_else(|| layer_normalization(graph, id).filter(|_| opset >= 17))
            .or_else(|| bias(graph, id)),
        Op::Binary(BinaryOp::Mul) => gelu(graph, id)
            .filter(|_| opset >= 20)
            .or_else(|| layer_normalization(graph, id).filter(|_| opset >= 17)),
        Op::Binary(BinaryOp::Div) => mean(graph, id),
        Op::Binary(BinaryOp::Min | BinaryOp::Max) => clip(graph, id),
        Op::Recurrence(_) => recurrence(graph, id),
        Op::Reshape(_) | Op::Transpose(_) => blocks(graph, id),
        _ => None,
    }
}

/// What a value is, seen through broadcasts and reshapes that only add or remove axes of size 1.
struct Seen {
    source: NodeId,
    /// For each axis of the value that of the source, if it has one.
    axes: Vec<Option<usize>>,
}

fn seen(graph: &Graph, id: NodeId) -> Seen {
    let mut seen = Seen { source: id, axes: (0..graph.ty(id).shape.rank()).map(Some).collect() };
    loop {
        let through: Vec<Option<usize>> = match graph.op(seen.source) {
            Op::Broadcast(shape) => {
                let rank = graph.ty(graph.operand(seen.source, 0)).shape.rank();
                (0..shape.rank()).map(|axis| (axis + rank).checked_sub(shape.rank())).collect()
            }
            Op::Reshape(shape) => {
                let from = &graph.ty(graph.operand(seen.source, 0)).shape;
                match unit_reshape(&from.0, &shape.0) {
                    Some(axes) => axes,
                    None => return seen,
                }
            }
            Op::Unary(UnaryOp::StopGradient) => {
                (0..graph.ty(seen.source).shape.rank()).map(Some).collect()
            }
            _ => return seen,
        };
        seen.source = graph.operand(seen.source, 0);
        for axis in &mut seen.axes {
            *axis = axis.and_then(|axis| through[axis]);
        }
    }
}

impl Seen {
    /// The only axis of the value along which the source is not 1, if it is one.
    fn only_axis(&self, graph: &Graph) -> Option<usize> {
        let dims = &graph.ty(self.source).shape.0;
        let large = |axis: &usize| self.axes[*axis].is_some_and(|at| dims[at] != Dim::ONE);
        let mut axes = (0..self.axes.len()).filter(large);
        let axis = axes.next()?;
        // Nothing of the source is out of sight.
        let whole = dims.iter().filter(|&&dim| dim != Dim::ONE).count() == 1;
        (axes.next().is_none() && whole).then_some(axis)
    }

    fn is_identity(&self) -> bool {
        self.axes.iter().enumerate().all(|(axis, at)| *at == Some(axis))
    }
}

/// The operands of `op`, in both orders.
fn both(graph: &Graph, id: NodeId, op: BinaryOp) -> Vec<[NodeId; 2]> {
    if *graph.op(id) != Op::Binary(op) {
        return Vec::new();
    }
    let (a, b) = (graph.operand(id, 0), graph.operand(id, 1));
    vec![[a, b], [b, a]]
}

/// The operands of `op`, in order.
fn binary(graph: &Graph, id: NodeId, op: BinaryOp) -> Option<[NodeId; 2]> {
    both(graph, id, op).first().copied()
}

fn unary(graph: &Graph, id: NodeId, op: UnaryOp) -> Option<NodeId> {
    (*graph.op(id) == Op::Unary(op)).then(|| graph.operand(id, 0))
}

/// The number that all elements of a value are.
fn number(graph: &Graph, id: NodeId) -> Option<f64> {
    uniform(graph.op(seen(graph, id).source))
}

/// The factors of a product of up to four values.
fn factors(graph: &Graph, id: NodeId, depth: usize, into: &mut Vec<NodeId>) {
    match binary(graph, id, BinaryOp::Mul) {
        Some(operands) if depth > 0 => {
            for operand in operands {
                factors(graph, operand, depth - 1, into);
            }
        }
        _ => into.push(id),
    }
}

/// How far a constant may be from what it stands for, being rounded.
const CONSTANT_ERROR: f64 = 1e-6;

fn gelu(graph: &Graph, id: NodeId) -> Option<Pattern> {
    let near = |value: f64, wanted: f64| (value - wanted).abs() <= CONSTANT_ERROR * wanted;
    let mut parts = Vec::new();
    factors(graph, id, 2, &mut parts);
    let (constants, values): (Vec<NodeId>, Vec<NodeId>) =
        parts.into_iter().partition(|&part| number(graph, part).is_some());
    let constant: f64 = constants.iter().filter_map(|&part| number(graph, part)).product();
    let [a, b] = *values.as_slice() else { return None };
    if !near(constant, 0.5) || constants.is_empty() {
        return None;
    }
    [[a, b], [b, a]].into_iter().find_map(|[x, gate]| {
        let erf = both(graph, gate, BinaryOp::Add)
            .into_iter()
            .find_map(|[erf, one]| (number(graph, one) == Some(1.0)).then_some(erf))?;
        let scaled = unary(graph, erf, UnaryOp::Erf)?;
        let by_factor = both(graph, scaled, BinaryOp::Mul).into_iter().any(|[value, factor]| {
            let factor = number(graph, factor);
            value == x && factor.is_some_and(|f| near(f, std::f64::consts::FRAC_1_SQRT_2))
        });
        let by_divisor = binary(graph, scaled, BinaryOp::Div).is_some_and(|[value, divisor]| {
            let divisor = number(graph, divisor);
            value == x && divisor.is_some_and(|d| near(d, std::f64::consts::SQRT_2))
        });
        (by_factor || by_divisor).then_some(Pattern::Gelu { x })
    })
}

fn clip(graph: &Graph, id: NodeId) -> Option<Pattern> {
    let limited = |id: NodeId, op: BinaryOp| {
        both(graph, id, op).into_iter().find_map(|[x, limit]| Some((x, number(graph, limit)?)))
    };
    let (x, low, high) = match limited(id, BinaryOp::Min) {
        Some((inner, high)) => match unary(graph, inner, UnaryOp::Relu) {
            Some(x) => (x, 0.0, high),
            None => limited(inner, BinaryOp::Max).map(|(x, low)| (x, low, high))?,
        },
        None => {
            let (inner, low) = limited(id, BinaryOp::Max)?;
            let (x, high) = limited(inner, BinaryOp::Min)?;
            (x, low, high)
        }
    };
    // With crossed limits the order would matter.
    (low <= high).then_some(Pattern::Clip { x, low, high })
}
