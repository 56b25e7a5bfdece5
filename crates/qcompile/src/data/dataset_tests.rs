//! Tests of loading and binding, through files.

use super::*;
use crate::error::{Code, Error};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

fn input(name: &str, dtype: Dtype, sample: &[usize]) -> Vec<(String, InputType)> {
    let shape = [None].into_iter().chain(sample.iter().copied().map(Some)).collect();
    vec![(name.to_owned(), InputType { dtype, shape })]
}

fn classes(classes: usize) -> Target {
    Target::Classes { classes, rows_per_sample: 1, dtype: Dtype::I64 }
}

fn load(text: &str) -> Result<Dataset, Error> {
    Dataset::load(text, Limits::default())
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Two 2x2 images and their labels, as the MNIST files have them.
fn mnist(folder: &Path) -> (String, String) {
    let images = [0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 2, 0, 255, 51, 0, 0, 0, 0, 255];
    let labels = [0, 0, 8, 1, 0, 0, 0, 2, 3, 1];
    let (x, y) = (folder.join("images"), folder.join("labels"));
    std::fs::write(&x, gzip(&images)).unwrap();
    std::fs::write(&y, labels).unwrap();
    (x.display().to_string(), y.display().to_string())
}

#[test]
fn images_feed_flat_and_square_inputs() {
    let folder = tempfile::tempdir().unwrap();
    let (x, y) = mnist(folder.path());
    let data = load(&format!("x={x},label={y}")).unwrap();
    for sample in [&[4][..], &[1, 2, 2]] {
        let binding = data.bind(&input("pixels", Dtype::F32, sample), Some(&classes(4))).unwrap();
        assert!(binding.notes()[0].contains("divided by 255"), "{:?}", binding.notes());
        let batch = binding.batch(&[1, 0]).unwrap();
        let values = batch["pixels"].to_f32().unwrap();
        assert_eq!(values, [0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.2, 0.0]);
        assert_eq!(batch["label"], Array::from_i64(vec![2], &[1, 3]).unwrap());
    }
    let data = load(&format!("image={x}:channels=3:pad=1:mean=1,0,0:std=0.5,label={y}")).unwrap();
    let binding = data.bind(&input("image", Dtype::F32, &[3, 4, 4]), None).unwrap();
    let batch = binding.batch(&[0]).unwrap();
    assert_eq!(batch["image"].shape, [1, 3, 4, 4]);
    // The corner is padding: black, normalised as every pixel is.
    let values = batch["image"].to_f32().unwrap();
    assert_eq!((values[0], values[6], values[16], values[22]), (-2.0, 0.0, 0.0, 2.0));
}

#[test]
fn labels_are_checked() {
    let folder = tempfile::tempdir().unwrap();
    let (x, y) = mnist(folder.path());
    let data = load(&format!("x={x},label={y}")).unwrap();
    let pixels = input("x", Dtype::F32, &[4]);
    let error = data.bind(&pixels, Some(&classes(3))).unwrap_err();
    assert_eq!(error.cause(), "array `label`: sample 0 is 3, but the classes are 0 to 2");
    assert_eq!(error.code(), Code::DataLabel);
    let unlabelled = load(&x).unwrap();
    let error = unlabelled.bind(&pixels, Some(&classes(3))).unwrap_err();
    assert_eq!(error.code(), Code::DataName);
    for value in [-1, 4, i64::MIN] {
        let mut data = data.clone();
        let label = Array::from_i64(vec![2], &[0, value]).unwrap();
        data.arrays.insert(LABEL.to_owned(), label);
        let error = data.bind(&pixels, Some(&classes(4))).unwrap_err();
        assert!(error.cause().contains("sample 1"), "{error}");
    }
    let mut one_hot = data.clone();
    let label = Array::from_f32(vec![2, 4], &[0.0; 8]).unwrap();
    one_hot.arrays.insert(LABEL.to_owned(), label);
    let error = one_hot.bind(&pixels, Some(&classes(4))).unwrap_err();
    assert!(error.help_lines()[0].contains("argmax"), "{error}");
}

#[test]
fn archives_answer_inputs_by_name_and_sequences_by_row() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("train.npz");
    let tokens = Array::from_i32(vec![2, 3], &[1, 2, 3, 4, 5, 6]).unwrap();
    let label = Array::from_i32(vec![2, 3], &[2, 3, 0, 5, 6, 0]).unwrap();
    let mask = Array::from_f32(vec![2, 3], &[1.0; 6]).unwrap();
    let arrays = BTreeMap::from([
        ("tokens".to_owned(), tokens),
        ("label".to_owned(), label),
        ("mask".to_owned(), mask),
    ]);
    crate::output::write_atomically(&path, &npz::write(&arrays).unwrap()).unwrap();
    assert_eq!(read_arrays(&path, Limits::default()).unwrap(), arrays);
    let data = load(path.to_str().unwrap()).unwrap();
    let target = Target::Classes { classes: 7, rows_per_sample: 3, dtype: Dtype::I32 };
    let binding = data.bind(&input("tokens", Dtype::I64, &[3]), Some(&target)).unwrap();
    assert_eq!(binding.notes(), ["array `mask` of the data is not used"]);
    let batch = binding.batch(&[1]).unwrap();
    assert_eq!(batch["tokens"], Array::from_i64(vec![1, 3], &[4, 5, 6]).unwrap());
    assert_eq!(batch["label"], Array::from_i32(vec![3], &[5, 6, 0]).unwrap());
    let error = data.bind(&input("token", Dtype::I64, &[3]), None).unwrap_err();
    assert_eq!(error.help_lines()[0], "did you mean `tokens`?");
    let error = load(&format!("x={}", path.display())).unwrap_err();
    assert_eq!(error.code(), Code::DataName);
    let one = load(&format!("x={}:mask", path.display())).unwrap();
    assert_eq!(one.arrays.keys().collect::<Vec<_>>(), ["x"]);
}

