//! What the benches share: a clock that other processes do not disturb, and a node without devices.
//!
//! Benches live in `benches/`: `core` takes frames through [`weft_router::forward`], `bytes` measures what `weft-encap`
//! does to bytes. How to read and to repeat the numbers stands in `README.md` beside this package's manifest.

pub mod cpu_time;
pub mod frames;
pub mod node;
pub mod ring;

pub use cpu_time::CpuTime;
