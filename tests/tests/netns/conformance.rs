//! CNI as a runtime relies on it, rule by rule, with the built plugin and a real daemon.
//!
//! `tests/cni-conformance.md` lists the rules of the specification and the tests that hold each; one test here sees to it that
//! those tests exist.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use weft_tests::cluster::{Cluster, WeftNode};
use weft_tests::command::eventually;
use weft_tests::machine::turn;
use weft_tests::netns::OwnNetns;
use weft_tests::network::{Attachment, Network};
use weft_tests::plugin::addresses;
use weft_tests::random::Random;

const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
const TRY_AGAIN: u64 = 11;
const NOT_AVAILABLE: u64 = 50;

/// A sandbox's id as containerd makes them.
const SANDBOX: &str = "9c1d3f0a5b7e2468ace013579bdf02468ace13579bdf02468ace13579bdf0246";

fn network(node: &WeftNode, version: &str) -> Network {
    let ours = node.runtime.config(&json!({ "type": "weft-cni" }));
    Network { version: version.to_owned(), ..Network::new(&node.netns, "pods", vec![ours]) }
}

/// What containerd says of a sandbox of the pod `web-0`.
fn containerds(id: &str, pod: &OwnNetns) -> Attachment {
    let arguments = format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID={id};\
         K8S_POD_UID=0b1f8a1c-7d3c-4a51-9b7e-2f4dd0b0a001"
    );
    Attachment { arguments, ..Attachment::new(id, pod) }
}

#[test]
fn the_table_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let table = std::fs::read_to_string(root.join("cni-conformance.md")).unwrap();
    let mut sources = BTreeMap::new();
    for folder in ["tests/netns", "../router/cni/tests/plugin", "../router/daemon/tests/attach"] {
        for file in std::fs::read_dir(root.join(folder)).unwrap().map(|entry| entry.unwrap().path()) {
            if file.extension().is_some_and(|end| end == "rs") {
                let module = file.file_stem().unwrap().to_string_lossy().into_owned();
                let text = std::fs::read_to_string(&file).unwrap();
                sources.entry(module).or_insert_with(String::new).push_str(&text);
            }
        }
    }
    let rules: Vec<&str> = table.lines().filter(|line| line.starts_with("| ") && line.contains("::")).collect();
    assert!(rules.len() > 30, "{} rules", rules.len());
    for rule in rules {
        for named in rule.split('`').filter(|part| part.contains("::")) {
            let (module, test) = named.split_once("::").unwrap();
            let found = sources.get(module).is_some_and(|text| text.contains(&format!("fn {test}(")));
            assert!(found, "there is no test {named}: {rule}");
        }
    }
}

#[test]
fn containerds_shape_attaches_and_an_old_sandboxs_del_leaves_the_new_one() {
    let _turn = turn();
    let cluster = Cluster::new("ctrd");
    let node = cluster.weft_node(1, "routed", "");
    let (old_pod, new_pod) = (cluster.sandbox("old"), cluster.sandbox("new"));
    for version in VERSIONS {
        let network = network(&node, version);
        let (old, new) = (containerds(SANDBOX, &old_pod), containerds(&SANDBOX.replace("9c", "7a"), &new_pod));
        let first = network.add(&old).must();
        let second = network.add(&new).must();
        // The netns of a sandbox that is gone is an empty variable, or none.
        for netns in [Some("".into()), None, Some("/run/netns/weft-gone".into())] {
            network.del(&Attachment { netns, ..old.clone() }, &first).must();
        }
        if version > "0.3.1" {
            network.check(&new, &second).must();
        }
        let left: Vec<_> = node.daemon().leases().into_iter().map(|lease| lease.address).collect();
        assert!(left.len() == 2 && addresses(&second).iter().all(|address| left.contains(address)), "{left:?}");
        new_pod.exec("ping -n -c 1 -W 2 10.244.1.1").must();
        network.del(&Attachment { netns: None, ..new }, &second).must();
        assert!(node.daemon().leases().is_empty(), "{version}");
    }
}

