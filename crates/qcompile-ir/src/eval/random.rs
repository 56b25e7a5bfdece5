//! Random numbers that are a function of a counter: Philox 4x32-10 of Salmon et al. 2011, "Parallel random numbers: as
//! easy as 1, 2, 3".

use super::Data;

/// Uniform numbers in [0, 1): those of places `first..first + count` in one step.
pub(super) fn uniform(seed: u64, step: i64, first: u64, count: usize) -> Data {
    let number = |place: u64| {
        let word = philox(seed, [place / 4, step.cast_unsigned()])[(place % 4) as usize];
        f64::from(word >> 8) / f64::from(1_u32 << 24)
    };
    Data::Float((0..count as u64).map(|at| number(first.wrapping_add(at))).collect())
}

/// The four words of a counter under a key.
fn philox(key: u64, counter: [u64; 2]) -> [u32; 4] {
    let halves = |x: u64| [x as u32, (x >> 32) as u32];
    let [[mut a, mut b], [mut c, mut d]] = counter.map(halves);
    let [mut k, mut l] = halves(key);
    for _ in 0..10 {
        let [low_a, high_a] = halves(u64::from(a) * 0xD251_1F53);
        let [low_c, high_c] = halves(u64::from(c) * 0xCD9E_8D57);
        (a, b, c, d) = (high_c ^ b ^ k, low_c, high_a ^ d ^ l, low_a);
        k = k.wrapping_add(0x9E37_79B9);
        l = l.wrapping_add(0xBB67_AE85);
    }
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers of the authors' library.
    #[test]
    fn philox_gives_the_published_numbers() {
        assert_eq!(philox(0, [0, 0]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd];
        assert_eq!(philox(u64::MAX, [u64::MAX, u64::MAX]), ones);
        let counter = [0x85a3_08d3_243f_6a88, 0x0370_7344_1319_8a2e];
        let pi = [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1];
        assert_eq!(philox(0x299f_31d0_a409_3822, counter), pi);
    }
}
