//! Hostile pods and a hostile underlay against a real daemon: nothing is delivered, nothing is learned, and it has a name.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};
use std::time::Duration;

use weft_encap::mac::Mac;
use weft_tests::cluster::{Cluster, WeftNode, peer};
use weft_tests::daemon::Daemon;
use weft_tests::frames::{self, ArpFields, L2, L3};
use weft_tests::lab::Lab;
use weft_tests::machine::turn;
use weft_tests::netns::OwnNetns;
use weft_tests::plugin;
use weft_tests::random::Random;
use weft_tests::wire::Wire;

const SHORT: Duration = Duration::from_millis(400);
/// In every hostile frame, so that it is found wherever it should not be.
const MARK: &[u8; 16] = b"this-must-not-go";

fn carries_mark(frame: &[u8]) -> bool {
    frame.windows(MARK.len()).any(|window| window == MARK)
}

/// What the daemon knows and frames might change: its FDB without ages, its neighbours.
fn knowledge(daemon: &Daemon) -> (Vec<(String, String)>, Vec<weft_api::NeighbourInfo>) {
    let mut fdb: Vec<_> = daemon.fdb().into_iter().map(|entry| (entry.mac, entry.at)).collect();
    fdb.sort();
    (fdb, daemon.ask(&weft_api::Request::Neigh))
}

