//! Files that a command is pointed at: what they are is told by their content.

use crate::about::{About, Port};
use crate::cli::BatchNormMode;
use crate::error::{Code, Error, Result};
use crate::options::Options;
use crate::street::{Draft, read_dump};
use qcompile_ir::LeafValues;
use qcompile_onnx::{BatchNorm, ImportError, ImportOptions, Survey};
use qcompile_plan::Plan;
use qcompile_runtime::{Trainer, TrainerOptions, checkpoint};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// Name of the plan in a checkpoint's folder.
pub const CHECKPOINT_PLAN: &str = "plan.qplan";
/// Name of the state of training in a checkpoint's folder.
pub const CHECKPOINT_STATE: &str = "state.safetensors";

/// Most bytes of a file that is read whole.
const FILE_LIMIT: u64 = 16 << 30;

/// What a path holds.
#[derive(Debug)]
pub enum Target {
    /// A model (.onnx).
    Model(Vec<u8>),
    /// A graph (.qir).
    Graph(String),
    /// A plan (.qplan).
    Plan(Arc<Plan>),
    /// A folder that `train --checkpoint` wrote: its plan, and the bytes of the state.
    Checkpoint(Arc<Plan>, Vec<u8>),
}

impl Target {
    /// The word for messages.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Target::Model(_) => "model",
            Target::Graph(_) => "graph",
            Target::Plan(_) => "plan",
            Target::Checkpoint(..) => "checkpoint",
        }
    }
}

/// Reads what `path` holds.
///
/// # Errors
/// With the path for a place: what cannot be read, is empty, or is of no kind that is known.
pub fn open(path: &Path) -> Result<Target> {
    read_target(path).map_err(|error| at_path(error, path))
}

/// The error with this path for its place, if it has none of this name yet.
pub(crate) fn at_path(error: Error, path: &Path) -> Error {
    let place = path.display().to_string();
    if error.places().contains(&place) { error } else { error.at(place) }
}

fn read_target(path: &Path) -> Result<Target> {
    if path.is_dir() {
        return read_checkpoint(path);
    }
    let bytes = read_file(path)?;
    let foreign = |cause: &str| Err(Error::new(Code::ModelFormat, cause));
    match bytes.as_slice() {
        [] => foreign("the file is empty"),
        [0x89, b'Q', b'P', b'L', b'A', b'N', ..] => {
            Ok(Target::Plan(Arc::new(Plan::from_bytes(&bytes)?)))
        }
        [0x93, b'N', b'U', b'M', b'P', b'Y', ..] | [b'P', b'K', 3, 4, ..] => {
            foreign("this is a file of numpy, not a model, graph or plan")
                .map_err(|error| error.help("data is given with --data or --inputs"))
        }
        [0x1f, 0x8b, ..] => foreign("this is a gzip file, not a model, graph or plan"),
        _ if is_graph_text(&bytes) => match String::from_utf8(bytes) {
            Ok(text) => Ok(Target::Graph(text)),
            Err(_) => foreign("the graph's text is not UTF-8"),
        },
        _ => Ok(Target::Model(bytes)),
    }
}

/// Whether the first line that is neither empty nor a comment begins with `graph`.
fn is_graph_text(bytes: &[u8]) -> bool {
    let mut lines = bytes.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii_start);
    lines
        .find(|line| !line.is_empty() && !line.starts_with(b";"))
        .is_some_and(|line| line.starts_with(b"graph @"))
}

/// The parameters and states in the bytes of a checkpoint of this plan.
///
/// # Errors
/// Where they do not fit the plan.
pub fn checkpoint_values(plan: &Arc<Plan>, state: &[u8]) -> Result<LeafValues> {
    let mut trainer = Trainer::new(Arc::clone(plan), &TrainerOptions::default())?;
    checkpoint::restore(&mut trainer, state)?;
    let mut values = trainer.parameters();
    values.extend(trainer.states());
    Ok(values.into_iter().map(|(name, value)| (name, Arc::new(value))).collect())
}

