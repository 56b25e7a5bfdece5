//! One function per ONNX operator: node to values. The differences between opset versions end here.

mod constant;
mod conv;
mod elementwise;
mod indexing;
mod interpolation;
mod linear;
mod norm;
mod pool;
mod recurrent;
mod reduce;
mod resize;
mod shape;
mod window;

pub(crate) use constant::add_tensor;

use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::node::OnnxNode;
use qcompile_ir::{BinaryOp, CompareOp, ReduceOp, UnaryOp};

/// What an operator gives: one value per result.
pub(crate) type Results = Result<Vec<ValueId>, Obstacle>;

/// The opset versions of ONNX's own operators that are understood.
pub(crate) const OPSETS: std::ops::RangeInclusive<i64> = 7..=28;

/// Imports one node. The only place that knows operators by name.
pub(crate) fn convert(draft: &mut Draft, node: &mut OnnxNode, domain: &str) -> Results {
    match domain {
        "" | "ai.onnx" => convert_onnx(draft, node),
        "com.microsoft" => convert_microsoft(draft, node),
        _ => Err(unknown()),
    }
}

fn unknown() -> Obstacle {
    Obstacle::unsupported("the operator is not supported")
}

fn convert_onnx(draft: &mut Draft, node: &mut OnnxNode) -> Results {
    if !OPSETS.contains(&node.opset) {
        return Err(Obstacle::unsupported(format!(
            "opset {} is outside {} to {}",
            node.opset,
            OPSETS.start(),
            OPSETS.end()
        )));
    }
    match node.op {
        "Abs" => elementwise::unary(draft, node, UnaryOp::Abs),
        "Add" => elementwise::binary(draft, node, BinaryOp::Add),
        "And" => elementwise::binary(draft, node, BinaryOp::And),
        "AveragePool" => pool::average_pool(draft, node),
        "BatchNormalization" => norm::batch_normalization(draft, node),
        "Cast" => elementwise::cast(draft, node),
        "CastLike" => elementwise::cast_like(draft, node),
        "Ceil" => elementwise::unary(draft, node, UnaryOp::Ceil),
        "Celu" => elementwise::celu(draft, node),
        "Clip" => elementwise::clip(draft, node),
        "Concat" => shape::concat(draft, node),
        "Constant" => constant::constant(draft, node),
        "ConstantOfShape" => constant::constant_of_shape(draft, node),
        "Conv" => conv::conv(draft, node),
        "ConvTranspose" => conv::conv_transpose(draft, node),
        "Cos" => elementwise::unary(draft, node, UnaryOp::Cos),
        "Div" => elementwise::binary(draft, node, BinaryOp::Div),
        "Dropout" => elementwise::dropout(draft, node),
        "Elu" => elementwise::elu(draft, node),
        "Equal" => elementwise::compare(draft, node, CompareOp::Equal, false),
        "Erf" => elementwise::unary(draft, node, UnaryOp::Erf),
        "Exp" => elementwise::unary(draft, node, UnaryOp::Exp),
        "Expand" => shape::expand(draft, node),
        "Flatten" => shape::flatten(draft, node),
        "Floor" => elementwise::unary(draft, node, UnaryOp::Floor),
        "Gather" => indexing::gather(draft, node),
        "Gelu" => elementwise::gelu(draft, node),
        "GRU" => recurrent::gru(draft, node),
        "Gemm" => linear::gemm(draft, node),
        "GlobalAveragePool" => pool::global_average_pool(draft, node),
        "GlobalLpPool" => pool::global_lp_pool(draft, node),
        "GlobalMaxPool" => pool::global_max_pool(draft, node),
        "Greater" => elementwise::compare(draft, node, CompareOp::Less, true),
        "GreaterOrEqual" => elementwise::compare(draft, node, CompareOp::LessEqual, true),
        "HardSigmoid" => elementwise::hard_sigmoid(draft, node),
        "HardSwish" => elementwise::hard_swish(draft, node),
        "Identity" => elementwise::identity(draft, node),
        "InstanceNormalization" => norm::instance_normalization(draft, node),
        "LSTM" => recurrent::lstm(draft, node),
        "LayerNormalization" => norm::layer_normalization(draft, node),
        "LeakyRelu" => elementwise::leaky_relu(draft, node),
        "Less" => elementwise::compare(draft, node, CompareOp::Less, false),
        "LessOrEqual" => elementwise::compare(draft, node, CompareOp::LessEqual, false),
        "Log" => elementwise::unary(draft, node, UnaryOp::Log),
        "LogSoftmax" => norm::softmax(draft, node, qcompile_ir::Op::LogSoftmax),
        "LpPool" => pool::lp_pool(draft, node),
        "MatMul" => linear::matmul(draft, node),
        "Max" => elementwise::variadic(draft, node, BinaryOp::Max),
        "MaxPool" => pool::max_pool(draft, node),
        "MaxUnpool" => pool::max_unpool(draft, node),
        "Mean" => elementwise::mean(draft, node),
        "Min" => elementwise::variadic(draft, node, BinaryOp::Min),
        "Mish" => elementwise::mish(draft, node),
        "Mul" => elementwise::binary(draft, node, BinaryOp::Mul),
        "Neg" => elementwise::unary(draft, node, UnaryOp::Neg),
        "Not" => elementwise::unary(draft, node, UnaryOp::Not),
        "Or" => elementwise::binary(draft, node, BinaryOp::Or),
        "PRelu" => elementwise::prelu(draft, node),
        "Pad" => indexing::pad(draft, node),
        "Pow" => elementwise::pow(draft, node),
        "RMSNormalization" => norm::rms_normalization(draft, node),
        "RNN" => recurrent::rnn(draft, node),
        "Range" => constant::range(draft, node),
        "Reciprocal" => elementwise::unary(draft, node, UnaryOp::Reciprocal),
        "ReduceL1" => reduce::reduce_l1(draft, node),
        "ReduceL2" => reduce::reduce_l2(draft, node),
        "ReduceLogSumExp" => reduce::reduce_log_sum_exp(draft, node),
        "ReduceMax" => reduce::reduce(draft, node, ReduceOp::Max),
        "ReduceMean" => reduce::reduce_mean(draft, node),
        "ReduceMin" => reduce::reduce_min(draft, node),
        "ReduceSum" => reduce::reduce(draft, node, ReduceOp::Sum),
        "ReduceSumSquare" => reduce::reduce_sum_square(draft, node),
        "Relu" => elementwise::unary(draft, node, UnaryOp::Relu),
        "Reshape" => shape::reshape(draft, node),
        "Resize" => resize::resize(draft, node),
        "Round" => elementwise::unary(draft, node, UnaryOp::Round),
        "Selu" => elementwise::selu(draft, node),
        "Shape" => shape::shape(draft, node),
        "Sigmoid" => elementwise::unary(draft, node, UnaryOp::Sigmoid),
        "Sign" => elementwise::unary(draft, node, UnaryOp::Sign),
        "Sin" => elementwise::unary(draft, node, UnaryOp::Sin),
        "Size" => shape::size(draft, node),
        "Slice" => indexing::slice(draft, node),
        "Softmax" => norm::softmax(draft, node, qcompile_ir::Op::Softmax),
        "Softplus" => elementwise::softplus(draft, node),
        "Softsign" => elementwise::softsign(draft, node),
        "Split" => indexing::split(draft, node),
        "Sqrt" => elementwise::unary(draft, node, UnaryOp::Sqrt),
        "Squeeze" => shape::squeeze(draft, node),
        "Sub" => elementwise::binary(draft, node, BinaryOp::Sub),
        "Sum" => elementwise::variadic(draft, node, BinaryOp::Add),
        "Tanh" => elementwise::unary(draft, node, UnaryOp::Tanh),
        "ThresholdedRelu" => elementwise::thresholded_relu(draft, node),
        "Tile" => shape::tile(draft, node),
        "Transpose" => shape::transpose(draft, node),
        "Trilu" => indexing::trilu(draft, node),
        "Unsqueeze" => shape::unsqueeze(draft, node),
        "Upsample" if node.opset < 10 => resize::upsample(draft, node),
        "Where" => elementwise::where_(draft, node),
        "Xor" => elementwise::xor(draft, node),
        _ => Err(unknown()),
    }
}

fn convert_microsoft(draft: &mut Draft, node: &mut OnnxNode) -> Results {
    match node.op {
        "Gelu" => elementwise::gelu(draft, node),
        _ => Err(unknown()),
    }
}
