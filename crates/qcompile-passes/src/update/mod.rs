//! Builds the update region: the optimizer, and the `next` values of parameters and its state.
//!
//! *Before*: gradients in outputs `w.grad`.
//!
//! *After*: `next %w = %w.next` for every parameter with a gradient, and `next` for the optimizer's state; the outputs
//! `w.grad` are gone, and outputs `grad_norm` (before clipping) and `finite` (1, or 0 if the step was refused) are added.
//!
//! *Why here*: last, because it consumes the gradients.
//!
//! Hyperparameters are scalar f32 inputs of the step, so one plan serves every schedule. The formulas are PyTorch's:
//!
//! * gradient clipping: `g ·= min(1, grad_clip_norm / (norm + 1e-6))` with the norm over all parameters; infinity for
//!   none;
//! * `sgd`: `w -= lr · (g + weight_decay · w)`;
//! * `momentum`: `m = momentum · m + (g + weight_decay · w)`, `w -= lr · m`, or with Nesterov's form
//!   `w -= lr · (g + weight_decay · w + momentum · m)`;
//! * `adam`: with `g + weight_decay · w` for `g`; `adamw`: `w -= lr · weight_decay · w` first; then both
//!   `m = beta1 · m + (1 - beta1) · g`, `v = beta2 · v + (1 - beta2) · g²`,
//!   `w -= lr / bias_correction1 · m / (√v / √bias_correction2 + epsilon)`, where `bias_correctionK = 1 - betaK^t`.
//!
//! Where the note of a parameter says `update=i8`, its state is 8-bit (`moments`). [`store_in_bf16`] keeps such a
//! parameter itself in bf16: it is widened, updated in f32, and rounded at random (`crate::stochastic`).
//!
//! [`keep_casts`] lets the update write the copies of parameters in low precision that products read.
//!
//! No value that is not finite reaches a parameter or state: if the loss or the norm of all gradients is not finite,
//! every leaf keeps its value. Running statistics that the model updates itself are guarded the same way.

mod lasting;
mod moments;
mod weights;

pub use lasting::keep_casts;
pub use weights::{store_in_bf16, widen};

use crate::PassError;
use crate::builder::Builder;
use crate::{blocks, differentiate, stochastic};
use moments::{Sign, blocks_of};
use qcompile_ir::{
    BinaryOp, CompareOp, DType, Graph, NodeId, Op, Region, Shape, TensorType, UnaryOp,
};

/// Which optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Optimizer {
    /// Stochastic gradient descent.
    Sgd,
    /// With momentum.
    Momentum {
        /// Nesterov's form.
        nesterov: bool,
    },
    /// Adam (Kingma and Ba 2015, arXiv:1412.6980) with weight decay in the gradient.
    Adam,
    /// Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101).
    AdamW,
}

impl Optimizer {
    /// Every optimizer, in declaration order.
    pub const ALL: [Optimizer; 5] = [
        Optimizer::Sgd,
        Optimizer::Momentum { nesterov: false },
        Optimizer::Momentum { nesterov: true },
        Optimizer::Adam,
        Optimizer::AdamW,
    ];

    /// The word on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Optimizer::Sgd => "sgd",
            Optimizer::Momentum { nesterov: false } => "momentum",
            Optimizer::Momentum { nesterov: true } => "nesterov",
            Optimizer::Adam => "adam",
            Optimizer::AdamW => "adamw",
        }
    }

    /// The scalar inputs that its step takes, beside those of the model.
    #[must_use]
    pub const fn inputs(self) -> &'static [&'static str] {
        match self {
            Optimizer::Sgd => &["lr", "weight_decay", "grad_clip_norm"],
            Optimizer::Momentum { .. } => &["lr", "weight_decay", "grad_clip_norm", "momentum"],
            Optimizer::Adam | Optimizer::AdamW => &[
                "lr",
                "weight_decay",
                "grad_clip_norm",
                "beta1",
                "beta2",
                "epsilon",
                "bias_correction1",
                "bias_correction2",
            ],
        }
    }
}

/// How to update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Which optimizer.
    pub optimizer: Optimizer,
}

/// What every parameter's update shares.
struct Step {
    optimizer: Optimizer,
    lr: NodeId,
    weight_decay: NodeId,
    /// What gradients are multiplied by.
    clip: NodeId,
    /// Whether the step counts: bool.
    finite: NodeId,
    /// `momentum`, or those of Adam, in the order of [`Optimizer::inputs`].
    rest: Vec<NodeId>,
}

