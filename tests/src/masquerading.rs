//! Masquerade against a small reference: whatever pods and outsiders send, answers go to the pod that asked or to the kernel, nothing leaves
//! in a pod's own name, and nobody has more sessions than the limits say.
//!
//! [`check`] reads what happens from bytes, so that a fuzzer can choose it: see `Scene::step`.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use weft_encap::mac::Mac;
use weft_router::forward::{Forwarder, Memory as Taught};
use weft_router::pace::Limits;
use weft_router::path::Macs;
use weft_router::snat::{self, Snat};
use weft_router::tables::{Dhcp, GroupId, Masquerade, Mode, NextHop, NextHops, Pod, WayOut, came_back};
use weft_router::{PortId, RouterConfig, Tables};

use crate::frames::{self, L2, L3};
use crate::memory::{GATEWAY, Input, Memory, Output, PODS, node_underlay, pod_mac, pod4, pod6, tables};

const HOST: u16 = 9;
const UPLINK: u16 = 10;
const NODE4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 5);
const NODE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 5);
const WIRE: Macs = Macs { dst: Mac([2, 0xdd, 0, 0, 9, 1]), src: Mac([2, 0xde, 0, 0, 9, 1]) };
/// Few of everything, so that limits are met.
const LIMITS: snat::Limits = snat::Limits { first: 61_000, last: 61_007, sessions: 40, per_pod: 12 };

/// One end: protocol, address, port.
type Ends = (u8, (IpAddr, u16), (IpAddr, u16));

/// A node with a way out, and what it has let out.
struct Scene {
    memory: Memory,
    snat: Arc<Snat>,
    /// Whose a conversation is that looks like this from outside.
    inside: BTreeMap<Ends, (IpAddr, u16)>,
    /// What left, as it left.
    left: Vec<Vec<u8>>,
}

/// Does what the bytes say, and panics if a promise is broken.
pub fn check(bytes: &[u8]) {
    let mut scene = Scene::new();
    let mut rest = bytes;
    for _ in 0..128 {
        match scene.step(rest) {
            Some(tail) => rest = tail,
            None => break,
        }
        let usage = scene.snat.usage();
        assert!(usage.sessions <= LIMITS.sessions && usage.fullest <= LIMITS.ports(), "{usage:?}");
    }
    let sessions = scene.snat.sessions(scene.memory.now);
    let mut per_pod: BTreeMap<IpAddr, usize> = BTreeMap::new();
    sessions.iter().for_each(|session| *per_pod.entry(session.inside.0).or_default() += 1);
    assert!(per_pod.values().all(|count| *count <= LIMITS.per_pod), "{per_pod:?}");
    let looks: std::collections::BTreeSet<_> =
        sessions.iter().map(|session| (session.protocol, session.outside, session.remote)).collect();
    assert_eq!(looks.len(), sessions.len(), "two sessions look the same from outside: {sessions:?}");
}

impl Scene {
    fn new() -> Scene {
        let config = RouterConfig {
            flows: 64,
            fdb_limit: 64,
            host_flows: 64,
            seed: 7,
            masquerade: LIMITS,
            ..RouterConfig::default()
        };
        let taught = Taught::new(&config);
        let snat = Arc::clone(&taught.snat);
        let memory = Memory::of(Forwarder::sharing(taught, &config), with_way_out());
        Scene { memory, snat, inside: BTreeMap::new(), left: Vec::new() }
    }

