//! Matrix products.

use super::Results;
use super::shape::as_matrix;
use crate::build::broadcast_dims;
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::node::OnnxNode;
use qcompile_ir::{BinaryOp, Dim, Op, ReduceOp, Shape};

const PLAIN: Op = Op::Matmul { transpose_a: false, transpose_b: false };

pub(super) fn gemm(draft: &mut Draft, node: &OnnxNode) -> Results {
    let (a, b) = (node.input(0)?, node.input(1)?);
    let attributes = &node.attributes;
    let (transpose_a, transpose_b) =
        (attributes.flag("transA", false)?, attributes.flag("transB", false)?);
    let (alpha, beta) = (attributes.float("alpha", 1.0)?, attributes.float("beta", 1.0)?);
    if draft.rank(a) != 2 || draft.rank(b) != 2 {
        return Err(Obstacle::invalid(format!(
            "{} and {} are not matrices",
            draft.ty(a),
            draft.ty(b)
        )));
    }
    if !draft.dtype(a).is_float() {
        return Err(Obstacle::unsupported(format!("a product of {} elements", draft.dtype(a))));
    }
    let mut result = draft.emit_wide(Op::Matmul { transpose_a, transpose_b }, &[a, b])?;
    if alpha != 1.0 {
        result = draft.binary_scalar(BinaryOp::Mul, result, alpha)?;
    }
    if let Some(mut c) = node.optional(2) {
        if broadcast_dims(draft.dims(c), draft.dims(result))? != draft.dims(result) {
            return Err(Obstacle::invalid(format!(
                "{} does not broadcast to {}",
                draft.ty(c),
                draft.ty(result)
            )));
        }
        if beta != 1.0 {
            c = draft.binary_scalar(BinaryOp::Mul, c, beta)?;
        }
        result = draft.add(result, c)?;
    }
    Ok(vec![result])
}

pub(super) fn matmul(draft: &mut Draft, node: &OnnxNode) -> Results {
    let (a, b) = (node.input(0)?, node.input(1)?);
    let product = if draft.dtype(a).is_float() { product } else { elementwise_product };
    Ok(vec![numpy_product(draft, a, b, product)?])
}

/// A product of matrices as numpy has it of values of any rank.
pub(super) fn numpy_product(
    draft: &mut Draft,
    a: ValueId,
    b: ValueId,
    product: fn(&mut Draft, ValueId, ValueId) -> Result<ValueId, Obstacle>,
) -> Result<ValueId, Obstacle> {
    let (rank_a, rank_b) = (draft.rank(a), draft.rank(b));
    if rank_a == 0 || rank_b == 0 {
        return Err(Obstacle::invalid("an operand is a scalar"));
    }
    // As numpy: a vector is a row on the left, a column on the right, and its axis vanishes.
    let row = with_axis(draft, a, 0, rank_a == 1)?;
    let column = with_axis(draft, b, 1, rank_b == 1)?;
    let product = product(draft, row, column)?;
    let rank = draft.rank(product);
    let mut vanishing = Vec::new();
    if rank_a == 1 {
        vanishing.push(rank - 2);
    }
    if rank_b == 1 {
        vanishing.push(rank - 1);
    }
    draft.squeeze(product, &vanishing)
}

/// Most factors of the elements of a product of integers.
const FACTOR_LIMIT: usize = 1 << 26;

/// The product of matrices of integers, as a sum of products of elements.
fn elementwise_product(draft: &mut Draft, a: ValueId, b: ValueId) -> Result<ValueId, Obstacle> {
    let (rank_a, rank_b) = (draft.rank(a), draft.rank(b));
    if draft.dims(a)[rank_a - 1] != draft.dims(b)[rank_b - 2] || draft.dtype(a) != draft.dtype(b) {
        return Err(Obstacle::invalid(format!("{} and {} do not fit", draft.ty(a), draft.ty(b))));
    }
    let a = with_axis(draft, a, rank_a, true)?;
    let b = with_axis(draft, b, rank_b - 2, true)?;
    let factors = Shape(broadcast_dims(draft.dims(a), draft.dims(b))?).elements();
    if factors.is_none_or(|count| count.scale > FACTOR_LIMIT) {
        return Err(Obstacle::unsupported(format!(
            "a product of integers of {} and {}",
            draft.ty(a),
            draft.ty(b)
        )));
    }
    let factors = draft.mul(a, b)?;
    let axis = draft.rank(factors) - 2;
    let sum = draft.reduce(ReduceOp::Sum, factors, &[axis])?;
    draft.squeeze(sum, &[axis])
}

fn with_axis(
    draft: &mut Draft,
    x: ValueId,
    axis: usize,
    wanted: bool,
) -> Result<ValueId, Obstacle> {
    if !wanted {
        return Ok(x);
    }
    let mut dims = draft.dims(x).to_vec();
    dims.insert(axis, Dim::ONE);
    draft.reshape(x, &dims)
}

/// The product of values of rank at least 2.
pub(super) fn product(draft: &mut Draft, a: ValueId, b: ValueId) -> Result<ValueId, Obstacle> {
    let (dims_a, dims_b) = (draft.dims(a).to_vec(), draft.dims(b).to_vec());
    let (lead_a, [m, k]) = dims_a.split_at(dims_a.len() - 2) else {
        return Err(Obstacle::invalid("an operand is no matrix"));
    };
    let (lead_b, [inner, n]) = dims_b.split_at(dims_b.len() - 2) else {
        return Err(Obstacle::invalid("an operand is no matrix"));
    };
    if k != inner {
        return Err(Obstacle::invalid(format!("{} and {} do not fit", draft.ty(a), draft.ty(b))));
    }
    if lead_b.iter().all(|&dim| dim == Dim::ONE)
        && lead_b.len() <= lead_a.len()
        && !lead_a.is_empty()
    {
        // One matrix for all rows: a single two-dimensional product.
        let rows = as_matrix(draft, a, dims_a.len() - 1)?;
        let matrix = draft.reshape(b, &[*inner, *n])?;
        let flat = draft.emit_wide(PLAIN, &[rows, matrix])?;
        let mut dims = dims_a;
        if let Some(last) = dims.last_mut() {
            *last = *n;
        }
        return draft.reshape(flat, &dims);
    }
    let lead = broadcast_dims(lead_a, lead_b)?;
    let with = |[rows, columns]: [Dim; 2]| {
        let mut dims = lead.clone();
        dims.extend([rows, columns]);
        dims
    };
    let a = draft.broadcast(a, &with([*m, *k]))?;
    let b = draft.broadcast(b, &with([*inner, *n]))?;
    draft.emit_wide(PLAIN, &[a, b])
}
