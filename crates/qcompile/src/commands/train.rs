//! `qcompile train`.

use super::{beside, in_data, print_json, timings_path};
use crate::about::About;
use crate::cli::{CompileArgs, TrainCommand};
use crate::data::{Binding, Dataset, Limits};
use crate::error::{Code, Error, Result};
use crate::model::{CHECKPOINT_PLAN, CHECKPOINT_STATE, Target, at_path, open, read_file};
use crate::options::Options;
use crate::output::{check_writable, print, write_atomically};
use crate::terminal::{Progress as Bar, bytes, milliseconds, say_verb};
use crate::train::{
    EpochLog, Evaluation, Progress, Rate, Run, Settings, StepLog, digest, evaluate,
};
use crate::wants::Wants;
use qcompile_ir::LeafValues;
use qcompile_plan::{Plan, Received};
use qcompile_runtime::{Trainer, checkpoint};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

pub(super) fn run(command: &TrainCommand) -> Result<()> {
    let show = command.talk.show();
    let options = command.machine.trainer(command.workers)?;
    let place = Place::of(command)?;
    let plan = plan(command)?;
    let about = About::of_plan(&plan).map_err(|error| at_path(error, &command.target))?;
    if about.optimizer.is_empty() {
        let cause = "the plan has no update: it cannot be trained";
        return Err(at_path(Error::new(Code::PlanMismatch, cause), &command.target));
    }
    let wants = Wants::of(plan.graph(), &about)?;
    let data = Dataset::load(&command.data, Limits::default())?;
    let binding = wants.bind(&data).map_err(|e| in_data(e, &command.data))?;
    command.talk.warn(binding.notes());
    let others = command.eval.as_deref().map(|text| Dataset::load(text, Limits::default()));
    let others = others.transpose()?;
    let eval_text = command.eval.as_deref().unwrap_or_default();
    let eval = others.as_ref().map(|data| wants.bind(data)).transpose();
    let eval = eval.map_err(|e| in_data(e, eval_text))?;
    let plan_bytes = plan.to_bytes();
    let settings = Settings {
        epochs: command.epochs,
        batch_size: wants.batch_size(command.compile.batch_size, plan.batch_size())?,
        workers: command.workers,
        seed: command.seed,
        shuffle: !command.no_shuffle,
        drop_last: command.drop_last,
        data: data_digest(&data),
        plan: digest([plan_bytes.as_slice()]),
        rate: Rate::of(&command.rate),
    };
    let mut trainer = Trainer::new(Arc::clone(&plan), &options)?;
    let resumed = place.resume(&mut trainer, &settings)?;
    place.begin(&plan_bytes)?;
    drop(plan_bytes);
    let mut run = Run::new(trainer, binding, &wants, &settings, resumed)
        .map_err(|e| in_data(e, &command.data))?;
    run.progress.settings = settings;
    if run.left_out() > 0 {
        say_verb(show, "Note", &format!("{} samples of each epoch are left out", run.left_out()));
    }
    let received = plan.received(command.workers);
    if command.workers > 1 {
        let f32 = bytes(received.f32_bytes as u64);
        let now = bytes(received.bytes as u64);
        let text = format!("each worker receives {now} a step, {f32} if all were f32");
        say_verb(show, "Exchange", &text);
    }
    let teller = Teller { command, evaluating: eval.is_some(), received };
    let first = run.progress.epochs;
    if first >= command.epochs {
        say_verb(show, "Note", &format!("all {first} epochs are done already"));
    }
    let mut last = None;
    for _ in first..command.epochs {
        let log = teller.epoch(&mut run).map_err(|e| in_data(e, &command.data))?;
        place.save(&run)?;
        let result = eval.as_ref().map(|eval| evaluation(&mut run, eval, &wants, &about, command));
        let result = result.transpose().map_err(|e| in_data(e, eval_text))?;
        teller.tell(&log, result.as_ref())?;
        last = Some(log);
    }
    if last.is_some() || first == 0 {
        place.finish(&plan, run, &about)?;
    }
    if let Some(path) = place.answer() {
        say_verb(show, "Finished", &format!("{} (qcompile eval takes it)", path.display()));
    }
    Ok(())
}

fn evaluation(
    run: &mut Run<'_>,
    eval: &Binding<'_>,
    wants: &Wants,
    about: &About,
    command: &TrainCommand,
) -> Result<Evaluation> {
    let size = run.progress.settings.batch_size;
    evaluate(&mut run.trainer, eval, wants, about, size, command.talk.show())
}

