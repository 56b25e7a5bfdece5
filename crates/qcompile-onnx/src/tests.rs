//! Whole models made of messages: functions, control flow, constants as weights, element types, dimensions, and what
//! contradicts ONNX.

use crate::{Import, ImportError, ImportOptions, Verdict, import, survey};
use onnx_protobuf::attribute_proto::AttributeType;
use onnx_protobuf::tensor_shape_proto::{Dimension, dimension};
use onnx_protobuf::{
    AttributeProto, FunctionProto, GraphProto, Message, ModelProto, NodeProto, OperatorSetIdProto,
    TensorProto, TensorShapeProto, TypeProto, ValueInfoProto, type_proto,
};
use qcompile_ir::Op;
use std::collections::BTreeMap;

pub(crate) const FLOAT: i32 = 1;
const UINT16: i32 = 4;
pub(crate) const INT64: i32 = 7;
const BOOL: i32 = 9;

/// A node; attributes as `name: value` are added by [`with`].
pub(crate) fn node(op: &str, name: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
    NodeProto {
        op_type: op.to_owned(),
        name: name.to_owned(),
        input: names(inputs),
        output: names(outputs),
        ..Default::default()
    }
}

pub(crate) fn with(mut node: NodeProto, name: &str, attribute: AttributeProto) -> NodeProto {
    node.attribute.push(AttributeProto { name: name.to_owned(), ..attribute });
    node
}

pub(crate) fn int(value: i64) -> AttributeProto {
    AttributeProto { i: value, type_: AttributeType::INT.into(), ..Default::default() }
}

pub(crate) fn ints(values: &[i64]) -> AttributeProto {
    AttributeProto {
        ints: values.to_vec(),
        type_: AttributeType::INTS.into(),
        ..Default::default()
    }
}

pub(crate) fn text(value: &str) -> AttributeProto {
    AttributeProto {
        s: value.as_bytes().to_vec(),
        type_: AttributeType::STRING.into(),
        ..Default::default()
    }
}

fn graph(value: GraphProto) -> AttributeProto {
    AttributeProto {
        g: Some(value).into(),
        type_: AttributeType::GRAPH.into(),
        ..Default::default()
    }
}

fn reference(name: &str, type_: AttributeType) -> AttributeProto {
    AttributeProto { ref_attr_name: name.to_owned(), type_: type_.into(), ..Default::default() }
}

/// A tensor of these numbers.
pub(crate) fn tensor(name: &str, data_type: i32, dims: &[i64], values: &[i64]) -> TensorProto {
    let mut proto =
        TensorProto { name: name.to_owned(), data_type, dims: dims.to_vec(), ..Default::default() };
    match data_type {
        FLOAT => proto.float_data = values.iter().map(|&value| value as f32).collect(),
        INT64 => proto.int64_data = values.to_vec(),
        _ => proto.int32_data = values.iter().map(|&value| value as i32).collect(),
    }
    proto
}

fn constant(output: &str, value: TensorProto) -> NodeProto {
    let value = AttributeProto {
        t: Some(value).into(),
        type_: AttributeType::TENSOR.into(),
        ..Default::default()
    };
    with(node("Constant", "", &[], &[output]), "value", value)
}

/// A value whose dimensions are numbers or names.
pub(crate) fn value(name: &str, elem_type: i32, dims: &[&str]) -> ValueInfoProto {
    let dim = |text: &&str| {
        let value = match text.parse() {
            Ok(size) => dimension::Value::DimValue(size),
            Err(_) => dimension::Value::DimParam((*text).to_owned()),
        };
        Dimension { value: Some(value), ..Default::default() }
    };
    let shape = TensorShapeProto { dim: dims.iter().map(dim).collect(), ..Default::default() };
    let ty = type_proto::Tensor { elem_type, shape: Some(shape).into(), ..Default::default() };
    let ty = TypeProto { value: Some(type_proto::Value::TensorType(ty)), ..Default::default() };
    ValueInfoProto { name: name.to_owned(), type_: Some(ty).into(), ..Default::default() }
}

pub(crate) fn floats(name: &str, dims: &[&str]) -> ValueInfoProto {
    value(name, FLOAT, dims)
}

