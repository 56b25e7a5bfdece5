//! What a layer is: a forward product of data and a trained weight.

use crate::differentiate::{is_constant, learned};
use qcompile_ir::{DType, Graph, NodeId, Op, Precision, Region};
use std::collections::BTreeSet;

/// A forward `conv2d`, `matmul` or `recurrence` whose first operand depends on an input and whose second is a parameter,
/// perhaps reshaped or transposed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// The product.
    pub node: NodeId,
    /// The axis of the second operand that runs over the output channels: 0 of OIHW, n of a matrix.
    pub weight_axis: usize,
    /// The axis of the result that runs over the output channels.
    pub result_axis: usize,
    /// Number of output channels.
    pub channels: usize,
    /// The axis of the first operand that the product sums over: the last of NHWC, k of a matrix.
    pub input_axis: usize,
    /// The axis of the second operand that runs along it: 1 of OIHW, k of a matrix.
    pub weight_input_axis: usize,
    /// Number of channels of the data.
    pub input_channels: usize,
    /// Whether it is a convolution of more than one group.
    pub grouped: bool,
    /// Whether it is the product of a recurrent layer's states with R: channels are rows of R, those of the data units of
    /// the state.
    pub recurrent: bool,
}

impl Layer {
    /// The layer that `node` is, if its operands are data and a weight.
    fn of(
        graph: &Graph,
        node: NodeId,
        from_data: &[bool],
        is_weight: &dyn Fn(NodeId) -> bool,
    ) -> Option<Layer> {
        if graph.node(node).region != Region::Forward {
            return None;
        }
        let (conv, [transpose_a, transpose_b]) = match graph.op(node) {
            Op::Conv2d(geometry) => (Some(*geometry), [false; 2]),
            Op::Matmul { transpose_a, transpose_b } => (None, [*transpose_a, *transpose_b]),
            Op::Recurrence(_) => (None, [false, true]),
            _ => return None,
        };
        let [x, weight, ..] = graph.operands(node)[..] else { return None };
        if !from_data[x.index()] || from_data[weight.index()] || !is_weight(weight) {
            return None;
        }
        let shape = graph.ty(weight).shape.as_fixed()?;
        let rank = shape.len();
        let result_rank = graph.ty(node).shape.rank();
        let [weight_axis, weight_input_axis] = match (conv, transpose_b) {
            (Some(_), _) => [0, 1],
            (None, true) => [rank - 2, rank - 1],
            (None, false) => [rank - 1, rank - 2],
        };
        let data_rank = graph.ty(x).shape.rank();
        Some(Layer {
            node,
            weight_axis,
            result_axis: result_rank - 1,
            channels: shape[weight_axis],
            input_axis: data_rank - 1 - usize::from(transpose_a),
            weight_input_axis,
            input_channels: shape[weight_input_axis],
            grouped: conv.is_some_and(|geometry| geometry.groups != 1),
            recurrent: matches!(graph.op(node), Op::Recurrence(_)),
        })
    }
}

/// Every layer, in [`Graph::order`].
#[must_use]
pub fn layers(graph: &Graph) -> Vec<Layer> {
    with_weights(graph, &|weight| parameter(graph, weight).is_some())
}

/// Every product of data and of what is computed from stored values, but for recurrent ones.
pub(crate) fn stored_layers(graph: &Graph) -> Vec<Layer> {
    let all = with_weights(graph, &|weight| is_stored(graph, weight));
    all.into_iter().filter(|layer| !layer.recurrent).collect()
}

fn with_weights(graph: &Graph, is_weight: &dyn Fn(NodeId) -> bool) -> Vec<Layer> {
    let order = graph.order();
    let from_data = from_data(graph, &order);
    order.into_iter().filter_map(|id| Layer::of(graph, id, &from_data, is_weight)).collect()
}

/// Whether a value is computed from stored values only.
pub(crate) fn is_stored(graph: &Graph, id: NodeId) -> bool {
    let mut stack = vec![id];
    let mut seen = BTreeSet::new();
    while let Some(id) = stack.pop() {
        if !seen.insert(id) {
            continue;
        }
        match graph.op(id) {
            Op::Param(_) | Op::State(_) | Op::Const(_) => {}
            Op::Random { .. } | Op::AllReduce(_) => return false,
            op if op.is_leaf() => return false,
            _ => stack.extend(graph.operands(id)),
        }
    }
    true
}

/// A product that may be of low precision: a layer's, or one of two activations.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate<'l> {
    /// The product.
    pub(crate) node: NodeId,
    /// The layer, if there is a weight.
    pub(crate) layer: Option<&'l Layer>,
}

impl<'l> Candidate<'l> {
    /// Those with a weight.
    pub(super) fn of_layers(layers: &'l [Layer]) -> Vec<Self> {
        layers.iter().map(|layer| Candidate { node: layer.node, layer: Some(layer) }).collect()
    }

    /// One without.
    pub(crate) fn of_activations(node: NodeId) -> Self {
        Candidate { node, layer: None }
    }

    /// The layers, then the products of two activations.
    pub(super) fn all(graph: &Graph, layers: &'l [Layer]) -> Vec<Self> {
        let mut all = Candidate::of_layers(layers);
        all.extend(activation_products(graph).into_iter().map(Candidate::of_activations));
        all
    }
}

/// How many of its operands, from the first on, a product multiplies.
pub(crate) fn multiplied(op: &Op) -> usize {
    match op {
        Op::Attention { .. } => 3,
        _ => 2,
    }
}

