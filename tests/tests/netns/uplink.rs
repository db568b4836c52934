//! The underlay by AF_XDP: everything as by UDP, and the node's own traffic never notices.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use weft_encap::mac::Mac;
use weft_router::port::sys::bpf::{Map, MapKind, Mode, Program};
use weft_router::port::xdp::programs;
use weft_tests::cluster::{Cluster, WeftNode, peer};
use weft_tests::command::eventually;
use weft_tests::frames::{self, L2};
use weft_tests::lab::Lab;
use weft_tests::machine::turn;
use weft_tests::netns::{Netns, OwnNetns};
use weft_tests::traffic;
use weft_tests::wire::Wire;

use super::reach::{every_size_passes, everyone_reaches_everyone, pings};

/// What `ip` says of a node's uplink.
fn uplink(node: &Netns) -> String {
    node.ip("-d link show uplink")
}

#[track_caller]
fn expect_program(node: &Netns, expected: bool) {
    eventually(&format!("a program on the uplink: {expected}"), Duration::from_secs(3), || {
        uplink(node).contains("weft_uplink") == expected
    });
}

/// A routed node's configuration with these keys of the underlay, whatever the tests' environment says.
fn config(cluster: &Cluster, number: u8, keys: &str, peers: &str) -> String {
    let config = cluster.config(number, "routed", peers);
    let config: String = config.lines().filter(|line| !line.starts_with("kind = ")).map(|l| format!("{l}\n")).collect();
    config.replace("[underlay]\n", &format!("[underlay]\n{keys}\n"))
}

fn node_by(cluster: &Cluster, number: u8, keys: &str, peers: &str) -> WeftNode {
    cluster.weft_node_of(number, &config(cluster, number, keys, peers), "")
}

/// A pod, and its addresses.
pub fn pod(cluster: &Cluster, node: &WeftNode) -> (OwnNetns, Vec<IpAddr>) {
    cluster.pod(node)
}

/// How a node reaches another, as `weft nodes` says it.
pub fn way(node: &WeftNode, peer: &str) -> String {
    let nodes: Vec<weft_api::NodeInfo> = node.daemon().ask(&weft_api::Request::Nodes);
    nodes.into_iter().find(|node| node.name == peer).expect("it is a peer").way
}

#[test]
fn nodes_by_xdp_reach_each_other_with_packets_of_every_size() {
    let _turn = turn();
    for (mode, workers, port) in [("routed", "2", "tap"), ("bridged", "1", "xdp")] {
        let lab = Lab::up("u", 2, 2, mode, &["--underlay", "xdp", "--workers", workers, "--port", port]);
        for node in &lab.nodes {
            expect_program(&node.netns(), true);
            let status = node.daemon().status();
            assert!(status.underlay_kind.starts_with("xdp on uplink, 1 queue"), "{}", status.underlay_kind);
            assert!(status.problems.is_empty(), "{:?}", status.problems);
        }
        everyone_reaches_everyone(&lab);
        let (here, there) = (lab.pod(1, 1), lab.pod(2, 2));
        every_size_passes(here, there);
        for (from, to) in [(here, there), (there, here)] {
            traffic::transfer(&from.netns(), &to.netns(), to.ipv4.into(), 64 << 20);
            traffic::transfer(&from.netns(), &to.netns(), to.ipv6.into(), 16 << 20);
        }
        let underlay = lab.daemon(2).underlay();
        assert_eq!(underlay.kind, "xdp");
        assert!(underlay.counters.merged > 1_000, "segments are merged on the way in: {underlay:?}");
        lab.assert_conserved();
    }
}

#[test]
fn jumbo_frames_pass_by_an_xdp_underlay() {
    let _turn = turn();
    let lab = Lab::up("uj", 2, 1, "routed", &["--underlay", "xdp", "--mtu", "9000"]);
    let (here, there) = (lab.pod(1, 1), lab.pod(2, 1));
    expect_program(&lab.nodes[0].netns(), true);
    pings(here, there.ipv4.into(), "-c 1 -M do -s 8922");
    every_size_passes(here, there);
    traffic::transfer(&here.netns(), &there.netns(), there.ipv4.into(), 64 << 20);
    lab.assert_conserved();
}

