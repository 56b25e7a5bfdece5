//! Graphs between two passes as text.
//!
//! A dump is a `.qir` text whose first line says which pass it stands after and whose second says what is known about
//! it. Tensors that the text names by their digest only stand beside it, in `NAME.qir.npz`.

use super::{Draft, Pass};
use crate::about::About;
use crate::data::{Limits, npz, read_arrays};
use crate::error::{Code, Error, Result};
use crate::output::write_atomically;
use crate::tensors::{file_type, retyped, to_array, to_tensor};
use qcompile_ir::{DType, Tensor, text, verify};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const AFTER: &str = "; after: ";
const ABOUT: &str = "; about: ";

/// Where the tensors of the dump at `path` stand.
#[must_use]
pub fn tensors_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".npz");
    PathBuf::from(name)
}

/// The text of a draft.
///
/// # Errors
/// Only by a defect.
fn dump_text(draft: &Draft) -> Result<String> {
    let about = serde_json::to_string(&draft.about)
        .map_err(|e| Error::new(Code::Internal, e.to_string()))?;
    let after = draft.after.map(|pass| format!("{AFTER}{}\n", pass.name())).unwrap_or_default();
    Ok(format!("{after}{ABOUT}{about}\n{}", draft.graph))
}

/// Writes a draft, and its tensors beside it; without a path the text goes to stdout.
///
/// # Errors
/// Of writing.
pub fn write_dump(draft: &Draft, path: Option<&Path>) -> Result<()> {
    let text = dump_text(draft)?;
    let Some(path) = path else {
        return crate::output::print(&text);
    };
    let tensors = text::tensors(&draft.graph);
    if !tensors.is_empty() {
        let arrays = tensors
            .iter()
            .map(|(digest, tensor)| Ok((format!("{digest:016x}"), to_array(tensor, None)?)))
            .collect::<Result<BTreeMap<_, _>>>()?;
        write_atomically(&tensors_path(path), &npz::write(&arrays)?)?;
    }
    write_atomically(path, text.as_bytes())
}

/// The draft that a `.qir` text at `path` is. A text without the lines of a dump is a graph that has been through no
/// pass.
///
/// # Errors
/// [`Code::ModelFormat`] with every place in the text, and for tensors that are not there.
pub fn read_dump(source: &str, path: &Path) -> Result<Draft> {
    let head = |mark: &str| {
        let comments = source.lines().take_while(|line| line.starts_with(';') || line.is_empty());
        comments.filter_map(|line| line.strip_prefix(mark)).next().map(str::trim)
    };
    let after = head(AFTER).map(|name| {
        let names = Pass::ALL.map(Pass::name);
        name.parse::<Pass>().map_err(|()| {
            Error::new(Code::ModelFormat, format!("there is no pass `{name}`"))
                .did_you_mean(name, names)
                .help(format!("the first line names the pass before: {}", names.join(", ")))
        })
    });
    let after = after.transpose()?;
    let tensors = read_tensors(path)?;
    let graph = text::parse(source, &|digest| tensors.get(&digest).cloned()).map_err(|errors| {
        let lines = errors.to_string();
        let error = Error::new(Code::ModelFormat, "the graph's text is not valid");
        lines.lines().fold(error, |error, line| error.at(line))
    })?;
    verify(&graph).map_err(|errors| {
        let error = Error::new(Code::ModelFormat, "the graph is not valid");
        errors.0.iter().fold(error, |error, broken| error.at(broken.to_string()))
    })?;
    let about = match head(ABOUT) {
        Some(json) => serde_json::from_str(json).map_err(|e| {
            Error::new(Code::ModelFormat, format!("the second line is not what was written: {e}"))
        })?,
        None => About::of_graph(&graph),
    };
    let mut draft = Draft::new(graph, about);
    draft.after = after;
    draft.decisions.clone_from(&draft.about.decisions);
    Ok(draft)
}

fn read_tensors(path: &Path) -> Result<BTreeMap<u64, Arc<Tensor>>> {
    let path = tensors_path(path);
    if !path.is_file() {
        return Ok(BTreeMap::new());
    }
    let mut tensors = BTreeMap::new();
    for (name, array) in read_arrays(&path, Limits::default())? {
        let tensor = to_tensor(&name, array)?;
        // What counts is what the tensor is, not what it is called. Of types that files tell not apart, each is one.
        for dtype in
            DType::ALL.into_iter().filter(|&dtype| file_type(dtype) == file_type(tensor.dtype()))
        {
            if let Ok(tensor) = retyped(&name, tensor.clone(), dtype) {
                tensors.insert(tensor.digest(), Arc::new(tensor));
            }
        }
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRAPH: &str = "graph @g {
  input %x : f32[N, 2]
  param %w : f32[2, 2] = [[1, 2], [3, 4]]
forward:
  %y : f32[N, 2] = matmul %x, %w
  return %y
}
";

    #[test]
    fn a_dump_comes_back_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.qir");
        let mut draft = read_dump(GRAPH, &path).unwrap();
        assert_eq!((draft.after, draft.about.inputs.len()), (None, 1));
        draft.after = Some(Pass::Quantize);
        draft.about.warnings.push("odd; text\n".to_owned());
        let large = Tensor::from_f32(&[2, 2], &[0.1, 0.2, 0.3, 0.4]).unwrap();
        let values = BTreeMap::from([("w".to_owned(), Arc::new(large))]);
        draft.graph = draft.graph.with_values(&values).unwrap();
        write_dump(&draft, Some(&path)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let back = read_dump(&text, &path).unwrap();
        assert_eq!((back.after, &back.about), (draft.after, &draft.about));
        assert_eq!(back.graph.to_string(), draft.graph.to_string());
    }

    #[test]
    fn wrong_texts_are_refused_with_their_place() {
        let path = Path::new("/none/a.qir");
        let error = read_dump(&format!("; after: quantise\n{GRAPH}"), path).unwrap_err();
        assert!(error.to_string().contains("did you mean `quantize`?"), "{error}");
        let error = read_dump(&GRAPH.replace("matmul", "matmull"), path).unwrap_err();
        assert!(error.to_string().contains("matmull"), "{error}");
        let error = read_dump(&GRAPH.replace("[[1, 2], [3, 4]]", "#0123456789abcdef"), path);
        assert_eq!(error.unwrap_err().code(), Code::ModelFormat);
    }
}
