//! Quantized types: native code gives the bits of the evaluator on every tier, whatever is quantized.

use crate::oracle::{Values, parse};
use crate::support::Random;
use qcompile_ir::eval::{EvalOptions, eval};
use qcompile_ir::{DType, Float8, QuantizedRange, Region, Tensor};
use qcompile_kernels::Tier;
use qcompile_passes::quantize;
use qcompile_plan::{BuildOptions, build};
use qcompile_runtime::{Trainer, TrainerOptions};
use std::sync::Arc;

/// Runs a graph on every tier with 1 and 3 threads, and returns what all of them and the evaluator give.
fn exactly(source: &str, inputs: &Values, batch: usize) -> Values {
    let graph = parse(source);
    let values = eval(&graph, inputs, batch, &EvalOptions::default()).expect("evaluates");
    let wanted: Values = values.outputs().into_iter().collect();
    let plan = Arc::new(build(graph, &BuildOptions { batch_size: batch }).expect("has a plan"));
    for tier in Tier::ALL.into_iter().filter(|tier| tier.is_supported()) {
        for threads in [1, 3] {
            let options = TrainerOptions { threads, workers: 1, tier: Some(tier) };
            let mut trainer = Trainer::new(Arc::clone(&plan), &options).expect("compiles");
            let got = trainer.run(inputs, Region::Comm).expect("runs");
            for (name, wanted) in &wanted {
                let (got, wanted) = (got[name].to_f64(), wanted.to_f64());
                for (at, (&got, &wanted)) in got.iter().zip(&wanted).enumerate() {
                    let same =
                        got.to_bits() == wanted.to_bits() || (got.is_nan() && wanted.is_nan());
                    assert!(same, "{tier}: {name}[{at}] is {got:e}, not {wanted:e}\n{plan}");
                }
            }
        }
    }
    wanted
}

fn tensor(dtype: DType, sizes: &[usize], values: &[f64]) -> Tensor {
    Tensor::from_f64(dtype, sizes, values).expect("sizes fit")
}

const TYPES: [DType; 7] =
    [DType::I8, DType::U8, DType::I4, DType::U4, DType::F8E4M3, DType::F8E5M2, DType::I32];

/// Values around every code and half way between them, and those that need care.
fn values(range: QuantizedRange, scale: f64, count: usize, random: &mut Random) -> Vec<f64> {
    let special = [
        0.0,
        -0.0,
        f64::NAN,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::from(f32::MAX),
        f64::from(f32::MIN),
        1e-45,
    ];
    let (low, high) = (f64::from(range.low), f64::from(range.high));
    (0..count)
        .map(|at| match at % 4 {
            0 => special[at / 4 % special.len()],
            // Ties, up to a few codes beyond the range.
            1 => scale * ((random.unit() * (high - low + 8.0)).round() + 0.5),
            2 => scale * random.unit() * f64::from(range.half_step + range.high),
            _ => scale * random.unit() * 3.0,
        })
        .collect()
}

