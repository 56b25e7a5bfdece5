//! Takes the roundings of [`quantize`](super) out again: what is left computes in f32 with the weights as they are.
//!
//! *Before*: a graph whose values are rounded by `quantize` and by casts to bf16. *After*: none of those; what moved or
//! chose among rounded values does so among the values themselves. *Why here*: on a copy of the evaluation form that
//! leaves for programs that know no roundings. A cast to bf16 of the model itself goes as well, as nothing tells it apart.

use crate::PassError;
use qcompile_ir::{DType, Graph, NodeId, Op, Region};
use std::collections::BTreeMap;

/// What a value of the old graph is in the new one.
#[derive(Clone, Copy)]
struct Copied {
    id: NodeId,
    /// The element type that the value had, where it is in f32 now.
    narrow: Option<DType>,
}

/// Removes every rounding. Returns whether there was one; invalidates every [`NodeId`].
///
/// # Errors
/// [`PassError::Unsupported`] where a rounded value meets one that was never f32.
pub fn remove(graph: &mut Graph) -> Result<bool, PassError> {
    let mut copy = Graph::new(graph.name());
    let mut copies: BTreeMap<NodeId, Copied> = BTreeMap::new();
    let mut removed = false;
    for id in graph.order() {
        let operands: Vec<Copied> = graph.operands(id).iter().map(|id| copies[id]).collect();
        let made = match through(graph, &copy, id, &operands) {
            Some(made) => {
                removed = true;
                made
            }
            None => {
                removed |= matches!(graph.op(id), Op::Recurrence(r) if r.products.is_some());
                copied(graph, &mut copy, id, &operands)?
            }
        };
        copies.insert(id, made);
    }
    for (name, id) in graph.outputs() {
        let Copied { mut id, narrow } = copies[id];
        match narrow {
            Some(DType::BF16) => {
                let region = copy.node(id).region;
                id = copy.add(Op::Cast(DType::BF16), &[id], format!("{name}.narrow"), region)?;
            }
            Some(dtype) => {
                return Err(unsupported(format!("output {name} is rounded to {dtype}")));
            }
            None => {}
        }
        copy.add_output(name, id);
    }
    for (leaf, value) in graph.next() {
        copy.set_next(copies[leaf].id, copies[value].id)?;
    }
    *graph = copy;
    Ok(removed)
}

fn unsupported(reason: String) -> PassError {
    PassError::Unsupported { pass: "remove-roundings", reason }
}

/// What a rounding is instead, or what was widened again.
fn through(graph: &Graph, copy: &Graph, id: NodeId, operands: &[Copied]) -> Option<Copied> {
    let first = *operands.first()?;
    let is_f32 = copy.ty(first.id).dtype == DType::F32;
    match graph.op(id) {
        Op::Quantize { dtype, .. } if is_f32 => Some(Copied { narrow: Some(*dtype), ..first }),
        Op::Cast(DType::BF16) if is_f32 && graph.ty(graph.operand(id, 0)).dtype.is_float() => {
            Some(Copied { narrow: Some(DType::BF16), ..first })
        }
        Op::Dequantize { .. } | Op::Cast(DType::F32) if first.narrow.is_some() => {
            Some(Copied { narrow: None, ..first })
        }
        _ => None,
    }
}

/// The same op over what its operands have become.
fn copied(
    graph: &Graph,
    copy: &mut Graph,
    id: NodeId,
    operands: &[Copied],
) -> Result<Copied, PassError> {
    let node = graph.node(id);
    let narrow = operands.iter().find_map(|operand| operand.narrow);
    let mut ids = Vec::with_capacity(operands.len());
    for (operand, old) in operands.iter().zip(graph.operands(id)) {
        let ty = graph.ty(old);
        ids.push(match narrow {
            // A constant beside rounded values.
            Some(dtype) if operand.narrow.is_none() && ty.dtype == dtype => {
                if dtype != DType::BF16 {
                    return Err(unsupported(format!("{} is not rounded, {} is", ty, node.name)));
                }
                copy.add(
                    Op::Cast(DType::F32),
                    &[operand.id],
                    format!("{}.wide", graph.node(old).name),
                    Region::Forward,
                )?
            }
            _ => operand.id,
        });
    }
    let op = match node.op.clone() {
        Op::Recurrence(recurrence) => Op::Recurrence(recurrence.with_products(None)),
        Op::Attention { scale, causal, .. } => {
            Op::Attention { scale, causal, products: DType::F32 }
        }
        other => other,
    };
    let new = copy.add(op, &ids, node.name.clone(), node.region)?;
    *copy.note_mut(new) = node.note.clone();
    copy.note_mut(new).precision = None;
    let narrow = narrow.filter(|&dtype| graph.ty(id).dtype == dtype);
    Ok(Copied { id: new, narrow })
}
