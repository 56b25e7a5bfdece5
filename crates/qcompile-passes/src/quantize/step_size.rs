//! Scales that are trained parameters (learned step size quantization, LSQ: Esser et al. 2020, arXiv:1902.08153), with the
//! values that they begin at. `differentiate` has their gradient.

use super::PASS;
use crate::PassError;
use crate::builder::Builder;
use crate::freeze::part;
use qcompile_ir::eval::{EvalOptions, eval};
use qcompile_ir::{BinaryOp, DType, Graph, NodeId, Op, QuantizedRange, Region, Tensor, UnaryOp};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Where a step size begins: `2 · mean │x│ / √high` for codes up to `high` (section 2.1 of the paper). Of zeros alone any
/// will do; it is 1.
#[must_use]
pub(crate) fn initial(mean_magnitude: f64, high: f64) -> f64 {
    let step = 2.0 * mean_magnitude / high.sqrt();
    if step.is_finite() && step > 0.0 { step } else { 1.0 }
}

/// The magnitude of a parameter that begins as `values`, held above 0, so that no step of training makes it what no scale
/// is. A step beyond 0 comes back from the other side: at a floor, nothing would move it any more.
pub(super) fn parameter(b: &mut Builder, values: Tensor) -> Result<NodeId, PassError> {
    let step = Op::Param(Arc::new(values));
    let name = b.name("step_size");
    let step = b.graph.add(step, &[], name, Region::Forward)?;
    let smallest = b.splat_like("smallest", step, QuantizedRange::SMALLEST_SCALE)?;
    let magnitude = b.unary("magnitude", UnaryOp::Abs, step)?;
    b.binary("scale", BinaryOp::Max, magnitude, smallest)
}

/// The learned scale of a weight, or scales, one for each index of `axis`, for codes of `dtype`.
///
/// # Errors
/// [`PassError::Evaluation`] if the weight has no value.
pub(super) fn of_weight(
    graph: &mut Graph,
    weight: NodeId,
    axis: Option<usize>,
    dtype: DType,
) -> Result<NodeId, PassError> {
    let failed = |reason: String| PassError::Evaluation { pass: PASS, reason };
    let name = graph.node(weight).name.clone();
    let mut stored = part(graph, &[weight])?;
    let Some(copy) = stored.find(name.as_str()) else {
        return Err(failed(format!("{name} is not stored")));
    };
    let shape = stored.ty(copy).shape.clone();
    let axes = (0..shape.rank()).filter(|&at| Some(at) != axis).collect();
    let mut b = Builder::new(&mut stored, Region::Forward, name.as_str());
    let magnitude = b.unary("magnitude", UnaryOp::Abs, copy)?;
    let sum = b.sum("magnitudes", magnitude, axes)?;
    let sum = b.graph.node(sum).name.as_str().to_owned();
    let options = EvalOptions { targets: vec![sum.clone()], ..EvalOptions::default() };
    let values = eval(&stored, &BTreeMap::new(), 1, &options).map_err(|e| failed(e.to_string()))?;
    let sums = values.get_f64(&sum).ok_or_else(|| failed(format!("{name} was not computed")))?;
    let count = shape.elements().map_or(1, |elements| elements.scale) / sums.len().max(1);
    let high = QuantizedRange::of(dtype, false).map_or(1.0, |range| f64::from(range.high));
    #[allow(clippy::cast_precision_loss, reason = "a count of elements")]
    let steps: Vec<f64> = sums.iter().map(|sum| initial(sum / count.max(1) as f64, high)).collect();
    let kept: &[usize] = if axis.is_some() { &[steps.len()] } else { &[] };
    let steps = Tensor::from_f64(DType::F32, kept, &steps)
        .ok_or_else(|| failed(format!("the scales of {name} are no tensor")))?;
    parameter(&mut Builder::new(graph, Region::Forward, name.as_str()), steps)
}
