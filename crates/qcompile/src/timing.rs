//! How long the steps of plans take.

use crate::error::Result;
use crate::resident::Resident;
use crate::synthetic;
use qcompile_plan::{Kernel, Plan};
use qcompile_runtime::{Trainer, TrainerOptions};
use serde::Serialize;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Median and spread of some times.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Quantiles {
    /// Half of the times are shorter.
    pub median: f64,
    /// One in ten is shorter.
    pub p10: f64,
    /// One in ten is longer.
    pub p90: f64,
}

impl Quantiles {
    /// Of these times, between neighbours where a quantile falls between them.
    #[must_use]
    pub fn of(mut times: Vec<f64>) -> Quantiles {
        times.sort_by(f64::total_cmp);
        let at = |part: f64| {
            let place = part * times.len().saturating_sub(1) as f64;
            let below = times.get(place.floor() as usize).copied().unwrap_or(0.0);
            let above = times.get(place.ceil() as usize).copied().unwrap_or(below);
            below + (above - below) * place.fract()
        };
        Quantiles { median: at(0.5), p10: at(0.1), p90: at(0.9) }
    }
}

/// What was measured of one plan.
#[derive(Debug, Clone, Serialize)]
pub struct Measured {
    /// The whole step in milliseconds.
    pub step_ms: Quantiles,
    /// Median of the forward pass.
    pub forward_ms: f64,
    /// Median of the backward pass.
    pub backward_ms: f64,
    /// Median of the exchange between workers.
    pub reduce_ms: f64,
    /// Median of the update.
    pub update_ms: f64,
    /// 10^9 multiplications and additions of products a second.
    pub gflops: f64,
    /// Memory of the plan while it runs, as it is laid out.
    pub peak_bytes: usize,
    /// The most memory that the process had beside what was there before the trainer and its batch, as the system counts it.
    pub resident_bytes: Option<usize>,
    /// Threads that it ran on.
    pub threads: usize,
    /// Samples in a step.
    pub batch_size: usize,
    /// Steps measured.
    pub steps: usize,
}

/// One plan that is being measured.
struct Runner {
    trainer: Trainer,
    inputs: qcompile_runtime::Values,
    batch: usize,
    times: [Vec<f64>; 5],
    resident: Option<usize>,
}

impl Runner {
    fn new(plan: &Arc<Plan>, batch: usize, options: &TrainerOptions) -> Result<Runner> {
        let inputs = synthetic::inputs(plan.graph(), batch, 1);
        let resident = Resident::begin();
        let mut trainer = Trainer::new(Arc::clone(plan), options)?;
        // The first step touches all memory.
        trainer.timed_step(&inputs)?;
        let resident = resident.and_then(|resident| resident.peak());
        Ok(Runner { trainer, inputs, batch, times: Default::default(), resident })
    }

    fn run(&mut self) -> Result<()> {
        let begin = Instant::now();
        let (_, regions) = self.trainer.timed_step(&self.inputs)?;
        let whole = begin.elapsed();
        let parts = [whole, regions.forward, regions.backward, regions.comm, regions.update];
        for (times, part) in self.times.iter_mut().zip(parts) {
            times.push(part.as_secs_f64() * 1e3);
        }
        Ok(())
    }

    fn finish(self) -> Measured {
        let steps = self.times[0].len();
        let [step_ms, forward, backward, reduce, update] = self.times.map(Quantiles::of);
        let flops = product_flops(self.trainer.plan(), self.batch);
        Measured {
            step_ms,
            forward_ms: forward.median,
            backward_ms: backward.median,
            reduce_ms: reduce.median,
            update_ms: update.median,
            gflops: if step_ms.median > 0.0 { flops / step_ms.median / 1e6 } else { 0.0 },
            peak_bytes: self.trainer.bytes(),
            resident_bytes: self.resident,
            threads: self.trainer.threads(),
            batch_size: self.batch,
            steps,
        }
    }
}

