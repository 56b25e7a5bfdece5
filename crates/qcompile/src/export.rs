//! The way out: what a plan, checkpoint or model computes as an ONNX model, and its weights for other programs.

use crate::about::{About, Port};
use crate::data::{Array, npz};
use crate::error::{Code, Error, Result};
use crate::model::{Target, checkpoint_values, draft};
use crate::options::Options;
use crate::qdq;
use crate::street::evaluation_form;
use crate::tensors::to_array;
use qcompile_ir::{DType, Graph, LeafValues, Op, Tensor};
use qcompile_onnx::{Export, ExportOptions};
use qcompile_passes::{quantize, simplify, update};
use qcompile_runtime::checkpoint;
use safetensors::tensor::TensorView;
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// The opset that is written if none is asked for: the first with LayerNormalization, and known to every runtime of
/// the last years.
pub const DEFAULT_OPSET: u32 = 17;

/// The entry of a safetensors file's metadata.
const ENTRY: &str = "qcompile";

/// What can be exported: a model in its evaluation form, and its weights.
#[derive(Debug, Clone)]
pub struct Exported {
    form: Graph,
    about: About,
    /// Parameters by their ONNX names.
    parameters: BTreeMap<String, Tensor>,
    /// Running statistics by their ONNX names.
    states: BTreeMap<String, Tensor>,
    /// The form with the roundings that it was trained with.
    trained: Option<Graph>,
    /// What the import changed or assumed, to be told.
    pub warnings: Vec<String>,
    /// Layers that the plan runs in less than f32, and the written model in f32.
    pub widened: usize,
}

/// What [`Exported::quantize`] did.
#[derive(Debug, Clone, Copy)]
pub struct Quantized {
    /// Layers that compute on integers.
    pub layers: usize,
    /// Layers that stay f32.
    pub kept: usize,
    /// Samples that ranges were measured on.
    pub samples: usize,
}

impl Exported {
    /// Takes what a path holds; `options` are for the import of a model.
    ///
    /// # Errors
    /// Of the import, of the checkpoint, and where nothing is left to evaluate.
    pub fn of(target: &Target, path: &Path, options: &Options) -> Result<Exported> {
        match target {
            Target::Model(_) | Target::Graph(_) => {
                let draft = draft(target, path, options)?;
                let form = evaluation_form(&draft.graph)?;
                let warnings = draft.about.warnings.clone();
                Exported::new(&draft.graph, form, draft.about, warnings)
            }
            Target::Plan(plan) => Exported::of_plan(plan.graph(), plan.evaluation(), plan, None),
            Target::Checkpoint(plan, state) => {
                let values = checkpoint_values(plan, state)?;
                Exported::of_plan(plan.graph(), plan.evaluation(), plan, Some(&values))
            }
        }
    }

    fn of_plan(
        graph: &Graph,
        evaluation: Option<&qcompile_plan::Plan>,
        plan: &qcompile_plan::Plan,
        values: Option<&LeafValues>,
    ) -> Result<Exported> {
        let about = About::of_plan(plan)?;
        let mut graph = graph.clone();
        let mut form = match evaluation {
            Some(form) => form.graph().clone(),
            None => evaluation_form(&graph)?,
        };
        if let Some(values) = values {
            graph = graph.with_values(values)?;
            form = form.with_values(values)?;
        }
        let mut trained = None;
        if about.options.contains_key("qat") {
            // Folded into rounded weights, normalization would not come out again.
            trained = Some(std::mem::replace(&mut form, evaluation_form(&graph)?));
        }
        if about.options.get("master-weights").is_some_and(|word| word == "off") {
            for form in std::iter::once(&mut form).chain(&mut trained) {
                update::widen(form)?;
            }
        }
        let low = about.decisions.iter().filter(|decision| decision.precision.is_low()).count();
        let widened = low > 0 && quantize::remove(&mut form)?;
        if widened {
            simplify::run(&mut form, &simplify::Options { keep_stop_gradient: false })?;
        }
        let mut exported = Exported::new(&graph, form, about, Vec::new())?;
        for (name, tensor) in &mut exported.parameters {
            // What is stored in bf16 for training only leaves as the f32 that the form has.
            let leaf = exported.form.find(name).map(|id| exported.form.op(id));
            if let Some(Op::Param(wide)) = leaf.filter(|_| tensor.dtype() == DType::BF16) {
                *tensor = wide.as_ref().clone();
            }
        }
        Ok(Exported { widened: if widened { low } else { 0 }, trained, ..exported })
    }

    fn new(graph: &Graph, form: Graph, about: About, warnings: Vec<String>) -> Result<Exported> {
        let (mut parameters, mut states) = (BTreeMap::new(), BTreeMap::new());
        for id in graph.ids() {
            let node = graph.node(id);
            let name = node.name.as_str();
            match &node.op {
                Op::Param(tensor) => {
                    parameters.insert(name.to_owned(), tensor.as_ref().clone());
                }
                Op::State(tensor) if about.states.iter().any(|state| state == name) => {
                    states.insert(name.to_owned(), tensor.as_ref().clone());
                }
                _ => {}
            }
        }
        Ok(Exported { form, about, parameters, states, trained: None, warnings, widened: 0 })
    }

