//! What a compile is asked for, with the defaults filled in.

use crate::about::word;
use crate::cli::{BatchNormMode, CompileArgs, ImportArgs, Machine, RangedArgs};
use crate::error::{Error, Result};
use qcompile_ir::{DType, Tensor};
use qcompile_kernels::Tier;
use qcompile_passes::attach_loss::LossKind;
use qcompile_passes::calibrate::Method;
use qcompile_passes::quantize::{
    ChannelPolicy, Codes, Numerics, Operations, PrecisionChoice, WeightScales, Weights,
};
use qcompile_passes::saved;
use qcompile_passes::sensitivity::Metric;
use qcompile_passes::update::Optimizer;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Batch size that is tuned for unless another is given.
pub(crate) const BATCH_SIZE: usize = 32;

/// Options of [`compile`](crate::compile()). `Default` is what `qcompile MODEL.onnx` does.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// The loss; none takes the one that suits the model's first output.
    pub loss: Option<LossKind>,
    /// The optimizer.
    pub optimizer: Optimizer,
    /// The batch size that is tuned and measured for.
    pub batch_size: usize,
    /// Patterns of initializers that are not trained.
    pub freeze: Vec<String>,
    /// Patterns of initializers that are trained; none means all.
    pub train: Vec<String>,
    /// What BatchNormalization does.
    pub batch_norm: BatchNormMode,
    /// Sizes of symbolic dimensions.
    pub dims: BTreeMap<String, usize>,
    /// Shapes of inputs that are not declared, or whose symbolic dimensions all have these sizes.
    pub shapes: BTreeMap<String, Vec<usize>>,
    /// Values of inputs that are the same in every step: they become constants.
    pub constants: BTreeMap<String, Tensor>,
    /// Whether batch statistics are those of all workers' samples.
    pub sync_batch_norm: bool,
    /// How precision is chosen.
    pub precision: PrecisionChoice,
    /// What a score is.
    pub metric: Metric,
    /// Layers with a score up to this become int8.
    pub threshold: Option<f32>,
    /// Channels with a score above this are not left to one int8 product.
    pub channel_threshold: Option<f32>,
    /// What becomes of them; none splits where that does not measure slower.
    pub channel_policy: Option<ChannelPolicy>,
    /// Predicted relative increase of the loss that lower precision may cost.
    pub max_loss_increase: f32,
    /// Patterns of layers that stay f32.
    pub keep_f32: Vec<String>,
    /// Operations of a layer that may be of lower precision.
    pub operations: Operations,
    /// Whether the forward pass computes with values rounded within ranges that are states.
    pub qat: bool,
    /// What activations with ranges are rounded to.
    pub activations: Codes,
    /// What the weights beside them are rounded to.
    pub weights: Weights,
    /// How ranges are chosen.
    pub calibration: Method,
    /// Whether the weights of layers whose update is of lower precision are kept in f32, else in bf16.
    pub master_weights: bool,
    /// How values are saved for the backward pass; of several rules that match, the last counts.
    pub saved: Vec<saved::Rule>,
    /// Bytes that the memory of a step may take, at the batch size.
    pub memory_limit: Option<usize>,
    /// How quantized products are rounded.
    pub numerics: Numerics,
    /// Scores to be read instead of measured.
    pub scores: Option<PathBuf>,
    /// The text of `--data`.
    pub data: Option<String>,
    /// Samples that sensitivity and ranges are measured on; none: as many as are enough.
    pub samples: Option<usize>,
    /// Threads of measurements; 0 takes every core.
    pub threads: usize,
    /// Instruction set; none takes the best.
    pub tier: Option<Tier>,
    /// File that keeps measured times of layers, so that equal input gives equal plans; none measures anew.
    pub timings: Option<PathBuf>,
    /// Whether [`compile`](crate::compile()) measures the time of the whole step, for its summary.
    pub measure: bool,
    /// Whether layers that measure no faster in int8 are kept from it, whatever the choice of precision.
    pub measure_layers: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            loss: None,
            optimizer: Optimizer::Momentum { nesterov: false },
            batch_size: BATCH_SIZE,
            freeze: Vec::new(),
            train: Vec::new(),
            batch_norm: BatchNormMode::Model,
            dims: BTreeMap::new(),
            shapes: BTreeMap::new(),
            constants: BTreeMap::new(),
            sync_batch_norm: false,
            precision: PrecisionChoice::Auto,
            metric: Metric::default(),
            threshold: None,
            channel_threshold: None,
            channel_policy: None,
            max_loss_increase: 0.01,
            keep_f32: Vec::new(),
            operations: Operations::default(),
            qat: false,
            activations: Codes::default(),
            weights: Weights { dtype: DType::I8, scales: WeightScales::Channel },
            calibration: Method::default(),
            master_weights: true,
            saved: Vec::new(),
            memory_limit: None,
            numerics: Numerics::default(),
            scores: None,
            data: None,
            samples: None,
            threads: 0,
            tier: None,
            timings: None,
            measure: false,
            measure_layers: false,
        }
    }
}

