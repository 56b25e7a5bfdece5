//! The `.qplan` file. `docs/plan.md` describes it byte by byte.
//!
//! A file holds what a plan is made *from*: the graph as text, the graph of its evaluation form if that differs, their
//! tensors, and what was said about it. The schedule is a pure function of those and is built again on loading, so no
//! file, however made, can name an address.
//!
//! ```text
//! 0   magic      8 bytes  89 51 50 4c 41 4e 0d 0a  (\x89 QPLAN \r \n)
//! 8   version    u32      1
//! 12  sections   u32      5
//! 16  length     u64      of the whole file
//! 24  table      5 x { kind u32, crc32 u32, offset u64, length u64 }
//! 144 crc32      u32      of bytes 0..144
//! 192 sections   Head (protobuf), Graph (UTF-8), Evaluation (UTF-8, empty if it is the same), Index (protobuf),
//!                Data (tensors, each aligned to 64), in this order, each aligned to 64 and followed by zeros up to
//!                the next
//! ```
//! Numbers are little-endian.

use crate::{BuildOptions, Plan, PlanError, VerifyError, build};
use prost::Message;
use qcompile_ir::{DType, Tensor, text};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use thiserror::Error;

const MAGIC: [u8; 8] = *b"\x89QPLAN\r\n";
const VERSION: u32 = 1;
const SECTIONS: [&str; 5] = ["head", "graph", "evaluation", "index", "data"];
const TABLE: usize = 24;
const TABLE_END: usize = TABLE + 24 * SECTIONS.len();
const ALIGNMENT: usize = 64;
const FIRST_SECTION: usize = (TABLE_END + 4).next_multiple_of(ALIGNMENT);

/// Why bytes are not a plan.
#[derive(Debug, Error)]
pub enum FileError {
    /// Something else.
    #[error("this is not a .qplan file: {0}")]
    Foreign(&'static str),
    /// Another version of the format.
    #[error(
        ".qplan version {found}, but this qcompile reads version {VERSION}; compile the model again"
    )]
    Version {
        /// The file's version.
        found: u32,
    },
    /// Bytes are missing or changed.
    #[error("the .qplan file is damaged: {0}")]
    Damaged(String),
    /// The graph in it does not parse or verify.
    #[error("the graph in the .qplan file is not valid: {0}")]
    Graph(String),
    /// The graph in it has no plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The evaluation form does not go with the plan.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// The file could not be read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

#[derive(Clone, PartialEq, Message)]
struct Head {
    #[prost(btree_map = "string, string", tag = "1")]
    meta: BTreeMap<String, String>,
    #[prost(uint64, tag = "2")]
    batch_size: u64,
}

#[derive(Clone, PartialEq, Message)]
struct Index {
    #[prost(message, repeated, tag = "1")]
    tensors: Vec<Entry>,
}

#[derive(Clone, PartialEq, Message)]
struct Entry {
    #[prost(fixed64, tag = "1")]
    digest: u64,
    #[prost(string, tag = "2")]
    dtype: String,
    #[prost(uint64, repeated, tag = "3")]
    shape: Vec<u64>,
    #[prost(uint64, tag = "4")]
    offset: u64,
    #[prost(uint64, tag = "5")]
    length: u64,
}

