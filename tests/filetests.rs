//! What each pass makes of the graphs in `tests/filetests/<pass>/`, as snapshots.
//!
//! `verify` and `gradients` have folders, too, but expect something else than a text: `verify` an error on the line
//! that says so, `gradients` agreement with central differences. Their tests stand with the verifier and with
//! differentiation; here it is checked that every op has its files.

use crate::support::{cases, parse, root, snapshot};
use qcompile_ir::{BinaryOp, GradientRounding, Granularity, Graph, ReduceOp, Scaling, UnaryOp};
use qcompile_passes::{PassError, attention, differentiate, quantize, simplify};
use std::collections::BTreeSet;

/// One snapshot for each file of the kind: `snapshots/<kind>/<case>.snap`.
fn check(kind: &str, show: impl Fn(qcompile_ir::Graph) -> String) {
    for path in cases(kind) {
        let name = path.file_stem().expect("a file").to_string_lossy().into_owned();
        snapshot(kind, &name, &show(parse(&path)));
    }
}

fn shown(result: Result<qcompile_ir::Graph, PassError>) -> String {
    match result {
        Ok(graph) => {
            qcompile_ir::verify(&graph).expect("a pass leaves a graph that verifies");
            graph.to_string()
        }
        Err(error) => format!("error: {error}\n"),
    }
}

#[test]
fn plan() {
    check("plan", |graph| planned(graph).expect("has a plan"));
}

/// Graphs that are valid and have no plan: what is said of them.
#[test]
fn plan_refused() {
    check("plan-refused", |graph| planned(graph).expect_err("has no plan") + "\n");
}

fn planned(graph: Graph) -> Result<String, String> {
    let options = qcompile_plan::BuildOptions { batch_size: 4 };
    let plan = qcompile_plan::build(graph, &options);
    plan.map(|plan| plan.to_string()).map_err(|error| error.to_string())
}

#[test]
fn quantize() {
    check("quantize", |mut graph| shown(quantize::optimise(&mut graph).map(|_| graph)));
}

/// Layers whose notes name channels.
#[test]
fn channels() {
    check("channels", |mut graph| shown(quantize::insert(&mut graph).map(|()| graph)));
}

/// The step in bf16, forward and backward.
#[test]
fn bf16() {
    check("bf16", |mut graph| {
        let precision = quantize::PrecisionChoice::Bf16;
        let options = quantize::Options { precision, ..Default::default() };
        let step = |graph: &mut qcompile_ir::Graph| {
            quantize::run(graph, &options)?;
            differentiate::run(graph)?;
            quantize::insert_backward(graph)
        };
        shown(step(&mut graph).map(|_| graph))
    });
}

/// The step as the first line of the file asks for it: `; KEY=VALUE ...`.
#[test]
fn int8() {
    for path in cases("int8") {
        let name = path.file_stem().expect("a file").to_string_lossy().into_owned();
        let options = options(&std::fs::read_to_string(&path).expect("readable"));
        let mut graph = parse(&path);
        let step = |graph: &mut qcompile_ir::Graph| {
            quantize::run(graph, &options)?;
            differentiate::run(graph)?;
            quantize::insert_backward(graph)?;
            quantize::optimise(graph)
        };
        snapshot("int8", &name, &shown(step(&mut graph).map(|_| graph)));
    }
}

fn one_of<T: Copy>(word: &str, all: &[T], name: fn(T) -> &'static str) -> T {
    *all.iter().find(|one| name(**one) == word).expect("a word")
}

fn options(source: &str) -> quantize::Options {
    let mut options = quantize::Options::default();
    let words = source.lines().next().and_then(|line| line.strip_prefix("; ")).expect("options");
    for word in words.split(' ') {
        let (key, value) = word.split_once('=').expect("KEY=VALUE");
        match key {
            "precision" => options.precision = value.parse().expect("a choice"),
            "quantize-ops" => options.operations = value.parse().expect("operations"),
            "threshold" => options.threshold = Some(value.parse().expect("a number")),
            "operand-types" => options.numerics.types = value.parse().expect("types"),
            "granularity" => {
                options.numerics.granularity = one_of(value, &Granularity::ALL, Granularity::name)
            }
            "rounding" => {
                options.numerics.rounding =
                    one_of(value, &GradientRounding::ALL, GradientRounding::name)
            }
            "scaling" => options.numerics.scaling = one_of(value, &Scaling::ALL, Scaling::name),
            "grad-weight" => options.numerics.grad_weight = Some(value.parse().expect("a type")),
            _ => panic!("there is no option {key}"),
        }
    }
    options
}

