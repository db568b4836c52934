//! Who has which address: the state that the journal makes durable.
//!
//! [`Leases`] is plain memory. It changes by three operations only, the same ones that the journal holds: a lease, a
//! release, a place of the round. So replaying a journal and running live are one code path.
//!
//! Addresses are unique within a *pool*, a named address space. The node's own networks share one (the default, with
//! the empty name); a network whose pods never meet those, as one of another plugin that delegates its addresses
//! here, gets a pool of its own and may use the same ranges.
//!
//! A released address stays taken until the release is durable ([`crate::Store::release`]), so it can be *taken*
//! without being anyone's.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::range::{Range, is_v4, to_number};
use crate::taken::Taken;

/// What identifies an attachment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Owner {
    /// Name of the network.
    pub network: String,
    /// The runtime's container id.
    pub container: String,
    /// Name of the interface in the pod.
    pub ifname: String,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.network, self.container, self.ifname)
    }
}

/// What is remembered with a lease and not looked at here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// The pool: the name of the address space in which the addresses are unique. The node's own is empty.
    pub pool: String,
    /// When the lease is made, in seconds; which clock is the caller's choice.
    pub time: u64,
    /// The MAC of the interface.
    pub mac: Option<[u8; 6]>,
    /// The boot in which the lease was made, by the kernel's boot id: no pod outlives one. Empty if it is not known.
    pub boot: String,
    /// The pod's network namespace, if it is known.
    pub netns: Option<Netns>,
    /// Anything else, for people: namespace and name of the pod and the like.
    pub labels: BTreeMap<String, String>,
}

/// A network namespace, by what the kernel never gives to another one before the next boot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Netns {
    /// Its cookie (`SO_NETNS_COOKIE`).
    pub cookie: u64,
    /// The inode of its file, which the kernel wants to hear along with the cookie to find it again. By itself it means nothing: the
    /// next namespace may have it.
    pub inode: u64,
    /// Its number, if it was given one.
    pub number: Option<NetnsNumber>,
}

/// The number that a namespace has in another one (`RTM_NEWNSID`); it is gone when the namespace is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NetnsNumber {
    /// The cookie of the namespace in which the number counts.
    pub home: u64,
    /// The number.
    pub id: i32,
}

/// An address given to an attachment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The address.
    pub address: IpAddr,
    /// Length of the on-link prefix in bits.
    pub prefix_len: u8,
    /// The gateway of the range that the address is from.
    pub gateway: IpAddr,
    /// Which set the address is from: the start of that set's first range.
    pub(crate) set: IpAddr,
}

impl Lease {
    /// Address and prefix length together, as in `10.244.1.2/24`.
    pub fn cidr(&self) -> IpNet {
        IpNet::new(self.address, self.prefix_len).expect("a lease has a prefix that fits its family")
    }
}

/// An attachment and all of its addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Whose they are.
    pub owner: Owner,
    /// One for each range set, in the order in which the sets were given.
    pub leases: Vec<Lease>,
    /// What came with the request.
    pub facts: Facts,
}

impl Record {
    /// The addresses alone.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.leases.iter().map(|l| l.address)
    }
}

/// How full a range is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Addresses that cannot be given now: leased ones, and released ones whose release is not durable yet.
    pub leased: u64,
    /// Addresses that can be given in all; saturates at `u64::MAX`.
    pub size: u64,
}

/// Who has which address. Read-only to the outside; [`crate::Store`] changes it.
#[derive(Debug, Clone, Default)]
pub struct Leases {
    records: BTreeMap<Arc<Owner>, Record>,
    pools: HashMap<String, Pool>,
    rounds: Rounds,
}

#[derive(Debug, Clone, Default)]
struct Pool {
    v4: Taken,
    v6: Taken,
    /// Who has, or had until the release is durable, each address in `v4` and `v6`.
    held: HashMap<IpAddr, Arc<Owner>>,
}

/// Where the round-robin of each set stands. Losing one costs nothing but the order, so old ones are forgotten.
#[derive(Debug, Clone, Default)]
struct Rounds {
    /// Pool, set → (address last given, when in counts of `used`).
    last: HashMap<(String, IpAddr), (IpAddr, u64)>,
    used: u64,
}

const MAX_ROUNDS: usize = 1024;

