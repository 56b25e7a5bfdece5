//! The closed vocabulary: plain data, no behaviour but names.

use crate::{
    AttentionOperand, DType, Dim, GradientRounding, Recurrence, Shape, Tensor, TensorType,
};
use std::sync::Arc;

/// Elementwise functions of one operand. The result has the operand's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "each is the function of that name")]
pub enum UnaryOp {
    Neg,
    Abs,
    Exp,
    Log,
    Sqrt,
    Reciprocal,
    Erf,
    Relu,
    Sigmoid,
    Tanh,
    Sin,
    Cos,
    Atan,
    Floor,
    Ceil,
    /// To nearest, ties to even.
    Round,
    /// -1, 0 or 1.
    Sign,
    /// Logical negation of a bool.
    Not,
    /// The identity, with gradient zero.
    StopGradient,
}

impl UnaryOp {
    /// Every function, in declaration order.
    pub const ALL: [UnaryOp; 19] = [
        UnaryOp::Neg,
        UnaryOp::Abs,
        UnaryOp::Exp,
        UnaryOp::Log,
        UnaryOp::Sqrt,
        UnaryOp::Reciprocal,
        UnaryOp::Erf,
        UnaryOp::Relu,
        UnaryOp::Sigmoid,
        UnaryOp::Tanh,
        UnaryOp::Sin,
        UnaryOp::Cos,
        UnaryOp::Atan,
        UnaryOp::Floor,
        UnaryOp::Ceil,
        UnaryOp::Round,
        UnaryOp::Sign,
        UnaryOp::Not,
        UnaryOp::StopGradient,
    ];

    /// The mnemonic in text.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            UnaryOp::Neg => "neg",
            UnaryOp::Abs => "abs",
            UnaryOp::Exp => "exp",
            UnaryOp::Log => "log",
            UnaryOp::Sqrt => "sqrt",
            UnaryOp::Reciprocal => "reciprocal",
            UnaryOp::Erf => "erf",
            UnaryOp::Relu => "relu",
            UnaryOp::Sigmoid => "sigmoid",
            UnaryOp::Tanh => "tanh",
            UnaryOp::Sin => "sin",
            UnaryOp::Cos => "cos",
            UnaryOp::Atan => "atan",
            UnaryOp::Floor => "floor",
            UnaryOp::Ceil => "ceil",
            UnaryOp::Round => "round",
            UnaryOp::Sign => "sign",
            UnaryOp::Not => "not",
            UnaryOp::StopGradient => "stop_gradient",
        }
    }
}

/// Elementwise functions of two operands of the same type. There is no implicit broadcasting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "each is the function of that name")]
pub enum BinaryOp {
    Add,
    Sub,
    Mul,
    /// Integer division truncates; a zero divisor gives zero.
    Div,
    Max,
    Min,
    Pow,
    /// Logical on bool, of each bit on integers.
    And,
    /// Logical on bool, of each bit on integers.
    Or,
}

impl BinaryOp {
    /// Every function, in declaration order.
    pub const ALL: [BinaryOp; 9] = [
        BinaryOp::Add,
        BinaryOp::Sub,
        BinaryOp::Mul,
        BinaryOp::Div,
        BinaryOp::Max,
        BinaryOp::Min,
        BinaryOp::Pow,
        BinaryOp::And,
        BinaryOp::Or,
    ];

    /// The mnemonic in text.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            BinaryOp::Add => "add",
            BinaryOp::Sub => "sub",
            BinaryOp::Mul => "mul",
            BinaryOp::Div => "div",
            BinaryOp::Max => "max",
            BinaryOp::Min => "min",
            BinaryOp::Pow => "pow",
            BinaryOp::And => "and",
            BinaryOp::Or => "or",
        }
    }
}

/// Elementwise comparisons of two operands of the same type; the result is bool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "each is the comparison of that name")]
pub enum CompareOp {
    Equal,
    Less,
    LessEqual,
}

