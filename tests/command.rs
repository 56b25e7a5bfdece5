//! Running the command in a folder of its own.

use crate::support::root;
use qcompile::data::{Array, Dataset, Limits, npz, read_arrays};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// A folder in which commands run, with the data they need.
pub(crate) struct Place {
    folder: tempfile::TempDir,
}

/// What a command came to.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Outcome {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    pub(crate) fn lines(&self) -> Vec<Value> {
        let parse =
            |line: &str| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        self.stdout.lines().map(parse).collect()
    }
}

impl Place {
    pub(crate) fn new() -> Place {
        Place { folder: tempfile::tempdir().expect("a working system") }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs `qcompile` with the words of `line`, where `@` stands for the folder of models.
    pub(crate) fn try_run(&self, line: &str) -> Outcome {
        let models = root().join("models").display().to_string();
        let words = line.split_whitespace().map(|word| word.replace('@', &models));
        let done = Command::new(env!("CARGO_BIN_EXE_qcompile"))
            .args(words)
            .current_dir(self.folder.path())
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env_remove("COLUMNS")
            .stdin(Stdio::null())
            .output()
            .expect("a working system");
        let text = |bytes: Vec<u8>| {
            let text = String::from_utf8(bytes).expect("a working system");
            text.replace(&models, "models").replace(&self.folder.path().display().to_string(), ".")
        };
        let code = done.status.code().expect("not killed");
        Outcome { code, stdout: text(done.stdout), stderr: text(done.stderr) }
    }

    pub(crate) fn run(&self, line: &str) -> Outcome {
        let outcome = self.try_run(line);
        assert_eq!(outcome.code, 0, "{line}: {outcome:?}");
        outcome
    }

    pub(crate) fn bytes(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    pub(crate) fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), bytes).expect("a working system");
    }

    pub(crate) fn write_npz(&self, name: &str, arrays: &[(&str, Array)]) {
        let arrays = arrays.iter().map(|(key, array)| ((*key).to_owned(), array.clone()));
        self.write(name, npz::write(&arrays.collect()).expect("a working system"));
    }

    pub(crate) fn read_npz(&self, name: &str) -> BTreeMap<String, Array> {
        read_arrays(&self.path(name), Limits::default()).expect("a working system")
    }

    /// The names in the folder, but for the cache of timings.
    pub(crate) fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).expect("a working system");
        let names = entries.map(|entry| {
            entry.expect("a working system").file_name().into_string().expect("a working system")
        });
        let mut names: Vec<String> = names.filter(|name| name != "cache").collect();
        names.sort();
        names
    }
}

pub(crate) fn keys(value: &Value) -> Vec<&str> {
    value.as_object().expect("an object").keys().map(String::as_str).collect()
}

/// A few of the digits, as arrays for `run`.
pub(crate) fn digits(samples: usize) -> [(&'static str, Array); 2] {
    let path = root().join("models/data/digits.csv.gz");
    let data = Dataset::load(path.to_str().expect("a working system"), Limits::default())
        .expect("a working system");
    let rows: Vec<usize> = (0..samples).collect();
    let mut arrays = data.gather(&rows).expect("a working system");
    [
        ("x", arrays.remove("x").expect("a working system")),
        ("label", arrays.remove("label").expect("a working system")),
    ]
}

pub(crate) const DIGITS: &str = "@/data/digits.csv.gz";
pub(crate) const MLP: &str = "@/digits_mlp.onnx -o mlp.qplan -q --loss cross-entropy --no-measure";