#[test]
fn tables_answer_inputs_whole_or_by_column() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.csv.gz");
    std::fs::write(&path, gzip(b"age,label,size\n1,0,2\n3,1,4\n")).unwrap();
    let data = load(path.to_str().unwrap()).unwrap();
    let whole = data.bind(&input("features", Dtype::F32, &[2]), Some(&classes(2))).unwrap();
    assert_eq!(whole.batch(&[1]).unwrap()["features"].to_f32().unwrap(), [3.0, 4.0]);
    let mut two = input("size", Dtype::F32, &[1]);
    two.extend(input("age", Dtype::F32, &[1]));
    let batch = data.bind(&two, None).unwrap().batch(&[0, 1]).unwrap();
    assert_eq!(batch["size"], Array::from_f32(vec![2, 1], &[2.0, 4.0]).unwrap());
    assert_eq!(batch["age"], Array::from_f32(vec![2, 1], &[1.0, 3.0]).unwrap());
    // A regression target from a file of its own.
    let target = folder.path().join("y.csv");
    std::fs::write(&target, "0.5\n1.5\n").unwrap();
    let data =
        load(&format!("x={}:label=none,label={}", path.display(), target.display())).unwrap();
    let want = InputType { dtype: Dtype::F32, shape: vec![None, Some(1)] };
    let binding = data.bind(&input("x", Dtype::F32, &[3]), Some(&Target::Values(want))).unwrap();
    assert_eq!(binding.batch(&[1]).unwrap()["label"].to_f32().unwrap(), [1.5]);
}

#[test]
fn values_are_checked_with_their_sample() {
    let x = Array::from_f32(vec![3, 2], &[0.0, 0.0, 0.0, 0.0, f32::NAN, 0.0]).unwrap();
    let arrays = BTreeMap::from([("x".to_owned(), x)]);
    let data = Dataset { arrays, ..Dataset::default() };
    let mut inputs = input("x", Dtype::F32, &[2]);
    let binding = data.bind(&inputs, None).unwrap();
    assert!(binding.batch(&[0, 1]).is_ok());
    let error = binding.batch(&[0, 2]).unwrap_err();
    assert_eq!(error.cause(), "array `x`: sample 2 holds NaN, which is not a finite number");
    assert_eq!(binding.check_values().unwrap_err(), error);
    assert_eq!(binding.batch(&[3]).unwrap_err().code(), Code::DataEmpty);
    inputs[0].1.shape[0] = Some(2);
    let fixed = data.bind(&inputs, None).unwrap();
    assert_eq!(fixed.batch(&[0]).unwrap_err().code(), Code::DataShape);
    assert_eq!(fixed.check_values().unwrap_err(), error);
}

#[test]
fn refuses_bad_files() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f");
    let good = npy::write(&Array::from_f32(vec![2, 2], &[0.0; 4]).unwrap());
    let announced = [&[0, 0, 8, 1, 0xff, 0xff, 0xff, 0xff][..], &[0; 1 << 20]].concat();
    let bomb = b"1".repeat(2 << 20);
    let cases: Vec<(Vec<u8>, Code)> = vec![
        (vec![], Code::DataFormat),
        (b"\x7fELF\x02\x01".to_vec(), Code::DataUnsupported),
        (b"\x89PNG\r\n".to_vec(), Code::DataUnsupported),
        (good[..good.len() - 1].to_vec(), Code::DataFormat),
        (gzip(&good)[..60].to_vec(), Code::DataFormat),
        (gzip(b""), Code::DataFormat),
        (b"\x1f\x8b\x08\x00".to_vec(), Code::DataFormat),
        (b"PK\x03\x04junk".to_vec(), Code::DataFormat),
        (gzip(&announced), Code::Limit),
        (gzip(&bomb), Code::Limit),
        (npy::write(&Array::from_f32(vec![0, 2], &[]).unwrap()), Code::DataEmpty),
        (npy::write(&Array::from_f32(vec![], &[1.0]).unwrap()), Code::DataShape),
    ];
    for (index, (bytes, code)) in cases.into_iter().enumerate() {
        std::fs::write(&path, &bytes).unwrap();
        let limits = Limits { bytes: 1 << 20 };
        let error = Dataset::load(path.to_str().unwrap(), limits).unwrap_err();
        assert_eq!(error.code(), code, "case {index}: {error}");
    }
    let error = load(folder.path().join("none.npy").to_str().unwrap()).unwrap_err();
    assert_eq!((error.code(), error.exit().status()), (Code::ReadFailed, 74));
    assert_eq!(load(folder.path().to_str().unwrap()).unwrap_err().code(), Code::ReadFailed);
    std::fs::write(&path, &good).unwrap();
    let path = path.display();
    assert_eq!(load(&format!("{path},{path}")).unwrap_err().code(), Code::DataName);
    assert_eq!(load(&format!("{path}:key")).unwrap_err().code(), Code::Usage);
    assert_eq!(load(&format!("{path}:label=a")).unwrap_err().code(), Code::Usage);
    std::fs::write(folder.path().join("y"), npy::write(&Array::from_u8(vec![3], &[0; 3]).unwrap()))
        .unwrap();
    let error = load(&format!("x={path},label={}", folder.path().join("y").display())).unwrap_err();
    assert_eq!(error.cause(), "array `x` has 2 samples, array `label` has 3");
}
