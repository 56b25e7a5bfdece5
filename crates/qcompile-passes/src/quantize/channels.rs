//! Which channels of a layer one int8 product does not serve, and what becomes of them.

use super::decide::{Options, refusal};
use super::layer::Layer;
use crate::PassError;
use crate::sensitivity::Metric;
use qcompile_ir::{Channels, DType, Granularity, Graph, QuantizedRange};

/// What becomes of sensitive output channels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum ChannelPolicy {
    /// They stay in high precision, in a product of their own.
    #[default]
    Split,
    /// Their weights are sums of two or three int8 points (Liu et al. 2021, arXiv:2002.09049).
    Multipoint,
}

impl ChannelPolicy {
    /// Every policy, the default first.
    pub const ALL: [ChannelPolicy; 2] = [ChannelPolicy::Split, ChannelPolicy::Multipoint];

    /// The word on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            ChannelPolicy::Split => "split",
            ChannelPolicy::Multipoint => "multipoint",
        }
    }
}

/// What each further point divides the energy of the error by, at least: what is left of a weight is at most half a step
/// of its range, and has a range of its own. A step of i8 is 1/127 of the range; one of a float is relative to the value.
fn gain(dtype: DType) -> f32 {
    let steps = match dtype {
        DType::F8E4M3 => 8.0,
        DType::F8E5M2 => 4.0,
        _ => QuantizedRange::of(dtype, false).map_or(127.0, |range| range.high),
    };
    (2.0_f32 * steps).powi(2)
}

/// Whether the options go together.
///
/// # Errors
/// [`PassError::Unsupported`] where they do not.
pub(super) fn check(options: &Options) -> Result<(), PassError> {
    let scores = options.scores.as_ref();
    if options.channel_threshold.is_none() {
        return Ok(());
    }
    if scores.is_none() {
        return Err(refusal("a channel threshold needs the scores of the channels"));
    }
    if options.channel_policy != Some(ChannelPolicy::Multipoint) {
        return Ok(());
    }
    if scores.is_some_and(|scores| scores.metric == Metric::ActivationRange) {
        return Err(refusal(
            "multipoint gives points to weights, and the scores are of the channels of data",
        ));
    }
    if options.numerics.granularity == Granularity::Tensor {
        return Err(refusal(
            "multipoint gives points to channels, and with one scale for the tensor they have none of their own",
        ));
    }
    if !options.operations.forward {
        return Err(refusal("multipoint is for the forward product, which is not to be quantized"));
    }
    Ok(())
}

/// The channels of a layer above the channel threshold, by policy; without a threshold, those noted.
///
/// # Errors
/// Why the whole layer stays in high precision instead.
pub(super) fn choose(graph: &Graph, layer: &Layer, options: &Options) -> Result<Channels, String> {
    let channels = sensitive(graph, layer, options);
    let sets = [
        (channels.outliers.len().max(channels.points.len()), layer.channels, "channels"),
        (channels.input_outliers.len(), layer.input_channels, "channels of its data"),
    ];
    for (count, all, what) in sets {
        if count > 0 && layer.recurrent {
            return Err(format!(
                "{count} {what} are sensitive, and a recurrent layer is not split"
            ));
        }
        if count > 0 && layer.grouped {
            return Err(format!(
                "{count} {what} are sensitive, and a grouped convolution is not split"
            ));
        }
        if count * 4 > all {
            return Err(format!("{count} of {all} {what} are sensitive, more than a quarter"));
        }
    }
    Ok(channels)
}

fn sensitive(graph: &Graph, layer: &Layer, options: &Options) -> Channels {
    let node = graph.node(layer.node);
    let Some(threshold) = options.channel_threshold else { return node.note.channels.clone() };
    let Some(scores) = &options.scores else { return Channels::default() };
    let Some(layer) = scores.find(node.name.as_str()) else { return Channels::default() };
    let above = (0_u32..).zip(&layer.channels).filter(|(_, score)| **score > threshold);
    let mut channels = Channels::default();
    match (scores.metric, options.channel_policy.unwrap_or_default()) {
        (Metric::ActivationRange, _) => {
            channels.input_outliers = above.map(|(channel, _)| channel).collect();
        }
        (_, ChannelPolicy::Split) => {
            channels.outliers = above.map(|(channel, _)| channel).collect();
        }
        (_, ChannelPolicy::Multipoint) => {
            let gain = gain(options.numerics.types.weight);
            let points = |score: f32| if score / gain <= threshold { 2 } else { 3 };
            channels.points = above.map(|(channel, score)| (channel, points(*score))).collect();
        }
    }
    channels
}

/// The channels in a few words, if there are any.
pub(super) fn described(channels: &Channels) -> Option<String> {
    let Channels { outliers, input_outliers, points } = channels;
    let sets = [
        (outliers.len(), "channels in high precision"),
        (input_outliers.len(), "channels of its data in high precision"),
        (points.len(), "channels of several points"),
    ];
    let found = sets.into_iter().find(|(count, _)| *count > 0);
    found.map(|(count, what)| format!("{count} {what}"))
}
