//! Quantization to 8-bit integers, and products of such integers. Rounding passes gradients straight through within the
//! range of the integers; products are exact.

use super::Results;
use super::linear::{numpy_product, product};
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::node::{OnnxNode, axis_of};
use crate::tensor;
use qcompile_ir::{BinaryOp, CompareOp, DType, Dim, Op, ReduceOp, UnaryOp};

type Value = Result<ValueId, Obstacle>;

/// Products of two numbers below 256 that f32 adds exactly.
const EXACT_TERMS: usize = 256;
/// Most parts that a convolution is taken apart into.
const MOST_PARTS: usize = 1024;

/// The number of the element type that an attribute names; none for 0, its default.
fn type_number(node: &OnnxNode, name: &str) -> Result<Option<i32>, Obstacle> {
    let number = node.attributes.int(name, 0)?;
    if number == 0 {
        return Ok(None);
    }
    let number = i32::try_from(number)
        .map_err(|_| Obstacle::invalid(format!("attribute {name} is {number}")))?;
    Ok(Some(number))
}

/// The element type that an attribute names; none for 0, its default.
fn type_attribute(node: &OnnxNode, name: &str) -> Result<Option<DType>, Obstacle> {
    type_number(node, name)?.map(tensor::dtype).transpose()
}

/// Integers that values are rounded to: their element type in the graph, the smallest and the largest.
#[derive(Clone, Copy)]
struct Integers {
    dtype: DType,
    low: f64,
    high: f64,
}

impl Integers {
    const U8: Integers = Integers { dtype: DType::U8, low: 0.0, high: 255.0 };

    /// Those of the element type of a zero point.
    fn of(dtype: DType) -> Result<Integers, Obstacle> {
        match dtype {
            DType::I8 => Ok(Integers { dtype, low: -128.0, high: 127.0 }),
            DType::U8 => Ok(Integers::U8),
            other => Err(Obstacle::unsupported(format!("quantization to {other}"))),
        }
    }

    /// Those of an ONNX element type, which may be of 16 bits.
    fn numbered(number: i32) -> Result<Integers, Obstacle> {
        let dtype = tensor::dtype(number)?;
        match tensor::range(number) {
            Some((low, count)) if count <= 1 << 16 => {
                #[allow(clippy::cast_precision_loss, reason = "numbers of 16 bits")]
                let (low, count) = (low as f64, count as f64);
                Ok(Integers { dtype, low, high: low + count - 1.0 })
            }
            _ => Integers::of(dtype),
        }
    }
}

/// A scale or zero point as `x` needs it: one for all, one for each index of an axis, or one for each block along it.
fn aligned(draft: &mut Draft, node: &OnnxNode, parameter: ValueId) -> Value {
    let x = node.input(0)?;
    let block = node.attributes.int("block_size", 0)?;
    let axis = node.attributes.int("axis", 1)?;
    let dims = draft.dims(parameter).to_vec();
    let whole = draft.dims(x).to_vec();
    let misfit = |draft: &Draft| {
        Obstacle::invalid(format!("{} scales {}", draft.ty(parameter), draft.ty(x)))
    };
    if dims.is_empty() || dims == [Dim::ONE] && block == 0 {
        return draft.reshape(parameter, &[]);
    }
    let axis = axis_of(axis, whole.len())?;
    if block == 0 {
        if dims != [whole[axis]] {
            return Err(misfit(draft));
        }
        let mut column = vec![Dim::ONE; whole.len()];
        column[axis] = whole[axis];
        return draft.reshape(parameter, &column);
    }
    let length = whole[axis].as_fixed().ok_or_else(|| {
        Obstacle::batch(format!("blocks along axis {axis}, which depends on the batch size"))
    })?;
    let block = usize::try_from(block)
        .map_err(|_| Obstacle::invalid(format!("attribute block_size is {block}")))?
        .min(length.max(1));
    let mut expected = whole.clone();
    expected[axis] = Dim::fixed(length.div_ceil(block));
    if dims != expected {
        return Err(misfit(draft));
    }
    let mut apart = dims;
    apart.insert(axis + 1, Dim::ONE);
    let one = draft.reshape(parameter, &apart)?;
    apart[axis + 1] = Dim::fixed(block);
    let many = draft.broadcast(one, &apart)?;
    apart.remove(axis + 1);
    apart[axis] = Dim::fixed(length.div_ceil(block).saturating_mul(block));
    let joined = draft.reshape(many, &apart)?;
    draft.slice(joined, axis, 0, length)
}

