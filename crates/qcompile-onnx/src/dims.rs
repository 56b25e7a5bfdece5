//! The symbolic dimensions of the inputs: which one is the batch, and the sizes of the others.

use crate::draft::Draft;
use crate::error::{ImportError, MissingDim, Obstacle, Problem, UnsupportedNode};
use crate::known::Known;
use crate::pattern::nearest;
use crate::{Port, tensor};
use onnx_protobuf::ValueInfoProto;
use onnx_protobuf::tensor_shape_proto::dimension;
use onnx_protobuf::type_proto;
use qcompile_ir::{Dim, Shape, TensorType};
use std::collections::{BTreeMap, BTreeSet};

/// One declared dimension.
enum Declared {
    Fixed(usize),
    /// By its name, or `INPUT.AXIS`.
    Symbol(String),
}

struct Input<'a> {
    name: &'a str,
    element_type: i32,
    dims: Vec<Declared>,
}

/// The element type that a value is declared with; 0 if none.
pub(crate) fn declared_element_type(value: &ValueInfoProto) -> i32 {
    match value.type_.as_ref().and_then(|ty| ty.value.as_ref()) {
        Some(type_proto::Value::TensorType(ty)) => ty.elem_type,
        _ => 0,
    }
}

/// The declared type as a value of zeros.
pub(crate) fn declared_type(value: &ValueInfoProto) -> Result<Known, Obstacle> {
    let input = read(value, None)?;
    let fixed = |dim: &Declared| match dim {
        Declared::Fixed(size) => Some(*size),
        Declared::Symbol(_) => None,
    };
    let shape: Option<Vec<usize>> = input.dims.iter().map(fixed).collect();
    let shape = shape.ok_or_else(|| Obstacle::unsupported("a size that is not declared"))?;
    let zero = Known::scalar(tensor::dtype(input.element_type)?, 0.0);
    Ok(Known { shape, ..zero })
}

/// What a value is declared to be, if no tensor.
fn other_type(value: &ValueInfoProto) -> &'static str {
    match value.type_.as_ref().and_then(|ty| ty.value.as_ref()) {
        Some(type_proto::Value::SequenceType(_)) => "a sequence, not a tensor",
        Some(type_proto::Value::OptionalType(_)) => "an optional, not a tensor",
        Some(type_proto::Value::MapType(_)) => "a map, not a tensor",
        Some(type_proto::Value::SparseTensorType(_)) => "a sparse tensor, not a dense one",
        _ => "without a declared type",
    }
}

fn read<'a>(value: &'a ValueInfoProto, given: Option<&Vec<usize>>) -> Result<Input<'a>, Obstacle> {
    let Some(type_proto::Value::TensorType(ty)) =
        value.type_.as_ref().and_then(|ty| ty.value.as_ref())
    else {
        return Err(Obstacle::unsupported(other_type(value)));
    };
    tensor::dtype(ty.elem_type)?;
    let Some(shape) = ty.shape.as_ref() else {
        let given = given.ok_or_else(|| Obstacle::unsupported("a shape that is not declared"))?;
        let dims = given.iter().map(|&size| Declared::Fixed(size)).collect();
        return Ok(Input { name: &value.name, element_type: ty.elem_type, dims });
    };
    let mut dims = Vec::with_capacity(shape.dim.len());
    for (axis, dim) in shape.dim.iter().enumerate() {
        dims.push(match &dim.value {
            Some(dimension::Value::DimValue(size)) if *size >= 0 => Declared::Fixed(
                usize::try_from(*size)
                    .map_err(|_| Obstacle::invalid(format!("a dimension of {size}")))?,
            ),
            // A question mark is no name: two of them are two dimensions.
            Some(dimension::Value::DimParam(symbol)) if !symbol.is_empty() && symbol != "?" => {
                Declared::Symbol(symbol.clone())
            }
            // Some exporters write -1 for a dimension that they do not know.
            _ => Declared::Symbol(format!("{}.{axis}", value.name)),
        });
    }
    Ok(Input { name: &value.name, element_type: ty.elem_type, dims })
}

/// The inputs as they are imported.
pub(crate) struct Resolved {
    pub(crate) ports: Vec<Port>,
    /// What `--dim` calls the dimensions that are the batch.
    pub(crate) batch: Vec<String>,
}

