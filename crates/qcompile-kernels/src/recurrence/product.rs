//! The products of a recurrent layer's rows with R, in f32, or rounded as they enter: to bf16, or to int8 codes.

use super::{MAX_ROWS, Pass, Rows};
use crate::args::RecurrenceShape;
use crate::buffer::{Buffer, Slot};
use crate::lanes::{Codes, Element, Lanes, Simd, Task};
use crate::pack::{self, Left, Right, Source};
use crate::rounding::{largest_magnitude, noise, scale_of};
use crate::softmax::reduce;
use crate::tile::{Scales, Start, Tile, tile};
use std::marker::PhantomData;
use std::slice::{from_raw_parts, from_raw_parts_mut};

/// What products read.
pub(crate) trait Kind: Copy + 'static {
    /// Whether they are codes. Then activations give the same bits on every tier, so that no state is rounded to another
    /// code on one of them.
    const IS_CODES: bool = false;
    /// What the operands are rounded to.
    type Element: Rounded;
    /// The lanes that multiply them.
    type Lanes<S: Simd>: Lanes<Element = Self::Element>;
}

/// f32.
#[derive(Clone, Copy)]
pub(crate) struct RealKind;
/// bf16.
#[derive(Clone, Copy)]
pub(crate) struct Bf16Kind;
/// int8 codes: a scale for each column of the packed R, [`STATE_SCALE`] for the states, and for gradients one for each row.
#[derive(Clone, Copy)]
pub(crate) struct Int8Kind;

impl Kind for RealKind {
    type Element = f32;
    type Lanes<S: Simd> = S::Real;
}

impl Kind for Bf16Kind {
    type Element = u16;
    type Lanes<S: Simd> = S::Bf16;
}

impl Kind for Int8Kind {
    const IS_CODES: bool = true;
    type Element = i8;
    type Lanes<S: Simd> = S::Int8;
}

/// The scale of the codes of a state, which is within ± 1.
pub(super) const STATE_SCALE: f32 = 1.0 / 127.0;

/// What a number becomes as it enters a product.
pub(crate) trait Rounded: Element {
    /// The nearest, to even, to `x / scale` where it is a code; to `x` where it is a float.
    fn rounded(x: f32, scale: f32) -> Self;
    /// The same of a number that is moved by so many steps; floats are not.
    fn moved(x: f32, scale: f32, steps: f32) -> Self;
}

impl Rounded for f32 {
    #[inline(always)]
    fn rounded(x: f32, _scale: f32) -> f32 {
        x
    }
    #[inline(always)]
    fn moved(x: f32, _scale: f32, _steps: f32) -> f32 {
        x
    }
}

impl Rounded for u16 {
    #[inline(always)]
    fn rounded(x: f32, _scale: f32) -> u16 {
        let bits = x.to_bits();
        let nearest = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
        // A NaN stays one, whichever of its bits are lost.
        if x.is_nan() { (bits >> 16) as u16 | 0x40 } else { nearest }
    }
    #[inline(always)]
    fn moved(x: f32, scale: f32, _steps: f32) -> u16 {
        u16::rounded(x, scale)
    }
}

impl Rounded for i8 {
    #[inline(always)]
    fn rounded(x: f32, scale: f32) -> i8 {
        i8::moved(x, scale, 0.0)
    }
    #[inline(always)]
    fn moved(x: f32, scale: f32, steps: f32) -> i8 {
        // A NaN becomes 0.
        (x / scale + steps).round_ties_even().clamp(-127.0, 127.0) as i8
    }
}

/// Rows of a register tile two vectors wide: of 12 rows only 8, as batches are often powers of 2.
pub(super) const fn height<L: Lanes>() -> usize {
    if L::ROWS_PAIR == 12 { 8 } else { L::ROWS_PAIR }
}

/// The packed R: for each gate panels of two vectors' width, each perhaps with a header; then, for codes, the scales of all
/// columns.
pub(super) struct Panels<L> {
    hidden: usize,
    lanes: PhantomData<L>,
}

impl<L: Lanes> Panels<L> {
    const WIDTH: usize = 2 * L::LANES;

    pub(super) fn of(shape: &RecurrenceShape) -> Self {
        Panels { hidden: shape.hidden, lanes: PhantomData }
    }

    /// Panels of a gate.
    pub(super) fn count(&self) -> usize {
        self.hidden.div_ceil(Self::WIDTH)
    }

    /// Columns of a gate.
    pub(super) fn columns(&self) -> usize {
        self.count() * Self::WIDTH
    }

    /// Words of a row that is multiplied.
    fn depth(&self) -> usize {
        self.hidden.div_ceil(L::GROUP)
    }

    /// Words of a panel.
    fn panel(&self) -> usize {
        (self.depth() + usize::from(L::HEADER)) * Self::WIDTH
    }