#[test]
fn every_quantized_type_rounds_to_the_bits_of_the_evaluator() {
    let mut random = Random::new(5);
    for dtype in TYPES {
        for zero_point in [false, true] {
            let Some(range) = QuantizedRange::of(dtype, zero_point) else { continue };
            for (axis, shape) in [(None, ""), (Some(0), "6"), (Some(1), "67")] {
                let along = axis.map(|axis| format!(" axis={axis}")).unwrap_or_default();
                let sizes: Vec<usize> = axis.map(|axis| [6, 67][axis]).into_iter().collect();
                let count = sizes.iter().product::<usize>();
                let point = if zero_point { ", %z" } else { "" };
                let source = format!(
                    "graph @g {{
  input %x : f32[6, 67]
  input %s : f32[{shape}]
  input %z : {dtype}[{shape}]
forward:
  %q : {dtype}[6, 67] = quantize %x, %s{point} {dtype}{along}
  %y : f32[6, 67] = dequantize %q, %s{point}{along}
  %r : f32[6, 67] = abs %y
  %p : f32[6, 67] = straight_through %x, %x, %s{point} {dtype}{along}
  return %q, %y, %r, %p
}}
"
                );
                // Scales of 0, of no number and of very small ones are not rare in bad models.
                let unusual = [0.0, 1e-30, f64::NAN, 1e-42, 1e30];
                for usual in [true, false] {
                    let scales: Vec<f64> = (0..count)
                        .map(|at| match usual {
                            true => 0.03 + 0.01 * at as f64,
                            false => unusual[at % unusual.len()],
                        })
                        .collect();
                    let points: Vec<f64> = (0..count)
                        .map(|at| match at % 3 {
                            0 => f64::from(range.low),
                            1 => f64::from(range.high),
                            _ => 3.0,
                        })
                        .collect();
                    let inputs = Values::from([
                        (
                            "x".to_owned(),
                            tensor(
                                DType::F32,
                                &[6, 67],
                                &values(range, scales[0].min(1.0), 6 * 67, &mut random),
                            ),
                        ),
                        ("s".to_owned(), tensor(DType::F32, &sizes, &scales)),
                        ("z".to_owned(), tensor(dtype, &sizes, &points)),
                    ]);
                    exactly(&source, &inputs, 1);
                }
            }
        }
    }
}

/// Native code divides by one scale for many without dividing: the last place decides on which side of a tie a quotient is.
#[test]
fn quotients_beside_ties_round_as_divisions_do() {
    let mut random = Random::new(9);
    let mut scales = vec![1.0_f32, f32::from_bits(0x3fff_ffff), f32::from_bits(0x3f80_0001)];
    scales.extend([f32::MIN_POSITIVE, f32::from_bits(3), f32::from_bits(0x007f_ffff)]);
    scales.extend([f32::MAX, f32::from_bits(0x7f00_0001), 1e-30, -0.037, f32::INFINITY, 0.0]);
    scales.extend((0..60).map(|_| f32::from_bits((random.unit().abs() * 2.1e9) as u32)));
    scales.push(f32::NAN);
    for (dtype, codes, zero_point) in [
        (DType::I8, -129..129, None),
        (DType::U8, -2..258, None),
        (DType::U8, -140..140, Some(128.0)),
        (DType::I4, -10..10, None),
    ] {
        let point = if zero_point.is_some() { ", %z" } else { "" };
        let source = format!(
            "graph @g {{
  input %x : f32[N]
  input %s : f32[]
  input %z : {dtype}[]
forward:
  %q : {dtype}[N] = quantize %x, %s{point} {dtype}
  return %q
}}
"
        );
        for &scale in &scales {
            let mut values = vec![0.0, -0.0, 1.0, -3.5, f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
            values.extend([f64::from(f32::MAX), f64::from(f32::MIN), 1e-45]);
            for code in codes.clone() {
                let tie = (f64::from(scale) * (f64::from(code) + 0.5)) as f32;
                let bits = tie.to_bits();
                let near = (-3..=3).map(|step| f32::from_bits(bits.wrapping_add_signed(step)));
                values.extend(near.map(f64::from));
            }
            let count = values.len();
            let inputs = Values::from([
                ("x".to_owned(), tensor(DType::F32, &[count], &values)),
                ("s".to_owned(), Tensor::scalar(DType::F32, f64::from(scale))),
                ("z".to_owned(), Tensor::scalar(dtype, zero_point.unwrap_or(0.0))),
            ]);
            exactly(&source, &inputs, count);
        }
    }
}

