//! The command: what it answers and what it writes.

use crate::command::{DIGITS, MLP, Place, digits, keys};
use crate::support::snapshot;
use qcompile::data::{Array, Dtype};
use serde_json::Value;
use std::process::{Command, Stdio};

#[test]
fn help_says_what_there_is() {
    let place = Place::new();
    let mut text = place.run("--help").stdout;
    for command in [
        "run",
        "train",
        "eval",
        "sensitivity",
        "inspect",
        "export",
        "bench",
        "doctor",
        "completions",
    ] {
        text.push_str(&format!(
            "\n=== {command}\n{}",
            place.run(&format!("{command} --help")).stdout
        ));
    }
    snapshot("cli", "help", &text);
    assert!(place.run("--version").stdout.starts_with("qcompile "));
    assert!(place.run("completions bash").stdout.contains("complete -F"));
}

#[test]
fn compiles_to_equal_bytes_and_says_what_it_decided() {
    let place = Place::new();
    let line =
        format!("@/digits_cnn.onnx --json --loss cross-entropy --data {DIGITS} --samples 64");
    let document = place.run(&line).json();
    assert_eq!(place.names(), ["digits_cnn.qplan"]);
    let expected = [
        "batch_size",
        "bf16_step_ms",
        "decisions",
        "f32_step_ms",
        "loss",
        "model",
        "optimizer",
        "peak_bytes",
        "plan",
        "rematerialised",
        "saved_bytes",
        "state_bytes",
        "step_ms",
        "warnings",
    ];
    assert_eq!(keys(&document), expected);
    let decisions = document["decisions"].as_array().unwrap();
    assert_eq!(decisions.len(), 3);
    for decision in decisions {
        let expected =
            ["channels_high", "node", "op", "origin", "parameters", "precision", "reason", "score"];
        assert_eq!(keys(decision), expected);
        let expected = ["forward", "grad_input", "grad_weight", "mean", "update"];
        assert_eq!(keys(&decision["precision"]), expected);
        assert!(decision["score"].is_number(), "{decision}");
    }
    assert!(document["step_ms"].as_f64().unwrap() > 0.0);
    assert!(document["f32_step_ms"].is_number());
    let first = place.bytes("digits_cnn.qplan");
    place.run(&line);
    assert_eq!(place.bytes("digits_cnn.qplan"), first);
}

#[test]
fn synthetic_inputs_are_said_aloud() {
    let place = Place::new();
    let line = format!("{MLP} --precision mixed --samples 32");
    let warned = place.run(&line).stderr;
    assert!(warned.contains("sensitivity was measured on synthetic inputs"), "{warned}");
    let quiet = place.run(&format!("{MLP} --precision f32")).stderr;
    assert_eq!(quiet, "");
}

#[test]
fn a_graph_leaves_the_street_and_comes_back() {
    let place = Place::new();
    place.run(&format!("{MLP} --precision int8"));
    let direct = place.bytes("mlp.qplan");
    for pass in [
        "simplify",
        "attention",
        "attach-loss",
        "quantize",
        "differentiate",
        "move-roundings",
        "update",
    ] {
        let stop =
            format!("{MLP} --precision int8 --stop-after {pass}").replace("mlp.qplan", "at.qir");
        place.run(&stop);
        place.run("at.qir -o back.qplan -q --loss cross-entropy --no-measure --precision int8");
        assert!(place.bytes("back.qplan") == direct, "another plan from after {pass}");
    }
    let again = place.try_run("at.qir --stop-after simplify");
    assert_eq!(again.code, 2, "{again:?}");
    place
        .run("@/digits_mlp.onnx -q --precision f32 --no-measure --dump-after all --dump-dir dumps");
    assert_eq!(
        std::fs::read_dir(place.path("dumps")).unwrap().count(),
        26,
        "thirteen texts, thirteen tensor files"
    );
}

