//! Nodes that run a hand-scheduled kernel, with their operands in slots.

use crate::build::PlanError;
use crate::low::LowOperands;
use crate::lower::Lowering;
use crate::view::View;
use crate::{
    Affine, Convolution, Int8, LoopNest, Matmul, Matrix, Operands, Place, Pooling, Primitive,
    Product, Recurrent, SlotId,
};
use qcompile_ir::{
    ConvGeometry, DType, Dim, GradientRounding, NodeId, Op, PoolGeometry, Recurrence, TensorType,
};

/// The primitive of a node. `epilogue` follows it within the same kernel.
pub(crate) fn primitive(
    lowering: &Lowering,
    id: NodeId,
    epilogue: Option<LoopNest>,
) -> Result<Primitive, PlanError> {
    let graph = lowering.graph;
    check_types(lowering, id)?;
    let y = Place {
        // With an epilogue the value may have no memory of its own; then nothing writes this place.
        slot: lowering.memory.slot_of.get(&id).copied().unwrap_or(SlotId(0)),
        offset: Affine::ZERO,
    };
    let dense = |position: usize| lowering.dense_place(graph.operand(id, position));
    Ok(match graph.op(id) {
        Op::Matmul { transpose_a, transpose_b } => {
            Primitive::Matmul(matmul(lowering, id, [*transpose_a, *transpose_b], y), epilogue)
        }
        Op::Conv2d(geometry) => {
            let convolution = convolution(lowering, id, Product::Forward, geometry, y);
            Primitive::Convolution(convolution, epilogue)
        }
        Op::Conv2dGradInput(geometry) => {
            let convolution = convolution(lowering, id, Product::GradInput, geometry, y);
            Primitive::Convolution(convolution, epilogue)
        }
        Op::Conv2dGradWeight(geometry) => {
            let convolution = convolution(lowering, id, Product::GradWeight, geometry, y);
            Primitive::Convolution(convolution, None)
        }
        Op::MaxPool2d(geometry) => pooling(lowering, id, geometry, [true, false], dense(0), y),
        Op::AveragePool2d(geometry) => pooling(lowering, id, geometry, [false, false], dense(0), y),
        Op::MaxPool2dGrad(geometry) => pooling(lowering, id, geometry, [true, true], dense(1), y),
        Op::AveragePool2dGrad(geometry) => {
            pooling(lowering, id, geometry, [false, true], dense(0), y)
        }
        op @ (Op::Softmax | Op::LogSoftmax) => {
            let (cols, rows) = split_last(&graph.ty(id).shape.0);
            Primitive::Softmax { log: *op == Op::LogSoftmax, rows, cols, x: dense(0), y }
        }
        Op::CrossEntropy => {
            let (cols, rows) = split_last(&graph.ty(graph.operand(id, 0)).shape.0);
            Primitive::CrossEntropy { rows, cols, logits: dense(0), label: dense(1), loss: y }
        }
        Op::CrossEntropyGrad => {
            let (cols, rows) = split_last(&graph.ty(id).shape.0);
            Primitive::CrossEntropyGrad {
                rows,
                cols,
                logits: dense(0),
                label: dense(1),
                dloss: dense(2),
                dlogits: y,
            }
        }
        Op::Gather => {
            let table = graph.ty(graph.operand(id, 0));
            let bytes = |elements: Affine| {
                elements.times(table.dtype.size()).expect("verified: types are bounded")
            };
            let place = dense(0);
            Primitive::Gather {
                table_rows: table.shape.0[0],
                row_bytes: bytes(product(&table.shape.0[1..]).into()),
                count: product(&graph.ty(graph.operand(id, 1)).shape.0),
                table: Place { offset: bytes(place.offset), ..place },
                indices: dense(1),
                y,
            }
        }
        Op::Scatter { op, rows } => Primitive::Scatter {
            op: *op,
            dtype: graph.ty(id).dtype,
            rows: *rows,
            width: product(&graph.ty(id).shape.0[1..]),
            count: product(&graph.ty(graph.operand(id, 0)).shape.0),
            indices: dense(0),
            values: dense(1),
            y,
        },
        Op::TopK { k, largest } => {
            let x = graph.ty(graph.operand(id, 0));
            let (cols, rows) = split_last(&x.shape.0);
            Primitive::TopK {
                largest: *largest,
                dtype: x.dtype,
                rows,
                cols: cols.scale,
                k: *k,
                x: dense(0),
                y,
            }
        }
        Op::Iota(dim) => Primitive::Iota { count: *dim, y },
        Op::Random { seed, shape } => {
            Primitive::Random { seed: *seed, count: product(&shape.0), step: dense(0), y }
        }
        Op::Recurrence(recurrence) => recurrent(lowering, id, recurrence, None, y),
        Op::RecurrenceGrad { recurrence, cell, rounding } => {
            recurrent(lowering, id, recurrence, Some((*cell, *rounding)), y)
        }
        _ => unreachable!("fused: only primitives come here"),
    })
}

