//! Gradients of attention whose products are in int8, against the reference evaluator.

use crate::oracle::{coded_operands, distance, inputs, parse};
use qcompile_ir::Region;
use qcompile_ir::eval::{EvalOptions, eval};
use qcompile_kernels::Tier;
use qcompile_plan::{BuildOptions, build};
use qcompile_runtime::{Trainer, TrainerOptions};
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
    let gradients: String = [("q", &queries, 9), ("k", &wide, 9), ("v", &wide, 20)]
        .iter()
        .map(|(of, dims, width)| {
            format!(
                "%d{of} : f32[{dims}, {width}] = attention_grad %q, %k, %v{operand}, %dy {of} \
                 {attributes}{products}\n"
            )
        })
        .collect();
    let operands = coded_operands(&queries, &wide);
    format!(
        "graph @g {{\n  input %x : f32[{queries}, 9]\n  input %z : f32[{wide}, 29]\n{input}\
         input %dy : f32[{queries}, 20]\n\
         {operands}backward:\n{gradients}\
         return %dq, %dk, %dv\n}}\n"
    )
}

#[test]
fn gradients_of_attention_in_int8() {
    for (sizes, mask, causal) in [
        ([7, 7, 2, 2], "", true),
        ([40, 75, 4, 2], "", false),
        ([150, 150, 2, 1], "", true),
        ([70, 33, 2, 2], "N, 1, 1, 33", false),
        ([64, 90, 1, 1], "1, 1, 64, 90", true),
        ([70, 1000, 1, 1], "", false),
        ([1000, 1000, 1, 1], "", true),
    ] {
        let batch = 2;
        let graph = parse(&source(sizes, mask, causal, " products=i8"));
        let unrounded = parse(&source(sizes, mask, causal, ""));
        let given = inputs(&graph, batch);
        let [wanted, unrounded] = [&graph, &unrounded]
            .map(|graph| eval(graph, &given, batch, &EvalOptions::default()).expect("evaluated"));
        let plan =
            Arc::new(build(graph, &BuildOptions { batch_size: batch }).expect("has kernels"));
        assert_eq!(plan.to_string().matches("products i8").count(), 1, "{plan}");
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
                    assert!(change > 2.0 * LIMIT, "{what} rounds nothing: {change:e}");
                }
                let first = first.get_or_insert_with(|| got.clone());
                assert_eq!(*first, got, "{sizes:?} on {tier}: {threads} threads");
            }
        }
    }
}
