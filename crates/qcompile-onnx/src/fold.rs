//! Evaluation of ops whose operands are all known, N included: what shapes are computed with.

use crate::known::{Element, FOLD_LIMIT, Known, from_f64, wrapped};
use qcompile_ir::{BinaryOp, CompareOp, DType, Op, ReduceOp, TensorType, UnaryOp};

/// The value of `op` over known operands, whose result has type `ty`. `None` where it cannot be known (an unfoldable op, a
/// comparison that depends on N, a sum such as N + 1) or is too large.
pub(crate) fn fold(op: &Op, operands: &[&Known], ty: &TensorType) -> Option<Known> {
    let shape = ty.shape.as_fixed()?;
    let dtype = ty.dtype;
    let count = shape.iter().try_fold(1_usize, |count, &dim| count.checked_mul(dim))?;
    let uniform = operands.iter().all(|operand| operand.is_uniform());
    let elementwise = |element: &dyn Fn(usize) -> Option<Element>| {
        let computed = if uniform && count > 0 { 1 } else { count };
        bounded(computed)?;
        let elements: Option<Vec<Element>> = (0..computed).map(element).collect();
        Some(Known::new(dtype, shape.clone(), elements?))
    };
    // Element `at` of the result is an element of the first operand.
    let rearranged = |source: &dyn Fn(usize) -> usize| {
        let x = operands[0];
        if x.is_uniform() && count > 0 {
            return Some(Known { dtype, shape: shape.clone(), elements: x.elements.clone() });
        }
        bounded(count)?;
        let elements = (0..count).map(|at| x.get(source(at))).collect();
        Some(Known::new(dtype, shape.clone(), elements))
    };
    match op {
        Op::Unary(op) => elementwise(&|at| unary(*op, operands[0].get(at), dtype)),
        Op::Cast(_) => elementwise(&|at| cast(operands[0].get(at), dtype)),
        Op::Binary(op) => {
            elementwise(&|at| binary(*op, operands[0].get(at), operands[1].get(at), dtype))
        }
        Op::Compare(op) => {
            elementwise(&|at| compare(*op, operands[0].get(at), operands[1].get(at)))
        }
        Op::Select => elementwise(&|at| {
            let chosen = if operands[0].get(at).as_int()? != 0 { 1 } else { 2 };
            Some(operands[chosen].get(at))
        }),
        Op::Reshape(_) => {
            Some(Known { dtype, shape: shape.clone(), elements: operands[0].elements.clone() })
        }
        Op::Transpose(permutation) => {
            let strides = strides(&operands[0].shape);
            let strides: Vec<usize> = permutation.iter().map(|&axis| strides[axis]).collect();
            rearranged(&|at| offset(at, &shape, &strides))
        }
        Op::Broadcast(_) => {
            let from = &operands[0].shape;
            let mut steps = vec![0; shape.len() - from.len()];
            let own = strides(from);
            steps.extend(from.iter().zip(own).map(|(&dim, step)| if dim == 1 { 0 } else { step }));
            rearranged(&|at| offset(at, &shape, &steps))
        }
        Op::Slice { axis, start, step, .. } => {
            let mut steps = strides(&operands[0].shape);
            let first = steps[*axis] * start;
            steps[*axis] *= step;
            rearranged(&|at| first + offset(at, &shape, &steps))
        }
        Op::Concat { axis } => concat(*axis, operands, shape.clone(), dtype),
        Op::Gather => gather(operands[0], operands[1], shape.clone()),
        Op::Reduce { op, axes } => reduce(*op, axes, operands[0], shape.clone()),
        _ => None,
    }
}

fn bounded(count: usize) -> Option<()> {
    (count <= FOLD_LIMIT).then_some(())
}

fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1_usize; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis].saturating_mul(shape[axis]);
    }
    strides
}

/// Where element `at` of a row-major `shape` lies under other strides.
fn offset(mut at: usize, shape: &[usize], strides: &[usize]) -> usize {
    let mut offset = 0;
    for (dim, stride) in shape.iter().zip(strides).rev() {
        offset += at % dim * stride;
        at /= dim;
    }
    offset
}

