//! What attention reads and multiplies: the types in memory, and the lanes of the products.

use crate::args::AttentionArgs;
use crate::attention::BLOCK;
use crate::lanes::{Codes, Element, Lanes, Simd};
use crate::pack::{self, Left, Right, Source};
use crate::rounding::bf16;
use crate::tile::Panels;
use std::marker::PhantomData;

/// A strided matrix.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<E> {
    pub(crate) first: *const E,
    pub(crate) row_stride: usize,
    pub(crate) column_stride: usize,
}

/// Rows of words, as the left operand of a product.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) first: *const u32,
    pub(crate) row_stride: usize,
    /// From one word of a row to the next.
    pub(crate) step: usize,
}

/// Which side of a product a matrix is packed for: K runs along its columns (as in `x · matrixᵀ`) or its rows.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Along {
    Columns,
    Rows,
}

/// What operands and results hold, and what products run in; all else is f32.
pub(crate) trait Kind: Copy + 'static {
    type Stored: Copy + 'static;
    type Result: Copy + 'static;
    type Lanes<S: Simd>: Lanes;
    /// Whether sums are i32, which cannot be brought to another maximum.
    const INTEGER: bool = false;
    /// Whether `staging` of as many words as the matrix has elements is wanted.
    const STAGED: bool;

    /// The matrix as a left operand.
    ///
    /// # Safety
    /// The matrix has the rows and columns; the CPU supports the tier. So for all that follow.
    unsafe fn left<S: Simd>(
        from: Matrix<Self::Stored>,
        size: [usize; 2],
        staging: *mut f32,
    ) -> Rows;

    /// Packs the matrix as a right operand; `to` has room for [`Panels::words`].
    unsafe fn right<S: Simd>(
        from: Matrix<Self::Stored>,
        along: Along,
        size: [usize; 2],
        staging: *mut f32,
        to: *mut u32,
    );

    /// What sums are multiplied with: of scores, and of the result.
    #[inline(always)]
    unsafe fn scales(args: &AttentionArgs) -> [f32; 2] {
        [f32::from_bits(args.scale as u32), 1.0]
    }

    /// Makes the first `count` sums of a row f32 in place, where they are not.
    #[inline(always)]
    unsafe fn real(_row: *mut f32, _count: usize) {}

    /// Makes the first `count` values of a row, whole blocks, words of a left operand in place: nothing where those are
    /// f32.
    #[inline(always)]
    unsafe fn narrow<S: Simd>(_row: *mut f32, _count: usize) {}

    /// Writes `values[i] * factor`, where the values are sums.
    unsafe fn store(values: *const f32, count: usize, factor: f32, to: *mut Self::Result);
}

/// Writes values.
///
/// # Safety
/// `count` values are there, and room for as many.
#[inline(always)]
pub(crate) unsafe fn write<F: Element>(values: *const f32, count: usize, to: *mut F) {
    for i in 0..count {
        // SAFETY: granted by the caller.
        unsafe { *to.add(i) = F::nearest(*values.add(i)) };
    }
}

/// f32 throughout.
#[derive(Clone, Copy)]
pub(crate) struct Real;

impl Kind for Real {
    type Stored = f32;
    type Result = f32;
    type Lanes<S: Simd> = S::Real;
    const STAGED: bool = false;

    #[inline(always)]
    unsafe fn left<S: Simd>(from: Matrix<f32>, _: [usize; 2], _: *mut f32) -> Rows {
        Rows { first: from.first.cast(), row_stride: from.row_stride, step: from.column_stride }
    }
    #[inline(always)]
    unsafe fn right<S: Simd>(
        from: Matrix<f32>,
        along: Along,
        size: [usize; 2],
        _: *mut f32,
        to: *mut u32,
    ) {
        // SAFETY: passed on from the caller.
        unsafe { pack::<S::Real>(from, along, size, to) };
    }
    #[inline(always)]
    unsafe fn store(values: *const f32, count: usize, factor: f32, to: *mut f32) {
        for i in 0..count {
            // SAFETY: granted by the caller.
            unsafe { *to.add(i) = *values.add(i) * factor };
        }
    }
}

/// bf16 in memory, given as its bits, and products in f32.
#[derive(Clone, Copy)]
pub(crate) struct Widened;

