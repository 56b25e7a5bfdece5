//! Data sets.

mod array;
mod batches;
mod convert;
mod dataset;
#[cfg(test)]
mod dataset_tests;
mod fit;
pub mod idx;
pub mod npy;
pub mod npz;
mod source;
mod spec;
pub mod table;
mod transform;

pub use array::{Array, Dtype};
pub use batches::{Batches, Order};
pub use dataset::{Binding, Dataset, LABEL, Target, UNNAMED};
pub use fit::{InputType, fit};
pub use source::Limits;
pub use spec::{Item, parse_spec};
pub use transform::{Transform, Values};
