//! A model in, a plan out.

use crate::about::{About, LayerDecision};
use crate::error::{Code, Error, Result};
use crate::model::{self, draft};
use crate::options::Options;
use crate::street::{Draft, Each, Pass, Street};
use crate::terminal::Show;
use crate::timing::{Measured, measure};
use crate::wants::Wants;
use qcompile_passes::quantize::PrecisionChoice;
use qcompile_passes::sensitivity::Scores;
use qcompile_plan::{BuildOptions, Plan, build};
use qcompile_runtime::TrainerOptions;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Time that both plans together are measured for.
const MEASURE: Duration = Duration::from_millis(600);

/// What [`compile`] gives.
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
/// As [`compile`].
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
    let resumed_late = high.is_none();
    if resumed_late && !draft.about.states.is_empty() {
        draft.about.warnings.push(
            "the graph came in differentiated: evaluation uses the statistics of its batches"
                .to_owned(),
        );
    }
    let plan = Arc::new(plan_of(&draft, options)?);
    let mut compiled = Compiled {
        plan,
        warnings: draft.about.warnings.clone(),
        about: draft.about,
        decisions: draft.decisions,
        scores: draft.scores,
        measured: None,
    };
    if options.measure {
        let high = high.filter(|_| compiled.is_mixed());
        let plain = high.map(|high| f32_plan(high, options)).transpose()?;
        measure_steps(&mut compiled, plain, options)?;
    }
    Ok(compiled)
}

/// The plan of a draft that has been through all passes.
fn plan_of(draft: &Draft, options: &Options) -> Result<Plan> {
    let wants = Wants::of(&draft.graph, &draft.about)?;
    let build_options = BuildOptions { batch_size: wants.batch_size(None, options.batch_size)? };
    let evaluation =
        draft.evaluation.clone().map(|form| build(form, &build_options)).transpose()?;
    let plan = build(draft.graph.clone(), &build_options)?;
    let plan = plan.with_meta(draft.about.to_meta()?);
    plan.with_evaluation(evaluation).map_err(|e| Error::new(Code::Internal, e.to_string()))
}

fn f32_plan(mut draft: Draft, options: &Options) -> Result<Arc<Plan>> {
    let options = Options { precision: PrecisionChoice::F32, ..options.clone() };
    Street::new(&options, Show::Nothing, &mut |_, _, _| Ok(())).run(&mut draft, Pass::LAST)?;
    Ok(Arc::new(plan_of(&draft, &options)?))
}

fn measure_steps(
    compiled: &mut Compiled,
    plain: Option<Arc<Plan>>,
    options: &Options,
) -> Result<()> {
    let trainer = TrainerOptions { threads: options.threads, workers: 1, tier: options.tier };
    let mut plans = vec![Arc::clone(&compiled.plan)];
    plans.extend(plain);
    let batch = compiled.plan.batch_size();
    let mut measured = measure(&plans, batch, &trainer, MEASURE)?.into_iter();
    let Some(chosen) = measured.next() else { return Ok(()) };
    let f32 = measured.next();
    if let Some(f32) = &f32
        && chosen.step_ms.median > f32.step_ms.median
    {
        compiled.warnings.push(format!(
            "the chosen plan's step measures {:.1} % slower than the f32 plan's; --precision f32 gives that one",
            100.0 * (chosen.step_ms.median / f32.step_ms.median - 1.0)
        ));
    }
    compiled.measured = Some(Steps { chosen, f32 });
    Ok(())
}
