//! A thin layer over Cranelift's function builder: constants, sizes affine in the batch, loops, calls.

use crate::frame::Frame;
use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::types::{F32, F32X4, I8, I32, I32X4, I64};
use cranelift_codegen::ir::{
    AbiParam, BlockArg, ConstantData, Endianness, InstBuilder, MemFlagsData, Signature, Type, Value,
};
use cranelift_codegen::isa::CallConv;
use cranelift_frontend::FunctionBuilder;
use qcompile_ir::Dim;
use qcompile_kernels::pool::{Barrier, barrier_wait};
use qcompile_plan::{Affine, Place, SlotId};
use std::collections::BTreeMap;

/// What the target offers, as far as lowering cares.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    /// Whether a fused multiply-add is one instruction.
    pub fused: bool,
    /// Calling convention of `extern "C"`.
    pub call_conv: CallConv,
}

/// What a loop does in a turn: its index and the values from the turn before give those of the next.
pub(crate) type LoopBody<'f, 'a, 'b> =
    dyn FnMut(&mut Emitter<'a, 'b>, Value, &[Value]) -> Vec<Value> + 'f;

/// Emits one function.
pub(crate) struct Emitter<'a, 'b> {
    pub b: &'a mut FunctionBuilder<'b>,
    pub target: Target,
    /// The frame pointer.
    pub frame: Value,
    batch: Value,
    slots: Value,
    /// Slot addresses that were loaded in the entry block.
    bases: BTreeMap<SlotId, Value>,
}

/// Accesses of emitted code neither trap nor need alignment.
pub(crate) fn trusted() -> MemFlagsData {
    MemFlagsData::new().with_notrap()
}

impl<'a, 'b> Emitter<'a, 'b> {
    /// Starts a function whose first parameter is the frame; returns the other parameters too.
    pub(crate) fn begin(
        b: &'a mut FunctionBuilder<'b>,
        target: Target,
        slots: impl IntoIterator<Item = SlotId>,
    ) -> (Self, Vec<Value>) {
        let entry = b.create_block();
        b.append_block_params_for_function_params(entry);
        b.switch_to_block(entry);
        b.seal_block(entry);
        let params = b.block_params(entry).to_vec();
        let frame = params[0];
        let batch = b.ins().load(I64, trusted(), frame, Frame::BATCH);
        let table = b.ins().load(I64, trusted(), frame, Frame::SLOTS);
        let mut emitter = Emitter { b, target, frame, batch, slots: table, bases: BTreeMap::new() };
        for slot in slots {
            emitter.slot(slot);
        }
        (emitter, params[1..].to_vec())
    }

    /// A 64-bit constant.
    pub(crate) fn int(&mut self, value: usize) -> Value {
        self.b.ins().iconst(I64, value as i64)
    }

    /// `x + c`.
    pub(crate) fn plus(&mut self, x: Value, c: usize) -> Value {
        if c == 0 {
            return x;
        }
        let c = self.int(c);
        self.b.ins().iadd(x, c)
    }

    /// `x · c`.
    pub(crate) fn times(&mut self, x: Value, c: usize) -> Value {
        if c == 1 {
            return x;
        }
        let c = self.int(c);
        self.b.ins().imul(x, c)
    }

    /// `ceil(x / y)` of unsigned numbers, y at least 1.
    pub(crate) fn div_ceil(&mut self, x: Value, y: Value) -> Value {
        let one = self.int(1);
        let less = self.b.ins().isub(y, one);
        let sum = self.b.ins().iadd(x, less);
        self.b.ins().udiv(sum, y)
    }

    pub(crate) fn min(&mut self, x: Value, y: Value) -> Value {
        let less = self.b.ins().icmp(IntCC::UnsignedLessThan, x, y);
        self.b.ins().select(less, x, y)
    }

    pub(crate) fn max(&mut self, x: Value, y: Value) -> Value {
        let less = self.b.ins().icmp(IntCC::UnsignedLessThan, x, y);
        self.b.ins().select(less, y, x)
    }

