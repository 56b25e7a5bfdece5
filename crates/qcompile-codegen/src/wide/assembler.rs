//! Machine code of x86-64 with AVX-512: the few instructions that [`super`] needs, constants and labels.
//!
//! Displacements have four bytes, vectors 512 bits. Constants follow the code and are addressed relative to it, each
//! once, as 32 bits that an operand repeats in all lanes. So the code needs no relocation.

use std::fmt::Write as _;

/// A 64-bit register by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gpr(pub u8);

impl Gpr {
    pub(crate) const RAX: Gpr = Gpr(0);
    pub(crate) const RCX: Gpr = Gpr(1);
    pub(crate) const RDX: Gpr = Gpr(2);
    pub(crate) const RSI: Gpr = Gpr(6);
    pub(crate) const RDI: Gpr = Gpr(7);
}

/// A vector register of 16 lanes, 0 to 31.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Zmm(pub u8);

/// A mask register, 0 to 7.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mask(pub u8);

/// `base + index · scale + displacement`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Address {
    pub base: Gpr,
    /// A register and the power of two that it is multiplied by.
    pub index: Option<(Gpr, u8)>,
    pub displacement: i32,
}

impl Address {
    pub(crate) fn at(base: Gpr, displacement: i32) -> Address {
        Address { base, index: None, displacement }
    }
}

/// The last operand of a vector instruction.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Operand {
    Zmm(Zmm),
    Memory(Address),
    /// 32 bits in all lanes.
    Constant(u32),
}

/// What an instruction with a vector prefix is: its name and its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Opcode {
    pub name: &'static str,
    /// The opcode map: 1 for 0F, 2 for 0F38, 3 for 0F3A.
    map: u8,
    /// The implied prefix: 0 for none, 1 for 66, 2 for F3.
    prefix: u8,
    wide: bool,
    byte: u8,
    /// For shifts by a constant: the digit in place of the register, which moves to the third operand.
    digit: Option<u8>,
}

impl Opcode {
    /// Whether the last operand may be a constant that is repeated in all lanes.
    pub(crate) fn takes_constant(self) -> bool {
        self.digit.is_none() && self != MOVE
    }

    /// Whether it is one on masks alone.
    pub(crate) fn is_of_masks(self) -> bool {
        matches!((self.map, self.prefix, self.byte), (1, 0, 0x41..=0x47))
    }
}

macro_rules! opcodes {
    ($($id:ident = $name:literal, $map:literal, $prefix:literal, $wide:literal, $byte:literal $(, $digit:literal)?;)*) => {
        $(pub(crate) const $id: Opcode = Opcode {
            name: $name,
            map: $map,
            prefix: $prefix,
            wide: $wide == 1,
            byte: $byte,
            digit: opcodes!(@digit $($digit)?),
        };)*
    };
    (@digit) => { None };
    (@digit $digit:literal) => { Some($digit) };
}

