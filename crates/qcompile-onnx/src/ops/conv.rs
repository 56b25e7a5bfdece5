//! Convolutions over any number of spatial axes, and their transposes.

use super::Results;
use super::window::{
    AutoPad, Span, TAP_LIMIT, channels_last, channels_second, conv_geometry, halves, merged,
    numbers, padded, plane, positive, spans, spatial, tap, unmerged, with_height, without_height,
};
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::node::OnnxNode;
use qcompile_ir::{Dim, Op};

type Value = Result<ValueId, Obstacle>;

/// The sizes of the weight of a convolution over `x`, as `kernel_shape` says, too.
fn weight_sizes(
    draft: &Draft,
    node: &OnnxNode,
    x: ValueId,
    weight: ValueId,
) -> Result<Vec<usize>, Obstacle> {
    let sizes = draft.ty(weight).shape.as_fixed().unwrap_or_default();
    if sizes.len() != draft.rank(x) {
        return Err(Obstacle::invalid(format!("weight {} for {}", draft.ty(weight), draft.ty(x))));
    }
    if let Some(kernel) = node.attributes.ints("kernel_shape")?
        && !kernel
            .iter()
            .map(|&size| usize::try_from(size).ok())
            .eq(sizes[2..].iter().map(|&size| Some(size)))
    {
        return Err(Obstacle::invalid(format!(
            "kernel_shape {kernel:?} for weight {}",
            draft.ty(weight)
        )));
    }
    let taps = sizes[2..sizes.len().max(4) - 2]
        .iter()
        .try_fold(1_usize, |taps, &size| taps.checked_mul(size))
        .filter(|&taps| taps <= TAP_LIMIT);
    if taps.is_none() {
        return Err(Obstacle::unsupported(format!(
            "a kernel of {:?}: more than {TAP_LIMIT} places before the last two axes",
            &sizes[2..]
        )));
    }
    Ok(sizes)
}

fn groups(node: &OnnxNode) -> Result<usize, Obstacle> {
    let groups = node.attributes.int("group", 1)?;
    usize::try_from(groups)
        .ok()
        .filter(|&groups| groups > 0)
        .ok_or_else(|| Obstacle::invalid(format!("attribute group is {groups}")))
}

/// `y[n, spatial..., c]` with the bias of input 2, if there is one, and channels second.
fn finish(draft: &mut Draft, node: &OnnxNode, mut y: ValueId) -> Results {
    if let Some(bias) = node.optional(2) {
        let channels = draft.dims(y).last().copied().unwrap_or(Dim::ONE);
        if draft.dims(bias) != [channels] {
            return Err(Obstacle::invalid(format!(
                "bias {} for {channels} channels",
                draft.ty(bias)
            )));
        }
        y = draft.add(y, bias)?;
    }
    Ok(vec![channels_second(draft, y)?])
}

pub(super) fn conv(draft: &mut Draft, node: &OnnxNode) -> Results {
    let (x, weight) = (node.input(0)?, node.input(1)?);
    let input = spatial(draft, x)?;
    let sizes = weight_sizes(draft, node, x, weight)?;
    let spans = spans(node, &input, &sizes[2..])?;
    let groups = groups(node)?;
    let x = channels_last(draft, x)?;
    let y = correlate(draft, x, weight, &spans, groups)?;
    finish(draft, node, y)
}

/// `x[n, spatial..., c]` under `weight[o, c / groups, kernel...]`. More than two axes are a sum over the places of the
/// window along the first.
fn correlate(
    draft: &mut Draft,
    x: ValueId,
    weight: ValueId,
    spans: &[Span],
    groups: usize,
) -> Value {
    let axes = spans.len();
    let [first, rest @ ..] = spans else {
        return Err(Obstacle::invalid("a convolution over no axes"));
    };
    if axes <= 2 {
        let x = with_height(draft, x)?;
        let weight = plane_weight(draft, weight)?;
        let y = draft.emit_wide(Op::Conv2d(conv_geometry(plane(spans), groups)), &[x, weight])?;
        return without_height(draft, y, axes);
    }
    let x = padded(draft, x, 1, [first.pads[0], first.high()], 0.0)?;
    let mut sum = None;
    for at in 0..first.kernel {
        let part = tap(draft, x, 1, first, at)?;
        let outer = draft.dims(part)[..2].to_vec();
        let part = merged(draft, part, 0, 2)?;
        let weight = weight_tap(draft, weight, at)?;
        let part = correlate(draft, part, weight, rest, groups)?;
        let part = unmerged(draft, part, 0, &outer)?;
        sum = Some(match sum {
            None => part,
            Some(sum) => draft.add(sum, part)?,
        });
    }
    sum.ok_or_else(|| Obstacle::invalid("an empty kernel"))
}

/// `weight[a, b, k]` as `[a, b, 1, k]`; one with a height stays.
fn plane_weight(draft: &mut Draft, weight: ValueId) -> Value {
    match *draft.dims(weight) {
        [a, b, width] => draft.reshape(weight, &[a, b, Dim::ONE, width]),
        _ => Ok(weight),
    }
}

/// `weight[a, b, k, rest...]` at one place of its first kernel axis.
fn weight_tap(draft: &mut Draft, weight: ValueId, at: usize) -> Value {
    let part = draft.slice(weight, 2, at, at + 1)?;
    draft.squeeze(part, &[2])
}

