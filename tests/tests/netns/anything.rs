//! What runtimes do to a node, in any order and at its worst, with the real programs: pods come and go under the same ids, plugins are killed
//! half-way, the daemon is killed and started again. Whatever happened, in the end all of it can be deleted, and nothing is left.

use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use weft_tests::cluster::{Cluster, WeftNode};
use weft_tests::command::eventually;
use weft_tests::machine::{binary, turn};
use weft_tests::netns::OwnNetns;
use weft_tests::random::Random;

const PODS: usize = 6;
const STEPS: usize = 250;

/// A pod: its namespace, and whether its last ADD succeeded and nothing has happened since that may have undone it.
struct Pod {
    name: String,
    netns: OwnNetns,
    result: Option<Value>,
}

fn kind(random: &mut Random) -> Value {
    let port = random.pick(&["tap", "xdp"]);
    json!({ "port": port })
}

/// Starts the plugin and kills it after a moment, as a runtime does that has lost its patience.
fn call_and_kill(node: &WeftNode, command: &str, pod: &Pod, keys: &Value, after: Duration) {
    let mut plugin = Command::new(binary("weft-cni"));
    plugin.env_clear().env("CNI_COMMAND", command).env("CNI_CONTAINERID", &pod.name).env("CNI_IFNAME", "eth0");
    plugin.env("CNI_NETNS", pod.netns.path()).env("CNI_PATH", "/opt/cni/bin");
    plugin.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut plugin = plugin.spawn().unwrap();
    {
        use std::io::Write;
        let input = node.runtime.config(keys).to_string();
        let _ = plugin.stdin.take().unwrap().write_all(input.as_bytes());
    }
    std::thread::sleep(after);
    let _ = plugin.kill();
    plugin.wait().unwrap();
    // What has been begun goes on without it, and a DEL that waits for its turn may come after whatever is asked next.
    std::thread::sleep(Duration::from_millis(200));
}

fn step(node: &mut WeftNode, pods: &mut [Pod], random: &mut Random) {
    let valid: Vec<Value> = (0..pods.len())
        .filter(|_| random.below(2) == 0)
        .map(|index| json!({ "containerID": pods[index].name, "ifname": "eth0" }))
        .collect();
    let at = random.below(pods.len());
    let pod = &mut pods[at];
    match random.below(20) {
        0..=6 => {
            let answer = node.runtime.call("ADD", &pod.name, Some(&pod.netns.path()), &kind(random));
            match &pod.result {
                // What is known to be there is there once.
                Some(_) => assert!(!answer.success, "{} was attached twice: {}", pod.name, answer.json),
                None if answer.success => pod.result = Some(answer.json),
                // A plugin was killed in the middle: it may have been made all the same.
                None => {}
            }
        }
        7..=10 => {
            node.runtime.del(&pod.name, &pod.netns);
            pod.result = None;
        }
        11..=13 => {
            if let Some(result) = &pod.result {
                let checked = node.runtime.check(&pod.name, &pod.netns, result);
                assert!(checked.success, "{}: {}\n{}", pod.name, checked.json, node.log());
            }
        }
        14 => {
            node.runtime.call("GC", "", None, &json!({ "cni.dev/valid-attachments": valid })).must();
            pods.iter_mut().filter(|pod| !valid.iter().any(|kept| kept["containerID"] == pod.name)).for_each(|pod| {
                pod.result = None;
            });
        }
        15..=17 => {
            let command = ["ADD", "DEL"][random.below(2)];
            let after = Duration::from_micros(random.below(12_000) as u64);
            call_and_kill(node, command, pod, &kind(random), after);
            // An ADD of what is there changes nothing; anything else may have happened.
            if command == "DEL" {
                pod.result = None;
            }
        }
        18 => {
            // Sandbox and all: the same id comes again.
            let name = pod.netns.0.clone();
            let mut command = Command::new("ip");
            command.args(["netns", "delete", &name]);
            weft_tests::command::run(command).must();
            let mut command = Command::new("ip");
            command.args(["netns", "add", &name]);
            weft_tests::command::run(command).must();
            // Its port goes by itself; the lease stays for the DEL.
            node.runtime.del(&pod.name, &pod.netns);
            pod.result = None;
        }
        _ => {
            node.kill();
            // A DEL that finds nobody succeeds.
            node.runtime.del(&pod.name, &pod.netns);
            node.start_again();
            pods.iter_mut().for_each(|pod| pod.result = None);
        }
    }
}

#[test]
fn whatever_runtimes_do_in_whatever_order_nothing_is_left_of_it() {
    let _turn = turn();
    let cluster = Cluster::new("any");
    let mut node = cluster.weft_node(1, "routed", "");
    let mut pods: Vec<Pod> = (0..PODS)
        .map(|number| Pod { name: format!("p{number}"), netns: cluster.sandbox(&format!("p{number}")), result: None })
        .collect();
    let mut random = Random::new(7);
    for number in 0..STEPS {
        step(&mut node, &mut pods, &mut random);
        let leases = node.daemon().leases();
        let mut addresses: Vec<_> = leases.iter().map(|lease| lease.address).collect();
        addresses.sort();
        addresses.dedup();
        assert_eq!(addresses.len(), leases.len(), "an address was given twice after step {number}: {leases:?}");
        let held = pods.iter().filter(|pod| pod.result.is_some()).count();
        assert!(leases.len() >= 2 * held && leases.len() <= 2 * PODS, "step {number}: {leases:?}");
    }
    pods.iter().for_each(|pod| node.runtime.del(&pod.name, &pod.netns));
    eventually("all is gone", Duration::from_secs(20), || {
        node.daemon().leases().is_empty() && node.daemon().status().pods == 0
    });
    for pod in &pods {
        let links = pod.netns.ip("-o link show");
        assert_eq!(links.lines().count(), 1, "{} has more than its loopback: {links}", pod.name);
    }
    let round = |pods: &[Pod]| {
        for pod in pods {
            for port in ["tap", "xdp"] {
                node.attach_with(&pod.name, &pod.netns, &json!({ "port": port }));
                node.runtime.del(&pod.name, &pod.netns);
            }
        }
    };
    round(&pods);
    let descriptors = node.daemon().descriptors();
    round(&pods);
    eventually("no descriptor is kept", Duration::from_secs(20), || node.daemon().descriptors() <= descriptors);
}
