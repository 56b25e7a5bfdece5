//! Types of 2-D pooling and its gradients.

use super::{Types, exactly, float, images, nhwc, same};
use crate::{DType, PoolGeometry, Shape, TensorType};

/// A maximum is also taken of i8.
pub(super) fn maximum(geometry: &PoolGeometry, operands: Types) -> Result<TensorType, String> {
    let [x] = exactly(operands)?;
    if x.dtype != DType::I8 {
        float(x)?;
    }
    pooled(geometry, x)
}

pub(super) fn maximum_grad(geometry: &PoolGeometry, operands: Types) -> Result<TensorType, String> {
    let [x, dy] = exactly(operands)?;
    float(x)?;
    same(&pooled(geometry, x)?, dy)?;
    Ok(x.clone())
}

pub(super) fn average(geometry: &PoolGeometry, operands: Types) -> Result<TensorType, String> {
    let [x] = exactly(operands)?;
    float(x)?;
    pooled(geometry, x)
}

pub(super) fn average_grad(geometry: &PoolGeometry, operands: Types) -> Result<TensorType, String> {
    let [dy] = exactly(operands)?;
    let (n, channels) = nhwc(dy, output(geometry)?)?;
    let [height, width] = geometry.input;
    Ok(TensorType::new(dy.dtype, Shape(vec![n, height.into(), width.into(), channels.into()])))
}

fn pooled(geometry: &PoolGeometry, x: &TensorType) -> Result<TensorType, String> {
    let (n, channels) = images(x, geometry.input)?;
    let [height, width] = output(geometry)?;
    Ok(TensorType::new(x.dtype, Shape(vec![n, height.into(), width.into(), channels.into()])))
}

fn output(geometry: &PoolGeometry) -> Result<[usize; 2], String> {
    let output = geometry.output();
    output.ok_or_else(|| format!("the window does not fit the input: {geometry:?}"))
}
