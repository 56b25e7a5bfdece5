//! Windows over any number of spatial axes: what convolutions and pools share.
//!
//! The graph has windows over height and width, channels last. One axis is a height of 1 and a width. More than two are
//! taken apart: of the first axes, each operator makes what it can of the last two.

use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::node::OnnxNode;
use qcompile_ir::{BinaryOp, ConvGeometry, Dim, Op, PoolGeometry, ReduceOp};

type Result<T> = std::result::Result<T, Obstacle>;

/// Places of a window along axes before the last two that are taken apart, one node or more for each.
pub(super) const TAP_LIMIT: usize = 1024;

/// Elements that are summed one after another: a longer sum in f32 would lose digits, and is made axis by axis.
const RUN_LIMIT: usize = 256;

/// Spatial axes that a window may have.
const AXES_LIMIT: usize = 8;

/// Where a window moves along one spatial axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    /// Elements of the axis.
    pub(super) input: usize,
    /// Places of the window.
    pub(super) kernel: usize,
    pub(super) stride: usize,
    pub(super) dilation: usize,
    /// Padding before and after.
    pub(super) pads: [usize; 2],
    /// What rounding the output size up adds after the padding.
    pub(super) extra: usize,
}

impl Span {
    /// An axis of one element under a window of one place.
    const ONE: Span = Span { input: 1, kernel: 1, stride: 1, dilation: 1, pads: [0, 0], extra: 0 };

    /// How far the dilated window reaches.
    pub(super) fn reach(&self) -> Result<usize> {
        self.kernel
            .checked_sub(1)
            .and_then(|steps| steps.checked_mul(self.dilation)?.checked_add(1))
            .ok_or_else(|| {
                let Span { kernel, dilation, .. } = self;
                Obstacle::invalid(format!("a window of {kernel} with dilation {dilation}"))
            })
    }

    /// The padding after the axis, with what rounding up adds.
    pub(super) fn high(&self) -> usize {
        self.pads[1].saturating_add(self.extra)
    }

    /// Places of the window along the axis.
    pub(super) fn output(&self) -> Result<usize> {
        let padded = self.input.saturating_add(self.pads[0]).saturating_add(self.high());
        let room = padded.checked_sub(self.reach()?).ok_or_else(|| {
            Obstacle::invalid(format!(
                "a window that reaches {} over an axis of {} padded by {:?}",
                self.reach().unwrap_or(usize::MAX),
                self.input,
                self.pads
            ))
        })?;
        Ok(room / self.stride + 1)
    }

    /// Padding for an output of the input's size over the stride, rounded up.
    fn set_same(&mut self, lower: bool) -> Result<()> {
        let output = self.input.div_ceil(self.stride);
        let span = output.saturating_sub(1).saturating_mul(self.stride);
        self.pads = halves(span.saturating_add(self.reach()?).saturating_sub(self.input), lower);
        Ok(())
    }

    /// Adds what a last partial window needs, if it starts within the input or the padding before it.
    fn round_up(&mut self) -> Result<()> {
        let padded = self.input.saturating_add(self.pads[0]).saturating_add(self.pads[1]);
        let Some(room) = padded.checked_sub(self.reach()?) else {
            return Ok(());
        };
        let start = room.div_ceil(self.stride).saturating_mul(self.stride);
        if start < self.input.saturating_add(self.pads[0]) {
            self.extra = start.saturating_sub(room);
        }
        Ok(())
    }
}

/// `total` in two halves, the larger one last unless `lower`.
pub(super) fn halves(total: usize, lower: bool) -> [usize; 2] {
    let (small, large) = (total / 2, total - total / 2);
    if lower { [large, small] } else { [small, large] }
}

/// The sizes of the spatial axes of `x`, of which there must be at least one.
pub(super) fn spatial(draft: &Draft, x: ValueId) -> Result<Vec<usize>> {
    match draft.dims(x) {
        [] | [_] | [_, _] => Err(Obstacle::invalid(format!("{} has no spatial axes", draft.ty(x)))),
        [_, _, sizes @ ..] if sizes.len() > AXES_LIMIT => {
            Err(Obstacle::unsupported(format!("{} spatial axes", sizes.len())))
        }
        [_, _, sizes @ ..] => sizes
            .iter()
            .enumerate()
            .map(|(axis, size)| {
                size.as_fixed().ok_or_else(|| {
                    Obstacle::batch(format!(
                        "spatial axis {} of {} depends on the batch size",
                        axis + 2,
                        draft.ty(x)
                    ))
                })
            })
            .collect(),
    }
}

