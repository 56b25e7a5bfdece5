//! The stored copy of a value, and the value that is restored from it.

use super::Format;
use crate::PassError;
use crate::blocks;
use crate::builder::Builder;
use qcompile_ir::{
    BinaryOp, CompareOp, DType, Dim, NodeId, Op, ReduceOp, Region, Shape, Tensor, TensorType,
    UnaryOp,
};
use std::sync::Arc;

/// The smallest range of a block.
const TINY: f64 = 1e-30;
/// The largest number of f16.
const LARGEST_F16: f64 = 65504.0;

/// A stored copy.
#[derive(Clone, Copy, Debug)]
pub(super) enum Copy {
    /// In bf16 or f16.
    Rounded(NodeId, Format),
    /// Codes of blocks, as `Digits` says.
    Codes { codes: NodeId, digits: Digits, low: NodeId, step: NodeId },
    /// Truth values.
    Bits { codes: NodeId, digits: Digits },
}

impl Copy {
    /// What it is in: 8 bits may stand for 4.
    pub(super) fn format(&self) -> Format {
        match self {
            Copy::Rounded(_, format) => *format,
            Copy::Codes { digits, .. } if *digits == NIBBLES => Format::Int4,
            Copy::Codes { .. } | Copy::Bits { .. } => Format::Int8,
        }
    }
}

/// How many codes share a byte, and how many values each has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Digits {
    count: usize,
    base: u16,
}

const BYTE: Digits = Digits { count: 1, base: 256 };
const NIBBLES: Digits = Digits { count: 2, base: 16 };
const BITS: Digits = Digits { count: 8, base: 2 };

type Built = Result<NodeId, PassError>;

