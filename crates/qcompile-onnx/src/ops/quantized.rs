//! Quantization: `QuantizeLinear` and its inverse as the graph's own ops, which pass gradients straight through within
//! the range of the codes.

use super::Results;
use super::quantized_blocks::Blocks;
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::node::{OnnxNode, axis_of};
use crate::tensor;
use qcompile_ir::{
    BinaryOp, CompareOp, DType, Dim, Op, QuantizedRange, ReduceOp, Shape, Tensor, UnaryOp,
};
use std::sync::Arc;

type Value = Result<ValueId, Obstacle>;

/// By what a value is quantized, or was.
#[derive(Clone, Debug)]
pub(super) struct Parameters {
    /// f32: a scalar, or one for each index of the axis.
    scale: ValueId,
    /// Of the type of the codes and the shape of the scale; none if all are 0 and that changes nothing.
    zero_point: Option<ValueId>,
    axis: Option<usize>,
    /// The scale as the model has it, if it is there.
    given: Option<Arc<Tensor>>,
    /// The zero point, likewise.
    given_zero_point: Option<Arc<Tensor>>,
}

/// Whether a value is known to be 0 throughout.
fn is_zero(draft: &Draft, id: ValueId) -> bool {
    draft.fixed_tensor(id).is_some_and(|tensor| tensor.splat() == Some(0.0))
}

/// Refuses a scale that is known and no positive number.
pub(super) fn check_scale(draft: &Draft, scale: ValueId) -> Result<(), Obstacle> {
    if !draft.dtype(scale).is_float() {
        return Err(Obstacle::invalid(format!("the scale is {}, not floats", draft.ty(scale))));
    }
    let Some(tensor) = draft.tensor(scale) else { return Ok(()) };
    let values = tensor.to_f32();
    let bad = values.iter().position(|value| !(value.is_finite() && *value > 0.0));
    bad.map_or(Ok(()), |at| {
        let place = if values.len() > 1 { format!("element {at} of ") } else { String::new() };
        Err(Obstacle::invalid(format!(
            "{place}the scale is {}: a scale is a number above 0",
            values[at]
        )))
    })
}

/// A scale in f32. Scales are no weights, whoever holds them, unless `--train` names them.
fn scale_input(draft: &mut Draft, scale: ValueId) -> Value {
    check_scale(draft, scale)?;
    if !draft.learns_scales || draft.fixed_tensor(scale).is_some() || draft.tensor(scale).is_none()
    {
        return draft.frozen(scale);
    }
    if let Some(&held) = draft.derived.get(&scale) {
        return Ok(held);
    }
    // A step of training must not take it to 0, and past 0 it must find a way back.
    let wide = draft.cast(scale, DType::F32)?;
    let magnitude = draft.unary(UnaryOp::Abs, wide)?;
    let held = draft.binary_scalar(BinaryOp::Max, magnitude, QuantizedRange::SMALLEST_SCALE)?;
    draft.derived.insert(scale, held);
    Ok(held)
}

/// A scale or zero point under other dimensions and as another type; a constant stays one.
fn converted(draft: &mut Draft, id: ValueId, dtype: DType, dims: &[Dim]) -> Value {
    if draft.dtype(id) == dtype && draft.dims(id) == dims {
        return Ok(id);
    }
    let sizes = Shape(dims.to_vec()).as_fixed();
    if let (Some(tensor), Some(sizes)) = (draft.fixed_tensor(id), sizes) {
        let splat = tensor.splat().filter(|_| tensor.elements() == 1);
        let values = match splat {
            Some(value) => vec![value; sizes.iter().product()],
            None => tensor.to_f64(),
        };
        if let Some(tensor) = Tensor::from_f64(dtype, &sizes, &values) {
            return draft.emit(Op::Const(Arc::new(tensor)), &[]);
        }
    }
    let value = draft.cast(id, dtype)?;
    if draft.ty(value).shape.elements() == Some(Dim::ONE) {
        let scalar = draft.reshape(value, &[])?;
        return draft.broadcast(scalar, dims);
    }
    draft.reshape(value, dims)
}

