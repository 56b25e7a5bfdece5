//! Kernels on the shapes of real models, for whoever times them.

use qcompile_kernels::args::*;
use qcompile_kernels::{KernelId, Kernels, kernels};
use std::ptr::{from_ref, null, null_mut};

use aligned::{Aligned, aligned};

#[path = "aligned.rs"]
mod aligned;

pub(crate) use qcompile_kernels::Tier;

/// What a kernel multiplies, and so what it is measured by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    F32 = 0,
    Bf16 = 1,
    Int8 = 2,
    /// Nothing: what counts are its elements.
    Elements = 3,
}

/// What is done with each kernel.
pub(crate) trait Visit {
    /// A group begins, with a line of what its columns are.
    fn group(&mut self, columns: &str);
    /// Whether the kernels on a shape are wanted.
    fn wants(&mut self, shape: &str) -> bool;
    /// A kernel on a shape that is wanted: its column, its operations or elements, and a call.
    fn kernel(&mut self, shape: &str, column: &str, kind: Kind, work: f64, call: &dyn Fn());
}

/// Shows every kernel of a tier.
pub(crate) fn visit(tier: Tier, visit: &mut dyn Visit) {
    let mut cases = Cases { table: kernels(tier), visit };
    cases.visit.group(
        "batch x m x n x k           f32 NN       NT           TN           bf16 NN      NT           \
         TN           int8 NT      TN",
    );
    for (name, [batch, m, n, k]) in [
        ("square", [1, 256, 256, 256]),
        ("square", [1, 512, 512, 512]),
        ("square", [1, 1024, 1024, 1024]),
        ("mlp", [1, 128, 1024, 784]),
        ("mlp", [1, 128, 1024, 1024]),
        ("mlp", [1, 1024, 1024, 128]),
        ("mlp", [1, 1024, 784, 128]),
        ("mlp", [1, 128, 10, 1024]),
        ("mlp", [1, 128, 1024, 10]),
        ("mlp", [1, 10, 1024, 128]),
        ("bert", [1, 2048, 768, 256]),
        ("bert", [1, 2048, 1024, 256]),
        ("bert", [1, 2048, 256, 1024]),
        ("bert", [1, 1024, 256, 2048]),
        ("bert", [1, 2048, 16, 256]),
        ("bert", [64, 128, 128, 64]),
        ("bert", [64, 128, 64, 128]),
        ("gpt", [1, 2048, 1536, 384]),
        ("gpt", [1, 1536, 384, 2048]),
        ("gpt", [48, 256, 256, 64]),
        ("gpt", [48, 256, 64, 256]),
        ("gpt", [1, 2048, 65, 384]),
    ] {
        cases.products(name, [batch, m, n, k]);
    }
    cases.visit.group(
        "batch x length x heads x width   f32: forward, backward    bf16 operands             bf16                      int8",
    );
    for (name, sizes, causal) in [
        ("bert", [16, 128, 4, 64], false),
        ("gpt", [8, 256, 6, 64], true),
        ("long", [1, 2048, 6, 64], true),
        ("long", [1, 2048, 6, 64], false),
    ] {
        cases.attention(name, sizes, causal);
    }
    cases.visit.group(
        "n h cin cout k stride       f32 fwd      gradX        gradW        bf16 fwd     gradX        \
         gradW        int8 fwd     gradX        gradW",
    );
    for (name, [n, size, cin, cout, kernel, stride, groups]) in [
        ("r20", [128, 32, 16, 16, 3, 1, 1]),
        ("r20", [128, 16, 32, 32, 3, 1, 1]),
        ("r20", [128, 8, 64, 64, 3, 1, 1]),
        ("r20", [128, 32, 16, 32, 3, 2, 1]),
        ("r20", [128, 16, 32, 64, 3, 2, 1]),
        ("r20", [128, 32, 3, 16, 3, 1, 1]),
        // In cache, as where a step goes image by image.
        ("small", [8, 32, 16, 16, 3, 1, 1]),
        ("small", [16, 16, 32, 32, 3, 1, 1]),
        ("small", [32, 8, 64, 64, 3, 1, 1]),
        ("small", [8, 32, 16, 32, 3, 2, 1]),
        ("small", [16, 16, 32, 64, 3, 2, 1]),
        ("small", [8, 32, 3, 16, 3, 1, 1]),
        ("r18", [4, 56, 64, 64, 3, 1, 1]),
        ("r18", [4, 56, 64, 128, 3, 2, 1]),
        ("r18", [4, 56, 64, 128, 1, 2, 1]),
        ("r18", [16, 14, 256, 256, 3, 1, 1]),
        ("r18", [16, 7, 512, 512, 3, 1, 1]),
        ("r18", [2, 224, 3, 64, 7, 2, 1]),
        ("mnist", [128, 28, 1, 16, 5, 1, 1]),
        ("mbn", [4, 56, 24, 144, 1, 1, 1]),
        ("mbn", [4, 56, 144, 24, 1, 1, 1]),
        ("mbn", [16, 7, 160, 960, 1, 1, 1]),
        ("mbn", [4, 56, 144, 144, 3, 1, 144]),
        ("mbn", [4, 56, 144, 144, 3, 2, 144]),
        ("mbn", [16, 14, 384, 384, 3, 1, 384]),
        ("mbn", [16, 7, 960, 960, 3, 1, 960]),
    ] {
        cases.convolutions(name, [n, size], [cin, cout, groups], [kernel, stride]);
    }
    cases.visit.group("rows and windows");
    cases.rows();
    cases.windows();
    cases.indices();
}

