use super::check::{ALONE, Guarded, Random, assert_close, fractions, run, tables};
use crate::args::{AttentionArgs, AttentionKind};
use crate::{KernelId, Tier};
use std::ptr::{null, null_mut};

#[derive(Clone, Copy)]
struct Case {
    batch: usize,
    rows: usize,
    keys: usize,
    heads: usize,
    key_heads: usize,
    width: usize,
    value_width: usize,
    causal: bool,
    /// Which dims of the mask are repeated, if there is one.
    mask: Option<[bool; 4]>,
}

/// Operands within larger rows, so that strides count; results as f64.
struct Operands {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    mask: Vec<f32>,
    dy: Vec<f32>,
    y: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
}

const SCALE: f32 = 0.75;

impl Case {
    fn plain(rows: usize, keys: usize, width: usize) -> Case {
        Case {
            batch: 2,
            rows,
            keys,
            heads: 2,
            key_heads: 2,
            width,
            value_width: width,
            causal: false,
            mask: None,
        }
    }

    /// `[batch, length, heads, width]` in memory of one row more for each head.
    fn strides(length: usize, heads: usize, width: usize) -> [usize; 4] {
        let row = heads * (width + 1);
        [length * row, row, width + 1, 1]
    }

    fn mask_strides(&self) -> [usize; 4] {
        let dims = [self.batch, self.heads, self.rows, self.keys];
        let mut strides = [0; 4];
        let mut size = 1;
        for dim in (0..4).rev() {
            if !self.mask.unwrap_or([true; 4])[dim] {
                strides[dim] = size;
                size *= dims[dim];
            }
        }
        strides
    }

