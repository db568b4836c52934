//! The lease store: the leases in memory and the journal that makes them durable, in step.
//!
//! **A lease** is chosen, appended and synced, and only then entered in memory and returned: an acknowledged lease
//! survives any crash, and a failed one leaves nothing behind.
//!
//! **A release** succeeds always, because a pod that is gone must not wait for a full disk. The record vanishes from
//! memory at once; if the journal cannot take the release it is kept as *pending* and its addresses stay taken. Every
//! later lease, release or [`Store::flush`] writes the pending ones first. So an address is given to another owner
//! only after its release is durable, and no order of crashes can give it twice: the worst is that a pending release
//! is forgotten by a crash and the lease is there again, to be released by the next DEL, GC or reconcile.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use crate::choose::choose;
use crate::codec;
use crate::disk::{Disk, Folder, load_unlocked};
use crate::journal::{Journal, MAX_PAYLOAD, replay};
use crate::leases::{Facts, Leases, Owner, Record, Usage};
use crate::range::{Range, RangeSet};

/// The leases of a node, durable. One writer at a time; see the module for what is promised when.
pub struct Store {
    journal: Journal,
    leases: Leases,
    /// Released in memory and not in the journal, oldest first.
    pending: Vec<Record>,
    /// Bytes that the live records take in a journal.
    live: u64,
    recovery: Option<Recovery>,
    trouble: Option<String>,
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
        let live = leases.iter().map(encoded_len).sum();
        Ok(Self { journal, leases, pending: Vec::new(), live, recovery, trouble: None })
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

    /// Leases one address out of each set to an attachment that has none, and returns when that is durable.
    ///
    /// Each requested address must lie in a set that no other requested one lies in. All sets give or none does.
    pub fn lease(
        &mut self,
        owner: &Owner,
        sets: &[RangeSet],
        requested: &[IpAddr],
        facts: Facts,
    ) -> Result<Record, LeaseError> {
        if let Some(record) = self.leases.get(owner) {
            return Err(LeaseError::Exists { owner: Box::new(owner.clone()), addresses: record.addresses().collect() });
        }
        self.flush()?;
        let leases = choose(&self.leases, &facts.pool, sets, requested)?;
        let record = Record { owner: owner.clone(), leases, facts };
        let mut payload = Vec::new();
        codec::put_lease(&mut payload, &record);
        if payload.len() > MAX_PAYLOAD {
            return Err(LeaseError::TooLarge { bytes: payload.len(), limit: MAX_PAYLOAD });
        }
        if self.live + payload.len() as u64 > MAX_LIVE {
            return Err(LeaseError::Full { limit: MAX_LIVE });
        }
        self.append(&payload)?;
        self.live += payload.len() as u64;
        self.leases.add(record.clone()).expect("the addresses were chosen among the free ones");
        self.compact_if_due();
        Ok(record)
    }

    /// Takes an attachment's addresses away; `None` if it has none. Never fails: see the module, and [`Self::pending`].
    pub fn release(&mut self, owner: &Owner) -> Option<Record> {
        let record = self.leases.remove(owner)?;
        self.live -= encoded_len(&record);
        self.pending.push(record.clone());
        // The error is kept in `trouble`, and the release in `pending`.
        let _ = self.flush();
        self.compact_if_due();
        Some(record)
    }

    /// Writes the pending releases. To be called now and then while there are any.
    pub fn flush(&mut self) -> Result<(), StoreError> {
        if self.journal.nearly_full() {
            self.compact()?;
        }
        while !self.pending.is_empty() {
            let (mut payload, mut count) = (Vec::new(), 0);
            for record in &self.pending {
                let before = payload.len();
                codec::put_release(&mut payload, &record.owner);
                if payload.len() > MAX_PAYLOAD {
                    payload.truncate(before);
                    break;
                }
                count += 1;
            }
            self.append(&payload)?;
            for record in self.pending.drain(..count) {
                self.leases.free(&record);
            }
        }
        Ok(())
    }

    /// Rewrites the journal with nothing but what is true now. Done by itself when the journal has grown.
    pub fn compact(&mut self) -> Result<(), StoreError> {
        let compacted = self.journal.compact(&self.leases);
        if compacted.is_ok() {
            // What was released is not in the new journal: that is durable now.
            for record in self.pending.drain(..) {
                self.leases.free(&record);
            }
        }
        self.note(compacted)
    }

    /// All leases.
    pub fn leases(&self) -> &Leases {
        &self.leases
    }

    /// The record of an attachment.
    pub fn get(&self, owner: &Owner) -> Option<&Record> {
        self.leases.get(owner)
    }

    /// All records, ordered by owner.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Record> {
        self.leases.iter()
    }

    /// Who has `address` in `pool`.
    pub fn by_address(&self, pool: &str, address: IpAddr) -> Option<&Record> {
        self.leases.by_address(pool, address)
    }

    /// How full `range` is in `pool`.
    pub fn usage(&self, pool: &str, range: &Range) -> Usage {
        self.leases.usage(pool, range)
    }

    /// How many releases are not durable yet. While there are any, something is wrong with the disk.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// What the journal's last write failed with, if it did, and what to do; `None` as soon as one succeeds.
    pub fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    /// Why nothing can be written until the store is opened again.
    pub fn poisoned(&self) -> Option<&str> {
        self.journal.poisoned()
    }

    /// What was cut off when the store was opened: an append that a crash tore.
    pub fn recovery(&self) -> Option<&Recovery> {
        self.recovery.as_ref()
    }

    /// Length of the journal in bytes.
    pub fn journal_len(&self) -> u64 {
        self.journal.len()
    }

    fn append(&mut self, payload: &[u8]) -> Result<(), StoreError> {
        let appended = self.journal.append(payload);
        self.note(appended)
    }

    /// Compaction is housekeeping: what was asked for is done, so a failure only shows in `trouble`.
    fn compact_if_due(&mut self) {
        if self.journal.compaction_is_due() {
            let _ = self.compact();
        }
    }

    fn note(&mut self, done: Result<(), StoreError>) -> Result<(), StoreError> {
        self.trouble = done.as_ref().err().map(ToString::to_string);
        done
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("leases", &self.leases.len())
            .field("pending", &self.pending.len())
            .field("journal_len", &self.journal.len())
            .finish_non_exhaustive()
    }
}

