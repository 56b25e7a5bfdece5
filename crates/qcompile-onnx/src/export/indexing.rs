//! Places: counted, searched, and combined in.

use super::view::Placed;
use super::writer::{Attribute, int};
use super::{Exporter, Result};
use qcompile_ir::{DType, Dim, NodeId, ScatterOp, Tensor};

impl Exporter<'_> {
    /// The numbers 0, 1, 2, ... below a size.
    pub(super) fn iota(&mut self, id: NodeId, dim: Dim) -> Result<()> {
        let Some(sizes) = self.sizes(&[dim]) else {
            return self.unsupported(id, "no input has the batch size");
        };
        let limit = self.one("Squeeze", vec![sizes], "batch_size.scalar", vec![]);
        let start = self.scalar(DType::I64, 0.0, "zero");
        let delta = self.scalar(DType::I64, 1.0, "one");
        let name = self.one("Range", vec![start, limit, delta], self.name(id), vec![]);
        self.place_natural(id, name);
        Ok(())
    }

    /// Rows that combine the values of their index, beginning with what changes nothing.
    pub(super) fn scatter(
        &mut self,
        id: NodeId,
        op: ScatterOp,
        rows: Dim,
        operands: &[NodeId],
    ) -> Result<()> {
        let (reduction, neutral) = match op {
            ScatterOp::Add => ("add", 0.0),
            ScatterOp::Mul => ("mul", 1.0),
            ScatterOp::Max => ("max", f64::NEG_INFINITY),
        };
        match op {
            ScatterOp::Add | ScatterOp::Mul => self.require(id, 16, "ScatterND that combines")?,
            ScatterOp::Max => self.require(id, 18, "ScatterND with maxima")?,
        }
        let (indices, values) = (operands[0], operands[1]);
        let mut dims = self.dims(indices).to_vec();
        dims.push(Dim::ONE);
        let index = self.natural(indices)?;
        let index = self.reshaped_tensor(indices, &index, &dims)?;
        let values = self.natural(values)?;
        let mut sizes = vec![rows];
        sizes.extend_from_slice(&self.dims(id)[1..]);
        let Some(sizes) = self.sizes(&sizes) else {
            return self.unsupported(id, "no input has the batch size");
        };
        let neutral = Tensor::scalar(self.dtype(id), neutral);
        let neutral = self.writer.constant("neutral", &neutral);
        let wanted = format!("{}.start", self.name(id));
        let start = self.one("Expand", vec![neutral, sizes], &wanted, vec![]);
        let reduction = vec![("reduction", Attribute::Text(reduction))];
        let inputs = vec![start, index.name, values.name];
        let name = self.one("ScatterND", inputs, self.name(id), reduction);
        self.place_natural(id, name);
        Ok(())
    }

    /// Where the foremost elements of each row are.
    pub(super) fn top_k(&mut self, id: NodeId, k: usize, largest: bool, x: NodeId) -> Result<()> {
        let x = self.natural(x)?.name;
        let k = self.integers(&[int(k)]);
        let attributes = vec![("largest", Attribute::Int(i64::from(largest)))];
        let wanted = format!("{}.values", self.name(id));
        let results = self.writer.node("TopK", vec![x, k], &[&wanted, self.name(id)], attributes);
        let dims = self.dims(id).to_vec();
        let order: Vec<usize> = (0..dims.len()).collect();
        self.place(id, Placed { name: results[1].clone(), dims }, &order);
        Ok(())
    }
}
