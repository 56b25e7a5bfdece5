//! Loop nests on vectors of 16 lanes, as machine code of our own.
//!
//! Cranelift has vectors of 128 bits. On CPUs with AVX-512 a nest's two innermost dimensions become a function that is
//! written here instead; outer loops, addresses and the calls stay with Cranelift. A nest that has no such form (see
//! [`Shape::of`]) is emitted as on other CPUs.
//!
//! The function takes one pointer, to a block of words (see [`Layout`]): a block of rows and columns, and for each
//! cursor its address and the bytes from row to row.

pub(crate) mod assembler;
mod body;
mod call;
mod functions;
mod lower;
mod registers;
mod straight;
mod sweep;
#[cfg(test)]
mod tests;

pub(crate) use assembler::Code;
pub(crate) use call::Wide;
pub(crate) use lower::{Shape, compile};

/// Where things are in the argument block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub cursors: usize,
    pub sizes: usize,
}

impl Layout {
    /// Rows of the block.
    pub(crate) const ROWS: usize = 0;
    /// Columns of the block.
    pub(crate) const COLUMNS: usize = 1;
    /// Rows as f64, for squared deviations.
    pub(crate) const COUNT: usize = 2;

    /// The address of a cursor's first element.
    pub(crate) fn base(cursor: usize) -> usize {
        3 + 3 * cursor
    }

    /// The bytes from one row of a cursor to the next.
    pub(crate) fn stride(cursor: usize) -> usize {
        4 + 3 * cursor
    }

    /// A word for the function's own use.
    pub(crate) fn current(cursor: usize) -> usize {
        5 + 3 * cursor
    }

    /// A size as f32.
    pub(crate) fn size(self, size: usize) -> usize {
        3 + 3 * self.cursors + size
    }

    pub(crate) fn words(self) -> usize {
        3 + 3 * self.cursors + self.sizes
    }
}
