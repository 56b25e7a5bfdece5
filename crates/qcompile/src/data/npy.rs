//! The npy format: a header in Python's syntax, then the raw elements. Format 1.0 to 3.0 of
//! <https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>.

use super::array::{Array, Dtype, elements};
use super::source::{content_error, expect_end, over_limit, read_bytes};
use crate::error::{Code, Error, Result};
use std::io::Read;

const MAGIC: &[u8; 6] = b"\x93NUMPY";
/// Longest header read. numpy itself stops at 10,000 characters unless told otherwise.
const HEADER_LIMIT: usize = 1 << 16;
/// Most axes, as in numpy.
const RANK_LIMIT: usize = 64;

/// What a header says.
#[derive(Debug, PartialEq, Eq)]
struct Header {
    dtype: Dtype,
    big_endian: bool,
    fortran_order: bool,
    shape: Vec<usize>,
}

/// Reads one array of at most `limit` bytes, up to the end of `reader`. Elements come out little-endian and in C order.
///
/// # Errors
/// [`Code::DataFormat`] for damage, [`Code::DataUnsupported`] for element types that are not numbers,
/// [`Code::Limit`] for size.
pub fn read(reader: &mut dyn Read, limit: u64) -> Result<Array> {
    let header = read_header(reader)?;
    let size = elements(&header.shape).and_then(|n| n.checked_mul(header.dtype.size()));
    let size = match size {
        Some(size) if size as u64 <= limit => size,
        _ => {
            return Err(over_limit(
                &format!("an array {}{:?} is", header.dtype, header.shape),
                limit,
            ));
        }
    };
    let mut bytes = read_bytes(reader, size)?;
    expect_end(reader)?;
    if header.big_endian {
        swap_bytes(&mut bytes, header.dtype.size());
    }
    if header.dtype == Dtype::Bool {
        bytes.iter_mut().for_each(|byte| *byte = u8::from(*byte != 0));
    }
    if header.fortran_order {
        bytes = to_c_order(&bytes, &header.shape, header.dtype.size());
    }
    Array::new(header.dtype, header.shape, bytes)
}

/// Writes `array` in format 1.0, or 2.0 for a header longer than that allows.
#[must_use]
pub fn write(array: &Array) -> Vec<u8> {
    let comma = if array.shape.len() == 1 { "," } else { "" };
    let extents: Vec<String> = array.shape.iter().map(usize::to_string).collect();
    let mut header = format!(
        "{{'descr': '{}', 'fortran_order': False, 'shape': ({}{comma}), }}",
        description(array.dtype),
        extents.join(", ")
    );
    // The elements start at a multiple of 64 bytes, so that a mapped file is aligned.
    let wide = header.len() + 64 > usize::from(u16::MAX);
    let prefix = MAGIC.len() + 2 + if wide { 4 } else { 2 };
    let fill = 63 - (prefix + header.len()) % 64;
    header.extend(std::iter::repeat_n(' ', fill));
    header.push('\n');
    let mut out = Vec::with_capacity(prefix + header.len() + array.bytes.len());
    out.extend_from_slice(MAGIC);
    if wide {
        out.extend_from_slice(&[2, 0]);
        out.extend_from_slice(&(header.len() as u32).to_le_bytes());
    } else {
        out.extend_from_slice(&[1, 0]);
        out.extend_from_slice(&(header.len() as u16).to_le_bytes());
    }
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(&array.bytes);
    out
}

fn description(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::Bool => "|b1",
        Dtype::I8 => "|i1",
        Dtype::U8 => "|u1",
        Dtype::I16 => "<i2",
        Dtype::I32 => "<i4",
        Dtype::I64 => "<i8",
        Dtype::U16 => "<u2",
        Dtype::U32 => "<u4",
        Dtype::U64 => "<u8",
        Dtype::F16 => "<f2",
        Dtype::Bf16 => "|V2",
        Dtype::F32 => "<f4",
        Dtype::F64 => "<f8",
    }
}

fn malformed(what: &str) -> Error {
    Error::new(Code::DataFormat, format!("malformed npy header: {what}"))
}