fn read_checkpoint(path: &Path) -> Result<Target> {
    let plan = path.join(CHECKPOINT_PLAN);
    if !plan.is_file() {
        return Err(Error::new(Code::CheckpointFormat, "this folder is no checkpoint")
            .help(format!("a checkpoint holds {CHECKPOINT_PLAN} and {CHECKPOINT_STATE}; train --checkpoint writes one")));
    }
    let read = |name: &str| {
        let path = path.join(name);
        read_file(&path).map_err(|error| at_path(error, &path))
    };
    let bytes = read(CHECKPOINT_PLAN)?;
    let loaded = Plan::from_bytes(&bytes).map_err(|e| at_path(e.into(), &plan))?;
    Ok(Target::Checkpoint(Arc::new(loaded), read(CHECKPOINT_STATE)?))
}

/// All bytes of a regular file.
pub(crate) fn read_file(path: &Path) -> Result<Vec<u8>> {
    let place = || path.display().to_string();
    let metadata = std::fs::metadata(path).map_err(|e| Error::read(place(), &e))?;
    if metadata.is_dir() {
        let error = std::io::Error::from(std::io::ErrorKind::IsADirectory);
        return Err(Error::read(place(), &error));
    }
    if !metadata.is_file() {
        return Err(Error::new(Code::ReadFailed, "this is not a regular file").at(place()));
    }
    if metadata.len() > FILE_LIMIT {
        let size = crate::terminal::bytes(metadata.len());
        return Err(Error::new(Code::Limit, format!("{size} are too much to be read")).at(place()));
    }
    std::fs::read(path).map_err(|e| Error::read(place(), &e))
}

/// Reads tensors that a model keeps beside itself, from its own folder and nowhere else.
struct Beside {
    folder: Option<PathBuf>,
}

impl Beside {
    fn read(
        &self,
        location: &str,
        offset: u64,
        length: u64,
    ) -> std::result::Result<Vec<u8>, String> {
        let folder = self.folder.as_ref().ok_or("the model has no folder")?;
        let relative = Path::new(location);
        let plain = relative
            .components()
            .all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
        if !plain || location.is_empty() {
            return Err("it is not in the model's folder".to_owned());
        }
        let text = |e: std::io::Error| e.to_string();
        let folder = folder.canonicalize().map_err(text)?;
        // A link may lead outside: what counts is where the file really is.
        let path = folder.join(relative).canonicalize().map_err(text)?;
        if !path.starts_with(&folder) {
            return Err("it is not in the model's folder".to_owned());
        }
        let mut file = File::open(&path).map_err(text)?;
        let metadata = file.metadata().map_err(text)?;
        let end = offset.checked_add(length).ok_or("it ends nowhere")?;
        if !metadata.is_file() || end > metadata.len() {
            return Err(format!("bytes {offset} to {end} of a file of {}", metadata.len()));
        }
        file.seek(SeekFrom::Start(offset)).map_err(text)?;
        let mut bytes = Vec::new();
        file.take(length).read_to_end(&mut bytes).map_err(text)?;
        Ok(bytes)
    }
}

/// Imports the bytes of a model; `folder` is where its external data may lie.
///
/// # Errors
/// Of the import.
pub fn import(
    bytes: &[u8],
    folder: Option<&Path>,
    options: &Options,
) -> std::result::Result<Draft, ImportError> {
    let import =
        with_import_options(folder, options, |options| qcompile_onnx::import(bytes, options))?;
    let port = |port: qcompile_onnx::Port| Port { name: port.name, dtype: port.onnx_dtype };
    let about = About {
        inputs: import.inputs.into_iter().map(port).collect(),
        outputs: import.outputs.into_iter().map(port).collect(),
        warnings: import.warnings,
        ..About::of_graph(&import.graph)
    };
    Ok(Draft::new(import.graph, about))
}

