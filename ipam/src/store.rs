//! The lease store: the leases in memory and the journal that makes them durable, in step.
//!
//! **A lease** is chosen, appended and synced, and only then entered and returned: an acknowledged lease survives any crash, and a failed
//! one leaves nothing behind.
//!
//! **A release** succeeds always, because a pod that is gone must not wait for a full disk. The record vanishes from
//! memory at once; if the journal cannot take the release it is kept as *pending* and its addresses stay held. Every
//! later write takes the pending ones along, before anything else. So an address is given to another owner
//! only after its release is durable, and no order of crashes can give it twice: the worst is that a pending release
//! is forgotten by a crash and the lease is there again, to be released by the next DEL, GC or reconcile.
//!
//! **Many at once** share one write and one sync ([`crate::commit`]): while one caller syncs, what the others want gathers, and the next write
//! takes all of it. Nobody holds a lock over a sync, so that readers never wait for the disk.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ipnet::IpNet;

use crate::choose::choose;
use crate::codec;
use crate::disk::{Disk, Folder, load_unlocked};
use crate::error::{LeaseError, OpenError, Recovery, StoreError};
use crate::journal::{Journal, MAX_PAYLOAD, replay};
use crate::leases::{Leases, Usage};
use crate::range::{Range, RangeSet};
use crate::record::{Facts, Lease, Owner, Record};

/// The leases of a node, durable. One writer process at a time, with any number of threads; see the module for what is promised when.
pub struct Store {
    pub(crate) memory: Mutex<Memory>,
    /// Whoever commits has it; nobody waits for it with `memory` held.
    pub(crate) journal: Mutex<Journal>,
    /// A commit is over.
    pub(crate) settled: Condvar,
    recovery: Option<Recovery>,
}

/// What holds for all leases, and may change while the store is open.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules {
    /// For how long a freed address is not given again while others are free.
    pub rest: Duration,
    /// What is never given.
    pub reserved: Vec<IpNet>,
}

/// What the store has done since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Leases given.
    pub leased: u64,
    /// Leases released.
    pub released: u64,
    /// Leases that were refused because no address was free.
    pub exhausted: u64,
    /// Resting addresses that were given: because no other was left, or somebody asked for them.
    pub woken: u64,
    /// Writes to the journal.
    pub commits: u64,
    /// Writes to the journal that failed.
    pub failed: u64,
}

/// What changes together.
pub(crate) struct Memory {
    pub(crate) leases: Leases,
    /// Released in memory and not in the journal, oldest first.
    pub(crate) pending: VecDeque<Released>,
    /// On their way to the journal.
    pub(crate) waiting: VecDeque<Waiting>,
    /// Owners of the leases that are on their way.
    pub(crate) arriving: BTreeSet<Owner>,
    /// What became of the tickets that were settled and not yet fetched.
    pub(crate) done: HashMap<u64, Result<(), StoreError>>,
    next_ticket: u64,
    /// Whether somebody writes.
    pub(crate) committing: bool,
    /// Bytes that the live records take in a journal.
    pub(crate) live: u64,
    pub(crate) trouble: Option<String>,
    pub(crate) poisoned: Option<String>,
    pub(crate) journal_len: u64,
    pub(crate) rules: Rules,
    pub(crate) counts: Counts,
}

/// A release that is not in the journal.
pub(crate) struct Released {
    pub(crate) record: Arc<Record>,
    pub(crate) since: u64,
    /// Who waits for it, until it was tried.
    pub(crate) ticket: Option<u64>,
    /// Whether it was tried in vain.
    pub(crate) tried: bool,
}

/// A change that is not in the journal.
pub(crate) struct Waiting {
    pub(crate) ticket: u64,
    pub(crate) payload: Vec<u8>,
    pub(crate) change: Change,
}

/// What is to be entered in memory when it is durable.
pub(crate) enum Change {
    Lease(Arc<Record>),
    Round { pool: String, last: IpAddr },
    Boot { id: String, now: u64 },
}

/// A lease that is on its way to the disk.
#[derive(Debug)]
#[must_use = "a lease that is not finished is not one, and nobody else gets its addresses"]
pub struct Begun {
    record: Arc<Record>,
    ticket: u64,
}

impl Begun {
    /// What it will be.
    pub fn record(&self) -> &Record {
        &self.record
    }
}

/// Bytes of all records together, encoded. A compaction writes them all, so this bounds its time and the memory.
pub const MAX_LIVE: u64 = 64 << 20;

