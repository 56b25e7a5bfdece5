//! One ONNX node as the operators see it: operands, attributes by name and type, and which of them were read.

use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::known::{Element, Known};
use onnx_protobuf::attribute_proto::AttributeType;
use onnx_protobuf::{AttributeProto, GraphProto, SparseTensorProto, TensorProto};
use qcompile_ir::Dim;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

type Result<T> = std::result::Result<T, Obstacle>;

/// One node whose operands are imported.
pub(crate) struct OnnxNode<'a> {
    /// The operator.
    pub(crate) op: &'a str,
    /// Version of the operator set that defines it.
    pub(crate) opset: i64,
    /// Operands; none where an optional one is left out.
    pub(crate) inputs: Vec<Option<ValueId>>,
    /// Names of the results, empty where an optional one is left out.
    pub(crate) outputs: Vec<String>,
    pub(crate) attributes: Attributes,
    /// The first result's name, which names what belongs to the node.
    pub(crate) base: &'a str,
    pub(crate) external: crate::External<'a>,
    pub(crate) batch_norm: crate::BatchNorm,
}

impl OnnxNode<'_> {
    /// Operand `at`, which the operator needs.
    pub(crate) fn input(&self, at: usize) -> Result<ValueId> {
        self.optional(at).ok_or_else(|| Obstacle::invalid(format!("input {at} is missing")))
    }

    /// Operand `at`, if it is there.
    pub(crate) fn optional(&self, at: usize) -> Option<ValueId> {
        self.inputs.get(at).copied().flatten()
    }

    /// Every operand of a variadic operator.
    pub(crate) fn all_inputs(&self) -> Result<Vec<ValueId>> {
        if self.inputs.is_empty() {
            return Err(Obstacle::invalid("takes at least one input"));
        }
        (0..self.inputs.len()).map(|at| self.input(at)).collect()
    }

    /// Whether anything may use result `at`.
    pub(crate) fn wants(&self, at: usize) -> bool {
        self.outputs.get(at).is_some_and(|name| !name.is_empty())
    }

    /// The elements of operand `at`, which must be known at compile time; none if it is left out.
    pub(crate) fn constant(&self, draft: &Draft, at: usize) -> Result<Option<Known>> {
        let Some(id) = self.optional(at) else {
            return Ok(None);
        };
        draft.constant(id).map(Some).ok_or_else(|| {
            let reason = format!("input {at} is not known at compile time (or is too large)");
            Obstacle::Unknown(reason, draft.inputs_of(id))
        })
    }

    /// Operand `at` as elements of a shape, which may contain N.
    pub(crate) fn shape_elements(&self, draft: &Draft, at: usize) -> Result<Option<Vec<Element>>> {
        let Some(known) = self.constant(draft, at)? else {
            return Ok(None);
        };
        if known.dtype.is_float() || known.shape.len() > 1 {
            return Err(Obstacle::invalid(format!(
                "input {at} is {}, not a list of integers",
                known.ty()
            )));
        }
        let count = known.len().unwrap_or(0);
        Ok(Some((0..count).map(|index| known.get(index)).collect()))
    }

    /// Operand `at` as integers known at compile time.
    pub(crate) fn ints_input(&self, draft: &Draft, at: usize) -> Result<Option<Vec<i64>>> {
        let Some(elements) = self.shape_elements(draft, at)? else {
            return Ok(None);
        };
        let ints: Option<Vec<i64>> = elements.iter().map(|element| element.as_int()).collect();
        ints.map(Some)
            .ok_or_else(|| Obstacle::batch(format!("input {at} depends on the batch size")))
    }

    /// Operand `at` as one number known at compile time.
    pub(crate) fn number_input(&self, draft: &Draft, at: usize) -> Result<Option<f64>> {
        let Some(known) = self.constant(draft, at)? else {
            return Ok(None);
        };
        if known.len() != Some(1) {
            return Err(Obstacle::invalid(format!("input {at} is {}, not one number", known.ty())));
        }
        known
            .get(0)
            .as_f64()
            .map(Some)
            .ok_or_else(|| Obstacle::batch(format!("input {at} depends on the batch size")))
    }
}

/// Elements of a shape as dimensions.
pub(crate) fn dims_from(elements: &[Element]) -> Result<Vec<Dim>> {
    elements
        .iter()
        .map(|&element| {
            let (value, batch) = match element {
                Element::Int(value) => (value, false),
                Element::Batch(value) => (value, true),
                Element::Float(value) => {
                    return Err(Obstacle::invalid(format!("a dimension of {value}")));
                }
            };
            let scale = usize::try_from(value)
                .map_err(|_| Obstacle::invalid(format!("a dimension of {value}")))?;
            Ok(Dim { scale, batch })
        })
        .collect()
}

/// `axis` of a value of rank `rank`, negative from the end.
pub(crate) fn axis_of(axis: i64, rank: usize) -> Result<usize> {
    let signed = i64::try_from(rank).unwrap_or(i64::MAX);
    let from_start = if axis < 0 { axis.saturating_add(signed) } else { axis };
    usize::try_from(from_start)
        .ok()
        .filter(|&axis| axis < rank)
        .ok_or_else(|| Obstacle::invalid(format!("axis {axis} of a value of rank {rank}")))
}

