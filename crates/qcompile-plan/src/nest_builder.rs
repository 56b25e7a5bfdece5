//! Builds one loop nest from the members of a group.

use crate::fuse::Fusion;
use crate::lower::Lowering;
use crate::plan::dense_strides;
use crate::view::{View, collapse, first_parameter};
use crate::{Access, Affine, LoopNest, Place, Scalar, Write};
use qcompile_ir::{DType, Dim, NodeId, Op};
use std::collections::BTreeMap;

/// A loop nest in the making, over the uncollapsed sizes of its group.
pub(crate) struct NestBuilder<'a> {
    lowering: &'a Lowering<'a>,
    domain: Vec<Dim>,
    nest: LoopNest,
    values: BTreeMap<NodeId, usize>,
}

impl<'a> NestBuilder<'a> {
    pub(crate) fn new(lowering: &'a Lowering<'a>, domain: Vec<Dim>) -> NestBuilder<'a> {
        let nest =
            LoopNest { dims: Vec::new(), reads: Vec::new(), body: Vec::new(), writes: Vec::new() };
        NestBuilder { lowering, domain, nest, values: BTreeMap::new() }
    }

    /// Starts an epilogue: the value of `id` is the finished tile.
    pub(crate) fn tile(&mut self, id: NodeId) {
        let value = self.push(Scalar::Tile);
        self.values.insert(id, value);
        if self.lowering.is_stored(id) {
            self.store_dense(id, value);
        }
    }

    /// Adds members in order, with the writes of those that are read from memory.
    pub(crate) fn members(&mut self, members: &[NodeId]) {
        for &id in members {
            if let Some(&of) = self.lowering.fusion.deviations.get(&id) {
                let access = self.reduced(id);
                let value = self.widened(self.values[&of], of, access.dtype);
                self.nest.writes.push(Write::Deviations { access, value });
                continue;
            }
            if let Op::Reduce { op, .. } = *self.lowering.graph.op(id) {
                let value = self.operand(self.lowering.graph.operand(id, 0));
                let access = self.reduced(id);
                self.nest.writes.push(Write::Reduce { access, op, value });
                continue;
            }
            let value = self.compute(id);
            self.values.insert(id, value);
            if self.lowering.is_stored(id) {
                self.store_dense(id, value);
            }
        }
    }

    /// Where the results of a reduction go.
    fn reduced(&self, id: NodeId) -> Access {
        let ty = self.lowering.graph.ty(id);
        Access {
            slot: self.lowering.memory.slot_of[&id],
            dtype: ty.dtype,
            offset: Affine::ZERO,
            strides: View::dense(id, &ty.shape).strides,
        }
    }

    fn store_dense(&mut self, id: NodeId, value: usize) {
        let place = Place { slot: self.lowering.memory.slot_of[&id], offset: Affine::ZERO };
        let strides = dense_strides(&self.domain);
        self.store(value, place, strides, self.lowering.graph.ty(id).dtype);
    }

    /// Stores a value at every point.
    pub(crate) fn store(&mut self, value: usize, place: Place, strides: Vec<Dim>, dtype: DType) {
        let access = Access { slot: place.slot, dtype, offset: place.offset, strides };
        self.nest.writes.push(Write::Store { access, value });
    }

    /// A constant.
    pub(crate) fn constant(&mut self, dtype: DType, value: f64) -> usize {
        self.push(Scalar::Const(dtype, value))
    }

    /// The elements of a view whose sizes are those of the domain.
    pub(crate) fn read_view(&mut self, view: &View) -> usize {
        let graph = self.lowering.graph;
        match graph.op(view.base) {
            Op::Size(dim) => return self.push(Scalar::Size(*dim)),
            Op::Training => return self.constant(DType::Bool, 1.0),
            Op::Const(tensor) if Fusion::is_immediate(graph, view.base) => {
                let value = tensor.splat().expect("an immediate has one value");
                return self.constant(tensor.dtype(), value);
            }
            _ => {}
        }
        let access = Access {
            slot: self.lowering.memory.slot_of[&view.base],
            dtype: graph.ty(view.base).dtype,
            offset: view.offset,
            strides: view.strides.clone(),
        };
        let known = self.nest.reads.iter().position(|read| *read == access);
        let read = known.unwrap_or_else(|| {
            self.nest.reads.push(access);
            self.nest.reads.len() - 1
        });
        self.push(Scalar::Read(read))
    }

    fn operand(&mut self, id: NodeId) -> usize {
        let view = &self.lowering.fusion.views[id.index()];
        let value = match self.values.get(&view.base) {
            Some(&value) => value,
            None if self.lowering.fusion.recomputed[view.base.index()] => {
                let value = self.compute(view.base);
                self.values.insert(view.base, value);
                value
            }
            None => self.read_view(view),
        };
        self.widened(value, view.base, self.lowering.graph.ty(id).dtype)
    }

    /// A value of `base` as `dtype`, which is its own or a wider one.
    pub(crate) fn widened(&mut self, value: usize, base: NodeId, dtype: DType) -> usize {
        let own = self.lowering.graph.ty(base).dtype;
        if own == dtype { value } else { self.push(Scalar::Cast(dtype, value)) }
    }

    /// Equal values are computed once.
    fn push(&mut self, scalar: Scalar) -> usize {
        let known = self.nest.body.iter().position(|value| *value == scalar);
        known.unwrap_or_else(|| {
            self.nest.body.push(scalar);
            self.nest.body.len() - 1
        })
    }

    fn compute(&mut self, id: NodeId) -> usize {
        let graph = self.lowering.graph;
        let first_parameter = first_parameter(graph.op(id));
        let mut operands = Vec::new();
        for (position, operand) in graph.operands(id).into_iter().enumerate() {
            operands.push(if position >= first_parameter {
                self.parameter(id, operand)
            } else {
                self.operand(operand)
            });
        }
        let scalar = match (graph.op(id), &operands[..]) {
            (Op::Size(dim), []) => Scalar::Size(*dim),
            (Op::Training, []) => Scalar::Const(DType::Bool, 1.0),
            (Op::Unary(op), &[x]) => Scalar::Unary(*op, x),
            (Op::Cast(dtype), &[x]) => Scalar::Cast(*dtype, x),
            (Op::Binary(op), &[a, b]) => Scalar::Binary(*op, a, b),
            (Op::Compare(op), &[a, b]) => Scalar::Compare(*op, a, b),
            (Op::Select, &[condition, a, b]) => Scalar::Select(condition, a, b),
            (Op::Quantize { dtype, .. }, &[x, scale, ref zero_point @ ..]) => {
                Scalar::Quantize(*dtype, x, scale, zero_point.first().copied())
            }
            (Op::Dequantize { .. }, &[q, scale, ref zero_point @ ..]) => {
                Scalar::Dequantize(q, scale, zero_point.first().copied())
            }
            (Op::StraightThrough { dtype, .. }, &[x, dy, scale, ref zero_point @ ..]) => {
                Scalar::StraightThrough(*dtype, x, dy, scale, zero_point.first().copied())
            }
            _ => unreachable!("verified: only elementwise nodes are members of a nest"),
        };
        self.push(scalar)
    }

    /// A scale or zero point has its own shape: it is read along its axis of the domain.
    fn parameter(&mut self, id: NodeId, parameter: NodeId) -> usize {
        let view = &self.lowering.fusion.views[parameter.index()];
        // One of the group's own is as large as the domain, so it is used at the index where it is computed.
        let value = self.values.get(&view.base).copied().unwrap_or_else(|| {
            self.read_view(&view.along_axis(self.lowering.graph.op(id), &self.domain))
        });
        self.widened(value, view.base, self.lowering.graph.ty(parameter).dtype)
    }

    /// The nest over collapsed dims.
    pub(crate) fn finish(mut self) -> LoopNest {
        self.drop_unused();
        let mut accesses: Vec<&mut Vec<Dim>> = self
            .nest
            .reads
            .iter_mut()
            .map(|read| &mut read.strides)
            .chain(self.nest.writes.iter_mut().map(|write| &mut write.access_mut().strides))
            .collect();
        self.nest.dims = collapse(&self.domain, &mut accesses);
        self.nest
    }

    /// The nest over the rows and columns of a product.
    pub(crate) fn finish_epilogue(mut self, dims: [Dim; 2]) -> LoopNest {
        self.drop_unused();
        let domain = self.domain.clone();
        let flatten = |access: &mut Access| {
            let last = domain.len() - 1;
            let merged =
                crate::view::merged(&domain[..last], &access.strides[..last]).map(|(_, row)| row);
            let row = merged.expect("fused: every operand of an epilogue is a matrix");
            access.strides = vec![row, access.strides[last]];
        };
        self.nest.reads.iter_mut().for_each(flatten);
        self.nest.writes.iter_mut().for_each(|write| flatten(write.access_mut()));
        self.nest.dims = dims.to_vec();
        self.nest
    }

    /// Members that only others in the group use, and of those only some, may leave values that no write needs.
    fn drop_unused(&mut self) {
        let body = &self.nest.body;
        let mut live = vec![false; body.len()];
        self.nest.writes.iter().for_each(|write| live[write.value()] = true);
        for at in (0..body.len()).rev() {
            if live[at] {
                body[at].operands().for_each(|operand| live[operand] = true);
            }
        }
        let used =
            |read: usize| (0..body.len()).any(|at| live[at] && body[at] == Scalar::Read(read));
        let reads: Vec<usize> = (0..self.nest.reads.len()).filter(|&read| used(read)).collect();
        let kept: Vec<usize> = (0..body.len()).filter(|&at| live[at]).collect();
        let renumbered = |old: &[usize], at: usize| {
            old.iter().position(|&kept| kept == at).expect("live values use live values")
        };
        let new_body = kept
            .iter()
            .map(|&at| {
                map(&body[at], |value| renumbered(&kept, value), |read| renumbered(&reads, read))
            })
            .collect();
        for write in &mut self.nest.writes {
            *write.value_mut() = renumbered(&kept, write.value());
        }
        self.nest.body = new_body;
        self.nest.reads = reads.iter().map(|&read| self.nest.reads[read].clone()).collect();
    }
}

