//! Scores every layer, and every output channel of it, by what int8 would do to it.
//!
//! *Before*: a forward graph with its loss. *After*: each layer (see [`crate::quantize::layers`]) carries a note
//! `sensitivity`; the caller gets all scores. *Why here*: the loss must exist to be measured, and the decisions of
//! `quantize` rest on the scores.
//!
//! The pass computes no product itself: an [`Evaluate`] that the caller brings runs the graph on its calibration
//! data.

mod noise;

use crate::PassError;
use crate::quantize::{
    Asked, Candidate, Inserted, Layer, Numerics, activation_products, insert_activations,
    insert_forward, layers, multiplied, obstacle,
};
use noise::Noise;
use qcompile_ir::{Graph, Name, NodeId, Precision, Tensor};

const PASS: &str = "sensitivity";

/// Runs forward graphs on calibration data that it holds.
pub trait Evaluate {
    /// The mean of the output `loss` over the calibration data.
    ///
    /// # Errors
    /// Why the graph could not be run.
    fn loss(&mut self, graph: &Graph) -> Result<f64, String>;

    /// These values, in this order, on (at least a part of) the calibration data: the same part in every call.
    ///
    /// # Errors
    /// Why the graph could not be run.
    fn values(&mut self, graph: &Graph, names: &[Name]) -> Result<Vec<Tensor>, String>;
}

/// What a score means. Less is better for all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Metric {
    /// `(loss with only this layer in int8 - loss in f32) / |loss in f32|` over the calibration data. May be
    /// slightly negative.
    #[default]
    LeaveOneOut,
    /// Energy of the rounding error of the weight over energy of the weight, one scale per output channel: the
    /// reciprocal of the signal-to-quantization-noise ratio, as a ratio, not in decibels.
    WeightSqnr,
    /// The same of the layer's result, when only this layer is in int8.
    OutputSqnr,
    /// The same of the layer's data, one scale for all of it. Channels are those of the data: the largest magnitude of
    /// each over the median of those that are not all zero. Few channels of large magnitudes make the scale too coarse for
    /// all others (Dettmers et al. 2022, arXiv:2208.07339).
    ActivationRange,
}

impl Metric {
    /// Every metric, the default first.
    pub const ALL: [Metric; 4] =
        [Metric::LeaveOneOut, Metric::WeightSqnr, Metric::OutputSqnr, Metric::ActivationRange];

    /// The word on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Metric::LeaveOneOut => "leave-one-out",
            Metric::WeightSqnr => "weight-sqnr",
            Metric::OutputSqnr => "output-sqnr",
            Metric::ActivationRange => "activation-range",
        }
    }
}

impl std::str::FromStr for Metric {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        Metric::ALL.into_iter().find(|metric| metric.name() == text).ok_or(())
    }
}

/// What [`run`] is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// What the scores mean.
    pub metric: Metric,
    /// Number of calibration samples that the evaluator holds; repeated in [`Scores`].
    pub samples: usize,
    /// How layers are rounded.
    pub numerics: Numerics,
    /// As in [`quantize::Options`](crate::quantize::Options).
    pub ranged: bool,
}

/// The scores of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerScore {
    /// The product.
    pub name: Name,
    /// The ONNX node it came from.
    pub origin: Option<String>,
    /// Its mnemonic.
    pub op: String,
    /// The layer's score; infinite if the quantized loss is not finite.
    pub score: f32,
    /// One score per output channel: the ratio noise : signal of the weight, or of the result for
    /// [`Metric::OutputSqnr`]; for [`Metric::ActivationRange`] one per channel of the data.
    pub channels: Vec<f32>,
}

/// What [`run`] measured.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores {
    /// In the graph's order.
    pub layers: Vec<LayerScore>,
    /// What the scores mean.
    pub metric: Metric,
    /// The loss of the f32 graph.
    pub baseline_loss: f64,
    /// Number of calibration samples.
    pub samples: usize,
}

impl Scores {
    /// The scores of the layer of this name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&LayerScore> {
        self.layers.iter().find(|layer| layer.name.as_str() == name)
    }

    /// Writes the note `sensitivity` beside every layer of `graph` that has a score here; returns how many got one.
    pub fn annotate(&self, graph: &mut Graph) -> usize {
        let mut annotated = 0;
        let layers = layers(graph).into_iter().map(|layer| layer.node);
        let products: Vec<NodeId> = layers.chain(activation_products(graph)).collect();
        for node in products {
            let name = graph.node(node).name.clone();
            if let Some(score) = self.find(name.as_str()) {
                graph.note_mut(node).sensitivity = Some(score.score);
                annotated += 1;
            }
        }
        annotated
    }
}