pub(crate) fn body(
    nodes: Vec<NodeProto>,
    initializer: Vec<TensorProto>,
    input: Vec<ValueInfoProto>,
    output: Vec<ValueInfoProto>,
) -> GraphProto {
    GraphProto {
        name: "g".to_owned(),
        node: nodes,
        initializer,
        input,
        output,
        ..Default::default()
    }
}

fn opset(domain: &str, version: i64) -> OperatorSetIdProto {
    OperatorSetIdProto { domain: domain.to_owned(), version, ..Default::default() }
}

pub(crate) fn model(graph: GraphProto, functions: Vec<FunctionProto>) -> Vec<u8> {
    let model = ModelProto {
        ir_version: 10,
        opset_import: vec![opset("", 17), opset("own", 1)],
        graph: Some(graph).into(),
        functions,
        ..Default::default()
    };
    model.write_to_bytes().expect("fits")
}

fn load(graph: GraphProto, functions: Vec<FunctionProto>) -> Import {
    import(&model(graph, functions), &ImportOptions::default()).expect("sound")
}

/// What the import says; none if nothing is wrong.
pub(crate) fn error(graph: GraphProto, functions: Vec<FunctionProto>) -> Option<String> {
    let imported = import(&model(graph, functions), &ImportOptions::default());
    imported.err().map(|error| error.to_string())
}

fn refusal(graph: GraphProto, functions: Vec<FunctionProto>) -> String {
    error(graph, functions).expect("unsound")
}

/// How often each op that is no leaf occurs.
fn ops(import: &Import) -> BTreeMap<&'static str, usize> {
    let graph = &import.graph;
    let mut ops = BTreeMap::new();
    for id in graph.ids().filter(|&id| !graph.op(id).is_leaf()) {
        *ops.entry(graph.op(id).name()).or_default() += 1;
    }
    ops
}

fn names(import: &Import) -> Vec<&str> {
    let graph = &import.graph;
    graph.ids().map(|id| graph.node(id).name.as_str()).collect()
}

fn function(name: &str, inputs: &[&str], outputs: &[&str], nodes: Vec<NodeProto>) -> FunctionProto {
    FunctionProto {
        name: name.to_owned(),
        domain: "own".to_owned(),
        input: inputs.iter().map(|&name| name.to_owned()).collect(),
        output: outputs.iter().map(|&name| name.to_owned()).collect(),
        node: nodes,
        opset_import: vec![opset("", 17), opset("own", 1)],
        ..Default::default()
    }
}

fn call(op: &str, name: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    NodeProto { domain: "own".to_owned(), ..node(op, name, inputs, outputs) }
}

#[test]
fn functions_are_expanded_under_the_name_of_their_call() {
    let leaky = with(
        node("Transpose", "turn", &["a"], &["turned"]),
        "perm",
        reference("order", AttributeType::INTS),
    );
    let mut inner =
        function("Inner", &["a"], &["b"], vec![leaky, node("Relu", "", &["turned"], &["b"])]);
    inner.attribute.push("order".to_owned());
    let forwarded =
        with(call("Inner", "in", &["a"], &["h"]), "order", reference("order", AttributeType::INTS));
    let mut outer = function(
        "Outer",
        &["a", "unused"],
        &["b", "a"],
        vec![forwarded, node("Neg", "", &["h"], &["b"])],
    );
    outer.attribute.push("order".to_owned());
    let nodes = vec![
        with(call("Outer", "first", &["x"], &["y", "same"]), "order", ints(&[1, 0])),
        call("Outer", "second", &["same"], &["z"]),
    ];
    let graph = body(
        nodes,
        vec![],
        vec![floats("x", &["2", "3"])],
        vec![floats("y", &["3", "2"]), floats("z", &["3", "2"])],
    );
    let import = load(graph, vec![inner, outer]);
    assert_eq!(ops(&import), BTreeMap::from([("neg", 2), ("relu", 2), ("transpose", 2)]));
    assert!(names(&import).contains(&"first/in/turned"), "{:?}", names(&import));
    assert_eq!(import.outputs[0].ty.to_string(), "f32[3, 2]");
}

