//! Nodes that know each other, and the world, by a routing daemon alone: BIRD and FRR as they are shipped in `deploy/`, and top-of-rack
//! routers of the same make above them.
//!
//! Two nodes have two uplinks each, to two routers, behind which is a machine with 10.9.0.0/24 and fd00:10:9::/64. No node has a peer or a
//! tunnel.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use weft_tests::cluster::{Cluster, WeftNode};
use weft_tests::command::{Background, eventually, run};
use weft_tests::machine::{need, turn};
use weft_tests::netns::{Netns, OwnNetns};
use weft_tests::traffic;
use weft_tests::wire::Wire;

use super::hostgw::everything_passes;
use super::uplink::pod;

/// BGP connects, and tells, within seconds.
const CONVERGED: Duration = Duration::from_secs(60);
/// The addresses of the machine behind the routers.
const FAR: [&str; 2] = ["10.9.0.1", "fd00:10:9::1"];

/// What routes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Suite {
    Bird,
    Frr,
}

struct Fabric {
    nodes: Vec<WeftNode>,
    pods: Vec<(OwnNetns, Vec<IpAddr>)>,
    far: OwnNetns,
    second: OwnNetns,
    _routers: Vec<OwnNetns>,
    _daemons: Vec<Background>,
    cluster: Cluster,
}

/// A file of `deploy/`, for node `number`: it is written for the first one.
fn shipped(name: &str, number: u8) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.replace("10.244.1.0/24", &format!("10.244.{number}.0/24"))
        .replace("fd00:10:244:1::/64", &format!("fd00:10:244:{number}::/64"))
        .replace("10.200.0.1;", &format!("10.200.0.{number};"))
        .replace("router-id 10.200.0.1\n", &format!("router-id 10.200.0.{number}\n"))
        .replace("65001", &format!("6500{number}"))
}

/// The configuration of the router of network 10.`net`.0.0, which is above both nodes and before the machine behind.
fn router_config(suite: Suite, net: u8) -> String {
    let neighbours = [(1, 65001), (2, 65002)];
    match suite {
        Suite::Bird => {
            let mut text = format!(
                "router id 10.{net}.0.8;\nprotocol device {{ }}\nprotocol direct {{ ipv4; ipv6; }}\n\
                 protocol kernel {{ ipv4 {{ export all; }}; }}\nprotocol kernel {{ ipv6 {{ export all; }}; }}\n\
                 protocol static {{ ipv4; route 10.9.0.0/24 via 10.99.{net}.2; }}\n\
                 protocol static {{ ipv6; route fd00:10:9::/64 via fd00:10:99:{net}::2; }}\n"
            );
            for (node, number) in neighbours {
                for (family, address) in
                    [("ipv4", format!("10.{net}.0.{node}")), ("ipv6", format!("fd00:10:{net}::{node}"))]
                {
                    text += &format!(
                        "protocol bgp {{ local as 65000; neighbor {address} as {number}; {family} {{ import all; \
                         export where source = RTS_BGP || source = RTS_STATIC; }}; }}\n"
                    );
                }
            }
            text
        }
        Suite::Frr => {
            let mut text = format!(
                "ip route 10.9.0.0/24 10.99.{net}.2\nipv6 route fd00:10:9::/64 fd00:10:99:{net}::2\nrouter bgp 65000\n \
                 bgp router-id 10.{net}.0.8\n no bgp ebgp-requires-policy\n no bgp default ipv4-unicast\n"
            );
            for (node, number) in neighbours {
                text += &format!(
                    " neighbor 10.{net}.0.{node} remote-as {number}\n neighbor fd00:10:{net}::{node} remote-as {number}\n"
                );
            }
            for (family, far, prefix) in [
                ("ipv4", "10.9.0.0/24", format!("10.{net}.0.")),
                ("ipv6", "fd00:10:9::/64", format!("fd00:10:{net}::")),
            ] {
                text += &format!(" address-family {family} unicast\n  network {far}\n");
                for (node, _) in neighbours {
                    text += &format!("  neighbor {prefix}{node} activate\n");
                }
                text += " exit-address-family\n";
            }
            text
        }
    }
}

/// Starts a suite's daemons in a namespace.
fn route(suite: Suite, cluster: &Cluster, netns: &Netns, text: &str) -> Vec<Background> {
    let folder = cluster.folder.path().join(format!("routing-{}", netns.0));
    std::fs::create_dir(&folder).expect("the folder is writable");
    let (config, at) = (folder.join("routing.conf"), folder.display());
    std::fs::write(&config, text).expect("the folder is writable");
    let start = |line: String| {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("exec ip netns exec {} {line} >>{at}/log 2>&1", netns.0)]);
        Background::start(command)
    };
    match suite {
        Suite::Bird => vec![start(format!("bird -f -c {at}/routing.conf -s {at}/socket -P {at}/pid"))],
        Suite::Frr => {
            // Its daemons insist on a user of their own, whose folder this then is.
            let mut give = Command::new("sh");
            give.args(["-c", &format!("chmod 0711 {0} && chown -R frr:frr {at}", cluster.folder.path().display())]);
            run(give).must();
            let usual = |name: &str| {
                format!(
                    "/usr/lib/frr/{name} -f {at}/routing.conf -i {at}/{name}.pid -z {at}/zebra.socket --vty_socket {at} -P 0 \
                     --log stdout"
                )
            };
            let zebra = start(usual("zebra"));
            let socket = folder.join("zebra.socket");
            eventually("zebra listens", Duration::from_secs(20), || socket.exists());
            vec![zebra, start(usual("staticd")), start(usual("bgpd"))]
        }
    }
}

