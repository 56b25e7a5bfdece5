//! Products that no int8 kernel computes, and why: one truth for what is chosen, what is scored and what notes ask for.

use super::decide::Options;
use super::insert::is_quantized;
use super::layer::{Candidate, Layer, dequantized, multiplied};
use super::numerics::Numerics;
use qcompile_ir::{DType, Dim, Granularity, Graph, NodeId, Note, Op, QuantizedRange};

/// What is asked of the kernel of a forward product.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    activation: DType,
    weight: DType,
    granularity: Granularity,
    /// As in [`Options::ranged`].
    ranged: bool,
}

impl Asked {
    /// What these numerics ask for.
    pub(crate) fn by_numerics(numerics: &Numerics, ranged: bool) -> Asked {
        let Numerics { types, granularity, .. } = *numerics;
        Asked { activation: types.activation, weight: types.weight, granularity, ranged }
    }

    /// What the notes of a product ask for, if its forward product is to read codes.
    fn by_note(note: &Note, ranged: bool) -> Option<Asked> {
        let activation = note.precision?.forward;
        let quantizer = note.quantizer.unwrap_or_default();
        let (weight, granularity) = (quantizer.weight, quantizer.granularity);
        is_quantized(activation).then_some(Asked { activation, weight, granularity, ranged })
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

/// Why what the options ask for has no kernel, if so.
pub(super) fn by_options(graph: &Graph, one: Candidate<'_>, options: &Options) -> Option<String> {
    obstacle(graph, one, Asked::by_numerics(&options.numerics, options.ranged))
}

/// What the notes of a product ask for that has no kernel.
pub(super) fn by_note(graph: &Graph, one: Candidate<'_>, ranged: bool) -> Option<String> {
    let note = &graph.node(one.node).note;
    let precision = note.precision?;
    let recurrent = one.layer.is_some_and(|layer| layer.recurrent);
    if one.layer.is_none()
        && [precision.grad_input, precision.grad_weight].map(is_quantized) != [false; 2]
    {
        return Some(
            "of a product of two activations only the forward one has a kernel for codes"
                .to_owned(),
        );
    }
    if recurrent && is_quantized(precision.grad_input) {
        return Some("the way back through the steps has no kernel for codes".to_owned());
    }
    if recurrent && !note.channels.is_empty() {
        return Some("a recurrent layer has no channels apart".to_owned());
    }
    obstacle(graph, one, Asked::by_note(note, ranged)?)
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
    if asked.activation.is_float() {
        return Some(format!("a product of two activations has no {} codes", asked.activation));
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
    let sums = match graph.op(product) {
        Op::Attention { .. } => {
            let [q, v] = [0, 2].map(|position| graph.operand(product, position));
            vec![graph.ty(q).shape.0[3], graph.ty(v).shape.0[1]]
        }
        Op::Matmul { transpose_a, .. } => {
            let shape = &graph.ty(graph.operand(product, 0)).shape.0;
            vec![shape[shape.len() - if *transpose_a { 2 } else { 1 }]]
        }
        _ => Vec::new(),
    };
    let exceeds = |dim: &&Dim| match dim.as_fixed() {
        Some(products) => products > QuantizedRange::MOST_I8_PRODUCTS,
        None => attention,
    };
    let dim = sums.iter().find(exceeds)?;
    Some(format!("a sum of {dim} products of codes may exceed 32 bits"))
}

/// The states of a recurrent layer have codes of a fixed range, and R a scale for each row of a gate.
fn of_recurrence(graph: &Graph, layer: &Layer, asked: Asked) -> Option<String> {
    let Op::Recurrence(recurrence) = graph.op(layer.node) else { return None };
    if asked.ranged {
        return Some("recurrent products have no integer operator in ONNX".to_owned());
    }
    let types = [asked.weight, asked.activation];
    if let Some(other) = types.into_iter().find(|&dtype| dtype != DType::I8) {
        return Some(format!("recurrent products have no kernel for {other} codes"));
    }
    if asked.granularity == Granularity::Tensor {
        return Some("R has a scale for each row of a gate, not one for the tensor".to_owned());
    }
    if !recurrence.is_bounded() {
        return Some("its activations let states exceed 1, the range of their codes".to_owned());
    }
    if !starts_within_range(graph, graph.operand(layer.node, 2)) {
        return Some("its first state may exceed 1, the range of the codes".to_owned());
    }
    if layer.input_channels > QuantizedRange::MOST_I8_PRODUCTS {
        let products = layer.input_channels;
        return Some(format!("a sum of {products} products of codes may exceed 32 bits"));
    }
    None
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
