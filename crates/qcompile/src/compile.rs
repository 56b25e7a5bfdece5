//! A model in, a plan out.

use crate::about::{About, LayerDecision};
use crate::error::{Code, Error, Result};
use crate::model::{self, draft};
use crate::options::Options;
use crate::sensitivity::bf16_increase;
use crate::street::{Draft, Each, Pass, Street, evaluation_form};
use crate::terminal::Show;
use crate::timing::{Measured, measure};
use crate::timings::Timings;
use crate::train::digest;
use crate::wants::Wants;
use qcompile_passes::quantize::{self, LayerCost, PrecisionChoice};
use qcompile_passes::sensitivity::{Metric, Scores};
use qcompile_plan::{BuildOptions, Plan, build};
use qcompile_runtime::TrainerOptions;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Time that both plans together are measured for.
const MEASURE: Duration = Duration::from_millis(600);

/// What [`compile()`] gives.
#[derive(Debug, Clone)]
pub struct Compiled {
    /// The plan.
    pub plan: Arc<Plan>,
    /// What it says about itself.
    pub about: About,
    /// What was decided for each layer, in the order of the graph, with measured times in the reasons.
    pub decisions: Vec<LayerDecision>,
    /// The scores that the decisions rest on.
    pub scores: Option<Scores>,
    /// The relative increase of the loss that is to be expected: the sum of the leave-one-out scores of the int8 layers,
    /// or what bf16 throughout was measured to do. None where neither was measured.
    pub predicted: Option<f64>,
    /// Measured steps of this plan and of the f32 plan, where they were asked for.
    pub measured: Option<Steps>,
    /// What should be told: assumptions, and where the plan is worse than hoped.
    pub warnings: Vec<String>,
}

/// Measured steps, side by side.
#[derive(Debug, Clone)]
pub struct Steps {
    /// Of the plan.
    pub chosen: Measured,
    /// Of the plan in f32 throughout; none where the plan is that one, or the model came in quantized.
    pub f32: Option<Measured>,
}

impl Compiled {
    /// Whether a layer runs in less than f32.
    #[must_use]
    pub fn is_mixed(&self) -> bool {
        self.about.decisions.iter().any(|decision| decision.precision.is_low())
    }
}

/// Compiles the model at `path`: an `.onnx` file, or a `.qir` graph that goes on from where it stands.
///
/// ```
/// use qcompile::{Options, compile};
///
/// let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
/// let options = Options {
///     loss: Some(qcompile::LossKind::CrossEntropy),
///     precision: qcompile::PrecisionChoice::F32,
///     ..Options::default()
/// };
/// let compiled = compile(format!("{root}/models/digits_mlp.onnx"), &options)?;
/// assert_eq!(compiled.about.loss, "cross-entropy");
/// # Ok::<(), qcompile::error::Error>(())
/// ```
///
/// # Errors
/// For files that cannot be read or are refused, options that do not fit the model, and exhausted limits; each with
/// its code, its place and what to do.
pub fn compile(path: impl AsRef<Path>, options: &Options) -> Result<Compiled> {
    let path = path.as_ref();
    let target = model::open(path)?;
    let draft = draft(&target, path, options)?;
    finish(draft, options, Show::Nothing, &mut |_, _, _| Ok(()))
}

/// Compiles the bytes of an ONNX model, which cannot have external data.
///
/// # Errors
/// As [`compile()`].
pub fn compile_bytes(bytes: &[u8], options: &Options) -> Result<Compiled> {
    let draft = model::import(bytes, None, options)?;
    finish(draft, options, Show::Nothing, &mut |_, _, _| Ok(()))
}

/// Takes a draft to its plan.
pub(crate) fn finish(
    mut draft: Draft,
    options: &Options,
    show: Show,
    each: Each<'_>,
) -> Result<Compiled> {
    options.check()?;
    let mut street = Street::new(options, show, each);
    street.run(&mut draft, Pass::Sensitivity)?;
    let high = (!draft.is_after(Pass::Quantize)).then(|| draft.clone());
    street.run(&mut draft, Pass::LAST)?;
    let mut compiled = Compiled::of(draft, options)?;
    let mut low = Vec::new();
    let mut notes = Vec::new();
    if let Some(high) = high {
        low.extend(bf16_plan(&high, options, &mut notes)?);
        if compiled.is_mixed() && (options.precision.is_measured() || options.measure) {
            low.push(std::mem::replace(&mut compiled, f32_plan(high, options)?));
        }
    }
    let mut compiled = beside_f32(compiled, low, options)?;
    compiled.warnings.extend(notes);
    Ok(compiled)
}

impl Compiled {
    /// The plan of a draft that has been through all passes.
    fn of(draft: Draft, options: &Options) -> Result<Compiled> {
        let wants = Wants::of(&draft.graph, &draft.about)?;
        let build_options =
            BuildOptions { batch_size: wants.batch_size(None, options.batch_size)? };
        // A graph that came in differentiated has its form still to be found.
        let form = match draft.evaluation {
            Some(form) => form,
            None => evaluation_form(&draft.graph)?,
        };
        let evaluation = Some(build(form, &build_options)?);
        let plan = build(draft.graph, &build_options)?.with_meta(draft.about.to_meta()?);
        let plan = plan
            .with_evaluation(evaluation)
            .map_err(|e| Error::new(Code::Internal, e.to_string()))?;
        Ok(Compiled {
            plan: Arc::new(plan),
            warnings: draft.about.warnings.clone(),
            about: draft.about,
            predicted: predicted(&draft.decisions, draft.scores.as_ref()),
            decisions: draft.decisions,
            scores: draft.scores,
            measured: None,
        })
    }
}

