//! Addresses without a port: for a plugin that makes the interface itself and asks weft-cni for addresses alone.
//!
//! The record is one like any attachment's, so that DEL, GC, clean-up and the views know nothing special about it. What
//! tells it apart is that it has no MAC.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use weft_api::{Attach, Attached, AttachedAddress, Check, Failure};
use weft_ipam::{Facts, Record};

use super::check::differs;
use super::namespace::Namespace;
use super::{check_key, given, owner, refusal, seconds, tombstone};
use crate::node::{Node, since_boot};

/// Leases addresses.
///
/// # Errors
/// None is free, or the request is not valid.
pub fn add(node: &Node, request: &Attach, fd: Option<OwnedFd>) -> Result<Attached, Failure> {
    check_key(&request.key)?;
    tombstone::honour_all(node);
    // It tells when the lease is of no more use; where a plugin asks from cannot be an error.
    let namespace = fd.and_then(|fd| Namespace::check(Some(fd), &request.netns).ok());
    let netns = namespace.and_then(|namespace| node.census.describe(&namespace));
    let _turn = node.turns.take(&request.key);
    let config = Arc::clone(&node.state().desired.config);
    let (sets, pool) = given::lease_only(&config, request)?;
    let boot = node.census.boot().to_owned();
    let facts = Facts { pool, time: seconds(), mac: None, boot, netns, labels: request.labels.clone() };
    let leased = node.store.lease(&owner(&request.key), &sets, &request.requested, facts, since_boot());
    let record = leased.map_err(|error| refusal(&error))?;
    tracing::info!(
        network = request.key.network, container = request.key.container, ifname = request.key.ifname,
        addresses = ?record.addresses().collect::<Vec<_>>(), "leased for another plugin"
    );
    Ok(told(&record))
}

/// Whether they are leased still.
///
/// # Errors
/// What is missing.
pub fn check(node: &Node, request: &Check) -> Result<(), Failure> {
    let record = node.store.get(&owner(&request.key)).ok_or_else(|| differs(vec!["it has no lease".into()]))?;
    let has = told(&record).addresses;
    let expected = request.expected.iter().flat_map(|expected| &expected.addresses);
    let missing = expected.filter(|address| !has.iter().any(|has| has.address == address.address));
    let missing: Vec<String> = missing.map(|address| format!("{} is not leased to it", address.address)).collect();
    if missing.is_empty() { Ok(()) } else { Err(differs(missing)) }
}

fn told(record: &Record) -> Attached {
    let address =
        |lease: &weft_ipam::Lease| AttachedAddress { address: lease.cidr().to_string(), gateway: lease.gateway };
    Attached {
        ifname: record.owner.ifname.clone(),
        mac: String::new(),
        mtu: 0,
        addresses: record.leases.iter().map(address).collect(),
        routes: Vec::new(),
        trusted: Vec::new(),
    }
}
