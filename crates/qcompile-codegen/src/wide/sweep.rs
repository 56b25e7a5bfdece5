//! The two loops around straight-line code: counters, cursors, and the mask of the last columns.

use super::Layout;
use super::assembler::{Address, Assembler, Code, Gpr, When, Word};
use super::lower::{Order, Sections, Shape};
use super::registers::{Registers, TAIL, used};
use super::straight::{Instruction, Memory};

/// Points to the argument block.
const BLOCK: Gpr = Gpr::RDI;
/// The first column of this turn.
const COLUMN: Gpr = Gpr::RCX;
/// Rows that are left.
const ROWS: Gpr = Gpr::RDX;
/// All bits.
const ONES: Gpr = Gpr::RSI;
/// Scratch.
const ANY: Gpr = Gpr::RAX;
/// What the caller gets back as it was.
const SAVED: [Gpr; 6] = [Gpr(3), Gpr(5), Gpr(12), Gpr(13), Gpr(14), Gpr(15)];
/// Registers for cursors; others are in the argument block.
const CURSORS: [Gpr; 10] =
    [Gpr(8), Gpr(9), Gpr(10), Gpr(11), SAVED[0], SAVED[1], SAVED[2], SAVED[3], SAVED[4], SAVED[5]];

fn word(index: usize) -> Address {
    Address::at(BLOCK, 8 * index as i32)
}

struct Sweep<'s> {
    asm: Assembler,
    shape: &'s Shape,
    sections: &'s Sections,
}

/// The function. `None` if the registers do not suffice.
pub(crate) fn emit(shape: &Shape, sections: &Sections) -> Option<Code> {
    let mut sweep = Sweep { asm: Assembler::default(), shape, sections };
    let saved = &SAVED[..shape.cursors.len().saturating_sub(4).min(SAVED.len())];
    saved.iter().for_each(|&register| sweep.asm.push(register));
    let end = sweep.asm.label();
    for size in [Layout::ROWS, Layout::COLUMNS] {
        sweep.asm.word(Word::Load, ANY, word(size));
        sweep.asm.test(ANY);
        sweep.asm.jump(When::Equal, end);
    }
    sweep.asm.set(ONES, -1);
    match sections.order {
        Order::Rows => sweep.rows()?,
        Order::Columns => sweep.columns()?,
    }
    sweep.asm.place(end);
    saved.iter().rev().for_each(|&register| sweep.asm.pop(register));
    sweep.asm.leave();
    Some(sweep.asm.finish())
}

