//! Inputs whose values are known when the model is imported: they become constants.

use crate::error::{ImportError, Obstacle};
use crate::pattern::nearest;
use crate::{dims, tensor};
use onnx_protobuf::ValueInfoProto;
use onnx_protobuf::tensor_shape_proto::dimension;
use onnx_protobuf::type_proto;
use qcompile_ir::Tensor;
use std::collections::BTreeMap;

/// Whether every name of `values` is an input.
pub(crate) fn check_names(
    inputs: &[&ValueInfoProto],
    values: &BTreeMap<String, Tensor>,
) -> Result<(), ImportError> {
    let names = || inputs.iter().map(|input| input.name.as_str());
    match values.keys().find(|name| names().all(|other| other != name.as_str())) {
        None => Ok(()),
        Some(name) => Err(ImportError::NoMatch {
            option: "constant",
            value: name.clone(),
            nearest: nearest(name, names()),
        }),
    }
}

/// The value of an input as the model declares it: of its element type, and a scalar if it is one.
pub(crate) fn bind(input: &ValueInfoProto, value: &Tensor) -> Result<Tensor, Obstacle> {
    let declared = dims::declared_element_type(input);
    let dtype = tensor::dtype(declared)?;
    let shape = match sizes(input) {
        Some(sizes) if sizes.is_empty() && value.shape() == [1] => Vec::new(),
        Some(sizes) => {
            let fits = sizes.len() == value.shape().len()
                && sizes.iter().zip(value.shape()).all(|(size, &at)| size.is_none_or(|s| s == at));
            if !fits {
                let shape = value.shape();
                return Err(Obstacle::invalid(format!("the value given has the shape {shape:?}")));
            }
            value.shape().to_vec()
        }
        None => value.shape().to_vec(),
    };
    let converted = if dtype == value.dtype() {
        value.reshaped(&shape)
    } else {
        Tensor::from_f64(dtype, &shape, &value.to_f64())
            .filter(|tensor| dtype.is_float() || tensor.to_f64() == value.to_f64())
    };
    converted.ok_or_else(|| {
        Obstacle::invalid(format!("the value given is no {}", tensor::dtype_name(declared)))
    })
}

/// The declared sizes, none where one is symbolic; `None` if no shape is declared.
fn sizes(input: &ValueInfoProto) -> Option<Vec<Option<usize>>> {
    let Some(type_proto::Value::TensorType(ty)) = input.type_.as_ref()?.value.as_ref() else {
        return None;
    };
    let size = |dim: &onnx_protobuf::tensor_shape_proto::Dimension| match dim.value {
        Some(dimension::Value::DimValue(size)) => usize::try_from(size).ok(),
        _ => None,
    };
    Some(ty.shape.as_ref()?.dim.iter().map(size).collect())
}