/// What becomes of every node of a model.
///
/// # Errors
/// For what is no model, and options that do not fit it.
pub fn survey(
    bytes: &[u8],
    folder: Option<&Path>,
    options: &Options,
) -> std::result::Result<Survey, ImportError> {
    with_import_options(folder, options, |options| qcompile_onnx::survey(bytes, options))
}

/// Calls `import` with the options of an import from a folder.
fn with_import_options<T>(
    folder: Option<&Path>,
    options: &Options,
    import: impl FnOnce(&ImportOptions) -> T,
) -> T {
    let beside = Beside {
        folder: folder.map(|folder| {
            if folder.as_os_str().is_empty() { PathBuf::from(".") } else { folder.to_owned() }
        }),
    };
    let external = |location: &str, offset: u64, length: u64| beside.read(location, offset, length);
    import(&ImportOptions {
        dims: options.dims.clone(),
        shapes: options.shapes.clone(),
        values: options.constants.clone(),
        external: &external,
        train: options.train.clone(),
        freeze: options.freeze.clone(),
        batch_norm: match options.batch_norm {
            BatchNormMode::Model => BatchNorm::Model,
            BatchNormMode::Train => BatchNorm::Train,
            BatchNormMode::Frozen => BatchNorm::Frozen,
        },
        ..ImportOptions::default()
    })
}

/// The graph of a model or of a `.qir` dump, as far as it has come.
///
/// # Errors
/// Of the import or of the text; a plan or checkpoint is refused.
pub fn draft(target: &Target, path: &Path, options: &Options) -> Result<Draft> {
    let draft = match target {
        Target::Model(bytes) => import(bytes, path.parent(), options).map_err(Error::from),
        Target::Graph(text) => read_dump(text, path),
        Target::Plan(_) | Target::Checkpoint(..) => {
            let cause = format!("this is a {}, and a model is wanted", target.kind());
            Err(Error::new(Code::PlanMismatch, cause))
        }
    };
    draft.map_err(|error| at_path(error, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_files_by_content() {
        assert!(is_graph_text(b"; after: simplify\n\n  graph @g {\n}"));
        assert!(!is_graph_text(b"\x08\x07graph @g"));
        assert!(!is_graph_text(b"; only a comment"));
        let folder = tempfile::tempdir().unwrap();
        let kind = |bytes: &[u8]| {
            let path = folder.path().join("file");
            std::fs::write(&path, bytes).unwrap();
            open(&path).map(|target| target.kind()).map_err(|error| error.code())
        };
        assert_eq!(kind(b""), Err(Code::ModelFormat));
        assert_eq!(kind(b"PK\x03\x04"), Err(Code::ModelFormat));
        assert_eq!(kind(b"\x89QPLAN\r\n junk"), Err(Code::PlanFormat));
        assert_eq!(kind(b"graph @g {\n}\n"), Ok("graph"));
        assert_eq!(kind(b"\x08\x07"), Ok("model"));
        assert_eq!(open(folder.path()).unwrap_err().code(), Code::CheckpointFormat);
        assert_eq!(open(&folder.path().join("none")).unwrap_err().code(), Code::ReadFailed);
    }

    #[test]
    fn external_data_stays_in_the_folder() {
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("model");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(outer.path().join("secret"), b"12345678").unwrap();
        std::fs::write(folder.join("weights"), b"abcdefgh").unwrap();
        let beside = Beside { folder: Some(folder.clone()) };
        assert_eq!(beside.read("weights", 2, 3).unwrap(), b"cde");
        assert_eq!(beside.read("./weights", 0, 8).unwrap(), b"abcdefgh");
        for location in ["../secret", "/etc/passwd", "", "none", "."] {
            assert!(beside.read(location, 0, 1).is_err(), "{location}");
        }
        assert!(beside.read("weights", 4, 5).is_err());
        assert!(beside.read("weights", u64::MAX, 2).is_err());
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink(outer.path().join("secret"), folder.join("link")).unwrap();
            assert!(beside.read("link", 0, 1).is_err());
        }
    }
}
