//! A node whose data path is the kernel's own VXLAN device, beside nodes of ours: they cannot tell the difference.
//!
//! *Routed* is Flannel's layout: the device is not enslaved and does not learn, neighbour and FDB entries are permanent, inner MACs are the
//! VTEPs'. *Bridged* puts the device into a Linux bridge and lets it learn. Each is tried with the offloads that veths have,
//! and without any, so that every checksum is really on the wire and verified by whoever receives it.

use std::net::IpAddr;
use std::time::Duration;

use serde_json::{Value, json};
use weft_encap::mac::Mac;
use weft_tests::cluster::{Cluster, WeftNode};
use weft_tests::frames::{self, L2, L3};
use weft_tests::machine::turn;
use weft_tests::netns::{Netns, OwnNetns};
use weft_tests::plugin;
use weft_tests::traffic;
use weft_tests::wire::Wire;

const KERNEL_MAC: &str = "02:be:ef:00:00:02";
const OFFLOADS_OFF: &str = "tso off gso off gro off tx off rx off tx-udp-segmentation off";

/// Two nodes of ours and one of the kernel's, a pod on each.
struct Mixed {
    cluster: Cluster,
    nodes: Vec<WeftNode>,
    /// Pods of our nodes, then the kernel's.
    pods: Vec<(OwnNetns, Vec<IpAddr>)>,
    kernel: OwnNetns,
    mtu: u32,
}

/// `ports` are the kinds of our pods' ports; null is the node's own choice.
fn mixed(cluster: Cluster, mode: &str, ports: [Value; 2]) -> Mixed {
    let peers =
        |others: [u8; 1]| others.map(|number| cluster.peer(number, None)).concat() + &cluster.peer(2, Some(KERNEL_MAC));
    let mtu = if cluster.address(1).is_ipv6() { 1430 } else { 1450 };
    let nodes = vec![cluster.weft_node(1, mode, &peers([3])), cluster.weft_node(3, mode, &peers([1]))];
    let kernel = cluster.machine(2);
    let mut pods = Vec::new();
    for (node, keys) in nodes.iter().zip(&ports) {
        let pod = cluster.sandbox(&format!("p{}", node.number));
        let addresses = plugin::addresses(&node.attach_with("pod", &pod, keys));
        pods.push((pod, addresses));
    }
    let pod = cluster.sandbox("p2");
    kernel.ip("link add cni0 type bridge");
    kernel.ip(&format!("link set cni0 mtu {mtu} up"));
    kernel.ip(&format!("link add pod type veth peer name eth0 netns {}", pod.0));
    kernel.ip(&format!("link set pod mtu {mtu} master cni0 up"));
    pod.ip(&format!("link set eth0 mtu {mtu} up"));
    let addresses = ["10.244.2.2", "fd00:10:244:2::2"].map(|address| address.parse().unwrap()).to_vec();
    pods.push((pod, addresses));
    let mixed = Mixed { cluster, nodes, pods, kernel, mtu };
    if mode == "routed" {
        mixed.flannel()
    } else {
        mixed.learning_bridge()
    }
    mixed.await_answers();
    mixed
}

impl Mixed {
    fn vxlan(&self, options: &str) {
        let local = self.cluster.address(2);
        self.kernel.ip(&format!(
            "link add vxlan address {KERNEL_MAC} type vxlan id 1 local {local} dev uplink dstport 8472 {options}"
        ));
        self.kernel.ip(&format!("link set vxlan mtu {} up", self.mtu));
    }

