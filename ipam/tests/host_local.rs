//! Folders of the real host-local plugin, filled by many processes at once that are killed on the way.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io::Write;
use std::net::IpAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use weft_ipam::{Facts, LeaseError, Owner, Range, RangeSet, Store, export, foreign, unknown_owner};

const PLUGINS: [&str; 2] = ["/usr/lib/cni/host-local", "/opt/cni/bin/host-local"];

fn plugin() -> &'static str {
    let found = PLUGINS.into_iter().find(|path| Path::new(path).exists());
    found.expect("this test runs the host-local plugin: apt-get install containernetworking-plugins")
}

/// Runs the plugin; its answer if it had time to give one.
fn run(command: &str, container: &str, data: &Path, kill_after: Option<Duration>) -> Option<Vec<IpAddr>> {
    let config = format!(
        r#"{{"cniVersion":"1.0.0","name":"pods","type":"bridge","ipam":{{"type":"host-local","dataDir":{:?},
        "ranges":[[{{"subnet":"10.9.0.0/23"}}],[{{"subnet":"fd00:9::/64"}}]]}}}}"#,
        data.to_str().unwrap()
    );
    let mut child = Command::new(plugin())
        .envs([("CNI_COMMAND", command), ("CNI_CONTAINERID", container), ("CNI_IFNAME", "eth0")])
        .envs([("CNI_NETNS", "/proc/self/ns/net"), ("CNI_PATH", "/usr/lib/cni")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let _ = child.stdin.take().unwrap().write_all(config.as_bytes());
    if let Some(after) = kill_after {
        thread::sleep(after);
        child.kill().unwrap();
    }
    let output = child.wait_with_output().unwrap();
    if !output.status.success() {
        return None;
    }
    let text = String::from_utf8(output.stdout).unwrap();
    // "address": "10.9.0.2/23"
    let addresses = text.split("\"address\": \"").skip(1).map(|rest| rest.split('/').next().unwrap().parse().unwrap());
    Some(addresses.collect())
}

/// Eight at a time, killed at random. Who was answered what and not removed, and who may have something without an answer.
fn load(folder: &Path) -> (BTreeMap<String, Vec<IpAddr>>, BTreeSet<String>) {
    let (answered, unsure) = (Mutex::new(BTreeMap::new()), Mutex::new(BTreeSet::new()));
    thread::scope(|scope| {
        for thread in 0..8_u64 {
            let (answered, unsure, folder) = (&answered, &unsure, folder);
            scope.spawn(move || {
                for round in 0..25_u64 {
                    let container = format!("c{thread}-{round}");
                    let kill = (round % 3 == 1).then(|| Duration::from_micros((thread * 7919 + round * 1049) % 6000));
                    match run("ADD", &container, folder, kill) {
                        Some(addresses) => drop(answered.lock().unwrap().insert(container.clone(), addresses)),
                        None => drop(unsure.lock().unwrap().insert(container.clone())),
                    }
                    if round % 5 == 4 {
                        let gone = format!("c{thread}-{}", round - 2);
                        let had = answered.lock().unwrap().remove(&gone);
                        if run("DEL", &gone, folder, (thread % 2 == 0).then_some(Duration::from_micros(900))).is_none()
                        {
                            unsure.lock().unwrap().extend(had.map(|_| gone));
                        }
                    }
                }
            });
        }
    });
    (answered.into_inner().unwrap(), unsure.into_inner().unwrap())
}

#[test]
fn a_folder_written_under_load_and_killed_at_random_loses_and_doubles_no_address() {
    let folder = tempfile::tempdir().unwrap();
    let (answered, mut unsure) = load(folder.path());
    // What a crash leaves without a sync, and what old versions wrote.
    let network = folder.path().join("pods");
    fs::write(network.join("10.9.1.250"), "").unwrap();
    fs::write(network.join("10.9.1.251"), "old-container").unwrap();
    unsure.insert("old-container".into());
    assert!(answered.len() > 80, "{}", answered.len());

    let found = foreign(&network, "pods").unwrap();
    assert_eq!(found.passed_over, Vec::<String>::new());
    let store = Store::open(folder.path().join("store")).unwrap();
    let all = found.owners.iter().map(|(owner, a)| (owner.clone(), a.iter().copied().collect(), Facts::default()));
    store.adopt_all(all.collect()).unwrap();
    for address in &found.unknown {
        store
            .adopt(unknown_owner(*address), &[*address], Facts { labels: found.labels(), ..Facts::default() })
            .unwrap();
    }
    for last in &found.rounds {
        store.adopt_round("", *last).unwrap();
    }
    // Nothing is lost: who was answered has just that.
    for (container, addresses) in &answered {
        let owner = Owner { network: "pods".into(), container: container.clone(), ifname: "eth0".into() };
        let has: BTreeSet<IpAddr> =
            store.get(&owner).unwrap_or_else(|| panic!("{owner} is lost")).addresses().collect();
        assert_eq!(has, addresses.iter().copied().collect(), "{owner}");
    }
    // Nothing comes from nowhere.
    for record in store.records() {
        let container = &record.owner.container;
        assert!(
            answered.contains_key(container) || unsure.contains(container) || container == "unknown",
            "{}",
            record.owner
        );
    }
    // Nothing is doubled: the rest of the range goes to others, every address once.
    let files = || fs::read_dir(&network).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let taken: BTreeSet<IpAddr> = files().filter_map(|name| name.parse().ok()).collect();
    let set: [RangeSet; 1] = [Range::whole("10.9.0.0/23".parse().unwrap()).unwrap().into()];
    let mut given = HashMap::new();
    for n in 0.. {
        let owner = Owner { network: "weft".into(), container: format!("new{n}"), ifname: "eth0".into() };
        match store.lease(&owner, &set, &[], Facts::default(), 0) {
            Ok(record) => assert_eq!(given.insert(record.leases[0].address, n), None),
            Err(LeaseError::Exhausted { .. }) => break,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(given.keys().all(|address| !taken.contains(address)));
    assert_eq!(given.len() + taken.iter().filter(|a| a.is_ipv4()).count(), 509);

    // And back: what was read is what is written.
    let back = folder.path().join("back/pods");
    store.read(|leases| export(leases, "pods", &back)).unwrap();
    let again = foreign(&back, "pods").unwrap();
    assert_eq!((&again.owners, &again.unknown), (&found.owners, &found.unknown));
    for (container, _) in answered.iter().take(1) {
        let file = |folder: &Path| fs::read(folder.join(answered[container][0].to_string())).unwrap();
        assert_eq!(file(&back), file(&network));
    }
    // host-local goes on with it.
    assert!(run("ADD", "after", &folder.path().join("back"), None).is_some());
}

#[test]
fn what_is_no_folder_of_host_locals_is_passed_over_and_an_export_overwrites_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, content: &[u8]| fs::write(folder.path().join(name), content).unwrap();
    write("10.0.0.2", b"abc\r\neth0");
    write("10.0.0.3", b"abc\neth0\n");
    write("fd00::2", b"abc\r\neth0");
    write("10.0.0.4", &[0xff; 40]);
    write("10.0.0.5", &[b'x'; 9000]);
    write("10.0.0.6", b"id\r\nan-interface-of-too-long-a-name");
    write("last_reserved_ip.1", b"fd00::2");
    write("last_reserved_ip.0", b"10.0.0.6");
    write("last_reserved_ip.2", b"nonsense");
    write("lock", b"");
    write("README", b"x");
    fs::create_dir(folder.path().join("10.0.0.9")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", folder.path().join("10.0.0.8")).unwrap();
    let found = foreign(folder.path(), "net").unwrap();
    let ips = |texts: &[&str]| texts.iter().map(|t| t.parse().unwrap()).collect::<BTreeSet<IpAddr>>();
    let owner = Owner { network: "net".into(), container: "abc".into(), ifname: "eth0".into() };
    assert_eq!(found.owners, BTreeMap::from([(owner.clone(), ips(&["10.0.0.2", "10.0.0.3", "fd00::2"]))]));
    assert_eq!(found.unknown, ips(&["10.0.0.4", "10.0.0.5", "10.0.0.6"]));
    assert_eq!(found.rounds, ["10.0.0.6", "fd00::2"].map(|a| a.parse::<IpAddr>().unwrap()));
    assert_eq!(found.passed_over, ["10.0.0.8", "10.0.0.9", "README"]);

    let store = Store::open(folder.path().join("store")).unwrap();
    store.adopt(owner, &["10.0.0.4".parse().unwrap()], Facts::default()).unwrap();
    let error = store.read(|leases| export(leases, "net", folder.path())).unwrap_err();
    assert!(error.to_string().contains("names another owner"), "{error}");
    assert_eq!(fs::read(folder.path().join("10.0.0.4")).unwrap(), [0xff; 40]);
}
