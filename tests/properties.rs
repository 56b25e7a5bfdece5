//! What holds for every graph, on graphs that nobody would think of.

use crate::random_graph::{Wanted, random_graph};
use crate::rematerialise::made_again;
use crate::support::{Random, inputs};
use qcompile_ir::eval::{EvalOptions, Rounding, Value, Values, eval};
use qcompile_ir::{Graph, Note, Region, Tensor, text};
use qcompile_kernels::Tier;
use qcompile_passes::{quantize, simplify};
use qcompile_plan::{BuildOptions, Plan, PlanError, build};
use qcompile_runtime::{Trainer, TrainerOptions};
use std::collections::BTreeMap;
use std::sync::Arc;

const ANY: Wanted = Wanted { draws: 40, regions: 4, planned: false, smooth: false };
const SMOOTH: Wanted = Wanted { draws: 40, regions: 3, planned: false, smooth: true };
const PLANNED: Wanted = Wanted { draws: 60, regions: 4, planned: true, smooth: false };
const BATCH: usize = 3;

fn reparsed(graph: &Graph) -> Graph {
    let tensors = text::tensors(graph);
    let source = graph.to_string();
    text::parse(&source, &|digest| tensors.get(&digest).cloned())
        .unwrap_or_else(|errors| panic!("{errors}\n{source}"))
}

#[test]
fn text_says_everything() {
    for seed in 0..300 {
        let graph = random_graph(seed, ANY);
        qcompile_ir::verify(&graph).unwrap_or_else(|errors| panic!("{seed}: {errors}"));
        let again = reparsed(&graph);
        qcompile_ir::verify(&again).unwrap_or_else(|errors| panic!("{seed}: {errors}"));
        assert_eq!(again.to_string(), graph.to_string(), "{seed}");
        let mut swept = graph.clone();
        swept.sweep();
        let mut again = again;
        again.sweep();
        assert_eq!(again.to_string(), swept.to_string(), "{seed}");
    }
}

/// Every value of the graph; none where an index or label is out of range, which is the input's fault.
fn evaluated(graph: &Graph, seed: u64, rounding: Rounding) -> Option<Values> {
    let given = inputs(graph, BATCH, 2, &mut Random::new(seed));
    let options = EvalOptions { rounding, ..EvalOptions::default() };
    eval(graph, &given, BATCH, &options).ok()
}

/// Outputs and next values under names that no pass changes.
fn results(graph: &Graph, values: &Values) -> Vec<(String, Value)> {
    let value = |id| values.value(graph.node(id).name.as_str()).expect("evaluated").clone();
    let outputs = graph.outputs().iter().map(|(name, id)| (name.clone(), value(*id)));
    let next = graph
        .next()
        .iter()
        .map(|(leaf, id)| (format!("next {}", graph.node(*leaf).name), value(*id)));
    let mut results: Vec<(String, Value)> = outputs.chain(next).collect();
    results.sort_by(|(a, _), (b, _)| a.cmp(b));
    results
}

/// The same bits, but that one NaN is as good as another.
fn check_equal(seed: u64, before: &[(String, Value)], after: &[(String, Value)]) {
    for ((name, a), (other, b)) in before.iter().zip(after) {
        assert_eq!((name, &a.shape), (other, &b.shape), "{seed}");
        for (x, y) in a.data.to_f64().into_iter().zip(b.data.to_f64()) {
            assert!(x == y || (x.is_nan() && y.is_nan()), "{seed}: {name}: {x} became {y}");
        }
    }
}

/// The graph without its notes.
fn bare(graph: &Graph) -> Graph {
    let mut bare = graph.clone();
    for id in graph.ids() {
        *bare.note_mut(id) = Note::default();
    }
    bare
}

