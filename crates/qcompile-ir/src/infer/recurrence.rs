//! Recurrent layers.

use super::{Types, fixed, float, same};
use crate::{
    Cell, DType, GradientRounding, QuantizedRange, Recurrence, RecurrenceOperands, Shape,
    TensorType,
};

/// Checks the attributes of a layer, or of its gradient, on values of a type.
fn recurrence_fits(recurrence: &Recurrence, ty: &TensorType) -> Result<(), String> {
    let Recurrence { cell, activations, clip, peepholes, input_forget, products, .. } = recurrence;
    if let Some(products) = products {
        let known = matches!(products, DType::BF16 | DType::I8);
        if !known || ty.dtype != DType::F32 {
            return Err(format!("has no products of {products} on {}", ty.dtype));
        }
    }
    if *cell != Cell::Lstm && (*peepholes || *input_forget) {
        return Err(format!("{} has no peepholes and no input_forget", cell.name()));
    }
    if clip.is_some_and(|clip| !(clip > 0.0 && clip.is_finite())) {
        return Err("clips at a positive number".to_owned());
    }
    activations
        .iter()
        .find_map(|activation| activation.problem())
        .map_or(Ok(()), |problem| Err(format!("takes no {}", problem.trim_start_matches("an "))))
}

/// Checks that sums over hidden units fit in what products are summed in.
fn sums_fit(recurrence: &Recurrence, hidden: usize) -> Result<(), String> {
    if recurrence.products == Some(DType::I8) && hidden > QuantizedRange::MOST_I8_PRODUCTS {
        return Err(format!("an i32 holds no sum of {hidden} products of i8"));
    }
    Ok(())
}

/// Checks the operands that may be absent, by the dtype and batch size of the others.
fn recurrence_extras(
    at: RecurrenceOperands,
    operands: Types,
    state: [&TensorType; 2],
    hidden: usize,
) -> Result<(), String> {
    let [state, cell] = state;
    let float = |dims: &[usize]| TensorType::new(state.dtype, Shape::fixed(dims));
    let batch = state.shape.0[state.shape.rank() - 2];
    let lengths = TensorType::new(DType::I64, Shape(vec![batch]));
    let expected = [
        (at.cell, cell.clone()),
        (at.bias, float(&[hidden])),
        (at.peepholes, float(&[3, hidden])),
        (at.lengths, lengths),
    ];
    expected
        .iter()
        .filter_map(|(position, ty)| Some((operands[(*position)?], ty)))
        .try_for_each(|(operand, ty)| same(operand, ty))
}

pub(super) fn recurrence(recurrence: &Recurrence, operands: Types) -> Result<TensorType, String> {
    let at = recurrence.operands();
    if operands.len() != at.count {
        return Err(format!("takes {} operands, not {}", at.count, operands.len()));
    }
    let [x, r, h0] = [operands[0], operands[1], operands[2]];
    float(x)?;
    recurrence_fits(recurrence, x)?;
    let gates = recurrence.cell.gates();
    let [steps, batch, columns] = x.shape.0[..] else {
        return Err(format!("{x} is not [steps, batch, gates]"));
    };
    let steps = fixed(steps, "the number of steps")?;
    let columns = fixed(columns, "the hidden size")?;
    let hidden = columns / gates;
    let state = TensorType::new(x.dtype, Shape(vec![batch, hidden.into()]));
    if hidden * gates != columns
        || *r != TensorType::new(x.dtype, Shape::fixed(&[columns, hidden]))
        || *h0 != state
    {
        return Err(format!("{x}, {r} and {h0} do not fit"));
    }
    sums_fit(recurrence, hidden)?;
    recurrence_extras(at, operands, [&state, &state], hidden)?;
    let rows = steps.checked_add(1).ok_or("too many steps")?;
    let sections = recurrence.cell.sections();
    Ok(TensorType::new(x.dtype, Shape(vec![sections.into(), rows.into(), batch, hidden.into()])))
}

pub(super) fn recurrence_grad(
    recurrence: &Recurrence,
    cell: bool,
    rounding: GradientRounding,
    operands: Types,
) -> Result<TensorType, String> {
    let at = recurrence.gradient_operands(cell, rounding);
    if operands.len() != at.count || (cell && recurrence.cell != Cell::Lstm) {
        return Err(format!("takes {} operands, not {}", at.count, operands.len()));
    }
    let [y, r, dh] = [operands[0], operands[1], operands[2]];
    float(y)?;
    recurrence_fits(recurrence, y)?;
    let [sections, rows, batch, hidden] = y.shape.0[..] else {
        return Err(format!("{y} is no recurrence"));
    };
    let (rows, hidden) = (fixed(rows, "the number of steps")?, fixed(hidden, "the hidden size")?);
    sums_fit(recurrence, hidden)?;
    let fits = || {
        let columns = hidden.checked_mul(recurrence.cell.gates())?;
        let weight = TensorType::new(y.dtype, Shape::fixed(&[columns, hidden]));
        let steps = rows.checked_sub(1)?;
        let states = TensorType::new(y.dtype, Shape(vec![steps.into(), batch, hidden.into()]));
        let all = sections == recurrence.cell.sections().into();
        (all && *r == weight && *dh == states).then_some(states)
    };
    let states = fits().ok_or_else(|| format!("{y}, {r} and {dh} do not fit"))?;
    recurrence_extras(at, operands, [&states, &states], hidden)?;
    if let Some(at) = at.numbers {
        if recurrence.products != Some(DType::I8) {
            return Err("products in floats round no gradients at random".to_owned());
        }
        let gradients = recurrence.cell.gradients().into();
        let each = Shape(vec![batch, states.shape.0[0], gradients]);
        same(&TensorType::f32(each), operands[at])?;
    }
    let columns = recurrence.cell.gradients().checked_mul(hidden).ok_or("too many columns")?;
    Ok(TensorType::new(y.dtype, Shape(vec![rows.into(), batch, columns.into()])))
}
