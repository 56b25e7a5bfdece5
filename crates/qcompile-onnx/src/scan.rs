//! A first look at the bytes, before any protobuf library sees them: is it well-formed, and how much memory would
//! decoding take? Iterative; its own memory is one frame per level of nesting.

use crate::ImportError;
use onnx_protobuf as proto;
use std::mem::size_of;

/// What a file may contain. The defaults are far above real models and far below what hurts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the file; protobuf itself ends at 2 GiB.
    pub bytes: usize,
    /// Nodes, those in subgraphs and functions included.
    pub nodes: usize,
    /// Inputs and outputs of all nodes together.
    pub edges: usize,
    /// Tensors: initializers and attributes.
    pub tensors: usize,
    /// Attributes of all nodes.
    pub attributes: usize,
    /// Messages within messages.
    pub nesting: usize,
    /// Fields of all messages.
    pub fields: usize,
    /// Bytes that decoding may take beyond four times the size of the file.
    pub decoded_bytes: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            bytes: (1 << 31) - 1,
            nodes: 200_000,
            edges: 1_000_000,
            tensors: 200_000,
            attributes: 2_000_000,
            nesting: 64,
            fields: 20_000_000,
            decoded_bytes: 256 << 20,
        }
    }
}

/// What a file contains.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Nodes, those in subgraphs and functions included.
    pub nodes: usize,
    /// Inputs and outputs of all nodes together.
    pub edges: usize,
    /// Tensors: initializers and attributes.
    pub tensors: usize,
    /// Attributes of all nodes.
    pub attributes: usize,
    /// Deepest message within messages.
    pub nesting: usize,
    /// Fields of all messages.
    pub fields: usize,
    /// Estimate of the bytes that decoding takes.
    pub decoded_bytes: usize,
}

/// The messages of `onnx.proto`; those alike are one.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Message {
    Model,
    Graph,
    Node,
    Attribute,
    Tensor,
    SparseTensor,
    ValueInfo,
    Type,
    /// `TypeProto.Tensor` and its sparse sibling.
    TensorType,
    /// `TypeProto.Sequence` and `TypeProto.Optional`.
    ElementType,
    MapType,
    TensorShape,
    Dimension,
    /// Two strings or numbers: metadata, operator sets, segments.
    Pair,
    TensorAnnotation,
    Function,
    TrainingInfo,
}

/// What a length-delimited field holds.
enum Content {
    Message(Message),
    /// A string or bytes.
    Bytes,
    /// Packed numbers: bytes of one when decoded.
    Packed(usize),
    Unknown,
}

impl Message {
    /// What length-delimited field `number` holds.
    fn content(self, number: u64) -> Content {
        use Content::{Bytes, Packed, Unknown};
        use Message as M;
        let message = Content::Message;
        match (self, number) {
            (M::Model, 7) => message(M::Graph),
            (M::Model, 8 | 14) => message(M::Pair),
            (M::Model, 20) => message(M::TrainingInfo),
            (M::Model, 25) => message(M::Function),
            (M::Model, 2..=4 | 6) => Bytes,
            (M::Graph, 1) => message(M::Node),
            (M::Graph, 5) => message(M::Tensor),
            (M::Graph, 15) => message(M::SparseTensor),
            (M::Graph, 11..=13) => message(M::ValueInfo),
            (M::Graph, 14) => message(M::TensorAnnotation),
            (M::Graph, 16) => message(M::Pair),
            (M::Graph, 2 | 10) => Bytes,
            (M::Node, 5) => message(M::Attribute),
            (M::Node, 9) => message(M::Pair),
            (M::Node, 1..=4 | 6..=8) => Bytes,
            (M::Attribute, 5 | 10) => message(M::Tensor),
            (M::Attribute, 6 | 11) => message(M::Graph),
            (M::Attribute, 14 | 15) => message(M::Type),
            (M::Attribute, 22 | 23) => message(M::SparseTensor),
            (M::Attribute, 7) => Packed(4),
            (M::Attribute, 8) => Packed(8),
            (M::Attribute, 1 | 4 | 9 | 13 | 21) => Bytes,
            (M::Tensor, 3 | 13 | 16) => message(M::Pair),
            (M::Tensor, 4 | 5) => Packed(4),
            (M::Tensor, 1 | 7 | 10 | 11) => Packed(8),
            (M::Tensor, 6 | 8 | 9 | 12) => Bytes,
            (M::SparseTensor, 1 | 2) => message(M::Tensor),
            (M::SparseTensor, 3) => Packed(8),
            (M::ValueInfo, 2) => message(M::Type),
            (M::ValueInfo, 4) => message(M::Pair),
            (M::ValueInfo, 1 | 3) => Bytes,
            (M::Type, 1 | 8) => message(M::TensorType),
            (M::Type, 4 | 9) => message(M::ElementType),
            (M::Type, 5) => message(M::MapType),
            (M::Type, 6) => Bytes,
            (M::TensorType, 2) => message(M::TensorShape),
            (M::ElementType, 1) | (M::MapType, 2) => message(M::Type),
            (M::TensorShape, 1) => message(M::Dimension),
            (M::Dimension, 2 | 3) | (M::Pair, 1 | 2) => Bytes,
            (M::TensorAnnotation, 1) => Bytes,
            (M::TensorAnnotation, 2) => message(M::Pair),
            (M::Function, 7) => message(M::Node),
            (M::Function, 9 | 14) => message(M::Pair),
            (M::Function, 11) => message(M::Attribute),
            (M::Function, 12) => message(M::ValueInfo),
            (M::Function, 1 | 4..=6 | 8 | 10 | 13) => Bytes,
            (M::TrainingInfo, 1 | 2) => message(M::Graph),
            (M::TrainingInfo, 3 | 4) => message(M::Pair),
            _ => Unknown,
        }
    }

