//! Driver library.
#![forbid(unsafe_code)]

pub mod data;
pub mod error;
pub mod output;
pub mod terminal;
