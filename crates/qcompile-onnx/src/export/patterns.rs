//! What ONNX has one operator for and the graph several ops: normalizations, means, biases, GELU, clipping, the product
//! in front of a recurrent layer. Each function looks at a value and what computes it, and changes nothing; what a
//! pattern covers and nobody else uses is not written.

use super::elementwise::uniform;
use super::view::{Placed, unit_reshape};
use super::writer::{Attribute, int};
use super::{Exporter, Result};
use qcompile_ir::{BinaryOp, DType, Dim, Graph, NodeId, Op, ReduceOp, Tensor, UnaryOp};

/// A value as ONNX can say it in one operator.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Pattern {
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
    /// A recurrence whose gates are a product.
    Recurrence { gates: Gates, operands: Vec<NodeId> },
}

/// What a batch normalization normalizes by.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Statistics {
    /// None where it is zero.
    mean: Option<NodeId>,
    /// None where the scale holds it already.
    variance: Option<(NodeId, f64)>,
}

/// What enters the gates of a recurrent layer from outside: `rows · weight + bias`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Gates {
    pub(super) rows: NodeId,
    pub(super) weight: NodeId,
    /// Whether the weight is `[gates, inputs]`.
    pub(super) transposed: bool,
    pub(super) bias: RecurrentBias,
}

