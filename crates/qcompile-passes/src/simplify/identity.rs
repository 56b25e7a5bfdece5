//! Ops that do nothing, and compositions that are one op.

use super::{Options, replace};
use crate::PassError;
use qcompile_ir::{BinaryOp, DType, Dim, Graph, NodeId, Op, ReduceOp, Shape, UnaryOp};

/// What a node is equal to.
enum Equal {
    /// Another value.
    Value(NodeId),
    /// One op over these operands.
    Op(Op, Vec<NodeId>),
    /// The broadcast of an op over smaller operands.
    BroadcastOf(Op, Vec<NodeId>),
    /// The sum of a value over these axes, times a factor of the sum's shape, or negated.
    Factored { x: NodeId, axes: Vec<usize>, factor: Option<NodeId> },
    /// The broadcast of a one-element value.
    BroadcastElement(NodeId),
    /// Zeros before and after two values that follow one another along an axis.
    Joined { axis: usize, low: usize, high: usize, parts: [NodeId; 2] },
    /// Parts side by side, each cast by itself.
    CastParts { axis: usize, to: DType, parts: Vec<NodeId> },
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
            Equal::Factored { x, axes, factor } => {
                let sum = format!("{}.sum", name.as_str());
                let sum = graph.add(Op::Reduce { op: ReduceOp::Sum, axes }, &[x], sum, region)?;
                match factor {
                    Some(factor) => {
                        graph.add(Op::Binary(BinaryOp::Mul), &[sum, factor], name, region)?
                    }
                    None => graph.add(Op::Unary(UnaryOp::Neg), &[sum], name, region)?,
                }
            }
            Equal::Joined { axis, low, high, parts } => {
                let joined = format!("{}.joined", name.as_str());
                let joined = graph.add(Op::Concat { axis }, &parts, joined, region)?;
                let pad = Op::Pad { axis, low, high, interior: 0, value: 0.0 };
                let padded = graph.add(pad, &[joined], name.clone(), region)?;
                // What was padded may have been of another shape.
                if graph.ty(padded).shape == shape {
                    padded
                } else {
                    graph.add(Op::Reshape(shape), &[padded], name, region)?
                }
            }
            Equal::CastParts { axis, to, parts } => {
                let cast = |part| cast(graph, part, to);
                let parts = parts.into_iter().map(cast).collect::<Result<Vec<_>, _>>()?;
                graph.add(Op::Concat { axis }, &parts, name, region)?
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
        Op::Concat { axis } => flattened(graph, *axis, &operands),
        Op::Reduce { op, axes } => {
            let shape = &graph.ty(operands[0]).shape;
            if axes.iter().all(|&axis| shape.0[axis] == Dim::ONE) {
                return value(0);
            }
            match op {
                ReduceOp::Sum => factored(graph, id, axes),
                ReduceOp::Max => None,
            }
        }
        Op::Unary(op) => unary(graph, id, *op, options),
        Op::Binary(op) => binary(graph, id, *op),
        Op::Compare(_) => hoisted(graph, id),
        Op::Select => match splat(graph, operands[0]) {
            Some(condition) => value(if condition == 0.0 { 2 } else { 1 }),
            None => hoisted(graph, id),
        },
        Op::Cast(to) => cast_parts(graph, operands[0], *to).or_else(|| hoisted(graph, id)),
        Op::Input(_)
        | Op::Param(_)
        | Op::State(_)
        | Op::Const(_)
        | Op::Size(_)
        | Op::Training
        | Op::Iota(_)
        | Op::Random { .. }
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
        | Op::Gather
        | Op::Scatter { .. }
        | Op::TopK { .. }
        | Op::Attention { .. }
        | Op::AttentionGrad { .. }
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

/// A sum whose terms have a sign or a factor in common: the sum of the rest is often wanted, too.
fn factored(graph: &Graph, id: NodeId, axes: &[usize]) -> Option<Equal> {
    let terms = graph.operand(id, 0);
    let equal = |x, factor| Some(Equal::Factored { x, axes: axes.to_vec(), factor });
    match graph.op(terms) {
        Op::Unary(UnaryOp::Neg) => equal(graph.operand(terms, 0), None),
        Op::Binary(BinaryOp::Mul) => {
            let common = |position: usize| {
                match graph.op(graph.operand(terms, position)) {
                    Op::Broadcast(_) => Some(graph.operand(graph.operand(terms, position), 0)),
                    _ => None,
                }
                .filter(|&factor| graph.ty(factor).shape == graph.ty(id).shape)
            };
            match (common(0), common(1)) {
                (_, Some(factor)) => equal(graph.operand(terms, 0), Some(factor)),
                (Some(factor), None) => equal(graph.operand(terms, 1), Some(factor)),
                (None, None) => None,
            }
        }
        _ => None,
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
    if op == BinaryOp::Add
        && let Some(joined) = joined(graph, a, b).or_else(|| joined(graph, b, a))
    {
        return Some(joined);
    }
    let neutral = match op {
        BinaryOp::Add | BinaryOp::Sub => 0.0,
        BinaryOp::Mul | BinaryOp::Div | BinaryOp::Pow => 1.0,
        BinaryOp::And | BinaryOp::Or => {
            return match (splat(graph, a), splat(graph, b)) {
                _ if a == b => Some(Equal::Value(a)),
                // `or` of true and `and` of false are that; else the other decides.
                (Some(known), _) => {
                    let decides = (known != 0.0) == (op == BinaryOp::Or);
                    Some(Equal::Value(if decides { a } else { b }))
                }
                (None, Some(known)) => {
                    let decides = (known != 0.0) == (op == BinaryOp::Or);
                    Some(Equal::Value(if decides { b } else { a }))
                }
                (None, None) => hoisted(graph, id),
            };
        }
        BinaryOp::Max | BinaryOp::Min => {
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

/// The sum of two values in zeros, if one begins where the other ends: what the gradients of parts of a value give. They
/// may both be reshaped.
fn joined(graph: &Graph, a: NodeId, b: NodeId) -> Option<Equal> {
    let padded = |id: NodeId| match *graph.op(id) {
        Op::Pad { axis, low, high, interior: 0, value: 0.0 } => {
            Some((axis, low, high, graph.operand(id, 0)))
        }
        _ => None,
    };
    // Both through reshapes of one shape, or neither.
    let through = |id: NodeId| match graph.op(id) {
        Op::Reshape(_) => graph.operand(id, 0),
        _ => id,
    };
    let (a, b) = match (through(a), through(b)) {
        (x, y) if graph.ty(x) == graph.ty(y) => (x, y),
        _ => (a, b),
    };
    let ((axis, low, _, first), (other_axis, begin, high, second)) = (padded(a)?, padded(b)?);
    let end = low + graph.ty(first).shape.0[axis].scale;
    (axis == other_axis && begin == end).then_some(Equal::Joined {
        axis,
        low,
        high,
        parts: [first, second],
    })
}

/// A cast that narrows a concat which nobody else uses: its parts take less to move after it.
fn cast_parts(graph: &Graph, concat: NodeId, to: DType) -> Option<Equal> {
    let Op::Concat { axis } = *graph.op(concat) else { return None };
    let narrows = to.size() < graph.ty(concat).dtype.size() && graph.uses(concat).len() == 1;
    let parts = graph.operands(concat);
    narrows.then_some(Equal::CastParts { axis, to, parts })
}

/// The cast of a value; of a reshaped one that nobody else uses, a reshape of the cast, so that this stands by what makes
/// the value.
fn cast(graph: &mut Graph, part: NodeId, to: DType) -> Result<NodeId, PassError> {
    let region = graph.node(part).region;
    let shape = match graph.op(part) {
        Op::Reshape(shape) if graph.uses(part).len() == 1 => Some(shape.clone()),
        _ => None,
    };
    let from = if shape.is_some() { graph.operand(part, 0) } else { part };
    let named = |of: NodeId| format!("{}.{to}", graph.node(of).name.as_str());
    let (name, reshaped) = (named(from), named(part));
    let cast = graph.add(Op::Cast(to), &[from], name, region)?;
    Ok(match shape {
        Some(shape) => graph.add(Op::Reshape(shape), &[cast], reshaped, region)?,
        None => cast,
    })
}

/// A concat of concats along the same axis that nobody else uses.
fn flattened(graph: &Graph, axis: usize, operands: &[NodeId]) -> Option<Equal> {
    let inner = |id: NodeId| *graph.op(id) == Op::Concat { axis } && graph.uses(id).len() == 1;
    operands.iter().any(|&operand| inner(operand)).then(|| {
        let parts = |&id: &NodeId| if inner(id) { graph.operands(id) } else { vec![id] };
        Equal::Op(Op::Concat { axis }, operands.iter().flat_map(parts).collect())
    })
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