opcodes! {
    ADD = "vaddps", 1, 0, 0, 0x58;
    MUL = "vmulps", 1, 0, 0, 0x59;
    SUB = "vsubps", 1, 0, 0, 0x5c;
    MIN = "vminps", 1, 0, 0, 0x5d;
    DIV = "vdivps", 1, 0, 0, 0x5e;
    MAX = "vmaxps", 1, 0, 0, 0x5f;
    SQRT = "vsqrtps", 1, 0, 0, 0x51;
    ADD_F64 = "vaddpd", 1, 1, 1, 0x58;
    MUL_F64 = "vmulpd", 1, 1, 1, 0x59;
    MAX_F64 = "vmaxpd", 1, 1, 1, 0x5f;
    LOAD = "vmovups", 1, 0, 0, 0x10;
    STORE = "vmovups", 1, 0, 0, 0x11;
    LOAD_F64 = "vmovupd", 1, 1, 1, 0x10;
    STORE_F64 = "vmovupd", 1, 1, 1, 0x11;
    MOVE = "vmovaps", 1, 0, 0, 0x28;
    INT_TO_FLOAT = "vcvtdq2ps", 1, 0, 0, 0x5b;
    NEAREST_INT = "vcvtps2dq", 1, 1, 0, 0x5b;
    TRUNCATED_INT = "vcvttps2dq", 1, 2, 0, 0x5b;
    TO_F64 = "vcvtps2pd", 1, 0, 0, 0x5a;
    COMPARE = "vcmpps", 1, 0, 0, 0xc2;
    COMPARE_F64 = "vcmppd", 1, 1, 1, 0xc2;
    AND = "vpandd", 1, 1, 0, 0xdb;
    OR = "vpord", 1, 1, 0, 0xeb;
    XOR = "vpxord", 1, 1, 0, 0xef;
    ADD_INT = "vpaddd", 1, 1, 0, 0xfe;
    SUB_INT = "vpsubd", 1, 1, 0, 0xfa;
    SHIFT_LEFT = "vpslld", 1, 1, 0, 0x72, 6;
    SHIFT_RIGHT = "vpsrad", 1, 1, 0, 0x72, 4;
    SHIFT_RIGHT_ZERO = "vpsrld", 1, 1, 0, 0x72, 2;
    BROADCAST = "vbroadcastss", 2, 1, 0, 0x18;
    BROADCAST_F64 = "vbroadcastsd", 2, 1, 1, 0x19;
    BROADCAST_16 = "vpbroadcastw", 2, 1, 0, 0x79;
    BROADCAST_8 = "vpbroadcastb", 2, 1, 0, 0x78;
    WIDEN_U16 = "vpmovzxwd", 2, 1, 0, 0x33;
    WIDEN_I8 = "vpmovsxbd", 2, 1, 0, 0x21;
    WIDEN_U8 = "vpmovzxbd", 2, 1, 0, 0x31;
    NARROW_16 = "vpmovdw", 2, 2, 0, 0x33;
    NARROW_8 = "vpmovdb", 2, 2, 0, 0x31;
    MAX_INT = "vpmaxsd", 2, 1, 0, 0x3d;
    MIN_INT = "vpminsd", 2, 1, 0, 0x39;
    MUL_INT = "vpmulld", 2, 1, 0, 0x40;
    ABS_INT = "vpabsd", 2, 1, 0, 0x1e;
    MUL_ADD_213 = "vfmadd213ps", 2, 1, 0, 0xa8;
    MUL_ADD_231 = "vfmadd231ps", 2, 1, 0, 0xb8;
    NEG_MUL_ADD_213 = "vfnmadd213ps", 2, 1, 0, 0xac;
    EXPONENT = "vgetexpps", 2, 1, 0, 0x42;
    SCALE = "vscalefps", 2, 1, 0, 0x2c;
    BLEND = "vblendmps", 2, 1, 0, 0x65;
    BLEND_F64 = "vblendmpd", 2, 1, 1, 0x65;
    TEST = "vptestmd", 2, 1, 0, 0x27;
    ROUND = "vrndscaleps", 3, 1, 0, 0x08;
    COMPARE_INT = "vpcmpd", 3, 1, 0, 0x1f;
    SIGNIFICAND = "vgetmantps", 3, 1, 0, 0x26;
    SHUFFLE_QUARTERS = "vshuff32x4", 3, 1, 0, 0x23;
    SHUFFLE_LANES = "vpermilps", 3, 1, 0, 0x04;
}

/// The upper half of the mask of the last columns.
pub(crate) const MASK_UPPER: Opcode =
    Opcode { name: "kshiftrw", map: 3, prefix: 1, wide: true, byte: 0x30, digit: None };

/// Instructions on masks.
macro_rules! mask_opcodes {
    ($($id:ident = $name:literal, $byte:literal;)*) => {
        $(pub(crate) const $id: Opcode = Opcode {
            name: $name, map: 1, prefix: 0, wide: false, byte: $byte, digit: None,
        };)*
    };
}

mask_opcodes! {
    MASK_AND = "kandw", 0x41;
    MASK_AND_NOT = "kandnw", 0x42;
    MASK_OR = "korw", 0x45;
    MASK_EQUAL = "kxnorw", 0x46;
    MASK_NOT = "knotw", 0x44;
}

/// One vector instruction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vector {
    pub opcode: Opcode,
    /// The register of the first operand: a vector or a mask.
    pub first: u8,
    /// The vector that is the second operand, of instructions with three.
    pub second: Option<Zmm>,
    pub last: Operand,
    /// Lanes that are written, and whether the others become 0.
    pub mask: Option<(Mask, bool)>,
    pub immediate: Option<u8>,
}

/// A place in the code that jumps go to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Label(usize);

/// When a jump is taken, after a comparison of unsigned numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    Below,
    NotEqual,
    Equal,
    AboveOrEqual,
    Above,
    BelowOrEqual,
}

/// Instructions between 64-bit registers and memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    Load,
    Store,
    Add,
    Compare,
    Address,
}

/// An instruction in words, or what they are made from.
#[derive(Clone, Debug)]
enum Line {
    Vector(Vector),
    Other(String),
}

