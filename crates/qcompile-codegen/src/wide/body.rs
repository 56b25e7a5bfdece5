//! The values of a body as straight-line code, as [`body`](crate::body) has them. `None` is a value without a form.

use super::assembler::{self as asm, Opcode};
use super::straight::{Is, IsInt, Lanes, Memory, Name, Straight, Value, float};
use crate::facts::Facts;
use crate::quantized::range;
use qcompile_ir::{BinaryOp, CompareOp, DType, Tensor, UnaryOp};
use qcompile_plan::{LoopNest, Scalar};

/// A value of a body on 16 lanes: numbers, or truth values.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Lane {
    Number(Value),
    Truth(Name),
}

/// A scale that many elements are divided by, as `significand · 2^-exponent`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Divisor {
    exponent: Value,
    significand: Value,
    /// 1 over the significand, and what that is short of it.
    reciprocal: [Value; 2],
    /// The ends of the range of codes times the significand; 0 for a scale of 0.
    ends: [Value; 2],
}

impl Lane {
    fn number(self) -> Option<Value> {
        match self {
            Lane::Number(value) => Some(value),
            Lane::Truth(_) => None,
        }
    }

    fn truth(self) -> Option<Name> {
        match self {
            Lane::Number(_) => None,
            Lane::Truth(name) => Some(name),
        }
    }
}

/// Whether elements of a type have a form.
pub(crate) fn has_lanes(dtype: DType) -> bool {
    match dtype {
        DType::F32
        | DType::BF16
        | DType::I32
        | DType::I8
        | DType::U8
        | DType::I4
        | DType::U4
        | DType::Bool => true,
        DType::F16 | DType::F8E4M3 | DType::F8E5M2 | DType::I64 => false,
    }
}

fn constant(dtype: DType, value: f64) -> Option<Value> {
    Some(match dtype {
        DType::F32 => float(value as f32),
        DType::BF16 => float(Tensor::scalar(DType::BF16, value).splat()? as f32),
        DType::I32 => Value::Constant(value as i32 as u32),
        DType::I8 | DType::I4 => Value::Constant(i32::from(value as i8) as u32),
        DType::U8 | DType::U4 => Value::Constant(u32::from(value as u8)),
        DType::Bool | DType::F16 | DType::F8E4M3 | DType::F8E5M2 | DType::I64 => return None,
    })
}

impl Straight {
    /// An element in all lanes, or 16 neighbours.
    pub(crate) fn load(&mut self, dtype: DType, from: Memory) -> Option<Lane> {
        let along = matches!(from, Memory::Cursor { size, .. } if size != 0);
        let number = |opcode: Opcode, s: &mut Straight| s.read(opcode, from);
        let value = match dtype {
            DType::F32 | DType::I32 => number(if along { asm::LOAD } else { asm::BROADCAST }, self),
            DType::BF16 => {
                let bits = number(if along { asm::WIDEN_U16 } else { asm::BROADCAST_16 }, self);
                self.shift(asm::SHIFT_LEFT, bits, 16)
            }
            DType::I8 | DType::I4 if along => number(asm::WIDEN_I8, self),
            DType::U8 | DType::U4 | DType::Bool if along => number(asm::WIDEN_U8, self),
            DType::I8 | DType::U8 | DType::I4 | DType::U4 | DType::Bool => {
                let bytes = number(asm::BROADCAST_8, self);
                let high = self.shift(asm::SHIFT_LEFT, bytes, 24);
                let signed = matches!(dtype, DType::I8 | DType::I4);
                self.shift(if signed { asm::SHIFT_RIGHT } else { asm::SHIFT_RIGHT_ZERO }, high, 24)
            }
            DType::F16 | DType::F8E4M3 | DType::F8E5M2 | DType::I64 => return None,
        };
        Some(if dtype == DType::Bool {
            Lane::Truth(self.truth(value))
        } else {
            Lane::Number(value)
        })
    }

