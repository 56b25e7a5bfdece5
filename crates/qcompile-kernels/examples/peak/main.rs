//! Prints the speed of the kernels of a tier on one thread, and its share of what the core can do in
//! registers: `peak [tier] [milliseconds per kernel] [part of a line's name]`.
#![allow(clippy::print_stdout, reason = "the output of the example")]

use cases::{Kind, Tier, Visit};
use std::time::Duration;

mod cases;
mod registers;

/// Seconds that this thread has run, so that a crowded machine disturbs little.
#[cfg(unix)]
pub(crate) fn now() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call only writes the structure.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Seconds since the first call.
#[cfg(not(unix))]
pub(crate) fn now() -> f64 {
    static FIRST: std::sync::LazyLock<std::time::Instant> =
        std::sync::LazyLock::new(std::time::Instant::now);
    FIRST.elapsed().as_secs_f64()
}

/// Prints a line for each shape.
struct Bench {
    budget: Duration,
    /// Only lines that contain this.
    filter: String,
    /// f32, bf16 and int8 operations per second of one core in registers.
    peak: [f64; 3],
    /// The line so far.
    line: String,
}

impl Bench {
    fn end_line(&mut self) {
        if !self.line.is_empty() {
            println!("{}", std::mem::take(&mut self.line));
        }
    }

    /// The best of many runs, in seconds of this thread's own time.
    fn seconds(&self, call: &dyn Fn()) -> f64 {
        call();
        let (begin, mut best) = (now(), f64::INFINITY);
        while now() - begin < self.budget.as_secs_f64() {
            let start = now();
            call();
            best = best.min(now() - start);
        }
        best
    }
}

impl Visit for Bench {
    fn group(&mut self, columns: &str) {
        self.end_line();
        println!("{columns}");
    }

    fn wants(&mut self, shape: &str) -> bool {
        self.end_line();
        shape.contains(&self.filter)
    }

    fn kernel(&mut self, shape: &str, _: &str, kind: Kind, work: f64, call: &dyn Fn()) {
        let rate = work / self.seconds(call);
        if self.line.is_empty() {
            self.line = format!("{shape:26}");
        }
        self.line.push_str(&match self.peak.get(kind as usize) {
            Some(peak) => format!(" {:6.1} {:3.0}%", rate / 1e9, 100.0 * rate / peak),
            None => format!(" {:6.2} G elements/s", rate / 1e9),
        });
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let tier = arguments.next().and_then(|t| t.parse().ok()).unwrap_or_else(Tier::detect);
    let budget = arguments.next().and_then(|t| t.parse().ok()).unwrap_or(200);
    let filter = arguments.next().unwrap_or_default();
    let peak = registers::peak(tier);
    let [f32, bf16, int8] = peak.map(|rate| rate / 1e9);
    println!(
        "tier {tier}, in registers: f32 {f32:.1} GF/s, bf16 {bf16:.1} GF/s, int8 {int8:.1} GF/s"
    );
    let mut bench =
        Bench { budget: Duration::from_millis(budget), filter, peak, line: String::new() };
    cases::visit(tier, &mut bench);
    bench.end_line();
}
