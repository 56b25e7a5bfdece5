//! The npz format: a zip archive of npy files, stored or deflated.

use super::array::Array;
use super::npy;
use super::source::{Limits, content_error, over_limit};
use crate::error::{Code, Error, Result};
use std::collections::BTreeMap;
use std::io::{Cursor, Read, Seek, Write};
use zip::result::ZipError;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

/// Most arrays in one archive.
const MEMBER_LIMIT: usize = 1 << 16;

/// Reads all arrays of an archive, or only the one called `key`. A member's name is the array's name with `.npy`.
///
/// # Errors
/// As [`npy::read`], with the array's name for a place; [`Code::DataName`] when there is no array `key`.
pub fn read<R: Read + Seek>(
    file: R,
    key: Option<&str>,
    limits: Limits,
) -> Result<BTreeMap<String, Array>> {
    let mut archive = ZipArchive::new(file).map_err(|e| zip_error(&e))?;
    if archive.len() > MEMBER_LIMIT {
        let cause =
            format!("the archive has {} members, at most {MEMBER_LIMIT} are read", archive.len());
        return Err(Error::new(Code::Limit, cause));
    }
    let names: Vec<String> = archive.file_names().map(array_name).collect();
    if let Some(key) = key
        && !names.iter().any(|name| name == key)
    {
        return Err(Error::new(Code::DataName, format!("the archive has no array `{key}`"))
            .did_you_mean(key, names.iter().map(String::as_str))
            .help(format!("it has {}", names.join(", "))));
    }
    let mut arrays = BTreeMap::new();
    let mut left = limits.bytes;
    for index in 0..archive.len() {
        let mut member = archive.by_index(index).map_err(|e| zip_error(&e))?;
        let name = array_name(member.name());
        if key.is_some_and(|key| key != name) {
            continue;
        }
        let limit = Limits { bytes: left }.expanded(member.compressed_size());
        let place = |error: Error| error.at(format!("array `{name}`"));
        // The header is counted too, so a little more than the array may come.
        if member.size() > limit.saturating_add(1 << 17) {
            return Err(place(over_limit("the array is", limit)));
        }
        let array = npy::read(&mut member, limit).map_err(place)?;
        left -= array.bytes.len() as u64;
        if arrays.insert(name.clone(), array).is_some() {
            let cause = format!("the archive has two arrays `{name}`");
            return Err(Error::new(Code::DataFormat, cause));
        }
    }
    Ok(arrays)
}

/// An archive of `arrays` as numpy's `savez` writes it: stored, in the order of the names, equal for equal arrays.
///
/// # Errors
/// [`Code::Internal`] when the archive cannot be made, which memory alone decides.
pub fn write(arrays: &BTreeMap<String, Array>) -> Result<Vec<u8>> {
    let bytes: usize = arrays.values().map(|array| array.bytes.len() + 512).sum();
    let mut archive = ZipWriter::new(Cursor::new(Vec::with_capacity(bytes)));
    let failed = |e: ZipError| Error::new(Code::Internal, format!("cannot make the archive: {e}"));
    for (name, array) in arrays {
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Stored)
            .large_file(array.bytes.len() as u64 >= u64::from(u32::MAX) - (1 << 17));
        archive.start_file(format!("{name}.npy"), options).map_err(failed)?;
        archive.write_all(&npy::write(array)).map_err(|e| failed(ZipError::Io(e)))?;
    }
    Ok(archive.finish().map_err(failed)?.into_inner())
}

fn array_name(member: &str) -> String {
    member.strip_suffix(".npy").unwrap_or(member).to_owned()
}

fn zip_error(source: &ZipError) -> Error {
    match source {
        ZipError::Io(io) => content_error(io),
        ZipError::UnsupportedArchive(what) => {
            Error::new(Code::DataUnsupported, format!("zip archive not read: {what}"))
        }
        other => Error::new(Code::DataFormat, format!("damaged zip archive: {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::array::Dtype;

    fn sample() -> BTreeMap<String, Array> {
        BTreeMap::from([
            ("label".to_owned(), Array::from_i64(vec![2], &[1, 0]).unwrap()),
            ("x.1/a".to_owned(), Array::from_f32(vec![2, 2], &[1.0, 2.0, 3.0, 4.0]).unwrap()),
        ])
    }

    fn read_bytes(bytes: &[u8], key: Option<&str>) -> Result<BTreeMap<String, Array>> {
        read(Cursor::new(bytes), key, Limits::default())
    }

    fn archive(name: &str, bytes: &[u8]) -> Vec<u8> {
        let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
        let options = SimpleFileOptions::default().compression_method(CompressionMethod::Deflated);
        archive.start_file(name, options).unwrap();
        archive.write_all(bytes).unwrap();
        archive.finish().unwrap().into_inner()
    }

    #[test]
    fn writes_what_it_reads() {
        let bytes = write(&sample()).unwrap();
        assert_eq!(bytes, write(&sample()).unwrap());
        assert_eq!(read_bytes(&bytes, None).unwrap(), sample());
        assert_eq!(read_bytes(&bytes, Some("label")).unwrap().len(), 1);
        let error = read_bytes(&bytes, Some("labels")).unwrap_err();
        assert_eq!(error.help_lines()[0], "did you mean `label`?");
    }

    #[test]
    fn reads_deflated() {
        let array = Array::new(Dtype::U8, vec![1000], vec![7; 1000]).unwrap();
        let bytes = archive("a.npy", &npy::write(&array));
        assert_eq!(read_bytes(&bytes, None).unwrap()["a"], array);
    }

    #[test]
    fn refuses_damage_and_bombs() {
        let good = write(&sample()).unwrap();
        for cut in 0..good.len() {
            assert!(read_bytes(&good[..cut], None).is_err(), "cut at {cut}");
        }
        // Any byte flipped: an error or equal arrays, never a panic, and the checksum guards the elements.
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x40;
            if let Ok(arrays) = read_bytes(&bad, None) {
                let values = |arrays: &BTreeMap<String, Array>| -> Vec<Array> {
                    arrays.values().cloned().collect()
                };
                let (mut got, mut wanted) = (values(&arrays), values(&sample()));
                got.sort_by_key(|a| a.bytes.clone());
                wanted.sort_by_key(|a| a.bytes.clone());
                assert!(got.iter().all(|a| wanted.contains(a)), "flip at {at}: {arrays:?}");
            }
        }
        let mut header = npy::write(&Array::new(Dtype::U8, vec![0], vec![]).unwrap());
        let text = String::from_utf8_lossy(&header[10..]).replace("(0,)", "(300000000,)").replacen(
            "            ",
            "    ",
            1,
        );
        header.truncate(10);
        header.extend(text.as_bytes());
        let bomb = archive("bomb.npy", &header);
        let error = read_bytes(&bomb, None).unwrap_err();
        assert_eq!((error.code(), error.places()[0].as_str()), (Code::Limit, "array `bomb`"));
        let few = Limits { bytes: 8 };
        assert_eq!(read(Cursor::new(good), None, few).unwrap_err().code(), Code::Limit);
    }
}
