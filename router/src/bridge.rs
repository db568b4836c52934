//! L2: which node has a MAC.
//!
//! The forwarding database (FDB) learns the source MAC of each accepted frame that came through the tunnel. MACs of local pods and
//! of the gateway are static: they stand in the tables, are never learned, and never move to the
//! tunnel. A learned MAC is forgotten after a time without frames. The FDB holds a fixed number of entries; when
//! there is no room, a new MAC takes the place of the least recently seen of a few candidates, so that a flood of
//! made-up MACs costs the same as any other frame.
//!
//! All workers share one FDB, without locks. An entry is one word, the MAC and its node, so that it is read and replaced
//! as a whole; when it was seen stands beside it. A MAC has a few slots, which are always looked at in the same order,
//! and the first one that holds it counts. What may happen at once:
//!
//! * Two workers enter one MAC. Each looks again after it has written, and whoever sees both clears the later slot; as the
//!   writes have one order for all (`SeqCst`), at least one sees both.
//! * A MAC is seen while its slot is given away. The time lands on the successor, which is as new as that.
//! * A MAC is cleared, by age or as a double, while it is seen. Its next frame enters it again.
//!
//! What rests on an entry remembers its word ([`Learned`]) and holds as long as the slot still has it. A decision
//! that asks for less remembers [`Fdb::version`], which grows whenever an entry is replaced or cleared. To
//! enter a MAC that was not known invalidates nothing, since no decision that rests on its absence is remembered.

use std::hash::BuildHasher;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::time::Duration;

use crossbeam::utils::CachePadded;
use foldhash::fast::FixedState;
use weft_encap::mac::Mac;
use zerocopy::FromZeros;

use crate::path::Learned;
use crate::tables::NodeId;
use crate::time::Instant;

/// Slots of a bucket: their words fill one cache line, their times the next.
const WAYS: usize = 8;

/// Words and times of a bucket.
const BUCKET: usize = 2 * WAYS;

/// Last-seen times are written only when they are older than this, so that busy MACs are read by all workers and written by none.
const FRESH: Duration = Duration::from_secs(1);

/// Least time between two searches for what is too old.
const SWEEP: Duration = Duration::from_secs(1);

/// How often a worker tries to enter a MAC while others are faster. Its next frame is another chance.
const ATTEMPTS: usize = 8;

/// One learned MAC, for people.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct FdbEntry {
    /// The MAC.
    pub mac: Mac,
    /// Where it is.
    pub node: NodeId,
    /// When it was last seen, to the second.
    pub last_seen: Instant,
}

/// The forwarding database. See the module's essay.
pub struct Fdb {
    /// Buckets, from `start` on, which is where a cache line begins.
    cells: Vec<AtomicU64>,
    start: usize,
    buckets: usize,
    /// What makes the hash ours.
    secrets: [u64; 2],
    /// In nanoseconds, as times are kept.
    age: u64,
    version: CachePadded<AtomicU64>,
    counters: CachePadded<Counters>,
}

/// What is written when something is entered or cleared, and hence stands apart from what is only read.
#[derive(Default)]
struct Counters {
    known: AtomicUsize,
    moved: AtomicU64,
    evicted: AtomicU64,
    /// Before this time nothing can be too old; zero if that is not known.
    next_sweep: AtomicU64,
}

impl Fdb {
    /// Room for `limit` MACs (rounded down to whole buckets, one at least), each kept for `age` after it was last seen.
    /// `seed` keeps outsiders from choosing the bucket. Memory is touched only when used.
    pub fn new(limit: usize, age: Duration, seed: u64) -> Fdb {
        let buckets = (limit / WAYS).max(1);
        let line = BUCKET / 2;
        let cells = AtomicU64::new_vec_zeroed(buckets * BUCKET + line).expect("the limit fits into memory");
        let start = cells.as_ptr().align_offset(line * size_of::<AtomicU64>()).min(line);
        let secrets = [0, 1].map(|number: u64| FixedState::with_seed(seed).hash_one(number));
        let age = age.as_nanos().try_into().unwrap_or(u64::MAX);
        Fdb { cells, start, buckets, secrets, age, version: CachePadded::default(), counters: CachePadded::default() }
    }

    /// Grows whenever an entry that a decision may rest on is replaced or cleared. To be read before [`Fdb::find`], so
    /// that a change between the two is noticed.
    pub fn version(&self) -> u64 {
        self.version.load(Acquire)
    }