#[test]
fn functions_without_an_end_are_refused() {
    let input = || vec![floats("x", &["2"])];
    let output = || vec![floats("y", &["2"])];
    let one = function("One", &["a"], &["b"], vec![call("Two", "two", &["a"], &["b"])]);
    let two = function("Two", &["a"], &["b"], vec![call("One", "one", &["a"], &["b"])]);
    let graph = body(vec![call("One", "c", &["x"], &["y"])], vec![], input(), output());
    let message = refusal(graph.clone(), vec![one.clone(), two]);
    assert!(message.contains("c/two/one (One): the function calls itself"), "{message}");
    assert!(refusal(graph, vec![one.clone(), one]).contains("defined twice"));
    // Each level calls the one below twice: 2^40 nodes.
    let mut levels = vec![function("L0", &["a"], &["b"], vec![node("Relu", "", &["a"], &["b"])])];
    for level in 1..40 {
        let below = format!("L{}", level - 1);
        let calls = vec![call(&below, "", &["a"], &["h"]), call(&below, "", &["h"], &["b"])];
        levels.push(function(&format!("L{level}"), &["a"], &["b"], calls));
    }
    let graph = body(vec![call("L39", "c", &["x"], &["y"])], vec![], input(), output());
    assert!(refusal(graph, levels).contains("too large with its functions"));
}

fn branch(nodes: Vec<NodeProto>, output: &str) -> GraphProto {
    body(nodes, vec![tensor("own", FLOAT, &[2], &[1, 2])], vec![], vec![floats(output, &["2"])])
}

#[test]
fn the_branch_that_is_taken_is_imported() {
    for (condition, op) in [(1, "relu"), (0, "neg")] {
        let then = branch(
            vec![node("Add", "", &["x", "own"], &["s"]), node("Relu", "", &["s"], &["t"])],
            "t",
        );
        let other = branch(vec![node("Neg", "", &["x"], &["e"])], "e");
        let choice = node("If", "choice", &["c"], &["y"]);
        let choice = with(with(choice, "then_branch", graph(then)), "else_branch", graph(other));
        let graph = body(
            vec![choice],
            vec![tensor("c", BOOL, &[], &[condition])],
            vec![floats("x", &["2"])],
            vec![floats("y", &["2"])],
        );
        let import = load(graph, vec![]);
        assert!(ops(&import).contains_key(op), "{:?}", ops(&import));
        assert_eq!(import.parameters.len(), usize::from(condition == 1));
    }
}

/// A loop that multiplies by a weight of its body and keeps every value.
fn repeated(trips: Option<i64>, last: &[NodeProto], condition: &str) -> GraphProto {
    let mut nodes = vec![node("Mul", "times", &["v", "w"], &["v_out"])];
    nodes.extend_from_slice(last);
    let inner = body(
        nodes,
        vec![tensor("w", FLOAT, &[2], &[1, 2])],
        vec![value("i", INT64, &[]), value("c_in", BOOL, &[]), floats("v", &["2"])],
        vec![value(condition, BOOL, &[]), floats("v_out", &["2"]), floats("v_out", &["2"])],
    );
    // Each output has a name of its own.
    let inner = {
        let mut inner = inner;
        inner.node.push(node("Identity", "", &["v_out"], &["kept"]));
        inner.output[2] = floats("kept", &["2"]);
        inner
    };
    let count = if trips.is_some() { "m" } else { "" };
    let turn = with(node("Loop", "turn", &[count, "", "x"], &["y", "all"]), "body", graph(inner));
    body(
        vec![turn],
        trips.iter().map(|&trips| tensor("m", INT64, &[], &[trips])).collect(),
        vec![floats("x", &["2"])],
        vec![floats("y", &["2"]), floats("all", &["?", "2"])],
    )
}

