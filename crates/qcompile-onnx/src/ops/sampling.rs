//! Numbers at regular places: the windows of signal processing, and grids to sample images at.

use super::Results;
use super::constant::add_tensor;
use super::indexing::bounded;
use super::linear::{numpy_product, product};
use crate::draft::Draft;
use crate::error::Obstacle;
use crate::node::{OnnxNode, dims_from};
use crate::tensor;
use qcompile_ir::{DType, Tensor};
use std::f64::consts::TAU;
use std::sync::Arc;

/// `a - b cos(x) + c cos(2x)`, where x goes around once: `BlackmanWindow`, `HannWindow` and `HammingWindow`.
pub(super) fn cosine_window(draft: &mut Draft, node: &OnnxNode, [a, b, c]: [f64; 3]) -> Results {
    let periodic = node.attributes.flag("periodic", true)?;
    let dtype = match node.attributes.optional_int("output_datatype")? {
        None => DType::F32,
        Some(number) => tensor::dtype(i32::try_from(number).unwrap_or(0))?,
    };
    let size = match node.ints_input(draft, 0)?.as_deref() {
        Some(&[size]) => usize::try_from(size)
            .map_err(|_| Obstacle::invalid(format!("a window of {size} elements")))?,
        other => return Err(Obstacle::invalid(format!("input 0 (size) is {other:?}"))),
    };
    bounded(size)?;
    let period = if periodic { size } else { size.saturating_sub(1) }.max(1) as f64;
    let value = |at: usize| {
        let x = TAU * at as f64 / period;
        a - b * x.cos() + c * (2.0 * x).cos()
    };
    let values: Vec<f64> = (0..size).map(value).collect();
    let window = Tensor::from_f64(dtype, &[size], &values);
    let window = window.ok_or_else(|| Obstacle::invalid("the window is too large"))?;
    Ok(vec![add_tensor(draft, Arc::new(window))?])
}

/// `AffineGrid`: `theta[n, d, d + 1]` applied to the places of an image in [-1, 1], innermost coordinate first.
pub(super) fn affine_grid(draft: &mut Draft, node: &OnnxNode) -> Results {
    let theta = node.input(0)?;
    let align = node.attributes.flag("align_corners", false)?;
    let size = node.shape_elements(draft, 1)?;
    let size = dims_from(&size.ok_or_else(|| Obstacle::invalid("input 1 (size) is missing"))?)?;
    let axes = size.len().saturating_sub(2);
    let dims = draft.dims(theta).to_vec();
    let fits = matches!(axes, 2 | 3)
        && dims.len() == 3
        && dims[0] == size[0]
        && dims[1..] == [axes.into(), (axes + 1).into()];
    if !fits {
        return Err(Obstacle::invalid(format!("{} for a size of {size:?}", draft.ty(theta))));
    }
    let fixed: Option<Vec<usize>> = size[2..].iter().map(|dim| dim.as_fixed()).collect();
    let fixed =
        fixed.ok_or_else(|| Obstacle::batch("an axis of the image depends on the batch size"))?;
    let places = fixed.iter().try_fold(axes + 1, |count, &size| count.checked_mul(size));
    let places = places.ok_or_else(|| Obstacle::invalid(format!("a size of {fixed:?}")))?;
    bounded(places)?;
    let coordinate = |at: usize, size: usize| match (align, size) {
        (true, 1) => 0.0,
        (true, _) => 2.0 * at as f64 / (size - 1) as f64 - 1.0,
        (false, _) => (2 * at + 1) as f64 / size as f64 - 1.0,
    };
    let rows = places / (axes + 1);
    let mut grid = Vec::with_capacity(places);
    for row in 0..rows {
        let mut rest = row;
        for &size in fixed.iter().rev() {
            grid.push(coordinate(rest % size, size));
            rest /= size;
        }
        grid.push(1.0);
    }
    let grid = Tensor::from_f64(draft.dtype(theta), &[rows, axes + 1], &grid);
    let grid = grid.ok_or_else(|| Obstacle::invalid("the grid is too large"))?;
    let grid = add_tensor(draft, Arc::new(grid))?;
    let theta = draft.transpose(theta, &[0, 2, 1])?;
    let sampled = numpy_product(draft, grid, theta, product)?;
    let mut shape = vec![size[0]];
    shape.extend_from_slice(&size[2..]);
    shape.push(axes.into());
    Ok(vec![draft.reshape(sampled, &shape)?])
}
