//! Integers with ranges that are known before a step: calibration on compiled code, and the graph that leaves as QDQ ONNX.

use crate::about::About;
use crate::error::{Code, Error, Result};
use crate::options::Options;
use crate::sensitivity::{Calibration, Compiled};
use crate::subgraph::part;
use qcompile_ir::{DType, Graph, Name, NodeId, Precision, Region, Tensor, verify};
use qcompile_passes::attach_loss::LossKind;
use qcompile_passes::calibrate::{self, Observe, Range, Visit};
use qcompile_passes::quantize::{self, Held, PrecisionChoice, Scheme};
use qcompile_passes::{PassError, fold_batch_norm, freeze};
use qcompile_plan::{BuildOptions, build};
use qcompile_runtime::{Trainer, TrainerOptions, Values};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Values that are looked at in one run have at most this many bytes together.
const OBSERVED_BYTES: usize = 256 << 20;

impl Observe for Compiled<'_> {
    fn observe(
        &mut self,
        graph: &Graph,
        names: &[Name],
        visit: Visit,
    ) -> std::result::Result<(), String> {
        let mut outputs: Vec<(usize, NodeId, usize)> = Vec::with_capacity(names.len());
        for (at, name) in names.iter().enumerate() {
            let id = graph.find(name.as_str()).ok_or_else(|| format!("there is no {name}"))?;
            let elements = graph.ty(id).shape.elements();
            let size = elements.map_or(0, |elements| elements.size(self.batch_size()));
            outputs.push((at, id, size.saturating_mul(4)));
        }
        while !outputs.is_empty() {
            let mut bytes = 0_usize;
            let fits = |(_, _, size): &&(usize, NodeId, usize)| {
                bytes = bytes.saturating_add(*size);
                bytes <= OBSERVED_BYTES
            };
            let count = outputs.iter().take_while(fits).count().max(1);
            let group: Vec<_> = outputs.drain(..count).collect();
            let named: Vec<(String, NodeId)> =
                group.iter().map(|(at, id, _)| (at.to_string(), *id)).collect();
            let part = part(graph, &named).map_err(|e| e.to_string())?;
            self.each(part, &mut |results| {
                for (at, ..) in &group {
                    let value = results.get(&at.to_string()).ok_or("the plan returned no value")?;
                    visit(*at, value);
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// The ranges of what is rounded for the layers that are noted as int8.
#[derive(Debug)]
pub(crate) struct Calibrated {
    pub(crate) ranges: BTreeMap<Name, Range>,
    pub(crate) samples: usize,
    pub(crate) notes: Vec<String>,
}

/// Measures ranges on `--data`.
///
/// # Errors
/// Without data; of loading it, and of running the graph.
pub(crate) fn calibrate(graph: &Graph, about: &About, options: &Options) -> Result<Calibrated> {
    if options.data.is_none() {
        let cause = "ranges of activations are measured on samples, and there are none";
        return Err(Error::usage(cause).help("give --data"));
    }
    // Labels do not matter: the model is read as one that computes its own loss.
    let about = About { loss: LossKind::Output.name().to_owned(), ..about.clone() };
    let calibration = Calibration::new(graph, &about, options)?;
    let mut compiled = Compiled::new(&calibration, options);
    let values = quantize::activations(graph);
    let ranges =
        calibrate::run(graph, &values, &mut compiled, options.calibration, options.activations)?;
    let notes = calibration.notes().to_vec();
    Ok(Calibrated { ranges, samples: calibration.samples(), notes })
}

/// How the options round.
pub(crate) fn scheme(options: &Options, held: Held) -> Scheme {
    Scheme { codes: options.activations, weights: options.weights, held }
}

/// What [`post_training`] did.
#[derive(Debug)]
pub(crate) struct PostTraining {
    /// Layers that compute on integers.
    pub(crate) layers: usize,
    /// Layers, and products of two activations, that stay f32.
    pub(crate) kept: usize,
    pub(crate) samples: usize,
    pub(crate) notes: Vec<String>,
}

/// Rounds an evaluation form in f32: what is stored as integers, and what computes on them. Layers that a plan decided
/// to keep in f32 beside others in int8 stay so.
///
/// # Errors
/// Of calibration; if no layer is left to round.
pub(crate) fn post_training(
    form: &mut Graph,
    about: &About,
    options: &Options,
) -> Result<PostTraining> {
    fold(form)?;
    for id in form.ids() {
        // What ran in f32 for its speed, or in bf16, may be integers here.
        form.note_mut(id).precision = None;
    }
    if about.decisions.iter().any(|decision| decision.precision.is_quantized()) {
        for layer in quantize::layers(form) {
            let name = form.node(layer.node).name.as_str();
            let decision = about.decisions.iter().find(|decision| decision.node == name);
            if decision.is_some_and(|decision| !decision.precision.is_quantized()) {
                form.note_mut(layer.node).precision = Some(Precision::uniform(DType::F32));
            }
        }
    }
    let chosen = quantize::Options {
        precision: PrecisionChoice::Int8,
        keep_f32: options.keep_f32.clone(),
        operations: quantize::Operations { backward: false, ..Default::default() },
        ranged: true,
        ..Default::default()
    };
    let decisions = quantize::decide(form, &chosen)?;
    let layers =
        decisions.iter().filter(|decision| decision.precision.forward == DType::I8).count();
    if layers == 0 {
        let cause = "no layer is left to quantize: none is a product of data and a trained weight, or all are kept in f32";
        return Err(Error::new(Code::ModelUnsupported, cause));
    }
    let calibrated = calibrate(form, about, options)?;
    quantize::insert_ranged(form, &calibrated.ranges, &scheme(options, Held::Constant))?;
    finish(form)?;
    freeze(form)?;
    let Calibrated { samples, notes, .. } = calibrated;
    Ok(PostTraining { layers, kept: decisions.len() - layers, samples, notes })
}

/// Folds batch normalization into weights.
///
/// # Errors
/// Only by a defect.
pub(crate) fn fold(form: &mut Graph) -> Result<()> {
    fold_batch_norm::run(form)?;
    freeze(form)
}

/// Prepares an evaluation form that was trained with its roundings: its scales stay as they are.
///
/// # Errors
/// Only by a defect.
pub(crate) fn trained(form: &mut Graph) -> Result<()> {
    round_as_exported(form)?;
    freeze(form)
}

/// Folds batch normalization and rounds biases, of an evaluation form whose values are rounded.
///
/// # Errors
/// Only by a defect.
pub(crate) fn round_as_exported(form: &mut Graph) -> Result<()> {
    fold_batch_norm::run(form)?;
    finish(form)
}

/// Rounds biases.
fn finish(form: &mut Graph) -> Result<()> {
    quantize::round_biases(form)?;
    form.sweep();
    verify(form)
        .map_err(|errors| PassError::Verify { pass: "quantize", errors: errors.to_string() }.into())
}

/// Computes on compiled code what depends on stored values alone.
fn freeze(form: &mut Graph) -> Result<()> {
    let mut compute = |part: &Graph| -> std::result::Result<BTreeMap<String, Tensor>, String> {
        let plan =
            build(part.clone(), &BuildOptions { batch_size: 1 }).map_err(|e| e.to_string())?;
        let mut trainer =
            Trainer::new(Arc::new(plan), &TrainerOptions::default()).map_err(|e| e.to_string())?;
        trainer.run(&Values::new(), Region::Forward).map_err(|e| e.to_string())
    };
    freeze::run(form, &mut compute)?;
    Ok(())
}