fn read_header(reader: &mut dyn Read) -> Result<Header> {
    let mut take = |bytes: &mut [u8]| {
        reader.read_exact(bytes).map_err(|source| match source.kind() {
            std::io::ErrorKind::UnexpectedEof => malformed("the file ends in it"),
            _ => content_error(&source),
        })
    };
    let mut start = [0; 8];
    take(&mut start)?;
    if &start[..6] != MAGIC {
        return Err(malformed("the file does not begin as npy files do"));
    }
    let length = match start[6] {
        1 => {
            let mut length = [0; 2];
            take(&mut length)?;
            usize::from(u16::from_le_bytes(length))
        }
        2 | 3 => {
            let mut length = [0; 4];
            take(&mut length)?;
            u32::from_le_bytes(length) as usize
        }
        version => {
            let cause = format!("npy format {version}.{} is not known", start[7]);
            return Err(Error::new(Code::DataUnsupported, cause));
        }
    };
    if length > HEADER_LIMIT {
        return Err(over_limit("the npy header is", HEADER_LIMIT as u64));
    }
    let mut text = vec![0; length];
    take(&mut text)?;
    let text = std::str::from_utf8(&text).map_err(|_| malformed("not text"))?;
    parse_header(text)
}

/// Parses `{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }`.
fn parse_header(text: &str) -> Result<Header> {
    let mut cursor = Cursor { rest: text };
    let (mut descr, mut order, mut shape) = (None, None, None);
    cursor.expect('{')?;
    while !cursor.accept('}') {
        let key = cursor.string()?;
        cursor.expect(':')?;
        match key {
            "descr" if cursor.rest.trim_start().starts_with('[') => {
                return Err(unsupported("records of several fields"));
            }
            "descr" => descr = Some(parse_description(cursor.string()?)?),
            "fortran_order" => order = Some(cursor.truth()?),
            "shape" => shape = Some(cursor.extents()?),
            _ => return Err(malformed("an unknown key")),
        }
        if !cursor.accept(',') {
            cursor.expect('}')?;
            break;
        }
    }
    if !cursor.rest.trim().is_empty() {
        return Err(malformed("text after its end"));
    }
    let (dtype, big_endian) = descr.ok_or_else(|| malformed("no `descr`"))?;
    Ok(Header {
        dtype,
        big_endian,
        fortran_order: order.ok_or_else(|| malformed("no `fortran_order`"))?,
        shape: shape.ok_or_else(|| malformed("no `shape`"))?,
    })
}

fn unsupported(what: &str) -> Error {
    Error::new(Code::DataUnsupported, format!("arrays of {what} are not read"))
        .help("save numbers: array.astype('float32'), 'int64', ...")
}

fn parse_description(text: &str) -> Result<(Dtype, bool)> {
    let (order, kind) = match text.as_bytes().first() {
        Some(b'<' | b'|' | b'=') => (false, &text[1..]),
        Some(b'>') => (true, &text[1..]),
        _ => (false, text),
    };
    let dtype = match kind {
        "b1" | "?" => Dtype::Bool,
        "i1" => Dtype::I8,
        "i2" => Dtype::I16,
        "i4" => Dtype::I32,
        "i8" => Dtype::I64,
        "u1" => Dtype::U8,
        "u2" => Dtype::U16,
        "u4" => Dtype::U32,
        "u8" => Dtype::U64,
        "f2" => Dtype::F16,
        "f4" => Dtype::F32,
        "f8" => Dtype::F64,
        "V2" | "bfloat16" => Dtype::Bf16,
        _ if kind.starts_with('O') => {
            return Err(unsupported("Python objects (pickles can run code)"));
        }
        _ if kind.starts_with(['U', 'S']) => return Err(unsupported("text")),
        _ => return Err(unsupported(&format!("numpy type `{text}`"))),
    };
    Ok((dtype, order))
}

/// Reader of the few Python literals a header has.
struct Cursor<'a> {
    rest: &'a str,
}

