//! What a kernel is told about the epilogue of its product.

use crate::emitter::Emitter;
use cranelift_codegen::ir::types::I64;
use cranelift_codegen::ir::{InstBuilder, StackSlotData, StackSlotKind, Value};
use qcompile_ir::Dim;
use qcompile_kernels::args::Stream;
use qcompile_plan::{Access, LoopNest, Write};
use std::mem::{offset_of, size_of};

/// The address of the epilogue, if the primitive has one, the first argument that it gets, and what it touches.
#[derive(Clone, Copy)]
pub(crate) struct Tail {
    pub function: Value,
    pub context: Value,
    pub streams: Value,
    pub count: Value,
}

impl Tail {
    /// With what the nest of an epilogue touches by rows and columns.
    pub(crate) fn new(e: &mut Emitter<'_, '_>, nest: Option<&LoopNest>, function: Value) -> Tail {
        let stores = |write: &Write| matches!(write, Write::Store { .. });
        let accesses: Vec<(&Access, bool)> = nest.map_or(Vec::new(), |nest| {
            let writes = nest.writes.iter().filter(|write| stores(write)).map(Write::access);
            let reads = nest.reads.iter().map(|access| (access, false));
            let all = reads.chain(writes.map(|access| (access, true)));
            let mut streams: Vec<(&Access, bool)> = Vec::new();
            for (access, written) in all {
                let streams_by = |stride: &[Dim]| stride[0].scale != 0 && stride[1] == Dim::ONE;
                if streams_by(&access.strides) && !streams.iter().any(|&(other, _)| other == access)
                {
                    streams.push((access, written));
                }
            }
            streams
        });
        let (context, count) = (e.frame, e.int(accesses.len()));
        if accesses.is_empty() {
            return Tail { function, context, streams: e.int(0), count };
        }
        let bytes = u32::try_from(size_of::<Stream>() * accesses.len()).expect("few operands");
        let data = StackSlotData::new(StackSlotKind::ExplicitSlot, bytes, 3);
        let slot = e.b.create_sized_stack_slot(data);
        for (at, (access, written)) in accesses.into_iter().enumerate() {
            let size = access.dtype.size();
            let stride = e.dim(access.strides[0]);
            let fields = [
                (offset_of!(Stream, first), e.element(access.slot, access.offset, size)),
                (offset_of!(Stream, row_bytes), e.times(stride, size)),
                (offset_of!(Stream, column_bytes), e.int(size)),
                (offset_of!(Stream, written), e.int(usize::from(written))),
            ];
            for (offset, value) in fields {
                let offset = size_of::<Stream>() * at + offset;
                let offset = i32::try_from(offset).expect("few operands");
                e.b.ins().stack_store(I64, value, slot, offset);
            }
        }
        Tail { function, context, streams: e.b.ins().stack_addr(I64, slot, 0), count }
    }
}
