//! Recognises attention.
//!
//! *Before*: a simplified graph, in which attention is `softmax(q kᵀ) v` as exporters write it: two products and what
//! stands between them. Scores, or queries and keys, are multiplied with constants; masks are added or selected.
//!
//! *After*: one [`Op::Attention`] in place of each, so that no kernel holds a whole matrix of scores. A mask that
//! hides exactly what comes later is an attribute; any other is an operand of the size that it has before it is
//! repeated. Left as it is: what is used elsewhere as well (probabilities that the model returns), a mask that is
//! learned, and a mask by selection whose hidden scores would still count (anything finite above the smallest f32,
//! or where a row might be hidden as a whole).
//!
//! *Why here*: after masks and scales were folded, and before a loss, roundings or gradients use what is between.

use crate::differentiate::trained;
use crate::simplify::splat;
use crate::{PassError, simplify};
use qcompile_ir::{BinaryOp, DType, Dim, Graph, NodeId, Op, Region, Shape, Tensor};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Most nodes between the product of queries and keys and the softmax.
const MOST_BETWEEN: usize = 8;

/// What is between the two products, and their operands.
struct Pattern {
    scale: f32,
    causal: bool,
    mask: Option<Mask>,
    /// What the mask is multiplied with.
    mask_scale: f64,
    /// Queries, keys and values, with whether their last two axes are exchanged from `[.., length, width]`.
    operands: [(NodeId, bool); 3],
}

/// A mask as large as it is before it is repeated.
enum Mask {
    /// Added to the scores.
    Sum(NodeId),
    /// A constant to be added.
    Const(Tensor),
    /// -inf where the condition has this value.
    Hidden(NodeId, bool),
}

/// Makes every attention one op. Invalidates every [`NodeId`].
///
/// # Errors
/// Only by a defect.
pub fn run(graph: &mut Graph) -> Result<(), PassError> {
    let trained = trained(graph);
    let kept: BTreeSet<NodeId> =
        graph.outputs().iter().map(|(_, id)| *id).chain(graph.next().values().copied()).collect();
    let mut changed = false;
    for id in graph.order() {
        if let Some(pattern) = (Recogniser { graph, trained: &trained, kept: &kept }).attention(id)
        {
            replace(graph, id, pattern)?;
            changed = true;
        }
    }
    if changed {
        simplify::run(graph, &simplify::Options { keep_stop_gradient: true })?;
    }
    Ok(())
}

struct Recogniser<'a> {
    graph: &'a Graph,
    /// Which nodes get a gradient, as far as there were any before this pass.
    trained: &'a [bool],
    /// Outputs and next values.
    kept: &'a BTreeSet<NodeId>,
}

