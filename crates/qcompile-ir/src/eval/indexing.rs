//! Ops that pick and place rows by index, and indices of what is largest.

use super::elementwise::maximum;
use super::rearrange::{around, pick};
use super::{Data, Value};
use crate::ScatterOp;
use std::cmp::Ordering;

/// The row of an index that may count from the end.
fn row(index: i64, rows: usize, place: usize) -> Result<usize, String> {
    let counted = if index < 0 { index.checked_add_unsigned(rows as u64) } else { Some(index) };
    counted
        .and_then(|row| usize::try_from(row).ok())
        .filter(|&row| row < rows)
        .ok_or_else(|| format!("index {index} at place {place} is out of range for {rows} rows"))
}

pub(super) fn gather(table: &Value, indices: &Value) -> Result<Data, String> {
    let (_, width) = around(&table.shape, 0);
    let mut places = Vec::with_capacity(indices.data.len() * width);
    for (place, &index) in indices.data.ints().iter().enumerate() {
        let row = row(index, table.shape[0], place)?;
        places.extend((0..width).map(|i| Some(row * width + i)));
    }
    Ok(pick(&table.data, places.into_iter(), 0.0))
}

pub(super) fn scatter(
    op: ScatterOp,
    indices: &Value,
    values: &Value,
    shape: &[usize],
) -> Result<Data, String> {
    let indices = indices.data.ints();
    Ok(match &values.data {
        Data::Float(values) => {
            let start = match op {
                ScatterOp::Add => 0.0,
                ScatterOp::Mul => 1.0,
                ScatterOp::Max => f64::NEG_INFINITY,
            };
            Data::Float(scattered(start, indices, values, shape, |a, b| match op {
                ScatterOp::Add => a + b,
                ScatterOp::Mul => a * b,
                ScatterOp::Max => maximum(a, b),
            })?)
        }
        Data::Int(values) => {
            let start = match op {
                ScatterOp::Add => 0,
                ScatterOp::Mul => 1,
                ScatterOp::Max => i64::MIN,
            };
            Data::Int(scattered(start, indices, values, shape, |a, b| match op {
                ScatterOp::Add => a.wrapping_add(b),
                ScatterOp::Mul => a.wrapping_mul(b),
                ScatterOp::Max => a.max(b),
            })?)
        }
    })
}

/// Rows of `start`, each combined with the values of its index in their order.
fn scattered<T: Copy>(
    start: T,
    indices: &[i64],
    values: &[T],
    shape: &[usize],
    combine: impl Fn(T, T) -> T,
) -> Result<Vec<T>, String> {
    let (_, width) = around(shape, 0);
    let mut results = vec![start; shape[0] * width];
    for (place, &index) in indices.iter().enumerate() {
        let row = row(index, shape[0], place)?;
        for i in 0..width {
            let result = &mut results[row * width + i];
            *result = combine(*result, values[place * width + i]);
        }
    }
    Ok(results)
}

pub(super) fn top_k(k: usize, largest: bool, x: &Value) -> Data {
    let size = x.shape.last().copied().unwrap_or(1);
    let mut results = Vec::new();
    for begin in (0..x.data.len()).step_by(size.max(1)) {
        let order = |a: usize, b: usize| match &x.data {
            Data::Int(values) => values[begin + a].cmp(&values[begin + b]),
            Data::Float(values) => by_size(values[begin + a], values[begin + b]),
        };
        let mut places: Vec<usize> = (0..size).collect();
        // Equal ones stay in order.
        places.sort_by(|&a, &b| if largest { order(b, a) } else { order(a, b) });
        results.extend(places[..k].iter().map(|&place| place as i64));
    }
    Data::Int(results)
}

/// By size, a NaN above all.
fn by_size(a: f64, b: f64) -> Ordering {
    a.partial_cmp(&b).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
}