#[test]
fn notes_change_nothing() {
    let mut planned = 0;
    for seed in 0..60 {
        let graph = random_graph(seed, ANY);
        if let Some(values) = evaluated(&graph, seed, Rounding::PerOp) {
            let bare = bare(&graph);
            let bare_values = evaluated(&bare, seed, Rounding::PerOp).expect("as with notes");
            check_equal(seed, &results(&graph, &values), &results(&bare, &bare_values));
        }
        let graph = random_graph(seed, PLANNED);
        let plan = |graph: Graph| build(graph, &BuildOptions { batch_size: BATCH });
        match (plan(bare(&graph)), plan(graph)) {
            (Ok(bare), Ok(noted)) => {
                assert_eq!(bare.to_string(), noted.to_string(), "{seed}");
                planned += 1;
            }
            (Err(bare), Err(noted)) => assert_eq!(bare.to_string(), noted.to_string(), "{seed}"),
            (bare, noted) => panic!("{seed}: {bare:?} without notes, {noted:?} with them"),
        }
    }
    assert!(planned > 20, "only {planned} graphs have a plan");
}

/// Checks that `change` keeps every bit of random graphs where all values are finite. Returns the sum of what it counts
/// in the graphs that were compared.
fn kept_bits(change: &dyn Fn(u64, &mut Graph) -> usize) -> usize {
    let mut counted = 0;
    for seed in 0..200 {
        let graph = random_graph(seed, ANY);
        let mut changed = graph.clone();
        let count = change(seed, &mut changed);
        qcompile_ir::verify(&changed).unwrap_or_else(|errors| panic!("{seed}: {errors}"));
        let Some(values) = evaluated(&graph, seed, Rounding::PerOp) else { continue };
        let Some(after) = evaluated(&changed, seed, Rounding::PerOp) else {
            panic!("{seed}: the changed graph does not evaluate");
        };
        // The rules hold for finite numbers.
        let finite = graph.ids().all(|id| {
            let name = graph.node(id).name.as_str();
            values.get_f64(name).is_none_or(|values| values.iter().all(|value| value.is_finite()))
        });
        if finite {
            check_equal(seed, &results(&graph, &values), &results(&changed, &after));
            counted += count;
        }
    }
    counted
}

#[test]
fn moving_quantization_keeps_every_bit() {
    let moved = kept_bits(&|seed, graph| {
        let moves = quantize::optimise(graph).unwrap_or_else(|error| panic!("{seed}: {error}"));
        assert_eq!(moves.unsaturated, 0, "{seed}");
        moves.changed
    });
    assert!(moved > 20, "only {moved} values moved: the graphs have nothing to move");
}

#[test]
fn joining_pairs_keeps_every_bit() {
    let joined = kept_bits(&|seed, graph| {
        quantize::join_pairs(graph).unwrap_or_else(|error| panic!("{seed}: {error}"))
    });
    assert!(joined > 0, "no pair is apart in any graph");
}

#[test]
fn simplification_keeps_results_within_rounding() {
    let mut fewer = 0;
    for seed in 0..200 {
        let graph = random_graph(seed, SMOOTH);
        let mut simplified = graph.clone();
        simplify::run(&mut simplified, &simplify::Options::default())
            .unwrap_or_else(|error| panic!("{seed}: {error}"));
        qcompile_ir::verify(&simplified).unwrap_or_else(|errors| panic!("{seed}: {errors}"));
        let mut swept = graph.clone();
        swept.sweep();
        fewer += usize::from(simplified.len() < swept.len());
        let Some(values) = evaluated(&graph, seed, Rounding::Exact) else { continue };
        let after = evaluated(&simplified, seed, Rounding::Exact);
        let Some(after) = after else { panic!("{seed}: the simplified graph does not evaluate") };
        let (before, after) = (results(&graph, &values), results(&simplified, &after));
        for ((name, a), (_, b)) in before.iter().zip(&after) {
            assert_eq!(a.shape, b.shape, "{seed}: {name}");
            let finite = a.data.to_f64().into_iter().filter(|x| x.is_finite());
            let largest = finite.fold(1.0_f64, |most, x| most.max(x.abs()));
            for (x, y) in a.data.to_f64().into_iter().zip(b.data.to_f64()) {
                // Constants fold to f32 where the evaluation was exact.
                let near = x == y || (x - y).abs() <= 1e-4 * largest;
                assert!(near || (x.is_nan() && y.is_nan()), "{seed}: {name}: {x} became {y}");
            }
        }
        let once = simplified.to_string();
        simplify::run(&mut simplified, &simplify::Options::default()).expect("simplifies");
        assert_eq!(simplified.to_string(), once, "{seed}: a second run changes something");
    }
    assert!(fewer > 50, "only {fewer} graphs became smaller");
}