/// A second network between nodes and routers.
fn second_link(second: &OwnNetns, machine: &Netns, number: u8) {
    machine.ip(&format!("link add uplink2 type veth peer name m{number} netns {}", second.0));
    second.ip(&format!("link set m{number} master br0 up"));
    machine.ip(&format!("address add 10.201.0.{number}/24 dev uplink2"));
    machine.ip(&format!("address add fd00:10:201::{number}/64 dev uplink2 nodad"));
    machine.ip("link set uplink2 up");
    machine.ip(&format!("address add fd00:10:200::{number}/64 dev uplink nodad"));
}

impl Fabric {
    fn new(suite: Suite, name: &str) -> Fabric {
        need(&[("/usr/sbin/bird", "bird2"), ("/usr/lib/frr/bgpd", "frr")]);
        let cluster = Cluster::new(name).by("udp");
        let second = OwnNetns::new(&format!("{}-second", cluster.name));
        second.ip("link add br0 type bridge");
        second.ip("link set br0 up");
        let nodes: Vec<WeftNode> = [1, 2].map(|number| cluster.weft_node(number, "routed", "")).into();
        nodes.iter().for_each(|node| second_link(&second, &node.netns, node.number));
        let far = OwnNetns::new(&format!("{}-far", cluster.name));
        FAR.iter().for_each(|address| drop(far.ip(&format!("address add {address} dev lo"))));
        let routers: Vec<OwnNetns> = [200, 201]
            .map(|net| {
                let machine = OwnNetns::new(&format!("{}-r{net}", cluster.name));
                let bridge = if net == 200 { cluster.underlay() } else { &second };
                machine.ip(&format!("link add nodes type veth peer name r{net} netns {}", bridge.0));
                bridge.ip(&format!("link set r{net} master br0 up"));
                machine.ip(&format!("address add 10.{net}.0.8/24 dev nodes"));
                machine.ip(&format!("address add fd00:10:{net}::8/64 dev nodes nodad"));
                machine.ip("link set nodes up");
                machine.ip(&format!("link add far type veth peer name r{net} netns {}", far.0));
                for (end, at, last) in [(&machine, "far".to_owned(), 1), (&far, format!("r{net}"), 2)] {
                    end.ip(&format!("address add 10.99.{net}.{last}/24 dev {at}"));
                    end.ip(&format!("address add fd00:10:99:{net}::{last}/64 dev {at} nodad"));
                    end.ip(&format!("link set {at} up"));
                }
                machine.set("net/ipv4/ip_forward", "1");
                machine.set("net/ipv6/conf/all/forwarding", "1");
                machine
            })
            .into();
        far.ip("route add 10.244.0.0/16 src 10.9.0.1 nexthop via 10.99.200.1 nexthop via 10.99.201.1");
        far.ip(
            "route add fd00:10:244::/48 src fd00:10:9::1 nexthop via fd00:10:99:200::1 nexthop via fd00:10:99:201::1",
        );
        let file = if suite == Suite::Bird { "bird/bird.conf" } else { "frr/frr.conf" };
        let mut daemons = Vec::new();
        for (router, net) in routers.iter().zip([200, 201]) {
            daemons.extend(route(suite, &cluster, router, &router_config(suite, net)));
        }
        for node in &nodes {
            daemons.extend(route(suite, &cluster, &node.netns, &shipped(file, node.number)));
        }
        let pods = nodes.iter().map(|node| pod(&cluster, node)).collect();
        Fabric { nodes, pods, far, second, _routers: routers, _daemons: daemons, cluster }
    }

    /// Which next hops weftd has for a destination.
    fn next_hops(&self, node: usize, destination: &str) -> usize {
        let routes: Vec<weft_api::RouteInfo> = self.nodes[node].daemon().ask(&weft_api::Request::Routes);
        let found = routes.iter().find(|route| route.destination == destination);
        found.map_or(0, |route| route.via.matches("port ").count())
    }

