//! Why a pass gave up.

use qcompile_ir::{GraphError, Name};
use thiserror::Error;

/// Why a pass gave up: variants by what the caller can do about it.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PassError {
    /// The loss does not fit the model: another loss or another output is needed.
    #[error("attach-loss: {reason}")]
    Loss {
        /// What does not fit, with the types.
        reason: String,
    },
    /// A value on the way from a trained parameter to the loss has no gradient.
    #[error(
        "differentiate: {value}: {reason}; `--freeze` the parameters before it to train the others"
    )]
    NotDifferentiable {
        /// The value.
        value: Name,
        /// Why it has none.
        reason: String,
    },
    /// There is nothing to train.
    #[error("differentiate: {reason}")]
    NothingToTrain {
        /// Why not.
        reason: String,
    },
    /// The graph or the options ask for something that the pass cannot do.
    #[error("{pass}: {reason}")]
    Unsupported {
        /// The pass.
        pass: &'static str,
        /// What is asked for, with the value's name.
        reason: String,
    },
    /// The evaluation that a pass rests on failed.
    #[error("{pass}: {reason}")]
    Evaluation {
        /// The pass.
        pass: &'static str,
        /// What the evaluator said.
        reason: String,
    },
    /// The pass tried to build a node that the graph refused: a defect of the pass.
    #[error("{0}")]
    Graph(#[from] GraphError),
    /// The graph does not verify after the pass: a defect of the pass.
    #[error("after {pass}: {errors}")]
    Verify {
        /// The pass.
        pass: &'static str,
        /// What the verifier said.
        errors: String,
    },
}
