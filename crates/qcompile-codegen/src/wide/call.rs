//! Calls of wide functions from Cranelift's code.

use super::{Layout, Shape};
use crate::emitter::Emitter;
use crate::nest::{Cursor, Sweep, moved};
use cranelift_codegen::ir::types::{F32, F64, I64};
use cranelift_codegen::ir::{FuncRef, InstBuilder, StackSlotData, StackSlotKind, Value};

/// A wide function as Cranelift's code sees it.
#[derive(Clone, Debug)]
pub(crate) struct Wide {
    pub shape: Shape,
    pub function: FuncRef,
}

impl Wide {
    /// Runs the function over the ranges of a sweep from `dim` on: the last two dims, or the only one. `entries` are
    /// the addresses of an epilogue's partial results at the first column.
    pub(crate) fn call(
        &self,
        e: &mut Emitter<'_, '_>,
        sweep: &Sweep<'_>,
        dim: usize,
        cursors: &[Cursor],
        entries: &[Value],
    ) {
        let layout = self.shape.layout();
        let bytes = u32::try_from(8 * layout.words()).expect("verified: nests are small");
        let slot =
            e.b.create_sized_stack_slot(StackSlotData::new(StackSlotKind::ExplicitSlot, bytes, 3));
        let put = |e: &mut Emitter<'_, '_>, word: usize, value: Value| {
            let offset = i32::try_from(8 * word).expect("verified: nests are small");
            e.b.ins().stack_store(I64, value, slot, offset);
        };
        let mut cursors = cursors.to_vec();
        let mut down = vec![None; cursors.len()];
        let mut rows = e.int(1);
        for (at, range) in sweep.ranges.iter().enumerate().skip(dim) {
            let strides = sweep.strides(e, at, &cursors);
            cursors = moved(e, range.begin, &cursors, &strides);
            let size = e.b.ins().isub(range.end, range.begin);
            if at + 1 == sweep.ranges.len() {
                put(e, Layout::COLUMNS, size);
            } else {
                (rows, down) = (size, strides);
            }
        }
        put(e, Layout::ROWS, rows);
        for (at, (cursor, stride)) in cursors.iter().zip(down).enumerate() {
            put(e, Layout::base(at), cursor.address);
            if let Some(stride) = stride {
                put(e, Layout::stride(at), stride);
            }
        }
        for (at, &entry) in entries.iter().enumerate() {
            put(e, Layout::base(cursors.len() + at), entry);
        }
        if !entries.is_empty() {
            let count = e.b.ins().fcvt_from_sint(F64, rows);
            put(e, Layout::COUNT, count);
        }
        for (at, &size) in self.shape.sizes.iter().enumerate() {
            let size = e.dim(size);
            let size = e.b.ins().fcvt_from_sint(F32, size);
            put(e, layout.size(at), size);
        }
        let block = e.b.ins().stack_addr(I64, slot, 0);
        e.b.ins().call(self.function, &[block]);
    }
}
