//! The store on a real file system: lock, permissions, processes that are killed, limits that are hit.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use weft_ipam::{
    Facts, JOURNAL_FILE, LOCK_FILE, LeaseError, Netns, OpenError, Owner, Range, RangeSet, Store, StoreError,
};

fn sets() -> [RangeSet; 2] {
    [
        Range::whole("10.0.0.0/20".parse().unwrap()).unwrap().into(),
        Range::whole("fd00::/64".parse().unwrap()).unwrap().into(),
    ]
}

fn owner(n: u64) -> Owner {
    Owner { network: "net".into(), container: format!("pod{n}"), ifname: "eth0".into() }
}

#[test]
fn a_second_writer_is_refused_by_the_pid_of_the_first_and_readers_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a/b");
    assert!(Store::read_only(&path).unwrap().0.is_empty());
    let store = Store::open(&path).unwrap();
    let record = store.lease(&owner(1), &sets(), &[], Facts::default(), 0).unwrap();
    let error = Store::open(&path).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, OpenError::Locked { pid: Some(pid), .. } if pid == std::process::id()), "{text}");
    assert!(text.contains(path.to_str().unwrap()), "{text}");
    let (leases, recovery) = Store::read_only(&path).unwrap();
    assert_eq!((leases.get(&owner(1)), recovery), (Some(&record), None));
    for (name, mode) in [("", 0o700), (JOURNAL_FILE, 0o600), (LOCK_FILE, 0o600)] {
        assert_eq!(fs::metadata(path.join(name)).unwrap().permissions().mode() & 0o777, mode, "{name}");
    }
    drop(store);
    assert_eq!(Store::open(&path).unwrap().get(&owner(1)), Some(record));
}

#[test]
fn everything_that_came_with_a_lease_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let facts = Facts {
        pool: "other".into(),
        time: u64::MAX,
        mac: Some([2, 0, 0, 0, 0, 7]),
        boot: "0a1b".into(),
        netns: Some(Netns { cookie: u64::MAX, inode: 4_026_532, number: None }),
        labels: BTreeMap::from([("pod".into(), "wörk\0er".into()), (String::new(), String::new())]),
    };
    let store = Store::open(folder.path()).unwrap();
    let record = store.lease(&owner(1), &sets(), &[], facts.clone(), 0).unwrap();
    assert_eq!(record.facts, facts);
    drop(store);
    let store = Store::open(folder.path()).unwrap();
    assert_eq!(store.get(&owner(1)), Some(record.clone()));
    store.compact().unwrap();
    drop(store);
    assert_eq!(Store::read_only(folder.path()).unwrap().0.get(&owner(1)), Some(&record));
}

#[test]
fn a_journal_that_is_no_plain_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let elsewhere = folder.path().join("elsewhere");
    fs::write(&elsewhere, b"precious").unwrap();
    for make in [|link: &Path, to: &Path| symlink(to, link), |link: &Path, _: &Path| fs::create_dir(link)] {
        let path = tempfile::tempdir().unwrap();
        make(&path.path().join(JOURNAL_FILE), &elsewhere).unwrap();
        assert!(matches!(Store::open(path.path()), Err(OpenError::Io { action: "read", .. })));
        assert!(Store::read_only(path.path()).is_err());
    }
    assert_eq!(fs::read(&elsewhere).unwrap(), b"precious");
}

/// What a child says it has done, up to its end.
fn said(child: &mut Child, until: impl Fn(usize) -> bool) -> Vec<String> {
    let mut lines = Vec::new();
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        if let Some(at) = line.find("@ ") {
            lines.push(line[at + 2..].to_owned());
        }
        if until(lines.len()) {
            child.kill().unwrap();
        }
    }
    child.wait().unwrap();
    lines
}

fn child(shell: &str, folder: &Path) -> Child {
    // A test of this file as a program: see `leasing_and_releasing_leaves_nothing`.
    let arguments = "--exact leasing_and_releasing_leaves_nothing --nocapture";
    Command::new("sh")
        .arg("-c")
        .arg(format!("{shell} exec \"$0\" {arguments}"))
        .arg(std::env::current_exe().unwrap())
        .env("WEFT_IPAM_TEST_FOLDER", folder)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Who has which address by what was said.
fn replayed(lines: &[String]) -> BTreeMap<String, IpAddr> {
    let mut leases = BTreeMap::new();
    for line in lines {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["leased", pod, address] => drop(leases.insert(pod.to_owned(), address.parse().unwrap())),
            ["releasing", pod] => drop(leases.remove(pod)),
            _ => {}
        }
    }
    leases
}

#[test]
fn what_a_killed_process_acknowledged_is_there() {
    for round in 0..20 {
        let folder = tempfile::tempdir().unwrap();
        let lines = said(&mut child("", folder.path()), |n| n >= 20 + round * 17);
        assert!(lines.len() >= 20);
        let store = Store::open(folder.path()).expect("the lock ended with the process");
        for (pod, address) in replayed(&lines) {
            let record = store.by_address("", address).unwrap_or_else(|| panic!("{address} of {pod} is lost"));
            assert_eq!(record.owner.container, pod);
        }
    }
}

#[test]
fn a_file_that_may_not_grow_fails_leases_only() {
    let folder = tempfile::tempdir().unwrap();
    // 8 blocks of 512 or 1024 bytes, by the shell; the signal that would come with it is ignored.
    let lines = said(&mut child("trap '' XFSZ; ulimit -f 8;", folder.path()), |_| false);
    let failed = lines.iter().find(|l| l.starts_with("failed")).expect("the limit is met");
    assert!(failed.contains("cannot write the lease journal"), "{failed}");
    assert_eq!(lines.last().map(String::as_str), Some("released all"));
    let store = Store::open(folder.path()).unwrap();
    assert!(store.recovery().is_none(), "the failed append was undone");
    let known = replayed(&lines[..lines.iter().position(|l| l == failed).unwrap()]);
    assert!(store.records().iter().all(|r| known.contains_key(&r.owner.container)));
}

/// By itself in a folder of its own; other tests run it as a child in theirs, and stop it on the way.
#[test]
fn leasing_and_releasing_leaves_nothing() {
    let own = tempfile::tempdir().unwrap();
    let folder = std::env::var_os("WEFT_IPAM_TEST_FOLDER").map_or(own.path().to_owned(), PathBuf::from);
    let mut out = std::io::stdout();
    let mut say = |line: String| writeln!(out, "@ {line}").and_then(|()| out.flush()).unwrap();
    let store = Store::open(folder).unwrap();
    for n in 0..2000 {
        match store.lease(&owner(n), &sets(), &[], Facts::default(), 0) {
            Ok(record) => say(format!("leased pod{n} {}", record.leases[0].address)),
            Err(LeaseError::Store(e @ StoreError::Io { .. })) => {
                assert!(store.get(&owner(n)).is_none());
                say(format!("failed {e}"));
                break;
            }
            Err(e) => panic!("{e}"),
        }
        if n % 3 == 0 {
            say(format!("releasing pod{}", n / 2));
            store.release(&owner(n / 2), 0);
        }
    }
    let owners: Vec<Owner> = store.records().iter().map(|r| r.owner.clone()).collect();
    for owner in &owners {
        assert!(store.release(owner, 0).is_some());
    }
    assert!(store.is_empty() && store.poisoned().is_none());
    say("released all".into());
}
