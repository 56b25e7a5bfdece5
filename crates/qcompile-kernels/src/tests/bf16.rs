use super::check::{ALONE, Collector, Guarded, Random, assert_close, run, scratch, tables};
use super::convolution::{check_kernel, products, shapes, sizes};
use super::matrix::{cases, strides};
use crate::KernelId;
use crate::args::{
    Conv2dBf16Args, Conv2dGradInputBf16Args, Conv2dGradWeightBf16Args, MatmulBf16Args,
};
use crate::lanes::Element;
use std::ptr::{from_mut, null, null_mut};

/// The values of bf16 bits. Products of two are exact in f32, so only the additions round.
fn exact(values: &[u16]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v.real())).collect()
}

/// A block of arguments without a destination.
fn matmul_args(
    a: &[u16],
    b: &[u16],
    [batch, m, n, k]: [usize; 4],
    sa: [usize; 3],
    sb: [usize; 3],
    c_row_stride: usize,
) -> MatmulBf16Args {
    MatmulBf16Args {
        a: a.as_ptr(),
        b: b.as_ptr(),
        c: null_mut(),
        batch,
        m,
        n,
        k,
        a_batch_stride: sa[0],
        a_row_stride: sa[1],
        a_col_stride: sa[2],
        b_batch_stride: sb[0],
        b_row_stride: sb[1],
        b_col_stride: sb[2],
        c_batch_stride: m * c_row_stride,
        c_row_stride,
        epilogue: None,
        epilogue_ctx: null(),
        streams: null(),
        stream_count: 0,
        scratch: null_mut(),
    }
}

/// The product in f64.
fn product(a: &[u16], b: &[u16], args: &MatmulBf16Args) -> Vec<f64> {
    let (a, b) = (exact(a), exact(b));
    let mut expected = Vec::new();
    for x in 0..args.batch {
        for (i, j) in (0..args.m).flat_map(|i| (0..args.n).map(move |j| (i, j))) {
            let (a_first, b_first) = (
                x * args.a_batch_stride + i * args.a_row_stride,
                x * args.b_batch_stride + j * args.b_col_stride,
            );
            let term = |l| a[a_first + l * args.a_col_stride] * b[b_first + l * args.b_row_stride];
            expected.push((0..args.k).map(term).sum::<f64>());
        }
    }
    expected
}

#[test]
fn bf16_product() {
    let mut random = Random(41);
    for case in cases() {
        let [batch, m, n, k] = case.shape;
        let (a, b) = (random.halves(batch * m * k), random.halves(batch * k * n));
        let sa = strides(m, k, case.transposed.0, case.broadcast.0);
        let sb = strides(k, n, case.transposed.1, case.broadcast.1);
        // One column of the result is beyond the matrix and must stay as it is.
        let mut args = matmul_args(&a, &b, case.shape, sa, sb, n + 1);
        let expected = product(&a, &b, &args);
        for table in tables() {
            let what = format!("{:?} {:?} on {}", case.shape, case.transposed, table.tier);
            let mut space = scratch(table, KernelId::MatmulBf16, &args);
            args.scratch = space.as_mut_ptr().cast();
            args.epilogue = None;
            let results = [1, 5, ALONE].map(|pieces| {
                let mut c = Guarded::new(batch * m * (n + 1));
                args.c = c.as_mut_ptr();
                run(table, KernelId::MatmulBf16, &args, pieces);
                let rows = c.checked(&what);
                let untouched = rows.chunks(n + 1).all(|row| row[n] == Guarded::CANARY);
                assert!(untouched, "{what}: wrote beyond a row");
                rows.chunks(n + 1).flat_map(|row| row[..n].to_vec()).collect::<Vec<f32>>()
            });
            assert_close(&results[0], &expected, 1e-5, &what);
            assert_eq!(results[0], results[1], "{what}: split");
            assert_eq!(results[0], results[2], "{what}: split");
            let mut collector = Collector::new(batch * m, n);
            args.epilogue = Some(Collector::collect);
            args.epilogue_ctx = from_mut(&mut collector).cast();
            args.c = null_mut();
            run(table, KernelId::MatmulBf16, &args, 3);
            assert!(collector.seen.iter().all(|&seen| seen == 1), "{what}: epilogue coverage");
            assert_eq!(collector.values, results[0], "{what}: epilogue");
        }
    }
}

/// Rows that are longer than the matrix by one, so that every second begins in the middle of a word, and
/// operands of which only every third value counts.
#[test]
fn strides_that_are_no_words() {
    let mut random = Random(42);
    let (m, n, k) = (37, 41, 54);
    let (a, b) = (random.halves(4 * m * k), random.halves(4 * k * n));
    for (sa, sb) in [
        ([0, k + 1, 1], [0, n + 1, 1]),
        ([0, 1, m + 1], [0, 1, k + 1]),
        ([0, 3 * k + 1, 3], [0, 3 * n + 1, 3]),
    ] {
        let mut args = matmul_args(&a, &b, [1, m, n, k], sa, sb, n);
        let expected = product(&a, &b, &args);
        for table in tables() {
            let mut c = Guarded::new(m * n);
            args.c = c.as_mut_ptr();
            let mut space = scratch(table, KernelId::MatmulBf16, &args);
            args.scratch = space.as_mut_ptr().cast();
            run(table, KernelId::MatmulBf16, &args, 3);
            let what = format!("{sa:?} {sb:?} on {}", table.tier);
            assert_close(&c.checked(&what), &expected, 1e-5, &what);
        }
    }
}

