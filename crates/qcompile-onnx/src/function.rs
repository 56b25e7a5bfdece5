//! The model's own functions: a call is replaced by the function's nodes.

use crate::body::{BodyNode, Opsets};
use crate::error::Problem;
use onnx_protobuf::{AttributeProto, FunctionProto, GraphProto, Message, NodeProto};
use std::collections::BTreeMap;
use std::rc::Rc;

/// Bytes of nodes that all calls together may be replaced by.
const BYTES: u64 = 256 << 20;
/// Calls within calls.
const DEPTH: usize = 64;

/// ONNX's own operators have two names for their domain.
pub(crate) fn plain_domain(domain: &str) -> &str {
    if domain == "ai.onnx" { "" } else { domain }
}

/// How node `index` of a graph is called in reports and notes: its name, or `Op_index`.
pub(crate) fn node_name(node: &NodeProto, index: usize) -> String {
    if node.name.is_empty() { format!("{}_{index}", node.op_type) } else { node.name.clone() }
}

/// Domain, name and overload.
type Key = (String, String, String);

fn key(domain: &str, name: &str, overload: &str) -> Key {
    (plain_domain(domain).to_owned(), name.to_owned(), overload.to_owned())
}

/// The functions of a model, and how much more their calls may be replaced by.
pub(crate) struct Functions {
    by_key: BTreeMap<Key, Rc<FunctionProto>>,
    nodes: usize,
    bytes: u64,
}

impl Functions {
    /// At most `nodes` nodes come from calls.
    pub(crate) fn new(functions: Vec<FunctionProto>, nodes: usize) -> Result<Functions, Problem> {
        let mut by_key = BTreeMap::new();
        for function in functions {
            let key = key(&function.domain, &function.name, &function.overload);
            let place = Some(format!("function {}", function.name));
            if by_key.insert(key, Rc::new(function)).is_some() {
                return Err(Problem { place, reason: "is defined twice".to_owned() });
            }
        }
        Ok(Functions { by_key, nodes, bytes: BYTES })
    }

    /// The nodes, with calls replaced.
    pub(crate) fn expand(
        &mut self,
        nodes: Vec<NodeProto>,
        prefix: &str,
        opsets: &Rc<Opsets>,
    ) -> Result<Vec<BodyNode>, Vec<Problem>> {
        let mut expanded = Vec::with_capacity(nodes.len());
        self.append(nodes, prefix, opsets, &mut Vec::new(), &mut expanded)
            .map_err(|problem| vec![problem])?;
        Ok(expanded)
    }

    fn append(
        &mut self,
        nodes: Vec<NodeProto>,
        prefix: &str,
        opsets: &Rc<Opsets>,
        calls: &mut Vec<Key>,
        expanded: &mut Vec<BodyNode>,
    ) -> Result<(), Problem> {
        for (index, proto) in nodes.into_iter().enumerate() {
            let name = format!("{prefix}{}", node_name(&proto, index));
            let key = key(&proto.domain, &proto.op_type, &proto.overload);
            let Some(function) = self.by_key.get(&key).cloned() else {
                expanded.push(BodyNode { proto, name, opsets: Rc::clone(opsets) });
                continue;
            };
            let problem = |reason: String| Problem {
                place: Some(format!("{name} ({})", proto.op_type)),
                reason,
            };
            if calls.contains(&key) {
                return Err(problem("the function calls itself".to_owned()));
            }
            if calls.len() == DEPTH {
                return Err(problem(format!("more than {DEPTH} calls within calls")));
            }
            let size: u64 = function.node.iter().map(Message::compute_size).sum();
            self.nodes = self.nodes.saturating_sub(function.node.len());
            self.bytes = self.bytes.saturating_sub(size);
            if self.nodes == 0 || self.bytes == 0 {
                return Err(problem("the model is too large with its functions".to_owned()));
            }
            let inner = call(&function, &proto, &name).map_err(problem)?;
            let imports = &function.opset_import;
            let inner_opsets = imports
                .iter()
                .map(|opset| (plain_domain(&opset.domain).to_owned(), opset.version))
                .collect();
            calls.push(key);
            self.append(inner, &format!("{name}/"), &Rc::new(inner_opsets), calls, expanded)?;
            calls.pop();
        }
        Ok(())
    }
}

