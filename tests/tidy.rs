//! Invariants of the source itself.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the workspace")
}

/// Every file under `folder` with this extension, in order.
fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut stack = vec![folder.to_owned()];
    while let Some(at) = stack.pop() {
        for entry in fs::read_dir(&at).expect("a folder of the workspace").map(Result::unwrap) {
            let path = entry.path();
            if path.is_dir() {
                stack.push(path);
            } else if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn sources() -> Vec<PathBuf> {
    let mut sources = files(&root().join("crates"), "rs");
    sources.extend(files(&root().join("tests"), "rs"));
    assert!(sources.len() > 50, "only {} sources were found", sources.len());
    sources
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// An arrow means "may name". The order is that in which data flows.
const DEPENDENCIES: &[(&str, &[&str])] = &[
    ("qcompile-ir", &[]),
    ("qcompile-onnx", &["qcompile-ir"]),
    ("qcompile-passes", &["qcompile-ir"]),
    ("qcompile-plan", &["qcompile-ir"]),
    ("qcompile-kernels", &[]),
    ("qcompile-codegen", &["qcompile-ir", "qcompile-kernels", "qcompile-plan"]),
    ("qcompile-runtime", &["qcompile-codegen", "qcompile-ir", "qcompile-kernels", "qcompile-plan"]),
    (
        "qcompile",
        &[
            "qcompile-codegen",
            "qcompile-ir",
            "qcompile-kernels",
            "qcompile-onnx",
            "qcompile-passes",
            "qcompile-plan",
            "qcompile-runtime",
        ],
    ),
    (
        "qcompile-experiments",
        &["qcompile", "qcompile-ir", "qcompile-passes", "qcompile-plan", "qcompile-runtime"],
    ),
];

/// Each heavy dependency is named in exactly one manifest.
const OWNERS: &[(&str, &str)] = &[
    ("clap", "qcompile"),
    ("cranelift-codegen", "qcompile-codegen"),
    ("cranelift-jit", "qcompile-codegen"),
    ("egg", "qcompile-passes"),
    ("onnx-protobuf", "qcompile-onnx"),
    ("petgraph", "qcompile-ir"),
    ("prost", "qcompile-plan"),
];

/// The names in a manifest's `[dependencies]`.
fn dependencies(name: &str) -> BTreeSet<String> {
    let manifest = read(&root().join("crates").join(name).join("Cargo.toml"));
    let section = manifest.split("\n[dependencies]\n").nth(1).unwrap_or_default();
    section
        .lines()
        .take_while(|line| !line.starts_with('['))
        .filter_map(|line| line.split(['.', ' ', '=']).next())
        .filter(|name| !name.is_empty() && !name.starts_with('#'))
        .map(str::to_owned)
        .collect()
}

#[test]
fn crates_depend_only_in_the_direction_of_the_data() {
    let mut listed: Vec<String> = fs::read_dir(root().join("crates"))
        .expect("crates")
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    listed.sort();
    let mut known: Vec<&str> = DEPENDENCIES.iter().map(|(name, _)| *name).collect();
    known.sort_unstable();
    assert_eq!(listed, known, "every crate has its place in the table");
    for (name, allowed) in DEPENDENCIES {
        for dependency in dependencies(name).iter().filter(|name| name.starts_with("qcompile")) {
            assert!(allowed.contains(&dependency.as_str()), "{name} must not use {dependency}");
        }
    }
}

#[test]
fn heavy_dependencies_have_one_owner() {
    for (dependency, owner) in OWNERS {
        for (name, _) in DEPENDENCIES {
            let names_it = dependencies(name).contains(*dependency);
            assert_eq!(names_it, name == owner, "{dependency} belongs to {owner}; see {name}");
        }
    }
}

#[test]
fn no_file_is_longer_than_600_lines() {
    for path in sources() {
        let lines = read(&path).lines().count();
        assert!(lines <= 600, "{} has {lines} lines", path.display());
    }
}

#[test]
fn every_crate_forbids_unsafe_code_but_three() {
    for (name, _) in DEPENDENCIES {
        let lib = read(&root().join("crates").join(name).join("src/lib.rs"));
        let forbids = lib.contains("#![forbid(unsafe_code)]");
        let allowed = ["qcompile-kernels", "qcompile-codegen", "qcompile-runtime"].contains(name);
        assert!(forbids || allowed, "{name} does not forbid unsafe code");
    }
}

#[test]
fn every_unsafe_block_says_why_it_is_sound() {
    for path in sources().iter().filter(|path| !path.ends_with("tests/tidy.rs")) {
        let text = read(path);
        let lines: Vec<&str> = text.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if !code.contains("unsafe {") {
                continue;
            }
            let argued =
                lines[at.saturating_sub(8)..=at].iter().any(|line| line.contains("SAFETY:"));
            assert!(argued, "{}:{} has no SAFETY argument", path.display(), at + 1);
        }
    }
}

#[test]
fn names_say_what_is_in_them() {
    let vague = ["utils", "util", "common", "helpers", "helper", "misc", "prelude", "core"];
    for path in sources() {
        for part in path.strip_prefix(root()).expect("below the root").components() {
            let part = part.as_os_str().to_string_lossy();
            let stem = part.trim_end_matches(".rs");
            assert!(!vague.contains(&stem), "{} says nothing", path.display());
        }
    }
}

#[test]
fn nothing_is_left_to_do() {
    let marks = [["TO", "DO"].concat(), ["FIX", "ME"].concat(), ["XX", "X"].concat()];
    for path in sources() {
        let text = read(&path);
        for mark in &marks {
            assert!(!text.contains(mark.as_str()), "{} has a {mark}", path.display());
        }
    }
}

/// The fenced blocks of a language in a Markdown file, with the line each starts at.
fn blocks(text: &str, language: &str) -> Vec<(usize, String)> {
    let mut blocks = Vec::new();
    let mut open: Option<(usize, String)> = None;
    for (at, line) in text.lines().enumerate() {
        match &mut open {
            Some(_) if line.starts_with("```") => blocks.extend(open.take()),
            Some((_, block)) => *block += &format!("{line}\n"),
            None if line == format!("```{language}") => open = Some((at + 1, String::new())),
            None => {}
        }
    }
    blocks
}

#[test]
fn graphs_in_the_documentation_parse() {
    let mut found = 0;
    for path in files(&root().join("docs"), "md") {
        for (line, block) in blocks(&read(&path), "qir") {
            found += 1;
            let place = format!("{}:{line}", path.display());
            let graph = qcompile_ir::text::parse(&block, &|_| None)
                .unwrap_or_else(|errors| panic!("{place}: {errors}\n{block}"));
            qcompile_ir::verify(&graph).unwrap_or_else(|errors| panic!("{place}: {errors}"));
        }
    }
    assert!(found > 0, "docs/ has no graph");
}

#[test]
fn every_op_is_documented() {
    use qcompile_ir::{BinaryOp, CompareOp, ReduceOp, UnaryOp};
    let docs = read(&root().join("docs/ir.md"));
    // Elementwise ops are lists; the others are those that the sample of the text form uses.
    let sample = read(&root().join("crates/qcompile-ir/src/text/sample.qir"));
    let graph = qcompile_ir::text::parse(&sample, &|_| None).expect("parses");
    let mut names: BTreeSet<&str> = graph.ids().map(|id| graph.op(id).name()).collect();
    names.extend(UnaryOp::ALL.iter().map(|op| op.name()));
    names.extend(BinaryOp::ALL.iter().map(|op| op.name()));
    names.extend(CompareOp::ALL.iter().map(|op| op.name()));
    names.extend(ReduceOp::ALL.iter().map(|op| op.name()));
    for name in names {
        let told = docs.contains(&format!("`{name}`")) || docs.contains(&format!("`{name} "));
        assert!(told, "docs/ir.md does not describe {name}");
    }
}

#[test]
fn every_operator_is_documented() {
    let docs = read(&root().join("docs/onnx.md"));
    for file in ["mod.rs", "microsoft.rs"] {
        let source = read(&root().join("crates/qcompile-onnx/src/ops").join(file));
        // Arms of the matches over operators, which are the only ones at this depth.
        let arms =
            source.lines().filter(|line| line.starts_with("        \"") && line.contains("=>"));
        let names: BTreeSet<&str> = arms
            .filter_map(|line| line.split("=>").next())
            .flat_map(|arm| arm.split('"').skip(1).step_by(2))
            .filter(|name| name.starts_with(char::is_uppercase))
            .collect();
        assert!(names.len() > 5, "{file} names {names:?}");
        for name in names {
            assert!(docs.contains(&format!("`{name}`")), "docs/onnx.md does not name {name}");
        }
    }
}

#[test]
fn the_documentation_that_the_readme_names_is_there() {
    let readme = read(&root().join("README.md"));
    for target in readme.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
        if !target.contains("://") && !target.starts_with('#') {
            let path = root().join(target.split('#').next().unwrap_or_default());
            assert!(path.exists(), "README.md links to {target}, which is not there");
        }
    }
}

#[test]
fn every_quantization_rule_has_a_file() {
    for rule in qcompile_passes::quantize::rule_names() {
        let path = root().join(format!("tests/filetests/quantize/{rule}.qir"));
        assert!(path.exists(), "rule {rule} has no {}", path.display());
        let docs = read(&root().join("docs/quantization.md"));
        assert!(docs.contains(rule.as_ref() as &str), "docs/quantization.md does not name {rule}");
    }
}
