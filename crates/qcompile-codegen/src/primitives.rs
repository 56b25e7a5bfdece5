//! Steps that call a hand-scheduled kernel: its argument block, its phases, and its share of units.

use crate::attention;
use crate::emitter::Emitter;
use crate::epilogue::Partials;
use crate::frame::Frame;
use crate::recurrent;
use crate::tail::Tail;
use cranelift_codegen::ir::types::I64;
use cranelift_codegen::ir::{InstBuilder, StackSlot, StackSlotData, StackSlotKind, Value};
use qcompile_ir::{ConvGeometry, DType, Dim, PoolGeometry, ScatterOp};
use qcompile_kernels::args::{
    AveragePoolArgs, AveragePoolGradArgs, Combine, Conv2dArgs, Conv2dGradInputArgs,
    Conv2dGradInputI8Args, Conv2dGradWeightArgs, Conv2dGradWeightI8Args, Conv2dI8Args, ConvShape,
    CrossEntropyArgs, CrossEntropyGradArgs, GatherArgs, IotaArgs, MatmulArgs, MatmulI8Args,
    MaxPoolArgs, MaxPoolGradArgs, PoolShape, RandomArgs, ScatterArgs, SoftmaxArgs, TopKArgs,
};
use qcompile_kernels::{KernelId, Kernels, Primitive as Entry};
use qcompile_plan::{
    AttentionResult, Convolution, Int8, Matmul, Matrix, Operands, Place, Pooling, Primitive,
    Product,
};

use std::mem::{offset_of, size_of};

/// Labels with this value are left out of the loss.
const IGNORED_LABEL: i64 = -100;

/// The kernel of a primitive.
pub(crate) fn kernel_id(primitive: &Primitive) -> KernelId {
    match primitive {
        Primitive::Matmul(matmul, _) => match matmul.operands {
            Operands::F32 => KernelId::Matmul,
            Operands::Bf16 => KernelId::MatmulBf16,
            Operands::Int8(_) => KernelId::MatmulI8,
        },
        Primitive::Convolution(convolution, _) => {
            match (convolution.product, convolution.operands) {
                (Product::Forward, Operands::F32) => KernelId::Conv2d,
                (Product::Forward, Operands::Bf16) => KernelId::Conv2dBf16,
                (Product::Forward, Operands::Int8(_)) => KernelId::Conv2dI8,
                (Product::GradInput, Operands::F32) => KernelId::Conv2dGradInput,
                (Product::GradInput, Operands::Bf16) => KernelId::Conv2dGradInputBf16,
                (Product::GradInput, Operands::Int8(_)) => KernelId::Conv2dGradInputI8,
                (Product::GradWeight, Operands::F32) => KernelId::Conv2dGradWeight,
                (Product::GradWeight, Operands::Bf16) => KernelId::Conv2dGradWeightBf16,
                (Product::GradWeight, Operands::Int8(_)) => KernelId::Conv2dGradWeightI8,
            }
        }
        Primitive::Pooling(pooling) => match (pooling.max, pooling.gradient) {
            (true, false) if pooling.dtype == DType::I8 => KernelId::MaxPoolI8,
            (true, false) if pooling.dtype == DType::BF16 => KernelId::MaxPoolBf16,
            (true, false) => KernelId::MaxPool,
            (true, true) => KernelId::MaxPoolGrad,
            (false, false) => KernelId::AveragePool,
            (false, true) => KernelId::AveragePoolGrad,
        },
        Primitive::Attention(attention) => match attention.result {
            AttentionResult::Forward(_) => KernelId::Attention,
            AttentionResult::Gradients { .. } => KernelId::AttentionGrad,
        },
        Primitive::Softmax { log: false, .. } => KernelId::Softmax,
        Primitive::Softmax { log: true, .. } => KernelId::LogSoftmax,
        Primitive::CrossEntropy { .. } => KernelId::CrossEntropy,
        Primitive::CrossEntropyGrad { .. } => KernelId::CrossEntropyGrad,
        Primitive::Gather { .. } => KernelId::Gather,
        Primitive::Scatter { .. } => KernelId::Scatter,
        Primitive::TopK { .. } => KernelId::TopK,
        Primitive::Iota { .. } => KernelId::Iota,
        Primitive::Random { .. } => KernelId::Random,
        Primitive::Recurrent(recurrent) => recurrent::kernel(recurrent),
    }
}

