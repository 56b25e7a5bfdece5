//! What a compile tells on stdout.

use crate::about::LayerDecision;
use crate::compile::Compiled;
use crate::terminal::{Align, Table, bytes, count, milliseconds, width};
use qcompile_runtime::predicted_bytes;
use serde_json::{Value, json};
use std::path::Path;

/// The word for a layer as a whole.
fn precision(decision: &LayerDecision) -> String {
    let of = &decision.precision;
    let mut word = match (of.forward.as_str(), of.grad_input.as_str()) {
        (forward, backward) if forward == backward => forward.to_owned(),
        (forward, "f32") => format!("{forward} forward"),
        ("f32", backward) => format!("{backward} backward"),
        (forward, backward) => format!("{forward} forward, {backward} backward"),
    };
    // Beside int8 the gradient of the weight is f32 unless something is said.
    if of.grad_weight != "f32" && word != "bf16" && word != "bf16 backward" {
        word.push_str(&format!(", {} grad weight", of.grad_weight));
    }
    for (operation, precision) in [("mean", &of.mean), ("update", &of.update)] {
        if precision != "f32" {
            word.push_str(&format!(", {precision} {operation}"));
        }
    }
    word
}

/// The kind of a reason: what is the same for many layers.
fn kind(reason: &str) -> &str {
    match reason {
        _ if reason.starts_with("int8 ") && reason.contains(" measures ") => {
            "int8 does not measure faster"
        }
        _ if reason.contains("would exceed") => "beyond the budget of loss",
        _ if reason.contains("above the threshold") => "score above the threshold",
        _ if reason.contains("channels are sensitive") => "too many sensitive channels",
        _ if reason.contains("is to stay f32") => "kept by --keep",
        _ => reason,
    }
}

/// Layers and parameters by precision, with the most frequent reason of those that stay f32.
#[must_use]
pub(crate) fn by_precision(decisions: &[LayerDecision]) -> String {
    let mut table = Table::new(&[
        ("precision", Align::Left),
        ("layers", Align::Right),
        ("parameters", Align::Right),
        ("why not lower", Align::Left),
    ]);
    let mut words: Vec<String> = decisions.iter().map(precision).collect();
    words.sort_by_key(|word| (word == "f32", std::cmp::Reverse(word.clone())));
    words.dedup();
    for word in words {
        let those: Vec<_> = decisions.iter().filter(|d| precision(d) == word).collect();
        let parameters = those.iter().map(|decision| decision.parameters).sum();
        let mut reasons: Vec<(usize, &str)> = Vec::new();
        for decision in those.iter().filter(|_| word == "f32") {
            let kind = kind(&decision.reason);
            match reasons.iter_mut().find(|(_, known)| *known == kind) {
                Some((times, _)) => *times += 1,
                None => reasons.push((1, kind)),
            }
        }
        reasons.sort_by_key(|(times, _)| std::cmp::Reverse(*times));
        let why: Vec<String> =
            reasons.iter().map(|(times, kind)| format!("{kind} ({times})")).collect();
        table.row([word, those.len().to_string(), count(parameters), why.join(", ")]);
    }
    table.render(width())
}

/// A row for each layer.
#[must_use]
pub(crate) fn by_layer(decisions: &[LayerDecision]) -> String {
    let mut table = Table::new(&[
        ("layer", Align::Left),
        ("op", Align::Left),
        ("forward", Align::Left),
        ("grad input", Align::Left),
        ("grad weight", Align::Left),
        ("mean", Align::Left),
        ("update", Align::Left),
        ("channels", Align::Left),
        ("score", Align::Right),
        ("why", Align::Left),
    ]);
    for decision in decisions {
        table.row([
            decision.origin.clone().unwrap_or_else(|| decision.node.clone()),
            decision.op.clone(),
            decision.precision.forward.clone(),
            decision.precision.grad_input.clone(),
            decision.precision.grad_weight.clone(),
            decision.precision.mean.clone(),
            decision.precision.update.clone(),
            if decision.is_divided() { decision.channels.to_string() } else { "-".to_owned() },
            decision.score.map_or_else(|| "-".to_owned(), |score| format!("{score:.2e}")),
            decision.reason.clone(),
        ]);
    }
    table.render(width())
}

