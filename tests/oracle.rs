//! Native code against the reference evaluator: every op, type and tier, on shapes with edges.

use crate::support::{self, cases};
use qcompile_ir::eval::{EvalOptions, eval};
use qcompile_ir::{DType, Graph, NodeId, Op, Region, Tensor, text};
use qcompile_kernels::Tier;
use qcompile_passes::differentiate;
use qcompile_plan::{BuildOptions, build};
use qcompile_runtime::{Trainer, TrainerOptions};
use std::collections::BTreeMap;
use std::sync::Arc;

pub(crate) type Values = BTreeMap<String, Tensor>;

pub(crate) fn parse(source: &str) -> Graph {
    text::parse(source, &|_| None).unwrap_or_else(|errors| panic!("{errors}\n{source}"))
}

/// Values for every input: floats of both signs, integers 0, 1, 2, 0, ...
pub(crate) fn inputs(graph: &Graph, batch: usize) -> Values {
    let value = |id: NodeId| {
        let ty = graph.ty(id);
        let sizes = ty.shape.sizes(batch);
        let salt = graph.node(id).name.as_str().bytes().map(usize::from).sum::<usize>();
        let values: Vec<f64> = (0..sizes.iter().product())
            .map(|index: usize| match ty.dtype {
                DType::I64 => (index % 3) as f64,
                DType::Bool => ((index + salt) % 2) as f64,
                DType::I8 | DType::I32 => ((index * 37 + salt) % 23) as f64 - 11.0,
                DType::U8 => ((index * 37 + salt) % 23) as f64,
                DType::I4 => ((index * 7 + salt) % 16) as f64 - 8.0,
                DType::U4 => ((index * 7 + salt) % 16) as f64,
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

/// The largest difference that rounding explains, relative to the largest value.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 2e-5,
        DType::F16 => 2e-3,
        DType::BF16 => 1.6e-2,
        DType::F8E4M3 => 0.13,
        DType::F8E5M2 => 0.26,
        _ => 0.0,
    }
}

/// Runs a graph natively on one tier and compares all its outputs with the evaluator's.
pub(crate) fn compare(name: &str, graph: &Graph, batch: usize, tier: Tier) {
    let given = inputs(graph, batch);
    let wanted = eval(graph, &given, batch, &EvalOptions::default())
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    // What cancels in a sum leaves the rounding of its parts.
    let parts: f64 = given.values().flat_map(Tensor::to_f64).map(f64::abs).sum();
    // Native code keeps what it does not store in f32, the reference rounds every value to its type.
    let narrowest = graph.ids().map(|id| tolerance(graph.ty(id).dtype)).fold(0.0, f64::max);
    let plan = build(graph.clone(), &BuildOptions { batch_size: batch })
        .unwrap_or_else(|error| panic!("{name}: {error}\n{graph}"));
    let plan = Arc::new(plan);
    let mut first: Option<Values> = None;
    for threads in [1, 2, 5] {
        let options = TrainerOptions { threads, workers: 1, tier: Some(tier) };
        let mut trainer = Trainer::new(Arc::clone(&plan), &options).expect("compiles");
        let got =
            trainer.run(&given, Region::Comm).unwrap_or_else(|error| panic!("{name}: {error}"));
        for (output, id) in graph.outputs() {
            let node = graph.node(*id);
            let exact = wanted.get_f64(node.name.as_str()).expect("evaluated");
            let tolerance = if node.ty.dtype.is_float() { narrowest } else { 0.0 };
            let values = got[output].to_f64();
            assert_eq!(values.len(), exact.len(), "{name}: {output}");
            let largest =
                exact.iter().filter(|x| x.is_finite()).fold(1e-2_f64, |m, x| m.max(x.abs()));
            for (at, (value, exact)) in values.iter().zip(exact).enumerate() {
                let same = *value == exact || (value.is_nan() && exact.is_nan());
                assert!(
                    same || (*value - exact).abs() <= tolerance * (largest + 5e-4 * parts),
                    "{name} on {tier}, batch {batch}: {output}[{at}] is {value}, not {exact}\n{plan}"
                );
            }
        }
        match &first {
            None => first = Some(got),
            Some(first) => assert_eq!(first, &got, "{name}: {threads} threads give other bits"),
        }
    }
}

/// Compares a graph on all tiers, as it is and with every value as an output, so that nothing is fused away.
pub(crate) fn check(name: &str, graph: &Graph, batches: &[usize]) {
    let mut open = graph.clone();
    let outputs: Vec<_> = graph
        .order()
        .into_iter()
        .filter(|&id| !graph.op(id).is_leaf() && graph.node(id).region < Region::Update)
        .map(|id| (graph.node(id).name.as_str().to_owned(), id))
        .collect();
    open.set_outputs(outputs);
    for tier in Tier::ALL.into_iter().filter(|tier| tier.is_supported()) {
        for &batch in batches {
            compare(name, graph, batch, tier);
            compare(name, &open, batch, tier);
        }
    }
}

#[test]
fn every_op_and_its_gradient() {
    for path in cases("gradients") {
        let mut graph = support::parse(&path);
        differentiate::run(&mut graph).expect("differentiable");
        graph.sweep();
        check(&path.display().to_string(), &graph, &[3]);
    }
}

#[test]
fn every_way_to_fuse() {
    for path in cases("plan") {
        check(&path.display().to_string(), &support::parse(&path), &[1, 2, 7]);
    }
}

/// `y = op(a)` or `op(a, b)` over each size.
fn elementwise(op: &str, dtype: &str, result: &str, operands: usize) -> String {
    let mut body = String::new();
    let mut leaves = String::new();
    for size in [1, 3, 4, 5, 16, 63, 1000] {
        leaves += &format!("input %a{size} : {dtype}[{size}]\ninput %b{size} : {dtype}[{size}]\n");
        let given = if operands == 1 { format!("%a{size}") } else { format!("%a{size}, %b{size}") };
        body += &format!("%y{size} : {result}[{size}] = {op} {given}\n");
    }
    let outputs: Vec<String> =
        [1, 3, 4, 5, 16, 63, 1000].iter().map(|n| format!("%y{n}")).collect();
    format!("graph @g {{\n{leaves}forward:\n{body}return {}\n}}\n", outputs.join(", "))
}

const DTYPES: [&str; 12] =
    ["f32", "bf16", "f16", "f8e4m3", "f8e5m2", "i8", "u8", "i4", "u4", "i32", "i64", "bool"];

#[test]
fn every_type_and_function() {
    for dtype in DTYPES {
        let float = matches!(dtype, "f32" | "bf16" | "f16");
        let unary: &[&str] = match dtype {
            "bool" => &["not"],
            "f8e4m3" | "f8e5m2" => &["neg", "abs", "relu"],
            _ if float => &[
                "neg",
                "abs",
                "exp",
                "relu",
                "sigmoid",
                "tanh",
                "erf",
                "sin",
                "cos",
                "floor",
                "ceil",
                "round",
                "sign",
                "reciprocal",
                "sqrt",
                "log",
            ],
            "u8" | "u4" => &["abs", "relu", "sign"],
            _ => &["neg", "abs", "relu", "sign"],
        };
        let binary: &[&str] = match dtype {
            "bool" => &["and", "or"],
            "f8e4m3" | "f8e5m2" => &["max", "min"],
            _ => &["add", "sub", "mul", "div", "max", "min"],
        };
        for op in unary {
            check(&format!("{op} {dtype}"), &parse(&elementwise(op, dtype, dtype, 1)), &[1]);
        }
        for op in binary {
            check(&format!("{op} {dtype}"), &parse(&elementwise(op, dtype, dtype, 2)), &[1]);
        }
        for op in ["equal", "less", "less_equal"] {
            check(&format!("{op} {dtype}"), &parse(&elementwise(op, dtype, "bool", 2)), &[1]);
        }
        for to in DTYPES.iter().filter(|to| **to != dtype) {
            let source = elementwise(&format!("cast {to}"), dtype, to, 1)
                .replace(&format!("cast {to} %"), "cast %");
            check(&format!("cast {dtype} to {to}"), &parse(&source), &[1]);
        }
    }
}

#[test]
fn reductions_over_every_axis() {
    for dtype in ["f32", "bf16", "i32", "i64"] {
        for op in ["reduce_sum", "reduce_max"] {
            for (axes, kept) in [
                ("0", "1, 5, 7, 20"),
                ("1", "N, 1, 7, 20"),
                ("3", "N, 5, 7, 1"),
                ("0, 1", "1, 1, 7, 20"),
                ("0, 1, 2", "1, 1, 1, 20"),
                ("1, 3", "N, 1, 7, 1"),
                ("0, 1, 2, 3", "1, 1, 1, 1"),
            ] {
                let source = format!(
                    "graph @g {{\ninput %x : {dtype}[N, 5, 7, 20]\nforward:\n\
                     %y : {dtype}[{kept}] = {op} %x axes=[{axes}]\nreturn %y\n}}\n"
                );
                check(&format!("{op} {dtype} over {axes}"), &parse(&source), &[1, 37]);
            }
        }
    }
}

#[test]
fn reductions_large_enough_for_many_chunks() {
    let source = "graph @g {
  input %x : f32[N, 8192]
  const %scale : f32[8192] = uniform seed=3
forward:
  %wide : f32[N, 8192] = broadcast %scale
  %scaled : f32[N, 8192] = mul %x, %wide
  %columns : f32[1, 8192] = reduce_sum %scaled axes=[0]
  %rows : f32[N, 1] = reduce_sum %scaled axes=[1]
  %all : f32[1, 1] = reduce_sum %scaled axes=[0, 1]
  %largest : f32[1, 1] = reduce_max %scaled axes=[0, 1]
  return %scaled, %columns, %rows, %all, %largest
}
";
    check("chunks", &parse(source), &[1, 70]);
}

#[test]
fn nothing_is_reduced_to_the_identity() {
    let source = "graph @g {
  input %x : f32[N, 0]
forward:
  %sum : f32[N, 1] = reduce_sum %x axes=[1]
  %all : f32[1, 1] = reduce_sum %x axes=[0, 1]
  %copy : f32[N, 0] = relu %x
  return %sum, %all, %copy
}
";
    check("nothing", &parse(source), &[1, 3]);
}