/// An argument block in a stack slot.
pub(crate) struct Block {
    slot: StackSlot,
    /// Where the pointer to the scratch is, if the kernel takes one.
    scratch: usize,
}

impl Block {
    pub(crate) fn new<T>(e: &mut Emitter<'_, '_>) -> Block {
        let bytes = u32::try_from(size_of::<T>()).expect("argument blocks are small");
        let data = StackSlotData::new(StackSlotKind::ExplicitSlot, bytes, 3);
        Block { slot: e.b.create_sized_stack_slot(data), scratch: 0 }
    }

    pub(crate) fn put(&self, e: &mut Emitter<'_, '_>, offset: usize, value: Value) {
        let offset = i32::try_from(offset).expect("argument blocks are small");
        e.b.ins().stack_store(I64, value, self.slot, offset);
    }

    fn address(&self, e: &mut Emitter<'_, '_>) -> Value {
        e.b.ins().stack_addr(I64, self.slot, 0)
    }
}

/// Stores fields of an argument block: `fields!(e, block, Args { field: value, ... })`.
macro_rules! fields {
    ($e:ident, $block:ident, $args:ident { $($($field:ident).+ : $value:expr),* $(,)? }) => {
        $({
            let value = $value;
            $block.put($e, offset_of!($args, $($field).+), value);
        })*
    };
}

