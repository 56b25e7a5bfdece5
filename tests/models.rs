//! The committed models on their way through the passes: snapshots, gradients, and equal output for equal input.

use crate::support::{Random, inputs, root, snapshot};
use qcompile_ir::eval::{EvalOptions, Rounding, eval};
use qcompile_ir::{Graph, Op, Region};
use qcompile_onnx::{ImportOptions, import};
use qcompile_passes::quantize::PrecisionChoice;
use qcompile_passes::sensitivity::{LayerScore, Scores};
use qcompile_passes::{attach_loss, differentiate, distribute, quantize, simplify, update};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// A snapshot that is longer shows numbers of ops instead of the ops.
const LONGEST: usize = 80;

fn imported(model: &str) -> Graph {
    let path = root().join("models").join(model).with_extension("onnx");
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    import(&bytes, &ImportOptions::default())
        .unwrap_or_else(|error| panic!("{model}: {error}"))
        .graph
}

/// The forward graph with its loss, as `quantize` finds it.
pub(crate) fn with_loss(model: &str) -> Graph {
    let mut graph = imported(model);
    let options = simplify::Options { keep_stop_gradient: true };
    simplify::run(&mut graph, &options).expect("simplifies");
    let kind = attach_loss::LossKind::CrossEntropy;
    attach_loss::run(&mut graph, &attach_loss::Options { kind }).expect("has logits");
    graph
}

/// From the quantized forward graph to the whole training step.
pub(crate) fn finish(graph: &mut Graph) {
    differentiate::run(graph).expect("differentiates");
    quantize::insert_backward(graph).expect("inserts");
    quantize::optimise(graph).expect("optimises");
    distribute::run(graph).expect("distributes");
    let optimizer = update::Optimizer::AdamW;
    update::run(graph, &update::Options { optimizer }).expect("updates");
    simplify::run(graph, &simplify::Options::default()).expect("simplifies");
}

/// The graph, or how many ops of each kind it has in each region and what its layers' notes say.
fn shown(graph: &Graph) -> String {
    let text = graph.to_string();
    if text.lines().count() <= LONGEST {
        return text;
    }
    let mut counts: BTreeMap<(Region, &str), usize> = BTreeMap::new();
    for id in graph.ids() {
        *counts.entry((graph.node(id).region, graph.op(id).name())).or_default() += 1;
    }
    let mut text = format!("graph @{}: {} nodes\n", graph.name(), graph.len());
    for ((region, op), count) in counts {
        let _ = writeln!(text, "  {} {op}: {count}", region.name());
    }
    for layer in quantize::layers(graph) {
        let node = graph.node(layer.node);
        let precision =
            node.note.precision.map_or("undecided", |precision| precision.forward.name());
        let _ =
            writeln!(text, "  layer {} {} : {} {precision}", node.op.name(), node.name, node.ty);
    }
    text
}

/// Made up: the first layer suffers most, the last channel of every layer more than the others.
pub(crate) fn scores(graph: &Graph) -> Scores {
    let layers = quantize::layers(graph);
    let score = |position: usize, layer: &quantize::Layer| {
        let node = graph.node(layer.node);
        let mut channels = vec![1e-4; layer.channels];
        if let Some(last) = channels.last_mut() {
            *last = 1e-2;
        }
        LayerScore {
            name: node.name.clone(),
            origin: node.note.origin.clone(),
            op: node.op.name().to_owned(),
            score: if position == 0 { 0.5 } else { 1e-3 },
            channels,
        }
    };
    let layers = layers.iter().enumerate().map(|(at, layer)| score(at, layer)).collect();
    Scores { layers, baseline_loss: 2.3, samples: 256, ..Scores::default() }
}

