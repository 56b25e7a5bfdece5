//! Steps that run a hand-scheduled kernel.

use crate::{Affine, LoopNest, SlotId};
use qcompile_ir::{ConvGeometry, DType, Dim, PoolGeometry, Recurrence, ScatterOp};

/// A dense value in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The slot.
    pub slot: SlotId,
    /// Its first element, counted in elements.
    pub offset: Affine,
}

/// A matrix (of a batch of matrices) in a slot; strides in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Matrix {
    /// First element.
    pub place: Place,
    /// From one matrix of the batch to the next; 0 uses the same for all.
    pub batch_stride: Dim,
    /// From one row to the next.
    pub row_stride: Dim,
    /// From one column to the next.
    pub col_stride: Dim,
}

/// What the operands of a product are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operands {
    /// f32.
    F32,
    /// bf16; sums are f32.
    Bf16,
    /// i8, or the first u8, with their scales; sums are i32.
    Int8(Int8),
}

impl Int8 {
    /// Whether the first operand less its zero point has 9 bits.
    #[must_use]
    pub const fn is_affine(&self) -> bool {
        self.unsigned_a || self.zero_a.is_some()
    }
}

impl Operands {
    /// Their element type.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        match self {
            Operands::F32 => DType::F32,
            Operands::Bf16 => DType::BF16,
            Operands::Int8(_) => DType::I8,
        }
    }

    /// The scales of integers.
    #[must_use]
    pub const fn scales(&self) -> Option<&Int8> {
        match self {
            Operands::F32 | Operands::Bf16 => None,
            Operands::Int8(int8) => Some(int8),
        }
    }
}

/// Scales of a product of codes: `y = ((a - zero_a) · b) · scale_a · scale_b`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Int8 {
    /// The scale of the first operand.
    pub scale_a: Place,
    /// Whether the first has one scale for each row of a matrix (matmul; the same for all of the batch), for each image
    /// (convolution) or for each input channel (its gradient of the weight).
    pub per_row: bool,
    /// The zero point of the first operand; none for 0. For matrix products and forward convolutions.
    pub zero_a: Option<Place>,
    /// Whether the first operand is u8, likewise.
    pub unsigned_a: bool,
    /// The scale of the second operand.
    pub scale_b: Place,
    /// Whether the second has one scale for each result column (matmul), result channel (convolution) or output channel
    /// (its gradient of the weight).
    pub per_channel: bool,
}

/// `c[batch, m, n] = a[batch, m, k] · b[batch, k, n]`, `c` dense f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matmul {
    /// Number of matrices.
    pub batch: Dim,
    /// Rows of the result.
    pub m: Dim,
    /// Columns of the result.
    pub n: Dim,
    /// Inner size.
    pub k: Dim,
    /// First operand, `[m, k]`.
    pub a: Matrix,
    /// Second operand, `[k, n]`.
    pub b: Matrix,
    /// Result, dense.
    pub c: Place,
    /// What the operands are.
    pub operands: Operands,
}

/// Which of the three products of a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Product {
    /// `y = conv(x, w)`: a is x, b is w, c is y.
    Forward,
    /// a is dy, b is w, c is dx.
    GradInput,
    /// a is x, b is dy, c is dw.
    GradWeight,
}

/// One product of a 2-D convolution, NHWC and OIHW, all dense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Convolution {
    /// Which product.
    pub product: Product,
    /// Geometry of the forward convolution.
    pub geometry: ConvGeometry,
    /// Number of images.
    pub images: Dim,
    /// Input channels of the forward convolution.
    pub in_channels: usize,
    /// Output channels of the forward convolution.
    pub out_channels: usize,
    /// First operand.
    pub a: Place,
    /// Second operand.
    pub b: Place,
    /// Result, f32.
    pub c: Place,
    /// What the operands are.
    pub operands: Operands,
}

/// One 2-D pooling, NHWC, dense f32; a maximum also of bf16 or i8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pooling {
    /// The type of all values.
    pub dtype: DType,
    /// Maximum, else average.
    pub max: bool,
    /// The gradient rather than the pooling itself.
    pub gradient: bool,
    /// Geometry of the forward pooling.
    pub geometry: PoolGeometry,
    /// Number of images.
    pub images: Dim,
    /// Channels.
    pub channels: usize,
    /// The pooled input (for the average's gradient: the same as `dy`, unused).
    pub x: Place,
    /// The incoming gradient of a gradient (else the same as `x`, unused).
    pub dy: Place,
    /// The result.
    pub y: Place,
}

/// A value of four dims in a slot; strides in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Strided {
    /// First element.
    pub place: Place,
    /// One for each dim.
    pub strides: [Dim; 4],
}

