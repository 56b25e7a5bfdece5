//! Pools over any number of spatial axes.

use super::Results;
use super::window::{
    Span, TAP_LIMIT, channels_last, channels_second, merged, numbers, padded, plane, pool_geometry,
    positive, reduce_spatial, spans, spatial, tap, unmerged, with_height, without_height,
};
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::index::product;
use crate::known::{Element, Known};
use crate::node::OnnxNode;
use qcompile_ir::{BinaryOp, CompareOp, DType, Dim, Op, ReduceOp, ScatterOp, UnaryOp};

type Value = Result<ValueId, Obstacle>;

/// What is pooled, channels last, and how.
struct Pool {
    x: ValueId,
    spans: Vec<Span>,
}

impl Pool {
    fn read(draft: &mut Draft, node: &OnnxNode, x: ValueId) -> Result<Pool, Obstacle> {
        let input = spatial(draft, x)?;
        if node.attributes.ints("kernel_shape")?.is_none() {
            return Err(Obstacle::invalid("attribute kernel_shape is missing"));
        }
        let kernel = positive(node, "kernel_shape", input.len())?;
        let spans = spans(node, &input, &kernel)?;
        Ok(Pool { x: channels_last(draft, x)?, spans })
    }

    fn float(draft: &mut Draft, node: &OnnxNode, x: ValueId) -> Result<Pool, Obstacle> {
        if !draft.dtype(x).is_float() {
            return Err(Obstacle::invalid(format!("{} elements", draft.dtype(x))));
        }
        Pool::read(draft, node, x)
    }

    /// Places of the whole window.
    fn places(&self) -> Result<usize, Obstacle> {
        let places = self.spans.iter().try_fold(1_usize, |all, span| all.checked_mul(span.kernel));
        places.ok_or_else(|| Obstacle::invalid("a window beyond 2^64 places"))
    }

    /// The maximum of each window. Padding is never one.
    fn max(&self, draft: &mut Draft) -> Value {
        separate(draft, self.x, &self.spans, |plane| Op::MaxPool2d(pool_geometry(plane)))
    }

    /// The mean of each window over its places inside the operand, or with `pads` inside the padded operand.
    fn mean(&self, draft: &mut Draft, pads: bool) -> Value {
        let (mut x, mut spans) = (self.x, self.spans.clone());
        if pads {
            for (at, span) in spans.iter_mut().enumerate() {
                x = padded(draft, x, at + 1, span.pads, 0.0)?;
                span.input = span.input.saturating_add(span.pads[0]).saturating_add(span.pads[1]);
                span.pads = [0, 0];
            }
        }
        separate(draft, x, &spans, |plane| Op::AveragePool2d(pool_geometry(plane)))
    }

    /// The sum of each window. What rounding up adds is zeros.
    fn sum(&self, draft: &mut Draft) -> Value {
        let (mut x, mut spans) = (self.x, self.spans.clone());
        for (at, span) in spans.iter_mut().enumerate() {
            let pads = [span.pads[0], span.high()];
            x = padded(draft, x, at + 1, pads, 0.0)?;
            span.input = span.input.saturating_add(pads[0]).saturating_add(pads[1]);
            (span.pads, span.extra) = ([0, 0], 0);
        }
        let mean = separate(draft, x, &spans, |plane| Op::AveragePool2d(pool_geometry(plane)))?;
        #[allow(clippy::cast_precision_loss, reason = "rounds only beyond 2^53 places")]
        let places = self.places()? as f64;
        draft.binary_scalar(BinaryOp::Mul, mean, places)
    }