#[test]
fn simplify() {
    check("simplify", |mut graph| {
        let options = simplify::Options { keep_stop_gradient: true };
        shown(simplify::run(&mut graph, &options).map(|()| graph))
    });
}

#[test]
fn attention() {
    check("attention", |mut graph| shown(attention::run(&mut graph).map(|()| graph)));
}

#[test]
fn evaluation() {
    check("evaluation", |mut graph| {
        shown(qcompile_passes::evaluation::run(&mut graph).map(|_| graph))
    });
}

/// The step, with all that may be made again.
#[test]
fn rematerialise() {
    check("rematerialise", |mut graph| {
        differentiate::run(&mut graph).expect("differentiable");
        let plan = qcompile_plan::build(graph, &qcompile_plan::BuildOptions { batch_size: 4 });
        crate::rematerialise::made_again(&plan.expect("builds"), 4, None).0.to_string()
    });
}

/// Every mnemonic that stands in a file of `tests/filetests/<kind>/`.
fn mnemonics(kind: &str) -> BTreeSet<&'static str> {
    let mut found = BTreeSet::new();
    for path in cases(kind) {
        let graph = parse(&path);
        found.extend(graph.ids().map(|id| graph.op(id).name()));
    }
    found
}

#[test]
fn every_op_with_a_gradient_has_a_file() {
    let mut wanted: BTreeSet<&str> = [
        "cast",
        "select",
        "matmul",
        "conv2d",
        "max_pool2d",
        "average_pool2d",
        "reshape",
        "transpose",
        "broadcast",
        "slice",
        "pad",
        "concat",
        "gather",
        "scatter_add",
        "scatter_mul",
        "scatter_max",
        "attention",
        "softmax",
        "log_softmax",
        "cross_entropy",
    ]
    .into();
    let flat = ["floor", "ceil", "round", "sign", "not", "stop_gradient", "and", "or"];
    wanted.extend(UnaryOp::ALL.iter().map(|op| op.name()).filter(|name| !flat.contains(name)));
    wanted.extend(BinaryOp::ALL.iter().map(|op| op.name()).filter(|name| !flat.contains(name)));
    wanted.extend(ReduceOp::ALL.iter().map(|op| op.name()));
    let tested = mnemonics("gradients");
    let untested: Vec<_> = wanted.difference(&tested).collect();
    assert!(untested.is_empty(), "no file in tests/filetests/gradients has {untested:?}");
}

#[test]
fn every_file_says_its_idea_in_its_first_line() {
    for kind in [
        "attention",
        "channels",
        "evaluation",
        "gradients",
        "plan",
        "plan-refused",
        "quantize",
        "rematerialise",
        "simplify",
        "verify",
    ] {
        for path in cases(kind) {
            let text = std::fs::read_to_string(&path).expect("readable");
            assert!(text.starts_with("; "), "{} does not say what it is about", path.display());
        }
    }
}

#[test]
fn no_snapshot_is_left_over() {
    for kind in
        ["attention", "channels", "evaluation", "plan", "plan-refused", "quantize", "simplify"]
    {
        let names: BTreeSet<_> =
            cases(kind).iter().map(|path| path.file_stem().map(|stem| stem.to_owned())).collect();
        for entry in std::fs::read_dir(root().join("snapshots").join(kind)).expect("snapshots") {
            let path = entry.expect("readable").path();
            let stem = path.file_stem().map(|stem| stem.to_owned());
            assert!(names.contains(&stem), "{} belongs to no file", path.display());
        }
    }
}