/// The nodes of one call, under names of the caller.
fn call(function: &FunctionProto, node: &NodeProto, name: &str) -> Result<Vec<NodeProto>, String> {
    if node.input.len() > function.input.len() || node.output.len() > function.output.len() {
        return Err(format!(
            "{} inputs and {} outputs for a function of {} and {}",
            node.input.len(),
            node.output.len(),
            function.input.len(),
            function.output.len()
        ));
    }
    let mut attributes: BTreeMap<&str, &AttributeProto> =
        function.attribute_proto.iter().map(|attribute| (&attribute.name[..], attribute)).collect();
    for attribute in &node.attribute {
        let known = attributes.contains_key(&attribute.name[..])
            || function.attribute.contains(&attribute.name);
        if !known {
            return Err(format!("the function has no attribute {}", attribute.name));
        }
        attributes.insert(&attribute.name, attribute);
    }
    let mut renaming = Renaming { names: BTreeMap::new(), prefix: name, attributes: &attributes };
    for (at, formal) in function.input.iter().enumerate() {
        let actual = node.input.get(at).cloned().unwrap_or_default();
        renaming.names.insert(formal, actual);
    }
    let mut passed = Vec::new();
    for (formal, actual) in function.output.iter().zip(&node.output) {
        if actual.is_empty() {
            continue;
        }
        match renaming.names.get(&formal[..]) {
            // An input, or a result that has its name already.
            Some(source) => passed.push(NodeProto {
                op_type: "Identity".to_owned(),
                input: vec![source.clone()],
                output: vec![actual.clone()],
                ..Default::default()
            }),
            None => {
                renaming.names.insert(formal, actual.clone());
            }
        }
    }
    let mut nodes = function.node.clone();
    for node in &mut nodes {
        renaming.node(node);
    }
    nodes.extend(passed);
    Ok(nodes)
}

/// What names and attributes mean within a call.
struct Renaming<'a> {
    names: BTreeMap<&'a str, String>,
    prefix: &'a str,
    attributes: &'a BTreeMap<&'a str, &'a AttributeProto>,
}

impl Renaming<'_> {
    fn value(&self, name: &mut String) {
        if name.is_empty() {
            return;
        }
        *name = match self.names.get(&name[..]) {
            Some(actual) => actual.clone(),
            None => format!("{}/{name}", self.prefix),
        };
    }

    fn node(&self, node: &mut NodeProto) {
        for name in node.input.iter_mut().chain(&mut node.output) {
            self.value(name);
        }
        node.attribute.retain_mut(|attribute| {
            if attribute.ref_attr_name.is_empty() {
                for graph in attribute.g.as_mut().into_iter().chain(&mut attribute.graphs) {
                    self.graph(graph);
                }
                return true;
            }
            // An attribute that is not given is left out, so that its default holds.
            let Some(&given) = self.attributes.get(&attribute.ref_attr_name[..]) else {
                return false;
            };
            let name = std::mem::take(&mut attribute.name);
            *attribute = AttributeProto { name, ..given.clone() };
            true
        });
    }

    fn graph(&self, graph: &mut GraphProto) {
        for node in &mut graph.node {
            self.node(node);
        }
        for value in graph.input.iter_mut().chain(&mut graph.output) {
            self.value(&mut value.name);
        }
        for tensor in &mut graph.initializer {
            self.value(&mut tensor.name);
        }
        for tensor in graph.sparse_initializer.iter_mut().filter_map(|t| t.values.as_mut()) {
            self.value(&mut tensor.name);
        }
    }
}