    /// Stores 16 neighbours, or at the end of a row those that there are.
    pub(crate) fn store(
        &mut self,
        dtype: DType,
        value: Lane,
        to: Memory,
        exact: bool,
        lanes: Lanes,
    ) -> Option<()> {
        let (opcode, value) = match (dtype, value) {
            (DType::F32 | DType::I32, Lane::Number(value)) => (asm::STORE, value),
            (DType::BF16, Lane::Number(value)) => {
                let bits = if exact { value } else { self.bf16_bits(value) };
                (asm::NARROW_16, self.shift(asm::SHIFT_RIGHT_ZERO, bits, 16))
            }
            (DType::I8 | DType::U8 | DType::I4 | DType::U4, Lane::Number(value)) => {
                (asm::NARROW_8, value)
            }
            (DType::Bool, Lane::Truth(mask)) => {
                (asm::NARROW_8, self.keep(mask, Value::Constant(1)))
            }
            _ => return None,
        };
        let value = self.name(value);
        self.write(opcode, value, to, lanes);
        Some(())
    }

    /// One value of a body from its operands; reads, tiles and sizes are the caller's, as is a [`divisor`](Self::divisor)
    /// for a quantization whose scale the loop does not change.
    pub(crate) fn apply(
        &mut self,
        nest: &LoopNest,
        facts: &Facts,
        at: usize,
        value_of: &dyn Fn(usize) -> Lane,
        divisor: Option<Divisor>,
    ) -> Option<Lane> {
        let types = &facts.types;
        let number = |x: usize| value_of(x).number();
        Some(match nest.body[at] {
            Scalar::Read(_) | Scalar::Tile | Scalar::Size(_) => return None,
            Scalar::Const(dtype, value) => Lane::Number(constant(dtype, value)?),
            Scalar::Unary(op, x) => self.unary(op, types[x], value_of(x))?,
            Scalar::Binary(op, x, y) => {
                let constant = match nest.body[y] {
                    Scalar::Const(_, value) => Some(value),
                    _ => None,
                };
                self.binary(op, types[x], value_of(x), value_of(y), constant)?
            }
            Scalar::Compare(op, x, y) => {
                Lane::Truth(self.comparison(op, types[x], value_of(x), value_of(y))?)
            }
            Scalar::Select(mask, x, y) => {
                let mask = value_of(mask).truth()?;
                match (value_of(x), value_of(y)) {
                    (Lane::Number(x), Lane::Number(Value::Constant(0))) => {
                        Lane::Number(self.keep(mask, x))
                    }
                    (Lane::Number(x), Lane::Number(y)) => Lane::Number(self.choose(mask, x, y)),
                    (Lane::Truth(x), Lane::Truth(y)) => {
                        let x = self.masks(asm::MASK_AND, Some(mask), x);
                        let y = self.masks(asm::MASK_AND_NOT, Some(mask), y);
                        Lane::Truth(self.masks(asm::MASK_OR, Some(x), y))
                    }
                    _ => return None,
                }
            }
            Scalar::Cast(DType::BF16, x) if facts.exact[x] => value_of(x),
            Scalar::Cast(to, x) => self.cast(types[x], to, value_of(x))?,
            Scalar::Quantize(dtype, x, scale, zero_point) => {
                let (x, scale) = (number(x)?, number(scale)?);
                let zero_point = zero_point.map(|zero_point| number(zero_point).ok_or(()));
                let zero_point = zero_point.transpose().ok()?;
                let whole = match divisor {
                    Some(divisor) => self.quotient_code(x, divisor),
                    None => self.code(dtype, x, scale, zero_point),
                };
                Lane::Number(match zero_point {
                    Some(zero_point) => self.either(asm::ADD_INT, whole, zero_point),
                    None => whole,
                })
            }
            Scalar::Dequantize(q, scale, zero_point) => {
                let mut code = number(q)?;
                if let Some(zero_point) = zero_point {
                    code = self.two(asm::SUB_INT, code, number(zero_point)?);
                }
                // Less its zero point, a code may not fit its type.
                let whole = self.cast(DType::I32, DType::F32, Lane::Number(code))?.number()?;
                Lane::Number(self.mul(whole, number(scale)?))
            }
            Scalar::StraightThrough(dtype, x, dy, scale, zero_point) => {
                let (x, dy, scale) = (number(x)?, number(dy)?, number(scale)?);
                let zero_point = zero_point.map(|zero_point| number(zero_point).ok_or(()));
                let zero_point = zero_point.transpose().ok()?;
                let range = range(dtype, zero_point.is_some());
                let ends = [range.low - range.half_step, range.high + range.half_step];
                let [low, high] = ends.map(|code| {
                    let code = self.less(code, zero_point);
                    self.mul(scale, code)
                });
                let above = self.compare(Is::AtMost, low, x);
                let below = self.compare(Is::AtMost, x, high);
                let inside = self.masks(asm::MASK_AND, Some(above), below);
                Lane::Number(self.keep(inside, dy))
            }
        })
    }

