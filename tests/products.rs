//! Native code against the reference evaluator: products, and what runs in their kernels.

use crate::oracle::{check, compare, inputs, parse};
use crate::support::{self, cases};
use qcompile_ir::{DType, Region, Tensor};
use qcompile_kernels::Tier;
use qcompile_plan::{BuildOptions, MOST_I8_PRODUCTS, build};
use qcompile_runtime::{RuntimeError, Trainer, TrainerOptions};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The lines of a product `%y`, and its type without the element: small and large, with every way to cut rows.
fn products() -> Vec<(&'static str, &'static str, &'static str)> {
    let conv =
        |input: &'static str, lines: &'static str, shape: &'static str| (input, lines, shape);
    vec![
        (
            "input %x : f32[N, 40]\n  param %w : f32[40, 70] = uniform seed=2",
            "%y : f32[N, 70] = matmul %x, %w",
            "N, 70",
        ),
        (
            "input %x : f32[N, 3, 30, 8]\n  param %w : f32[1, 3, 8, 5] = uniform seed=2",
            "%v : f32[N, 3, 8, 5] = broadcast %w\n%y : f32[N, 3, 30, 5] = matmul %x, %v",
            "N, 3, 30, 5",
        ),
        (
            "input %x : i8[N, 40]\n  const %w : i8[40, 33] = splat 3\n  const %s : f32[] = 0.25",
            "%xf : f32[N, 40] = dequantize %x, %s\n%wf : f32[40, 33] = dequantize %w, %s\n\
             %y : f32[N, 33] = matmul %xf, %wf",
            "N, 33",
        ),
        (
            "input %x : bf16[N, 40]\n  param %w : f32[40, 33] = uniform seed=2",
            "%xf : f32[N, 40] = cast %x\n%wh : bf16[40, 33] = cast %w\n%wf : f32[40, 33] = cast %wh\n\
             %p : f32[N, 33] = matmul %xf, %wf\n%h : bf16[N, 33] = cast %p\n%y : f32[N, 33] = cast %h",
            "N, 33",
        ),
        conv(
            "input %x : bf16[N, 9, 9, 12]\n  param %w : f32[10, 6, 3, 3] = uniform seed=2",
            "%xf : f32[N, 9, 9, 12] = cast %x\n%wh : bf16[10, 6, 3, 3] = cast %w\n\
             %wf : f32[10, 6, 3, 3] = cast %wh\n\
             %p : f32[N, 5, 5, 10] = conv2d %xf, %wf input=[9, 9] kernel=[3, 3] strides=[2, 2] \
             pads=[1, 1, 1, 1] dilations=[1, 1] groups=2\n\
             %h : bf16[N, 5, 5, 10] = cast %p\n%y : f32[N, 5, 5, 10] = cast %h",
            "N, 5, 5, 10",
        ),
        conv(
            "input %x : bf16[N, 5, 5, 10]\n  param %w : f32[10, 20, 3, 3] = uniform seed=2",
            "%xf : f32[N, 5, 5, 10] = cast %x\n%wh : bf16[10, 20, 3, 3] = cast %w\n\
             %wf : f32[10, 20, 3, 3] = cast %wh\n\
             %p : f32[N, 9, 9, 20] = conv2d_grad_input %xf, %wf input=[9, 9] kernel=[3, 3] \
             strides=[2, 2] pads=[1, 1, 1, 1] dilations=[1, 1] groups=1\n\
             %h : bf16[N, 9, 9, 20] = cast %p\n%y : f32[N, 9, 9, 20] = cast %h",
            "N, 9, 9, 20",
        ),
        conv(
            "input %x : f32[N, 19, 18, 3]\n  param %w : f32[24, 3, 3, 3] = uniform seed=2",
            "%y : f32[N, 19, 18, 24] = conv2d %x, %w input=[19, 18] kernel=[3, 3] strides=[1, 1] \
             pads=[1, 1, 1, 1] dilations=[1, 1] groups=1",
            "N, 19, 18, 24",
        ),
        conv(
            "input %x : f32[N, 9, 9, 12]\n  param %w : f32[10, 6, 3, 3] = uniform seed=2",
            "%y : f32[N, 5, 5, 10] = conv2d %x, %w input=[9, 9] kernel=[3, 3] strides=[2, 2] \
             pads=[1, 1, 1, 1] dilations=[1, 1] groups=2",
            "N, 5, 5, 10",
        ),
        conv(
            "input %x : f32[N, 9, 11, 37]\n  param %w : f32[37, 1, 3, 3] = uniform seed=2",
            "%y : f32[N, 9, 11, 37] = conv2d %x, %w input=[9, 11] kernel=[3, 3] strides=[1, 1] \
             pads=[1, 1, 1, 1] dilations=[1, 1] groups=37",
            "N, 9, 11, 37",
        ),
        conv(
            "input %x : f32[N, 5, 5, 10]\n  param %w : f32[10, 20, 3, 3] = uniform seed=2",
            "%y : f32[N, 9, 9, 20] = conv2d_grad_input %x, %w input=[9, 9] kernel=[3, 3] \
             strides=[2, 2] pads=[1, 1, 1, 1] dilations=[1, 1] groups=1",
            "N, 9, 9, 20",
        ),
        conv(
            "input %x : f32[N, 4, 4, 300]\n  param %w : f32[300, 280, 1, 1] = uniform seed=2",
            "%y : f32[N, 7, 7, 280] = conv2d_grad_input %x, %w input=[7, 7] kernel=[1, 1] \
             strides=[2, 2] pads=[0, 0, 0, 0] dilations=[1, 1] groups=1",
            "N, 7, 7, 280",
        ),
        conv(
            "input %x : f32[N, 5, 5, 18]\n  param %w : f32[18, 1, 3, 3] = uniform seed=2",
            "%y : f32[N, 10, 9, 18] = conv2d_grad_input %x, %w input=[10, 9] kernel=[3, 3] \
             strides=[2, 2] pads=[1, 1, 1, 1] dilations=[1, 1] groups=18",
            "N, 10, 9, 18",
        ),
        conv(
            "input %x : i8[N, 7, 7, 20]\n  const %w : i8[9, 20, 3, 3] = splat 2\n  const %s : f32[] = 0.25",
            "%xf : f32[N, 7, 7, 20] = dequantize %x, %s\n%wf : f32[9, 20, 3, 3] = dequantize %w, %s\n\
             %y : f32[N, 7, 7, 9] = conv2d %xf, %wf input=[7, 7] kernel=[3, 3] strides=[1, 1] \
             pads=[1, 1, 1, 1] dilations=[1, 1] groups=1",
            "N, 7, 7, 9",
        ),
        (
            "input %x : u8[N, 40]\n  const %w : i8[40, 33] = splat 3\n  const %s : f32[] = 0.25\n  const %zp : u8[] = 9",
            "%xf : f32[N, 40] = dequantize %x, %s, %zp\n%wf : f32[40, 33] = dequantize %w, %s\n\
             %y : f32[N, 33] = matmul %xf, %wf",
            "N, 33",
        ),
        conv(
            "input %x : u8[N, 7, 7, 20]\n  const %w : i8[9, 20, 3, 3] = splat 2\n  const %s : f32[] = 0.25\n  const %zp : u8[] = 200",
            "%xf : f32[N, 7, 7, 20] = dequantize %x, %s, %zp\n%wf : f32[9, 20, 3, 3] = dequantize %w, %s\n\
             %y : f32[N, 7, 7, 9] = conv2d %xf, %wf input=[7, 7] kernel=[3, 3] strides=[1, 1] \
             pads=[1, 1, 1, 1] dilations=[1, 1] groups=1",
            "N, 7, 7, 9",
        ),
        conv(
            "input %x : i8[N, 9, 7, 37]\n  const %w : i8[37, 1, 3, 3] = splat 2\n  const %s : f32[] = 0.25\n  const %zp : i8[] = -5",
            "%xf : f32[N, 9, 7, 37] = dequantize %x, %s, %zp\n%wf : f32[37, 1, 3, 3] = dequantize %w, %s\n\
             %y : f32[N, 9, 7, 37] = conv2d %xf, %wf input=[9, 7] kernel=[3, 3] strides=[1, 1] \
             pads=[1, 1, 1, 1] dilations=[1, 1] groups=37",
            "N, 9, 7, 37",
        ),
    ]
}