    fn draw(&self, random: &mut Random, round: impl Fn(f32) -> f32) -> Operands {
        let mut values = |length: usize, heads: usize, width: usize| -> Vec<f32> {
            let count = self.batch * length * heads * (width + 1) + 1;
            random.reals(count).into_iter().map(&round).collect()
        };
        let (b, t, s, h, g) = (self.batch, self.rows, self.keys, self.heads, self.key_heads);
        let (d, e) = (self.width, self.value_width);
        let (q, k, v, dy) = (values(t, h, d), values(s, g, d), values(s, g, e), values(t, h, e));
        let mut mask = random.reals(b * h * t * s + 1);
        for (i, value) in mask.iter_mut().enumerate() {
            // Some are hidden, but no whole row.
            *value = if i % 5 == 3 { f32::NEG_INFINITY } else { *value * 3.0 };
        }
        let at = |strides: [usize; 4], index: [usize; 4]| -> usize {
            strides.iter().zip(index).map(|(stride, index)| stride * index).sum()
        };
        let (qs, ks) = (Case::strides(t, h, d), Case::strides(s, g, d));
        let (vs, ys) = (Case::strides(s, g, e), Case::strides(t, h, e));
        let mut y = vec![0.0; b * t * h * e];
        let (mut dq, mut dk, mut dv) =
            (vec![0.0; b * t * h * d], vec![0.0; b * s * g * d], vec![0.0; b * s * g * e]);
        for (batch, head, row) in (0..b * h * t).map(|i| (i / (h * t), i / t % h, i % t)) {
            let group = head / (h / g);
            let seen = if self.causal { s.min(row + 1) } else { s };
            let real = |values: &[f32], at: usize| f64::from(values[at]);
            let scores: Vec<f64> = (0..seen)
                .map(|key| {
                    let product: f64 = (0..d)
                        .map(|i| {
                            real(&q, at(qs, [batch, row, head, i]))
                                * real(&k, at(ks, [batch, key, group, i]))
                        })
                        .sum();
                    let masked = match self.mask {
                        Some(_) => real(&mask, at(self.mask_strides(), [batch, head, row, key])),
                        None => 0.0,
                    };
                    product * f64::from(SCALE) + masked
                })
                .collect();
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|x| (x - most).exp()).sum();
            let p: Vec<f64> = scores.iter().map(|x| (x - most).exp() / sum).collect();
            let dp: Vec<f64> = (0..seen)
                .map(|key| {
                    (0..e)
                        .map(|i| {
                            real(&dy, at(ys, [batch, row, head, i]))
                                * real(&v, at(vs, [batch, key, group, i]))
                        })
                        .sum()
                })
                .collect();
            let mean: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
            for key in 0..seen {
                let ds = p[key] * (dp[key] - mean) * f64::from(SCALE);
                for i in 0..e {
                    y[((batch * t + row) * h + head) * e + i] +=
                        p[key] * real(&v, at(vs, [batch, key, group, i]));
                    dv[((batch * s + key) * g + group) * e + i] +=
                        p[key] * real(&dy, at(ys, [batch, row, head, i]));
                }
                for i in 0..d {
                    dq[((batch * t + row) * h + head) * d + i] +=
                        ds * real(&k, at(ks, [batch, key, group, i]));
                    dk[((batch * s + key) * g + group) * d + i] +=
                        ds * real(&q, at(qs, [batch, row, head, i]));
                }
            }
        }
        Operands { q, k, v, mask, dy, y, dq, dk, dv }
    }

    fn args(&self, operands: &Operands) -> AttentionArgs {
        let Case { batch, rows, keys, heads, key_heads, width, value_width, .. } = *self;
        AttentionArgs {
            q: operands.q.as_ptr().cast(),
            k: operands.k.as_ptr().cast(),
            v: operands.v.as_ptr().cast(),
            mask: if self.mask.is_some() { operands.mask.as_ptr() } else { null() },
            dy: operands.dy.as_ptr().cast(),
            numbers: null(),
            y: null_mut(),
            dq: null_mut(),
            dk: null_mut(),
            dv: null_mut(),
            batch,
            rows,
            keys,
            heads,
            key_heads,
            width,
            value_width,
            q_strides: Case::strides(rows, heads, width),
            k_strides: Case::strides(keys, key_heads, width),
            v_strides: Case::strides(keys, key_heads, value_width),
            mask_strides: self.mask_strides(),
            dy_strides: Case::strides(rows, heads, value_width),
            number_strides: [0; 4],
            scale: u64::from(SCALE.to_bits()),
            causal: usize::from(self.causal),
            kind: AttentionKind::F32,
            scales: [null(); 3],
        }
    }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (rows, keys, width) in
        [(1, 1, 1), (1, 40, 8), (5, 3, 16), (16, 16, 16), (75, 70, 33), (70, 150, 64), (300, 33, 5)]
    {
        for causal in [false, true] {
            cases.push(Case { causal, ..Case::plain(rows, keys, width) });
        }
    }
    let some = Case::plain(80, 90, 20);
    cases.push(Case { value_width: 70, causal: true, ..some });
    cases.push(Case { width: 3, value_width: 1, ..some });
    cases.push(Case { heads: 6, key_heads: 2, causal: true, ..some });
    cases.push(Case { heads: 3, key_heads: 1, ..some });
    for mask in [
        [false; 4],
        [false, true, true, false],
        [true, true, false, false],
        [true, false, true, true],
    ] {
        cases.push(Case { mask: Some(mask), ..some });
        cases.push(Case { mask: Some(mask), causal: true, ..some });
    }
    // More keys than scores are held at once.
    for (rows, keys) in [(3, 2000), (1000, 1000), (30, 961)] {
        let long = Case { batch: 1, heads: 1, key_heads: 1, ..Case::plain(rows, keys, 9) };
        cases.push(long);
        cases.push(Case { causal: true, mask: Some([true, true, false, false]), ..long });
    }
    cases.push(Case::plain(4, 0, 8));
    cases.push(Case::plain(0, 4, 8));
    cases.push(Case { value_width: 0, ..some });
    cases.push(Case { width: 0, value_width: 4, ..some });
    cases
}

