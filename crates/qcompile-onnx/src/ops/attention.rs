//! Attention, and the rotary embedding of its positions.

use super::Results;
use super::indexing::{Value, bounded, fixed_axis};
use crate::build::broadcast_dims;
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::index::product;
use crate::node::OnnxNode;
use qcompile_ir::{BinaryOp, CompareOp, DType, Dim, Op, ReduceOp, Tensor, UnaryOp};
use std::sync::Arc;

/// Which keys a query sees by its place.
#[derive(Clone, Copy)]
struct Window {
    causal: bool,
    /// How many keys before and after its own; none for all.
    sides: [Option<i64>; 2],
}

impl Window {
    fn is_open(self) -> bool {
        !self.causal && self.sides == [None, None]
    }

    /// Whether the key at `ahead` places after the query's own is seen.
    fn shows(self, ahead: i64) -> bool {
        let [before, after] = self.sides;
        (!self.causal || ahead <= 0)
            && before.is_none_or(|before| ahead >= -before)
            && after.is_none_or(|after| ahead <= after)
    }
}

/// A number of heads: an attribute for operands of three axes, which are `[batch, length, heads · width]`.
fn heads(draft: &mut Draft, x: ValueId, given: Option<i64>, name: &str) -> Value {
    let given = given
        .map(|heads| {
            usize::try_from(heads)
                .ok()
                .filter(|&heads| heads > 0)
                .ok_or_else(|| Obstacle::invalid(format!("attribute {name} is {heads}")))
        })
        .transpose()?;
    match *draft.dims(x) {
        [_, count, _, _] => match given {
            Some(heads) if count != Dim::fixed(heads) => {
                Err(Obstacle::invalid(format!("attribute {name} is {heads} for {}", draft.ty(x))))
            }
            _ => Ok(x),
        },
        [batch, length, hidden] => {
            let heads =
                given.ok_or_else(|| Obstacle::invalid(format!("attribute {name} is missing")))?;
            let width = hidden.as_fixed().filter(|hidden| hidden % heads == 0);
            let width = width
                .ok_or_else(|| Obstacle::invalid(format!("{heads} heads for {}", draft.ty(x))))?;
            let split = [batch, length, heads.into(), (width / heads).into()];
            let split = draft.reshape(x, &split)?;
            draft.transpose(split, &[0, 2, 1, 3])
        }
        _ => Err(Obstacle::invalid(format!("{} is neither 3-D nor 4-D", draft.ty(x)))),
    }
}

/// Keys or values after those of the past.
fn present(draft: &mut Draft, past: Option<ValueId>, x: ValueId) -> Value {
    match past {
        None => Ok(x),
        Some(past) => draft.emit(Op::Concat { axis: 2 }, &[past, x]),
    }
}