impl Recogniser<'_> {
    /// Whether one node alone uses it.
    fn inner(&self, id: NodeId) -> bool {
        !self.kept.contains(&id) && self.graph.uses(id).len() == 1
    }

    fn attention(&self, id: NodeId) -> Option<Pattern> {
        let graph = self.graph;
        let Op::Matmul { transpose_a: false, transpose_b: turned_v } = *graph.op(id) else {
            return None;
        };
        let (softmax, v) = (graph.operand(id, 0), graph.operand(id, 1));
        let ty = graph.ty(softmax);
        let heads_are_fixed = ty.shape.rank() < 4 || ty.shape.0[1].as_fixed().is_some();
        let fits = ty.dtype == DType::F32 && ty.shape.rank() <= 4 && heads_are_fixed;
        if !fits || *graph.op(softmax) != Op::Softmax || !self.inner(softmax) {
            return None;
        }
        let mut pattern = Pattern {
            scale: 1.0,
            causal: false,
            mask: None,
            mask_scale: 1.0,
            operands: [(v, turned_v); 3],
        };
        let mut scale = 1.0;
        let mut at = graph.operand(softmax, 0);
        loop {
            if !self.inner(at) {
                return None;
            }
            let operands = graph.operands(at);
            match *graph.op(at) {
                Op::Matmul { transpose_a, transpose_b } => {
                    pattern.operands[0] = (operands[0], transpose_a);
                    // The product is with the transposed keys.
                    pattern.operands[1] = (operands[1], !transpose_b);
                    scale *=
                        operands.iter().map(|&x| Unscaled::of(graph, x).factor).product::<f64>();
                    break;
                }
                Op::Binary(BinaryOp::Mul | BinaryOp::Div) => {
                    let (x, by) = scaled(graph, at)?;
                    (at, scale) = (x, scale * by);
                }
                Op::Binary(BinaryOp::Add) => {
                    let first = usize::from(!self.leads_to_scores(operands[0]));
                    self.added(&mut pattern, operands[1 - first], scale)?;
                    at = operands[first];
                }
                Op::Select => {
                    let first = 1 + usize::from(!self.leads_to_scores(operands[1]));
                    let hides = first == 2;
                    let hidden = splat(graph, operands[3 - first])? * scale;
                    self.selected(&mut pattern, operands[0], hides, hidden, scale)?;
                    at = operands[first];
                }
                _ => return None,
            }
        }
        #[allow(clippy::cast_possible_truncation, reason = "an attribute is f32, as scores are")]
        let scale = scale as f32;
        pattern.scale = scale;
        scale.is_finite().then_some(pattern)
    }

    /// Whether a product is found under scales and masks, not far below.
    fn leads_to_scores(&self, id: NodeId) -> bool {
        self.leads_within(id, MOST_BETWEEN)
    }

    fn leads_within(&self, id: NodeId, steps: usize) -> bool {
        let Some(steps) = steps.checked_sub(1) else { return false };
        let operands = self.graph.operands(id);
        let below = match self.graph.op(id) {
            Op::Matmul { .. } => return true,
            Op::Binary(BinaryOp::Mul | BinaryOp::Div | BinaryOp::Add) => &operands[..],
            Op::Select => &operands[1..],
            _ => &[],
        };
        below.iter().any(|&operand| self.leads_within(operand, steps))
    }

    /// A mask that is added to scores which are multiplied with `scale` afterwards.
    fn added(&self, pattern: &mut Pattern, mask: NodeId, scale: f64) -> Option<()> {
        if self.trained.get(mask.index()) != Some(&false) {
            return None;
        }
        let whole = &self.graph.ty(mask).shape;
        let small = unrepeated(self.graph, mask);
        if let Op::Const(tensor) = self.graph.op(small)
            && scale > 0.0
        {
            let values = tensor.to_f64();
            if values.iter().all(|&value| value == 0.0) {
                return Some(());
            }
            let hidden = |at: usize| match values[at] {
                0.0 => Some(false),
                f64::NEG_INFINITY => Some(true),
                _ => None,
            };
            if is_causal(whole, tensor.shape(), hidden) {
                pattern.causal = true;
                return Some(());
            }
        }
        self.keep(pattern, whole, small, Mask::Sum(small), scale)
    }

    /// A mask that puts `hidden` (as it is after `scale`) in the place of scores where the condition is `hides`.
    fn selected(
        &self,
        pattern: &mut Pattern,
        condition: NodeId,
        hides: bool,
        hidden: f64,
        scale: f64,
    ) -> Option<()> {
        // Beside the smallest number, no other finite score leaves anything of it.
        let vanishes = hidden <= f64::from(f32::MIN);
        if !vanishes || scale <= 0.0 {
            return None;
        }
        let whole = &self.graph.ty(condition).shape;
        let small = unrepeated(self.graph, condition);
        let Op::Const(tensor) = self.graph.op(small) else {
            // Where a whole row may be hidden, only -inf does as a sum what it does by selection.
            let infinite = hidden == f64::NEG_INFINITY;
            let mask = Mask::Hidden(small, hides);
            return infinite.then(|| self.keep(pattern, whole, small, mask, 1.0))?;
        };
        let values = tensor.to_f64();
        let hidden_at = |at: usize| (values[at] != 0.0) == hides;
        if is_causal(whole, tensor.shape(), |at| Some(hidden_at(at))) {
            pattern.causal = true;
            return Some(());
        }
        let row = tensor.shape().last().copied().unwrap_or(1).max(1);
        let shown = |begin: usize| (begin..begin + row).any(|at| !hidden_at(at));
        if hidden != f64::NEG_INFINITY && !(0..values.len()).step_by(row).all(shown) {
            return None;
        }
        let mask: Vec<f64> = (0..values.len())
            .map(|at| if hidden_at(at) { f64::NEG_INFINITY } else { 0.0 })
            .collect();
        let mask = Tensor::from_f64(DType::F32, tensor.shape(), &mask)?;
        self.keep(pattern, whole, small, Mask::Const(mask), 1.0)
    }

    /// Makes it the mask of the pattern, if that has none and the mask is repeated over no key.
    fn keep(
        &self,
        pattern: &mut Pattern,
        whole: &Shape,
        small: NodeId,
        mask: Mask,
        scale: f64,
    ) -> Option<()> {
        let fits = self.graph.ty(small).shape.0.last() == whole.0.last();
        if pattern.mask.is_some() || !fits {
            return None;
        }
        (pattern.mask, pattern.mask_scale) = (Some(mask), scale);
        Some(())
    }
}

