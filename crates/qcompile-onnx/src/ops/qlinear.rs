//! Operators whose operands and results are quantized, as the float operator between `dequantize` and `quantize`: `QLinearConv`,
//! `QLinearMatMul`, and those of `com.microsoft`.

use super::Results;
use super::linear::{numpy_product, product};
use super::quantized::{Parameters, check_scale, dequantized, quantized};
use super::{conv, elementwise, linear, norm, pool, shape};
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::node::OnnxNode;
use qcompile_ir::{BinaryOp, DType, Dim, Op, Tensor, UnaryOp};
use std::sync::Arc;

type Value = Result<ValueId, Obstacle>;

/// Operand `at` of a node as floats: its scale and zero point are the next two operands. A scale of several is along `axis`.
fn operand(draft: &mut Draft, node: &OnnxNode, at: usize, axis: i64) -> Value {
    let codes = node.input(at)?;
    value(draft, codes, (node.input(at + 1)?, node.optional(at + 2)), axis)
}

fn value(
    draft: &mut Draft,
    codes: ValueId,
    (scale, zero_point): (ValueId, Option<ValueId>),
    axis: i64,
) -> Value {
    let (dtype, dims) = (draft.dtype(codes), draft.dims(codes).to_vec());
    check_codes(draft, codes)?;
    let parameters = Parameters::new(draft, (dtype, &dims), scale, zero_point, axis)?;
    dequantized(draft, codes, parameters)
}

fn check_codes(draft: &Draft, codes: ValueId) -> Result<(), Obstacle> {
    if matches!(draft.dtype(codes), DType::I8 | DType::U8) {
        return Ok(());
    }
    Err(Obstacle::invalid(format!("{} is not of 8-bit integers", draft.ty(codes))))
}

/// A result as codes; operand `at` of the node is its scale, the next its zero point. Without one, the codes are of `dtype`.
fn result(
    draft: &mut Draft,
    node: &OnnxNode,
    y: ValueId,
    (at, axis): (usize, i64),
    dtype: DType,
) -> Results {
    let (scale, zero_point) = (node.input(at)?, node.optional(at + 1));
    let dtype = zero_point.map_or(dtype, |zero_point| draft.dtype(zero_point));
    let dims = draft.dims(y).to_vec();
    let parameters = Parameters::new(draft, (dtype, &dims), scale, zero_point, axis)?;
    Ok(vec![quantized(draft, y, dtype, parameters)?])
}

/// What `convert` makes of other operands under the node's attributes.
fn delegated(
    draft: &mut Draft,
    node: &mut OnnxNode,
    op: &'static str,
    operands: &[ValueId],
    convert: impl FnOnce(&mut Draft, &OnnxNode) -> Results,
) -> Value {
    let operands = operands.iter().map(|&operand| Some(operand)).collect();
    let inputs = std::mem::replace(&mut node.inputs, operands);
    let op = std::mem::replace(&mut node.op, op);
    let results = convert(draft, node);
    (node.inputs, node.op) = (inputs, op);
    Ok(results?[0])
}

/// The convolution that the node's attributes say, of other operands.
pub(super) fn convolution(draft: &mut Draft, node: &mut OnnxNode, operands: &[ValueId]) -> Value {
    delegated(draft, node, "Conv", operands, conv::conv)
}

/// A bias in integers of 32 bits, whose scale is the product of two others.
fn bias(draft: &mut Draft, codes: ValueId, [a, b]: [ValueId; 2]) -> Value {
    let [a, b] = [draft.frozen(a)?, draft.frozen(b)?];
    let known = draft.fixed_tensor(a).zip(draft.fixed_tensor(b));
    let scale = match known {
        Some((a, b)) if a.elements() == 1 || b.elements() == 1 => {
            let longer = if a.elements() == 1 { &b } else { &a };
            #[allow(clippy::cast_possible_truncation, reason = "scales are f32")]
            let product: Vec<f32> = (0..longer.elements())
                .map(|at| {
                    let of = |tensor: &Tensor| tensor.get_f64(at.min(tensor.elements() - 1)) as f32;
                    of(&a) * of(&b)
                })
                .collect();
            let tensor = Tensor::from_f32(longer.shape(), &product);
            let tensor = tensor.ok_or_else(|| Obstacle::invalid("a scale of another length"))?;
            draft.emit(Op::Const(Arc::new(tensor)), &[])?
        }
        _ => draft.mul(a, b)?,
    };
    let (dtype, dims) = (draft.dtype(codes), draft.dims(codes).to_vec());
    if dtype != DType::I32 {
        return Err(Obstacle::invalid(format!("the bias is {}, not int32", draft.ty(codes))));
    }
    let axis = i64::try_from(dims.len()).unwrap_or(1) - 1;
    let parameters = Parameters::new(draft, (dtype, &dims), scale, None, axis)?;
    dequantized(draft, codes, parameters)
}