#[test]
fn quantization_rounds_like_the_reference() {
    let source = "graph @g {
  input %x : f32[N, 33]
  const %s : f32[] = 0.0071
  const %t : f32[33] = uniform seed=5
  const %u : f32[N, 1] = splat 1
forward:
  %t.abs : f32[33] = abs %t
  %q : i8[N, 33] = quantize %x, %s i8
  %y : f32[N, 33] = dequantize %q, %s
  %r : i8[N, 33] = quantize %x, %t.abs i8 axis=1
  %z : f32[N, 33] = dequantize %r, %t.abs axis=1
  %st : f32[N, 33] = straight_through %x, %z, %t.abs i8 axis=1
  return %q, %y, %r, %z, %st
}
"
    .replace("  const %u : f32[N, 1] = splat 1\n", "");
    check("quantize", &parse(&source), &[1, 9]);
}

#[test]
fn rounding_to_bf16_is_to_nearest_even() {
    let mut random = support::Random::new(46);
    let mut values = vec![0.0, -0.0, f32::MAX, f32::MIN, f32::MIN_POSITIVE, 1e-45, f32::INFINITY];
    values.extend([
        f32::NEG_INFINITY,
        f32::NAN,
        f32::from_bits(0x7f80_0001),
        f32::from_bits(u32::MAX),
    ]);
    for i in 0..1000 {
        // Every third is a tie, every fifth below the normal range.
        let bits = random.bits() as u32;
        let bits = if i % 3 == 0 { bits & 0xffff_0000 | 0x8000 } else { bits };
        values.push(f32::from_bits(if i % 5 == 0 { bits & 0x807f_ffff } else { bits }));
    }
    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let x = Tensor::from_bytes(DType::F32, vec![values.len()], bytes).expect("fits");
    let source = "graph @g {\n  input %x : f32[N]\nforward:\n  %r : f32[N] = relu %x\n  %n : f32[N] = neg %x\n\
                  %a : bf16[N] = cast %x\n  %b : bf16[N] = cast %r\n  %c : bf16[N] = cast %n\n  return %a, %b, %c\n}\n";
    let plan = Arc::new(build(parse(source), &BuildOptions::default()).expect("has a plan"));
    for tier in Tier::ALL.into_iter().filter(|tier| tier.is_supported()) {
        let options = TrainerOptions { threads: 2, workers: 1, tier: Some(tier) };
        let mut trainer = Trainer::new(Arc::clone(&plan), &options).expect("compiles");
        let given = Values::from([("x".to_owned(), x.clone())]);
        let got = trainer.run(&given, Region::Comm).expect("runs");
        for (index, &value) in values.iter().enumerate() {
            let relu = if value < 0.0 { 0.0 } else { value };
            for (name, exact) in [("a", value), ("b", relu), ("c", -value)] {
                let rounded = Tensor::scalar(DType::BF16, f64::from(exact)).get_f64(0);
                let got = got[name].get_f64(index);
                let same = got == rounded || (got.is_nan() && rounded.is_nan());
                assert!(same, "{tier}: {name} of {value:e} is {got:e}, not {rounded:e}");
            }
        }
    }
}

