//! Prints the speed of the kernels of a tier on one thread: `peak [tier] [milliseconds per kernel]`.
#![allow(clippy::print_stdout, reason = "the output of the example")]

use qcompile_kernels::args::*;
use qcompile_kernels::{KernelId, Kernels, Tier, kernels};
use std::ptr::{from_ref, null, null_mut};
use std::time::{Duration, Instant};

/// The best of many runs, in seconds.
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
    let (begin, mut best) = (Instant::now(), f64::INFINITY);
    while begin.elapsed() < budget {
        let start = Instant::now();
        once();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

fn scratch<A>(table: &Kernels, id: KernelId, args: &A) -> Vec<[u64; 8]> {
    // SAFETY: the block is the kernel's.
    let bytes = unsafe { (table.get(id).scratch)(from_ref(args).cast()) };
    vec![[0; 8]; bytes.div_ceil(64) + 1]
}

/// f32 FMA flops per second of a loop in registers.
#[cfg(target_arch = "x86_64")]
fn register_peak() -> f64 {
    use std::arch::x86_64::*;
    #[target_feature(enable = "avx2,fma")]
    fn spin(count: usize) -> f32 {
        let mut sums = [_mm256_set1_ps(0.5); 12];
        let factor = _mm256_set1_ps(std::hint::black_box(0.999));
        for _ in 0..count {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, factor, factor);
            }
        }
        sums.iter().map(|&sum| _mm256_cvtss_f32(sum)).sum()
    }
    let count = 1_000_000;
    let mut best = f64::INFINITY;
    for _ in 0..30 {
        let start = Instant::now();
        // SAFETY: `main` calls this on CPUs with AVX2 only.
        std::hint::black_box(unsafe { spin(count) });
        best = best.min(start.elapsed().as_secs_f64());
    }
    count as f64 * 12.0 * 16.0 / best
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let tier = arguments.next().and_then(|t| t.parse().ok()).unwrap_or_else(Tier::detect);
    let budget = arguments.next().and_then(|t| t.parse().ok()).unwrap_or(200);
    let budget = Duration::from_millis(budget);
    let table = kernels(tier);
    println!("tier {tier}");
    #[cfg(target_arch = "x86_64")]
    if Tier::Avx2.is_supported() {
        println!("AVX2 FMA in registers      {:7.1} GF/s", register_peak() / 1e9);
    }
    println!("m x n x k                  f32 NN     NT     TN    int8 NT  TN");
    for (m, n, k) in [
        (128, 128, 128),
        (256, 256, 256),
        (512, 512, 512),
        (1024, 1024, 1024),
        (128, 1024, 784),
        (128, 10, 1024),
        (1024, 784, 128),
        (8192, 64, 576),
        (2048, 256, 1024),
        (16, 1024, 1024),
    ] {
        matmul(table, budget, m, n, k);
    }
    println!("n h w cin cout k stride        f32 fwd  gradX  gradW  int8 fwd  gradX");
    for [n, size, cin, cout, kernel, stride, groups] in [
        [16, 32, 16, 16, 3, 1, 1],
        [16, 16, 32, 32, 3, 1, 1],
        [16, 8, 64, 64, 3, 1, 1],
        [2, 56, 64, 64, 3, 1, 1],
        [4, 14, 256, 256, 3, 1, 1],
        [4, 7, 512, 512, 3, 1, 1],
        [16, 32, 16, 32, 3, 2, 1],
        [2, 56, 64, 128, 3, 2, 1],
        [2, 56, 64, 128, 1, 2, 1],
        [2, 28, 128, 256, 1, 1, 1],
        [16, 32, 3, 16, 3, 1, 1],
        [2, 224, 3, 64, 7, 2, 1],
        [32, 28, 1, 16, 5, 1, 1],
        [4, 56, 64, 64, 3, 1, 64],
        [4, 14, 256, 256, 3, 2, 256],
    ] {
        conv(table, budget, n, size, [cin, cout, groups], kernel, stride);
    }
    rows(table, budget);
}

fn matmul(table: &Kernels, budget: Duration, m: usize, n: usize, k: usize) {
    let flops = 2.0 * (m * n * k) as f64;
    let (a, b, mut c) = (vec![0.5_f32; m * k], vec![0.25_f32; k * n], vec![0.0_f32; m * n]);
    let (a8, b8, one) = (vec![3_i8; m * k], vec![5_i8; k * n], 1.0_f32);
    let mut line = format!("{:26}", format!("{m} x {n} x {k}"));
    for (ta, tb) in [(false, false), (false, true), (true, false)] {
        let mut args = MatmulArgs {
            a: a.as_ptr(),
            b: b.as_ptr(),
            c: c.as_mut_ptr(),
            batch: 1,
            m,
            n,
            k,
            a_batch_stride: 0,
            a_row_stride: if ta { 1 } else { k },
            a_col_stride: if ta { m } else { 1 },
            b_batch_stride: 0,
            b_row_stride: if tb { 1 } else { n },
            b_col_stride: if tb { k } else { 1 },
            c_batch_stride: 0,
            c_row_stride: n,
            epilogue: None,
            epilogue_ctx: null(),
            scratch: null_mut(),
        };
        let mut space = scratch(table, KernelId::Matmul, &args);
        args.scratch = space.as_mut_ptr().cast();
        let seconds = time(table, KernelId::Matmul, &args, budget);
        line += &format!(" {:6.1}", flops / seconds / 1e9);
    }
    for (ta, tb) in [(false, true), (true, false)] {
        let mut args = MatmulI8Args {
            a: a8.as_ptr(),
            b: b8.as_ptr(),
            c: c.as_mut_ptr(),
            a_scale: &raw const one,
            a_scale_stride: 0,
            b_scale: &raw const one,
            b_scale_stride: 0,
            batch: 1,
            m,
            n,
            k,
            a_batch_stride: 0,
            a_row_stride: if ta { 1 } else { k },
            a_col_stride: if ta { m } else { 1 },
            b_batch_stride: 0,
            b_row_stride: if tb { 1 } else { n },
            b_col_stride: if tb { k } else { 1 },
            c_batch_stride: 0,
            c_row_stride: n,
            epilogue: None,
            epilogue_ctx: null(),
            scratch: null_mut(),
        };
        let mut space = scratch(table, KernelId::MatmulI8, &args);
        args.scratch = space.as_mut_ptr().cast();
        let seconds = time(table, KernelId::MatmulI8, &args, budget);
        line += &format!(" {:6.1}", flops / seconds / 1e9);
    }
    println!("{line}");
}

