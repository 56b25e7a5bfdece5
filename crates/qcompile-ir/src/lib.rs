//! What a graph is, what it means, and how it reads.
//!
//! A [`Graph`] is a directed acyclic graph of values. One node is one value: it has a [`Name`], an [`Op`],
//! a [`TensorType`], a [`Region`] and a [`Note`]. Operand order lives on the edges, types only on the nodes,
//! quantization scales only as operands. State (parameters, moments, running statistics) is functional:
//! `next %w = %w.next` says what a leaf holds after the step. A cast of a parameter may have one, too, the same cast of the
//! parameter's: then it need not be made anew in the next step.
//!
//! * [`graph`] stores it and has the only doors of mutation;
//! * [`op`] is the closed vocabulary, [`mod@infer`] gives each op its type;
//! * [`text`] prints and parses `.qir`;
//! * [`mod@verify`] lists and checks every invariant;
//! * [`eval`] is the slow, obvious meaning of every op, the oracle of everything else.
//!
//! This crate does no I/O and depends on nothing else of this project.
#![forbid(unsafe_code)]

pub mod attention;
pub mod digest;
pub mod eval;
pub mod float8;
pub mod graph;
pub mod infer;
pub mod name;
pub mod note;
pub mod op;
pub mod quantized;
pub mod recurrence;
pub mod rotation;
pub mod tensor;
pub mod text;
pub mod types;
pub mod values;
pub mod verify;

pub use attention::{AttentionCodes, AttentionOperand};
pub use digest::fnv1a;
pub use float8::Float8;
pub use graph::{Graph, GraphError, Node, NodeId, Region};
pub use infer::{TypeError, infer};
pub use name::Name;
pub use note::{Channels, GradientRounding, Granularity, Note, Precision, Quantizer, Scaling};
pub use op::{
    BinaryOp, CollectiveOp, CompareOp, ConvGeometry, Op, PoolGeometry, ReduceOp, ScatterOp, UnaryOp,
};
pub use quantized::QuantizedRange;
pub use recurrence::{Activation, ActivationOp, Cell, Recurrence, RecurrenceOperands};
pub use rotation::{golden_multiple, turned};
pub use tensor::Tensor;
pub use types::{DType, Dim, Shape, TensorType};
pub use values::LeafValues;
pub use verify::{VerifyError, VerifyErrors, verify};
