//! Nodes that contradict ONNX: each is refused with its name, operator, opset and the value that is wrong.

use crate::tests::{FLOAT, INT64, body, error, floats, int, ints, node, tensor, text, value, with};
use onnx_protobuf::{AttributeProto, NodeProto, TensorProto};

/// A node called `bad` over `x`, f32[2, 3, 8, 8], and these initializers; what its report names.
struct Case {
    node: NodeProto,
    weights: Vec<TensorProto>,
    wanted: &'static str,
}

fn case(
    op: &str,
    inputs: &[&str],
    attributes: &[(&str, AttributeProto)],
    weights: Vec<TensorProto>,
    wanted: &'static str,
) -> Case {
    let bad = attributes.iter().fold(node(op, "bad", inputs, &["y"]), |node, (name, attribute)| {
        with(node, name, attribute.clone())
    });
    Case { node: bad, weights, wanted }
}

fn numbers(name: &str, values: &[i64]) -> TensorProto {
    tensor(name, INT64, &[values.len() as i64], values)
}

fn weight(dims: &[i64]) -> TensorProto {
    let count: i64 = dims.iter().product();
    tensor("w", FLOAT, dims, &vec![1; usize::try_from(count).expect("small")])
}

/// A scalar or vector of these floats, in hundredths.
fn scale(dims: &[i64], hundredths: &[f32]) -> TensorProto {
    let mut proto = tensor("s", FLOAT, dims, &[]);
    proto.float_data = hundredths.iter().map(|value| value / 100.0).collect();
    proto
}

/// Quantization by what ONNX does not allow, or cannot mean.
fn quantization_cases() -> Vec<Case> {
    let zero = |kind: i32, dims: &[i64], value: i32| {
        let mut proto = tensor("z", kind, dims, &[]);
        let count: i64 = dims.iter().product();
        proto.int32_data = vec![value; usize::try_from(count).expect("small")];
        proto
    };
    let (i8, u8, f8) = (3, 2, 17);
    let codes = |kind: i32| TensorProto { name: "w".to_owned(), ..zero(kind, &[2, 2], 1) };
    let axis = |axis: i64| [("axis", int(axis))];
    let linear = "QuantizeLinear";
    vec![
        case(linear, &["x", "s"], &[], vec![scale(&[], &[0.0])], "the scale is 0"),
        case(linear, &["x", "s"], &[], vec![scale(&[], &[-2.0])], "the scale is -0.02"),
        case(linear, &["x", "s"], &[], vec![scale(&[], &[f32::NAN])], "the scale is NaN"),
        case(linear, &["x", "s"], &[], vec![scale(&[], &[f32::INFINITY])], "the scale is inf"),
        case(
            linear,
            &["x", "s"],
            &axis(1),
            vec![scale(&[3], &[1.0, 0.0, 2.0])],
            "element 1 of the scale is 0",
        ),
        case(linear, &["x", "s"], &axis(4), vec![scale(&[3], &[1.0; 3])], "axis 4"),
        case(linear, &["x", "s"], &axis(-5), vec![scale(&[3], &[1.0; 3])], "axis -5"),
        case(linear, &["x", "s"], &axis(1), vec![scale(&[4], &[1.0; 4])], "f32[4]"),
        case(linear, &["x", "s"], &axis(1), vec![scale(&[1, 3], &[1.0; 3])], "f32[1, 3]"),
        case(
            linear,
            &["x", "s", "z"],
            &axis(1),
            vec![scale(&[3], &[1.0; 3]), zero(i8, &[2], 1)],
            "the zero point is i8[2]",
        ),
        case(
            linear,
            &["x", "s", "z"],
            &[("output_dtype", int(2))],
            vec![scale(&[], &[1.0]), zero(i8, &[], 1)],
            "output_dtype is uint8, but the zero point i8[]",
        ),
        case(
            linear,
            &["x", "s", "z"],
            &[],
            vec![scale(&[], &[1.0]), zero(f8, &[], 0x38)],
            "a zero point of f8e4m3 that is not 0",
        ),
        case(
            "QLinearMatMul",
            &["w", "s", "z", "w", "s", "z", "s", "z"],
            &[],
            vec![codes(i8), scale(&[2, 1], &[1.0, -1.0]), zero(i8, &[2, 1], 0)],
            "element 1 of the scale is -0.01",
        ),
        case(
            "QLinearMatMul",
            &["w", "s", "z", "w", "s", "z", "s", "z"],
            &[],
            vec![codes(i8), scale(&[2, 1], &[1.0; 2]), zero(u8, &[2, 1], 0)],
            "the zero point is u8[2, 1]",
        ),
        case(
            "QLinearMatMul",
            &["x", "s", "z", "x", "s", "z", "s", "z"],
            &[],
            vec![scale(&[8, 1], &[1.0; 8]), zero(i8, &[8, 1], 0)],
            "is not of 8-bit integers",
        ),
        case(
            linear,
            &["x", "s"],
            &[("block_size", int(-1))],
            vec![scale(&[], &[1.0])],
            "block_size is -1",
        ),
        case(
            linear,
            &["x", "s"],
            &[("axis", int(3)), ("block_size", int(4))],
            vec![scale(&[3], &[1.0; 3])],
            "f32[3]",
        ),
        case("DequantizeLinear", &["x", "s"], &[], vec![scale(&[], &[1.0])], "is not quantized"),
        case(
            "DequantizeLinear",
            &["q", "s", "z"],
            &[],
            vec![scale(&[], &[1.0]), zero(i8, &[], 1), tensor("q", u8, &[2], &[1, 2])],
            "the zero point is i8[], the codes are u8",
        ),
        case(
            "DequantizeLinear",
            &["q", "s"],
            &axis(2),
            vec![scale(&[2], &[1.0; 2]), tensor("q", u8, &[2], &[1, 2])],
            "axis 2",
        ),
    ]
}

