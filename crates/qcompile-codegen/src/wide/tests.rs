//! The encoder against known bytes, and registers when there are too few.

use super::assembler::{
    self as asm, Address, Assembler, Gpr, Mask, Opcode, Operand, Vector, When, Word, Zmm,
};
use super::registers::Registers;
use super::straight::{Lanes, Memory, Straight, Value};

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
        asm::NEG_MUL_ADD_213,
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
        asm::EXPONENT,
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
    a.vector(Vector { immediate: Some(0), ..vector(asm::SIGNIFICAND, 8, None, zmm(24)) });
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

/// The bytes as a disassembler reads them back.
const EXPECTED: &str = "\
62f16c4858cb vaddps zmm1, zmm2, zmm3
62116c4058cb vaddps zmm9, zmm18, zmm27
62f16c4859cb vmulps zmm1, zmm2, zmm3
62116c4059cb vmulps zmm9, zmm18, zmm27
62f16c485ccb vsubps zmm1, zmm2, zmm3
62116c405ccb vsubps zmm9, zmm18, zmm27
62f16c485dcb vminps zmm1, zmm2, zmm3
62116c405dcb vminps zmm9, zmm18, zmm27
62f16c485ecb vdivps zmm1, zmm2, zmm3
62116c405ecb vdivps zmm9, zmm18, zmm27
62f16c485fcb vmaxps zmm1, zmm2, zmm3
62116c405fcb vmaxps zmm9, zmm18, zmm27
62f1ed4858cb vaddpd zmm1, zmm2, zmm3
6211ed4058cb vaddpd zmm9, zmm18, zmm27
62f1ed4859cb vmulpd zmm1, zmm2, zmm3
6211ed4059cb vmulpd zmm9, zmm18, zmm27
62f1ed485fcb vmaxpd zmm1, zmm2, zmm3
6211ed405fcb vmaxpd zmm9, zmm18, zmm27
62f16d48dbcb vpandd zmm1, zmm2, zmm3
62116d40dbcb vpandd zmm9, zmm18, zmm27
62f16d48ebcb vpord zmm1, zmm2, zmm3
62116d40ebcb vpord zmm9, zmm18, zmm27
62f16d48efcb vpxord zmm1, zmm2, zmm3
62116d40efcb vpxord zmm9, zmm18, zmm27
62f16d48fecb vpaddd zmm1, zmm2, zmm3
62116d40fecb vpaddd zmm9, zmm18, zmm27
62f16d48facb vpsubd zmm1, zmm2, zmm3
62116d40facb vpsubd zmm9, zmm18, zmm27
62f26d483dcb vpmaxsd zmm1, zmm2, zmm3
62126d403dcb vpmaxsd zmm9, zmm18, zmm27
62f26d4839cb vpminsd zmm1, zmm2, zmm3
62126d4039cb vpminsd zmm9, zmm18, zmm27
62f26d4840cb vpmulld zmm1, zmm2, zmm3
62126d4040cb vpmulld zmm9, zmm18, zmm27
62f26d48a8cb vfmadd213ps zmm1, zmm2, zmm3
62126d40a8cb vfmadd213ps zmm9, zmm18, zmm27
62f26d48b8cb vfmadd231ps zmm1, zmm2, zmm3
62126d40b8cb vfmadd231ps zmm9, zmm18, zmm27
62f26d482ccb vscalefps zmm1, zmm2, zmm3
62126d402ccb vscalefps zmm9, zmm18, zmm27
62f26d48accb vfnmadd213ps zmm1, zmm2, zmm3
62126d40accb vfnmadd213ps zmm9, zmm18, zmm27
6261044858b540000000 vaddps zmm30, zmm15, [rbp + 64]
6241044858b48df8ffffff vaddps zmm30, zmm15, [r13 + rcx * 4 + -8]
6201044858b44c00010000 vaddps zmm30, zmm15, [r12 + r9 * 2 + 256]
6241044858b42400000000 vaddps zmm30, zmm15, [r12]
62620548a8b540000000 vfmadd213ps zmm30, zmm15, [rbp + 64]
62420548a8b48df8ffffff vfmadd213ps zmm30, zmm15, [r13 + rcx * 4 + -8]
62020548a8b44c00010000 vfmadd213ps zmm30, zmm15, [r12 + r9 * 2 + 256]
62420548a8b42400000000 vfmadd213ps zmm30, zmm15, [r12]
62817ccb51ca vsqrtps zmm17 {k3}{z}, zmm26
62817ccb28ca vmovaps zmm17 {k3}{z}, zmm26
62817ccb5bca vcvtdq2ps zmm17 {k3}{z}, zmm26
62817dcb5bca vcvtps2dq zmm17 {k3}{z}, zmm26
62817ecb5bca vcvttps2dq zmm17 {k3}{z}, zmm26
62e17ccb5ace vcvtps2pd zmm17 {k3}{z}, zmm6
62827dcb1eca vpabsd zmm17 {k3}{z}, zmm26
62827dcb42ca vgetexpps zmm17 {k3}{z}, zmm26
62d1354072f210 vpslld zmm25, zmm10, 16
62d1354072e210 vpsrad zmm25, zmm10, 16
62d1354072d210 vpsrld zmm25, zmm10, 16
62417cc910bc8df8ffffff vmovups zmm31 {k1}{z}, [r13 + rcx * 4 + -8]
6241fdc910bc8df8ffffff vmovupd zmm31 {k1}{z}, [r13 + rcx * 4 + -8]
62427dc918bc8df8ffffff vbroadcastss zmm31 {k1}{z}, [r13 + rcx * 4 + -8]
6242fdc919bc8df8ffffff vbroadcastsd zmm31 {k1}{z}, [r13 + rcx * 4 + -8]
62427dc979bc8df8ffffff vpbroadcastw zmm31 {k1}{z}, [r13 + rcx * 4 + -8]
62427dc978bc8df8ffffff vpbroadcastb zmm31 {k1}{z}, [r13 + rcx * 4 + -8]
62427dc933bc8df8ffffff vpmovzxwd zmm31 {k1}{z}, [r13 + rcx * 4 + -8]
62427dc921bc8df8ffffff vpmovsxbd zmm31 {k1}{z}, [r13 + rcx * 4 + -8]
62427dc931bc8df8ffffff vpmovzxbd zmm31 {k1}{z}, [r13 + rcx * 4 + -8]
62117c4911a44c00010000 vmovups [r12 + r9 * 2 + 256] {k1}, zmm12
6211fd4911a44c00010000 vmovupd [r12 + r9 * 2 + 256] {k1}, zmm12
62127e4933a44c00010000 vpmovdw [r12 + r9 * 2 + 256] {k1}, zmm12
62127e4931a44c00010000 vpmovdb [r12 + r9 * 2 + 256] {k1}, zmm12
62b15c40c2ed04 vcmpps k5, zmm20, zmm21, 4
62b1dd40c2ed04 vcmppd k5, zmm20, zmm21, 4
62b35d401fed04 vpcmpd k5, zmm20, zmm21, 4
62b24d4027f6 vptestmd k6, zmm22, zmm22
62127d4765c0 vblendmps zmm8 {k7}, zmm16, zmm24
6212fd4765c0 vblendmpd zmm8 {k7}, zmm16, zmm24
62137d4808c009 vrndscaleps zmm8, zmm24, 9
62137d4826c000 vgetmantps zmm8, zmm24, 0
6253354823c14e vshuff32x4 zmm8, zmm9, zmm9, 78
62337d4804c3b1 vpermilps zmm8, zmm19, 177
c4e16441d7 kandw k2, k3, k7
c4e16442d7 kandnw k2, k3, k7
c4e16445d7 korw k2, k3, k7
c4e16446d7 kxnorw k2, k3, k7
c4e17844e5 knotw k4, k5
c4e3f930f108 kshiftrw k6, k1, 8
c4e17892c8 kmovw k1, rax
c4e2f8f5c6 bzhi rax, rsi, rax
c442a0f5ca bzhi r9, r10, r11
4c8b8718000000 mov r8, [rdi + 24]
498b84cc00000000 mov rax, [r12 + rcx * 8]
4c898718000000 mov [rdi + 24], r8
498984cc00000000 mov [r12 + rcx * 8], rax
4c038718000000 add r8, [rdi + 24]
490384cc00000000 add rax, [r12 + rcx * 8]
4c3b8718000000 cmp r8, [rdi + 24]
493b84cc00000000 cmp rax, [r12 + rcx * 8]
4c8d8718000000 lea r8, [rdi + 24]
498d84cc00000000 lea rax, [r12 + rcx * 8]
48c7c6ffffffff mov rsi, -1
49c7c607000000 mov r14, 7
4881c110000000 add rcx, 16
4981c7ffffffff add r15, -1
4c29c8 sub rax, r9
4d85d2 test r10, r10
4053 push rbx
4154 push r12
415f pop r15
0f82faffffff jb label0
0f85f4ffffff jne label0
0f84eeffffff je label0
0f83e8ffffff jae label0
0f87e2ffffff ja label0
0f86dcffffff jbe label0
62e1545058251c000000 vaddps zmm20, zmm21, 1e-45 (0x1)
62f15450c21d1500000011 vcmpps k3, zmm21, 3e-45 (0x2), 17
62f27d48182507000000 vbroadcastss zmm4, 1e-45 (0x1)
c5f877c3 vzeroupper; ret
";