pub(super) fn qlinear_conv(draft: &mut Draft, node: &mut OnnxNode) -> Results {
    let channels_last = node.attributes.flag("channels_last", false)?;
    if channels_last {
        return Err(Obstacle::unsupported("attribute channels_last"));
    }
    let mut operands = vec![operand(draft, node, 0, 1)?, operand(draft, node, 3, 0)?];
    if let Some(codes) = node.optional(8) {
        operands.push(bias(draft, codes, [node.input(1)?, node.input(4)?])?);
    }
    let y = convolution(draft, node, &operands)?;
    let dtype = draft.dtype(node.input(0)?);
    result(draft, node, y, (6, 1), dtype)
}

/// Operand `at` of a product of matrices: by rows or columns, or by stacks of them.
fn factor(draft: &mut Draft, node: &OnnxNode, at: usize, axis: i64) -> Value {
    let scale = node.input(at + 1)?;
    if draft.rank(scale) <= 1 {
        return operand(draft, node, at, axis);
    }
    let (codes, zero_point) = (node.input(at)?, node.optional(at + 2));
    let dims = draft.dims(codes).to_vec();
    check_codes(draft, codes)?;
    check_scale(draft, scale)?;
    let mut x = draft.cast(codes, DType::F32)?;
    if let Some(zero_point) = zero_point {
        if draft.dtype(zero_point) != draft.dtype(codes) {
            return Err(Obstacle::invalid(format!(
                "the zero point is {}, the codes are {}",
                draft.ty(zero_point),
                draft.dtype(codes)
            )));
        }
        let zero_point = draft.cast(zero_point, DType::F32)?;
        x = draft.sub(x, zero_point)?;
    }
    let scale = draft.frozen(scale)?;
    let scale = draft.cast(scale, DType::F32)?;
    let y = draft.mul(x, scale)?;
    if draft.dims(y) != dims {
        return Err(Obstacle::invalid(format!(
            "the scale {} for {}",
            draft.ty(scale),
            draft.ty(codes)
        )));
    }
    Ok(y)
}

pub(super) fn qlinear_matmul(draft: &mut Draft, node: &OnnxNode) -> Results {
    let a = factor(draft, node, 0, -2)?;
    let b = factor(draft, node, 3, -1)?;
    let y = numpy_product(draft, a, b, product)?;
    let dtype = draft.dtype(node.input(0)?);
    let scale = node.input(6)?;
    if draft.rank(scale) <= 1 {
        return result(draft, node, y, (6, -2), dtype);
    }
    // One for each row of each matrix.
    let rows = draft.dims(scale).to_vec();
    let whole = draft.dims(y).to_vec();
    let [outer @ .., columns] = &whole[..] else {
        return Err(Obstacle::invalid("the result is a scalar"));
    };
    if rows[..rows.len() - 1] != *outer || rows.last() != Some(&Dim::ONE) {
        return Err(Obstacle::invalid(format!(
            "the scale {} for {}",
            draft.ty(scale),
            draft.ty(y)
        )));
    }
    let count = draft.ty(scale).shape.elements();
    let count = count.ok_or_else(|| Obstacle::batch("rows that depend on the batch size twice"))?;
    let flat = draft.reshape(y, &[count, *columns])?;
    let scale = draft.reshape(scale, &[count])?;
    let zero_point = match node.optional(7) {
        None => None,
        Some(zero_point) => Some(draft.reshape(zero_point, &[count])?),
    };
    let dtype = zero_point.map_or(dtype, |zero_point| draft.dtype(zero_point));
    let parameters = Parameters::new(draft, (dtype, &[count, *columns]), scale, zero_point, 0)?;
    let codes = quantized(draft, flat, dtype, parameters)?;
    Ok(vec![draft.reshape(codes, &whole)?])
}

/// The operators of `com.microsoft`; none for a name that is not one of them.
pub(super) fn microsoft(draft: &mut Draft, node: &mut OnnxNode) -> Option<Results> {
    Some(match node.op {
        "DynamicQuantizeMatMul" => dynamic_matmul(draft, node),
        "MatMulIntegerToFloat" => matmul_to_float(draft, node),
        "QGemm" => gemm(draft, node),
        "QLinearAdd" => binary(draft, node, BinaryOp::Add),
        "QLinearAveragePool" => pooled(draft, node, "AveragePool", pool::average_pool),
        "QLinearConcat" => concat(draft, node),
        "QLinearConv" => qlinear_conv(draft, node),
        "QLinearGlobalAveragePool" => {
            pooled(draft, node, "GlobalAveragePool", pool::global_average_pool)
        }
        "QLinearLeakyRelu" => unary(draft, node, "LeakyRelu", elementwise::leaky_relu),
        "QLinearMul" => binary(draft, node, BinaryOp::Mul),
        "QLinearSigmoid" => unary(draft, node, "Sigmoid", |draft, node| {
            elementwise::unary(draft, node, UnaryOp::Sigmoid)
        }),
        "QLinearSoftmax" => softmax(draft, node),
        _ => return None,
    })
}

