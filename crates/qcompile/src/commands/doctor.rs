//! `qcompile doctor`: what this machine offers, whether it computes correctly, and how fast.

use super::{print_json, timings_path};
use crate::cli::DoctorCommand;
use crate::error::{Code, Error, Result};
use crate::machine::{cores, cpu_name, features, memory};
use crate::output::print;
use crate::street::{Draft, Pass, Street};
use crate::synthetic;
use crate::terminal::{Show, bytes};
use crate::timing::profile;
use crate::{about::About, options::Options};
use qcompile_ir::eval::{EvalOptions, eval};
use qcompile_ir::{DType, Graph, Region, Tensor, text};
use qcompile_kernels::Tier;
use qcompile_passes::attach_loss::LossKind;
use qcompile_passes::quantize::{Numerics, PrecisionChoice};
use qcompile_plan::{BuildOptions, build};
use qcompile_runtime::{Trainer, TrainerOptions};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A network of every kind of product.
const NETWORK: &str = "graph @doctor {
  input %x : f32[N, 8, 8, 3]
  param %conv : f32[16, 3, 3, 3] = normal seed=1 scale=0.3
  param %fc : f32[256, 10] = normal seed=2 scale=0.1
forward:
  %y : f32[N, 8, 8, 16] = conv2d %x, %conv input=[8, 8] kernel=[3, 3] strides=[1, 1] pads=[1, 1, 1, 1] dilations=[1, 1] groups=1
  %a : f32[N, 8, 8, 16] = relu %y
  %p : f32[N, 4, 4, 16] = max_pool2d %a input=[8, 8] kernel=[2, 2] strides=[2, 2] pads=[0, 0, 0, 0] dilations=[1, 1]
  %flat : f32[N, 256] = reshape %p
  %logits : f32[N, 10] = matmul %flat, %fc
  return %logits
}
";

/// Products of layers as large as those of usual networks, with their number of samples.
const LARGE: [(&str, usize); 2] = [
    (
        "graph @matrices {
  input %x : f32[N, 1024]
  param %w1 : f32[1024, 1024] = normal seed=1 scale=0.03
  param %w2 : f32[1024, 1024] = normal seed=2 scale=0.03
forward:
  %y : f32[N, 1024] = matmul %x, %w1
  %a : f32[N, 1024] = relu %y
  %logits : f32[N, 1024] = matmul %a, %w2
  return %logits
}
",
        512,
    ),
    (
        "graph @convolutions {
  input %x : f32[N, 28, 28, 64]
  param %w1 : f32[64, 64, 3, 3] = normal seed=1 scale=0.04
  param %w2 : f32[64, 64, 3, 3] = normal seed=2 scale=0.04
  param %fc : f32[3136, 10] = normal seed=3 scale=0.02
forward:
  %y : f32[N, 28, 28, 64] = conv2d %x, %w1 input=[28, 28] kernel=[3, 3] strides=[1, 1] pads=[1, 1, 1, 1] dilations=[1, 1] groups=1
  %a : f32[N, 28, 28, 64] = relu %y
  %z : f32[N, 28, 28, 64] = conv2d %a, %w2 input=[28, 28] kernel=[3, 3] strides=[1, 1] pads=[1, 1, 1, 1] dilations=[1, 1] groups=1
  %p : f32[N, 7, 7, 64] = max_pool2d %z input=[28, 28] kernel=[4, 4] strides=[4, 4] pads=[0, 0, 0, 0] dilations=[1, 1]
  %flat : f32[N, 3136] = reshape %p
  %logits : f32[N, 10] = matmul %flat, %fc
  return %logits
}
",
        8,
    ),
];
/// Kernels whose speed is told: of each the fastest, as the product at the end of a network is small.
const KERNELS: [&str; 4] = ["matmul", "conv2d", "conv2d_grad_input", "conv2d_grad_weight"];
/// Steps that speed is measured in, of each precision.
const ROUNDS: usize = 5;