#[test]
fn loops_are_unrolled_and_share_their_weights() {
    let import = load(repeated(Some(3), &[], "c_in"), vec![]);
    assert_eq!(ops(&import)["mul"], 3);
    assert_eq!(import.parameters.keys().collect::<Vec<_>>(), ["w"]);
    assert_eq!(import.outputs[1].ty.to_string(), "f32[3, 2]");
    assert!(names(&import).contains(&"turn/2/v_out"), "{:?}", names(&import));
    // Until i + 1 is no longer below 4.
    let ending =
        [constant("four", tensor("", INT64, &[], &[3])), node("Less", "", &["i", "four"], &["go"])];
    assert_eq!(ops(&load(repeated(None, &ending, "go"), vec![]))["mul"], 4);
    let none = load(repeated(Some(0), &[], "c_in"), vec![]);
    assert_eq!(none.outputs[1].ty.to_string(), "f32[0, 2]");
    for (graph, wanted) in [
        (repeated(None, &[], "c_in"), "turn: Loop (opset 17): a loop without an end"),
        (repeated(Some(5000), &[], "c_in"), "of 5000 iterations: at most 1024"),
        (
            repeated(
                Some(3),
                &[
                    node("ReduceMax", "", &["v"], &["top"]),
                    constant("zero", tensor("", FLOAT, &[1], &[0])),
                    node("Less", "", &["top", "zero"], &["go"]),
                ],
                "go",
            ),
            "the condition after iteration 0 is not known",
        ),
        (repeated(Some(3), &[], "nowhere"), "turn (Loop): input `nowhere` is not defined"),
    ] {
        let message = refusal(graph, vec![]);
        assert!(message.contains(wanted), "{message}");
    }
}

#[test]
fn scans_go_over_any_axis_in_either_direction() {
    let step = |backwards: i64, states: i64| {
        let inner = body(
            vec![node("Add", "", &["s", "part"], &["s_out"]), node("Relu", "", &["s_out"], &["o"])],
            vec![],
            vec![floats("s", &["2"]), floats("part", &["2"])],
            vec![floats("s_out", &["2"]), floats("o", &["2"])],
        );
        let scan =
            with(node("Scan", "scan", &["start", "x"], &["last", "all"]), "body", graph(inner));
        let scan = with(scan, "num_scan_inputs", int(states));
        let scan = with(scan, "scan_input_axes", ints(&[-1]));
        let scan = with(scan, "scan_output_axes", ints(&[1]));
        with(scan, "scan_input_directions", ints(&[backwards]))
    };
    let graph_of = |scan: NodeProto| {
        body(
            vec![scan],
            vec![],
            vec![floats("start", &["2"]), floats("x", &["2", "5"])],
            vec![floats("last", &["2"]), floats("all", &["2", "5"])],
        )
    };
    for backwards in [0, 1] {
        let import = load(graph_of(step(backwards, 1)), vec![]);
        assert_eq!(ops(&import)["add"], 5);
        assert_eq!(import.outputs[1].ty.to_string(), "f32[2, 5]");
        let first = import.graph.ids().find_map(|id| match import.graph.op(id) {
            Op::Slice { axis, start, .. } => Some((*axis, *start)),
            _ => None,
        });
        assert_eq!(first, Some((1, if backwards == 1 { 4 } else { 0 })));
    }
    for (scan, wanted) in [
        (step(2, 1), "a direction of 2"),
        (step(0, 9), "num_scan_inputs is Ok(Some(9))"),
        (step(0, -1), "num_scan_inputs"),
    ] {
        let message = refusal(graph_of(scan), vec![]);
        assert!(message.contains(wanted), "{message}");
    }
}

#[test]
fn constants_of_several_floats_are_weights_and_numbers_are_not() {
    let nodes = vec![
        constant("w", tensor("", FLOAT, &[2, 3], &[1, 2, 3, 4, 5, 6])),
        constant("half", tensor("", FLOAT, &[], &[5])),
        constant("one", tensor("", FLOAT, &[1, 1], &[5])),
        constant("shape", tensor("", INT64, &[2], &[3, 2])),
        node("MatMul", "", &["x", "w"], &["h"]),
        node("Mul", "", &["h", "half"], &["s"]),
        node("Mul", "", &["s", "number"], &["u"]),
        node("Add", "", &["u", "one"], &["v"]),
        node("Reshape", "", &["v", "shape"], &["y"]),
    ];
    let graph = || {
        body(
            nodes.clone(),
            vec![tensor("number", FLOAT, &[], &[7])],
            vec![floats("x", &["2", "2"])],
            vec![floats("y", &["3", "2"])],
        )
    };
    let trained = |train: &[&str], freeze: &[&str]| {
        let texts = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        let options =
            ImportOptions { train: texts(train), freeze: texts(freeze), ..Default::default() };
        let import = import(&model(graph(), vec![]), &options).expect("sound");
        import.parameters.into_keys().collect::<Vec<_>>()
    };
    assert_eq!(trained(&[], &[]), ["w"]);
    assert_eq!(trained(&["number"], &[]), ["number"]);
    assert_eq!(trained(&["op:Mul", "op:MatMul"], &[]), ["w"]);
    assert!(trained(&[], &["op:MatMul"]).is_empty());
    let warnings = load(graph(), vec![]).warnings;
    assert!(warnings.iter().any(|warning| warning.ends_with("number")), "{warnings:?}");
}

