//! The straight-line body of a nest: one value at a time, on one element or four lanes.

use crate::emitter::Emitter;
use crate::facts::Facts;
use crate::math;
use cranelift_codegen::ir::condcodes::{FloatCC, IntCC};
use cranelift_codegen::ir::types::{F32, F32X4, I32, I32X4, I64};
use cranelift_codegen::ir::{InstBuilder, Type, Value};
use qcompile_ir::{BinaryOp, CompareOp, DType, ReduceOp, UnaryOp};
use qcompile_plan::{LoopNest, Scalar};

/// About how many instructions a value costs.
pub(crate) fn cost(scalar: Scalar) -> usize {
    match scalar {
        Scalar::Read(_) | Scalar::Tile | Scalar::Const(..) | Scalar::Size(_) => 1,
        Scalar::Unary(op, _) => match op {
            UnaryOp::Exp | UnaryOp::Erf => 20,
            UnaryOp::Sigmoid | UnaryOp::Tanh | UnaryOp::Log => 32,
            UnaryOp::Sin | UnaryOp::Cos | UnaryOp::Atan => 60,
            _ => 1,
        },
        Scalar::Binary(BinaryOp::Pow, ..) => 60,
        Scalar::Binary(..) | Scalar::Compare(..) | Scalar::Select(..) => 1,
        Scalar::Cast(dtype, _) => {
            if dtype.is_float() && dtype != DType::F32 {
                10
            } else {
                1
            }
        }
        Scalar::Quantize(dtype, ..) if dtype.is_float8() => 20,
        Scalar::Quantize(..) => 6,
        Scalar::Dequantize(..) | Scalar::StraightThrough(..) => 3,
    }
}

/// Whether a value has a form on four lanes.
pub(crate) fn has_lanes(scalar: Scalar, types: &[DType], at: usize) -> bool {
    let small = types[at] != DType::I64 && scalar.operands().all(|x| types[x] != DType::I64);
    small
        && match scalar {
            Scalar::Binary(BinaryOp::Div | BinaryOp::Pow, x, _) => types[x].is_float(),
            _ => true,
        }
}

impl Emitter<'_, '_> {
    /// A constant of an element type, on one element or four lanes.
    pub(crate) fn constant(&mut self, dtype: DType, value: f64, vector: bool) -> Value {
        let float: Type = if vector { F32X4 } else { F32 };
        let int: Type = if vector { I32X4 } else { I32 };
        match dtype {
            DType::F32 => self.float(float, value as f32),
            DType::BF16 | DType::F16 | DType::F8E4M3 | DType::F8E5M2 => {
                let exact = self.float(float, value as f32);
                self.convert(DType::F32, dtype, exact)
            }
            DType::I64 => self.b.ins().iconst(I64, value as i64),
            DType::Bool => self.bits(int, if value == 0.0 { 0 } else { u32::MAX }),
            DType::I8 | DType::I4 => self.bits(int, i32::from(value as i8) as u32),
            DType::U8 | DType::U4 => self.bits(int, u32::from(value as u8)),
            DType::I32 => self.bits(int, value as i32 as u32),
        }
    }

    /// One value of a body from its operands; reads, tiles, constants and sizes are the caller's.
    pub(crate) fn apply(
        &mut self,
        nest: &LoopNest,
        facts: &Facts,
        at: usize,
        value_of: &dyn Fn(usize) -> Value,
    ) -> Value {
        let types = &facts.types;
        match nest.body[at] {
            Scalar::Read(_) | Scalar::Tile | Scalar::Const(..) | Scalar::Size(_) => {
                unreachable!("verified: leaves are loaded by the nest")
            }
            Scalar::Unary(op, x) => self.unary(op, types[x], value_of(x)),
            Scalar::Binary(op, x, y) => {
                let constant = match nest.body[y] {
                    Scalar::Const(_, value) => Some(value),
                    _ => None,
                };
                self.binary(op, types[x], value_of(x), value_of(y), constant)
            }
            Scalar::Compare(op, x, y) => self.comparison(op, types[x], value_of(x), value_of(y)),
            Scalar::Select(mask, x, y) => self.choose(value_of(mask), value_of(x), value_of(y)),
            Scalar::Cast(DType::BF16, x) if facts.exact[x] => value_of(x),
            Scalar::Cast(to, x) => self.convert(types[x], to, value_of(x)),
            Scalar::Quantize(dtype, x, scale, zero_point) => {
                let zero_point = zero_point.map(value_of);
                self.quantize(dtype, value_of(x), value_of(scale), zero_point)
            }
            Scalar::Dequantize(q, scale, zero_point) => {
                let mut code = value_of(q);
                if let Some(zero_point) = zero_point {
                    code = self.b.ins().isub(code, value_of(zero_point));
                }
                // Less its zero point, a code may not fit its type.
                let from = if types[q].is_float() { types[q] } else { DType::I32 };
                let whole = self.convert(from, DType::F32, code);
                self.mul(whole, value_of(scale))
            }
            Scalar::StraightThrough(dtype, x, dy, scale, zero_point) => {
                let zero_point = zero_point.map(value_of);
                self.straight_through(dtype, value_of(x), value_of(dy), value_of(scale), zero_point)
            }
        }
    }

