//! Floats of 8 bits as the Open Compute Project defines them (OCP 8-bit Floating Point Specification 1.0, 2023;
//! Micikevicius et al. 2022, arXiv:2209.05433), which ONNX calls FLOAT8E4M3FN and FLOAT8E5M2.

use crate::DType;

/// One of the two formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Float8 {
    /// Bits of the mantissa.
    pub mantissa: u32,
    /// What is added to an exponent.
    pub bias: i32,
    /// The code of the largest finite number.
    pub max_code: u8,
}

/// 4 bits of exponent, 3 of mantissa; no infinity.
pub const E4M3: Float8 = Float8 { mantissa: 3, bias: 7, max_code: 0x7e };
/// 5 bits of exponent, 2 of mantissa.
pub const E5M2: Float8 = Float8 { mantissa: 2, bias: 15, max_code: 0x7b };

/// The code of what is not a number.
pub const NAN: u8 = 0x7f;

impl Float8 {
    /// The format of an element type, if it is a float of 8 bits.
    #[must_use]
    pub fn of(dtype: DType) -> Option<Float8> {
        match dtype {
            DType::F8E4M3 => Some(E4M3),
            DType::F8E5M2 => Some(E5M2),
            _ => None,
        }
    }

    /// The largest finite number: 448 or 57344.
    #[must_use]
    pub fn max(self) -> f64 {
        self.decode(self.max_code)
    }

    /// The smallest number with all bits of the mantissa.
    #[must_use]
    pub fn min_normal(self) -> f64 {
        2.0_f64.powi(1 - self.bias)
    }

    /// The number of a code.
    #[must_use]
    pub fn decode(self, code: u8) -> f64 {
        let magnitude = code & 0x7f;
        let exponent = i32::from(magnitude >> self.mantissa);
        let fraction = f64::from(magnitude & ((1 << self.mantissa) - 1));
        let one = f64::from(1_u32 << self.mantissa);
        let value = match magnitude {
            _ if magnitude > self.max_code && self == E5M2 && fraction == 0.0 => f64::INFINITY,
            _ if magnitude > self.max_code => f64::NAN,
            _ if exponent == 0 => fraction / one * self.min_normal(),
            _ => (1.0 + fraction / one) * 2.0_f64.powi(exponent - self.bias),
        };
        if code & 0x80 == 0 { value } else { -value }
    }

    /// The code of the nearest number, of two equally near ones the even code; beyond the largest finite number, that.
    /// What is not a number stays so, and infinity, where the format has it.
    #[must_use]
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the quotient is a whole number below 16 and the code one below 128"
    )]
    pub fn encode(self, value: f64) -> u8 {
        if value.is_nan() {
            return NAN;
        }
        if value.is_infinite() && self == E5M2 {
            return if value > 0.0 { 0x7c } else { 0xfc };
        }
        let sign = if value.is_sign_negative() { 0x80 } else { 0 };
        let magnitude = value.abs().min(self.max());
        let mut exponent = 1;
        let mut unit = self.min_normal() / f64::from(1_u32 << self.mantissa);
        while magnitude >= 2.0 * unit * f64::from(1_u32 << self.mantissa) {
            (exponent, unit) = (exponent + 1, 2.0 * unit);
        }
        // Counted in units from the smallest number of this exponent; a carry goes into the exponent by itself.
        let units = (magnitude / unit).round_ties_even() as i32;
        (((exponent - 1) << self.mantissa) + units) as u8 | sign
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_reads_back() {
        for format in [E4M3, E5M2] {
            for code in 0..=255_u8 {
                let value = format.decode(code);
                let again = format.encode(value);
                match code & 0x7f {
                    magnitude if value.is_nan() => {
                        assert!(magnitude > format.max_code && again == NAN)
                    }
                    _ => assert_eq!(again, code, "{value}"),
                }
            }
        }
        assert_eq!([E4M3.max(), E5M2.max()], [448.0, 57344.0]);
        assert_eq!([E4M3.decode(1), E5M2.decode(1)], [2.0_f64.powi(-9), 2.0_f64.powi(-16)]);
    }

    #[test]
    fn halves_go_to_the_even_code() {
        for format in [E4M3, E5M2] {
            for code in 0..format.max_code {
                let (low, high) = (format.decode(code), format.decode(code + 1));
                let half = (low + high) / 2.0;
                let even = code + (code & 1);
                assert_eq!(format.encode(half), even, "between {low} and {high}");
                assert_eq!(format.encode(-half), even | 0x80);
                assert_eq!(format.encode(half - (high - low) / 1024.0), code);
                assert_eq!(format.encode(half + (high - low) / 1024.0), code + 1);
            }
            for large in [format.max() * 1.01, 1e30, f64::MAX] {
                assert_eq!(format.encode(large), format.max_code);
                assert_eq!(format.encode(-large), format.max_code | 0x80);
            }
        }
        assert_eq!(E4M3.encode(f64::INFINITY), E4M3.max_code);
    }
}
