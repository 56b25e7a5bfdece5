//! Adds nodes of one region in few words.

use crate::PassError;
use qcompile_ir::{
    BinaryOp, CompareOp, DType, Graph, Name, NodeId, Op, ReduceOp, Region, Shape, Tensor,
    TensorType, UnaryOp,
};
use std::sync::Arc;

/// A graph, the region that new nodes belong to, and the names they get.
pub(crate) struct Builder<'g> {
    pub(crate) graph: &'g mut Graph,
    pub(crate) region: Region,
    /// What every name starts with.
    prefix: String,
}

type Built = Result<NodeId, PassError>;

impl<'g> Builder<'g> {
    /// A builder for nodes of `region` whose names start with `prefix`.
    pub(crate) fn new(graph: &'g mut Graph, region: Region, prefix: &str) -> Builder<'g> {
        Builder { graph, region, prefix: prefix.to_owned() }
    }

    /// The name of a new node: the prefix, and `suffix` after a dot if there is one.
    pub(crate) fn name(&self, suffix: &str) -> Name {
        match (self.prefix.is_empty(), suffix.is_empty()) {
            (_, true) => Name::from(&self.prefix),
            (true, false) => Name::from(suffix),
            (false, false) => Name::from(format!("{}.{suffix}", self.prefix)),
        }
    }

    /// A node named `prefix.suffix`, or `prefix` if the suffix is empty.
    pub(crate) fn add(&mut self, suffix: &str, op: Op, operands: &[NodeId]) -> Built {
        let name = self.name(suffix);
        Ok(self.graph.add(op, operands, name, self.region)?)
    }

    pub(crate) fn ty(&self, id: NodeId) -> TensorType {
        self.graph.ty(id).clone()
    }

    pub(crate) fn shape(&self, id: NodeId) -> Shape {
        self.graph.ty(id).shape.clone()
    }

    pub(crate) fn unary(&mut self, suffix: &str, op: UnaryOp, x: NodeId) -> Built {
        self.add(suffix, Op::Unary(op), &[x])
    }

    pub(crate) fn binary(&mut self, suffix: &str, op: BinaryOp, a: NodeId, b: NodeId) -> Built {
        self.add(suffix, Op::Binary(op), &[a, b])
    }

    pub(crate) fn compare(&mut self, suffix: &str, op: CompareOp, a: NodeId, b: NodeId) -> Built {
        self.add(suffix, Op::Compare(op), &[a, b])
    }

    pub(crate) fn select(&mut self, suffix: &str, c: NodeId, a: NodeId, b: NodeId) -> Built {
        self.add(suffix, Op::Select, &[c, a, b])
    }

    /// The sum over axes, which stay with size 1; `x` itself if there are none.
    pub(crate) fn sum(&mut self, suffix: &str, x: NodeId, axes: Vec<usize>) -> Built {
        if axes.is_empty() {
            return Ok(x);
        }
        self.add(suffix, Op::Reduce { op: ReduceOp::Sum, axes }, &[x])
    }

    /// The sum of all elements, a scalar.
    pub(crate) fn sum_all(&mut self, suffix: &str, x: NodeId) -> Built {
        let rank = self.shape(x).rank();
        let sum = self.sum(&format!("{suffix}.axes"), x, (0..rank).collect())?;
        self.reshape(suffix, sum, Shape::scalar())
    }

    /// The same elements under this shape; `x` itself if it has it.
    pub(crate) fn reshape(&mut self, suffix: &str, x: NodeId, shape: Shape) -> Built {
        if self.graph.ty(x).shape == shape {
            return Ok(x);
        }
        self.add(suffix, Op::Reshape(shape), &[x])
    }

    /// `x` broadcast to this shape; `x` itself if it has it.
    pub(crate) fn broadcast(&mut self, suffix: &str, x: NodeId, shape: Shape) -> Built {
        if self.graph.ty(x).shape == shape {
            return Ok(x);
        }
        self.add(suffix, Op::Broadcast(shape), &[x])
    }

    /// `x` as this element type; `x` itself if it is of it.
    pub(crate) fn cast(&mut self, suffix: &str, x: NodeId, dtype: DType) -> Built {
        if self.graph.ty(x).dtype == dtype {
            return Ok(x);
        }
        self.add(suffix, Op::Cast(dtype), &[x])
    }

    /// A scalar constant, shared by all passes under a name that says its value.
    pub(crate) fn scalar(&mut self, dtype: DType, value: f64) -> Built {
        let tensor = Tensor::scalar(dtype, value);
        let name = if dtype == DType::F32 {
            format!("const.{value}")
        } else {
            format!("const.{value}.{dtype}")
        };
        if let Some(found) = self.graph.find(&name)
            && matches!(self.graph.op(found), Op::Const(held) if **held == tensor)
        {
            return Ok(found);
        }
        // Leaves belong to the first region, so that every region may use them.
        Ok(self.graph.add(Op::Const(Arc::new(tensor)), &[], name, Region::Forward)?)
    }

    /// A constant of this type with all elements equal.
    pub(crate) fn splat(&mut self, suffix: &str, ty: &TensorType, value: f64) -> Built {
        let scalar = self.scalar(ty.dtype, value)?;
        self.broadcast(suffix, scalar, ty.shape.clone())
    }

    /// A constant of the type of `like` with all elements equal.
    pub(crate) fn splat_like(&mut self, suffix: &str, like: NodeId, value: f64) -> Built {
        let ty = self.ty(like);
        self.splat(suffix, &ty, value)
    }

    /// `x · value`, elementwise.
    pub(crate) fn scaled(&mut self, suffix: &str, x: NodeId, value: f64) -> Built {
        let factor = self.splat_like(&format!("{suffix}.factor"), x, value)?;
        self.binary(suffix, BinaryOp::Mul, x, factor)
    }

    /// `x` where the condition holds, else zeros.
    pub(crate) fn where_or_zero(&mut self, suffix: &str, c: NodeId, x: NodeId) -> Built {
        let zero = self.splat_like("zero", x, 0.0)?;
        self.select(suffix, c, x, zero)
    }
}
