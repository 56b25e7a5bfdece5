//! Patterns as nodes of the model.

use super::{Pattern, Statistics};
use crate::export::view::Placed;
use crate::export::writer::{Attribute, int};
use crate::export::{Exporter, Result};
use qcompile_ir::{DType, NodeId, Op};

impl Exporter<'_> {
    /// Writes a value that is a pattern, whose operands are written.
    pub(in crate::export) fn write_pattern(&mut self, id: NodeId, pattern: &Pattern) -> Result<()> {
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
            Pattern::Blocks { q, scale, transposed } => {
                self.require(id, 21, "DequantizeLinear with blocks")?;
                let base = self.name(id);
                let block = q.elements() / scale.elements().max(1);
                let axis = i64::from(!*transposed);
                let inputs = vec![
                    self.writer.constant(&format!("{base}.q"), q),
                    self.writer.constant(&format!("{base}.scale"), scale),
                ];
                let attributes = vec![
                    ("axis", Attribute::Int(axis)),
                    ("block_size", Attribute::Int(int(block))),
                ];
                let name = self.one("DequantizeLinear", inputs, base, attributes);
                self.place_natural(id, name);
                Ok(())
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
        let all = |exporter: &mut Self, value: f64, what: &str| {
            let wanted = format!("{}.{what}", exporter.name(id));
            exporter.filled(id, DType::F32, &[channels], value, &wanted)
        };
        inputs.push(match statistics.mean {
            Some(mean) => self.vector(mean)?.name,
            None => all(self, 0.0, "mean")?,
        });
        let (variance, epsilon) = match statistics.variance {
            Some((variance, epsilon)) => (self.vector(variance)?.name, epsilon),
            None => (all(self, 1.0, "variance")?, 0.0),
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
