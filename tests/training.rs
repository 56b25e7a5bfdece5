//! Training with compiled plans: it learns, repeats to the bit, and refuses what is wrong.

use crate::support::{Random, inputs, root};
use qcompile_ir::{DType, Graph, Region, Tensor};
use qcompile_onnx::{BatchNorm, ImportOptions, import};
use qcompile_passes::attach_loss::LossKind;
use qcompile_passes::quantize::PrecisionChoice;
use qcompile_passes::update::Optimizer;
use qcompile_passes::{
    attach_loss, attention, differentiate, distribute, evaluation, quantize, simplify, update,
};
use qcompile_plan::{BuildOptions, Plan, build};
use qcompile_runtime::{RuntimeError, StepReport, Trainer, TrainerOptions, checkpoint};
use std::collections::BTreeMap;
use std::sync::Arc;

type Values = BTreeMap<String, Tensor>;

pub(crate) struct Recipe {
    pub(crate) optimizer: Optimizer,
    pub(crate) precision: PrecisionChoice,
    pub(crate) synchronize: bool,
}

impl Default for Recipe {
    fn default() -> Recipe {
        Recipe {
            optimizer: Optimizer::Momentum { nesterov: false },
            precision: PrecisionChoice::F32,
            synchronize: false,
        }
    }
}

pub(crate) fn forward(model: &str) -> Graph {
    let bytes = std::fs::read(root().join("models").join(model)).expect("committed");
    let options = ImportOptions { batch_norm: BatchNorm::Train, ..ImportOptions::default() };
    let mut graph = import(&bytes, &options).expect("imports").graph;
    simplify::run(&mut graph, &simplify::Options::default()).expect("simplifies");
    attention::run(&mut graph).expect("recognises");
    attach_loss::run(&mut graph, &attach_loss::Options { kind: LossKind::CrossEntropy })
        .expect("classifies");
    graph
}

pub(crate) fn plan(model: &str, recipe: &Recipe) -> Arc<Plan> {
    let mut graph = forward(model);
    if recipe.synchronize {
        distribute::synchronize_statistics(&mut graph).expect("synchronizes");
    }
    let options = quantize::Options { precision: recipe.precision, ..Default::default() };
    quantize::run(&mut graph, &options).expect("quantizes");
    let mut evaluated = graph.clone();
    evaluation::run(&mut evaluated).expect("evaluates");
    differentiate::run(&mut graph).expect("differentiable");
    quantize::insert_backward(&mut graph).expect("quantizes");
    quantize::optimise(&mut graph).expect("optimises");
    distribute::run(&mut graph).expect("distributes");
    update::run(&mut graph, &update::Options { optimizer: recipe.optimizer }).expect("updates");
    simplify::run(&mut graph, &simplify::Options::default()).expect("simplifies");
    qcompile_ir::verify(&graph).expect("valid");
    let options = BuildOptions { batch_size: 8 };
    let evaluated = build(evaluated, &options).expect("builds");
    let plan = build(graph, &options).expect("builds");
    let plan = plan.with_evaluation(Some(evaluated)).expect("fits");
    Arc::new(plan)
}

pub(crate) fn trainer(plan: &Arc<Plan>, workers: usize, threads: usize) -> Trainer {
    let options = TrainerOptions { threads, workers, tier: None };
    let mut trainer = Trainer::new(Arc::clone(plan), &options).expect("compiles");
    let rates = [
        ("lr", 0.02),
        ("momentum", 0.9),
        ("weight_decay", 1e-4),
        ("grad_clip_norm", 1e3),
        ("beta1", 0.9),
        ("beta2", 0.999),
        ("epsilon", 1e-8),
        ("bias_correction1", 0.1),
        ("bias_correction2", 0.001),
    ];
    for (name, value) in rates {
        if plan.inputs().iter().any(|input| input.name == name) {
            trainer.set_input(name, Tensor::scalar(DType::F32, value)).expect("an input");
        }
    }
    trainer
}

