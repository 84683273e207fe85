//! A small assembler for eBPF: just the instructions that steering needs, and labels.
//!
//! Contract: [`Assembler::finish`] gives a program in which every jump leads to the place of its label,
//! or `None` when a label has no place or lies too far away. Encoding: RFC 9669.

use super::layout::Insn;

/// A register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Reg {
    R0 = 0,
    R1 = 1,
    R2 = 2,
    R3 = 3,
    R4 = 4,
    R5 = 5,
    R6 = 6,
    R7 = 7,
    R8 = 8,
    R9 = 9,
}

/// Bytes that a load takes; what is not loaded becomes zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Width {
    W1 = 0x10,
    W2 = 0x08,
    W4 = 0x00,
}

/// A place to jump to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Label(usize);

const ALU64: u8 = 0x07;
const ALU32: u8 = 0x04;
const JMP: u8 = 0x05;
const JMP32: u8 = 0x06;
const X: u8 = 0x08;

/// Collects instructions.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    code: Vec<Insn>,
    places: Vec<Option<usize>>,
    jumps: Vec<(usize, Label)>,
}

impl Assembler {
    /// A label that has no place yet.
    pub(super) fn label(&mut self) -> Label {
        self.places.push(None);
        Label(self.places.len() - 1)
    }

    /// Puts a label here.
    pub(super) fn place(&mut self, label: Label) {
        self.places[label.0] = Some(self.code.len());
    }

    fn push(&mut self, code: u8, dst: Reg, src: u8, offset: i16, imm: i32) {
        self.code.push(Insn { code, registers: dst as u8 | src << 4, offset, imm });
    }

    /// `dst = src`.
    pub(super) fn mov(&mut self, dst: Reg, src: Reg) {
        self.push(ALU64 | X | 0xb0, dst, src as u8, 0, 0);
    }

    /// `dst = imm`.
    pub(super) fn set(&mut self, dst: Reg, imm: i32) {
        self.push(ALU64 | 0xb0, dst, 0, 0, imm);
    }

    /// `dst += imm`.
    pub(super) fn add(&mut self, dst: Reg, imm: i32) {
        self.push(ALU64, dst, 0, 0, imm);
    }

    /// `dst += src`.
    pub(super) fn add_reg(&mut self, dst: Reg, src: Reg) {
        self.push(ALU64 | X, dst, src as u8, 0, 0);
    }

    /// `dst &= imm`, on 32 bits; the upper half becomes zero.
    pub(super) fn and(&mut self, dst: Reg, imm: u32) {
        self.push(ALU32 | 0x50, dst, 0, 0, imm as i32);
    }

    /// `dst <<= imm`, on 32 bits; the upper half becomes zero.
    pub(super) fn shift_left(&mut self, dst: Reg, imm: i32) {
        self.push(ALU32 | 0x60, dst, 0, 0, imm);
    }

    /// `dst = *(base + offset)`.
    pub(super) fn load(&mut self, width: Width, dst: Reg, base: Reg, offset: i16) {
        self.push(0x61 | width as u8, dst, base as u8, offset, 0);
    }

    /// `dst` becomes the map behind a descriptor.
    pub(super) fn load_map(&mut self, dst: Reg, fd: i32) {
        const BPF_PSEUDO_MAP_FD: u8 = 1;
        self.push(0x18, dst, BPF_PSEUDO_MAP_FD, 0, fd);
        self.push(0, Reg::R0, 0, 0, 0);
    }

    fn jump_to(&mut self, code: u8, dst: Reg, src: u8, imm: i32, to: Label) {
        self.jumps.push((self.code.len(), to));
        self.push(code, dst, src, 0, imm);
    }

    /// Goes to `to`.
    pub(super) fn jump(&mut self, to: Label) {
        self.jump_to(JMP, Reg::R0, 0, 0, to);
    }

    /// Goes to `to` if `a > b`, without sign.
    pub(super) fn jump_if_above(&mut self, a: Reg, b: Reg, to: Label) {
        self.jump_to(JMP | X | 0x20, a, b as u8, 0, to);
    }

    /// Goes to `to` if the low 32 bits of `a` are `imm`.
    pub(super) fn jump_if(&mut self, a: Reg, imm: u32, to: Label) {
        self.jump_to(JMP32 | 0x10, a, 0, imm as i32, to);
    }

    /// Goes to `to` unless the low 32 bits of `a` are `imm`.
    pub(super) fn jump_unless(&mut self, a: Reg, imm: u32, to: Label) {
        self.jump_to(JMP32 | 0x50, a, 0, imm as i32, to);
    }

    /// Calls a helper of the kernel.
    pub(super) fn call(&mut self, helper: i32) {
        self.push(JMP | 0x80, Reg::R0, 0, 0, helper);
    }

    /// Ends the program with the verdict in `R0`.
    pub(super) fn exit(&mut self) {
        self.push(JMP | 0x90, Reg::R0, 0, 0, 0);
    }

    /// The program.
    pub(super) fn finish(mut self) -> Option<Vec<Insn>> {
        for (at, label) in self.jumps {
            let place = self.places[label.0]?;
            let distance = place as i64 - at as i64 - 1;
            self.code[at].offset = i16::try_from(distance).ok()?;
        }
        Some(self.code)
    }
}
