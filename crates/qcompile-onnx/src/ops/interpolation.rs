//! Elements of one axis as weighted sums of others: what resizing does along each axis.

use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use qcompile_ir::{BinaryOp, DType, Dim, Op, Tensor};
use std::sync::Arc;

type Value = Result<ValueId, Obstacle>;

/// Weights that one axis may have.
pub(super) const WEIGHT_LIMIT: usize = 1 << 24;

/// Elements of a matrix of weights. Beyond, elements are gathered.
const MATRIX_LIMIT: usize = 1 << 20;

/// Nodes that an axis may be put together from.
const NODE_LIMIT: usize = 64;

/// Copies of its first and last element that an axis may be extended by.
const EDGE_LIMIT: usize = 16;

/// How the elements of a new axis are made from those of an axis.
pub(super) struct Interpolation {
    /// Size of the axis, at least 1.
    pub(super) input: usize,
    /// Where the elements start that each new one is made from. Before the axis and after it, its ends repeat.
    pub(super) first: Vec<i64>,
    /// How many elements each new one is made from.
    pub(super) width: usize,
    /// Their weights, `width` for each new element.
    pub(super) weights: Vec<f32>,
}

/// New elements at regular distances: element `j · phases + r` is a sum over elements `starts[r] + j · step`.
struct Periodic {
    step: usize,
    /// By phase, the starts and weights of what is summed.
    phases: Vec<Vec<(i64, f32)>>,
    /// Elements of each phase.
    count: usize,
}

impl Interpolation {
    /// Number of new elements.
    pub(super) fn output(&self) -> usize {
        self.first.len()
    }

    /// What `at` is made from: indices, and weights other than 0.
    fn terms(&self, at: usize) -> impl Iterator<Item = (i64, f32)> + '_ {
        let weights = &self.weights[at * self.width..(at + 1) * self.width];
        (self.first[at]..).zip(weights.iter().copied()).filter(|&(_, weight)| weight != 0.0)
    }

    /// The element of the axis that is at `index`, which may lie outside.
    fn clamped(&self, index: i64) -> usize {
        usize::try_from(index).unwrap_or(0).min(self.input - 1)
    }

    /// `x` with the new axis instead of `axis`. With more than one term the elements are f32.
    pub(super) fn apply(&self, draft: &mut Draft, x: ValueId, axis: usize) -> Value {
        if let Some(periodic) = self.periodic() {
            return periodic.apply(draft, x, axis, self.input);
        }
        if self.width == 1 {
            let indices = self.first.iter().map(|&index| self.clamped(index));
            let indices = indices.map(|index| i64::try_from(index).unwrap_or(i64::MAX)).collect();
            return super::indexing::take_constant(draft, x, axis, indices);
        }
        let size = self.input.saturating_mul(self.output());
        if size > MATRIX_LIMIT && self.width <= NODE_LIMIT {
            return self.gather(draft, x, axis);
        }
        self.multiply(draft, x, axis)
    }

    /// As a sum of elements at indices, times weights.
    fn gather(&self, draft: &mut Draft, x: ValueId, axis: usize) -> Value {
        let mut shape = vec![1; draft.rank(x)];
        shape[axis] = self.output();
        let mut sum = None;
        for tap in 0..self.width {
            let index = |first: &i64| {
                let index = first.saturating_add_unsigned(tap as u64);
                i64::try_from(self.clamped(index)).unwrap_or(i64::MAX)
            };
            let indices = self.first.iter().map(index).collect();
            let part = super::indexing::take_constant(draft, x, axis, indices)?;
            let weights = self.weights.iter().skip(tap).step_by(self.width);
            let weights: Vec<f64> = weights.map(|&weight| f64::from(weight)).collect();
            let weights = constant(draft, &shape, &weights)?;
            let part = draft.mul(part, weights)?;
            sum = Some(match sum {
                None => part,
                Some(sum) => draft.add(sum, part)?,
            });
        }
        sum.ok_or_else(|| Obstacle::invalid("an element made from nothing"))
    }

    fn periodic(&self) -> Option<Periodic> {
        let output = self.output();
        (1..=NODE_LIMIT / self.width.max(1))
            .filter(|&count| output >= count && output.is_multiple_of(count))
            .find_map(|count| self.with_phases(count))
    }

    fn with_phases(&self, phases: usize) -> Option<Periodic> {
        let output = self.output();
        let step = if output == phases { 1 } else { self.first[phases] - self.first[0] };
        let step = usize::try_from(step).ok().filter(|&step| step > 0)?;
        let repeats = (phases..output).all(|at| {
            let (now, before) = (at * self.width, (at - phases) * self.width);
            i64::try_from(step) == Ok(self.first[at].saturating_sub(self.first[at - phases]))
                && (0..self.width)
                    .all(|tap| (self.weights[now + tap] - self.weights[before + tap]).abs() < 1e-6)
        });
        repeats
            .then(|| Periodic {
                step,
                phases: (0..phases).map(|phase| self.terms(phase).collect()).collect(),
                count: output / phases,
            })?
            .bounded(self.input)
    }

    /// As a product with the matrix of the weights.
    fn multiply(&self, draft: &mut Draft, x: ValueId, axis: usize) -> Value {
        let (input, output) = (self.input, self.output());
        let size = input.checked_mul(output).filter(|&size| size <= WEIGHT_LIMIT);
        let size = size.ok_or_else(|| {
            Obstacle::unsupported(format!("an axis of {input} interpolated to {output}"))
        })?;
        let mut matrix = vec![0.0_f64; size];
        for at in 0..output {
            for (index, weight) in self.terms(at) {
                matrix[at * input + self.clamped(index)] += f64::from(weight);
            }
        }
        let matrix = constant(draft, &[output, input], &matrix)?;
        let (input, output) = (Dim::fixed(input), Dim::fixed(output));
        let too_large = || Obstacle::invalid("an operand beyond 2^64 elements");
        let others = |dims: &[Dim]| {
            let mut dims = dims.iter();
            dims.try_fold(Dim::ONE, |all, &dim| all.times(dim)).ok_or_else(too_large)
        };
        let mut dims = draft.dims(x).to_vec();
        if others(&dims[..axis])? == Dim::ONE {
            let rest = others(&dims[axis + 1..])?;
            let x = draft.reshape(x, &[input, rest])?;
            let product = Op::Matmul { transpose_a: false, transpose_b: false };
            let y = draft.emit(product, &[matrix, x])?;
            dims[axis] = output;
            return draft.reshape(y, &dims);
        }
        let last = dims.len() - 1;
        let x = draft.move_axis(x, axis, last)?;
        dims = draft.dims(x).to_vec();
        let rest = others(&dims[..last])?;
        let x = draft.reshape(x, &[rest, input])?;
        let y = draft.emit(Op::Matmul { transpose_a: false, transpose_b: true }, &[x, matrix])?;
        dims[last] = output;
        let y = draft.reshape(y, &dims)?;
        draft.move_axis(y, last, axis)
    }
}