#[test]
fn every_model_forward() {
    for model in [
        "digits_mlp",
        "digits_cnn",
        "mnist_cnn",
        "resnet8",
        "tiny_mobilenet",
        "tiny_bert",
        "tiny_gpt",
    ] {
        let path = support::root().join(format!("models/{model}.onnx"));
        let bytes = std::fs::read(path).expect("committed");
        let mut graph = qcompile_onnx::import(&bytes, &qcompile_onnx::ImportOptions::default())
            .expect("imports")
            .graph;
        compare(model, &graph, 2, Tier::detect());
        qcompile_passes::simplify::run(&mut graph, &Default::default()).expect("simplifies");
        compare(model, &graph, 2, Tier::detect());
        let products = graph.len();
        qcompile_passes::attention::run(&mut graph).expect("finds attention");
        assert_eq!(graph.len() < products, matches!(model, "tiny_bert" | "tiny_gpt"), "{model}");
        compare(model, &graph, 2, Tier::detect());
    }
}

#[test]
fn wide_and_deep_products_with_an_epilogue() {
    for (batch, channels, out) in
        [(3, 320, 1280), (1, 64, 1040), (5, 32, 700), (2, 300, 2100), (2, 257, 33), (1, 640, 70)]
    {
        let source = format!(
            "graph @g {{\n  input %x : f32[N, 7, 7, {channels}]\n\
             param %w : f32[{out}, {channels}, 1, 1] = uniform seed=2\nforward:\n\
             %y : f32[N, 7, 7, {out}] = conv2d %x, %w input=[7, 7] kernel=[1, 1] strides=[1, 1] \
             pads=[0, 0, 0, 0] dilations=[1, 1] groups=1\n\
             %z : f32[N, 7, 7, {out}] = relu %y\nreturn %z\n}}\n"
        );
        compare(&format!("1x1 to {out}"), &parse(&source), batch, Tier::detect());
        let source = format!(
            "graph @g {{\n  input %x : f32[N, {channels}]\n\
             param %w : f32[{channels}, {out}] = uniform seed=2\nforward:\n\
             %y : f32[N, {out}] = matmul %x, %w\n%z : f32[N, {out}] = relu %y\nreturn %z\n}}\n"
        );
        compare(&format!("matmul to {out}"), &parse(&source), 49 * batch, Tier::detect());
    }
}

