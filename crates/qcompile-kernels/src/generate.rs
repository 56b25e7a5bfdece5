//! Values from nothing: numbers in order, and random numbers that are a function of a counter.

use crate::args::{IotaArgs, RandomArgs};
use crate::lanes::{Simd, Task};
use crate::{Primitive, no_parts};

/// Elements of a unit.
const BLOCK: usize = 1024;
/// Counters whose random words are made side by side.
const LANES: usize = 16;

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

unsafe extern "C" fn random_run<S: Simd>(
    args: *const u64,
    _phase: usize,
    begin: usize,
    end: usize,
) {
    // SAFETY: the caller passes the argument block of this kernel, on a CPU of the tier.
    unsafe {
        let args = *args.cast::<RandomArgs>();
        S::enter(Numbers { args, begin: begin * BLOCK, end: (end * BLOCK).min(args.count) });
    }
}

/// Random numbers, the same on every tier.
pub(crate) const fn random_primitive<S: Simd>() -> Primitive {
    Primitive {
        phases: 1,
        units: random_units,
        run: random_run::<S>,
        scratch: no_scratch,
        parts: no_parts,
    }
}

/// Numbers from `begin` to `end`.
struct Numbers {
    args: RandomArgs,
    begin: usize,
    end: usize,
}

impl Task for Numbers {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Numbers { args, begin, end } = self;
        let number = |word: u32| (word >> 8) as f32 / (1_u32 << 24) as f32;
        let mut at = begin;
        while at < end {
            let place = args.first.wrapping_add(at as u64);
            let skip = (place % 4) as usize;
            // SAFETY: the caller grants the step and `count` places.
            unsafe {
                let step = *args.step as u64;
                if skip == 0 && end - at >= 4 * LANES {
                    let words = philox::<LANES>(args.seed, place / 4, step);
                    let out = std::slice::from_raw_parts_mut(args.out.add(at), 4 * LANES);
                    for (lane, out) in out.chunks_exact_mut(4).enumerate() {
                        for (word, out) in words.iter().zip(out) {
                            *out = number(word[lane]);
                        }
                    }
                    at += 4 * LANES;
                    continue;
                }
                let count = (4 - skip).min(end - at);
                let words = philox::<1>(args.seed, place / 4, step);
                for (i, [word]) in words.iter().skip(skip).take(count).enumerate() {
                    *args.out.add(at + i) = number(*word);
                }
                at += count;
            }
        }
    }
}

/// The four words of some counters, `first` and those after it, under a key: Philox 4x32-10 of Salmon et al. 2011,
/// "Parallel random numbers: as easy as 1, 2, 3".
#[inline(always)]
fn philox<const N: usize>(key: u64, first: u64, step: u64) -> [[u32; N]; 4] {
    let halves = |x: u64| [x as u32, (x >> 32) as u32];
    let counter: [u64; N] = std::array::from_fn(|lane| first.wrapping_add(lane as u64));
    let (mut a, mut b) = (counter.map(|x| halves(x)[0]), counter.map(|x| halves(x)[1]));
    let [mut c, mut d] = halves(step).map(|half| [half; N]);
    let [mut k, mut l] = halves(key);
    for _ in 0..10 {
        for lane in 0..N {
            let [low_a, high_a] = halves(u64::from(a[lane]) * 0xD251_1F53);
            let [low_c, high_c] = halves(u64::from(c[lane]) * 0xCD9E_8D57);
            a[lane] = high_c ^ b[lane] ^ k;
            b[lane] = low_c;
            c[lane] = high_a ^ d[lane] ^ l;
            d[lane] = low_a;
        }
        k = k.wrapping_add(0x9E37_79B9);
        l = l.wrapping_add(0xBB67_AE85);
    }
    [a, b, c, d]
}
