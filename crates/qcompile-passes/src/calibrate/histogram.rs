//! How often which elements occur, and the ranges that follow from that.

use super::Range;
use crate::quantize::Codes;

/// Bins of a histogram: 2048 for the magnitudes of each sign.
pub(super) const BINS: usize = 4096;

/// Ranges that are tried for the least error: this many for each end.
const CANDIDATES: u32 = 128;

/// Counts of elements in bins of equal width, symmetric about 0.
#[derive(Clone, Debug)]
pub(super) struct Histogram {
    range: Range,
    /// The edge of the last bin; minus it, that of the first.
    reach: f64,
    counts: Vec<u64>,
}

impl Histogram {
    pub(super) fn new(range: Range) -> Histogram {
        Histogram { range, reach: f64::from(range.amax()), counts: vec![0; BINS] }
    }

    /// Counts the finite elements.
    pub(super) fn add(&mut self, elements: &[f32]) {
        if self.reach == 0.0 {
            return;
        }
        let bins_per_unit = BINS as f64 / (2.0 * self.reach);
        for x in elements.iter().filter(|x| x.is_finite()) {
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates")]
            let bin = ((f64::from(*x) + self.reach) * bins_per_unit) as usize;
            self.counts[bin.min(BINS - 1)] += 1;
        }
    }

    pub(super) fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// The smallest and the largest element.
    pub(super) fn extremes(&self) -> Range {
        self.range
    }

    /// The lower edge of a bin; of that after the last, the upper one of the last.
    fn edge(&self, bin: usize) -> f64 {
        self.reach * (2.0 * bin as f64 / BINS as f64 - 1.0)
    }

    /// The range between two edges, no larger than that of the elements.
    #[allow(clippy::cast_possible_truncation, reason = "a range is f32")]
    pub(super) fn between(&self, low: f64, high: f64) -> Range {
        Range::new((low as f32).max(self.range.low), (high as f32).min(self.range.high))
    }

    /// The range from the lower edge of a bin to that of another.
    pub(super) fn bins(&self, first: usize, end: usize) -> Range {
        self.between(self.edge(first), self.edge(end))
    }

    pub(super) fn percentile(&self, percent: f64, codes: Codes) -> Range {
        let total: u64 = self.counts.iter().sum();
        let outside = total as f64 * (1.0 - percent / 100.0);
        if codes.is_symmetric() {
            let mut out = 0;
            for at in 0..BINS / 2 {
                out += self.counts[at] + self.counts[BINS - 1 - at];
                if out as f64 > outside {
                    return self.bins(at, BINS - at);
                }
            }
            return self.extremes();
        }
        // How many bins at an end hold no more than half of that.
        let empty = |counts: &mut dyn Iterator<Item = &u64>| {
            let mut out = 0;
            let outside = counts.take_while(|&&count| {
                out += count;
                out as f64 <= outside / 2.0
            });
            outside.count()
        };
        let low = empty(&mut self.counts.iter());
        let high = empty(&mut self.counts.iter().rev());
        self.bins(low, BINS - high)
    }

    /// The range with the least squared error: the best of those that shrink both ends alike; then the best upper end
    /// for that lower one, and the best lower end for that upper one.
    pub(super) fn least_error(&self, codes: Codes) -> Range {
        let part =
            |x: f32, candidate: u32| f64::from(x) * f64::from(candidate) / f64::from(CANDIDATES);
        let whole = self.range;
        let mut best = (self.squared_error(whole, codes), whole);
        let mut consider = |candidate: Range| {
            let error = self.squared_error(candidate, codes);
            if error < best.0 {
                best = (error, candidate);
            }
            best.1
        };
        let mut chosen = whole;
        for at in (1..=CANDIDATES).rev() {
            chosen = consider(self.between(part(whole.low, at), part(whole.high, at)));
        }
        if codes.is_symmetric() {
            return chosen;
        }
        let low = f64::from(chosen.low);
        for at in (1..=CANDIDATES).rev() {
            chosen = consider(self.between(low, part(whole.high, at)));
        }
        let high = f64::from(chosen.high);
        for at in (1..=CANDIDATES).rev() {
            chosen = consider(self.between(part(whole.low, at), high));
        }
        chosen
    }

    /// Σ count · (x - rounded x)² over the middles of the bins.
    fn squared_error(&self, range: Range, codes: Codes) -> f64 {
        let grid = codes.grid(range);
        let half = self.reach / BINS as f64;
        let error = |(bin, &count): (usize, &u64)| {
            if count == 0 {
                return 0.0;
            }
            let x = self.edge(bin) + half;
            count as f64 * (x - grid.rounded(x)).powi(2)
        };
        self.counts.iter().enumerate().map(error).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(elements: &[f32]) -> Histogram {
        let low = elements.iter().copied().fold(0.0, f32::min);
        let high = elements.iter().copied().fold(0.0, f32::max);
        let mut histogram = Histogram::new(Range::new(low, high));
        histogram.add(elements);
        histogram
    }

    #[test]
    fn percentiles_cut_off_what_is_rare() {
        let mut elements: Vec<f32> = (0..1000).map(|at| at as f32 / 1000.0).collect();
        elements.push(100.0);
        let histogram = of(&elements);
        let all = histogram.percentile(100.0, Codes::Uint8);
        assert_eq!((all.low, all.high), (0.0, 100.0));
        for codes in [Codes::Uint8, Codes::Int8] {
            let cut = histogram.percentile(99.0, codes);
            assert!(cut.high < 1.2 && cut.low == 0.0, "{codes:?}: {cut:?}");
        }
    }

    #[test]
    fn the_least_error_clamps_an_outlier_that_costs_more_than_it_is_worth() {
        let mut elements: Vec<f32> = (0..100_000).map(|at| (at % 1000) as f32 / 1000.0).collect();
        elements.push(3.0);
        for codes in [Codes::Uint8, Codes::Int8] {
            let histogram = of(&elements);
            let chosen = histogram.least_error(codes);
            assert!(chosen.high < 2.9, "{codes:?}: {chosen:?}");
            assert!(
                histogram.squared_error(chosen, codes)
                    < histogram.squared_error(histogram.extremes(), codes)
            );
        }
    }

    #[test]
    fn zeros_and_what_is_not_finite_are_safe() {
        let histogram = of(&[0.0, 0.0]);
        for range in [histogram.percentile(99.0, Codes::Uint8), histogram.least_error(Codes::Int8)]
        {
            assert_eq!((range.low, range.high), (0.0, 0.0));
        }
        let mut histogram = of(&[1.0]);
        histogram.add(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
        assert_eq!(histogram.counts().iter().sum::<u64>(), 1);
    }
}