    /// Whether a number field exists: enough to price the unknown ones.
    fn has_number(self, number: u64) -> bool {
        match self {
            Message::Model => matches!(number, 1 | 5),
            Message::Attribute => matches!(number, 2 | 3 | 7 | 8 | 20),
            Message::Tensor => matches!(number, 1 | 2 | 4 | 5 | 7 | 10 | 11 | 14),
            Message::SparseTensor => number == 3,
            Message::TensorType | Message::MapType | Message::Dimension => number == 1,
            Message::Pair => matches!(number, 1 | 2),
            _ => false,
        }
    }

    fn decoded_size(self) -> usize {
        match self {
            Message::Model => size_of::<proto::ModelProto>(),
            Message::Graph => size_of::<proto::GraphProto>(),
            Message::Node => size_of::<proto::NodeProto>(),
            Message::Attribute => size_of::<proto::AttributeProto>(),
            Message::Tensor => size_of::<proto::TensorProto>(),
            Message::SparseTensor => size_of::<proto::SparseTensorProto>(),
            Message::ValueInfo => size_of::<proto::ValueInfoProto>(),
            Message::Function => size_of::<proto::FunctionProto>(),
            Message::TrainingInfo => size_of::<proto::TrainingInfoProto>(),
            _ => 128,
        }
    }
}

/// Bytes that a field unknown to the schema takes when kept: an entry of a map of vectors.
const UNKNOWN_FIELD: usize = 256;
/// Bytes of the header of a string or of bytes.
const STRING: usize = 24;

/// Reads the whole of `bytes` at the level of the wire.
///
/// # Errors
/// [`ImportError::Refused`] beyond `limits`, [`ImportError::Malformed`] with the offset if it is not protobuf.
pub fn scan(bytes: &[u8], limits: &Limits) -> Result<Census, ImportError> {
    check("bytes", bytes.len(), limits.bytes)?;
    if bytes.is_empty() {
        return Err(malformed(0, "the file is empty"));
    }
    let mut census = Census::default();
    let decoded_limit = bytes.len().saturating_mul(4).saturating_add(limits.decoded_bytes);
    let mut reader = Reader { bytes, at: 0 };
    let mut open: Vec<(Message, usize)> = vec![(Message::Model, bytes.len())];
    while let Some(&(message, end)) = open.last() {
        if reader.at == end {
            open.pop();
            continue;
        }
        let start = reader.at;
        let tag = reader.varint(end)?;
        let (number, wire) = (tag >> 3, tag & 7);
        if number == 0 || number >= 1 << 29 {
            return Err(malformed(start, "not a protobuf field"));
        }
        census.fields += 1;
        check("fields", census.fields, limits.fields)?;
        let price = match wire {
            0 | 1 | 5 => {
                match wire {
                    0 => drop(reader.varint(end)?),
                    1 => drop(reader.take(8, end)?),
                    _ => drop(reader.take(4, end)?),
                }
                if message.has_number(number) { 8 } else { UNKNOWN_FIELD }
            }
            2 => {
                let length = reader.varint(end)?;
                let from = reader.at;
                let length = usize::try_from(length)
                    .map_err(|_| malformed(start, "a length beyond the end of the file"))?;
                reader.take(length, end)?;
                match message.content(number) {
                    Content::Message(inner) => {
                        reader.at = from;
                        open.push((inner, from + length));
                        census.nesting = census.nesting.max(open.len());
                        check("levels of nesting", open.len(), limits.nesting)?;
                        census.enter(inner, limits)?;
                        // A growing vector holds up to twice its elements.
                        inner.decoded_size() * 2
                    }
                    Content::Bytes if message == Message::Node && matches!(number, 1 | 2) => {
                        census.edges += 1;
                        check("inputs and outputs of nodes", census.edges, limits.edges)?;
                        length + STRING * 2
                    }
                    Content::Bytes => length + STRING * 2,
                    // A packed varint is at least one byte.
                    Content::Packed(size) => length.saturating_mul(size),
                    Content::Unknown => length + UNKNOWN_FIELD,
                }
            }
            3 | 4 => return Err(malformed(start, "groups are not part of ONNX")),
            _ => return Err(malformed(start, "not a protobuf field")),
        };
        census.decoded_bytes = census.decoded_bytes.saturating_add(price);
        check("bytes when decoded", census.decoded_bytes, decoded_limit)?;
    }
    Ok(census)
}