pub(super) fn attention(draft: &mut Draft, node: &OnnxNode) -> Results {
    let attributes = &node.attributes;
    let (q_heads, kv_heads) =
        (attributes.optional_int("q_num_heads")?, attributes.optional_int("kv_num_heads")?);
    attributes.optional_int("softmax_precision")?;
    let softcap = attributes.float("softcap", 0.0)?;
    let mode = attributes.int("qk_matmul_output_mode", 0)?;
    let mut window = Window { causal: attributes.flag("is_causal", false)?, sides: [None, None] };
    if node.opset >= 25 {
        for (side, name) in window.sides.iter_mut().zip(["left_window_size", "right_window_size"]) {
            *side = match attributes.int(name, -1)? {
                -1 => None,
                size if size >= 0 => Some(size),
                size => return Err(Obstacle::invalid(format!("attribute {name} is {size}"))),
            };
        }
    }
    let flat = draft.rank(node.input(0)?) == 3;
    let dtype = draft.dtype(node.input(0)?);
    let mut operands = [node.input(0)?; 3];
    for (at, operand) in operands.iter_mut().enumerate() {
        let (given, name) =
            if at == 0 { (q_heads, "q_num_heads") } else { (kv_heads, "kv_num_heads") };
        *operand = heads(draft, node.input(at)?, given, name)?;
    }
    let [q, k, v] = operands;
    let past = [node.optional(4), node.optional(5)];
    if past[0].is_some() != past[1].is_some() {
        return Err(Obstacle::invalid("past_key and past_value go together"));
    }
    let lengths = if node.opset >= 24 { node.optional(6) } else { None };
    if lengths.is_some() && past[0].is_some() {
        return Err(Obstacle::invalid("nonpad_kv_seqlen beside past_key"));
    }
    let before = past[0].map_or(Ok(0), |past| fixed_axis(draft, past, 2, "continues"))?;
    let (k, v) = (present(draft, past[0], k)?, present(draft, past[1], v)?);
    let width = fixed_axis(draft, q, 3, "scales by")?;
    #[allow(clippy::cast_precision_loss, reason = "the width of a head is small")]
    let usual = 1.0 / (width as f64).sqrt();
    let scale = attributes.optional_float("scale")?.unwrap_or(usual);

    let mut scores = {
        let (q, k) = (draft.cast(q, DType::F32)?, repeated_heads(draft, k, q)?);
        let op = Op::Matmul { transpose_a: false, transpose_b: true };
        let product = draft.emit(op, &[q, k])?;
        draft.binary_scalar(BinaryOp::Mul, product, scale)?
    };
    let mut shown = [scores; 3];
    if softcap != 0.0 {
        let part = draft.binary_scalar(BinaryOp::Div, scores, softcap)?;
        let bounded = draft.unary(UnaryOp::Tanh, part)?;
        scores = draft.binary_scalar(BinaryOp::Mul, bounded, softcap)?;
        shown[1] = scores;
    }
    let mask = Mask::new(draft, node.optional(3), lengths, window, before, scores)?;
    let masked = mask.applied(draft, scores)?;
    let softmax = draft.emit(Op::Softmax, &[masked])?;
    let values = repeated_heads(draft, v, q)?;
    let op = Op::Matmul { transpose_a: false, transpose_b: false };
    let mixed = draft.emit(op, &[softmax, values])?;
    let mut y = mask.cleared(draft, mixed)?;
    if flat {
        let [batch, heads, length, width] = draft.dims(y)[..] else {
            return Err(Obstacle::invalid("the values are not of one shape"));
        };
        let turned = draft.transpose(y, &[0, 2, 1, 3])?;
        y = draft.reshape(turned, &[batch, length, product(&[heads, width])?])?;
    }
    let mut results = vec![draft.cast(y, dtype)?, k, v];
    if node.wants(3) {
        let scores = match mode {
            0 | 1 => shown[usize::from(mode == 1)],
            2 => mask.added(draft, shown[1])?,
            3 => mask.cleared(draft, softmax)?,
            other => {
                return Err(Obstacle::invalid(format!(
                    "attribute qk_matmul_output_mode is {other}"
                )));
            }
        };
        results.push(draft.cast(scores, dtype)?);
    }
    Ok(results)
}

/// Keys or values in f32, each head as often as queries share it.
fn repeated_heads(draft: &mut Draft, x: ValueId, q: ValueId) -> Value {
    let x = draft.cast(x, DType::F32)?;
    let (heads, own) = (fixed_axis(draft, q, 1, "shares")?, fixed_axis(draft, x, 1, "shares")?);
    if heads == own {
        return Ok(x);
    }
    if own == 0 || heads % own != 0 {
        return Err(Obstacle::invalid(format!("{heads} heads do not share {own}")));
    }
    let mut dims = draft.dims(x).to_vec();
    let mut joined = dims.clone();
    joined[1] = heads.into();
    dims.insert(2, Dim::ONE);
    let apart = draft.reshape(x, &dims)?;
    dims[2] = (heads / own).into();
    let many = draft.broadcast(apart, &dims)?;
    draft.reshape(many, &joined)
}

