//! The journal: one file to which every change is appended, and synced, before it counts.
//!
//! All integers are little-endian. The file is a header and frames.
//!
//! | header | bytes | |
//! |---|---|---|
//! | magic | 8 | `WEFTIPAM` |
//! | version | 4 | [`VERSION`]; an older one is read and written anew, any other is refused |
//! | zero | 4 | |
//! | base | 8 | length in bytes of header and the frames that a compaction wrote |
//! | first | 8 | number of the first frame |
//! | check | 4 | CRC-32 (IEEE) of the 32 bytes before |
//!
//! | frame | bytes | |
//! |---|---|---|
//! | magic | 4 | `wfrm` |
//! | length | 4 | length of the payload in bytes, at most [`MAX_PAYLOAD`] |
//! | number | 8 | one more than that of the frame before |
//! | check | 4 | CRC-32 (IEEE) of length, number and payload |
//! | payload | length | see `codec` |
//!
//! **Appending.** A change, or several at once, is one frame, one write, one `fdatasync`. So at any time at most one frame, the last, is
//! not synced, and a crash can tear that one only. If the write or the sync fails, the file is cut back to where it
//! ended and that is synced; if even this fails the journal is *poisoned*: nobody can say what the disk holds, so
//! nothing is written until the file is opened, and read, again.
//!
//! **Opening.** Frames are applied up to the first that is not whole. If that one can be a torn append (it is past
//! `base`, the rest of the file is no longer than a frame can be, and no whole frame with a later number begins in
//! it) it was never acknowledged: it is cut off and reported. Everything else is damage and refused, because a lease
//! that is forgotten is an address given twice. What cannot be told apart from a torn append is rot in the very last
//! frame; hence the report, and hence `base`: what a compaction wrote was synced before it became the journal, so
//! that no damage in it passes for a torn append.
//!
//! **Compaction.** When the journal has doubled, and grown by [`COMPACT_STEP`] at least, what is true now is written
//! to a new file, synced, renamed over the journal, and the folder is synced. If that fails before the rename, the
//! old journal goes on. If the folder cannot be synced after it, the journal is poisoned: a crash might bring the old
//! file back, without what would be appended to the new one. At that moment both say the same, so nothing is lost.

use std::io;
use std::sync::Arc;

use crate::codec::{self, Op};
use crate::disk::{Disk, Which};
use crate::error::{OpenError, Recovery, StoreError};
use crate::leases::Leases;

/// The version of the file format that is written.
pub const VERSION: u32 = 2;
/// The oldest version that is read; such a journal is written anew when it is opened.
const OLDEST: u32 = 1;
/// Longest payload of a frame in bytes: one attachment with all its labels has to fit.
pub const MAX_PAYLOAD: usize = 64 << 10;
/// Longest journal in bytes that is written or read.
pub const MAX_JOURNAL: u64 = 256 << 20;
/// How much a journal grows at least, in bytes, before it is compacted.
pub const COMPACT_STEP: u64 = 1 << 20;

const MAGIC: &[u8; 8] = b"WEFTIPAM";
const FRAME_MAGIC: &[u8; 4] = b"wfrm";
pub(crate) const HEADER: usize = 36;
const FRAME_HEADER: usize = 20;
/// Checksums over at most so many bytes are computed while looking for whole frames in a tail.
const SEARCH_BUDGET: usize = 64 << 20;

/// The journal, open for appending.
pub(crate) struct Journal {
    disk: Box<dyn Disk>,
    /// Where the next frame goes; all before is durable.
    end: u64,
    next_number: u64,
    compact_at: u64,
    poisoned: Option<String>,
}

impl Journal {
    /// Reads the journal into memory, makes an empty one if there is none, and cuts off a torn append.
    pub(crate) fn open(mut disk: Box<dyn Disk>) -> Result<(Self, Leases, Option<Recovery>), OpenError> {
        let content = disk.load().map_err(OpenError::reading)?;
        let mut journal = Self { disk, end: 0, next_number: 1, compact_at: 0, poisoned: None };
        let Some(bytes) = content else {
            let leases = Leases::default();
            journal.rewrite(&leases).map_err(|(_, source)| OpenError::creating(source))?;
            return Ok((journal, leases, None));
        };
        let replay = replay(&bytes)?;
        journal.settle(&bytes, &replay).map_err(OpenError::recovering)?;
        // A left-over costs space and nothing else; the next compaction tries again.
        let _ = journal.disk.remove_next();
        journal.end = replay.end;
        journal.next_number = replay.next_number;
        journal.compact_at = compact_at(replay.base);
        if replay.version != VERSION {
            journal.rewrite(&replay.leases).map_err(|(_, source)| OpenError::recovering(source))?;
        }
        Ok((journal, replay.leases, replay.recovery))
    }