/// The bias of a recurrent layer.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum RecurrentBias {
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
    pub(super) fn operands(&self) -> Vec<NodeId> {
        match self {
            Pattern::Bias { operands, bias, .. } => {
                operands.iter().copied().chain([*bias]).collect()
            }
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
pub(super) fn find(graph: &Graph, id: NodeId, opset: u32) -> Option<Pattern> {
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

fn mean(graph: &Graph, id: NodeId) -> Option<Pattern> {
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

fn batch_normalization(graph: &Graph, id: NodeId) -> Option<Pattern> {
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

fn layer_normalization(graph: &Graph, id: NodeId) -> Option<Pattern> {
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

fn bias(graph: &Graph, id: NodeId) -> Option<Pattern> {
    both(graph, id, BinaryOp::Add).into_iter().find_map(|[product, bias]| {
        let product = seen(graph, product);
        let source = product.source;
        let last = match graph.op(source) {
            Op::Conv2d(_) => 3,
            Op::Matmul { .. } if graph.ty(source).shape.rank() == 2 && product.is_identity() => 1,
            _ => return None,
        };
        let dims = &graph.ty(id).shape.0;
        // All of the product, for this sum alone.
        let mut used = graph
            .operands(id)
            .into_iter()
            .find(|&operand| seen(graph, operand).source == source)?;
        while used != source {
            if graph.uses(used).len() != 1
                || graph.ty(used).shape.elements() != graph.ty(source).shape.elements()
            {
                return None;
            }
            used = graph.operand(used, 0);
        }
        let alone = graph.uses(source).len() == 1
            && graph.outputs().iter().all(|(_, output)| *output != source);
        let bias = seen(graph, bias);
        let axis = bias.only_axis(graph)?;
        let whole = graph.ty(bias.source).shape.elements() == Some(dims[axis]);
        let fits = product.axes[axis] == Some(last) && whole;
        (alone && fits && graph.ty(id).dtype.is_float()).then(|| Pattern::Bias {
            product: source,
            operands: graph.operands(source),
            axes: product.axes,
            bias: bias.source,
        })
    })
}

fn recurrence(graph: &Graph, id: NodeId) -> Option<Pattern> {
    let x = graph.operand(id, 0);
    let columns = *graph.ty(x).shape.0.last()?;
    let mut bias = RecurrentBias::None;
    let mut value = x;
    loop {
        match graph.op(value) {
            Op::Reshape(_) => {
                value = graph.operand(value, 0);
                if graph.ty(value).shape.0.last() != Some(&columns) {
                    return None;
                }
            }
            Op::Binary(BinaryOp::Add) if bias == RecurrentBias::None => {
                let last = graph.ty(value).shape.rank() - 1;
                let found = both(graph, value, BinaryOp::Add).into_iter().find_map(|[x, b]| {
                    let b = seen(graph, b);
                    (b.only_axis(graph) == Some(last)).then_some((x, b.source))
                });
                let (x, source) = found?;
                if graph.ty(source).shape.elements() != Some(columns) {
                    return None;
                }
                bias = recurrent_bias(graph, source, columns);
                value = x;
            }
            Op::Matmul { transpose_a: false, transpose_b } => {
                let operands = graph.operands(value);
                if graph.ty(value).shape.rank() != 2 {
                    return None;
                }
                let gates = Gates {
                    rows: operands[0],
                    weight: operands[1],
                    transposed: *transpose_b,
                    bias,
                };
                let operands = graph.operands(id).split_off(1);
                return Some(Pattern::Recurrence { gates, operands });
            }
            _ => return None,
        }
    }
}

/// A bias that is the sum of both halves of one value.
fn recurrent_bias(graph: &Graph, sum: NodeId, columns: Dim) -> RecurrentBias {
    let half = |id: NodeId, first: usize| {
        let Op::Slice { axis: 0, start, end, step: 1 } = graph.op(id) else { return None };
        let begin = first.checked_mul(columns.scale)?;
        (*start == begin && Some(*end) == begin.checked_add(columns.scale))
            .then(|| graph.operand(id, 0))
    };
    let linear = binary(graph, sum, BinaryOp::Add).and_then(|[first, second]| {
        let whole = half(first, 0)?;
        let size = graph.ty(whole).shape.as_fixed()?;
        (Some(whole) == half(second, 1) && size == [columns.scale * 2]).then_some(whole)
    });
    linear.map_or(RecurrentBias::Sum(sum), RecurrentBias::Both)
}

impl Exporter<'_> {
    /// Writes a value that is a pattern, whose operands are written.
    pub(super) fn write_pattern(&mut self, id: NodeId, pattern: &Pattern) -> Result<()> {
        match pattern {
            Pattern::Bias { product, operands, axes, bias } => {
                self.biased(id, *product, operands, axes, *bias)
            }
            Pattern::Mean { x, axes } => self.reduce_by(id, "ReduceMean", axes, *x),
            Pattern::BatchNormalization { x, axis, scale, bias, statistics } => {
                self.write_batch_normalization(id, (*x, *axis), [*scale, *bias], statistics)
            }
            Pattern::LayerNormalization { x, axis, scale, bias, epsilon } => {
                let mut inputs = vec![self.natural(*x)?.name, self.natural(*scale)?.name];
                if let Some(bias) = bias {
                    inputs.push(self.natural(*bias)?.name);
                }
                let rank = self.dims(id).len();
                let attributes = vec![
                    ("axis", Attribute::Int(int(*axis) - int(rank))),
                    ("epsilon", epsilon_of(*epsilon)),
                ];
                let name = self.one("LayerNormalization", inputs, self.name(id), attributes);
                self.place_natural(id, name);
                Ok(())
            }
            Pattern::Gelu { x } => self.elementwise(id, "Gelu", &[*x], vec![]),
            Pattern::Clip { x, low, high } => {
                let dtype = self.dtype(id);
                let limits = [self.scalar(dtype, *low, "low"), self.scalar(dtype, *high, "high")];
                self.elementwise_with(id, "Clip", *x, &limits)
            }
            Pattern::Recurrence { gates, .. } => self.recurrent_layer(id, gates),
        }
    }

    fn biased(
        &mut self,
        id: NodeId,
        product: NodeId,
        operands: &[NodeId],
        axes: &[Option<usize>],
        bias: NodeId,
    ) -> Result<()> {
        match self.graph.op(product) {
            Op::Conv2d(geometry) => {
                self.conv(product, geometry, operands, Some(bias))?;
                self.alias(id, product, axes)
            }
            Op::Matmul { transpose_a, transpose_b } => {
                let operands = [operands[0], operands[1]];
                self.matmul(id, [*transpose_a, *transpose_b], operands, Some(bias))
            }
            _ => self.unsupported(id, "a bias of no product"),
        }
    }

    fn write_batch_normalization(
        &mut self,
        id: NodeId,
        (x, axis): (NodeId, usize),
        weights: [NodeId; 2],
        statistics: &Statistics,
    ) -> Result<()> {
        let rank = self.dims(id).len();
        // The channels come second, whatever the others do.
        let mut order = self.shared_order(&[x]);
        for other in 0..rank {
            if !order.contains(&other) {
                let place = order.iter().position(|&next| next > other);
                order.insert(place.unwrap_or(order.len()), other);
            }
        }
        if order[1] != axis {
            order.retain(|&other| other != axis);
            order.insert(1, axis);
        }
        let tensor = self.full(x, &order)?;
        let mut inputs = vec![tensor.name];
        for operand in weights {
            inputs.push(self.vector(operand)?.name);
        }
        let channels = self.dims(id)[axis].scale;
        let all = |exporter: &mut Self, value: f32, what: &str| {
            let tensor = Tensor::from_f32(&[channels], &vec![value; channels]);
            let tensor = tensor.expect("as many elements as the shape says");
            exporter.writer.constant(&format!("{}.{what}", exporter.name(id)), &tensor)
        };
        inputs.push(match statistics.mean {
            Some(mean) => self.vector(mean)?.name,
            None => all(self, 0.0, "mean"),
        });
        let (variance, epsilon) = match statistics.variance {
            Some((variance, epsilon)) => (self.vector(variance)?.name, epsilon),
            None => (all(self, 1.0, "variance"), 0.0),
        };
        inputs.push(variance);
        let attributes = vec![("epsilon", epsilon_of(epsilon))];
        let name = self.one("BatchNormalization", inputs, self.name(id), attributes);
        self.place(id, Placed { name, dims: tensor.dims }, &order);
        Ok(())
    }
}

#[allow(clippy::cast_possible_truncation, reason = "an f32 constant of the graph")]
fn epsilon_of(epsilon: f64) -> Attribute {
    Attribute::Float(epsilon as f32)
}