/// What is hidden from the queries.
#[derive(Default)]
struct Mask {
    /// Whether a key is seen, by places alone: bool `[queries, keys]`.
    visible: Option<ValueId>,
    /// Whether some query sees nothing by its place.
    blind_places: bool,
    /// What is added to the scores, as large as it is before it is repeated.
    bias: Option<ValueId>,
    /// The bias, but 0 for queries that see nothing: those are left out of the result instead.
    harmless: Option<ValueId>,
    /// Which queries see nothing.
    blind: Option<ValueId>,
}

impl Mask {
    fn new(
        draft: &mut Draft,
        given: Option<ValueId>,
        lengths: Option<ValueId>,
        window: Window,
        before: usize,
        scores: ValueId,
    ) -> Result<Mask, Obstacle> {
        let dims = draft.dims(scores).to_vec();
        let (queries, keys) = (fixed_axis(draft, scores, 2, "masks")?, dims[3]);
        let keys_fixed = fixed_axis(draft, scores, 3, "masks")?;
        let mut mask = Mask::default();
        if let Some(given) = given {
            mask.bias = Some(bias(draft, given, keys_fixed, &dims)?);
        }
        if lengths.is_none() && !window.is_open() {
            let offset = i64::try_from(before).unwrap_or(i64::MAX);
            let (visible, blind) = by_place(draft, window, offset, [queries, keys_fixed])?;
            (mask.visible, mask.blind_places) = (Some(visible), blind);
        }
        if let Some(lengths) = lengths {
            if draft.dims(lengths) != [dims[0]] {
                let ty = draft.ty(lengths);
                return Err(Obstacle::invalid(format!("nonpad_kv_seqlen is {ty}")));
            }
            let seen = by_length(draft, window, lengths, queries, keys)?;
            let (zero, hidden) =
                (draft.scalar(DType::F32, 0.0), draft.scalar(DType::F32, f64::NEG_INFINITY));
            let bias = mask.bias.unwrap_or(zero);
            mask.bias = Some(draft.select(seen, bias, hidden)?);
        }
        mask.find_blind(draft)?;
        Ok(mask)
    }

    /// Finds queries that see nothing, unless it is known that there are none.
    fn find_blind(&mut self, draft: &mut Draft) -> Result<(), Obstacle> {
        self.harmless = self.bias;
        let hidden = draft.scalar(DType::F32, f64::NEG_INFINITY);
        let zero = draft.scalar(DType::F32, 0.0);
        let sees = match (self.bias, self.visible) {
            (None, None) => return Ok(()),
            (None, Some(_)) if !self.blind_places => return Ok(()),
            (Some(bias), None) => bias,
            (bias, Some(visible)) => draft.select(visible, bias.unwrap_or(zero), hidden)?,
        };
        let last = draft.rank(sees) - 1;
        let most = draft.reduce(ReduceOp::Max, sees, &[last])?;
        let blind = draft.compare(CompareOp::Equal, most, hidden)?;
        if let Some(known) = draft.known(blind)
            && known.elements.iter().all(|element| element.as_int() == Some(0))
        {
            return Ok(());
        }
        self.blind = Some(blind);
        if let Some(bias) = self.bias {
            self.harmless = Some(draft.select(blind, zero, bias)?);
        }
        Ok(())
    }

    /// The scores for the softmax.
    fn applied(&self, draft: &mut Draft, mut scores: ValueId) -> Value {
        if let Some(bias) = self.harmless {
            scores = draft.add(scores, bias)?;
        }
        let Some(visible) = self.visible else { return Ok(scores) };
        let mut visible = visible;
        if let Some(blind) = self.blind
            && self.blind_places
        {
            visible = draft.binary(BinaryOp::Or, visible, blind)?;
        }
        let hidden = draft.scalar(DType::F32, f64::NEG_INFINITY);
        draft.select(visible, scores, hidden)
    }

    /// The scores with everything that is added to them, as a result.
    fn added(&self, draft: &mut Draft, mut scores: ValueId) -> Value {
        if let Some(bias) = self.bias {
            scores = draft.add(scores, bias)?;
        }
        let Some(visible) = self.visible else { return Ok(scores) };
        let hidden = draft.scalar(DType::F32, f64::NEG_INFINITY);
        draft.select(visible, scores, hidden)
    }