/// How a node says where padding goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum AutoPad {
    /// By the attribute `pads`.
    Explicit,
    /// For an output of the input's size over the stride (times it, where the convolution is transposed).
    Same {
        /// Whether the larger half goes before the axis.
        lower: bool,
    },
    /// Nowhere.
    Valid,
}

impl AutoPad {
    pub(super) fn read(node: &OnnxNode) -> Result<AutoPad> {
        match node.attributes.string("auto_pad", "NOTSET")?.as_str() {
            "NOTSET" => Ok(AutoPad::Explicit),
            "VALID" => Ok(AutoPad::Valid),
            "SAME_UPPER" => Ok(AutoPad::Same { lower: false }),
            "SAME_LOWER" => Ok(AutoPad::Same { lower: true }),
            other => Err(Obstacle::invalid(format!("attribute auto_pad is `{other}`"))),
        }
    }
}

/// Reads `strides`, `dilations`, `pads`, `auto_pad` and, for pools, `ceil_mode`, for a kernel over axes of these sizes.
pub(super) fn spans(node: &OnnxNode, input: &[usize], kernel: &[usize]) -> Result<Vec<Span>> {
    let axes = input.len();
    if kernel.len() != axes {
        return Err(Obstacle::invalid(format!("a kernel of {kernel:?} over axes of {input:?}")));
    }
    let strides = positive(node, "strides", axes)?;
    let dilations = positive(node, "dilations", axes)?;
    let pads = numbers(node, "pads", 2 * axes)?.unwrap_or_else(|| vec![0; 2 * axes]);
    let auto_pad = AutoPad::read(node)?;
    let pools = node.op.ends_with("Pool");
    let ceil_mode = pools && node.attributes.flag("ceil_mode", false)?;
    let mut spans = Vec::with_capacity(axes);
    for axis in 0..axes {
        let mut span = Span {
            input: input[axis],
            kernel: kernel[axis],
            stride: strides[axis],
            dilation: dilations[axis],
            pads: [0, 0],
            extra: 0,
        };
        match auto_pad {
            AutoPad::Explicit => span.pads = [pads[axis], pads[axis + axes]],
            AutoPad::Same { lower } => span.set_same(lower)?,
            AutoPad::Valid => {}
        }
        if ceil_mode && auto_pad == AutoPad::Explicit {
            span.round_up()?;
        }
        spans.push(span);
    }
    Ok(spans)
}

/// Numbers of an attribute that has `count` of them, none negative.
pub(super) fn numbers(node: &OnnxNode, name: &str, count: usize) -> Result<Option<Vec<usize>>> {
    let Some(values) = node.attributes.ints(name)? else {
        return Ok(None);
    };
    let sizes: Option<Vec<usize>> =
        values.iter().map(|&value| usize::try_from(value).ok()).collect();
    sizes.filter(|sizes| sizes.len() == count).map(Some).ok_or_else(|| {
        Obstacle::invalid(format!("attribute {name} is {values:?}, not {count} numbers from 0"))
    })
}

/// Numbers of an attribute, one for each spatial axis, at least 1; 1 by default.
pub(super) fn positive(node: &OnnxNode, name: &str, axes: usize) -> Result<Vec<usize>> {
    let values = numbers(node, name, axes)?.unwrap_or_else(|| vec![1; axes]);
    if values.contains(&0) {
        return Err(Obstacle::invalid(format!("attribute {name} is {values:?}")));
    }
    Ok(values)
}

/// One or two spans as height and width.
pub(super) fn plane(spans: &[Span]) -> [Span; 2] {
    match *spans {
        [height, width] => [height, width],
        [width] => [Span::ONE, width],
        _ => [Span::ONE, Span::ONE],
    }
}

/// The geometry of a convolution over height and width.
pub(super) fn conv_geometry([height, width]: [Span; 2], groups: usize) -> ConvGeometry {
    ConvGeometry {
        input: [height.input, width.input],
        kernel: [height.kernel, width.kernel],
        strides: [height.stride, width.stride],
        pads: [height.pads[0], width.pads[0], height.high(), width.high()],
        dilations: [height.dilation, width.dilation],
        groups,
    }
}

/// The geometry of a pool over height and width; an average counts the places inside the input.
pub(super) fn pool_geometry(plane: [Span; 2]) -> PoolGeometry {
    let ConvGeometry { input, kernel, strides, pads, dilations, .. } = conv_geometry(plane, 1);
    PoolGeometry { input, kernel, strides, pads, dilations, count_include_pad: false }
}

