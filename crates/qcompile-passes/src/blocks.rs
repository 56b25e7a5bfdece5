//! Blocks: neighbouring elements of a tensor, row-major, that share a scale (Dettmers et al. 2022, arXiv:2110.02861).

use crate::PassError;
use crate::builder::Builder;
use qcompile_ir::{BinaryOp, DType, Dim, Graph, NodeId, Op, ReduceOp, Shape, UnaryOp};

/// Elements of a block, if that divides the tensor.
const LARGEST: usize = 256;
/// With fewer elements in a block, scales would take more than a sixteenth of what codes take.
const SMALLEST: usize = 64;
/// What a block of zeros is divided by.
const TINY: f64 = 1e-30;

/// Elements of a block of a tensor with so many: the largest divisor from 64 to 256; a tensor without one is one block.
fn size(elements: usize) -> usize {
    size_in_multiples(elements, 1).unwrap_or(elements)
}

/// The same among multiples of `unit`; a tensor without such a divisor is one block, if it has a multiple of it.
fn size_in_multiples(elements: usize, unit: usize) -> Option<usize> {
    let fits = |size: &usize| elements.is_multiple_of(*size) && size.is_multiple_of(unit);
    let whole = Some(elements).filter(|_| elements.is_multiple_of(unit));
    (SMALLEST..=LARGEST).rev().find(fits).or(whole)
}

/// The shape `[N · blocks, elements of each]` of a value with so many elements for each sample, if blocks of a multiple
/// of `unit` elements divide it.
pub(crate) fn of_samples(per_sample: usize, unit: usize) -> Option<Shape> {
    let size = size_in_multiples(per_sample, unit).filter(|size| *size > 0)?;
    Some(Shape(vec![Dim { scale: per_sample / size, batch: true }, Dim::fixed(size)]))
}

/// The shape `[blocks, elements of each]` under which a tensor of fixed sizes is seen; none if its sizes depend on the
/// batch, or there are no elements.
pub(crate) fn shape(graph: &Graph, id: NodeId) -> Option<Shape> {
    let elements: usize = graph.ty(id).shape.as_fixed()?.iter().product();
    (elements > 0).then(|| Shape::fixed(&[elements / size(elements), size(elements)]))
}

impl Builder<'_> {
    /// `max(amax, 1e-30)` of each row of `x[blocks, elements]`, `[blocks, 1]`.
    pub(crate) fn block_amax(&mut self, x: NodeId) -> Result<NodeId, PassError> {
        let magnitude = self.unary("abs", UnaryOp::Abs, x)?;
        let op = Op::Reduce { op: ReduceOp::Max, axes: vec![1] };
        let peak = self.add("peak", op, &[magnitude])?;
        let tiny = self.splat_like("smallest", peak, TINY)?;
        self.binary("amax", BinaryOp::Max, peak, tiny)
    }

    /// `x[blocks, elements]` as i8 codes with one scale for each block, rounded up or down at random by `numbers` in
    /// [0, 1): codes and scales `[blocks]`.
    pub(crate) fn block_codes(
        &mut self,
        x: NodeId,
        numbers: NodeId,
    ) -> Result<[NodeId; 2], PassError> {
        let amax = self.block_amax(x)?;
        let limit = self.splat_like("limit", amax, 127.0)?;
        let step = self.binary("step", BinaryOp::Div, amax, limit)?;
        let shape = self.shape(x);
        let steps = self.broadcast("steps", step, shape)?;
        let noise = self.rounding_noise(numbers, steps)?;
        let noisy = self.binary("noisy", BinaryOp::Add, x, noise)?;
        let rows = Shape(vec![self.shape(x).0[0]]);
        let scale = self.reshape("scale", step, rows)?;
        let op = Op::Quantize { dtype: DType::I8, axis: Some(0) };
        Ok([self.add("q", op, &[noisy, scale])?, scale])
    }
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn blocks_divide_their_tensor() {
        for (elements, block) in [
            (1024, 256),
            (432, 216),
            (640, 160),
            (250, 250),
            (40, 40),
            (1, 1),
            (2 * 10_007, 20_014),
        ] {
            assert_eq!((size(elements), elements % size(elements)), (block, 0));
        }
    }
}