fn cases() -> Vec<Case> {
    let huge = 1 << 62;
    let kernel = ("kernel_shape", ints(&[3, 3]));
    vec![
        case("Transpose", &["x"], &[("perm", ints(&[0, 1, 2]))], vec![], "perm"),
        case(
            "Transpose",
            &["x"],
            &[("perm", ints(&[0, 1, 1, 2]))],
            vec![],
            "axis 1 is given twice",
        ),
        case("Transpose", &["x"], &[("perm", int(1))], vec![], "perm is of type"),
        case("Concat", &["x", "x"], &[("axis", int(4))], vec![], "axis 4"),
        case("Concat", &["x", "x"], &[("axis", int(-5))], vec![], "axis -5"),
        case("Softmax", &["x"], &[("axis", int(9))], vec![], "axis 9"),
        case("Gather", &["x", "i"], &[("axis", int(7))], vec![numbers("i", &[0])], "axis 7"),
        case("Flatten", &["x"], &[("axis", int(6))], vec![], "6"),
        case("Reshape", &["x", "s"], &[], vec![numbers("s", &[-1, -1])], "-1"),
        case("Reshape", &["x", "s"], &[], vec![numbers("s", &[5, 7])], "7"),
        case("Reshape", &["x", "s"], &[], vec![numbers("s", &[huge, huge])], "4611686018427387904"),
        case("Reshape", &["x", "s"], &[], vec![numbers("s", &[-3, 2])], "-3"),
        case("Expand", &["x", "s"], &[], vec![numbers("s", &[2, 3, 8, -8])], "-8"),
        case("Expand", &["x", "s"], &[], vec![numbers("s", &[2, 5, 8, 8])], "5"),
        case("Unsqueeze", &["x", "s"], &[], vec![numbers("s", &[0, 0])], "0"),
        case("Squeeze", &["x", "s"], &[], vec![numbers("s", &[1])], "1"),
        case(
            "Slice",
            &["x", "s", "e", "a", "t"],
            &[],
            vec![numbers("s", &[0]), numbers("e", &[2]), numbers("a", &[0]), numbers("t", &[0])],
            "step 0",
        ),
        case(
            "Slice",
            &["x", "s", "e", "a"],
            &[],
            vec![numbers("s", &[0]), numbers("e", &[2]), numbers("a", &[8])],
            "axis 8",
        ),
        case(
            "Slice",
            &["x", "s", "e"],
            &[],
            vec![numbers("s", &[0, 0]), numbers("e", &[2])],
            "differ in length",
        ),
        case("Split", &["x", "s"], &[("axis", int(2))], vec![numbers("s", &[3, 3])], "3"),
        case("Pad", &["x", "p"], &[], vec![numbers("p", &[1, 1])], "pads"),
        case("Pad", &["x", "p"], &[("mode", text("odd"))], vec![numbers("p", &[1; 8])], "odd"),
        case("Conv", &["x", "w"], &[], vec![weight(&[4, 2, 3, 3])], "do not fit"),
        case("Conv", &["x", "w"], &[("group", int(0))], vec![weight(&[4, 3, 3, 3])], "0"),
        case("Conv", &["x", "w"], &[("group", int(2))], vec![weight(&[4, 3, 3, 3])], "2"),
        case("Conv", &["x", "w"], &[("pads", ints(&[1, 1]))], vec![weight(&[4, 3, 3, 3])], "pads"),
        case("Conv", &["x", "w"], &[("strides", ints(&[0, 1]))], vec![weight(&[4, 3, 3, 3])], "0"),
        case("Conv", &["x", "w"], &[("dilations", ints(&[1]))], vec![weight(&[4, 3, 3, 3])], "1"),
        case(
            "Conv",
            &["x", "w"],
            &[("auto_pad", text("SOMEHOW"))],
            vec![weight(&[4, 3, 3, 3])],
            "SOMEHOW",
        ),
        case("Conv", &["x", "w"], &[], vec![weight(&[4, 3, 3])], "3"),
        case(
            "Conv",
            &["x", "w"],
            &[("kernel_shape", ints(&[5, 5]))],
            vec![weight(&[4, 3, 3, 3])],
            "5",
        ),
        case("MaxPool", &["x"], &[("kernel_shape", ints(&[3]))], vec![], "3"),
        case("MaxPool", &["x"], &[("kernel_shape", ints(&[-3, 3]))], vec![], "-3"),
        case(
            "MaxPool",
            &["x"],
            &[("kernel_shape", ints(&[huge, 3]))],
            vec![],
            "4611686018427387904",
        ),
        case("MaxPool", &["x"], &[kernel.clone(), ("pads", ints(&[1; 3]))], vec![], "pads"),
        case("AveragePool", &["x"], &[kernel, ("ceil_mode", int(7))], vec![], "7"),
        case("AveragePool", &["x"], &[], vec![], "kernel_shape"),
        case("MatMul", &["x", "w"], &[], vec![weight(&[7, 2])], "do not fit"),
        case("Gemm", &["w", "w"], &[("transA", int(3))], vec![weight(&[2, 2])], "3"),
        case("Add", &["x", "i"], &[], vec![numbers("i", &[1])], "i64"),
        case("Add", &["x", "w"], &[], vec![weight(&[5])], "do not broadcast"),
        case("Add", &["x"], &[], vec![], "input 1 is missing"),
        case("Cast", &["x"], &[("to", int(99))], vec![], "99"),
        case("Cast", &["x"], &[("to", int(huge))], vec![], "4611686018427387904"),
        case("Cast", &["x"], &[("to", int(8))], vec![], "string"),
        case("Cast", &["x"], &[], vec![], "to is missing"),
        case("Relu", &["x"], &[("alpha", int(1))], vec![], "alpha"),
        case("LeakyRelu", &["x"], &[("alpha", int(1))], vec![], "alpha is of type"),
        case("BatchNormalization", &["x", "w", "w", "w", "w"], &[], vec![weight(&[5])], "5"),
        case("ReduceMean", &["x"], &[("axes", ints(&[4]))], vec![], "axis 4"),
        case("ReduceMean", &["x"], &[("axes", ints(&[1, 1]))], vec![], "twice"),
        case("ReduceMean", &["x"], &[("keepdims", int(2))], vec![], "2"),
        case("Range", &["i", "l", "d"], &[], range(0, 9, 0), "step 0"),
        case("Range", &["i", "l", "d"], &[], range(0, huge, 1), "range"),
        case("ConstantOfShape", &["s"], &[], vec![numbers("s", &[-2])], "-2"),
        case("Tile", &["x", "s"], &[], vec![numbers("s", &[1, 1, 1, -1])], "-1"),
        case(
            "Tile",
            &["x", "s"],
            &[],
            vec![numbers("s", &[huge, 1, 1, huge])],
            "4611686018427387904",
        ),
    ]
}

fn range(start: i64, limit: i64, delta: i64) -> Vec<TensorProto> {
    let bounds = [("i", start), ("l", limit), ("d", delta)];
    bounds.map(|(name, value)| tensor(name, INT64, &[], &[value])).to_vec()
}

#[test]
fn each_contradiction_is_named_with_its_node() {
    let mut wrong = Vec::new();
    for Case { node, weights, wanted } in cases().into_iter().chain(quantization_cases()) {
        let op = node.op_type.clone();
        let attributes: Vec<String> = node.attribute.iter().map(|a| a.name.clone()).collect();
        let graph = body(
            vec![node],
            weights,
            vec![floats("x", &["2", "3", "8", "8"])],
            vec![value("y", 0, &[])],
        );
        match error(graph, vec![]) {
            None => wrong.push(format!("{op} {attributes:?} is accepted, not: {wanted}")),
            Some(message) => {
                let named = message.contains("bad") && message.contains(&op);
                if !named || !message.contains("opset 17") || !message.contains(wanted) {
                    wrong.push(format!("{op}: no {wanted} in: {message}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
