//! Attention and its gradients with their operands in slots: read through any strides, written dense.

use crate::build::PlanError;
use crate::low::Codes;
use crate::lower::Lowering;
use crate::view::View;
use crate::{Affine, Attention, AttentionResult, Place, Strided};
use qcompile_ir::{AttentionOperand, DType, Dim, GradientRounding, Graph, NodeId, Op};
use std::collections::{BTreeMap, BTreeSet};

/// Attention with its products in i8, and its gradients, of which nothing but the rounding to bf16 is used, each with that:
/// the kernel rounds what it writes. A gradient counts only if all of its attention do, and the incoming one is bf16, too.
pub(crate) fn narrowed(
    graph: &Graph,
    views: &[View],
    codes: &BTreeMap<NodeId, [Codes; 3]>,
    live: &[bool],
    recomputed: &[bool],
) -> BTreeMap<NodeId, NodeId> {
    let results = graph.outputs().iter().map(|(_, id)| id).chain(graph.next().values());
    let named: BTreeSet<NodeId> = results.copied().collect();
    let rounding = |id: NodeId| {
        let uses = graph.uses(id);
        let [(cast, _)] = uses[..] else { return None };
        let fits = *graph.op(cast) == Op::Cast(DType::BF16)
            && !named.contains(&id)
            && !recomputed[cast.index()]
            && live[cast.index()]
            && graph.node(cast).region == graph.node(id).region;
        fits.then_some(cast)
    };
    let attentions = || codes.keys().copied().filter(|id| live[id.index()]);
    let mut narrowed: BTreeMap<NodeId, NodeId> =
        attentions().filter_map(|id| Some((id, rounding(id)?))).collect();
    // By their operands, which those of one attention have in common.
    let mut wide: BTreeSet<Vec<NodeId>> = BTreeSet::new();
    for id in attentions() {
        let Some(dy) = incoming(graph, id) else { continue };
        let of_bf16 = graph.ty(views[dy.index()].base).dtype == DType::BF16;
        if !of_bf16 || !narrowed.contains_key(&id) {
            wide.insert(graph.operands(id));
        }
    }
    narrowed.retain(|&id, _| !wide.contains(&graph.operands(id)));
    narrowed
}

/// The incoming gradient of a gradient of attention.
pub(crate) fn incoming(graph: &Graph, id: NodeId) -> Option<NodeId> {
    let Op::AttentionGrad { rounding, .. } = *graph.op(id) else { return None };
    let numbers = usize::from(rounding == GradientRounding::Stochastic);
    graph.operands(id).iter().rev().nth(numbers).copied()
}

/// The kernel of an attention, or of all wanted gradients of one (which have the same operands).
pub(crate) fn attention(lowering: &Lowering, members: &[NodeId]) -> Result<Attention, PlanError> {
    let graph = lowering.graph;
    let first = members[0];
    let op = graph.op(first);
    let operands = graph.operands(first);
    let ty = graph.ty(operands[0]);
    if !matches!(ty.dtype, DType::F32 | DType::BF16) {
        return Err(PlanError::Unsupported {
            name: graph.node(first).name.clone(),
            op: op.name(),
            ty: ty.to_string(),
        });
    }
    let fusion = lowering.fusion;
    let codes = fusion.codes.get(&first);
    let narrowed = fusion.narrowed.contains_key(&first);
    let place_of = |view: &View| {
        let strides = view.strides[..].try_into().expect("verified: attention has four dims");
        Strided { place: lowering.place(view), strides }
    };
    let strided = |id: NodeId| place_of(&fusion.strided_view(graph, id));
    let operand = |position: usize, id: NodeId| match codes {
        Some(codes) => place_of(&codes[position].view),
        None => strided(id),
    };
    let dense = |id: NodeId| {
        let stored = fusion.narrowed.get(&id).copied().unwrap_or(id);
        Place { slot: lowering.memory.slot_of[&stored], offset: Affine::ZERO }
    };
    let (scale, causal, products, result, inputs) = match *op {
        Op::AttentionGrad { scale, causal, products, rounding, .. } => {
            let (numbers, operands) = match (rounding, &operands[..]) {
                (GradientRounding::Stochastic, [operands @ .., last]) => {
                    (Some(strided(*last)), operands)
                }
                (_, operands) => (None, operands),
            };
            let (&dy, inputs) = operands.split_last().expect("verified: operands are four or five");
            let of = AttentionOperand::ALL.map(|wanted| {
                let gives =
                    |id: &NodeId| matches!(*graph.op(*id), Op::AttentionGrad { of, .. } if of == wanted);
                members.iter().copied().find(gives).map(dense)
            });
            let dy = if narrowed { place_of(&fusion.views[dy.index()]) } else { strided(dy) };
            let result = AttentionResult::Gradients { dy, numbers, of };
            (scale, causal, products, result, inputs)
        }
        Op::Attention { scale, causal, products } => {
            (scale, causal, products, AttentionResult::Forward(dense(first)), &operands[..])
        }
        _ => unreachable!("fused: only attention comes here"),
    };
    if products == DType::I8 && codes.is_none() {
        return Err(PlanError::Unsupported {
            name: graph.node(first).name.clone(),
            op: "attention with products=i8",
            ty: "operands that are not dequantized from i8 with one scale each".to_owned(),
        });
    }
    let dims = |position: usize| &graph.ty(inputs[position]).shape.0;
    let heads = |dim: Dim| dim.as_fixed().expect("verified: heads are fixed");
    let (q, k, v) = (dims(0), dims(1), dims(2));
    Ok(Attention {
        batch: q[0],
        rows: q[1],
        keys: k[1],
        heads: heads(q[2]),
        key_heads: heads(k[2]),
        width: q[3],
        value_width: v[3],
        scale,
        causal,
        dtype: if narrowed { DType::BF16 } else { ty.dtype },
        products,
        scales: codes.map(|codes| codes.each_ref().map(|codes| lowering.dense_place(codes.scale))),
        q: operand(0, inputs[0]),
        k: operand(1, inputs[1]),
        v: operand(2, inputs[2]),
        mask: inputs.get(3).map(|&mask| strided(mask)),
        result,
    })
}