impl Plan {
    /// The file of this plan: the same bytes for equal plans.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let head = Head { meta: self.meta.clone(), batch_size: self.batch_size as u64 };
        let mut tensors = text::tensors(&self.graph);
        if let Some(evaluation) = &self.evaluation {
            tensors.extend(text::tensors(&evaluation.graph));
        }
        let mut index = Index { tensors: Vec::with_capacity(tensors.len()) };
        let mut length = 0_usize;
        for (&digest, tensor) in &tensors {
            let offset = length.next_multiple_of(ALIGNMENT);
            length = offset + tensor.bytes().len();
            index.tensors.push(Entry {
                digest,
                dtype: tensor.dtype().name().to_owned(),
                shape: tensor.shape().iter().map(|&dim| dim as u64).collect(),
                offset: offset as u64,
                length: tensor.bytes().len() as u64,
            });
        }
        let evaluation = self.evaluation.as_ref();
        let texts = [
            head.encode_to_vec(),
            self.graph.to_string().into_bytes(),
            evaluation.map(|plan| plan.graph.to_string().into_bytes()).unwrap_or_default(),
            index.encode_to_vec(),
        ];
        // The tensors are most of it, and are copied once.
        let aligned = |length: usize| length.next_multiple_of(ALIGNMENT);
        let whole = texts.iter().map(|text| aligned(text.len())).sum::<usize>() + aligned(length);
        let mut bytes = Vec::with_capacity(FIRST_SECTION + whole);
        bytes.resize(FIRST_SECTION, 0);
        let align = |bytes: &mut Vec<u8>| bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        let mut places = [(0, 0); SECTIONS.len()];
        for (place, text) in places.iter_mut().zip(&texts) {
            *place = (bytes.len(), bytes.len() + text.len());
            bytes.extend(text);
            align(&mut bytes);
        }
        let start = bytes.len();
        for tensor in tensors.values() {
            align(&mut bytes);
            bytes.extend(tensor.bytes());
        }
        places[texts.len()] = (start, bytes.len());
        align(&mut bytes);
        let mut header: Vec<u8> = Vec::with_capacity(FIRST_SECTION);
        header.extend(MAGIC);
        header.extend(VERSION.to_le_bytes());
        header.extend((SECTIONS.len() as u32).to_le_bytes());
        header.extend((bytes.len() as u64).to_le_bytes());
        for (kind, (start, end)) in (0_u32..).zip(places) {
            header.extend(kind.to_le_bytes());
            header.extend(crc32fast::hash(&bytes[start..end]).to_le_bytes());
            header.extend((start as u64).to_le_bytes());
            header.extend(((end - start) as u64).to_le_bytes());
        }
        header.extend(crc32fast::hash(&header).to_le_bytes());
        bytes[..header.len()].copy_from_slice(&header);
        bytes
    }

    /// The plan in these bytes, built and verified. Safe for bytes of any origin; memory is bounded by a small
    /// multiple of their number, beside the elements that a graph may make by `splat` (2^28).
    ///
    /// # Errors
    /// [`FileError`]: foreign, another version, damaged anywhere, or a graph that is not valid.
    pub fn from_bytes(bytes: &[u8]) -> Result<Plan, FileError> {
        let [head, graph, evaluation, index, data] = sections(bytes)?;
        let damaged = |what: &str| FileError::Damaged(what.to_owned());
        let head = Head::decode(head).map_err(|_| damaged("section head"))?;
        let index = Index::decode(index).map_err(|_| damaged("section index"))?;
        let tensors = tensors(&index, data).ok_or_else(|| damaged("a tensor is out of place"))?;
        let batch_size = usize::try_from(head.batch_size).map_err(|_| damaged("batch size"))?;
        let plan = |section: &[u8]| -> Result<Plan, FileError> {
            let text = std::str::from_utf8(section).map_err(|_| damaged("a graph is not text"))?;
            let graph = text::parse(text, &|digest| tensors.get(&digest).cloned())
                .map_err(|errors| FileError::Graph(errors.to_string()))?;
            qcompile_ir::verify(&graph).map_err(|errors| FileError::Graph(errors.to_string()))?;
            Ok(build(graph, &BuildOptions { batch_size })?)
        };
        let evaluation = if evaluation.is_empty() { None } else { Some(plan(evaluation)?) };
        Ok(plan(graph)?.with_meta(head.meta).with_evaluation(evaluation)?)
    }

    /// The plan in a file: [`from_bytes`](Self::from_bytes) of its contents.
    ///
    /// # Errors
    /// [`FileError::Io`] if it cannot be read, else as `from_bytes`.
    pub fn load(path: impl AsRef<Path>) -> Result<Plan, FileError> {
        let path = path.as_ref();
        let bytes = std::fs::read(path)
            .map_err(|source| FileError::Io { path: path.to_owned(), source })?;
        Plan::from_bytes(&bytes)
    }
}

/// The tensors by digest. None may share bytes with another: a file would name more than it holds.
fn tensors(index: &Index, data: &[u8]) -> Option<BTreeMap<u64, Arc<Tensor>>> {
    let mut tensors = BTreeMap::new();
    let mut free = 0;
    for entry in &index.tensors {
        let dtype: DType = entry.dtype.parse().ok()?;
        let shape =
            entry.shape.iter().map(|&dim| usize::try_from(dim).ok()).collect::<Option<_>>()?;
        let start = usize::try_from(entry.offset).ok().filter(|&start| start >= free)?;
        free = start.checked_add(usize::try_from(entry.length).ok()?)?;
        let tensor = Tensor::from_bytes(dtype, shape, data.get(start..free)?.to_vec())?;
        tensors.insert(entry.digest, Arc::new(tensor));
    }
    Some(tensors)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let (words, _) = bytes[at..].as_chunks::<4>();
    u32::from_le_bytes(words[0])
}

fn long(bytes: &[u8], at: usize) -> u64 {
    let (longs, _) = bytes[at..].as_chunks::<8>();
    u64::from_le_bytes(longs[0])
}

