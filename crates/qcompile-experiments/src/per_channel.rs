//! A scale for each output channel against one for the tensor (Krishnamoorthi 2018, arXiv:1806.08342): hidden units
//! multiplied by factors, and their outgoing weights by the inverses, leave a ReLU net as it is. One scale for the
//! weight then drowns the small units; a scale for each channel does not see the factors at all.

use crate::classifier::{Classifier, Pictures, model};
use crate::rounding::{relative_error, rounded, scale};
use crate::spread::{factors, gaussian, scaled, tensor};
use crate::{Report, Settings};
use qcompile::synthetic::Random;
use qcompile::terminal::{Align, Table};
use qcompile::{Code, DType, Error, Region, Result, Tensor, Trainer, TrainerOptions, Values};
use qcompile_ir::{Graph, Op, Precision, TensorType};
use qcompile_passes::quantize;
use qcompile_plan::{BuildOptions, build};
use std::sync::Arc;

const SPREADS: [f64; 4] = [0.0, 1.0, 2.0, 3.0];

pub(crate) fn run(settings: &Settings) -> Result<Report> {
    let mut report = Report::default();
    accuracies(&mut report, settings)?;
    noise(&mut report);
    codes(&mut report)?;
    Ok(report)
}

/// A weight `[out, in]` rounded by one scale, or by one for each row.
fn round(weight: &[f32], width: usize, bits: u32, per_channel: bool) -> Vec<f32> {
    let size = if per_channel { width } else { weight.len() };
    weight.chunks(size).flat_map(|part| rounded(part, scale(part, bits), bits)).collect()
}

fn accuracies(report: &mut Report, settings: &Settings) -> Result<()> {
    let pictures = Pictures::load(settings.pictures(), "")?;
    let mut net = Classifier::train(&model("mnist_mlp"), &pictures, 2)?;
    let (first, second) = (net.get("fc1.weight")?, net.get("fc2.weight")?);
    let bias = net.get("fc1.bias")?;
    let (channels, width) = (first.shape()[0], first.shape()[1]);
    let header = ["σ", "f32", "8b tensor", "8b channel", "4b tensor", "4b channel"];
    let mut table = Table::new(&header.map(|word| (word, Align::Right)));
    let mut rows = Vec::new();
    for sigma in SPREADS {
        let spread = factors(channels, sigma, true, &mut Random::new(1));
        let inverse: Vec<f32> = spread.iter().map(|factor| 1.0 / factor).collect();
        let weight = scaled(&first, &spread, true)?;
        net.set("fc1.bias", &scaled(&bias, &spread, false)?)?;
        net.set("fc2.weight", &scaled(&second, &inverse, false)?)?;
        net.set("fc1.weight", &weight)?;
        let mut row = vec![net.accuracy(&pictures.test)?];
        for (bits, per_channel) in [(8, false), (8, true), (4, false), (4, true)] {
            let values = round(&weight.to_f32(), width, bits, per_channel);
            net.set("fc1.weight", &tensor(weight.shape(), &values)?)?;
            row.push(net.accuracy(&pictures.test)?);
        }
        table.row(
            std::iter::once(format!("{sigma}"))
                .chain(row.iter().map(|accuracy| format!("{accuracy:.2}"))),
        );
        rows.push(row);
    }
    report.table("Accuracy (%) with the first weight rounded, hidden units multiplied by powers of two next to exp(σ·N(0, 1))", table);
    let (first, last) = (&rows[0], &rows[SPREADS.len() - 1]);
    for (column, name) in [(0, "f32"), (2, "8 bits per channel"), (4, "4 bits per channel")] {
        report.rule(
            format!("{name}: the accuracy is the same whatever the factors"),
            rows.iter().all(|row| row[column] == first[column]),
        );
    }
    let lost = |row: &[f64], column: usize| row[0] - row[column];
    report.rule(
        format!("8 bits per channel lose at most 0.3 points ({:.2})", lost(first, 2)),
        lost(first, 2) <= 0.3,
    );
    for (column, least) in [(1, 10.0), (3, 40.0)] {
        report.rule(
            format!(
                "{} lose at least {least} points at σ = 3 ({:.1}), and with no σ over 0.3 points less than before",
                ["8 bits per tensor", "4 bits per tensor"][column / 2],
                lost(last, column)
            ),
            lost(last, column) >= least
                && rows.windows(2).all(|pair| pair[1][column] <= pair[0][column] + 0.3),
        );
    }
    Ok(())
}

