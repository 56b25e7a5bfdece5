//! Elementwise operators, and those composed of them.

use super::Results;
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::known::{Element, Known};
use crate::node::OnnxNode;
use crate::tensor;
use qcompile_ir::{BinaryOp, CompareOp, DType, UnaryOp};

type Value = Result<ValueId, Obstacle>;

/// Rejects what is not a float where IR functions would say so less clearly.
pub(super) fn float_input(draft: &Draft, node: &OnnxNode, at: usize) -> Value {
    let x = node.input(at)?;
    if draft.dtype(x).is_float() {
        Ok(x)
    } else {
        Err(Obstacle::unsupported(format!("{} elements", draft.dtype(x))))
    }
}

pub(super) fn unary(draft: &mut Draft, node: &OnnxNode, op: UnaryOp) -> Results {
    let x = node.input(0)?;
    if op == UnaryOp::Abs && draft.dtype(x) == DType::U8 {
        return Ok(vec![x]);
    }
    Ok(vec![draft.unary(op, x)?])
}

pub(super) fn binary(draft: &mut Draft, node: &OnnxNode, op: BinaryOp) -> Results {
    Ok(vec![draft.binary(op, node.input(0)?, node.input(1)?)?])
}

pub(super) fn variadic(draft: &mut Draft, node: &OnnxNode, op: BinaryOp) -> Results {
    Ok(vec![fold_left(draft, node, op)?])
}

fn fold_left(draft: &mut Draft, node: &OnnxNode, op: BinaryOp) -> Value {
    let inputs = node.all_inputs()?;
    let mut result = inputs[0];
    for &input in &inputs[1..] {
        result = draft.binary(op, result, input)?;
    }
    Ok(result)
}

pub(super) fn mean(draft: &mut Draft, node: &OnnxNode) -> Results {
    let sum = fold_left(draft, node, BinaryOp::Add)?;
    #[allow(clippy::cast_precision_loss, reason = "a number of inputs")]
    let count = node.inputs.len() as f64;
    Ok(vec![draft.binary_scalar(BinaryOp::Div, sum, count)?])
}

/// `swapped`: the comparison of the second operand with the first.
pub(super) fn compare(draft: &mut Draft, node: &OnnxNode, op: CompareOp, swapped: bool) -> Results {
    let (a, b) = (node.input(0)?, node.input(1)?);
    let (a, b) = if swapped { (b, a) } else { (a, b) };
    Ok(vec![draft.compare(op, a, b)?])
}

pub(super) fn where_(draft: &mut Draft, node: &OnnxNode) -> Results {
    Ok(vec![draft.select(node.input(0)?, node.input(1)?, node.input(2)?)?])
}

pub(super) fn identity(_: &mut Draft, node: &OnnxNode) -> Results {
    Ok(vec![node.input(0)?])
}

pub(super) fn cast(draft: &mut Draft, node: &OnnxNode) -> Results {
    let to = node
        .attributes
        .optional_int("to")?
        .ok_or_else(|| Obstacle::invalid("attribute to is missing"))?;
    // Only conversions to float8 saturate, and those are not supported.
    node.attributes.flag("saturate", true)?;
    node.attributes.string("round_mode", "up")?;
    let to = i32::try_from(to)
        .map_err(|_| Obstacle::invalid(format!("there is no element type {to}")))?;
    draft.note_type(to);
    let x = draft.cast(node.input(0)?, tensor::dtype(to)?)?;
    Ok(vec![match tensor::range(to) {
        Some((lowest, count)) => wrapped(draft, x, lowest, count)?,
        None => x,
    }])
}