/// The products that [`run`] scores: layers, then products of two activations, where int8 kernels have them.
#[must_use]
pub fn scored(graph: &Graph, options: &Options) -> (Vec<Layer>, Vec<NodeId>) {
    let asked = Asked::by_numerics(&options.numerics, options.ranged);
    let has_kernel = |one: Candidate<'_>| obstacle(graph, one, asked).is_none();
    let mut layers = layers(graph);
    layers.retain(|layer| has_kernel(Candidate { node: layer.node, layer: Some(layer) }));
    let mut products = activation_products(graph);
    products.retain(|&node| has_kernel(Candidate::of_activations(node)));
    (layers, products)
}

/// Scores what is [`scored`] and notes its sensitivity. `progress` is told how many layers are done, of how many, and the
/// name of the next.
///
/// # Errors
/// [`PassError::Evaluation`] if the evaluator fails, returns what was not asked for, or the loss of the f32 graph is
/// not finite.
pub fn run(
    graph: &mut Graph,
    evaluator: &mut dyn Evaluate,
    options: &Options,
    progress: &mut dyn FnMut(usize, usize, &str),
) -> Result<Scores, PassError> {
    let (layers, products) = scored(graph, options);
    let total = layers.len() + products.len();
    let baseline_loss = evaluator.loss(graph).map_err(failure)?;
    if !baseline_loss.is_finite() {
        return Err(failure(format!("the loss of the f32 model is {baseline_loss}")));
    }
    let mut measured = Vec::with_capacity(total);
    for (done, layer) in layers.iter().enumerate() {
        let node = graph.node(layer.node);
        progress(done, total, node.name.as_str());
        let (score, channels) = match options.metric {
            Metric::LeaveOneOut => (
                loss_increase(&layer_quantized(graph, layer, options)?, evaluator, baseline_loss)?,
                ratios(&weight_noise(graph, layer, evaluator, options)?),
            ),
            Metric::WeightSqnr => {
                let channels = weight_noise(graph, layer, evaluator, options)?;
                (noise::total(&channels).ratio(), ratios(&channels))
            }
            Metric::OutputSqnr => {
                let channels = output_noise(graph, layer, evaluator, options)?;
                (noise::total(&channels).ratio(), ratios(&channels))
            }
            // States have the range of their codes, whatever they are.
            Metric::ActivationRange if layer.recurrent => continue,
            Metric::ActivationRange => {
                let name = &graph.node(graph.operand(layer.node, 0)).name;
                let data = value(graph, evaluator, name)?;
                let noise = noise::of_tensor(&data, options.numerics.types.activation);
                (noise.ratio(), noise::ranges(&data, layer.input_axis))
            }
        };
        measured.push(LayerScore {
            name: node.name.clone(),
            origin: node.note.origin.clone(),
            op: node.op.name().to_owned(),
            score: if score.is_nan() { f32::INFINITY } else { score },
            channels,
        });
    }
    for (done, &product) in products.iter().enumerate() {
        let node = graph.node(product);
        progress(layers.len() + done, total, node.name.as_str());
        let score = score_of_product(graph, product, evaluator, options, baseline_loss)?;
        measured.push(LayerScore {
            name: node.name.clone(),
            origin: node.note.origin.clone(),
            op: node.op.name().to_owned(),
            score: if score.is_nan() { f32::INFINITY } else { score },
            channels: Vec::new(),
        });
    }
    progress(total, total, "");
    let Options { metric, samples, .. } = *options;
    let scores = Scores { layers: measured, metric, baseline_loss, samples };
    scores.annotate(graph);
    Ok(scores)
}

fn failure(reason: impl Into<String>) -> PassError {
    PassError::Evaluation { pass: PASS, reason: reason.into() }
}

fn ratios(channels: &[Noise]) -> Vec<f32> {
    let ratio = |noise: &Noise| Some(noise.ratio()).filter(|ratio| !ratio.is_nan());
    channels.iter().map(|noise| ratio(noise).unwrap_or(f32::INFINITY)).collect()
}

