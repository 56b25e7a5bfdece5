//! Raw memory of a worker: one zeroed block, cut into pieces that are aligned to 64 bytes.

use crate::RuntimeError;
use memmap2::MmapMut;
use std::ptr::NonNull;

/// Alignment of every piece.
pub(crate) const ALIGNMENT: usize = 64;
/// Blocks from this size on ask for huge pages, and begin at one.
const HUGE_PAGE: usize = 2 << 20;

/// A block of memory. It is reached through raw pointers only, so that threads may share it.
#[derive(Debug)]
pub(crate) struct Arena {
    start: *mut u8,
    bytes: usize,
    /// The memory, if there is any.
    _mapping: Option<MmapMut>,
}

// SAFETY: an arena owns its block; those who use its pointers see to it that accesses do not conflict.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    /// A block of zeros. The system gives its pages when they are first written: huge ones, and by the thread that does so.
    pub(crate) fn new(bytes: usize, limit: usize) -> Result<Arena, RuntimeError> {
        if bytes == 0 {
            return Ok(Arena {
                start: NonNull::<Line>::dangling().as_ptr().cast(),
                bytes,
                _mapping: None,
            });
        }
        if bytes > limit {
            return Err(RuntimeError::Memory { bytes, limit });
        }
        let refused = || RuntimeError::Refused { bytes };
        let huge = bytes >= HUGE_PAGE;
        let room = if huge { bytes.checked_add(HUGE_PAGE).ok_or_else(refused)? } else { bytes };
        let mut mapping = MmapMut::map_anon(room).map_err(|_| refused())?;
        let start = mapping.as_mut_ptr();
        let skip = if huge { start.align_offset(HUGE_PAGE) } else { 0 };
        #[cfg(target_os = "linux")]
        if huge {
            // Whole ones: a rest would take one more. This is advice: without huge pages all is the same, but slower.
            let whole = bytes / HUGE_PAGE * HUGE_PAGE;
            let _ = mapping.advise_range(memmap2::Advice::HugePage, skip, whole);
        }
        Ok(Arena { start: start.wrapping_add(skip), bytes, _mapping: Some(mapping) })
    }

    /// Its size in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The piece that begins at `offset`.
    pub(crate) fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset <= self.bytes(), "an arena's piece begins inside it");
        self.start.wrapping_add(offset)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arena_is_zeroed_aligned_and_refused_where_there_is_no_room() {
        for bytes in [0, 1, 4096, HUGE_PAGE - 1, HUGE_PAGE, 2 * HUGE_PAGE + 100] {
            let arena = Arena::new(bytes, usize::MAX).unwrap();
            let start = arena.at(0);
            let alignment = if bytes < HUGE_PAGE { ALIGNMENT } else { HUGE_PAGE };
            assert_eq!((arena.bytes(), start.addr() % alignment), (bytes, 0));
            // SAFETY: the block has so many bytes, and nobody else has it.
            let block = unsafe { std::slice::from_raw_parts_mut(start, bytes) };
            assert!(block.iter().all(|&byte| byte == 0));
            block.fill(1);
        }
        let limited = Arena::new(101, 100);
        assert!(matches!(limited, Err(RuntimeError::Memory { bytes: 101, limit: 100 })));
        for bytes in [usize::MAX, usize::MAX / 4] {
            let none = Arena::new(bytes, usize::MAX);
            assert!(
                matches!(none, Err(RuntimeError::Refused { bytes: wanted }) if wanted == bytes)
            );
        }
    }
}