#[test]
fn a_result_has_the_shape_of_its_version_and_nothing_else() {
    let _turn = turn();
    let cluster = Cluster::new("shape");
    let node = cluster.weft_node(1, "routed", "");
    let only = |value: &Value, allowed: &[&str]| {
        let odd: Vec<&String> =
            value.as_object().unwrap().keys().filter(|key| !allowed.contains(&key.as_str())).collect();
        assert!(odd.is_empty(), "{odd:?} in {value}");
    };
    for version in VERSIONS {
        let (old, newest) = (version < "1.0.0", version == "1.1.0");
        let mut network = network(&node, version);
        network.plugins[0]["ipam"] = json!({ "type": "weft", "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "10.9.0.0/16", "priority": 7, "mtu": 1400 }] });
        let pod = cluster.sandbox("pod");
        let attachment = Attachment::new("c1", &pod);
        let result = network.add(&attachment).must();
        only(&result, &["cniVersion", "interfaces", "ips", "routes", "dns"]);
        let interface = &result["interfaces"][0];
        only(interface, if newest { &["name", "mac", "sandbox", "mtu"] } else { &["name", "mac", "sandbox"] });
        assert_eq!((&interface["name"], &interface["sandbox"]), (&json!("eth0"), &json!(pod.path())));
        for ip in result["ips"].as_array().unwrap() {
            only(
                ip,
                if old {
                    &["version", "interface", "address", "gateway"]
                } else {
                    &["interface", "address", "gateway"]
                },
            );
            let family = if ip["address"].as_str().unwrap().contains(':') { "6" } else { "4" };
            assert!(ip["interface"] == 0 && (!old || ip["version"] == family), "{ip}");
        }
        let routes = result["routes"].as_array().unwrap();
        assert_eq!(routes.len(), 2, "{result}");
        only(&routes[1], if newest { &["dst", "gw", "priority", "mtu"] } else { &["dst", "gw"] });
        let made = pod.ip("route");
        assert!(made.contains("10.9.0.0/16 via 10.244.1.1 dev eth0") && made.contains("metric 7 mtu 1400"), "{made}");
        network.del(&attachment, &result).must();
    }
}

#[test]
fn what_a_runtime_may_also_say_is_no_error() {
    let _turn = turn();
    let cluster = Cluster::new("odd");
    let node = cluster.weft_node(1, "routed", "");
    let pod = cluster.sandbox("pod");
    let foreign = json!({
        "interfaces": [{ "name": "net9", "mac": "02:00:00:00:00:99", "sandbox": "/x" }],
        "ips": [{ "version": "4", "address": "192.0.2.9/24", "interface": 0 }]
    });
    let said = [
        json!({ "ipam": null, "dns": null, "args": null, "runtimeConfig": null, "capabilities": null, "prevResult": null }),
        json!({ "cniVersions": ["0.4.0", "1.0.0", "1.1.0"], "disableCheck": true, "hairpinMode": true, "x": { "y": [1] } }),
        json!({ "args": { "labels": { "a": "b" }, "cni": { "unknown": 7 } }, "runtimeConfig": { "unknown": {} } }),
        json!({ "bandwidth": {}, "dns": {}, "mtu": 0, "ipam": { "type": "weft", "routes": null, "ranges": null } }),
        json!({ "prevResult": { "cniVersion": "0.3.1", "ips": foreign["ips"], "interfaces": foreign["interfaces"] } }),
        json!({ "prevResult": { "cniVersion": "9.9.9", "ips": [], "unknown": true } }),
        json!({ "prevResult": {} }),
    ];
    for (keys, version) in said.iter().flat_map(|keys| VERSIONS.map(|version| (keys, version))) {
        let mut network = network(&node, version);
        network.plugins[0].as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        let attachment = Attachment::new("c1", &pod);
        let result = network.add(&attachment).must();
        assert_eq!(result["cniVersion"], version, "{keys}");
        let ours = result["interfaces"].as_array().unwrap().iter().filter(|one| one["name"] == "eth0").count();
        assert_eq!(ours, 1, "{keys}: {result}");
        if version > "0.3.1" && keys.get("prevResult").is_none_or(Value::is_null) {
            network.check(&attachment, &result).must();
        }
        if version == "1.1.0" {
            // Others than those that are known, and this one.
            let list = json!([{ "containerID": "never", "ifname": "eth7" }, { "containerID": "c1", "ifname": "eth0" }]);
            network.call("GC", &json!({ "cni.dev/valid-attachments": list })).must();
            assert_eq!(node.daemon().leases().len(), 2, "{keys}");
        }
        for previous in [result, Value::Null, json!({ "ips": 7 }), json!("none")] {
            network.del(&attachment, &previous).must();
        }
        assert!(node.daemon().leases().is_empty(), "{keys}");
    }
}

#[test]
fn what_makes_no_sense_is_refused_with_its_code_and_changes_nothing() {
    let _turn = turn();
    let cluster = Cluster::new("bad");
    let node = cluster.weft_node(1, "routed", "");
    let (pod, other) = (cluster.sandbox("pod"), cluster.sandbox("other"));
    let network = |version| network(&node, version);
    let attachment = Attachment::new("c1", &pod);
    let result = network("1.1.0").add(&attachment).must();
    for command in ["STATUS", "GC"] {
        for version in ["0.3.0", "0.4.0", "1.0.0"] {
            network(version).call(command, &json!({ "cni.dev/valid-attachments": [] })).refused(1);
        }
    }
    network("0.3.1").check(&attachment, &result).refused(1);
    for version in ["0.2.0", "1.2.0", "1.1", "v1.0.0", ""] {
        network(version).add(&Attachment::new("c2", &other)).refused(1);
        network(version).del(&attachment, &result).refused(1);
    }
    network("1.1.0").check(&attachment, &Value::Null).refused(7);
    let unlike = |key: &str, value: Value| {
        let mut unlike = result.clone();
        unlike[key] = value;
        network("1.1.0").check(&attachment, &unlike)
    };
    unlike("interfaces", json!([])).refused(103);
    unlike("ips", json!([{ "interface": 0, "address": "10.244.1.99/24" }])).refused(103);
    unlike("interfaces", json!([{ "name": "eth0", "mac": "02:00:00:00:00:77", "sandbox": pod.path() }])).refused(103);
    for arguments in ["x", "IP=10.244.1.300", "A=b", "IgnoreUnknown=perhaps", "MAC=zz"] {
        let odd = Attachment { arguments: arguments.into(), ..Attachment::new("c2", &other) };
        network("1.0.0").add(&odd).refused(4);
    }
    for ifname in ["sixteencharacter", "a/b", "a:b", "a b", ".", ".."] {
        network("1.0.0").add(&Attachment::new("c2", &other).by(ifname)).refused(4);
    }
    for container in ["-c", "../c", "c c", "c/d"] {
        network("1.0.0").add(&Attachment::new(container, &other)).refused(4);
    }
    assert!(!other.ip("link").contains("eth"), "{}", other.ip("link"));
    assert_eq!(node.daemon().leases().len(), 2);
    network("1.1.0").check(&attachment, &result).must();
}

#[test]
fn ipv6_is_usable_when_add_returns() {
    let _turn = turn();
    let cluster = Cluster::new("dad");
    let node = cluster.weft_node(1, "routed", "");
    for number in 0..3 {
        let pod = cluster.sandbox(&format!("p{number}"));
        node.attach(&format!("c{number}"), &pod);
        assert_eq!(pod.ip("-6 address show dev eth0 tentative").trim(), "");
        pod.exec("ping -6 -n -c 1 -W 5 fd00:10:244:1::1").must();
    }
}

#[test]
fn a_pod_whose_namespace_is_gone_is_deleted_all_the_same() {
    let _turn = turn();
    let cluster = Cluster::new("gone");
    let node = cluster.weft_node(1, "routed", "");
    let pod = cluster.sandbox("pod");
    let path = pod.path();
    let result = node.attach("c1", &pod);
    let identity = pod.identity();
    drop(pod);
    assert!(identity.is_some() && !path.exists());
    eventually("its port goes with the namespace", Duration::from_secs(10), || {
        node.daemon().ports().iter().all(|port| port.role != "pod")
    });
    let network = network(&node, "1.0.0");
    let gone = Attachment { netns: Some(path), ..Attachment::new("c1", &cluster.sandbox("other")) };
    assert!(!network.check(&gone, &result).success);
    network.del(&gone, &result).must();
    assert!(node.daemon().leases().is_empty());
}

#[test]
fn what_is_done_without_the_daemon_is_made_up_for_and_touches_nothing_younger() {
    let _turn = turn();
    let cluster = Cluster::new("away");
    let mut node = cluster.weft_node(1, "routed", "");
    let pods: Vec<OwnNetns> = (0..4).map(|number| cluster.sandbox(&format!("p{number}"))).collect();
    let add = |node: &WeftNode, number: usize| node.attach(&format!("c{number}"), &pods[number]);
    let results: Vec<Value> = (0..3).map(|number| add(&node, number)).collect();
    node.kill();
    let impatient = json!({ "wait": 0.2 });
    node.runtime.call("ADD", "c3", Some(&pods[3].path()), &impatient).refused(TRY_AGAIN);
    node.runtime.call("STATUS", "", None, &impatient).refused(NOT_AVAILABLE);
    node.runtime.del("c0", &pods[0]);
    let stays = json!({ "cni.dev/valid-attachments": [{ "containerID": "c1", "ifname": "eth0" }] });
    node.runtime.call("GC", "", None, &stays).must();
    node.start_again();
    let left: Vec<_> = node.daemon().leases().into_iter().map(|lease| lease.address).collect();
    assert!(left.len() == 2 && addresses(&results[1]).iter().all(|address| left.contains(address)), "{left:?}");
    // The same attachments again, and another: no tombstone outlives them.
    for number in [0, 2, 3] {
        add(&node, number);
    }
    let tombstones = || std::fs::read_dir(node.runtime.state_dir.join("tombstones")).unwrap().count();
    assert_eq!((node.daemon().leases().len(), tombstones()), (8, 0));
}

#[test]
fn a_daemon_that_hangs_keeps_no_pod_from_going() {
    let _turn = turn();
    let cluster = Cluster::new("hung");
    let node = cluster.weft_node(1, "routed", "");
    let (pod, other) = (cluster.sandbox("pod"), cluster.sandbox("other"));
    node.attach("c1", &pod);
    node.daemon().signal(rustix::process::Signal::STOP);
    std::thread::scope(|scope| {
        let node = &node;
        scope.spawn(|| {
            let started = Instant::now();
            node.runtime.call("DEL", "c1", Some(&pod.path()), &Value::Null).must();
            assert!(started.elapsed() < Duration::from_secs(10), "it took {:?}", started.elapsed());
        });
        scope.spawn(|| node.runtime.call("STATUS", "", None, &Value::Null).refused(NOT_AVAILABLE));
        scope.spawn(|| node.runtime.call("ADD", "c2", Some(&other.path()), &Value::Null).refused(TRY_AGAIN));
    });
    node.daemon().signal(rustix::process::Signal::CONT);
    eventually("what was left is done, and what nobody waits for is not", Duration::from_secs(30), || {
        node.daemon().leases().is_empty() && !other.ip("-o link").contains("eth0")
    });
    node.runtime.call("ADD", "c1", Some(&pod.path()), &Value::Null).must();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(node.daemon().leases().len(), 2);
}

/// Whoever is killed when: what the runtime was told of is there, and what it deleted is not.
#[test]
fn random_sequences_match_a_model() {
    let _turn = turn();
    let cluster = Cluster::new("rand");
    let mut node = cluster.weft_node(1, "routed", "");
    let pods: Vec<OwnNetns> = (0..3).map(|number| cluster.sandbox(&format!("p{number}"))).collect();
    let mut random = Random::new(0x0c21);
    let mut model: BTreeMap<(usize, &str), Vec<std::net::IpAddr>> = BTreeMap::new();
    for step in 0..80 {
        let number = random.below(3);
        let ifname = ["eth0", "net1"][random.below(2)];
        let key = (number, ifname);
        let network = network(&node, "1.1.0");
        let attachment = Attachment::new(&format!("c{number}"), &pods[number]).by(ifname);
        match random.below(10) {
            0..=3 => {
                let answer = network.add(&attachment);
                assert_eq!(answer.success, !model.contains_key(&key), "step {step}: {}", answer.json);
                if answer.success {
                    model.insert(key, addresses(&answer.json));
                }
            }
            4..=6 => {
                network.del(&attachment, &Value::Null).must();
                model.remove(&key);
            }
            7 => {
                // The runtime undoes what it does not know the outcome of.
                network.add_and_kill(&attachment, Duration::from_millis(random.below(60) as u64));
                if !model.contains_key(&key) {
                    network.del(&attachment, &Value::Null).must();
                }
            }
            8 => {
                let valid: Vec<Value> = model
                    .keys()
                    .filter(|key| key.1 == "eth0")
                    .map(|(number, ifname)| json!({ "containerID": format!("c{number}"), "ifname": ifname }))
                    .collect();
                network.call("GC", &json!({ "cni.dev/valid-attachments": valid })).must();
                model.retain(|key, _| key.1 == "eth0");
            }
            _ => {
                node.kill();
                network.del(&attachment, &Value::Null).must();
                model.remove(&key);
                node.start_again();
            }
        }
        let mut expected: Vec<_> = model.values().flatten().copied().collect();
        expected.sort();
        // What a killed shim asked for may be under way for a moment.
        let mut leased = Vec::new();
        let settles = || {
            leased = node.daemon().leases().into_iter().map(|lease| lease.address).collect();
            leased.sort();
            leased == expected
        };
        eventually(&format!("what is leased is what the runtime knows, step {step}"), Duration::from_secs(20), settles);
    }
}
