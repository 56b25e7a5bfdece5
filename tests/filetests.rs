//! What each pass makes of the graphs in `tests/filetests/<pass>/`, as snapshots.

use qcompile_ir::{Graph, text};
use std::path::Path;

fn parse(path: &Path) -> Graph {
    let source = std::fs::read_to_string(path).unwrap();
    text::parse(&source, &|_| None).unwrap_or_else(|errors| panic!("{}: {errors}", path.display()))
}

/// One snapshot for each file of the kind: `snapshots/<kind>/<case>.snap`.
fn check(kind: &str, show: impl Fn(Graph) -> String) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/filetests").join(kind);
    let mut cases: Vec<_> = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    cases.sort();
    assert!(!cases.is_empty(), "{} has no case", folder.display());
    for path in cases {
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let mut settings = insta::Settings::clone_current();
        settings.set_snapshot_path(format!("../snapshots/{kind}"));
        settings.set_prepend_module_to_snapshot(false);
        settings.set_omit_expression(true);
        settings.set_input_file(&path);
        settings.bind(|| insta::assert_snapshot!(name.as_str(), show(parse(&path))));
    }
}

#[test]
fn plan() {
    check("plan", |graph| {
        let options = qcompile_plan::BuildOptions { batch_size: 4 };
        match qcompile_plan::build(graph, &options) {
            Ok(plan) => plan.to_string(),
            Err(error) => format!("error: {error}\n"),
        }
    });
}
