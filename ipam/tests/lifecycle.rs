//! What runtimes do to attachments, in any order, against the plainest model: a map of who has which address.
//!
//! A sequence is a handful of pods that come, go, come again under the same id, fail half-way, are deleted twice, or by a GC; the daemon is
//! killed between two steps and in the middle of one, and a DEL that finds none is done by the next. In the end all are gone, and then so is every
//! trace of them: nothing leaks over a million sequences.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use weft_ipam::{Disk, Facts, LeaseError, Owner, Range, RangeSet, Store, Which};

const SEQUENCES: u64 = 1_000_000;
const THREADS: u64 = 4;
const PODS: u64 = 6;
/// Sequences after which the disk is a new one.
const ON_ONE_DISK: u64 = 8;

/// A disk that keeps what is written: what a crash of the machine leaves is tested elsewhere.
#[derive(Clone, Default)]
struct Memory(Arc<Mutex<[Option<Vec<u8>>; 2]>>);

impl Memory {
    fn files(&self) -> MutexGuard<'_, [Option<Vec<u8>>; 2]> {
        self.0.lock().unwrap()
    }
}

impl Disk for Memory {
    fn load(&mut self) -> io::Result<Option<Vec<u8>>> {
        Ok(self.files()[0].clone())
    }

    fn create_next(&mut self) -> io::Result<()> {
        self.files()[1] = Some(Vec::new());
        Ok(())
    }

    fn write(&mut self, file: Which, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut files = self.files();
        let file = files[usize::from(matches!(file, Which::Next))].as_mut().ok_or(io::ErrorKind::NotFound)?;
        let (start, end) = (offset as usize, offset as usize + bytes.len());
        file.resize(file.len().max(end), 0);
        file[start..end].copy_from_slice(bytes);
        Ok(())
    }

    fn sync(&mut self, _: Which) -> io::Result<()> {
        Ok(())
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.files()[0].as_mut().ok_or(io::ErrorKind::NotFound)?.truncate(length as usize);
        Ok(())
    }

    fn rename(&mut self) -> io::Result<()> {
        let mut files = self.files();
        files[0] = files[1].take();
        Ok(())
    }

    fn sync_folder(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn remove_next(&mut self) -> io::Result<()> {
        self.files()[1] = None;
        Ok(())
    }
}

/// Steele, Lea, Flood: SplitMix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// The node: its daemon and its disk, and what a runtime knows.
struct Node {
    disk: Memory,
    store: Option<Store>,
    sets: [RangeSet; 1],
    /// Who has what, as far as was acknowledged.
    model: BTreeMap<Owner, IpAddr>,
    /// DELs that found no daemon.
    tombstones: Vec<Owner>,
    rng: Rng,
}

fn owner(n: u64) -> Owner {
    Owner { network: "net".into(), container: format!("pod{n}"), ifname: "eth0".into() }
}

impl Node {
    fn new(seed: u64) -> Node {
        let disk = Memory::default();
        let store = Some(Store::with_disk(Box::new(disk.clone())).unwrap());
        // Five addresses can be given, and there may be six pods.
        let sets = [Range::whole("10.0.0.0/29".parse().unwrap()).unwrap().into()];
        Node { disk, store, sets, model: BTreeMap::new(), tombstones: Vec::new(), rng: Rng(seed) }
    }

    /// The daemon, which is started if need be: what was left for it comes first.
    fn store(&mut self) -> &Store {
        if self.store.is_none() {
            let store = Store::with_disk(Box::new(self.disk.clone())).unwrap();
            for owner in self.tombstones.drain(..) {
                store.release(&owner, 0);
                self.model.remove(&owner);
            }
            self.store = Some(store);
        }
        self.store.as_ref().unwrap()
    }

    fn kill(&mut self) {
        drop(self.store.take());
        let files = self.disk.files().clone();
        self.disk = Memory(Arc::new(Mutex::new(files)));
    }

    fn add(&mut self, owner: &Owner, ends: u64) {
        let sets = self.sets.clone();
        let has_one = {
            self.store();
            self.model.contains_key(owner)
        };
        match (self.store().begin(owner, &sets, &[], Facts::default(), 0), has_one) {
            (Err(LeaseError::Exists { .. }), true) => {}
            (Err(LeaseError::Exhausted { .. }), false) => assert!(self.model.len() >= 5, "{:?}", self.model),
            // Killed before it was written: nobody was told of it, so there is none.
            (Ok(_), false) if ends == 0 => self.kill(),
            (Ok(begun), false) => {
                let record = self.store().finish(begun).unwrap();
                let address = record.leases[0].address;
                assert!(self.model.values().all(|other| *other != address), "{address} is given twice");
                match ends {
                    // Its device could not be made.
                    1 => drop(self.store().release(owner, 0).unwrap()),
                    // Killed before it was answered: it is there, and the runtime's DEL comes.
                    2 => {
                        self.kill();
                        self.model.insert(owner.clone(), address);
                        self.del(owner);
                    }
                    _ => drop(self.model.insert(owner.clone(), address)),
                }
            }
            (outcome, _) => panic!("{owner:?}: {outcome:?}, but {:?}", self.model),
        }
    }

    fn del(&mut self, owner: &Owner) {
        match &self.store {
            None => self.tombstones.push(owner.clone()),
            Some(store) => {
                let released = store.release(owner, 0).map(|record| record.leases[0].address);
                assert_eq!(released, self.model.remove(owner));
            }
        }
    }

    fn gc(&mut self, valid: u64) {
        let stale: Vec<Owner> = self.store().records().iter().map(|record| record.owner.clone()).collect();
        for owner in stale.into_iter().filter(|stale| (0..PODS).any(|n| *stale == owner(n) && valid >> n & 1 == 0)) {
            self.del(&owner);
        }
    }

    fn step(&mut self) {
        let pod = owner(self.rng.below(PODS));
        match self.rng.below(16) {
            0..=5 => {
                let ends = self.rng.below(12);
                self.add(&pod, ends);
            }
            6..=9 => self.del(&pod),
            10..=11 => {
                let known = { self.store().get(&pod).map(|record| record.leases[0].address) };
                assert_eq!(known, self.model.get(&pod).copied());
            }
            12 => {
                let valid = self.rng.next();
                self.gc(valid);
            }
            _ => {
                if self.rng.below(4) == 0 {
                    self.kill();
                }
            }
        }
    }

    fn sequence(&mut self) {
        for _ in 0..1 + self.rng.below(10) {
            self.step();
        }
        (0..PODS).for_each(|n| self.del(&owner(n)));
        let range = self.sets[0].ranges()[0].clone();
        let store = self.store();
        assert_eq!((store.len(), store.pending(), store.usage("", &range).leased), (0, 0, 0));
        assert!(self.model.is_empty());
    }
}

#[test]
fn a_million_sequences_of_what_runtimes_do_leak_nothing_and_give_no_address_twice() {
    thread::scope(|scope| {
        for seed in 1..=THREADS {
            scope.spawn(move || {
                let mut rng = Rng(seed);
                for _ in 0..SEQUENCES / THREADS / ON_ONE_DISK {
                    let mut node = Node::new(rng.next());
                    (0..ON_ONE_DISK).for_each(|_| node.sequence());
                }
            });
        }
    });
}
