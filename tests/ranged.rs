//! Integers with ranges that are known before a step: folding, roundings, biases, and how they go out.

use crate::command::{DIGITS, Place};
use crate::support::{Random, cases, inputs, parse, snapshot};
use qcompile::data::Array;
use qcompile_ir::eval::{EvalOptions, eval};
use qcompile_ir::{DType, Graph, Op, Tensor};
use qcompile_onnx::{ExportOptions, ImportOptions, Port, export, import};
use qcompile_passes::calibrate::Range;
use qcompile_passes::quantize::{Codes, Held, Scheme, WeightScales, Weights, activations};
use qcompile_passes::{differentiate, fold_batch_norm, freeze, quantize};
use std::collections::BTreeMap;
use std::path::Path;

const BATCH: usize = 3;

fn evaluated(graph: &Graph, given: &BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    let values = eval(graph, given, BATCH, &EvalOptions::default()).expect("has a value");
    let of = |(name, id): &(String, _)| {
        let value = values.get(graph.node(*id).name.as_str()).expect("evaluated");
        (name.clone(), value)
    };
    graph.outputs().iter().map(of).collect()
}

/// The graph with what depends on stored values alone computed.
pub(crate) fn frozen(mut graph: Graph) -> Graph {
    let mut compute = |part: &Graph| Ok(evaluated(part, &BTreeMap::new()));
    freeze::run(&mut graph, &mut compute).expect("freezes");
    qcompile_ir::verify(&graph).expect("verifies");
    graph
}

fn check_close(case: &Path, got: &Graph, wanted: &Graph, tolerance: f64) {
    let given = inputs(wanted, BATCH, 2, &mut Random::new(7));
    let (got, wanted) = (evaluated(got, &given), evaluated(wanted, &given));
    for (name, wanted) in wanted {
        for (got, wanted) in got[&name].to_f64().into_iter().zip(wanted.to_f64()) {
            let close = (got - wanted).abs() <= tolerance * wanted.abs().max(1.0);
            assert!(close, "{}: {name}: {got}, not {wanted}", case.display());
        }
    }
}

fn name(path: &Path) -> String {
    path.file_stem().expect("a file").to_string_lossy().into_owned()
}

#[test]
fn folded_normalization_computes_the_same() {
    for case in cases("fold-batch-norm") {
        let graph = parse(&case);
        let mut folded = graph.clone();
        fold_batch_norm::run(&mut folded).expect("folds");
        let folded = frozen(folded);
        check_close(&case, &folded, &graph, 1e-6);
        snapshot("fold-batch-norm", &name(&case), &folded.to_string());
    }
}

/// The graph with every activation in the range from -1 to 2.
fn ranged(graph: &Graph, codes: Codes, weights: Weights, held: Held) -> Graph {
    let mut graph = graph.clone();
    let named = activations(&graph).into_iter().map(|id| graph.node(id).name.clone());
    let ranges = named.map(|name| (name, Range::new(-1.0, 2.0))).collect();
    quantize::insert_ranged(&mut graph, &ranges, &Scheme { codes, weights, held })
        .expect("inserts");
    qcompile_ir::verify(&graph).expect("verifies");
    graph
}

const INT8: Weights = Weights { dtype: DType::I8, scales: WeightScales::Channel };

#[test]
fn roundings_by_known_ranges_are_as_in_the_snapshots() {
    for case in cases("ranged") {
        let mut graph = ranged(&parse(&case), Codes::Uint8, INT8, Held::Constant);
        quantize::round_biases(&mut graph).expect("rounds");
        snapshot("ranged", &name(&case), &frozen(graph).to_string());
    }
}

