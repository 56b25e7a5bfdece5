//! Registers for straight-line code, from its first instruction to its last, and its encoding.

use super::assembler::{self as asm, Address, Assembler, MASK_UPPER, Mask, Operand, Vector, Zmm};
use super::straight::{Class, Instruction, Lanes, Last, Memory, Name, Value};

/// The columns that there are at the end of a row.
pub(crate) const TAIL: Mask = Mask(1);

/// Who is in which register.
#[derive(Clone)]
pub(crate) struct Registers {
    of: Vec<Option<u8>>,
    /// Free registers, a bit each.
    vectors: u32,
    masks: u32,
}

/// The names that instructions use, those that they change included.
fn sources(instruction: &Instruction) -> impl Iterator<Item = Name> {
    let last = match instruction.last {
        Last::Value(Value::Name(name)) => Some(name),
        Last::Value(Value::Constant(_)) | Last::Memory(_) => None,
    };
    let lanes = match instruction.lanes {
        Lanes::All | Lanes::Tail | Lanes::TailZero => None,
        Lanes::Where(name) | Lanes::Select(name) | Lanes::Upper(name) => Some(name),
    };
    let stored = instruction.stores.then_some(instruction.first);
    [last, lanes, stored, instruction.second, instruction.tied].into_iter().flatten()
}

/// Whether each of `count` names is used by some sections.
pub(crate) fn used(count: usize, sections: &[&[Instruction]]) -> Vec<bool> {
    let mut used = vec![false; count];
    for instruction in sections.iter().copied().flatten() {
        sources(instruction).for_each(|name| used[name.0] = true);
    }
    used
}

impl Registers {
    pub(crate) fn new(names: usize) -> Registers {
        // Mask 0 means no mask, mask 1 is that of the last columns.
        Registers { of: vec![None; names], vectors: u32::MAX, masks: 0xfc }
    }

    /// What is in registers, and what else is used later.
    pub(crate) fn kept(&self, used: &[bool]) -> Vec<bool> {
        self.of.iter().zip(used).map(|(register, &used)| used || register.is_some()).collect()
    }

    fn take(&mut self, class: Class) -> Option<u8> {
        let free = match class {
            Class::Vector => &mut self.vectors,
            Class::Mask => &mut self.masks,
        };
        let lowest = u8::try_from(free.trailing_zeros()).ok().filter(|&lowest| lowest < 32)?;
        *free &= !(1 << lowest);
        Some(lowest)
    }

    fn release(&mut self, name: Name, class: Class) {
        if let Some(register) = self.of[name.0].take() {
            match class {
                Class::Vector => self.vectors |= 1 << register,
                Class::Mask => self.masks |= 1 << register,
            }
        }
    }

    /// Emits a section; names that are kept stay in their registers. `None` if the registers do not suffice.
    pub(crate) fn emit(
        &mut self,
        asm: &mut Assembler,
        section: &[Instruction],
        classes: &[Class],
        keep: &[bool],
        place: &dyn Fn(&mut Assembler, Memory) -> Address,
    ) -> Option<()> {
        let mut ends = vec![None; classes.len()];
        for (at, instruction) in section.iter().enumerate() {
            sources(instruction).for_each(|name| ends[name.0] = Some(at));
        }
        for (at, instruction) in section.iter().enumerate() {
            let first = instruction.first;
            let dies = |name: Name| ends[name.0] == Some(at) && !keep[name.0];
            let dying: Vec<Name> =
                sources(instruction).filter(|&name| dies(name) && name != first).collect();
            // Operands are read before anything is written, so the result may take the register of one.
            let resolved = self.resolve(asm, instruction, place)?;
            let register = match (self.of[first.0], instruction.tied) {
                (Some(register), _) => {
                    self.free(&dying, classes);
                    register
                }
                (None, Some(tied)) => {
                    let old = self.of[tied.0]?;
                    if dying.contains(&tied) {
                        self.of[tied.0] = None;
                        self.free(&dying, classes);
                        old
                    } else {
                        let register = self.take(classes[first.0])?;
                        self.free(&dying, classes);
                        asm.vector(Vector {
                            opcode: asm::MOVE,
                            first: register,
                            second: None,
                            last: Operand::Zmm(Zmm(old)),
                            mask: None,
                            immediate: None,
                        });
                        register
                    }
                }
                (None, None) => {
                    self.free(&dying, classes);
                    self.take(classes[first.0])?
                }
            };
            self.of[first.0] = Some(register);
            encode(asm, instruction, Vector { first: register, ..resolved });
            if ends[first.0].is_none_or(|end| end <= at) && !keep[first.0] {
                self.release(first, classes[first.0]);
            }
        }
        Some(())
    }

    fn free(&mut self, names: &[Name], classes: &[Class]) {
        names.iter().for_each(|&name| self.release(name, classes[name.0]));
    }

    /// The operands in their registers; the first one is the caller's.
    fn resolve(
        &self,
        asm: &mut Assembler,
        instruction: &Instruction,
        place: &dyn Fn(&mut Assembler, Memory) -> Address,
    ) -> Option<Vector> {
        let of = |name: Name| self.of[name.0];
        let last = match instruction.last {
            Last::Value(Value::Name(name)) => Operand::Zmm(Zmm(of(name)?)),
            Last::Value(Value::Constant(bits)) => Operand::Constant(bits),
            Last::Memory(memory) => Operand::Memory(place(asm, memory)),
        };
        let second = match instruction.second {
            Some(name) => Some(Zmm(of(name)?)),
            None => None,
        };
        let mask = match instruction.lanes {
            Lanes::All => None,
            Lanes::Tail => Some((TAIL, false)),
            Lanes::TailZero => Some((TAIL, true)),
            Lanes::Where(name) => Some((Mask(of(name)?), true)),
            Lanes::Select(name) => Some((Mask(of(name)?), false)),
            Lanes::Upper(name) => Some((Mask(of(name)?), !instruction.stores)),
        };
        let (opcode, immediate) = (instruction.opcode, instruction.immediate);
        Some(Vector { opcode, first: 0, second, last, mask, immediate })
    }
}

/// Emits an instruction whose registers are known: on masks, or on vectors.
fn encode(asm: &mut Assembler, instruction: &Instruction, vector: Vector) {
    let opcode = instruction.opcode;
    let to = Mask(vector.first);
    match vector.last {
        _ if opcode == MASK_UPPER => asm.mask_upper(to, TAIL),
        Operand::Zmm(Zmm(last)) if opcode.is_of_masks() => {
            asm.mask(opcode, to, vector.second.map(|second| Mask(second.0)), Mask(last));
        }
        _ => asm.vector(vector),
    }
}
