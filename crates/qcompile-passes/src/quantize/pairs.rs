//! Brings every `dequantize` next to the `quantize` whose codes it reads.
//!
//! *Before*: codes that are reshaped, joined, pooled between the two, as models in ONNX have them. *After*: the codes are dequantized
//! first, and what was done to them is done to the values. *Why here*: before anything looks for plain pairs: layers, and
//! `differentiate`, which passes gradients straight through a pair only. Every step is an equality, bit for bit; after
//! `differentiate`, [`optimise`](super::optimise) moves the codes back to where they are cheap.

use super::window::is_positive;
use crate::PassError;
use crate::simplify::splat;
use qcompile_ir::{BinaryOp, DType, Graph, NodeId, Op, QuantizedRange, Region, Shape, UnaryOp};
use std::collections::{BTreeMap, BTreeSet};

/// Most ops between a `dequantize` and what it reads; with more it stays.
const MOST_MOVES: usize = 1000;

/// Scale and zero point of a `dequantize`, and their axis.
#[derive(Clone, Copy)]
struct Parameters<'a> {
    operands: &'a [NodeId],
    axis: Option<usize>,
}

impl Parameters<'_> {
    fn along(self, axis: Option<usize>) -> Self {
        Parameters { axis, ..self }
    }

    fn is_positive(self, graph: &Graph) -> bool {
        is_positive(graph, self.operands[0])
    }

    /// The code that means 0, if it is known and one for all.
    fn zero(self, graph: &Graph) -> Option<f64> {
        match self.operands[1..] {
            [zero_point] => splat(graph, zero_point),
            _ => Some(0.0),
        }
    }
}

/// Moves every `dequantize` in front of what moves or chooses among its codes, if they come from a `quantize`. Returns how many
/// were moved.
///
/// # Errors
/// [`PassError::Graph`], a defect of this pass.
pub fn join_pairs(graph: &mut Graph) -> Result<usize, PassError> {
    let mut joined = 0;
    for id in graph.order() {
        let &Op::Dequantize { axis } = graph.op(id) else { continue };
        let operands = graph.operands(id);
        let (codes, parameters) = (operands[0], Parameters { operands: &operands[1..], axis });
        if matches!(graph.op(codes), Op::Quantize { .. })
            || !reaches_quantize(graph, codes, parameters)
        {
            continue;
        }
        let region = graph.node(id).region;
        let value = value(graph, codes, parameters, region, &mut BTreeMap::new())?;
        let origin = graph.node(id).note.origin.clone();
        graph.replace_uses(id, value)?;
        graph.swap_names(id, value);
        graph.note_mut(value).origin = origin;
        joined += 1;
    }
    graph.sweep();
    Ok(joined)
}

/// How the codes `id` are made of others, if dequantizing those and doing the same gives the same: which operands
/// those are, with the axis that the parameters have there.
fn made_of(
    graph: &Graph,
    id: NodeId,
    parameters: Parameters<'_>,
) -> Option<(Vec<usize>, Option<usize>)> {
    let axis = parameters.axis;
    let count = graph.operands(id).len();
    let from = || &graph.ty(graph.operand(id, 0)).shape;
    match graph.op(id) {
        Op::Reshape(to) => {
            let Some(axis) = axis else { return Some((vec![0], None)) };
            Some((vec![0], Some(same_axis(from(), to, axis)?)))
        }
        Op::Transpose(permutation) => Some((vec![0], axis.map(|axis| permutation[axis]))),
        Op::Slice { axis: at, .. } if axis != Some(*at) => Some((vec![0], axis)),
        Op::Concat { axis: at } if axis != Some(*at) => Some(((0..count).collect(), axis)),
        Op::Pad { axis: at, value, .. } if axis != Some(*at) => {
            let pads_zero = parameters.zero(graph) == Some(f64::from(*value));
            pads_zero.then_some((vec![0], axis))
        }
        // Codes that become floats, perhaps are moved, and become codes again.
        Op::Cast(DType::F32) if is_code(graph, graph.operand(id, 0)) => Some((vec![0], axis)),
        Op::Cast(dtype) if is_code(graph, id) => {
            whole(graph, graph.operand(id, 0), *dtype, parameters).then_some((vec![0], axis))
        }
        Op::Broadcast(_) if axis.is_none() => Some((vec![0], None)),
        Op::Gather if axis.is_none() => Some((vec![0], None)),
        Op::Select => Some((vec![1, 2], axis)),
        Op::Unary(UnaryOp::Relu) => {
            let rising = parameters.is_positive(graph) && parameters.zero(graph) == Some(0.0);
            rising.then_some((vec![0], axis))
        }
        Op::Binary(BinaryOp::Max | BinaryOp::Min) => {
            parameters.is_positive(graph).then_some((vec![0, 1], axis))
        }
        // A window of padding alone gives the smallest code, which is another value than the smallest float.
        Op::MaxPool2d(geometry) if axis.is_none_or(|axis| axis == 3) => {
            let rising = parameters.is_positive(graph) && geometry.meets_input();
            rising.then_some((vec![0], axis))
        }
        _ => None,
    }
}

