//! Values made again for the backward pass: every bit is as without, memory falls, and the command keeps its limit.

use crate::command::{DIGITS, Place};
use crate::support::{Random, inputs};
use crate::training::{Recipe, forward, losses, plan, trainer};
use qcompile_ir::{Graph, Tensor};
use qcompile_passes::quantize::PrecisionChoice;
use qcompile_passes::rematerialise::{self, Rematerialised, Saved};
use qcompile_plan::{BuildOptions, Plan, build};
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;

const BATCH: usize = 8;

/// The plan without, the graph with the values made again that the order has whose pieces are at most a part of all that
/// is saved.
pub(crate) fn made_again(
    plan: &Plan,
    batch: usize,
    part: Option<usize>,
) -> (Graph, Rematerialised) {
    let saved: Vec<Saved> = plan
        .saved()
        .iter()
        .map(|&(value, bytes)| Saved { value, bytes: bytes.at(batch) })
        .collect();
    let most = part.map_or(usize::MAX, |part| plan.saved_bytes(batch) / part);
    let order = rematerialise::order(plan.graph(), &saved, most, batch);
    let mut graph = plan.graph().clone();
    let saved = saved.iter().map(|one| one.value).collect();
    let made = rematerialise::run(&mut graph, &saved, &order.into_iter().collect(), batch)
        .expect("copies fit");
    qcompile_ir::verify(&graph).unwrap_or_else(|errors| panic!("{errors}"));
    (graph, made)
}

#[test]
fn training_is_the_same_to_the_bit() {
    let models = [
        "digits_mlp.onnx",
        "digits_cnn.onnx",
        "resnet8.onnx",
        "tiny_mobilenet.onnx",
        "tiny_gpt.onnx",
        "tiny_bert.onnx",
        "tiny_rnn.onnx",
        "../tests/dropout.onnx",
    ];
    let precisions = [PrecisionChoice::F32, PrecisionChoice::Bf16, PrecisionChoice::MixedBf16];
    for (model, precision) in models.into_iter().flat_map(|m| precisions.map(|p| (m, p))) {
        let plain = plan(model, &Recipe { precision, ..Recipe::default() });
        let batches: Vec<BTreeMap<String, Tensor>> = [BATCH, BATCH, 3, BATCH, 1]
            .iter()
            .zip(1..)
            .map(|(&size, seed)| inputs(&forward(model), size, 4, &mut Random::new(seed)))
            .collect();
        let mut wanted = trainer(&plain, 1, 1);
        let losses_wanted = losses(&mut wanted, &batches);
        for part in [None, Some(4)] {
            let (graph, made) = made_again(&plain, BATCH, part);
            assert!(
                made.values > 0 || part.is_some(),
                "{model} {precision:?}: nothing is made again"
            );
            let plan = build(graph, &BuildOptions { batch_size: BATCH }).expect("builds");
            let plan = Arc::new(plan);
            for (workers, threads) in [(1, 1), (1, 3)] {
                let mut got = trainer(&plan, workers, threads);
                let what = format!("{model} {precision:?}, {part:?}, {threads} threads");
                assert_eq!(losses(&mut got, &batches), losses_wanted, "{what}");
                assert_eq!(got.parameters(), wanted.parameters(), "{what}");
                assert_eq!(got.states(), wanted.states(), "{what}");
            }
        }
    }
}

#[test]
fn memory_falls() {
    let batch = 64;
    for (model, most) in [("tiny_gpt.onnx", 0.75), ("resnet8.onnx", 0.9), ("tiny_bert.onnx", 0.8)] {
        let plain = plan(model, &Recipe::default());
        let options = BuildOptions { batch_size: batch };
        let plain = build(plain.graph().clone(), &options).expect("builds");
        let bytes = [2, 4, 8].map(|part| {
            let (graph, made) = made_again(&plain, batch, Some(part));
            assert!(made.added < 0.34, "{model}: more than the forward pass is added: {made:?}");
            build(graph, &options).expect("builds").bytes(batch)
        });
        let least = bytes.into_iter().min().expect("three") as f64;
        let part = least / plain.bytes(batch) as f64;
        assert!(part < most, "{model}: {part}");
    }
}

