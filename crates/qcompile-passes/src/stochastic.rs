//! Rounding at random, up or down, so that the mean of many roundings is the value (Gupta et al. 2015, arXiv:1502.02551).
//!
//! The numbers come from `random` (Philox): a function of a seed, which is made of the name of what is rounded, of the
//! step, which a state counts, and of the place. So a step can be replayed, on any number of threads.

use crate::PassError;
use crate::builder::Builder;
use qcompile_ir::{
    BinaryOp, CompareOp, DType, Dim, Graph, NodeId, Op, Region, Shape, Tensor, UnaryOp, fnv1a,
    golden_multiple,
};
use std::sync::Arc;

/// The state that counts steps.
const STEP: &str = "rounding.step";

/// The number of the step, `i64[]`: a state that counts.
pub(crate) fn step(graph: &mut Graph) -> Result<NodeId, PassError> {
    let zero = Arc::new(Tensor::zeros(DType::I64, &[]));
    if let Some(found) = graph.find(STEP).filter(|id| *graph.op(*id) == Op::State(zero.clone())) {
        return Ok(found);
    }
    let step = graph.add(Op::State(zero), &[], STEP, Region::Forward)?;
    let mut b = Builder::new(graph, Region::Update, STEP);
    let one = b.scalar(DType::I64, 1.0)?;
    let next = b.binary("next", BinaryOp::Add, step, one)?;
    graph.set_next(step, next)?;
    Ok(step)
}

/// Numbers in [0, 1) of this shape for what is rounded within an op: the same for whatever names the same node.
pub(crate) fn numbers(
    graph: &mut Graph,
    of: NodeId,
    shape: Shape,
    region: Region,
) -> Result<NodeId, PassError> {
    let name = format!("{}.numbers", graph.node(of).name.as_str());
    let op = Op::Random { seed: fnv1a(name.bytes()), shape };
    let step = step(graph)?;
    match graph.find(&name).filter(|&id| *graph.op(id) == op) {
        Some(known) => Ok(known),
        None => Ok(graph.add(op, &[step], name, region)?),
    }
}

/// The multiples of the golden ratio behind the point, f32\[count\].
fn multiples(graph: &mut Graph, count: usize) -> Result<NodeId, PassError> {
    let values: Vec<f64> = (0..count).map(|place| golden_multiple(place).into()).collect();
    let tensor = Tensor::from_f64(DType::F32, &[count], &values).map(Arc::new);
    let tensor = tensor.ok_or_else(|| PassError::Unsupported {
        pass: "rounding",
        reason: "a block is too large".to_owned(),
    })?;
    let name = format!("rounding.multiples.{count}");
    let known = graph.find(&name).filter(|id| *graph.op(*id) == Op::Const(tensor.clone()));
    match known {
        Some(known) => Ok(known),
        None => Ok(graph.add(Op::Const(tensor), &[], name, Region::Forward)?),
    }
}

/// Where the numbers of [`quantize_stochastically`] come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draws {
    /// What tells one value's numbers from another's.
    pub seed: u64,
    /// The number of the step, `i64[]`.
    pub step: NodeId,
}

/// `x` rounded stochastically to codes of `dtype` by `scale` (one, or one for each index of `axis`): up with a
/// probability that is the distance from the code below, so that `dequantize` of it is `x` on average (Gupta et al. 2015,
/// arXiv:1502.02551).
///
/// It is rounding to nearest of `x + (u - 1/2) · scale`, with `u` uniform in [0, 1) from [`Op::Random`]: a function of
/// seed, step and place in the whole batch, so a step can be replayed, and threads and workers change nothing. Only
/// integer types have steps of one size, for which this holds. The noise has no gradient.
///
/// # Errors
/// [`PassError::Graph`] if the scale does not fit.
pub fn quantize_stochastically(
    graph: &mut Graph,
    x: NodeId,
    scale: NodeId,
    axis: Option<usize>,
    dtype: DType,
    draws: Draws,
    region: Region,
) -> Result<NodeId, PassError> {
    let name = graph.node(x).name.as_str().to_owned();
    let mut b = Builder::new(graph, region, &name);
    let ty = b.ty(x);
    let random = Op::Random { seed: draws.seed, shape: ty.shape.clone() };
    let u = b.add("draws", random, &[draws.step])?;
    let mut column = Shape(vec![1.into(); ty.shape.rank()]);
    if let Some(axis) = axis.filter(|&axis| axis < ty.shape.rank()) {
        column.0[axis] = ty.shape.0[axis];
    }
    let steps = b.reshape("steps", scale, column)?;
    let steps = b.broadcast("steps.all", steps, ty.shape.clone())?;
    let noise = b.rounding_noise(u, steps)?;
    let noise = b.unary("noise.fixed", UnaryOp::StopGradient, noise)?;
    let noise = b.cast("noise.cast", noise, ty.dtype)?;
    let moved = b.binary("moved", BinaryOp::Add, x, noise)?;
    b.add("q", Op::Quantize { dtype, axis }, &[moved, scale])
}

