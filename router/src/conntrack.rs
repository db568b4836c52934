//! The flow cache: the path that the first packet of a flow was given.
//!
//! A table of fixed size, in buckets of [`WAYS`] entries of plain data without pointers, so that it can live in shared
//! memory and outlive the process. A full bucket gives up its least recently used entry: a full table never stops
//! forwarding, for a flow without an entry is merely decided anew.
//!
//! An entry holds as long as the tables' epoch in which it was made, and, if its path rests on a learned MAC, as
//! long as that MAC stays where it was (its generation in the FDB). Whatever the decision rests on
//! is part of the key: who sent the frame and to which MAC it is addressed, beside the five-tuple.

use std::hash::BuildHasher;
use std::time::Duration;

use foldhash::fast::FixedState;
use weft_encap::mac::Mac;

use crate::flow::FlowKey;
use crate::path::{Sender, Verdict};
use crate::time::Instant;

/// Entries of a bucket.
pub const WAYS: usize = 8;

/// How long a flow without frames is still shown to people.
const RECENT: Duration = Duration::from_secs(120);

/// One flow, for people.
#[derive(Copy, Clone, Debug)]
pub struct FlowEntry {
    /// The five-tuple.
    pub key: FlowKey,
    /// What was decided.
    pub verdict: Verdict,
    /// Frames that went this way.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
    /// When the last one did.
    pub last_seen: Instant,
}

/// What a look-up found.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// The entry in this slot; the caller still asks the FDB whether `learned` holds.
    Hit(usize, Verdict),
    /// Nothing, or nothing that still holds.
    Miss,
}

/// The cache.
pub struct ConnTrack {
    entries: Box<[Option<FlowEntry>]>,
    hasher: FixedState,
}

impl ConnTrack {
    /// Room for `entries` flows, rounded up to a power of two. `seed` keeps outsiders from choosing the bucket.
    pub fn new(entries: usize, seed: u64) -> ConnTrack {
        let size = entries.max(WAYS).next_power_of_two();
        ConnTrack { entries: vec![None; size].into_boxed_slice(), hasher: FixedState::with_seed(seed) }
    }

    /// A hash of the flow: picks the bucket, and gives the tunnel's outer source port.
    pub fn hash(&self, key: &FlowKey) -> u64 {
        self.hasher.hash_one(key)
    }

    /// Looks a flow up. `hash` is [`ConnTrack::hash`] of the key.
    pub fn find(&self, key: &FlowKey, hash: u64, sender: Sender, addressed_to: Mac, epoch: u64) -> Found {
        let first = self.bucket(hash);
        for slot in first..first + WAYS {
            if let Some(entry) = &self.entries[slot]
                && entry.key == *key
                && entry.verdict.sender == sender
                && entry.verdict.addressed_to == addressed_to
            {
                return if entry.verdict.epoch == epoch { Found::Hit(slot, entry.verdict) } else { Found::Miss };
            }
        }
        Found::Miss
    }

    /// A frame of a known flow went its way.
    pub fn seen(&mut self, slot: usize, bytes: usize, now: Instant) {
        if let Some(entry) = &mut self.entries[slot] {
            entry.frames += 1;
            entry.bytes += bytes as u64;
            entry.last_seen = now;
        }
    }

    /// Enters a flow, in place of its stale entry if there is one, else of the bucket's least recently used.
    pub fn open(&mut self, key: FlowKey, verdict: Verdict, bytes: usize, now: Instant) {
        let first = self.bucket(self.hash(&key));
        let bucket = &mut self.entries[first..first + WAYS];
        let same = |entry: &FlowEntry| {
            entry.key == key
                && entry.verdict.sender == verdict.sender
                && entry.verdict.addressed_to == verdict.addressed_to
        };
        let rank = |entry: &Option<FlowEntry>| match entry {
            Some(entry) if same(entry) => (0, Instant(0)),
            None => (1, Instant(0)),
            Some(entry) => (2, entry.last_seen),
        };
        let slot = bucket.iter_mut().min_by_key(|entry| rank(entry)).expect("a bucket has entries");
        let (frames, total) = match slot {
            Some(entry) if same(entry) => (entry.frames, entry.bytes),
            _ => (0, 0),
        };
        *slot = Some(FlowEntry { key, verdict, frames: frames + 1, bytes: total + bytes as u64, last_seen: now });
    }

    /// The flows that were seen lately.
    pub fn entries(&self, now: Instant) -> impl Iterator<Item = &FlowEntry> {
        self.entries.iter().flatten().filter(move |entry| now.since(entry.last_seen) < RECENT)
    }

    fn bucket(&self, hash: u64) -> usize {
        (hash as usize & (self.entries.len() - 1)) & !(WAYS - 1)
    }
}
