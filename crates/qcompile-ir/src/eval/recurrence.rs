//! Recurrent layers, step by step and row by row.

use super::value::round_float;
use super::{Data, Rounding, Value};
use crate::{
    Activation, ActivationOp, Cell, DType, GradientRounding, QuantizedRange, Recurrence, turned,
};
use std::borrow::Cow;

/// A number as a product reads it, by the scale of its codes if it has some. Rounded even where floats stay exact: it is
/// what the op does.
fn entered(products: Option<DType>, x: f64, scale: f64) -> f64 {
    match products {
        Some(DType::I8) => {
            let code = (f64::from((x / scale) as f32)).round_ties_even().clamp(-127.0, 127.0);
            // NaN becomes 0.
            if code.is_nan() { 0.0 } else { code * scale }
        }
        Some(dtype) => round_float(f64::from(x as f32), dtype, Rounding::PerOp),
        None => x,
    }
}

/// The scale of the codes of these, by the largest that is a number.
fn scale_of(values: impl Iterator<Item = f64>) -> f64 {
    let amax = values.fold(0.0, |amax: f64, x| amax.max(x.abs()));
    f64::from((amax as f32 / 127.0).max(QuantizedRange::SMALLEST_SCALE as f32))
}

/// What the sums of a product with R run over, so that codes have no scale for each of it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Summed {
    /// Forward, of a state.
    Columns,
    /// On the way back, of a gate.
    Rows,
}

/// R as the products read it: codes have a scale for each row, or for each column of a gate.
fn weight(products: Option<DType>, r: &[f64], hidden: usize, summed: Summed) -> Cow<'_, [f64]> {
    if products.is_none() {
        return Cow::Borrowed(r);
    }
    let gate = |gate: &[f64]| {
        let scale = |at: usize| match summed {
            Summed::Columns => scale_of(gate[at * hidden..][..hidden].iter().copied()),
            Summed::Rows => scale_of(gate.iter().skip(at).step_by(hidden).copied()),
        };
        let scales: Vec<f64> = (0..hidden).map(scale).collect();
        let rounded = |(at, &x): (usize, &f64)| {
            let line = if summed == Summed::Columns { at / hidden } else { at % hidden };
            entered(products, x, scales[line])
        };
        gate.iter().enumerate().map(rounded).collect::<Vec<_>>()
    };
    Cow::Owned(r.chunks_exact(hidden * hidden).flat_map(gate).collect())
}

/// The function at `x`.
fn activate(activation: Activation, x: f64) -> f64 {
    let (alpha, beta) = (f64::from(activation.alpha), f64::from(activation.beta));
    match activation.function {
        ActivationOp::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        ActivationOp::Tanh => x.tanh(),
        ActivationOp::Relu if x < 0.0 => 0.0,
        ActivationOp::Relu => x,
        ActivationOp::Affine => alpha * x + beta,
        ActivationOp::LeakyRelu if x < 0.0 => alpha * x,
        ActivationOp::LeakyRelu => x,
        ActivationOp::ThresholdedRelu if x <= alpha => 0.0,
        ActivationOp::ThresholdedRelu => x,
        ActivationOp::ScaledTanh => alpha * (beta * x).tanh(),
        ActivationOp::HardSigmoid => (alpha * x + beta).clamp(0.0, 1.0),
        ActivationOp::Elu if x < 0.0 => alpha * x.exp_m1(),
        ActivationOp::Elu => x,
        ActivationOp::Softsign => x / (1.0 + x.abs()),
        ActivationOp::Softplus => x.max(0.0) + (-x.abs()).exp().ln_1p(),
    }
}

/// The derivative where the function is `y`.
fn slope(activation: Activation, y: f64) -> f64 {
    let (alpha, beta) = (f64::from(activation.alpha), f64::from(activation.beta));
    let step = |above: bool, low: f64| if above { 1.0 } else { low };
    match activation.function {
        ActivationOp::Sigmoid => y * (1.0 - y),
        ActivationOp::Tanh => 1.0 - y * y,
        ActivationOp::Relu => step(y > 0.0, 0.0),
        ActivationOp::Affine => alpha,
        ActivationOp::LeakyRelu => step(y >= 0.0, alpha),
        ActivationOp::ThresholdedRelu => step(y != 0.0, 0.0),
        ActivationOp::ScaledTanh => beta * (alpha - y * y / alpha),
        ActivationOp::HardSigmoid => alpha * step(y > 0.0 && y < 1.0, 0.0),
        ActivationOp::Elu => step(y >= 0.0, y + alpha),
        ActivationOp::Softsign => (1.0 - y.abs()).powi(2),
        ActivationOp::Softplus => 1.0 - (-y).exp(),
    }
}

