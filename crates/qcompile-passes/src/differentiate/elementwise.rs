//! Gradients of elementwise ops.

use super::rules::{Site, not_differentiable};
use crate::PassError;
use crate::builder::Builder;
use crate::quantize::parameter;
use crate::simplify::splat;
use qcompile_ir::{BinaryOp, CompareOp, DType, NodeId, Op, UnaryOp};

type Gradient = Result<NodeId, PassError>;

pub(super) fn unary(b: &mut Builder<'_>, site: &Site, op: UnaryOp) -> Gradient {
    let (x, y, dy) = (site.x(), site.y, site.dy);
    match op {
        UnaryOp::Neg => b.unary("", UnaryOp::Neg, dy),
        UnaryOp::Abs => {
            let sign = b.unary("sign", UnaryOp::Sign, x)?;
            b.binary("", BinaryOp::Mul, dy, sign)
        }
        UnaryOp::Exp => b.binary("", BinaryOp::Mul, dy, y),
        UnaryOp::Log => b.binary("", BinaryOp::Div, dy, x),
        UnaryOp::Sqrt => {
            let twice = b.scaled("twice", y, 2.0)?;
            b.binary("", BinaryOp::Div, dy, twice)
        }
        UnaryOp::Reciprocal => {
            let square = b.binary("square", BinaryOp::Mul, y, y)?;
            let product = b.binary("product", BinaryOp::Mul, dy, square)?;
            b.unary("", UnaryOp::Neg, product)
        }
        UnaryOp::Erf => {
            // d erf(x) / dx = 2/√π · exp(-x²)
            let square = b.binary("square", BinaryOp::Mul, x, x)?;
            let minus = b.unary("minus", UnaryOp::Neg, square)?;
            let bell = b.unary("bell", UnaryOp::Exp, minus)?;
            let slope = b.scaled("slope", bell, std::f64::consts::FRAC_2_SQRT_PI)?;
            b.binary("", BinaryOp::Mul, dy, slope)
        }
        UnaryOp::Relu => {
            // y > 0 is x > 0, and y is the value that its users keep.
            let zero = b.splat_like("zero", y, 0.0)?;
            let positive = b.compare("positive", CompareOp::Less, zero, y)?;
            b.where_or_zero("", positive, dy)
        }
        UnaryOp::Sigmoid => {
            let one = b.splat_like("one", y, 1.0)?;
            let rest = b.binary("rest", BinaryOp::Sub, one, y)?;
            let slope = b.binary("slope", BinaryOp::Mul, y, rest)?;
            b.binary("", BinaryOp::Mul, dy, slope)
        }
        UnaryOp::Tanh => {
            let square = b.binary("square", BinaryOp::Mul, y, y)?;
            let one = b.splat_like("one", y, 1.0)?;
            let slope = b.binary("slope", BinaryOp::Sub, one, square)?;
            b.binary("", BinaryOp::Mul, dy, slope)
        }
        UnaryOp::Sin => {
            let cos = b.unary("cos", UnaryOp::Cos, x)?;
            b.binary("", BinaryOp::Mul, dy, cos)
        }
        UnaryOp::Cos => {
            let sin = b.unary("sin", UnaryOp::Sin, x)?;
            let product = b.binary("product", BinaryOp::Mul, dy, sin)?;
            b.unary("", UnaryOp::Neg, product)
        }
        UnaryOp::Atan => {
            // d atan(x) / dx = 1 / (1 + x²)
            let square = b.binary("square", BinaryOp::Mul, x, x)?;
            let one = b.splat_like("one", x, 1.0)?;
            let below = b.binary("below", BinaryOp::Add, square, one)?;
            b.binary("", BinaryOp::Div, dy, below)
        }
        UnaryOp::Floor
        | UnaryOp::Ceil
        | UnaryOp::Round
        | UnaryOp::Sign
        | UnaryOp::Not
        | UnaryOp::StopGradient => b.splat_like("", x, 0.0),
    }
}