    /// Makes durable what was read, and nothing else.
    ///
    /// A process that died between write and sync leaves a whole frame, the last, that is not durable. If the sync has
    /// failed since, the kernel takes the frame for clean and no further sync writes it; so it is written once more.
    fn settle(&mut self, bytes: &[u8], replay: &Replay) -> io::Result<()> {
        self.disk.truncate(replay.end)?;
        self.disk.write(Which::Journal, replay.last, &bytes[replay.last as usize..replay.end as usize])?;
        self.disk.sync(Which::Journal)?;
        self.disk.sync_folder()
    }

    /// Appends a payload and returns when it is durable. After an error it is not in the journal.
    pub(crate) fn append(&mut self, payload: &[u8]) -> Result<(), StoreError> {
        self.writable()?;
        let mut frame = Vec::with_capacity(FRAME_HEADER + payload.len());
        put_frame(&mut frame, self.next_number, payload);
        if self.nearly_full() {
            return Err(StoreError::JournalFull { limit: MAX_JOURNAL });
        }
        let written = self.disk.write(Which::Journal, self.end, &frame);
        match written.and_then(|()| self.disk.sync(Which::Journal)) {
            Ok(()) => {
                self.end += frame.len() as u64;
                self.next_number += 1;
                Ok(())
            }
            Err(source) => {
                self.cut_back(&source);
                Err(StoreError::Io { source })
            }
        }
    }

    /// Puts a journal that holds `leases` and nothing else in the place of whatever is on the disk.
    pub(crate) fn replace(disk: Box<dyn Disk>, next_number: u64, leases: &Leases) -> io::Result<()> {
        let mut journal = Self { disk, end: 0, next_number, compact_at: 0, poisoned: None };
        journal.rewrite(leases).map_err(|(_, source)| source)
    }

    /// Whether it is time to compact.
    pub(crate) fn compaction_is_due(&self) -> bool {
        self.end >= self.compact_at && self.poisoned.is_none()
    }

    /// Replaces the journal by one that holds `leases` and nothing else.
    pub(crate) fn compact(&mut self, leases: &Leases) -> Result<(), StoreError> {
        self.writable()?;
        self.rewrite(leases).map_err(|(renamed, source)| {
            if renamed {
                self.poisoned = Some(format!("the folder could not be synced after a compaction: {source}"));
            } else {
                let _ = self.disk.remove_next();
                self.compact_at = self.end.saturating_add(COMPACT_STEP);
            }
            StoreError::Io { source }
        })
    }

    pub(crate) fn poisoned(&self) -> Option<&str> {
        self.poisoned.as_deref()
    }

    /// Whether the longest frame might not fit any more. Compaction is due long before; it must have failed.
    pub(crate) fn nearly_full(&self) -> bool {
        self.end + (FRAME_HEADER + MAX_PAYLOAD) as u64 > MAX_JOURNAL
    }

    /// Bytes in the journal.
    pub(crate) fn len(&self) -> u64 {
        self.end
    }

    fn writable(&self) -> Result<(), StoreError> {
        match &self.poisoned {
            Some(reason) => Err(StoreError::Poisoned { reason: reason.clone() }),
            None => Ok(()),
        }
    }

    fn cut_back(&mut self, why: &io::Error) {
        let cut = self.disk.truncate(self.end).and_then(|()| self.disk.sync(Which::Journal));
        if let Err(e) = cut {
            self.poisoned = Some(format!("an append failed ({why}) and could not be undone ({e})"));
        }
    }

    /// Writes header and frames to a new file and puts it in place. The error says whether it is in place.
    fn rewrite(&mut self, leases: &Leases) -> Result<(), (bool, io::Error)> {
        let disk = &mut self.disk;
        let (end, next_number) = write_next(disk.as_mut(), self.next_number, leases).map_err(|e| (false, e))?;
        disk.rename().map_err(|e| (false, e))?;
        (self.end, self.next_number, self.compact_at) = (end, next_number, compact_at(end));
        disk.sync_folder().map_err(|e| (true, e))
    }
}

