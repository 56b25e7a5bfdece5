//! Copies of parameters in low precision that last from step to step: a step computes what it would with copies made
//! anew, whatever comes between two steps.

use crate::support::{Random, inputs};
use crate::training::{Recipe, forward, plan, trainer};
use qcompile_ir::{DType, Region, Tensor, text};
use qcompile_passes::quantize::PrecisionChoice;
use qcompile_passes::update::{Optimizer, keep_casts};
use qcompile_plan::{BuildOptions, Plan, build};
use std::collections::BTreeMap;
use std::sync::Arc;

fn batch(model: &str, size: usize, seed: u64) -> BTreeMap<String, Tensor> {
    inputs(&forward(model), size, 4, &mut Random::new(seed))
}

/// Plans without and with lasting copies.
fn plans(model: &str) -> [Arc<Plan>; 2] {
    let recipe = Recipe {
        precision: PrecisionChoice::Bf16,
        optimizer: Optimizer::AdamW,
        ..Recipe::default()
    };
    let without = plan(model, &recipe);
    let mut graph = without.graph().clone();
    assert!(keep_casts(&mut graph).expect("keeps") > 1, "{model}");
    qcompile_ir::verify(&graph).expect("valid");
    let with = build(graph, &BuildOptions { batch_size: 8 }).expect("builds");
    let with = with.with_evaluation(without.evaluation().cloned()).expect("fits");
    [without, Arc::new(with)]
}

/// All that a run of steps, with all sorts of calls in between, says and leaves.
fn run(plan: &Arc<Plan>, model: &str, workers: usize) -> (Vec<u32>, Vec<BTreeMap<String, Tensor>>) {
    let mut trainer = trainer(plan, workers, workers);
    let (mut losses, mut found) = (Vec::new(), Vec::new());
    let name = plan.params()[0].name.clone();
    let first = trainer.get(&name).expect("a parameter");
    for (round, size) in [8, 8, 3, 8, 8, 8, 16, 8].into_iter().enumerate() {
        let seed = round as u64 + 1;
        match round {
            3 => trainer.set(&name, &first).expect("a parameter"),
            4 => found.push(trainer.evaluate(&batch(model, 8, 20)).expect("evaluates")),
            5 => found.push(trainer.run(&batch(model, 8, 21), Region::Backward).expect("runs")),
            6 => found.push(trainer.run(&batch(model, 8, 22), Region::Forward).expect("runs")),
            _ => {}
        }
        let report = trainer.step(&batch(model, size, seed)).expect("a good batch");
        losses.push(report.loss.to_bits());
        found.push(trainer.parameters());
    }
    (losses, found)
}

#[test]
fn steps_are_the_same_with_copies_that_last() {
    for model in ["digits_mlp.onnx", "digits_cnn.onnx", "tiny_gpt.onnx"] {
        let [without, with] = plans(model);
        let lasting = with.steps().iter().filter(|step| step.lasting).count();
        assert!(lasting > 0 && without.steps().iter().all(|step| !step.lasting), "{model}");
        assert_eq!((without.params(), without.states()), (with.params(), with.states()), "{model}");
        for workers in [1, 2] {
            assert_eq!(run(&without, model, workers), run(&with, model, workers), "{model}");
        }
    }
}

#[test]
fn a_refused_step_leaves_the_copies_right() {
    let model = "digits_mlp.onnx";
    let [without, with] = plans(model);
    let run = |plan: &Arc<Plan>| {
        let mut trainer = trainer(plan, 1, 1);
        let mut bad = batch(model, 8, 1);
        for value in bad.values_mut().filter(|value| value.dtype().is_float()) {
            let nan = vec![f64::NAN; value.to_f64().len()];
            *value = Tensor::from_f64(value.dtype(), value.shape(), &nan).expect("as large");
        }
        let good = |seed| batch(model, 8, seed);
        let steps = [good(2), bad, good(3), good(4)];
        let reports = steps.map(|inputs| {
            let report = trainer.step(&inputs).expect("a batch");
            (report.finite, report.finite.then(|| report.loss.to_bits()))
        });
        (reports, trainer.parameters())
    };
    let (reports, parameters) = run(&with);
    assert_eq!(reports.map(|(finite, _)| finite), [true, false, true, true]);
    assert_eq!((reports, parameters), run(&without));
}

/// Nobody would write these, but a file may hold them: two casts that take over one value, and one that takes over itself.
#[test]
fn casts_share_their_next_value_or_are_their_own() {
    let source = |next: &str, footer: &str| {
        format!(
            "graph @odd {{
  input %x : f32[N, 2]
  param %w : f32[2, 64] = splat 0.5
  const %one : f32[2, 64] = splat 1
forward:
  %x.bf16 : bf16[N, 2] = cast %x
  %x.f32 : f32[N, 2] = cast %x.bf16
  %first : bf16[2, 64] = cast %w
  %second : bf16[2, 64] = cast %w
  %first.f32 : f32[2, 64] = cast %first
  %second.f32 : f32[2, 64] = cast %second
  %y : f32[N, 64] = matmul %x.f32, %first.f32
  %z : f32[N, 64] = matmul %x.f32, %second.f32
  return %y, %z
update:
  %w.next : f32[2, 64] = add %w, %one
  %copy : bf16[2, 64] = cast %w.next
  next %w = {next}
{footer}}}
"
        )
    };
    let run = |source: &str| {
        let graph = text::parse(source, &|_| None).expect("parses");
        qcompile_ir::verify(&graph).expect("valid");
        let plan = Arc::new(build(graph, &BuildOptions { batch_size: 8 }).expect("builds"));
        let lasting = plan.steps().iter().any(|step| step.lasting);
        let mut trainer = trainer(&plan, 1, 1);
        let x = Tensor::from_f64(DType::F32, &[3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let inputs = BTreeMap::from([("x".to_owned(), x.expect("as large"))]);
        let outputs = [(); 3].map(|()| trainer.run(&inputs, Region::Update).expect("runs"));
        (lasting, outputs)
    };
    let shared = "  next %first = %copy\n  next %second = %copy\n";
    let own = "  next %first = %first\n";
    assert_eq!(run(&source("%w.next", shared)), (true, run(&source("%w.next", "")).1));
    assert_eq!(run(&source("%w", own)), run(&source("%w", "")));
}