impl Leases {
    /// The record of an attachment.
    pub fn get(&self, owner: &Owner) -> Option<&Record> {
        self.records.get(owner)
    }

    /// All records, ordered by owner.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Record> {
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
    pub fn by_address(&self, pool: &str, address: IpAddr) -> Option<&Record> {
        let owner = self.holder(pool, address.to_canonical())?;
        self.records.get(owner)
    }

    /// How full `range` is in `pool`.
    pub fn usage(&self, pool: &str, range: &Range) -> Usage {
        let (start, end) = range.bounds();
        let leased = self.taken(pool, range.is_v4()).map_or(0, |t| t.count(start, end));
        Usage { leased, size: range.size() }
    }

    pub(crate) fn taken(&self, pool: &str, v4: bool) -> Option<&Taken> {
        self.pools.get(pool).map(|p| if v4 { &p.v4 } else { &p.v6 })
    }

    /// Who has `address`, or had it if its release is not durable yet.
    pub(crate) fn holder(&self, pool: &str, address: IpAddr) -> Option<&Owner> {
        self.pools.get(pool)?.held.get(&address).map(Arc::as_ref)
    }

    /// The address last given from `set`.
    pub(crate) fn last_given(&self, pool: &str, set: IpAddr) -> Option<IpAddr> {
        Some(self.rounds.last.get(&(pool.to_owned(), set))?.0)
    }

    /// (pool, set, address last given), least recently used first.
    pub(crate) fn rounds(&self) -> impl Iterator<Item = (&str, IpAddr, IpAddr)> {
        let mut rounds: Vec<_> = self.rounds.last.iter().collect();
        rounds.sort_unstable_by_key(|(_, (_, used))| *used);
        rounds.into_iter().map(|((pool, set), (last, _))| (pool.as_str(), *set, *last))
    }

    /// Adds a record; refuses one whose owner has another or whose addresses are taken.
    pub(crate) fn add(&mut self, record: Record) -> Result<(), &'static str> {
        if self.records.contains_key(&record.owner) {
            return Err("an attachment has two leases");
        }
        let addresses: BTreeSet<IpAddr> = record.addresses().collect();
        let held = self.pools.get(&record.facts.pool).map(|p| &p.held);
        if addresses.len() != record.leases.len() || addresses.iter().any(|a| held.is_some_and(|h| h.contains_key(a))) {
            return Err("an address is leased twice");
        }
        let owner = Arc::new(record.owner.clone());
        let pool = self.pools.entry(record.facts.pool.clone()).or_default();
        for lease in &record.leases {
            pool.side(lease.address).insert(to_number(lease.address));
            pool.held.insert(lease.address, Arc::clone(&owner));
            self.rounds.set(&record.facts.pool, lease.set, lease.address);
        }
        self.records.insert(owner, record);
        Ok(())
    }

    /// Takes the record away; its addresses stay taken until [`Self::free`].
    pub(crate) fn remove(&mut self, owner: &Owner) -> Option<Record> {
        self.records.remove(owner)
    }

    /// Lets the addresses of a removed record be given again.
    pub(crate) fn free(&mut self, record: &Record) {
        let Some(pool) = self.pools.get_mut(&record.facts.pool) else { return };
        for address in record.addresses() {
            pool.side(address).remove(to_number(address));
            pool.held.remove(&address);
        }
        if pool.held.is_empty() {
            self.pools.remove(&record.facts.pool);
        }
    }

    /// Remembers that `address` was the last one given from `set`.
    pub(crate) fn set_round(&mut self, pool: &str, set: IpAddr, address: IpAddr) {
        self.rounds.set(pool, set, address);
    }
}

impl Pool {
    fn side(&mut self, address: IpAddr) -> &mut Taken {
        if is_v4(address) { &mut self.v4 } else { &mut self.v6 }
    }
}

impl Rounds {
    fn set(&mut self, pool: &str, set: IpAddr, address: IpAddr) {
        self.used += 1;
        self.last.insert((pool.to_owned(), set), (address, self.used));
        if self.last.len() > MAX_ROUNDS
            && let Some(oldest) = self.last.iter().min_by_key(|(_, (_, used))| *used).map(|(key, _)| key.clone())
        {
            self.last.remove(&oldest);
        }
    }
}