#[test]
fn nodes_by_xdp_by_udp_and_by_choice_understand_each_other() {
    let _turn = turn();
    let cluster = Cluster::new("um");
    let peers = |own: u8| (1..=3).filter(|other| *other != own).map(|other| peer(other, None)).collect::<String>();
    let kinds = ["kind = \"xdp\"", "kind = \"udp\"", "kind = \"auto\""];
    let nodes: Vec<WeftNode> =
        (1..).zip(kinds).map(|(number, kind)| node_by(&cluster, number, kind, &peers(number))).collect();
    let shown: Vec<String> = nodes.iter().map(|node| node.daemon().status().underlay_kind).collect();
    assert!(shown[0].starts_with("xdp on uplink") && shown[1].starts_with("udp, "), "{shown:?}");
    assert!(shown[2].starts_with("udp (auto: uplink is a veth, where UDP is faster)"), "{shown:?}");
    let pods: Vec<_> = nodes.iter().map(|node| pod(&cluster, node)).collect();
    for (from, _) in &pods {
        for (to, addresses) in pods.iter().filter(|(to, _)| to.0 != from.0) {
            for address in addresses {
                traffic::await_answer(from, *address);
                traffic::transfer(from, to, *address, 16 << 20);
                traffic::echo_datagrams(from, to, *address, &[0, 1_422, 1_423, 65_000]);
            }
        }
    }
    assert_eq!((way(&nodes[0], "n2"), way(&nodes[1], "n1")), ("xdp".into(), "udp".into()));
    nodes.iter().for_each(|node| node.daemon().assert_conserved());
}

#[test]
fn no_program_is_left_by_a_weftd_that_stops_or_is_killed_and_the_next_one_has_its_own() {
    let _turn = turn();
    let cluster = Cluster::new("uk");
    let mut node = node_by(&cluster, 1, "kind = \"xdp\"", &peer(2, None));
    for round in 0..4 {
        expect_program(&node.netns, true);
        if round % 2 == 0 {
            node.kill();
        } else {
            node.stop();
        }
        // At once, for the next one must cope with what the last one has not yet let go.
        if round < 2 {
            expect_program(&node.netns, false);
        }
        node.start_again();
        assert!(node.daemon().status().problems.is_empty(), "{:?}", node.daemon().status().problems);
    }
    expect_program(&node.netns, true);
    node.stop();
    expect_program(&node.netns, false);
}

#[test]
fn a_program_of_somebody_else_is_left_alone_and_named() {
    let _turn = turn();
    let cluster = Cluster::new("us");
    let peers = [peer(2, None), peer(1, None)];
    let mut node = node_by(&cluster, 1, "kind = \"udp\"", &peers[0]);
    let other = node_by(&cluster, 2, "kind = \"xdp\"", &peers[1]);
    // Like any program that has nothing to do with us, it passes what it does not know.
    let map = Map::create(MapKind::Xsk, "theirs", 4, 4, 1).unwrap();
    let tunnel = programs::Tunnel { addresses: vec![[192, 0, 2, 1].into()], port: 1, vlan: None, secret: 7 };
    let program = programs::uplink(&map, &tunnel, weft_router::port::xdp::Verdict::Pass);
    let index = interface(&node.netns);
    let theirs = Program::load("theirs", &program).unwrap();
    let theirs = node.netns.inside(|| theirs.attach(index, Mode::Native)).unwrap();
    // What cannot change while weftd runs is refused, and read when it starts.
    let refused = node.reload(&config(&cluster, 1, "kind = \"xdp\"", &peers[0])).unwrap_err().to_string();
    assert!(refused.contains("cannot change while weftd runs: underlay.kind"), "{refused}");
    node.stop();
    node.start_again();
    let status = node.daemon().status();
    let problem = status.problems.iter().find(|problem| problem.contains("AF_XDP")).expect("it is told");
    assert!(problem.contains("another program is attached") && problem.contains("uplink"), "{problem}");
    assert!(status.underlay_kind.starts_with("udp"), "{}", status.underlay_kind);
    assert!(uplink(&node.netns).contains("name theirs"), "{}", uplink(&node.netns));
    let pods = [pod(&cluster, &node), pod(&cluster, &other)];
    traffic::transfer(&pods[0].0, &pods[1].0, pods[1].1[0], 4 << 20);
    drop(theirs);
    node.stop();
    node.start_again();
    expect_program(&node.netns, true);
}

