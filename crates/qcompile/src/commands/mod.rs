//! The commands: each reads its files, does its work through the library, and answers on stdout.

mod bench;
mod capability;
mod compile;
mod doctor;
mod eval;
mod export;
mod inspect;
mod run;
mod sensitivity;
mod train;

use crate::cli::{Cli, Command, Machine, Talk};
use crate::error::{Code, Error, Result};
use crate::output::print;
use crate::terminal::{Show, say, say_verb};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use qcompile_runtime::TrainerOptions;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// What the process `qcompile` does, to its exit status. No panic gets out.
#[must_use]
pub fn main() -> ExitCode {
    std::panic::set_hook(Box::new(|panic| {
        let error = Error::new(Code::Internal, panic.to_string())
            .help("this is a bug of qcompile: please report it with the command and the model");
        say(&error.to_string());
    }));
    match catch_unwind(AssertUnwindSafe(act)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            say(&error.to_string());
            ExitCode::from(error.exit().status())
        }
        Err(_) => ExitCode::from(Code::Internal.exit().status()),
    }
}

fn act() -> Result<()> {
    match Cli::try_parse() {
        Ok(cli) => run(cli),
        Err(error) if error.use_stderr() => Err(wrong_usage(&error)),
        Err(help) => print(&help.render().to_string()),
    }
}

/// What clap says is wrong, in the shape of all other errors.
fn wrong_usage(error: &clap::Error) -> Error {
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return Error::usage("neither a model nor a command is given")
            .help("qcompile MODEL.onnx compiles; qcompile --help lists the commands");
    }
    let names = Cli::command();
    let names: Vec<&str> = names.get_subcommands().map(clap::Command::get_name).collect();
    let words = std::env::args().skip(1);
    let first = words.into_iter().find(|word| !word.starts_with('-')).unwrap_or_default();
    let command = names.contains(&first.as_str());
    if error.kind() == ErrorKind::ArgumentConflict && !command && !Path::new(&first).exists() {
        // clap takes the first word for a model.
        return Error::usage(format!("there is neither a command nor a file `{first}`"))
            .did_you_mean(&first, names.iter().copied())
            .help(format!("commands are {}", names.join(", ")));
    }
    let text = error.render().to_string();
    let mut lines = text.lines().map(str::trim);
    let first = lines.next().unwrap_or_default();
    let mut cause = first.strip_prefix("error: ").unwrap_or(first).to_owned();
    let mut help = Vec::new();
    let listing = cause.ends_with(':');
    let mut listed = listing;
    for line in lines {
        match line {
            "" => listed = false,
            _ if listed => {
                cause.push(' ');
                cause.push_str(line);
            }
            _ if line.starts_with("For more information") => {}
            _ => help.push(line.strip_prefix("tip: ").unwrap_or(line).to_owned()),
        }
    }
    help.into_iter().fold(Error::usage(cause), Error::help)
}

fn run(cli: Cli) -> Result<()> {
    match &cli.command {
        None => compile::run(&cli),
        Some(Command::Run(command)) => run::run(command),
        Some(Command::Train(command)) => train::run(command),
        Some(Command::Eval(command)) => eval::run(command),
        Some(Command::Sensitivity(command)) => sensitivity::run(command),
        Some(Command::Inspect(command)) => inspect::run(command),
        Some(Command::Export(command)) => export::run(command),
        Some(Command::Bench(command)) => bench::run(command),
        Some(Command::Doctor(command)) => doctor::run(command),
        Some(Command::Completions(command)) => {
            let mut text = Vec::new();
            clap_complete::generate(command.shell, &mut Cli::command(), "qcompile", &mut text);
            print(&String::from_utf8_lossy(&text))
        }
    }
}

impl Talk {
    fn show(self) -> Show {
        Show::on_stderr(self.quiet)
    }

    /// Says warnings on stderr, whatever else is quiet.
    fn warn(self, warnings: &[String]) {
        for warning in warnings {
            say_verb(Show::Lines, "Warning", warning);
        }
    }
}

impl Machine {
    /// These threads and this instruction set.
    fn trainer(self, workers: usize) -> Result<TrainerOptions> {
        if let Some(tier) = self.tier
            && !tier.is_supported()
        {
            return Err(Error::usage(format!("this CPU does not have {tier}"))
                .help("qcompile doctor shows what it has"));
        }
        Ok(TrainerOptions { threads: self.threads, workers, tier: self.tier })
    }
}

/// The file of kept times: in the user's cache folder, if there is one.
fn timings_path() -> Option<PathBuf> {
    let folder = |variable: &str| {
        let value = std::env::var_os(variable).filter(|value| !value.is_empty())?;
        Some(PathBuf::from(value)).filter(|path| path.is_absolute())
    };
    let cache = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")))?;
    Some(cache.join("qcompile").join("timings.json"))
}

/// `NAME.ending` in this folder, for a target of any path.
fn beside(target: &Path, ending: &str) -> PathBuf {
    let mut name = target.file_stem().unwrap_or(target.as_os_str()).to_owned();
    name.push(ending);
    PathBuf::from(name)
}

/// Refuses to write over the file that is read.
fn refuse_overwriting(output: &Path, model: &Path) -> Result<()> {
    let same = match (output.canonicalize(), model.canonicalize()) {
        (Ok(output), Ok(model)) => output == model,
        _ => false,
    };
    if same {
        let cause = "the output would overwrite the model";
        return Err(Error::usage(cause).at(output.display().to_string()));
    }
    Ok(())
}

/// A JSON value as a line on stdout, or as an indented document.
fn print_json(value: &serde_json::Value, line: bool) -> Result<()> {
    let text =
        if line { serde_json::to_string(value) } else { serde_json::to_string_pretty(value) };
    let text = text.map_err(|e| Error::new(Code::Internal, e.to_string()))?;
    print(&format!("{text}\n"))
}

/// The error with this text of `--data` for its place, if it is about data.
fn in_data(error: Error, text: &str) -> Error {
    let about_data = error.code().text().starts_with("QC05");
    let known = error.places().iter().any(|place| text.contains(place.as_str()));
    if about_data && !known { error.at(text) } else { error }
}
