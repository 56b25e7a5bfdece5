//! The encoder against the bytes of a known assembler.

use super::assembler::{
    self as asm, Address, Assembler, Gpr, Mask, Opcode, Operand, Vector, When, Word, Zmm,
};

fn vector(opcode: Opcode, first: u8, second: Option<u8>, last: Operand) -> Vector {
    Vector { opcode, first, second: second.map(Zmm), last, mask: None, immediate: None }
}

fn sample() -> asm::Code {
    let mut a = Assembler::default();
    let zmm = |n| Operand::Zmm(Zmm(n));
    let near = Operand::Memory(Address::at(Gpr(5), 64));
    let far =
        Operand::Memory(Address { base: Gpr(13), index: Some((Gpr::RCX, 4)), displacement: -8 });
    let high =
        Operand::Memory(Address { base: Gpr(12), index: Some((Gpr(9), 2)), displacement: 256 });
    let stack = Operand::Memory(Address::at(Gpr(12), 0));
    for opcode in [
        asm::ADD,
        asm::MUL,
        asm::SUB,
        asm::MIN,
        asm::DIV,
        asm::MAX,
        asm::ADD_F64,
        asm::MUL_F64,
        asm::MAX_F64,
        asm::AND,
        asm::OR,
        asm::XOR,
        asm::ADD_INT,
        asm::SUB_INT,
        asm::MAX_INT,
        asm::MIN_INT,
        asm::MUL_INT,
        asm::MUL_ADD_213,
        asm::MUL_ADD_231,
        asm::SCALE,
    ] {
        a.vector(vector(opcode, 1, Some(2), zmm(3)));
        a.vector(vector(opcode, 9, Some(18), zmm(27)));
    }
    for opcode in [asm::ADD, asm::MUL_ADD_213] {
        for last in [near, far, high, stack] {
            a.vector(vector(opcode, 30, Some(15), last));
        }
    }
    for opcode in [
        asm::SQRT,
        asm::MOVE,
        asm::INT_TO_FLOAT,
        asm::NEAREST_INT,
        asm::TRUNCATED_INT,
        asm::TO_F64,
        asm::ABS_INT,
    ] {
        let last = zmm(if opcode == asm::TO_F64 { 6 } else { 26 });
        a.vector(Vector { mask: Some((Mask(3), true)), ..vector(opcode, 17, None, last) });
    }
    for opcode in [asm::SHIFT_LEFT, asm::SHIFT_RIGHT, asm::SHIFT_RIGHT_ZERO] {
        a.vector(Vector { immediate: Some(16), ..vector(opcode, 25, None, zmm(10)) });
    }
    for opcode in [
        asm::LOAD,
        asm::LOAD_F64,
        asm::BROADCAST,
        asm::BROADCAST_F64,
        asm::BROADCAST_16,
        asm::BROADCAST_8,
        asm::WIDEN_U16,
        asm::WIDEN_I8,
        asm::WIDEN_U8,
    ] {
        a.vector(Vector { mask: Some((Mask(1), true)), ..vector(opcode, 31, None, far) });
    }
    for opcode in [asm::STORE, asm::STORE_F64, asm::NARROW_16, asm::NARROW_8] {
        a.vector(Vector { mask: Some((Mask(1), false)), ..vector(opcode, 12, None, high) });
    }
    for opcode in [asm::COMPARE, asm::COMPARE_F64, asm::COMPARE_INT] {
        a.vector(Vector { immediate: Some(4), ..vector(opcode, 5, Some(20), zmm(21)) });
    }
    a.vector(vector(asm::TEST, 6, Some(22), zmm(22)));
    for opcode in [asm::BLEND, asm::BLEND_F64] {
        a.vector(Vector { mask: Some((Mask(7), false)), ..vector(opcode, 8, Some(16), zmm(24)) });
    }
    a.vector(Vector { immediate: Some(9), ..vector(asm::ROUND, 8, None, zmm(24)) });
    a.vector(Vector { immediate: Some(0x4e), ..vector(asm::SHUFFLE_QUARTERS, 8, Some(9), zmm(9)) });
    a.vector(Vector { immediate: Some(0xb1), ..vector(asm::SHUFFLE_LANES, 8, None, zmm(19)) });
    for opcode in [asm::MASK_AND, asm::MASK_AND_NOT, asm::MASK_OR, asm::MASK_EQUAL] {
        a.mask(opcode, Mask(2), Some(Mask(3)), Mask(7));
    }
    a.mask(asm::MASK_NOT, Mask(4), None, Mask(5));
    a.mask_upper(Mask(6), Mask(1));
    a.mask_from(Mask(1), Gpr::RAX);
    a.low_bits(Gpr::RAX, Gpr::RSI, Gpr::RAX);
    a.low_bits(Gpr(9), Gpr(10), Gpr(11));
    for word in [Word::Load, Word::Store, Word::Add, Word::Compare, Word::Address] {
        a.word(word, Gpr(8), Address::at(Gpr::RDI, 24));
        a.word(
            word,
            Gpr::RAX,
            Address { base: Gpr(12), index: Some((Gpr::RCX, 8)), displacement: 0 },
        );
    }
    a.set(Gpr::RSI, -1);
    a.set(Gpr(14), 7);
    a.add(Gpr::RCX, 16);
    a.add(Gpr(15), -1);
    a.subtract(Gpr::RAX, Gpr(9));
    a.test(Gpr(10));
    a.push(Gpr(3));
    a.push(Gpr(12));
    a.pop(Gpr(15));
    let label = a.label();
    a.place(label);
    for when in [
        When::Below,
        When::NotEqual,
        When::Equal,
        When::AboveOrEqual,
        When::Above,
        When::BelowOrEqual,
    ] {
        a.jump(when, label);
    }
    a.vector(vector(asm::ADD, 20, Some(21), Operand::Constant(1)));
    a.vector(Vector {
        immediate: Some(17),
        ..vector(asm::COMPARE, 3, Some(21), Operand::Constant(2))
    });
    a.vector(vector(asm::BROADCAST, 4, None, Operand::Constant(1)));
    a.leave();
    a.finish()
}

#[test]
fn dump() {
    let code = sample();
    std::fs::write("/tmp/wide.bin", &code.bytes).expect("w");
    std::fs::write("/tmp/wide.txt", &code.text).expect("w");
}
