//! Freed addresses rest, by a clock that no date changes and that a boot starts again.

#![allow(clippy::unwrap_used, reason = "tests")]

mod sim;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use sim::Sim;
use weft_ipam::{Facts, LeaseError, Owner, Range, RangeSet, Record, Rules, Store, Usage};

const REST: u64 = 30_000;

fn range() -> Range {
    Range::whole("10.0.0.0/29".parse().unwrap()).unwrap()
}

fn owner(n: u64) -> Owner {
    Owner { network: "net".into(), container: format!("pod{n}"), ifname: "eth0".into() }
}

fn open(disk: &Sim) -> Store {
    let store = Store::with_disk(disk.boxed()).unwrap();
    store.set_rules(Rules { rest: Duration::from_millis(REST), ..Rules::default() });
    store
}

fn lease(store: &Store, n: u64, now: u64) -> Result<IpAddr, LeaseError> {
    let sets: [RangeSet; 1] = [range().into()];
    store.lease(&owner(n), &sets, &[], Facts::default(), now).map(|record: Arc<Record>| record.leases[0].address)
}

fn resting(store: &Store) -> Vec<(IpAddr, u64)> {
    store.read(|leases| leases.resting().map(|(_, address, since)| (address, since)).collect())
}

fn ip(last: u8) -> IpAddr {
    [10, 0, 0, last].into()
}

#[test]
fn a_freed_address_is_given_again_when_it_has_rested_or_nothing_else_is_left() {
    let store = open(&Sim::default());
    store.begin_boot("b", 0).unwrap();
    assert_eq!((2..=4).map(|n| lease(&store, n, 0).unwrap()).collect::<Vec<_>>(), [ip(2), ip(3), ip(4)]);
    store.release(&owner(3), 1000);
    store.release(&owner(2), 2000);
    assert_eq!(store.usage("", &range()), Usage { leased: 1, resting: 2, reserved: 0, size: 5 });
    // Five and six are left; then the one that has rested longest is given rather than none.
    assert_eq!([lease(&store, 5, 2000).unwrap(), lease(&store, 6, 2000).unwrap()], [ip(5), ip(6)]);
    assert_eq!(lease(&store, 7, 2001).unwrap(), ip(3));
    assert_eq!(store.counts().woken, 1);
    // Whoever asks for a certain one gets it.
    let asked = store.lease(&owner(8), &[range().into()], &[ip(2)], Facts::default(), 2001).unwrap();
    assert_eq!(asked.leases[0].address, ip(2));
    assert!(matches!(lease(&store, 9, 2001), Err(LeaseError::Exhausted { leased: 5, .. })));
    assert_eq!(store.counts().exhausted, 1);

    // Rested, it comes in its turn.
    for n in [4, 5, 7] {
        store.release(&owner(n), 10_000);
    }
    assert_eq!(store.usage("", &range()).resting, 3);
    assert_eq!(lease(&store, 4, 10_000 + REST).unwrap(), ip(3));
    assert_eq!(store.usage("", &range()).resting, 0);
}

#[test]
fn a_rest_goes_on_after_a_restart_and_begins_anew_after_a_boot() {
    let mut disk = Sim::default();
    let store = open(&disk);
    store.begin_boot("first", 500).unwrap();
    for n in 2..=6 {
        lease(&store, n, 1000).unwrap();
    }
    store.release(&owner(2), 2000);
    store.release(&owner(3), 3000);
    for compacted in [false, true] {
        if compacted {
            store.compact().unwrap();
        }
        let copy = disk.after_kill();
        let store = open(&copy);
        store.begin_boot("first", 4000).unwrap();
        assert_eq!(resting(&store), [(ip(2), 2000), (ip(3), 3000)]);
        // Both are there; by the round it would be two's turn in any case, so let it be three that is asked for by its rest.
        assert_eq!(store.usage("", &range()), Usage { leased: 3, resting: 2, reserved: 0, size: 5 });
    }
    drop(store);
    // A boot: this clock says less than what was written down by the other one, and an unknown boot is another one each time.
    for id in ["second", "", ""] {
        disk = disk.after_kill();
        let store = open(&disk);
        store.begin_boot(id, 700).unwrap();
        assert_eq!(resting(&store), [(ip(2), 700), (ip(3), 700)]);
    }
}

