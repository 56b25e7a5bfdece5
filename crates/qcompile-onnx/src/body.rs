//! A list of nodes as the importer walks it: each with its name and the operator sets that hold for it, calls of the
//! model's own functions replaced by the functions' nodes, and constants that hold weights among the initializers.

use crate::error::Problem;
use crate::function::{Functions, plain_domain};
use onnx_protobuf::tensor_proto::DataType;
use onnx_protobuf::{GraphProto, NodeProto, SparseTensorProto, TensorProto, ValueInfoProto};
use std::collections::BTreeSet;
use std::rc::Rc;

/// Versions of operator sets by domain.
pub(crate) type Opsets = std::collections::BTreeMap<String, i64>;

/// One node.
#[derive(Clone)]
pub(crate) struct BodyNode {
    pub(crate) proto: NodeProto,
    /// How it is called in reports and notes: its name, or `Op_index`, after the names of the calls around it.
    pub(crate) name: String,
    pub(crate) opsets: Rc<Opsets>,
}

impl BodyNode {
    /// The version of the operator set that it is from, 0 if none is imported.
    pub(crate) fn opset(&self) -> i64 {
        self.opsets.get(plain_domain(&self.proto.domain)).copied().unwrap_or(0)
    }

    /// Every value that it reads: its operands, and what its subgraphs take from around them.
    pub(crate) fn reads(&self) -> Vec<&str> {
        let mut names: BTreeSet<&str> = BTreeSet::new();
        reads(&self.proto, &mut Vec::new(), &mut names);
        names.into_iter().collect()
    }
}

/// Adds what `node` reads and no graph of `inner` defines.
fn reads<'a>(
    node: &'a NodeProto,
    inner: &mut Vec<BTreeSet<&'a str>>,
    names: &mut BTreeSet<&'a str>,
) {
    let known = |inner: &[BTreeSet<&str>], name: &str| {
        name.is_empty() || inner.iter().any(|defined| defined.contains(name))
    };
    for input in &node.input {
        if !known(inner, input) {
            names.insert(input);
        }
    }
    for graph in node.attribute.iter().filter_map(|attribute| attribute.g.as_ref()) {
        let initializers = graph.initializer.iter().map(|tensor| tensor.name.as_str());
        let inputs = graph.input.iter().map(|input| input.name.as_str());
        let results = graph.node.iter().flat_map(|node| node.output.iter().map(String::as_str));
        inner.push(initializers.chain(inputs).chain(results).collect());
        for node in &graph.node {
            reads(node, inner, names);
        }
        for output in &graph.output {
            if !known(inner, &output.name) {
                names.insert(&output.name);
            }
        }
        inner.pop();
    }
}

/// The value of an initializer as it is stored.
#[derive(Clone)]
pub(crate) enum Weight {
    Dense(Box<TensorProto>),
    Sparse(Box<SparseTensorProto>),
}

impl Weight {
    /// Whether it has no axis.
    pub(crate) fn is_scalar(&self) -> bool {
        match self {
            Weight::Dense(proto) => proto.dims.is_empty(),
            Weight::Sparse(proto) => proto.dims.is_empty(),
        }
    }
}

/// A graph, or a subgraph of a node.
pub(crate) struct Body {
    pub(crate) name: String,
    pub(crate) nodes: Vec<BodyNode>,
    /// Initializers by name, and constants that hold weights.
    pub(crate) weights: Vec<(String, Weight)>,
    pub(crate) inputs: Vec<ValueInfoProto>,
    pub(crate) outputs: Vec<ValueInfoProto>,
}

impl Body {
    /// Takes a graph apart. Names of its nodes begin with `prefix`.
    pub(crate) fn new(
        graph: GraphProto,
        prefix: &str,
        opsets: &Rc<Opsets>,
        functions: &mut Functions,
    ) -> Result<Body, Vec<Problem>> {
        let mut weights: Vec<(String, Weight)> = graph
            .initializer
            .into_iter()
            .map(|tensor| (tensor.name.clone(), Weight::Dense(Box::new(tensor))))
            .collect();
        weights.extend(graph.sparse_initializer.into_iter().map(|tensor| {
            let name =
                tensor.values.as_ref().map_or_else(String::new, |tensor| tensor.name.clone());
            (name, Weight::Sparse(Box::new(tensor)))
        }));
        let mut nodes = functions.expand(graph.node, prefix, opsets)?;
        nodes.retain_mut(|node| match take_weight(&mut node.proto) {
            Some(tensor) => {
                weights.push((node.proto.output[0].clone(), Weight::Dense(Box::new(tensor))));
                false
            }
            None => true,
        });
        Ok(Body { name: graph.name, nodes, weights, inputs: graph.input, outputs: graph.output })
    }
}

/// Whether a node is a weight that an exporter wrote as a constant: a tensor of floats with an axis and more than one
/// element. One number is a number, as in `x * 0.5`.
pub(crate) fn is_weight(node: &NodeProto) -> bool {
    let [attribute] = &node.attribute[..] else { return false };
    let floats = [DataType::FLOAT, DataType::FLOAT16, DataType::DOUBLE, DataType::BFLOAT16];
    node.op_type == "Constant"
        && plain_domain(&node.domain).is_empty()
        && node.output.len() == 1
        && attribute.name == "value"
        && attribute.t.as_ref().is_some_and(|tensor| {
            floats.iter().any(|&float| tensor.data_type == float as i32)
                && !tensor.dims.is_empty()
                && tensor.dims.iter().any(|&dim| dim != 1)
        })
}

fn take_weight(node: &mut NodeProto) -> Option<TensorProto> {
    if !is_weight(node) {
        return None;
    }
    node.attribute.first_mut()?.t.take()
}