#[test]
fn attention_and_its_gradients() {
    let mut random = Random(91);
    for (number, case) in cases().into_iter().enumerate() {
        let operands = case.draw(&mut random, |x| x);
        for table in tables() {
            let what = format!("case {number} on {}", table.tier);
            let mut first: Option<[Vec<f32>; 4]> = None;
            for pieces in [1, 2, ALONE] {
                let mut results = [&operands.y, &operands.dq, &operands.dk, &operands.dv]
                    .map(|exact| Guarded::new(exact.len()));
                let mut args = case.args(&operands);
                let [y, dq, dk, dv] = results.each_mut().map(|result| result.as_mut_ptr().cast());
                (args.y, args.dq, args.dk, args.dv) = (y, dq, dk, dv);
                run(table, KernelId::Attention, &args, pieces);
                run(table, KernelId::AttentionGrad, &args, pieces);
                let results = results.each_ref().map(|result| result.checked(&what));
                assert_close(&results[0], &operands.y, 1e-5, &format!("{what}: y"));
                assert_close(&results[1], &operands.dq, 1e-5, &format!("{what}: dq"));
                assert_close(&results[2], &operands.dk, 2e-5, &format!("{what}: dk"));
                assert_close(&results[3], &operands.dv, 2e-5, &format!("{what}: dv"));
                match &first {
                    None => first = Some(results),
                    Some(first) => assert!(*first == results, "{what}: {pieces} pieces differ"),
                }
            }
            // Each gradient alone has the same bits.
            let first = first.expect("several runs");
            for wanted in 0..3 {
                let mut result = Guarded::new(first[wanted + 1].len());
                let mut args = case.args(&operands);
                let to = result.as_mut_ptr().cast();
                *[&mut args.dq, &mut args.dk, &mut args.dv][wanted] = to;
                run(table, KernelId::AttentionGrad, &args, 1);
                assert!(result.checked(&what) == first[wanted + 1], "{what}: gradient {wanted}");
            }
        }
    }
}

#[test]
fn attention_of_bf16() {
    let round = |x: f32| f32::from_bits(x.to_bits() & 0xffff_0000);
    let narrow = |values: &[f32]| -> Vec<u16> {
        values.iter().map(|value| (value.to_bits() >> 16) as u16).collect()
    };
    let widen = |values: &[u16]| -> Vec<f32> {
        values.iter().map(|&bits| f32::from_bits(u32::from(bits) << 16)).collect()
    };
    let mut random = Random(92);
    for causal in [false, true] {
        let case = Case { causal, heads: 4, ..Case::plain(90, 77, 24) };
        let operands = case.draw(&mut random, round);
        let [q, k, v, dy] =
            [&operands.q, &operands.k, &operands.v, &operands.dy].map(|values| narrow(values));
        let kinds = [(AttentionKind::Bf16Operands, 4e-3), (AttentionKind::Bf16, 8e-3)];
        for (table, (kind, bound)) in tables().into_iter().flat_map(|t| kinds.map(|kind| (t, kind)))
        {
            let mut results = [&operands.y, &operands.dq, &operands.dk, &operands.dv]
                .map(|exact| vec![0x7fc1_u16; exact.len()]);
            let mut args = case.args(&operands);
            (args.q, args.k) = (q.as_ptr().cast(), k.as_ptr().cast());
            (args.v, args.dy) = (v.as_ptr().cast(), dy.as_ptr().cast());
            let [y, dq, dk, dv] = results.each_mut().map(|result| result.as_mut_ptr().cast());
            (args.y, args.dq, args.dk, args.dv, args.kind) = (y, dq, dk, dv, kind);
            run(table, KernelId::Attention, &args, 2);
            run(table, KernelId::AttentionGrad, &args, 2);
            let exact = [&operands.y, &operands.dq, &operands.dk, &operands.dv];
            for (result, exact) in results.iter().zip(exact) {
                assert_close(&widen(result), exact, bound, &format!("{kind:?} on {}", table.tier));
            }
        }
    }
}