/// Adds the optimizer's inputs, state and `next` values.
///
/// # Errors
/// [`PassError::Unsupported`] if there is no gradient, or a name is taken.
pub fn run(graph: &mut Graph, options: &Options) -> Result<(), PassError> {
    let gradients = differentiate::gradients(graph);
    if gradients.is_empty() {
        return Err(unsupported("the graph holds no gradients (outputs `w.grad`)".to_owned()));
    }
    for taken in ["finite", "grad_norm"] {
        if graph.outputs().iter().any(|(name, _)| name == taken) {
            return Err(unsupported(format!("the model has an output `{taken}` already")));
        }
    }
    let mut inputs = Vec::new();
    for &name in options.optimizer.inputs() {
        if graph.find(name).is_some() {
            return Err(unsupported(format!("the model has a value `{name}` already")));
        }
        let ty = TensorType::f32(Shape::scalar());
        inputs.push(graph.add(Op::Input(ty), &[], name, Region::Forward)?);
    }
    let [lr, weight_decay, grad_clip_norm, rest @ ..] = &inputs[..] else {
        return Err(unsupported("the optimizer has no inputs".to_owned()));
    };
    let (norm, finite) = gradient_norm(graph, &gradients)?;
    let clip = clip_factor(graph, norm, *grad_clip_norm)?;
    let step = Step {
        optimizer: options.optimizer,
        lr: *lr,
        weight_decay: *weight_decay,
        clip,
        finite,
        rest: rest.to_vec(),
    };
    let rounds = |&(param, _): &(NodeId, NodeId)| weights::updates_low(graph, param);
    if gradients.iter().any(rounds) {
        // Before its next value is guarded with the others.
        stochastic::step(graph)?;
    }
    guard_state(graph, finite)?;
    for &(param, gradient) in &gradients {
        step.update(graph, param, gradient)?;
    }
    drop_gradient_outputs(graph, &gradients);
    let mut b = Builder::new(graph, Region::Update, "");
    let flag = b.cast("finite.flag", finite, DType::F32)?;
    graph.add_output("grad_norm", norm);
    graph.add_output("finite", flag);
    Ok(())
}

fn unsupported(reason: String) -> PassError {
    PassError::Unsupported { pass: "update", reason }
}

fn drop_gradient_outputs(graph: &mut Graph, gradients: &[(NodeId, NodeId)]) {
    let names: Vec<String> = gradients
        .iter()
        .map(|(param, _)| {
            format!("{}{}", graph.node(*param).name.as_str(), differentiate::GRADIENT_SUFFIX)
        })
        .collect();
    let outputs =
        graph.outputs().iter().filter(|(name, _)| !names.contains(name)).cloned().collect();
    graph.set_outputs(outputs);
}

/// The 2-norm over all gradients, and whether it is finite.
fn gradient_norm(
    graph: &mut Graph,
    gradients: &[(NodeId, NodeId)],
) -> Result<(NodeId, NodeId), PassError> {
    let mut total: Option<NodeId> = None;
    for &(param, gradient) in gradients {
        let prefix = format!("{}.grad.norm", graph.node(param).name.as_str());
        let mut b = Builder::new(graph, Region::Update, &prefix);
        let gradient = b.cast("f32", gradient, DType::F32)?;
        let square = b.binary("squares", BinaryOp::Mul, gradient, gradient)?;
        let sum = b.sum_all("square", square)?;
        let mut b = Builder::new(graph, Region::Update, "grad_norm");
        total = Some(match total {
            Some(total) => b.binary("square", BinaryOp::Add, total, sum)?,
            None => sum,
        });
    }
    let total = total.ok_or_else(|| unsupported("there is no gradient".to_owned()))?;
    let mut b = Builder::new(graph, Region::Update, "");
    let norm = b.unary("grad_norm", UnaryOp::Sqrt, total)?;
    // NaN compares false, too.
    let infinity = b.scalar(DType::F32, f64::INFINITY)?;
    let mut finite = b.compare("finite.gradients", CompareOp::Less, total, infinity)?;
    let loss = b.graph.outputs().iter().find(|(name, _)| name == "loss").map(|(_, id)| *id);
    if let Some(loss) = loss.filter(|&loss| b.graph.ty(loss).shape.rank() == 0) {
        let loss = b.cast("loss.f32", loss, DType::F32)?;
        let magnitude = b.unary("loss.magnitude", UnaryOp::Abs, loss)?;
        let finite_loss = b.compare("finite.loss", CompareOp::Less, magnitude, infinity)?;
        finite = b.binary("finite", BinaryOp::And, finite, finite_loss)?;
    }
    Ok((norm, finite))
}

