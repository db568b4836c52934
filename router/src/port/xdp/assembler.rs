//! BPF programs, written out as instructions (RFC 9669).
//!
//! Each method appends one instruction, in the order in which they run; [`Assembler::load_constant`] and the two for maps take
//! two slots. Jumps go to [`Label`]s, forwards only, and become offsets in [`Assembler::finish`]. Nothing is checked here that the
//! kernel's verifier checks: it is the judge, and its log says where.
//!
//! Registers follow the calling convention: R0 is a result, R1–R5 are arguments and do not survive a call, R6–R9 do, R10 is the
//! stack's end. An XDP program starts with its context in R1: data at 0, data_end at 4, the queue's number at 16.

use std::os::fd::{AsFd, AsRawFd};

use crate::port::sys::bpf::{Instruction, Map};

/// A register.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the module says what each is for")]
pub enum Register {
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R9,
    R10,
}

/// Width of a memory access, as the instruction encodes it.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Size {
    /// 8 bits.
    Byte = 0x10,
    /// 16 bits.
    Half = 0x08,
    /// 32 bits.
    Word = 0x00,
    /// 64 bits.
    Double = 0x18,
}

/// Condition of a jump, unsigned unless its name says otherwise.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum When {
    /// `==`
    Equal = 0x10,
    /// `>`
    Above = 0x20,
    /// `>=`
    AtLeast = 0x30,
    /// `!=`
    Different = 0x50,
    /// `>` of signed numbers.
    Greater = 0x60,
    /// `<`
    Below = 0xa0,
    /// Any of the bits.
    Bits = 0x40,
}

/// What an XDP program says of a frame: <https://elixir.bootlin.com/linux/v6.18/A/ident/xdp_action>.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It ends here.
    Drop = 1,
    /// The kernel's stack gets it.
    Pass = 2,
    /// It goes where a helper said.
    Redirect = 4,
}

/// Functions of the kernel, by number: <https://elixir.bootlin.com/linux/v6.18/A/ident/___BPF_FUNC_MAPPER>.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Helper {
    /// `u64 bpf_ktime_get_ns(void)`: nanoseconds of CLOCK_MONOTONIC.
    KtimeNs = 5,
    /// `long bpf_skb_store_bytes(skb, u32 offset, from, u32 len, u64 flags)`.
    StoreBytes = 9,
    /// `long bpf_redirect(u32 ifindex, u64 flags)`.
    Redirect = 23,
    /// `long bpf_skb_load_bytes(skb, u32 offset, to, u32 len)`: zero if they are there.
    LoadBytes = 26,
    /// `long bpf_skb_adjust_room(skb, s32 by, u32 mode, u64 flags)`.
    AdjustRoom = 50,
    /// `long bpf_redirect_map(map, u64 key, u64 flags)`: the low bits of the flags are the verdict if there is no such entry.
    RedirectMap = 51,
    /// `long bpf_xdp_adjust_tail(ctx, int delta)`. Ends all knowledge of packet pointers.
    AdjustTail = 65,
    /// `long bpf_fib_lookup(ctx, struct bpf_fib_lookup *, int len, u32 flags)`: zero if there is a route, which it then holds.
    FibLookup = 69,
    /// `long bpf_redirect_neigh(u32 ifindex, params, int len, u64 flags)`: by an interface, to the next hop of the kernel's routes.
    RedirectNeighbour = 152,
}

// Classes and modes, RFC 9669 section 3 to 5.
const LD_IMM64: u8 = 0x18;
const LDX_MEM: u8 = 0x61;
const ST_MEM: u8 = 0x62;
const STX_MEM: u8 = 0x63;
const STX_ATOMIC: u8 = 0xc3;
const ALU64: u8 = 0x07;
const JUMP: u8 = 0x05;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
/// The second operand is a register.
const BY_REGISTER: u8 = 0x08;
/// What a 64-bit constant is instead: <https://elixir.bootlin.com/linux/v6.18/A/ident/BPF_PSEUDO_MAP_FD>.
const PSEUDO_MAP: u8 = 1;
/// <https://elixir.bootlin.com/linux/v6.18/A/ident/BPF_PSEUDO_MAP_VALUE>.
const PSEUDO_MAP_VALUE: u8 = 2;

/// Arithmetic, on 64 bits, unsigned.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Operation {
    Add = 0x00,
    Subtract = 0x10,
    And = 0x50,
    Or = 0x40,
    ShiftLeft = 0x60,
    ShiftRight = 0x70,
    Remainder = 0x90,
    Move = 0xb0,
}

/// A place in a program.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Label(usize);

/// A program in the making. See the module's essay.
#[derive(Debug, Default)]
pub struct Assembler {
    instructions: Vec<Instruction>,
    /// Where each label stands.
    labels: Vec<Option<usize>>,
    /// Which instructions jump to which label.
    jumps: Vec<(usize, Label)>,
}

