//! Dropout: what is drawn, what its gradient is, and that every way to run a step draws the same.

use crate::command::Place;
use crate::support::{Random, inputs};
use crate::training::{Recipe, forward, losses, plan, trainer};
use qcompile::data::Array;
use qcompile_ir::{DType, Region, Tensor};
use qcompile_kernels::Tier;
use qcompile_passes::{differentiate, evaluation};
use qcompile_plan::{BuildOptions, build};
use qcompile_runtime::{Trainer, TrainerOptions, checkpoint};
use std::collections::BTreeMap;
use std::sync::Arc;

type Values = BTreeMap<String, Tensor>;

/// `y = dropout(x · w)` of 96 columns, with a ratio of 1/4; its outputs are `y` and what was kept.
const MODEL: &str = "../tests/dropout.onnx";
const COLUMNS: usize = 96;

fn batch(samples: usize, seed: u64) -> Values {
    inputs(&forward(MODEL), samples, COLUMNS, &mut Random::new(seed))
}

/// Outputs of the first training step up to its gradients.
fn first_step(given: &Values, threads: usize, tier: Option<Tier>) -> Values {
    let mut graph = forward(MODEL);
    differentiate::run(&mut graph).expect("differentiable");
    let plan = Arc::new(build(graph, &BuildOptions { batch_size: 8 }).expect("builds"));
    let options = TrainerOptions { threads, workers: 1, tier };
    let mut trainer = Trainer::new(plan, &options).expect("compiles");
    trainer.run(given, Region::Backward).expect("a good batch")
}

#[test]
fn a_quarter_is_dropped_and_the_rest_is_scaled() {
    let samples = 200;
    let given = batch(samples, 1);
    let got = first_step(&given, 2, None);
    let (x, y) = (given["x"].to_f64(), got["y"].to_f64());
    let kept = got["kept"].to_f64();
    let count = kept.len() as f64;
    let share = kept.iter().sum::<f64>() / count;
    // Five standard deviations.
    assert!((share - 0.75).abs() < 5.0 * (0.75 * 0.25 / count).sqrt(), "{share} are kept");
    for column in 0..COLUMNS {
        let part = (0..samples).map(|row| kept[row * COLUMNS + column]).sum::<f64>();
        let deviation = (0.75 * 0.25 / samples as f64).sqrt();
        assert!((part / samples as f64 - 0.75).abs() < 5.0 * deviation, "column {column}: {part}");
    }
    for (at, (x, y)) in x.iter().zip(&y).enumerate() {
        let w = 0.5 + (at % COLUMNS) as f64 / (COLUMNS - 1) as f64;
        let wanted = if kept[at] == 1.0 { x * w / 0.75 } else { 0.0 };
        assert!((y - wanted).abs() < 1e-6, "{at}: {y}, not {wanted}");
    }
}

#[test]
fn the_gradient_is_the_mask_scaled() {
    let samples = 20;
    let given = batch(samples, 2);
    let got = first_step(&given, 1, None);
    let (x, y, kept) = (given["x"].to_f64(), got["y"].to_f64(), got["kept"].to_f64());
    let labels = given["label"].to_i64();
    let mut wanted = vec![0.0; COLUMNS];
    for row in 0..samples {
        let y = &y[row * COLUMNS..][..COLUMNS];
        let sum = y.iter().map(|y| y.exp()).sum::<f64>();
        for (column, wanted) in wanted.iter_mut().enumerate() {
            let hit = f64::from(u8::from(labels[row] == column as i64));
            let dy = (y[column].exp() / sum - hit) / samples as f64;
            let at = row * COLUMNS + column;
            *wanted += dy * kept[at] / 0.75 * x[at];
        }
    }
    for (got, wanted) in got["w.grad"].to_f64().iter().zip(&wanted) {
        assert!((got - wanted).abs() < 1e-6, "{got}, not {wanted}");
    }
}

