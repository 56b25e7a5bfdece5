//! The way out: what goes out as ONNX comes back as the same function.

use crate::command::{DIGITS, MLP, Place, keys};
use crate::random_graph::{Wanted, random_graph};
use crate::support::{Random, cases, inputs, parse, root, snapshot};
use qcompile::export::Exported;
use qcompile::model::open;
use qcompile::{Options, Region, Trainer, TrainerOptions, Values};
use qcompile_ir::eval::{EvalOptions, eval};
use qcompile_ir::{DType, Graph, Op, Tensor};
use qcompile_onnx::{
    BatchNorm, EXPORT_OPSETS, Export, ExportError, ExportOptions, ImportOptions, Port, export,
    import,
};
use qcompile_plan::{BuildOptions, build};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

const BATCH: usize = 3;

/// Ports of all inputs and outputs of a graph.
fn ports(graph: &Graph) -> (Vec<Port>, Vec<Port>) {
    let port = |name: &str, id| Port {
        name: name.to_owned(),
        ty: graph.ty(id).clone(),
        onnx_dtype: String::new(),
    };
    let inputs = graph.leaves(|op| matches!(op, Op::Input(_))).into_iter();
    let inputs = inputs.map(|id| port(graph.node(id).name.as_str(), id)).collect();
    let outputs = graph.outputs().iter().map(|(name, id)| port(name, *id)).collect();
    (inputs, outputs)
}

fn exported(graph: &Graph, opset: u32) -> Result<Export, ExportError> {
    let (inputs, outputs) = ports(graph);
    let options =
        ExportOptions { opset, inputs: &inputs, outputs: &outputs, producer_version: "0" };
    export(graph, &options)
}

/// Outputs by name, by the reference evaluator; none where an index is out of range.
fn evaluated(
    graph: &Graph,
    given: &BTreeMap<String, Tensor>,
) -> Option<BTreeMap<String, Vec<f64>>> {
    let values = eval(graph, given, BATCH, &EvalOptions::default()).ok()?;
    let of = |(name, id): &(String, _)| {
        let value = values.get_f64(graph.node(*id).name.as_str()).expect("evaluated");
        (name.clone(), value)
    };
    Some(graph.outputs().iter().map(of).collect())
}

/// The largest difference that rounding explains, relative to the largest value.
fn tolerance(graph: &Graph) -> f64 {
    let of = |dtype| match dtype {
        DType::F16 => 4e-3,
        DType::BF16 => 3e-2,
        _ => 1e-5,
    };
    graph.ids().map(|id| of(graph.ty(id).dtype)).fold(0.0, f64::max)
}

fn check_close(place: &str, got: &[f64], wanted: &[f64], tolerance: f64) {
    assert_eq!(got.len(), wanted.len(), "{place}");
    let largest = wanted.iter().filter(|x| x.is_finite()).fold(1.0_f64, |m, x| m.max(x.abs()));
    for (at, (got, wanted)) in got.iter().zip(wanted).enumerate() {
        let same = got == wanted || (got.is_nan() && wanted.is_nan());
        assert!(
            same || (got - wanted).abs() <= tolerance * largest,
            "{place}: element {at} is {got}, not {wanted}"
        );
    }
}

/// Exports, imports what was written, and compares both by the reference evaluator.
fn check_comes_back(place: &str, graph: &Graph, opset: u32) -> Result<(), ExportError> {
    let given = inputs(graph, BATCH, 2, &mut Random::new(7));
    let Some(wanted) = evaluated(graph, &given) else { return Ok(()) };
    if graph.ids().any(|id| *graph.op(id) == Op::Training) {
        // The evaluator trains, and what goes out does not.
        return exported(graph, opset).map(drop);
    }
    let (ins, outs) = ports(graph);
    if ins.iter().flat_map(|port| &port.ty.shape.0).any(|dim| dim.batch && dim.scale != 1) {
        // A symbol of ONNX is one size, and no multiple of another.
        return Ok(());
    }
    let written = exported(graph, opset)?;
    assert_eq!(exported(graph, opset).as_ref(), Ok(&written), "{place}: equal bytes");
    let back = import(&written.bytes, &ImportOptions::default())
        .unwrap_or_else(|error| panic!("{place}, opset {opset}: {error}\n{graph}"));
    assert_eq!(
        back.inputs.iter().map(|port| &port.ty).collect::<Vec<_>>(),
        ins.iter().map(|port| &port.ty).collect::<Vec<_>>(),
        "{place}"
    );
    assert_eq!(
        back.outputs.iter().map(|port| &port.ty).collect::<Vec<_>>(),
        outs.iter().map(|port| &port.ty).collect::<Vec<_>>(),
        "{place}"
    );
    let got = evaluated(&back.graph, &given).unwrap_or_else(|| panic!("{place}: not evaluated"));
    for (name, wanted) in &wanted {
        check_close(
            &format!("{place}, opset {opset}, {name}"),
            &got[name],
            wanted,
            tolerance(graph),
        );
    }
    Ok(())
}