impl Assembler {
    /// An empty program.
    pub fn new() -> Assembler {
        Assembler::default()
    }

    /// A label that stands nowhere yet.
    pub fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// The label stands before the next instruction.
    pub fn place(&mut self, label: Label) -> &mut Assembler {
        self.labels[label.0] = Some(self.instructions.len());
        self
    }

    /// `to = *(size *)(from + offset)`, zero-extended.
    pub fn load(&mut self, size: Size, to: Register, from: Register, offset: i16) -> &mut Assembler {
        self.push(LDX_MEM | size as u8, to, from as u8, offset, 0)
    }

    /// `*(size *)(to + offset) = from`.
    pub fn store(&mut self, size: Size, to: Register, offset: i16, from: Register) -> &mut Assembler {
        self.push(STX_MEM | size as u8, to, from as u8, offset, 0)
    }

    /// `*(size *)(to + offset) = value`, sign-extended.
    pub fn store_value(&mut self, size: Size, to: Register, offset: i16, value: i32) -> &mut Assembler {
        self.push(ST_MEM | size as u8, to, 0, offset, value)
    }

    /// `*(u64 *)(to + offset) += from`, whole in the eyes of other CPUs.
    pub fn add_atomically(&mut self, to: Register, offset: i16, from: Register) -> &mut Assembler {
        self.push(STX_ATOMIC | Size::Double as u8, to, from as u8, offset, 0)
    }

    /// `to = to op value`.
    pub fn compute(&mut self, operation: Operation, to: Register, value: i32) -> &mut Assembler {
        self.push(ALU64 | operation as u8, to, 0, 0, value)
    }

    /// `to = to op from`.
    pub fn compute_with(&mut self, operation: Operation, to: Register, from: Register) -> &mut Assembler {
        self.push(ALU64 | BY_REGISTER | operation as u8, to, from as u8, 0, 0)
    }

    /// `to = value`, sign-extended.
    pub fn set(&mut self, to: Register, value: i32) -> &mut Assembler {
        self.compute(Operation::Move, to, value)
    }

    /// `to = from`.
    pub fn copy(&mut self, to: Register, from: Register) -> &mut Assembler {
        self.compute_with(Operation::Move, to, from)
    }

    /// `to = value`, all 64 bits.
    pub fn load_constant(&mut self, to: Register, value: u64) -> &mut Assembler {
        self.wide(to, 0, value as u32 as i32, (value >> 32) as i32)
    }

    /// `to` = the map, as helpers take it. The map has to live until the program is loaded.
    pub fn load_map(&mut self, to: Register, map: &Map) -> &mut Assembler {
        self.wide(to, PSEUDO_MAP, map.as_fd().as_raw_fd(), 0)
    }

    /// `to` = address of byte `offset` of the first value of an array. The map has to live until the program is loaded.
    pub fn load_map_value(&mut self, to: Register, map: &Map, offset: u32) -> &mut Assembler {
        self.wide(to, PSEUDO_MAP_VALUE, map.as_fd().as_raw_fd(), offset as i32)
    }

    /// Goes on at the label.
    pub fn jump(&mut self, to: Label) -> &mut Assembler {
        self.jumps.push((self.instructions.len(), to));
        self.push(JUMP, Register::R0, 0, 0, 0)
    }

    /// Goes on at the label if `left when right`.
    pub fn jump_if(&mut self, left: Register, when: When, right: i32, to: Label) -> &mut Assembler {
        self.jumps.push((self.instructions.len(), to));
        self.push(JUMP | when as u8, left, 0, 0, right)
    }

    /// The same with a register.
    pub fn jump_if_with(&mut self, left: Register, when: When, right: Register, to: Label) -> &mut Assembler {
        self.jumps.push((self.instructions.len(), to));
        self.push(JUMP | BY_REGISTER | when as u8, left, right as u8, 0, 0)
    }

    /// `R0 = helper(R1, …, R5)`; R1 to R5 hold nothing afterwards.
    pub fn call(&mut self, helper: Helper) -> &mut Assembler {
        self.push(CALL, Register::R0, 0, 0, helper as i32)
    }

    /// Returns R0.
    pub fn exit(&mut self) -> &mut Assembler {
        self.push(EXIT, Register::R0, 0, 0, 0)
    }

    /// Returns a verdict.
    pub fn exit_with(&mut self, verdict: Verdict) -> &mut Assembler {
        self.set(Register::R0, verdict as i32).exit()
    }

    /// The program, its jumps resolved.
    ///
    /// # Panics
    /// If a jump goes to a label that was never placed, or further than a jump can: programs are written here, by us.
    pub fn finish(mut self) -> Vec<Instruction> {
        for (at, label) in self.jumps {
            let target = self.labels[label.0].expect("a label that is jumped to stands somewhere");
            let distance = target as isize - at as isize - 1;
            self.instructions[at].offset = i16::try_from(distance).expect("our programs are short");
        }
        self.instructions
    }

