//! Prints how fast `y = x · wᵀ` runs as a plan, with x and y stored in bf16 and w in f32: in f32, in bf16 and in int8,
//! there with one scale for x, one for each column of w, all found in each run: `int8 [threads] [tier] [rounds]`.
//!
//! Of each step of a plan the shortest time of all rounds counts, which go round all plans of a shape, so that a crowded
//! machine disturbs little.
#![allow(clippy::print_stdout, reason = "the output of the example")]

use qcompile_ir::{DType, Tensor, text};
use qcompile_kernels::Tier;
use qcompile_plan::{BuildOptions, Kernel, build};
use qcompile_runtime::{Trainer, TrainerOptions};
use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

const SHAPES: [[usize; 3]; 12] = [
    [256, 256, 256],
    [512, 512, 512],
    [1024, 1024, 1024],
    [2048, 2048, 2048],
    [128, 1024, 784],
    [2048, 384, 384],
    [2048, 1536, 384],
    [2048, 384, 1536],
    [2048, 768, 768],
    [2048, 3072, 768],
    [4096, 512, 512],
    [3136, 256, 2304],
];

/// The graph of a product in one precision.
fn source(precision: &str, n: usize, k: usize) -> String {
    let leaves = format!(
        "input %x : bf16[N, {k}]\n  param %w : f32[{n}, {k}] = uniform seed=1\n  const %limit : f32[] = 127\n  \
         const %tiny : f32[] = 1e-30"
    );
    let low = match precision {
        "f32" => format!("%x.low : f32[N, {k}] = cast %x\n%w.low : f32[{n}, {k}] = reshape %w"),
        "bf16" => format!(
            "%x.low : f32[N, {k}] = cast %x\n%w.bf16 : bf16[{n}, {k}] = cast %w\n\
             %w.low : f32[{n}, {k}] = cast %w.bf16"
        ),
        _ => format!(
            "%x.f32 : f32[N, {k}] = cast %x\n%x.abs : f32[N, {k}] = abs %x.f32\n\
             %x.peak : f32[1, 1] = reduce_max %x.abs axes=[0, 1]\n%x.amax : f32[] = reshape %x.peak\n\
             %x.step : f32[] = div %x.amax, %limit\n%x.scale : f32[] = max %x.step, %tiny\n\
             %x.q : i8[N, {k}] = quantize %x.f32, %x.scale i8\n%x.low : f32[N, {k}] = dequantize %x.q, %x.scale\n\
             %w.abs : f32[{n}, {k}] = abs %w\n%w.peak : f32[{n}, 1] = reduce_max %w.abs axes=[1]\n\
             %w.amax : f32[{n}] = reshape %w.peak\n%w.limit : f32[{n}] = broadcast %limit\n\
             %w.step : f32[{n}] = div %w.amax, %w.limit\n%w.tiny : f32[{n}] = broadcast %tiny\n\
             %w.scale : f32[{n}] = max %w.step, %w.tiny\n%w.q : i8[{n}, {k}] = quantize %w, %w.scale i8 axis=0\n\
             %w.low : f32[{n}, {k}] = dequantize %w.q, %w.scale axis=0"
        ),
    };
    format!(
        "graph @product {{\n  {leaves}\nforward:\n{low}\n%sum : f32[N, {n}] = matmul %x.low, %w.low transpose_b\n\
         %y : bf16[N, {n}] = cast %sum\n  return %y\n}}\n"
    )
}

/// A plan with the shortest time of each of its steps.
struct Timed {
    trainer: Trainer,
    best: Vec<Duration>,
}

impl Timed {
    fn new(
        precision: &str,
        [m, n, k]: [usize; 3],
        options: &TrainerOptions,
    ) -> Result<Timed, Box<dyn Error>> {
        let graph = text::parse(&source(precision, n, k), &|_| None)?;
        let plan = Arc::new(build(graph, &BuildOptions { batch_size: m })?);
        let best = vec![Duration::MAX; plan.steps().len()];
        Ok(Timed { trainer: Trainer::new(plan, options)?, best })
    }

    /// Milliseconds of the product, of what rounds its operands, and of what looks for their largest values.
    fn milliseconds(&self) -> [f64; 3] {
        let mut parts = [0.0; 3];
        for (step, time) in self.trainer.plan().steps().iter().zip(&self.best) {
            let part = match &step.kernel {
                Kernel::Primitive(_) => 0,
                _ if step.name.ends_with(".q") || step.name.ends_with(".bf16") => 1,
                _ => 2,
            };
            parts[part] += time.as_secs_f64() * 1e3;
        }
        parts
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments.next().map_or(Ok(1), |word| word.parse())?;
    let tier = match arguments.next() {
        Some(word) => word.parse::<Tier>().map_err(|error| error.to_string())?,
        None => Tier::detect(),
    };
    let rounds: usize = arguments.next().map_or(Ok(40), |word| word.parse())?;
    let options = TrainerOptions { threads, workers: 1, tier: Some(tier) };
    println!("{tier}, {threads} threads, ms and 10^9 operations a second");
    println!(
        "{:16} {:>13} {:>13} {:>13} {:>13} {:>13} {:>10}",
        "m x n x k", "f32", "bf16", "int8 alone", "with rounding", "with amax", "over bf16"
    );
    for shape in SHAPES {
        let [m, n, k] = shape;
        let values: Vec<f64> = (0..m * k).map(|at| (at * 37 % 101) as f64 / 50.0 - 1.0).collect();
        let x = Tensor::from_f64(DType::BF16, &[m, k], &values).ok_or("sizes fit")?;
        let given = BTreeMap::from([("x".to_owned(), x)]);
        let mut plans = Vec::new();
        for precision in ["f32", "bf16", "int8"] {
            plans.push(Timed::new(precision, shape, &options)?);
        }
        for _ in 0..rounds {
            for plan in &mut plans {
                let times = plan.trainer.profile(&given)?;
                plan.best.iter_mut().zip(times).for_each(|(best, time)| *best = time.min(*best));
            }
        }
        let [f32, bf16, int8] = [0, 1, 2].map(|at| plans[at].milliseconds());
        let sum = |parts: &[f64]| parts.iter().sum::<f64>();
        let operations = 2.0 * (m * n * k) as f64 / 1e6;
        let cell = |time: f64| format!("{time:.2} {:5.0}", operations / time);
        println!(
            "{:16} {:>13} {:>13} {:>13} {:>13} {:>13} {:>10.2}",
            format!("{m} x {n} x {k}"),
            cell(sum(&f32)),
            cell(sum(&bf16)),
            cell(int8[0]),
            cell(sum(&int8[..2])),
            cell(sum(&int8)),
            sum(&bf16) / sum(&int8)
        );
    }
    Ok(())
}
