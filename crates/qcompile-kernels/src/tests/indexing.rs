use super::check::{ALONE, Random, run, tables};
use crate::KernelId;
use crate::args::{Combine, IotaArgs, RandomArgs, ScatterArgs, TopKArgs};
use std::ptr::null_mut;

#[test]
fn scatters_combine_in_order() {
    let mut random = Random(41);
    let (rows, width, count) = (9, 200, 31);
    let reals = random.reals(count * width);
    let integers: Vec<i64> =
        (0..count * width).map(|_| random.between(0, 40) as i64 - 20).collect();
    let indices: Vec<i64> = (0..count).map(|_| random.between(0, rows - 2) as i64).collect();
    for combine in [Combine::Add, Combine::Mul, Combine::Max] {
        let (mut real, mut integer) = match combine {
            Combine::Add => (vec![0.0_f32; rows * width], vec![0_i64; rows * width]),
            Combine::Mul => (vec![1.0; rows * width], vec![1; rows * width]),
            Combine::Max => (vec![f32::NEG_INFINITY; rows * width], vec![i64::MIN; rows * width]),
        };
        for (i, &row) in indices.iter().enumerate() {
            for c in 0..width {
                let (from, to) = (i * width + c, row as usize * width + c);
                let (a, b) = (&mut real[to], &mut integer[to]);
                match combine {
                    Combine::Add => (*a, *b) = (*a + reals[from], *b + integers[from]),
                    Combine::Mul => (*a, *b) = (*a * reals[from], b.wrapping_mul(integers[from])),
                    Combine::Max => (*a, *b) = (a.max(reals[from]), (*b).max(integers[from])),
                }
            }
        }
        for table in tables() {
            for pieces in [1, 3, ALONE] {
                let (mut out, mut whole) = (vec![7.0_f32; rows * width], vec![7_i64; rows * width]);
                let mut args = ScatterArgs {
                    values: reals.as_ptr().cast(),
                    indices: indices.as_ptr(),
                    out: out.as_mut_ptr().cast(),
                    rows,
                    width,
                    count,
                    combine,
                    integers: 0,
                    error: null_mut(),
                };
                run(table, KernelId::Scatter, &args, pieces);
                (args.values, args.out) = (integers.as_ptr().cast(), whole.as_mut_ptr().cast());
                args.integers = 1;
                run(table, KernelId::Scatter, &args, pieces);
                assert_eq!((&out, &whole), (&real, &integer), "{combine:?}");
            }
        }
    }
}

/// Places of the foremost elements by sorting all.
fn sorted<T: Copy>(row: &[T], k: usize, before: impl Fn(T, T) -> bool) -> Vec<i64> {
    let mut places: Vec<usize> = (0..row.len()).collect();
    places.sort_by(|&a, &b| match (before(row[a], row[b]), before(row[b], row[a])) {
        (true, _) => std::cmp::Ordering::Less,
        (_, true) => std::cmp::Ordering::Greater,
        _ => a.cmp(&b),
    });
    places[..k].iter().map(|&place| place as i64).collect()
}

#[test]
fn foremost_elements_are_sorted_and_ties_go_to_the_first() {
    let mut random = Random(42);
    for (rows, cols, k) in [(3, 1, 1), (4, 17, 5), (2, 100, 100), (5, 33, 1), (3, 4, 0), (1, 0, 0)]
    {
        let integers: Vec<i64> =
            (0..rows * cols).map(|_| random.between(0, 12) as i64 - 6).collect();
        let mut reals: Vec<f32> = integers.iter().map(|&x| x as f32 / 4.0).collect();
        if cols > 8 {
            (reals[3], reals[7]) = (f32::NAN, f32::NEG_INFINITY);
        }
        for largest in [true, false] {
            let behind = |a: f32, b: f32| a > b || (a.is_nan() && !b.is_nan());
            let mut expected = [Vec::new(), Vec::new()];
            for row in 0..rows {
                let row = row * cols..(row + 1) * cols;
                let (real, integer) = (&reals[row.clone()], &integers[row]);
                expected[0].extend(sorted(real, k, |a, b| {
                    if largest { behind(a, b) } else { behind(b, a) }
                }));
                expected[1].extend(sorted(integer, k, |a, b| if largest { a > b } else { a < b }));
            }
            for table in tables() {
                for (integer, expected) in expected.iter().enumerate() {
                    let mut out = vec![-7; rows * k];
                    let x =
                        if integer == 0 { reals.as_ptr().cast() } else { integers.as_ptr().cast() };
                    let args = TopKArgs {
                        x,
                        out: out.as_mut_ptr(),
                        rows,
                        cols,
                        k,
                        largest: usize::from(largest),
                        integers: integer,
                    };
                    run(table, KernelId::TopK, &args, 2);
                    assert_eq!(&out, expected, "{k} of {cols}");
                }
            }
        }
    }
}

#[test]
fn numbers_in_order() {
    for table in tables() {
        let mut out = vec![-1; 2500];
        run(table, KernelId::Iota, &IotaArgs { out: out.as_mut_ptr(), count: 2500 }, 3);
        assert!(out.iter().enumerate().all(|(at, &value)| value == at as i64));
    }
}

#[test]
fn random_numbers_are_those_of_philox_wherever_a_part_begins() {
    let draw = |table, seed, step: i64, first, count, pieces| {
        let mut out = vec![7.0_f32; count];
        let args = RandomArgs { step: &raw const step, out: out.as_mut_ptr(), seed, first, count };
        run(table, KernelId::Random, &args, pieces);
        out
    };
    for table in tables() {
        // The published words of key 0 and counter 0.
        let words = [0x6627_e8d5_u32, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8];
        let expected = words.map(|word| (word >> 8) as f32 / 16_777_216.0);
        assert_eq!(draw(table, 0, 0, 0, 4, 1), expected);
        let whole = draw(table, 9, 3, 0, 5000, 3);
        assert_eq!(whole, draw(table, 9, 3, 0, 5000, ALONE));
        assert_eq!(whole[1234..], draw(table, 9, 3, 1234, 5000 - 1234, 2));
        assert_ne!(whole, draw(table, 9, 4, 0, 5000, 3));
        assert_ne!(whole, draw(table, 10, 3, 0, 5000, 3));
        let mean = whole.iter().sum::<f32>() / 5000.0;
        assert!(
            (mean - 0.5).abs() < 0.02 && whole.iter().all(|x| (0.0..1.0).contains(x)),
            "{mean}"
        );
    }
}
