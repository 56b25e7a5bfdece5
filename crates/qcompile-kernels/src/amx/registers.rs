//! The tile registers: who may use them, and how they are set up.

use super::{BLOCK, DEPTH};
use std::arch::asm;
use std::cell::Cell;

/// Whether the CPU has the instructions and the system lets this process use their registers. Asked once.
pub(crate) fn is_supported() -> bool {
    static SUPPORTED: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *SUPPORTED.get_or_init(|| {
        // Leaf 7: AMX-BF16, AMX-TILE, AMX-INT8.
        const WANTED: u32 = 1 << 22 | 1 << 24 | 1 << 25;
        let leaves = std::arch::x86_64::__cpuid(0).eax;
        let has = leaves >= 7 && std::arch::x86_64::__cpuid_count(7, 0).edx & WANTED == WANTED;
        has && is_permitted()
    })
}

/// Asks Linux for the state of the tile registers (Documentation/arch/x86/xstate.rst), which all threads then have.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_PRCTL: usize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: a system call that reads and writes no memory of ours; the kernel clobbers rcx and r11.
    unsafe {
        asm!(
            "syscall",
            inout("rax") result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// What `ldtilecfg` reads: rows and bytes of a row of each tile register.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Configuration {
    /// tmm0 to tmm3 are sums (first block left and right, then the second), tmm4 and tmm5 the left operand's blocks, tmm6
    /// and tmm7 those of the right operand, `depth` words of K each.
    const fn of(depth: usize) -> Configuration {
        let words = (depth * 4) as u16;
        let mut all = Configuration {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        let (bytes, rows) = (&mut all.row_bytes, &mut all.rows);
        let mut at = 0;
        while at < 8 {
            bytes[at] = if at == 4 || at == 5 { words } else { 64 };
            rows[at] = if at >= 6 { depth as u8 } else { BLOCK as u8 };
            at += 1;
        }
        all
    }
}

static CONFIGURATIONS: [Configuration; DEPTH] = {
    let mut all = [const { Configuration::of(1) }; DEPTH];
    let mut at = 0;
    while at < DEPTH {
        all[at] = Configuration::of(at + 1);
        at += 1;
    }
    all
};

thread_local! {
    /// Words of K that this thread's tile registers are configured for.
    static CONFIGURED: Cell<usize> = const { Cell::new(0) };
}

/// Configures the tile registers; their contents are lost.
///
/// # Safety
/// The CPU has tiles, Linux has granted them, and `depth` is from 1 to 16.
#[inline(always)]
pub(super) unsafe fn configure(depth: usize) {
    if CONFIGURED.get() != depth {
        let configuration = &CONFIGURATIONS[depth - 1];
        // SAFETY: reads the 64 bytes of a valid configuration; the CPU has tiles, as the caller grants.
        unsafe { asm!("ldtilecfg [{}]", in(reg) configuration, options(nostack, readonly)) };
        CONFIGURED.set(depth);
    }
}

/// Gives the tile registers back when a kernel ends, so that nobody finds them configured and no one's context switch
/// carries them.
pub(super) struct Release;

impl Drop for Release {
    fn drop(&mut self) {
        if CONFIGURED.get() != 0 {
            // SAFETY: the CPU has the instruction, or nothing would have been configured.
            unsafe { asm!("tilerelease", options(nostack, nomem)) };
            CONFIGURED.set(0);
        }
    }
}