impl<'a> Cursor<'a> {
    fn accept(&mut self, wanted: char) -> bool {
        match self.rest.trim_start().strip_prefix(wanted) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn expect(&mut self, wanted: char) -> Result<()> {
        if self.accept(wanted) {
            Ok(())
        } else {
            Err(malformed(&format!("no `{wanted}` where one belongs")))
        }
    }

    fn string(&mut self) -> Result<&'a str> {
        let text = self.rest.trim_start();
        let quote = text.chars().next().filter(|c| matches!(c, '\'' | '"'));
        let quote = quote.ok_or_else(|| malformed("no string where one belongs"))?;
        let (string, rest) =
            text[1..].split_once(quote).ok_or_else(|| malformed("a string does not end"))?;
        self.rest = rest;
        Ok(string)
    }

    fn truth(&mut self) -> Result<bool> {
        let text = self.rest.trim_start();
        for (word, value) in [("True", true), ("False", false)] {
            if let Some(rest) = text.strip_prefix(word) {
                self.rest = rest;
                return Ok(value);
            }
        }
        Err(malformed("`fortran_order` is neither True nor False"))
    }

    fn extents(&mut self) -> Result<Vec<usize>> {
        self.expect('(')?;
        let mut extents = Vec::new();
        while !self.accept(')') {
            let text = self.rest.trim_start();
            let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
            let extent = text[..end].parse::<usize>();
            extents.push(extent.map_err(|_| malformed("an extent of `shape` is not a size"))?);
            if extents.len() > RANK_LIMIT {
                return Err(malformed("more axes than numpy has"));
            }
            // Python 2 wrote long integers with an L.
            self.rest = text[end..].strip_prefix('L').unwrap_or(&text[end..]);
            if !self.accept(',') {
                self.expect(')')?;
                break;
            }
        }
        Ok(extents)
    }
}

/// Reverses each element.
pub(crate) fn swap_bytes(bytes: &mut [u8], size: usize) {
    if size > 1 {
        bytes.chunks_exact_mut(size).for_each(<[u8]>::reverse);
    }
}

