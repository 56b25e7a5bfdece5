//! The commands and their flags.

use super::args::{CompileArgs, Emit, ImportArgs, RangedArgs, RateArgs};
use super::words::{above_zero, keep, loss, metric, opset, pass, positive, run_precision};
use super::{Machine, Talk};
use clap::{Args, ValueEnum};
use qcompile_passes::attach_loss::LossKind;
use qcompile_passes::quantize::PrecisionChoice;
use qcompile_passes::sensitivity::Metric;
use std::path::PathBuf;

/// `qcompile MODEL.onnx`.
#[derive(Debug, Args)]
pub struct CompileCommand {
    /// The model: .onnx, or a .qir graph to go on from.
    #[arg(required = true)]
    pub model: Option<PathBuf>,
    /// Where the result goes [default: MODEL.qplan beside the model's name, in this folder].
    #[arg(short, long, value_name = "FILE", help_heading = "Output")]
    pub output: Option<PathBuf>,
    /// How to compile.
    #[command(flatten)]
    pub compile: CompileArgs,
    /// Samples to measure sensitivity on: FILE or NAME=FILE, several with commas.
    #[arg(long, value_name = "DATA", help_heading = "Precision")]
    pub data: Option<String>,
    /// Stop after this pass and write the graph (.qir) to --output, or stdout.
    #[arg(long, value_name = "PASS", value_parser = pass(false), help_heading = "Passes")]
    pub stop_after: Option<String>,
    /// Write the graph after this pass, or after all of them, into --dump-dir.
    #[arg(long, value_name = "PASS", value_parser = pass(true), help_heading = "Passes")]
    pub dump_after: Vec<String>,
    /// Folder for --dump-after.
    #[arg(long, value_name = "DIR", default_value = ".", help_heading = "Passes")]
    pub dump_dir: PathBuf,
    /// What is written to --output; texts go to stdout without it.
    #[arg(long, value_name = "FORM", value_enum, default_value_t, help_heading = "Output")]
    pub emit: Emit,
    /// Say how long each pass takes.
    #[arg(long, help_heading = "Passes")]
    pub time_passes: bool,
    /// Do not measure step times for the summary.
    #[arg(long, help_heading = "Output")]
    pub no_measure: bool,
    /// Where to run what has to be measured.
    #[command(flatten)]
    pub machine: Machine,
    /// How much is said.
    #[command(flatten)]
    pub talk: Talk,
}

/// `qcompile run`.
#[derive(Debug, Args)]
pub struct RunCommand {
    /// The model (.onnx, .qir) or plan (.qplan).
    pub target: PathBuf,
    /// Arrays by ONNX input name, exactly as the model takes them (npz).
    #[arg(long, value_name = "NPZ")]
    pub inputs: PathBuf,
    /// Where the outputs go, by ONNX output name (npz).
    #[arg(long, value_name = "NPZ", required_unless_present = "gradients")]
    pub outputs: Option<PathBuf>,
    /// Where `loss` and the gradients go, by initializer name (npz); --inputs then also holds `label`.
    #[arg(long, value_name = "NPZ", conflicts_with = "outputs", requires = "loss")]
    pub gradients: Option<PathBuf>,
    /// The loss for --gradients.
    #[arg(long, value_name = "KIND", value_parser = loss(), requires = "gradients")]
    pub loss: Option<LossKind>,
    /// Precision of the layers [default: f32 for a model, a plan's own for a plan].
    #[arg(long, value_name = "KIND", value_parser = run_precision())]
    pub precision: Option<PrecisionChoice>,
    /// The import.
    #[command(flatten)]
    pub import: ImportArgs,
    /// On what it runs.
    #[command(flatten)]
    pub machine: Machine,
    /// How much is said.
    #[command(flatten)]
    pub talk: Talk,
}

/// `qcompile train`.
#[derive(Debug, Args)]
pub struct TrainCommand {
    /// The plan (.qplan), or a model (.onnx) that is compiled first.
    pub target: PathBuf,
    /// Samples to train on: FILE or NAME=FILE, several with commas.
    #[arg(long, value_name = "DATA")]
    pub data: String,
    /// Samples to evaluate on after every epoch.
    #[arg(long, value_name = "DATA")]
    pub eval: Option<String>,
    /// Passes over the data.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub epochs: u64,
    /// Compile flags, for a model.
    #[command(flatten)]
    pub compile: CompileArgs,
    /// Rate, schedule and moments.
    #[command(flatten)]
    pub rate: RateArgs,
    /// Seed of the order of samples and of what the model draws.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Take samples in the order of the data.
    #[arg(long)]
    pub no_shuffle: bool,
    /// Leave out a last batch that is shorter than the others.
    #[arg(long)]
    pub drop_last: bool,
    /// Write a line for every N-th step.
    #[arg(long, value_name = "N", value_parser = positive)]
    pub log_every: Option<usize>,
    /// Workers that share each batch, with an all-reduce of the gradients between them.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = positive)]
    pub workers: usize,
    /// Folder that gets the plan and, after every epoch, the state of training.
    #[arg(long, value_name = "DIR")]
    pub checkpoint: Option<PathBuf>,
    /// Where the trained plan goes [default: TARGET.trained.qplan in this folder, unless --checkpoint is given].
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Go on from the state in --checkpoint.
    #[arg(long, requires = "checkpoint")]
    pub resume: bool,
    /// On what it runs.
    #[command(flatten)]
    pub machine: Machine,
    /// How much is said.
    #[command(flatten)]
    pub talk: Talk,
}