    /// Where a MAC is.
    pub fn find(&self, mac: Mac, now: Instant) -> Option<Learned> {
        let (slot, word) = self.slot_of(key(mac))?;
        self.is_kept(slot, now).then_some(Learned { node: node(word), slot: slot as u32, word })
    }

    /// Whether an earlier look-up would still find the same.
    pub fn holds(&self, learned: &Learned, now: Instant) -> bool {
        let slot = learned.slot as usize;
        slot < self.slots() && self.word(slot).load(Acquire) == learned.word && self.is_kept(slot, now)
    }

    /// A frame from this MAC came from this node.
    pub fn learn(&self, mac: Mac, node: NodeId, now: Instant) {
        let key = key(mac);
        let word = key << 16 | u64::from(node.0);
        match self.slot_of(key) {
            Some((slot, found)) if found == word => self.touch(slot, now),
            _ => self.enter_or_move(key, word, now),
        }
    }

    /// Forgets what was not seen for too long. Returns when to call again; `None` if nothing is left to age. Any number of workers
    /// may call it, as often as they like; one of them does the work.
    pub fn age(&self, now: Instant) -> Option<Instant> {
        if self.is_empty() {
            return None;
        }
        let due = self.counters.next_sweep.load(Acquire);
        if due > now.0 {
            return Some(Instant(due));
        }
        let soon = now + SWEEP;
        if self.counters.next_sweep.compare_exchange(due, soon.0, SeqCst, Relaxed).is_err() {
            return Some(soon);
        }
        let mut next: Option<Instant> = None;
        for (slot, word) in self.used() {
            let due = Instant(self.seen(slot).load(Relaxed).saturating_add(self.age));
            if due <= now {
                self.clear(slot, word);
            } else {
                next = Some(next.map_or(due, |next| next.min(due)));
            }
        }
        let next = next.map(|next| next.max(soon));
        self.counters.next_sweep.store(next.map_or(0, |next| next.0), Release);
        next
    }

    /// All learned MACs.
    pub fn entries(&self) -> impl Iterator<Item = FdbEntry> {
        self.used().map(|(slot, word)| {
            let [a, b, c, d, e, f, ..] = word.to_be_bytes();
            let last_seen = Instant(self.seen(slot).load(Relaxed));
            FdbEntry { mac: Mac([a, b, c, d, e, f]), node: node(word), last_seen }
        })
    }

    /// How many MACs are known; exact while nobody writes.
    pub fn len(&self) -> usize {
        self.counters.known.load(Relaxed)
    }

    /// Whether none is known.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many MACs were given up for want of room.
    pub fn evicted(&self) -> u64 {
        self.counters.evicted.load(Relaxed)
    }

    /// How often a MAC went from one node to another.
    pub fn moved(&self) -> u64 {
        self.counters.moved.load(Relaxed)
    }
}

// Writing. Whatever fails here fails because another worker was faster.
impl Fdb {
    #[cold]
    fn enter_or_move(&self, key: u64, word: u64, now: Instant) {
        if key == 0 {
            return; // A word of zeros is an empty slot; no frame that was accepted comes from this MAC.
        }
        for _ in 0..ATTEMPTS {
            let done = match self.slot_of(key) {
                Some((slot, found)) if found == word => {
                    self.touch(slot, now);
                    true
                }
                Some((slot, found)) => self.replace(slot, found, word, now),
                None => self.enter(key, word, now),
            };
            if done {
                return;
            }
        }
    }

    fn touch(&self, slot: usize, now: Instant) {
        let seen = self.seen(slot);
        if now.0.saturating_sub(seen.load(Relaxed)) >= FRESH.as_nanos() as u64 {
            seen.store(now.0, Relaxed);
        }
    }

    /// Notes that the MAC in a slot moved.
    fn replace(&self, slot: usize, old: u64, new: u64, now: Instant) -> bool {
        let replaced = self.word(slot).compare_exchange(old, new, SeqCst, Relaxed).is_ok();
        if replaced {
            self.version.fetch_add(1, Release);
            self.counters.moved.fetch_add(1, Relaxed);
            self.touch(slot, now);
        }
        replaced
    }

