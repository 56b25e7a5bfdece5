//! The ONNX model while it is written: names that are unique, initializers, nodes.

use crate::tensor::onnx_number;
use onnx_protobuf::attribute_proto::AttributeType;
use onnx_protobuf::tensor_shape_proto::{Dimension, dimension};
use onnx_protobuf::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto,
    TensorShapeProto, TypeProto, ValueInfoProto, type_proto,
};
use protobuf::{EnumOrUnknown, MessageField};
use qcompile_ir::{DType, Dim, Tensor};
use std::collections::{BTreeMap, BTreeSet};

/// The value of an attribute.
pub(super) enum Attribute {
    Int(i64),
    Ints(Vec<i64>),
    Float(f32),
    Floats(Vec<f32>),
    Text(&'static str),
    Texts(Vec<&'static str>),
}

/// Sizes as attributes and constants have them.
pub(super) fn ints(sizes: &[usize]) -> Vec<i64> {
    sizes.iter().map(|&size| int(size)).collect()
}

/// A size as attributes and constants have it.
pub(super) fn int(size: usize) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

/// An input or output of the model.
pub(super) struct PortType<'a> {
    pub(super) name: &'a str,
    pub(super) elements: i32,
    pub(super) dims: &'a [Dim],
}

/// The graph so far.
#[derive(Default)]
pub(super) struct Writer {
    inputs: Vec<ValueInfoProto>,
    outputs: Vec<ValueInfoProto>,
    initializers: Vec<TensorProto>,
    nodes: Vec<NodeProto>,
    taken: BTreeSet<String>,
    suffixes: BTreeMap<String, usize>,
    /// Constants of integers that there are, by their shape and elements.
    integers: BTreeMap<(Vec<usize>, Vec<i64>), String>,
    /// Nodes of each ONNX operator.
    counts: BTreeMap<&'static str, usize>,
}

impl Writer {
    /// A name that nothing has, as close to the wanted one as can be.
    pub(super) fn claim(&mut self, wanted: &str) -> String {
        let mut name = wanted.to_owned();
        while name.is_empty() || !self.taken.insert(name.clone()) {
            let suffix = self.suffixes.entry(wanted.to_owned()).or_default();
            *suffix += 1;
            name = format!("{wanted}.{suffix}");
        }
        name
    }

    /// Keeps the name of an input, which an output may have as well where it is that input.
    pub(super) fn claim_input(&mut self, name: &str) {
        self.taken.insert(name.to_owned());
    }

    pub(super) fn input(&mut self, port: &PortType) {
        self.inputs.push(value_info(port));
    }

    pub(super) fn output(&mut self, port: &PortType) {
        self.outputs.push(value_info(port));
    }

    /// Adds an initializer under a name that was claimed.
    pub(super) fn initializer(&mut self, name: &str, tensor: &Tensor) {
        self.initializers.push(TensorProto {
            name: name.to_owned(),
            dims: ints(tensor.shape()),
            data_type: onnx_number(tensor.dtype()),
            raw_data: stored(tensor),
            ..TensorProto::default()
        });
    }

    /// The name of a constant; equal ones of integers are one.
    pub(super) fn constant(&mut self, wanted: &str, tensor: &Tensor) -> String {
        let key =
            (tensor.dtype() == DType::I64).then(|| (tensor.shape().to_vec(), tensor.to_i64()));
        if let Some(name) = key.as_ref().and_then(|key| self.integers.get(key)) {
            return name.clone();
        }
        let name = self.claim(wanted);
        self.initializer(&name, tensor);
        if let Some(key) = key {
            self.integers.insert(key, name.clone());
        }
        name
    }