/// Types of the inputs, with sizes from `sizes` and `shapes` and the batch as N. Adds to the warnings of `draft`.
pub(crate) fn resolve(
    values: &[&ValueInfoProto],
    sizes: &BTreeMap<String, usize>,
    shapes: &BTreeMap<String, Vec<usize>>,
    draft: &mut Draft,
) -> Result<Resolved, ImportError> {
    let mut inputs = Vec::new();
    let (mut unsupported, mut problems) = (Vec::new(), Vec::new());
    for value in values {
        match read(value, shapes.get(&value.name)) {
            Ok(input) => inputs.push(input),
            Err(Obstacle::Invalid(reason)) => {
                problems.push(Problem { place: Some(format!("input {}", value.name)), reason });
            }
            Err(Obstacle::Unsupported(reason)) => unsupported.push(UnsupportedNode {
                node: value.name.clone(),
                op: "input".to_owned(),
                domain: String::new(),
                opset: 0,
                reason,
                needs: Vec::new(),
            }),
            Err(Obstacle::Operand | Obstacle::Batch(_) | Obstacle::Unknown(..)) => {}
        }
    }
    if !unsupported.is_empty() {
        return Err(ImportError::Unsupported(unsupported, problems));
    }
    if !problems.is_empty() {
        return Err(ImportError::InvalidModel(problems));
    }
    let given = given_sizes(&inputs, sizes, shapes)?;
    let batch = batch_symbol(&inputs, &given);
    let mut missing = Vec::new();
    let mut ports = Vec::new();
    for input in &inputs {
        let mut shape = Vec::with_capacity(input.dims.len());
        for (axis, dim) in input.dims.iter().enumerate() {
            shape.push(match dim {
                Declared::Fixed(size) => Dim::fixed(*size),
                Declared::Symbol(symbol) => match given.get(&(input.name, axis)) {
                    Some(&size) => Dim::fixed(size),
                    None if batch.contains(symbol) => Dim::N,
                    None => {
                        let name = symbol.clone();
                        missing.push(MissingDim { name, input: input.name.to_owned(), axis });
                        Dim::ONE
                    }
                },
            });
        }
        let Ok(dtype) = tensor::dtype(input.element_type) else {
            continue;
        };
        draft.note_type(input.element_type);
        ports.push(Port {
            name: input.name.to_owned(),
            ty: TensorType::new(dtype, Shape(shape)),
            onnx_dtype: tensor::dtype_name(input.element_type),
        });
    }
    if !missing.is_empty() {
        return Err(ImportError::MissingDims(missing));
    }
    note_fixed_batch(&ports, &mut draft.warnings);
    Ok(Resolved { ports, batch: batch.into_iter().collect() })
}

/// The sizes that are given, by input and axis: by name first, then by whole shapes.
fn given_sizes<'a>(
    inputs: &[Input<'a>],
    sizes: &BTreeMap<String, usize>,
    shapes: &BTreeMap<String, Vec<usize>>,
) -> Result<BTreeMap<(&'a str, usize), usize>, ImportError> {
    let mut given = BTreeMap::new();
    let mut known = BTreeSet::new();
    let mut used = BTreeSet::new();
    for input in inputs {
        for (axis, dim) in input.dims.iter().enumerate() {
            let Declared::Symbol(symbol) = dim else {
                continue;
            };
            let place = format!("{}.{axis}", input.name);
            for name in [place, symbol.clone()] {
                if let Some(&size) = sizes.get(&name) {
                    given.entry((input.name, axis)).or_insert(size);
                    used.insert(name.clone());
                }
                known.insert(name);
            }
            let shape = shapes.get(input.name).filter(|shape| shape.len() == input.dims.len());
            if let Some(shape) = shape {
                given.entry((input.name, axis)).or_insert(shape[axis]);
            }
        }
    }
    match sizes.keys().find(|name| !used.contains(*name)) {
        None => Ok(given),
        Some(name) => Err(ImportError::NoMatch {
            option: "dim",
            value: name.clone(),
            nearest: nearest(name, known.iter().map(String::as_str)),
        }),
    }
}

/// The symbols that stand for N: the first one of an axis 0 (with every nameless axis 0), or the only one there is.
fn batch_symbol(inputs: &[Input], given: &BTreeMap<(&str, usize), usize>) -> BTreeSet<String> {
    let mut first: Option<&str> = None;
    let mut all = BTreeSet::new();
    let mut batch = BTreeSet::new();
    for input in inputs {
        for (axis, dim) in input.dims.iter().enumerate() {
            if given.contains_key(&(input.name, axis)) {
                continue;
            }
            let Declared::Symbol(symbol) = dim else {
                continue;
            };
            all.insert(symbol.clone());
            let nameless = *symbol == format!("{}.{axis}", input.name);
            if axis == 0 && (nameless || *first.get_or_insert(symbol) == symbol) {
                batch.insert(symbol.clone());
            }
        }
    }
    if batch.is_empty() && all.len() == 1 { all } else { batch }
}

fn note_fixed_batch(ports: &[Port], warnings: &mut Vec<String>) {
    let symbolic = ports.iter().any(|port| port.ty.shape.batch_axis().is_some());
    let first: BTreeSet<Dim> =
        ports.iter().filter_map(|port| port.ty.shape.0.first().copied()).collect();
    if let (false, [size]) = (symbolic, &first.iter().copied().collect::<Vec<_>>()[..]) {
        warnings.push(format!("the batch size is fixed to {size} by the model"));
    }
}
