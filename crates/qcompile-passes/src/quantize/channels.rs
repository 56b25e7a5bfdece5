//! Which channels of a layer stay in high precision.

use super::decide::Options;
use super::layer::Layer;
use qcompile_ir::Graph;

/// The output channels of a layer that stay f32, ascending: those above the channel threshold; without one, those
/// noted.
///
/// # Errors
/// Why the whole layer stays f32 instead.
pub(super) fn outliers(
    graph: &Graph,
    layer: &Layer,
    options: &Options,
) -> Result<Vec<u32>, String> {
    let outliers = sensitive(graph, layer, options);
    if !outliers.is_empty() && layer.grouped {
        return Err(format!(
            "{} channels are sensitive, and a grouped convolution is not split",
            outliers.len()
        ));
    }
    if outliers.len() * 4 > layer.channels {
        return Err(format!(
            "{} of {} channels are sensitive, more than a quarter",
            outliers.len(),
            layer.channels
        ));
    }
    Ok(outliers)
}

fn sensitive(graph: &Graph, layer: &Layer, options: &Options) -> Vec<u32> {
    let node = graph.node(layer.node);
    let Some(threshold) = options.channel_threshold else { return node.note.outliers.clone() };
    let scores = options.scores.as_ref().and_then(|scores| scores.find(node.name.as_str()));
    let Some(scores) = scores else { return Vec::new() };
    (0_u32..)
        .zip(&scores.channels)
        .take(layer.channels)
        .filter(|(_, score)| **score > threshold)
        .map(|(channel, _)| channel)
        .collect()
}
