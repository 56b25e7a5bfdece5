//! The type of a node from its op and the types of its operands: one function per family of ops.

mod attention;
mod indexing;
mod pooling;
mod recurrence;

use crate::{BinaryOp, ConvGeometry, DType, Dim, Op, QuantizedRange, Shape, TensorType, UnaryOp};
use thiserror::Error;

/// Why a node has no type.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{op}: {reason}")]
pub struct TypeError {
    /// The op's mnemonic.
    pub op: &'static str,
    /// What does not fit, with the types.
    pub reason: String,
}

type Types<'a> = &'a [&'a TensorType];

/// The type of `op` over operands of these types.
///
/// # Errors
/// [`TypeError`] says what does not fit.
pub fn infer(op: &Op, operands: Types) -> Result<TensorType, TypeError> {
    infer_type(op, operands)
        .and_then(|ty| bounded(&ty).map(|()| ty))
        .map_err(|reason| TypeError { op: op.name(), reason })
}

/// A type that can be laid out: at most one dimension depends on N and the bytes fit into an address, even if empty
/// dimensions had an element, so that strides fit, too.
fn bounded(ty: &TensorType) -> Result<(), String> {
    let fewest = |&dim: &Dim| Dim { scale: dim.scale.max(1), ..dim };
    let elements = Shape(ty.shape.0.iter().map(fewest).collect())
        .elements()
        .ok_or_else(|| format!("{ty} is too large or depends on the batch size twice"))?;
    elements
        .scale
        .checked_mul(ty.dtype.size())
        .filter(|&bytes| bytes <= isize::MAX as usize)
        .map(|_| ())
        .ok_or_else(|| format!("{ty} is too large"))
}

fn infer_type(op: &Op, operands: Types) -> Result<TensorType, String> {
    match op {
        Op::Input(ty) => exactly::<0>(operands).map(|[]| ty.clone()),
        Op::Param(tensor) => {
            exactly::<0>(operands)?;
            match tensor.dtype() {
                DType::F32 | DType::BF16 | DType::F16 => Ok(tensor.ty()),
                _ => Err(format!("a parameter is an f32, bf16 or f16 tensor, not {}", tensor.ty())),
            }
        }
        Op::State(tensor) | Op::Const(tensor) => exactly::<0>(operands).map(|[]| tensor.ty()),
        Op::Size(_) => exactly::<0>(operands).map(|[]| TensorType::f32(Shape::scalar())),
        Op::Training => {
            exactly::<0>(operands).map(|[]| TensorType::new(DType::Bool, Shape::scalar()))
        }
        Op::Iota(dim) => {
            exactly::<0>(operands).map(|[]| TensorType::new(DType::I64, Shape(vec![*dim])))
        }
        Op::Random { shape, .. } => {
            let [step] = exactly(operands)?;
            if step.dtype != DType::I64 || step.shape.rank() != 0 {
                return Err(format!("the step is i64[], not {step}"));
            }
            Ok(TensorType::f32(shape.clone()))
        }
        Op::Unary(unary) => elementwise_unary(*unary, operands),
        Op::Cast(dtype) => {
            let [x] = exactly(operands)?;
            Ok(TensorType::new(*dtype, x.shape.clone()))
        }
        Op::Binary(binary) => elementwise_binary(*binary, operands),
        Op::Compare(_) => {
            let [a, b] = exactly(operands)?;
            same(a, b)?;
            Ok(TensorType::new(DType::Bool, a.shape.clone()))
        }
        Op::Select => {
            let [condition, a, b] = exactly(operands)?;
            same(a, b)?;
            if condition.dtype != DType::Bool || condition.shape != a.shape {
                return Err(format!("the condition is {condition}, but the values are {a}"));
            }
            Ok(a.clone())
        }
        Op::Reduce { axes, .. } => reduce(axes, operands),
        Op::Matmul { transpose_a, transpose_b } => matmul(*transpose_a, *transpose_b, operands),
        Op::Conv2d(geometry) => conv2d(geometry, operands),
        Op::Conv2dGradInput(geometry) => conv2d_grad_input(geometry, operands),
        Op::Conv2dGradWeight(geometry) => conv2d_grad_weight(geometry, operands),
        Op::MaxPool2d(geometry) => pooling::maximum(geometry, operands),
        Op::AveragePool2d(geometry) => pooling::average(geometry, operands),
        Op::MaxPool2dGrad(geometry) => pooling::maximum_grad(geometry, operands),
        Op::AveragePool2dGrad(geometry) => pooling::average_grad(geometry, operands),
        Op::Reshape(shape) => {
            let [x] = exactly(operands)?;
            if x.shape.elements().is_none() || x.shape.elements() != shape.elements() {
                return Err(format!("{x} does not have the elements of {shape}"));
            }
            Ok(TensorType::new(x.dtype, shape.clone()))
        }
        Op::Transpose(permutation) => transpose(permutation, operands),
        Op::Broadcast(shape) => broadcast(shape, operands),
        Op::Slice { axis, start, end, step } => slice(*axis, *start, *end, *step, operands),
        Op::Pad { axis, low, high, interior, .. } => pad(*axis, *low, *high, *interior, operands),
        Op::Concat { axis } => concat(*axis, operands),
        Op::Gather => indexing::gather(operands),
        Op::Scatter { rows, .. } => indexing::scatter(*rows, operands),
        Op::TopK { k, .. } => indexing::top_k(*k, operands),
        Op::Attention { scale, products, .. } => attention::attention(*scale, *products, operands),
        Op::AttentionGrad { of, scale, products, rounding, .. } => {
            attention::gradient(*of, *scale, *products, *rounding, operands)
        }
        Op::Softmax | Op::LogSoftmax => {
            let [x] = exactly(operands)?;
            float(x)?;
            if x.shape.rank() == 0 { Err(format!("{x} has no axis")) } else { Ok(x.clone()) }
        }
        Op::CrossEntropy => {
            let [logits, label] = exactly(operands)?;
            cross_entropy(logits, label)
        }
        Op::CrossEntropyGrad => {
            let [logits, label, dloss] = exactly(operands)?;
            same(&cross_entropy(logits, label)?, dloss)?;
            Ok(logits.clone())
        }
        Op::Recurrence(data) => recurrence::recurrence(data, operands),
        Op::RecurrenceGrad { recurrence: data, cell, rounding } => {
            recurrence::recurrence_grad(data, *cell, *rounding, operands)
        }
        Op::Quantize { dtype, axis } => {
            let ([x, scale], zero_point) = and_zero_point(operands)?;
            float(x)?;
            quantized(*dtype, x, scale, zero_point, *axis)?;
            Ok(TensorType::new(*dtype, x.shape.clone()))
        }
        Op::Dequantize { axis } => {
            let ([q, scale], zero_point) = and_zero_point(operands)?;
            quantized(q.dtype, q, scale, zero_point, *axis)?;
            Ok(TensorType::f32(q.shape.clone()))
        }
        Op::StraightThrough { dtype, axis } => {
            let ([x, dy, scale], zero_point) = and_zero_point(operands)?;
            same(x, dy)?;
            float(x)?;
            quantized(*dtype, x, scale, zero_point, *axis)?;
            Ok(dy.clone())
        }
        Op::AllReduce(_) => {
            let [x] = exactly(operands)?;
            float(x)?;
            if x.shape.batch_axis().is_some() {
                return Err(format!("{x} depends on the batch size, which ranks may not share"));
            }
            Ok(x.clone())
        }
    }
}

fn exactly<'a, const K: usize>(operands: Types<'a>) -> Result<[&'a TensorType; K], String> {
    operands.try_into().map_err(|_| format!("takes {K} operands, not {}", operands.len()))
}

