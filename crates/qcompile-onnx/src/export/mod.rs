//! [`Graph`] to `model.onnx`: the way out.
//!
//! Every value of the graph is seen through a tensor of the ONNX model (`view`): which of its axes the tensor has, and in
//! which order. So transposes, broadcasts and axes of size 1 cost nothing until something needs the elements in another
//! order, and a graph that computes images channels-last comes out as the chain of NCHW convolutions that it was.
//! `convert` has one arm for each op; `patterns` finds what ONNX has one operator for.

mod convert;
mod elementwise;
mod moves;
mod patterns;
mod products;
mod recurrent;
mod view;
mod writer;

use crate::Port;
use crate::tensor::{dtype, dtype_name, number_of, onnx_number};
use onnx_protobuf::Message;
use patterns::Pattern;
use qcompile_ir::{DType, Dim, Graph, NodeId, Op, Tensor, TensorType};
use std::collections::BTreeMap;
use std::sync::Arc;
use thiserror::Error;
use view::{Placed, View};
use writer::{Attribute, PortType, Writer};

/// The opsets that can be written.
pub const EXPORT_OPSETS: std::ops::RangeInclusive<u32> = 13..=23;

/// Most bytes that a protobuf message can have.
const LARGEST: u64 = (1 << 31) - 1;

/// How a graph becomes a model.
#[derive(Clone, Debug)]
pub struct ExportOptions<'a> {
    /// The opset of the model, one of [`EXPORT_OPSETS`].
    pub opset: u32,
    /// The model's inputs in order.
    pub inputs: &'a [Port],
    /// The model's outputs in order.
    pub outputs: &'a [Port],
    /// The version of the program that writes it.
    pub producer_version: &'a str,
}

/// A written model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// The file.
    pub bytes: Vec<u8>,
    /// Number of nodes of each ONNX operator.
    pub operators: BTreeMap<String, usize>,
}

/// Why a graph cannot become a model.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ExportError {
    /// There is no such opset, or it cannot be written.
    #[error("opset {opset} cannot be written: {} to {} can", EXPORT_OPSETS.start(), EXPORT_OPSETS.end())]
    OpsetRange {
        /// What was asked for.
        opset: u32,
    },
    /// A newer opset can express it.
    #[error(
        "value {value} ({op}) needs {what}, which ONNX has from opset {needs} on; asked for is {opset}"
    )]
    Opset {
        /// The value.
        value: String,
        /// Its op.
        op: &'static str,
        /// What it needs.
        what: String,
        /// The first opset with it.
        needs: u32,
        /// What was asked for.
        opset: u32,
    },
    /// ONNX has no operators for it.
    #[error("value {value} ({op}) has no form in ONNX: {reason}")]
    Unsupported {
        /// The value.
        value: String,
        /// Its op.
        op: &'static str,
        /// Why.
        reason: String,
    },
    /// An input or output is not in the graph.
    #[error("the graph has no {kind} {name}")]
    NoPort {
        /// `input` or `output`.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// A file of ONNX cannot hold so much.
    #[error("the model would have {bytes} bytes, and a file of ONNX holds {LARGEST}")]
    TooLarge {
        /// Its size.
        bytes: u64,
    },
}

type Result<T> = std::result::Result<T, ExportError>;

/// The forward graph as an ONNX model whose outputs are `options.outputs`. Equal graphs give equal bytes.
///
/// # Errors
/// See [`ExportError`]: the first value that ONNX, or this opset of it, cannot express.
pub fn export(graph: &Graph, options: &ExportOptions) -> Result<Export> {
    if !EXPORT_OPSETS.contains(&options.opset) {
        return Err(ExportError::OpsetRange { opset: options.opset });
    }
    let weights: u64 = graph.ids().filter_map(|id| leaf_bytes(graph.op(id))).sum();
    if weights > LARGEST {
        return Err(ExportError::TooLarge { bytes: weights });
    }
    let mut exporter = Exporter {
        graph,
        opset: options.opset,
        writer: Writer::default(),
        views: BTreeMap::new(),
        arranged: BTreeMap::new(),
        reshaped: BTreeMap::new(),
        sliced: BTreeMap::new(),
        dequantized: BTreeMap::new(),
        constants: BTreeMap::new(),
        batch: None,
        recurrences: BTreeMap::new(),
        masks: BTreeMap::new(),
    };
    let outputs = exporter.outputs(options.outputs)?;
    exporter.inputs(options.inputs)?;
    exporter.run(&outputs)?;
    exporter.finish_outputs(&outputs)?;
    let model = exporter.writer.finish(graph.name(), options.opset, options.producer_version);
    let bytes = model.compute_size();
    if bytes > LARGEST {
        return Err(ExportError::TooLarge { bytes });
    }
    let mut operators = BTreeMap::new();
    for node in &model.graph.node {
        *operators.entry(node.op_type.clone()).or_insert(0) += 1;
    }
    let bytes = model.write_to_bytes().map_err(|_| ExportError::TooLarge { bytes })?;
    Ok(Export { bytes, operators })
}

