//! What a step is given beside its batch: the learning rate by its schedule, and the optimizer's numbers.

use super::Settings;
use crate::cli::{RateArgs, ScheduleKind};
use serde::{Deserialize, Serialize};

/// The optimizer's numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// Learning rate at its highest.
    pub lr: f64,
    /// Momentum.
    pub momentum: f64,
    /// Decay of Adam's mean.
    pub beta1: f64,
    /// Decay of Adam's mean of squares.
    pub beta2: f64,
    /// Adam's term against division by zero.
    pub epsilon: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Largest norm of the gradients; none for any.
    pub grad_clip_norm: Option<f64>,
    /// `constant`, `step` or `cosine`.
    pub schedule: String,
    /// Epochs between two steps of the step schedule.
    pub step_epochs: u64,
    /// Factor of each of its steps.
    pub gamma: f64,
    /// Steps in which the rate rises.
    pub warmup_steps: u64,
}

impl Rate {
    /// As the command line says.
    #[must_use]
    pub fn of(args: &RateArgs) -> Rate {
        let schedule = match args.lr_schedule {
            ScheduleKind::Constant => "constant",
            ScheduleKind::Step => "step",
            ScheduleKind::Cosine => "cosine",
        };
        Rate {
            lr: args.lr,
            momentum: args.momentum,
            beta1: args.beta1,
            beta2: args.beta2,
            epsilon: args.epsilon,
            weight_decay: args.weight_decay,
            grad_clip_norm: args.grad_clip_norm,
            schedule: schedule.to_owned(),
            step_epochs: args.lr_step_epochs,
            gamma: args.lr_gamma,
            warmup_steps: args.warmup_steps,
        }
    }

    /// The inputs of the step that makes the `update`-th update, counted from 1.
    #[must_use]
    pub fn inputs(&self, lr: f64, update: u64) -> [(&'static str, f64); 9] {
        let update = update as f64;
        [
            ("lr", lr),
            ("momentum", self.momentum),
            ("beta1", self.beta1),
            ("beta2", self.beta2),
            ("epsilon", self.epsilon),
            ("weight_decay", self.weight_decay),
            ("grad_clip_norm", self.grad_clip_norm.unwrap_or(f64::INFINITY)),
            ("bias_correction1", 1.0 - self.beta1.powf(update)),
            ("bias_correction2", 1.0 - self.beta2.powf(update)),
        ]
    }
}

/// The learning rate of every step.
#[derive(Debug, Clone)]
pub struct Schedule {
    rate: Rate,
    steps_per_epoch: u64,
    total: u64,
}

impl Schedule {
    /// The schedule of a run with so many steps an epoch.
    #[must_use]
    pub fn new(settings: &Settings, steps_per_epoch: u64) -> Schedule {
        Schedule {
            rate: settings.rate.clone(),
            steps_per_epoch: steps_per_epoch.max(1),
            total: steps_per_epoch.saturating_mul(settings.epochs),
        }
    }

    /// The learning rate of this step, counted from 0.
    #[must_use]
    pub fn rate(&self, step: u64) -> f64 {
        let Rate { lr, schedule, step_epochs, gamma, warmup_steps, .. } = &self.rate;
        if step < *warmup_steps {
            return lr * (step + 1) as f64 / *warmup_steps as f64;
        }
        match schedule.as_str() {
            "step" => {
                let times = step / self.steps_per_epoch / (*step_epochs).max(1);
                lr * gamma.powf(times as f64)
            }
            "cosine" => {
                let length = self.total.saturating_sub(*warmup_steps).max(1);
                let done = (step - warmup_steps).min(length) as f64 / length as f64;
                lr * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
            }
            _ => *lr,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: &str, warmup_steps: u64) -> Schedule {
        let rate = Rate {
            lr: 1.0,
            momentum: 0.9,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            grad_clip_norm: None,
            schedule: kind.to_owned(),
            step_epochs: 2,
            gamma: 0.1,
            warmup_steps,
        };
        Schedule { rate, steps_per_epoch: 5, total: 20 }
    }

    #[test]
    fn rates_follow_their_schedule() {
        let constant = schedule("constant", 4);
        let rates: Vec<f64> = (0..6).map(|step| constant.rate(step)).collect();
        assert_eq!(rates, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]);
        let steps = schedule("step", 0);
        assert_eq!((steps.rate(9), steps.rate(10)), (1.0, 0.1));
        let cosine = schedule("cosine", 10);
        assert_eq!((cosine.rate(9), cosine.rate(10)), (1.0, 1.0));
        assert!((cosine.rate(15) - 0.5).abs() < 1e-12 && cosine.rate(20) < 1e-12);
        assert!((10..20).all(|step| cosine.rate(step) >= cosine.rate(step + 1)));
    }

    #[test]
    fn corrections_are_those_of_the_update() {
        let inputs = schedule("constant", 0).rate.inputs(0.5, 2);
        let find = |name: &str| inputs.iter().find(|(other, _)| *other == name).unwrap().1;
        assert_eq!(find("lr"), 0.5);
        assert!((find("bias_correction1") - (1.0 - 0.81)).abs() < 1e-12);
        assert_eq!(find("grad_clip_norm"), f64::INFINITY);
    }
}
