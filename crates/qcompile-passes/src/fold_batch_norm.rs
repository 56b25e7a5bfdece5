//! Folds batch normalization into the product before it (Jacob et al. 2018, arXiv:1712.05877, section 3.2).
//!
//! *Before*: an evaluation form, where `x · w` is followed by sums, differences, products and quotients with one stored
//! number for each output channel: `a · (x · w) + b`. *After*: `x · (a · w) + b`, with `a` and `b` computed from stored
//! values. Where the weight is rounded with one scale for each output channel, its integers stay: `a` goes into
//! the scale, and its sign into the weight before it is rounded, whose range is symmetric. *Why here*: on a
//! copy of the evaluation form that leaves for programs that only run it, before anything is calibrated or rounded, as
//! what is rounded is the folded weight.

use crate::PassError;
use crate::builder::Builder;
use crate::quantize::{Layer, is_stored, layers};
use qcompile_ir::{
    BinaryOp, CompareOp, Dim, Graph, NodeId, Op, QuantizedRange, Region, Shape, UnaryOp,
};

/// Folds what follows each layer. Returns how many were folded; invalidates every [`NodeId`].
///
/// # Errors
/// [`PassError::Graph`], a defect of this pass.
pub fn run(graph: &mut Graph) -> Result<usize, PassError> {
    graph.sweep();
    let mut folded = 0;
    for layer in layers(graph).into_iter().filter(|layer| !layer.recurrent) {
        let chain = chain(graph, &layer);
        // What only adds is a bias already.
        if chain.iter().any(|link| matches!(link.op, BinaryOp::Mul | BinaryOp::Div)) {
            fold(graph, &layer, &chain)?;
            folded += 1;
        }
    }
    graph.sweep();
    Ok(folded)
}

/// One elementwise op after a product, with one stored number for each channel.
struct Link {
    result: NodeId,
    op: BinaryOp,
    /// Of `[1]`, or one for each channel; perhaps with other axes of size 1.
    number: NodeId,
    /// Whether the number is the first operand.
    first: bool,
}

/// What follows a layer's product, each used by the next alone.
fn chain(graph: &Graph, layer: &Layer) -> Vec<Link> {
    let mut chain = Vec::new();
    let mut end = layer.node;
    loop {
        let is_output = graph.outputs().iter().any(|(_, output)| *output == end);
        let [(user, position)] = graph.uses(end)[..] else { return chain };
        let &Op::Binary(op @ (BinaryOp::Add | BinaryOp::Sub | BinaryOp::Mul | BinaryOp::Div)) =
            graph.op(user)
        else {
            return chain;
        };
        let first = position == 1;
        if is_output || (op == BinaryOp::Div && first) {
            return chain;
        }
        let number = per_channel(graph, graph.operand(user, 1 - position), layer);
        let Some(number) = number else { return chain };
        chain.push(Link { result: user, op, number, first });
        end = user;
    }
}

/// The stored numbers that `id` repeats, one for each output channel of a layer's result or one for all.
pub(crate) fn per_channel(graph: &Graph, id: NodeId, layer: &Layer) -> Option<NodeId> {
    let large = |id: NodeId| -> Vec<usize> {
        let dims = graph.ty(id).shape.0.iter().enumerate();
        dims.filter(|(_, dim)| **dim != Dim::ONE).map(|(axis, _)| axis).collect()
    };
    let (mut source, mut axis) = (id, layer.result_axis);
    while matches!(graph.op(source), Op::Broadcast(_) | Op::Reshape(_)) {
        let below = graph.operand(source, 0);
        let (rank, rank_below) = (graph.ty(source).shape.rank(), graph.ty(below).shape.rank());
        match (large(below).as_slice(), graph.op(source)) {
            // Broadcasting aligns the last axes.
            (&[at], Op::Broadcast(_)) if at + rank == axis + rank_below => axis = at,
            (&[at], Op::Reshape(_)) if large(source) == [axis] => axis = at,
            ([], _) => axis = usize::MAX,
            _ => return None,
        }
        source = below;
    }
    let fits = match large(source)[..] {
        [] => true,
        [at] => at == axis && graph.ty(source).shape.0[at] == Dim::fixed(layer.channels),
        _ => false,
    };
    (fits && is_stored(graph, source)).then_some(source)
}