fn leaf_bytes(op: &Op) -> Option<u64> {
    match op {
        Op::Param(tensor) | Op::State(tensor) | Op::Const(tensor) => {
            Some(tensor.bytes().len() as u64)
        }
        _ => None,
    }
}

/// An output of the model.
struct Output<'a> {
    port: &'a Port,
    id: NodeId,
}

/// The graph on its way out.
struct Exporter<'a> {
    graph: &'a Graph,
    opset: u32,
    writer: Writer,
    /// What the values so far are seen through.
    views: BTreeMap<NodeId, View>,
    /// Tensors made from others by moving elements, by what they were made from and how.
    arranged: BTreeMap<(String, view::Arrangement), Placed>,
    /// What a result of `Reshape` was made from.
    reshaped: BTreeMap<String, Placed>,
    /// What a result of `Slice` was made from: the tensor, and the part along each axis.
    sliced: BTreeMap<String, (String, Vec<moves::Part>)>,
    /// What a result of `DequantizeLinear` was made from, by which scale and zero point.
    dequantized: BTreeMap<String, (Placed, [String; 2])>,
    /// Constants of the graph by their names.
    constants: BTreeMap<String, Arc<Tensor>>,
    /// The tensor `[1]` of int64 that holds the batch size.
    batch: Option<String>,
    recurrences: BTreeMap<NodeId, recurrent::States>,
    /// Masks of causal attention by their sizes.
    masks: BTreeMap<(usize, usize, DType), String>,
}

impl<'a> Exporter<'a> {
    /// Finds the outputs, declares them and keeps their names for them.
    fn outputs(&mut self, ports: &'a [Port]) -> Result<Vec<Output<'a>>> {
        let mut outputs = Vec::with_capacity(ports.len());
        for port in ports {
            let found = self.graph.outputs().iter().find(|(name, _)| *name == port.name);
            let Some((_, id)) = found else {
                return Err(ExportError::NoPort { kind: "output", name: port.name.clone() });
            };
            self.writer.claim(&port.name);
            let ty = self.graph.ty(*id);
            let elements = elements(port, ty);
            self.writer.output(&PortType { name: &port.name, elements, dims: &ty.shape.0 });
            outputs.push(Output { port, id: *id });
        }
        Ok(outputs)
    }

    /// Declares the inputs. Those that nothing depends on may be missing in the graph.
    fn inputs(&mut self, ports: &[Port]) -> Result<()> {
        for port in ports {
            let id = self.graph.find(&port.name);
            let id = id.filter(|&id| matches!(self.graph.op(id), Op::Input(_)));
            let ty = id.map_or(&port.ty, |id| self.graph.ty(id));
            let elements = elements(port, ty);
            self.writer.input(&PortType { name: &port.name, elements, dims: &ty.shape.0 });
            // An output may be an input itself; then the name is taken, by the same value.
            self.writer.claim_input(&port.name);
            let Some(id) = id else { continue };
            let mut name = port.name.clone();
            let own = onnx_number(ty.dtype);
            if elements != own {
                let wanted = format!("{}.{}", port.name, dtype_name(own));
                let to = vec![("to", Attribute::Int(i64::from(own)))];
                name = self.one("Cast", vec![name], &wanted, to);
            }
            self.place_leaf(id, name);
        }
        Ok(())
    }

    /// Writes every value that an output depends on.
    fn run(&mut self, outputs: &[Output]) -> Result<()> {
        let patterns: BTreeMap<NodeId, Pattern> = self
            .graph
            .ids()
            .filter_map(|id| Some((id, patterns::find(self.graph, id, self.opset)?)))
            .collect();
        let mut live = vec![false; self.graph.len()];
        let mut stack: Vec<NodeId> = outputs.iter().map(|output| output.id).collect();
        while let Some(id) = stack.pop() {
            if !std::mem::replace(&mut live[id.index()], true) {
                match patterns.get(&id) {
                    Some(pattern) => stack.extend(pattern.operands()),
                    None => stack.extend(self.graph.operands(id)),
                }
            }
        }
        for id in self.graph.order().into_iter().filter(|id| live[id.index()]) {
            match patterns.get(&id) {
                Some(pattern) => {
                    self.check_seen(&pattern.operands())?;
                    self.write_pattern(id, pattern)?;
                }
                None => {
                    if !matches!(self.graph.op(id), Op::Slice { .. }) {
                        self.check_seen(&self.graph.operands(id))?;
                    }
                    self.convert(id)?;
                }
            }
        }
        self.check_seen(&outputs.iter().map(|output| output.id).collect::<Vec<_>>())
    }

    /// Refuses values that no tensor shows: parts of recurrences that ONNX does not give.
    fn check_seen(&self, operands: &[NodeId]) -> Result<()> {
        match operands.iter().find(|operand| !self.views.contains_key(operand)) {
            None => Ok(()),
            Some(&id) => self.unsupported(id, "ONNX gives h after each step and c after the last"),
        }
    }

    /// Gives the outputs their names.
    fn finish_outputs(&mut self, outputs: &[Output]) -> Result<()> {
        // Every node must be there before a name changes.
        let mut values = Vec::with_capacity(outputs.len());
        for Output { port, id } in outputs {
            let mut value = self.natural(*id)?.name;
            let ty = self.graph.ty(*id);
            let declared = elements(port, ty);
            if declared != onnx_number(ty.dtype) {
                let wanted = format!("{}.{}", port.name, dtype_name(declared));
                let to = vec![("to", Attribute::Int(i64::from(declared)))];
                value = self.one("Cast", vec![value], &wanted, to);
            }
            values.push(value);
        }
        let mut renamed: BTreeMap<String, String> = BTreeMap::new();
        for (Output { port, .. }, value) in outputs.iter().zip(values) {
            if value == port.name {
                continue;
            }
            if let Some(name) = renamed.get(&value) {
                self.writer.identity(name.clone(), &port.name);
            } else if self.writer.rename(&value, &port.name) {
                renamed.insert(value, port.name.clone());
            } else {
                self.writer.identity(value, &port.name);
            }
        }
        Ok(())
    }

    fn name(&self, id: NodeId) -> &'a str {
        self.graph.node(id).name.as_str()
    }