/// Fills the argument block of a primitive; `epilogue` is its address or 0.
pub(crate) fn arguments(
    e: &mut Emitter<'_, '_>,
    primitive: &Primitive,
    step: usize,
    epilogue: Value,
) -> Block {
    let tail = Tail::new(e, primitive.epilogue(), epilogue);
    match primitive {
        Primitive::Matmul(matmul, _) => self::matmul(e, matmul, tail),
        Primitive::Convolution(convolution, _) => self::convolution(e, convolution, tail),
        Primitive::Pooling(pooling) => self::pooling(e, pooling),
        Primitive::Attention(attention) => attention::arguments(e, attention),
        Primitive::Softmax { rows, cols, x, y, .. } => {
            let block = Block::new::<SoftmaxArgs>(e);
            fields!(
                e,
                block,
                SoftmaxArgs {
                    x: e.place(*x, 4),
                    y: e.place(*y, 4),
                    rows: e.dim(*rows),
                    cols: e.dim(*cols),
                }
            );
            block
        }
        Primitive::CrossEntropy { rows, cols, logits, label, loss } => {
            let block = Block::new::<CrossEntropyArgs>(e);
            fields!(
                e,
                block,
                CrossEntropyArgs {
                    logits: e.place(*logits, 4),
                    labels: e.place(*label, 8),
                    losses: e.place(*loss, 4),
                    rows: e.dim(*rows),
                    cols: e.dim(*cols),
                    ignore_index: e.b.ins().iconst(I64, IGNORED_LABEL),
                    error: e.error_word(step),
                }
            );
            block
        }
        Primitive::CrossEntropyGrad { rows, cols, logits, label, dloss, dlogits } => {
            let block = Block::new::<CrossEntropyGradArgs>(e);
            fields!(
                e,
                block,
                CrossEntropyGradArgs {
                    logits: e.place(*logits, 4),
                    labels: e.place(*label, 8),
                    dy: e.place(*dloss, 4),
                    dy_stride: e.int(1),
                    dlogits: e.place(*dlogits, 4),
                    rows: e.dim(*rows),
                    cols: e.dim(*cols),
                    ignore_index: e.b.ins().iconst(I64, IGNORED_LABEL),
                    error: e.error_word(step),
                }
            );
            block
        }
        Primitive::Gather { table_rows, row_bytes, count, table, indices, y } => {
            let block = Block::new::<GatherArgs>(e);
            fields!(
                e,
                block,
                GatherArgs {
                    table: e.place(*table, 1),
                    indices: e.place(*indices, 8),
                    out: e.place(*y, 1),
                    rows: e.dim(*table_rows),
                    width: e.affine(*row_bytes),
                    element_bytes: e.int(1),
                    count: e.dim(*count),
                    error: e.error_word(step),
                }
            );
            block
        }
        Primitive::Scatter { op, dtype, rows, width, count, indices, values, y } => {
            let block = Block::new::<ScatterArgs>(e);
            let combine = match op {
                ScatterOp::Add => Combine::Add,
                ScatterOp::Mul => Combine::Mul,
                ScatterOp::Max => Combine::Max,
            };
            fields!(
                e,
                block,
                ScatterArgs {
                    values: e.place(*values, dtype.size()),
                    indices: e.place(*indices, 8),
                    out: e.place(*y, dtype.size()),
                    rows: e.dim(*rows),
                    width: e.dim(*width),
                    count: e.dim(*count),
                    combine: e.int(combine as usize),
                    integers: e.int(usize::from(*dtype == DType::I64)),
                    error: e.error_word(step),
                }
            );
            block
        }
        Primitive::TopK { largest, dtype, rows, cols, k, x, y } => {
            let block = Block::new::<TopKArgs>(e);
            fields!(
                e,
                block,
                TopKArgs {
                    x: e.place(*x, dtype.size()),
                    out: e.place(*y, 8),
                    rows: e.dim(*rows),
                    cols: e.int(*cols),
                    k: e.int(*k),
                    largest: e.int(usize::from(*largest)),
                    integers: e.int(usize::from(*dtype == DType::I64)),
                }
            );
            block
        }
        Primitive::Iota { count, y } => {
            let block = Block::new::<IotaArgs>(e);
            fields!(e, block, IotaArgs { out: e.place(*y, 8), count: e.dim(*count) });
            block
        }
        Primitive::Random { seed, count, step: counter, y } => {
            let block = Block::new::<RandomArgs>(e);
            let samples = e.field(Frame::FIRST);
            let each = e.int(if count.batch { count.scale } else { 0 });
            fields!(
                e,
                block,
                RandomArgs {
                    step: e.place(*counter, 8),
                    out: e.place(*y, 4),
                    seed: e.b.ins().iconst(I64, seed.cast_signed()),
                    first: e.b.ins().imul(samples, each),
                    count: e.dim(*count),
                }
            );
            block
        }
        Primitive::Recurrent(recurrent) => recurrent::arguments(e, recurrent),
    }
}

impl Emitter<'_, '_> {
    /// The address of the step's word for errors.
    fn error_word(&mut self, step: usize) -> Value {
        let errors = self.field(Frame::ERRORS);
        self.plus(errors, step * 8)
    }
}

/// Strides of the matrices of one operand.
fn strides(e: &mut Emitter<'_, '_>, matrix: &Matrix) -> [Value; 3] {
    [matrix.batch_stride, matrix.row_stride, matrix.col_stride].map(|stride| e.dim(stride))
}