#[test]
fn emits_every_form() {
    let place = Place::new();
    for (form, beginning) in
        [("graph", "; after: rematerialise\n"), ("plan-text", ""), ("clif", ""), ("asm", "")]
    {
        let text = place
            .run(&format!(
                "@/digits_mlp.onnx -q --precision f32 --loss cross-entropy --emit {form}"
            ))
            .stdout;
        assert!(text.len() > 200 && text.starts_with(beginning), "{form}: {text}");
    }
    assert_eq!(place.names(), [""; 0]);
    let timed = place.run(&format!("{MLP} --precision f32 --time-passes")).stderr;
    assert!(timed.contains("differentiate"), "{timed}");
}

#[test]
fn runs_forward_from_model_plan_and_checkpoint() {
    let place = Place::new();
    place.write_npz("in.npz", &digits(5)[..1]);
    place.run("run @/digits_mlp.onnx --inputs in.npz --outputs model.npz");
    place.run(&format!("{MLP} --precision f32"));
    place.run("run mlp.qplan --inputs in.npz --outputs plan.npz");
    let outputs = place.read_npz("model.npz");
    assert_eq!(outputs.keys().collect::<Vec<_>>(), ["logits"]);
    assert_eq!((outputs["logits"].dtype, &outputs["logits"].shape), (Dtype::F32, &vec![5, 10]));
    assert_eq!(place.read_npz("plan.npz"), outputs);
    place.run(&format!("train mlp.qplan --data {DIGITS} --lr 0.05 --checkpoint run -q"));
    place.run(&format!("train mlp.qplan --data {DIGITS} --lr 0.05 -q"));
    place.run("run run --inputs in.npz --outputs checkpoint.npz");
    place.run("run mlp.trained.qplan --inputs in.npz --outputs trained.npz");
    assert_ne!(place.read_npz("checkpoint.npz"), outputs);
    assert_eq!(place.read_npz("checkpoint.npz"), place.read_npz("trained.npz"));
}

#[test]
fn element_types_go_in_and_out_as_the_model_declares_them() {
    let place = Place::new();
    let ports = |dtypes: [&str; 5]| {
        let names = ["d", "h", "i", "b", "c"];
        let port = |(name, dtype)| serde_json::json!({"name": name, "dtype": dtype});
        names.into_iter().zip(dtypes).map(port).collect::<Vec<Value>>()
    };
    let inputs = ports(["float64", "float16", "int32", "bool", "int64"]);
    let mut outputs = ports(["float64", "float16", "int32", "bool", "float32"]);
    for (port, name) in outputs.iter_mut().zip(["od", "oh", "oi", "ob", "oc"]) {
        port["name"] = name.into();
    }
    // The last input is not used, and the last output is a constant.
    let about = serde_json::json!({"inputs": inputs, "outputs": outputs});
    place.write(
        "g.qir",
        format!(
            "; about: {about}\n{}",
            "graph @g {
  input %d : f32[N, 2]
  input %h : f16[3]
  input %i : i32[N]
  input %b : bool[2]
  input %c : i64[]
  const %k : f32[2] = [1, 2]
forward:
  %x : f32[N, 2] = neg %d
  %y : f16[3] = neg %h
  %z : i32[N] = neg %i
  %n : bool[2] = not %b
  return %x as \"od\", %y as \"oh\", %z as \"oi\", %n as \"ob\", %k as \"oc\"
}
"
        ),
    );
    let half = |values: [u16; 3]| {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Array::new(Dtype::F16, vec![3], bytes).unwrap()
    };
    let given = [
        ("d", Array::from_f64(vec![2, 2], &[0.5, -1.0, 2.0, f64::INFINITY]).unwrap()),
        ("h", half([0x3c00, 0x4000, 0])),
        ("i", Array::from_i32(vec![2], &[7, -8]).unwrap()),
        ("b", Array::new(Dtype::Bool, vec![2], vec![1, 0]).unwrap()),
        ("c", Array::from_i64(vec![], &[1]).unwrap()),
    ];
    place.write_npz("in.npz", &given);
    place.run("run g.qir --inputs in.npz --outputs out.npz");
    let outputs = place.read_npz("out.npz");
    assert_eq!(outputs["od"].to_f64().unwrap(), [-0.5, 1.0, -2.0, f64::NEG_INFINITY]);
    assert_eq!(outputs["oh"], half([0xbc00, 0xc000, 0x8000]));
    assert_eq!(outputs["oi"].to_i32().unwrap(), [-7, 8]);
    assert_eq!(outputs["ob"], Array::new(Dtype::Bool, vec![2], vec![0, 1]).unwrap());
    assert_eq!(outputs["oc"].to_f32().unwrap(), [1.0, 2.0]);
}

