//! The only unsafe code of the data plane.
//!
//! Each block states its callee's conditions and why they hold. What is safe to express with `rustix` or
//! `socket2` is not here.

pub mod arena;
pub mod bpf;
pub mod lazy;
pub mod lending;
pub mod message;
pub mod namespace;
pub mod packet;
pub mod prefetch;
pub mod ring;
pub mod tun;
pub mod xsk;