/// The graphs of the tests of gradients have every op of a forward pass.
#[test]
fn every_op_comes_back() {
    let mut refused = BTreeSet::new();
    for path in cases("gradients") {
        let graph = parse(&path);
        let name = path.file_stem().expect("a file").to_string_lossy().into_owned();
        for opset in [17, 23] {
            match check_comes_back(&name, &graph, opset) {
                Ok(()) => {}
                Err(error) => {
                    refused.insert(error.to_string());
                }
            }
        }
    }
    let expected = [
        "value numbers (random) has no form in ONNX: ONNX's random numbers are others",
        "value states (slice) has no form in ONNX: ONNX gives h after each step and c after the last",
        "value y (scatter_max) needs ScatterND with reduction `max`, which ONNX has from opset 18 on; asked for is 17",
    ];
    assert_eq!(refused, BTreeSet::from(expected.map(str::to_owned)));
}

#[test]
fn random_graphs_come_back() {
    let mut reasons: BTreeMap<String, usize> = BTreeMap::new();
    let mut written = 0;
    for seed in 0..400 {
        let wanted = Wanted { draws: 30, regions: 1, planned: false, smooth: true };
        let graph = random_graph(seed, wanted);
        match check_comes_back(&format!("random graph {seed}"), &graph, 23) {
            Ok(()) => written += 1,
            Err(ExportError::Unsupported { op, reason, .. }) => {
                *reasons.entry(format!("{op}: {reason}")).or_default() += 1;
            }
            Err(error) => panic!("{seed}: {error}"),
        }
    }
    assert!(written > 300, "{written} came back; {reasons:#?}");
}

/// Outputs by name, by native code.
fn run(graph: &Graph, given: &Values) -> Values {
    let plan = build(graph.clone(), &BuildOptions { batch_size: BATCH }).expect("has a plan");
    let options = TrainerOptions { threads: 2, ..TrainerOptions::default() };
    let mut trainer = Trainer::new(Arc::new(plan), &options).expect("compiles");
    trainer.run(given, Region::Comm).expect("runs")
}

#[test]
fn models_come_back() {
    let mut folder: Vec<_> = std::fs::read_dir(root().join("models"))
        .expect("readable")
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "onnx"))
        .collect();
    folder.sort();
    assert!(folder.len() >= 10);
    for path in folder {
        let place = path.file_stem().expect("a file").to_string_lossy().into_owned();
        let target = open(&path).expect("readable");
        let exported = Exported::of(&target, &path, &Options::default()).expect("evaluates");
        let original = import(&std::fs::read(&path).expect("readable"), &ImportOptions::default());
        let original = original.expect("imports");
        let frozen = ImportOptions { batch_norm: BatchNorm::Frozen, ..ImportOptions::default() };
        let wanted = import(&std::fs::read(&path).expect("readable"), &frozen).expect("imports");
        let given = inputs(&wanted.graph, BATCH, 2, &mut Random::new(3));
        let wanted = run(&wanted.graph, &given);
        for opset in [*EXPORT_OPSETS.start(), 17, *EXPORT_OPSETS.end()] {
            let written = exported.onnx(opset).unwrap_or_else(|error| panic!("{place}: {error}"));
            let back = import(&written.bytes, &ImportOptions::default())
                .unwrap_or_else(|error| panic!("{place}, opset {opset}: {error}"));
            assert_eq!(back.inputs, original.inputs, "{place}");
            assert_eq!(back.outputs, original.outputs, "{place}");
            // Every parameter is there once, under its name, and is trained again.
            for name in original.parameters.keys() {
                assert!(back.parameters.contains_key(name), "{place}, opset {opset}: {name}");
            }
            let got = run(&back.graph, &given);
            for (name, wanted) in &wanted {
                let place = format!("{place}, opset {opset}, {name}");
                check_close(&place, &got[name].to_f64(), &wanted.to_f64(), 1e-5);
            }
        }
    }
}

