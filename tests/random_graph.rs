//! Graphs that nobody would think of: seeded, valid, with every op that fits.

use crate::support::Random;
use qcompile_ir::{
    AttentionOperand, BinaryOp, Channels, CollectiveOp, CompareOp, ConvGeometry, DType, Dim,
    GradientRounding, Granularity, Graph, NodeId, Note, Op, PoolGeometry, Precision,
    QuantizedRange, Quantizer, ReduceOp, Region, Scaling, ScatterOp, Shape, Tensor, TensorType,
    UnaryOp,
};
use std::sync::Arc;

/// How a graph is drawn.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    /// Number of draws; some draw nothing that fits.
    pub(crate) draws: usize,
    /// The regions that are filled, from forward on.
    pub(crate) regions: usize,
    /// Whether only ops that a plan has a kernel for are drawn.
    pub(crate) planned: bool,
    /// Whether every value is smooth and of moderate size, so that results can be compared within a tolerance.
    pub(crate) smooth: bool,
}

/// A valid graph of this seed.
pub(crate) fn random_graph(seed: u64, wanted: Wanted) -> Graph {
    let mut drawing = Drawing {
        graph: Graph::new(&format!("random {seed}")),
        random: Random::new(seed),
        wanted,
        values: Vec::new(),
    };
    drawing.leaves();
    for at in 0..wanted.draws {
        let region = Region::ALL[at * wanted.regions / wanted.draws];
        drawing.statement(region);
    }
    drawing.footer();
    drawing.graph
}

struct Drawing {
    graph: Graph,
    random: Random,
    wanted: Wanted,
    values: Vec<NodeId>,
}

impl Drawing {
    fn dims(&mut self) -> Vec<Dim> {
        let choices: [&[usize]; 7] =
            [&[], &[4], &[3, 4], &[1, 4], &[4, 6], &[2, 3, 4], &[2, 6, 6, 4]];
        let mut dims: Vec<Dim> =
            self.random.pick(&choices).iter().map(|&dim| Dim::fixed(dim)).collect();
        if let Some(first) = dims.first_mut()
            && self.random.chance(60)
        {
            *first = Dim::N;
        }
        dims
    }

    fn tensor(&mut self, dtype: DType, sizes: &[usize]) -> Arc<Tensor> {
        let count: usize = sizes.iter().product();
        let same = self.random.chance(30);
        let mut values: Vec<f64> = (0..count)
            .map(|_| match dtype {
                dtype if dtype.is_float() => self.random.unit(),
                DType::Bool => self.random.below(2) as f64,
                _ => self.random.below(4) as f64,
            })
            .collect();
        if same && let Some(&first) = values.first() {
            // Neutral elements are what `simplify` looks for.
            values.fill(if dtype.is_float() && self.random.chance(70) {
                f64::from(first > 0.0)
            } else {
                first
            });
        }
        Arc::new(Tensor::from_f64(dtype, sizes, &values).expect("sizes fit"))
    }

    fn dtype(&mut self) -> DType {
        match self.random.below(10) {
            0 => DType::I64,
            1 => DType::Bool,
            2 if !self.wanted.smooth => *self.random.pick(&[DType::BF16, DType::F16]),
            3 if !self.wanted.smooth => {
                let all = [DType::I8, DType::I32, DType::U8, DType::I4, DType::U4];
                *self.random.pick(&all)
            }
            _ => DType::F32,
        }
    }

    fn leaves(&mut self) {
        for _ in 0..2 + self.random.below(3) {
            let ty = TensorType::new(self.dtype(), Shape(self.dims()));
            self.add(Op::Input(ty), &[], Region::Forward);
        }
        for kind in 0..3 + self.random.below(4) {
            let fixed = |dim: Dim| if dim.batch { 4 } else { dim.scale };
            let sizes: Vec<usize> = self.dims().into_iter().map(fixed).collect();
            let dtype = if kind % 3 == 0 { DType::F32 } else { self.dtype() };
            let tensor = self.tensor(dtype, &sizes);
            let op = match kind % 3 {
                0 => Op::Param(tensor),
                1 => Op::State(tensor),
                _ => Op::Const(tensor),
            };
            self.add(op, &[], Region::Forward);
        }
        let scale = Arc::new(Tensor::scalar(DType::F32, 0.0078));
        self.add(Op::Const(scale), &[], Region::Forward);
    }

