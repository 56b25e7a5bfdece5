//! What a plan says about itself: where it came from and what was decided, as JSON texts in its `meta`.
//!
//! Equal input gives equal texts: no time, no path, no measured number stands here.

use crate::data::Dtype;
use crate::error::{Code, Error, Result};
use crate::terminal::bytes;
use qcompile_ir::{Channels, Graph};
use qcompile_passes::quantize::{Decision, layers};
use qcompile_plan::Plan;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// An input or output of the model as ONNX declares it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Its ONNX name.
    pub name: String,
    /// Its ONNX element type, in numpy's words.
    pub dtype: String,
}

impl Port {
    /// The element type that files have here, where the graph carries it in another one: 16- and 32-bit integers
    /// without sign, int16 and uint64 in wider integers, float64 in f32.
    #[must_use]
    pub fn carried(&self) -> Option<Dtype> {
        Some(match self.dtype.as_str() {
            "float64" => Dtype::F64,
            "uint16" => Dtype::U16,
            "int16" => Dtype::I16,
            "uint32" => Dtype::U32,
            "uint64" => Dtype::U64,
            _ => return None,
        })
    }
}

/// The precision of the five operations of a layer, in words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operations {
    /// The forward product.
    pub forward: String,
    /// The gradient of the input.
    pub grad_input: String,
    /// The gradient of the weight.
    pub grad_weight: String,
    /// The mean over workers.
    pub mean: String,
    /// The update.
    pub update: String,
}

impl Operations {
    /// Whether a product reads int8 or other codes.
    #[must_use]
    pub fn is_quantized(&self) -> bool {
        let products = [&self.forward, &self.grad_input, &self.grad_weight];
        products.into_iter().any(|word| word != "f32" && word != "bf16")
    }

    /// Whether a product runs in less than f32.
    #[must_use]
    pub fn is_low(&self) -> bool {
        [&self.forward, &self.grad_input, &self.grad_weight].into_iter().any(|word| word != "f32")
    }
}

/// Channels of an int8 layer that one int8 product does not serve.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelSets {
    /// Output channels in higher precision.
    pub outliers: Vec<u32>,
    /// Channels of the data in higher precision.
    pub input_outliers: Vec<u32>,
    /// Output channels with several int8 points, each with their number.
    pub points: Vec<(u32, u32)>,
}

impl ChannelSets {
    fn new(channels: &Channels) -> ChannelSets {
        let Channels { outliers, input_outliers, points } = channels.clone();
        ChannelSets { outliers, input_outliers, points }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == ChannelSets::default()
    }
}

impl std::fmt::Display for ChannelSets {
    /// In a few words, with the channels.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let list = |channels: &[u32]| -> String {
            channels.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
        };
        let ChannelSets { outliers, input_outliers, points } = self;
        let points: Vec<String> =
            points.iter().map(|(channel, count)| format!("{channel}x{count}")).collect();
        let sets = [
            ("high", list(outliers)),
            ("high of data", list(input_outliers)),
            ("points", points.join(",")),
        ];
        let said: Vec<String> = sets
            .iter()
            .filter(|(_, channels)| !channels.is_empty())
            .map(|(what, channels)| format!("{what} {channels}"))
            .collect();
        f.write_str(&said.join("; "))
    }
}

/// What was decided for one layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerDecision {
    /// The value in the graph.
    pub node: String,
    /// The ONNX node that it came from.
    pub origin: Option<String>,
    /// Its operation.
    pub op: String,
    /// What runs in what.
    pub precision: Operations,
    /// Channels that stay in higher precision in an int8 layer.
    pub channels_high: usize,
    /// Which these are, and which have several int8 points.
    #[serde(default, skip_serializing_if = "ChannelSets::is_empty")]
    pub channels: ChannelSets,
    /// Parameters of the layer's weight.
    pub parameters: u64,
    /// The predicted relative increase of the loss, if it was measured and is finite.
    pub score: Option<f32>,
    /// Why.
    pub reason: String,
}

/// The word for an element type where precision is meant.
pub(crate) fn word(dtype: qcompile_ir::DType) -> String {
    match dtype {
        qcompile_ir::DType::I8 => "int8".to_owned(),
        qcompile_ir::DType::I4 => "int4".to_owned(),
        other => other.name().to_owned(),
    }
}

impl LayerDecision {
    /// Whether some of its channels are not left to one int8 product.
    #[must_use]
    pub fn is_divided(&self) -> bool {
        !self.channels.is_empty()
    }

    /// A decision of the pass, for people and files.
    #[must_use]
    pub fn new(graph: &Graph, decision: &Decision) -> LayerDecision {
        let id = graph.find(decision.node.as_str());
        let layer = layers(graph).into_iter().find(|layer| Some(layer.node) == id);
        let parameters = layer.and_then(|layer| {
            let weight = graph.operand(layer.node, 1);
            Some(graph.ty(weight).shape.elements()?.size(1) as u64)
        });
        let precision = &decision.precision;
        LayerDecision {
            node: decision.node.as_str().to_owned(),
            origin: id.and_then(|id| graph.node(id).note.origin.clone()),
            op: decision.op.to_owned(),
            precision: Operations {
                forward: word(precision.forward),
                grad_input: word(precision.grad_input),
                grad_weight: word(precision.grad_weight),
                mean: word(precision.mean),
                update: word(precision.update),
            },
            channels_high: decision.channels.outliers.len()
                + decision.channels.input_outliers.len(),
            channels: ChannelSets::new(&decision.channels),
            parameters: parameters.unwrap_or(0),
            score: decision.score.filter(|score| score.is_finite()),
            reason: decision.reason.clone(),
        }
    }
}