    /// The next thing that happens; gives the bytes after it, none if there are too few. The first byte says what (lower three bits) and who:
    /// 0 to 2 a pod sends by UDP, TCP or a ping; 3 what left last but so many is answered; 4 a pod sends to the outer port of what left; 5 anything,
    /// from a pod or from outside; 6 a router complains of what left; 7 time passes. Three more bytes say what exactly.
    fn step<'b>(&mut self, bytes: &'b [u8]) -> Option<&'b [u8]> {
        let ([what, a, b, c], rest) = bytes.split_first_chunk::<4>()?;
        let pod = 1 + u16::from(what >> 3) % PODS;
        let v6 = what & 0x80 != 0;
        let from = if v6 { IpAddr::from(pod6(pod)) } else { pod4(pod).into() };
        let l2 = L2 { src: pod_mac(pod), dst: GATEWAY };
        let ports = (1 + u16::from(a % 24), 1 + u16::from(b % 4));
        let ttl = if *c >= 0xf0 { c & 3 } else { 64 };
        match what & 7 {
            kind @ 0..=2 => {
                let l3 = L3::new(from, server(b >> 2 & 3, v6)).ttl(ttl);
                let payload = &[0; 80][..usize::from(*c & 63)];
                let frame = match kind {
                    0 => frames::udp(l2, l3, ports, payload),
                    1 => with_flags(frames::tcp(l2, l3, ports, 1, payload), *c),
                    _ => frames::ping(l2, l3, ports.0, 1, payload),
                };
                self.pod_sends(pod, frame);
            }
            3 => self.answer(*a, *b, *c),
            4 => {
                let Some((17, (outer, port), _)) = self.departed(*b).and_then(|frame| ends_of(frame)) else {
                    return Some(rest);
                };
                let from = if outer.is_ipv6() { IpAddr::from(pod6(pod)) } else { pod4(pod).into() };
                let frame = frames::udp(l2, L3::new(from, outer).ttl(ttl), (ports.0, port), &[1; 20]);
                self.pod_sends(pod, frame);
            }
            5 => {
                let (frame, rest) = rest.split_at(usize::from(*a).min(rest.len()));
                let ethertype = if v6 { 0x86dd } else { 0x0800 };
                if *b & 1 == 0 {
                    self.pod_sends(pod, frames::ethernet(l2, ethertype, frame));
                } else {
                    let l2 = L2 { src: WIRE.dst, dst: came_back(PortId(UPLINK)) };
                    self.outsider_sends(frames::ethernet(l2, ethertype, frame));
                }
                return Some(rest);
            }
            6 => self.complain(*a, *b, *c),
            _ => {
                self.memory.now = self.memory.now + Duration::from_secs(u64::from(*a) * u64::from(*b % 32));
                self.memory.forwarder.tick(self.memory.now);
                if *c == 1 {
                    self.snat.forget(|address| address.is_ipv4());
                }
            }
        }
        Some(rest)
    }

    fn departed(&self, back: u8) -> Option<&Vec<u8>> {
        let at = self.left.len().checked_sub(1 + usize::from(back) % self.left.len().max(1))?;
        self.left.get(at)
    }

    /// What a pod sends leaves in the node's name, or comes to another pod as from the node.
    fn pod_sends(&mut self, pod: u16, frame: Vec<u8>) {
        let before = ends_of(&frame);
        let outcome = self.memory.feed(&Input::pod(pod, frame.clone()));
        for output in outcome.sent.iter().filter(|output| output.port != PortId(HOST)) {
            let Some(after) = ends_of(&output.bytes) else { continue };
            let own = [IpAddr::from(NODE4), NODE6.into()].contains(&after.1.0);
            if output.port == PortId(UPLINK) {
                assert!(own, "it leaves as a pod: {frame:02x?}");
                let Some((protocol, inside, _)) =
                    before.filter(|ends| ends.2 == after.2 || ends.0 == 1 || ends.0 == 58)
                else {
                    continue;
                };
                assert!((LIMITS.first..=LIMITS.last).contains(&after.1.1), "{after:?}");
                self.inside.insert((protocol, after.1, after.2), inside);
                self.left.push(output.bytes.clone());
            } else if let Some((17, inside, outer)) = before.filter(|_| own) {
                // It turned round: the receiver has spoken to the sender's outer port, as whose packet it comes.
                self.inside.insert((17, after.1, outer), inside);
                assert_eq!(self.inside.get(&(17, outer, after.1)), Some(&after.2), "{frame:02x?}");
            } else {
                self.assert_is_own(pod, output);
            }
        }
        if let Some((17, inside, outer)) = before
            && [IpAddr::from(NODE4), NODE6.into()].contains(&outer.0)
        {
            self.note_invitation(inside, outer);
        }
    }

    /// Who sends to an outer port lets its owner in, also if he is not let in himself yet.
    fn note_invitation(&mut self, inside: (IpAddr, u16), outer: (IpAddr, u16)) {
        let sessions = self.snat.sessions(self.memory.now);
        let own = sessions
            .iter()
            .find(|session| session.protocol == 17 && session.inside == inside && session.remote == outer);
        if let Some(own) = own {
            self.inside.insert((17, own.outside, outer), inside);
        }
    }

    /// Anything else that a pod gets in reply to its own frame is from the gateway, to itself.
    fn assert_is_own(&self, pod: u16, output: &Output) {
        if output.port == PortId(pod) {
            assert_eq!(output.dst(), pod_mac(pod));
        }
    }

    fn outsider_sends(&mut self, frame: Vec<u8>) {
        let before = ends_of(&frame);
        let outcome = self.memory.feed(&Input::pod(HOST, frame.clone()));
        for output in &outcome.sent {
            if output.port == PortId(HOST) || output.port == PortId(UPLINK) {
                continue;
            }
            let Some((protocol, from, to)) = ends_of(&output.bytes) else { continue };
            // Errors and fragments have no ports of their own.
            let Some((_, server, outer)) = before.filter(|_| from.1 != 0 || to.1 != 0) else { continue };
            let server = if protocol == 1 || protocol == 58 { (server.0, 0) } else { server };
            assert_eq!(
                self.inside.get(&(protocol, outer, server)),
                Some(&to),
                "delivered to another one: {frame:02x?}"
            );
            let port = (1..=PODS).find(|pod| [IpAddr::from(pod4(*pod)), pod6(*pod).into()].contains(&to.0));
            assert_eq!(port.map(PortId), Some(output.port));
        }
    }

    /// The other side answers; `at` and `bits` change a byte of what it says.
    fn answer(&mut self, back: u8, at: u8, bits: u8) {
        let Some((protocol, outer, server)) = self.departed(back).and_then(|frame| ends_of(frame)) else { return };
        let (l2, l3) = (L2 { src: WIRE.dst, dst: came_back(PortId(UPLINK)) }, L3::new(server.0, outer.0));
        let mut frame = match protocol {
            17 => frames::udp(l2, l3, (server.1, outer.1), &[2; 30]),
            6 => with_flags(frames::tcp(l2, l3, (server.1, outer.1), 1, &[2; 30]), bits),
            _ => {
                let mut frame = frames::ping(l2, l3, outer.1, 1, &[2; 30]);
                let l4 = if l3.src.is_ipv6() { 54 } else { 34 };
                frame[l4] = if l3.src.is_ipv6() { 129 } else { 0 };
                frame
            }
        };
        if at > 0x80 {
            let at = 14 + usize::from(at & 0x7f) % (frame.len() - 14);
            frame[at] ^= bits;
            frames::fix_ipv4_checksum(&mut frame);
        }
        self.outsider_sends(frame);
    }

    /// A router quotes what left; `bits` change a byte of that.
    fn complain(&mut self, back: u8, at: u8, bits: u8) {
        let Some(sent) = self.departed(back) else { return };
        let mut quoted = sent[14..sent.len().min(14 + 60)].to_vec();
        if at > 0x80 {
            let at = usize::from(at & 0x7f) % quoted.len();
            quoted[at] ^= bits;
        }
        let v6 = sent[12] == 0x86;
        let l2 = L2 { src: WIRE.dst, dst: came_back(PortId(UPLINK)) };
        let body = [&if v6 { [2, 0, 0, 0, 0, 0, 5, 0] } else { [3, 4, 0, 0, 0, 0, 5, 0] }[..], &quoted].concat();
        let frame = if v6 {
            frames::icmp6(l2, "2001:db8:77::1".parse().expect("an address"), NODE6, 64, &body)
        } else {
            let mut frame = frames::ping(l2, L3::new(Ipv4Addr::new(198, 51, 100, 1), NODE4), 0, 0, &body[8..]);
            frame[34..42].copy_from_slice(&body[..8]);
            let sum = frames::internet_checksum(&frame[34..]);
            frame[36..38].copy_from_slice(&sum.to_be_bytes());
            frame
        };
        self.outsider_sends(frame);
    }
}

