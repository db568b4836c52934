//! L2: which node has a MAC.
//!
//! The forwarding database (FDB) learns the source MAC of each accepted frame that came through the tunnel. MACs of local pods and
//! of the gateway are static: they stand in the tables, are never learned, and never move to the
//! tunnel. A learned MAC is forgotten after a time without frames. The FDB holds a fixed number of entries; when it
//! is full, a new MAC takes the place of the least recently seen of a few candidates, so that a flood of
//! made-up MACs costs the same as any other frame.
//!
//! Each MAC has a generation that grows when it moves, so that a flow that rests on it notices (see
//! [`crate::conntrack`]) without the others being decided anew.

use std::time::Duration;

use weft_encap::mac::Mac;

use crate::path::Learned;
use crate::tables::{ExactMap, NodeId};
use crate::time::Instant;

/// How many entries are compared when one must go.
const CANDIDATES: usize = 8;

/// One learned MAC, for people.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct FdbEntry {
    /// The MAC.
    pub mac: Mac,
    /// Where it is.
    pub node: NodeId,
    /// When it was last seen.
    pub last_seen: Instant,
}

#[derive(Copy, Clone)]
struct Slot {
    entry: Option<FdbEntry>,
    generation: u32,
}

/// The forwarding database.
pub struct Fdb {
    index: ExactMap<Mac, u32>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    hand: usize,
    limit: usize,
    age: Duration,
    evicted: u64,
}

impl Fdb {
    /// Room for `limit` MACs, each kept for `age` after it was last seen.
    pub fn new(limit: usize, age: Duration) -> Fdb {
        let limit = limit.max(1);
        Fdb { index: ExactMap::default(), slots: Vec::new(), free: Vec::new(), hand: 0, limit, age, evicted: 0 }
    }

    /// Where a MAC is.
    pub fn find(&self, mac: Mac, now: Instant) -> Option<Learned> {
        let slot = *self.index.get(&mac)?;
        let found = &self.slots[slot as usize];
        let entry = found.entry.as_ref()?;
        (now.since(entry.last_seen) < self.age).then_some(Learned {
            node: entry.node,
            slot,
            generation: found.generation,
        })
    }

    /// Whether an earlier look-up would still find the same.
    pub fn holds(&self, learned: &Learned, now: Instant) -> bool {
        self.slots.get(learned.slot as usize).is_some_and(|slot| {
            slot.generation == learned.generation
                && slot.entry.is_some_and(|entry| now.since(entry.last_seen) < self.age)
        })
    }

    /// A frame from this MAC came from this node.
    pub fn learn(&mut self, mac: Mac, node: NodeId, now: Instant) {
        if let Some(&slot) = self.index.get(&mac) {
            let slot = &mut self.slots[slot as usize];
            if slot.entry.is_some_and(|entry| entry.node != node) {
                slot.generation = slot.generation.wrapping_add(1);
            }
            slot.entry = Some(FdbEntry { mac, node, last_seen: now });
            return;
        }
        let slot = self.vacant();
        self.index.insert(mac, slot);
        let slot = &mut self.slots[slot as usize];
        slot.generation = slot.generation.wrapping_add(1);
        slot.entry = Some(FdbEntry { mac, node, last_seen: now });
    }

    /// Forgets what was not seen for too long. Returns when to call again; `None` if nothing is left to age.
    pub fn age(&mut self, now: Instant) -> Option<Instant> {
        if self.index.is_empty() {
            return None;
        }
        let mut next = None;
        for (number, slot) in self.slots.iter_mut().enumerate() {
            let Some(entry) = slot.entry else { continue };
            if now.since(entry.last_seen) >= self.age {
                slot.entry = None;
                self.index.remove(&entry.mac);
                self.free.push(number as u32);
            } else {
                let due = entry.last_seen + self.age;
                next = Some(next.map_or(due, |next: Instant| next.min(due)));
            }
        }
        next
    }

    /// All learned MACs.
    pub fn entries(&self) -> impl Iterator<Item = &FdbEntry> {
        self.slots.iter().filter_map(|slot| slot.entry.as_ref())
    }

    /// How many MACs are known.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Whether none is known.
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// How many MACs were given up for want of room.
    pub fn evicted(&self) -> u64 {
        self.evicted
    }

    fn vacant(&mut self) -> u32 {
        if let Some(slot) = self.free.pop() {
            return slot;
        }
        if self.slots.len() < self.limit {
            self.slots.push(Slot { entry: None, generation: 0 });
            return self.slots.len() as u32 - 1;
        }
        let len = self.slots.len();
        let seen = |slot: usize| self.slots[slot].entry.map_or(Instant(0), |entry| entry.last_seen);
        let oldest = (0..CANDIDATES.min(len))
            .map(|step| (self.hand + step) % len)
            .min_by_key(|&slot| seen(slot))
            .expect("a full table has entries");
        self.hand = (self.hand + CANDIDATES) % len;
        if let Some(entry) = self.slots[oldest].entry.take() {
            self.index.remove(&entry.mac);
            self.evicted += 1;
        }
        oldest as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AGE: Duration = Duration::from_secs(300);

    fn mac(number: u32) -> Mac {
        let [a, b, c, d] = number.to_be_bytes();
        Mac([2, 0, a, b, c, d])
    }

    #[test]
    fn a_mac_is_forgotten_after_its_age() {
        let mut fdb = Fdb::new(16, AGE);
        fdb.learn(mac(1), NodeId(2), Instant(0));
        assert_eq!(fdb.find(mac(1), Instant(AGE.as_nanos() as u64 - 1)).unwrap().node, NodeId(2));
        assert_eq!(fdb.find(mac(1), Instant(0) + AGE), None);
        assert_eq!(fdb.age(Instant(0) + AGE), None);
        assert!(fdb.is_empty());
    }

    #[test]
    fn a_move_is_noticed_by_what_rests_on_the_mac_and_by_nothing_else() {
        let mut fdb = Fdb::new(16, AGE);
        let now = Instant(5);
        fdb.learn(mac(1), NodeId(1), now);
        fdb.learn(mac(2), NodeId(1), now);
        let (one, two) = (fdb.find(mac(1), now).unwrap(), fdb.find(mac(2), now).unwrap());
        fdb.learn(mac(1), NodeId(1), now);
        assert!(fdb.holds(&one, now));
        fdb.learn(mac(1), NodeId(3), now);
        assert!(!fdb.holds(&one, now));
        assert!(fdb.holds(&two, now));
    }

    #[test]
    fn the_limit_is_exact_and_recent_macs_survive_a_flood() {
        let mut fdb = Fdb::new(1000, AGE);
        for number in 0..1_000_000u32 {
            fdb.learn(mac(number + 10), NodeId(1), Instant(u64::from(number)));
            fdb.learn(mac(1), NodeId(2), Instant(u64::from(number)));
            assert!(fdb.len() <= 1000);
        }
        assert_eq!(fdb.len(), 1000);
        assert_eq!(fdb.find(mac(1), Instant(1_000_000)).unwrap().node, NodeId(2));
        assert_eq!(fdb.evicted(), 1_000_001 - 1000);
    }
}
