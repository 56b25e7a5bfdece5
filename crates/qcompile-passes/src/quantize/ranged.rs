//! Rounds activations within ranges that are known before a step begins, and the weights of the layers that read them.
//!
//! This is how integers are used in inference (Jacob et al. 2018, arXiv:1712.05877): `q = round(x / s) + z` for data, with
//! `s` and `z` from a range; one scale for each output channel of a weight; biases as i32 with the scale `s_x · s_w`.
//! A range is a constant (post-training quantization), or a state that follows what the value is in training.

use super::PASS;
use super::activations::{activations, chosen, is_move};
use super::biases;
use super::codes::{Codes, Parameters};
use super::layer::{Layer, reads_quantized};
use super::scale;
use super::step_size;
use crate::PassError;
use crate::builder::Builder;
use crate::calibrate::Range;
use qcompile_ir::{
    BinaryOp, CompareOp, DType, Graph, Name, NodeId, Op, ReduceOp, Region, Shape, Tensor, UnaryOp,
};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The parts of a range that a step of training keeps, and takes from its batch; those of PyTorch's moving average.
const KEPT: f64 = 0.99;
const TAKEN: f64 = 0.01;

/// What weights are rounded to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Weights {
    /// i8 or i4.
    pub dtype: DType,
    /// What shares a scale.
    pub scales: WeightScales,
}

/// What of a weight shares a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightScales {
    /// All of it. Its bias is not rounded.
    Tensor,
    /// An output channel.
    Channel,
    /// So many elements along the axis that a product of matrices sums over; of a convolution, an output channel.
    Block(usize),
}

/// Who holds the ranges of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// They are fixed.
    Constant,
    /// States, moved in each step towards the extremes of the batch by an exponential average.
    State,
    /// Parameters: scales of activations and of weights are learned (LSQ), zero points stay.
    Parameter,
}

/// How values are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheme {
    /// What activations are rounded to.
    pub codes: Codes,
    /// What weights are rounded to.
    pub weights: Weights,
    /// Who holds the ranges.
    pub held: Held,
}

/// Inserts `quantize`, `dequantize` pairs at the [`activations`] of the layers noted as int8, and at their weights.
/// Returns the number of layers.
///
/// # Errors
/// [`PassError::Unsupported`] where a value has no range, or blocks do not divide a weight.
pub fn insert_ranged(
    graph: &mut Graph,
    ranges: &BTreeMap<Name, Range>,
    scheme: &Scheme,
) -> Result<usize, PassError> {
    let layers = chosen(graph);
    if let Some(split) =
        layers.iter().find(|layer| !graph.node(layer.node).note.channels.is_empty())
    {
        let name = &graph.node(split.node).name;
        let reason = format!("{name}: channels that stay f32 are not for layers with ranges");
        return Err(PassError::Unsupported { pass: PASS, reason });
    }
    let mut known: BTreeMap<NodeId, Parameters> = BTreeMap::new();
    for value in activations(graph) {
        let name = graph.node(value).name.clone();
        // What is moved has the scale that it had. Its operand is rounded by now, if it is at all.
        let moved = is_move(graph, value).then(|| known.get(&graph.operand(value, 0))).flatten();
        if let Some(&parameters) = moved {
            let rounded = rounded(graph, value, parameters, scheme.codes.dtype())?;
            known.insert(rounded, parameters);
            continue;
        }
        let range = ranges.get(&name).ok_or_else(|| PassError::Unsupported {
            pass: PASS,
            reason: format!("{name} has no range"),
        })?;
        let ends = match scheme.held {
            Held::Constant => Some(ends(graph, &name, *range, Op::Const)?),
            Held::State => Some(ends(graph, &name, *range, Op::State)?),
            Held::Parameter => None,
        };
        let mut b = Builder::new(graph, Region::Forward, name.as_str());
        let trained = scheme.held == Held::State;
        let parameters = match ends {
            Some(ends) => scheme.codes.parameters(&mut b, ends, trained)?,
            None => scheme.codes.learned(&mut b, *range)?,
        };
        let rounded = rounded(graph, value, parameters, scheme.codes.dtype())?;
        if let Some(ends) = ends.filter(|_| trained) {
            follow(graph, value, ends)?;
        }
        known.insert(rounded, parameters);
    }
    let mut weights: BTreeMap<(NodeId, usize), NodeId> = BTreeMap::new();
    for layer in &layers {
        let operand = graph.operand(layer.node, 1);
        if reads_quantized(graph, operand) {
            continue;
        }
        let rounded = match weights.get(&(operand, layer.weight_axis)) {
            Some(&rounded) => rounded,
            None => weight(graph, layer, operand, scheme)?,
        };
        weights.insert((operand, layer.weight_axis), rounded);
        graph.set_operand(layer.node, 1, rounded)?;
    }
    if scheme.held != Held::Constant {
        biases::train_with_rounded(graph)?;
    }
    Ok(layers.len())
}

/// The leaves that hold a range.
fn ends(
    graph: &mut Graph,
    name: &Name,
    range: Range,
    leaf: fn(Arc<Tensor>) -> Op,
) -> Result<[NodeId; 2], PassError> {
    let mut end = |word: &str, number: f32| {
        let number = Arc::new(Tensor::scalar(DType::F32, f64::from(number)));
        graph.add(leaf(number), &[], format!("{}.{word}", name.as_str()), Region::Forward)
    };
    Ok([end("low", range.low)?, end("high", range.high)?])
}