/// How many nodes the models have when they come out; each was looked at.
#[test]
fn models_come_out_in_as_few_nodes_as_they_came_in() {
    let mut text = String::new();
    for (model, opset) in [
        ("digits_cnn", 17),
        ("resnet20", 17),
        ("tiny_bert", 17),
        ("tiny_bert", 20),
        ("tiny_gpt", 20),
        ("tiny_mobilenet", 17),
        ("tiny_rnn", 17),
    ] {
        let path = root().join("models").join(model).with_extension("onnx");
        let target = open(&path).expect("readable");
        let exported = Exported::of(&target, &path, &Options::default()).expect("evaluates");
        let operators = exported.onnx(opset).expect("exports").operators;
        let counts: Vec<String> =
            operators.iter().map(|(operator, count)| format!("{count} {operator}")).collect();
        text.push_str(&format!("{model}, opset {opset}: {}\n", counts.join(", ")));
    }
    snapshot("export", "operators", &text);
}

/// What is one operator, and what only looks like it.
#[test]
fn patterns_are_found_where_they_are() {
    let x = "  input %x : f32[N, 4]\n  input %w : f32[4]\n  const %half : f32[] = 0.5\n  const %one : f32[] = 1\n  const %four : f32[] = 4\n\nforward:\n  %ws : f32[N, 4] = broadcast %w\n  %halves : f32[N, 4] = broadcast %half\n  %ones : f32[N, 4] = broadcast %one\n";
    let mean = "  %sum : f32[N, 1] = reduce_sum %x axes=[1]\n  %fours : f32[N, 1] = broadcast %four\n  %mean : f32[N, 1] = div %sum, %fours\n";
    let centered = "  %means : f32[N, 4] = broadcast %mean\n  %c : f32[N, 4] = sub %x, %means\n";
    let square = "  %square : f32[N, 4] = mul %c, %c\n  %squares : f32[N, 1] = reduce_sum %square axes=[1]\n  %variance : f32[N, 1] = div %squares, %fours\n";
    let deviation = "  %epsilon : f32[N, 1] = broadcast %half\n  %shifted : f32[N, 1] = add %variance, %epsilon\n  %deviation : f32[N, 1] = sqrt %shifted\n";
    let scaled = "  %deviations : f32[N, 4] = broadcast %deviation\n  %normal : f32[N, 4] = div %c, %deviations\n  %y : f32[N, 4] = mul %normal, %ws\n";
    let norm = [mean, centered, square, deviation, scaled].concat();
    let gelu = |constant: &str| {
        format!(
            "  const %root : f32[] = {constant}\n  %roots : f32[N, 4] = broadcast %root\n  %s : f32[N, 4] = mul %x, %roots\n  %e : f32[N, 4] = erf %s\n  %g : f32[N, 4] = add %e, %ones\n  %h : f32[N, 4] = mul %x, %halves\n  %y : f32[N, 4] = mul %h, %g\n"
        )
    };
    let clip = |low: &str, high: &str| {
        format!("  %m : f32[N, 4] = max %x, %{low}\n  %y : f32[N, 4] = min %m, %{high}\n")
    };
    let mean_alone = format!("{mean}  %y : f32[N, 4] = broadcast %mean\n");
    let operators: [(&str, String, u32, &[&str]); 11] = [
        ("a mean", mean_alone.clone(), 17, &["Expand", "ReduceMean"]),
        (
            "of another count",
            mean_alone.replace("broadcast %four", "broadcast %one"),
            17,
            &["Div", "Expand", "ReduceSum"],
        ),
        ("a normalization", norm.clone(), 17, &["LayerNormalization"]),
        ("before opset 17", norm.clone(), 16, &["Add", "Div", "Mul", "ReduceMean", "Sqrt", "Sub"]),
        (
            "with another square",
            norm.replace("mul %c, %c", "mul %x, %c"),
            17,
            &["Add", "Div", "Mul", "ReduceMean", "Sqrt", "Sub"],
        ),
        ("a GELU", gelu("0.70710677"), 20, &["Gelu"]),
        ("before opset 20", gelu("0.70710677"), 19, &["Add", "Erf", "Mul"]),
        ("with another root", gelu("0.7"), 20, &["Add", "Erf", "Mul"]),
        ("limits", clip("halves", "ones"), 17, &["Clip"]),
        ("crossed limits", clip("ones", "halves"), 17, &["Max", "Min"]),
        ("a moving limit", clip("halves", "ws"), 17, &["Max", "Min"]),
    ];
    for (name, body, opset, expected) in operators {
        let mut source = format!("graph @g {{\n{x}{body}\n  return %y\n}}\n");
        // Leaves stand first.
        if let Some(at) = source.find("  const %root") {
            let end = at + source[at..].find('\n').expect("a line") + 1;
            let line: String = source.drain(at..end).collect();
            source.insert_str("graph @g {\n".len(), &line);
        }
        let graph = qcompile_ir::text::parse(&source, &|_| None)
            .unwrap_or_else(|errors| panic!("{name}: {errors}\n{source}"));
        let operators = exported(&graph, opset).expect("exports").operators;
        assert_eq!(operators.keys().collect::<Vec<_>>(), expected, "{name}");
        check_comes_back(name, &graph, opset).expect("exports");
    }
}