/// Whether a constant of shape `small`, repeated to `whole`, hides from every row exactly the keys after it.
fn is_causal(whole: &Shape, small: &[usize], hidden: impl Fn(usize) -> Option<bool>) -> bool {
    let [.., rows, keys] = whole.0[..] else { return false };
    let [lead @ .., t, s] = small else { return false };
    let whole_rows = [rows, keys] == [Dim::fixed(*t), Dim::fixed(*s)];
    whole_rows
        && lead.iter().all(|&size| size == 1)
        && (0..*t).all(|row| (0..*s).all(|key| hidden(row * s + key) == Some(key > row)))
}

/// What a value repeats.
fn unrepeated(graph: &Graph, id: NodeId) -> NodeId {
    match graph.op(id) {
        Op::Broadcast(_) => graph.operand(id, 0),
        _ => id,
    }
}

/// `x` and `f` of `x · f` or `x / (1/f)` for a constant.
fn scaled(graph: &Graph, id: NodeId) -> Option<(NodeId, f64)> {
    let Op::Binary(op @ (BinaryOp::Mul | BinaryOp::Div)) = *graph.op(id) else { return None };
    let (a, b) = (graph.operand(id, 0), graph.operand(id, 1));
    match (op, splat(graph, a), splat(graph, b)) {
        (BinaryOp::Mul, _, Some(factor)) => Some((a, factor)),
        (BinaryOp::Mul, Some(factor), None) => Some((b, factor)),
        (BinaryOp::Div, _, Some(divisor)) => Some((a, 1.0 / divisor)),
        _ => None,
    }
}

/// An operand without the constants that it is multiplied with, seen through what only moves elements.
struct Unscaled {
    /// What is multiplied.
    value: NodeId,
    /// The product of the constants.
    factor: f64,
    /// What moves the elements, the last first.
    moves: Vec<NodeId>,
}

impl Unscaled {
    fn of(graph: &Graph, operand: NodeId) -> Unscaled {
        let mut found = Unscaled { value: operand, factor: 1.0, moves: Vec::new() };
        let (mut at, mut moves) = (operand, Vec::new());
        loop {
            if let Some((x, by)) = scaled(graph, at) {
                found = Unscaled { value: x, factor: found.factor * by, moves: moves.clone() };
                at = x;
            } else if let Op::Transpose(_) | Op::Reshape(_) = graph.op(at) {
                moves.push(at);
                at = graph.operand(at, 0);
            } else {
                return found;
            }
        }
    }

    /// The value moved as the operand is.
    fn moved(self, graph: &mut Graph) -> Result<NodeId, PassError> {
        let mut value = self.value;
        for id in self.moves.into_iter().rev() {
            let node = graph.node(id);
            let (op, name, region) = (node.op.clone(), node.name.clone(), node.region);
            value = graph.add(op, &[value], name, region)?;
        }
        Ok(value)
    }
}

/// `[batch, length, heads, width]` of a matrix, or of a batch of them, or of a batch of heads of them.
fn by_length(
    graph: &mut Graph,
    (id, turned): (NodeId, bool),
    name: &str,
    region: Region,
) -> Result<NodeId, PassError> {
    let rank = graph.ty(id).shape.rank();
    let permutation: Vec<usize> = match (rank, turned) {
        (4, false) => vec![0, 2, 1, 3],
        (4, true) => vec![0, 3, 1, 2],
        (_, false) => (0..rank).collect(),
        (_, true) => (0..rank - 2).chain([rank - 1, rank - 2]).collect(),
    };
    let turned = graph.add(Op::Transpose(permutation), &[id], name, region)?;
    let shape = with_heads(&graph.ty(turned).shape);
    Ok(graph.add(Op::Reshape(shape), &[turned], name, region)?)
}

/// The shape `[batch, length, width]` or `[length, width]` with what is missing of `[batch, length, heads, width]`.
fn with_heads(shape: &Shape) -> Shape {
    match shape.0[..] {
        [length, width] => Shape(vec![Dim::ONE, length, Dim::ONE, width]),
        [batch, length, width] => Shape(vec![batch, length, Dim::ONE, width]),
        _ => shape.clone(),
    }
}