/// The kernels take f32 (the gather moves any type, a maximum is also taken of bf16 and i8; products of low precision were recognised before).
fn check_types(lowering: &Lowering, id: NodeId) -> Result<(), PlanError> {
    let graph = lowering.graph;
    if *graph.op(id) == Op::Gather {
        return Ok(());
    }
    let mut types = graph.operands(id).into_iter().map(|operand| graph.ty(operand));
    let pooled = |ty: &TensorType| matches!(ty.dtype, DType::BF16 | DType::I8);
    if matches!(graph.op(id), Op::MaxPool2d(_)) && types.clone().all(pooled) {
        return Ok(());
    }
    match types.find(|ty| ty.dtype != DType::F32 && ty.dtype != DType::I64) {
        None => Ok(()),
        Some(ty) => Err(PlanError::Unsupported {
            name: graph.node(id).name.clone(),
            op: graph.op(id).name(),
            ty: ty.to_string(),
        }),
    }
}

fn product(dims: &[Dim]) -> Dim {
    dims.iter()
        .try_fold(Dim::ONE, |product, &dim| product.times(dim))
        .expect("verified: types are bounded")
}

fn split_last(dims: &[Dim]) -> (Dim, Dim) {
    let (last, lead) = dims.split_last().expect("verified: rows have columns");
    (*last, product(lead))
}

impl Lowering<'_> {
    /// Where a dense operand is.
    pub(crate) fn dense_place(&self, id: NodeId) -> Place {
        let view = self.fusion.dense_view(self.graph, id);
        self.place(&view)
    }

    pub(crate) fn place(&self, view: &View) -> Place {
        Place { slot: self.memory.slot_of[&view.base], offset: view.offset }
    }

    /// What the operands of a product are.
    fn operands(&self, id: NodeId) -> Operands {
        let Some(low) = self.fusion.low.get(&id) else { return Operands::F32 };
        let Some(scales) = low.scales else { return Operands::Bf16 };
        Operands::Int8(Int8 {
            scale_a: self.dense_place(scales.a),
            per_row: scales.per_row,
            zero_a: scales.zero_a.map(|zero_point| self.dense_place(zero_point)),
            unsigned_a: scales.unsigned_a,
            scale_b: self.dense_place(scales.b),
            per_channel: scales.per_channel,
        })
    }

    /// The views of the two operands of a product: of what is stored, if that is of low precision.
    fn product_operands(&self, id: NodeId, matrices: bool) -> [View; 2] {
        if let Some(low) = self.fusion.low.get(&id) {
            return [low.a.clone(), low.b.clone()];
        }
        [0, 1].map(|position| {
            let operand = self.graph.operand(id, position);
            if matrices {
                self.fusion.matrix_view(self.graph, operand)
            } else {
                self.fusion.dense_view(self.graph, operand)
            }
        })
    }
}

