//! Groups of flags that several commands take.

use super::words::{
    above_zero, calibration, channel_policy, codes, constant, dim, finite, fraction, grad_weight,
    granularity, keep, loss, metric, not_negative, on_or_off, operand_types, operations, optimizer,
    positive, precision, rounding, scaling, size, weights,
};
use crate::error::{Error, Result};
use clap::{Args, ValueEnum};
use qcompile_ir::{DType, GradientRounding, Granularity, Scaling, Tensor};
use qcompile_passes::attach_loss::LossKind;
use qcompile_passes::calibrate::Method;
use qcompile_passes::quantize::{
    ChannelPolicy, Codes, Numerics, OperandTypes, Operations, PrecisionChoice,
};
use qcompile_passes::saved;
use qcompile_passes::sensitivity::Metric;
use qcompile_passes::update::Optimizer;
use std::path::PathBuf;

/// What a compile writes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Emit {
    /// The plan (.qplan).
    #[default]
    Plan,
    /// The plan's schedule and memory as text.
    PlanText,
    /// The final graph (.qir).
    Graph,
    /// Cranelift's intermediate code of every step.
    Clif,
    /// The machine code of every step.
    Asm,
}

/// Flags that decide what the compiled step is. All are optional, so that a plan can tell which were given.
#[derive(Debug, Clone, Default, Args)]
pub struct CompileArgs {
    /// The loss; by default taken from the model's first output.
    #[arg(long, value_name = "KIND", value_parser = loss(), help_heading = "Training")]
    pub loss: Option<LossKind>,
    /// The optimizer [default: momentum].
    #[arg(long, value_name = "KIND", value_parser = optimizer(), help_heading = "Training")]
    pub optimizer: Option<Optimizer>,
    /// The model's choice of what is trained.
    #[command(flatten)]
    pub import: ImportArgs,
    /// Make batch statistics those of all workers' samples.
    #[arg(long, help_heading = "Training")]
    pub sync_batch_norm: bool,
    /// Precision of the layers.
    #[command(flatten)]
    pub precision: PrecisionArgs,
    /// What --qat rounds to what.
    #[command(flatten)]
    pub ranged: RangedArgs,
    /// Save what the backward pass reads of the forward pass in bf16, f16, int8 or int4: saved=int8, or of some nodes only
    /// saved=int4:PATTERN; of several that match the last counts.
    #[arg(long, value_name = "saved=FORMAT[:PATTERN]", help_heading = "Precision")]
    pub compress: Vec<saved::Rule>,
    /// The memory that a step may take at --batch-size, as 512MiB, 1.5GB or in bytes: forward values are made again in
    /// the backward pass where that is needed.
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = "Training")]
    pub memory_limit: Option<usize>,
    /// The batch size that is tuned and measured for; any batch runs [default: 32].
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Training")]
    pub batch_size: Option<usize>,
}

impl CompileArgs {
    /// Whether flags that depend on others have them.
    ///
    /// # Errors
    /// Usage.
    pub fn check(&self) -> Result<()> {
        match self.ranged.given() {
            Some(flag) if !self.precision.qat => {
                Err(Error::usage(format!("{flag} is for --qat, and for export --format qdq-onnx")))
            }
            _ => Ok(()),
        }
    }
}

/// Flags of the import.
#[derive(Debug, Clone, Default, Args)]
pub struct ImportArgs {
    /// Do not train initializers that match (`*` and `?`; `op:Conv` for all of an operator).
    #[arg(long, value_name = "PATTERN", help_heading = "Training")]
    pub freeze: Vec<String>,
    /// Train only initializers that match. One without an axis is a number, and trained only if named so.
    #[arg(long, value_name = "PATTERN", help_heading = "Training")]
    pub train: Vec<String>,
    /// What BatchNormalization does [default: model].
    #[arg(long, value_name = "MODE", value_enum, help_heading = "Training")]
    pub batch_norm: Option<BatchNormMode>,
    /// Size of a symbolic dimension.
    #[arg(long, value_name = "NAME=VALUE", value_parser = dim, help_heading = "Training")]
    pub dim: Vec<(String, usize)>,
    /// Value of an input that is the same in every step, such as a mode or a sampling rate.
    #[arg(long, value_name = "NAME=VALUE[,VALUE...]", value_parser = constant, help_heading = "Training")]
    pub constant: Vec<(String, Tensor)>,
}

impl ImportArgs {
    /// Whether any flag was given.
    #[must_use]
    pub fn is_given(&self) -> bool {
        !self.freeze.is_empty()
            || !self.train.is_empty()
            || !self.dim.is_empty()
            || !self.constant.is_empty()
            || self.batch_norm.is_some()
    }
}

/// What BatchNormalization does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BatchNormMode {
    /// What the node's `training_mode` says.
    Model,
    /// Normalise by the batch, and keep running statistics.
    Train,
    /// Normalise by the stored statistics, which stay.
    Frozen,
}