/// Attention, forward and by every operand, of values that are seen through strides.
fn attention(
    dtype: &str,
    [rows, keys, heads, groups]: [usize; 4],
    mask: &str,
    causal: bool,
    products: &str,
) -> String {
    let attributes = if causal { "scale=0.6 causal" } else { "scale=0.6" };
    let attributes = format!("{attributes} products={products}");
    let (width, value_width) = (9, 20);
    let (mask_operand, mask_input) = match mask {
        "" => (String::new(), String::new()),
        _ => (", %mask".to_owned(), format!("  input %mask : f32[{mask}]\n")),
    };
    let (q, k) = (format!("N, {rows}, {heads}, {width}"), format!("N, {keys}, {groups}, {width}"));
    let (v, y) = (
        format!("N, {keys}, {groups}, {value_width}"),
        format!("N, {rows}, {heads}, {value_width}"),
    );
    let both = width + value_width;
    let gradients: String = [("q", &q), ("k", &k), ("v", &v)]
        .iter()
        .map(|(of, dims)| {
            format!(
                "  %{of}.grad : {dtype}[{dims}] = attention_grad %q, %k, %v{mask_operand}, %dy {of} \
                 {attributes}\n"
            )
        })
        .collect();
    format!(
        "graph @g {{\n  input %queries : {dtype}[N, {heads}, {rows}, {width}]\n\
         input %both : {dtype}[N, {keys}, {groups}, {both}]\n{mask_input}\
         input %dy : {dtype}[{y}]\nforward:\n\
         %q : {dtype}[{q}] = transpose %queries permutation=[0, 2, 1, 3]\n\
         %k : {dtype}[{k}] = slice %both axis=3 start=0 end={width} step=1\n\
         %v : {dtype}[{v}] = slice %both axis=3 start={width} end={both} step=1\n\
         %y : {dtype}[{y}] = attention %q, %k, %v{mask_operand} {attributes}\nbackward:\n{gradients}\
         return %y, %q.grad, %k.grad, %v.grad\n}}\n"
    )
}

