//! The way out: what goes out as ONNX comes back as the same function.

use crate::command::{DIGITS, MLP, Place, keys};
use crate::random_graph::{Wanted, random_graph};
use crate::support::{Random, cases, inputs, parse, root};
use qcompile::export::Exported;
use qcompile::model::open;
use qcompile::{Options, Region, Trainer, TrainerOptions, Values};
use qcompile_ir::eval::{EvalOptions, eval};
use qcompile_ir::{DType, Graph, Op, Tensor};
use qcompile_onnx::{
    EXPORT_OPSETS, Export, ExportError, ExportOptions, ImportOptions, Port, export, import,
};
use qcompile_plan::{BuildOptions, build};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

const BATCH: usize = 3;

/// Ports of all inputs and outputs of a graph.
fn ports(graph: &Graph) -> (Vec<Port>, Vec<Port>) {
    let port = |name: &str, id| Port {
        name: name.to_owned(),
        ty: graph.ty(id).clone(),
        onnx_dtype: String::new(),
    };
    let inputs = graph.leaves(|op| matches!(op, Op::Input(_))).into_iter();
    let inputs = inputs.map(|id| port(graph.node(id).name.as_str(), id)).collect();
    let outputs = graph.outputs().iter().map(|(name, id)| port(name, *id)).collect();
    (inputs, outputs)
}

fn exported(graph: &Graph, opset: u32) -> Result<Export, ExportError> {
    let (inputs, outputs) = ports(graph);
    let options =
        ExportOptions { opset, inputs: &inputs, outputs: &outputs, producer_version: "0" };
    export(graph, &options)
}

/// Outputs by name, by the reference evaluator; none where an index is out of range.
fn evaluated(graph: &Graph, given: &BTreeMap<String, Tensor>) -> Option<BTreeMap<String, Vec<f64>>> {
    let values = eval(graph, given, BATCH, &EvalOptions::default()).ok()?;
    let of = |(name, id): &(String, _)| {
        let value = values.get_f64(graph.node(*id).name.as_str()).expect("evaluated");
        (name.clone(), value)
    };
    Some(graph.outputs().iter().map(of).collect())
}

/// The largest difference that rounding explains, relative to the largest value.
fn tolerance(graph: &Graph) -> f64 {
    let of = |dtype| match dtype {
        DType::F16 => 4e-3,
        DType::BF16 => 3e-2,
        _ => 1e-5,
    };
    graph.ids().map(|id| of(graph.ty(id).dtype)).fold(0.0, f64::max)
}

fn check_close(place: &str, got: &[f64], wanted: &[f64], tolerance: f64) {
    assert_eq!(got.len(), wanted.len(), "{place}");
    let largest = wanted.iter().filter(|x| x.is_finite()).fold(1.0_f64, |m, x| m.max(x.abs()));
    for (at, (got, wanted)) in got.iter().zip(wanted).enumerate() {
        let same = got == wanted || (got.is_nan() && wanted.is_nan());
        assert!(
            same || (got - wanted).abs() <= tolerance * largest,
            "{place}: element {at} is {got}, not {wanted}"
        );
    }
}

/// Exports, imports what was written, and compares both by the reference evaluator.
fn check_comes_back(place: &str, graph: &Graph, opset: u32) -> Result<(), ExportError> {
    let given = inputs(graph, BATCH, 2, &mut Random::new(7));
    let Some(wanted) = evaluated(graph, &given) else { return Ok(()) };
    let written = exported(graph, opset)?;
    assert_eq!(exported(graph, opset).as_ref(), Ok(&written), "{place}: equal bytes");
    let back = import(&written.bytes, &ImportOptions::default())
        .unwrap_or_else(|error| panic!("{place}, opset {opset}: {error}\n{graph}"));
    let (ins, outs) = ports(graph);
    assert_eq!(back.inputs.iter().map(|port| &port.ty).collect::<Vec<_>>(), ins.iter().map(|port| &port.ty).collect::<Vec<_>>(), "{place}");
    assert_eq!(back.outputs.iter().map(|port| &port.ty).collect::<Vec<_>>(), outs.iter().map(|port| &port.ty).collect::<Vec<_>>(), "{place}");
    let got = evaluated(&back.graph, &given).unwrap_or_else(|| panic!("{place}: not evaluated"));
    for (name, wanted) in &wanted {
        check_close(&format!("{place}, opset {opset}, {name}"), &got[name], wanted, tolerance(graph));
    }
    Ok(())
}

/// The graphs of the tests of gradients have every op of a forward pass.
#[test]
fn every_op_comes_back() {
    let mut refused = BTreeSet::new();
    for path in cases("gradients") {
        let graph = parse(&path);
        let name = path.file_stem().expect("a file").to_string_lossy().into_owned();
        for opset in [17, 23] {
            match check_comes_back(&name, &graph, opset) {
                Ok(()) => {}
                Err(error) => {
                    refused.insert(error.to_string());
                }
            }
        }
    }
    assert_eq!(refused, BTreeSet::new());
}

#[test]
fn random_graphs_come_back() {
    let mut reasons: BTreeMap<String, usize> = BTreeMap::new();
    let mut written = 0;
    for seed in 0..400 {
        let wanted = Wanted { draws: 30, regions: 1, planned: false, smooth: true };
        let graph = random_graph(seed, wanted);
        match check_comes_back(&format!("random graph {seed}"), &graph, 23) {
            Ok(()) => written += 1,
            Err(ExportError::Unsupported { op, reason, .. }) => {
                *reasons.entry(format!("{op}: {reason}")).or_default() += 1;
            }
            Err(error) => panic!("{seed}: {error}"),
        }
    }
    eprintln!("{written} {reasons:#?}");
    assert!(written > 100, "{written} {reasons:?}");
}