#[test]
fn gradients_have_the_names_of_the_initializers() {
    let place = Place::new();
    place.write_npz("batch.npz", &digits(6));
    let line = "--inputs batch.npz --loss cross-entropy --gradients";
    place.run(&format!("run @/digits_mlp.onnx {line} model.npz"));
    let gradients = place.read_npz("model.npz");
    let names: Vec<&str> = gradients.keys().map(String::as_str).collect();
    assert_eq!(names, ["fc1.bias", "fc1.weight", "fc2.bias", "fc2.weight", "loss"]);
    assert_eq!(gradients["loss"].shape, [0; 0]);
    assert!(gradients["fc1.weight"].to_f32().unwrap().iter().any(|value| *value != 0.0));
    place.run(&format!("{MLP} --precision f32"));
    place.run(&format!("run mlp.qplan {line} plan.npz"));
    assert_eq!(place.read_npz("plan.npz"), gradients);
    let int8 = format!("run @/digits_mlp.onnx --precision int8 {line} int8.npz");
    place.run(&int8);
    assert_ne!(place.read_npz("int8.npz"), gradients);
    // Without a trained initializer there is nothing to differentiate; with some, the others have no key.
    let frozen = place.try_run(&format!("run @/digits_mlp.onnx --freeze * {line} none.npz"));
    assert_eq!(frozen.code, 3, "{frozen:?}");
    place.run(&format!("run @/digits_mlp.onnx --freeze fc1* {line} some.npz"));
    assert_eq!(place.read_npz("some.npz").len(), 3);
}

#[test]
fn trains_evaluates_and_resumes_to_the_bit() {
    let place = Place::new();
    place.run(&format!("{MLP} --precision int8"));
    let train = format!("train mlp.qplan --data {DIGITS} --eval {DIGITS} --lr 0.05 --json -q");
    let lines = place.run(&format!("{train} --epochs 2 --checkpoint a --log-every 50")).lines();
    let (steps, epochs): (Vec<&Value>, Vec<&Value>) =
        lines.iter().partition(|line| line.get("step").is_some());
    assert_eq!(keys(steps[0]), ["grad_norm", "loss", "loss_scale", "lr", "skipped", "step"]);
    let numbers: Vec<u64> = steps.iter().map(|step| step["step"].as_u64().unwrap()).collect();
    assert_eq!(numbers, [50, 100]);
    let expected = [
        "epoch",
        "eval_accuracy",
        "eval_loss",
        "loss",
        "received_bytes",
        "received_f32_bytes",
        "samples_per_s",
        "skipped",
        "steps",
    ];
    assert_eq!(keys(epochs[0]), expected);
    assert!(epochs[1]["eval_accuracy"].as_f64().unwrap() > 0.9, "{epochs:?}");

    let resumed = place.run(&format!("{train} --epochs 4 --checkpoint a --resume")).lines();
    let whole = place.run(&format!("{train} --epochs 4 --checkpoint b")).lines();
    assert!(place.bytes("a/state.safetensors") == place.bytes("b/state.safetensors"));
    let losses = |lines: &[Value]| -> Vec<String> {
        lines.iter().map(|line| format!("{} {}", line["loss"], line["eval_loss"])).collect()
    };
    assert_eq!(losses(&resumed), losses(&whole)[2..]);
    let again = place.run(&format!("{train} --epochs 4 --checkpoint c --threads 1")).lines();
    assert_eq!(losses(&again), losses(&whole), "another number of threads");

    let eval = place.run(&format!("eval a --data {DIGITS} --json")).json();
    assert_eq!(keys(&eval), ["accuracy", "loss", "samples"]);
    assert_eq!((&eval["loss"], &eval["samples"]), (&whole[3]["eval_loss"], &1797.into()));
    let both = place.run(&format!("eval a --data {DIGITS} --baseline mlp.qplan --json")).json();
    assert!(both["baseline"]["accuracy"].as_f64() < both["accuracy"].as_f64());

    let other = place.try_run(&format!("{train} --epochs 5 --checkpoint a --resume --seed 1"));
    assert_eq!(other.code, 2, "{other:?}");
    assert!(other.stderr.contains("--seed: 0 in the checkpoint, 1 now"), "{}", other.stderr);
    let anew = place.try_run(&format!("{train} --checkpoint a"));
    assert_eq!(anew.code, 2, "{anew:?}");
    assert_eq!(place.names(), ["a", "b", "c", "mlp.qplan"]);
}

