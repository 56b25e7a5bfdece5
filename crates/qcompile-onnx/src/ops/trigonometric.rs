//! Trigonometric and hyperbolic functions and their inverses, composed so that values and gradients are accurate near
//! zeros and at the ends of their domains. Polynomials are those of the single precision functions of Cephes.

use super::Results;
use super::elementwise::float_input;
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::node::OnnxNode;
use qcompile_ir::{BinaryOp, CompareOp, DType, UnaryOp};

type Value = Result<ValueId, Obstacle>;

/// `(asinh x - x) / x³` in `x²`, highest power first, for `│x│ < 0.5`.
const ASINH: [f64; 4] =
    [2.012_200_330_9e-2, -4.269_934_097_2e-2, 7.484_758_608_8e-2, -1.666_628_813_4e-1];
/// `acosh x / √(x - 1)` in `x - 1`, highest power first, for `x < 1.5`.
const ACOSH: [f64; 5] = [
    1.759_688_107_1e-3,
    -7.528_727_671_3e-3,
    2.645_490_501_9e-2,
    -1.178_474_170_3e-1,
    1.414_213_526_3,
];
/// `(atanh x - x) / x³` in `x²`, highest power first, for `│x│ < 0.5`.
const ATANH: [f64; 5] = [
    1.817_407_803_49e-1,
    8.243_703_010_58e-2,
    1.466_914_317_30e-1,
    1.997_821_645_00e-1,
    3.333_373_003_03e-1,
];

/// A function that is computed in f32, whatever its operand's float type.
pub(super) fn function(
    draft: &mut Draft,
    node: &OnnxNode,
    of: fn(&mut Draft, ValueId) -> Value,
) -> Results {
    let x = float_input(draft, node, 0)?;
    let dtype = draft.dtype(x);
    let wide = draft.cast(x, DType::F32)?;
    let y = of(draft, wide)?;
    Ok(vec![draft.cast(y, dtype)?])
}

pub(super) fn tan(draft: &mut Draft, x: ValueId) -> Value {
    let (sin, cos) = (draft.unary(UnaryOp::Sin, x)?, draft.unary(UnaryOp::Cos, x)?);
    draft.binary(BinaryOp::Div, sin, cos)
}

pub(super) fn atan(draft: &mut Draft, x: ValueId) -> Value {
    draft.unary(UnaryOp::Atan, x)
}

/// `1 - x` and `1 + x`, whose product is `1 - x²` without cancellation.
fn distances_from_one(draft: &mut Draft, x: ValueId) -> Result<[ValueId; 2], Obstacle> {
    let one = draft.scalar(DType::F32, 1.0);
    Ok([draft.sub(one, x)?, draft.add(x, one)?])
}

/// `2 atan(x / (1 + √(1 - x²)))`.
pub(super) fn asin(draft: &mut Draft, x: ValueId) -> Value {
    let [below, above] = distances_from_one(draft, x)?;
    let product = draft.mul(below, above)?;
    let root = draft.unary(UnaryOp::Sqrt, product)?;
    let divisor = draft.binary_scalar(BinaryOp::Add, root, 1.0)?;
    let ratio = draft.binary(BinaryOp::Div, x, divisor)?;
    let half = draft.unary(UnaryOp::Atan, ratio)?;
    draft.binary_scalar(BinaryOp::Mul, half, 2.0)
}

/// `2 atan √((1 - x) / (1 + x))`.
pub(super) fn acos(draft: &mut Draft, x: ValueId) -> Value {
    let [below, above] = distances_from_one(draft, x)?;
    let ratio = draft.binary(BinaryOp::Div, below, above)?;
    let root = draft.unary(UnaryOp::Sqrt, ratio)?;
    let half = draft.unary(UnaryOp::Atan, root)?;
    draft.binary_scalar(BinaryOp::Mul, half, 2.0)
}

/// `(h² + h⁻²) / 2` with `h = exp(│x│ / 2)`, which is infinite only where the result is.
pub(super) fn cosh(draft: &mut Draft, x: ValueId) -> Value {
    let magnitude = draft.unary(UnaryOp::Abs, x)?;
    let half = draft.binary_scalar(BinaryOp::Mul, magnitude, 0.5)?;
    let large = draft.unary(UnaryOp::Exp, half)?;
    let small = draft.unary(UnaryOp::Reciprocal, large)?;
    let mut terms = [large, small];
    for term in &mut terms {
        let half = draft.binary_scalar(BinaryOp::Mul, *term, 0.5)?;
        *term = draft.mul(half, *term)?;
    }
    draft.add(terms[0], terms[1])
}

/// `tanh x · cosh x`.
pub(super) fn sinh(draft: &mut Draft, x: ValueId) -> Value {
    let (tanh, cosh) = (draft.unary(UnaryOp::Tanh, x)?, cosh(draft, x)?);
    draft.mul(tanh, cosh)
}

