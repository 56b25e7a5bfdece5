//! Memory that this process has, as the system counts it.

/// Bytes of physical memory, from here on; the program's own file, whose pages the system shares and drops as it likes,
/// is not among them.
#[derive(Debug)]
pub(crate) struct Resident {
    before: usize,
    file: usize,
    /// The most that there ever was, where that cannot be forgotten.
    most: usize,
}

impl Resident {
    /// Begins to count; none where there is no `/proc`.
    pub(crate) fn begin() -> Option<Resident> {
        // Makes the most that there was what there is (proc(5)). Where that is not allowed, an older peak is told from a
        // new one below.
        let _ = std::fs::write("/proc/self/clear_refs", "5");
        let [before, file, most] = [field("VmRSS")?, field("RssFile")?, field("VmHWM")?];
        Some(Resident { before, file, most })
    }

    /// The most since then, less what was there before.
    pub(crate) fn peak(&self) -> Option<usize> {
        let (now, most) = (field("VmRSS")?, field("VmHWM")?);
        let peak = if most > self.most { most } else { now };
        let file = field("RssFile")?.saturating_sub(self.file);
        Some(peak.saturating_sub(self.before).saturating_sub(file))
    }
}

/// A field of `/proc/self/status`, in bytes.
fn field(name: &str) -> Option<usize> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    value.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn what_is_touched_is_resident() {
        let resident = Resident::begin().unwrap();
        let touched = std::hint::black_box(vec![1_u8; 64 << 20]);
        let peak = resident.peak().unwrap();
        assert!(peak >= touched.len(), "{peak}");
    }
}