/// `[n, c, spatial...]` as `[n, spatial..., c]`.
pub(super) fn channels_last(draft: &mut Draft, x: ValueId) -> Result<ValueId> {
    let last = draft.rank(x) - 1;
    draft.move_axis(x, 1, last)
}

/// The reverse.
pub(super) fn channels_second(draft: &mut Draft, x: ValueId) -> Result<ValueId> {
    let last = draft.rank(x) - 1;
    draft.move_axis(x, last, 1)
}

/// `[n, w, c]` as `[n, 1, w, c]`; a value with a height stays.
pub(super) fn with_height(draft: &mut Draft, x: ValueId) -> Result<ValueId> {
    match *draft.dims(x) {
        [n, width, channels] => draft.reshape(x, &[n, Dim::ONE, width, channels]),
        _ => Ok(x),
    }
}

/// The reverse, for a value of `axes` spatial axes.
pub(super) fn without_height(draft: &mut Draft, x: ValueId, axes: usize) -> Result<ValueId> {
    if axes == 1 { draft.squeeze(x, &[1]) } else { Ok(x) }
}

/// `x` with the `count` axes from `first` on as one.
pub(super) fn merged(draft: &mut Draft, x: ValueId, first: usize, count: usize) -> Result<ValueId> {
    let dims = draft.dims(x);
    let product = dims[first..first + count]
        .iter()
        .try_fold(Dim::ONE, |product, &dim| product.times(dim))
        .ok_or_else(|| Obstacle::invalid(format!("{} is too large", draft.ty(x))))?;
    let mut new = dims[..first].to_vec();
    new.push(product);
    new.extend(&dims[first + count..]);
    draft.reshape(x, &new)
}

/// `x` with its axis `at` in its place under the dimensions `parts`, whose product it is.
pub(super) fn unmerged(draft: &mut Draft, x: ValueId, at: usize, parts: &[Dim]) -> Result<ValueId> {
    let mut dims = draft.dims(x).to_vec();
    dims.splice(at..=at, parts.iter().copied());
    draft.reshape(x, &dims)
}

/// Values before and after those of an axis.
pub(super) fn padded(
    draft: &mut Draft,
    x: ValueId,
    axis: usize,
    [low, high]: [usize; 2],
    value: f32,
) -> Result<ValueId> {
    if [low, high] == [0, 0] {
        return Ok(x);
    }
    draft.emit(Op::Pad { axis, low, high, interior: 0, value }, &[x])
}

/// What place `tap` of the window sees along `axis` of `x`, which is padded already.
pub(super) fn tap(
    draft: &mut Draft,
    x: ValueId,
    axis: usize,
    span: &Span,
    tap: usize,
) -> Result<ValueId> {
    let start = tap.saturating_mul(span.dilation);
    let steps = (span.output()? - 1).saturating_mul(span.stride);
    let end = start.saturating_add(steps).saturating_add(1);
    if span.stride == 1 {
        return draft.slice(x, axis, start, end);
    }
    draft.emit(Op::Slice { axis, start, end, step: span.stride }, &[x])
}

/// A reduction over all spatial axes of a value with channels second, which stay with size 1; computed with channels
/// last, as the convolutions beside it are.
pub(super) fn reduce_spatial(
    draft: &mut Draft,
    x: ValueId,
    op: Option<ReduceOp>,
) -> Result<ValueId> {
    let rank = draft.rank(x);
    if rank < 3 {
        return Err(Obstacle::invalid(format!("{} has no spatial axes", draft.ty(x))));
    }
    let mut dims = draft.dims(x).to_vec();
    dims[2..].fill(Dim::ONE);
    let moved = channels_last(draft, x)?;
    let axes: Vec<usize> = (1..rank - 1).collect();
    let reduced = match op {
        Some(op) => draft.emit(Op::Reduce { op, axes }, &[moved])?,
        None => {
            let places = axes.iter().try_fold(1_usize, |places, &axis| {
                places.checked_mul(draft.dims(moved)[axis].as_fixed()?)
            });
            let sum = if places.is_some_and(|places| places <= RUN_LIMIT) {
                draft.reduce(ReduceOp::Sum, moved, &axes)?
            } else {
                axes.iter()
                    .rev()
                    .try_fold(moved, |sum, &axis| draft.reduce(ReduceOp::Sum, sum, &[axis]))?
            };
            let count = draft.count(moved, &axes)?;
            draft.binary(BinaryOp::Div, sum, count)?
        }
    };
    draft.reshape(reduced, &dims)
}
