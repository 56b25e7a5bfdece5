//! Which layers run in int8, and why.

use super::PASS;
use super::channels::{self, ChannelPolicy};
use super::choice::PrecisionChoice;
use super::insert::is_quantized;
use super::layer::{Candidate, layers};
use super::numerics::{Numerics, OperandTypes};
use super::obstacle;
use super::weights;
use crate::PassError;
use crate::sensitivity::Scores;
use qcompile_ir::{Channels, DType, Granularity, Graph, Name, NodeId, Note, Precision, Quantizer};
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::str::FromStr;

/// Which operations of a layer may be quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operations {
    /// The forward product.
    pub forward: bool,
    /// The products that give the gradients of the layer's input and of its weight; the latter is quantized only if
    /// [`Numerics::grad_weight`] says so.
    pub backward: bool,
    /// The mean of gradients over ranks: what they exchange.
    pub mean: bool,
    /// The weight update: what the optimizer keeps.
    pub update: bool,
}

impl Default for Operations {
    /// Forward and backward.
    fn default() -> Self {
        Operations { forward: true, backward: true, mean: false, update: false }
    }
}

impl FromStr for Operations {
    type Err = String;
    /// `forward,backward,mean,update`, any of them once.
    fn from_str(text: &str) -> Result<Self, String> {
        let none = Operations { forward: false, backward: false, mean: false, update: false };
        text.split(',').try_fold(none, |mut operations, word| {
            let flag = match word.trim() {
                "forward" => &mut operations.forward,
                "backward" => &mut operations.backward,
                "mean" => &mut operations.mean,
                "update" => &mut operations.update,
                other => {
                    return Err(format!("`{other}` is not one of forward, backward, mean, update"));
                }
            };
            if std::mem::replace(flag, true) {
                return Err(format!("`{}` is named twice", word.trim()));
            }
            Ok(operations)
        })
    }
}

/// Measured time of a layer's quantizable operations in one step, quantization included.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerCost {
    /// In what it would be otherwise (f32, or bf16 in a plan that is bf16 but for int8 layers), milliseconds.
    pub high_ms: f64,
    /// In low precision, milliseconds.
    pub low_ms: f64,
}

/// What [`decide`] decides by.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// How precision is chosen.
    pub precision: PrecisionChoice,
    /// Layers with a score up to this are quantized; then `max_loss_increase` is not asked.
    pub threshold: Option<f32>,
    /// Channels with a score above this are not left to one int8 product. Needs `scores`.
    pub channel_threshold: Option<f32>,
    /// What becomes of such output channels. One that is given is kept to even where it measures slower.
    pub channel_policy: Option<ChannelPolicy>,
    /// Without a threshold, layers are quantized in ascending order of score while the sum of their scores
    /// (negative ones count 0) is at most this.
    pub max_loss_increase: f32,
    /// Layers that stay f32, by name or ONNX name; `*` stands for any characters, `?` for one.
    pub keep_f32: Vec<String>,
    /// Which operations are quantized.
    pub operations: Operations,
    /// Measured times by layer; a layer that measures no faster in int8 does not become it.
    pub cost: BTreeMap<Name, LayerCost>,
    /// Scores per layer and channel. A layer without one here has that of its note `sensitivity`.
    pub scores: Option<Scores>,
    /// How quantized products are rounded.
    pub numerics: Numerics,
    /// Whether values are rounded within ranges that are known before. Products of two activations and recurrent ones then
    /// stay in high precision: no operator of ONNX computes them on integers.
    pub ranged: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            precision: PrecisionChoice::default(),
            threshold: None,
            channel_threshold: None,
            channel_policy: None,
            max_loss_increase: 0.01,
            keep_f32: Vec::new(),
            operations: Operations::default(),
            cost: BTreeMap::new(),
            scores: None,
            numerics: Numerics::default(),
            ranged: false,
        }
    }
}

impl Options {
    /// The precision of a layer that is not quantized: that of the plan in the operations that may be of low precision.
    #[must_use]
    pub fn high(&self) -> Precision {
        high(self.operations, self.precision.base())
    }

