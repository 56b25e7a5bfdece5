//! Adds the loss.
//!
//! *Before*: a forward graph whose first output is the model's result.
//!
//! *After*: an input `label` where the loss needs one, and a float scalar `%loss` as first output; the model's outputs stay
//! behind it, in their order.
//!
//! *Why here*: everything that follows (sensitivity, gradients) is about the loss, and the loss is part of the
//! forward pass.
//!
//! The losses, with PyTorch's conventions (mean over what counts):
//!
//! | kind | first output | label | loss |
//! | --- | --- | --- | --- |
//! | cross-entropy | logits `[rows, classes]`; of more axes, the last holds the classes and the others are flattened to rows | `i64[rows]`, -100 is ignored | Σ cross_entropy / max(labels that count, 1) |
//! | mse | any | its type | mean (y - label)² |
//! | bce | logits | its type | mean of max(y, 0) - y · label + ln(1 + exp(-│y│)) |
//! | output | the loss itself: one float element | none | that element |

use crate::PassError;
use crate::builder::Builder;
use qcompile_ir::{
    BinaryOp, CompareOp, DType, Dim, Graph, NodeId, Op, Region, Shape, TensorType, UnaryOp,
};

/// Which loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LossKind {
    /// Softmax cross entropy of logits with class labels.
    CrossEntropy,
    /// Mean squared error.
    Mse,
    /// Binary cross entropy of logits.
    Bce,
    /// The model's first output is the loss.
    Output,
}

impl LossKind {
    /// Every kind, in declaration order.
    pub const ALL: [LossKind; 4] =
        [LossKind::CrossEntropy, LossKind::Mse, LossKind::Bce, LossKind::Output];

    /// The word on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            LossKind::CrossEntropy => "cross-entropy",
            LossKind::Mse => "mse",
            LossKind::Bce => "bce",
            LossKind::Output => "output",
        }
    }
}

/// What to attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Which loss.
    pub kind: LossKind,
}

/// The label that cross entropy ignores, as in PyTorch and ONNX.
const IGNORED_LABEL: f64 = -100.0;

/// Adds the input `label` and the output `loss`.
///
/// # Errors
/// [`PassError::Loss`] if the first output does not fit the loss, or a name is taken.
pub fn run(graph: &mut Graph, options: &Options) -> Result<(), PassError> {
    let Some(&(_, y)) = graph.outputs().first() else {
        return Err(misfit("the model has no output".to_owned()));
    };
    if graph.outputs().iter().any(|(name, _)| name == "loss") {
        return Err(misfit("the model has an output `loss` already".to_owned()));
    }
    let needs_label = options.kind != LossKind::Output;
    if needs_label && graph.find("label").is_some() {
        return Err(misfit("the model has a value `label` already".to_owned()));
    }
    let ty = graph.ty(y).clone();
    if !ty.dtype.is_float() {
        return Err(misfit(format!(
            "{} needs a float output, but the first output is {ty}",
            options.kind.name()
        )));
    }
    let loss = match options.kind {
        LossKind::CrossEntropy => cross_entropy(graph, y, &ty)?,
        LossKind::Mse => mean_squared_error(graph, y, &ty)?,
        LossKind::Bce => binary_cross_entropy(graph, y, &ty)?,
        LossKind::Output => output(graph, y, &ty)?,
    };
    let mut outputs = vec![("loss".to_owned(), loss)];
    outputs.extend_from_slice(graph.outputs());
    graph.set_outputs(outputs);
    Ok(())
}

fn misfit(reason: String) -> PassError {
    PassError::Loss { reason }
}

fn label(b: &mut Builder<'_>, ty: TensorType) -> Result<NodeId, PassError> {
    Ok(b.graph.add(Op::Input(ty), &[], "label", Region::Forward)?)
}