#[test]
fn carried_types_are_said_once_and_casts_wrap() {
    let nodes = vec![
        with(node("Cast", "", &["big"], &["small"]), "to", int(i64::from(UINT16))),
        node("Add", "", &["x", "small"], &["y"]),
    ];
    let graph = body(
        nodes,
        vec![tensor("big", INT64, &[3], &[-1, 65536 + 7, 5])],
        vec![value("x", UINT16, &["3"])],
        vec![value("y", UINT16, &["3"]), value("small", UINT16, &["3"])],
    );
    let import = load(graph, vec![]);
    assert_eq!(import.warnings.iter().filter(|text| text.contains("uint16")).count(), 1);
    assert_eq!(import.outputs[0].onnx_dtype, "uint16");
    assert_eq!(import.outputs[0].ty.to_string(), "i32[3]");
    let (_, small) = &import.graph.outputs()[1];
    match import.graph.op(*small) {
        Op::Const(tensor) => assert_eq!(tensor.to_i64(), [65535, 7, 5]),
        other => panic!("{}", other.name()),
    }
}

#[test]
fn question_marks_are_dimensions_of_their_own() {
    let graph = body(
        vec![node("Relu", "", &["x"], &["y"])],
        vec![],
        vec![floats("x", &["-1", "3", "?", "?"])],
        vec![floats("y", &["?", "3", "?", "?"])],
    );
    let bytes = model(graph, vec![]);
    match import(&bytes, &ImportOptions::default()) {
        Err(ImportError::MissingDims(dims)) => {
            let names: Vec<&str> = dims.iter().map(|dim| dim.name.as_str()).collect();
            assert_eq!(names, ["x.2", "x.3"]);
        }
        other => panic!("{other:?}"),
    }
    let dims = BTreeMap::from([("x.2".to_owned(), 48), ("x.3".to_owned(), 192)]);
    let import = import(&bytes, &ImportOptions { dims, ..Default::default() }).expect("sound");
    assert_eq!(import.inputs[0].ty.to_string(), "f32[N, 3, 48, 192]");
}

#[test]
fn a_batch_that_hinders_can_be_given_a_size() {
    let split = with(node("Split", "cut", &["x"], &["y", "z"]), "axis", int(0));
    let graph = body(
        vec![split],
        vec![],
        vec![floats("x", &["steps", "3"])],
        vec![floats("y", &["?", "3"]), floats("z", &["?", "3"])],
    );
    let message = refusal(graph, vec![]);
    assert!(message.contains("--dim steps=SIZE"), "{message}");
}

#[test]
fn everything_wrong_is_in_one_report_and_in_the_survey() {
    let nodes = vec![
        node("Frobnicate", "odd", &["x"], &["a"]),
        with(node("Transpose", "turn", &["x"], &["b"]), "perm", ints(&[0, 0])),
        node("Add", "sum", &["a", "b"], &["y"]),
        node("Relu", "loose", &["x"], &["unused"]),
        node("Sequence", "", &["x"], &["c"]),
    ];
    let graph = body(
        nodes,
        vec![],
        vec![floats("x", &["2", "3"])],
        vec![floats("y", &["2", "3"]), floats("c", &["2", "3"])],
    );
    let bytes = model(graph.clone(), vec![]);
    let message = refusal(graph, vec![]);
    for part in ["odd: Frobnicate (opset 17)", "turn (Transpose, opset 17)", "Sequence_4"] {
        assert!(message.contains(part), "no {part} in {message}");
    }
    let survey = survey(&bytes, &ImportOptions::default()).expect("a model");
    let verdict = |name: &str| {
        survey.nodes.iter().find(|node| node.node == name).map(|node| node.verdict.clone())
    };
    assert!(matches!(verdict("odd"), Some(Verdict::Refused(_))));
    assert!(matches!(verdict("turn"), Some(Verdict::Refused(_))));
    assert_eq!(verdict("sum"), Some(Verdict::Blocked));
    assert_eq!(verdict("loose"), Some(Verdict::Unused));
}