/// A transposed convolution is the gradient of the input of the convolution with the same weight, strides, dilations
/// and padding.
pub(super) fn conv_transpose(draft: &mut Draft, node: &OnnxNode) -> Results {
    let (x, weight) = (node.input(0)?, node.input(1)?);
    let output = spatial(draft, x)?;
    let sizes = weight_sizes(draft, node, x, weight)?;
    let groups = groups(node)?;
    if draft.dims(x)[1] != Dim::fixed(sizes[0]) {
        return Err(Obstacle::invalid(format!("weight {} for {}", draft.ty(weight), draft.ty(x))));
    }
    let spans = transposed_spans(node, &output, &sizes[2..])?;
    let x = channels_last(draft, x)?;
    let y = spread(draft, x, weight, &spans, groups)?;
    finish(draft, node, y)
}

/// One axis of a transposed convolution.
#[derive(Clone, Copy)]
struct Transposed {
    /// The axis of the convolution whose output is the operand.
    span: Span,
    /// Zeros after what the window reaches.
    zeros: usize,
}

/// The convolutions, axis by axis, whose outputs have the sizes `output`.
fn transposed_spans(
    node: &OnnxNode,
    output: &[usize],
    kernel: &[usize],
) -> Result<Vec<Transposed>, Obstacle> {
    let axes = output.len();
    let strides = positive(node, "strides", axes)?;
    let dilations = positive(node, "dilations", axes)?;
    let adjust = numbers(node, "output_padding", axes)?.unwrap_or_else(|| vec![0; axes]);
    let pads = numbers(node, "pads", 2 * axes)?.unwrap_or_else(|| vec![0; 2 * axes]);
    let asked = numbers(node, "output_shape", axes)?;
    let auto_pad = AutoPad::read(node)?;
    let too_large = || Obstacle::invalid("a result beyond 2^64 elements");
    let mut spans = Vec::with_capacity(axes);
    for axis in 0..axes {
        let mut span = Span {
            input: 0,
            kernel: kernel[axis],
            stride: strides[axis],
            dilation: dilations[axis],
            pads: [0, 0],
            extra: 0,
        };
        let steps = output[axis]
            .checked_sub(1)
            .ok_or_else(|| Obstacle::invalid(format!("spatial axes of {output:?}")))?;
        let reached = steps
            .checked_mul(span.stride)
            .and_then(|size| size.checked_add(span.reach().ok()?))
            .ok_or_else(too_large)?;
        let whole = reached.checked_add(adjust[axis]).ok_or_else(too_large)?;
        let wanted = match (&asked, auto_pad) {
            (Some(sizes), _) => Some(sizes[axis]),
            (None, AutoPad::Same { .. }) => {
                Some(output[axis].checked_mul(span.stride).ok_or_else(too_large)?)
            }
            (None, _) => None,
        };
        span.pads = match (wanted, auto_pad) {
            // The padding is what is too much; where nothing is, zeros fill up.
            (Some(size), _) => {
                let lower = auto_pad != AutoPad::Same { lower: false };
                halves(whole.saturating_sub(size), lower)
            }
            (None, AutoPad::Explicit) => [pads[axis], pads[axis + axes]],
            (None, _) => [0, 0],
        };
        let size =
            wanted.map_or_else(|| whole.checked_sub(span.pads[0])?.checked_sub(span.pads[1]), Some);
        let size = size.filter(|&size| size > 0).ok_or_else(|| {
            Obstacle::invalid(format!("pads {:?} of a result of {whole}", span.pads))
        })?;
        // All that the window reaches after the padding before.
        let most = reached.checked_sub(span.pads[0]).filter(|&most| most > 0).ok_or_else(|| {
            Obstacle::invalid(format!("pads {:?} of a result of {whole}", span.pads))
        })?;
        span.input = size.min(most);
        span.pads[1] = most - span.input;
        spans.push(Transposed { span, zeros: size - span.input });
    }
    Ok(spans)
}

/// `x[n, spatial..., c]` spread by `weight[c, o / groups, kernel...]`. Along more than two axes, a sum over the places of
/// the window along the first.
fn spread(
    draft: &mut Draft,
    x: ValueId,
    weight: ValueId,
    axes: &[Transposed],
    groups: usize,
) -> Value {
    let [first, rest @ ..] = axes else {
        return Err(Obstacle::invalid("a convolution over no axes"));
    };
    if axes.len() <= 2 {
        let x = with_height(draft, x)?;
        let weight = plane_weight(draft, weight)?;
        let spans: Vec<Span> = axes.iter().map(|axis| axis.span).collect();
        let op = Op::Conv2dGradInput(conv_geometry(plane(&spans), groups));
        let y = draft.emit_wide(op, &[x, weight])?;
        let mut y = without_height(draft, y, axes.len())?;
        for (at, axis) in axes.iter().enumerate() {
            y = padded(draft, y, at + 1, [0, axis.zeros], 0.0)?;
        }
        return Ok(y);
    }
    let Transposed { span, zeros } = *first;
    let outer = draft.dims(x)[..2].to_vec();
    let planes = merged(draft, x, 0, 2)?;
    let mut sum = None;
    for at in 0..span.kernel {
        let weight = weight_tap(draft, weight, at)?;
        let part = spread(draft, planes, weight, rest, groups)?;
        let part = unmerged(draft, part, 0, &outer)?;
        let low = at.saturating_mul(span.dilation);
        let high = span.reach()? - 1 - low;
        let op = Op::Pad { axis: 1, low, high, interior: span.stride - 1, value: 0.0 };
        let part = draft.emit(op, &[part])?;
        sum = Some(match sum {
            None => part,
            Some(sum) => draft.add(sum, part)?,
        });
    }
    let sum = sum.ok_or_else(|| Obstacle::invalid("an empty kernel"))?;
    let kept = draft.slice(sum, 1, span.pads[0], span.pads[0] + span.input)?;
    padded(draft, kept, 1, [0, zeros], 0.0)
}