    /// Words of so many gates.
    pub(super) fn words(&self, gates: usize) -> usize {
        gates * (self.count() * self.panel() + if L::INTEGER { self.columns() } else { 0 })
    }

    /// The scales of a gate's columns, of so many gates.
    fn scales(&self, packed: *const u32, gates: usize, gate: usize) -> *const f32 {
        packed.wrapping_add(gates * self.count() * self.panel() + gate * self.columns()).cast()
    }
}

/// Packs panels of R.
pub(super) struct Pack<A, K> {
    pub(super) args: A,
    pub(super) kind: PhantomData<K>,
    pub(super) begin: usize,
    pub(super) end: usize,
}

impl<A: Pass, K: Kind> Task for Pack<A, K> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let panels = Panels::<K::Lanes<S>>::of(self.args.shape());
        for unit in self.begin..self.end {
            // SAFETY: the panel lies in R and in the scratch.
            unsafe { self.panel::<K::Lanes<S>>(&panels, unit) };
        }
    }
}

impl<A: Pass, K: Kind> Pack<A, K> {
    #[inline(always)]
    unsafe fn panel<L: Lanes<Element = K::Element>>(&self, panels: &Panels<L>, unit: usize) {
        let (hidden, width) = (panels.hidden, Panels::<L>::WIDTH);
        let (gate, column) = (unit / panels.count(), unit % panels.count() * width);
        let columns = width.min(hidden - column);
        let (k_stride, column_stride) = if A::TRANSPOSED { (1, hidden) } else { (hidden, 1) };
        let mut rounded = Buffer::take(Slot::Right, hidden * columns);
        // SAFETY: granted by the caller; the buffer has room for the panel's elements.
        unsafe {
            let first = self.args.r().add(gate * hidden * hidden + column * column_stride);
            let mut from = Source { first: first.cast(), k_stride, column_stride, flip: 0 };
            let packed = self.args.scratch();
            if L::Element::NARROW {
                let to = rounded.words().cast::<L::Element>();
                let (lines, length) =
                    if A::TRANSPOSED { (columns, hidden) } else { (hidden, columns) };
                let scales = panels.scales(packed, self.args.shape().gates(), gate).cast_mut();
                let mut line_scale = 1.0;
                if L::INTEGER {
                    // The rest of the panel has none.
                    scales.add(column).write_bytes(0, width);
                }
                if L::INTEGER && !A::TRANSPOSED {
                    let scales = from_raw_parts_mut(scales.add(column), columns);
                    for line in 0..lines {
                        let from = from_raw_parts(first.add(line * hidden), length);
                        for (most, x) in scales.iter_mut().zip(from) {
                            *most = if x.abs() > *most { x.abs() } else { *most };
                        }
                    }
                    scales.iter_mut().for_each(|scale| *scale = (*scale / 127.0).max(1e-30));
                }
                for line in 0..lines {
                    let from = from_raw_parts(first.add(line * hidden), length);
                    let to = from_raw_parts_mut(to.add(line * length), length);
                    if L::INTEGER && !A::TRANSPOSED {
                        // A line runs over columns, which have a scale each.
                        let scales = from_raw_parts(scales.add(column), columns);
                        for ((to, &from), &scale) in to.iter_mut().zip(from).zip(scales) {
                            *to = L::Element::rounded(from, scale);
                        }
                        continue;
                    }
                    if L::INTEGER {
                        line_scale = (largest(from) / 127.0).max(1e-30);
                        scales.add(column + line).write(line_scale);
                    }
                    round(from, line_scale, to);
                }
                let (k_stride, column_stride) =
                    if A::TRANSPOSED { (1, length) } else { (length, 1) };
                from = Source { first: to.cast_const(), k_stride, column_stride, flip: 0 };
            }
            let to = packed.add(unit * panels.panel());
            let words = to.add(if L::HEADER { width } else { 0 });
            pack::interleave::<L, Right>(from, hidden, columns, words, width);
            if L::HEADER {
                pack::header::<L>(words, panels.depth(), width, to, Codes::default());
            }
        }
    }
}

/// The largest magnitude that is a number.
#[inline(always)]
fn largest(values: &[f32]) -> f32 {
    reduce(values, 0.0, |amax, x| if x.abs() > amax { x.abs() } else { amax })
}

#[inline(always)]
fn round<E: Rounded>(from: &[f32], scale: f32, to: &mut [E]) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to = E::rounded(from, scale);
    }
}

/// The numbers in [0, 1) with which rows are rounded at random: one for each, so many apart, and the multiples of the golden
/// ratio of their elements.
#[derive(Clone, Copy)]
pub(super) struct Numbers<'a> {
    pub(super) first: *const f32,
    pub(super) stride: usize,
    pub(super) multiples: &'a [f32],
}