fn compact_at(base: u64) -> u64 {
    base.saturating_add(base.max(COMPACT_STEP))
}

/// Writes a whole journal to [`Which::Next`] and syncs it; returns its length and the number of the next frame.
fn write_next(disk: &mut dyn Disk, first: u64, leases: &Leases) -> io::Result<(u64, u64)> {
    disk.create_next()?;
    let mut next = Next { disk, end: HEADER as u64, number: first, chunk: Vec::new() };
    next.frame(|out| codec::put_boot(out, leases.boot(), 0))?;
    for record in leases.iter() {
        next.frame(|out| codec::put_lease(out, record))?;
    }
    // After the leases, which would move the rounds.
    for (pool, set, last) in leases.rounds() {
        next.frame(|out| codec::put_round(out, pool, set, last))?;
    }
    // After the leases, whose addresses do not rest.
    for (pool, address, since) in leases.resting() {
        next.frame(|out| codec::put_rest(out, pool, address, since))?;
    }
    next.write_out()?;
    next.disk.write(Which::Next, 0, &header(next.end, first))?;
    next.disk.sync(Which::Next)?;
    Ok((next.end, next.number))
}

/// A journal in the making: frames are collected and written in chunks.
struct Next<'a> {
    disk: &'a mut dyn Disk,
    end: u64,
    number: u64,
    chunk: Vec<u8>,
}

impl Next<'_> {
    fn frame(&mut self, put: impl FnOnce(&mut Vec<u8>)) -> io::Result<()> {
        const CHUNK: usize = 256 << 10;
        let mut payload = Vec::new();
        put(&mut payload);
        put_frame(&mut self.chunk, self.number, &payload);
        self.number += 1;
        if self.chunk.len() < CHUNK { Ok(()) } else { self.write_out() }
    }

    fn write_out(&mut self) -> io::Result<()> {
        self.disk.write(Which::Next, self.end, &self.chunk)?;
        self.end += self.chunk.len() as u64;
        self.chunk.clear();
        Ok(())
    }
}

fn header(base: u64, first: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER);
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
    out.extend([0; 4]);
    out.extend(base.to_le_bytes());
    out.extend(first.to_le_bytes());
    out.extend(crc32fast::hash(&out).to_le_bytes());
    out
}

fn put_frame(out: &mut Vec<u8>, number: u64, payload: &[u8]) {
    out.extend(FRAME_MAGIC);
    let (length, number) = ((payload.len() as u32).to_le_bytes(), number.to_le_bytes());
    out.extend(length);
    out.extend(number);
    out.extend(frame_check(&length, &number, payload).to_le_bytes());
    out.extend(payload);
}

fn frame_check(length: &[u8], number: &[u8], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    for part in [length, number, payload] {
        hasher.update(part);
    }
    hasher.finalize()
}

/// How long the frame at the start of `bytes` says it is, if anything there looks like one.
pub(crate) fn claimed_length(bytes: &[u8]) -> Option<usize> {
    let header: &[u8; FRAME_HEADER] = bytes.first_chunk()?;
    let length = u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize;
    (header[..4] == *FRAME_MAGIC && length <= MAX_PAYLOAD).then_some(FRAME_HEADER + length)
}

/// What a journal says.
pub(crate) struct Replay {
    pub(crate) leases: Leases,
    /// What was passed over at the end.
    pub(crate) recovery: Option<Recovery>,
    /// Where the last frame begins and where it ends.
    last: u64,
    end: u64,
    base: u64,
    next_number: u64,
    version: u32,
    first: u64,
}

impl Replay {
    /// How many frames there are.
    pub(crate) fn frames(&self) -> u64 {
        self.next_number - self.first
    }
}

