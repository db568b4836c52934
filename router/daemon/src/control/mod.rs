//! From what the operator wrote to what the data plane does.
//!
//! ```text
//! file → config (checked as a whole) ─┐
//! source → cluster (checked one by one) ┴→ desired (both, + live attachments) → compile → Tables
//! ```
//!
//! The source is the file itself, or an engine that all nodes share ([`source`]); then what was known last is kept on disk ([`saved`]).
//!
//! Each arrow is a pure function; what changes with time (attachments, node numbers, the epoch) lives in
//! [`desired::DesiredState`], which is compared with what is and compiled whole each time. There is no memory of
//! events: any order of the same changes leads to the same tables.

pub mod cluster;
pub mod compile;
pub mod config;
pub mod derive;
pub mod desired;
pub mod etcd;
pub mod host;
pub mod kubernetes;
pub mod saved;
pub mod source;

#[cfg(test)]
mod outage;