/// Rows on their way into products: pointers to where they are, or to where they are rounded.
pub(super) struct Operand {
    rows: [*const u32; MAX_ROWS],
    count: usize,
    /// Of codes.
    scales: [f32; MAX_ROWS],
}

impl Operand {
    /// Words of a buffer for the rows of a unit; none if they are read where they are.
    pub(super) fn room<L: Lanes>(shape: &RecurrenceShape, rows: &Rows) -> usize {
        let depth = Panels::<L>::of(shape).depth();
        // One row of elements behind the rows of words.
        if L::Element::NARROW { rows.padded * depth + shape.hidden } else { 0 }
    }

    /// Rows of a matrix, from `first` on, whose codes have this scale, or one for each row by its largest magnitude, and are
    /// rounded at random by numbers, if there are; the buffer has [`Operand::room`].
    ///
    /// # Safety
    /// The matrix has `rows.count` rows, `stride` apart, and each has a number.
    #[inline(always)]
    pub(super) unsafe fn of<L: Lanes<Element: Rounded>>(
        shape: &RecurrenceShape,
        rows: &Rows,
        first: *const f32,
        stride: usize,
        scale: Option<f32>,
        numbers: Option<Numbers<'_>>,
        buffer: *mut u32,
    ) -> Operand {
        let mut scales = [0.0; MAX_ROWS];
        if !L::Element::NARROW {
            // The last row repeats up to whole tiles.
            let row = |row: usize| first.wrapping_add(row.min(rows.count - 1) * stride).cast();
            return Operand { rows: std::array::from_fn(row), count: rows.padded, scales };
        }
        let depth = Panels::<L>::of(shape).depth();
        // SAFETY: granted by the caller.
        unsafe {
            let elements = buffer.add(rows.padded * depth).cast::<L::Element>();
            for (row, row_scale) in scales.iter_mut().enumerate().take(rows.count) {
                let from = from_raw_parts(first.add(row * stride), shape.hidden);
                *row_scale = match scale {
                    Some(scale) => scale,
                    None if L::INTEGER => scale_of(largest_magnitude(from)),
                    None => 1.0,
                };
                let to = from_raw_parts_mut(elements, shape.hidden);
                match numbers {
                    None => round(from, *row_scale, to),
                    Some(Numbers { first, stride, multiples }) => {
                        let number = *first.add(row * stride);
                        for ((to, &x), &multiple) in to.iter_mut().zip(from).zip(multiples) {
                            *to = L::Element::moved(x, *row_scale, noise(number, multiple));
                        }
                    }
                }
                pack::row::<L, Left>(elements, shape.hidden, buffer.add(row * depth), 0);
            }
        }
        // Rows that only fill a tile hold anything: no row sees another.
        let row = |row: usize| buffer.wrapping_add(row * depth).cast_const();
        Operand { rows: std::array::from_fn(row), count: rows.padded, scales }
    }
}

/// Puts (or adds) the product of rows and a gate of the packed R into rows of a buffer.
///
/// # Safety
/// The buffer has as many rows of [`Panels::columns`] words; codes are not added.
#[inline(always)]
pub(super) unsafe fn product<L: Lanes>(
    shape: &RecurrenceShape,
    left: &Operand,
    packed: *const u32,
    gate: usize,
    out: *mut u32,
    add: bool,
) {
    static NO_SKIP: isize = 0;
    let panels = Panels::<L>::of(shape);
    let (width, stride) = (Panels::<L>::WIDTH, panels.columns());
    let right = panels.scales(packed, shape.gates(), gate);
    for at in 0..panels.count() {
        let panel = packed.wrapping_add((gate * panels.count() + at) * panels.panel());
        for first in (0..left.count).step_by(height::<L>()) {
            let mut outs = [std::ptr::null_mut(); MAX_ROWS];
            for (row, to) in outs.iter_mut().enumerate().take(height::<L>()) {
                *to = out.wrapping_add((first + row) * stride);
            }
            let start = match (add, L::HEADER) {
                (true, _) => Start::Resume,
                (false, true) => Start::Header(panel),
                (false, false) => Start::Zero,
            };
            let part = Tile {
                rows: left.rows[first..].as_ptr(),
                outs: outs.as_ptr(),
                column: at * width,
                segments: &raw const NO_SKIP,
                segment_count: 1,
                length: panels.depth(),
                step: 1,
                right: panel.wrapping_add(if L::HEADER { width } else { 0 }),
                start,
                scales: L::INTEGER.then(|| Scales { left: left.scales[first..].as_ptr(), right }),
                ahead: (std::ptr::null(), 0),
                live: height::<L>(),
                blocks: None,
            };
            // SAFETY: rows, panel and buffer are valid for the tile.
            unsafe {
                if height::<L>() == L::ROWS_PAIR {
                    L::tile_pair(&part);
                } else {
                    tile::<L, 8, 2>(&part);
                }
            }
        }
    }
}
