//! Loads and stores of every element type, and the conversions between them.
//!
//! In registers floats are f32, narrow integers are 32 bits wide, truth values are masks.

use crate::emitter::{Emitter, trusted};
use crate::lanes::float_like;
use cranelift_codegen::ir::condcodes::{FloatCC, IntCC};
use cranelift_codegen::ir::types::{F32, F32X4, I8X16, I32, I32X4, I64, I64X2};
use cranelift_codegen::ir::{InstBuilder, Value};
use qcompile_ir::DType;

impl Emitter<'_, '_> {
    /// One element.
    pub(crate) fn load(&mut self, dtype: DType, address: Value) -> Value {
        let flags = trusted();
        match dtype {
            DType::F32 => self.b.ins().load(F32, flags, address, 0),
            DType::I32 => self.b.ins().load(I32, flags, address, 0),
            DType::I64 => self.b.ins().load(I64, flags, address, 0),
            DType::I8 | DType::I4 => self.b.ins().sload8(I32, flags, address, 0),
            DType::U8 | DType::U4 => self.b.ins().uload8(I32, flags, address, 0),
            DType::Bool => {
                let byte = self.b.ins().uload8(I32, flags, address, 0);
                self.b.ins().ineg(byte)
            }
            DType::BF16 | DType::F16 => {
                let bits = self.b.ins().uload16(I32, flags, address, 0);
                self.widen_half(dtype, bits)
            }
            DType::F8E4M3 | DType::F8E5M2 => {
                let bits = self.b.ins().uload8(I32, flags, address, 0);
                self.widen_float8(dtype, bits)
            }
        }
    }

    /// Four neighbouring elements, `offset` bytes on. Not for i64.
    pub(crate) fn load4(&mut self, dtype: DType, address: Value, offset: i32) -> Value {
        let flags = trusted();
        match dtype {
            DType::F32 => self.b.ins().load(F32X4, flags, address, offset),
            DType::I32 | DType::I64 => self.b.ins().load(I32X4, flags, address, offset),
            DType::I8
            | DType::U8
            | DType::I4
            | DType::U4
            | DType::Bool
            | DType::F8E4M3
            | DType::F8E5M2 => {
                let word = self.b.ins().load(I32, flags, address, offset);
                let lanes = self.b.ins().scalar_to_vector(I32X4, word);
                let bytes = self.cast_bits(I8X16, lanes);
                if matches!(dtype, DType::I8 | DType::I4) {
                    let halves = self.b.ins().swiden_low(bytes);
                    return self.b.ins().swiden_low(halves);
                }
                let halves = self.b.ins().uwiden_low(bytes);
                let words = self.b.ins().uwiden_low(halves);
                match dtype {
                    DType::Bool => self.b.ins().ineg(words),
                    DType::F8E4M3 | DType::F8E5M2 => self.widen_float8(dtype, words),
                    _ => words,
                }
            }
            DType::BF16 | DType::F16 => {
                let bits = self.b.ins().uload16x4(flags, address, offset);
                self.widen_half(dtype, bits)
            }
        }
    }

    /// Four floats that are `stride` bytes apart, after `4 · part` others.
    pub(crate) fn pick4(&mut self, address: Value, stride: Option<Value>, part: usize) -> Value {
        let stride = stride.expect("verified: a read without stride is invariant");
        let mut vector = self.constant(DType::F32, 0.0, true);
        for lane in 0..4_u8 {
            let offset = self.times(stride, 4 * part + usize::from(lane));
            let at = self.b.ins().iadd(address, offset);
            let value = self.load(DType::F32, at);
            vector = self.b.ins().insertlane(vector, value, lane);
        }
        vector
    }

    /// Stores one element. `exact` says that bf16 holds it, so that it need not be rounded.
    pub(crate) fn store(&mut self, dtype: DType, value: Value, address: Value, exact: bool) {
        let flags = trusted();
        match dtype {
            DType::F32 | DType::I32 | DType::I64 => {
                self.b.ins().store(flags, value, address, 0);
            }
            DType::I8 | DType::U8 | DType::I4 | DType::U4 => {
                self.b.ins().istore8(flags, value, address, 0);
            }
            DType::F8E4M3 | DType::F8E5M2 => {
                let bits = self.float8_bits(dtype, value);
                self.b.ins().istore8(flags, bits, address, 0);
            }
            DType::Bool => {
                let byte = self.b.ins().ineg(value);
                self.b.ins().istore8(flags, byte, address, 0);
            }
            DType::BF16 | DType::F16 => {
                let bits = self.half_bits(dtype, value, exact);
                self.b.ins().istore16(flags, bits, address, 0);
            }
        }
    }