#[allow(clippy::cast_precision_loss, reason = "float arithmetic is what is asked for")]
fn unary(op: UnaryOp, x: Element, dtype: DType) -> Option<Element> {
    let float = |value: f64| Some(from_f64(dtype, value));
    match (op, x) {
        (UnaryOp::StopGradient, x) => Some(x),
        (UnaryOp::Neg, Element::Int(x)) => Some(wrapped(dtype, x.wrapping_neg())),
        (UnaryOp::Abs, Element::Int(x)) => Some(wrapped(dtype, x.wrapping_abs())),
        (UnaryOp::Relu, Element::Int(x)) => Some(Element::Int(x.max(0))),
        (UnaryOp::Sign, Element::Int(x)) => Some(Element::Int(x.signum())),
        (UnaryOp::Not, Element::Int(x)) => Some(Element::Int(i64::from(x == 0))),
        (UnaryOp::Neg, Element::Batch(x)) => Some(Element::Batch(x.checked_neg()?)),
        (UnaryOp::Abs | UnaryOp::Relu, Element::Batch(x)) if x >= 0 => Some(Element::Batch(x)),
        (UnaryOp::Floor | UnaryOp::Ceil | UnaryOp::Round, Element::Batch(x)) => {
            Some(Element::Batch(x))
        }
        (UnaryOp::Neg, Element::Float(x)) => float(-x),
        (UnaryOp::Abs, Element::Float(x)) => float(x.abs()),
        (UnaryOp::Relu, Element::Float(x)) => float(x.max(0.0)),
        (UnaryOp::Sqrt, Element::Float(x)) => float(x.sqrt()),
        (UnaryOp::Reciprocal, Element::Float(x)) => float(x.recip()),
        (UnaryOp::Floor, Element::Float(x)) => float(x.floor()),
        (UnaryOp::Ceil, Element::Float(x)) => float(x.ceil()),
        (UnaryOp::Round, Element::Float(x)) => float(x.round_ties_even()),
        (UnaryOp::Exp, Element::Float(x)) => float(x.exp()),
        (UnaryOp::Log, Element::Float(x)) => float(x.ln()),
        (UnaryOp::Sin, Element::Float(x)) => float(x.sin()),
        (UnaryOp::Cos, Element::Float(x)) => float(x.cos()),
        (UnaryOp::Atan, Element::Float(x)) => float(x.atan()),
        _ => None,
    }
}

#[allow(clippy::cast_possible_truncation, reason = "ONNX truncates floats to integers")]
fn cast(x: Element, to: DType) -> Option<Element> {
    match x {
        Element::Batch(x) => (to != DType::Bool).then_some(Element::Batch(x)),
        Element::Int(x) if to.is_float() => Element::Int(x).as_f64().map(|x| from_f64(to, x)),
        Element::Int(x) => Some(wrapped(to, x)),
        Element::Float(x) => Some(from_f64(to, x)),
    }
}

fn binary(op: BinaryOp, a: Element, b: Element, dtype: DType) -> Option<Element> {
    match (a, b) {
        (Element::Int(a), Element::Int(b)) => int_binary(op, a, b).map(|x| wrapped(dtype, x)),
        (Element::Batch(_), _) | (_, Element::Batch(_)) => batch_binary(op, a, b, dtype),
        _ => {
            let (a, b) = (a.as_f64()?, b.as_f64()?);
            let value = match op {
                BinaryOp::Add => a + b,
                BinaryOp::Sub => a - b,
                BinaryOp::Mul => a * b,
                BinaryOp::Div => a / b,
                BinaryOp::Max => a.max(b),
                BinaryOp::Min => a.min(b),
                BinaryOp::Pow => a.powf(b),
                BinaryOp::And | BinaryOp::Or => return None,
            };
            Some(from_f64(dtype, value))
        }
    }
}

fn int_binary(op: BinaryOp, a: i64, b: i64) -> Option<i64> {
    Some(match op {
        BinaryOp::Add => a.wrapping_add(b),
        BinaryOp::Sub => a.wrapping_sub(b),
        BinaryOp::Mul => a.wrapping_mul(b),
        BinaryOp::Div => a.checked_div(b).unwrap_or(0),
        BinaryOp::Max => a.max(b),
        BinaryOp::Min => a.min(b),
        BinaryOp::Pow => a.wrapping_pow(u32::try_from(b).ok()?),
        BinaryOp::And => a & b,
        BinaryOp::Or => a | b,
    })
}

