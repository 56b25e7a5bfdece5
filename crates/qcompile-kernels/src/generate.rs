//! Values from nothing: numbers in order, and random numbers that are a function of a counter.

use crate::args::{IotaArgs, RandomArgs};
use crate::{Primitive, no_parts};

/// Elements of a unit.
const BLOCK: usize = 1024;

unsafe extern "C" fn no_scratch(_args: *const u64) -> usize {
    0
}

unsafe extern "C" fn iota_units(args: *const u64, _phase: usize) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    unsafe { (*args.cast::<IotaArgs>()).count.div_ceil(BLOCK) }
}

unsafe extern "C" fn iota_run(args: *const u64, _phase: usize, begin: usize, end: usize) {
    // SAFETY: the caller passes the argument block of this kernel; places are within its count.
    unsafe {
        let args = &*args.cast::<IotaArgs>();
        for at in begin * BLOCK..(end * BLOCK).min(args.count) {
            *args.out.add(at) = at as i64;
        }
    }
}

/// Numbers in order, the same on every tier.
pub(crate) const fn iota_primitive() -> Primitive {
    Primitive { phases: 1, units: iota_units, run: iota_run, scratch: no_scratch, parts: no_parts }
}

unsafe extern "C" fn random_units(args: *const u64, _phase: usize) -> usize {
    // SAFETY: the caller passes the argument block of this kernel.
    unsafe { (*args.cast::<RandomArgs>()).count.div_ceil(BLOCK) }
}

unsafe extern "C" fn random_run(args: *const u64, _phase: usize, begin: usize, end: usize) {
    // SAFETY: the caller passes the argument block of this kernel; places are within its count.
    unsafe {
        let args = &*args.cast::<RandomArgs>();
        let step = *args.step as u64;
        let mut words = (u64::MAX, [0; 4]);
        for at in begin * BLOCK..(end * BLOCK).min(args.count) {
            let place = args.first.wrapping_add(at as u64);
            if words.0 != place / 4 {
                words = (place / 4, philox(args.seed, [place / 4, step]));
            }
            let word = words.1[(place % 4) as usize];
            *args.out.add(at) = (word >> 8) as f32 / (1_u32 << 24) as f32;
        }
    }
}

/// Random numbers, the same on every tier.
pub(crate) const fn random_primitive() -> Primitive {
    Primitive {
        phases: 1,
        units: random_units,
        run: random_run,
        scratch: no_scratch,
        parts: no_parts,
    }
}

/// The four words of a counter under a key: Philox 4x32-10 of Salmon et al. 2011, "Parallel random numbers: as easy as
/// 1, 2, 3".
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