/// Elements of a column-major array in row-major order.
fn to_c_order(bytes: &[u8], shape: &[usize], size: usize) -> Vec<u8> {
    let mut strides = Vec::with_capacity(shape.len());
    let mut stride = size;
    for &extent in shape {
        strides.push(stride);
        stride *= extent;
    }
    let mut out = Vec::with_capacity(bytes.len());
    let mut index = vec![0; shape.len()];
    let mut offset = 0;
    while out.len() < bytes.len() {
        out.extend_from_slice(&bytes[offset..offset + size]);
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            offset += strides[axis];
            if index[axis] < shape[axis] {
                break;
            }
            offset -= strides[axis] * shape[axis];
            index[axis] = 0;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: u64 = 1 << 20;

    fn file(header: &str, elements: &[u8]) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend([1, 0]);
        out.extend((header.len() as u16).to_le_bytes());
        out.extend(header.as_bytes());
        out.extend(elements);
        out
    }

    #[test]
    fn writes_what_it_reads() {
        let dtypes = [
            Dtype::Bool,
            Dtype::I8,
            Dtype::I16,
            Dtype::I32,
            Dtype::I64,
            Dtype::U8,
            Dtype::U16,
            Dtype::U32,
            Dtype::U64,
            Dtype::F16,
            Dtype::Bf16,
            Dtype::F32,
            Dtype::F64,
        ];
        for dtype in dtypes {
            for shape in [vec![], vec![3], vec![2, 3], vec![0, 4]] {
                let n = shape.iter().product::<usize>() * dtype.size();
                let bytes = (0..n).map(|i| (i % 2) as u8).collect();
                let array = Array::new(dtype, shape, bytes).unwrap();
                let written = write(&array);
                assert_eq!((written.len() - n) % 64, 0);
                assert_eq!(read(&mut written.as_slice(), LIMIT).unwrap(), array);
            }
        }
    }

    #[test]
    fn reads_big_endian_fortran_order_and_old_shapes() {
        let bytes: Vec<u8> = [1_i16, 4, 2, 5, 3, 6].iter().flat_map(|v| v.to_be_bytes()).collect();
        let header = "{\"shape\": (2L, 3L), 'descr': '>i2', 'fortran_order': True}\n";
        let array = read(&mut file(header, &bytes).as_slice(), LIMIT).unwrap();
        let wanted: Vec<u8> = [1_i16, 2, 3, 4, 5, 6].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(array, Array::new(Dtype::I16, vec![2, 3], wanted).unwrap());
    }

    #[test]
    fn refuses_bad_files() {
        let good = "'fortran_order': False, 'shape': ";
        let cases: &[(Vec<u8>, Code)] = &[
            (vec![], Code::DataFormat),
            (b"\x93NUMPY\x01".to_vec(), Code::DataFormat),
            (b"\x93NUMPY\x09\x00\x00\x00".to_vec(), Code::DataUnsupported),
            (b"\x93NUMPY\x02\x00\xff\xff\xff\xff".to_vec(), Code::Limit),
            (b"\x93NUMPY\x01\x00\xff\x00{".to_vec(), Code::DataFormat),
            (file("{'descr': '|O', ", &[]), Code::DataUnsupported),
            (file("{'descr': '<U4', ", &[]), Code::DataUnsupported),
            (file("{'descr': [('a', '<f4')], ", &[]), Code::DataUnsupported),
            (file(&format!("{{'descr': '<c8', {good}(1,)}}"), &[0; 8]), Code::DataUnsupported),
            (file(&format!("{{'descr': '<f4', {good}(2,)}}"), &[0; 7]), Code::DataFormat),
            (file(&format!("{{'descr': '<f4', {good}(2,)}}"), &[0; 9]), Code::DataFormat),
            (file(&format!("{{'descr': '<f4', {good}(-2,)}}"), &[]), Code::DataFormat),
            (file(&format!("{{'descr': '<f4', {good}(2,)}} x"), &[0; 8]), Code::DataFormat),
            (file(&format!("{{'descr': '<f4', {good}(2"), &[0; 8]), Code::DataFormat),
            (file("{'descr': '<f4', 'shape': (2,)}", &[0; 8]), Code::DataFormat),
            (
                file(&format!("{{'descr': '<f4', {good}(99999999999999999999,)}}"), &[]),
                Code::DataFormat,
            ),
            (
                file(&format!("{{'descr': '<f4', {good}(4294967296, 4294967296)}}"), &[]),
                Code::Limit,
            ),
            (file(&format!("{{'descr': '<f4', {good}(18446744073709551615,)}}"), &[]), Code::Limit),
            (
                file(&format!("{{'descr': '<f4', {good}({})}}", "1,".repeat(65)), &[0; 4]),
                Code::DataFormat,
            ),
        ];
        for (bytes, code) in cases {
            let error = read(&mut bytes.as_slice(), LIMIT).unwrap_err();
            assert_eq!(error.code(), *code, "{error} for {:?}", String::from_utf8_lossy(bytes));
        }
        let empty = file(
            "{'descr': '<f8', 'fortran_order': True, 'shape': (0, 9223372036854775807, 4)}",
            &[],
        );
        assert_eq!(read(&mut empty.as_slice(), LIMIT).unwrap_err().code(), Code::Limit);
        // Any byte of a header changed: an error or an array, never a panic.
        let whole = write(&Array::from_f32(vec![2, 3], &[0.0; 6]).unwrap());
        for at in 0..128 {
            for mask in [1, 0x20, 0x80, 0xff] {
                let mut bad = whole.clone();
                bad[at] ^= mask;
                let _ = read(&mut bad.as_slice(), LIMIT);
            }
        }
        // A claim within the limit costs no more memory than what is there.
        let claim = file(&format!("{{'descr': '<f8', {good}(100000000000,)}}"), &[0; 8]);
        let error = read(&mut claim.as_slice(), u64::MAX).unwrap_err();
        assert_eq!(error.code(), Code::DataFormat, "{error}");
    }
}
