//! Elementwise ops, reductions, and what runs over rows.

use super::view::Placed;
use super::writer::{Attribute, int, ints};
use super::{Exporter, Result};
use crate::tensor::onnx_number;
use qcompile_ir::{
    BinaryOp, CompareOp, DType, Dim, NodeId, Op, QuantizedRange, ReduceOp, Tensor, UnaryOp,
};

impl Exporter<'_> {
    /// The order of axes in which values of the same type meet: that of the one whose tensor has most, of equal ones that
    /// which is computed; with every axis that any of them has.
    pub(super) fn shared_order(&self, operands: &[NodeId]) -> Vec<usize> {
        let views: Vec<_> = operands.iter().map(|&id| self.view(id)).collect();
        let large = |at: usize| -> Vec<usize> {
            let axes = 0..views[at].axes.len();
            axes.filter(|&axis| views[at].extent(axis) != Dim::ONE).collect()
        };
        let computed = |at: usize| !self.graph.op(operands[at]).is_leaf();
        let leader = (0..operands.len())
            .rev()
            .max_by_key(|&at| (large(at).len(), computed(at)))
            .unwrap_or(0);
        let mut order = views[leader].order();
        for at in 0..operands.len() {
            for axis in large(at) {
                if !order.contains(&axis) {
                    let place = order.iter().position(|&other| other > axis);
                    order.insert(place.unwrap_or(order.len()), axis);
                }
            }
        }
        order
    }

    /// `operator` over operands of the value's dimensions, with numpy's broadcasting.
    pub(super) fn elementwise(
        &mut self,
        id: NodeId,
        operator: &'static str,
        operands: &[NodeId],
        attributes: Vec<(&'static str, Attribute)>,
    ) -> Result<()> {
        let order = self.shared_order(operands);
        let mut tensors = Vec::with_capacity(operands.len());
        for &operand in operands {
            tensors.push(self.arranged(operand, &order, &[])?);
        }
        let inputs = tensors.iter().map(|tensor| tensor.name.clone()).collect();
        let dims = broadcast(&tensors);
        let name = self.one(operator, inputs, self.name(id), attributes);
        self.place(id, Placed { name, dims }, &order);
        Ok(())
    }

    /// `operator` over one tensor with more inputs that are scalars.
    pub(super) fn elementwise_with(
        &mut self,
        id: NodeId,
        operator: &'static str,
        operand: NodeId,
        more: &[String],
    ) -> Result<()> {
        let order = self.shared_order(&[operand]);
        let tensor = self.arranged(operand, &order, &[])?;
        let mut inputs = vec![tensor.name];
        inputs.extend_from_slice(more);
        let name = self.one(operator, inputs, self.name(id), vec![]);
        self.place(id, Placed { name, dims: tensor.dims }, &order);
        Ok(())
    }

    pub(super) fn unary(&mut self, id: NodeId, op: UnaryOp, x: NodeId) -> Result<()> {
        let dtype = self.dtype(id);
        let operator = match op {
            UnaryOp::Neg => "Neg",
            UnaryOp::Abs => "Abs",
            UnaryOp::Exp => "Exp",
            UnaryOp::Log => "Log",
            UnaryOp::Sqrt => "Sqrt",
            UnaryOp::Reciprocal => "Reciprocal",
            UnaryOp::Erf => "Erf",
            UnaryOp::Relu if !dtype.is_float() => {
                // Relu takes integers only from opset 14 on, and not all of them.
                let zero = self.scalar(dtype, 0.0, "zero");
                return self.elementwise_with(id, "Max", x, &[zero]);
            }
            UnaryOp::Relu => "Relu",
            UnaryOp::Sigmoid => "Sigmoid",
            UnaryOp::Tanh => "Tanh",
            UnaryOp::Sin => "Sin",
            UnaryOp::Cos => "Cos",
            UnaryOp::Atan => "Atan",
            UnaryOp::Floor => "Floor",
            UnaryOp::Ceil => "Ceil",
            UnaryOp::Round => "Round",
            UnaryOp::Sign => "Sign",
            UnaryOp::Not => "Not",
            UnaryOp::StopGradient => {
                let axes: Vec<_> = (0..self.dims(id).len()).map(Some).collect();
                return self.alias(id, x, &axes);
            }
        };
        if operator == "Neg" && dtype == DType::U8 {
            return self.unsupported(id, "Neg of uint8");
        }
        self.require_type(id, operator, dtype)?;
        self.elementwise(id, operator, &[x], vec![])
    }

    pub(super) fn binary(&mut self, id: NodeId, op: BinaryOp, operands: &[NodeId]) -> Result<()> {
        let operator = match op {
            BinaryOp::Add => "Add",
            BinaryOp::Sub => "Sub",
            BinaryOp::Mul => "Mul",
            BinaryOp::Div => "Div",
            BinaryOp::Max => "Max",
            BinaryOp::Min => "Min",
            BinaryOp::Pow => "Pow",
            BinaryOp::And if self.dtype(id) == DType::Bool => "And",
            BinaryOp::Or if self.dtype(id) == DType::Bool => "Or",
            BinaryOp::And => "BitwiseAnd",
            BinaryOp::Or => "BitwiseOr",
        };
        if operator.starts_with("Bitwise") {
            self.require(id, 18, operator)?;
        }
        self.require_type(id, operator, self.dtype(id))?;
        self.elementwise(id, operator, operands, vec![])
    }

    pub(super) fn compare(&mut self, id: NodeId, op: CompareOp, operands: &[NodeId]) -> Result<()> {
        let operator = match op {
            CompareOp::Equal => "Equal",
            CompareOp::Less => "Less",
            CompareOp::LessEqual => "LessOrEqual",
        };
        if self.dtype(operands[0]) == DType::Bool && op != CompareOp::Equal {
            return self.unsupported(id, "an order of bool");
        }
        self.elementwise(id, operator, operands, vec![])
    }

    pub(super) fn cast(&mut self, id: NodeId, to: DType, x: NodeId) -> Result<()> {
        let to = vec![("to", Attribute::Int(i64::from(onnx_number(to))))];
        self.elementwise(id, "Cast", &[x], to)
    }

    pub(super) fn reduce(
        &mut self,
        id: NodeId,
        op: ReduceOp,
        axes: &[usize],
        x: NodeId,
    ) -> Result<()> {
        match (op, self.dtype(id)) {
            (ReduceOp::Sum, DType::I8 | DType::U8) => {
                self.unsupported(id, format!("ReduceSum of {}", self.dtype(id)))
            }
            (ReduceOp::Sum, _) => self.reduce_by(id, "ReduceSum", axes, x),
            (ReduceOp::Max, _) => self.reduce_by(id, "ReduceMax", axes, x),
        }
    }

    /// A reduction that keeps its axes with size 1.
    pub(super) fn reduce_by(
        &mut self,
        id: NodeId,
        operator: &'static str,
        axes: &[usize],
        x: NodeId,
    ) -> Result<()> {
        let mut order = self.shared_order(&[x]);
        for &axis in axes {
            // What the value repeats along a reduced axis is there as often.
            if self.dims(x)[axis] != Dim::ONE && !order.contains(&axis) {
                let place = order.iter().position(|&other| other > axis);
                order.insert(place.unwrap_or(order.len()), axis);
            }
        }
        let reduced: Vec<usize> =
            order.iter().copied().filter(|axis| axes.contains(axis)).collect();
        let tensor = self.arranged(x, &order, &reduced)?;
        let first = order.len().saturating_sub(tensor.dims.len());
        let places: Vec<usize> =
            (first..order.len()).filter(|&at| reduced.contains(&order[at])).collect();
        let places: Vec<usize> = places.into_iter().map(|at| at - first).collect();
        if places.is_empty() {
            // A sum, maximum or mean over axes of size 1.
            self.place(id, tensor, &order);
            return Ok(());
        }
        let mut dims = tensor.dims.clone();
        for &place in &places {
            dims[place] = Dim::ONE;
        }
        let mut inputs = vec![tensor.name];
        let mut attributes = vec![("keepdims", Attribute::Int(1))];
        // The axes of ReduceSum became an input in opset 13, those of the others in 18.
        if operator == "ReduceSum" || self.opset >= 18 {
            inputs.push(self.integers(&ints(&places)));
        } else {
            attributes.insert(0, ("axes", Attribute::Ints(ints(&places))));
        }
        let name = self.one(operator, inputs, self.name(id), attributes);
        self.place(id, Placed { name, dims }, &order);
        Ok(())
    }

    /// What runs over the last axis of a value.
    pub(super) fn rows(&mut self, id: NodeId, operator: &'static str, x: NodeId) -> Result<()> {
        let Some(last) = self.dims(id).len().checked_sub(1) else {
            return self.unsupported(id, "a row of a scalar");
        };
        let mut order = self.shared_order(&[x]);
        if !order.contains(&last) {
            order.push(last);
        }
        let tensor = self.arranged(x, &order, &[last])?;
        let first = order.len() - tensor.dims.len();
        let place = order.iter().position(|&axis| axis == last).unwrap_or(first) - first;
        let axis = vec![("axis", Attribute::Int(int(place)))];
        let name = self.one(operator, vec![tensor.name], self.name(id), axis);
        self.place(id, Placed { name, dims: tensor.dims }, &order);
        Ok(())
    }

    /// Where the foremost elements of each row are.
    pub(super) fn top_k(&mut self, id: NodeId, k: usize, largest: bool, x: NodeId) -> Result<()> {
        let Some(last) = self.dims(x).len().checked_sub(1) else {
            return self.unsupported(id, "a row of a scalar");
        };
        let mut order = self.shared_order(&[x]);
        if !order.contains(&last) {
            order.push(last);
        }
        let exact = order.clone();
        let mut tensor = self.arranged(x, &order, &exact)?;
        let place = order.iter().position(|&axis| axis == last).unwrap_or(0);
        let count = self.integers(&[int(k)]);
        let mut attributes = vec![("axis", Attribute::Int(int(place)))];
        if !largest {
            attributes.push(("largest", Attribute::Int(0)));
        }
        let values = format!("{}.values", self.name(id));
        let wanted = [values.as_str(), self.name(id)];
        let results = self.writer.node("TopK", vec![tensor.name, count], &wanted, attributes);
        tensor.name = results.into_iter().nth(1).unwrap_or_default();
        tensor.dims[place] = Dim::fixed(k);
        self.place(id, tensor, &order);
        Ok(())
    }

    pub(super) fn cross_entropy(&mut self, id: NodeId, operands: &[NodeId]) -> Result<()> {
        let logits = self.natural(operands[0])?.name;
        let label = self.natural(operands[1])?.name;
        let attributes =
            vec![("ignore_index", Attribute::Int(-100)), ("reduction", Attribute::Text("none"))];
        let name =
            self.one("SoftmaxCrossEntropyLoss", vec![logits, label], self.name(id), attributes);
        self.place_natural(id, name);
        Ok(())
    }

    /// Rounding to the symmetric range: ONNX's begins one lower.
    pub(super) fn quantize(
        &mut self,
        id: NodeId,
        dtype: DType,
        axis: Option<usize>,
        operands: &[NodeId],
    ) -> Result<()> {
        let (order, tensor, scale) = self.scaled(axis, operands)?;
        if dtype == DType::I32 {
            return self.unsupported(id, "ONNX does not quantize to int32");
        }
        let zero = self.zero_point(id, dtype, axis, operands)?;
        self.require_type(id, "QuantizeLinear", dtype)?;
        let parameters = [scale.clone(), zero.clone()];
        if let Some((codes, by)) = self.dequantized.get(&tensor.name)
            && axis.is_none()
            && *by == parameters
            && self.constants.get(&parameters[0]).is_some_and(|scale| is_positive(scale))
        {
            // Rounded already, by the same scale.
            let codes = codes.clone();
            self.place(id, codes, &order);
            return Ok(());
        }
        let attributes = quantized_axis(&order, axis);
        let inputs = vec![tensor.name, scale, zero];
        let symmetric = matches!(dtype, DType::I8 | DType::I4) && operands.len() == 2;
        let name = match QuantizedRange::of(dtype, false).filter(|_| symmetric) {
            None => self.one("QuantizeLinear", inputs, self.name(id), attributes),
            Some(_) if dtype == DType::I4 => {
                return self.unsupported(id, "ONNX does not clip int4");
            }
            Some(range) => {
                let wanted = format!("{}.all", self.name(id));
                let all = self.one("QuantizeLinear", inputs, &wanted, attributes);
                let low = self.scalar(dtype, f64::from(range.low), "smallest");
                self.one("Clip", vec![all, low], self.name(id), vec![])
            }
        };
        self.place(id, Placed { name, dims: tensor.dims }, &order);
        Ok(())
    }

    pub(super) fn dequantize(
        &mut self,
        id: NodeId,
        axis: Option<usize>,
        operands: &[NodeId],
    ) -> Result<()> {
        let (order, tensor, scale) = self.scaled(axis, operands)?;
        let zero = self.zero_point(id, self.dtype(operands[0]), axis, operands)?;
        self.require_type(id, "DequantizeLinear", self.dtype(operands[0]))?;
        let attributes = quantized_axis(&order, axis);
        let inputs = vec![tensor.name.clone(), scale.clone(), zero.clone()];
        let name = self.one("DequantizeLinear", inputs, self.name(id), attributes);
        if axis.is_none() {
            self.dequantized.insert(name.clone(), (tensor.clone(), [scale, zero]));
        }
        self.place(id, Placed { name, dims: tensor.dims }, &order);
        Ok(())
    }

    /// A value with all its axes, and the scale of its rounding.
    fn scaled(
        &mut self,
        axis: Option<usize>,
        operands: &[NodeId],
    ) -> Result<(Vec<usize>, Placed, String)> {
        let mut order = self.shared_order(&operands[..1]);
        if let Some(axis) = axis
            && !order.contains(&axis)
        {
            order.push(axis);
        }
        let exact = order.clone();
        let tensor = self.arranged(operands[0], &order, &exact)?;
        let scale = self.natural(operands[1])?.name;
        Ok((order, tensor, scale))
    }

    fn zero_point(
        &mut self,
        id: NodeId,
        dtype: DType,
        axis: Option<usize>,
        operands: &[NodeId],
    ) -> Result<String> {
        if let Some(&zero_point) = operands.get(2) {
            return Ok(self.natural(zero_point)?.name);
        }
        let x = operands[0];
        let size = axis.and_then(|axis| self.dims(x)[axis].as_fixed());
        let sizes: Vec<usize> = size.into_iter().collect();
        self.filled(id, dtype, &sizes, 0.0, "zero_point")
    }
}

