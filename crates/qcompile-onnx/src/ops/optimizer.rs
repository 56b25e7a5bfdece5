//! Steps of optimizers, as computations (`ai.onnx.preview.training`).

use super::Results;
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::node::OnnxNode;
use qcompile_ir::{BinaryOp, CompareOp, DType, UnaryOp};

type Value = Result<ValueId, Obstacle>;

/// The rate and the number of steps, both scalars of f32, and after them `kinds` lists of tensors of one length.
struct Step {
    rate: ValueId,
    count: ValueId,
    lists: Vec<Vec<ValueId>>,
    norm_coefficient: f64,
}

impl Step {
    fn read(draft: &mut Draft, node: &OnnxNode, kinds: usize) -> Result<Step, Obstacle> {
        let inputs = node.all_inputs()?;
        let [rate, count, ref tensors @ ..] = inputs[..] else {
            return Err(Obstacle::invalid("takes a rate, a number of steps and tensors"));
        };
        if tensors.is_empty() || tensors.len() % kinds != 0 {
            return Err(Obstacle::invalid(format!(
                "{} tensors, which are no {kinds} lists of one length",
                tensors.len()
            )));
        }
        let (rate, count) = (draft.reshape(rate, &[])?, draft.reshape(count, &[])?);
        let (rate, count) = (draft.cast(rate, DType::F32)?, draft.cast(count, DType::F32)?);
        let lists = tensors.chunks(tensors.len() / kinds).map(<[ValueId]>::to_vec).collect();
        let norm_coefficient = node.attributes.float("norm_coefficient", 0.0)?;
        Ok(Step { rate, count, lists, norm_coefficient })
    }

    /// The gradient of tensor `at`, with that of its norm.
    fn gradient(&self, draft: &mut Draft, at: usize) -> Value {
        let decay = draft.binary_scalar(BinaryOp::Mul, self.lists[0][at], self.norm_coefficient)?;
        draft.add(decay, self.lists[1][at])
    }

    /// `value` after the first step, else `first`.
    fn after_first(&self, draft: &mut Draft, value: ValueId, first: ValueId) -> Value {
        let zero = draft.scalar(DType::F32, 0.0);
        let later = draft.compare(CompareOp::Less, zero, self.count)?;
        draft.select(later, value, first)
    }

    /// `1 - base^count`.
    fn correction(&self, draft: &mut Draft, base: f64) -> Value {
        let base = draft.scalar(DType::F32, base);
        let power = draft.binary(BinaryOp::Pow, base, self.count)?;
        let one = draft.scalar(DType::F32, 1.0);
        draft.sub(one, power)
    }
}

/// `running · keep + new · take`.
fn blend(draft: &mut Draft, running: ValueId, new: ValueId, [keep, take]: [f64; 2]) -> Value {
    let kept = draft.binary_scalar(BinaryOp::Mul, running, keep)?;
    let taken = draft.binary_scalar(BinaryOp::Mul, new, take)?;
    draft.add(kept, taken)
}

/// `x - rate · change`, where both are of the element type of x.
fn moved(draft: &mut Draft, x: ValueId, rate: ValueId, change: ValueId) -> Value {
    let dtype = draft.dtype(x);
    let rate = draft.cast(rate, dtype)?;
    let change = draft.mul(change, rate)?;
    draft.sub(x, change)
}

/// `change / (√square + epsilon)`.
fn scaled(draft: &mut Draft, change: ValueId, square: ValueId, epsilon: f64) -> Value {
    let root = draft.unary(UnaryOp::Sqrt, square)?;
    let divisor = draft.binary_scalar(BinaryOp::Add, root, epsilon)?;
    draft.binary(BinaryOp::Div, change, divisor)
}