#[test]
fn products_with_reductions_over_their_rows() {
    for (leaves, lines, shape) in products() {
        let dims: Vec<&str> = shape.split(", ").collect();
        let (last, lead) = dims.split_last().expect("a product has columns");
        let (rank, factor) = (
            dims.len(),
            lead[1..].iter().map(|d| d.parse::<usize>().expect("a number")).product::<usize>(),
        );
        let all: Vec<String> = (0..rank).map(|axis| axis.to_string()).collect();
        let (rows, every) = (all[..rank - 1].join(", "), all.join(", "));
        let (column, one) =
            (format!("{}{last}", "1, ".repeat(rank - 1)), vec!["1"; rank].join(", "));
        let rows_number = if factor == 1 { "N".to_owned() } else { format!("{factor}N") };
        let source = format!(
            "graph @g {{\n  {leaves}\n  input %o : f32[{shape}]\n  const %b : f32[{last}] = uniform seed=5\nforward:\n{lines}\n\
             %wide : f32[{shape}] = broadcast %b\n%z : f32[{shape}] = add %y, %wide\n\
             %zo : f32[{shape}] = mul %z, %o\n%abs : f32[{shape}] = abs %z\n\
             %sum : f32[{column}] = reduce_sum %z axes=[{rows}]\n\
             %dot : f32[{column}] = reduce_sum %zo axes=[{rows}]\n\
             %top : f32[{column}] = reduce_max %z axes=[{rows}]\n\
             %total : f32[{one}] = reduce_sum %zo axes=[{every}]\n\
             %largest : f32[{one}] = reduce_max %abs axes=[{every}]\n\
             %n : f32[] = size {rows_number}\n%counts : f32[{column}] = broadcast %n\n\
             %columns : f32[{column}] = reduce_sum %y axes=[{rows}]\n\
             %mean : f32[{column}] = div %columns, %counts\n\
             %means : f32[{shape}] = broadcast %mean\n%d : f32[{shape}] = sub %y, %means\n\
             %dd : f32[{shape}] = mul %d, %d\n\
             %variance : f32[{column}] = reduce_sum %dd axes=[{rows}]\n\
             return %sum, %dot, %top, %total, %largest, %variance, %z\n}}\n"
        );
        let graph = parse(&source);
        let plan = build(graph.clone(), &BuildOptions::default()).expect("has a plan");
        let large = plan.steps().iter().filter(|step| !step.serial).count();
        let copies = usize::from(lines.contains("broadcast"));
        assert_eq!(large, 1 + copies, "one kernel makes it all\n{plan}");
        check(lines, &graph, &[1, 2, 9, 70]);
    }
}