    /// The precision of a layer that is.
    #[must_use]
    pub fn low(&self) -> Precision {
        let mut precision = self.high();
        if self.operations.forward {
            precision.forward = self.numerics.types.activation;
        }
        if self.operations.backward {
            precision.grad_input = self.numerics.types.gradient;
            precision.grad_weight = match self.numerics.grad_weight {
                Some(DType::I8) => self.numerics.types.gradient,
                Some(other) => other,
                None => precision.grad_weight,
            };
        }
        precision
    }
}

/// The precision of a plan in the operations that may be of low precision; the mean of the gradient and the update in
/// f32.
pub(super) fn high(operations: Operations, base: DType) -> Precision {
    let mut precision = Precision::uniform(DType::F32);
    if operations.forward {
        precision.forward = base;
    }
    if operations.backward {
        precision.grad_input = base;
        precision.grad_weight = base;
    }
    precision
}

/// What was decided for one layer, or product of two activations.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// The product.
    pub node: Name,
    /// Its mnemonic.
    pub op: &'static str,
    /// The precision of its operations.
    pub precision: Precision,
    /// The channels that one int8 product does not serve, in a layer that is quantized otherwise.
    pub channels: Channels,
    /// The layer's score, if it was measured.
    pub score: Option<f32>,
    /// Why, in words.
    pub reason: String,
    /// Whether that is because no kernel has what is asked for.
    pub impossible: bool,
}

/// Decides for every layer, in graph order, then for every product of two activations, and notes `sensitivity`,
/// `precision`, `channels` and, where an int8 layer stands in a bf16 plan, `stored`. A layer whose `precision` is noted
/// already keeps it.
///
/// # Errors
/// [`PassError::Unsupported`] for a pattern that no layer matches, a threshold that is not a number, a channel threshold
/// without channel scores, and notes that ask for what has no kernel.
pub fn decide(graph: &mut Graph, options: &Options) -> Result<Vec<Decision>, PassError> {
    let layers = layers(graph);
    let candidates = Candidate::all(graph, &layers);
    check(graph, &candidates, options)?;
    if let Some(scores) = &options.scores {
        scores.annotate(graph);
    }
    let within_budget = within_budget(graph, &candidates, options);
    let decide = |one: &Candidate<'_>| decide_one(graph, *one, options, &within_budget);
    let mut decided: Vec<Decision> = candidates.iter().map(decide).collect();
    weights::decide(graph, &layers, options, decided.iter_mut());
    for (one, decision) in candidates.iter().zip(&decided) {
        let note = graph.note_mut(one.node);
        // Where all is f32, only layers say so.
        let plain = decision.precision == Precision::uniform(DType::F32);
        if one.layer.is_none() && plain && options.precision.base() == DType::F32 {
            continue;
        }
        if decision.precision.is_quantized() && note.precision.is_none() {
            note.stored = Some(options.precision.base()).filter(|&base| base != DType::F32);
            note.quantizer =
                Some(options.numerics.quantizer()).filter(|one| *one != Quantizer::default());
        }
        note.precision = Some(decision.precision);
        note.channels.clone_from(&decision.channels);
    }
    weights::note(graph, &layers);
    Ok(decided)
}

pub(super) fn refusal(reason: impl Into<String>) -> PassError {
    PassError::Unsupported { pass: PASS, reason: reason.into() }
}

