//! Reductions.

use super::Results;
use super::shape::axes_before;
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::node::{OnnxNode, axes_of};
use qcompile_ir::{BinaryOp, ReduceOp, UnaryOp};

/// The operand, its reduced axes, and whether they stay.
struct Reduction {
    x: ValueId,
    axes: Vec<usize>,
    keep: bool,
    /// Nothing is reduced at all, not even to a function of single elements.
    none: bool,
}

impl Reduction {
    fn read(draft: &Draft, node: &OnnxNode) -> Result<Reduction, Obstacle> {
        let x = node.input(0)?;
        let keep = node.attributes.flag("keepdims", true)?;
        let noop = node.attributes.flag("noop_with_empty_axes", false)?;
        let opset = if node.op == "ReduceSum" { 13 } else { 18 };
        let given = axes_before(draft, node, opset)?.unwrap_or_default();
        let rank = draft.rank(x);
        let axes = if !given.is_empty() {
            axes_of(&given, rank)?
        } else if noop {
            Vec::new()
        } else {
            (0..rank).collect()
        };
        let none = given.is_empty() && noop;
        Ok(Reduction { x, axes, keep, none })
    }

    /// `reduced`, with the axes as asked for.
    fn finish(&self, draft: &mut Draft, reduced: ValueId) -> Results {
        if self.keep || self.none {
            return Ok(vec![reduced]);
        }
        Ok(vec![draft.squeeze(reduced, &self.axes)?])
    }
}

pub(super) fn reduce(draft: &mut Draft, node: &OnnxNode, op: ReduceOp) -> Results {
    let reduction = Reduction::read(draft, node)?;
    let reduced = draft.reduce(op, reduction.x, &reduction.axes)?;
    reduction.finish(draft, reduced)
}

pub(super) fn reduce_mean(draft: &mut Draft, node: &OnnxNode) -> Results {
    let reduction = Reduction::read(draft, node)?;
    let reduced = draft.mean(reduction.x, &reduction.axes)?;
    reduction.finish(draft, reduced)
}

/// The minimum is the negated maximum of the negated.
pub(super) fn reduce_min(draft: &mut Draft, node: &OnnxNode) -> Results {
    let reduction = Reduction::read(draft, node)?;
    if !draft.dtype(reduction.x).is_float() && draft.known(reduction.x).is_none() {
        return Err(Obstacle::unsupported(format!("{} elements", draft.dtype(reduction.x))));
    }
    let negated = draft.unary(UnaryOp::Neg, reduction.x)?;
    let reduced = draft.reduce(ReduceOp::Max, negated, &reduction.axes)?;
    let reduced = draft.unary(UnaryOp::Neg, reduced)?;
    reduction.finish(draft, reduced)
}

pub(super) fn reduce_sum_square(draft: &mut Draft, node: &OnnxNode) -> Results {
    let reduction = Reduction::read(draft, node)?;
    let squared = draft.mul(reduction.x, reduction.x)?;
    let reduced = draft.reduce(ReduceOp::Sum, squared, &reduction.axes)?;
    reduction.finish(draft, reduced)
}

pub(super) fn reduce_l1(draft: &mut Draft, node: &OnnxNode) -> Results {
    let reduction = Reduction::read(draft, node)?;
    let magnitudes = draft.unary(UnaryOp::Abs, reduction.x)?;
    let reduced = draft.reduce(ReduceOp::Sum, magnitudes, &reduction.axes)?;
    reduction.finish(draft, reduced)
}

pub(super) fn reduce_l2(draft: &mut Draft, node: &OnnxNode) -> Results {
    let reduction = Reduction::read(draft, node)?;
    let squared = draft.mul(reduction.x, reduction.x)?;
    let reduced = draft.reduce(ReduceOp::Sum, squared, &reduction.axes)?;
    let reduced = draft.unary(UnaryOp::Sqrt, reduced)?;
    reduction.finish(draft, reduced)
}

/// Shifted by the maximum, so that nothing overflows.
pub(super) fn reduce_log_sum_exp(draft: &mut Draft, node: &OnnxNode) -> Results {
    let reduction = Reduction::read(draft, node)?;
    let max = draft.reduce(ReduceOp::Max, reduction.x, &reduction.axes)?;
    let max = draft.unary(UnaryOp::StopGradient, max)?;
    let shifted = draft.binary(BinaryOp::Sub, reduction.x, max)?;
    let exp = draft.unary(UnaryOp::Exp, shifted)?;
    let sum = draft.reduce(ReduceOp::Sum, exp, &reduction.axes)?;
    let log = draft.unary(UnaryOp::Log, sum)?;
    let reduced = draft.add(log, max)?;
    reduction.finish(draft, reduced)
}
