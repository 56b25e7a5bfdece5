//! Groups to steps: loop nests and primitives over slots.

use crate::attention::attention;
use crate::build::PlanError;
use crate::fuse::{Fusion, Group, Kind};
use crate::low::exchanged_codes;
use crate::memory::{Item, Memory, Placement, stored};
use crate::nest_builder::NestBuilder;
use crate::plan::dense_strides;
use crate::primitives::primitive;
use crate::rows::join_rows;
use crate::view::View;
use crate::{Affine, Codes, Exchanged, Kernel, LoopNest, Place, Primitive, Step};
use qcompile_ir::{DType, Dim, Graph, NodeId, Op, Region};
use std::collections::BTreeSet;

/// What lowering reads.
pub(crate) struct Lowering<'a> {
    pub(crate) graph: &'a Graph,
    pub(crate) fusion: &'a Fusion,
    pub(crate) memory: &'a Memory,
    placement: &'a Placement,
    /// Values that someone reads from memory.
    stored: BTreeSet<NodeId>,
}

/// A nest with at most this many points is not worth a second thread.
const SERIAL_POINTS: usize = 4096;

/// The steps of a schedule.
pub(crate) fn lower(
    graph: &Graph,
    fusion: &Fusion,
    memory: &Memory,
    placement: &Placement,
    schedule: &[Item],
) -> Result<Vec<Step>, PlanError> {
    let stored = stored(graph, fusion);
    let lowering = Lowering { graph, fusion, memory, placement, stored };
    let mut steps = Vec::new();
    for item in schedule {
        match *item {
            Item::Group(group) => lowering.group(&fusion.groups[group], &mut steps)?,
            Item::Output(position) => {
                let (name, id) = &graph.outputs()[position];
                let place = Place { slot: memory.outputs[position], offset: Affine::ZERO };
                let nest = lowering.copy(&fusion.views[id.index()], place, graph.ty(*id).dtype);
                steps.push(loops(name, graph.node(*id).region, nest));
            }
            Item::Next(leaf, value) => {
                let place = Place { slot: memory.slot_of[&leaf], offset: Affine::ZERO };
                let view = &fusion.views[value.index()];
                let nest = lowering.copy(view, place, graph.ty(value).dtype);
                steps.push(loops(graph.node(value).name.as_str(), Region::Update, nest));
            }
        }
    }
    Ok(join_rows(steps))
}

fn loops(name: &str, region: Region, nest: LoopNest) -> Step {
    let points = nest.dims.iter().try_fold(Dim::ONE, |product, &dim| product.times(dim));
    let serial = points.is_some_and(|points| !points.batch && points.scale <= SERIAL_POINTS);
    Step {
        name: name.to_owned(),
        region,
        kernel: Kernel::Loops(vec![nest]),
        serial,
        lasting: false,
    }
}

