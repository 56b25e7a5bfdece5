//! Data sets: from files of unknown worth to batches as a model's inputs take them.
//!
//! [`parse_spec`] reads the text of `--data`, [`Dataset::load`] the files it names (npz, npy, IDX, tables; all but npz
//! also as gzip; told by content), [`Dataset::bind`] finds the arrays for a model's inputs and checks shapes and labels,
//! [`Batches`] gives the samples of every step and [`Binding::batch`] their values. Arrays stay in memory as the file
//! has them: a data set of bytes costs its bytes, and samples are padded, repeated and normalised as they are taken.
//!
//! ```
//! use qcompile::data::{Array, Batches, Dataset, Dtype, InputType, Target};
//!
//! let mut data = Dataset::default();
//! data.arrays.insert("x".into(), Array::from_u8(vec![3, 2, 2], &[0, 51, 102, 255, 0, 0, 0, 0, 9, 9, 9, 9])?);
//! data.arrays.insert("label".into(), Array::from_i64(vec![3], &[1, 0, 1])?);
//! let image = InputType { dtype: Dtype::F32, shape: vec![None, Some(1), Some(2), Some(2)] };
//! let target = Target::Classes { classes: 2, rows_per_sample: 1, dtype: Dtype::I64 };
//! let binding = data.bind(&[("image".into(), image)], Some(&target))?;
//! for rows in Batches::new(binding.samples(), 2).shuffled(7).epoch(0, 0) {
//!     let batch = binding.batch(&rows)?;
//!     assert_eq!(batch["image"].shape, [rows.len(), 1, 2, 2]);
//! }
//! # Ok::<(), qcompile::error::Error>(())
//! ```

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
pub use dataset::{Binding, Dataset, LABEL, Target, UNNAMED, read_arrays};
pub use fit::{InputType, check_exact, fit};
pub use source::Limits;
pub use spec::{Item, parse_spec};
pub use transform::{Transform, Values};