impl Store {
    /// Opens the store in a folder for writing, and makes either if it is not there.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self, OpenError> {
        let folder = folder.as_ref();
        Self::with_disk(Box::new(Folder::lock(folder)?)).map_err(|e| e.at(folder))
    }

    /// Opens a store on any disk, e.g. a simulated one.
    pub fn with_disk(disk: Box<dyn Disk>) -> Result<Self, OpenError> {
        let (journal, leases, recovery) = Journal::open(disk)?;
        let memory = Memory {
            live: leases.iter().map(|record| encoded_len(record)).sum(),
            journal_len: journal.len(),
            leases,
            pending: VecDeque::new(),
            waiting: VecDeque::new(),
            arriving: BTreeSet::new(),
            done: HashMap::new(),
            next_ticket: 0,
            committing: false,
            trouble: None,
            poisoned: None,
            rules: Rules::default(),
            counts: Counts::default(),
        };
        Ok(Self { memory: Mutex::new(memory), journal: Mutex::new(journal), settled: Condvar::new(), recovery })
    }

    /// The leases of the store in a folder, without its lock: a writer may be at work. Changes nothing on disk.
    ///
    /// An append in progress looks like a torn one and is reported as such. No journal is no lease.
    pub fn read_only(folder: impl AsRef<Path>) -> Result<(Leases, Option<Recovery>), OpenError> {
        let folder = folder.as_ref();
        let content = load_unlocked(folder).map_err(|e| OpenError::reading(e).at(folder))?;
        let Some(bytes) = content else { return Ok((Leases::default(), None)) };
        let replay = replay(&bytes).map_err(|e| e.at(folder))?;
        Ok((replay.leases, replay.recovery))
    }

    /// What holds from here on.
    pub fn set_rules(&self, rules: Rules) {
        self.memory().rules = rules;
    }

    /// Says which boot this is, and what its clock says, in milliseconds. Addresses that rested before another one begin anew. An unknown
    /// boot, which has an empty id, is another one each time.
    pub fn begin_boot(&self, id: &str, now: u64) -> Result<(), StoreError> {
        let memory = self.memory();
        if !id.is_empty() && memory.leases.boot() == id {
            return Ok(());
        }
        let mut payload = Vec::new();
        codec::put_boot(&mut payload, id, now);
        self.await_change(memory, payload, Change::Boot { id: id.to_owned(), now })
    }

    /// Leases one address out of each set to an attachment that has none, and returns when that is durable. `now` is the boot's clock in
    /// milliseconds.
    ///
    /// Each requested address must lie in a set that no other requested one lies in. All sets give or none does.
    pub fn lease(
        &self,
        owner: &Owner,
        sets: &[RangeSet],
        requested: &[IpAddr],
        facts: Facts,
        now: u64,
    ) -> Result<Arc<Record>, LeaseError> {
        self.finish(self.begin(owner, sets, requested, facts, now)?)
    }

    /// The first half of [`Self::lease`]: the addresses are chosen, and nobody else gets them. They are leased when [`Self::finish`], which
    /// has to follow, returns.
    pub fn begin(
        &self,
        owner: &Owner,
        sets: &[RangeSet],
        requested: &[IpAddr],
        facts: Facts,
        now: u64,
    ) -> Result<Begun, LeaseError> {
        let mut memory = self.memory();
        memory.wake(now);
        let leases = match memory.choose(owner, sets, requested, &facts) {
            // What others are releasing may be just what is wanted.
            Err(LeaseError::Exhausted { .. } | LeaseError::Taken { .. }) if !memory.pending.is_empty() => {
                drop(memory);
                self.flush()?;
                memory = self.memory();
                memory.wake(now);
                memory.choose(owner, sets, requested, &facts)
            }
            chosen => chosen,
        };
        let leases = leases
            .inspect_err(|error| memory.counts.exhausted += u64::from(matches!(error, LeaseError::Exhausted { .. })))?;
        let (record, ticket) = memory.send(Arc::new(Record { owner: owner.clone(), leases, facts }))?;
        Ok(Begun { record, ticket })
    }

    /// The second half: returns when the lease is durable. If it cannot be, it never was.
    pub fn finish(&self, begun: Begun) -> Result<Arc<Record>, LeaseError> {
        self.acknowledge(begun.record, begun.ticket)
    }

    /// Leases an attachment the addresses that it has already, by another program's word, wherever they lie.
    pub fn adopt(&self, owner: Owner, addresses: &[IpAddr], facts: Facts) -> Result<Arc<Record>, LeaseError> {
        let (record, ticket) = self.memory().adopt(owner, addresses, facts)?;
        self.acknowledge(record, ticket)
    }

    /// The same for many, in few writes. At the first that cannot be adopted it stops; those before it are.
    pub fn adopt_all(&self, all: Vec<(Owner, Vec<IpAddr>, Facts)>) -> Result<(), LeaseError> {
        // All are on their way before anybody waits; the lock is not held for all of them at once.
        let mut tickets = Vec::new();
        let mut result = Ok(());
        for (owner, addresses, facts) in all {
            match self.memory().adopt(owner, &addresses, facts) {
                Ok(sent) => tickets.push(sent),
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        for (record, ticket) in tickets {
            let acknowledged = self.acknowledge(record, ticket).map(drop);
            result = result.and(acknowledged);
        }
        result
    }

    /// Goes on after the address that another program has given last.
    pub fn adopt_round(&self, pool: &str, last: IpAddr) -> Result<(), StoreError> {
        let last = last.to_canonical();
        let mut payload = Vec::new();
        codec::put_round(&mut payload, pool, last, last);
        self.await_change(self.memory(), payload, Change::Round { pool: pool.to_owned(), last })
    }

    /// Takes an attachment's addresses away; `None` if it has none. Never fails: see the module, and [`Self::pending`]. `now` is the boot's
    /// clock in milliseconds.
    pub fn release(&self, owner: &Owner, now: u64) -> Option<Arc<Record>> {
        let mut memory = self.memory();
        let record = memory.leases.remove(owner)?;
        memory.live -= encoded_len(&record);
        memory.counts.released += 1;
        let ticket = memory.ticket();
        memory.pending.push_back(Released {
            record: Arc::clone(&record),
            since: now,
            ticket: Some(ticket),
            tried: false,
        });
        // The error is kept in `trouble`, and the release in `pending`.
        let _ = self.settle(memory, ticket);
        Some(record)
    }

    /// Writes the pending releases. To be called now and then while there are any.
    pub fn flush(&self) -> Result<(), StoreError> {
        let mut memory = self.memory();
        while !memory.pending.is_empty() {
            let ticket = match memory.pending.front() {
                Some(Released { ticket: Some(_), .. }) | None => {
                    // Somebody waits for it already; so it is about to be tried.
                    memory = self.next_commit(memory);
                    continue;
                }
                Some(_) => memory.ticket(),
            };
            if let Some(first) = memory.pending.front_mut() {
                first.ticket = Some(ticket);
            }
            self.settle(memory, ticket)?;
            memory = self.memory();
        }
        Ok(())
    }

    /// Looks at the leases as they are now. Nobody else gets at the store meanwhile, `look` neither.
    pub fn read<T>(&self, look: impl FnOnce(&Leases) -> T) -> T {
        look(&self.memory().leases)
    }

    /// How many attachments there are.
    pub fn len(&self) -> usize {
        self.memory().leases.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.memory().leases.is_empty()
    }

    /// The record of an attachment.
    pub fn get(&self, owner: &Owner) -> Option<Arc<Record>> {
        self.memory().leases.get(owner).cloned()
    }

    /// All records, ordered by owner.
    pub fn records(&self) -> Vec<Arc<Record>> {
        self.memory().leases.iter().cloned().collect()
    }

    /// Who has `address` in `pool`.
    pub fn by_address(&self, pool: &str, address: IpAddr) -> Option<Arc<Record>> {
        self.memory().leases.by_address(pool, address).cloned()
    }

    /// How full `range` is in `pool`.
    pub fn usage(&self, pool: &str, range: &Range) -> Usage {
        let memory = self.memory();
        memory.leases.usage(pool, range, &memory.rules.reserved)
    }

    /// What the store has done since it was opened.
    pub fn counts(&self) -> Counts {
        self.memory().counts
    }

    /// How many releases could not be made durable. While there are any, something is wrong with the disk.
    pub fn pending(&self) -> usize {
        self.memory().pending.iter().filter(|released| released.tried).count()
    }

    /// What the journal's last write failed with, if it did, and what to do; `None` as soon as one succeeds.
    pub fn trouble(&self) -> Option<String> {
        self.memory().trouble.clone()
    }

    /// Why nothing can be written until the store is opened again.
    pub fn poisoned(&self) -> Option<String> {
        self.memory().poisoned.clone()
    }

    /// What was cut off when the store was opened: an append that a crash tore.
    pub fn recovery(&self) -> Option<&Recovery> {
        self.recovery.as_ref()
    }

    /// Length of the journal in bytes.
    pub fn journal_len(&self) -> u64 {
        self.memory().journal_len
    }

    pub(crate) fn memory(&self) -> MutexGuard<'_, Memory> {
        // Memory changes in steps that do not panic.
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a lease is durable and entered.
    fn acknowledge(&self, record: Arc<Record>, ticket: u64) -> Result<Arc<Record>, LeaseError> {
        match self.settle(self.memory(), ticket) {
            Ok(()) => Ok(record),
            Err(error) => {
                self.memory().live -= encoded_len(&record);
                Err(error.into())
            }
        }
    }

    /// Has a change written, and returns when it is durable and entered.
    fn await_change<'a>(
        &'a self,
        mut memory: MutexGuard<'a, Memory>,
        payload: Vec<u8>,
        change: Change,
    ) -> Result<(), StoreError> {
        let ticket = memory.ticket();
        memory.waiting.push_back(Waiting { ticket, payload, change });
        self.settle(memory, ticket)
    }
}

