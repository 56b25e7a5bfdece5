//! Recurrent layers. A unit carries some rows of the batch through all steps, so that no thread waits for another
//! between steps; R is packed once and stays near.

mod activation;
pub(crate) mod args;
mod backward;
mod forward;

use crate::Primitive;
use crate::args::{RecurrenceArgs, RecurrenceGradArgs, RecurrenceShape, RecurrentCell};
use crate::lanes::{Lanes, Simd, Task};
use crate::pack::{self, Right, Source};
use crate::tile::{Start, Tile, tile};
use backward::Backward;
use forward::Forward;

/// Most rows of a unit: enough that R is worth fetching.
const MAX_ROWS: usize = 32;
/// Rows are spread over this many units if there are enough.
const WANTED_UNITS: usize = 4;

/// Rows of a register tile two vectors wide: of 16 lanes fewer than products use, as batches are often powers of 2.
const fn height<L: Lanes>() -> usize {
    if L::LANES == 16 { 8 } else { L::ROWS_PAIR }
}

/// Columns of a packed panel.
const fn width<L: Lanes>() -> usize {
    2 * L::LANES
}

/// Rows of a unit, whole tiles.
fn unit_rows<L: Lanes>(shape: &RecurrenceShape) -> usize {
    let most = MAX_ROWS / height::<L>() * height::<L>();
    shape.batch.div_ceil(WANTED_UNITS).next_multiple_of(height::<L>()).min(most)
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

    /// Columns of a packed gate.
    fn padded<L: Lanes>(&self) -> usize {
        self.hidden.next_multiple_of(width::<L>())
    }

    /// Words of a packed gate.
    fn packed<L: Lanes>(&self) -> usize {
        self.padded::<L>() * self.hidden
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

unsafe extern "C" fn units<A: Pass, S: Simd>(args: *const u64, phase: usize) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    let shape = unsafe { (*args.cast::<A>()).shape() };
    if shape.batch == 0 || shape.hidden == 0 {
        return 0;
    }
    match phase {
        0 => shape.gates() * shape.padded::<S::Real>() / width::<S::Real>(),
        _ => shape.batch.div_ceil(unit_rows::<S::Real>(shape)),
    }
}

unsafe extern "C" fn scratch<A: Pass, S: Simd>(args: *const u64) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    let shape = unsafe { (*args.cast::<A>()).shape() };
    shape.gates() * shape.packed::<S::Real>() * 4
}

/// Packs panels of R.
struct Pack<A> {
    args: A,
    begin: usize,
    end: usize,
}

impl<A: Pass> Task for Pack<A> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let shape = self.args.shape();
        let (hidden, width) = (shape.hidden, width::<S::Real>());
        let panels = shape.padded::<S::Real>() / width;
        for unit in self.begin..self.end {
            let (gate, column) = (unit / panels, unit % panels * width);
            let (k_stride, column_stride) = if A::TRANSPOSED { (1, hidden) } else { (hidden, 1) };
            // SAFETY: the panel lies in R and in the scratch.
            unsafe {
                let first = self.args.r().add(gate * hidden * hidden + column * column_stride);
                let from = Source { first, k_stride, column_stride, flip: 0 };
                let to = self.args.scratch().add(unit * width * hidden);
                let columns = width.min(hidden - column);
                pack::interleave::<S::Real, Right>(from, hidden, columns, to, width);
            }
        }
    }
}

