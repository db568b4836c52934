//! A journal with bytes that nobody wrote: refused, or reported, or unaffected; never a wrong address, never a panic.

#![allow(clippy::unwrap_used, reason = "tests")]

mod sim;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use sim::{Rng, Sim};
use weft_ipam::{Facts, OpenError, Owner, Range, RangeSet, Store};

type Past = BTreeSet<(Owner, Vec<IpAddr>)>;
type Truth = BTreeMap<Owner, Vec<IpAddr>>;

fn truth(store: &Store) -> Truth {
    store.records().iter().map(|r| (r.owner.clone(), r.addresses().collect())).collect()
}

fn owner(n: u64) -> Owner {
    Owner { network: "net".into(), container: format!("pod{n}"), ifname: "eth0".into() }
}

/// A journal with a compacted part and appended frames, and everything that was ever true after an append: (end of the
/// journal, leases).
fn journal(seed: u64) -> (Vec<u8>, Vec<(u64, Truth)>) {
    let (bytes, history, _) = journal_and_past(seed);
    (bytes, history)
}

/// The same, and whoever had which addresses at any time.
fn journal_and_past(seed: u64) -> (Vec<u8>, Vec<(u64, Truth)>, Past) {
    let mut past = BTreeSet::new();
    let set: RangeSet = Range::whole("10.0.0.0/26".parse().unwrap()).unwrap().into();
    let (disk, mut rng) = (Sim::default(), Rng(seed));
    let store = Store::with_disk(disk.boxed()).unwrap();
    let mut history = Vec::new();
    for step in 0..60 {
        let owner = owner(rng.below(30));
        if store.release(&owner, 0).is_none() {
            let labels = BTreeMap::from([("l".to_owned(), "wfrm".repeat(rng.below(60) as usize))]);
            store.lease(&owner, std::slice::from_ref(&set), &[], Facts { labels, ..Facts::default() }, 0).unwrap();
        }
        if step == 30 {
            store.compact().unwrap();
            history.clear();
        }
        history.push((store.journal_len(), truth(&store)));
        past.extend(truth(&store));
    }
    (disk.journal().unwrap(), history, past)
}

fn open(bytes: &[u8]) -> Result<Store, OpenError> {
    Store::with_disk(Sim::with_journal(bytes).boxed())
}

fn damage(bytes: &mut Vec<u8>, rng: &mut Rng) {
    let at = rng.below(bytes.len() as u64) as usize;
    let n = (rng.below(700) as usize + 1).min(bytes.len() - at);
    match rng.below(7) {
        0 => bytes[at] ^= 1 << rng.below(8),
        1 => bytes[at] = rng.next() as u8,
        2 => bytes[at..at + n].fill(0),
        3 => bytes[at..at + n].fill_with(|| rng.next() as u8),
        4 => drop(bytes.drain(at..at + n)),
        5 => {
            let copy = bytes[at..at + n].to_vec();
            let to = rng.below(bytes.len() as u64) as usize;
            bytes.splice(to..to, copy);
        }
        _ => {
            let length = bytes.len();
            bytes.extend((0..n).map(|_| rng.next() as u8).chain([0; 40]));
            bytes.drain(length..length + rng.below(n as u64) as usize);
        }
    }
}

#[test]
fn random_damage_is_refused_or_reported_or_harmless() {
    let (mut refused, mut reported, mut harmless) = (0, 0, 0);
    for seed in 0..40 {
        let (whole, history) = journal(seed);
        let (_, last) = history.last().unwrap();
        assert_eq!(&truth(&open(&whole).unwrap()), last);
        for run in 0..250 {
            let (mut bytes, mut rng) = (whole.clone(), Rng(seed << 32 | run));
            damage(&mut bytes, &mut rng);
            let begun = Instant::now();
            match open(&bytes) {
                Err(OpenError::Damaged { .. } | OpenError::Version { .. }) => refused += 1,
                Err(e) => panic!("seed {seed}, run {run}: {e}"),
                Ok(store) => {
                    let end = store.recovery().map_or(bytes.len() as u64, |r| r.offset);
                    let known = history.iter().find(|(at, _)| *at == end);
                    let (at, expected) = known.unwrap_or_else(|| panic!("seed {seed}, run {run}: ends at {end}"));
                    assert_eq!(&truth(&store), expected, "seed {seed}, run {run}");
                    assert!(store.recovery().is_some() || *at == bytes.len() as u64);
                    if store.recovery().is_some() { reported += 1 } else { harmless += 1 }
                }
            }
            assert!(begun.elapsed() < Duration::from_secs(5), "seed {seed}, run {run} takes too long");
        }
    }
    assert!(refused > 5000 && reported > 300, "{refused} {reported} {harmless}");
}

#[test]
fn a_torn_end_is_cut_off_and_reported_and_the_store_goes_on() {
    let (whole, history) = journal(99);
    let [.., (before, then), (end, _)] = &history[..] else { panic!() };
    for length in before + 1..*end {
        let disk = Sim::with_journal(&whole[..length as usize]);
        let store = Store::with_disk(disk.boxed()).unwrap();
        let recovery = store.recovery().unwrap();
        assert_eq!((recovery.offset, recovery.bytes), (*before, length - before));
        assert_eq!(&truth(&store), then);
        let set: RangeSet = Range::whole("10.1.0.0/26".parse().unwrap()).unwrap().into();
        store.lease(&owner(1000), &[set], &[], Facts::default(), 0).unwrap();
        let store = Store::with_disk(disk.after_power_loss(&mut Rng(length)).boxed()).unwrap();
        assert!(store.recovery().is_none() && store.get(&owner(1000)).is_some());
    }
}

