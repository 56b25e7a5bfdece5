use super::{Compressed, Format, Rule, run};
use crate::differentiate::tests::{inputs, parse};
use qcompile_ir::eval::{EvalOptions, eval};
use qcompile_ir::{DType, Region, verify};
use std::collections::BTreeMap;

/// A value that the backward region reads, by itself and compared with zero.
const SOURCE: &str = "graph @g {
  input %x : f32[N, 96]
  const %zero : f32[] = 0
forward:
  %t : f32[N, 96] = tanh %x
backward:
  %read : f32[N, 96] = neg %t
  %zeros : f32[N, 96] = broadcast %zero
  %positive : bool[N, 96] = less %zeros, %t
  %masked : f32[N, 96] = select %positive, %x, %zeros
  return %t, %read as \"read\", %masked as \"masked\"
}
";

/// The values `t`, `read` and `masked` in this step.
fn evaluated(graph: &qcompile_ir::Graph, step: usize) -> [Vec<f64>; 3] {
    let counter = graph.find("rounding.step").is_some();
    let leaves = counter.then(|| ("rounding.step".to_owned(), vec![step as f64]));
    let options = EvalOptions {
        leaves: leaves.into_iter().collect::<BTreeMap<_, _>>(),
        ..EvalOptions::default()
    };
    let values = eval(graph, &inputs(graph, 4), 4, &options).expect("evaluates");
    ["t", "read", "masked"].map(|name| values.get_f64(name).expect("an output"))
}

#[test]
fn what_is_restored_is_near_and_right_on_average() {
    // Also a graph whose forward value is returned keeps it as it is, so `t` is read through another value.
    let source =
        SOURCE.replace("return %t,", "%copy : f32[N, 96] = neg %read\n  return %copy as \"t\",");
    let exact = evaluated(&parse(&source), 0);
    for (format, levels) in
        [(Format::Bf16, 256.0), (Format::F16, 2048.0), (Format::Int8, 255.0), (Format::Int4, 15.0)]
    {
        let mut graph = parse(&source);
        let saved = run(&mut graph, &[Rule { format, pattern: None }]).expect("compresses");
        verify(&graph).expect("valid");
        let compressed = Compressed { name: "t".to_owned(), asked: format, format };
        assert_eq!(saved.compressed, [compressed]);
        // A block of 96; smallest value and step in f32; and a bit for each comparison.
        let expected = match format {
            Format::Bf16 | Format::F16 => 2 * 96,
            Format::Int8 => 96 + 8,
            Format::Int4 => 48 + 8,
        };
        assert_eq!(saved.bytes_per_sample, expected + 96 / 8, "{format:?}");
        let steps = 256;
        let mut sum = vec![0.0; exact[1].len()];
        for step in 0..steps {
            let [_, read, masked] = evaluated(&graph, step);
            assert_eq!(masked, exact[2], "comparisons are exact");
            for (sum, (read, exact)) in sum.iter_mut().zip(read.iter().zip(&exact[1])) {
                *sum += (read - exact) / steps as f64;
                // The range of a tangent is at most 2.
                assert!(
                    (read - exact).abs() <= 2.001 / levels,
                    "{format:?}: {read} is not {exact}"
                );
            }
        }
        // Rounding at random has a deviation of at most half a step.
        let limit =
            if format.float().is_some() { 2.0_f64.powi(-8) } else { 1.0 / levels / 16.0 * 5.0 };
        let worst = sum.iter().fold(0.0_f64, |worst, error| worst.max(error.abs()));
        assert!(worst <= limit, "{format:?}: {worst} on average");
    }
}

#[test]
fn what_is_returned_is_saved_anyway() {
    let mut graph = parse(SOURCE);
    let saved = run(&mut graph, &[Rule { format: Format::Int8, pattern: None }]).expect("runs");
    assert!(saved.compressed.is_empty(), "{saved:?}");
    let read = graph.find("read").expect("a node");
    let t = graph.find("t").expect("a node");
    assert_eq!((graph.operand(read, 0), graph.node(t).region), (t, Region::Forward));
    assert_eq!(graph.ty(t).dtype, DType::F32);
}

#[test]
fn rules_have_a_text() {
    for text in ["saved=int8", "saved=f16", "saved=int4:conv*", "saved=bf16:a:b"] {
        assert_eq!(text.parse::<Rule>().map(|rule| rule.to_string()), Ok(text.to_owned()));
    }
    for wrong in ["saved", "saved=", "saved=int8:", "saved=f64", "mean=int8", ""] {
        assert!(wrong.parse::<Rule>().is_err(), "{wrong}");
    }
}