/// Attention of queries `[batch, rows, heads, width]` to keys `[batch, keys, key_heads, width]` and values
/// `[batch, keys, key_heads, value_width]`; or gradients of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Batches.
    pub batch: Dim,
    /// Queries.
    pub rows: Dim,
    /// Keys.
    pub keys: Dim,
    /// Heads.
    pub heads: usize,
    /// Heads of keys and values, a divisor of `heads`.
    pub key_heads: usize,
    /// Width of queries and keys.
    pub width: Dim,
    /// Width of values.
    pub value_width: Dim,
    /// What scores are multiplied with.
    pub scale: f32,
    /// Whether a row sees only the keys up to its own number.
    pub causal: bool,
    /// Element type of everything but the mask (and operands that are i8): f32 or bf16.
    pub dtype: DType,
    /// What the products run in: f32, or bf16 where the operands are; or i8.
    pub products: DType,
    /// One scale each of `q`, `k` and `v`, which are i8 then, where the products run in it.
    pub scales: Option<[Place; 3]>,
    /// Queries.
    pub q: Strided,
    /// Keys.
    pub k: Strided,
    /// Values.
    pub v: Strided,
    /// f32, added to scores `[batch, heads, rows, keys]`.
    pub mask: Option<Strided>,
    /// What is computed.
    pub result: AttentionResult,
}

/// What a kernel of attention computes.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "a plan has one for each attention")]
pub enum AttentionResult {
    /// The attention itself, dense `[batch, rows, heads, value_width]`.
    Forward(Place),
    /// Gradients, dense, of those of `q`, `k`, `v` that are wanted.
    Gradients {
        /// The gradient of the attention.
        dy: Strided,
        /// f32, two for each query `[batch, rows, heads, 2]`: with these, products in i8 round at random.
        numbers: Option<Strided>,
        /// That of `q`, `k` and `v`.
        of: [Option<Place>; 3],
    },
}

/// One direction of a recurrent layer, or its gradient; all dense.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Recurrent {
    /// What it computes.
    pub recurrence: Recurrence,
    /// The gradient rather than the layer itself.
    pub gradient: bool,
    /// Steps.
    pub steps: usize,
    /// Rows of the batch.
    pub batch: Dim,
    /// Size of the state.
    pub hidden: usize,
    /// Inputs of the gates; of a gradient, the result of the layer.
    pub x: Place,
    /// The recurrent weight.
    pub r: Place,
    /// The first h; of a gradient, that of h after each step.
    pub h: Place,
    /// The first c; of a gradient, that of c after each step.
    pub c: Option<Place>,
    /// The bias of a linear GRU.
    pub bias: Option<Place>,
    /// The peepholes.
    pub peepholes: Option<Place>,
    /// i64 `[batch]`.
    pub lengths: Option<Place>,
    /// f32 `[batch, steps, gradients]`: with these, a gradient with products in i8 rounds at random.
    pub numbers: Option<Place>,
    /// The result.
    pub y: Place,
}

impl Recurrent {
    /// What it reads.
    pub fn reads(&self) -> impl Iterator<Item = Place> {
        let optional = [self.c, self.bias, self.peepholes, self.lengths, self.numbers];
        [self.x, self.r, self.h].into_iter().chain(optional.into_iter().flatten())
    }
}

