//! Many threads at once: they share writes, and what is promised to one is promised to each.

#![allow(clippy::unwrap_used, reason = "tests")]

mod sim;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Barrier, Mutex};
use std::thread;

use sim::{Faults, Rng, Sim};
use weft_ipam::{Facts, LeaseError, Owner, Range, RangeSet, Store, StoreError};

fn set(subnet: &str) -> [RangeSet; 1] {
    [Range::whole(subnet.parse().unwrap()).unwrap().into()]
}

fn owner(n: u64) -> Owner {
    Owner { network: "net".into(), container: format!("pod{n}"), ifname: "eth0".into() }
}

#[test]
fn eight_threads_share_the_writes_and_fill_a_slash_16_to_the_last_address() {
    let disk = Sim::slow(std::time::Duration::from_micros(200));
    let store = Store::with_disk(disk.boxed()).unwrap();
    let (next, given) = (AtomicU64::new(0), Mutex::new(HashSet::new()));
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    match store.lease(
                        &owner(next.fetch_add(1, Ordering::Relaxed)),
                        &set("10.1.0.0/16"),
                        &[],
                        Facts::default(),
                        0,
                    ) {
                        Ok(record) => assert!(given.lock().unwrap().insert(record.leases[0].address)),
                        Err(LeaseError::Exhausted { .. }) => break,
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
    });
    assert_eq!(given.lock().unwrap().len(), 65_533);
    let counts = store.counts();
    assert_eq!((counts.leased, counts.exhausted, counts.failed), (65_533, 8, 0));
    assert!(counts.commits < 60_000, "{} writes", counts.commits);
    let reopened = Store::with_disk(disk.after_power_loss(&mut Rng(1)).boxed()).unwrap();
    assert_eq!(reopened.len(), 65_533);
}

/// Leases a second that eight threads get from a disk that takes so long for a sync.
fn rate(sync: std::time::Duration) -> f64 {
    const EACH: u64 = 500;
    let store = Store::with_disk(Sim::slow(sync).boxed()).unwrap();
    let started = std::time::Instant::now();
    thread::scope(|scope| {
        for first in 0..8 {
            let store = &store;
            scope.spawn(move || {
                for n in first * EACH..(first + 1) * EACH {
                    store.lease(&owner(n), &set("10.1.0.0/16"), &[], Facts::default(), 0).unwrap();
                }
            });
        }
    });
    store.counts().leased as f64 / started.elapsed().as_secs_f64()
}

#[test]
fn eight_threads_get_five_thousand_leases_a_second_from_an_ordinary_disk() {
    // Other tests run at the same time: the best of a few counts.
    let mut rates = (0..8).map(|_| rate(std::time::Duration::from_micros(400)));
    assert!(rates.any(|rate| rate > 5000.0), "never five thousand a second");
}

/// What threads did before the machine died.
#[derive(Default)]
struct World {
    /// Acknowledged and not released.
    acknowledged: BTreeMap<Owner, Vec<IpAddr>>,
    /// May be there after the crash, or not.
    perhaps: BTreeSet<Owner>,
}

/// Four threads, each with pods of its own, until the disk dies.
fn live(disk: &Sim, seed: u64, world: &Mutex<World>) {
    let Ok(store) = Store::with_disk(disk.boxed()) else { return };
    check(&store, &mut world.lock().unwrap());
    let start = Barrier::new(4);
    thread::scope(|scope| {
        for thread in 0..4 {
            let (store, start) = (&store, &start);
            scope.spawn(move || {
                let mut rng = Rng(seed << 8 | thread);
                start.wait();
                for _ in 0..12 {
                    let owner = owner(thread * 4 + rng.below(4));
                    if rng.one_in(20) {
                        let _ = store.compact();
                    } else if rng.one_in(2) {
                        lease(store, owner, world);
                    } else {
                        release(store, owner, world);
                    }
                    if disk.is_dead() {
                        break;
                    }
                }
            });
        }
    });
}

fn lease(store: &Store, owner: Owner, world: &Mutex<World>) {
    // From the call on it may be there.
    let had = !world.lock().unwrap().perhaps.insert(owner.clone());
    match store.lease(&owner, &set("10.0.0.0/29"), &[], Facts::default(), 0) {
        Ok(record) => {
            let mut world = world.lock().unwrap();
            let addresses: Vec<IpAddr> = record.addresses().collect();
            // Another thread may not have noted yet that it released this one; that it has it is only certain if the store says so.
            for (other, theirs) in &world.acknowledged {
                let really = || store.get(other).is_some_and(|r| r.addresses().eq(addresses.iter().copied()));
                assert!(*theirs != addresses || !really(), "{addresses:?} of {other} is given to {owner}");
            }
            world.perhaps.remove(&owner);
            world.acknowledged.insert(owner, addresses);
        }
        Err(LeaseError::Store(StoreError::Io { .. } | StoreError::Poisoned { .. })) => {}
        Err(_) if had => {}
        Err(_) => drop(world.lock().unwrap().perhaps.remove(&owner)),
    }
}