#[test]
fn threads_and_tiers_draw_the_same() {
    let given = batch(33, 3);
    let kept = first_step(&given, 1, None)["kept"].clone();
    for tier in Tier::ALL.into_iter().filter(|tier| tier.is_supported()) {
        for threads in [1, 3] {
            assert_eq!(first_step(&given, threads, Some(tier))["kept"], kept, "{tier}");
        }
    }
}

#[test]
fn every_step_draws_anew_and_a_checkpoint_goes_on() {
    let plan = plan(MODEL, &Recipe::default());
    let batches: Vec<Values> = vec![batch(12, 4); 4];
    let mut quiet = batches.clone();
    quiet.iter_mut().for_each(|values| {
        values.insert("lr".to_owned(), Tensor::scalar(DType::F32, 0.0));
    });
    let still = losses(&mut trainer(&plan, 1, 1), &quiet);
    assert!(still.windows(2).all(|pair| pair[0] != pair[1]), "{still:?}");

    let mut whole = trainer(&plan, 1, 1);
    let wanted = losses(&mut whole, &batches);
    assert_eq!(whole.states()["step"].to_i64(), [4]);
    let mut begun = trainer(&plan, 1, 2);
    losses(&mut begun, &batches[..2]);
    let bytes = checkpoint::encode(&begun, "{}").expect("encodes");
    let mut resumed = trainer(&plan, 1, 1);
    checkpoint::restore(&mut resumed, &bytes).expect("restores");
    assert_eq!(losses(&mut resumed, &batches[2..]), wanted[2..]);
    assert_eq!(resumed.parameters(), whole.parameters());
}

#[test]
fn workers_draw_for_their_part_what_one_draws() {
    let plan = plan(MODEL, &Recipe::default());
    let batches: Vec<Values> = (5..8).map(|seed| batch(12, seed)).collect();
    let wanted = losses(&mut trainer(&plan, 1, 1), &batches);
    for workers in [2, 3] {
        let got = losses(&mut trainer(&plan, workers, 1), &batches);
        for (got, wanted) in got.iter().zip(&wanted) {
            assert!((got - wanted).abs() <= 1e-5 * wanted.abs(), "{got} and {wanted}");
        }
    }
}

#[test]
fn nothing_is_dropped_where_nothing_trains() {
    let given = batch(7, 9);
    let plan = plan(MODEL, &Recipe::default());
    let got = trainer(&plan, 1, 1).evaluate(&given).expect("a good batch");
    assert!(got["kept"].to_f64().iter().all(|&kept| kept == 1.0));
    for (at, (x, y)) in given["x"].to_f64().iter().zip(got["y"].to_f64()).enumerate() {
        let w = 0.5 + (at % COLUMNS) as f64 / (COLUMNS - 1) as f64;
        assert!((y - x * w).abs() < 1e-6, "{at}: {y}");
    }
    let mut graph = forward(MODEL);
    evaluation::run(&mut graph).expect("evaluates");
    qcompile_passes::simplify::run(&mut graph, &Default::default()).expect("simplifies");
    assert!(!graph.to_string().contains("random"), "{graph}");
}

#[test]
fn a_seed_decides_what_is_dropped() {
    let place = Place::new();
    let x = Array::from_f32(vec![8, COLUMNS], &[1.0; 8 * COLUMNS]).expect("768 numbers");
    place.write_npz("data.npz", &[("x", x.clone()), ("label", x)]);
    place.run("@/../tests/dropout.onnx -o d.qplan --loss mse --optimizer sgd --precision f32 -q");
    let loss = |seed: u64, options: &str| {
        let train = "train d.qplan -q --json --log-every 1 --data data.npz --epochs 1 --batch-size 8 --lr 0";
        let done = place.run(&format!("{train} --seed {seed} {options} -o out{seed}.qplan"));
        done.lines()[0]["loss"].as_f64().expect("a loss")
    };
    assert_eq!(loss(1, "").to_bits(), loss(1, "--threads 1").to_bits());
    assert_ne!(loss(1, "").to_bits(), loss(2, "").to_bits());
}
