//! One worker: the memory of a plan and the threads that run it.

use crate::RuntimeError;
use crate::arena::{ALIGNMENT, Arena};
use crate::collective::{Exchange, Group, all_reduce};
use qcompile_codegen::{Frame, Program};
use qcompile_ir::{Region, Tensor};
use qcompile_kernels::pool::Team;
use qcompile_plan::{Binding, Plan, Storage, plan::bytes_of};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A plan with its code and constants, shared by all workers.
pub(crate) struct Form<'p> {
    pub(crate) plan: &'p Plan,
    pub(crate) code: &'p Code,
}

/// The code of a plan and its constants.
pub(crate) struct Code {
    pub(crate) program: Program,
    constants: Arena,
    /// Where the constants begin, by slot.
    offsets: Vec<usize>,
}

impl Code {
    pub(crate) fn new(plan: &Plan, program: Program, limit: usize) -> Result<Code, RuntimeError> {
        let (offsets, bytes) = layout(plan, 1, |storage| storage == Storage::Const);
        let constants = Arena::new(bytes, limit)?;
        for binding in plan.consts() {
            // SAFETY: nobody else has the arena yet, and the plan was verified: the value fits its slot.
            unsafe { fill(binding, constants.at(offsets[binding.slot.index()])) };
        }
        Ok(Code { program, constants, offsets })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.constants.bytes() + self.program.code_bytes()
    }
}

/// Copies the initial value of a binding to its memory.
///
/// # Safety
/// `to` has room for it, and nobody else uses that memory.
unsafe fn fill(binding: &Binding, to: *mut u8) {
    if let Some(tensor) = &binding.initial {
        // SAFETY: granted by the caller.
        unsafe { std::ptr::copy_nonoverlapping(tensor.bytes().as_ptr(), to, tensor.bytes().len()) };
    }
}

/// Offsets of the slots of some kinds, one after another, and the bytes of all; 0 for the others.
fn layout(plan: &Plan, batch: usize, is_here: impl Fn(Storage) -> bool) -> (Vec<usize>, usize) {
    let mut end = 0_usize;
    let mut offsets = vec![0; plan.slots().len()];
    for (offset, slot) in offsets.iter_mut().zip(plan.slots()) {
        if is_here(slot.storage) {
            *offset = end;
            let bytes = slot.bytes.at(batch).div_ceil(ALIGNMENT).saturating_mul(ALIGNMENT);
            end = end.saturating_add(bytes);
        }
    }
    (offsets, end)
}

fn is_workspace(storage: Storage) -> bool {
    matches!(storage, Storage::Input | Storage::Output | Storage::Shared)
}

/// What a run is told beside its inputs.
pub(crate) struct Call<'a> {
    /// Which regions to run, in order.
    pub(crate) regions: &'a [Region],
    /// This worker's samples.
    pub(crate) batch: usize,
    /// The first of them among those of all workers.
    pub(crate) first: usize,
    /// The exchange with the other workers; none for a worker alone.
    pub(crate) exchange: Option<(&'a Group, usize, &'a [f32])>,
}

/// A worker.
pub(crate) struct Replica {
    team: Team,
    /// Parameters and state of the training form.
    kept: Arena,
    kept_offsets: Vec<usize>,
    /// Inputs, outputs and intermediate values of whichever form runs.
    workspace: Arena,
    /// Whether the workspace lacks the copies of parameters that last: an update leaves them there, everything else spoils
    /// them.
    stale: bool,
    /// The batch size that the workspace is laid out for.
    capacity: usize,
    scratch: Arena,
    /// Slot addresses of the form that ran last.
    slots: Vec<*mut u8>,
    errors: Vec<u64>,
    limit: usize,
}

// SAFETY: the slot addresses point into the replica's own arenas and into constants, which nobody writes.
unsafe impl Send for Replica {}

impl Replica {
    pub(crate) fn new(plan: &Plan, team: Team, limit: usize) -> Result<Replica, RuntimeError> {
        let (kept_offsets, bytes) = layout(plan, 1, |storage| storage == Storage::Kept);
        let kept = Arena::new(bytes, limit)?;
        for binding in plan.params().iter().chain(plan.states()) {
            // SAFETY: nobody else has the arena yet, and the plan was verified: the value fits its slot.
            unsafe { fill(binding, kept.at(kept_offsets[binding.slot.index()])) };
        }
        Ok(Replica {
            team,
            kept,
            kept_offsets,
            workspace: Arena::new(0, limit)?,
            stale: true,
            capacity: 0,
            scratch: Arena::new(0, limit)?,
            slots: Vec::new(),
            errors: Vec::new(),
            limit,
        })
    }