impl BatchNormMode {
    /// The word on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            BatchNormMode::Model => "model",
            BatchNormMode::Train => "train",
            BatchNormMode::Frozen => "frozen",
        }
    }
}

/// Flags of the choice of precision.
#[derive(Debug, Clone, Default, Args)]
pub struct PrecisionArgs {
    /// What layers run in: a set of f32, bf16 and int8 with commas, of which the fastest step is measured that the loss
    /// allows (int8 layer by layer); auto: all three; one alone: throughout; mixed and bf16+int8: int8 where the loss
    /// allows it, else f32 or bf16 [default: auto].
    #[arg(long, value_name = "SET", value_parser = precision(), help_heading = "Precision")]
    pub precision: Option<PrecisionChoice>,
    /// What a layer's score is [default: leave-one-out].
    #[arg(long, value_name = "METRIC", value_parser = metric(), help_heading = "Precision")]
    pub metric: Option<Metric>,
    /// Layers with a score up to this become int8.
    #[arg(long, value_name = "X", value_parser = finite, help_heading = "Precision")]
    pub threshold: Option<f32>,
    /// Channels of an int8 layer with a score above this are not left to one int8 product.
    #[arg(long, value_name = "X", value_parser = finite, help_heading = "Precision")]
    pub channel_threshold: Option<f32>,
    /// What becomes of them: split (a product of higher precision) or multipoint (weights of several int8 points), even
    /// where that measures slower [default: split where it does not].
    #[arg(long, value_name = "POLICY", value_parser = channel_policy(), help_heading = "Precision")]
    pub channel_policy: Option<ChannelPolicy>,
    /// Predicted relative increase of the loss that lower precision may cost [default: 0.01].
    #[arg(long, value_name = "X", value_parser = finite, help_heading = "Precision")]
    pub max_loss_increase: Option<f32>,
    /// Keep layers as they are: f32=PATTERN.
    #[arg(long, value_name = "f32=PATTERN", value_parser = keep, help_heading = "Precision")]
    pub keep: Vec<String>,
    /// Operations of a layer that may be of lower precision: forward, backward, mean (workers exchange 8-bit gradients),
    /// update (the optimizer keeps 8-bit state) [default: forward,backward].
    #[arg(long, value_name = "LIST", value_parser = operations, help_heading = "Precision")]
    pub quantize_ops: Option<Operations>,
    /// off: weights of the layers whose update is of lower precision are kept in bf16 only, rounded at random [default: on].
    #[arg(long, value_name = "on|off", value_parser = on_or_off, help_heading = "Precision")]
    pub master_weights: Option<bool>,
    /// How int8 products are rounded.
    #[command(flatten)]
    pub numerics: NumericsArgs,
    /// Scores that `qcompile sensitivity` wrote, instead of measuring.
    #[arg(long, value_name = "FILE", help_heading = "Precision")]
    pub scores: Option<PathBuf>,
    /// Samples to measure sensitivity and ranges on [default: 256; fewer, but 16, of texts and others
    /// with many predictions].
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Precision")]
    pub samples: Option<usize>,
    /// Quantization-aware training: compute forward as inference on integers does, with ranges that start as measured on
    /// --data and then follow the training.
    #[arg(long, help_heading = "Precision")]
    pub qat: bool,
}

/// Flags of integers whose ranges are known before a step.
#[derive(Debug, Clone, Default, Args)]
pub struct RangedArgs {
    /// What activations are rounded to: uint8 with a zero point, or int8 with zero point 0 [default: uint8].
    #[arg(long, value_name = "TYPE", value_parser = codes(), help_heading = "Integers")]
    pub activations: Option<Codes>,
    /// What weights are rounded to, by a scale for each output channel: int8 or int4 [default: int8].
    #[arg(long, value_name = "TYPE", value_parser = weights, help_heading = "Integers")]
    pub weights: Option<DType>,
    /// Elements of an int4 weight of a matrix product that share a scale, along the axis that is summed over.
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Integers")]
    pub block_size: Option<usize>,
    /// How ranges follow from the samples: min-max, percentile=P (99.99, say), mse or entropy; with --qat also
    /// lsq: scales of activations and weights are learned [default: min-max].
    #[arg(long, value_name = "METHOD", value_parser = calibration, help_heading = "Integers")]
    pub calibration: Option<Method>,
}

impl RangedArgs {
    /// A flag that was given.
    #[must_use]
    pub fn given(&self) -> Option<&'static str> {
        let flags = [
            ("--activations", self.activations.is_some()),
            ("--weights", self.weights.is_some()),
            ("--block-size", self.block_size.is_some()),
            ("--calibration", self.calibration.is_some()),
        ];
        flags.into_iter().find_map(|(flag, given)| given.then_some(flag))
    }
}

