//! Straight-line code on vectors of 16 lanes before registers are chosen: floats are f32, integers i32, truth values
//! masks. The arithmetic is that of [`lanes`](crate::lanes).

use super::assembler::{self as asm, Opcode};

/// A virtual register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Name(pub usize);

/// A value of a body: in a register, or a constant of 32 bits, which instructions take from memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Name(Name),
    Constant(u32),
}

/// Memory of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Memory {
    /// An element or a vector of them at a cursor.
    Cursor {
        cursor: usize,
        /// Bytes from the cursor.
        offset: i32,
        /// Bytes of an element that columns step by; 0 for the same element in every column.
        size: u8,
    },
    /// A word of the argument block.
    Word(usize),
}

/// The last operand of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Last {
    Value(Value),
    Memory(Memory),
}

/// Which lanes an instruction writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lanes {
    All,
    /// The columns that there are, at the end of a row; other lanes keep what they hold.
    Tail,
    /// The same, but other lanes become 0.
    TailZero,
    /// Where a mask is set; others become 0.
    Where(Name),
    /// As the instruction says.
    Select(Name),
    /// The columns of the upper half, at the end of a row.
    Upper(Name),
}

/// An instruction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Instruction {
    pub opcode: Opcode,
    /// What it defines; of stores what they store.
    pub first: Name,
    pub stores: bool,
    /// A value that it changes in place: it takes that one's register or a copy of it.
    pub tied: Option<Name>,
    pub second: Option<Name>,
    pub last: Last,
    pub lanes: Lanes,
    pub immediate: Option<u8>,
}

/// What kind of register holds a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    Vector,
    Mask,
}

/// Comparisons of floats: the numbers of the instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Is {
    Equal = 0,
    Unordered = 3,
    NotEqual = 4,
    Ordered = 7,
    AtLeast = 29,
    Greater = 30,
    Less = 17,
    AtMost = 18,
}

/// Comparisons of integers: the numbers of the instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum IsInt {
    Equal = 0,
    Less = 1,
    AtMost = 2,
    NotEqual = 4,
}

/// Collects instructions.
#[derive(Default)]
pub(crate) struct Straight {
    pub classes: Vec<Class>,
    pub instructions: Vec<Instruction>,
    /// Whether columns may be missing at the end of a vector.
    pub tail: bool,
}

pub(crate) fn float(value: f32) -> Value {
    Value::Constant(value.to_bits())
}

impl Straight {
    pub(crate) fn fresh(&mut self, class: Class) -> Name {
        self.classes.push(class);
        Name(self.classes.len() - 1)
    }

    /// What was collected since the last call.
    pub(crate) fn section(&mut self) -> Vec<Instruction> {
        std::mem::take(&mut self.instructions)
    }

    pub(crate) fn push(&mut self, instruction: Instruction) -> Name {
        self.instructions.push(instruction);
        instruction.first
    }

    fn plain(&mut self, opcode: Opcode, class: Class, last: Last) -> Instruction {
        Instruction {
            opcode,
            first: self.fresh(class),
            stores: false,
            tied: None,
            second: None,
            last,
            lanes: Lanes::All,
            immediate: None,
        }
    }

    /// An instruction of one operand.
    pub(crate) fn one(&mut self, opcode: Opcode, x: Value, immediate: Option<u8>) -> Value {
        let last = if opcode.takes_constant() { x } else { Value::Name(self.name(x)) };
        let plain = self.plain(opcode, Class::Vector, Last::Value(last));
        Value::Name(self.push(Instruction { immediate, ..plain }))
    }

    /// An instruction of two operands, the second of which may be a constant.
    pub(crate) fn two(&mut self, opcode: Opcode, x: Value, y: Value) -> Value {
        let second = Some(self.name(x));
        let plain = self.plain(opcode, Class::Vector, Last::Value(y));
        Value::Name(self.push(Instruction { second, ..plain }))
    }

    /// The same where the operands may change places.
    pub(crate) fn either(&mut self, opcode: Opcode, x: Value, y: Value) -> Value {
        match x {
            Value::Constant(_) => self.two(opcode, y, x),
            Value::Name(_) => self.two(opcode, x, y),
        }
    }