/// Signal over quantization noise in decibels, of random weights.
fn noise(report: &mut Report) {
    let (rows, width) = (64, 576);
    let header = ["σ", "8b tensor", "8b channel", "4b tensor", "4b channel"];
    let mut table = Table::new(&header.map(|word| (word, Align::Right)));
    let mut per_channel = Vec::new();
    for sigma in SPREADS {
        let mut random = Random::new(2);
        let spread = factors(rows, sigma, true, &mut random);
        let weight: Vec<f32> =
            (0..rows * width).map(|at| spread[at / width] * gaussian(&mut random) as f32).collect();
        let decibels = |bits: u32, channel: bool| {
            // Each row counts alike, however large its factor.
            let near = round(&weight, width, bits, channel);
            let pairs = weight.chunks(width).zip(near.chunks(width));
            let mean: f64 = pairs.map(|(x, y)| relative_error(x, y).powi(2)).sum::<f64>();
            -10.0 * (mean / rows as f64).log10()
        };
        let row = [decibels(8, false), decibels(8, true), decibels(4, false), decibels(4, true)];
        table.row(
            std::iter::once(format!("{sigma}"))
                .chain(row.iter().map(|value| format!("{value:.1}"))),
        );
        per_channel.push([row[1], row[3]]);
    }
    report.table("Signal over noise (dB) of Gaussian weights, mean over channels", table);
    let [eight, four] = per_channel[0];
    report.rule(
        "per channel, it is the same to the bit whatever the factors",
        per_channel.iter().all(|row| *row == per_channel[0]),
    );
    report.rule(
        format!("a bit is worth 6 dB: 4 bits fewer cost {:.1}", eight - four),
        (eight - four - 24.0).abs() < 2.0,
    );
}

/// What the compiled plan of a layer makes of its weight: codes, with a scale for each channel.
fn compiled_codes(weight: Tensor) -> Result<Tensor> {
    let internal = |text: String| Error::new(Code::Internal, text);
    let mut graph = Graph::new("layer");
    let add = |graph: &mut Graph, op: Op, operands: &[qcompile_ir::NodeId], name: &str| {
        graph.add(op, operands, name, Region::Forward).map_err(|e| internal(e.to_string()))
    };
    let width = weight.shape()[1].into();
    let ty = TensorType::f32(qcompile_ir::Shape(vec![qcompile_ir::Dim::N, width]));
    let x = add(&mut graph, Op::Input(ty), &[], "x")?;
    let w = add(&mut graph, Op::Param(Arc::new(weight)), &[], "w")?;
    let product = Op::Matmul { transpose_a: false, transpose_b: true };
    let y = add(&mut graph, product, &[x, w], "y")?;
    graph.note_mut(y).precision =
        Some(Precision { forward: DType::I8, ..Precision::uniform(DType::F32) });
    graph.add_output("y", y);
    quantize::insert(&mut graph)?;
    let codes = graph.ids().find(|&id| matches!(graph.op(id), Op::Quantize { axis: Some(_), .. }));
    let codes = codes.ok_or_else(|| internal("the weight is not rounded".to_owned()))?;
    graph.add_output("codes", codes);
    let plan = build(graph, &BuildOptions { batch_size: 1 })
        .map_err(|error| internal(error.to_string()))?;
    let mut trainer = Trainer::new(Arc::new(plan), &TrainerOptions::default())?;
    let x = Tensor::zeros(DType::F32, &[1, width.scale]);
    let mut outputs = trainer.run(&Values::from([("x".to_owned(), x)]), Region::Forward)?;
    outputs.remove("codes").ok_or_else(|| internal("the plan returned no codes".to_owned()))
}

fn codes(report: &mut Report) -> Result<()> {
    let mut random = Random::new(3);
    let weight: Vec<f32> = (0..32 * 48).map(|_| gaussian(&mut random) as f32).collect();
    let weight = tensor(&[32, 48], &weight)?;
    let spread = factors(32, 3.0, true, &mut random);
    let same = compiled_codes(scaled(&weight, &spread, true)?)? == compiled_codes(weight)?;
    report.rule("a compiled layer's int8 codes are bit-equal under powers of two", same);
    Ok(())
}