/// Integers wrapped to the `count` values from `lowest` on.
fn wrapped(draft: &mut Draft, x: ValueId, lowest: i64, count: i64) -> Result<ValueId, Obstacle> {
    let dtype = draft.dtype(x);
    let number = |value: i64| Known::new(dtype, Vec::new(), vec![Element::Int(value)]);
    let (first, all, zero) = (
        draft.add_known(number(lowest)),
        draft.add_known(number(count)),
        draft.add_known(number(0)),
    );
    // Division rounds towards zero, so what is left over has the sign of the dividend.
    let from_lowest = draft.sub(x, first)?;
    let times = draft.binary(BinaryOp::Div, from_lowest, all)?;
    let whole = draft.mul(times, all)?;
    let left = draft.sub(from_lowest, whole)?;
    let raised = draft.add(left, all)?;
    let negative = draft.compare(CompareOp::Less, left, zero)?;
    let left = draft.select(negative, raised, left)?;
    draft.add(left, first)
}

pub(super) fn cast_like(draft: &mut Draft, node: &OnnxNode) -> Results {
    node.attributes.flag("saturate", true)?;
    node.attributes.string("round_mode", "up")?;
    let to = draft.dtype(node.input(1)?);
    Ok(vec![draft.cast(node.input(0)?, to)?])
}

/// Identity: the masks of training are not drawn at import.
pub(super) fn clip(draft: &mut Draft, node: &OnnxNode) -> Results {
    let mut x = node.input(0)?;
    if node.opset < 11 {
        let (low, high) =
            (node.attributes.optional_float("min")?, node.attributes.optional_float("max")?);
        if let Some(low) = low {
            x = draft.binary_scalar(BinaryOp::Max, x, low)?;
        }
        if let Some(high) = high {
            x = draft.binary_scalar(BinaryOp::Min, x, high)?;
        }
        return Ok(vec![x]);
    }
    for (at, op) in [(1, BinaryOp::Max), (2, BinaryOp::Min)] {
        let Some(bound) = node.optional(at) else {
            continue;
        };
        // A bound is no weight, whoever holds it.
        let bound = match draft.constant(bound) {
            Some(known) => draft.add_known(known),
            None => bound,
        };
        if draft.dims(bound).iter().any(|dim| *dim != qcompile_ir::Dim::ONE) {
            return Err(Obstacle::invalid(format!(
                "input {at} is {}, not one number",
                draft.ty(bound)
            )));
        }
        let bound = draft.reshape(bound, &[])?;
        x = draft.binary(op, x, bound)?;
    }
    Ok(vec![x])
}

pub(super) fn pow(draft: &mut Draft, node: &OnnxNode) -> Results {
    let (x, exponent) = (node.input(0)?, node.input(1)?);
    let constant = draft
        .known(exponent)
        .filter(|known| known.is_uniform())
        .and_then(|known| known.get(0).as_f64());
    let keeps_shape = draft.rank(exponent) == 0
        || draft.dims(exponent).iter().all(|dim| *dim == qcompile_ir::Dim::ONE)
            && draft.rank(exponent) <= draft.rank(x);
    // The usual exponents as the functions that have exact gradients.
    if keeps_shape && draft.dtype(x).is_float() {
        if constant == Some(2.0) {
            return Ok(vec![draft.mul(x, x)?]);
        }
        if constant == Some(0.5) {
            return Ok(vec![draft.unary(UnaryOp::Sqrt, x)?]);
        }
        if constant == Some(1.0) {
            return Ok(vec![x]);
        }
    }
    if !draft.dtype(x).is_float() && draft.dtype(exponent).is_float() {
        let (base, dtype) = (draft.cast(x, DType::F32)?, draft.dtype(x));
        let exponent = draft.cast(exponent, DType::F32)?;
        let power = draft.binary(BinaryOp::Pow, base, exponent)?;
        return Ok(vec![draft.cast(power, dtype)?]);
    }
    let exponent = draft.cast(exponent, draft.dtype(x))?;
    Ok(vec![draft.binary(BinaryOp::Pow, x, exponent)?])
}

