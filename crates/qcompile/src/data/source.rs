//! Reading files of unknown worth: what they are is told by their content, and how much they may take is bounded.

use crate::error::{Code, Error, Result};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

/// How much one data file may take in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes of all arrays of one file together.
    pub bytes: u64,
}

impl Default for Limits {
    /// 8 GiB.
    fn default() -> Self {
        Limits { bytes: 8 << 30 }
    }
}

/// Any compressed file may grow to this.
const EXPANDED_ALWAYS: u64 = 256 << 20;
/// Beyond it, to this many times its size. Deflate reaches 1032, images and tables rarely 20.
const EXPANDED_RATIO: u64 = 200;

impl Limits {
    /// Most bytes that `compressed` bytes may expand to.
    pub(crate) fn expanded(self, compressed: u64) -> u64 {
        self.bytes.min(EXPANDED_ALWAYS.max(compressed.saturating_mul(EXPANDED_RATIO)))
    }
}

/// An opened file with what its first bytes and its size tell.
pub(crate) struct Source {
    /// The content, from its beginning; decompressed when the file is gzip.
    pub(crate) reader: Box<dyn BufRead>,
    /// The file itself, for formats that seek.
    pub(crate) file: File,
    /// Most bytes the content may have.
    pub(crate) limit: u64,
    /// What the content is.
    pub(crate) format: Format,
}

/// Format of a data file, by content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Npy,
    Npz,
    Idx,
    Table,
}

/// Opens `path` and finds out its format.
///
/// # Errors
/// `ReadFailed`, `DataFormat` (empty, damaged gzip) or `DataUnsupported`, each with the path for its place.
pub(crate) fn open(path: &Path, limits: Limits) -> Result<Source> {
    let place = path.display().to_string();
    let open = || -> std::io::Result<(File, File, u64)> {
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        if file.metadata()?.is_dir() {
            return Err(std::io::Error::from(std::io::ErrorKind::IsADirectory));
        }
        Ok((file.try_clone()?, file, size))
    };
    let (copy, file, size) = open().map_err(|e| Error::read(&place, &e))?;
    let mut reader: Box<dyn BufRead> = Box::new(BufReader::with_capacity(1 << 16, copy));
    let mut limit = limits.bytes;
    let mut head = peek(&mut *reader).map_err(|e| Error::read(&place, &e))?;
    if head.starts_with(&[0x1f, 0x8b]) {
        reader = Box::new(BufReader::with_capacity(
            1 << 16,
            flate2::bufread::MultiGzDecoder::new(reader),
        ));
        limit = limits.expanded(size);
        head = peek(&mut *reader).map_err(|e| content_error(&e).at(&place))?;
    }
    let format = match head.as_slice() {
        [] => return Err(Error::new(Code::DataFormat, "the file is empty").at(place)),
        [0x93, b'N', b'U', b'M', b'P', b'Y', ..] => Format::Npy,
        [b'P', b'K', 3, 4, ..] | [b'P', b'K', 5, 6, ..] => Format::Npz,
        [0, 0, 8..=14, 0..=32, ..] => Format::Idx,
        text if is_text(text) => Format::Table,
        _ => {
            return Err(Error::new(Code::DataUnsupported, "the file is of no kind that is read")
                .at(place)
                .help("data is npz, npy, IDX or CSV; npy, IDX and CSV may be gzip files"));
        }
    };
    Ok(Source { reader, file, limit, format })
}

/// Whether content that begins so may be text: UTF-8, perhaps cut in a character, without control characters.
fn is_text(head: &[u8]) -> bool {
    let whole = match std::str::from_utf8(head) {
        Err(e) if e.error_len().is_some() => return false,
        Err(e) => &head[..e.valid_up_to()],
        Ok(_) => head,
    };
    whole.iter().all(|&byte| byte >= b' ' || matches!(byte, b'\t' | b'\n' | b'\r'))
}

/// Up to 256 first bytes, without taking them.
fn peek(reader: &mut dyn BufRead) -> std::io::Result<Vec<u8>> {
    let buffer = reader.fill_buf()?;
    Ok(buffer[..buffer.len().min(256)].to_vec())
}

/// An error met while reading content: damage is the file's fault, anything else the system's.
pub(crate) fn content_error(source: &std::io::Error) -> Error {
    use std::io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};
    match source.kind() {
        UnexpectedEof | InvalidData | InvalidInput => {
            Error::new(Code::DataFormat, format!("the file is damaged or truncated: {source}"))
        }
        _ => Error::new(Code::ReadFailed, format!("cannot read: {source}")),
    }
}

/// The refusal of content that is larger than its limit.
pub(crate) fn over_limit(what: &str, limit: u64) -> Error {
    Error::new(
        Code::Limit,
        format!("{what} larger than the limit of {}", crate::terminal::bytes(limit)),
    )
}

/// Exactly `size` bytes. Memory grows with what really arrives, whatever a header claims.
pub(crate) fn read_bytes(reader: &mut dyn Read, size: usize) -> Result<Vec<u8>> {
    const TRUSTED: usize = 64 << 20;
    let mut bytes = Vec::new();
    let reserved = bytes.try_reserve_exact(size.min(TRUSTED));
    reserved.map_err(|_| Error::new(Code::Limit, "no memory left for the data"))?;
    while bytes.len() < size {
        let before = bytes.len();
        let step = (size - before).min(before.max(TRUSTED));
        let reserved = bytes.try_reserve_exact(step);
        reserved.map_err(|_| Error::new(Code::Limit, "no memory left for the data"))?;
        let got =
            reader.take(step as u64).read_to_end(&mut bytes).map_err(|e| content_error(&e))?;
        if got < step {
            return Err(Error::new(
                Code::DataFormat,
                format!(
                    "the file is truncated: {size} bytes of elements announced, {} there",
                    bytes.len()
                ),
            ));
        }
    }
    Ok(bytes)
}

/// Refuses content that goes on.
pub(crate) fn expect_end(reader: &mut dyn Read) -> Result<()> {
    let mut one = [0];
    match reader.read(&mut one).map_err(|e| content_error(&e))? {
        0 => Ok(()),
        _ => Err(Error::new(Code::DataFormat, "the file goes on after the end of its array")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressed_files_expand_within_bounds() {
        let limits = Limits::default();
        assert_eq!(limits.expanded(1000), 256 << 20);
        assert_eq!(limits.expanded(10 << 20), 2000 << 20);
        assert_eq!(limits.expanded(u64::MAX), limits.bytes);
        assert_eq!(Limits { bytes: 5 }.expanded(1000), 5);
    }

    #[test]
    fn tells_text_from_bytes() {
        assert!(is_text("größe,label\n1,2".as_bytes()));
        assert!(is_text(&"größe".as_bytes()[..3]));
        assert!(!is_text(b"\x89PNG\r\n"));
        assert!(!is_text(b"\x7fELF\x02"));
    }
}
