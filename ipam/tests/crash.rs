//! Any crash, at any point, on any disk: no address is given twice and no acknowledged lease is lost.

#![allow(clippy::unwrap_used, reason = "tests")]

mod sim;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use sim::{Faults, Rng, Sim};
use weft_ipam::{Facts, LeaseError, Owner, Range, RangeSet, Store, StoreError};

/// So small that it is often full, so that an address freed too early is given away at once.
fn sets() -> [RangeSet; 2] {
    [
        Range::whole("10.0.0.0/29".parse().unwrap()).unwrap().into(),
        Range::whole("fd00::/125".parse().unwrap()).unwrap().into(),
    ]
}

fn owner(n: u64) -> Owner {
    Owner { network: "net".into(), container: format!("pod{n}"), ifname: "eth0".into() }
}

fn facts(rng: &mut Rng) -> Facts {
    // Sometimes longer than a sector or several, so that frames tear in all places.
    let length = [0, 40, 300, 1500][rng.below(4) as usize];
    let labels = BTreeMap::from([("filler".to_owned(), "x".repeat(length))]);
    Facts {
        time: rng.below(1000),
        mac: Some(rng.next().to_le_bytes()[..6].try_into().unwrap()),
        labels,
        ..Facts::default()
    }
}

/// What the outside world knows.
#[derive(Default)]
struct World {
    /// Acknowledged and not released: must be there after any crash.
    acknowledged: HashMap<Owner, Vec<IpAddr>>,
    /// May be there after a crash: failed or interrupted leases, releases that may not be durable.
    perhaps: BTreeSet<Owner>,
    lives: u64,
    leases: u64,
    refused: u64,
    torn: u64,
    poisoned: u64,
}

impl World {
    /// One life of a daemon on `disk`, until it dies or `steps` are over.
    fn live(&mut self, disk: &Sim, rng: &mut Rng, steps: u64) {
        self.lives += 1;
        let store = match Store::with_disk(disk.boxed()) {
            Ok(store) => store,
            Err(e) => {
                assert!(disk.is_dead() || e.to_string().contains("cannot"), "must open: {e}");
                return;
            }
        };
        self.torn += u64::from(store.recovery().is_some());
        self.compare(&store);
        for _ in 0..steps {
            match rng.below(12) {
                0..=5 => self.lease(&store, rng),
                6..=9 => self.release(&store, rng),
                10 => drop(store.flush()),
                _ => drop(store.compact()),
            }
            if disk.is_dead() {
                break;
            }
        }
        self.poisoned += u64::from(store.poisoned().is_some() && !disk.is_dead());
    }

    /// What a store says when it was opened, against what was acknowledged.
    fn compare(&mut self, store: &Store) {
        for (owner, addresses) in &self.acknowledged {
            let record = store.get(owner).unwrap_or_else(|| panic!("the lease of {owner} is lost"));
            assert_eq!(&record.addresses().collect::<Vec<_>>(), addresses, "{owner}");
        }
        let mut seen = BTreeSet::new();
        for record in store.records().iter() {
            let known = self.acknowledged.contains_key(&record.owner);
            assert!(known || self.perhaps.contains(&record.owner), "{} has a lease from nowhere", record.owner);
            for address in record.addresses() {
                assert!(seen.insert(address), "{address} is there twice");
                assert_eq!(store.by_address("", address).map(|r| r.owner.clone()), Some(record.owner.clone()));
            }
            // Reconcile: whatever is there without an acknowledgement is as good as acknowledged from here on.
            self.acknowledged.insert(record.owner.clone(), record.addresses().collect());
        }
        self.perhaps.clear();
    }

    fn lease(&mut self, store: &Store, rng: &mut Rng) {
        let owner = owner(rng.below(8));
        let requested: &[IpAddr] = if rng.one_in(4) { &["10.0.0.4".parse().unwrap()] } else { &[] };
        match store.lease(&owner, &sets(), requested, facts(rng), 0) {
            Ok(record) => {
                self.leases += 1;
                for address in record.addresses() {
                    let other = self.acknowledged.iter().find(|(_, a)| a.contains(&address));
                    assert!(other.is_none(), "{address} is given to {owner} and to {other:?}");
                }
                self.perhaps.remove(&owner);
                self.acknowledged.insert(owner, record.addresses().collect());
            }
            Err(LeaseError::Exists { .. }) => assert!(self.acknowledged.contains_key(&owner)),
            Err(LeaseError::Store(e)) => {
                assert!(!matches!(e, StoreError::JournalFull { .. }));
                assert!(store.get(&owner).is_none(), "a failed lease left something behind");
                self.perhaps.insert(owner);
            }
            Err(LeaseError::Exhausted { .. } | LeaseError::Taken { .. }) => self.refused += 1,
            Err(e) => panic!("{e}"),
        }
    }

    fn release(&mut self, store: &Store, rng: &mut Rng) {
        let owner = owner(rng.below(8));
        let released = store.release(&owner, 0);
        let known = self.acknowledged.remove(&owner);
        assert_eq!(released.map(|r| r.addresses().collect::<Vec<_>>()), known);
        assert!(store.get(&owner).is_none());
        if store.pending() > 0 {
            self.perhaps.insert(owner);
        }
    }
}

/// Names the seed when the test fails.
struct Named(u64);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed {}", self.0);
        }
    }
}

