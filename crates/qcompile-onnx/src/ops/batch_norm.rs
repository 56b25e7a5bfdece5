//! Batch normalization: by the statistics of the batch or by running ones.

use super::Results;
use super::norm::{Moments, inverse_deviation};
use crate::BatchNorm;
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::node::OnnxNode;
use qcompile_ir::{BinaryOp, DType, Dim, Op, Region, Shape};

type Value = Result<ValueId, Obstacle>;

/// The operand with the places that have statistics of their own in its last axes.
struct Layout {
    x: ValueId,
    /// The dimensions of the statistics: the channels, or with `spatial` = 0 everything but the batch.
    places: Vec<Dim>,
    spatial: bool,
}

impl Layout {
    fn read(draft: &mut Draft, node: &OnnxNode) -> Result<Layout, Obstacle> {
        let spatial = node.opset >= 9 || node.attributes.flag("spatial", true)?;
        let mut x = node.input(0)?;
        if draft.rank(x) == 1 {
            // One channel.
            let dims = [draft.dims(x)[0], Dim::ONE];
            x = draft.reshape(x, &dims)?;
        }
        if draft.rank(x) < 2 {
            return Err(Obstacle::invalid(format!("{} has no channels", draft.ty(x))));
        }
        if !spatial {
            return Ok(Layout { x, places: draft.dims(x)[1..].to_vec(), spatial });
        }
        let places = vec![draft.dims(x)[1]];
        let last = draft.rank(x) - 1;
        Ok(Layout { x: draft.move_axis(x, 1, last)?, places, spatial })
    }

    /// The axes that statistics are over.
    fn axes(&self, draft: &Draft) -> Vec<usize> {
        (0..draft.rank(self.x) - self.places.len()).collect()
    }

    /// The result, as the operand came and in its element type.
    fn restore(&self, draft: &mut Draft, node: &OnnxNode, y: ValueId) -> Value {
        let given = node.input(0)?;
        let last = draft.rank(y) - 1;
        let y = if self.spatial { draft.move_axis(y, last, 1)? } else { y };
        let (dims, dtype) = (draft.dims(given).to_vec(), draft.dtype(given));
        let y = draft.reshape(y, &dims)?;
        draft.cast(y, dtype)
    }
}

pub(super) fn batch_normalization(draft: &mut Draft, node: &OnnxNode) -> Results {
    let layout = Layout::read(draft, node)?;
    let epsilon = node.attributes.float("epsilon", 1e-5)?;
    let momentum = node.attributes.float("momentum", 0.9)?;
    let declared = if node.opset >= 14 {
        node.attributes.flag("training_mode", false)?
    } else {
        node.outputs.len() > 1
    };
    let mut operands = [layout.x; 4];
    for (at, operand) in operands.iter_mut().enumerate() {
        *operand = node.input(at + 1)?;
        if draft.dims(*operand) != layout.places {
            return Err(Obstacle::invalid(format!(
                "input {} is {}, not {}",
                at + 1,
                draft.ty(*operand),
                Shape(layout.places.clone())
            )));
        }
    }
    let [scale, bias, mean, variance] = operands;
    let training = match node.batch_norm {
        BatchNorm::Model => declared,
        BatchNorm::Train => true,
        BatchNorm::Frozen => false,
    };
    if !training
        && (1..node.outputs.len()).any(|at| node.wants(at))
        && node.batch_norm == BatchNorm::Model
    {
        return Err(Obstacle::invalid("statistics as results outside training mode"));
    }
    let x = draft.cast(layout.x, DType::F32)?;
    let (scale, bias) = (draft.cast(scale, DType::F32)?, draft.cast(bias, DType::F32)?);
    if training {
        let moments = Moments::of(draft, x, &layout.axes(draft))?;
        let y = normalized(draft, moments.centered, moments.variance, [scale, bias], epsilon)?;
        let mut results = vec![layout.restore(draft, node, y)?];
        let statistics = [("running_mean", mean), ("running_var", variance)];
        for ((role, running), current) in
            statistics.into_iter().zip([moments.mean, moments.variance])
        {
            results.push(running_statistic(draft, node, role, running, current, momentum)?);
        }
        if node.outputs.len() > 3 {
            // Before opset 14 the statistics of the batch follow.
            for current in [moments.mean, moments.variance] {
                results.push(draft.reshape(current, &layout.places)?);
            }
        }
        return Ok(results);
    }
    let statistics = [draft.frozen(mean)?, draft.frozen(variance)?];
    let [mean, variance] = statistics.map(|statistic| draft.cast(statistic, DType::F32));
    let centered = draft.sub(x, mean?)?;
    let y = normalized(draft, centered, variance?, [scale, bias], epsilon)?;
    // Frozen on request: the statistics are what they were.
    Ok(vec![layout.restore(draft, node, y)?, statistics[0], statistics[1]])
}

/// `centered · (scale / √(variance + epsilon)) + bias`.
fn normalized(
    draft: &mut Draft,
    centered: ValueId,
    variance: ValueId,
    [scale, bias]: [ValueId; 2],
    epsilon: f64,
) -> Value {
    let inverse = inverse_deviation(draft, variance, epsilon)?;
    let places = draft.dims(scale).to_vec();
    let inverse = draft.reshape(inverse, &places)?;
    let factor = draft.mul(inverse, scale)?;
    let scaled = draft.mul(centered, factor)?;
    draft.add(scaled, bias)
}

/// What a running statistic becomes: the next value of a state if it is stored in the model.
fn running_statistic(
    draft: &mut Draft,
    node: &OnnxNode,
    role: &str,
    running: ValueId,
    current: ValueId,
    momentum: f64,
) -> Value {
    if draft.tensor(running).is_none() {
        return updated(draft, Region::Forward, running, current, momentum);
    }
    let state = draft.state(running, &format!("{}.{role}", node.base))?;
    let next = updated(draft, Region::Update, state, current, momentum)?;
    draft.set_next(state, next);
    Ok(next)
}

/// `running · momentum + current · (1 - momentum)`, in a region.
fn updated(
    draft: &mut Draft,
    region: Region,
    running: ValueId,
    current: ValueId,
    momentum: f64,
) -> Value {
    let dims = draft.dims(running).to_vec();
    let dtype = draft.dtype(running);
    let mut factor = |value: f64| {
        let scalar = draft.scalar(dtype, value);
        draft.broadcast(scalar, &dims)
    };
    let (keep, take) = (factor(momentum)?, factor(1.0 - momentum)?);
    let mut current = draft.emit_in(region, Op::Reshape(Shape(dims)), &[current])?;
    if draft.dtype(current) != dtype {
        current = draft.emit_in(region, Op::Cast(dtype), &[current])?;
    }
    let kept = draft.emit_in(region, Op::Binary(BinaryOp::Mul), &[running, keep])?;
    let taken = draft.emit_in(region, Op::Binary(BinaryOp::Mul), &[current, take])?;
    draft.emit_in(region, Op::Binary(BinaryOp::Add), &[kept, taken])
}
