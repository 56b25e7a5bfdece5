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
const SEEDS: [u64; 3] = [1, 2, 3];
/// Passes over the pictures, in f32 and with the roundings.
const EPOCHS: [u64; 2] = [4, 1];
/// The learning rate of training with the roundings.
const FINE: f64 = 0.005;
/// What weights are rounded to.
const WAYS: [(&str, DType, WeightScales); 4] = [
    ("8 bits per tensor", DType::I8, WeightScales::Tensor),
    ("8 bits per channel", DType::I8, WeightScales::Channel),
    ("4 bits per tensor", DType::I4, WeightScales::Tensor),
    ("4 bits per channel", DType::I4, WeightScales::Channel),
];

/// A network for inference, and what is asked of it.
struct Network {
    pictures: Pictures,
    data: String,
    folded: Exported,
    f32: f64,
    seed: u64,
}

impl Network {
    fn new(settings: &Settings, seed: u64) -> Result<Network> {
        let pictures = Pictures::load(settings.pictures(), TRANSFORM)?;
        let mut training = Training { seed, ..Training::f32(EPOCHS[0]) };
        training.options.batch_norm = BatchNormMode::Train;
        let mut net = Classifier::train_as(&model("tiny_mobilenet"), &pictures.train, &training)?;
        let f32 = net.accuracy(&pictures.test)?;
        let state = checkpoint::encode(net.trainer(), "")?;
        let target = Target::Checkpoint(Arc::clone(net.trainer().plan()), state);
        let mut folded = Exported::of(&target, Path::new(""), &training.options)?;
        folded.fold()?;
        let data = Pictures::training(settings.pictures(), TRANSFORM);
        Ok(Network { pictures, data, folded, f32, seed })
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

    /// Accuracy in percent after further training, with roundings or in f32.
    fn trained(&self, weights: Option<Weights>) -> Result<f64> {
        let further = Training { lr: FINE, seed: self.seed, ..Training::f32(EPOCHS[1]) };
        let options = match weights {
            Some(weights) => {
                let operations = Operations { backward: false, ..Operations::default() };
                let precision = PrecisionChoice::Int8;
                Options { qat: true, precision, operations, ..self.options(weights) }
            }
            None => further.options,
        };
        let training = Training { options, ..further };
        let compiled = compile_bytes(&self.folded.onnx(DEFAULT_OPSET)?.bytes, &training.options)?;
        Classifier::train_compiled(compiled, &self.pictures.train, &training)?
            .accuracy(&self.pictures.test)
    }
}

pub(crate) fn run(settings: &Settings) -> Result<Report> {
    // Means over the seeds: in f32 and trained further in it, then for each way rounded and trained with it.
    let mut full = [0.0; 2];
    let mut all = [[0.0; 2]; WAYS.len()];
    for seed in SEEDS {
        let network = Network::new(settings, seed)?;
        let part = 1.0 / SEEDS.len() as f64;
        full[0] += network.f32 * part;
        full[1] += network.trained(None)? * part;
        for ((_, dtype, scales), row) in WAYS.into_iter().zip(&mut all) {
            let weights = Weights { dtype, scales };
            row[0] += network.rounded(weights)? * part;
            row[1] += network.trained(Some(weights))? * part;
        }
    }
    let mut report = Report::default();
    let header = ["weights", "as trained in f32", "trained an epoch further"];
    let mut table = Table::new(&header.map(|word| (word, Align::Right)));
    let rows = WAYS.iter().map(|(name, ..)| *name).zip(all);
    for (name, row) in std::iter::once(("f32", full)).chain(rows) {
        table.row(
            std::iter::once(name.to_owned()).chain(row.map(|accuracy| format!("{accuracy:.2}"))),
        );
    }
    report.table("Accuracy (%) of tiny_mobilenet, batch normalization folded, activations in uint8, mean of 3 seeds", table);
    let lost = |at: usize| [0, 1].map(|way| full[way] - all[at][way]);
    // So small a network spreads its channels too little for 8 bits to suffer; the experiment `per-channel` spreads them.
    let worst = lost(0).into_iter().chain(lost(1)).fold(f64::NEG_INFINITY, f64::max);
    report.rule(
        format!("8 bits lose at most 1 point, by either scales, trained or not ({worst:.2})"),
        worst <= 1.0,
    );
    let (tensor, channel) = (lost(2), lost(3));
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
                "4 bits per {name}: training wins back more than half of what is lost to f32 trained as long ({trained:.2} of {rounded:.2})"
            ),
            trained < rounded / 2.0,
        );
    }
    Ok(report)
}
