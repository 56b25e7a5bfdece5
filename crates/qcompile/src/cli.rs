//! The command line: what can be said, as clap reads it.

use crate::options::Options;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use qcompile_kernels::Tier;
use qcompile_passes::attach_loss::LossKind;
use qcompile_passes::quantize::{Operations, PrecisionChoice};
use qcompile_passes::sensitivity::Metric;
use qcompile_passes::update::Optimizer;
use std::path::PathBuf;

/// Compiles an ONNX model into a mixed-precision training plan, and runs it.
///
/// `qcompile MODEL.onnx` compiles; the commands below use what it wrote.
#[derive(Debug, Parser)]
#[command(
    name = "qcompile",
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    arg_required_else_help = true,
    max_term_width = 100
)]
pub struct Cli {
    /// What to do, if not to compile.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Compiling.
    #[command(flatten)]
    pub compile: CompileCommand,
}

/// Everything but compiling.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a model forward, or forward and backward without an update.
    Run(RunCommand),
    /// Train a plan (or a model, which is compiled first).
    Train(Box<TrainCommand>),
    /// Measure loss and accuracy on data.
    Eval(EvalCommand),
    /// Score layers by what int8 does to them.
    Sensitivity(SensitivityCommand),
    /// Show what a model, graph, plan or checkpoint holds.
    Inspect(InspectCommand),
    /// Measure the time of a training step.
    Bench(BenchCommand),
    /// Show what this machine offers, and check that it computes correctly.
    Doctor(DoctorCommand),
    /// Write shell completions to stdout.
    Completions(CompletionsCommand),
}

/// How much is said.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct Talk {
    /// Write one JSON document (train: one object a line) to stdout.
    #[arg(long, help_heading = "Output")]
    pub json: bool,
    /// Say less: only the answer.
    #[arg(short, long, help_heading = "Output")]
    pub quiet: bool,
    /// Say more.
    #[arg(short, long, action = ArgAction::Count, conflicts_with = "quiet", help_heading = "Output")]
    pub verbose: u8,
}

/// On what it runs.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct Machine {
    /// Threads in all; 0 takes every core.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, help_heading = "Machine")]
    pub threads: usize,
    /// Instruction set of the kernels; by default the best that this CPU has.
    #[arg(long, value_name = "TIER", value_parser = tier(), help_heading = "Machine")]
    pub tier: Option<Tier>,
}

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
    /// The batch size that is tuned and measured for; any batch runs [default: 32].
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Training")]
    pub batch_size: Option<usize>,
}

/// Flags of the import.
#[derive(Debug, Clone, Default, Args)]
pub struct ImportArgs {
    /// Do not train initializers that match (`*` and `?`; `op:Conv` for all of an operator).
    #[arg(long, value_name = "PATTERN", help_heading = "Training")]
    pub freeze: Vec<String>,
    /// Train only initializers that match.
    #[arg(long, value_name = "PATTERN", help_heading = "Training")]
    pub train: Vec<String>,
    /// What BatchNormalization does [default: model].
    #[arg(long, value_name = "MODE", value_enum, help_heading = "Training")]
    pub batch_norm: Option<BatchNormMode>,
    /// Size of a symbolic dimension.
    #[arg(long, value_name = "NAME=VALUE", value_parser = dim, help_heading = "Training")]
    pub dim: Vec<(String, usize)>,
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
    /// auto: int8 where it measures faster and the loss allows it; f32; int8; mixed: int8 where the loss allows it;
    /// or the set to choose from, as in f32,int8 [default: auto].
    #[arg(long, value_name = "KIND", value_parser = precision(), help_heading = "Precision")]
    pub precision: Option<PrecisionChoice>,
    /// What a layer's score is [default: leave-one-out].
    #[arg(long, value_name = "METRIC", value_parser = metric(), help_heading = "Precision")]
    pub metric: Option<Metric>,
    /// Layers with a score up to this become int8.
    #[arg(long, value_name = "X", value_parser = finite, help_heading = "Precision")]
    pub threshold: Option<f32>,
    /// Output channels with a score above this stay f32.
    #[arg(long, value_name = "X", value_parser = finite, help_heading = "Precision")]
    pub channel_threshold: Option<f32>,
    /// Sum of predicted relative loss increases that int8 may cost [default: 0.01].
    #[arg(long, value_name = "X", value_parser = finite, help_heading = "Precision")]
    pub max_loss_increase: Option<f32>,
    /// Keep layers as they are: f32=PATTERN.
    #[arg(long, value_name = "f32=PATTERN", value_parser = keep, help_heading = "Precision")]
    pub keep: Vec<String>,
    /// Operations of a layer that may be int8: forward, backward [default: forward,backward].
    #[arg(long, value_name = "LIST", value_parser = operations, help_heading = "Precision")]
    pub quantize_ops: Option<Operations>,
    /// Scores that `qcompile sensitivity` wrote, instead of measuring.
    #[arg(long, value_name = "FILE", help_heading = "Precision")]
    pub scores: Option<PathBuf>,
    /// Samples to measure sensitivity on [default: 256].
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Precision")]
    pub samples: Option<usize>,
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
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub epochs: u64,
    /// Compile flags, for a model.
    #[command(flatten)]
    pub compile: CompileArgs,
    /// Rate, schedule and moments.
    #[command(flatten)]
    pub rate: RateArgs,
    /// Seed of the order of samples.
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
    /// Samples to measure on [default: 256].
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
    /// On what it runs.
    #[command(flatten)]
    pub machine: Machine,
    /// How much is said.
    #[command(flatten)]
    pub talk: Talk,
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

/// A parser of the words of `all`.
fn words<T: Clone + Send + Sync + 'static>(
    all: &'static [T],
    name: impl Fn(&T) -> &'static str + Clone + Send + Sync + 'static,
) -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(all.iter().map(&name)).try_map(move |word| {
        let found = all.iter().find(|value| name(value) == word).cloned();
        found.ok_or_else(|| format!("`{word}` is not known"))
    })
}

