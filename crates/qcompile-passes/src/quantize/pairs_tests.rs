//! Pairs that a model has: joined without a change of a bit, differentiated, their scales learned.

use super::join_pairs;
use crate::differentiate;
use qcompile_ir::eval::{EvalOptions, eval};
use qcompile_ir::text::parse;
use qcompile_ir::{Graph, Op, Tensor};
use std::collections::BTreeMap;

fn graph(source: &str) -> Graph {
    parse(source, &|_| None).unwrap_or_else(|errors| panic!("{errors}\n{source}"))
}

fn outputs(graph: &Graph) -> Vec<(String, Tensor)> {
    eval(graph, &BTreeMap::new(), 2, &EvalOptions::default()).expect("evaluates").outputs()
}

/// A loss of what is made of codes by `moves`, from `%q` to `%r : u8[N, 12]`.
fn moved(parameters: &str, moves: &str) -> Graph {
    graph(&format!(
        "graph @moved {{
  param %w : f32[2, 2, 2, 3] = uniform seed=3 scale=4
  const %s : f32[] = 0.02
  const %z : u8[] = 100
  const %low : u8[] = 90
  const %edge : u8[] = 100
forward:
  %q : u8[2, 2, 2, 3] = quantize %w, {parameters} u8
  {moves}
  %y : f32[2, 12] = dequantize %r, {parameters}
  %square : f32[2, 12] = mul %y, %y
  %sum : f32[1, 1] = reduce_sum %square axes=[0, 1]
  %loss : f32[] = reshape %sum
  return %loss, %y
}}
"
    ))
}

#[test]
fn codes_are_dequantized_where_they_are_made_and_no_bit_changes() {
    for moves in [
        "%r : u8[2, 12] = reshape %q",
        "%t : u8[2, 3, 2, 2] = transpose %q permutation=[0, 3, 1, 2]\n%r : u8[2, 12] = reshape %t",
        "%a : u8[2, 2, 2, 1] = slice %q axis=3 start=0 end=1 step=1\n%b : u8[2, 2, 2, 2] = slice %q axis=3 start=1 end=3 step=1\n%j : u8[2, 2, 2, 3] = concat %b, %a axis=3\n%r : u8[2, 12] = reshape %j",
        "%l : u8[2, 2, 2, 3] = broadcast %low\n%m : u8[2, 2, 2, 3] = max %q, %l\n%r : u8[2, 12] = reshape %m",
        "%c : f32[2, 2, 2, 3] = cast %q\n%p : f32[2, 1, 1, 3] = max_pool2d %c input=[2, 2] kernel=[2, 2] strides=[2, 2]\n%d : u8[2, 1, 1, 3] = cast %p\n%e : u8[2, 2, 2, 3] = broadcast %d\n%r : u8[2, 12] = reshape %e",
    ] {
        for parameters in ["%s, %z", "%s"] {
            let before = moved(parameters, moves);
            let mut after = before.clone();
            assert_eq!(join_pairs(&mut after).expect("joins"), 1, "{moves}");
            let plain = after.order().into_iter().all(|id| match after.op(id) {
                Op::Dequantize { .. } => {
                    let codes = after.operand(id, 0);
                    !matches!(after.op(codes), Op::Reshape(_) | Op::Concat { .. } | Op::Cast(_))
                }
                _ => true,
            });
            assert!(plain, "{after}");
            assert_eq!(outputs(&before), outputs(&after), "{moves}");
            differentiate::run(&mut after).expect("has a gradient");
            let gradient = outputs(&after).into_iter().find(|(name, _)| name == "w.grad");
            let (_, gradient) = gradient.expect("of the parameter");
            assert!(gradient.to_f64().iter().any(|&value| value != 0.0), "{moves}");
        }
    }
}

#[test]
fn codes_that_change_on_the_way_stay_where_they_are() {
    for moves in [
        // Another type wraps.
        "%a : i8[2, 2, 2, 3] = cast %q\n%b : u8[2, 2, 2, 3] = cast %a\n%r : u8[2, 12] = reshape %b",
        "%c : f32[2, 2, 2, 3] = cast %q\n%a : i8[2, 2, 2, 3] = cast %c\n%b : u8[2, 2, 2, 3] = cast %a\n%r : u8[2, 12] = reshape %b",
        // A window of padding alone.
        "%c : f32[2, 2, 2, 3] = cast %q\n%p : f32[2, 2, 2, 3] = max_pool2d %c input=[2, 2] kernel=[1, 1] strides=[2, 2] pads=[1, 1, 1, 1]\n%d : u8[2, 2, 2, 3] = cast %p\n%r : u8[2, 12] = reshape %d",
    ] {
        let before = moved("%s, %z", moves);
        let mut after = before.clone();
        join_pairs(&mut after).expect("joins");
        assert_eq!(outputs(&before), outputs(&after), "{moves}");
    }
}

#[test]
fn a_pair_of_other_parameters_is_told_by_name() {
    let mut other = graph(
        "graph @other {
  param %w : f32[4] = uniform seed=3
  const %s : f32[] = 0.02
  const %t : f32[] = 0.03
forward:
  %q : i8[4] = quantize %w, %s i8
  %y : f32[4] = dequantize %q, %t
  %sum : f32[1] = reduce_sum %y axes=[0]
  %loss : f32[] = reshape %sum
  return %loss
}
",
    );
    let error = differentiate::run(&mut other).expect_err("has no gradient").to_string();
    for word in ["y", "q is quantized by scale 0.02", "dequantized by scale 0.03"] {
        assert!(error.contains(word), "no {word} in: {error}");
    }
}

#[test]
fn a_step_size_is_learned_as_the_paper_has_it() {
    let source = "graph @lsq {
  param %w : f32[2, 3] = [[0.26, -0.61, 9], [0.14, 0.32, -5]]
  param %s : f32[2] = [0.1, 0.2]
forward:
  %q : i4[2, 3] = quantize %w, %s i4 axis=0
  %y : f32[2, 3] = dequantize %q, %s axis=0
  %sum : f32[1, 1] = reduce_sum %y axes=[0, 1]
  %loss : f32[] = reshape %sum
  return %loss
}
";
    let mut graph = graph(source);
    differentiate::run(&mut graph).expect("differentiates");
    let values = outputs(&graph);
    let found = |wanted: &str| {
        let (_, tensor) = values.iter().find(|(name, _)| name == wanted).expect("is there");
        tensor.to_f64()
    };
    assert_eq!(found("w.grad"), [1.0, 1.0, 0.0, 1.0, 1.0, 0.0]);
    // Within the range the rounding error in steps, beyond it the code; over the root of 3 elements times 7.
    let scaled = |sum: f64| sum / 21.0_f64.sqrt();
    let wanted =
        [scaled((3.0 - 2.6) + (-6.0 + 6.1) + 7.0), scaled((1.0 - 0.7) + (2.0 - 1.6) - 7.0)];
    for (got, wanted) in found("s.grad").iter().zip(wanted) {
        assert!((got - wanted).abs() < 1e-5, "{got}, not {wanted}");
    }
}
