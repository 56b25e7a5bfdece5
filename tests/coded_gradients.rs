//! Gradients of attention whose products are in int8, against the reference evaluator.

use crate::oracle::{CELLS, coded_operands, distance, inputs, parse, recurrent};
use qcompile_ir::eval::{EvalOptions, eval};
use qcompile_ir::{DType, Region, Tensor};
use qcompile_kernels::Tier;
use qcompile_plan::{BuildOptions, build};
use qcompile_runtime::{Trainer, TrainerOptions};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A value beside the border between two codes may get either of them, which few do: the error is the norm of the difference.
const LIMIT: f64 = 1e-3;

/// Attention with codes of a scale for each operand, and its gradients by all of them.
fn source(
    [rows, keys, heads, groups]: [usize; 4],
    mask: &str,
    causal: bool,
    products: &str,
) -> String {
    let attributes = if causal { "scale=0.6 causal" } else { "scale=0.6" };
    let (operand, input) = match mask {
        "" => (String::new(), String::new()),
        _ => (", %mask".to_owned(), format!("  input %mask : f32[{mask}]\n")),
    };
    let (queries, wide) = (format!("N, {rows}, {heads}"), format!("N, {keys}, {groups}"));
    let numbers = if products.contains("stochastic") { ", %numbers" } else { "" };
    let gradients: String = [("q", &queries, 9), ("k", &wide, 9), ("v", &wide, 20)]
        .iter()
        .map(|(of, dims, width)| {
            format!(
                "%d{of} : f32[{dims}, {width}] = attention_grad %q, %k, %v{operand}, %dy{numbers} {of} \
                 {attributes}{products}\n"
            )
        })
        .collect();
    let operands = coded_operands(&queries, &wide);
    format!(
        "graph @g {{\n  input %x : f32[{queries}, 9]\n  input %z : f32[{wide}, 29]\n{input}\
         input %dy : f32[{queries}, 20]\n  input %step : i64[]\n\
         {operands}%numbers : f32[{queries}, 2] = random %step seed=3\nbackward:\n{gradients}\
         return %dq, %dk, %dv\n}}\n"
    )
}

/// Sizes, masks and whether later keys are hidden.
const CASES: [([usize; 4], &str, bool); 7] = [
    ([7, 7, 2, 2], "", true),
    ([40, 75, 4, 2], "", false),
    ([150, 150, 2, 1], "", true),
    ([70, 33, 2, 2], "N, 1, 1, 33", false),
    ([64, 90, 1, 1], "1, 1, 64, 90", true),
    ([70, 1000, 1, 1], "", false),
    ([1000, 1000, 1, 1], "", true),
];

fn agree(rounding: &str) {
    for (sizes, mask, causal) in CASES {
        let batch = 2;
        let graph = parse(&source(sizes, mask, causal, &format!(" products=i8{rounding}")));
        let unrounded = parse(&source(sizes, mask, causal, ""));
        let given = inputs(&graph, batch);
        let [wanted, unrounded] = [&graph, &unrounded]
            .map(|graph| eval(graph, &given, batch, &EvalOptions::default()).expect("evaluated"));
        let plan =
            Arc::new(build(graph, &BuildOptions { batch_size: batch }).expect("has kernels"));
        assert_eq!(plan.to_string().matches("products i8").count(), 1, "{plan}");
        assert_eq!(plan.to_string().contains("at random"), !rounding.is_empty(), "{plan}");
        for tier in Tier::ALL.into_iter().filter(|tier| tier.is_supported()) {
            let mut first = None;
            for threads in [1, 3] {
                let options = TrainerOptions { threads, workers: 1, tier: Some(tier) };
                let mut trainer = Trainer::new(Arc::clone(&plan), &options).expect("compiles");
                let got = trainer.run(&given, Region::Comm).expect("runs");
                for (output, got) in &got {
                    let [wanted, unrounded] = [&wanted, &unrounded]
                        .map(|values| values.get_f64(output).expect("an output"));
                    let error = distance(&got.to_f64(), &wanted);
                    let change = distance(&unrounded, &wanted);
                    let what = format!("{output} of {sizes:?} on {tier}");
                    assert!(error <= LIMIT, "{what}: {error:e}");
                    let rounds = change > 3.0 * error;
                    assert!(rounds, "{what} rounds nothing: {change:e}, {error:e}");
                }
                let first = first.get_or_insert_with(|| got.clone());
                assert_eq!(*first, got, "{sizes:?} on {tier}: {threads} threads");
            }
        }
    }
}

#[test]
fn gradients_of_attention_in_int8() {
    agree("");
}

#[test]
fn gradients_of_attention_in_int8_rounded_at_random() {
    agree(" stochastic");
}

