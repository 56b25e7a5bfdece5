//! How the operands of quantized products are rounded, as it is asked for.

use super::decide::Operations;
use super::insert::is_quantized;
use qcompile_ir::{DType, GradientRounding, Granularity, Quantizer, Scaling};
use std::str::FromStr;

/// The codes that operands are rounded to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OperandTypes {
    /// Of weights.
    pub weight: DType,
    /// Of activations, in the forward product and in the gradient of the weight.
    pub activation: DType,
    /// Of incoming gradients, in the products of the backward pass.
    pub gradient: DType,
}

impl Default for OperandTypes {
    fn default() -> Self {
        OperandTypes { weight: DType::I8, activation: DType::I8, gradient: DType::I8 }
    }
}

impl OperandTypes {
    /// The types that products read, with their words.
    const WORDS: [(&'static str, DType); 4] = [
        ("int8", DType::I8),
        ("int4", DType::I4),
        ("f8e4m3", DType::F8E4M3),
        ("f8e5m2", DType::F8E5M2),
    ];

    /// As [`FromStr`] takes it.
    #[must_use]
    pub fn text(self) -> String {
        let word = |dtype: DType| {
            let found = OperandTypes::WORDS.iter().find(|(_, known)| *known == dtype);
            found.map_or(dtype.name(), |(word, _)| word)
        };
        let OperandTypes { weight, activation, gradient } = self;
        let [weight, activation, gradient] = [weight, activation, gradient].map(word);
        format!("weight={weight},activation={activation},gradient={gradient}")
    }
}

impl FromStr for OperandTypes {
    type Err = String;
    /// `weight=TYPE,activation=TYPE,gradient=TYPE`, any of them once; those left out are int8.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut types = OperandTypes::default();
        let mut named = Vec::new();
        for part in text.split(',') {
            let (key, word) = part.split_once('=').ok_or("OPERAND=TYPE is wanted")?;
            let place = match key {
                "weight" => &mut types.weight,
                "activation" => &mut types.activation,
                "gradient" => &mut types.gradient,
                other => {
                    return Err(format!("`{other}` is not one of weight, activation, gradient"));
                }
            };
            if named.contains(&key) {
                return Err(format!("`{key}` is named twice"));
            }
            named.push(key);
            let found = OperandTypes::WORDS.iter().find(|(known, _)| *known == word);
            *place = found
                .ok_or_else(|| format!("`{word}` is not one of int8, int4, f8e4m3, f8e5m2"))?
                .1;
        }
        Ok(types)
    }
}

/// How quantized products are rounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Numerics {
    /// The codes.
    pub types: OperandTypes,
    /// How far one scale reaches.
    pub granularity: Granularity,
    /// How gradients are rounded.
    pub rounding: GradientRounding,
    /// What scales follow.
    pub scaling: Scaling,
    /// What the gradient of the weight of a quantized layer runs in: f32 or bf16, i8 for the codes of its operands; none
    /// for what the plan has beside them.
    pub grad_weight: Option<DType>,
}

impl Numerics {
    /// What a layer notes of it.
    #[must_use]
    pub fn quantizer(&self) -> Quantizer {
        Quantizer {
            weight: self.types.weight,
            granularity: self.granularity,
            rounding: self.rounding,
            scaling: self.scaling,
        }
    }

    /// What contradicts itself, or the operations that are to be quantized.
    pub(super) fn contradiction(&self, operations: Operations) -> Option<String> {
        let OperandTypes { weight, activation, gradient } = self.types;
        let stochastic = self.rounding == GradientRounding::Stochastic;
        let other = [weight, activation, gradient].into_iter().find(|&dtype| !is_quantized(dtype));
        if let Some(other) = other {
            return Some(format!("products of {other} codes have no kernel"));
        }
        if stochastic && !operations.backward {
            return Some(
                "stochastic rounding is of gradients, and `backward` is not to be quantized"
                    .to_owned(),
            );
        }
        if stochastic && gradient.is_float() {
            return Some(format!(
                "stochastic rounding needs steps of one size, which {gradient} does not have"
            ));
        }
        let i8 = DType::I8;
        if let Some(grad_weight) = self.grad_weight.filter(|_| !operations.backward) {
            return Some(format!(
                "the gradient of the weight is asked for in {grad_weight}, and `backward` is not to be quantized"
            ));
        }
        if gradient != i8 && !operations.backward {
            return Some(format!(
                "gradients are to be {gradient}, and `backward` is not to be quantized"
            ));
        }
        if activation != i8 && !operations.forward {
            return Some(format!(
                "activations are to be {activation}, and `forward` is not to be quantized"
            ));
        }
        if self.scaling == Scaling::Delayed && self.granularity == Granularity::Row {
            return Some(
                "a delayed scale is one for the whole tensor: the rows of other steps are others"
                    .to_owned(),
            );
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operand_types_parse_once_each() {
        let types: OperandTypes = "gradient=f8e5m2,weight=int4".parse().expect("two of three");
        assert_eq!(types.activation, DType::I8);
        assert_eq!(types.text().parse(), Ok(types));
        for wrong in ["", "weight", "weight=int2", "weight=int8,weight=int8", "bias=int8"] {
            assert!(wrong.parse::<OperandTypes>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn contradictions_are_found() {
        let all = Operations::default();
        let forward = Operations { backward: false, ..all };
        let numerics = Numerics::default();
        assert_eq!(numerics.contradiction(forward), None);
        let stochastic = Numerics { rounding: GradientRounding::Stochastic, ..numerics };
        assert!(stochastic.contradiction(forward).is_some());
        assert_eq!(stochastic.contradiction(all), None);
        let types = OperandTypes { gradient: DType::F8E5M2, ..OperandTypes::default() };
        assert!(Numerics { types, ..stochastic }.contradiction(all).is_some());
        let (granularity, scaling) = (Granularity::Row, Scaling::Delayed);
        assert!(Numerics { granularity, scaling, ..numerics }.contradiction(all).is_some());
        for grad_weight in [DType::I8, DType::F32, DType::BF16].map(Some) {
            assert!(Numerics { grad_weight, ..numerics }.contradiction(forward).is_some());
        }
        let types = OperandTypes { gradient: DType::I4, ..OperandTypes::default() };
        assert!(Numerics { types, ..numerics }.contradiction(forward).is_some());
        let backward = Operations { forward: false, ..all };
        let types = OperandTypes { activation: DType::I4, ..OperandTypes::default() };
        assert!(Numerics { types, ..numerics }.contradiction(backward).is_some());
        assert_eq!(Numerics { types, ..numerics }.contradiction(all), None);
    }
}
