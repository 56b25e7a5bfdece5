//! Which values are rounded where activations have ranges of their own: all between two quantized layers.
//!
//! The places are those that ONNX Runtime fuses into operators on integers (its QDQ selectors): what enters a layer; what
//! a convolution gives, after its bias and its activation; and whatever lies between, back to what is computed in another
//! way: both operands of a residual sum, what a pool, a mean, a concatenation or a move takes.

use super::layer::{Layer, layers, reads_quantized};
use crate::fold_batch_norm::per_channel;
use crate::simplify::splat;
use qcompile_ir::{BinaryOp, DType, Dim, Graph, NodeId, Op, ReduceOp, Region, UnaryOp};
use std::collections::BTreeSet;

/// The layers whose forward product is noted as int8.
pub(super) fn chosen(graph: &Graph) -> Vec<Layer> {
    let int8 = |layer: &Layer| {
        let precision = graph.node(layer.node).note.precision.filter(|_| !layer.recurrent);
        precision.is_some_and(|precision| precision.forward == DType::I8)
    };
    layers(graph).into_iter().filter(int8).collect()
}

/// The values to be rounded for the layers that are noted as int8, in graph order.
#[must_use]
pub fn activations(graph: &Graph) -> Vec<NodeId> {
    let mut wanted = Vec::new();
    for layer in chosen(graph) {
        wanted.push(graph.operand(layer.node, 0));
        if matches!(graph.op(layer.node), Op::Conv2d(_)) {
            wanted.extend(after_product(graph, &layer));
        }
    }
    let mut found = BTreeSet::new();
    while let Some(id) = wanted.pop() {
        let node = graph.node(id);
        let computed = node.region == Region::Forward
            && node.ty.dtype == DType::F32
            && node.ty.shape.batch_axis().is_some()
            // The model rounds it itself.
            && !reads_quantized(graph, id);
        // What is there of one number for many is cheaper to round than to store.
        if !computed || matches!(node.op, Op::Broadcast(_)) || !found.insert(id) {
            continue;
        }
        wanted.extend(before(graph, id));
    }
    graph.order().into_iter().filter(|id| found.contains(id)).collect()
}

/// What a convolution gives, after its bias and its activation. None where it is normalized by its own statistics: then
/// what a fold of the normalization leaves is not there yet.
fn after_product(graph: &Graph, layer: &Layer) -> Option<NodeId> {
    let mut end = layer.node;
    loop {
        let uses = graph.uses(end);
        let is_output = graph.outputs().iter().any(|(_, output)| *output == end);
        if is_output || uses.iter().any(|&(user, _)| matches!(graph.op(user), Op::Reduce { .. })) {
            return None;
        }
        let [(user, position)] = uses[..] else { return Some(end) };
        let biases = *graph.op(user) == Op::Binary(BinaryOp::Add)
            && per_channel(graph, graph.operand(user, 1 - position), layer).is_some();
        if !biases && unclamped(graph, user) != Some(end) {
            // Other elementwise ops compute in f32, from the rounded result.
            return Some(end);
        }
        end = user;
    }
}

/// What a relu or a clamp by constants takes: rounding does it by its range.
fn unclamped(graph: &Graph, id: NodeId) -> Option<NodeId> {
    match graph.op(id) {
        Op::Unary(UnaryOp::Relu) => Some(graph.operand(id, 0)),
        Op::Binary(BinaryOp::Max | BinaryOp::Min) => {
            let [a, b] = [graph.operand(id, 0), graph.operand(id, 1)];
            match (splat(graph, a), splat(graph, b)) {
                (None, Some(_)) => Some(a),
                (Some(_), None) => Some(b),
                _ => None,
            }
        }
        _ => None,
    }
}

/// Whether the value has the elements of its operand, or some of them: then it needs no range of its own. What a
/// recurrent layer gives is a part of what its op keeps for the way back, which is not one value.
pub(super) fn is_move(graph: &Graph, id: NodeId) -> bool {
    if graph.operands(id).iter().any(|&id| matches!(graph.op(id), Op::Recurrence(_))) {
        return false;
    }
    match graph.op(id) {
        Op::Reshape(_) | Op::Transpose(_) | Op::Slice { .. } | Op::MaxPool2d(_) => true,
        // 0 is among the codes of every range.
        Op::Pad { value, .. } => *value == 0.0,
        _ => false,
    }
}

/// What must be rounded so that a value that is rounded can be computed from codes.
fn before(graph: &Graph, id: NodeId) -> Vec<NodeId> {
    let mut below = id;
    while let Some(operand) = unclamped(graph, below) {
        below = operand;
    }
    let operands = graph.operands(below);
    let large = |operand: &NodeId| {
        !matches!(graph.op(*operand), Op::Broadcast(_)) && graph.ty(*operand) == graph.ty(below)
    };
    match graph.op(below) {
        Op::Binary(BinaryOp::Add | BinaryOp::Mul) if operands.iter().all(large) => operands,
        Op::Concat { .. } | Op::AveragePool2d(_) => operands,
        _ if is_move(graph, below) => operands,
        // A mean is a sum that is divided by a number.
        Op::Binary(BinaryOp::Div | BinaryOp::Mul) => {
            let sum = operands.into_iter().find(|&operand| {
                matches!(graph.op(operand), Op::Reduce { op: ReduceOp::Sum, .. })
                    && graph.ty(operand).shape.elements().is_some_and(|n| n != Dim::ONE)
            });
            sum.map(|sum| graph.operand(sum, 0)).into_iter().collect()
        }
        _ => Vec::new(),
    }
}
