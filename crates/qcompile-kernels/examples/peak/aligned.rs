//! Memory that begins at a cache line.

/// Values that begin at a cache line, as those of a plan do.
pub(crate) struct Aligned<T> {
    values: Vec<T>,
    first: usize,
}

/// So many copies of a value.
pub(crate) fn aligned<T: Copy>(value: T, count: usize) -> Aligned<T> {
    const LINE: usize = 64;
    let values = vec![value; count + LINE];
    let first = values.as_ptr().align_offset(LINE).min(LINE);
    Aligned { values, first }
}

impl<T> std::ops::Deref for Aligned<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.values[self.first..]
    }
}

impl<T> std::ops::DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.values[self.first..]
    }
}
