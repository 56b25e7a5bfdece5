//! Measured times that decide something, kept.
//!
//! Measured times differ from run to run, and a plan must not. So a time that a decision rests on is kept in a file (for
//! the command, `qcompile/timings.json` in the user's cache folder) by version, CPU, instruction set, threads and what
//! was measured, and is not measured again: equal input gives equal plans on one machine. Remove the file to measure
//! anew. The times themselves never enter a plan. Without a file, nearly equal times may fall to one side or the other.

use crate::error::Result;
use crate::machine::{cores, cpu_name};
use crate::options::Options;
use crate::output::write_atomically;
use qcompile_passes::quantize::LayerCost;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// What the file holds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Kept {
    /// Milliseconds in high and in low precision, by machine and what was measured.
    #[serde(default)]
    times: BTreeMap<String, [f64; 2]>,
}

impl Kept {
    /// Nothing, if it cannot be read: then it is measured.
    fn read(path: &Path) -> Kept {
        let text = fs::read_to_string(path).ok();
        text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
    }
}

/// Kept times of this machine.
#[derive(Debug, Clone)]
pub(crate) struct Timings {
    path: Option<PathBuf>,
    machine: String,
    kept: Kept,
    changed: bool,
}

impl Timings {
    /// What is known for runs with these options.
    pub(crate) fn load(options: &Options) -> Timings {
        let tier = options.tier.unwrap_or_else(qcompile_kernels::Tier::detect);
        let threads = if options.threads == 0 { cores() } else { options.threads };
        let version = env!("CARGO_PKG_VERSION");
        Timings {
            machine: format!("{version}, {}, {tier}, {threads} threads", cpu_name()),
            kept: options.timings.as_deref().map(Kept::read).unwrap_or_default(),
            path: options.timings.clone(),
            changed: false,
        }
    }

    /// The times of this work, measured if they are not known.
    ///
    /// # Errors
    /// Of measuring.
    pub(crate) fn find_or(
        &mut self,
        work: &str,
        measure: impl FnOnce() -> Result<LayerCost>,
    ) -> Result<LayerCost> {
        let key = format!("{}: {work}", self.machine);
        if let Some(&[high_ms, low_ms]) = self.kept.times.get(&key) {
            return Ok(LayerCost { high_ms, low_ms });
        }
        let cost = measure()?;
        self.kept.times.insert(key, [cost.high_ms, cost.low_ms]);
        self.changed = true;
        Ok(cost)
    }

    /// Adds what is new to the file. One that cannot be written is no error: what it would spare is measured again.
    pub(crate) fn save(&self) {
        let Some(path) = self.path.as_deref().filter(|_| self.changed) else { return };
        // Another process may have added times meanwhile: the file's own stand.
        let mut all = self.kept.clone();
        all.times.extend(Kept::read(path).times);
        let folder = path.parent().is_none_or(|folder| fs::create_dir_all(folder).is_ok());
        if let (true, Ok(text)) = (folder, serde_json::to_string_pretty(&all)) {
            let _ = write_atomically(path, text.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_times_come_back_and_junk_is_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/timings.json");
        let options = Options { timings: Some(path.clone()), ..Options::default() };
        let cost = |high_ms| LayerCost { high_ms, low_ms: 1.0 / 3.0 };
        let mut timings = Timings::load(&options);
        let mut late = timings.clone();
        assert_eq!(timings.find_or("a", || Ok(cost(0.1))).unwrap(), cost(0.1));
        timings.save();
        assert_eq!(late.find_or("a", || Ok(cost(9.0))).unwrap(), cost(9.0));
        late.find_or("b", || Ok(cost(2.0))).unwrap();
        late.save();
        let mut both = Timings::load(&options);
        let known = || panic!("it is kept");
        assert_eq!(both.find_or("a", known).unwrap(), cost(0.1));
        assert_eq!(both.find_or("b", known).unwrap(), cost(2.0));
        let mut other = Timings::load(&Options { threads: 77, ..options.clone() });
        assert_eq!(other.find_or("a", || Ok(cost(5.0))).unwrap(), cost(5.0));
        fs::write(&path, "junk").unwrap();
        assert_eq!(Timings::load(&options).kept, Kept::default());
    }
}
