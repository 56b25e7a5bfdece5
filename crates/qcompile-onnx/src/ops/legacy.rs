//! Forms that operators had before opset 7, as those of opset 7.

use crate::draft::Draft;
use crate::error::Obstacle;
use crate::known::{Element, Known};
use crate::node::{OnnxNode, axis_of};
use qcompile_ir::Dim;

/// Rewrites the operands of a node of an opset before 7, and reads the attributes that have no meaning any more.
pub(super) fn modernize(draft: &mut Draft, node: &mut OnnxNode) -> Result<(), Obstacle> {
    // Memory that Caffe2 could reuse.
    node.attributes.ints("consumed_inputs")?;
    match node.op {
        "Add" | "Sub" | "Mul" | "Div" | "Pow" | "And" | "Or" | "Xor" | "Equal" | "Less"
        | "Greater" => align(draft, node),
        "Gemm" => node.attributes.flag("broadcast", false).map(drop),
        "Dropout" | "BatchNormalization" => node.attributes.flag("is_test", false).map(drop),
        "LSTM" | "GRU" | "RNN" => node.attributes.flag("output_sequence", false).map(drop),
        "Reshape" if node.opset < 5 => {
            let shape = node.attributes.ints("shape")?;
            let shape = shape.ok_or_else(|| Obstacle::invalid("attribute shape is missing"))?;
            let shape = Known::ints(shape.iter().map(|&size| Element::Int(size)).collect());
            node.inputs.push(Some(draft.add_known(shape)));
            Ok(())
        }
        "Cast" | "Tile" if node.opset < 6 => Err(changed(6)),
        "Pad" | "Split" if node.opset < 2 => Err(changed(2)),
        _ => Ok(()),
    }
}

fn changed(opset: i64) -> Obstacle {
    Obstacle::unsupported(format!("the operator as it was before opset {opset}"))
}

/// Gives the second operand trailing dimensions of 1, so that its first one is at the attribute `axis` of the first.
fn align(draft: &mut Draft, node: &mut OnnxNode) -> Result<(), Obstacle> {
    let axis = node.attributes.optional_int("axis")?;
    let (true, Some(axis)) = (node.attributes.flag("broadcast", false)?, axis) else {
        return Ok(());
    };
    let (a, b) = (node.input(0)?, node.input(1)?);
    let first = axis_of(axis, draft.rank(a))?;
    let after = draft.rank(a).checked_sub(first + draft.rank(b)).ok_or_else(|| {
        Obstacle::invalid(format!("{} at axis {axis} of {}", draft.ty(b), draft.ty(a)))
    })?;
    let mut dims = draft.dims(b).to_vec();
    dims.resize(dims.len() + after, Dim::ONE);
    node.inputs[1] = Some(draft.reshape(b, &dims)?);
    Ok(())
}