impl Memory {
    fn ticket(&mut self) -> u64 {
        self.next_ticket += 1;
        self.next_ticket
    }

    fn wake(&mut self, now: u64) {
        let rest = u64::try_from(self.rules.rest.as_millis()).unwrap_or(u64::MAX);
        if let Some(until) = now.checked_sub(rest) {
            self.leases.wake(until);
        }
    }

    fn check_owner(&self, owner: &Owner) -> Result<(), LeaseError> {
        let exists = |addresses| Err(LeaseError::Exists { owner: Box::new(owner.clone()), addresses });
        match self.leases.get(owner) {
            Some(record) => exists(record.addresses().collect()),
            None if self.arriving.contains(owner) => exists(Vec::new()),
            None => Ok(()),
        }
    }

    fn adopt(&mut self, owner: Owner, addresses: &[IpAddr], facts: Facts) -> Result<(Arc<Record>, u64), LeaseError> {
        self.check_owner(&owner)?;
        let addresses: BTreeSet<IpAddr> = addresses.iter().map(IpAddr::to_canonical).collect();
        let held = addresses.iter().find_map(|a| Some((*a, self.leases.holder(&facts.pool, *a)?.clone())));
        if let Some((address, owner)) = held {
            return Err(LeaseError::Taken { address, owner: Box::new(owner) });
        }
        if addresses.is_empty() {
            return Err(LeaseError::NoRanges);
        }
        let leases = addresses.into_iter().map(Lease::foreign).collect();
        self.send(Arc::new(Record { owner, leases, facts }))
    }

