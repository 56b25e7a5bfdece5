//! Pooling.

use super::Results;
use super::window::{Window, from_nhwc, positive, reduce_spatial, spatial, to_nhwc};
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::node::OnnxNode;
use qcompile_ir::{Op, PoolGeometry, ReduceOp};

fn window(draft: &Draft, node: &OnnxNode, x: ValueId) -> Result<Window, Obstacle> {
    let (axes, _) = spatial(draft, x)?;
    if node.attributes.ints("kernel_shape")?.is_none() {
        return Err(Obstacle::invalid("attribute kernel_shape is missing"));
    }
    if !draft.dtype(x).is_float() {
        return Err(Obstacle::unsupported(format!("{} elements", draft.dtype(x))));
    }
    let kernel = positive(node, "kernel_shape", axes)?;
    Window::read(draft, node, x, &kernel)
}

fn pooled(draft: &mut Draft, x: ValueId, window: &Window, average: Option<bool>) -> Results {
    let (axes, _) = spatial(draft, x)?;
    let geometry = PoolGeometry {
        input: window.input,
        kernel: window.kernel,
        strides: window.strides,
        pads: window.all_pads(),
        dilations: window.dilations,
        count_include_pad: average == Some(true),
    };
    let nhwc = to_nhwc(draft, x)?;
    let op = if average.is_some() { Op::AveragePool2d(geometry) } else { Op::MaxPool2d(geometry) };
    let result = draft.emit(op, &[nhwc])?;
    Ok(vec![from_nhwc(draft, result, axes)?])
}

pub(super) fn max_pool(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.input(0)?;
    // Only says in which order indices count.
    node.attributes.flag("storage_order", false)?;
    if node.wants(1) {
        return Err(Obstacle::unsupported("the indices of the maxima"));
    }
    let window = window(draft, node, x)?;
    pooled(draft, x, &window, None)
}

pub(super) fn average_pool(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.input(0)?;
    let window = window(draft, node, x)?;
    let count_include_pad = node.attributes.flag("count_include_pad", false)?;
    if count_include_pad && window.extra != [0, 0] {
        return Err(Obstacle::unsupported(
            "ceil_mode that adds a window together with count_include_pad",
        ));
    }
    pooled(draft, x, &window, Some(count_include_pad))
}

pub(super) fn global_average_pool(draft: &mut Draft, node: &OnnxNode) -> Results {
    Ok(vec![reduce_spatial(draft, node.input(0)?, None)?])
}

pub(super) fn global_max_pool(draft: &mut Draft, node: &OnnxNode) -> Results {
    Ok(vec![reduce_spatial(draft, node.input(0)?, Some(ReduceOp::Max))?])
}
