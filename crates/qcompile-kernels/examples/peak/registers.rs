//! What a core can do at most: loops that touch nothing but registers.

use qcompile_kernels::Tier;

/// f32, bf16 and int8 operations per second of one core with the instructions of a tier (with those of
/// AVX2 for the portable tier); infinity where nothing is known.
pub(crate) fn peak(tier: Tier) -> [f64; 3] {
    #[cfg(target_arch = "x86_64")]
    if tier.max(Tier::Avx2).is_supported() {
        // SAFETY: the CPU has the features of the loops.
        return unsafe {
            if tier >= Tier::Avx512 {
                let real = x86::rate(32, || x86::f32_avx512());
                let wide = tier == Tier::Avx512Bf16;
                let bf16 = if wide { x86::rate(64, || x86::bf16_avx512()) } else { real };
                [real, bf16, x86::rate(128, || x86::int8_avx512())]
            } else {
                let real = x86::rate(16, || x86::f32_avx2());
                [real, real, x86::rate(32, || x86::int8_avx2())]
            }
        };
    }
    let _ = tier;
    [f64::INFINITY; 3]
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// Accumulators: enough to hide the latency, few enough for 16 registers.
    const SUMS: usize = 12;
    const TURNS: usize = 500_000;

    /// The best of many runs of a loop, with that many operations in one of its instructions.
    pub(crate) fn rate(operations: usize, spin: impl Fn()) -> f64 {
        let mut best = f64::INFINITY;
        for _ in 0..40 {
            let start = crate::now();
            spin();
            best = best.min(crate::now() - start);
        }
        (operations * TURNS * SUMS) as f64 / best
    }

    macro_rules! spin {
        ($name:ident, $feature:literal, $value:expr, $sum:ident, $x:ident, $step:expr) => {
            #[target_feature(enable = $feature)]
            pub(crate) fn $name() {
                let $x = black_box($value);
                let mut sums = [$x; SUMS];
                for _ in 0..TURNS {
                    for sum in &mut sums {
                        let $sum = *sum;
                        *sum = $step;
                    }
                }
                black_box(sums);
            }
        };
    }

    spin!(f32_avx2, "avx2,fma", _mm256_set1_ps(0.5), s, x, _mm256_fmadd_ps(x, x, s));
    spin!(
        int8_avx2,
        "avx2",
        _mm256_set1_epi16(3),
        s,
        x,
        // The sum stands in for an operand, so that the product cannot move out of the loop.
        _mm256_add_epi32(s, _mm256_madd_epi16(s, x))
    );
    spin!(f32_avx512, "avx512f", _mm512_set1_ps(0.5), s, x, _mm512_fmadd_ps(x, x, s));
    spin!(
        bf16_avx512,
        "avx512f,avx512bf16",
        _mm512_set1_ps(0.5),
        s,
        x,
        // SAFETY: the types differ in name only.
        unsafe {
            let pairs = std::mem::transmute::<__m512, __m512bh>(x);
            _mm512_dpbf16_ps(s, pairs, pairs)
        }
    );
    spin!(
        int8_avx512,
        "avx512f,avx512vnni",
        _mm512_set1_epi8(3),
        s,
        x,
        _mm512_dpbusd_epi32(s, x, x)
    );
}