/// A batch of the model's inputs and labels.
fn batch(model: &str, size: usize, seed: u64) -> Values {
    inputs(&forward(model), size, 4, &mut Random::new(seed))
}

pub(crate) fn losses(trainer: &mut Trainer, batches: &[Values]) -> Vec<f32> {
    batches
        .iter()
        .map(|batch| {
            let StepReport { loss, finite, .. } = trainer.step(batch).expect("a good batch");
            assert!(finite);
            loss
        })
        .collect()
}

const MODELS: [&str; 6] = [
    "digits_mlp.onnx",
    "digits_cnn.onnx",
    "resnet8.onnx",
    "tiny_mobilenet.onnx",
    "tiny_bert.onnx",
    "tiny_gpt.onnx",
];

#[test]
fn every_model_learns_a_batch_by_heart() {
    for model in MODELS {
        for precision in [PrecisionChoice::F32, PrecisionChoice::Bf16, PrecisionChoice::Int8] {
            let optimizer = Optimizer::AdamW;
            let plan = plan(model, &Recipe { optimizer, precision, ..Recipe::default() });
            let mut trainer = trainer(&plan, 1, 2);
            trainer.set_input("lr", Tensor::scalar(DType::F32, 0.002)).expect("an input");
            let batch = batch(model, 6, 1);
            let losses = losses(&mut trainer, &vec![batch.clone(); 40]);
            let (first, last) = (losses[0], losses[39]);
            assert!(last < 0.6 * first, "{model} {precision:?}: {losses:?}");
            let evaluated = trainer.evaluate(&batch).expect("evaluates");
            assert!(evaluated["loss"].get_f64(0).is_finite());
            assert!(evaluated.contains_key("logits"), "{:?}", evaluated.keys());
        }
    }
}

#[test]
fn losses_repeat_to_the_bit_for_any_number_of_threads() {
    let models = ["digits_cnn.onnx", "resnet8.onnx", "tiny_mobilenet.onnx", "tiny_gpt.onnx"];
    let precisions = [PrecisionChoice::F32, PrecisionChoice::Bf16, PrecisionChoice::Int8];
    for (model, precision) in models.into_iter().flat_map(|m| precisions.map(|p| (m, p))) {
        let plan = plan(model, &Recipe { precision, ..Recipe::default() });
        // Sizes change from step to step, as at the end of an epoch.
        let batches: Vec<Values> =
            [8, 8, 3, 8, 1].iter().zip(1..).map(|(&n, seed)| batch(model, n, seed)).collect();
        let mut first = trainer(&plan, 1, 1);
        let wanted = losses(&mut first, &batches);
        for threads in [1, 2, 3, 7] {
            let mut again = trainer(&plan, 1, threads);
            assert_eq!(losses(&mut again, &batches), wanted, "{model}: {threads} threads");
            assert_eq!(again.parameters(), first.parameters(), "{model}: {threads} threads");
            assert_eq!(again.states(), first.states(), "{model}: {threads} threads");
        }
    }
}

#[test]
fn bf16_follows_f32() {
    for model in MODELS {
        let batches: Vec<Values> = (1..=40).map(|seed| batch(model, 16, seed % 8)).collect();
        let [f32, bf16] = [PrecisionChoice::F32, PrecisionChoice::Bf16].map(|precision| {
            let plan = plan(model, &Recipe { precision, ..Recipe::default() });
            losses(&mut trainer(&plan, 1, 2), &batches)
        });
        assert_ne!(f32, bf16, "{model}: bf16 rounds");
        let mean = |losses: &[f32]| losses.iter().sum::<f32>() / losses.len() as f32;
        for (f32, bf16) in f32.chunks(8).zip(bf16.chunks(8)) {
            let (f32, bf16) = (mean(f32), mean(bf16));
            assert!((f32 - bf16).abs() <= 0.02 * f32, "{model}: {bf16} is not {f32}");
        }
    }
}