impl CompareOp {
    /// Every comparison, in declaration order.
    pub const ALL: [CompareOp; 3] = [CompareOp::Equal, CompareOp::Less, CompareOp::LessEqual];

    /// The mnemonic in text.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            CompareOp::Equal => "equal",
            CompareOp::Less => "less",
            CompareOp::LessEqual => "less_equal",
        }
    }
}

/// Reductions over axes. Reduced axes are kept with size 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ReduceOp {
    /// The sum.
    Sum,
    /// The maximum; of nothing, the smallest value of the type.
    Max,
}

impl ReduceOp {
    /// Every reduction, in declaration order.
    pub const ALL: [ReduceOp; 2] = [ReduceOp::Sum, ReduceOp::Max];

    /// The mnemonic in text.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            ReduceOp::Sum => "reduce_sum",
            ReduceOp::Max => "reduce_max",
        }
    }
}

/// How a scatter combines the values of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ScatterOp {
    /// Their sum; of none, 0.
    Add,
    /// Their product; of none, 1.
    Mul,
    /// The largest, a NaN above all; of none, the smallest value of the type.
    Max,
}

impl ScatterOp {
    /// Every combination, in declaration order.
    pub const ALL: [ScatterOp; 3] = [ScatterOp::Add, ScatterOp::Mul, ScatterOp::Max];

    /// The mnemonic in text.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            ScatterOp::Add => "scatter_add",
            ScatterOp::Mul => "scatter_mul",
            ScatterOp::Max => "scatter_max",
        }
    }
}

/// How ranks combine their values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CollectiveOp {
    /// The sum over ranks.
    Sum,
    /// The sum over ranks divided by their number.
    Mean,
    /// The maximum over ranks.
    Max,
}

impl CollectiveOp {
    /// Every combination, in declaration order.
    pub const ALL: [CollectiveOp; 3] = [CollectiveOp::Sum, CollectiveOp::Mean, CollectiveOp::Max];

    /// The attribute in text.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            CollectiveOp::Sum => "sum",
            CollectiveOp::Mean => "mean",
            CollectiveOp::Max => "max",
        }
    }
}

/// Geometry of a 2-D convolution over NHWC with an OIHW weight (`[out, in / groups, kernel_h, kernel_w]`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConvGeometry {
    /// Input height and width.
    pub input: [usize; 2],
    /// Kernel height and width.
    pub kernel: [usize; 2],
    /// Strides along height and width.
    pub strides: [usize; 2],
    /// Zero padding: top, left, bottom, right.
    pub pads: [usize; 4],
    /// Dilations along height and width.
    pub dilations: [usize; 2],
    /// Number of channel groups.
    pub groups: usize,
}

impl ConvGeometry {
    /// Output height and width; `None` if the dilated kernel does not fit or a number is zero or overflows.
    #[must_use]
    pub fn output(&self) -> Option<[usize; 2]> {
        window_output(self.input, self.kernel, self.strides, self.pads, self.dilations)
    }
}

/// Geometry of 2-D pooling over NHWC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PoolGeometry {
    /// Input height and width.
    pub input: [usize; 2],
    /// Window height and width.
    pub kernel: [usize; 2],
    /// Strides along height and width.
    pub strides: [usize; 2],
    /// Padding: top, left, bottom, right.
    pub pads: [usize; 4],
    /// Dilations along height and width.
    pub dilations: [usize; 2],
    /// Whether an average counts padded places.
    pub count_include_pad: bool,
}

impl PoolGeometry {
    /// Output height and width; `None` if the window does not fit or a number is zero or overflows.
    #[must_use]
    pub fn output(&self) -> Option<[usize; 2]> {
        window_output(self.input, self.kernel, self.strides, self.pads, self.dilations)
    }

