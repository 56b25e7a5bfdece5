//! Products that no int8 kernel computes, and why: one truth for what is chosen, what is scored and what notes ask for.

use super::decide::Options;
use super::insert::is_quantized;
use super::layer::{Candidate, Layer, dequantized, multiplied};
use super::numerics::{Numerics, OperandTypes};
use qcompile_ir::{
    DType, Dim, Granularity, Graph, NodeId, Op, Precision, QuantizedRange, Quantizer,
};

/// What is asked of the kernels of a product and of its gradients.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    activation: DType,
    weight: DType,
    gradient: DType,
    granularity: Granularity,
    /// As in [`Options::ranged`].
    ranged: bool,
}

impl Asked {
    /// What these numerics ask for.
    pub(crate) fn by_numerics(numerics: &Numerics, ranged: bool) -> Asked {
        let Numerics { types, granularity, .. } = *numerics;
        let OperandTypes { weight, activation, gradient } = types;
        Asked { activation, weight, gradient, granularity, ranged }
    }

    /// What the notes of a product ask for.
    fn by_note(precision: Precision, quantizer: Quantizer, ranged: bool) -> Asked {
        let Quantizer { weight, granularity, .. } = quantizer;
        let Precision { forward: activation, grad_input: gradient, .. } = precision;
        Asked { activation, weight, gradient, granularity, ranged }
    }
}

/// Why the forward product has no kernel for this, if so.
pub(crate) fn obstacle(graph: &Graph, one: Candidate<'_>, asked: Asked) -> Option<String> {
    match one.layer {
        Some(layer) if layer.recurrent => of_recurrence(graph, layer, asked),
        Some(layer) => of_layer(graph, layer, asked),
        None => of_activations(graph, one.node, asked),
    }
}

/// Why the products that give gradients of computed values have no kernel for this, if so, where those of the layer are
/// not those of any other.
fn of_gradients(graph: &Graph, one: Candidate<'_>, asked: Asked) -> Option<String> {
    match one.layer {
        Some(layer) if layer.recurrent => recurrent_codes(layer, asked, asked.gradient),
        Some(_) => None,
        None => {
            let attention = matches!(graph.op(one.node), Op::Attention { .. });
            if attention && asked.gradient != DType::I8 {
                return Some(format!("gradients of attention have no {} codes", asked.gradient));
            }
            activation_codes(graph, one.node, asked.gradient)
                .or_else(|| long_sum(graph, one.node, &summed_back(graph, one.node)))
        }
    }
}

/// Why what the options ask for has no kernel, if so: for the forward product or, where that is not to be quantized, for
/// the gradients.
pub(super) fn by_options(graph: &Graph, one: Candidate<'_>, options: &Options) -> Option<String> {
    let asked = Asked::by_numerics(&options.numerics, options.ranged);
    if options.operations.forward || one.layer.is_some_and(|layer| !layer.recurrent) {
        return obstacle(graph, one, asked);
    }
    of_gradients(graph, one, asked)
}

/// Why the gradients alone have no kernel for what the options ask for, if so.
pub(super) fn back_by_options(
    graph: &Graph,
    one: Candidate<'_>,
    options: &Options,
) -> Option<String> {
    of_gradients(graph, one, Asked::by_numerics(&options.numerics, options.ranged))
}

/// What the notes of a product ask for that has no kernel.
pub(super) fn by_note(graph: &Graph, one: Candidate<'_>, ranged: bool) -> Option<String> {
    let note = &graph.node(one.node).note;
    let precision = note.precision?;
    let asked = Asked::by_note(precision, note.quantizer.unwrap_or_default(), ranged);
    let [input, weight] = [precision.grad_input, precision.grad_weight];
    if one.layer.is_none() && input != weight && (is_quantized(input) || is_quantized(weight)) {
        return Some(
            "both gradients of a product of two activations are in grad_input, and grad_weight is another"
                .to_owned(),
        );
    }
    if one.layer.is_some_and(|layer| layer.recurrent) && !note.channels.is_empty() {
        return Some("a recurrent layer has no channels apart".to_owned());
    }
    let forward = is_quantized(precision.forward).then(|| obstacle(graph, one, asked));
    let back = is_quantized(input).then(|| of_gradients(graph, one, asked));
    forward.flatten().or(back.flatten())
}

fn of_layer(graph: &Graph, layer: &Layer, asked: Asked) -> Option<String> {
    let integers = !asked.activation.is_float() && !asked.weight.is_float();
    let kernel = match graph.op(layer.node) {
        Op::Conv2d(geometry) => geometry.kernel,
        _ => [1, 1],
    };
    let products = kernel.into_iter().fold(layer.input_channels, usize::saturating_mul);
    (integers && products > QuantizedRange::MOST_I8_PRODUCTS)
        .then(|| format!("a sum of {products} products of codes may exceed 32 bits"))
}