    /// The value in a register.
    pub(crate) fn name(&mut self, x: Value) -> Name {
        match x {
            Value::Name(name) => name,
            Value::Constant(_) => {
                let plain = self.plain(asm::BROADCAST, Class::Vector, Last::Value(x));
                self.push(plain)
            }
        }
    }

    pub(crate) fn add(&mut self, x: Value, y: Value) -> Value {
        self.either(asm::ADD, x, y)
    }

    pub(crate) fn sub(&mut self, x: Value, y: Value) -> Value {
        self.two(asm::SUB, x, y)
    }

    pub(crate) fn mul(&mut self, x: Value, y: Value) -> Value {
        self.either(asm::MUL, x, y)
    }

    pub(crate) fn div(&mut self, x: Value, y: Value) -> Value {
        self.two(asm::DIV, x, y)
    }

    /// `x · y + z`, rounded once.
    pub(crate) fn mul_add(&mut self, x: Value, y: Value, z: Value) -> Value {
        let (opcode, tied, second, last) = match (y, z) {
            (Value::Constant(_), Value::Name(_)) => (asm::MUL_ADD_231, z, x, y),
            _ => (asm::MUL_ADD_213, x, y, z),
        };
        let (tied, second) = (Some(self.name(tied)), Some(self.name(second)));
        let plain = self.plain(opcode, Class::Vector, Last::Value(last));
        Value::Name(self.push(Instruction { tied, second, ..plain }))
    }

    /// `z - x · y`, rounded once.
    pub(crate) fn neg_mul_add(&mut self, x: Value, y: Value, z: Value) -> Value {
        let (tied, second) = (Some(self.name(x)), Some(self.name(y)));
        let plain = self.plain(asm::NEG_MUL_ADD_213, Class::Vector, Last::Value(z));
        Value::Name(self.push(Instruction { tied, second, ..plain }))
    }

    /// A polynomial in `x`, highest coefficient first.
    pub(crate) fn polynomial(&mut self, x: Value, coefficients: &[f32]) -> Value {
        let (&first, rest) = coefficients.split_first().unwrap_or((&0.0, &[]));
        rest.iter().fold(float(first), |sum, &coefficient| self.mul_add(sum, x, float(coefficient)))
    }

    /// `x < y ? y : x`: the first if either is not a number.
    pub(crate) fn larger(&mut self, x: Value, y: Value) -> Value {
        let x = Value::Name(self.name(x));
        self.two(asm::MAX, y, x)
    }

    /// `y < x ? y : x`: the first if either is not a number.
    pub(crate) fn smaller(&mut self, x: Value, y: Value) -> Value {
        let x = Value::Name(self.name(x));
        self.two(asm::MIN, y, x)
    }

    /// The maximum, or the minimum; not a number if either is not.
    pub(crate) fn extreme(&mut self, maximum: bool, x: Value, y: Value) -> Value {
        let (x, y) = if matches!(x, Value::Constant(_)) { (y, x) } else { (x, y) };
        let result = if maximum { self.larger(x, y) } else { self.smaller(x, y) };
        if matches!(y, Value::Constant(bits) if !f32::from_bits(bits).is_nan()) {
            return result;
        }
        let strange = self.compare(Is::Unordered, y, y);
        self.choose(strange, y, result)
    }

    /// `x` where the mask is set, else `y`.
    pub(crate) fn choose(&mut self, mask: Name, x: Value, y: Value) -> Value {
        let second = Some(self.name(y));
        let plain = self.plain(asm::BLEND, Class::Vector, Last::Value(x));
        Value::Name(self.push(Instruction { second, lanes: Lanes::Select(mask), ..plain }))
    }

    /// `x` where the mask is set, else 0.
    pub(crate) fn keep(&mut self, mask: Name, x: Value) -> Value {
        let opcode = match x {
            Value::Name(_) => asm::MOVE,
            Value::Constant(_) => asm::BROADCAST,
        };
        let plain = self.plain(opcode, Class::Vector, Last::Value(x));
        Value::Name(self.push(Instruction { lanes: Lanes::Where(mask), ..plain }))
    }

    pub(crate) fn compare(&mut self, is: Is, x: Value, y: Value) -> Name {
        self.comparing(asm::COMPARE, is as u8, x, y)
    }

    pub(crate) fn compare_int(&mut self, is: IsInt, x: Value, y: Value) -> Name {
        self.comparing(asm::COMPARE_INT, is as u8, x, y)
    }

