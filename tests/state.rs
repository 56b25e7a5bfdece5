//! Mean and update in low precision, and what is saved for the backward pass: all 15 sets of quantized operations, 8-bit
//! optimizer state, weights without a copy in f32, exchange as codes, compression.

use crate::support::{Random, inputs};
use crate::training::{forward, losses, trainer};
use qcompile_ir::{DType, Granularity, Graph, Op, Tensor};
use qcompile_passes::quantize::{Numerics, Operations, PrecisionChoice};
use qcompile_passes::saved::{self, Format, Rule, Saved};
use qcompile_passes::update::Optimizer;
use qcompile_passes::{differentiate, distribute, evaluation, quantize, simplify, update};
use qcompile_plan::{BuildOptions, Kernel, Plan, build};
use qcompile_runtime::checkpoint;
use std::collections::BTreeMap;
use std::sync::Arc;

type Values = BTreeMap<String, Tensor>;

const MOMENTUM: Optimizer = Optimizer::Momentum { nesterov: false };

#[derive(Clone)]
struct Recipe {
    optimizer: Optimizer,
    precision: PrecisionChoice,
    numerics: Numerics,
    operations: Operations,
    master_weights: bool,
    saved: Vec<Rule>,
}

impl Default for Recipe {
    fn default() -> Recipe {
        Recipe {
            optimizer: MOMENTUM,
            precision: PrecisionChoice::F32,
            numerics: Numerics::default(),
            operations: Operations::default(),
            master_weights: true,
            saved: Vec::new(),
        }
    }
}

fn step(model: &str, recipe: &Recipe) -> (Plan, Saved) {
    let mut graph = forward(model);
    let options = quantize::Options {
        precision: recipe.precision,
        numerics: recipe.numerics,
        operations: recipe.operations,
        ..Default::default()
    };
    quantize::run(&mut graph, &options).expect("quantizes");
    let mut evaluated = graph.clone();
    evaluation::run(&mut evaluated).expect("evaluates");
    differentiate::run(&mut graph).expect("differentiable");
    quantize::insert_backward(&mut graph).expect("quantizes");
    quantize::optimise(&mut graph).expect("optimises");
    distribute::run(&mut graph).expect("distributes");
    if !recipe.master_weights {
        update::store_in_bf16(&mut graph).expect("stores");
        update::store_in_bf16(&mut evaluated).expect("stores");
    }
    update::run(&mut graph, &update::Options { optimizer: recipe.optimizer }).expect("updates");
    simplify::run(&mut graph, &simplify::Options::default()).expect("simplifies");
    let saved = match recipe.saved[..] {
        [] => Saved::default(),
        _ => saved::run(&mut graph, &recipe.saved).expect("compresses"),
    };
    qcompile_ir::verify(&graph).expect("valid");
    let options = BuildOptions { batch_size: 8 };
    let evaluated = build(evaluated, &options).expect("builds");
    let plan = build(graph, &options).expect("builds");
    (plan.with_evaluation(Some(evaluated)).expect("fits"), saved)
}

fn plan(model: &str, recipe: &Recipe) -> Arc<Plan> {
    Arc::new(step(model, recipe).0)
}

fn batches(model: &str, size: usize, count: u64) -> Vec<Values> {
    let graph = forward(model);
    (0..count).map(|seed| inputs(&graph, size, 4, &mut Random::new(seed % 4 + 1))).collect()
}

/// Every set of operations that is not empty.
fn masks() -> impl Iterator<Item = Operations> {
    (1_u8..16).map(|bits| Operations {
        forward: bits & 1 != 0,
        backward: bits & 2 != 0,
        mean: bits & 4 != 0,
        update: bits & 8 != 0,
    })
}

fn types(plan: &Plan, suffix: &str) -> Vec<DType> {
    let states = plan.states().iter().filter(|state| state.name.ends_with(suffix));
    states.map(|state| state.ty.dtype).collect()
}

fn exchanged_as_codes(plan: &Plan) -> usize {
    let members = plan.steps().iter().filter_map(|step| match &step.kernel {
        Kernel::AllReduce { members, .. } => Some(members),
        _ => None,
    });
    members.flatten().filter(|member| member.codes.is_some()).count()
}

