//! Every combination of the operations that may be quantized (claims 7 and 18 of the application): forward, backward,
//! mean of gradients, update.

use crate::classifier::{Classifier, Training, model};
use crate::{Report, Settings};
use qcompile::data::{Array, Dataset, Limits};
use qcompile::terminal::{Align, Table};
use qcompile::{Error, Operations, PrecisionChoice, Result};
use std::ops::Range;
use std::path::Path;

/// Digits of 8x8 pixels, which come with the repository.
const DIGITS: &str = "../../models/data/digits.csv.gz";
const SEEDS: [u64; 3] = [1, 2, 3];
/// The most that a combination may lose, in points.
const MOST: f64 = 1.0;

/// Some of the samples.
fn part(all: &Dataset, rows: Range<usize>) -> Result<Dataset> {
    let mut part = all.clone();
    for array in part.arrays.values_mut() {
        let size = array.bytes.len() / array.shape[0];
        let shape = [&[rows.len()], &array.shape[1..]].concat();
        let bytes = array.bytes[rows.start * size..rows.end * size].to_vec();
        *array = Array::new(array.dtype, shape, bytes)?;
    }
    Ok(part)
}

pub(crate) fn run(settings: &Settings) -> Result<Report> {
    if settings.data.is_some() {
        return Err(Error::usage(
            "masks trains on the digits of the repository, and takes no --data",
        ));
    }
    let digits = Path::new(env!("CARGO_MANIFEST_DIR")).join(DIGITS);
    let digits = Dataset::load(&digits.display().to_string(), Limits::default())?;
    // The last fifth, of other writers than the rest, is held out.
    let (train, test) = (part(&digits, 0..1437)?, part(&digits, 1437..1797)?);
    let accuracy = |precision: PrecisionChoice, operations: Operations| -> Result<f64> {
        let mut sum = 0.0;
        for seed in SEEDS {
            let mut training = Training { seed, ..Training::f32(20) };
            training.options.batch_size = 32;
            training.options.precision = precision;
            training.options.operations = operations;
            let mut net = Classifier::train_as(&model("digits_cnn"), &train, &training)?;
            sum += net.accuracy(&test)?;
        }
        Ok(sum / SEEDS.len() as f64)
    };
    let mut report = Report::default();
    let full = accuracy(PrecisionChoice::F32, Operations::default())?;
    let header =
        [("quantized", Align::Left), ("accuracy (%)", Align::Right), ("lost", Align::Right)];
    let mut table = Table::new(&header);
    table.row(["nothing".to_owned(), format!("{full:.2}"), String::new()]);
    let mut worst = (f64::NEG_INFINITY, String::new());
    for mask in 1_u8..16 {
        let bit = |at: u8| mask >> at & 1 == 1;
        let operations =
            Operations { forward: bit(0), backward: bit(1), mean: bit(2), update: bit(3) };
        let words = ["forward", "backward", "mean", "update"];
        let chosen: Vec<&str> =
            (0..4).filter(|&at| bit(at)).map(|at| words[usize::from(at)]).collect();
        let quantized = chosen.join(", ");
        let reached = accuracy(PrecisionChoice::Int8, operations)?;
        table.row([quantized.clone(), format!("{reached:.2}"), format!("{:.2}", full - reached)]);
        if full - reached > worst.0 {
            worst = (full - reached, quantized);
        }
    }
    report.table("Accuracy on held-out digits, mean of three seeds", table);
    let (lost, quantized) = worst;
    report.rule(
        format!("all 15 combinations lose at most {MOST} points ({lost:.2}: {quantized})"),
        lost <= MOST,
    );
    Ok(report)
}
