//! The committed models rewritten for each precision: which operands each product reads rounded, and how.

use crate::models::{finish, scores, with_loss};
use crate::ranged::frozen;
use crate::support::snapshot;
use qcompile_ir::{DType, Graph, NodeId, Op};
use qcompile_passes::calibrate::Range;
use qcompile_passes::quantize::{
    self, ChannelPolicy, Codes, Held, Operations, Options, PrecisionChoice, Scheme, WeightScales,
    Weights,
};
use qcompile_passes::{evaluation, fold_batch_norm};
use std::collections::BTreeMap;
use std::fmt::Write as _;

const MODELS: [&str; 10] = [
    "digits_cnn",
    "digits_mlp",
    "mnist_cnn",
    "mnist_mlp",
    "resnet20",
    "resnet8",
    "tiny_bert",
    "tiny_gpt",
    "tiny_mobilenet",
    "tiny_rnn",
];

/// What an operand lies in memory as: where it is rounded, its type, and whether a scale runs along an axis.
fn stored(graph: &Graph, mut id: NodeId) -> String {
    loop {
        match graph.op(id) {
            Op::Dequantize { axis } => {
                let dtype = graph.ty(graph.operand(id, 0)).dtype;
                let along = axis.map_or_else(String::new, |axis| format!(" along {axis}"));
                return format!("{dtype}{along}");
            }
            Op::Cast(DType::F32) => return graph.ty(graph.operand(id, 0)).dtype.to_string(),
            Op::Reshape(_) | Op::Transpose(_) | Op::Broadcast(_) | Op::Slice { .. } => {
                id = graph.operand(id, 0);
            }
            _ => return graph.ty(id).dtype.to_string(),
        }
    }
}

/// A line for each product, and how many roundings there are in each region.
fn shown(graph: &Graph) -> String {
    let mut text = String::new();
    let mut roundings: BTreeMap<String, usize> = BTreeMap::new();
    for id in graph.order() {
        let node = graph.node(id);
        let operands = graph.operands(id);
        match &node.op {
            Op::Matmul { .. }
            | Op::Conv2d(_)
            | Op::Conv2dGradInput(_)
            | Op::Conv2dGradWeight(_)
            | Op::Attention { .. }
            | Op::AttentionGrad { .. } => {
                let read: Vec<String> = operands.iter().map(|&id| stored(graph, id)).collect();
                let (region, op, name) = (node.region.name(), node.op.name(), &node.name);
                let _ =
                    writeln!(text, "  {region} {op} {name} : {} of {}", node.ty, read.join(", "));
            }
            Op::Recurrence(recurrence) | Op::RecurrenceGrad { recurrence, .. } => {
                let (region, op, name) = (node.region.name(), node.op.name(), &node.name);
                let products = recurrence.products.unwrap_or(DType::F32);
                let _ = writeln!(text, "  {region} {op} {name} : {} of {products}", node.ty);
            }
            Op::Quantize { dtype, .. } | Op::Cast(dtype) if *dtype != DType::F32 => {
                let rounding = format!("{} {} {dtype}", node.region.name(), node.op.name());
                *roundings.entry(rounding).or_default() += 1;
            }
            _ => {}
        }
    }
    let roundings: Vec<String> =
        roundings.iter().map(|(rounding, count)| format!("{rounding}: {count}")).collect();
    let _ = writeln!(text, "  {} values; {}", graph.len(), roundings.join(", "));
    text
}

#[test]
fn models_at_every_precision_are_as_in_the_snapshots() {
    let fixed = |precision| (precision, None);
    let settings = [
        ("f32", fixed(PrecisionChoice::F32)),
        ("bf16", fixed(PrecisionChoice::Bf16)),
        ("int8", fixed(PrecisionChoice::Int8)),
        ("mixed", fixed(PrecisionChoice::Mixed)),
        ("bf16+int8", fixed(PrecisionChoice::MixedBf16)),
        ("mixed, split", (PrecisionChoice::Mixed, Some(ChannelPolicy::Split))),
        ("mixed, multipoint", (PrecisionChoice::Mixed, Some(ChannelPolicy::Multipoint))),
    ];
    for model in MODELS {
        let plain = with_loss(model);
        let mut text = String::new();
        for (name, (precision, channel_policy)) in settings {
            let mut graph = plain.clone();
            let options = Options {
                precision,
                channel_threshold: channel_policy.map(|_| 1e-3),
                channel_policy,
                scores: precision.has_int8().then(|| scores(&plain)),
                max_loss_increase: 0.1,
                ..Options::default()
            };
            quantize::run(&mut graph, &options).unwrap_or_else(|error| panic!("{model}: {error}"));
            finish(&mut graph);
            graph.sweep();
            qcompile_ir::verify(&graph).unwrap_or_else(|errors| panic!("{model}: {errors}"));
            let _ = write!(text, "{name}\n{}", shown(&graph));
        }
        for (name, codes, dtype, held) in [
            ("trained with ranges", Codes::Uint8, DType::I8, Held::State),
            ("trained with learned steps", Codes::Int8, DType::I4, Held::Parameter),
            ("as it leaves for integers", Codes::Uint8, DType::I8, Held::Constant),
        ] {
            let weights = Weights { dtype, scales: WeightScales::Channel };
            let graph = ranged(model, &plain, Scheme { codes, weights, held });
            let _ = write!(text, "{name}\n{}", shown(&graph));
        }
        snapshot("precisions", model, &text);
    }
}

/// A model whose layers read integers with ranges: a whole step of training, or where ranges are constant the form that
/// leaves.
fn ranged(model: &str, plain: &Graph, scheme: Scheme) -> Graph {
    let mut graph = plain.clone();
    let leaves = scheme.held == Held::Constant;
    if leaves {
        evaluation::run(&mut graph).expect("has a form");
        fold_batch_norm::run(&mut graph).expect("folds");
        graph = frozen(graph);
    }
    let operations = Operations { backward: false, ..Operations::default() };
    let precision = PrecisionChoice::Int8;
    let options = Options { precision, operations, ranged: true, ..Options::default() };
    quantize::decide(&mut graph, &options).unwrap_or_else(|error| panic!("{model}: {error}"));
    let values = quantize::activations(&graph).into_iter();
    let ranges = values.map(|id| (graph.node(id).name.clone(), Range::new(-1.0, 2.0))).collect();
    quantize::insert_ranged(&mut graph, &ranges, &scheme).expect("inserts");
    if leaves {
        quantize::round_biases(&mut graph).expect("rounds");
    } else {
        finish(&mut graph);
    }
    graph.sweep();
    qcompile_ir::verify(&graph).unwrap_or_else(|errors| panic!("{model}: {errors}"));
    graph
}
