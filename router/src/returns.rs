//! Which conversations came in by the host port, so that what is said in reply goes back by it.
//!
//! The node's kernel translates addresses in both directions: a pod that calls a service's address is led to another pod by way of the
//! kernel, and that pod's reply, which is addressed to the first one, has to take the same way back, or the first pod would
//! hear from somebody it never spoke to. So a conversation that the host port brought is remembered, by the five-tuple of its
//! opening direction, wherever its replies would not come back to the host port by themselves.
//!
//! The table has a fixed size. An entry is a fingerprint of the five-tuple, made with a secret, and beside it when it was used
//! last; so it is read and written without locks by all workers. The fingerprint and the bucket have about 60 bits between them
//! that outsiders cannot choose. A full bucket gives up what is too old, else one whose opening was seen once and nothing more, else the
//! one not used for longest: a flood of new connections displaces itself. How long an entry is kept without frames is, for each
//! protocol, what the kernel's own connection tracking does, or longer.
//!
//! The flow cache rests on this table. TCP connections begin with a SYN, which is never forwarded from the cache, so they need no
//! more. For the others [`Returns::version`] grows whenever an entry comes or goes that is not TCP's.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::time::Duration;

use crossbeam::utils::CachePadded;
use weft_encap::ip;
use zerocopy::FromZeros;

use crate::flow::{FlowKey, Seed};
use crate::time::Instant;

/// Entries of a bucket: their fingerprints fill one cache line, their times the next.
const WAYS: usize = 8;
/// Words of a bucket.
const BUCKET: usize = 2 * WAYS;
/// Times are written only when they have grown by this, so that busy entries are read by all workers and written by none.
const FRESH: u32 = 4;

/// What is said of an entry, beside the seconds.
const CONFIRMED: u64 = 1 << 32;
const PROTOCOL: u32 = 40;

/// The table. See the module's essay.
pub struct Returns {
    cells: Vec<AtomicU64>,
    buckets: usize,
    seed: Seed,
    version: CachePadded<AtomicU64>,
    occupied: AtomicUsize,
    evicted: AtomicU64,
}

/// How full the table is.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct ReturnsUse {
    /// Conversations that are remembered.
    pub entries: usize,
    /// How many there can be.
    pub limit: usize,
    /// How many were forgotten before their time, to make room.
    pub evicted: u64,
}

impl Returns {
    /// Room for `limit` conversations, rounded up to a power of two. Memory is touched only when used. `seed` keeps outsiders from
    /// choosing bucket and fingerprint.
    pub fn new(limit: usize, seed: u64) -> Returns {
        let buckets = limit.div_ceil(WAYS).next_power_of_two();
        let cells = AtomicU64::new_vec_zeroed(buckets * BUCKET).expect("the limit fits into memory");
        // Another one than the flow cache's, whose hash shows in the tunnel's source ports.
        let seed = Seed::new(seed.rotate_left(32) ^ 0x7265_7475_726e_7321);
        let version = CachePadded::default();
        Returns { cells, buckets, seed, version, occupied: AtomicUsize::new(0), evicted: AtomicU64::new(0) }
    }

    /// Grows whenever an entry of another protocol than TCP comes or goes. To be read before [`Returns::holds`], so that a change between
    /// the two is noticed.
    #[inline(always)]
    pub fn version(&self) -> u32 {
        self.version.load(Acquire) as u32
    }

