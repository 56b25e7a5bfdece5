//! Where the largest or smallest elements of rows are.

use crate::args::TopKArgs;
use crate::{Primitive, no_parts};
use std::cmp::Ordering;

unsafe extern "C" fn no_scratch(_args: *const u64) -> usize {
    0
}

unsafe extern "C" fn units(args: *const u64, _phase: usize) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    unsafe { (*args.cast::<TopKArgs>()).rows }
}

unsafe extern "C" fn run(args: *const u64, _phase: usize, begin: usize, end: usize) {
    // SAFETY: the caller passes the argument block of this kernel, whose matrices are of these sizes.
    unsafe {
        let args = &*args.cast::<TopKArgs>();
        for row in begin..end {
            let places = std::slice::from_raw_parts_mut(args.out.add(row * args.k), args.k);
            let first = row * args.cols;
            let sign = |order: Ordering| if args.largest == 0 { order } else { order.reverse() };
            if args.integers == 0 {
                let x = std::slice::from_raw_parts(args.x.cast::<f32>().add(first), args.cols);
                foremost(places, args.cols, |a, b| sign(by_size(x[a], x[b])));
            } else {
                let x = std::slice::from_raw_parts(args.x.cast::<i64>().add(first), args.cols);
                foremost(places, args.cols, |a, b| sign(x[a].cmp(&x[b])));
            }
        }
    }
}

/// Top-k, the same on every tier; a unit is a row.
pub(crate) const fn primitive() -> Primitive {
    Primitive { phases: 1, units, run, scratch: no_scratch, parts: no_parts }
}

/// By size, a NaN above all.
fn by_size(a: f32, b: f32) -> Ordering {
    a.partial_cmp(&b).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
}

/// Fills `places` with the foremost of `0..count`, which are at least as many. `order` ranks two of them; of equal
/// ones the lower is before the higher. The places are a heap with the hindmost on top, and are sorted at the end.
fn foremost(places: &mut [i64], count: usize, order: impl Fn(usize, usize) -> Ordering) {
    let behind = |a: i64, b: i64| order(a as usize, b as usize).then(a.cmp(&b)).is_gt();
    for (at, place) in places.iter_mut().enumerate() {
        *place = at as i64;
    }
    for top in (0..places.len() / 2).rev() {
        sift(places, top, &behind);
    }
    for at in places.len()..if places.is_empty() { 0 } else { count } {
        if behind(places[0], at as i64) {
            places[0] = at as i64;
            sift(places, 0, &behind);
        }
    }
    for last in (1..places.len()).rev() {
        places.swap(0, last);
        sift(&mut places[..last], 0, &behind);
    }
}

/// Moves the top of a part of the heap down to where it belongs.
fn sift(heap: &mut [i64], mut top: usize, behind: &impl Fn(i64, i64) -> bool) {
    loop {
        let mut child = 2 * top + 1;
        if child >= heap.len() {
            return;
        }
        if child + 1 < heap.len() && behind(heap[child + 1], heap[child]) {
            child += 1;
        }
        if !behind(heap[child], heap[top]) {
            return;
        }
        heap.swap(top, child);
        top = child;
    }
}
