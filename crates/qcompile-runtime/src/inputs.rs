//! What a step is given: checked against the plan, and cut into each worker's part of the batch.

use crate::{RuntimeError, Values};
use qcompile_ir::{DType, Tensor};
use qcompile_plan::{Binding, Plan};
use std::borrow::Cow;

/// The inputs of one call, in the order of the plan's, and the batch size.
pub(crate) struct Inputs<'a> {
    pub(crate) tensors: Vec<&'a Tensor>,
    pub(crate) batch: usize,
}

fn refused(name: &str, reason: String) -> RuntimeError {
    RuntimeError::Input { name: name.to_owned(), reason }
}

impl<'a> Inputs<'a> {
    /// The plan's inputs out of `given`, else out of `kept`. Names that only `all` (the training form) has are allowed.
    pub(crate) fn of(
        plan: &Plan,
        all: &Plan,
        given: &'a Values,
        kept: &'a Values,
    ) -> Result<Inputs<'a>, RuntimeError> {
        for name in given.keys() {
            if !all.inputs().iter().any(|input| input.name == *name) {
                let names: Vec<&str> = all.inputs().iter().map(|input| &*input.name).collect();
                let reason = format!("the plan has no such input; it has {}", names.join(", "));
                return Err(refused(name, reason));
            }
        }
        let mut inputs = Inputs { tensors: Vec::new(), batch: 1 };
        let mut first: Option<&str> = None;
        for input in plan.inputs() {
            let tensor =
                given.get(&input.name).or_else(|| kept.get(&input.name)).ok_or_else(|| {
                    refused(&input.name, format!("it is missing; it is {}", input.ty))
                })?;
            match (batch_size(input, tensor)?, first) {
                (Some(batch), None) => {
                    inputs.batch = batch;
                    first = Some(&input.name);
                }
                (Some(batch), Some(name)) if batch != inputs.batch => {
                    let reason =
                        format!("it has {batch} samples, but `{name}` has {}", inputs.batch);
                    return Err(refused(&input.name, reason));
                }
                _ => {}
            }
            inputs.tensors.push(tensor);
        }
        Ok(inputs)
    }

    /// The bytes of input `index` for samples `begin..end`, as the plan's memory holds them.
    pub(crate) fn part(
        &self,
        plan: &Plan,
        index: usize,
        begin: usize,
        end: usize,
    ) -> Cow<'a, [u8]> {
        let (binding, tensor) = (&plan.inputs()[index], self.tensors[index]);
        let mut bytes = match binding.ty.shape.batch_axis() {
            Some(axis) if (begin, end) != (0, self.batch) => {
                let per_sample = binding.ty.shape.0[axis].scale;
                Cow::Owned(rows(tensor, axis, begin * per_sample, end * per_sample))
            }
            _ => Cow::Borrowed(tensor.bytes()),
        };
        if tensor.dtype() == DType::Bool {
            bytes.to_mut().iter_mut().for_each(|byte| *byte = u8::from(*byte != 0));
        }
        bytes
    }
}

/// Indices `begin..end` of one axis.
fn rows(tensor: &Tensor, axis: usize, begin: usize, end: usize) -> Vec<u8> {
    let shape = tensor.shape();
    let inner: usize = shape[axis + 1..].iter().product::<usize>() * tensor.dtype().size();
    let outer: usize = shape[..axis].iter().product();
    let mut bytes = Vec::with_capacity(outer * (end - begin) * inner);
    for at in 0..outer {
        let first = at * shape[axis] * inner;
        bytes.extend_from_slice(&tensor.bytes()[first + begin * inner..first + end * inner]);
    }
    bytes
}

/// The batch size that a tensor has, if its input has a batch axis.
fn batch_size(input: &Binding, tensor: &Tensor) -> Result<Option<usize>, RuntimeError> {
    let wrong = || {
        let found = tensor.ty();
        refused(&input.name, format!("it is {found}, the plan takes {}", input.ty))
    };
    let dims = &input.ty.shape.0;
    if tensor.dtype() != input.ty.dtype || tensor.shape().len() != dims.len() {
        return Err(wrong());
    }
    let mut batch = None;
    for (dim, &size) in dims.iter().zip(tensor.shape()) {
        if !dim.batch {
            if size != dim.scale {
                return Err(wrong());
            }
            continue;
        }
        let samples = size.checked_div(dim.scale).unwrap_or(0);
        if samples == 0 || samples * dim.scale != size {
            return Err(wrong());
        }
        batch = Some(samples);
    }
    Ok(batch)
}
