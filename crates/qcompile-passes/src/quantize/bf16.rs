//! bf16: rounds what products read and what they give, as mixed precision training does (Micikevicius et al. 2018,
//! arXiv:1710.03740; Kalamkar et al. 2019, arXiv:1905.12322).
//!
//! A rounding is the pair `cast f32 (cast bf16 x)`. A product of two such values runs on the bf16 that is stored and sums
//! in f32. Parameters stay f32: only products see them rounded, and their gradients are f32. Losses, softmax, statistics
//! of normalisation and everything else between products computes in f32, from values that are stored in bf16. int8
//! products among them read and give what is stored so.

use super::insert::{is_quantized, with_op};
use super::layer::{Gradient, parameter, unquantized};
use super::recurrence;
use crate::PassError;
use crate::builder::Builder;
use crate::simplify::splat;
use qcompile_ir::{BinaryOp, DType, Graph, NodeId, Op, Region, Tensor, UnaryOp};

/// Rounds operands and results of the forward products whose note says bf16, and of int8 products between which bf16 is
/// stored; their weights are rounded once only, by `quantize`.
pub(super) fn insert_forward(graph: &mut Graph) -> Result<(), PassError> {
    let asked = |graph: &Graph, id: NodeId| {
        let node = graph.node(id);
        let stored = node.note.stored == Some(DType::BF16);
        let low = |forward| forward == DType::BF16 || (stored && is_quantized(forward));
        node.region == Region::Forward && node.note.precision.is_some_and(|p| low(p.forward))
    };
    let products: Vec<NodeId> = graph.order().into_iter().filter(|&id| asked(graph, id)).collect();
    for &product in &products {
        let rounds_result = !is_narrow_attention(graph, product) && !is_recurrence(graph, product);
        if let Some(value) = stored_result(graph, product).filter(|_| rounds_result) {
            round_everywhere(graph, value)?;
        }
    }
    for &product in &products {
        if is_narrow_attention(graph, product) {
            narrow_attention(graph, product)?;
            continue;
        }
        let bf16 = graph.node(product).note.precision.is_some_and(|p| p.forward == DType::BF16);
        if is_recurrence(graph, product) {
            if bf16 {
                recurrence::products(graph, product, Some(DType::BF16))?;
            }
            continue;
        }
        for (position, operand) in graph.operands(product).into_iter().enumerate() {
            let weight = parameter(graph, operand).is_some();
            let mask = position == 3;
            if mask || views_bf16(graph, operand) || (weight && !bf16) {
                continue;
            }
            if weight || matches!(graph.op(operand), Op::Input(_)) {
                let rounded = rounded(graph, operand)?;
                graph.set_operand(product, position, rounded)?;
            } else {
                round_everywhere(graph, operand)?;
            }
        }
    }
    Ok(())
}

/// Rounds the operands of the backward products whose note says bf16, where they are not rounded yet: gradients that
/// came through a rounding of the forward pass are. What int8 products will read is rounded where bf16 is stored between
/// them. A bf16 product beside an int8 one reads the values before their rounding to int8. Returns how many products read
/// bf16, or will read what is stored so.
pub(super) fn insert_backward(graph: &mut Graph) -> Result<usize, PassError> {
    let mut count = 0;
    for id in graph.order() {
        let note = &graph.node(id).note;
        let (stored, precision) = (note.stored, note.precision);
        let Some(precision) = precision else { continue };
        let narrow = precision.grad_input == DType::BF16;
        if matches!(graph.op(id), Op::AttentionGrad { .. }) {
            if narrow {
                narrow_attention(graph, id)?;
                count += 1;
            }
            continue;
        }
        if is_recurrence(graph, id) {
            if graph.node(id).region == Region::Backward && narrow {
                recurrence::products(graph, id, Some(DType::BF16))?;
                count += 1;
            }
            continue;
        }
        let Some(gradient) = Gradient::of(graph, id) else { continue };
        let positions = match (gradient.precision(&precision), gradient) {
            (DType::BF16, _) => vec![0, 1],
            (dtype, _) if !is_quantized(dtype) || stored != Some(DType::BF16) => continue,
            (_, Gradient::Input { gradient, .. }) => vec![gradient],
            (_, Gradient::Weight { .. }) => vec![0, 1],
        };
        let bf16 = gradient.precision(&precision) == DType::BF16;
        for position in positions {
            let mut operand = graph.operand(id, position);
            if bf16 {
                operand = unquantized(graph, operand);
            } else if unquantized(graph, operand) != operand {
                continue;
            }
            let rounded =
                if views_bf16(graph, operand) { operand } else { rounded(graph, operand)? };
            graph.set_operand(id, position, rounded)?;
        }
        count += 1;
    }
    Ok(count)
}