    /// 0 for queries that see nothing.
    fn cleared(&self, draft: &mut Draft, x: ValueId) -> Value {
        let Some(blind) = self.blind else { return Ok(x) };
        let zero = draft.scalar(DType::F32, 0.0);
        draft.select(blind, zero, x)
    }
}

/// A mask as what is added to scores; keys beyond its own are hidden.
fn bias(draft: &mut Draft, given: ValueId, keys: usize, scores: &[Dim]) -> Value {
    let wrong =
        |draft: &Draft| Obstacle::invalid(format!("attn_mask {} does not fit", draft.ty(given)));
    let hidden = draft.scalar(DType::F32, f64::NEG_INFINITY);
    let mut bias = match draft.dtype(given) {
        DType::Bool => {
            let zero = draft.scalar(DType::F32, 0.0);
            draft.select(given, zero, hidden)?
        }
        dtype if dtype.is_float() => draft.cast(given, DType::F32)?,
        _ => return Err(wrong(draft)),
    };
    let last = draft.rank(bias).checked_sub(1).ok_or_else(|| wrong(draft))?;
    let own = fixed_axis(draft, bias, last, "masks")?;
    if own < keys && own != 1 {
        let mut dims = draft.dims(bias).to_vec();
        dims[last] = Dim::fixed(keys - own);
        let rest = draft.broadcast(hidden, &dims)?;
        bias = draft.emit(Op::Concat { axis: last }, &[bias, rest])?;
    }
    let mut dims = draft.dims(bias).to_vec();
    dims[last] = Dim::fixed(keys);
    bias = draft.broadcast(bias, &dims)?;
    if broadcast_dims(&dims, scores)? == scores { Ok(bias) } else { Err(wrong(draft)) }
}

/// Whether each query sees each key, by their places: a constant. And whether some query sees none.
fn by_place(
    draft: &mut Draft,
    window: Window,
    offset: i64,
    [rows, keys]: [usize; 2],
) -> Result<(ValueId, bool), Obstacle> {
    let count = rows.saturating_mul(keys);
    bounded(count)?;
    let signed = |at: usize| i64::try_from(at).unwrap_or(i64::MAX);
    let shown = (0..count).map(|at| {
        let own = signed(at / keys).saturating_add(offset);
        u8::from(window.shows(signed(at % keys).saturating_sub(own)))
    });
    let shown: Vec<u8> = shown.collect();
    let blind = keys > 0 && shown.chunks(keys).any(|row| row.iter().all(|&seen| seen == 0));
    let mask = Tensor::from_bytes(DType::Bool, vec![rows, keys], shown);
    let mask = mask.ok_or_else(|| Obstacle::invalid("the mask is too large"))?;
    Ok((super::constant::add_tensor(draft, Arc::new(mask))?, blind))
}

/// Whether each query of each sequence sees each key, where sequences end at a length: `[batch, 1, queries, keys]`.
fn by_length(
    draft: &mut Draft,
    window: Window,
    lengths: ValueId,
    queries: usize,
    keys: Dim,
) -> Value {
    let lengths = draft.cast(lengths, DType::I64)?;
    let batch = draft.dims(lengths)[0];
    let lengths = draft.reshape(lengths, &[batch, Dim::ONE, Dim::ONE, Dim::ONE])?;
    let key = draft.iota_along(keys, 3, 4)?;
    let mut seen = draft.compare(CompareOp::Less, key, lengths)?;
    if window.is_open() {
        return Ok(seen);
    }
    // The last query is that of the last key.
    let query = draft.iota_along(Dim::fixed(queries), 2, 4)?;
    let all = draft.integer(Dim::fixed(queries));
    let offset = draft.sub(lengths, all)?;
    let own = draft.add(query, offset)?;
    let ahead = draft.sub(key, own)?;
    let [before, after] = window.sides;
    let after = if window.causal { Some(0) } else { after };
    if let Some(after) = after {
        let after = draft.integer(after);
        let near = draft.compare(CompareOp::LessEqual, ahead, after)?;
        seen = draft.binary(BinaryOp::And, seen, near)?;
    }
    if let Some(before) = before {
        let before = draft.integer(-before);
        let near = draft.compare(CompareOp::LessEqual, before, ahead)?;
        seen = draft.binary(BinaryOp::And, seen, near)?;
    }
    Ok(seen)
}

