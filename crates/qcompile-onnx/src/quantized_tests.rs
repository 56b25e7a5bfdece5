//! Weights that a model holds as integers, and the scales of quantization.

use crate::tests::{FLOAT, body, floats, int, model, node, tensor, with};
use crate::{Import, ImportOptions, import};
use onnx_protobuf::{NodeProto, TensorProto};
use qcompile_ir::{Graph, Op};

const INT8: i32 = 3;

fn scale(values: &[f32]) -> TensorProto {
    let mut proto = tensor("s", FLOAT, &[values.len() as i64], &[]);
    proto.float_data = values.to_vec();
    proto
}

/// `x · dequantize(w, s, z)` with codes of two rows, and more nodes.
fn product(codes: &[i64], more: Vec<NodeProto>, train: &[&str], freeze: &[&str]) -> Import {
    let dequantize = with(node("DequantizeLinear", "d", &["w", "s", "z"], &["v"]), "axis", int(0));
    let mut nodes = vec![dequantize, node("MatMul", "m", &["x", "v"], &["y"])];
    nodes.extend(more);
    let weights = vec![
        tensor("w", INT8, &[2, 3], codes),
        scale(&[0.5, 0.25]),
        tensor("z", INT8, &[2], &[0, 0]),
    ];
    let mut outputs = vec![floats("y", &["N", "3"])];
    outputs.extend(nodes[2..].iter().map(|node| floats(&node.output[0], &["2", "3"])));
    let graph = body(nodes, weights, vec![floats("x", &["N", "2"])], outputs);
    let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
    let options =
        ImportOptions { train: words(train), freeze: words(freeze), ..ImportOptions::default() };
    import(&model(graph, vec![]), &options).expect("sound")
}

fn parameters(import: &Import) -> Vec<(String, Vec<f64>)> {
    let graph = &import.graph;
    let params = graph.leaves(|op| matches!(op, Op::Param(_)));
    let value = |id| match graph.op(id) {
        Op::Param(tensor) => (graph.node(id).name.as_str().to_owned(), tensor.to_f64()),
        _ => unreachable!("a parameter"),
    };
    params.into_iter().map(value).collect()
}

fn operands(graph: &Graph, name: &str) -> Vec<usize> {
    let of_name = |id: &qcompile_ir::NodeId| graph.op(*id).name() == name;
    graph.ids().filter(of_name).map(|id| graph.operands(id).len()).collect()
}

#[test]
fn a_weight_in_integers_is_trained_from_what_it_means() {
    let import = product(&[1, -2, 127, 4, 0, -127], vec![], &[], &[]);
    let wanted = vec![0.5, -1.0, 63.5, 1.0, 0.0, -31.75];
    assert_eq!(parameters(&import), [("w".to_owned(), wanted)]);
    // Symmetric, so that products run on integers.
    assert_eq!(operands(&import.graph, "quantize"), [2]);
    assert_eq!(operands(&import.graph, "dequantize"), [2]);
    // But -128 is a code of ONNX's range alone.
    let import = product(&[1, -2, 127, 4, 0, -128], vec![], &[], &[]);
    assert_eq!(operands(&import.graph, "quantize"), [3]);
    assert_eq!(operands(&import.graph, "dequantize"), [3]);
}

#[test]
fn integers_that_others_read_or_that_are_frozen_stay() {
    let codes = [1, -2, 127, 4, 0, -127];
    let cast = with(node("Cast", "c", &["w"], &["f"]), "to", int(i64::from(FLOAT)));
    for import in [
        product(&codes, vec![cast], &[], &[]),
        product(&codes, vec![], &[], &["w"]),
        product(&codes, vec![], &["s"], &[]),
    ] {
        assert!(parameters(&import).iter().all(|(name, _)| name != "w"), "{}", import.graph);
        assert_eq!(operands(&import.graph, "quantize"), [] as [usize; 0]);
        assert_eq!(operands(&import.graph, "dequantize"), [2]);
    }
}

/// `x · w` as ONNX Runtime's dynamic quantization writes it, with the product of the scales under this name.
fn dynamic_model(scale: &str, columns: TensorProto, outputs: &[&str]) -> Vec<u8> {
    let nodes = vec![
        node("DynamicQuantizeLinear", "q", &["x"], &["xq", "xs", "p.a"]),
        node("Mul", "scales", &["xs", scale], &["xw"]),
        node("MatMulInteger", "m", &["xq", "w", "p.a", "z"], &["p"]),
        with(node("Cast", "c", &["p"], &["f"]), "to", int(i64::from(FLOAT))),
        node("Mul", "s", &["f", "xw"], &["y"]),
    ];
    let weights = vec![
        tensor("w", INT8, &[2, 3], &[1, -2, 127, 4, 0, -127]),
        columns,
        tensor("z", INT8, &[3], &[0, 0, 0]),
    ];
    let outputs = outputs.iter().map(|name| floats(name, &["N", "3"])).collect();
    model(body(nodes, weights, vec![floats("x", &["N", "2"])], outputs), vec![])
}