fn release(store: &Store, owner: Owner, world: &Mutex<World>) {
    if world.lock().unwrap().acknowledged.remove(&owner).is_some() {
        world.lock().unwrap().perhaps.insert(owner.clone());
        assert!(store.release(&owner, 0).is_some());
        if store.pending() == 0 {
            world.lock().unwrap().perhaps.remove(&owner);
        }
    }
}

/// What a store says when it was opened, against what was acknowledged.
fn check(store: &Store, world: &mut World) {
    for (owner, addresses) in &world.acknowledged {
        let record = store.get(owner).unwrap_or_else(|| panic!("the lease of {owner} is lost"));
        assert_eq!(&record.addresses().collect::<Vec<_>>(), addresses, "{owner}");
    }
    let mut seen = HashMap::new();
    for record in store.records() {
        let known = world.acknowledged.contains_key(&record.owner) || world.perhaps.contains(&record.owner);
        assert!(known, "{} has a lease from nowhere", record.owner);
        for address in record.addresses() {
            assert_eq!(seen.insert(address, record.owner.clone()), None, "{address} is there twice");
        }
    }
    // What is there without an acknowledgement is freed, as a reconcile would.
    for owner in std::mem::take(&mut world.perhaps) {
        store.release(&owner, 0);
        if store.pending() > 0 {
            world.perhaps.insert(owner);
        }
    }
    assert!(store.pending() > 0 || store.len() == world.acknowledged.len());
}

#[test]
fn threads_that_die_together_lose_no_lease_and_give_no_address_twice() {
    for seed in 0..600 {
        let (mut rng, mut disk, world) = (Rng(seed), Sim::default(), Mutex::default());
        for _ in 0..3 {
            let faults = Faults {
                die_at: Some(rng.below(60) + 1),
                fail_one_in: [0, 0, 15][rng.below(3) as usize],
                ..Faults::default()
            };
            disk.set_faults(faults, rng.next());
            live(&disk, rng.next(), &world);
            disk = if rng.one_in(4) { disk.after_kill() } else { disk.after_power_loss(&mut rng) };
        }
        let store = Store::with_disk(disk.boxed()).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        check(&store, &mut world.lock().unwrap());
    }
}

#[test]
fn when_a_shared_write_fails_each_of_them_hears_of_it_and_nothing_is_left() {
    let disk = Sim::slow(std::time::Duration::from_millis(2));
    let store = Store::with_disk(disk.boxed()).unwrap();
    let sets = set("10.0.0.0/24");
    for n in 0..20 {
        store.lease(&owner(n), &sets, &[], Facts::default(), 0).unwrap();
    }
    disk.set_faults(Faults { full: true, ..Faults::default() }, 1);
    let counts = store.counts();
    thread::scope(|scope| {
        for n in 0..20 {
            let (store, sets) = (&store, &sets);
            scope.spawn(move || {
                let error = store.lease(&owner(100 + n), sets, &[], Facts::default(), 0).unwrap_err();
                assert!(error.to_string().contains("free space"), "{error}");
            });
            scope.spawn(move || assert!(store.release(&owner(n), 0).is_some()));
        }
    });
    assert!(store.trouble().is_some() && store.counts().failed > counts.failed);
    assert_eq!((store.len(), store.pending()), (0, 20));
    disk.set_faults(Faults::default(), 2);
    store.flush().unwrap();
    assert_eq!((store.trouble(), store.pending()), (None, 0));
    for n in 0..253 {
        store.lease(&owner(n), &sets, &[], Facts::default(), 0).unwrap();
    }
    assert_eq!(Store::with_disk(disk.after_power_loss(&mut Rng(3)).boxed()).unwrap().len(), 253);
}

#[test]
fn readers_do_not_wait_for_the_disk() {
    let disk = Sim::default();
    let store = Store::with_disk(disk.boxed()).unwrap();
    disk.hold_syncs(true);
    thread::scope(|scope| {
        scope.spawn(|| store.lease(&owner(1), &set("10.0.0.0/24"), &[], Facts::default(), 0).unwrap());
        while !disk.syncs_are_held() {
            thread::yield_now();
        }
        assert!(store.is_empty() && store.get(&owner(1)).is_none(), "not before it is durable");
        // Nor can it be leased a second time meanwhile.
        let again = store.lease(&owner(1), &set("10.0.0.0/24"), &[], Facts::default(), 0);
        assert!(matches!(again, Err(LeaseError::Exists { .. })));
        disk.hold_syncs(false);
    });
    assert_eq!(store.len(), 1);
}