/// Arithmetic with multiples of N, which is at least 1.
#[allow(clippy::cast_possible_truncation, reason = "the float is known to be an integer")]
fn batch_binary(op: BinaryOp, a: Element, b: Element, dtype: DType) -> Option<Element> {
    // A float factor that is an integer keeps the result a multiple of N.
    let integral = |x: Element| match x {
        Element::Float(x) if x.fract() == 0.0 && x.abs() < 1e15 => Element::Int(x as i64),
        x => x,
    };
    let constant = |value: i64| {
        if dtype.is_float() {
            Element::Int(value).as_f64().map(Element::Float)
        } else {
            Some(Element::Int(value))
        }
    };
    match (op, integral(a), integral(b)) {
        (BinaryOp::Add, Element::Batch(a), Element::Batch(b)) => {
            a.checked_add(b).map(Element::Batch)
        }
        (BinaryOp::Sub, Element::Batch(a), Element::Batch(b)) if a == b => constant(0),
        (BinaryOp::Sub, Element::Batch(a), Element::Batch(b)) => {
            a.checked_sub(b).map(Element::Batch)
        }
        (BinaryOp::Add, Element::Batch(a), Element::Int(0))
        | (BinaryOp::Add, Element::Int(0), Element::Batch(a))
        | (BinaryOp::Sub, Element::Batch(a), Element::Int(0)) => Some(Element::Batch(a)),
        (BinaryOp::Mul, Element::Batch(_), Element::Int(0))
        | (BinaryOp::Mul, Element::Int(0), Element::Batch(_)) => constant(0),
        (BinaryOp::Mul, Element::Batch(a), Element::Int(b))
        | (BinaryOp::Mul, Element::Int(a), Element::Batch(b)) => {
            a.checked_mul(b).map(Element::Batch)
        }
        (BinaryOp::Div, Element::Batch(a), Element::Int(b)) if b != 0 && a % b == 0 => {
            Some(Element::Batch(a / b))
        }
        (BinaryOp::Div, Element::Batch(a), Element::Batch(b)) if b != 0 && a % b == 0 => {
            constant(a / b)
        }
        (BinaryOp::Max, Element::Batch(a), Element::Batch(b)) => Some(Element::Batch(a.max(b))),
        (BinaryOp::Min, Element::Batch(a), Element::Batch(b)) => Some(Element::Batch(a.min(b))),
        (BinaryOp::Max, Element::Batch(a), Element::Int(b))
        | (BinaryOp::Max, Element::Int(b), Element::Batch(a))
            if b <= a =>
        {
            Some(Element::Batch(a))
        }
        (BinaryOp::Min, Element::Batch(a), Element::Int(b))
        | (BinaryOp::Min, Element::Int(b), Element::Batch(a))
            if b <= a =>
        {
            constant(b)
        }
        _ => None,
    }
}

fn compare(op: CompareOp, a: Element, b: Element) -> Option<Element> {
    use std::cmp::Ordering::{Equal, Greater, Less};
    let order = match (a, b) {
        (Element::Int(a), Element::Int(b)) => Some(a.cmp(&b)),
        (Element::Batch(a), Element::Batch(b)) => Some(a.cmp(&b)),
        // N is at least 1, so a·N > b if a > b and a is positive; otherwise it depends on N.
        (Element::Batch(a), Element::Int(b)) if a > 0 && a > b => Some(Greater),
        (Element::Int(a), Element::Batch(b)) if b > 0 && b > a => Some(Less),
        (Element::Batch(_), _) | (_, Element::Batch(_)) => return None,
        _ => a.as_f64()?.partial_cmp(&b.as_f64()?),
    };
    let holds = match op {
        CompareOp::Equal => order == Some(Equal),
        CompareOp::Less => order == Some(Less),
        CompareOp::LessEqual => matches!(order, Some(Less | Equal)),
    };
    Some(Element::Int(i64::from(holds)))
}

