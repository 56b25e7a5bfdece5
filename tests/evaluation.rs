//! The evaluation form against what it must equal: the model imported with its running statistics.

use crate::support::{Random, inputs, root};
use qcompile_ir::eval::{EvalOptions, Rounding, eval};
use qcompile_ir::{Graph, Op, Tensor};
use qcompile_onnx::{BatchNorm, ImportOptions, import};
use qcompile_passes::{
    attach_loss, differentiate, distribute, evaluation, quantize, simplify, update,
};
use std::collections::BTreeMap;

const BATCH: usize = 2;

fn resnet8(batch_norm: BatchNorm) -> Graph {
    let bytes = std::fs::read(root().join("models/resnet8.onnx")).expect("committed");
    let options = ImportOptions { batch_norm, ..ImportOptions::default() };
    import(&bytes, &options).expect("imports").graph
}

/// Outputs in f64 by name.
fn outputs(graph: &Graph, given: &BTreeMap<String, Tensor>) -> BTreeMap<String, Vec<f64>> {
    let targets =
        graph.outputs().iter().map(|(_, id)| graph.node(*id).name.as_str().to_owned()).collect();
    let options = EvalOptions { rounding: Rounding::Exact, targets, ..EvalOptions::default() };
    let values = eval(graph, given, BATCH, &options).expect("evaluates");
    let output = |(name, _): &(String, _)| (name.clone(), values.get_f64(name).expect("wanted"));
    graph.outputs().iter().map(output).collect()
}

fn check_equal(a: &BTreeMap<String, Vec<f64>>, b: &BTreeMap<String, Vec<f64>>) {
    for (name, a) in a {
        for (a, b) in a.iter().zip(&b[name]) {
            assert!((a - b).abs() <= 1e-9 * b.abs().max(1.0), "{name}: {a} and {b}");
        }
    }
}

#[test]
fn batch_normalization_evaluates_as_if_frozen() {
    let frozen = resnet8(BatchNorm::Frozen);
    let given = inputs(&frozen, BATCH, 10, &mut Random::new(1));
    let expected = outputs(&frozen, &given);
    let mut trained = resnet8(BatchNorm::Train);
    assert!(evaluation::run(&mut trained).expect("has an evaluation form"));
    qcompile_ir::verify(&trained).expect("valid");
    assert!(trained.next().is_empty());
    check_equal(&outputs(&trained, &given), &expected);
    let mut twice = frozen.clone();
    assert!(!evaluation::run(&mut twice).expect("evaluates as it is"));
    check_equal(&outputs(&twice, &given), &expected);
}

/// The form is found again in the whole training graph, after every pass has had its way with it.
#[test]
fn a_training_graph_evaluates_as_if_frozen() {
    let frozen = resnet8(BatchNorm::Frozen);
    let given = inputs(&frozen, BATCH, 10, &mut Random::new(2));
    let expected = outputs(&frozen, &given);
    for synchronize in [false, true] {
        let mut graph = resnet8(BatchNorm::Train);
        simplify::run(&mut graph, &simplify::Options { keep_stop_gradient: true })
            .expect("simplifies");
        let kind = attach_loss::LossKind::CrossEntropy;
        attach_loss::run(&mut graph, &attach_loss::Options { kind }).expect("attaches");
        quantize::run(
            &mut graph,
            &quantize::Options {
                precision: quantize::PrecisionChoice::F32,
                ..quantize::Options::default()
            },
        )
        .expect("decides");
        if synchronize {
            let count = distribute::synchronize_statistics(&mut graph).expect("synchronizes");
            assert!(count > 0);
        }
        differentiate::run(&mut graph).expect("differentiates");
        distribute::run(&mut graph).expect("distributes");
        let optimizer = update::Optimizer::Momentum { nesterov: false };
        update::run(&mut graph, &update::Options { optimizer }).expect("updates");
        simplify::run(&mut graph, &simplify::Options::default()).expect("simplifies");
        assert!(evaluation::run(&mut graph).expect("has an evaluation form"));
        qcompile_ir::verify(&graph).expect("valid");
        let left = graph.leaves(|op| matches!(op, Op::Input(_)));
        let left: Vec<_> = left.iter().map(|&id| graph.node(id).name.as_str()).collect();
        assert_eq!(left, ["x", "label"]);
        let mut given = given.clone();
        given.insert("label".to_owned(), Tensor::from_i64(&[BATCH], &[3, 7]).expect("two"));
        let found = outputs(&graph, &given);
        let names: Vec<_> = expected.keys().cloned().collect();
        check_equal(
            &found.into_iter().filter(|(name, _)| names.contains(name)).collect(),
            &expected,
        );
    }
}
