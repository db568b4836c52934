//! Underlays that are not a plain wire by IPv4: IPv6, VLANs, paths that are too narrow, and all kinds of nodes and ports together.

use std::net::{IpAddr, UdpSocket};
use std::time::{Duration, Instant};

use weft_encap::mac::Mac;
use weft_tests::between::Between;
use weft_tests::cluster::{Cluster, WeftNode};
use weft_tests::command::eventually;
use weft_tests::frames::{self, L2, L3};
use weft_tests::lab::Lab;
use weft_tests::machine::turn;
use weft_tests::netns::OwnNetns;
use weft_tests::traffic;
use weft_tests::wire::Wire;

use super::reach::{every_size_passes, everyone_reaches_everyone};
use super::uplink::{pod, way};

#[test]
fn nodes_with_ipv6_addresses_reach_each_other_by_udp_and_by_xdp() {
    let _turn = turn();
    for (underlay, mode, port) in [("udp", "routed", "tap"), ("xdp", "routed", "xdp"), ("xdp", "bridged", "tap")] {
        let lab = Lab::up("v", 2, 2, mode, &["--underlay", underlay, "--underlay-family", "ipv6", "--port", port]);
        for node in &lab.nodes {
            assert!(node.underlay.is_ipv6());
            let status = node.daemon().status();
            assert!(status.underlay_kind.starts_with(underlay) && status.mtu == 1430, "{status:?}");
            assert!(status.problems.is_empty(), "{:?}", status.problems);
        }
        let wire = lab.wire(1);
        everyone_reaches_everyone(&lab);
        let (here, there) = (lab.pod(1, 1), lab.pod(2, 2));
        every_size_passes(here, there);
        for (from, to) in [(here, there), (there, here)] {
            traffic::transfer(&from.netns(), &to.netns(), to.ipv4.into(), 32 << 20);
            traffic::transfer(&from.netns(), &to.netns(), to.ipv6.into(), 16 << 20);
        }
        let is_tunnel = |frame: &[u8]| frame.len() > 70 && frame[20] == 17 && frame[56..58] == 8472_u16.to_be_bytes();
        let seen = wire.find(Duration::from_secs(3), is_tunnel).expect("the tunnel is on the wire");
        assert_eq!(seen[12..14], [0x86, 0xdd], "it is IPv6");
        assert_ne!(seen[60..62], [0, 0], "with a checksum");
        lab.assert_conserved();
    }
}

/// Two nodes with two routers between them.
struct Narrow(Between);

impl Narrow {
    /// Everything arrives, whatever its length, at once or when the pods know better. `kind` is what the way is by.
    fn everything_passes(&self, kind: &str) {
        let [(one, ours), (two, theirs)] = &self.0.pods[..] else { panic!("two pods") };
        for address in theirs {
            traffic::await_answer(one, *address);
        }
        eventually("the way is by that", Duration::from_secs(5), || way(&self.0.nodes[0], "n2").starts_with(kind));
        let ways = [(one, two, theirs), (two, one, ours)];
        let all =
            || ways.iter().flat_map(|(from, to, addresses)| addresses.iter().map(move |address| (from, to, *address)));
        all().for_each(|(from, to, address)| traffic::transfer(from, to, address, 1 << 20));
        // The first packet that is too long is lost, and its sender told. Streams send it again; datagrams come when that is over.
        for (from, _, address) in all() {
            let ping = || from.exec(&format!("ping -n -q -c 1 -W 1 -s 1402 {address}")).success;
            eventually("a long packet is answered", Duration::from_secs(10), ping);
        }
        for (from, to, address) in all() {
            traffic::echo_datagrams(from, to, address, &[0, 500, 600, 1200, 1300, 1402, 5000, 20_000]);
        }
        self.0.nodes.iter().for_each(|node| node.daemon().assert_conserved());
    }
}

