//! Recurrent layers. A unit carries some rows of the batch through all steps, so that no thread waits for another
//! between steps; R is packed once and stays near.

mod activation;
pub(crate) mod args;
mod backward;
mod forward;
mod product;

use crate::Primitive;
use crate::args::{RecurrenceArgs, RecurrenceGradArgs, RecurrenceShape, RecurrentCell};
use crate::lanes::Simd;
use backward::Backward;
use forward::Forward;
pub(crate) use product::{Bf16Kind, Int8Kind, Kind, RealKind};
use product::{Pack, Panels, height};
use std::marker::PhantomData;

/// Most rows of a unit: enough that R is worth fetching.
const MAX_ROWS: usize = 32;
/// Rows are spread over this many units if there are enough.
const WANTED_UNITS: usize = 4;
/// Where tiles are higher than this, a unit may have fewer rows than a tile.
const FEW_ROWS: usize = 16;

/// Rows of a unit: whole tiles, or nearly a high one.
fn unit_rows<K: Kind, S: Simd>(shape: &RecurrenceShape) -> usize {
    let height = height::<K::Lanes<S>>();
    let most = MAX_ROWS / height * height;
    shape.batch.div_ceil(WANTED_UNITS).next_multiple_of(height.min(FEW_ROWS)).min(most)
}

impl RecurrenceShape {
    fn gates(&self) -> usize {
        match self.cell {
            RecurrentCell::Lstm => 4,
            RecurrentCell::Gru | RecurrentCell::LinearGru => 3,
            RecurrentCell::Rnn => 1,
        }
    }

    /// Blocks of the hidden size in a row of gradients.
    fn gradients(&self) -> usize {
        self.gates() + usize::from(self.cell == RecurrentCell::LinearGru)
    }

    /// Element of a section of the forward result.
    fn at(&self, section: usize, t: usize, row: usize) -> usize {
        ((section * (self.steps + 1) + t) * self.batch + row) * self.hidden
    }

    /// The step in place `order`, and the rows of the state before and after it.
    fn step(&self, order: usize) -> [usize; 3] {
        if self.reverse == 0 {
            [order, order, order + 1]
        } else {
            let t = self.steps - 1 - order;
            [t, t + 1, t]
        }
    }
}

/// What both directions have.
trait Pass: Copy {
    /// Whether R is read transposed: `h Rᵀ`, not `d R`.
    const TRANSPOSED: bool;
    fn shape(&self) -> &RecurrenceShape;
    fn r(&self) -> *const f32;
    fn scratch(&self) -> *mut u32;
}

impl Pass for RecurrenceArgs {
    const TRANSPOSED: bool = true;
    fn shape(&self) -> &RecurrenceShape {
        &self.shape
    }
    fn r(&self) -> *const f32 {
        self.r
    }
    fn scratch(&self) -> *mut u32 {
        self.scratch.cast()
    }
}

impl Pass for RecurrenceGradArgs {
    const TRANSPOSED: bool = false;
    fn shape(&self) -> &RecurrenceShape {
        &self.shape
    }
    fn r(&self) -> *const f32 {
        self.r
    }
    fn scratch(&self) -> *mut u32 {
        self.scratch.cast()
    }
}

unsafe extern "C" fn units<A: Pass, K: Kind, S: Simd>(args: *const u64, phase: usize) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    let shape = unsafe { (*args.cast::<A>()).shape() };
    if shape.batch == 0 || shape.hidden == 0 {
        return 0;
    }
    match phase {
        0 => shape.gates() * Panels::<K::Lanes<S>>::of(shape).count(),
        _ => shape.batch.div_ceil(unit_rows::<K, S>(shape)),
    }
}

unsafe extern "C" fn scratch<A: Pass, K: Kind, S: Simd>(args: *const u64) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    let shape = unsafe { (*args.cast::<A>()).shape() };
    Panels::<K::Lanes<S>>::of(shape).words(shape.gates()) * 4
}

/// The rows of a unit.
struct Rows {
    first: usize,
    count: usize,
    /// Rows up to whole tiles.
    padded: usize,
}

impl Rows {
    fn of<K: Kind, S: Simd>(shape: &RecurrenceShape, unit: usize) -> Rows {
        let rows = unit_rows::<K, S>(shape);
        let first = unit * rows;
        let count = rows.min(shape.batch - first);
        Rows { first, count, padded: count.next_multiple_of(height::<K::Lanes<S>>()) }
    }
}

/// Whether a row of the batch has a step.
unsafe fn runs(lengths: *const i64, row: usize, t: usize) -> bool {
    // SAFETY: the caller grants a length for each row, or none at all.
    lengths.is_null() || unsafe { (t as i64) < *lengths.add(row) }
}

unsafe extern "C" fn run<K: Kind, S: Simd>(
    args: *const u64,
    phase: usize,
    begin: usize,
    end: usize,
) {
    // SAFETY: the caller passes the argument block of this kernel, on a CPU of the tier.
    unsafe {
        let args = *args.cast::<RecurrenceArgs>();
        let kind = PhantomData::<K>;
        if phase == 0 {
            S::enter(Pack { args, kind, begin, end });
        } else {
            S::enter(Forward { args, kind, begin, end });
        }
    }
}

unsafe extern "C" fn grad_run<K: Kind, S: Simd>(
    args: *const u64,
    phase: usize,
    begin: usize,
    end: usize,
) {
    // SAFETY: the caller passes the argument block of this kernel, on a CPU of the tier.
    unsafe {
        let args = *args.cast::<RecurrenceGradArgs>();
        let kind = PhantomData::<K>;
        if phase == 0 {
            S::enter(Pack { args, kind, begin, end });
        } else {
            S::enter(Backward { args, kind, begin, end });
        }
    }
}

/// A recurrent layer on a tier, with products of a kind; a unit is some rows of the batch.
pub(crate) const fn primitive<K: Kind, S: Simd>() -> Primitive {
    Primitive {
        phases: 2,
        units: units::<RecurrenceArgs, K, S>,
        run: run::<K, S>,
        scratch: scratch::<RecurrenceArgs, K, S>,
        parts: crate::no_parts,
    }
}

/// The gradient of a recurrent layer on a tier.
pub(crate) const fn grad_primitive<K: Kind, S: Simd>() -> Primitive {
    Primitive {
        phases: 2,
        units: units::<RecurrenceGradArgs, K, S>,
        run: grad_run::<K, S>,
        scratch: scratch::<RecurrenceGradArgs, K, S>,
        parts: crate::no_parts,
    }
}
