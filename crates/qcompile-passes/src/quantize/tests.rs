//! The whole pass, and every rule by its file test.

use super::rules::rules;
use super::window::optimise_by;
use super::*;
use qcompile_ir::text::parse;
use std::fs;
use std::path::PathBuf;

fn graph(source: &str) -> Graph {
    parse(source, &|_| None).expect("parses")
}

fn file(rule: &str) -> String {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let path = root.join("../../tests/filetests/quantize").join(format!("{rule}.qir"));
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// What the file wants to see in the result.
fn wants(source: &str) -> Vec<&str> {
    source.lines().filter_map(|line| line.strip_prefix("; want: ")).collect()
}

fn optimised(source: &str, without: &str) -> String {
    let mut rules = rules();
    let reverse = format!("{without}-rev");
    rules.retain(|rule| rule.name.as_str() != without && rule.name.as_str() != reverse);
    let mut graph = graph(source);
    let moves = optimise_by(&mut graph, &rules).expect("optimises");
    assert_eq!(moves.unsaturated, 0, "{source}");
    graph.to_string()
}

#[test]
fn every_rule_does_what_its_file_wants_and_nothing_else_does() {
    for rule in rule_names() {
        let source = file(&rule);
        assert!(!wants(&source).is_empty(), "{rule} wants nothing");
        let with = optimised(&source, "");
        for want in wants(&source) {
            assert!(with.contains(want), "{rule}: no `{want}` in\n{with}");
        }
        let without = optimised(&source, &rule);
        assert_ne!(with, without, "{rule} is not needed for its file");
        assert_eq!(with, optimised(&source, ""), "{rule}: equal input, equal output");
        assert_eq!(with, optimised(&with, ""), "{rule}: a second run changes nothing");
    }
}

#[test]
fn what_many_share_is_built_once() {
    let quantized = |rule: &str| optimised(&file(rule), "").matches("= quantize").count();
    // Seven slices, each cheapest by itself; a form for the forward pass and one for the backward pass.
    assert_eq!(quantized("shared-by-many"), 1);
    assert_eq!(quantized("forward-and-backward-share"), 1);
}

/// What `decide` says of a graph with these options.
fn decided(source: &str, options: &Options) -> Result<Vec<Decision>, String> {
    decide(&mut graph(source), options).map_err(|error| error.to_string())
}

/// Attention on inputs, with codes of the model's own for keys, and a recurrent layer from a state of 0.
fn products(attention: &str, recurrence: &str) -> String {
    format!(
        "graph @g {{
  input %q : f32[N, 6, 2, 4]
  input %u : u8[N, 6, 2, 4]
  input %x : f32[5, N, 16]
  param %r : f32[16, 4] = uniform seed=1
  const %scale : f32[] = 0.5
  const %zero : f32[] = 0
forward:
  %k : f32[N, 6, 2, 4] = dequantize %u, %scale
  %a : f32[N, 6, 2, 4] = attention {attention}
  %start : f32[N, 4] = broadcast %zero
  %y : f32[6, 6, N, 4] = recurrence %x, %r, %start, %start lstm activations=[sigmoid, tanh, {recurrence}
  return %a, %y
}}"
    )
}

const PLAIN: [&str; 2] = ["%q, %q, %q", "tanh]"];

