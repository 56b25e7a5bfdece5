//! Prints the speed of the kernels of a tier on one thread, and its share of what the core can do in
//! registers: `peak [tier] [milliseconds per kernel] [part of a line's name]`.
#![allow(clippy::print_stdout, reason = "the output of the example")]

use qcompile_kernels::args::*;
use qcompile_kernels::{KernelId, Kernels, Tier, kernels};
use std::ptr::{from_ref, null, null_mut};
use std::time::Duration;

mod registers;

/// The best of many runs, in seconds of this thread's own time.
fn time<A>(table: &Kernels, id: KernelId, args: &A, budget: Duration) -> f64 {
    let primitive = table.get(id);
    let args: *const u64 = from_ref(args).cast();
    let once = || {
        for phase in 0..primitive.phases {
            // SAFETY: every caller below sets up valid pointers for its shapes.
            unsafe { (primitive.run)(args, phase, 0, (primitive.units)(args, phase)) };
        }
    };
    once();
    let (begin, mut best) = (now(), f64::INFINITY);
    while now() - begin < budget.as_secs_f64() {
        let start = now();
        once();
        best = best.min(now() - start);
    }
    best
}

/// Seconds that this thread has run, so that a crowded machine disturbs little.
#[cfg(unix)]
pub(crate) fn now() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call only writes the structure.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Seconds since the first call.
#[cfg(not(unix))]
pub(crate) fn now() -> f64 {
    static FIRST: std::sync::LazyLock<std::time::Instant> =
        std::sync::LazyLock::new(std::time::Instant::now);
    FIRST.elapsed().as_secs_f64()
}

fn scratch<A>(table: &Kernels, id: KernelId, args: &A) -> Vec<[u64; 8]> {
    // SAFETY: the block is the kernel's.
    let bytes = unsafe { (table.get(id).scratch)(from_ref(args).cast()) };
    vec![[0; 8]; bytes.div_ceil(64) + 1]
}

/// Positions in [`Bench::peak`].
const F32: usize = 0;
const BF16: usize = 1;
const INT8: usize = 2;

/// One table of kernels, and how long and how to report each.
struct Bench {
    table: &'static Kernels,
    budget: Duration,
    /// Only lines that contain this.
    filter: String,
    /// f32, bf16 and int8 operations per second of one core in registers.
    peak: [f64; 3],
}

impl Bench {
    /// Operations per second, and the share of the peak.
    fn cell(&self, line: &mut String, operations: f64, seconds: f64, kind: usize) {
        let rate = operations / seconds;
        let share = 100.0 * rate / self.peak[kind];
        line.push_str(&format!(" {:6.1} {share:3.0}%", rate / 1e9));
    }

    /// Times a product.
    fn matmul<E: Copy>(&self, line: &mut String, id: KernelId, kind: usize, args: MatmulArgs<E>) {
        let mut args = args;
        let mut space = scratch(self.table, id, &args);
        args.scratch = space.as_mut_ptr().cast();
        let operations = 2.0 * (args.batch * args.m * args.n * args.k) as f64;
        self.cell(line, operations, time(self.table, id, &args, self.budget), kind);
    }

