//! One arm for each op of the graph.

use super::{Exporter, Result};
use qcompile_ir::{DType, NodeId, Op};
use std::sync::Arc;

impl Exporter<'_> {
    /// Writes a value whose operands are written.
    pub(super) fn convert(&mut self, id: NodeId) -> Result<()> {
        let operands = self.graph.operands(id);
        match self.graph.op(id) {
            Op::Input(_) => self.input(id),
            Op::Param(tensor) | Op::State(tensor) | Op::Const(tensor) => {
                let name = self.writer.claim(self.name(id));
                self.writer.initializer(&name, tensor);
                if matches!(self.graph.op(id), Op::Const(_)) {
                    self.constants.insert(name.clone(), Arc::clone(tensor));
                }
                self.place_natural(id, name);
                Ok(())
            }
            Op::Size(dim) => self.size(id, *dim),
            Op::Iota(dim) => self.iota(id, *dim),
            Op::Training => {
                // A model that goes out is not in training.
                let name = self.scalar(DType::Bool, 0.0, self.name(id));
                self.place_natural(id, name);
                Ok(())
            }
            Op::Unary(op) => self.unary(id, *op, operands[0]),
            Op::Cast(to) => self.cast(id, *to, operands[0]),
            Op::Binary(op) => self.binary(id, *op, &operands),
            Op::Compare(op) => self.compare(id, *op, &operands),
            Op::Select => {
                self.require_type(id, "Where", self.dtype(id))?;
                self.elementwise(id, "Where", &operands, vec![])
            }
            Op::Reduce { op, axes } => self.reduce(id, *op, axes, operands[0]),
            Op::Matmul { transpose_a, transpose_b } => {
                self.matmul(id, [*transpose_a, *transpose_b], [operands[0], operands[1]], None)
            }
            Op::Conv2d(geometry) => self.conv(id, geometry, &operands, None),
            Op::Conv2dGradInput(geometry) => self.conv_transpose(id, geometry, &operands),
            Op::MaxPool2d(geometry) => self.pool(id, "MaxPool", geometry, operands[0]),
            Op::AveragePool2d(geometry) => self.pool(id, "AveragePool", geometry, operands[0]),
            Op::Reshape(_) => self.reshape_value(id, operands[0]),
            Op::Transpose(permutation) => {
                let axes: Vec<_> = permutation.iter().map(|&axis| Some(axis)).collect();
                self.alias(id, operands[0], &axes)
            }
            Op::Broadcast(shape) => {
                let rank = self.dims(operands[0]).len();
                let first = shape.rank() - rank;
                let axes: Vec<_> = (0..shape.rank()).map(|axis| axis.checked_sub(first)).collect();
                self.alias(id, operands[0], &axes)
            }
            Op::Slice { axis, start, end, step } => {
                self.slice(id, operands[0], *axis, [*start, *end, *step])
            }
            Op::Pad { axis, low, high, interior, value } => {
                self.pad(id, operands[0], *axis, [*low, *high, *interior], *value)
            }
            Op::Concat { axis } => self.concat(id, *axis, &operands),
            Op::Gather => self.gather(id, &operands),
            Op::Scatter { op, rows } => self.scatter(id, *op, *rows, &operands),
            Op::TopK { k, largest } => self.top_k(id, *k, *largest, operands[0]),
            Op::Attention { scale, causal, .. } => self.attention(id, *scale, *causal, &operands),
            Op::Softmax => self.rows(id, "Softmax", operands[0]),
            Op::LogSoftmax => self.rows(id, "LogSoftmax", operands[0]),
            Op::CrossEntropy => self.cross_entropy(id, &operands),
            Op::Recurrence(_) => self.recurrence(id),
            Op::Quantize { dtype, axis } => self.quantize(id, *dtype, *axis, &operands),
            Op::Dequantize { axis } => self.dequantize(id, *axis, &operands),
            Op::Conv2dGradWeight(_)
            | Op::MaxPool2dGrad(_)
            | Op::AveragePool2dGrad(_)
            | Op::AttentionGrad { .. }
            | Op::CrossEntropyGrad
            | Op::RecurrenceGrad { .. }
            | Op::StraightThrough { .. } => self.unsupported(id, "it is part of a gradient"),
            Op::Random { .. } => self.unsupported(id, "ONNX's random numbers are others"),
            Op::AllReduce(_) => self.unsupported(id, "a model runs on one machine"),
        }
    }

    /// An input that is none of the model's.
    fn input(&mut self, id: NodeId) -> Result<()> {
        if self.views.contains_key(&id) {
            return Ok(());
        }
        self.unsupported(id, "it is no input of the model")
    }
}
