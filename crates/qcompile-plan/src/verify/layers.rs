//! Attention and recurrent layers.

use super::{Checked, check_access, dense, product, writable};
use crate::{Access, Attention, AttentionResult, Place, Plan, Recurrent, Strided};
use qcompile_ir::{DType, Dim};

pub(super) fn attention(plan: &Plan, attention: &Attention) -> Checked {
    let Attention { batch, rows, keys, heads, key_heads, width, value_width, .. } = *attention;
    let (q, k, v) = (attention.q, attention.k, attention.v);
    if key_heads == 0 || heads % key_heads != 0 {
        return Err("heads do not share keys".to_owned());
    }
    if !matches!(attention.dtype, DType::F32 | DType::BF16) {
        return Err(format!("there is no attention of {}", attention.dtype));
    }
    let codes = attention.scales.is_some();
    let fits = match (attention.products, attention.dtype) {
        (DType::F32, _) | (DType::BF16, DType::BF16) => !codes,
        (DType::I8, _) => codes,
        _ => false,
    };
    if !fits {
        return Err(format!("{} has no products of {}", attention.dtype, attention.products));
    }
    let (heads, key_heads) = (heads.into(), key_heads.into());
    let strided = |strided: Strided, dtype: DType, dims: [Dim; 4]| {
        let Strided { place: Place { slot, offset }, strides } = strided;
        check_access(plan, &dims, &Access { slot, dtype, offset, strides: strides.to_vec() })
    };
    let q_dims = [batch, rows, heads, width];
    let k_dims = [batch, keys, key_heads, width];
    let v_dims = [batch, keys, key_heads, value_width];
    let y_dims = [batch, rows, heads, value_width];
    for (operand, dims) in [(q, q_dims), (k, k_dims), (v, v_dims)] {
        strided(operand, if codes { DType::I8 } else { attention.dtype }, dims)?;
    }
    for scale in attention.scales.into_iter().flatten() {
        dense(plan, scale, DType::F32, product(&[Dim::ONE])?)?;
    }
    if let Some(mask) = attention.mask {
        strided(mask, DType::F32, [batch, heads, rows, keys])?;
    }
    let result = |place: Place, dims: [Dim; 4]| {
        writable(plan, place.slot)?;
        dense(plan, place, attention.dtype, product(&dims)?)
    };
    match attention.result {
        AttentionResult::Forward(y) => result(y, y_dims),
        AttentionResult::Gradients { dy, numbers, of } => {
            strided(dy, attention.dtype, y_dims)?;
            if let Some(numbers) = numbers {
                rounds_codes(Some(attention.products))?;
                strided(numbers, DType::F32, [batch, rows, heads, 2.into()])?;
            }
            let wanted = of.into_iter().zip([q_dims, k_dims, v_dims]);
            wanted
                .filter_map(|(place, dims)| Some((place?, dims)))
                .try_for_each(|(p, d)| result(p, d))
        }
    }
}

/// Only the gradients whose products are in codes round at random.
fn rounds_codes(products: Option<DType>) -> Checked {
    if products == Some(DType::I8) { Ok(()) } else { Err("floats are not rounded".to_owned()) }
}

pub(super) fn recurrent(plan: &Plan, recurrent: &Recurrent) -> Checked {
    let Recurrent { recurrence, gradient, steps, batch, hidden, x, r, h, y, .. } = recurrent;
    let cell = recurrence.cell;
    match recurrence.products {
        None | Some(DType::BF16 | DType::I8) => {}
        Some(other) => return Err(format!("no kernel has recurrent products of {other}")),
    }
    let size = |sizes: &[usize]| {
        let mut dims: Vec<Dim> = sizes.iter().map(|&size| size.into()).collect();
        dims.push(*batch);
        product(&dims)
    };
    let rows = steps.checked_add(1).ok_or("a size overflows")?;
    let states = size(&[cell.sections(), rows, *hidden])?;
    let gradients = size(&[cell.gradients(), rows, *hidden])?;
    let (first, state, result) = if *gradient {
        (states, size(&[*steps, *hidden])?, gradients)
    } else {
        (size(&[cell.gates(), *steps, *hidden])?, size(&[*hidden])?, states)
    };
    writable(plan, y.slot)?;
    let fixed = |sizes: [usize; 3]| product(&sizes.map(Dim::fixed));
    dense(plan, *x, DType::F32, first)?;
    dense(plan, *r, DType::F32, fixed([cell.gates(), *hidden, *hidden])?)?;
    dense(plan, *h, DType::F32, state)?;
    dense(plan, *y, DType::F32, result)?;
    let optional = [
        (recurrent.c, DType::F32, state),
        (recurrent.bias, DType::F32, fixed([1, 1, *hidden])?),
        (recurrent.peepholes, DType::F32, fixed([1, 3, *hidden])?),
        (recurrent.lengths, DType::I64, size(&[])?),
        (recurrent.numbers, DType::F32, size(&[cell.gradients(), *steps])?),
    ];
    if recurrent.numbers.is_some() {
        rounds_codes(recurrence.products)?;
    }
    for (place, dtype, elements) in optional {
        place.map_or(Ok(()), |place| dense(plan, place, dtype, elements))?;
    }
    Ok(())
}