#[test]
fn damage_in_the_middle_is_refused_with_its_offset_and_leaves_the_file_alone() {
    let (whole, history) = journal(5);
    let at = history[3].0;
    let mut bytes = whole.clone();
    bytes[at as usize + 30] ^= 1;
    let disk = Sim::with_journal(&bytes);
    let error = Store::with_disk(disk.boxed()).unwrap_err();
    assert!(matches!(error, OpenError::Damaged { offset, .. } if offset == at), "{error}");
    assert!(error.to_string().contains("weft ipam fsck"), "{error}");
    assert_eq!(disk.journal().unwrap(), bytes);

    // The end of what a compaction wrote is not the end of an append, even if nothing follows.
    let base = history[0].0 as usize;
    let error = open(&whole[..base - 1]).unwrap_err();
    assert!(matches!(error, OpenError::Damaged { .. }), "{error}");
}

#[test]
fn another_version_is_refused_whatever_the_file_holds() {
    let (mut bytes, _) = journal(1);
    bytes[8] = 3;
    let check = crc32fast::hash(&bytes[..32]).to_le_bytes();
    bytes[32..36].copy_from_slice(&check);
    let error = open(&bytes).unwrap_err();
    assert!(matches!(error, OpenError::Version { found: 3 }), "{error}");
    for bytes in [&b""[..], b"WEFTIPAM", &[0; 4096]] {
        assert!(matches!(open(bytes), Err(OpenError::Damaged { offset: 0, .. })));
    }
}

#[test]
fn a_journal_of_version_1_is_read_and_written_anew() {
    let (mut bytes, history) = journal(1);
    bytes[8] = 1;
    let check = crc32fast::hash(&bytes[..32]).to_le_bytes();
    bytes[32..36].copy_from_slice(&check);
    let disk = Sim::with_journal(&bytes);
    let store = Store::with_disk(disk.boxed()).unwrap();
    assert_eq!(&truth(&store), &history.last().unwrap().1);
    assert_eq!(disk.journal().unwrap()[8], weft_ipam::VERSION as u8);
}

#[test]
fn frames_made_to_be_slow_to_search_are_refused_in_time() {
    let (mut bytes, _) = journal(2);
    // Each of 8000 places claims to be a frame of 64 KiB whose checksum would have to be tried.
    let mut header = b"wfrm".to_vec();
    header.extend([0xff, 0xff, 0, 0]);
    bytes.extend(header.iter().cycle().take(60_000));
    let begun = Instant::now();
    let opened = open(&bytes);
    assert!(opened.is_err() || opened.unwrap().recovery().is_some());
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[test]
fn what_is_saved_was_true_once_and_no_address_is_there_twice() {
    let (mut lost, mut kept) = (0, 0);
    for seed in 0..40 {
        let (whole, _, past) = journal_and_past(seed);
        for run in 0..100 {
            let (mut bytes, mut rng) = (whole.clone(), Rng(seed << 32 | run));
            damage(&mut bytes, &mut rng);
            let checkup = weft_ipam::examine(&bytes).unwrap();
            assert_eq!(checkup.is_sound(), open(&bytes).is_ok(), "seed {seed}, run {run}");
            let mut seen = BTreeSet::new();
            for record in checkup.leases.iter() {
                let addresses: Vec<IpAddr> = record.addresses().collect();
                assert!(addresses.iter().all(|address| seen.insert(*address)), "seed {seed}, run {run}: twice");
                let unknown =
                    checkup.lost.contains(&addresses[0]) && record.owner == weft_ipam::lost_owner(addresses[0]);
                let before = past.contains(&(record.owner.clone(), addresses));
                assert!(unknown || before, "seed {seed}, run {run}: {} never had that", record.owner);
                lost += u64::from(unknown);
                kept += u64::from(before);
            }
        }
    }
    assert!(lost > 100 && kept > 20_000, "{lost} {kept}");
}

#[test]
fn a_repaired_store_opens_and_the_damaged_journal_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(weft_ipam::JOURNAL_FILE);
    assert_eq!(weft_ipam::check(folder.path()).unwrap().bytes, None);
    let (whole, history) = journal(3);
    std::fs::write(&path, &whole).unwrap();
    assert!(weft_ipam::check(folder.path()).unwrap().is_sound());
    assert_eq!(weft_ipam::repair(folder.path()).unwrap().1, None, "there is nothing to repair");

    // One byte of one lease in the middle.
    let mut bytes = whole.clone();
    bytes[history[3].0 as usize + 30] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    assert!(Store::open(folder.path()).is_err());
    let found = weft_ipam::check(folder.path()).unwrap();
    assert_eq!((found.is_sound(), found.missing, found.damage.is_empty()), (false, 1, false));
    assert_eq!(std::fs::read(&path).unwrap(), bytes, "looking changes nothing");
    let (_, kept) = weft_ipam::repair(folder.path()).unwrap();
    assert_eq!(std::fs::read(kept.unwrap()).unwrap(), bytes);
    let store = Store::open(folder.path()).unwrap();
    assert!(store.recovery().is_none() && store.len() + 2 >= history.last().unwrap().1.len());
    assert!(matches!(weft_ipam::repair(folder.path()), Err(OpenError::Locked { .. })), "not while somebody has it");
    drop(store);

    // Another version is none of our business.
    let mut bytes = whole;
    bytes[8] = 9;
    let check = crc32fast::hash(&bytes[..32]).to_le_bytes();
    bytes[32..36].copy_from_slice(&check);
    std::fs::write(&path, &bytes).unwrap();
    assert!(matches!(weft_ipam::repair(folder.path()), Err(OpenError::Version { found: 9 })));
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
}
