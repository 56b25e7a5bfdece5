//! Quantization with a scale for each block along an axis: `block_size` of `QuantizeLinear` and `DequantizeLinear`.

use super::quantized::misfit;
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::node::{OnnxNode, axis_of};
use qcompile_ir::{Dim, Op, Shape};

type Value = Result<ValueId, Obstacle>;

/// A value seen as rows that are blocks along an axis, each with its own scale.
pub(super) struct Blocks {
    /// The dimensions of the value, and those that they become where the axis is no multiple of a block.
    own: Vec<Dim>,
    whole: Vec<Dim>,
    pub(super) axis: usize,
    /// The dimensions with the number of blocks on the axis, and the size of a block.
    apart: Vec<Dim>,
    pub(super) block: Dim,
    pub(super) rows: Dim,
}

impl Blocks {
    /// The blocks of `x` that a node asks for; none without the attribute.
    pub(super) fn of(
        draft: &Draft,
        node: &OnnxNode,
        x: ValueId,
    ) -> Result<Option<Blocks>, Obstacle> {
        let block = node.attributes.int("block_size", 0)?;
        if block == 0 {
            return Ok(None);
        }
        let block = usize::try_from(block)
            .map_err(|_| Obstacle::invalid(format!("attribute block_size is {block}")))?;
        let own = draft.dims(x).to_vec();
        let axis = axis_of(node.attributes.int("axis", 1)?, own.len())?;
        let length = own[axis].as_fixed().ok_or_else(|| {
            Obstacle::batch(format!("blocks along axis {axis}, which depends on the batch size"))
        })?;
        let block = block.min(length.max(1));
        let count = length.div_ceil(block);
        let mut whole = own.clone();
        whole[axis] = Dim::fixed(count.saturating_mul(block));
        let mut apart = own.clone();
        apart[axis] = Dim::fixed(count);
        let rows = Shape(apart.clone()).elements();
        let rows =
            rows.ok_or_else(|| Obstacle::batch("blocks that depend on the batch size twice"))?;
        Ok(Some(Blocks { own, whole, axis, apart, block: Dim::fixed(block), rows }))
    }

    /// The value as a matrix of blocks.
    pub(super) fn rows(&self, draft: &mut Draft, mut x: ValueId) -> Value {
        let high = self.whole[self.axis].scale - self.own[self.axis].scale;
        if high > 0 {
            let pad = Op::Pad { axis: self.axis, low: 0, high, interior: 0, value: 0.0 };
            x = draft.emit(pad, &[x])?;
        }
        let mut split = self.apart.clone();
        split.insert(self.axis + 1, self.block);
        let split = draft.reshape(x, &split)?;
        let last = draft.move_axis(split, self.axis + 1, self.whole.len())?;
        draft.reshape(last, &[self.rows, self.block])
    }

    /// The value that has these blocks.
    pub(super) fn value(&self, draft: &mut Draft, rows: ValueId) -> Value {
        let mut apart = self.apart.clone();
        apart.push(self.block);
        let apart = draft.reshape(rows, &apart)?;
        let split = draft.move_axis(apart, self.whole.len(), self.axis + 1)?;
        let joined = draft.reshape(split, &self.whole)?;
        draft.slice(joined, self.axis, 0, self.own[self.axis].scale)
    }

    /// A scale or zero point of each block.
    pub(super) fn parameter(&self, draft: &mut Draft, parameter: ValueId) -> Value {
        if draft.dims(parameter) != self.apart {
            return Err(misfit(draft, parameter, &self.own));
        }
        draft.reshape(parameter, &[self.rows])
    }
}
