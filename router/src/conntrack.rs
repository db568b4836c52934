//! The flow cache: the path that the first packet of a flow was given.
//!
//! A table of fixed size, in buckets of [`WAYS`] entries of plain data without pointers, so that it can live in shared
//! memory and outlive the process. A full bucket gives up its least recently used entry: a full table never stops
//! forwarding, for a flow without an entry is merely decided anew.
//!
//! An entry is two cache lines: what a frame is compared with, and what becomes of it. It holds as long as the tables' epoch in which it was
//! made, and, if its path rests on a learned MAC, as long as that MAC stays where it was. The FDB's version answers that
//! for all MACs at once; only when it has grown is the FDB itself asked.

use std::time::Duration;

use weft_encap::ip;
use weft_encap::mac::Mac;
use zerocopy::{FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::flow::{FlowKey, Seed, Signature};
use crate::frame::{Lazy, prefetch};
use crate::path::{Handle, Hop, Learned, Macs, Path, Rewrite, Sender, Side, Tie, Translation, Verdict};
use crate::port::PortId;
use crate::tables::NodeId;
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
    /// Who sends.
    pub sender: Sender,
    /// What was decided.
    pub verdict: Verdict,
    /// Frames that went this way.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
    /// When the last one did.
    pub last_seen: Instant,
}

/// One flow, as it lies in the table.
#[derive(Copy, Clone, Debug, FromZeros, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(64))]
pub struct Entry {
    signature: Signature,
    epoch: u32,
    /// The version of what the host port brought, under which this was last found to hold.
    returns_version: u32,
    frames: u64,
    bytes: u64,
    last_seen: u64,
    /// The FDB's version under which this was last found to hold.
    fdb_version: u64,
    /// The learned MAC that the path rests on, as the FDB has it; or when the FDB was last told where the sender is.
    learned: u64,
    /// Its place in the FDB.
    learned_slot: u32,
    mtu: u32,
    dst_mac: [u8; 6],
    src_mac: [u8; 6],
    hop: u16,
    flags: u16,
}

const _: () = assert!(size_of::<Entry>() == 128);

/// The path leads to a node; otherwise to a port.
const TO_NODE: u16 = 1;
/// The packet is routed: MACs and TTL change.
const ROUTED: u16 = 2;
/// The path rests on a learned MAC.
const RESTS: u16 = 4;
/// Its frames teach the FDB where their source MAC is.
const TEACHES: u16 = 8;
/// The host port brought it, and its replies go back by it.
const BROUGHT: u16 = 16;
/// It is such a reply.
const RETURNS: u16 = 32;
/// Its source is translated, as a session of the table of those says whose place and version stand where a learned MAC would.
const SOURCE: u16 = 128;
/// Its destination is, likewise.
const DESTINATION: u16 = 256;
/// It holds as long as the host port brings nothing of its conversation that was not known, nor that is forgotten.
const WATCHES: u16 = 64;

/// What ties a flow to the host port is told to the table of those about every eight seconds: 2^33 ns.
const KEEP_EACH: u32 = 33;

/// Where frames of a known flow go.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum To {
    /// A port.
    Port(PortId),
    /// A node, through the tunnel.
    Node(NodeId),
}

impl Entry {
    /// Whether it was decided by tables of this epoch.
    #[inline(always)]
    pub fn is_of(&self, epoch: u64) -> bool {
        self.epoch == epoch as u32
    }

    /// What it has to do with the host port.
    pub fn tie(&self) -> Tie {
        match self.flags & (BROUGHT | RETURNS | WATCHES) {
            0 => Tie::None,
            WATCHES => Tie::Free,
            tie if tie & BROUGHT != 0 => Tie::Brought,
            _ => Tie::Returns,
        }
    }

    /// Whether what came by the host port has to be asked, or told, before another frame goes this way. `version` is what that has now.
    #[inline(always)]
    pub fn asks(&self, version: impl FnOnce() -> u32, now: Instant) -> bool {
        if self.flags & (BROUGHT | RETURNS | WATCHES) == 0 {
            return false;
        }
        let due = self.flags & (BROUGHT | RETURNS) != 0 && (self.last_seen ^ now.0) >> KEEP_EACH != 0;
        due || (self.flags & WATCHES != 0 && self.returns_version != version())
    }

    /// Notes that it holds under this version of what the host port brought.
    pub fn tied(&mut self, version: u32) {
        self.returns_version = version;
    }

    /// Where its frames go.
    #[inline(always)]
    pub fn to(&self) -> To {
        if self.flags & TO_NODE == 0 { To::Port(PortId(self.hop)) } else { To::Node(NodeId(self.hop)) }
    }

