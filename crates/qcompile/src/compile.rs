//! A model in, a plan out.

use crate::about::{About, LayerDecision};
use crate::error::{Code, Error, Result};
use crate::memory_limit::MEMORY_LIMIT;
use crate::model::{self, draft};
use crate::options::Options;
use crate::sensitivity::{Calibration, increase};
use crate::street::{Draft, Each, Pass, Street, evaluation_form};
use crate::terminal::{Show, bytes};
use crate::timing::{Measured, measure};
use crate::timings::Timings;
use crate::train::digest;
use crate::wants::Wants;
use qcompile_ir::DType;
use qcompile_passes::quantize::{self, LayerCost, PrecisionChoice};
use qcompile_passes::sensitivity::{Metric, Scores};
use qcompile_plan::{BuildOptions, Plan, build};
use qcompile_runtime::TrainerOptions;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Time that both plans together are measured for.
const MEASURE: Duration = Duration::from_millis(600);
/// A slower step is told of from this part on: less is noise.
const TOLD_SLOWDOWN: f64 = 0.01;

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
    /// or what bf16, with its int8 layers, was measured to do. None where neither was measured.
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
    /// Of the plan in bf16 throughout, where the plan has int8 layers within that one.
    pub bf16: Option<Measured>,
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
    finish(draft, options, Show::Nothing, None)
}

/// Compiles the bytes of an ONNX model, which cannot have external data.
///
/// # Errors
/// As [`compile()`].
pub fn compile_bytes(bytes: &[u8], options: &Options) -> Result<Compiled> {
    let draft = model::import(bytes, None, options)?;
    finish(draft, options, Show::Nothing, None)
}

/// Takes a draft to its plan. `each` is told of the passes that led to it.
pub(crate) fn finish(
    mut draft: Draft,
    options: &Options,
    show: Show,
    mut each: Option<Each<'_>>,
) -> Result<Compiled> {
    options.check()?;
    advance(&mut draft, Pass::Sensitivity, options, show, &mut each)?;
    if draft.is_after(Pass::Quantize) {
        advance(&mut draft, Pass::LAST, options, show, &mut each)?;
        let mut compiled = Compiled::of(draft, options)?;
        compiled.measured = alone(&compiled, options)?;
        return Ok(compiled);
    }
    let mut candidates = Candidates::new(&draft, options, show);
    for &choice in options.precision.candidates() {
        candidates.add(choice, each.is_some())?;
    }
    if options.measure && !candidates.all.is_empty() {
        candidates.add_references()?;
    }
    if let Some(error) = candidates.too_large.take().filter(|_| candidates.all.is_empty()) {
        return Err(error);
    }
    let mut chosen = choose(std::mem::take(&mut candidates.all), options)?;
    if options.measure && !options.saved.is_empty() && options.memory_limit.is_none() {
        let slower = candidates.slower_by_compression(&chosen)?;
        chosen.compiled.warnings.extend(slower);
    }
    if let Some((mut quantized, took)) = chosen.quantized.take()
        && let Some(each) = &mut each
    {
        each(Pass::Quantize, &quantized, took)?;
        Street::new(options, Show::Nothing, *each).run(&mut quantized, Pass::LAST)?;
    }
    chosen.compiled.warnings.extend(candidates.notes);
    Ok(chosen.compiled)
}

/// Takes a draft up to and with `last`.
fn advance(
    draft: &mut Draft,
    last: Pass,
    options: &Options,
    show: Show,
    each: &mut Option<Each<'_>>,
) -> Result<()> {
    match each {
        Some(each) => Street::new(options, show, *each).run(draft, last),
        None => Street::new(options, show, &mut |_, _, _| Ok(())).run(draft, last),
    }
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
            warnings: draft.about.warnings.iter().cloned().chain(draft.remarks).collect(),
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
    let other = |decision: &&LayerDecision| !decision.precision.is_quantized();
    let low: Vec<_> = decisions.iter().filter(|decision| decision.precision.is_low()).collect();
    if low.iter().any(other) {
        return None;
    }
    let scores = low.iter().filter_map(|decision| decision.score);
    Some(scores.fold(0.0, |sum, score| sum + f64::from(score.max(0.0))))
}

