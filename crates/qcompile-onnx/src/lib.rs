//! `model.onnx` to [`Graph`], and back.
//!
//! [`import`] scans the bytes against [`Limits`], decodes them, orders the nodes, and imports each through one
//! function per operator. Shapes are computed at compile time, with the batch size N inside them; everything that
//! is not supported is reported at once. [`export`](export()) writes a forward graph as a model.
#![forbid(unsafe_code)]

mod bind;
mod body;
mod build;
mod control;
mod dims;
mod draft;
mod dynamic;
mod error;
mod export;
mod fold;
mod function;
mod import;
mod index;
mod known;
mod node;
mod ops;
mod order;
mod pattern;
#[cfg(test)]
mod quantized_tests;
#[cfg(test)]
mod refusal_tests;
mod scan;
mod survey;
mod tensor;
#[cfg(test)]
mod tests;

pub use error::{ImportError, MissingDim, Need, Problem, UnsupportedNode};
pub use export::{EXPORT_OPSETS, Export, ExportError, ExportOptions, export};
pub use import::import;
pub use scan::{Census, Limits, scan};
pub use survey::{STAND_IN, Survey, SurveyedNode, Verdict, survey};

use qcompile_ir::{Graph, Tensor, TensorType};
use std::collections::BTreeMap;

/// Reads `length` bytes at `offset` of the external data file `location`, a path relative to the model's folder.
/// Whoever provides it confines it to that folder; this crate does no I/O.
pub type External<'a> = &'a dyn Fn(&str, u64, u64) -> Result<Vec<u8>, String>;

/// What `BatchNormalization` does, whatever the model says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BatchNorm {
    /// As the model says.
    #[default]
    Model,
    /// Statistics of the batch; running statistics are updated.
    Train,
    /// Running statistics, which stay as they are.
    Frozen,
}

/// How a model is imported.
#[derive(Clone)]
pub struct ImportOptions<'a> {
    /// Sizes of symbolic dimensions by name, or by `INPUT.AXIS`.
    pub dims: BTreeMap<String, usize>,
    /// Shapes of inputs, by name: for undeclared shapes, and for symbolic dimensions that `dims` says nothing of.
    pub shapes: BTreeMap<String, Vec<usize>>,
    /// Values of inputs, which become constants.
    pub values: BTreeMap<String, Tensor>,
    /// Reads external data.
    pub external: External<'a>,
    /// What to train: globs on names of initializers and nodes, `op:Conv` on operators. Everything, if empty.
    pub train: Vec<String>,
    /// What not to train, in the same form.
    pub freeze: Vec<String>,
    /// What `BatchNormalization` does.
    pub batch_norm: BatchNorm,
    /// What the file may contain.
    pub limits: Limits,
}

impl Default for ImportOptions<'_> {
    fn default() -> Self {
        ImportOptions {
            dims: BTreeMap::new(),
            shapes: BTreeMap::new(),
            values: BTreeMap::new(),
            external: &no_external,
            train: Vec::new(),
            freeze: Vec::new(),
            batch_norm: BatchNorm::Model,
            limits: Limits::default(),
        }
    }
}

fn no_external(_: &str, _: u64, _: u64) -> Result<Vec<u8>, String> {
    Err("external data is not available here".to_owned())
}

/// An input or output of the model, in the layout that ONNX gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Its ONNX name.
    pub name: String,
    /// Its type in the graph; N is the batch size.
    pub ty: TensorType,
    /// Its ONNX element type (`float64` where the graph has f32).
    pub onnx_dtype: String,
}

/// An imported model.
#[derive(Clone, Debug)]
pub struct Import {
    /// The model as a graph: parameters carry the names of their initializers.
    pub graph: Graph,
    /// Inputs in ONNX order, without those whose values were given.
    pub inputs: Vec<Port>,
    /// Outputs in ONNX order.
    pub outputs: Vec<Port>,
    /// The trainable initializers: ONNX name to name in the graph.
    pub parameters: BTreeMap<String, String>,
    /// What was changed or assumed, to be told.
    pub warnings: Vec<String>,
}
