//! Bytes from strangers: whatever they are, reading them ends soon, with a result or an error.

use crate::support::{Random, root};
use qcompile_onnx::{ImportOptions, import};
use qcompile_passes::{attach_loss, differentiate, quantize, simplify};
use qcompile_plan::{BuildOptions, Plan, build};

/// A protobuf field of bytes.
fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![number << 3 | 2];
    bytes.extend(varint(content.len() as u64));
    bytes.extend(content);
    bytes
}

/// A protobuf field of a number.
fn number(field: u8, value: u64) -> Vec<u8> {
    let mut bytes = vec![field << 3];
    bytes.extend(varint(value));
    bytes
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// A float value of ONNX; 0 stands for the batch.
fn value(name: &str, dims: &[u64]) -> Vec<u8> {
    let dim = |&size: &u64| field(1, &if size == 0 { field(2, b"N") } else { number(1, size) });
    let shape: Vec<u8> = dims.iter().flat_map(dim).collect();
    let ty = field(1, &[number(1, 1), field(2, &shape)].concat());
    [field(1, name.as_bytes()), field(2, &ty)].concat()
}

fn node(op: &str, name: &str, inputs: &[&str], outputs: &[&str]) -> Vec<u8> {
    let inputs = inputs.iter().flat_map(|input| field(1, input.as_bytes()));
    let outputs = outputs.iter().flat_map(|output| field(2, output.as_bytes()));
    let mut bytes: Vec<u8> = inputs.chain(outputs).collect();
    bytes.extend(field(3, name.as_bytes()));
    bytes.extend(field(4, op.as_bytes()));
    bytes
}

fn weight(name: &str, dims: &[u64], values: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = dims.iter().flat_map(|&dim| number(1, dim)).collect();
    bytes.extend(number(2, 1));
    bytes.extend(field(8, name.as_bytes()));
    bytes.extend(field(9, &0.5_f32.to_le_bytes().repeat(values)));
    bytes
}

/// A model of opset 17 with input `x` [N, 4] and output `y`.
fn model(nodes: &[Vec<u8>], weights: &[Vec<u8>]) -> Vec<u8> {
    let mut graph: Vec<u8> = nodes.iter().flat_map(|node| field(1, node)).collect();
    graph.extend(field(2, b"g"));
    graph.extend(weights.iter().flat_map(|weight| field(5, weight)));
    graph.extend(field(11, &value("x", &[0, 4])));
    graph.extend(field(12, &value("y", &[0, 3])));
    [number(1, 8), field(8, &number(2, 17)), field(7, &graph)].concat()
}

/// A small network that is as it should be.
fn sound_model() -> Vec<u8> {
    model(
        &[
            node("MatMul", "MatMul_0", &["x", "w"], &["h"]),
            node("Add", "Add_1", &["h", "b"], &["s"]),
            node("Relu", "Relu_2", &["s"], &["y"]),
        ],
        &[weight("w", &[4, 3], 12), weight("b", &[3], 3)],
    )
}

fn error(bytes: &[u8]) -> String {
    match import(bytes, &ImportOptions::default()) {
        Ok(_) => panic!("the model is accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn faults_of_a_model_are_reported_with_their_place() {
    import(&sound_model(), &ImportOptions::default()).expect("sound");
    let w = || weight("w", &[4, 3], 12);
    let cycle =
        [node("Add", "first", &["x", "b"], &["a"]), node("Add", "second", &["a", "y"], &["y"])];
    for (bytes, wanted) in [
        (model(&cycle, &[weight("b", &[4], 4)]), vec!["second (Add)", "cycle"]),
        (
            model(&[node("MatMul", "product", &["x", "w"], &["y"])], &[]),
            vec!["product (MatMul)", "`w`"],
        ),
        (
            model(&[node("MatMul", "product", &["x", "w"], &["y"])], &[weight("w", &[5, 3], 15)]),
            vec!["product (MatMul", "do not fit"],
        ),
        (
            model(&[node("MatMul", "product", &["x", "w"], &["y"])], &[weight("w", &[4, 3], 11)]),
            vec!["initializer w", "44 bytes"],
        ),
        (
            model(&[node("MatMul", "product", &["x", "w"], &["y"])], &[w(), w()]),
            vec!["initializer w", "twice"],
        ),
        (
            model(&[node("Relu", "one", &["x"], &["y"]), node("Relu", "two", &["x"], &["y"])], &[]),
            vec!["two (Relu)", "`y` is defined twice"],
        ),
        (model(&[node("Frobnicate", "odd", &["x"], &["y"])], &[]), vec!["odd", "Frobnicate"]),
        (model(&[node("Relu", "none", &[], &["y"])], &[]), vec!["none (Relu"]),
        (model(&[node("Relu", "lost", &["x"], &["z"])], &[]), vec!["output y", "not defined"]),
        (Vec::new(), vec!["empty"]),
        (vec![0x0a], vec!["byte 1"]),
    ] {
        let message = error(&bytes);
        for part in wanted {
            assert!(message.contains(part), "no {part:?} in: {message}");
        }
    }
}

/// Goes as far with the bytes as a training step goes.
fn compile(bytes: &[u8]) -> bool {
    let Ok(imported) = import(bytes, &ImportOptions::default()) else { return false };
    let mut graph = imported.graph;
    qcompile_ir::verify(&graph).expect("what is imported verifies");
    let options = simplify::Options { keep_stop_gradient: true };
    simplify::run(&mut graph, &options).expect("simplifies");
    let kind = attach_loss::LossKind::Mse;
    if attach_loss::run(&mut graph, &attach_loss::Options { kind }).is_err() {
        return false;
    }
    let precision = quantize::PrecisionChoice::Int8;
    quantize::run(&mut graph, &quantize::Options { precision, ..quantize::Options::default() })
        .expect("quantizes");
    if differentiate::run(&mut graph).is_err() {
        return false;
    }
    quantize::optimise(&mut graph).expect("optimises");
    qcompile_ir::verify(&graph).expect("what is compiled verifies");
    build(graph, &BuildOptions::default()).is_ok()
}

#[test]
fn every_changed_byte_of_a_small_model_is_survived() {
    let bytes = sound_model();
    assert!(compile(&bytes));
    let mut accepted = 0;
    for at in 0..bytes.len() {
        for change in [0x01, 0x80, 0x07, 0xff] {
            let mut changed = bytes.clone();
            changed[at] ^= change;
            accepted += usize::from(compile(&changed));
        }
        compile(&bytes[..at]);
    }
    assert!(accepted > 0, "changes in weights and names are no faults");
}

#[test]
fn changed_and_cut_models_are_survived() {
    let mut random = Random::new(3);
    for name in ["digits_cnn", "resnet8", "tiny_gpt"] {
        let path = root().join("models").join(name).with_extension("onnx");
        let bytes = std::fs::read(path).expect("committed");
        for _ in 0..60 {
            let mut changed = bytes.clone();
            for _ in 0..=random.below(4) {
                // Most bytes are weights; structure stands at the beginning of each message.
                let at = random.below(bytes.len());
                changed[at] ^= 1 << random.below(8);
            }
            let _ = import(&changed, &ImportOptions::default());
            let cut = random.below(bytes.len());
            assert!(import(&bytes[..cut], &ImportOptions::default()).is_err());
        }
        // Only structure: everything but long runs of bytes within one message.
        for at in (0..bytes.len().min(4000)).step_by(7) {
            let mut changed = bytes.clone();
            changed[at] = changed[at].wrapping_add(1);
            let _ = import(&changed, &ImportOptions::default());
        }
    }
}

#[test]
fn ten_megabytes_of_junk_are_refused_soon() {
    const SIZE: usize = 10 << 20;
    let empty_nodes = field(1, &[]).repeat(SIZE / 2);
    // Graph in attribute in node, two hundred times, around ten megabytes.
    let mut nested = vec![0_u8; SIZE];
    let mut wrapping = Vec::new();
    for _ in 0..200 {
        for number in [6_u8, 5, 1] {
            let length = varint((nested.len() + wrapping.len()) as u64);
            wrapping.splice(..0, [vec![number << 3 | 2], length].concat());
        }
    }
    nested.splice(..0, wrapping);
    let zeros = vec![0; SIZE];
    let ones = vec![0xff; SIZE];
    let text = b"qcompile ".repeat(SIZE / 9);
    let unknown = number(15, 1).repeat(SIZE / 2);
    let wide = node("Sum", "sum", &vec!["x"; SIZE / 3], &["y"]);
    let deep: Vec<Vec<u8>> = (0..150_000)
        .map(|at| {
            let (from, to) = (format!("v{at}"), format!("v{}", at + 1));
            node(
                "Relu",
                "",
                &[if at == 0 { "x" } else { &from }],
                &[if at == 149_999 { "y" } else { &to }],
            )
        })
        .collect();
    for (name, bytes) in [
        ("empty nodes", field(7, &empty_nodes)),
        ("nested", field(7, &nested)),
        ("zeros", zeros),
        ("ones", ones),
        ("text", text),
        ("unknown", field(7, &unknown)),
        ("wide", model(&[wide], &[])),
        (
            "huge tensor",
            model(
                &[node("MatMul", "m", &["x", "w"], &["y"])],
                &[weight("w", &[1 << 40, 1 << 40], 0)],
            ),
        ),
    ] {
        assert!(import(&bytes, &ImportOptions::default()).is_err(), "{name} is accepted");
    }
    // This is valid; it only must not take forever.
    let imported = import(&model(&deep, &[]), &ImportOptions::default()).expect("a long chain");
    assert!(imported.graph.len() >= 150_000);
}

/// Passes do little for each node, however the nodes hang together.
#[test]
fn long_and_wide_graphs_compile_in_time() {
    let deep: Vec<Vec<u8>> = (0..20_000)
        .map(|at| {
            let (from, to) = (format!("v{at}"), format!("v{}", at + 1));
            let (from, to) =
                (if at == 0 { "x" } else { &from }, if at == 19_999 { "y" } else { &to });
            node(["Relu", "Neg"][at % 2], "", &[from], &[to])
        })
        .collect();
    let product = node("MatMul", "", &["x", "w"], &["h"]);
    let sum = node("Sum", "", &vec!["h"; 20_000], &["y"]);
    for model in [model(&deep, &[]), model(&[product, sum], &[weight("w", &[4, 3], 12)])] {
        compile(&model);
    }
}

const GRAPH: &str = "graph @g {
  input %x : f32[N, 8]
  input %label : i64[N]
  param %w : f32[8, 4] = uniform seed=7
  state %m : f32[8, 4] = splat 0
  const %s : f32[] = 0.01
forward:
  %x.q : i8[N, 8] = quantize %x, %s i8
  %x.dq : f32[N, 8] = dequantize %x.q, %s
  %w.q : i8[8, 4] = quantize %w, %s i8
  %w.dq : f32[8, 4] = dequantize %w.q, %s
  %y : f32[N, 4] = matmul %x.dq, %w.dq
  %z : f32[N, 4] = relu %y
  %loss : f32[N] = cross_entropy %z, %label
backward:
  %g : f32[8, 4] = matmul %x.dq, %z transpose_a
comm:
  %g.mean : f32[8, 4] = all_reduce %g mean
update:
  %w.next : f32[8, 4] = sub %w, %g.mean
  return %loss, %z
  next %w = %w.next
  next %m = %g.mean
}
";

const EVALUATION: &str = "graph @g {
  input %x : f32[N, 8]
  param %w : f32[8, 4] = uniform seed=7
forward:
  %y : f32[N, 4] = matmul %x, %w
  return %y
}
";

/// CRC-32 as in zip, bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            crc >> 1 ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    })
}

