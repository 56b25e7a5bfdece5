//! The walk over a model: inputs, initializers, nodes, outputs.

use crate::bind::{bind, check_names};
use crate::dims::{declared_element_type, resolve};
use crate::draft::{Draft, ValueId};
use crate::error::{ImportError, Obstacle, Problem, UnsupportedNode};
use crate::node::{Attributes, OnnxNode};
use crate::order::{node_name, order};
use crate::pattern::trainable;
use crate::scan::scan;
use crate::{Import, ImportOptions, Port, ops, tensor};
use onnx_protobuf::{GraphProto, Message, ModelProto, NodeProto, TensorProto, ValueInfoProto};
use qcompile_ir::Op;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Imports the bytes of an ONNX file.
///
/// # Errors
/// See [`ImportError`]: everything unsupported, or else everything contradictory, is reported at once.
pub fn import(bytes: &[u8], options: &ImportOptions) -> Result<Import, ImportError> {
    scan(bytes, &options.limits)?;
    let mut model = ModelProto::parse_from_bytes(bytes)
        .map_err(|error| ImportError::Malformed { offset: None, reason: error.to_string() })?;
    let mut graph = model.graph.take().ok_or_else(|| ImportError::Malformed {
        offset: None,
        reason: "there is no graph in it".to_owned(),
    })?;
    let order = order(&graph).map_err(ImportError::InvalidModel)?;
    let names: Vec<String> = order.iter().map(|&index| node_name(&graph, index)).collect();
    let trainable = trainable_names(&graph, &order, &names, options)?;

    let mut draft = Draft::new();
    let initializers: BTreeSet<&str> =
        graph.initializer.iter().map(|tensor| tensor.name.as_str()).collect();
    let inputs: Vec<&ValueInfoProto> =
        graph.input.iter().filter(|input| !initializers.contains(input.name.as_str())).collect();
    check_names(&inputs, &options.values)?;
    let (known, inputs): (Vec<_>, Vec<_>) =
        inputs.into_iter().partition(|input| options.values.contains_key(&input.name));
    let known: Vec<ValueInfoProto> = known.into_iter().cloned().collect();
    let inputs = resolve(&inputs, &options.dims, &options.shapes, &mut draft.warnings)?;
    let mut opsets = BTreeMap::new();
    for opset in &model.opset_import {
        opsets.insert(plain_domain(&opset.domain).to_owned(), opset.version);
    }
    let mut importer = Importer {
        draft,
        options,
        opsets,
        trainable,
        values: BTreeMap::new(),
        weights: std::mem::take(&mut graph.initializer)
            .into_iter()
            .map(|tensor| (tensor.name.clone(), tensor))
            .collect(),
        unsupported: Vec::new(),
        problems: Vec::new(),
    };
    let input_ids = importer.add_inputs(&inputs)?;
    importer.add_known_inputs(&known)?;
    for (&index, name) in order.iter().zip(&names) {
        importer.add_node(std::mem::take(&mut graph.node[index]), name);
    }
    importer.finish(&graph, inputs, &input_ids)
}

/// ONNX's own operators have two names for their domain.
fn plain_domain(domain: &str) -> &str {
    if domain == "ai.onnx" { "" } else { domain }
}

fn trainable_names(
    graph: &GraphProto,
    order: &[usize],
    names: &[String],
    options: &ImportOptions,
) -> Result<BTreeSet<String>, ImportError> {
    let nodes: Vec<(&NodeProto, String)> =
        order.iter().zip(names).map(|(&index, name)| (&graph.node[index], name.clone())).collect();
    trainable(graph, &nodes, &options.train, &options.freeze)
}

struct Importer<'a> {
    draft: Draft,
    options: &'a ImportOptions<'a>,
    opsets: BTreeMap<String, i64>,
    trainable: BTreeSet<String>,
    /// ONNX values so far. What could not be imported is missing.
    values: BTreeMap<String, ValueId>,
    /// Initializers that nothing has used yet.
    weights: BTreeMap<String, TensorProto>,
    unsupported: Vec<UnsupportedNode>,
    problems: Vec<Problem>,
}