/// `min(1, limit / (norm + 1e-6))`, as `torch.nn.utils.clip_grad_norm_`.
fn clip_factor(graph: &mut Graph, norm: NodeId, limit: NodeId) -> Result<NodeId, PassError> {
    let mut b = Builder::new(graph, Region::Update, "clip");
    let tiny = b.scalar(DType::F32, 1e-6)?;
    let divisor = b.binary("divisor", BinaryOp::Add, norm, tiny)?;
    let ratio = b.binary("ratio", BinaryOp::Div, limit, divisor)?;
    let one = b.scalar(DType::F32, 1.0)?;
    b.binary("", BinaryOp::Min, ratio, one)
}

/// State that the model itself updates (running statistics) keeps its value in a refused step.
fn guard_state(graph: &mut Graph, finite: NodeId) -> Result<(), PassError> {
    for (state, value) in graph.next().clone() {
        let name = graph.node(state).name.as_str().to_owned();
        let mut b = Builder::new(graph, Region::Update, &name);
        let kept = b.keep_unless(finite, value, state)?;
        graph.set_next(state, kept)?;
    }
    Ok(())
}

impl Builder<'_> {
    /// `next`: `new` if the step counts, else `old`.
    fn keep_unless(
        &mut self,
        finite: NodeId,
        new: NodeId,
        old: NodeId,
    ) -> Result<NodeId, PassError> {
        let shape = self.shape(old);
        let condition = self.broadcast("keep", finite, shape)?;
        self.select("next", condition, new, old)
    }

    /// `x · scalar`.
    fn times(&mut self, suffix: &str, x: NodeId, scalar: NodeId) -> Result<NodeId, PassError> {
        let shape = self.shape(x);
        let factor = self.broadcast(&format!("{suffix}.factor"), scalar, shape)?;
        self.binary(suffix, BinaryOp::Mul, x, factor)
    }
}

impl Step {
    /// The next value of one parameter and of its state.
    fn update(&self, graph: &mut Graph, param: NodeId, gradient: NodeId) -> Result<(), PassError> {
        let name = graph.node(param).name.as_str().to_owned();
        let dtype = graph.ty(param).dtype;
        let low = weights::updates_low(graph, param);
        let mut b = Builder::new(graph, Region::Update, &name);
        let gradient = b.cast("grad.f32", gradient, DType::F32)?;
        let weight = b.cast("f32", param, DType::F32)?;
        let clipped = b.times("grad.clipped", gradient, self.clip)?;
        let (weight, gradient) = if self.optimizer == Optimizer::AdamW {
            let rate = b.binary("decay.rate", BinaryOp::Mul, self.lr, self.weight_decay)?;
            let one = b.scalar(DType::F32, 1.0)?;
            let keep = b.binary("decay.keep", BinaryOp::Sub, one, rate)?;
            (b.times("decayed", weight, keep)?, clipped)
        } else {
            let decay = b.times("decay", weight, self.weight_decay)?;
            (weight, b.binary("grad.decayed", BinaryOp::Add, clipped, decay)?)
        };
        let blocks = blocks_of(&b, param).filter(|_| self.optimizer != Optimizer::Sgd);
        let blocks = blocks.as_ref();
        let gradient = match blocks {
            Some(blocks) => b.reshape("grad.blocks", gradient, blocks.clone())?,
            None => gradient,
        };
        let change = match self.optimizer {
            Optimizer::Sgd => b.times("change", gradient, self.lr)?,
            Optimizer::Momentum { nesterov } => {
                let direction = self.momentum(&mut b, &name, gradient, nesterov, blocks)?;
                b.times("change", direction, self.lr)?
            }
            Optimizer::Adam | Optimizer::AdamW => self.adam(&mut b, &name, gradient, blocks)?,
        };
        let shape = b.shape(weight);
        let change = b.reshape("change.whole", change, shape)?;
        let new = b.binary("stepped", BinaryOp::Sub, weight, change)?;
        let new = if low && dtype == DType::BF16 {
            self.narrowed(&mut b, new)?
        } else {
            b.cast("stepped.cast", new, dtype)?
        };
        let next = b.keep_unless(self.finite, new, param)?;
        graph.set_next(param, next)?;
        Ok(())
    }