/// A plan among those that are compared.
struct Candidate {
    choice: PrecisionChoice,
    /// Whether it may be taken; else it stands beside the others to be measured.
    eligible: bool,
    compiled: Compiled,
    /// What it was after [`Pass::Quantize`], and how long that took; kept where it is to be told.
    quantized: Option<(Draft, Duration)>,
}

/// The plans that are compared, as they are made.
struct Candidates<'a> {
    /// The scored draft that all begin with.
    high: &'a Draft,
    options: &'a Options,
    show: Show,
    /// What losses are measured on, once one is.
    calibration: Option<Calibration>,
    all: Vec<Candidate>,
    /// Why a plan is not among them.
    notes: Vec<String>,
    /// The last that does not fit into the memory.
    too_large: Option<Error>,
}

impl<'a> Candidates<'a> {
    fn new(high: &'a Draft, options: &'a Options, show: Show) -> Candidates<'a> {
        let (all, notes) = (Vec::new(), Vec::new());
        Candidates { high, options, show, calibration: None, all, notes, too_large: None }
    }

    /// Adds the plan of one fixed choice: as long as the loss allows it, and it is another than those that are there.
    fn add(&mut self, choice: PrecisionChoice, keep: bool) -> Result<()> {
        let free = self.options.precision.is_measured();
        let bf16 = choice.base() == DType::BF16;
        // A threshold says what is int8, not that nothing is.
        let skipped = choice == PrecisionChoice::Bf16 && self.options.has_threshold();
        if free
            && !self.all.is_empty()
            && (skipped || quantize::layers(&self.high.graph).is_empty())
        {
            return Ok(());
        }
        let fixed = self.fixed(choice);
        let mut draft = self.high.clone();
        let begin = Instant::now();
        Street::new(&fixed, self.show, &mut |_, _, _| Ok(())).run(&mut draft, Pass::Quantize)?;
        let took = begin.elapsed();
        let mut predicted = None;
        if free && bf16 {
            let increase = self.increase(&draft)?;
            if !self.allows(increase, choice) {
                return Ok(());
            }
            predicted = Some(increase);
        }
        let quantized = keep.then(|| (draft.clone(), took));
        let mut compiled = match self.compiled(draft, &fixed) {
            Err(error) if free && error.code() == Code::MemoryLimit => {
                self.notes.push(format!("{} was left out: {}", choice.name(), error.cause()));
                self.too_large = Some(error);
                return Ok(());
            }
            compiled => compiled?,
        };
        compiled.predicted = predicted.or(compiled.predicted);
        let has_int8 = compiled.about.decisions.iter().any(|d| d.precision.is_quantized());
        let same = self.all.iter().position(|known| {
            choice.has_int8() && !has_int8 && known.choice.base() == choice.base()
        });
        let candidate = Candidate { choice, eligible: true, compiled, quantized };
        match same {
            // The same plan, with the reasons why no layer is int8.
            Some(at) => self.all[at] = candidate,
            None => self.all.push(candidate),
        }
        Ok(())
    }

    /// Adds what a plan of lower precision is measured against, where that is not there.
    fn add_references(&mut self) -> Result<()> {
        let int8 = self.all.iter().any(|known| known.choice == PrecisionChoice::MixedBf16);
        let low = self.all.iter().any(|known| known.compiled.is_mixed());
        for (choice, wanted) in [(PrecisionChoice::F32, low), (PrecisionChoice::Bf16, int8)] {
            let known = |known: &Candidate| known.stands_for(choice);
            if !wanted || self.all.iter().any(known) {
                continue;
            }
            let fixed = self.fixed(choice);
            let mut draft = self.high.clone();
            Street::new(&fixed, Show::Nothing, &mut |_, _, _| Ok(()))
                .run(&mut draft, Pass::Quantize)?;
            match self.compiled(draft, &fixed) {
                Err(error) if error.code() == Code::MemoryLimit => {}
                compiled => {
                    let compiled = compiled?;
                    self.all.push(Candidate { choice, eligible: false, compiled, quantized: None });
                }
            }
        }
        Ok(())
    }

    /// That `--compress` makes a step slower, with the figure.
    fn slower_by_compression(&self, chosen: &Candidate) -> Result<Option<String>> {
        let plain = Options { saved: Vec::new(), ..self.fixed(chosen.choice) };
        let mut draft = self.high.clone();
        Street::new(&plain, Show::Nothing, &mut |_, _, _| Ok(()))
            .run(&mut draft, Pass::Quantize)?;
        let plain = self.compiled(draft, &plain)?;
        let saved = |compiled: &Compiled| compiled.plan.saved_bytes(compiled.plan.batch_size());
        if saved(&plain) == saved(&chosen.compiled) {
            return Ok(None);
        }
        let measured = measure_steps(&[&plain, &chosen.compiled], self.options)?;
        let [without, with] = [&measured[0], &measured[1]];
        let longer = with.step_ms.median / without.step_ms.median - 1.0;
        Ok((longer >= TOLD_SLOWDOWN).then(|| {
            format!(
                "--compress makes a step {:.1} % slower; its memory is {} in the place of {}",
                100.0 * longer,
                bytes(with.peak_bytes as u64),
                bytes(without.peak_bytes as u64)
            )
        }))
    }

    /// The options with this choice.
    fn fixed(&self, precision: PrecisionChoice) -> Options {
        let mut fixed = Options { precision, ..self.options.clone() };
        fixed.qat &= precision.has_int8();
        fixed.measure_layers = self.options.precision.is_measured();
        if !precision.has_int8() {
            (fixed.threshold, fixed.channel_threshold) = (None, None);
            fixed.channel_policy = None;
        }
        fixed
    }

    /// The plan of a draft that is quantized.
    fn compiled(&self, mut draft: Draft, fixed: &Options) -> Result<Compiled> {
        Street::new(fixed, Show::Nothing, &mut |_, _, _| Ok(())).run(&mut draft, Pass::LAST)?;
        let limit = draft.about.options.remove_entry(MEMORY_LIMIT);
        draft.about.options = self.options.said();
        draft.about.options.extend(limit);
        if self.options.precision.is_measured() {
            for decision in draft.decisions.iter_mut().chain(&mut draft.about.decisions) {
                let reason = match decision.reason.as_str() {
                    "f32 was asked for" => "no lower precision makes the whole step faster",
                    "bf16 was asked for" => "bf16 makes the whole step fastest",
                    _ => continue,
                };
                reason.clone_into(&mut decision.reason);
            }
        }
        Compiled::of(draft, self.options)
    }

    /// By how much a quantized draft increases the loss.
    fn increase(&mut self, quantized: &Draft) -> Result<f64> {
        let calibration = match self.calibration.take() {
            Some(calibration) => calibration,
            None => Calibration::new(&self.high.graph, &self.high.about, self.options)?,
        };
        let increase = increase(self.high, &quantized.graph, &calibration, self.options);
        self.calibration = Some(calibration);
        increase
    }

    /// Whether the loss may increase so much; else a note says so. Where there is nothing else to choose, it may; and
    /// thresholds decide in the place of the budget.
    fn allows(&mut self, increase: f64, choice: PrecisionChoice) -> bool {
        let most = f64::from(self.options.max_loss_increase);
        let within = increase.is_finite() && increase <= most;
        let only = self.all.is_empty() && self.too_large.is_none();
        if within || only || self.options.has_threshold() {
            return true;
        }
        let what = if choice.has_int8() { "int8 within bf16" } else { "bf16" };
        self.notes.push(format!(
            "{what} was not tried: it increases the loss by {:.2} %, and --max-loss-increase allows {:.2} %",
            100.0 * increase,
            100.0 * most
        ));
        false
    }
}

