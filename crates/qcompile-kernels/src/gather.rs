//! Rows of a table by index, and rows combined into a table.

use crate::args::{Combine, GatherArgs, ScatterArgs};
use crate::lanes::{Simd, Task};
use crate::softmax::report;
use crate::{Primitive, no_parts};

/// Rows gathered by a unit.
const GATHER_ROWS: usize = 16;
/// Columns of a unit of the scatter.
const SCATTER_COLUMNS: usize = 128;

/// The row that an index means.
#[inline(always)]
fn row_of(index: i64, rows: usize) -> Option<usize> {
    let index = if index < 0 { index.checked_add(rows as i64)? } else { index };
    usize::try_from(index).ok().filter(|&row| row < rows)
}

unsafe extern "C" fn no_scratch(_args: *const u64) -> usize {
    0
}

unsafe extern "C" fn gather_units(args: *const u64, _phase: usize) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    unsafe { (*args.cast::<GatherArgs>()).count.div_ceil(GATHER_ROWS) }
}

unsafe extern "C" fn gather_run(args: *const u64, _phase: usize, begin: usize, end: usize) {
    // SAFETY: the caller passes the argument block of this kernel; rows are checked.
    unsafe {
        let args = &*args.cast::<GatherArgs>();
        let bytes = args.width * args.element_bytes;
        for i in begin * GATHER_ROWS..(end * GATHER_ROWS).min(args.count) {
            let out = args.out.add(i * bytes);
            match row_of(*args.indices.add(i), args.rows) {
                Some(row) => {
                    std::ptr::copy_nonoverlapping(args.table.add(row * bytes), out, bytes);
                }
                None => {
                    report(args.error, i);
                    out.write_bytes(0, bytes);
                }
            }
        }
    }
}

/// Gather, the same on every tier; a unit is some rows of the output.
pub(crate) const fn gather_primitive() -> Primitive {
    Primitive {
        phases: 1,
        units: gather_units,
        run: gather_run,
        scratch: no_scratch,
        parts: no_parts,
    }
}

/// Rows of a unit's part of the table: narrow tables are split by rows, wide ones by columns as well.
fn row_block(args: &ScatterArgs) -> usize {
    args.rows.div_ceil(8).max(1)
}

unsafe extern "C" fn scatter_units(args: *const u64, _phase: usize) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    let args = unsafe { &*args.cast::<ScatterArgs>() };
    args.width.div_ceil(SCATTER_COLUMNS) * args.rows.div_ceil(row_block(args))
}

unsafe extern "C" fn scatter_run<S: Simd>(
    args: *const u64,
    _phase: usize,
    begin: usize,
    end: usize,
) {
    // SAFETY: the caller passes the argument block of this kernel, on a CPU of the tier.
    unsafe { S::enter(Scatter { args: *args.cast::<ScatterArgs>(), begin, end }) }
}

/// Scatter on a tier; a unit owns some rows and columns of the table.
pub(crate) const fn scatter_primitive<S: Simd>() -> Primitive {
    Primitive {
        phases: 1,
        units: scatter_units,
        run: scatter_run::<S>,
        scratch: no_scratch,
        parts: no_parts,
    }
}

struct Scatter {
    args: ScatterArgs,
    begin: usize,
    end: usize,
}

impl Task for Scatter {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let maximum = |a: f32, b: f32| if a.is_nan() || a > b { a } else { b };
        // SAFETY: granted by the caller; the elements are of the type that the arguments say.
        unsafe {
            match (self.args.integers != 0, self.args.combine) {
                (false, Combine::Add) => self.combined(0.0_f32, |a, b| a + b),
                (false, Combine::Mul) => self.combined(1.0_f32, |a, b| a * b),
                (false, Combine::Max) => self.combined(f32::NEG_INFINITY, maximum),
                (true, Combine::Add) => self.combined(0_i64, i64::wrapping_add),
                (true, Combine::Mul) => self.combined(1_i64, i64::wrapping_mul),
                (true, Combine::Max) => self.combined(i64::MIN, i64::max),
            }
        }
    }
}

impl Scatter {
    /// # Safety
    /// The arguments are valid, with elements of type `T`.
    #[inline(always)]
    unsafe fn combined<T: Copy>(&self, none: T, combine: impl Fn(T, T) -> T) {
        let args = &self.args;
        let columns = args.width.div_ceil(SCATTER_COLUMNS);
        let (values, out) = (args.values.cast::<T>(), args.out.cast::<T>());
        for unit in self.begin..self.end {
            let first = unit % columns * SCATTER_COLUMNS;
            let width = SCATTER_COLUMNS.min(args.width - first);
            let begin = unit / columns * row_block(args);
            let end = (begin + row_block(args)).min(args.rows);
            // SAFETY: rows are checked, and no other unit has this part of the table.
            unsafe {
                for row in begin..end {
                    let row = out.add(row * args.width + first);
                    (0..width).for_each(|i| row.add(i).write(none));
                }
                for i in 0..args.count {
                    match row_of(*args.indices.add(i), args.rows) {
                        Some(row) if (begin..end).contains(&row) => {
                            let to = out.add(row * args.width + first);
                            let to = std::slice::from_raw_parts_mut(to, width);
                            let from = values.add(i * args.width + first);
                            let from = std::slice::from_raw_parts(from, width);
                            for (so_far, &value) in to.iter_mut().zip(from) {
                                *so_far = combine(*so_far, value);
                            }
                        }
                        Some(_) => {}
                        None => report(args.error, i),
                    }
                }
            }
        }
    }
}
