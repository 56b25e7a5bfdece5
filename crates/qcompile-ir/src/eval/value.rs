//! Values under evaluation and what evaluation returns.

use super::Rounding;
use crate::{DType, Graph, Name, Tensor, float8};
use half::{bf16, f16};
use std::collections::BTreeMap;

/// Elements in row-major order.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    /// Of a float type.
    Float(Vec<f64>),
    /// Of an integer type or bool.
    Int(Vec<i64>),
}

impl Data {
    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Data::Float(values) => values.len(),
            Data::Int(values) => values.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements as f64.
    #[must_use]
    pub fn to_f64(&self) -> Vec<f64> {
        match self {
            Data::Float(values) => values.clone(),
            Data::Int(values) => values.iter().map(|&value| value as f64).collect(),
        }
    }

    /// Elements of `dtype`: integers are truncated.
    pub(super) fn from_f64(dtype: DType, values: &[f64]) -> Data {
        if dtype.is_float() {
            Data::Float(values.to_vec())
        } else {
            Data::Int(values.iter().map(|&value| value as i64).collect())
        }
    }

    /// The floats; empty for integers, which typed nodes do not mix up.
    pub(super) fn floats(&self) -> &[f64] {
        match self {
            Data::Float(values) => values,
            Data::Int(_) => &[],
        }
    }

    /// The integers; empty for floats, which typed nodes do not mix up.
    pub(super) fn ints(&self) -> &[i64] {
        match self {
            Data::Int(values) => values,
            Data::Float(_) => &[],
        }
    }

    /// Rounds or wraps every element to `dtype`.
    pub(super) fn round(&mut self, dtype: DType, rounding: Rounding) {
        match self {
            Data::Float(values) => {
                values.iter_mut().for_each(|value| *value = round_float(*value, dtype, rounding));
            }
            Data::Int(values) => {
                values.iter_mut().for_each(|value| *value = wrap(*value, dtype));
            }
        }
    }
}

/// The nearest value of `dtype`, ties to even.
pub(super) fn round_float(value: f64, dtype: DType, rounding: Rounding) -> f64 {
    match (rounding, dtype) {
        (Rounding::PerOp, DType::F32) => f64::from(value as f32),
        (Rounding::PerOp, DType::BF16) => bf16::from_f64(value).to_f64(),
        (Rounding::PerOp, DType::F16) => f16::from_f64(value).to_f64(),
        (Rounding::PerOp, DType::F8E4M3) => float8::E4M3.decode(float8::E4M3.encode(value)),
        (Rounding::PerOp, DType::F8E5M2) => float8::E5M2.decode(float8::E5M2.encode(value)),
        _ => value,
    }
}

fn wrap(value: i64, dtype: DType) -> i64 {
    match dtype {
        DType::I8 => i64::from(value as i8),
        DType::U8 => i64::from(value as u8),
        DType::I4 => (value << 60) >> 60,
        DType::U4 => value & 15,
        DType::I32 => i64::from(value as i32),
        DType::Bool => i64::from(value != 0),
        DType::I64 | DType::F32 | DType::BF16 | DType::F16 | DType::F8E4M3 | DType::F8E5M2 => value,
    }
}

/// A value of known shape.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Elements in row-major order.
    pub data: Data,
}

impl Value {
    /// The value as a tensor, rounded to `dtype`.
    #[must_use]
    pub fn to_tensor(&self, dtype: DType) -> Option<Tensor> {
        match &self.data {
            Data::Float(values) => Tensor::from_f64(dtype, &self.shape, values),
            Data::Int(values) if dtype == DType::I64 => Tensor::from_i64(&self.shape, values),
            Data::Int(_) => Tensor::from_f64(dtype, &self.shape, &self.data.to_f64()),
        }
    }
}

impl From<&Tensor> for Value {
    fn from(tensor: &Tensor) -> Value {
        let data = if tensor.dtype().is_float() {
            Data::Float(tensor.to_f64())
        } else {
            Data::Int(tensor.to_i64())
        };
        Value { shape: tensor.shape().to_vec(), data }
    }
}

/// The values of one evaluated step.
#[derive(Clone, Debug)]
pub struct Values {
    nodes: BTreeMap<Name, (DType, Value)>,
    outputs: Vec<(String, Name)>,
    next: BTreeMap<Name, Name>,
}

impl Values {
    pub(super) fn new(graph: &Graph, values: Vec<Option<Value>>) -> Values {
        let name = |id| graph.node(id).name.clone();
        let nodes = graph
            .ids()
            .zip(values)
            .filter_map(|(id, value)| Some((name(id), (graph.ty(id).dtype, value?))))
            .collect();
        Values {
            nodes,
            outputs: graph.outputs().iter().map(|(text, id)| (text.clone(), name(*id))).collect(),
            next: graph.next().iter().map(|(leaf, id)| (name(*leaf), name(*id))).collect(),
        }
    }

    /// The value of a node, or else of an output of this name. None if it was not evaluated.
    #[must_use]
    pub fn value(&self, name: &str) -> Option<&Value> {
        self.typed(name).map(|(_, value)| value)
    }

    fn typed(&self, name: &str) -> Option<&(DType, Value)> {
        self.nodes.get(name).or_else(|| {
            let (_, node) = self.outputs.iter().find(|(output, _)| output == name)?;
            self.nodes.get(node)
        })
    }

    /// [`Values::value`] as a tensor of the node's type.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Tensor> {
        self.typed(name).and_then(|(dtype, value)| value.to_tensor(*dtype))
    }

    /// The elements of [`Values::value`] as f64, unrounded.
    #[must_use]
    pub fn get_f64(&self, name: &str) -> Option<Vec<f64>> {
        self.value(name).map(|value| value.data.to_f64())
    }

    /// Every output that was evaluated, in order.
    #[must_use]
    pub fn outputs(&self) -> Vec<(String, Tensor)> {
        self.outputs
            .iter()
            .filter_map(|(name, node)| Some((name.clone(), self.get(node.as_str())?)))
            .collect()
    }

    /// What a parameter or state holds after the step: its `next` value, or none if it has none.
    #[must_use]
    pub fn next(&self, leaf: &str) -> Option<Tensor> {
        self.get(self.next.get(leaf)?.as_str())
    }
}
