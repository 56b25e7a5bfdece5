//! Recurrent layers: the same on every tier, for every split, and nothing beside the result. What they compute is
//! compared with the reference by the tests of the whole workspace.

use super::check::{ALONE, Guarded, Random, assert_close, run, scratch, tables};
use crate::KernelId;
use crate::args::{
    ActivationArgs, ActivationKind, RecurrenceArgs, RecurrenceGradArgs, RecurrenceShape,
    RecurrentCell,
};
use std::ptr::{null, null_mut};

const CELLS: [(RecurrentCell, usize, usize, usize); 4] = [
    (RecurrentCell::Lstm, 4, 6, 4),
    (RecurrentCell::Gru, 3, 4, 3),
    (RecurrentCell::LinearGru, 3, 5, 4),
    (RecurrentCell::Rnn, 1, 1, 1),
];

#[test]
fn tiers_and_splits_agree() {
    let mut random = Random(41);
    for (cell, gates, sections, gradients) in CELLS {
        for (steps, batch, hidden, reverse) in
            [(3, 1, 1, 0), (2, 29, 35, 1), (4, 70, 16, 0), (0, 3, 5, 0), (2, 9, 33, 1)]
        {
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
            let x = random.reals(steps * batch * gates * hidden);
            let r = random.reals(gates * hidden * hidden);
            let r: Vec<f32> = r.iter().map(|r| r * 0.3).collect();
            let (h0, c0) = (random.reals(batch * hidden), random.reals(batch * hidden));
            let (bias, peepholes) = (random.reals(hidden), random.reals(3 * hidden));
            let dh = random.reals(steps * batch * hidden);
            let lengths: Vec<i64> = (0..batch).map(|row| (row % (steps + 2)) as i64).collect();
            let mut first: Option<(Vec<f64>, Vec<f64>)> = None;
            for table in tables() {
                let results = [1, 3, ALONE].map(|pieces| {
                    let mut y = Guarded::new(sections * (steps + 1) * batch * hidden);
                    let mut args = RecurrenceArgs {
                        x: x.as_ptr(),
                        r: r.as_ptr(),
                        h0: h0.as_ptr(),
                        c0: c0.as_ptr(),
                        bias: bias.as_ptr(),
                        peepholes: peepholes.as_ptr(),
                        lengths: lengths.as_ptr(),
                        y: y.as_mut_ptr(),
                        shape,
                        scratch: null_mut(),
                    };
                    let mut held = scratch(table, KernelId::Recurrence, &args);
                    args.scratch = held.as_mut_ptr().cast();
                    run(table, KernelId::Recurrence, &args, pieces);
                    let y = y.checked("recurrence");
                    let mut dx = Guarded::new((steps + 1) * batch * gradients * hidden);
                    let mut args = RecurrenceGradArgs {
                        y: y.as_ptr(),
                        r: r.as_ptr(),
                        dh: dh.as_ptr(),
                        dc: null(),
                        peepholes: peepholes.as_ptr(),
                        lengths: lengths.as_ptr(),
                        dx: dx.as_mut_ptr(),
                        shape,
                        scratch: null_mut(),
                    };
                    let mut held = scratch(table, KernelId::RecurrenceGrad, &args);
                    args.scratch = held.as_mut_ptr().cast();
                    run(table, KernelId::RecurrenceGrad, &args, pieces);
                    (y, dx.checked("its gradient"))
                });
                assert_eq!(results[0], results[1], "{cell:?}");
                assert_eq!(results[0], results[2], "{cell:?}");
                let [(y, dx), ..] = &results;
                let wide = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect();
                let (y0, dx0) = first.get_or_insert_with(|| (wide(y), wide(dx)));
                assert_close(y, y0, 1e-5, "recurrence");
                assert_close(dx, dx0, 1e-4, "its gradient");
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
