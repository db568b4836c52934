//! Nodes without a tunnel between them (host-gw): packets as they are on the wire, a plain Linux node at the far end, and what is not on the
//! same network.

use std::net::IpAddr;
use std::time::Duration;

use weft_tests::cluster::{Cluster, WeftNode};
use weft_tests::command::eventually;
use weft_tests::machine::{binary, turn};
use weft_tests::netns::{Netns, OwnNetns};
use weft_tests::traffic;
use weft_tests::wire::Wire;

use super::uplink::pod;

/// A routed node's configuration with these keys of the underlay.
fn config(cluster: &Cluster, number: u8, keys: &str, peers: &str) -> String {
    let config = cluster.config(number, "routed", peers).replace("mtu = 1450\n", "").replace("mtu = 1430\n", "");
    config.replace("[underlay]\n", &format!("[underlay]\n{keys}\n"))
}

fn plain_node(cluster: &Cluster, number: u8, others: &[u8]) -> WeftNode {
    let peers: String = others.iter().map(|other| cluster.peer(*other, None)).collect();
    cluster.weft_node_of(number, &config(cluster, number, "encapsulation = \"host-gw\"", &peers), "")
}

/// Waits until packets for this destination leave by the uplink.
#[track_caller]
fn await_next_hop(node: &WeftNode, destination: &str) {
    eventually(&format!("{destination} has a next hop"), Duration::from_secs(10), || {
        let routes: Vec<weft_api::RouteInfo> = node.daemon().ask(&weft_api::Request::Routes);
        routes.iter().any(|route| route.destination == destination && route.via.starts_with("port "))
    });
}

/// Everything passes between two pods, in both directions and families, whatever its length.
#[track_caller]
pub fn everything_passes(one: &(OwnNetns, Vec<IpAddr>), two: &(OwnNetns, Vec<IpAddr>)) {
    for (from, to) in [(one, two), (two, one)] {
        for address in &to.1 {
            traffic::await_answer(&from.0, *address);
            traffic::transfer(&from.0, &to.0, *address, 8 << 20);
            traffic::echo_datagrams(&from.0, &to.0, *address, &[0, 1_400, 1_473, 5_000, 40_000]);
        }
    }
}

/// The frames of a kind that pass on a node's uplink while something happens.
fn seen(cluster: &Cluster, number: u8, is_it: impl Fn(&[u8]) -> bool, happens: impl FnOnce()) -> bool {
    let wire = Wire::open(cluster.underlay(), &format!("n{number}"));
    happens();
    wire.find(Duration::from_millis(500), is_it).is_some()
}

/// An IPv4 packet between pod ranges, without anything around it.
fn is_plain(frame: &[u8]) -> bool {
    frame.len() >= 34 && frame[12..14] == [8, 0] && frame[26..28] == [10, 244] && frame[30..32] == [10, 244]
}

/// A ping between pods within the tunnel, by which nodes also look for each other.
fn is_vxlan(frame: &[u8]) -> bool {
    let is_tunnel =
        frame.len() > 84 && frame[12..14] == [8, 0] && frame[23] == 17 && frame[36..38] == 8472_u16.to_be_bytes();
    is_tunnel && frame[62..64] == [8, 0] && frame[73] == 1 && frame[76..78] == [10, 244] && frame[80..82] == [10, 244]
}

#[test]
fn pods_of_nodes_on_one_network_exchange_everything_without_a_tunnel() {
    let _turn = turn();
    for cluster in [Cluster::new("hg").by("udp"), Cluster::new("hg6").by("udp").over_v6()] {
        let nodes = [plain_node(&cluster, 1, &[2]), plain_node(&cluster, 2, &[1])];
        assert_eq!(nodes[0].daemon().status().mtu, 1500);
        let pods: Vec<_> = nodes.iter().map(|node| pod(&cluster, node)).collect();
        for (node, other) in [(&nodes[0], 2), (&nodes[1], 1)] {
            await_next_hop(node, &format!("10.244.{other}.0/24"));
            await_next_hop(node, &format!("fd00:10:244:{other}::/64"));
        }
        everything_passes(&pods[0], &pods[1]);
        let ping = |address: IpAddr| pods[0].0.exec(&format!("ping -n -q -c 2 -i 0.1 -W 2 {address}")).must();
        assert!(seen(&cluster, 1, is_plain, || drop(ping(pods[1].1[0]))));
        assert!(!seen(&cluster, 1, is_vxlan, || drop(ping(pods[1].1[0]))));
        // The nodes themselves reach pods of others, and are reached.
        for address in &pods[1].1 {
            nodes[0].netns.exec(&format!("ping -n -q -c 1 -W 2 {address}")).must();
        }
        for node in &nodes {
            node.daemon().assert_conserved();
            let status = node.daemon().status();
            assert!(status.problems.is_empty(), "{:?}", status.problems);
            let uplink = node.daemon().ports().into_iter().find(|port| port.role == "uplink").expect("an uplink");
            assert_eq!((uplink.kind.as_str(), uplink.name.as_str()), ("packet", "uplink"));
            assert!(uplink.out_bytes / uplink.out > 3_000, "superframes leave whole: {uplink:?}");
        }
    }
}

