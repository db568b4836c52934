//! What can go wrong: a store that does not open, a lease that cannot be given, a write that fails.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use crate::record::Owner;

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
    /// A reserved address was requested.
    #[error("the requested {address} is reserved: it is never given")]
    Reserved {
        /// The address.
        address: IpAddr,
    },
    /// The MAC is another attachment's.
    #[error("the MAC {} is in use", hex(mac))]
    Mac {
        /// The MAC.
        mac: [u8; 6],
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
        "the lease journal is damaged at byte {offset}: {what}. Nothing was changed. `weft ipam fsck` says what can be saved"
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
    pub(crate) fn at(self, folder: &Path) -> Self {
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

fn hex(mac: &[u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

impl StoreError {
    /// The same for another of those who waited for one write.
    pub(crate) fn again(&self) -> StoreError {
        match self {
            Self::Io { source } => Self::Io { source: again(source) },
            Self::Poisoned { reason } => Self::Poisoned { reason: reason.clone() },
            Self::JournalFull { limit } => Self::JournalFull { limit: *limit },
        }
    }
}

fn again(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(number) => io::Error::from_raw_os_error(number),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}
