//! Data sets.

mod array;
pub mod npy;
pub mod npz;
mod source;

pub use array::{Array, Dtype};
pub use source::Limits;