#[test]
fn what_cannot_go_out_is_said() {
    let graph = |body: &str| {
        let source = format!(
            "graph @g {{\n  input %x : f32[N, 4]\n  input %i : i64[N]\n\nforward:\n{body}}}\n"
        );
        qcompile_ir::text::parse(&source, &|_| None).unwrap_or_else(|errors| panic!("{errors}"))
    };
    let scattered = graph("  %y : f32[3, 4] = scatter_add %i, %x rows=3\n\n  return %y\n");
    let error = exported(&scattered, 15).expect_err("is too old");
    assert!(matches!(error, ExportError::Opset { needs: 16, opset: 15, .. }), "{error}");
    assert!(exported(&scattered, 16).is_ok());
    let reduced = graph(
        "  %sum : f32[1, 4] = reduce_sum %x axes=[0]\n  %y : f32[1, 4] = all_reduce %sum mean\n\n  return %y\n",
    );
    let error = exported(&reduced, 17).expect_err("has no form");
    assert!(matches!(error, ExportError::Unsupported { op: "all_reduce", .. }), "{error}");
    for opset in [0, 12, 24, u32::MAX] {
        assert_eq!(exported(&scattered, opset), Err(ExportError::OpsetRange { opset }));
    }
    let port = Port {
        name: "z".to_owned(),
        ty: graph("  %y : f32[N, 4] = neg %x\n\n  return %y\n")
            .ty(scattered.find("x").expect("is there"))
            .clone(),
        onnx_dtype: String::new(),
    };
    let options = ExportOptions { opset: 17, inputs: &[], outputs: &[port], producer_version: "0" };
    let error = export(&scattered, &options).expect_err("has no such output");
    assert!(matches!(error, ExportError::NoPort { kind: "output", .. }), "{error}");
}

/// A plan in low precision goes out as what it computes without roundings.
#[test]
fn roundings_stay_here() {
    for precision in ["int8", "bf16"] {
        let place = Place::new();
        let compile =
            format!("@/tiny_bert.onnx -o m.qplan -q --no-measure --precision {precision}");
        place.run(&compile);
        let outcome = place.run("export m.qplan -o out.onnx --json");
        let document = outcome.json();
        let warnings = document["warnings"].as_array().expect("a list");
        assert!(warnings[0].as_str().expect("a text").contains("in f32"), "{outcome:?}");
        assert!(outcome.stderr.contains("Warning"), "{outcome:?}");
        let operators = keys(&document["operators"]);
        for operator in ["Cast", "QuantizeLinear", "DequantizeLinear", "Round"] {
            assert!(!operators.contains(&operator), "{precision}: {operator}");
        }
        // Without training the weights are those of the model.
        let back = import(&place.bytes("out.onnx"), &ImportOptions::default()).expect("imports");
        let model = std::fs::read(root().join("models/tiny_bert.onnx")).expect("readable");
        let model = import(&model, &ImportOptions::default()).expect("imports");
        let given = inputs(&model.graph, BATCH, 60, &mut Random::new(5));
        let (got, wanted) = (run(&back.graph, &given), run(&model.graph, &given));
        check_close(precision, &got["logits"].to_f64(), &wanted["logits"].to_f64(), 1e-5);
    }
}

