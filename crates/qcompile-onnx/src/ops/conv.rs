//! Convolution.

use super::Results;
use super::window::{Window, from_nhwc, spatial, to_nhwc};
use crate::draft::Draft;
use crate::error::Obstacle;
use crate::node::OnnxNode;
use qcompile_ir::{ConvGeometry, Dim, Op};

pub(super) fn conv(draft: &mut Draft, node: &OnnxNode) -> Results {
    let (x, weight) = (node.input(0)?, node.input(1)?);
    let (axes, _) = spatial(draft, x)?;
    let sizes = draft.ty(weight).shape.as_fixed().unwrap_or_default();
    if sizes.len() != axes + 2 {
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
    let groups = node.attributes.int("group", 1)?;
    let groups = usize::try_from(groups)
        .ok()
        .filter(|&groups| groups > 0)
        .ok_or_else(|| Obstacle::invalid(format!("attribute group is {groups}")))?;
    let window = Window::read(draft, node, x, &sizes[2..])?;
    let geometry = ConvGeometry {
        input: window.input,
        kernel: window.kernel,
        strides: window.strides,
        pads: window.pads,
        dilations: window.dilations,
        groups,
    };
    let nhwc = to_nhwc(draft, x)?;
    let [kernel_h, kernel_w] = window.kernel;
    let oihw = [sizes[0], sizes[1], kernel_h, kernel_w].map(Dim::fixed);
    let weight = draft.reshape(weight, &oihw)?;
    let mut result = draft.emit(Op::Conv2d(geometry), &[nhwc, weight])?;
    if let Some(bias) = node.optional(2) {
        if draft.dims(bias) != [Dim::fixed(sizes[0])] {
            return Err(Obstacle::invalid(format!(
                "bias {} for {} channels",
                draft.ty(bias),
                sizes[0]
            )));
        }
        result = draft.add(result, bias)?;
    }
    Ok(vec![from_nhwc(draft, result, axes)?])
}
