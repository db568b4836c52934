//! The way of a frame, without devices: frames in, frames out, and every counter.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod bed;
mod bridged;
mod formats;
mod host;
mod lies;
mod limits;
mod masquerade;
mod shapes;
mod uplink;
mod ways;
