use super::{Gradients, run};
use crate::PassError;
use qcompile_ir::eval::{EvalOptions, Rounding, central_differences, eval};
use qcompile_ir::{DType, Graph, NodeId, Op, Tensor, text};
use std::collections::BTreeMap;
use std::path::Path;

const BATCH: usize = 3;

pub(crate) fn parse(source: &str) -> Graph {
    text::parse(source, &|_| None).unwrap_or_else(|errors| panic!("{errors}\n{source}"))
}

/// Values for every input: floats of both signs, integers 0, 1, 2, ...
pub(crate) fn inputs(graph: &Graph, batch: usize) -> BTreeMap<String, Tensor> {
    let value = |id: NodeId| {
        let ty = graph.ty(id);
        let sizes = ty.shape.sizes(batch);
        let salt = graph.node(id).name.as_str().len();
        let values: Vec<f64> = (0..sizes.iter().product())
            .map(|index: usize| match ty.dtype {
                DType::I64 => (index % 3) as f64,
                _ => ((index * 37 + salt * 11) % 101) as f64 / 50.0 - 1.0,
            })
            .collect();
        Tensor::from_f64(ty.dtype, &sizes, &values).expect("sizes fit")
    };
    graph
        .leaves(|op| matches!(op, Op::Input(_)))
        .into_iter()
        .map(|id| (graph.node(id).name.as_str().to_owned(), value(id)))
        .collect()
}

/// Largest difference between built gradients and central differences, relative to the largest gradient.
fn worst_difference(graph: &mut Graph) -> f64 {
    let inputs = inputs(graph, BATCH);
    let forward = graph.clone();
    let gradients: Gradients = run(graph).expect("differentiable");
    let options = EvalOptions { rounding: Rounding::Exact, ..EvalOptions::default() };
    let values = eval(graph, &inputs, BATCH, &options).expect("evaluates");
    let mut worst = 0.0_f64;
    for (param, gradient) in gradients.by_param {
        let loss = forward.node(forward.outputs()[0].1).name.as_str();
        let leaf = forward.node(param).name.as_str();
        let expected =
            central_differences(&forward, &inputs, BATCH, loss, leaf).expect("evaluates");
        let gradient = graph.node(gradient).name.as_str();
        let got = values.get_f64(gradient).expect("evaluated");
        assert_eq!(got.len(), expected.len(), "{leaf}");
        let scale = expected.iter().fold(1e-3_f64, |scale, value| scale.max(value.abs()));
        for (got, expected) in got.iter().zip(&expected) {
            worst = worst.max((got - expected).abs() / scale);
        }
    }
    worst
}

#[test]
fn every_gradient_agrees_with_central_differences() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/filetests/gradients");
    let mut paths: Vec<_> = std::fs::read_dir(folder)
        .expect("the folder is part of the repository")
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "qir"))
        .collect();
    paths.sort();
    assert!(paths.len() > 40, "{} files", paths.len());
    for path in paths {
        let source = std::fs::read_to_string(&path).expect("readable");
        let worst = worst_difference(&mut parse(&source));
        assert!(worst < 1e-6, "{}: relative difference {worst:e}", path.display());
    }
}

fn differentiated(leaves: &str, body: &str) -> Result<String, PassError> {
    let mut graph = parse(&format!("graph @g {{\n{leaves}\nforward:\n{body}\n return %loss\n}}\n"));
    run(&mut graph)?;
    graph.sweep();
    Ok(graph.to_string())
}

#[test]
fn rounding_is_passed_straight_through() {
    let text = differentiated(
        "param %w : f32[3] = [0.1, 2, -0.3]\n const %s : f32[] = 0.01",
        "%q : i8[3] = quantize %w, %s i8\n %d : f32[3] = dequantize %q, %s
         %t : f32[1] = reduce_sum %d axes=[0]\n %loss : f32[] = reshape %t",
    )
    .expect("differentiable");
    assert!(text.contains("%w.grad : f32[3] = straight_through %w, %d.grad, %s i8"), "{text}");
}

#[test]
fn products_carry_the_note_of_their_layer() {
    let text = differentiated(
        "param %a : f32[2, 2] = splat 0.5\n param %b : f32[2, 2] = splat 0.5",
        "%y : f32[2, 2] = matmul %a, %b !origin(\"MatMul_0\") !precision(i8)
         %t : f32[1, 1] = reduce_sum %y axes=[0, 1]\n %loss : f32[] = reshape %t",
    )
    .expect("differentiable");
    let line = text.lines().find(|line| line.contains("%a.grad :")).expect("a gradient");
    assert!(line.contains("!origin(\"MatMul_0\")") && line.contains("!precision(i8)"), "{line}");
}

#[test]
fn what_has_no_gradient_is_named() {
    let sum = "%t : f32[1] = reduce_sum %y axes=[0]\n %loss : f32[] = reshape %t";
    let one = "param %w : f32[3] = splat 1\n const %s : f32[] = 1\n const %r : f32[] = 2";
    let mismatched = "%q : i8[3] = quantize %w, %s i8\n %y : f32[3] = dequantize %q, %r\n";
    let error = differentiated(one, &format!("{mismatched}{sum}")).expect_err("two scales");
    assert!(matches!(&error, PassError::NotDifferentiable { value, .. } if value.as_str() == "y"));
    let stopped = "%y : f32[3] = stop_gradient %w\n";
    let error = differentiated(one, &format!("{stopped}{sum}")).expect_err("nothing to train");
    assert!(matches!(error, PassError::NothingToTrain { .. }), "{error}");
}

#[test]
fn parameters_that_do_not_matter_are_reported() {
    let mut graph = parse(
        "graph @g {\nparam %w : f32[] = 2\nparam %u : f32[] = 2\nforward:\n
         %loss : f32[] = mul %w, %w\nreturn %loss\n}\n",
    );
    let gradients = run(&mut graph).expect("differentiable");
    assert_eq!(gradients.by_param.len(), 1);
    assert_eq!(gradients.independent[0].as_str(), "u");
}