/// Sizes and optional operands of a recurrence.
struct Layer<'a> {
    recurrence: &'a Recurrence,
    steps: usize,
    batch: usize,
    hidden: usize,
    /// As the products read it.
    r: Cow<'a, [f64]>,
    peepholes: Option<&'a [f64]>,
    lengths: Option<&'a [i64]>,
    /// How the result of the forward op is kept.
    kept: (DType, Rounding),
}

impl Layer<'_> {
    /// The steps in the order in which they run, each with the rows of the state before and after it.
    fn order(&self) -> Vec<(usize, usize, usize)> {
        let steps = 0..self.steps;
        if self.recurrence.reverse {
            steps.rev().map(|t| (t, t + 1, t)).collect()
        } else {
            steps.map(|t| (t, t, t + 1)).collect()
        }
    }

    /// Whether a row of the batch has this step.
    fn runs(&self, step: usize, row: usize) -> bool {
        self.lengths.is_none_or(|lengths| (step as i64) < lengths[row])
    }

    /// Element of a section of the result of the forward op.
    fn at(&self, section: usize, t: usize, row: usize, unit: usize) -> usize {
        ((section * (self.steps + 1) + t) * self.batch + row) * self.hidden + unit
    }

    fn peephole(&self, which: usize, unit: usize) -> f64 {
        self.peepholes.map_or(0.0, |peepholes| peepholes[which * self.hidden + unit])
    }

    /// A state as a product reads it.
    fn entered(&self, x: f64) -> f64 {
        entered(self.recurrence.products, x, f64::from(Recurrence::STATE_SCALE))
    }

    /// `d R` of a row of a gate's gradient: codes have a scale for each, and give nothing where one of them is infinite or
    /// no number. With a number they are rounded at random.
    fn back(&self, d: &[f64], gate: usize, number: Option<f32>) -> Vec<f64> {
        let codes = self.recurrence.products == Some(DType::I8);
        if codes && !d.iter().all(|d| d.is_finite()) {
            return vec![f64::NAN; self.hidden];
        }
        let scale = if codes { scale_of(d.iter().copied()) } else { 1.0 };
        let noise =
            |unit: usize| number.map_or(0.0, |number| f64::from(turned(number, unit)) - 0.5);
        let of_unit = |(unit, &d): (usize, &f64)| {
            entered(self.recurrence.products, d + noise(unit) * scale, scale)
        };
        let d: Vec<f64> = d.iter().enumerate().map(of_unit).collect();
        let r = |k: usize, j: usize| self.r[(gate * self.hidden + k) * self.hidden + j];
        (0..self.hidden).map(|j| d.iter().enumerate().map(|(k, d)| d * r(k, j)).sum()).collect()
    }

    /// `(h Rᵀ)` of one unit of one gate.
    fn product(&self, h: impl Fn(usize) -> f64, gate: usize, unit: usize) -> f64 {
        let row = (gate * self.hidden + unit) * self.hidden;
        (0..self.hidden).map(|k| self.entered(h(k)) * self.r[row + k]).sum()
    }

    fn clipped(&self, x: f64) -> f64 {
        self.recurrence.clip.map_or(x, |clip| x.clamp(-f64::from(clip), f64::from(clip)))
    }

    fn activated(&self, which: usize, x: f64) -> f64 {
        activate(self.recurrence.activations[which], self.clipped(x))
    }

    /// The derivative of a gate by what was clipped and activated.
    fn gate_slope(&self, which: usize, y: f64) -> f64 {
        let activation = self.recurrence.activations[which];
        // Gates were rounded when they were kept, so the ends of their range are, too.
        let inside = self.recurrence.clip.is_none_or(|clip| {
            let end =
                |x: f32| round_float(activate(activation, f64::from(x)), self.kept.0, self.kept.1);
            y > end(-clip) && y < end(clip)
        });
        if inside { slope(activation, y) } else { 0.0 }
    }
}

fn layer<'a>(
    recurrence: &'a Recurrence,
    sizes: [usize; 3],
    operands: &[&'a Value],
    peepholes: Option<usize>,
    lengths: Option<usize>,
    kept: (DType, Rounding),
    summed: Summed,
) -> Layer<'a> {
    let [steps, batch, hidden] = sizes;
    Layer {
        recurrence,
        steps,
        batch,
        hidden,
        r: weight(recurrence.products, operands[1].data.floats(), hidden, summed),
        peepholes: peepholes.map(|at| operands[at].data.floats()),
        lengths: lengths.map(|at| operands[at].data.ints()),
        kept,
    }
}

