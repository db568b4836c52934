//! The store against the plainest implementation of host-local's rules: one address tried after the other.

#![allow(clippy::unwrap_used, reason = "tests")]

mod sim;

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;
use sim::Sim;
use weft_ipam::{Facts, LeaseError, Owner, Range, RangeSet, Store};

#[derive(Debug, Clone)]
enum Step {
    Lease { owner: u8, pool: bool, requested: Vec<IpAddr> },
    Release { owner: u8 },
    Compact,
    Reopen,
}

fn sets() -> [RangeSet; 2] {
    let range = |subnet: &str, start: Option<&str>, end: Option<&str>, gateway: Option<&str>| {
        let address = |a: Option<&str>| a.map(|a| a.parse().unwrap());
        Range::new(subnet.parse().unwrap(), address(start), address(end), address(gateway)).unwrap()
    };
    let v4 = vec![
        range("10.0.0.0/29", None, None, None),
        range("10.0.1.0/28", Some("10.0.1.5"), Some("10.0.1.9"), Some("10.0.1.7")),
        range("10.0.0.128/30", None, None, Some("10.0.0.130")),
    ];
    [RangeSet::new(v4).unwrap(), RangeSet::new(vec![range("fd00::/124", None, None, Some("fe80::1"))]).unwrap()]
}

/// Every address of the sets in order, gateways left out, written down by hand.
fn order() -> [Vec<IpAddr>; 2] {
    let v4 = |prefix: [u8; 3], last: &[u8]| {
        last.iter().map(|n| IpAddr::from(Ipv4Addr::new(prefix[0], prefix[1], prefix[2], *n))).collect::<Vec<_>>()
    };
    let first = [v4([10, 0, 0], &[2, 3, 4, 5, 6]), v4([10, 0, 1], &[5, 6, 8, 9]), v4([10, 0, 0], &[129])].concat();
    let second = (1..=15).map(|n| IpAddr::from(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, n))).collect();
    [first, second]
}

#[derive(Default)]
struct Model {
    leases: BTreeMap<Owner, (String, Vec<IpAddr>)>,
    last: HashMap<(String, usize), IpAddr>,
}

impl Model {
    fn lease(&mut self, owner: &Owner, pool: &str, requested: &[IpAddr]) -> Option<Vec<IpAddr>> {
        if self.leases.contains_key(owner) {
            return None;
        }
        let taken = |a: &IpAddr| self.leases.values().any(|(other, leased)| other == pool && leased.contains(a));
        let mut left: Vec<IpAddr> = requested.to_vec();
        let mut given = Vec::new();
        for (index, order) in order().iter().enumerate() {
            let asked = left.iter().position(|a| order.contains(a)).map(|at| left[at]);
            left.retain(|a| Some(*a) != asked);
            let after = self.last.get(&(pool.to_owned(), index)).and_then(|l| order.iter().position(|a| a == l));
            let start = after.map_or(0, |at| at + 1);
            let address = match asked {
                Some(address) => Some(address).filter(|a| !taken(a)),
                None => (0..order.len()).map(|i| order[(start + i) % order.len()]).find(|a| !taken(a)),
            };
            given.push(address?);
        }
        if !left.is_empty() {
            return None;
        }
        for (index, address) in given.iter().enumerate() {
            self.last.insert((pool.to_owned(), index), *address);
        }
        self.leases.insert(owner.clone(), (pool.to_owned(), given.clone()));
        Some(given)
    }
}

fn owner(n: u8) -> Owner {
    Owner { network: format!("net{}", n % 2), container: format!("c{n}"), ifname: "eth0".into() }
}

fn step() -> impl Strategy<Value = Step> {
    let v4 = (0_u8..20).prop_map(|n| IpAddr::from(Ipv4Addr::new(10, 0, n / 16, n % 16)));
    let v6 = (0_u16..18).prop_map(|n| IpAddr::from(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, n)));
    let requested = prop_oneof![
        4 => Just(vec![]),
        1 => prop::collection::vec(prop_oneof![v4, v6], 1..3),
    ];
    prop_oneof![
        8 => (0_u8..24, prop::bool::weighted(0.2), requested)
            .prop_map(|(owner, pool, requested)| Step::Lease { owner, pool, requested }),
        4 => (0_u8..24).prop_map(|owner| Step::Release { owner }),
        1 => Just(Step::Compact),
        1 => Just(Step::Reopen),
    ]
}