fn replace(graph: &mut Graph, id: NodeId, pattern: Pattern) -> Result<(), PassError> {
    let node = graph.node(id);
    let (name, region, shape) = (node.name.clone(), node.region, node.ty.shape.clone());
    let rank = shape.rank();
    let part = |part: &str| format!("{}.{part}", name.as_str());
    let mut operands = Vec::with_capacity(4);
    let shared = shared_heads(graph, [pattern.operands[1].0, pattern.operands[2].0]);
    for ((operand, turned), suffix) in pattern.operands.into_iter().zip(["q", "k", "v"]) {
        // Constant factors of queries and keys are in the scale.
        let plain = match (suffix, &shared) {
            ("k", Some([(one, shape), _])) | ("v", Some([_, (one, shape)])) => {
                graph.add(Op::Reshape(shape.clone()), &[*one], part(suffix), region)?
            }
            ("v", None) => operand,
            _ => Unscaled::of(graph, operand).moved(graph)?,
        };
        operands.push(by_length(graph, (plain, turned), &part(suffix), region)?);
    }
    if let Some(mask) = pattern.mask {
        operands.push(mask_operand(graph, mask, pattern.mask_scale, rank, &part("mask"), region)?);
    }
    let op = Op::Attention { scale: pattern.scale, causal: pattern.causal, products: DType::F32 };
    let attention = graph.add(op, &operands, name.clone(), region)?;
    graph.note_mut(attention).origin = graph.node(id).note.origin.clone();
    let back = match rank {
        4 => Op::Transpose(vec![0, 2, 1, 3]),
        _ => Op::Reshape(shape),
    };
    let back = graph.add(back, &[attention], part("back"), region)?;
    graph.replace_uses(id, back)?;
    graph.swap_names(id, attention);
    Ok(())
}

/// Keys and values before each head was repeated for those that share it, and their shapes as they are then.
fn shared_heads(graph: &Graph, operands: [NodeId; 2]) -> Option<[(NodeId, Shape); 2]> {
    let single = |id: NodeId| {
        let Op::Reshape(whole) = graph.op(id) else { return None };
        let many = graph.operand(id, 0);
        let Op::Broadcast(spread) = graph.op(many) else { return None };
        let one = graph.operand(many, 0);
        let [batch, heads, Dim::ONE, rows, columns] = graph.ty(one).shape.0[..] else {
            return None;
        };
        let repeats = *spread.0.get(2)?;
        let fits = spread.0 == [batch, heads, repeats, rows, columns]
            && whole.0 == [batch, heads.times(repeats)?, rows, columns];
        fits.then(|| (one, Shape(vec![batch, heads, rows, columns])))
    };
    let [k, v] = [single(operands[0])?, single(operands[1])?];
    (k.1.0[1] == v.1.0[1]).then_some([k, v])
}

/// The mask as f32 of four dims.
fn mask_operand(
    graph: &mut Graph,
    mask: Mask,
    scale: f64,
    rank: usize,
    name: &str,
    region: Region,
) -> Result<NodeId, PassError> {
    let scalar = |graph: &mut Graph, value: f64, shape: &Shape| -> Result<NodeId, PassError> {
        let op = Op::Const(Arc::new(Tensor::scalar(DType::F32, value)));
        let scalar = graph.add(op, &[], name, Region::Forward)?;
        Ok(graph.add(Op::Broadcast(shape.clone()), &[scalar], name, region)?)
    };
    let mut mask = match mask {
        Mask::Sum(mask) => mask,
        Mask::Const(tensor) => {
            graph.add(Op::Const(Arc::new(tensor)), &[], name, Region::Forward)?
        }
        Mask::Hidden(condition, hides) => {
            let shape = graph.ty(condition).shape.clone();
            let shown = scalar(graph, 0.0, &shape)?;
            let hidden = scalar(graph, f64::NEG_INFINITY, &shape)?;
            let [a, b] = if hides { [hidden, shown] } else { [shown, hidden] };
            graph.add(Op::Select, &[condition, a, b], name, region)?
        }
    };
    let shape = graph.ty(mask).shape.clone();
    if scale != 1.0 {
        let factor = scalar(graph, scale, &shape)?;
        mask = graph.add(Op::Binary(BinaryOp::Mul), &[mask, factor], name, region)?;
    }
    // [batch, heads, rows, keys]; without heads, batches stand before them.
    let mut dims = vec![Dim::ONE; rank.saturating_sub(shape.rank())];
    dims.extend(&shape.0);
    if rank == 3 {
        dims.insert(1, Dim::ONE);
    }
    while dims.len() < 4 {
        dims.insert(0, Dim::ONE);
    }
    Ok(graph.add(Op::Reshape(Shape(dims)), &[mask], name, region)?)
}