/// What is written is what was rounded: the model comes back as the same function, to the last code.
#[test]
fn roundings_go_out_and_come_back_exactly() {
    let tensor = Weights { dtype: DType::I8, scales: WeightScales::Tensor };
    let block = Weights { dtype: DType::I4, scales: WeightScales::Block(4) };
    let int4 = Weights { dtype: DType::I4, scales: WeightScales::Channel };
    for case in cases("ranged") {
        for codes in Codes::ALL {
            for (weights, opset) in [(INT8, 13), (INT8, 19), (tensor, 13), (int4, 21), (block, 21)]
            {
                let mut graph = ranged(&parse(&case), codes, weights, Held::Constant);
                quantize::round_biases(&mut graph).expect("rounds");
                let graph = frozen(graph);
                let port = |name: &str, id| Port {
                    name: name.to_owned(),
                    ty: graph.ty(id).clone(),
                    onnx_dtype: String::new(),
                };
                let leaves = graph.leaves(|op| matches!(op, Op::Input(_))).into_iter();
                let inputs: Vec<Port> =
                    leaves.map(|id| port(graph.node(id).name.as_str(), id)).collect();
                let outputs: Vec<Port> =
                    graph.outputs().iter().map(|(name, id)| port(name, *id)).collect();
                let options = ExportOptions {
                    opset,
                    inputs: &inputs,
                    outputs: &outputs,
                    producer_version: "0",
                };
                let model = export(&graph, &options).expect("has a form in ONNX");
                let back = import(&model.bytes, &ImportOptions::default()).expect("imports");
                check_close(&case, &back.graph, &graph, 1e-6);
            }
        }
    }
}

/// Ranges are states that each step moves; the gradient passes the roundings, and no scale has one.
#[test]
fn trained_ranges_follow_the_values() {
    let case = cases("ranged").into_iter().find(|case| name(case) == "matrices").expect("is there");
    let graph = parse(&case);
    for codes in Codes::ALL {
        let mut graph = ranged(&graph, codes, INT8, Held::State);
        let output = graph.outputs()[0].1;
        let axes = (0..graph.ty(output).shape.rank()).collect();
        let sum = Op::Reduce { op: qcompile_ir::ReduceOp::Sum, axes };
        let region = qcompile_ir::Region::Forward;
        let sum = graph.add(sum, &[output], "sum", region).expect("adds");
        let scalar = Op::Reshape(qcompile_ir::Shape::scalar());
        let loss = graph.add(scalar, &[sum], "loss", region).expect("adds");
        graph.set_outputs(vec![("loss".to_owned(), loss)]);
        differentiate::run(&mut graph).expect("differentiates");
        qcompile_ir::verify(&graph).expect("verifies");
        snapshot("ranged", &format!("matrices.{}.train", codes.name()), &graph.to_string());
        let given = inputs(&graph, BATCH, 2, &mut Random::new(3));
        let values = eval(&graph, &given, BATCH, &EvalOptions::default()).expect("has a value");
        let x = given["x"].to_f64();
        let (low, high) =
            (x.iter().copied().fold(0.0, f64::min), x.iter().copied().fold(0.0, f64::max));
        for (state, before, extreme) in [("x.low", -1.0, low), ("x.high", 2.0, high)] {
            let next = graph.next()[&graph.find(state).expect("is there")];
            let next = values.get_f64(graph.node(next).name.as_str()).expect("evaluated")[0];
            assert!((next - (0.99 * before + 0.01 * extreme)).abs() < 1e-6, "{state}: {next}");
        }
    }
}