    /// Whether every window meets the input, none being all padding.
    #[must_use]
    pub fn meets_input(&self) -> bool {
        let Some(output) = self.output() else { return false };
        (0..2).all(|axis| {
            (0..output[axis]).all(|out| {
                let place = |tap: usize| out * self.strides[axis] + tap * self.dilations[axis];
                let within = |place: usize| {
                    place.checked_sub(self.pads[axis]).is_some_and(|at| at < self.input[axis])
                };
                (0..self.kernel[axis]).any(|tap| within(place(tap)))
            })
        })
    }
}

fn window_output(
    input: [usize; 2],
    kernel: [usize; 2],
    strides: [usize; 2],
    pads: [usize; 4],
    dilations: [usize; 2],
) -> Option<[usize; 2]> {
    let axis = |axis: usize| {
        let padded = input[axis].checked_add(pads[axis])?.checked_add(pads[axis + 2])?;
        let reach = kernel[axis].checked_sub(1)?.checked_mul(dilations[axis])?.checked_add(1)?;
        if strides[axis] == 0 || dilations[axis] == 0 {
            return None;
        }
        Some(padded.checked_sub(reach)? / strides[axis] + 1)
    };
    Some([axis(0)?, axis(1)?])
}

/// What a node computes from its operands.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// A value given to every step.
    Input(TensorType),
    /// A trainable value and how it starts.
    Param(Arc<Tensor>),
    /// A value kept between steps that is not trained (moments, running statistics, residuals).
    State(Arc<Tensor>),
    /// A constant.
    Const(Arc<Tensor>),
    /// `f32[]`: the number of elements along a dimension, `128N`.
    Size(Dim),
    /// `bool[]`: true in a step that trains, false in its evaluation form.
    Training,
    /// `i64[dim]`: 0, 1, 2, ...
    Iota(Dim),
    /// `random step -> f32[shape]` in [0, 1): a function of the seed, the i64 step and the place in the whole batch.
    Random {
        /// What tells one sequence from another.
        seed: u64,
        /// The shape of the result.
        shape: Shape,
    },
    /// Elementwise, one operand.
    Unary(UnaryOp),
    /// Elementwise conversion to another element type: to nearest even between floats, truncation to integers.
    Cast(DType),
    /// Elementwise, two operands of one type.
    Binary(BinaryOp),
    /// Elementwise comparison of two operands of one type.
    Compare(CompareOp),
    /// `select condition, a, b`: elementwise `a` where the bool is true, else `b`.
    Select,
    /// Reduction; reduced axes (ascending) stay with size 1.
    Reduce {
        /// Which reduction.
        op: ReduceOp,
        /// Axes, ascending.
        axes: Vec<usize>,
    },
    /// `[..., m, k] x [..., k, n] -> [..., m, n]`, leading dimensions equal.
    Matmul {
        /// The first operand is stored as `[..., k, m]`.
        transpose_a: bool,
        /// The second operand is stored as `[..., n, k]`.
        transpose_b: bool,
    },
    /// `conv2d x[n, h, w, c], weight[o, c/groups, kh, kw] -> [n, oh, ow, o]`.
    Conv2d(ConvGeometry),
    /// `conv2d_grad_input dy, weight -> dx` of the convolution with this geometry.
    Conv2dGradInput(ConvGeometry),
    /// `conv2d_grad_weight x, dy -> dweight` of the convolution with this geometry.
    Conv2dGradWeight(ConvGeometry),
    /// `max_pool2d x[n, h, w, c]`.
    MaxPool2d(PoolGeometry),
    /// `max_pool2d_grad x, dy -> dx`; ties go to the first place of the window.
    MaxPool2dGrad(PoolGeometry),
    /// `average_pool2d x[n, h, w, c]`.
    AveragePool2d(PoolGeometry),
    /// `average_pool2d_grad dy -> dx`.
    AveragePool2dGrad(PoolGeometry),
    /// The same elements in row-major order under another shape.
    Reshape(Shape),
    /// Result axis `i` is operand axis `permutation[i]`.
    Transpose(Vec<usize>),
    /// numpy broadcasting to this shape.
    Broadcast(Shape),
    /// Elements `start, start + step, ...` below `end` along one axis.
    Slice {
        /// The axis.
        axis: usize,
        /// First index.
        start: usize,
        /// Index after the last.
        end: usize,
        /// Distance, at least 1.
        step: usize,
    },
    /// `low` values before, `high` after, `interior` between elements along one axis.
    Pad {
        /// The axis.
        axis: usize,
        /// Values before the first element.
        low: usize,
        /// Values after the last element.
        high: usize,
        /// Values between neighbours.
        interior: usize,
        /// The value.
        value: f32,
    },
    /// Concatenation of one or more operands along an axis.
    Concat {
        /// The axis.
        axis: usize,
    },
    /// `gather table[rows, ...], indices -> indices.shape + table.shape[1..]`; negative indices count from the end.
    Gather,
    /// `scatter_add indices, values -> [rows, ...]`: each row combines the values of its index, in their order.
    Scatter {
        /// How.
        op: ScatterOp,
        /// Rows of the result.
        rows: Dim,
    },
    /// `top_k x[..., n] -> i64[..., k]`: where the largest (or smallest) elements of each row are, the foremost first,
    /// of equal ones that with the lower index. A NaN is larger than all.
    TopK {
        /// How many.
        k: usize,
        /// The largest, else the smallest.
        largest: bool,
    },
    /// `attention q[b, t, h, d], k[b, s, g, d], v[b, s, g, e] (, mask[b|1, h|1, t|1, s]) -> [b, t, h, e]`: the softmax
    /// over `s` of `scale · q kᵀ + mask`, times `v`. Heads `h` are a multiple of `g`; each `h / g` share keys and values.
    Attention {
        /// What scores are multiplied with.
        scale: f32,
        /// Whether row `t` sees only keys `s <= t`.
        causal: bool,
        /// What the products run in, with sums in f32 (i32 for `i8`); the softmax is f32. `f32` rounds nothing; in `bf16`,
        /// which wants operands of it, the exponentials `exp(score - largest score of the row)` are rounded to bf16 before
        /// the product with `v` (FlashAttention-2, Dao 2023, arXiv:2307.08691); in `i8`, which wants f32 operands that are
        /// dequantized, to codes of 1/127 (SageAttention, Zhang et al. 2024, arXiv:2410.02367).
        products: DType,
    },
    /// `attention_grad q, k, v (, mask), dy (, numbers[b, t, h, 2]) -> dq, dk or dv` of the attention with these attributes.
    AttentionGrad {
        /// Which operand's gradient.
        of: AttentionOperand,
        /// As in the attention.
        scale: f32,
        /// As in the attention.
        causal: bool,
        /// `f32`, or `bf16`: probabilities and the gradients of scores are rounded to it before their products. Or `i8`,
        /// which wants f32 operands that are dequantized: exponentials are codes of 1/127, gradients of scores have a scale
        /// for each query, and what both multiply over queries one for each column of a block ([`AttentionCodes`](crate::AttentionCodes)).
        products: DType,
        /// How `i8` rounds gradients of scores, and what is rounded by columns. `stochastic` takes f32 numbers in [0, 1),
        /// two for each query and head, turned by [`golden_multiple`](crate::golden_multiple)s: of the key those for
        /// gradients of scores, of the column those for the others.
        rounding: GradientRounding,
    },
    /// Over the last axis.
    Softmax,
    /// Over the last axis.
    LogSoftmax,
    /// `cross_entropy logits[r, c], label[r] -> loss[r]`; label -100 gives 0.
    CrossEntropy,
    /// `cross_entropy_grad logits, label, dloss[r] -> dlogits`.
    CrossEntropyGrad,
    /// `recurrence x[t, b, gates·h], r[gates·h, h], h0[b, h], ... -> [sections, t + 1, b, h]`: a recurrent layer.
    Recurrence(Recurrence),
    /// `recurrence_grad y, r, dh[t, b, h], ... (, numbers[b, t, gradients]) -> [t + 1, b, gradients·h]` of the recurrence with
    /// this data.
    RecurrenceGrad {
        /// The recurrence.
        recurrence: Recurrence,
        /// Whether the gradient of c follows that of h.
        cell: bool,
        /// How products of `i8` round gradients. `stochastic` takes an f32 number in [0, 1) for each of a row at a step,
        /// turned by the [`golden_multiple`](crate::golden_multiple) of the hidden unit.
        rounding: GradientRounding,
    },
    /// `quantize x, scale (, zero_point) -> round(x / scale) + zero_point` clamped to the range of the quantized type
    /// ([`QuantizedRange`](crate::QuantizedRange)).
    Quantize {
        /// The quantized type.
        dtype: DType,
        /// The axis that a 1-D scale runs along; none for a scalar scale.
        axis: Option<usize>,
    },
    /// `dequantize q, scale (, zero_point) -> (q - zero_point) · scale` in f32.
    Dequantize {
        /// The axis that a 1-D scale runs along; none for a scalar scale.
        axis: Option<usize>,
    },
    /// `straight_through x, dy, scale (, zero_point) -> dy` where `x / scale + zero_point` rounds into the range of the
    /// type, else 0.
    StraightThrough {
        /// The quantized type.
        dtype: DType,
        /// The axis that a 1-D scale runs along; none for a scalar scale.
        axis: Option<usize>,
    },
    /// The combination of this value over all ranks.
    AllReduce(CollectiveOp),
}