#[test]
fn attention_of_every_form() {
    for (dtype, sizes, mask, causal) in [
        ("bf16 bf16", [50, 50, 2, 2], "", true),
        ("bf16 bf16", [90, 91, 4, 1], "N, 1, 90, 91", true),
        ("bf16 bf16", [17, 30, 4, 1], "N, 1, 17, 30", false),
        ("f32", [1, 1, 1, 1], "", true),
        ("f32", [1, 33, 2, 1], "1, 1, 1, 33", false),
        ("f32", [90, 90, 2, 2], "", true),
        ("f32", [75, 40, 4, 2], "N, 1, 1, 40", false),
        ("f32", [40, 75, 3, 3], "1, 3, 40, 75", true),
        ("f32", [20, 20, 2, 2], "N, 2, 20, 20", false),
        ("bf16", [50, 50, 2, 2], "", true),
        ("bf16", [17, 30, 4, 1], "N, 1, 17, 30", false),
    ] {
        let (dtype, products) = dtype.split_once(' ').unwrap_or((dtype, "f32"));
        let source = attention(dtype, sizes, mask, causal, products);
        let graph = parse(&source);
        for tier in Tier::ALL.into_iter().filter(|tier| tier.is_supported()) {
            let what = format!("attention of {dtype} in {products} {sizes:?}");
            compare(&what, &graph, 3, tier);
        }
        let plan = build(graph, &BuildOptions::default()).expect("has kernels");
        assert_eq!(plan.steps().len(), 2, "no operand is copied, gradients are one step:\n{plan}");
    }
}

