//! The command line: what can be said, as clap reads it.

mod args;
mod commands;
mod words;

pub use args::{
    BatchNormMode, CompileArgs, Emit, ImportArgs, PrecisionArgs, RangedArgs, RateArgs, ScheduleKind,
};
pub use commands::{
    BenchCommand, CompileCommand, CompletionsCommand, DoctorCommand, EvalCommand, ExportCommand,
    ExportFormat, InspectCommand, RunCommand, SensitivityCommand, TrainCommand,
};

use crate::options::Options;
use clap::{ArgAction, Args, Parser, Subcommand};
use qcompile_kernels::Tier;

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
    /// Write the model with its trained weights, or the weights alone.
    Export(ExportCommand),
    /// Measure the time of a training step.
    Bench(BenchCommand),
    /// Show what this machine offers, whether it computes correctly, and how fast.
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
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        hide_default_value = true,
        help_heading = "Machine"
    )]
    pub threads: usize,
    /// Instruction set of the kernels; by default the best that this CPU has.
    #[arg(long, value_name = "TIER", value_parser = words::tier(), help_heading = "Machine")]
    pub tier: Option<Tier>,
}

impl Cli {
    /// Options of the compile that the flags ask for.
    #[must_use]
    pub fn options(&self) -> Options {
        let command = &self.compile;
        Options::from_args(&command.compile, &command.machine).with_data(command.data.clone())
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
            "qcompile m.onnx --precision fp4",
            "qcompile m.onnx --loss huber",
            "qcompile m.onnx --levels 3",
            "qcompile m.onnx --dim n",
            "qcompile m.onnx --quantize-ops mean,mean",
            "qcompile m.onnx --master-weights never",
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