/// What is made again in the backward pass, so that a step takes less memory.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Rematerialised {
    /// How many values.
    pub values: usize,
    /// Operations that this adds, for each one of the step without it.
    pub added_operations: f64,
    /// Memory of the step without it, at the plan's batch size.
    pub bytes_before: usize,
    /// Memory of the step.
    pub bytes_after: usize,
}

impl std::fmt::Display for Rematerialised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} values made again, {:.1} % more operations, memory {} -> {}",
            self.values,
            100.0 * self.added_operations,
            bytes(self.bytes_before as u64),
            bytes(self.bytes_after as u64)
        )
    }
}

/// All that a plan says about itself.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct About {
    /// The word for the loss; empty until it is attached.
    pub loss: String,
    /// The word for the optimizer; empty until the update is built.
    pub optimizer: String,
    /// The model's inputs in ONNX order.
    pub inputs: Vec<Port>,
    /// The model's outputs in ONNX order.
    pub outputs: Vec<Port>,
    /// States of the model itself (running statistics); those of the optimizer are not among them.
    pub states: Vec<String>,
    /// Parameters that the loss does not depend on.
    pub independent: Vec<String>,
    /// The choices that made the plan what it is, by the name of their flag.
    pub options: BTreeMap<String, String>,
    /// What was decided, in the order of the graph.
    pub decisions: Vec<LayerDecision>,
    /// What is made again, where a limit on memory asks for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rematerialised: Option<Rematerialised>,
    /// What was assumed.
    pub warnings: Vec<String>,
}

impl About {
    /// What a graph of unknown origin says by itself.
    #[must_use]
    pub fn of_graph(graph: &Graph) -> About {
        let port = |name: &str, ty: &qcompile_ir::TensorType| Port {
            name: name.to_owned(),
            dtype: numpy_word(ty.dtype).to_owned(),
        };
        let inputs = graph.leaves(|op| matches!(op, qcompile_ir::Op::Input(_)));
        let states = graph.leaves(|op| matches!(op, qcompile_ir::Op::State(_)));
        let name = |id: qcompile_ir::NodeId| graph.node(id).name.as_str().to_owned();
        About {
            inputs: inputs.into_iter().map(|id| port(&name(id), graph.ty(id))).collect(),
            outputs: graph.outputs().iter().map(|(name, id)| port(name, graph.ty(*id))).collect(),
            states: states.into_iter().map(name).collect(),
            ..About::default()
        }
    }

    /// As a plan's `meta`: a JSON text for each field.
    ///
    /// # Errors
    /// Only by a defect.
    pub fn to_meta(&self) -> Result<BTreeMap<String, String>> {
        let broken = |e: serde_json::Error| Error::new(Code::Internal, e.to_string());
        let value = serde_json::to_value(self).map_err(broken)?;
        let fields = value.as_object().cloned().unwrap_or_default();
        Ok(fields.into_iter().map(|(key, value)| (key, value.to_string())).collect())
    }

    /// What a plan says; of one that says nothing, what its graph says.
    ///
    /// # Errors
    /// [`Code::PlanFormat`] for texts that are not what they should be.
    pub fn of_plan(plan: &Plan) -> Result<About> {
        if plan.meta().is_empty() {
            return Ok(About::of_graph(plan.graph()));
        }
        let damaged = |e: serde_json::Error| {
            Error::new(Code::PlanFormat, format!("what the plan says about itself is damaged: {e}"))
        };
        let mut fields = serde_json::Map::new();
        for (key, text) in plan.meta() {
            fields.insert(key.clone(), serde_json::from_str(text).map_err(damaged)?);
        }
        let about: About = serde_json::from_value(fields.into()).map_err(damaged)?;
        let known = |name: &str| plan.inputs().iter().any(|input| input.name == name);
        match about.inputs.iter().find(|port| !known(&port.name)) {
            Some(port) => {
                let cause = format!("the plan has no input `{}`, which it says it has", port.name);
                Err(Error::new(Code::PlanFormat, cause))
            }
            None => Ok(about),
        }
    }
}

/// numpy's word for an element type.
#[must_use]
pub const fn numpy_word(dtype: qcompile_ir::DType) -> &'static str {
    use qcompile_ir::DType;
    match dtype {
        DType::F32 => "float32",
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        DType::F8E4M3 => "float8_e4m3fn",
        DType::F8E5M2 => "float8_e5m2",
        DType::I8 => "int8",
        DType::U8 => "uint8",
        DType::I4 => "int4",
        DType::U4 => "uint4",
        DType::I32 => "int32",
        DType::I64 => "int64",
        DType::Bool => "bool",
    }
}
