//! Recurrent layers: the same on every tier, for every split, and nothing beside the result. What they compute is
//! compared with the reference by the tests of the whole workspace.

use super::check::{ALONE, Guarded, Random, assert_close, fractions, run, scratch, tables};
use crate::args::{
    ActivationArgs, ActivationKind, RecurrenceArgs, RecurrenceGradArgs, RecurrenceShape,
    RecurrentCell,
};
use crate::{KernelId, Kernels};
use std::ptr::{null, null_mut};

const CELLS: [(RecurrentCell, usize, usize, usize); 4] = [
    (RecurrentCell::Lstm, 4, 6, 4),
    (RecurrentCell::Gru, 3, 4, 3),
    (RecurrentCell::LinearGru, 3, 5, 4),
    (RecurrentCell::Rnn, 1, 1, 1),
];

/// The sizes of a case: steps, batch, hidden, and whether it is reversed.
const SIZES: [[usize; 4]; 6] =
    [[3, 1, 1, 0], [2, 29, 35, 1], [4, 70, 16, 0], [0, 3, 5, 0], [2, 9, 33, 1], [2, 100, 70, 0]];

/// A layer and what enters it.
struct Case {
    shape: RecurrenceShape,
    x: Vec<f32>,
    r: Vec<f32>,
    states: [Vec<f32>; 2],
    bias: Vec<f32>,
    peepholes: Vec<f32>,
    dh: Vec<f32>,
    lengths: Vec<i64>,
    /// What codes of gradients are rounded with at random, if they are.
    numbers: Option<Vec<f32>>,
    /// Sizes of the result and of that of the gradient.
    results: [usize; 2],
}

impl Case {
    fn of(
        random: &mut Random,
        (cell, gates, sections, gradients): (RecurrentCell, usize, usize, usize),
        [steps, batch, hidden, reverse]: [usize; 4],
    ) -> Case {
        let activation = |kind| ActivationArgs { kind, alpha: 0.0, beta: 0.0 };
        let shape = RecurrenceShape {
            cell,
            steps,
            batch,
            hidden,
            reverse,
            input_forget: 0,
            clip: 0.75,
            activations: [
                activation(ActivationKind::Sigmoid),
                activation(ActivationKind::Tanh),
                activation(ActivationKind::Tanh),
            ],
        };
        let rows = (steps + 1) * batch * hidden;
        Case {
            shape,
            x: random.reals(steps * batch * gates * hidden),
            r: random.reals(gates * hidden * hidden).iter().map(|r| r * 0.3).collect(),
            states: [random.reals(batch * hidden), random.reals(batch * hidden)],
            bias: random.reals(hidden),
            peepholes: random.reals(3 * hidden),
            dh: random.reals(steps * batch * hidden),
            lengths: (0..batch).map(|row| (row % (steps + 2)) as i64).collect(),
            numbers: None,
            results: [sections * rows, gradients * rows],
        }
    }

    fn forward(&self, table: &Kernels, kernel: KernelId, pieces: usize) -> Vec<f32> {
        let mut y = Guarded::new(self.results[0]);
        let mut args = RecurrenceArgs {
            x: self.x.as_ptr(),
            r: self.r.as_ptr(),
            h0: self.states[0].as_ptr(),
            c0: self.states[1].as_ptr(),
            bias: self.bias.as_ptr(),
            peepholes: self.peepholes.as_ptr(),
            lengths: self.lengths.as_ptr(),
            y: y.as_mut_ptr(),
            shape: self.shape,
            scratch: null_mut(),
        };
        let mut held = scratch(table, kernel, &args);
        args.scratch = held.as_mut_ptr().cast();
        run(table, kernel, &args, pieces);
        y.checked("recurrence")
    }

    fn backward(&self, table: &Kernels, kernel: KernelId, pieces: usize, y: &[f32]) -> Vec<f32> {
        let mut dx = Guarded::new(self.results[1]);
        let mut args = RecurrenceGradArgs {
            numbers: self.numbers.as_ref().map_or(null(), |all| all.as_ptr()),
            y: y.as_ptr(),
            r: self.r.as_ptr(),
            dh: self.dh.as_ptr(),
            dc: null(),
            peepholes: self.peepholes.as_ptr(),
            lengths: self.lengths.as_ptr(),
            dx: dx.as_mut_ptr(),
            shape: self.shape,
            scratch: null_mut(),
        };
        let mut held = scratch(table, kernel, &args);
        args.scratch = held.as_mut_ptr().cast();
        run(table, kernel, &args, pieces);
        dx.checked("its gradient")
    }
}

