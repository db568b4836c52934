//! The plugin against the real daemon: every version, every command, and what a careless runtime does.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use weft_tests::cluster::{Cluster, WeftNode};
use weft_tests::command::eventually;
use weft_tests::machine::turn;
use weft_tests::netns::OwnNetns;
use weft_tests::plugin;

const EXHAUSTED: u64 = 100;
const EXISTS: u64 = 101;
const CHECK: u64 = 103;
const ENVIRONMENT: u64 = 4;

fn leases(node: &WeftNode) -> BTreeSet<IpAddr> {
    node.daemon().leases().iter().map(|lease| lease.address).collect()
}

#[test]
fn every_version_attaches_checks_and_detaches() {
    let _turn = turn();
    let cluster = Cluster::new("ver");
    let mut node = cluster.weft_node(1, "routed", "");
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        node.runtime.version = version.to_owned();
        let pod = cluster.sandbox("pod");
        let result = node.attach("c1", &pod);
        assert_eq!(result["cniVersion"], version);
        let addresses = plugin::addresses(&result);
        assert_eq!((addresses.len(), leases(&node)), (2, addresses.iter().copied().collect()), "{version}");
        for address in &addresses {
            assert!(
                pod.ip("address show dev eth0").contains(&address.to_string()),
                "{version}: {address} is not on the interface"
            );
        }
        assert!(pod.ip("link show dev eth0").contains(&plugin::mac(&result)), "{version}");
        pod.exec("ping -n -c 1 -W 2 10.244.1.1").must();
        if version > "0.3.1" {
            node.runtime.check("c1", &pod, &result).must();
            pod.ip(&format!("address del {}/24 dev eth0", addresses[0]));
            node.runtime.check("c1", &pod, &result).refused(CHECK);
        }
        for _ in 0..2 {
            node.runtime.del("c1", &pod);
        }
        assert!(leases(&node).is_empty(), "{version}");
        assert!(!pod.ip("-o link show").contains("eth0"), "{version}: the interface is left");
    }
    let versions = node.runtime.call_with("VERSION", "", None, "{\"cniVersion\":\"1.1.0\"}").must();
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        assert!(versions["supportedVersions"].as_array().unwrap().contains(&json!(version)), "{versions}");
    }
    node.runtime.call("STATUS", "", None, &Value::Null).must();
    node.stop();
    assert!(!node.runtime.call("STATUS", "", None, &json!({ "wait": 0 })).success, "STATUS fails without a daemon");
}

#[test]
fn a_second_add_is_refused_and_changes_nothing() {
    let _turn = turn();
    let cluster = Cluster::new("two");
    let node = cluster.weft_node(1, "routed", "");
    let pod = cluster.sandbox("pod");
    let result = node.attach("c1", &pod);
    node.runtime.call("ADD", "c1", Some(&pod.path()), &Value::Null).refused(EXISTS);
    node.runtime.check("c1", &pod, &result).must();
    let mut sorted = plugin::addresses(&result);
    sorted.sort();
    assert_eq!(leases(&node).into_iter().collect::<Vec<_>>(), sorted);
    pod.exec("ping -n -c 1 -W 2 10.244.1.1").must();
}

#[test]
fn a_full_range_is_told_so_and_takes_nothing() {
    let _turn = turn();
    let cluster = Cluster::new("full");
    let node = cluster.weft_node(1, "routed", "");
    let small = json!({ "ipam": { "type": "weft", "ranges": [[{ "subnet": "10.244.1.0/24", "rangeStart": "10.244.1.100", "rangeEnd": "10.244.1.101" }]] } });
    let pods: Vec<OwnNetns> = (0..3).map(|number| cluster.sandbox(&format!("p{number}"))).collect();
    let add = |number: usize| node.runtime.call("ADD", &format!("c{number}"), Some(&pods[number].path()), &small);
    let given: BTreeSet<IpAddr> = (0..2).flat_map(|number| plugin::addresses(&add(number).must())).collect();
    assert_eq!(given.iter().filter(|address| address.is_ipv4()).count(), 2);
    let before = leases(&node);
    add(2).refused(EXHAUSTED);
    assert_eq!(leases(&node), before);
    assert!(!pods[2].ip("-o link show").contains("eth0"), "an ADD that failed leaves an interface");
    node.runtime.del("c0", &pods[0]);
    add(2).must();
}