    fn await_next_hops(&self, node: usize, destination: &str, count: usize) {
        let started = Instant::now();
        while self.next_hops(node, destination) != count {
            if started.elapsed() > CONVERGED {
                let routes: Vec<weft_api::RouteInfo> = self.nodes[node].daemon().ask(&weft_api::Request::Routes);
                let netns = &self.nodes[node].netns;
                let logs =
                    self._routers.iter().map(|router| &router.0).chain(self.nodes.iter().map(|node| &node.netns.0));
                let logs: String = logs
                    .map(|name| self.cluster.folder.path().join(format!("routing-{name}/log")))
                    .map(|path| std::fs::read_to_string(path).unwrap_or_default())
                    .collect();
                panic!("{destination} has not {count} next hops: {routes:?}\n{}\n{logs}", netns.ip("route show"));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn converged(&self) {
        for (node, other) in [(0, 2), (1, 1)] {
            for destination in
                [&format!("10.244.{other}.0/24"), &format!("fd00:10:244:{other}::/64"), "10.9.0.0/24", "fd00:10:9::/64"]
            {
                self.await_next_hops(node, destination, 2);
            }
        }
    }
}

/// The frames that passed to the first node's two uplinks' other ends, by UDP source port.
fn flows(wires: &[Wire; 2]) -> [BTreeMap<u16, usize>; 2] {
    wires.each_ref().map(|wire| {
        let mut seen = BTreeMap::new();
        let is_ours = |frame: &[u8]| {
            frame.len() >= 42 && frame[12..14] == [8, 0] && frame[23] == 17 && frame[30..34] == [10, 9, 0, 1]
        };
        while let Some(frame) = wire.find(Duration::from_millis(100), is_ours) {
            *seen.entry(u16::from_be_bytes([frame[34], frame[35]])).or_default() += 1;
        }
        seen
    })
}

/// Sends a datagram of each flow, as often as is said.
fn send(sockets: &[UdpSocket], times: usize) {
    let to: SocketAddr = "10.9.0.1:9999".parse().expect("an address");
    for _ in 0..times {
        for socket in sockets {
            socket.send_to(b"flow", to).expect("a pod can send");
        }
    }
}

fn ranges_and_the_world_are_known_by_routes_alone(suite: Suite, name: &str) {
    let _turn = turn();
    let fabric = Fabric::new(suite, name);
    fabric.converged();
    everything_passes(&fabric.pods[0], &fabric.pods[1]);
    // Neither tunnel nor translation: the far machine sees the pod's own address, and reaches it.
    let far: Vec<IpAddr> = FAR.iter().map(|address| address.parse().expect("an address")).collect();
    let (pod, addresses) = &fabric.pods[0];
    for (own, address) in addresses.iter().zip(&far) {
        traffic::transfer(pod, &fabric.far, *address, 8 << 20);
        traffic::transfer(&fabric.far, pod, *own, 8 << 20);
        let server = fabric.far.inside(|| UdpSocket::bind((*address, 7777))).expect("the port is free");
        let socket = pod.inside(|| UdpSocket::bind((*own, 0))).expect("a pod has ports");
        socket.send_to(b"who am I?", (*address, 7777)).expect("a pod can send");
        server.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout");
        let (_, from) = server.recv_from(&mut [0; 64]).expect("it arrives");
        assert_eq!(from.ip(), *own);
    }
    for node in &fabric.nodes {
        let status = node.daemon().status();
        assert!(status.problems.is_empty(), "{:?}", status.problems);
        assert_eq!(node.daemon().underlay().out, 0, "no tunnel");
        node.daemon().assert_conserved();
    }
    flows_use_both_uplinks(&fabric);
}

/// 64 flows use both uplinks, each one of them; when one is down, all use the other within a second.
fn flows_use_both_uplinks(fabric: &Fabric) {
    let sockets: Vec<UdpSocket> = fabric.pods[0]
        .0
        .inside(|| (0..64).map(|_| UdpSocket::bind((fabric.pods[0].1[0], 0)).expect("a pod has ports")).collect());
    let open = || [Wire::open(fabric.cluster.underlay(), "n1"), Wire::open(&fabric.second, "m1")];
    let wires = open();
    send(&sockets, 4);
    let [one, two] = flows(&wires);
    assert!(one.keys().all(|flow| !two.contains_key(flow)), "a flow is on both: {one:?} {two:?}");
    assert!(one.len() >= 20 && two.len() >= 20 && one.len() + two.len() == 64, "{} and {}", one.len(), two.len());
    fabric.nodes[0].netns.ip("link set uplink2 down");
    std::thread::sleep(Duration::from_secs(1));
    let wires = open();
    send(&sockets, 1);
    let [all, none] = flows(&wires);
    assert_eq!((all.len(), none.len()), (64, 0), "they moved within a second");
    fabric.nodes[0].netns.ip("link set uplink2 up");
}

#[test]
fn bird_as_shipped_announces_pods_and_learns_where_others_are() {
    ranges_and_the_world_are_known_by_routes_alone(Suite::Bird, "bb");
}

#[test]
fn frr_as_shipped_announces_pods_and_learns_where_others_are() {
    ranges_and_the_world_are_known_by_routes_alone(Suite::Frr, "bf");
}
