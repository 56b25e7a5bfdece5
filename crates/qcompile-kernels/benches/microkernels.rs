//! The kernels of the best tier on one thread, under criterion: `cargo bench -p qcompile-kernels`, with a part of a name
//! to choose. `--example peak` prints the same as shares of what the core can do.

use cases::{Kind, Tier, Visit};
use criterion::{BenchmarkId, Criterion, Throughput};

#[path = "../examples/peak/cases.rs"]
mod cases;

struct Bench<'c>(&'c mut Criterion);

impl Visit for Bench<'_> {
    fn group(&mut self, _: &str) {}

    fn wants(&mut self, _: &str) -> bool {
        true
    }

    fn kernel(&mut self, shape: &str, column: &str, kind: Kind, work: f64, call: &dyn Fn()) {
        let mut group = self.0.benchmark_group(shape);
        group.sample_size(20).measurement_time(std::time::Duration::from_millis(500));
        group.warm_up_time(std::time::Duration::from_millis(50));
        // Criterion counts elements: operations, but for kernels that multiply nothing.
        group.throughput(Throughput::Elements(work as u64));
        let what = if kind == Kind::Elements { "elements" } else { column };
        group.bench_function(BenchmarkId::from_parameter(what), |bencher| bencher.iter(call));
        group.finish();
    }
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    cases::visit(Tier::detect(), &mut Bench(&mut criterion));
    criterion.final_summary();
}
