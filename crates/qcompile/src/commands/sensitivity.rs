//! `qcompile sensitivity`.

use super::{in_data, timings_path};
use crate::cli::SensitivityCommand;
use crate::error::{Code, Error, Result};
use crate::model::{draft, open};
use crate::options::Options;
use crate::output::{check_writable, print, write_atomically};
use crate::sensitivity::{Calibration, score, scores_json};
use crate::street::{Pass, Street};
use crate::terminal::{Align, Table, say_verb, width};
use qcompile_passes::sensitivity::Scores;

pub(super) fn run(command: &SensitivityCommand) -> Result<()> {
    command.machine.trainer(1)?;
    let standard = Options::default();
    let options = Options {
        loss: command.loss,
        metric: command.metric.unwrap_or_default(),
        batch_size: command.batch_size.unwrap_or(standard.batch_size),
        samples: command.samples,
        data: command.data.clone(),
        threads: command.machine.threads,
        tier: command.machine.tier,
        timings: timings_path(),
        ..standard
    }
    .with_import(&command.import);
    if let Some(path) = &command.output {
        check_writable(path)?;
    }
    let show = command.talk.show();
    let target = open(&command.model)?;
    let mut draft = draft(&target, &command.model, &options)?;
    if draft.is_after(Pass::Quantize) {
        let cause = "the graph is quantized already: its layers cannot be scored";
        return Err(Error::usage(cause).at(command.model.display().to_string()));
    }
    let mut nothing = |_: Pass, _: &_, _| Ok(());
    Street::new(&options, show, &mut nothing).run(&mut draft, Pass::AttachLoss)?;
    if qcompile_passes::quantize::layers(&draft.graph).is_empty() {
        let cause = "the model has no layer to score: no product of data and a trained weight";
        return Err(
            Error::new(Code::ModelUnsupported, cause).at(command.model.display().to_string())
        );
    }
    let calibration = Calibration::new(&draft.graph, &draft.about, &options)
        .map_err(|e| in_data(e, command.data.as_deref().unwrap_or_default()))?;
    draft.about.warnings.extend(calibration.notes().iter().cloned());
    command.talk.warn(&draft.about.warnings);
    let scores = score(&mut draft.graph, &calibration, &options, show)?;
    let json = scores_json(&scores, calibration.is_synthetic())?;
    if let Some(path) = &command.output {
        write_atomically(path, json.as_bytes())?;
        say_verb(show, "Finished", &path.display().to_string());
    }
    if command.talk.json { print(&json) } else { print(&table(&scores)) }
}

/// The most sensitive layer first, with a bar of its part of the largest score.
fn table(scores: &Scores) -> String {
    const BAR: f32 = 20.0;
    let mut layers: Vec<_> = scores.layers.iter().collect();
    layers.sort_by(|a, b| b.score.total_cmp(&a.score));
    let finite = layers.iter().map(|layer| layer.score).filter(|score| score.is_finite());
    let most = finite.fold(0.0_f32, f32::max);
    let mut table = Table::new(&[
        ("layer", Align::Left),
        ("op", Align::Left),
        ("score", Align::Right),
        ("", Align::Left),
        ("worst channel", Align::Right),
    ]);
    for layer in layers {
        let part =
            if layer.score.is_finite() && most > 0.0 { layer.score.max(0.0) / most } else { 1.0 };
        let worst = layer.channels.iter().copied().enumerate().max_by(|a, b| a.1.total_cmp(&b.1));
        table.row([
            layer.origin.clone().unwrap_or_else(|| layer.name.as_str().to_owned()),
            layer.op.clone(),
            format!("{:.3e}", layer.score),
            "#".repeat((part * BAR).round() as usize),
            worst.map_or_else(String::new, |(channel, score)| format!("{channel}: {score:.2e}")),
        ]);
    }
    format!(
        "{}\n {} on {} samples; loss in f32 {:.6}\n",
        table.render(width()),
        scores.metric.name(),
        scores.samples,
        scores.baseline_loss
    )
}
