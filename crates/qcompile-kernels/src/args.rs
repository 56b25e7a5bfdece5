//! Argument blocks of the primitives.
//!
//! Every struct is `#[repr(C)]` and made of 8-byte words only, so that emitted code fills a stack slot
//! word by word at `core::mem::offset_of!`. All strides and sizes count elements, never bytes, unless
//! the field says otherwise. Tensors are dense; images are NHWC, convolution weights OIHW.
//! `scratch` points to the number of bytes that [`Primitive::scratch`](crate::Primitive) asked for,
//! aligned to 64; it is shared by all threads of one call and keeps its contents between the phases.

pub use crate::grad_weight::MOST_I8_PIXELS;
pub use crate::recurrence::args::*;

mod attention;
mod indexing;

pub use attention::{AttentionArgs, AttentionKind};
pub use indexing::*;

/// Receives finished tiles in place of the kernel's own store.
///
/// Called as `(ctx, tile, tile_stride, row0, rows, col0, cols, part)`: element `(r, c)` of the block is
/// `tile[r * tile_stride + c]` and stands for row `row0 + r`, column `col0 + c` of the result. A row is
/// the flat index over the batch and `m` (matmul) or the flat pixel index over N, H, W (convolution),
/// a column is `n` or the channel. Calls come from many threads at once, each block exactly once. The
/// tile is aligned to 4 bytes, and the callee may overwrite it.
///
/// `part`, below [`Primitive::parts`](crate::Primitive), names a range of rows: no two threads are in the
/// same columns of one part at once, and the calls for these come in an order that sizes determine.
/// So a callee may sum down the columns of a part.
pub type Epilogue = unsafe extern "C" fn(
    ctx: *const u8,
    tile: *const f32,
    tile_stride: usize,
    row0: usize,
    rows: usize,
    col0: usize,
    cols: usize,
    part: usize,
);

/// Memory that an epilogue reads or writes by rows and columns. Kernels fetch it while they compute the block that it
/// goes with; it is a hint, which changes no result.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    /// Row 0, column 0.
    pub first: *const u8,
    /// Bytes from one row to the next.
    pub row_bytes: usize,
    /// Bytes of one element; columns are adjacent.
    pub column_bytes: usize,
    /// 1 if the epilogue only writes it.
    pub written: usize,
}

/// `C[b, m, n] = sum over k of A[b, m, k] * B[b, k, n]`, with sums in f32.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct MatmulArgs<E = f32> {
    /// First element of A.
    pub a: *const E,
    /// First element of B.
    pub b: *const E,
    /// First element of C; not touched when there is an epilogue.
    pub c: *mut f32,
    /// Number of matrices.
    pub batch: usize,
    /// Rows of A and C.
    pub m: usize,
    /// Columns of B and C.
    pub n: usize,
    /// Columns of A, rows of B; 0 gives zeros.
    pub k: usize,
    /// From one A to the next; 0 uses the same A for the whole batch.
    pub a_batch_stride: usize,
    /// From one row of A to the next.
    pub a_row_stride: usize,
    /// From one column of A to the next.
    pub a_col_stride: usize,
    /// From one B to the next; 0 uses the same B for the whole batch.
    pub b_batch_stride: usize,
    /// From one row of B to the next.
    pub b_row_stride: usize,
    /// From one column of B to the next.
    pub b_col_stride: usize,
    /// From one C to the next.
    pub c_batch_stride: usize,
    /// From one row of C to the next; columns of C are adjacent.
    pub c_row_stride: usize,
    /// Takes the result instead of `c` (null for none).
    pub epilogue: Option<Epilogue>,
    /// First argument of the epilogue.
    pub epilogue_ctx: *const u8,
    /// What the epilogue touches (null for nothing).
    pub streams: *const Stream,
    /// How many those are.
    pub stream_count: usize,
    /// Shared scratch.
    pub scratch: *mut u8,
}

