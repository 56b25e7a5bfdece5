//! Which layers run in int8, and why.

use super::PASS;
use super::channels;
use super::layer::{Layer, layers};
use crate::PassError;
use crate::sensitivity::Scores;
use qcompile_ir::{DType, Graph, Name, Precision};
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::str::FromStr;

/// How precision is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum PrecisionChoice {
    /// What measures fastest: f32, bf16 throughout, or int8 where the score allows it and it does not measure slower.
    #[default]
    Auto,
    /// The same without bf16.
    F32OrInt8,
    /// The same without int8.
    F32OrBf16,
    /// f32 everywhere.
    F32,
    /// bf16 in every product and between them.
    Bf16,
    /// int8 in every layer.
    Int8,
    /// int8 where the score allows it.
    Mixed,
}

impl PrecisionChoice {
    /// Every choice, the default first.
    pub const ALL: [PrecisionChoice; 7] = [
        PrecisionChoice::Auto,
        PrecisionChoice::F32OrInt8,
        PrecisionChoice::F32OrBf16,
        PrecisionChoice::F32,
        PrecisionChoice::Bf16,
        PrecisionChoice::Int8,
        PrecisionChoice::Mixed,
    ];

    /// The word on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            PrecisionChoice::Auto => "auto",
            PrecisionChoice::F32OrInt8 => "f32,int8",
            PrecisionChoice::F32OrBf16 => "f32,bf16",
            PrecisionChoice::F32 => "f32",
            PrecisionChoice::Bf16 => "bf16",
            PrecisionChoice::Int8 => "int8",
            PrecisionChoice::Mixed => "mixed",
        }
    }
}

impl PrecisionChoice {
    /// Whether measured times have a say.
    #[must_use]
    pub const fn is_measured(self) -> bool {
        matches!(
            self,
            PrecisionChoice::Auto | PrecisionChoice::F32OrInt8 | PrecisionChoice::F32OrBf16
        )
    }

    /// Whether layers may be int8.
    #[must_use]
    pub const fn has_int8(self) -> bool {
        !matches!(self, PrecisionChoice::F32 | PrecisionChoice::Bf16 | PrecisionChoice::F32OrBf16)
    }
}

impl FromStr for PrecisionChoice {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        PrecisionChoice::ALL.into_iter().find(|choice| choice.name() == text).ok_or(())
    }
}

/// Which operations of a layer may be quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operations {
    /// The forward product.
    pub forward: bool,
    /// The product that gives the gradient of the layer's input; in bf16 also that of its weight, which beside int8 stays
    /// f32.
    pub backward: bool,
    /// The mean of gradients over ranks: not available.
    pub mean: bool,
    /// The weight update: not available.
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
    /// In f32, milliseconds.
    pub f32_ms: f64,
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
    /// Output channels with a score above this stay f32. Needs `scores`.
    pub channel_threshold: Option<f32>,
    /// Without a threshold, layers are quantized in ascending order of score while the sum of their scores
    /// (negative ones count 0) is at most this.
    pub max_loss_increase: f32,
    /// Layers that stay f32, by name or ONNX name; `*` stands for any characters, `?` for one.
    pub keep_f32: Vec<String>,
    /// Which operations are quantized.
    pub operations: Operations,
    /// Measured times by layer; a layer that measures slower in int8 stays f32 under [`PrecisionChoice::Auto`].
    pub cost: BTreeMap<Name, LayerCost>,
    /// Scores per layer and channel. A layer without one here has that of its note `sensitivity`.
    pub scores: Option<Scores>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            precision: PrecisionChoice::default(),
            threshold: None,
            channel_threshold: None,
            max_loss_increase: 0.01,
            keep_f32: Vec::new(),
            operations: Operations::default(),
            cost: BTreeMap::new(),
            scores: None,
        }
    }
}

/// The products of a layer that may be of low precision in bf16; the mean of its gradient and its update in f32.
pub(super) fn bf16(operations: Operations) -> Precision {
    let mut precision = Precision::uniform(DType::F32);
    if operations.forward {
        precision.forward = DType::BF16;
    }
    if operations.backward {
        precision.grad_input = DType::BF16;
        precision.grad_weight = DType::BF16;
    }
    precision
}

/// What was decided for one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// The product.
    pub node: Name,
    /// Its mnemonic.
    pub op: &'static str,
    /// The precision of its operations.
    pub precision: Precision,
    /// Output channels that stay f32 in a layer that is quantized otherwise.
    pub channels_high: usize,
    /// The layer's score, if it was measured.
    pub score: Option<f32>,
    /// Why, in words.
    pub reason: String,
}

/// Decides for every layer, in graph order, and notes `sensitivity`, `precision` and `outliers`. A layer whose
/// `precision` is noted already keeps it.
///
/// # Errors
/// [`PassError::Unsupported`] for quantized mean or update, a pattern that no layer matches, a threshold that is not
/// a number, and a channel threshold without channel scores.
pub fn decide(graph: &mut Graph, options: &Options) -> Result<Vec<Decision>, PassError> {
    let layers = layers(graph);
    check(graph, &layers, options)?;
    if let Some(scores) = &options.scores {
        scores.annotate(graph);
    }
    let within_budget = within_budget(graph, &layers, options);
    let decide = |layer: &Layer| decide_layer(graph, layer, options, &within_budget);
    let decided: Vec<(Decision, Vec<u32>)> = layers.iter().map(decide).collect();
    for (layer, (decision, outliers)) in layers.iter().zip(&decided) {
        let note = graph.note_mut(layer.node);
        note.precision = Some(decision.precision);
        note.outliers.clone_from(outliers);
    }
    Ok(decided.into_iter().map(|(decision, _)| decision).collect())
}