impl Candidate {
    /// Whether this is the plan of `choice`, perhaps for another reason.
    fn stands_for(&self, choice: PrecisionChoice) -> bool {
        let decisions = &self.compiled.about.decisions;
        self.choice.base() == choice.base() && !decisions.iter().any(|d| d.precision.is_quantized())
    }
}

/// Measures the plans, and takes the fastest of those that may be taken; the first, if no other is faster.
fn choose(mut all: Vec<Candidate>, options: &Options) -> Result<Candidate> {
    let plans: Vec<&Compiled> = all.iter().map(|candidate| &candidate.compiled).collect();
    let mut measured = if options.measure { measure_steps(&plans, options)? } else { Vec::new() };
    let percent = |cost: LayerCost| 100.0 * (cost.low_ms / cost.high_ms - 1.0);
    let (mut chosen, mut best) = (0, f64::INFINITY);
    let mut timings = Timings::load(options);
    for at in 1..all.len() {
        if !all[at].eligible {
            continue;
        }
        let bytes = [plans[0], plans[at]].map(|compiled| compiled.plan.to_bytes());
        let work = format!("steps of {}", digest(bytes.each_ref().map(Vec::as_slice)));
        let kept = timings.find_or(&work, || {
            let of_two;
            let (high, low) = match measured[..] {
                [] => {
                    of_two = measure_steps(&[plans[0], plans[at]], options)?;
                    (&of_two[0], &of_two[1])
                }
                _ => (&measured[0], &measured[at]),
            };
            Ok(LayerCost { high_ms: high.step_ms.median, low_ms: low.step_ms.median })
        })?;
        if percent(kept) < best {
            (chosen, best) = (at, percent(kept));
        }
    }
    timings.save();
    if best >= 0.0 && best.is_finite() {
        let first = all[0].choice.base();
        all[0].compiled.warnings.push(format!(
            "the fastest plan of lower precision measures {best:.1} % slower than the {first} plan: {first} is taken"
        ));
        chosen = 0;
    }
    let steps = |choice| {
        let beside = |at: &usize| *at != chosen && all[*at].stands_for(choice);
        (0..measured.len()).find(beside).map(|at| measured[at].clone())
    };
    let (f32, bf16) = (steps(PrecisionChoice::F32), steps(PrecisionChoice::Bf16));
    let mut taken = all.swap_remove(chosen);
    let compiled = &mut taken.compiled;
    let bf16 = bf16.filter(|_| taken.choice == PrecisionChoice::MixedBf16);
    if !measured.is_empty() {
        let steps = Steps { chosen: measured.swap_remove(chosen), f32, bf16 };
        compiled.warnings.extend(steps.slower());
        compiled.measured = Some(steps);
    }
    Ok(taken)
}