    /// Bytes of memory that it holds now.
    pub(crate) fn bytes(&self) -> usize {
        self.kept.bytes() + self.workspace.bytes() + self.scratch.bytes()
    }

    /// Makes room for a batch in every form, and points the slots at the memory of one form.
    pub(crate) fn prepare(
        &mut self,
        forms: &[Form<'_>],
        chosen: usize,
        training: &Plan,
        batch: usize,
    ) -> Result<(), RuntimeError> {
        let Form { plan, code } = forms[chosen];
        let wanted = self.capacity.max(batch);
        let bytes = layout(plan, wanted, is_workspace).1;
        if batch > self.capacity || bytes > self.workspace.bytes() {
            let most = forms.iter().map(|form| layout(form.plan, wanted, is_workspace).1).max();
            let room = self.limit.saturating_sub(self.kept.bytes());
            self.workspace = Arena::new(0, 0)?;
            self.stale = true;
            self.capacity = 0;
            self.workspace = Arena::new(most.unwrap_or(0), room)?;
            self.capacity = wanted;
        }
        let (offsets, _) = layout(plan, self.capacity, is_workspace);
        self.slots.clear();
        for (index, slot) in plan.slots().iter().enumerate() {
            self.slots.push(match slot.storage {
                Storage::Const => code.constants.at(code.offsets[index]),
                // Filled below; a kept slot is that of its binding.
                Storage::Kept => self.kept.at(0),
                Storage::Input | Storage::Output | Storage::Shared => {
                    self.workspace.at(offsets[index])
                }
            });
        }
        for binding in plan.params().iter().chain(plan.states()) {
            let kept = training.kept(&binding.name).expect("verified: the training form has it");
            self.slots[binding.slot.index()] = self.kept.at(self.kept_offsets[kept.slot.index()]);
        }
        self.errors.clear();
        self.errors.resize(plan.steps().len(), 0);
        let scratch = code.program.scratch_bytes(batch);
        if scratch > self.scratch.bytes() {
            self.scratch = Arena::new(0, 0)?;
            self.scratch = Arena::new(scratch, self.limit.saturating_sub(self.bytes()))?;
        }
        Ok(())
    }

    /// Copies bytes into an input's memory; after [`prepare`](Self::prepare) for that form.
    pub(crate) fn put(&mut self, binding: &Binding, batch: usize, bytes: &[u8]) {
        let room = bytes_of(&binding.ty).at(batch);
        assert!(bytes.len() == room && batch <= self.capacity, "inputs were checked");
        // SAFETY: the slot has `room` bytes at the batch size it was prepared for, and no thread runs.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.slots[binding.slot.index()], room)
        };
    }

    /// The value of a binding after a run of its form with that batch size.
    pub(crate) fn read(&self, binding: &Binding, batch: usize) -> Tensor {
        assert!(batch <= self.capacity, "read after a run with this batch size");
        let shape = binding
            .ty
            .shape
            .0
            .iter()
            .map(|&dim| if dim.batch { dim.scale * batch } else { dim.scale });
        self.copied(binding, self.slots[binding.slot.index()], shape.collect())
    }

    /// The value of a parameter or state of the training form.
    pub(crate) fn read_kept(&self, binding: &Binding) -> Tensor {
        let shape = binding.ty.shape.0.iter().map(|dim| dim.scale).collect();
        self.copied(binding, self.kept.at(self.kept_offsets[binding.slot.index()]), shape)
    }

    fn copied(&self, binding: &Binding, from: *const u8, shape: Vec<usize>) -> Tensor {
        let dtype = binding.ty.dtype;
        let bytes = shape.iter().product::<usize>() * dtype.size();
        // SAFETY: the plan was verified: the value lies in its slot; memory began as zeros, and no thread runs.
        let bytes = unsafe { std::slice::from_raw_parts(from, bytes) }.to_vec();
        Tensor::from_bytes(dtype, shape, bytes).expect("as many bytes as the shape needs")
    }