/// Scales of activations and weights are parameters that begin as the paper says, and have a gradient.
#[test]
fn learned_step_sizes_begin_by_the_mean_magnitude() {
    let case = cases("ranged").into_iter().find(|case| name(case) == "matrices").expect("is there");
    let int4 = Weights { dtype: DType::I4, scales: WeightScales::Channel };
    let graph = ranged(&parse(&case), Codes::Uint8, int4, Held::Parameter);
    let given = inputs(&graph, BATCH, 2, &mut Random::new(3));
    let values = eval(&graph, &given, BATCH, &EvalOptions::default()).expect("has a value");
    let w = values.get_f64("w").expect("evaluated");
    for (channel, step) in values.get_f64("w.step_size").expect("evaluated").iter().enumerate() {
        let mean = (0..8).map(|row| w[row * 4 + channel].abs()).sum::<f64>() / 8.0;
        let wanted = 2.0 * mean / 7.0_f64.sqrt();
        assert!((step - wanted).abs() < 1e-6 * wanted, "{step}, not {wanted}");
    }
    let mut graph = graph;
    let output = graph.outputs()[0].1;
    let axes = (0..graph.ty(output).shape.rank()).collect();
    let sum = Op::Reduce { op: qcompile_ir::ReduceOp::Sum, axes };
    let region = qcompile_ir::Region::Forward;
    let sum = graph.add(sum, &[output], "sum", region).expect("adds");
    let loss = graph.add(Op::Reshape(qcompile_ir::Shape::scalar()), &[sum], "loss", region);
    graph.set_outputs(vec![("loss".to_owned(), loss.expect("adds"))]);
    differentiate::run(&mut graph).expect("differentiates");
    for step in ["x.step_size", "w.step_size", "v.step_size"] {
        assert!(graph.find(&format!("{step}.grad")).is_some(), "{step} has no gradient");
    }
    snapshot("ranged", "matrices.lsq.train", &graph.to_string());
}

/// What a line that is refused says.
fn refused(place: &Place, line: &str) -> String {
    let outcome = place.try_run(line);
    assert!((1..=64).contains(&outcome.code), "{line}: {outcome:?}");
    outcome.stderr
}

#[test]
fn quantization_aware_training_goes_out_with_its_scales() {
    let place = Place::new();
    place.run(&format!(
        "train @/digits_mlp.onnx -q --qat --data {DIGITS} --epochs 1 --lr 0.002 --samples 64 --checkpoint run"
    ));
    let document = place.run("export run --format qdq-onnx -o q.onnx --json").json();
    assert_eq!((&document["layers"], &document["layers_f32"]), (&2.into(), &0.into()));
    assert_eq!(document["operators"]["QuantizeLinear"], 2);
    let again = place.run("export run --format qdq-onnx -o again.onnx --json").json();
    assert_eq!(again["operators"], document["operators"]);
    assert_eq!(place.bytes("q.onnx"), place.bytes("again.onnx"));
    // In f32, and the weights alone, as any other.
    let plain = place.run("export run -o f.onnx --json").json();
    assert!(plain["operators"].get("QuantizeLinear").is_none(), "{plain}");
    let refused = refused(&place, "export run --format qdq-onnx -o x.onnx --weights int4");
    assert!(refused.contains("trained with its ranges"), "{refused}");
}

#[test]
fn learned_step_sizes_are_trained_and_go_out() {
    let place = Place::new();
    for (activations, weights) in [("int8", "int8"), ("uint8", "int4")] {
        let flags = format!("--calibration lsq --activations {activations} --weights {weights}");
        place.run(&format!(
            "train @/digits_mlp.onnx -q --qat {flags} --data {DIGITS} --epochs 1 --lr 0.01 --checkpoint {weights}"
        ));
        let accuracy = place.run(&format!("eval {weights} --data {DIGITS} --json")).json();
        assert!(accuracy["accuracy"].as_f64().expect("a number") > 0.5, "{accuracy}");
        let line = format!("export {weights} --format qdq-onnx -o {weights}.onnx --json");
        let document = place.run(&line).json();
        assert_eq!((&document["layers"], &document["layers_f32"]), (&2.into(), &0.into()));
        assert_eq!(document["operators"]["QuantizeLinear"], 2);
    }
    let refused = refused(
        &place,
        &format!("export int8 --format qdq-onnx -o x.onnx --data {DIGITS} --calibration lsq"),
    );
    assert!(refused.contains("--qat"), "{refused}");
}

