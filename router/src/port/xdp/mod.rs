//! XDP: programs that the kernel runs on each frame of a device, before it makes a packet of it, and AF_XDP sockets, to
//! which such a program can redirect frames.
//!
//! [`assembler`] writes programs as instructions; [`programs`] are those that lead frames to sockets. [`XdpPort`] is a pod's veth
//! as a port of the router, [`XdpUnderlay`] an uplink, which [`OpenUplink`] opens. System calls, rings and the account of lent chunks are in [`sys`](super::sys): `bpf`, `xsk`,
//! `ring`, `lending`.

pub mod assembler;
mod channel;
mod endpoint;
pub mod outer;
pub(in crate::port) mod partial;
mod pod_program;
mod port;
mod probe;
pub mod programs;
#[cfg(test)]
mod tests;
pub mod too_big;
mod underlay;
mod uplink;

pub use assembler::{Assembler, Helper, Label, Operation, Register, Size, Verdict, When};
pub use channel::{Attachment, IN_ONE, UPLINK_PROGRAM, XdpDevice};
pub use pod_program::{KeptProgram, PodProgram};
pub use port::XdpPort;
pub use probe::probe;
pub use underlay::{Hop, Hops, KernelWay, XdpUnderlay};
pub use uplink::{OpenUplink, Uplink};