pub(super) fn adagrad(draft: &mut Draft, node: &OnnxNode) -> Results {
    let step = Step::read(draft, node, 3)?;
    let epsilon = node.attributes.float("epsilon", 0.0)?;
    let decay = node.attributes.float("decay_factor", 0.0)?;
    let decay = draft.binary_scalar(BinaryOp::Mul, step.count, decay)?;
    let divisor = draft.binary_scalar(BinaryOp::Add, decay, 1.0)?;
    let rate = draft.binary(BinaryOp::Div, step.rate, divisor)?;
    let (mut tensors, mut sums) = (Vec::new(), Vec::new());
    for (at, &x) in step.lists[0].iter().enumerate() {
        let gradient = step.gradient(draft, at)?;
        let square = draft.mul(gradient, gradient)?;
        let sum = draft.add(step.lists[2][at], square)?;
        let change = scaled(draft, gradient, sum, epsilon)?;
        tensors.push(moved(draft, x, rate, change)?);
        sums.push(sum);
    }
    Ok([tensors, sums].concat())
}

pub(super) fn adam(draft: &mut Draft, node: &OnnxNode) -> Results {
    let step = Step::read(draft, node, 4)?;
    let alpha = node.attributes.float("alpha", 0.9)?;
    let beta = node.attributes.float("beta", 0.999)?;
    let epsilon = node.attributes.float("epsilon", 0.0)?;
    let after = node.attributes.float("norm_coefficient_post", 0.0)?;
    let (first, second) = (step.correction(draft, alpha)?, step.correction(draft, beta)?);
    let root = draft.unary(UnaryOp::Sqrt, second)?;
    let rate = draft.mul(step.rate, root)?;
    let rate = draft.binary(BinaryOp::Div, rate, first)?;
    let rate = step.after_first(draft, rate, step.rate)?;
    let (mut tensors, mut means, mut squares) = (Vec::new(), Vec::new(), Vec::new());
    for (at, &x) in step.lists[0].iter().enumerate() {
        let gradient = step.gradient(draft, at)?;
        let mean = blend(draft, step.lists[2][at], gradient, [alpha, 1.0 - alpha])?;
        let square = draft.mul(gradient, gradient)?;
        let square = blend(draft, step.lists[3][at], square, [beta, 1.0 - beta])?;
        let change = scaled(draft, mean, square, epsilon)?;
        let next = moved(draft, x, rate, change)?;
        tensors.push(draft.binary_scalar(BinaryOp::Mul, next, 1.0 - after)?);
        means.push(mean);
        squares.push(square);
    }
    Ok([tensors, means, squares].concat())
}

pub(super) fn momentum(draft: &mut Draft, node: &OnnxNode) -> Results {
    let step = Step::read(draft, node, 3)?;
    let alpha = node.attributes.float("alpha", 0.0)?;
    let beta = node.attributes.float("beta", 1.0)?;
    let nesterov = match node.attributes.string("mode", "standard")?.as_str() {
        "standard" => false,
        "nesterov" => true,
        other => return Err(Obstacle::invalid(format!("attribute mode is `{other}`"))),
    };
    let (one, beta) = (draft.scalar(DType::F32, 1.0), draft.scalar(DType::F32, beta));
    let take = step.after_first(draft, beta, one)?;
    let (mut tensors, mut momenta) = (Vec::new(), Vec::new());
    for (at, &x) in step.lists[0].iter().enumerate() {
        let gradient = step.gradient(draft, at)?;
        let dtype = draft.dtype(gradient);
        let take = draft.cast(take, dtype)?;
        let kept = draft.binary_scalar(BinaryOp::Mul, step.lists[2][at], alpha)?;
        let taken = draft.mul(gradient, take)?;
        let momentum = draft.add(kept, taken)?;
        let change = if nesterov {
            let ahead = draft.binary_scalar(BinaryOp::Mul, momentum, alpha)?;
            draft.add(gradient, ahead)?
        } else {
            momentum
        };
        tensors.push(moved(draft, x, step.rate, change)?);
        momenta.push(momentum);
    }
    Ok([tensors, momenta].concat())
}