fn check_close(a: &[f32], b: &[f32], what: &str) {
    for (step, (a, b)) in a.iter().zip(b).enumerate() {
        let difference = (a - b).abs() / b.abs().max(1e-6);
        assert!(difference <= 1e-5, "{what}, step {step}: {a} and {b}");
    }
}

#[test]
fn workers_share_a_batch_as_one_worker_takes_it() {
    for model in ["digits_mlp.onnx", "digits_cnn.onnx", "tiny_bert.onnx"] {
        let plan = plan(model, &Recipe::default());
        let batches: Vec<Values> =
            [12, 12, 7, 12, 2].iter().zip(1..).map(|(&n, seed)| batch(model, n, seed)).collect();
        let wanted = losses(&mut trainer(&plan, 1, 2), &batches);
        for workers in [2, 3, 4] {
            let mut shared = trainer(&plan, workers, workers);
            let got = losses(&mut shared, &batches);
            check_close(&got, &wanted, &format!("{model}, {workers} workers"));
            let again = losses(&mut trainer(&plan, workers, 2 * workers), &batches);
            assert_eq!(got, again, "{model}: {workers} workers repeat");
        }
    }
}

#[test]
fn synchronized_statistics_are_those_of_the_whole_batch() {
    let model = "resnet8.onnx";
    let synchronize = true;
    let plan = plan(model, &Recipe { synchronize, ..Recipe::default() });
    let batches: Vec<Values> = (1..4).map(|seed| batch(model, 8, seed)).collect();
    let wanted = losses(&mut trainer(&plan, 1, 2), &batches);
    let got = losses(&mut trainer(&plan, 2, 2), &batches);
    for (got, wanted) in got.iter().zip(&wanted) {
        assert!((got - wanted).abs() <= 1e-4 * wanted.abs(), "{got} and {wanted}");
    }
}

#[test]
fn a_checkpoint_goes_on_to_the_bit() {
    let model = "resnet8.onnx";
    let optimizer = Optimizer::AdamW;
    let plan = plan(model, &Recipe { optimizer, ..Recipe::default() });
    let batches: Vec<Values> = (1..7).map(|seed| batch(model, 4, seed)).collect();
    let mut whole = trainer(&plan, 1, 2);
    let wanted = losses(&mut whole, &batches);
    let mut begun = trainer(&plan, 1, 2);
    losses(&mut begun, &batches[..3]);
    let bytes = checkpoint::encode(&begun, "{\"step\":3}").expect("encodes");
    assert_eq!(bytes, checkpoint::encode(&begun, "{\"step\":3}").expect("encodes"));
    let mut resumed = trainer(&plan, 2, 2);
    let mut resumed_alone = trainer(&plan, 1, 1);
    for trainer in [&mut resumed, &mut resumed_alone] {
        assert_eq!(checkpoint::restore(trainer, &bytes).expect("restores"), "{\"step\":3}");
    }
    assert_eq!(losses(&mut resumed_alone, &batches[3..]), wanted[3..]);
    assert_eq!(resumed_alone.parameters(), whole.parameters());

    // Any damage is refused, and changes nothing.
    let before = begun.parameters();
    let mut random = Random::new(5);
    for _ in 0..200 {
        let mut damaged = bytes.clone();
        let at = random.below(damaged.len());
        damaged[at] ^= 1 << random.below(8);
        let error = checkpoint::restore(&mut begun, &damaged).expect_err("damaged");
        assert!(matches!(error, RuntimeError::Checkpoint(_)), "{error}");
        let cut = &bytes[..at];
        assert!(checkpoint::restore(&mut begun, cut).is_err());
    }
    assert_eq!(begun.parameters(), before);
    let other = self::plan("digits_mlp.onnx", &Recipe::default());
    assert!(checkpoint::restore(&mut trainer(&other, 1, 1), &bytes).is_err());
}