    /// `x / scale` rounded and clamped; 0 of what is no number or by a scale of 0.
    fn code(&mut self, dtype: DType, x: Value, scale: Value, zero_point: Option<Value>) -> Value {
        let range = range(dtype, zero_point.is_some());
        let quotient = self.div(x, scale);
        let scale = Value::Name(self.name(scale));
        let number = self.compare(Is::Ordered, quotient, quotient);
        let scaled = self.compare(Is::NotEqual, scale, float(0.0));
        let valid = self.masks(asm::MASK_AND, Some(number), scaled);
        let [low, high] = [range.low, range.high].map(|code| self.less(code, zero_point));
        let clamped = self.larger(quotient, low);
        let clamped = self.smaller(clamped, high);
        let whole = self.one(asm::NEAREST_INT, clamped, None);
        self.keep(valid, whole)
    }

    /// What the division by a scale needs that is the same for many elements.
    pub(crate) fn divisor(
        &mut self,
        dtype: DType,
        scale: Lane,
        zero_point: Option<Lane>,
    ) -> Option<Divisor> {
        let scale = Value::Name(self.name(scale.number()?));
        let zero_point = zero_point.map(|zero_point| zero_point.number().ok_or(()));
        let zero_point = zero_point.transpose().ok()?;
        let range = range(dtype, zero_point.is_some());
        let exponent = self.one(asm::EXPONENT, scale, None);
        let exponent = self.sub(float(0.0), exponent);
        let significand = self.one(asm::SIGNIFICAND, scale, Some(0));
        let high = self.div(float(1.0), significand);
        let rest = self.neg_mul_add(high, significand, float(1.0));
        let low = self.mul(rest, high);
        let scaled = self.compare(Is::NotEqual, scale, float(0.0));
        let ends = [range.low, range.high].map(|code| {
            let code = self.less(code, zero_point);
            self.mul(significand, code)
        });
        let ends = [self.smaller(ends[0], ends[1]), self.larger(ends[0], ends[1])];
        let ends = ends.map(|end| self.keep(scaled, end));
        Some(Divisor { exponent, significand, reciprocal: [high, low], ends })
    }

    /// What [`code`](Self::code) gives, without a division: the quotient of the significands, within one unit in the last
    /// place, and corrected once by its remainder, which makes it the quotient rounded to nearest, as the reciprocal is
    /// (Markstein 1990, "Computation of elementary functions on the IBM RISC System/6000 processor"). Where exponents leave
    /// their range, the code is 0 or at an end.
    fn quotient_code(&mut self, x: Value, divisor: Divisor) -> Value {
        let Divisor { exponent, significand, reciprocal: [high, low], ends } = divisor;
        let x = self.two(asm::SCALE, x, exponent);
        let x = self.larger(x, ends[0]);
        let x = self.smaller(x, ends[1]);
        let small = self.mul(x, low);
        let quotient = self.mul_add(x, high, small);
        let rest = self.neg_mul_add(quotient, significand, x);
        let quotient = self.mul_add(rest, high, quotient);
        let number = self.compare(Is::Ordered, quotient, quotient);
        let whole = self.one(asm::NEAREST_INT, quotient, None);
        self.keep(number, whole)
    }

    /// A code less a zero point, as a float.
    fn less(&mut self, code: f32, zero_point: Option<Value>) -> Value {
        match zero_point {
            None => float(code),
            Some(zero_point) => {
                let zero_point = self.one(asm::INT_TO_FLOAT, zero_point, None);
                self.sub(float(code), zero_point)
            }
        }
    }

