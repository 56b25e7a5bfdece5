//! Training with a plan: epochs over a data set, the schedule of the learning rate, evaluation, checkpoints.

mod evaluation;
mod progress;
mod rate;

pub use evaluation::{Evaluation, evaluate};
pub use progress::{Differences, Progress, Settings, digest};
pub use rate::{Rate, Schedule};

use crate::data::{Batches, Binding};
use crate::error::{Code, Error, Result};
use crate::wants::Wants;
use qcompile_ir::{DType, NodeId, Op, Tensor};
use qcompile_runtime::Trainer;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Steps in a row that may be refused for a loss or gradient that is not finite before training is given up.
pub const PATIENCE: u64 = 10;

/// One step, as it is told.
#[derive(Debug, Clone, Copy)]
pub struct StepLog {
    /// Counted from 1 over all epochs.
    pub step: u64,
    /// The loss before the update.
    pub loss: f32,
    /// The norm of all gradients, before clipping.
    pub grad_norm: f32,
    /// The learning rate.
    pub lr: f64,
    /// Whether the step was refused, as something was not finite.
    pub skipped: bool,
}

/// One epoch, as it is told.
#[derive(Debug, Clone, Copy)]
pub struct EpochLog {
    /// Counted from 1.
    pub epoch: u64,
    /// Mean loss of the epoch's samples in the steps that counted.
    pub loss: f64,
    /// Samples a second.
    pub samples_per_s: f64,
    /// Steps that were refused.
    pub skipped: u64,
    /// Steps that were made.
    pub steps: u64,
}

/// A training run: what it trains on, and how far it is.
pub struct Run<'d> {
    /// The trainer.
    pub trainer: Trainer,
    binding: Binding<'d>,
    wants: Wants,
    batches: Batches,
    rate: Rate,
    schedule: Schedule,
    /// How far the run is.
    pub progress: Progress,
}

/// Lets the step that random numbers are a function of begin at 2³² times the seed, so that every seed draws others.
fn seed_steps(trainer: &mut Trainer, seed: u64) -> Result<()> {
    let plan = Arc::clone(trainer.plan());
    let graph = plan.graph();
    let steps: BTreeSet<NodeId> = graph
        .ids()
        .filter(|&id| matches!(graph.op(id), Op::Random { .. }))
        .map(|id| graph.operands(id)[0])
        .filter(|&id| matches!(graph.op(id), Op::State(_)))
        .collect();
    let bytes = (seed << 32).to_le_bytes().to_vec();
    let first = Tensor::from_bytes(DType::I64, Vec::new(), bytes)
        .ok_or_else(|| Error::new(Code::Internal, "eight bytes are no i64"))?;
    steps.into_iter().try_for_each(|id| Ok(trainer.set(graph.node(id).name.as_str(), &first)?))
}