#[test]
fn a_bad_batch_changes_nothing() {
    let model = "tiny_gpt.onnx";
    let plan = plan(model, &Recipe::default());
    for workers in [1, 2] {
        let mut trainer = trainer(&plan, workers, 2);
        let good = batch(model, 4, 1);
        trainer.step(&good).expect("a good batch");
        let (parameters, states) = (trainer.parameters(), trainer.states());
        let changed = |name: &str, at: usize, value: f64| {
            let mut values = good[name].to_f64();
            values[at] = value;
            let mut batch = good.clone();
            let tensor = Tensor::from_f64(good[name].dtype(), good[name].shape(), &values);
            batch.insert(name.to_owned(), tensor.expect("the same shape"));
            batch
        };
        let token = plan.inputs().iter().find(|input| input.ty.dtype == DType::I64);
        let token = token.expect("the model takes tokens").name.clone();
        let error = trainer.step(&changed(&token, 100, 999.0)).expect_err("no such token");
        assert!(
            matches!(&error, RuntimeError::Index { name, position: 100, value: Some(999), .. } if *name == token),
            "{error}"
        );
        let error = trainer.step(&changed("label", 70, 65.0)).expect_err("no such class");
        assert!(
            matches!(&error, RuntimeError::Label { name, position: 70, value: Some(65), .. } if name == "label"),
            "{error}"
        );
        let mut short = good.clone();
        short.remove("label");
        assert!(matches!(trainer.step(&short), Err(RuntimeError::Input { .. })));
        let mut strange = good.clone();
        strange.insert("label".to_owned(), Tensor::zeros(DType::F32, &[4 * 32]));
        assert!(matches!(trainer.step(&strange), Err(RuntimeError::Input { .. })));
        strange.insert("label".to_owned(), Tensor::zeros(DType::I64, &[3 * 32]));
        assert!(matches!(trainer.step(&strange), Err(RuntimeError::Input { .. })));
        strange.insert("label".to_owned(), Tensor::zeros(DType::I64, &[0]));
        assert!(matches!(trainer.step(&strange), Err(RuntimeError::Input { .. })));
        assert_eq!(trainer.parameters(), parameters);
        assert_eq!(trainer.states(), states);
        trainer.step(&good).expect("still a good batch");
    }
}

#[test]
fn what_is_not_finite_is_not_learned() {
    let model = "resnet8.onnx";
    let plan = plan(model, &Recipe::default());
    for workers in [1, 2] {
        let mut trainer = trainer(&plan, workers, 2);
        let mut batch = batch(model, 4, 1);
        let (parameters, states) = (trainer.parameters(), trainer.states());
        let mut values = batch["x"].to_f64();
        values[5] = f64::NAN;
        let shape = batch["x"].shape().to_vec();
        let bad = Tensor::from_f64(DType::F32, &shape, &values).expect("the same shape");
        let good = batch.insert("x".to_owned(), bad).expect("was there");
        let report = trainer.step(&batch).expect("refused by the plan itself");
        assert!(!report.finite);
        assert_eq!(trainer.parameters(), parameters);
        assert_eq!(trainer.states(), states);
        batch.insert("x".to_owned(), good);
        assert!(trainer.step(&batch).expect("a good batch").finite);
        assert_ne!(trainer.parameters(), parameters);
    }
}

#[test]
fn a_plan_from_a_file_trains_alike() {
    let plan = plan("digits_cnn.onnx", &Recipe::default());
    let loaded = Arc::new(Plan::from_bytes(&plan.to_bytes()).expect("loads"));
    let batches: Vec<Values> = (1..4).map(|seed| batch("digits_cnn.onnx", 8, seed)).collect();
    let wanted = losses(&mut trainer(&plan, 1, 1), &batches);
    assert_eq!(losses(&mut trainer(&loaded, 1, 1), &batches), wanted);
    let mut trainer = trainer(&loaded, 1, 1);
    let outputs = trainer.run(&batches[0], Region::Comm).expect("runs");
    assert_eq!(outputs["loss"].to_f32(), wanted[..1]);
}
