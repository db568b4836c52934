//! How long a pod waits for its network, and how many pods a node has room for.
//!
//! These tests measure, on a machine that may be doing other things: each holds figures of one run against each other,
//! leaves a margin, and measures again before it fails.

use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::Value;
use weft_tests::cluster::{Cluster, WeftNode};
use weft_tests::command::{eventually, run_with};
use weft_tests::machine::{binaries, binary, need, turn, unique};
use weft_tests::netns::Nameless;

/// How often a measurement is repeated before its result counts.
const TRIES: usize = 3;

/// Weft's ADD divided by that of the reference plugins, for each kind of port.
fn ratios(round: usize) -> Vec<(String, f64)> {
    let mut command = Command::new(binary("weft"));
    command.args(["bench", "--only", "attach", "--paths", "weft", "weft-xdp", "kernel", "--json", "-"]);
    command.args(["--name", &unique(format!("b{round}"))]).env("WEFT_BIN_DIR", binaries());
    let said = run_with(command, &[], Duration::from_secs(300)).must();
    let outcome: Value = serde_json::from_str(&said).unwrap();
    let rows = outcome["rows"].as_array().unwrap();
    let add = rows.iter().find(|row| row["name"] == "attach-add").unwrap();
    let kernel = add["ratios"].as_array().unwrap().iter().filter(|ratio| ratio["to"] == "kernel");
    kernel.map(|ratio| (ratio["path"].as_str().unwrap().to_owned(), ratio["median"].as_f64().unwrap())).collect()
}

#[test]
fn a_pod_waits_no_longer_than_with_the_reference_plugins() {
    let _turn = turn();
    need(&[("/usr/lib/cni/bridge", "containernetworking-plugins")]);
    let mut measured = Vec::new();
    for round in 0..TRIES {
        measured.push(ratios(round));
        let last = measured.last().unwrap();
        assert_eq!(last.len(), 2, "each kind of port is compared: {last:?}");
        // A TAP is moved into the pod, for which the kernel takes its time; a veth is made there.
        let limit = |path: &str| if path == "weft-xdp" { 0.6 } else { 0.9 };
        if last.iter().all(|(path, ratio)| *ratio < limit(path)) {
            return;
        }
    }
    panic!("ADD, divided by that of bridge and host-local: {measured:?}");
}

const PODS: usize = 1000;
/// Runtimes that work at the same time.
const RUNTIMES: usize = 8;
/// Pods that are attached one after the other, to be measured.
const MEASURED: usize = 20;

fn add(node: &WeftNode, number: usize, pod: &Nameless) -> Duration {
    let started = Instant::now();
    node.runtime.call("ADD", &format!("c{number}"), Some(&pod.path()), &Value::Null).must();
    started.elapsed()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// Does something for each of these numbers, by several runtimes at a time.
fn for_all(numbers: std::ops::Range<usize>, work: impl Fn(usize) + Sync) {
    let left = Mutex::new(numbers);
    std::thread::scope(|scope| {
        for _ in 0..RUNTIMES {
            scope.spawn(|| {
                loop {
                    let next = left.lock().unwrap().next();
                    let Some(number) = next else { break };
                    work(number);
                }
            });
        }
    });
}

#[test]
fn a_thousand_pods_fit_a_node_and_the_last_does_not_wait_for_each_of_the_others() {
    let _turn = turn();
    let cluster = Cluster::new("many");
    let config = cluster.config(1, "routed", "").replace("10.244.1.0/24", "10.244.0.0/20");
    let node = cluster.weft_node_of(1, &config, "");
    let daemon = node.daemon();
    let descriptors = daemon.descriptors();
    weft_tests::machine::raise_descriptor_limit(PODS as u64 + 1024);
    let pods: Vec<Nameless> = (0..PODS).map(|_| Nameless::new()).collect();
    let one_by_one = |numbers: std::ops::Range<usize>| median(numbers.map(|n| add(&node, n, &pods[n])).collect());
    let first = one_by_one(0..MEASURED);
    for_all(MEASURED..PODS - TRIES * MEASURED, |number| {
        add(&node, number, &pods[number]);
    });
    let last = (0..TRIES).map(|round| {
        let from = PODS - (TRIES - round) * MEASURED;
        one_by_one(from..from + MEASURED)
    });
    let last: Vec<Duration> = last.collect();
    println!("ADD with the first {MEASURED} pods: {first:?}; with the last: {last:?}");
    let (leases, status) = (daemon.leases(), daemon.status());
    assert_eq!((leases.len(), status.pods), (2 * PODS, PODS));
    let resident = daemon.resident_kib();
    println!("{resident} KiB with {PODS} pods");
    assert!(resident < (64 << 10) + PODS as u64 * 256, "{resident} KiB");
    pods[0].exec("ping -n -c 1 -W 5 10.244.0.1").must();
    let both_ends = [&leases[0], &leases[leases.len() - 1]].map(|lease| lease.address);
    assert_ne!(both_ends[0], both_ends[1]);
    for_all(0..PODS, |number| {
        node.runtime.call("DEL", &format!("c{number}"), Some(&pods[number].path()), &Value::Null).must();
    });
    assert_eq!(daemon.leases().len(), 0);
    eventually("every descriptor of a pod is closed", Duration::from_secs(30), || {
        daemon.descriptors() <= descriptors + RUNTIMES
    });
    // What looks at every pod for each would be many times as long by now.
    let least = last.into_iter().min().unwrap();
    assert!(least < first * 5 + Duration::from_millis(50), "ADD took {first:?} at first, and {least:?} in the end");
}