fn cross_entropy(graph: &mut Graph, y: NodeId, ty: &TensorType) -> Result<NodeId, PassError> {
    let misfitting = || misfit(format!("cross-entropy takes logits [rows, classes], not {ty}"));
    let (classes, rows) = ty.shape.0.split_last().ok_or_else(misfitting)?;
    if rows.is_empty() || classes.batch || classes.scale == 0 {
        return Err(misfitting());
    }
    let rows = Shape(rows.to_vec()).elements().ok_or_else(misfitting)?;
    let b = &mut Builder::new(graph, Region::Forward, "loss");
    let label = label(b, TensorType::new(DType::I64, Shape(vec![rows])))?;
    let logits = b.reshape("logits", y, Shape(vec![rows, *classes]))?;
    let each = b.add("each", Op::CrossEntropy, &[logits, label])?;
    let each = b.cast("f32", each, DType::F32)?;
    let sum = b.sum_all("sum", each)?;
    // The mean is over labels that count; with none of them the loss is 0, not 0/0.
    let ignored = b.splat_like("ignored", label, IGNORED_LABEL)?;
    let skip = b.compare("skip", CompareOp::Equal, label, ignored)?;
    let counts = b.unary("counts", UnaryOp::Not, skip)?;
    let counts = b.cast("weight", counts, DType::F32)?;
    let count = b.sum_all("count", counts)?;
    let one = b.scalar(DType::F32, 1.0)?;
    let divisor = b.binary("divisor", BinaryOp::Max, count, one)?;
    b.binary("", BinaryOp::Div, sum, divisor)
}

fn mean_squared_error(graph: &mut Graph, y: NodeId, ty: &TensorType) -> Result<NodeId, PassError> {
    let b = &mut Builder::new(graph, Region::Forward, "loss");
    let label = label(b, ty.clone())?;
    let difference = b.binary("difference", BinaryOp::Sub, y, label)?;
    let square = b.binary("square", BinaryOp::Mul, difference, difference)?;
    mean(b, square)
}

/// On logits, in the form that neither overflows nor loses small probabilities.
fn binary_cross_entropy(
    graph: &mut Graph,
    y: NodeId,
    ty: &TensorType,
) -> Result<NodeId, PassError> {
    let b = &mut Builder::new(graph, Region::Forward, "loss");
    let label = label(b, ty.clone())?;
    let positive = b.unary("positive", UnaryOp::Relu, y)?;
    let product = b.binary("product", BinaryOp::Mul, y, label)?;
    let linear = b.binary("linear", BinaryOp::Sub, positive, product)?;
    // ln(1 + exp(-|y|)) = -ln sigmoid(|y|)
    let magnitude = b.unary("magnitude", UnaryOp::Abs, y)?;
    let minus = b.unary("minus", UnaryOp::Neg, magnitude)?;
    let exponential = b.unary("exponential", UnaryOp::Exp, minus)?;
    let one = b.splat_like("one", exponential, 1.0)?;
    let sum = b.binary("one_plus", BinaryOp::Add, one, exponential)?;
    let log = b.unary("log", UnaryOp::Log, sum)?;
    let each = b.binary("each", BinaryOp::Add, linear, log)?;
    mean(b, each)
}

fn mean(b: &mut Builder<'_>, each: NodeId) -> Result<NodeId, PassError> {
    let each = b.cast("f32", each, DType::F32)?;
    let elements = b.shape(each).elements().unwrap_or(Dim::ONE);
    let sum = b.sum_all("sum", each)?;
    let count = b.add("count", Op::Size(elements), &[])?;
    b.binary("", BinaryOp::Div, sum, count)
}

fn output(graph: &mut Graph, y: NodeId, ty: &TensorType) -> Result<NodeId, PassError> {
    if ty.shape.elements() != Some(Dim::ONE) {
        return Err(misfit(format!("the first output is {ty}, not a loss of one element")));
    }
    let b = &mut Builder::new(graph, Region::Forward, "loss");
    let scalar = b.reshape("scalar", y, Shape::scalar())?;
    b.cast("f32", scalar, DType::F32)
}