#[test]
fn a_pod_that_lies_about_itself_is_heard_by_nobody() {
    let _turn = turn();
    for mode in ["routed", "bridged"] {
        let lab = Lab::up("lie", 2, 2, mode, &[]);
        let (liar, victim, far) = (lab.pod(1, 1), lab.pod(1, 2), lab.pod(2, 1));
        let daemon = lab.daemon(1);
        let gateway: Mac = daemon.status().gateway_mac.parse().unwrap();
        let listeners: Vec<Wire> = [victim, far].map(|pod| Wire::open(&pod.netns(), &pod.ifname)).into();
        // What the nodes themselves are known by is learned before, not in between.
        for (from, to) in [(0, far), (1, victim)] {
            lab.nodes[from].netns().exec(&format!("ping -n -q -c 1 -W 2 {}", to.ipv4)).must();
        }
        let before = (knowledge(&daemon), knowledge(&lab.daemon(2)), daemon.all_drops());
        let own = |dst| L2 { src: liar.mac(), dst };
        let all_nodes: Ipv6Addr = "ff02::1".parse().unwrap();
        let claim = |spa, sha| ArpFields { op: 2, sha, spa, tha: victim.mac(), tpa: victim.ipv4 };
        let arp = |fields| [frames::arp(own(victim.mac()), fields), MARK.to_vec()].concat();
        let mut ra = vec![134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
        ra.extend_from_slice(&[200, 3, 0, 0, 0, 0, 0, 0]);
        ra.extend_from_slice(MARK);
        let cases: Vec<(&str, Vec<u8>)> = vec![
            (
                "SourceMac",
                frames::udp(L2 { src: victim.mac(), dst: victim.mac() }, L3::new(liar.ipv4, victim.ipv4), (1, 2), MARK),
            ),
            (
                "SourceMac",
                frames::udp(L2 { src: gateway, dst: victim.mac() }, L3::new(liar.ipv4, victim.ipv4), (1, 2), MARK),
            ),
            ("SourceIp", frames::udp(own(victim.mac()), L3::new(far.ipv4, victim.ipv4), (1, 2), MARK)),
            ("SourceIp", frames::udp(own(gateway), L3::new(victim.ipv4, far.ipv4), (1, 2), MARK)),
            ("SourceIp", frames::udp(own(gateway), L3::new(victim.ipv6, far.ipv6), (1, 2), MARK)),
            ("ArpSpoof", arp(claim(liar.gateway4, liar.mac()))),
            ("ArpSpoof", arp(claim(victim.ipv4, liar.mac()))),
            ("ArpSpoof", arp(claim(liar.ipv4, victim.mac()))),
            ("NdSpoof", frames::advertisement(own(victim.mac()), liar.ipv6, victim.ipv6, liar.gateway6(), liar.mac())),
            (
                "NdSpoof",
                frames::advertisement(
                    own(Mac([0x33, 0x33, 0, 0, 0, 1])),
                    liar.ipv6,
                    all_nodes,
                    victim.ipv6,
                    liar.mac(),
                ),
            ),
            (
                "RouterMessage",
                frames::icmp6(own(Mac([0x33, 0x33, 0, 0, 0, 1])), liar.mac().link_local(), all_nodes, 255, &ra),
            ),
            ("DhcpServer", frames::udp(own(Mac::BROADCAST), L3::new(liar.ipv4, Ipv4Addr::BROADCAST), (67, 68), MARK)),
        ];
        let mut expected: BTreeMap<&str, u64> = BTreeMap::new();
        let wire = Wire::open(&liar.netns(), &liar.ifname);
        for (reason, frame) in &cases {
            for _ in 0..50 {
                assert!(wire.send(frame));
            }
            *expected.entry(reason).or_default() += 50;
        }
        for listener in &listeners {
            let heard: Vec<_> = listener
                .collect(SHORT)
                .into_iter()
                .filter(|frame| carries_mark(frame) || is_advertisement_of(frame, liar.mac()))
                .collect();
            assert!(heard.is_empty(), "{mode}: {} frames were heard, e.g. {:02x?}", heard.len(), heard[0]);
        }
        let drops = daemon.all_drops();
        for (reason, count) in expected {
            let grown = drops.get(reason).unwrap_or(&0) - before.2.get(reason).unwrap_or(&0);
            assert!(grown >= count, "{mode}: {reason} grew by {grown} instead of {count}: {drops:?}");
        }
        assert_eq!(
            (knowledge(&daemon), knowledge(&lab.daemon(2))),
            (before.0, before.1),
            "{mode}: something was learned"
        );
        liar.netns().exec(&format!("ping -n -c 1 -W 2 {}", far.ipv4)).must();
        lab.assert_conserved();
    }
}

fn is_advertisement_of(frame: &[u8], mac: Mac) -> bool {
    frame.get(12..14) == Some(&[0x86, 0xdd]) && frame.get(54) == Some(&136) && frame.get(80..86) == Some(&mac.0)
}

#[test]
fn runts_tags_and_garbage_from_a_pod_harm_nobody() {
    let _turn = turn();
    let lab = Lab::up("junk", 2, 2, "bridged", &[]);
    let (pod, other, far) = (lab.pod(1, 1), lab.pod(1, 2), lab.pod(2, 1));
    let listener = Wire::open(&other.netns(), &other.ifname);
    let mut flood = other.netns().command("ping");
    flood.args(["-n", "-q", "-i", "0.01", "-c", "200", "-W", "1", &far.ipv4.to_string()]);
    let flood = std::thread::spawn(move || weft_tests::command::run(flood));
    let wire = Wire::open(&pod.netns(), &pod.ifname);
    let mut random = Random::new(0x5eed_0010);
    let good = frames::udp(L2 { src: pod.mac(), dst: other.mac() }, L3::new(pod.ipv4, other.ipv4), (1, 2), MARK);
    for round in 0..20_000usize {
        let mut frame = good.clone();
        match round % 4 {
            // A tag before the IP header; a cut inside the headers; a length that lies; noise.
            0 => drop(frame.splice(12..12, [0x81, 0, random.byte(), random.byte()])),
            1 => frame.truncate(14 + random.below(28)),
            2 => {
                frame[16 + random.below(2)] = random.byte() | 0x80;
                frames::fix_ipv4_checksum(&mut frame);
            }
            _ => {
                let len = 14 + random.below(1400);
                frame = random.bytes(len);
                frame[6..12].copy_from_slice(&pod.mac().0);
                frame[0] &= 0xfe;
                frame[12..14].copy_from_slice(&[8, 0]);
            }
        }
        wire.send(&frame);
    }
    let heard = listener.collect(SHORT).into_iter().filter(|frame| carries_mark(frame)).count();
    assert_eq!(heard, 0, "damaged frames were delivered");
    assert!(flood.join().unwrap().must().contains(" 0% packet loss"), "another pod lost packets");
    for reason in ["VlanTag", "TooShort"] {
        assert!(lab.daemon(1).drops(reason) > 1000, "{reason}: {:?}", lab.daemon(1).all_drops());
    }
    lab.assert_conserved();
}

/// A node with a pod, and a machine that is another node as far as its address goes.
struct Attacked {
    node: WeftNode,
    pod: OwnNetns,
    pod4: Ipv4Addr,
    pod_mac: Mac,
    gateway: Mac,
    vtep: Mac,
    member: OwnNetns,
    stranger: OwnNetns,
}

fn attacked(cluster: &Cluster, mode: &str) -> Attacked {
    let node = cluster.weft_node(1, mode, &(peer(2, None) + &peer(3, None)));
    let (member, stranger, pod) = (cluster.machine(2), cluster.machine(99), cluster.sandbox("pod"));
    let result = node.attach("pod", &pod);
    let v4 = plugin::addresses(&result).into_iter().find_map(|address| match address {
        std::net::IpAddr::V4(address) => Some(address),
        std::net::IpAddr::V6(_) => None,
    });
    let status = node.daemon().status();
    Attacked {
        pod4: v4.unwrap(),
        pod_mac: plugin::mac(&result).parse().unwrap(),
        gateway: status.gateway_mac.parse().unwrap(),
        vtep: status.vtep_mac.parse().unwrap(),
        node,
        pod,
        member,
        stranger,
    }
}

/// A tunnelled frame that is delivered if it comes from node 2 behind a good header.
fn honest(a: &Attacked, mode: &str) -> Vec<u8> {
    let dst = if mode == "bridged" { a.pod_mac } else { a.vtep };
    frames::udp(L2 { src: Mac([2, 0, 0, 0, 2, 1]), dst }, L3::new(Ipv4Addr::new(10, 244, 2, 9), a.pod4), (1, 2), MARK)
}

#[test]
fn the_underlay_lets_nothing_in_that_is_not_a_members_own() {
    let _turn = turn();
    for (mode, kind) in [("routed", "udp"), ("bridged", "udp"), ("routed", "xdp"), ("bridged", "xdp")] {
        let cluster = Cluster::new("atk").by(kind);
        let a = attacked(&cluster, mode);
        let daemon = a.node.daemon();
        let listener = Wire::open(&a.pod, "eth0");
        let sockets = [&a.member, &a.stranger].map(|netns| netns.inside(|| UdpSocket::bind("0.0.0.0:0").unwrap()));
        let [member, stranger] = &sockets;
        let send = |socket: &UdpSocket, header: [u8; 8], inner: &[u8]| {
            socket.send_to(&[&header[..], inner].concat(), (a.node.underlay(), 8472)).unwrap();
        };
        let good = honest(&a, mode);
        send(member, frames::vxlan(1), &good);
        assert!(
            listener.find(SHORT, carries_mark).is_some(),
            "{mode}: the honest frame was not delivered: {:?}",
            daemon.all_drops()
        );
        // The pod has nobody at that port and says so, quoting what it got; that is over before it counts.
        listener.collect(SHORT);
        let before = (knowledge(&daemon), daemon.all_drops());
        let l2 = |src, dst| L2 { src, dst };
        let remote = Mac([2, 0, 0, 0, 2, 1]);
        let dst = if mode == "bridged" { a.pod_mac } else { a.vtep };
        let mut count = 0;
        for _ in 0..100 {
            send(stranger, frames::vxlan(1), &good);
            send(member, frames::vxlan(2), &good);
            send(member, frames::vxlan(1), &[&frames::vxlan(1)[..], &good].concat());
            for bit in (0..32).chain(56..64) {
                let mut header = frames::vxlan(1);
                header[bit / 8] ^= 0x80 >> (bit % 8);
                send(member, header, &good);
            }
            for source in [a.pod4, Ipv4Addr::new(10, 244, if mode == "bridged" { 0 } else { 1 }, 1)] {
                send(member, frames::vxlan(1), &frames::udp(l2(remote, dst), L3::new(source, a.pod4), (1, 2), MARK));
            }
            if mode == "routed" {
                let another = Ipv4Addr::new(10, 244, 3, 9);
                send(member, frames::vxlan(1), &frames::udp(l2(remote, dst), L3::new(another, a.pod4), (1, 2), MARK));
            } else {
                for stolen in [a.pod_mac, a.gateway] {
                    let inner =
                        frames::udp(l2(stolen, dst), L3::new(Ipv4Addr::new(10, 244, 2, 9), a.pod4), (1, 2), MARK);
                    send(member, frames::vxlan(1), &inner);
                }
            }
            for len in 0..14 {
                send(member, frames::vxlan(1), &good[..len]);
            }
            for len in 0..8 {
                member.send_to(&frames::vxlan(1)[..len], (a.node.underlay(), 8472)).unwrap();
            }
            count += 100;
            // The daemon shall read all of it: what its socket drops tests nothing.
            std::thread::sleep(Duration::from_millis(3));
        }
        let heard = listener.collect(SHORT).into_iter().filter(|frame| carries_mark(frame)).count();
        assert_eq!(heard, 0, "{mode}: frames were delivered that should not be");
        assert_eq!(knowledge(&daemon), before.0, "{mode}: something was learned");
        let drops = daemon.all_drops();
        let grown = |reason: &str| drops.get(reason).unwrap_or(&0) - before.1.get(reason).unwrap_or(&0);
        for (reason, least) in [
            ("NotMember", count / 100),
            ("WrongVni", count / 100),
            ("TunnelHeader", 40),
            ("TunnelSource", 2),
            ("TooShort", 14),
        ] {
            assert!(grown(reason) >= least, "{mode}: {reason} grew by {} only: {drops:?}", grown(reason));
        }
        daemon.assert_conserved();
    }
}

#[test]
fn a_pod_that_speaks_vxlan_to_a_node_is_nobody() {
    let _turn = turn();
    let lab = Lab::up("vx", 2, 2, "routed", &[]);
    let (pod, victim) = (lab.pod(1, 1), lab.pod(2, 1));
    let vtep: Mac = lab.daemon(2).status().vtep_mac.parse().unwrap();
    let inner = frames::udp(
        L2 { src: Mac([2, 0, 0, 0, 1, 1]), dst: vtep },
        L3::new(lab.pod(1, 2).ipv4, victim.ipv4),
        (1, 2),
        MARK,
    );
    let listener = Wire::open(&victim.netns(), &victim.ifname);
    let socket = pod.netns().inside(|| UdpSocket::bind("0.0.0.0:8472").unwrap());
    for node in &lab.nodes {
        for _ in 0..100 {
            let _ = socket.send_to(&[&frames::vxlan(1)[..], &inner].concat(), (node.underlay, 8472));
        }
    }
    assert!(listener.find(SHORT, carries_mark).is_none());
    lab.assert_conserved();
}