/// Leaves, lines of a product `%y` of integers with scales along what its sums do not run over, and what the plan says.
fn scaled_products() -> Vec<[&'static str; 3]> {
    vec![
        [
            "input %x : i8[N, 40]\n  input %s : f32[N]\n  const %w : i8[33, 40] = splat 3\n  const %t : f32[33] = uniform seed=3",
            "%xf : f32[N, 40] = dequantize %x, %s axis=0\n%wf : f32[33, 40] = dequantize %w, %t axis=0\n\
             %y : f32[N, 33] = matmul %xf, %wf transpose_b",
            "matmul_i8 [1, N, 33, 40] s0[0, 40, 1], s2[0, 1, 40] scales s1 per row, s3 per channel",
        ],
        // Rows go on from one matrix of the batch to the next.
        [
            "input %x : i8[6N, 40]\n  input %s : f32[6N]\n  const %w : i8[1, 40, 33] = splat 3\n  const %t : f32[] = 0.5",
            "%xf : f32[6N, 40] = dequantize %x, %s axis=0\n\
             %xb : f32[N, 6, 40] = reshape %xf\n%wf : f32[1, 40, 33] = dequantize %w, %t\n\
             %wb : f32[N, 40, 33] = broadcast %wf\n%y : f32[N, 6, 33] = matmul %xb, %wb",
            "matmul_i8 [1, 6N, 33, 40] s0[0, 40, 1], s2[0, 33, 1] scales s1 per row, s3 ",
        ],
        // The gradient of a weight: sums over rows.
        [
            "input %x : i8[N, 40]\n  const %s : f32[40] = uniform seed=3\n  input %d : i8[N, 33]\n  const %t : f32[33] = uniform seed=4",
            "%xf : f32[N, 40] = dequantize %x, %s axis=1\n%df : f32[N, 33] = dequantize %d, %t axis=1\n\
             %y : f32[40, 33] = matmul %xf, %df transpose_a",
            "matmul_i8 [1, 40, 33, N] s0[0, 1, 40], s2[0, 33, 1] scales s1 per row, s3 per channel",
        ],
        // A scale along the sum has no int8 form.
        [
            "input %x : i8[N, 40]\n  const %s : f32[40] = uniform seed=3\n  const %w : i8[40, 33] = splat 3\n  const %t : f32[] = 0.5",
            "%xf : f32[N, 40] = dequantize %x, %s axis=1\n%wf : f32[40, 33] = dequantize %w, %t\n\
             %y : f32[N, 33] = matmul %xf, %wf",
            "matmul [1, N, 33, 40]",
        ],
        [
            "input %x : i8[N, 7, 7, 20]\n  input %s : f32[N]\n  const %w : i8[9, 20, 3, 3] = splat 2\n  const %t : f32[9] = uniform seed=3",
            "%xf : f32[N, 7, 7, 20] = dequantize %x, %s axis=0\n%wf : f32[9, 20, 3, 3] = dequantize %w, %t axis=0\n\
             %y : f32[N, 7, 7, 9] = conv2d %xf, %wf input=[7, 7] kernel=[3, 3] strides=[1, 1] \
             pads=[1, 1, 1, 1] dilations=[1, 1] groups=1",
            "conv2d_i8 ",
        ],
        [
            "input %x : i8[N, 4, 4, 12]\n  input %s : f32[N]\n  const %w : i8[12, 20, 3, 3] = splat 2\n  const %t : f32[20] = uniform seed=3",
            "%xf : f32[N, 4, 4, 12] = dequantize %x, %s axis=0\n%wf : f32[12, 20, 3, 3] = dequantize %w, %t axis=1\n\
             %y : f32[N, 7, 8, 20] = conv2d_grad_input %xf, %wf input=[7, 8] kernel=[3, 3] strides=[2, 2] \
             pads=[1, 1, 1, 1] dilations=[1, 1] groups=1",
            "conv2d_grad_input_i8 ",
        ],
        [
            "input %x : i8[N, 7, 7, 20]\n  input %s : f32[N]\n  const %w : i8[20, 1, 3, 3] = splat 2\n  const %t : f32[20] = uniform seed=3",
            "%xf : f32[N, 7, 7, 20] = dequantize %x, %s axis=0\n%wf : f32[20, 1, 3, 3] = dequantize %w, %t axis=0\n\
             %y : f32[N, 7, 7, 20] = conv2d_grad_input %xf, %wf input=[7, 7] kernel=[3, 3] strides=[1, 1] \
             pads=[1, 1, 1, 1] dilations=[1, 1] groups=20",
            "conv2d_grad_input_i8 ",
        ],
        [
            "input %x : i8[N, 9, 8, 12]\n  const %s : f32[12] = uniform seed=4\n  input %d : i8[N, 5, 4, 10]\n  const %t : f32[10] = uniform seed=3",
            "%xf : f32[N, 9, 8, 12] = dequantize %x, %s axis=3\n%df : f32[N, 5, 4, 10] = dequantize %d, %t axis=3\n\
             %y : f32[10, 6, 3, 3] = conv2d_grad_weight %xf, %df input=[9, 8] kernel=[3, 3] strides=[2, 2] \
             pads=[1, 1, 1, 1] dilations=[1, 1] groups=2",
            "conv2d_grad_weight_i8 ",
        ],
    ]
}