    fn flannel(&self) {
        let (kernel, pod) = (&self.kernel, &self.pods[2].0);
        self.vxlan("nolearning");
        for (what, value) in [("ipv4/ip_forward", 1), ("ipv6/conf/all/forwarding", 1), ("ipv4/conf/all/rp_filter", 0)] {
            let mut command = kernel.command("sh");
            command.args(["-c", &format!("echo {value} > /proc/sys/net/{what}")]);
            weft_tests::command::run(command).must();
        }
        kernel.ip("address add 10.244.2.0/32 dev vxlan");
        kernel.ip("address add 10.244.2.1/24 dev cni0");
        kernel.ip("-6 address add fd00:10:244:2::1/64 dev cni0 nodad");
        for node in &self.nodes {
            let (number, mac) = (node.number, node.daemon().status().vtep_mac);
            kernel.ip(&format!("neigh add 10.244.{number}.0 lladdr {mac} dev vxlan nud permanent"));
            kernel.ip(&format!("neigh add fd00:10:244:{number}:: lladdr {mac} dev vxlan nud permanent"));
            let underlay = self.cluster.address(number);
            kernel.exec(&format!("bridge fdb add {mac} dev vxlan dst {underlay} self permanent")).must();
            kernel.ip(&format!("route add 10.244.{number}.0/24 via 10.244.{number}.0 dev vxlan onlink"));
            kernel.ip(&format!("route add fd00:10:244:{number}::/64 via fd00:10:244:{number}:: dev vxlan onlink"));
        }
        pod.ip("address add 10.244.2.2/24 dev eth0");
        pod.ip("-6 address add fd00:10:244:2::2/64 dev eth0 nodad");
        pod.ip("route add default via 10.244.2.1");
        pod.ip("-6 route add default via fd00:10:244:2::1");
    }

    fn learning_bridge(&self) {
        let (kernel, pod) = (&self.kernel, &self.pods[2].0);
        self.vxlan("learning");
        kernel.ip("link set vxlan master cni0");
        for node in &self.nodes {
            let underlay = self.cluster.address(node.number);
            let flood = format!("bridge fdb append 00:00:00:00:00:00 dev vxlan dst {underlay}");
            kernel.exec(&flood).must();
        }
        pod.ip("address add 10.244.2.2/16 dev eth0");
        pod.ip("-6 address add fd00:10:244:2::2/48 dev eth0 nodad");
    }

    /// The end of the set-up: each pod has answered each other.
    fn await_answers(&self) {
        for (from, own) in &self.pods {
            let others = self.pods.iter().filter(|(_, addresses)| addresses != own);
            for address in others.flat_map(|(_, addresses)| addresses) {
                traffic::await_answer(from, *address);
            }
        }
    }

    /// Like machines with network cards that can do nothing.
    fn without_offloads(&self) {
        let machines: Vec<&Netns> = self.nodes.iter().map(|node| &*node.netns).chain([&*self.kernel]).collect();
        for (machine, device) in machines
            .iter()
            .map(|machine| (*machine, "uplink"))
            .chain([(&*self.kernel, "pod"), (&*self.pods[2].0, "eth0")])
        {
            machine.exec(&format!("ethtool -K {device} {OFFLOADS_OFF}"));
            let features = machine.exec(&format!("ethtool -k {device}")).must();
            assert!(features.contains("tcp-segmentation-offload: off"), "{device}: {features}");
        }
    }

    /// Everything that must work between two pods, one way.
    fn everything_passes(&self, from: usize, to: usize) {
        let ((from, _), (to, addresses)) = (&self.pods[from], &self.pods[to]);
        for address in addresses {
            let family = if address.is_ipv4() { "-4" } else { "-6" };
            for size in [0, 56, 1402, 1422, 5000, 65_000] {
                from.exec(&format!("ping {family} -n -q -c 3 -i 0.05 -W 2 -s {size} {address}")).must();
            }
            traffic::echo_datagrams(from, to, *address, &[0, 1, 100, 1402, 1422, 1423, 5000, 60_000]);
            traffic::transfer(from, to, *address, 48 << 20);
            let udp = traffic::iperf3(from, to, *address, "-u -b 100M -l 1400 -t 1");
            assert!(udp > 50e6, "UDP to {address}: {udp} bit/s");
        }
    }

