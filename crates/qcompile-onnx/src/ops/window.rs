//! Windows over spatial axes: what `Conv` and the pools share. One spatial axis becomes two, the first of size 1.

use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::node::OnnxNode;
use qcompile_ir::{Dim, Op, ReduceOp};

type Result<T> = std::result::Result<T, Obstacle>;

/// Where a window moves over height and width.
pub(super) struct Window {
    pub(super) input: [usize; 2],
    pub(super) kernel: [usize; 2],
    pub(super) strides: [usize; 2],
    pub(super) dilations: [usize; 2],
    /// Top, left, bottom, right.
    pub(super) pads: [usize; 4],
    /// What rounding the output size up adds at the bottom and on the right.
    pub(super) extra: [usize; 2],
}

/// Number of spatial axes of `x`, which must be one or two, and their sizes.
pub(super) fn spatial(draft: &Draft, x: ValueId) -> Result<(usize, [usize; 2])> {
    let dims = draft.dims(x);
    let fixed = |dim: Dim| {
        dim.as_fixed()
            .ok_or_else(|| Obstacle::unsupported("a spatial axis that depends on the batch size"))
    };
    match *dims {
        [_, _, width] => Ok((1, [1, fixed(width)?])),
        [_, _, height, width] => Ok((2, [fixed(height)?, fixed(width)?])),
        [] | [_] | [_, _] => Err(Obstacle::invalid(format!("{} has no spatial axes", draft.ty(x)))),
        _ => Err(Obstacle::unsupported(format!("{} spatial axes", dims.len() - 2))),
    }
}

impl Window {
    /// Reads `strides`, `dilations`, `pads`, `auto_pad` and `ceil_mode` for a kernel over `x`.
    pub(super) fn read(
        draft: &Draft,
        node: &OnnxNode,
        x: ValueId,
        kernel: &[usize],
    ) -> Result<Window> {
        let (axes, input) = spatial(draft, x)?;
        if kernel.len() != axes {
            return Err(Obstacle::invalid(format!("a kernel of {kernel:?} over {}", draft.ty(x))));
        }
        let mut window = Window {
            input,
            kernel: two(kernel),
            strides: two(&positive(node, "strides", axes)?),
            dilations: two(&positive(node, "dilations", axes)?),
            pads: [0; 4],
            extra: [0; 2],
        };
        let pads = node.attributes.ints("pads")?;
        match node.attributes.string("auto_pad", "NOTSET")?.as_str() {
            "NOTSET" => window.set_pads(pads, axes)?,
            "VALID" => {}
            "SAME_UPPER" => window.set_same(false)?,
            "SAME_LOWER" => window.set_same(true)?,
            other => return Err(Obstacle::invalid(format!("attribute auto_pad is `{other}`"))),
        }
        if node.op != "Conv" && node.attributes.flag("ceil_mode", false)? {
            window.round_up()?;
        }
        Ok(window)
    }

    fn set_pads(&mut self, pads: Option<&[i64]>, axes: usize) -> Result<()> {
        let Some(pads) = pads else {
            return Ok(());
        };
        let sizes: Option<Vec<usize>> = pads.iter().map(|&pad| usize::try_from(pad).ok()).collect();
        self.pads = match sizes.as_deref() {
            Some(&[left, right]) if axes == 1 => [0, left, 0, right],
            Some(&[top, left, bottom, right]) if axes == 2 => [top, left, bottom, right],
            None => return Err(Obstacle::unsupported(format!("negative pads {pads:?}"))),
            _ => return Err(Obstacle::invalid(format!("pads {pads:?} for {axes} spatial axes"))),
        };
        Ok(())
    }

    /// How far the dilated kernel reaches.
    fn reach(&self, axis: usize) -> Result<usize> {
        self.kernel[axis]
            .checked_sub(1)
            .and_then(|steps| steps.checked_mul(self.dilations[axis])?.checked_add(1))
            .ok_or_else(|| Obstacle::invalid("an empty or too large kernel"))
    }

    fn set_same(&mut self, lower: bool) -> Result<()> {
        for axis in 0..2 {
            let output = self.input[axis].div_ceil(self.strides[axis]);
            let span = output.saturating_sub(1).saturating_mul(self.strides[axis]);
            let total = span.saturating_add(self.reach(axis)?).saturating_sub(self.input[axis]);
            let (small, large) = (total / 2, total - total / 2);
            (self.pads[axis], self.pads[axis + 2]) =
                if lower { (large, small) } else { (small, large) };
        }
        Ok(())
    }

    /// Adds what a last partial window needs, if it starts within the input or the padding before it.
    fn round_up(&mut self) -> Result<()> {
        for axis in 0..2 {
            let padded = self.input[axis]
                .saturating_add(self.pads[axis])
                .saturating_add(self.pads[axis + 2]);
            let reach = self.reach(axis)?;
            let Some(room) = padded.checked_sub(reach) else {
                continue;
            };
            let steps = room.div_ceil(self.strides[axis]);
            let start = steps.saturating_mul(self.strides[axis]);
            if start >= self.input[axis].saturating_add(self.pads[axis]) {
                continue;
            }
            self.extra[axis] = start.saturating_sub(room);
        }
        Ok(())
    }

    /// The padding with what rounding up adds.
    pub(super) fn all_pads(&self) -> [usize; 4] {
        let [top, left, bottom, right] = self.pads;
        [top, left, bottom.saturating_add(self.extra[0]), right.saturating_add(self.extra[1])]
    }
}

/// Numbers of an attribute, one for each spatial axis, at least 1; 1 by default.
pub(super) fn positive(node: &OnnxNode, name: &str, axes: usize) -> Result<Vec<usize>> {
    let Some(values) = node.attributes.ints(name)? else {
        return Ok(vec![1; axes]);
    };
    let sizes: Option<Vec<usize>> = values
        .iter()
        .map(|&value| usize::try_from(value).ok().filter(|&value| value > 0))
        .collect();
    sizes.filter(|sizes| sizes.len() == axes).ok_or_else(|| {
        Obstacle::invalid(format!("attribute {name} is {values:?} for {axes} spatial axes"))
    })
}

fn two(sizes: &[usize]) -> [usize; 2] {
    match *sizes {
        [height, width] => [height, width],
        [width] => [1, width],
        _ => [1, 1],
    }
}

/// `[n, c, h, w]` or `[n, c, w]` as `[n, h, w, c]`.
pub(super) fn to_nhwc(draft: &mut Draft, x: ValueId) -> Result<ValueId> {
    let last = draft.rank(x) - 1;
    let moved = draft.move_axis(x, 1, last)?;
    match *draft.dims(moved) {
        [n, width, channels] => draft.reshape(moved, &[n, Dim::ONE, width, channels]),
        _ => Ok(moved),
    }
}

/// The reverse, for a value of `axes` spatial axes.
pub(super) fn from_nhwc(draft: &mut Draft, x: ValueId, axes: usize) -> Result<ValueId> {
    let x = if axes == 1 { draft.squeeze(x, &[1])? } else { x };
    let last = draft.rank(x) - 1;
    draft.move_axis(x, last, 1)
}

/// A reduction over all spatial axes of an NCHW value, which stay with size 1; computed over NHWC, as the convolutions
/// beside it are.
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
    let moved = draft.move_axis(x, 1, rank - 1)?;
    let axes: Vec<usize> = (1..rank - 1).collect();
    let reduced = match op {
        Some(op) => draft.emit(Op::Reduce { op, axes }, &[moved])?,
        None => draft.mean(moved, &axes)?,
    };
    draft.reshape(reduced, &dims)
}
