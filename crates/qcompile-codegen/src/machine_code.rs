//! Functions as machine code, compiled side by side.

use crate::CodegenError;
use crate::program::failed;
use cranelift_codegen::Context;
use cranelift_codegen::control::ControlPlane;
use cranelift_codegen::ir::Function;
use cranelift_codegen::isa::TargetIsa;
use cranelift_module::{FuncId, ModuleReloc};
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Threads that compile at most: each holds the tables of the function that it is at.
const MOST_THREADS: usize = 16;

/// A function before it has an address.
pub(crate) struct MachineCode {
    pub(crate) bytes: Vec<u8>,
    pub(crate) alignment: u64,
    pub(crate) relocations: Vec<ModuleReloc>,
}

/// Compiles functions on the cores that this process may use. The order is kept: the code does not depend on how many
/// there are.
///
/// # Errors
/// Of the first function that cannot be compiled.
pub(crate) fn compile(
    isa: &dyn TargetIsa,
    functions: &[(String, FuncId, Function)],
) -> Result<Vec<MachineCode>, CodegenError> {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads = cores.min(MOST_THREADS).min(functions.len());
    let next = Mutex::new(functions.iter().enumerate());
    let some = || {
        let mut context = Context::new();
        let mut compiled = Vec::new();
        loop {
            let next = next.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((at, (name, id, function))) = next else { return compiled };
            context.clear();
            context.func.clone_from(function);
            compiled.push((at, one(&mut context, isa, name, *id)));
        }
    };
    let mut all = thread::scope(|scope| {
        // A thread that the system does not give is done without.
        let other = |_| thread::Builder::new().spawn_scoped(scope, some).ok();
        let others: Vec<_> = (1..threads).filter_map(other).collect();
        let mut all = some();
        for other in others {
            match other.join() {
                Ok(compiled) => all.extend(compiled),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        all
    });
    all.sort_by_key(|(at, _)| *at);
    all.into_iter().map(|(_, compiled)| compiled).collect()
}

fn one(
    context: &mut Context,
    isa: &dyn TargetIsa,
    name: &str,
    id: FuncId,
) -> Result<MachineCode, CodegenError> {
    let mut control = ControlPlane::default();
    let code = context.compile(isa, &mut control).map_err(|error| failed(name, &error.inner))?;
    let (bytes, alignment) = (code.code_buffer().to_vec(), u64::from(code.buffer.alignment));
    let alignment =
        alignment.max(u64::from(isa.function_alignment().minimum)).max(isa.symbol_alignment());
    let relocations = context.compiled_code().map_or_else(Vec::new, |code| {
        let relocations = code.buffer.relocs().iter();
        relocations.map(|each| ModuleReloc::from_mach_reloc(each, &context.func, id)).collect()
    });
    Ok(MachineCode { bytes, alignment, relocations })
}