fn check(graph: &Graph, candidates: &[Candidate<'_>], options: &Options) -> Result<(), PassError> {
    let thresholds = [
        ("threshold", options.threshold),
        ("channel threshold", options.channel_threshold),
        ("largest loss increase", Some(options.max_loss_increase)),
    ];
    for (name, value) in thresholds {
        if value.is_some_and(f32::is_nan) {
            return Err(refusal(format!("the {name} is not a number")));
        }
    }
    channels::check(options)?;
    if let Some(reason) = options.numerics.contradiction(options.operations) {
        return Err(refusal(reason));
    }
    for one in candidates {
        let node = graph.node(one.node);
        let without_kernel = || obstacle::by_note(graph, *one, options.ranged);
        if let Some(reason) = noted_contradiction(&node.note).or_else(without_kernel) {
            return Err(refusal(format!("the notes of {}: {reason}", node.name)));
        }
    }
    for pattern in &options.keep_f32 {
        if !candidates.iter().any(|one| is_named(graph, one.node, pattern)) {
            return Err(refusal(format!("no layer matches `{pattern}`, which is to stay f32")));
        }
    }
    Ok(())
}

/// What a layer's notes ask for that cannot be done.
fn noted_contradiction(note: &Note) -> Option<String> {
    let precision = note.precision?;
    let products = [precision.forward, precision.grad_input, precision.grad_weight];
    let runs = |dtype: DType| dtype.is_float() || is_quantized(dtype);
    if let Some(dtype) = products.into_iter().find(|&dtype| !runs(dtype)) {
        return Some(format!("products of {dtype} codes have no kernel"));
    }
    let Quantizer { weight, granularity, rounding, scaling } = note.quantizer?;
    let gradient = Some(precision.grad_input).filter(|&dtype| is_quantized(dtype));
    let types =
        OperandTypes { weight, activation: DType::I8, gradient: gradient.unwrap_or(DType::I8) };
    if !note.channels.points.is_empty() && granularity == Granularity::Tensor {
        return Some(
            "channels have no points of their own with one scale for the tensor".to_owned(),
        );
    }
    let numerics = Numerics { types, granularity, rounding, scaling, grad_weight: None };
    numerics.contradiction(Operations::default())
}

fn is_named(graph: &Graph, node: NodeId, pattern: &str) -> bool {
    let node = graph.node(node);
    matches(pattern, node.name.as_str())
        || node.note.origin.as_ref().is_some_and(|origin| matches(pattern, origin))
}

/// Whether `text` fits a pattern of literal characters, `*` and `?`; linear in the product of the lengths.
pub(crate) fn matches(pattern: &str, text: &str) -> bool {
    let mut fits = vec![true];
    let text: Vec<char> = text.chars().collect();
    fits.resize(text.len() + 1, false);
    for p in pattern.chars() {
        let before = fits.clone();
        fits[0] = before[0] && p == '*';
        for (at, &c) in text.iter().enumerate() {
            fits[at + 1] = match p {
                '*' => before[at + 1] || fits[at],
                '?' => before[at],
                literal => before[at] && literal == c,
            };
        }
    }
    fits[text.len()]
}

/// Why the layer is f32 in any plan, if so.
pub(super) fn must_be_f32(graph: &Graph, node: NodeId, options: &Options) -> Option<String> {
    let Operations { forward, backward, .. } = options.operations;
    if options.precision == PrecisionChoice::F32 {
        return Some("f32 was asked for".to_owned());
    }
    if !forward && !backward {
        return Some("no operation is to be quantized".to_owned());
    }
    if let Some(pattern) = options.keep_f32.iter().find(|pattern| is_named(graph, node, pattern)) {
        return Some(format!("`{pattern}` is to stay f32"));
    }
    let dtype = graph.ty(node).dtype;
    (dtype != DType::F32).then(|| format!("its values are {dtype}"))
}

/// Why the layer is not int8 whatever its score, if so.
pub(super) fn barred(graph: &Graph, one: Candidate<'_>, options: &Options) -> Option<String> {
    if !options.precision.has_int8() {
        let asked = options.precision == PrecisionChoice::Bf16;
        let reason = if asked { "bf16 was asked for" } else { "int8 is not among the choices" };
        return Some(reason.to_owned());
    }
    let LayerCost { high_ms, low_ms } = *options.cost.get(&graph.node(one.node).name)?;
    // A time that is not a number compares as nothing, and bars int8.
    let faster = low_ms.partial_cmp(&high_ms) == Some(Ordering::Less);
    let base = options.precision.base();
    if faster {
        return None;
    }
    let set = one.layer.map(|layer| channels::choose(graph, layer, options).unwrap_or_default());
    let set = set.unwrap_or_default();
    if options.channel_policy.is_some() && !set.is_empty() {
        return None;
    }
    let what = channels::described(&set).map_or_else(String::new, |what| format!(" with {what}"));
    Some(format!("int8{what} measures {low_ms:.3} ms, {base} {high_ms:.3} ms"))
}

/// The layers that the budget of `max_loss_increase` takes, by name, with the sum up to and with each.
pub(super) fn within_budget(
    graph: &Graph,
    candidates: &[Candidate<'_>],
    options: &Options,
) -> BTreeMap<Name, f32> {
    let mut candidates: Vec<(f32, Name)> = candidates
        .iter()
        .filter(|one| must_be_f32(graph, one.node, options).is_none())
        .filter(|one| barred(graph, **one, options).is_none())
        .filter(|one| obstacle::by_options(graph, **one, options).is_none())
        .filter_map(|one| {
            let node = graph.node(one.node);
            node.note.sensitivity.map(|score| (score, node.name.clone()))
        })
        .collect();
    candidates.sort_by(|(a, name_a), (b, name_b)| a.total_cmp(b).then(name_a.cmp(name_b)));
    let mut sum = 0.0;
    let mut within = BTreeMap::new();
    for (score, name) in candidates {
        sum += score.max(0.0);
        if !score.is_finite() || sum > options.max_loss_increase {
            break;
        }
        within.insert(name, sum);
    }
    within
}

/// Whether the score lets the layer be int8, and why.
pub(super) fn by_score(
    graph: &Graph,
    node: NodeId,
    options: &Options,
    within_budget: &BTreeMap<Name, f32>,
) -> (bool, String) {
    if options.precision == PrecisionChoice::Int8 {
        return (true, "int8 was asked for".to_owned());
    }
    let node = graph.node(node);
    let Some(score) = node.note.sensitivity else {
        return (false, "its sensitivity was not measured".to_owned());
    };
    if let Some(threshold) = options.threshold {
        let low = score <= threshold;
        let relation = if low { "at most" } else { "above" };
        return (low, format!("score {score:.3e} is {relation} the threshold {threshold:e}"));
    }
    match within_budget.get(&node.name) {
        Some(sum) => (true, format!("score {score:.3e}; {sum:.3e} in all up to here")),
        None => (
            false,
            format!("score {score:.3e} would exceed {:e} in all", options.max_loss_increase),
        ),
    }
}

fn decide_one(
    graph: &Graph,
    one: Candidate<'_>,
    options: &Options,
    within_budget: &BTreeMap<Name, f32>,
) -> Decision {
    let node = graph.node(one.node);
    let decision = |precision, channels: Channels, reason| Decision {
        node: node.name.clone(),
        op: node.op.name(),
        precision,
        channels,
        score: node.note.sensitivity,
        reason,
        impossible: false,
    };
    if let Some(precision) = node.note.precision {
        return decision(precision, node.note.channels.clone(), "the graph notes it".to_owned());
    }
    if let Some(reason) = must_be_f32(graph, one.node, options) {
        return decision(Precision::uniform(DType::F32), Channels::default(), reason);
    }
    let high = |reason| decision(options.high(), Channels::default(), reason);
    if let Some(reason) = barred(graph, one, options) {
        return high(reason);
    }
    if let Some(reason) = obstacle::by_options(graph, one, options) {
        return Decision { impossible: true, ..high(reason) };
    }
    let (low, mut reason) = by_score(graph, one.node, options, within_budget);
    if !low {
        return high(reason);
    }
    let mut precision = options.low();
    let channels = match one.layer.map(|layer| channels::choose(graph, layer, options)) {
        Some(Err(reason)) => return high(reason),
        Some(Ok(channels)) => channels,
        None => {
            // Both of its gradients are those of inputs.
            precision.grad_weight = precision.grad_input;
            Channels::default()
        }
    };
    if is_quantized(precision.grad_input)
        && let Some(obstacle) = obstacle::back_by_options(graph, one, options)
    {
        let Precision { grad_input, grad_weight, .. } = options.high();
        precision.grad_input = grad_input;
        if one.layer.is_none() {
            precision.grad_weight = grad_weight;
        }
        let _ = write!(reason, "; not on the way back: {obstacle}");
    }
    decision(precision, channels, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_names() {
        assert!(matches("conv1", "conv1") && !matches("conv1", "conv10"));
        assert!(matches("*.head", "net.head") && matches("*", "") && matches("a?c*", "abc"));
        assert!(!matches("?", "") && !matches("*.head", "net.head.x"));
    }

    #[test]
    fn operations_parse_once_each() {
        let operations: Operations = "forward, update".parse().expect("two words");
        assert!(operations.forward && operations.update && !operations.backward);
        assert!("forward,forward".parse::<Operations>().is_err());
        assert!("sideways".parse::<Operations>().is_err());
    }
}
