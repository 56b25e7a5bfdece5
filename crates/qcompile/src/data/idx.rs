//! The IDX format of the MNIST family: two zero bytes, element type, rank, big-endian extents, elements.

use super::array::{Array, Dtype, elements};
use super::npy::swap_bytes;
use super::source::{content_error, expect_end, over_limit, read_bytes};
use crate::error::{Code, Error, Result};
use std::io::Read;

/// Reads one array of at most `limit` bytes, up to the end of `reader`.
///
/// # Errors
/// [`Code::DataFormat`] for damage, [`Code::Limit`] for size.
pub fn read(reader: &mut dyn Read, limit: u64) -> Result<Array> {
    let mut start = [0; 4];
    reader.read_exact(&mut start).map_err(|e| content_error(&e))?;
    let dtype = match start {
        [0, 0, 0x08, _] => Dtype::U8,
        [0, 0, 0x09, _] => Dtype::I8,
        [0, 0, 0x0b, _] => Dtype::I16,
        [0, 0, 0x0c, _] => Dtype::I32,
        [0, 0, 0x0d, _] => Dtype::F32,
        [0, 0, 0x0e, _] => Dtype::F64,
        _ => return Err(Error::new(Code::DataFormat, "the file does not begin as IDX files do")),
    };
    let mut shape = Vec::new();
    for _ in 0..start[3] {
        let mut extent = [0; 4];
        reader.read_exact(&mut extent).map_err(|e| content_error(&e))?;
        shape.push(u32::from_be_bytes(extent) as usize);
    }
    let size = elements(&shape).and_then(|n| n.checked_mul(dtype.size()));
    let size = match size {
        Some(size) if size as u64 <= limit => size,
        _ => return Err(over_limit(&format!("an array {dtype}{shape:?} is"), limit)),
    };
    let mut bytes = read_bytes(reader, size)?;
    expect_end(reader)?;
    swap_bytes(&mut bytes, dtype.size());
    Array::new(dtype, shape, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_images_and_wide_elements() {
        let file = [0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 2, 9, 8, 7, 6];
        let array = read(&mut file.as_slice(), 100).unwrap();
        assert_eq!(array, Array::from_u8(vec![1, 2, 2], &[9, 8, 7, 6]).unwrap());
        let file = [0, 0, 12, 1, 0, 0, 0, 1, 0, 0, 1, 2];
        let array = read(&mut file.as_slice(), 100).unwrap();
        assert_eq!(array.to_i32().unwrap(), [258]);
    }

    #[test]
    fn refuses_bad_files() {
        let cases: &[(&[u8], Code)] = &[
            (&[], Code::DataFormat),
            (&[0, 0, 8, 1], Code::DataFormat),
            (&[0, 0, 10, 0, 1], Code::DataFormat),
            (&[1, 0, 8, 0, 1], Code::DataFormat),
            (&[0, 0, 8, 1, 0, 0, 0, 2, 1], Code::DataFormat),
            (&[0, 0, 8, 1, 0, 0, 0, 1, 1, 1], Code::DataFormat),
            (&[0, 0, 8, 1, 0xff, 0xff, 0xff, 0xff, 1], Code::Limit),
            (&[0, 0, 14, 2, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], Code::Limit),
        ];
        for (bytes, code) in cases {
            assert_eq!(read(&mut &bytes[..], 100).unwrap_err().code(), *code, "{bytes:?}");
        }
        // 255 axes of extent 2 overflow the number of elements.
        let mut wide = vec![0, 0, 8, 255];
        wide.extend([0, 0, 0, 2].repeat(255));
        assert_eq!(read(&mut wide.as_slice(), u64::MAX).unwrap_err().code(), Code::Limit);
    }
}
