//! Multipoint quantization (Liu et al. 2021, arXiv:2002.09049): error by number of points, and which channels to give
//! more of them.

use crate::classifier::{Classifier, Pictures, model};
use crate::rounding::{multipoint, relative_error, rounded, scale};
use crate::spread::{factors, gaussian, scaled, student, tensor};
use crate::{Report, Settings};
use qcompile::synthetic::Random;
use qcompile::terminal::{Align, Table};
use qcompile::{Result, Tensor};

/// Weights of a 3x3 kernel over 64 channels.
const WEIGHTS: usize = 576;
const VECTORS: usize = 20;
const POINTS: usize = 5;

pub(crate) fn run(settings: &Settings) -> Result<Report> {
    let mut report = Report::default();
    by_points(&mut report);
    by_channels(&mut report, settings)?;
    Ok(report)
}

/// Mean relative error of weights, for one point and more.
fn errors(bits: u32, draw: fn(&mut Random) -> f64, points: usize) -> Vec<f64> {
    let mut random = Random::new(1);
    let mut sums = vec![0.0; points];
    for _ in 0..VECTORS {
        let weights: Vec<f32> = (0..WEIGHTS).map(|_| draw(&mut random) as f32).collect();
        for (points, sum) in sums.iter_mut().enumerate() {
            *sum += relative_error(&weights, &multipoint(&weights, bits, points + 1));
        }
    }
    sums.iter().map(|sum| sum / VECTORS as f64).collect()
}

fn by_points(report: &mut Report) {
    let header = ["n=1", "2", "3", "4", "5"].map(|points| (points, Align::Right));
    let header = [[("weights", Align::Left), ("bits", Align::Right)].as_slice(), &header].concat();
    let mut table = Table::new(&header);
    let mut pair = f64::NAN;
    for (name, draw, bits, points) in [
        ("Gaussian", gaussian as fn(&mut Random) -> f64, 2, POINTS),
        ("Gaussian", gaussian, 3, POINTS),
        ("Gaussian", gaussian, 4, POINTS),
        ("Student, 3 degrees of freedom", student, 4, POINTS),
        ("Gaussian", gaussian, 6, 1),
        ("Gaussian", gaussian, 8, 2),
    ] {
        let errors = errors(bits, draw, points);
        let cells = errors.iter().map(|error| format!("{error:.5}"));
        table.row([name.to_owned(), bits.to_string()].into_iter().chain(cells));
        if let Some(worst) = errors.windows(2).map(|pair| pair[1] / pair[0]).reduce(f64::max) {
            report.rule(
                format!(
                    "{name}, {bits} bits: each point leaves at most 0.75 of the error ({worst:.3})"
                ),
                worst <= 0.75,
            );
        }
        if bits == 4 && name == "Gaussian" {
            pair = errors[1];
        }
    }
    report.table("Relative error of 576 weights by number of points", table);
    let [six, eight] = [6, 8].map(|bits| errors(bits, gaussian, 1)[0]);
    report.rule(
        format!("two points of 4 bits ({pair:.4}) beat one of 6 ({six:.4}) and lose to one of 8 ({eight:.4})"),
        eight < pair && pair < six,
    );
}

/// The energy of what rounding one row of a weight alone changes in the net's outputs, for each row.
fn output_errors(
    net: &mut Classifier,
    name: &str,
    rounded: &Tensor,
    pictures: &Pictures,
) -> Result<Vec<f64>> {
    const SAMPLES: usize = 256;
    let weight = net.get(name)?;
    let exact = net.outputs(&pictures.train, SAMPLES)?;
    let (width, near) = (weight.shape()[1], rounded.to_f32());
    let mut errors = Vec::with_capacity(weight.shape()[0]);
    for row in 0..weight.shape()[0] {
        let mut values = weight.to_f32();
        let at = row * width..(row + 1) * width;
        values[at.clone()].copy_from_slice(&near[at]);
        net.set(name, &tensor(weight.shape(), &values)?)?;
        let outputs = net.outputs(&pictures.train, SAMPLES)?;
        let error = |(x, y): (&f32, &f32)| f64::from(x - y).powi(2);
        errors.push(exact.iter().zip(&outputs).map(error).sum());
    }
    net.set(name, &weight)?;
    Ok(errors)
}