/// The sum of the leave-one-out scores of the int8 layers; they say nothing of bf16.
fn predicted(decisions: &[LayerDecision], scores: Option<&Scores>) -> Option<f64> {
    scores.filter(|scores| scores.metric == Metric::LeaveOneOut)?;
    let other = |decision: &&LayerDecision| !decision.precision.has_int8();
    let low: Vec<_> = decisions.iter().filter(|decision| decision.precision.is_low()).collect();
    if low.iter().any(other) {
        return None;
    }
    let scores = low.iter().filter_map(|decision| decision.score);
    Some(scores.fold(0.0, |sum, score| sum + f64::from(score.max(0.0))))
}

/// The plan in f32 throughout.
fn f32_plan(draft: Draft, options: &Options) -> Result<Compiled> {
    let reason = "no lower precision makes the whole step faster";
    plan_in(PrecisionChoice::F32, draft, options, ["f32 was asked for", reason])
}

/// The plan in bf16 throughout, where that is a choice and the loss allows it; else a note says so.
fn bf16_plan(high: &Draft, options: &Options, notes: &mut Vec<String>) -> Result<Option<Compiled>> {
    let free = matches!(options.precision, PrecisionChoice::Auto | PrecisionChoice::F32OrBf16)
        && options.threshold.is_none()
        && options.channel_threshold.is_none();
    if !free || quantize::layers(&high.graph).is_empty() {
        return Ok(None);
    }
    let increase = bf16_increase(high, options)?;
    if !increase.is_finite() || increase > f64::from(options.max_loss_increase) {
        notes.push(format!(
            "bf16 was not tried: it increases the loss by {:.2} %, and --max-loss-increase allows {:.2} %",
            100.0 * increase,
            100.0 * options.max_loss_increase
        ));
        return Ok(None);
    }
    let reasons = ["bf16 was asked for", "bf16 makes the whole step fastest"];
    let compiled = plan_in(PrecisionChoice::Bf16, high.clone(), options, reasons)?;
    Ok(Some(Compiled { predicted: Some(increase), ..compiled }))
}

/// The plan in one precision, where another reason stands in the place of the one that it was asked for.
fn plan_in(
    precision: PrecisionChoice,
    mut draft: Draft,
    options: &Options,
    [asked, reason]: [&str; 2],
) -> Result<Compiled> {
    let fixed = Options {
        precision,
        qat: false,
        threshold: None,
        channel_threshold: None,
        ..options.clone()
    };
    Street::new(&fixed, Show::Nothing, &mut |_, _, _| Ok(())).run(&mut draft, Pass::LAST)?;
    draft.about.options = options.said();
    for decision in draft.decisions.iter_mut().chain(&mut draft.about.decisions) {
        if decision.reason == asked {
            reason.clone_into(&mut decision.reason);
        }
    }
    Compiled::of(draft, options)
}

/// Measures the f32 plan and those of lower precision, and takes the one that was asked for (which then is the only
/// other one); or the fastest, where the choice is free.
fn beside_f32(mut plain: Compiled, mut low: Vec<Compiled>, options: &Options) -> Result<Compiled> {
    let all: Vec<&Compiled> = std::iter::once(&plain).chain(&low).collect();
    let mut measured = if options.measure { measure_steps(&all, options)? } else { Vec::new() };
    let cost = |all: &[Measured], at: usize| LayerCost {
        f32_ms: all[0].step_ms.median,
        low_ms: all[at].step_ms.median,
    };
    let slower = |cost: LayerCost| 100.0 * (cost.low_ms / cost.f32_ms - 1.0);
    let mut chosen = (!low.is_empty()).then_some(0);
    if options.precision.is_measured() {
        let mut timings = Timings::load(options);
        let mut best = f64::INFINITY;
        for (at, candidate) in low.iter().enumerate() {
            let work = format!("step of {}", digest([candidate.plan.to_bytes().as_slice()]));
            let kept = timings.find_or(&work, || match measured[..] {
                [] => Ok(cost(&measure_steps(&[&plain, candidate], options)?, 1)),
                _ => Ok(cost(&measured, at + 1)),
            })?;
            if slower(kept) < best {
                (chosen, best) = (Some(at), slower(kept));
            }
        }
        timings.save();
        if best >= 0.0 && best.is_finite() {
            plain.warnings.push(format!(
                "the fastest plan of lower precision measures {best:.1} % slower than the f32 plan: f32 is taken"
            ));
            chosen = None;
        }
    }
    let Some(at) = chosen else {
        plain.measured =
            (!measured.is_empty()).then(|| Steps { chosen: measured.swap_remove(0), f32: None });
        return Ok(plain);
    };
    let mut mixed = low.swap_remove(at);
    if !measured.is_empty() {
        let longer = slower(cost(&measured, at + 1));
        if longer > 0.0 {
            mixed.warnings.push(format!(
                "the chosen plan's step measures {longer:.1} % slower than the f32 plan's; --precision f32 gives that one"
            ));
        }
        let chosen = measured.swap_remove(at + 1);
        mixed.measured = Some(Steps { chosen, f32: Some(measured.swap_remove(0)) });
    }
    Ok(mixed)
}

fn measure_steps(compiled: &[&Compiled], options: &Options) -> Result<Vec<Measured>> {
    let trainer = TrainerOptions { threads: options.threads, workers: 1, tier: options.tier };
    let plans: Vec<Arc<Plan>> = compiled.iter().map(|one| Arc::clone(&one.plan)).collect();
    let batch = plans.first().map_or(options.batch_size, |plan| plan.batch_size());
    // One time is enough to be told, and too few to be compared.
    let least = if plans.len() > 1 { 3 } else { 1 };
    measure(&plans, batch, &trainer, MEASURE, least)
}