/// Forward products of two values that depend on an input, attention among them, in [`Graph::order`]. They are decided as
/// layers are, but have no weight.
#[must_use]
pub fn activation_products(graph: &Graph) -> Vec<NodeId> {
    let order = graph.order();
    let from_data = from_data(graph, &order);
    let product = |id: &NodeId| {
        let op = graph.op(*id);
        matches!(op, Op::Attention { .. } | Op::Matmul { .. })
            && graph.node(*id).region == Region::Forward
            && graph.ty(*id).dtype == DType::F32
            && graph.operands(*id)[..multiplied(op)]
                .iter()
                .all(|operand| from_data[operand.index()])
    };
    order.into_iter().filter(product).collect()
}

/// For each node index, whether the value depends on an input.
fn from_data(graph: &Graph, order: &[NodeId]) -> Vec<bool> {
    let mut from_data = vec![false; graph.len()];
    for &id in order {
        from_data[id.index()] = matches!(graph.op(id), Op::Input(_))
            || graph.operands(id).iter().any(|operand| from_data[operand.index()]);
    }
    from_data
}

/// Forward products that are neither layers nor [`activation_products`], so that no int8 kernel runs them: of values that
/// are computed of parameters alone, convolutions by a computed kernel, the recurrent ones with an R
/// that is not trained.
#[must_use]
pub fn other_products(graph: &Graph) -> Vec<NodeId> {
    let mut known: Vec<NodeId> = layers(graph).into_iter().map(|layer| layer.node).collect();
    known.extend(activation_products(graph));
    let product = |id: &NodeId| {
        let node = graph.node(*id);
        let op = &node.op;
        node.region == Region::Forward
            && matches!(
                op,
                Op::Matmul { .. } | Op::Conv2d(_) | Op::Attention { .. } | Op::Recurrence(_)
            )
            && !known.contains(id)
    };
    graph.order().into_iter().filter(product).collect()
}

/// The parameter whose elements `id` holds, if only their layout or precision changed on the way.
pub(crate) fn parameter(graph: &Graph, mut id: NodeId) -> Option<NodeId> {
    loop {
        match graph.op(id) {
            Op::Param(_) => return Some(id),
            Op::Reshape(_)
            | Op::Transpose(_)
            | Op::Broadcast(_)
            | Op::Slice { .. }
            | Op::Concat { .. }
            | Op::Quantize { .. }
            | Op::Dequantize { .. }
            | Op::Cast(DType::BF16 | DType::F32) => id = graph.operand(id, 0),
            _ => return None,
        }
    }
}

/// A value as it is before rounding to codes by a computed scale: the operand of `quantize` below a `dequantize`, else itself.
/// What is rounded by a constant or a learned scale is the model's own, and stays.
pub(super) fn unquantized(graph: &Graph, id: NodeId) -> NodeId {
    let (Op::Dequantize { .. }, [quantized, scale]) = (graph.op(id), &graph.operands(id)[..])
    else {
        return id;
    };
    let own = is_constant(graph, *scale) || learned(graph, *scale);
    match graph.op(*quantized) {
        Op::Quantize { .. } if !own => graph.operand(*quantized, 0),
        _ => id,
    }
}

/// The `dequantize` that gives a value, perhaps under another shape.
pub(super) fn dequantized(graph: &Graph, mut id: NodeId) -> Option<NodeId> {
    while let Op::Reshape(_) | Op::Transpose(_) | Op::Broadcast(_) | Op::Slice { .. } = graph.op(id)
    {
        id = graph.operand(id, 0);
    }
    matches!(graph.op(id), Op::Dequantize { .. }).then_some(id)
}

/// Whether a value is dequantized, perhaps under another shape.
pub(super) fn reads_quantized(graph: &Graph, id: NodeId) -> bool {
    dequantized(graph, id).is_some()
}

/// What a product of the backward pass computes, with the positions of its operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gradient {
    /// The gradient of a layer's input, of the weight and the incoming gradient.
    Input { weight: usize, gradient: usize },
    /// The gradient of a layer's weight, of the data and the incoming gradient; also both gradients of a product of two
    /// computed values.
    Weight { data: usize, gradient: usize },
}

impl Gradient {
    /// The gradient that `id` computes, if it is a product of the backward pass.
    pub(super) fn of(graph: &Graph, id: NodeId) -> Option<Gradient> {
        let node = graph.node(id);
        if node.region != Region::Backward {
            return None;
        }
        let forward = |position: usize| {
            let operand = graph.operand(id, position);
            graph.node(operand).region == Region::Forward
        };
        let of_weight = |position: usize| {
            forward(position) && parameter(graph, graph.operand(id, position)).is_some()
        };
        match node.op {
            Op::Conv2dGradInput(_) => Some(Gradient::Input { weight: 1, gradient: 0 }),
            Op::Conv2dGradWeight(_) => Some(Gradient::Weight { data: 0, gradient: 1 }),
            Op::Matmul { .. } => Some(match [0, 1].map(of_weight) {
                [false, true] => Gradient::Input { weight: 1, gradient: 0 },
                [true, false] => Gradient::Input { weight: 0, gradient: 1 },
                _ if forward(0) => Gradient::Weight { data: 0, gradient: 1 },
                _ => Gradient::Weight { data: 1, gradient: 0 },
            }),
            _ => None,
        }
    }

    /// Its own among the precisions of a layer.
    pub(super) fn precision(self, precision: &Precision) -> DType {
        match self {
            Gradient::Input { .. } => precision.grad_input,
            Gradient::Weight { .. } => precision.grad_weight,
        }
    }
}
