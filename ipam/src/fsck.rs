//! What can be saved of a damaged journal.
//!
//! Opening refuses damage, because a lease that is forgotten is an address given twice. Here somebody has decided to go on with what there is.
//! Each frame that is whole counts, in the order of their numbers; what is not whole is passed over and said. Where a change is missing, the
//! later one is believed: an address that is leased once more was released in between. An address that can still be read in a damaged lease stays
//! taken, by an owner that nobody knows ([`lost_owner`]), until the next boot or until a person releases it.
//!
//! Nothing is thrown away: the damaged journal is kept beside the new one.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::codec::{self, Op};
use crate::disk::{Disk, Folder, JOURNAL_FILE, load_unlocked};
use crate::error::{OpenError, Recovery};
use crate::journal::{self, Journal};
use crate::leases::Leases;
use crate::record::{Facts, Lease, Owner, Record};

/// Bytes over which checksums are computed at most: what claims to be a frame is tried as long as this lasts.
const BUDGET: u64 = 8 << 30;
/// Most things that are told one by one.
const MAX_TOLD: usize = 1000;

/// What a journal holds, damaged or not.
#[derive(Debug, Clone)]
pub struct Checkup {
    /// Length of the journal in bytes; `None` if there is none.
    pub bytes: Option<u64>,
    /// Whole frames.
    pub frames: u64,
    /// What is true by them.
    pub leases: Leases,
    /// An append that was never completed, at the end: no damage, it goes when the store is opened.
    pub torn: Option<Recovery>,
    /// What is not whole, or cannot be.
    pub damage: Vec<Damage>,
    /// Changes that are missing, as far as the numbers of the frames tell.
    pub missing: u64,
    /// Addresses whose leases are damaged; they stay taken.
    pub lost: BTreeSet<IpAddr>,
    next_number: u64,
}

/// A part of a journal that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Where it begins, in bytes from the start of the file.
    pub offset: u64,
    /// How long it is in bytes.
    pub bytes: u64,
    /// What is wrong with it.
    pub what: String,
}

/// Who has the address of a damaged lease.
pub fn lost_owner(address: IpAddr) -> Owner {
    Owner { network: String::new(), container: "lost".into(), ifname: address.to_string() }
}

/// Looks at the store in a folder without changing it, whoever has its lock.
///
/// # Errors
/// It cannot be read, or another version wrote it.
pub fn check(folder: &Path) -> Result<Checkup, OpenError> {
    let content = load_unlocked(folder).map_err(|e| OpenError::reading(e).at(folder))?;
    content.map_or_else(|| Ok(Checkup::empty()), |bytes| examine(&bytes))
}

/// Writes a journal of what can be saved, and keeps the damaged one. Returns where, if there was anything to repair.
///
/// # Errors
/// Those of [`check`]; another process has the lock; the disk refuses. Nothing is changed then.
pub fn repair(folder: &Path) -> Result<(Checkup, Option<PathBuf>), OpenError> {
    let mut disk = Folder::lock(folder)?;
    let content = disk.load().map_err(|e| OpenError::reading(e).at(folder))?;
    let Some(bytes) = content else { return Ok((Checkup::empty(), None)) };
    let checkup = examine(&bytes)?;
    if checkup.is_sound() {
        return Ok((checkup, None));
    }
    let failed = |action| move |source| OpenError::Io { action, path: folder.to_owned(), source };
    let kept = keep(folder).map_err(failed("keep the damaged journal of"))?;
    Journal::replace(Box::new(disk), checkup.next_number, &checkup.leases).map_err(failed("repair"))?;
    Ok((checkup, Some(kept)))
}

/// A second name for the journal, which is about to lose the first.
fn keep(folder: &Path) -> io::Result<PathBuf> {
    for number in 1..1000 {
        let kept = folder.join(format!("{JOURNAL_FILE}.damaged.{number}"));
        match fs::hard_link(folder.join(JOURNAL_FILE), &kept) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            linked => return linked.map(|()| kept),
        }
    }
    Err(io::Error::new(io::ErrorKind::AlreadyExists, "there are a thousand damaged ones already: remove some"))
}

/// Looks at a journal.
///
/// # Errors
/// Another version wrote it.
pub fn examine(bytes: &[u8]) -> Result<Checkup, OpenError> {
    match journal::replay(bytes) {
        Ok(replay) => Ok(Checkup {
            bytes: Some(bytes.len() as u64),
            frames: replay.frames(),
            leases: replay.leases,
            torn: replay.recovery,
            ..Checkup::empty()
        }),
        Err(OpenError::Damaged { .. }) => Ok(Salvage::of(bytes)),
        Err(other) => Err(other),
    }
}

impl Checkup {
    fn empty() -> Checkup {
        Checkup {
            bytes: None,
            frames: 0,
            leases: Leases::default(),
            torn: None,
            damage: Vec::new(),
            missing: 0,
            lost: BTreeSet::new(),
            next_number: 1,
        }
    }