fn matmul(e: &mut Emitter<'_, '_>, matmul: &Matmul, tail: Tail) -> Block {
    let size = matmul.operands.dtype().size();
    let (a, b) = (e.place(matmul.a.place, size), e.place(matmul.b.place, size));
    let c = e.place(matmul.c, 4);
    let [a_batch, a_row, a_col] = strides(e, &matmul.a);
    let [b_batch, b_row, b_col] = strides(e, &matmul.b);
    let [batch, m, n, k] = [matmul.batch, matmul.m, matmul.n, matmul.k].map(|dim| e.dim(dim));
    let c_batch = e.b.ins().imul(m, n);
    let scratch = e.field(Frame::SCRATCH);
    macro_rules! common {
        ($block:ident, $args:ident) => {
            fields!(
                e,
                $block,
                $args {
                    a: a,
                    b: b,
                    c: c,
                    batch: batch,
                    m: m,
                    n: n,
                    k: k,
                    a_batch_stride: a_batch,
                    a_row_stride: a_row,
                    a_col_stride: a_col,
                    b_batch_stride: b_batch,
                    b_row_stride: b_row,
                    b_col_stride: b_col,
                    c_batch_stride: c_batch,
                    c_row_stride: n,
                    epilogue: tail.function,
                    epilogue_ctx: tail.context,
                    streams: tail.streams,
                    stream_count: tail.count,
                    streams: tail.streams,
                    stream_count: tail.count,
                    scratch: scratch,
                }
            )
        };
    }
    if let Some(int8) = matmul.operands.scales() {
        let mut block = Block::new::<MatmulI8Args>(e);
        block.scratch = offset_of!(MatmulI8Args, scratch);
        common!(block, MatmulI8Args);
        fields!(
            e,
            block,
            MatmulI8Args {
                a_scale: e.place(int8.scale_a, 4),
                a_scale_stride: e.int(usize::from(int8.per_row)),
                a_zero: zero_point(e, int8),
                a_unsigned: e.int(usize::from(int8.unsigned_a)),
                b_scale: e.place(int8.scale_b, 4),
                b_scale_stride: e.int(usize::from(int8.per_channel)),
            }
        );
        return block;
    }
    // bf16 takes the same block.
    let mut block = Block::new::<MatmulArgs>(e);
    block.scratch = offset_of!(MatmulArgs, scratch);
    common!(block, MatmulArgs);
    block
}

/// The address of a zero point; null for 0.
fn zero_point(e: &mut Emitter<'_, '_>, int8: &Int8) -> Value {
    match int8.zero_a {
        Some(place) => e.place(place, 1),
        None => e.int(0),
    }
}

/// Stores the geometry of a convolution.
fn put_conv_shape(e: &mut Emitter<'_, '_>, block: &Block, at: usize, convolution: &Convolution) {
    let ConvGeometry { input, kernel, strides, pads, dilations, groups } = convolution.geometry;
    let words: [(usize, usize); 15] = [
        (offset_of!(ConvShape, height), input[0]),
        (offset_of!(ConvShape, width), input[1]),
        (offset_of!(ConvShape, in_channels), convolution.in_channels),
        (offset_of!(ConvShape, out_channels), convolution.out_channels),
        (offset_of!(ConvShape, kernel_height), kernel[0]),
        (offset_of!(ConvShape, kernel_width), kernel[1]),
        (offset_of!(ConvShape, stride_height), strides[0]),
        (offset_of!(ConvShape, stride_width), strides[1]),
        (offset_of!(ConvShape, pad_top), pads[0]),
        (offset_of!(ConvShape, pad_left), pads[1]),
        (offset_of!(ConvShape, pad_bottom), pads[2]),
        (offset_of!(ConvShape, pad_right), pads[3]),
        (offset_of!(ConvShape, dilation_height), dilations[0]),
        (offset_of!(ConvShape, dilation_width), dilations[1]),
        (offset_of!(ConvShape, groups), groups),
    ];
    put_words(e, block, at, offset_of!(ConvShape, batch), convolution.images, &words);
}

/// Stores a number of images and fixed words.
fn put_words(
    e: &mut Emitter<'_, '_>,
    block: &Block,
    at: usize,
    images_at: usize,
    images: Dim,
    words: &[(usize, usize)],
) {
    let images = e.dim(images);
    block.put(e, at + images_at, images);
    for &(offset, word) in words {
        let word = e.int(word);
        block.put(e, at + offset, word);
    }
}

