//! The meaning of every op, slow and obvious: the oracle that native code is compared with.
//!
//! Floats are computed in f64 and, unless [`Rounding::Exact`] is asked for, rounded once to the type of each node;
//! integers are computed in i64 and wrap to their type. What the ops leave open is decided here:
//!
//! * `max`, `min`, `relu` and the maxima of reductions and pools pass a NaN on; the maximum of nothing is -inf or
//!   the smallest integer;
//! * conversion to an integer truncates and saturates, NaN gives 0; between integers it wraps;
//! * integer division truncates and a zero divisor gives 0; a negative integer power is 0, but for the bases 1 and -1;
//! * conversion to a float of 8 bits saturates; infinity does so only where the type has none; NaN stays NaN;
//! * `quantize` rounds to nearest even and clamps; a scale of 0, and NaN as an integer, give what dequantizes to 0;
//! * `straight_through` passes `dy` where `x` lies between the smallest code less half a step and the largest one more
//!   half a step, both times the scale: what rounds into the range;
//! * an average over no place at all is 0;
//! * attention leaves out what `causal` hides, so nothing there matters; of no key at all it is 0, and of a row whose
//!   keys are all masked with -inf NaN, as the softmax of such a row is. Nothing is rounded between its operands and
//!   its result; native code computes in f32, and may round probabilities to the type of the operands.

mod attention;
mod contract;
mod differences;
mod elementwise;
mod erf;
mod indexing;
mod quantized;
mod random;
mod rearrange;
mod recurrence;
mod rows;
mod value;

pub use differences::central_differences;
pub use value::{Data, Value, Values};

use crate::{CollectiveOp, Graph, Node, NodeId, Op, Tensor};
use std::collections::BTreeMap;
use std::ops::Range;
use thiserror::Error;

/// How results are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rounding {
    /// Each result is rounded to the element type of its node.
    #[default]
    PerOp,
    /// Floats stay f64 throughout, whatever their element type.
    Exact,
}

/// What to evaluate and within which limits.
#[derive(Clone, Debug)]
pub struct EvalOptions {
    /// How results are kept.
    pub rounding: Rounding,
    /// Values of leaves by name, in place of their own or of the inputs given.
    pub leaves: BTreeMap<String, Vec<f64>>,
    /// Names of the values wanted, with everything they depend on; none for all.
    pub targets: Vec<String>,
    /// Most elementary operations to spend.
    pub max_work: u64,
    /// Most elements to hold.
    pub max_elements: u64,
}

impl Default for EvalOptions {
    fn default() -> EvalOptions {
        EvalOptions {
            rounding: Rounding::PerOp,
            leaves: BTreeMap::new(),
            targets: Vec::new(),
            max_work: 1 << 36,
            max_elements: 1 << 27,
        }
    }
}

/// Why there is no result.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum EvalError {
    /// An input is missing or has the wrong type, or a name in the options means nothing.
    #[error("{name}: {reason}")]
    Input {
        /// The input or name.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A node met a value outside its domain (an index, a label).
    #[error("%{name}: {reason}")]
    Node {
        /// The node.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// The limit on operations or elements is reached.
    #[error("%{name}: evaluation needs more than {limit} {what}")]
    Limit {
        /// The node that is too much.
        name: String,
        /// The limit.
        limit: u64,
        /// What is limited.
        what: &'static str,
    },
}

/// What one rank is given.
#[derive(Clone, Copy, Debug)]
pub struct Rank<'a> {
    /// Inputs by name; those that the graph does not have are ignored.
    pub inputs: &'a BTreeMap<String, Tensor>,
    /// Its batch size N.
    pub batch: usize,
}

/// Evaluates one step on one rank.
///
/// # Errors
/// [`EvalError`] for inputs that do not fit, indices out of range, or work beyond the limits.
pub fn eval(
    graph: &Graph,
    inputs: &BTreeMap<String, Tensor>,
    batch: usize,
    options: &EvalOptions,
) -> Result<Values, EvalError> {
    let mut ranks = eval_ranks(graph, &[Rank { inputs, batch }], options)?;
    Ok(ranks.swap_remove(0))
}

/// Evaluates one step on several ranks in lockstep: `all_reduce` combines their values.
///
/// # Errors
/// As [`eval`], for any rank.
pub fn eval_ranks(
    graph: &Graph,
    ranks: &[Rank<'_>],
    options: &EvalOptions,
) -> Result<Vec<Values>, EvalError> {
    if ranks.is_empty() {
        return Ok(Vec::new());
    }
    let mut evaluator = Evaluator::new(graph, ranks, options);
    let wanted = evaluator.wanted()?;
    for id in graph.order().into_iter().filter(|id| wanted[id.index()]) {
        evaluator.step(id)?;
    }
    Ok(evaluator.values.into_iter().map(|values| Values::new(graph, values)).collect())
}

/// Values of every rank under evaluation, by node index.
struct Evaluator<'a> {
    graph: &'a Graph,
    ranks: &'a [Rank<'a>],
    options: &'a EvalOptions,
    values: Vec<Vec<Option<Value>>>,
    work: u64,
    elements: u64,
}

