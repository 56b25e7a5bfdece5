//! The gradients of attention in int8, block after block.
//!
//! With `e` the codes of the exponentials and `l` their unrounded sum, `dp = dy · v`, `ds = scale · e / l · (dp - Σ p dp)`:
//!
//! - `dy` meets `v` as two codes, the second of what the first leaves, both with a scale for each query;
//! - `ds` has a scale `s` for each query and block of keys: `dq = s · ds k`;
//! - over the queries of a block, `dk = dsᵀ (s · q)` and `dv = eᵀ (dy / l)`: what the codes multiply takes the scale of
//!   each query in, and is rounded by a scale for each column.
//!
//! With numbers for it, `ds`, `s · q` and `dy / l` are rounded at random; `dy` as two codes is near enough.

use super::super::Value;
use super::super::elementwise::maximum;
use super::{Attention, Row, dot};
use crate::{AttentionCodes, AttentionOperand, QuantizedRange, turned};

/// The scale of codes up to 127; not a number, or infinite, if one of the values is.
fn scale_of(values: impl Iterator<Item = f64>) -> f64 {
    maximum(values.map(f64::abs).fold(0.0, maximum) / 127.0, QuantizedRange::SMALLEST_SCALE)
}

/// The nearest code; by a scale that is not finite any, as its product with that is not a number.
fn code(x: f64, scale: f64) -> f64 {
    let code = (x / scale).round_ties_even().clamp(-127.0, 127.0);
    if scale.is_finite() { code } else { 0.0 }
}

/// The code below or above, so that the mean over numbers in [0, 1) is `x / scale`; the nearest without a number.
fn code_by(number: Option<f32>, x: f64, scale: f64) -> f64 {
    number
        .map_or_else(|| code(x, scale), |number| code(x + (f64::from(number) - 0.5) * scale, scale))
}

/// The two numbers of a query: of its gradients of scores, and of what is rounded by columns.
type Numbers = Option<[f32; 2]>;

/// A row of `dy` as the sum of two codes times their scales.
fn twice_rounded(dy: &[f64]) -> Vec<f64> {
    let scale = scale_of(dy.iter().copied());
    let fine = scale / f64::from(AttentionCodes::FINE_STEPS);
    let rounded = |&x: &f64| {
        let first = code(x, scale) * scale;
        first + code(x - first, fine) * fine
    };
    dy.iter().map(rounded).collect()
}

/// Rows with a scale for each column: what all rows are rounded to, each with the numbers of its query.
fn by_columns(rows: &[(Numbers, Vec<f64>)], width: usize) -> Vec<Vec<f64>> {
    let scales: Vec<f64> =
        (0..width).map(|column| scale_of(rows.iter().map(|(_, row)| row[column]))).collect();
    let rounded = |(numbers, row): &(Numbers, Vec<f64>)| {
        let of_column = |(column, (&x, &scale)): (usize, (&f64, &f64))| {
            code_by(numbers.map(|[_, number]| turned(number, column)), x, scale) * scale
        };
        row.iter().zip(&scales).enumerate().map(of_column).collect()
    };
    rows.iter().map(rounded).collect()
}

/// A query of a block, with its rounded exponentials and the codes of its gradients of scores for a block of keys.
struct Coded {
    row: Row,
    numbers: Numbers,
    powers: Vec<f64>,
    slopes: Vec<f64>,
    scale: f64,
}

pub(super) fn gradient(
    of: AttentionOperand,
    attention: &Attention<'_>,
    dy: &Value,
    numbers: Option<&Value>,
    gradient: &mut [f64],
) {
    let [batches, rows, heads, _] = attention.q.shape[..] else { return };
    let Some(&keys) = attention.k.shape.get(1) else { return };
    for batch in 0..batches {
        for head in 0..heads {
            for first in (0..rows).step_by(AttentionCodes::QUERIES) {
                let block = first..rows.min(first + AttentionCodes::QUERIES);
                for key in (0..keys).step_by(AttentionCodes::KEYS) {
                    let coded: Vec<Coded> = block
                        .clone()
                        .map(|row| {
                            let at = ((batch * rows + row) * heads + head) * 2;
                            let number =
                                |at: usize| numbers.map(|all| all.data.floats()[at] as f32);
                            let numbers = number(at).zip(number(at + 1)).map(|(a, b)| [a, b]);
                            coded(attention, dy, numbers, attention.row([batch, head, row]), key)
                        })
                        .collect();
                    add(of, attention, dy, &coded, key, gradient);
                }
            }
        }
    }
}