/// Where the first section begins.
const FIRST_SECTION: u64 = 192;

/// A file of these sections with every checksum right.
fn file(sections: [&[u8]; 5]) -> Vec<u8> {
    let mut header = b"\x89QPLAN\r\n\x01\0\0\0\x05\0\0\0".to_vec();
    let mut body: Vec<u8> = Vec::new();
    let mut table: Vec<u8> = Vec::new();
    for (kind, section) in (0_u32..).zip(sections) {
        table.extend(kind.to_le_bytes());
        table.extend(crc32(section).to_le_bytes());
        table.extend((FIRST_SECTION + body.len() as u64).to_le_bytes());
        table.extend((section.len() as u64).to_le_bytes());
        body.extend(section);
        body.resize(body.len().next_multiple_of(64), 0);
    }
    header.extend((FIRST_SECTION + body.len() as u64).to_le_bytes());
    header.extend(table);
    header.extend(crc32(&header).to_le_bytes());
    header.resize(FIRST_SECTION as usize, 0);
    header.extend(body);
    header
}

/// The sections of a file.
fn sections(bytes: &[u8]) -> [Vec<u8>; 5] {
    [0, 1, 2, 3, 4].map(|section| {
        let long = |at: usize| {
            let bytes = bytes[at..at + 8].try_into().expect("eight");
            usize::try_from(u64::from_le_bytes(bytes)).expect("small")
        };
        let (start, length) = (long(24 + 24 * section + 8), long(24 + 24 * section + 16));
        bytes[start..start + length].to_vec()
    })
}

