//! Products of integers as ONNX Runtime's dynamic quantization writes them, as products of dequantized values.
//!
//! `DynamicQuantizeLinear` gives codes, a scale and a zero point; `MatMulInteger` or `ConvInteger` multiplies them with the
//! codes of a weight; the result is cast to f32 and multiplied by both scales. `DequantizeLinear` of both operands before
//! `MatMul` or `Conv` means the same, and has a gradient: integers have none.

use crate::body::{Body, BodyNode, Weight};
use crate::function::plain_domain;
use crate::tensor::decode;
use onnx_protobuf::tensor_proto::DataType;
use onnx_protobuf::{NodeProto, TensorProto};
use std::collections::BTreeMap;
use std::rc::Rc;

/// Nodes of a model that others stand for.
pub(crate) struct Rewritten {
    /// The product of integers. A product of floats has its name now, as have the `DequantizeLinear` of its operands.
    pub(crate) product: BodyNode,
    /// What made floats of its result.
    pub(crate) absorbed: Vec<BodyNode>,
}

/// Rewrites every such product, and returns what is gone; others stay, exact and without a gradient.
pub(crate) fn dequantize_products(body: &mut Body) -> Vec<Rewritten> {
    let products: Vec<Product> = Nodes::of(body).products();
    let mut nodes: Vec<Option<BodyNode>> =
        std::mem::take(&mut body.nodes).into_iter().map(Some).collect();
    let mut replaced: BTreeMap<usize, Vec<BodyNode>> = BTreeMap::new();
    let mut rewritten = Vec::with_capacity(products.len());
    for one in &products {
        let Some(product) = nodes[one.at].take() else { continue };
        replaced.insert(one.at, one.nodes(&product));
        let absorbed = [one.cast, one.scaled].into_iter().filter_map(|at| nodes[at].take());
        rewritten.push(Rewritten { product, absorbed: absorbed.collect() });
    }
    for (at, node) in nodes.into_iter().enumerate() {
        body.nodes.extend(node);
        body.nodes.extend(replaced.remove(&at).unwrap_or_default());
    }
    rewritten
}

/// A product of integers, with the nodes that make floats of it.
struct Product {
    at: usize,
    cast: usize,
    scaled: usize,
    /// Names of the scales of both operands.
    scales: [String; 2],
    /// Names for both operands as floats.
    floats: [String; 2],
    result: String,
}

impl Product {
    /// The nodes that stand for it.
    fn nodes(&self, node: &BodyNode) -> Vec<BodyNode> {
        let proto = &node.proto;
        let [first, second] = self.floats.clone();
        let named = |proto: NodeProto| BodyNode {
            proto,
            name: node.name.clone(),
            opsets: Rc::clone(&node.opsets),
        };
        let dequantize = |operand: usize, value: &str| {
            let mut input = vec![proto.input[operand].clone(), self.scales[operand].clone()];
            input.extend(proto.input.get(operand + 2).cloned());
            let output = vec![value.to_owned()];
            NodeProto {
                op_type: "DequantizeLinear".to_owned(),
                input,
                output,
                ..Default::default()
            }
        };
        let op_type = if proto.op_type == "ConvInteger" { "Conv" } else { "MatMul" };
        let product = NodeProto {
            op_type: op_type.to_owned(),
            input: vec![first.clone(), second.clone()],
            output: vec![self.result.clone()],
            ..proto.clone()
        };
        vec![named(dequantize(0, &first)), named(dequantize(1, &second)), named(product)]
    }
}

/// The nodes of a graph by what they define, and how often each value is read.
struct Nodes<'b> {
    body: &'b Body,
    makers: BTreeMap<&'b str, usize>,
    /// The readers of a value; an output of the graph is read by what is no node.
    readers: BTreeMap<&'b str, Vec<usize>>,
    initializers: BTreeMap<&'b str, &'b TensorProto>,
}