/// Reads a whole journal.
pub(crate) fn replay(bytes: &[u8]) -> Result<Replay, OpenError> {
    let (version, base, first) = parse_header(bytes)?;
    let mut number = first;
    let mut leases = Leases::default();
    let (mut last, mut at) = (HEADER, HEADER);
    while at < bytes.len() {
        let Some((payload, length)) = frame_at(&bytes[at..], |n| n == number) else { break };
        let offset = at as u64;
        let damaged = |what| OpenError::Damaged { offset, what };
        for op in codec::parse(payload).map_err(damaged)? {
            apply(&mut leases, op).map_err(damaged)?;
        }
        last = at;
        at += length;
        number = number.checked_add(1).ok_or(damaged("the frames are numbered to the end"))?;
        if offset < base && base < at as u64 {
            return Err(damaged("a frame crosses the end of the compacted part"));
        }
    }
    if (at as u64) < base {
        return Err(OpenError::Damaged { offset: at as u64, what: "a frame of the compacted part is not whole" });
    }
    let recovery = (at < bytes.len()).then(|| torn(bytes, at, number)).transpose()?;
    Ok(Replay { leases, recovery, last: last as u64, end: at as u64, base, next_number: number, version, first })
}

/// Version, end of the compacted part, number of the first frame.
pub(crate) fn parse_header(bytes: &[u8]) -> Result<(u32, u64, u64), OpenError> {
    let damaged = |what| OpenError::Damaged { offset: 0, what };
    let header: &[u8; HEADER] = bytes.first_chunk().ok_or(damaged("the file is shorter than its header"))?;
    if &header[..8] != MAGIC {
        return Err(damaged("this is not a lease journal"));
    }
    let u32_at = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
    if crc32fast::hash(&header[..HEADER - 4]) != u32_at(HEADER - 4) {
        return Err(damaged("the header's checksum is wrong"));
    }
    let version = u32_at(8);
    if !(OLDEST..=VERSION).contains(&version) {
        return Err(OpenError::Version { found: version });
    }
    Ok((version, u64_at(16), u64_at(24)))
}

/// The payload and whole length of the frame at the start of `bytes`, if it is whole and its number is `wanted`.
pub(crate) fn frame_at(bytes: &[u8], wanted: impl FnOnce(u64) -> bool) -> Option<(&[u8], usize)> {
    let (header, rest) = bytes.split_first_chunk::<FRAME_HEADER>()?;
    let (magic, length) = (&header[..4], &header[4..8]);
    let (number, check) = (&header[8..16], &header[16..]);
    let size = u32::from_le_bytes(length.try_into().ok()?) as usize;
    if magic != FRAME_MAGIC || size > MAX_PAYLOAD || !wanted(u64::from_le_bytes(number.try_into().ok()?)) {
        return None;
    }
    let payload = rest.get(..size)?;
    (frame_check(length, number, payload).to_le_bytes() == check).then_some((payload, FRAME_HEADER + size))
}

fn apply(leases: &mut Leases, op: Op) -> Result<(), &'static str> {
    match op {
        Op::Lease(record) => leases.add(Arc::new(*record)),
        Op::Release { owner, since } => {
            let record = leases.remove(&owner).ok_or("an attachment is released that has no lease")?;
            leases.lay_to_rest(&record, since);
            Ok(())
        }
        Op::Boot { id, now } => {
            leases.begin_boot(&id, now);
            Ok(())
        }
        Op::Rest { pool, address, since } => {
            leases.rest(&pool, address, since);
            Ok(())
        }
        Op::Round { pool, set, last } => {
            leases.set_round(&pool, set, last);
            Ok(())
        }
    }
}

/// Whether what begins at `at` can be a torn append; refuses it as damage if not.
fn torn(bytes: &[u8], at: usize, number: u64) -> Result<Recovery, OpenError> {
    let damaged = |what| OpenError::Damaged { offset: at as u64, what };
    let tail = &bytes[at..];
    if tail.len() > FRAME_HEADER + MAX_PAYLOAD {
        return Err(damaged("a frame is not whole, and more follows than an append can leave"));
    }
    let mut budget = SEARCH_BUDGET;
    for start in 0..tail.len() {
        if !tail[start..].starts_with(FRAME_MAGIC) {
            continue;
        }
        budget = budget
            .checked_sub(tail.len() - start)
            .ok_or(damaged("a frame is not whole, and what follows it is not one append"))?;
        if frame_at(&tail[start..], |n| n >= number).is_some() {
            return Err(damaged("a frame is not whole, and whole ones follow it"));
        }
    }
    Ok(Recovery { offset: at as u64, bytes: tail.len() as u64 })
}
