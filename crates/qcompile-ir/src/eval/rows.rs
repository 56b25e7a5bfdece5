//! Reductions, softmax and cross-entropy.

use super::elementwise::maximum;
use super::rearrange::{positions, strides};
use super::{Data, Value};
use crate::{DType, ReduceOp};

/// The label of a row that has no loss.
const IGNORED: i64 = -100;

pub(super) fn reduce(
    op: ReduceOp,
    axes: &[usize],
    dtype: DType,
    x: &Value,
    shape: &[usize],
) -> Data {
    let mut into = strides(shape);
    for &axis in axes {
        into[axis] = 0;
    }
    let total = shape.iter().product();
    let places = positions(&x.shape, &into);
    match &x.data {
        Data::Float(values) => {
            let start = if op == ReduceOp::Sum { 0.0 } else { f64::NEG_INFINITY };
            let mut results = vec![start; total];
            for (at, &value) in places.zip(values) {
                results[at] = match op {
                    ReduceOp::Sum => results[at] + value,
                    ReduceOp::Max => maximum(results[at], value),
                };
            }
            Data::Float(results)
        }
        Data::Int(values) => {
            let smallest = dtype.integer_range().map_or(i64::MIN, |(smallest, _)| smallest);
            let start = if op == ReduceOp::Sum { 0 } else { smallest };
            let mut results = vec![start; total];
            for (at, &value) in places.zip(values) {
                results[at] = match op {
                    ReduceOp::Sum => results[at].wrapping_add(value),
                    ReduceOp::Max => results[at].max(value),
                };
            }
            Data::Int(results)
        }
    }
}

/// Each row of the last axis through `function`.
fn by_row(x: &Value, function: impl Fn(&[f64]) -> Vec<f64>) -> Data {
    let size = x.shape.last().copied().unwrap_or(1).max(1);
    Data::Float(x.data.floats().chunks(size).flat_map(function).collect())
}

/// The largest element of a row and the logarithm of the sum of exponentials of the distances to it.
fn log_sum(row: &[f64]) -> (f64, f64) {
    let largest = row.iter().copied().fold(f64::NEG_INFINITY, maximum);
    (largest, row.iter().map(|x| (x - largest).exp()).sum::<f64>().ln())
}

fn log_softmax_row(row: &[f64]) -> Vec<f64> {
    let (largest, log_sum) = log_sum(row);
    row.iter().map(|x| x - largest - log_sum).collect()
}

fn softmax_row(row: &[f64]) -> Vec<f64> {
    let largest = row.iter().copied().fold(f64::NEG_INFINITY, maximum);
    let powers: Vec<f64> = row.iter().map(|x| (x - largest).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.iter().map(|power| power / sum).collect()
}

pub(super) fn softmax(x: &Value) -> Data {
    by_row(x, softmax_row)
}

pub(super) fn log_softmax(x: &Value) -> Data {
    by_row(x, log_softmax_row)
}

/// Rows of logits with their class; `None` where the label says that there is no loss.
fn labelled<'a>(
    logits: &'a Value,
    label: &'a Value,
) -> impl Iterator<Item = Result<(&'a [f64], Option<usize>), String>> {
    let classes = logits.shape[1];
    label.data.ints().iter().enumerate().map(move |(row, &label)| {
        let logits = &logits.data.floats()[row * classes..(row + 1) * classes];
        if label == IGNORED {
            return Ok((logits, None));
        }
        match usize::try_from(label).ok().filter(|&class| class < classes) {
            Some(class) => Ok((logits, Some(class))),
            None => {
                Err(format!("label {label} of row {row} is out of range for {classes} classes"))
            }
        }
    })
}

pub(super) fn cross_entropy(logits: &Value, label: &Value) -> Result<Data, String> {
    let losses: Result<Vec<f64>, String> = labelled(logits, label)
        .map(|row| {
            let (row, class) = row?;
            Ok(class.map_or(0.0, |class| -log_softmax_row(row)[class]))
        })
        .collect();
    losses.map(Data::Float)
}

pub(super) fn cross_entropy_grad(
    logits: &Value,
    label: &Value,
    dloss: &Value,
) -> Result<Data, String> {
    let mut gradient = Vec::with_capacity(logits.data.len());
    for (row, &dloss) in labelled(logits, label).zip(dloss.data.floats()) {
        let (row, class) = row?;
        let Some(class) = class else {
            gradient.extend(row.iter().map(|_| 0.0));
            continue;
        };
        for (at, p) in softmax_row(row).into_iter().enumerate() {
            gradient.push((p - if at == class { 1.0 } else { 0.0 }) * dloss);
        }
    }
    Ok(Data::Float(gradient))
}