/// Whether every element is a normal number above 0.
fn is_positive(scale: &Tensor) -> bool {
    scale.to_f32().iter().all(|element| element.is_normal() && *element > 0.0)
}

/// The attribute for an axis of the value, where the scale has one.
fn quantized_axis(order: &[usize], axis: Option<usize>) -> Vec<(&'static str, Attribute)> {
    let place = axis.and_then(|axis| order.iter().position(|&other| other == axis));
    place.map(|place| ("axis", Attribute::Int(int(place)))).into_iter().collect()
}

/// The dimensions of a result under numpy's broadcasting.
pub(super) fn broadcast(tensors: &[Placed]) -> Vec<Dim> {
    let rank = tensors.iter().map(|tensor| tensor.dims.len()).max().unwrap_or(0);
    let mut dims = vec![Dim::ONE; rank];
    for tensor in tensors {
        let first = rank - tensor.dims.len();
        for (at, &dim) in tensor.dims.iter().enumerate() {
            if dim != Dim::ONE {
                dims[first + at] = dim;
            }
        }
    }
    dims
}

/// Whether a value is a constant all of whose elements are equal, and which.
pub(super) fn uniform(op: &Op) -> Option<f64> {
    match op {
        Op::Const(tensor) => tensor.splat(),
        _ => None,
    }
}