/// The product of bf16 operands, given as their bits; sums and results are f32.
pub type MatmulBf16Args = MatmulArgs<u16>;

/// `C = ((A - zero) * B in i32) as f32 * (scale_a * scale_b)`: A is i8 or u8, with or without a zero point, B is i8.
///
/// Sums wrap in 32 bits; the result is bit-equal on every tier.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct MatmulI8Args {
    /// First element of A.
    pub a: *const i8,
    /// First element of B.
    pub b: *const i8,
    /// First element of C; not touched when there is an epilogue.
    pub c: *mut f32,
    /// Scale of A: one value, or one for each row of A (the same for each matrix of the batch).
    pub a_scale: *const f32,
    /// 0 for one scale, 1 for a scale per row.
    pub a_scale_stride: usize,
    /// The code of A that stands for 0, of its type; null for 0.
    pub a_zero: *const u8,
    /// Whether A is u8.
    pub a_unsigned: usize,
    /// Scale of B: one value, or one for each column of B (the same for each matrix of the batch).
    pub b_scale: *const f32,
    /// 0 for one scale, 1 for a scale per column.
    pub b_scale_stride: usize,
    /// Number of matrices.
    pub batch: usize,
    /// Rows of A and C.
    pub m: usize,
    /// Columns of B and C.
    pub n: usize,
    /// Columns of A, rows of B; 0 gives zeros.
    pub k: usize,
    /// From one A to the next; 0 uses the same A for the whole batch.
    pub a_batch_stride: usize,
    /// From one row of A to the next.
    pub a_row_stride: usize,
    /// From one column of A to the next.
    pub a_col_stride: usize,
    /// From one B to the next; 0 uses the same B for the whole batch.
    pub b_batch_stride: usize,
    /// From one row of B to the next.
    pub b_row_stride: usize,
    /// From one column of B to the next.
    pub b_col_stride: usize,
    /// From one C to the next.
    pub c_batch_stride: usize,
    /// From one row of C to the next; columns of C are adjacent.
    pub c_row_stride: usize,
    /// Takes the result instead of `c` (null for none).
    pub epilogue: Option<Epilogue>,
    /// First argument of the epilogue.
    pub epilogue_ctx: *const u8,
    /// What the epilogue touches (null for nothing).
    pub streams: *const Stream,
    /// How many those are.
    pub stream_count: usize,
    /// Shared scratch.
    pub scratch: *mut u8,
}

/// Geometry of a two-dimensional convolution (ONNX `Conv`, `auto_pad` already resolved).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvShape {
    /// Images.
    pub batch: usize,
    /// Input height.
    pub height: usize,
    /// Input width.
    pub width: usize,
    /// Input channels.
    pub in_channels: usize,
    /// Output channels.
    pub out_channels: usize,
    /// Kernel height.
    pub kernel_height: usize,
    /// Kernel width.
    pub kernel_width: usize,
    /// Vertical stride.
    pub stride_height: usize,
    /// Horizontal stride.
    pub stride_width: usize,
    /// Zero rows above the input.
    pub pad_top: usize,
    /// Zero columns left of the input.
    pub pad_left: usize,
    /// Zero rows below the input.
    pub pad_bottom: usize,
    /// Zero columns right of the input.
    pub pad_right: usize,
    /// Vertical dilation (1 for a dense kernel).
    pub dilation_height: usize,
    /// Horizontal dilation (1 for a dense kernel).
    pub dilation_width: usize,
    /// Groups; divides both channel counts.
    pub groups: usize,
}

impl ConvShape {
    /// Height of the output; 0 where the kernel is larger than the padded input.
    #[must_use]
    pub fn out_height(&self) -> usize {
        let extent = self.dilation_height * (self.kernel_height - 1) + 1;
        let padded = self.height + self.pad_top + self.pad_bottom;
        if padded < extent { 0 } else { (padded - extent) / self.stride_height + 1 }
    }

