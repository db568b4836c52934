//! Container runtimes as people have them, on nodes that each are a computer of its own.
//!
//! The tests take turns with all others that have real daemons (see [`weft_tests::machine::turn`]).

// All of this is test code, its helpers included.
#![allow(clippy::unwrap_used)]

mod podman;

use weft_tests::host::Host;

/// What an administrator copies to a node.
const CONFLIST: &str = include_str!("../../../deploy/05-weft.conflist");

/// The network `weft`, as it is installed.
#[track_caller]
fn offer_network(host: &Host) {
    host.write("/etc/cni/net.d/05-weft.conflist", CONFLIST);
}