impl Periodic {
    /// The copies of the first and of the last element that it needs of an axis.
    fn edges(&self, input: usize) -> Option<[usize; 2]> {
        let steps = i64::try_from((self.count - 1).checked_mul(self.step)?).ok()?;
        let size = i64::try_from(input).ok()?;
        let (mut low, mut high) = (0_i64, 0_i64);
        for &(start, _) in self.phases.iter().flatten() {
            low = low.max(start.checked_neg()?);
            high = high.max(start.checked_add(steps)?.checked_sub(size - 1)?);
        }
        Some([usize::try_from(low).ok()?, usize::try_from(high).ok()?])
    }

    /// Itself, if the axis need not be extended by much and every phase is made from something.
    fn bounded(self, input: usize) -> Option<Periodic> {
        let small = self.edges(input)?.iter().all(|&edge| edge <= EDGE_LIMIT);
        (small && self.phases.iter().all(|terms| !terms.is_empty())).then_some(self)
    }

    fn apply(&self, draft: &mut Draft, x: ValueId, axis: usize, input: usize) -> Value {
        let edges = self.edges(input).unwrap_or_default();
        let extended = extended(draft, x, axis, edges)?;
        // The phases one after another along an axis of their own.
        let mut parts = Vec::with_capacity(self.phases.len());
        let same = self.phases.iter().all(|terms| *terms == self.phases[0]);
        for terms in &self.phases[..if same { 1 } else { self.phases.len() }] {
            let part = self.phase(draft, extended, axis, terms, edges[0])?;
            let mut dims = draft.dims(part).to_vec();
            dims.insert(axis + 1, Dim::ONE);
            parts.push(draft.reshape(part, &dims)?);
        }
        let mut dims = draft.dims(x).to_vec();
        dims[axis] = Dim::fixed(self.count);
        dims.insert(axis + 1, Dim::fixed(self.phases.len()));
        let y = match parts[..] {
            [part] => draft.broadcast(part, &dims)?,
            _ => draft.emit(Op::Concat { axis: axis + 1 }, &parts)?,
        };
        super::window::merged(draft, y, axis, 2)
    }