fn scratch<A>(table: &Kernels, id: KernelId, args: &A) -> Aligned<u8> {
    // SAFETY: the block is the kernel's.
    let bytes = unsafe { (table.get(id).scratch)(from_ref(args).cast()) };
    aligned(0, bytes)
}

/// A product of dense operands, each transposed or not.
fn matmul_args<E>(
    a: &[E],
    b: &[E],
    c: &mut [f32],
    [batch, m, n, k]: [usize; 4],
    (ta, tb): (bool, bool),
) -> MatmulArgs<E> {
    MatmulArgs {
        a: a.as_ptr(),
        b: b.as_ptr(),
        c: c.as_mut_ptr(),
        batch,
        m,
        n,
        k,
        a_batch_stride: m * k,
        a_row_stride: if ta { 1 } else { k },
        a_col_stride: if ta { m } else { 1 },
        b_batch_stride: k * n,
        b_row_stride: if tb { 1 } else { n },
        b_col_stride: if tb { k } else { 1 },
        c_batch_stride: m * n,
        c_row_stride: n,
        epilogue: None,
        epilogue_ctx: null(),
        streams: null(),
        stream_count: 0,
        scratch: null_mut(),
    }
}

/// A tier's kernels, and who is shown them.
struct Cases<'v> {
    table: &'static Kernels,
    visit: &'v mut dyn Visit,
}

/// The columns of products by whether their operands are transposed.
const TRANSPOSED: [(&str, (bool, bool)); 3] =
    [("NN", (false, false)), ("NT", (false, true)), ("TN", (true, false))];