    /// Width of the output; 0 where the kernel is larger than the padded input.
    #[must_use]
    pub fn out_width(&self) -> usize {
        let extent = self.dilation_width * (self.kernel_width - 1) + 1;
        let padded = self.width + self.pad_left + self.pad_right;
        if padded < extent { 0 } else { (padded - extent) / self.stride_width + 1 }
    }
}

/// `y = conv(x, w)`: x `[n, h, w, cin]`, w `[cout, cin / groups, kh, kw]`, y `[n, oh, ow, cout]`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Conv2dArgs<E = f32> {
    /// Input.
    pub x: *const E,
    /// Weights.
    pub w: *const E,
    /// Output; not touched when there is an epilogue.
    pub y: *mut f32,
    /// Geometry.
    pub shape: ConvShape,
    /// Takes the result instead of `y` (null for none).
    pub epilogue: Option<Epilogue>,
    /// First argument of the epilogue.
    pub epilogue_ctx: *const u8,
    /// What the epilogue touches (null for nothing).
    pub streams: *const Stream,
    /// How many those are.
    pub stream_count: usize,
    /// Shared scratch.
    pub scratch: *mut u8,
}

/// The convolution of bf16 operands, given as their bits; sums and results are f32.
pub type Conv2dBf16Args = Conv2dArgs<u16>;

/// Gradient of a convolution by its input: dx `[n, h, w, cin]` from dy `[n, oh, ow, cout]` and w.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Conv2dGradInputArgs<E = f32> {
    /// Gradient of the output.
    pub dy: *const E,
    /// Weights, as in the forward convolution.
    pub w: *const E,
    /// Gradient of the input; not touched when there is an epilogue.
    pub dx: *mut f32,
    /// Geometry of the forward convolution.
    pub shape: ConvShape,
    /// Takes the result instead of `dx` (null for none); rows are pixels of `dx`.
    pub epilogue: Option<Epilogue>,
    /// First argument of the epilogue.
    pub epilogue_ctx: *const u8,
    /// What the epilogue touches (null for nothing).
    pub streams: *const Stream,
    /// How many those are.
    pub stream_count: usize,
    /// Shared scratch.
    pub scratch: *mut u8,
}

/// The same of bf16 operands, given as their bits.
pub type Conv2dGradInputBf16Args = Conv2dGradInputArgs<u16>;

/// Gradient of a convolution by its weights: dw `[cout, cin / groups, kh, kw]` from x and dy.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Conv2dGradWeightArgs<E = f32> {
    /// Input of the forward convolution.
    pub x: *const E,
    /// Gradient of the output.
    pub dy: *const E,
    /// Gradient of the weights (overwritten).
    pub dw: *mut f32,
    /// Geometry of the forward convolution.
    pub shape: ConvShape,
    /// Shared scratch.
    pub scratch: *mut u8,
}

/// The same of bf16 operands, given as their bits.
pub type Conv2dGradWeightBf16Args = Conv2dGradWeightArgs<u16>;

/// The same of i8 operands: `dw = sum(x * dy) as f32 * (x_scale * dy_scale)`, sums exact and bit-equal on every tier.
/// Sums of outputs of more pixels than [`MOST_I8_PIXELS`] may wrap.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Conv2dGradWeightI8Args {
    /// What it has in common with the others.
    pub gradient: Conv2dGradWeightArgs<i8>,
    /// Scale of x: one value, or one for each input channel.
    pub x_scale: *const f32,
    /// 0 for one scale, 1 for a scale per input channel.
    pub x_scale_stride: usize,
    /// Scale of dy: one value, or one for each output channel.
    pub dy_scale: *const f32,
    /// 0 for one scale, 1 for a scale per output channel.
    pub dy_scale_stride: usize,
}

