//! Messages of clipped and rounded gradients (Xu and Diamant, US 2021/0295168 A1), on those of a net that is being
//! trained: every stage by itself, and sizes held against the law.

use crate::classifier::{Classifier, Pictures, Training, model};
use crate::{Report, Settings};
use qcompile::Result;
use qcompile::terminal::{Align, Table};
use qcompile_runtime::sparse::{Analysis, Coder, compressed_size, decode};

/// Samples whose gradients are coded.
const SAMPLES: usize = 64;
/// What a message has before its values.
const HEAD: usize = 20;
/// A bitmap and a list of indices are equally long here.
const SWITCH: f32 = 1.0 / 32.0;

/// A message, and what came back from it.
struct Sent {
    bytes: usize,
    survivors: usize,
    law: usize,
    /// The largest deviation from what was to be sent, in halves of the step of i8; 0 if every bit came back.
    error: f32,
}

fn send(coder: &Coder, gradients: &[f32]) -> Result<Sent> {
    let message = coder.encode(gradients)?;
    let received = decode(&message, gradients.len())?;
    let threshold = match coder.analysis {
        Analysis::Threshold(threshold) if coder.clips => threshold,
        _ => 0.0,
    };
    let kept = |value: f32| if value.abs() < threshold { 0.0 } else { value };
    let survivors = gradients.iter().filter(|&&value| kept(value) != 0.0).count();
    let law = match coder.compresses {
        true => compressed_size(gradients.len(), survivors, coder.quantizes),
        false => HEAD + gradients.len() * if coder.quantizes { 1 } else { 4 },
    };
    let peak = gradients.iter().fold(0.0_f32, |peak, value| peak.max(value.abs()));
    let wrong = gradients.iter().zip(&received).map(|(&value, got)| (kept(value) - got).abs());
    let error = wrong.fold(0.0, f32::max) / (peak / 254.0);
    Ok(Sent { bytes: message.len(), survivors, law, error })
}

/// The magnitude that this share of the values has at least.
fn threshold(gradients: &[f32], density: f32) -> f32 {
    let mut magnitudes: Vec<f32> = gradients.iter().map(|value| value.abs()).collect();
    magnitudes.sort_by(|a, b| b.total_cmp(a));
    let rank = (density * magnitudes.len() as f32) as usize;
    magnitudes[rank.clamp(1, magnitudes.len()) - 1]
}

pub(crate) fn run(settings: &Settings) -> Result<Report> {
    let pictures = Pictures::load(settings.pictures(), "")?;
    let (model, training) = (model("mnist_mlp"), Training::f32(1));
    let mut net = Classifier::train_as(&model, &pictures.train, &training)?;
    let gradients = net.gradients(&model, &training.options, &pictures.train, SAMPLES)?;
    let mut report = Report::default();
    let mut all = Vec::new();

    // Each of the four stages on and off: a threshold is found, what is below is clipped, the rest is rounded, zeros
    // are left out.
    let header = [
        ("analysis", Align::Left),
        ("clipping", Align::Left),
        ("rounding", Align::Left),
        ("coding", Align::Left),
        ("bytes", Align::Right),
        ("times smaller", Align::Right),
    ];
    let mut table = Table::new(&header);
    let tenth = threshold(&gradients, 0.1);
    let smaller = |bytes: usize| (4 * gradients.len()) as f64 / bytes as f64;
    for stages in 0_u8..16 {
        let [analyses, clips, quantizes, compresses] = [8, 4, 2, 1].map(|bit| stages & bit != 0);
        let analysis = if analyses { Analysis::Threshold(tenth) } else { Analysis::None };
        let coder = Coder { analysis, clips, quantizes, compresses };
        let sent = send(&coder, &gradients)?;
        let word = |on: bool, word: &str| if on { word } else { "-" }.to_owned();
        table.row([
            word(analyses, "10 %"),
            word(clips, "yes"),
            word(quantizes, "int8"),
            word(compresses, "yes"),
            sent.bytes.to_string(),
            format!("{:.2}", smaller(sent.bytes)),
        ]);
        all.push((quantizes, sent));
    }
    let count = gradients.len();
    report.table(&format!("{count} gradients of mnist_mlp after an epoch of Fashion-MNIST"), table);

    let header = [
        ("density", Align::Right),
        ("survivors", Align::Right),
        ("f32 bytes", Align::Right),
        ("int8 bytes", Align::Right),
        ("times smaller", Align::Right),
        ("names survivors by", Align::Left),
    ];
    let mut table = Table::new(&header);
    let mut switches = true;
    for density in [0.5, 0.1, 1.02 * SWITCH, 0.98 * SWITCH, 0.01, 0.001] {
        let analysis = Analysis::Threshold(threshold(&gradients, density));
        let coder = |quantizes| Coder { analysis, clips: true, quantizes, compresses: true };
        let [f32, int8] = [send(&coder(false), &gradients)?, send(&coder(true), &gradients)?];
        let places = f32.bytes - HEAD - 4 * f32.survivors;
        let by_bitmap = places == count.div_ceil(8);
        switches &= by_bitmap == (density > SWITCH);
        table.row([
            format!("{density:.4}"),
            f32.survivors.to_string(),
            f32.bytes.to_string(),
            int8.bytes.to_string(),
            format!("{:.1}, {:.1}", smaller(f32.bytes), smaller(int8.bytes)),
            if by_bitmap { "bitmap" } else { "index" }.to_owned(),
        ]);
        all.extend([(false, f32), (true, int8)]);
    }
    report.table("By density", table);

    report.rule("every message is as long as the law says", {
        all.iter().all(|(_, sent)| sent.bytes == sent.law)
    });
    report.rule("survivors that are not rounded come back bit by bit", {
        all.iter().filter(|(rounded, _)| !rounded).all(|(_, sent)| sent.error == 0.0)
    });
    let worst = all.iter().map(|(_, sent)| sent.error).fold(0.0, f32::max);
    report.rule(
        format!("rounded ones are off by half a step at most ({worst:.3} of it)"),
        worst <= 1.001,
    );
    report.rule("above a density of 1/32 a bitmap names the survivors, below it indices", switches);
    Ok(report)
}