/// What remains of a division: with the sign of the dividend if `fmod` is 1, else with that of the divisor.
pub(super) fn remainder(draft: &mut Draft, node: &OnnxNode) -> Results {
    let (a, b) = (node.input(0)?, node.input(1)?);
    let dtype = draft.dtype(a);
    let fmod = node.attributes.flag("fmod", false)?;
    if !dtype.is_float() {
        let quotient = draft.binary(BinaryOp::Div, a, b)?;
        let whole = draft.mul(quotient, b)?;
        let remainder = draft.sub(a, whole)?;
        return Ok(vec![if fmod { remainder } else { with_sign_of(draft, remainder, b)? }]);
    }
    if !fmod && node.opset < 28 {
        return Err(Obstacle::invalid(format!("fmod is 0 for {dtype} elements")));
    }
    let (a, b) = (draft.cast(a, DType::F32)?, draft.cast(b, DType::F32)?);
    let remainder = float_remainder(draft, a, b)?;
    let remainder = if fmod { remainder } else { with_sign_of(draft, remainder, b)? };
    Ok(vec![draft.cast(remainder, dtype)?])
}

/// `remainder`, plus the divisor where it is of the other sign and not 0.
fn with_sign_of(draft: &mut Draft, remainder: ValueId, divisor: ValueId) -> Value {
    let zero = draft.scalar(draft.dtype(remainder), 0.0);
    let signs = (draft.unary(UnaryOp::Sign, remainder)?, draft.unary(UnaryOp::Sign, divisor)?);
    let signs = draft.mul(signs.0, signs.1)?;
    let opposite = draft.compare(CompareOp::Less, signs, zero)?;
    let shifted = draft.add(remainder, divisor)?;
    draft.select(opposite, shifted, remainder)
}

/// `a - q · b` with the quotient cut to an integer. Where its rounding made it one too large, the difference has the
/// wrong sign.
fn float_remainder(draft: &mut Draft, a: ValueId, b: ValueId) -> Value {
    let [a, b] = draft.broadcast_pair(a, b)?;
    let ratio = draft.binary(BinaryOp::Div, a, b)?;
    let ratio = draft.unary(UnaryOp::StopGradient, ratio)?;
    let (magnitude, sign) = (draft.unary(UnaryOp::Abs, ratio)?, draft.unary(UnaryOp::Sign, ratio)?);
    let whole = draft.unary(UnaryOp::Floor, magnitude)?;
    let less = |draft: &mut Draft, whole: ValueId| {
        let quotient = draft.mul(whole, sign)?;
        let product = draft.mul(quotient, b)?;
        draft.sub(a, product)
    };
    let difference = less(draft, whole)?;
    let zero = draft.scalar(DType::F32, 0.0);
    let signs = (draft.unary(UnaryOp::Sign, difference)?, draft.unary(UnaryOp::Sign, a)?);
    let signs = draft.mul(signs.0, signs.1)?;
    let beyond = draft.compare(CompareOp::Less, signs, zero)?;
    let fewer = draft.binary_scalar(BinaryOp::Sub, whole, 1.0)?;
    let whole = draft.select(beyond, fewer, whole)?;
    let difference = less(draft, whole)?;
    // A divisor that is infinite leaves the dividend.
    let null = draft.compare(CompareOp::Equal, whole, zero)?;
    draft.select(null, a, difference)
}

/// `positive` where x > 0, else `negative`.
fn where_positive(draft: &mut Draft, x: ValueId, positive: ValueId, negative: ValueId) -> Value {
    let zero = draft.scalar(draft.dtype(x), 0.0);
    let condition = draft.compare(CompareOp::Less, zero, x)?;
    draft.select(condition, positive, negative)
}

pub(super) fn leaky_relu(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = float_input(draft, node, 0)?;
    let alpha = node.attributes.float("alpha", 0.01)?;
    Ok(vec![leaky_relu_of(draft, x, alpha)?])
}

pub(super) fn leaky_relu_of(draft: &mut Draft, x: ValueId, alpha: f64) -> Value {
    let scaled = draft.binary_scalar(BinaryOp::Mul, x, alpha)?;
    where_positive(draft, x, x, scaled)
}