/// Puts (or adds) the product of rows of `hidden` words and a packed gate into rows of a buffer.
///
/// # Safety
/// `left` are whole tiles of rows; the buffer has as many rows of `shape.padded()` words.
#[inline(always)]
unsafe fn product<L: Lanes>(
    shape: &RecurrenceShape,
    left: &[*const u32],
    packed: *const u32,
    out: *mut u32,
    stride: usize,
    add: bool,
) {
    let (hidden, width) = (shape.hidden, width::<L>());
    for column in (0..shape.padded::<L>()).step_by(width) {
        for first in (0..left.len()).step_by(height::<L>()) {
            let mut outs = [std::ptr::null_mut(); MAX_ROWS];
            for (row, to) in outs.iter_mut().enumerate().take(height::<L>()) {
                *to = out.wrapping_add((first + row) * stride);
            }
            let part = Tile {
                rows: left[first..].as_ptr(),
                outs: outs.as_ptr(),
                column,
                segments: &raw const NO_SKIP,
                segment_count: 1,
                length: hidden,
                step: 1,
                // SAFETY: the panel lies in the packed gate.
                right: unsafe { packed.add(column * hidden) },
                start: if add { Start::Resume } else { Start::Zero },
                scales: None,
                ahead: (std::ptr::null(), 0),
            };
            // SAFETY: rows, panel and buffer are valid for the tile.
            unsafe {
                if height::<L>() == L::ROWS_PAIR {
                    L::tile_pair(&part);
                } else {
                    tile::<L, 8, 2>(&part);
                }
            }
        }
    }
}

static NO_SKIP: isize = 0;

/// The rows of a unit: those of the batch, and pointers to them for whole tiles.
struct Rows {
    first: usize,
    count: usize,
    /// Rows up to whole tiles.
    padded: usize,
}

impl Rows {
    fn of<L: Lanes>(shape: &RecurrenceShape, unit: usize) -> Rows {
        let rows = unit_rows::<L>(shape);
        let first = unit * rows;
        let count = rows.min(shape.batch - first);
        Rows { first, count, padded: count.next_multiple_of(height::<L>()) }
    }

    /// The rows of a matrix whose row 0 of the batch is `base`; the last one repeats up to whole tiles.
    #[inline(always)]
    fn pointers(&self, base: *const f32, stride: usize) -> [*const u32; MAX_ROWS] {
        std::array::from_fn(|row| {
            base.wrapping_add((self.first + row.min(self.count - 1)) * stride).cast()
        })
    }
}

/// Whether a row of the batch has a step.
unsafe fn runs(lengths: *const i64, row: usize, t: usize) -> bool {
    // SAFETY: the caller grants a length for each row, or none at all.
    lengths.is_null() || unsafe { (t as i64) < *lengths.add(row) }
}

unsafe extern "C" fn run<S: Simd>(args: *const u64, phase: usize, begin: usize, end: usize) {
    // SAFETY: the caller passes the argument block of this kernel, on a CPU of the tier.
    unsafe {
        let args = *args.cast::<RecurrenceArgs>();
        if phase == 0 {
            S::enter(Pack { args, begin, end });
        } else {
            S::enter(Forward { args, begin, end });
        }
    }
}

unsafe extern "C" fn grad_run<S: Simd>(args: *const u64, phase: usize, begin: usize, end: usize) {
    // SAFETY: the caller passes the argument block of this kernel, on a CPU of the tier.
    unsafe {
        let args = *args.cast::<RecurrenceGradArgs>();
        if phase == 0 {
            S::enter(Pack { args, begin, end });
        } else {
            S::enter(Backward { args, begin, end });
        }
    }
}

/// A recurrent layer on a tier; a unit is some rows of the batch.
pub(crate) const fn primitive<S: Simd>() -> Primitive {
    Primitive {
        phases: 2,
        units: units::<RecurrenceArgs, S>,
        run: run::<S>,
        scratch: scratch::<RecurrenceArgs, S>,
        parts: crate::no_parts,
    }
}

/// The gradient of a recurrent layer on a tier.
pub(crate) const fn grad_primitive<S: Simd>() -> Primitive {
    Primitive {
        phases: 2,
        units: units::<RecurrenceGradArgs, S>,
        run: grad_run::<S>,
        scratch: scratch::<RecurrenceGradArgs, S>,
        parts: crate::no_parts,
    }
}