fn interface(netns: &Netns) -> u32 {
    let links: serde_json::Value = serde_json::from_str(&netns.ip("-j link show uplink")).unwrap();
    links[0]["ifindex"].as_u64().unwrap() as u32
}

#[test]
fn without_the_rights_for_it_the_tunnel_goes_by_udp_and_says_why() {
    let _turn = turn();
    let cluster = Cluster::new("ur");
    let text = config(&cluster, 1, "kind = \"xdp\"", &peer(2, None));
    let node = cluster.weft_node_of(1, &text, "setpriv --bounding-set=-net_raw");
    let status = node.daemon().status();
    let problem = status.problems.iter().find(|problem| problem.contains("AF_XDP")).expect("it is told");
    assert!(problem.contains("not permitted"), "{problem}");
    assert!(status.underlay_kind.starts_with("udp"), "{}", status.underlay_kind);
}

/// A stream of the node's own, from one machine to the other, that notes its longest silence.
struct Stream<'a> {
    ended: &'a AtomicBool,
}

impl Stream<'_> {
    fn run(self, from: &Netns, to: &Netns, address: IpAddr) -> (u64, Duration) {
        let listener = to.inside(|| TcpListener::bind(SocketAddr::new(address, 0)).unwrap());
        let target = listener.local_addr().unwrap();
        let sender = from.inside(|| TcpStream::connect(target).unwrap());
        let (mut receiver, _) = listener.accept().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || self.send(sender));
            let (mut bytes, mut count, mut longest) = (vec![0; 64 << 10], 0_u64, Duration::ZERO);
            loop {
                let waited = Instant::now();
                let len = receiver.read(&mut bytes).expect("the stream is not reset");
                if len == 0 {
                    return (count, longest);
                }
                longest = longest.max(waited.elapsed());
                for byte in &bytes[..len] {
                    assert_eq!(*byte, (count % 251) as u8, "byte {count} of the stream");
                    count += 1;
                }
            }
        })
    }

    fn send(self, mut sender: TcpStream) {
        let pattern: Vec<u8> = (0..251_u8).cycle().take(251 * 64).collect();
        while !self.ended.load(Ordering::Relaxed) {
            sender.write_all(&pattern).expect("the stream is not reset");
            std::thread::sleep(Duration::from_micros(500));
        }
    }
}

/// A retransmission comes after 200 ms at first; a second one would come 400 ms later.
const LONGEST: Duration = Duration::from_millis(590);
/// A machine that is busy otherwise makes streams wait, too.
const ATTEMPTS: usize = 4;

#[test]
fn streams_of_the_node_itself_do_not_notice_that_weftd_comes_and_goes() {
    let _turn = turn();
    let cluster = Cluster::new("un");
    let mut node = node_by(&cluster, 1, "kind = \"xdp\"", &peer(2, None));
    let machine = cluster.machine(2);
    let mut all = Vec::new();
    for _ in 0..ATTEMPTS {
        let silences = come_and_go(&mut node, &machine);
        if silences.iter().all(|longest| *longest < LONGEST) {
            return;
        }
        all.push(silences);
    }
    panic!("nothing came for so long, there and back: {all:?}");
}