#[test]
fn twenty_adds_at_once_get_distinct_addresses_and_all_of_it_comes_back() {
    let _turn = turn();
    let cluster = Cluster::new("many");
    let node = cluster.weft_node(1, "routed", "");
    let pods: Vec<OwnNetns> = (0..20).map(|number| cluster.sandbox(&format!("p{number}"))).collect();
    let warm = cluster.sandbox("warm");
    node.attach("warm", &warm);
    node.runtime.del("warm", &warm);
    let before = node.daemon().descriptors();
    let results: Vec<Value> = std::thread::scope(|scope| {
        let node = &node;
        let add = |(number, pod): (usize, &OwnNetns)| {
            let pod: &weft_tests::netns::Netns = pod;
            let pod = pod.clone();
            scope.spawn(move || node.runtime.add(&format!("c{number}"), &pod))
        };
        let threads: Vec<_> = pods.iter().enumerate().map(add).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let addresses: Vec<IpAddr> = results.iter().flat_map(plugin::addresses).collect();
    let distinct: BTreeSet<IpAddr> = addresses.iter().copied().collect();
    assert_eq!((addresses.len(), distinct.len()), (40, 40));
    assert_eq!(leases(&node), distinct);
    let macs: BTreeSet<String> = results.iter().map(plugin::mac).collect();
    assert_eq!(macs.len(), 20);
    let last = plugin::addresses(&results[19])[0];
    pods[0].exec(&format!("ping -n -c 1 -W 2 {last}")).must();
    std::thread::scope(|scope| {
        for (number, pod) in pods.iter().enumerate() {
            let node = &node;
            scope.spawn(move || node.runtime.del(&format!("c{number}"), pod));
        }
    });
    assert!(leases(&node).is_empty());
    eventually("descriptors are back", Duration::from_secs(3), || node.daemon().descriptors() <= before);
    node.daemon().assert_conserved();
}

#[test]
fn gc_frees_what_is_not_listed_and_only_that() {
    let _turn = turn();
    let cluster = Cluster::new("gc");
    let node = cluster.weft_node(1, "routed", "");
    let pods: Vec<OwnNetns> = (0..3).map(|number| cluster.sandbox(&format!("p{number}"))).collect();
    let results: Vec<Value> =
        pods.iter().enumerate().map(|(number, pod)| node.attach(&format!("c{number}"), pod)).collect();
    let other = weft_tests::plugin::Runtime { network: "other".into(), ..node.runtime.clone() };
    let foreign = cluster.sandbox("foreign");
    other.add("c0", &foreign);
    let valid = json!({ "cni.dev/valid-attachments": [{ "containerID": "c1", "ifname": "eth0" }] });
    node.runtime.call("GC", "", None, &valid).must();
    let left = leases(&node);
    assert_eq!(left.len(), 4, "{left:?}");
    assert!(plugin::addresses(&results[1]).iter().all(|address| left.contains(address)));
    node.runtime.check("c1", &pods[1], &results[1]).must();
}

#[test]
fn the_hosts_namespace_and_another_pods_attachment_are_never_touched() {
    let _turn = turn();
    let cluster = Cluster::new("host");
    let node = cluster.weft_node(1, "routed", "");
    let host = || weft_tests::command::run(weft_tests::command::shell("ip -o link show | sed 's/ mtu.*//'")).must();
    let before = host();
    for path in ["/proc/1/ns/net", "/proc/self/ns/net", "/dev/null", "/nonexistent", ""] {
        node.runtime.call("ADD", "c1", Some(Path::new(path)), &Value::Null).refused(ENVIRONMENT);
        node.runtime.call("DEL", "c1", Some(Path::new(path)), &Value::Null).must();
    }
    let own = format!("/proc/{}/ns/net", node.daemon().pid);
    let weftds = node.runtime.call("ADD", "c1", Some(Path::new(&own)), &Value::Null);
    assert!(!weftds.success, "a pod in the node's own namespace: {}", weftds.json);
    let pod = cluster.sandbox("pod");
    let result = node.attach("c1", &pod);
    // Another container's ADD into the same namespace finds the interface's name taken, and leaves the owner's alone.
    assert!(!node.runtime.call("ADD", "c2", Some(&pod.path()), &Value::Null).success);
    node.runtime.call("DEL", "c2", Some(&pod.path()), &Value::Null).must();
    node.runtime.check("c1", &pod, &result).must();
    pod.exec("ping -n -c 1 -W 2 10.244.1.1").must();
    assert_eq!(leases(&node).len(), 2);
    assert_eq!(host(), before);
}

#[test]
fn an_address_that_was_asked_for_is_given_or_the_add_fails() {
    let _turn = turn();
    let cluster = Cluster::new("want");
    let node = cluster.weft_node(1, "routed", "");
    let (one, two) = (cluster.sandbox("one"), cluster.sandbox("two"));
    let want = json!({ "args": { "cni": { "ips": ["10.244.1.77"] } } });
    let result = node.runtime.call("ADD", "c1", Some(&one.path()), &want).must();
    assert!(plugin::addresses(&result).contains(&"10.244.1.77".parse().unwrap()));
    for taken in ["10.244.1.77", "10.244.1.1", "10.244.1.0", "10.244.1.255", "192.0.2.1"] {
        let want = json!({ "args": { "cni": { "ips": [taken] } } });
        assert!(!node.runtime.call("ADD", "c2", Some(&two.path()), &want).success, "{taken} was given");
    }
    assert_eq!(leases(&node).len(), 2);
}
