//! Runs the pass `sensitivity` on compiled code, and keeps its scores in files.

use crate::about::About;
use crate::data::{Batches, Dataset, InputType, Limits, Target};
use crate::error::{Code, Error, Result};
use crate::options::Options;
use crate::street::Draft;
use crate::subgraph::part;
use crate::synthetic;
use crate::terminal::{Progress, Show};
use crate::wants::Wants;
use qcompile_ir::{Graph, Name, Op, Region, Tensor};
use qcompile_passes::sensitivity::{self, Evaluate, LayerScore, Metric, Scores};
use qcompile_plan::{BuildOptions, build};
use qcompile_runtime::{Trainer, TrainerOptions, Values};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;

/// Samples to measure on unless a number is given, where each is one prediction.
const SAMPLES: usize = 256;
/// Predictions that are enough of a sample that has many, as a text has; and the fewest samples for them.
const PREDICTIONS: usize = 4096;
const FEWEST: usize = 16;

/// Samples to measure on where none are asked for.
fn standard_samples(wants: &Wants) -> usize {
    let elements = |(_, ty): &(String, InputType)| -> usize { ty.shape.iter().flatten().product() };
    let predictions = match &wants.target {
        Some(Target::Classes { rows_per_sample, .. }) => *rows_per_sample,
        Some(Target::Values(_)) => 1,
        // The model's own loss: of tokens, perhaps.
        None => {
            let integers = wants.inputs.iter().filter(|(_, ty)| !ty.dtype.is_float());
            integers.map(elements).max().unwrap_or(1)
        }
    };
    let samples = (PREDICTIONS / predictions.max(1)).clamp(FEWEST, SAMPLES);
    samples.max(wants.fixed_batch.unwrap_or(1))
}

/// Batches to measure on.
#[derive(Debug, Clone)]
pub struct Calibration {
    /// Each with its number of samples.
    batches: Vec<(Values, usize)>,
    batch_size: usize,
    synthetic: bool,
    notes: Vec<String>,
}

impl Calibration {
    /// The first `--samples` of `--data` in an order of their own, as data is often sorted by class; synthetic ones
    /// without data.
    ///
    /// # Errors
    /// Of loading and binding the data.
    pub fn new(graph: &Graph, about: &About, options: &Options) -> Result<Calibration> {
        let wants = Wants::of(graph, about)?;
        let samples = options.samples.unwrap_or_else(|| standard_samples(&wants));
        let size = wants.fixed_batch.unwrap_or_else(|| options.batch_size.min(samples));
        let mut calibration = Calibration {
            batches: Vec::new(),
            batch_size: size,
            synthetic: false,
            notes: Vec::new(),
        };
        let Some(text) = &options.data else {
            calibration.synthetic = true;
            for at in 0..samples.div_ceil(size) {
                let left = samples - at * size;
                let count = if wants.fixed_batch.is_some() { size } else { size.min(left) };
                let values = synthetic::inputs(graph, count, at as u64);
                calibration.batches.push((values, count));
            }
            let note = "sensitivity was measured on synthetic inputs: give --data for real ones";
            calibration.notes.push(note.to_owned());
            return Ok(calibration);
        };
        let data = Dataset::load(text, Limits::default())?;
        let binding = wants.bind(&data)?;
        calibration.notes.extend(binding.notes().iter().cloned());
        let taken = samples.min(binding.samples());
        let batches = Batches::new(binding.samples(), size).shuffled(0);
        let rows: Vec<usize> = batches.epoch(0, 0).flatten().take(taken).collect();
        for rows in rows.chunks(size) {
            if rows.len() == size || wants.fixed_batch.is_none() {
                calibration.batches.push((wants.batch(&binding, rows)?, rows.len()));
            }
        }
        if calibration.batches.is_empty() {
            let cause =
                format!("{taken} samples are to be taken, and the model takes {size} at once");
            return Err(Error::new(Code::DataEmpty, cause));
        }
        Ok(calibration)
    }

    /// Number of samples.
    #[must_use]
    pub fn samples(&self) -> usize {
        self.batches.iter().map(|(_, samples)| samples).sum()
    }

    /// Whether the samples are made up.
    #[must_use]
    pub fn is_synthetic(&self) -> bool {
        self.synthetic
    }

    /// What should be told.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }
}

