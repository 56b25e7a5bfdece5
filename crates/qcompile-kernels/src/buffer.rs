//! Buffers of one thread, kept between calls so that a training step allocates nothing.

use std::cell::Cell;

/// What a buffer is for; a thread has one of each.
#[derive(Clone, Copy)]
pub(crate) enum Slot {
    /// A packed or padded left operand.
    Left,
    /// A left operand with words along K side by side.
    Turned,
    /// Blocks of rows that are not where a tile wants them.
    Blocks,
    /// A packed right operand.
    Right,
    /// Products before they are added up to results.
    Products,
    /// Results before they are finished.
    Result,
    /// Rows on their way into a packed panel.
    Staging,
    /// Scales of rows and columns.
    Scales,
    /// Zeros in the place of what lies beyond a border.
    Zeros,
}

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([u8; 64]);

thread_local! {
    static BUFFERS: [Cell<Vec<Line>>; 9] = const { [const { Cell::new(Vec::new()) }; 9] };
}

/// A buffer taken from this thread; it goes back when dropped.
pub(crate) struct Buffer {
    slot: Slot,
    lines: Vec<Line>,
}

impl Buffer {
    /// Takes the buffer with room for `words` 32-bit words, aligned to 64 bytes; contents are arbitrary.
    pub(crate) fn take(slot: Slot, words: usize) -> Buffer {
        let mut lines = BUFFERS.with(|buffers| buffers[slot as usize].take());
        let wanted = words.div_ceil(16);
        if lines.len() < wanted {
            lines.resize(wanted, Line([0; 64]));
        }
        Buffer { slot, lines }
    }

    /// The first word.
    pub(crate) fn words(&mut self) -> *mut u32 {
        self.lines.as_mut_ptr().cast()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        BUFFERS.with(|buffers| buffers[self.slot as usize].set(lines));
    }
}