    fn comparing(&mut self, opcode: Opcode, is: u8, x: Value, y: Value) -> Name {
        let second = Some(self.name(x));
        let plain = self.plain(opcode, Class::Mask, Last::Value(y));
        self.push(Instruction { second, immediate: Some(is), ..plain })
    }

    /// An instruction on masks.
    pub(crate) fn masks(&mut self, opcode: Opcode, x: Option<Name>, y: Name) -> Name {
        let plain = self.plain(opcode, Class::Mask, Last::Value(Value::Name(y)));
        self.push(Instruction { second: x, ..plain })
    }

    /// The upper half of the mask of the last columns.
    pub(crate) fn upper_mask(&mut self) -> Name {
        let plain = self.plain(asm::MASK_UPPER, Class::Mask, Last::Value(Value::Constant(0)));
        self.push(plain)
    }

    /// A shift by a constant.
    pub(crate) fn shift(&mut self, opcode: Opcode, x: Value, by: u8) -> Value {
        self.one(opcode, x, Some(by))
    }

    pub(crate) fn and(&mut self, x: Value, bits: u32) -> Value {
        self.either(asm::AND, x, Value::Constant(bits))
    }

    /// A load by an instruction that widens or repeats.
    pub(crate) fn read(&mut self, opcode: Opcode, from: Memory) -> Value {
        let along = matches!(from, Memory::Cursor { size, .. } if size != 0);
        let lanes = if self.tail && along { Lanes::TailZero } else { Lanes::All };
        let plain = self.plain(opcode, Class::Vector, Last::Memory(from));
        Value::Name(self.push(Instruction { lanes, ..plain }))
    }

    /// A store; at the end of a row only of the columns that there are.
    pub(crate) fn write(&mut self, opcode: Opcode, value: Name, to: Memory, lanes: Lanes) {
        self.instructions.push(Instruction {
            opcode,
            first: value,
            stores: true,
            tied: None,
            second: None,
            last: Last::Memory(to),
            lanes,
            immediate: None,
        });
    }

    /// Changes a register in place: `opcode` of it or `second`, and `last`.
    pub(crate) fn update(
        &mut self,
        opcode: Opcode,
        place: Name,
        second: Option<Name>,
        last: Value,
        lanes: Lanes,
    ) {
        let tied = Some(place);
        self.push(Instruction {
            opcode,
            first: place,
            stores: false,
            tied,
            second,
            last: Last::Value(last),
            lanes,
            immediate: None,
        });
    }

    /// The lanes of a value in another order.
    pub(crate) fn shuffle(&mut self, opcode: Opcode, x: Value, order: u8) -> Value {
        let x = self.name(x);
        // Within quarters there is one operand, between them there are two.
        let second = (opcode == asm::SHUFFLE_QUARTERS).then_some(x);
        let plain = self.plain(opcode, Class::Vector, Last::Value(Value::Name(x)));
        Value::Name(self.push(Instruction { second, immediate: Some(order), ..plain }))
    }

    /// Half of the lanes as f64.
    pub(crate) fn widened(&mut self, x: Value, upper: bool) -> Value {
        let x = if upper { self.shuffle(asm::SHUFFLE_QUARTERS, x, 0xee) } else { x };
        let x = Value::Name(self.name(x));
        let plain = self.plain(asm::TO_F64, Class::Vector, Last::Value(x));
        Value::Name(self.push(plain))
    }

    /// A load of some lanes.
    pub(crate) fn read_lanes(&mut self, opcode: Opcode, from: Memory, lanes: Lanes) -> Value {
        let plain = self.plain(opcode, Class::Vector, Last::Memory(from));
        Value::Name(self.push(Instruction { lanes, ..plain }))
    }

    pub(crate) fn compare_f64(&mut self, is: Is, x: Value, y: Value) -> Name {
        self.comparing(asm::COMPARE_F64, is as u8, x, y)
    }

    pub(crate) fn choose_f64(&mut self, mask: Name, x: Value, y: Value) -> Value {
        let second = Some(self.name(y));
        let plain = self.plain(asm::BLEND_F64, Class::Vector, Last::Value(x));
        Value::Name(self.push(Instruction { second, lanes: Lanes::Select(mask), ..plain }))
    }
}