    /// Nobody saw a wrong checksum, and no frame was lost in the count.
    fn was_clean(&self) {
        for (pod, _) in &self.pods {
            assert_eq!(checksum_errors(pod), 0, "{} saw wrong checksums", pod.0);
        }
        for node in &self.nodes {
            node.daemon().assert_conserved();
            let drops = node.daemon().all_drops();
            for reason in
                ["TunnelSource", "NotMember", "TunnelHeader", "WrongVni", "BadIpv4Checksum", "Malformed", "BadOffload"]
            {
                assert_eq!(drops.get(reason).unwrap_or(&0), &0, "{reason} on n{}: {drops:?}", node.number);
            }
        }
    }
}

/// Frames with a wrong checksum that a namespace's own stack has refused.
fn checksum_errors(netns: &Netns) -> u64 {
    let report = netns
        .exec("nstat -az -j TcpInCsumErrors UdpInCsumErrors Udp6InCsumErrors Icmp6InCsumErrors IcmpInCsumErrors")
        .must();
    let report: Value = serde_json::from_str(&report).expect("nstat -j prints JSON");
    report["kernel"].as_object().expect("counters").values().filter_map(Value::as_u64).sum()
}

const CHOSEN: [Value; 2] = [Value::Null, Value::Null];

fn interoperates(suffix: &str, mode: &str, offloads: bool, ports: [Value; 2]) {
    let _turn = turn();
    interoperate(Cluster::new(suffix), mode, offloads, ports);
}

fn interoperate(cluster: Cluster, mode: &str, offloads: bool, ports: [Value; 2]) {
    let mixed = mixed(cluster, mode, ports);
    if !offloads {
        mixed.without_offloads();
    }
    let kernel = 2;
    mixed.everything_passes(0, kernel);
    mixed.everything_passes(kernel, 0);
    // The second node of ours, so that it is not only the one pair.
    for (from, to) in [(1, kernel), (kernel, 1), (0, 1)] {
        for address in &mixed.pods[to].1 {
            mixed.pods[from].0.exec(&format!("ping -n -q -c 1 -W 2 -s 3000 {address}")).must();
        }
    }
    mixed.was_clean();
    drop(mixed.cluster);
}

#[test]
fn routed_with_a_flannel_node() {
    interoperates("ir", "routed", true, CHOSEN);
}

#[test]
fn routed_with_a_flannel_node_when_no_device_has_offloads() {
    interoperates("iro", "routed", false, CHOSEN);
}

#[test]
fn bridged_with_a_learning_linux_bridge() {
    interoperates("ib", "bridged", true, CHOSEN);
}

#[test]
fn bridged_with_a_learning_linux_bridge_when_no_device_has_offloads() {
    interoperates("ibo", "bridged", false, CHOSEN);
}

#[test]
fn pods_by_xdp_a_pod_by_tap_and_a_flannel_node_reach_each_other() {
    interoperates("ix", "routed", true, ["xdp", "tap"].map(|port| json!({ "port": port })));
}

#[test]
fn pods_by_xdp_a_pod_by_tap_and_a_learning_linux_bridge_reach_each_other_without_offloads() {
    interoperates("ixo", "bridged", false, ["xdp", "tap"].map(|port| json!({ "port": port })));
}

#[test]
fn the_kernels_nodes_cannot_tell_an_underlay_by_xdp_from_one_by_udp() {
    let _turn = turn();
    for (suffix, mode, offloads) in [("iu", "routed", true), ("iuo", "bridged", false)] {
        interoperate(Cluster::new(suffix).by("xdp"), mode, offloads, CHOSEN);
    }
}

#[test]
fn over_ipv6_the_kernels_nodes_understand_ours_as_well() {
    let _turn = turn();
    for (suffix, mode, offloads, kind) in [("i6", "routed", true, "xdp"), ("i6o", "bridged", false, "udp")] {
        interoperate(Cluster::new(suffix).over_v6().by(kind), mode, offloads, CHOSEN);
    }
}

