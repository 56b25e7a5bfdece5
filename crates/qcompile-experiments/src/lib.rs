//! Experiments on real data. Each is one command that prints its table and, for every rule that it must meet, whether
//! it does; the exit code is 1 if one is not met.
//!
//! ```sh
//! cargo run --release -p qcompile-experiments -- multipoint --data data/fashion-mnist
//! ```
#![forbid(unsafe_code)]

mod classifier;
mod depthwise;
mod gradient_coder;
mod low_bits;
mod masks;
mod multipoint;
mod per_channel;
mod report;
mod rounding;
mod spread;

pub use report::Report;

use qcompile::output::print;
use qcompile::terminal::say;
use qcompile::{Error, Result};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// What an experiment is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The folder with the four files of Fashion-MNIST, if one is named.
    pub data: Option<PathBuf>,
}

impl Settings {
    /// The folder of Fashion-MNIST: where `models/fetch.sh data fashion-mnist` leaves it, unless another one is named.
    #[must_use]
    pub fn pictures(&self) -> &Path {
        self.data.as_deref().unwrap_or(Path::new("data/fashion-mnist"))
    }
}

/// An experiment: its word on the command line, what it shows, and itself.
type Experiment = (&'static str, &'static str, fn(&Settings) -> Result<Report>);

const EXPERIMENTS: &[Experiment] = &[
    (
        "multipoint",
        "error by number of points, and adaptive against random channels",
        multipoint::run,
    ),
    (
        "depthwise",
        "a depthwise network rounded and trained with it, per tensor and per channel",
        depthwise::run,
    ),
    ("low-bits", "training a perceptron on int8 and int4", low_bits::perceptron),
    ("resnet8", "training ResNet-8 in int8", low_bits::resnet8),
    ("resnet20", "training ResNet-20 in int8 (an hour)", low_bits::resnet20),
    ("masks", "every combination of the four operations, in int8", masks::run),
    (
        "gradient-coder",
        "sizes of gradients that are clipped, rounded and coded by bitmap or index",
        gradient_coder::run,
    ),
    ("per-channel", "weights with a scale for each channel against one scale", per_channel::run),
];

/// Runs the experiment that the command line names.
#[must_use]
pub fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match act(&words) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(qcompile::Exit::GateFailed.status()),
        Err(error) => {
            say(&error.to_string());
            ExitCode::from(error.exit().status())
        }
    }
}

/// Whether every rule is met.
fn act(words: &[String]) -> Result<bool> {
    let usage = || {
        let named = |(word, shows, _): &Experiment| format!("{word}: {shows}");
        let lines = EXPERIMENTS.iter().map(named);
        let error = Error::usage("usage: qcompile-experiments EXPERIMENT [--data FOLDER]");
        lines.fold(error, |error, line| error.note(line))
    };
    let (word, data) = match words {
        [word] => (word, None),
        [word, flag, folder] if flag == "--data" => (word, Some(PathBuf::from(folder))),
        _ => return Err(usage()),
    };
    let found = EXPERIMENTS.iter().find(|(name, _, _)| name == word);
    let (_, _, run) = found.ok_or_else(usage)?;
    let report = run(&Settings { data })?;
    print(&report.render())?;
    Ok(report.passes())
}
