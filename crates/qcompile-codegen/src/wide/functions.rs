//! Elementary functions, in the steps of [`math`](crate::math), and rounding.

use super::assembler as asm;
use super::straight::{Is, IsInt, Straight, Value, float};
use crate::math::coefficients;

impl Straight {
    /// `e^x`.
    pub(crate) fn exp(&mut self, x: Value) -> Value {
        let x = self.larger(x, float(-105.0));
        let x = self.smaller(x, float(90.0));
        let scaled = self.mul(x, float(std::f32::consts::LOG2_E));
        let whole = self.one(asm::ROUND, scaled, Some(8));
        let r = self.mul_add(whole, float(-0.693_359_4), x);
        let r = self.mul_add(whole, float(2.121_944_4e-4), r);
        let p = self.polynomial(r, &coefficients::EXP);
        let square = self.mul(r, r);
        let p = self.mul_add(p, square, r);
        let p = self.add(p, float(1.0));
        self.two(asm::SCALE, p, whole)
    }

    /// The natural logarithm.
    pub(crate) fn log(&mut self, x: Value) -> Value {
        let x = Value::Name(self.name(x));
        let tiny = self.compare(Is::Less, x, float(f32::MIN_POSITIVE));
        let scaled = self.mul(x, float(8_388_608.0));
        let scaled = self.choose(tiny, scaled, x);
        let root = Value::Constant(0x3f35_04f3);
        let bits = self.two(asm::SUB_INT, scaled, root);
        let exponent = self.shift(asm::SHIFT_RIGHT, bits, 23);
        let less = self.two(asm::SUB_INT, exponent, Value::Constant(23));
        let exponent = self.choose(tiny, less, exponent);
        let mantissa = self.and(bits, 0x007f_ffff);
        let m = self.two(asm::ADD_INT, mantissa, root);
        let k = self.one(asm::INT_TO_FLOAT, exponent, None);
        let f = self.sub(m, float(1.0));
        let below = self.add(f, float(2.0));
        let s = self.div(f, below);
        let z = self.mul(s, s);
        let w = self.mul(z, z);
        let t1 = self.polynomial(w, &coefficients::LOG_ODD);
        let t1 = self.mul(t1, w);
        let t2 = self.polynomial(w, &coefficients::LOG_EVEN);
        let r = self.mul_add(t2, z, t1);
        let square = self.mul(f, f);
        let half_square = self.mul(square, float(0.5));
        let sum = self.add(half_square, r);
        let product = self.mul(s, sum);
        let rest = self.mul_add(k, float(9.058_001e-6), product);
        let rest = self.sub(rest, half_square);
        let rest = self.add(rest, f);
        let result = self.mul_add(k, float(6.931_381e-1), rest);
        // 0, negative, infinite and not a number.
        let negative = self.compare(Is::Less, x, float(0.0));
        let special = self.choose(negative, float(f32::NAN), x);
        let null = self.compare(Is::Equal, x, float(0.0));
        let special = self.choose(null, float(f32::NEG_INFINITY), special);
        let positive = self.compare(Is::Greater, x, float(0.0));
        let finite = self.compare(Is::Less, x, float(f32::INFINITY));
        let ordinary = self.masks(asm::MASK_AND, Some(positive), finite);
        self.choose(ordinary, result, special)
    }

    /// `1 / (1 + e^-x)`.
    pub(crate) fn sigmoid(&mut self, x: Value) -> Value {
        let negative = self.negative(x);
        let e = self.exp(negative);
        let below = self.add(e, float(1.0));
        self.div(float(1.0), below)
    }

    /// The hyperbolic tangent.
    pub(crate) fn tanh(&mut self, x: Value) -> Value {
        let x = Value::Name(self.name(x));
        let magnitude = self.and(x, 0x7fff_ffff);
        let square = self.mul(x, x);
        let p = self.polynomial(square, &coefficients::TANH);
        let p = self.mul(p, square);
        let near = self.mul_add(p, x, x);
        let double = self.add(magnitude, magnitude);
        let e = self.exp(double);
        let below = self.add(e, float(1.0));
        let quotient = self.div(float(2.0), below);
        let far = self.sub(float(1.0), quotient);
        let far = self.copy_sign(far, x);
        let small = self.compare(Is::Less, magnitude, float(0.625));
        self.choose(small, near, far)
    }

    /// The error function.
    pub(crate) fn erf(&mut self, x: Value) -> Value {
        let x = self.larger(x, float(-4.0));
        let x = self.smaller(x, float(4.0));
        let square = self.mul(x, x);
        let p = self.polynomial(square, &coefficients::ERF_ABOVE);
        let p = self.mul(p, x);
        let q = self.polynomial(square, &coefficients::ERF_BELOW);
        self.div(p, q)
    }

    pub(crate) fn negative(&mut self, x: Value) -> Value {
        self.either(asm::XOR, x, Value::Constant(0x8000_0000))
    }

    /// The magnitude of `x` with the sign of `y`.
    pub(crate) fn copy_sign(&mut self, x: Value, y: Value) -> Value {
        let magnitude = self.and(x, 0x7fff_ffff);
        let sign = self.and(y, 0x8000_0000);
        self.either(asm::OR, magnitude, sign)
    }

    /// -1, 0 or 1. Zero keeps its sign, and what is not a number stays so.
    pub(crate) fn sign(&mut self, x: Value) -> Value {
        let x = Value::Name(self.name(x));
        let signed = self.copy_sign(float(1.0), x);
        let null = self.compare(Is::Equal, x, float(0.0));
        let strange = self.compare(Is::Unordered, x, x);
        let same = self.masks(asm::MASK_OR, Some(null), strange);
        self.choose(same, x, signed)
    }

    /// The bits of the nearest value that bf16 has (ties to even), in the upper half; the lower half is anything.
    /// The instruction for it takes what is below the normal range as 0.
    pub(crate) fn bf16_bits(&mut self, x: Value) -> Value {
        let x = Value::Name(self.name(x));
        let odd = self.shift(asm::SHIFT_RIGHT_ZERO, x, 16);
        let odd = self.and(odd, 1);
        let rounded = self.either(asm::ADD_INT, x, Value::Constant(0x7fff));
        let rounded = self.either(asm::ADD_INT, rounded, odd);
        // What is not a number gets all bits, which is none either.
        let strange = self.compare(Is::Unordered, x, x);
        self.choose(strange, Value::Constant(u32::MAX), rounded)
    }

    /// The nearest integer toward 0, within the range; 0 if it is not a number.
    pub(crate) fn truncated(&mut self, x: Value, range: Option<(f32, f32)>) -> Value {
        let x = Value::Name(self.name(x));
        let number = self.compare(Is::Ordered, x, x);
        match range {
            Some((low, high)) => {
                let x = self.larger(x, float(low));
                let x = self.smaller(x, float(high));
                let whole = self.one(asm::TRUNCATED_INT, x, None);
                self.keep(number, whole)
            }
            None => {
                let whole = self.one(asm::TRUNCATED_INT, x, None);
                let above = self.compare(Is::AtLeast, x, float(2_147_483_648.0));
                let whole = self.choose(above, Value::Constant(i32::MAX as u32), whole);
                self.keep(number, whole)
            }
        }
    }

    /// A truth value from an integer.
    pub(crate) fn truth(&mut self, x: Value) -> super::straight::Name {
        self.compare_int(IsInt::NotEqual, x, Value::Constant(0))
    }
}