#[test]
fn every_graph_has_a_plan_or_an_error() {
    let mut planned = 0;
    for seed in 0..300 {
        let graph = random_graph(seed, PLANNED);
        match build(graph, &BuildOptions { batch_size: BATCH }) {
            Err(PlanError::Verify(error)) => panic!("{seed}: {error}"),
            Err(_) => {}
            Ok(plan) => {
                planned += 1;
                let bytes = plan.to_bytes();
                let loaded =
                    Plan::from_bytes(&bytes).unwrap_or_else(|error| panic!("{seed}: {error}"));
                assert!(loaded.to_bytes() == bytes, "{seed}: the file changes");
                assert_eq!(loaded.to_string(), plan.to_string(), "{seed}: the plan changes");
            }
        }
    }
    assert!(planned > 30, "only {planned} graphs have a plan");
}

/// What a plan gives on a tier with so many threads; nothing if an index is out of range.
fn run(plan: &Arc<Plan>, tier: Tier, threads: usize) -> Option<BTreeMap<String, Tensor>> {
    let inputs = plan.inputs().iter().map(|input| {
        let (dtype, sizes) = (input.ty.dtype, input.ty.shape.sizes(BATCH));
        let count: usize = sizes.iter().product();
        let value = |at: usize| match dtype.is_float() {
            true => (at * 37 % 101) as f64 / 50.0 - 1.0,
            false => (at % 2) as f64,
        };
        let values: Vec<f64> = (0..count).map(value).collect();
        (input.name.clone(), Tensor::from_f64(dtype, &sizes, &values).expect("sizes fit"))
    });
    let options = TrainerOptions { threads, workers: 1, tier: Some(tier) };
    let mut trainer = Trainer::new(Arc::clone(plan), &options).expect("compiles");
    trainer.run(&inputs.collect(), Region::Comm).ok()
}

#[test]
fn making_values_again_keeps_every_bit() {
    let (mut ran, mut made) = (0, 0);
    for seed in 0..300 {
        let graph = random_graph(seed, PLANNED);
        let Ok(plan) = build(graph, &BuildOptions { batch_size: BATCH }) else { continue };
        let (graph, copied) = made_again(&plan, BATCH, None);
        let again = build(graph, &BuildOptions { batch_size: BATCH })
            .unwrap_or_else(|error| panic!("{seed}: {error}"));
        let Some(wanted) = run(&Arc::new(plan), Tier::detect(), 1) else { continue };
        let got = run(&Arc::new(again), Tier::detect(), 2).expect("as without");
        assert_eq!(got, wanted, "{seed}");
        ran += 1;
        made += copied.values;
    }
    assert!(ran > 100 && made > 20, "only {made} values of {ran} graphs");
}

#[test]
fn tiers_agree_and_threads_change_nothing() {
    let mut ran = 0;
    for seed in 0..150 {
        let graph = random_graph(seed, PLANNED);
        let Ok(plan) = build(graph, &BuildOptions { batch_size: BATCH }) else { continue };
        let plan = Arc::new(plan);
        let Some(first) = run(&plan, Tier::Portable, 1) else { continue };
        ran += 1;
        for tier in Tier::ALL.into_iter().filter(|tier| tier.is_supported()) {
            let got = run(&plan, tier, 1).expect("as on another tier");
            assert_eq!(run(&plan, tier, 3).as_ref(), Some(&got), "{seed}: {tier}, three threads");
            for (name, wanted) in &first {
                let wanted = wanted.to_f64();
                let finite = wanted.iter().filter(|x| x.is_finite());
                let largest = finite.fold(1e-3_f64, |most, x| most.max(x.abs()));
                for (x, y) in wanted.iter().zip(got[name].to_f64()) {
                    let near = *x == y || (x - y).abs() <= 1e-2 * largest;
                    assert!(near || (x.is_nan() && y.is_nan()), "{seed}: {tier}: {name}: {x}, {y}");
                }
            }
        }
    }
    assert!(ran > 50, "only {ran} graphs ran");
}