impl Kind for Widened {
    type Stored = u16;
    type Result = u16;
    type Lanes<S: Simd> = S::Real;
    const STAGED: bool = true;

    #[inline(always)]
    unsafe fn left<S: Simd>(from: Matrix<u16>, size: [usize; 2], staging: *mut f32) -> Rows {
        // SAFETY: passed on from the caller.
        unsafe { Real::left::<S>(widen(from, size, staging), size, staging) }
    }
    #[inline(always)]
    unsafe fn right<S: Simd>(
        from: Matrix<u16>,
        along: Along,
        size: [usize; 2],
        staging: *mut f32,
        to: *mut u32,
    ) {
        // SAFETY: passed on from the caller.
        unsafe { pack::<S::Real>(widen(from, size, staging), along, size, to) };
    }
    #[inline(always)]
    unsafe fn store(values: *const f32, count: usize, factor: f32, to: *mut u16) {
        for i in 0..count {
            // SAFETY: granted by the caller.
            unsafe { *to.add(i) = bf16(*values.add(i) * factor) };
        }
    }
}

/// bf16 in memory and in the products.
#[derive(Clone, Copy)]
pub(crate) struct Bf16;

impl Kind for Bf16 {
    type Stored = u16;
    type Result = u16;
    type Lanes<S: Simd> = S::Bf16;
    const STAGED: bool = true;