impl<'a> Evaluator<'a> {
    fn new(graph: &'a Graph, ranks: &'a [Rank<'a>], options: &'a EvalOptions) -> Evaluator<'a> {
        let values = vec![vec![None; graph.len()]; ranks.len()];
        Evaluator { graph, ranks, options, values, work: 0, elements: 0 }
    }

    /// For each node index, whether a target depends on it.
    fn wanted(&self) -> Result<Vec<bool>, EvalError> {
        let unknown = |name: &String, reason: &str| EvalError::Input {
            name: name.clone(),
            reason: reason.to_owned(),
        };
        for name in self.options.leaves.keys() {
            if !self.graph.find(name).is_some_and(|id| self.graph.op(id).is_leaf()) {
                return Err(unknown(name, "the graph has no such leaf"));
            }
        }
        if self.options.targets.is_empty() {
            return Ok(vec![true; self.graph.len()]);
        }
        let mut wanted = vec![false; self.graph.len()];
        let mut stack = Vec::new();
        for name in &self.options.targets {
            let id = self.graph.find(name);
            stack.push(id.ok_or_else(|| unknown(name, "the graph has no such value"))?);
        }
        while let Some(id) = stack.pop() {
            if !std::mem::replace(&mut wanted[id.index()], true) {
                stack.extend(self.graph.operands(id));
            }
        }
        Ok(wanted)
    }

    /// Evaluates one node on every rank; its operands are evaluated.
    fn step(&mut self, id: NodeId) -> Result<(), EvalError> {
        let node = self.graph.node(id);
        let operands = self.graph.operands(id);
        let mut results = Vec::with_capacity(self.ranks.len());
        for rank in 0..self.ranks.len() {
            let shape = node.ty.shape.sizes(self.ranks[rank].batch);
            let values: Vec<&Value> =
                operands.iter().filter_map(|id| self.values[rank][id.index()].as_ref()).collect();
            let replaced =
                self.values[rank][id.index()].as_ref().map_or(0, |v| v.data.len() as u64);
            let work = work(&node.op, &shape, &values);
            self.elements = limited(
                node,
                self.elements - replaced,
                elements(&shape),
                self.options.max_elements,
                "elements",
            )?;
            self.work = limited(node, self.work, work, self.options.max_work, "operations")?;
            let mut value = if node.op.is_leaf() {
                self.leaf(node, shape, &self.ranks[rank])?
            } else {
                let data = compute(node, &shape, &values, self.range(rank), self.options.rounding)
                    .map_err(|reason| EvalError::Node {
                        name: node.name.as_str().to_owned(),
                        reason,
                    })?;
                Value { shape, data }
            };
            value.data.round(node.ty.dtype, self.options.rounding);
            results.push(value);
        }
        if let Op::AllReduce(op) = node.op {
            let mut combined = combine(op, &results);
            combined.data.round(node.ty.dtype, self.options.rounding);
            results.fill(combined);
        }
        for (values, result) in self.values.iter_mut().zip(results) {
            values[id.index()] = Some(result);
        }
        Ok(())
    }

    /// The samples of a rank among those of all.
    fn range(&self, rank: usize) -> Range<usize> {
        let begin: usize = self.ranks[..rank].iter().map(|rank| rank.batch).sum();
        begin..begin + self.ranks[rank].batch
    }

    fn leaf(&self, node: &Node, shape: Vec<usize>, rank: &Rank<'_>) -> Result<Value, EvalError> {
        let name = node.name.as_str();
        let wrong = |reason: String| Err(EvalError::Input { name: name.to_owned(), reason });
        if let Some(values) = self.options.leaves.get(name) {
            let data = Data::from_f64(node.ty.dtype, values);
            if data.len() as u64 != elements(&shape) {
                return wrong(format!("{} values were given for {:?}", data.len(), shape));
            }
            return Ok(Value { shape, data });
        }
        match &node.op {
            Op::Param(tensor) | Op::State(tensor) | Op::Const(tensor) => Ok(Value::from(&**tensor)),
            _ => match rank.inputs.get(name) {
                None => wrong("the input is missing".to_owned()),
                Some(tensor) if tensor.dtype() != node.ty.dtype || tensor.shape() != shape => {
                    wrong(format!(
                        "the input is {}, but {} at batch size {} is needed",
                        tensor.ty(),
                        node.ty,
                        rank.batch
                    ))
                }
                Some(tensor) => Ok(Value::from(tensor)),
            },
        }
    }
}

