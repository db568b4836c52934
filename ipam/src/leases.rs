//! Who has which address: the state that the journal makes durable.
//!
//! [`Leases`] is plain memory. It changes by the operations that the journal holds: a lease, a release, a place of the round, an address that
//! rests, another boot. So replaying a journal and running live are one code path.
//!
//! Addresses are unique within a *pool*, a named address space. The node's own networks share one (the default, with
//! the empty name); a network whose pods never meet those, as one of another plugin that delegates its addresses
//! here, gets a pool of its own and may use the same ranges.
//!
//! An address can be *taken* without being anyone's: it is *held* while a lease or a release of it is on its way to the disk, and it *rests*
//! for a while after that ([`crate::Rules::rest`]).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::range::{Range, RangeSet, is_v4, to_number};
use crate::record::{Owner, Record};
use crate::resting::Resting;
use crate::rounds::Rounds;
use crate::taken::Taken;

/// How full a range is. All of them count addresses; what is left can be given at once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Leased, or released without that being durable yet.
    pub leased: u64,
    /// Freed, and given again only when nothing else is left.
    pub resting: u64,
    /// Never given, whoever may have one of them still.
    pub reserved: u64,
    /// Addresses that can be given in all; saturates at `u64::MAX`.
    pub size: u64,
}

/// Who has which address. Read-only to the outside; [`crate::Store`] changes it.
#[derive(Debug, Clone, Default)]
pub struct Leases {
    records: BTreeMap<Owner, Arc<Record>>,
    pools: HashMap<String, Pool>,
    macs: HashMap<[u8; 6], usize>,
    rounds: Rounds,
    resting: Resting,
    /// The boot by whose clock they rest.
    boot: String,
}

#[derive(Debug, Clone, Default)]
struct Pool {
    v4: Taken,
    v6: Taken,
    /// Who has, is about to have, or had until that is durable, each address in `v4` and `v6` that does not rest.
    held: HashMap<IpAddr, Arc<Record>>,
}

impl Leases {
    /// The record of an attachment.
    pub fn get(&self, owner: &Owner) -> Option<&Arc<Record>> {
        self.records.get(owner)
    }