impl Builder<'_> {
    /// Numbers in [0, 1) for `[rows, columns]`, each as likely as any other: a random one for each row, turned by the
    /// multiples of the golden ratio (a rotation as of Cranley and Patterson 1976, doi:10.1137/0713071). One random number
    /// for a row costs next to nothing, and roundings within a row even out better than independent ones.
    pub(crate) fn uniform(&mut self, suffix: &str, shape: &Shape) -> Result<NodeId, PassError> {
        let turn = self.draw(&format!("{suffix}.row"), shape)?;
        self.turned(suffix, turn, shape)
    }

    /// The same, others on every rank, as its samples are others: turned again by a number that the rank draws from its
    /// places in the batch. Equal numbers would round alike on all ranks, and their mean would keep half of the error
    /// however many ranks there are.
    pub(crate) fn uniform_of_rank(
        &mut self,
        suffix: &str,
        shape: &Shape,
    ) -> Result<NodeId, PassError> {
        const RANK: &str = "rounding.rank";
        let own = match self
            .graph
            .find(RANK)
            .filter(|id| *self.graph.op(*id) == Op::Binary(BinaryOp::Sub))
        {
            Some(own) => own,
            None => {
                let mut b = Builder::new(self.graph, self.region, "rounding");
                let samples = b.draw("samples", &Shape(vec![Dim::N]))?;
                let sum = b.sum_all("sum", samples)?;
                b.fraction("rank", sum)?
            }
        };
        let row = self.draw(&format!("{suffix}.row"), shape)?;
        let rows = self.shape(row);
        let own = self.broadcast(&format!("{suffix}.rank"), own, rows)?;
        let turn = self.binary(&format!("{suffix}.turn"), BinaryOp::Add, row, own)?;
        self.turned(suffix, turn, shape)
    }

    /// A random number in [0, 1) for each row of this shape.
    fn draw(&mut self, suffix: &str, shape: &Shape) -> Result<NodeId, PassError> {
        let step = step(self.graph)?;
        let seed = fnv1a(self.name(suffix).as_str().bytes());
        let mut rows = shape.clone();
        if let [_, columns] = &mut rows.0[..] {
            *columns = Dim::ONE;
        }
        self.add(suffix, Op::Random { seed, shape: rows }, &[step])
    }

    /// `turn[rows, 1]` plus the multiples, behind the point.
    fn turned(&mut self, suffix: &str, turn: NodeId, shape: &Shape) -> Result<NodeId, PassError> {
        let columns = shape.0.last().and_then(|dim| dim.as_fixed()).unwrap_or(1);
        let multiples = multiples(self.graph, columns)?;
        let multiples = self.broadcast(&format!("{suffix}.multiples"), multiples, shape.clone())?;
        let turns = self.broadcast(&format!("{suffix}.turns"), turn, shape.clone())?;
        let sum = self.binary(&format!("{suffix}.sum"), BinaryOp::Add, turns, multiples)?;
        self.fraction(suffix, sum)
    }

    /// `(numbers - 1/2) · steps`: what makes rounding to nearest, of a value to which it is added, go up as often as the value
    /// is far from the code below.
    pub(crate) fn rounding_noise(
        &mut self,
        numbers: NodeId,
        steps: NodeId,
    ) -> Result<NodeId, PassError> {
        let half = self.splat_like("half", numbers, 0.5)?;
        let centred = self.binary("centred", BinaryOp::Sub, numbers, half)?;
        self.binary("noise", BinaryOp::Mul, centred, steps)
    }

    /// The part of `x` behind the point.
    fn fraction(&mut self, suffix: &str, x: NodeId) -> Result<NodeId, PassError> {
        let whole = self.unary(&format!("{suffix}.whole"), UnaryOp::Floor, x)?;
        self.binary(suffix, BinaryOp::Sub, x, whole)
    }

    /// `x[rows, columns]` in f32, each element as one of the two bf16 numbers beside it, the nearer one more likely. The
    /// other one than the nearest is what the nearest, a little larger or smaller, rounds to: 1 + 2⁻⁸ + 2⁻¹² moves a bf16 number by between a half and
    /// one and a half of the distance to the next one, and 1 - 1.25 · 2⁻⁸ towards zero, also below a power of two,
    /// where distances halve.
    pub(crate) fn stochastic_bf16(&mut self, suffix: &str, x: NodeId) -> Result<NodeId, PassError> {
        let name = |part: &str| format!("{suffix}.{part}");
        let nearest = self.cast(&name("nearest.bf16"), x, DType::BF16)?;
        let nearest = self.cast(&name("nearest"), nearest, DType::F32)?;
        let magnitude = self.unary(&name("abs"), UnaryOp::Abs, x)?;
        let reached = self.unary(&name("nearest.abs"), UnaryOp::Abs, nearest)?;
        let outwards = self.compare(&name("outwards"), CompareOp::Less, reached, magnitude)?;
        let up = self.splat_like(&name("up"), x, 1.0 + 0.5_f64.powi(8) + 0.5_f64.powi(12))?;
        let down = self.splat_like(&name("down"), x, 1.0 - 1.25 * 0.5_f64.powi(8))?;
        let factor = self.select(&name("factor"), outwards, up, down)?;
        let moved = self.binary(&name("moved"), BinaryOp::Mul, nearest, factor)?;
        let other = self.cast(&name("other.bf16"), moved, DType::BF16)?;
        let other = self.cast(&name("other"), other, DType::F32)?;
        let error = self.binary(&name("error"), BinaryOp::Sub, x, nearest)?;
        let gap = self.binary(&name("gap"), BinaryOp::Sub, other, nearest)?;
        let share = self.binary(&name("share"), BinaryOp::Div, error, gap)?;
        let shape = self.shape(x);
        let numbers = self.uniform(&name("numbers"), &shape)?;
        let goes = self.compare(&name("goes"), CompareOp::Less, numbers, share)?;
        let rounded = self.select(&name("rounded"), goes, other, nearest)?;
        self.cast(suffix, rounded, DType::BF16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::differentiate::tests::parse;
    use qcompile_ir::eval::{EvalOptions, eval};
    use std::collections::BTreeMap;

    /// What `x` is rounded to in this many steps, by place.
    fn rounded(values: &[f32], steps: u32) -> Vec<Vec<f64>> {
        let mut graph = parse(&format!(
            "graph @g {{\n  input %x : f32[1, {0}]\nforward:\n  %y : f32[1, {0}] = neg %x\n  return %y\n}}\n",
            values.len()
        ));
        let x = graph.find("x").expect("an input");
        let mut b = Builder::new(&mut graph, Region::Forward, "x");
        let near = b.stochastic_bf16("near", x).expect("fits");
        graph.add_output("near", near);
        let tensor = Tensor::from_f32(&[1, values.len()], values).expect("as many");
        let inputs = BTreeMap::from([("x".to_owned(), tensor)]);
        let mut all = vec![Vec::new(); values.len()];
        for step in 0..steps {
            let leaves = BTreeMap::from([(STEP.to_owned(), vec![f64::from(step)])]);
            let options = EvalOptions { leaves, ..EvalOptions::default() };
            let values = eval(&graph, &inputs, 1, &options).expect("evaluates");
            let near = values.get_f64("near").expect("an output");
            all.iter_mut().zip(near).for_each(|(all, near)| all.push(near));
        }
        all
    }

    #[test]
    fn bf16_goes_to_both_neighbours_so_that_the_mean_is_the_value() {
        let bits = |bits: u32| f32::from_bits(bits);
        let mut values = vec![0.0, -0.0, 1.0, -1.5, 3.0e38, f32::MAX];
        for exponent in [1_u32, 60, 126, 127, 128, 200, 253] {
            for mantissa in
                [0x0000_0001, 0x0000_7fff, 0x0000_8000, 0x007f_4000, 0x007f_c000, 0x0040_1000]
            {
                values.extend([
                    bits(exponent << 23 | mantissa),
                    bits(1 << 31 | exponent << 23 | mantissa),
                ]);
            }
        }
        let steps = 512;
        for (x, all) in values.iter().zip(rounded(&values, steps)) {
            let toward_zero = f64::from(bits(x.to_bits() & 0xffff_0000));
            let away = f64::from(bits((x.to_bits() & 0xffff_0000).wrapping_add(0x0001_0000)));
            let x = f64::from(*x);
            if !away.is_finite() {
                continue;
            }
            let fits = |near: &f64| *near == toward_zero || (*near == away && x != toward_zero);
            assert!(all.iter().all(fits), "{x}: {toward_zero}, {away}, {:?}", &all[..4]);
            let mean = all.iter().sum::<f64>() / f64::from(steps);
            let gap = (away - toward_zero).abs();
            assert!(
                (mean - x).abs() <= 0.12 * gap,
                "{x}: {mean}, between {toward_zero} and {away}"
            );
        }
    }
}
