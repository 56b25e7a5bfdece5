//! `qcompile inspect`.

use super::print_json;
use crate::about::{About, Port};
use crate::cli::InspectCommand;
use crate::error::Result;
use crate::model::{Target, at_path, draft, open};
use crate::options::Options;
use crate::output::print;
use crate::summary;
use crate::terminal::{Align, Table, bytes, count, width};
use crate::train::Progress;
use qcompile_ir::{Graph, Op, Region};
use qcompile_plan::Plan;
use qcompile_runtime::{Trainer, TrainerOptions, checkpoint, predicted_bytes};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;

pub(super) fn run(command: &InspectCommand) -> Result<()> {
    let target = open(&command.file)?;
    if command.capability {
        return super::capability::run(command, &target);
    }
    let report = match &target {
        Target::Model(_) | Target::Graph(_) => {
            let options = Options::default().with_import(&command.import);
            let draft = draft(&target, &command.file, &options)?;
            command.talk.warn(&draft.about.warnings);
            let mut report = Report::of(&target, &draft.graph, &draft.about);
            if let Some(after) = draft.after {
                report.line("after", after.name().to_owned(), json!(after.name()));
            }
            if command.nodes {
                report.nodes(&draft.graph);
            }
            report
        }
        Target::Plan(plan) => of_plan(command, &target, plan)?,
        Target::Checkpoint(plan, state) => {
            let mut report = of_plan(command, &target, plan)?;
            let mut trainer = Trainer::new(Arc::clone(plan), &TrainerOptions::default())?;
            let progress = checkpoint::restore(&mut trainer, state)
                .map_err(crate::error::Error::from)
                .and_then(|text| Progress::of_json(&text))
                .map_err(|error| at_path(error, &command.file))?;
            let settings = &progress.settings;
            let text = format!(
                "{} of {} epochs, {} steps",
                progress.epochs, settings.epochs, progress.steps
            );
            report.line("trained", text, json!(progress));
            report
        }
    };
    if command.talk.json {
        print_json(&Value::Object(report.fields), false)
    } else {
        print(&report.text)
    }
}

fn of_plan(command: &InspectCommand, target: &Target, plan: &Plan) -> Result<Report> {
    let about = About::of_plan(plan).map_err(|error| at_path(error, &command.file))?;
    let mut report = Report::of(target, plan.graph(), &about);
    report.line("loss", about.loss.clone(), json!(about.loss));
    report.line("optimizer", about.optimizer.clone(), json!(about.optimizer));
    let size = plan.batch_size();
    report.line("batch size", format!("{size}, any other runs too"), json!(size));
    let memory = predicted_bytes(plan, size, None)?;
    report.line("memory", format!("{} at that batch size", bytes(memory as u64)), json!(memory));
    let steps: BTreeMap<&str, usize> =
        plan.steps().iter().fold(BTreeMap::new(), |mut steps, step| {
            *steps.entry(step.region.name()).or_default() += 1;
            steps
        });
    let text: Vec<String> = Region::ALL
        .iter()
        .filter_map(|region| Some(format!("{} {}", steps.get(region.name())?, region.name())))
        .collect();
    report.line("steps", text.join(", "), json!(steps));
    let own = plan.evaluation().is_some_and(|form| !form.states().is_empty());
    let text = if own { "by running statistics" } else { "as in training" };
    report.line("evaluation", text.to_owned(), json!(own));
    if let Some(again) = &about.rematerialised {
        report.line("rematerialised", again.to_string(), json!(again));
    }
    for (flag, value) in &about.options {
        report.line(flag, value.clone(), json!(value));
    }
    report.fields.insert("decisions".to_owned(), json!(about.decisions));
    report.fields.insert("warnings".to_owned(), json!(about.warnings));
    if !about.decisions.is_empty() {
        report.text.push('\n');
        report.text.push_str(&summary::by_precision(&about.decisions));
        report.text.push('\n');
        report.text.push_str(&summary::by_layer(&about.decisions));
    }
    for warning in &about.warnings {
        report.text.push_str(&format!("\n note: {}\n", crate::error::escaped(warning)));
    }
    if command.nodes {
        let steps: Vec<Value> = plan
            .steps()
            .iter()
            .map(|step| json!({"name": step.name, "region": step.region.name(), "serial": step.serial}))
            .collect();
        report.fields.insert("nodes".to_owned(), Value::Array(steps));
        report.text.push('\n');
        report.text.push_str(&plan.to_string());
    }
    Ok(report)
}