    /// Replaces a parameter or state; the tensor has its type.
    pub(crate) fn write_kept(&mut self, binding: &Binding, value: &Tensor) {
        assert!(value.ty() == binding.ty, "checked by the trainer");
        self.stale = true;
        let to = self.kept.at(self.kept_offsets[binding.slot.index()]);
        // SAFETY: the plan was verified: a value of this type fits the slot; no thread runs.
        unsafe { std::ptr::copy_nonoverlapping(value.bytes().as_ptr(), to, value.bytes().len()) };
    }

    fn frame(&mut self, batch: usize, threads: usize, ranks: usize) -> Frame {
        Frame {
            slots: self.slots.as_ptr(),
            batch,
            first: 0,
            threads,
            ranks,
            scratch: self.scratch.at(0),
            barrier: std::ptr::null(),
            collective_context: std::ptr::null(),
            collective: all_reduce,
            errors: self.errors.as_mut_ptr(),
        }
    }

    /// Runs regions of the form that was prepared last, on the given team or its own. Adds the time of each region in
    /// nanoseconds to `times`.
    pub(crate) fn run(
        &mut self,
        form: &Form<'_>,
        call: &Call<'_>,
        team: Option<&mut Team>,
        times: &[AtomicU64; Region::ALL.len()],
    ) -> Result<(), RuntimeError> {
        let exchange = call.exchange.map(|(group, rank, weights)| Exchange {
            group,
            plan: form.plan,
            rank,
            slots: self.slots.as_ptr(),
            batch: call.batch,
            weights,
        });
        let ranks = call.exchange.map_or(1, |(_, _, weights)| weights.len());
        let mut frame = self.frame(call.batch, 1, ranks);
        if let Some(exchange) = &exchange {
            frame.collective_context = std::ptr::from_ref(exchange).cast();
        }
        let team = team.unwrap_or(&mut self.team);
        let barrier = team.barrier();
        frame.first = call.first;
        frame.threads = team.threads();
        frame.barrier = &raw const *barrier;
        let program = &form.code.program;
        let refreshes = self.stale && call.regions.contains(&Region::Forward);
        let job = |thread: usize| {
            if refreshes {
                // SAFETY: as below.
                unsafe { program.refresh(&frame, thread) };
            }
            for &region in call.regions {
                let begin = Instant::now();
                // SAFETY: `prepare` laid out every slot for at least this batch size, disjoint and aligned, and the
                // scratch; kept memory belongs to this replica alone; all threads of the team come here, and the
                // exchange is that of the ranks that run now.
                unsafe { program.run(region, &frame, thread) };
                if thread == 0 {
                    let nanoseconds = begin.elapsed().as_nanos() as u64;
                    times[region as usize].fetch_add(nanoseconds, Ordering::Relaxed);
                }
            }
        };
        self.stale = true;
        team.run(job).map_err(|panicked| RuntimeError::Panicked(panicked.to_string()))?;
        self.stale = !call.regions.contains(&Region::Update);
        Ok(())
    }

    /// Runs all steps of the form that was prepared last, one at a time, and returns how long each took.
    pub(crate) fn profile(
        &mut self,
        form: &Form<'_>,
        batch: usize,
    ) -> Result<Vec<Duration>, RuntimeError> {
        let mut frame = self.frame(batch, 1, 1);
        let barrier = self.team.barrier();
        frame.threads = self.team.threads();
        frame.barrier = &raw const *barrier;
        let steps = form.plan.steps().len();
        let times: Vec<AtomicU64> = (0..steps).map(|_| AtomicU64::new(0)).collect();
        let job = |thread: usize| {
            for (step, time) in times.iter().enumerate() {
                let begin = Instant::now();
                // SAFETY: as in `run`; threads meet after each step.
                unsafe { form.code.program.run_step(step, &frame, thread) };
                barrier.wait();
                if thread == 0 {
                    time.store(begin.elapsed().as_nanos() as u64, Ordering::Relaxed);
                }
            }
        };
        self.team.run(job).map_err(|panicked| RuntimeError::Panicked(panicked.to_string()))?;
        Ok(times.into_iter().map(|time| Duration::from_nanos(time.into_inner())).collect())
    }

    /// The first step that met a bad index, and where.
    pub(crate) fn error(&self) -> Option<(usize, usize)> {
        let position = |word: u64| usize::try_from(word - 1).unwrap_or(usize::MAX);
        self.errors
            .iter()
            .enumerate()
            .find(|(_, word)| **word > 0)
            .map(|(step, &word)| (step, position(word)))
    }
}