#[test]
fn workers_come_to_the_same_losses() {
    let place = Place::new();
    place.run(&format!("{MLP} --precision f32 --batch-size 64"));
    let train =
        format!("train mlp.qplan --data {DIGITS} --lr 0.05 --json -q --log-every 1 --drop-last");
    let one = place.run(&train).lines();
    let two = place.run(&format!("{train} --workers 2")).lines();
    for (one, two) in one.iter().zip(&two) {
        let [one, two] = [one, two].map(|line| line["loss"].as_f64().unwrap());
        assert!((one - two).abs() <= 1e-5 * one, "{one} {two}");
    }
    assert_eq!(one.len(), two.len());
    let odd = place.try_run(&format!("{train} --workers 3"));
    assert_eq!(odd.code, 2, "{odd:?}");
}

#[test]
fn batch_statistics_train_and_running_ones_evaluate() {
    let place = Place::new();
    let random = |n: usize| (0..n).map(|at| ((at * 7919) % 251) as u8).collect::<Vec<u8>>();
    place.write_npz(
        "data.npz",
        &[
            ("x", Array::from_u8(vec![8, 3, 32, 32], &random(8 * 3 * 1024)).unwrap()),
            ("label", Array::from_i64(vec![8], &[0, 1, 2, 3, 4, 5, 6, 7]).unwrap()),
        ],
    );
    let compile =
        "@/resnet8.onnx -q --precision f32 --no-measure --loss cross-entropy --batch-size 4";
    place.run(compile);
    place.run("train resnet8.qplan --data data.npz --epochs 2 -q");
    let loss = |batch: usize| {
        let line =
            format!("eval resnet8.trained.qplan --data data.npz --batch-size {batch} --json -q");
        place.run(&line).json()["loss"].as_f64().unwrap()
    };
    let (alone, together) = (loss(1), loss(8));
    assert!((alone - together).abs() < 1e-4 * together, "{alone} {together}");
}