impl Parameters {
    /// Scale and zero point for codes of `dtype` in a value of these dimensions: of one element, or along `axis`.
    pub(super) fn new(
        draft: &mut Draft,
        (dtype, whole): (DType, &[Dim]),
        scale: ValueId,
        zero_point: Option<ValueId>,
        axis: i64,
    ) -> Result<Parameters, Obstacle> {
        let given = draft.tensor(scale);
        let given_zero_point = zero_point.and_then(|zero_point| draft.fixed_tensor(zero_point));
        let scale = scale_input(draft, scale)?;
        let one = |dims: &[Dim]| dims.is_empty() || dims == [Dim::ONE];
        let (dims, axis) = match draft.dims(scale) {
            dims if one(dims) => (Vec::new(), None),
            &[count] => {
                let axis = axis_of(axis, whole.len())?;
                if count != whole[axis] {
                    return Err(misfit(draft, scale, whole));
                }
                (vec![count], Some(axis))
            }
            _ => return Err(misfit(draft, scale, whole)),
        };
        let scale = converted(draft, scale, DType::F32, &dims)?;
        let mut kept = None;
        if let Some(zero_point) = zero_point {
            let fits = draft.dims(zero_point) == dims || one(draft.dims(zero_point));
            if draft.dtype(zero_point) != dtype || !fits {
                return Err(Obstacle::invalid(format!(
                    "the zero point is {}, the codes are {dtype} and the scale is {}",
                    draft.ty(zero_point),
                    draft.ty(scale)
                )));
            }
            kept = Some(Parameters::zero_point(draft, zero_point, &dims)?);
        }
        Ok(Parameters { scale, zero_point: kept.flatten(), axis, given, given_zero_point })
    }

    /// A zero point of these dimensions; none where it changes nothing.
    fn zero_point(
        draft: &mut Draft,
        zero_point: ValueId,
        dims: &[Dim],
    ) -> Result<Option<ValueId>, Obstacle> {
        let dtype = draft.dtype(zero_point);
        if QuantizedRange::of(dtype, true) == QuantizedRange::of(dtype, false)
            && is_zero(draft, zero_point)
        {
            return Ok(None);
        }
        // Integers of 16 bits are carried in i32, whose zero point is subtracted.
        if QuantizedRange::of(dtype, true).is_none() && dtype != DType::I32 {
            if is_zero(draft, zero_point) {
                return Ok(None);
            }
            return Err(Obstacle::invalid(format!("a zero point of {dtype} that is not 0")));
        }
        converted(draft, zero_point, dtype, dims).map(Some)
    }

    fn operands(&self, x: ValueId) -> Vec<ValueId> {
        [x, self.scale].into_iter().chain(self.zero_point).collect()
    }

    /// With the zero point of ONNX's range where none was given: signed codes begin one lower than symmetric ones.
    fn of_whole_range(mut self, draft: &mut Draft, dtype: DType) -> Result<Parameters, Obstacle> {
        let symmetric = QuantizedRange::of(dtype, false);
        let whole = QuantizedRange::of(dtype, true);
        if self.zero_point.is_none() && whole.is_some() && whole != symmetric {
            let zero = draft.emit(Op::Const(Arc::new(Tensor::scalar(dtype, 0.0))), &[])?;
            let dims = draft.dims(self.scale).to_vec();
            self.zero_point = Some(converted(draft, zero, dtype, &dims)?);
        }
        Ok(self)
    }
}

pub(super) fn misfit(draft: &Draft, parameter: ValueId, whole: &[Dim]) -> Obstacle {
    Obstacle::invalid(format!(
        "the scale {} for a value of dimensions {}",
        draft.ty(parameter),
        Shape(whole.to_vec())
    ))
}

/// `x` as codes of `dtype`.
pub(super) fn quantized(
    draft: &mut Draft,
    x: ValueId,
    dtype: DType,
    parameters: Parameters,
) -> Value {
    let x = match draft.dtype(x) {
        DType::I32 => draft.cast(x, DType::F32)?,
        dtype if dtype.is_float() => x,
        _ => return Err(Obstacle::invalid(format!("{} is not of floats or int32", draft.ty(x)))),
    };
    let parameters = parameters.of_whole_range(draft, dtype)?;
    draft.emit(Op::Quantize { dtype, axis: parameters.axis }, &parameters.operands(x))
}