/// The sections; every byte of the file is covered by a checksum or must be zero.
fn sections(bytes: &[u8]) -> Result<[&[u8]; SECTIONS.len()], FileError> {
    if bytes.is_empty() {
        return Err(FileError::Foreign("it is empty"));
    }
    if !bytes.starts_with(&MAGIC) {
        return Err(FileError::Foreign("it does not begin as one"));
    }
    let damaged = |what: String| FileError::Damaged(what);
    if bytes.len() < FIRST_SECTION {
        return Err(damaged(format!("it ends after {} bytes", bytes.len())));
    }
    let version = word(bytes, 8);
    if version != VERSION {
        return Err(FileError::Version { found: version });
    }
    if crc32fast::hash(&bytes[..TABLE_END]) != word(bytes, TABLE_END) {
        return Err(damaged("its header has changed".to_owned()));
    }
    if word(bytes, 12) as usize != SECTIONS.len() {
        return Err(damaged("it has another number of sections".to_owned()));
    }
    let length = long(bytes, 16);
    if length != bytes.len() as u64 {
        return Err(damaged(format!("it has {} of {length} bytes", bytes.len())));
    }
    let mut end = TABLE_END + 4;
    let mut sections: [&[u8]; SECTIONS.len()] = [&[]; SECTIONS.len()];
    for (position, name) in SECTIONS.iter().enumerate() {
        let at = TABLE + 24 * position;
        let place = || {
            let start = usize::try_from(long(bytes, at + 8)).ok()?;
            let stop = start.checked_add(usize::try_from(long(bytes, at + 16)).ok()?)?;
            let padding = bytes.get(end..start)?;
            let zeros = padding.len() < ALIGNMENT && padding.iter().all(|&byte| byte == 0);
            Some((bytes.get(start..stop)?, stop)).filter(|_| zeros)
        };
        let (section, stop) =
            place().ok_or_else(|| damaged(format!("section {name} is out of place")))?;
        if word(bytes, at) as usize != position || crc32fast::hash(section) != word(bytes, at + 4) {
            return Err(damaged(format!("section {name} has changed")));
        }
        sections[position] = section;
        end = stop;
    }
    let rest = &bytes[end..];
    if rest.len() >= ALIGNMENT || rest.iter().any(|&byte| byte != 0) {
        return Err(damaged("it goes on after its end".to_owned()));
    }
    Ok(sections)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRAPH: &str = "graph @g {
  input %x : f32[N, 8]
  param %w : f32[8, 4] = uniform seed=7
forward:
  %y : f32[N, 4] = matmul %x, %w
  %z : f32[N, 4] = relu %y
  return %z
}
";

    fn plan() -> Plan {
        let graph = text::parse(GRAPH, &|_| None).expect("parses");
        let meta = BTreeMap::from([("loss".to_owned(), "output".to_owned())]);
        build(graph, &BuildOptions::default()).expect("builds").with_meta(meta)
    }

    #[test]
    fn other_values_make_the_plan_of_a_graph_with_them() {
        let plan = plan();
        let form = build(text::parse(GRAPH, &|_| None).expect("parses"), &BuildOptions::default());
        let plan = plan.with_evaluation(Some(form.expect("builds"))).expect("fits");
        let w = Tensor::from_f32(&[8, 4], &[0.5; 32]).expect("fits");
        let values = BTreeMap::from([("w".to_owned(), Arc::new(w))]);
        let changed = plan.with_values(&values).expect("has the type");
        let graph = text::parse(&GRAPH.replace("uniform seed=7", "splat 0.5"), &|_| None);
        let graph = graph.expect("parses");
        let built = || build(graph.clone(), &BuildOptions::default()).expect("builds");
        let wanted = built().with_meta(plan.meta().clone()).with_evaluation(Some(built()));
        let wanted = wanted.expect("fits");
        assert_eq!(changed.to_bytes(), wanted.to_bytes());
        for (changed, wanted) in
            [(Some(&changed), Some(&wanted)), (changed.evaluation(), wanted.evaluation())]
        {
            assert_eq!(changed.map(Plan::params), wanted.map(Plan::params));
        }
        let other = Arc::new(Tensor::from_f32(&[4], &[0.5; 4]).expect("fits"));
        assert!(plan.with_values(&BTreeMap::from([("w".to_owned(), other)])).is_err());
    }

    #[test]
    fn a_file_gives_the_same_plan_and_bytes() {
        let bytes = plan().to_bytes();
        let loaded = Plan::from_bytes(&bytes).expect("loads");
        assert_eq!(loaded.to_bytes(), bytes);
        assert_eq!(loaded.steps(), plan().steps());
        assert_eq!(loaded.meta().get("loss").map(String::as_str), Some("output"));
    }

    #[test]
    fn any_changed_or_missing_byte_is_refused() {
        let bytes = plan().to_bytes();
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x10;
            assert!(Plan::from_bytes(&flipped).is_err(), "byte {at}");
            assert!(Plan::from_bytes(&bytes[..at]).is_err(), "cut at {at}");
        }
    }
}
