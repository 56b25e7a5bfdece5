//! A plan as native code.

use crate::code_memory::CodeMemory;
use crate::emitter::{Emitter, Target};
use crate::epilogue::{self, Partials};
use crate::facts::Facts;
use crate::frame::Frame;
use crate::wide::{self, Code, Shape, Wide};
use crate::{loops, machine_code, places, primitives, schedule};
use cranelift_codegen::Context;
use cranelift_codegen::ir::types::I64;
use cranelift_codegen::ir::{AbiParam, Function, InstBuilder, Signature, Value};
use cranelift_codegen::isa::{CallConv, OwnedTargetIsa};
use cranelift_codegen::settings::{self, Configurable};
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext};
use cranelift_jit::{JITBuilder, JITMemoryProvider, JITModule};
use cranelift_module::{FuncId, Linkage, Module};
use qcompile_ir::Region;
use qcompile_kernels::{Kernels, Tier, kernels};
use qcompile_plan::{Affine, Kernel, LoopNest, Plan, SlotId, Step};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use thiserror::Error;

/// Why a plan could not be compiled: each is a defect, or a CPU that the code generator does not know.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CodegenError {
    /// The tier needs instructions that this CPU lacks.
    #[error("this CPU has no {0} instructions; it offers {1}")]
    Tier(Tier, Tier),
    /// The code generator does not support this CPU.
    #[error("no code can be generated for this CPU: {0}")]
    Host(String),
    /// A step could not be compiled.
    #[error("step {step}: {reason}")]
    Step {
        /// The function.
        step: String,
        /// What the code generator said.
        reason: String,
    },
}

/// How to compile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// The instruction set of kernels and emitted code.
    pub tier: Tier,
}

impl Default for Options {
    /// The best tier of this CPU.
    fn default() -> Options {
        Options { tier: Tier::detect() }
    }
}

type RegionFunction = unsafe extern "C" fn(frame: *const Frame, thread: usize);
type StepFunction = unsafe extern "C" fn(frame: *const Frame, thread: usize, threads: usize);
type ScratchFunction = unsafe extern "C" fn(frame: *const Frame) -> usize;

/// The native code of a plan. Dropping it frees the code.
pub struct Program {
    /// Holds the code.
    memory: CodeMemory,
    /// Makes what lasts.
    refresh: RegionFunction,
    regions: [RegionFunction; Region::ALL.len()],
    steps: Vec<StepFunction>,
    scratch: ScratchFunction,
    /// How many slots the plan has.
    slots: usize,
    code_bytes: usize,
    tier: Tier,
}

impl std::fmt::Debug for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Program").field("tier", &self.tier).finish_non_exhaustive()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the functions are reachable through this value only, and nobody runs them while it is dropped.
        unsafe { self.memory.free_memory() };
    }
}

impl Program {
    /// The instruction set it was compiled for.
    #[must_use]
    pub fn tier(&self) -> Tier {
        self.tier
    }

    /// Bytes of shared scratch for a batch size.
    #[must_use]
    pub fn scratch_bytes(&self, batch: usize) -> usize {
        let slots = vec![std::ptr::null_mut(); self.slots];
        let frame = Frame {
            slots: slots.as_ptr(),
            batch,
            first: 0,
            threads: 1,
            ranks: 1,
            scratch: std::ptr::null_mut(),
            barrier: std::ptr::null(),
            collective_context: std::ptr::null(),
            collective: no_exchange,
            errors: std::ptr::null_mut(),
        };
        // SAFETY: the function fills argument blocks with addresses, which kernels do not follow here: they compute
        // scratch from sizes.
        unsafe { (self.scratch)(&raw const frame) }
    }

    /// Bytes of native code.
    #[must_use]
    pub fn code_bytes(&self) -> usize {
        self.code_bytes
    }

    /// Makes the copies of parameters that last from step to step, as thread `thread` of `frame.threads`: before the first
    /// region of a step, unless the step before ended with its update, and neither parameters nor slots were touched since.
    ///
    /// # Safety
    /// As [`run`](Self::run).
    pub unsafe fn refresh(&self, frame: &Frame, thread: usize) {
        // SAFETY: granted by the caller.
        unsafe { (self.refresh)(frame, thread) }
    }