/// A machine with nothing but Linux, which has 10.244.9.0/24 and fd00:10:244:9::/64.
fn linux_node(cluster: &Cluster) -> (OwnNetns, Vec<IpAddr>) {
    let machine = cluster.machine(9);
    for address in ["10.244.9.9/24", "fd00:10:244:9::9/64"] {
        machine.ip(&format!("address add {address} dev lo"));
    }
    machine.ip(&format!("route add 10.244.1.0/24 via {}", cluster.address(1)));
    machine.ip("address add fd00:10:200::9/64 dev uplink nodad");
    machine.ip("route add fd00:10:244:1::/64 via fd00:10:200::1");
    (machine, vec!["10.244.9.9".parse().expect("an address"), "fd00:10:244:9::9".parse().expect("an address")])
}

#[test]
fn a_linux_machine_with_nothing_but_routes_is_a_node() {
    let _turn = turn();
    let cluster = Cluster::new("hl").by("udp");
    let node = plain_node(&cluster, 1, &[9]);
    node.netns.ip("address add fd00:10:200::1/64 dev uplink nodad");
    let (pod, linux) = (pod(&cluster, &node), linux_node(&cluster));
    await_next_hop(&node, "10.244.9.0/24");
    everything_passes(&pod, &linux);
    // Strict reverse-path filters find everything where it belongs.
    node.netns.set("net/ipv4/conf/uplink/rp_filter", "1");
    traffic::await_answer(&linux.0, pod.1[0]);
    assert_eq!(node.daemon().underlay().counters.received, 0);
    node.daemon().assert_conserved();
}

#[test]
fn nodes_of_the_same_subnet_are_sent_packets_as_they_are_and_others_by_the_tunnel() {
    let _turn = turn();
    let cluster = Cluster::new("hx").by("udp");
    let far =
        "[[peers]]\nname = \"n3\"\nunderlay = \"10.201.0.3\"\nranges = [\"10.244.3.0/24\", \"fd00:10:244:3::/64\"]\n";
    let keys = "cross_subnet = true";
    let near = |number, other| {
        let peers = cluster.peer(other, None) + far;
        cluster.weft_node_of(number, &config(&cluster, number, keys, &peers), "")
    };
    let nodes = [near(1, 2), near(2, 1)];
    // A router between the subnets, and the third node behind it.
    let router = cluster.machine(8);
    router.ip("address flush dev uplink scope global");
    router.ip("address add 10.200.0.8/24 dev uplink");
    router.ip("address add 10.201.0.8/24 dev uplink");
    let peers = cluster.peer(1, None) + &cluster.peer(2, None);
    let text = config(&cluster, 3, keys, &peers).replace("address = \"10.200.0.3\"", "address = \"10.201.0.3\"");
    let third = far_node(&cluster, &text);
    for node in &nodes {
        node.netns.ip("route add 10.201.0.0/24 via 10.200.0.8");
    }
    let pods: Vec<_> = nodes.iter().chain([&third]).map(|node| pod(&cluster, node)).collect();
    await_next_hop(&nodes[0], "10.244.2.0/24");
    for (one, two) in [(0, 1), (0, 2)] {
        for address in &pods[two].1 {
            traffic::await_answer(&pods[one].0, *address);
            traffic::transfer(&pods[one].0, &pods[two].0, *address, 4 << 20);
        }
    }
    let ping = |to: usize| drop(pods[0].0.exec(&format!("ping -n -q -c 2 -i 0.1 -W 2 {}", pods[to].1[0])).must());
    assert!(seen(&cluster, 1, is_plain, || ping(1)) && !seen(&cluster, 1, is_vxlan, || ping(1)));
    assert!(seen(&cluster, 1, is_vxlan, || ping(2)) && !seen(&cluster, 1, is_plain, || ping(2)));
    nodes.iter().for_each(|node| node.daemon().assert_conserved());
}

/// A node at 10.201.0.3, behind the router.
fn far_node(cluster: &Cluster, text: &str) -> WeftNode {
    let text = text.replace("device = \"uplink\"\n", "");
    let node = cluster.weft_node_unready(3, &text, "sh -c 'sleep 0.5; exec \"$@\"' --");
    node.netns.ip("address flush dev uplink scope global");
    node.netns.ip("address add 10.201.0.3/24 dev uplink");
    node.netns.ip("route add 10.200.0.0/24 via 10.201.0.8");
    node.await_ready();
    node
}