fn refusal(reason: impl Into<String>) -> PassError {
    PassError::Unsupported { pass: PASS, reason: reason.into() }
}

fn check(graph: &Graph, layers: &[Layer], options: &Options) -> Result<(), PassError> {
    let Operations { mean, update, .. } = options.operations;
    for (asked, name) in [(mean, "mean"), (update, "update")] {
        if asked {
            return Err(refusal(format!(
                "the operation `{name}` cannot be quantized; forward and backward can"
            )));
        }
    }
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
    if options.channel_threshold.is_some() && options.scores.is_none() {
        return Err(refusal("a channel threshold needs the scores of the channels"));
    }
    for pattern in &options.keep_f32 {
        if !layers.iter().any(|layer| is_named(graph, layer, pattern)) {
            return Err(refusal(format!("no layer matches `{pattern}`, which is to stay f32")));
        }
    }
    Ok(())
}

fn is_named(graph: &Graph, layer: &Layer, pattern: &str) -> bool {
    let node = graph.node(layer.node);
    matches(pattern, node.name.as_str())
        || node.note.origin.as_ref().is_some_and(|origin| matches(pattern, origin))
}

/// Whether `text` fits a pattern of literal characters, `*` and `?`; linear in the product of the lengths.
fn matches(pattern: &str, text: &str) -> bool {
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

/// Why the layer stays f32 whatever its score, if so.
fn barred(graph: &Graph, layer: &Layer, options: &Options) -> Option<String> {
    let Operations { forward, backward, .. } = options.operations;
    if options.precision == PrecisionChoice::F32 {
        return Some("f32 was asked for".to_owned());
    }
    if options.precision == PrecisionChoice::F32OrBf16 {
        return Some("int8 is not among the choices".to_owned());
    }
    if !forward && !backward {
        return Some("no operation is to be quantized".to_owned());
    }
    if let Some(pattern) = options.keep_f32.iter().find(|pattern| is_named(graph, layer, pattern)) {
        return Some(format!("`{pattern}` is to stay f32"));
    }
    let dtype = graph.ty(layer.node).dtype;
    if dtype != DType::F32 {
        return Some(format!("its values are {dtype}"));
    }
    if options.precision.is_measured() {
        let cost = options.cost.get(&graph.node(layer.node).name)?;
        // A time that is not a number compares as nothing, and keeps f32.
        if cost.low_ms.partial_cmp(&cost.f32_ms) != Some(Ordering::Less) {
            return Some(format!("int8 measures {:.3} ms, f32 {:.3} ms", cost.low_ms, cost.f32_ms));
        }
    }
    None
}

/// The layers that the budget of `max_loss_increase` takes, by name, with the sum up to and with each.
fn within_budget(graph: &Graph, layers: &[Layer], options: &Options) -> BTreeMap<Name, f32> {
    let mut candidates: Vec<(f32, Name)> = layers
        .iter()
        .filter(|layer| barred(graph, layer, options).is_none())
        .filter_map(|layer| {
            let node = graph.node(layer.node);
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
fn by_score(
    graph: &Graph,
    layer: &Layer,
    options: &Options,
    within_budget: &BTreeMap<Name, f32>,
) -> (bool, String) {
    if options.precision == PrecisionChoice::Int8 {
        return (true, "int8 was asked for".to_owned());
    }
    let node = graph.node(layer.node);
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

fn decide_layer(
    graph: &Graph,
    layer: &Layer,
    options: &Options,
    within_budget: &BTreeMap<Name, f32>,
) -> (Decision, Vec<u32>) {
    let node = graph.node(layer.node);
    let decision = |precision, outliers: Vec<u32>, reason| {
        let decision = Decision {
            node: node.name.clone(),
            op: node.op.name(),
            precision,
            channels_high: outliers.len(),
            score: node.note.sensitivity,
            reason,
        };
        (decision, outliers)
    };
    if let Some(precision) = node.note.precision {
        return decision(precision, node.note.outliers.clone(), "the graph notes it".to_owned());
    }
    let high = |reason| decision(Precision::uniform(DType::F32), Vec::new(), reason);
    if let Some(reason) = barred(graph, layer, options) {
        return high(reason);
    }
    if options.precision == PrecisionChoice::Bf16 {
        return decision(bf16(options.operations), Vec::new(), "bf16 was asked for".to_owned());
    }
    let (low, reason) = by_score(graph, layer, options, within_budget);
    if !low {
        return high(reason);
    }
    let outliers = match channels::outliers(graph, layer, options) {
        Ok(outliers) => outliers,
        Err(reason) => return high(reason),
    };
    let mut precision = Precision::uniform(DType::F32);
    if options.operations.forward {
        precision.forward = DType::I8;
    }
    if options.operations.backward {
        precision.grad_input = DType::I8;
    }
    decision(precision, outliers, reason)
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
