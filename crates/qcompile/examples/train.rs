//! Compiles the small CNN of `models/` and trains it on the digits that are in this repository.
//!
//! ```sh
//! cargo run --release -p qcompile --example train
//! ```

use qcompile::data::{Batches, Dataset, Limits};
use qcompile::train::evaluate;
use qcompile::wants::Wants;
use qcompile::{
    DType, LossKind, Optimizer, Options, Tensor, Trainer, TrainerOptions, compile, terminal::Show,
};
use std::io::{Write, stdout};
use std::sync::Arc;

const BATCH_SIZE: usize = 32;
const EPOCHS: u64 = 5;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let models = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models");
    let digits = format!("{models}/data/digits.csv.gz");

    // Which layers become int8 is decided on this data.
    let options = Options {
        loss: Some(LossKind::CrossEntropy),
        optimizer: Optimizer::Momentum { nesterov: false },
        batch_size: BATCH_SIZE,
        data: Some(digits.clone()),
        ..Options::default()
    };
    let compiled = compile(format!("{models}/digits_cnn.onnx"), &options)?;
    let mut out = stdout().lock();
    for layer in &compiled.decisions {
        writeln!(out, "{}: {} ({})", layer.node, layer.precision.forward, layer.reason)?;
    }

    // What the model takes of the data: its pictures as `x`, their digits as `label`.
    let wants = Wants::of(compiled.plan.graph(), &compiled.about)?;
    let data = Dataset::load(&digits, Limits::default())?;
    let samples = wants.bind(&data)?;

    let mut trainer = Trainer::new(Arc::clone(&compiled.plan), &TrainerOptions::default())?;
    for (name, value) in
        [("lr", 0.05), ("momentum", 0.9), ("weight_decay", 1e-4), ("grad_clip_norm", f64::INFINITY)]
    {
        trainer.set_input(name, Tensor::scalar(DType::F32, value))?;
    }
    let batches = Batches::new(samples.samples(), BATCH_SIZE).shuffled(0);
    for epoch in 0..EPOCHS {
        let mut loss = 0.0;
        for rows in batches.epoch(epoch, 0) {
            loss += trainer.step(&wants.batch(&samples, &rows)?)?.loss / batches.steps() as f32;
        }
        writeln!(out, "epoch {}: loss {loss:.4}", epoch + 1)?;
    }

    let about = &compiled.about;
    let result = evaluate(&mut trainer, &samples, &wants, about, BATCH_SIZE, Show::Nothing)?;
    writeln!(out, "accuracy {:.2} %", 100.0 * result.accuracy.unwrap_or(0.0))?;
    Ok(())
}
