//! Attention and its gradients.

use super::{Types, exactly, fixed, float, same};
use crate::{AttentionOperand, DType, Dim, GradientRounding, QuantizedRange, Shape, TensorType};

pub(super) fn attention(
    scale: f32,
    products: DType,
    operands: Types,
) -> Result<TensorType, String> {
    let (operands, mask) = operands.split_at(operands.len().min(3));
    let ty = operands_fit(scale, operands, mask)?;
    let summed = [operands[0].shape.0[3], operands[1].shape.0[1]];
    products_fit(products, &summed, operands[0])?;
    Ok(ty)
}

pub(super) fn gradient(
    of: AttentionOperand,
    scale: f32,
    products: DType,
    rounding: GradientRounding,
    operands: Types,
) -> Result<TensorType, String> {
    let (numbers, operands) = numbers(rounding, products, operands)?;
    let Some((dy, operands)) = operands.split_last() else {
        return Err("takes 4 or 5 operands, not 0".to_owned());
    };
    let (operands, mask) = operands.split_at(operands.len().min(3));
    same(&operands_fit(scale, operands, mask)?, dy)?;
    products_fit(products, &[operands[0].shape.0[3], operands[2].shape.0[3]], dy)?;
    if let Some(numbers) = numbers {
        let mut each = operands[0].shape.clone();
        each.0[3] = 2.into();
        same(&TensorType::f32(each), numbers)?;
    }
    Ok(operands[match of {
        AttentionOperand::Q => 0,
        AttentionOperand::K => 1,
        AttentionOperand::V => 2,
    }]
    .clone())
}

/// The numbers that gradients are rounded with, if they are, and the operands before them.
fn numbers<'a>(
    rounding: GradientRounding,
    products: DType,
    operands: Types<'a>,
) -> Result<(Option<&'a TensorType>, Types<'a>), String> {
    if rounding == GradientRounding::Nearest {
        return Ok((None, operands));
    }
    if products != DType::I8 {
        return Err(format!("products in {products} round no gradients at random"));
    }
    let (last, operands) = operands.split_last().ok_or("takes numbers for stochastic rounding")?;
    Ok((Some(last), operands))
}

/// Whether products of this type may read an attention's operands, of which these dims are summed.
fn products_fit(products: DType, summed: &[Dim], operand: &TensorType) -> Result<(), String> {
    let fits =
        |dim: &Dim| dim.as_fixed().is_some_and(|count| count <= QuantizedRange::MOST_I8_PRODUCTS);
    match (products, operand.dtype) {
        (DType::F32, _) | (DType::BF16, DType::BF16) => Ok(()),
        (DType::I8, DType::F32) => match summed.iter().find(|dim| !fits(dim)) {
            Some(dim) => Err(format!("an i32 holds no sum of {dim} products of i8")),
            None => Ok(()),
        },
        _ => Err(format!("products of {products} do not fit operands like {operand}")),
    }
}

fn operands_fit(scale: f32, operands: Types, mask: Types) -> Result<TensorType, String> {
    let [q, k, v] = exactly(operands)?;
    float(q)?;
    if q.dtype != k.dtype || q.dtype != v.dtype {
        return Err(format!("{q}, {k} and {v} are not of one element type"));
    }
    if !scale.is_finite() {
        return Err(format!("the scale {scale} is not finite"));
    }
    let (&[b, t, h, d], &[kb, s, g, kd], &[vb, vs, vg, e]) =
        (&q.shape.0[..], &k.shape.0[..], &v.shape.0[..])
    else {
        return Err(format!("{q}, {k} and {v} are not [batch, length, heads, width]"));
    };
    let (heads, groups) = (fixed(h, "the number of heads")?, fixed(g, "the number of heads")?);
    if [kb, vb] != [b, b] || vs != s || vg != g || kd != d {
        return Err(format!("{q}, {k} and {v} do not fit"));
    }
    if groups == 0 || heads % groups != 0 {
        return Err(format!("{heads} heads do not share {groups}"));
    }
    match mask {
        [] => {}
        [mask] => {
            let fits = |(&from, &to): (&Dim, &Dim)| from == to || from == Dim::ONE;
            let dims = &mask.shape.0;
            let fits = dims.len() == 4
                && dims.iter().zip(&[b, h, t]).all(fits)
                && dims[3] == s
                && mask.dtype == DType::F32;
            if !fits {
                return Err(format!("the mask {mask} does not fit {q} and {k}"));
            }
        }
        _ => return Err("takes at most one mask".to_owned()),
    }
    Ok(TensorType::new(q.dtype, Shape(vec![b, t, h, e])))
}
