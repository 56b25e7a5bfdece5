//! `qcompile MODEL.onnx`.

use super::{beside, in_data, print_json, refuse_overwriting, timings_path};
use crate::cli::{Cli, CompileCommand, Emit};
use crate::compile::{Compiled, finish};
use crate::error::{Code, Error, Result};
use crate::model::{at_path, draft, open};
use crate::options::Options;
use crate::output::{check_writable, print, write_atomically};
use crate::street::{Draft, Pass, Street, write_dump};
use crate::summary;
use crate::terminal::{Show, bytes, milliseconds, say, say_verb};
use clap::CommandFactory;
use qcompile_codegen::{asm_text, clif_text};
use qcompile_kernels::Tier;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub(super) fn run(cli: &Cli) -> Result<()> {
    let command = &cli.compile;
    let Some(model) = &command.model else {
        return Err(Error::usage("no model is given"));
    };
    command.machine.trainer(1)?;
    command.compile.check()?;
    let options = Options {
        timings: timings_path(),
        measure: !command.no_measure && command.emit == Emit::Plan,
        ..cli.options()
    };
    let show = command.talk.show();
    let output = output_path(command, model);
    let begin = Instant::now();
    let target = open(model).map_err(mistaken_command(model))?;
    let mut draft = draft(&target, model, &options)?;
    drop(target);
    if let Some(path) = &output {
        refuse_overwriting(path, model)?;
        check_writable(path)?;
    }
    say_verb(show, "Importing", &imported(model, &draft));
    let mut spent: Vec<(Pass, Duration)> = Vec::new();
    let mut each = |pass: Pass, draft: &Draft, took: Duration| {
        spent.push((pass, took));
        dump(command, model, pass, draft)
    };
    if let Some(word) = &command.stop_after {
        let last = pass(word)?;
        if draft.is_after(last) {
            let cause = format!("the graph has been through `{word}` already");
            return Err(Error::usage(cause).at(model.display().to_string()));
        }
        Street::new(&options, show, &mut each)
            .run(&mut draft, last)
            .map_err(|e| place(e, model, &options))?;
        say_times(command, &spent);
        return write_dump(&draft, output.as_deref());
    }
    if command.emit == Emit::Graph {
        Street::new(&options, show, &mut each)
            .run(&mut draft, Pass::LAST)
            .map_err(|e| place(e, model, &options))?;
        say_times(command, &spent);
        return write_dump(&draft, output.as_deref());
    }
    let told = command.time_passes || !command.dump_after.is_empty();
    let compiled = finish(draft, &options, show, told.then_some(&mut each))
        .map_err(|e| place(e, model, &options))?;
    say_times(command, &spent);
    match (command.emit, &output) {
        (Emit::Plan | Emit::Graph, _) => {}
        (form, path) => return write_text(&text(&compiled, form, &options)?, path.as_deref()),
    }
    let path = output.unwrap_or_else(|| beside(model, ".qplan"));
    let content = compiled.plan.to_bytes();
    write_atomically(&path, &content)?;
    let size = bytes(content.len() as u64);
    let took = milliseconds(begin.elapsed().as_secs_f64() * 1e3);
    command.talk.warn(&compiled.warnings);
    say_verb(show, "Finished", &format!("{} ({size}) in {took}", path.display()));
    if command.talk.json {
        return print_json(&summary::document(&compiled, model, Some(&path)), false);
    }
    print(&summary::text(&compiled, command.talk.verbose > 0))
}

/// A command that is misspelt is taken for a model that is not there.
fn mistaken_command(model: &Path) -> impl Fn(Error) -> Error {
    move |error| {
        let command = Cli::command();
        let names = command.get_subcommands().map(clap::Command::get_name);
        match model.to_str() {
            Some(word) if !model.exists() => error.did_you_mean(word, names),
            _ => error,
        }
    }
}

fn pass(word: &str) -> Result<Pass> {
    word.parse().map_err(|()| Error::usage(format!("there is no pass `{word}`")))
}

/// Where the result goes: a plan always to a file, texts to stdout unless a file is named.
fn output_path(command: &CompileCommand, model: &Path) -> Option<PathBuf> {
    let text = command.stop_after.is_some() || command.emit != Emit::Plan;
    match &command.output {
        Some(path) => Some(path.clone()),
        None if text => None,
        None => Some(beside(model, ".qplan")),
    }
}

fn imported(model: &Path, draft: &Draft) -> String {
    let graph = &draft.graph;
    let parameters: u64 = graph
        .leaves(|op| matches!(op, qcompile_ir::Op::Param(_)))
        .into_iter()
        .filter_map(|id| Some(graph.ty(id).shape.elements()?.size(1) as u64))
        .sum();
    let count = crate::terminal::count(parameters);
    format!("{} ({} values, {count} parameters)", model.display(), graph.len())
}

fn dump(command: &CompileCommand, model: &Path, pass: Pass, draft: &Draft) -> Result<()> {
    if !command.dump_after.iter().any(|word| word == "all" || word == pass.name()) {
        return Ok(());
    }
    let number = Pass::ALL.iter().position(|other| *other == pass).unwrap_or(0);
    let name = beside(model, &format!(".{number:02}-{}.qir", pass.name()));
    let folder = &command.dump_dir;
    std::fs::create_dir_all(folder).map_err(|e| Error::write(folder.display().to_string(), &e))?;
    write_dump(draft, Some(&folder.join(name)))
}

fn say_times(command: &CompileCommand, spent: &[(Pass, Duration)]) {
    if command.time_passes {
        for (pass, took) in spent {
            let took = milliseconds(took.as_secs_f64() * 1e3);
            say(&format!("{took:>10}  {}", pass.name()));
        }
    }
}

fn text(compiled: &Compiled, form: Emit, options: &Options) -> Result<String> {
    let tier = options.tier.unwrap_or_else(Tier::detect);
    let options = qcompile_codegen::Options { tier };
    match form {
        Emit::PlanText => Ok(compiled.plan.to_string()),
        Emit::Clif => Ok(clif_text(&compiled.plan, &options)?),
        Emit::Asm => Ok(asm_text(&compiled.plan, &options)?),
        Emit::Plan | Emit::Graph => Err(Error::new(Code::Internal, "this form is no text")),
    }
}

fn write_text(text: &str, path: Option<&Path>) -> Result<()> {
    match path {
        Some(path) => write_atomically(path, text.as_bytes()),
        None => print(text),
    }
}

/// The compile that another command begins with, when it is given a model.
pub(super) fn in_passing(model: &Path, options: &Options, show: Show) -> Result<Compiled> {
    let target = open(model)?;
    let draft = draft(&target, model, options)?;
    drop(target);
    say_verb(show, "Importing", &imported(model, &draft));
    finish(draft, options, show, None).map_err(|e| place(e, model, options))
}

/// An error of the passes with its place: the data, if it is about data, else the model.
fn place(error: Error, model: &Path, options: &Options) -> Error {
    match &options.data {
        Some(data) if error.code().text().starts_with("QC05") => in_data(error, data),
        _ if !error.places().is_empty() => error,
        _ => at_path(error, model),
    }
}
