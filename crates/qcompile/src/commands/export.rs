//! `qcompile export`.

use super::{in_data, print_json, refuse_overwriting};
use crate::cli::{ExportCommand, ExportFormat};
use crate::error::{Code, Error, Result};
use crate::export::{DEFAULT_OPSET, Exported, Quantized};
use crate::model::{Target, at_path, open};
use crate::options::Options;
use crate::output::{check_writable, print, write_atomically};
use crate::terminal::{bytes, count};
use clap::ValueEnum;
use serde_json::{Map, Value, json};
use std::fmt::Write as _;
use std::path::Path;

pub(super) fn run(command: &ExportCommand) -> Result<()> {
    let format = format_of(command)?;
    let is_model = matches!(format, ExportFormat::Onnx | ExportFormat::QdqOnnx);
    if command.opset.is_some() && !is_model {
        return Err(Error::usage(format!(
            "--opset is for --format onnx and qdq-onnx, not {}",
            format.name()
        )));
    }
    let integers = format == ExportFormat::QdqOnnx;
    let machine = command.machine.threads != 0 || command.machine.tier.is_some();
    if machine && !integers {
        return Err(Error::usage(
            "--threads and --tier are for --format qdq-onnx: nothing else runs the model",
        ));
    }
    if let Some(flag) = given(command).filter(|_| !integers) {
        let cause = format!("{flag} is for --format qdq-onnx, not {}", format.name());
        return Err(Error::usage(cause));
    }
    let place = |error: Error| at_path(error, &command.target);
    let target = open(&command.target)?;
    if matches!(target, Target::Plan(_) | Target::Checkpoint(..)) && command.import.is_given() {
        let cause = "a plan is imported already: --freeze, --train, --dim, --constant and --batch-norm are for models";
        return Err(place(Error::new(Code::PlanMismatch, cause)));
    }
    refuse_overwriting(&command.output, &command.target)?;
    check_writable(&command.output)?;
    let options = options(command)?;
    let mut exported = Exported::of(&target, &command.target, &options).map_err(place)?;
    let mut fields = Map::new();
    let mut said = String::new();
    let mut warnings = exported.warnings.clone();
    let content = match format {
        ExportFormat::Onnx | ExportFormat::QdqOnnx => {
            let machine = machine.then_some("--threads or --tier");
            let unused = given(command).or(machine);
            if let Some(flag) = unused.filter(|_| integers && exported.is_trained()) {
                let cause =
                    format!("the plan was trained with its ranges: {flag} has no say in them");
                return Err(place(Error::usage(cause)));
            }
            if integers {
                let data = command.data.as_deref().unwrap_or_default();
                let done = exported.quantize(&options).map_err(|e| in_data(e, data));
                let Quantized { layers, kept, samples } = done.map_err(place)?;
                let _ = write!(said, "{layers} layers on integers, {kept} in f32, ");
                fields.insert("layers".to_owned(), json!(layers));
                fields.insert("layers_f32".to_owned(), json!(kept));
                fields.insert("samples".to_owned(), json!(samples));
                warnings.clone_from(&exported.warnings);
            }
            let small = integers && exported.has_int4();
            let opset = command.opset.unwrap_or(if small { 21 } else { DEFAULT_OPSET });
            let model = exported.onnx(opset).map_err(place)?;
            let nodes: usize = model.operators.values().sum();
            let _ = write!(said, "opset {opset}, {nodes} nodes, ");
            fields.insert("opset".to_owned(), json!(opset));
            fields.insert("operators".to_owned(), json!(model.operators));
            if exported.widened > 0 {
                warnings.push(format!(
                    "{} layers of the plan run in less than f32: the model is written in f32, with the trained weights",
                    exported.widened
                ));
            }
            model.bytes
        }
        ExportFormat::Safetensors => exported.safetensors()?,
        ExportFormat::Npz => exported.npz()?,
    };
    command.talk.warn(&warnings);
    write_atomically(&command.output, &content)?;
    let path = command.output.display().to_string();
    let parameters = exported.parameters();
    if command.talk.json {
        fields.insert("bytes".to_owned(), json!(content.len()));
        fields.insert("file".to_owned(), json!(path));
        fields.insert("format".to_owned(), json!(format.name()));
        fields.insert("parameters".to_owned(), json!(parameters));
        fields.insert("warnings".to_owned(), json!(warnings));
        return print_json(&Value::Object(fields), false);
    }
    let size = bytes(content.len() as u64);
    print(&format!("{path}: {said}{} parameters, {size}\n", count(parameters)))
}

/// A flag that was given and is for integers alone.
fn given(command: &ExportCommand) -> Option<&'static str> {
    let flags = [
        ("--data", command.data.is_some()),
        ("--samples", command.samples.is_some()),
        ("--batch-size", command.batch_size.is_some()),
        ("--keep", !command.keep.is_empty()),
    ];
    let flag = flags.into_iter().find_map(|(flag, given)| given.then_some(flag));
    flag.or_else(|| command.ranged.given())
}

fn options(command: &ExportCommand) -> Result<Options> {
    command.machine.trainer(1)?;
    let standard = Options::default();
    let options = Options {
        data: command.data.clone(),
        samples: command.samples,
        batch_size: command.batch_size.unwrap_or(standard.batch_size),
        keep_f32: command.keep.clone(),
        threads: command.machine.threads,
        tier: command.machine.tier,
        ..standard
    };
    let options = options.with_import(&command.import).with_ranged(&command.ranged);
    options.check()?;
    Ok(options)
}

/// The format that was asked for, or that the ending of the output says.
fn format_of(command: &ExportCommand) -> Result<ExportFormat> {
    if let Some(format) = command.format {
        return Ok(format);
    }
    let ending = Path::new(&command.output).extension().unwrap_or_default();
    let known = ExportFormat::value_variants();
    known.iter().copied().find(|format| ending == format.name()).ok_or_else(|| {
        let names: Vec<&str> = known.iter().map(|format| format.name()).collect();
        Error::usage("--format says what is written").at(command.output.display().to_string()).help(
            format!(
                "formats are {}; a file with such an ending says it by itself",
                names.join(", ")
            ),
        )
    })
}
