//! The same arithmetic on one element or on four lanes: types follow from the operands.
//!
//! Floats are `f32` or `f32x4`, integers below 64 bits are `i32` or `i32x4`, truth values are masks of 32 bits.

use crate::emitter::Emitter;
use cranelift_codegen::ir::condcodes::{FloatCC, IntCC};
use cranelift_codegen::ir::types::{F32, F32X4, I32, I32X4};
use cranelift_codegen::ir::{InstBuilder, Type, Value};

/// The integer type with as many lanes as this value.
pub(crate) fn int_like(ty: Type) -> Type {
    if ty.is_vector() { I32X4 } else { I32 }
}

/// The float type with as many lanes as this value.
pub(crate) fn float_like(ty: Type) -> Type {
    if ty.is_vector() { F32X4 } else { F32 }
}

impl Emitter<'_, '_> {
    pub(crate) fn ty(&self, value: Value) -> Type {
        self.b.func.dfg.value_type(value)
    }

    /// A float constant with as many lanes as `like`.
    pub(crate) fn f(&mut self, like: Value, value: f32) -> Value {
        let ty = float_like(self.ty(like));
        self.float(ty, value)
    }

    /// An integer constant with as many lanes as `like`.
    pub(crate) fn i(&mut self, like: Value, value: u32) -> Value {
        let ty = int_like(self.ty(like));
        self.bits(ty, value)
    }

    pub(crate) fn add(&mut self, x: Value, y: Value) -> Value {
        self.b.ins().fadd(x, y)
    }

    pub(crate) fn sub(&mut self, x: Value, y: Value) -> Value {
        self.b.ins().fsub(x, y)
    }

    pub(crate) fn mul(&mut self, x: Value, y: Value) -> Value {
        self.b.ins().fmul(x, y)
    }

    pub(crate) fn div(&mut self, x: Value, y: Value) -> Value {
        self.b.ins().fdiv(x, y)
    }

    /// `x · y + z`, rounded once where the target has it.
    pub(crate) fn mul_add(&mut self, x: Value, y: Value, z: Value) -> Value {
        if self.target.fused {
            self.b.ins().fma(x, y, z)
        } else {
            let product = self.mul(x, y);
            self.add(product, z)
        }
    }

    /// A polynomial in `x`, highest coefficient first.
    pub(crate) fn polynomial(&mut self, x: Value, coefficients: &[f32]) -> Value {
        let mut sum = self.f(x, coefficients[0]);
        for &coefficient in &coefficients[1..] {
            let constant = self.f(x, coefficient);
            sum = self.mul_add(sum, x, constant);
        }
        sum
    }

    /// The magnitude of `x` with the sign of `y`.
    pub(crate) fn copy_sign(&mut self, x: Value, y: Value) -> Value {
        let (x, y) = (self.as_bits(x), self.as_bits(y));
        let sign = self.i(x, 0x8000_0000);
        let result = self.b.ins().bitselect(sign, y, x);
        self.as_float(result)
    }

    /// A comparison of floats as a mask.
    pub(crate) fn compare(&mut self, cc: FloatCC, x: Value, y: Value) -> Value {
        let result = self.b.ins().fcmp(cc, x, y);
        if self.ty(x).is_vector() { result } else { self.widen_mask(result) }
    }

    /// A comparison of integers as a mask.
    pub(crate) fn compare_int(&mut self, cc: IntCC, x: Value, y: Value) -> Value {
        let result = self.b.ins().icmp(cc, x, y);
        if self.ty(x).is_vector() { result } else { self.widen_mask(result) }
    }

    /// `x` where the mask is set, else `y`.
    pub(crate) fn choose(&mut self, mask: Value, x: Value, y: Value) -> Value {
        let ty = self.ty(x);
        if !ty.is_vector() {
            return self.b.ins().select(mask, x, y);
        }
        let mask = self.cast_bits(ty, mask);
        self.b.ins().bitselect(mask, x, y)
    }

    /// `x < y ? y : x`: one instruction; the first if either is not a number.
    pub(crate) fn larger(&mut self, x: Value, y: Value) -> Value {
        let less = self.b.ins().fcmp(FloatCC::LessThan, x, y);
        if self.ty(x).is_vector() {
            self.choose(less, y, x)
        } else {
            self.b.ins().select(less, y, x)
        }
    }

    /// `y < x ? y : x`: one instruction; the first if either is not a number.
    pub(crate) fn smaller(&mut self, x: Value, y: Value) -> Value {
        let less = self.b.ins().fcmp(FloatCC::LessThan, y, x);
        if self.ty(x).is_vector() {
            self.choose(less, y, x)
        } else {
            self.b.ins().select(less, y, x)
        }
    }

    /// The maximum; not a number if either is not.
    pub(crate) fn maximum(&mut self, x: Value, y: Value) -> Value {
        let larger = self.larger(x, y);
        let strange = self.compare(FloatCC::Unordered, y, y);
        self.choose(strange, y, larger)
    }

    /// The minimum; not a number if either is not.
    pub(crate) fn minimum(&mut self, x: Value, y: Value) -> Value {
        let smaller = self.smaller(x, y);
        let strange = self.compare(FloatCC::Unordered, y, y);
        self.choose(strange, y, smaller)
    }

    /// `x` shifted left.
    pub(crate) fn shift_left(&mut self, x: Value, by: i64) -> Value {
        let by = self.b.ins().iconst(I32, by);
        self.b.ins().ishl(x, by)
    }

    /// `x` shifted right, filling with the sign.
    pub(crate) fn shift_right(&mut self, x: Value, by: i64) -> Value {
        let by = self.b.ins().iconst(I32, by);
        self.b.ins().sshr(x, by)
    }

    /// `x` shifted right, filling with zeros.
    pub(crate) fn shift_right_zero(&mut self, x: Value, by: i64) -> Value {
        let by = self.b.ins().iconst(I32, by);
        self.b.ins().ushr(x, by)
    }

    /// The bits of a float as integer.
    pub(crate) fn as_bits(&mut self, x: Value) -> Value {
        let ty = int_like(self.ty(x));
        self.cast_bits(ty, x)
    }

    /// Bits as a float.
    pub(crate) fn as_float(&mut self, x: Value) -> Value {
        let ty = float_like(self.ty(x));
        self.cast_bits(ty, x)
    }

    /// The value in all lanes.
    pub(crate) fn spread(&mut self, x: Value) -> Value {
        let ty = if self.ty(x) == F32 { F32X4 } else { I32X4 };
        self.b.ins().splat(ty, x)
    }
}