/// Moves a range towards the extremes of a value: `momentum · range + (1 - momentum) · extreme`. One that is not finite
/// moves nothing.
fn follow(graph: &mut Graph, value: NodeId, [low, high]: [NodeId; 2]) -> Result<(), PassError> {
    let axes: Vec<usize> = (0..graph.ty(value).shape.rank()).collect();
    for state in [low, high] {
        let name = graph.node(state).name.as_str().to_owned();
        let mut b = Builder::new(graph, Region::Forward, &name);
        let fixed = b.unary("fixed", UnaryOp::StopGradient, value)?;
        let signed = if state == low { b.unary("negated", UnaryOp::Neg, fixed)? } else { fixed };
        let peak =
            b.add("peak", Op::Reduce { op: ReduceOp::Max, axes: axes.clone() }, &[signed])?;
        let peak = b.reshape("extreme", peak, Shape::scalar())?;
        b.region = Region::Update;
        let zero = b.scalar(DType::F32, 0.0)?;
        let reach = b.binary("reach", BinaryOp::Max, peak, zero)?;
        let infinity = b.scalar(DType::F32, f64::INFINITY)?;
        // NaN compares false, too.
        let finite = b.compare("finite", CompareOp::Less, reach, infinity)?;
        let end = if state == low { b.unary("end", UnaryOp::Neg, reach)? } else { reach };
        let end = b.select("finite.end", finite, end, state)?;
        let kept = b.scaled("kept", state, KEPT)?;
        let taken = b.scaled("taken", end, TAKEN)?;
        let next = b.binary("next", BinaryOp::Add, kept, taken)?;
        graph.set_next(state, next)?;
    }
    Ok(())
}

/// Puts a pair between a value and all its users. Outputs of the graph stay as they are.
fn rounded(
    graph: &mut Graph,
    value: NodeId,
    Parameters { scale, zero_point }: Parameters,
    dtype: DType,
) -> Result<NodeId, PassError> {
    let users = graph.uses(value);
    let name = graph.node(value).name.as_str().to_owned();
    let mut b = Builder::new(graph, Region::Forward, &name);
    let operands =
        |x: NodeId| -> Vec<NodeId> { [x, scale].into_iter().chain(zero_point).collect() };
    let q = b.add("q", Op::Quantize { dtype, axis: None }, &operands(value))?;
    let dq = b.add("dq", Op::Dequantize { axis: None }, &operands(q))?;
    for (user, position) in users {
        graph.set_operand(user, position, dq)?;
    }
    Ok(dq)
}

/// The weight of a layer, rounded.
fn weight(
    graph: &mut Graph,
    layer: &Layer,
    weight: NodeId,
    scheme: &Scheme,
) -> Result<NodeId, PassError> {
    let matrix = matches!(graph.op(layer.node), Op::Matmul { .. });
    let block = match scheme.weights.scales {
        WeightScales::Tensor => return rounded_along(graph, weight, None, scheme),
        WeightScales::Block(block) if matrix => block,
        WeightScales::Channel | WeightScales::Block(_) => {
            return rounded_along(graph, weight, Some(layer.weight_axis), scheme);
        }
    };
    let shape = graph.ty(weight).shape.clone();
    let name = graph.node(weight).name.as_str().to_owned();
    let refused = |reason: String| PassError::Unsupported { pass: PASS, reason };
    let Some(sizes) = shape.as_fixed().filter(|sizes| sizes.len() == 2) else {
        return Err(refused(format!("{name} is {shape}: only matrices are rounded in blocks")));
    };
    let inner = sizes[1 - layer.weight_axis];
    if block == 0 || inner % block != 0 {
        return Err(refused(format!(
            "{name}: blocks of {block} do not divide the {inner} elements that are summed over"
        )));
    }
    // Rows of blocks: [channels · inner / block, block].
    let swap = Op::Transpose(vec![1, 0]);
    let across = layer.weight_axis == 1;
    let mut b = Builder::new(graph, Region::Forward, &name);
    let rows = if across { b.add("across", swap.clone(), &[weight])? } else { weight };
    let blocks = Shape::fixed(&[layer.channels * (inner / block), block]);
    let parts = b.reshape("blocks", rows, blocks)?;
    let rounded = rounded_along(b.graph, parts, Some(0), scheme)?;
    let rows = b.reshape("rounded", rounded, Shape::fixed(&[layer.channels, inner]))?;
    if across { b.add("along", swap, &[rows]) } else { Ok(rows) }
}

/// A weight rounded symmetrically, by one scale or one for each index of an axis: of its largest magnitude, or learned.
fn rounded_along(
    graph: &mut Graph,
    weight: NodeId,
    axis: Option<usize>,
    scheme: &Scheme,
) -> Result<NodeId, PassError> {
    let dtype = scheme.weights.dtype;
    let scale = match scheme.held {
        Held::Parameter => step_size::of_weight(graph, weight, axis, dtype)?,
        Held::Constant | Held::State => {
            scale::current(graph, weight, axis, dtype, Region::Forward)?
        }
    };
    let name = graph.node(weight).name.as_str().to_owned();
    let mut b = Builder::new(graph, Region::Forward, &name);
    let q = b.add("q", Op::Quantize { dtype, axis }, &[weight, scale])?;
    b.add("dq", Op::Dequantize { axis }, &[q, scale])
}
