use super::*;
use crate::text::parse;

fn graph(body: &str) -> Graph {
    let source = format!("graph @g {{\n{body}\n}}");
    parse(&source, &|_| None).unwrap_or_else(|errors| panic!("{errors}\n{source}"))
}

/// Every value of a graph without inputs.
fn values(body: &str) -> Values {
    let options = EvalOptions::default();
    eval(&graph(body), &BTreeMap::new(), 2, &options).unwrap_or_else(|error| panic!("{error}"))
}

fn check(body: &str, expected: &[f64]) {
    let y = values(body).get_f64("y").expect("there is %y");
    assert_eq!(y, expected, "{body}");
}

fn error(body: &str) -> String {
    let options = EvalOptions::default();
    eval(&graph(body), &BTreeMap::new(), 2, &options).expect_err("out of range").to_string()
}

#[test]
fn products_take_their_transposes() {
    let a = "const %a : f32[2, 3] = [[1, 2, 3], [4, 5, 6]]\nconst %b : f32[3, 2] = [[1, 0], [0, 1], [1, 1]]";
    check(&format!("{a}\nforward:\n%y : f32[2, 2] = matmul %a, %b"), &[4.0, 5.0, 10.0, 11.0]);
    check(
        &format!("{a}\nforward:\n%y : f32[3, 3] = matmul %a, %b transpose_a transpose_b"),
        &[1.0, 4.0, 5.0, 2.0, 5.0, 7.0, 3.0, 6.0, 9.0],
    );
}

#[test]
fn convolution_strides_dilates_pads_and_groups() {
    // Two groups of one channel each, by hand: channel 0 counts up, channel 1 is ten times it.
    let x = "const %x : f32[1, 3, 3, 2] = uniform seed=1\nconst %w : f32[2, 1, 2, 2] = splat 1";
    let body = format!(
        "{x}\nforward:\n%y : f32[1, 2, 2, 2] = conv2d %x, %w input=[3, 3] kernel=[2, 2] strides=[2, 2] pads=[1, 1, 0, 0] groups=2"
    );
    let values = values(&body);
    let (x, y) = (values.get_f64("x").expect("x"), values.get_f64("y").expect("y"));
    let at = |row: usize, column: usize, c: usize| x[(row * 3 + column) * 2 + c];
    for c in 0..2 {
        assert!((y[c] - at(0, 0, c)).abs() < 1e-6);
        let last = at(1, 1, c) + at(1, 2, c) + at(2, 1, c) + at(2, 2, c);
        assert!((y[6 + c] - last).abs() < 1e-6);
    }
    check(
        "const %x : f32[1, 1, 3, 1] = [[[[1], [2], [3]]]]\nconst %w : f32[1, 1, 1, 2] = [[[[1, 10]]]]\nforward:\n%y : f32[1, 1, 1, 1] = conv2d %x, %w input=[1, 3] kernel=[1, 2] dilations=[1, 2]",
        &[31.0],
    );
}

#[test]
fn pools_ignore_padding_unless_counted() {
    let x = "const %x : f32[1, 2, 2, 1] = [[[[-1], [-2]], [[-3], [-4]]]]\nforward:\n";
    let pool = "input=[2, 2] kernel=[2, 2] strides=[2, 2] pads=[1, 1, 1, 1]";
    let y = "%y : f32[1, 2, 2, 1]";
    check(&format!("{x}{y} = max_pool2d %x {pool}"), &[-1.0, -2.0, -3.0, -4.0]);
    check(&format!("{x}{y} = average_pool2d %x {pool}"), &[-1.0, -2.0, -3.0, -4.0]);
    check(
        &format!("{x}{y} = average_pool2d %x {pool} count_include_pad"),
        &[-0.25, -0.5, -0.75, -1.0],
    );
    check(
        "const %x : f32[1, 1, 3, 1] = [[[[5], [5], [1]]]]\nconst %dy : f32[1, 1, 2, 1] = [[[[1], [2]]]]\nforward:\n%y : f32[1, 1, 3, 1] = max_pool2d_grad %x, %dy input=[1, 3] kernel=[1, 2]",
        &[1.0, 2.0, 0.0],
    );
}