fn plan_file() -> Vec<u8> {
    let plan = |source: &str| {
        let graph = qcompile_ir::text::parse(source, &|_| None).expect("parses");
        build(graph, &BuildOptions::default()).expect("builds")
    };
    let evaluation = Some(plan(EVALUATION));
    plan(GRAPH).with_evaluation(evaluation).expect("fits").to_bytes()
}

#[test]
fn every_changed_or_missing_byte_of_a_plan_is_found() {
    let bytes = plan_file();
    let parts = sections(&bytes);
    assert!(
        file([&parts[0], &parts[1], &parts[2], &parts[3], &parts[4]]) == bytes,
        "the file is as documented"
    );
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 0x10;
        assert!(Plan::from_bytes(&changed).is_err(), "a change at byte {at} is not noticed");
        assert!(Plan::from_bytes(&bytes[..at]).is_err(), "an end at byte {at} is not noticed");
    }
}

#[test]
fn a_forged_plan_is_checked_like_any_other() {
    let parts = sections(&plan_file());
    let mut random = Random::new(11);
    for _ in 0..1500 {
        let mut forged = parts.clone();
        for _ in 0..=random.below(3) {
            let section = &mut forged[random.below(5)];
            if section.is_empty() {
                continue;
            }
            let at = random.below(section.len());
            match random.below(4) {
                0 => section[at] ^= 1 << random.below(8),
                1 => section.truncate(at),
                2 => section[at] = *random.pick(b"0189N%[],.:=\n"),
                _ => {
                    let to = random.below(section.len());
                    let part = section[at..(at + random.below(30)).min(section.len())].to_vec();
                    section.splice(to..to, part);
                }
            }
        }
        let bytes = file([&forged[0], &forged[1], &forged[2], &forged[3], &forged[4]]);
        if let Ok(plan) = Plan::from_bytes(&bytes) {
            // What is accepted is a plan like any other.
            Plan::from_bytes(&plan.to_bytes()).expect("its own file");
        }
    }
}

