//! One function per ONNX operator: node to values. The differences between opset versions end here.

mod arg;
mod attention;
mod batch_norm;
mod blocks;
mod classical;
mod constant;
mod conv;
mod einsum;
mod elements;
mod elementwise;
mod gate;
mod indexing;
mod integer;
mod interpolation;
mod legacy;
mod linear;
mod logical;
mod loss;
mod microsoft;
mod norm;
mod optimizer;
mod pad;
mod pool;
mod qlinear;
mod quantized;
mod quantized_blocks;
mod random;
mod recurrent;
mod reduce;
mod resize;
mod sampling;
mod shape;
mod trigonometric;
mod window;
#[cfg(test)]
mod window_tests;

pub(crate) use constant::add_tensor;

use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::node::OnnxNode;
use qcompile_ir::{BinaryOp, CompareOp, UnaryOp};

/// What an operator gives: one value per result.
pub(crate) type Results = Result<Vec<ValueId>, Obstacle>;

/// The opset versions of ONNX's own operators that are understood.
pub(crate) const OPSETS: std::ops::RangeInclusive<i64> = 1..=28;

/// Imports one node. The only place that knows operators by name.
pub(crate) fn convert(draft: &mut Draft, node: &mut OnnxNode, domain: &str) -> Results {
    match domain {
        "" | "ai.onnx" => convert_onnx(draft, node),
        "ai.onnx.ml" => convert_classical(draft, node),
        "ai.onnx.preview.training" => convert_optimizer(draft, node),
        "com.microsoft" => microsoft::convert(draft, node),
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
    if node.opset < 7 {
        legacy::modernize(draft, node)?;
    }
    match node.op {
        "Abs" => elementwise::unary(draft, node, UnaryOp::Abs),
        "Acos" => trigonometric::function(draft, node, trigonometric::acos),
        "Acosh" => trigonometric::function(draft, node, trigonometric::acosh),
        "Add" => elementwise::binary(draft, node, BinaryOp::Add),
        "AffineGrid" => sampling::affine_grid(draft, node),
        "And" => logical::logical(draft, node, BinaryOp::And),
        "ArgMax" => arg::arg_max(draft, node, false),
        "ArgMin" => arg::arg_max(draft, node, true),
        "Asin" => trigonometric::function(draft, node, trigonometric::asin),
        "Asinh" => trigonometric::function(draft, node, trigonometric::asinh),
        "Atan" => trigonometric::function(draft, node, trigonometric::atan),
        "Atanh" => trigonometric::function(draft, node, trigonometric::atanh),
        "Attention" => attention::attention(draft, node),
        "AveragePool" => pool::average_pool(draft, node),
        "BatchNormalization" => batch_norm::batch_normalization(draft, node),
        "Bernoulli" => random::bernoulli(draft, node),
        "BitShift" => logical::bit_shift(draft, node),
        "BitwiseAnd" => logical::bitwise(draft, node, BinaryOp::And),
        "BitwiseNot" => logical::bitwise_not(draft, node),
        "BitwiseOr" => logical::bitwise(draft, node, BinaryOp::Or),
        "BitwiseXor" => logical::bitwise_xor(draft, node),
        "BlackmanWindow" => sampling::cosine_window(draft, node, [0.42, 0.5, 0.08]),
        "Cast" => elementwise::cast(draft, node),
        "CastLike" => elementwise::cast_like(draft, node),
        "Ceil" => elementwise::unary(draft, node, UnaryOp::Ceil),
        "Celu" => elementwise::celu(draft, node),
        "CenterCropPad" => pad::center_crop_pad(draft, node),
        "Clip" => elementwise::clip(draft, node),
        "Compress" => elements::compress(draft, node),
        "Concat" => shape::concat(draft, node),
        "Constant" => constant::constant(draft, node),
        "ConstantOfShape" => constant::constant_of_shape(draft, node),
        "Conv" => conv::conv(draft, node),
        "ConvInteger" => integer::conv_integer(draft, node),
        "ConvTranspose" => conv::conv_transpose(draft, node),
        "Cos" => elementwise::unary(draft, node, UnaryOp::Cos),
        "Cosh" => trigonometric::function(draft, node, trigonometric::cosh),
        "CumProd" => arg::cumulative(draft, node, BinaryOp::Mul, 1.0),
        "CumSum" => arg::cumulative(draft, node, BinaryOp::Add, 0.0),
        "DepthToSpace" => blocks::depth_to_space(draft, node),
        "DequantizeLinear" => quantized::dequantize_linear(draft, node),
        "Div" => elementwise::binary(draft, node, BinaryOp::Div),
        "Dropout" => random::dropout(draft, node),
        "DynamicQuantizeLinear" => quantized::dynamic_quantize_linear(draft, node),
        "Einsum" => einsum::einsum(draft, node),
        "Elu" => elementwise::elu(draft, node),
        "Equal" => elementwise::compare(draft, node, CompareOp::Equal, false),
        "Erf" => elementwise::unary(draft, node, UnaryOp::Erf),
        "Exp" => elementwise::unary(draft, node, UnaryOp::Exp),
        "Expand" => shape::expand(draft, node),
        "EyeLike" => constant::eye_like(draft, node),
        "Flatten" => shape::flatten(draft, node),
        "Floor" => elementwise::unary(draft, node, UnaryOp::Floor),
        "Gather" => indexing::gather(draft, node),
        "GatherElements" => elements::gather_elements(draft, node),
        "GatherND" => elements::gather_nd(draft, node),
        "Gelu" => elementwise::gelu(draft, node),
        "Gemm" => linear::gemm(draft, node),
        "GlobalAveragePool" => pool::global_average_pool(draft, node),
        "GlobalLpPool" => pool::global_lp_pool(draft, node),
        "GlobalMaxPool" => pool::global_max_pool(draft, node),
        "Greater" => elementwise::compare(draft, node, CompareOp::Less, true),
        "GreaterOrEqual" => elementwise::compare(draft, node, CompareOp::LessEqual, true),
        "GroupNormalization" => norm::group_normalization(draft, node),
        "GRU" => recurrent::gru(draft, node),
        "HammingWindow" => sampling::cosine_window(draft, node, [25.0 / 46.0, 21.0 / 46.0, 0.0]),
        "HannWindow" => sampling::cosine_window(draft, node, [0.5, 0.5, 0.0]),
        "Hardmax" => arg::hardmax(draft, node),
        "HardSigmoid" => elementwise::hard_sigmoid(draft, node),
        "HardSwish" => elementwise::hard_swish(draft, node),
        "Identity" => elementwise::identity(draft, node),
        "InstanceNormalization" => norm::instance_normalization(draft, node),
        "IsInf" => logical::is_inf(draft, node),
        "IsNaN" => logical::is_nan(draft, node),
        "LayerNormalization" => norm::layer_normalization(draft, node),
        "LeakyRelu" => elementwise::leaky_relu(draft, node),
        "Less" => elementwise::compare(draft, node, CompareOp::Less, false),
        "LessOrEqual" => elementwise::compare(draft, node, CompareOp::LessEqual, false),
        "Log" => elementwise::unary(draft, node, UnaryOp::Log),
        "LogSoftmax" => norm::softmax(draft, node, qcompile_ir::Op::LogSoftmax),
        "LpNormalization" => norm::lp_normalization(draft, node),
        "LpPool" => pool::lp_pool(draft, node),
        "LRN" => norm::lrn(draft, node),
        "LSTM" => recurrent::lstm(draft, node),
        "MatMul" => linear::matmul(draft, node),
        "MatMulInteger" => integer::matmul_integer(draft, node),
        "Max" => elementwise::variadic(draft, node, BinaryOp::Max),
        "MaxPool" => pool::max_pool(draft, node),
        "MaxUnpool" => pool::max_unpool(draft, node),
        "Mean" => elementwise::mean(draft, node),
        "MeanVarianceNormalization" => norm::mean_variance_normalization(draft, node),
        "Min" => elementwise::variadic(draft, node, BinaryOp::Min),
        "Mish" => elementwise::mish(draft, node),
        "Mod" => elementwise::remainder(draft, node),
        "Mul" => elementwise::binary(draft, node, BinaryOp::Mul),
        "Neg" => elementwise::unary(draft, node, UnaryOp::Neg),
        "NegativeLogLikelihoodLoss" => loss::negative_log_likelihood(draft, node),
        "NonZero" => elements::non_zero(draft, node),
        "Not" => elementwise::unary(draft, node, UnaryOp::Not),
        "OneHot" => elements::one_hot(draft, node),
        "Or" => logical::logical(draft, node, BinaryOp::Or),
        "Pad" => pad::pad(draft, node),
        "Pow" => elementwise::pow(draft, node),
        "PRelu" => elementwise::prelu(draft, node),
        "QLinearConv" => qlinear::qlinear_conv(draft, node),
        "QLinearMatMul" => qlinear::qlinear_matmul(draft, node),
        "QuantizeLinear" => quantized::quantize_linear(draft, node),
        "RandomNormal" | "RandomNormalLike" => random::random_normal(draft, node),
        "RandomUniform" | "RandomUniformLike" => random::random_uniform(draft, node),
        "Range" => constant::range(draft, node),
        "Reciprocal" => elementwise::unary(draft, node, UnaryOp::Reciprocal),
        "ReduceL1" => reduce::reduce_l1(draft, node),
        "ReduceL2" => reduce::reduce_l2(draft, node),
        "ReduceLogSum" => reduce::reduce_log_sum(draft, node),
        "ReduceLogSumExp" => reduce::reduce_log_sum_exp(draft, node),
        "ReduceMax" => reduce::reduce_extreme(draft, node, false),
        "ReduceMean" => reduce::reduce_mean(draft, node),
        "ReduceMin" => reduce::reduce_extreme(draft, node, true),
        "ReduceProd" => reduce::reduce_prod(draft, node),
        "ReduceSum" => reduce::reduce_sum(draft, node),
        "ReduceSumSquare" => reduce::reduce_sum_square(draft, node),
        "Relu" => elementwise::unary(draft, node, UnaryOp::Relu),
        "Reshape" => shape::reshape(draft, node),
        "Resize" => resize::resize(draft, node),
        "ReverseSequence" => elements::reverse_sequence(draft, node),
        "RMSNormalization" => norm::rms_normalization(draft, node),
        "RNN" => recurrent::rnn(draft, node),
        "RotaryEmbedding" => attention::rotary_embedding(draft, node),
        "Round" => elementwise::unary(draft, node, UnaryOp::Round),
        "Scatter" | "ScatterElements" => elements::scatter_elements(draft, node),
        "ScatterND" => elements::scatter_nd(draft, node),
        "Selu" => elementwise::selu(draft, node),
        "Shape" => shape::shape(draft, node),
        "Shrink" => elementwise::shrink(draft, node),
        "Sigmoid" => elementwise::unary(draft, node, UnaryOp::Sigmoid),
        "Sign" => elementwise::unary(draft, node, UnaryOp::Sign),
        "SimplifiedLayerNormalization" => norm::rms_normalization(draft, node),
        "Sin" => elementwise::unary(draft, node, UnaryOp::Sin),
        "Sinh" => trigonometric::function(draft, node, trigonometric::sinh),
        "Size" => shape::size(draft, node),
        "Slice" => indexing::slice(draft, node),
        "Softmax" => norm::softmax(draft, node, qcompile_ir::Op::Softmax),
        "SoftmaxCrossEntropyLoss" => loss::softmax_cross_entropy(draft, node),
        "Softplus" => elementwise::softplus(draft, node),
        "Softsign" => elementwise::softsign(draft, node),
        "SpaceToDepth" => blocks::space_to_depth(draft, node),
        "Split" => indexing::split(draft, node),
        "Sqrt" => elementwise::unary(draft, node, UnaryOp::Sqrt),
        "Squeeze" => shape::squeeze(draft, node),
        "Sub" => elementwise::binary(draft, node, BinaryOp::Sub),
        "Sum" => elementwise::variadic(draft, node, BinaryOp::Add),
        "SwiGLU" => gate::swi_glu(draft, node),
        "Swish" => elementwise::swish(draft, node, 1.0),
        "Tan" => trigonometric::function(draft, node, trigonometric::tan),
        "Tanh" => elementwise::unary(draft, node, UnaryOp::Tanh),
        "ThresholdedRelu" => elementwise::thresholded_relu(draft, node),
        "Tile" => shape::tile(draft, node),
        "TopK" => elements::top_k(draft, node),
        "Transpose" => shape::transpose(draft, node),
        "Trilu" => indexing::trilu(draft, node),
        "Unique" => elements::unique(),
        "Unsqueeze" => shape::unsqueeze(draft, node),
        "Upsample" if node.opset < 10 => resize::upsample(draft, node),
        "Where" => elementwise::where_(draft, node),
        "Xor" => logical::xor(draft, node),
        _ => Err(unknown()),
    }
}

fn convert_classical(draft: &mut Draft, node: &OnnxNode) -> Results {
    match node.op {
        "LinearClassifier" => classical::linear_classifier(draft, node),
        "LinearRegressor" => classical::linear_regressor(draft, node),
        "Scaler" => classical::scaler(draft, node),
        _ => Err(unknown()),
    }
}

fn convert_optimizer(draft: &mut Draft, node: &OnnxNode) -> Results {
    match node.op {
        "Adagrad" => optimizer::adagrad(draft, node),
        "Adam" => optimizer::adam(draft, node),
        "Momentum" => optimizer::momentum(draft, node),
        _ => Err(unknown()),
    }
}