/// Against the exact attention of what the codes mean; what is rounded is told by the reference evaluator.
#[test]
fn attention_of_int8() {
    static STEP: f32 = 1.0 / 64.0;
    let mut random = Random(94);
    let codes = |values: &[f32]| -> Vec<i8> {
        values.iter().map(|value| (value / STEP).round() as i8).collect()
    };
    let both = cases().into_iter().flat_map(|case| [(case, false), (case, true)]);
    for (number, (case, at_random)) in both.enumerate() {
        let operands = case.draw(&mut random, |x| (x / STEP).round().clamp(-127.0, 127.0) * STEP);
        let [q, k, v] = [&operands.q, &operands.k, &operands.v].map(|values| codes(values));
        let mut args = case.args(&operands);
        (args.q, args.k, args.v) = (q.as_ptr().cast(), k.as_ptr().cast(), v.as_ptr().cast());
        (args.kind, args.scales) = (AttentionKind::Int8, [&raw const STEP; 3]);
        let numbers = fractions(&mut random, 2 * case.batch * case.rows * case.heads);
        if at_random {
            let strides = [2 * case.rows * case.heads, 2 * case.heads, 2, 1];
            (args.numbers, args.number_strides) = (numbers.as_ptr(), strides);
        }
        let exact = [&operands.y, &operands.dq, &operands.dk, &operands.dv];
        let mut first: Option<[Vec<f32>; 4]> = None;
        for table in tables() {
            let what = format!("case {number} on {}", table.tier);
            let mut on_tier: Option<[Vec<f32>; 4]> = None;
            for pieces in [1, 2, ALONE] {
                let mut results = exact.map(|exact| Guarded::new(exact.len()));
                let [y, dq, dk, dv] = results.each_mut().map(|result| result.as_mut_ptr().cast());
                (args.y, args.dq, args.dk, args.dv) = (y, dq, dk, dv);
                run(table, KernelId::Attention, &args, pieces);
                run(table, KernelId::AttentionGrad, &args, pieces);
                let results = results.each_ref().map(|result| result.checked(&what));
                for (result, exact) in results.iter().zip(exact) {
                    assert_close(result, exact, if at_random { 6e-2 } else { 3e-2 }, &what);
                }
                let on_tier = on_tier.get_or_insert_with(|| results.clone());
                assert!(*on_tier == results, "{what}: {pieces} pieces differ");
            }
            let on_tier = on_tier.expect("several runs");
            for wanted in 0..3 {
                let mut result = Guarded::new(on_tier[wanted + 1].len());
                (args.dq, args.dk, args.dv) = (null_mut(), null_mut(), null_mut());
                let to = result.as_mut_ptr().cast();
                *[&mut args.dq, &mut args.dk, &mut args.dv][wanted] = to;
                run(table, KernelId::AttentionGrad, &args, 1);
                assert!(result.checked(&what) == on_tier[wanted + 1], "{what}: gradient {wanted}");
            }
            // Exponentials differ by the fused multiply and add alone.
            let fused = table.tier != Tier::Portable
                && !std::ptr::eq(table, &raw const super::emulated::TABLE);
            if fused {
                let first = first.get_or_insert_with(|| on_tier.clone());
                assert!(*first == on_tier, "{what}: the tiers differ");
            }
        }
    }
}

/// In bf16 the results are those in f32, rounded to the nearest.
#[test]
fn attention_of_int8_with_bf16_around_it() {
    static STEP: f32 = 1.0 / 64.0;
    let bits = |value: f32| -> u16 {
        let bits = value.to_bits();
        ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
    };
    let mut random = Random(96);
    for case in [Case::plain(70, 150, 64), Case { causal: true, ..Case::plain(80, 90, 20) }] {
        let mut operands = case.draw(&mut random, |x| x);
        let codes =
            |values: &[f32]| -> Vec<i8> { values.iter().map(|x| (x * 63.0) as i8).collect() };
        let [q, k, v] = [&operands.q, &operands.k, &operands.v].map(|values| codes(values));
        let dy: Vec<u16> = operands.dy.iter().map(|&value| bits(value)).collect();
        operands.dy = dy.iter().map(|&bits| f32::from_bits(u32::from(bits) << 16)).collect();
        let mut args = case.args(&operands);
        (args.q, args.k, args.v) = (q.as_ptr().cast(), k.as_ptr().cast(), v.as_ptr().cast());
        (args.kind, args.scales) = (AttentionKind::Int8, [&raw const STEP; 3]);
        for table in tables() {
            let exact = [&operands.y, &operands.dq, &operands.dk, &operands.dv];
            let mut wide = exact.map(|exact| vec![f32::NAN; exact.len()]);
            let [y, dq, dk, dv] = wide.each_mut().map(|result| result.as_mut_ptr().cast());
            let wide_args = AttentionArgs { y, dq, dk, dv, ..args };
            let mut narrow = exact.map(|exact| vec![0_u16; exact.len()]);
            let [y, dq, dk, dv] = narrow.each_mut().map(|result| result.as_mut_ptr().cast());
            let kind = AttentionKind::Int8Bf16;
            let narrow_args = AttentionArgs { y, dq, dk, dv, kind, dy: dy.as_ptr().cast(), ..args };
            for id in [KernelId::Attention, KernelId::AttentionGrad] {
                run(table, id, &wide_args, 1);
                run(table, id, &narrow_args, 2);
            }
            for (wide, narrow) in wide.iter().zip(&narrow) {
                let rounded: Vec<u16> = wide.iter().map(|&value| bits(value)).collect();
                assert_eq!(rounded, *narrow, "{}", table.tier);
            }
        }
    }
}

