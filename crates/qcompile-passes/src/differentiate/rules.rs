//! Which operands carry gradients, and which rule gives them: one arm per op.

use super::{elementwise, indexing, linear, normalize, quantized, recurrence, shape};
use crate::PassError;
use crate::builder::Builder;
use qcompile_ir::{BinaryOp, Graph, NodeId, Op, Region, UnaryOp};

/// One operand of one node, to be differentiated.
pub(super) struct Site {
    /// The node `y`.
    pub(super) y: NodeId,
    /// Its operands.
    pub(super) operands: Vec<NodeId>,
    /// Which operand the gradient is of.
    pub(super) position: usize,
    /// The derivative of the loss with respect to `y`.
    pub(super) dy: NodeId,
}

impl Site {
    /// The operand that the gradient is of.
    pub(super) fn x(&self) -> NodeId {
        self.operands[self.position]
    }
}

/// Whether operand `position` of `id` can have a gradient other than zero through it.
#[must_use]
pub fn carries_gradient(graph: &Graph, id: NodeId, position: usize) -> bool {
    match graph.op(id) {
        Op::Input(_)
        | Op::Param(_)
        | Op::State(_)
        | Op::Const(_)
        | Op::Size(_)
        | Op::Training
        | Op::Iota(_)
        | Op::Random { .. }
        | Op::TopK { .. } => false,
        Op::Unary(op) => match op {
            UnaryOp::Floor
            | UnaryOp::Ceil
            | UnaryOp::Round
            | UnaryOp::Sign
            | UnaryOp::Not
            | UnaryOp::StopGradient => false,
            UnaryOp::Neg
            | UnaryOp::Abs
            | UnaryOp::Exp
            | UnaryOp::Log
            | UnaryOp::Sqrt
            | UnaryOp::Reciprocal
            | UnaryOp::Erf
            | UnaryOp::Relu
            | UnaryOp::Sigmoid
            | UnaryOp::Tanh
            | UnaryOp::Sin
            | UnaryOp::Cos
            | UnaryOp::Atan => graph.ty(id).dtype.is_float(),
        },
        Op::Cast(dtype) => {
            dtype.is_float() && graph.ty(graph.operand(id, position)).dtype.is_float()
        }
        Op::Binary(op) => match op {
            BinaryOp::And | BinaryOp::Or => false,
            BinaryOp::Add
            | BinaryOp::Sub
            | BinaryOp::Mul
            | BinaryOp::Div
            | BinaryOp::Max
            | BinaryOp::Min
            | BinaryOp::Pow => graph.ty(id).dtype.is_float(),
        },
        Op::Compare(_) => false,
        Op::Select => position > 0,
        Op::Scatter { .. } => position > 0 && graph.ty(id).dtype.is_float(),
        Op::Gather => position == 0 && graph.ty(id).dtype.is_float(),
        Op::CrossEntropy | Op::Quantize { .. } | Op::MaxPool2dGrad(_) => position == 0,
        Op::Dequantize { .. } => match position {
            0 => true,
            1 => quantized::learned(graph, graph.operand(id, 1)),
            _ => false,
        },
        Op::CrossEntropyGrad => position != 1,
        Op::StraightThrough { .. } => position < 2,
        Op::Recurrence(layer) => layer.operands().lengths != Some(position),
        Op::RecurrenceGrad { recurrence, cell, rounding } => {
            let at = recurrence.gradient_operands(*cell, *rounding);
            ![at.lengths, at.numbers].contains(&Some(position))
        }
        Op::Reduce { .. }
        | Op::Matmul { .. }
        | Op::Conv2d(_)
        | Op::Conv2dGradInput(_)
        | Op::Conv2dGradWeight(_)
        | Op::MaxPool2d(_)
        | Op::AveragePool2d(_)
        | Op::AveragePool2dGrad(_)
        | Op::Reshape(_)
        | Op::Transpose(_)
        | Op::Broadcast(_)
        | Op::Slice { .. }
        | Op::Pad { .. }
        | Op::Concat { .. }
        | Op::Attention { .. }
        | Op::AttentionGrad { .. }
        | Op::Softmax
        | Op::LogSoftmax
        | Op::AllReduce(_) => true,
    }
}

