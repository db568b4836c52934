//! The data plane of Weft: a pure core and the ports around it.
//!
//! Read [`forward`] first: it is the way of a frame from the port it came in on to the port it leaves by,
//! on one screen. Everything above it ([`worker`], [`Router`]) moves frames to it, everything
//! below it is one step of the way.
//!
//! ```text
//! worker                                      a thread each: poll → receive → forward → transmit → timers
//! forward  + tables                           the way of a frame
//! bridge budget neigh route policy conntrack returns snat nat tunnel icmp gateway probing  steps: they never import each other
//! packet glimpse flow path drop_reason stats port
//! frame pool port/sys                         the only unsafe code
//! ```
//!
//! A step takes what it needs as arguments and returns a value or a [`DropReason`]. It never sees a
//! port, a clock, the tables as a whole, or another step. Time and tables are arguments,
//! so that the core runs to the same result each time.

pub mod bridge;
pub mod budget;
pub mod conntrack;
pub mod drop_reason;
pub mod flow;
pub mod forward;
pub mod frame;
pub mod gateway;
pub mod gather;
pub mod glimpse;
pub mod icmp;
pub mod nat;
pub mod neigh;
pub mod pace;
pub mod packet;
pub mod path;
pub mod policy;
pub mod pool;
pub mod port;
pub mod probing;
pub mod returns;
pub mod route;
pub mod snat;
pub mod stats;
pub mod tables;
pub mod time;
pub mod tunnel;
pub mod worker;

mod control;

pub use control::{Device, Event, PortEnd, PortSnapshot, Router, RouterConfig, RouterError, Snapshot, TakenOver};
pub use drop_reason::DropReason;
pub use frame::Frame;
pub use port::PortId;
pub use tables::Tables;
pub use time::Instant;
pub use worker::News;