    /// Adds the node if it is valid.
    fn add(&mut self, op: Op, operands: &[NodeId], region: Region) -> Option<NodeId> {
        let names = ["x", "conv/1.weight", "a b", "f32", "N", "%", "é\"\\", "return"];
        let name = (*self.random.pick(&names)).to_owned();
        let id = self.graph.add(op, operands, name, region).ok()?;
        // Nothing that takes long: every dimension but N is small.
        let ty = self.graph.ty(id);
        if ty.shape.elements().is_none_or(|elements| elements.scale > 4096) {
            return None;
        }
        self.values.push(id);
        if self.random.chance(10) {
            let note = self.note();
            *self.graph.note_mut(id) = note;
        }
        Some(id)
    }

    fn channels(&mut self) -> Channels {
        match self.random.below(8) {
            0 => Channels { outliers: vec![0, 2], ..Channels::default() },
            1 => Channels { input_outliers: vec![1], ..Channels::default() },
            2 => Channels { points: vec![(0, 2), (2, 3)], ..Channels::default() },
            _ => Channels::default(),
        }
    }

    fn note(&mut self) -> Note {
        let precision = Precision {
            forward: *self.random.pick(&[DType::F32, DType::I8]),
            grad_input: *self.random.pick(&[DType::F32, DType::I8]),
            ..Precision::uniform(DType::F32)
        };
        Note {
            origin: self.random.chance(50).then(|| "Conv_0 \"x\"".to_owned()),
            sensitivity: self.random.chance(50).then_some(0.25),
            channels: self.channels(),
            precision: self.random.chance(50).then_some(precision),
            stored: self.random.chance(20).then_some(DType::BF16),
            quantizer: self.random.chance(20).then(|| Quantizer {
                weight: DType::I4,
                granularity: Granularity::Row,
                scaling: Scaling::Delayed,
                ..Quantizer::default()
            }),
        }
    }

    fn value(&mut self) -> NodeId {
        // Mostly something recent, so that chains become long.
        let recent = self.values.len().min(8);
        if self.random.chance(60) {
            self.values[self.values.len() - 1 - self.random.below(recent)]
        } else {
            *self.random.pick(&self.values)
        }
    }

    /// Another value of the same type, or the value itself.
    fn alike(&mut self, x: NodeId) -> NodeId {
        let alike: Vec<NodeId> =
            self.values.iter().copied().filter(|&y| self.graph.ty(y) == self.graph.ty(x)).collect();
        *self.random.pick(&alike)
    }

    fn statement(&mut self, region: Region) {
        let x = self.value();
        let ty = self.graph.ty(x).clone();
        let kind = self.random.below(20);
        let added = match kind {
            0..=3 => {
                let op = Op::Unary(self.unary());
                self.add(op, &[x], region)
            }
            4..=6 => {
                let y = self.alike(x);
                let op = Op::Binary(self.binary());
                self.add(op, &[x, y], region)
            }
            7 => self.comparison(x, region),
            8 => {
                let dtype = self.dtype();
                self.add(Op::Cast(dtype), &[x], region)
            }
            9 => self.reduction(x, region),
            10 => self.reshape(x, region),
            11 | 12 => {
                let mut axes: Vec<usize> = (0..ty.shape.rank()).collect();
                for at in (1..axes.len()).rev() {
                    axes.swap(at, self.random.below(at + 1));
                }
                self.add(Op::Transpose(axes), &[x], region)
            }
            13 => self.broadcast(x, region),
            14 => self.part(x, region),
            15 => self.product(x, region),
            16 => self.window(x, region),
            // Rounding jumps.
            17 if self.wanted.smooth => None,
            17 => match self.random.below(3) {
                0 => self.quantized_along(x, region),
                1 => self.narrowed(x, region),
                _ => self.quantized(x, region),
            },
            18 => self.rows(x, region),
            _ => self.other(x, region),
        };
        // Plain values keep the supply of operands up.
        if added.is_none() {
            self.add(Op::Unary(UnaryOp::Relu), &[x], region);
        }
    }

