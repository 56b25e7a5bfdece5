//! Losses over classes.

use super::Results;
use super::arg::positions;
use super::norm::along;
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::node::OnnxNode;
use qcompile_ir::{BinaryOp, CompareOp, DType, Dim, Op, ReduceOp, Shape, UnaryOp};

type Value = Result<ValueId, Obstacle>;

/// What stands for a label that is left out.
const LEFT_OUT: f64 = -100.0;

/// Scores `[n, c, d...]` and labels `[n, d...]`.
struct Labelled {
    scores: ValueId,
    labels: ValueId,
    /// Where the label counts; none if all do.
    counts: Option<ValueId>,
    /// The weights of classes.
    weights: Option<ValueId>,
}

impl Labelled {
    fn read(draft: &mut Draft, node: &OnnxNode) -> Result<Labelled, Obstacle> {
        let (given, labels) = (node.input(0)?, node.input(1)?);
        let mut expected = draft.dims(given).to_vec();
        if expected.len() < 2 || !draft.dtype(given).is_float() {
            return Err(Obstacle::invalid(format!("{} is no score of classes", draft.ty(given))));
        }
        let classes = expected.remove(1);
        if draft.dims(labels) != expected || draft.dtype(labels).is_float() {
            return Err(Obstacle::invalid(format!(
                "labels {} for scores {}",
                draft.ty(labels),
                draft.ty(given)
            )));
        }
        let scores = draft.cast(given, DType::F32)?;
        let labels = draft.cast(labels, DType::I64)?;
        let weights = match node.optional(2) {
            None => None,
            Some(weights) if draft.dims(weights) == [classes] => {
                // Weights of classes are no weights to train.
                let weights = draft.frozen(weights)?;
                Some(draft.cast(weights, DType::F32)?)
            }
            Some(weights) => {
                let text = format!("weights {} for {classes} classes", draft.ty(weights));
                return Err(Obstacle::invalid(text));
            }
        };
        let counts = match node.attributes.optional_int("ignore_index")? {
            None => None,
            Some(ignored) => {
                let ignored = crate::known::Element::Int(ignored);
                let ignored = crate::known::Known::new(DType::I64, Vec::new(), vec![ignored]);
                let ignored = draft.add_known(ignored);
                let equal = draft.compare(CompareOp::Equal, labels, ignored)?;
                Some(draft.unary(UnaryOp::Not, equal)?)
            }
        };
        Ok(Labelled { scores, labels, counts, weights })
    }

    /// The labels, with another number for those that are left out.
    fn labels_or(&self, draft: &mut Draft, other: f64) -> Value {
        match self.counts {
            None => Ok(self.labels),
            Some(counts) => {
                let other = draft.scalar(DType::I64, other);
                draft.select(counts, self.labels, other)
            }
        }
    }

    /// The weight of each label; none if all are 1. A label outside the classes is an error of the step.
    fn weight_of_labels(&self, draft: &mut Draft) -> Result<Option<ValueId>, Obstacle> {
        let zero = draft.scalar(DType::F32, 0.0);
        match (self.weights, self.counts) {
            (None, None) => Ok(None),
            (None, Some(counts)) => draft.cast(counts, DType::F32).map(Some),
            (Some(weights), _) => {
                let labels = self.labels_or(draft, 0.0)?;
                let chosen = draft.emit(Op::Gather, &[weights, labels])?;
                match self.counts {
                    None => Ok(Some(chosen)),
                    Some(counts) => draft.select(counts, chosen, zero).map(Some),
                }
            }
        }
    }

    /// `losses`, one for each label, weighted and reduced as the node asks for, in the type of its scores.
    fn reduced(&self, draft: &mut Draft, node: &OnnxNode, losses: ValueId) -> Value {
        let reduction = node.attributes.string("reduction", "mean")?;
        let weights = self.weight_of_labels(draft)?;
        let weighted = match weights {
            None => losses,
            Some(weights) => draft.mul(losses, weights)?,
        };
        let axes: Vec<usize> = (0..draft.rank(losses)).collect();
        let result = match reduction.as_str() {
            "none" => weighted,
            "sum" => draft.reduce(ReduceOp::Sum, weighted, &axes)?,
            "mean" => {
                let sum = draft.reduce(ReduceOp::Sum, weighted, &axes)?;
                let count = match weights {
                    None => draft.count(losses, &axes)?,
                    Some(weights) => draft.reduce(ReduceOp::Sum, weights, &axes)?,
                };
                draft.binary(BinaryOp::Div, sum, count)?
            }
            other => return Err(Obstacle::invalid(format!("attribute reduction is `{other}`"))),
        };
        let result = if reduction == "none" { result } else { draft.reshape(result, &[])? };
        let dtype = draft.dtype(node.input(0)?);
        draft.cast(result, dtype)
    }
}

/// Minus the score of the label.
pub(super) fn negative_log_likelihood(draft: &mut Draft, node: &OnnxNode) -> Results {
    let mut labelled = Labelled::read(draft, node)?;
    if labelled.weights.is_none() {
        // Equal weights: what looks them up rejects labels that are no class.
        let (one, classes) = (draft.scalar(DType::F32, 1.0), draft.dims(labelled.scores)[1]);
        labelled.weights = Some(draft.broadcast(one, &[classes])?);
    }
    let scores = labelled.scores;
    let classes = positions(draft, scores, 1, DType::I64)?;
    let mut column = draft.dims(scores).to_vec();
    column[1] = Dim::ONE;
    let labels = draft.reshape(labelled.labels, &column)?;
    let chosen = draft.compare(CompareOp::Equal, labels, classes)?;
    let zero = draft.scalar(DType::F32, 0.0);
    let chosen = draft.select(chosen, scores, zero)?;
    let score = draft.reduce(ReduceOp::Sum, chosen, &[1])?;
    let score = draft.squeeze(score, &[1])?;
    let losses = draft.unary(UnaryOp::Neg, score)?;
    Ok(vec![labelled.reduced(draft, node, losses)?])
}

/// The cross entropy of scores that are no probabilities yet, and their logarithmic probabilities.
pub(super) fn softmax_cross_entropy(draft: &mut Draft, node: &OnnxNode) -> Results {
    let labelled = Labelled::read(draft, node)?;
    let (scores, dims) = (labelled.scores, draft.dims(labelled.labels).to_vec());
    let last = draft.rank(scores) - 1;
    let rows = draft.move_axis(scores, 1, last)?;
    let count = Shape(dims.clone())
        .elements()
        .ok_or_else(|| Obstacle::unsupported("dimensions that overflow"))?;
    let rows = draft.reshape(rows, &[count, draft.dims(scores)[1]])?;
    let labels = labelled.labels_or(draft, LEFT_OUT)?;
    let labels = draft.reshape(labels, &[count])?;
    let losses = draft.emit(Op::CrossEntropy, &[rows, labels])?;
    let losses = draft.reshape(losses, &dims)?;
    let mut results = vec![labelled.reduced(draft, node, losses)?];
    if node.wants(1) {
        let probabilities = along(draft, scores, 1, Op::LogSoftmax)?;
        let dtype = draft.dtype(node.input(0)?);
        results.push(draft.cast(probabilities, dtype)?);
    }
    Ok(results)
}
