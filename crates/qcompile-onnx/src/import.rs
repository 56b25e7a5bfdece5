//! The walk over a model: inputs, initializers, nodes, outputs.

use crate::bind::{bind, check_names};
use crate::body::{Body, BodyNode, Opsets, Weight};
use crate::dims::{Resolved, declared_element_type, resolve};
use crate::draft::{Draft, ValueId};
use crate::dynamic::dequantize_products;
use crate::error::{ImportError, Need, Obstacle, Problem, UnsupportedNode};
use crate::function::{Functions, plain_domain};
use crate::node::{Attributes, OnnxNode};
use crate::order::order;
use crate::pattern::{dequantized_only, trainable};
use crate::scan::scan;
use crate::survey::{Outcome, Verdict};
use crate::{Import, ImportOptions, Port, ops, tensor};
use onnx_protobuf::{Message, ModelProto, NodeProto, ValueInfoProto};
use qcompile_ir::Op;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;

/// Imports the bytes of an ONNX file.
///
/// # Errors
/// See [`ImportError`]: everything unsupported and everything contradictory is reported at once.
pub fn import(bytes: &[u8], options: &ImportOptions) -> Result<Import, ImportError> {
    let (model, opsets) = read(bytes, options)?;
    let mut functions = Functions::new(model.functions, options.limits.nodes)
        .map_err(|problem| ImportError::InvalidModel(vec![problem]))?;
    let graph = model.graph.into_option().ok_or_else(no_graph)?;
    let mut body =
        Body::new(graph, "", &opsets, &mut functions).map_err(ImportError::InvalidModel)?;
    dequantize_products(&mut body);
    if body.outputs.is_empty() {
        let reason = "the model has no outputs".to_owned();
        return Err(ImportError::InvalidModel(vec![Problem { place: None, reason }]));
    }
    let order = order(&body, &|_| false).map_err(ImportError::InvalidModel)?;
    let mut importer = Importer::new(&body, functions, options)?;
    let inputs = importer.begin(&body)?;
    let Body { name, mut nodes, weights, outputs, .. } = body;
    importer.scopes.push(Scope::new(weights));
    for index in order {
        importer.add_node(take_node(&mut nodes[index]));
    }
    importer.finish(&name, inputs, &outputs)
}

/// The model, and the operator sets that it imports.
pub(crate) fn read(
    bytes: &[u8],
    options: &ImportOptions,
) -> Result<(ModelProto, Rc<Opsets>), ImportError> {
    scan(bytes, &options.limits)?;
    let model = ModelProto::parse_from_bytes(bytes)
        .map_err(|error| ImportError::Malformed { offset: None, reason: error.to_string() })?;
    let opsets = model.opset_import.iter();
    let opsets =
        opsets.map(|opset| (plain_domain(&opset.domain).to_owned(), opset.version)).collect();
    Ok((model, Rc::new(opsets)))
}

pub(crate) fn no_graph() -> ImportError {
    ImportError::Malformed { offset: None, reason: "there is no graph in it".to_owned() }
}

pub(crate) fn take_node(node: &mut BodyNode) -> BodyNode {
    let (proto, name) = (std::mem::take(&mut node.proto), std::mem::take(&mut node.name));
    BodyNode { proto, name, opsets: Rc::clone(&node.opsets) }
}

/// The names that a graph defines, and the values that they have so far.
pub(crate) struct Scope {
    /// ONNX values so far. What could not be imported is missing.
    pub(crate) values: BTreeMap<String, ValueId>,
    /// Initializers that nothing has used yet.
    weights: BTreeMap<String, Weight>,
}

impl Scope {
    pub(crate) fn new(weights: Vec<(String, Weight)>) -> Scope {
        Scope { values: BTreeMap::new(), weights: weights.into_iter().collect() }
    }
}

/// An input of the model, as it is imported.
pub(crate) struct Inputs {
    pub(crate) ports: Vec<Port>,
    pub(crate) ids: Vec<ValueId>,
}