#[test]
fn pods_behind_a_path_of_576_bytes_are_reached_with_packets_of_every_size() {
    let _turn = turn();
    let narrow = Narrow(Between::new(Cluster::new("p5").by("xdp"), 576));
    narrow.everything_passes("xdp");
    let node = &narrow.0.nodes[0];
    assert_eq!(way(node, "n2"), "xdp, packets of 576 bytes at most, longer ones in fragments");
    let problems = node.daemon().status().problems;
    assert!(
        problems
            .iter()
            .any(|problem| problem.contains("the path to n2 (10.200.0.2) carries packets of 576 bytes only")),
        "{problems:?}"
    );
    // Pods were told what senders believe at least.
    let far = narrow.0.pods[1].1[0];
    let said = narrow.0.pods[0].0.ip(&format!("route get {far}"));
    assert!(said.contains("mtu 552"), "{said}");
}

#[test]
fn a_router_between_nodes_with_ipv6_addresses_narrows_the_way() {
    let _turn = turn();
    for (suffix, mtu, fragments) in [("p6", 1400, ""), ("p7", 1300, ", longer ones in fragments")] {
        let narrow = Narrow(Between::new(Cluster::new(suffix).by("xdp").over_v6(), mtu));
        narrow.everything_passes("xdp");
        let node = &narrow.0.nodes[0];
        assert_eq!(way(node, "n2"), format!("xdp, packets of {mtu} bytes at most{fragments}"));
        let problems = node.daemon().status().problems;
        let is_told = problems.iter().any(|problem| problem.contains("carries packets of 1300 bytes only"));
        assert_eq!(is_told, !fragments.is_empty(), "{problems:?}");
    }
}

/// That packets of some length go in fragments.
fn is_said(node: &WeftNode) -> bool {
    node.daemon().status().problems.iter().any(|problem| problem.contains("in fragments"))
}

#[test]
fn by_sockets_what_ipv6_demands_of_a_narrow_way_goes_in_fragments_and_it_is_said() {
    let _turn = turn();
    for (suffix, encapsulation, mtu, v6) in [
        ("f1", "vxlan", 576, false),
        ("f2", "vxlan", 1300, true),
        ("f3", "gre", 1290, false),
        ("f4", "ipip", 1285, true),
    ] {
        let cluster = Cluster::new(suffix).by("udp").wrapping(encapsulation);
        let narrow = Narrow(Between::new(if v6 { cluster.over_v6() } else { cluster }, mtu));
        let node = &narrow.0.nodes[0];
        let (pod, far) = (&narrow.0.pods[0].0, narrow.0.pods[1].1[1]);
        traffic::await_answer(pod, far);
        // A way is measured when there is traffic, and longer packets are lost until then.
        eventually("the way is measured", Duration::from_secs(20), || {
            pod.exec(&format!("ping -n -q -c 1 -W 1 -s 1232 {far}"));
            is_said(node)
        });
        narrow.everything_passes(if encapsulation == "vxlan" { "udp" } else { "" });
        for (size, says) in [(1232, "1 received"), (1233, "Packet too big: mtu=1280")] {
            let ping = pod.exec(&format!("ping -6 -n -M do -c 1 -W 2 -s {size} {far}"));
            let said = format!("{}{}", ping.out, ping.err);
            assert!(
                said.contains(says) || size == 1233 && said.contains("mtu: 1280"),
                "{encapsulation} {size}: {said}"
            );
        }
    }
}

