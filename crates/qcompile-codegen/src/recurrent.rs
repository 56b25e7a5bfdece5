//! The argument blocks of recurrent layers.

use crate::emitter::Emitter;
use crate::frame::Frame;
use crate::primitives::Block;
use cranelift_codegen::ir::Value;
use qcompile_ir::{Activation, ActivationOp, Cell, DType};
use qcompile_kernels::KernelId;
use qcompile_kernels::args::{
    ActivationArgs, ActivationKind, RecurrenceArgs, RecurrenceGradArgs, RecurrenceShape,
    RecurrentCell,
};
use qcompile_plan::{Place, Recurrent};
use std::mem::offset_of;

/// The kernel by what its products read.
pub(crate) fn kernel(recurrent: &Recurrent) -> KernelId {
    match (recurrent.gradient, recurrent.recurrence.products) {
        (false, Some(DType::BF16)) => KernelId::RecurrenceBf16,
        (false, Some(DType::I8)) => KernelId::RecurrenceI8,
        (false, _) => KernelId::Recurrence,
        (true, Some(DType::BF16)) => KernelId::RecurrenceGradBf16,
        (true, Some(DType::I8)) => KernelId::RecurrenceGradI8,
        (true, _) => KernelId::RecurrenceGrad,
    }
}

/// Fills the argument block of a recurrent layer or its gradient.
pub(crate) fn arguments(e: &mut Emitter<'_, '_>, recurrent: &Recurrent) -> Block {
    macro_rules! block {
        ($args:ident { $($field:ident: $place:expr),* $(,)? }) => {{
            let block = Block::new::<$args>(e);
            $({
                let value = address(e, $place);
                block.put(e, offset_of!($args, $field), value);
            })*
            let lengths = match recurrent.lengths {
                Some(lengths) => e.place(lengths, 8),
                None => e.int(0),
            };
            block.put(e, offset_of!($args, lengths), lengths);
            let scratch = e.field(Frame::SCRATCH);
            block.put(e, offset_of!($args, scratch), scratch);
            put_shape(e, &block, offset_of!($args, shape), recurrent);
            block
        }};
    }
    let Recurrent { x, r, h, c, bias, peepholes, numbers, y, .. } = *recurrent;
    if recurrent.gradient {
        block!(RecurrenceGradArgs {
            y: Some(x),
            r: Some(r),
            dh: Some(h),
            dc: c,
            peepholes: peepholes,
            numbers: numbers,
            dx: Some(y),
        })
    } else {
        block!(RecurrenceArgs {
            x: Some(x),
            r: Some(r),
            h0: Some(h),
            c0: c,
            bias: bias,
            peepholes: peepholes,
            y: Some(y),
        })
    }
}

/// The address of floats, or null.
fn address(e: &mut Emitter<'_, '_>, place: Option<Place>) -> Value {
    match place {
        Some(place) => e.place(place, 4),
        None => e.int(0),
    }
}

fn put_shape(e: &mut Emitter<'_, '_>, block: &Block, at: usize, recurrent: &Recurrent) {
    let recurrence = &recurrent.recurrence;
    let batch = e.dim(recurrent.batch);
    block.put(e, at + offset_of!(RecurrenceShape, batch), batch);
    let clip = recurrence.clip.map_or(f64::INFINITY, f64::from);
    let mut words = vec![
        (offset_of!(RecurrenceShape, cell), cell(recurrence.cell) as usize),
        (offset_of!(RecurrenceShape, steps), recurrent.steps),
        (offset_of!(RecurrenceShape, hidden), recurrent.hidden),
        (offset_of!(RecurrenceShape, reverse), usize::from(recurrence.reverse)),
        (offset_of!(RecurrenceShape, input_forget), usize::from(recurrence.input_forget)),
        (offset_of!(RecurrenceShape, clip), bits(clip)),
    ];
    for (index, activation) in recurrence.activations.iter().enumerate() {
        let at = offset_of!(RecurrenceShape, activations) + index * size_of::<ActivationArgs>();
        let Activation { function, alpha, beta } = *activation;
        words.extend([
            (at + offset_of!(ActivationArgs, kind), kind(function) as usize),
            (at + offset_of!(ActivationArgs, alpha), bits(alpha.into())),
            (at + offset_of!(ActivationArgs, beta), bits(beta.into())),
        ]);
    }
    for (offset, word) in words {
        let word = e.int(word);
        block.put(e, at + offset, word);
    }
}

/// A number as the word that holds it.
fn bits(value: f64) -> usize {
    usize::try_from(value.to_bits()).expect("64-bit")
}

fn cell(cell: Cell) -> RecurrentCell {
    match cell {
        Cell::Lstm => RecurrentCell::Lstm,
        Cell::Gru => RecurrentCell::Gru,
        Cell::LinearGru => RecurrentCell::LinearGru,
        Cell::Rnn => RecurrentCell::Rnn,
    }
}

fn kind(function: ActivationOp) -> ActivationKind {
    match function {
        ActivationOp::Sigmoid => ActivationKind::Sigmoid,
        ActivationOp::Tanh => ActivationKind::Tanh,
        ActivationOp::Relu => ActivationKind::Relu,
        ActivationOp::Affine => ActivationKind::Affine,
        ActivationOp::LeakyRelu => ActivationKind::LeakyRelu,
        ActivationOp::ThresholdedRelu => ActivationKind::ThresholdedRelu,
        ActivationOp::ScaledTanh => ActivationKind::ScaledTanh,
        ActivationOp::HardSigmoid => ActivationKind::HardSigmoid,
        ActivationOp::Elu => ActivationKind::Elu,
        ActivationOp::Softsign => ActivationKind::Softsign,
        ActivationOp::Softplus => ActivationKind::Softplus,
    }
}