/// Axes, each within `rank`, ascending, none twice.
pub(crate) fn axes_of(axes: &[i64], rank: usize) -> Result<Vec<usize>> {
    let mut resolved = BTreeSet::new();
    for &axis in axes {
        if !resolved.insert(axis_of(axis, rank)?) {
            return Err(Obstacle::invalid(format!("axis {axis} is given twice")));
        }
    }
    Ok(resolved.into_iter().collect())
}

/// The attributes of one node. Reading one marks it; what was never read is not supported.
pub(crate) struct Attributes {
    by_name: BTreeMap<String, AttributeProto>,
    read: RefCell<BTreeSet<String>>,
}

impl Attributes {
    pub(crate) fn new(attributes: Vec<AttributeProto>) -> Result<Attributes> {
        let mut by_name = BTreeMap::new();
        for attribute in attributes {
            let name = attribute.name.clone();
            if by_name.insert(name.clone(), attribute).is_some() {
                return Err(Obstacle::invalid(format!("attribute {name} is given twice")));
            }
        }
        Ok(Attributes { by_name, read: RefCell::default() })
    }

    fn find(&self, name: &str, wanted: AttributeType) -> Result<Option<&AttributeProto>> {
        let Some(attribute) = self.by_name.get(name) else {
            return Ok(None);
        };
        self.read.borrow_mut().insert(name.to_owned());
        if !attribute.ref_attr_name.is_empty() {
            return Err(Obstacle::invalid(format!(
                "attribute {name} refers to a function's attribute"
            )));
        }
        // Old files leave the type out.
        match attribute.type_.enum_value() {
            Ok(found) if found == wanted || found == AttributeType::UNDEFINED => {
                Ok(Some(attribute))
            }
            found => Err(Obstacle::invalid(format!(
                "attribute {name} is of type {found:?}, not {wanted:?}"
            ))),
        }
    }

    pub(crate) fn int(&self, name: &str, default: i64) -> Result<i64> {
        Ok(self.find(name, AttributeType::INT)?.map_or(default, |attribute| attribute.i))
    }

    pub(crate) fn optional_int(&self, name: &str) -> Result<Option<i64>> {
        Ok(self.find(name, AttributeType::INT)?.map(|attribute| attribute.i))
    }

    /// An integer that is 0 or 1.
    pub(crate) fn flag(&self, name: &str, default: bool) -> Result<bool> {
        match self.int(name, i64::from(default))? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(Obstacle::invalid(format!("attribute {name} is {other}, not 0 or 1"))),
        }
    }

    pub(crate) fn float(&self, name: &str, default: f32) -> Result<f64> {
        Ok(f64::from(
            self.find(name, AttributeType::FLOAT)?.map_or(default, |attribute| attribute.f),
        ))
    }

    pub(crate) fn optional_float(&self, name: &str) -> Result<Option<f64>> {
        Ok(self.find(name, AttributeType::FLOAT)?.map(|attribute| f64::from(attribute.f)))
    }

    pub(crate) fn floats(&self, name: &str) -> Result<Option<&[f32]>> {
        Ok(self.find(name, AttributeType::FLOATS)?.map(|attribute| &attribute.floats[..]))
    }

    pub(crate) fn ints(&self, name: &str) -> Result<Option<&[i64]>> {
        Ok(self.find(name, AttributeType::INTS)?.map(|attribute| &attribute.ints[..]))
    }

    pub(crate) fn string(&self, name: &str, default: &str) -> Result<String> {
        match self.find(name, AttributeType::STRING)? {
            None => Ok(default.to_owned()),
            Some(attribute) => String::from_utf8(attribute.s.clone())
                .map_err(|_| Obstacle::invalid(format!("attribute {name} is not UTF-8"))),
        }
    }

    pub(crate) fn strings(&self, name: &str) -> Result<Option<Vec<String>>> {
        let Some(attribute) = self.find(name, AttributeType::STRINGS)? else {
            return Ok(None);
        };
        let text = |bytes: &Vec<u8>| {
            String::from_utf8(bytes.clone())
                .map_err(|_| Obstacle::invalid(format!("attribute {name} is not UTF-8")))
        };
        attribute.strings.iter().map(text).collect::<Result<Vec<_>>>().map(Some)
    }

    /// Moves a tensor out.
    pub(crate) fn take_tensor(&mut self, name: &str) -> Result<Option<TensorProto>> {
        if self.find(name, AttributeType::TENSOR)?.is_none() {
            return Ok(None);
        }
        let tensor = self.by_name.get_mut(name).and_then(|attribute| attribute.t.take());
        tensor.map(Some).ok_or_else(|| Obstacle::invalid(format!("attribute {name} has no tensor")))
    }

    /// Moves a sparse tensor out.
    pub(crate) fn take_sparse(&mut self, name: &str) -> Result<Option<SparseTensorProto>> {
        self.find(name, AttributeType::SPARSE_TENSOR)?;
        let attribute = self.by_name.get_mut(name);
        Ok(attribute.and_then(|attribute| attribute.sparse_tensor.take()))
    }

    /// Moves a subgraph out.
    pub(crate) fn take_graph(&mut self, name: &str) -> Result<GraphProto> {
        self.find(name, AttributeType::GRAPH)?;
        let graph = self.by_name.get_mut(name).and_then(|attribute| attribute.g.take());
        graph.ok_or_else(|| Obstacle::invalid(format!("attribute {name}, a graph, is missing")))
    }

    /// Attributes that nothing read.
    pub(crate) fn unread(&self) -> Vec<String> {
        let read = self.read.borrow();
        self.by_name.keys().filter(|name| !read.contains(*name)).cloned().collect()
    }
}