/// Makes the backward region use the rounded form of every forward value that has one: what is saved for it is what the
/// rest of the forward pass saw. (The gradient of an op may name the op's result, which stands before its rounding.)
pub(super) fn save_rounded(graph: &mut Graph) -> Result<(), PassError> {
    for narrow in graph.order() {
        if *graph.op(narrow) != Op::Cast(DType::BF16)
            || graph.node(narrow).region != Region::Forward
        {
            continue;
        }
        let x = graph.operand(narrow, 0);
        let users = graph.uses(x).into_iter();
        let backward: Vec<(NodeId, usize)> =
            users.filter(|&(user, _)| graph.node(user).region == Region::Backward).collect();
        if backward.is_empty() || graph.op(x).is_leaf() {
            continue;
        }
        let wide = rounded(graph, x)?;
        for (user, position) in backward {
            graph.set_operand(user, position, wide)?;
        }
    }
    Ok(())
}

/// Stores in bf16 what bf16 holds exactly: values that only choose among, or change the sign of, rounded ones.
pub(super) fn store_exact(graph: &mut Graph) -> Result<(), PassError> {
    let order = graph.order();
    let mut exact = vec![false; graph.len()];
    for &id in &order {
        exact[id.index()] = is_exact(graph, id, &exact);
    }
    for id in order {
        let chooses = matches!(graph.op(id), Op::Select | Op::Unary(_) | Op::Binary(_));
        let constant = splat(graph, id).is_some();
        if exact[id.index()] && chooses && !constant && graph.uses(id).len() > 1 {
            round_everywhere(graph, id)?;
        }
    }
    Ok(())
}

/// Whether bf16 holds every element of an f32 value, given that of its operands.
fn is_exact(graph: &Graph, id: NodeId, exact: &[bool]) -> bool {
    if graph.ty(id).dtype != DType::F32 {
        return false;
    }
    let operand = |position: usize| exact[graph.operand(id, position).index()];
    match graph.op(id) {
        Op::Cast(_) => graph.ty(graph.operand(id, 0)).dtype == DType::BF16,
        Op::Const(tensor) => tensor
            .splat()
            .is_some_and(|value| Tensor::scalar(DType::BF16, value).splat() == Some(value)),
        Op::Reshape(_)
        | Op::Transpose(_)
        | Op::Broadcast(_)
        | Op::Slice { .. }
        | Op::Unary(UnaryOp::Relu | UnaryOp::Neg | UnaryOp::Abs | UnaryOp::StopGradient) => {
            operand(0)
        }
        Op::Binary(BinaryOp::Max | BinaryOp::Min) => operand(0) && operand(1),
        Op::Select => operand(1) && operand(2),
        _ => false,
    }
}

/// Whether it is an attention in bf16.
fn is_narrow_attention(graph: &Graph, id: NodeId) -> bool {
    let bf16 = graph.node(id).note.precision.is_some_and(|p| p.forward == DType::BF16);
    bf16 && matches!(graph.op(id), Op::Attention { .. })
}

fn is_recurrence(graph: &Graph, id: NodeId) -> bool {
    matches!(graph.op(id), Op::Recurrence(_) | Op::RecurrenceGrad { .. })
}

/// Attention, or a gradient of it, on bf16 queries, keys, values and gradient, and with its products in bf16: what the
/// kernel computes in a strip, exponentials and gradients of scores, is rounded to it before a product reads it. An
/// operand that was rounded to int8 for the forward product is read as it was before.
fn narrow_attention(graph: &mut Graph, id: NodeId) -> Result<(), PassError> {
    let mut op = graph.op(id).clone();
    let mut operands = graph.operands(id);
    let masked = match &mut op {
        Op::Attention { products, .. } => {
            *products = DType::BF16;
            operands.len() > 3
        }
        Op::AttentionGrad { products, .. } => {
            *products = DType::BF16;
            operands.len() > 4
        }
        _ => return Ok(()),
    };
    for (position, operand) in operands.iter_mut().enumerate() {
        let mask = masked && position == 3;
        if !mask && graph.ty(*operand).dtype == DType::F32 {
            let real = unquantized(graph, *operand);
            *operand = narrowed(graph, real)?;
        }
    }
    let new = with_op(graph, id, op, &operands)?;
    let mut whole = new;
    if graph.ty(id).dtype == DType::F32 {
        let node = graph.node(new);
        let (name, region) = (format!("{}.f32", node.name.as_str()), node.region);
        whole = graph.add(Op::Cast(DType::F32), &[new], name, region)?;
    }
    graph.replace_uses(id, whole)?;
    Ok(())
}

