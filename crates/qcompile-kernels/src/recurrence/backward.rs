//! The gradient of a recurrent layer.

use super::activation::{activate, multiply_clipped_slope, multiply_slope};
use super::product::{Kind, Numbers, Operand, Panels, product};
use super::{Rows, runs};
use crate::args::{RecurrenceGradArgs, RecurrentCell};
use crate::buffer::{Buffer, Slot};
use crate::lanes::{Simd, Task};
use crate::rounding::golden_multiples;
use std::marker::PhantomData;
use std::slice::{from_raw_parts, from_raw_parts_mut};

pub(super) struct Backward<K> {
    pub(super) args: RecurrenceGradArgs,
    pub(super) kind: PhantomData<K>,
    pub(super) begin: usize,
    pub(super) end: usize,
}

impl<K: Kind> Task for Backward<K> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for unit in self.begin..self.end {
            let rows = Rows::of::<K, S>(&self.args.shape, unit);
            // SAFETY: the rows exist, and no other unit has them.
            unsafe { self.rows::<S>(&rows) };
        }
    }
}

/// One row at one step, with the gradients that come from the step after.
struct Site<'a> {
    /// The step, and the rows of the state before and after it.
    steps: [usize; 3],
    row: usize,
    dh: &'a mut [f32],
    dc: &'a mut [f32],
}

impl<K: Kind> Backward<K> {
    /// A row of a section of the forward result.
    #[inline(always)]
    unsafe fn section(&self, section: usize, t: usize, row: usize) -> &[f32] {
        let shape = &self.args.shape;
        // SAFETY: the caller grants that it exists.
        unsafe { from_raw_parts(self.args.y.add(shape.at(section, t, row)), shape.hidden) }
    }