/// Samples of the self-test.
const BATCH: usize = 4;
/// Largest relative difference from the reference: of rounding in another order, and of values that int8 rounds to
/// the other side.
const LIMITS: [(PrecisionChoice, f64); 3] =
    [(PrecisionChoice::F32, 1e-4), (PrecisionChoice::Bf16, 2e-2), (PrecisionChoice::Int8, 2e-2)];

pub(super) fn run(command: &DoctorCommand) -> Result<()> {
    let tests = self_test()?;
    let speeds = speeds()?;
    let bad: Vec<String> = tests
        .iter()
        .filter(|test| !test.is_good())
        .map(|test| format!("{} in {}", test.tier, test.precision.name()))
        .collect();
    if command.talk.json {
        print_json(&document(&tests, &speeds), false)?;
    } else {
        print(&report(&tests, &speeds))?;
    }
    if bad.is_empty() {
        return Ok(());
    }
    Err(Error::new(Code::Internal, format!("the self-test failed: {}", bad.join(", ")))
        .help("please report this with the output of `qcompile doctor --json`"))
}

/// One comparison with the reference.
struct Test {
    tier: Tier,
    precision: PrecisionChoice,
    /// Largest difference of loss or a gradient, relative to the largest magnitude of its tensor.
    error: f64,
    limit: f64,
}

impl Test {
    fn is_good(&self) -> bool {
        self.error <= self.limit
    }
}

fn self_test() -> Result<Vec<Test>> {
    let mut tests = Vec::new();
    for (precision, limit) in LIMITS {
        let graph = network(NETWORK, precision)?;
        let mut inputs = synthetic::inputs(&graph, BATCH, 5);
        // Every sample counts.
        inputs.entry("label".to_owned()).and_modify(|label| {
            let classes: Vec<f64> = (0..BATCH).map(|sample| sample as f64).collect();
            if let Some(labels) = Tensor::from_f64(DType::I64, &[BATCH], &classes) {
                *label = labels;
            }
        });
        let wanted = eval(&graph, &inputs, BATCH, &EvalOptions::default())
            .map_err(|e| Error::new(Code::Internal, e.to_string()))?;
        let wanted: BTreeMap<String, Tensor> = wanted.outputs().into_iter().collect();
        let plan = Arc::new(build(graph, &BuildOptions { batch_size: BATCH })?);
        for tier in Tier::ALL.into_iter().filter(|tier| tier.is_supported()) {
            let options = TrainerOptions { threads: 0, workers: 1, tier: Some(tier) };
            let mut trainer = Trainer::new(Arc::clone(&plan), &options)?;
            let got = trainer.run(&inputs, Region::Backward)?;
            let errors = wanted.iter().map(|(name, wanted)| match got.get(name) {
                Some(got) => difference(got, wanted),
                None => f64::INFINITY,
            });
            let error = errors.fold(0.0, f64::max);
            tests.push(Test { tier, precision, error, limit });
        }
    }
    Ok(tests)
}

/// The graph of this text up to its gradients.
fn network(source: &str, precision: PrecisionChoice) -> Result<Graph> {
    let broken = |e: String| Error::new(Code::Internal, e);
    let graph = text::parse(source, &|_| None).map_err(|e| broken(e.to_string()))?;
    let about = About::of_graph(&graph);
    let mut draft = Draft::new(graph, about);
    // All three products of a layer in int8.
    let grad_weight = (precision == PrecisionChoice::Int8).then_some(DType::I8);
    let numerics = Numerics { grad_weight, ..Numerics::default() };
    let loss = Some(LossKind::CrossEntropy);
    let options = Options { loss, precision, numerics, ..Options::default() };
    let mut nothing = |_: Pass, _: &Draft, _: std::time::Duration| Ok(());
    Street::new(&options, Show::Nothing, &mut nothing).run(&mut draft, Pass::MoveRoundings)?;
    Ok(draft.graph)
}

/// How fast a kernel is in each precision of [`LIMITS`]: 10^9 multiplications and additions a second.
struct Speed {
    kernel: &'static str,
    gflops: Vec<f64>,
}