/// The same value with renumbered operands and reads.
fn map(
    scalar: &Scalar,
    value: impl Fn(usize) -> usize + Copy,
    read: impl Fn(usize) -> usize,
) -> Scalar {
    match *scalar {
        Scalar::Read(at) => Scalar::Read(read(at)),
        Scalar::Tile | Scalar::Const(..) | Scalar::Size(_) => *scalar,
        Scalar::Unary(op, x) => Scalar::Unary(op, value(x)),
        Scalar::Cast(dtype, x) => Scalar::Cast(dtype, value(x)),
        Scalar::Binary(op, a, b) => Scalar::Binary(op, value(a), value(b)),
        Scalar::Compare(op, a, b) => Scalar::Compare(op, value(a), value(b)),
        Scalar::Select(c, a, b) => Scalar::Select(value(c), value(a), value(b)),
        Scalar::Quantize(dtype, x, s, z) => {
            Scalar::Quantize(dtype, value(x), value(s), z.map(value))
        }
        Scalar::Dequantize(q, s, z) => Scalar::Dequantize(value(q), value(s), z.map(value)),
        Scalar::StraightThrough(dtype, x, dy, s, z) => {
            Scalar::StraightThrough(dtype, value(x), value(dy), value(s), z.map(value))
        }
    }
}
