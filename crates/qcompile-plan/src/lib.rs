//! Graph to [`Plan`]: which nodes share a kernel, in what order the kernels run, where values live, and the
//! `.qplan` file.
//!
//! A plan is data: it names no instruction and no address. [`build`] is a pure function of a verified graph, so a
//! file holds the graph and its tensors, and the schedule is derived again where it is loaded: there is no second
//! truth that a hostile file could bend. [`verify()`] proves that every access of every step stays
//! within its slot for every batch size.
#![forbid(unsafe_code)]

mod again;
mod attention;
mod bit_set;
mod build;
mod deviations;
pub mod file;
mod fuse;
mod live;
mod low;
mod lower;
mod memory;
mod merge;
pub mod nest;
mod nest_builder;
pub mod plan;
pub mod primitive;
mod primitives;
mod recompute;
mod rows;
mod text;
pub mod verify;
mod view;
mod work;

pub use build::{BuildOptions, PlanError, build};
pub use file::FileError;
pub use low::MOST_I8_PRODUCTS;
pub use nest::{Access, LoopNest, Scalar, Write};
pub use plan::{Affine, Binding, Codes, Exchanged, Kernel, Plan, Slot, SlotId, Step, Storage};
pub use primitive::{
    Attention, AttentionResult, Convolution, Int8, Matmul, Matrix, Operands, Place, Pooling,
    Primitive, Product, Recurrent, Strided,
};
pub use verify::{VerifyError, verify};
pub use work::{Received, Work};
