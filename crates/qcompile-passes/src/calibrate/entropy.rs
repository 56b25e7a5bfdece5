//! The range of least Kullback-Leibler divergence (Migacz 2017; the variant of ONNX Runtime, symmetric about 0).

use super::Range;
use super::histogram::{BINS, Histogram};

/// Bins that a candidate is merged into: the levels of one sign of 8 bits.
const LEVELS: usize = 128;
/// What a bin without elements gets from the others, so that every logarithm is finite.
const EPSILON: f64 = 1e-4;

/// The range whose elements, merged into [`LEVELS`] and with all others at its ends, differ least from what they were.
pub(super) fn range(histogram: &Histogram) -> Range {
    let counts = histogram.counts();
    let middle = BINS / 2;
    let divergences = (LEVELS / 2..=middle).map(|reach| {
        let (start, end) = (middle - reach, (middle + reach + 1).min(BINS));
        (divergence(counts, start, end), start, end)
    });
    let best = divergences
        .filter(|(divergence, ..)| divergence.is_finite())
        .min_by(|(a, ..), (b, ..)| a.total_cmp(b));
    best.map_or(histogram.extremes(), |(_, start, end)| histogram.bins(start, end))
}

/// `Σ p log(p / q)` of the bins from `start` to `end`.
fn divergence(counts: &[u64], start: usize, end: usize) -> f64 {
    let within = &counts[start..end];
    let mut p: Vec<f64> = within.iter().map(|&count| count as f64).collect();
    let last = p.len() - 1;
    p[0] += counts[..start].iter().sum::<u64>() as f64;
    p[last] += counts[end..].iter().sum::<u64>() as f64;
    let merged = within.len() / LEVELS;
    let mut q = vec![0.0; p.len()];
    for level in 0..LEVELS {
        let first = level * merged;
        // What does not divide evenly belongs to the last level.
        let after = if level + 1 == LEVELS { within.len() } else { first + merged };
        let sum: u64 = within[first..after].iter().sum();
        let occupied = p[first..after].iter().filter(|&&count| count != 0.0).count();
        for at in (first..after).filter(|&at| p[at] != 0.0) {
            q[at] = sum as f64 / occupied as f64;
        }
    }
    match (smooth(&mut p), smooth(&mut q)) {
        (true, true) => {
            let (total_p, total_q): (f64, f64) = (p.iter().sum(), q.iter().sum());
            p.iter().zip(&q).map(|(p, q)| p / total_p * (p / total_p / (q / total_q)).ln()).sum()
        }
        _ => f64::INFINITY,
    }
}

/// Gives every bin without elements [`EPSILON`], and takes it from the others. False if those have too little.
fn smooth(counts: &mut [f64]) -> bool {
    let empty = counts.iter().filter(|&&count| count == 0.0).count();
    let occupied = counts.len() - empty;
    if occupied == 0 {
        return false;
    }
    let taken = EPSILON * empty as f64 / occupied as f64;
    if taken >= 1.0 {
        return false;
    }
    for count in counts {
        *count = if *count == 0.0 { EPSILON } else { *count - taken };
        if *count <= 0.0 {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_thin_tail_is_clamped_and_a_flat_distribution_is_not() {
        let mut peaked = Histogram::new(Range::new(-16.0, 16.0));
        let elements: Vec<f32> = (1..20_000).map(|at| (at as f32 / 20_000.0).ln()).collect();
        peaked.add(&elements);
        let negated: Vec<f32> = elements.iter().map(|x| -x).collect();
        peaked.add(&negated);
        let chosen = range(&peaked);
        assert!(chosen.high < 12.0 && chosen.high > 2.0, "{chosen:?}");
        let mut flat = Histogram::new(Range::new(-1.0, 1.0));
        let elements: Vec<f32> = (0..200_000).map(|at| at as f32 / 100_000.0 - 1.0).collect();
        flat.add(&elements);
        assert!(range(&flat).high > 0.95, "{:?}", range(&flat));
    }

    #[test]
    fn a_constant_keeps_its_range() {
        let mut constant = Histogram::new(Range::new(0.0, 0.0));
        constant.add(&[0.0; 100]);
        assert_eq!(range(&constant), Range::new(0.0, 0.0));
    }
}