#[test]
fn all_fifteen_sets_of_operations_train() {
    let model = "digits_mlp.onnx";
    let batches = batches(model, 16, 40);
    for operations in masks() {
        let precision = PrecisionChoice::Int8;
        let plan = plan(model, &Recipe { precision, operations, ..Recipe::default() });
        let low = if operations.update { DType::I8 } else { DType::F32 };
        assert_eq!(types(&plan, "weight.momentum"), [low; 2], "{operations:?}");
        assert_eq!(types(&plan, "bias.momentum"), [DType::F32; 2], "{operations:?}");
        assert_eq!(exchanged_as_codes(&plan), if operations.mean { 2 } else { 0 });
        let int8 = plan.graph().ids().any(|id| {
            matches!(plan.graph().op(id), Op::Quantize { .. })
                && plan.graph().node(id).region < qcompile_ir::Region::Comm
        });
        assert_eq!(int8, operations.forward || operations.backward, "{operations:?}");
        for workers in [1, 2] {
            let run = || {
                let mut trainer = trainer(&plan, workers, workers);
                (losses(&mut trainer, &batches), trainer.parameters(), trainer.states())
            };
            let (losses, parameters, states) = run();
            let mean = |losses: &[f32]| losses.iter().sum::<f32>() / losses.len() as f32;
            let (first, last) = (mean(&losses[..4]), mean(&losses[36..]));
            assert!(last < 0.8 * first, "{operations:?}, {workers} workers: {losses:?}");
            assert_eq!((losses, parameters, states), run(), "{operations:?}, {workers} workers");
        }
    }
}

#[test]
fn low_precision_of_all_kinds_repeats_to_the_bit_and_resumes() {
    let operations = Operations { forward: true, backward: true, mean: true, update: true };
    let model = "digits_cnn.onnx";
    for optimizer in [MOMENTUM, Optimizer::AdamW] {
        let recipe = Recipe {
            optimizer,
            precision: PrecisionChoice::Int8,
            operations,
            master_weights: false,
            saved: vec![Rule { format: Format::Int4, pattern: None }],
            ..Recipe::default()
        };
        let plan = plan(model, &recipe);
        let batches = batches(model, 12, 8);
        let mut whole = trainer(&plan, 2, 2);
        let wanted = losses(&mut whole, &batches);
        for threads in [2, 4, 6] {
            let mut first = trainer(&plan, 2, threads);
            assert_eq!(losses(&mut first, &batches[..3]), wanted[..3], "{threads} threads");
            let bytes = checkpoint::encode(&first, "").expect("fits");
            let mut second = trainer(&plan, 2, threads);
            checkpoint::restore(&mut second, &bytes).expect("its own checkpoint");
            assert_eq!(losses(&mut second, &batches[3..]), wanted[3..], "{threads} threads");
            assert_eq!(second.parameters(), whole.parameters());
            assert_eq!(second.states(), whole.states());
        }
    }
}

#[test]
fn eight_bit_state_follows_that_in_f32() {
    let model = "digits_mlp.onnx";
    let batches = batches(model, 16, 80);
    let update = Operations { forward: false, backward: false, mean: false, update: true };
    for optimizer in [MOMENTUM, Optimizer::Momentum { nesterov: true }, Optimizer::Adam] {
        let run = |operations| {
            let precision = PrecisionChoice::Int8;
            let plan =
                plan(model, &Recipe { optimizer, precision, operations, ..Recipe::default() });
            let mut trainer = trainer(&plan, 1, 2);
            trainer.set_input("lr", Tensor::scalar(DType::F32, 0.003)).expect("an input");
            let losses = losses(&mut trainer, &batches);
            let bytes: usize = trainer.states().values().map(|state| state.bytes().len()).sum();
            (losses, bytes)
        };
        let none = Operations { update: false, ..update };
        let ((wanted, before), (got, after)) = (run(none), run(update));
        assert_ne!(got, wanted);
        for (got, wanted) in got.iter().zip(&wanted) {
            assert!((got - wanted).abs() < 0.03 * wanted, "{optimizer:?}: {got} is not {wanted}");
        }
        assert!(3 * after < before, "{optimizer:?}: {after} of {before} bytes");
    }
}

/// With steps below half the distance of two bf16 numbers, a weight moves only if it is rounded at random.
#[test]
fn weights_in_bf16_move_by_less_than_they_resolve() {
    let model = "digits_mlp.onnx";
    let update = Operations { forward: false, backward: false, mean: false, update: true };
    let recipe = Recipe {
        optimizer: Optimizer::Sgd,
        precision: PrecisionChoice::Int8,
        operations: update,
        master_weights: false,
        ..Recipe::default()
    };
    let batch = batches(model, 16, 1);
    let run = |recipe: &Recipe| {
        let mut trainer = trainer(&plan(model, recipe), 1, 2);
        trainer.set_input("lr", Tensor::scalar(DType::F32, 2e-4)).expect("an input");
        losses(&mut trainer, &vec![batch[0].clone(); 200]);
        trainer.parameters()["fc1.weight"].clone()
    };
    let graph = forward(model);
    let Some(Op::Param(start)) = graph.find("fc1.weight").map(|id| graph.op(id)) else {
        panic!("a parameter")
    };
    let master = run(&Recipe { optimizer: Optimizer::Sgd, ..Recipe::default() });
    let narrow = run(&recipe);
    assert_eq!((master.dtype(), narrow.dtype()), (DType::F32, DType::BF16));
    let (start, master, narrow) = (start.to_f64(), master.to_f64(), narrow.to_f64());
    let moved: f64 = start.iter().zip(&master).map(|(a, b)| (b - a) * (b - a)).sum();
    let along: f64 =
        start.iter().zip(&master).zip(&narrow).map(|((a, b), c)| (b - a) * (c - a)).sum();
    let share = along / moved;
    // Rounded to nearest they would stay where they are.
    assert!((share - 1.0).abs() < 0.25, "weights moved {share} of the way");
}