/// Convolution of codes: `y = sum((x - zero) * w) as f32 * (x_scale * w_scale)`, x i8 or u8, with or without a zero point, w
/// i8; bit-equal on every tier.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Conv2dI8Args {
    /// Input.
    pub x: *const i8,
    /// Weights.
    pub w: *const i8,
    /// Output; not touched when there is an epilogue.
    pub y: *mut f32,
    /// Scale of x: one value, or one for each image.
    pub x_scale: *const f32,
    /// 0 for one scale, 1 for a scale per image.
    pub x_scale_stride: usize,
    /// The code of x that stands for 0, of its type; null for 0.
    pub x_zero: *const u8,
    /// Whether x is u8.
    pub x_unsigned: usize,
    /// Scale of w: one value, or one for each output channel.
    pub w_scale: *const f32,
    /// 0 for one scale, 1 for a scale per output channel.
    pub w_scale_stride: usize,
    /// Geometry.
    pub shape: ConvShape,
    /// Takes the result instead of `y` (null for none).
    pub epilogue: Option<Epilogue>,
    /// First argument of the epilogue.
    pub epilogue_ctx: *const u8,
    /// What the epilogue touches (null for nothing).
    pub streams: *const Stream,
    /// How many those are.
    pub stream_count: usize,
    /// Shared scratch.
    pub scratch: *mut u8,
}

/// Gradient by the input with i8 operands: `dx = sum(dy * w) as f32 * (dy_scale * w_scale)`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Conv2dGradInputI8Args {
    /// Gradient of the output.
    pub dy: *const i8,
    /// Weights, as in the forward convolution.
    pub w: *const i8,
    /// Gradient of the input; not touched when there is an epilogue.
    pub dx: *mut f32,
    /// Scale of dy: one value, or one for each image.
    pub dy_scale: *const f32,
    /// 0 for one scale, 1 for a scale per image.
    pub dy_scale_stride: usize,
    /// Scale of w: one value, or one for each input channel of the convolution (over all groups).
    pub w_scale: *const f32,
    /// 0 for one scale, 1 for a scale per input channel.
    pub w_scale_stride: usize,
    /// Geometry of the forward convolution.
    pub shape: ConvShape,
    /// Takes the result instead of `dx` (null for none); rows are pixels of `dx`.
    pub epilogue: Option<Epilogue>,
    /// First argument of the epilogue.
    pub epilogue_ctx: *const u8,
    /// What the epilogue touches (null for nothing).
    pub streams: *const Stream,
    /// How many those are.
    pub stream_count: usize,
    /// Shared scratch.
    pub scratch: *mut u8,
}

/// Geometry of a two-dimensional pooling. Windows that run past the padded input are clipped.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolShape {
    /// Images.
    pub batch: usize,
    /// Input height.
    pub height: usize,
    /// Input width.
    pub width: usize,
    /// Channels.
    pub channels: usize,
    /// Output height (given, since `ceil_mode` makes it differ).
    pub out_height: usize,
    /// Output width.
    pub out_width: usize,
    /// Window height.
    pub kernel_height: usize,
    /// Window width.
    pub kernel_width: usize,
    /// Vertical stride.
    pub stride_height: usize,
    /// Horizontal stride.
    pub stride_width: usize,
    /// Rows of padding above the input.
    pub pad_top: usize,
    /// Columns of padding left of the input.
    pub pad_left: usize,
    /// Rows of padding below the input (counts only for `count_include_pad`).
    pub pad_bottom: usize,
    /// Columns of padding right of the input (counts only for `count_include_pad`).
    pub pad_right: usize,
    /// Vertical dilation.
    pub dilation_height: usize,
    /// Horizontal dilation.
    pub dilation_width: usize,
}

/// Largest value of each window; padding never wins, NaN does. x `[n, h, w, c]`, y `[n, oh, ow, c]`, both of the
/// kernel's element type: f32, bf16 or i8.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct MaxPoolArgs {
    /// Input.
    pub x: *const u8,
    /// Output.
    pub y: *mut u8,
    /// Geometry.
    pub shape: PoolShape,
}