/// A step size that an update carries past 0 goes on being one: at a floor the model would stay what it is then.
#[test]
fn step_sizes_survive_large_updates() {
    let place = Place::new();
    place.run(&format!(
        "train @/digits_cnn.onnx -q --qat --calibration lsq --data {DIGITS} --epochs 2 --optimizer adam --lr 0.01 --seed 1 --checkpoint run"
    ));
    let accuracy = place.run(&format!("eval run --data {DIGITS} --json")).json();
    assert!(accuracy["accuracy"].as_f64().expect("a number") > 0.8, "{accuracy}");
}

/// Ranges are for layers with weights: recurrent products and those of two activations stay as they are, and are named.
#[test]
fn products_that_have_no_ranges_stay_and_are_told_of() {
    let place = Place::new();
    let keep_attention = "--keep f32=MatMul_1 --keep f32=MatMul_3";
    for (model, length, keep) in
        [("tiny_rnn", 12, "--keep f32=*recurrence*"), ("tiny_gpt", 32, keep_attention)]
    {
        let words: Vec<i64> = (0..8 * length as i64).map(|at| at % 4).collect();
        let words = Array::from_i64(vec![8, length], &words).expect("well-formed");
        place.write_npz("words.npz", &[("x", words)]);
        let line = format!(
            "@/{model}.onnx -o {model}.qplan -q --qat --precision int8 --no-measure --data words.npz"
        );
        let told = place.run(&line).stderr;
        assert!(told.contains("no kernel has what is asked for"), "{model}: {told}");
        let told = place.run(&format!("{line} {keep}")).stderr;
        assert!(!told.contains("no kernel has"), "{model}: {told}");
    }
}

#[test]
fn post_training_quantization_says_what_it_wants() {
    let place = Place::new();
    place.run("@/digits_mlp.onnx -o m.qplan -q --no-measure --precision f32");
    let export = "export m.qplan --format qdq-onnx -o q.onnx";
    for (flags, said) in [
        (String::new(), "--data"),
        (format!("--data {DIGITS} --block-size 8"), "--weights int4"),
        (format!("--data {DIGITS} --weights int4 --opset 17"), "opset 21"),
        (format!("--data {DIGITS} --weights int4 --block-size 5"), "do not divide"),
        (format!("--data {DIGITS} --keep f32=nothing"), "no layer matches"),
        (format!("--data {DIGITS} --keep f32=*"), "no layer is left"),
    ] {
        let refused = refused(&place, &format!("{export} {flags}"));
        assert!(refused.contains(said), "{flags}: {refused}");
    }
    for (line, said) in [
        (format!("export m.qplan -o q.onnx --data {DIGITS}"), "qdq-onnx"),
        ("export m.qplan -o q.onnx --calibration mse".to_owned(), "qdq-onnx"),
        ("export m.qplan -o q.npz --threads 1".to_owned(), "qdq-onnx"),
        ("@/digits_mlp.onnx -o n.qplan --calibration mse".to_owned(), "--qat"),
        ("@/digits_mlp.onnx -o n.qplan --qat".to_owned(), "--data"),
        ("@/digits_mlp.onnx -o n.qplan --qat --precision bf16".to_owned(), "--precision bf16"),
        ("@/digits_mlp.onnx -o n.qplan --qat --quantize-ops backward".to_owned(), "leaves it out"),
        (format!("train m.qplan --data {DIGITS} --qat"), "decided"),
    ] {
        let refused = refused(&place, &line);
        assert!(refused.contains(said), "{line}: {refused}");
    }
    for method in ["min-max", "percentile=99.9", "mse", "entropy"] {
        let flags = format!("--data {DIGITS} --samples 64 --calibration {method}");
        let document = place.run(&format!("{export} {flags} --json")).json();
        assert_eq!((&document["samples"], &document["layers"]), (&64.into(), &2.into()));
    }
}