    /// Where the first maximum of each window lies: its index in the whole operand with channels second, spatial axes in
    /// reverse order if `reversed`. `max` are the maxima.
    fn indices(&self, draft: &mut Draft, max: ValueId, reversed: bool) -> Value {
        let places = self.places()?;
        if places > TAP_LIMIT {
            return Err(Obstacle::unsupported(format!(
                "indices of the maxima of windows of {places} places, more than {TAP_LIMIT}"
            )));
        }
        let strides = self.strides(reversed)?;
        let mut x = self.x;
        for (at, span) in self.spans.iter().enumerate() {
            x = padded(draft, x, at + 1, [span.pads[0], span.high()], f32::NEG_INFINITY)?;
        }
        // From the last place to the first, so that the first of equals stays.
        let mut chosen = None;
        for place in (0..places).rev() {
            let (mut seen, mut offset, mut rest) = (x, 0_i64, place);
            for (at, span) in self.spans.iter().enumerate().rev() {
                let step = rest % span.kernel;
                rest /= span.kernel;
                seen = tap(draft, seen, at + 1, span, step)?;
                let far = integer(step.saturating_mul(span.dilation))?;
                offset = offset.saturating_add(far.saturating_mul(strides[at]));
            }
            let offset =
                draft.add_known(Known::new(DType::I64, vec![], vec![Element::Int(offset)]));
            chosen = Some(match chosen {
                None => {
                    let dims = draft.dims(max).to_vec();
                    draft.broadcast(offset, &dims)?
                }
                Some(chosen) => {
                    let equal = draft.compare(CompareOp::Equal, seen, max)?;
                    draft.select(equal, offset, chosen)?
                }
            });
        }
        let mut index = chosen.ok_or_else(|| Obstacle::invalid("an empty window"))?;
        // Where the first place of each window lies, axis by axis.
        for (at, span) in self.spans.iter().enumerate() {
            let first = integer(span.pads[0])?.saturating_mul(strides[at]).saturating_neg();
            let step = integer(span.stride)?.saturating_mul(strides[at]);
            index = draft.add_ramp(index, at + 1, first, step)?;
        }
        let image = self.spans.iter().try_fold(1_usize, |all, span| all.checked_mul(span.input));
        let channels = draft.dims(self.x).last().and_then(|dim| dim.as_fixed()).unwrap_or(0);
        let sizes = image.and_then(|image| Some((image, image.checked_mul(channels)?)));
        let (image, sample) =
            sizes.ok_or_else(|| Obstacle::invalid("an operand beyond 2^64 elements"))?;
        index = draft.add_ramp(index, self.spans.len() + 1, 0, integer(image)?)?;
        draft.add_ramp(index, 0, 0, integer(sample)?)
    }

    /// How far apart neighbours along each spatial axis are.
    fn strides(&self, reversed: bool) -> Result<Vec<i64>, Obstacle> {
        let mut strides = vec![0; self.spans.len()];
        let mut stride = 1_i64;
        let count = strides.len();
        for at in 0..count {
            let axis = if reversed { at } else { count - 1 - at };
            strides[axis] = stride;
            stride = stride.saturating_mul(integer(self.spans[axis].input)?);
        }
        Ok(strides)
    }
}

fn integer(size: usize) -> Result<i64, Obstacle> {
    i64::try_from(size).map_err(|_| Obstacle::invalid(format!("a size of {size}")))
}

/// Elements of a ramp made here.
const RAMP_LIMIT: usize = 1 << 24;

impl Draft {
    /// `x` plus `first + i · step` at index `i` of an axis.
    fn add_ramp(&mut self, x: ValueId, axis: usize, first: i64, step: i64) -> Value {
        let count = self.dims(x)[axis]
            .as_fixed()
            .ok_or_else(|| Obstacle::batch("the index of a maximum depends on the batch size"))?;
        if count > RAMP_LIMIT {
            return Err(Obstacle::unsupported(format!("indices along an axis of {count}")));
        }
        let at = |at: usize| integer(at).map(|at| first.saturating_add(at.saturating_mul(step)));
        let elements = (0..count).map(|index| Ok(Element::Int(at(index)?)));
        let elements = elements.collect::<Result<Vec<_>, Obstacle>>()?;
        let mut shape = vec![1; self.rank(x)];
        shape[axis] = count;
        let ramp = self.add_known(Known::new(DType::I64, shape, elements));
        self.add(x, ramp)
    }
}