#[test]
fn all_kinds_of_ports_underlays_and_nodes_reach_each_other() {
    let _turn = turn();
    for (suffix, mode) in [("im", "routed"), ("imb", "bridged")] {
        let cluster = Cluster::new(suffix).with(1, "xdp").with(3, "udp");
        let mut mixed = mixed(cluster, mode, ["tap", "xdp"].map(|port| json!({ "port": port })));
        for (node, port) in [(0, "xdp"), (1, "tap")] {
            let node = &mixed.nodes[node];
            let pod = mixed.cluster.sandbox(&format!("q{}", node.number));
            let addresses = plugin::addresses(&node.attach_with("more", &pod, &json!({ "port": port })));
            mixed.pods.push((pod, addresses));
        }
        let kinds = mixed.nodes.iter().map(|node| node.daemon().underlay().kind);
        assert_eq!(kinds.collect::<Vec<_>>(), ["xdp", "udp"]);
        mixed.await_answers();
        for (from, own) in &mixed.pods {
            for (to, addresses) in mixed.pods.iter().filter(|(_, addresses)| addresses != own) {
                for address in addresses {
                    traffic::transfer(from, to, *address, 4 << 20);
                    traffic::echo_datagrams(from, to, *address, &[0, 1402, 1422, 1423, 5000, 65_000]);
                }
            }
        }
        mixed.was_clean();
    }
}

#[test]
fn a_wrong_checksum_is_refused_by_the_receiver_and_never_repaired_on_the_way() {
    let _turn = turn();
    for mode in ["routed", "bridged"] {
        let mixed = mixed(Cluster::new("ic"), mode, CHOSEN);
        let (ours, kernels) = (&mixed.pods[0], &mixed.pods[2]);
        for ((from, source), (to, target)) in [(ours, kernels), (kernels, ours)] {
            for family in 0..2 {
                let (src, dst) = (source[family], target[family]);
                from.exec(&format!("ping -n -c 1 -W 2 {dst}")).must();
                let listener = to.inside(|| std::net::UdpSocket::bind((dst, 9999)).unwrap());
                listener.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
                let l2 = L2 { src: mac_of(from), dst: next_hop(from, dst) };
                let wire = Wire::open(from, "eth0");
                let mut frame = frames::udp(l2, L3 { src, dst, ttl: 64 }, (9998, 9999), &[0x31; 100]);
                assert!(wire.send(&frame));
                let mut buffer = [0; 200];
                assert_eq!(listener.recv(&mut buffer).expect("a good datagram arrives"), 100);
                let before = checksum_errors(to);
                let last = frame.len() - 1;
                frame[last] ^= 0x40;
                for _ in 0..10 {
                    assert!(wire.send(&frame));
                }
                assert!(
                    listener.recv(&mut buffer).is_err(),
                    "{mode}: a damaged datagram from {src} was delivered to {dst}"
                );
                assert_eq!(checksum_errors(to) - before, 10, "{mode}: {src} to {dst}");
            }
        }
    }
}

fn mac_of(netns: &Netns) -> Mac {
    let links: Value = serde_json::from_str(&netns.ip("-j link show dev eth0")).unwrap();
    links[0]["address"].as_str().unwrap().parse().unwrap()
}

/// The MAC to which a pod sends what is for an address.
fn next_hop(netns: &Netns, dst: IpAddr) -> Mac {
    let route: Value = serde_json::from_str(&netns.ip(&format!("-j route get {dst}"))).unwrap();
    let hop = route[0]["gateway"].as_str().map_or(dst.to_string(), str::to_owned);
    let neighbours: Value = serde_json::from_str(&netns.ip(&format!("-j neigh show {hop}"))).unwrap();
    neighbours[0]["lladdr"].as_str().unwrap_or_else(|| panic!("{hop} has no MAC in {}", netns.0)).parse().unwrap()
}
