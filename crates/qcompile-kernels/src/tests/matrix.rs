use super::check::{ALONE, Collector, Guarded, Random, assert_close, run, scratch, tables};
use crate::KernelId;
use crate::args::{MatmulArgs, MatmulI8Args};
use crate::lanes::Element;
use std::ptr::{from_mut, null, null_mut};

/// `[batch, rows, columns]` strides of a dense or transposed operand.
pub(super) fn strides(
    rows: usize,
    columns: usize,
    transposed: bool,
    broadcast: bool,
) -> [usize; 3] {
    let batch = if broadcast { 0 } else { rows * columns };
    if transposed { [batch, 1, rows] } else { [batch, columns, 1] }
}

struct Case {
    shape: [usize; 4],
    transposed: (bool, bool),
    broadcast: (bool, bool),
}

fn cases() -> Vec<Case> {
    let mut random = Random(7);
    let mut shapes = vec![
        [1, 1, 1, 1],
        [1, 6, 16, 8],
        [1, 7, 17, 0],
        [1, 13, 33, 257],
        [1, 97, 129, 67],
        [3, 29, 5, 31],
        [2, 25, 40, 12],
        [1, 1, 300, 530],
        [1, 250, 1, 19],
        // Around the most rows of one block, with and without panels that units share.
        [1, 264, 33, 20],
        [1, 265, 33, 20],
        [1, 300, 70, 300],
        [2, 290, 300, 9],
        [1, 100, 600, 21],
        [70, 3, 5, 4],
        // Nothing to do.
        [0, 3, 4, 5],
        [2, 0, 4, 5],
        [2, 3, 0, 5],
        [0, 0, 0, 0],
    ];
    for _ in 0..6 {
        let mut size = |high| random.between(1, high);
        shapes.push([size(3), size(60), size(70), size(90)]);
    }
    let mut cases = Vec::new();
    for (i, shape) in shapes.into_iter().enumerate() {
        for (a, b) in [(false, false), (false, true), (true, false), (true, true)] {
            let broadcast = (i % 5 == 3, i % 2 == 1);
            cases.push(Case { shape, transposed: (a, b), broadcast });
        }
    }
    cases
}

/// The values in f64.
pub(super) fn exact<E: Element>(values: &[E]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v.real())).collect()
}

