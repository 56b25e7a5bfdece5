//! The street from an imported graph to a training step: every pass, once, in order.
//!
//! After each pass the graph is swept and verified, so that a defect is found where it arises. A graph can leave
//! the street after any pass as text and come back later (see [`write_dump`] and [`read_dump`]).

mod dump;

pub use dump::{read_dump, tensors_path, write_dump};

use crate::about::{About, LayerDecision};
use crate::cost;
use crate::error::{Code, Error, Result};
use crate::memory_limit;
use crate::options::Options;
use crate::qdq;
use crate::sensitivity::{self, Calibration};
use crate::terminal::Show;
use qcompile_ir::{Graph, verify};
use qcompile_passes::attach_loss::{self, LossKind};
use qcompile_passes::calibrate::Method;
use qcompile_passes::quantize::{self, Decision, Held, LayerCost, OperandTypes, PrecisionChoice};
use qcompile_passes::sensitivity::{LayerScore, Metric, Scores, scored};
use qcompile_passes::{
    PassError, attention, differentiate, distribute, evaluation, saved, simplify, update,
};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// One pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pass {
    /// Removes what need not be computed, and makes images channels-last.
    Simplify,
    /// Makes attention one op.
    Attention,
    /// Adds the label and the loss.
    AttachLoss,
    /// Scores the layers, where the choice of precision needs it.
    Sensitivity,
    /// Decides precision and rounds the operands of the chosen layers.
    Quantize,
    /// Builds the backward pass.
    Differentiate,
    /// Rounds the operands of the chosen gradients.
    QuantizeBackward,
    /// Moves, merges and cancels roundings.
    MoveRoundings,
    /// Makes gradients and statistics means over workers.
    Distribute,
    /// Builds the optimizer.
    Update,
    /// Removes what the passes before have left over.
    Finish,
    /// Compresses what is saved for the backward pass.
    Compress,
    /// Makes values again in the backward pass, where memory is limited.
    Rematerialise,
}

impl Pass {
    /// Every pass in order.
    pub const ALL: [Pass; 13] = [
        Pass::Simplify,
        Pass::Attention,
        Pass::AttachLoss,
        Pass::Sensitivity,
        Pass::Quantize,
        Pass::Differentiate,
        Pass::QuantizeBackward,
        Pass::MoveRoundings,
        Pass::Distribute,
        Pass::Update,
        Pass::Finish,
        Pass::Compress,
        Pass::Rematerialise,
    ];

    /// The last pass.
    pub const LAST: Pass = Pass::Rematerialise;

    /// The word on the command line and in dumps.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Pass::Simplify => "simplify",
            Pass::Attention => "attention",
            Pass::AttachLoss => "attach-loss",
            Pass::Sensitivity => "sensitivity",
            Pass::Quantize => "quantize",
            Pass::Differentiate => "differentiate",
            Pass::QuantizeBackward => "quantize-backward",
            Pass::MoveRoundings => "move-roundings",
            Pass::Compress => "compress",
            Pass::Rematerialise => "rematerialise",
            Pass::Distribute => "distribute",
            Pass::Update => "update",
            Pass::Finish => "finish",
        }
    }
}

impl std::str::FromStr for Pass {
    type Err = ();
    fn from_str(text: &str) -> std::result::Result<Pass, ()> {
        Pass::ALL.into_iter().find(|pass| pass.name() == text).ok_or(())
    }
}

/// A graph on its way.
#[derive(Debug, Clone)]
pub struct Draft {
    /// The graph.
    pub graph: Graph,
    /// What is to be said about it.
    pub about: About,
    /// The last pass that it has been through.
    pub after: Option<Pass>,
    /// The scores of its layers.
    pub scores: Option<Scores>,
    /// The measured times of its layers.
    pub costs: BTreeMap<qcompile_ir::Name, LayerCost>,
    /// Its form for evaluation, once it is quantized.
    pub evaluation: Option<Graph>,
    /// The decisions with measured times in their reasons; those in `about` have none.
    pub decisions: Vec<LayerDecision>,
    /// What should be told and was measured, which has no place in a plan.
    pub remarks: Vec<String>,
}