    fn wide(&mut self, to: Register, what: u8, low: i32, high: i32) -> &mut Assembler {
        self.push(LD_IMM64, to, what, 0, low);
        self.instructions.push(Instruction { immediate: high, ..Instruction::default() });
        self
    }

    fn push(&mut self, code: u8, to: Register, from: u8, offset: i16, immediate: i32) -> &mut Assembler {
        // The two registers are C bit fields, so their order follows the machine's.
        let (first, second) = if cfg!(target_endian = "little") { (to as u8, from) } else { (from, to as u8) };
        self.instructions.push(Instruction { code, registers: first | second << 4, offset, immediate });
        self
    }
}

#[cfg(all(test, target_endian = "little"))]
mod tests {
    use super::Register::*;
    use super::*;
    use zerocopy::IntoBytes;

    /// One of each, as `llvm-mc -triple=bpfel -show-encoding` prints them.
    #[test]
    fn instructions_have_the_published_encoding() {
        let mut a = Assembler::new();
        let end = a.label();
        a.load(Size::Word, R2, R1, 4).load(Size::Byte, R3, R2, 35).load(Size::Half, R0, R2, 12);
        a.load(Size::Double, R9, R10, -8).store(Size::Double, R7, 32, R8).store_value(Size::Half, R2, 42, 7);
        a.add_atomically(R7, 8, R1).compute(Operation::Add, R8, 1).compute_with(Operation::Subtract, R0, R1);
        a.compute(Operation::Remainder, R1, 12).compute(Operation::And, R1, 255).compute(Operation::ShiftLeft, R1, 3);
        a.compute(Operation::ShiftRight, R1, 10).copy(R6, R1).set(R0, -1);
        a.load_constant(R4, 0x1122_3344_5566_7788);
        a.jump_if(R0, When::Different, 8, end).jump_if_with(R2, When::Above, R3, end);
        a.jump_if(R0, When::Bits, 0x1fff, end).call(Helper::Redirect).jump(end);
        a.place(end).exit_with(Verdict::Pass);
        let expected: [[u8; 8]; 24] = [
            [0x61, 0x12, 4, 0, 0, 0, 0, 0],
            [0x71, 0x23, 35, 0, 0, 0, 0, 0],
            [0x69, 0x20, 12, 0, 0, 0, 0, 0],
            [0x79, 0xa9, 0xf8, 0xff, 0, 0, 0, 0],
            [0x7b, 0x87, 32, 0, 0, 0, 0, 0],
            [0x6a, 0x02, 42, 0, 7, 0, 0, 0],
            [0xdb, 0x17, 8, 0, 0, 0, 0, 0],
            [0x07, 0x08, 0, 0, 1, 0, 0, 0],
            [0x1f, 0x10, 0, 0, 0, 0, 0, 0],
            [0x97, 0x01, 0, 0, 12, 0, 0, 0],
            [0x57, 0x01, 0, 0, 255, 0, 0, 0],
            [0x67, 0x01, 0, 0, 3, 0, 0, 0],
            [0x77, 0x01, 0, 0, 10, 0, 0, 0],
            [0xbf, 0x16, 0, 0, 0, 0, 0, 0],
            [0xb7, 0x00, 0, 0, 0xff, 0xff, 0xff, 0xff],
            [0x18, 0x04, 0, 0, 0x88, 0x77, 0x66, 0x55],
            [0, 0, 0, 0, 0x44, 0x33, 0x22, 0x11],
            [0x55, 0x00, 4, 0, 8, 0, 0, 0],
            [0x2d, 0x32, 3, 0, 0, 0, 0, 0],
            [0x45, 0x00, 2, 0, 0xff, 0x1f, 0, 0],
            [0x85, 0x00, 0, 0, 23, 0, 0, 0],
            [0x05, 0x00, 0, 0, 0, 0, 0, 0],
            [0xb7, 0x00, 0, 0, 2, 0, 0, 0],
            [0x95, 0x00, 0, 0, 0, 0, 0, 0],
        ];
        assert_eq!(a.finish().as_bytes(), expected.as_flattened());
    }

    #[test]
    fn a_jump_counts_the_instructions_between() {
        let mut a = Assembler::new();
        let (near, far) = (a.label(), a.label());
        a.jump_if(R0, When::Equal, 0, far).jump(near).load_constant(R1, 5);
        a.place(near).exit();
        a.place(far).exit();
        let offsets: Vec<i16> = a.finish().iter().map(|instruction| instruction.offset).collect();
        assert_eq!(offsets, [4, 2, 0, 0, 0, 0]);
    }
}
