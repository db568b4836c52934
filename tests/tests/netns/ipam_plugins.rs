//! Addresses that one plugin has another give: host-local and static for us, and we for bridge, ptp and macvlan.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Value, json};
use weft_tests::cluster::{Cluster, WeftNode};
use weft_tests::machine::turn;
use weft_tests::network::{Attachment, Network};
use weft_tests::plugin::addresses;

const EXISTS: u64 = 101;
const ADDRESS: u64 = 102;
const CHECK: u64 = 103;

/// A network of ours on this node, with further keys.
fn ours(node: &WeftNode, keys: &Value) -> Network {
    let mut plugin = node.runtime.config(keys);
    plugin["type"] = "weft-cni".into();
    Network::new(&node.netns, "pods", vec![plugin])
}

/// Another plugin that has us give its addresses.
fn theirs(node: &WeftNode, keys: Value, mut ipam: Value) -> Network {
    let mut plugin = keys;
    ipam["type"] = "weft-cni".into();
    plugin["ipam"] = ipam;
    plugin["socket"] = node.runtime.socket.display().to_string().into();
    plugin["stateDir"] = node.runtime.state_dir.display().to_string().into();
    Network::new(&node.netns, "bridged", vec![plugin])
}

/// The addresses that host-local's folder says are given.
fn kept(folder: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.parse::<std::net::IpAddr>().is_ok()).collect()
}

#[test]
fn host_local_gives_addresses_and_gets_them_back_whatever_fails() {
    let _turn = turn();
    let cluster = Cluster::new("hl");
    let node = cluster.weft_node(1, "routed", "");
    let data = cluster.folder.path().join("host-local");
    let ipam = json!({
        "type": "host-local", "dataDir": data, "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "10.96.0.0/12", "gw": "10.244.1.1" }],
        "ranges": [[{ "subnet": "10.244.1.0/24", "rangeStart": "10.244.1.100" }], [{ "subnet": "fd00:10:244:1::/64" }]]
    });
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let mut network = ours(&node, &json!({ "ipam": ipam }));
        version.clone_into(&mut network.version);
        let pod = cluster.sandbox("pod");
        let attachment = Attachment::new("c1", &pod);
        let result = network.add(&attachment).must();
        let given = addresses(&result);
        let files = kept(&data.join("pods"));
        assert_eq!(given.iter().map(ToString::to_string).collect::<BTreeSet<_>>(), files, "{version}: {result}");
        assert_eq!(node.daemon().leases().len(), 2);
        let routes = pod.ip("route");
        assert!(
            routes.contains("default via 10.244.1.1") && routes.contains("10.96.0.0/12 via 10.244.1.1"),
            "{routes}"
        );
        assert!(!pod.ip("-6 route").contains("default"), "a route that nobody asked for");
        pod.exec("ping -n -c 1 -W 2 10.244.1.1").must();

        network.add(&attachment).refused(EXISTS);
        assert_eq!(kept(&data.join("pods")), files, "a second ADD took away what the first was given");
        if version > "0.3.1" {
            network.check(&attachment, &result).must();
            for address in &given {
                std::fs::remove_file(data.join("pods").join(address.to_string())).unwrap();
            }
            assert!(!network.check(&attachment, &result).success, "host-local's own CHECK fails, so ours does");
        }
        for _ in 0..2 {
            network.del(&attachment, &result).must();
        }
        assert!(kept(&data.join("pods")).is_empty() && node.daemon().leases().is_empty(), "{version}");
    }
    // A step after host-local's fails: the interface's name is taken.
    let network = ours(&node, &json!({ "ipam": ipam }));
    let pod = cluster.sandbox("taken");
    pod.ip("link add eth0 type bridge");
    network.add(&Attachment::new("c2", &pod)).refused(EXISTS);
    assert!(kept(&data.join("pods")).is_empty() && node.daemon().leases().is_empty());
}