/// The kernel reads and writes bf16 where all that is used of it is rounded to that, which gives the bits of the casts.
#[test]
fn gradients_of_attention_in_int8_are_rounded_as_they_are_written() {
    let sizes = [40, 75, 4, 2];
    let source = source(sizes, "", false, " products=i8");
    let (body, _) = source.split_once("return").expect("returns");
    let body = body
        .replace("input %dy : f32", "input %low.dy : bf16")
        .replace("backward:\n", "%dy : f32[N, 40, 4, 20] = cast %low.dy\nbackward:\n");
    // All three rounded, or only some, which leaves them all to their casts.
    let rounded = |which: &[&str]| {
        let (mut casts, mut results) = (String::new(), Vec::new());
        for (of, dims) in [("dq", "40, 4, 9"), ("dk", "75, 2, 9"), ("dv", "75, 2, 20")] {
            let low = which.contains(&of);
            if low {
                casts += &format!("%low.{of} : bf16[N, {dims}] = cast %{of}\n");
            }
            results.push(if low { format!("%low.{of}") } else { format!("%{of}") });
        }
        parse(&format!("{body}{casts}return {}\n}}\n", results.join(", ")))
    };
    let (all, some) = (rounded(&["dq", "dk", "dv"]), rounded(&["dq", "dv"]));
    let given = inputs(&all, 2);
    let run = |graph| {
        let plan = Arc::new(build(graph, &BuildOptions { batch_size: 2 }).expect("has kernels"));
        let options = TrainerOptions { threads: 2, ..TrainerOptions::default() };
        let mut trainer = Trainer::new(Arc::clone(&plan), &options).expect("compiles");
        (plan.to_string(), trainer.run(&given, Region::Comm).expect("runs"))
    };
    let ((narrow, values), (wide, others)) = (run(all), run(some));
    assert!(narrow.contains(" bf16 scale 0.6 products i8"), "{narrow}");
    assert!(wide.contains(" f32 scale 0.6 products i8"), "{wide}");
    assert_eq!(values["low.dq"], others["low.dq"]);
    assert_eq!(values["low.dv"], others["low.dv"]);
    let dk = Tensor::from_f64(DType::BF16, &[2, 75, 2, 9], &others["dk"].to_f64());
    assert_eq!(Some(&values["low.dk"]), dk.as_ref());
}

/// The outputs of a plan in many steps, each an average over them.
fn means(source: &str, batch: usize, steps: u32) -> BTreeMap<String, Vec<f64>> {
    let graph = parse(source);
    let mut given = inputs(&graph, batch);
    let plan = Arc::new(build(graph, &BuildOptions { batch_size: batch }).expect("has kernels"));
    let mut trainer = Trainer::new(plan, &TrainerOptions::default()).expect("compiles");
    let mut sums = BTreeMap::<String, Vec<f64>>::new();
    for step in 0..steps {
        let step = Tensor::from_f64(DType::I64, &[], &[f64::from(step)]).expect("one");
        given.insert("step".to_owned(), step);
        for (output, got) in trainer.run(&given, Region::Comm).expect("runs") {
            let got = got.to_f64();
            let sum = sums.entry(output).or_insert_with(|| vec![0.0; got.len()]);
            sum.iter_mut().zip(got).for_each(|(sum, x)| *sum += x / f64::from(steps));
        }
    }
    sums
}

/// What is rounded at random is right on average, which what is rounded to nearest is not. The codes of the exponentials
/// are to nearest in both, so the gradient of values comes less near.
#[test]
fn the_mean_of_many_roundings_is_the_gradient() {
    let (sizes, mask, causal) = CASES[1];
    let of = |products: &str, steps: u32| means(&source(sizes, mask, causal, products), 2, steps);
    let (exact, nearest) = (of("", 1), of(" products=i8", 1));
    let (one, many) = (of(" products=i8 stochastic", 1), of(" products=i8 stochastic", 400));
    for (output, exact) in &exact {
        let [nearest, one, many] = [&nearest, &one, &many].map(|all| distance(&all[output], exact));
        let what = format!("{output}: nearest {nearest:e}, at random {one:e}, their mean {many:e}");
        let [of_nearest, of_one] = if output == "dv" { [0.95, 0.8] } else { [0.5, 0.3] };
        assert!(many < of_nearest * nearest && many < of_one * one, "{what}");
    }
    let cell = CELLS[0];
    let of = |backward: &str, steps: u32| {
        let source = recurrent(cell, 33, ["", backward])
            .replace("const %step : i64[] = 5", "input %step : i64[]");
        means(&source, 8, steps).remove("dx").expect("an output")
    };
    let exact = of("", 1);
    let [nearest, one, many] = [
        of(" products=i8", 1),
        of(" products=i8 stochastic", 1),
        of(" products=i8 stochastic", 400),
    ]
    .map(|dx| distance(&dx, &exact));
    let what = format!("lstm: nearest {nearest:e}, at random {one:e}, their mean {many:e}");
    // R is rounded to nearest in both.
    assert!(many < 0.7 * nearest && many < 0.5 * one, "{what}");
}