#[test]
fn quantized_models_are_as_in_the_snapshots() {
    for (model, precision) in [
        ("digits_mlp", PrecisionChoice::Int8),
        ("mnist_cnn", PrecisionChoice::Mixed),
        ("tiny_bert", PrecisionChoice::Int8),
        ("resnet8", PrecisionChoice::Mixed),
    ] {
        let mut graph = with_loss(model);
        snapshot("models", &format!("{model}.attach-loss"), &shown(&graph));
        let mut options = quantize::Options { precision, ..quantize::Options::default() };
        if precision == PrecisionChoice::Mixed {
            options.scores = Some(scores(&graph));
            options.channel_threshold = Some(1e-3);
        }
        let decisions = quantize::run(&mut graph, &options).expect("quantizes");
        qcompile_ir::verify(&graph).expect("valid");
        let mut text = String::new();
        for decision in decisions {
            let quantize::Decision { node, op, precision, channels, reason, .. } = decision;
            let channels_high = channels.outliers.len();
            let forward = precision.forward;
            let _ =
                writeln!(text, "; {node} {op}: {forward}, {channels_high} channels f32; {reason}");
        }
        snapshot("models", &format!("{model}.quantize"), &(text + &shown(&graph)));
        finish(&mut graph);
        qcompile_ir::verify(&graph).expect("valid");
        snapshot("models", &format!("{model}.update"), &shown(&graph));
    }
}

#[test]
fn equal_models_give_equal_plans() {
    for model in ["digits_mlp", "digits_cnn", "tiny_bert", "resnet8"] {
        let compiled = || {
            let mut graph = with_loss(model);
            let options = quantize::Options {
                precision: PrecisionChoice::Int8,
                ..quantize::Options::default()
            };
            quantize::run(&mut graph, &options).expect("quantizes");
            finish(&mut graph);
            let plan = qcompile_plan::build(graph, &qcompile_plan::BuildOptions::default());
            plan.expect("has a plan").to_bytes()
        };
        let first = compiled();
        assert!(first == compiled(), "{model}");
        let loaded = qcompile_plan::Plan::from_bytes(&first).expect("loads");
        assert!(first == loaded.to_bytes(), "{model}");
    }
}

/// One derivative, along a random direction through all parameters at once, against a central difference.
#[test]
fn gradients_of_whole_models_agree_with_a_difference() {
    const BATCH: usize = 2;
    const STEP: f64 = 1e-6;
    for (model, classes) in [
        ("digits_mlp", 10),
        ("digits_cnn", 10),
        ("mnist_cnn", 10),
        ("resnet8", 10),
        ("tiny_mobilenet", 10),
        ("tiny_bert", 4),
        ("tiny_gpt", 65),
        ("tiny_rnn", 4),
    ] {
        let mut graph = with_loss(model);
        let mut random = Random::new(7);
        let given = inputs(&graph, BATCH, classes, &mut random);
        let gradients = differentiate::run(&mut graph).expect("differentiates").by_param;
        let exact = EvalOptions { rounding: Rounding::Exact, ..EvalOptions::default() };
        let values = eval(&graph, &given, BATCH, &exact).expect("evaluates");
        let mut derivative = 0.0;
        let mut directions = BTreeMap::new();
        for (param, gradient) in gradients {
            let name = graph.node(param).name.as_str();
            let start = values.get_f64(name).expect("evaluated");
            let gradient = values.get_f64(graph.node(gradient).name.as_str()).expect("evaluated");
            let direction: Vec<f64> = start.iter().map(|_| random.unit()).collect();
            derivative += gradient.iter().zip(&direction).map(|(g, v)| g * v).sum::<f64>();
            directions.insert(name.to_owned(), (start, direction));
        }
        let loss = graph.node(graph.outputs()[0].1).name.as_str();
        let at = |step: f64| {
            let moved = directions.iter().map(|(name, (start, direction))| {
                let moved = start.iter().zip(direction).map(|(x, v)| x + step * v).collect();
                (name.clone(), moved)
            });
            let options = EvalOptions {
                leaves: moved.collect(),
                targets: vec![loss.to_owned()],
                ..exact.clone()
            };
            eval(&graph, &given, BATCH, &options).expect("evaluates").get_f64(loss).expect("wanted")
                [0]
        };
        let difference = (at(STEP) - at(-STEP)) / (2.0 * STEP);
        let error = (derivative - difference).abs() / difference.abs();
        assert!(error < 1e-4, "{model}: derivative {derivative}, difference {difference}");
    }
}

#[test]
fn weights_of_the_models_are_trained() {
    for model in ["digits_mlp", "resnet8", "tiny_gpt", "tiny_rnn"] {
        let graph = imported(model);
        let params = graph.leaves(|op| matches!(op, Op::Param(_)));
        let mut with_loss = with_loss(model);
        let gradients = differentiate::run(&mut with_loss).expect("differentiates");
        assert_eq!(gradients.by_param.len(), params.len(), "{model}: {:?}", gradients.independent);
    }
}