/// Finished code.
#[derive(Clone, Debug)]
pub(crate) struct Code {
    /// The bytes, constants included.
    pub bytes: Vec<u8>,
    /// Each instruction: where it begins and ends, and what it is.
    lines: Vec<(usize, usize, Line)>,
}

impl Code {
    /// The instructions with their bytes, one a line.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        for (start, end, line) in &self.lines {
            let bytes: String =
                self.bytes[*start..*end].iter().map(|byte| format!("{byte:02x}")).collect();
            let words = match line {
                Line::Vector(vector) => words(vector),
                Line::Other(words) => words.clone(),
            };
            // Writing to a string does not fail.
            let _ = writeln!(text, "  {start:5x}: {bytes:22} {words}");
        }
        text
    }
}

/// Collects instructions.
#[derive(Default)]
pub(crate) struct Assembler {
    bytes: Vec<u8>,
    constants: Vec<u32>,
    /// Where displacements of constants are, where their instructions end, and which.
    uses: Vec<(usize, usize, usize)>,
    labels: Vec<Option<usize>>,
    jumps: Vec<(usize, Label)>,
    /// Each instruction: where it begins and ends, and what it is.
    lines: Vec<(usize, usize, Line)>,
}

impl Assembler {
    fn line(&mut self, start: usize, text: &str) {
        self.lines.push((start, self.bytes.len(), Line::Other(text.to_owned())));
    }

    /// ModRM, SIB and displacement of an address.
    fn address(&mut self, register: u8, address: Address) {
        let (low, base) = (register & 7, address.base.0 & 7);
        match address.index {
            Some((index, scale)) => {
                let shift = scale.trailing_zeros() as u8;
                self.bytes.extend([0x84 | low << 3, shift << 6 | (index.0 & 7) << 3 | base]);
            }
            None if base == 4 => self.bytes.extend([0x84 | low << 3, 0x24]),
            None => self.bytes.push(0x80 | low << 3 | base),
        }
        self.bytes.extend(address.displacement.to_le_bytes());
    }

    /// A vector instruction.
    pub(crate) fn vector(&mut self, instruction: Vector) {
        let start = self.bytes.len();
        let Vector { opcode, first, second, last, mask, immediate } = instruction;
        let (register, third) = match opcode.digit {
            Some(digit) => (digit, first),
            None => (first, second.map_or(0, |second| second.0)),
        };
        let (high, index) = match last {
            Operand::Zmm(Zmm(number)) => (number >> 3 & 1, number >> 4),
            Operand::Constant(_) => (0, 0),
            Operand::Memory(address) => {
                (address.base.0 >> 3, address.index.map_or(0, |(index, _)| index.0 >> 3))
            }
        };
        let not = |bit: u8, at: u8| (!bit & 1) << at;
        self.bytes.push(0x62);
        self.bytes.push(
            not(register >> 3, 7)
                | not(index, 6)
                | not(high, 5)
                | not(register >> 4, 4)
                | opcode.map,
        );
        self.bytes.push(u8::from(opcode.wide) << 7 | (!third & 15) << 3 | 4 | opcode.prefix);
        let (number, zero) = mask.map_or((0, false), |(mask, zero)| (mask.0, zero));
        let spread = matches!(last, Operand::Constant(_)) && opcode != BROADCAST;
        self.bytes.push(
            u8::from(zero) << 7 | 2 << 5 | u8::from(spread) << 4 | not(third >> 4, 3) | number,
        );
        self.bytes.push(opcode.byte);
        match last {
            Operand::Zmm(Zmm(number)) => {
                self.bytes.push(0xc0 | (register & 7) << 3 | number & 7);
            }
            Operand::Memory(address) => self.address(register, address),
            Operand::Constant(bits) => {
                self.bytes.push((register & 7) << 3 | 5);
                let at = self.bytes.len();
                self.bytes.extend([0; 4]);
                let end = self.bytes.len() + usize::from(immediate.is_some());
                let known = self.constants.iter().position(|&constant| constant == bits);
                let constant = known.unwrap_or_else(|| {
                    self.constants.push(bits);
                    self.constants.len() - 1
                });
                self.uses.push((at, end, constant));
            }
        }
        self.bytes.extend(immediate);
        self.lines.push((start, self.bytes.len(), Line::Vector(instruction)));
    }

    fn vex(&mut self, [r, b]: [u8; 2], map: u8, wide: bool, third: u8, length: u8, prefix: u8) {
        self.bytes.push(0xc4);
        self.bytes.push((!r & 1) << 7 | 1 << 6 | (!b & 1) << 5 | map);
        self.bytes.push(u8::from(wide) << 7 | (!third & 15) << 3 | length << 2 | prefix);
    }

