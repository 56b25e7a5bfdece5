//! The optimizer's state of one parameter: in f32, or as 8-bit codes with one scale for each block.
//!
//! A code is a root of the value, so that codes lie closer where values are small (nonlinear, as the dynamic map of
//! Dettmers et al. 2022, arXiv:2110.02861, but a formula instead of a table):
//!
//! * with sign (momentum, Adam's first moment): `x = amax · c·│c│ / 127²`, c from -127 to 127;
//! * without (Adam's second moment): `x = amax · (c / 255)⁴`, c from 0 to 255, and 0 for 0 only: a second moment that was
//!   rounded to 0 would divide by epsilon.
//!
//! A value between two codes takes one of both at random, so that the mean is the value: an average with a decay of
//! 0.999 moves by less than half the distance of two codes, and would stand still if it were rounded to nearest.

use super::{Step, unsupported};
use crate::PassError;
use crate::blocks;
use crate::builder::Builder;
use qcompile_ir::{BinaryOp, CompareOp, DType, NodeId, Op, Region, Shape, Tensor, UnaryOp};
use std::sync::Arc;

/// Whether values of a state have a sign.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sign {
    Signed,
    Unsigned,
}

impl Sign {
    const fn dtype(self) -> DType {
        match self {
            Sign::Signed => DType::I8,
            Sign::Unsigned => DType::U8,
        }
    }

    /// The largest code.
    const fn limit(self) -> f64 {
        match self {
            Sign::Signed => 127.0,
            Sign::Unsigned => 255.0,
        }
    }

    /// The largest code to the power that a code stands for.
    fn whole(self) -> f64 {
        match self {
            Sign::Signed => self.limit().powi(2),
            Sign::Unsigned => self.limit().powi(4),
        }
    }
}

/// Where a state is.
pub(super) enum Moment {
    F32(NodeId),
    Codes { codes: NodeId, amax: NodeId, sign: Sign },
}

impl Step {
    /// The state `name` of zeros for a parameter that is like `like`, and its value; with `blocks`, 8-bit codes, and the
    /// value of this shape.
    pub(super) fn moment(
        &self,
        b: &mut Builder<'_>,
        name: &str,
        like: NodeId,
        sign: Sign,
        blocks: Option<&Shape>,
    ) -> Result<(Moment, NodeId), PassError> {
        let sizes = blocks.unwrap_or(&b.graph.ty(like).shape).as_fixed();
        let sizes =
            sizes.ok_or_else(|| unsupported(format!("{name} depends on the batch size")))?;
        let mut state = |name: &str, dtype, sizes: &[usize]| {
            let zeros = Arc::new(Tensor::zeros(dtype, sizes));
            b.graph.add(Op::State(zeros), &[], name, Region::Forward)
        };
        let Some(shape) = blocks else {
            let state = state(name, DType::F32, &sizes)?;
            return Ok((Moment::F32(state), state));
        };
        let codes = state(name, sign.dtype(), &sizes)?;
        let amax = state(&format!("{name}.amax"), DType::F32, &[sizes[0], 1])?;
        let mut b = Builder::new(b.graph, Region::Update, name);
        let code = b.cast("code", codes, DType::F32)?;
        let power = match sign {
            Sign::Signed => {
                let magnitude = b.unary("code.abs", UnaryOp::Abs, code)?;
                b.binary("code.power", BinaryOp::Mul, code, magnitude)?
            }
            Sign::Unsigned => b.fourth_power("code", code)?,
        };
        let share = b.scaled("share", power, sign.whole().recip())?;
        let peaks = b.broadcast("peaks", amax, shape.clone())?;
        let value = b.binary("value", BinaryOp::Mul, share, peaks)?;
        Ok((Moment::Codes { codes, amax, sign }, value))
    }

    /// `next` of the state: `new`, unless the step is refused.
    pub(super) fn keep_moment(
        &self,
        b: &mut Builder<'_>,
        name: &str,
        moment: &Moment,
        new: NodeId,
    ) -> Result<(), PassError> {
        match *moment {
            Moment::F32(state) => self.keep(b, name, state, new),
            Moment::Codes { codes, amax, sign } => {
                let mut b = Builder::new(b.graph, Region::Update, name);
                let peak = b.block_amax(new)?;
                let code = b.code(new, peak, sign)?;
                self.keep(&mut b, name, codes, code)?;
                self.keep(&mut b, &format!("{name}.amax"), amax, peak)
            }
        }
    }
}

impl Builder<'_> {
    fn fourth_power(&mut self, suffix: &str, x: NodeId) -> Result<NodeId, PassError> {
        let square = self.binary(&format!("{suffix}.square"), BinaryOp::Mul, x, x)?;
        self.binary(&format!("{suffix}.power"), BinaryOp::Mul, square, square)
    }

    /// The code of `x[blocks, elements]`, whose magnitude is at most `peak[blocks, 1]`.
    fn code(&mut self, x: NodeId, peak: NodeId, sign: Sign) -> Result<NodeId, PassError> {
        let shape = self.shape(x);
        let peaks = self.broadcast("peak.spread", peak, shape.clone())?;
        let magnitude = self.unary("magnitude", UnaryOp::Abs, x)?;
        let share = self.binary("part", BinaryOp::Div, magnitude, peaks)?;
        let power = self.scaled("wanted", share, sign.whole())?;
        let mut root = self.unary("root", UnaryOp::Sqrt, power)?;
        if sign == Sign::Unsigned {
            root = self.unary("root.root", UnaryOp::Sqrt, root)?;
        }
        let low = self.unary("low", UnaryOp::Floor, root)?;
        let one = self.splat_like("one", low, 1.0)?;
        let high = self.binary("high", BinaryOp::Add, low, one)?;
        let [below, above] = [("low", low), ("high", high)].map(|(name, code)| match sign {
            Sign::Signed => self.binary(&format!("{name}.power"), BinaryOp::Mul, code, code),
            Sign::Unsigned => self.fourth_power(name, code),
        });
        let below = below?;
        let gap = self.binary("gap", BinaryOp::Sub, above?, below)?;
        let beyond = self.binary("beyond", BinaryOp::Sub, power, below)?;
        let chance = self.binary("chance", BinaryOp::Div, beyond, gap)?;
        let numbers = self.uniform("numbers", &shape)?;
        let goes = self.compare("goes", CompareOp::Less, numbers, chance)?;
        let mut code = self.select("chosen", goes, high, low)?;
        let limit = self.splat_like("limit", code, sign.limit())?;
        code = self.binary("limited", BinaryOp::Min, code, limit)?;
        code = match sign {
            Sign::Signed => {
                let sign = self.unary("sign", UnaryOp::Sign, x)?;
                self.binary("signed", BinaryOp::Mul, code, sign)?
            }
            Sign::Unsigned => {
                let above_zero = self.unary("ceiling", UnaryOp::Ceil, root)?;
                let least = self.binary("least", BinaryOp::Min, above_zero, one)?;
                self.binary("kept", BinaryOp::Max, code, least)?
            }
        };
        self.cast("new.code", code, sign.dtype())
    }
}

/// The shape of the blocks of a parameter whose state is to be 8-bit.
pub(super) fn blocks_of(b: &Builder<'_>, param: NodeId) -> Option<Shape> {
    let precision = b.graph.node(param).note.precision?;
    (precision.update == DType::I8).then(|| blocks::shape(b.graph, param)).flatten()
}
