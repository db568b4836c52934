//! Leases of pods that are gone: freed without being asked.
//!
//! A runtime that crashes, a node that loses power, a sandbox that is removed by hand: nobody sends a DEL for those, and containerd never
//! calls GC or CHECK. So weftd looks itself whose network namespace is still there ([`census`](super::census)), when it starts and then
//! with every housekeeping, and frees what it finds *twice in a row* to be gone. What it cannot tell, it leaves alone; so a lease without
//! a known namespace (imported, reserved, or of an old kernel) is freed by DEL, GC or a boot.
//!
//! When weftd starts it needs no second look: nobody is being attached or detached, and what was made before this boot cannot be there.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use weft_ipam::{Facts, Owner};

use super::census::Fate;
use super::{free, key_of};
use crate::node::Node;

/// Who had no namespace any more at the last look, and what was known of it.
#[derive(Debug, Default)]
pub struct Suspects(Mutex<BTreeMap<Owner, Facts>>);

/// Before anybody is served: frees all leases whose pods are gone.
pub fn at_start(node: &Node) {
    for (owner, facts) in gone(node) {
        free_if_same(node, &owner, &facts);
    }
}

/// Now and then: frees the leases whose pods are gone, and were at the last call.
pub fn reconcile(node: &Node) {
    let gone = gone(node);
    let mut suspects = node.suspects.0.lock().unwrap_or_else(PoisonError::into_inner);
    for (owner, facts) in gone.iter().filter(|(owner, facts)| suspects.get(owner) == Some(facts)) {
        free_if_same(node, owner, facts);
    }
    *suspects = gone;
}

fn gone(node: &Node) -> BTreeMap<Owner, Facts> {
    let all: Vec<(Owner, Facts)> =
        node.store.records().iter().map(|record| (record.owner.clone(), record.facts.clone())).collect();
    let mut look = node.census.look();
    all.into_iter().filter(|(_, facts)| look.fate(facts) == Fate::Gone).collect()
}

/// The runtime may have sent a DEL since, and another ADD.
fn free_if_same(node: &Node, owner: &Owner, facts: &Facts) {
    let key = key_of(owner);
    let _turn = node.turns.take(&key);
    let same = node.store.get(owner).is_some_and(|record| record.facts == *facts);
    if same && free(node, &key) {
        tracing::info!(
            network = key.network,
            container = key.container,
            ifname = key.ifname,
            "freed the lease of a pod that is gone, and for which no DEL came"
        );
    }
}
