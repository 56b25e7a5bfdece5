//! Gradients of recurrent layers. One node goes back through the steps; the gradients of weights are products over
//! all steps at once.

use super::rules::{Site, not_differentiable};
use crate::PassError;
use crate::builder::Builder;
use qcompile_ir::{BinaryOp, Cell, Dim, GradientRounding, Name, NodeId, Op, Recurrence, Shape};
use std::ops::Range;

type Gradient = Result<NodeId, PassError>;

/// A layer with its sizes.
struct Layer<'a> {
    recurrence: &'a Recurrence,
    y: NodeId,
    steps: usize,
    batch: Dim,
    hidden: usize,
}

pub(super) fn gradient(b: &mut Builder<'_>, site: &Site, recurrence: &Recurrence) -> Gradient {
    let [_, rows, batch, hidden] = b.shape(site.y).0[..] else {
        return Err(not_differentiable(b, site, "it is no recurrence"));
    };
    let (steps, hidden) = (rows.scale - 1, hidden.scale);
    let layer = Layer { recurrence, y: site.y, steps, batch, hidden };
    let back = layer.back(b, site)?;
    let at = recurrence.operands();
    match site.position {
        0 => layer.gates(b, "", back, 0..recurrence.cell.gates()),
        1 => layer.weight(b, back),
        2 => layer.start(b, site, back, 0),
        position if Some(position) == at.cell => layer.start(b, site, back, 1),
        position if Some(position) == at.bias => {
            let inner = layer.gates(b, "inner", back, 3..4)?;
            let sum = b.sum("sum", inner, vec![0, 1])?;
            b.reshape("", sum, Shape::fixed(&[hidden]))
        }
        _ => layer.peepholes(b, back),
    }
}

impl Layer<'_> {
    /// The rows of the states that come before the steps, or after them.
    fn rows(&self, after: bool) -> Range<usize> {
        let first = usize::from(after != self.recurrence.reverse);
        first..first + self.steps
    }

    /// The node that all gradients of the layer come from.
    fn back(&self, b: &mut Builder<'_>, site: &Site) -> Gradient {
        let name = Name::from(format!("{}.steps.grad", b.graph.node(self.y).name.as_str()));
        if let Some(found) = b.graph.find(name.as_str())
            && matches!(b.graph.op(found), Op::RecurrenceGrad { .. })
            && b.graph.operand(found, 0) == self.y
        {
            return Ok(found);
        }
        let cell = self.recurrence.cell;
        if cut(b, site.dy, 0, cell.states()..cell.sections())?.is_some() {
            return Err(not_differentiable(b, site, "what a recurrence keeps has no gradient"));
        }
        let states = Shape(vec![self.steps.into(), self.batch, self.hidden.into()]);
        let gradient = |b: &mut Builder<'_>, state: usize| {
            let part = cut(b, site.dy, 0, state..state + 1)?;
            let part = part.map(|part| cut(b, part, 1, self.rows(true))).transpose()?.flatten();
            part.map(|part| b.reshape("states", part, states.clone())).transpose()
        };
        let dh = match gradient(b, 0)? {
            Some(dh) => dh,
            None => {
                let dtype = b.graph.ty(self.y).dtype;
                b.splat("zeros", &qcompile_ir::TensorType::new(dtype, states.clone()), 0.0)?
            }
        };
        let dc = if cell == Cell::Lstm { gradient(b, 1)? } else { None };
        let at = self.recurrence.operands();
        let mut operands = vec![self.y, site.operands[1], dh];
        operands.extend(dc);
        let rest = [at.peepholes, at.lengths].into_iter().flatten();
        operands.extend(rest.map(|position| site.operands[position]));
        // What the products of the backward pass read is for the note of the layer to say.
        let recurrence = self.recurrence.with_products(None);
        let rounding = GradientRounding::Nearest;
        let op = Op::RecurrenceGrad { recurrence, cell: dc.is_some(), rounding };
        Ok(b.graph.add(op, &operands, name, b.region)?)
    }

    /// The gradients of some gates at all steps, `[steps, batch, gates · hidden]`.
    fn gates(
        &self,
        b: &mut Builder<'_>,
        suffix: &str,
        back: NodeId,
        gates: Range<usize>,
    ) -> Gradient {
        let columns = gates.start * self.hidden..gates.end * self.hidden;
        let steps = slice(b, "steps", back, 0, 0..self.steps)?;
        slice(b, suffix, steps, 2, columns)
    }

    /// A state before (or after) each step, `[steps, batch, hidden]`.
    fn state(&self, b: &mut Builder<'_>, state: usize, after: bool) -> Gradient {
        let all = slice(b, "state", self.y, 0, state..state + 1)?;
        let all = slice(b, "state", all, 1, self.rows(after))?;
        let shape = Shape(vec![self.steps.into(), self.batch, self.hidden.into()]);
        b.reshape("state", all, shape)
    }

    /// `dgatesᵀ h` over all steps and rows at once.
    fn product(
        &self,
        b: &mut Builder<'_>,
        suffix: &str,
        back: NodeId,
        gates: Range<usize>,
        h: NodeId,
    ) -> Gradient {
        let all = Dim::fixed(self.steps).times(self.batch);
        let all = all.ok_or_else(|| PassError::Unsupported {
            pass: "differentiate",
            reason: "a number of rows that overflows".to_owned(),
        })?;
        let flat = |columns: usize| Shape(vec![all, columns.into()]);
        let columns = gates.len() * self.hidden;
        let d = self.gates(b, "gates", back, gates)?;
        let d = b.reshape("rows", d, flat(columns))?;
        let h = b.reshape("h", h, flat(self.hidden))?;
        b.add(suffix, Op::Matmul { transpose_a: true, transpose_b: false }, &[d, h])
    }

    /// The gradient of R.
    fn weight(&self, b: &mut Builder<'_>, back: NodeId) -> Gradient {
        let h = self.state(b, 0, false)?;
        let (inner, candidate) = match self.recurrence.cell {
            Cell::Lstm | Cell::Rnn => {
                return self.product(b, "", back, 0..self.recurrence.cell.gates(), h);
            }
            Cell::LinearGru => (h, 3..4),
            Cell::Gru => {
                let r = slice(b, "reset", self.y, 0, 2..3)?;
                let r = slice(b, "reset", r, 1, 0..self.steps)?;
                let shape = b.shape(h);
                let r = b.reshape("reset", r, shape)?;
                (b.binary("reset.h", BinaryOp::Mul, r, h)?, 2..3)
            }
        };
        let gates = self.product(b, "gates", back, 0..2, h)?;
        let candidate = self.product(b, "candidate", back, candidate, inner)?;
        b.add("", Op::Concat { axis: 0 }, &[gates, candidate])
    }

    /// The gradient of a state before the first step: what came back, and what the result's own use of it adds.
    fn start(&self, b: &mut Builder<'_>, site: &Site, back: NodeId, state: usize) -> Gradient {
        let shape = Shape(vec![self.batch, self.hidden.into()]);
        let last = slice(b, "start", back, 0, self.steps..self.steps + 1)?;
        let columns = state * self.hidden..(state + 1) * self.hidden;
        let last = slice(b, "start", last, 2, columns)?;
        let first = if self.recurrence.reverse { self.steps } else { 0 };
        let own = cut(b, site.dy, 0, state..state + 1)?;
        let own = own.map(|own| cut(b, own, 1, first..first + 1)).transpose()?.flatten();
        match own {
            None => b.reshape("", last, shape),
            Some(own) => {
                let own = b.reshape("own", own, shape.clone())?;
                let last = b.reshape("last", last, shape)?;
                b.binary("", BinaryOp::Add, last, own)
            }
        }
    }

    fn peepholes(&self, b: &mut Builder<'_>, back: NodeId) -> Gradient {
        let mut parts = Vec::new();
        for (gate, after) in [(0, false), (1, true), (2, false)] {
            let d = self.gates(b, "gate", back, gate..gate + 1)?;
            let c = self.state(b, 1, after)?;
            let product = b.binary("product", BinaryOp::Mul, d, c)?;
            let sum = b.sum("sum", product, vec![0, 1])?;
            parts.push(b.reshape("part", sum, Shape::fixed(&[1, self.hidden]))?);
        }
        b.add("", Op::Concat { axis: 0 }, &parts)
    }
}

