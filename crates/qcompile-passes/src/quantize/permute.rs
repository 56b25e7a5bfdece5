//! Carries another order of a layer's channels to those that read them, so that no value has to be put back in order.

use super::layer::{Layer, layers};
use super::split::take;
use crate::PassError;
use qcompile_ir::{Graph, NodeId, Op, Region, Shape};

/// What lies between a layer and the one layer that reads its channels.
pub(super) struct Path {
    /// Values of the channels' axis alone, which are added or multiplied on the way: the op and the operand's position.
    vectors: Vec<(NodeId, usize)>,
    /// The layer that sums over the channels.
    reader: Layer,
}

impl Path {
    /// The way from a layer's result, if whatever uses it does the same for each channel up to a layer that sums over
    /// them, and if nothing else sees it.
    pub(super) fn find(graph: &Graph, layer: &Layer) -> Option<Path> {
        let layers = layers(graph);
        let mut vectors = Vec::new();
        let mut value = layer.node;
        loop {
            let seen = graph.outputs().iter().any(|(_, output)| *output == value)
                || graph.next().values().any(|next| *next == value);
            let [(user, position)] = graph.uses(value)[..] else { return None };
            if seen || graph.node(user).region != Region::Forward {
                return None;
            }
            let reader = layers.iter().find(|layer| layer.node == user && !layer.recurrent);
            match graph.op(user) {
                Op::Unary(_) | Op::MaxPool2d(_) | Op::AveragePool2d(_) => {}
                Op::Binary(_) => {
                    let other = 1 - position;
                    vector(graph, graph.operand(user, other), layer.channels)?;
                    vectors.push((user, other));
                }
                Op::Conv2d(_) | Op::Matmul { .. } if position == 0 => {
                    let reader = reader?.clone();
                    let last = graph.ty(value).shape.rank() - 1;
                    let fits = reader.input_axis == last
                        && reader.input_channels == layer.channels
                        && !reader.grouped
                        && graph.node(user).note.channels.input_outliers.is_empty();
                    return fits.then_some(Path { vectors, reader });
                }
                _ => return None,
            }
            value = user;
        }
    }

    /// Brings everything on the way into the order of these index ranges.
    pub(super) fn permute(
        &self,
        graph: &mut Graph,
        spans: &[(usize, usize)],
    ) -> Result<(), PassError> {
        for &(user, position) in &self.vectors {
            let operand = graph.operand(user, position);
            let Some(from) = vector(graph, operand, self.reader.input_channels) else { continue };
            let name = format!("{}.permuted", graph.node(from).name.as_str());
            let permuted = take(graph, from, 0, spans, &name)?;
            let shape = graph.ty(operand).shape.clone();
            let wide = graph.add(Op::Broadcast(shape), &[permuted], name, Region::Forward)?;
            graph.set_operand(user, position, wide)?;
        }
        let weight = graph.operand(self.reader.node, 1);
        let name = format!("{}.permuted", graph.node(weight).name.as_str());
        let permuted = take(graph, weight, self.reader.weight_input_axis, spans, &name)?;
        Ok(graph.set_operand(self.reader.node, 1, permuted)?)
    }
}

/// The vector of one element for each channel that `id` repeats along all other axes.
fn vector(graph: &Graph, id: NodeId, channels: usize) -> Option<NodeId> {
    let Op::Broadcast(_) = graph.op(id) else { return None };
    let vector = graph.operand(id, 0);
    (graph.ty(vector).shape == Shape(vec![channels.into()])).then_some(vector)
}