/// Measures the steps of these plans in turns for about `duration` in all, each at least `least` times.
///
/// # Errors
/// Of running them.
pub fn measure(
    plans: &[Arc<Plan>],
    batch: usize,
    options: &TrainerOptions,
    duration: Duration,
    least: usize,
) -> Result<Vec<Measured>> {
    let made = plans.iter().map(|plan| Runner::new(plan, batch, options));
    let mut runners = made.collect::<Result<Vec<Runner>>>()?;
    let begin = Instant::now();
    let mut rounds = 0;
    while rounds < least.max(1) || begin.elapsed() < duration {
        for runner in &mut runners {
            runner.run()?;
        }
        rounds += 1;
    }
    Ok(runners.into_iter().map(Runner::finish).collect())
}

/// Multiplications and additions of all products of a step.
#[must_use]
pub fn product_flops(plan: &Plan, batch: usize) -> f64 {
    plan.steps().iter().map(|step| step.work(batch).flops).sum()
}

/// One kernel of a step, measured alone.
#[derive(Debug, Clone, Serialize)]
pub struct StepTime {
    /// The (last) value that it computes.
    pub name: String,
    /// When it runs.
    pub region: &'static str,
    /// What runs.
    pub kernel: &'static str,
    /// Median in milliseconds.
    pub ms: f64,
    /// 10^9 multiplications and additions a second; 0 for what is no product.
    pub gflops: f64,
    /// 10^9 bytes of operands and results of loops and epilogues a second.
    pub gbytes: f64,
}

/// Measures every kernel of a plan alone, all threads meeting before and after: `rounds` steps, medians.
///
/// # Errors
/// Of running them.
pub fn profile(
    plan: &Arc<Plan>,
    batch: usize,
    options: &TrainerOptions,
    rounds: usize,
) -> Result<Vec<StepTime>> {
    let mut trainer = Trainer::new(Arc::clone(plan), options)?;
    let inputs = synthetic::inputs(plan.graph(), batch, 1);
    // The first step touches all memory.
    trainer.profile(&inputs)?;
    let mut times: Vec<Vec<f64>> = vec![Vec::new(); plan.steps().len()];
    for _ in 0..rounds.max(1) {
        for (times, time) in times.iter_mut().zip(trainer.profile(&inputs)?) {
            times.push(time.as_secs_f64() * 1e3);
        }
    }
    // What lasts is not made in every step.
    let every = plan.steps().iter().zip(times).filter(|(step, _)| !step.lasting);
    let measured = every.map(|(step, times)| {
        let ms = Quantiles::of(times).median;
        let work = step.work(batch);
        let rate = |amount: f64| if ms > 0.0 { amount / ms / 1e6 } else { 0.0 };
        let kernel = match &step.kernel {
            Kernel::Loops(_) => "loops",
            Kernel::Primitive(primitive) => primitive.name(),
            Kernel::AllReduce { .. } => "all_reduce",
        };
        StepTime {
            name: step.name.clone(),
            region: step.region.name(),
            kernel,
            ms,
            gflops: rate(work.flops),
            gbytes: rate(work.bytes),
        }
    });
    Ok(measured.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcompile_ir::text;

    #[test]
    fn quantiles_fall_between_neighbours() {
        let q = Quantiles::of(vec![3.0, 1.0, 2.0]);
        assert_eq!((q.median, q.p10, q.p90), (2.0, 1.2, 2.8));
        assert_eq!(Quantiles::of(Vec::new()), Quantiles::default());
        assert_eq!(Quantiles::of(vec![5.0]).p90, 5.0);
    }

    #[test]
    fn counts_what_products_compute() {
        let source = "graph @g {
  input %x : f32[N, 8]
  param %w : f32[8, 4] = uniform seed=7
forward:
  %y : f32[N, 4] = matmul %x, %w
  return %y
}
";
        let graph = text::parse(source, &|_| None).unwrap();
        let plan = qcompile_plan::build(graph, &Default::default()).unwrap();
        assert_eq!(product_flops(&plan, 3), 2.0 * 3.0 * 8.0 * 4.0);
    }
}