    /// Stores the lanes of `parts`, one after another. Not for i64. `exact` as in [`store`](Self::store).
    pub(crate) fn store4(&mut self, dtype: DType, parts: &[Value], address: Value, exact: bool) {
        let flags = trusted();
        let step = 4 * dtype.size() as i32;
        match dtype {
            DType::F32 | DType::I32 | DType::I64 => {
                for (part, &value) in parts.iter().enumerate() {
                    self.b.ins().store(flags, value, address, part as i32 * step);
                }
            }
            DType::BF16 | DType::F16 => {
                let bits: Vec<Value> =
                    parts.iter().map(|&part| self.half_bits(dtype, part, exact)).collect();
                for (pair, bits) in bits.chunks(2).enumerate() {
                    let offset = 2 * pair as i32 * step;
                    if let &[low, high] = bits {
                        let halves = self.b.ins().unarrow(low, high);
                        self.b.ins().store(flags, halves, address, offset);
                        continue;
                    }
                    let halves = self.b.ins().unarrow(bits[0], bits[0]);
                    let words = self.cast_bits(I64X2, halves);
                    let word = self.b.ins().extractlane(words, 0);
                    self.b.ins().store(flags, word, address, offset);
                }
            }
            DType::I8
            | DType::U8
            | DType::I4
            | DType::U4
            | DType::Bool
            | DType::F8E4M3
            | DType::F8E5M2 => {
                let as_integer = |&part: &Value| match dtype {
                    DType::Bool => self.b.ins().ineg(part),
                    DType::F8E4M3 | DType::F8E5M2 => self.float8_bits(dtype, part),
                    _ => part,
                };
                let parts: Vec<Value> = parts.iter().map(as_integer).collect();
                if let [a, b, c, d] = parts[..] {
                    let low = self.b.ins().snarrow(a, b);
                    let high = self.b.ins().snarrow(c, d);
                    let bytes = self.narrow_bytes(dtype, low, high);
                    self.b.ins().store(flags, bytes, address, 0);
                    return;
                }
                for (part, &value) in parts.iter().enumerate() {
                    let halves = self.b.ins().snarrow(value, value);
                    let bytes = self.narrow_bytes(dtype, halves, halves);
                    let words = self.cast_bits(I32X4, bytes);
                    let word = self.b.ins().extractlane(words, 0);
                    self.b.ins().store(flags, word, address, part as i32 * step);
                }
            }
        }
    }

    fn narrow_bytes(&mut self, dtype: DType, low: Value, high: Value) -> Value {
        if matches!(dtype, DType::I8 | DType::I4) {
            self.b.ins().snarrow(low, high)
        } else {
            self.b.ins().unarrow(low, high)
        }
    }

    /// 16 bits of bf16 or f16 as f32.
    fn widen_half(&mut self, dtype: DType, bits: Value) -> Value {
        if dtype == DType::BF16 {
            let bits = self.shift_left(bits, 16);
            return self.as_float(bits);
        }
        let magnitude = self.i(bits, 0x7fff);
        let magnitude = self.b.ins().band(bits, magnitude);
        let magnitude = self.shift_left(magnitude, 13);
        let top = self.i(bits, 0x7c00 << 13);
        let exponent = self.b.ins().band(magnitude, top);
        let rebias = self.i(bits, 112 << 23);
        let normal = self.b.ins().iadd(magnitude, rebias);
        // Infinite or not a number: to the highest exponent.
        let special = self.b.ins().iadd(normal, rebias);
        // Below the normal range: let the adder normalize it.
        let one = self.i(bits, 1 << 23);
        let raised = self.b.ins().iadd(normal, one);
        let raised = self.as_float(raised);
        let magic = self.f(bits, f32::from_bits(113 << 23));
        let small = self.sub(raised, magic);
        let small = self.as_bits(small);
        let zero = self.i(bits, 0);
        let is_special = self.compare_int(IntCC::Equal, exponent, top);
        let is_small = self.compare_int(IntCC::Equal, exponent, zero);
        let result = self.choose(is_special, special, normal);
        let result = self.choose(is_small, small, result);
        let sign = self.i(bits, 0x8000);
        let sign = self.b.ins().band(bits, sign);
        let sign = self.shift_left(sign, 16);
        let result = self.b.ins().bor(result, sign);
        self.as_float(result)
    }

    /// The 16 bits of bf16 or f16, zero-extended.
    fn half_bits(&mut self, dtype: DType, value: Value, exact: bool) -> Value {
        if dtype != DType::BF16 {
            return self.f16_bits(value);
        }
        let value = if exact { value } else { self.round_bf16(value) };
        let bits = self.as_bits(value);
        self.shift_right_zero(bits, 16)
    }

    /// The nearest value that bf16 has (ties to even), as f32.
    fn round_bf16(&mut self, value: Value) -> Value {
        let bits = self.as_bits(value);
        let one = self.i(bits, 1);
        let odd = self.shift_right_zero(bits, 16);
        let odd = self.b.ins().band(odd, one);
        let bias = self.i(bits, 0x7fff);
        let rounded = self.b.ins().iadd(bits, bias);
        let rounded = self.b.ins().iadd(rounded, odd);
        // What is not a number gets all bits, which is none either.
        let strange = self.compare(FloatCC::Unordered, value, value);
        let rounded = self.b.ins().bor(rounded, strange);
        let high = self.i(bits, 0xffff_0000);
        let rounded = self.b.ins().band(rounded, high);
        self.as_float(rounded)
    }

