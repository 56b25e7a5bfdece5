//! Quantization of one element or four lanes, its gradient, and floats of 8 bits.

use crate::emitter::Emitter;
use crate::lanes::int_like;
use cranelift_codegen::ir::condcodes::{FloatCC, IntCC};
use cranelift_codegen::ir::{InstBuilder, Value};
use qcompile_ir::{DType, Float8, QuantizedRange, float8};

/// The range of codes; a verified plan has no other types.
pub(crate) fn range(dtype: DType, zero_point: bool) -> QuantizedRange {
    QuantizedRange::of(dtype, zero_point).expect("verified: the type is quantized")
}

/// Codes beyond this magnitude are too large for the quick way to the nearest integer.
const QUICK: f32 = 1024.0;

impl Emitter<'_, '_> {
    /// `x / scale + zero_point` rounded and clamped, as the register form of a quantized type.
    pub(crate) fn quantize(
        &mut self,
        dtype: DType,
        x: Value,
        scale: Value,
        zero_point: Option<Value>,
    ) -> Value {
        let range = range(dtype, zero_point.is_some());
        let quotient = self.div(x, scale);
        let [low, high] = [range.low, range.high].map(|code| self.less(x, code, zero_point));
        let clamped = self.larger(quotient, low);
        let clamped = self.smaller(clamped, high);
        let zero = self.f(x, 0.0);
        let scaled = self.compare(FloatCC::NotEqual, scale, zero);
        if dtype.is_float8() {
            let rounded = self.convert(DType::F32, dtype, clamped);
            return self.choose(scaled, rounded, zero);
        }
        let whole = if range.high < QUICK {
            self.nearest_int(clamped)
        } else {
            let ty = int_like(self.ty(x));
            let nearest = self.b.ins().nearest(clamped);
            self.b.ins().fcvt_to_sint_sat(ty, nearest)
        };
        let whole = self.b.ins().band(whole, scaled);
        match zero_point {
            Some(zero_point) => self.b.ins().iadd(whole, zero_point),
            None => whole,
        }
    }

    /// `dy` where `x` rounds into the range, else 0.
    pub(crate) fn straight_through(
        &mut self,
        dtype: DType,
        x: Value,
        dy: Value,
        scale: Value,
        zero_point: Option<Value>,
    ) -> Value {
        let range = range(dtype, zero_point.is_some());
        let ends = [range.low - range.half_step, range.high + range.half_step];
        let [low, high] = ends.map(|code| {
            let code = self.less(x, code, zero_point);
            self.mul(code, scale)
        });
        let above = self.compare(FloatCC::LessThanOrEqual, low, x);
        let below = self.compare(FloatCC::LessThanOrEqual, x, high);
        let inside = self.b.ins().band(above, below);
        let zero = self.f(x, 0.0);
        self.choose(inside, dy, zero)
    }

    /// A code less a zero point, as floats.
    fn less(&mut self, like: Value, code: f32, zero_point: Option<Value>) -> Value {
        let code = self.f(like, code);
        let Some(zero_point) = zero_point else { return code };
        let zero_point = self.convert(DType::I32, DType::F32, zero_point);
        self.sub(code, zero_point)
    }

    /// The 8 bits of the nearest float of 8 bits (ties to even), zero-extended; the largest for what is
    /// beyond it, but infinity where the type has that.
    pub(crate) fn float8_bits(&mut self, dtype: DType, value: Value) -> Value {
        let Float8 { mantissa, bias, .. } = format(dtype);
        let dropped = 23 - i64::from(mantissa);
        let bits = self.as_bits(value);
        let sign = self.i(bits, 0x8000_0000);
        let sign = self.b.ins().band(bits, sign);
        let whole = self.b.ins().fabs(value);
        let max = self.f(value, format(dtype).max() as f32);
        let magnitude = self.smaller(whole, max);
        let bits = self.as_bits(magnitude);
        let one = self.i(bits, 1);
        let odd = self.shift_right_zero(bits, dropped);
        let odd = self.b.ins().band(odd, one);
        // Rounds in place, and takes the difference of the biases from the exponent.
        let rebias = (((bias - 127) << 23) as u32).wrapping_add((1 << (dropped - 1)) - 1);
        let rebias = self.i(bits, rebias);
        let normal = self.b.ins().iadd(bits, rebias);
        let normal = self.b.ins().iadd(normal, odd);
        let normal = self.shift_right_zero(normal, dropped);
        // Below the normal range: let the adder round at the right place.
        let unit = (1 - bias) - mantissa as i32;
        let magic = self.i(bits, ((127 + 23 + unit) as u32) << 23);
        let float = self.as_float(magic);
        let small = self.add(magnitude, float);
        let small = self.as_bits(small);
        let small = self.b.ins().isub(small, magic);
        let limit = self.i(bits, ((128 - bias) as u32) << 23);
        let is_small = self.compare_int(IntCC::SignedLessThan, bits, limit);
        let result = self.choose(is_small, small, normal);
        let result = if dtype == DType::F8E5M2 {
            let infinity = self.f(value, f32::INFINITY);
            let infinite = self.compare(FloatCC::Equal, whole, infinity);
            let code = self.i(bits, 0x7c);
            self.choose(infinite, code, result)
        } else {
            result
        };
        let sign = self.shift_right_zero(sign, 24);
        let result = self.b.ins().bor(result, sign);
        let nan = self.i(bits, u32::from(float8::NAN));
        let number = self.compare(FloatCC::Ordered, value, value);
        self.choose(number, result, nan)
    }

    /// 8 bits of a float of 8 bits as f32.
    pub(crate) fn widen_float8(&mut self, dtype: DType, bits: Value) -> Value {
        let Float8 { mantissa, bias, max_code } = format(dtype);
        let magnitude = self.i(bits, 0x7f);
        let magnitude = self.b.ins().band(bits, magnitude);
        let normal = self.shift_left(magnitude, 23 - i64::from(mantissa));
        let rebias = self.i(bits, ((127 - bias) as u32) << 23);
        let normal = self.b.ins().iadd(normal, rebias);
        let normal = self.as_float(normal);
        let whole = self.convert(DType::I32, DType::F32, magnitude);
        let unit = self.f(normal, 2.0_f32.powi(1 - bias - mantissa as i32));
        let small = self.mul(whole, unit);
        let limit = self.i(bits, 1 << mantissa);
        let is_small = self.compare_int(IntCC::SignedLessThan, magnitude, limit);
        let result = self.choose(is_small, small, normal);
        // Infinity, which one of the formats has, and what is not a number.
        let top = self.i(bits, u32::from(max_code) + 1);
        let infinite = self.compare_int(IntCC::Equal, magnitude, top);
        let special = self.i(bits, u32::from(max_code));
        let special = self.compare_int(IntCC::SignedGreaterThan, magnitude, special);
        let infinity = self.f(normal, f32::INFINITY);
        let nan = self.f(normal, f32::NAN);
        let beyond =
            if dtype == DType::F8E5M2 { self.choose(infinite, infinity, nan) } else { nan };
        let result = self.choose(special, beyond, result);
        let sign = self.i(bits, 0x80);
        let sign = self.b.ins().band(bits, sign);
        let sign = self.shift_left(sign, 24);
        let result = self.as_bits(result);
        let result = self.b.ins().bor(result, sign);
        self.as_float(result)
    }
}

fn format(dtype: DType) -> Float8 {
    Float8::of(dtype).expect("callers have a float of 8 bits")
}