impl Cases<'_> {
    /// Shows a kernel.
    fn show<A>(
        &mut self,
        shape: &str,
        column: &str,
        (kind, work): (Kind, f64),
        id: KernelId,
        args: &A,
    ) {
        let primitive = self.table.get(id);
        let args: *const u64 = from_ref(args).cast();
        let call = || {
            for phase in 0..primitive.phases {
                // SAFETY: every caller below sets up valid pointers for its shapes.
                unsafe { (primitive.run)(args, phase, 0, (primitive.units)(args, phase)) };
            }
        };
        self.visit.kernel(shape, column, kind, work, &call);
    }

    fn products(&mut self, name: &str, [batch, m, n, k]: [usize; 4]) {
        let name = format!("{name} {batch} x {m} x {n} x {k}");
        if !self.visit.wants(&name) {
            return;
        }
        let table = self.table;
        let flops = 2.0 * (batch * m * n * k) as f64;
        let (a, b) = (aligned(0.5_f32, batch * m * k), aligned(0.25_f32, batch * k * n));
        let mut c = aligned(0.0_f32, batch * m * n);
        let (a16, b16) = (aligned(0x3f00_u16, batch * m * k), aligned(0x3e80_u16, batch * k * n));
        let (a8, b8, one) = (aligned(3_i8, batch * m * k), aligned(5_i8, batch * k * n), 1.0_f32);
        for (column, turned) in TRANSPOSED {
            let mut args = matmul_args(&a, &b, &mut c, [batch, m, n, k], turned);
            let mut space = scratch(table, KernelId::Matmul, &args);
            args.scratch = space.as_mut_ptr().cast();
            let column = format!("f32 {column}");
            self.show(&name, &column, (Kind::F32, flops), KernelId::Matmul, &args);
        }
        for (column, turned) in TRANSPOSED {
            let mut args = matmul_args(&a16, &b16, &mut c, [batch, m, n, k], turned);
            let mut space = scratch(table, KernelId::MatmulBf16, &args);
            args.scratch = space.as_mut_ptr().cast();
            let column = format!("bf16 {column}");
            self.show(&name, &column, (Kind::Bf16, flops), KernelId::MatmulBf16, &args);
        }
        for (column, (ta, tb)) in TRANSPOSED.into_iter().skip(1) {
            let mut args = MatmulI8Args {
                a: a8.as_ptr(),
                b: b8.as_ptr(),
                c: c.as_mut_ptr(),
                a_scale: &raw const one,
                a_scale_stride: 0,
                a_zero: null(),
                a_unsigned: 0,
                b_scale: &raw const one,
                b_scale_stride: 0,
                batch,
                m,
                n,
                k,
                a_batch_stride: m * k,
                a_row_stride: if ta { 1 } else { k },
                a_col_stride: if ta { m } else { 1 },
                b_batch_stride: k * n,
                b_row_stride: if tb { 1 } else { n },
                b_col_stride: if tb { k } else { 1 },
                c_batch_stride: m * n,
                c_row_stride: n,
                epilogue: None,
                epilogue_ctx: null(),
                streams: null(),
                stream_count: 0,
                scratch: null_mut(),
            };
            let mut space = scratch(table, KernelId::MatmulI8, &args);
            args.scratch = space.as_mut_ptr().cast();
            let column = format!("int8 {column}");
            self.show(&name, &column, (Kind::Int8, flops), KernelId::MatmulI8, &args);
        }
    }

    /// Queries, keys and values are parts of one value, as in a model.
    fn attention(&mut self, name: &str, [batch, rows, heads, width]: [usize; 4], causal: bool) {
        let kind = if causal { " causal" } else { "" };
        let name = format!("attention {name} {batch} {rows} {heads} {width}{kind}");
        if !self.visit.wants(&name) {
            return;
        }
        // Pairs of a query and a key that it sees.
        let pairs = batch * heads * if causal { rows * (rows + 1) / 2 } else { rows * rows };
        let size = heads * width;
        let values = |count: usize| -> Vec<f32> {
            (0..count).map(|i| (i * 37 % 101) as f32 / 101.0 - 0.5).collect()
        };
        let (qkv, dy) = (values(batch * rows * 3 * size), values(batch * rows * size));
        let narrow = |values: &[f32]| -> Vec<u16> {
            values.iter().map(|value| (value.to_bits() >> 16) as u16).collect()
        };
        let (qkv_bf16, dy_bf16) = (narrow(&qkv), narrow(&dy));
        let codes: Vec<i8> = qkv.iter().map(|value| (value * 254.0) as i8).collect();
        let mut results = vec![0.0_f32; batch * rows * size * 4];
        let [y, dq, dk, dv] =
            [0, 1, 2, 3].map(|at| results[at * batch * rows * size..].as_mut_ptr());
        let strides = [rows * 3 * size, 3 * size, width, 1];
        let code_scale = 1.0_f32 / 254.0;
        for (column, kind) in [
            ("f32", AttentionKind::F32),
            ("bf16 operands", AttentionKind::Bf16Operands),
            ("bf16", AttentionKind::Bf16),
            ("int8", AttentionKind::Int8),
        ] {
            let (q, dy, bytes) = match kind {
                AttentionKind::F32 => (qkv.as_ptr().cast::<u8>(), dy.as_ptr().cast::<u8>(), 4),
                AttentionKind::Int8 => (codes.as_ptr().cast(), dy.as_ptr().cast(), 1),
                _ => (qkv_bf16.as_ptr().cast(), dy_bf16.as_ptr().cast(), 2),
            };
            let args = AttentionArgs {
                numbers: std::ptr::null(),
                number_strides: [0; 4],
                q,
                k: q.wrapping_add(size * bytes),
                v: q.wrapping_add(2 * size * bytes),
                mask: null(),
                dy,
                y: y.cast(),
                dq: dq.cast(),
                dk: dk.cast(),
                dv: dv.cast(),
                batch,
                rows,
                keys: rows,
                heads,
                key_heads: heads,
                width,
                value_width: width,
                q_strides: strides,
                k_strides: strides,
                v_strides: strides,
                mask_strides: [0; 4],
                dy_strides: [rows * size, size, width, 1],
                scale: u64::from(0.125_f32.to_bits()),
                causal: usize::from(causal),
                kind,
                scales: [&raw const code_scale; 3],
            };
            for (id, products) in [(KernelId::Attention, 2), (KernelId::AttentionGrad, 5)] {
                let flops = (2 * products * pairs * width) as f64;
                let way = if id == KernelId::Attention { "" } else { ", gradients" };
                self.show(&name, &format!("{column}{way}"), (Kind::F32, flops), id, &args);
            }
        }
    }

    fn convolutions(
        &mut self,
        name: &str,
        [batch, size]: [usize; 2],
        [in_channels, out_channels, groups]: [usize; 3],
        [kernel, stride]: [usize; 2],
    ) {
        let name = format!("{name} {batch} {size} {in_channels} {out_channels} {kernel} {stride}");
        let name = if groups > 1 { name + " dw" } else { name };
        if !self.visit.wants(&name) {
            return;
        }
        let table = self.table;
        let pad = kernel / 2;
        let shape = ConvShape {
            batch,
            height: size,
            width: size,
            in_channels,
            out_channels,
            kernel_height: kernel,
            kernel_width: kernel,
            stride_height: stride,
            stride_width: stride,
            pad_top: pad,
            pad_left: pad,
            pad_bottom: pad,
            pad_right: pad,
            dilation_height: 1,
            dilation_width: 1,
            groups,
        };
        let pixels = batch * shape.out_height() * shape.out_width();
        let weights = out_channels * in_channels / groups * kernel * kernel;
        let flops = 2.0 * (pixels * weights) as f64;
        let inputs = batch * size * size * in_channels;
        let mut x = aligned(0.5_f32, inputs);
        let mut w = aligned(0.5_f32, weights);
        let mut y = aligned(0.5_f32, pixels * out_channels);
        let (x8, y8) = (aligned(3_i8, inputs), aligned(3_i8, pixels * out_channels));
        let (x16, w16) = (aligned(0x3f00_u16, inputs), aligned(0x3f00_u16, weights));
        let y16 = aligned(0x3f00_u16, pixels * out_channels);
        let (w8, one) = (aligned(5_i8, weights), 1.0_f32);
        let (epilogue, epilogue_ctx) = (None, null());

        let (xp, wp, yp) = (x.as_mut_ptr(), w.as_mut_ptr(), y.as_mut_ptr());
        let scratch_pointer = null_mut();
        macro_rules! show {
            ($column:expr, $id:ident, $kind:expr, $args:expr) => {
                let mut args = $args;
                let mut space = scratch(table, KernelId::$id, &args);
                args.scratch = space.as_mut_ptr().cast();
                self.show(&name, $column, ($kind, flops), KernelId::$id, &args);
            };
        }
        macro_rules! all {
            ($name:literal, $kind:expr, $x:expr, $w:expr, $dy:expr, $forward:ident, $grad_input:ident, $grad_weight:ident) => {
                let (x, w, dy, scratch) = ($x, $w, $dy, scratch_pointer);
                let args = Conv2dArgs {
                    x,
                    w,
                    y: yp,
                    shape,
                    epilogue,
                    epilogue_ctx,
                    streams: null(),
                    stream_count: 0,
                    scratch,
                };
                show!(concat!($name, " forward"), $forward, $kind, args);
                let args = Conv2dGradInputArgs {
                    dy,
                    w,
                    dx: xp,
                    shape,
                    epilogue,
                    epilogue_ctx,
                    streams: null(),
                    stream_count: 0,
                    scratch,
                };
                show!(concat!($name, " gradX"), $grad_input, $kind, args);
                let args = Conv2dGradWeightArgs { x, dy, dw: wp, shape, scratch };
                show!(concat!($name, " gradW"), $grad_weight, $kind, args);
            };
        }
        all!(
            "f32",
            Kind::F32,
            xp.cast_const(),
            wp.cast_const(),
            yp.cast_const(),
            Conv2d,
            Conv2dGradInput,
            Conv2dGradWeight
        );
        let (x, w, dy) = (x16.as_ptr(), w16.as_ptr(), y16.as_ptr());
        all!("bf16", Kind::Bf16, x, w, dy, Conv2dBf16, Conv2dGradInputBf16, Conv2dGradWeightBf16);
        show!(
            "int8 forward",
            Conv2dI8,
            Kind::Int8,
            Conv2dI8Args {
                x: x8.as_ptr(),
                w: w8.as_ptr(),
                y: yp,
                x_scale: &raw const one,
                x_scale_stride: 0,
                x_zero: null(),
                x_unsigned: 0,
                w_scale: &raw const one,
                w_scale_stride: 0,
                shape,
                epilogue,
                epilogue_ctx,
                streams: null(),
                stream_count: 0,
                scratch: scratch_pointer
            }
        );
        show!(
            "int8 gradX",
            Conv2dGradInputI8,
            Kind::Int8,
            Conv2dGradInputI8Args {
                dy: y8.as_ptr(),
                w: w8.as_ptr(),
                dx: xp,
                dy_scale: &raw const one,
                dy_scale_stride: 0,
                w_scale: &raw const one,
                w_scale_stride: 0,
                shape,
                epilogue,
                epilogue_ctx,
                streams: null(),
                stream_count: 0,
                scratch: scratch_pointer
            }
        );
        let gradient = Conv2dGradWeightArgs {
            x: x8.as_ptr(),
            dy: y8.as_ptr(),
            dw: wp,
            shape,
            scratch: scratch_pointer,
        };
        let mut args = Conv2dGradWeightI8Args {
            gradient,
            x_scale: &raw const one,
            x_scale_stride: 0,
            dy_scale: &raw const one,
            dy_scale_stride: 0,
        };
        let mut space = scratch(table, KernelId::Conv2dGradWeightI8, &args);
        args.gradient.scratch = space.as_mut_ptr().cast();
        self.show(&name, "int8 gradW", (Kind::Int8, flops), KernelId::Conv2dGradWeightI8, &args);
    }

    /// Shows a kernel that is measured by elements.
    fn report<A>(&mut self, name: &str, elements: usize, id: KernelId, args: &A) {
        if self.visit.wants(name) {
            self.show(name, "", (Kind::Elements, elements as f64), id, args);
        }
    }

    fn rows(&mut self) {
        for (rows, cols) in [(2048, 128), (12288, 256), (512, 10), (2048, 65)] {
            let count = rows * cols;
            let x: Vec<f32> = (0..count).map(|i| (i % 97) as f32 / 10.0).collect();
            let (mut y, mut losses) = (vec![0.0_f32; count], vec![0.0_f32; rows]);
            let (labels, dy) = (vec![3_i64; rows], 1.0_f32);
            let args = SoftmaxArgs { x: x.as_ptr(), y: y.as_mut_ptr(), rows, cols };
            self.report(&format!("Softmax {rows} x {cols}"), count, KernelId::Softmax, &args);
            self.report(&format!("LogSoftmax {rows} x {cols}"), count, KernelId::LogSoftmax, &args);
            let args = CrossEntropyArgs {
                logits: x.as_ptr(),
                labels: labels.as_ptr(),
                losses: losses.as_mut_ptr(),
                rows,
                cols,
                ignore_index: -100,
                error: null_mut(),
            };
            self.report(&format!("Loss {rows} x {cols}"), count, KernelId::CrossEntropy, &args);
            let args = CrossEntropyGradArgs {
                logits: x.as_ptr(),
                labels: labels.as_ptr(),
                dy: &raw const dy,
                dy_stride: 0,
                dlogits: y.as_mut_ptr(),
                rows,
                cols,
                ignore_index: -100,
                error: null_mut(),
            };
            self.report(
                &format!("LossGrad {rows} x {cols}"),
                count,
                KernelId::CrossEntropyGrad,
                &args,
            );
        }
    }

    fn windows(&mut self) {
        for (name, [size, channels, kernel, stride, pad]) in [
            ("r18 pool", [112, 64, 3, 2, 1]),
            ("mnist pool", [28, 16, 2, 2, 0]),
            ("mean", [8, 64, 8, 8, 0]),
        ] {
            let out = (size + 2 * pad - kernel) / stride + 1;
            let shape = PoolShape {
                batch: 4,
                height: size,
                width: size,
                channels,
                out_height: out,
                out_width: out,
                kernel_height: kernel,
                kernel_width: kernel,
                stride_height: stride,
                stride_width: stride,
                pad_top: pad,
                pad_left: pad,
                pad_bottom: pad,
                pad_right: pad,
                dilation_height: 1,
                dilation_width: 1,
            };
            let inputs = shape.batch * size * size * channels;
            let mut x: Vec<f32> = (0..inputs).map(|i| (i % 101) as f32).collect();
            let mut y = vec![0.0_f32; shape.batch * out * out * channels];
            let (xp, yp) = (x.as_mut_ptr(), y.as_mut_ptr());
            let input = x.clone();
            let args = MaxPoolArgs { x: xp.cast(), y: yp.cast(), shape };
            self.report(&format!("{name} max"), inputs, KernelId::MaxPool, &args);
            let args = MaxPoolGradArgs { x: input.as_ptr(), dy: yp, dx: xp, shape };
            self.report(&format!("{name} max grad"), inputs, KernelId::MaxPoolGrad, &args);
            let args = AveragePoolArgs { x: xp, y: yp, count_include_pad: 0, shape };
            self.report(&format!("{name} mean"), inputs, KernelId::AveragePool, &args);
            let args = AveragePoolGradArgs { dy: yp, dx: xp, count_include_pad: 0, shape };
            self.report(&format!("{name} mean grad"), inputs, KernelId::AveragePoolGrad, &args);
        }
    }

    fn indices(&mut self) {
        let (rows, width, count) = (8192, 256, 2048);
        let table = vec![0.5_f32; rows * width];
        let (mut picked, mut sums) = (vec![0.0_f32; count * width], vec![0.0_f32; rows * width]);
        let indices: Vec<i64> = (0..count).map(|i| (i * 7919 % rows) as i64).collect();
        let args = GatherArgs {
            table: table.as_ptr().cast(),
            indices: indices.as_ptr(),
            out: picked.as_mut_ptr().cast(),
            rows,
            width,
            element_bytes: 4,
            count,
            error: null_mut(),
        };
        self.report("gather", count * width, KernelId::Gather, &args);
        let args = ScatterArgs {
            values: picked.as_ptr().cast(),
            indices: indices.as_ptr(),
            out: sums.as_mut_ptr().cast(),
            rows,
            width,
            count,
            combine: Combine::Add,
            integers: 0,
            error: null_mut(),
        };
        self.report("scatter", count * width, KernelId::Scatter, &args);
    }
}
