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
