//! `qcompile bench`.

use super::print_json;
use crate::about::About;
use crate::cli::BenchCommand;
use crate::error::{Code, Error, Result};
use crate::model::{Target, at_path, open};
use crate::output::print;
use crate::terminal::{Align, Table, bytes, milliseconds, width};
use crate::timing::{Measured, measure};
use crate::wants::Wants;
use qcompile_plan::Plan;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub(super) fn run(command: &BenchCommand) -> Result<()> {
    let options = command.machine.trainer(1)?;
    let mut plans = vec![plan(&command.plan)?];
    let mut names = vec![command.plan.display().to_string()];
    if let Some(path) = &command.against {
        plans.push(plan(path)?);
        names.push(path.display().to_string());
    }
    let first = &plans[0];
    let about = About::of_plan(first).map_err(|error| at_path(error, &command.plan))?;
    let wants = Wants::of(first.graph(), &about).map_err(|error| at_path(error, &command.plan))?;
    let batch = wants.batch_size(command.batch_size, first.batch_size())?;
    let duration = Duration::from_secs_f64(command.duration.min(86_400.0));
    let measured = measure(&plans, batch, &options, duration)?;
    if command.talk.json {
        return print_json(&document(&measured, &names), false);
    }
    print(&table(&measured, &names))
}

fn plan(path: &Path) -> Result<Arc<Plan>> {
    match open(path)? {
        Target::Plan(plan) | Target::Checkpoint(plan, _) => Ok(plan),
        other => {
            let cause = format!("this is a {}, and a plan is wanted", other.kind());
            let error = Error::new(Code::PlanMismatch, cause).at(path.display().to_string());
            Err(error.help("compile it first: qcompile MODEL.onnx"))
        }
    }
}

fn document(measured: &[Measured], names: &[String]) -> Value {
    let mut document = json!(measured.first());
    if let (Some(against), Some(fields)) = (measured.get(1), document.as_object_mut()) {
        let ratio = against.step_ms.median / measured[0].step_ms.median;
        let mut other = json!(against);
        if let Some(other) = other.as_object_mut() {
            other.insert("plan".to_owned(), json!(names[1]));
        }
        fields.insert("against".to_owned(), other);
        fields.insert("ratio".to_owned(), json!(ratio));
    }
    document
}

fn table(measured: &[Measured], names: &[String]) -> String {
    let mut header = vec![("", Align::Left)];
    header.extend(names.iter().map(|name| (name.as_str(), Align::Right)));
    let mut table = Table::new(&header);
    let mut row = |name: &str, cell: &dyn Fn(&Measured) -> String| {
        table.row(std::iter::once(name.to_owned()).chain(measured.iter().map(cell)));
    };
    row("step, median", &|m| milliseconds(m.step_ms.median));
    row("step, p10 to p90", &|m| {
        format!("{} to {}", milliseconds(m.step_ms.p10), milliseconds(m.step_ms.p90))
    });
    row("forward", &|m| milliseconds(m.forward_ms));
    row("backward", &|m| milliseconds(m.backward_ms));
    row("reduce", &|m| milliseconds(m.reduce_ms));
    row("update", &|m| milliseconds(m.update_ms));
    row("GFLOP/s", &|m| format!("{:.0}", m.gflops));
    row("memory", &|m| bytes(m.peak_bytes as u64));
    row("batch, threads", &|m| format!("{}, {}", m.batch_size, m.threads));
    row("steps", &|m| m.steps.to_string());
    let mut text = table.render(width());
    if let [first, against] = measured {
        let ratio = against.step_ms.median / first.step_ms.median;
        text.push_str(&format!("\n {} is {ratio:.2}x as fast as {}\n", names[0], names[1]));
    }
    text
}
