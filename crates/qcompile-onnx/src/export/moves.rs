//! Ops that move elements.

use super::view::Placed;
use super::writer::{Attribute, int, ints};
use super::{Exporter, Result};
use qcompile_ir::{DType, Dim, NodeId, ScatterOp, Tensor};

/// A part along one axis: start, end and step.
#[derive(Clone)]
pub(super) struct Part {
    axis: usize,
    range: [usize; 3],
}

impl Exporter<'_> {
    /// The number of elements along a dimension, as f32.
    pub(super) fn size(&mut self, id: NodeId, dim: Dim) -> Result<()> {
        let Some(sizes) = self.sizes(&[dim]) else {
            return self.unsupported(id, "no input has the batch size");
        };
        let to = vec![("to", Attribute::Int(1))];
        let size = self.one("Cast", vec![sizes], self.name(id), to);
        // One element is a scalar to whoever reads it.
        self.place(id, Placed { name: size, dims: vec![Dim::ONE] }, &[]);
        Ok(())
    }

    pub(super) fn slice(
        &mut self,
        id: NodeId,
        x: NodeId,
        axis: usize,
        [start, end, step]: [usize; 3],
    ) -> Result<()> {
        if self.recurrences.contains_key(&x) {
            return self.slice_states(id, x, axis, [start, end, step]);
        }
        let view = self.view(x);
        let place = view.axes[axis].filter(|&place| view.tensor.dims[place] == self.dims(x)[axis]);
        let whole = self.dims(id)[axis] == self.dims(x)[axis];
        let Some(place) = place.filter(|_| !whole) else {
            // A part of what repeats repeats.
            let axes: Vec<_> = (0..view.axes.len()).map(Some).collect();
            return self.alias(id, x, &axes);
        };
        let mut tensor = view.tensor.clone();
        tensor.dims[place] = self.dims(id)[axis];
        tensor.name =
            self.slice_tensor(&view.tensor.name, place, [start, end, step], self.name(id));
        self.views.insert(id, super::View { tensor, axes: view.axes });
        Ok(())
    }

    /// Elements of a tensor along one axis; its name. What was a part along another axis already is one part along both.
    pub(super) fn slice_tensor(
        &mut self,
        tensor: &str,
        axis: usize,
        range: [usize; 3],
        wanted: &str,
    ) -> String {
        let part = Part { axis, range };
        let earlier = self.sliced.get(tensor).cloned();
        let (source, parts) = match earlier {
            Some((source, mut parts)) if parts.iter().all(|part| part.axis != axis) => {
                parts.push(part);
                (source, parts)
            }
            _ => (tensor.to_owned(), vec![part]),
        };
        let mut inputs = vec![source.clone()];
        for at in 0..2 {
            let values: Vec<usize> = parts.iter().map(|part| part.range[at]).collect();
            inputs.push(self.integers(&ints(&values)));
        }
        let axes: Vec<usize> = parts.iter().map(|part| part.axis).collect();
        inputs.push(self.integers(&ints(&axes)));
        let steps: Vec<usize> = parts.iter().map(|part| part.range[2]).collect();
        if steps.iter().any(|&step| step != 1) {
            inputs.push(self.integers(&ints(&steps)));
        }
        let name = self.one("Slice", inputs, wanted, vec![]);
        self.sliced.insert(name.clone(), (source, parts));
        name
    }

    pub(super) fn pad(
        &mut self,
        id: NodeId,
        x: NodeId,
        axis: usize,
        [low, high, interior]: [usize; 3],
        value: f32,
    ) -> Result<()> {
        let mut order = self.shared_order(&[x]);
        if !order.contains(&axis) {
            let place = order.iter().position(|&other| other > axis);
            order.insert(place.unwrap_or(order.len()), axis);
        }
        // Every axis that the tensor has is exact, so that none is missing.
        let exact = order.clone();
        let mut tensor = self.arranged(x, &order, &exact)?;
        let place = order.iter().position(|&other| other == axis).unwrap_or(0);
        // Among integers it counts without its fraction.
        let dtype = self.dtype(id);
        let value = if dtype.is_float() { value } else { value.trunc() };
        let fill = self.scalar(dtype, f64::from(value), "padding");
        if interior > 0 && tensor.dims[place].scale > 0 {
            tensor = self.spread(x, &tensor, place, interior, &fill)?;
        }
        if low > 0 || high > 0 {
            let mut pads = vec![0; 2 * tensor.dims.len()];
            pads[place] = low;
            pads[place + tensor.dims.len()] = high;
            tensor.name = self.pad_tensor(&tensor.name, &pads, &fill, self.name(id));
        }
        tensor.dims[place] = self.dims(id)[axis];
        self.place(id, tensor, &order);
        Ok(())
    }

    fn pad_tensor(&mut self, tensor: &str, pads: &[usize], fill: &str, wanted: &str) -> String {
        let pads = self.integers(&ints(pads));
        self.one("Pad", vec![tensor.to_owned(), pads, fill.to_owned()], wanted, vec![])
    }

    /// A tensor with `interior` fillings between neighbours along one axis: each element becomes a row that is padded.
    fn spread(
        &mut self,
        id: NodeId,
        tensor: &Placed,
        axis: usize,
        interior: usize,
        fill: &str,
    ) -> Result<Placed> {
        let overflow = |exporter: &Self| exporter.unsupported(id, "padding that overflows");
        let count = tensor.dims[axis].scale;
        let Some(spread) = interior.checked_add(1).and_then(|step| step.checked_mul(count)) else {
            return overflow(self);
        };
        let wanted = format!("{}.spread", tensor.name);
        let mut rows = tensor.dims.clone();
        rows.insert(axis + 1, Dim::ONE);
        let rows = self.reshaped_tensor(id, tensor, &rows)?;
        let rank = rows.dims.len();
        let mut pads = vec![0; 2 * rank];
        pads[rank + axis + 1] = interior;
        let mut padded = Placed {
            name: self.pad_tensor(&rows.name, &pads, fill, &wanted),
            dims: rows.dims.clone(),
        };
        padded.dims[axis + 1] = Dim::fixed(interior + 1);
        let mut flat = tensor.dims.clone();
        flat[axis] = Dim::fixed(spread);
        let mut flat = self.reshaped_tensor(id, &padded, &flat)?;
        // The last element has nothing after it.
        let end = spread - interior;
        flat.name = self.slice_tensor(&flat.name, axis, [0, end, 1], &wanted);
        flat.dims[axis] = Dim::fixed(end);
        Ok(flat)
    }

    pub(super) fn concat(&mut self, id: NodeId, axis: usize, operands: &[NodeId]) -> Result<()> {
        let mut order = self.shared_order(operands);
        if !order.contains(&axis) {
            let place = order.iter().position(|&other| other > axis);
            order.insert(place.unwrap_or(order.len()), axis);
        }
        let exact = order.clone();
        let mut inputs = Vec::with_capacity(operands.len());
        for &operand in operands {
            inputs.push(self.arranged(operand, &order, &exact)?.name);
        }
        let dims = order.iter().map(|&axis| self.dims(id)[axis]).collect();
        let place = order.iter().position(|&other| other == axis).unwrap_or(0);
        let attributes = vec![("axis", Attribute::Int(int(place)))];
        let name = self.one("Concat", inputs, self.name(id), attributes);
        self.place(id, Placed { name, dims }, &order);
        Ok(())
    }

    /// Rows of a table. The axis of the rows is wherever the table's tensor has it, and the result has the axes of the
    /// indices there.
    pub(super) fn gather(&mut self, id: NodeId, operands: &[NodeId]) -> Result<()> {
        let (table, indices) = (operands[0], operands[1]);
        let mut order = self.shared_order(&[table]);
        if !order.contains(&0) {
            order.insert(0, 0);
        }
        let exact = order.clone();
        let tensor = self.arranged(table, &order, &exact)?;
        let place = order.iter().position(|&axis| axis == 0).unwrap_or(0);
        let indices_rank = self.dims(indices).len();
        let index = self.natural(indices)?;
        let mut dims = tensor.dims.clone();
        dims.splice(place..=place, index.dims.iter().copied());
        // Axes of the result in the order of the tensor.
        let mut result: Vec<usize> = Vec::with_capacity(dims.len());
        for &axis in &order {
            match axis.checked_sub(1) {
                None => result.extend(0..indices_rank),
                Some(axis) => result.push(indices_rank + axis),
            }
        }
        let axis = vec![("axis", Attribute::Int(int(place)))];
        let name = self.one("Gather", vec![tensor.name, index.name], self.name(id), axis);
        self.place(id, Placed { name, dims }, &result);
        Ok(())
    }

    /// Rows that combine the values of their index, from what nothing comes to.
    pub(super) fn scatter(
        &mut self,
        id: NodeId,
        op: ScatterOp,
        rows: Dim,
        operands: &[NodeId],
    ) -> Result<()> {
        let dtype = self.dtype(id);
        let (reduction, needs, nothing) = match op {
            ScatterOp::Add => ("add", 16, Tensor::zeros(dtype, &[])),
            ScatterOp::Mul => ("mul", 16, Tensor::scalar(dtype, 1.0)),
            ScatterOp::Max => ("max", 18, Tensor::scalar(dtype, smallest(dtype))),
        };
        self.require(id, needs, format!("ScatterND with reduction `{reduction}`"))?;
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
        let nothing = self.writer.constant("nothing", &nothing);
        let wanted = format!("{}.start", self.name(id));
        let start = self.one("Expand", vec![nothing, sizes], &wanted, vec![]);
        let reduction = vec![("reduction", Attribute::Text(reduction))];
        let inputs = vec![start, index.name, values.name];
        let name = self.one("ScatterND", inputs, self.name(id), reduction);
        self.place_natural(id, name);
        Ok(())
    }

    /// 0, 1, 2, ...
    pub(super) fn iota(&mut self, id: NodeId, dim: Dim) -> Result<()> {
        let Some(sizes) = self.sizes(&[dim]) else {
            return self.unsupported(id, "no input has the batch size");
        };
        let size = Placed { name: sizes, dims: vec![Dim::ONE] };
        let limit = self.reshaped_tensor(id, &size, &[])?.name;
        let start = self.scalar(DType::I64, 0.0, "first");
        let step = self.scalar(DType::I64, 1.0, "step");
        let name = self.one("Range", vec![start, limit, step], self.name(id), vec![]);
        self.place_natural(id, name);
        Ok(())
    }

    /// What the graph has as int64 and ONNX wants as int32.
    pub(super) fn as_i32(&mut self, name: String) -> String {
        let number = i64::from(crate::tensor::onnx_number(DType::I32));
        let wanted = format!("{name}.int32");
        self.one("Cast", vec![name], &wanted, vec![("to", Attribute::Int(number))])
    }
}

/// The smallest value of an element type.
fn smallest(dtype: DType) -> f64 {
    match dtype {
        DType::Bool => 0.0,
        #[allow(clippy::cast_precision_loss, reason = "powers of two")]
        _ => dtype.integer_range().map_or(f64::NEG_INFINITY, |(smallest, _)| smallest as f64),
    }
}
