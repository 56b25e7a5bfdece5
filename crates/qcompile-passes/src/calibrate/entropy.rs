//! The range of least Kullback-Leibler divergence (Migacz 2017, "8-bit inference with TensorRT"), computed as NVIDIA's
//! pytorch-quantization does: over magnitudes, with as many levels as there are codes for one sign.

use super::Range;
use super::histogram::{BINS, Histogram};
use crate::quantize::Codes;

/// Bins of magnitudes.
const MAGNITUDES: usize = BINS / 2;
/// Fewer bins than this are no candidate.
const FIRST: usize = 128;

/// The range whose magnitudes, merged into the levels of the codes and with all others in the last bin, differ least from
/// what they were; of equally good ones the largest.
pub(super) fn range(histogram: &Histogram, codes: Codes) -> Range {
    let signs = histogram.counts();
    let mut counts: Vec<f64> = (0..MAGNITUDES)
        .map(|at| (signs[MAGNITUDES + at] + signs[MAGNITUDES - 1 - at]) as f64)
        .collect();
    // Zeros are exact in every range, and many behind a relu.
    counts[0] = counts[1];
    let both = codes.is_symmetric() || histogram.extremes().low < 0.0;
    let levels = if both { 128 } else { 256 };
    let mut best = (f64::INFINITY, MAGNITUDES);
    for end in FIRST..=MAGNITUDES {
        let divergence = divergence(&counts, end, levels);
        if divergence <= best.0 {
            best = (divergence, end);
        }
    }
    if best.0.is_finite() {
        histogram.bins(MAGNITUDES - best.1, MAGNITUDES + best.1)
    } else {
        histogram.extremes()
    }
}

/// `Σ p log(p / q)` of the first `end` bins: `p` as they are, with the others in the last one; `q` with the bins of a level
/// alike, where they are not empty.
fn divergence(counts: &[f64], end: usize, levels: usize) -> f64 {
    let level = |bin: usize| bin * levels / end;
    let (mut sums, mut occupied) = (vec![0.0; levels], vec![0.0; levels]);
    for (bin, &count) in counts[..end].iter().enumerate().filter(|(_, count)| **count > 0.0) {
        sums[level(bin)] += count;
        occupied[level(bin)] += 1.0;
    }
    let beyond: f64 = counts[end..].iter().sum();
    let within: f64 = counts[..end].iter().sum();
    let mut divergence = 0.0;
    for (bin, &count) in counts[..end].iter().enumerate() {
        let p = (count + if bin + 1 == end { beyond } else { 0.0 }) / (within + beyond);
        if p == 0.0 {
            continue;
        }
        if count == 0.0 {
            return f64::INFINITY;
        }
        let q = sums[level(bin)] / occupied[level(bin)] / within;
        divergence += p * (p / q).ln();
    }
    divergence
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
        let chosen = range(&peaked, Codes::Int8);
        assert!(chosen.high < 12.0 && chosen.high > 2.0, "{chosen:?}");
        let mut flat = Histogram::new(Range::new(-1.0, 1.0));
        let elements: Vec<f32> = (0..200_000).map(|at| at as f32 / 100_000.0 - 1.0).collect();
        flat.add(&elements);
        assert!(range(&flat, Codes::Int8).high > 0.95, "{:?}", range(&flat, Codes::Int8));
    }

    #[test]
    fn a_constant_keeps_its_range() {
        let mut constant = Histogram::new(Range::new(0.0, 0.0));
        constant.add(&[0.0; 100]);
        assert_eq!(range(&constant, Codes::Uint8), Range::new(0.0, 0.0));
    }
}
