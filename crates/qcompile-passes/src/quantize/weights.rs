//! What becomes of the gradient of a layer's weight once it is there: its mean over ranks, and the update.

use super::choice::PrecisionChoice;
use super::decide::{Decision, Operations, Options, barred, by_score, must_be_f32, within_budget};
use super::layer::{Candidate, Layer, parameter};
use qcompile_ir::{DType, Graph, NodeId, Precision};
use std::collections::BTreeMap;

/// Decides mean and update of every layer whose precision is not noted: i8 where the operation is asked for and the
/// score lets the layer be low. How fast products are has no say, nor has what they run in; of layers that are not
/// scored all are low.
pub(super) fn decide<'d>(
    graph: &Graph,
    layers: &[Layer],
    options: &Options,
    decisions: impl Iterator<Item = &'d mut Decision>,
) {
    let Operations { forward, backward, mean, update } = options.operations;
    if !mean && !update {
        return;
    }
    let precision = match options.precision {
        PrecisionChoice::Int8 => PrecisionChoice::Int8,
        _ => PrecisionChoice::Mixed,
    };
    let by_scores = Options {
        precision,
        operations: Operations::default(),
        cost: BTreeMap::new(),
        ..options.clone()
    };
    let candidates = Candidate::of_layers(layers);
    let within = within_budget(graph, &candidates, &by_scores);
    for (one, decision) in candidates.into_iter().zip(decisions) {
        let note = &graph.node(one.node).note;
        if note.precision.is_some() {
            continue;
        }
        let bar =
            must_be_f32(graph, one.node, &by_scores).or_else(|| barred(graph, one, &by_scores));
        let (low, reason) = match bar {
            Some(reason) => (false, reason),
            None if note.sensitivity.is_none() => (true, "it was asked for".to_owned()),
            None => by_score(graph, one.node, &by_scores, &within),
        };
        for (asked, precision) in
            [(mean, &mut decision.precision.mean), (update, &mut decision.precision.update)]
        {
            *precision = if asked && low { DType::I8 } else { DType::F32 };
        }
        if !forward && !backward {
            decision.reason = reason;
        }
    }
}

/// Notes mean and update at the parameters, where the passes look for them that build these operations: low where all
/// layers that use the parameter are low.
pub(super) fn note(graph: &mut Graph, layers: &[Layer]) {
    let mut noted: BTreeMap<NodeId, Precision> = BTreeMap::new();
    for layer in layers {
        let precision = graph.node(layer.node).note.precision;
        let param = parameter(graph, graph.operand(layer.node, 1));
        let (Some(precision), Some(param)) = (precision, param) else { continue };
        let known = noted.entry(param).or_insert(Precision {
            mean: precision.mean,
            update: precision.update,
            ..Precision::uniform(DType::F32)
        });
        for (all, one) in [(&mut known.mean, precision.mean), (&mut known.update, precision.update)]
        {
            if *all != one {
                *all = DType::F32;
            }
        }
    }
    for (param, precision) in noted {
        if precision != Precision::uniform(DType::F32) {
            graph.note_mut(param).precision = Some(precision);
        }
    }
}
