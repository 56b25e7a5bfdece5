//! What a trainer keeps between steps, as bytes: a safetensors file that other tools read, with a checksum.
//!
//! The metadata has one entry, `qcompile`: a JSON object with `checksum` (CRC-32 of all tensors in order of their
//! names), `progress` (the caller's text) and `version`. Writing it whole or not at all is the caller's part.

use crate::{RuntimeError, Trainer, Values};
use qcompile_ir::{DType, Tensor};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::json;
use std::collections::{BTreeMap, HashMap};

const VERSION: u64 = 1;
const ENTRY: &str = "qcompile";

fn refused(reason: impl std::fmt::Display) -> RuntimeError {
    RuntimeError::Checkpoint(reason.to_string())
}

/// The element type of a safetensors file for one of the graph. Numbers of 4 bits are stored in 8.
#[must_use]
pub const fn file_type(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::BF16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        DType::F8E4M3 => Dtype::F8_E4M3,
        DType::F8E5M2 => Dtype::F8_E5M2,
        DType::I8 | DType::I4 => Dtype::I8,
        DType::U8 | DType::U4 => Dtype::U8,
        DType::I32 => Dtype::I32,
        DType::I64 => Dtype::I64,
        DType::Bool => Dtype::BOOL,
    }
}

fn checksum(values: &Values) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    for (name, tensor) in values {
        hasher.update(name.as_bytes());
        hasher.update(&[0]);
        hasher.update(tensor.bytes());
    }
    hasher.finalize()
}

fn kept(trainer: &Trainer) -> Values {
    let mut values = trainer.parameters();
    values.extend(trainer.states());
    values
}

/// Parameters, states and `progress` as the bytes of a safetensors file: the same bytes for the same values.
///
/// # Errors
/// [`RuntimeError::Checkpoint`] if they are beyond what the format holds.
pub fn encode(trainer: &Trainer, progress: &str) -> Result<Vec<u8>, RuntimeError> {
    let values = kept(trainer);
    let mut views = BTreeMap::new();
    for (name, tensor) in &values {
        let dtype = file_type(tensor.dtype());
        let view = TensorView::new(dtype, tensor.shape().to_vec(), tensor.bytes());
        views.insert(name.clone(), view.map_err(refused)?);
    }
    let entry = json!({ "checksum": checksum(&values), "progress": progress, "version": VERSION });
    // One entry only: a map of several would be written in random order.
    let metadata = HashMap::from([(ENTRY.to_owned(), entry.to_string())]);
    safetensors::serialize(views, Some(metadata)).map_err(refused)
}

/// Gives the trainer the parameters and states in these bytes and returns the caller's text. Nothing is changed
/// unless every value is there, of its type, with the right checksum.
///
/// # Errors
/// [`RuntimeError::Checkpoint`] says what does not fit.
pub fn restore(trainer: &mut Trainer, bytes: &[u8]) -> Result<String, RuntimeError> {
    let damaged = |error: safetensors::SafeTensorError| refused(format!("it is damaged: {error}"));
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
    let entry = header.metadata().as_ref().and_then(|metadata| metadata.get(ENTRY));
    let entry = entry.ok_or_else(|| refused("it was not written by qcompile"))?;
    let entry: serde_json::Value =
        serde_json::from_str(entry).map_err(|_| refused("its metadata are damaged"))?;
    if entry["version"] != VERSION {
        return Err(refused(format!("it has version {}, not {VERSION}", entry["version"])));
    }
    let tensors = SafeTensors::deserialize(bytes).map_err(damaged)?;
    let mut values = Values::new();
    for (name, old) in kept(trainer) {
        let view = tensors.tensor(&name).map_err(|_| refused(format!("it has no `{name}`")))?;
        if view.dtype() != file_type(old.dtype()) || view.shape() != old.shape() {
            return Err(refused(format!(
                "`{name}` is {:?} {:?}, the plan has {}",
                view.dtype(),
                view.shape(),
                old.ty()
            )));
        }
        let tensor = Tensor::from_bytes(old.dtype(), old.shape().to_vec(), view.data().to_vec());
        values.insert(name, tensor.ok_or_else(|| refused("it is damaged"))?);
    }
    if let Some(name) = tensors.names().into_iter().find(|name| !values.contains_key(*name)) {
        return Err(refused(format!("it holds `{name}`, which the plan has not")));
    }
    if entry["checksum"] != checksum(&values) {
        return Err(refused("its values have changed since it was written"));
    }
    for (name, value) in &values {
        trainer.set(name, value)?;
    }
    Ok(entry["progress"].as_str().unwrap_or_default().to_owned())
}
