//! Argument blocks of kernels that pick, place or number elements.

/// `out[i] = table[indices[i]]` for rows of `width` elements of `element_bytes` bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GatherArgs {
    /// Dense `[rows, width]`.
    pub table: *const u8,
    /// Row numbers in `-rows..rows`.
    pub indices: *const i64,
    /// Dense `[count, width]`; zeros for an index out of range.
    pub out: *mut u8,
    /// Rows of the table.
    pub rows: usize,
    /// Elements of a row.
    pub width: usize,
    /// Bytes of an element.
    pub element_bytes: usize,
    /// Number of indices.
    pub count: usize,
    /// Receives 1 + the first position with an index out of range; may be null.
    pub error: *mut u64,
}

/// How a scatter combines the values of a row.
#[repr(usize)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Combine {
    /// The sum; of none, 0.
    Add,
    /// The product; of none, 1.
    Mul,
    /// The largest, a NaN above all; of none, the smallest value of the type.
    Max,
}

/// `out[row]` combines `values[i]` of every `i` with `indices[i] = row`, in the order of `i`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ScatterArgs {
    /// Dense `[count, width]`, of f32 or i64.
    pub values: *const u8,
    /// Row numbers in `-rows..rows`; others are skipped.
    pub indices: *const i64,
    /// Dense `[rows, width]` (overwritten), of the type of the values.
    pub out: *mut u8,
    /// Rows of the result.
    pub rows: usize,
    /// Elements of a row.
    pub width: usize,
    /// Number of indices.
    pub count: usize,
    /// How.
    pub combine: Combine,
    /// 1 for i64, 0 for f32.
    pub integers: usize,
    /// Receives 1 + the first position with an index out of range; may be null.
    pub error: *mut u64,
}

/// Where the foremost elements of each row of a dense `[rows, cols]` matrix are, in order; of equal ones the first.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct TopKArgs {
    /// Input, of f32 or i64.
    pub x: *const u8,
    /// Dense `[rows, k]`.
    pub out: *mut i64,
    /// Rows.
    pub rows: usize,
    /// Columns, at least `k`.
    pub cols: usize,
    /// How many of a row.
    pub k: usize,
    /// 1 for the largest, a NaN above all; 0 for the smallest.
    pub largest: usize,
    /// 1 for i64, 0 for f32.
    pub integers: usize,
}

/// `out[i] = i`
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct IotaArgs {
    /// The result.
    pub out: *mut i64,
    /// Number of elements.
    pub count: usize,
}

/// Uniform numbers in [0, 1): of places `first..first + count` of the sequence of a seed and step.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RandomArgs {
    /// One number.
    pub step: *const i64,
    /// The result.
    pub out: *mut f32,
    /// Which sequences.
    pub seed: u64,
    /// The place of the first number.
    pub first: u64,
    /// Number of elements.
    pub count: usize,
}