pub(crate) struct Importer<'a> {
    pub(crate) draft: Draft,
    pub(crate) options: &'a ImportOptions<'a>,
    pub(crate) functions: Functions,
    trainable: BTreeSet<String>,
    /// Initializers that are only dequantized.
    codes: BTreeSet<String>,
    /// Graphs around the node that is imported, the outermost first.
    pub(crate) scopes: Vec<Scope>,
    /// What the names of values begin with: which iteration of which loop it is.
    pub(crate) prefix: String,
    /// Nodes so far, as often as they were imported.
    pub(crate) imported: usize,
    /// Initializers that are taken as numbers and not trained.
    scalars: Vec<String>,
    /// What `--dim` calls the dimensions that stand for the batch.
    batch: Vec<String>,
    unsupported: Vec<UnsupportedNode>,
    problems: Vec<Problem>,
    /// What became of each node, if that is asked for.
    pub(crate) survey: Option<Vec<Outcome>>,
}

impl<'a> Importer<'a> {
    pub(crate) fn new(
        body: &Body,
        functions: Functions,
        options: &'a ImportOptions<'a>,
    ) -> Result<Importer<'a>, ImportError> {
        let mut draft = Draft::new();
        draft.learns_scales = !options.train.is_empty();
        Ok(Importer {
            draft,
            codes: dequantized_only(body),
            options,
            functions,
            trainable: trainable(body, &options.train, &options.freeze)?,
            scopes: vec![Scope::new(Vec::new())],
            prefix: String::new(),
            imported: 0,
            scalars: Vec::new(),
            batch: Vec::new(),
            unsupported: Vec::new(),
            problems: Vec::new(),
            survey: None,
        })
    }

    /// Imports the inputs of the model.
    pub(crate) fn begin(&mut self, body: &Body) -> Result<Inputs, ImportError> {
        let options = self.options;
        let weights: BTreeSet<&str> = body.weights.iter().map(|(name, _)| name.as_str()).collect();
        let inputs: Vec<&ValueInfoProto> =
            body.inputs.iter().filter(|input| !weights.contains(input.name.as_str())).collect();
        check_names(&inputs, &options.values)?;
        let (known, inputs): (Vec<_>, Vec<_>) =
            inputs.into_iter().partition(|input| options.values.contains_key(&input.name));
        let Resolved { ports, batch } =
            resolve(&inputs, &options.dims, &options.shapes, &mut self.draft)?;
        self.batch = batch;
        let ids = self.add_inputs(&ports)?;
        self.add_known_inputs(&known)?;
        Ok(Inputs { ports, ids })
    }

    fn add_inputs(&mut self, inputs: &[Port]) -> Result<Vec<ValueId>, ImportError> {
        let mut ids = Vec::with_capacity(inputs.len());
        for port in inputs {
            match self.draft.emit(Op::Input(port.ty.clone()), &[]) {
                Ok(id) => {
                    self.draft.set_name(id, &port.name);
                    self.define(&port.name, id);
                    ids.push(id);
                }
                Err(obstacle) => self.report_value("input", &port.name, obstacle),
            }
        }
        if ids.len() == inputs.len() { Ok(ids) } else { Err(self.error()) }
    }

    /// The inputs whose values were given.
    fn add_known_inputs(&mut self, inputs: &[&ValueInfoProto]) -> Result<(), ImportError> {
        for &input in inputs {
            let value = bind(input, &self.options.values[&input.name]);
            match value.and_then(|value| ops::add_tensor(&mut self.draft, Arc::new(value))) {
                Ok(id) => {
                    self.define(&input.name, id);
                }
                Err(obstacle) => self.report_value("input", &input.name, obstacle),
            }
        }
        let good = self.unsupported.is_empty() && self.problems.is_empty();
        if good { Ok(()) } else { Err(self.error()) }
    }

    /// Says what a name of the innermost graph stands for.
    fn define(&mut self, name: &str, id: ValueId) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.values.insert(name.to_owned(), id);
        }
    }

    /// Whether a name is defined around a subgraph, imported or not.
    pub(crate) fn knows(&self, name: &str) -> bool {
        self.scopes
            .iter()
            .any(|scope| scope.values.contains_key(name) || scope.weights.contains_key(name))
    }

    /// A value by its ONNX name, from the innermost graph that has it. An initializer becomes a value when it is
    /// first used.
    pub(crate) fn value(&mut self, name: &str) -> Option<ValueId> {
        for at in (0..self.scopes.len()).rev() {
            if let Some(&id) = self.scopes[at].values.get(name) {
                return Some(id);
            }
            let Some(weight) = self.scopes[at].weights.remove(name) else {
                continue;
            };
            return match self.add_weight(name, weight) {
                Ok(id) => {
                    self.draft.set_name(id, name);
                    self.scopes[at].values.insert(name.to_owned(), id);
                    Some(id)
                }
                Err(obstacle) => {
                    self.report_value("initializer", name, obstacle);
                    None
                }
            };
        }
        None
    }

    fn add_weight(&mut self, name: &str, weight: Weight) -> Result<ValueId, Obstacle> {
        let tensor = match weight {
            Weight::Dense(proto) => {
                self.draft.note_type(proto.data_type);
                tensor::decode(*proto, self.options.external)?
            }
            Weight::Sparse(proto) => {
                self.draft.note_type(proto.values.data_type);
                tensor::decode_sparse(*proto, self.options.external)?
            }
        };
        let tensor = Arc::new(tensor);
        let trained = self.trainable.contains(name);
        if !tensor.dtype().is_float() || tensor.dtype().is_float8() {
            let id = ops::add_tensor(&mut self.draft, tensor)?;
            if trained && self.codes.contains(name) {
                self.draft.trained_codes.insert(id, name.into());
            }
            return Ok(id);
        }
        if tensor.shape().is_empty() && !trained && self.options.train.is_empty() {
            self.scalars.push(name.to_owned());
        }
        self.draft.emit(if trained { Op::Param(tensor) } else { Op::Const(tensor) }, &[])
    }

    /// Imports one node, or notes why it cannot be; false if nothing uses its results then.
    pub(crate) fn add_node(&mut self, node: BodyNode) -> bool {
        let (opset, name) = (node.opset(), node.name.clone());
        let mut proto = node.proto;
        let domain = plain_domain(&proto.domain).to_owned();
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
        let operands: Vec<ValueId> = inputs.iter().copied().flatten().collect();
        if poisoned {
            // Without operands an operator says no more than whether it is supported at all.
            inputs.clear();
        }
        let base = proto.output.iter().find(|output| !output.is_empty()).cloned();
        let base = format!("{}{}", self.prefix, base.unwrap_or_else(|| name.clone()));
        self.draft.begin(&base, &name);
        self.imported += 1;
        let result = if self.imported > self.options.limits.nodes {
            let limit = self.options.limits.nodes;
            Err(Obstacle::unsupported(format!("unrolled, the model has more than {limit} nodes")))
        } else {
            self.convert(&mut proto, inputs, (&domain, opset), (&base, &name), &node.opsets)
        };
        let op = proto.op_type.clone();
        let needs = result.as_ref().err().map_or_else(Vec::new, |obstacle| self.needs(obstacle));
        if let Some(outcomes) = &mut self.survey {
            let results = result.as_ref().map_or_else(|_| Vec::new(), Clone::clone);
            let verdict = Verdict::of(&result, poisoned, &needs);
            let (name, op, domain) = (name.clone(), op.clone(), domain.clone());
            outcomes.push(Outcome { name, op, domain, opset, verdict, operands, results });
        }
        match result {
            Ok(_) => return true,
            Err(Obstacle::Invalid(_)) if poisoned => {}
            Err(obstacle) => {
                let dot = if domain.is_empty() { "" } else { "." };
                let place = format!("{name} ({domain}{dot}{op}, opset {opset})");
                self.report_obstacle(obstacle, needs, place, [name, op, domain], opset);
            }
        }
        false
    }

    /// Notes an obstacle: as a problem of `place`, or as a node (its name, operator and domain) that is not supported.
    fn report_obstacle(
        &mut self,
        obstacle: Obstacle,
        needs: Vec<Need>,
        place: String,
        [node, op, domain]: [String; 3],
        opset: i64,
    ) {
        match obstacle {
            Obstacle::Operand => {}
            Obstacle::Invalid(reason) => {
                self.problems.push(Problem { place: Some(place), reason });
            }
            Obstacle::Unsupported(reason)
            | Obstacle::Batch(reason)
            | Obstacle::Unknown(reason, _) => {
                self.unsupported.push(UnsupportedNode { node, op, domain, opset, reason, needs });
            }
        }
    }

    /// What could get an obstacle out of the way.
    fn needs(&self, obstacle: &Obstacle) -> Vec<Need> {
        match obstacle {
            Obstacle::Batch(_) => self.batch.iter().cloned().map(Need::Size).collect(),
            Obstacle::Unknown(_, inputs) => inputs.iter().cloned().map(Need::Value).collect(),
            _ => Vec::new(),
        }
    }

    /// The results of a node; each has its ONNX name then.
    fn convert(
        &mut self,
        proto: &mut NodeProto,
        inputs: Vec<Option<ValueId>>,
        (domain, opset): (&str, i64),
        (base, name): (&str, &str),
        opsets: &Rc<Opsets>,
    ) -> Result<Vec<ValueId>, Obstacle> {
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
        let control = domain.is_empty() && matches!(node.op, "If" | "Loop" | "Scan");
        let mut results = if control {
            if poisoned {
                return Err(Obstacle::Operand);
            }
            self.control_flow(&mut node, name, opsets)?
        } else {
            ops::convert(&mut self.draft, &mut node, domain)?
        };
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
            self.draft.set_name(id, &format!("{}{output}", self.prefix));
            self.define(output, id);
        }
        results.truncate(node.outputs.len());
        if let (Some(&result), false) = (results.first(), control) {
            self.draft.set_origin(first, result);
        }
        Ok(results)
    }

    pub(crate) fn report_value(&mut self, kind: &str, name: &str, obstacle: Obstacle) {
        let node = [name.to_owned(), kind.to_owned(), String::new()];
        let needs = self.needs(&obstacle);
        self.report_obstacle(obstacle, needs, format!("{kind} {name}"), node, 0);
    }

    /// Adds faults of a graph.
    pub(crate) fn report(&mut self, problems: Vec<Problem>) {
        self.problems.extend(problems);
    }

    /// Everything that is to be reported; only called when something is.
    fn error(&mut self) -> ImportError {
        let problems = std::mem::take(&mut self.problems);
        if self.unsupported.is_empty() {
            ImportError::InvalidModel(problems)
        } else {
            ImportError::Unsupported(std::mem::take(&mut self.unsupported), problems)
        }
    }

    fn finish(
        mut self,
        name: &str,
        inputs: Inputs,
        declared_outputs: &[ValueInfoProto],
    ) -> Result<Import, ImportError> {
        let mut output_ids = Vec::with_capacity(declared_outputs.len());
        let mut outputs = Vec::with_capacity(declared_outputs.len());
        for output in declared_outputs {
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
        let mut warnings = self.draft.take_warnings();
        if let Some(first) = self.scalars.first() {
            let others = match self.scalars.len() - 1 {
                0 => String::new(),
                count => format!(" and {count} more"),
            };
            warnings.push(format!(
                "initializers without an axis are constants, not trained unless --train names them: {first}{others}"
            ));
        }
        let graph = self.draft.assemble(name, &inputs.ids, &output_ids)?;
        let parameters = graph
            .leaves(|op| matches!(op, Op::Param(_)))
            .into_iter()
            .map(|id| graph.node(id).name.as_str().to_owned())
            .map(|name| (name.clone(), name))
            .collect();
        Ok(Import { graph, inputs: inputs.ports, outputs, parameters, warnings })
    }
}
