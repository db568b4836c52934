//! CHECK: is the pod's interface still what was made, and what its runtime believes?

use std::os::fd::OwnedFd;

use weft_api::{Attached, AttachedAddress, AttachedRoute, Check, Failure, code};

use super::namespace::Namespace;
use super::pod::{self, Interface, Observed};
use super::{check_key, owner};
use crate::netlink::Route;
use crate::node::Node;

/// CNI CHECK: everything that is missing or different.
pub fn check(node: &Node, request: &Check, fd: Option<OwnedFd>) -> Result<(), Failure> {
    check_key(&request.key)?;
    let namespace = Namespace::check(fd, "of the request")?;
    let _turn = node.turns.take(&request.key);
    let interface = {
        let state = node.state();
        let leased = node.store.get(&owner(&request.key)).is_some();
        match state.attachments.get(&request.key) {
            Some(attachment) if leased => attachment.interface.clone(),
            Some(_) => return Err(differs(vec!["it has a port, but no lease".into()])),
            None if leased => return Err(differs(vec!["it has a lease, but its device is gone".into()])),
            None => return Err(differs(vec!["it is not known here".into()])),
        }
    };
    let name = interface.name.clone();
    let observed = namespace.enter(move || pod::observe(&name)).map_err(|error| Failure {
        code: code::INTERNAL,
        msg: format!("cannot look into the pod's network namespace: {error}"),
        details: String::new(),
    })?;
    let interface = still_expected(interface, request.expected.as_ref());
    let mut all = observed.differences(&interface);
    if let Some(expected) = &request.expected {
        all.extend(unexpected(expected, &interface, &observed));
    }
    if all.is_empty() { Ok(()) } else { Err(differs(all)) }
}

/// What the runtime believes and is not so. Zero, empty and unspecified mean that it did not say. What it lists may be of a
/// whole chain of plugins, so an address that was not given here must be there, no more.
fn unexpected(expected: &Attached, made: &Interface, observed: &Observed) -> Vec<String> {
    let mut all = Vec::new();
    if expected.ifname != made.name {
        all.push(format!("prevResult has interface {:?}, weftd made {}", expected.ifname, made.name));
    }
    if !expected.mac.is_empty() && expected.mac.parse() != Ok(made.mac) {
        all.push(format!("prevResult has MAC {:?}, weftd gave {}", expected.mac, made.mac));
    }
    let mtu = observed.link.as_ref().map_or(made.mtu, |link| link.mtu);
    if ![0, made.mtu, mtu].contains(&expected.mtu) {
        all.push(format!("prevResult has MTU {}, {} has {mtu}", expected.mtu, made.name));
    }
    for AttachedAddress { address, gateway } in &expected.addresses {
        let given = made.addresses.iter().find(|(net, _)| net.to_string() == *address);
        match given {
            Some((_, by)) if !gateway.is_unspecified() && gateway != by => {
                all.push(format!("prevResult has {address} by {gateway}, weftd gave it by {by}"));
            }
            None if !observed.addresses.iter().any(|net| net.to_string() == *address) => {
                all.push(format!("prevResult has {address}, which {} has not", made.name));
            }
            _ => {}
        }
    }
    all
}

/// What was made here and is still the runtime's belief: a plugin behind us in the chain may have taken routes away.
fn still_expected(made: Interface, expected: Option<&Attached>) -> Interface {
    let Some(expected) = expected else { return made };
    let listed = |route: &Route| {
        let same = |other: &AttachedRoute| {
            let by = other.gateway.is_unspecified() || Some(other.gateway) == route.gateway;
            by && other.destination.parse() == Ok(route.destination)
        };
        expected.routes.iter().any(same)
    };
    Interface { routes: made.routes.iter().filter(|route| listed(route)).copied().collect(), ..made }
}

pub fn differs(all: Vec<String>) -> Failure {
    Failure {
        code: code::CHECK,
        msg: all.join("; "),
        details: "delete the pod's sandbox, so that the runtime makes a new one".into(),
    }
}