impl Options {
    /// The flags given, the defaults for the others.
    #[must_use]
    pub fn from_args(args: &CompileArgs, machine: &Machine) -> Options {
        let standard = Options::default();
        let precision = &args.precision;
        let qat = precision.qat;
        // What is trained is what runs in inference: the forward pass.
        let forward = Operations { backward: false, ..standard.operations };
        let (choice, operations) = if qat {
            (PrecisionChoice::Int8, forward)
        } else {
            (standard.precision, standard.operations)
        };
        Options {
            qat,
            loss: args.loss,
            optimizer: args.optimizer.unwrap_or(standard.optimizer),
            batch_size: args.batch_size.unwrap_or(standard.batch_size),
            sync_batch_norm: args.sync_batch_norm,
            precision: precision.precision.unwrap_or(choice),
            metric: precision.metric.unwrap_or(standard.metric),
            threshold: precision.threshold,
            channel_threshold: precision.channel_threshold,
            channel_policy: precision.channel_policy,
            max_loss_increase: precision.max_loss_increase.unwrap_or(standard.max_loss_increase),
            keep_f32: precision.keep.clone(),
            operations: precision.quantize_ops.unwrap_or(operations),
            master_weights: precision.master_weights.unwrap_or(standard.master_weights),
            saved: args.compress.clone(),
            memory_limit: args.memory_limit,
            numerics: precision.numerics.numerics(),
            scores: precision.scores.clone(),
            samples: precision.samples,
            threads: machine.threads,
            tier: machine.tier,
            ..standard
        }
        .with_import(&args.import)
        .with_ranged(&args.ranged)
    }

    /// With the flags of the import.
    #[must_use]
    pub fn with_import(self, args: &ImportArgs) -> Options {
        Options {
            freeze: args.freeze.clone(),
            train: args.train.clone(),
            batch_norm: args.batch_norm.unwrap_or(self.batch_norm),
            dims: args.dim.iter().cloned().collect(),
            constants: args.constant.iter().cloned().collect(),
            ..self
        }
    }

    /// With these flags of integers with ranges.
    #[must_use]
    pub fn with_ranged(self, args: &RangedArgs) -> Options {
        let dtype = args.weights.unwrap_or(self.weights.dtype);
        Options {
            activations: args.activations.unwrap_or(self.activations),
            weights: Weights {
                dtype,
                scales: args.block_size.map_or(self.weights.scales, WeightScales::Block),
            },
            calibration: args.calibration.unwrap_or(self.calibration),
            ..self
        }
    }

    /// With this `--data`.
    #[must_use]
    pub fn with_data(self, data: Option<String>) -> Options {
        Options { data, ..self }
    }

    /// Whether the options go together.
    ///
    /// # Errors
    /// A usage error that names those that do not.
    pub fn check(&self) -> Result<()> {
        let block = matches!(self.weights.scales, WeightScales::Block(_));
        if block && self.weights.dtype != DType::I4 {
            return Err(Error::usage("--block-size is for --weights int4"));
        }
        if self.qat {
            self.check_qat()?;
        } else if self.calibration == Method::Lsq {
            return Err(Error::usage(
                "--calibration lsq learns scales in training: it is for --qat",
            )
            .help("min-max, percentile=P, mse and entropy find ranges without training"));
        }
        let thresholds =
            [("--threshold", self.threshold), ("--channel-threshold", self.channel_threshold)];
        if !self.master_weights && !self.operations.update {
            return Err(Error::usage(
                "--master-weights off is for layers whose update is of lower precision, and --quantize-ops does not name update",
            ));
        }
        if self.master_weights && self.operations.update && self.optimizer == Optimizer::Sgd {
            return Err(Error::usage("--quantize-ops update: the optimizer sgd keeps no state")
                .help("--master-weights off updates weights in bf16; momentum, nesterov, adam and adamw have 8-bit state"));
        }
        if let Some(policy) = self.channel_policy.filter(|_| self.channel_threshold.is_none()) {
            return Err(Error::usage(format!(
                "--channel-policy {} says what becomes of channels above --channel-threshold, which is not given",
                policy.name()
            )));
        }
        let twice =
            self.saved.iter().enumerate().find(|(at, rule)| {
                self.saved[..*at].iter().any(|other| other.pattern == rule.pattern)
            });
        if let Some((_, rule)) = twice {
            return Err(Error::usage(format!(
                "--compress {rule}: the same values have another rule"
            )));
        }
        let given = thresholds.into_iter().filter(|(_, value)| value.is_some());
        let numerics = numerics_said(&self.numerics);
        let flags = given.map(|(flag, _)| flag.to_owned());
        let mut flags = flags.chain(numerics.into_iter().map(|(flag, _)| format!("--{flag}")));
        match flags.next() {
            Some(flag) if !self.precision.has_int8() => Err(Error::usage(format!(
                "{flag} is about what becomes int8, and --precision {} leaves int8 out",
                self.precision.name()
            ))),
            _ => Ok(()),
        }
    }

