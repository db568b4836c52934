//! XDP: programs that the kernel runs on each frame of a device, before it makes a packet of it.
//!
//! [`assembler`] writes them as instructions. What loads and attaches them is [`sys::bpf`](super::sys::bpf).

pub mod assembler;

pub use assembler::{Assembler, Label, Register, Size, Verdict, When};
