//! Debian's plugins behind ours in one list, as a runtime runs them.

use serde_json::{Value, json};
use weft_tests::cluster::{Cluster, WeftNode};
use weft_tests::machine::turn;
use weft_tests::network::{Attachment, Network};
use weft_tests::plugin::{addresses, mac};

fn chain(node: &WeftNode, behind: Vec<Value>) -> Network {
    let ours = node.runtime.config(&json!({ "type": "weft-cni" }));
    Network::new(&node.netns, "pods", [vec![ours], behind].concat())
}

#[test]
fn portmap_tuning_firewall_and_sbr_work_behind_us() {
    let _turn = turn();
    let cluster = Cluster::new("chain");
    let node = cluster.weft_node(1, "routed", "");
    let behind = vec![
        json!({ "type": "portmap", "capabilities": { "portMappings": true } }),
        json!({ "type": "tuning", "sysctl": { "net.core.somaxconn": "700" }, "mtu": 1400 }),
        json!({ "type": "firewall", "backend": "iptables" }),
        json!({ "type": "sbr" }),
    ];
    // Debian's firewall has no older version.
    for version in ["0.4.0", "1.0.0"] {
        let mut network = chain(&node, behind.clone());
        version.clone_into(&mut network.version);
        let pod = cluster.sandbox("pod");
        let mapping = json!([{ "hostPort": 8080, "containerPort": 80, "protocol": "tcp" }]);
        let attachment = Attachment::new("c1", &pod).with("portMappings", mapping);
        let result = network.add(&attachment).must();
        assert_eq!((addresses(&result).len(), &result["cniVersion"]), (2, &json!(version)), "{result}");
        assert!(
            pod.ip("link show dev eth0").contains(&mac(&result)) && pod.ip("link show dev eth0").contains("mtu 1400")
        );
        assert_eq!(pod.exec("sysctl -n net.core.somaxconn").must().trim(), "700");
        let rules = node.netns.exec("iptables -t nat -S").must();
        let address = addresses(&result)[0];
        assert!(rules.contains(&format!("--to-destination {address}:80")), "{rules}");
        // sbr has moved the routes to a table of their own, and tuning has lowered the MTU: neither is a fault.
        assert!(
            !pod.ip("route").contains("default") && pod.ip("route show table 100").contains("default via 10.244.1.1")
        );
        pod.exec(&format!("ping -n -c 1 -W 2 -I {address} 10.244.1.1")).must();
        // Debian's portmap looks for a pod's IPv4 rules among the IPv6 ones, too, so its own CHECK fails for whoever has both.
        let mut checked = network.clone();
        checked.plugins.remove(1);
        checked.check(&attachment, &result).must();
        let mut changed = result.clone();
        changed["ips"][0]["address"] = "10.244.1.99/24".into();
        assert!(!checked.check(&attachment, &changed).success);
        network.del(&attachment, &result).must();
        // Ours can be repeated; Debian's tuning cannot.
        Network { plugins: network.plugins[..1].to_vec(), ..network }.del(&attachment, &result).must();
        assert!(!node.netns.exec("iptables -t nat -S").must().contains("--to-destination"));
        assert!(node.daemon().leases().is_empty(), "{version}");
    }
}

#[test]
fn several_attachments_of_one_pod_live_side_by_side() {
    let _turn = turn();
    let cluster = Cluster::new("multi");
    let node = cluster.weft_node(1, "routed", "");
    let pod = cluster.sandbox("pod");
    let first = chain(&node, vec![]);
    let mut second = first.clone();
    "storage".clone_into(&mut second.name);
    second.plugins[0]["ipam"] = json!({ "type": "weft", "routes": [{ "dst": "10.50.0.0/16" }] });
    let eth0 = Attachment::new("c1", &pod);
    let (net1, net2) = (eth0.clone().by("net1"), eth0.clone().by("net2"));
    let one = first.add(&eth0).must();
    let two = first.add(&net1).must();
    let three = second.add(&net2).must();
    let mut all: Vec<_> = [&one, &two, &three].into_iter().flat_map(|result| addresses(result)).collect();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 6);
    let routes = pod.ip("route");
    assert_eq!(routes.matches("default").count(), 1, "{routes}");
    assert!(
        routes.contains("default via 10.244.1.1 dev eth0") && routes.contains("10.50.0.0/16 via 10.244.1.1 dev net2"),
        "{routes}"
    );
    assert_eq!((&two["routes"], three["routes"].as_array().unwrap().len()), (&json!([]), 1));
    first.del(&net1, &two).must();
    assert!(!pod.ip("-o link").contains("net1"));
    first.check(&eth0, &one).must();
    second.check(&net2, &three).must();
    second.call("GC", &Value::Null).refused(1);
    let mut newest = second.clone();
    "1.1.0".clone_into(&mut newest.version);
    newest.call("GC", &json!({ "cni.dev/valid-attachments": [] })).must();
    assert_eq!(node.daemon().leases().len(), 2, "GC of one network leaves the other's attachments alone");
    first.check(&eth0, &one).must();
}