/// A block of arguments without a destination.
pub(super) fn matmul_args<E>(
    a: &[E],
    b: &[E],
    [batch, m, n, k]: [usize; 4],
    sa: [usize; 3],
    sb: [usize; 3],
    c_row_stride: usize,
) -> MatmulArgs<E> {
    MatmulArgs {
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
pub(super) fn product<E: Element>(a: &[E], b: &[E], args: &MatmulArgs<E>) -> Vec<f64> {
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

/// All forms of a product whose operands are of one float type.
fn check_product<E: Element>(id: KernelId, numbers: impl Fn(&mut Random, usize) -> Vec<E>) {
    let mut random = Random(1);
    for case in cases() {
        let [batch, m, n, k] = case.shape;
        let (a, b) = (numbers(&mut random, batch * m * k), numbers(&mut random, batch * k * n));
        let sa = strides(m, k, case.transposed.0, case.broadcast.0);
        let sb = strides(k, n, case.transposed.1, case.broadcast.1);
        // One column of the result is beyond the matrix and must stay as it is.
        let mut args = matmul_args(&a, &b, case.shape, sa, sb, n + 1);
        let expected = product(&a, &b, &args);
        for table in tables() {
            let what = format!("{:?} {:?} on {}", case.shape, case.transposed, table.tier);
            let mut space = scratch(table, id, &args);
            args.scratch = space.as_mut_ptr().cast();
            args.epilogue = None;
            let results = [1, 5, ALONE].map(|pieces| {
                let mut c = Guarded::new(batch * m * (n + 1));
                args.c = c.as_mut_ptr();
                run(table, id, &args, pieces);
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
            run(table, id, &args, 3);
            collector.checked(table, id, &args, &what);
            assert_eq!(collector.values, results[0], "{what}: epilogue");
        }
    }
}

#[test]
fn f32_product() {
    check_product(KernelId::Matmul, Random::reals);
}

#[test]
fn bf16_product() {
    check_product(KernelId::MatmulBf16, Random::halves);
}

#[test]
fn int8_product_is_exact_on_every_tier() {
    let mut random = Random(2);
    for (i, case) in cases().into_iter().enumerate() {
        let [batch, m, n, k] = case.shape;
        let a = random.bytes(batch * m * k);
        let b = random.bytes(batch * k * n);
        let (a_scale, b_scale) = (random.reals(m), random.reals(n));
        let (a_scale_stride, b_scale_stride) = (i % 2, i / 2 % 2);
        let codes = random.codes();
        let sa = strides(m, k, case.transposed.0, case.broadcast.0);
        let sb = strides(k, n, case.transposed.1, case.broadcast.1);
        let mut expected = Vec::new();
        for x in 0..batch {
            for i in 0..m {
                for j in 0..n {
                    let term = |l| {
                        let a = a[x * sa[0] + i * sa[1] + l * sa[2]];
                        codes.value(a) * i32::from(b[x * sb[0] + l * sb[1] + j * sb[2]])
                    };
                    let scale = a_scale[i * a_scale_stride] * b_scale[j * b_scale_stride];
                    expected.push((0..k).map(term).sum::<i32>() as f32 * scale);
                }
            }
        }
        for table in tables() {
            let what =
                format!("{:?} {:?} {codes:?} on {}", case.shape, case.transposed, table.tier);
            let mut c = Guarded::new(batch * m * n);
            let mut args = MatmulI8Args {
                a: a.as_ptr(),
                b: b.as_ptr(),
                c: c.as_mut_ptr(),
                a_scale: a_scale.as_ptr(),
                a_scale_stride,
                a_zero: codes.zero(),
                a_unsigned: usize::from(codes.unsigned),
                b_scale: b_scale.as_ptr(),
                b_scale_stride,
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
            run(table, KernelId::MatmulI8, &args, [1, 4, ALONE][i % 3]);
            assert_eq!(c.checked(&what), expected, "{what}");
            let mut collector = Collector::new(batch * m, n);
            args.epilogue = Some(Collector::collect);
            args.c = null_mut();
            args.epilogue_ctx = from_mut(&mut collector).cast();
            run(table, KernelId::MatmulI8, &args, 2);
            collector.checked(table, KernelId::MatmulI8, &args, &what);
            assert_eq!(collector.values, expected, "{what}: epilogue");
        }
    }
}

/// Operands of which only every second value counts, in both directions.
#[test]
fn strides_without_a_dense_direction() {
    let mut random = Random(8);
    let (m, n, k) = (37, 41, 53);
    let (a, b) = (random.reals(4 * m * k), random.reals(4 * k * n));
    let mut expected = Vec::new();
    for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
        let term = |l| f64::from(a[i * 4 * k + l * 2]) * f64::from(b[l * 4 * n + j * 2]);
        expected.push((0..k).map(term).sum::<f64>());
    }
    for table in tables() {
        let mut c = Guarded::new(m * n);
        let mut args = MatmulArgs {
            a: a.as_ptr(),
            b: b.as_ptr(),
            c: c.as_mut_ptr(),
            batch: 1,
            m,
            n,
            k,
            a_batch_stride: 0,
            a_row_stride: 4 * k,
            a_col_stride: 2,
            b_batch_stride: 0,
            b_row_stride: 4 * n,
            b_col_stride: 2,
            c_batch_stride: 0,
            c_row_stride: n,
            epilogue: None,
            epilogue_ctx: null(),
            streams: null(),
            stream_count: 0,
            scratch: null_mut(),
        };
        let mut space = scratch(table, KernelId::Matmul, &args);
        args.scratch = space.as_mut_ptr().cast();
        run(table, KernelId::Matmul, &args, 3);
        assert_close(&c.checked("strides"), &expected, 1e-5, "strides");
    }
}

/// A value that is no number reaches its row and column, and nothing else.
#[test]
fn nan_stays_in_its_row_and_column() {
    let mut random = Random(9);
    let (m, n, k) = (30, 35, 40);
    let (mut a, mut b) = (random.reals(m * k), random.reals(k * n));
    (a[7 * k + 3], b[11 * n + 20]) = (f32::NAN, f32::INFINITY);
    for table in tables() {
        let mut c = Guarded::new(m * n);
        let mut args = MatmulArgs {
            a: a.as_ptr(),
            b: b.as_ptr(),
            c: c.as_mut_ptr(),
            batch: 1,
            m,
            n,
            k,
            a_batch_stride: 0,
            a_row_stride: k,
            a_col_stride: 1,
            b_batch_stride: 0,
            b_row_stride: n,
            b_col_stride: 1,
            c_batch_stride: 0,
            c_row_stride: n,
            epilogue: None,
            epilogue_ctx: null(),
            streams: null(),
            stream_count: 0,
            scratch: null_mut(),
        };
        let mut space = scratch(table, KernelId::Matmul, &args);
        args.scratch = space.as_mut_ptr().cast();
        run(table, KernelId::Matmul, &args, 1);
        for (at, &value) in c.checked("NaN").iter().enumerate() {
            let (row, column) = (at / n, at % n);
            assert_eq!(value.is_nan(), row == 7, "{row}, {column}");
            assert_eq!(value.is_infinite(), row != 7 && column == 20, "{row}, {column}");
        }
    }
}