/// The constants of a graph and the begin of its forward region, where an attention's operands become codes with a scale
/// each.
pub(crate) fn coded_operands(queries: &str, wide: &str) -> String {
    format!(
        "const %s : f32[] = 0.02\n  const %t : f32[] = 0.03\nforward:\n\
         %k.real : f32[{wide}, 9] = slice %z axis=3 start=0 end=9 step=1\n\
         %v.real : f32[{wide}, 20] = slice %z axis=3 start=9 end=29 step=1\n\
         %q.codes : i8[{queries}, 9] = quantize %x, %s i8\n\
         %k.codes : i8[{wide}, 9] = quantize %k.real, %s i8\n\
         %v.codes : i8[{wide}, 20] = quantize %v.real, %t i8\n\
         %q : f32[{queries}, 9] = dequantize %q.codes, %s\n\
         %k : f32[{wide}, 9] = dequantize %k.codes, %s\n\
         %v : f32[{wide}, 20] = dequantize %v.codes, %t\n"
    )
}

/// Attention on codes, with a scale of each operand, some with more keys than scores are held at once.
#[test]
fn attention_in_int8() {
    for (rows, keys, heads, groups, causal) in
        [(7, 7, 2, 2, true), (40, 75, 4, 2, false), (80, 80, 2, 1, true), (5, 1000, 1, 1, false)]
    {
        let causal = if causal { " causal" } else { "" };
        let (queries, wide) = (format!("N, {rows}, {heads}"), format!("N, {keys}, {groups}"));
        let operands = coded_operands(&queries, &wide);
        let source = format!(
            "graph @g {{\n  input %x : f32[{queries}, 9]\n  input %z : f32[{wide}, 29]\n\
             {operands}\
             %y : f32[{queries}, 20] = attention %q, %k, %v scale=0.6{causal} products=i8\n\
             return %y\n}}\n"
        );
        let graph = parse(&source);
        for tier in Tier::ALL.into_iter().filter(|tier| tier.is_supported()) {
            compare(&format!("attention in i8 {rows} x {keys}"), &graph, 2, tier);
        }
        let plan = build(graph, &BuildOptions::default()).expect("has kernels").to_string();
        assert!(plan.contains(" f32 scale 0.6"), "{plan}");
        assert!(plan.contains("products i8"), "{plan}");
        // What is rounded at once, the kernel writes so.
        let low = format!("%low : bf16[{queries}, 20] = cast %y\nreturn %low");
        let graph = parse(&source.replace("return %y", &low));
        for tier in Tier::ALL.into_iter().filter(|tier| tier.is_supported()) {
            compare(&format!("attention in i8 to bf16 {rows} x {keys}"), &graph, 2, tier);
        }
        let plan = build(graph, &BuildOptions::default()).expect("has kernels").to_string();
        assert!(plan.contains(" bf16 scale 0.6"), "{plan}");
    }
}