/// What has no codes: nothing to scale, and what is infinite or no number.
#[test]
fn gradients_of_int8_of_zeros_and_strange_values() {
    static STEP: f32 = 1.0 / 64.0;
    let case = Case { batch: 1, heads: 1, key_heads: 1, ..Case::plain(150, 70, 20) };
    let mut random = Random(95);
    let operands = case.draw(&mut random, |x| x);
    let codes = |values: &[f32]| -> Vec<i8> { values.iter().map(|x| (x * 63.0) as i8).collect() };
    let [q, k, v] = [&operands.q, &operands.k, &operands.v].map(|values| codes(values));
    let stride = case.value_width + 1;
    for table in tables() {
        for (strange, zero) in [(0.0, true), (f32::INFINITY, false), (f32::NAN, false)] {
            let mut dy = vec![0.0; operands.dy.len()];
            if !zero {
                dy.clone_from(&operands.dy);
                dy[70 * stride + 3] = strange;
            }
            let mut results =
                [&operands.dq, &operands.dk, &operands.dv].map(|exact| Guarded::new(exact.len()));
            let [dq, dk, dv] = results.each_mut().map(|result| result.as_mut_ptr().cast());
            let args = AttentionArgs {
                q: q.as_ptr().cast(),
                k: k.as_ptr().cast(),
                v: v.as_ptr().cast(),
                dy: dy.as_ptr().cast(),
                dq,
                dk,
                dv,
                kind: AttentionKind::Int8,
                scales: [&raw const STEP; 3],
                ..case.args(&operands)
            };
            run(table, KernelId::AttentionGrad, &args, 1);
            let [dq, dk, dv] = results.each_ref().map(|result| result.checked("strange values"));
            if zero {
                let all = [&dq, &dk, &dv];
                assert!(all.into_iter().flatten().all(|&x| x == 0.0), "{}", table.tier);
                continue;
            }
            for (at, value) in dq.iter().enumerate() {
                let row = at / case.width;
                assert_eq!(value.is_nan(), row == 70, "row {row} on {}", table.tier);
            }
            assert!(dk.iter().all(|x| x.is_nan()), "{}", table.tier);
            for (at, value) in dv.iter().enumerate() {
                let column = at % case.value_width;
                assert_eq!(value.is_nan(), column == 3, "{column} on {}", table.tier);
            }
        }
    }
}

#[test]
fn a_row_that_is_masked_everywhere_is_nan_alone() {
    let case = Case { mask: Some([true, true, false, false]), ..Case::plain(30, 1500, 4) };
    let mut random = Random(93);
    let mut operands = case.draw(&mut random, |x| x);
    operands.mask[7 * 1500..8 * 1500].fill(f32::NEG_INFINITY);
    // Hidden throughout the first chunk only.
    operands.mask[9 * 1500..9 * 1500 + 1200].fill(f32::NEG_INFINITY);
    for table in tables() {
        let mut y = vec![0.0_f32; operands.y.len()];
        let args = AttentionArgs { y: y.as_mut_ptr().cast(), ..case.args(&operands) };
        run(table, KernelId::Attention, &args, 1);
        for (at, value) in y.iter().enumerate() {
            let row = at / (case.heads * case.value_width) % case.rows;
            assert_eq!(value.is_nan(), row == 7, "row {row} on {}", table.tier);
        }
    }
}
