//! The thread team that runs a step: all threads enter one closure together and meet at barriers.
//!
//! Waiting threads spin for some tens of microseconds, then yield, then sleep: a step's many short
//! phases cost no system calls, and a crowded machine is not kept busy by waiting. With more threads
//! than CPUs nothing spins at all.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;

/// Spins before the first yield: with 20 to 50 ns for each, 20 to 50 microseconds.
const SPINS: u32 = 1000;
/// Yields before sleeping.
const YIELDS: u32 = 16;

/// A number that threads wait on to change.
#[derive(Debug)]
struct Gate {
    number: AtomicU32,
    sleepers: AtomicU32,
    spins: u32,
    lock: Mutex<()>,
    changed: Condvar,
}

impl Gate {
    fn new(spins: u32) -> Gate {
        Gate {
            number: AtomicU32::new(0),
            sleepers: AtomicU32::new(0),
            spins,
            lock: Mutex::new(()),
            changed: Condvar::new(),
        }
    }

    fn number(&self) -> u32 {
        self.number.load(Ordering::SeqCst)
    }

    /// Waits until the number is no longer `old`.
    fn wait(&self, old: u32) {
        for _ in 0..self.spins {
            if self.number.load(Ordering::Acquire) != old {
                return;
            }
            std::hint::spin_loop();
        }
        for _ in 0..YIELDS {
            if self.number.load(Ordering::Acquire) != old {
                return;
            }
            std::thread::yield_now();
        }
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        // Sequentially consistent on both sides: either the opener sees the sleeper, or the sleeper
        // sees the new number.
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while self.number() == old {
            guard = self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    /// Changes the number and wakes all that wait.
    fn open(&self) {
        self.number.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
            self.changed.notify_all();
        }
    }
}

/// A point where all threads of a team meet; usable again and again.
#[derive(Debug)]
pub struct Barrier {
    threads: usize,
    arrived: AtomicUsize,
    broken: AtomicBool,
    gate: Gate,
}

impl Barrier {
    /// A barrier for that many threads.
    #[must_use]
    pub fn new(threads: usize) -> Barrier {
        Barrier {
            threads,
            arrived: AtomicUsize::new(0),
            broken: AtomicBool::new(false),
            gate: Gate::new(spins(threads)),
        }
    }

    /// Waits for all threads. `false` means that a thread of the team panicked and nobody will wait
    /// any more: abandon the work.
    pub fn wait(&self) -> bool {
        if self.threads > 1 {
            let number = self.gate.number();
            if self.broken.load(Ordering::SeqCst) {
                return false;
            }
            if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.threads {
                self.arrived.store(0, Ordering::Relaxed);
                self.gate.open();
            } else {
                self.gate.wait(number);
            }
        }
        !self.broken.load(Ordering::SeqCst)
    }

    /// Lets everybody through from now on.
    fn break_open(&self) {
        self.broken.store(true, Ordering::SeqCst);
        self.gate.open();
    }

    /// Makes the barrier whole; nobody may be in it.
    fn mend(&self) {
        self.broken.store(false, Ordering::SeqCst);
        self.arrived.store(0, Ordering::SeqCst);
    }
}

/// [`Barrier::wait`] for emitted code: 1 to go on, 0 to abandon the step.
///
/// # Safety
/// `barrier` points to a live [`Barrier`], and the calling thread is one of its team.
pub unsafe extern "C" fn barrier_wait(barrier: *const Barrier) -> usize {
    // SAFETY: granted by the caller.
    usize::from(unsafe { &*barrier }.wait())
}

/// No spinning where a waiting thread may keep a working one from its CPU.
fn spins(threads: usize) -> u32 {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    if threads > cpus { 0 } else { SPINS }
}

/// A thread of the team panicked; the message is the panic's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Panicked {
    /// The thread's number.
    pub thread: usize,
    /// What the panic said, if it was text.
    pub message: String,
}

impl fmt::Display for Panicked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "thread {} panicked: {}", self.thread, self.message)
    }
}

impl std::error::Error for Panicked {}

/// The closure of the current run, its lifetime erased.
#[derive(Clone, Copy)]
struct Job(*const (dyn Fn(usize) + Sync));

// SAFETY: the closure is `Sync`, and `Team::run` keeps it alive until all threads are done with it.
unsafe impl Send for Job {}
// SAFETY: as above.
unsafe impl Sync for Job {}

struct Shared {
    job: RwLock<Option<Job>>,
    start: Gate,
    done: Gate,
    working: AtomicUsize,
    barrier: Arc<Barrier>,
    panicked: Mutex<Option<Panicked>>,
}

impl Shared {
    /// Runs the job on this thread; a panic breaks the barrier open, so that nobody waits for it.
    fn work(&self, job: &(dyn Fn(usize) + Sync), thread: usize) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job(thread))) {
            let message = panic
                .downcast_ref::<&str>()
                .map(|text| (*text).to_owned())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_default();
            let mut first = self.panicked.lock().unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert(Panicked { thread, message });
            drop(first);
            self.barrier.break_open();
        }
    }

    fn worker(&self, thread: usize) {
        let mut seen = 0;
        loop {
            self.start.wait(seen);
            seen = seen.wrapping_add(1);
            let job = *self.job.read().unwrap_or_else(PoisonError::into_inner);
            let Some(Job(job)) = job else { return };
            // SAFETY: `Team::run` waits for this thread before the closure ends.
            self.work(unsafe { &*job }, thread);
            if self.working.fetch_sub(1, Ordering::AcqRel) == 1 {
                self.done.open();
            }
        }
    }
}