#[test]
fn saved_bytes_are_those_of_the_plan_and_memory_falls() {
    let rule = |format| vec![Rule { format, pattern: None }];
    for model in ["digits_mlp.onnx", "digits_cnn.onnx", "resnet8.onnx", "tiny_gpt.onnx"] {
        let (plain, _) = step(model, &Recipe::default());
        let batch = 64;
        let mut before = plain.saved_bytes(batch);
        let mut peaks = vec![plain.bytes(batch)];
        for format in Format::ALL {
            let recipe = Recipe { saved: rule(format), ..Recipe::default() };
            let (plan, saved) = step(model, &recipe);
            let bytes = plan.saved_bytes(batch);
            assert_eq!(bytes, batch * saved.bytes_per_sample, "{model} {format:?}");
            for granularity in [Granularity::Channel, Granularity::Row] {
                let numerics = Numerics { granularity, ..Numerics::default() };
                let precision = PrecisionChoice::Int8;
                let (plan, saved) = step(model, &Recipe { precision, numerics, ..recipe.clone() });
                let bytes = batch * saved.bytes_per_sample;
                assert_eq!(
                    plan.saved_bytes(batch),
                    bytes,
                    "{model} int8 {granularity:?} {format:?}"
                );
            }
            assert!(!saved.compressed.is_empty());
            if format == Format::F16 {
                assert_eq!(bytes, before, "{model}: as many as in bf16");
                continue;
            }
            assert!(bytes < before, "{model} {format:?}: {bytes} of {before}");
            before = bytes;
            peaks.push(plan.bytes(batch));
        }
        if model == "resnet8.onnx" {
            assert!(peaks.is_sorted_by(|a, b| a > b), "{model}: {peaks:?}");
        }
    }
}

#[test]
fn compression_changes_gradients_only() {
    let rule = |format| vec![Rule { format, pattern: None }];
    for model in ["digits_cnn.onnx", "resnet8.onnx", "tiny_bert.onnx"] {
        let batches = batches(model, 8, 24);
        let wanted = losses(&mut trainer(&plan(model, &Recipe::default()), 1, 2), &batches);
        for format in Format::ALL {
            let plan = plan(model, &Recipe { saved: rule(format), ..Recipe::default() });
            let got = losses(&mut trainer(&plan, 1, 2), &batches);
            let close = (got[0] - wanted[0]).abs() <= 1e-5 * wanted[0];
            assert!(close, "{model} {format:?}: {} is not {}", got[0], wanted[0]);
            let mean = |losses: &[f32]| losses.iter().sum::<f32>() / losses.len() as f32;
            let (got, wanted) = (mean(&got[16..]), mean(&wanted[16..]));
            assert!(got < wanted * 1.25 + 0.05, "{model} {format:?}: {got} is not {wanted}");
        }
    }
}

#[test]
fn workers_receive_fewer_bytes() {
    let operations = Operations { mean: true, ..Operations::default() };
    let precision = PrecisionChoice::Int8;
    let plan = plan("digits_mlp.onnx", &Recipe { precision, operations, ..Recipe::default() });
    let (weights, biases) = (64 * 64 + 64 * 10, 64 + 10);
    // Codes, a scale for each block (of 256, and of 160), biases and loss in f32.
    let received = plan.received(2);
    assert_eq!(received.bytes, weights + 4 * (16 + 4) + 4 * (biases + 1));
    assert_eq!(received.f32_bytes, 4 * (weights + biases + 1));
    assert_eq!(plan.received(1).bytes, 0);
}

#[test]
fn a_pattern_of_the_compression_must_match() {
    let mut graph = forward("digits_mlp.onnx");
    differentiate::run(&mut graph).expect("differentiable");
    let rule = |pattern: &str| [Rule { format: Format::Int8, pattern: Some(pattern.to_owned()) }];
    let compressed = |graph: &mut Graph, pattern| saved::run(graph, &rule(pattern));
    let error = compressed(&mut graph.clone(), "conv*").expect_err("no convolution").to_string();
    assert!(error.contains("`conv*`"), "{error}");
    let saved = compressed(&mut graph, "*Relu*").expect("a relu");
    assert_eq!(saved.compressed.len(), 1);
}
