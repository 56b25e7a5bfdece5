//! A recurrent layer forward.

use super::activation::{activate, clip};
use super::product::{Kind, Operand, Panels, STATE_SCALE, product};
use super::{Rows, runs};
use crate::args::{ActivationArgs, RecurrenceArgs, RecurrentCell};
use crate::buffer::{Buffer, Slot};
use crate::lanes::{Simd, Task};
use std::marker::PhantomData;
use std::slice::{from_raw_parts, from_raw_parts_mut};

pub(super) struct Forward<K> {
    pub(super) args: RecurrenceArgs,
    pub(super) kind: PhantomData<K>,
    pub(super) begin: usize,
    pub(super) end: usize,
}

impl<K: Kind> Task for Forward<K> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for unit in self.begin..self.end {
            let rows = Rows::of::<K, S>(&self.args.shape, unit);
            // SAFETY: the rows exist, and no other unit has them.
            unsafe { self.rows::<S>(&rows) };
        }
    }
}

impl<K: Kind> Forward<K> {
    /// A row of a section of the result.
    ///
    /// # Safety
    /// It exists, and the caller has no other reference to it.
    #[inline(always)]
    #[allow(clippy::mut_from_ref, reason = "the memory is the caller's, not the argument block's")]
    unsafe fn section(&self, section: usize, t: usize, row: usize) -> &mut [f32] {
        let shape = &self.args.shape;
        // SAFETY: granted by the caller.
        unsafe { from_raw_parts_mut(self.args.y.add(shape.at(section, t, row)), shape.hidden) }
    }

    /// A peephole, if there are any.
    #[inline(always)]
    unsafe fn peephole(&self, which: usize) -> Option<&[f32]> {
        let (from, hidden) = (self.args.peepholes, self.args.shape.hidden);
        // SAFETY: the caller grants three rows where the pointer is not null.
        (!from.is_null()).then(|| unsafe { from_raw_parts(from.add(which * hidden), hidden) })
    }

    #[inline(always)]
    unsafe fn rows<S: Simd>(&self, rows: &Rows) {
        let (args, shape) = (&self.args, &self.args.shape);
        let (hidden, stride) = (shape.hidden, Panels::<K::Lanes<S>>::of(shape).columns());
        let states = 1 + usize::from(shape.cell == RecurrentCell::Lstm);
        let sections = match shape.cell {
            RecurrentCell::Lstm => 6,
            RecurrentCell::Gru => 4,
            RecurrentCell::LinearGru => 5,
            RecurrentCell::Rnn => 1,
        };
        let size = rows.padded * stride;
        let mut products = Buffer::take(Slot::Result, shape.gates() * size);
        let mut reset = Buffer::take(Slot::Left, rows.padded * hidden);
        let mut operand = Buffer::take(Slot::Right, Operand::room::<K::Lanes<S>>(shape, rows));
        let products = products.words();
        let reset = reset.words().cast::<f32>();
        let operand = operand.words();
        // SAFETY: rows and sections exist; buffers are as large as they were taken.
        unsafe {
            let start = if shape.reverse == 0 { 0 } else { shape.steps };
            for row in rows.first..rows.first + rows.count {
                for (state, from) in [args.h0, args.c0].into_iter().enumerate().take(states) {
                    let from = from_raw_parts(from.add(row * hidden), hidden);
                    self.section(state, start, row).copy_from_slice(from);
                }
                for section in states..sections {
                    self.section(section, shape.steps, row).fill(0.0);
                }
            }
            let packed = args.scratch.cast::<u32>().cast_const();
            let scale = Some(STATE_SCALE);
            for order in 0..shape.steps {
                let [t, before, after] = shape.step(order);
                let h = args.y.cast_const().add(shape.at(0, before, rows.first));
                let h = Operand::of::<K::Lanes<S>>(shape, rows, h, hidden, scale, None, operand);
                let early = if shape.cell == RecurrentCell::Gru { 2 } else { shape.gates() };
                for gate in (0..early).filter(|&gate| gate != 2 || shape.input_forget == 0) {
                    let out = products.add(gate * size);
                    product::<K::Lanes<S>>(shape, &h, packed, gate, out, false);
                }
                let sums = |gate: usize, row: usize| {
                    let from = products.add(gate * size + row * stride).cast::<f32>();
                    from_raw_parts(from.cast_const(), hidden)
                };
                for local in 0..rows.count {
                    let row = rows.first + local;
                    if !runs(args.lengths, row, t) {
                        for state in 0..states {
                            let from = &*self.section(state, before, row);
                            self.section(state, after, row).copy_from_slice(from);
                        }
                        for section in states..sections {
                            self.section(section, t, row).fill(0.0);
                        }
                        continue;
                    }
                    match shape.cell {
                        RecurrentCell::Lstm => {
                            self.lstm::<S>([t, before, after], row, |gate| sums(gate, local));
                        }
                        RecurrentCell::Rnn => {
                            let h = self.section(0, after, row);
                            self.gate::<S>(h, 0, 0, [t, row], sums(0, local), None);
                        }
                        RecurrentCell::Gru | RecurrentCell::LinearGru => {
                            for gate in 0..2 {
                                let out = self.section(1 + gate, t, row);
                                self.gate::<S>(out, gate, 0, [t, row], sums(gate, local), None);
                            }
                        }
                    }
                    if shape.cell == RecurrentCell::LinearGru {
                        let inner = self.section(4, t, row);
                        let bias = from_raw_parts(args.bias, hidden);
                        for ((to, sum), bias) in inner.iter_mut().zip(sums(2, local)).zip(bias) {
                            *to = sum + bias;
                        }
                        let n = self.section(3, t, row);
                        let r = &*self.section(2, t, row);
                        let peephole = Some((r, &*inner));
                        self.gate::<S>(n, 2, 1, [t, row], &[], peephole);
                        self.mix([t, before, after], row);
                    }
                }
                if shape.cell == RecurrentCell::Gru {
                    for local in 0..rows.count {
                        let row = rows.first + local;
                        let (r, h) = (self.section(2, t, row), self.section(0, before, row));
                        let to = from_raw_parts_mut(reset.add(local * hidden), hidden);
                        for ((to, r), h) in to.iter_mut().zip(&*r).zip(&*h) {
                            *to = r * h;
                        }
                    }
                    let left = Operand::of::<K::Lanes<S>>(
                        shape, rows, reset, hidden, scale, None, operand,
                    );
                    let out = products.add(2 * size);
                    product::<K::Lanes<S>>(shape, &left, packed, 2, out, false);
                    for local in 0..rows.count {
                        let row = rows.first + local;
                        if runs(args.lengths, row, t) {
                            let n = self.section(3, t, row);
                            self.gate::<S>(n, 2, 1, [t, row], sums(2, local), None);
                            self.mix([t, before, after], row);
                        }
                    }
                }
            }
        }
    }

