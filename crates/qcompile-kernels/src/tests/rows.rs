use super::check::{Random, assert_close, run, tables};
use crate::KernelId;
use crate::args::{
    CrossEntropyArgs, CrossEntropyGradArgs, GatherArgs, ScatterAddArgs, SoftmaxArgs,
};

fn softmax(row: &[f32]) -> (Vec<f64>, f64) {
    let max = row.iter().fold(f64::NEG_INFINITY, |m, &v| m.max(f64::from(v)));
    let sum: f64 = row.iter().map(|&v| (f64::from(v) - max).exp()).sum();
    let shift = max + sum.ln();
    (row.iter().map(|&v| (f64::from(v) - shift).exp()).collect(), shift)
}

#[test]
fn softmax_and_log_softmax() {
    let mut random = Random(31);
    for (rows, cols) in [(1, 1), (3, 10), (5, 17), (2, 1000), (7, 31)] {
        let x: Vec<f32> = random.reals(rows * cols).iter().map(|v| v * 30.0 + 100.0).collect();
        let (mut plain, mut log) = (Vec::new(), Vec::new());
        for row in x.chunks(cols) {
            let (values, shift) = softmax(row);
            plain.extend(values);
            log.extend(row.iter().map(|&v| f64::from(v) - shift));
        }
        for table in tables() {
            let mut y = vec![7.0; rows * cols];
            let args = SoftmaxArgs { x: x.as_ptr(), y: y.as_mut_ptr(), rows, cols };
            run(table, KernelId::Softmax, &args, 2);
            assert_close(&y, &plain, 1e-6, "softmax");
            run(table, KernelId::LogSoftmax, &args, 2);
            assert_close(&y, &log, 1e-6, "log-softmax");
        }
    }
}

#[test]
fn softmax_of_extremes() {
    for table in tables() {
        for (x, expected) in [
            ([0.0, f32::NEG_INFINITY, 0.0], [0.5, 0.0, 0.5]),
            ([-1e30, 0.0, -200.0], [0.0, 1.0, 0.0]),
        ] {
            let mut y = [7.0; 3];
            let args = SoftmaxArgs { x: x.as_ptr(), y: y.as_mut_ptr(), rows: 1, cols: 3 };
            run(table, KernelId::Softmax, &args, 1);
            assert_eq!(y, expected);
        }
        let (x, mut y) = ([0.0, f32::NAN, 1.0], [7.0; 3]);
        let args = SoftmaxArgs { x: x.as_ptr(), y: y.as_mut_ptr(), rows: 1, cols: 3 };
        run(table, KernelId::Softmax, &args, 1);
        assert!(y.iter().all(|v| v.is_nan()));
    }
}

#[test]
fn cross_entropy_and_gradient() {
    let mut random = Random(32);
    for (rows, cols) in [(1, 2), (9, 10), (6, 33), (4, 513)] {
        let logits: Vec<f32> = random.reals(rows * cols).iter().map(|v| v * 10.0).collect();
        let mut labels: Vec<i64> = (0..rows).map(|_| random.between(0, cols - 1) as i64).collect();
        if rows > 4 {
            labels[3] = -100;
        }
        let dy = random.reals(rows);
        let (mut losses, mut dlogits) = (Vec::new(), Vec::new());
        for (r, row) in logits.chunks(cols).enumerate() {
            let (values, shift) = softmax(row);
            if labels[r] == -100 {
                losses.push(0.0);
                dlogits.extend(vec![0.0; cols]);
                continue;
            }
            losses.push(shift - f64::from(row[labels[r] as usize]));
            for (c, value) in values.iter().enumerate() {
                let target = f64::from(u8::from(c as i64 == labels[r]));
                dlogits.push((value - target) * f64::from(dy[r]));
            }
        }
        for table in tables() {
            let (mut actual, mut error) = (vec![7.0; rows], 0);
            let mut args = CrossEntropyArgs {
                logits: logits.as_ptr(),
                labels: labels.as_ptr(),
                losses: actual.as_mut_ptr(),
                rows,
                cols,
                ignore_index: -100,
                error: &raw mut error,
            };
            run(table, KernelId::CrossEntropy, &args, 2);
            assert_close(&actual, &losses, 1e-6, "loss");
            let mut gradient = vec![7.0; rows * cols];
            let grad_args = CrossEntropyGradArgs {
                logits: logits.as_ptr(),
                labels: labels.as_ptr(),
                dy: dy.as_ptr(),
                dy_stride: 1,
                dlogits: gradient.as_mut_ptr(),
                rows,
                cols,
                ignore_index: -100,
                error: &raw mut error,
            };
            run(table, KernelId::CrossEntropyGrad, &grad_args, 2);
            assert_close(&gradient, &dlogits, 1e-6, "gradient");
            assert_eq!(error, 0);

            let mut bad = labels.clone();
            bad[rows - 1] = cols as i64;
            args.labels = bad.as_ptr();
            run(table, KernelId::CrossEntropy, &args, 2);
            assert!(actual[rows - 1].is_nan());
            assert_eq!(error, rows as u64);
        }
    }
}

#[test]
fn gather_and_scatter() {
    let mut random = Random(33);
    for (rows, width, count) in [(1, 1, 5), (7, 3, 40), (50, 200, 33), (5, 16, 0)] {
        let table_values = random.reals(rows * width);
        let values = random.reals(count * width);
        let indices: Vec<i64> =
            (0..count).map(|_| random.between(0, 2 * rows - 1) as i64 - rows as i64).collect();
        let row_of = |i: i64| i.rem_euclid(rows as i64) as usize;
        let gathered: Vec<f32> = indices
            .iter()
            .flat_map(|&i| table_values[row_of(i) * width..][..width].to_vec())
            .collect();
        let mut scattered = vec![0.0_f32; rows * width];
        for (i, &index) in indices.iter().enumerate() {
            for c in 0..width {
                scattered[row_of(index) * width + c] += values[i * width + c];
            }
        }
        for table in tables() {
            let (mut out, mut error) = (vec![7.0_f32; count * width], 0);
            let mut args = GatherArgs {
                table: table_values.as_ptr().cast(),
                indices: indices.as_ptr(),
                out: out.as_mut_ptr().cast(),
                rows,
                width,
                element_bytes: 4,
                count,
                error: &raw mut error,
            };
            run(table, KernelId::Gather, &args, 2);
            assert_eq!(out, gathered);
            let mut sums = vec![7.0_f32; rows * width];
            let scatter_args = ScatterAddArgs {
                values: values.as_ptr(),
                indices: indices.as_ptr(),
                out: sums.as_mut_ptr(),
                rows,
                width,
                count,
                error: &raw mut error,
            };
            run(table, KernelId::ScatterAdd, &scatter_args, 3);
            assert_eq!(sums, scattered);
            assert_eq!(error, 0);
            if count > 2 {
                let mut bad = indices.clone();
                (bad[1], bad[2]) = (rows as i64, i64::MIN);
                args.indices = bad.as_ptr();
                run(table, KernelId::Gather, &args, 2);
                assert_eq!(error, 2);
                assert!(out[width..3 * width].iter().all(|&v| v == 0.0));
            }
        }
    }
}