/// Runs graphs as compiled code.
pub(crate) struct Compiled<'c> {
    calibration: &'c Calibration,
    trainer: TrainerOptions,
}

impl<'c> Compiled<'c> {
    pub(crate) fn new(calibration: &'c Calibration, options: &Options) -> Compiled<'c> {
        let trainer = TrainerOptions { threads: options.threads, workers: 1, tier: options.tier };
        Compiled { calibration, trainer }
    }

    /// Samples in a batch.
    pub(crate) fn batch_size(&self) -> usize {
        self.calibration.batch_size
    }

    /// Runs a graph on each batch, and shows its outputs.
    pub(crate) fn each(
        &self,
        graph: Graph,
        show: &mut dyn FnMut(&Values) -> std::result::Result<(), String>,
    ) -> std::result::Result<(), String> {
        let mut trainer = self.trainer(graph)?;
        for (values, _) in &self.calibration.batches {
            let values = taken(&trainer, values);
            show(&trainer.run(&values, Region::Forward).map_err(|e| e.to_string())?)?;
        }
        Ok(())
    }

    fn trainer(&self, graph: Graph) -> std::result::Result<Trainer, String> {
        let options = BuildOptions { batch_size: self.calibration.batch_size };
        let plan = build(graph, &options).map_err(|e| e.to_string())?;
        Trainer::new(Arc::new(plan), &self.trainer).map_err(|e| e.to_string())
    }
}

/// Those of `values` that the plan takes.
fn taken(trainer: &Trainer, values: &Values) -> Values {
    let inputs = trainer.plan().inputs().iter();
    inputs
        .filter_map(|input| Some((input.name.clone(), values.get(&input.name)?.clone())))
        .collect()
}

impl Evaluate for Compiled<'_> {
    fn loss(&mut self, graph: &Graph) -> std::result::Result<f64, String> {
        let loss = graph.outputs().iter().find(|(name, _)| name == "loss").cloned();
        let loss = loss.ok_or("the graph has no loss")?;
        let part = part(graph, &[loss]).map_err(|e| e.to_string())?;
        let mut trainer = self.trainer(part)?;
        let (mut sum, mut count) = (0.0, 0.0);
        for (values, samples) in &self.calibration.batches {
            let values = taken(&trainer, values);
            let outputs = trainer.run(&values, Region::Forward).map_err(|e| e.to_string())?;
            let loss = outputs.get("loss").ok_or("the plan returned no loss")?;
            sum += loss.get_f64(0) * *samples as f64;
            count += *samples as f64;
        }
        Ok(sum / count)
    }

    fn values(
        &mut self,
        graph: &Graph,
        names: &[Name],
    ) -> std::result::Result<Vec<Tensor>, String> {
        let mut values = Vec::with_capacity(names.len());
        for name in names {
            let id = graph.find(name.as_str()).ok_or_else(|| format!("there is no {name}"))?;
            if let Op::Param(tensor) | Op::Const(tensor) | Op::State(tensor) = graph.op(id) {
                values.push((**tensor).clone());
                continue;
            }
            let part = part(graph, &[("value".to_owned(), id)]).map_err(|e| e.to_string())?;
            let mut trainer = self.trainer(part)?;
            let (batch, _) = self.calibration.batches.first().ok_or("there are no samples")?;
            let batch = taken(&trainer, batch);
            let mut outputs = trainer.run(&batch, Region::Forward).map_err(|e| e.to_string())?;
            values.push(outputs.remove("value").ok_or("the plan returned no value")?);
        }
        Ok(values)
    }
}

/// What the pass is asked for by a compilation with these options.
pub(crate) fn of_pass(options: &Options, metric: Metric, samples: usize) -> sensitivity::Options {
    sensitivity::Options { metric, samples, numerics: options.numerics, ranged: options.qat }
}

/// Scores the layers of a graph that has its loss.
///
/// # Errors
/// Of the pass.
pub fn score(
    graph: &mut Graph,
    calibration: &Calibration,
    options: &Options,
    show: Show,
) -> Result<Scores> {
    let mut compiled = Compiled::new(calibration, options);
    let of_pass = of_pass(options, options.metric, calibration.samples());
    let (layers, products) = sensitivity::scored(graph, &of_pass);
    let total = (layers.len() + products.len()) as u64;
    let mut progress = Progress::start(show, "Scoring", total);
    let scores = sensitivity::run(graph, &mut compiled, &of_pass, &mut |done, _, next| {
        progress.update(done as u64, next);
    })?;
    progress.finish();
    Ok(scores)
}

