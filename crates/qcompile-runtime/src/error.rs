//! Why a trainer refuses.

use qcompile_codegen::CodegenError;
use thiserror::Error;

/// Why a trainer could not be made or a step was not taken. After any of them, parameters and state are as before.
#[derive(Debug, Error)]
pub enum RuntimeError {
    /// An input is missing, unknown, or has another type or shape than the plan takes.
    #[error("input `{name}`: {reason}")]
    Input {
        /// The input.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A label is no class.
    #[error("`{name}`: the label{} at position {position} is none of the model's {classes} classes", written(*value))]
    Label {
        /// The input that holds the labels, or the step that took them.
        name: String,
        /// Which row.
        position: usize,
        /// The label, if an input holds it.
        value: Option<i64>,
        /// Number of classes.
        classes: usize,
    },
    /// An index is out of the range of its table.
    #[error("`{name}`: the index{} at position {position} is none of the {rows} rows of node `{node}`", written(*value))]
    Index {
        /// The input that holds the indices, or the step that took them.
        name: String,
        /// Which index.
        position: usize,
        /// The index, if an input holds it.
        value: Option<i64>,
        /// Number of rows of the table.
        rows: usize,
        /// The node of the model that the step came from, or the step.
        node: String,
    },
    /// The plan cannot do what was asked of it.
    #[error("the plan has no {0}")]
    Missing(&'static str),
    /// There is no parameter or state of that name, or it has another type.
    #[error("`{name}`: {reason}")]
    Value {
        /// The parameter or state.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// The plan could not be compiled.
    #[error(transparent)]
    Codegen(#[from] CodegenError),
    /// More memory than there is.
    #[error("{bytes} bytes of memory are needed, the limit is {limit}; a smaller batch needs less")]
    Memory {
        /// Bytes wanted.
        bytes: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// The system gives no such memory to this process.
    #[error("the system refuses {bytes} bytes of memory; a smaller batch needs less")]
    Refused {
        /// Bytes wanted.
        bytes: usize,
    },
    /// Sums of products of int8 would exceed what they are computed in.
    #[error(
        "a batch of {batch} samples is too large: the plan sums over samples in int8, {most} at most; take smaller batches, more workers, or another precision for gradients of weights"
    )]
    Batch {
        /// Samples of one worker.
        batch: usize,
        /// The most that it may have.
        most: usize,
    },
    /// The system gave no threads.
    #[error("no threads: {0}")]
    Threads(#[from] std::io::Error),
    /// What is exchanged cannot be said, or is no message.
    #[error("exchange: {0}")]
    Exchange(String),
    /// A thread panicked: a defect.
    #[error("internal error: {0}")]
    Panicked(String),
    /// A checkpoint is damaged or belongs to another plan.
    #[error("checkpoint: {0}")]
    Checkpoint(String),
}

/// A value between words, if it is known.
fn written(value: Option<i64>) -> String {
    value.map_or_else(String::new, |value| format!(" {value}"))
}
