//! Graph to graph: every transformation of a training step.
//!
//! A pass is a function `run(&mut Graph, &Options) -> Result<_, PassError>` in a module that says what it finds
//! (*Before*), what it leaves (*After*) and why it stands where it stands (*Why here*). A list
//! names them once, in order.
//!
//! This crate does no I/O, reads no clock and gives equal output for equal input.
#![forbid(unsafe_code)]

pub mod attach_loss;
pub mod attention;
mod blocks;
mod builder;
pub mod calibrate;
pub mod differentiate;
pub mod distribute;
pub mod error;
pub mod evaluation;
pub mod fold_batch_norm;
pub mod freeze;
pub mod quantize;
pub mod rematerialise;
pub mod saved;
pub mod sensitivity;
pub mod simplify;
mod stochastic;
pub mod update;

pub use error::PassError;