pub(super) fn prelu(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = float_input(draft, node, 0)?;
    let scaled = draft.mul(x, node.input(1)?)?;
    Ok(vec![where_positive(draft, x, x, scaled)?])
}

/// `exp(min(x, 0)) - 1`: the branch for negative x, without infinities for positive x.
fn exp_minus_one(draft: &mut Draft, x: ValueId) -> Value {
    let negative = draft.binary_scalar(BinaryOp::Min, x, 0.0)?;
    let exp = draft.unary(UnaryOp::Exp, negative)?;
    draft.binary_scalar(BinaryOp::Sub, exp, 1.0)
}

pub(super) fn elu(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = float_input(draft, node, 0)?;
    let alpha = node.attributes.float("alpha", 1.0)?;
    let exp = exp_minus_one(draft, x)?;
    let negative = draft.binary_scalar(BinaryOp::Mul, exp, alpha)?;
    Ok(vec![where_positive(draft, x, x, negative)?])
}

pub(super) fn selu(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = float_input(draft, node, 0)?;
    let alpha = node.attributes.float("alpha", 1.673_263_2)?;
    let gamma = node.attributes.float("gamma", 1.050_701)?;
    let exp = exp_minus_one(draft, x)?;
    let negative = draft.binary_scalar(BinaryOp::Mul, exp, alpha)?;
    let chosen = where_positive(draft, x, x, negative)?;
    Ok(vec![draft.binary_scalar(BinaryOp::Mul, chosen, gamma)?])
}

pub(super) fn celu(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = float_input(draft, node, 0)?;
    let alpha = node.attributes.float("alpha", 1.0)?;
    let divided = draft.binary_scalar(BinaryOp::Div, x, alpha)?;
    let exp = exp_minus_one(draft, divided)?;
    let negative = draft.binary_scalar(BinaryOp::Mul, exp, alpha)?;
    Ok(vec![where_positive(draft, x, x, negative)?])
}

/// `x + bias` below `-lambd`, `x - bias` above `lambd`, else 0.
pub(super) fn shrink(draft: &mut Draft, node: &OnnxNode) -> Results {
    let given = node.input(0)?;
    let dtype = draft.dtype(given);
    let bias = node.attributes.float("bias", 0.0)?;
    let lambda = node.attributes.float("lambd", 0.5)?;
    let x = if dtype.is_float() { given } else { draft.cast(given, DType::F32)? };
    let wide = draft.dtype(x);
    let [zero, low, high] = [0.0, -lambda, lambda].map(|value| draft.scalar(wide, value));
    let below = draft.compare(CompareOp::Less, x, low)?;
    let above = draft.compare(CompareOp::Less, high, x)?;
    let raised = draft.binary_scalar(BinaryOp::Add, x, bias)?;
    let lowered = draft.binary_scalar(BinaryOp::Sub, x, bias)?;
    let rest = draft.select(above, lowered, zero)?;
    let y = draft.select(below, raised, rest)?;
    Ok(vec![draft.cast(y, dtype)?])
}

/// `x · sigmoid(alpha · x)`.
pub(super) fn swish(draft: &mut Draft, node: &OnnxNode, alpha: f32) -> Results {
    let x = float_input(draft, node, 0)?;
    let alpha = node.attributes.float("alpha", alpha)?;
    let scaled = draft.binary_scalar(BinaryOp::Mul, x, alpha)?;
    let gate = draft.unary(UnaryOp::Sigmoid, scaled)?;
    Ok(vec![draft.mul(x, gate)?])
}

pub(super) fn thresholded_relu(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = float_input(draft, node, 0)?;
    let alpha = draft.scalar(draft.dtype(x), node.attributes.float("alpha", 1.0)?);
    let condition = draft.compare(CompareOp::Less, alpha, x)?;
    let zero = draft.scalar(draft.dtype(x), 0.0);
    Ok(vec![draft.select(condition, x, zero)?])
}