impl Census {
    fn enter(&mut self, message: Message, limits: &Limits) -> Result<(), ImportError> {
        match message {
            Message::Node => {
                self.nodes += 1;
                check("nodes", self.nodes, limits.nodes)
            }
            Message::Tensor => {
                self.tensors += 1;
                check("tensors", self.tensors, limits.tensors)
            }
            Message::Attribute => {
                self.attributes += 1;
                check("attributes", self.attributes, limits.attributes)
            }
            _ => Ok(()),
        }
    }
}

fn check(what: &'static str, found: usize, limit: usize) -> Result<(), ImportError> {
    if found <= limit { Ok(()) } else { Err(ImportError::Refused { what, found, limit }) }
}

fn malformed(offset: usize, reason: &str) -> ImportError {
    ImportError::Malformed { offset: Some(offset), reason: reason.to_owned() }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn varint(&mut self, end: usize) -> Result<u64, ImportError> {
        let start = self.at;
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            if self.at == end {
                return Err(malformed(start, "the data ends within a number"));
            }
            let byte = self.bytes[self.at];
            self.at += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(malformed(start, "a number longer than 64 bits"))
    }

    /// Skips `length` bytes.
    fn take(&mut self, length: usize, end: usize) -> Result<(), ImportError> {
        if length > end - self.at {
            return Err(malformed(
                self.at,
                &format!(
                    "{length} bytes announced, {} left: the file is truncated or not ONNX",
                    end - self.at
                ),
            ));
        }
        self.at += length;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A length-delimited field.
    fn field(number: u8, content: &[u8]) -> Vec<u8> {
        let mut bytes = vec![number << 3 | 2];
        let mut length = content.len();
        while length >= 0x80 {
            bytes.push((length & 0x7f) as u8 | 0x80);
            length >>= 7;
        }
        bytes.push(length as u8);
        bytes.extend(content);
        bytes
    }

    #[test]
    fn counts_what_is_there() {
        let node = field(1, &field(5, &field(5, b"")));
        let census = scan(&field(7, &node), &Limits::default()).expect("well-formed");
        assert_eq!((census.nodes, census.attributes, census.tensors, census.nesting), (1, 1, 1, 5));
    }

    #[test]
    fn ten_megabytes_of_small_messages_are_refused() {
        let junk: [(u8, &[u8]); 4] = [
            (7, &[0x0a, 0x00]),       // empty nodes
            (7, &[0x6a, 0x00]),       // empty value infos
            (7, &[0x2a, 0x00]),       // empty initializers
            (7, &[0xf8, 0x01, 0x00]), // unknown numbers
        ];
        for (number, unit) in junk {
            let bytes = field(number, &unit.repeat((10 << 20) / unit.len()));
            let error = scan(&bytes, &Limits::default());
            assert!(matches!(
                error,
                Err(ImportError::Refused { .. } | ImportError::Malformed { .. })
            ));
        }
    }

    #[test]
    fn deep_nesting_is_refused() {
        let mut bytes = Vec::new();
        for level in 0..300 {
            bytes = field([6, 5, 1][level % 3], &bytes); // graph in attribute in node
        }
        let error = scan(&field(7, &bytes), &Limits::default());
        assert!(matches!(error, Err(ImportError::Refused { what: "levels of nesting", .. })));
    }

    #[test]
    fn malformed_bytes_are_located() {
        for bytes in [&b""[..], &[0x0b], &[0x3a, 0x05, 0x00], &[0x00], &[0xff; 12], &[0x0f]] {
            let error = scan(bytes, &Limits::default());
            assert!(
                matches!(error, Err(ImportError::Malformed { offset: Some(_), .. })),
                "{bytes:?}"
            );
        }
    }
}