pub(super) fn binary(b: &mut Builder<'_>, site: &Site, op: BinaryOp) -> Gradient {
    let first = site.position == 0;
    let (left, right, dy) = (site.operands[0], site.operands[1], site.dy);
    match op {
        BinaryOp::Add => Ok(dy),
        BinaryOp::Sub if first => Ok(dy),
        BinaryOp::Sub => b.unary("", UnaryOp::Neg, dy),
        BinaryOp::Mul => b.binary("", BinaryOp::Mul, dy, if first { right } else { left }),
        BinaryOp::Div if first => b.binary("", BinaryOp::Div, dy, right),
        BinaryOp::Div => {
            // d (a / b) / db = -(a / b) / b
            let ratio = b.binary("ratio", BinaryOp::Div, site.y, right)?;
            let product = b.binary("product", BinaryOp::Mul, dy, ratio)?;
            b.unary("", UnaryOp::Neg, product)
        }
        BinaryOp::Max | BinaryOp::Min => {
            // Ties give half to each operand, as in PyTorch.
            let other = if first { right } else { left };
            let (small, large) =
                if op == BinaryOp::Max { (other, site.x()) } else { (site.x(), other) };
            let chosen = b.compare("chosen", CompareOp::Less, small, large)?;
            let tie = b.compare("tie", CompareOp::Equal, small, large)?;
            let half = b.scaled("half", dy, 0.5)?;
            let unchosen = b.where_or_zero("unchosen", tie, half)?;
            b.select("", chosen, dy, unchosen)
        }
        BinaryOp::Pow if first => power_base(b, site),
        BinaryOp::Pow => {
            // d a^b / db = a^b · ln a; at a = 0 the limit is 0.
            let log = b.unary("log", UnaryOp::Log, left)?;
            let slope = b.binary("slope", BinaryOp::Mul, site.y, log)?;
            let product = b.binary("product", BinaryOp::Mul, dy, slope)?;
            let zero = b.splat_like("zero", left, 0.0)?;
            let at_zero = b.compare("at_zero", CompareOp::Equal, left, zero)?;
            b.select("", at_zero, zero, product)
        }
        BinaryOp::And | BinaryOp::Or => {
            Err(not_differentiable(b, site, &format!("{} has no gradient", op.name())))
        }
    }
}

/// d a^b / da = b · a^(b-1), and 0 where b = 0 (even at a = 0). A constant exponent gives the shorter form.
fn power_base(b: &mut Builder<'_>, site: &Site) -> Gradient {
    let (base, exponent, dy) = (site.operands[0], site.operands[1], site.dy);
    if let Some(value) = splat(b.graph, exponent) {
        if value == 0.0 {
            return b.splat_like("", base, 0.0);
        }
        let power = if value == 2.0 {
            base
        } else {
            let less = b.splat_like("exponent", base, value - 1.0)?;
            b.binary("power", BinaryOp::Pow, base, less)?
        };
        let slope = b.scaled("slope", power, value)?;
        return b.binary("", BinaryOp::Mul, dy, slope);
    }
    let one = b.splat_like("one", exponent, 1.0)?;
    let less = b.binary("exponent", BinaryOp::Sub, exponent, one)?;
    let power = b.binary("power", BinaryOp::Pow, base, less)?;
    let slope = b.binary("slope", BinaryOp::Mul, exponent, power)?;
    let product = b.binary("product", BinaryOp::Mul, dy, slope)?;
    let zero = b.splat_like("zero", exponent, 0.0)?;
    let flat = b.compare("flat", CompareOp::Equal, exponent, zero)?;
    b.select("", flat, zero, product)
}

pub(super) fn select(b: &mut Builder<'_>, site: &Site) -> Gradient {
    let zero = b.splat_like("zero", site.dy, 0.0)?;
    if site.position == 1 {
        b.select("", site.operands[0], site.dy, zero)
    } else {
        b.select("", site.operands[0], zero, site.dy)
    }
}

/// The gradient has the type of its value, so a rounding of the forward pass rounds the gradient too; but the gradient
/// of a parameter stays f32, which is what accumulates it.
pub(super) fn cast(b: &mut Builder<'_>, site: &Site) -> Gradient {
    let narrow = site.x();
    let rounds = *b.graph.op(narrow) == Op::Cast(DType::BF16);
    if rounds && b.graph.uses(narrow).len() == 1 && parameter(b.graph, narrow).is_some() {
        return Ok(site.dy);
    }
    let dtype = b.graph.ty(site.x()).dtype;
    b.cast("", site.dy, dtype)
}