    fn unary(&mut self) -> UnaryOp {
        let smooth = [
            UnaryOp::Neg,
            UnaryOp::Abs,
            UnaryOp::Relu,
            UnaryOp::Sigmoid,
            UnaryOp::Tanh,
            UnaryOp::Sin,
        ];
        if self.wanted.smooth {
            *self.random.pick(&smooth)
        } else {
            *self.random.pick(&UnaryOp::ALL)
        }
    }

    fn binary(&mut self) -> BinaryOp {
        let smooth = [BinaryOp::Add, BinaryOp::Sub, BinaryOp::Mul, BinaryOp::Max, BinaryOp::Min];
        if self.wanted.smooth {
            *self.random.pick(&smooth)
        } else {
            *self.random.pick(&BinaryOp::ALL)
        }
    }

    fn comparison(&mut self, x: NodeId, region: Region) -> Option<NodeId> {
        // What is compared would jump.
        if self.wanted.smooth {
            return None;
        }
        let y = self.alike(x);
        let op = *self.random.pick(&CompareOp::ALL);
        let condition = self.add(Op::Compare(op), &[x, y], region)?;
        let (a, b) = (self.alike(x), self.alike(y));
        self.add(Op::Select, &[condition, a, b], region)
    }

    fn reduction(&mut self, x: NodeId, region: Region) -> Option<NodeId> {
        let rank = self.graph.ty(x).shape.rank();
        let axes: Vec<usize> = (0..rank).filter(|_| self.random.chance(50)).collect();
        let op = *self.random.pick(&ReduceOp::ALL);
        let reduced = self.add(Op::Reduce { op, axes }, &[x], region)?;
        let squeezed: Vec<Dim> =
            self.graph.ty(reduced).shape.0.iter().copied().filter(|&dim| dim != Dim::ONE).collect();
        self.add(Op::Reshape(Shape(squeezed)), &[reduced], region)
    }

    fn reshape(&mut self, x: NodeId, region: Region) -> Option<NodeId> {
        let mut dims = self.graph.ty(x).shape.0.clone();
        match self.random.below(3) {
            0 => dims.insert(self.random.below(dims.len() + 1), Dim::ONE),
            1 => dims = vec![dims.iter().try_fold(Dim::ONE, |product, &dim| product.times(dim))?],
            _ => {
                let at = self.random.below(dims.len().max(1));
                let dim = *dims.get(at)?;
                if dim.scale % 2 != 0 {
                    return None;
                }
                dims[at] = Dim { scale: dim.scale / 2, ..dim };
                dims.insert(at + 1, Dim::fixed(2));
            }
        }
        self.add(Op::Reshape(Shape(dims)), &[x], region)
    }

    fn broadcast(&mut self, x: NodeId, region: Region) -> Option<NodeId> {
        let mut dims = self.graph.ty(x).shape.0.clone();
        let batch = dims.iter().any(|dim| dim.batch);
        for dim in &mut dims {
            if *dim == Dim::ONE && self.random.chance(70) {
                *dim = Dim::fixed(1 + self.random.below(4));
            }
        }
        if dims.len() < 4 && self.random.chance(60) {
            let first = if batch || self.random.chance(30) {
                Dim::fixed(1 + self.random.below(3))
            } else {
                Dim::N
            };
            dims.insert(0, first);
        }
        self.add(Op::Broadcast(Shape(dims)), &[x], region)
    }

