//! Products of 8-bit integers whose results are integers, which are exact.

use super::Results;
use super::linear::{numpy_product, product};
use super::qlinear::convolution;
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::node::OnnxNode;
use qcompile_ir::{DType, Dim, Op, ReduceOp};

type Value = Result<ValueId, Obstacle>;

/// Products of two numbers below 256 that f32 adds exactly.
const EXACT_TERMS: usize = 256;
/// Most parts that a convolution is taken apart into.
const MOST_PARTS: usize = 1024;

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