fn loss() -> impl TypedValueParser<Value = LossKind> {
    words(&LossKind::ALL, |kind| kind.name())
}

fn optimizer() -> impl TypedValueParser<Value = Optimizer> {
    words(&Optimizer::ALL, |kind| kind.name())
}

fn metric() -> impl TypedValueParser<Value = Metric> {
    words(&Metric::ALL, |kind| kind.name())
}

/// The sets of precisions are other words for single choices: from f32 and int8, `auto` chooses.
fn precision() -> impl TypedValueParser<Value = PrecisionChoice> {
    let word = |choice: PrecisionChoice| match choice {
        PrecisionChoice::Auto => PossibleValue::new("auto").aliases(["f32,int8", "int8,f32"]),
        other => PossibleValue::new(other.name()),
    };
    PossibleValuesParser::new(PrecisionChoice::ALL.map(word))
        .map(|word| word.parse().unwrap_or(PrecisionChoice::Auto))
}

fn run_precision() -> impl TypedValueParser<Value = PrecisionChoice> {
    words(&[PrecisionChoice::F32, PrecisionChoice::Int8], |choice| choice.name())
}

fn tier() -> impl TypedValueParser<Value = Tier> {
    words(&Tier::ALL, |tier| tier_name(*tier))
}

/// The word for a tier on the command line.
#[must_use]
pub const fn tier_name(tier: Tier) -> &'static str {
    match tier {
        Tier::Portable => "portable",
        Tier::Avx2 => "avx2",
        Tier::Avx512 => "avx512",
    }
}

fn pass(all: bool) -> PossibleValuesParser {
    let names = crate::street::Pass::ALL.iter().map(|pass| pass.name());
    PossibleValuesParser::new(names.chain(all.then_some("all")))
}

fn positive(text: &str) -> Result<usize, String> {
    let number = text.parse::<usize>().ok().filter(|number| (1..=1 << 24).contains(number));
    number.ok_or_else(|| "a whole number from 1 is wanted".to_owned())
}

fn real(text: &str, fits: impl Fn(f64) -> bool, wanted: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|number| number.is_finite() && fits(*number));
    number.ok_or_else(|| format!("{wanted} is wanted"))
}

fn not_negative(text: &str) -> Result<f64, String> {
    real(text, |x| x >= 0.0, "a number from 0")
}

fn above_zero(text: &str) -> Result<f64, String> {
    real(text, |x| x > 0.0, "a number above 0")
}

fn fraction(text: &str) -> Result<f64, String> {
    real(text, |x| (0.0..1.0).contains(&x), "a number from 0, below 1")
}

#[allow(clippy::cast_possible_truncation, reason = "scores are f32")]
fn finite(text: &str) -> Result<f32, String> {
    real(text, |x| x.abs() <= f64::from(f32::MAX), "a number").map(|x| x as f32)
}

fn dim(text: &str) -> Result<(String, usize), String> {
    let (name, size) = text.rsplit_once('=').ok_or("NAME=VALUE is wanted")?;
    if name.is_empty() {
        return Err("NAME=VALUE is wanted".to_owned());
    }
    Ok((name.to_owned(), positive(size)?))
}

fn keep(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some(("f32", pattern)) if !pattern.is_empty() => Ok(pattern.to_owned()),
        _ => Err("f32=PATTERN is wanted".to_owned()),
    }
}

fn operations(text: &str) -> Result<Operations, String> {
    let operations: Operations = text.parse()?;
    if operations.mean || operations.update {
        return Err("forward and backward can be quantized, mean and update cannot".to_owned());
    }
    Ok(operations)
}

impl Cli {
    /// Options of the compile that the flags ask for.
    #[must_use]
    pub fn options(&self) -> Options {
        let command = &self.compile;
        Options::from_args(&command.compile, &command.machine)
            .with_data(command.data.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn refused(line: &str) -> i32 {
        Cli::try_parse_from(line.split(' ')).expect_err(line).exit_code()
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn compiles_without_a_subcommand() {
        let line = "qcompile m.onnx -o m.qplan --precision f32,int8 --keep f32=fc* --dim t=4";
        let cli = Cli::try_parse_from(line.split(' ')).expect("a compile");
        assert!(cli.command.is_none());
        let options = cli.options();
        assert_eq!(options.keep_f32, ["fc*"]);
        assert_eq!(options.dims["t"], 4);
    }

    #[test]
    fn wrong_words_are_usage_errors() {
        for line in [
            "qcompile m.onnx --precision bf16",
            "qcompile m.onnx --loss huber",
            "qcompile m.onnx --levels 3",
            "qcompile m.onnx --dim n",
            "qcompile m.onnx --quantize-ops mean",
            "qcompile run m.onnx --inputs a.npz",
            "qcompile run m.onnx --inputs a.npz --gradients g.npz",
            "qcompile train m.qplan",
            "qcompile train m.qplan --data d --lr nan",
            "qcompile train m.qplan --data d --resume",
            "qcompile explain x",
        ] {
            assert_eq!(refused(line), 2, "{line}");
        }
        assert_eq!(refused("qcompile --help"), 0);
    }
}