impl Steps {
    /// That the plan measures slower than one of higher precision, with the figure.
    fn slower(&self) -> Option<String> {
        let all = [("bf16", &self.bf16), ("f32", &self.f32)];
        all.into_iter().find_map(|(word, high)| {
            let longer = self.chosen.step_ms.median / high.as_ref()?.step_ms.median - 1.0;
            (longer > 0.0).then(|| {
                format!(
                    "the chosen plan's step measures {:.1} % slower than the {word} plan's; --precision {word} gives that one",
                    100.0 * longer
                )
            })
        })
    }
}

/// The measured step of a plan that has none beside it.
fn alone(compiled: &Compiled, options: &Options) -> Result<Option<Steps>> {
    if !options.measure {
        return Ok(None);
    }
    let chosen = measure_steps(&[compiled], options)?.pop();
    Ok(chosen.map(|chosen| Steps { chosen, f32: None, bf16: None }))
}

fn measure_steps(compiled: &[&Compiled], options: &Options) -> Result<Vec<Measured>> {
    let trainer = TrainerOptions { threads: options.threads, workers: 1, tier: options.tier };
    let plans: Vec<Arc<Plan>> = compiled.iter().map(|one| Arc::clone(&one.plan)).collect();
    let batch = plans.first().map_or(options.batch_size, |plan| plan.batch_size());
    // One time is enough to be told, and too few to be compared.
    let least = if plans.len() > 1 { 3 } else { 1 };
    measure(&plans, batch, &trainer, MEASURE, least)
}
