//! Two codes of 4 bits in a byte, as a composition of ops.
//!
//! A value is seen as a matrix whose rows are samples (one row, if it does not depend on the batch size); the left half of
//! each row and the right half share bytes, the left one in the lower bits. So both directions are elementwise over views.

use super::PASS;
use crate::PassError;
use crate::builder::Builder;
use qcompile_ir::{BinaryOp, DType, Dim, Graph, NodeId, Op, Region, Shape, TensorType};

/// What a byte is more than its upper code.
const UPPER: f64 = 16.0;

/// The rows of a value and their length.
fn matrix(ty: &TensorType) -> Result<(Dim, usize), PassError> {
    let elements = ty.shape.elements().filter(|elements| elements.scale > 0);
    match (ty.dtype, elements) {
        (DType::I4 | DType::U4, Some(elements)) => {
            Ok((if elements.batch { Dim::N } else { Dim::ONE }, elements.scale))
        }
        _ => Err(PassError::Unsupported {
            pass: PASS,
            reason: format!("{ty} does not hold codes of 4 bits to pack"),
        }),
    }
}

/// `q[...]` of `i4` or `u4` as `u8[rows, ceil(columns / 2)]`; an odd last column has zeros above it. Exact: see
/// [`unpack4`].
///
/// # Errors
/// [`PassError::Unsupported`] for other types and for values without elements.
pub fn pack4(graph: &mut Graph, q: NodeId, region: Region) -> Result<NodeId, PassError> {
    let (rows, columns) = matrix(graph.ty(q))?;
    let half = columns.div_ceil(2);
    let prefix = graph.node(q).name.as_str().to_owned();
    let mut b = Builder::new(graph, region, &prefix);
    let mut flat = b.reshape("flat", q, Shape(vec![rows, Dim::fixed(columns)]))?;
    if columns % 2 == 1 {
        let pad = Op::Pad { axis: 1, low: 0, high: 1, interior: 0, value: 0.0 };
        flat = b.add("even", pad, &[flat])?;
    }
    let left = Op::Slice { axis: 1, start: 0, end: half, step: 1 };
    let left = b.add("left", left, &[flat])?;
    let right = Op::Slice { axis: 1, start: half, end: 2 * half, step: 1 };
    let right = b.add("right", right, &[flat])?;
    // Conversions between integers wrap: first to 4 bits without a sign, and the product to 8.
    let left = b.cast("left.bits", left, DType::U4)?;
    let lower = b.cast("lower", left, DType::U8)?;
    let right = b.cast("right.bits", right, DType::U8)?;
    let upper = b.scaled("upper", right, UPPER)?;
    b.binary("packed", BinaryOp::Add, lower, upper)
}

/// What [`pack4`] packed, as a value of type `ty`.
///
/// # Errors
/// [`PassError::Unsupported`] if `ty` is not one of codes of 4 bits.
pub fn unpack4(
    graph: &mut Graph,
    packed: NodeId,
    ty: &TensorType,
    region: Region,
) -> Result<NodeId, PassError> {
    let (_, columns) = matrix(ty)?;
    let prefix = graph.node(packed).name.as_str().to_owned();
    let mut b = Builder::new(graph, region, &prefix);
    let left = b.cast("lower", packed, DType::U4)?;
    // Truncated, as conversions to integers do; there is no shift, and a division of integers has no vectors.
    let float = b.cast("float", packed, DType::F32)?;
    let right = b.scaled("shifted", float, 1.0 / UPPER)?;
    let right = b.cast("upper", right, DType::U4)?;
    let mut flat = b.add("both", Op::Concat { axis: 1 }, &[left, right])?;
    if columns % 2 == 1 {
        flat = b.add("odd", Op::Slice { axis: 1, start: 0, end: columns, step: 1 }, &[flat])?;
    }
    let flat = b.cast("codes", flat, ty.dtype)?;
    b.reshape("unpacked", flat, ty.shape.clone())
}