    /// Adds a node with one result for each wanted name, and gives their names.
    pub(super) fn node(
        &mut self,
        op: &'static str,
        inputs: Vec<String>,
        wanted: &[&str],
        attributes: Vec<(&'static str, Attribute)>,
    ) -> Vec<String> {
        let outputs: Vec<String> = wanted
            .iter()
            .map(|name| if name.is_empty() { String::new() } else { self.claim(name) })
            .collect();
        self.push(op, inputs, outputs.clone(), attributes);
        outputs
    }

    /// Adds a node whose results have names that were claimed.
    fn push(
        &mut self,
        op: &'static str,
        input: Vec<String>,
        output: Vec<String>,
        attributes: Vec<(&'static str, Attribute)>,
    ) {
        let count = self.counts.entry(op).or_default();
        let name = format!("{op}_{count}");
        *count += 1;
        self.nodes.push(NodeProto {
            op_type: op.to_owned(),
            name,
            input,
            output,
            attribute: attributes.into_iter().map(attribute).collect(),
            ..NodeProto::default()
        });
    }

    /// Adds a copy of a value under a name that was claimed.
    pub(super) fn identity(&mut self, value: String, name: &str) {
        self.push("Identity", vec![value], vec![name.to_owned()], Vec::new());
    }

    /// Lets the result of a node have another name, which was claimed. False if no node has this result.
    pub(super) fn rename(&mut self, old: &str, new: &str) -> bool {
        let made = |node: &NodeProto| node.output.iter().any(|name| name == old);
        if !self.nodes.iter().any(made) {
            return false;
        }
        for node in &mut self.nodes {
            for name in node.input.iter_mut().chain(&mut node.output).filter(|name| *name == old) {
                new.clone_into(name);
            }
        }
        true
    }

    /// Removes what no output depends on.
    fn sweep(&mut self) {
        let mut live: BTreeSet<String> =
            self.outputs.iter().map(|output| output.name.clone()).collect();
        let mut nodes = Vec::with_capacity(self.nodes.len());
        // Nodes stand after what they use.
        for node in std::mem::take(&mut self.nodes).into_iter().rev() {
            if node.output.iter().any(|name| live.contains(name)) {
                live.extend(node.input.iter().cloned());
                nodes.push(node);
            }
        }
        nodes.reverse();
        self.nodes = nodes;
        self.initializers.retain(|tensor| live.contains(&tensor.name));
    }

    /// The finished model.
    pub(super) fn finish(mut self, name: &str, opset: u32, producer_version: &str) -> ModelProto {
        self.sweep();
        let graph = GraphProto {
            name: name.to_owned(),
            node: self.nodes,
            initializer: self.initializers,
            input: self.inputs,
            output: self.outputs,
            ..GraphProto::default()
        };
        ModelProto {
            ir_version: ir_version(opset),
            opset_import: vec![OperatorSetIdProto {
                version: i64::from(opset),
                ..OperatorSetIdProto::default()
            }],
            producer_name: "qcompile".to_owned(),
            producer_version: producer_version.to_owned(),
            graph: MessageField::some(graph),
            ..ModelProto::default()
        }
    }
}

/// The elements as a file has them: those of 4 bits two in a byte, the first in the lower half.
fn stored(tensor: &Tensor) -> Vec<u8> {
    match tensor.dtype() {
        DType::I4 | DType::U4 => {
            let second = |pair: &[u8]| pair.get(1).map_or(0, |byte| byte << 4);
            tensor.bytes().chunks(2).map(|pair| pair[0] & 15 | second(pair)).collect()
        }
        _ => tensor.bytes().to_vec(),
    }
}

/// The version of the format with which ONNX released an opset.
fn ir_version(opset: u32) -> i64 {
    match opset {
        ..=14 => 7,
        15..=18 => 8,
        19..=20 => 9,
        21..=22 => 10,
        23 => 11,
        24 => 12,
        _ => 13,
    }
}

fn value_info(port: &PortType) -> ValueInfoProto {
    let dim = |dim: &Dim| {
        let value = match dim.as_fixed() {
            Some(size) => dimension::Value::DimValue(int(size)),
            None => dimension::Value::DimParam(dim.to_string()),
        };
        Dimension { value: Some(value), ..Dimension::default() }
    };
    let shape = TensorShapeProto { dim: port.dims.iter().map(dim).collect(), ..Default::default() };
    let tensor = type_proto::Tensor {
        elem_type: port.elements,
        shape: MessageField::some(shape),
        ..Default::default()
    };
    let ty =
        TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..TypeProto::default() };
    ValueInfoProto {
        name: port.name.to_owned(),
        type_: MessageField::some(ty),
        ..ValueInfoProto::default()
    }
}

fn attribute((name, value): (&'static str, Attribute)) -> AttributeProto {
    let mut proto = AttributeProto { name: name.to_owned(), ..AttributeProto::default() };
    let kind = match value {
        Attribute::Int(value) => {
            proto.i = value;
            AttributeType::INT
        }
        Attribute::Ints(values) => {
            proto.ints = values;
            AttributeType::INTS
        }
        Attribute::Float(value) => {
            proto.f = value;
            AttributeType::FLOAT
        }
        Attribute::Floats(values) => {
            proto.floats = values;
            AttributeType::FLOATS
        }
        Attribute::Text(text) => {
            proto.s = text.as_bytes().to_vec();
            AttributeType::STRING
        }
        Attribute::Texts(texts) => {
            proto.strings = texts.into_iter().map(|text| text.as_bytes().to_vec()).collect();
            AttributeType::STRINGS
        }
    };
    proto.type_ = EnumOrUnknown::new(kind);
    proto
}