fn dynamic(scale: &str, columns: TensorProto, outputs: &[&str]) -> Import {
    import(&dynamic_model(scale, columns, outputs), &ImportOptions::default()).expect("sound")
}

fn scale_of_columns() -> TensorProto {
    scale(&[0.5, 0.25, 1.0])
}

#[test]
fn products_of_dynamic_quantization_are_of_dequantized_values() {
    let import = dynamic("s", scale_of_columns(), &["y"]);
    let wanted = vec![0.5, -0.5, 127.0, 2.0, 0.0, -127.0];
    assert_eq!(parameters(&import), [("w".to_owned(), wanted)]);
    assert_eq!(operands(&import.graph, "dequantize").len(), 2, "{}", import.graph);
    assert!(import.graph.ids().all(|id| import.graph.ty(id).dtype != qcompile_ir::DType::I32));
    // With other scales, one that is none, or where something else reads the floats, it stays as it is.
    let mut row = scale_of_columns();
    row.dims = vec![1, 3];
    for import in [
        dynamic("xs", scale_of_columns(), &["y"]),
        dynamic("s", scale_of_columns(), &["y", "f"]),
        dynamic("s", scale(&[0.5, -0.25, 1.0]), &["y"]),
        dynamic("s", scale(&[0.5, 0.0, 1.0]), &["y"]),
        dynamic("s", row, &["y"]),
    ] {
        assert!(parameters(&import).iter().all(|(name, _)| name != "w"), "{}", import.graph);
        assert_eq!(operands(&import.graph, "dequantize"), [] as [usize; 0]);
    }
}

#[test]
fn a_survey_tells_of_the_nodes_that_dynamic_quantization_wrote() {
    let bytes = dynamic_model("s", scale_of_columns(), &["y"]);
    let survey = crate::survey(&bytes, &ImportOptions::default()).expect("sound");
    let told: Vec<(&str, &str, bool)> = survey
        .nodes
        .iter()
        .map(|node| {
            (node.node.as_str(), node.op.as_str(), node.verdict == crate::Verdict::Imported)
        })
        .collect();
    let wanted = [
        ("q", "DynamicQuantizeLinear", true),
        ("m", "MatMulInteger", true),
        ("c", "Cast", true),
        ("s", "Mul", true),
        // The product of the scales.
        ("scales", "Mul", false),
    ];
    assert_eq!(told, wanted);
    let product = survey.nodes.iter().find(|node| node.op == "MatMulInteger").expect("told");
    let result = survey.graph.node(product.results[0]);
    assert_eq!(result.op.name(), "matmul", "{}", survey.graph);
}

#[test]
fn integers_that_are_read_in_two_ways_stay() {
    let codes = [1, -2, 127, 4, 0, -127];
    let again = |parameters: &[&str]| {
        let inputs: Vec<&str> = std::iter::once("w").chain(parameters.iter().copied()).collect();
        with(node("DequantizeLinear", "e", &inputs, &["f"]), "axis", int(0))
    };
    let same = product(&codes, vec![again(&["s", "z"])], &[], &[]);
    assert!(parameters(&same).iter().any(|(name, _)| name == "w"), "{}", same.graph);
    // Without its zero point it is read in another way, though zeros change nothing.
    let other = product(&codes, vec![again(&["s"])], &[], &[]);
    assert!(parameters(&other).iter().all(|(name, _)| name != "w"), "{}", other.graph);
}

#[test]
fn a_weight_in_blocks_is_trained_under_its_own_shape() {
    let attributes = |node| with(with(node, "axis", int(0)), "block_size", int(2));
    let nodes = vec![
        attributes(node("DequantizeLinear", "d", &["w", "s"], &["v"])),
        node("MatMul", "m", &["x", "v"], &["y"]),
    ];
    let mut scales = tensor("s", FLOAT, &[2, 2], &[]);
    scales.float_data = vec![0.5, 0.25, 2.0, 1.0];
    let weights = vec![tensor("w", INT8, &[4, 2], &[1, 2, 3, 4, 5, 6, 7, 8]), scales];
    let graph =
        body(nodes, weights, vec![floats("x", &["N", "4"])], vec![floats("y", &["N", "2"])]);
    let import = import(&model(graph, vec![]), &ImportOptions::default()).expect("sound");
    let wanted = vec![0.5, 0.5, 1.5, 1.0, 10.0, 6.0, 14.0, 8.0];
    assert_eq!(parameters(&import), [("w".to_owned(), wanted)]);
    assert_eq!(operands(&import.graph, "quantize").len(), 1, "{}", import.graph);
}

#[test]
fn a_scale_is_trained_if_it_is_named() {
    let import = product(&[1, -2, 127, 4, 0, -127], vec![], &["s", "w"], &[]);
    let mut names: Vec<String> = parameters(&import).into_iter().map(|(name, _)| name).collect();
    names.sort_unstable();
    assert_eq!(names, ["s", "w"]);
    // Held above 0, once for both.
    assert_eq!(operands(&import.graph, "max"), [2]);
}