/// Threads that run closures together; the thread that calls [`Team::run`] is number 0.
pub struct Team {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl fmt::Debug for Team {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Team").field("threads", &self.threads()).finish()
    }
}

impl Team {
    /// A team of that many threads, the caller's included (0 counts as 1).
    ///
    /// # Errors
    /// The system's, if it gives no thread.
    pub fn new(threads: usize) -> std::io::Result<Team> {
        let threads = threads.max(1);
        let spins = spins(threads);
        let shared = Arc::new(Shared {
            job: RwLock::new(None),
            start: Gate::new(spins),
            done: Gate::new(spins),
            working: AtomicUsize::new(0),
            barrier: Arc::new(Barrier::new(threads)),
            panicked: Mutex::new(None),
        });
        let mut team = Team { shared, workers: Vec::with_capacity(threads - 1) };
        for thread in 1..threads {
            let shared = Arc::clone(&team.shared);
            let builder = std::thread::Builder::new().name(format!("qcompile-{thread}"));
            team.workers.push(builder.spawn(move || shared.worker(thread))?);
        }
        Ok(team)
    }

    /// Number of threads, the caller's included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// The barrier of the team's threads. It lives as long as any copy of the `Arc`.
    #[must_use]
    pub fn barrier(&self) -> Arc<Barrier> {
        Arc::clone(&self.shared.barrier)
    }

    /// Runs `job(thread)` on every thread and returns when all are done.
    ///
    /// # Errors
    /// The first panic; the other threads ran to their end, with the barrier open.
    pub fn run(&mut self, job: impl Fn(usize) + Sync) -> Result<(), Panicked> {
        let shared = &*self.shared;
        shared.barrier.mend();
        let job: &(dyn Fn(usize) + Sync) = &job;
        if !self.workers.is_empty() {
            // SAFETY: only the lifetime changes; `job` lives until every worker is done, below.
            let erased = unsafe {
                std::mem::transmute::<*const (dyn Fn(usize) + Sync), *const (dyn Fn(usize) + Sync)>(
                    std::ptr::from_ref(job),
                )
            };
            *shared.job.write().unwrap_or_else(PoisonError::into_inner) = Some(Job(erased));
            let done = shared.done.number();
            shared.working.store(self.workers.len(), Ordering::SeqCst);
            shared.start.open();
            shared.work(job, 0);
            shared.done.wait(done);
        } else {
            shared.work(job, 0);
        }
        let mut panicked = shared.panicked.lock().unwrap_or_else(PoisonError::into_inner);
        panicked.take().map_or(Ok(()), Err)
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        *self.shared.job.write().unwrap_or_else(PoisonError::into_inner) = None;
        self.shared.start.open();
        for worker in self.workers.drain(..) {
            // A worker's panics were caught already.
            drop(worker.join());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn barriers_order_the_phases() {
        // Also with many more threads than CPUs.
        for threads in [1, 2, 3, 9] {
            let mut team = Team::new(threads).expect("threads");
            let barrier = team.barrier();
            let cells: Vec<AtomicU64> = (0..threads).map(|_| AtomicU64::new(0)).collect();
            let wrong = AtomicU64::new(0);
            for _ in 0..20 {
                for cell in &cells {
                    cell.store(0, Ordering::Relaxed);
                }
                team.run(|thread| {
                    for step in 1..=30 {
                        cells[thread].store(step, Ordering::Relaxed);
                        assert!(barrier.wait());
                        if cells.iter().any(|cell| cell.load(Ordering::Relaxed) != step) {
                            wrong.fetch_add(1, Ordering::Relaxed);
                        }
                        assert!(barrier.wait());
                    }
                })
                .expect("no panic");
            }
            assert_eq!(wrong.into_inner(), 0);
        }
    }

    #[test]
    fn sleeping_threads_wake_up() {
        let mut team = Team::new(3).expect("threads");
        let barrier = team.barrier();
        for _ in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(20));
            team.run(|thread| {
                if thread == 1 {
                    std::thread::sleep(std::time::Duration::from_millis(20));
                }
                barrier.wait();
            })
            .expect("no panic");
        }
    }

    #[test]
    fn a_panic_is_an_error_and_no_hang() {
        for threads in [1, 2, 4] {
            let mut team = Team::new(threads).expect("threads");
            let barrier = team.barrier();
            let bad = threads - 1;
            let result = team.run(|thread| {
                assert!(thread != bad, "bad thread");
                while barrier.wait() {}
            });
            let error = result.expect_err("a thread panicked");
            assert_eq!((error.thread, error.message.as_str()), (bad, "bad thread"));
            // The team works on.
            let count = AtomicUsize::new(0);
            team.run(|_| {
                assert!(barrier.wait());
                count.fetch_add(1, Ordering::Relaxed);
            })
            .expect("no panic");
            assert_eq!(count.into_inner(), threads);
        }
    }
}
