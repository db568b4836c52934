//! What the benches share: clocks that other processes do not disturb, and a node without devices.
//!
//! Benches live in `benches/`: `core` takes frames through [`weft_router::forward`], `bytes` measures what `weft-encap`
//! does to bytes, `ratios` compares the core with itself, and `counts` compares what can be counted with committed
//! values. How to read and to repeat the numbers stands in `README.md` beside this package's manifest.

pub mod cases;
pub mod cpu_time;
pub mod frames;
pub mod node;
pub mod payload;
pub mod ring;
pub mod sys;

pub use cpu_time::CpuTime;
