//! Random nets whose layers are quantized in every way: what insertion may change, and what moving may not.

use crate::support::{Random, inputs};
use qcompile_ir::eval::{EvalOptions, Rounding, Values, eval};
use qcompile_ir::{
    BinaryOp, Channels, ConvGeometry, DType, Dim, Graph, NodeId, Note, Op, PoolGeometry, Precision,
    Region, Shape, Tensor, TensorType, UnaryOp,
};
use qcompile_kernels::Tier;
use qcompile_passes::{attach_loss, differentiate, quantize};
use qcompile_plan::{BuildOptions, build};
use qcompile_runtime::{Trainer, TrainerOptions};
use std::sync::Arc;

const BATCH: usize = 3;
const CLASSES: usize = 6;

fn add(graph: &mut Graph, op: Op, operands: &[NodeId], name: &str) -> NodeId {
    graph.add(op, operands, name, Region::Forward).expect("fits")
}

fn param(graph: &mut Graph, sizes: &[usize], random: &mut Random) -> NodeId {
    let values: Vec<f64> = (0..sizes.iter().product()).map(|_| random.unit()).collect();
    let tensor = Tensor::from_f64(DType::F32, sizes, &values).expect("sizes fit");
    add(graph, Op::Param(Arc::new(tensor)), &[], "w")
}

/// An image through a convolution, perhaps a pool, and linear layers; no note yet.
fn net(random: &mut Random) -> Graph {
    let mut graph = Graph::new("net");
    let sizes = [Dim::N, 4.into(), 4.into(), 4.into()];
    let mut x = add(&mut graph, Op::Input(TensorType::f32(Shape(sizes.into()))), &[], "x");
    let weight = param(&mut graph, &[8, 4, 3, 3], random);
    let geometry = ConvGeometry {
        input: [4, 4],
        kernel: [3, 3],
        strides: [1, 1],
        pads: [1; 4],
        dilations: [1, 1],
        groups: 1,
    };
    x = add(&mut graph, Op::Conv2d(geometry), &[x, weight], "conv");
    if random.chance(70) {
        x = add(&mut graph, Op::Unary(UnaryOp::Relu), &[x], "relu");
    }
    let mut width = 128;
    if random.chance(60) {
        let geometry = PoolGeometry {
            input: [4, 4],
            kernel: [2, 2],
            strides: [2, 2],
            pads: [0; 4],
            dilations: [1, 1],
            count_include_pad: false,
        };
        x = add(&mut graph, Op::MaxPool2d(geometry), &[x], "pool");
        width = 32;
    }
    let flat = Op::Reshape(Shape(vec![Dim::N, width.into()]));
    x = add(&mut graph, flat, &[x], "flat");
    for out in [8, CLASSES] {
        let transpose_b = random.chance(50);
        let sizes = if transpose_b { [out, width] } else { [width, out] };
        let weight = param(&mut graph, &sizes, random);
        let product = Op::Matmul { transpose_a: false, transpose_b };
        x = add(&mut graph, product, &[x, weight], "fc");
        let bias = param(&mut graph, &[out], random);
        let shape = graph.ty(x).shape.clone();
        let bias = add(&mut graph, Op::Broadcast(shape), &[bias], "bias");
        x = add(&mut graph, Op::Binary(BinaryOp::Add), &[x, bias], "sum");
        if out != CLASSES && random.chance(70) {
            x = add(&mut graph, Op::Unary(UnaryOp::Relu), &[x], "relu");
        }
        width = out;
    }
    graph.add_output("logits", x);
    graph
}

