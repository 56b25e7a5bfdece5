//! What convolutions, pools and Resize refuse: contradictions by the value, sizes beyond reason without much work.

use crate::{ImportOptions, import};
use onnx_protobuf::attribute_proto::AttributeType;
use onnx_protobuf::tensor_shape_proto::{Dimension, dimension};
use onnx_protobuf::type_proto;
use onnx_protobuf::{
    AttributeProto, GraphProto, Message, ModelProto, NodeProto, OperatorSetIdProto, TensorProto,
    TensorShapeProto, TypeProto, ValueInfoProto,
};

const HUGE: i64 = 1 << 62;

/// An operand or attribute of the node under test.
enum Part {
    /// The input x; -1 is the batch.
    Input(&'static [i64]),
    /// A weight of ones.
    Weight(&'static [i64]),
    /// A constant operand.
    Floats(&'static [f32]),
    /// A constant operand.
    Indices(&'static [i64]),
    /// No operand.
    Nothing,
    Ints(&'static str, &'static [i64]),
    Int(&'static str, i64),
    Text(&'static str, &'static str),
}

use Part::{Floats, Indices, Input, Int, Ints, Nothing, Text, Weight};

fn tensor(name: &str, dims: &[i64]) -> TensorProto {
    TensorProto { name: name.to_owned(), dims: dims.to_vec(), ..TensorProto::default() }
}

fn attribute(name: &str, kind: AttributeType) -> AttributeProto {
    AttributeProto { name: name.to_owned(), type_: kind.into(), ..AttributeProto::default() }
}

fn input(dims: &[i64]) -> ValueInfoProto {
    let dim = |&size: &i64| {
        let value = if size < 0 {
            dimension::Value::DimParam("N".to_owned())
        } else {
            dimension::Value::DimValue(size)
        };
        Dimension { value: Some(value), ..Dimension::default() }
    };
    let shape =
        TensorShapeProto { dim: dims.iter().map(dim).collect(), ..TensorShapeProto::default() };
    let mut ty = type_proto::Tensor { elem_type: 1, ..type_proto::Tensor::default() };
    ty.shape = Some(shape).into();
    let mut declared = TypeProto::new();
    declared.value = Some(type_proto::Value::TensorType(ty));
    let mut value = ValueInfoProto { name: "x".to_owned(), ..ValueInfoProto::default() };
    value.type_ = Some(declared).into();
    value
}

/// A model of one node `op` with results `y` and, if asked for, `i`.
fn model(op: &str, opset: i64, results: usize, parts: &[Part]) -> Vec<u8> {
    let mut graph = GraphProto::new();
    let mut node = NodeProto { op_type: op.to_owned(), ..NodeProto::default() };
    node.output = ["y", "i"][..results].iter().map(|&name| name.to_owned()).collect();
    for (at, part) in parts.iter().enumerate() {
        let name = format!("operand{at}");
        match *part {
            Input(dims) => {
                graph.input.push(input(dims));
                node.input.push("x".to_owned());
                continue;
            }
            Nothing => node.input.push(String::new()),
            Weight(dims) => {
                let count = usize::try_from(dims.iter().product::<i64>()).expect("small");
                let float_data = vec![1.0; count];
                graph.initializer.push(TensorProto {
                    data_type: 1,
                    float_data,
                    ..tensor(&name, dims)
                });
                node.input.push(name);
            }
            Floats(values) => {
                let dims = [i64::try_from(values.len()).expect("small")];
                graph.initializer.push(TensorProto {
                    data_type: 1,
                    float_data: values.to_vec(),
                    ..tensor(&name, &dims)
                });
                node.input.push(name);
            }
            Indices(values) => {
                let dims = [i64::try_from(values.len()).expect("small")];
                graph.initializer.push(TensorProto {
                    data_type: 7,
                    int64_data: values.to_vec(),
                    ..tensor(&name, &dims)
                });
                node.input.push(name);
            }
            Ints(name, values) => node.attribute.push(AttributeProto {
                ints: values.to_vec(),
                ..attribute(name, AttributeType::INTS)
            }),
            Int(name, value) => node
                .attribute
                .push(AttributeProto { i: value, ..attribute(name, AttributeType::INT) }),
            Text(name, text) => node.attribute.push(AttributeProto {
                s: text.as_bytes().to_vec(),
                ..attribute(name, AttributeType::STRING)
            }),
        }
    }
    graph.output = node
        .output
        .iter()
        .map(|name| ValueInfoProto { name: name.clone(), ..ValueInfoProto::default() })
        .collect();
    graph.node.push(node);
    let mut model = ModelProto { ir_version: 8, ..ModelProto::default() };
    model.opset_import.push(OperatorSetIdProto { version: opset, ..OperatorSetIdProto::default() });
    model.graph = Some(graph).into();
    model.write_to_bytes().expect("well-formed")
}

const IMAGE: Part = Input(&[2, 4, 8, 8]);
const KERNEL: Part = Weight(&[4, 4, 3, 3]);

#[test]
fn what_contradicts_itself_or_is_beyond_reason_is_refused_by_the_value() {
    let cases: &[(&str, i64, usize, &[Part], &str)] = &[
        ("Conv", 11, 1, &[IMAGE, Weight(&[4, 4, 3])], "weight f32[4, 4, 3]"),
        ("Conv", 11, 1, &[IMAGE, KERNEL, Ints("kernel_shape", &[3, 2])], "[3, 2]"),
        ("Conv", 11, 1, &[IMAGE, KERNEL, Ints("pads", &[1, -1, 1, 1])], "[1, -1, 1, 1]"),
        ("Conv", 11, 1, &[IMAGE, KERNEL, Ints("pads", &[1, 1])], "[1, 1]"),
        ("Conv", 11, 1, &[IMAGE, KERNEL, Ints("strides", &[0, 1])], "[0, 1]"),
        ("Conv", 11, 1, &[IMAGE, KERNEL, Ints("dilations", &[HUGE, 1])], "4611686018427387904"),
        ("Conv", 11, 1, &[IMAGE, KERNEL, Text("auto_pad", "SAME")], "`SAME`"),
        ("Conv", 11, 1, &[IMAGE, KERNEL, Int("group", 0)], "group is 0"),
        ("Conv", 11, 1, &[IMAGE, KERNEL, Int("group", 3)], "3 groups"),
        ("Conv", 11, 1, &[IMAGE, KERNEL, Weight(&[5])], "bias f32[5]"),
        ("Conv", 11, 1, &[IMAGE, Weight(&[4, 4, 9, 9])], "kernel does not fit"),
        ("Conv", 11, 1, &[IMAGE, Weight(&[4, 4, 0, 3])], "kernel"),
        (
            "Conv",
            11,
            1,
            &[Input(&[1, 1, 2000, 1, 1]), Weight(&[1, 1, 1025, 1, 1])],
            "more than 1024 places",
        ),
        ("Conv", 11, 1, &[Input(&[2, 4]), Weight(&[4, 4])], "no spatial axes"),
        ("Conv", 11, 1, &[Input(&[2, 4, -1]), Weight(&[4, 4, 3])], "--dim N=SIZE"),
        ("ConvTranspose", 11, 1, &[IMAGE, Weight(&[3, 4, 3, 3])], "weight f32[3, 4, 3, 3]"),
        ("ConvTranspose", 11, 1, &[IMAGE, KERNEL, Ints("pads", &[9, 9, 9, 9])], "[9, 9]"),
        ("ConvTranspose", 11, 1, &[IMAGE, KERNEL, Ints("strides", &[HUGE, 1])], "2^64"),
        ("ConvTranspose", 11, 1, &[IMAGE, KERNEL, Ints("output_shape", &[0, 8])], "result of"),
        ("ConvTranspose", 11, 1, &[IMAGE, KERNEL, Ints("output_padding", &[-1, 0])], "[-1, 0]"),
        (
            "ConvTranspose",
            11,
            1,
            &[Input(&[1, 1, 2, 2, 2]), Weight(&[1, 1, 2, 2, 2]), Ints("strides", &[HUGE, 1, 1])],
            "4611686018427387906",
        ),
        ("MaxPool", 12, 1, &[IMAGE], "kernel_shape is missing"),
        ("MaxPool", 12, 1, &[IMAGE, Ints("kernel_shape", &[HUGE, HUGE])], "4611686018427387904"),
        ("MaxPool", 12, 1, &[IMAGE, Ints("kernel_shape", &[2, 2]), Int("ceil_mode", 2)], "is 2"),
        (
            "MaxPool",
            12,
            2,
            &[Input(&[1, 1, 2000]), Ints("kernel_shape", &[1500])],
            "1500 places, more than 1024",
        ),
        (
            "MaxPool",
            12,
            2,
            &[Input(&[-1, 4, 8, 8]), Ints("kernel_shape", &[2, 2])],
            "the index of a maximum depends on the batch size; perhaps with --dim N=SIZE",
        ),
        ("LpPool", 18, 1, &[IMAGE, Ints("kernel_shape", &[2, 2]), Int("p", 0)], "p is 0"),
        ("GlobalLpPool", 7, 1, &[IMAGE, Int("p", -1)], "p is -1"),
        (
            "MaxUnpool",
            11,
            1,
            &[Input(&[1, 1, 2, 2]), Indices(&[1]), Ints("kernel_shape", &[2, 2])],
            "i64[1]",
        ),
        ("Resize", 13, 1, &[IMAGE], "neither scales nor sizes"),
        ("Resize", 13, 1, &[IMAGE, Nothing, Floats(&[1.0, 1.0, 2.0])], "3 scales for 4 axes"),
        ("Resize", 13, 1, &[IMAGE, Nothing, Floats(&[1.0, 1.0, -2.0, 2.0])], "-2"),
        ("Resize", 13, 1, &[IMAGE, Nothing, Floats(&[1.0, 1.0, f32::NAN, 2.0])], "NaN"),
        ("Resize", 13, 1, &[IMAGE, Nothing, Floats(&[1.0, 1.0, 0.01, 2.0])], "axis 2 of 8"),
        ("Resize", 13, 1, &[IMAGE, Nothing, Floats(&[1.0, 1.0, 1e30, 2.0])], "axis 2 resized"),
        ("Resize", 13, 1, &[IMAGE, Nothing, Nothing, Indices(&[2, 4, HUGE, 8])], "axis 2 resized"),
        ("Resize", 13, 1, &[IMAGE, Nothing, Nothing, Indices(&[2, 4, -8, 8])], "-8"),
        (
            "Resize",
            13,
            1,
            &[Input(&[-1, 4, 8, 8]), Nothing, Nothing, Indices(&[3, 4, 8, 8])],
            "--dim N=SIZE",
        ),
        (
            "Resize",
            13,
            1,
            &[
                IMAGE,
                Nothing,
                Floats(&[1.0, 1.0, 2.0, 2.0]),
                Text("coordinate_transformation_mode", "tf_crop_and_resize"),
            ],
            "without a region",
        ),
        (
            "Resize",
            18,
            1,
            &[
                IMAGE,
                Nothing,
                Floats(&[1.0, 1.0, 1e-7, 1.0]),
                Int("antialias", 1),
                Text("mode", "cubic"),
            ],
            "axis 2 of 8",
        ),
        ("Resize", 18, 1, &[IMAGE, Nothing, Floats(&[2.0]), Ints("axes", &[4])], "axis 4"),
        ("Resize", 13, 1, &[IMAGE, Nothing, Floats(&[1.0; 4]), Text("mode", "area")], "`area`"),
        ("Upsample", 9, 1, &[IMAGE], "scales are missing"),
        ("Upsample", 10, 1, &[IMAGE], "not supported"),
    ];
    let mut failures = Vec::new();
    for (op, opset, results, parts, wanted) in cases {
        let bytes = model(op, *opset, *results, parts);
        let message = match import(&bytes, &ImportOptions::default()) {
            Ok(_) => "accepted".to_owned(),
            Err(error) => error.to_string(),
        };
        if !message.contains(wanted) {
            failures.push(format!("no `{wanted}` in: {message}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn the_batch_stays_symbolic() {
    let batch = || Input(&[-1, 4, 6, 8, 8]);
    let cases: &[(&str, i64, &[Part])] = &[
        ("Conv", 11, &[batch(), Weight(&[4, 4, 3, 3, 3])]),
        ("ConvTranspose", 11, &[batch(), Weight(&[4, 4, 3, 3, 3])]),
        ("MaxPool", 12, &[batch(), Ints("kernel_shape", &[2, 2, 2])]),
        ("AveragePool", 11, &[batch(), Ints("kernel_shape", &[2, 2, 2])]),
        ("LpPool", 11, &[batch(), Ints("kernel_shape", &[2, 2, 2])]),
        ("Resize", 13, &[batch(), Nothing, Floats(&[1.0, 1.0, 2.0, 0.7, 1.5])]),
        (
            "Resize",
            13,
            &[batch(), Nothing, Floats(&[1.0, 1.0, 2.0, 0.7, 1.5]), Text("mode", "linear")],
        ),
    ];
    for (op, opset, parts) in cases {
        let imported = import(&model(op, *opset, 1, parts), &ImportOptions::default());
        let imported = imported.unwrap_or_else(|error| panic!("{op}: {error}"));
        assert_eq!(imported.outputs[0].ty.shape.batch_axis(), Some(0), "{op}");
    }
}