fn matmul(lowering: &Lowering, id: NodeId, transposed: [bool; 2], c: Place) -> Matmul {
    let [a, b] = lowering.product_operands(id, true);
    let matrix = |view: &View, transposed: bool| {
        let [(batch, batch_stride), mut rows, mut cols] =
            view.as_matrices().expect("fused: operands of a matmul are matrices");
        if transposed {
            std::mem::swap(&mut rows, &mut cols);
        }
        let matrix = Matrix {
            place: lowering.place(view),
            batch_stride,
            row_stride: rows.1,
            col_stride: cols.1,
        };
        (matrix, batch, rows.0, cols.0)
    };
    let (mut a, mut batch, mut m, k) = matrix(&a, transposed[0]);
    let (b, _, _, n) = matrix(&b, transposed[1]);
    if lowering.fusion.low.get(&id).is_some_and(LowOperands::runs_over_batch) {
        // Rows with a scale each go on from one matrix to the next.
        m = batch.times(m).expect("verified: types are bounded");
        (batch, a.batch_stride) = (Dim::ONE, Dim::fixed(0));
    }
    Matmul { batch, m, n, k, a, b, c, operands: lowering.operands(id) }
}

fn convolution(
    lowering: &Lowering,
    id: NodeId,
    product: Product,
    geometry: &ConvGeometry,
    c: Place,
) -> Convolution {
    let graph = lowering.graph;
    let [a, b] = lowering.product_operands(id, false);
    let first = &graph.ty(graph.operand(id, 0)).shape.0;
    let second = &graph.ty(graph.operand(id, 1)).shape.0;
    let result = &graph.ty(id).shape.0;
    let (in_channels, out_channels) = match product {
        Product::Forward => (first[3], result[3]),
        Product::GradInput => (result[3], first[3]),
        Product::GradWeight => (first[3], second[3]),
    };
    Convolution {
        product,
        geometry: *geometry,
        images: first[0],
        in_channels: in_channels.scale,
        out_channels: out_channels.scale,
        a: lowering.place(&a),
        b: lowering.place(&b),
        c,
        operands: lowering.operands(id),
    }
}

fn pooling(
    lowering: &Lowering,
    id: NodeId,
    geometry: &PoolGeometry,
    [max, gradient]: [bool; 2],
    dy: Place,
    y: Place,
) -> Primitive {
    let graph = lowering.graph;
    let x = lowering.dense_place(graph.operand(id, 0));
    let result = &graph.ty(id).shape.0;
    Primitive::Pooling(Pooling {
        dtype: graph.ty(id).dtype,
        max,
        gradient,
        geometry: *geometry,
        images: result[0],
        channels: result[3].scale,
        x,
        dy,
        y,
    })
}

/// A recurrent layer, or its gradient; that says whether c has one, and how it rounds.
fn recurrent(
    lowering: &Lowering,
    id: NodeId,
    recurrence: &Recurrence,
    gradient: Option<(bool, GradientRounding)>,
    y: Place,
) -> Primitive {
    let graph = lowering.graph;
    let operands = match gradient {
        None => recurrence.operands(),
        Some((cell, rounding)) => recurrence.gradient_operands(cell, rounding),
    };
    let place = |position: usize| lowering.dense_place(graph.operand(id, position));
    // The states of all steps, or their gradient.
    let states = if gradient.is_none() { id } else { graph.operand(id, 0) };
    let [_, rows, batch, hidden] = graph.ty(states).shape.0[..] else {
        unreachable!("verified: the states have four axes")
    };
    Primitive::Recurrent(Recurrent {
        recurrence: *recurrence,
        gradient: gradient.is_some(),
        steps: rows.scale - 1,
        batch,
        hidden: hidden.scale,
        x: place(0),
        r: place(1),
        h: place(2),
        c: operands.cell.map(place),
        bias: operands.bias.map(place),
        peepholes: operands.peepholes.map(place),
        lengths: operands.lengths.map(place),
        numbers: operands.numbers.map(place),
        y,
    })
}
