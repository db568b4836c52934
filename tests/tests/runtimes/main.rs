//! Container runtimes as people have them, on nodes that each are a computer of its own.
//!
//! The tests take turns with all others that have real daemons (see [`weft_tests::machine::turn`]).

// All of this is test code, its helpers included.
#![allow(clippy::unwrap_used)]

mod containerd;
mod podman;
mod published;

use std::collections::BTreeSet;
use std::net::IpAddr;

use weft_tests::cluster::{Cluster, peer};
use weft_tests::host::Host;

/// What an administrator copies to a node.
const CONFLIST: &str = include_str!("../../../deploy/05-weft.conflist");

/// The network `weft`, as it is installed.
#[track_caller]
fn offer_network(host: &Host) {
    host.write("/etc/cni/net.d/05-weft.conflist", CONFLIST);
}

/// Two nodes that know each other, each with a weftd.
#[track_caller]
fn two_hosts(cluster: &Cluster) -> [Host<'_>; 2] {
    [1, 2].map(|number| {
        let mut host = Host::new(cluster, number);
        host.start_weft(&peer(3 - number, None));
        offer_network(&host);
        host
    })
}

/// What a node has leased.
#[track_caller]
fn leases(host: &Host) -> BTreeSet<IpAddr> {
    host.daemon().leases().iter().map(|lease| lease.address).collect()
}