/// `qcompile eval`.
#[derive(Debug, Args)]
pub struct EvalCommand {
    /// The plan (.qplan), or the folder that `train --checkpoint` wrote.
    pub target: PathBuf,
    /// Samples to evaluate on.
    #[arg(long, value_name = "DATA")]
    pub data: String,
    /// Another plan or checkpoint to compare with.
    #[arg(long, value_name = "PLAN")]
    pub baseline: Option<PathBuf>,
    /// Samples at once [default: the plan's].
    #[arg(long, value_name = "N", value_parser = positive)]
    pub batch_size: Option<usize>,
    /// On what it runs.
    #[command(flatten)]
    pub machine: Machine,
    /// How much is said.
    #[command(flatten)]
    pub talk: Talk,
}

/// `qcompile sensitivity`.
#[derive(Debug, Args)]
pub struct SensitivityCommand {
    /// The model (.onnx).
    pub model: PathBuf,
    /// Samples to measure on; synthetic ones without.
    #[arg(long, value_name = "DATA")]
    pub data: Option<String>,
    /// What a score is [default: leave-one-out].
    #[arg(long, value_name = "METRIC", value_parser = metric())]
    pub metric: Option<Metric>,
    /// Where the scores go (JSON).
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// The loss; by default taken from the model's first output.
    #[arg(long, value_name = "KIND", value_parser = loss())]
    pub loss: Option<LossKind>,
    /// Samples at once [default: 32].
    #[arg(long, value_name = "N", value_parser = positive)]
    pub batch_size: Option<usize>,
    /// Samples to measure on [default: 256; fewer, but 16, of those with many predictions].
    #[arg(long, value_name = "N", value_parser = positive)]
    pub samples: Option<usize>,
    /// The import.
    #[command(flatten)]
    pub import: ImportArgs,
    /// On what it runs.
    #[command(flatten)]
    pub machine: Machine,
    /// How much is said.
    #[command(flatten)]
    pub talk: Talk,
}

/// `qcompile inspect`.
#[derive(Debug, Args)]
pub struct InspectCommand {
    /// A model (.onnx), graph (.qir), plan (.qplan) or checkpoint.
    pub file: PathBuf,
    /// List every node (of a plan: every step).
    #[arg(long)]
    pub nodes: bool,
    /// Of a model: whether each node can be imported, differentiated and quantized, and why not.
    #[arg(long, conflicts_with = "nodes")]
    pub capability: bool,
    /// The import.
    #[command(flatten)]
    pub import: ImportArgs,
    /// How much is said.
    #[command(flatten)]
    pub talk: Talk,
}

/// `qcompile bench`.
#[derive(Debug, Args)]
pub struct BenchCommand {
    /// The plan (.qplan).
    pub plan: PathBuf,
    /// Another plan, measured in turns with the first.
    #[arg(long, value_name = "PLAN")]
    pub against: Option<PathBuf>,
    /// Samples in a step [default: the plan's].
    #[arg(long, value_name = "N", value_parser = positive)]
    pub batch_size: Option<usize>,
    /// Seconds to measure.
    #[arg(long, value_name = "SECONDS", default_value_t = 2.0, value_parser = above_zero)]
    pub duration: f64,
    /// Measure every kernel of the plan alone, too.
    #[arg(long)]
    pub profile: bool,
    /// On what it runs.
    #[command(flatten)]
    pub machine: Machine,
    /// How much is said.
    #[command(flatten)]
    pub talk: Talk,
}

/// `qcompile export`.
#[derive(Debug, Args)]
pub struct ExportCommand {
    /// The plan (.qplan), the folder that `train --checkpoint` wrote, or a model (.onnx, .qir).
    pub target: PathBuf,
    /// What is written [default: by the ending of --output].
    #[arg(long, value_name = "FORMAT", value_enum)]
    pub format: Option<ExportFormat>,
    /// Where it goes.
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    /// The opset of an ONNX model, 13 to 23 [default: 17; 21 with int4].
    #[arg(long, value_name = "VERSION", value_parser = opset)]
    pub opset: Option<u32>,
    /// For qdq-onnx: samples that ranges are measured on: FILE or NAME=FILE, several with commas.
    #[arg(long, value_name = "DATA", help_heading = "Integers")]
    pub data: Option<String>,
    /// Samples to take of them [default: 256; fewer, but 16, of those with many predictions].
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Integers")]
    pub samples: Option<usize>,
    /// Samples at once [default: 32].
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Integers")]
    pub batch_size: Option<usize>,
    /// For qdq-onnx: layers that stay f32: f32=PATTERN.
    #[arg(long, value_name = "f32=PATTERN", value_parser = keep, help_heading = "Integers")]
    pub keep: Vec<String>,
    /// What is rounded to what.
    #[command(flatten)]
    pub ranged: RangedArgs,
    /// The import.
    #[command(flatten)]
    pub import: ImportArgs,
    /// On what ranges are measured.
    #[command(flatten)]
    pub machine: Machine,
    /// How much is said.
    #[command(flatten)]
    pub talk: Talk,
}

/// What `qcompile export` writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExportFormat {
    /// The model with its trained weights.
    Onnx,
    /// That, computing on integers: with QuantizeLinear and DequantizeLinear.
    QdqOnnx,
    /// Parameters and running statistics by their ONNX names.
    Safetensors,
    /// The same for numpy.
    Npz,
}

impl ExportFormat {
    /// The word on the command line, which is the ending of such files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            ExportFormat::Onnx => "onnx",
            ExportFormat::QdqOnnx => "qdq-onnx",
            ExportFormat::Safetensors => "safetensors",
            ExportFormat::Npz => "npz",
        }
    }
}

/// `qcompile doctor`.
#[derive(Debug, Args)]
pub struct DoctorCommand {
    /// How much is said.
    #[command(flatten)]
    pub talk: Talk,
}

/// `qcompile completions`.
#[derive(Debug, Args)]
pub struct CompletionsCommand {
    /// The shell.
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}
