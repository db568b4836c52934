//! XDP: programs that the kernel runs on each frame of a device, before it makes a packet of it.
//!
//! [`assembler`] writes them as instructions. What loads and attaches them is [`sys::bpf`](super::sys::bpf).

pub mod assembler;

pub use assembler::{Assembler, Helper, Label, Operation, Register, Size, Verdict, When};