    /// Whether its packets are routed.
    #[inline(always)]
    pub fn is_routed(&self) -> bool {
        self.flags & ROUTED != 0
    }

    /// Destination and source MAC to be written, if its packets are routed.
    #[inline(always)]
    pub fn routed(&self) -> Option<Macs> {
        (self.flags & ROUTED != 0).then_some(Macs { dst: Mac(self.dst_mac), src: Mac(self.src_mac) })
    }

    /// Largest packet in bytes, L3 header included, that may go this way.
    #[inline(always)]
    pub fn mtu(&self) -> u32 {
        self.mtu
    }

    /// The learned MAC that its path rests on.
    #[inline(always)]
    pub fn learned(&self) -> Option<Learned> {
        let To::Node(node) = self.to() else { return None };
        (self.flags & RESTS != 0).then_some(Learned { node, slot: self.learned_slot, word: self.learned })
    }

    /// Whether its path rests on a learned MAC.
    #[inline(always)]
    pub fn rests(&self) -> bool {
        self.flags & RESTS != 0
    }

    /// When the FDB was last told where the sender's MAC is, if its frames teach that.
    pub fn taught(&self) -> Option<Instant> {
        (self.flags & TEACHES != 0).then_some(Instant(self.learned))
    }

    /// Notes that the FDB has been told.
    pub fn teach(&mut self, now: Instant) {
        self.learned = now.0;
    }

    /// The FDB's version under which it was last found to hold.
    pub fn fdb_version(&self) -> u64 {
        self.fdb_version
    }

    /// Notes that it holds under this version of the FDB.
    pub fn confirm(&mut self, fdb_version: u64) {
        self.fdb_version = fdb_version;
    }

    /// The protocol of its packets.
    #[inline(always)]
    pub fn protocol(&self) -> u8 {
        self.signature.protocol()
    }

    /// The session by which its packets are translated, and which side of them.
    #[inline(always)]
    pub fn translated(&self) -> Option<(Handle, Side)> {
        if self.flags & (SOURCE | DESTINATION) == 0 {
            return None;
        }
        let side = if self.flags & SOURCE != 0 { Side::Source } else { Side::Destination };
        Some((Handle { slot: self.learned_slot, version: self.learned as u32 }, side))
    }

    /// A frame went this way.
    #[inline(always)]
    pub fn seen(&mut self, bytes: usize, now: Instant) {
        self.frames += 1;
        self.bytes += bytes as u64;
        self.last_seen = now.0;
    }

    /// The path, with the flow's hash for the outer source port.
    fn path(&self, hash: u64) -> Path {
        let hop = match self.to() {
            To::Port(port) => Hop::Port(port),
            To::Node(node) => Hop::Node(node),
        };
        Path { hop, rewrite: Rewrite { routed: self.routed(), ..Rewrite::bridged(self.mtu) }, entropy: entropy(hash) }
    }

    fn is_empty(&self) -> bool {
        self.frames == 0
    }
}

/// Which of the tunnel's outer source ports a flow has.
pub fn entropy(hash: u64) -> u16 {
    (hash >> 48) as u16
}

/// The cache.
pub struct ConnTrack {
    entries: Lazy<Entry>,
    seed: Seed,
}

impl ConnTrack {
    /// Room for `entries` flows, rounded up to a power of two. Memory is touched only when used. `seed` keeps outsiders from
    /// choosing the bucket.
    pub fn new(entries: usize, seed: u64) -> ConnTrack {
        let size = entries.max(WAYS).next_power_of_two();
        ConnTrack { entries: Lazy::zeroed(size), seed: Seed::new(seed) }
    }

    /// What makes this table's hashes.
    #[inline(always)]
    pub fn seed(&self) -> &Seed {
        &self.seed
    }

    /// A hash of the flow: picks the bucket, and gives the tunnel's outer source port.
    #[inline(always)]
    pub fn hash(&self, signature: &Signature) -> u64 {
        signature.hash(&self.seed)
    }

    /// The slot of a flow, whether or not it still holds. `hash` is [`ConnTrack::hash`] of the signature.
    #[inline(always)]
    pub fn find(&self, signature: &Signature, hash: u64) -> Option<usize> {
        let first = self.bucket(hash);
        (first..first + WAYS).find(|slot| self.entries[*slot].signature == *signature)
    }

    /// The entry in a slot that [`ConnTrack::find`] gave.
    #[inline(always)]
    pub fn entry(&self, slot: usize) -> &Entry {
        &self.entries[slot]
    }

