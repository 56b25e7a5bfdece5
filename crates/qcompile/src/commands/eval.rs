//! `qcompile eval`.

use super::{in_data, print_json};
use crate::about::About;
use crate::cli::EvalCommand;
use crate::data::{Dataset, Limits};
use crate::error::{Code, Error, Result};
use crate::model::{Target, at_path, open};
use crate::output::print;
use crate::terminal::{Align, Table, say_verb};
use crate::train::{Evaluation, evaluate};
use crate::wants::Wants;
use qcompile_plan::Plan;
use qcompile_runtime::{Trainer, TrainerOptions, checkpoint};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;

pub(super) fn run(command: &EvalCommand) -> Result<()> {
    let options = command.machine.trainer(1)?;
    let mut subjects = vec![Subject::open(&command.target, &options)?];
    if let Some(baseline) = &command.baseline {
        subjects.push(Subject::open(baseline, &options)?);
    }
    let data = Dataset::load(&command.data, Limits::default())?;
    let results = subjects
        .iter_mut()
        .map(|subject| subject.evaluate(command, &data).map_err(|e| in_data(e, &command.data)));
    let results = results.collect::<Result<Vec<Evaluation>>>()?;
    let Some(result) = results.first() else {
        return Err(Error::new(Code::Internal, "there is nothing to evaluate"));
    };
    let baseline = results.get(1);
    if command.talk.json {
        return print_json(&document(result, baseline), false);
    }
    print(&table(command, &results))
}

fn document(result: &Evaluation, baseline: Option<&Evaluation>) -> Value {
    let mut document = json!(result);
    if let (Some(baseline), Some(fields)) = (baseline, document.as_object_mut()) {
        fields.insert("baseline".to_owned(), json!(baseline));
    }
    document
}

fn table(command: &EvalCommand, results: &[Evaluation]) -> String {
    let mut table = Table::new(&[
        ("", Align::Left),
        ("loss", Align::Right),
        ("accuracy", Align::Right),
        ("samples", Align::Right),
    ]);
    let percent = |part: f64| format!("{:.2} %", 100.0 * part);
    let names = [Some(&command.target), command.baseline.as_ref()];
    for (result, name) in results.iter().zip(names.into_iter().flatten()) {
        table.row([
            name.display().to_string(),
            format!("{:.4}", result.loss),
            result.accuracy.map_or_else(|| "-".to_owned(), percent),
            result.samples.to_string(),
        ]);
    }
    if let [result, baseline] = results {
        let points = result.accuracy.zip(baseline.accuracy).map(|(a, b)| 100.0 * (a - b));
        table.row([
            "difference".to_owned(),
            format!("{:+.4}", result.loss - baseline.loss),
            points.map_or_else(|| "-".to_owned(), |points| format!("{points:+.2} points")),
            String::new(),
        ]);
    }
    table.render(crate::terminal::width())
}

/// A plan or checkpoint that is evaluated.
struct Subject<'p> {
    path: &'p Path,
    plan: Arc<Plan>,
    about: About,
    trainer: Trainer,
}

impl<'p> Subject<'p> {
    fn open(path: &'p Path, options: &TrainerOptions) -> Result<Subject<'p>> {
        let made = || -> Result<Subject<'p>> {
            let (plan, state) = match open(path)? {
                Target::Plan(plan) => (plan, None),
                Target::Checkpoint(plan, state) => (plan, Some(state)),
                other => {
                    let cause =
                        format!("this is a {}, and a plan or checkpoint is wanted", other.kind());
                    return Err(Error::new(Code::PlanMismatch, cause)
                        .help("compile it first: qcompile MODEL.onnx"));
                }
            };
            let about = About::of_plan(&plan)?;
            let mut trainer = Trainer::new(Arc::clone(&plan), options)?;
            if let Some(state) = state {
                checkpoint::restore(&mut trainer, &state)?;
            }
            Ok(Subject { path, plan, about, trainer })
        };
        made().map_err(|error| at_path(error, path))
    }

    fn evaluate(&mut self, command: &EvalCommand, data: &Dataset) -> Result<Evaluation> {
        let show = command.talk.show();
        let wants = Wants::of(self.plan.graph(), &self.about).map_err(|e| at_path(e, self.path))?;
        let binding = wants.bind(data)?;
        command.talk.warn(binding.notes());
        let size = wants.batch_size(command.batch_size, self.plan.batch_size())?;
        let result = evaluate(&mut self.trainer, &binding, &wants, &self.about, size, show)?;
        let left_out = binding.samples() - result.samples;
        if left_out > 0 {
            let text = format!("{left_out} samples do not fill a batch of {size} and are left out");
            say_verb(show, "Note", &text);
        }
        Ok(result)
    }
}
