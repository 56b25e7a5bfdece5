//! Scaling and linear models of `ai.onnx.ml`, on numbers.

use super::Results;
use super::arg::arg_max_of;
use super::constant::add_tensor;
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::node::OnnxNode;
use qcompile_ir::{BinaryOp, CompareOp, DType, Dim, Op, ReduceOp, Tensor, UnaryOp};
use std::sync::Arc;

type Value = Result<ValueId, Obstacle>;

/// An attribute of floats as a constant of a shape.
fn floats(draft: &mut Draft, node: &OnnxNode, name: &str, shape: &[usize]) -> Value {
    let values = node.attributes.floats(name)?.unwrap_or_default();
    let wide: Vec<f64> = values.iter().map(|&value| f64::from(value)).collect();
    let tensor = Tensor::from_f64(DType::F32, shape, &wide).ok_or_else(|| {
        Obstacle::invalid(format!("attribute {name} has {} numbers for {shape:?}", wide.len()))
    })?;
    add_tensor(draft, Arc::new(tensor))
}

/// How many numbers an attribute has; 0 if it is not there.
fn count(node: &OnnxNode, name: &str) -> Result<usize, Obstacle> {
    Ok(node.attributes.floats(name)?.unwrap_or_default().len())
}

/// `(x - offset) · scale`, each one number or one for each feature.
pub(super) fn scaler(draft: &mut Draft, node: &OnnxNode) -> Results {
    let mut x = draft.cast(node.input(0)?, DType::F32)?;
    let dims = draft.dims(x).to_vec();
    for (name, op) in [("offset", BinaryOp::Sub), ("scale", BinaryOp::Mul)] {
        let count = count(node, name)?;
        if count > 0 {
            let row = floats(draft, node, name, &[count])?;
            x = draft.binary(op, x, row)?;
        }
    }
    if draft.dims(x) != dims {
        return Err(Obstacle::invalid("offset or scale do not fit the features"));
    }
    Ok(vec![x])
}

/// `x · coefficientsᵀ + intercepts`, `[rows, targets]`.
fn linear(draft: &mut Draft, node: &OnnxNode, targets: usize) -> Value {
    let mut x = draft.cast(node.input(0)?, DType::F32)?;
    if draft.rank(x) == 1 {
        let row = [Dim::ONE, draft.dims(x)[0]];
        x = draft.reshape(x, &row)?;
    }
    let features = match *draft.dims(x) {
        [_, features] => features.as_fixed(),
        _ => return Err(Obstacle::invalid(format!("{} is not [rows, features]", draft.ty(x)))),
    };
    let features = features
        .ok_or_else(|| Obstacle::batch("features whose number depends on the batch size"))?;
    let coefficients = floats(draft, node, "coefficients", &[targets, features])?;
    let product = Op::Matmul { transpose_a: false, transpose_b: true };
    let mut scores = draft.emit(product, &[x, coefficients])?;
    if count(node, "intercepts")? > 0 {
        let intercepts = floats(draft, node, "intercepts", &[targets])?;
        scores = draft.add(scores, intercepts)?;
    }
    Ok(scores)
}

/// What the attribute `post_transform` makes of scores.
fn transformed(draft: &mut Draft, node: &OnnxNode, scores: ValueId) -> Value {
    match node.attributes.string("post_transform", "NONE")?.as_str() {
        "NONE" => Ok(scores),
        "LOGISTIC" => draft.unary(UnaryOp::Sigmoid, scores),
        "SOFTMAX" => draft.emit(Op::Softmax, &[scores]),
        "SOFTMAX_ZERO" => softmax_of_others(draft, scores),
        "PROBIT" => Err(Obstacle::unsupported("post_transform PROBIT")),
        other => Err(Obstacle::invalid(format!("attribute post_transform is `{other}`"))),
    }
}

/// The softmax of the scores that are not 0, which stay 0.
fn softmax_of_others(draft: &mut Draft, scores: ValueId) -> Value {
    let axis = [draft.rank(scores) - 1];
    let max = draft.reduce(ReduceOp::Max, scores, &axis)?;
    let max = draft.unary(UnaryOp::StopGradient, max)?;
    let shifted = draft.sub(scores, max)?;
    let exp = draft.unary(UnaryOp::Exp, shifted)?;
    let zero = draft.scalar(DType::F32, 0.0);
    let null = draft.compare(CompareOp::Equal, scores, zero)?;
    let kept = draft.select(null, zero, exp)?;
    let sum = draft.reduce(ReduceOp::Sum, kept, &axis)?;
    draft.binary(BinaryOp::Div, kept, sum)
}

pub(super) fn linear_regressor(draft: &mut Draft, node: &OnnxNode) -> Results {
    let given = node.attributes.int("targets", 1)?;
    let targets = usize::try_from(given)
        .ok()
        .filter(|&targets| targets > 0)
        .ok_or_else(|| Obstacle::invalid(format!("attribute targets is {given}")))?;
    let scores = linear(draft, node, targets)?;
    Ok(vec![transformed(draft, node, scores)?])
}

/// The label of the largest score and the scores. One row of coefficients for two classes is the second's: it is chosen
/// where its score is positive.
pub(super) fn linear_classifier(draft: &mut Draft, node: &OnnxNode) -> Results {
    // Whether scores of several classes are of one model or of several changes nothing about them.
    node.attributes.int("multi_class", 0)?;
    if node.attributes.strings("classlabels_strings")?.is_some_and(|labels| !labels.is_empty()) {
        return Err(Obstacle::unsupported("classlabels_strings: labels that are no numbers"));
    }
    let labels = node.attributes.ints("classlabels_ints")?.unwrap_or_default().to_vec();
    let classes = match count(node, "intercepts")? {
        0 => labels.len(),
        intercepts => intercepts,
    };
    if classes == 0 || labels.len() != classes && (classes, labels.len()) != (1, 2) {
        return Err(Obstacle::invalid(format!(
            "{} labels for {classes} rows of coefficients",
            labels.len()
        )));
    }
    let pair = (classes, labels.len()) == (1, 2);
    let scores = linear(draft, node, classes)?;
    let table = Tensor::from_i64(&[labels.len()], &labels)
        .ok_or_else(|| Obstacle::invalid("too many labels"))?;
    let table = add_tensor(draft, Arc::new(table))?;
    let index = if pair {
        let zero = draft.scalar(DType::F32, 0.0);
        let positive = draft.compare(CompareOp::Less, zero, scores)?;
        draft.cast(positive, DType::I64)?
    } else {
        let index = arg_max_of(draft, scores, 1, false)?;
        draft.cast(index, DType::I64)?
    };
    let index = draft.squeeze(index, &[1])?;
    let label = draft.emit(Op::Gather, &[table, index])?;
    let transform = node.attributes.string("post_transform", "NONE")?;
    if pair && transform.starts_with("SOFTMAX") {
        let text = format!("post_transform {transform} of one score for two classes");
        return Err(Obstacle::unsupported(text));
    }
    let mut scores = transformed(draft, node, scores)?;
    if pair {
        let one = draft.scalar(DType::F32, 1.0);
        let other = draft.sub(one, scores)?;
        scores = draft.emit(Op::Concat { axis: 1 }, &[other, scores])?;
    }
    Ok(vec![label, scores])
}