fn conv(
    table: &Kernels,
    budget: Duration,
    batch: usize,
    size: usize,
    [in_channels, out_channels, groups]: [usize; 3],
    kernel: usize,
    stride: usize,
) {
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
    let (w8, one) = (vec![5_i8; weights], 1.0_f32);
    let name = format!("{batch} {size} {size} {in_channels} {out_channels} {kernel} {stride}");
    let mut line = format!("{:31}", if groups > 1 { name + " depthwise" } else { name });
    let (epilogue, epilogue_ctx) = (None, null());
    let mut measure = |seconds: f64| line += &format!(" {:6.1}", flops / seconds / 1e9);

    let (xp, wp, yp) = (x.as_mut_ptr(), w.as_mut_ptr(), y.as_mut_ptr());
    macro_rules! bench {
        ($id:ident, $args:expr) => {
            let mut args = $args;
            let mut space = scratch(table, KernelId::$id, &args);
            args.scratch = space.as_mut_ptr().cast();
            measure(time(table, KernelId::$id, &args, budget));
        };
    }
    let scratch_pointer = null_mut();
    bench!(
        Conv2d,
        Conv2dArgs { x: xp, w: wp, y: yp, shape, epilogue, epilogue_ctx, scratch: scratch_pointer }
    );
    bench!(
        Conv2dGradInput,
        Conv2dGradInputArgs {
            dy: yp,
            w: wp,
            dx: xp,
            shape,
            epilogue,
            epilogue_ctx,
            scratch: scratch_pointer
        }
    );
    bench!(
        Conv2dGradWeight,
        Conv2dGradWeightArgs { x: xp, dy: yp, dw: wp, shape, scratch: scratch_pointer }
    );
    bench!(
        Conv2dI8,
        Conv2dI8Args {
            x: x8.as_ptr(),
            w: w8.as_ptr(),
            y: yp,
            x_scale: &raw const one,
            x_scale_stride: 0,
            w_scale: &raw const one,
            w_scale_stride: 0,
            shape,
            epilogue,
            epilogue_ctx,
            scratch: scratch_pointer
        }
    );
    bench!(
        Conv2dGradInputI8,
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
            scratch: scratch_pointer
        }
    );
    println!("{line}");
}

fn rows(table: &Kernels, budget: Duration) {
    let (rows, cols) = (256, 512);
    let x: Vec<f32> = (0..rows * cols).map(|i| (i % 97) as f32 / 10.0).collect();
    let mut y = vec![0.0_f32; rows * cols];
    let args = SoftmaxArgs { x: x.as_ptr(), y: y.as_mut_ptr(), rows, cols };
    for id in [KernelId::Softmax, KernelId::LogSoftmax] {
        let seconds = time(table, id, &args, budget);
        println!("{id:?} 256 x 512: {:.2} G elements/s", (rows * cols) as f64 / seconds / 1e9);
    }
    let shape = PoolShape {
        batch: 4,
        height: 56,
        width: 56,
        channels: 64,
        out_height: 28,
        out_width: 28,
        kernel_height: 3,
        kernel_width: 3,
        stride_height: 2,
        stride_width: 2,
        pad_top: 1,
        pad_left: 1,
        pad_bottom: 1,
        pad_right: 1,
        dilation_height: 1,
        dilation_width: 1,
    };
    let inputs = shape.batch * shape.height * shape.width * shape.channels;
    let mut x: Vec<f32> = (0..inputs).map(|i| (i % 101) as f32).collect();
    let mut y = vec![0.0_f32; inputs / 4];
    let (xp, yp) = (x.as_mut_ptr(), y.as_mut_ptr());
    let input = x.clone();
    let max = MaxPoolArgs { x: xp, y: yp, shape };
    let max_grad = MaxPoolGradArgs { x: input.as_ptr(), dy: yp, dx: xp, shape };
    let average = AveragePoolArgs { x: xp, y: yp, count_include_pad: 0, shape };
    let average_grad = AveragePoolGradArgs { dy: yp, dx: xp, count_include_pad: 0, shape };
    for (name, seconds) in [
        ("MaxPool", time(table, KernelId::MaxPool, &max, budget)),
        ("MaxPoolGrad", time(table, KernelId::MaxPoolGrad, &max_grad, budget)),
        ("AveragePool", time(table, KernelId::AveragePool, &average, budget)),
        ("AveragePoolGrad", time(table, KernelId::AveragePoolGrad, &average_grad, budget)),
    ] {
        println!("{name} 3 x 3 / 2: {:.2} G inputs/s", inputs as f64 / seconds / 1e9);
    }
}
