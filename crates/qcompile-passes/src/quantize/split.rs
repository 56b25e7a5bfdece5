//! Channel-wise precision: a layer as two products, its sensitive channels in high precision and the others in int8, each
//! a dense block; or as one product with further int8 points for sensitive channels.

use super::PASS;
use super::insert::{Inserted, Operand, Role, is_quantized};
use super::layer::Layer;
use super::permute::Path;
use crate::PassError;
use crate::builder::Builder;
use qcompile_ir::{BinaryOp, Channels, DType, Graph, NodeId, Note, Op, Precision, Region, UnaryOp};

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

/// Rewrites a layer whose note names channels.
pub(super) fn channels(graph: &mut Graph, layer: &Layer) -> Result<(), PassError> {
    let Channels { outliers, input_outliers, points } = &graph.node(layer.node).note.channels;
    match [outliers.is_empty(), input_outliers.is_empty(), points.is_empty()] {
        [false, true, true] => self::outliers(graph, layer),
        [true, false, true] => self::input_outliers(graph, layer),
        [true, true, false] => self::points(graph, layer),
        _ => {
            let name = &graph.node(layer.node).name;
            let reason = format!("{name} has channels of more than one kind");
            Err(PassError::Unsupported { pass: PASS, reason })
        }
    }
}

/// Refuses channels that the layer has not, or a layer that is not split.
fn check(graph: &Graph, layer: &Layer, channels: &[u32], all: usize) -> Result<(), PassError> {
    let within = channels.last().is_none_or(|&last| (last as usize) < all);
    if layer.grouped || !within || channels.len() >= all {
        let name = &graph.node(layer.node).name;
        let reason = format!("{name} cannot be split by its channels {channels:?}");
        return Err(PassError::Unsupported { pass: PASS, reason });
    }
    Ok(())
}

/// Index ranges of the runs that are high, or of those that are not.
fn spans(runs: &[Run], high: bool) -> Vec<(usize, usize)> {
    runs.iter().filter(|run| run.high == high).map(|run| (run.start, run.end)).collect()
}