    /// A gate's gradient in the result.
    ///
    /// # Safety
    /// It exists, and the caller has no other reference to it.
    #[inline(always)]
    #[allow(clippy::mut_from_ref, reason = "the memory is the caller's, not the argument block's")]
    unsafe fn gradient(&self, gate: usize, t: usize, row: usize) -> &mut [f32] {
        let shape = &self.args.shape;
        let at = ((t * shape.batch + row) * shape.gradients() + gate) * shape.hidden;
        // SAFETY: granted by the caller.
        unsafe { from_raw_parts_mut(self.args.dx.add(at), shape.hidden) }
    }

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
        let mut dh = Buffer::take(Slot::Result, rows.padded * stride);
        let mut dc = Buffer::take(Slot::Left, rows.padded * hidden);
        let mut reset = Buffer::take(Slot::Right, rows.padded * stride);
        let room = Operand::room::<K::Lanes<S>>(shape, rows);
        let mut operand = Buffer::take(Slot::Staging, room + hidden);
        let (dh, reset, operand) = (dh.words(), reset.words(), operand.words());
        let dc = dc.words().cast::<f32>();
        // SAFETY: rows and sections exist; buffers are as large as they were taken.
        unsafe {
            // Behind the operand.
            golden_multiples(from_raw_parts_mut(operand.add(room).cast(), hidden));
            dh.write_bytes(0, rows.padded * stride);
            dc.write_bytes(0, rows.padded * hidden);
            let dh_row =
                |local: usize| from_raw_parts_mut(dh.add(local * stride).cast::<f32>(), hidden);
            for order in (0..shape.steps).rev() {
                let steps @ [t, ..] = shape.step(order);
                for local in 0..rows.count {
                    let row = rows.first + local;
                    let (dh, dc) =
                        (dh_row(local), from_raw_parts_mut(dc.add(local * hidden), hidden));
                    let at = (t * shape.batch + row) * hidden;
                    add(dh, from_raw_parts(args.dh.add(at), hidden));
                    if !args.dc.is_null() {
                        add(dc, from_raw_parts(args.dc.add(at), hidden));
                    }
                    if !runs(args.lengths, row, t) {
                        for gate in 0..shape.gradients() {
                            self.gradient(gate, t, row).fill(0.0);
                        }
                        continue;
                    }
                    let site = Site { steps, row, dh, dc };
                    match shape.cell {
                        RecurrentCell::Lstm => self.lstm::<S>(site),
                        RecurrentCell::Rnn => self.rnn::<S>(site),
                        RecurrentCell::Gru | RecurrentCell::LinearGru => self.gru::<S>(site),
                    }
                }
                // Rows that only fill a tile must not grow from step to step.
                for local in rows.count..rows.padded {
                    dh_row(local).fill(0.0);
                }
                if shape.cell == RecurrentCell::Gru {
                    self.multiply::<S>(rows, t, (2, 2), operand, reset, false);
                    for local in 0..rows.count {
                        let row = rows.first + local;
                        if runs(args.lengths, row, t) {
                            let from = reset.add(local * stride).cast::<f32>();
                            let from = from_raw_parts(from.cast_const(), hidden);
                            self.reset::<S>(steps, row, from, dh_row(local));
                        }
                    }
                }
                let gates: &[(usize, usize)] = match shape.cell {
                    RecurrentCell::Lstm if shape.input_forget != 0 => &[(0, 0), (1, 1), (3, 3)],
                    RecurrentCell::Lstm => &[(0, 0), (1, 1), (2, 2), (3, 3)],
                    RecurrentCell::Gru => &[(0, 0), (1, 1)],
                    RecurrentCell::LinearGru => &[(0, 0), (1, 1), (3, 2)],
                    RecurrentCell::Rnn => &[(0, 0)],
                };
                for &gate in gates {
                    self.add_back::<S>(rows, t, gate, operand, dh, reset);
                }
            }
            for local in 0..rows.count {
                let row = rows.first + local;
                for gate in 0..shape.gradients() {
                    let to = self.gradient(gate, shape.steps, row);
                    match (gate, shape.cell) {
                        (0, _) => to.copy_from_slice(dh_row(local)),
                        (1, RecurrentCell::Lstm) => {
                            to.copy_from_slice(from_raw_parts(dc.add(local * hidden), hidden));
                        }
                        _ => to.fill(0.0),
                    }
                }
            }
        }
    }

    /// Adds `dgate R` of a gradient and a gate, at a step, to rows of a buffer: what codes give, which have other scales
    /// for every gate, by way of another.
    #[inline(always)]
    unsafe fn add_back<S: Simd>(
        &self,
        rows: &Rows,
        t: usize,
        gate: (usize, usize),
        operand: *mut u32,
        out: *mut u32,
        beside: *mut u32,
    ) {
        // SAFETY: granted by the caller.
        unsafe {
            if !K::IS_CODES {
                self.multiply::<S>(rows, t, gate, operand, out, true);
                return;
            }
            self.multiply::<S>(rows, t, gate, operand, beside, false);
            let count = rows.count * Panels::<K::Lanes<S>>::of(&self.args.shape).columns();
            let from = from_raw_parts(beside.cast::<f32>().cast_const(), count);
            add(from_raw_parts_mut(out.cast::<f32>(), count), from);
        }
    }

    /// Puts (or adds) `dgate R` of a gradient and a gate, at a step, into rows of a buffer. No closure: those have not the
    /// tier's target features.
    #[inline(always)]
    unsafe fn multiply<S: Simd>(
        &self,
        rows: &Rows,
        t: usize,
        (from, gate): (usize, usize),
        operand: *mut u32,
        out: *mut u32,
        add: bool,
    ) {
        let shape = &self.args.shape;
        let columns = shape.gradients() * shape.hidden;
        // SAFETY: granted by the caller.
        unsafe {
            let numbers = (K::IS_CODES && !self.args.numbers.is_null()).then(|| {
                let room = Operand::room::<K::Lanes<S>>(shape, rows);
                let stride = shape.steps * shape.gradients();
                let first = rows.first * stride + t * shape.gradients() + from;
                Numbers {
                    first: self.args.numbers.wrapping_add(first),
                    stride,
                    multiples: from_raw_parts(operand.add(room).cast::<f32>(), shape.hidden),
                }
            });
            let first = (t * shape.batch + rows.first) * columns + from * shape.hidden;
            let first = self.args.dx.cast_const().add(first);
            let left =
                Operand::of::<K::Lanes<S>>(shape, rows, first, columns, None, numbers, operand);
            let packed = self.args.scratch.cast::<u32>().cast_const();
            product::<K::Lanes<S>>(shape, &left, packed, gate, out, add);
        }
    }

    #[inline(always)]
    unsafe fn rnn<S: Simd>(&self, site: Site<'_>) {
        let shape = &self.args.shape;
        let [t, _, after] = site.steps;
        // SAFETY: granted by the caller.
        unsafe {
            let d = self.gradient(0, t, site.row);
            d.copy_from_slice(site.dh);
            let h = self.section(0, after, site.row);
            multiply_clipped_slope::<S>(&shape.activations[0], shape.clip, K::IS_CODES, h, d);
            site.dh.fill(0.0);
        }
    }

    #[inline(always)]
    unsafe fn lstm<S: Simd>(&self, site: Site<'_>) {
        let shape = &self.args.shape;
        let Site { steps: [t, before, after], row, dh, dc } = site;
        let [gates, candidate, state] = &shape.activations;
        // SAFETY: granted by the caller; the gradients are distinct.
        unsafe {
            let [i, o, f, g] = [2, 3, 4, 5].map(|section| self.section(section, t, row));
            let (c, next) = (self.section(1, before, row), self.section(1, after, row));
            let [d_i, d_o, d_f, d_g] = [0, 1, 2, 3].map(|gate| self.gradient(gate, t, row));
            // The gradient of g holds the activated state until it is needed.
            d_g.copy_from_slice(next);
            activate::<S>(state, K::IS_CODES, d_g);
            multiply(d_o, dh, d_g);
            multiply_clipped_slope::<S>(gates, shape.clip, K::IS_CODES, o, d_o);
            multiply(d_i, dh, o);
            multiply_slope::<S>(state, d_g, d_i);
            add(dc, d_i);
            if let Some(peephole) = self.peephole(1) {
                add_product(dc, d_o, peephole);
            }
            multiply(d_i, dc, g);
            multiply(d_f, dc, c);
            if shape.input_forget == 0 {
                multiply_clipped_slope::<S>(gates, shape.clip, K::IS_CODES, f, d_f);
            } else {
                for (d_i, d_f) in d_i.iter_mut().zip(d_f.iter_mut()) {
                    *d_i -= std::mem::take(d_f);
                }
            }
            multiply_clipped_slope::<S>(gates, shape.clip, K::IS_CODES, i, d_i);
            multiply(d_g, dc, i);
            multiply_clipped_slope::<S>(candidate, shape.clip, K::IS_CODES, g, d_g);
            for (dc, f) in dc.iter_mut().zip(f) {
                *dc *= f;
            }
            if let (Some(p_i), Some(p_f)) = (self.peephole(0), self.peephole(2)) {
                add_product(dc, d_i, p_i);
                add_product(dc, d_f, p_f);
            }
            dh.fill(0.0);
        }
    }

    /// The gradients of z and n, and of r where it multiplies the product.
    #[inline(always)]
    unsafe fn gru<S: Simd>(&self, site: Site<'_>) {
        let shape = &self.args.shape;
        let Site { steps: [t, before, _], row, dh, .. } = site;
        let [gates, candidate, _] = &shape.activations;
        // SAFETY: granted by the caller; the gradients are distinct.
        unsafe {
            let [z, r, n] = [1, 2, 3].map(|section| self.section(section, t, row));
            let h = self.section(0, before, row);
            let [d_z, d_r, d_n] = [0, 1, 2].map(|gate| self.gradient(gate, t, row));
            for (((d_z, dh), h), n) in d_z.iter_mut().zip(&*dh).zip(h).zip(n) {
                *d_z = dh * (h - n);
            }
            multiply_clipped_slope::<S>(gates, shape.clip, K::IS_CODES, z, d_z);
            for ((d_n, dh), z) in d_n.iter_mut().zip(dh.iter_mut()).zip(z) {
                *d_n = *dh * (1.0 - z);
                *dh *= z;
            }
            multiply_clipped_slope::<S>(candidate, shape.clip, K::IS_CODES, n, d_n);
            if shape.cell == RecurrentCell::LinearGru {
                multiply(d_r, d_n, self.section(4, t, row));
                multiply_clipped_slope::<S>(gates, shape.clip, K::IS_CODES, r, d_r);
                multiply(self.gradient(3, t, row), d_n, r);
            } else {
                d_r.fill(0.0);
            }
        }
    }

    /// The gradient of r from that of `r·h`, which also goes to h.
    #[inline(always)]
    unsafe fn reset<S: Simd>(
        &self,
        [t, before, _]: [usize; 3],
        row: usize,
        d: &[f32],
        dh: &mut [f32],
    ) {
        let shape = &self.args.shape;
        // SAFETY: granted by the caller.
        unsafe {
            let r = self.section(2, t, row);
            let d_r = self.gradient(1, t, row);
            multiply(d_r, d, self.section(0, before, row));
            multiply_clipped_slope::<S>(&shape.activations[0], shape.clip, K::IS_CODES, r, d_r);
            add_product(dh, d, r);
        }
    }
}

#[inline(always)]
fn add(to: &mut [f32], from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += from;
    }
}

#[inline(always)]
fn add_product(to: &mut [f32], a: &[f32], b: &[f32]) {
    for ((to, a), b) in to.iter_mut().zip(a).zip(b) {
        *to += a * b;
    }
}

#[inline(always)]
fn multiply(to: &mut [f32], a: &[f32], b: &[f32]) {
    for ((to, a), b) in to.iter_mut().zip(a).zip(b) {
        *to = a * b;
    }
}
