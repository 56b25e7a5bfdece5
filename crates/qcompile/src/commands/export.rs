//! `qcompile export`.

use super::{print_json, refuse_overwriting};
use crate::cli::{ExportCommand, ExportFormat};
use crate::error::{Code, Error, Result};
use crate::export::{DEFAULT_OPSET, Exported};
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
    if command.opset.is_some() && format != ExportFormat::Onnx {
        return Err(Error::usage(format!("--opset is for --format onnx, not {}", format.name())));
    }
    let place = |error: Error| at_path(error, &command.target);
    let target = open(&command.target)?;
    if matches!(target, Target::Plan(_) | Target::Checkpoint(..)) && command.import.is_given() {
        let cause = "a plan is imported already: --freeze, --train, --dim, --constant and --batch-norm are for models";
        return Err(place(Error::new(Code::PlanMismatch, cause)));
    }
    refuse_overwriting(&command.output, &command.target)?;
    check_writable(&command.output)?;
    let options = Options::default().with_import(&command.import);
    let exported = Exported::of(&target, &command.target, &options).map_err(place)?;
    let mut fields = Map::new();
    let mut said = String::new();
    let mut warnings = exported.warnings.clone();
    let content = match format {
        ExportFormat::Onnx => {
            let opset = command.opset.unwrap_or(DEFAULT_OPSET);
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