#[test]
fn instructions_have_the_bytes_that_a_disassembler_reads_back() {
    let code = sample();
    let text = code.text();
    let lines: Vec<String> = text
        .lines()
        .filter(|line| !line.ends_with(':'))
        .map(|line| {
            let rest = line.split_once(": ").map_or("", |(_, rest)| rest);
            rest.split_whitespace().collect::<Vec<&str>>().join(" ")
        })
        .collect();
    for (line, expected) in lines.iter().zip(EXPECTED.lines()) {
        assert_eq!(line, expected);
    }
    assert_eq!(lines.len(), EXPECTED.lines().count());
    // Two constants follow, each once.
    assert_eq!(code.bytes[code.bytes.len() - 8..], [1, 0, 0, 0, 2, 0, 0, 0]);
}

#[test]
fn too_many_values_at_once_have_no_code() {
    let sum_of = |count: usize| {
        let mut s = Straight::default();
        let from = |offset| Memory::Cursor { cursor: 0, offset, size: 4 };
        let values: Vec<Value> =
            (0..count).map(|at| s.read(asm::LOAD, from(64 * at as i32))).collect();
        let sum = values.iter().rev().fold(values[0], |sum, &value| s.add(sum, value));
        let sum = s.name(sum);
        s.write(asm::STORE, sum, from(0), Lanes::All);
        let section = s.section();
        let mut registers = Registers::new(s.classes.len());
        let none = vec![false; s.classes.len()];
        let place = |_: &mut Assembler, memory| match memory {
            Memory::Cursor { offset, .. } => Address::at(Gpr(8), offset),
            Memory::Word(_) => Address::at(Gpr::RDI, 0),
        };
        registers.emit(&mut Assembler::default(), &section, &s.classes, &none, &place)
    };
    assert!(sum_of(31).is_some());
    assert!(sum_of(33).is_none());
}