    fn part(&mut self, x: NodeId, region: Region) -> Option<NodeId> {
        let shape = self.graph.ty(x).shape.clone();
        let axis = self.random.below(shape.rank().max(1));
        let size = shape.0.get(axis)?.as_fixed()?;
        match self.random.below(3) {
            0 => {
                let start = self.random.below(size + 1);
                let end = start + self.random.below(size - start + 1);
                let step = 1 + self.random.below(2);
                self.add(Op::Slice { axis, start, end, step }, &[x], region)
            }
            1 => {
                let [low, high, interior] = [3, 3, 2].map(|limit| self.random.below(limit));
                let value = *self.random.pick(&[0.0, 0.0, 1.5, -0.0]);
                self.add(Op::Pad { axis, low, high, interior, value }, &[x], region)
            }
            _ => {
                let others = [x, self.alike(x), self.alike(x)];
                let count = 1 + self.random.below(3);
                self.add(Op::Concat { axis }, &others[..count], region)
            }
        }
    }

    fn product(&mut self, x: NodeId, region: Region) -> Option<NodeId> {
        let (transpose_a, transpose_b) = (self.random.chance(40), self.random.chance(40));
        let op = Op::Matmul { transpose_a, transpose_b };
        let start = self.random.below(self.values.len());
        for at in 0..self.values.len() {
            let y = self.values[(start + at) % self.values.len()];
            let types = [self.graph.ty(x), self.graph.ty(y)];
            if qcompile_ir::infer(&op, &types).is_ok() {
                return self.add(op, &[x, y], region);
            }
        }
        None
    }

    fn window(&mut self, x: NodeId, region: Region) -> Option<NodeId> {
        let ty = self.graph.ty(x).clone();
        let [_, height, width, channels] = ty.shape.0[..] else { return None };
        let input = [height.as_fixed()?, width.as_fixed()?];
        let channels = channels.as_fixed()?;
        let kernel = [1 + self.random.below(3), 1 + self.random.below(3)];
        let strides = [1 + self.random.below(2), 1 + self.random.below(2)];
        let pads = [0; 4].map(|_: usize| self.random.below(2));
        let dilations = [1 + self.random.below(2), 1];
        if self.random.chance(50) {
            let count_include_pad = self.random.chance(50);
            let geometry =
                PoolGeometry { input, kernel, strides, pads, dilations, count_include_pad };
            let max = Op::MaxPool2d(geometry);
            let op = if self.random.chance(50) { Op::AveragePool2d(geometry) } else { max };
            return self.add(op, &[x], region);
        }
        let groups = if channels % 2 == 0 && self.random.chance(40) { 2 } else { 1 };
        let geometry = ConvGeometry { input, kernel, strides, pads, dilations, groups };
        let sizes = [2 * groups, channels / groups, kernel[0], kernel[1]];
        let weight = self.tensor(ty.dtype, &sizes);
        let weight = self.add(Op::Const(weight), &[], Region::Forward)?;
        let y = self.add(Op::Conv2d(geometry), &[x, weight], region)?;
        if self.random.chance(50) {
            self.add(Op::Conv2dGradInput(geometry), &[y, weight], region);
            self.add(Op::Conv2dGradWeight(geometry), &[x, y], region);
        }
        Some(y)
    }

