//! Attention and its gradients: one row of scores after the other.

mod codes;

use super::elementwise::maximum;
use super::value::round_float;
use super::{Data, Rounding, Value};
use crate::{AttentionOperand, DType, GradientRounding};

/// Sizes and data of an attention, without a mask if it has none.
struct Attention<'a> {
    scale: f64,
    causal: bool,
    q: &'a Value,
    k: &'a Value,
    v: &'a Value,
    mask: Option<&'a Value>,
}

/// One row of queries and what it sees.
struct Row {
    /// Where the query begins.
    query: usize,
    /// Where its row of the result begins.
    result: usize,
    /// Where each key that it sees begins.
    keys: Vec<usize>,
    /// Where their values begin.
    values: Vec<usize>,
    /// The exponentials of its scores, from 0 to 1.
    powers: Vec<f64>,
    /// Their sum.
    sum: f64,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

impl Attention<'_> {
    fn each_row(&self, mut visit: impl FnMut(&Row)) {
        let [batches, rows, heads, _] = self.q.shape[..] else { return };
        for batch in 0..batches {
            for head in 0..heads {
                for row in 0..rows {
                    visit(&self.row([batch, head, row]));
                }
            }
        }
    }

    fn row(&self, [batch, head, row]: [usize; 3]) -> Row {
        let (q, k) = (&self.q.shape, &self.k.shape);
        let (width, value_width) = (q[3], self.v.shape[3]);
        let group = head / (q[2] / k[2]);
        let at_query = (batch * q[1] + row) * q[2] + head;
        let query = at_query * width;
        let seen = if self.causal { k[1].min(row + 1) } else { k[1] };
        let at = |key: usize| (batch * k[1] + key) * k[2] + group;
        let scores: Vec<f64> = (0..seen)
            .map(|key| {
                let q = &self.q.data.floats()[query..][..width];
                let k = &self.k.data.floats()[at(key) * width..][..width];
                dot(q, k) * self.scale + self.masked([batch, head, row, key])
            })
            .collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, maximum);
        let powers: Vec<f64> = scores.iter().map(|x| (x - largest).exp()).collect();
        let sum: f64 = powers.iter().sum();
        Row {
            query,
            result: at_query * value_width,
            keys: (0..seen).map(|key| at(key) * width).collect(),
            values: (0..seen).map(|key| at(key) * value_width).collect(),
            powers,
            sum,
        }
    }

    fn masked(&self, index: [usize; 4]) -> f64 {
        let Some(mask) = self.mask else { return 0.0 };
        let at = index
            .iter()
            .zip(&mask.shape)
            .fold(0, |at, (&index, &size)| at * size + if size == 1 { 0 } else { index });
        mask.data.floats()[at]
    }
}

/// What an exponential is in a product of `products`.
fn narrowed(power: f64, (products, rounding): (DType, Rounding)) -> f64 {
    match (products, rounding) {
        (DType::I8, Rounding::PerOp) => (power * 127.0).round_ties_even() / 127.0,
        (DType::BF16, _) => round_float(power, DType::BF16, rounding),
        _ => power,
    }
}

pub(super) fn attention(
    scale: f32,
    causal: bool,
    products: (DType, Rounding),
    operands: &[&Value],
    shape: &[usize],
) -> Data {
    let mut y = vec![0.0; shape.iter().product()];
    let [q, k, v, mask @ ..] = operands else { return Data::Float(y) };
    let mask = mask.first().copied();
    let width = shape[3];
    let attention = Attention { scale: f64::from(scale), causal, q, k, v, mask };
    attention.each_row(|row| {
        for (&power, &value) in row.powers.iter().zip(&row.values) {
            let p = narrowed(power, products) / row.sum;
            for column in 0..width {
                y[row.result + column] += p * v.data.floats()[value + column];
            }
        }
    });
    Data::Float(y)
}

/// With `dp = dy · v` and `ds = p (dp - Σ p dp)`: `dq = scale · ds k`, `dk = scale · dsᵀ q`, `dv = pᵀ dy`.
pub(super) fn gradient(
    of: AttentionOperand,
    scale: f32,
    causal: bool,
    (products, rounding): (DType, Rounding),
    gradients: GradientRounding,
    operands: &[&Value],
    shape: &[usize],
) -> Data {
    let round = |value| match products {
        DType::BF16 => round_float(value, DType::BF16, rounding),
        _ => value,
    };
    let mut gradient = vec![0.0; shape.iter().product()];
    let (operands, numbers) = match (gradients, operands) {
        (GradientRounding::Stochastic, [operands @ .., numbers]) => (operands, Some(*numbers)),
        _ => (operands, None),
    };
    let [q, k, v, mask @ .., dy] = operands else { return Data::Float(gradient) };
    let mask = mask.first().copied();
    let (width, value_width) = (q.shape[3], v.shape[3]);
    let scale = f64::from(scale);
    let attention = Attention { scale, causal, q, k, v, mask };
    if (products, rounding) == (DType::I8, Rounding::PerOp) {
        codes::gradient(of, &attention, dy, numbers, &mut gradient);
        return Data::Float(gradient);
    }
    let [queries, keys, values] = [q, k, v].map(|x| x.data.floats());
    attention.each_row(|row| {
        let probabilities: Vec<f64> = row.powers.iter().map(|power| power / row.sum).collect();
        let dy = &dy.data.floats()[row.result..][..value_width];
        if of == AttentionOperand::V {
            for (&p, &value) in probabilities.iter().zip(&row.values) {
                let p = round(p);
                for (column, dy) in dy.iter().enumerate() {
                    gradient[value + column] += p * dy;
                }
            }
            return;
        }
        let dp: Vec<f64> =
            row.values.iter().map(|&value| dot(dy, &values[value..][..value_width])).collect();
        let mean = dot(&probabilities, &dp);
        for ((&p, &dp), &key) in probabilities.iter().zip(&dp).zip(&row.keys) {
            let ds = round(p * (dp - mean) * scale);
            for column in 0..width {
                if of == AttentionOperand::Q {
                    gradient[row.query + column] += ds * keys[key + column];
                } else {
                    gradient[key + column] += ds * queries[row.query + column];
                }
            }
        }
    });
    Data::Float(gradient)
}
