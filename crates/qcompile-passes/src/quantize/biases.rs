//! Biases as integers: i32 with the scale of the products that they are added to (Jacob et al. 2018, section 2.4).

use super::layer::{Layer, stored_layers};
use crate::PassError;
use crate::builder::Builder;
use crate::fold_batch_norm::per_channel;
use qcompile_ir::{
    BinaryOp, DType, Dim, Graph, NodeId, Op, QuantizedRange, Region, Shape, UnaryOp,
};

/// A bias is at most this many steps, so that it and the sum that it is added to are i32.
const LARGEST_BIAS: f64 = (1 << 30) as f64;

/// A product of codes, and the bias that is added to it.
struct Biased {
    layer: Layer,
    /// The sum, and the position of the bias in it.
    sum: NodeId,
    position: usize,
    bias: NodeId,
    /// The scale of the data.
    data_scale: NodeId,
}

impl Biased {
    fn of(graph: &Graph, layer: Layer) -> Option<Biased> {
        let weight = graph.operand(layer.node, 1);
        // Codes that lie in another order have the scale that they had.
        let mut data = graph.operand(layer.node, 0);
        while let Op::Transpose(_) | Op::Reshape(_) = graph.op(data) {
            data = graph.operand(data, 0);
        }
        let of_codes = *graph.op(data) == Op::Dequantize { axis: None }
            && *graph.op(weight) == Op::Dequantize { axis: Some(layer.weight_axis) };
        let [(sum, position)] = graph.uses(layer.node)[..] else { return None };
        if !of_codes || *graph.op(sum) != Op::Binary(BinaryOp::Add) {
            return None;
        }
        let position = 1 - position;
        let bias = per_channel(graph, graph.operand(sum, position), &layer)?;
        let data_scale = graph.operand(data, 1);
        Some(Biased { layer, sum, position, bias, data_scale })
    }

    /// The scale of each channel of the weight.
    fn weight_scale(&self, graph: &Graph) -> NodeId {
        graph.operand(graph.operand(self.layer.node, 1), 1)
    }

    /// The bias and the scale of the data, one number for each channel, and the least scale of the weight by which the
    /// bias has few enough steps.
    fn each(&self, b: &mut Builder) -> Result<[NodeId; 3], PassError> {
        let channels = Shape::fixed(&[self.layer.channels]);
        let one = b.shape(self.bias).elements() == Some(Dim::ONE);
        let flat = if one { Shape::scalar() } else { channels.clone() };
        let bias = b.reshape("flat", self.bias, flat)?;
        let bias = b.broadcast("each", bias, channels.clone())?;
        let data_scale = b.broadcast("data_scale", self.data_scale, channels)?;
        let magnitude = b.unary("magnitude", UnaryOp::Abs, bias)?;
        let steps = b.binary("steps", BinaryOp::Div, magnitude, data_scale)?;
        let least = b.scaled("least", steps, LARGEST_BIAS.recip())?;
        let smallest = b.splat_like("smallest", least, QuantizedRange::SMALLEST_SCALE)?;
        let least = b.binary("least", BinaryOp::Max, least, smallest)?;
        Ok([bias, data_scale, least])
    }

    /// Adds the bias rounded by these scales in the place of the bias.
    fn add_rounded(
        &self,
        graph: &mut Graph,
        bias: NodeId,
        scales: NodeId,
    ) -> Result<(), PassError> {
        let name = graph.node(self.bias).name.as_str().to_owned();
        let mut b = Builder::new(graph, Region::Forward, &name);
        let axis = Some(0);
        let q = b.add("q", Op::Quantize { dtype: DType::I32, axis }, &[bias, scales])?;
        let bias = b.add("dq", Op::Dequantize { axis }, &[q, scales])?;
        let shape = b.shape(self.layer.node);
        let bias = b.broadcast("biases", bias, shape)?;
        Ok(graph.set_operand(self.sum, self.position, bias)?)
    }
}

/// Rounds the biases of products of codes to i32, by the product of the scales of data and weight. Where a bias has too
/// many such steps, the scale of its channel of the weight grows, whose codes then all are small. Returns the number of
/// biases.
///
/// # Errors
/// [`PassError::Graph`], a defect of this pass.
pub fn round_biases(graph: &mut Graph) -> Result<usize, PassError> {
    let mut count = 0;
    for layer in stored_layers(graph) {
        let Some(biased) = Biased::of(graph, layer) else { continue };
        let product = biased.layer.node;
        let weight = graph.operand(product, 1);
        let [old_q, old_scale] = [0, 1].map(|position| graph.operand(weight, position));
        let (dtype, axis) = (graph.ty(old_q).dtype, Some(biased.layer.weight_axis));
        let name = graph.node(biased.bias).name.as_str().to_owned();
        let mut b = Builder::new(graph, Region::Forward, &name);
        let [bias, data_scale, least] = biased.each(&mut b)?;
        let scale = b.binary("weight.scale", BinaryOp::Max, old_scale, least)?;
        let codes = b.add("weight.q", Op::Quantize { dtype, axis }, &[weight, scale])?;
        let rescaled = b.add("weight.dq", Op::Dequantize { axis }, &[codes, scale])?;
        let scales = b.binary("scale", BinaryOp::Mul, data_scale, scale)?;
        biased.add_rounded(graph, bias, scales)?;
        graph.set_operand(product, 1, rescaled)?;
        for (old, new) in [(old_scale, scale), (old_q, codes), (weight, rescaled)] {
            graph.swap_names(old, new);
        }
        count += 1;
    }
    Ok(count)
}

/// Rounds the biases of a graph that is trained with its roundings, as [`round_biases`] will when it leaves. The weight's
/// scale stays what training makes of it: where it would grow, all codes of the channel are 0 or about to be.
///
/// # Errors
/// [`PassError::Graph`], a defect of this pass.
pub(super) fn train_with_rounded(graph: &mut Graph) -> Result<(), PassError> {
    for layer in stored_layers(graph) {
        let Some(biased) = Biased::of(graph, layer) else { continue };
        let old_scale = biased.weight_scale(graph);
        let name = graph.node(biased.bias).name.as_str().to_owned();
        let mut b = Builder::new(graph, Region::Forward, &name);
        let [bias, data_scale, least] = biased.each(&mut b)?;
        let scale = b.binary("weight.scale", BinaryOp::Max, old_scale, least)?;
        let scale = b.unary("fixed", UnaryOp::StopGradient, scale)?;
        let data_scale = b.unary("data_scale.fixed", UnaryOp::StopGradient, data_scale)?;
        let scales = b.binary("scale", BinaryOp::Mul, data_scale, scale)?;
        biased.add_rounded(graph, bias, scales)?;
    }
    Ok(())
}