fn convolution(e: &mut Emitter<'_, '_>, convolution: &Convolution, tail: Tail) -> Block {
    let Convolution { product, a, b, c, operands, .. } = convolution;
    let size = operands.dtype().size();
    let (a, b, c) = (e.place(*a, size), e.place(*b, size), e.place(*c, 4));
    let scratch = e.field(Frame::SCRATCH);
    macro_rules! block {
        ($args:ident { $($field:ident: $value:expr),* $(,)? }) => {{
            let mut block = Block::new::<$args>(e);
            block.scratch = offset_of!($args, scratch);
            fields!(e, block, $args { scratch: scratch, $($field: $value),* });
            put_conv_shape(e, &block, offset_of!($args, shape), convolution);
            block
        }};
    }
    macro_rules! with_tail {
        ($args:ident { $($fields:tt)* }) => {
            block!($args {
                epilogue: tail.function,
                epilogue_ctx: tail.context,
                streams: tail.streams,
                stream_count: tail.count,
                $($fields)*
            })
        };
    }
    // bf16 takes the blocks of f32.
    match (product, operands.scales()) {
        (Product::Forward, None) => with_tail!(Conv2dArgs { x: a, w: b, y: c }),
        (Product::Forward, Some(int8)) => with_tail!(Conv2dI8Args {
            x: a,
            w: b,
            y: c,
            x_scale: e.place(int8.scale_a, 4),
            x_scale_stride: e.int(usize::from(int8.per_row)),
            x_zero: zero_point(e, int8),
            x_unsigned: e.int(usize::from(int8.unsigned_a)),
            w_scale: e.place(int8.scale_b, 4),
            w_scale_stride: e.int(usize::from(int8.per_channel)),
        }),
        (Product::GradInput, None) => with_tail!(Conv2dGradInputArgs { dy: a, w: b, dx: c }),
        (Product::GradInput, Some(int8)) => with_tail!(Conv2dGradInputI8Args {
            dy: a,
            w: b,
            dx: c,
            dy_scale: e.place(int8.scale_a, 4),
            dy_scale_stride: e.int(usize::from(int8.per_row)),
            w_scale: e.place(int8.scale_b, 4),
            w_scale_stride: e.int(usize::from(int8.per_channel)),
        }),
        (Product::GradWeight, None) => block!(Conv2dGradWeightArgs { x: a, dy: b, dw: c }),
        (Product::GradWeight, Some(int8)) => {
            let mut block = Block::new::<Conv2dGradWeightI8Args>(e);
            block.scratch = offset_of!(Conv2dGradWeightI8Args, gradient.scratch);
            fields!(e, block, Conv2dGradWeightI8Args {
                gradient.x: a,
                gradient.dy: b,
                gradient.dw: c,
                gradient.scratch: scratch,
                x_scale: e.place(int8.scale_a, 4),
                x_scale_stride: e.int(usize::from(int8.per_row)),
                dy_scale: e.place(int8.scale_b, 4),
                dy_scale_stride: e.int(usize::from(int8.per_channel)),
            });
            let shape = offset_of!(Conv2dGradWeightI8Args, gradient.shape);
            put_conv_shape(e, &block, shape, convolution);
            block
        }
    }
}

fn pooling(e: &mut Emitter<'_, '_>, pooling: &Pooling) -> Block {
    let size = pooling.dtype.size();
    let place = |e: &mut Emitter<'_, '_>, place: Place| e.place(place, size);
    let (x, dy, y) = (place(e, pooling.x), place(e, pooling.dy), place(e, pooling.y));
    let padded = usize::from(pooling.geometry.count_include_pad);
    macro_rules! block {
        ($args:ident { $($field:ident: $value:expr),* $(,)? }) => {{
            let block = Block::new::<$args>(e);
            fields!(e, block, $args { $($field: $value),* });
            put_pool_shape(e, &block, offset_of!($args, shape), pooling);
            block
        }};
    }
    match (pooling.max, pooling.gradient) {
        (true, false) => block!(MaxPoolArgs { x: x, y: y }),
        (true, true) => block!(MaxPoolGradArgs { x: x, dy: dy, dx: y }),
        (false, false) => {
            block!(AveragePoolArgs { x: x, y: y, count_include_pad: e.int(padded) })
        }
        (false, true) => {
            block!(AveragePoolGradArgs { dy: dy, dx: y, count_include_pad: e.int(padded) })
        }
    }
}

