//! Why a model was not imported, by what the caller can do about it.

use std::fmt::{self, Write as _};
use thiserror::Error;

/// One node that cannot be imported.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct UnsupportedNode {
    /// Its name, or `Op_index` if it has none.
    pub node: String,
    /// Its operator.
    pub op: String,
    /// The operator's domain, empty for ONNX's own.
    pub domain: String,
    /// The opset version of the domain, 0 if the model imports none.
    pub opset: i64,
    /// What is not supported.
    pub reason: String,
    /// What it could perhaps be imported with.
    pub needs: Vec<Need>,
}

/// What an import could be told. Displays as the flag that tells it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
    /// The size of this symbolic dimension.
    Size(String),
    /// The value of this input.
    Value(String),
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Need::Size(name) => write!(f, "--dim {name}=SIZE"),
            Need::Value(name) => write!(f, "--constant {name}=VALUE[,VALUE...]"),
        }
    }
}

/// One contradiction in a model.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// The node (or the value or initializer) that it concerns, with its operator; none for the whole model.
    pub place: Option<String>,
    /// What is wrong.
    pub reason: String,
}

/// A symbolic dimension that needs a size.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MissingDim {
    /// The name to give it by: its own, or `INPUT.AXIS` if it has none.
    pub name: String,
    /// The input that has it.
    pub input: String,
    /// The axis.
    pub axis: usize,
}

/// Why a model was not imported.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ImportError {
    /// It is beyond a limit: raise the limit, or do not trust the file.
    #[error("refused: {found} {what}, the limit is {limit}")]
    Refused {
        /// What is counted.
        what: &'static str,
        /// How many there are, at least.
        found: usize,
        /// How many may be.
        limit: usize,
    },
    /// It is not an ONNX file, or not the whole of one.
    #[error("not a valid ONNX file{}: {reason}", offset.map(|at| format!(" (byte {at})")).unwrap_or_default())]
    Malformed {
        /// Where, if known.
        offset: Option<usize>,
        /// What is wrong.
        reason: String,
    },
    /// It uses what this importer does not know: every such node, and every contradiction that was found as well.
    #[error("{}{}", list_unsupported(.0), list_problems(.1))]
    Unsupported(Vec<UnsupportedNode>, Vec<Problem>),
    /// Symbolic dimensions other than the batch need sizes.
    #[error("{}", list_missing(.0))]
    MissingDims(Vec<MissingDim>),
    /// It contradicts itself or the ONNX standard: every place found.
    #[error("the model is invalid:{}", list_problems(.0))]
    InvalidModel(Vec<Problem>),
    /// An option names nothing in this model.
    #[error("{option} `{value}` matches nothing in this model{}", nearest_text(nearest))]
    NoMatch {
        /// The option: `train`, `freeze`, `dim` or `constant`.
        option: &'static str,
        /// What was given.
        value: String,
        /// Names in the model that come closest.
        nearest: Vec<String>,
    },
}

fn nearest_text(nearest: &[String]) -> String {
    if nearest.is_empty() { String::new() } else { format!("; nearest: {}", nearest.join(", ")) }
}

fn list_unsupported(nodes: &[UnsupportedNode]) -> String {
    let mut text = format!("{} node(s) are not supported:", nodes.len());
    for node in nodes {
        let domain = if node.domain.is_empty() { "" } else { "." };
        let _ = write!(
            text,
            "\n  {}: {}{domain}{} (opset {}): {}",
            node.node, node.domain, node.op, node.opset, node.reason
        );
        for need in &node.needs {
            let _ = write!(text, "; perhaps with {need}");
        }
    }
    text
}

fn list_missing(dims: &[MissingDim]) -> String {
    let mut text = "sizes of symbolic dimensions are missing; give them by:".to_owned();
    for dim in dims {
        let _ =
            write!(text, "\n  --dim {}=SIZE (axis {} of input {})", dim.name, dim.axis, dim.input);
    }
    text
}

fn list_problems(problems: &[Problem]) -> String {
    let mut text = String::new();
    for problem in problems {
        match &problem.place {
            Some(place) => {
                let _ = write!(text, "\n  {place}: {}", problem.reason);
            }
            None => {
                let _ = write!(text, "\n  {}", problem.reason);
            }
        }
    }
    text
}

/// Why one node was not imported; the importer adds the place.
#[derive(Debug)]
pub(crate) enum Obstacle {
    /// Valid ONNX that is not supported.
    Unsupported(String),
    /// What only a fixed batch size allows.
    Batch(String),
    /// An operand that has to be known, and the inputs of the model that it depends on.
    Unknown(String, Vec<String>),
    /// Not valid ONNX.
    Invalid(String),
    /// An operand could not be imported, which is reported already.
    Operand,
}

impl Obstacle {
    pub(crate) fn unsupported(reason: impl Into<String>) -> Obstacle {
        Obstacle::Unsupported(reason.into())
    }

    pub(crate) fn batch(reason: impl Into<String>) -> Obstacle {
        Obstacle::Batch(reason.into())
    }

    pub(crate) fn invalid(reason: impl Into<String>) -> Obstacle {
        Obstacle::Invalid(reason.into())
    }
}
