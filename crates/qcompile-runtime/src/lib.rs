//! [`Plan`](qcompile_plan::Plan) to [`Trainer::step`]: memory, threads, exchange between workers, checkpoints.
//!
//! A trainer holds the native code of a plan and, for each worker, the memory it runs on. Nothing here knows a loss,
//! an optimizer or a precision: those are in the plan.
//!
//! `unsafe` is confined to the arena, which owns raw memory; the replica, which runs native code on it; and the
//! exchange, which reads what other workers hold.

mod arena;
pub mod checkpoint;
mod collective;
mod error;
mod inputs;
mod replica;
pub mod sparse;
mod trainer;

pub use error::RuntimeError;
pub use trainer::{RegionTimes, StepReport, Trainer, TrainerOptions, Values, predicted_bytes};
