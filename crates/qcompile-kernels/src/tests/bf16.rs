use super::check::{ALONE, Guarded, Random, assert_close, run, scratch, tables};
use super::convolution::{products, shapes, sizes};
use super::matrix::{exact, matmul_args, product, strides};
use super::winograd::{is_transformed, unrounded};
use crate::args::{Conv2dGradWeightBf16Args, ConvShape};
use crate::{KernelId, Kernels};
use std::ptr::null_mut;

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
fn bf16_grad_weight() {
    let mut random = Random(45);
    for shape in shapes() {
        let (nx, _, ny) = sizes(&shape);
        let [_, transformed] = is_transformed(&shape);
        let exact = if transformed { unrounded() } else { tables() };
        check_grad_weight(shape, transformed, &exact, [random.halves(nx), random.halves(ny)]);
        if transformed {
            let whole = [random.whole_halves(nx), random.whole_halves(ny)];
            check_grad_weight(shape, transformed, &tables(), whole);
        }
    }
}

/// The gradient of the weights on some tables, one element of `x` being no number.
fn check_grad_weight(
    shape: ConvShape,
    transformed: bool,
    tables: &[&'static Kernels],
    [mut x, dy]: [Vec<u16>; 2],
) {
    let (_, nw, _) = sizes(&shape);
    // It must reach the positions that read it, and no other through a word that is filled up.
    if let Some(last) = x.last_mut() {
        *last = 0x7fc0;
    }
    let mut expected = vec![0.0_f64; nw];
    let (x_exact, dy_exact) = (exact(&x), exact(&dy));
    products(&shape, |i, j, k| expected[j] += x_exact[i] * dy_exact[k]);
    for &table in tables {
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
        // Not finite exactly where the reference is not, but that transforms mix the positions of its channel; the rest
        // within rounding.
        let values: Vec<f32> = results[0].iter().map(|&v| f32::from_bits(v)).collect();
        let finite = values.iter().zip(&expected).enumerate().filter(|&(at, (v, e))| {
            let channel = at / (shape.kernel_height * shape.kernel_width) % shape.in_channels;
            let mixed = transformed && channel + 1 == shape.in_channels;
            assert!(v.is_finite() == e.is_finite() || mixed && !v.is_finite(), "{what}");
            v.is_finite()
        });
        let (values, finite): (Vec<f32>, Vec<f64>) = finite.map(|(_, (&v, &e))| (v, e)).unzip();
        assert_close(&values, &finite, 1e-5, &what);
    }
}