    fn dims(&self, id: NodeId) -> &'a [Dim] {
        &self.graph.ty(id).shape.0
    }

    fn dtype(&self, id: NodeId) -> DType {
        self.graph.ty(id).dtype
    }

    fn unsupported<T>(&self, id: NodeId, reason: impl Into<String>) -> Result<T> {
        Err(ExportError::Unsupported {
            value: self.name(id).to_owned(),
            op: self.graph.op(id).name(),
            reason: reason.into(),
        })
    }

    /// Refuses what the opset does not have yet.
    fn require(&self, id: NodeId, needs: u32, what: impl Into<String>) -> Result<()> {
        if self.opset >= needs {
            return Ok(());
        }
        Err(ExportError::Opset {
            value: self.name(id).to_owned(),
            op: self.graph.op(id).name(),
            what: what.into(),
            needs,
            opset: self.opset,
        })
    }

    /// Refuses operators over element types that they do not take yet.
    fn require_type(&self, id: NodeId, operator: &str, dtype: DType) -> Result<()> {
        let needs = match (operator, dtype) {
            ("Add" | "Sub" | "Mul" | "Div", DType::I8 | DType::U8) => 14,
            ("Where", DType::BF16) => 16,
            ("QuantizeLinear" | "DequantizeLinear", DType::F8E4M3 | DType::F8E5M2) => 19,
            ("QuantizeLinear" | "DequantizeLinear", DType::I4 | DType::U4) => 21,
            ("Conv" | "ConvTranspose" | "MaxPool" | "AveragePool", DType::BF16)
            | ("Sin" | "Cos" | "Atan" | "Round", DType::BF16) => 22,
            _ => return Ok(()),
        };
        self.require(id, needs, format!("{operator} of {}", dtype_name(onnx_number(dtype))))
    }

    /// A node with one result; its name.
    fn one(
        &mut self,
        op: &'static str,
        inputs: Vec<String>,
        wanted: &str,
        attributes: Vec<(&'static str, Attribute)>,
    ) -> String {
        self.writer.node(op, inputs, &[wanted], attributes).remove(0)
    }
}

/// The ONNX element type of a port: the declared one where the graph's carries it, as f32 does float64.
fn elements(port: &Port, ty: &TensorType) -> i32 {
    let carried = |number: &i32| dtype(*number).is_ok_and(|dtype| dtype == ty.dtype);
    let declared = number_of(&port.onnx_dtype).filter(carried);
    declared.unwrap_or_else(|| onnx_number(ty.dtype))
}