/// Codes as f32. Codes of a weight that is trained are computed in each step, from the float weight that they were.
pub(super) fn dequantized(draft: &mut Draft, codes: ValueId, mut parameters: Parameters) -> Value {
    let axis = parameters.axis;
    if QuantizedRange::of(draft.dtype(codes), false).is_none() {
        return Err(Obstacle::invalid(format!("{} is not quantized", draft.ty(codes))));
    }
    if let Some(value) = master(draft, codes, None, &parameters)? {
        return Ok(value);
    }
    if let Some(float) = draft.exact_float(codes) {
        return carried_value(draft, float, parameters);
    }
    if let (DType::I32, Some(zero_point)) = (draft.dtype(codes), parameters.zero_point) {
        let zero_point = column(draft, zero_point, axis, draft.rank(codes))?;
        let codes = draft.sub(codes, zero_point)?;
        return draft.emit(Op::Dequantize { axis }, &[codes, parameters.scale]);
    }
    // Computed codes have the zero point that their quantization has, so that they are a pair.
    if draft.fixed_tensor(codes).is_none() {
        parameters = parameters.of_whole_range(draft, draft.dtype(codes))?;
    } else if parameters.zero_point.is_some_and(|zero_point| is_zero(draft, zero_point)) {
        parameters.zero_point = None;
    }
    draft.emit(Op::Dequantize { axis }, &parameters.operands(codes))
}

/// The value of the codes of a trained weight: a float parameter that begins as what the codes mean, quantized and
/// dequantized; in blocks, the rows of it. None for other codes, or parameters that are computed. All that read the codes
/// have the same parameters.
fn master(
    draft: &mut Draft,
    codes: ValueId,
    blocks: Option<&Blocks>,
    parameters: &Parameters,
) -> Result<Option<ValueId>, Obstacle> {
    let &Parameters { zero_point, axis, .. } = parameters;
    let dtype = draft.dtype(codes);
    let Some(name) = draft.trained_codes.get(&codes).cloned() else { return Ok(None) };
    if let Some(&value) = draft.derived.get(&codes) {
        return Ok(Some(value));
    }
    let zero_tensor = parameters.given_zero_point.clone().filter(|_| zero_point.is_some());
    if zero_point.is_some() && zero_tensor.is_none() {
        return Ok(None);
    }
    let (Some(tensor), Some(scales)) = (draft.fixed_tensor(codes), parameters.given.clone()) else {
        return Ok(None);
    };
    // Symmetric where it can be, which is what products of integers take.
    let range = QuantizedRange::of(dtype, false);
    let codes_fit = range.is_some_and(|range| {
        (0..tensor.elements()).all(|at| tensor.get_f64(at) >= f64::from(range.low))
    });
    let zero_point = zero_point.filter(|_| {
        zero_tensor.as_ref().is_some_and(|zeros| zeros.splat() != Some(0.0)) || !codes_fit
    });
    let shape = tensor.shape();
    let (block, axis_seen) = match blocks {
        Some(blocks) => (blocks.block.scale, Some(blocks.axis)),
        None => (1, axis),
    };
    let inner =
        axis_seen.map_or(usize::MAX, |axis| shape[axis + 1..].iter().product::<usize>().max(1));
    let length = axis_seen.map_or(1, |axis| shape[axis].max(1));
    // Which scale an element has: of its index along the axis, or of its block.
    let of = |at: usize| match blocks {
        None => at / inner % length,
        Some(_) => {
            let (outer, along) = (at / inner / length, at / inner % length);
            (outer * length.div_ceil(block) + along / block) * inner + at % inner
        }
    };
    let begins = meaning(&tensor, &scales, zero_tensor.as_deref(), &of);
    let mut param = draft.emit(Op::Param(Arc::new(begins)), &[])?;
    draft.set_name(param, &name);
    if let Some(blocks) = blocks {
        param = blocks.rows(draft, param)?;
    }
    let mut parameters = Parameters { zero_point, ..parameters.clone() };
    if !codes_fit {
        parameters = parameters.of_whole_range(draft, dtype)?;
    }
    let codes_now = draft.emit(Op::Quantize { dtype, axis }, &parameters.operands(param))?;
    let value = draft.emit(Op::Dequantize { axis }, &parameters.operands(codes_now))?;
    draft.derived.insert(codes, value);
    Ok(Some(value))
}

/// `(q - zero_point) · scale` in f32, where element `at` has the scale and zero point `of(at)`; one alone is everyone's.
#[allow(clippy::cast_possible_truncation, reason = "the result is f32")]
fn meaning(
    codes: &Tensor,
    scales: &Tensor,
    zero_points: Option<&Tensor>,
    of: &dyn Fn(usize) -> usize,
) -> Tensor {
    let shape = codes.shape();
    let element = |tensor: &Tensor, at: usize| {
        tensor.get_f64(if tensor.elements() == 1 { 0 } else { of(at) })
    };
    let bytes = (0..codes.elements())
        .flat_map(|at| {
            let zero = zero_points.map_or(0.0, |zeros| element(zeros, at));
            let whole = (codes.get_f64(at) - zero) as f32;
            (whole * element(scales, at) as f32).to_le_bytes()
        })
        .collect();
    Tensor::from_bytes(DType::F32, shape.to_vec(), bytes)
        .unwrap_or_else(|| Tensor::zeros(DType::F32, shape))
}

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