/// The score of a product of two activations, which has no channels. In the place of the weight or the data stand its
/// operands, of which the noisiest counts.
fn score_of_product(
    graph: &Graph,
    product: NodeId,
    evaluator: &mut dyn Evaluate,
    options: &Options,
    baseline: f64,
) -> Result<f32, PassError> {
    let quantized = || -> Result<Graph, PassError> {
        let mut variant = graph.clone();
        note(&mut variant, product, options);
        insert_activations(&mut variant, product, &mut Inserted::default())?;
        Ok(variant)
    };
    match options.metric {
        Metric::LeaveOneOut => loss_increase(&quantized()?, evaluator, baseline),
        Metric::OutputSqnr => {
            let noise = noise_of_result(graph, &quantized()?, product, None, evaluator)?;
            Ok(noise::total(&noise).ratio())
        }
        Metric::WeightSqnr | Metric::ActivationRange => {
            let mut worst = 0.0_f32;
            for position in 0..multiplied(graph.op(product)) {
                let name = &graph.node(graph.operand(product, position)).name;
                let data = value(graph, evaluator, name)?;
                worst =
                    worst.max(noise::of_tensor(&data, options.numerics.types.activation).ratio());
            }
            Ok(worst)
        }
    }
}

/// Notes that a product is in low precision.
fn note(graph: &mut Graph, product: NodeId, options: &Options) {
    let note = graph.note_mut(product);
    note.quantizer = Some(options.numerics.quantizer());
    note.precision = Some(Precision::uniform(options.numerics.types.activation));
}

/// The graph with only this layer in int8.
fn layer_quantized(graph: &Graph, layer: &Layer, options: &Options) -> Result<Graph, PassError> {
    let mut variant = graph.clone();
    note(&mut variant, layer.node, options);
    insert_forward(&mut variant, layer, &mut Inserted::default())?;
    Ok(variant)
}

#[allow(clippy::cast_possible_truncation, reason = "a score needs no more than f32")]
fn loss_increase(
    variant: &Graph,
    evaluator: &mut dyn Evaluate,
    baseline: f64,
) -> Result<f32, PassError> {
    let loss = evaluator.loss(variant).map_err(failure)?;
    if !loss.is_finite() {
        return Ok(f32::INFINITY);
    }
    // A loss of exactly 0 has no relative change: then the absolute one stands.
    let unit = if baseline == 0.0 { 1.0 } else { baseline.abs() };
    Ok(((loss - baseline) / unit) as f32)
}

/// The one value of that name.
fn value(graph: &Graph, evaluator: &mut dyn Evaluate, name: &Name) -> Result<Tensor, PassError> {
    let mut values = evaluator.values(graph, std::slice::from_ref(name)).map_err(failure)?;
    let value = values.pop().ok_or_else(|| failure(format!("the evaluator returned no {name}")))?;
    let wanted = graph.find(name.as_str()).map(|id| graph.ty(id).shape.rank());
    if wanted == Some(value.shape().len()) {
        Ok(value)
    } else {
        Err(failure(format!("{name} has the unexpected shape {:?}", value.shape())))
    }
}

fn weight_noise(
    graph: &Graph,
    layer: &Layer,
    evaluator: &mut dyn Evaluate,
    options: &Options,
) -> Result<Vec<Noise>, PassError> {
    let name = &graph.node(graph.operand(layer.node, 1)).name;
    Ok(noise::of_weight(
        &value(graph, evaluator, name)?,
        layer.weight_axis,
        options.numerics.types.weight,
    ))
}

fn output_noise(
    graph: &Graph,
    layer: &Layer,
    evaluator: &mut dyn Evaluate,
    options: &Options,
) -> Result<Vec<Noise>, PassError> {
    let variant = layer_quantized(graph, layer, options)?;
    noise_of_result(graph, &variant, layer.node, Some(layer.result_axis), evaluator)
}

/// The noise of the result of a product along an axis, the last one if none is given.
fn noise_of_result(
    graph: &Graph,
    variant: &Graph,
    product: NodeId,
    axis: Option<usize>,
    evaluator: &mut dyn Evaluate,
) -> Result<Vec<Noise>, PassError> {
    let name = &graph.node(product).name;
    let axis = axis.unwrap_or(graph.ty(product).shape.rank() - 1);
    let exact = value(graph, evaluator, name)?;
    let rounded = value(variant, evaluator, name)?;
    noise::between(&exact, &rounded, axis)
        .ok_or_else(|| failure(format!("{name} changed its shape")))
}
