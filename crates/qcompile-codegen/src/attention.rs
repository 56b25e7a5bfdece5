//! The argument block of the kernels of attention.

use crate::emitter::Emitter;
use crate::primitives::Block;
use qcompile_ir::{AttentionCodes, DType};
use qcompile_kernels::args::{AttentionArgs, AttentionKind};
use qcompile_plan::{Attention, AttentionResult, Place, Strided};
use std::mem::offset_of;

// What the op means is what the kernel computes.
const _: () = {
    assert!(AttentionKind::INT8_QUERIES == AttentionCodes::QUERIES);
    assert!(AttentionKind::INT8_KEYS == AttentionCodes::KEYS);
    assert!(AttentionKind::INT8_FINE_STEPS == AttentionCodes::FINE_STEPS);
};

/// Fills the argument block.
pub(crate) fn arguments(e: &mut Emitter<'_, '_>, attention: &Attention) -> Block {
    let block = Block::new::<AttentionArgs>(e);
    let bytes = attention.dtype.size();
    macro_rules! operand {
        ($field:ident, $strides:ident, $operand:expr, $bytes:expr) => {
            let operand: Option<Strided> = $operand;
            let address = match operand {
                Some(operand) => e.place(operand.place, $bytes),
                None => e.int(0),
            };
            block.put(e, offset_of!(AttentionArgs, $field), address);
            for dim in 0..4 {
                let stride = match operand {
                    Some(operand) => e.dim(operand.strides[dim]),
                    None => e.int(0),
                };
                block.put(e, offset_of!(AttentionArgs, $strides) + dim * 8, stride);
            }
        };
    }
    let (y, dy, numbers, gradients) = match attention.result {
        AttentionResult::Forward(y) => (Some(y), None, None, [None; 3]),
        AttentionResult::Gradients { dy, numbers, of } => (None, Some(dy), numbers, of),
    };
    let stored = if attention.scales.is_some() { 1 } else { bytes };
    operand!(q, q_strides, Some(attention.q), stored);
    operand!(k, k_strides, Some(attention.k), stored);
    operand!(v, v_strides, Some(attention.v), stored);
    for at in 0..3 {
        let scale = match attention.scales {
            Some(scales) => e.place(scales[at], 4),
            None => e.int(0),
        };
        block.put(e, offset_of!(AttentionArgs, scales) + at * 8, scale);
    }
    operand!(mask, mask_strides, attention.mask, 4);
    operand!(dy, dy_strides, dy, bytes);
    operand!(numbers, number_strides, numbers, 4);
    let [dq, dk, dv] = gradients;
    for (offset, place) in [
        (offset_of!(AttentionArgs, y), y),
        (offset_of!(AttentionArgs, dq), dq),
        (offset_of!(AttentionArgs, dk), dk),
        (offset_of!(AttentionArgs, dv), dv),
    ] {
        let address = match place {
            Some(place) => e.place(place, bytes),
            None => e.int(0),
        };
        block.put(e, offset, address);
    }
    for (offset, dim) in [
        (offset_of!(AttentionArgs, batch), attention.batch),
        (offset_of!(AttentionArgs, rows), attention.rows),
        (offset_of!(AttentionArgs, keys), attention.keys),
        (offset_of!(AttentionArgs, heads), attention.heads.into()),
        (offset_of!(AttentionArgs, key_heads), attention.key_heads.into()),
        (offset_of!(AttentionArgs, width), attention.width),
        (offset_of!(AttentionArgs, value_width), attention.value_width),
    ] {
        let size = e.dim(dim);
        block.put(e, offset, size);
    }
    let kind = match (attention.dtype, attention.products) {
        (DType::BF16, DType::BF16) => AttentionKind::Bf16,
        (DType::BF16, DType::I8) => AttentionKind::Int8Bf16,
        (DType::BF16, _) => AttentionKind::Bf16Operands,
        (_, DType::I8) => AttentionKind::Int8,
        _ => AttentionKind::F32,
    };
    for (offset, word) in [
        (offset_of!(AttentionArgs, scale), attention.scale.to_bits() as usize),
        (offset_of!(AttentionArgs, causal), usize::from(attention.causal)),
        (offset_of!(AttentionArgs, kind), kind as usize),
    ] {
        let word = e.int(word);
        block.put(e, offset, word);
    }
    block
}

/// What it reads and what it writes.
pub(crate) fn places(attention: &Attention) -> (Vec<Place>, Vec<Place>) {
    let mut reads = vec![attention.q.place, attention.k.place, attention.v.place];
    reads.extend(attention.mask.map(|mask| mask.place));
    reads.extend(attention.scales.into_iter().flatten());
    let writes = match attention.result {
        AttentionResult::Forward(y) => vec![y],
        AttentionResult::Gradients { dy, numbers, of } => {
            reads.push(dy.place);
            reads.extend(numbers.map(|numbers| numbers.place));
            of.into_iter().flatten().collect()
        }
    };
    (reads, writes)
}
