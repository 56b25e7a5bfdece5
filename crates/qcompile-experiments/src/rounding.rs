//! Symmetric rounding of weights on the host, and multipoint quantization.

/// The largest code of `bits` bits, of a symmetric range: 127 for 8.
pub(crate) fn largest_code(bits: u32) -> f32 {
    ((1_u32 << (bits - 1)) - 1) as f32
}

/// The scale that the largest magnitude gives; any for zeros.
pub(crate) fn scale(values: &[f32], bits: u32) -> f32 {
    let amax = values.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
    (amax / largest_code(bits)).max(1e-30)
}

/// The code of a value.
pub(crate) fn code(value: f32, scale: f32, bits: u32) -> f32 {
    let most = largest_code(bits);
    (value / scale).round_ties_even().clamp(-most, most)
}

/// Values rounded by one scale.
pub(crate) fn rounded(values: &[f32], scale: f32, bits: u32) -> Vec<f32> {
    values.iter().map(|&value| code(value, scale, bits) * scale).collect()
}

/// Values as the sum of `points` vectors of `bits`-bit codes, each with a factor (Liu et al. 2021, arXiv:2002.09049):
/// greedily, each point is the code vector nearest to what the points before it have left, over a grid of clippings
/// and with the best factor `<r, q> / <q, q>` for each.
pub(crate) fn multipoint(values: &[f32], bits: u32, points: usize) -> Vec<f32> {
    const CLIPPINGS: usize = 64;
    let mut left = values.to_vec();
    for _ in 0..points {
        let widest = scale(&left, bits);
        let mut best = (f64::INFINITY, left.clone());
        for clipping in 1..=CLIPPINGS {
            let scale = widest * clipping as f32 / CLIPPINGS as f32;
            let codes: Vec<f32> = left.iter().map(|&value| code(value, scale, bits)).collect();
            let product = |a: &[f32], b: &[f32]| -> f64 {
                a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
            };
            let energy = product(&codes, &codes);
            if energy == 0.0 {
                continue;
            }
            let factor = (product(&left, &codes) / energy) as f32;
            let rest: Vec<f32> =
                left.iter().zip(&codes).map(|(value, code)| value - factor * code).collect();
            let error = product(&rest, &rest);
            if error < best.0 {
                best = (error, rest);
            }
        }
        left = best.1;
    }
    values.iter().zip(&left).map(|(value, rest)| value - rest).collect()
}

/// `|x - y| / |x|`.
pub(crate) fn relative_error(exact: &[f32], near: &[f32]) -> f64 {
    let energy = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let error = energy(&mut exact.iter().zip(near).map(|(&x, &y)| f64::from(x) - f64::from(y)));
    let signal = energy(&mut exact.iter().map(|&x| f64::from(x)));
    (error / signal).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_points_come_nearer() {
        let values: Vec<f32> = (0..64).map(|at| (at as f32 * 0.7).sin()).collect();
        let error = |points| relative_error(&values, &multipoint(&values, 4, points));
        assert!(error(1) < 0.1 && error(2) < 0.4 * error(1) && error(3) < 0.6 * error(2));
        assert_eq!(multipoint(&[0.0; 4], 4, 2), [0.0; 4]);
        // A vector of codes needs one point.
        assert!(relative_error(&[7.0, -3.0, 1.0], &multipoint(&[7.0, -3.0, 1.0], 4, 1)) < 1e-6);
    }
}