    fn check_qat(&self) -> Result<()> {
        if !matches!(self.precision, PrecisionChoice::Int8 | PrecisionChoice::Mixed) {
            return Err(Error::usage(format!(
                "--qat trains with roundings, whatever their speed, and --precision {} is another choice",
                self.precision.name()
            ))
            .help("--precision int8 takes every layer, mixed those whose score allows it"));
        }
        if !self.operations.forward {
            return Err(Error::usage(
                "--qat rounds in the forward pass, and --quantize-ops leaves it out",
            ));
        }
        if self.operations.backward && self.weights.dtype == DType::I4 {
            return Err(Error::usage(
                "the backward pass of int4 weights is f32: leave it out of --quantize-ops",
            ));
        }
        if let Some((flag, _)) = numerics_said(&self.numerics).first() {
            return Err(Error::usage(format!(
                "--{flag} is about scales that follow a step, and --qat computes with ranges"
            ))
            .help("--activations and --weights say what is rounded to what"));
        }
        if self.channel_threshold.is_some() {
            return Err(Error::usage("--channel-threshold splits layers, and --qat does not"));
        }
        Ok(())
    }

    /// What a plan says of the options that made it what it is, by the names of their flags.
    #[must_use]
    pub fn said(&self) -> BTreeMap<String, String> {
        let mut said = BTreeMap::new();
        let mut say = |flag: &str, value: String| said.insert(flag.to_owned(), value);
        say("precision", self.precision.name().to_owned());
        say("metric", self.metric.name().to_owned());
        say("max-loss-increase", self.max_loss_increase.to_string());
        say("batch-norm", self.batch_norm.name().to_owned());
        say("sync-batch-norm", self.sync_batch_norm.to_string());
        let operations = &self.operations;
        let words = [
            (operations.forward, "forward"),
            (operations.backward, "backward"),
            (operations.mean, "mean"),
            (operations.update, "update"),
        ];
        let words: Vec<&str> =
            words.iter().filter(|(chosen, _)| *chosen).map(|(_, word)| *word).collect();
        say("quantize-ops", words.join(","));
        if self.qat {
            say("qat", "true".to_owned());
            say("activations", self.activations.name().to_owned());
            say(
                "weights",
                if self.weights.dtype == DType::I4 { "int4" } else { "int8" }.to_owned(),
            );
            if let WeightScales::Block(block) = self.weights.scales {
                say("block-size", block.to_string());
            }
            say("calibration", self.calibration.to_string());
        }
        if !self.master_weights {
            say("master-weights", "off".to_owned());
        }
        let thresholds =
            [("threshold", self.threshold), ("channel-threshold", self.channel_threshold)];
        for (flag, value) in thresholds {
            if let Some(value) = value {
                say(flag, value.to_string());
            }
        }
        if let Some(policy) = self.channel_policy {
            say("channel-policy", policy.name().to_owned());
        }
        for (flag, value) in numerics_said(&self.numerics) {
            say(flag, value);
        }
        let dims = self.dims.iter().map(|(name, size)| format!("{name}={size}"));
        let text = |tensor: &Tensor| tensor.to_f64().iter().map(f64::to_string).collect::<Vec<_>>();
        let constants =
            self.constants.iter().map(|(name, value)| format!("{name}={}", text(value).join(",")));
        let compress = self.saved.iter().map(ToString::to_string);
        let lists = [
            ("compress", compress.collect()),
            ("freeze", self.freeze.clone()),
            ("train", self.train.clone()),
            ("keep", self.keep_f32.clone()),
            ("dim", dims.collect()),
            ("constant", constants.collect()),
        ];
        for (flag, values) in lists {
            if !values.is_empty() {
                say(flag, values.join(","));
            }
        }
        said
    }

    /// Whether layers have to be scored: not where precision is fixed and channels are not looked at.
    #[must_use]
    pub fn needs_scores(&self) -> bool {
        match self.precision {
            PrecisionChoice::Int8 => self.channel_threshold.is_some(),
            choice => choice.has_int8(),
        }
    }

    /// Whether a threshold says what becomes int8.
    #[must_use]
    pub fn has_threshold(&self) -> bool {
        self.threshold.is_some() || self.channel_threshold.is_some()
    }
}

/// What of the ways to round is not the default, by the names of the flags.
fn numerics_said(numerics: &Numerics) -> Vec<(&'static str, String)> {
    let usual = Numerics::default();
    let Numerics { types, granularity, rounding, scaling, grad_weight } = *numerics;
    let all = [
        ("operand-types", types != usual.types, types.text()),
        ("granularity", granularity != usual.granularity, granularity.name().to_owned()),
        ("rounding", rounding != usual.rounding, rounding.name().to_owned()),
        ("scaling", scaling != usual.scaling, scaling.name().to_owned()),
        ("grad-weight", grad_weight.is_some(), grad_weight.map_or_else(String::new, word)),
    ];
    all.into_iter().filter(|(_, other, _)| *other).map(|(flag, _, text)| (flag, text)).collect()
}