impl Op {
    /// The mnemonic in text.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Op::Input(_) => "input",
            Op::Param(_) => "param",
            Op::State(_) => "state",
            Op::Const(_) => "const",
            Op::Size(_) => "size",
            Op::Training => "training",
            Op::Iota(_) => "iota",
            Op::Random { .. } => "random",
            Op::Unary(op) => op.name(),
            Op::Cast(_) => "cast",
            Op::Binary(op) => op.name(),
            Op::Compare(op) => op.name(),
            Op::Select => "select",
            Op::Reduce { op, .. } => op.name(),
            Op::Matmul { .. } => "matmul",
            Op::Conv2d(_) => "conv2d",
            Op::Conv2dGradInput(_) => "conv2d_grad_input",
            Op::Conv2dGradWeight(_) => "conv2d_grad_weight",
            Op::MaxPool2d(_) => "max_pool2d",
            Op::MaxPool2dGrad(_) => "max_pool2d_grad",
            Op::AveragePool2d(_) => "average_pool2d",
            Op::AveragePool2dGrad(_) => "average_pool2d_grad",
            Op::Reshape(_) => "reshape",
            Op::Transpose(_) => "transpose",
            Op::Broadcast(_) => "broadcast",
            Op::Slice { .. } => "slice",
            Op::Pad { .. } => "pad",
            Op::Concat { .. } => "concat",
            Op::Gather => "gather",
            Op::Scatter { op, .. } => op.name(),
            Op::TopK { .. } => "top_k",
            Op::Attention { .. } => "attention",
            Op::AttentionGrad { .. } => "attention_grad",
            Op::Softmax => "softmax",
            Op::LogSoftmax => "log_softmax",
            Op::CrossEntropy => "cross_entropy",
            Op::CrossEntropyGrad => "cross_entropy_grad",
            Op::Recurrence(_) => "recurrence",
            Op::RecurrenceGrad { .. } => "recurrence_grad",
            Op::Quantize { .. } => "quantize",
            Op::Dequantize { .. } => "dequantize",
            Op::StraightThrough { .. } => "straight_through",
            Op::AllReduce(_) => "all_reduce",
        }
    }

    /// Whether it is declared rather than computed: input, param, state or const.
    #[must_use]
    pub fn is_leaf(&self) -> bool {
        matches!(self, Op::Input(_) | Op::Param(_) | Op::State(_) | Op::Const(_))
    }
}