    fn wants(&self, name: &str) -> bool {
        name.contains(&self.filter)
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let tier = arguments.next().and_then(|t| t.parse().ok()).unwrap_or_else(Tier::detect);
    let budget = arguments.next().and_then(|t| t.parse().ok()).unwrap_or(200);
    let filter = arguments.next().unwrap_or_default();
    let peak = registers::peak(tier);
    let bench = Bench { table: kernels(tier), budget: Duration::from_millis(budget), filter, peak };
    println!(
        "tier {tier}, in registers: f32 {:.1} GF/s, bf16 {:.1} GF/s, int8 {:.1} GF/s",
        peak[F32] / 1e9,
        peak[BF16] / 1e9,
        peak[INT8] / 1e9
    );
    println!(
        "batch x m x n x k           f32 NN       NT           TN           bf16 NN      NT           \
         TN           int8 NT      TN"
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
        matmul(&bench, name, [batch, m, n, k]);
    }
    println!(
        "batch x length x heads x width   f32: forward, backward    bf16 operands             bf16                      int8"
    );
    for (name, sizes, causal) in [
        ("bert", [16, 128, 4, 64], false),
        ("gpt", [8, 256, 6, 64], true),
        ("long", [1, 2048, 6, 64], true),
        ("long", [1, 2048, 6, 64], false),
    ] {
        attention(&bench, name, sizes, causal);
    }
    println!(
        "n h cin cout k stride       f32 fwd      gradX        gradW        bf16 fwd     gradX        \
         gradW        int8 fwd     gradX"
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
        conv(&bench, name, n, size, [cin, cout, groups], kernel, stride);
    }
    rows(&bench);
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

fn matmul(bench: &Bench, name: &str, [batch, m, n, k]: [usize; 4]) {
    let name = format!("{name} {batch} x {m} x {n} x {k}");
    if !bench.wants(&name) {
        return;
    }
    let (table, budget) = (bench.table, bench.budget);
    let flops = 2.0 * (batch * m * n * k) as f64;
    let (a, b) = (vec![0.5_f32; batch * m * k], vec![0.25_f32; batch * k * n]);
    let mut c = vec![0.0_f32; batch * m * n];
    let (a16, b16) = (vec![0x3f00_u16; batch * m * k], vec![0x3e80_u16; batch * k * n]);
    let (a8, b8, one) = (vec![3_i8; batch * m * k], vec![5_i8; batch * k * n], 1.0_f32);
    let mut line = format!("{name:26}");
    let transposed = [(false, false), (false, true), (true, false)];
    for turned in transposed {
        let args = matmul_args(&a, &b, &mut c, [batch, m, n, k], turned);
        bench.matmul(&mut line, KernelId::Matmul, F32, args);
    }
    for turned in transposed {
        let args = matmul_args(&a16, &b16, &mut c, [batch, m, n, k], turned);
        bench.matmul(&mut line, KernelId::MatmulBf16, BF16, args);
    }
    for (ta, tb) in [(false, true), (true, false)] {
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
        bench.cell(&mut line, flops, time(table, KernelId::MatmulI8, &args, budget), INT8);
    }
    println!("{line}");
}

/// Queries, keys and values are parts of one value, as in a model.
fn attention(bench: &Bench, name: &str, [batch, rows, heads, width]: [usize; 4], causal: bool) {
    let kind = if causal { " causal" } else { "" };
    let name = format!("attention {name} {batch} {rows} {heads} {width}{kind}");
    if !bench.wants(&name) {
        return;
    }
    let (table, budget) = (bench.table, bench.budget);
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
    let [y, dq, dk, dv] = [0, 1, 2, 3].map(|at| results[at * batch * rows * size..].as_mut_ptr());
    let strides = [rows * 3 * size, 3 * size, width, 1];
    let code_scale = 1.0_f32 / 254.0;
    let mut line = format!("{name:32}");
    for kind in
        [AttentionKind::F32, AttentionKind::Bf16Operands, AttentionKind::Bf16, AttentionKind::Int8]
    {
        let (q, dy, bytes) = match kind {
            AttentionKind::F32 => (qkv.as_ptr().cast::<u8>(), dy.as_ptr().cast::<u8>(), 4),
            AttentionKind::Int8 => (codes.as_ptr().cast(), null(), 1),
            _ => (qkv_bf16.as_ptr().cast(), dy_bf16.as_ptr().cast(), 2),
        };
        let args = AttentionArgs {
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
        let ids = [(KernelId::Attention, 2), (KernelId::AttentionGrad, 5)];
        let forward = kind == AttentionKind::Int8;
        for (id, products) in ids.into_iter().take(if forward { 1 } else { 2 }) {
            let flops = (2 * products * pairs * width) as f64;
            bench.cell(&mut line, flops, time(table, id, &args, budget), 0);
        }
    }
    println!("{line}");
}

fn conv(
    bench: &Bench,
    name: &str,
    batch: usize,
    size: usize,
    [in_channels, out_channels, groups]: [usize; 3],
    kernel: usize,
    stride: usize,
) {
    let name = format!("{name} {batch} {size} {in_channels} {out_channels} {kernel} {stride}");
    let name = if groups > 1 { name + " dw" } else { name };
    if !bench.wants(&name) {
        return;
    }
    let (table, budget) = (bench.table, bench.budget);
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
    let mut x = vec![0.5_f32; inputs];
    let mut w = vec![0.5_f32; weights];
    let mut y = vec![0.5_f32; pixels * out_channels];
    let (x8, y8) = (vec![3_i8; inputs], vec![3_i8; pixels * out_channels]);
    let (x16, w16) = (vec![0x3f00_u16; inputs], vec![0x3f00_u16; weights]);
    let y16 = vec![0x3f00_u16; pixels * out_channels];
    let (w8, one) = (vec![5_i8; weights], 1.0_f32);
    let mut line = format!("{name:26}");
    let (epilogue, epilogue_ctx) = (None, null());

    let (xp, wp, yp) = (x.as_mut_ptr(), w.as_mut_ptr(), y.as_mut_ptr());
    let scratch_pointer = null_mut();
    macro_rules! bench {
        ($id:ident, $kind:expr, $args:expr) => {
            let mut args = $args;
            let mut space = scratch(table, KernelId::$id, &args);
            args.scratch = space.as_mut_ptr().cast();
            bench.cell(&mut line, flops, time(table, KernelId::$id, &args, budget), $kind);
        };
    }
    macro_rules! all {
        ($kind:expr, $x:expr, $w:expr, $dy:expr, $forward:ident, $grad_input:ident, $grad_weight:ident) => {
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
            bench!($forward, $kind, args);
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
            bench!($grad_input, $kind, args);
            bench!($grad_weight, $kind, Conv2dGradWeightArgs { x, dy, dw: wp, shape, scratch });
        };
    }
    all!(
        F32,
        xp.cast_const(),
        wp.cast_const(),
        yp.cast_const(),
        Conv2d,
        Conv2dGradInput,
        Conv2dGradWeight
    );
    let (x, w, dy) = (x16.as_ptr(), w16.as_ptr(), y16.as_ptr());
    all!(BF16, x, w, dy, Conv2dBf16, Conv2dGradInputBf16, Conv2dGradWeightBf16);
    bench!(
        Conv2dI8,
        INT8,
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
    bench!(
        Conv2dGradInputI8,
        INT8,
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
    println!("{line}");
}

/// Kernels of rows and windows, whose figures are elements per second.
fn rows(bench: &Bench) {
    let report = |name: &str, elements: usize, id: KernelId, args: &dyn Timed| {
        if bench.wants(name) {
            let seconds = args.seconds(bench.table, id, bench.budget);
            println!("{name:26} {:6.2} G elements/s", elements as f64 / seconds / 1e9);
        }
    };
    for (rows, cols) in [(2048, 128), (12288, 256), (512, 10), (2048, 65)] {
        let count = rows * cols;
        let x: Vec<f32> = (0..count).map(|i| (i % 97) as f32 / 10.0).collect();
        let (mut y, mut losses) = (vec![0.0_f32; count], vec![0.0_f32; rows]);
        let (labels, dy) = (vec![3_i64; rows], 1.0_f32);
        let args = SoftmaxArgs { x: x.as_ptr(), y: y.as_mut_ptr(), rows, cols };
        report(&format!("Softmax {rows} x {cols}"), count, KernelId::Softmax, &args);
        report(&format!("LogSoftmax {rows} x {cols}"), count, KernelId::LogSoftmax, &args);
        let args = CrossEntropyArgs {
            logits: x.as_ptr(),
            labels: labels.as_ptr(),
            losses: losses.as_mut_ptr(),
            rows,
            cols,
            ignore_index: -100,
            error: null_mut(),
        };
        report(&format!("Loss {rows} x {cols}"), count, KernelId::CrossEntropy, &args);
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
        report(&format!("LossGrad {rows} x {cols}"), count, KernelId::CrossEntropyGrad, &args);
    }
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
        report(&format!("{name} max"), inputs, KernelId::MaxPool, &args);
        let args = MaxPoolGradArgs { x: input.as_ptr(), dy: yp, dx: xp, shape };
        report(&format!("{name} max grad"), inputs, KernelId::MaxPoolGrad, &args);
        let args = AveragePoolArgs { x: xp, y: yp, count_include_pad: 0, shape };
        report(&format!("{name} mean"), inputs, KernelId::AveragePool, &args);
        let args = AveragePoolGradArgs { dy: yp, dx: xp, count_include_pad: 0, shape };
        report(&format!("{name} mean grad"), inputs, KernelId::AveragePoolGrad, &args);
    }
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
    report("gather", count * width, KernelId::Gather, &args);
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
    report("scatter", count * width, KernelId::Scatter, &args);
}

/// An argument block that can be timed.
trait Timed {
    fn seconds(&self, table: &Kernels, id: KernelId, budget: Duration) -> f64;
}

impl<A> Timed for A {
    fn seconds(&self, table: &Kernels, id: KernelId, budget: Duration) -> f64 {
        time(table, id, self, budget)
    }
}