    fn unary(&mut self, op: UnaryOp, dtype: DType, x: Value) -> Value {
        if !dtype.is_float() {
            return self.unary_int(op, dtype, x);
        }
        match op {
            UnaryOp::Neg => self.b.ins().fneg(x),
            UnaryOp::Abs => self.b.ins().fabs(x),
            UnaryOp::Exp => self.exp(x),
            UnaryOp::Log => self.log(x),
            UnaryOp::Sqrt => self.b.ins().sqrt(x),
            UnaryOp::Reciprocal => {
                let one = self.f(x, 1.0);
                self.div(one, x)
            }
            UnaryOp::Erf => self.erf(x),
            UnaryOp::Relu => {
                let zero = self.f(x, 0.0);
                self.larger(x, zero)
            }
            UnaryOp::Sigmoid => self.sigmoid(x),
            UnaryOp::Tanh => self.tanh(x),
            UnaryOp::Sin => self.libm1(math::sin, x),
            UnaryOp::Cos => self.libm1(math::cos, x),
            UnaryOp::Atan => self.libm1(math::atan, x),
            UnaryOp::Floor => self.b.ins().floor(x),
            UnaryOp::Ceil => self.b.ins().ceil(x),
            UnaryOp::Round => self.b.ins().nearest(x),
            UnaryOp::Sign => {
                let zero = self.f(x, 0.0);
                let one = self.f(x, 1.0);
                let signed = self.copy_sign(one, x);
                // Zero keeps its sign, and what is not a number stays so.
                let above = self.compare(FloatCC::GreaterThan, x, zero);
                let below = self.compare(FloatCC::LessThan, x, zero);
                let ordinary = self.b.ins().bor(above, below);
                self.choose(ordinary, signed, x)
            }
            UnaryOp::Not => {
                let zero = self.f(x, 0.0);
                let null = self.compare(FloatCC::Equal, x, zero);
                let one = self.f(x, 1.0);
                self.choose(null, one, zero)
            }
            UnaryOp::StopGradient => x,
        }
    }

    fn int_constant(&mut self, like: Value, value: i32) -> Value {
        if self.ty(like) == I64 {
            self.b.ins().iconst(I64, i64::from(value))
        } else {
            self.i(like, value as u32)
        }
    }

    fn unary_int(&mut self, op: UnaryOp, dtype: DType, x: Value) -> Value {
        let zero = self.int_constant(x, 0);
        match op {
            UnaryOp::Neg => {
                let result = self.b.ins().ineg(x);
                self.wrap(dtype, result)
            }
            UnaryOp::Abs => {
                let negative = self.b.ins().ineg(x);
                let result = self.b.ins().smax(x, negative);
                self.wrap(dtype, result)
            }
            UnaryOp::Relu => self.b.ins().smax(x, zero),
            UnaryOp::Sign => {
                let (one, minus) = (self.int_constant(x, 1), self.int_constant(x, -1));
                let low = self.b.ins().smax(x, minus);
                self.b.ins().smin(low, one)
            }
            UnaryOp::Not if dtype == DType::Bool => self.b.ins().bnot(x),
            UnaryOp::Floor
            | UnaryOp::Ceil
            | UnaryOp::Round
            | UnaryOp::StopGradient
            | UnaryOp::Not => x,
            // Transcendental functions of integers: through f32, truncated.
            _ => {
                let float = self.convert(dtype, DType::F32, x);
                let result = self.unary(op, DType::F32, float);
                self.convert(DType::F32, dtype, result)
            }
        }
    }