    /// An instruction on masks; those of one operand have no `x`.
    pub(crate) fn mask(&mut self, opcode: Opcode, to: Mask, x: Option<Mask>, y: Mask) {
        let start = self.bytes.len();
        let (third, length) = x.map_or((0, 0), |x| (x.0, 1));
        self.vex([0, 0], opcode.map, false, third, length, opcode.prefix);
        self.bytes.extend([opcode.byte, 0xc0 | to.0 << 3 | y.0]);
        let middle = x.map_or(String::new(), |x| format!(" k{},", x.0));
        self.line(start, &format!("{} k{},{middle} k{}", opcode.name, to.0, y.0));
    }

    /// The upper half of a mask as the lower one of another.
    pub(crate) fn mask_upper(&mut self, to: Mask, from: Mask) {
        let start = self.bytes.len();
        self.vex([0, 0], 3, true, 0, 0, 1);
        self.bytes.extend([0x30, 0xc0 | to.0 << 3 | from.0, 8]);
        self.line(start, &format!("kshiftrw k{}, k{}, 8", to.0, from.0));
    }

    /// A mask of the lowest bits of a register.
    pub(crate) fn mask_from(&mut self, to: Mask, from: Gpr) {
        let start = self.bytes.len();
        self.vex([0, from.0 >> 3], 1, false, 0, 0, 0);
        self.bytes.extend([0x92, 0xc0 | to.0 << 3 | from.0 & 7]);
        self.line(start, &format!("kmovw k{}, {}", to.0, name(from)));
    }

    /// The lowest `count` bits of `from`, all if there are more; `count` is below 256.
    pub(crate) fn low_bits(&mut self, to: Gpr, from: Gpr, count: Gpr) {
        let start = self.bytes.len();
        self.vex([to.0 >> 3, from.0 >> 3], 2, true, count.0, 0, 0);
        self.bytes.extend([0xf5, 0xc0 | (to.0 & 7) << 3 | from.0 & 7]);
        self.line(start, &format!("bzhi {}, {}, {}", name(to), name(from), name(count)));
    }

    /// An instruction on a 64-bit register and memory.
    pub(crate) fn word(&mut self, word: Word, register: Gpr, address: Address) {
        let start = self.bytes.len();
        let (byte, text) = match word {
            Word::Load => (0x8b, "mov"),
            Word::Store => (0x89, "mov"),
            Word::Add => (0x03, "add"),
            Word::Compare => (0x3b, "cmp"),
            Word::Address => (0x8d, "lea"),
        };
        let index = address.index.map_or(0, |(index, _)| index.0 >> 3);
        self.bytes.push(0x48 | (register.0 >> 3) << 2 | index << 1 | address.base.0 >> 3);
        self.bytes.push(byte);
        self.address(register.0, address);
        let (place, register) = (place(address), name(register));
        let text = if word == Word::Store {
            format!("{text} {place}, {register}")
        } else {
            format!("{text} {register}, {place}")
        };
        self.line(start, &text);
    }

    /// A constant, sign-extended.
    pub(crate) fn set(&mut self, to: Gpr, value: i32) {
        let start = self.bytes.len();
        self.bytes.extend([0x48 | to.0 >> 3, 0xc7, 0xc0 | to.0 & 7]);
        self.bytes.extend(value.to_le_bytes());
        self.line(start, &format!("mov {}, {value}", name(to)));
    }

    /// Adds a constant; comparisons with 0 may follow.
    pub(crate) fn add(&mut self, to: Gpr, value: i32) {
        let start = self.bytes.len();
        self.bytes.extend([0x48 | to.0 >> 3, 0x81, 0xc0 | to.0 & 7]);
        self.bytes.extend(value.to_le_bytes());
        self.line(start, &format!("add {}, {value}", name(to)));
    }

    /// Subtracts a register from another.
    pub(crate) fn subtract(&mut self, from: Gpr, what: Gpr) {
        let start = self.bytes.len();
        let rex = 0x48 | (what.0 >> 3) << 2 | from.0 >> 3;
        self.bytes.extend([rex, 0x29, 0xc0 | (what.0 & 7) << 3 | from.0 & 7]);
        self.line(start, &format!("sub {}, {}", name(from), name(what)));
    }

    /// Compares a register with 0.
    pub(crate) fn test(&mut self, register: Gpr) {
        let start = self.bytes.len();
        let number = register.0 & 7;
        let high = register.0 >> 3;
        self.bytes.extend([0x48 | high << 2 | high, 0x85, 0xc0 | number << 3 | number]);
        self.line(start, &format!("test {0}, {0}", name(register)));
    }