impl Sweep<'_> {
    /// Emits a section. `then` are those after it, besides those that ran before, which may run again; `indexed` says
    /// that cursors stand at the first column.
    fn section(
        &mut self,
        registers: &mut Registers,
        section: &[Instruction],
        then: &[&[Instruction]],
        indexed: bool,
    ) -> Option<()> {
        let classes = &self.sections.straight.classes;
        let keep = registers.kept(&used(classes.len(), then));
        registers.emit(&mut self.asm, section, classes, &keep, &|asm, memory| match memory {
            Memory::Word(index) => word(index),
            Memory::Cursor { cursor, offset, size } => {
                let base = CURSORS.get(cursor).copied().unwrap_or_else(|| {
                    asm.word(Word::Load, ANY, word(Layout::current(cursor)));
                    ANY
                });
                let index = (indexed && size != 0).then_some((COLUMN, size));
                Address { base, index, displacement: offset }
            }
        })
    }

    /// Puts all cursors at the first row, and at the current column if `along`.
    fn start(&mut self, along: bool) {
        for (at, cursor) in self.shape.cursors.iter().enumerate() {
            let home = CURSORS.get(at).copied();
            let register = home.unwrap_or(ANY);
            self.asm.word(Word::Load, register, word(Layout::base(at)));
            if along && cursor.along {
                let index = Some((COLUMN, cursor.bytes));
                let address = Address { base: register, index, displacement: 0 };
                self.asm.word(Word::Address, register, address);
            }
            if home.is_none() {
                self.asm.word(Word::Store, ANY, word(Layout::current(at)));
            }
        }
    }

    /// Moves all cursors to the next row.
    fn advance(&mut self) {
        for (at, cursor) in self.shape.cursors.iter().enumerate() {
            if !cursor.down {
                continue;
            }
            let stride = word(Layout::stride(at));
            match CURSORS.get(at) {
                Some(&register) => self.asm.word(Word::Add, register, stride),
                None => {
                    self.asm.word(Word::Load, ANY, stride);
                    self.asm.word(Word::Add, ANY, word(Layout::current(at)));
                    self.asm.word(Word::Store, ANY, word(Layout::current(at)));
                }
            }
        }
    }

    /// The mask of the columns from the current one on.
    fn mask(&mut self) {
        self.asm.word(Word::Load, ANY, word(Layout::COLUMNS));
        self.asm.subtract(ANY, COLUMN);
        self.asm.low_bits(ANY, ONES, ANY);
        self.asm.mask_from(TAIL, ANY);
    }

    /// The mask of one column.
    fn first(&mut self) {
        self.asm.set(ANY, 1);
        self.asm.mask_from(TAIL, ANY);
    }

    /// Compares the column after so many vectors with the number of columns.
    fn compare(&mut self, parts: usize) {
        let next = Address::at(COLUMN, 16 * parts as i32);
        self.asm.word(Word::Address, ANY, next);
        self.asm.word(Word::Compare, ANY, word(Layout::COLUMNS));
    }

    /// Goes over the columns: whole vectors, then what is left.
    fn over_columns(&mut self, mut turn: impl FnMut(&mut Self, bool) -> Option<()>) -> Option<()> {
        self.asm.set(COLUMN, 0);
        let parts = self.sections.parts;
        let (main, rest, tail, end) =
            (self.asm.label(), self.asm.label(), self.asm.label(), self.asm.label());
        self.compare(parts);
        self.asm.jump(When::Above, rest);
        self.asm.place(main);
        turn(self, false)?;
        self.asm.add(COLUMN, 16 * parts as i32);
        self.compare(parts);
        self.asm.jump(When::BelowOrEqual, main);
        self.asm.place(rest);
        self.asm.word(Word::Compare, COLUMN, word(Layout::COLUMNS));
        self.asm.jump(When::AboveOrEqual, end);
        self.asm.place(tail);
        self.mask();
        turn(self, true)?;
        self.asm.add(COLUMN, 16);
        self.asm.word(Word::Compare, COLUMN, word(Layout::COLUMNS));
        self.asm.jump(When::Below, tail);
        self.asm.place(end);
        Some(())
    }

    fn rows(&mut self) -> Option<()> {
        let sections = self.sections;
        let [outer, main, finish] = &sections.main;
        let (before, tail, after) = (&sections.before, &sections.tail[1], &sections.after);
        let mut registers = Registers::new(sections.straight.classes.len());
        self.start(false);
        self.section(&mut registers, before, &[outer, main, tail, finish, after], false)?;
        self.asm.word(Word::Load, ROWS, word(Layout::ROWS));
        let row = self.asm.label();
        self.asm.place(row);
        let mut inside = registers.clone();
        self.section(&mut inside, outer, &[main, tail, finish], false)?;
        self.over_columns(|sweep, last| {
            let turn = if last { tail } else { main };
            sweep.section(&mut inside.clone(), turn, &[], true)
        })?;
        if !finish.is_empty() {
            self.first();
            self.section(&mut inside, finish, &[], false)?;
        }
        self.advance();
        self.asm.add(ROWS, -1);
        self.asm.jump(When::NotEqual, row);
        if !after.is_empty() {
            self.first();
            self.section(&mut registers, after, &[], false)?;
        }
        Some(())
    }

    fn columns(&mut self) -> Option<()> {
        let sections = self.sections;
        let (before, after) = (&sections.before, &sections.after);
        let all: Vec<&[Instruction]> =
            sections.main.iter().chain(&sections.tail).chain([after]).map(Vec::as_slice).collect();
        let mut registers = Registers::new(sections.straight.classes.len());
        self.start(false);
        self.section(&mut registers, before, &all, false)?;
        self.over_columns(|sweep, last| {
            let [outer, turn, finish] = if last { &sections.tail } else { &sections.main };
            sweep.start(true);
            let mut inside = registers.clone();
            sweep.section(&mut inside, outer, &[turn, finish], false)?;
            sweep.asm.word(Word::Load, ROWS, word(Layout::ROWS));
            let row = sweep.asm.label();
            sweep.asm.place(row);
            sweep.section(&mut inside.clone(), turn, &[], false)?;
            sweep.advance();
            sweep.asm.add(ROWS, -1);
            sweep.asm.jump(When::NotEqual, row);
            sweep.section(&mut inside, finish, &[], false)
        })?;
        if !after.is_empty() {
            self.first();
            self.section(&mut registers, after, &[], false)?;
        }
        Some(())
    }
}