#[test]
fn an_underlay_that_leaves_less_than_ipv6_demands_is_used_all_the_same_and_it_is_said() {
    let _turn = turn();
    for encapsulation in ["vxlan", "gre"] {
        let cluster = Cluster::new("less").by("udp").wrapping(encapsulation);
        let node = |number, other| {
            let text = cluster.config(number, "routed", &cluster.peer(other, None)).replace("mtu = 1450\n", "");
            cluster.weft_node_of_mtu(number, &text, 1290)
        };
        let nodes = [node(1, 2), node(2, 1)];
        let pods = [cluster.pod(&nodes[0]), cluster.pod(&nodes[1])];
        for node in &nodes {
            assert_eq!(node.daemon().status().mtu, 1280);
            assert!(is_said(node), "{:?}", node.daemon().status().problems);
        }
        for address in &pods[1].1 {
            traffic::await_answer(&pods[0].0, *address);
            traffic::transfer(&pods[0].0, &pods[1].0, *address, 4 << 20);
            // The first one by IPv4 that is too long is lost, and both are told.
            for from in [&pods[0].0, &pods[1].0] {
                eventually("a long packet is answered", Duration::from_secs(10), || {
                    pods.iter().all(|pod| from.exec(&format!("ping -n -q -c 1 -W 1 -s 1252 {}", pod.1[0])).success)
                });
            }
            traffic::echo_datagrams(&pods[0].0, &pods[1].0, *address, &[0, 1200, 1232, 1252, 5000, 20_000]);
        }
        nodes.iter().for_each(|node| node.daemon().assert_conserved());
    }
}

#[test]
fn a_route_with_an_mtu_of_its_own_is_honoured() {
    let _turn = turn();
    let cluster = Cluster::new("pr").by("xdp");
    let node = |number, other| cluster.weft_node(number, "routed", &cluster.peer(other, None));
    let nodes = [node(1, 2), node(2, 1)];
    let pods: Vec<_> = nodes.iter().map(|node| pod(&cluster, node)).collect();
    let far = pods[1].1[0];
    traffic::await_answer(&pods[0].0, far);
    let told = |mtu: u32| {
        // Longer than that, and not longer than what the pod has been told before.
        let ping = || pods[0].0.exec(&format!("ping -n -c 1 -W 1 -M do -s {} {far}", mtu - 20)).out;
        eventually("the pod is told", Duration::from_secs(5), || ping().contains(&format!("mtu = {mtu}")));
    };
    nodes[0].netns.ip("route add 10.200.0.2/32 dev uplink src 10.200.0.1 mtu 1400");
    told(1350);
    traffic::transfer(&pods[0].0, &pods[1].0, far, 4 << 20);
    nodes[0].netns.ip("route change 10.200.0.2/32 dev uplink src 10.200.0.1 mtu 1380");
    told(1330);
    assert_eq!(way(&nodes[0], "n2"), "xdp, packets of 1380 bytes at most");
    nodes[0].netns.ip("route del 10.200.0.2/32");
    eventually("all is as before", Duration::from_secs(5), || way(&nodes[0], "n2") == "xdp");
    nodes[0].daemon().assert_conserved();
}

const VLAN: u16 = 100;
const FAR: Mac = Mac([2, 0, 0, 0, 0x77, 2]);

/// A frame with these tags: the type of each, and its value.
fn tagged(frame: &[u8], tags: &[[u16; 2]]) -> Vec<u8> {
    let tags = tags.iter().flatten().flat_map(|word| word.to_be_bytes());
    frame[..12].iter().copied().chain(tags).chain(frame[12..].iter().copied()).collect()
}

/// A node by AF_XDP in a VLAN with a pod, and a second node that is made up by raw frames at the other end of its wire.
struct Tagged {
    node: WeftNode,
    pod: (OwnNetns, Vec<IpAddr>),
    /// The other end.
    wire: Wire,
    /// What the node's own kernel is shown.
    kernel: Wire,
    far_vtep: Mac,
    cluster: Cluster,
}

impl Tagged {
    fn new(cluster: Cluster) -> Tagged {
        let cluster = cluster.by("xdp");
        let far_vtep = Mac([2, 0, 0, 0, 0x55, 2]);
        let peer = cluster.peer(2, Some(&far_vtep.to_string()));
        let text = cluster.config(1, "routed", &peer);
        let text = text.replace("device = \"uplink\"", &format!("device = \"uplink\"\nvlan = {VLAN}"));
        let node = cluster.weft_node_of(1, &text, "");
        let pod = pod(&cluster, &node);
        node.netns.ip(&format!("neigh add {} lladdr {FAR} dev uplink nud permanent", cluster.address(2)));
        eventually("the next hop is known", Duration::from_secs(5), || way(&node, "n2") == "xdp");
        let (wire, kernel) = (Wire::with_tags(cluster.underlay(), "n1"), Wire::with_tags(&node.netns, "uplink"));
        Tagged { node, pod, wire, kernel, far_vtep, cluster }
    }

