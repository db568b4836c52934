//! Which addresses an attachment gets: host-local's choice, without trying one address after the other.
//!
//! Each set gives one address. If one was asked for and lies in the set, that one; otherwise the first free one after
//! the one last given, through the ranges of the set in their order and around. Gateways are passed over, those of the
//! other sets as well, since both are on the pod's links; so is what is reserved. Where nothing else is left, of those that rest the one that
//! has rested longest. All sets give or none does.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::error::LeaseError;
use crate::leases::Leases;
use crate::range::{Range, RangeSet, to_address, to_number};
use crate::record::Lease;

/// One lease for each set, or the first reason against it. Changes nothing.
pub(crate) fn choose(
    leases: &Leases,
    pool: &str,
    sets: &[RangeSet],
    requested: &[IpAddr],
    reserved: &[IpNet],
) -> Result<Vec<Lease>, LeaseError> {
    check_sets(sets)?;
    let mut left: Vec<IpAddr> = Vec::new();
    for address in requested.iter().map(IpAddr::to_canonical) {
        if !left.contains(&address) {
            left.push(address);
        }
    }
    let asked: Vec<Option<IpAddr>> = sets
        .iter()
        .map(|set| {
            let at = left.iter().position(|&a| set.range_of(a).is_some())?;
            Some(left.remove(at))
        })
        .collect();
    if !left.is_empty() {
        return Err(LeaseError::NotInRange { addresses: left, ranges: join(sets) });
    }
    let chooser = Chooser { leases, pool, gateways: gateways(sets), reserved };
    sets.iter()
        .zip(asked)
        .map(|(set, asked)| match asked {
            Some(address) => chooser.requested(set, address),
            None => chooser.next(set),
        })
        .collect()
}

struct Chooser<'a> {
    leases: &'a Leases,
    pool: &'a str,
    gateways: Vec<IpAddr>,
    reserved: &'a [IpNet],
}

impl Chooser<'_> {
    fn requested(&self, set: &RangeSet, address: IpAddr) -> Result<Lease, LeaseError> {
        if self.gateways.contains(&address) {
            return Err(LeaseError::Gateway { address });
        }
        if self.reserved_by(address).is_some() {
            return Err(LeaseError::Reserved { address });
        }
        if let Some(owner) = self.leases.holder(self.pool, address) {
            return Err(LeaseError::Taken { address, owner: Box::new(owner.clone()) });
        }
        self.lease(set, address).ok_or_else(|| self.exhausted(set))
    }

    fn next(&self, set: &RangeSet) -> Result<Lease, LeaseError> {
        let found = self.next_free(set).or_else(|| self.longest_resting(set));
        found.and_then(|a| self.lease(set, a)).ok_or_else(|| self.exhausted(set))
    }

    fn longest_resting(&self, set: &RangeSet) -> Option<IpAddr> {
        let fits = |address: IpAddr| {
            set.range_of(address).is_some() && !self.gateways.contains(&address) && self.reserved_by(address).is_none()
        };
        self.leases
            .resting()
            .find(|(pool, address, _)| *pool == self.pool && fits(*address))
            .map(|(_, address, _)| address)
    }

    fn next_free(&self, set: &RangeSet) -> Option<IpAddr> {
        let ranges = set.ranges();
        let last = self.leases.last_given(self.pool, set);
        let round = last.and_then(|last| Some((ranges.iter().position(|r| r.contains(last))?, to_number(last))));
        let Some((at, last)) = round else {
            return ranges.iter().find_map(|r| self.first_free(r, r.bounds().0, r.bounds().1));
        };
        // A round: the rest of this range, the ranges after it, those before it, this one up to the last given.
        let (start, end) = ranges[at].bounds();
        let others = ranges[at + 1..].iter().chain(&ranges[..at]);
        self.first_free(&ranges[at], last.saturating_add(1).max(start), end)
            .or_else(|| others.into_iter().find_map(|r| self.first_free(r, r.bounds().0, r.bounds().1)))
            .or_else(|| self.first_free(&ranges[at], start, last))
    }

    /// The prefix that reserves an address.
    fn reserved_by(&self, address: IpAddr) -> Option<&IpNet> {
        self.reserved.iter().find(|net| net.contains(&address))
    }

    /// The first address from `from` to `to` that is neither taken nor reserved nor a gateway.
    fn first_free(&self, range: &Range, mut from: u128, to: u128) -> Option<IpAddr> {
        let v4 = range.is_v4();
        let taken = self.leases.taken(self.pool, v4);
        loop {
            if from > to {
                return None;
            }
            let free = taken.map_or(Some(from), |t| t.first_free(from, to))?;
            let address = to_address(free, v4);
            if let Some(net) = self.reserved_by(address) {
                from = to_number(net.broadcast()).checked_add(1)?;
            } else if self.gateways.contains(&address) {
                from = free.checked_add(1)?;
            } else {
                return Some(address);
            }
        }
    }

    fn lease(&self, set: &RangeSet, address: IpAddr) -> Option<Lease> {
        let range = set.range_of(address)?;
        let prefix_len = range.subnet().prefix_len();
        Some(Lease { address, prefix_len, gateway: range.gateway(), set: set.key() })
    }

    fn exhausted(&self, set: &RangeSet) -> LeaseError {
        let leased =
            set.ranges().iter().fold(0_u64, |n, r| n.saturating_add(self.leases.usage(self.pool, r, &[]).leased));
        LeaseError::Exhausted { ranges: set.to_string(), leased }
    }
}

fn check_sets(sets: &[RangeSet]) -> Result<(), LeaseError> {
    if sets.is_empty() {
        return Err(LeaseError::NoRanges);
    }
    for (i, first) in sets.iter().enumerate() {
        for other in &sets[i + 1..] {
            if first.ranges().iter().any(|a| other.ranges().iter().any(|b| a.overlaps(b))) {
                return Err(LeaseError::Overlap { first: first.to_string(), other: other.to_string() });
            }
        }
    }
    Ok(())
}

fn gateways(sets: &[RangeSet]) -> Vec<IpAddr> {
    sets.iter().flat_map(|s| s.ranges().iter().map(Range::gateway)).collect()
}

fn join(sets: &[RangeSet]) -> String {
    sets.iter().map(RangeSet::to_string).collect::<Vec<_>>().join(", ")
}
