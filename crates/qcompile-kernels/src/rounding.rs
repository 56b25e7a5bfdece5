//! Codes of values that the kernel computes, and their scales; values rounded to bf16.

/// The largest code.
pub(crate) const LARGEST: f32 = 127.0;
/// The scale of zeros.
const SMALLEST_SCALE: f32 = 1e-30;
/// Adding 1.5 * 2^23 rounds to a whole number in the low mantissa bits.
pub(crate) const SHIFT: f32 = 12_582_912.0;

/// The magnitude as bits, which are the larger the larger it is, and the largest where it is not a number.
#[inline(always)]
pub(crate) fn magnitude(x: f32) -> u32 {
    x.to_bits() & (u32::MAX >> 1)
}

/// The largest [`magnitude`].
#[inline(always)]
pub(crate) fn largest_magnitude(values: &[f32]) -> u32 {
    values.iter().fold(0, |most, &x| most.max(magnitude(x)))
}

/// The scale of codes by the largest magnitude; it is not finite if that is not.
#[inline(always)]
pub(crate) fn scale_of(magnitude: u32) -> f32 {
    let scale = f32::from_bits(magnitude) / LARGEST;
    if scale < SMALLEST_SCALE { SMALLEST_SCALE } else { scale }
}

/// The nearest code, ties to even; any where the scale is not finite, as its product with that is not a number.
#[inline(always)]
pub(crate) fn code(x: f32, inverse_scale: f32) -> i8 {
    (x * inverse_scale + SHIFT).to_bits() as i8
}

/// The codes of values.
#[inline(always)]
pub(crate) unsafe fn round(values: *const f32, count: usize, inverse_scale: f32, to: *mut i8) {
    // SAFETY: the caller grants so many values, and room for their codes.
    let (values, to) = unsafe {
        (std::slice::from_raw_parts(values, count), std::slice::from_raw_parts_mut(to, count))
    };
    for (to, &x) in to.iter_mut().zip(values) {
        *to = code(x, inverse_scale);
    }
}

/// The golden ratio's part behind the point, whose multiples fill [0, 1) most evenly.
const GOLDEN: f64 = 0.618_033_988_749_894_9;

/// The part behind the point of the first multiples of the golden ratio.
#[inline(always)]
pub(crate) fn golden_multiples(to: &mut [f32]) {
    for (place, to) in to.iter_mut().enumerate() {
        let multiple = place as f64 * GOLDEN;
        *to = (multiple - (multiple as u64) as f64) as f32;
    }
}

/// What moves a value, in steps, so that rounding it to nearest goes up as often as it is far from the code below: by a
/// number in [0, 1), turned by a multiple of the golden ratio.
#[inline(always)]
pub(crate) fn noise(number: f32, multiple: f32) -> f32 {
    let sum = number + multiple;
    (if sum >= 1.0 { sum - 1.0 } else { sum }) - 0.5
}

/// The code of a value that is moved by so many steps, as [`code`].
#[inline(always)]
fn moved_code(x: f32, inverse_scale: f32, noise: f32) -> i8 {
    let moved = x * inverse_scale + noise;
    // The largest may go beyond the codes.
    let moved = if moved > LARGEST { LARGEST } else { moved };
    ((if moved < -LARGEST { -LARGEST } else { moved }) + SHIFT).to_bits() as i8
}

/// The codes of values, rounded at random: of each by the number and its multiple.
#[inline(always)]
pub(crate) unsafe fn round_at_random(
    values: *const f32,
    inverse_scale: f32,
    number: f32,
    multiples: &[f32],
    to: *mut i8,
) {
    // SAFETY: the caller grants as many values as multiples, and room for their codes.
    let (values, to) = unsafe {
        let count = multiples.len();
        (std::slice::from_raw_parts(values, count), std::slice::from_raw_parts_mut(to, count))
    };
    for ((to, &x), &multiple) in to.iter_mut().zip(values).zip(multiples) {
        *to = moved_code(x, inverse_scale, noise(number, multiple));
    }
}

/// Adds sums in i32 times a factor.
#[inline(always)]
pub(crate) unsafe fn add(to: *mut f32, sums: *const u32, count: usize, factor: f32) {
    for c in 0..count {
        // SAFETY: the caller grants rows of so many elements.
        unsafe { *to.add(c) += *sums.cast::<i32>().add(c) as f32 * factor };
    }
}

/// Adds sums in i32, each times a factor of its own.
#[inline(always)]
pub(crate) unsafe fn add_by_columns(
    to: *mut f32,
    sums: *const u32,
    count: usize,
    factors: *const f32,
) {
    for c in 0..count {
        // SAFETY: the caller grants rows of so many elements.
        unsafe { *to.add(c) += *sums.cast::<i32>().add(c) as f32 * *factors.add(c) };
    }
}

/// The codes of rows by a scale for each column, and those scales times a factor; at random where there is a number for each
/// row, by the multiples of the columns.
#[inline(always)]
pub(crate) unsafe fn round_columns(
    real: *const f32,
    [rows, width]: [usize; 2],
    scales: *mut f32,
    factor: f32,
    numbers: Option<(&[f32], &[f32])>,
    codes: *mut i8,
) {
    // SAFETY: granted by the caller; the magnitudes as bits, and the inverse scales, stand where scales will.
    unsafe {
        let bits = std::slice::from_raw_parts_mut(scales.cast::<u32>(), width);
        bits.fill(0);
        for r in 0..rows {
            let row = std::slice::from_raw_parts(real.add(r * width), width);
            for (most, &x) in bits.iter_mut().zip(row) {
                *most = (*most).max(magnitude(x));
            }
        }
        let scales = std::slice::from_raw_parts_mut(scales, width);
        for scale in &mut *scales {
            *scale = 1.0 / scale_of(scale.to_bits());
        }
        for r in 0..rows {
            let row = std::slice::from_raw_parts(real.add(r * width), width);
            let codes = std::slice::from_raw_parts_mut(codes.add(r * width), width);
            if let Some((numbers, multiples)) = numbers {
                for (((to, &x), &inverse), &multiple) in
                    codes.iter_mut().zip(row).zip(&*scales).zip(multiples)
                {
                    *to = moved_code(x, inverse, noise(numbers[r], multiple));
                }
                continue;
            }
            for ((to, &x), &inverse) in codes.iter_mut().zip(row).zip(&*scales) {
                *to = code(x, inverse);
            }
        }
        for scale in scales {
            *scale = 1.0 / *scale * factor;
        }
    }
}

/// The bits of the nearest bf16, ties to even.
#[inline(always)]
pub(crate) fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let bits = if value.is_nan() { bits | 0x0040_0000 } else { rounded };
    (bits >> 16) as u16
}