    /// Whether there is nothing to be found.
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.occupied.load(Acquire) == 0
    }

    /// Whether the conversation that this flow opened came in by the host port.
    pub fn holds(&self, opening: &FlowKey, now: Instant) -> bool {
        !self.is_empty() && self.find(opening, now).is_some()
    }

    /// A frame of the opening direction came in by the host port; `first` if it was one that opens a connection.
    pub fn open(&self, opening: &FlowKey, first: bool, now: Instant) {
        let (bucket, print) = self.place(opening);
        match self.slot_of(bucket, print) {
            Some(slot) => self.touch(slot, !first, now),
            None => self.enter(bucket, print, opening.protocol(), now),
        }
    }

    /// Some frame of the conversation passed, in whichever direction.
    pub fn keep(&self, opening: &FlowKey, now: Instant) {
        let (bucket, print) = self.place(opening);
        if let Some(slot) = self.slot_of(bucket, print) {
            self.touch(slot, true, now);
        }
    }

    /// The conversation began anew, and not by the host port.
    pub fn close(&self, opening: &FlowKey) {
        let (bucket, print) = self.place(opening);
        let Some(slot) = self.slot_of(bucket, print) else { return };
        if self.cells[slot].compare_exchange(print, 0, Release, Relaxed).is_ok() {
            self.occupied.fetch_sub(1, Release);
            self.changed(opening.protocol());
        }
    }

    /// How full it is. Entries that are too old count until their place is needed.
    pub fn usage(&self) -> ReturnsUse {
        let (entries, evicted) = (self.occupied.load(Relaxed), self.evicted.load(Relaxed));
        ReturnsUse { entries, limit: self.buckets * WAYS, evicted }
    }

    fn find(&self, opening: &FlowKey, now: Instant) -> Option<usize> {
        let (bucket, print) = self.place(opening);
        self.slot_of(bucket, print).filter(|slot| !is_old(self.time(*slot), now))
    }

    /// The first cell of its bucket, and its fingerprint, which is never zero.
    fn place(&self, opening: &FlowKey) -> (usize, u64) {
        let hash = opening.hash(&self.seed);
        ((hash as usize & (self.buckets - 1)) * BUCKET, hash | 1 << 63)
    }

    fn slot_of(&self, bucket: usize, print: u64) -> Option<usize> {
        (bucket..bucket + WAYS).find(|slot| self.cells[*slot].load(Acquire) == print)
    }

    fn time(&self, slot: usize) -> u64 {
        self.cells[slot + WAYS].load(Acquire)
    }

    fn touch(&self, slot: usize, confirmed: bool, now: Instant) {
        let old = self.time(slot);
        let confirmed = old & CONFIRMED != 0 || confirmed;
        let stale = now.seconds().saturating_sub(old as u32) >= FRESH || confirmed != (old & CONFIRMED != 0);
        if stale {
            let kept = old & !u64::from(u32::MAX) & !CONFIRMED;
            let time = kept | u64::from(now.seconds()) | if confirmed { CONFIRMED } else { 0 };
            self.cells[slot + WAYS].store(time, Release);
        }
    }

    /// In place of what is worth least. Another worker may take the same place at the same time: then one of the two is forgotten, and
    /// entered again with its next frame.
    fn enter(&self, bucket: usize, print: u64, protocol: u8, now: Instant) {
        let rank = |slot: &usize| {
            let time = self.time(*slot);
            match self.cells[*slot].load(Acquire) {
                0 => (0, 0),
                _ if is_old(time, now) => (1, 0),
                _ => (2 + u8::from(time & CONFIRMED != 0), time as u32),
            }
        };
        let slot = (bucket..bucket + WAYS).min_by_key(rank).expect("a bucket has entries");
        match rank(&slot) {
            (0, _) => drop(self.occupied.fetch_add(1, Release)),
            (1, _) => {}
            _ => drop(self.evicted.fetch_add(1, Relaxed)),
        }
        self.cells[slot + WAYS].store(u64::from(now.seconds()) | u64::from(protocol) << PROTOCOL, Release);
        self.cells[slot].store(print, Release);
        self.changed(protocol);
    }

    fn changed(&self, protocol: u8) {
        if protocol != ip::TCP {
            self.version.fetch_add(1, Release);
        }
    }
}