#[test]
fn a_delegated_address_is_checked_like_any_other() {
    let _turn = turn();
    let cluster = Cluster::new("st");
    let node = cluster.weft_node(1, "routed", "");
    let network = |address: &str| {
        let ipam = json!({ "type": "static", "addresses": [{ "address": address }], "dns": { "nameservers": ["10.96.0.10"] } });
        ours(&node, &json!({ "ipam": ipam }))
    };
    let (one, two) = (cluster.sandbox("one"), cluster.sandbox("two"));
    let attachment = Attachment::new("c1", &one);
    let result = network("10.244.1.50/24").add(&attachment).must();
    assert_eq!(addresses(&result), ["10.244.1.50".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(result["dns"]["nameservers"], json!(["10.96.0.10"]));
    // Its own address and no other may be used; taken ones, and those that no other node would send here, are refused.
    one.exec("ping -n -c 1 -W 2 10.244.1.1").must();
    one.ip("address add 10.244.1.51/24 dev eth0");
    assert!(!one.exec("ping -n -c 1 -W 1 -I 10.244.1.51 10.244.1.1").success);
    assert!(node.daemon().drops("SourceIp") > 0 || node.daemon().drops("ArpSpoof") > 0);
    for bad in ["10.244.1.50/24", "10.244.1.1/24", "10.245.1.50/24", "10.244.1.255/24"] {
        network(bad).add(&Attachment::new("c2", &two)).refused(ADDRESS);
    }
    network("10.244.1.50/24").del(&attachment, &result).must();
    assert!(node.daemon().leases().is_empty());
}

#[test]
fn gc_with_an_old_host_local_frees_its_addresses_too() {
    let _turn = turn();
    let cluster = Cluster::new("hg");
    let node = cluster.weft_node(1, "routed", "");
    let data = cluster.folder.path().join("host-local");
    let ipam = json!({ "type": "host-local", "dataDir": data, "subnet": "10.244.1.0/24" });
    let mut network = ours(&node, &json!({ "ipam": ipam }));
    "1.1.0".clone_into(&mut network.version);
    let pods = [cluster.sandbox("a"), cluster.sandbox("b")];
    for (number, pod) in pods.iter().enumerate() {
        network.add(&Attachment::new(&format!("c{number}"), pod)).must();
    }
    network.call("STATUS", &Value::Null).must();
    network.call("GC", &json!({ "cni.dev/valid-attachments": [{ "containerID": "c1", "ifname": "eth0" }] })).must();
    let left: BTreeSet<String> = node.daemon().leases().iter().map(|lease| lease.address.to_string()).collect();
    assert_eq!((left.len(), kept(&data.join("pods"))), (1, left));
}

#[test]
fn bridge_ptp_and_macvlan_take_addresses_of_ours() {
    let _turn = turn();
    let cluster = Cluster::new("ipam");
    let node = cluster.weft_node(1, "routed", "");
    let plugins = [
        json!({ "type": "bridge", "bridge": "cni0", "isGateway": true }),
        json!({ "type": "ptp" }),
        json!({ "type": "macvlan", "master": "uplink" }),
    ];
    let ipam = json!({
        "ranges": [[{ "subnet": "172.30.0.0/24", "rangeStart": "172.30.0.10" }], [{ "subnet": "fd77::/64" }]],
        "routes": [{ "dst": "0.0.0.0/0" }]
    });
    for (plugin, version) in
        plugins.iter().flat_map(|plugin| ["0.3.1", "0.4.0", "1.0.0"].map(|version| (plugin, version)))
    {
        let mut network = theirs(&node, plugin.clone(), ipam.clone());
        version.clone_into(&mut network.version);
        let pod = cluster.sandbox("pod");
        let attachment = Attachment::new("c1", &pod);
        let result = network.add(&attachment).must();
        let text = format!("{plugin} {version}: {result}");
        let given = addresses(&result);
        assert_eq!(given.len(), 2, "{text}");
        for address in &given {
            assert!(pod.ip("address show dev eth0").contains(&address.to_string()), "{text}");
        }
        let leased: BTreeSet<_> = node.daemon().leases().iter().map(|lease| lease.address).collect();
        assert_eq!(leased, given.iter().copied().collect(), "{text}");
        assert!(pod.ip("route").contains("default via 172.30.0.1"), "{text}");
        if plugin["type"] == "bridge" {
            pod.exec("ping -n -c 1 -W 2 172.30.0.1").must();
        }
        if version > "0.3.1" {
            network.check(&attachment, &result).must();
        }
        for _ in 0..2 {
            network.del(&attachment, &result).must();
        }
        assert!(node.daemon().leases().is_empty(), "{text}");
    }
    // A lease of ours that is gone is found by the other plugin's CHECK.
    let network = theirs(&node, plugins[0].clone(), ipam);
    let pod = cluster.sandbox("gone");
    let attachment = Attachment::new("c2", &pod);
    let result = network.add(&attachment).must();
    let mut alone = network.clone();
    alone.plugins[0]["type"] = "weft-cni".into();
    alone.plugins[0]["ipam"] = Value::Null;
    alone.del(&attachment, &result).must();
    network.check(&attachment, &result).refused(CHECK);
    network.del(&attachment, &result).must();
}

#[test]
fn addresses_of_the_nodes_own_are_never_given_to_two_whoever_makes_the_interface() {
    let _turn = turn();
    let cluster = Cluster::new("own");
    let node = cluster.weft_node(1, "routed", "");
    let (pod, other) = (cluster.sandbox("pod"), cluster.sandbox("other"));
    let bridge = theirs(&node, json!({ "type": "bridge", "bridge": "cni0" }), json!({}));
    let theirs = addresses(&bridge.add(&Attachment::new("c1", &pod)).must());
    let ours = addresses(&node.attach("c2", &other));
    let all: BTreeSet<_> = theirs.iter().chain(&ours).collect();
    assert_eq!(all.len(), 4, "{theirs:?} {ours:?}");
    let mut partly = bridge;
    partly.plugins[0]["ipam"]["ranges"] = json!([[{ "subnet": "10.244.0.0/16" }]]);
    partly.add(&Attachment::new("c3", &cluster.sandbox("third"))).refused(7);
}
