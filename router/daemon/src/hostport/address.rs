//! Which addresses the host port has: one of each family that the node has ranges of, for good.
//!
//! They are leases like any other, held by this node itself, so no pod can get them, and they stay the same over restarts.
//! No request can name their owner, since every network has a name. The last address of the first range is taken, where pods
//! come to last; where a pod has it already, the one before.

use std::net::IpAddr;

use weft_ipam::{Facts, LeaseError, Owner, Range, RangeSet};

use crate::attach::addresses;
use crate::control::config::Config;
use crate::node::{Node, since_boot};

/// How many addresses are tried before any will do.
const ATTEMPTS: usize = 64;

/// Whose the addresses are.
pub fn owner() -> Owner {
    Owner { network: String::new(), container: "node".into(), ifname: "weft0".into() }
}

/// The host port's addresses, durably.
pub fn lease(node: &Node, config: &Config) -> Result<Vec<IpAddr>, String> {
    let sets = addresses::own(config).map_err(|error| error.to_string())?;
    if let Some(record) = node.store.get(&owner()) {
        let held: Vec<IpAddr> = record.addresses().collect();
        if fit(&held, &sets) {
            return Ok(held);
        }
        tracing::warn!(?held, "the host port's addresses are not in this node's ranges any more: it gets others");
        node.store.release(&owner(), since_boot());
    }
    let mut passed = Vec::new();
    for _ in 0..ATTEMPTS {
        let free = |address: &IpAddr| node.store.by_address("", *address).is_none() && !passed.contains(address);
        let requested: Vec<IpAddr> = sets.iter().filter_map(|set| last(&set.ranges()[0], free)).collect();
        match node.store.lease(&owner(), &sets, &requested, Facts::default(), since_boot()) {
            Ok(record) => return Ok(record.addresses().collect()),
            // It was given back a moment ago, or is kept for something else.
            Err(LeaseError::Taken { address, .. }) => passed.push(address),
            Err(error) => return Err(error.to_string()),
        }
    }
    let record = node.store.lease(&owner(), &sets, &[], Facts::default(), since_boot());
    record.map(|record| record.addresses().collect()).map_err(|error| error.to_string())
}

/// Gives them back, where there shall be no host port.
pub fn release(node: &Node) {
    if node.store.get(&owner()).is_some() {
        node.store.release(&owner(), since_boot());
    }
}

/// Whether there is one address for each set.
fn fit(held: &[IpAddr], sets: &[RangeSet]) -> bool {
    held.len() == sets.len() && sets.iter().all(|set| held.iter().any(|address| set.range_of(*address).is_some()))
}

/// The last addresses of a range, as far as they can be leased.
fn last(range: &Range, free: impl Fn(&IpAddr) -> bool) -> Option<IpAddr> {
    let before = |address: &IpAddr| match address {
        IpAddr::V4(address) => Some(IpAddr::V4(u32::from(*address).checked_sub(1)?.into())),
        IpAddr::V6(address) => Some(IpAddr::V6(u128::from(*address).checked_sub(1)?.into())),
    };
    std::iter::successors(Some(range.end()), before)
        .take(ATTEMPTS)
        .take_while(|address| range.contains(*address))
        .find(|address| *address != range.gateway() && free(address))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(subnet: &str) -> Range {
        Range::whole(subnet.parse().unwrap()).unwrap()
    }

    #[test]
    fn the_last_address_that_is_free_is_taken() {
        let last_of = |subnet: &str, taken: &[&str]| {
            last(&range(subnet), |address| !taken.contains(&address.to_string().as_str()))
                .map(|found| found.to_string())
        };
        assert_eq!(last_of("10.244.1.0/24", &[]).unwrap(), "10.244.1.254");
        assert_eq!(last_of("10.244.1.0/24", &["10.244.1.254", "10.244.1.253"]).unwrap(), "10.244.1.252");
        assert_eq!(last_of("10.244.1.0/30", &["10.244.1.2"]), None, "the other one is the gateway's");
        assert!(last_of("fd00::/64", &[]).unwrap().starts_with("fd00::ffff:ffff:ffff:ff"));
    }

    #[test]
    fn addresses_fit_when_there_is_one_of_each_family_in_the_ranges() {
        let sets = [RangeSet::from(range("10.244.1.0/24")), RangeSet::from(range("fd00::/64"))];
        let held = |addresses: &[&str]| -> Vec<IpAddr> { addresses.iter().map(|a| a.parse().unwrap()).collect() };
        assert!(fit(&held(&["10.244.1.254", "fd00::9"]), &sets));
        assert!(!fit(&held(&["10.244.1.254"]), &sets));
        assert!(!fit(&held(&["10.244.2.254", "fd00::9"]), &sets));
    }
}