#[test]
fn a_forged_plan_is_refused_within_limits() {
    let parts = sections(&plan_file());
    let plan = |graph: &str| Plan::from_bytes(&file([&parts[0], graph.as_bytes(), &[], &[], &[]]));
    let mut chain = "graph @g {\n  input %v0 : f32[2, 2]\nforward:\n".to_owned();
    for at in 0..60_000 {
        chain += &format!("  %v{} : f32[2, 2] = softmax %v{at}\n", at + 1);
    }
    chain += "  return %v60000\n}\n";
    let message = plan(&chain).expect_err("too many kernels").to_string();
    assert!(message.contains("kernels"), "{message}");
    // An evaluation form runs on what the plan has.
    let evaluation = |graph: &str| {
        let parts = parts.each_ref().map(Vec::as_slice);
        Plan::from_bytes(&file([parts[0], parts[1], graph.as_bytes(), parts[3], parts[4]]))
    };
    evaluation(EVALUATION).expect("it does");
    for (from, to) in
        [("param %w", "param %v"), ("[N, 8]", "[N, 8, 1]"), ("f32[8, 4] =", "f32[4, 8] =")]
    {
        assert!(evaluation(&EVALUATION.replace(from, to)).is_err(), "{from} as {to}");
    }
    for (graph, wanted) in [
        ("graph @g {\n  const %a : f32[9999999999] = splat 1\n}\n", "too large"),
        (
            "graph @g {\n  input %a : f32[0, 1099511627776, 1099511627776]\n  return %a\n}\n",
            "too large",
        ),
        (
            "graph @g {\n  input %a : f32[4]\nupdate:\n  %b : f32[4] = all_reduce %a sum\n  return %b\n}\n",
            "all_reduce is not allowed",
        ),
        ("graph @g {\n  param %a : f32[2] = #0123456789abcdef\n}\n", "no tensor"),
    ] {
        let message = plan(graph).expect_err("refused").to_string();
        assert!(message.contains(wanted), "{message}");
    }
}
