//! Many numbers in [0, 1) from one: turned by multiples of the golden ratio, which fill the interval most evenly (a rotation
//! as of Cranley and Patterson 1976, doi:10.1137/0713071).

/// The golden ratio's part behind the point.
const GOLDEN: f64 = 0.618_033_988_749_894_9;

/// The part behind the point of this multiple of the golden ratio, rounded to f32; it may be 1.
#[must_use]
#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    reason = "numbered near enough"
)]
pub fn golden_multiple(place: usize) -> f32 {
    (place as f64 * GOLDEN).fract() as f32
}

/// `number` in [0, 1), turned by [`golden_multiple`] of a place: in [0, 1) again.
#[must_use]
pub fn turned(number: f32, place: usize) -> f32 {
    let sum = number + golden_multiple(place);
    if sum >= 1.0 { sum - 1.0 } else { sum }
}