/// The plan to train: as it is, of a checkpoint, or compiled from the model.
fn plan(command: &TrainCommand) -> Result<Arc<Plan>> {
    let target = open(&command.target)?;
    match target {
        Target::Plan(plan) => {
            check_flags(&command.compile, &plan).map_err(|e| at_path(e, &command.target))?;
            Ok(plan)
        }
        Target::Checkpoint(..) => {
            let cause = "a checkpoint goes on where it was: name its plan and the folder";
            Err(at_path(Error::usage(cause), &command.target).help(format!(
                "qcompile train {} --checkpoint {} --resume ...",
                command.target.join(CHECKPOINT_PLAN).display(),
                command.target.display()
            )))
        }
        Target::Model(_) | Target::Graph(_) => {
            drop(target);
            command.compile.check()?;
            let options = Options {
                timings: timings_path(),
                ..Options::from_args(&command.compile, &command.machine)
            };
            let options = options.with_data(Some(command.data.clone()));
            let compiled =
                super::compile::in_passing(&command.target, &options, command.talk.show())?;
            command.talk.warn(&compiled.warnings);
            Ok(compiled.plan)
        }
    }
}

/// Flags that a plan has decided already must say the same.
fn check_flags(args: &CompileArgs, plan: &Plan) -> Result<()> {
    let about = About::of_plan(plan)?;
    let option = |flag: &str| about.options.get(flag).map_or("", String::as_str);
    let asked = [
        ("--loss", args.loss.map(|kind| kind.name()), about.loss.as_str()),
        ("--optimizer", args.optimizer.map(|kind| kind.name()), about.optimizer.as_str()),
        ("--precision", args.precision.precision.map(|kind| kind.name()), option("precision")),
        ("--metric", args.precision.metric.map(|kind| kind.name()), option("metric")),
        ("--batch-norm", args.import.batch_norm.map(|mode| mode.name()), option("batch-norm")),
        ("--sync-batch-norm", args.sync_batch_norm.then_some("true"), option("sync-batch-norm")),
    ];
    let mut wrong = Vec::new();
    for (flag, asked, has) in asked {
        if let Some(asked) = asked.filter(|asked| *asked != has) {
            wrong.push(format!("{flag} {asked}: the plan has {has}"));
        }
    }
    let precision = &args.precision;
    let given = [
        ("--freeze", !args.import.freeze.is_empty()),
        ("--train", !args.import.train.is_empty()),
        ("--dim", !args.import.dim.is_empty()),
        ("--constant", !args.import.constant.is_empty()),
        ("--threshold", precision.threshold.is_some()),
        ("--channel-threshold", precision.channel_threshold.is_some()),
        ("--channel-policy", precision.channel_policy.is_some()),
        ("--max-loss-increase", precision.max_loss_increase.is_some()),
        ("--keep", !precision.keep.is_empty()),
        ("--quantize-ops", precision.quantize_ops.is_some()),
        ("--master-weights", precision.master_weights.is_some()),
        ("--compress", !args.compress.is_empty()),
        ("--memory-limit", args.memory_limit.is_some()),
        ("--scores", precision.scores.is_some()),
        ("--samples", precision.samples.is_some()),
        ("--qat", precision.qat && option("qat") != "true"),
    ];
    wrong.extend(
        given
            .iter()
            .chain(&precision.numerics.given())
            .filter(|(_, given)| *given)
            .map(|(flag, _)| format!("{flag}: decided when a model is compiled")),
    );
    if let Some(flag) = args.ranged.given() {
        wrong.push(format!("{flag}: decided when a model is compiled"));
    }
    if wrong.is_empty() {
        return Ok(());
    }
    let error = Error::new(Code::PlanMismatch, "the plan was compiled with other flags");
    let error = wrong.into_iter().fold(error, Error::at);
    Err(error.help("compile the model again with these flags"))
}

fn data_digest(data: &Dataset) -> String {
    let parts = data.arrays.iter().flat_map(|(name, array)| {
        let transform = data.transforms.get(name).map(|transform| format!("{transform:?}"));
        let about = format!("{name} {array} {}", transform.unwrap_or_default());
        [about.into_bytes(), array.bytes.clone()]
    });
    let parts: Vec<Vec<u8>> = parts.collect();
    digest(parts.iter().map(Vec::as_slice))
}

/// Where the results of the run go.
struct Place {
    checkpoint: Option<PathBuf>,
    resume: bool,
    trained: Option<PathBuf>,
}

impl Place {
    fn of(command: &TrainCommand) -> Result<Place> {
        let trained = match (&command.output, &command.checkpoint) {
            (Some(path), _) => Some(path.clone()),
            (None, Some(_)) => None,
            (None, None) => Some(beside(&command.target, ".trained.qplan")),
        };
        if let Some(path) = &trained {
            check_writable(path)?;
        }
        let place =
            Place { checkpoint: command.checkpoint.clone(), resume: command.resume, trained };
        if let Some(folder) = &place.checkpoint {
            let holds = folder.join(CHECKPOINT_STATE).exists();
            let place = folder.display().to_string();
            if holds && !command.resume {
                return Err(Error::usage("the folder holds the checkpoint of another run")
                    .at(place)
                    .help("--resume goes on from it; another --checkpoint folder begins anew"));
            }
            if !holds && command.resume {
                return Err(Error::usage("the folder holds no checkpoint to go on from").at(place));
            }
        }
        Ok(place)
    }

    /// Makes the checkpoint's folder and puts the plan there.
    fn begin(&self, plan: &[u8]) -> Result<()> {
        let Some(folder) = self.checkpoint.as_ref().filter(|_| !self.resume) else {
            return Ok(());
        };
        std::fs::create_dir_all(folder)
            .map_err(|e| Error::write(folder.display().to_string(), &e))?;
        write_atomically(&folder.join(CHECKPOINT_PLAN), plan)
    }