#[test]
fn no_clock_makes_it_expire_early() {
    let year = 365 * 86_400_000;
    let store = open(&Sim::default());
    store.begin_boot("b", 2 * year).unwrap();
    for n in 2..=4 {
        lease(&store, n, 2 * year).unwrap();
    }
    store.release(&owner(2), 2 * year);
    // Whatever it says then, forwards by less than the rest or backwards by years: it goes on resting. Wall clocks are not asked at all.
    for (n, now) in [0, year, 2 * year - 1, 2 * year + REST - 1].into_iter().enumerate() {
        let other = 10 + n as u64;
        assert_ne!(lease(&store, other, now).unwrap(), ip(2));
        assert!(resting(&store).contains(&(ip(2), 2 * year)));
        store.release(&owner(other), 0);
        store.set_rules(Rules { rest: Duration::from_millis(REST), ..Rules::default() });
    }
}

#[test]
fn fifty_boots_with_a_hundred_pods_in_a_slash_25_leave_the_leases_of_the_living() {
    let mut disk = Sim::default();
    let sets: [RangeSet; 1] = [Range::whole("10.0.0.0/25".parse().unwrap()).unwrap().into()];
    for boot in 0..50 {
        let store = open(&disk);
        store.begin_boot(&format!("boot {boot}"), 10).unwrap();
        for record in store.records().iter().filter(|record| record.facts.boot != format!("boot {boot}")) {
            store.release(&record.owner, 10);
        }
        for pod in 0..100 {
            let facts = Facts { boot: format!("boot {boot}"), ..Facts::default() };
            store.lease(&owner(boot * 1000 + pod), &sets, &[], facts, 20).unwrap();
        }
        assert_eq!(store.len(), 100);
        disk = disk.after_power_loss(&mut sim::Rng(boot));
        assert_eq!(open(&disk).len(), 100);
    }
}

#[test]
fn what_is_reserved_is_never_given() {
    let store = open(&Sim::default());
    let rules = |reserved: &[&str]| Rules {
        rest: Duration::ZERO,
        reserved: reserved.iter().map(|net| net.parse().unwrap()).collect(),
    };
    store.set_rules(rules(&["10.0.0.4/32", "10.0.0.2/31"]));
    assert_eq!(store.usage("", &range()), Usage { leased: 0, resting: 0, reserved: 3, size: 2 });
    assert_eq!(lease(&store, 1, 0).unwrap(), ip(5));
    let asked = store.lease(&owner(2), &[range().into()], &[ip(3)], Facts::default(), 0);
    assert!(matches!(asked, Err(LeaseError::Reserved { address }) if address == ip(3)));
    assert_eq!(lease(&store, 2, 0).unwrap(), ip(6));
    assert!(matches!(lease(&store, 3, 0), Err(LeaseError::Exhausted { leased: 2, .. })));
    // A lease of before stays; once it is freed, the address is reserved, although it rests.
    store.set_rules(rules(&["0.0.0.0/0", "::/0"]));
    store.release(&owner(1), 0);
    assert!(lease(&store, 3, 0).is_err() && store.get(&owner(2)).is_some());
    store.set_rules(rules(&[]));
    assert_eq!(lease(&store, 3, 0).unwrap(), ip(2));
}

#[test]
fn leases_of_another_program_are_taken_over_as_they_are() {
    let disk = Sim::default();
    let store = open(&disk);
    let there = [ip(3), "fd00::3".parse().unwrap()];
    store.adopt(owner(1), &there, Facts::default()).unwrap();
    assert!(matches!(store.adopt(owner(1), &[ip(5)], Facts::default()), Err(LeaseError::Exists { .. })));
    assert!(matches!(store.adopt(owner(2), &[ip(3)], Facts::default()), Err(LeaseError::Taken { .. })));
    store.adopt_round("", ip(4)).unwrap();
    let store = open(&disk.after_kill());
    assert_eq!(store.get(&owner(1)).unwrap().addresses().collect::<Vec<_>>(), there);
    // The round goes on where the other program was.
    assert_eq!(
        [lease(&store, 2, 0).unwrap(), lease(&store, 3, 0).unwrap(), lease(&store, 4, 0).unwrap()],
        [ip(5), ip(6), ip(2)]
    );
    assert_eq!(lease(&store, 5, 0).unwrap(), ip(4));
    store.release(&owner(1), 0);
    assert_eq!(lease(&store, 6, REST).unwrap(), ip(3));
}