#[test]
fn a_trained_checkpoint_goes_out_in_every_format_and_trains_on() {
    let place = Place::new();
    // What `auto` takes depends on what is measured.
    place.run(&format!("{MLP} --precision f32"));
    let train =
        format!("train mlp.qplan -q --data {DIGITS} --epochs 2 --lr 0.002 --checkpoint run");
    place.run(&train);
    let evaluated = |target: &str| {
        place.run(&format!("eval {target} --data {DIGITS} --json")).json()["loss"].as_f64()
    };
    for format in ["onnx", "safetensors", "npz"] {
        let line = format!("export run -o out.{format}");
        assert!(place.run(&line).stdout.contains("4.81 k parameters"));
        let first = place.bytes(&format!("out.{format}"));
        place.run(&format!("export run --format {format} -o again"));
        assert!(first == place.bytes("again"), "{format}: equal bytes");
    }
    let document = place.run("export run -o out.onnx --opset 20 --json").json();
    let expected = ["bytes", "file", "format", "operators", "opset", "parameters", "warnings"];
    assert_eq!(keys(&document), expected);
    assert_eq!(document["opset"], 20);
    // The weights are those of the model, with its shapes, and the same in all.
    let weights = place.read_npz("out.npz");
    let model = std::fs::read(root().join("models/digits_mlp.onnx")).expect("readable");
    let model = import(&model, &ImportOptions::default()).expect("imports");
    assert!(weights.keys().eq(model.parameters.keys()));
    let back = import(&place.bytes("out.onnx"), &ImportOptions::default()).expect("imports");
    let held = place.bytes("out.safetensors");
    for (name, array) in &weights {
        let find = |graph: &Graph| match graph.op(graph.find(name).expect("is there")) {
            Op::Param(tensor) => Arc::clone(tensor),
            other => panic!("{name} is {other:?}"),
        };
        assert_eq!(array.shape, find(&model.graph).shape());
        assert_eq!(array.bytes, find(&back.graph).bytes());
        assert!(held.windows(array.bytes.len()).any(|bytes| bytes == array.bytes), "{name}");
    }
    // What comes back is as good as what went out, and gets better.
    place.run(&format!(
        "out.onnx -o back.qplan -q --no-measure --precision f32 --loss cross-entropy --data {DIGITS}"
    ));
    let (before, after) = (evaluated("run"), evaluated("back.qplan"));
    let (before, after) = (before.expect("a number"), after.expect("a number"));
    assert!((before - after).abs() <= 1e-5 * before, "{before} became {after}");
    place.run(&format!("train back.qplan -q --data {DIGITS} --epochs 2 --lr 0.002 -o on.qplan"));
    assert!(evaluated("on.qplan").expect("a number") < after);
}

#[test]
fn running_statistics_are_weights_too() {
    let place = Place::new();
    place.run("@/resnet8.onnx -o m.qplan -q --no-measure --loss cross-entropy --precision f32");
    place.run("export m.qplan -o out.npz");
    let weights = place.read_npz("out.npz");
    assert!(weights.contains_key("bn1.running_mean") && weights.contains_key("bn1.weight"));
    assert!(!weights.keys().any(|name| name.contains("momentum")), "{:?}", weights.keys());
}

#[test]
fn wrong_exports_are_refused() {
    let place = Place::new();
    place.run(&format!("{MLP} --precision f32"));
    for (line, code, text) in [
        ("export mlp.qplan -o out.bin", 2, "--format says what is written"),
        ("export mlp.qplan -o out.onnx --format tflite", 2, "tflite"),
        ("export mlp.qplan -o out.onnx --format qdq-onnx", 2, "give --data"),
        ("export mlp.qplan -o out.onnx --opset 12", 2, "13 to 23"),
        ("export mlp.qplan -o out.npz --opset 17", 2, "--opset is for --format onnx"),
        ("export mlp.qplan -o none/out.onnx", 74, "none/out.onnx"),
        ("export mlp.qplan -o mlp.qplan --format onnx", 2, "overwrite"),
        ("export mlp.qplan -o out.onnx --freeze fc*", 3, "imported already"),
        ("export nothing.qplan -o out.onnx", 74, "nothing.qplan"),
        ("export @/data/digits.csv.gz -o out.onnx", 3, "gzip"),
    ] {
        let outcome = place.try_run(line);
        assert_eq!(outcome.code, code, "{line}: {outcome:?}");
        assert!(outcome.stderr.contains(text), "{line}: {outcome:?}");
    }
    assert_eq!(place.names(), ["mlp.qplan"]);
}