    fn quantized(&mut self, x: NodeId, region: Region) -> Option<NodeId> {
        let scalar = TensorType::f32(Shape::scalar());
        let scales: Vec<NodeId> =
            self.values.iter().copied().filter(|&id| *self.graph.ty(id) == scalar).collect();
        let scale = *self.random.pick(&scales);
        let others =
            [DType::I8, DType::U8, DType::I4, DType::U4, DType::F8E4M3, DType::F8E5M2, DType::I32];
        // Most rules are about int8 without a zero point.
        let moved = self.random.chance(60);
        let dtype = if moved { DType::I8 } else { *self.random.pick(&others) };
        let mut parameters = vec![scale];
        if !moved && QuantizedRange::of(dtype, true).is_some() && self.random.chance(60) {
            let zero_point = self.tensor(dtype, &[]);
            parameters.push(self.add(Op::Const(zero_point), &[], Region::Forward)?);
        }
        let with = |first: &[NodeId]| [first, &parameters].concat();
        let q = self.add(Op::Quantize { dtype, axis: None }, &with(&[x]), region)?;
        let moved = match self.random.below(5) {
            0 => self.add(Op::Unary(UnaryOp::Relu), &[q], region),
            1 => self.reshape(q, region),
            2 => self.part(q, region),
            3 => self.max_pool(q, region),
            _ => None,
        };
        let y = self.add(Op::Dequantize { axis: None }, &with(&[moved.unwrap_or(q)]), region)?;
        if self.random.chance(30) {
            self.add(Op::StraightThrough { dtype, axis: None }, &with(&[x, x]), region);
        }
        if self.random.chance(50) {
            let y = match self.random.below(3) {
                0 => self.max_pool(y, region).unwrap_or(y),
                1 => self.part(y, region).unwrap_or(y),
                _ => self.add(Op::Unary(UnaryOp::Relu), &[y], region)?,
            };
            self.add(Op::Quantize { dtype, axis: None }, &with(&[y]), region);
        }
        Some(y)
    }

    /// A scale for each index of an axis.
    fn quantized_along(&mut self, x: NodeId, region: Region) -> Option<NodeId> {
        let dims = self.graph.ty(x).shape.0.clone();
        let axis = self.random.below(dims.len().max(1));
        let size = dims.get(axis)?.as_fixed()?;
        let scales: Vec<f64> = (0..size).map(|at| 0.01 * (at + 1) as f64).collect();
        let scales = Tensor::from_f64(DType::F32, &[size], &scales)?;
        let scale = self.add(Op::Const(Arc::new(scales)), &[], Region::Forward)?;
        let axis = Some(axis);
        let q = self.add(Op::Quantize { dtype: DType::I8, axis }, &[x, scale], region)?;
        let y = self.add(Op::Dequantize { axis }, &[q, scale], region)?;
        let moved = match self.random.below(4) {
            0 => self.add(Op::Unary(UnaryOp::Relu), &[y], region),
            1 => self.part(y, region),
            2 => self.max_pool(y, region),
            _ => self.moved(y, region),
        };
        if let Some(y) = moved {
            self.add(Op::Quantize { dtype: DType::I8, axis }, &[y, scale], region);
        }
        Some(y)
    }

    /// A value rounded to 16 bits, and what moves.
    fn narrowed(&mut self, x: NodeId, region: Region) -> Option<NodeId> {
        if !self.graph.ty(x).dtype.is_float() {
            return None;
        }
        let dtype = *self.random.pick(&[DType::BF16, DType::F16]);
        let narrow = self.add(Op::Cast(dtype), &[x], region)?;
        let wide = self.add(Op::Cast(DType::F32), &[narrow], region)?;
        let moved = match self.random.below(4) {
            0 => self.add(Op::Unary(UnaryOp::Relu), &[wide], region),
            1 => self.part(wide, region),
            2 => self.max_pool(wide, region),
            _ => self.moved(wide, region),
        };
        self.add(Op::Cast(dtype), &[moved.unwrap_or(wide)], region)
    }

    /// Transposed.
    fn moved(&mut self, x: NodeId, region: Region) -> Option<NodeId> {
        let rank = self.graph.ty(x).shape.rank();
        self.add(Op::Transpose((0..rank).rev().collect()), &[x], region)
    }

    fn max_pool(&mut self, x: NodeId, region: Region) -> Option<NodeId> {
        let [_, height, width, _] = self.graph.ty(x).shape.0[..] else { return None };
        let geometry = PoolGeometry {
            input: [height.as_fixed()?, width.as_fixed()?],
            kernel: [2, 2],
            strides: [1 + self.random.below(2), 1],
            pads: [0; 4].map(|_: usize| self.random.below(2)),
            dilations: [1, 1],
            count_include_pad: false,
        };
        self.add(Op::MaxPool2d(geometry), &[x], region)
    }

