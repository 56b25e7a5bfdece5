//! Raw memory of a worker: one zeroed block, cut into pieces that are aligned to 64 bytes.

use crate::RuntimeError;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

/// Alignment of every piece.
pub(crate) const ALIGNMENT: usize = 64;
/// Blocks from this size on ask for huge pages.
const HUGE_PAGE: usize = 2 << 20;

/// A block of memory. It is reached through raw pointers only, so that threads may share it.
#[derive(Debug)]
pub(crate) struct Arena {
    start: NonNull<u8>,
    layout: Option<Layout>,
}

// SAFETY: an arena owns its block; those who use its pointers see to it that accesses do not conflict.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    /// A block of zeros.
    pub(crate) fn new(bytes: usize, limit: usize) -> Result<Arena, RuntimeError> {
        if bytes == 0 {
            return Ok(Arena { start: NonNull::<Line>::dangling().cast(), layout: None });
        }
        let refused = || RuntimeError::Memory { bytes, limit };
        if bytes > limit {
            return Err(refused());
        }
        let alignment = if bytes >= HUGE_PAGE { HUGE_PAGE } else { ALIGNMENT };
        let layout = Layout::from_size_align(bytes, alignment).map_err(|_| refused())?;
        // SAFETY: the size is not 0.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(refused)?;
        #[cfg(target_os = "linux")]
        if bytes >= HUGE_PAGE {
            // SAFETY: the range is the block's own; the call is advice and changes no contents.
            unsafe { libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
        }
        Ok(Arena { start, layout: Some(layout) })
    }

    /// Its size in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.layout.map_or(0, |layout| layout.size())
    }

    /// The piece that begins at `offset`.
    pub(crate) fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset <= self.bytes(), "an arena's piece begins inside it");
        self.start.as_ptr().wrapping_add(offset)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        if let Some(layout) = self.layout {
            // SAFETY: allocated in `new` with this layout, and nobody has pointers into it any more.
            unsafe { dealloc(self.start.as_ptr(), layout) };
        }
    }
}

/// What an empty arena points to: nothing, well aligned.
#[repr(align(64))]
struct Line;

/// Bytes of memory of this machine: the most that a trainer takes.
pub(crate) fn physical_memory() -> usize {
    // SAFETY: no pointers are passed.
    let (pages, size) =
        unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    match (usize::try_from(pages), usize::try_from(size)) {
        (Ok(pages), Ok(size)) if pages > 0 && size > 0 => pages.saturating_mul(size),
        _ => usize::MAX,
    }
}

/// Gives memory that was freed back to the system: what a compiler leaves behind would stay beside the arenas.
pub(crate) fn give_back_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: no pointers are passed, and what is in use stays.
    unsafe {
        libc::malloc_trim(0);
    }
}