/// A pool of `x[n, spatial..., c]` that is the pool along its last two axes, then along those before.
fn separate(
    draft: &mut Draft,
    x: ValueId,
    spans: &[Span],
    op: impl Fn([Span; 2]) -> Op + Copy,
) -> Value {
    let axes = spans.len();
    if axes <= 2 {
        let x = with_height(draft, x)?;
        let y = draft.emit(op(plane(spans)), &[x])?;
        return without_height(draft, y, axes);
    }
    let (before, last) = spans.split_at(axes - 2);
    let outer = draft.dims(x)[..axes - 1].to_vec();
    let planes = merged(draft, x, 0, axes - 1)?;
    let y = separate(draft, planes, last, op)?;
    let inner = draft.dims(y)[1..].to_vec();
    let y = unmerged(draft, y, 0, &outer)?;
    let rows = merged(draft, y, axes - 1, 3)?;
    let y = separate(draft, rows, before, op)?;
    unmerged(draft, y, axes - 1, &inner)
}

pub(super) fn max_pool(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.input(0)?;
    let dtype = draft.dtype(x);
    if !dtype.is_float() && !matches!(dtype, DType::I8 | DType::U8) {
        return Err(Obstacle::invalid(format!("{dtype} elements")));
    }
    let reversed = node.attributes.flag("storage_order", false)?;
    // Bytes are exact in f32.
    let x = if dtype.is_float() { x } else { draft.cast(x, DType::F32)? };
    let pool = Pool::read(draft, node, x)?;
    let max = pool.max(draft)?;
    let y = draft.cast(max, dtype)?;
    let mut results = vec![channels_second(draft, y)?];
    if node.wants(1) {
        let indices = pool.indices(draft, max, reversed)?;
        results.push(channels_second(draft, indices)?);
    }
    Ok(results)
}

pub(super) fn average_pool(draft: &mut Draft, node: &OnnxNode) -> Results {
    let pool = Pool::float(draft, node, node.input(0)?)?;
    let count_include_pad = node.attributes.flag("count_include_pad", false)?;
    let mean = pool.mean(draft, count_include_pad)?;
    Ok(vec![channels_second(draft, mean)?])
}

/// The exponent of an Lp norm.
fn exponent(node: &OnnxNode) -> Result<f64, Obstacle> {
    match node.attributes.int("p", 2)? {
        #[allow(clippy::cast_precision_loss, reason = "an exponent is small")]
        p if p > 0 => Ok(p as f64),
        p => Err(Obstacle::invalid(format!("attribute p is {p}, not at least 1"))),
    }
}

/// |x|ᵖ.
fn powers(draft: &mut Draft, x: ValueId, p: f64) -> Value {
    let magnitude = draft.unary(UnaryOp::Abs, x)?;
    if p == 1.0 { Ok(magnitude) } else { draft.binary_scalar(BinaryOp::Pow, magnitude, p) }
}

/// The p-th root of a sum of powers, whose gradient is 0 where the sum is.
fn root(draft: &mut Draft, sum: ValueId, p: f64) -> Value {
    if p == 1.0 {
        return Ok(sum);
    }
    let dtype = draft.dtype(sum);
    let (zero, one) = (draft.scalar(dtype, 0.0), draft.scalar(dtype, 1.0));
    let none = draft.compare(CompareOp::Equal, sum, zero)?;
    let guarded = draft.select(none, one, sum)?;
    let root = draft.binary_scalar(BinaryOp::Pow, guarded, p.recip())?;
    draft.select(none, zero, root)
}

pub(super) fn lp_pool(draft: &mut Draft, node: &OnnxNode) -> Results {
    let p = exponent(node)?;
    let mut pool = Pool::float(draft, node, node.input(0)?)?;
    pool.x = powers(draft, pool.x, p)?;
    let sum = pool.sum(draft)?;
    let y = root(draft, sum, p)?;
    Ok(vec![channels_second(draft, y)?])
}