#[test]
fn notes_that_no_kernel_does_are_refused() {
    let [attention, recurrence] = PLAIN;
    let int8 = "!precision(forward=i8, grad_input=f32, grad_weight=f32, mean=f32, update=f32)";
    let back = int8.replace("grad_input=f32", "grad_input=i8");
    let weight = int8.replace("grad_weight=f32", "grad_weight=i8");
    let float8 = int8.replace("forward=i8", "forward=f8e4m3");
    let tensor = "!quantizer(weight=i8, granularity=tensor, rounding=nearest, scaling=current)";
    let noted = |note: &str| products(&format!("{attention} {note}"), recurrence);
    let both = back.replace("grad_weight=f32", "grad_weight=i8");
    let coarse = both.replace("i8, grad_weight=i8", "i4, grad_weight=i4");
    let stochastic =
        "!quantizer(weight=i8, granularity=channel, rounding=stochastic, scaling=current)";
    let recurrent = |rest: &str, note: &str| products(attention, &format!("{rest} {note}"));
    let options = Options::default();
    let at_random = [
        noted(&format!("{both} {stochastic}")),
        recurrent(recurrence, &format!("{back} {stochastic}")),
    ];
    let nearest = [noted(&both), recurrent(recurrence, &both), recurrent(recurrence, &back)];
    for sound in nearest.into_iter().chain(at_random) {
        assert!(decided(&sound, &options).is_ok() && insert(&mut graph(&sound)).is_ok(), "{sound}");
    }
    let sound = decided(&noted(int8), &options).expect("has a kernel");
    assert_eq!(sound[1].reason, "the graph notes it");
    assert!(decided(&recurrent(recurrence, int8), &options).is_ok());
    for (source, reason) in [
        (noted(&back), "both gradients of a product of two activations"),
        (noted(&weight), "both gradients of a product of two activations"),
        (noted(&coarse), "gradients of attention have no i4 codes"),
        (noted(&float8), "no f8e4m3 codes"),
        (products(&format!("%q, %k, %q {int8}"), recurrence), "the codes that the model has"),
        (recurrent(recurrence, &float8), "no kernel for f8e4m3"),
        (recurrent(recurrence, &coarse), "no kernel for i4 codes"),
        (recurrent(recurrence, &format!("{int8} {tensor}")), "each row of a gate"),
        (recurrent("relu]", int8), "exceed 1"),
    ] {
        let refused = decided(&source, &options).expect_err(reason);
        assert!(refused.contains("the notes of") && refused.contains(reason), "{refused}");
        // Inserting by notes alone refuses them, too.
        assert!(insert(&mut graph(&source)).is_err(), "{reason}");
    }
    let ranged = Options { ranged: true, ..options };
    for source in [noted(int8), recurrent(recurrence, int8)] {
        assert!(decided(&source, &ranged).is_err(), "{source}");
    }
}

#[test]
fn what_no_kernel_does_is_listed_with_its_reason() {
    let int8 = Options { precision: PrecisionChoice::Int8, ..Options::default() };
    let told = |source: &str, options: &Options| -> Vec<(bool, bool, String)> {
        let decided = decided(source, options).expect("decides");
        let told = |one: Decision| (one.precision.is_quantized(), one.impossible, one.reason);
        decided.into_iter().map(told).collect()
    };
    let [attention, recurrence] = PLAIN;
    let all = told(&products(attention, recurrence), &int8);
    assert!(all.iter().all(|(low, impossible, _)| *low && !impossible), "{all:?}");
    let own = told(&products("%q, %k, %q", recurrence), &int8);
    assert!(!own[1].0 && own[1].1 && own[1].2.ends_with("for it in u"), "{own:?}");
    let ranged = Options { ranged: true, ..int8.clone() };
    let ranged = told(&products(attention, recurrence), &ranged);
    assert!(ranged.iter().all(|(low, impossible, _)| !low && *impossible), "{ranged:?}");
    // The way back alone, of states that codes could not hold.
    let operations = Operations { forward: false, ..Operations::default() };
    let alone = Options { operations, ..int8.clone() };
    let backward = told(&products(attention, "relu]"), &alone);
    assert!(backward.iter().all(|(low, impossible, _)| *low && !impossible), "{backward:?}");
    let rounding = qcompile_ir::GradientRounding::Stochastic;
    let stochastic = Options { numerics: Numerics { rounding, ..int8.numerics }, ..alone };
    let stochastic = told(&products(attention, recurrence), &stochastic);
    assert!(stochastic.iter().all(|(low, impossible, _)| *low && !impossible), "{stochastic:?}");
    let types = OperandTypes { gradient: qcompile_ir::DType::I4, ..int8.numerics.types };
    let numerics = Numerics { types, ..int8.numerics };
    let forward = told(&products(attention, recurrence), &Options { numerics, ..int8.clone() });
    let told_so = |reason: &str| reason.contains("not on the way back");
    assert!(forward.iter().all(|(low, _, reason)| *low && told_so(reason)), "{forward:?}");
    let kept = Options { keep_f32: vec!["a".to_owned(), "y".to_owned()], ranged: true, ..int8 };
    let kept = told(&products(attention, recurrence), &kept);
    assert!(kept.iter().all(|(low, impossible, _)| !low && !impossible), "{kept:?}");
}