/// A value that is no number reaches its row and column, and nothing else; K is odd, so that words are
/// filled up.
#[test]
fn nan_stays_in_its_row_and_column() {
    let mut random = Random(43);
    let (m, n, k) = (30, 35, 41);
    for (ta, tb) in [(false, false), (true, true)] {
        let (sa, sb) = (strides(m, k, ta, true), strides(k, n, tb, true));
        let (mut a, mut b) = (random.halves(m * k), random.halves(k * n));
        a[7 * sa[1] + 40 * sa[2]] = 0x7fc0;
        b[40 * sb[1] + 20 * sb[2]] = 0x7f80;
        let mut args = matmul_args(&a, &b, [1, m, n, k], sa, sb, n);
        for table in tables() {
            let mut c = Guarded::new(m * n);
            args.c = c.as_mut_ptr();
            let mut space = scratch(table, KernelId::MatmulBf16, &args);
            args.scratch = space.as_mut_ptr().cast();
            run(table, KernelId::MatmulBf16, &args, 1);
            for (at, &value) in c.checked("NaN").iter().enumerate() {
                let (row, column) = (at / n, at % n);
                assert_eq!(value.is_nan(), row == 7, "{row}, {column}");
                assert_eq!(value.is_infinite(), row != 7 && column == 20, "{row}, {column}");
            }
        }
    }
}

#[test]
fn bf16_forward_and_grad_input() {
    let mut random = Random(44);
    for shape in shapes() {
        let (nx, nw, ny) = sizes(&shape);
        let (x, w, dy) = (random.halves(nx), random.halves(nw), random.halves(ny));
        let (mut y, mut dx) = (vec![0.0_f64; ny], vec![0.0_f64; nx]);
        let (x_exact, w_exact, dy_exact) = (exact(&x), exact(&w), exact(&dy));
        products(&shape, |i, j, k| {
            y[k] += x_exact[i] * w_exact[j];
            dx[i] += dy_exact[k] * w_exact[j];
        });
        check_kernel!(
            KernelId::Conv2dBf16,
            ny,
            shape.out_channels,
            |result: &[f32], what: &str| assert_close(result, &y, 1e-5, what),
            shape,
            |y: *mut f32, collector: *mut Collector, scratch: *mut u8| Conv2dBf16Args {
                x: x.as_ptr(),
                w: w.as_ptr(),
                y,
                shape,
                epilogue: (!collector.is_null()).then_some(Collector::collect),
                epilogue_ctx: collector.cast(),
                streams: null(),
                stream_count: 0,
                scratch,
            }
        );
        check_kernel!(
            KernelId::Conv2dGradInputBf16,
            nx,
            shape.in_channels,
            |result: &[f32], what: &str| assert_close(result, &dx, 1e-5, what),
            shape,
            |dx: *mut f32, collector: *mut Collector, scratch: *mut u8| Conv2dGradInputBf16Args {
                dy: dy.as_ptr(),
                w: w.as_ptr(),
                dx,
                shape,
                epilogue: (!collector.is_null()).then_some(Collector::collect),
                epilogue_ctx: collector.cast(),
                streams: null(),
                stream_count: 0,
                scratch,
            }
        );
    }
}

#[test]
fn bf16_grad_weight() {
    let mut random = Random(45);
    for shape in shapes() {
        let (nx, nw, ny) = sizes(&shape);
        let (mut x, dy) = (random.halves(nx), random.halves(ny));
        // It must reach the positions that read it, and no other through a word that is filled up.
        if let Some(last) = x.last_mut() {
            *last = 0x7fc0;
        }
        let mut expected = vec![0.0_f64; nw];
        let (x_exact, dy_exact) = (exact(&x), exact(&dy));
        products(&shape, |i, j, k| expected[j] += x_exact[i] * dy_exact[k]);
        for table in tables() {
            let what = format!("{shape:?} on {}", table.tier);
            let (x, dy) = (x.as_ptr(), dy.as_ptr());
            let mut args =
                Conv2dGradWeightBf16Args { x, dy, dw: null_mut(), shape, scratch: null_mut() };
            let mut space = scratch(table, KernelId::Conv2dGradWeightBf16, &args);
            args.scratch = space.as_mut_ptr().cast();
            let results = [1, 7, ALONE].map(|pieces| {
                let mut dw = Guarded::new(nw);
                args.dw = dw.as_mut_ptr();
                run(table, KernelId::Conv2dGradWeightBf16, &args, pieces);
                dw.checked(&what).iter().map(|v| v.to_bits()).collect::<Vec<u32>>()
            });
            assert_eq!(results[0], results[1], "{what}: split");
            assert_eq!(results[0], results[2], "{what}: split");
            // Not finite exactly where the reference is not; the rest within rounding.
            let values: Vec<f32> = results[0].iter().map(|&v| f32::from_bits(v)).collect();
            let finite = values.iter().zip(&expected).filter(|(v, e)| {
                assert_eq!(v.is_finite(), e.is_finite(), "{what}");
                e.is_finite()
            });
            let (values, finite): (Vec<f32>, Vec<f64>) = finite.unzip();
            assert_close(&values, &finite, 1e-5, &what);
        }
    }
}
