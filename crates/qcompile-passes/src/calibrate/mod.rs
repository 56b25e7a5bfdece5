//! Finds the ranges that values are rounded in, from what they are on samples.
//!
//! *Before*: a forward graph in f32 and the values that are to be rounded (see [`crate::quantize::activations`]). *After*:
//! the same graph, and a [`Range`] for each of them. *Why here*: before roundings are inserted, as the values
//! of the unrounded graph are looked at.
//!
//! The pass runs nothing itself: an [`Observe`] that the caller brings runs the graph, once for the extremes, and once more
//! for the histograms that every method but [`Method::MinMax`] looks at. Both are sums over samples, so that neither batches
//! nor their order matter. Elements that are not finite are left out.

mod entropy;
mod histogram;

use crate::PassError;
use crate::quantize::{Codes, initial_step_size};
use histogram::Histogram;
use qcompile_ir::{Graph, Name, NodeId, Tensor};
use std::collections::BTreeMap;
use std::fmt;

const PASS: &str = "calibrate";

/// What is called with the index of a value, and with the value on some samples.
pub type Visit<'v> = &'v mut dyn FnMut(usize, &Tensor);

/// Runs forward graphs on calibration data that it holds.
pub trait Observe {
    /// Shows these values on all calibration data, part by part.
    ///
    /// # Errors
    /// Why the graph could not be run.
    fn observe(&mut self, graph: &Graph, names: &[Name], visit: Visit) -> Result<(), String>;
}

/// How a range is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Method {
    /// From the smallest to the largest element.
    #[default]
    MinMax,
    /// So that this part of the elements, in percent, is within; what is not is cut off equally at both ends, or by its
    /// magnitude for symmetric codes.
    Percentile(f64),
    /// With the least mean squared error of rounding and clamping.
    Mse,
    /// With the least Kullback-Leibler divergence of the rounded from the unrounded distribution (Migacz 2017, "8-bit
    /// inference with TensorRT").
    Entropy,
    /// As learned step sizes begin: by the mean magnitude (Esser et al. 2020, arXiv:1902.08153, section 2.1).
    Lsq,
}

impl fmt::Display for Method {
    /// As on the command line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Method::MinMax => f.write_str("min-max"),
            Method::Percentile(percent) => write!(f, "percentile={percent}"),
            Method::Mse => f.write_str("mse"),
            Method::Entropy => f.write_str("entropy"),
            Method::Lsq => f.write_str("lsq"),
        }
    }
}

/// The smallest and the largest element that need not be clamped.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Range {
    /// At most 0.
    pub low: f32,
    /// At least 0.
    pub high: f32,
}

impl Range {
    /// The range with 0 in it, which every set of codes has to have exactly (padding, relu).
    #[must_use]
    pub fn new(low: f32, high: f32) -> Range {
        Range { low: low.min(0.0), high: high.max(0.0) }
    }

    /// The larger magnitude.
    #[must_use]
    pub fn amax(self) -> f32 {
        self.high.max(-self.low)
    }
}

/// Finds the ranges of these values by name.
///
/// # Errors
/// [`PassError::Evaluation`] if the graph cannot be run, or a value has no finite element.
pub fn run(
    graph: &Graph,
    values: &[NodeId],
    observe: &mut dyn Observe,
    method: Method,
    codes: Codes,
) -> Result<BTreeMap<Name, Range>, PassError> {
    let failed = |reason: String| PassError::Evaluation { pass: PASS, reason };
    let names: Vec<Name> = values.iter().map(|&id| graph.node(id).name.clone()).collect();
    let mut extremes = vec![(f32::INFINITY, f32::NEG_INFINITY); names.len()];
    let mut magnitudes = vec![(0.0_f64, 0.0_f64); names.len()];
    let mut visit = |at: usize, tensor: &Tensor| {
        let (low, high) = &mut extremes[at];
        let (sum, count) = &mut magnitudes[at];
        for x in tensor.to_f32().into_iter().filter(|x| x.is_finite()) {
            *low = low.min(x);
            *high = high.max(x);
            *sum += f64::from(x.abs());
            *count += 1.0;
        }
    };
    observe.observe(graph, &names, &mut visit).map_err(failed)?;
    if let Some(at) = extremes.iter().position(|(low, high)| low > high) {
        let reason = format!("{} has no finite element on the calibration data", names[at]);
        return Err(failed(reason));
    }
    let ranges: Vec<Range> = extremes.iter().map(|&(low, high)| Range::new(low, high)).collect();
    if method == Method::MinMax {
        return Ok(names.into_iter().zip(ranges).collect());
    }
    if method == Method::Lsq {
        #[allow(clippy::cast_possible_truncation, reason = "ranges are f32")]
        let of_steps = ranges.iter().zip(magnitudes).map(|(range, (sum, count))| {
            let step = initial_step_size(sum / count, codes.largest(range.low));
            codes.range_of_step(step as f32, range.low)
        });
        return Ok(names.into_iter().zip(of_steps).collect());
    }
    let mut histograms: Vec<Histogram> =
        ranges.iter().map(|&range| Histogram::new(range)).collect();
    let mut visit = |at: usize, tensor: &Tensor| histograms[at].add(&tensor.to_f32());
    observe.observe(graph, &names, &mut visit).map_err(failed)?;
    let chosen = histograms.iter().map(|histogram| match method {
        Method::MinMax | Method::Lsq => histogram.extremes(),
        Method::Percentile(percent) => histogram.percentile(percent, codes),
        Method::Mse => histogram.least_error(codes),
        Method::Entropy => entropy::range(histogram, codes),
    });
    Ok(names.into_iter().zip(chosen).collect())
}
