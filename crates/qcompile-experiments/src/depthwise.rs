//! A depthwise network on integers (Krishnamoorthi 2018, arXiv:1806.08342, tables 2 to 4): batch normalization that is
//! folded into weights spreads the ranges of their channels. Rounding a trained network by one scale for each weight then
//! fails where bits are few, a scale for each channel comes close, and training with the roundings wins back what is left.

use crate::classifier::{Classifier, Pictures, Training, model};
use crate::{Report, Settings};
use qcompile::export::{DEFAULT_OPSET, Exported};
use qcompile::model::Target;
use qcompile::terminal::{Align, Table};
use qcompile::{
    BatchNormMode, DType, Operations, Options, PrecisionChoice, Result, WeightScales, Weights,
    checkpoint, compile_bytes,
};
use std::path::Path;
use std::sync::Arc;

/// As the network takes its pictures.
const TRANSFORM: &str = ":channels=3:pad=2:mean=0.286:std=0.353";
/// Passes over the pictures, in f32 and with the roundings.
const EPOCHS: [u64; 2] = [4, 1];
/// The learning rate of training with the roundings.
const FINE: f64 = 0.005;

/// A network for inference, and what is asked of it.
struct Network {
    pictures: Pictures,
    data: String,
    folded: Exported,
    f32: f64,
}

impl Network {
    fn new(settings: &Settings) -> Result<Network> {
        let pictures = Pictures::load(settings.pictures(), TRANSFORM)?;
        let mut training = Training::f32(EPOCHS[0]);
        training.options.batch_norm = BatchNormMode::Train;
        let mut net = Classifier::train_as(&model("tiny_mobilenet"), &pictures.train, &training)?;
        let f32 = net.accuracy(&pictures.test)?;
        let state = checkpoint::encode(net.trainer(), "")?;
        let target = Target::Checkpoint(Arc::clone(net.trainer().plan()), state);
        let mut folded = Exported::of(&target, Path::new(""), &training.options)?;
        folded.fold()?;
        let data = Pictures::training(settings.pictures(), TRANSFORM);
        Ok(Network { pictures, data, folded, f32 })
    }

    fn options(&self, weights: Weights) -> Options {
        let Training { options, .. } = Training::f32(0);
        Options { weights, data: Some(self.data.clone()), ..options }
    }

    /// Accuracy in percent, rounded without training.
    fn rounded(&self, weights: Weights) -> Result<f64> {
        let mut model = self.folded.clone();
        model.quantize(&self.options(weights))?;
        // Weights of 4 bits need a later opset.
        let opset = if weights.dtype == DType::I4 { 21 } else { DEFAULT_OPSET };
        let training = Training::f32(0);
        let compiled = compile_bytes(&model.onnx(opset)?.bytes, &training.options)?;
        Classifier::train_compiled(compiled, &self.pictures.train, &training)?
            .accuracy(&self.pictures.test)
    }

    /// Accuracy in percent, after training with the roundings.
    fn trained(&self, weights: Weights) -> Result<f64> {
        let operations = Operations { backward: false, ..Operations::default() };
        let precision = PrecisionChoice::Int8;
        let options = Options { qat: true, precision, operations, ..self.options(weights) };
        let training = Training { options, lr: FINE, ..Training::f32(EPOCHS[1]) };
        let compiled = compile_bytes(&self.folded.onnx(DEFAULT_OPSET)?.bytes, &training.options)?;
        Classifier::train_compiled(compiled, &self.pictures.train, &training)?
            .accuracy(&self.pictures.test)
    }
}

pub(crate) fn run(settings: &Settings) -> Result<Report> {
    let network = Network::new(settings)?;
    let mut report = Report::default();
    let header = ["weights", "rounded", "trained with it"];
    let mut table = Table::new(&header.map(|word| (word, Align::Right)));
    let mut all = Vec::new();
    for (name, dtype, scales) in [
        ("8 bits per tensor", DType::I8, WeightScales::Tensor),
        ("8 bits per channel", DType::I8, WeightScales::Channel),
        ("4 bits per tensor", DType::I4, WeightScales::Tensor),
        ("4 bits per channel", DType::I4, WeightScales::Channel),
    ] {
        let weights = Weights { dtype, scales };
        let row = [network.rounded(weights)?, network.trained(weights)?];
        table.row(
            std::iter::once(name.to_owned()).chain(row.map(|accuracy| format!("{accuracy:.2}"))),
        );
        all.push(row);
    }
    let full = network.f32;
    report.table(&format!("Accuracy (%) of tiny_mobilenet, batch normalization folded, activations in uint8; f32 {full:.2}"), table);
    let lost = |at: usize, way: usize| full - all[at][way];
    // So small a network spreads its channels too little for 8 bits to suffer; the experiment `per-channel` spreads them.
    let worst = (0..2).flat_map(|at| [lost(at, 0), lost(at, 1)]).fold(f64::NEG_INFINITY, f64::max);
    report.rule(
        format!("8 bits lose at most 1 point, by either scales, trained or not ({worst:.2})"),
        worst <= 1.0,
    );
    let [tensor, channel] = [2, 3].map(|at| [lost(at, 0), lost(at, 1)]);
    report.rule(
        format!(
            "4 bits per tensor lose 5 points more than per channel ({:.2}, {:.2})",
            tensor[0], channel[0]
        ),
        tensor[0] - channel[0] >= 5.0,
    );
    report.rule(
        "the order of the paper at 4 bits: rounded per tensor, per channel, then either after training",
        tensor[0] > channel[0] && channel[0] > tensor[1].max(channel[1]),
    );
    for (name, [rounded, trained]) in [("tensor", tensor), ("channel", channel)] {
        report.rule(
            format!(
                "4 bits per {name}: training wins back more than half ({trained:.2} of {rounded:.2})"
            ),
            trained < rounded / 2.0,
        );
    }
    Ok(report)
}