pub(super) fn recurrence(
    recurrence: &Recurrence,
    kept: (DType, Rounding),
    operands: &[&Value],
    shape: &[usize],
) -> Data {
    // Any number of steps of nothing is nothing.
    if shape.contains(&0) {
        return Data::Float(Vec::new());
    }
    let at = recurrence.operands();
    let [_, rows, batch, hidden] = shape[..] else { return Data::Float(Vec::new()) };
    let sizes = [rows - 1, batch, hidden];
    let layer = layer(recurrence, sizes, operands, at.peepholes, at.lengths, kept, Summed::Columns);
    let x = operands[0].data.floats();
    let bias = at.bias.map(|at| operands[at].data.floats());
    let gates = recurrence.cell.gates();
    let mut y = vec![0.0; shape.iter().product()];
    let first = if recurrence.reverse { layer.steps } else { 0 };
    for (state, operand) in [(0, Some(2)), (1, at.cell)] {
        let Some(operand) = operand else { continue };
        let from = operands[operand].data.floats();
        y[layer.at(state, first, 0, 0)..][..batch * hidden].copy_from_slice(from);
    }
    for (t, before, after) in layer.order() {
        for row in 0..batch {
            if !layer.runs(t, row) {
                for state in 0..recurrence.cell.states() {
                    for j in 0..hidden {
                        y[layer.at(state, after, row, j)] = y[layer.at(state, before, row, j)];
                    }
                }
                continue;
            }
            let input = |gate: usize, j: usize| x[((t * batch + row) * gates + gate) * hidden + j];
            // Every gate's product of the state before, while that is all there is.
            let h: Vec<f64> = (0..hidden).map(|k| y[layer.at(0, before, row, k)]).collect();
            let sum = |gate: usize, j: usize| input(gate, j) + layer.product(|k| h[k], gate, j);
            match recurrence.cell {
                Cell::Rnn => {
                    for j in 0..hidden {
                        y[layer.at(0, after, row, j)] = layer.activated(0, sum(0, j));
                    }
                }
                Cell::Lstm => {
                    for j in 0..hidden {
                        let c = y[layer.at(1, before, row, j)];
                        let i = layer.activated(0, sum(0, j) + layer.peephole(0, j) * c);
                        let f = if recurrence.input_forget {
                            1.0 - i
                        } else {
                            layer.activated(0, sum(2, j) + layer.peephole(2, j) * c)
                        };
                        let g = layer.activated(1, sum(3, j));
                        let next = f * c + i * g;
                        let o = layer.activated(0, sum(1, j) + layer.peephole(1, j) * next);
                        let h = o * activate(recurrence.activations[2], next);
                        for (section, value) in [h, next].into_iter().enumerate() {
                            y[layer.at(section, after, row, j)] = value;
                        }
                        for (section, value) in [i, o, f, g].into_iter().enumerate() {
                            y[layer.at(2 + section, t, row, j)] = value;
                        }
                    }
                }
                Cell::Gru | Cell::LinearGru => {
                    let z: Vec<f64> = (0..hidden).map(|j| layer.activated(0, sum(0, j))).collect();
                    let r: Vec<f64> = (0..hidden).map(|j| layer.activated(0, sum(1, j))).collect();
                    for j in 0..hidden {
                        let inner = match bias {
                            Some(bias) => {
                                let inner = layer.product(|k| h[k], 2, j) + bias[j];
                                y[layer.at(4, t, row, j)] = inner;
                                r[j] * inner
                            }
                            None => layer.product(|k| r[k] * h[k], 2, j),
                        };
                        let n = layer.activated(1, input(2, j) + inner);
                        y[layer.at(0, after, row, j)] = (1.0 - z[j]) * n + z[j] * h[j];
                        for (section, value) in [z[j], r[j], n].into_iter().enumerate() {
                            y[layer.at(1 + section, t, row, j)] = value;
                        }
                    }
                }
            }
        }
    }
    Data::Float(y)
}

