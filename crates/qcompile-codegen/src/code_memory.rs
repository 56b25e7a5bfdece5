//! The memory of compiled code, which stays when the tables of the code generator are gone.

use cranelift_jit::{BranchProtection, JITMemoryKind, JITMemoryProvider, SystemMemoryProvider};
use cranelift_module::ModuleResult;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Memory that a module puts code into and a program runs it from. The module alone would keep its tables with it, whose
/// pieces lie all over the heap and hold its pages.
#[derive(Clone)]
pub(crate) struct CodeMemory(Arc<Mutex<SystemMemoryProvider>>);

impl CodeMemory {
    pub(crate) fn new() -> CodeMemory {
        CodeMemory(Arc::new(Mutex::new(SystemMemoryProvider::new())))
    }

    fn provider(&self) -> MutexGuard<'_, SystemMemoryProvider> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl JITMemoryProvider for CodeMemory {
    fn allocate(&mut self, size: usize, align: u64, kind: JITMemoryKind) -> io::Result<*mut u8> {
        self.provider().allocate(size, align, kind)
    }

    unsafe fn free_memory(&mut self) {
        // SAFETY: granted by the caller: nobody runs the code or will.
        unsafe { self.provider().free_memory() }
    }

    fn finalize(&mut self, branch_protection: BranchProtection) -> ModuleResult<()> {
        self.provider().finalize(branch_protection)
    }
}
