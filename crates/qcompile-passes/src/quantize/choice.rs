//! How precision is chosen.

use qcompile_ir::DType;
use std::str::FromStr;

/// A precision for all layers, or a set that measured times choose from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum PrecisionChoice {
    /// What measures fastest of f32, bf16, and int8 layers within either, as far as the score allows it.
    #[default]
    Auto,
    /// The same without bf16.
    F32OrInt8,
    /// The same without int8.
    F32OrBf16,
    /// The same without f32.
    Bf16OrInt8,
    /// f32 everywhere.
    F32,
    /// bf16 in every product and between them.
    Bf16,
    /// int8 in every layer.
    Int8,
    /// int8 where the score allows it, else f32.
    Mixed,
    /// int8 where the score allows it, else bf16, also between products.
    MixedBf16,
}

impl PrecisionChoice {
    /// Every choice, the default first.
    pub const ALL: [PrecisionChoice; 9] = [
        PrecisionChoice::Auto,
        PrecisionChoice::F32OrInt8,
        PrecisionChoice::F32OrBf16,
        PrecisionChoice::Bf16OrInt8,
        PrecisionChoice::F32,
        PrecisionChoice::Bf16,
        PrecisionChoice::Int8,
        PrecisionChoice::Mixed,
        PrecisionChoice::MixedBf16,
    ];

    /// The word on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            PrecisionChoice::Auto => "auto",
            PrecisionChoice::F32OrInt8 => "f32,int8",
            PrecisionChoice::F32OrBf16 => "f32,bf16",
            PrecisionChoice::Bf16OrInt8 => "bf16,int8",
            PrecisionChoice::F32 => "f32",
            PrecisionChoice::Bf16 => "bf16",
            PrecisionChoice::Int8 => "int8",
            PrecisionChoice::Mixed => "mixed",
            PrecisionChoice::MixedBf16 => "bf16+int8",
        }
    }

    /// The choices that are compared by their measured steps; of one that is fixed, itself. The first is taken where no
    /// other is faster.
    #[must_use]
    pub const fn candidates(self) -> &'static [PrecisionChoice] {
        use PrecisionChoice::{Bf16, F32, Int8, Mixed, MixedBf16};
        match self {
            PrecisionChoice::Auto => &[F32, Bf16, Mixed, MixedBf16],
            PrecisionChoice::F32OrInt8 => &[F32, Mixed],
            PrecisionChoice::F32OrBf16 => &[F32, Bf16],
            PrecisionChoice::Bf16OrInt8 => &[Bf16, MixedBf16],
            F32 => &[F32],
            Bf16 => &[Bf16],
            Int8 => &[Int8],
            Mixed => &[Mixed],
            MixedBf16 => &[MixedBf16],
        }
    }

    /// Whether measured times have a say.
    #[must_use]
    pub const fn is_measured(self) -> bool {
        self.candidates().len() > 1
    }

    /// Whether layers may be int8.
    #[must_use]
    pub fn has_int8(self) -> bool {
        use PrecisionChoice::{Int8, Mixed, MixedBf16};
        self.candidates().iter().any(|choice| matches!(choice, Int8 | Mixed | MixedBf16))
    }

    /// The precision of what is not int8: bf16 where there is no f32 to choose, else f32.
    #[must_use]
    pub const fn base(self) -> DType {
        match self {
            PrecisionChoice::Bf16 | PrecisionChoice::MixedBf16 | PrecisionChoice::Bf16OrInt8 => {
                DType::BF16
            }
            _ => DType::F32,
        }
    }
}

impl PrecisionChoice {
    /// Other words for it: its set in another order.
    #[must_use]
    pub const fn aliases(self) -> &'static [&'static str] {
        match self {
            PrecisionChoice::Auto => &[
                "f32,bf16,int8",
                "f32,int8,bf16",
                "bf16,f32,int8",
                "bf16,int8,f32",
                "int8,f32,bf16",
                "int8,bf16,f32",
            ],
            PrecisionChoice::F32OrInt8 => &["int8,f32"],
            PrecisionChoice::F32OrBf16 => &["bf16,f32"],
            PrecisionChoice::Bf16OrInt8 => &["int8,bf16"],
            _ => &[],
        }
    }
}

impl FromStr for PrecisionChoice {
    type Err = ();
    /// A name or an alias.
    fn from_str(text: &str) -> Result<Self, ()> {
        let named =
            |choice: &PrecisionChoice| choice.name() == text || choice.aliases().contains(&text);
        PrecisionChoice::ALL.into_iter().find(named).ok_or(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_have_any_order() {
        for choice in PrecisionChoice::ALL {
            assert_eq!(choice.name().parse(), Ok(choice));
        }
        assert_eq!("int8,bf16".parse(), Ok(PrecisionChoice::Bf16OrInt8));
        assert_eq!("int8,f32,bf16".parse(), Ok(PrecisionChoice::Auto));
        for wrong in ["", "f32,f32", "auto,int8", "f32,", "int8+bf16"] {
            assert_eq!(wrong.parse::<PrecisionChoice>(), Err(()), "{wrong}");
        }
    }
}