    /// Runs a region as thread `thread` of `frame.threads`. All of them must run it, at the same time.
    ///
    /// # Safety
    /// For the plan that this was compiled from and the batch size in `frame`, which is at least 1:
    /// * `frame.slots` points to a pointer for each slot, aligned to 64, to as many bytes as the slot needs, which
    ///   nobody else uses meanwhile; slots do not overlap;
    /// * inputs, parameters, states and constants hold values of their types, a bool being 0 or 1;
    /// * `frame.scratch` has [`scratch_bytes`](Self::scratch_bytes), aligned to 64;
    /// * `frame.barrier` is that of a team of `frame.threads` threads (any pointer for one thread);
    /// * `frame.collective` may be called with its context (for more than one rank);
    /// * `frame.errors` has a word for each step.
    pub unsafe fn run(&self, region: Region, frame: &Frame, thread: usize) {
        // SAFETY: granted by the caller. The plan was verified: no step leaves its slots.
        unsafe { (self.regions[region as usize])(frame, thread) }
    }

    /// Runs one step of the plan as thread `thread` of `frame.threads`, to measure it: all of them must meet before
    /// and after. The steps of a region one after another do what the region does.
    ///
    /// # Safety
    /// As [`run`](Self::run).
    pub unsafe fn run_step(&self, step: usize, frame: &Frame, thread: usize) {
        // SAFETY: granted by the caller.
        unsafe { (self.steps[step])(frame, thread, frame.threads) }
    }
}

/// The exchange of a rank alone: there is none.
unsafe extern "C" fn no_exchange(_context: *const (), _step: usize) {}

/// Compiles a plan for this CPU.
///
/// # Errors
/// [`CodegenError`].
pub fn compile(plan: &Plan, options: &Options) -> Result<Program, CodegenError> {
    let mut unit = Unit::new(plan, options)?;
    let emitted = unit.emit()?;
    let compiled = machine_code::compile(unit.module.isa(), &emitted.functions)?;
    let mut code_bytes = 0;
    for ((name, id, _), code) in emitted.functions.iter().zip(compiled) {
        code_bytes += code.bytes.len();
        unit.module
            .define_function_bytes(*id, code.alignment, &code.bytes, &code.relocations)
            .map_err(|error| failed(name, &error))?;
    }
    for (name, id, code) in &unit.wide {
        code_bytes += code.bytes.len();
        unit.module
            .define_function_bytes(*id, 64, &code.bytes, &[])
            .map_err(|error| failed(name, &error))?;
    }
    unit.module.finalize_definitions().map_err(|error| failed("plan", &error))?;
    let address = |id: FuncId| unit.module.get_finalized_function(id);
    // SAFETY: the functions were emitted with exactly these signatures, in the C calling convention.
    let region =
        |id: FuncId| unsafe { std::mem::transmute::<*const u8, RegionFunction>(address(id)) };
    let (refresh, regions) = (region(emitted.refresh), emitted.regions.map(region));
    // SAFETY: as above.
    let scratch =
        unsafe { std::mem::transmute::<*const u8, ScratchFunction>(address(emitted.scratch)) };
    let steps = emitted
        .steps
        .into_iter()
        // SAFETY: as above.
        .map(|id| unsafe { std::mem::transmute::<*const u8, StepFunction>(address(id)) })
        .collect();
    let (slots, tier, memory) = (plan.slots().len(), options.tier, unit.memory);
    Ok(Program { memory, refresh, regions, steps, scratch, slots, code_bytes, tier })
}

/// Cranelift's intermediate code of every function of a plan, as text.
///
/// # Errors
/// As [`compile`].
pub fn clif_text(plan: &Plan, options: &Options) -> Result<String, CodegenError> {
    let emitted = Unit::new(plan, options)?.emit()?;
    let mut text = String::new();
    for (name, _, function) in &emitted.functions {
        // Writing to a string does not fail.
        let _ = writeln!(text, "; {name}\n{function}");
    }
    Ok(text)
}

/// The machine code of every function of a plan, as text.
///
/// # Errors
/// As [`compile`].
pub fn asm_text(plan: &Plan, options: &Options) -> Result<String, CodegenError> {
    let mut unit = Unit::new(plan, options)?;
    let emitted = unit.emit()?;
    let mut text = String::new();
    for (name, _, function) in emitted.functions {
        let mut context = Context::for_function(function);
        context.set_disasm(true);
        let code = context
            .compile(unit.module.isa(), &mut Default::default())
            .map_err(|error| failed(&name, &error.inner))?;
        let assembly = code.vcode.as_deref().unwrap_or_default();
        let _ = writeln!(text, "; {name}\n{assembly}");
    }
    for (name, _, code) in &unit.wide {
        let _ = writeln!(text, "; {name}\n{}", code.text());
    }
    Ok(text)
}