/// The derivative of the loss with respect to operand `position` of `y` by this use, where `dy` is the derivative
/// with respect to `y`. New nodes are named after `name`.
pub(super) fn gradient(
    graph: &mut Graph,
    y: NodeId,
    position: usize,
    dy: NodeId,
    name: &str,
) -> Result<NodeId, PassError> {
    let operands = graph.operands(y);
    let site = Site { y, operands, position, dy };
    let op = graph.op(y).clone();
    let mut builder = Builder::new(graph, Region::Backward, name);
    let b = &mut builder;
    match op {
        Op::Unary(op) => elementwise::unary(b, &site, op),
        Op::Binary(op) => elementwise::binary(b, &site, op),
        Op::Select => elementwise::select(b, &site),
        Op::Cast(_) => elementwise::cast(b, &site),
        Op::Reduce { op, .. } => normalize::reduce(b, &site, op),
        Op::Attention { scale, causal, .. } => normalize::attention(b, &site, scale, causal),
        Op::Softmax => normalize::softmax(b, &site),
        Op::LogSoftmax => normalize::log_softmax(b, &site),
        Op::CrossEntropy => normalize::cross_entropy(b, &site),
        Op::Matmul { transpose_a, transpose_b } => {
            linear::matmul(b, &site, transpose_a, transpose_b)
        }
        Op::Conv2d(geometry) => linear::conv2d(b, &site, geometry),
        Op::Conv2dGradInput(geometry) => linear::conv2d_grad_input(b, &site, geometry),
        Op::MaxPool2d(geometry) => linear::max_pool2d(b, &site, geometry),
        Op::AveragePool2d(geometry) => linear::average_pool2d(b, &site, geometry),
        Op::Reshape(_) => shape::reshape(b, &site),
        Op::Transpose(permutation) => shape::transpose(b, &site, &permutation),
        Op::Broadcast(_) => shape::broadcast(b, &site),
        Op::Slice { axis, start, step, .. } => shape::slice(b, &site, axis, start, step),
        Op::Pad { axis, low, interior, .. } => shape::pad(b, &site, axis, low, interior),
        Op::Concat { axis } => shape::concat(b, &site, axis),
        Op::Gather => indexing::gather(b, &site),
        Op::Scatter { op, rows } => indexing::scatter(b, &site, op, rows),
        Op::Recurrence(layer) => recurrence::gradient(b, &site, &layer),
        Op::Quantize { dtype, axis } => quantized::quantize(b, &site, dtype, axis),
        Op::Dequantize { axis } => quantized::dequantize(b, &site, axis),
        Op::AllReduce(op) => linear::all_reduce(b, &site, op),
        op @ (Op::Input(_)
        | Op::Param(_)
        | Op::State(_)
        | Op::Const(_)
        | Op::Size(_)
        | Op::Training
        | Op::Iota(_)
        | Op::Random { .. }
        | Op::TopK { .. }
        | Op::Compare(_)
        | Op::Conv2dGradWeight(_)
        | Op::MaxPool2dGrad(_)
        | Op::AveragePool2dGrad(_)
        | Op::AttentionGrad { .. }
        | Op::RecurrenceGrad { .. }
        | Op::CrossEntropyGrad
        | Op::StraightThrough { .. }) => {
            Err(not_differentiable(b, &site, &format!("{} has no gradient", op.name())))
        }
    }
}

/// The error that names the node.
pub(super) fn not_differentiable(b: &Builder<'_>, site: &Site, reason: &str) -> PassError {
    PassError::NotDifferentiable {
        value: b.graph.node(site.y).name.clone(),
        reason: reason.to_owned(),
    }
}