    /// The sum of one phase over an axis that starts `low` elements before index 0.
    fn phase(
        &self,
        draft: &mut Draft,
        x: ValueId,
        axis: usize,
        terms: &[(i64, f32)],
        low: usize,
    ) -> Value {
        let mut sum = None;
        for &(start, weight) in terms {
            let shifted = start.saturating_add_unsigned(low as u64);
            let start = usize::try_from(shifted)
                .map_err(|_| Obstacle::invalid(format!("an element at {shifted}")))?;
            let end = start + (self.count - 1) * self.step + 1;
            let part = if self.step == 1 {
                draft.slice(x, axis, start, end)?
            } else {
                draft.emit(Op::Slice { axis, start, end, step: self.step }, &[x])?
            };
            #[allow(clippy::float_cmp, reason = "a weight of exactly 1 changes nothing")]
            let part = if weight == 1.0 {
                part
            } else {
                draft.binary_scalar(BinaryOp::Mul, part, f64::from(weight))?
            };
            sum = Some(match sum {
                None => part,
                Some(sum) => draft.add(sum, part)?,
            });
        }
        sum.ok_or_else(|| Obstacle::invalid("an element made from nothing"))
    }
}

/// An f32 constant, which no arithmetic at import looks into.
fn constant(draft: &mut Draft, shape: &[usize], values: &[f64]) -> Value {
    let tensor = Tensor::from_f64(DType::F32, shape, values);
    let tensor = tensor.ok_or_else(|| Obstacle::invalid("too many weights"))?;
    draft.emit(Op::Const(Arc::new(tensor)), &[])
}

/// `x` with copies of its first and last element along an axis before and after it.
fn extended(draft: &mut Draft, x: ValueId, axis: usize, edges: [usize; 2]) -> Value {
    let size = draft.dims(x)[axis].as_fixed().unwrap_or(1);
    let mut parts = Vec::with_capacity(3);
    for (at, count) in [(0, edges[0]), (size - 1, edges[1])] {
        if count > 0 {
            let edge = draft.slice(x, axis, at, at + 1)?;
            let mut dims = draft.dims(x).to_vec();
            dims[axis] = Dim::fixed(count);
            parts.push(draft.broadcast(edge, &dims)?);
        }
    }
    parts.insert(usize::from(edges[0] > 0), x);
    if let [only] = parts[..] {
        return Ok(only);
    }
    draft.emit(Op::Concat { axis }, &parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Linear interpolation at `positions`.
    fn linear(input: usize, positions: &[f32]) -> Interpolation {
        Interpolation {
            input,
            #[allow(clippy::cast_possible_truncation, reason = "small positions")]
            first: positions.iter().map(|at| at.floor() as i64).collect(),
            width: 2,
            weights: positions.iter().flat_map(|at| [1.0 - at.fract(), at.fract()]).collect(),
        }
    }

    #[test]
    fn what_repeats_is_found() {
        let doubled = linear(3, &[0.25, 0.75, 1.25, 1.75]).periodic().expect("repeats");
        assert_eq!((doubled.step, doubled.count, doubled.phases.len()), (1, 2, 2));
        assert_eq!(doubled.edges(3), Some([0, 0]));
        let halved = linear(6, &[0.5, 2.5, 4.5]).periodic().expect("repeats");
        assert_eq!((halved.step, halved.count, halved.phases.len()), (2, 3, 1));
        let thirds = linear(5, &[0.0, 1.5, 3.0, 4.5]).periodic().expect("repeats");
        assert_eq!((thirds.step, thirds.count, thirds.phases.len()), (3, 2, 2));
        assert_eq!(thirds.edges(5), Some([0, 1]));
    }

    #[test]
    fn what_does_not_repeat_is_not() {
        let positions: Vec<f32> = (0..131_u16).map(|at| f32::from(at * at) / 200.0).collect();
        assert!(linear(90, &positions).periodic().is_none());
    }
}
