use super::check::{ALONE, Guarded, Random, assert_close, run, tables};
use crate::KernelId;
use crate::args::{
    Combine, CrossEntropyArgs, CrossEntropyGradArgs, GatherArgs, ScatterArgs, SoftmaxArgs,
};
use std::ptr::null_mut;

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
            let scatter_args = ScatterArgs {
                values: values.as_ptr().cast(),
                indices: indices.as_ptr(),
                out: sums.as_mut_ptr().cast(),
                rows,
                width,
                count,
                combine: Combine::Add,
                integers: 0,
                error: &raw mut error,
            };
            run(table, KernelId::Scatter, &scatter_args, 3);
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

#[test]
fn results_may_lie_on_the_operands() {
    let mut random = Random(34);
    let (rows, cols) = (5, 37);
    let x = random.reals(rows * cols);
    let (labels, dy) = (vec![4_i64; rows], 0.5_f32);
    for table in tables() {
        for id in [KernelId::Softmax, KernelId::LogSoftmax, KernelId::CrossEntropyGrad] {
            let (mut apart, mut same) = (Guarded::new(rows * cols), x.clone());
            for (from, to) in [(x.as_ptr(), apart.as_mut_ptr()), (same.as_ptr(), same.as_mut_ptr())]
            {
                if id == KernelId::CrossEntropyGrad {
                    let args = CrossEntropyGradArgs {
                        logits: from,
                        labels: labels.as_ptr(),
                        dy: &raw const dy,
                        dy_stride: 0,
                        dlogits: to,
                        rows,
                        cols,
                        ignore_index: -100,
                        error: null_mut(),
                    };
                    run(table, id, &args, ALONE);
                } else {
                    run(table, id, &SoftmaxArgs { x: from, y: to, rows, cols }, ALONE);
                }
            }
            assert_eq!(apart.checked("rows"), same, "{id:?}");
        }
    }
}

#[test]
fn bad_labels_are_reported_and_ignored_ones_are_not() {
    let (rows, cols) = (6, 3);
    let logits = vec![0.25_f32; rows * cols];
    let dy = 3.0_f32;
    // The ignored label is a class here; the first bad row is the third.
    let labels = [0, 1, 3, 1, -1, i64::MIN];
    for table in tables() {
        for pieces in [1, 2, ALONE] {
            for with_error in [true, false] {
                let (mut loss_error, mut grad_error) = (0, 0);
                let mut losses = Guarded::new(rows);
                let args = CrossEntropyArgs {
                    logits: logits.as_ptr(),
                    labels: labels.as_ptr(),
                    losses: losses.as_mut_ptr(),
                    rows,
                    cols,
                    ignore_index: 1,
                    error: if with_error { &raw mut loss_error } else { null_mut() },
                };
                run(table, KernelId::CrossEntropy, &args, pieces);
                let losses = losses.checked("losses");
                let mut dlogits = Guarded::new(rows * cols);
                let args = CrossEntropyGradArgs {
                    logits: logits.as_ptr(),
                    labels: labels.as_ptr(),
                    dy: &raw const dy,
                    dy_stride: 0,
                    dlogits: dlogits.as_mut_ptr(),
                    rows,
                    cols,
                    ignore_index: 1,
                    error: if with_error { &raw mut grad_error } else { null_mut() },
                };
                run(table, KernelId::CrossEntropyGrad, &args, pieces);
                let dlogits = dlogits.checked("gradient");
                assert!((losses[0] - 3.0_f32.ln()).abs() < 1e-6);
                assert_eq!((losses[1], losses[3]), (0.0, 0.0));
                for row in 0..rows {
                    let bad = [2, 4, 5].contains(&row);
                    assert_eq!(losses[row].is_nan(), bad, "row {row}");
                    let zeros = dlogits[row * cols..][..cols].iter().all(|&v| v == 0.0);
                    assert_eq!(zeros, row != 0, "row {row}");
                }
                let expected = if with_error { 3 } else { 0 };
                assert_eq!((loss_error, grad_error), (expected, expected));
            }
        }
    }
}