/// Whether an entry is of no more use. The kernel's defaults: five days for established TCP connections, two minutes for UDP, half a minute for
/// pings, ten minutes for the rest (nf_conntrack_*_timeout).
fn is_old(time: u64, now: Instant) -> bool {
    let limit = match (time >> PROTOCOL) as u8 {
        ip::TCP if time & CONFIRMED == 0 => Duration::from_secs(180),
        ip::TCP => Duration::from_secs(5 * 86_400),
        ip::UDP => Duration::from_secs(180),
        ip::ICMP | ip::ICMPV6 => Duration::from_secs(60),
        _ => Duration::from_secs(600),
    };
    u64::from(now.seconds().saturating_sub(time as u32)) > limit.as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::Quote;

    const START: Instant = Instant(1_000_000_000_000);

    fn key(number: u32, protocol: u8) -> FlowKey {
        let [_, _, c, d] = number.to_be_bytes();
        let quote = Quote {
            src: [10, 244, c, d].into(),
            dst: [10, 244, 200, 9].into(),
            protocol,
            ports: Some((1000 + number as u16, 80)),
        };
        FlowKey::of_quote(&quote)
    }

    fn later(seconds: u64) -> Instant {
        START + Duration::from_secs(seconds)
    }

    #[test]
    fn a_conversation_is_known_until_it_is_closed() {
        let returns = Returns::new(64, 1);
        let (first, second) = (key(1, ip::TCP), key(2, ip::TCP));
        assert!(returns.is_empty() && !returns.holds(&first, START));
        returns.open(&first, true, START);
        assert!(returns.holds(&first, START) && !returns.holds(&second, START));
        assert!(!returns.holds(&first.reversed(), START), "the opening direction is what counts");
        returns.close(&second);
        returns.close(&first);
        assert!(returns.is_empty() && !returns.holds(&first, START));
        assert_eq!(returns.usage(), ReturnsUse { entries: 0, limit: 64, evicted: 0 });
    }

    #[test]
    fn it_is_forgotten_in_its_protocols_time_unless_it_is_kept() {
        let returns = Returns::new(64, 1);
        for (protocol, seconds) in [(ip::UDP, 180), (ip::ICMP, 60), (132, 600)] {
            let key = key(1, protocol);
            returns.open(&key, true, START);
            assert!(returns.holds(&key, later(seconds)) && !returns.holds(&key, later(seconds + 1)), "{protocol}");
            returns.keep(&key, later(seconds));
            assert!(returns.holds(&key, later(2 * seconds)), "{protocol}");
        }
        let key = key(1, ip::TCP);
        returns.open(&key, true, START);
        assert!(!returns.holds(&key, later(181)), "nobody answered");
        returns.keep(&key, later(1));
        assert!(returns.holds(&key, later(86_400)));
    }

    #[test]
    fn a_flood_of_openings_displaces_itself_and_not_what_is_established() {
        let returns = Returns::new(1024, 1);
        let established: Vec<FlowKey> = (0..256).map(|number| key(number, ip::TCP)).collect();
        for key in &established {
            returns.open(key, true, START);
            returns.keep(key, later(1));
        }
        (1000..30_000).for_each(|number| returns.open(&key(number, ip::TCP), true, later(2)));
        let kept = established.iter().filter(|key| returns.holds(key, later(3))).count();
        // Only where a bucket holds more than its entries in established ones is any of them lost.
        assert_eq!(kept, established.len());
        let usage = returns.usage();
        assert_eq!((usage.entries, usage.limit), (1024, 1024));
        assert!(usage.evicted > 20_000, "{usage:?}");
    }

    #[test]
    fn the_version_grows_with_what_the_flow_cache_cannot_see_by_itself() {
        let returns = Returns::new(64, 1);
        let version = returns.version();
        returns.open(&key(1, ip::TCP), true, START);
        assert_eq!(returns.version(), version);
        returns.open(&key(1, ip::UDP), true, START);
        let opened = returns.version();
        assert_ne!(opened, version);
        returns.open(&key(1, ip::UDP), true, later(1));
        assert_eq!(returns.version(), opened, "it was known");
        returns.close(&key(1, ip::UDP));
        assert_ne!(returns.version(), opened);
    }
}