fn of_activations(graph: &Graph, product: NodeId, asked: Asked) -> Option<String> {
    if asked.ranged {
        return Some("within fixed ranges only products with a weight are rounded".to_owned());
    }
    let reason = activation_codes(graph, product, asked.activation);
    reason.or_else(|| long_sum(graph, product, &summed(graph, product)))
}

/// Why a product of two activations cannot read codes of a type, or those that the model has for it, if so.
fn activation_codes(graph: &Graph, product: NodeId, codes: DType) -> Option<String> {
    if codes.is_float() {
        return Some(format!("a product of two activations has no {codes} codes"));
    }
    let attention = matches!(graph.op(product), Op::Attention { .. });
    for position in 0..multiplied(graph.op(product)) {
        // What the model rounds itself stays so.
        let Some(rounded) = dequantized(graph, graph.operand(product, position)) else { continue };
        let Op::Dequantize { axis } = graph.op(rounded) else { continue };
        let operands = graph.operands(rounded);
        let affine = operands.len() > 2 || graph.ty(operands[0]).dtype == DType::U8;
        if affine && (attention || position > 0) || axis.is_some() && attention {
            let place = graph.node(operands[0]).name.as_str();
            return Some(format!("no kernel has the codes that the model has for it in {place}"));
        }
    }
    None
}

/// What a product of two activations sums over.
fn summed(graph: &Graph, product: NodeId) -> Vec<Dim> {
    let dims = |position: usize| &graph.ty(graph.operand(product, position)).shape.0;
    match graph.op(product) {
        Op::Attention { .. } => vec![dims(0)[3], dims(2)[1]],
        Op::Matmul { transpose_a, .. } => {
            let dims = dims(0);
            vec![dims[dims.len() - if *transpose_a { 2 } else { 1 }]]
        }
        _ => Vec::new(),
    }
}

/// What its gradients sum over; those of attention sum blocks of queries and keys.
fn summed_back(graph: &Graph, product: NodeId) -> Vec<Dim> {
    let width = |position: usize| graph.ty(graph.operand(product, position)).shape.0[3];
    match graph.op(product) {
        Op::Attention { .. } => vec![width(0), width(2)],
        _ => graph.ty(product).shape.0.iter().rev().take(2).copied().collect(),
    }
}

/// Why codes cannot be summed over these, if so.
fn long_sum(graph: &Graph, product: NodeId, summed: &[Dim]) -> Option<String> {
    let attention = matches!(graph.op(product), Op::Attention { .. });
    let exceeds = |dim: &&Dim| match dim.as_fixed() {
        Some(products) => products > QuantizedRange::MOST_I8_PRODUCTS,
        None => attention,
    };
    let dim = summed.iter().find(exceeds)?;
    Some(format!("a sum of {dim} products of codes may exceed 32 bits"))
}

/// The states of a recurrent layer have codes of a fixed range.
fn of_recurrence(graph: &Graph, layer: &Layer, asked: Asked) -> Option<String> {
    let Op::Recurrence(recurrence) = graph.op(layer.node) else { return None };
    if asked.ranged {
        return Some("recurrent products have no integer operator in ONNX".to_owned());
    }
    if let Some(reason) = recurrent_codes(layer, asked, asked.activation) {
        return Some(reason);
    }
    if !recurrence.is_bounded() {
        return Some("its activations let states exceed 1, the range of their codes".to_owned());
    }
    if !starts_within_range(graph, graph.operand(layer.node, 2)) {
        return Some("its first state may exceed 1, the range of the codes".to_owned());
    }
    None
}

/// Why the products with R cannot read these codes, if so. R has a scale for each row of a gate, or, on the way back,
/// for each column.
fn recurrent_codes(layer: &Layer, asked: Asked, codes: DType) -> Option<String> {
    if let Some(other) = [asked.weight, codes].into_iter().find(|&dtype| dtype != DType::I8) {
        return Some(format!("recurrent products have no kernel for {other} codes"));
    }
    if asked.granularity == Granularity::Tensor {
        return Some("R has a scale for each row of a gate, not one for the tensor".to_owned());
    }
    let products = layer.input_channels;
    (products > QuantizedRange::MOST_I8_PRODUCTS)
        .then(|| format!("a sum of {products} products of codes may exceed 32 bits"))
}

/// Whether a value is a constant within ± 1, seen through any strides.
fn starts_within_range(graph: &Graph, mut id: NodeId) -> bool {
    loop {
        match graph.op(id) {
            Op::Const(tensor) => {
                return tensor.splat().is_some_and(|value| value.abs() <= 1.0);
            }
            Op::Reshape(_) | Op::Transpose(_) | Op::Broadcast(_) | Op::Slice { .. } => {
                id = graph.operand(id, 0);
            }
            _ => return false,
        }
    }
}