#[test]
fn a_peer_that_is_not_on_the_network_gets_the_tunnel_and_that_is_said() {
    let _turn = turn();
    let cluster = Cluster::new("hf").by("udp");
    let far = "[[peers]]\nname = \"n3\"\nunderlay = \"10.201.0.3\"\nranges = [\"10.244.3.0/24\"]\n";
    let node = cluster.weft_node_of(1, &config(&cluster, 1, "encapsulation = \"host-gw\"", far), "");
    let problems = node.daemon().status().problems;
    let told = problems.iter().find(|problem| problem.contains("n3 is not on the network of 10.200.0.1"));
    assert!(told.is_some_and(|told| told.contains("they go by vxlan")), "{problems:?}");
    let routes: Vec<weft_api::RouteInfo> = node.daemon().ask(&weft_api::Request::Routes);
    assert!(routes.iter().any(|route| route.destination == "10.244.3.0/24" && route.via == "n3"), "{routes:?}");
}

/// The kernel's routes for a destination.
fn routes(netns: &Netns, to: &str) -> String {
    netns.ip(&format!("route show {to}"))
}

#[test]
fn without_weftd_packets_for_pods_are_answered_as_unreachable_and_never_go_back() {
    let _turn = turn();
    let cluster = Cluster::new("hu").by("udp");
    let mut node = plain_node(&cluster, 1, &[]);
    let router = cluster.machine(9);
    node.netns.ip("route add default via 10.200.0.9");
    router.ip("route add 10.244.1.0/24 via 10.200.0.1");
    let pod = pod(&cluster, &node);
    traffic::await_answer(&router, pod.1[0]);
    assert!(routes(&node.netns, "10.244.1.0/24").contains("unreachable"), "{}", routes(&node.netns, "10.244.1.0/24"));
    node.kill();
    let passed = |_: &[u8]| true;
    let to_pod = |frame: &[u8]| is_to(frame, pod.1[0]);
    let wire = Wire::open(cluster.underlay(), "n1");
    let said = router.exec(&format!("ping -n -c 1 -W 3 {}", pod.1[0]));
    assert!(!said.success && said.out.contains("Destination Host Unreachable"), "{}{}", said.out, said.err);
    std::thread::sleep(Duration::from_millis(200));
    let mut count = 0;
    while let Some(frame) = wire.find(Duration::from_millis(50), passed) {
        count += usize::from(to_pod(&frame));
    }
    assert_eq!(count, 1, "the packet came once and did not go back");
    node.start_again();
    eventually("pods have a route again", Duration::from_secs(5), || {
        routes(&node.netns, "10.244.1.0/24").contains("weft0")
    });
    // Who does not want Weft any more has nothing left.
    node.stop();
    assert!(routes(&node.netns, "proto 87").contains("unreachable"));
    node.netns.exec(&format!("{} --forget", binary("weftd").display())).must();
    assert_eq!(
        (routes(&node.netns, "proto 87"), node.netns.ip("-6 route show proto 87")),
        (String::new(), String::new())
    );
}

fn is_to(frame: &[u8], address: IpAddr) -> bool {
    let IpAddr::V4(address) = address else { return false };
    frame.len() >= 34 && frame[12..14] == [8, 0] && frame[23] == 1 && frame[30..34] == address.octets()
}

#[test]
fn a_neighbour_with_another_mac_and_an_uplink_that_flaps_or_is_made_anew_are_followed() {
    let _turn = turn();
    let cluster = Cluster::new("hm").by("udp");
    let node = plain_node(&cluster, 1, &[9]);
    node.netns.ip("address add fd00:10:200::1/64 dev uplink nodad");
    let (pod, linux) = (pod(&cluster, &node), linux_node(&cluster));
    await_next_hop(&node, "10.244.9.0/24");
    traffic::await_answer(&pod.0, linux.1[0]);
    linux.0.ip("link set uplink address 02:00:00:00:77:99");
    // The kernel hears of it by what the other one asks.
    linux.0.exec("ping -n -q -c 1 -W 2 10.200.0.1").must();
    eventually("the other MAC is used", Duration::from_secs(10), || {
        pod.0.exec(&format!("ping -n -q -c 1 -W 1 {}", linux.1[0])).success
    });
    let before = node.daemon().descriptors();
    for _ in 0..50 {
        node.netns.ip("link set uplink down");
        node.netns.ip("link set uplink up");
    }
    traffic::await_answer(&pod.0, linux.1[0]);
    assert_eq!(node.daemon().descriptors(), before);
    // The same address on a new interface.
    node.netns.ip("link delete uplink");
    let underlay = &cluster.underlay().0;
    node.netns.ip(&format!("link add uplink type veth peer name n1 netns {underlay}"));
    cluster.underlay().ip("link set n1 master br0 up");
    node.netns.ip("address add 10.200.0.1/24 dev uplink");
    node.netns.ip("link set uplink up");
    traffic::await_answer(&pod.0, linux.1[0]);
    await_next_hop(&node, "10.244.9.0/24");
    traffic::transfer(&pod.0, &linux.0, linux.1[0], 4 << 20);
    eventually("nothing is left open", Duration::from_secs(5), || node.daemon().descriptors() == before);
    node.daemon().assert_conserved();
}