    pub(crate) fn push(&mut self, register: Gpr) {
        let start = self.bytes.len();
        self.bytes.extend([0x40 | register.0 >> 3, 0x50 | register.0 & 7]);
        self.line(start, &format!("push {}", name(register)));
    }

    pub(crate) fn pop(&mut self, register: Gpr) {
        let start = self.bytes.len();
        self.bytes.extend([0x40 | register.0 >> 3, 0x58 | register.0 & 7]);
        self.line(start, &format!("pop {}", name(register)));
    }

    /// Leaves the function; upper halves of vectors are cleared, so that code of other vector sizes is not slowed.
    pub(crate) fn leave(&mut self) {
        let start = self.bytes.len();
        self.bytes.extend([0xc5, 0xf8, 0x77, 0xc3]);
        self.line(start, "vzeroupper; ret");
    }

    /// A label for jumps in both directions, yet to be [placed](Self::place).
    pub(crate) fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// Puts a label here.
    pub(crate) fn place(&mut self, label: Label) {
        self.labels[label.0] = Some(self.bytes.len());
        self.line(self.bytes.len(), &format!("label{}:", label.0));
    }

    pub(crate) fn jump(&mut self, when: When, to: Label) {
        let start = self.bytes.len();
        let (byte, text) = match when {
            When::Below => (0x82, "jb"),
            When::NotEqual => (0x85, "jne"),
            When::Equal => (0x84, "je"),
            When::AboveOrEqual => (0x83, "jae"),
            When::Above => (0x87, "ja"),
            When::BelowOrEqual => (0x86, "jbe"),
        };
        self.bytes.extend([0x0f, byte, 0, 0, 0, 0]);
        self.jumps.push((self.bytes.len() - 4, to));
        self.line(start, &format!("{text} label{}", to.0));
    }

    /// The code with its constants and jumps. All labels are placed.
    pub(crate) fn finish(mut self) -> Code {
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0xcc);
        }
        let pool = self.bytes.len();
        for constant in &self.constants {
            self.bytes.extend(constant.to_le_bytes());
        }
        let distance = |from: usize, to: usize| (to as i64 - from as i64) as i32;
        for &(at, end, constant) in &self.uses {
            let bytes = distance(end, pool + 4 * constant).to_le_bytes();
            self.bytes[at..at + 4].copy_from_slice(&bytes);
        }
        for &(at, label) in &self.jumps {
            let to = self.labels[label.0].unwrap_or(pool);
            self.bytes[at..at + 4].copy_from_slice(&distance(at + 4, to).to_le_bytes());
        }
        Code { bytes: self.bytes, lines: self.lines }
    }
}

fn name(register: Gpr) -> String {
    const NAMES: [&str; 8] = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"];
    match NAMES.get(usize::from(register.0)) {
        Some(&name) => name.to_owned(),
        None => format!("r{}", register.0),
    }
}

fn place(address: Address) -> String {
    let index = address
        .index
        .map_or(String::new(), |(index, scale)| format!(" + {} * {scale}", name(index)));
    let displacement = match address.displacement {
        0 => String::new(),
        bytes => format!(" + {bytes}"),
    };
    format!("[{}{index}{displacement}]", name(address.base))
}

/// A vector instruction as text, operands in the order of its encoding.
fn words(instruction: &Vector) -> String {
    let Vector { opcode, first, second, last, mask, immediate } = *instruction;
    let to_mask = [COMPARE, COMPARE_F64, COMPARE_INT, TEST].contains(&opcode);
    let stores = [STORE, STORE_F64, NARROW_16, NARROW_8].contains(&opcode);
    let mask = mask.map_or(String::new(), |(mask, zero)| {
        format!(" {{k{}}}{}", mask.0, if zero { "{z}" } else { "" })
    });
    let first = format!("{}{first}", if to_mask { "k" } else { "zmm" });
    let second = second.map_or(String::new(), |second| format!(", zmm{}", second.0));
    let last = match last {
        Operand::Zmm(register) => format!("zmm{}", register.0),
        Operand::Memory(address) => place(address),
        Operand::Constant(bits) => format!("{:?} ({bits:#x})", f32::from_bits(bits)),
    };
    let immediate = immediate.map_or(String::new(), |value| format!(", {value}"));
    if stores {
        return format!("{} {last}{mask}, {first}{immediate}", opcode.name);
    }
    format!("{} {first}{mask}{second}, {last}{immediate}", opcode.name)
}