    fn rows(&mut self, x: NodeId, region: Region) -> Option<NodeId> {
        let op = *self.random.pick(&[0, 1, 2, 3]);
        match op {
            3 if self.graph.ty(x).shape.rank() == 4 => {
                let (scale, causal) = (0.5, self.random.chance(50));
                let y = self.add(
                    Op::Attention { scale, causal, products: DType::F32 },
                    &[x, x, x],
                    region,
                )?;
                let of = *self.random.pick(&AttentionOperand::ALL);
                let rounding = GradientRounding::Nearest;
                let gradient =
                    Op::AttentionGrad { of, scale, causal, products: DType::F32, rounding };
                self.add(gradient, &[x, x, x, y], region)
            }
            0 => self.add(Op::Softmax, &[x], region),
            1 => self.add(Op::LogSoftmax, &[x], region),
            _ => {
                let rows = *self.graph.ty(x).shape.0.first()?;
                let label = TensorType::new(DType::I64, Shape(vec![rows]));
                let label = self.add(Op::Input(label), &[], Region::Forward)?;
                let loss = self.add(Op::CrossEntropy, &[x, label], region)?;
                self.add(Op::CrossEntropyGrad, &[x, label, loss], region)
            }
        }
    }

    fn other(&mut self, x: NodeId, region: Region) -> Option<NodeId> {
        match self.random.below(5) {
            0 => self.add(Op::Size(Dim { scale: 3, batch: true }), &[], region),
            1 if region != Region::Update && !self.wanted.planned => {
                let op = *self.random.pick(&CollectiveOp::ALL);
                self.add(Op::AllReduce(op), &[x], region)
            }
            2 => {
                let indices = TensorType::new(DType::I64, Shape(vec![Dim::N]));
                let indices = self.add(Op::Input(indices), &[], Region::Forward)?;
                let rows =
                    self.graph.ty(x).shape.0.first()?.as_fixed().filter(|&rows| rows >= 2)?;
                let taken = self.add(Op::Gather, &[x, indices], region)?;
                let any = if self.wanted.smooth { 1 } else { ScatterOp::ALL.len() };
                let op = ScatterOp::ALL[self.random.below(any)];
                self.add(Op::Scatter { op, rows: rows.into() }, &[indices, taken], region)
            }
            // Of values that are nearly equal, rounding decides.
            3 if !self.wanted.smooth => {
                let last = self.graph.ty(x).shape.0.last()?.as_fixed()?;
                let k = self.random.below(last + 1);
                let largest = self.random.chance(50);
                self.add(Op::TopK { k, largest }, &[x], region)
            }
            _ => self.generated(region),
        }
    }

    /// Values from nothing.
    fn generated(&mut self, region: Region) -> Option<NodeId> {
        match self.random.below(3) {
            0 => self.add(Op::Training, &[], region),
            1 => self.add(Op::Iota(Dim { scale: 2, batch: true }), &[], region),
            _ => {
                let step = self.tensor(DType::I64, &[]);
                let step = self.add(Op::State(step), &[], Region::Forward)?;
                let shape = Shape(vec![Dim::N, 3.into()]);
                self.add(Op::Random { seed: 7, shape }, &[step], region)
            }
        }
    }

    fn footer(&mut self) {
        for at in 0..2 + self.random.below(4) {
            let value = self.value();
            let name = if at % 2 == 0 { format!("y \"{at}\"") } else { format!("y{at}") };
            self.graph.add_output(&name, value);
        }
        let kept = self.graph.leaves(|op| matches!(op, Op::Param(_) | Op::State(_)));
        for leaf in kept {
            let value = self.alike(leaf);
            if !self.graph.op(value).is_leaf() {
                self.graph.set_next(leaf, value).expect("of one type");
            }
        }
    }
}
