//! What several kinds of tests need: files of the repository, snapshots, inputs for a graph.

use qcompile_ir::{DType, Graph, Op, Tensor, text};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The folder of the workspace.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the workspace")
}

/// The graphs in `tests/filetests/<kind>/`, in order.
pub(crate) fn cases(kind: &str) -> Vec<PathBuf> {
    let folder = root().join("tests/filetests").join(kind);
    let mut cases: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "qir"))
        .collect();
    cases.sort();
    assert!(!cases.is_empty(), "{} has no case", folder.display());
    cases
}

/// The graph in a file, whose tensors are all in its text.
pub(crate) fn parse(path: &Path) -> Graph {
    let source = std::fs::read_to_string(path).expect("readable");
    let graph = text::parse(&source, &|_| None)
        .unwrap_or_else(|errors| panic!("{}: {errors}", path.display()));
    qcompile_ir::verify(&graph).unwrap_or_else(|errors| panic!("{}: {errors}", path.display()));
    graph
}

/// Compares with `snapshots/<kind>/<name>.snap`.
pub(crate) fn snapshot(kind: &str, name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path(format!("../snapshots/{kind}"));
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(name, text));
}

/// Numbers that look random and are the same in every run: xorshift64* (Vigna 2016).
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// The sequence of this seed.
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next 64 bits.
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`, which is not 0.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.bits() >> 11).expect("64-bit") % limit
    }

    /// Whether something of this probability happens.
    pub(crate) fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// One of these.
    pub(crate) fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }

    /// A number in [-1, 1).
    pub(crate) fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
    }
}

/// Values for every input of a graph: floats in [-1, 1), labels below `classes`.
pub(crate) fn inputs(
    graph: &Graph,
    batch: usize,
    classes: usize,
    random: &mut Random,
) -> BTreeMap<String, Tensor> {
    let mut inputs = BTreeMap::new();
    for id in graph.leaves(|op| matches!(op, Op::Input(_))) {
        let ty = graph.ty(id);
        let sizes = ty.shape.sizes(batch);
        let values: Vec<f64> = (0..sizes.iter().product::<usize>())
            .map(|_| match ty.dtype {
                dtype if dtype.is_float() => random.unit(),
                DType::Bool => random.below(2) as f64,
                _ => random.below(classes) as f64,
            })
            .collect();
        let tensor = Tensor::from_f64(ty.dtype, &sizes, &values).expect("sizes fit");
        inputs.insert(graph.node(id).name.as_str().to_owned(), tensor);
    }
    inputs
}