    /// Whether the model was trained with its roundings: it has ranges.
    #[must_use]
    pub fn is_trained(&self) -> bool {
        self.trained.is_some()
    }

    /// Whether integers of 4 bits are stored.
    #[must_use]
    pub fn has_int4(&self) -> bool {
        self.form.ids().any(|id| self.form.ty(id).dtype == DType::I4)
    }

    /// Folds batch normalization into weights, as it is in inference on integers.
    ///
    /// # Errors
    /// Only by a defect.
    pub fn fold(&mut self) -> Result<()> {
        qdq::fold(&mut self.form)
    }

    /// Makes the model compute on integers: with the ranges that it was trained with, or else with ranges measured on
    /// `options.data`.
    ///
    /// # Errors
    /// Usage, without data or with options that a trained model leaves no choice of; of calibration.
    pub fn quantize(&mut self, options: &Options) -> Result<Quantized> {
        self.widened = 0;
        if let Some(mut form) = self.trained.take() {
            qdq::trained(&mut form)?;
            self.form = form;
            let all = self.about.decisions.len();
            let layers = self.about.decisions.iter().filter(|layer| layer.precision.is_quantized());
            let layers = layers.count();
            return Ok(Quantized { layers, kept: all - layers, samples: 0 });
        }
        let done = qdq::post_training(&mut self.form, &self.about, options)?;
        self.warnings.extend(done.notes);
        Ok(Quantized { layers: done.layers, kept: done.kept, samples: done.samples })
    }

    /// Number of trained parameters.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        self.parameters.values().map(|tensor| tensor.elements() as u64).sum()
    }

    /// The ONNX model.
    ///
    /// # Errors
    /// Where ONNX or this opset has no form for a value, and where a file cannot hold it.
    pub fn onnx(&self, opset: u32) -> Result<Export> {
        let inputs = self.ports(&self.about.inputs, |name| self.form.find(name));
        let outputs = self.ports(&self.about.outputs, |name| {
            self.form.outputs().iter().find(|(output, _)| output == name).map(|(_, id)| *id)
        });
        if outputs.is_empty() {
            return Err(Error::new(
                Code::PlanMismatch,
                "nothing that the model gives is computed by its evaluation form",
            ));
        }
        let options = ExportOptions {
            opset,
            inputs: &inputs,
            outputs: &outputs,
            producer_version: env!("CARGO_PKG_VERSION"),
        };
        Ok(qcompile_onnx::export(&self.form, &options)?)
    }

    /// Ports with the types that the evaluation form has; those that it does not have are left out.
    fn ports(
        &self,
        ports: &[Port],
        find: impl Fn(&str) -> Option<qcompile_ir::NodeId>,
    ) -> Vec<qcompile_onnx::Port> {
        let port = |port: &Port| {
            let ty = self.form.ty(find(&port.name)?).clone();
            Some(qcompile_onnx::Port {
                name: port.name.clone(),
                ty,
                onnx_dtype: port.dtype.clone(),
            })
        };
        ports.iter().filter_map(port).collect()
    }

    fn weights(&self) -> impl Iterator<Item = (&String, &Tensor)> {
        // In order of the names, whatever they are.
        let all: BTreeMap<_, _> = self.parameters.iter().chain(&self.states).collect();
        all.into_iter()
    }

    /// The weights as a safetensors file: equal bytes for equal weights.
    ///
    /// # Errors
    /// If they are beyond what the format holds.
    pub fn safetensors(&self) -> Result<Vec<u8>> {
        let refused = |e: safetensors::SafeTensorError| Error::new(Code::Limit, e.to_string());
        let mut views = BTreeMap::new();
        for (name, tensor) in self.weights() {
            let shape = tensor.shape().to_vec();
            let view =
                TensorView::new(checkpoint::file_type(tensor.dtype()), shape, tensor.bytes());
            views.insert(name.clone(), view.map_err(refused)?);
        }
        let states: Vec<&String> = self.states.keys().collect();
        let entry = json!({
            "kind": "weights",
            "running_statistics": states,
            "version": env!("CARGO_PKG_VERSION"),
        });
        // One entry only: a map of several would be written in random order.
        let metadata = HashMap::from([(ENTRY.to_owned(), entry.to_string())]);
        safetensors::serialize(views, Some(metadata)).map_err(refused)
    }

    /// The weights as a numpy archive: equal bytes for equal weights.
    ///
    /// # Errors
    /// If the archive cannot be made.
    pub fn npz(&self) -> Result<Vec<u8>> {
        let array = |(name, tensor): (&String, &Tensor)| -> Result<(String, Array)> {
            Ok((name.clone(), to_array(tensor, None)?))
        };
        npz::write(&self.weights().map(array).collect::<Result<BTreeMap<_, _>>>()?)
    }
}