#[test]
fn int8_products_with_scales_along_what_is_not_summed() {
    for [leaves, lines, step] in scaled_products() {
        let graph =
            parse(&format!("graph @g {{\n  {leaves}\nforward:\n{lines}\n  return %y\n}}\n"));
        let plan = build(graph.clone(), &BuildOptions::default()).expect("has a plan").to_string();
        assert!(plan.contains(step), "{step}\n{plan}");
        check(lines, &graph, &[1, 2, 9, 70]);
    }
}

/// Sums that an i32 cannot hold, all of one sign and as large as they get.
#[test]
fn int8_sums_never_wrap() {
    let source = |shape: &str, product: &str| {
        format!(
            "graph @g {{\n  input %x : i8[{shape}, 2]\n  const %s : f32[] = 1\nforward:\n  %a : f32[{shape}, 2] = dequantize %x, %s\n  {product}\n  return %y\n}}\n"
        )
    };
    let trainer = |source: &str| {
        let plan = build(parse(source), &BuildOptions::default()).expect("has a plan");
        Trainer::new(Arc::new(plan), &TrainerOptions::default()).expect("compiles")
    };
    let run = |trainer: &mut Trainer, shape: &[usize]| {
        let bytes = vec![127; shape.iter().product()];
        let x = Tensor::from_bytes(DType::I8, shape.to_vec(), bytes).expect("fits");
        trainer.run(&BTreeMap::from([("x".to_owned(), x)]), Region::Forward)
    };
    // More than a sample has to sum is no int8 product.
    let long = 140_000;
    let mut fixed =
        trainer(&source(&format!("N, {long}"), "%y : f32[N, 2, 2] = matmul %a, %a transpose_a"));
    assert_eq!(fixed.plan().largest_batch(), None);
    let y = run(&mut fixed, &[1, long, 2]).expect("runs").remove("y").expect("an output");
    let wanted = long as f32 * 127.0 * 127.0;
    assert!(y.to_f32().iter().all(|y| (y / wanted - 1.0).abs() < 1e-3), "{y:?}");
    // Sums over samples have as many as an i32 holds.
    let mut open = trainer(&source("1000N", "%y : f32[2, 2] = matmul %a, %a transpose_a"));
    let most = open.plan().largest_batch().expect("it is bounded");
    assert_eq!(most, MOST_I8_PRODUCTS / 1000);
    let y = run(&mut open, &[most * 1000, 2]).expect("fits").remove("y").expect("an output");
    assert_eq!(y.to_f32()[0], (most * 1000) as f32 * 127.0 * 127.0);
    let refused = run(&mut open, &[(most + 1) * 1000, 2]);
    assert!(matches!(refused, Err(RuntimeError::Batch { .. })), "{refused:?}");
}

