//! Parameters without a copy in f32: stored in bf16, and widened where they are read.

use crate::PassError;
use crate::builder::Builder;
use qcompile_ir::{DType, Graph, NodeId, Op, Region, Tensor};
use std::sync::Arc;

/// Whether the note of a parameter says that it is updated in low precision.
pub(super) fn updates_low(graph: &Graph, param: NodeId) -> bool {
    graph.node(param).note.precision.is_some_and(|precision| precision.update != DType::F32)
}

/// Stores in bf16 every f32 parameter whose note says that it is updated in low precision; who reads it reads it
/// widened. Call after `differentiate`, so that gradients stay f32. Returns how many there are.
///
/// # Errors
/// Only by a defect.
pub fn store_in_bf16(graph: &mut Graph) -> Result<usize, PassError> {
    let params = of_type(graph, DType::F32);
    for &param in &params {
        let stored = replaced(graph, param, DType::BF16)?;
        let prefix = name(graph, stored);
        let wide =
            Builder::new(graph, Region::Forward, &prefix).cast("wide", stored, DType::F32)?;
        graph.replace_uses(param, wide)?;
    }
    graph.sweep();
    Ok(params.len())
}

/// Stores in f32 again what [`store_in_bf16`] stores in bf16, in a graph that does not train: for what other programs
/// take. Returns how many there are.
///
/// # Errors
/// Only by a defect.
pub fn widen(graph: &mut Graph) -> Result<usize, PassError> {
    let params = of_type(graph, DType::BF16);
    for &param in &params {
        let wide = replaced(graph, param, DType::F32)?;
        for (user, _) in graph.uses(param) {
            if *graph.op(user) == Op::Cast(DType::F32) {
                graph.replace_uses(user, wide)?;
            }
        }
        let prefix = name(graph, wide);
        let narrow =
            Builder::new(graph, Region::Forward, &prefix).cast("narrow", wide, DType::BF16)?;
        graph.replace_uses(param, narrow)?;
    }
    graph.sweep();
    Ok(params.len())
}

fn name(graph: &Graph, id: NodeId) -> String {
    graph.node(id).name.as_str().to_owned()
}

fn of_type(graph: &Graph, dtype: DType) -> Vec<NodeId> {
    let params = graph.leaves(|op| matches!(op, Op::Param(_)));
    let fits = |&id: &NodeId| graph.ty(id).dtype == dtype && updates_low(graph, id);
    params.into_iter().filter(fits).collect()
}

/// A parameter of the same values in another type, with the name and the note.
fn replaced(graph: &mut Graph, param: NodeId, dtype: DType) -> Result<NodeId, PassError> {
    let Op::Param(tensor) = graph.op(param) else {
        return Err(super::unsupported(format!("{} is no parameter", graph.node(param).name)));
    };
    let values = Tensor::from_f64(dtype, tensor.shape(), &tensor.to_f64());
    let values = values.ok_or_else(|| super::unsupported("a tensor of another size".to_owned()))?;
    let note = graph.node(param).note.clone();
    let new = graph.add(Op::Param(Arc::new(values)), &[], name(graph, param), Region::Forward)?;
    *graph.note_mut(new) = note;
    graph.swap_names(param, new);
    Ok(new)
}