/// Applies `each` to operand 0 of a node, or to its blocks, by the node's scale and zero point for codes of `dtype`.
fn by_parameters(
    draft: &mut Draft,
    node: &OnnxNode,
    dtype: DType,
    each: &dyn Fn(&mut Draft, ValueId, Parameters) -> Value,
) -> Value {
    let x = node.input(0)?;
    let (scale, zero_point) = (node.input(1)?, node.optional(2));
    let axis = node.attributes.int("axis", 1)?;
    let Some(blocks) = Blocks::of(draft, node, x)? else {
        let whole = draft.dims(x).to_vec();
        let parameters = Parameters::new(draft, (dtype, &whole), scale, zero_point, axis)?;
        return each(draft, x, parameters);
    };
    let given = draft.tensor(scale);
    let given_zero_point = zero_point.and_then(|zero_point| draft.fixed_tensor(zero_point));
    let scale = scale_input(draft, scale)?;
    let scale = blocks.parameter(draft, scale)?;
    let zero_point = match zero_point {
        None => None,
        Some(zero_point) => Some(blocks.parameter(draft, zero_point)?),
    };
    let whole = [blocks.rows, blocks.block];
    let parameters = Parameters::new(draft, (dtype, &whole), scale, zero_point, 0)?;
    let parameters = Parameters { given, given_zero_point, ..parameters };
    let rows = blocks.rows(draft, x)?;
    let rows = match master(draft, x, Some(&blocks), &parameters)? {
        Some(rows) => rows,
        None => each(draft, rows, parameters)?,
    };
    blocks.value(draft, rows)
}

/// What a node quantizes to: its type in the graph, and the range of codes where the graph has a wider type for them.
#[derive(Clone, Copy)]
struct Codes {
    dtype: DType,
    carried: Option<(f64, f64)>,
}

impl Codes {
    fn of(draft: &Draft, node: &OnnxNode) -> Result<Codes, Obstacle> {
        let zero_point = node.optional(2);
        let codes = match type_number(node, "output_dtype")? {
            None => {
                let dtype = zero_point.map_or(DType::U8, |zero_point| draft.dtype(zero_point));
                Codes { dtype, carried: None }
            }
            Some(number) => {
                let dtype = tensor::dtype(number)?;
                if let Some(other) = zero_point.filter(|&zero| draft.dtype(zero) != dtype) {
                    return Err(Obstacle::invalid(format!(
                        "output_dtype is {}, but the zero point {}",
                        tensor::dtype_name(number),
                        draft.ty(other)
                    )));
                }
                #[allow(clippy::cast_precision_loss, reason = "numbers of 16 bits")]
                let carried = tensor::range(number)
                    .filter(|&(_, count)| count <= 1 << 16)
                    .map(|(low, count)| (low as f64, (low + count - 1) as f64));
                Codes { dtype, carried }
            }
        };
        let quantized = QuantizedRange::of(codes.dtype, false).is_some();
        if codes.carried.is_some() || (quantized && codes.dtype != DType::I32) {
            return Ok(codes);
        }
        Err(Obstacle::unsupported(format!("quantization to {}", codes.dtype)))
    }
}

pub(super) fn quantize_linear(draft: &mut Draft, node: &OnnxNode) -> Results {
    let codes = Codes::of(draft, node)?;
    if !node.attributes.flag("saturate", true)? && codes.dtype.is_float8() {
        return Err(Obstacle::unsupported("a conversion to float8 that does not saturate"));
    }
    if let Some(number) = type_number(node, "precision")? {
        // The quotient is f32, which has every bit of the types that may be asked for.
        tensor::dtype(number)?;
    }
    let Codes { dtype, carried } = codes;
    let code = |draft: &mut Draft, x: ValueId, parameters: Parameters| match carried {
        Some(range) => carried_codes(draft, x, parameters, dtype, range),
        None => quantized(draft, x, dtype, parameters),
    };
    Ok(vec![by_parameters(draft, node, dtype, &code)?])
}

pub(super) fn dequantize_linear(draft: &mut Draft, node: &OnnxNode) -> Results {
    let (codes, scale) = (node.input(0)?, node.input(1)?);
    let to = match type_number(node, "output_dtype")? {
        Some(number) => tensor::dtype(number)?,
        None => draft.dtype(scale),
    };
    let dtype = draft.dtype(codes);
    let y = by_parameters(draft, node, dtype, &dequantized)?;
    Ok(vec![draft.cast(y, to)?])
}

