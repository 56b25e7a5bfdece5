//! Operators of `com.microsoft`: what its tools fuse and exporters write.

use super::Results;
use super::elementwise::{float_input, gelu_of};
use super::linear::{numpy_product, product};
use super::norm::LastAxes;
use super::{elementwise, linear, norm, qlinear, quantized};
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::node::OnnxNode;
use qcompile_ir::{BinaryOp, DType, UnaryOp};

type Value = Result<ValueId, Obstacle>;

pub(super) fn convert(draft: &mut Draft, node: &mut OnnxNode) -> Results {
    if let Some(results) = qlinear::microsoft(draft, node) {
        return results;
    }
    match node.op {
        "BiasGelu" => biased_gelu(draft, node, "none"),
        "FastGelu" => biased_gelu(draft, node, "tanh"),
        "FusedConv" => fused_conv(draft, node),
        "DequantizeLinear" => quantized::dequantize_linear(draft, node),
        "FusedGemm" => fused_gemm(draft, node),
        "FusedMatMul" => fused_matmul(draft, node),
        "Gelu" => elementwise::gelu(draft, node),
        "LayerNormalization" => norm::layer_normalization(draft, node),
        "QuickGelu" => elementwise::swish(draft, node, 1.702),
        "QuantizeLinear" => quantized::quantize_linear(draft, node),
        "SimplifiedLayerNormalization" => norm::rms_normalization(draft, node),
        "SkipLayerNormalization" => skip_normalization(draft, node, true),
        "SkipSimplifiedLayerNormalization" => skip_normalization(draft, node, false),
        _ => Err(super::unknown()),
    }
}

fn biased_gelu(draft: &mut Draft, node: &OnnxNode, approximate: &str) -> Results {
    let mut x = float_input(draft, node, 0)?;
    if let Some(bias) = node.optional(1) {
        x = draft.add(x, bias)?;
    }
    Ok(vec![gelu_of(draft, x, approximate)?])
}

/// `alpha · a b`, each transposed in its last two axes if asked for.
fn fused_matmul(draft: &mut Draft, node: &OnnxNode) -> Results {
    let mut operands = [float_input(draft, node, 0)?, float_input(draft, node, 1)?];
    for (operand, (flag, batch)) in
        operands.iter_mut().zip([("transA", "transBatchA"), ("transB", "transBatchB")])
    {
        if node.attributes.flag(batch, false)? {
            return Err(Obstacle::unsupported(format!("attribute {batch}")));
        }
        let rank = draft.rank(*operand);
        if node.attributes.flag(flag, false)? && rank > 1 {
            *operand = draft.move_axis(*operand, rank - 1, rank - 2)?;
        }
    }
    let alpha = node.attributes.float("alpha", 1.0)?;
    let result = numpy_product(draft, operands[0], operands[1], product)?;
    Ok(vec![draft.binary_scalar(BinaryOp::Mul, result, alpha)?])
}

/// An activation by name. `parameters` are those that were given, by position.
fn activation(draft: &mut Draft, x: ValueId, name: &str, parameters: &[Option<f64>]) -> Value {
    let parameter =
        |at: usize, default: f64| parameters.get(at).copied().flatten().unwrap_or(default);
    match name {
        "" => Ok(x),
        "Relu" => draft.unary(UnaryOp::Relu, x),
        "Sigmoid" => draft.unary(UnaryOp::Sigmoid, x),
        "Tanh" => draft.unary(UnaryOp::Tanh, x),
        "LeakyRelu" => elementwise::leaky_relu_of(draft, x, parameter(0, 0.01)),
        "HardSigmoid" => elementwise::hard_gate(draft, x, parameter(0, 0.2), parameter(1, 0.5)),
        "Clip" => {
            let above = draft.binary_scalar(BinaryOp::Max, x, parameter(0, f64::from(f32::MIN)))?;
            draft.binary_scalar(BinaryOp::Min, above, parameter(1, f64::from(f32::MAX)))
        }
        other => Err(Obstacle::unsupported(format!("activation {other}"))),
    }
}

fn fused_gemm(draft: &mut Draft, node: &OnnxNode) -> Results {
    let parameters = [
        node.attributes.optional_float("activation_alpha")?,
        node.attributes.optional_float("activation_beta")?,
        node.attributes.optional_float("activation_gamma")?,
    ];
    let name = node.attributes.string("activation", "")?;
    let results = linear::gemm(draft, node)?;
    Ok(vec![activation(draft, results[0], &name, &parameters)?])
}

/// A convolution, plus operand 3, through an activation.
fn fused_conv(draft: &mut Draft, node: &mut OnnxNode) -> Results {
    let name = node.attributes.string("activation", "")?;
    let parameters: Vec<Option<f64>> = node
        .attributes
        .floats("activation_params")?
        .unwrap_or_default()
        .iter()
        .map(|&value| Some(f64::from(value)))
        .collect();
    let mut operands = vec![node.input(0)?, node.input(1)?];
    operands.extend(node.optional(2));
    let added = node.optional(3);
    let mut result = qlinear::convolution(draft, node, &operands)?;
    if let Some(added) = added {
        result = draft.add(result, added)?;
    }
    Ok(vec![activation(draft, result, &name, &parameters)?])
}

/// The normalization of a sum of operands 0 and 1, and of a bias if there is one: over the last axis.
fn skip_normalization(draft: &mut Draft, node: &OnnxNode, centered: bool) -> Results {
    let (input, skip) = (float_input(draft, node, 0)?, float_input(draft, node, 1)?);
    let epsilon = node.attributes.float("epsilon", 1e-12)?;
    let mut sum = draft.add(input, skip)?;
    let (beta, bias) =
        if centered { (node.optional(3), node.optional(4)) } else { (None, node.optional(3)) };
    if let Some(bias) = bias {
        sum = draft.add(sum, bias)?;
    }
    let last = draft
        .rank(sum)
        .checked_sub(1)
        .ok_or_else(|| Obstacle::invalid(format!("{} has no axis", draft.ty(sum))))?;
    let how = LastAxes { axes: vec![last], epsilon, stash: DType::F32, centered };
    let result = how.apply(draft, sum, node.input(2)?, beta)?;
    // What was not subtracted is no mean, but its place is kept.
    let mean = result.mean.unwrap_or(result.inverse);
    if !centered && node.wants(1) {
        return Err(Obstacle::unsupported("the mean as a result"));
    }
    Ok(vec![result.y, mean, result.inverse, sum])
}
