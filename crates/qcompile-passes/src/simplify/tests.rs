use super::{Options, run};
use qcompile_ir::{Graph, text};

fn simplified(source: &str) -> String {
    let mut graph: Graph = text::parse(source, &|_| None).expect("valid text");
    run(&mut graph, &Options::default()).expect("simplifies");
    graph.to_string()
}

#[test]
fn transposes_meet_their_inverses() {
    let text = simplified(
        "graph @g {
  input %x : f32[N, 8, 8, 3]
  param %w : f32[3, 3, 1, 1] = uniform seed=1
  param %b : f32[3] = uniform seed=2
forward:
  %conv : f32[N, 8, 8, 3] = conv2d %x, %w input=[8, 8] kernel=[1, 1] !origin(\"Conv_0\")
  %nchw : f32[N, 3, 8, 8] = transpose %conv permutation=[0, 3, 1, 2]
  %b1 : f32[1, 3, 1, 1] = reshape %b
  %b2 : f32[N, 3, 8, 8] = broadcast %b1
  %sum : f32[N, 3, 8, 8] = add %nchw, %b2
  %relu : f32[N, 3, 8, 8] = relu %sum
  %back : f32[N, 8, 8, 3] = transpose %relu permutation=[0, 2, 3, 1]
  %conv2 : f32[N, 8, 8, 3] = conv2d %back, %w input=[8, 8] kernel=[1, 1]
  %nchw2 : f32[N, 3, 8, 8] = transpose %conv2 permutation=[0, 3, 1, 2]
  %residual : f32[N, 3, 8, 8] = add %nchw2, %relu
  %pooled : f32[N, 3, 1, 1] = reduce_sum %residual axes=[2, 3]
  %flat : f32[N, 3] = reshape %pooled
  return %flat
}
",
    );
    assert!(!text.contains("transpose"), "{text}");
    assert!(text.contains("%relu : f32[N, 8, 8, 3]"), "{text}");
    assert!(text.contains("axes=[1, 2]"), "{text}");
    assert!(!text.contains("reshape %b1"), "{text}");
}

#[test]
fn the_largest_of_some_columns_comes_from_that_of_each() {
    let source = "graph @g {
  input %x : f32[N, 8]
  param %w : f32[8, 12] = uniform seed=1
forward:
  %y : f32[N, 12] = matmul %x, %w
  %low : bf16[N, 12] = cast %y
  %split : bf16[N, 1, 12] = reshape %low
  %some : bf16[N, 1, 4] = slice %split axis=2 start=4 end=8 step=1
  %real : f32[N, 1, 4] = cast %some
  %abs : f32[N, 1, 4] = abs %real
  %peak : f32[1, 1, 1] = reduce_max %abs axes=[0, 1, 2]
  %amax : f32[] = reshape %peak
  return %amax
}
";
    let text = simplified(source);
    assert!(text.contains("%low.largest : f32[1, 12] = reduce_max %low.abs axes=[0]"), "{text}");
    assert!(text.contains("slice %low.largest axis=1 start=4 end=8"), "{text}");
    assert!(text.contains("%peak : f32[1, 1] = reduce_max %peak.columns axes=[0, 1]"), "{text}");
    // Before a backward pass is built, a maximum stays what it is.
    let mut graph: Graph = text::parse(source, &|_| None).expect("valid text");
    run(&mut graph, &Options { keep_stop_gradient: true }).expect("simplifies");
    assert!(graph.to_string().contains("reduce_max %abs axes=[0, 1, 2]"));
}

#[test]
fn parts_are_narrowed_before_they_are_joined() {
    let text = simplified(
        "graph @g {
  input %x : f32[N, 2, 4]
  input %y : f32[N, 8]
forward:
  %a : f32[N, 2, 4] = exp %x
  %flat : f32[N, 8] = reshape %a
  %b : f32[N, 8] = exp %y
  %joined : f32[N, 16] = concat %flat, %b axis=1
  %low : bf16[N, 16] = cast %joined
  return %low
}
",
    );
    assert!(text.contains("%a.bf16 : bf16[N, 2, 4] = cast %a"), "{text}");
    assert!(text.contains("%b.bf16 : bf16[N, 8] = cast %b"), "{text}");
    assert!(text.contains("%low : bf16[N, 16] = concat %flat.bf16, %b.bf16 axis=1"), "{text}");
}
