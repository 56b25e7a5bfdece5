//! Puts `quantize`, `dequantize` pairs before the operands of a product, with the scales they need.

use super::layer::{Layer, multiplied, reads_quantized};
use super::recurrence;
use super::scale;
use crate::PassError;
use crate::builder::Builder;
use crate::stochastic::{Draws, quantize_stochastically, step};
use qcompile_ir::{
    DType, GradientRounding, Granularity, Graph, NodeId, Op, Quantizer, Region, Scaling, fnv1a,
};
use std::collections::BTreeMap;

/// What an operand is to its product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Weight,
    Activation,
    Gradient,
}

/// How an operand is rounded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operand {
    pub(super) role: Role,
    /// The axis that scales run along; none for one scale.
    pub(super) axis: Option<usize>,
    pub(super) dtype: DType,
    pub(super) quantizer: Quantizer,
}

/// Rounded values inserted so far by the value, the axis of its scale and the codes, so that none is rounded twice.
#[derive(Debug, Default)]
pub(crate) struct Inserted(BTreeMap<(NodeId, Option<usize>, DType), NodeId>);

impl Inserted {
    /// `x` rounded by a scale of its own.
    pub(super) fn quantized(
        &mut self,
        graph: &mut Graph,
        x: NodeId,
        operand: Operand,
        region: Region,
    ) -> Result<NodeId, PassError> {
        let Operand { role, axis, dtype, quantizer } = operand;
        if let Some(known) = self.find(x, axis, dtype) {
            return Ok(known);
        }
        let delayed = role != Role::Weight && quantizer.scaling == Scaling::Delayed;
        let scale = if delayed && axis.is_none() {
            scale::delayed(graph, x, dtype, region)?
        } else {
            scale::current(graph, x, axis, dtype, region)?
        };
        self.rounded(graph, x, scale, operand, region)
    }

    /// `x` rounded by this scale.
    pub(super) fn rounded(
        &mut self,
        graph: &mut Graph,
        x: NodeId,
        scale: NodeId,
        operand: Operand,
        region: Region,
    ) -> Result<NodeId, PassError> {
        let Operand { role, axis, dtype, quantizer } = operand;
        let name = graph.node(x).name.as_str().to_owned();
        let stochastic = quantizer.rounding == GradientRounding::Stochastic;
        let q = if stochastic && role == Role::Gradient {
            let draws = Draws { seed: fnv1a(name.bytes()), step: step(graph)? };
            quantize_stochastically(graph, x, scale, axis, dtype, draws, region)?
        } else {
            let op = Op::Quantize { dtype, axis };
            Builder::new(graph, region, &name).add("q", op, &[x, scale])?
        };
        let mut builder = Builder::new(graph, region, &name);
        let value = builder.add("dq", Op::Dequantize { axis }, &[q, scale])?;
        self.0.insert((x, axis, dtype), value);
        Ok(value)
    }

    /// What is known of `x` along `axis`.
    pub(super) fn find(&self, x: NodeId, axis: Option<usize>, dtype: DType) -> Option<NodeId> {
        self.0.get(&(x, axis, dtype)).copied()
    }
}

/// The axis of the rows of a product's left operand, if each is to have a scale: of a matrix or of images.
pub(super) fn rows(graph: &Graph, product: NodeId, quantizer: Quantizer) -> Option<usize> {
    let fits = match graph.op(product) {
        Op::Matmul { transpose_a: false, .. } => graph.ty(product).shape.rank() == 2,
        Op::Conv2d(_) | Op::Conv2dGradInput(_) => true,
        _ => false,
    };
    (fits && quantizer.granularity == Granularity::Row).then_some(0)
}

/// Rounds both operands of a layer's product: data per tensor or row, weight per output channel or tensor. One that is
/// quantized already stays as it is. A recurrent layer rounds within.
pub(crate) fn forward(
    graph: &mut Graph,
    layer: &Layer,
    inserted: &mut Inserted,
) -> Result<(), PassError> {
    let note = &graph.node(layer.node).note;
    if layer.recurrent {
        return recurrence::products(graph, layer.node, Some(DType::I8));
    }
    let quantizer = note.quantizer.unwrap_or_default();
    let activation = match note.precision {
        Some(precision) if is_quantized(precision.forward) => precision.forward,
        _ => DType::I8,
    };
    let per_channel = quantizer.granularity != Granularity::Tensor;
    let channels = per_channel.then_some(layer.weight_axis);
    let data = rows(graph, layer.node, quantizer);
    let operands = [
        Operand { role: Role::Activation, axis: data, dtype: activation, quantizer },
        Operand { role: Role::Weight, axis: channels, dtype: quantizer.weight, quantizer },
    ];
    for (position, how) in operands.into_iter().enumerate() {
        let operand = graph.operand(layer.node, position);
        if !reads_quantized(graph, operand) {
            let quantized = inserted.quantized(graph, operand, how, Region::Forward)?;
            graph.set_operand(layer.node, position, quantized)?;
        }
    }
    Ok(())
}

/// Rounds the operands of a product of two activations, per tensor, or the rows of a left matrix if each is to have a scale:
/// of attention queries, keys and values, and the exponentials of its scores in the kernel. One that is quantized already
/// stays as it is.
pub(crate) fn activations(
    graph: &mut Graph,
    product: NodeId,
    inserted: &mut Inserted,
) -> Result<(), PassError> {
    let note = &graph.node(product).note;
    let quantizer = note.quantizer.unwrap_or_default();
    let dtype = note.precision.map_or(DType::I8, |precision| precision.forward);
    let mut op = graph.op(product).clone();
    if let Op::Attention { products, .. } = &mut op {
        *products = DType::I8;
    }
    for position in 0..multiplied(&op) {
        let operand = graph.operand(product, position);
        if !reads_quantized(graph, operand) {
            let axis = if position == 0 { rows(graph, product, quantizer) } else { None };
            let how = Operand { role: Role::Activation, axis, dtype, quantizer };
            let quantized = inserted.quantized(graph, operand, how, Region::Forward)?;
            graph.set_operand(product, position, quantized)?;
        }
    }
    if op != *graph.op(product) {
        let operands = graph.operands(product);
        let new = with_op(graph, product, op, &operands)?;
        graph.replace_uses(product, new)?;
    }
    Ok(())
}

/// A node in the place of `id` that computes `op`, with its name and notes; what uses `id` is the caller's to change.
pub(super) fn with_op(
    graph: &mut Graph,
    id: NodeId,
    op: Op,
    operands: &[NodeId],
) -> Result<NodeId, PassError> {
    let node = graph.node(id).clone();
    let new = graph.add(op, operands, node.name.clone(), node.region)?;
    *graph.note_mut(new) = node.note;
    graph.swap_names(id, new);
    Ok(new)
}

/// Whether products of these values read codes.
pub(super) fn is_quantized(dtype: DType) -> bool {
    matches!(dtype, DType::I8 | DType::I4 | DType::F8E4M3 | DType::F8E5M2)
}