    #[inline(always)]
    unsafe fn left<S: Simd>(from: Matrix<u16>, size: [usize; 2], staging: *mut f32) -> Rows {
        // SAFETY: passed on from the caller.
        unsafe { pack_rows::<S::Bf16>(from, size, staging.cast()) }
    }
    #[inline(always)]
    unsafe fn right<S: Simd>(
        from: Matrix<u16>,
        along: Along,
        size: [usize; 2],
        _: *mut f32,
        to: *mut u32,
    ) {
        // SAFETY: passed on from the caller.
        unsafe { pack::<S::Bf16>(from, along, size, to) };
    }
    #[inline(always)]
    unsafe fn narrow<S: Simd>(row: *mut f32, count: usize) {
        for at in (0..count).step_by(BLOCK) {
            // SAFETY: the caller grants whole blocks; what is written lies no further than what was read.
            unsafe {
                let block = *row.add(at).cast::<[f32; BLOCK]>();
                if <S::Bf16 as Lanes>::GROUP == 1 {
                    let to = &mut *row.add(at).cast::<[u32; BLOCK]>();
                    for i in 0..BLOCK {
                        to[i] = u32::from(bf16(block[i])) << 16;
                    }
                } else {
                    let to = &mut *row.cast::<u16>().add(at).cast::<[u16; BLOCK]>();
                    for i in 0..BLOCK {
                        to[i] = bf16(block[i]);
                    }
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn store(values: *const f32, count: usize, factor: f32, to: *mut u16) {
        // SAFETY: passed on from the caller.
        unsafe { Widened::store(values, count, factor, to) };
    }
}

/// i8 in memory and in the products, with one scale for each operand; the result is of type `F`.
#[derive(Clone, Copy)]
pub(crate) struct Int8<F>(PhantomData<F>);

/// The largest code of an exponential.
const LARGEST: f32 = 127.0;

impl<F: Element> Kind for Int8<F> {
    type Stored = i8;
    type Result = F;
    type Lanes<S: Simd> = S::Int8;
    const INTEGER: bool = true;
    const STAGED: bool = true;

    #[inline(always)]
    unsafe fn left<S: Simd>(from: Matrix<i8>, size: [usize; 2], staging: *mut f32) -> Rows {
        // SAFETY: passed on from the caller.
        unsafe { pack_rows::<S::Int8>(from, size, staging.cast()) }
    }
    #[inline(always)]
    unsafe fn right<S: Simd>(
        from: Matrix<i8>,
        along: Along,
        size: [usize; 2],
        _: *mut f32,
        to: *mut u32,
    ) {
        // SAFETY: passed on from the caller.
        unsafe { pack::<S::Int8>(from, along, size, to) };
    }
    #[inline(always)]
    unsafe fn scales(args: &AttentionArgs) -> [f32; 2] {
        let [q, k, v] = args.scales;
        // SAFETY: the caller grants a scale of each operand.
        unsafe { [f32::from_bits(args.scale as u32) * (*q * *k), *v / LARGEST] }
    }
    #[inline(always)]
    unsafe fn real(row: *mut f32, count: usize) {
        for i in 0..count {
            // SAFETY: granted by the caller.
            unsafe { *row.add(i) = *row.add(i).cast::<i32>() as f32 };
        }
    }
    #[inline(always)]
    unsafe fn narrow<S: Simd>(row: *mut f32, count: usize) {
        // Adding 1.5 * 2^23 rounds to a whole number in the low mantissa bits.
        const SHIFT: f32 = 12_582_912.0;
        for at in (0..count).step_by(BLOCK) {
            // SAFETY: the caller grants whole blocks; what is written lies no further than what was read.
            unsafe {
                let block = *row.add(at).cast::<[f32; BLOCK]>();
                let code = |value: f32| (value * LARGEST + SHIFT).to_bits() as u8;
                if <S::Int8 as Lanes>::GROUP == 4 {
                    let to = &mut *row.cast::<u8>().add(at).cast::<[u8; BLOCK]>();
                    for i in 0..BLOCK {
                        to[i] = code(block[i]);
                    }
                } else {
                    let to = &mut *row.cast::<u16>().add(at).cast::<[u16; BLOCK]>();
                    for i in 0..BLOCK {
                        to[i] = u16::from(code(block[i]));
                    }
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn store(values: *const f32, count: usize, factor: f32, to: *mut F) {
        for i in 0..count {
            // SAFETY: granted by the caller.
            unsafe { *to.add(i) = F::nearest(*values.add(i).cast::<i32>() as f32 * factor) };
        }
    }
}

/// The matrix in f32, row after row.
#[inline(always)]
unsafe fn widen(from: Matrix<u16>, [rows, columns]: [usize; 2], to: *mut f32) -> Matrix<f32> {
    for row in 0..rows {
        for column in 0..columns {
            // SAFETY: granted by the caller.
            unsafe {
                let bits = *from.first.add(row * from.row_stride + column * from.column_stride);
                *to.add(row * columns + column) = bits.real();
            }
        }
    }
    Matrix { first: to, row_stride: columns, column_stride: 1 }
}

/// Packs a matrix as left operand, row after row.
#[inline(always)]
pub(crate) unsafe fn pack_rows<L: Lanes>(
    from: Matrix<L::Element>,
    [rows, columns]: [usize; 2],
    to: *mut u32,
) -> Rows {
    let words = columns.div_ceil(L::GROUP);
    for row in 0..rows {
        // SAFETY: granted by the caller.
        unsafe {
            let (from_row, to) = (from.first.add(row * from.row_stride), to.add(row * words));
            if from.column_stride == 1 {
                pack::row::<L, Left>(from_row, columns, to, 0);
                continue;
            }
            let source =
                Source { first: from_row, k_stride: from.column_stride, column_stride: 0, flip: 0 };
            pack::interleave::<L, Left>(source, columns, 1, to, 1);
        }
    }
    Rows { first: to, row_stride: words, step: 1 }
}

/// Packs a matrix as right operand.
#[inline(always)]
pub(crate) unsafe fn pack<L: Lanes>(
    from: Matrix<L::Element>,
    along: Along,
    [rows, columns]: [usize; 2],
    to: *mut u32,
) {
    let (k, n, k_stride, column_stride) = match along {
        Along::Columns => (columns, rows, from.column_stride, from.row_stride),
        Along::Rows => (rows, columns, from.row_stride, from.column_stride),
    };
    let panels = Panels { k: k.div_ceil(L::GROUP), n };
    for panel in 0..panels.count::<L>() {
        // SAFETY: granted by the caller.
        unsafe {
            let first = from.first.add(panel * Panels::width::<L>() * column_stride);
            let to = to.add(panels.offset::<L>(panel));
            let (valid, stored) = (panels.valid::<L>(panel), panels.stored::<L>(panel));
            let source = Source { first, k_stride, column_stride, flip: 0 };
            let words = to.add(usize::from(L::HEADER) * stored);
            pack::interleave::<L, Right>(source, k, valid, words, stored);
            if L::HEADER {
                pack::header::<L>(words, panels.k, stored, to, Codes::default());
            }
        }
    }
}