    /// Whether the store can be opened as it is.
    pub fn is_sound(&self) -> bool {
        self.damage.is_empty()
    }
}

/// A whole frame: its number, its payload, its length.
type Found<'a> = (u64, &'a [u8], usize);

struct Salvage<'a> {
    bytes: &'a [u8],
    budget: u64,
    checkup: Checkup,
}

impl<'a> Salvage<'a> {
    fn of(bytes: &'a [u8]) -> Checkup {
        let mut salvage = Salvage { bytes, budget: BUDGET, checkup: Checkup::empty() };
        salvage.checkup.bytes = Some(bytes.len() as u64);
        let begun = match journal::parse_header(bytes) {
            Ok((_, _, first)) => {
                salvage.checkup.next_number = first;
                journal::HEADER
            }
            Err(_) => {
                salvage.tell(0, journal::HEADER.min(bytes.len()), "the header is not whole");
                0
            }
        };
        salvage.walk(begun);
        salvage.hold_lost();
        salvage.checkup
    }

    fn walk(&mut self, mut at: usize) {
        let mut known = at > 0;
        while at < self.bytes.len() {
            let (found, start) = self.next_frame(at);
            if start > at {
                self.pass_over(at, start, "no frame is whole here");
            }
            let Some((number, payload, length)) = found else { break };
            if known {
                self.checkup.missing += number - self.checkup.next_number;
            }
            known = true;
            self.checkup.next_number = number.saturating_add(1);
            match codec::parse(payload) {
                Ok(ops) => {
                    self.checkup.frames += 1;
                    ops.into_iter().for_each(|op| self.apply(start, op));
                }
                Err(what) => self.pass_over(start, start + length, what),
            }
            at = start + length;
        }
    }

    /// Number, payload and length of the first whole frame from `at` on that does not come before what was read, and where it begins; without
    /// one, the end.
    fn next_frame(&mut self, at: usize) -> (Option<Found<'a>>, usize) {
        let wanted = self.checkup.next_number;
        for start in at..self.bytes.len() {
            let rest = &self.bytes[start..];
            let Some(claimed) = journal::claimed_length(rest) else { continue };
            let Some(budget) = self.budget.checked_sub(claimed as u64) else { break };
            self.budget = budget;
            let mut seen = wanted;
            let fits = |number| {
                seen = number;
                number >= wanted
            };
            if let Some((payload, length)) = journal::frame_at(rest, fits) {
                return (Some((seen, payload, length)), start);
            }
        }
        (None, self.bytes.len())
    }

    /// Believes what comes later.
    fn apply(&mut self, at: usize, op: Op) {
        let leases = &mut self.checkup.leases;
        match op {
            Op::Lease(record) => {
                let pool = &record.facts.pool;
                let before: BTreeSet<Owner> = std::iter::once(record.owner.clone())
                    .filter(|owner| leases.get(owner).is_some())
                    .chain(record.addresses().filter_map(|address| leases.holder(pool, address).cloned()))
                    .collect();
                let mut told = Vec::new();
                for owner in before {
                    if let Some(old) = leases.remove(&owner) {
                        leases.free(&old);
                        told.push(format!("the release of {owner} is missing"));
                    }
                }
                if let Err(what) = leases.add(Arc::new(*record)) {
                    told.push(what.to_owned());
                }
                told.iter().for_each(|what| self.tell(at, 0, what));
            }
            Op::Release { owner, since } => match leases.remove(&owner) {
                Some(record) => leases.lay_to_rest(&record, since),
                None => self.tell(at, 0, &format!("the lease of {owner} is missing, which was released")),
            },
            Op::Round { pool, set, last } => leases.set_round(&pool, set, last),
            Op::Boot { id, now } => leases.begin_boot(&id, now),
            Op::Rest { pool, address, since } => leases.rest(&pool, address, since),
        }
    }

    fn pass_over(&mut self, from: usize, to: usize, what: &str) {
        self.checkup.lost.extend(codec::addresses_in(&self.bytes[from..to]));
        self.tell(from, to - from, what);
    }

    fn tell(&mut self, offset: usize, bytes: usize, what: &str) {
        if self.checkup.damage.len() < MAX_TOLD {
            self.checkup.damage.push(Damage { offset: offset as u64, bytes: bytes as u64, what: what.to_owned() });
        }
    }

    /// Nobody gets an address that somebody unknown may have.
    fn hold_lost(&mut self) {
        let boot = self.checkup.leases.boot().to_owned();
        let leases = &mut self.checkup.leases;
        self.checkup.lost.retain(|address| {
            let owner = lost_owner(*address);
            let facts = Facts { boot: boot.clone(), ..Facts::default() };
            let record = Record { owner, leases: vec![Lease::foreign(*address)], facts };
            leases.add(Arc::new(record)).is_ok()
        });
    }
}