#[test]
fn scores_are_written_and_used() {
    let place = Place::new();
    let score =
        format!("sensitivity @/digits_mlp.onnx --loss cross-entropy --data {DIGITS} --samples 64");
    let table = place.run(&format!("{score} -o scores.json")).stdout;
    assert!(table.contains("leave-one-out on 64 samples"), "{table}");
    let scores: Value = serde_json::from_slice(&place.bytes("scores.json")).unwrap();
    assert_eq!(keys(&scores), ["baseline_loss", "layers", "metric", "samples", "synthetic"]);
    assert_eq!(scores["layers"][0]["channels"].as_array().unwrap().len(), 64);
    let document = place
        .run(&format!("{MLP} --json --precision mixed --threshold 1 --scores scores.json"))
        .json();
    let decision = &document["decisions"][0];
    let number = |value: &Value| value.as_f64().map(|score| score as f32);
    assert_eq!(number(&decision["score"]), number(&scores["layers"][0]["score"]));
    assert_eq!(decision["precision"]["forward"], "int8");
    // The three worst channels of the first layer.
    let mut channels: Vec<f64> = scores["layers"][0]["channels"]
        .as_array()
        .unwrap()
        .iter()
        .map(|score| score.as_f64().unwrap())
        .collect();
    channels.sort_by(f64::total_cmp);
    let threshold = channels[channels.len() - 4];
    for (policy, set) in [("split", "outliers"), ("multipoint", "points")] {
        let compile = format!(
            "{MLP} --json --precision int8 --scores scores.json --channel-threshold {threshold} --channel-policy {policy}"
        );
        let decisions = place.run(&compile).json()["decisions"].clone();
        let apart = &decisions[0]["channels"][set];
        assert_eq!(apart.as_array().map(Vec::len), Some(3), "{decisions}");
        let table = place.run("inspect mlp.qplan").stdout;
        assert!(table.contains(if policy == "split" { "high " } else { "points " }), "{table}");
    }
    let foreign = place.try_run("@/mnist_cnn.onnx --scores scores.json");
    assert_eq!(foreign.code, 2, "{foreign:?}");
}

#[test]
fn inspects_and_measures() {
    let place = Place::new();
    place
        .run(&format!("{MLP} --precision f32 --stop-after quantize").replace("mlp.qplan", "m.qir"));
    place.run(&format!("{MLP} --precision f32"));
    place.run(&format!("train mlp.qplan --data {DIGITS} --checkpoint run -q"));
    for (file, kind) in [
        ("@/digits_mlp.onnx", "model"),
        ("m.qir", "graph"),
        ("mlp.qplan", "plan"),
        ("run", "checkpoint"),
    ] {
        let document = place.run(&format!("inspect {file} --json --nodes")).json();
        assert_eq!(document["kind"], kind);
        assert_eq!(document["parameters"], 4810);
        assert_eq!(document["inputs"][0]["name"], "x");
        assert!(!document["nodes"].as_array().unwrap().is_empty());
        let text = place.run(&format!("inspect {file}")).stdout;
        assert!(text.contains("4.81 k in 4 tensors"), "{text}");
    }
    let bench = place.run("bench mlp.qplan --duration 0.05 --json --against mlp.qplan").json();
    for name in [
        "forward_ms",
        "backward_ms",
        "reduce_ms",
        "update_ms",
        "gflops",
        "peak_bytes",
        "threads",
        "against",
        "ratio",
    ] {
        assert!(!bench[name].is_null(), "{name}: {bench}");
    }
    assert_eq!(keys(&bench["step_ms"]), ["median", "p10", "p90"]);
    assert!(place.run("bench mlp.qplan --duration 0.05").stdout.contains("step, median"));
}

#[test]
fn the_doctor_finds_this_machine_sound() {
    let place = Place::new();
    let document = place.run("doctor --json").json();
    let tests = document["self_test"].as_array().unwrap();
    assert!(tests.len() >= 2 && tests.iter().all(|test| test["ok"] == true), "{document}");
    let speeds = document["speeds"].as_array().unwrap();
    // Four kernels in three precisions, and every one of them runs in each.
    assert_eq!(speeds.len(), 12);
    assert!(speeds.iter().all(|speed| speed["gflops"].as_f64() > Some(0.0)), "{document}");
    let said = place.run("doctor").stdout;
    assert!(said.contains("self-test") && said.contains("GFLOP/s"), "{said}");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let place = Place::new();
    let mut child = Command::new(env!("CARGO_BIN_EXE_qcompile"))
        .args(["doctor", "--json"])
        .env("XDG_CACHE_HOME", place.path("cache"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success(), "{done:?}");
    assert_eq!(done.stderr, b"");
}