    /// A new parameter in bf16, rounded at random.
    fn narrowed(&self, b: &mut Builder<'_>, new: NodeId) -> Result<NodeId, PassError> {
        let Some(blocks) = blocks::shape(b.graph, new) else {
            return b.cast("stepped.cast", new, DType::BF16);
        };
        let whole = b.shape(new);
        let new = b.reshape("stepped.blocks", new, blocks)?;
        let new = b.stochastic_bf16("stepped.cast", new)?;
        b.reshape("stepped.whole", new, whole)
    }

    fn momentum(
        &self,
        b: &mut Builder<'_>,
        name: &str,
        gradient: NodeId,
        nesterov: bool,
        blocks: Option<&Shape>,
    ) -> Result<NodeId, PassError> {
        let [momentum] = self.rest[..] else {
            return Err(unsupported("momentum is not an input".to_owned()));
        };
        let state = format!("{name}.momentum");
        let (moment, buffer) = self.moment(b, &state, gradient, Sign::Signed, blocks)?;
        let decayed = b.times("momentum.decayed", buffer, momentum)?;
        let new = b.binary("momentum.new", BinaryOp::Add, decayed, gradient)?;
        self.keep_moment(b, &state, &moment, new)?;
        if nesterov {
            let ahead = b.times("momentum.ahead", new, momentum)?;
            return b.binary("direction", BinaryOp::Add, gradient, ahead);
        }
        Ok(new)
    }

    fn adam(
        &self,
        b: &mut Builder<'_>,
        name: &str,
        gradient: NodeId,
        blocks: Option<&Shape>,
    ) -> Result<NodeId, PassError> {
        let [beta1, beta2, epsilon, correction1, correction2] = self.rest[..] else {
            return Err(unsupported("Adam's numbers are not inputs".to_owned()));
        };
        let average = |b: &mut Builder<'_>, state: &str, value, beta, sign| {
            self.average(b, &format!("{name}.{state}"), value, beta, (sign, blocks))
        };
        let mean = average(b, "exp_avg", gradient, beta1, Sign::Signed)?;
        let square = b.binary("grad.square", BinaryOp::Mul, gradient, gradient)?;
        let variance = average(b, "exp_avg_sq", square, beta2, Sign::Unsigned)?;
        let root = b.unary("exp_avg_sq.root", UnaryOp::Sqrt, variance)?;
        let correction = b.unary("bias_correction2.root", UnaryOp::Sqrt, correction2)?;
        let shape = b.shape(root);
        let correction = b.broadcast("bias_correction2.spread", correction, shape.clone())?;
        let scaled = b.binary("exp_avg_sq.scaled", BinaryOp::Div, root, correction)?;
        let epsilon = b.broadcast("epsilon.spread", epsilon, shape)?;
        let divisor = b.binary("divisor", BinaryOp::Add, scaled, epsilon)?;
        let ratio = b.binary("ratio", BinaryOp::Div, mean, divisor)?;
        let rate = b.binary("rate", BinaryOp::Div, self.lr, correction1)?;
        b.times("change", ratio, rate)
    }

    /// `state = beta · state + (1 - beta) · value`, returned.
    fn average(
        &self,
        b: &mut Builder<'_>,
        name: &str,
        value: NodeId,
        beta: NodeId,
        (sign, blocks): (Sign, Option<&Shape>),
    ) -> Result<NodeId, PassError> {
        let (moment, state) = self.moment(b, name, value, sign, blocks)?;
        let b = &mut Builder::new(b.graph, Region::Update, name);
        let old = b.times("decayed", state, beta)?;
        let one = b.scalar(DType::F32, 1.0)?;
        let rest = b.binary("rest", BinaryOp::Sub, one, beta)?;
        let share = b.times("share", value, rest)?;
        let new = b.binary("new", BinaryOp::Add, old, share)?;
        self.keep_moment(b, name, &moment, new)?;
        Ok(new)
    }

    /// `next %state = new` unless the step is refused.
    fn keep(
        &self,
        b: &mut Builder<'_>,
        name: &str,
        state: NodeId,
        new: NodeId,
    ) -> Result<(), PassError> {
        let next =
            Builder::new(b.graph, Region::Update, name).keep_unless(self.finite, new, state)?;
        Ok(b.graph.set_next(state, next)?)
    }
}