    fn mac(&self) -> Mac {
        let links: serde_json::Value = serde_json::from_str(&self.node.netns.ip("-j link show uplink")).unwrap();
        links[0]["address"].as_str().unwrap().parse().unwrap()
    }

    /// A datagram from the other node's pod to ours in the tunnel, as it is on a wire without tags.
    fn to_pod(&self, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
        let vtep = self.node.daemon().status().vtep_mac.parse().unwrap();
        let src = "10.244.2.2".parse().unwrap();
        let inner =
            frames::udp(L2 { src: self.far_vtep, dst: vtep }, L3 { src, dst: self.pod.1[0], ttl: 64 }, ports, payload);
        self.datagram(8472, &[&frames::vxlan(1)[..], &inner].concat())
    }

    /// A datagram from the other node to this one.
    fn datagram(&self, port: u16, payload: &[u8]) -> Vec<u8> {
        let (src, dst) = (self.cluster.address(2), self.cluster.address(1));
        frames::udp(L2 { src: FAR, dst: self.mac() }, L3 { src, dst, ttl: 64 }, (50_000, port), payload)
    }
}

#[test]
fn the_tunnel_of_a_vlan_leaves_with_its_tag_and_enters_by_it_and_other_frames_are_the_kernels() {
    let _turn = turn();
    for cluster in [Cluster::new("vl"), Cluster::new("vm").over_v6()] {
        let bed = Tagged::new(cluster);
        let socket = bed.pod.0.inside(|| UdpSocket::bind((bed.pod.1[0], 7000)).unwrap());
        socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        // Out: each frame of the tunnel has the tag, also the longest, which is as long as the MTU allows without it.
        let longest = usize::from(if bed.cluster.address(1).is_ipv6() { 1402_u16 } else { 1422 });
        for len in [10, longest] {
            let payload = vec![0x5a; len];
            socket.send_to(&payload, "10.244.2.2:7001").unwrap();
            let is_ours = |frame: &[u8]| frame.len() > len && frame.ends_with(&payload);
            let seen = bed.wire.find(Duration::from_secs(3), is_ours).expect("it is on the wire");
            assert_eq!((&seen[..6], &seen[12..16]), (&FAR.0[..], &[0x81, 0, 0, 100][..]), "{len} bytes");
        }
        // In: with its own tag, a priority, a second tag behind it, or none, which devices may take off.
        let (vlan, service) = (0x8100, 0x88a8);
        let mut buffer = [0; 100];
        for (number, tags) in (0_u8..).zip([
            &[[vlan, VLAN]][..],
            &[[vlan, 0xe000 | VLAN]],
            &[[service, VLAN]],
            &[[service, VLAN], [vlan, 7]],
            &[[vlan, VLAN], [vlan, 7]],
            &[[vlan, 0]],
            &[],
        ]) {
            assert!(bed.wire.send(&tagged(&bed.to_pod((7001, 7000), &[number; 50]), tags)));
            let len = socket.recv(&mut buffer).unwrap_or_else(|error| panic!("{tags:x?}: {error}"));
            assert_eq!(buffer[..len], [number; 50], "{tags:x?}");
        }
        let before = bed.node.daemon().drops("NotForUs");
        assert!(bed.wire.send(&tagged(&bed.to_pod((7001, 7000), &[9; 50]), &[[vlan, VLAN + 1]])));
        assert!(socket.recv(&mut buffer).is_err(), "a frame of another VLAN was delivered");
        assert_eq!(bed.node.daemon().drops("NotForUs"), before + 1);
        bed.others_are_the_kernels(&socket);
        bed.node.daemon().assert_conserved();
    }
}