/// Whether a value has the type of codes.
fn is_code(graph: &Graph, id: NodeId) -> bool {
    let dtype = graph.ty(id).dtype;
    !dtype.is_float() && QuantizedRange::of(dtype, false).is_some()
}

/// Whether a float value moves or chooses among codes of this type only, so that it is one. Codes of another type wrap or
/// saturate, and f32 does not hold all of i32.
fn whole(graph: &Graph, id: NodeId, dtype: DType, parameters: Parameters<'_>) -> bool {
    let mut stack = vec![(id, parameters.axis)];
    let mut seen = BTreeSet::new();
    while let Some((id, axis)) = stack.pop() {
        if is_code(graph, id) {
            if graph.ty(id).dtype != dtype || dtype == DType::I32 {
                return false;
            }
            continue;
        }
        if !seen.insert(id) {
            continue;
        }
        let made = made_of(graph, id, parameters.along(axis));
        let Some((operands, axis)) = made.filter(|_| graph.ty(id).dtype == DType::F32) else {
            return false;
        };
        stack.extend(operands.into_iter().map(|at| (graph.operand(id, at), axis)));
        if seen.len() > MOST_MOVES {
            return false;
        }
    }
    true
}

/// The axis that an axis of a reshaped value was: the one of its size with as many elements before it.
fn same_axis(from: &Shape, to: &Shape, axis: usize) -> Option<usize> {
    let before = |shape: &Shape, axis: usize| Shape(shape.0[..axis].to_vec()).elements();
    let wanted = before(to, axis)?;
    (0..from.rank()).find(|&at| from.0[at] == to.0[axis] && before(from, at) == Some(wanted))
}

/// Whether codes are made of those of a `quantize`, by ops that are few enough.
fn reaches_quantize(graph: &Graph, codes: NodeId, parameters: Parameters<'_>) -> bool {
    let mut stack = vec![(codes, parameters.axis)];
    let mut seen = BTreeSet::new();
    let mut reaches = false;
    while let Some((id, axis)) = stack.pop() {
        if !seen.insert(id) {
            continue;
        }
        if seen.len() > MOST_MOVES {
            return false;
        }
        if matches!(graph.op(id), Op::Quantize { .. }) {
            reaches = true;
        } else if let Some((operands, axis)) = made_of(graph, id, parameters.along(axis)) {
            stack.extend(operands.into_iter().map(|at| (graph.operand(id, at), axis)));
        }
    }
    reaches
}

/// What codes mean, with every `dequantize` as far down as it goes.
fn value(
    graph: &mut Graph,
    codes: NodeId,
    parameters: Parameters<'_>,
    region: Region,
    known: &mut BTreeMap<(NodeId, Option<usize>), NodeId>,
) -> Result<NodeId, PassError> {
    let key = (codes, parameters.axis);
    if let Some(&value) = known.get(&key) {
        return Ok(value);
    }
    let name = format!("{}.dq", graph.node(codes).name.as_str());
    let made = match made_of(graph, codes, parameters) {
        None => {
            let operands = [&[codes], parameters.operands].concat();
            let op = Op::Dequantize { axis: parameters.axis };
            graph.add(op, &operands, name, region)?
        }
        Some((positions, axis)) => {
            let mut operands = graph.operands(codes);
            for at in positions {
                operands[at] = value(graph, operands[at], parameters.along(axis), region, known)?;
            }
            let op = match graph.op(codes).clone() {
                // What is left of it is the conversion of the values, which are floats.
                Op::Cast(_) => {
                    known.insert(key, operands[0]);
                    return Ok(operands[0]);
                }
                Op::Pad { axis, low, high, interior, .. } => {
                    Op::Pad { axis, low, high, interior, value: 0.0 }
                }
                op => op,
            };
            graph.add(op, &operands, name, region)?
        }
    };
    known.insert(key, made);
    Ok(made)
}
