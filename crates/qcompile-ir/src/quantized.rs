//! Which numbers a quantized type holds.

use crate::DType;

/// The codes that `quantize` rounds to.
///
/// | type | without zero point | with a zero point |
/// | --- | --- | --- |
/// | `i8`, `i4` | -127 to 127, -7 to 7 | -128 to 127, -8 to 7 |
/// | `u8`, `u4` | 0 to 255, 0 to 15 | the same |
/// | `f8e4m3`, `f8e5m2` | ±448, ±57344 | has none |
/// | `i32` | ±2147483520, the largest that f32 holds | has none |
///
/// Signed codes without a zero point are symmetric, so that a product of two of them needs no correction and `-q` is
/// one; with a zero point they are those of ONNX's `QuantizeLinear`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QuantizedRange {
    /// The smallest code.
    pub low: f32,
    /// The largest code.
    pub high: f32,
    /// Half of the distance between the last two codes: what is less than this beyond the range rounds into it.
    pub half_step: f32,
}

impl QuantizedRange {
    /// The smallest scale that is computed: a tensor of zeros is divided by it, and not by zero.
    pub const SMALLEST_SCALE: f64 = 1e-30;

    /// Most products of i8 that an i32 sums, whatever they are (-128 times -128 is 2^14).
    pub const MOST_I8_PRODUCTS: usize = i32::MAX as usize >> 14;

    /// The range of a type; none if it is no quantized type, or has no zero point where one is given.
    #[must_use]
    pub fn of(dtype: DType, zero_point: bool) -> Option<QuantizedRange> {
        let (low, high, half_step) = match (dtype, zero_point) {
            (DType::I8, false) => (-127.0, 127.0, 0.5),
            (DType::I8, true) => (-128.0, 127.0, 0.5),
            (DType::U8, _) => (0.0, 255.0, 0.5),
            (DType::I4, false) => (-7.0, 7.0, 0.5),
            (DType::I4, true) => (-8.0, 7.0, 0.5),
            (DType::U4, _) => (0.0, 15.0, 0.5),
            (DType::I32, false) => (-2_147_483_520.0, 2_147_483_520.0, 0.5),
            (DType::F8E4M3, false) => (-448.0, 448.0, 16.0),
            (DType::F8E5M2, false) => (-57344.0, 57344.0, 4096.0),
            _ => return None,
        };
        Some(QuantizedRange { low, high, half_step })
    }

    /// What `low` and `high` are once a zero point is taken from them.
    #[must_use]
    pub fn less(self, zero_point: f32) -> QuantizedRange {
        QuantizedRange { low: self.low - zero_point, high: self.high - zero_point, ..self }
    }
}
