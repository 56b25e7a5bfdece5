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