    /// Enters a MAC in its first empty slot, else in the one that was not seen for longest.
    fn enter(&self, key: u64, word: u64, now: Instant) -> bool {
        let mut oldest = None;
        let mut empty = None;
        for slot in self.slots_of(key) {
            let (word, seen) = (self.word(slot).load(Relaxed), self.seen(slot).load(Relaxed));
            if word == 0 {
                empty = Some(slot);
                break;
            }
            if oldest.is_none_or(|(least, _, _)| seen < least) {
                oldest = Some((seen, slot, word));
            }
        }
        let slot = match (empty, oldest) {
            (Some(slot), _) => slot,
            (None, Some((_, slot, word))) => {
                if !self.clear(slot, word) {
                    return false;
                }
                self.counters.evicted.fetch_add(1, Relaxed);
                slot
            }
            (None, None) => return false,
        };
        // Before the word, so that nobody finds the new MAC with the time of the old one and takes it for forgotten.
        self.seen(slot).store(now.0, Relaxed);
        self.counters.known.fetch_add(1, Relaxed);
        let entered = self.word(slot).compare_exchange(0, word, SeqCst, Relaxed).is_ok();
        if entered {
            self.clear_doubles(key);
        } else {
            self.counters.known.fetch_sub(1, Relaxed);
        }
        entered
    }

    /// Leaves a MAC in the first of its slots only.
    fn clear_doubles(&self, key: u64) {
        let mut first = true;
        for slot in self.slots_of(key) {
            let mut word = self.word(slot).load(SeqCst);
            if word >> 16 != key || std::mem::take(&mut first) {
                continue;
            }
            // It may move meanwhile, which makes it no less a double.
            while word >> 16 == key && !self.clear(slot, word) {
                word = self.word(slot).load(SeqCst);
            }
        }
    }

    fn clear(&self, slot: usize, word: u64) -> bool {
        let cleared = self.word(slot).compare_exchange(word, 0, SeqCst, Relaxed).is_ok();
        if cleared {
            self.version.fetch_add(1, Release);
            self.counters.known.fetch_sub(1, Relaxed);
        }
        cleared
    }
}

// Where things stand.
impl Fdb {
    fn slots(&self) -> usize {
        self.buckets * WAYS
    }

    fn word(&self, slot: usize) -> &AtomicU64 {
        &self.cells[self.start + slot / WAYS * BUCKET + slot % WAYS]
    }

    fn seen(&self, slot: usize) -> &AtomicU64 {
        &self.cells[self.start + slot / WAYS * BUCKET + WAYS + slot % WAYS]
    }

    /// The buckets in which a MAC may be, in the order that counts. They are two, for with one of them some would be full long
    /// before the FDB is; the smallest FDB has one, twice.
    fn buckets_of(&self, key: u64) -> [usize; 2] {
        // A multiplication folded, as foldhash does it; for six bytes its hasher's set-up costs more than the hash.
        let wide = u128::from(key ^ self.secrets[0]) * u128::from(self.secrets[1] | 1);
        let hash = wide as u64 ^ (wide >> 64) as u64;
        let bucket = |half: u64| ((half * self.buckets as u64) >> 32) as usize;
        let (first, second) = (bucket(hash >> 32), bucket(hash & 0xffff_ffff));
        if second != first { [first, second] } else { [first, if first + 1 < self.buckets { first + 1 } else { 0 }] }
    }

    /// All slots in which a MAC may be, in that order.
    fn slots_of(&self, key: u64) -> impl Iterator<Item = usize> {
        let [first, second] = self.buckets_of(key);
        let others = if second == first { 0 } else { WAYS };
        (0..WAYS).map(move |way| first * WAYS + way).chain((0..others).map(move |way| second * WAYS + way))
    }

    fn slot_of(&self, key: u64) -> Option<(usize, u64)> {
        let [first, second] = self.buckets_of(key);
        self.slot_in(first, key).or_else(|| self.slot_in(second, key))
    }

    /// The first slot of a bucket that holds a MAC.
    #[inline]
    fn slot_in(&self, bucket: usize, key: u64) -> Option<(usize, u64)> {
        let words: &[AtomicU64; WAYS] = self.cells[self.start + bucket * BUCKET..].first_chunk()?;
        let words = words.iter().enumerate().map(|(way, word)| (bucket * WAYS + way, word.load(Acquire)));
        words.into_iter().find(|(_, word)| word >> 16 == key && *word != 0)
    }

    fn is_kept(&self, slot: usize, now: Instant) -> bool {
        now.0.saturating_sub(self.seen(slot).load(Relaxed)) < self.age
    }

