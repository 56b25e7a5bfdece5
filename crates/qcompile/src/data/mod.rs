//! Data sets.

mod array;
mod batches;
pub mod idx;
pub mod npy;
pub mod npz;
mod source;
pub mod table;

pub use array::{Array, Dtype};
pub use batches::{Batches, Order};
pub use source::Limits;