    /// The 16 bits of the nearest f16 (ties to even), zero-extended.
    fn f16_bits(&mut self, value: Value) -> Value {
        let bits = self.as_bits(value);
        let sign = self.i(bits, 0x8000_0000);
        let sign = self.b.ins().band(bits, sign);
        let magnitude = self.b.ins().bxor(bits, sign);
        let one = self.i(bits, 1);
        let odd = self.shift_right_zero(magnitude, 13);
        let odd = self.b.ins().band(odd, one);
        let rebias = self.i(bits, 0xc800_0fff);
        let normal = self.b.ins().iadd(magnitude, rebias);
        let normal = self.b.ins().iadd(normal, odd);
        let normal = self.shift_right_zero(normal, 13);
        // Below the normal range: let the adder round at the right place.
        let magic_bits = self.i(bits, 126 << 23);
        let magic = self.as_float(magic_bits);
        let float = self.as_float(magnitude);
        let small = self.add(float, magic);
        let small = self.as_bits(small);
        let small = self.b.ins().isub(small, magic_bits);
        let limit = self.i(bits, 113 << 23);
        let is_small = self.compare_int(IntCC::SignedLessThan, magnitude, limit);
        let result = self.choose(is_small, small, normal);
        let infinite = self.i(bits, 0x7c00);
        let nan = self.i(bits, 0x7e00);
        let number = self.compare(FloatCC::Ordered, value, value);
        let special = self.choose(number, infinite, nan);
        let top = self.i(bits, 143 << 23);
        let fits = self.compare_int(IntCC::SignedLessThan, magnitude, top);
        let result = self.choose(fits, result, special);
        let sign = self.shift_right_zero(sign, 16);
        self.b.ins().bor(result, sign)
    }

    /// A 32-bit integer brought into the range of a narrower type by wrapping.
    pub(crate) fn wrap(&mut self, dtype: DType, value: Value) -> Value {
        match dtype {
            DType::I8 | DType::I4 => {
                let by = if dtype == DType::I8 { 24 } else { 28 };
                let high = self.shift_left(value, by);
                self.shift_right(high, by)
            }
            DType::U8 | DType::U4 => {
                let low = self.i(value, if dtype == DType::U8 { 255 } else { 15 });
                self.b.ins().band(value, low)
            }
            _ => value,
        }
    }

    /// Conversion of a value in a register from one element type to another.
    pub(crate) fn convert(&mut self, from: DType, to: DType, value: Value) -> Value {
        if from == to {
            return value;
        }
        if from.is_float() {
            return self.convert_float(to, value);
        }
        if to == DType::Bool {
            return self.truth(value);
        }
        // Truth values become 0 or 1 first.
        let value = if from == DType::Bool { self.b.ins().ineg(value) } else { value };
        if to.is_float() {
            let ty = float_like(self.ty(value));
            let float = self.b.ins().fcvt_from_sint(ty, value);
            return self.convert_float(to, float);
        }
        let value = match (from, to) {
            (DType::I64, DType::I64) => value,
            (DType::I64, _) => self.b.ins().ireduce(I32, value),
            (_, DType::I64) => self.b.ins().sextend(I64, value),
            _ => value,
        };
        self.wrap(to, value)
    }

    fn convert_float(&mut self, to: DType, value: Value) -> Value {
        match to {
            DType::F32 => value,
            DType::BF16 => self.round_bf16(value),
            DType::F16 => {
                let bits = self.f16_bits(value);
                self.widen_half(to, bits)
            }
            DType::F8E4M3 | DType::F8E5M2 => {
                let bits = self.float8_bits(to, value);
                self.widen_float8(to, bits)
            }
            DType::Bool => {
                let zero = self.f(value, 0.0);
                self.compare(FloatCC::NotEqual, value, zero)
            }
            DType::I64 => self.b.ins().fcvt_to_sint_sat(I64, value),
            DType::I32 | DType::I8 | DType::U8 | DType::I4 | DType::U4 => {
                let ty = crate::lanes::int_like(self.ty(value));
                let whole = self.b.ins().fcvt_to_sint_sat(ty, value);
                let Some((low, high)) = to.integer_range().filter(|_| to != DType::I32) else {
                    return whole;
                };
                let (low, high) = (self.i(value, low as u32), self.i(value, high as u32));
                let whole = self.b.ins().smax(whole, low);
                self.b.ins().smin(whole, high)
            }
        }
    }

    fn truth(&mut self, value: Value) -> Value {
        let zero = if self.ty(value) == I64 { self.int(0) } else { self.i(value, 0) };
        self.compare_int(IntCC::NotEqual, value, zero)
    }
}