/// A kernel of `qcompile-kernels` and what it works on.
#[derive(Clone, Debug, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "a plan has hundreds of steps, each of them once")]
pub enum Primitive {
    /// Matrix product. The epilogue runs over `[batch · m, n]` tiles and then writes the result itself
    /// (its [`Scalar::Tile`](crate::Scalar::Tile) is the product), so `c` is not written.
    Matmul(Matmul, Option<LoopNest>),
    /// Convolution product. The epilogue runs over `[pixels, channels]` tiles (not for the gradient of the weight).
    Convolution(Convolution, Option<LoopNest>),
    /// Pooling.
    Pooling(Pooling),
    /// Attention or its gradients.
    Attention(Attention),
    /// Softmax over rows of a dense f32 matrix.
    Softmax {
        /// Its logarithm instead.
        log: bool,
        /// Rows.
        rows: Dim,
        /// Columns.
        cols: Dim,
        /// Operand.
        x: Place,
        /// Result.
        y: Place,
    },
    /// Cross-entropy of each row.
    CrossEntropy {
        /// Rows.
        rows: Dim,
        /// Classes.
        cols: Dim,
        /// `[rows, cols]`.
        logits: Place,
        /// i64 `[rows]`.
        label: Place,
        /// `[rows]`.
        loss: Place,
    },
    /// Gradient of the cross-entropy.
    CrossEntropyGrad {
        /// Rows.
        rows: Dim,
        /// Classes.
        cols: Dim,
        /// `[rows, cols]`.
        logits: Place,
        /// i64 `[rows]`.
        label: Place,
        /// `[rows]`.
        dloss: Place,
        /// `[rows, cols]`.
        dlogits: Place,
    },
    /// Rows of a table by i64 index.
    Gather {
        /// Rows of the table.
        table_rows: Dim,
        /// Bytes of a row.
        row_bytes: Affine,
        /// Number of indices.
        count: Dim,
        /// Dense table; its offset counts bytes.
        table: Place,
        /// i64 indices.
        indices: Place,
        /// Result.
        y: Place,
    },
    /// Rows of f32 or i64 combined by i64 index.
    Scatter {
        /// How.
        op: ScatterOp,
        /// Element type of the values.
        dtype: DType,
        /// Rows of the result.
        rows: Dim,
        /// Elements of a row.
        width: Dim,
        /// Number of indices.
        count: Dim,
        /// i64 indices.
        indices: Place,
        /// `[count, width]`.
        values: Place,
        /// `[rows, width]`, overwritten.
        y: Place,
    },
    /// Where the foremost elements of rows of f32 or i64 are.
    TopK {
        /// The largest, else the smallest.
        largest: bool,
        /// Element type of the operand.
        dtype: DType,
        /// Rows.
        rows: Dim,
        /// Columns.
        cols: usize,
        /// How many of a row.
        k: usize,
        /// Operand.
        x: Place,
        /// i64 `[rows, k]`.
        y: Place,
    },
    /// 0, 1, 2, ...
    Iota {
        /// How many.
        count: Dim,
        /// i64 `[count]`.
        y: Place,
    },
    /// Random numbers in [0, 1).
    Random {
        /// Which sequences.
        seed: u64,
        /// How many.
        count: Dim,
        /// i64, one number.
        step: Place,
        /// f32 `[count]`.
        y: Place,
    },
    /// A recurrent layer.
    Recurrent(Recurrent),
}

impl Primitive {
    /// The word for it in text.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Primitive::Matmul(matmul, _) => match matmul.operands {
                Operands::F32 => "matmul",
                Operands::Bf16 => "matmul_bf16",
                Operands::Int8(_) => "matmul_i8",
            },
            Primitive::Convolution(convolution, _) => {
                match (convolution.product, convolution.operands) {
                    (Product::Forward, Operands::F32) => "conv2d",
                    (Product::Forward, Operands::Bf16) => "conv2d_bf16",
                    (Product::Forward, Operands::Int8(_)) => "conv2d_i8",
                    (Product::GradInput, Operands::F32) => "conv2d_grad_input",
                    (Product::GradInput, Operands::Bf16) => "conv2d_grad_input_bf16",
                    (Product::GradInput, Operands::Int8(_)) => "conv2d_grad_input_i8",
                    (Product::GradWeight, Operands::F32) => "conv2d_grad_weight",
                    (Product::GradWeight, Operands::Bf16) => "conv2d_grad_weight_bf16",
                    (Product::GradWeight, Operands::Int8(_)) => "conv2d_grad_weight_i8",
                }
            }
            Primitive::Pooling(pooling) => match (pooling.max, pooling.gradient) {
                (true, false) if pooling.dtype == DType::I8 => "max_pool2d_i8",
                (true, false) if pooling.dtype == DType::BF16 => "max_pool2d_bf16",
                (true, false) => "max_pool2d",
                (true, true) => "max_pool2d_grad",
                (false, false) => "average_pool2d",
                (false, true) => "average_pool2d_grad",
            },
            Primitive::Attention(attention) => match attention.result {
                AttentionResult::Forward(_) => "attention",
                AttentionResult::Gradients { .. } => "attention_grad",
            },
            Primitive::Softmax { log: false, .. } => "softmax",
            Primitive::Softmax { log: true, .. } => "log_softmax",
            Primitive::CrossEntropy { .. } => "cross_entropy",
            Primitive::CrossEntropyGrad { .. } => "cross_entropy_grad",
            Primitive::Gather { .. } => "gather",
            Primitive::Scatter { op, .. } => op.name(),
            Primitive::TopK { .. } => "top_k",
            Primitive::Iota { .. } => "iota",
            Primitive::Random { .. } => "random",
            Primitive::Recurrent(recurrent) => {
                match (recurrent.gradient, recurrent.recurrence.products) {
                    (false, Some(DType::BF16)) => "recurrence_bf16",
                    (false, Some(DType::I8)) => "recurrence_i8",
                    (false, _) => "recurrence",
                    (true, Some(DType::BF16)) => "recurrence_grad_bf16",
                    (true, Some(DType::I8)) => "recurrence_grad_i8",
                    (true, _) => "recurrence_grad",
                }
            }
        }
    }
}