fn compare(store: &Store, model: &Model) -> Result<(), TestCaseError> {
    prop_assert_eq!(store.len(), model.leases.len());
    for (record, (owner, (pool, addresses))) in store.records().iter().zip(&model.leases) {
        prop_assert_eq!(&record.owner, owner);
        prop_assert_eq!(&record.facts.pool, pool);
        prop_assert_eq!(&record.addresses().collect::<Vec<_>>(), addresses);
        prop_assert_eq!(store.get(owner), Some(record.clone()));
        for address in addresses {
            prop_assert_eq!(store.by_address(pool, *address), Some(record.clone()));
        }
    }
    for pool in ["", "other"] {
        for (set, order) in sets().iter().zip(order()) {
            let usage = set.ranges().iter().map(|r| store.usage(pool, r));
            let (leased, size) = usage.fold((0, 0), |(l, s), u| (l + u.leased, s + u.size));
            let there = |a: &&IpAddr| model.leases.values().any(|(p, leased)| p == pool && leased.contains(a));
            prop_assert_eq!((leased, size), (order.iter().filter(there).count() as u64, order.len() as u64));
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_store_gives_what_host_local_would_give(steps in prop::collection::vec(step(), 1..120)) {
        let mut disk = Sim::default();
        let mut store = Store::with_disk(disk.boxed()).unwrap();
        let mut model = Model::default();
        for (time, step) in steps.into_iter().enumerate() {
            match step {
                Step::Lease { owner: n, pool, requested } => {
                    let pool = if pool { "other" } else { "" };
                    let expected = model.lease(&owner(n), pool, &requested);
                    let facts = Facts { pool: pool.into(), time: time as u64, ..Facts::default() };
                    match store.lease(&owner(n), &sets(), &requested, facts.clone(), 0) {
                        Ok(record) => {
                            prop_assert_eq!(Some(record.addresses().collect()), expected);
                            prop_assert_eq!(record.facts.clone(), facts);
                        }
                        Err(e) => prop_assert_eq!(None, expected, "{}", e),
                    }
                }
                Step::Release { owner: n } => {
                    let released = store.release(&owner(n), 0).map(|r| r.addresses().collect::<Vec<_>>());
                    prop_assert_eq!(released, model.leases.remove(&owner(n)).map(|(_, a)| a));
                }
                Step::Compact => store.compact().unwrap(),
                Step::Reopen => {
                    disk = disk.after_kill();
                    store = Store::with_disk(disk.boxed()).unwrap();
                }
            }
            compare(&store, &model)?;
        }
    }
}

fn plain(subnet: &str) -> RangeSet {
    Range::whole(subnet.parse().unwrap()).unwrap().into()
}

fn numbered(n: u32) -> Owner {
    Owner { network: "n".into(), container: n.to_string(), ifname: "eth0".into() }
}

#[test]
fn a_slash_16_fills_to_the_last_address_and_a_hole_anywhere_is_found() {
    let store = Store::with_disk(Sim::default().boxed()).unwrap();
    let sets = [plain("10.1.0.0/16")];
    for n in 0..65_533 {
        let record = store.lease(&numbered(n), &sets, &[], Facts::default(), 0).unwrap();
        assert_eq!(record.leases[0].address, IpAddr::from(Ipv4Addr::from(0x0a01_0002 + n)));
    }
    let error = store.lease(&numbered(70_000), &sets, &[], Facts::default(), 0).unwrap_err();
    assert!(matches!(error, LeaseError::Exhausted { leased: 65_533, .. }), "{error}");
    assert!(error.to_string().contains("10.1.0.0/16: 65533 are leased"), "{error}");
    for n in (0..2000).map(|n| n * 7919 % 65_533) {
        let released = store.release(&numbered(n), 0).unwrap();
        let again = store.lease(&numbered(n), &sets, &[], Facts::default(), 0).unwrap();
        assert_eq!(again.leases, released.leases);
    }
}

#[test]
fn a_slash_64_goes_round_without_walking() {
    let store = Store::with_disk(Sim::default().boxed()).unwrap();
    let sets = [plain("fd00::/64")];
    let top: IpAddr = "fd00::ffff:ffff:ffff:fffe".parse().unwrap();
    store.lease(&numbered(0), &sets, &[top], Facts::default(), 0).unwrap();
    let next: Vec<String> = (1..4)
        .map(|n| store.lease(&numbered(n), &sets, &[], Facts::default(), 0).unwrap().leases[0].cidr().to_string())
        .collect();
    assert_eq!(next, ["fd00::ffff:ffff:ffff:ffff/64", "fd00::2/64", "fd00::3/64"]);
    let usage = store.usage("", &sets[0].ranges()[0]);
    assert_eq!((usage.leased, usage.size), (4, u64::MAX - 1));
}

#[test]
fn what_is_refused_is_refused_by_name_and_changes_nothing() {
    let store = Store::with_disk(Sim::default().boxed()).unwrap();
    let sets = [plain("10.0.0.0/24"), plain("fd00::/64")];
    let ip = |a: &str| a.parse::<IpAddr>().unwrap();
    store.lease(&numbered(1), &sets, &[ip("10.0.0.9")], Facts::default(), 0).unwrap();
    let refuse = |sets: &[RangeSet], requested: &[IpAddr], labels: usize| {
        let labels = BTreeMap::from([("l".to_owned(), "x".repeat(labels))]);
        let length = store.journal_len();
        let facts = Facts { labels, ..Facts::default() };
        let error = store.lease(&numbered(2), sets, requested, facts, 0).unwrap_err();
        assert_eq!((store.len(), store.journal_len()), (1, length));
        error
    };
    assert!(matches!(refuse(&[], &[], 0), LeaseError::NoRanges));
    assert!(matches!(refuse(&[sets[0].clone(), sets[0].clone()], &[], 0), LeaseError::Overlap { .. }));
    assert!(matches!(refuse(&sets, &[ip("10.0.0.1")], 0), LeaseError::Gateway { .. }));
    let taken = refuse(&sets, &[ip("::ffff:10.0.0.9")], 0).to_string();
    assert_eq!(taken, "the requested 10.0.0.9 is leased to n/1/eth0");
    for leftover in
        [vec!["10.0.0.7", "10.0.0.8"], vec!["10.0.1.1"], vec!["10.0.0.0"], vec!["10.0.0.255"], vec!["fd00::"]]
    {
        let requested: Vec<IpAddr> = leftover.iter().map(|a| ip(a)).collect();
        assert!(matches!(refuse(&sets, &requested, 0), LeaseError::NotInRange { addresses, .. }
            if addresses == requested[requested.len() - 1..]));
    }
    assert!(matches!(refuse(&sets, &[], weft_ipam::MAX_PAYLOAD), LeaseError::TooLarge { .. }));
    // All or nothing: the second set is full, so the first gives nothing either.
    let full = [plain("10.9.0.0/24"), plain("10.8.0.0/30")];
    store.lease(&numbered(3), &full[1..], &[], Facts::default(), 0).unwrap();
    let error = store.lease(&numbered(4), &full, &[], Facts::default(), 0).unwrap_err();
    assert!(matches!(error, LeaseError::Exhausted { leased: 1, .. }));
    assert_eq!(store.usage("", &full[0].ranges()[0]).leased, 0);
    let error = store.lease(&numbered(1), &sets, &[], Facts::default(), 0).unwrap_err();
    assert!(error.to_string().starts_with("n/1/eth0 has a lease already (10.0.0.9, fd00::2)"), "{error}");
}

#[test]
fn the_journal_of_a_busy_node_stays_short_by_itself() {
    let disk = Sim::default();
    let store = Store::with_disk(disk.boxed()).unwrap();
    let sets = [plain("10.0.0.0/24")];
    let labels = BTreeMap::from([("l".to_owned(), "x".repeat(4000))]);
    for n in 0..3000 {
        store.lease(&numbered(n), &sets, &[], Facts { labels: labels.clone(), ..Facts::default() }, 0).unwrap();
        if n >= 100 {
            store.release(&numbered(n - 100), 0).unwrap();
        }
        assert!(store.journal_len() < 2 * weft_ipam::COMPACT_STEP + (1 << 16));
    }
    assert_eq!(disk.journal().unwrap().len() as u64, store.journal_len());
    assert_eq!(Store::with_disk(disk.after_kill().boxed()).unwrap().len(), 100);
}
