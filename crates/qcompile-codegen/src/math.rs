//! Elementary functions in f32 as straight-line code, and libm's where a polynomial is not enough.
//!
//! One element and four lanes take the same steps, so results do not depend on where a value lies.

use crate::emitter::Emitter;
use cranelift_codegen::ir::condcodes::FloatCC;
use cranelift_codegen::ir::types::{F32, I32, I64};
use cranelift_codegen::ir::{InstBuilder, Value};

/// Adding it rounds to an integer (ties to even) whose value is in the low bits.
const MAGIC: f32 = 12_582_912.0;

/// Where functions of one float are computed by libm.
pub(crate) type Libm1 = extern "C" fn(f32) -> f32;
/// Where functions of two floats are computed by libm.
pub(crate) type Libm2 = extern "C" fn(f32, f32) -> f32;

pub(crate) extern "C" fn sin(x: f32) -> f32 {
    x.sin()
}

pub(crate) extern "C" fn cos(x: f32) -> f32 {
    x.cos()
}

pub(crate) extern "C" fn atan(x: f32) -> f32 {
    x.atan()
}

pub(crate) extern "C" fn pow(x: f32, y: f32) -> f32 {
    x.powf(y)
}

/// Integer power: wraps; a negative exponent gives what truncation of the real result gives.
pub(crate) extern "C" fn pow_int(x: i64, y: i64) -> i64 {
    match (u64::try_from(y), x) {
        (Ok(y), _) => {
            let (mut result, mut base, mut rest) = (1_i64, x, y);
            while rest > 0 {
                if rest & 1 == 1 {
                    result = result.wrapping_mul(base);
                }
                base = base.wrapping_mul(base);
                rest >>= 1;
            }
            result
        }
        (Err(_), 1) => 1,
        (Err(_), -1) => 1 - 2 * (y & 1),
        (Err(_), _) => 0,
    }
}

/// Coefficients of the polynomials, highest power first; the wide loops take the same.
pub(crate) mod coefficients {
    /// Of `(e^r - 1 - r) / r²` for `│r│ <= ln 2 / 2`.
    pub(crate) const EXP: [f32; 6] =
        [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    /// Of the odd powers of `(log(1 + f) - 2s) / s` in `s²`, with `s = f / (2 + f)`.
    pub(crate) const LOG_ODD: [f32; 2] = [0.242_790_79, 0.400_009_7];
    /// Of the even powers of the same.
    pub(crate) const LOG_EVEN: [f32; 2] = [0.284_987_87, 0.666_666_6];
    /// Of `(tanh x - x) / x³` in `x²` for `│x│ < 0.625`.
    pub(crate) const TANH: [f32; 5] =
        [-5.704_988_7e-3, 2.063_909e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328e-1];
    /// Of the numerator of `erf x / x` in `x²` for `│x│ <= 4`.
    pub(crate) const ERF_ABOVE: [f32; 7] = [
        -2.726_142_3e-10,
        2.770_681_4e-8,
        -2.101_024e-6,
        -5.692_506_4e-5,
        -7.349_906_3e-4,
        -2.954_6e-3,
        -1.609_603_3e-2,
    ];
    /// Of its denominator.
    pub(crate) const ERF_BELOW: [f32; 5] =
        [-1.456_607_2e-5, -2.133_740_6e-4, -1.682_827e-3, -7.373_329_2e-3, -1.426_474e-2];
}

impl Emitter<'_, '_> {
    /// A libm function, element by element.
    pub(crate) fn libm1(&mut self, function: Libm1, x: Value) -> Value {
        self.per_lane(&[x], |e, lane| e.call_address(function as usize, &[F32], F32, lane))
    }

    /// A libm function, element by element.
    pub(crate) fn libm2(&mut self, function: Libm2, x: Value, y: Value) -> Value {
        self.per_lane(&[x, y], |e, lane| e.call_address(function as usize, &[F32, F32], F32, lane))
    }

