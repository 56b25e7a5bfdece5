//! Training on int8 and int4 against f32 (Krishnamoorthi 2018, arXiv:1806.08342, for weights and activations; Gupta et
//! al. 2015, arXiv:1502.02551, and Banner et al. 2018, arXiv:1805.11046, for gradients).

use crate::classifier::{Classifier, Pictures, Training, model};
use crate::{Report, Settings};
use qcompile::terminal::{Align, Table};
use qcompile::{DType, GradientRounding, Granularity, Numerics, OperandTypes, Operations};
use qcompile::{PrecisionChoice, Result};

const SEEDS: [u64; 3] = [1, 2, 3];
/// The most that int8 in every product may lose, in points.
const MOST: f64 = 0.5;

/// A network, its data and how long it trains.
struct Task {
    model: &'static str,
    transform: &'static str,
    epochs: u64,
    batch_size: usize,
}

/// What is quantized.
#[derive(Clone, Copy)]
struct Setting {
    name: &'static str,
    precision: PrecisionChoice,
    backward: bool,
    numerics: Numerics,
}

impl Setting {
    const fn of(name: &'static str, precision: PrecisionChoice, numerics: Numerics) -> Setting {
        Setting { name, precision, backward: numerics.grad_weight.is_some(), numerics }
    }
}

/// int8 as far as nothing else is said; with gradients, all three products read codes.
const fn numerics(weight: DType, activation: DType, gradient: Option<DType>) -> Numerics {
    let (rounding, granularity) = (GradientRounding::Nearest, Granularity::Channel);
    let (grad_weight, gradient) = match gradient {
        Some(gradient) => (Some(DType::I8), gradient),
        None => (None, DType::I8),
    };
    Numerics {
        types: OperandTypes { weight, activation, gradient },
        granularity,
        rounding,
        scaling: qcompile::Scaling::Current,
        grad_weight,
    }
}

const fn stochastic(gradient: DType) -> Numerics {
    let nearest = numerics(DType::I8, DType::I8, Some(gradient));
    Numerics { rounding: GradientRounding::Stochastic, ..nearest }
}

/// Mean accuracy in percent over the seeds.
fn accuracy(task: &Task, pictures: &Pictures, setting: &Setting) -> Result<f64> {
    let mut sum = 0.0;
    for seed in SEEDS {
        let mut training = Training { seed, ..Training::f32(task.epochs) };
        training.options.batch_size = task.batch_size;
        training.options.precision = setting.precision;
        training.options.operations =
            Operations { backward: setting.backward, ..Operations::default() };
        training.options.numerics = setting.numerics;
        let mut net = Classifier::train_as(&model(task.model), &pictures.train, &training)?;
        sum += net.accuracy(&pictures.test)?;
    }
    Ok(sum / SEEDS.len() as f64)
}

/// The accuracies of all settings, the first being f32, and their table.
fn compare<const N: usize>(
    report: &mut Report,
    settings: &Settings,
    task: &Task,
    list: &[Setting; N],
) -> Result<[f64; N]> {
    let pictures = Pictures::load(settings.pictures(), task.transform)?;
    let header = [("in low precision", Align::Left), ("accuracy (%)", Align::Right)];
    let mut table = Table::new(&header);
    let mut all = [f64::NAN; N];
    for (setting, reached) in list.iter().zip(&mut all) {
        *reached = accuracy(task, &pictures, setting)?;
        table.row([setting.name.to_owned(), format!("{reached:.2}")]);
    }
    let Task { model, epochs, .. } = task;
    report.table(
        &format!("{model} on Fashion-MNIST, {epochs} epochs, mean of {} seeds", SEEDS.len()),
        table,
    );
    Ok(all)
}

const F32: Setting =
    Setting::of("nothing", PrecisionChoice::F32, numerics(DType::I8, DType::I8, None));

/// Weights W, activations A and gradients G of a multilayer perceptron.
pub(crate) fn perceptron(settings: &Settings) -> Result<Report> {
    let (i8, i4, int8) = (DType::I8, DType::I4, PrecisionChoice::Int8);
    let by_row = Numerics { granularity: Granularity::Row, ..stochastic(i4) };
    let list = [
        F32,
        Setting::of("int8 W, A", int8, numerics(i8, i8, None)),
        Setting::of("int8 W, A, G nearest", int8, numerics(i8, i8, Some(i8))),
        Setting::of("int8 W, A, G stochastic", int8, stochastic(i8)),
        Setting::of("int4 W, int8 A", int8, numerics(i4, i8, None)),
        Setting::of("int4 W, A", int8, numerics(i4, i4, None)),
        Setting::of("int8 W, A, int4 G nearest", int8, numerics(i8, i8, Some(i4))),
        Setting::of("int8 W, A, int4 G stochastic", int8, stochastic(i4)),
        Setting::of("int8 W, A, int4 G stochastic, a scale for each row", int8, by_row),
    ];
    let task = Task { model: "mnist_mlp", transform: "", epochs: 3, batch_size: 64 };
    let mut report = Report::default();
    let all = compare(&mut report, settings, &task, &list)?;
    let [full, _, nearest8, stochastic8, _, _, nearest4, stochastic4, by_row4] = all;
    let worst = full - nearest8.min(stochastic8);
    report.rule(format!("int8 everywhere loses at most {MOST} points ({worst:.2})"), worst <= MOST);
    let lost = full - nearest4;
    report.rule(
        format!("int4 gradients rounded to nearest lose at least 4 points ({lost:.2})"),
        lost >= 4.0,
    );
    for (name, reached) in [("one scale", stochastic4), ("a scale for each row", by_row4)] {
        let back = (reached - nearest4) / lost;
        report.rule(
            format!(
                "rounded at random with {name} they win back at least 80 % ({:.0} %)",
                100.0 * back
            ),
            back >= 0.8,
        );
    }
    Ok(report)
}

/// A residual network in int8, all three products of each layer.
fn residual(settings: &Settings, model: &'static str) -> Result<Report> {
    let transform = ":channels=3:pad=2:mean=0.286:std=0.353";
    let task = Task { model, transform, epochs: 3, batch_size: 128 };
    let int8 = PrecisionChoice::Int8;
    let list = [
        F32,
        Setting::of("int8 W, A, G nearest", int8, numerics(DType::I8, DType::I8, Some(DType::I8))),
        Setting::of("int8 W, A, G stochastic", int8, stochastic(DType::I8)),
    ];
    let mut report = Report::default();
    let all = compare(&mut report, settings, &task, &list)?;
    for (setting, reached) in list.iter().zip(&all).skip(1) {
        let lost = all[0] - reached;
        report.rule(
            format!("{} loses at most {MOST} points ({lost:.2})", setting.name),
            lost <= MOST,
        );
    }
    Ok(report)
}

/// [`residual`] with 8 layers.
pub(crate) fn resnet8(settings: &Settings) -> Result<Report> {
    residual(settings, "resnet8")
}

/// [`residual`] with 20 layers: an hour on two cores.
pub(crate) fn resnet20(settings: &Settings) -> Result<Report> {
    residual(settings, "resnet20")
}