impl<'b> Nodes<'b> {
    fn of(body: &'b Body) -> Nodes<'b> {
        let initializers = body.weights.iter().filter_map(|(name, weight)| match weight {
            Weight::Dense(proto) => Some((name.as_str(), &**proto)),
            Weight::Sparse(_) => None,
        });
        let (makers, readers, initializers) =
            (BTreeMap::new(), BTreeMap::new(), initializers.collect());
        let mut nodes = Nodes { body, makers, readers, initializers };
        for (at, node) in body.nodes.iter().enumerate() {
            nodes.makers.extend(node.proto.output.iter().map(|output| (output.as_str(), at)));
            for name in node.reads() {
                nodes.readers.entry(name).or_default().push(at);
            }
        }
        for output in &body.outputs {
            nodes.readers.entry(&output.name).or_default().push(usize::MAX);
        }
        nodes
    }

    fn products(&self) -> Vec<Product> {
        (0..self.body.nodes.len()).filter_map(|at| self.product(at)).collect()
    }

    fn proto(&self, at: usize, op: &str) -> Option<&'b NodeProto> {
        let proto = &self.body.nodes.get(at)?.proto;
        (proto.op_type == op && plain_domain(&proto.domain).is_empty()).then_some(proto)
    }

    /// The only node that reads a value, if it is this operator's.
    fn reader(&self, value: &str, op: &str) -> Option<(usize, &'b NodeProto)> {
        let [at] = self.readers.get(value)?[..] else { return None };
        Some((at, self.proto(at, op)?))
    }

    fn product(&self, at: usize) -> Option<Product> {
        let matrix = self.proto(at, "MatMulInteger");
        let proto = matrix.or_else(|| self.proto(at, "ConvInteger"))?;
        let [result] = &proto.output[..] else { return None };
        let (cast, to_float) = self.reader(result, "Cast")?;
        let float = i64::from(DataType::FLOAT as i32);
        let is_float = to_float.attribute.iter().any(|a| a.name == "to" && a.i == float);
        let (scaled, scaling) = self.reader(to_float.output.first()?, "Mul")?;
        let scale = scaling.input.iter().find(|input| **input != to_float.output[0])?;
        let maker = *self.makers.get(proto.input.first()?.as_str())?;
        let quantizer = self.proto(maker, "DynamicQuantizeLinear")?;
        let [codes, scale_a, zero_a] = &quantizer.output[..] else { return None };
        let product = self.proto(*self.makers.get(scale.as_str())?, "Mul")?;
        let scale_b = match &product.input[..] {
            [a, b] if a == scale_a => b,
            [b, a] if a == scale_a => b,
            _ => return None,
        };
        let fits = is_float
            && proto.input.first() == Some(codes)
            && proto.input.get(2) == Some(zero_a)
            && self.scales_of_weight(proto, scale_b, matrix.is_some())?;
        fits.then(|| Product {
            at,
            cast,
            scaled,
            scales: [scale_a.clone(), scale_b.clone()],
            floats: ["a", "b"].map(|operand| self.unused(format!("{result}.{operand}"))),
            result: scaling.output[0].clone(),
        })
    }

    /// A name that no value has.
    fn unused(&self, mut name: String) -> String {
        let known = |name: &str| {
            self.makers.contains_key(name)
                || self.readers.contains_key(name)
                || self.body.weights.iter().any(|(weight, _)| weight == name)
                || self.body.inputs.iter().any(|input| input.name == name)
        };
        while known(&name) {
            name.push('_');
        }
        name
    }

    /// Whether an initializer scales the codes of a weight as `DequantizeLinear` does: by one number above 0 for all, or by
    /// one for each column of a matrix; and so the zero point.
    fn scales_of_weight(&self, proto: &NodeProto, scale: &str, matrix: bool) -> Option<bool> {
        let weight = &self.initializers.get(proto.input.get(1)?.as_str())?.dims;
        let scale = self.initializers.get(scale)?;
        let fits = |dims: &[i64]| match dims {
            [] => true,
            [1] => weight.len() >= 2,
            [columns] => matrix && weight.len() == 2 && weight[1] == *columns,
            _ => false,
        };
        let zeros = match proto.input.get(3).filter(|name| !name.is_empty()) {
            Some(zero_point) => &self.initializers.get(zero_point.as_str())?.dims,
            None => &scale.dims,
        };
        let alike = *zeros == scale.dims || matches!(zeros[..], [] | [1]);
        if !fits(&scale.dims) || !alike {
            return Some(false);
        }
        // Scales are few, and lie in the model itself.
        let elsewhere = |_: &str, _: u64, _: u64| Err(String::new());
        let values = decode((*scale).clone(), &elsewhere).ok()?.to_f64();
        Some(values.iter().all(|&value| value > 0.0 && value.is_finite()))
    }
}