fn unary(
    draft: &mut Draft,
    node: &mut OnnxNode,
    op: &'static str,
    convert: impl FnOnce(&mut Draft, &OnnxNode) -> Results,
) -> Results {
    let x = operand(draft, node, 0, 1)?;
    let y = delegated(draft, node, op, &[x], convert)?;
    let dtype = draft.dtype(node.input(0)?);
    result(draft, node, y, (3, 1), dtype)
}

fn pooled(
    draft: &mut Draft,
    node: &mut OnnxNode,
    op: &'static str,
    convert: impl FnOnce(&mut Draft, &OnnxNode) -> Results,
) -> Results {
    if node.attributes.flag("channels_last", false)? {
        return Err(Obstacle::unsupported("attribute channels_last"));
    }
    unary(draft, node, op, convert)
}

fn softmax(draft: &mut Draft, node: &mut OnnxNode) -> Results {
    // Which version of Softmax it is; the older one flattened.
    if node.attributes.int("opset", 13)? < 13 {
        return Err(Obstacle::unsupported("QLinearSoftmax of an opset below 13"));
    }
    let opset = std::mem::replace(&mut node.opset, 13);
    let results =
        unary(draft, node, "Softmax", |draft, node| norm::softmax(draft, node, Op::Softmax));
    node.opset = opset;
    results
}

fn binary(draft: &mut Draft, node: &OnnxNode, op: BinaryOp) -> Results {
    let (a, b) = (operand(draft, node, 0, 1)?, operand(draft, node, 3, 1)?);
    let y = draft.binary(op, a, b)?;
    let dtype = draft.dtype(node.input(0)?);
    result(draft, node, y, (6, 1), dtype)
}

/// The scale and the zero point of the result come first, then each operand with its own.
fn concat(draft: &mut Draft, node: &mut OnnxNode) -> Results {
    let mut operands = Vec::new();
    for at in (2..node.inputs.len()).step_by(3) {
        operands.push(operand(draft, node, at, 1)?);
    }
    let dtype = draft.dtype(node.input(2)?);
    let y = delegated(draft, node, "Concat", &operands, shape::concat)?;
    result(draft, node, y, (0, 1), dtype)
}

/// Without a scale for it, the result is f32.
fn gemm(draft: &mut Draft, node: &mut OnnxNode) -> Results {
    let column = if node.attributes.flag("transB", false)? { 0 } else { 1 };
    let mut operands = vec![operand(draft, node, 0, 0)?, operand(draft, node, 3, column)?];
    if let Some(codes) = node.optional(6) {
        // Its scale is that of the product, alpha included.
        let bias = bias(draft, codes, [node.input(1)?, node.input(4)?])?;
        let alpha = node.attributes.float("alpha", 1.0)?;
        operands.push(if alpha == 1.0 {
            bias
        } else {
            draft.binary_scalar(BinaryOp::Mul, bias, alpha)?
        });
    }
    let y = delegated(draft, node, "Gemm", &operands, linear::gemm)?;
    if node.optional(7).is_none() {
        return Ok(vec![y]);
    }
    let dtype = draft.dtype(node.input(0)?);
    result(draft, node, y, (7, 1), dtype)
}

/// Codes `A` and `B`, their scales, their zero points, and a bias in f32.
fn matmul_to_float(draft: &mut Draft, node: &OnnxNode) -> Results {
    let a = value(draft, node.input(0)?, (node.input(2)?, node.optional(4)), -2)?;
    let b = value(draft, node.input(1)?, (node.input(3)?, node.optional(5)), -1)?;
    let mut y = numpy_product(draft, a, b, product)?;
    if let Some(bias) = node.optional(6) {
        y = draft.add(y, bias)?;
    }
    Ok(vec![y])
}

/// A float operand that is quantized by its extremes, and codes with their scale, zero point and bias.
fn dynamic_matmul(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = elementwise::float_input(draft, node, 0)?;
    let a = super::quantized::dynamically(draft, x)?;
    let b = value(draft, node.input(1)?, (node.input(2)?, node.optional(3)), -1)?;
    let mut y = numpy_product(draft, a, b, product)?;
    if let Some(bias) = node.optional(4) {
        y = draft.add(y, bias)?;
    }
    Ok(vec![y])
}