    fn unary(&mut self, op: UnaryOp, dtype: DType, x: Lane) -> Option<Lane> {
        let x = match x {
            Lane::Number(x) => x,
            Lane::Truth(mask) => {
                return match op {
                    UnaryOp::Not => Some(Lane::Truth(self.masks(asm::MASK_NOT, None, mask))),
                    UnaryOp::StopGradient => Some(x),
                    _ => None,
                };
            }
        };
        if !dtype.is_float() {
            return self.unary_int(op, dtype, x).map(Lane::Number);
        }
        Some(Lane::Number(match op {
            UnaryOp::Neg => self.negative(x),
            UnaryOp::Abs => self.and(x, 0x7fff_ffff),
            UnaryOp::Exp => self.exp(x),
            UnaryOp::Log => self.log(x),
            UnaryOp::Sqrt => self.one(asm::SQRT, x, None),
            UnaryOp::Reciprocal => self.div(float(1.0), x),
            UnaryOp::Erf => self.erf(x),
            UnaryOp::Relu => self.larger(x, float(0.0)),
            UnaryOp::Sigmoid => self.sigmoid(x),
            UnaryOp::Tanh => self.tanh(x),
            UnaryOp::Sin | UnaryOp::Cos | UnaryOp::Atan => return None,
            UnaryOp::Floor => self.one(asm::ROUND, x, Some(9)),
            UnaryOp::Ceil => self.one(asm::ROUND, x, Some(10)),
            UnaryOp::Round => self.one(asm::ROUND, x, Some(8)),
            UnaryOp::Sign => self.sign(x),
            UnaryOp::Not => {
                let x = Value::Name(self.name(x));
                let null = self.compare(Is::Equal, x, float(0.0));
                self.keep(null, float(1.0))
            }
            UnaryOp::StopGradient => x,
        }))
    }

    fn unary_int(&mut self, op: UnaryOp, dtype: DType, x: Value) -> Option<Value> {
        Some(match op {
            UnaryOp::Neg => {
                let result = self.two(asm::SUB_INT, Value::Constant(0), x);
                self.wrap(dtype, result)
            }
            UnaryOp::Abs => {
                let result = self.one(asm::ABS_INT, x, None);
                self.wrap(dtype, result)
            }
            UnaryOp::Relu => self.either(asm::MAX_INT, x, Value::Constant(0)),
            UnaryOp::Sign => {
                let low = self.either(asm::MAX_INT, x, Value::Constant(u32::MAX));
                self.either(asm::MIN_INT, low, Value::Constant(1))
            }
            UnaryOp::Floor
            | UnaryOp::Ceil
            | UnaryOp::Round
            | UnaryOp::StopGradient
            | UnaryOp::Not => x,
            UnaryOp::Exp
            | UnaryOp::Log
            | UnaryOp::Sqrt
            | UnaryOp::Reciprocal
            | UnaryOp::Erf
            | UnaryOp::Sigmoid
            | UnaryOp::Tanh
            | UnaryOp::Sin
            | UnaryOp::Cos
            | UnaryOp::Atan => return None,
        })
    }

    /// A 32-bit integer brought into the range of a narrower type by wrapping.
    fn wrap(&mut self, dtype: DType, x: Value) -> Value {
        match dtype {
            DType::I8 | DType::I4 => {
                let by = if dtype == DType::I8 { 24 } else { 28 };
                let high = self.shift(asm::SHIFT_LEFT, x, by);
                self.shift(asm::SHIFT_RIGHT, high, by)
            }
            DType::U8 => self.and(x, 255),
            DType::U4 => self.and(x, 15),
            _ => x,
        }
    }

    fn binary(
        &mut self,
        op: BinaryOp,
        dtype: DType,
        x: Lane,
        y: Lane,
        constant: Option<f64>,
    ) -> Option<Lane> {
        let (x, y) = match (x, y) {
            (Lane::Number(x), Lane::Number(y)) => (x, y),
            (Lane::Truth(x), Lane::Truth(y)) => {
                let opcode = match op {
                    BinaryOp::Or | BinaryOp::Add | BinaryOp::Max => asm::MASK_OR,
                    BinaryOp::And | BinaryOp::Mul | BinaryOp::Min => asm::MASK_AND,
                    BinaryOp::Sub | BinaryOp::Div | BinaryOp::Pow => return None,
                };
                return Some(Lane::Truth(self.masks(opcode, Some(x), y)));
            }
            _ => return None,
        };
        if !dtype.is_float() {
            let result = match op {
                BinaryOp::Or => self.either(asm::OR, x, y),
                BinaryOp::And => self.either(asm::AND, x, y),
                BinaryOp::Add => self.either(asm::ADD_INT, x, y),
                BinaryOp::Sub => self.two(asm::SUB_INT, x, y),
                BinaryOp::Mul => self.either(asm::MUL_INT, x, y),
                BinaryOp::Max => self.either(asm::MAX_INT, x, y),
                BinaryOp::Min => self.either(asm::MIN_INT, x, y),
                BinaryOp::Div | BinaryOp::Pow => return None,
            };
            return Some(Lane::Number(self.wrap(dtype, result)));
        }
        Some(Lane::Number(match op {
            BinaryOp::Add => self.add(x, y),
            BinaryOp::Sub => self.sub(x, y),
            BinaryOp::Mul => self.mul(x, y),
            BinaryOp::Div => self.div(x, y),
            BinaryOp::Max => self.extreme(true, x, y),
            BinaryOp::Min => self.extreme(false, x, y),
            BinaryOp::Pow => self.power(x, constant?)?,
            BinaryOp::And | BinaryOp::Or => return None,
        }))
    }