/// `x` as bf16: what was widened and moved, moved only.
fn narrowed(graph: &mut Graph, x: NodeId) -> Result<NodeId, PassError> {
    if !views_bf16(graph, x) {
        let wide = rounded(graph, x)?;
        return Ok(graph.operand(wide, 0));
    }
    let below = graph.operand(x, 0);
    if matches!(graph.op(x), Op::Cast(_)) {
        return Ok(below);
    }
    let below = narrowed(graph, below)?;
    let node = graph.node(x);
    let (op, name, region) = (node.op.clone(), node.name.clone(), node.region);
    Ok(graph.add(op, &[below], name, region)?)
}

/// Whether the value lies in memory as bf16: a widened one, perhaps seen through strides.
fn views_bf16(graph: &Graph, mut id: NodeId) -> bool {
    loop {
        match graph.op(id) {
            Op::Cast(DType::F32) => return graph.ty(graph.operand(id, 0)).dtype == DType::BF16,
            Op::Reshape(_) | Op::Transpose(_) | Op::Broadcast(_) | Op::Slice { .. } => {
                id = graph.operand(id, 0);
            }
            _ => return false,
        }
    }
}

/// Which value of what follows a product is stored, if it should be in bf16: the last of a chain of elementwise ops
/// that have no other large operand. One that goes into an elementwise op with another large value is not stored (that
/// op's result is, such as the sum of a residual branch, which stays f32); nor is what a loss or a softmax reads rounded.
fn stored_result(graph: &Graph, product: NodeId) -> Option<NodeId> {
    let mut end = product;
    loop {
        let uses = graph.uses(end);
        if graph.outputs().iter().any(|(_, output)| *output == end) {
            return None;
        }
        let [(user, _)] = uses[..] else {
            let kept = uses.iter().any(|&(user, _)| needs_f32(graph.op(user)));
            return (!kept && !uses.is_empty()).then_some(end);
        };
        if needs_f32(graph.op(user)) || matches!(graph.op(user), Op::Cast(_)) {
            return None;
        }
        if !matches!(graph.op(user), Op::Unary(_) | Op::Binary(_)) {
            return Some(end);
        }
        let mut others = graph.operands(user).into_iter().filter(|&operand| operand != end);
        if !others.all(|other| matches!(graph.op(other), Op::Broadcast(_) | Op::Const(_))) {
            return None;
        }
        end = user;
    }
}

/// Ops whose operands are not rounded, as losses and softmax want f32, or as their kernels read f32 and would have it
/// widened into memory first.
fn needs_f32(op: &Op) -> bool {
    matches!(
        op,
        Op::Softmax
            | Op::LogSoftmax
            | Op::CrossEntropy
            | Op::CrossEntropyGrad
            | Op::MaxPool2d(_)
            | Op::AveragePool2d(_)
            | Op::Recurrence(_)
    )
}

/// `x` rounded, in the region of `x`.
fn rounded(graph: &mut Graph, x: NodeId) -> Result<NodeId, PassError> {
    let narrow = graph.uses(x).into_iter().map(|(user, _)| user);
    let known =
        narrow.filter(|&user| *graph.op(user) == Op::Cast(DType::BF16)).find_map(|narrow| {
            let users = graph.uses(narrow).into_iter().map(|(user, _)| user);
            users.into_iter().find(|&user| *graph.op(user) == Op::Cast(DType::F32))
        });
    if let Some(known) = known {
        return Ok(known);
    }
    let (name, region) = (graph.node(x).name.as_str().to_owned(), graph.node(x).region);
    let mut builder = Builder::new(graph, region, &name);
    let narrow = builder.add("bf16", Op::Cast(DType::BF16), &[x])?;
    builder.add("f32", Op::Cast(DType::F32), &[narrow])
}

/// Makes every user of `x` use it rounded. Outputs of the graph stay as they are.
fn round_everywhere(graph: &mut Graph, x: NodeId) -> Result<(), PassError> {
    let users = graph.uses(x);
    let wide = rounded(graph, x)?;
    let narrow = graph.operand(wide, 0);
    for (user, position) in users {
        if user != narrow {
            graph.set_operand(user, position, wide)?;
        }
    }
    Ok(())
}