impl Lowering<'_> {
    pub(crate) fn is_stored(&self, id: NodeId) -> bool {
        self.stored.contains(&id)
    }

    fn group(&self, group: &Group, steps: &mut Vec<Step>) -> Result<(), PlanError> {
        let graph = self.graph;
        let last = *group.members.last().expect("a group has members");
        let name = graph.node(last).name.as_str();
        match group.kind {
            Kind::Loop => {
                let mut builder = NestBuilder::new(self, group.domain.clone());
                builder.members(&group.members);
                let lasts = |id| self.placement.lasting.contains_key(id);
                let lasting = group.members.iter().all(lasts);
                steps.push(Step { lasting, ..loops(name, group.region, builder.finish()) });
            }
            Kind::Primitive => {
                let first = group.members[0];
                let primitive = match graph.op(first) {
                    Op::Attention { .. } | Op::AttentionGrad { .. } => {
                        Primitive::Attention(attention(self, &group.members)?)
                    }
                    _ => {
                        let epilogue = (group.members.len() > 1).then(|| self.epilogue(group));
                        primitive(self, first, epilogue)?
                    }
                };
                steps.push(Step {
                    name: name.to_owned(),
                    region: group.region,
                    kernel: Kernel::Primitive(primitive),
                    serial: false,
                    lasting: false,
                });
            }
            Kind::Copy => {
                let view = if self.fusion.views[last.index()].base == last {
                    &self.fusion.views[graph.operand(last, 0).index()]
                } else {
                    &self.fusion.views[last.index()]
                };
                let place = Place { slot: self.memory.slot_of[&last], offset: Affine::ZERO };
                let nest = self.copy(view, place, graph.ty(last).dtype);
                steps.push(loops(name, group.region, nest));
            }
            Kind::Assembly => self.assembly(last, steps),
            Kind::Collective => self.collective(group, steps),
        }
        Ok(())
    }

    /// The elementwise nodes that follow a product, over its rows and columns.
    fn epilogue(&self, group: &Group) -> LoopNest {
        let first = group.members[0];
        let dims = &self.graph.ty(first).shape.0;
        let (cols, lead) = dims.split_last().expect("verified: a product has columns");
        let rows = lead
            .iter()
            .try_fold(Dim::ONE, |product, &dim| product.times(dim))
            .expect("verified: types are bounded");
        let mut builder = NestBuilder::new(self, group.domain.clone());
        builder.tile(first);
        builder.members(&group.members[1..]);
        builder.finish_epilogue([rows, *cols])
    }

    /// The dense copy of a view.
    fn copy(&self, view: &View, place: Place, dtype: DType) -> LoopNest {
        let strides = dense_strides(&view.dims);
        self.scatter(view, place, strides, dtype)
    }

    /// A copy of a view to other strides.
    fn scatter(&self, view: &View, place: Place, strides: Vec<Dim>, dtype: DType) -> LoopNest {
        let mut builder = NestBuilder::new(self, view.dims.clone());
        let value = builder.read_view(view);
        let value = builder.widened(value, view.base, dtype);
        builder.store(value, place, strides, dtype);
        builder.finish()
    }

    fn assembly(&self, id: NodeId, steps: &mut Vec<Step>) {
        let graph = self.graph;
        let node = graph.node(id);
        let result = &node.ty.shape.0;
        let (name, region, dtype) = (node.name.as_str(), node.region, node.ty.dtype);
        let slot = self.memory.slot_of[&id];
        let strides = dense_strides(result);
        let at = |axis: usize, index: usize| {
            Affine::from(strides[axis]).times(index).expect("verified: types are bounded")
        };
        match node.op {
            Op::Concat { axis } => {
                let mut start = 0;
                for operand in graph.operands(id) {
                    let place = Place { slot, offset: at(axis, start) };
                    let view = &self.fusion.views[operand.index()];
                    let nest = self.scatter(view, place, strides.clone(), dtype);
                    steps.push(loops(name, region, nest));
                    start += graph.ty(operand).shape.0[axis].scale;
                }
            }
            Op::Pad { axis, low, interior, value, .. } => {
                let mut fill = NestBuilder::new(self, result.clone());
                let constant = fill.constant(dtype, f64::from(value));
                let place = Place { slot, offset: Affine::ZERO };
                fill.store(constant, place, strides.clone(), dtype);
                steps.push(loops(name, region, fill.finish()));
                let mut spread = strides.clone();
                let step = Dim::fixed(interior + 1);
                spread[axis] = spread[axis].times(step).expect("verified: types are bounded");
                let place = Place { slot, offset: at(axis, low) };
                let view = &self.fusion.views[graph.operand(id, 0).index()];
                steps.push(loops(name, region, self.scatter(view, place, spread, dtype)));
            }
            _ => unreachable!("verified: only concat and pad assemble"),
        }
    }

    fn collective(&self, group: &Group, steps: &mut Vec<Step>) {
        let graph = self.graph;
        let mut members = Vec::new();
        for &id in &group.members {
            let operand = graph.operand(id, 0);
            let place = Place { slot: self.memory.slot_of[&id], offset: Affine::ZERO };
            if !self.memory.exchanged_in_place.contains(&id) {
                let view = self.fusion.dense_view(graph, operand);
                let nest = self.copy(&view, place, graph.ty(id).dtype);
                steps.push(loops(graph.node(id).name.as_str(), group.region, nest));
            }
            let elements = graph.ty(id).shape.elements().expect("verified: types are bounded");
            let whole = |id: NodeId| Place { slot: self.memory.slot_of[&id], offset: Affine::ZERO };
            let codes = exchanged_codes(graph, &self.fusion.views, operand);
            let codes = codes.map(|(codes, scales, row)| Codes {
                codes: whole(codes),
                scales: whole(scales),
                row,
            });
            members.push(Exchanged { value: place, elements: elements.scale, codes });
        }
        let Op::AllReduce(op) = *graph.op(group.members[0]) else {
            unreachable!("verified: only all_reduce is a collective")
        };
        steps.push(Step {
            name: graph.node(group.members[0]).name.as_str().to_owned(),
            region: group.region,
            kernel: Kernel::AllReduce { op, members },
            serial: false,
            lasting: false,
        });
    }
}
