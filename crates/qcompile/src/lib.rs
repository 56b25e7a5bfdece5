//! Compiles an ONNX model into a mixed-precision training plan and runs the training step.
//!
//! Three nouns are all that a host program needs: [`compile()`] (or [`Plan::load`]) gives a [`Plan`], a [`Trainer`]
//! takes it, and [`Trainer::step`] trains. No panic crosses these functions; every error says what is wrong, where,
//! and what to do.
//!
//! ```
//! use qcompile::{DType, LossKind, Optimizer, Options, PrecisionChoice, Tensor, Trainer, TrainerOptions, Values};
//!
//! // A plan: from a model here, or from a file that the command wrote, with `Plan::load`.
//! let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/digits_mlp.onnx");
//! let options = Options {
//!     loss: Some(LossKind::CrossEntropy),
//!     optimizer: Optimizer::Sgd,
//!     precision: PrecisionChoice::F32,
//!     ..Options::default()
//! };
//! let compiled = qcompile::compile(model, &options)?;
//!
//! // A trainer: the plan's memory and threads.
//! let mut trainer = Trainer::new(compiled.plan, &TrainerOptions::default())?;
//! for (name, value) in [("lr", 0.05), ("weight_decay", 0.0), ("grad_clip_norm", f64::INFINITY)] {
//!     trainer.set_input(name, Tensor::scalar(DType::F32, value))?;
//! }
//!
//! // Steps: the model's inputs by name, and `label`. Any batch size runs.
//! let x = Tensor::from_f32(&[2, 64], &[8.0; 128]).ok_or("2 x 64 numbers")?;
//! let label = Tensor::from_i64(&[2], &[3, 3]).ok_or("2 labels")?;
//! let batch = Values::from([("x".to_owned(), x), ("label".to_owned(), label)]);
//! let first = trainer.step(&batch)?;
//! let second = trainer.step(&batch)?;
//! assert!(second.finite && second.loss < first.loss);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! `examples/train.rs` of this crate trains on a data set with [`data`]. [`train`] holds what the command `qcompile
//! train` is made of: schedules, evaluation, runs that resume.
#![forbid(unsafe_code)]

pub mod about;
pub mod cli;
pub mod commands;
pub mod compile;
mod cost;
pub mod data;
pub mod error;
pub mod export;
mod faults;
mod machine;
mod memory_limit;
pub mod model;
mod options;
pub mod output;
mod qdq;
mod resident;
pub mod sensitivity;
pub mod street;
mod subgraph;
mod suit;
mod summary;
pub mod synthetic;
pub mod tensors;
pub mod terminal;
pub mod timing;
mod timings;
pub mod train;
pub mod wants;

pub use cli::BatchNormMode;
pub use compile::{Compiled, compile, compile_bytes};
pub use error::{Code, Error, Exit, Result};
pub use options::Options;
pub use qcompile_ir::{DType, GradientRounding, Granularity, Region, Scaling, Tensor};
pub use qcompile_kernels::Tier;
pub use qcompile_passes::attach_loss::LossKind;
pub use qcompile_passes::quantize::{
    ChannelPolicy, Numerics, OperandTypes, Operations, PrecisionChoice, WeightScales, Weights,
};
pub use qcompile_passes::sensitivity::Metric;
pub use qcompile_passes::update::Optimizer;
pub use qcompile_plan::Plan;
pub use qcompile_runtime::{
    RegionTimes, RuntimeError, StepReport, Trainer, TrainerOptions, Values, checkpoint,
};