/// What is found, for people and for programs.
struct Report {
    text: String,
    fields: Map<String, Value>,
}

impl Report {
    fn of(target: &Target, graph: &Graph, about: &About) -> Report {
        let mut report = Report { text: String::new(), fields: Map::new() };
        report.line("kind", target.kind().to_owned(), json!(target.kind()));
        report.line("name", graph.name().to_owned(), json!(graph.name()));
        let output = |name: &str| {
            let output = graph.outputs().iter().find(|(output, _)| output == name);
            output.map(|(_, id)| graph.ty(*id).to_string())
        };
        let input = |name: &str| graph.find(name).map(|id| graph.ty(id).to_string());
        report.ports("inputs", &about.inputs, input);
        report.ports("outputs", &about.outputs, output);
        let params = graph.leaves(|op| matches!(op, Op::Param(_)));
        let elements = params.iter().filter_map(|&id| graph.ty(id).shape.elements());
        let elements: u64 = elements.map(|dim| dim.size(1) as u64).sum();
        let text = format!("{} in {} tensors", count(elements), params.len());
        report.line("parameters", text, json!(elements));
        report.line("values", graph.len().to_string(), json!(graph.len()));
        let mut ops: BTreeMap<&str, usize> = BTreeMap::new();
        for id in graph.ids().filter(|&id| !graph.op(id).is_leaf()) {
            *ops.entry(graph.op(id).name()).or_default() += 1;
        }
        let mut sorted: Vec<_> = ops.iter().collect();
        sorted.sort_by_key(|(name, times)| (std::cmp::Reverse(**times), **name));
        let text: Vec<String> =
            sorted.iter().map(|(name, times)| format!("{times} {name}")).collect();
        report.line("ops", text.join(", "), json!(ops));
        report
    }

    fn line(&mut self, name: &str, text: String, value: Value) {
        self.text.push_str(&format!(" {name:<17} {}\n", crate::error::escaped(&text)));
        self.fields.insert(name.replace([' ', '-'], "_"), value);
    }

    fn ports(&mut self, name: &str, ports: &[Port], ty: impl Fn(&str) -> Option<String>) {
        let mut values = Vec::new();
        for (at, port) in ports.iter().enumerate() {
            let ty = ty(&port.name).unwrap_or_else(|| "not used".to_owned());
            let declared =
                port.carried().map_or_else(String::new, |_| format!(" (declared {})", port.dtype));
            let label = if at == 0 { name } else { "" };
            let text = crate::error::escaped(&format!("{} : {ty}{declared}", port.name));
            self.text.push_str(&format!(" {label:<17} {text}\n"));
            values.push(json!({"name": port.name, "type": ty, "onnx_dtype": port.dtype}));
        }
        self.fields.insert(name.to_owned(), Value::Array(values));
    }

    fn nodes(&mut self, graph: &Graph) {
        let mut table = Table::new(&[
            ("value", Align::Left),
            ("op", Align::Left),
            ("type", Align::Left),
            ("from", Align::Left),
        ]);
        let mut values = Vec::new();
        for id in graph.order() {
            let node = graph.node(id);
            let origin = node.note.origin.clone();
            values.push(json!({
                "name": node.name.as_str(),
                "op": node.op.name(),
                "type": node.ty.to_string(),
                "region": node.region.name(),
                "origin": origin,
            }));
            let cells = [node.name.to_string(), node.op.name().to_owned(), node.ty.to_string()];
            table.row(cells.into_iter().chain([origin.unwrap_or_default()]));
        }
        self.fields.insert("nodes".to_owned(), Value::Array(values));
        self.text.push('\n');
        self.text.push_str(&table.render(width()));
    }
}