/// By how much roundings increase the loss of a draft that has one: `(loss with them - loss in f32) / |loss in f32|` over
/// the calibration data.
///
/// # Errors
/// Of running the graphs.
pub(crate) fn increase(
    draft: &Draft,
    quantized: &Graph,
    calibration: &Calibration,
    options: &Options,
) -> Result<f64> {
    let mut compiled = Compiled::new(calibration, options);
    let mut loss = |graph: &Graph| {
        let loss = compiled.loss(graph);
        loss.map_err(|reason| Error::new(Code::Internal, format!("sensitivity: {reason}")))
    };
    let before = match &draft.scores {
        Some(scores) => scores.baseline_loss,
        None => loss(&draft.graph)?,
    };
    Ok((loss(quantized)? - before) / before.abs().max(f64::MIN_POSITIVE))
}

/// The file of scores.
#[derive(Debug, Serialize, Deserialize)]
struct ScoresFile {
    metric: String,
    baseline_loss: f64,
    samples: usize,
    /// Whether the samples were made up.
    #[serde(default)]
    synthetic: bool,
    layers: Vec<LayerFile>,
}

/// JSON has no infinity: null stands for it.
#[derive(Debug, Serialize, Deserialize)]
struct LayerFile {
    name: String,
    origin: Option<String>,
    op: String,
    score: Option<f32>,
    channels: Vec<Option<f32>>,
}

fn finite(score: f32) -> Option<f32> {
    Some(score).filter(|score| score.is_finite())
}

/// The scores as a JSON document.
///
/// # Errors
/// Only by a defect.
pub fn scores_json(scores: &Scores, synthetic: bool) -> Result<String> {
    let layers = scores.layers.iter().map(|layer| LayerFile {
        name: layer.name.as_str().to_owned(),
        origin: layer.origin.clone(),
        op: layer.op.clone(),
        score: finite(layer.score),
        channels: layer.channels.iter().map(|&score| finite(score)).collect(),
    });
    let file = ScoresFile {
        metric: scores.metric.name().to_owned(),
        baseline_loss: scores.baseline_loss,
        samples: scores.samples,
        synthetic,
        layers: layers.collect(),
    };
    let text = serde_json::to_string_pretty(&file);
    text.map(|text| text + "\n").map_err(|e| Error::new(Code::Internal, e.to_string()))
}

/// Reads the scores that [`scores_json`] wrote.
///
/// # Errors
/// [`Code::DataFormat`] with the file for a place.
pub fn read_scores(path: &Path) -> Result<Scores> {
    let place = path.display().to_string();
    let bytes = crate::model::read_file(path)?;
    let wrong = |reason: String| {
        Error::new(Code::DataFormat, format!("these are no scores: {reason}")).at(place.clone())
    };
    let file: ScoresFile = serde_json::from_slice(&bytes).map_err(|e| wrong(e.to_string()))?;
    let metric: Metric =
        file.metric.parse().map_err(|()| wrong(format!("there is no metric `{}`", file.metric)))?;
    let layers = file.layers.into_iter().map(|layer| LayerScore {
        name: layer.name.into(),
        origin: layer.origin,
        op: layer.op,
        score: layer.score.unwrap_or(f32::INFINITY),
        channels: layer.channels.into_iter().map(|s| s.unwrap_or(f32::INFINITY)).collect(),
    });
    Ok(Scores {
        layers: layers.collect(),
        metric,
        baseline_loss: file.baseline_loss,
        samples: file.samples,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_survive_their_file() {
        let scores = Scores {
            layers: vec![LayerScore {
                name: "fc".into(),
                origin: Some("Gemm_0".to_owned()),
                op: "matmul".to_owned(),
                score: f32::INFINITY,
                channels: vec![1e-5, f32::INFINITY, 0.25],
            }],
            metric: Metric::WeightSqnr,
            baseline_loss: 1.0 / 3.0,
            samples: 256,
        };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("scores.json");
        std::fs::write(&path, scores_json(&scores, true).unwrap()).unwrap();
        assert_eq!(read_scores(&path).unwrap(), scores);
        std::fs::write(&path, "{\"metric\": 3}").unwrap();
        assert_eq!(read_scores(&path).unwrap_err().code(), Code::DataFormat);
    }
}
