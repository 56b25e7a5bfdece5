//! Loss and accuracy over a data set.

use crate::about::About;
use crate::data::{Batches, Binding, LABEL};
use crate::error::{Code, Error, Result};
use crate::synthetic::quiet;
use crate::terminal::{Progress, Show};
use crate::wants::{Wants, loss_kind};
use qcompile_ir::Tensor;
use qcompile_passes::attach_loss::LossKind;
use qcompile_runtime::{Trainer, Values};
use serde::Serialize;

/// The label that counts for nothing, as in PyTorch and ONNX.
const IGNORED_LABEL: i64 = -100;

/// What a model makes of a data set.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Evaluation {
    /// Mean loss.
    pub loss: f64,
    /// The part of labels that are met; none where the loss has no classes.
    pub accuracy: Option<f64>,
    /// Samples evaluated.
    pub samples: usize,
}

/// What one batch adds.
#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    /// What the batch's mean loss is a mean over.
    weight: f64,
    right: f64,
    labels: f64,
}

/// Evaluates all samples in batches of `size`; those that do not fill a batch are left out where the model takes no
/// other size.
///
/// # Errors
/// Of the data and the runtime; [`Code::DataEmpty`] where no batch is left.
pub fn evaluate(
    trainer: &mut Trainer,
    binding: &Binding<'_>,
    wants: &Wants,
    about: &About,
    size: usize,
    show: Show,
) -> Result<Evaluation> {
    let batches = Batches::new(binding.samples(), size).drop_last(wants.fixed_batch.is_some());
    let kind = loss_kind(&about.loss);
    let mut progress = Progress::start(show, "Evaluating", batches.steps() as u64);
    let (mut loss, mut total, mut samples) = (0.0, Counts::default(), 0);
    for (step, rows) in batches.epoch(0, 0).enumerate() {
        let mut inputs = wants.batch(binding, &rows)?;
        // The plan of a training step has inputs for its optimizer, which evaluation does not look at.
        for (name, value) in quiet() {
            if trainer.plan().inputs().iter().any(|input| input.name == name) {
                inputs.entry(name).or_insert(value);
            }
        }
        let outputs = trainer.evaluate(&inputs)?;
        let counts = counts(kind, &inputs, &outputs, about, rows.len());
        if counts.weight > 0.0 {
            loss += number(&outputs, "loss")? * counts.weight;
        }
        total.weight += counts.weight;
        total.right += counts.right;
        total.labels += counts.labels;
        samples += rows.len();
        progress.update(step as u64 + 1, "");
    }
    progress.finish();
    if samples == 0 {
        let cause = format!("{} samples do not fill one batch of {size}", binding.samples());
        return Err(Error::new(Code::DataEmpty, cause));
    }
    let accuracy = (total.labels > 0.0).then(|| total.right / total.labels);
    Ok(Evaluation { loss: loss / total.weight.max(1.0), accuracy, samples })
}

fn number(outputs: &Values, name: &str) -> Result<f64> {
    let value = outputs.get(name).filter(|value| value.elements() == 1);
    let value = value.map(|value| value.get_f64(0));
    value.ok_or_else(|| Error::new(Code::Internal, format!("the plan returned no {name}")))
}

fn counts(
    kind: Option<LossKind>,
    inputs: &Values,
    outputs: &Values,
    about: &About,
    samples: usize,
) -> Counts {
    let plain = Counts { weight: samples as f64, ..Counts::default() };
    let logits = about.outputs.first().and_then(|port| outputs.get(&port.name));
    match (kind, logits, inputs.get(LABEL)) {
        (Some(LossKind::CrossEntropy), Some(logits), Some(label)) => classes(logits, label),
        (Some(LossKind::Bce), Some(logits), Some(label)) => Counts {
            labels: label.elements() as f64,
            right: (0..label.elements().min(logits.elements()))
                .filter(|&at| (logits.get_f64(at) > 0.0) == (label.get_f64(at) > 0.5))
                .count() as f64,
            ..plain
        },
        _ => plain,
    }
}

/// The largest logit of each row against the row's label; of equal ones the first counts.
fn classes(logits: &Tensor, label: &Tensor) -> Counts {
    let classes = logits.shape().last().copied().unwrap_or(1).max(1);
    let values = logits.to_f32();
    let mut counts = Counts::default();
    for (row, label) in values.chunks(classes).zip(label.to_i64()) {
        if label == IGNORED_LABEL {
            continue;
        }
        let mut best = 0;
        for (class, value) in row.iter().enumerate() {
            // Once it is NaN, nothing is larger: then no class is right.
            if *value > row[best] {
                best = class;
            }
        }
        let known = row.iter().all(|value| !value.is_nan());
        counts.labels += 1.0;
        counts.weight += 1.0;
        if known && best as i64 == label {
            counts.right += 1.0;
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_labels_count_for_nothing_and_nan_is_never_right() {
        let logits = [0.0, 2.0, 1.0, 0.0, f32::NAN, 0.0, 5.0, 5.0];
        let logits = Tensor::from_f32(&[4, 2], &logits).unwrap();
        let label = Tensor::from_i64(&[4], &[1, -100, 1, 0]).unwrap();
        let counts = classes(&logits, &label);
        assert_eq!((counts.labels, counts.right, counts.weight), (3.0, 2.0, 3.0));
    }
}