impl Tagged {
    /// What is no frame of the tunnel, or cannot be understood, is shown to the node's kernel as it came; the tunnel's never are.
    fn others_are_the_kernels(&self, socket: &UdpSocket) {
        let (vlan, service) = (0x8100, 0x88a8);
        let arp = frames::arp_request(FAR, "10.200.0.2".parse().unwrap(), "10.200.0.1".parse().unwrap());
        let strange = [
            tagged(&arp, &[[vlan, VLAN]]),
            tagged(&arp, &[]),
            tagged(&self.datagram(8473, b"another port"), &[[vlan, VLAN]]),
            tagged(&self.to_pod((7001, 7000), b"a third tag"), &[[service, VLAN], [vlan, 7], [vlan, 8]]),
        ];
        while self.kernel.next(Duration::from_millis(50)).is_some() {}
        assert!(self.wire.send(&tagged(&self.to_pod((7001, 7000), b"ours"), &[[vlan, VLAN]])));
        socket.recv(&mut [0; 100]).expect("it is the tunnel's");
        for frame in &strange {
            assert!(self.wire.send(frame));
        }
        let mut shown = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(5);
        while strange.iter().any(|frame| !shown.contains(frame)) {
            assert!(Instant::now() < deadline, "the kernel was shown {shown:02x?}");
            shown.extend(self.kernel.next(Duration::from_millis(100)));
        }
        assert!(!shown.iter().any(|frame| frame.ends_with(b"ours")), "the tunnel's frames are taken");
    }
}

#[test]
fn two_nodes_in_a_vlan_reach_each_other_with_packets_of_every_size_all_of_them_tagged() {
    let _turn = turn();
    let cluster = Cluster::new("vt").by("xdp");
    let node = |number, other| {
        let text = cluster.config(number, "routed", &cluster.peer(other, None));
        let text = text.replace("device = \"uplink\"", &format!("device = \"uplink\"\nvlan = {VLAN}"));
        cluster.weft_node_of(number, &text, "")
    };
    let nodes = [node(1, 2), node(2, 1)];
    let status = nodes[0].daemon().status();
    assert!(status.underlay_kind.starts_with("xdp on uplink, VLAN 100, 1 queue"), "{}", status.underlay_kind);
    let pods: Vec<_> = nodes.iter().map(|node| pod(&cluster, node)).collect();
    traffic::await_answer(&pods[0].0, pods[1].1[0]);
    let by = |node, peer| eventually("by xdp", Duration::from_secs(5), || way(node, peer) == "xdp");
    by(&nodes[0], "n2");
    by(&nodes[1], "n1");
    let wires = ["n1", "n2"].map(|port| Wire::with_tags(cluster.underlay(), port));
    for (from, to) in [(0, 1), (1, 0)] {
        for address in &pods[to].1 {
            traffic::transfer(&pods[from].0, &pods[to].0, *address, 4 << 20);
            traffic::echo_datagrams(&pods[from].0, &pods[to].0, *address, &[0, 1402, 1422, 1423, 65_000]);
        }
    }
    for wire in wires {
        let frames: Vec<_> = std::iter::from_fn(|| wire.next(Duration::from_millis(50))).collect();
        let is_tagged = |frame: &&Vec<u8>| frame[12..16] == [0x81, 0, 0, 100];
        let tunnel = frames.iter().filter(is_tagged).count();
        assert!(tunnel > 1_000, "{tunnel} of {} frames", frames.len());
        let has_port =
            |frame: &Vec<u8>| frame.len() > 38 && frame[12..14] == [8, 0] && frame[36..38] == 8472_u16.to_be_bytes();
        assert!(!frames.iter().any(has_port), "none is without");
    }
    nodes.iter().for_each(|node| node.daemon().assert_conserved());
}