/// Stores the geometry of a pooling.
fn put_pool_shape(e: &mut Emitter<'_, '_>, block: &Block, at: usize, pooling: &Pooling) {
    let PoolGeometry { input, kernel, strides, pads, dilations, .. } = pooling.geometry;
    let [out_height, out_width] = pooling.geometry.output().expect("verified: the window fits");
    let words: [(usize, usize); 15] = [
        (offset_of!(PoolShape, height), input[0]),
        (offset_of!(PoolShape, width), input[1]),
        (offset_of!(PoolShape, channels), pooling.channels),
        (offset_of!(PoolShape, out_height), out_height),
        (offset_of!(PoolShape, out_width), out_width),
        (offset_of!(PoolShape, kernel_height), kernel[0]),
        (offset_of!(PoolShape, kernel_width), kernel[1]),
        (offset_of!(PoolShape, stride_height), strides[0]),
        (offset_of!(PoolShape, stride_width), strides[1]),
        (offset_of!(PoolShape, pad_top), pads[0]),
        (offset_of!(PoolShape, pad_left), pads[1]),
        (offset_of!(PoolShape, pad_bottom), pads[2]),
        (offset_of!(PoolShape, pad_right), pads[3]),
        (offset_of!(PoolShape, dilation_height), dilations[0]),
        (offset_of!(PoolShape, dilation_width), dilations[1]),
    ];
    put_words(e, block, at, offset_of!(PoolShape, batch), pooling.images, &words);
}

/// Calls a kernel of the table on an argument block: all its phases, with a barrier between. Reductions of the
/// epilogue are started before and combined after.
pub(crate) fn call(
    e: &mut Emitter<'_, '_>,
    entry: &Entry,
    block: &Block,
    partials: Option<&Partials<'_>>,
    thread: Value,
    threads: Value,
) {
    let args = block.address(e);
    let parts = partials.map(|partials| {
        let (parts, bytes) = partial_bytes(e, entry, block, partials);
        let scratch = e.field(Frame::SCRATCH);
        let rest = e.b.ins().iadd(scratch, bytes);
        block.put(e, block.scratch, rest);
        partials.start(e, parts, thread, threads);
        if entry.phases < 2 {
            e.barrier(threads);
        }
        parts
    });
    for phase in 0..entry.phases {
        if phase > 0 {
            e.barrier(threads);
        }
        let phase = e.int(phase);
        let units = e.call_address(entry.units as usize, &[I64, I64], I64, &[args, phase]);
        let (begin, end) = e.share(units, thread, threads);
        let run = e.int(entry.run as usize);
        e.call_words(run, &[args, phase, begin, end]);
    }
    if let (Some(partials), Some(parts)) = (partials, parts) {
        e.barrier(threads);
        partials.finish(e, parts, thread, threads);
    }
}

/// How many parts an epilogue meets, and the bytes of their partial results.
fn partial_bytes(
    e: &mut Emitter<'_, '_>,
    entry: &Entry,
    block: &Block,
    partials: &Partials<'_>,
) -> (Value, Value) {
    let args = block.address(e);
    let parts = e.call_address(entry.parts as usize, &[I64], I64, &[args]);
    let bytes = partials.bytes(e, parts);
    (parts, bytes)
}

/// The bytes of scratch that a kernel and the reductions of its epilogue want for an argument block.
pub(crate) fn scratch(
    e: &mut Emitter<'_, '_>,
    entry: &Entry,
    block: &Block,
    partials: Option<&Partials<'_>>,
) -> Value {
    let args = block.address(e);
    let own = e.call_address(entry.scratch as usize, &[I64], I64, &[args]);
    match partials {
        Some(partials) => {
            let (_, bytes) = partial_bytes(e, entry, block, partials);
            e.b.ins().iadd(own, bytes)
        }
        None => own,
    }
}

/// The entry of the table for a primitive.
pub(crate) fn entry<'k>(kernels: &'k Kernels, primitive: &Primitive) -> &'k Entry {
    kernels.get(kernel_id(primitive))
}
