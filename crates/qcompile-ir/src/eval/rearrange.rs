//! Ops that move elements: transpose, broadcast, slice, pad, concat.

use super::{Data, Value};
use crate::DType;

/// The elements at these positions; `None` takes `fill`.
pub(super) fn pick(data: &Data, positions: impl Iterator<Item = Option<usize>>, fill: f64) -> Data {
    match data {
        Data::Float(values) => {
            Data::Float(positions.map(|at| at.map_or(fill, |at| values[at])).collect())
        }
        Data::Int(values) => {
            Data::Int(positions.map(|at| at.map_or(fill as i64, |at| values[at])).collect())
        }
    }
}

/// Row-major distances between neighbours along each axis.
pub(super) fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis];
    }
    strides
}

/// For each place of `shape` in row-major order, the sum of index times stride.
pub(super) fn positions(shape: &[usize], strides: &[usize]) -> impl Iterator<Item = usize> {
    let total: usize = shape.iter().product();
    let axes: Vec<(usize, usize)> = shape.iter().copied().zip(strides.iter().copied()).collect();
    (0..total).map(move |flat| {
        let mut rest = flat;
        let mut position = 0;
        for &(size, stride) in axes.iter().rev() {
            position += rest % size * stride;
            rest /= size;
        }
        position
    })
}

/// Products of the sizes before and after an axis.
pub(super) fn around(shape: &[usize], axis: usize) -> (usize, usize) {
    (shape[..axis].iter().product(), shape[axis + 1..].iter().product())
}

pub(super) fn transpose(permutation: &[usize], x: &Value, shape: &[usize]) -> Data {
    let own = strides(&x.shape);
    let moved: Vec<usize> = permutation.iter().map(|&axis| own[axis]).collect();
    pick(&x.data, positions(shape, &moved).map(Some), 0.0)
}

pub(super) fn broadcast(x: &Value, shape: &[usize]) -> Data {
    let own = strides(&x.shape);
    let missing = shape.len() - x.shape.len();
    let repeated: Vec<usize> = (0..shape.len())
        .map(|axis| match axis.checked_sub(missing) {
            Some(own_axis) if x.shape[own_axis] != 1 => own[own_axis],
            _ => 0,
        })
        .collect();
    pick(&x.data, positions(shape, &repeated).map(Some), 0.0)
}

/// Maps every place of `shape` through a function of its index along `axis` to the index in `x`.
fn along(
    axis: usize,
    x: &Value,
    shape: &[usize],
    fill: f64,
    index: impl Fn(usize) -> Option<usize>,
) -> Data {
    let (outer, inner) = around(shape, axis);
    let total = outer * shape[axis] * inner;
    let mut places = Vec::with_capacity(total);
    // Without elements there may still be very many rows of none.
    for o in 0..if total == 0 { 0 } else { outer } {
        for k in 0..shape[axis] {
            let row = index(k).map(|k| (o * x.shape[axis] + k) * inner);
            places.extend((0..inner).map(|i| row.map(|row| row + i)));
        }
    }
    pick(&x.data, places.into_iter(), fill)
}

pub(super) fn slice(axis: usize, start: usize, step: usize, x: &Value, shape: &[usize]) -> Data {
    along(axis, x, shape, 0.0, |k| Some(start + k * step))
}

pub(super) fn pad(
    axis: usize,
    low: usize,
    interior: usize,
    value: f64,
    dtype: DType,
    x: &Value,
    shape: &[usize],
) -> Data {
    let size = x.shape[axis];
    let fill = if dtype == DType::Bool { f64::from(u8::from(value != 0.0)) } else { value };
    along(axis, x, shape, fill, |k| {
        let k = k.checked_sub(low)?;
        let (index, between) = (k / interior.saturating_add(1), k % interior.saturating_add(1));
        (between == 0 && index < size).then_some(index)
    })
}

pub(super) fn concat(axis: usize, operands: &[&Value], shape: &[usize]) -> Data {
    let (outer, inner) = around(shape, axis);
    let mut floats = Vec::new();
    let mut ints = Vec::new();
    for o in 0..if shape.contains(&0) { 0 } else { outer } {
        for x in operands {
            let part = x.shape[axis] * inner;
            match &x.data {
                Data::Float(values) => floats.extend_from_slice(&values[o * part..(o + 1) * part]),
                Data::Int(values) => ints.extend_from_slice(&values[o * part..(o + 1) * part]),
            }
        }
    }
    if matches!(operands[0].data, Data::Float(_)) { Data::Float(floats) } else { Data::Int(ints) }
}