    /// An integer power, element by element.
    pub(crate) fn power_int(&mut self, x: Value, y: Value) -> Value {
        let function: extern "C" fn(i64, i64) -> i64 = pow_int;
        let narrow = self.ty(x).lane_type() != I64;
        self.per_lane(&[x, y], |e, lane| {
            let wide: Vec<Value> =
                lane.iter().map(|&v| if narrow { e.b.ins().sextend(I64, v) } else { v }).collect();
            let result = e.call_address(function as usize, &[I64, I64], I64, &wide);
            if narrow { e.b.ins().ireduce(I32, result) } else { result }
        })
    }

    fn per_lane(
        &mut self,
        args: &[Value],
        mut function: impl FnMut(&mut Self, &[Value]) -> Value,
    ) -> Value {
        if !self.ty(args[0]).is_vector() {
            return function(self, args);
        }
        let mut result = args[0];
        for lane in 0..4_u8 {
            let scalars: Vec<Value> =
                args.iter().map(|&arg| self.b.ins().extractlane(arg, lane)).collect();
            let value = function(self, &scalars);
            result = self.b.ins().insertlane(result, value, lane);
        }
        result
    }

    /// `2^n · x` for integers n in -252..=254, by two factors that are both in range.
    fn scale_by_power(&mut self, x: Value, n: Value) -> Value {
        let half = self.shift_right(n, 1);
        let rest = self.b.ins().isub(n, half);
        let bias = self.i(n, 127);
        let mut result = x;
        for exponent in [half, rest] {
            let biased = self.b.ins().iadd(exponent, bias);
            let bits = self.shift_left(biased, 23);
            let factor = self.as_float(bits);
            result = self.mul(result, factor);
        }
        result
    }

    /// `e^x`, within 2 ulp; infinite and zero where the result leaves the range.
    pub(crate) fn exp(&mut self, x: Value) -> Value {
        let (low, high) = (self.f(x, -105.0), self.f(x, 90.0));
        let x = self.larger(x, low);
        let x = self.smaller(x, high);
        let magic = self.f(x, MAGIC);
        let log2e = self.f(x, std::f32::consts::LOG2_E);
        let shifted = self.mul_add(x, log2e, magic);
        let whole = self.sub(shifted, magic);
        // ln 2 in two parts: the first has few bits, so that the product is exact.
        let (high, low) = (self.f(x, -0.693_359_4), self.f(x, 2.121_944_4e-4));
        let r = self.mul_add(whole, high, x);
        let r = self.mul_add(whole, low, r);
        let p = self.polynomial(r, &coefficients::EXP);
        let square = self.mul(r, r);
        let p = self.mul_add(p, square, r);
        let one = self.f(x, 1.0);
        let p = self.add(p, one);
        let bits = self.as_bits(shifted);
        let zero = self.i(x, MAGIC.to_bits());
        let n = self.b.ins().isub(bits, zero);
        self.scale_by_power(p, n)
    }

    /// The natural logarithm, within 2 ulp; -inf of 0, not a number below.
    pub(crate) fn log(&mut self, x: Value) -> Value {
        let zero = self.f(x, 0.0);
        let normal = self.f(x, f32::MIN_POSITIVE);
        let tiny = self.compare(FloatCC::LessThan, x, normal);
        let two23 = self.f(x, 8_388_608.0);
        let scaled = self.mul(x, two23);
        let scaled = self.choose(tiny, scaled, x);
        let bits = self.as_bits(scaled);
        let root = self.i(x, 0x3f35_04f3);
        let bits = self.b.ins().isub(bits, root);
        let exponent = self.shift_right(bits, 23);
        let correction = self.i(x, 23);
        let correction = self.b.ins().band(correction, tiny);
        let exponent = self.b.ins().isub(exponent, correction);
        let mantissa = self.i(x, 0x007f_ffff);
        let mantissa = self.b.ins().band(bits, mantissa);
        let mantissa = self.b.ins().iadd(mantissa, root);
        let m = self.as_float(mantissa);
        let ty = self.ty(x);
        let k = self.b.ins().fcvt_from_sint(ty, exponent);
        let one = self.f(x, 1.0);
        let f = self.sub(m, one);
        let two = self.f(x, 2.0);
        let below = self.add(f, two);
        let s = self.div(f, below);
        let z = self.mul(s, s);
        let w = self.mul(z, z);
        let t1 = self.polynomial(w, &coefficients::LOG_ODD);
        let t1 = self.mul(t1, w);
        let t2 = self.polynomial(w, &coefficients::LOG_EVEN);
        let r = self.mul_add(t2, z, t1);
        let half = self.f(x, 0.5);
        let square = self.mul(f, f);
        let half_square = self.mul(square, half);
        let sum = self.add(half_square, r);
        let product = self.mul(s, sum);
        let (high, low) = (self.f(x, 6.931_381e-1), self.f(x, 9.058_001e-6));
        let rest = self.mul_add(k, low, product);
        let rest = self.sub(rest, half_square);
        let rest = self.add(rest, f);
        let result = self.mul_add(k, high, rest);
        // 0, negative, infinite and not a number.
        let infinity = self.f(x, f32::INFINITY);
        let nan = self.f(x, f32::NAN);
        let lowest = self.f(x, f32::NEG_INFINITY);
        let negative = self.compare(FloatCC::LessThan, x, zero);
        let special = self.choose(negative, nan, x);
        let null = self.compare(FloatCC::Equal, x, zero);
        let special = self.choose(null, lowest, special);
        let positive = self.compare(FloatCC::GreaterThan, x, zero);
        let finite = self.compare(FloatCC::LessThan, x, infinity);
        let ordinary = self.b.ins().band(positive, finite);
        self.choose(ordinary, result, special)
    }