/// A polynomial by Horner's rule, highest power first.
fn polynomial(draft: &mut Draft, x: ValueId, coefficients: &[f64]) -> Value {
    let mut sum = draft.scalar(DType::F32, 0.0);
    for (at, &coefficient) in coefficients.iter().enumerate() {
        if at > 0 {
            sum = draft.mul(sum, x)?;
        }
        sum = draft.binary_scalar(BinaryOp::Add, sum, coefficient)?;
    }
    Ok(sum)
}

/// `near + near³ · polynomial(near²)` where `│x│ < 0.5`, else `far`; `near` is x held within ± 0.5, so that nothing in
/// the branch that is not taken is infinite.
fn odd_near_zero(draft: &mut Draft, x: ValueId, coefficients: &[f64], far: ValueId) -> Value {
    let near = clamp(draft, x, -0.5, 0.5)?;
    let square = draft.mul(near, near)?;
    let factor = polynomial(draft, square, coefficients)?;
    let cube = draft.mul(square, near)?;
    let rest = draft.mul(cube, factor)?;
    let near = draft.add(near, rest)?;
    let magnitude = draft.unary(UnaryOp::Abs, x)?;
    let half = draft.scalar(DType::F32, 0.5);
    let close = draft.compare(CompareOp::Less, magnitude, half)?;
    draft.select(close, near, far)
}

fn clamp(draft: &mut Draft, x: ValueId, low: f64, high: f64) -> Value {
    let above = draft.binary_scalar(BinaryOp::Max, x, low)?;
    draft.binary_scalar(BinaryOp::Min, above, high)
}

/// Away from zero `sign x · ln(│x│ · (1 + √(1 + x⁻²)) / 2) + ln 2`, in which nothing overflows.
pub(super) fn asinh(draft: &mut Draft, x: ValueId) -> Value {
    let magnitude = draft.unary(UnaryOp::Abs, x)?;
    let magnitude = draft.binary_scalar(BinaryOp::Max, magnitude, 0.5)?;
    let inverse = draft.unary(UnaryOp::Reciprocal, magnitude)?;
    let square = draft.mul(inverse, inverse)?;
    let sum = draft.binary_scalar(BinaryOp::Add, square, 1.0)?;
    let root = draft.unary(UnaryOp::Sqrt, sum)?;
    let half = draft.binary_scalar(BinaryOp::Mul, root, 0.5)?;
    let factor = draft.binary_scalar(BinaryOp::Add, half, 0.5)?;
    let product = draft.mul(magnitude, factor)?;
    let log = log_of_twice(draft, product)?;
    let sign = draft.unary(UnaryOp::Sign, x)?;
    let far = draft.mul(sign, log)?;
    odd_near_zero(draft, x, &ASINH, far)
}

/// `ln(2x)`, which is finite wherever x is.
fn log_of_twice(draft: &mut Draft, x: ValueId) -> Value {
    let log = draft.unary(UnaryOp::Log, x)?;
    draft.binary_scalar(BinaryOp::Add, log, std::f64::consts::LN_2)
}

/// Away from one `ln(x + √((x - 1)(x + 1)))`.
pub(super) fn acosh(draft: &mut Draft, x: ValueId) -> Value {
    let far = draft.binary_scalar(BinaryOp::Max, x, 1.5)?;
    let [below, above] = [BinaryOp::Sub, BinaryOp::Add].map(|op| draft.binary_scalar(op, far, 1.0));
    let (below, above) = (draft.unary(UnaryOp::Sqrt, below?)?, draft.unary(UnaryOp::Sqrt, above?)?);
    let root = draft.mul(below, above)?;
    let mut halves = [far, root];
    for half in &mut halves {
        *half = draft.binary_scalar(BinaryOp::Mul, *half, 0.5)?;
    }
    let sum = draft.add(halves[0], halves[1])?;
    let far = log_of_twice(draft, sum)?;
    let distance = draft.binary_scalar(BinaryOp::Sub, x, 1.0)?;
    let near = draft.binary_scalar(BinaryOp::Min, distance, 0.5)?;
    let factor = polynomial(draft, near, &ACOSH)?;
    let root = draft.unary(UnaryOp::Sqrt, near)?;
    let near = draft.mul(root, factor)?;
    let border = draft.scalar(DType::F32, 1.5);
    let close = draft.compare(CompareOp::Less, x, border)?;
    draft.select(close, near, far)
}

/// Away from zero `ln((1 + x) / (1 - x)) / 2`.
pub(super) fn atanh(draft: &mut Draft, x: ValueId) -> Value {
    let [below, above] = distances_from_one(draft, x)?;
    let ratio = draft.binary(BinaryOp::Div, above, below)?;
    let log = draft.unary(UnaryOp::Log, ratio)?;
    let far = draft.binary_scalar(BinaryOp::Mul, log, 0.5)?;
    odd_near_zero(draft, x, &ATANH, far)
}