fn encoded_len(record: &Record) -> u64 {
    let mut payload = Vec::new();
    codec::put_lease(&mut payload, record);
    payload.len() as u64
}

/// An append that a crash tore; it was never acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovery {
    /// Where it began in the journal.
    pub offset: u64,
    /// How many bytes of it there were.
    pub bytes: u64,
}

impl fmt::Display for Recovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { offset, bytes } = self;
        write!(f, "the lease journal ended in {bytes} bytes, at byte {offset}, of a change that was never completed")
    }
}

/// Why an attachment got no lease. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// The attachment has a lease; CNI forbids a second ADD.
    #[error("{owner} has a lease already ({}); DEL comes before another ADD", list(addresses))]
    Exists {
        /// The attachment.
        owner: Box<Owner>,
        /// What it has.
        addresses: Vec<IpAddr>,
    },
    /// No set was given.
    #[error("there are no ranges to lease from; configure at least one")]
    NoRanges,
    /// Two sets have addresses in common.
    #[error("range set {first} overlaps with range set {other}")]
    Overlap {
        /// A set.
        first: String,
        /// The other.
        other: String,
    },
    /// Requested addresses that no set can give, or of which another one is wanted from the same set.
    #[error("cannot give the requested {}: not in {ranges}, or a second one from the same range set", list(addresses))]
    NotInRange {
        /// The addresses that are left over.
        addresses: Vec<IpAddr>,
        /// The sets.
        ranges: String,
    },
    /// A gateway was requested.
    #[error("the requested {address} is a gateway's address")]
    Gateway {
        /// The address.
        address: IpAddr,
    },
    /// A requested address is leased.
    #[error("the requested {address} is leased to {owner}")]
    Taken {
        /// The address.
        address: IpAddr,
        /// Who has it.
        owner: Box<Owner>,
    },
    /// A set has no free address.
    #[error("no address is free in {ranges}: {leased} are leased; remove pods or give the node a larger range")]
    Exhausted {
        /// The set.
        ranges: String,
        /// How many of its addresses are leased.
        leased: u64,
    },
    /// Names and labels are too long.
    #[error("the lease with its labels takes {bytes} bytes, more than {limit}; give it fewer or shorter labels")]
    TooLarge {
        /// Its size, encoded.
        bytes: usize,
        /// The most that fits.
        limit: usize,
    },
    /// There are more leases than one node's store is made for.
    #[error("the lease store is full: its leases would take more than {limit} bytes; release some")]
    Full {
        /// The most that fits, in bytes.
        limit: u64,
    },
    /// The journal could not be written.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why the journal could not be written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The disk is full or broken. What was to be written is not in the journal.
    #[error("cannot write the lease journal: {source}; free space or check the disk")]
    Io {
        /// What the system says.
        source: io::Error,
    },
    /// An earlier failure left the journal in a state that only reading it again can tell.
    #[error("the lease journal is closed for writing since {reason}; check the disk, then restart the daemon")]
    Poisoned {
        /// What happened.
        reason: String,
    },
    /// Compaction has failed for so long that the journal is as long as it may become.
    #[error("the lease journal has reached {limit} bytes and could not be compacted; free space or check the disk")]
    JournalFull {
        /// The longest journal in bytes.
        limit: u64,
    },
}

/// Why a store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A file or folder could not be used.
    #[error("cannot {action} the lease store {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Another process writes to it.
    #[error("the lease store {} is in use by {}; only one daemon may write to it", path.display(), holder(*pid))]
    Locked {
        /// The folder.
        path: PathBuf,
        /// The other process, if it says so.
        pid: Option<u32>,
    },
    /// The journal is damaged. Nothing was changed.
    #[error(
        "the lease journal is damaged at byte {offset}: {what}. Nothing was changed. Restore the file from a backup; or, \
         once no pod of this node runs, move it away and let the daemon start with an empty one"
    )]
    Damaged {
        /// Where, in bytes from the start of the file.
        offset: u64,
        /// What is wrong there.
        what: &'static str,
    },
    /// The journal is of another version.
    #[error(
        "the lease journal has format version {found}, this program reads {}; use the version that wrote it",
        crate::VERSION
    )]
    Version {
        /// The version in the file.
        found: u32,
    },
}

impl OpenError {
    pub(crate) fn reading(source: io::Error) -> Self {
        Self::Io { action: "read", path: PathBuf::new(), source }
    }

    pub(crate) fn creating(source: io::Error) -> Self {
        Self::Io { action: "create the journal of", path: PathBuf::new(), source }
    }

    pub(crate) fn recovering(source: io::Error) -> Self {
        Self::Io { action: "bring in order", path: PathBuf::new(), source }
    }

    /// Names the folder, which a disk does not know.
    fn at(self, folder: &Path) -> Self {
        match self {
            Self::Io { action, source, .. } => Self::Io { action, path: folder.to_owned(), source },
            other => other,
        }
    }
}

fn holder(pid: Option<u32>) -> String {
    pid.map_or_else(|| "another process".into(), |pid| format!("process {pid}"))
}

fn list(addresses: &[IpAddr]) -> String {
    addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(", ")
}