    /// The same, to be changed.
    #[inline(always)]
    pub fn entry_mut(&mut self, slot: usize) -> &mut Entry {
        &mut self.entries[slot]
    }

    /// The path of the flow in a slot.
    pub fn path(&self, slot: usize, hash: u64) -> Path {
        self.entries[slot].path(hash)
    }

    /// Has the entry fetched that a flow is most likely in.
    #[inline(always)]
    pub fn prefetch(&self, hash: u64) {
        let first = &self.entries[self.bucket(hash)];
        prefetch(&first.signature);
        prefetch(&first.learned);
    }

    /// Enters a flow, in place of its stale entry if there is one, else of the bucket's least recently used. Only a path to a port
    /// or a node can be remembered.
    pub fn open(&mut self, signature: Signature, hash: u64, verdict: &Verdict, bytes: usize, now: Instant) {
        let Some(mut new) = entry_of(signature, verdict, now) else { return };
        let first = self.bucket(hash);
        let bucket = &mut self.entries[first..first + WAYS];
        let rank = |entry: &Entry| match entry {
            entry if entry.signature == signature => (0, 0),
            entry if entry.is_empty() => (1, 0),
            entry => (2, entry.last_seen),
        };
        let slot = bucket.iter_mut().min_by_key(|entry| rank(entry)).expect("a bucket has entries");
        if slot.signature == signature {
            (new.frames, new.bytes) = (slot.frames, slot.bytes);
        }
        new.seen(bytes, now);
        *slot = new;
    }

    /// The flows that were seen lately.
    pub fn entries(&self, now: Instant) -> impl Iterator<Item = FlowEntry> {
        let recent = self.entries.iter().filter(|entry| !entry.is_empty());
        let recent = recent.filter(move |entry| now.since(Instant(entry.last_seen)) < RECENT);
        recent.map(|entry| {
            let signature = entry.signature;
            let verdict = Verdict {
                path: entry.path(self.hash(&signature)),
                learned: entry.learned(),
                teaches: entry.taught().is_some(),
                epoch: entry.epoch.into(),
                fdb_version: entry.fdb_version,
                tie: entry.tie(),
                returns_version: entry.returns_version,
            };
            let Entry { frames, bytes, last_seen, .. } = *entry;
            let (key, sender) = (signature.flow(), signature.sender());
            FlowEntry { key, sender, verdict, frames, bytes, last_seen: Instant(last_seen) }
        })
    }

    #[inline(always)]
    fn bucket(&self, hash: u64) -> usize {
        (hash as usize & (self.entries.len() - 1)) & !(WAYS - 1)
    }
}

/// An entry that no frame has used; `None` for a path that is decided anew each time.
fn entry_of(signature: Signature, verdict: &Verdict, now: Instant) -> Option<Entry> {
    let (hop, to) = match verdict.path.hop {
        Hop::Port(port) => (port.0, 0),
        Hop::Node(node) => (node.0, TO_NODE),
        Hop::Flood { .. } | Hop::Reply(_) | Hop::Gateway | Hop::Probe => return None,
    };
    let macs = verdict.path.rewrite.routed;
    let mut entry = Entry {
        signature,
        epoch: verdict.epoch as u32,
        returns_version: verdict.returns_version,
        fdb_version: verdict.fdb_version,
        mtu: verdict.path.rewrite.mtu,
        hop,
        flags: to,
        ..Entry::new_zeroed()
    };
    if let Some(macs) = macs {
        entry.flags |= ROUTED;
        (entry.dst_mac, entry.src_mac) = (macs.dst.0, macs.src.0);
    }
    entry.flags |= match verdict.tie {
        Tie::None => 0,
        Tie::Brought => BROUGHT,
        Tie::Returns => RETURNS,
        Tie::Free => WATCHES,
    };
    // A TCP connection begins with a SYN, which is decided anew each time.
    if verdict.tie != Tie::None && signature.flow().protocol() != ip::TCP {
        entry.flags |= WATCHES;
    }
    match verdict.learned {
        // What is translated is routed, by no learned MAC.
        _ if let Some(Translation { side, handle, .. }) = verdict.path.rewrite.translation => {
            entry.flags |= if side == Side::Source { SOURCE } else { DESTINATION };
            (entry.learned, entry.learned_slot) = (handle.version.into(), handle.slot);
        }
        Some(learned) => {
            entry.flags |= RESTS;
            (entry.learned, entry.learned_slot) = (learned.word, learned.slot);
        }
        None if verdict.teaches => {
            entry.flags |= TEACHES;
            entry.teach(now);
        }
        None => {}
    }
    Some(entry)
}