impl Builder<'_> {
    /// Elements of a value for each sample.
    fn per_sample(&self, x: NodeId) -> Result<usize, PassError> {
        let elements = self.graph.ty(x).shape.elements().filter(|elements| elements.batch);
        elements.map(|elements| elements.scale).ok_or_else(|| self.refused(x, "no batch axis"))
    }

    fn refused(&self, x: NodeId, lack: &str) -> PassError {
        let reason = format!("{} has {lack}", self.graph.node(x).name);
        PassError::Unsupported { pass: super::find::PASS, reason }
    }

    /// A copy of `x` in this format. Where the elements of a sample cannot be taken in pairs, 8 bits stand for 4.
    pub(super) fn stored(&mut self, x: NodeId, format: Format) -> Result<Copy, PassError> {
        if let Some(dtype) = format.float() {
            let held = if dtype == DType::F16 { self.within_f16(x)? } else { x };
            return Ok(Copy::Rounded(self.cast("saved", held, dtype)?, format));
        }
        let per_sample = self.per_sample(x)?;
        let pairs = blocks::of_samples(per_sample, 2).filter(|_| format == Format::Int4);
        let (digits, shape) = match pairs {
            Some(shape) => (NIBBLES, shape),
            None => {
                let shape = blocks::of_samples(per_sample, 1);
                (BYTE, shape.ok_or_else(|| self.refused(x, "no elements"))?)
            }
        };
        let wide = self.cast("saved.f32", x, DType::F32)?;
        let x = self.reshape("saved.blocks", wide, shape.clone())?;
        let largest = |b: &mut Self, suffix: &str, x| {
            b.add(suffix, Op::Reduce { op: ReduceOp::Max, axes: vec![1] }, &[x])
        };
        let high = largest(self, "saved.high", x)?;
        let minus = self.unary("saved.minus", UnaryOp::Neg, x)?;
        let low = largest(self, "saved.minus.high", minus)?;
        let low = self.unary("saved.low", UnaryOp::Neg, low)?;
        let range = self.binary("saved.range", BinaryOp::Sub, high, low)?;
        let tiny = self.splat_like("saved.smallest", range, TINY)?;
        let range = self.binary("saved.width", BinaryOp::Max, range, tiny)?;
        let levels = f64::from(digits.base - 1);
        let limit = self.splat_like("saved.levels", range, levels)?;
        let step = self.binary("saved.step", BinaryOp::Div, range, limit)?;
        let [lows, steps] = [("saved.lows", low), ("saved.steps", step)]
            .map(|(suffix, value)| self.broadcast(suffix, value, shape.clone()));
        let above = self.binary("saved.above", BinaryOp::Sub, x, lows?)?;
        let place = self.binary("saved.place", BinaryOp::Div, above, steps?)?;
        let numbers = self.uniform("saved.numbers", &shape)?;
        let noisy = self.binary("saved.noisy", BinaryOp::Add, place, numbers)?;
        let whole = self.unary("saved.whole", UnaryOp::Floor, noisy)?;
        let limit = self.splat_like("saved.limit", whole, levels)?;
        let code = self.binary("saved.limited", BinaryOp::Min, whole, limit)?;
        // What is packed is read at several places: as bytes.
        let code = self.cast("saved.code", code, DType::U8)?;
        Ok(Copy::Codes { codes: self.packed(code, digits)?, digits, low, step })
    }

    /// `x` without what f16 would make infinite.
    fn within_f16(&mut self, x: NodeId) -> Built {
        let most = self.splat_like("saved.most", x, LARGEST_F16)?;
        let low = self.binary("saved.below", BinaryOp::Min, x, most)?;
        let least = self.splat_like("saved.least", x, -LARGEST_F16)?;
        self.binary("saved.within", BinaryOp::Max, low, least)
    }

    /// Truth values as bits; as bytes where the elements of a sample are no multiple of 8.
    pub(super) fn bits(&mut self, mask: NodeId) -> Result<Copy, PassError> {
        let per_sample = self.per_sample(mask)?;
        let (digits, shape) = match blocks::of_samples(per_sample, BITS.count) {
            Some(shape) => (BITS, shape),
            None => {
                let shape = Shape(vec![Dim { scale: per_sample, batch: true }, Dim::ONE]);
                (BYTE, shape)
            }
        };
        let flags = self.reshape("saved.blocks", mask, shape)?;
        Ok(Copy::Bits { codes: self.packed(flags, digits)?, digits })
    }

    /// What a copy stands for, of the type of the value that it is of.
    pub(super) fn restored(&mut self, copy: &Copy, like: &TensorType) -> Built {
        let value = match *copy {
            Copy::Rounded(value, _) => value,
            Copy::Codes { codes, digits, low, step } => {
                let code = self.unpacked(codes, digits)?;
                let shape = self.shape(code);
                let rows = Shape(vec![shape.0[0], Dim::ONE, Dim::ONE]);
                let [steps, lows] = [("steps", step), ("lows", low)].map(|(name, value)| {
                    let value = self.reshape(&format!("restored.{name}.rows"), value, rows.clone());
                    self.broadcast(&format!("restored.{name}"), value?, shape.clone())
                });
                let above = self.binary("restored.above", BinaryOp::Mul, code, steps?)?;
                self.binary("restored.blocks", BinaryOp::Add, above, lows?)?
            }
            Copy::Bits { codes, digits } => {
                let flags = self.unpacked(codes, digits)?;
                let half = self.splat_like("restored.half", flags, 0.5)?;
                self.compare("restored.blocks", CompareOp::Less, half, flags)?
            }
        };
        let value = self.reshape("restored.whole", value, like.shape.clone())?;
        self.cast("restored", value, like.dtype)
    }

    /// `x[rows, columns]`, whole numbers below the base, as u8 `[rows, 1, columns of a part]`: the parts of a row share
    /// bytes, the first in the lowest digits.
    fn packed(&mut self, x: NodeId, digits: Digits) -> Built {
        let shape = self.shape(x);
        let columns = shape.0[1].scale / digits.count;
        let part = Shape(vec![shape.0[0], Dim::ONE, Dim::fixed(columns)]);
        let mut sum: Option<NodeId> = None;
        let mut weight = 1.0;
        for at in 0..digits.count {
            let (start, end) = (at * columns, (at + 1) * columns);
            let name = |word: &str| format!("saved.part{at}.{word}");
            let digit = match digits.count {
                1 => x,
                _ => self.add(&name("code"), Op::Slice { axis: 1, start, end, step: 1 }, &[x])?,
            };
            let wide = self.cast(&name("f32"), digit, DType::F32)?;
            let weighed = if at == 0 { wide } else { self.scaled(&name("weighed"), wide, weight)? };
            sum = Some(match sum {
                Some(sum) => self.binary(&name("sum"), BinaryOp::Add, sum, weighed)?,
                None => weighed,
            });
            weight *= f64::from(digits.base);
        }
        let sum = sum.unwrap_or(x);
        let bytes = self.cast("saved.bytes", sum, DType::U8)?;
        self.reshape("saved", bytes, part)
    }

    /// The numbers of [`packed`](Self::packed) in f32, `[rows, parts, columns of a part]`.
    fn unpacked(&mut self, codes: NodeId, digits: Digits) -> Built {
        let mut shape = self.shape(codes);
        shape.0[1] = Dim::fixed(digits.count);
        let bytes = self.broadcast("restored.bytes", codes, shape.clone())?;
        let bytes = self.cast("restored.f32", bytes, DType::F32)?;
        if digits.count == 1 {
            return Ok(bytes);
        }
        let weights = self.shares(digits)?;
        let weights = self.broadcast("restored.weights", weights, shape)?;
        let shifted = self.binary("restored.shifted", BinaryOp::Mul, bytes, weights)?;
        let base = f64::from(digits.base);
        let upper = self.scaled("restored.upper", shifted, base.recip())?;
        let upper = self.unary("restored.upper.whole", UnaryOp::Floor, upper)?;
        let upper = self.scaled("restored.upper.shifted", upper, base)?;
        let whole = self.unary("restored.lower", UnaryOp::Floor, shifted)?;
        self.binary("restored.digit", BinaryOp::Sub, whole, upper)
    }

    /// What a byte is multiplied with to have the digits of each part before the point, `f32[count, 1]`.
    fn shares(&mut self, digits: Digits) -> Built {
        let share = f64::from(digits.base).recip();
        let shares = std::iter::successors(Some(1.0), |power| Some(power * share));
        let values: Vec<f64> = shares.take(digits.count).collect();
        let name = format!("saved.shares.{}", digits.base);
        let tensor = Tensor::from_f64(DType::F32, &[digits.count, 1], &values).map(Arc::new);
        let tensor = tensor.ok_or_else(|| PassError::Unsupported {
            pass: super::find::PASS,
            reason: "a byte has no such digits".to_owned(),
        })?;
        let known =
            self.graph.find(&name).filter(|id| *self.graph.op(*id) == Op::Const(tensor.clone()));
        match known {
            Some(known) => Ok(known),
            None => Ok(self.graph.add(Op::Const(tensor), &[], name, Region::Forward)?),
        }
    }
}
