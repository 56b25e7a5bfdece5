//! Random numbers, and hidden units of spread ranges.

use qcompile::synthetic::Random;
use qcompile::{Result, Tensor};

/// A number in (0, 1).
fn uniform(random: &mut Random) -> f64 {
    (random.below(1 << 53) as f64 + 0.5) / (1_u64 << 53) as f64
}

/// N(0, 1) (Box and Muller 1958).
pub(crate) fn gaussian(random: &mut Random) -> f64 {
    let radius = (-2.0 * uniform(random).ln()).sqrt();
    radius * (std::f64::consts::TAU * uniform(random)).cos()
}

/// Student's t of three degrees of freedom: heavy tails.
pub(crate) fn student(random: &mut Random) -> f64 {
    let squares: f64 = (0..3).map(|_| gaussian(random).powi(2)).sum();
    gaussian(random) / (squares / 3.0).sqrt()
}

/// Factors exp(σ·N(0, 1)) of hidden units, or the powers of two next to them.
pub(crate) fn factors(units: usize, sigma: f64, powers: bool, random: &mut Random) -> Vec<f32> {
    let exponent = |random: &mut Random| sigma * gaussian(random) * std::f64::consts::LOG2_E;
    let factor = |random: &mut Random| {
        let exponent = exponent(random);
        (if powers { exponent.round() } else { exponent }).exp2() as f32
    };
    (0..units).map(|_| factor(random)).collect()
}

/// A weight `[out, in]` whose rows or columns are multiplied by factors.
pub(crate) fn scaled(weight: &Tensor, factors: &[f32], rows: bool) -> Result<Tensor> {
    let columns = weight.shape().last().copied().unwrap_or(1).max(1);
    let at = |element: usize| if rows { element / columns } else { element % columns };
    let values = weight.to_f32();
    let scaled = values.iter().enumerate().map(|(element, value)| value * factors[at(element)]);
    tensor(weight.shape(), &scaled.collect::<Vec<f32>>())
}

/// A tensor of these values.
pub(crate) fn tensor(shape: &[usize], values: &[f32]) -> Result<Tensor> {
    Tensor::from_f32(shape, values).ok_or_else(|| {
        qcompile::Error::new(qcompile::Code::Internal, format!("{} values", values.len()))
    })
}
