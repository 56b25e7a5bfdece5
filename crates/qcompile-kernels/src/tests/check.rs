//! What the tests of all kernels share: tiers to test, operands, and how to run a primitive.

use crate::{KernelId, Kernels, Primitive, Tier, kernels};

/// Every table that this CPU can run, and the AVX-512 algorithms on plain arrays.
pub(crate) fn tables() -> Vec<&'static Kernels> {
    let mut tables: Vec<_> =
        Tier::ALL.into_iter().filter(|tier| tier.is_supported()).map(kernels).collect();
    tables.push(&super::emulated::TABLE);
    tables
}

/// How codes of a left operand are read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CodesOf {
    pub(crate) unsigned: bool,
    pub(crate) zero: Option<u8>,
}

impl CodesOf {
    /// What a code is less the zero point.
    pub(crate) fn value(self, code: i8) -> i32 {
        let whole = |byte: u8| {
            if self.unsigned { i32::from(byte) } else { i32::from(byte.cast_signed()) }
        };
        whole(code.cast_unsigned()) - self.zero.map_or(0, whole)
    }

    /// The argument of a kernel.
    pub(crate) fn zero(&self) -> *const u8 {
        self.zero.as_ref().map_or(std::ptr::null(), std::ptr::from_ref)
    }
}

/// A small generator (64-bit LCG, upper bits).
pub(crate) struct Random(pub(crate) u64);

/// Values in [0, 1).
pub(crate) fn fractions(random: &mut Random, count: usize) -> Vec<f32> {
    (0..count).map(|_| (random.next() >> 7) as f32 / (1 << 24) as f32).collect()
}

impl Random {
    pub(crate) fn next(&mut self) -> u32 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }
    /// Values in -1..1.
    pub(crate) fn reals(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.next() as f32 / (1_u64 << 30) as f32 - 1.0).collect()
    }
    /// bf16 values in -1..1, as bits.
    pub(crate) fn halves(&mut self, count: usize) -> Vec<u16> {
        self.reals(count).iter().map(|v| (v.to_bits() >> 16) as u16).collect()
    }
    /// bf16 of whole numbers from -4 to 4, as bits: sums of a few of them and their halves and quarters are bf16, too.
    pub(crate) fn whole_halves(&mut self, count: usize) -> Vec<u16> {
        let whole = |number: usize| (number as f32 - 4.0).to_bits() >> 16;
        (0..count).map(|_| whole(self.between(0, 8)) as u16).collect()
    }
    /// A way to read codes of a left operand: symmetric, of i8 or u8 with a zero point, and u8 without one.
    pub(crate) fn codes(&mut self) -> CodesOf {
        let zero = (self.next() % 256) as u8;
        match self.next() % 4 {
            0 => CodesOf { unsigned: false, zero: None },
            1 => CodesOf { unsigned: false, zero: Some(zero) },
            2 => CodesOf { unsigned: true, zero: Some(zero) },
            _ => CodesOf { unsigned: true, zero: None },
        }
    }
    /// All i8 values, the extreme ones often.
    pub(crate) fn bytes(&mut self, count: usize) -> Vec<i8> {
        (0..count)
            .map(|_| match self.next() % 8 {
                0 => -128,
                1 => 127,
                _ => self.next() as i8,
            })
            .collect()
    }
    /// A number in `low..=high`.
    pub(crate) fn between(&mut self, low: usize, high: usize) -> usize {
        low + self.next() as usize % (high - low + 1)
    }
}

/// Scratch of a primitive for an argument block.
pub(crate) fn scratch<A>(table: &Kernels, id: KernelId, args: &A) -> Vec<[u64; 8]> {
    // SAFETY: the block is the kernel's.
    let bytes = unsafe { (table.get(id).scratch)(std::ptr::from_ref(args).cast()) };
    vec![[u64::MAX; 8]; bytes.div_ceil(64) + 1]
}

/// For [`run`]: every unit by itself.
pub(crate) const ALONE: usize = usize::MAX;

