//! Channel-wise precision: a layer as two, its sensitive output channels in f32 and the others in int8.

use super::PASS;
use super::insert::is_quantized;
use super::layer::Layer;
use crate::PassError;
use crate::builder::Builder;
use qcompile_ir::{DType, Graph, NodeId, Note, Op, Precision, Region};

/// Neighbouring channels of one precision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    start: usize,
    end: usize,
    high: bool,
}

/// The runs of `channels` channels of which `outliers` (ascending) are high.
fn runs(channels: usize, outliers: &[u32]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for channel in 0..channels {
        let high = u32::try_from(channel).is_ok_and(|at| outliers.binary_search(&at).is_ok());
        match runs.last_mut() {
            Some(last) if last.high == high => last.end += 1,
            _ => runs.push(Run { start: channel, end: channel + 1, high }),
        }
    }
    runs
}

/// Replaces the layer by a product of its noted outliers in high precision, a product of the other channels (noted as
/// the layer was), and the concatenation of both in the old order of channels.
pub(super) fn outliers(graph: &mut Graph, layer: &Layer) -> Result<(), PassError> {
    let node = graph.node(layer.node).clone();
    let outliers = &node.note.outliers;
    let ascending = outliers.is_sorted_by(|a, b| a < b);
    let within = outliers.last().is_none_or(|&last| (last as usize) < layer.channels);
    if layer.grouped || !ascending || !within || outliers.len() >= layer.channels {
        return Err(PassError::Unsupported {
            pass: PASS,
            reason: format!("{} cannot be split by its outliers {outliers:?}", node.name),
        });
    }
    let runs = runs(layer.channels, outliers);
    let (x, weight) = (graph.operand(layer.node, 0), graph.operand(layer.node, 1));
    let name = node.name.as_str().to_owned();
    let product = |graph: &mut Graph, high: bool| -> Result<NodeId, PassError> {
        let word = if high { "high" } else { "low" };
        let weight_name = format!("{}.{word}", graph.node(weight).name.as_str());
        let runs = runs.iter().filter(|run| run.high == high);
        let spans: Vec<_> = runs.map(|run| (run.start, run.end)).collect();
        let part = take(graph, weight, layer.weight_axis, &spans, &weight_name)?;
        let mut builder = Builder::new(graph, Region::Forward, &name);
        let product = builder.add(word, node.op.clone(), &[x, part])?;
        let note = graph.note_mut(product);
        note.origin.clone_from(&node.note.origin);
        note.sensitivity = node.note.sensitivity;
        note.precision = node.note.precision;
        note.stored = node.note.stored;
        note.quantizer = node.note.quantizer;
        if high {
            note.precision = Some(high_precision(&node.note));
        }
        Ok(product)
    };
    let high = product(graph, true)?;
    let low = product(graph, false)?;
    let joined = join(graph, layer, &runs, low, high, &name)?;
    let note = graph.note_mut(joined);
    note.origin = node.note.origin;
    note.outliers = node.note.outliers;
    graph.replace_uses(layer.node, joined)?;
    Ok(())
}

/// What the sensitive channels of a layer run in: codes give way to the type that the values are stored in.
fn high_precision(note: &Note) -> Precision {
    let stored = note.stored.unwrap_or(DType::F32);
    let high = |dtype| if is_quantized(dtype) { stored } else { dtype };
    let low = note.precision.unwrap_or(Precision::uniform(DType::F32));
    Precision {
        forward: high(low.forward),
        grad_input: high(low.grad_input),
        grad_weight: high(low.grad_weight),
        ..Precision::uniform(DType::F32)
    }
}

/// These index ranges of `axis`, one after the other.
fn take(
    graph: &mut Graph,
    x: NodeId,
    axis: usize,
    spans: &[(usize, usize)],
    name: &str,
) -> Result<NodeId, PassError> {
    let mut parts = Vec::with_capacity(spans.len());
    for &(start, end) in spans {
        let op = Op::Slice { axis, start, end, step: 1 };
        parts.push(graph.add(op, &[x], name, Region::Forward)?);
    }
    if let [only] = parts[..] {
        return Ok(only);
    }
    Ok(graph.add(Op::Concat { axis }, &parts, name, Region::Forward)?)
}

/// The channels of both products in the old order.
fn join(
    graph: &mut Graph,
    layer: &Layer,
    runs: &[Run],
    low: NodeId,
    high: NodeId,
    name: &str,
) -> Result<NodeId, PassError> {
    let axis = layer.result_axis;
    let mut next = [0_usize; 2];
    let mut parts = Vec::with_capacity(runs.len());
    for run in runs {
        let from = if run.high { high } else { low };
        let start = next[usize::from(run.high)];
        let end = start + run.end - run.start;
        next[usize::from(run.high)] = end;
        if Some(end - start) == graph.ty(from).shape.0[axis].as_fixed() {
            parts.push(from);
            continue;
        }
        let op = Op::Slice { axis, start, end, step: 1 };
        let part = format!("{}.{start}", graph.node(from).name.as_str());
        parts.push(graph.add(op, &[from], part, Region::Forward)?);
    }
    let joined = format!("{name}.joined");
    Ok(graph.add(Op::Concat { axis }, &parts, joined, Region::Forward)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_all_channels_in_order() {
        let spans: Vec<_> =
            runs(6, &[0, 3, 4]).iter().map(|run| (run.start, run.end, run.high)).collect();
        assert_eq!(spans, [(0, 1, true), (1, 3, false), (3, 5, true), (5, 6, false)]);
    }
}