pub(crate) fn failed(step: &str, error: &dyn std::fmt::Display) -> CodegenError {
    CodegenError::Step { step: step.to_owned(), reason: error.to_string() }
}

/// A wide function for the code that calls it.
fn imported(module: &mut JITModule, e: &mut Emitter<'_, '_>, (id, shape): (FuncId, Shape)) -> Wide {
    Wide { shape, function: module.declare_func_in_func(id, e.b.func) }
}

/// All functions of a plan, before compilation.
struct Emitted {
    functions: Vec<(String, FuncId, Function)>,
    refresh: FuncId,
    regions: [FuncId; Region::ALL.len()],
    steps: Vec<FuncId>,
    scratch: FuncId,
}

/// What emission needs.
struct Unit<'p> {
    plan: &'p Plan,
    kernels: &'static Kernels,
    target: Target,
    module: JITModule,
    memory: CodeMemory,
    builder: FunctionBuilderContext,
    tier: Tier,
    /// Wide functions.
    wide: Vec<(String, FuncId, Code)>,
}

fn isa(tier: Tier) -> Result<OwnedTargetIsa, CodegenError> {
    let host = |error: &dyn std::fmt::Display| CodegenError::Host(error.to_string());
    let mut flags = settings::builder();
    for (name, value) in [
        ("opt_level", "speed"),
        ("is_pic", "false"),
        ("use_colocated_libcalls", "false"),
        ("enable_verifier", if cfg!(debug_assertions) { "true" } else { "false" }),
    ] {
        flags.set(name, value).map_err(|error| host(&error))?;
    }
    let mut builder = cranelift_native::builder().map_err(|error| host(&error))?;
    if tier == Tier::Portable && cfg!(target_arch = "x86_64") {
        for feature in [
            "has_avx",
            "has_avx2",
            "has_fma",
            "has_avx512f",
            "has_avx512vl",
            "has_avx512dq",
            "has_avx512bitalg",
            "has_avx512vbmi",
            "has_bmi1",
            "has_bmi2",
            "has_lzcnt",
        ] {
            builder.set(feature, "false").map_err(|error| host(&error))?;
        }
    }
    builder.finish(settings::Flags::new(flags)).map_err(|error| host(&error))
}

