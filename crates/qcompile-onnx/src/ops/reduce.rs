//! Reductions.

use super::Results;
use super::shape::axes_before;
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::node::{OnnxNode, axes_of};
use qcompile_ir::{BinaryOp, CompareOp, DType, Dim, Op, ReduceOp, UnaryOp};

type Value = Result<ValueId, Obstacle>;

/// The operand, its reduced axes, and whether they stay.
struct Reduction {
    x: ValueId,
    axes: Vec<usize>,
    keep: bool,
}

impl Reduction {
    fn read(draft: &Draft, node: &OnnxNode) -> Result<Reduction, Obstacle> {
        let x = node.input(0)?;
        let keep = node.attributes.flag("keepdims", true)?;
        let opset = if node.op == "ReduceSum" { 13 } else { 18 };
        let noop = node.opset >= opset && node.attributes.flag("noop_with_empty_axes", false)?;
        let given = axes_before(draft, node, opset)?.unwrap_or_default();
        let rank = draft.rank(x);
        let axes = if !given.is_empty() {
            axes_of(&given, rank)?
        } else if noop {
            Vec::new()
        } else {
            (0..rank).collect()
        };
        Ok(Reduction { x, axes, keep })
    }

    /// `reduced`, with the axes as asked for.
    fn finish(&self, draft: &mut Draft, reduced: ValueId) -> Results {
        if self.keep {
            return Ok(vec![reduced]);
        }
        Ok(vec![draft.squeeze(reduced, &self.axes)?])
    }

    /// The operand in f32, where the result is no sum of integers.
    fn wide(&self, draft: &mut Draft) -> Value {
        let dtype = draft.dtype(self.x);
        if dtype.is_float() { Ok(self.x) } else { draft.cast(self.x, DType::F32) }
    }

    /// [`finish`](Self::finish) for what was computed of [`wide`](Self::wide).
    fn finish_wide(&self, draft: &mut Draft, reduced: ValueId) -> Results {
        let dtype = draft.dtype(self.x);
        let reduced = draft.cast(reduced, dtype)?;
        self.finish(draft, reduced)
    }
}

pub(super) fn reduce_sum(draft: &mut Draft, node: &OnnxNode) -> Results {
    let reduction = Reduction::read(draft, node)?;
    let reduced = draft.reduce(ReduceOp::Sum, reduction.x, &reduction.axes)?;
    reduction.finish(draft, reduced)
}

pub(super) fn reduce_mean(draft: &mut Draft, node: &OnnxNode) -> Results {
    let reduction = Reduction::read(draft, node)?;
    let reduced = draft.mean(reduction.x, &reduction.axes)?;
    reduction.finish(draft, reduced)
}

/// The minimum is the maximum of the reverse order. Truth values are ordered as numbers.
pub(super) fn reduce_extreme(draft: &mut Draft, node: &OnnxNode, smallest: bool) -> Results {
    let reduction = Reduction::read(draft, node)?;
    let truth = draft.dtype(reduction.x) == DType::Bool;
    let mut x = reduction.x;
    if truth {
        x = if smallest { draft.unary(UnaryOp::Not, x)? } else { x };
        x = draft.cast(x, DType::U8)?;
    } else if smallest {
        x = draft.reversed(x)?;
    }
    let mut reduced = draft.reduce(ReduceOp::Max, x, &reduction.axes)?;
    if truth {
        reduced = draft.cast(reduced, DType::Bool)?;
        reduced = if smallest { draft.unary(UnaryOp::Not, reduced)? } else { reduced };
    } else if smallest {
        reduced = draft.reversed(reduced)?;
    }
    reduction.finish(draft, reduced)
}

/// By halves, so that the gradient is exact whatever is zero.
pub(super) fn reduce_prod(draft: &mut Draft, node: &OnnxNode) -> Results {
    let reduction = Reduction::read(draft, node)?;
    let mut x = reduction.x;
    for &axis in &reduction.axes {
        x = product_along(draft, x, axis)?;
    }
    reduction.finish(draft, x)
}

fn product_along(draft: &mut Draft, mut x: ValueId, axis: usize) -> Value {
    let mut size = draft.dims(x)[axis].as_fixed().ok_or_else(|| {
        Obstacle::batch(format!("a product over axis {axis}, which depends on the batch size"))
    })?;
    if size == 0 {
        let mut dims = draft.dims(x).to_vec();
        dims[axis] = Dim::ONE;
        let one = draft.scalar(draft.dtype(x), 1.0);
        return draft.broadcast(one, &dims);
    }
    while size > 1 {
        let half = size.div_ceil(2);
        let first = draft.slice(x, axis, 0, half)?;
        let mut second = draft.slice(x, axis, half, size)?;
        if size % 2 == 1 {
            second = draft
                .emit(Op::Pad { axis, low: 0, high: 1, interior: 0, value: 1.0 }, &[second])?;
        }
        x = draft.mul(first, second)?;
        size = half;
    }
    Ok(x)
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
    let x = reduction.wide(draft)?;
    let squared = draft.mul(x, x)?;
    let reduced = draft.reduce(ReduceOp::Sum, squared, &reduction.axes)?;
    let reduced = draft.root(reduced)?;
    reduction.finish_wide(draft, reduced)
}

pub(super) fn reduce_log_sum(draft: &mut Draft, node: &OnnxNode) -> Results {
    let reduction = Reduction::read(draft, node)?;
    let x = reduction.wide(draft)?;
    let sum = draft.reduce(ReduceOp::Sum, x, &reduction.axes)?;
    let reduced = draft.unary(UnaryOp::Log, sum)?;
    reduction.finish_wide(draft, reduced)
}

/// Shifted by the maximum, so that nothing overflows; by a finite number even if all elements are -inf.
pub(super) fn reduce_log_sum_exp(draft: &mut Draft, node: &OnnxNode) -> Results {
    let reduction = Reduction::read(draft, node)?;
    let x = reduction.wide(draft)?;
    let max = draft.reduce(ReduceOp::Max, x, &reduction.axes)?;
    let limit = if draft.dtype(x) == DType::F16 { 65504.0 } else { 1e38 };
    let max = draft.binary_scalar(BinaryOp::Max, max, -limit)?;
    let max = draft.binary_scalar(BinaryOp::Min, max, limit)?;
    let max = draft.unary(UnaryOp::StopGradient, max)?;
    let shifted = draft.sub(x, max)?;
    let exp = draft.unary(UnaryOp::Exp, shifted)?;
    let sum = draft.reduce(ReduceOp::Sum, exp, &reduction.axes)?;
    let log = draft.unary(UnaryOp::Log, sum)?;
    let reduced = draft.add(log, max)?;
    reduction.finish_wide(draft, reduced)
}

impl Draft {
    /// The square root of what is not negative, with gradient 0 at 0.
    pub(super) fn root(&mut self, x: ValueId) -> Value {
        let dtype = self.dtype(x);
        let (zero, one) = (self.scalar(dtype, 0.0), self.scalar(dtype, 1.0));
        let null = self.compare(CompareOp::Equal, x, zero)?;
        let positive = self.select(null, one, x)?;
        let root = self.unary(UnaryOp::Sqrt, positive)?;
        self.select(null, zero, root)
    }
}
