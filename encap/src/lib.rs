//! Bytes on the wire: headers, checksums, tunnel formats, segmentation, coalescing.
//!
//! Nothing here does I/O, allocates, or knows what a router is.

pub mod arp;
pub mod checksum;
pub mod coalesce;
pub mod eth;
pub mod icmp;
pub mod ip;
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

pub use zerocopy;