/// Notes int8 in every layer, and for some of them channels.
fn note(graph: &mut Graph, random: &mut Random) {
    for layer in quantize::layers(graph) {
        let int8 = |random: &mut Random, percent: usize| {
            if random.chance(percent) { DType::I8 } else { DType::F32 }
        };
        let precision = Precision {
            forward: int8(random, 90),
            grad_input: int8(random, 60),
            grad_weight: int8(random, 30),
            ..Precision::uniform(DType::F32)
        };
        let some = |random: &mut Random, all: usize| -> Vec<u32> {
            let first = random.below(all - 1);
            let last = if random.chance(50) { first + 1 } else { all - 1 };
            let mut some: Vec<u32> =
                [first, last].map(|at| u32::try_from(at).expect("small")).into();
            some.dedup();
            some
        };
        let mut channels = Channels::default();
        match random.below(4) {
            0 => channels.outliers = some(random, layer.channels),
            1 => channels.input_outliers = some(random, layer.input_channels),
            2 if precision.forward == DType::I8 => {
                let count = |channel| (channel, 2 + channel % 2);
                channels.points = some(random, layer.channels).into_iter().map(count).collect();
            }
            _ => {}
        }
        let note = graph.note_mut(layer.node);
        (note.precision, note.channels) = (Some(precision), channels);
    }
}

fn quantized(seed: u64) -> (Graph, Graph) {
    let mut random = Random::new(seed);
    let plain = net(&mut random);
    let mut graph = plain.clone();
    note(&mut graph, &mut random);
    quantize::insert(&mut graph).unwrap_or_else(|error| panic!("{seed}: {error}"));
    qcompile_ir::verify(&graph).unwrap_or_else(|errors| panic!("{seed}: {errors}"));
    (plain, graph)
}

/// The whole step up to the gradients, roundings not moved yet.
fn step(mut graph: Graph) -> Graph {
    let kind = attach_loss::LossKind::CrossEntropy;
    attach_loss::run(&mut graph, &attach_loss::Options { kind }).expect("has logits");
    let gradients = differentiate::run(&mut graph).expect("differentiates").by_param;
    for (at, (_, gradient)) in gradients.into_iter().enumerate() {
        graph.add_output(&format!("gradient {at}"), gradient);
    }
    quantize::insert_backward(&mut graph).expect("inserts");
    qcompile_ir::verify(&graph).unwrap_or_else(|errors| panic!("{errors}"));
    graph
}

fn values(graph: &Graph, seed: u64, rounding: Rounding) -> Values {
    let given = inputs(graph, BATCH, CLASSES, &mut Random::new(seed));
    let options = EvalOptions { rounding, ..EvalOptions::default() };
    eval(graph, &given, BATCH, &options).unwrap_or_else(|error| panic!("{seed}: {error}"))
}

fn value(graph: &Graph, values: &Values, id: NodeId) -> Vec<f64> {
    values.get_f64(graph.node(id).name.as_str()).expect("evaluated")
}

/// The scale of each element of a value with a scale along `axis`.
fn spread(graph: &Graph, scales: &[f64], x: NodeId, axis: Option<usize>) -> Vec<f64> {
    let sizes = graph.ty(x).shape.sizes(BATCH);
    let inner: usize = axis.map_or(1, |axis| sizes[axis + 1..].iter().product());
    let count: usize = sizes.iter().product();
    (0..count).map(|at| scales[at / inner % scales.len()]).collect()
}

/// |x - x'| <= scale / 2 for every rounding, as the scale spans the value.
#[test]
fn a_rounding_changes_a_value_by_half_a_step_at_most() {
    let mut seen = 0;
    for seed in 0..40 {
        let (_, graph) = quantized(seed);
        let graph = step(graph);
        let values = values(&graph, seed, Rounding::Exact);
        for id in graph.ids() {
            let Op::Dequantize { axis } = *graph.op(id) else { continue };
            let q = graph.operand(id, 0);
            let Op::Quantize { .. } = graph.op(q) else { continue };
            let (x, scale) = (graph.operand(q, 0), graph.operand(q, 1));
            let scales = spread(&graph, &value(&graph, &values, scale), x, axis);
            let pairs = value(&graph, &values, x).into_iter().zip(value(&graph, &values, id));
            for ((x, rounded), scale) in pairs.zip(scales) {
                let most = 0.5 * scale * (1.0 + 1e-6);
                assert!((x - rounded).abs() <= most, "{seed}: {x} became {rounded} by {scale}");
                seen += 1;
            }
        }
    }
    assert!(seen > 10_000, "only {seen} values are rounded");
}

