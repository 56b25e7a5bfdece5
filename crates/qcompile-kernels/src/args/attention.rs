//! Argument block of attention and its gradients.

/// Attention `y = softmax(scale q kᵀ + mask) v`, or its gradients by q, k and v.
///
/// q `[batch, rows, heads, width]`, k `[batch, keys, key_heads, width]`, v `[batch, keys, key_heads, value_width]`, mask
/// `[batch, heads, rows, keys]` and dy `[batch, rows, heads, value_width]` are read through strides of four dims;
/// results are dense. `heads` is a multiple of `key_heads`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttentionArgs {
    /// Queries.
    pub q: *const u8,
    /// Keys.
    pub k: *const u8,
    /// Values.
    pub v: *const u8,
    /// f32, or null for none.
    pub mask: *const f32,
    /// The gradient of the attention (gradients only).
    pub dy: *const u8,
    /// Numbers in [0, 1), two for each query and head, with which gradients of int8 are rounded at random:
    /// gradients of scores, and what is rounded by columns. Null to round to nearest.
    pub numbers: *const f32,
    /// Result of the attention.
    pub y: *mut u8,
    /// Gradient of q, or null if it is not wanted.
    pub dq: *mut u8,
    /// Gradient of k, or null if it is not wanted.
    pub dk: *mut u8,
    /// Gradient of v, or null if it is not wanted.
    pub dv: *mut u8,
    /// Batches.
    pub batch: usize,
    /// Queries.
    pub rows: usize,
    /// Keys.
    pub keys: usize,
    /// Heads of q.
    pub heads: usize,
    /// Heads of k and v.
    pub key_heads: usize,
    /// Width of q and k.
    pub width: usize,
    /// Width of v.
    pub value_width: usize,
    /// Strides of q.
    pub q_strides: [usize; 4],
    /// Strides of k.
    pub k_strides: [usize; 4],
    /// Strides of v.
    pub v_strides: [usize; 4],
    /// Strides of the mask.
    pub mask_strides: [usize; 4],
    /// Strides of dy.
    pub dy_strides: [usize; 4],
    /// Strides of the numbers.
    pub number_strides: [usize; 4],
    /// The bits of the f32 that scores are multiplied with.
    pub scale: u64,
    /// 1 if a row sees only the keys up to its own number, else 0.
    pub causal: usize,
    /// What operands hold and products run in.
    pub kind: AttentionKind,
    /// The scales of q, k and v, one value each (of int8 only).
    pub scales: [*const f32; 3],
}

impl AttentionArgs {
    /// Whether the gradient of the probabilities is needed.
    pub(crate) fn needs_slopes(&self) -> bool {
        !self.dq.is_null() || !self.dk.is_null()
    }
}

/// What all but the mask hold, and what products run in. Sums are f32, of int8 i32.
#[repr(usize)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionKind {
    /// f32 throughout.
    F32 = 0,
    /// bf16 in memory, products in f32.
    Bf16Operands = 1,
    /// bf16 in memory and in the products: probabilities and the gradients of scores are rounded to it.
    Bf16 = 2,
    /// q, k and v are i8, all else is f32; exponentials are rounded to codes of 1/127, the gradients of scores to such
    /// with scales of their own.
    Int8 = 3,
    /// The same with bf16 for what is f32 there in memory: the incoming gradient and all results.
    Int8Bf16 = 4,
}

impl AttentionKind {
    /// Queries whose products with a key are summed in i32, of the gradients in int8.
    pub const INT8_QUERIES: usize = 64;
    /// Keys whose products with a query are.
    pub const INT8_KEYS: usize = 960;
    /// Steps of the finer of the two codes that an incoming gradient is, in one of the other.
    pub const INT8_FINE_STEPS: f32 = 254.0;
}