fn run(seeds: std::ops::Range<u64>, fail_one_in: u64) -> World {
    let mut sum = World::default();
    for seed in seeds {
        let _named = Named(seed);
        let (mut rng, mut disk) = (Rng(seed), Sim::default());
        let mut world = World::default();
        for _ in 0..5 {
            let die_at = rng.below(70) + 1;
            disk.set_faults(Faults { die_at: Some(die_at), fail_one_in, ..Faults::default() }, rng.next());
            let steps = rng.below(60);
            world.live(&disk, &mut rng, steps);
            disk = if rng.one_in(4) { disk.after_kill() } else { disk.after_power_loss(&mut rng) };
        }
        // Whatever happened, the disk is fine again and the store opens and says the truth.
        let store = Store::with_disk(disk.boxed()).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        world.compare(&store);
        sum.lives += world.lives;
        sum.leases += world.leases;
        sum.refused += world.refused;
        sum.torn += world.torn;
        sum.poisoned += world.poisoned;
    }
    sum
}

#[test]
fn a_hundred_thousand_crashes_lose_no_lease_and_give_no_address_twice() {
    let world = run(0..20_000, 0);
    assert_eq!(world.lives, 100_000);
    // The runs have to meet what they are about.
    assert!(world.leases > 100_000 && world.refused > 5000 && world.torn > 5000, "{}", world.torn);
}

#[test]
fn nor_do_they_when_calls_fail_in_between() {
    let world = run(1_000_000..1_002_000, 12);
    assert!(world.leases > 3_000 && world.torn > 200 && world.poisoned > 200, "{} {}", world.torn, world.poisoned);
}

#[test]
fn every_single_call_of_one_life_can_be_the_last() {
    // The same life each time, dying one call later: lease, release, compaction, all of their calls.
    let life = |disk: &Sim, world: &mut World| world.live(disk, &mut Rng(7), 80);
    let whole = Sim::default();
    life(&whole, &mut World::default());
    assert!(whole.calls() > 60);
    for die_at in 1..=whole.calls() {
        for seed in 0..20 {
            let (disk, mut world) = (Sim::default(), World::default());
            disk.set_faults(Faults { die_at: Some(die_at), ..Faults::default() }, seed);
            life(&disk, &mut world);
            let store = Store::with_disk(disk.after_power_loss(&mut Rng(seed)).boxed()).unwrap();
            world.compare(&store);
        }
    }
}

#[test]
fn on_a_full_disk_leases_fail_and_releases_succeed_and_are_durable_when_there_is_space() {
    let disk = Sim::default();
    let store = Store::with_disk(disk.boxed()).unwrap();
    let v4 = &sets()[..1];
    let first = store.lease(&owner(1), v4, &[], Facts::default(), 0).unwrap();
    let length = disk.journal().unwrap().len();

    disk.set_faults(Faults { full: true, ..Faults::default() }, 3);
    let error = store.lease(&owner(2), v4, &[], Facts::default(), 0).unwrap_err();
    assert!(matches!(&error, LeaseError::Store(StoreError::Io { .. })), "{error}");
    assert!(error.to_string().contains("free space"), "{error}");
    assert_eq!(disk.journal().unwrap().len(), length, "the half-written frame is cut off");
    assert_eq!(store.release(&owner(1), 0).as_ref(), Some(&first));
    assert_eq!(store.release(&owner(1), 0), None);
    assert_eq!((store.pending(), store.len()), (1, 0));
    assert!(store.trouble().is_some() && store.poisoned().is_none());
    assert_eq!(store.by_address("", first.leases[0].address), None);
    assert_eq!(store.usage("", &v4[0].ranges()[0]).leased, 1, "not to be given before the release is durable");
    // A crash here: the release is forgotten, the lease is back.
    assert!(Store::with_disk(disk.after_kill().boxed()).unwrap().get(&owner(1)).is_some());

    disk.set_faults(Faults::default(), 4);
    let again = store.lease(&owner(2), v4, &[first.leases[0].address], Facts::default(), 0).unwrap();
    assert_eq!(again.leases, first.leases);
    assert_eq!((store.pending(), store.trouble()), (0, None));
    let reopened = Store::with_disk(disk.after_power_loss(&mut Rng(5)).boxed()).unwrap();
    assert_eq!(reopened.records().iter().map(|r| r.owner.clone()).collect::<Vec<_>>(), [owner(2)]);
}

#[test]
fn a_failure_that_cannot_be_undone_closes_the_store_until_it_is_opened_again() {
    let disk = Sim::default();
    let store = Store::with_disk(disk.boxed()).unwrap();
    store.lease(&owner(1), &sets(), &[], Facts::default(), 0).unwrap();
    store.lease(&owner(2), &sets(), &[], Facts::default(), 0).unwrap();
    disk.set_faults(Faults { broken: true, ..Faults::default() }, 1);
    store.lease(&owner(3), &sets(), &[], Facts::default(), 0).unwrap_err();
    assert!(store.poisoned().is_some());

    disk.set_faults(Faults::default(), 1);
    let error = store.lease(&owner(3), &sets(), &[], Facts::default(), 0).unwrap_err();
    assert!(matches!(error, LeaseError::Store(StoreError::Poisoned { .. })), "{error}");
    assert!(store.compact().is_err() && store.release(&owner(2), 0).is_some() && store.pending() == 1);
    drop(store);
    let store = Store::with_disk(disk.after_kill().boxed()).unwrap();
    assert!(store.get(&owner(1)).is_some() && store.get(&owner(2)).is_some());
    store.release(&owner(3), 0);
    store.lease(&owner(3), &sets(), &[], Facts::default(), 0).unwrap();
}