/// Ends the streams when it goes.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Has weftd start, stop and be killed under two streams, one each way. Returns the longest silence of each.
fn come_and_go(node: &mut WeftNode, machine: &Netns) -> [Duration; 2] {
    let (own, theirs): (IpAddr, IpAddr) = (node.underlay().into(), [10, 200, 0, 2].into());
    node.stop();
    expect_program(&node.netns, false);
    let ended = AtomicBool::new(false);
    let netns = Netns(node.netns.0.clone());
    std::thread::scope(|scope| {
        // Also if something fails: the scope waits for both.
        let end = End(&ended);
        let there = scope.spawn(|| Stream { ended: &ended }.run(&netns, machine, theirs));
        let back = scope.spawn(|| Stream { ended: &ended }.run(machine, &netns, own));
        for round in 0..4 {
            std::thread::sleep(Duration::from_millis(300));
            node.start_again();
            expect_program(&node.netns, true);
            std::thread::sleep(Duration::from_millis(500));
            if round % 2 == 0 {
                node.kill();
            } else {
                node.stop();
            }
            expect_program(&node.netns, false);
        }
        node.start_again();
        drop(end);
        [there, back].map(|stream| {
            let (count, longest) = stream.join().unwrap();
            assert!(count > 1_000_000, "only {count} bytes");
            longest
        })
    })
}

#[test]
fn the_way_to_a_node_is_followed_when_its_mac_its_route_and_the_mtu_change() {
    let _turn = turn();
    let cluster = Cluster::new("uf");
    let one = node_by(&cluster, 1, "kind = \"xdp\"", &peer(2, None));
    let two = node_by(&cluster, 2, "kind = \"xdp\"", &peer(1, None));
    let pods = [pod(&cluster, &one), pod(&cluster, &two)];
    let far = pods[1].1[0];
    let answers = || pods[0].0.exec(&format!("ping -n -q -c 1 -W 1 {far}")).success;
    let by = |expected: &str| {
        eventually(&format!("by {expected}"), Duration::from_secs(5), || answers() && way(&one, "n2") == expected);
    };
    by("xdp");
    // Another MAC, which the machine tells everybody by a gratuitous ARP when it comes up again.
    two.netns.ip("link set uplink down");
    two.netns.ip("link set uplink address 02:00:00:00:77:02");
    two.netns.ip("link set uplink up");
    two.netns.exec("ping -c 1 -W 1 10.200.0.1");
    by("xdp");
    // Behind a router that is on the same link.
    let router = cluster.machine(9);
    router
        .exec(
            "sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.send_redirects=0 net.ipv4.conf.uplink.send_redirects=0",
        )
        .must();
    one.netns.ip("route add 10.200.0.2/32 via 10.200.0.9");
    by("xdp");
    let seen = || router.exec("nstat -az IpForwDatagrams").out;
    eventually("it goes by the router", Duration::from_secs(5), || {
        let before = seen();
        answers() && seen() != before
    });
    one.netns.ip("route del 10.200.0.2/32");
    // By another device, which leads to the same place.
    one.netns.ip(&format!("link add second type veth peer name second netns {}", cluster.underlay().0));
    cluster.underlay().ip("link set second master br0 up");
    one.netns.ip("link set second up");
    one.netns.ip("route add 10.200.0.2/32 dev second src 10.200.0.1");
    by("udp: its route leaves by second");
    assert!(one.log().contains("its route does not leave by the uplink"), "{}", one.log());
    one.netns.ip("route del 10.200.0.2/32");
    by("xdp");
    one.netns.ip("link set uplink down");
    eventually("that the uplink is down is seen", Duration::from_secs(3), || way(&one, "n2").starts_with("udp"));
    one.netns.ip("link set uplink up");
    by("xdp");
    one.daemon().assert_conserved();
}

#[test]
fn an_uplink_that_is_removed_leaves_the_tunnel_to_the_kernel_until_there_is_one_again() {
    let _turn = turn();
    let cluster = Cluster::new("ug");
    let one = node_by(&cluster, 1, "kind = \"xdp\"", &peer(2, None));
    let two = node_by(&cluster, 2, "kind = \"xdp\"", &peer(1, None));
    let pods = [pod(&cluster, &one), pod(&cluster, &two)];
    let far = pods[1].1[0];
    traffic::transfer(&pods[0].0, &pods[1].0, far, 4 << 20);
    one.netns.ip("link del uplink");
    eventually("it is said", Duration::from_secs(10), || {
        let problems = one.daemon().status().problems;
        problems.iter().any(|problem| problem.contains("no interface has the underlay address 10.200.0.1"))
    });
    let underlay = &cluster.underlay().0;
    one.netns.ip(&format!("link add uplink type veth peer name n1 netns {underlay}"));
    cluster.underlay().ip("link set n1 master br0 up");
    one.netns.ip("address add 10.200.0.1/24 dev uplink");
    one.netns.ip("link set uplink up");
    traffic::await_answer(&pods[0].0, far);
    traffic::transfer(&pods[0].0, &pods[1].0, far, 4 << 20);
    eventually("it goes by the new one", Duration::from_secs(10), || {
        traffic::await_answer(&pods[0].0, far);
        one.daemon().status().underlay_kind.starts_with("xdp on uplink") && way(&one, "n2") == "xdp"
    });
    expect_program(&one.netns, true);
    traffic::transfer(&pods[0].0, &pods[1].0, far, 4 << 20);
    one.daemon().assert_conserved();
}