fn same(a: &TensorType, b: &TensorType) -> Result<(), String> {
    if a == b { Ok(()) } else { Err(format!("{a} and {b} differ")) }
}

fn float(x: &TensorType) -> Result<(), String> {
    if x.dtype.is_float() { Ok(()) } else { Err(format!("needs a float operand, not {x}")) }
}

/// So many operands, and perhaps a zero point.
fn and_zero_point<'a, const K: usize>(
    operands: Types<'a>,
) -> Result<([&'a TensorType; K], Option<&'a TensorType>), String> {
    let (first, zero_point) = operands.split_at(operands.len().min(K));
    match (first.try_into(), zero_point) {
        (Ok(first), []) => Ok((first, None)),
        (Ok(first), &[zero_point]) => Ok((first, Some(zero_point))),
        _ => Err(format!("takes {K} or {} operands, not {}", K + 1, operands.len())),
    }
}

/// Checks the parameters by which `x` is quantized to `dtype`, or was.
fn quantized(
    dtype: DType,
    x: &TensorType,
    scale: &TensorType,
    zero_point: Option<&TensorType>,
    axis: Option<usize>,
) -> Result<(), String> {
    if QuantizedRange::of(dtype, false).is_none() {
        return Err(format!("{dtype} is not a quantized type"));
    }
    scale_fits(x, scale, axis)?;
    let Some(zero_point) = zero_point else { return Ok(()) };
    if QuantizedRange::of(dtype, true).is_none() {
        return Err(format!("{dtype} has no zero point"));
    }
    if zero_point.dtype != dtype || zero_point.shape != scale.shape {
        return Err(format!("the zero point is {zero_point} for {dtype} with the scale {scale}"));
    }
    Ok(())
}

fn fixed(dim: Dim, what: &str) -> Result<usize, String> {
    dim.as_fixed().ok_or_else(|| format!("{what} must not depend on the batch size"))
}

fn axis_of(x: &TensorType, axis: usize) -> Result<Dim, String> {
    x.shape.0.get(axis).copied().ok_or_else(|| format!("{x} has no axis {axis}"))
}

fn with_axis(x: &TensorType, axis: usize, dim: usize) -> TensorType {
    let mut ty = x.clone();
    ty.shape.0[axis] = Dim::fixed(dim);
    ty
}

fn elementwise_unary(op: UnaryOp, operands: Types) -> Result<TensorType, String> {
    let [x] = exactly(operands)?;
    let fits = match op {
        UnaryOp::Not => x.dtype == DType::Bool,
        UnaryOp::Neg | UnaryOp::Abs | UnaryOp::Relu | UnaryOp::Sign => x.dtype != DType::Bool,
        UnaryOp::StopGradient => true,
        UnaryOp::Exp
        | UnaryOp::Log
        | UnaryOp::Sqrt
        | UnaryOp::Reciprocal
        | UnaryOp::Erf
        | UnaryOp::Sigmoid
        | UnaryOp::Tanh
        | UnaryOp::Sin
        | UnaryOp::Cos
        | UnaryOp::Atan
        | UnaryOp::Floor
        | UnaryOp::Ceil
        | UnaryOp::Round => x.dtype.is_float(),
    };
    if fits { Ok(x.clone()) } else { Err(format!("does not take {x}")) }
}

fn elementwise_binary(op: BinaryOp, operands: Types) -> Result<TensorType, String> {
    let [a, b] = exactly(operands)?;
    same(a, b)?;
    let fits = match op {
        BinaryOp::And | BinaryOp::Or => !a.dtype.is_float(),
        BinaryOp::Add
        | BinaryOp::Sub
        | BinaryOp::Mul
        | BinaryOp::Div
        | BinaryOp::Max
        | BinaryOp::Min
        | BinaryOp::Pow => a.dtype != DType::Bool,
    };
    if fits { Ok(a.clone()) } else { Err(format!("does not take {a}")) }
}

fn reduce(axes: &[usize], operands: Types) -> Result<TensorType, String> {
    let [x] = exactly(operands)?;
    if x.dtype == DType::Bool {
        return Err(format!("does not take {x}"));
    }
    if !axes.is_sorted_by(|a, b| a < b) {
        return Err("axes must ascend".to_owned());
    }
    let mut ty = x.clone();
    for &axis in axes {
        axis_of(x, axis)?;
        ty.shape.0[axis] = Dim::ONE;
    }
    Ok(ty)
}

fn matmul(transpose_a: bool, transpose_b: bool, operands: Types) -> Result<TensorType, String> {
    let [a, b] = exactly(operands)?;
    float(a)?;
    let rank = a.shape.rank();
    if a.dtype != b.dtype || rank < 2 || rank != b.shape.rank() {
        return Err(format!("{a} and {b} are not matrices of one type and rank"));
    }
    let (lead_a, lead_b) = (&a.shape.0[..rank - 2], &b.shape.0[..rank - 2]);
    let (mut m, mut k) = (a.shape.0[rank - 2], a.shape.0[rank - 1]);
    let (mut inner, mut n) = (b.shape.0[rank - 2], b.shape.0[rank - 1]);
    if transpose_a {
        std::mem::swap(&mut m, &mut k);
    }
    if transpose_b {
        std::mem::swap(&mut inner, &mut n);
    }
    if lead_a != lead_b || k != inner {
        return Err(format!("{a} and {b} do not fit"));
    }
    let mut shape = lead_a.to_vec();
    shape.extend([m, n]);
    Ok(TensorType::new(a.dtype, Shape(shape)))
}

/// `[n, h, w, c]` of an NHWC value whose height and width are those of the geometry.
fn nhwc(x: &TensorType, size: [usize; 2]) -> Result<(Dim, usize), String> {
    float(x)?;
    images(x, size)
}

/// Number of images and of channels.
fn images(x: &TensorType, size: [usize; 2]) -> Result<(Dim, usize), String> {
    let [n, h, w, c] = x.shape.0[..] else {
        return Err(format!("{x} is not [n, height, width, channels]"));
    };
    if [h, w] != size.map(Dim::fixed) {
        return Err(format!("{x} does not have height and width {size:?}"));
    }
    Ok((n, fixed(c, "the number of channels")?))
}

fn oihw(weight: &TensorType, geometry: &ConvGeometry) -> Result<(usize, usize), String> {
    float(weight)?;
    let sizes = weight.shape.as_fixed().unwrap_or_default();
    let [out, per_group, kernel_h, kernel_w] = sizes[..] else {
        return Err(format!("{weight} is not [out, in / groups, kernel height, kernel width]"));
    };
    if [kernel_h, kernel_w] != geometry.kernel {
        return Err(format!("{weight} does not have kernel {:?}", geometry.kernel));
    }
    if geometry.groups == 0 || out % geometry.groups != 0 {
        return Err(format!("{out} output channels are not {} groups", geometry.groups));
    }
    Ok((out, per_group))
}

fn conv_output(geometry: &ConvGeometry) -> Result<[usize; 2], String> {
    geometry.output().ok_or_else(|| format!("the kernel does not fit the input: {geometry:?}"))
}

fn conv2d(geometry: &ConvGeometry, operands: Types) -> Result<TensorType, String> {
    let [x, weight] = exactly(operands)?;
    let (n, channels) = nhwc(x, geometry.input)?;
    let (out, per_group) = oihw(weight, geometry)?;
    if per_group.checked_mul(geometry.groups) != Some(channels) || x.dtype != weight.dtype {
        return Err(format!("{x} and weight {weight} do not fit with {} groups", geometry.groups));
    }
    let [height, width] = conv_output(geometry)?;
    Ok(TensorType::new(x.dtype, Shape(vec![n, height.into(), width.into(), out.into()])))
}

fn conv2d_grad_input(geometry: &ConvGeometry, operands: Types) -> Result<TensorType, String> {
    let [dy, weight] = exactly(operands)?;
    let (n, out) = nhwc(dy, conv_output(geometry)?)?;
    let (weight_out, per_group) = oihw(weight, geometry)?;
    if out != weight_out {
        return Err(format!("{dy} and weight {weight} do not fit"));
    }
    let channels = per_group.checked_mul(geometry.groups).ok_or("too many channels")?;
    let [height, width] = geometry.input;
    Ok(TensorType::new(dy.dtype, Shape(vec![n, height.into(), width.into(), channels.into()])))
}

fn conv2d_grad_weight(geometry: &ConvGeometry, operands: Types) -> Result<TensorType, String> {
    let [x, dy] = exactly(operands)?;
    let (n, channels) = nhwc(x, geometry.input)?;
    let (n_out, out) = nhwc(dy, conv_output(geometry)?)?;
    if n != n_out || geometry.groups == 0 || channels % geometry.groups != 0 {
        return Err(format!("{x} and {dy} do not fit with {} groups", geometry.groups));
    }
    let [kernel_h, kernel_w] = geometry.kernel;
    Ok(TensorType::new(
        x.dtype,
        Shape::fixed(&[out, channels / geometry.groups, kernel_h, kernel_w]),
    ))
}

fn transpose(permutation: &[usize], operands: Types) -> Result<TensorType, String> {
    let [x] = exactly(operands)?;
    let mut seen = permutation.to_vec();
    seen.sort_unstable();
    if seen.len() != x.shape.rank() || seen.iter().enumerate().any(|(axis, &at)| axis != at) {
        return Err(format!("{permutation:?} is not a permutation of the axes of {x}"));
    }
    let shape = permutation.iter().map(|&axis| x.shape.0[axis]).collect();
    Ok(TensorType::new(x.dtype, Shape(shape)))
}

fn broadcast(shape: &Shape, operands: Types) -> Result<TensorType, String> {
    let [x] = exactly(operands)?;
    let fits = x.shape.rank() <= shape.rank()
        && x.shape
            .0
            .iter()
            .rev()
            .zip(shape.0.iter().rev())
            .all(|(&from, &to)| from == to || from == Dim::ONE);
    if fits {
        Ok(TensorType::new(x.dtype, shape.clone()))
    } else {
        Err(format!("{x} does not broadcast to {shape}"))
    }
}

fn slice(
    axis: usize,
    start: usize,
    end: usize,
    step: usize,
    operands: Types,
) -> Result<TensorType, String> {
    let [x] = exactly(operands)?;
    let size = fixed(axis_of(x, axis)?, "a sliced axis")?;
    if step == 0 || start > end || end > size {
        return Err(format!("{start}..{end} step {step} is not within axis {axis} of {x}"));
    }
    Ok(with_axis(x, axis, (end - start).div_ceil(step)))
}

fn pad(
    axis: usize,
    low: usize,
    high: usize,
    interior: usize,
    operands: Types,
) -> Result<TensorType, String> {
    let [x] = exactly(operands)?;
    let size = fixed(axis_of(x, axis)?, "a padded axis")?;
    let inner = size.saturating_sub(1).checked_mul(interior);
    let padded = inner
        .and_then(|inner| inner.checked_add(size)?.checked_add(low)?.checked_add(high))
        .ok_or_else(|| format!("padding of {x} overflows"))?;
    Ok(with_axis(x, axis, padded))
}

/// Most operands of a concat, the one op that takes any number: edges are searched one by one.
const MAX_OPERANDS: usize = 1 << 16;

fn concat(axis: usize, operands: Types) -> Result<TensorType, String> {
    let [first, ..] = operands else {
        return Err("takes at least one operand".to_owned());
    };
    if operands.len() > MAX_OPERANDS {
        return Err(format!("takes at most {MAX_OPERANDS} operands, not {}", operands.len()));
    }
    let mut size = 0_usize;
    for x in operands {
        let part = fixed(axis_of(x, axis)?, "a concatenated axis")?;
        same(&with_axis(x, axis, 0), &with_axis(first, axis, 0))?;
        size = size.checked_add(part).ok_or("the result is too large")?;
    }
    Ok(with_axis(first, axis, size))
}

fn cross_entropy(logits: &TensorType, label: &TensorType) -> Result<TensorType, String> {
    float(logits)?;
    let [rows, _] = logits.shape.0[..] else {
        return Err(format!("logits are [rows, classes], not {logits}"));
    };
    if label.dtype != DType::I64 || label.shape.0 != [rows] {
        return Err(format!("labels of {logits} are i64[{rows}], not {label}"));
    }
    Ok(TensorType::new(logits.dtype, Shape(vec![rows])))
}

fn scale_fits(x: &TensorType, scale: &TensorType, axis: Option<usize>) -> Result<(), String> {
    let wanted = match axis {
        None => Shape::scalar(),
        Some(axis) => Shape(vec![axis_of(x, axis)?]),
    };
    if scale.dtype == DType::F32 && scale.shape == wanted {
        Ok(())
    } else {
        Err(format!("the scale of {x} is f32{wanted}, not {scale}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn f32(dims: &[Dim]) -> TensorType {
        TensorType::f32(Shape(dims.to_vec()))
    }

    #[test]
    fn matmul_takes_transposed_operands() {
        let (a, b) = (f32(&[Dim::N, 3.into()]), f32(&[4.into(), 3.into()]));
        let op = Op::Matmul { transpose_a: false, transpose_b: true };
        assert_eq!(infer(&op, &[&a, &b]), Ok(f32(&[Dim::N, 4.into()])));
        let op = Op::Matmul { transpose_a: false, transpose_b: false };
        assert!(infer(&op, &[&a, &b]).is_err());
    }

    #[test]
    fn nothing_depends_on_the_batch_twice() {
        let x = f32(&[Dim::N, 1.into()]);
        let shape = Shape(vec![Dim::N, Dim::N]);
        let error = infer(&Op::Broadcast(shape), &[&x]).expect_err("quadratic");
        assert!(error.to_string().contains("twice"), "{error}");
        let empty = f32(&[0.into(), (1 << 40).into(), (1 << 40).into()]);
        assert!(infer(&Op::Input(empty), &[]).is_err());
    }

    #[test]
    fn convolution_and_its_gradients_agree() {
        let geometry = ConvGeometry {
            input: [9, 8],
            kernel: [3, 3],
            strides: [2, 1],
            pads: [1, 1, 1, 1],
            dilations: [1, 1],
            groups: 2,
        };
        let x = f32(&[Dim::N, 9.into(), 8.into(), 4.into()]);
        let weight = f32(&[6.into(), 2.into(), 3.into(), 3.into()]);
        let y = infer(&Op::Conv2d(geometry), &[&x, &weight]).expect("fits");
        assert_eq!(y, f32(&[Dim::N, 5.into(), 8.into(), 6.into()]));
        assert_eq!(infer(&Op::Conv2dGradInput(geometry), &[&y, &weight]), Ok(x.clone()));
        assert_eq!(infer(&Op::Conv2dGradWeight(geometry), &[&x, &y]), Ok(weight));
    }
}