/// The weight with one scale for all rows, but for those that get two points.
fn with_points(weight: &Tensor, bits: u32, chosen: &[usize]) -> Result<Tensor> {
    let width = weight.shape()[1];
    let values = weight.to_f32();
    let mut near = rounded(&values, scale(&values, bits), bits);
    for &row in chosen {
        let at = row * width..(row + 1) * width;
        near[at.clone()].copy_from_slice(&multipoint(&values[at], bits, 2));
    }
    tensor(weight.shape(), &near)
}

/// Random channels of so many, without repetition.
fn draw(channels: usize, count: usize, random: &mut Random) -> Vec<usize> {
    let mut all: Vec<usize> = (0..channels).collect();
    for at in 0..count {
        all.swap(at, at + random.below((channels - at) as u64) as usize);
    }
    all.truncate(count);
    all
}

/// Mean accuracy of several choices of random channels.
const DRAWS: usize = 5;

fn by_channels(report: &mut Report, settings: &Settings) -> Result<()> {
    const BITS: u32 = 4;
    // Ranges of channels differ as batch normalizations leave them when they are folded into weights.
    const SPREAD: f64 = 0.5;
    let pictures = Pictures::load(settings.pictures(), "")?;
    let mut net = Classifier::train(&model("mnist_mlp"), &pictures, 2)?;
    let (first, second) = (net.get("fc1.weight")?, net.get("fc2.weight")?);
    let bias = net.get("fc1.bias")?;
    let channels = first.shape()[0];
    let count = channels / 5;
    let header = ["seed", "f32", "4 bits", "adaptive", "random"].map(|word| (word, Align::Right));
    let mut table = Table::new(&header);
    let mut sums = [0.0; 4];
    for seed in 0..3 {
        let mut random = Random::new(seed);
        let spread = factors(channels, SPREAD, false, &mut random);
        let inverse: Vec<f32> = spread.iter().map(|factor| 1.0 / factor).collect();
        let weight = scaled(&first, &spread, true)?;
        net.set("fc1.bias", &scaled(&bias, &spread, false)?)?;
        net.set("fc2.weight", &scaled(&second, &inverse, false)?)?;
        net.set("fc1.weight", &weight)?;
        let plain = with_points(&weight, BITS, &[])?;
        let errors = output_errors(&mut net, "fc1.weight", &plain, &pictures)?;
        let mut accuracy = |weight: &Tensor| {
            net.set("fc1.weight", weight)?;
            net.accuracy(&pictures.test)
        };
        let mut worst: Vec<usize> = (0..channels).collect();
        worst.sort_by(|&a, &b| errors[b].total_cmp(&errors[a]).then(a.cmp(&b)));
        let adaptive = accuracy(&with_points(&weight, BITS, &worst[..count])?)?;
        let mut mean = 0.0;
        for _ in 0..DRAWS {
            let chosen = draw(channels, count, &mut random);
            mean += accuracy(&with_points(&weight, BITS, &chosen)?)? / DRAWS as f64;
        }
        let row = [accuracy(&weight)?, accuracy(&plain)?, adaptive, mean];
        let cells = row.iter().map(|accuracy| format!("{accuracy:.2}"));
        table.row(std::iter::once(seed.to_string()).chain(cells));
        for (sum, accuracy) in sums.iter_mut().zip(row) {
            *sum += accuracy / 3.0;
        }
    }
    let bits = f64::from(BITS) * (channels + count) as f64 / channels as f64;
    report.table(
        &format!(
            "Accuracy (%) with two points for {count} of {channels} channels of the first weight: {bits:.2} bits a weight"
        ),
        table,
    );
    let [exact, plain, adaptive, random] = sums;
    let regained = |accuracy: f64| (accuracy - plain) / (exact - plain);
    let (adaptive, random) = (regained(adaptive), regained(random));
    report.rule(format!("4 bits lose accuracy: {:.2} points", exact - plain), exact - plain > 1.0);
    report.rule(
        format!("channels chosen by output error regain at least half of it ({adaptive:.2})"),
        adaptive >= 0.5,
    );
    report.rule(
        format!("as many random channels regain at most half as much ({random:.2})"),
        random <= 0.5 * adaptive,
    );
    Ok(())
}
