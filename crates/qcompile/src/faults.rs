//! The errors of the libraries below as errors of the driver: with a code, a place and what to do.

use crate::error::{Code, Error};
use qcompile_codegen::CodegenError;
use qcompile_ir::GraphError;
use qcompile_onnx::{ExportError, ImportError, Need, Problem};
use qcompile_passes::PassError;
use qcompile_plan::{FileError, PlanError};
use qcompile_runtime::RuntimeError;
use std::collections::BTreeSet;

fn with_problems(error: Error, problems: Vec<Problem>) -> Error {
    problems.into_iter().fold(error, |error, problem| {
        error.at(match problem.place {
            Some(place) => format!("{place}: {}", problem.reason),
            None => problem.reason,
        })
    })
}

impl From<ImportError> for Error {
    fn from(error: ImportError) -> Error {
        match error {
            ImportError::Refused { what, found, limit } => Error::new(
                Code::Limit,
                format!("the model has {found} {what}, the limit is {limit}"),
            ),
            ImportError::Malformed { .. } => Error::new(Code::ModelFormat, error.to_string()),
            ImportError::Unsupported(nodes, problems) => {
                let count = nodes.len();
                let plural = if count == 1 { "node is" } else { "nodes are" };
                let error =
                    Error::new(Code::ModelUnsupported, format!("{count} {plural} not supported"));
                let needs: BTreeSet<Need> =
                    nodes.iter().flat_map(|node| node.needs.iter().cloned()).collect();
                let error = needs.iter().fold(error, |error, need| {
                    error.help(match need {
                        Need::Size(name) => format!("a fixed `{name}` is given by {need}"),
                        Need::Value(name) => {
                            format!("if `{name}` is the same in every step: {need}")
                        }
                    })
                });
                let error = nodes.into_iter().fold(error, |error, node| {
                    let domain = if node.domain.is_empty() { "" } else { "." };
                    let op = format!("{}{domain}{}", node.domain, node.op);
                    error.at(format!(
                        "node `{}` ({op}, opset {}): {}",
                        node.node, node.opset, node.reason
                    ))
                });
                with_problems(error, problems)
            }
            ImportError::MissingDims(dims) => {
                let error =
                    Error::new(Code::ModelShape, "sizes of symbolic dimensions are missing");
                let mut names = BTreeSet::new();
                dims.into_iter().fold(error, |error, dim| {
                    let error = error.at(format!("input `{}`, axis {}", dim.input, dim.axis));
                    let flag = format!("--dim {}=SIZE", dim.name);
                    if names.insert(dim.name) { error.help(flag) } else { error }
                })
            }
            ImportError::InvalidModel(problems) => {
                with_problems(Error::new(Code::ModelFormat, "the model is invalid"), problems)
            }
            ImportError::NoMatch { option, value, nearest } => {
                let error =
                    Error::usage(format!("--{option} {value} matches nothing in this model"));
                if nearest.is_empty() {
                    error
                } else {
                    error.help(format!("nearest: {}", nearest.join(", ")))
                }
            }
        }
    }
}

impl From<ExportError> for Error {
    fn from(error: ExportError) -> Error {
        let text = error.to_string();
        match error {
            ExportError::OpsetRange { .. } => Error::usage(text),
            ExportError::Opset { needs, .. } => Error::new(Code::ModelUnsupported, text)
                .help(format!("--opset {needs} or newer writes it")),
            ExportError::Unsupported { .. } => Error::new(Code::ModelUnsupported, text),
            ExportError::NoPort { .. } => Error::new(Code::PlanMismatch, text),
            ExportError::TooLarge { .. } => Error::new(Code::Limit, text)
                .help("--format safetensors and npz hold the weights whatever their size"),
        }
    }
}

impl From<PassError> for Error {
    fn from(error: PassError) -> Error {
        let text = error.to_string();
        match error {
            PassError::Loss { .. } => Error::usage(text).help(
                "--loss is cross-entropy, mse, bce (with logits) or output (the first output is the loss)",
            ),
            PassError::NotDifferentiable { .. } | PassError::NothingToTrain { .. } => {
                Error::new(Code::NoGradient, text)
            }
            PassError::Unsupported { pass: "quantize", .. } => Error::usage(text),
            PassError::Unsupported { .. } => Error::new(Code::ModelUnsupported, text),
            PassError::Evaluation { .. } => Error::new(Code::Precision, text),
            PassError::Graph(_) | PassError::Verify { .. } => Error::new(Code::Internal, text),
        }
    }
}

impl From<GraphError> for Error {
    fn from(error: GraphError) -> Error {
        Error::new(Code::Internal, error.to_string())
    }
}

impl From<PlanError> for Error {
    fn from(error: PlanError) -> Error {
        let code = match &error {
            PlanError::Verify(_) => Code::Internal,
            PlanError::TooLarge { .. } => Code::Limit,
            _ => Code::ModelUnsupported,
        };
        Error::new(code, error.to_string())
    }
}

impl From<FileError> for Error {
    fn from(error: FileError) -> Error {
        let code = match &error {
            FileError::Io { .. } => Code::ReadFailed,
            _ => Code::PlanFormat,
        };
        Error::new(code, error.to_string())
    }
}

impl From<CodegenError> for Error {
    fn from(error: CodegenError) -> Error {
        Error::new(Code::Internal, error.to_string())
    }
}

impl From<RuntimeError> for Error {
    fn from(error: RuntimeError) -> Error {
        let text = error.to_string();
        let code = match error {
            RuntimeError::Input { .. } | RuntimeError::Value { .. } => Code::DataShape,
            RuntimeError::Missing(_) => Code::PlanMismatch,
            RuntimeError::Label { .. } => Code::DataLabel,
            RuntimeError::Index { .. } => Code::DataIndex,
            RuntimeError::Memory { .. }
            | RuntimeError::Refused { .. }
            | RuntimeError::Threads(_)
            | RuntimeError::Batch { .. } => Code::Limit,
            RuntimeError::Checkpoint(_) => Code::CheckpointFormat,
            RuntimeError::Exchange(_) => Code::Internal,
            RuntimeError::Codegen(_) | RuntimeError::Panicked(_) => Code::Internal,
        };
        Error::new(code, text)
    }
}
