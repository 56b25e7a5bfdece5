//! How far a run is, and what it must have in common with the run that goes on from there.

use super::Rate;
use crate::error::{Code, Error, Result};
use serde::{Deserialize, Serialize};

/// What makes a run what it is, beside its plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Passes over the data in all.
    pub epochs: u64,
    /// Samples in a step, over all workers.
    pub batch_size: usize,
    /// Workers that share them.
    pub workers: usize,
    /// Seed of the order of samples.
    pub seed: u64,
    /// Whether the order is shuffled.
    pub shuffle: bool,
    /// Whether a short last batch is left out.
    pub drop_last: bool,
    /// Digest of the samples.
    pub data: String,
    /// Digest of the plan.
    pub plan: String,
    /// Rate, schedule and moments.
    pub rate: Rate,
}

/// How far a run is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Epochs done.
    pub epochs: u64,
    /// Steps done, refused ones included.
    pub steps: u64,
    /// Steps that changed the parameters.
    pub updates: u64,
    /// What the run is.
    pub settings: Settings,
}

/// What differs between two runs, each as a line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Differences(pub Vec<String>);

impl Progress {
    /// A run at its beginning.
    #[must_use]
    pub fn new(settings: Settings) -> Progress {
        Progress { epochs: 0, steps: 0, updates: 0, settings }
    }

    /// As text, for a checkpoint.
    ///
    /// # Errors
    /// Only by a defect.
    pub fn to_json(&self) -> Result<String> {
        serde_json::to_string(self).map_err(|e| Error::new(Code::Internal, e.to_string()))
    }

    /// The progress that a checkpoint holds.
    ///
    /// # Errors
    /// [`Code::CheckpointFormat`].
    pub fn of_json(text: &str) -> Result<Progress> {
        serde_json::from_str(text).map_err(|e| {
            Error::new(Code::CheckpointFormat, format!("the checkpoint's progress is damaged: {e}"))
        })
    }

    /// Refuses to go on as a run that would not have come to this state.
    ///
    /// # Errors
    /// Usage, with everything that differs.
    pub fn check(&self, settings: &Settings) -> Result<()> {
        let Differences(lines) = Differences::between(&self.settings, settings);
        if lines.is_empty() {
            return Ok(());
        }
        let error = Error::usage("the run in the checkpoint was another one");
        let error = lines.into_iter().fold(error, Error::at);
        Err(error.help("go on with what it had, or begin anew in another --checkpoint folder"))
    }
}

impl Differences {
    /// What differs. The number of epochs may, unless the schedule depends on it: training longer is no other run.
    #[must_use]
    pub fn between(was: &Settings, is: &Settings) -> Differences {
        let mut lines = Vec::new();
        let mut compare = |flag: &str, was: String, is: String| {
            if was != is {
                lines.push(format!("{flag}: {was} in the checkpoint, {is} now"));
            }
        };
        if was.rate.schedule == "cosine" || is.rate.schedule == "cosine" {
            compare("--epochs", was.epochs.to_string(), is.epochs.to_string());
        }
        compare("--batch-size", was.batch_size.to_string(), is.batch_size.to_string());
        compare("--workers", was.workers.to_string(), is.workers.to_string());
        compare("--seed", was.seed.to_string(), is.seed.to_string());
        compare("--no-shuffle", (!was.shuffle).to_string(), (!is.shuffle).to_string());
        compare("--drop-last", was.drop_last.to_string(), is.drop_last.to_string());
        compare("the samples of --data", was.data.clone(), is.data.clone());
        compare("the plan", was.plan.clone(), is.plan.clone());
        let (a, b) = (&was.rate, &is.rate);
        compare("--lr", a.lr.to_string(), b.lr.to_string());
        compare("--momentum", a.momentum.to_string(), b.momentum.to_string());
        compare("--beta1", a.beta1.to_string(), b.beta1.to_string());
        compare("--beta2", a.beta2.to_string(), b.beta2.to_string());
        compare("--epsilon", a.epsilon.to_string(), b.epsilon.to_string());
        compare("--weight-decay", a.weight_decay.to_string(), b.weight_decay.to_string());
        let clip = |clip: Option<f64>| clip.map_or_else(|| "none".to_owned(), |x| x.to_string());
        compare("--grad-clip-norm", clip(a.grad_clip_norm), clip(b.grad_clip_norm));
        compare("--lr-schedule", a.schedule.clone(), b.schedule.clone());
        compare("--lr-step-epochs", a.step_epochs.to_string(), b.step_epochs.to_string());
        compare("--lr-gamma", a.gamma.to_string(), b.gamma.to_string());
        compare("--warmup-steps", a.warmup_steps.to_string(), b.warmup_steps.to_string());
        Differences(lines)
    }
}

/// A digest of bytes, to tell two things apart (64-bit FNV-1a over words).
#[must_use]
pub fn digest<'b>(parts: impl IntoIterator<Item = &'b [u8]>) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |word: u64| {
        hash = (hash ^ word).wrapping_mul(0x0100_0000_01b3);
        hash ^= hash >> 29;
    };
    for part in parts {
        let (words, rest) = part.as_chunks::<8>();
        words.iter().for_each(|&word| add(u64::from_le_bytes(word)));
        rest.iter().for_each(|&byte| add(u64::from(byte)));
        add(part.len() as u64);
    }
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_tell_parts_apart() {
        let digest = |parts: &[&[u8]]| digest(parts.iter().copied());
        assert_ne!(digest(&[b"ab", b"c"]), digest(&[b"a", b"bc"]));
        assert_ne!(digest(&[b"12345678"]), digest(&[b"12345679"]));
        assert_eq!(digest(&[b"abc"]), digest(&[b"abc"]));
    }
}