#[test]
fn elements_move() {
    let x = "const %x : i64[2, 3] = [[1, 2, 3], [4, 5, 6]]\nforward:\n";
    check(
        &format!("{x}%y : i64[3, 2] = transpose %x permutation=[1, 0]"),
        &[1., 4., 2., 5., 3., 6.],
    );
    check(&format!("{x}%y : i64[2, 2] = slice %x axis=1 start=0 end=3 step=2"), &[1., 3., 4., 6.]);
    check(
        &format!("{x}%y : i64[4, 3] = pad %x axis=0 low=1 interior=1 value=7"),
        &[7., 7., 7., 1., 2., 3., 7., 7., 7., 4., 5., 6.],
    );
    check(
        &format!("{x}%y : i64[2, 6] = concat %x, %x axis=1"),
        &[1., 2., 3., 1., 2., 3., 4., 5., 6., 4., 5., 6.],
    );
    check(
        "const %x : f32[2, 1] = [[1], [2]]\nforward:\n%y : f32[1, 2, 2] = broadcast %x",
        &[1., 1., 2., 2.],
    );
    let i = "const %i : i64[3] = [1, -1, -2]\nconst %t : f32[2, 1] = [[1], [2]]\nforward:\n";
    let gathered = format!("{i}%g : f32[3, 1] = gather %t, %i\n");
    check(&format!("{gathered}%y : f32[2, 1] = scatter_add %i, %g rows=2"), &[1., 4.]);
    let far = "const %i : i64[1] = [-3]\nconst %t : f32[2] = [1, 2]\nforward:\n%y : f32[1] = gather %t, %i";
    assert_eq!(error(far), "%y: index -3 at place 0 is out of range for 2 rows");
}

#[test]
fn integers_wrap_truncate_and_saturate() {
    let x = "const %x : i8[3] = [-128, 100, 7]\nconst %z : i8[3] = [-1, 100, 0]\nforward:\n";
    check(&format!("{x}%y : i8[3] = add %x, %z"), &[127., -56., 7.]);
    check(&format!("{x}%y : i8[3] = div %x, %z"), &[-128., 1., 0.]);
    check(
        "const %x : i8[3] = [7, -1, 2]\nconst %z : i8[3] = [3, -3, -1]\nforward:\n%y : i8[3] = pow %x, %z",
        &[87., -1., 0.],
    );
    check(&format!("{x}%y : i8[1] = reduce_max %x axes=[0]"), &[100.]);
    check(
        "const %x : f32[4] = [-1.9, 300, nan, -inf]\nforward:\n%y : i8[4] = cast %x",
        &[-1., 127., 0., -128.],
    );
    check("const %x : i64[1] = [16777217]\nforward:\n%y : f32[1] = cast %x", &[16_777_216.]);
}

#[test]
fn quantization_rounds_to_even_and_clamps() {
    let x = "const %x : f32[6] = [0.25, 0.75, -99, 63.7, 64, nan]\nconst %s : f32[] = 0.5\nconst %o : f32[] = 0\nconst %d : f32[6] = [1, 2, 3, 4, 5, 6]\nforward:\n";
    check(&format!("{x}%y : i8[6] = quantize %x, %s i8"), &[0., 2., -127., 127., 127., 0.]);
    check(&format!("{x}%y : i8[6] = quantize %x, %o i8"), &[0.; 6]);
    check(&format!("{x}%y : f32[6] = straight_through %x, %d, %s i8"), &[1., 2., 0., 4., 0., 0.]);
    check(
        "const %q : i8[2, 2] = [[1, 2], [3, 4]]\nconst %s : f32[2] = [1, 10]\nforward:\n%y : f32[2, 2] = dequantize %q, %s axis=0",
        &[1., 2., 30., 40.],
    );
}

#[test]
fn cross_entropy_skips_ignored_labels_and_refuses_others() {
    let x = "const %x : f32[2, 2] = [[0, 0], [1000, 0]]\nconst %d : f32[2] = [2, 1]\n";
    let l = |labels: &str| format!("{x}const %l : i64[2] = [{labels}]\nforward:\n");
    let loss = "%y : f32[2] = cross_entropy %x, %l";
    check(&(l("1, 1") + loss), &[f64::from(std::f32::consts::LN_2), 1000.]);
    check(&(l("-100, 0") + loss), &[0., 0.]);
    let grad = "%y : f32[2, 2] = cross_entropy_grad %x, %l, %d";
    check(&(l("1, -100") + grad), &[1., -1., 0., 0.]);
    assert_eq!(error(&(l("0, 2") + loss)), "%y: label 2 of row 1 is out of range for 2 classes");
}