/// `max(0, min(1, alpha·x + beta))`.
pub(super) fn hard_gate(draft: &mut Draft, x: ValueId, alpha: f64, beta: f64) -> Value {
    let scaled = draft.binary_scalar(BinaryOp::Mul, x, alpha)?;
    let shifted = draft.binary_scalar(BinaryOp::Add, scaled, beta)?;
    let below = draft.binary_scalar(BinaryOp::Min, shifted, 1.0)?;
    draft.binary_scalar(BinaryOp::Max, below, 0.0)
}

pub(super) fn hard_sigmoid(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = float_input(draft, node, 0)?;
    let (alpha, beta) = (node.attributes.float("alpha", 0.2)?, node.attributes.float("beta", 0.5)?);
    Ok(vec![hard_gate(draft, x, alpha, beta)?])
}

pub(super) fn hard_swish(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = float_input(draft, node, 0)?;
    let gate = hard_gate(draft, x, 1.0 / 6.0, 0.5)?;
    Ok(vec![draft.mul(x, gate)?])
}

/// `log(1 + exp(x))` as `max(x, 0) + log(1 + exp(-|x|))`, which does not overflow.
fn softplus_of(draft: &mut Draft, x: ValueId) -> Value {
    let magnitude = draft.unary(UnaryOp::Abs, x)?;
    let negated = draft.unary(UnaryOp::Neg, magnitude)?;
    let exp = draft.unary(UnaryOp::Exp, negated)?;
    let sum = draft.binary_scalar(BinaryOp::Add, exp, 1.0)?;
    let log = draft.unary(UnaryOp::Log, sum)?;
    // (x + │x│) / 2 rather than relu(x): at 0, where │x│ and relu have corners, the slopes add up to 1/2.
    let twice = draft.add(x, magnitude)?;
    let positive = draft.binary_scalar(BinaryOp::Mul, twice, 0.5)?;
    draft.add(positive, log)
}

pub(super) fn softplus(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = float_input(draft, node, 0)?;
    Ok(vec![softplus_of(draft, x)?])
}

pub(super) fn mish(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = float_input(draft, node, 0)?;
    let softplus = softplus_of(draft, x)?;
    let tanh = draft.unary(UnaryOp::Tanh, softplus)?;
    Ok(vec![draft.mul(x, tanh)?])
}

pub(super) fn softsign(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = float_input(draft, node, 0)?;
    let magnitude = draft.unary(UnaryOp::Abs, x)?;
    let divisor = draft.binary_scalar(BinaryOp::Add, magnitude, 1.0)?;
    Ok(vec![draft.binary(BinaryOp::Div, x, divisor)?])
}

pub(super) fn gelu(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = float_input(draft, node, 0)?;
    let approximate = node.attributes.string("approximate", "none")?;
    Ok(vec![gelu_of(draft, x, &approximate)?])
}

/// `x / 2 · (1 + erf(x / √2))`, or with `tanh` its approximation.
pub(super) fn gelu_of(draft: &mut Draft, x: ValueId, approximate: &str) -> Value {
    let gate = match approximate {
        "none" => {
            let scaled = draft.binary_scalar(BinaryOp::Mul, x, std::f64::consts::FRAC_1_SQRT_2)?;
            draft.unary(UnaryOp::Erf, scaled)?
        }
        "tanh" => {
            let square = draft.mul(x, x)?;
            let cubic = draft.binary_scalar(BinaryOp::Mul, square, 0.044_715)?;
            let factor = draft.binary_scalar(BinaryOp::Add, cubic, 1.0)?;
            let sum = draft.mul(x, factor)?;
            let scale = std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2;
            let scaled = draft.binary_scalar(BinaryOp::Mul, sum, scale)?;
            draft.unary(UnaryOp::Tanh, scaled)?
        }
        other => return Err(Obstacle::invalid(format!("attribute approximate is `{other}`"))),
    };
    let sum = draft.binary_scalar(BinaryOp::Add, gate, 1.0)?;
    let half = draft.binary_scalar(BinaryOp::Mul, x, 0.5)?;
    draft.mul(half, sum)
}