/// The speeds of the [`KERNELS`] on all cores, as a step runs them.
fn speeds() -> Result<Vec<Speed>> {
    let mut speeds: Vec<Speed> =
        KERNELS.iter().map(|kernel| Speed { kernel, gflops: Vec::new() }).collect();
    for (precision, _) in LIMITS {
        let mut best = [0.0_f64; KERNELS.len()];
        for (source, batch) in LARGE {
            let plan = build(network(source, precision)?, &BuildOptions { batch_size: batch })?;
            let trainer = TrainerOptions::default();
            for step in profile(&Arc::new(plan), batch, &trainer, ROUNDS)? {
                let kernel = step.kernel.trim_end_matches("_bf16").trim_end_matches("_i8");
                if let Some(at) = KERNELS.iter().position(|name| *name == kernel) {
                    best[at] = best[at].max(step.gflops);
                }
            }
        }
        speeds.iter_mut().zip(best).for_each(|(speed, gflops)| speed.gflops.push(gflops));
    }
    Ok(speeds)
}

/// NaN is as far away as can be.
fn difference(got: &Tensor, wanted: &Tensor) -> f64 {
    let wanted = wanted.to_f64();
    let largest = wanted.iter().fold(0.0_f64, |most, value| most.max(value.abs()));
    let pairs = got.to_f64().into_iter().zip(&wanted);
    let worst = pairs.fold(0.0_f64, |worst, (got, wanted)| {
        let apart = (got - wanted).abs();
        if apart.is_nan() { f64::INFINITY } else { worst.max(apart) }
    });
    worst / largest.max(1e-30)
}

fn word(there: bool) -> &'static str {
    if there { "yes" } else { "no" }
}

fn report(tests: &[Test], speeds: &[Speed]) -> String {
    let mut out = String::new();
    let mut line = |name: &str, text: String| {
        out.push_str(&format!(" {name:<13} {}\n", crate::error::escaped(&text)));
    };
    line("qcompile", env!("CARGO_PKG_VERSION").to_owned());
    line("system", format!("{} {}", std::env::consts::OS, std::env::consts::ARCH));
    line("CPU", cpu_name());
    line("cores", cores().to_string());
    if let Some((total, available)) = memory() {
        line("memory", format!("{}, {} available", bytes(total), bytes(available)));
    }
    let features: Vec<String> =
        features().iter().map(|(name, there)| format!("{name} {}", word(*there))).collect();
    line("features", features.join(", "));
    line("tier", Tier::detect().to_string());
    let timings =
        timings_path().map_or_else(|| "none".to_owned(), |path| path.display().to_string());
    line("timings", timings);
    for test in tests {
        let outcome = if test.is_good() { "ok" } else { "FAILED" };
        let Test { tier, precision, error, .. } = test;
        let tier = tier.to_string();
        line(
            "self-test",
            format!("{tier:<11} {:<5} {outcome}, error {error:.1e}", precision.name()),
        );
    }
    for Speed { kernel, gflops } in speeds {
        let each = LIMITS.iter().zip(gflops);
        let each: Vec<String> = each
            .map(|((precision, _), gflops)| format!("{} {gflops:.0}", precision.name()))
            .collect();
        line("speed", format!("{kernel:<18} {} GFLOP/s", each.join(", ")));
    }
    out
}

fn document(tests: &[Test], speeds: &[Speed]) -> Value {
    let tests: Vec<Value> = tests
        .iter()
        .map(|test| {
            json!({
                "tier": test.tier.to_string(),
                "precision": test.precision.name(),
                "error": test.error,
                "ok": test.is_good(),
            })
        })
        .collect();
    let speeds: Vec<Value> = speeds
        .iter()
        .flat_map(|Speed { kernel, gflops }| {
            LIMITS.iter().zip(gflops).map(move |((precision, _), gflops)| {
                json!({ "kernel": kernel, "precision": precision.name(), "gflops": gflops })
            })
        })
        .collect();
    let features: BTreeMap<&str, bool> = features().into_iter().collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "system": format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        "cpu": cpu_name(),
        "cores": cores(),
        "memory_bytes": memory().map(|(total, _)| total),
        "features": features,
        "tier": Tier::detect().to_string(),
        "timings": timings_path().map(|path| path.display().to_string()),
        "self_test": tests,
        "speeds": speeds,
    })
}