impl Draft {
    /// A graph that has been through no pass.
    #[must_use]
    pub fn new(graph: Graph, about: About) -> Draft {
        Draft {
            graph,
            about,
            after: None,
            scores: None,
            costs: BTreeMap::new(),
            evaluation: None,
            decisions: Vec::new(),
            remarks: Vec::new(),
        }
    }

    /// Whether the graph has been through this pass.
    #[must_use]
    pub fn is_after(&self, pass: Pass) -> bool {
        self.after.is_some_and(|after| after >= pass)
    }
}

/// What is told after every pass: which, its result, and how long it took.
pub type Each<'a> = &'a mut dyn FnMut(Pass, &Draft, Duration) -> Result<()>;

/// The passes with what they need.
pub struct Street<'a> {
    options: &'a Options,
    show: Show,
    each: Each<'a>,
}

impl<'a> Street<'a> {
    /// Passes by these options; `each` is called after every one.
    pub fn new(options: &'a Options, show: Show, each: Each<'a>) -> Street<'a> {
        Street { options, show, each }
    }

    /// Takes the draft through the passes that it has not been through, up to and with `last`.
    ///
    /// # Errors
    /// Of the passes; and the one of `each` that failed.
    pub fn run(&mut self, draft: &mut Draft, last: Pass) -> Result<()> {
        for pass in Pass::ALL {
            if draft.is_after(pass) || pass > last {
                continue;
            }
            let begin = Instant::now();
            self.advance(draft, pass)?;
            draft.graph.sweep();
            verify(&draft.graph).map_err(|errors| PassError::Verify {
                pass: pass.name(),
                errors: errors.to_string(),
            })?;
            draft.after = Some(pass);
            (self.each)(pass, draft, begin.elapsed())?;
        }
        Ok(())
    }

    fn advance(&mut self, draft: &mut Draft, pass: Pass) -> Result<()> {
        let Draft { graph, about, evaluation, .. } = draft;
        match pass {
            Pass::Simplify => {
                simplify::run(graph, &simplify::Options { keep_stop_gradient: true })?
            }
            Pass::Attention => attention::run(graph)?,
            Pass::AttachLoss => {
                let kind = match self.options.loss {
                    Some(kind) => kind,
                    None => self.usual_loss(graph, about)?,
                };
                attach_loss::run(graph, &attach_loss::Options { kind })?;
                kind.name().clone_into(&mut about.loss);
            }
            Pass::Sensitivity => self.score(draft)?,
            Pass::Quantize => self.quantize(draft)?,
            Pass::Differentiate => {
                if self.options.sync_batch_norm {
                    distribute::synchronize_statistics(graph)?;
                }
                let gradients = differentiate::run(graph)?;
                let names = gradients.independent.iter().map(|name| name.as_str().to_owned());
                about.independent = names.collect();
            }
            Pass::QuantizeBackward => {
                quantize::insert_backward(graph)?;
            }
            Pass::MoveRoundings => {
                quantize::optimise(graph)?;
            }
            Pass::Compress if self.options.saved.is_empty() => {}
            Pass::Compress => {
                let saved = saved::run(graph, &self.options.saved)?;
                if saved.compressed.is_empty() {
                    about.warnings.push(
                        "--compress: the backward pass reads no value that can be compressed"
                            .to_owned(),
                    );
                }
                let wider = saved.compressed.iter().filter(|one| one.format != one.asked);
                let names: Vec<&str> = wider.map(|one| one.name.as_str()).collect();
                if !names.is_empty() {
                    about.warnings.push(format!(
                        "--compress: an odd number of elements is not saved in pairs, and in int8 instead of int4: {}",
                        names.join(", ")
                    ));
                }
            }
            Pass::Rematerialise => {
                if let Some(limit) = self.options.memory_limit {
                    memory_limit::meet(graph, about, limit, self.options)?;
                }
            }
            Pass::Distribute => distribute::run(graph)?,
            Pass::Update => {
                if !self.options.master_weights {
                    for graph in std::iter::once(&mut *graph).chain(evaluation) {
                        update::store_in_bf16(graph)?;
                    }
                }
                update::run(graph, &update::Options { optimizer: self.options.optimizer })?;
                self.options.optimizer.name().clone_into(&mut about.optimizer);
                about.options = self.options.said();
            }
            Pass::Finish => {
                simplify::run(graph, &simplify::Options { keep_stop_gradient: false })?;
                update::keep_casts(graph)?;
            }
        }
        Ok(())
    }

    /// The loss that suits the model's first output.
    fn usual_loss(&self, graph: &Graph, about: &mut About) -> Result<LossKind> {
        let Some((name, id)) = graph.outputs().first() else {
            return Err(Error::new(Code::ModelUnsupported, "the model has no output"));
        };
        let ty = graph.ty(*id);
        let shape = &ty.shape;
        let classes = shape.0.last().and_then(|dim| dim.as_fixed());
        let kind = match shape.elements() {
            _ if !ty.dtype.is_float() => None,
            Some(qcompile_ir::Dim::ONE) => Some(LossKind::Output),
            _ if shape.rank() >= 2 && classes.is_some_and(|classes| classes >= 2) => {
                Some(LossKind::CrossEntropy)
            }
            _ => Some(LossKind::Mse),
        };
        let kind = kind.ok_or_else(|| {
            let cause = format!("the first output `{name}` is {ty}: it has no loss");
            Error::new(Code::ModelUnsupported, cause)
        })?;
        about.warnings.push(format!(
            "no --loss was given: {} is taken, as output `{name}` is {ty}",
            kind.name()
        ));
        Ok(kind)
    }

    fn score(&mut self, draft: &mut Draft) -> Result<()> {
        if let Some(path) = &self.options.scores {
            let scores = sensitivity::read_scores(path)?;
            let of_pass = sensitivity::of_pass(self.options, scores.metric, scores.samples);
            let (layers, products) = scored(&draft.graph, &of_pass);
            let of_layers = layers.iter().map(|layer| {
                let channels = match scores.metric {
                    Metric::ActivationRange => layer.input_channels,
                    Metric::OutputSqnr if layer.recurrent => layer.input_channels,
                    _ => layer.channels,
                };
                (layer.node, channels, layer.recurrent && scores.metric == Metric::ActivationRange)
            });
            let of_products = products.into_iter().map(|product| (product, 0, false));
            let unknown = of_layers.chain(of_products).find_map(|(node, channels, unscored)| {
                let name = draft.graph.node(node).name.as_str();
                let fits = |score: &LayerScore| score.channels.len() == channels;
                (!unscored && !scores.find(name).is_some_and(fits)).then_some(name)
            });
            if let Some(name) = unknown {
                let cause =
                    format!("the scores are of another model: layer `{name}` has none that fits");
                return Err(Error::usage(cause).at(path.display().to_string()));
            }
            scores.annotate(&mut draft.graph);
            draft.scores = Some(scores);
            return Ok(());
        }
        if !self.options.needs_scores() || quantize::layers(&draft.graph).is_empty() {
            return Ok(());
        }
        let calibration = Calibration::new(&draft.graph, &draft.about, self.options)?;
        draft.about.warnings.extend(calibration.notes().iter().cloned());
        let scores = sensitivity::score(&mut draft.graph, &calibration, self.options, self.show)?;
        draft.scores = Some(scores);
        Ok(())
    }

    fn quantize(&mut self, draft: &mut Draft) -> Result<()> {
        let mut options = quantize::Options {
            precision: self.options.precision,
            threshold: self.options.threshold,
            channel_threshold: self.options.channel_threshold,
            channel_policy: self.options.channel_policy,
            max_loss_increase: self.options.max_loss_increase,
            keep_f32: self.options.keep_f32.clone(),
            operations: self.options.operations,
            cost: BTreeMap::new(),
            scores: draft.scores.clone(),
            numerics: self.options.numerics,
            ranged: self.options.qat,
        };
        let measured = options.precision.is_measured() || self.options.measure_layers;
        if measured && options.precision.has_int8() {
            options.cost = cost::measure(&draft.graph, &options, self.options, self.show)?;
        }
        let decided = if self.options.qat {
            let decided = quantize::decide(&mut draft.graph, &options)?;
            let calibrated = qdq::calibrate(&draft.graph, &draft.about, self.options)?;
            draft.about.warnings.extend(calibrated.notes.iter().cloned());
            let learned = self.options.calibration == Method::Lsq;
            let held = if learned { Held::Parameter } else { Held::State };
            let scheme = qdq::scheme(self.options, held);
            quantize::insert_ranged(&mut draft.graph, &calibrated.ranges, &scheme)?;
            decided
        } else {
            quantize::run(&mut draft.graph, &options)?
        };
        let OperandTypes { weight, activation, gradient } = options.numerics.types;
        let float = [weight, activation, gradient].into_iter().find(|dtype| dtype.is_float());
        if let Some(float) =
            float.filter(|_| decided.iter().any(|one| one.precision.is_quantized()))
        {
            draft.about.warnings.push(format!(
                "{float} codes are multiplied in f32: they show what training in {float} does to the loss, and are not faster"
            ));
        }
        let others = quantize::other_products(&draft.graph);
        if self.options.precision == PrecisionChoice::Int8
            && let Some(first) = others.first().map(|&id| draft.graph.node(id))
        {
            draft.about.warnings.push(format!(
                "{} products stay f32, as no int8 kernel has them: recurrent, or of a computed weight; the first is {} ({})",
                others.len(),
                first.note.origin.as_deref().unwrap_or(first.name.as_str()),
                first.op.name()
            ));
        }
        let impossible = |one: &&Decision| one.impossible;
        if self.options.precision == PrecisionChoice::Int8
            && let Some(first) = decided.iter().find(impossible)
        {
            draft.about.warnings.push(format!(
                "{} products are not int8, as no kernel has what is asked for; the first is {} ({}): {}",
                decided.iter().filter(impossible).count(),
                first.node.as_str(),
                first.op,
                first.reason
            ));
        }
        let decisions: Vec<LayerDecision> =
            decided.iter().map(|decision| LayerDecision::new(&draft.graph, decision)).collect();
        draft.about.decisions.clone_from(&decisions);
        for (decision, layer) in draft.about.decisions.iter_mut().zip(&decided) {
            // A measured time would make every plan another.
            let cost = options.cost.get(&layer.node).filter(|cost| cost.low_ms >= cost.high_ms);
            let Some(LayerCost { high_ms, low_ms }) = cost else { continue };
            if !decision.precision.is_quantized() {
                "int8 does not measure faster".clone_into(&mut decision.reason);
            } else if let Some(policy) = options.channel_policy.filter(|_| decision.is_divided()) {
                draft.remarks.push(format!(
                    "{}: int8 with its sensitive channels apart measures {low_ms:.3} ms, without int8 {high_ms:.3} ms; --channel-policy {} keeps it",
                    decision.node, policy.name()
                ));
            }
        }
        draft.decisions = decisions;
        draft.costs = options.cost;
        let mut form = evaluation_form(&draft.graph)?;
        if self.options.qat {
            // What is evaluated is what will leave.
            qdq::round_as_exported(&mut form)?;
        }
        draft.evaluation = Some(form);
        Ok(())
    }
}

/// The form that is evaluated: the forward pass, with running statistics in the place of the batch's.
pub(crate) fn evaluation_form(graph: &Graph) -> Result<Graph> {
    let mut form = graph.clone();
    evaluation::run(&mut form)?;
    quantize::optimise(&mut form)?;
    simplify::run(&mut form, &simplify::Options { keep_stop_gradient: false })?;
    verify(&form)
        .map_err(|errors| PassError::Verify { pass: "evaluation", errors: errors.to_string() })?;
    Ok(form)
}