    /// `activation(clip(x + sum + weight · value))` of one gate of one row; an empty sum is zeros.
    #[inline(always)]
    unsafe fn gate<S: Simd>(
        &self,
        out: &mut [f32],
        gate: usize,
        activation: usize,
        [t, row]: [usize; 2],
        sum: &[f32],
        weighted: Option<(&[f32], &[f32])>,
    ) {
        let shape = &self.args.shape;
        let at = ((t * shape.batch + row) * shape.gates() + gate) * shape.hidden;
        // SAFETY: the caller grants the row.
        let x = unsafe { from_raw_parts(self.args.x.add(at), shape.hidden) };
        if sum.is_empty() {
            out.copy_from_slice(x);
        } else {
            for ((out, x), sum) in out.iter_mut().zip(x).zip(sum) {
                *out = x + sum;
            }
        }
        if let Some((weight, value)) = weighted {
            for ((out, weight), value) in out.iter_mut().zip(weight).zip(value) {
                *out += weight * value;
            }
        }
        let activation: &ActivationArgs = &shape.activations[activation];
        clip(shape.clip, out);
        // SAFETY: the CPU has the tier, as the caller runs on it.
        unsafe { activate::<S>(activation, K::IS_CODES, out) };
    }

    /// The states of an LSTM after a step.
    #[inline(always)]
    unsafe fn lstm<'s, S: Simd>(
        &self,
        [t, before, after]: [usize; 3],
        row: usize,
        sums: impl Fn(usize) -> &'s [f32],
    ) {
        let shape = &self.args.shape;
        // SAFETY: granted by the caller; the sections are distinct.
        unsafe {
            let [i, o, f, g] = [2, 3, 4, 5].map(|section| self.section(section, t, row));
            let (c, next) = (&*self.section(1, before, row), self.section(1, after, row));
            let h = self.section(0, after, row);
            let (p_i, p_f) = (self.peephole(0), self.peephole(2));
            self.gate::<S>(i, 0, 0, [t, row], sums(0), p_i.map(|p| (p, c)));
            if shape.input_forget == 0 {
                self.gate::<S>(f, 2, 0, [t, row], sums(2), p_f.map(|p| (p, c)));
            } else {
                for (f, i) in f.iter_mut().zip(&*i) {
                    *f = 1.0 - i;
                }
            }
            self.gate::<S>(g, 3, 1, [t, row], sums(3), None);
            for at in 0..next.len().min(c.len()).min(f.len()).min(i.len()).min(g.len()) {
                next[at] = f[at] * c[at] + i[at] * g[at];
            }
            let p_o = self.peephole(1).map(|p| (p, &*next));
            self.gate::<S>(o, 1, 0, [t, row], sums(1), p_o);
            h.copy_from_slice(next);
            activate::<S>(&shape.activations[2], K::IS_CODES, h);
            for (h, o) in h.iter_mut().zip(&*o) {
                *h *= o;
            }
        }
    }

    /// `h' = (1 - z)·n + z·h` of a GRU.
    #[inline(always)]
    unsafe fn mix(&self, [t, before, after]: [usize; 3], row: usize) {
        // SAFETY: granted by the caller; the sections are distinct.
        unsafe {
            let (z, n) = (&*self.section(1, t, row), &*self.section(3, t, row));
            let (h, next) = (&*self.section(0, before, row), self.section(0, after, row));
            for (((next, h), z), n) in next.iter_mut().zip(h).zip(z).zip(n) {
                *next = (1.0 - z) * n + z * h;
            }
        }
    }
}