/// `ratio + zero`, rounded and held within the range of integers. What rounds into the range has the gradient of the
/// ratio.
fn rounded(draft: &mut Draft, ratio: ValueId, zero: Option<ValueId>, to: Integers) -> Value {
    let (mut low, mut high) = (draft.scalar(DType::F32, to.low), draft.scalar(DType::F32, to.high));
    if let Some(zero) = zero {
        low = draft.sub(low, zero)?;
        high = draft.sub(high, zero)?;
    }
    // Zero points are integers, so rounding and shifting may change places.
    let whole = draft.unary(UnaryOp::Round, ratio)?;
    let whole = held(draft, whole, low, high)?;
    low = draft.binary_scalar(BinaryOp::Sub, low, 0.5)?;
    high = draft.binary_scalar(BinaryOp::Add, high, 0.5)?;
    let held = held(draft, ratio, low, high)?;
    let error = draft.sub(whole, held)?;
    let error = draft.unary(UnaryOp::StopGradient, error)?;
    let mut through = draft.add(held, error)?;
    if let Some(zero) = zero {
        through = draft.add(through, zero)?;
    }
    let integer = draft.cast(through, to.dtype)?;
    draft.set_exact_float(integer, through);
    Ok(integer)
}

fn held(draft: &mut Draft, x: ValueId, low: ValueId, high: ValueId) -> Value {
    let above = draft.binary(BinaryOp::Max, x, low)?;
    draft.binary(BinaryOp::Min, above, high)
}

/// A scale in f32. Scales are no weights, whoever holds them.
fn scale_input(draft: &mut Draft, node: &OnnxNode, at: usize) -> Value {
    let scale = draft.frozen(node.input(at)?)?;
    draft.cast(scale, DType::F32)
}

pub(super) fn quantize_linear(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.input(0)?;
    // Only conversions to float8 do not saturate.
    node.attributes.flag("saturate", true)?;
    let scale = draft.frozen(node.input(1)?)?;
    let scale = aligned(draft, node, scale)?;
    let precision = type_attribute(node, "precision")?.unwrap_or(draft.dtype(scale));
    let declared = type_number(node, "output_dtype")?;
    let zero = node.optional(2);
    let to = match (declared, zero) {
        (Some(number), _) => Integers::numbered(number)?,
        (None, Some(zero)) => Integers::of(draft.dtype(zero))?,
        (None, None) => Integers::U8,
    };
    let zero = match zero {
        None => None,
        Some(zero) if draft.dtype(zero) == to.dtype => {
            let zero = draft.cast(zero, DType::F32)?;
            Some(aligned(draft, node, zero)?)
        }
        Some(zero) => {
            let text =
                format!("output_dtype is {}, but the zero point {}", to.dtype, draft.ty(zero));
            return Err(Obstacle::invalid(text));
        }
    };
    let (x, scale) = (draft.cast(x, precision)?, draft.cast(scale, precision)?);
    let ratio = draft.binary(BinaryOp::Div, x, scale)?;
    let ratio = draft.cast(ratio, DType::F32)?;
    Ok(vec![rounded(draft, ratio, zero, to)?])
}

pub(super) fn dequantize_linear(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.input(0)?;
    let declared = type_attribute(node, "output_dtype")?;
    let to = declared.unwrap_or(draft.dtype(node.input(1)?));
    let mut whole = match draft.exact_float(x) {
        Some(float) => float,
        None => draft.cast(x, DType::F32)?,
    };
    if let Some(zero) = node.optional(2) {
        if draft.dtype(zero) != draft.dtype(x) {
            return Err(Obstacle::invalid(format!(
                "the zero point is {} for {}",
                draft.ty(zero),
                draft.ty(x)
            )));
        }
        let zero = draft.cast(zero, DType::F32)?;
        let zero = aligned(draft, node, zero)?;
        whole = draft.sub(whole, zero)?;
    }
    let scale = scale_input(draft, node, 1)?;
    let scale = aligned(draft, node, scale)?;
    let y = draft.mul(whole, scale)?;
    Ok(vec![draft.cast(y, to)?])
}

