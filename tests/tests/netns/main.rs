//! Real daemons, a real kernel: everything that needs root.
//!
//! The tests take turns, over the whole machine, whatever `--test-threads` says (see [`weft_tests::machine::turn`]).

// All of this is test code, its helpers included.
#![allow(clippy::unwrap_used)]

mod answers;
mod anything;
mod attach;
mod bandwidth;
mod bench;
mod bgp;
mod bridged;
mod chains;
mod cni;
mod conformance;
mod crowd;
mod dhcp;
mod encapsulations;
mod etcd;
mod faults;
mod footprint;
mod given_up;
mod hostgw;
mod hostile;
mod hostport;
mod image;
mod installing;
mod interop;
mod ipam_plugins;
mod kubernetes;
mod labs;
mod lifecycle;
mod masquerade;
mod moving;
mod narrowing;
mod order;
mod overload;
mod ovs;
mod paths;
mod reach;
mod scale;
mod throughput;
mod uplink;
mod virtio;
mod workers;
mod wrapping;
mod xdp;