/// Turns pairs of elements by angles whose cosines and sines are given for each position.
pub(super) fn rotary_embedding(draft: &mut Draft, node: &OnnxNode) -> Results {
    let given = node.input(0)?;
    let interleaved = node.attributes.flag("interleaved", false)?;
    let turned = node.attributes.int("rotary_embedding_dim", 0)?;
    let count = node.attributes.int("num_heads", 0)?;
    let x = heads(draft, given, (count != 0).then_some(count), "num_heads")?;
    let [batch, _, length, width] = draft.dims(x)[..] else {
        return Err(Obstacle::invalid(format!("{} is neither 3-D nor 4-D", draft.ty(x))));
    };
    let width = width.as_fixed().ok_or_else(|| Obstacle::unsupported("heads of unknown width"))?;
    let turned = usize::try_from(turned)
        .ok()
        .map(|turned| if turned == 0 { width } else { turned })
        .filter(|&turned| turned <= width && turned % 2 == 0);
    let turned = turned.ok_or_else(|| {
        Obstacle::invalid(format!("rotary_embedding_dim does not fit heads of width {width}"))
    })?;
    let half = turned / 2;
    let mut angles = [node.input(1)?, node.input(2)?];
    for angle in &mut angles {
        if let Some(positions) = node.optional(3) {
            if draft.rank(*angle) != 2 {
                return Err(Obstacle::invalid(format!("{} is no table", draft.ty(*angle))));
            }
            let positions = draft.cast(positions, DType::I64)?;
            *angle = draft.rows(*angle, positions)?;
        }
        let dims = [batch, Dim::ONE, length, half.into()];
        if draft.dims(*angle) != [batch, length, half.into()] {
            return Err(Obstacle::invalid(format!(
                "angles {} for {}",
                draft.ty(*angle),
                draft.ty(x)
            )));
        }
        *angle = draft.reshape(*angle, &dims)?;
    }
    let [cos, sin] = angles;
    let front = draft.slice(x, 3, 0, turned)?;
    let mut parts = [front; 2];
    for (at, part) in parts.iter_mut().enumerate() {
        *part = if interleaved {
            draft.emit(Op::Slice { axis: 3, start: at, end: turned.max(at), step: 2 }, &[front])?
        } else {
            draft.slice(front, 3, at * half, (at + 1) * half)?
        };
    }
    let [a, b] = parts;
    let (a_cos, b_sin) = (draft.mul(a, cos)?, draft.mul(b, sin)?);
    let (a_sin, b_cos) = (draft.mul(a, sin)?, draft.mul(b, cos)?);
    let mut pair = [draft.sub(a_cos, b_sin)?, draft.add(a_sin, b_cos)?];
    let mut y = if interleaved {
        let mut apart = draft.dims(a).to_vec();
        apart.push(Dim::ONE);
        for part in &mut pair {
            *part = draft.reshape(*part, &apart)?;
        }
        let joined = draft.emit(Op::Concat { axis: 4 }, &pair)?;
        let dims = draft.dims(front).to_vec();
        draft.reshape(joined, &dims)?
    } else {
        draft.emit(Op::Concat { axis: 3 }, &pair)?
    };
    if turned < width {
        let rest = draft.slice(x, 3, turned, width)?;
        y = draft.emit(Op::Concat { axis: 3 }, &[y, rest])?;
    }
    if draft.rank(given) == 3 {
        y = draft.transpose(y, &[0, 2, 1, 3])?;
    }
    let dims = draft.dims(given).to_vec();
    Ok(vec![draft.reshape(y, &dims)?])
}