    /// Holds what the record leases, and sends it on its way to the journal.
    fn send(&mut self, record: Arc<Record>) -> Result<(Arc<Record>, u64), LeaseError> {
        let mut payload = Vec::new();
        codec::put_lease(&mut payload, &record);
        let bytes = payload.len();
        if bytes > MAX_PAYLOAD {
            return Err(LeaseError::TooLarge { bytes, limit: MAX_PAYLOAD });
        }
        if self.live + bytes as u64 > MAX_LIVE {
            return Err(LeaseError::Full { limit: MAX_LIVE });
        }
        self.live += bytes as u64;
        self.counts.woken += self.leases.resting_of(&record);
        self.leases.hold(&record).expect("the addresses were chosen among those that nobody holds");
        self.arriving.insert(record.owner.clone());
        let ticket = self.ticket();
        self.waiting.push_back(Waiting { ticket, payload, change: Change::Lease(Arc::clone(&record)) });
        Ok((record, ticket))
    }

    fn choose(
        &self,
        owner: &Owner,
        sets: &[RangeSet],
        requested: &[IpAddr],
        facts: &Facts,
    ) -> Result<Vec<Lease>, LeaseError> {
        self.check_owner(owner)?;
        if let Some(mac) = facts.mac.filter(|mac| self.leases.has_mac(*mac)) {
            return Err(LeaseError::Mac { mac });
        }
        choose(&self.leases, &facts.pool, sets, requested, &self.rules.reserved)
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let memory = self.memory();
        f.debug_struct("Store")
            .field("leases", &memory.leases.len())
            .field("pending", &memory.pending.len())
            .field("journal_len", &memory.journal_len)
            .finish_non_exhaustive()
    }
}

pub(crate) fn encoded_len(record: &Record) -> u64 {
    let mut payload = Vec::new();
    codec::put_lease(&mut payload, record);
    payload.len() as u64
}