/// Number of elements; too many for any limit if the sizes overflow even beside a zero.
fn elements(shape: &[usize]) -> u64 {
    let largest = shape.iter().try_fold(1_usize, |product, &size| product.checked_mul(size.max(1)));
    match largest {
        None => u64::MAX,
        Some(_) if shape.contains(&0) => 0,
        Some(elements) => elements as u64,
    }
}

fn limited(
    node: &Node,
    spent: u64,
    more: u64,
    limit: u64,
    what: &'static str,
) -> Result<u64, EvalError> {
    match spent.checked_add(more).filter(|&spent| spent <= limit) {
        Some(spent) => Ok(spent),
        None => Err(EvalError::Limit { name: node.name.as_str().to_owned(), limit, what }),
    }
}

/// Elementary operations of a node, roughly.
fn work(op: &Op, shape: &[usize], operands: &[&Value]) -> u64 {
    let result = elements(shape);
    let operand =
        |position: usize| operands.get(position).map_or(0, |value| value.data.len() as u64);
    let window = |kernel: [usize; 2]| (kernel[0] as u64).saturating_mul(kernel[1] as u64);
    match op {
        Op::Matmul { transpose_a, .. } => {
            let inner = operands
                .first()
                .map_or(0, |a| a.shape[a.shape.len() - if *transpose_a { 2 } else { 1 }]);
            result.saturating_mul(inner as u64)
        }
        // Each place of the output meets the weights of its output channel: weights / outputs of them.
        Op::Conv2d(_) => {
            let outputs = shape.last().map_or(1, |&size| size.max(1) as u64);
            result.saturating_mul(operand(1) / outputs)
        }
        Op::Conv2dGradInput(_) => {
            let outputs = operands[0].shape.last().map_or(1, |&size| size.max(1) as u64);
            operand(0).saturating_mul(operand(1) / outputs)
        }
        Op::Conv2dGradWeight(_) => {
            let outputs = shape.first().map_or(1, |&size| size.max(1) as u64);
            operand(1).saturating_mul(result / outputs)
        }
        // Scores of all pairs, and products of their width: at most five of them.
        Op::Attention { .. } | Op::AttentionGrad { .. } => {
            let widths = [0, 2].map(|at: usize| operands[at].shape[3] as u64);
            let pairs =
                elements(&operands[0].shape[..3]).saturating_mul(operands[1].shape[1] as u64);
            pairs.saturating_mul(widths[0].saturating_add(widths[1]).saturating_add(4))
        }
        // Every gate of every row and step meets a row of R.
        Op::Recurrence(_) => {
            result.saturating_add(operand(0).saturating_mul(operands[1].shape[1] as u64))
        }
        Op::RecurrenceGrad { .. } => {
            result.saturating_mul((operands[1].shape[1] as u64).saturating_add(1))
        }
        Op::MaxPool2d(g) | Op::AveragePool2d(g) => result.saturating_mul(window(g.kernel)),
        Op::MaxPool2dGrad(g) => operand(1).saturating_mul(window(g.kernel)),
        Op::AveragePool2dGrad(g) => operand(0).saturating_mul(window(g.kernel)),
        _ => (0..operands.len()).map(operand).fold(result, u64::saturating_add),
    }
}