#[test]
fn ranks_meet_in_all_reduce() {
    let graph = graph(
        "input %x : f32[N]\nforward:\n%s : f32[1] = reduce_sum %x axes=[0]\ncomm:\n%y : f32[1] = all_reduce %s mean",
    );
    let inputs = |values: &[f32]| {
        let tensor = Tensor::from_f32(&[values.len()], values).expect("fits");
        BTreeMap::from([("x".to_owned(), tensor)])
    };
    let (a, b) = (inputs(&[1.0, 2.0]), inputs(&[6.0]));
    let ranks = [Rank { inputs: &a, batch: 2 }, Rank { inputs: &b, batch: 1 }];
    let values = eval_ranks(&graph, &ranks, &EvalOptions::default()).expect("evaluates");
    assert_eq!(values[0].get_f64("y"), Some(vec![4.5]));
    assert_eq!(values[1].get_f64("y"), Some(vec![4.5]));
    let wrong = eval(&graph, &a, 3, &EvalOptions::default()).expect_err("three").to_string();
    assert!(wrong.contains("f32[2], but f32[N] at batch size 3"), "{wrong}");
}

#[test]
fn limits_stop_what_would_not_end() {
    let big = graph("const %x : f32[] = 1\nforward:\n%y : f32[99999999999] = broadcast %x");
    let options = EvalOptions::default();
    let error = eval(&big, &BTreeMap::new(), 1, &options).expect_err("too large").to_string();
    assert_eq!(error, "%y: evaluation needs more than 134217728 elements");
    let targets = EvalOptions { targets: vec!["x".to_owned()], ..options };
    assert!(eval(&big, &BTreeMap::new(), 1, &targets).is_ok());
}

#[test]
fn leaves_are_replaced_and_rounding_is_a_choice() {
    let graph = graph("param %w : f32[1] = [1]\nforward:\n%y : f32[1] = reciprocal %w");
    let leaves = BTreeMap::from([("w".to_owned(), vec![3.0])]);
    let mut options = EvalOptions { leaves, ..EvalOptions::default() };
    let third = |options: &EvalOptions| {
        eval(&graph, &BTreeMap::new(), 1, options).expect("evaluates").get_f64("y").expect("y")[0]
    };
    assert_eq!(third(&options), f64::from(1.0_f32 / 3.0));
    options.rounding = Rounding::Exact;
    assert_eq!(third(&options), 1.0 / 3.0);
}

#[test]
fn differences_agree_with_the_gradients_of_the_ops() {
    let body = "param %x : f32[2, 5, 4, 2] = normal seed=3
param %w : f32[4, 1, 2, 3] = normal seed=4
const %l : i64[2] = [3, -100]
const %one : f32[2] = [1, 1]
forward:
%c : f32[2, 3, 4, 4] = conv2d %x, %w input=[5, 4] kernel=[2, 3] strides=[2, 1] pads=[1, 1, 1, 1] dilations=[2, 1] groups=2
%p : f32[2, 2, 2, 4] = average_pool2d %c input=[3, 4] kernel=[2, 2] strides=[1, 2] pads=[0, 0, 0, 0]
%f : f32[2, 16] = reshape %p
%r : f32[2] = cross_entropy %f, %l
%y : f32[1] = reduce_sum %r axes=[0]
backward:
%f.g : f32[2, 16] = cross_entropy_grad %f, %l, %one
%p.g : f32[2, 2, 2, 4] = reshape %f.g
%c.g : f32[2, 3, 4, 4] = average_pool2d_grad %p.g input=[3, 4] kernel=[2, 2] strides=[1, 2] pads=[0, 0, 0, 0]
%x.g : f32[2, 5, 4, 2] = conv2d_grad_input %c.g, %w input=[5, 4] kernel=[2, 3] strides=[2, 1] pads=[1, 1, 1, 1] dilations=[2, 1] groups=2
%w.g : f32[4, 1, 2, 3] = conv2d_grad_weight %x, %c.g input=[5, 4] kernel=[2, 3] strides=[2, 1] pads=[1, 1, 1, 1] dilations=[2, 1] groups=2";
    let graph = graph(body);
    let exact = EvalOptions { rounding: Rounding::Exact, ..EvalOptions::default() };
    let values = eval(&graph, &BTreeMap::new(), 1, &exact).expect("evaluates");
    for leaf in ["x", "w"] {
        let numeric =
            central_differences(&graph, &BTreeMap::new(), 1, "y", leaf).expect("evaluates");
        let gradient = values.get_f64(&format!("{leaf}.g")).expect("evaluated");
        assert_eq!(numeric.len(), gradient.len());
        assert!(gradient.iter().any(|g| g.abs() > 1e-3));
        for (n, g) in numeric.iter().zip(&gradient) {
            assert!((n - g).abs() < 1e-8, "{leaf}: {n} and {g}");
        }
    }
}
