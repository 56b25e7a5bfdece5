//! Rounding at random, up or down, so that the mean of many roundings is the value (Gupta et al. 2015, arXiv:1502.02551).
//!
//! The numbers come from `random` (Philox): a function of a seed, which is made of the name of what is rounded, of the
//! step, which a state counts, and of the place. So a step can be replayed, on any number of threads.

use crate::PassError;
use crate::builder::Builder;
use qcompile_ir::{
    BinaryOp, CompareOp, DType, Dim, Graph, NodeId, Op, Region, Shape, Tensor, UnaryOp,
};
use std::sync::Arc;

/// The state that counts steps.
const STEP: &str = "rounding.step";

/// 64-bit FNV-1a.
pub(crate) fn digest(text: &str) -> u64 {
    let add = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    text.bytes().fold(0xcbf2_9ce4_8422_2325, add)
}

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

impl Builder<'_> {
    /// Random numbers in [0, 1) of this shape.
    pub(crate) fn uniform(&mut self, suffix: &str, shape: Shape) -> Result<NodeId, PassError> {
        let step = step(self.graph)?;
        let seed = digest(self.name(suffix).as_str());
        self.add(suffix, Op::Random { seed, shape }, &[step])
    }

    /// The part of `x` behind the point.
    fn fraction(&mut self, suffix: &str, x: NodeId) -> Result<NodeId, PassError> {
        let whole = self.unary(&format!("{suffix}.whole"), UnaryOp::Floor, x)?;
        self.binary(suffix, BinaryOp::Sub, x, whole)
    }

    /// Random numbers in [0, 1) of this shape, others on every rank, as its samples are others: the numbers of
    /// [`uniform`](Self::uniform) turned by a number that the rank draws from its places in the batch. Equal numbers
    /// would round alike on all ranks, and their mean would keep half of the error however many ranks there are.
    pub(crate) fn uniform_of_rank(
        &mut self,
        suffix: &str,
        shape: Shape,
    ) -> Result<NodeId, PassError> {
        const TURN: &str = "rounding.rank";
        let turn = match self.graph.find(TURN).filter(|id| self.graph.ty(*id).shape.rank() == 0) {
            Some(turn) => turn,
            None => {
                let mut b = Builder::new(self.graph, self.region, "rounding");
                let own = b.uniform("samples", Shape(vec![Dim::N]))?;
                let sum = b.sum_all("sum", own)?;
                b.fraction("rank", sum)?
            }
        };
        let numbers = self.uniform(suffix, shape.clone())?;
        let turn = self.broadcast(&format!("{suffix}.turn"), turn, shape)?;
        let sum = self.binary(&format!("{suffix}.sum"), BinaryOp::Add, numbers, turn)?;
        self.fraction(&format!("{suffix}.own"), sum)
    }

    /// An f32 as one of the two bf16 numbers beside it, the nearer one more likely. The other one than the nearest is
    /// what the nearest, a little larger or smaller, rounds to: 1 + 2⁻⁸ + 2⁻¹² moves a bf16 number by between a half and
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
        let numbers = self.uniform(&name("numbers"), shape)?;
        let goes = self.compare(&name("goes"), CompareOp::Less, numbers, share)?;
        let rounded = self.select(&name("rounded"), goes, other, nearest)?;
        self.cast(suffix, rounded, DType::BF16)
    }
}