#[test]
fn what_has_no_code_of_its_own_is_told() {
    for (dtype, zero_point, wanted) in [
        (DType::I8, None, [-127.0, 127.0, 0.0]),
        (DType::I8, Some(3.0), [-128.0, 127.0, 3.0]),
        (DType::U8, Some(100.0), [0.0, 255.0, 100.0]),
        (DType::I4, None, [-7.0, 7.0, 0.0]),
        (DType::I4, Some(-2.0), [-8.0, 7.0, -2.0]),
        (DType::U4, Some(15.0), [0.0, 15.0, 15.0]),
        (DType::F8E4M3, None, [-448.0, 448.0, f64::NAN]),
        (DType::F8E5M2, None, [-57344.0, 57344.0, f64::NAN]),
    ] {
        let point = if zero_point.is_some() { ", %z" } else { "" };
        let source = format!(
            "graph @g {{
  input %x : f32[4]
  input %zeros : f32[4]
  const %s : f32[] = 0.5
  const %null : f32[] = 0
  input %z : {dtype}[]
forward:
  %q : {dtype}[4] = quantize %x, %s{point} {dtype}
  %n : {dtype}[4] = quantize %x, %null{point} {dtype}
  %q0 : {dtype}[4] = quantize %zeros, %s{point} {dtype}
  %y0 : f32[4] = dequantize %q0, %s{point}
  return %q, %n, %q0, %y0
}}
"
        );
        let given = [f64::NEG_INFINITY, f64::INFINITY, f64::NAN, 0.25];
        let zero = zero_point.unwrap_or(0.0);
        let inputs = Values::from([
            ("x".to_owned(), tensor(DType::F32, &[4], &given)),
            ("zeros".to_owned(), tensor(DType::F32, &[4], &[0.0; 4])),
            ("z".to_owned(), tensor(dtype, &[], &[zero])),
        ]);
        let got = exactly(&source, &inputs, 1);
        let q = got["q"].to_f64();
        for (got, wanted) in q.iter().zip(wanted) {
            assert!(*got == wanted || (got.is_nan() && wanted.is_nan()), "{dtype}: {q:?}");
        }
        assert_eq!(got["q0"].to_f64(), [zero; 4], "{dtype}: zeros");
        assert_eq!(got["y0"].to_f64(), [0.0; 4], "{dtype}: zeros");
        // Without a scale, everything is what dequantizes to 0.
        assert_eq!(got["n"].to_f64(), [zero; 4], "{dtype}: a scale of 0");
    }
}

#[test]
fn all_codes_of_a_float_of_8_bits_round_trip() {
    for dtype in [DType::F8E4M3, DType::F8E5M2] {
        let codes = Tensor::from_bytes(dtype, vec![256], (0..=255).collect()).expect("256 codes");
        let source = format!(
            "graph @g {{
  input %x : {dtype}[N]
  const %one : f32[] = 1
forward:
  %wide : f32[N] = cast %x
  %back : {dtype}[N] = cast %wide
  %q : {dtype}[N] = quantize %wide, %one {dtype}
  %y : f32[N] = dequantize %x, %one
  return %wide, %back, %q, %y
}}
"
        );
        let got = exactly(&source, &Values::from([("x".to_owned(), codes.clone())]), 256);
        let format = Float8::of(dtype).expect("a float of 8 bits");
        let max = format.max();
        assert_eq!(max, if dtype == DType::F8E4M3 { 448.0 } else { 57344.0 });
        for (at, wide) in got["wide"].to_f64().into_iter().enumerate() {
            assert_eq!(wide.is_nan(), codes.get_f64(at).is_nan());
            let [back, q] = ["back", "q"].map(|name| got[name].get_f64(at));
            assert!(back == wide || wide.is_nan() && back.is_nan(), "code {at}: {back}");
            // Quantization saturates, infinity too.
            let held = wide.clamp(-max, max);
            assert!(q == held || wide.is_nan() && q.is_nan(), "code {at}: {q}");
        }
    }
}

/// The graph with what `build` adds as its output `y`.
fn extended(
    source: &str,
    build: impl FnOnce(&mut qcompile_ir::Graph) -> qcompile_ir::NodeId,
) -> String {
    let mut graph = parse(source);
    let y = build(&mut graph);
    graph.add_output("y", y);
    graph.sweep();
    graph.to_string()
}

