//! The exchange between workers of one process: real memory of each, summed in the order of ranks.
//!
//! Every rank reduces one shard of each value over all ranks and stores it in all of them, so the work is shared, the
//! order of additions is fixed, and every rank ends with the same bits. Codes are read by all ranks, whole: each sums
//! their values itself, in the same order.

use qcompile_ir::CollectiveOp;
use qcompile_kernels::pool::Barrier;
use qcompile_plan::{Codes, Exchanged, Kernel, Place, Plan};
use std::sync::{Mutex, PoisonError};

/// Floats that are combined at once.
const BLOCK: usize = 1024;

/// Where a rank's values are, during one step.
#[derive(Clone, Copy)]
struct Published {
    slots: *const *mut u8,
    batch: usize,
}

impl Published {
    /// Where this rank has the value at `place`.
    fn at<T>(&self, place: Place) -> *mut T {
        // SAFETY: the plan was verified: the slot exists, and the elements from the offset on lie in it.
        let slot = unsafe { *self.slots.add(place.slot.index()) };
        slot.cast::<T>().wrapping_add(place.offset.at(self.batch))
    }
}

/// What a rank sends in the place of f32 values.
#[derive(Clone, Copy)]
struct Sent {
    codes: *const i8,
    scales: *const f32,
}

// SAFETY: the pointers are followed between the two barriers of an exchange only, where they are valid.
unsafe impl Send for Published {}

/// The ranks of one process.
pub(crate) struct Group {
    barrier: Barrier,
    /// What each rank brought to the current exchange.
    published: Mutex<Vec<Option<Published>>>,
}

impl Group {
    pub(crate) fn new(ranks: usize) -> Group {
        Group { barrier: Barrier::new(ranks), published: Mutex::new(vec![None; ranks]) }
    }
}

/// What a rank's thread 0 needs for an exchange; the context of [`all_reduce`].
pub(crate) struct Exchange<'a> {
    pub(crate) group: &'a Group,
    pub(crate) plan: &'a Plan,
    pub(crate) rank: usize,
    pub(crate) slots: *const *mut u8,
    pub(crate) batch: usize,
    /// Each rank's part of the samples; together 1. A rank with none takes part, but does not count.
    pub(crate) weights: &'a [f32],
}

/// Performs the all-reduce of a step of the plan.
///
/// # Safety
/// `context` points to an [`Exchange`] whose slots are valid for its plan and batch, one thread of each rank calls
/// this for the same step, and no other thread touches the step's members meanwhile.
pub(crate) unsafe extern "C" fn all_reduce(context: *const (), step: usize) {
    // SAFETY: granted by the caller.
    let exchange = unsafe { &*context.cast::<Exchange<'_>>() };
    let Kernel::AllReduce { op, members } = &exchange.plan.steps()[step].kernel else { return };
    let group = exchange.group;
    let ranks = exchange.weights.len();
    {
        let mut published = group.published.lock().unwrap_or_else(PoisonError::into_inner);
        published[exchange.rank] = Some(Published { slots: exchange.slots, batch: exchange.batch });
    }
    group.barrier.wait();
    let published: Vec<Published> = {
        let published = group.published.lock().unwrap_or_else(PoisonError::into_inner);
        published.iter().copied().flatten().collect()
    };
    for &Exchanged { value, elements, codes } in members {
        let parts: Vec<*mut f32> = published.iter().map(|rank| rank.at(value)).collect();
        let begin = elements * exchange.rank / ranks;
        let end = elements * (exchange.rank + 1) / ranks;
        match codes {
            // SAFETY: elements `begin..end` of all parts belong to this rank until the next barrier.
            None => unsafe { reduce(*op, &parts, exchange.weights, begin, end) },
            Some(Codes { codes, scales, row }) => {
                let sent: Vec<Sent> = published
                    .iter()
                    .map(|rank| Sent { codes: rank.at(codes), scales: rank.at(scales) })
                    .collect();
                for at in 0..elements / row {
                    // SAFETY: the own part belongs to this rank; nobody writes codes or scales until the next barrier.
                    unsafe {
                        let sums = parts[exchange.rank].add(at * row);
                        reduce_codes(*op, &sent, exchange.weights, at, row, sums);
                    }
                }
            }
        }
    }
    group.barrier.wait();
}

/// What a reduction begins with.
const fn neutral(op: CollectiveOp) -> f32 {
    match op {
        CollectiveOp::Sum | CollectiveOp::Mean => 0.0,
        CollectiveOp::Max => f32::NEG_INFINITY,
    }
}

/// What one more value makes of a reduction.
fn combined(op: CollectiveOp, sum: f32, value: f32, weight: f32) -> f32 {
    match op {
        CollectiveOp::Sum => sum + value,
        CollectiveOp::Mean => sum + value * weight,
        // What is not a number wins, as in a reduction within a rank.
        CollectiveOp::Max if value.is_nan() || value > sum => value,
        CollectiveOp::Max => sum,
    }
}

/// Combines row `at` of all ranks' codes, in their order, in `sums`.
///
/// # Safety
/// Codes and scales are valid there, and `sums` for a row; nobody else touches that, or writes those.
unsafe fn reduce_codes(
    op: CollectiveOp,
    sent: &[Sent],
    weights: &[f32],
    at: usize,
    row: usize,
    sums: *mut f32,
) {
    // SAFETY: granted by the caller.
    let sums = unsafe { std::slice::from_raw_parts_mut(sums, row) };
    sums.fill(neutral(op));
    for (rank, &weight) in sent.iter().zip(weights).filter(|(_, weight)| **weight > 0.0) {
        // SAFETY: granted by the caller.
        let (codes, scale) = unsafe {
            (std::slice::from_raw_parts(rank.codes.add(at * row), row), *rank.scales.add(at))
        };
        for (sum, &code) in sums.iter_mut().zip(codes) {
            *sum = combined(op, *sum, f32::from(code) * scale, weight);
        }
    }
}

/// Combines elements `begin..end` of all parts, in their order, and stores the result in each.
///
/// # Safety
/// All parts are valid there, and nobody else touches them.
unsafe fn reduce(op: CollectiveOp, parts: &[*mut f32], weights: &[f32], begin: usize, end: usize) {
    let counted = || parts.iter().zip(weights).filter(|(_, weight)| **weight > 0.0);
    let mut block = [0.0_f32; BLOCK];
    for at in (begin..end).step_by(BLOCK) {
        let length = BLOCK.min(end - at);
        let sums = &mut block[..length];
        sums.fill(neutral(op));
        for (&part, &weight) in counted() {
            // SAFETY: granted by the caller.
            let values = unsafe { std::slice::from_raw_parts(part.add(at), length) };
            for (sum, &value) in sums.iter_mut().zip(values) {
                *sum = combined(op, *sum, value, weight);
            }
        }
        for &part in parts {
            // SAFETY: granted by the caller; the slices of the loop above are gone.
            unsafe { std::slice::from_raw_parts_mut(part.add(at), length) }.copy_from_slice(sums);
        }
    }
}
