//! `qcompile bench`.

use super::print_json;
use crate::about::About;
use crate::cli::BenchCommand;
use crate::error::{Code, Error, Result};
use crate::model::{Target, at_path, open};
use crate::output::print;
use crate::terminal::{Align, Table, bytes, milliseconds, width};
use crate::timing::{Measured, StepTime, measure, profile};
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
    let measured = measure(&plans, batch, &options, duration, LEAST)?;
    let steps =
        if command.profile { profile(&plans[0], batch, &options, ROUNDS)? } else { Vec::new() };
    if command.talk.json {
        let mut document = document(&measured, &names);
        if let (true, Some(fields)) = (command.profile, document.as_object_mut()) {
            fields.insert("profile".to_owned(), json!(steps));
        }
        return print_json(&document, false);
    }
    let mut text = table(&measured, &names);
    if command.profile {
        text.push('\n');
        text.push_str(&by_kernel(&steps));
        text.push('\n');
        text.push_str(&slowest(&steps));
    }
    print(&text)
}

/// Steps that are measured kernel by kernel.
const ROUNDS: usize = 5;
/// Steps that are measured at least.
const LEAST: usize = 3;
/// Kernels that the table of the slowest has.
const SLOWEST: usize = 25;

/// Where the time goes: each kind of kernel in each region.
fn by_kernel(steps: &[StepTime]) -> String {
    let total: f64 = steps.iter().map(|step| step.ms).sum();
    let mut kinds: Vec<(&str, &str, usize, f64, f64)> = Vec::new();
    for step in steps {
        let known = kinds.iter_mut().find(|kind| (kind.0, kind.1) == (step.region, step.kernel));
        let work = step.gflops * step.ms;
        match known {
            Some(kind) => {
                kind.2 += 1;
                kind.3 += step.ms;
                kind.4 += work;
            }
            None => kinds.push((step.region, step.kernel, 1, step.ms, work)),
        }
    }
    kinds.sort_by(|a, b| b.3.total_cmp(&a.3));
    let mut table = Table::new(&[
        ("region", Align::Left),
        ("kernel", Align::Left),
        ("times", Align::Right),
        ("time", Align::Right),
        ("share", Align::Right),
        ("GFLOP/s", Align::Right),
    ]);
    for (region, kernel, count, ms, work) in kinds {
        table.row([
            region.to_owned(),
            kernel.to_owned(),
            count.to_string(),
            milliseconds(ms),
            format!("{:.1} %", 100.0 * ms / total.max(f64::MIN_POSITIVE)),
            if work > 0.0 { format!("{:.0}", work / ms) } else { "-".to_owned() },
        ]);
    }
    table.render(width())
}

/// The kernels that take longest.
fn slowest(steps: &[StepTime]) -> String {
    let mut steps: Vec<&StepTime> = steps.iter().collect();
    steps.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    let mut table = Table::new(&[
        ("slowest", Align::Left),
        ("kernel", Align::Left),
        ("time", Align::Right),
        ("GFLOP/s", Align::Right),
        ("GB/s of loops", Align::Right),
    ]);
    let rate = |rate: f64| if rate > 0.0 { format!("{rate:.1}") } else { "-".to_owned() };
    for step in steps.into_iter().take(SLOWEST) {
        let ms = milliseconds(step.ms);
        let kernel = step.kernel.to_owned();
        table.row([step.name.clone(), kernel, ms, rate(step.gflops), rate(step.gbytes)]);
    }
    table.render(width())
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
    row("resident", &|m| {
        m.resident_bytes.map_or_else(|| "-".to_owned(), |resident| bytes(resident as u64))
    });
    row("batch, threads", &|m| format!("{}, {}", m.batch_size, m.threads));
    row("steps", &|m| m.steps.to_string());
    let mut text = table.render(width());
    if let [first, against] = measured {
        let ratio = against.step_ms.median / first.step_ms.median;
        text.push_str(&format!("\n {} is {ratio:.2}x as fast as {}\n", names[0], names[1]));
    }
    text
}