impl<'d> Run<'d> {
    /// A run at its beginning, or at `progress`.
    ///
    /// # Errors
    /// Usage, for a batch size that the model or the workers do not take; [`Code::DataEmpty`] where no batch is left.
    pub fn new(
        mut trainer: Trainer,
        binding: Binding<'d>,
        wants: &Wants,
        settings: &Settings,
        progress: Option<Progress>,
    ) -> Result<Run<'d>> {
        let size = settings.batch_size;
        let workers = trainer.workers();
        if !size.is_multiple_of(workers) {
            return Err(Error::usage(format!(
                "{workers} workers cannot share batches of {size} equally"
            ))
            .help("take a batch size that is a multiple of --workers"));
        }
        if workers > 1 && wants.fixed_batch.is_some() {
            let cause =
                format!("the model takes batches of {size} only: workers cannot share them");
            return Err(Error::usage(cause).help("export the model with a symbolic batch axis"));
        }
        let drop_last = settings.drop_last || wants.fixed_batch.is_some();
        let mut batches = Batches::new(binding.samples(), size).drop_last(drop_last);
        if settings.shuffle {
            batches = batches.shuffled(settings.seed);
        }
        if batches.steps() == 0 {
            let cause = format!("{} samples do not fill one batch of {size}", binding.samples());
            return Err(Error::new(Code::DataEmpty, cause));
        }
        let schedule = Schedule::new(settings, batches.steps() as u64);
        if progress.is_none() {
            seed_steps(&mut trainer, settings.seed)?;
        }
        let progress = progress.unwrap_or_else(|| Progress::new(settings.clone()));
        let wants = wants.clone();
        Ok(Run {
            trainer,
            binding,
            wants,
            batches,
            rate: settings.rate.clone(),
            schedule,
            progress,
        })
    }

    /// Number of steps in an epoch.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.batches.steps() as u64
    }

    /// Samples of an epoch that no step takes.
    #[must_use]
    pub fn left_out(&self) -> usize {
        let taken: usize = (0..self.batches.steps()).map(|step| self.taken(step)).sum();
        self.binding.samples() - taken
    }

    /// Samples of a step: workers take equally many.
    fn taken(&self, step: usize) -> usize {
        let workers = self.trainer.workers();
        self.batches.len_at(step) / workers * workers
    }

    /// Trains for one epoch.
    ///
    /// # Errors
    /// Of the data and the runtime; [`Code::Diverged`] after [`PATIENCE`] refused steps in a row, or when an epoch
    /// had no other.
    pub fn epoch(&mut self, each: &mut dyn FnMut(&StepLog) -> Result<()>) -> Result<EpochLog> {
        let epoch = self.progress.epochs;
        let (mut sum, mut samples, mut counted) = (0.0, 0.0, 0.0);
        let (mut refused, mut skipped) = (0, 0);
        let begin = Instant::now();
        let mut told = Duration::ZERO;
        for step in 0..self.batches.steps() {
            let taken = self.taken(step);
            if taken == 0 {
                continue;
            }
            let mut rows = self.batches.batch(epoch, step);
            rows.truncate(taken);
            let log = self.step(&rows)?;
            samples += taken as f64;
            if log.skipped {
                refused += 1;
                skipped += 1;
            } else {
                refused = 0;
                sum += f64::from(log.loss) * taken as f64;
                counted += taken as f64;
            }
            let telling = Instant::now();
            each(&log)?;
            told += telling.elapsed();
            if refused >= PATIENCE {
                return Err(diverged(&log, refused));
            }
            if counted == 0.0 && step + 1 == self.batches.steps() {
                return Err(diverged(&log, refused));
            }
        }
        self.progress.epochs += 1;
        let seconds = begin.elapsed().saturating_sub(told).as_secs_f64();
        Ok(EpochLog {
            epoch: epoch + 1,
            loss: sum / counted,
            samples_per_s: samples / seconds.max(1e-9),
            skipped,
            steps: self.steps(),
        })
    }

    fn step(&mut self, rows: &[usize]) -> Result<StepLog> {
        let mut inputs = self.wants.batch(&self.binding, rows)?;
        let lr = self.schedule.rate(self.progress.steps);
        for (name, value) in self.rate.inputs(lr, self.progress.updates + 1) {
            if self.trainer.plan().inputs().iter().any(|input| input.name == name) {
                inputs.insert(name.to_owned(), Tensor::scalar(DType::F32, value));
            }
        }
        let report = self.trainer.step(&inputs)?;
        self.progress.steps += 1;
        if report.finite {
            self.progress.updates += 1;
        }
        Ok(StepLog {
            step: self.progress.steps,
            loss: report.loss,
            grad_norm: report.grad_norm,
            lr,
            skipped: !report.finite,
        })
    }
}

fn diverged(log: &StepLog, refused: u64) -> Error {
    let cause = format!(
        "training diverged: {refused} steps in a row up to step {} had a loss ({}) or gradients (norm {}) that are not finite",
        log.step, log.loss, log.grad_norm
    );
    Error::new(Code::Diverged, cause)
        .help("a smaller --lr, --warmup-steps or --grad-clip-norm may keep it in bounds")
        .note("the refused steps changed no parameter")
}