    /// The value of an affine number at this run's batch size.
    pub(crate) fn affine(&mut self, affine: Affine) -> Value {
        if affine.per_batch == 0 {
            return self.int(affine.fixed);
        }
        let batch = self.batch;
        let product = self.times(batch, affine.per_batch);
        self.plus(product, affine.fixed)
    }

    /// The size of a dimension at this run's batch size.
    pub(crate) fn dim(&mut self, dim: Dim) -> Value {
        self.affine(dim.into())
    }

    /// The address of a slot, loaded once. To be used in the entry block first.
    pub(crate) fn slot(&mut self, slot: SlotId) -> Value {
        if let Some(&base) = self.bases.get(&slot) {
            return base;
        }
        let base = self.b.ins().load(I64, trusted(), self.slots, slot.index() as i32 * 8);
        self.bases.insert(slot, base);
        base
    }

    /// The address of an element of a slot.
    pub(crate) fn element(&mut self, slot: SlotId, offset: Affine, size: usize) -> Value {
        let base = self.slot(slot);
        if offset == Affine::ZERO {
            return base;
        }
        let offset = self.affine(offset);
        let bytes = self.times(offset, size);
        self.b.ins().iadd(base, bytes)
    }

    /// The address of a dense value.
    pub(crate) fn place(&mut self, place: Place, size: usize) -> Value {
        self.element(place.slot, place.offset, size)
    }

    /// A field of the frame.
    pub(crate) fn field(&mut self, offset: i32) -> Value {
        self.b.ins().load(I64, trusted(), self.frame, offset)
    }

    /// An f32 constant in the type of a scalar or vector of floats.
    pub(crate) fn float(&mut self, ty: Type, value: f32) -> Value {
        if ty == F32 {
            return self.b.ins().f32const(value);
        }
        self.lanes(F32X4, value.to_bits())
    }

    /// A 32-bit constant in the type of a scalar or vector of integers.
    pub(crate) fn bits(&mut self, ty: Type, value: u32) -> Value {
        if ty == I32 {
            return self.b.ins().iconst(I32, i64::from(value));
        }
        self.lanes(I32X4, value)
    }

    fn lanes(&mut self, ty: Type, bits: u32) -> Value {
        let data: Vec<u8> = [bits; 4].iter().flat_map(|bits| bits.to_le_bytes()).collect();
        let constant = self.b.func.dfg.constants.insert(ConstantData::from(data));
        self.b.ins().vconst(ty, constant)
    }

    /// The same bits in another type of the same width.
    pub(crate) fn cast_bits(&mut self, ty: Type, value: Value) -> Value {
        let from = self.b.func.dfg.value_type(value);
        if from == ty {
            return value;
        }
        let flags = if from.is_vector() || ty.is_vector() {
            MemFlagsData::new().with_endianness(Endianness::Little)
        } else {
            MemFlagsData::new()
        };
        self.b.ins().bitcast(ty, flags, value)
    }

    /// Calls an address whose arguments are all words, without result.
    pub(crate) fn call_words(&mut self, callee: Value, args: &[Value]) {
        let mut signature = Signature::new(self.target.call_conv);
        signature.params.extend(args.iter().map(|_| AbiParam::new(I64)));
        let signature = self.b.import_signature(signature);
        self.b.ins().call_indirect(signature, callee, args);
    }

    /// Calls an `extern "C"` function of this process.
    pub(crate) fn call_address(
        &mut self,
        address: usize,
        params: &[Type],
        result: Type,
        args: &[Value],
    ) -> Value {
        let mut signature = Signature::new(self.target.call_conv);
        signature.params.extend(params.iter().map(|&ty| AbiParam::new(ty)));
        signature.returns.push(AbiParam::new(result));
        let signature = self.b.import_signature(signature);
        let callee = self.int(address);
        let call = self.b.ins().call_indirect(signature, callee, args);
        self.b.inst_results(call)[0]
    }

