//! Bytes on the wire: headers, checksums, tunnel formats, segmentation, coalescing.
//!
//! Nothing here does I/O, takes memory from the heap, reads a clock, or knows what a router is. Start with [`ipv4`] to
//! see what a header looks like, with [`offload`] for what a frame carries besides its bytes, and with [`coalesce`] for
//! the longest piece of code.
//!
//! # When may an accessor panic?
//!
//! A header is a `#[repr(C)]` struct of big-endian integers without alignment, read in place by zerocopy:
//! `Ipv4Header::ref_from_prefix(bytes)` gives the header and the rest, or fails if `bytes` is too short. So a value that
//! exists is complete, each of its fields is some number, and **no field and no method of a header panics**. Values that
//! nobody defined are representable; a reader that has no use for one says so in an error of its own.
//!
//! What a header *says* is another matter. [`ipv4::Ipv4Header::ihl`] may be 0 or lead beyond the end, and so may every
//! other length; indexing with it panics. Either compare it once with what is there, and trust it afterwards (this is
//! what makes a packet of a frame), or use `get`.
//!
//! Functions that read whole structures ([`ipv6::walk`], [`ndp::Neighbor::parse`], [`vxlan::VxlanHeader::parse`],
//! [`virtio::parse`], [`segment::Segments::plan`], [`coalesce::run`], [`coalesce::partial_checksum`]) take any bytes
//! and any numbers, and never panic. Two functions trust their *caller*, never the wire:
//! [`segment::Segments::write`] and [`coalesce::finish`] panic if they are not given what `plan` and `run` were given.
//! [`exercise`] holds all of these promises against arbitrary bytes.

pub mod arp;
pub mod checksum;
pub mod coalesce;
pub mod eth;
pub mod exercise;
pub mod format;
pub mod geneve;
pub mod gre;
pub mod icmp;
pub mod ip;
pub mod ipip;
pub mod ipv4;
pub mod ipv6;
pub mod mac;
pub mod ndp;
pub mod offload;
pub mod segment;
pub mod tcp;
pub mod udp;
pub mod virtio;
pub mod vxlan;

/// The traits that read and write headers (`FromBytes`, `IntoBytes`), of the version that the headers implement.
pub use zerocopy;
