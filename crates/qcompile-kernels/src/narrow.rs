//! Rounding of f32 rows to bf16.

use crate::lanes::{Simd, Task};

/// Rounds rows of f32 to bf16 bits: `to[r * to_stride + c]` from `from[r * from_stride + c]`, strides in
/// elements. To nearest, ties to even; subnormal numbers stay, NaN stays NaN (the instruction for it would
/// flush subnormal numbers, so no tier uses it, and all give the same bits). The blocks must not overlap.
pub type Narrow = unsafe extern "C" fn(
    from: *const f32,
    from_stride: usize,
    rows: usize,
    columns: usize,
    to: *mut u16,
    to_stride: usize,
);

struct Rows {
    from: *const f32,
    from_stride: usize,
    rows: usize,
    columns: usize,
    to: *mut u16,
    to_stride: usize,
}

impl Task for Rows {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for row in 0..self.rows {
            // SAFETY: the caller grants both blocks.
            let (from, to) = unsafe {
                (
                    std::slice::from_raw_parts(self.from.add(row * self.from_stride), self.columns),
                    std::slice::from_raw_parts_mut(self.to.add(row * self.to_stride), self.columns),
                )
            };
            for (to, from) in to.iter_mut().zip(from) {
                *to = round(*from);
            }
        }
    }
}

/// The bits of the nearest bf16.
#[inline(always)]
fn round(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    (if value.is_nan() { quiet } else { rounded }) as u16
}

/// The function of a tier.
///
/// # Safety
/// As [`Narrow`] says; the CPU supports the tier.
pub(crate) unsafe extern "C" fn narrow<S: Simd>(
    from: *const f32,
    from_stride: usize,
    rows: usize,
    columns: usize,
    to: *mut u16,
    to_stride: usize,
) {
    // SAFETY: granted by the caller.
    unsafe { S::enter(Rows { from, from_stride, rows, columns, to, to_stride }) }
}