#[test]
fn bad_indices_are_skipped_and_the_first_is_reported() {
    let values: Vec<f32> = (1..=10).map(|v| v as f32).collect();
    let indices = [1, -3, 2, -1, 7];
    for table in tables() {
        for pieces in [1, ALONE] {
            let (mut sums, mut error) = (Guarded::new(4), 0);
            let mut args = ScatterArgs {
                values: values.as_ptr().cast(),
                indices: indices.as_ptr(),
                out: sums.as_mut_ptr().cast(),
                rows: 2,
                width: 2,
                count: 5,
                combine: Combine::Add,
                integers: 0,
                error: &raw mut error,
            };
            run(table, KernelId::Scatter, &args, pieces);
            // Positions 0 and 3 name row 1; -3, 2 and 7 are out of range.
            assert_eq!(sums.checked("scatter"), [0.0, 0.0, 1.0 + 7.0, 2.0 + 8.0]);
            assert_eq!(error, 2);
            // An earlier report of a later position gives way, and one of an earlier position stays.
            (error, args.out) = (4, sums.as_mut_ptr().cast());
            run(table, KernelId::Scatter, &args, pieces);
            assert_eq!(error, 2);
            error = 1;
            run(table, KernelId::Scatter, &args, pieces);
            assert_eq!(error, 1);
            args.error = null_mut();
            run(table, KernelId::Scatter, &args, pieces);
        }
        // A table without rows has no row to give.
        let (mut out, mut error) = ([7_u8; 5], 0);
        let args = GatherArgs {
            table: std::ptr::null(),
            indices: indices.as_ptr(),
            out: out.as_mut_ptr(),
            rows: 0,
            width: 1,
            element_bytes: 1,
            count: 5,
            error: &raw mut error,
        };
        run(table, KernelId::Gather, &args, 2);
        assert_eq!((out, error), ([0; 5], 1));
    }
}

#[test]
fn gather_takes_elements_of_any_size() {
    let bytes: Vec<u8> = (0..240).map(|i| i as u8).collect();
    let indices: Vec<i64> = (0..37).map(|i| i % 5 - 2).collect();
    for element_bytes in [1, 2, 4, 8] {
        let width = 240 / 5 / element_bytes;
        for table in tables() {
            let mut out = vec![0_u8; indices.len() * 48];
            let args = GatherArgs {
                table: bytes.as_ptr(),
                indices: indices.as_ptr(),
                out: out.as_mut_ptr(),
                rows: 5,
                width,
                element_bytes,
                count: indices.len(),
                error: null_mut(),
            };
            run(table, KernelId::Gather, &args, ALONE);
            for (row, &index) in out.chunks(48).zip(&indices) {
                let first = index.rem_euclid(5) as usize * 48;
                assert_eq!(row, &bytes[first..first + 48]);
            }
        }
    }
}

#[test]
fn no_rows_and_no_columns() {
    for table in tables() {
        for (rows, cols) in [(0, 5), (3, 0), (0, 0)] {
            let mut y = Guarded::new(0);
            let args = SoftmaxArgs { x: y.as_mut_ptr(), y: y.as_mut_ptr(), rows, cols };
            run(table, KernelId::Softmax, &args, 1);
            run(table, KernelId::LogSoftmax, &args, 1);
            y.checked("nothing");
        }
    }
}

#[test]
fn splits_do_not_change_a_bit() {
    let mut random = Random(35);
    let (rows, cols) = (23, 45);
    let x: Vec<f32> = random.reals(rows * cols).iter().map(|v| v * 9.0).collect();
    let indices: Vec<i64> = (0..rows).map(|i| (i * i % 7) as i64).collect();
    for table in tables() {
        for id in [KernelId::Softmax, KernelId::LogSoftmax] {
            let results = [1, 4, ALONE].map(|pieces| {
                let mut y = Guarded::new(rows * cols);
                let args = SoftmaxArgs { x: x.as_ptr(), y: y.as_mut_ptr(), rows, cols };
                run(table, id, &args, pieces);
                y.checked("split")
            });
            assert_eq!(results[0], results[1]);
            assert_eq!(results[0], results[2]);
        }
        let results = [1, 4, ALONE].map(|pieces| {
            let mut sums = Guarded::new(7 * cols);
            let args = ScatterArgs {
                values: x.as_ptr().cast(),
                indices: indices.as_ptr(),
                out: sums.as_mut_ptr().cast(),
                rows: 7,
                width: cols,
                count: rows,
                combine: Combine::Add,
                integers: 0,
                error: null_mut(),
            };
            run(table, KernelId::Scatter, &args, pieces);
            sums.checked("split")
        });
        assert_eq!(results[0], results[1]);
        assert_eq!(results[0], results[2]);
    }
}