/// A cell, its gates, the sections of its result and the blocks of its gradient's.
pub(crate) type Cell = (&'static str, usize, usize, usize);

pub(crate) const CELLS: [Cell; 4] =
    [("lstm", 4, 6, 4), ("gru", 3, 4, 3), ("linear_gru", 3, 5, 4), ("rnn", 1, 1, 1)];

/// A layer and its gradient, with more hidden units than a panel has columns and more rows than a tile, and what the
/// products of each read; with `stochastic`, the gradient rounds at random.
pub(crate) fn recurrent(
    (cell, gates, sections, gradients): Cell,
    hidden: usize,
    [forward, backward]: [&str; 2],
) -> String {
    let (columns, back) = (gates * hidden, gradients * hidden);
    let activations = match cell {
        "lstm" => "[sigmoid, tanh, tanh]",
        "rnn" => "[tanh]",
        _ => "[sigmoid, tanh]",
    };
    let extra = match cell {
        "lstm" => ", %c",
        "linear_gru" => ", %b",
        _ => "",
    };
    let numbers = if backward.contains("stochastic") { ", %numbers" } else { "" };
    format!(
        "graph @g {{\n  input %x : f32[4, N, {columns}]\n  input %h : f32[N, {hidden}]\n\
         input %c : f32[N, {hidden}]\n  input %dh : f32[4, N, {hidden}]\n  input %lengths : i64[N]\n\
         const %r : f32[{columns}, {hidden}] = uniform seed=2 scale=0.2\n\
         const %b : f32[{hidden}] = uniform seed=3\n  const %step : i64[] = 5\nforward:\n\
         %numbers : f32[N, 4, {gradients}] = random %step seed=7\n\
         %y : f32[{sections}, 5, N, {hidden}] = recurrence %x, %r, %h{extra}, %lengths {cell} \
         activations={activations} lengths{forward}\n\
         %dx : f32[5, N, {back}] = recurrence_grad %y, %r, %dh, %lengths{numbers} {cell} \
         activations={activations} lengths{backward}\nreturn %y, %dx\n}}\n"
    )
}

#[test]
fn recurrent_layers_of_every_size() {
    for cell in CELLS {
        for (hidden, batches) in [(1, [1, 7]), (33, [2, 21]), (70, [9, 40])] {
            let source = recurrent(cell, hidden, ["", ""]);
            for tier in Tier::ALL.into_iter().filter(|tier| tier.is_supported()) {
                for batch in batches {
                    compare(&format!("{} of {hidden}", cell.0), &parse(&source), batch, tier);
                }
            }
        }
    }
}

/// Products that round what enters them. A state that differs in its last bit may round to another number, which few do:
/// the error is the norm of the difference.
#[test]
fn recurrent_layers_of_every_precision() {
    let bf16 = " products=bf16";
    for cell in CELLS {
        let i8 = " products=i8";
        let at_random = " products=i8 stochastic";
        let all =
            [([bf16, bf16], 5e-5), ([i8, bf16], 3e-4), ([i8, i8], 3e-4), ([i8, at_random], 3e-4)];
        for (products, limit) in all {
            for (hidden, batch) in [(1, 7), (33, 21), (70, 40)] {
                let graph = parse(&recurrent(cell, hidden, products));
                let given = inputs(&graph, batch);
                let run = |graph: &Graph| {
                    eval(graph, &given, batch, &EvalOptions::default()).expect("evaluated")
                };
                let wanted = run(&graph);
                let unrounded = run(&parse(&recurrent(cell, hidden, ["", ""])));
                let plan = build(graph, &BuildOptions { batch_size: batch }).expect("has kernels");
                let plan = Arc::new(plan);
                for tier in Tier::ALL.into_iter().filter(|tier| tier.is_supported()) {
                    let options = TrainerOptions { threads: 2, workers: 1, tier: Some(tier) };
                    let mut trainer = Trainer::new(Arc::clone(&plan), &options).expect("compiles");
                    let got = trainer.run(&given, Region::Comm).expect("runs");
                    for (output, got) in &got {
                        let [wanted, unrounded] = [&wanted, &unrounded]
                            .map(|values| values.get_f64(output).expect("an output"));
                        let error = distance(&got.to_f64(), &wanted);
                        let change = distance(&unrounded, &wanted);
                        let what = format!("{} of {hidden}{} on {tier}", cell.0, products.concat());
                        assert!(error <= limit, "{what}: {error:e}");
                        let rounds = hidden == 1 || change > 2.0 * limit;
                        assert!(rounds, "{what} rounds nothing: {change:e}");
                    }
                }
            }
        }
    }
}

/// The norm of the difference over that of the second.
pub(crate) fn distance(a: &[f64], b: &[f64]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied()).max(1e-30)
}