    fn binary(
        &mut self,
        op: BinaryOp,
        dtype: DType,
        x: Value,
        y: Value,
        constant: Option<f64>,
    ) -> Value {
        if !dtype.is_float() {
            return self.binary_int(op, dtype, x, y);
        }
        match op {
            BinaryOp::Add => self.add(x, y),
            BinaryOp::Sub => self.sub(x, y),
            BinaryOp::Mul => self.mul(x, y),
            BinaryOp::Div => self.div(x, y),
            BinaryOp::Max => self.maximum(x, y),
            BinaryOp::Min => self.minimum(x, y),
            BinaryOp::Pow => self.power(x, y, constant),
            BinaryOp::And | BinaryOp::Or => {
                let x = self.convert(dtype, DType::Bool, x);
                let y = self.convert(dtype, DType::Bool, y);
                let result = self.binary_int(op, DType::Bool, x, y);
                self.convert(DType::Bool, dtype, result)
            }
        }
    }

    fn binary_int(&mut self, op: BinaryOp, dtype: DType, x: Value, y: Value) -> Value {
        let logical = dtype == DType::Bool;
        let result = match op {
            BinaryOp::Or => self.b.ins().bor(x, y),
            BinaryOp::And => self.b.ins().band(x, y),
            BinaryOp::Add | BinaryOp::Max if logical => self.b.ins().bor(x, y),
            BinaryOp::Mul | BinaryOp::Min if logical => self.b.ins().band(x, y),
            BinaryOp::Add => self.b.ins().iadd(x, y),
            BinaryOp::Sub => self.b.ins().isub(x, y),
            BinaryOp::Mul => self.b.ins().imul(x, y),
            BinaryOp::Max => self.b.ins().smax(x, y),
            BinaryOp::Min => self.b.ins().smin(x, y),
            BinaryOp::Pow => self.power_int(x, y),
            BinaryOp::Div => {
                // The instruction traps on 0 and on the smallest number by -1.
                let (zero, one) = (self.int_constant(x, 0), self.int_constant(x, 1));
                let minus = self.int_constant(x, -1);
                let null = self.b.ins().icmp(IntCC::Equal, y, zero);
                let negated = self.b.ins().icmp(IntCC::Equal, y, minus);
                let unsafe_divisor = self.b.ins().bor(null, negated);
                let divisor = self.b.ins().select(unsafe_divisor, one, y);
                let quotient = self.b.ins().sdiv(x, divisor);
                let negative = self.b.ins().ineg(x);
                let quotient = self.b.ins().select(negated, negative, quotient);
                self.b.ins().select(null, zero, quotient)
            }
        };
        self.wrap(dtype, result)
    }

    fn comparison(&mut self, op: CompareOp, dtype: DType, x: Value, y: Value) -> Value {
        if dtype.is_float() {
            let cc = match op {
                CompareOp::Equal => FloatCC::Equal,
                CompareOp::Less => FloatCC::LessThan,
                CompareOp::LessEqual => FloatCC::LessThanOrEqual,
            };
            return self.compare(cc, x, y);
        }
        // A set mask is -1, so truth values compare the other way round.
        let (x, y) = if dtype == DType::Bool { (y, x) } else { (x, y) };
        let cc = match op {
            CompareOp::Equal => IntCC::Equal,
            CompareOp::Less => IntCC::SignedLessThan,
            CompareOp::LessEqual => IntCC::SignedLessThanOrEqual,
        };
        self.compare_int(cc, x, y)
    }

    /// Two partial results of a reduction as one.
    pub(crate) fn combine(&mut self, op: ReduceOp, dtype: DType, x: Value, y: Value) -> Value {
        match (op, dtype) {
            (ReduceOp::Sum, dtype) => self.binary(BinaryOp::Add, dtype, x, y, None),
            (ReduceOp::Max, dtype) => self.binary(BinaryOp::Max, dtype, x, y, None),
        }
    }

    /// What a reduction of nothing gives.
    pub(crate) fn identity(&mut self, op: ReduceOp, dtype: DType, vector: bool) -> Value {
        let value = match (op, dtype) {
            (ReduceOp::Sum, _) | (ReduceOp::Max, DType::Bool) => 0.0,
            (ReduceOp::Max, dtype) => {
                dtype.integer_range().map_or(f64::NEG_INFINITY, |(smallest, _)| smallest as f64)
            }
        };
        self.constant(dtype, value, vector)
    }
}
