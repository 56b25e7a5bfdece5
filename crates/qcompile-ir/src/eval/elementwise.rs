//! Unary, binary, comparison, selection, conversion.

use super::erf::erf;
use super::{Data, Rounding};
use crate::{BinaryOp, CompareOp, DType, UnaryOp};
use std::cmp::Ordering;

pub(super) fn unary(op: UnaryOp, dtype: DType, x: &Data) -> Data {
    match x {
        Data::Float(x) => Data::Float(x.iter().map(|&x| unary_float(op, x)).collect()),
        Data::Int(x) => Data::Int(x.iter().map(|&x| unary_int(op, dtype, x)).collect()),
    }
}

fn unary_float(op: UnaryOp, x: f64) -> f64 {
    match op {
        UnaryOp::Neg => -x,
        UnaryOp::Abs => x.abs(),
        UnaryOp::Exp => x.exp(),
        UnaryOp::Log => x.ln(),
        UnaryOp::Sqrt => x.sqrt(),
        UnaryOp::Reciprocal => x.recip(),
        UnaryOp::Erf => erf(x),
        UnaryOp::Relu => maximum(x, 0.0),
        UnaryOp::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        UnaryOp::Tanh => x.tanh(),
        UnaryOp::Sin => x.sin(),
        UnaryOp::Cos => x.cos(),
        UnaryOp::Atan => x.atan(),
        UnaryOp::Floor => x.floor(),
        UnaryOp::Ceil => x.ceil(),
        UnaryOp::Round => x.round_ties_even(),
        UnaryOp::Sign if x == 0.0 || x.is_nan() => x,
        UnaryOp::Sign => x.signum(),
        // `not` takes bool, so it does not come here.
        UnaryOp::Not | UnaryOp::StopGradient => x,
    }
}

fn unary_int(op: UnaryOp, dtype: DType, x: i64) -> i64 {
    match op {
        UnaryOp::Neg => x.wrapping_neg(),
        UnaryOp::Abs => x.wrapping_abs(),
        UnaryOp::Relu => x.max(0),
        UnaryOp::Sign => x.signum(),
        UnaryOp::Not if dtype == DType::Bool => i64::from(x == 0),
        // The others take floats only.
        UnaryOp::Not
        | UnaryOp::StopGradient
        | UnaryOp::Exp
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
        | UnaryOp::Round => x,
    }
}

/// The larger, or NaN if either is.
pub(super) fn maximum(a: f64, b: f64) -> f64 {
    if a > b || a.is_nan() { a } else { b }
}

fn minimum(a: f64, b: f64) -> f64 {
    if a < b || a.is_nan() { a } else { b }
}

pub(super) fn binary(op: BinaryOp, a: &Data, b: &Data) -> Data {
    match (a, b) {
        (Data::Float(a), Data::Float(b)) => {
            Data::Float(a.iter().zip(b).map(|(&a, &b)| binary_float(op, a, b)).collect())
        }
        _ => {
            Data::Int(a.ints().iter().zip(b.ints()).map(|(&a, &b)| binary_int(op, a, b)).collect())
        }
    }
}

fn binary_float(op: BinaryOp, a: f64, b: f64) -> f64 {
    match op {
        BinaryOp::Add => a + b,
        BinaryOp::Sub => a - b,
        BinaryOp::Mul => a * b,
        BinaryOp::Div => a / b,
        BinaryOp::Max => maximum(a, b),
        BinaryOp::Min => minimum(a, b),
        BinaryOp::Pow => a.powf(b),
        // `and` and `or` take no floats, so they do not come here.
        BinaryOp::And | BinaryOp::Or => f64::NAN,
    }
}

fn binary_int(op: BinaryOp, a: i64, b: i64) -> i64 {
    match op {
        BinaryOp::Add => a.wrapping_add(b),
        BinaryOp::Sub => a.wrapping_sub(b),
        BinaryOp::Mul => a.wrapping_mul(b),
        BinaryOp::Div if b == 0 => 0,
        BinaryOp::Div => a.wrapping_div(b),
        BinaryOp::Max => a.max(b),
        BinaryOp::Min => a.min(b),
        BinaryOp::Pow => power(a, b),
        BinaryOp::And => a & b,
        BinaryOp::Or => a | b,
    }
}

fn power(base: i64, exponent: i64) -> i64 {
    if exponent < 0 {
        return match base {
            1 => 1,
            -1 if exponent % 2 == 0 => 1,
            -1 => -1,
            _ => 0,
        };
    }
    let (mut result, mut square, mut rest) = (1_i64, base, exponent);
    while rest > 0 {
        if rest % 2 == 1 {
            result = result.wrapping_mul(square);
        }
        square = square.wrapping_mul(square);
        rest /= 2;
    }
    result
}

pub(super) fn compare(op: CompareOp, a: &Data, b: &Data) -> Data {
    let holds = |order: Option<Ordering>| {
        i64::from(match op {
            CompareOp::Equal => order == Some(Ordering::Equal),
            CompareOp::Less => order == Some(Ordering::Less),
            CompareOp::LessEqual => order.is_some_and(Ordering::is_le),
        })
    };
    Data::Int(match (a, b) {
        (Data::Float(a), Data::Float(b)) => {
            a.iter().zip(b).map(|(a, b)| holds(a.partial_cmp(b))).collect()
        }
        _ => a.ints().iter().zip(b.ints()).map(|(a, b)| holds(a.partial_cmp(b))).collect(),
    })
}

pub(super) fn select(condition: &Data, a: &Data, b: &Data) -> Data {
    fn chosen<T: Copy>(condition: &[i64], a: &[T], b: &[T]) -> Vec<T> {
        let both = a.iter().zip(b);
        condition.iter().zip(both).map(|(&yes, (&a, &b))| if yes != 0 { a } else { b }).collect()
    }
    match (a, b) {
        (Data::Float(a), Data::Float(b)) => Data::Float(chosen(condition.ints(), a, b)),
        _ => Data::Int(chosen(condition.ints(), a.ints(), b.ints())),
    }
}

/// Conversion; between floats, rounding to the type comes with every result.
pub(super) fn cast(dtype: DType, rounding: Rounding, x: &Data) -> Data {
    match (x, dtype.is_float()) {
        (Data::Float(x), true) => Data::Float(x.clone()),
        (Data::Int(x), true) => Data::Float(
            x.iter()
                // Through f64 an i64 would be rounded twice.
                .map(|&x| match (dtype, rounding) {
                    (DType::F32, Rounding::PerOp) => f64::from(x as f32),
                    _ => x as f64,
                })
                .collect(),
        ),
        (Data::Int(x), false) => Data::Int(x.clone()),
        (Data::Float(x), false) => {
            let (low, high) = dtype.integer_range().unwrap_or((i64::MIN, i64::MAX));
            let truth = |x: f64| i64::from(x != 0.0);
            let bool = dtype == DType::Bool;
            Data::Int(
                x.iter()
                    .map(|&x| if bool { truth(x) } else { (x as i64).clamp(low, high) })
                    .collect(),
            )
        }
    }
}