impl<'p> Unit<'p> {
    fn new(plan: &'p Plan, options: &Options) -> Result<Unit<'p>, CodegenError> {
        if !options.tier.is_supported() {
            return Err(CodegenError::Tier(options.tier, Tier::detect()));
        }
        let isa = isa(options.tier)?;
        let target = Target {
            fused: options.tier != Tier::Portable,
            call_conv: CallConv::triple_default(isa.triple()),
        };
        let names = cranelift_module::default_libcall_names();
        let memory = CodeMemory::new();
        let mut module = JITBuilder::with_isa(isa, names);
        module.memory_provider(Box::new(memory.clone()));
        let module = JITModule::new(module);
        let builder = FunctionBuilderContext::new();
        let (kernels, tier) = (kernels(options.tier), options.tier);
        Ok(Unit { plan, kernels, target, module, memory, builder, tier, wide: Vec::new() })
    }

    fn signature(&self, words: usize, result: bool) -> Signature {
        let mut signature = Signature::new(self.target.call_conv);
        signature.params.extend((0..words).map(|_| AbiParam::new(I64)));
        if result {
            signature.returns.push(AbiParam::new(I64));
        }
        signature
    }

    fn declare(&mut self, name: &str, signature: &Signature) -> Result<FuncId, CodegenError> {
        self.module
            .declare_function(name, Linkage::Local, signature)
            .map_err(|error| failed(name, &error))
    }

    /// A function of that signature whose parameters follow the frame.
    fn function(
        &mut self,
        signature: Signature,
        slots: BTreeSet<SlotId>,
        body: impl FnOnce(&mut JITModule, &mut Emitter<'_, '_>, &[Value]) -> Option<Value>,
    ) -> Function {
        let mut function = Function::with_name_signature(Default::default(), signature);
        let mut builder = FunctionBuilder::new(&mut function, &mut self.builder);
        let (mut emitter, params) = Emitter::begin(&mut builder, self.target, slots);
        let result = body(&mut self.module, &mut emitter, &params);
        emitter.b.ins().return_(result.as_slice());
        builder.finalize(self.module.isa().frontend_config());
        function
    }

    fn emit(&mut self) -> Result<Emitted, CodegenError> {
        let plan = self.plan;
        let mut functions = Vec::new();
        let mut steps: Vec<FuncId> = Vec::with_capacity(plan.steps().len());
        let step_signature = self.signature(3, false);
        for (index, step) in plan.steps().iter().enumerate() {
            let tail = self.epilogue(index, step, &mut functions)?;
            let name = format!("step{index}");
            let id = self.declare(&name, &step_signature)?;
            let wide = match &step.kernel {
                Kernel::Loops(nests) => self.wide_of_loops(index, step, nests)?,
                Kernel::Primitive(_) | Kernel::AllReduce { .. } => Vec::new(),
            };
            let function = self.step(index, step, tail, wide, step_signature.clone());
            functions.push((format!("{name} {}", step.name), id, function));
            steps.push(id);
        }
        let mut in_order = |name: &str, members: &dyn Fn(&Step) -> bool| {
            let signature = self.signature(2, false);
            let id = self.declare(name, &signature)?;
            let function = self.in_order(members, &steps, signature);
            functions.push((name.to_owned(), id, function));
            Ok(id)
        };
        let refresh = in_order("refresh", &|step| step.lasting)?;
        let mut regions = [FuncId::from_u32(0); Region::ALL.len()];
        for region in Region::ALL {
            regions[region as usize] =
                in_order(region.name(), &|step| step.region == region && !step.lasting)?;
        }
        let signature = self.signature(1, true);
        let scratch = self.declare("scratch", &signature)?;
        let function = self.scratch(signature);
        functions.push(("scratch".to_owned(), scratch, function));
        Ok(Emitted { functions, refresh, regions, steps, scratch })
    }

    /// The wide functions of a step's nests.
    fn wide_of_loops(
        &mut self,
        index: usize,
        step: &Step,
        nests: &[LoopNest],
    ) -> Result<Vec<Option<(FuncId, Shape)>>, CodegenError> {
        let partials = loops::in_partials(nests, step.serial);
        let all = nests.iter().zip(&partials).enumerate();
        all.map(|(at, (nest, partial))| {
            self.wide(&format!("step{index}.wide{at}"), step, nest, partial, false)
        })
        .collect()
    }

    /// The wide function of a nest, if the tier has wide vectors and the nest a form.
    fn wide(
        &mut self,
        name: &str,
        step: &Step,
        nest: &LoopNest,
        partial: &[bool],
        epilogue: bool,
    ) -> Result<Option<(FuncId, Shape)>, CodegenError> {
        let offered = match self.tier {
            Tier::Portable | Tier::Avx2 => false,
            Tier::Avx512 | Tier::Avx512Bf16 | Tier::Avx512Amx => {
                self.target.call_conv == CallConv::SystemV
            }
        };
        let facts = Facts::of(nest);
        let shape = Shape::of(nest, &facts, partial, epilogue).filter(|_| offered);
        let Some((shape, code)) =
            shape.and_then(|shape| wide::compile(nest, &facts, &shape).map(|code| (shape, code)))
        else {
            return Ok(None);
        };
        let signature = self.signature(1, false);
        let id = self.declare(name, &signature)?;
        self.wide.push((format!("{name} {}", step.name), id, code));
        Ok(Some((id, shape)))
    }

    /// The function that finishes blocks of a product.
    fn epilogue(
        &mut self,
        index: usize,
        step: &Step,
        functions: &mut Vec<(String, FuncId, Function)>,
    ) -> Result<Option<FuncId>, CodegenError> {
        let Kernel::Primitive(primitive) = &step.kernel else { return Ok(None) };
        let Some(nest) = primitive.epilogue() else { return Ok(None) };
        let name = format!("epilogue{index}");
        let signature = self.signature(8, false);
        let id = self.declare(&name, &signature)?;
        let slots = loops::slots(std::slice::from_ref(nest)).collect();
        let none = vec![false; nest.writes.len()];
        let wide = self.wide(&format!("{name}.wide"), step, nest, &none, true)?;
        let function = self.function(signature, slots, |module, e, params| {
            let wide = wide.map(|wide| imported(module, e, wide));
            epilogue::emit(e, nest, wide.as_ref(), params);
            None
        });
        functions.push((format!("{name} {}", step.name), id, function));
        Ok(Some(id))
    }

    /// The function of a step: `(frame, thread, threads)`.
    fn step(
        &mut self,
        index: usize,
        step: &Step,
        tail: Option<FuncId>,
        wide: Vec<Option<(FuncId, Shape)>>,
        signature: Signature,
    ) -> Function {
        let kernels = self.kernels;
        let slots = match &step.kernel {
            Kernel::Loops(nests) => loops::slots(nests).collect(),
            Kernel::Primitive(primitive) => {
                let (reads, writes) = places::of(primitive);
                let results = primitive
                    .epilogue()
                    .into_iter()
                    .flat_map(|nest| loops::slots(std::slice::from_ref(nest)));
                let places = reads.into_iter().chain(writes).map(|place| place.slot);
                places.chain(results).collect()
            }
            Kernel::AllReduce { .. } => BTreeSet::new(),
        };
        self.function(signature, slots, |module, e, params| {
            let (thread, threads) = (params[0], params[1]);
            match &step.kernel {
                Kernel::Loops(nests) => {
                    let wide: Vec<Option<Wide>> = wide
                        .into_iter()
                        .map(|one| one.map(|one| imported(module, e, one)))
                        .collect();
                    loops::step(e, nests, step.serial, &wide, thread, threads);
                }
                Kernel::Primitive(primitive) => {
                    let entry = primitives::entry(kernels, primitive);
                    let tail = match tail {
                        Some(id) => {
                            let function = module.declare_func_in_func(id, e.b.func);
                            e.b.ins().func_addr(I64, function)
                        }
                        None => e.int(0),
                    };
                    let block = primitives::arguments(e, primitive, index, tail);
                    let partials = primitive.epilogue().and_then(Partials::of);
                    primitives::call(e, entry, &block, partials.as_ref(), thread, threads);
                }
                Kernel::AllReduce { .. } => schedule::collective(e, index, thread, threads),
            }
            None
        })
    }

    /// The function that runs some steps one after another: `(frame, thread)`.
    fn in_order(
        &mut self,
        is_member: &dyn Fn(&Step) -> bool,
        ids: &[FuncId],
        signature: Signature,
    ) -> Function {
        let all = self.plan.steps().iter().enumerate();
        let steps: Vec<(usize, &Step)> = all.filter(|(_, step)| is_member(step)).collect();
        let members: Vec<&Step> = steps.iter().map(|&(_, step)| step).collect();
        let barriers = schedule::barriers(&members, self.kernels);
        self.function(signature, BTreeSet::new(), |module, e, params| {
            let thread = params[0];
            let threads = e.field(Frame::THREADS);
            for (&(index, _), barrier) in steps.iter().zip(barriers) {
                if barrier {
                    e.barrier(threads);
                }
                let function = module.declare_func_in_func(ids[index], e.b.func);
                let frame = e.frame;
                e.b.ins().call(function, &[frame, thread, threads]);
            }
            // Whoever comes next finds the region's results.
            if !steps.is_empty() {
                e.barrier(threads);
            }
            None
        })
    }

    /// The function that gives the bytes of scratch.
    fn scratch(&mut self, signature: Signature) -> Function {
        let (plan, kernels) = (self.plan, self.kernels);
        self.function(signature, BTreeSet::new(), |_, e, _| {
            let mut most = e.int(0);
            for (index, step) in plan.steps().iter().enumerate() {
                let bytes = match &step.kernel {
                    Kernel::Loops(nests) => match loops::scratch(nests) {
                        Affine::ZERO => continue,
                        bytes => e.affine(bytes),
                    },
                    Kernel::Primitive(primitive) => {
                        let none = e.int(0);
                        let block = primitives::arguments(e, primitive, index, none);
                        let entry = primitives::entry(kernels, primitive);
                        let partials = primitive.epilogue().and_then(Partials::of);
                        primitives::scratch(e, entry, &block, partials.as_ref())
                    }
                    Kernel::AllReduce { .. } => continue,
                };
                most = e.max(most, bytes);
            }
            Some(most)
        })
    }
}