#[test]
fn codes_of_4_bits_come_back_from_their_bytes() {
    for (dtype, low) in [("i4", -8.0), ("u4", 0.0)] {
        for (shape, sizes) in [
            ("N, 2, 8", vec![5, 2, 8]),
            ("N, 7", vec![5, 7]),
            ("3, N, 5", vec![3, 5, 5]),
            ("16, 16", vec![16, 16]),
            ("33", vec![33]),
            ("", vec![]),
        ] {
            let source = format!("graph @g {{\n  input %q : {dtype}[{shape}]\nforward:\n}}\n");
            let source = extended(&source, |graph| {
                let q = graph.find("q").expect("declared");
                let ty = graph.ty(q).clone();
                let packed = quantize::pack4(graph, q, Region::Forward).expect("packs");
                let bytes = graph.ty(packed).shape.elements().expect("few").size(5);
                let count: usize = sizes.iter().product();
                assert!(bytes <= count.div_ceil(2) + 5, "{bytes} bytes for {count} codes");
                graph.add_output("packed", packed);
                quantize::unpack4(graph, packed, &ty, Region::Forward).expect("unpacks")
            });
            let count = sizes.iter().product::<usize>();
            let codes: Vec<f64> = (0..count).map(|at| low + (at * 7 % 16) as f64).collect();
            let q = tensor(dtype.parse().expect("a type"), &sizes, &codes);
            let got = exactly(&source, &Values::from([("q".to_owned(), q.clone())]), 5);
            assert_eq!(got["y"], q, "{source}");
        }
    }
}

#[test]
fn stochastic_rounding_is_right_on_average_and_replayable() {
    const DRAWS: usize = 4000;
    let source = "graph @g {
  input %x : f32[N, 6]
  input %step : i64[]
  const %s : f32[6] = [0.5, 0.5, 1, 1, 0.25, 0.25]
forward:
}
";
    for dtype in [DType::I8, DType::I4] {
        let source = extended(source, |graph| {
            let [x, step, scale] =
                ["x", "step", "s"].map(|name| graph.find(name).expect("declared"));
            let draws = quantize::Draws { seed: 11, step };
            let q = quantize::quantize_stochastically(
                graph,
                x,
                scale,
                Some(1),
                dtype,
                draws,
                Region::Forward,
            )
            .expect("rounds");
            let op = qcompile_ir::Op::Dequantize { axis: Some(1) };
            graph.add(op, &[q, scale], "y", Region::Forward).expect("fits")
        });
        // A code, a half, a quarter, one below 0, one out of range and 0.
        let row = [1.5, 0.75, 0.25, -2.9, 100.0, 0.0];
        let x = tensor(DType::F32, &[DRAWS, 6], &row.repeat(DRAWS));
        let step = |step: i64| {
            let step = Tensor::from_i64(&[], &[step]).expect("a scalar");
            Values::from([("x".to_owned(), x.clone()), ("step".to_owned(), step)])
        };
        let got = exactly(&source, &step(3), DRAWS)["y"].clone();
        let high = if dtype == DType::I8 { 127.0 } else { 7.0 };
        for (column, (&x, scale)) in row.iter().zip([0.5, 0.5, 1.0, 1.0, 0.25, 0.25]).enumerate() {
            let draws = (0..DRAWS).map(|row| got.get_f64(row * 6 + column));
            let mean = draws.sum::<f64>() / DRAWS as f64;
            // Five standard deviations: the largest variance is a quarter of the square of a step.
            let bound = 5.0 * 0.5 * scale / (DRAWS as f64).sqrt();
            let wanted = f64::min(x, high * scale);
            assert!((mean - wanted).abs() <= bound, "{dtype}: {mean} for {wanted}");
        }
        assert_eq!(got, exactly(&source, &step(3), DRAWS)["y"], "the same step again");
        assert_ne!(got, exactly(&source, &step(4), DRAWS)["y"], "another step");
    }
}
