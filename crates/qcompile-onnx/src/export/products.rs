//! Products: matrices, convolutions, attention; and pools, which move as convolutions do.

use super::view::{LARGEST_CONSTANT, Placed};
use super::writer::{Attribute, int, ints};
use super::{Exporter, Result};
use qcompile_ir::{ConvGeometry, DType, Dim, NodeId, PoolGeometry, Tensor};

/// NHWC axes in NCHW order.
const CHANNELS_FIRST: [usize; 4] = [0, 3, 1, 2];

impl Exporter<'_> {
    /// A product of matrices; of two plain ones also with a bias for each column.
    pub(super) fn matmul(
        &mut self,
        id: NodeId,
        transposed: [bool; 2],
        operands: [NodeId; 2],
        bias: Option<NodeId>,
    ) -> Result<()> {
        let rank = self.dims(operands[0]).len();
        if rank == 2 {
            let name = self.gemm(id, transposed, operands, bias)?;
            self.place_natural(id, name);
            return Ok(());
        }
        let (rows, columns) = (rank - 2, rank - 1);
        let mut tensors = Vec::with_capacity(2);
        for (operand, transposed) in operands.into_iter().zip(transposed) {
            let mut order: Vec<usize> = (0..rank).collect();
            if transposed {
                order.swap(rows, columns);
            }
            tensors.push(self.arranged(operand, &order, &[rows, columns])?);
        }
        let inputs = tensors.iter().map(|tensor| tensor.name.clone()).collect();
        for tensor in &mut tensors {
            // Only the leading axes broadcast.
            let rank = tensor.dims.len();
            tensor.dims.truncate(rank - 2);
        }
        let mut dims = super::elementwise::broadcast(&tensors);
        dims.extend_from_slice(&self.dims(id)[rows..]);
        let name = self.one("MatMul", inputs, self.name(id), vec![]);
        let order: Vec<usize> = (0..rank).collect();
        self.place(id, Placed { name, dims }, &order);
        Ok(())
    }

    /// The product of two matrices, each taken as its tensor has it.
    fn gemm(
        &mut self,
        id: NodeId,
        mut transposed: [bool; 2],
        operands: [NodeId; 2],
        bias: Option<NodeId>,
    ) -> Result<String> {
        let mut inputs = Vec::with_capacity(3);
        for (operand, transposed) in operands.into_iter().zip(&mut transposed) {
            let order = self.view(operand).order();
            let swapped = order == [1, 0];
            *transposed ^= swapped;
            let order = if swapped { [1, 0] } else { [0, 1] };
            inputs.push(self.full(operand, &order)?.name);
        }
        if transposed == [false, false] && bias.is_none() {
            return Ok(self.one("MatMul", inputs, self.name(id), vec![]));
        }
        if let Some(bias) = bias {
            inputs.push(self.vector(bias)?.name);
        }
        let mut attributes = Vec::new();
        for (name, transposed) in ["transA", "transB"].into_iter().zip(transposed) {
            if transposed {
                attributes.push((name, Attribute::Int(1)));
            }
        }
        Ok(self.one("Gemm", inputs, self.name(id), attributes))
    }

    /// A value with one axis larger than 1 as a vector; of a single element, with that.
    pub(super) fn vector(&mut self, id: NodeId) -> Result<Placed> {
        let tensor = self.natural(id)?;
        let large = tensor.dims.iter().copied().find(|&dim| dim != Dim::ONE);
        self.reshaped_tensor(id, &tensor, &[large.unwrap_or(Dim::ONE)])
    }

    /// A convolution, seen as the graph sees it.
    pub(super) fn conv(
        &mut self,
        id: NodeId,
        geometry: &ConvGeometry,
        operands: &[NodeId],
        bias: Option<NodeId>,
    ) -> Result<()> {
        self.require_type(id, "Conv", self.dtype(operands[0]))?;
        let mut inputs = vec![self.full(operands[0], &CHANNELS_FIRST)?.name];
        inputs.push(self.natural(operands[1])?.name);
        if let Some(bias) = bias {
            inputs.push(self.vector(bias)?.name);
        }
        let name = self.one("Conv", inputs, self.name(id), window(geometry));
        self.place_channels_first(id, name);
        Ok(())
    }

    fn place_channels_first(&mut self, id: NodeId, name: String) {
        let dims = CHANNELS_FIRST.map(|axis| self.dims(id)[axis]).to_vec();
        self.place(id, Placed { name, dims }, &CHANNELS_FIRST);
    }

    /// What gives the gradient of a convolution's input is a transposed convolution.
    pub(super) fn conv_transpose(
        &mut self,
        id: NodeId,
        geometry: &ConvGeometry,
        operands: &[NodeId],
    ) -> Result<()> {
        self.require_type(id, "ConvTranspose", self.dtype(operands[0]))?;
        let Some(output) = geometry.output() else {
            return self.unsupported(id, "a convolution without result");
        };
        let mut rest = [0; 2];
        for axis in 0..2 {
            // What the last stride does not reach; the sizes were checked when the op was made.
            let reach = (geometry.kernel[axis] - 1) * geometry.dilations[axis] + 1;
            let padded = geometry.input[axis] + geometry.pads[axis] + geometry.pads[axis + 2];
            rest[axis] = padded - reach - (output[axis] - 1) * geometry.strides[axis];
        }
        let inputs =
            vec![self.full(operands[0], &CHANNELS_FIRST)?.name, self.natural(operands[1])?.name];
        let mut attributes = window(geometry);
        if rest != [0, 0] {
            attributes.push(("output_padding", Attribute::Ints(ints(&rest))));
        }
        let name = self.one("ConvTranspose", inputs, self.name(id), attributes);
        self.place_channels_first(id, name);
        Ok(())
    }

    pub(super) fn pool(
        &mut self,
        id: NodeId,
        operator: &'static str,
        geometry: &PoolGeometry,
        x: NodeId,
    ) -> Result<()> {
        self.require_type(id, operator, self.dtype(x))?;
        let average = operator == "AveragePool";
        if average && geometry.dilations != [1, 1] {
            self.require(id, 19, "AveragePool with dilations")?;
        }
        let input = self.full(x, &CHANNELS_FIRST)?.name;
        let mut attributes = vec![
            ("kernel_shape", Attribute::Ints(ints(&geometry.kernel))),
            ("pads", Attribute::Ints(ints(&geometry.pads))),
            ("strides", Attribute::Ints(ints(&geometry.strides))),
        ];
        if geometry.dilations != [1, 1] {
            attributes.push(("dilations", Attribute::Ints(ints(&geometry.dilations))));
        }
        if average && geometry.count_include_pad {
            attributes.push(("count_include_pad", Attribute::Int(1)));
        }
        let name = self.one(operator, vec![input], self.name(id), attributes);
        self.place_channels_first(id, name);
        Ok(())
    }

    /// `softmax(scale · q kᵀ + mask) v` for each head, as products.
    pub(super) fn attention(
        &mut self,
        id: NodeId,
        scale: f32,
        causal: bool,
        operands: &[NodeId],
    ) -> Result<()> {
        let dtype = self.dtype(id);
        let ([b, t, h, d], [_, s, g, e]) = (self.four(operands[0]), self.four(operands[2]));
        // [b, h, t, d], or [b, g, h/g, t, d] where several heads share keys and values.
        let split = (h != g).then(|| heads_of(h, g)).flatten();
        let head = |heads: [Dim; 2], rest: [Dim; 2]| match split {
            Some(_) => vec![b, heads[0], heads[1], rest[0], rest[1]],
            None => vec![b, h, rest[0], rest[1]],
        };
        let shared = split.unwrap_or(Dim::ONE);
        let q = self.full(operands[0], &[0, 2, 1, 3])?;
        let q = self.reshaped_tensor(operands[0], &q, &head([g, shared], [t, d]))?;
        let k = self.full(operands[1], &[0, 2, 3, 1])?;
        let k = self.reshaped_tensor(operands[1], &k, &head([g, Dim::ONE], [d, s]))?;
        let v = self.full(operands[2], &[0, 2, 1, 3])?;
        let v = self.reshaped_tensor(operands[2], &v, &head([g, Dim::ONE], [s, e]))?;
        let base = self.name(id);
        let mut scores =
            self.one("MatMul", vec![q.name, k.name], &format!("{base}.scores"), vec![]);
        if scale != 1.0 {
            let scale = self.scalar(dtype, f64::from(scale), &format!("{base}.scale"));
            scores = self.one("Mul", vec![scores, scale], &format!("{base}.scaled"), vec![]);
        }
        if let Some(&mask) = operands.get(3) {
            let dims = self.four(mask);
            let mut tensor = self.natural(mask)?;
            if split.is_some() {
                let heads = if dims[1] == Dim::ONE { [Dim::ONE; 2] } else { [g, shared] };
                let dims = [dims[0], heads[0], heads[1], dims[2], dims[3]];
                tensor = self.reshaped_tensor(mask, &tensor, &dims)?;
            }
            let mut name = tensor.name;
            if dtype != DType::F32 {
                let to = i64::from(crate::tensor::onnx_number(dtype));
                let wanted = format!("{base}.mask");
                name = self.one("Cast", vec![name], &wanted, vec![("to", Attribute::Int(to))]);
            }
            scores = self.one("Add", vec![scores, name], &format!("{base}.masked"), vec![]);
        }
        if causal {
            let mask = self.causal_mask(id, t, s, dtype)?;
            scores = self.one("Add", vec![scores, mask], &format!("{base}.causal"), vec![]);
        }
        let axis = vec![("axis", Attribute::Int(-1))];
        let p = self.one("Softmax", vec![scores], &format!("{base}.probabilities"), axis);
        let name = self.one("MatMul", vec![p, v.name], base, vec![]);
        let tensor = Placed { name, dims: head([g, shared], [t, e]) };
        let tensor = self.reshaped_tensor(id, &tensor, &[b, h, t, e])?;
        self.place(id, tensor, &[0, 2, 1, 3]);
        Ok(())
    }

    fn four(&self, id: NodeId) -> [Dim; 4] {
        let dims = self.dims(id);
        std::array::from_fn(|axis| dims.get(axis).copied().unwrap_or(Dim::ONE))
    }

    /// -inf where a key comes after its query.
    fn causal_mask(&mut self, id: NodeId, t: Dim, s: Dim, dtype: DType) -> Result<String> {
        let (Some(rows), Some(columns)) = (t.as_fixed(), s.as_fixed()) else {
            return self.unsupported(id, "a causal mask whose size depends on the batch size");
        };
        if let Some(name) = self.masks.get(&(rows, columns, dtype)) {
            return Ok(name.clone());
        }
        let count = rows.checked_mul(columns).filter(|&count| count <= LARGEST_CONSTANT);
        if count.is_none() {
            return self.unsupported(id, format!("a causal mask of {rows} x {columns}"));
        }
        let value = |at: usize| if at % columns > at / columns { f64::NEG_INFINITY } else { 0.0 };
        let values: Vec<f64> = (0..rows * columns).map(value).collect();
        let mask = Tensor::from_f64(dtype, &[rows, columns], &values);
        let mask = mask.expect("as many elements as the shape says");
        let name = self.writer.constant("causal_mask", &mask);
        self.masks.insert((rows, columns, dtype), name.clone());
        Ok(name)
    }
}

/// How many heads share one.
fn heads_of(h: Dim, g: Dim) -> Option<Dim> {
    Some(Dim::fixed(h.as_fixed()?.checked_div(g.as_fixed()?)?))
}

/// The attributes of a convolution.
fn window(geometry: &ConvGeometry) -> Vec<(&'static str, Attribute)> {
    vec![
        ("dilations", Attribute::Ints(ints(&geometry.dilations))),
        ("group", Attribute::Int(int(geometry.groups))),
        ("kernel_shape", Attribute::Ints(ints(&geometry.kernel))),
        ("pads", Attribute::Ints(ints(&geometry.pads))),
        ("strides", Attribute::Ints(ints(&geometry.strides))),
    ]
}