const CNN: &str =
    "@/digits_cnn.onnx -q --loss cross-entropy --precision f32 --no-measure --batch-size 512";

fn bytes(document: &Value) -> u64 {
    document["peak_bytes"].as_u64().expect("bytes")
}

#[test]
fn a_limit_that_is_kept_anyway_changes_nothing() {
    let place = Place::new();
    let document = place.run(&format!("{CNN} -o plain.qplan --json")).json();
    assert_eq!(document["rematerialised"], Value::Null);
    let limit = bytes(&document);
    place.run(&format!("{CNN} -o limited.qplan --memory-limit {limit}"));
    assert!(place.bytes("plain.qplan") == place.bytes("limited.qplan"));
}

#[test]
fn a_limit_is_kept_and_training_is_the_same() {
    let place = Place::new();
    let plain = bytes(&place.run(&format!("{CNN} -o plain.qplan --json")).json());
    let limit = plain / 100 * 97;
    let line = format!("{CNN} -o less.qplan --memory-limit {limit}");
    let document = place.run(&format!("{line} --json")).json();
    assert!(bytes(&document) <= limit, "{document}");
    let again = &document["rematerialised"];
    assert!(again["values"].as_u64() > Some(0) && again["added_operations"].as_f64() > Some(0.0));
    assert_eq!(again["bytes_before"].as_u64(), Some(plain));
    assert_eq!(again["bytes_after"].as_u64(), Some(bytes(&document)));
    let first = place.bytes("less.qplan");
    assert!(place.run(&line).stdout.contains("values made again"));
    assert!(place.bytes("less.qplan") == first);
    let inspected = place.run("inspect less.qplan --json").json();
    assert_eq!(inspected["memory_limit"], limit.to_string());
    assert_eq!(&inspected["rematerialised"], again);
    assert_eq!(inspected["memory"], document["peak_bytes"]);
    let trained = ["plain", "less"].map(|plan| {
        let line = format!(
            "train {plan}.qplan --data {DIGITS} --epochs 2 --batch-size 512 --lr 0.05 --seed 3 --log-every 1 --json"
        );
        let lines = place.run(&line).lines();
        lines.iter().filter_map(|line| line["loss"].as_f64()).collect::<Vec<f64>>()
    });
    assert!(trained[0].len() > 5, "{trained:?}");
    assert_eq!(trained[0], trained[1]);
    let refused = place.try_run(&format!(
        "train less.qplan --data {DIGITS} --epochs 1 --batch-size 512 --lr 0.05 --memory-limit 1GB"
    ));
    assert!(refused.stderr.contains("--memory-limit: decided when"), "{refused:?}");
}

#[test]
fn a_limit_that_cannot_be_kept_is_an_error_with_the_least() {
    let place = Place::new();
    for precision in ["f32", "auto"] {
        let line = format!("{CNN} --memory-limit 10kB").replace("f32", precision);
        let outcome = place.try_run(&line);
        assert_eq!(outcome.code, 5, "{outcome:?}");
        for word in ["QC0804", "at least", "is 10.0 kB", "--batch-size", "--compress"] {
            assert!(outcome.stderr.contains(word), "{word}: {outcome:?}");
        }
    }
    let wrong = place.try_run(&format!("{CNN} --memory-limit 10potatoes"));
    assert_eq!(wrong.code, 2, "{wrong:?}");
}

#[test]
fn a_measurement_says_what_the_system_counts() {
    let place = Place::new();
    place.run(&format!("{CNN} -o plain.qplan"));
    let document = place.run("bench plain.qplan --duration 0.01 --json").json();
    let predicted = place.run("inspect plain.qplan --json").json();
    assert_eq!(document["peak_bytes"], predicted["memory"]);
    let resident = document["resident_bytes"].as_f64();
    if cfg!(target_os = "linux") {
        let part = resident.expect("is counted") / bytes(&document) as f64;
        assert!((0.5..4.0).contains(&part), "{document}");
    }
}