/// Elements of a node that is not a leaf; the reason if an index or label is out of range.
fn compute(
    node: &Node,
    shape: &[usize],
    operands: &[&Value],
    samples: Range<usize>,
    rounding: Rounding,
) -> Result<Data, String> {
    let dtype = node.ty.dtype;
    // Operands of a typed node are as many and of the shapes that the op needs.
    let [a, b, c] = [0, 1, 2].map(|position| operands.get(position).copied());
    let missing = || "an operand is missing".to_owned();
    let (x, y, z) = (|| a.ok_or_else(missing), || b.ok_or_else(missing), || c.ok_or_else(missing));
    Ok(match &node.op {
        Op::Input(_) | Op::Param(_) | Op::State(_) | Op::Const(_) => return Err(missing()),
        Op::Size(dim) => Data::Float(vec![dim.size(samples.len()) as f64]),
        Op::Training => Data::Int(vec![1]),
        Op::Iota(_) => Data::Int((0..).take(shape[0]).collect()),
        Op::Random { seed, .. } => {
            let step = x()?.data.ints().first().copied().unwrap_or(0);
            let each = node.ty.shape.elements().filter(|all| all.batch).map_or(0, |all| all.scale);
            let first = (samples.start as u64).wrapping_mul(each as u64);
            random::uniform(*seed, step, first, shape.iter().product())
        }
        Op::Unary(op) => elementwise::unary(*op, dtype, &x()?.data),
        Op::Cast(_) => elementwise::cast(dtype, rounding, &x()?.data),
        Op::Binary(op) => elementwise::binary(*op, &x()?.data, &y()?.data),
        Op::Compare(op) => elementwise::compare(*op, &x()?.data, &y()?.data),
        Op::Select => elementwise::select(&x()?.data, &y()?.data, &z()?.data),
        Op::Reduce { op, axes } => rows::reduce(*op, axes, dtype, x()?, shape),
        Op::Matmul { transpose_a, transpose_b } => {
            contract::matmul(x()?, y()?, *transpose_a, *transpose_b, shape)
        }
        Op::Conv2d(geometry) => contract::conv2d(geometry, x()?, y()?, shape),
        Op::Conv2dGradInput(geometry) => contract::conv2d_grad_input(geometry, x()?, y()?, shape),
        Op::Conv2dGradWeight(geometry) => contract::conv2d_grad_weight(geometry, x()?, y()?, shape),
        Op::MaxPool2d(geometry) => contract::max_pool2d(geometry, x()?, shape),
        Op::MaxPool2dGrad(geometry) => contract::max_pool2d_grad(geometry, x()?, y()?),
        Op::AveragePool2d(geometry) => contract::average_pool2d(geometry, x()?, shape),
        Op::AveragePool2dGrad(geometry) => contract::average_pool2d_grad(geometry, x()?, shape),
        Op::Reshape(_) => x()?.data.clone(),
        Op::Transpose(permutation) => rearrange::transpose(permutation, x()?, shape),
        Op::Broadcast(_) => rearrange::broadcast(x()?, shape),
        Op::Slice { axis, start, step, .. } => rearrange::slice(*axis, *start, *step, x()?, shape),
        Op::Pad { axis, low, interior, value, .. } => {
            rearrange::pad(*axis, *low, *interior, f64::from(*value), dtype, x()?, shape)
        }
        Op::Concat { axis } => rearrange::concat(*axis, operands, shape),
        Op::Gather => indexing::gather(x()?, y()?)?,
        Op::Scatter { op, .. } => indexing::scatter(*op, x()?, y()?, shape)?,
        Op::TopK { k, largest } => indexing::top_k(*k, *largest, x()?),
        Op::Attention { scale, causal, products } => {
            attention::attention(*scale, *causal, (*products, rounding), operands, shape)
        }
        Op::AttentionGrad { of, scale, causal, products, rounding: gradients } => {
            let products = (*products, rounding);
            attention::gradient(*of, *scale, *causal, products, *gradients, operands, shape)
        }
        Op::Softmax => rows::softmax(x()?),
        Op::LogSoftmax => rows::log_softmax(x()?),
        Op::CrossEntropy => rows::cross_entropy(x()?, y()?)?,
        Op::CrossEntropyGrad => rows::cross_entropy_grad(x()?, y()?, z()?)?,
        Op::Recurrence(op) => recurrence::recurrence(op, (dtype, rounding), operands, shape),
        Op::RecurrenceGrad { recurrence, cell, rounding: gradients } => {
            let kept = (dtype, rounding);
            recurrence::recurrence_grad(recurrence, *cell, *gradients, kept, operands, shape)
        }
        Op::Quantize { dtype, axis } => {
            let parameters = quantized::Parameters::new(*axis, x()?, y()?, c);
            quantized::quantize(*dtype, rounding, x()?, &parameters)
        }
        Op::Dequantize { axis } => {
            quantized::dequantize(x()?, &quantized::Parameters::new(*axis, x()?, y()?, c))
        }
        Op::StraightThrough { dtype, axis } => {
            let parameters =
                quantized::Parameters::new(*axis, x()?, z()?, operands.get(3).copied());
            quantized::straight_through(*dtype, rounding, x()?, y()?, &parameters)
        }
        Op::AllReduce(_) => x()?.data.clone(),
    })
}

fn combine(op: CollectiveOp, ranks: &[Value]) -> Value {
    let mut combined = ranks[0].clone();
    let Data::Float(values) = &mut combined.data else {
        return combined;
    };
    for rank in &ranks[1..] {
        for (value, &other) in values.iter_mut().zip(rank.data.floats()) {
            *value = match op {
                CollectiveOp::Sum | CollectiveOp::Mean => *value + other,
                CollectiveOp::Max => elementwise::maximum(*value, other),
            };
        }
    }
    if op == CollectiveOp::Mean {
        values.iter_mut().for_each(|value| *value /= ranks.len() as f64);
    }
    combined
}

#[cfg(test)]
mod tests;