fn server(number: u8, v6: bool) -> IpAddr {
    match (v6, number) {
        // Another node's own address is outside, too.
        (false, 3) => node_underlay(0),
        (false, _) => Ipv4Addr::new(203, 0, 113, 1 + number).into(),
        (true, _) => Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1 + u16::from(number)).into(),
    }
}

/// SYN, FIN and RST as these bits say.
fn with_flags(mut frame: Vec<u8>, bits: u8) -> Vec<u8> {
    let l4 = if frame[12] == 0x86 { 54 } else { 34 };
    frame[l4 + 13] = frame[l4 + 13] & 0x10 | bits >> 5 & 7;
    frame
}

/// Protocol and ends of a frame; ports are zero if it has none, and a ping's identifier is the port of whoever asks.
fn ends_of(frame: &[u8]) -> Option<Ends> {
    let sliced = SlicedPacket::from_ethernet(frame).ok()?;
    let (src, dst): (IpAddr, IpAddr) = match sliced.net? {
        NetSlice::Ipv4(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        NetSlice::Ipv6(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        NetSlice::Arp(_) => return None,
    };
    let (protocol, near, far) = match sliced.transport? {
        TransportSlice::Igmp(_) => return None,
        TransportSlice::Udp(udp) => (17, udp.source_port(), udp.destination_port()),
        TransportSlice::Tcp(tcp) => (6, tcp.source_port(), tcp.destination_port()),
        TransportSlice::Icmpv4(icmp) => {
            let id = u16::from_be_bytes([icmp.bytes5to8()[0], icmp.bytes5to8()[1]]);
            match icmp.type_u8() {
                8 => (1, id, 0),
                0 => (1, 0, id),
                _ => (1, 0, 0),
            }
        }
        TransportSlice::Icmpv6(icmp) => {
            let id = u16::from_be_bytes([icmp.bytes5to8()[0], icmp.bytes5to8()[1]]);
            match icmp.type_u8() {
                128 => (58, id, 0),
                129 => (58, 0, id),
                _ => (58, 0, 0),
            }
        }
    };
    Some((protocol, (src, near), (dst, far)))
}

/// The tables of [`crate::memory`], with a host port and a way out.
fn with_way_out() -> Tables {
    let mut tables = tables(Mode::Routed);
    let interface = Pod {
        mac: Mac([2, 0xcc, 0, 0, 0, 9]),
        ipv4: vec![Ipv4Addr::new(10, 244, 1, 254)],
        ipv6: Vec::new(),
        mtu: 1450,
        limits: Limits::default(),
        dhcp: Dhcp::default(),
    };
    tables.add_host(PortId(HOST), interface);
    tables.add_uplink(PortId(UPLINK));
    let hop = NextHop { port: PortId(UPLINK), macs: WIRE, mtu: 1500, weight: 1 };
    tables.next_hops = Arc::new(vec![NextHops::new([hop])]);
    for net in ["0.0.0.0/0", "::/0"] {
        tables.outside.insert(net.parse().expect("a prefix"), GroupId(0));
    }
    let addresses = ["192.0.2.5/24", "2001:db8::5/64"].map(|net| net.parse().expect("a prefix")).to_vec();
    let way = WayOut { port: PortId(UPLINK), mac: WIRE.src, addresses };
    let kept = ["10.96.0.0/12".parse().expect("a prefix")];
    let own = vec![IpAddr::from(NODE4), IpAddr::from(NODE6)];
    tables.masquerade = Some(Arc::new(Masquerade::new(vec![way], &kept, vec![node_underlay(0)], own)));
    tables
}