/// What the builder makes of each fusion it has a file for.
#[test]
fn every_plan_of_the_files() {
    for path in cases("plan") {
        let graph = support::parse(&path);
        check(&path.display().to_string(), &graph, &[1, 3, 70]);
    }
}

/// Every number of columns up to some vectors and a rest, with values that are infinite or no numbers.
#[test]
fn strange_values_in_rows_of_any_length() {
    for columns in [4, 5, 15, 16, 17, 31, 33, 63, 65, 100, 130] {
        let ty = format!("[N, {columns}]");
        let mut source = format!(
            "graph @g {{\n  input %x : f32{ty}\n  input %y : f32{ty}\nforward:\n  \
             %zero : f32{ty} = sub %x, %x\n  %q : f32{ty} = div %x, %zero\n  \
             %less : bool{ty} = less %x, %y\n  %any : f32{ty} = select %less, %q, %y\n  \
             %wide : bf16{ty} = cast %any\n  %whole : i32{ty} = cast %any\n  \
             %byte : i8{ty} = cast %any\n  %true : bool{ty} = cast %any\n  \
             %back : f32{ty} = cast %wide\n  %low : f32{ty} = min %any, %x\n  \
             %high : f32{ty} = max %x, %any\n  \
             %first : f32[1, {columns}] = reduce_max %any axes=[0]\n  \
             %second : f32[N, 1] = reduce_max %any axes=[1]\n  \
             %third : f32[N, 1] = reduce_sum %y axes=[1]\n"
        );
        let mut outputs = String::from(
            "%any, %wide, %whole, %byte, %true, %back, %low, %high, %first, %second, %third",
        );
        for op in
            ["relu", "abs", "neg", "exp", "log", "tanh", "sigmoid", "erf", "sign", "floor", "round"]
        {
            source += &format!("  %{op}.any : f32{ty} = {op} %any\n");
            outputs += &format!(", %{op}.any");
        }
        let graph = parse(&format!("{source}  return {outputs}\n}}\n"));
        for tier in Tier::ALL.into_iter().filter(|tier| tier.is_supported()) {
            for batch in [1, 3, 40] {
                compare(&format!("{columns} columns"), &graph, batch, tier);
            }
        }
    }
}