    /// All records, ordered by owner.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Arc<Record>> {
        self.records.values()
    }

    /// How many attachments there are.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Who has `address` in `pool`.
    pub fn by_address(&self, pool: &str, address: IpAddr) -> Option<&Arc<Record>> {
        self.records.get(self.holder(pool, address.to_canonical())?)
    }

    /// Whether an attachment has this MAC, or is about to.
    pub fn has_mac(&self, mac: [u8; 6]) -> bool {
        self.macs.contains_key(&mac)
    }

    /// How full `range` is in `pool`, if these are never given.
    pub fn usage(&self, pool: &str, range: &Range, reserved: &[IpNet]) -> Usage {
        let (start, end) = range.bounds();
        let taken = self.taken(pool, range.is_v4()).map_or(0, |t| t.count(start, end));
        let resting =
            self.resting.iter().filter(|(of, address, _)| *of == pool && range.contains(*address)).count() as u64;
        let reserved = range.count_in(reserved);
        Usage { leased: taken.saturating_sub(resting), resting, reserved, size: range.size() - reserved }
    }

    /// Addresses that rest: pool, address, and since when in milliseconds of its boot. The longest first.
    pub fn resting(&self) -> impl Iterator<Item = (&str, IpAddr, u64)> {
        self.resting.iter()
    }

    /// The address last given from each set: pool, the set's first address, address.
    pub fn rounds(&self) -> impl Iterator<Item = (&str, IpAddr, IpAddr)> {
        self.rounds.iter()
    }

    /// How many of the record's addresses rest.
    pub(crate) fn resting_of(&self, record: &Record) -> u64 {
        record.addresses().filter(|address| self.resting.contains(&record.facts.pool, *address)).count() as u64
    }

    /// The boot by whose clock addresses rest.
    pub(crate) fn boot(&self) -> &str {
        &self.boot
    }

    pub(crate) fn taken(&self, pool: &str, v4: bool) -> Option<&Taken> {
        self.pools.get(pool).map(|p| if v4 { &p.v4 } else { &p.v6 })
    }

    /// Who has `address`, is about to, or had it until that is durable.
    pub(crate) fn holder(&self, pool: &str, address: IpAddr) -> Option<&Owner> {
        self.pools.get(pool)?.held.get(&address).map(|record| &record.owner)
    }

    /// The address last given from `set`.
    pub(crate) fn last_given(&self, pool: &str, set: &RangeSet) -> Option<IpAddr> {
        self.rounds.last_given(pool, set)
    }

    /// Adds a record; refuses one whose owner has another or whose addresses are held.
    pub(crate) fn add(&mut self, record: Arc<Record>) -> Result<(), &'static str> {
        if self.records.contains_key(&record.owner) {
            return Err("an attachment has two leases");
        }
        self.hold(&record)?;
        self.enter(record);
        Ok(())
    }

    /// Takes the addresses of a record that is yet to be entered; they rest no more. Refuses addresses that are held.
    pub(crate) fn hold(&mut self, record: &Arc<Record>) -> Result<(), &'static str> {
        let name = &record.facts.pool;
        let addresses: BTreeSet<IpAddr> = record.addresses().collect();
        let held = self.pools.get(name).map(|p| &p.held);
        if addresses.len() != record.leases.len() || addresses.iter().any(|a| held.is_some_and(|h| h.contains_key(a))) {
            return Err("an address is leased twice");
        }
        let pool = self.pools.entry(name.clone()).or_default();
        for lease in &record.leases {
            self.resting.remove(name, lease.address);
            pool.side(lease.address).insert(to_number(lease.address));
            pool.held.insert(lease.address, Arc::clone(record));
            if !lease.set.is_unspecified() {
                self.rounds.set(name, lease.set, lease.address);
            }
        }
        if let Some(mac) = record.facts.mac {
            *self.macs.entry(mac).or_default() += 1;
        }
        Ok(())
    }

    /// Makes a record that is held its owner's.
    pub(crate) fn enter(&mut self, record: Arc<Record>) {
        self.records.insert(record.owner.clone(), record);
    }

    /// Takes the record away; its addresses stay held until [`Self::free`] or [`Self::lay_to_rest`].
    pub(crate) fn remove(&mut self, owner: &Owner) -> Option<Arc<Record>> {
        self.records.remove(owner)
    }

    /// Lets the addresses of a record that was removed, or never entered, be given again.
    pub(crate) fn free(&mut self, record: &Record) {
        self.let_go(record);
        for address in record.addresses() {
            self.forget(&record.facts.pool, address);
        }
    }

    /// Lets the addresses of a removed record rest from `since` on.
    pub(crate) fn lay_to_rest(&mut self, record: &Record, since: u64) {
        self.let_go(record);
        for address in record.addresses() {
            self.rest(&record.facts.pool, address, since);
        }
    }

    /// Lets an address that nobody holds rest from `since` on.
    pub(crate) fn rest(&mut self, pool: &str, address: IpAddr, since: u64) {
        if self.holder(pool, address).is_some() {
            return;
        }
        self.pools.entry(pool.to_owned()).or_default().side(address).insert(to_number(address));
        if let Some((pool, address)) = self.resting.add(pool, address, since) {
            self.forget(&pool, address);
        }
    }

    /// Ends the rest of all that have rested since `until` or longer.
    pub(crate) fn wake(&mut self, until: u64) {
        while let Some((pool, address)) = self.resting.pop_until(until) {
            self.forget(&pool, address);
        }
    }

    /// From here on it is another boot, and another clock, that says `now`.
    pub(crate) fn begin_boot(&mut self, id: &str, now: u64) {
        id.clone_into(&mut self.boot);
        self.resting.restart(now);
    }

    /// Remembers that `address` was the last one given from `set`.
    pub(crate) fn set_round(&mut self, pool: &str, set: IpAddr, address: IpAddr) {
        self.rounds.set(pool, set, address);
    }

    fn let_go(&mut self, record: &Record) {
        if let Some(pool) = self.pools.get_mut(&record.facts.pool) {
            record.addresses().for_each(|address| drop(pool.held.remove(&address)));
        }
        if let Some(mac) = record.facts.mac
            && let Some(count) = self.macs.get_mut(&mac)
        {
            *count -= 1;
            if *count == 0 {
                self.macs.remove(&mac);
            }
        }
    }

    fn forget(&mut self, name: &str, address: IpAddr) {
        let Some(pool) = self.pools.get_mut(name) else { return };
        pool.side(address).remove(to_number(address));
        if pool.v4.is_empty() && pool.v6.is_empty() {
            self.pools.remove(name);
        }
    }
}

impl Pool {
    fn side(&mut self, address: IpAddr) -> &mut Taken {
        if is_v4(address) { &mut self.v4 } else { &mut self.v6 }
    }
}
