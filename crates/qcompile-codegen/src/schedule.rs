//! The order of steps as code: one function for each region calls its steps, with a barrier only where a step touches
//! what another thread may still be working on.

use crate::emitter::Emitter;
use crate::frame::Frame;
use crate::{loops, places, primitives};
use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::{InstBuilder, Value};
use qcompile_kernels::Kernels;
use qcompile_plan::{Kernel, SlotId, Step};
use std::collections::BTreeSet;

/// What a step touches.
struct Touched {
    reads: BTreeSet<SlotId>,
    writes: BTreeSet<SlotId>,
    scratch: bool,
    /// Whether all threads meet in its middle.
    barrier: bool,
}

impl Touched {
    fn of(step: &Step, kernels: &Kernels) -> Touched {
        let mut touched = Touched {
            reads: BTreeSet::new(),
            writes: BTreeSet::new(),
            scratch: false,
            barrier: false,
        };
        match &step.kernel {
            Kernel::Loops(nests) => {
                nests.iter().for_each(|nest| touched.nest(nest));
                touched.barrier = loops::has_barrier(nests, step.serial);
                touched.scratch = touched.barrier;
            }
            Kernel::Primitive(primitive) => {
                let (reads, writes) = places::of(primitive);
                touched.reads.extend(reads.iter().map(|place| place.slot));
                touched.writes.extend(writes.iter().map(|place| place.slot));
                if let Some(nest) = primitive.epilogue() {
                    touched.nest(nest);
                }
                touched.barrier = primitives::entry(kernels, primitive).phases > 1;
                touched.scratch = true;
            }
            Kernel::AllReduce { .. } => {}
        }
        touched
    }

    fn nest(&mut self, nest: &qcompile_plan::LoopNest) {
        self.reads.extend(nest.reads.iter().map(|read| read.slot));
        self.writes.extend(nest.writes.iter().map(|write| write.access().slot));
    }
}

/// What was touched since all threads met.
#[derive(Default)]
struct Pending {
    reads: BTreeSet<SlotId>,
    writes: BTreeSet<SlotId>,
    scratch: bool,
}

impl Pending {
    fn conflicts(&self, step: &Touched) -> bool {
        (self.scratch && step.scratch)
            || step
                .writes
                .iter()
                .any(|slot| self.reads.contains(slot) || self.writes.contains(slot))
            || step.reads.iter().any(|slot| self.writes.contains(slot))
    }

    fn add(&mut self, step: &Touched) {
        self.reads.extend(&step.reads);
        self.writes.extend(&step.writes);
        self.scratch |= step.scratch;
    }
}

/// Before which steps all threads must meet.
pub(crate) fn barriers(steps: &[&Step], kernels: &Kernels) -> Vec<bool> {
    // What thread 0 does alone conflicts with the work of all, not with what it does alone later.
    let (mut serial, mut parallel) = (Pending::default(), Pending::default());
    let mut barriers = Vec::with_capacity(steps.len());
    for step in steps {
        let touched = Touched::of(step, kernels);
        let needed = parallel.conflicts(&touched) || (!step.serial && serial.conflicts(&touched));
        if needed || touched.barrier {
            (serial, parallel) = (Pending::default(), Pending::default());
        }
        if step.serial { &mut serial } else { &mut parallel }.add(&touched);
        barriers.push(needed);
    }
    barriers
}

/// Emits the exchange of a step: thread 0 of each rank takes part in it, if there are several ranks.
pub(crate) fn collective(e: &mut Emitter<'_, '_>, step: usize, thread: Value, threads: Value) {
    let ranks = e.field(Frame::RANKS);
    let one = e.int(1);
    let several = e.b.ins().icmp(IntCC::UnsignedGreaterThan, ranks, one);
    e.when(several, |e| {
        e.barrier(threads);
        let zero = e.int(0);
        let first = e.b.ins().icmp(IntCC::Equal, thread, zero);
        e.when(first, |e| {
            let function = e.field(Frame::COLLECTIVE);
            let context = e.field(Frame::COLLECTIVE_CONTEXT);
            let step = e.int(step);
            e.call_words(function, &[context, step]);
        });
        e.barrier(threads);
    });
}
