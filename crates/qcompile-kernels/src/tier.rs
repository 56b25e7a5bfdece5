//! Levels of CPU capability.

use std::fmt;
use std::str::FromStr;

/// The instruction set that a table of kernels was built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// Plain Rust, for every CPU.
    Portable,
    /// AVX2 and FMA, 8 lanes.
    Avx2,
    /// AVX-512 F, BW, VL, DQ and VNNI, 16 lanes.
    Avx512,
    /// The same with `vdpbf16ps`: its bf16 kernels differ, all others are those of [`Tier::Avx512`].
    Avx512Bf16,
    /// The same with AMX tiles, which multiply bf16 and int8; all other kernels are those of [`Tier::Avx512`].
    Avx512Amx,
}

impl Tier {
    /// All tiers, weakest first.
    pub const ALL: [Tier; 5] =
        [Tier::Portable, Tier::Avx2, Tier::Avx512, Tier::Avx512Bf16, Tier::Avx512Amx];

    /// The fastest tier that this CPU can run; asks as [`Tier::is_supported`] does.
    #[must_use]
    pub fn detect() -> Tier {
        let fast = |tier: &Tier| tier.is_supported() && (*tier != Tier::Avx512Bf16 || fast_bf16());
        Tier::ALL.into_iter().rev().find(fast).unwrap_or(Tier::Portable)
    }

    /// Whether this CPU can run the tier's kernels.
    ///
    /// To know it of AMX, Linux is asked to let this process use tiles: it grants them for good, and a thread's saved
    /// state grows by 8 KiB once it uses them.
    #[must_use]
    pub fn is_supported(self) -> bool {
        match self {
            Tier::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Tier::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Tier::Avx512 => {
                Tier::Avx2.is_supported()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "x86_64")]
            Tier::Avx512Bf16 => {
                Tier::Avx512.is_supported() && is_x86_feature_detected!("avx512bf16")
            }
            #[cfg(target_arch = "x86_64")]
            Tier::Avx512Amx => Tier::Avx512Bf16.is_supported() && crate::amx::is_supported(),
            #[cfg(not(target_arch = "x86_64"))]
            Tier::Avx2 | Tier::Avx512 | Tier::Avx512Bf16 | Tier::Avx512Amx => false,
        }
    }
}

/// Whether `vdpbf16ps` does more in a cycle than the fused multiply-add of f32. AMD's cores do twice as much with it;
/// Intel's start one every two to three cycles and two of the other in each: widened operands are faster there.
#[cfg(target_arch = "x86_64")]
fn fast_bf16() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
    name.as_flattened() != b"GenuineIntel"
}

#[cfg(not(target_arch = "x86_64"))]
fn fast_bf16() -> bool {
    true
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Tier::Portable => "portable",
            Tier::Avx2 => "avx2",
            Tier::Avx512 => "avx512",
            Tier::Avx512Bf16 => "avx512_bf16",
            Tier::Avx512Amx => "avx512_amx",
        })
    }
}

/// The text is no tier's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownTier(pub String);

impl fmt::Display for UnknownTier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "unknown CPU tier '{}': expected portable, avx2, avx512, avx512_bf16 or avx512_amx",
            self.0
        )
    }
}

impl std::error::Error for UnknownTier {}

impl FromStr for Tier {
    type Err = UnknownTier;

    fn from_str(text: &str) -> Result<Tier, UnknownTier> {
        Tier::ALL
            .into_iter()
            .find(|tier| tier.to_string() == text)
            .ok_or_else(|| UnknownTier(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for tier in Tier::ALL {
            assert_eq!(tier.to_string().parse(), Ok(tier));
        }
        assert!("avx9".parse::<Tier>().is_err());
    }

    #[test]
    fn detected_tier_is_supported() {
        assert!(Tier::Portable.is_supported());
        assert!(Tier::detect().is_supported());
    }
}