/// Replaces a product and what follows it by a product of a scaled weight and a sum.
fn fold(graph: &mut Graph, layer: &Layer, chain: &[Link]) -> Result<(), PassError> {
    let Some(last) = chain.last() else { return Ok(()) };
    let name = graph.node(layer.node).name.as_str().to_owned();
    let channels = Shape::fixed(&[layer.channels]);
    let mut b = Builder::new(graph, Region::Forward, &name);
    let mut factor: Option<NodeId> = None;
    let mut bias: Option<NodeId> = None;
    for link in chain {
        let size = b.shape(link.number).elements();
        let flat = if size == Some(Dim::ONE) { Shape::scalar() } else { channels.clone() };
        let number = b.reshape("number", link.number, flat)?;
        let number = b.broadcast("numbers", number, channels.clone())?;
        match link.op {
            BinaryOp::Add => {
                bias = Some(match bias {
                    Some(bias) => b.binary("bias", BinaryOp::Add, bias, number)?,
                    None => number,
                });
            }
            BinaryOp::Sub => {
                let negated = |b: &mut Builder, x| b.unary("negated", UnaryOp::Neg, x);
                let (kept, taken) = if link.first {
                    factor = Some(match factor {
                        Some(factor) => negated(&mut b, factor)?,
                        None => b.splat_like("minus", number, -1.0)?,
                    });
                    (Some(number), bias)
                } else {
                    (bias, Some(number))
                };
                bias = match (kept, taken) {
                    (Some(kept), Some(taken)) => {
                        Some(b.binary("bias", BinaryOp::Sub, kept, taken)?)
                    }
                    (None, Some(taken)) => Some(negated(&mut b, taken)?),
                    (kept, None) => kept,
                };
            }
            op => {
                factor = Some(match (factor, op) {
                    (Some(factor), op) => b.binary("factor", op, factor, number)?,
                    (None, BinaryOp::Mul) => number,
                    (None, _) => b.unary("factor", UnaryOp::Reciprocal, number)?,
                });
                bias = match bias {
                    Some(bias) => Some(b.binary("bias", op, bias, number)?),
                    None => None,
                };
            }
        }
    }
    let operands = b.graph.operands(layer.node);
    let weight = match factor {
        Some(factor) => scaled_weight(&mut b, layer, operands[1], factor)?,
        None => operands[1],
    };
    let node = b.graph.node(layer.node).clone();
    let product = b.add("folded", node.op, &[operands[0], weight])?;
    *b.graph.note_mut(product) = node.note;
    b.graph.swap_names(layer.node, product);
    let shape = b.shape(product);
    let result = match bias {
        Some(bias) => {
            let bias = b.broadcast("biases", bias, shape)?;
            b.binary("biased", BinaryOp::Add, product, bias)?
        }
        None => product,
    };
    b.graph.replace_uses(last.result, result)?;
    if bias.is_some() {
        b.graph.swap_names(last.result, result);
    }
    Ok(())
}

/// `weight · factor`, one factor for each output channel.
fn scaled_weight(
    b: &mut Builder,
    layer: &Layer,
    weight: NodeId,
    factor: NodeId,
) -> Result<NodeId, PassError> {
    let along = |b: &mut Builder, suffix: &str, x: NodeId, like: NodeId| {
        let shape = b.shape(like);
        let mut places = vec![Dim::ONE; shape.rank()];
        places[layer.weight_axis] = Dim::fixed(layer.channels);
        let column = b.reshape(&format!("{suffix}.column"), x, Shape(places))?;
        b.broadcast(suffix, column, shape)
    };
    if let Some((x, scale)) = rounded_per_channel(b.graph, layer, weight) {
        let zero = b.splat_like("zero", factor, 0.0)?;
        let one = b.splat_like("one", factor, 1.0)?;
        let minus = b.splat_like("minus", factor, -1.0)?;
        let negative = b.compare("negative", CompareOp::Less, factor, zero)?;
        let sign = b.select("sign", negative, minus, one)?;
        let sign = along(b, "signs", sign, x)?;
        let signed = b.binary("signed", BinaryOp::Mul, x, sign)?;
        let size = b.unary("size", UnaryOp::Abs, factor)?;
        let larger = b.binary("scale", BinaryOp::Mul, scale, size)?;
        let quantize = b.graph.op(b.graph.operand(weight, 0)).clone();
        let dequantize = b.graph.op(weight).clone();
        let q = b.add("weight.q", quantize, &[signed, scale])?;
        let folded = b.add("weight.dq", dequantize, &[q, larger])?;
        let old = b.graph.operand(weight, 0);
        for (old, new) in [(scale, larger), (old, q), (weight, folded)] {
            b.graph.swap_names(old, new);
        }
        return Ok(folded);
    }
    let name = b.graph.node(weight).name.clone();
    let factor = along(b, "factors", factor, weight)?;
    let scaled = b.binary("weight", BinaryOp::Mul, weight, factor)?;
    // The folded weight is the model's weight from here on.
    if b.graph.uses(weight).len() == 2 && b.graph.find(name.as_str()) == Some(weight) {
        b.graph.swap_names(weight, scaled);
    }
    Ok(scaled)
}

/// What is rounded, and its scale for each output channel, if a weight is rounded so, symmetrically.
fn rounded_per_channel(graph: &Graph, layer: &Layer, weight: NodeId) -> Option<(NodeId, NodeId)> {
    let &Op::Dequantize { axis: Some(axis) } = graph.op(weight) else { return None };
    let q = graph.operand(weight, 0);
    let Op::Quantize { axis: Some(along), .. } = graph.op(q) else { return None };
    let scale = graph.operand(q, 1);
    let symmetric = graph.operands(q).len() == 2;
    // The sign of a factor goes into the codes.
    let range = QuantizedRange::of(graph.ty(q).dtype, false);
    let signed = range.is_some_and(|range| range.low < 0.0);
    let same = axis == layer.weight_axis && *along == axis && graph.operand(weight, 1) == scale;
    (symmetric && same && signed).then(|| (graph.operand(q, 0), scale))
}