/// Of a product of rounded operands x' and w', |x' w' - x w| <= Σ |x| e + |w| d + d e, with d and e half a step of each.
#[test]
fn a_product_of_rounded_values_is_within_its_bound() {
    let mut seen = 0;
    for seed in 0..40 {
        let (_, graph) = quantized(seed);
        let values = values(&graph, seed, Rounding::Exact);
        for id in graph.ids() {
            let Op::Matmul { transpose_a: false, transpose_b } = *graph.op(id) else { continue };
            let rounded = |position: usize| {
                let operand = graph.operand(id, position);
                let Op::Dequantize { axis } = *graph.op(operand) else { return None };
                let q = graph.operand(operand, 0);
                let Op::Quantize { .. } = graph.op(q) else { return None };
                let (x, scale) = (graph.operand(q, 0), graph.operand(q, 1));
                let steps = spread(&graph, &value(&graph, &values, scale), x, axis);
                Some((value(&graph, &values, x), steps))
            };
            let (Some((x, dx)), Some((w, dw))) = (rounded(0), rounded(1)) else { continue };
            let y = value(&graph, &values, id);
            let columns = graph.ty(id).shape.sizes(BATCH)[1];
            let inner = x.len() / BATCH;
            for (at, &y) in y.iter().enumerate() {
                let (row, column) = (at / columns, at % columns);
                let (mut exact, mut bound) = (0.0, 0.0);
                for k in 0..inner {
                    let a = row * inner + k;
                    let b = if transpose_b { column * inner + k } else { k * columns + column };
                    let (d, e) = (0.5 * dx[a], 0.5 * dw[b]);
                    exact += x[a] * w[b];
                    bound += x[a].abs() * e + w[b].abs() * d + d * e;
                }
                assert!((y - exact).abs() <= bound * (1.0 + 1e-6), "{seed}: {y} is not {exact}");
                seen += 1;
            }
        }
    }
    assert!(seen > 500, "only {seen} results are looked at");
}

/// Further points leave less of the error of their channels than one point does.
#[test]
fn points_bring_a_channel_nearer() {
    for seed in 0..20 {
        let mut random = Random::new(seed);
        let plain = net(&mut random);
        let layer = quantize::layers(&plain)[1].clone();
        let weight = plain.operand(layer.node, 1);
        let exact = value(&plain, &values(&plain, seed, Rounding::Exact), weight);
        let error = |points: u32| {
            let mut graph = plain.clone();
            let note = graph.note_mut(layer.node);
            note.precision =
                Some(Precision { forward: DType::I8, ..Precision::uniform(DType::F32) });
            let several = (points > 1).then_some((3, points));
            note.channels =
                Channels { points: several.into_iter().collect(), ..Default::default() };
            quantize::insert(&mut graph).expect("inserts");
            let product = graph
                .ids()
                .find(|&id| {
                    matches!(graph.op(id), Op::Matmul { .. })
                        && matches!(graph.op(graph.operand(id, 1)), Op::Dequantize { .. })
                })
                .expect("one product is int8");
            let operand = graph.operand(product, 1);
            let near = value(&graph, &values(&graph, seed, Rounding::Exact), operand);
            // Rows of the weight, and columns: channel 3 is the sum of its points.
            let channels = near.len() / layer.input_channels;
            let of = |values: &[f64], channels: usize, channel: usize, k: usize| {
                let by_rows = layer.weight_axis == 0;
                values[if by_rows {
                    channel * layer.input_channels + k
                } else {
                    k * channels + channel
                }]
            };
            (0..layer.input_channels)
                .map(|k| {
                    let further: f64 =
                        (layer.channels..channels).map(|at| of(&near, channels, at, k)).sum();
                    let near = of(&near, channels, 3, k) + further;
                    (of(&exact, layer.channels, 3, k) - near).abs()
                })
                .fold(0.0, f64::max)
        };
        let [one, two, three] = [1, 2, 3].map(error);
        assert!(two <= one / 200.0 && three <= two / 200.0, "{seed}: {one}, {two}, {three}");
    }
}