/// A router's word that this packet of a node's was longer than what is possible on the way.
fn too_big(to: Mac, packet: &[u8], mtu: u16) -> Vec<u8> {
    let mut icmp = [&[3, 4, 0, 0, 0, 0][..], &mtu.to_be_bytes(), &packet[..28]].concat();
    let sum = frames::internet_checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let len = (20 + icmp.len() as u16).to_be_bytes();
    let mut ip = [&[0x45, 0][..], &len, &[0, 0, 0, 0, 64, 1, 0, 0, 10, 200, 0, 9, 10, 200, 0, 1]].concat();
    let sum = frames::internet_checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    frames::ethernet(L2 { src: Mac([2, 0, 0, 0, 0, 9]), dst: to }, 0x0800, &[ip, icmp].concat())
}

#[test]
fn a_routers_word_about_a_packet_of_ours_narrows_the_way_and_others_do_not() {
    let _turn = turn();
    let cluster = Cluster::new("ui");
    let one = node_by(&cluster, 1, "kind = \"xdp\"", &peer(2, None));
    let two = node_by(&cluster, 2, "kind = \"xdp\"", &peer(1, None));
    let pods = [pod(&cluster, &one), pod(&cluster, &two)];
    let far = pods[1].1[0];
    let ping = |size: u32| pods[0].0.exec(&format!("ping -n -c 1 -W 1 -M do -s {size} {far}"));
    traffic::await_answer(&pods[0].0, far);
    eventually("n2 is reached by xdp", Duration::from_secs(5), || way(&one, "n2") == "xdp");
    let (wire, attacker) = (Wire::open(cluster.underlay(), "n1"), cluster.machine(9));
    assert!(ping(1400).success);
    let is_ours =
        |frame: &[u8]| frame.len() > 1400 && frame[26..30] == [10, 200, 0, 1] && frame[36..38] == [0x21, 0x18];
    let sent = wire.find(Duration::from_secs(3), is_ours).expect("the ping is on the wire");
    let (packet, mac) = (&sent[14..], Mac(sent[6..12].try_into().unwrap()));
    let attacks = Wire::open(&attacker, "uplink");
    for number in 1..200_u16 {
        let mut guess = packet.to_vec();
        // Another identification, which stands in bytes 4 and 5, or another source port.
        let at = if number % 2 == 0 { 4 } else { 20 };
        let value = u16::from_be_bytes([guess[at], guess[at + 1]]) ^ number;
        guess[at..at + 2].copy_from_slice(&value.to_be_bytes());
        assert!(attacks.send(&too_big(mac, &guess, 1300)));
        if number % 40 == 0 {
            // Only so many are looked at in a second.
            std::thread::sleep(Duration::from_secs(1));
        }
    }
    std::thread::sleep(Duration::from_secs(1));
    assert!(ping(1400).success, "what was guessed changed something: {}", one.log());
    assert!(attacks.send(&too_big(mac, packet, 1400)));
    eventually("the pod is told", Duration::from_secs(3), || ping(1400).out.contains("mtu = 1350"));
    assert!(ping(1300).success);
    traffic::transfer(&pods[0].0, &pods[1].0, far, 4 << 20);
    // No path is narrower than what every host can be sent, and pods are told what Linux believes.
    assert!(attacks.send(&too_big(mac, packet, 68)));
    eventually("the pod is told", Duration::from_secs(3), || ping(1000).out.contains("mtu = 552"));
    one.daemon().assert_conserved();
}