/// A range of an axis; `x` itself if it is all of it.
fn slice(
    b: &mut Builder<'_>,
    suffix: &str,
    x: NodeId,
    axis: usize,
    range: Range<usize>,
) -> Gradient {
    if range.start == 0 && b.graph.ty(x).shape.0[axis] == Dim::fixed(range.end) {
        return Ok(x);
    }
    let op = Op::Slice { axis, start: range.start, end: range.end, step: 1 };
    b.add(suffix, op, &[x])
}

/// A range of an axis of a gradient: found in what was padded and added to make it, where it can be; none if it is
/// zero.
fn cut(
    b: &mut Builder<'_>,
    dy: NodeId,
    axis: usize,
    range: Range<usize>,
) -> Result<Option<NodeId>, PassError> {
    if range.is_empty() {
        return Ok(None);
    }
    match *b.graph.op(dy) {
        Op::Binary(BinaryOp::Add) => {
            let first = cut(b, b.graph.operand(dy, 0), axis, range.clone())?;
            let second = cut(b, b.graph.operand(dy, 1), axis, range)?;
            match (first, second) {
                (Some(first), Some(second)) => {
                    b.binary("both", BinaryOp::Add, first, second).map(Some)
                }
                (one, other) => Ok(one.or(other)),
            }
        }
        Op::Pad { axis: padded, low, interior: 0, value: 0.0, .. } if padded == axis => {
            let x = b.graph.operand(dy, 0);
            let within = low..low + b.graph.ty(x).shape.0[axis].scale;
            if range.end <= within.start || range.start >= within.end {
                Ok(None)
            } else if range.start >= within.start && range.end <= within.end {
                cut(b, x, axis, range.start - low..range.end - low)
            } else {
                slice(b, "cut", dy, axis, range).map(Some)
            }
        }
        _ => slice(b, "cut", dy, axis, range).map(Some),
    }
}