impl Importer<'_> {
    fn add_inputs(&mut self, inputs: &[Port]) -> Result<Vec<ValueId>, ImportError> {
        let mut ids = Vec::with_capacity(inputs.len());
        for port in inputs {
            match self.draft.emit(Op::Input(port.ty.clone()), &[]) {
                Ok(id) => {
                    self.draft.set_name(id, &port.name);
                    self.values.insert(port.name.clone(), id);
                    ids.push(id);
                }
                Err(obstacle) => self.report_value("input", &port.name, obstacle),
            }
        }
        if ids.len() == inputs.len() { Ok(ids) } else { Err(self.error()) }
    }

    /// The inputs whose values were given.
    fn add_known_inputs(&mut self, inputs: &[ValueInfoProto]) -> Result<(), ImportError> {
        for input in inputs {
            let value = bind(input, &self.options.values[&input.name]);
            match value.and_then(|value| ops::add_tensor(&mut self.draft, Arc::new(value))) {
                Ok(id) => {
                    self.values.insert(input.name.clone(), id);
                }
                Err(obstacle) => self.report_value("input", &input.name, obstacle),
            }
        }
        let good = self.unsupported.is_empty() && self.problems.is_empty();
        if good { Ok(()) } else { Err(self.error()) }
    }

    /// A value by its ONNX name. An initializer becomes a value when it is first used.
    fn value(&mut self, name: &str) -> Option<ValueId> {
        if let Some(&id) = self.values.get(name) {
            return Some(id);
        }
        let proto = self.weights.remove(name)?;
        match self.add_weight(name, proto) {
            Ok(id) => {
                self.draft.set_name(id, name);
                self.values.insert(name.to_owned(), id);
                Some(id)
            }
            Err(obstacle) => {
                self.report_value("initializer", name, obstacle);
                None
            }
        }
    }

    fn add_weight(&mut self, name: &str, proto: TensorProto) -> Result<ValueId, Obstacle> {
        if tensor::is_narrowed(proto.data_type) {
            self.draft.warnings.push(format!("initializer {name}: float64 is kept as float32"));
        }
        let tensor = Arc::new(tensor::decode(proto, self.options.external)?);
        if !tensor.dtype().is_float() {
            return ops::add_tensor(&mut self.draft, tensor);
        }
        let trained = self.trainable.contains(name);
        self.draft.emit(if trained { Op::Param(tensor) } else { Op::Const(tensor) }, &[])
    }

    fn add_node(&mut self, mut proto: NodeProto, name: &str) {
        let domain = plain_domain(&proto.domain).to_owned();
        let opset = self.opsets.get(&domain).copied().unwrap_or(0);
        let mut inputs = Vec::with_capacity(proto.input.len());
        let mut poisoned = false;
        for input in &proto.input {
            if input.is_empty() {
                inputs.push(None);
                continue;
            }
            let value = self.value(input);
            poisoned |= value.is_none();
            inputs.push(value);
        }
        if poisoned {
            // Without operands an operator says no more than whether it is supported at all.
            inputs.clear();
        }
        let base = proto.output.iter().find(|output| !output.is_empty()).cloned();
        let base = base.unwrap_or_else(|| name.to_owned());
        self.draft.begin(&base, name);
        let result = self.convert(&mut proto, inputs, &domain, opset, &base);
        match result {
            Ok(()) => {}
            Err(Obstacle::Invalid(_)) if poisoned => {}
            Err(Obstacle::Operand) => {}
            Err(Obstacle::Unsupported(reason)) => self.unsupported.push(UnsupportedNode {
                node: name.to_owned(),
                op: proto.op_type,
                domain,
                opset,
                reason,
                needs: Vec::new(),
            }),
            Err(Obstacle::Unknown(reason, needs)) => self.unsupported.push(UnsupportedNode {
                node: name.to_owned(),
                op: proto.op_type,
                domain,
                opset,
                reason,
                needs,
            }),
            Err(Obstacle::Invalid(reason)) => {
                let place = Some(format!("{name} ({}, opset {opset})", proto.op_type));
                self.problems.push(Problem { place, reason });
            }
        }
    }

    fn convert(
        &mut self,
        proto: &mut NodeProto,
        inputs: Vec<Option<ValueId>>,
        domain: &str,
        opset: i64,
        base: &str,
    ) -> Result<(), Obstacle> {
        let poisoned = inputs.is_empty() && !proto.input.is_empty();
        let attributes = Attributes::new(std::mem::take(&mut proto.attribute))?;
        let mut node = OnnxNode {
            op: &proto.op_type,
            opset,
            inputs,
            outputs: proto.output.clone(),
            attributes,
            base,
            external: self.options.external,
            batch_norm: self.options.batch_norm,
        };
        let first = self.draft.len();
        let results = ops::convert(&mut self.draft, &mut node, domain)?;
        let unread = node.attributes.unread();
        if !unread.is_empty() {
            return Err(Obstacle::unsupported(format!("attribute {}", unread.join(", "))));
        }
        if poisoned {
            return Err(Obstacle::Operand);
        }
        for (at, output) in node.outputs.iter().enumerate().filter(|(_, output)| !output.is_empty())
        {
            let id = *results
                .get(at)
                .ok_or_else(|| Obstacle::unsupported(format!("result {at} ({output})")))?;
            self.draft.set_name(id, output);
            self.values.insert(output.clone(), id);
        }
        if let Some(&result) = results.first() {
            self.draft.set_origin(first, result);
        }
        Ok(())
    }

    fn report_value(&mut self, kind: &str, name: &str, obstacle: Obstacle) {
        match obstacle {
            Obstacle::Unsupported(reason) | Obstacle::Unknown(reason, _) => {
                self.unsupported.push(UnsupportedNode {
                    node: name.to_owned(),
                    op: kind.to_owned(),
                    domain: String::new(),
                    opset: 0,
                    reason,
                    needs: Vec::new(),
                });
            }
            Obstacle::Invalid(reason) => {
                self.problems.push(Problem { place: Some(format!("{kind} {name}")), reason });
            }
            Obstacle::Operand => {}
        }
    }

    /// What is to be reported; only called when something is.
    fn error(&mut self) -> ImportError {
        if self.unsupported.is_empty() {
            ImportError::InvalidModel(std::mem::take(&mut self.problems))
        } else {
            ImportError::Unsupported(std::mem::take(&mut self.unsupported))
        }
    }

    fn finish(
        mut self,
        graph: &GraphProto,
        inputs: Vec<Port>,
        input_ids: &[ValueId],
    ) -> Result<Import, ImportError> {
        let mut output_ids = Vec::with_capacity(graph.output.len());
        let mut outputs = Vec::with_capacity(graph.output.len());
        for output in &graph.output {
            let Some(id) = self.value(&output.name) else {
                continue;
            };
            // A result is wanted whether the step updates or not.
            let id = match self.draft.in_forward(id) {
                Ok(id) => id,
                Err(obstacle) => {
                    self.report_value("output", &output.name, obstacle);
                    continue;
                }
            };
            let ty = self.draft.ty(id).clone();
            let declared = declared_element_type(output);
            // The declared type says more where the graph's is narrower, and nothing where it contradicts.
            let agrees = tensor::dtype(declared).is_ok_and(|dtype| dtype == ty.dtype);
            let onnx_dtype =
                if agrees { tensor::dtype_name(declared) } else { tensor::onnx_name(ty.dtype) };
            if declared != 0 && !agrees {
                self.draft.warnings.push(format!(
                    "output {}: declared as {}, but computed as {onnx_dtype}",
                    output.name,
                    tensor::dtype_name(declared)
                ));
            }
            outputs.push(Port { name: output.name.clone(), ty, onnx_dtype });
            output_ids.push((output.name.clone(), id));
        }
        if !self.unsupported.is_empty() || !self.problems.is_empty() {
            return Err(self.error());
        }
        let mut warnings = std::mem::take(&mut self.draft.warnings);
        warnings.dedup();
        let graph = self.draft.assemble(&graph.name, input_ids, &output_ids)?;
        let parameters = graph
            .leaves(|op| matches!(op, Op::Param(_)))
            .into_iter()
            .map(|id| graph.node(id).name.as_str().to_owned())
            .map(|name| (name.clone(), name))
            .collect();
        Ok(Import { graph, inputs, outputs, parameters, warnings })
    }
}