pub(super) fn recurrence_grad(
    recurrence: &Recurrence,
    cell: bool,
    rounding: GradientRounding,
    kept: (DType, Rounding),
    operands: &[&Value],
    shape: &[usize],
) -> Data {
    if shape.contains(&0) {
        return Data::Float(Vec::new());
    }
    let at = recurrence.gradient_operands(cell, rounding);
    let numbers = at.numbers.map(|at| operands[at].data.floats());
    let (y, dh) = (operands[0].data.floats(), operands[2].data.floats());
    let dc = at.cell.map(|at| operands[at].data.floats());
    let [rows, batch, columns] = shape[..] else { return Data::Float(Vec::new()) };
    let hidden = columns / recurrence.cell.gradients();
    let sizes = [rows - 1, batch, hidden];
    let layer = layer(recurrence, sizes, operands, at.peepholes, at.lengths, kept, Summed::Rows);
    let mut dx = vec![0.0; rows * batch * columns];
    for row in 0..batch {
        let (mut carry, mut cell_carry) = (vec![0.0; hidden], vec![0.0; hidden]);
        for (t, before, after) in layer.order().into_iter().rev() {
            for j in 0..hidden {
                let at = (t * batch + row) * hidden + j;
                carry[j] += dh[at];
                cell_carry[j] += dc.map_or(0.0, |dc| dc[at]);
            }
            if !layer.runs(t, row) {
                continue;
            }
            let state = |section, j| y[layer.at(section, before, row, j)];
            let gate = |section, j| y[layer.at(section, t, row, j)];
            // The gradient of a gate's product in turn, of the state before by its own path, and of r·h of a GRU.
            let mut gates = vec![vec![0.0; hidden]; recurrence.cell.gradients()];
            let mut next = vec![0.0; hidden];
            let number = |gradient: usize| {
                let at = (row * layer.steps + t) * recurrence.cell.gradients() + gradient;
                numbers.map(|numbers| numbers[at] as f32)
            };
            let add = |next: &mut [f64], d: Vec<f64>| {
                next.iter_mut().zip(d).for_each(|(next, d)| *next += d);
            };
            match recurrence.cell {
                Cell::Rnn => {
                    for j in 0..hidden {
                        let h = y[layer.at(0, after, row, j)];
                        gates[0][j] = carry[j] * layer.gate_slope(0, h);
                    }
                    add(&mut next, layer.back(&gates[0], 0, number(0)));
                }
                Cell::Lstm => {
                    for j in 0..hidden {
                        let (i, o, f, g) = (gate(2, j), gate(3, j), gate(4, j), gate(5, j));
                        let c = y[layer.at(1, after, row, j)];
                        let a = activate(recurrence.activations[2], c);
                        let d_o = carry[j] * a * layer.gate_slope(0, o);
                        let d_c = cell_carry[j]
                            + carry[j] * o * slope(recurrence.activations[2], a)
                            + d_o * layer.peephole(1, j);
                        let (d_i, d_f) = (d_c * g, d_c * state(1, j));
                        let (d_i, d_f) = if recurrence.input_forget {
                            ((d_i - d_f) * layer.gate_slope(0, i), 0.0)
                        } else {
                            (d_i * layer.gate_slope(0, i), d_f * layer.gate_slope(0, f))
                        };
                        let d_g = d_c * i * layer.gate_slope(1, g);
                        let parts = [d_i, d_o, d_f, d_g];
                        gates.iter_mut().zip(parts).for_each(|(gate, part)| gate[j] = part);
                        cell_carry[j] =
                            d_c * f + d_i * layer.peephole(0, j) + d_f * layer.peephole(2, j);
                    }
                    for (gate, d) in gates.iter().enumerate() {
                        add(&mut next, layer.back(d, gate, number(gate)));
                    }
                }
                Cell::Gru | Cell::LinearGru => {
                    let linear = recurrence.cell == Cell::LinearGru;
                    for j in 0..hidden {
                        let (z, n) = (gate(1, j), gate(3, j));
                        gates[0][j] = carry[j] * (state(0, j) - n) * layer.gate_slope(0, z);
                        gates[2][j] = carry[j] * (1.0 - z) * layer.gate_slope(1, n);
                        next[j] = carry[j] * z;
                    }
                    let d_rh =
                        if linear { Vec::new() } else { layer.back(&gates[2], 2, number(2)) };
                    for (j, next) in next.iter_mut().enumerate() {
                        let r = gate(2, j);
                        if linear {
                            gates[1][j] = gates[2][j] * gate(4, j) * layer.gate_slope(0, r);
                            gates[3][j] = gates[2][j] * r;
                        } else {
                            gates[1][j] = d_rh[j] * state(0, j) * layer.gate_slope(0, r);
                            *next += d_rh[j] * r;
                        }
                    }
                    add(&mut next, layer.back(&gates[0], 0, number(0)));
                    add(&mut next, layer.back(&gates[1], 1, number(1)));
                    if linear {
                        add(&mut next, layer.back(&gates[3], 2, number(3)));
                    }
                }
            }
            for (gate, values) in gates.iter().enumerate() {
                dx[(t * batch + row) * columns + gate * hidden..][..hidden].copy_from_slice(values);
            }
            carry = next;
        }
        let last = (layer.steps * batch + row) * columns;
        dx[last..][..hidden].copy_from_slice(&carry);
        if recurrence.cell == Cell::Lstm {
            dx[last + hidden..][..hidden].copy_from_slice(&cell_carry);
        }
    }
    Data::Float(dx)
}