    fn resume(&self, trainer: &mut Trainer, settings: &Settings) -> Result<Option<Progress>> {
        let Some(folder) = self.checkpoint.as_ref().filter(|_| self.resume) else {
            return Ok(None);
        };
        let path = folder.join(CHECKPOINT_STATE);
        let bytes = read_file(&path)?;
        // Restoring changes nothing if it fails, and nothing is written before all agrees.
        let text = checkpoint::restore(trainer, &bytes).map_err(|e| at_path(e.into(), &path))?;
        let progress = Progress::of_json(&text).map_err(|e| at_path(e, &path))?;
        progress.check(settings).map_err(|e| at_path(e, &path))?;
        Ok(Some(progress))
    }

    fn save(&self, run: &Run<'_>) -> Result<()> {
        let Some(folder) = &self.checkpoint else { return Ok(()) };
        let bytes = checkpoint::encode(&run.trainer, &run.progress.to_json()?)?;
        write_atomically(&folder.join(CHECKPOINT_STATE), &bytes)
    }

    /// Writes the trained plan: the plan with the parameters and running statistics that training came to. The
    /// optimizer's state is not in it: training that plan begins anew.
    fn finish(&self, plan: &Plan, run: Run<'_>, about: &About) -> Result<()> {
        let Some(path) = &self.trained else { return Ok(()) };
        let params = plan.params().iter().map(|param| &param.name);
        let kept = params.chain(&about.states);
        let value = |name: &String| Some((name.clone(), Arc::new(run.trainer.get(name)?)));
        let values: LeafValues = kept.filter_map(value).collect();
        // The step's memory is not held beside the copies that the file takes.
        drop(run);
        write_atomically(path, &plan.with_values(&values)?.to_bytes())
    }

    fn answer(&self) -> Option<&Path> {
        self.trained.as_deref().or(self.checkpoint.as_deref())
    }
}

/// Tells how training goes.
struct Teller<'c> {
    command: &'c TrainCommand,
    evaluating: bool,
    /// What each worker receives from the others in a step.
    received: Received,
}

impl Teller<'_> {
    fn epoch(&self, run: &mut Run<'_>) -> Result<EpochLog> {
        let talk = self.command.talk;
        let steps = run.steps();
        let before = run.progress.steps;
        let number = run.progress.epochs + 1;
        let verb = format!("Epoch {number}/{}", self.command.epochs);
        let mut bar = Bar::start(talk.show(), &verb, steps);
        let begin = Instant::now();
        let log = run.epoch(&mut |log| {
            bar.update(log.step - before, &format!("loss {:.4}", log.loss));
            let every = self.command.log_every.map(|every| every as u64);
            match every {
                Some(every) if log.step % every == 0 => self.step(log),
                _ => Ok(()),
            }
        })?;
        bar.finish();
        if log.skipped > 0 {
            let text = format!("{} of {steps} steps were refused: not finite", log.skipped);
            talk.warn(&[text]);
        }
        if talk.verbose > 0 {
            let took = milliseconds(begin.elapsed().as_secs_f64() * 1e3);
            say_verb(talk.show(), "Epoch", &format!("{number} took {took}"));
        }
        Ok(log)
    }

    fn step(&self, log: &StepLog) -> Result<()> {
        if self.command.talk.json {
            return print_json(
                &json!({
                    "step": log.step,
                    "loss": log.loss,
                    "lr": log.lr,
                    "loss_scale": null,
                    "grad_norm": log.grad_norm,
                    "skipped": log.skipped,
                }),
                true,
            );
        }
        let skipped = if log.skipped { "  refused" } else { "" };
        print(&format!("step {}  loss {:.6}  lr {:.3e}{skipped}\n", log.step, log.loss, log.lr))
    }

    fn tell(&self, log: &EpochLog, eval: Option<&Evaluation>) -> Result<()> {
        if self.command.talk.json {
            return print_json(
                &json!({
                    "received_bytes": self.received.bytes,
                    "received_f32_bytes": self.received.f32_bytes,
                    "epoch": log.epoch,
                    "loss": log.loss,
                    "eval_loss": eval.map(|eval| eval.loss),
                    "eval_accuracy": eval.and_then(|eval| eval.accuracy),
                    "samples_per_s": log.samples_per_s,
                    "steps": log.steps,
                    "skipped": log.skipped,
                }),
                true,
            );
        }
        let mut line = format!("epoch {}/{}  loss {:.4}", log.epoch, self.command.epochs, log.loss);
        if let Some(eval) = eval.filter(|_| self.evaluating) {
            line.push_str(&format!("  eval loss {:.4}", eval.loss));
            if let Some(accuracy) = eval.accuracy {
                line.push_str(&format!("  accuracy {:.2} %", 100.0 * accuracy));
            }
        }
        print(&format!("{line}  {:.0} samples/s\n", log.samples_per_s))
    }
}
