//! What the tests stand on.
//!
//! Without root: [`memory`] is the data-plane core without devices, [`hostile`] makes frames for it, [`frames`] builds
//! them by other hands than the router's, [`gathering`] makes streams of them and looks at what was gathered. With root: [`lab`] is a cluster that `weft lab up` has built, [`cluster`] one of weftd and of
//! kernel VXLAN nodes built by hand, [`etcd`] and [`kubernetes`] what such a cluster can share, [`daemon`] asks a weftd, [`wire`] sends and sees raw frames, [`plugin`]
//! is a container runtime, and [`network`] what it does with a list of plugins; [`host`] is a node with mounts and processes of its own, for
//! runtimes like [`podman`] and [`containerd`] that are given [`image`]; [`traffic`] and [`flood`] send what is to arrive, and more than can; [`beacon`]
//! sends all the time, through a [`relay`] if the network between shall be a bad one.
//! [`fuzz_entries`] is shared by the fuzz targets and the replay of their corpora.
//!
//! Tests with real daemons take a [`machine::turn`] first: they are serialised over the whole machine, whatever
//! `--test-threads` says.

pub mod beacon;
pub mod cluster;
pub mod command;
pub mod container;
pub mod containerd;
#[allow(missing_docs)]
pub mod cri;
pub mod daemon;
pub mod etcd;
pub mod flood;
pub mod frames;
pub mod fuzz_entries;
pub mod gathering;
pub mod host;
pub mod hostile;
pub mod image;
pub mod kubernetes;
pub mod lab;
pub mod machine;
pub mod memory;
pub mod netns;
pub mod network;
pub mod plugin;
pub mod podman;
pub mod random;
pub mod relay;
mod sys;
pub mod traffic;
pub mod wire;