    /// Slots that hold something, and what.
    fn used(&self) -> impl Iterator<Item = (usize, u64)> {
        (0..self.slots()).map(|slot| (slot, self.word(slot).load(Acquire))).filter(|(_, word)| *word != 0)
    }
}

fn key(mac: Mac) -> u64 {
    let [a, b, c, d, e, f] = mac.0;
    u64::from(u32::from_be_bytes([a, b, c, d])) << 16 | u64::from(u16::from_be_bytes([e, f]))
}

fn node(word: u64) -> NodeId {
    NodeId(word as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::sync::Barrier;

    const AGE: Duration = Duration::from_secs(300);
    const SECOND: u64 = 1_000_000_000;

    fn mac(number: u32) -> Mac {
        let [a, b, c, d] = number.to_be_bytes();
        Mac([2, 0, a, b, c, d])
    }

    fn fdb(limit: usize) -> Fdb {
        Fdb::new(limit, AGE, 7)
    }

    /// What is there, with no MAC twice, and as many as are counted.
    fn contents(fdb: &Fdb) -> Vec<FdbEntry> {
        let entries: Vec<FdbEntry> = fdb.entries().collect();
        let macs: HashSet<[u8; 6]> = entries.iter().map(|entry| entry.mac.0).collect();
        assert_eq!((entries.len(), entries.len()), (macs.len(), fdb.len()));
        entries
    }

    #[test]
    fn a_mac_is_forgotten_after_its_age() {
        let fdb = fdb(16);
        fdb.learn(mac(1), NodeId(2), Instant(0));
        let last = Instant(AGE.as_nanos() as u64 - 1);
        let learned = fdb.find(mac(1), last).unwrap();
        assert_eq!(learned.node, NodeId(2));
        assert!(fdb.holds(&learned, last));
        assert_eq!(fdb.age(last), Some(last + SWEEP));
        assert_eq!(fdb.find(mac(1), Instant(0) + AGE), None);
        assert!(!fdb.holds(&learned, Instant(0) + AGE));
        let version = fdb.version();
        assert_eq!(fdb.age(last + SWEEP), None);
        assert!(fdb.is_empty() && fdb.version() > version);
    }

    #[test]
    fn a_mac_that_is_seen_stays_and_its_time_is_exact_to_a_second() {
        let fdb = fdb(16);
        for tenth in 0..10 * 1000 {
            let now = Instant(tenth * SECOND / 10);
            fdb.learn(mac(1), NodeId(2), now);
            fdb.age(now);
            let entry = contents(&fdb)[0];
            assert!(now.since(entry.last_seen) < FRESH);
        }
        assert_eq!((fdb.len(), fdb.evicted(), fdb.version()), (1, 0, 0));
    }

    #[test]
    fn a_move_is_noticed_by_what_rests_on_the_mac_and_by_nothing_else() {
        let fdb = fdb(16);
        let now = Instant(5);
        fdb.learn(mac(1), NodeId(1), now);
        fdb.learn(mac(2), NodeId(1), now);
        let (one, two) = (fdb.find(mac(1), now).unwrap(), fdb.find(mac(2), now).unwrap());
        fdb.learn(mac(1), NodeId(1), now);
        assert!(fdb.holds(&one, now));
        assert_eq!(fdb.version(), 0, "nothing that rests on something changed");
        fdb.learn(mac(1), NodeId(3), now);
        assert!(!fdb.holds(&one, now));
        assert!(fdb.holds(&two, now));
        assert_eq!((fdb.version(), fdb.moved()), (1, 1));
        fdb.learn(mac(1), NodeId(1), now);
        assert!(fdb.holds(&one, now), "it is where the decision says again");
        assert_eq!(fdb.version(), 2, "but the version never goes back");
    }

    #[test]
    fn the_limit_is_exact_and_recent_macs_survive_a_flood() {
        let fdb = fdb(1000);
        for number in 0..1_000_000u32 {
            let now = Instant(u64::from(number) * SECOND);
            fdb.learn(mac(number + 10), NodeId(1), now);
            fdb.learn(mac(1), NodeId(2), now);
            assert!(fdb.len() <= 1000);
        }
        assert_eq!(contents(&fdb).len(), 1000);
        assert_eq!(fdb.find(mac(1), Instant(1_000_000 * SECOND)).unwrap().node, NodeId(2));
        assert_eq!(fdb.evicted(), 1_000_001 - 1000);
        assert_eq!(fdb.version(), fdb.evicted());
    }

    #[test]
    fn no_mac_is_given_up_before_three_quarters_of_the_room_are_used() {
        let fdb = fdb(16_384);
        (0..16_384 * 3 / 4).for_each(|number| fdb.learn(mac(number), NodeId(1), Instant(0)));
        assert_eq!(fdb.evicted(), 0);
        assert!((0..16_384 * 3 / 4).all(|number| fdb.find(mac(number), Instant(1)).is_some()));
    }

    #[test]
    fn the_smallest_one_has_a_bucket_and_the_mac_of_zeros_is_nobodys() {
        let fdb = fdb(0);
        fdb.learn(Mac([0; 6]), NodeId(1), Instant(0));
        assert!(fdb.is_empty());
        (0..100).for_each(|number| fdb.learn(mac(number), NodeId(1), Instant(number.into())));
        assert_eq!(contents(&fdb).len(), WAYS);
    }

    #[test]
    fn a_look_up_of_another_fdb_holds_nowhere() {
        let fdb = fdb(8);
        let learned = Learned { node: NodeId(1), slot: u32::MAX, word: 1 };
        assert!(!fdb.holds(&learned, Instant(0)));
    }

    #[test]
    fn buckets_begin_with_a_cache_line() {
        for limit in [1, 8, 100, 16_384] {
            let fdb = fdb(limit);
            assert_eq!(std::ptr::from_ref(fdb.word(0)).addr() % 64, 0);
        }
    }

    /// Runs the same on a few threads at once, with the number of each.
    fn at_once(threads: u16, work: impl Fn(u16) + Sync) {
        let barrier = Barrier::new(threads.into());
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let (barrier, work) = (&barrier, &work);
                scope.spawn(move || {
                    barrier.wait();
                    work(thread);
                });
            }
        });
    }

    #[test]
    fn workers_that_enter_one_mac_at_once_leave_one_entry() {
        for round in 0..300 {
            let fdb = Fdb::new(64, AGE, round);
            // Few MACs and many moves: as many collisions as there can be.
            at_once(4, |thread| {
                for step in 0..200u32 {
                    fdb.learn(mac(step % 7), NodeId(thread), Instant(1));
                }
            });
            let entries = contents(&fdb);
            assert_eq!(entries.len(), 7);
            for entry in entries {
                assert_eq!(fdb.find(entry.mac, Instant(1)).unwrap().node, entry.node);
            }
        }
    }

    #[test]
    fn under_a_flood_from_all_workers_counts_stay_exact_and_no_entry_is_torn() {
        for round in 0..20 {
            let fdb = Fdb::new(128, AGE, round);
            at_once(4, |thread| {
                for step in 0..5_000u32 {
                    // Each MAC is at the node of its own number, so an entry made of two would show.
                    let number = step.wrapping_mul(0x9e37_79b1).rotate_left(thread.into()) % 1000;
                    let now = Instant(u64::from(step) * SECOND);
                    fdb.learn(mac(number), NodeId(number as u16), now);
                    if let Some(learned) = fdb.find(mac(number / 2), now) {
                        assert_eq!(learned.node, NodeId(number as u16 / 2));
                    }
                    if step % 50 == 0 {
                        fdb.age(now);
                    }
                }
            });
            for entry in contents(&fdb) {
                assert_eq!(mac(u32::from(entry.node.0)), entry.mac);
            }
            assert!(fdb.evicted() > 0 && fdb.moved() == 0);
        }
    }

    #[test]
    fn what_was_found_under_the_version_that_still_is_is_still_so() {
        for round in 0..500 {
            let fdb = Fdb::new(8, AGE, round);
            fdb.learn(mac(1), NodeId(0), Instant(0));
            let looked_up = std::sync::Mutex::new(Vec::new());
            at_once(2, |thread| match thread {
                0 => (1..=20).for_each(|node| fdb.learn(mac(1), NodeId(node), Instant(0))),
                _ => {
                    let once = |_| (fdb.version(), fdb.find(mac(1), Instant(0)));
                    looked_up.lock().unwrap().extend((0..50).map(once));
                }
            });
            let (version, found) = (fdb.version(), fdb.find(mac(1), Instant(0)));
            assert_eq!((version, found.map(|found| found.node)), (20, Some(NodeId(20))));
            let looked_up = looked_up.into_inner().unwrap();
            assert!(looked_up.iter().filter(|(then, _)| *then == version).all(|(_, then)| *then == found));
        }
    }
}