fn concat(axis: usize, operands: &[&Known], shape: Vec<usize>, dtype: DType) -> Option<Known> {
    let count = shape.iter().try_fold(1_usize, |count, &dim| count.checked_mul(dim))?;
    bounded(count)?;
    let outer: usize = shape[..axis].iter().product();
    let inner: usize = shape[axis + 1..].iter().product();
    let mut elements = Vec::with_capacity(count);
    if count > 0 {
        for row in 0..outer {
            for operand in operands {
                let run = operand.shape[axis] * inner;
                elements.extend((row * run..(row + 1) * run).map(|at| operand.get(at)));
            }
        }
    }
    Some(Known::new(dtype, shape, elements))
}

fn gather(table: &Known, indices: &Known, shape: Vec<usize>) -> Option<Known> {
    let rows = i64::try_from(*table.shape.first()?).ok()?;
    let row: usize = table.shape[1..].iter().product();
    let taken = indices.len()?;
    bounded(taken.checked_mul(row)?)?;
    let mut elements = Vec::with_capacity(taken * row);
    for at in 0..taken {
        let index = indices.get(at).as_int()?;
        let index = if index < 0 { index.checked_add(rows)? } else { index };
        let first = usize::try_from(index).ok().filter(|_| index < rows)? * row;
        elements.extend((first..first + row).map(|at| table.get(at)));
    }
    Some(Known::new(table.dtype, shape, elements))
}

fn reduce(op: ReduceOp, axes: &[usize], x: &Known, shape: Vec<usize>) -> Option<Known> {
    let count = x.len()?;
    bounded(count)?;
    if count == 0 {
        return None;
    }
    let mut steps = strides(&shape);
    for &axis in axes {
        steps[axis] = 0;
    }
    let mut elements: Vec<Option<Element>> = vec![None; shape.iter().product()];
    let combine = match op {
        ReduceOp::Sum => BinaryOp::Add,
        ReduceOp::Max => BinaryOp::Max,
    };
    for at in 0..count {
        let slot = &mut elements[offset(at, &x.shape, &steps)];
        *slot = Some(match *slot {
            None => x.get(at),
            Some(so_far) => binary(combine, so_far, x.get(at), x.dtype)?,
        });
    }
    let elements: Option<Vec<Element>> = elements.into_iter().collect();
    Some(Known::new(x.dtype, shape, elements?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcompile_ir::infer;

    fn fold_op(op: &Op, operands: &[&Known]) -> Option<Known> {
        let types: Vec<TensorType> = operands.iter().map(|known| known.ty()).collect();
        let ty = infer(op, &types.iter().collect::<Vec<_>>()).expect("fits");
        fold(op, operands, &ty)
    }

    #[test]
    fn shapes_fold_with_the_batch_inside() {
        let shape = Known::ints(vec![Element::Batch(1), Element::Int(128), Element::Int(256)]);
        let first =
            fold_op(&Op::Slice { axis: 0, start: 0, end: 1, step: 1 }, &[&shape]).expect("known");
        let heads = Known::ints(vec![Element::Int(4)]);
        let product = fold_op(&Op::Binary(BinaryOp::Mul), &[&first, &heads]).expect("a multiple");
        assert_eq!(product, Known::ints(vec![Element::Batch(4)]));
        let both = fold_op(&Op::Concat { axis: 0 }, &[&product, &heads]).expect("known");
        assert_eq!(both, Known::ints(vec![Element::Batch(4), Element::Int(4)]));
        assert_eq!(fold_op(&Op::Binary(BinaryOp::Add), &[&product, &heads]), None);
    }

    #[test]
    fn transposition_and_reduction_follow_strides() {
        let ints = |values: &[i64]| values.iter().map(|&x| Element::Int(x)).collect::<Vec<_>>();
        let x = Known::new(DType::I64, vec![2, 3], ints(&[1, 2, 3, 4, 5, 6]));
        let y = fold_op(&Op::Transpose(vec![1, 0]), &[&x]).expect("known");
        assert_eq!(y, Known::new(DType::I64, vec![3, 2], ints(&[1, 4, 2, 5, 3, 6])));
        let sum = Op::Reduce { op: ReduceOp::Sum, axes: vec![0] };
        assert_eq!(fold_op(&sum, &[&x]).expect("known").elements[..], ints(&[5, 7, 9])[..]);
    }
}