/// For every case: the result on each tier is the same for every split, and as close to the first tier's as `tolerance`
/// says; so is that of the gradient's kernel on the first tier's result.
fn tiers_and_splits_agree(kernel: KernelId, gradient: KernelId, at_random: bool, tolerance: f64) {
    let mut random = Random(41);
    for cell in CELLS {
        for sizes in SIZES {
            let mut case = Case::of(&mut random, cell, sizes);
            case.numbers = at_random.then(|| fractions(&mut random, sizes[0] * sizes[1] * cell.3));
            let wide = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
            let mut first: Option<[Vec<f32>; 2]> = None;
            for table in tables() {
                let results = [1, 3, ALONE].map(|pieces| {
                    let y = case.forward(table, kernel, pieces);
                    let seen = first.as_ref().map_or(&y, |[y, _]| y);
                    let dx = case.backward(table, gradient, pieces, seen);
                    [y, dx]
                });
                assert_eq!(results[0], results[1], "{cell:?}");
                assert_eq!(results[0], results[2], "{cell:?}");
                let [results, ..] = results;
                let [y, dx] = first.get_or_insert_with(|| results.clone());
                assert_close(&results[0], &wide(y), tolerance, "recurrence");
                assert_close(&results[1], &wide(dx), 10.0 * tolerance, "its gradient");
            }
        }
    }
}

#[test]
fn tiers_and_splits_agree_in_f32() {
    tiers_and_splits_agree(KernelId::Recurrence, KernelId::RecurrenceGrad, false, 1e-5);
}

/// A sum that differs in its last bit may round to another bf16: by 2⁻⁹ of a state, times an element of R.
#[test]
fn tiers_and_splits_agree_in_bf16() {
    tiers_and_splits_agree(KernelId::RecurrenceBf16, KernelId::RecurrenceGradBf16, false, 2e-3);
}

/// To the bit: a state has the same codes on every tier, and so has a gradient of a gate.
#[test]
fn tiers_and_splits_agree_in_int8() {
    for at_random in [false, true] {
        tiers_and_splits_agree(KernelId::RecurrenceI8, KernelId::RecurrenceGradI8, at_random, 0.0);
    }
}

/// A gradient that is infinite or no number is not lost in codes: what comes back to the first state shows it, in its row
/// alone.
#[test]
fn gradients_of_int8_of_strange_values() {
    let mut random = Random(43);
    for cell in CELLS {
        for strange in [f32::INFINITY, f32::NAN] {
            let mut case = Case::of(&mut random, cell, [3, 20, 17, 0]);
            (case.shape.clip, case.lengths) = (f64::INFINITY, vec![3; 20]);
            let (batch, hidden) = (case.shape.batch, case.shape.hidden);
            case.dh[(batch + 7) * hidden + 2] = strange;
            for table in tables() {
                let y = case.forward(table, KernelId::RecurrenceI8, 1);
                let dx = case.backward(table, KernelId::RecurrenceGradI8, 1, &y);
                let columns = case.results[1] / (4 * batch);
                for (row, dx) in dx[3 * batch * columns..].chunks(columns).enumerate() {
                    let lost = dx[..hidden].iter().all(|x| x.is_finite());
                    assert_eq!(lost, row != 7, "{cell:?} row {row} on {}", table.tier);
                }
            }
        }
    }
}

#[test]
fn nothing_is_left_to_do_without_rows_or_units() {
    for table in tables() {
        for (batch, hidden) in [(0, 3), (3, 0)] {
            let activation = ActivationArgs { kind: ActivationKind::Relu, alpha: 0.0, beta: 0.0 };
            let mut y = Guarded::new(0);
            let args = RecurrenceArgs {
                x: null(),
                r: null(),
                h0: null(),
                c0: null(),
                bias: null(),
                peepholes: null(),
                lengths: null(),
                y: y.as_mut_ptr(),
                shape: RecurrenceShape {
                    cell: RecurrentCell::Rnn,
                    steps: 2,
                    batch,
                    hidden,
                    reverse: 0,
                    input_forget: 0,
                    clip: f64::INFINITY,
                    activations: [activation; 3],
                },
                scratch: null_mut(),
            };
            run(table, KernelId::Recurrence, &args, 1);
            y.checked("nothing");
        }
    }
}
