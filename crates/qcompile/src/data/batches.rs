//! The order of samples: shuffled by a seed, addressable by position, shared between workers.

/// One epoch's order: a bijection of `0..samples` whose value at any position costs the same few operations, so that
/// a resumed run goes on in the middle of an epoch without replaying it.
///
/// A balanced Feistel network over the next power of four, with positions beyond the end walked on
/// (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    samples: u64,
    half_bits: u32,
    key: u64,
}

const ROUNDS: u64 = 8;

impl Order {
    /// The order of `samples` samples in epoch `epoch` of seed `seed`.
    #[must_use]
    pub fn new(samples: usize, seed: u64, epoch: u64) -> Self {
        let samples = samples as u64;
        let bits = 64 - samples.saturating_sub(1).leading_zeros();
        Order {
            samples,
            half_bits: bits.div_ceil(2).max(1),
            key: mix(mix(seed) ^ epoch.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
        }
    }

    /// The sample at `position`, which must be less than the number of samples; beyond it, the answer is `position`.
    #[must_use]
    pub fn sample(&self, position: usize) -> usize {
        let mut value = position as u64;
        if value >= self.samples {
            return position;
        }
        // The domain is less than four times as large, so a few walks suffice on average.
        loop {
            value = self.permuted(value);
            if value < self.samples {
                return value as usize;
            }
        }
    }

    fn permuted(&self, value: u64) -> u64 {
        let mask = (1_u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for round in 0..ROUNDS {
            let turned = left ^ (mix(right ^ self.key.wrapping_add(round << 56)) & mask);
            (left, right) = (right, turned);
        }
        left << self.half_bits | right
    }
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// How an epoch is cut into batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batches {
    samples: usize,
    size: usize,
    seed: Option<u64>,
    drop_last: bool,
    rank: usize,
    world: usize,
}

impl Batches {
    /// Batches of `size` (at least 1) out of `samples`, in the order of the data, the short last one kept.
    #[must_use]
    pub fn new(samples: usize, size: usize) -> Self {
        Batches { samples, size: size.max(1), seed: None, drop_last: false, rank: 0, world: 1 }
    }

    /// Shuffles every epoch anew by `seed`.
    #[must_use]
    pub fn shuffled(self, seed: u64) -> Self {
        Batches { seed: Some(seed), ..self }
    }

    /// Whether a last batch that is shorter than the others is left out.
    #[must_use]
    pub fn drop_last(self, drop_last: bool) -> Self {
        Batches { drop_last, ..self }
    }

    /// Yields only the part of worker `rank` of `world` of each batch: neighbours in the batch, parts that differ in
    /// length by at most one (and may be empty in a short last batch), all parts together the whole batch. `size`
    /// stays that of the whole batch.
    #[must_use]
    pub fn shard(self, rank: usize, world: usize) -> Self {
        let world = world.max(1);
        Batches { rank: rank % world, world, ..self }
    }

    /// Batches of one epoch.
    #[must_use]
    pub fn steps(&self) -> usize {
        if self.drop_last { self.samples / self.size } else { self.samples.div_ceil(self.size) }
    }

    /// The whole batch's length at `step` of an epoch, over all workers.
    #[must_use]
    pub fn len_at(&self, step: usize) -> usize {
        self.samples.saturating_sub(step.saturating_mul(self.size)).min(self.size)
    }

    /// This worker's samples of batch `step` of `epoch`.
    #[must_use]
    pub fn batch(&self, epoch: u64, step: usize) -> Vec<usize> {
        let order = self.seed.map(|seed| Order::new(self.samples, seed, epoch));
        let length = self.len_at(step);
        let part = |rank: usize| step * self.size + length * rank / self.world;
        (part(self.rank)..part(self.rank + 1))
            .map(|position| order.map_or(position, |order| order.sample(position)))
            .collect()
    }

    /// The batches of `epoch` from `step` on, each as this worker's sample numbers.
    pub fn epoch(&self, epoch: u64, step: usize) -> impl Iterator<Item = Vec<usize>> + use<> {
        let batches = *self;
        (step..batches.steps()).map(move |step| batches.batch(epoch, step))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_a_permutation_that_differs_by_epoch_and_seed() {
        for samples in [0, 1, 2, 3, 5, 64, 65, 1000] {
            let order = Order::new(samples, 7, 3);
            let mut seen: Vec<usize> = (0..samples).map(|p| order.sample(p)).collect();
            seen.sort_unstable();
            assert!(seen.iter().copied().eq(0..samples), "{samples}");
        }
        let take = |seed, epoch| {
            let order = Order::new(1000, seed, epoch);
            (0..1000).map(|p| order.sample(p)).collect::<Vec<_>>()
        };
        assert_eq!(take(1, 0), take(1, 0));
        assert_ne!(take(1, 0), take(1, 1));
        assert_ne!(take(1, 0), take(2, 0));
    }

    #[test]
    fn order_has_no_visible_pattern() {
        // Mean distance between neighbours of a random permutation of n is n / 3; of the identity, 1.
        let n = 10_000;
        let order = Order::new(n, 42, 0);
        let sum: usize = (1..n).map(|p| order.sample(p).abs_diff(order.sample(p - 1))).sum();
        let mean = sum as f64 / (n - 1) as f64;
        assert!((mean / (n as f64 / 3.0) - 1.0).abs() < 0.05, "{mean}");
        // First sample over many epochs: every tenth of the data about as often.
        let mut counts = [0_usize; 10];
        (0..10_000).for_each(|epoch| counts[Order::new(100, 5, epoch).sample(0) / 10] += 1);
        assert!(counts.iter().all(|&count| (850..1150).contains(&count)), "{counts:?}");
    }

    #[test]
    fn batches_cover_the_epoch_and_resume_inside_it() {
        let batches = Batches::new(10, 4).shuffled(1);
        let all: Vec<_> = batches.epoch(2, 0).collect();
        assert_eq!(all.iter().map(Vec::len).collect::<Vec<_>>(), [4, 4, 2]);
        let mut seen = all.concat();
        seen.sort_unstable();
        assert!(seen.into_iter().eq(0..10));
        assert_eq!(batches.epoch(2, 1).collect::<Vec<_>>(), all[1..]);
        assert_eq!(batches.drop_last(true).epoch(2, 0).collect::<Vec<_>>(), all[..2]);
        assert_eq!(Batches::new(3, 2).batch(9, 1), [2]);
    }

    #[test]
    fn shards_make_up_the_whole_batch() {
        for world in 1..5 {
            let whole = Batches::new(11, 4).shuffled(3);
            for step in 0..whole.steps() {
                let parts: Vec<_> =
                    (0..world).map(|rank| whole.shard(rank, world).batch(1, step)).collect();
                assert_eq!(parts.concat(), whole.batch(1, step));
                let lengths = parts.iter().map(Vec::len);
                assert!(lengths.clone().max().unwrap() - lengths.min().unwrap() <= 1);
            }
        }
    }
}