    /// `1 / (1 + e^-x)`.
    pub(crate) fn sigmoid(&mut self, x: Value) -> Value {
        let negative = self.b.ins().fneg(x);
        let e = self.exp(negative);
        let one = self.f(x, 1.0);
        let below = self.add(e, one);
        self.div(one, below)
    }

    /// The hyperbolic tangent.
    pub(crate) fn tanh(&mut self, x: Value) -> Value {
        let magnitude = self.b.ins().fabs(x);
        let square = self.mul(x, x);
        let p = self.polynomial(square, &coefficients::TANH);
        let p = self.mul(p, square);
        let near = self.mul_add(p, x, x);
        let double = self.add(magnitude, magnitude);
        let e = self.exp(double);
        let one = self.f(x, 1.0);
        let below = self.add(e, one);
        let two = self.f(x, 2.0);
        let quotient = self.div(two, below);
        let far = self.sub(one, quotient);
        let far = self.copy_sign(far, x);
        let limit = self.f(x, 0.625);
        let small = self.compare(FloatCC::LessThan, magnitude, limit);
        self.choose(small, near, far)
    }

    /// The error function, as a quotient of polynomials within a few ulp.
    pub(crate) fn erf(&mut self, x: Value) -> Value {
        let (low, high) = (self.f(x, -4.0), self.f(x, 4.0));
        let x = self.larger(x, low);
        let x = self.smaller(x, high);
        let square = self.mul(x, x);
        let p = self.polynomial(square, &coefficients::ERF_ABOVE);
        let p = self.mul(p, x);
        let q = self.polynomial(square, &coefficients::ERF_BELOW);
        self.div(p, q)
    }

    /// `x^y`; `constant` is y where it is known.
    pub(crate) fn power(&mut self, x: Value, y: Value, constant: Option<f64>) -> Value {
        match constant {
            Some(1.0) => x,
            Some(2.0) => self.mul(x, x),
            Some(3.0) => {
                let square = self.mul(x, x);
                self.mul(square, x)
            }
            Some(0.5) => self.b.ins().sqrt(x),
            Some(-0.5) => {
                let root = self.b.ins().sqrt(x);
                let one = self.f(x, 1.0);
                self.div(one, root)
            }
            Some(-1.0) => {
                let one = self.f(x, 1.0);
                self.div(one, x)
            }
            _ => self.libm2(pow, x, y),
        }
    }

    /// The nearest integer (ties to even) of a float within ±2^21, as integer; 0 if it is not a number.
    pub(crate) fn nearest_int(&mut self, x: Value) -> Value {
        let magic = self.f(x, MAGIC);
        let shifted = self.add(x, magic);
        let bits = self.as_bits(shifted);
        let zero = self.i(x, MAGIC.to_bits());
        let n = self.b.ins().isub(bits, zero);
        let number = self.compare(FloatCC::Ordered, x, x);
        self.b.ins().band(n, number)
    }
}