pub(super) fn global_average_pool(draft: &mut Draft, node: &OnnxNode) -> Results {
    Ok(vec![reduce_spatial(draft, node.input(0)?, None)?])
}

pub(super) fn global_max_pool(draft: &mut Draft, node: &OnnxNode) -> Results {
    Ok(vec![reduce_spatial(draft, node.input(0)?, Some(ReduceOp::Max))?])
}

pub(super) fn global_lp_pool(draft: &mut Draft, node: &OnnxNode) -> Results {
    let p = exponent(node)?;
    let powers = powers(draft, node.input(0)?, p)?;
    let sum = reduce_spatial(draft, powers, Some(ReduceOp::Sum))?;
    Ok(vec![root(draft, sum, p)?])
}

/// Puts values back where a `MaxPool` found them, among zeros. Where windows overlapped and found the same place, each
/// has the same value, and their mean is it.
pub(super) fn max_unpool(draft: &mut Draft, node: &OnnxNode) -> Results {
    let (x, indices) = (node.input(0)?, node.input(1)?);
    if !draft.dtype(x).is_float() || draft.dtype(indices) != DType::I64 {
        return Err(Obstacle::invalid(format!(
            "values {} at indices {}",
            draft.ty(x),
            draft.ty(indices)
        )));
    }
    if draft.dims(x) != draft.dims(indices) {
        return Err(Obstacle::invalid(format!(
            "values {} at indices {}",
            draft.ty(x),
            draft.ty(indices)
        )));
    }
    let input = spatial(draft, x)?;
    let axes = input.len();
    if node.attributes.ints("kernel_shape")?.is_none() {
        return Err(Obstacle::invalid("attribute kernel_shape is missing"));
    }
    let kernel = positive(node, "kernel_shape", axes)?;
    let strides = positive(node, "strides", axes)?;
    let pads = numbers(node, "pads", 2 * axes)?.unwrap_or_else(|| vec![0; 2 * axes]);
    let mut dims = draft.dims(x)[..2].to_vec();
    for axis in 0..axes {
        // The input of the pool without what rounding left over.
        let size = input[axis]
            .checked_sub(1)
            .and_then(|steps| steps.checked_mul(strides[axis])?.checked_add(kernel[axis]))
            .and_then(|size| size.checked_sub(pads[axis].checked_add(pads[axis + axes])?))
            .ok_or_else(|| Obstacle::invalid(format!("pads {pads:?} for {}", draft.ty(x))))?;
        dims.push(Dim::fixed(size));
    }
    // Indices count in the inferred shape; a larger one that is asked for is what they count in instead.
    if let Some(asked) = node.shape_elements(draft, 2)? {
        let asked = crate::node::dims_from(&asked)?;
        if asked.len() != dims.len() {
            return Err(Obstacle::invalid(format!("output_shape {asked:?} for {}", draft.ty(x))));
        }
        dims = asked;
    }
    let (rows, count) = (product(&dims)?, product(draft.dims(x))?);
    let scatter = Op::Scatter { op: ScatterOp::Add, rows };
    let indices = draft.reshape(indices, &[count])?;
    let values = draft.reshape(x, &[count])?;
    let mut y = draft.emit(scatter.clone(), &[indices, values])?;
    if kernel.iter().zip(&strides).any(|(kernel, stride)| kernel > stride) {
        let one = draft.scalar(draft.dtype(x), 1.0);
        let ones = draft.broadcast(one, &[count])?;
        let found = draft.emit(scatter, &[indices, ones])?;
        let found = draft.binary(BinaryOp::Max, found, one)?;
        y = draft.binary(BinaryOp::Div, y, found)?;
    }
    Ok(vec![draft.reshape(y, &dims)?])
}