/// The summary of a compile.
#[must_use]
pub(crate) fn text(compiled: &Compiled, verbose: bool) -> String {
    let mut out = String::new();
    if compiled.decisions.is_empty() {
        out.push_str(" no layer: no product of data and a trained weight\n");
    } else {
        out.push_str(&by_precision(&compiled.decisions));
    }
    if verbose && !compiled.decisions.is_empty() {
        out.push('\n');
        out.push_str(&by_layer(&compiled.decisions));
    }
    out.push('\n');
    let mut line = |name: &str, text: String| out.push_str(&format!(" {name:<13} {text}\n"));
    line("loss", format!("{}, optimizer {}", compiled.about.loss, compiled.about.optimizer));
    if let Some(scores) = &compiled.scores {
        line(
            "sensitivity",
            format!(
                "{} on {} samples; loss in f32 {:.4}",
                scores.metric.name(),
                scores.samples,
                scores.baseline_loss
            ),
        );
    }
    if let Some(predicted) = compiled.predicted {
        line("predicted", format!("{:+.3} % of the loss", 100.0 * predicted));
    }
    if let Some(how) = compiled.about.options.get("compress") {
        let saved = compiled.plan.saved_bytes(compiled.plan.batch_size());
        line("saved", format!("{} for the backward pass ({how})", bytes(saved as u64)));
    }
    if let Some(again) = &compiled.about.rematerialised {
        line("made again", again.to_string());
    }
    match &compiled.measured {
        Some(steps) => {
            let chosen = &steps.chosen;
            let now = milliseconds(chosen.step_ms.median);
            let how = format!("measured, batch {}, {} threads", chosen.batch_size, chosen.threads);
            match &steps.f32 {
                Some(f32) => {
                    let before = milliseconds(f32.step_ms.median);
                    let gain = f32.step_ms.median / chosen.step_ms.median;
                    line("step time", format!("f32 {before} -> {now}, {gain:.2}x  ({how})"));
                    if let Some(bf16) = &steps.bf16 {
                        let before = milliseconds(bf16.step_ms.median);
                        let gain = bf16.step_ms.median / chosen.step_ms.median;
                        line("", format!("bf16 {before} -> {now}, {gain:.2}x"));
                    }
                    let before = bytes(f32.peak_bytes as u64);
                    line("memory", format!("f32 {before} -> {}", bytes(chosen.peak_bytes as u64)));
                }
                None => {
                    line("step time", format!("{now}  ({how})"));
                    line("memory", bytes(chosen.peak_bytes as u64));
                }
            }
        }
        None => {
            let text = bytes(predicted(compiled) as u64);
            line("memory", format!("{text} at batch {}", compiled.plan.batch_size()));
        }
    }
    out
}

/// The memory that a step will take.
fn predicted(compiled: &Compiled) -> usize {
    let plan = &compiled.plan;
    let bytes = predicted_bytes(plan, plan.batch_size(), None);
    bytes.unwrap_or_else(|_| plan.bytes(plan.batch_size()))
}

/// Bytes of what is kept between steps beside parameters.
fn state_bytes(plan: &qcompile_plan::Plan) -> usize {
    plan.states().iter().map(|state| qcompile_plan::plan::bytes_of(&state.ty).at(1)).sum()
}

/// The document of `--json`.
#[must_use]
pub(crate) fn document(compiled: &Compiled, model: &Path, plan: Option<&Path>) -> Value {
    let median = |measured: &crate::timing::Measured| measured.step_ms.median;
    let steps = compiled.measured.as_ref();
    // Without lower precision the plan is the f32 plan.
    let same = steps.filter(|_| !compiled.is_mixed()).map(|steps| &steps.chosen);
    let f32 = steps.and_then(|steps| steps.f32.as_ref()).or(same);
    let bytes = match &compiled.measured {
        Some(steps) => steps.chosen.peak_bytes,
        None => predicted(compiled),
    };
    json!({
        "model": model.display().to_string(),
        "plan": plan.map(|path| path.display().to_string()),
        "loss": compiled.about.loss,
        "optimizer": compiled.about.optimizer,
        "batch_size": compiled.plan.batch_size(),
        "decisions": compiled.decisions,
        "step_ms": steps.map(|steps| median(&steps.chosen)),
        "f32_step_ms": f32.map(median),
        "bf16_step_ms": steps.and_then(|steps| steps.bf16.as_ref()).map(median),
        "peak_bytes": bytes,
        "state_bytes": state_bytes(&compiled.plan),
        "saved_bytes": compiled.plan.saved_bytes(compiled.plan.batch_size()),
        "rematerialised": compiled.about.rematerialised,
        "warnings": compiled.warnings,
    })
}
