//! The one calling contract between a program and whoever runs it.

use qcompile_kernels::pool::Barrier;
use std::mem::offset_of;

/// What emitted code is given: one value shared by all threads of a team.
///
/// # Safety contract
///
/// [`Program::run`](crate::Program::run) states what the pointers must point to.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// The first byte of every slot, in the order of [`Plan::slots`](qcompile_plan::Plan::slots), each aligned to 64.
    pub slots: *const *mut u8,
    /// The batch size N.
    pub batch: usize,
    /// The first of these samples among those of all ranks: random numbers go by the whole batch.
    pub first: usize,
    /// Number of threads that run the region.
    pub threads: usize,
    /// Number of ranks that exchange values; 1 makes every exchange the identity.
    pub ranks: usize,
    /// Shared scratch of [`Program::scratch_bytes`](crate::Program::scratch_bytes), aligned to 64.
    pub scratch: *mut u8,
    /// Where the threads of the team meet. Not used by one thread alone.
    pub barrier: *const Barrier,
    /// First argument of `collective`.
    pub collective_context: *const (),
    /// Performs the all-reduce of a step, given by its index in the plan. Called by thread 0, and only if there are
    /// several ranks.
    pub collective: unsafe extern "C" fn(context: *const (), step: usize),
    /// One word for each step of the plan: a step with a bad index (a label, a row) stores 1 + its position there.
    pub errors: *mut u64,
}

// SAFETY: a frame is plain words; what threads may do through its pointers is the contract of `Program::run`.
unsafe impl Send for Frame {}
// SAFETY: as above.
unsafe impl Sync for Frame {}

/// Byte offset of a field, for emitted loads.
macro_rules! field {
    ($name:ident) => {
        offset_of!(Frame, $name) as i32
    };
}

impl Frame {
    pub(crate) const SLOTS: i32 = field!(slots);
    pub(crate) const BATCH: i32 = field!(batch);
    pub(crate) const FIRST: i32 = field!(first);
    pub(crate) const THREADS: i32 = field!(threads);
    pub(crate) const RANKS: i32 = field!(ranks);
    pub(crate) const SCRATCH: i32 = field!(scratch);
    pub(crate) const BARRIER: i32 = field!(barrier);
    pub(crate) const COLLECTIVE_CONTEXT: i32 = field!(collective_context);
    pub(crate) const COLLECTIVE: i32 = field!(collective);
    pub(crate) const ERRORS: i32 = field!(errors);
}
