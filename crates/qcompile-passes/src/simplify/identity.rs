//! Ops that do nothing, and compositions that are one op.

use super::{Options, replace};
use crate::PassError;
use qcompile_ir::{BinaryOp, Dim, Graph, NodeId, Op, ReduceOp, Shape, UnaryOp};

/// What a node is equal to.
enum Equal {
    /// Another value.
    Value(NodeId),
    /// One op over these operands.
    Op(Op, Vec<NodeId>),
    /// The broadcast of an op over smaller operands.
    BroadcastOf(Op, Vec<NodeId>),
    /// The broadcast of a one-element value.
    BroadcastElement(NodeId),
}

/// Replaces every such node. Returns whether there was one.
pub(super) fn run(graph: &mut Graph, options: &Options) -> Result<bool, PassError> {
    let mut changed = false;
    for id in graph.order() {
        let Some(equal) = equal(graph, id, options) else { continue };
        let node = graph.node(id);
        let (name, region, shape) = (node.name.clone(), node.region, node.ty.shape.clone());
        let takes_name = !matches!(equal, Equal::Value(_));
        let new = match equal {
            Equal::Value(value) => value,
            Equal::Op(op, operands) => graph.add(op, &operands, name, region)?,
            Equal::BroadcastOf(op, operands) => {
                let small = format!("{}.small", name.as_str());
                let small = graph.add(op, &operands, small, region)?;
                graph.add(Op::Broadcast(shape), &[small], name, region)?
            }
            Equal::BroadcastElement(element) => {
                let scalar = format!("{}.scalar", name.as_str());
                let scalar = graph.add(Op::Reshape(Shape::scalar()), &[element], scalar, region)?;
                graph.add(Op::Broadcast(shape), &[scalar], name, region)?
            }
        };
        replace(graph, id, new)?;
        if takes_name {
            graph.swap_names(id, new);
        }
        changed = true;
    }
    Ok(changed)
}

fn equal(graph: &Graph, id: NodeId, options: &Options) -> Option<Equal> {
    let operands = graph.operands(id);
    let value = |position: usize| Some(Equal::Value(operands[position]));
    let same_type = || graph.ty(operands[0]) == graph.ty(id);
    match graph.op(id) {
        Op::Reshape(_) | Op::Broadcast(_) | Op::Cast(_) if same_type() => value(0),
        Op::Reshape(shape) => match graph.op(operands[0]) {
            Op::Reshape(_) => {
                Some(Equal::Op(Op::Reshape(shape.clone()), graph.operands(operands[0])))
            }
            _ => broadcast_element(graph, operands[0]),
        },
        Op::Broadcast(shape) => match graph.op(operands[0]) {
            Op::Broadcast(_) => {
                Some(Equal::Op(Op::Broadcast(shape.clone()), graph.operands(operands[0])))
            }
            _ => None,
        },
        Op::Transpose(permutation) => {
            if permutation.is_sorted() {
                return value(0);
            }
            match graph.op(operands[0]) {
                Op::Transpose(inner) => {
                    let composed = permutation.iter().map(|&axis| inner[axis]).collect();
                    Some(Equal::Op(Op::Transpose(composed), graph.operands(operands[0])))
                }
                _ => broadcast_element(graph, operands[0]),
            }
        }
        // Of a full axis or a step longer than it, the type is the operand's only if all is taken.
        Op::Slice { start: 0, step: 1, .. } if same_type() => value(0),
        Op::Pad { low: 0, high: 0, .. } if same_type() => value(0),
        Op::Concat { .. } if operands.len() == 1 => value(0),
        Op::Reduce { op: ReduceOp::Sum | ReduceOp::Max, axes } => {
            let shape = &graph.ty(operands[0]).shape;
            axes.iter().all(|&axis| shape.0[axis] == Dim::ONE).then(|| Equal::Value(operands[0]))
        }
        Op::Unary(op) => unary(graph, id, *op, options),
        Op::Binary(op) => binary(graph, id, *op),
        Op::Compare(_) | Op::Select => hoisted(graph, id),
        Op::Cast(_) => hoisted(graph, id),
        Op::Input(_)
        | Op::Param(_)
        | Op::State(_)
        | Op::Const(_)
        | Op::Size(_)
        | Op::Matmul { .. }
        | Op::Conv2d(_)
        | Op::Conv2dGradInput(_)
        | Op::Conv2dGradWeight(_)
        | Op::MaxPool2d(_)
        | Op::MaxPool2dGrad(_)
        | Op::AveragePool2d(_)
        | Op::AveragePool2dGrad(_)
        | Op::Slice { .. }
        | Op::Pad { .. }
        | Op::Concat { .. }
        | Op::Gather
        | Op::ScatterAdd { .. }
        | Op::Recurrence(_)
        | Op::RecurrenceGrad { .. }
        | Op::Softmax
        | Op::LogSoftmax
        | Op::CrossEntropy
        | Op::CrossEntropyGrad
        | Op::Quantize { .. }
        | Op::Dequantize { .. }
        | Op::StraightThrough { .. }
        | Op::AllReduce(_) => None,
    }
}