    /// Waits for the other threads, if there are any.
    pub(crate) fn barrier(&mut self, threads: Value) {
        let one = self.int(1);
        let several = self.b.ins().icmp(IntCC::NotEqual, threads, one);
        self.when(several, |e| {
            let barrier = e.field(Frame::BARRIER);
            let wait: unsafe extern "C" fn(*const Barrier) -> usize = barrier_wait;
            // Emitted code and kernels do not panic, so nobody breaks the barrier while it is waited on.
            e.call_address(wait as usize, &[I64], I64, &[barrier]);
        });
    }

    /// Runs `then` if the condition holds.
    pub(crate) fn when(&mut self, condition: Value, then: impl FnOnce(&mut Self)) {
        let (inside, after) = (self.b.create_block(), self.b.create_block());
        self.b.ins().brif(condition, inside, &[], after, &[]);
        self.b.switch_to_block(inside);
        self.b.seal_block(inside);
        then(self);
        self.b.ins().jump(after, &[]);
        self.b.switch_to_block(after);
        self.b.seal_block(after);
    }

    /// Counts from `begin` below `end` (signed) by `step`, carrying values from one turn to the next.
    ///
    /// `turns` is the number of turns where it is known: one turn is emitted without a loop.
    pub(crate) fn count(
        &mut self,
        (begin, end, step): (Value, Value, usize),
        turns: Option<usize>,
        carried: &[Value],
        body: &mut LoopBody<'_, 'a, 'b>,
    ) -> Vec<Value> {
        match turns {
            Some(0) => return carried.to_vec(),
            Some(1) => return body(self, begin, carried),
            _ => {}
        }
        let types: Vec<Type> = carried.iter().map(|&v| self.b.func.dfg.value_type(v)).collect();
        let (turn, exit) = (self.b.create_block(), self.b.create_block());
        let index = self.b.append_block_param(turn, I64);
        let inside: Vec<Value> =
            types.iter().map(|&ty| self.b.append_block_param(turn, ty)).collect();
        let result: Vec<Value> =
            types.iter().map(|&ty| self.b.append_block_param(exit, ty)).collect();
        let leave: Vec<BlockArg> = carried.iter().map(|&v| v.into()).collect();
        let mut enter: Vec<BlockArg> = vec![begin.into()];
        enter.extend(&leave);
        if turns.is_some() {
            self.b.ins().jump(turn, &enter);
        } else {
            let any = self.b.ins().icmp(IntCC::SignedLessThan, begin, end);
            self.b.ins().brif(any, turn, &enter, exit, &leave);
        }
        self.b.switch_to_block(turn);
        let out = body(self, index, &inside);
        let next = self.plus(index, step);
        let more = self.b.ins().icmp(IntCC::SignedLessThan, next, end);
        let leave: Vec<BlockArg> = out.iter().map(|&v| v.into()).collect();
        let mut again: Vec<BlockArg> = vec![next.into()];
        again.extend(&leave);
        self.b.ins().brif(more, turn, &again, exit, &leave);
        self.b.seal_block(turn);
        self.b.switch_to_block(exit);
        self.b.seal_block(exit);
        result
    }

    /// This thread's contiguous share of `units`.
    pub(crate) fn share(&mut self, units: Value, thread: Value, threads: Value) -> (Value, Value) {
        let product = self.b.ins().imul(units, thread);
        let begin = self.b.ins().udiv(product, threads);
        let product = self.b.ins().iadd(product, units);
        let end = self.b.ins().udiv(product, threads);
        (begin, end)
    }

    /// A scalar truth value (I8) as a mask of 32 bits.
    pub(crate) fn widen_mask(&mut self, condition: Value) -> Value {
        debug_assert_eq!(self.b.func.dfg.value_type(condition), I8);
        self.b.ins().bmask(I32, condition)
    }
}