/// Gradients of the quantized net are those of the plain one, but for roundings.
#[test]
fn gradients_of_quantized_nets_are_near() {
    let mut errors = Vec::new();
    for seed in 0..25 {
        let (plain, graph) = quantized(seed);
        let (plain, graph) = (step(plain), step(graph));
        let exact = values(&plain, seed, Rounding::Exact);
        let near = values(&graph, seed, Rounding::Exact);
        for ((name, a), (other, b)) in plain.outputs().iter().zip(graph.outputs()) {
            assert_eq!(name, other);
            let (a, b) = (value(&plain, &exact, *a), value(&graph, &near, *b));
            let energy = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
            let error = energy(&mut a.iter().zip(&b).map(|(x, y)| x - y));
            let signal = energy(&mut a.iter().copied());
            errors.push(error / (signal + 1e-9));
        }
    }
    // A relu of a rounded value may be on where the other is off, which changes a small net's gradient much.
    errors.sort_by(f64::total_cmp);
    let (most, worst) = (errors[errors.len() * 9 / 10], errors[errors.len() - 1]);
    assert!(most < 0.05 && worst < 0.5, "nine of ten {most}, worst {worst}");
}

#[test]
fn moving_roundings_of_whole_steps_keeps_every_bit() {
    let mut moved = 0;
    for seed in 0..40 {
        let (_, graph) = quantized(seed);
        let graph = step(graph);
        let mut optimised = graph.clone();
        moved += quantize::optimise(&mut optimised).expect("optimises").changed;
        let before = values(&graph, seed, Rounding::PerOp);
        let after = values(&optimised, seed, Rounding::PerOp);
        for ((name, a), (_, b)) in graph.outputs().iter().zip(optimised.outputs()) {
            let (a, b) = (value(&graph, &before, *a), value(&optimised, &after, *b));
            assert_eq!(a, b, "{seed}: {name}");
        }
    }
    assert!(moved > 20, "only {moved} values moved");
}

/// A rewritten graph says in its ops what it computes: without notes it has the same plan, kernel by kernel, and the
/// same results, bit by bit; and the plan gives what the evaluator does.
#[test]
fn notes_of_rewritten_graphs_change_nothing() {
    for seed in 0..12 {
        let (_, graph) = quantized(seed);
        let mut graph = graph;
        quantize::optimise(&mut graph).expect("optimises");
        let mut bare = graph.clone();
        for id in graph.ids() {
            *bare.note_mut(id) = Note::default();
        }
        let given = inputs(&graph, BATCH, CLASSES, &mut Random::new(seed));
        let exact = values(&graph, seed, Rounding::Exact);
        let run = |graph: Graph| {
            let plan = build(graph, &BuildOptions { batch_size: BATCH }).expect("has a plan");
            let text = plan.to_string();
            let options = TrainerOptions { threads: 1, workers: 1, tier: Some(Tier::detect()) };
            let mut trainer = Trainer::new(Arc::new(plan), &options).expect("compiles");
            (text, trainer.run(&given, Region::Forward).expect("runs"))
        };
        let logits = value(&graph, &exact, graph.outputs()[0].1);
        let (noted, stripped) = (run(graph), run(bare));
        assert_eq!(noted, stripped, "{seed}");
        let largest = logits.iter().fold(1e-3_f64, |most, x| most.max(x.abs()));
        for (x, y) in logits.iter().zip(noted.1["logits"].to_f64()) {
            // A sum that rounds the other way may move a code by one step.
            assert!((x - y).abs() <= 3e-2 * largest, "{seed}: {y} is not {x}");
        }
    }
}