/// To unsigned integers, by a scale and a zero point from the extremes, among which 0 is counted.
pub(super) fn dynamic_quantize_linear(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = super::elementwise::float_input(draft, node, 0)?;
    let by = Dynamic::of(draft, x)?;
    let y = quantized(draft, x, DType::U8, by.parameters())?;
    Ok(vec![y, by.scale, by.zero_point])
}

/// A value rounded to codes of 8 bits by its extremes.
pub(super) fn dynamically(draft: &mut Draft, x: ValueId) -> Value {
    let parameters = Dynamic::of(draft, x)?.parameters();
    let codes = quantized(draft, x, DType::U8, parameters.clone())?;
    dequantized(draft, codes, parameters)
}

/// The scale and the zero point that a value has by its extremes.
#[derive(Clone, Copy)]
struct Dynamic {
    scale: ValueId,
    zero_point: ValueId,
}

impl Dynamic {
    /// Those of a value; no gradient goes through them.
    fn of(draft: &mut Draft, x: ValueId) -> Result<Dynamic, Obstacle> {
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
        let zero_point =
            draft.emit(Op::Quantize { dtype: DType::U8, axis: None }, &[below, scale])?;
        Ok(Dynamic { scale, zero_point })
    }

    fn parameters(self) -> Parameters {
        let Dynamic { scale, zero_point } = self;
        let zero_point = Some(zero_point);
        Parameters { scale, zero_point, axis: None, given: None, given_zero_point: None }
    }
}

/// A scale or zero point as what it scales needs it for elementwise ops.
fn column(draft: &mut Draft, parameter: ValueId, axis: Option<usize>, rank: usize) -> Value {
    let Some(axis) = axis else { return Ok(parameter) };
    let mut dims = vec![Dim::ONE; rank];
    dims[axis] = draft.dims(parameter)[0];
    draft.reshape(parameter, &dims)
}

/// Codes of 16 bits, as floats that are known to be whole, cast to the type that carries them. What rounds into their range has the
/// gradient of the quotient.
fn carried_codes(
    draft: &mut Draft,
    x: ValueId,
    parameters: Parameters,
    dtype: DType,
    (low, high): (f64, f64),
) -> Value {
    let Parameters { scale, zero_point, axis, .. } = parameters;
    let rank = draft.rank(x);
    let x = draft.cast(x, DType::F32)?;
    let scale = column(draft, scale, axis, rank)?;
    let mut ratio = draft.binary(BinaryOp::Div, x, scale)?;
    let [mut low, mut high] = [low, high].map(|end| draft.scalar(DType::F32, end));
    let mut shift = None;
    if let Some(zero_point) = zero_point {
        let zero_point = draft.cast(zero_point, DType::F32)?;
        let zero_point = column(draft, zero_point, axis, rank)?;
        low = draft.sub(low, zero_point)?;
        high = draft.sub(high, zero_point)?;
        shift = Some(zero_point);
    }
    let held = |draft: &mut Draft, x: ValueId, low: ValueId, high: ValueId| {
        let above = draft.binary(BinaryOp::Max, x, low)?;
        draft.binary(BinaryOp::Min, above, high)
    };
    let whole = draft.unary(UnaryOp::Round, ratio)?;
    let whole = held(draft, whole, low, high)?;
    low = draft.binary_scalar(BinaryOp::Sub, low, 0.5)?;
    high = draft.binary_scalar(BinaryOp::Add, high, 0.5)?;
    ratio = held(draft, ratio, low, high)?;
    let error = draft.sub(whole, ratio)?;
    let error = draft.unary(UnaryOp::StopGradient, error)?;
    let mut through = draft.add(ratio, error)?;
    if let Some(zero_point) = shift {
        through = draft.add(through, zero_point)?;
    }
    let codes = draft.cast(through, dtype)?;
    draft.set_exact_float(codes, through);
    Ok(codes)
}

/// What codes that are floats mean.
fn carried_value(draft: &mut Draft, mut codes: ValueId, parameters: Parameters) -> Value {
    let rank = draft.rank(codes);
    if let Some(zero_point) = parameters.zero_point {
        let zero_point = draft.cast(zero_point, DType::F32)?;
        let zero_point = column(draft, zero_point, parameters.axis, rank)?;
        codes = draft.sub(codes, zero_point)?;
    }
    let scale = column(draft, parameters.scale, parameters.axis, rank)?;
    draft.mul(codes, scale)
}
