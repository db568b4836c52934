//! weft-cni as a runtime sees it: the built binary, its environment, its standard input and output, and beside it a
//! daemon that is played by this test over the real protocol.
//!
//! The tests that attach need a network namespace: they make one with `ip netns` and fail, saying so, where that is
//! not possible.

#![allow(clippy::unwrap_used, reason = "everything here is a test; clippy recognises only functions marked as one")]

mod away;
mod commands;
mod daemon;
mod delegation;
mod dhcp;
mod folder;
mod hostile;
mod pod;
mod runtime;
