//! ONNX's own test cases: `conformance.zip`, which `tests/peers/conformance.py --write` makes, holds the small ones with
//! their inputs, the outputs that ONNX wants, and gradients by differences of ONNX's reference evaluator in float64.
//! `operators.zip` and `indexing.zip`, which `tests/peers/operators.py --write` and `tests/peers/indexing.py --write`
//! make, hold further cases in the same form.

use crate::command::Place;
use crate::support::root;
use qcompile::data::{Array, Limits, read_arrays};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::Path;

type Arrays = BTreeMap<String, Array>;

/// The files of each case in the archives.
fn cases() -> BTreeMap<String, BTreeMap<String, Vec<u8>>> {
    let mut cases: BTreeMap<String, BTreeMap<String, Vec<u8>>> = BTreeMap::new();
    for archive in ["conformance", "indexing", "operators"] {
        let path = root().join(format!("tests/{archive}.zip"));
        let file = std::fs::File::open(path).expect("committed");
        let mut archive = zip::ZipArchive::new(file).expect("well-formed");
        for at in 0..archive.len() {
            let mut entry = archive.by_index(at).expect("well-formed");
            let (case, name) = entry.name().rsplit_once('/').expect("CASE/FILE");
            let (case, name) = (case.to_owned(), name.to_owned());
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).expect("well-formed");
            cases.entry(case).or_default().insert(name, bytes);
        }
    }
    cases
}

fn arrays(path: &Path) -> Arrays {
    read_arrays(path, Limits::default()).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Runs the command over files of a case; what it wrote, or what it said.
fn run(files: &BTreeMap<String, Vec<u8>>, line: &str, wanted: &str) -> Result<[Arrays; 2], String> {
    let place = Place::new();
    for (name, bytes) in files {
        place.write(name, bytes);
    }
    let done = place.try_run(line);
    if done.code != 0 {
        return Err(done.stderr);
    }
    Ok([arrays(&place.path("got.npz")), arrays(&place.path(wanted))])
}

fn values(array: &Array) -> Vec<f64> {
    qcompile::tensors::to_tensor("", array.clone()).expect("a float type of graphs").to_f64()
}

/// What is wrong with the outputs: rtol 1e-3 and atol 1e-7, as ONNX's own runner has it, and equal for other types.
fn forward(files: &BTreeMap<String, Vec<u8>>) -> Result<(), String> {
    let line = "run model.onnx -q --inputs in.npz --outputs got.npz";
    let [got, wanted] = run(files, line, "out.npz")?;
    for (name, wanted) in &wanted {
        let got = got.get(name).ok_or(format!("output {name} is missing"))?;
        if (got.dtype, &got.shape) != (wanted.dtype, &wanted.shape) {
            return Err(format!("output {name} is {got}, not {wanted}"));
        }
        let close = |(a, b): (f64, f64)| {
            a == b || (a - b).abs() <= 1e-7 + 1e-3 * b.abs() || (a.is_nan() && b.is_nan())
        };
        let same = if wanted.dtype.is_float() {
            values(got).into_iter().zip(values(wanted)).all(close)
        } else {
            got.bytes == wanted.bytes
        };
        if !same {
            return Err(format!("output {name} differs"));
        }
    }
    Ok(())
}

/// What is wrong with the gradients: an error above 1e-3 of the largest of the case (and 1e-5).
fn backward(files: &BTreeMap<String, Vec<u8>>) -> Result<(), String> {
    let line = "run loss.onnx -q --train * --loss output --inputs rest.npz --gradients got.npz";
    let [got, wanted] = run(files, line, "gradients.npz")?;
    let known = |array: &Array| values(array).into_iter().filter(|value| !value.is_nan());
    let largest =
        wanted.values().flat_map(known).fold(0.0, |most: f64, value| most.max(value.abs()));
    for (name, wanted) in &wanted {
        let wanted = values(wanted);
        let got = got.get(name).map_or(vec![0.0; wanted.len()], values);
        let differs = |(a, b): (&f64, &f64)| {
            let error = (a - b).abs();
            !b.is_nan() && (error.is_nan() || error > 1e-3 * largest + 1e-5)
        };
        if let Some(at) = got.iter().zip(&wanted).position(differs) {
            let (got, wanted) = (got[at], wanted[at]);
            return Err(format!("gradient of {name} is {got} at {at}, not {wanted}"));
        }
    }
    Ok(())
}

/// Runs a check on every case that has the file, on two threads.
fn check(
    file: &str,
    at_least: usize,
    check: impl Fn(&BTreeMap<String, Vec<u8>>) -> Result<(), String> + Sync,
) {
    let cases: Vec<_> = cases().into_iter().filter(|(_, files)| files.contains_key(file)).collect();
    assert!(cases.len() >= at_least, "only {} cases have {file}", cases.len());
    let failures = std::sync::Mutex::new(BTreeSet::new());
    std::thread::scope(|scope| {
        for part in cases.chunks(cases.len().div_ceil(2)) {
            let (check, failures) = (&check, &failures);
            scope.spawn(move || {
                for (name, files) in part {
                    if let Err(said) = check(files) {
                        failures.lock().expect("no panic").insert(format!("{name}: {said}"));
                    }
                }
            });
        }
    });
    let failures: Vec<String> = failures.into_inner().expect("no panic").into_iter().collect();
    assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn outputs_are_those_that_onnx_wants() {
    check("out.npz", 1900, forward);
}

#[test]
fn gradients_are_those_of_float64_differences() {
    check("gradients.npz", 1000, backward);
}