/// To unsigned integers, by a scale and a zero point from the extremes, among which 0 is counted.
pub(super) fn dynamic_quantize_linear(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = super::elementwise::float_input(draft, node, 0)?;
    let axes: Vec<usize> = (0..draft.rank(x)).collect();
    let negated = draft.unary(UnaryOp::Neg, x)?;
    let mut extremes = [x, negated];
    for extreme in &mut extremes {
        let fixed = draft.unary(UnaryOp::StopGradient, *extreme)?;
        let max = draft.reduce(ReduceOp::Max, fixed, &axes)?;
        let max = draft.reshape(max, &[])?;
        *extreme = draft.binary_scalar(BinaryOp::Max, max, 0.0)?;
    }
    let [above, below] = extremes;
    let span = draft.add(above, below)?;
    let scale = draft.binary_scalar(BinaryOp::Div, span, 255.0)?;
    // Of zeros alone, any scale will do.
    let (zero, one) = (draft.scalar(DType::F32, 0.0), draft.scalar(DType::F32, 1.0));
    let null = draft.compare(CompareOp::Equal, scale, zero)?;
    let scale = draft.select(null, one, scale)?;
    let point = draft.binary(BinaryOp::Div, below, scale)?;
    let point = rounded(draft, point, None, Integers::U8)?;
    let shift = draft.cast(point, DType::F32)?;
    let ratio = draft.binary(BinaryOp::Div, x, scale)?;
    let y = rounded(draft, ratio, Some(shift), Integers::U8)?;
    Ok(vec![y, scale, point])
}

/// Operand `at` less its zero point, in f32.
fn less_zero(draft: &mut Draft, x: ValueId, zero: Option<ValueId>) -> Value {
    if !matches!(draft.dtype(x), DType::I8 | DType::U8) {
        return Err(Obstacle::invalid(format!("{} is not of 8-bit integers", draft.ty(x))));
    }
    let whole = draft.cast(x, DType::F32)?;
    let Some(zero) = zero else {
        return Ok(whole);
    };
    let zero = draft.cast(zero, DType::F32)?;
    let dims = draft.dims(whole).to_vec();
    let difference = draft.sub(whole, zero)?;
    if draft.dims(difference) != dims {
        let text = format!("the zero point {} for {}", draft.ty(zero), draft.ty(whole));
        return Err(Obstacle::invalid(text));
    }
    Ok(difference)
}

/// One number for each row of a matrix, as a column.
fn of_rows(draft: &mut Draft, parameter: ValueId) -> Value {
    match *draft.dims(parameter) {
        [rows] if rows != Dim::ONE => draft.reshape(parameter, &[rows, Dim::ONE]),
        _ => Ok(parameter),
    }
}

/// The product of matrices of integers of less than 9 bits, held in f32; i32. Parts that f32 adds exactly are added as
/// integers.
fn integer_product(draft: &mut Draft, a: ValueId, b: ValueId) -> Value {
    let (rank_a, rank_b) = (draft.rank(a), draft.rank(b));
    let inner = draft.dims(a)[rank_a - 1];
    let Some(length) = inner.as_fixed() else {
        return Err(Obstacle::batch("a sum of integers that depends on the batch size"));
    };
    if length <= EXACT_TERMS || inner != draft.dims(b)[rank_b - 2] {
        let product = product(draft, a, b)?;
        return draft.cast(product, DType::I32);
    }
    let rank = rank_a.max(rank_b);
    let parts = length.div_ceil(EXACT_TERMS);
    let high = parts.saturating_mul(EXACT_TERMS) - length;
    // [..., m, k] -> [parts, ..., m, terms] and [..., k, n] -> [parts, ..., terms, n]
    let mut split = |x: ValueId, axis_from_end: usize| {
        let axis = draft.rank(x) - axis_from_end;
        let pad = Op::Pad { axis, low: 0, high, interior: 0, value: 0.0 };
        let padded = if high > 0 { draft.emit(pad, &[x])? } else { x };
        let mut dims = vec![Dim::ONE; rank - draft.rank(x)];
        let axis = axis + dims.len();
        dims.extend(draft.dims(padded));
        dims[axis] = Dim::fixed(EXACT_TERMS);
        dims.insert(axis, Dim::fixed(parts));
        let apart = draft.reshape(padded, &dims)?;
        draft.move_axis(apart, axis, 0)
    };
    let (a, b) = (split(a, 1)?, split(b, 2)?);
    let products = product(draft, a, b)?;
    let products = draft.cast(products, DType::I32)?;
    let sum = draft.reduce(ReduceOp::Sum, products, &[0])?;
    draft.squeeze(sum, &[0])
}