/// A mean far from zero, in units of the deviation: sums of squares in f32 would leave nothing of the variance.
#[test]
fn variances_of_values_far_from_zero() {
    let source = "graph @g {
  input %x : f32[N, 4, 4, 8]
  param %w : f32[16, 8, 1, 1] = uniform seed=2
  const %far : f32[8] = splat 3000
forward:
  %wide : f32[N, 4, 4, 8] = broadcast %far
  %shifted : f32[N, 4, 4, 8] = add %x, %wide
  %y : f32[N, 4, 4, 16] = conv2d %shifted, %w input=[4, 4] kernel=[1, 1] strides=[1, 1] pads=[0, 0, 0, 0] dilations=[1, 1] groups=1
  %n : f32[] = size 16N
  %counts : f32[1, 1, 1, 16] = broadcast %n
  %columns : f32[1, 1, 1, 16] = reduce_sum %y axes=[0, 1, 2]
  %mean : f32[1, 1, 1, 16] = div %columns, %counts
  %means : f32[N, 4, 4, 16] = broadcast %mean
  %d : f32[N, 4, 4, 16] = sub %y, %means
  %dd : f32[N, 4, 4, 16] = mul %d, %d
  %variance : f32[1, 1, 1, 16] = reduce_sum %dd axes=[0, 1, 2]
  return %variance, %y
}
";
    let graph = parse(source);
    for batch in [1, 64] {
        let plan = Arc::new(build(graph.clone(), &BuildOptions::default()).expect("has a plan"));
        for tier in Tier::ALL.into_iter().filter(|tier| tier.is_supported()) {
            let options = TrainerOptions { threads: 1, workers: 1, tier: Some(tier) };
            let mut trainer = Trainer::new(Arc::clone(&plan), &options).expect("compiles");
            let got = trainer.run(&inputs(&graph, batch), Region::Comm).expect("runs");
            let (y, variance) = (got["y"].to_f64(), got["variance"].to_f64());
            for (channel, &variance) in variance.iter().enumerate() {
                let values: Vec<f64> = y.iter().skip(channel).step_by(16).copied().collect();
                let mean = values.iter().sum::<f64>() / values.len() as f64;
                let exact: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
                assert!(
                    (variance - exact).abs() <= 1e-5 * exact,
                    "{tier}: {variance} is not {exact}"
                );
            }
        }
    }
}