/// Flags of how int8 products are rounded.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct NumericsArgs {
    /// How far one scale reaches: the tensor; a row (token, image) of activations and gradients and an output channel of
    /// weights; the tensor, and an output channel of weights [default: channel].
    #[arg(long, value_name = "KIND", value_parser = granularity(), help_heading = "Rounding")]
    pub granularity: Option<Granularity>,
    /// How gradients are rounded to int8 [default: nearest].
    #[arg(long, value_name = "KIND", value_parser = rounding(), help_heading = "Rounding")]
    pub rounding: Option<GradientRounding>,
    /// What the scales of activations and gradients follow: the values of the step, or the largest of the 16 steps before
    /// [default: current].
    #[arg(long, value_name = "KIND", value_parser = scaling(), help_heading = "Rounding")]
    pub scaling: Option<Scaling>,
    /// What int8 stands for, by operand: weight=TYPE,activation=TYPE,gradient=TYPE, of int8, int4, f8e4m3 and f8e5m2
    /// [default: int8].
    #[arg(long, value_name = "LIST", value_parser = operand_types, help_heading = "Rounding")]
    pub operand_types: Option<OperandTypes>,
    /// What the gradient of the weight of an int8 layer runs in; auto: bf16 in a bf16 plan, else f32 [default: auto].
    #[arg(long, value_name = "KIND", value_parser = grad_weight(), help_heading = "Rounding")]
    pub grad_weight: Option<GradWeight>,
}

impl NumericsArgs {
    /// The flags given, the defaults for the others.
    #[must_use]
    pub fn numerics(&self) -> Numerics {
        Numerics {
            types: self.operand_types.unwrap_or_default(),
            granularity: self.granularity.unwrap_or_default(),
            rounding: self.rounding.unwrap_or_default(),
            scaling: self.scaling.unwrap_or_default(),
            grad_weight: self.grad_weight.and_then(GradWeight::dtype),
        }
    }

    /// The flags that are given.
    #[must_use]
    pub fn given(&self) -> [(&'static str, bool); 5] {
        [
            ("--granularity", self.granularity.is_some()),
            ("--rounding", self.rounding.is_some()),
            ("--scaling", self.scaling.is_some()),
            ("--operand-types", self.operand_types.is_some()),
            ("--grad-weight", self.grad_weight.is_some()),
        ]
    }
}

/// What the gradient of a weight may be asked for in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GradWeight {
    /// What the plan has beside int8.
    Auto,
    /// f32.
    F32,
    /// bf16.
    Bf16,
    /// int8.
    Int8,
}

impl GradWeight {
    /// Every word.
    pub const ALL: [GradWeight; 4] =
        [GradWeight::Auto, GradWeight::F32, GradWeight::Bf16, GradWeight::Int8];

    /// The word on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            GradWeight::Auto => "auto",
            GradWeight::F32 => "f32",
            GradWeight::Bf16 => "bf16",
            GradWeight::Int8 => "int8",
        }
    }

    const fn dtype(self) -> Option<DType> {
        match self {
            GradWeight::Auto => None,
            GradWeight::F32 => Some(DType::F32),
            GradWeight::Bf16 => Some(DType::BF16),
            GradWeight::Int8 => Some(DType::I8),
        }
    }
}

/// What a step is given beside its batch.
#[derive(Debug, Clone, Args)]
pub struct RateArgs {
    /// Learning rate.
    #[arg(long, value_name = "X", default_value_t = 0.01, value_parser = not_negative)]
    pub lr: f64,
    /// Momentum of the optimizer `momentum`.
    #[arg(long, value_name = "X", default_value_t = 0.9, value_parser = fraction)]
    pub momentum: f64,
    /// Decay of Adam's mean of gradients.
    #[arg(long, value_name = "X", default_value_t = 0.9, value_parser = fraction)]
    pub beta1: f64,
    /// Decay of Adam's mean of squares.
    #[arg(long, value_name = "X", default_value_t = 0.999, value_parser = fraction)]
    pub beta2: f64,
    /// Adam's term against division by zero.
    #[arg(long, value_name = "X", default_value_t = 1e-8, value_parser = not_negative)]
    pub epsilon: f64,
    /// Weight decay.
    #[arg(long, value_name = "X", default_value_t = 0.0, value_parser = not_negative)]
    pub weight_decay: f64,
    /// Gradients with a larger norm are scaled down to it.
    #[arg(long, value_name = "X", value_parser = above_zero)]
    pub grad_clip_norm: Option<f64>,
    /// How the learning rate goes on: as it is, in steps, or along half a cosine down to 0.
    #[arg(long, value_name = "KIND", value_enum, default_value_t)]
    pub lr_schedule: ScheduleKind,
    /// Epochs between two steps of the step schedule.
    #[arg(long, value_name = "EPOCHS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    pub lr_step_epochs: u64,
    /// Factor of each step of the step schedule.
    #[arg(long, value_name = "X", default_value_t = 0.1, value_parser = not_negative)]
    pub lr_gamma: f64,
    /// Steps in which the learning rate rises linearly from 0.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub warmup_steps: u64,
}

/// How the learning rate goes on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum ScheduleKind {
    /// As it is.
    #[default]
    Constant,
    /// Multiplied at intervals.
    Step,
    /// Half a cosine, down to 0.
    Cosine,
}