/// Moving the copies of one element changes nothing.
fn broadcast_element(graph: &Graph, operand: NodeId) -> Option<Equal> {
    let Op::Broadcast(_) = graph.op(operand) else { return None };
    let element = graph.operand(operand, 0);
    (graph.ty(element).shape.elements() == Some(Dim::ONE))
        .then_some(Equal::BroadcastElement(element))
}

fn unary(graph: &Graph, id: NodeId, op: UnaryOp, options: &Options) -> Option<Equal> {
    let x = graph.operand(id, 0);
    let inner = match graph.op(x) {
        Op::Unary(inner) => Some((*inner, graph.operand(x, 0))),
        _ => None,
    };
    match (op, inner) {
        (UnaryOp::StopGradient, _) => (!options.keep_stop_gradient).then_some(Equal::Value(x)),
        (UnaryOp::Neg, Some((UnaryOp::Neg, y))) | (UnaryOp::Not, Some((UnaryOp::Not, y))) => {
            Some(Equal::Value(y))
        }
        (UnaryOp::Relu, Some((UnaryOp::Relu, _))) => Some(Equal::Value(x)),
        _ => hoisted(graph, id),
    }
}

fn binary(graph: &Graph, id: NodeId, op: BinaryOp) -> Option<Equal> {
    let (a, b) = (graph.operand(id, 0), graph.operand(id, 1));
    let neutral = match op {
        BinaryOp::Add | BinaryOp::Sub => 0.0,
        BinaryOp::Mul | BinaryOp::Div | BinaryOp::Pow => 1.0,
        BinaryOp::Max | BinaryOp::Min | BinaryOp::And | BinaryOp::Or => {
            return if a == b { Some(Equal::Value(a)) } else { hoisted(graph, id) };
        }
    };
    let commutes = matches!(op, BinaryOp::Add | BinaryOp::Mul);
    if splat(graph, b) == Some(neutral) {
        return Some(Equal::Value(a));
    }
    if commutes && splat(graph, a) == Some(neutral) {
        return Some(Equal::Value(b));
    }
    hoisted(graph, id)
}

/// The element of a constant whose elements are all equal, seen through what only moves or repeats them.
pub(crate) fn splat(graph: &Graph, mut id: NodeId) -> Option<f64> {
    loop {
        match graph.op(id) {
            Op::Const(tensor) => return tensor.splat(),
            Op::Broadcast(_) | Op::Reshape(_) | Op::Transpose(_) => id = graph.operand(id, 0),
            _ => return None,
        }
    }
}

/// An elementwise op whose operands all repeat smaller values of one shape: computed once, then repeated.
fn hoisted(graph: &Graph, id: NodeId) -> Option<Equal> {
    let operands = graph.operands(id);
    let small: Option<Vec<NodeId>> = operands
        .iter()
        .map(|&operand| match graph.op(operand) {
            Op::Broadcast(_) => Some(graph.operand(operand, 0)),
            _ => None,
        })
        .collect();
    let small = small?;
    let (first, rest) = small.split_first()?;
    let shape = &graph.ty(*first).shape;
    let fits = rest.iter().all(|&operand| graph.ty(operand).shape == *shape);
    fits.then(|| Equal::BroadcastOf(graph.op(id).clone(), small))
}