/// Gradient of [`MaxPoolArgs`]: dy goes to the first largest element of its window in row-major order.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct MaxPoolGradArgs {
    /// Input of the forward pooling.
    pub x: *const f32,
    /// Gradient of the output.
    pub dy: *const f32,
    /// Gradient of the input (overwritten).
    pub dx: *mut f32,
    /// Geometry.
    pub shape: PoolShape,
}

/// Mean of each window. x `[n, h, w, c]`, y `[n, oh, ow, c]`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AveragePoolArgs {
    /// Input.
    pub x: *const f32,
    /// Output.
    pub y: *mut f32,
    /// 1 to count padding as zeros, 0 to average over real elements only.
    pub count_include_pad: usize,
    /// Geometry.
    pub shape: PoolShape,
}

/// Gradient of [`AveragePoolArgs`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AveragePoolGradArgs {
    /// Gradient of the output.
    pub dy: *const f32,
    /// Gradient of the input (overwritten).
    pub dx: *mut f32,
    /// As in the forward pooling.
    pub count_include_pad: usize,
    /// Geometry.
    pub shape: PoolShape,
}

/// Softmax or log-softmax of each row of a dense `[rows, cols]` matrix; `y` may be `x`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SoftmaxArgs {
    /// Input.
    pub x: *const f32,
    /// Output.
    pub y: *mut f32,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
}

/// `losses[row] = logsumexp(logits[row]) - logits[row, labels[row]]`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct CrossEntropyArgs {
    /// Dense `[rows, cols]`.
    pub logits: *const f32,
    /// One class for each row.
    pub labels: *const i64,
    /// One loss for each row: 0 for an ignored row, NaN for a label that is no class.
    pub losses: *mut f32,
    /// Rows.
    pub rows: usize,
    /// Classes.
    pub cols: usize,
    /// Rows with this label are ignored (ONNX writes -100 where it has none).
    pub ignore_index: i64,
    /// Receives 1 + the first row with a bad label; left alone where there is none. May be null.
    pub error: *mut u64,
}

/// `dlogits[row] = (softmax(logits[row]) - onehot(labels[row])) * dy[row]`; zeros for an ignored or bad row.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct CrossEntropyGradArgs {
    /// Dense `[rows, cols]`.
    pub logits: *const f32,
    /// One class for each row.
    pub labels: *const i64,
    /// Gradient of each row's loss.
    pub dy: *const f32,
    /// 0 to use one value for all rows, 1 for a value per row.
    pub dy_stride: usize,
    /// Gradient of the logits (overwritten; may be `logits`).
    pub dlogits: *mut f32,
    /// Rows.
    pub rows: usize,
    /// Classes.
    pub cols: usize,
    /// As in the forward loss.
    pub ignore_index: i64,
    /// As in the forward loss.
    pub error: *mut u64,
}

const _: () = {
    assert!(size_of::<MatmulArgs>() == 20 * 8);
    assert!(size_of::<MatmulI8Args>() == 26 * 8);
    assert!(size_of::<ConvShape>() == 16 * 8);
    assert!(size_of::<Conv2dArgs>() == 24 * 8);
    assert!(size_of::<Conv2dGradInputArgs>() == 24 * 8);
    assert!(size_of::<Conv2dGradWeightArgs>() == 20 * 8);
    assert!(size_of::<Conv2dI8Args>() == 30 * 8);
    assert!(size_of::<Conv2dGradInputI8Args>() == 28 * 8);
    assert!(size_of::<PoolShape>() == 16 * 8);
    assert!(size_of::<MaxPoolGradArgs>() == 19 * 8);
    assert!(size_of::<AttentionArgs>() == 47 * 8);
    assert!(size_of::<GatherArgs>() == 8 * 8);
};