    /// `x^y` for those y that need no logarithm.
    fn power(&mut self, x: Value, y: f64) -> Option<Value> {
        Some(if y == 1.0 {
            x
        } else if y == 2.0 {
            self.mul(x, x)
        } else if y == 3.0 {
            let square = self.mul(x, x);
            self.mul(square, x)
        } else if y == 0.5 {
            self.one(asm::SQRT, x, None)
        } else if y == -0.5 {
            let root = self.one(asm::SQRT, x, None);
            self.div(float(1.0), root)
        } else if y == -1.0 {
            self.div(float(1.0), x)
        } else {
            return None;
        })
    }

    fn comparison(&mut self, op: CompareOp, dtype: DType, x: Lane, y: Lane) -> Option<Name> {
        Some(match (x, y) {
            (Lane::Number(x), Lane::Number(y)) if dtype.is_float() => {
                let is = match op {
                    CompareOp::Equal => Is::Equal,
                    CompareOp::Less => Is::Less,
                    CompareOp::LessEqual => Is::AtMost,
                };
                self.compare(is, x, y)
            }
            (Lane::Number(x), Lane::Number(y)) => {
                let is = match op {
                    CompareOp::Equal => IsInt::Equal,
                    CompareOp::Less => IsInt::Less,
                    CompareOp::LessEqual => IsInt::AtMost,
                };
                self.compare_int(is, x, y)
            }
            (Lane::Truth(x), Lane::Truth(y)) => match op {
                CompareOp::Equal => self.masks(asm::MASK_EQUAL, Some(x), y),
                CompareOp::Less => self.masks(asm::MASK_AND_NOT, Some(x), y),
                CompareOp::LessEqual => {
                    let not = self.masks(asm::MASK_NOT, None, x);
                    self.masks(asm::MASK_OR, Some(not), y)
                }
            },
            _ => return None,
        })
    }

    fn cast(&mut self, from: DType, to: DType, x: Lane) -> Option<Lane> {
        if from == to {
            return Some(x);
        }
        let number = match x {
            Lane::Truth(mask) => {
                let one = if to.is_float() { float(1.0) } else { Value::Constant(1) };
                return has_lanes(to).then(|| Lane::Number(self.keep(mask, one)));
            }
            Lane::Number(value) => value,
        };
        if to == DType::Bool {
            return Some(Lane::Truth(if from.is_float() {
                self.compare(Is::NotEqual, number, float(0.0))
            } else {
                self.truth(number)
            }));
        }
        Some(Lane::Number(match (from.is_float(), to) {
            (true, DType::F32) => number,
            (true, DType::BF16) => {
                let bits = self.bf16_bits(number);
                self.and(bits, 0xffff_0000)
            }
            (true, DType::I32) => self.truncated(number, None),
            (true, DType::I8) => self.truncated(number, Some((-128.0, 127.0))),
            (true, DType::U8) => self.truncated(number, Some((0.0, 255.0))),
            (true, DType::I4) => self.truncated(number, Some((-8.0, 7.0))),
            (true, DType::U4) => self.truncated(number, Some((0.0, 15.0))),
            (false, DType::F32) => self.one(asm::INT_TO_FLOAT, number, None),
            (false, DType::BF16) => {
                let float = self.one(asm::INT_TO_FLOAT, number, None);
                return self.cast(DType::F32, DType::BF16, Lane::Number(float));
            }
            (false, DType::I32 | DType::I8 | DType::U8 | DType::I4 | DType::U4) => {
                self.wrap(to, number)
            }
            (_, DType::Bool | DType::F16 | DType::F8E4M3 | DType::F8E5M2 | DType::I64) => {
                return None;
            }
        }))
    }
}