/// Codes of a query from `key` on.
fn coded(attention: &Attention<'_>, dy: &Value, numbers: Numbers, row: Row, key: usize) -> Coded {
    let width = attention.v.shape[3];
    let dy = twice_rounded(&dy.data.floats()[row.result..][..width]);
    let values = attention.v.data.floats();
    let dp: Vec<f64> =
        row.values.iter().map(|&value| dot(&dy, &values[value..][..width])).collect();
    let probabilities: Vec<f64> = row.powers.iter().map(|power| power / row.sum).collect();
    let mean = dot(&probabilities, &dp);
    let end = row.keys.len().min(key + AttentionCodes::KEYS);
    let block = key.min(end)..end;
    let slopes: Vec<f64> =
        block.clone().map(|key| probabilities[key] * (dp[key] - mean) * attention.scale).collect();
    let scale = scale_of(slopes.iter().copied());
    let of_key = |(key, ds): (usize, f64)| {
        code_by(numbers.map(|[number, _]| turned(number, key)), ds, scale)
    };
    let slopes = block.clone().zip(slopes).map(of_key).collect();
    let powers = block.map(|key| (row.powers[key] * 127.0).round_ties_even() / 127.0).collect();
    Coded { row, numbers, powers, slopes, scale }
}

/// Adds what a block of queries and keys gives.
fn add(
    of: AttentionOperand,
    attention: &Attention<'_>,
    dy: &Value,
    coded: &[Coded],
    key: usize,
    gradient: &mut [f64],
) {
    let (width, value_width) = (attention.q.shape[3], attention.v.shape[3]);
    let (keys, queries) = (attention.k.data.floats(), attention.q.data.floats());
    let longest = |one: &Coded| one.slopes.len();
    let seen = coded.iter().map(longest).max().unwrap_or(0);
    let Some(last) = coded.iter().find(|one| longest(one) == seen) else { return };
    match of {
        AttentionOperand::Q => {
            for one in coded {
                for (&ds, &key) in
                    one.slopes.iter().zip(&one.row.keys[key.min(one.row.keys.len())..])
                {
                    for column in 0..width {
                        gradient[one.row.query + column] += ds * one.scale * keys[key + column];
                    }
                }
            }
        }
        AttentionOperand::K => {
            let scaled = |one: &Coded| {
                let queries = &queries[one.row.query..][..width];
                (one.numbers, queries.iter().map(|q| q * one.scale).collect())
            };
            let right = by_columns(&coded.iter().map(scaled).collect::<Vec<_>>(), width);
            let places = last.row.keys.iter().skip(key).take(seen);
            add_over_queries(coded, |one| &one.slopes, &right, places, gradient);
        }
        AttentionOperand::V => {
            let dy = dy.data.floats();
            let scaled = |one: &Coded| {
                let dy = &dy[one.row.result..][..value_width];
                (one.numbers, dy.iter().map(|dy| dy / one.row.sum).collect())
            };
            let right = by_columns(&coded.iter().map(scaled).collect::<Vec<_>>(), value_width);
            let places = last.row.values.iter().skip(key).take(seen);
            add_over_queries(coded, |one| &one.powers, &right, places, gradient);
        }
    }
}

/// Adds what each query has for a key times what it multiplies, for the keys with these places in the gradient.
fn add_over_queries<'a>(
    coded: &[Coded],
    of_keys: impl Fn(&Coded) -> &[f64],
    right: &[Vec<f64>],
    places: impl Iterator<Item = &'a usize>,
    gradient: &mut [f64],
) {
    for (at, &to) in places.enumerate() {
        for (one, right) in coded.iter().zip(right) {
            let factor = of_keys(one).get(at).copied().unwrap_or(0.0);
            for (to, x) in gradient[to..].iter_mut().zip(right) {
                *to += factor * x;
            }
        }
    }
}