pub(super) fn matmul_integer(draft: &mut Draft, node: &OnnxNode) -> Results {
    let zero = match node.optional(2) {
        Some(zero) => Some(of_rows(draft, zero)?),
        None => None,
    };
    let a = less_zero(draft, node.input(0)?, zero)?;
    let b = less_zero(draft, node.input(1)?, node.optional(3))?;
    Ok(vec![numpy_product(draft, a, b, integer_product)?])
}

/// `sum · scale`, rounded to the type of a zero point.
fn requantized(draft: &mut Draft, sum: ValueId, scale: ValueId, zero: ValueId) -> Value {
    let to = Integers::of(draft.dtype(zero))?;
    let sum = draft.cast(sum, DType::F32)?;
    let dims = draft.dims(sum).to_vec();
    let zero = draft.cast(zero, DType::F32)?;
    let scaled = draft.mul(sum, scale)?;
    let y = rounded(draft, scaled, Some(zero), to)?;
    if draft.dims(y) != dims {
        return Err(Obstacle::invalid("scales or zero points do not fit the result"));
    }
    Ok(y)
}

pub(super) fn qlinear_matmul(draft: &mut Draft, node: &OnnxNode) -> Results {
    let a_zero = of_rows(draft, node.input(2)?)?;
    let a = less_zero(draft, node.input(0)?, Some(a_zero))?;
    let b = less_zero(draft, node.input(3)?, Some(node.input(5)?))?;
    let sum = numpy_product(draft, a, b, integer_product)?;
    let (a_scale, y_scale) = (scale_input(draft, node, 1)?, scale_input(draft, node, 6)?);
    let (a_scale, y_scale) = (of_rows(draft, a_scale)?, of_rows(draft, y_scale)?);
    let b_scale = scale_input(draft, node, 4)?;
    let scale = draft.mul(a_scale, b_scale)?;
    let mut scale = draft.binary(BinaryOp::Div, scale, y_scale)?;
    if draft.ty(scale).shape.elements() == Some(Dim::ONE) {
        scale = draft.reshape(scale, &[])?;
    }
    let y_zero = of_rows(draft, node.input(7)?)?;
    let y_zero = if draft.ty(y_zero).shape.elements() == Some(Dim::ONE) {
        draft.reshape(y_zero, &[])?
    } else {
        y_zero
    };
    Ok(vec![requantized(draft, sum, scale, y_zero)?])
}

/// The convolution that the node's attributes say, of other operands.
pub(super) fn convolution(draft: &mut Draft, node: &mut OnnxNode, operands: &[ValueId]) -> Value {
    let operands = operands.iter().map(|&operand| Some(operand)).collect();
    let inputs = std::mem::replace(&mut node.inputs, operands);
    let op = std::mem::replace(&mut node.op, "Conv");
    let results = super::conv::conv(draft, node);
    (node.inputs, node.op) = (inputs, op);
    Ok(results?[0])
}