/// Runs all phases, each cut into `pieces` ranges that are run last first.
pub(crate) fn run<A>(table: &Kernels, id: KernelId, args: &A, pieces: usize) {
    let primitive: &Primitive = table.get(id);
    let args: *const u64 = std::ptr::from_ref(args).cast();
    for phase in 0..primitive.phases {
        // SAFETY: the block is the kernel's and its pointers are valid, as the tests set them up.
        unsafe {
            let units = (primitive.units)(args, phase);
            let pieces = if pieces == ALONE { units } else { pieces };
            for piece in (0..pieces).rev() {
                (primitive.run)(args, phase, units * piece / pieces, units * (piece + 1) / pieces);
            }
        }
    }
}

/// Compares with a reference in f64, by `tolerance` times the largest magnitude (at least 1).
pub(crate) fn assert_close(actual: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    let scale = expected.iter().fold(1.0_f64, |m, &e| m.max(e.abs()));
    for (i, (&a, &e)) in actual.iter().zip(expected).enumerate() {
        let error = (f64::from(a) - e).abs();
        assert!(error <= tolerance * scale, "{what}: element {i} is {a}, expected {e}");
    }
}

/// A result between two rows of values that nobody may touch.
pub(crate) struct Guarded {
    values: Vec<f32>,
    size: usize,
}

impl Guarded {
    /// Values on either side.
    const MARGIN: usize = 80;
    pub(crate) const CANARY: f32 = 12345.0;

    pub(crate) fn new(size: usize) -> Guarded {
        Guarded { values: vec![Guarded::CANARY; size + 2 * Guarded::MARGIN], size }
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut f32 {
        self.values[Guarded::MARGIN..].as_mut_ptr()
    }

    /// The result, after a look at what surrounds it.
    pub(crate) fn checked(&self, what: &str) -> Vec<f32> {
        let (before, rest) = self.values.split_at(Guarded::MARGIN);
        let (result, after) = rest.split_at(self.size);
        let mut around = before.iter().chain(after);
        assert!(around.all(|&v| v == Guarded::CANARY), "{what}: wrote beside the result");
        result.to_vec()
    }
}

/// An epilogue that copies tiles to a dense matrix and counts how often each element came.
pub(crate) struct Collector {
    pub(crate) values: Vec<f32>,
    pub(crate) seen: Vec<u32>,
    /// The part in which each element came.
    pub(crate) parts: Vec<usize>,
    pub(crate) columns: usize,
}

impl Collector {
    pub(crate) fn new(rows: usize, columns: usize) -> Collector {
        let (values, seen) = (vec![f32::NAN; rows * columns], vec![0; rows * columns]);
        Collector { values, seen, parts: vec![usize::MAX; rows * columns], columns }
    }

    /// Checks what came: each element once, in a part that belongs to its row and that the kernel knows.
    pub(crate) fn checked<A>(&self, table: &Kernels, id: KernelId, args: &A, what: &str) {
        assert!(self.seen.iter().all(|&seen| seen == 1), "{what}: epilogue coverage");
        // SAFETY: the block is the kernel's.
        let parts = unsafe { (table.get(id).parts)(std::ptr::from_ref(args).cast()) };
        for row in self.parts.chunks(self.columns.max(1)) {
            let same = row.iter().all(|&part| part == row[0] && part < parts);
            assert!(same, "{what}: a row in parts {row:?} of {parts}");
        }
    }

    pub(crate) unsafe extern "C" fn collect(
        ctx: *const u8,
        tile: *const f32,
        tile_stride: usize,
        row0: usize,
        rows: usize,
        col0: usize,
        cols: usize,
        part: usize,
    ) {
        // SAFETY: the tests pass a collector that nothing else uses, on one thread.
        unsafe {
            let this = &mut *ctx.cast_mut().cast::<Collector>();
            for r in 0..rows {
                for c in 0..cols {
                    let at = (row0 + r) * this.columns + col0 + c;
                    this.values[at] = *tile.add(r * tile_stride + c);
                    this.seen[at] += 1;
                    this.parts[at] = part;
                }
            }
        }
    }
}
