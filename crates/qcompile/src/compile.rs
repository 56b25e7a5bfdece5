//! A model in, a plan out.

use crate::about::{About, LayerDecision};
use crate::error::{Code, Error, Result};
use crate::model::{self, draft};
use crate::options::Options;
use crate::street::{Draft, Each, Pass, Street, evaluation_form};
use crate::terminal::Show;
use crate::timing::{Measured, measure};
use crate::timings::Timings;
use crate::train::digest;
use crate::wants::Wants;
use qcompile_passes::quantize::{LayerCost, PrecisionChoice};
use qcompile_passes::sensitivity::Scores;
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
    /// Whether a layer runs in int8.
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
    let mut street = Street::new(options, show, each);
    street.run(&mut draft, Pass::Sensitivity)?;
    let high = (!draft.is_after(Pass::Quantize)).then(|| draft.clone());
    street.run(&mut draft, Pass::LAST)?;
    let mut compiled = Compiled::of(draft, options)?;
    let high = high.filter(|_| compiled.is_mixed());
    let chooses = options.precision == PrecisionChoice::Auto;
    let Some(high) = high.filter(|_| chooses || options.measure) else {
        if options.measure {
            let chosen = measure_steps(&[&compiled], options)?.pop();
            compiled.measured = chosen.map(|chosen| Steps { chosen, f32: None });
        }
        return Ok(compiled);
    };
    let plain = f32_plan(high, options)?;
    beside_f32(compiled, plain, options)
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
            decisions: draft.decisions,
            scores: draft.scores,
            measured: None,
        })
    }
}

/// The plan in f32 throughout.
fn f32_plan(mut draft: Draft, options: &Options) -> Result<Compiled> {
    let high = Options { precision: PrecisionChoice::F32, ..options.clone() };
    Street::new(&high, Show::Nothing, &mut |_, _, _| Ok(())).run(&mut draft, Pass::LAST)?;
    draft.about.options = options.said();
    let reason = "int8 does not make the whole step faster";
    for decision in draft.decisions.iter_mut().chain(&mut draft.about.decisions) {
        if decision.reason == "f32 was asked for" {
            reason.clone_into(&mut decision.reason);
        }
    }
    Compiled::of(draft, options)
}

/// Measures both plans; where the choice is free and the mixed plan is not faster, the f32 plan is the result.
fn beside_f32(mut mixed: Compiled, mut plain: Compiled, options: &Options) -> Result<Compiled> {
    let both = || -> Result<[Measured; 2]> {
        let both = measure_steps(&[&plain, &mixed], options)?.try_into();
        both.map_err(|_| Error::new(Code::Internal, "two plans give two measurements"))
    };
    let medians = |[f32, chosen]: &[Measured; 2]| LayerCost {
        f32_ms: f32.step_ms.median,
        int8_ms: chosen.step_ms.median,
    };
    let slower = |cost: LayerCost| 100.0 * (cost.int8_ms / cost.f32_ms - 1.0);
    let measured = if options.measure { Some(both()?) } else { None };
    if options.precision == PrecisionChoice::Auto {
        let mut timings = Timings::load(options);
        let work = format!("step of {}", digest([mixed.plan.to_bytes().as_slice()]));
        let kept = timings.find_or(&work, || match &measured {
            Some(measured) => Ok(medians(measured)),
            None => Ok(medians(&both()?)),
        })?;
        timings.save();
        if slower(kept) >= 0.0 {
            plain.warnings.push(format!(
                "layers measure faster in int8, but the whole step {:.1} % slower: f32 is taken",
                slower(kept)
            ));
            plain.measured = measured.map(|[chosen, _]| Steps { chosen, f32: None });
            return Ok(plain);
        }
    }
    if let Some(slower) = measured.as_ref().map(|both| slower(medians(both))).filter(|x| *x > 0.0) {
        mixed.warnings.push(format!(
            "the chosen plan's step measures {slower:.1} % slower than the f32 plan's; --precision f32 gives that one"
        ));
    }
    mixed.measured = measured.map(|[f32, chosen]| Steps { chosen, f32: Some(f32) });
    Ok(mixed)
}

fn measure_steps(compiled: &[&Compiled], options: &Options) -> Result<Vec<Measured>> {
    let trainer = TrainerOptions { threads: options.threads, workers: 1, tier: options.tier };
    let plans: Vec<Arc<Plan>> = compiled.iter().map(|one| Arc::clone(&one.plan)).collect();
    let batch = plans.first().map_or(options.batch_size, |plan| plan.batch_size());
    measure(&plans, batch, &trainer, MEASURE)
}