/// A product like that of the layer, of other operands: as the layer's note says, or in high precision.
fn product(
    graph: &mut Graph,
    layer: &Layer,
    operands: [NodeId; 2],
    high: bool,
) -> Result<NodeId, PassError> {
    let node = graph.node(layer.node).clone();
    let mut builder = Builder::new(graph, Region::Forward, node.name.as_str());
    let product = builder.add(if high { "high" } else { "low" }, node.op, &operands)?;
    let precision = if high { Some(high_precision(&node.note)) } else { node.note.precision };
    *graph.note_mut(product) = Note { precision, channels: Channels::default(), ..node.note };
    Ok(product)
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

/// Makes `new` stand for the layer, whose channels it notes.
fn replace(graph: &mut Graph, layer: &Layer, new: NodeId) -> Result<(), PassError> {
    let note = graph.node(layer.node).note.clone();
    let noted = graph.note_mut(new);
    noted.origin = note.origin;
    noted.channels = note.channels;
    Ok(graph.replace_uses(layer.node, new)?)
}

/// Replaces the layer by a product of its noted outliers in high precision, a product of the other channels as the note
/// says, and the concatenation of both: one after the other, where the only reader is a layer whose weight can be brought
/// into that order instead, else in the old order of channels.
fn outliers(graph: &mut Graph, layer: &Layer) -> Result<(), PassError> {
    let outliers = graph.node(layer.node).note.channels.outliers.clone();
    check(graph, layer, &outliers, layer.channels)?;
    let runs = runs(layer.channels, &outliers);
    let (x, weight) = (graph.operand(layer.node, 0), graph.operand(layer.node, 1));
    let part = |graph: &mut Graph, high: bool| {
        let name = part_name(graph, weight, high);
        let part = take(graph, weight, layer.weight_axis, &spans(&runs, high), &name)?;
        product(graph, layer, [x, part], high)
    };
    let high = part(graph, true)?;
    let low = part(graph, false)?;
    let name = graph.node(layer.node).name.as_str().to_owned();
    let joined = if let Some(path) = Path::find(graph, layer) {
        path.permute(graph, &[spans(&runs, false), spans(&runs, true)].concat())?;
        let op = Op::Concat { axis: layer.result_axis };
        graph.add(op, &[low, high], format!("{name}.permuted"), Region::Forward)?
    } else {
        join(graph, layer, &runs, low, high, &name)?
    };
    replace(graph, layer, joined)
}

/// Replaces the layer by the sum of two products: that of the noted channels of the data in high precision and that of
/// the others as the note says (Dettmers et al. 2022, arXiv:2208.07339, section 3.2).
fn input_outliers(graph: &mut Graph, layer: &Layer) -> Result<(), PassError> {
    let outliers = graph.node(layer.node).note.channels.input_outliers.clone();
    check(graph, layer, &outliers, layer.input_channels)?;
    let runs = runs(layer.input_channels, &outliers);
    let operands = [
        (graph.operand(layer.node, 0), layer.input_axis),
        (graph.operand(layer.node, 1), layer.weight_input_axis),
    ];
    let part = |graph: &mut Graph, high: bool| {
        let mut parts = [layer.node; 2];
        for (part, (operand, axis)) in parts.iter_mut().zip(operands) {
            let name = part_name(graph, operand, high);
            *part = take(graph, operand, axis, &spans(&runs, high), &name)?;
        }
        product(graph, layer, parts, high)
    };
    let high = part(graph, true)?;
    let low = part(graph, false)?;
    let name = graph.node(layer.node).name.as_str().to_owned();
    let mut builder = Builder::new(graph, Region::Forward, &name);
    let sum = builder.binary("sum", BinaryOp::Add, low, high)?;
    replace(graph, layer, sum)
}

/// Gives the noted channels several points (Liu et al. 2021, arXiv:2002.09049): what rounding leaves of their weights
/// becomes further rows of the same product, each with a scale of its own, and their results are added. Of the paper's
/// points `a · q`, each factor is the scale that the largest magnitude of what is left gives.
fn points(graph: &mut Graph, layer: &Layer) -> Result<(), PassError> {
    let mut those = graph.node(layer.node).note.channels.points.clone();
    let channels: Vec<u32> = those.iter().map(|&(channel, _)| channel).collect();
    check(graph, layer, &channels, layer.channels)?;
    let (x, weight) = (graph.operand(layer.node, 0), graph.operand(layer.node, 1));
    let name = graph.node(weight).name.as_str().to_owned();
    let axis = layer.weight_axis;
    let quantizer = graph.node(layer.node).note.quantizer.unwrap_or_default();
    let (role, dtype) = (Role::Weight, quantizer.weight);
    let how = Operand { role, axis: Some(axis), dtype, quantizer };
    let rows = |of: &[u32], among: usize| spans(&runs(among, of), true);
    let mut left = take(graph, weight, axis, &rows(&channels, layer.channels), &name)?;
    // The channels that each further block of rows belongs to.
    let mut blocks: Vec<Vec<u32>> = Vec::new();
    let mut parts = vec![weight];
    while !those.is_empty() {
        let rounded = Inserted::default().quantized(graph, left, how, Region::Forward)?;
        let mut builder = Builder::new(graph, Region::Forward, &name);
        let rest = builder.binary("rest", BinaryOp::Sub, left, rounded)?;
        // The first point has the whole gradient already.
        left = builder.unary("point", UnaryOp::StopGradient, rest)?;
        parts.push(left);
        blocks.push(those.iter().map(|&(channel, _)| channel).collect());
        let more = (0_u32..).zip(&those).filter(|(_, (_, count))| *count as usize > parts.len());
        let (at, more): (Vec<u32>, Vec<(u32, u32)>) = more.unzip();
        if !at.is_empty() {
            left = take(graph, left, axis, &rows(&at, those.len()), &name)?;
        }
        those = more;
    }
    let mut builder = Builder::new(graph, Region::Forward, &name);
    let points = builder.add("points", Op::Concat { axis }, &parts)?;
    let low = product(graph, layer, [x, points], false)?;
    let sum = sum_of_points(graph, layer, low, &blocks)?;
    replace(graph, layer, sum)
}

/// The channels of a product with further blocks of rows, each row added to its channel.
fn sum_of_points(
    graph: &mut Graph,
    layer: &Layer,
    low: NodeId,
    blocks: &[Vec<u32>],
) -> Result<NodeId, PassError> {
    let axis = layer.result_axis;
    let name = graph.node(layer.node).name.as_str().to_owned();
    let slice = |graph: &mut Graph, start: usize, end: usize| {
        let op = Op::Slice { axis, start, end, step: 1 };
        graph.add(op, &[low], format!("{name}.{start}"), Region::Forward)
    };
    // Neighbouring channels of as many points are one part.
    let further = |channel: usize| {
        let has = |block: &&Vec<u32>| {
            u32::try_from(channel).is_ok_and(|channel| block.binary_search(&channel).is_ok())
        };
        blocks.iter().filter(has).count()
    };
    let mut parts = Vec::new();
    let mut start = 0;
    while start < layer.channels {
        let count = further(start);
        let end = (start..layer.channels).find(|&at| further(at) != count);
        let end = end.unwrap_or(layer.channels);
        let mut part = slice(graph, start, end)?;
        let mut first = layer.channels;
        for block in &blocks[..count] {
            let at = first + block.partition_point(|&channel| (channel as usize) < start);
            let point = slice(graph, at, at + end - start)?;
            let name = format!("{name}.sum");
            part = graph.add(Op::Binary(BinaryOp::Add), &[part, point], name, Region::Forward)?;
            first += block.len();
        }
        parts.push(part);
        start = end;
    }
    let joined = format!("{name}.joined");
    Ok(graph.add(Op::Concat { axis }, &parts, joined, Region::Forward)?)
}

fn part_name(graph: &Graph, whole: NodeId, high: bool) -> String {
    let word = if high { "high" } else { "low" };
    format!("{}.{word}", graph.node(whole).name.as_str())
}

/// These index ranges of `axis`, one after the other.
pub(super) fn take(
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