/// The convolution of integers of less than 9 bits, held in f32; i32. Parts that f32 adds exactly are added as
/// integers.
fn integer_convolution(
    draft: &mut Draft,
    node: &mut OnnxNode,
    x: ValueId,
    weight: ValueId,
) -> Value {
    let given = node.attributes.int("group", 1)?;
    let sizes = draft.ty(weight).shape.as_fixed().unwrap_or_default();
    let (groups, channels) = (usize::try_from(given).unwrap_or(0), sizes.get(1).copied());
    let channels = channels.unwrap_or(0);
    let places = sizes.iter().skip(2).try_fold(1_usize, |count, &size| count.checked_mul(size));
    let step = EXACT_TERMS / places.unwrap_or(usize::MAX).max(1);
    let fits =
        draft.rank(x) > 2 && groups.checked_mul(channels).map(Dim::fixed) == Some(draft.dims(x)[1]);
    if step >= channels || !fits {
        let result = convolution(draft, node, &[x, weight])?;
        return draft.cast(result, DType::I32);
    }
    if step == 0 || channels.div_ceil(step) > MOST_PARTS {
        return Err(Obstacle::unsupported(format!(
            "a convolution of integers with the weight {}",
            draft.ty(weight)
        )));
    }
    let dims = draft.dims(x).to_vec();
    let mut grouped = dims.clone();
    grouped.splice(1..2, [Dim::fixed(groups), Dim::fixed(channels)]);
    let grouped = draft.reshape(x, &grouped)?;
    let mut sum = None;
    for start in (0..channels).step_by(step) {
        let end = channels.min(start + step);
        let part = draft.slice(grouped, 2, start, end)?;
        let mut joined = dims.clone();
        joined[1] = Dim::fixed(groups * (end - start));
        let part = draft.reshape(part, &joined)?;
        let weight = draft.slice(weight, 1, start, end)?;
        let part = convolution(draft, node, &[part, weight])?;
        let part = draft.cast(part, DType::I32)?;
        sum = Some(match sum {
            None => part,
            Some(sum) => draft.add(sum, part)?,
        });
    }
    sum.ok_or_else(|| Obstacle::invalid("a weight without channels"))
}

/// One number for each output channel, along an axis of a value of a rank.
fn of_channels(draft: &mut Draft, parameter: ValueId, axis: usize, rank: usize) -> Value {
    let [count] = *draft.dims(parameter) else {
        return Ok(parameter);
    };
    let mut dims = vec![Dim::ONE; rank];
    if let Some(dim) = dims.get_mut(axis) {
        *dim = count;
    }
    draft.reshape(parameter, &dims)
}

pub(super) fn conv_integer(draft: &mut Draft, node: &mut OnnxNode) -> Results {
    let (x, weight) = (node.input(0)?, node.input(1)?);
    let zero = match node.optional(3) {
        Some(zero) => Some(of_channels(draft, zero, 0, draft.rank(weight))?),
        None => None,
    };
    let x = less_zero(draft, x, node.optional(2))?;
    let weight = less_zero(draft, weight, zero)?;
    Ok(vec![integer_convolution(draft, node, x, weight)?])
}

pub(super) fn qlinear_conv(draft: &mut Draft, node: &mut OnnxNode) -> Results {
    let (x, weight) = (node.input(0)?, node.input(3)?);
    let rank = draft.rank(weight);
    let zero = of_channels(draft, node.input(5)?, 0, rank)?;
    let x = less_zero(draft, x, Some(node.input(2)?))?;
    let weight = less_zero(draft, weight, Some(zero))?;
    let scales = [1, 4, 6].map(|at| scale_input(draft, node, at));
    let [x_scale, weight_scale, y_scale] = scales;
    let weight_scale = of_channels(draft, weight_scale?, 1, rank)?;
    let y_zero = draft.reshape(node.input(7)?, &[])?;
    let bias = node.optional(8);
    let mut sum = integer_convolution(draft, node, x, weight)?;
    if let Some(bias) = bias {
        let bias = of_channels(draft, bias, 1, rank)?;
        sum = draft.add(sum, bias)?;
    }
    let scale = draft.mul(x_scale?, weight_scale)?;
    let scale = draft.binary(BinaryOp::Div, scale, y_scale?)?;
    let scale = if draft.ty(scale).shape.elements() == Some(Dim::ONE) {
        draft.reshape(scale, &[])?
    } else {
        scale
    };
    Ok(vec![requantized(draft, sum, scale, y_zero)?])
}
