//! The way of a frame, without devices: frames in, frames out, and every counter.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use weft_encap::arp::{Arp, REPLY};
use weft_encap::eth::{ETHERTYPE_ARP, EthHeader};
use weft_encap::mac::Mac;
use weft_encap::ndp::{Neighbor, NeighborMessage};
use weft_encap::offload::{Gso, GsoKind, Offload, Partial};
use weft_encap::vxlan::{Vni, VxlanHeader};
use weft_encap::zerocopy::{FromBytes, IntoBytes};
use weft_router::forward::Forwarder;
use weft_router::frame::{Frame, Outer};
use weft_router::pool::Pool;
use weft_router::port::{Outbox, PortId};
use weft_router::tables::{Gateway, Mode, Node, NodeId, Pod, Tables, Via};
use weft_router::{DropReason, Instant, RouterConfig};

const UNDERLAY: PortId = PortId(0);
const GATEWAY: Mac = Mac([2, 0, 0, 0, 0, 1]);
const VTEP: Mac = Mac([2, 0xee, 0, 0, 0, 1]);
const PEER_VTEP: Mac = Mac([2, 0xee, 0, 0, 0, 2]);
const PEER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 200, 0, 2));
const REMOTE: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 9);
const REMOTE6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x244, 2, 0, 0, 0, 9);
const REMOTE_MAC: Mac = Mac([2, 0xbb, 0, 0, 0, 9]);

fn pod_mac(number: u8) -> Mac {
    Mac([2, 0xaa, 0, 0, 0, number])
}

fn pod_v4(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, 1, number + 1)
}

fn pod_v6(number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 0, u16::from(number) + 1)
}

struct Bed {
    forwarder: Forwarder,
    tables: Tables,
    pool: Pool,
    out: Outbox,
    now: Instant,
}

impl Bed {
    /// Pods 1 to `pods` on ports of the same number, the underlay on port 0, one other node.
    fn new(mode: Mode, pods: u8) -> Bed {
        let v4 = if mode == Mode::Routed { Ipv4Addr::new(10, 244, 1, 1) } else { Ipv4Addr::new(10, 244, 0, 1) };
        let v6 = Ipv6Addr::new(0xfd00, 0x10, 0x244, if mode == Mode::Routed { 1 } else { 0 }, 0, 0, 0, 1);
        let mut tables = Tables::empty(Gateway { mac: GATEWAY, ipv4: Some(v4), ipv6: Some(v6) });
        tables.epoch = 1;
        tables.mode = mode;
        tables.vtep_mac = VTEP;
        tables.add_underlay(UNDERLAY);
        for number in 1..=pods {
            let pod = Pod { mac: pod_mac(number), ipv4: vec![pod_v4(number)], ipv6: vec![pod_v6(number)], mtu: 1450 };
            tables.add_pod(PortId(number.into()), pod);
        }
        for range in ["10.244.1.0/24", "fd00:10:244:1::/64"] {
            tables.add_route(range.parse().unwrap(), Via::Local);
        }
        let ranges = ["10.244.2.0/24", "fd00:10:244:2::/64"].map(|range| range.parse().unwrap()).to_vec();
        tables.add_node(NodeId(0), Node { underlay: PEER, vtep_mac: PEER_VTEP, ranges });
        let forwarder = Forwarder::new(&RouterConfig::default());
        let now = Instant(1_000_000_000_000);
        Bed { forwarder, tables, pool: Pool::new(512, 64).unwrap(), out: Outbox::new(), now }
    }

    fn give(&mut self, frame: Frame) -> Vec<(PortId, Frame)> {
        self.forwarder.stats().received(&frame);
        self.forwarder.forward(frame, &self.tables, self.now, &self.pool, &mut self.out);
        let mut frames = Vec::new();
        while let Some(port) = self.out.touched() {
            while let Some(frame) = self.out.queue(port).pop_front() {
                frames.push((port, frame));
            }
        }
        frames.sort_by_key(|(port, _)| *port);
        frames
    }

    /// A pod sends bytes; what leaves is counted as sent.
    fn pod_sends(&mut self, port: u16, bytes: &[u8]) -> Vec<(u16, Vec<u8>)> {
        let frame = Frame::from_bytes(bytes, PortId(port), &self.pool).unwrap();
        self.pass(frame)
    }

    fn pass(&mut self, frame: Frame) -> Vec<(u16, Vec<u8>)> {
        let frames = self.give(frame);
        frames
            .into_iter()
            .map(|(port, frame)| {
                let bytes = frame.to_vec();
                self.forwarder.stats().sent(frame, port, 1);
                (port.0, bytes)
            })
            .collect()
    }

    fn node_sends(&mut self, peer: IpAddr, vni: u32, inner: &[u8]) -> Vec<(u16, Vec<u8>)> {
        let mut bytes = VxlanHeader::new(Vni::new(vni).unwrap()).as_bytes().to_vec();
        bytes.extend_from_slice(inner);
        self.underlay_brings(peer, &bytes)
    }

    fn underlay_brings(&mut self, peer: IpAddr, bytes: &[u8]) -> Vec<(u16, Vec<u8>)> {
        let mut frame = Frame::from_bytes(bytes, UNDERLAY, &self.pool).unwrap();
        frame.outer = Some(Outer { peer, entropy: 0, tos: 0 });
        self.pass(frame)
    }

    fn dropped(&mut self, port: u16, reason: DropReason) -> u64 {
        self.forwarder.stats().of(PortId(port)).dropped[reason as usize]
    }

    /// Only this reason was counted on this port, `count` times, and no frame is missing anywhere.
    fn assert_only(&mut self, port: u16, reason: DropReason, count: u64) {
        let stats = self.forwarder.stats().of(PortId(port));
        for other in DropReason::ALL {
            let expected = if *other == reason { count } else { 0 };
            assert_eq!(stats.dropped[*other as usize], expected, "{}", other.name());
        }
        self.assert_conserved();
    }

    fn assert_conserved(&mut self) {
        for port in 0..16 {
            assert_eq!(self.forwarder.stats().of(PortId(port)).in_flight(), 0, "port {port}");
        }
        assert_eq!(self.pool.free(), (512, 64), "buffers leaked");
    }
}

fn udp4(src: Mac, dst: Mac, from: Ipv4Addr, to: Ipv4Addr, ttl: u8, payload: usize) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(src.0, dst.0).ipv4(from.octets(), to.octets(), ttl).udp(1111, 2222);
    let mut bytes = Vec::new();
    builder.write(&mut bytes, &vec![0x5a; payload]).unwrap();
    bytes
}

fn udp6(src: Mac, dst: Mac, from: Ipv6Addr, to: Ipv6Addr, ttl: u8, payload: usize) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(src.0, dst.0).ipv6(from.octets(), to.octets(), ttl).udp(1111, 2222);
    let mut bytes = Vec::new();
    builder.write(&mut bytes, &vec![0x5a; payload]).unwrap();
    bytes
}

fn arp_request(src: Mac, spa: Ipv4Addr, tpa: Ipv4Addr) -> Vec<u8> {
    let mut bytes = EthHeader::new(Mac::BROADCAST, src, ETHERTYPE_ARP).as_bytes().to_vec();
    bytes.extend_from_slice(Arp::request(src, spa, tpa).as_bytes());
    bytes
}

fn solicitation(src: Mac, from: Ipv6Addr, target: Ipv6Addr) -> Vec<u8> {
    icmp6(
        src,
        Mac([0x33, 0x33, 0xff, 0, 0, 1]),
        from,
        "ff02::1:ff00:1".parse().unwrap(),
        &NeighborMessage::solicitation(target, src),
    )
}

fn advertisement(src: Mac, from: Ipv6Addr, target: Ipv6Addr, mac: Mac) -> Vec<u8> {
    icmp6(
        src,
        Mac([0x33, 0x33, 0, 0, 0, 1]),
        from,
        "ff02::1".parse().unwrap(),
        &NeighborMessage::advertisement(0x20, target, mac),
    )
}

fn icmp6(src: Mac, dst: Mac, from: Ipv6Addr, to: Ipv6Addr, message: &NeighborMessage) -> Vec<u8> {
    let mut message = *message;
    let mut sum = weft_encap::checksum::pseudo_v6(from, to, 58, 32);
    message.neighbor.icmp.checksum.set(sum.add(message.as_bytes()).finish());
    let mut bytes = EthHeader::new(dst, src, 0x86dd).as_bytes().to_vec();
    bytes.extend_from_slice(weft_encap::ipv6::Ipv6Header::new(from, to, 58, 255, 32).as_bytes());
    bytes.extend_from_slice(message.as_bytes());
    bytes
}

/// Everything in these bytes is in order: lengths, IPv4 header checksum, transport checksum.
fn assert_sound(bytes: &[u8]) {
    let packet = SlicedPacket::from_ethernet(bytes).unwrap();
    match packet.net.unwrap() {
        NetSlice::Ipv4(ip) => {
            assert_eq!(ip.header().to_header().calc_header_checksum(), ip.header().header_checksum());
            match packet.transport {
                Some(TransportSlice::Icmpv4(icmp)) => {
                    assert_eq!(icmp.icmp_type().calc_checksum(icmp.payload()), icmp.checksum());
                }
                Some(TransportSlice::Udp(udp)) => {
                    let expected = udp.to_header().calc_checksum_ipv4(&ip.header().to_header(), udp.payload()).unwrap();
                    assert_eq!(udp.checksum(), expected);
                }
                _ => {}
            }
        }
        NetSlice::Ipv6(ip) => {
            if let Some(TransportSlice::Icmpv6(icmp)) = packet.transport {
                let header = ip.header().to_header();
                let sum = icmp.icmp_type().calc_checksum(header.source, header.destination, icmp.payload()).unwrap();
                assert_eq!(sum, icmp.checksum());
            }
        }
        NetSlice::Arp(_) => {}
    }
}

#[test]
fn pods_of_a_node_are_bridged_and_not_a_byte_changes() {
    for mode in [Mode::Routed, Mode::Bridged] {
        let mut bed = Bed::new(mode, 2);
        for ttl in [1, 64] {
            let sent = udp4(pod_mac(1), pod_mac(2), pod_v4(1), pod_v4(2), ttl, 10);
            assert_eq!(bed.pod_sends(1, &sent), [(2, sent.clone())]);
            let sent = udp6(pod_mac(1), pod_mac(2), pod_v6(1), pod_v6(2), ttl, 10);
            assert_eq!(bed.pod_sends(1, &sent), [(2, sent.clone())]);
        }
        bed.assert_conserved();
    }
}

#[test]
fn a_packet_for_another_node_is_routed_into_the_tunnel() {
    let mut bed = Bed::new(Mode::Routed, 1);
    for _ in 0..3 {
        let sent = udp4(pod_mac(1), GATEWAY, pod_v4(1), REMOTE, 64, 10);
        let out = bed.pod_sends(1, &sent);
        assert_eq!(out.len(), 1);
        let (port, bytes) = &out[0];
        assert_eq!(*port, UNDERLAY.0);
        assert_eq!(VxlanHeader::parse(bytes).unwrap(), Vni::new(1).unwrap());
        assert_eq!(bytes[8..], udp4(VTEP, PEER_VTEP, pod_v4(1), REMOTE, 63, 10));
        let sent = udp6(pod_mac(1), GATEWAY, pod_v6(1), REMOTE6, 64, 10);
        assert_eq!(bed.pod_sends(1, &sent)[0].1[8..], udp6(VTEP, PEER_VTEP, pod_v6(1), REMOTE6, 63, 10));
    }
    bed.assert_conserved();
    assert_eq!(bed.forwarder.flows(bed.now).len(), 2);
    assert_eq!(bed.forwarder.flows(bed.now)[0].frames, 3);
}

#[test]
fn a_packet_from_another_node_is_routed_to_its_pod_whatever_the_inner_mac() {
    let mut bed = Bed::new(Mode::Routed, 2);
    for mac in [VTEP, Mac([2, 9, 9, 9, 9, 9])] {
        let inner = udp4(PEER_VTEP, mac, REMOTE, pod_v4(2), 63, 10);
        assert_eq!(bed.node_sends(PEER, 1, &inner), [(2, udp4(GATEWAY, pod_mac(2), REMOTE, pod_v4(2), 62, 10))]);
    }
    bed.assert_conserved();
}

#[test]
fn nothing_comes_out_of_the_tunnel_that_does_not_belong_there() {
    let good = udp4(PEER_VTEP, VTEP, REMOTE, pod_v4(1), 63, 10);
    let stranger = "10.200.0.77".parse().unwrap();
    let cases: [(IpAddr, u32, Vec<u8>, DropReason); 7] = [
        (stranger, 1, good.clone(), DropReason::NotMember),
        (PEER, 2, good.clone(), DropReason::WrongVni),
        (PEER, 1, udp4(PEER_VTEP, VTEP, "10.244.3.9".parse().unwrap(), pod_v4(1), 63, 10), DropReason::TunnelSource),
        (PEER, 1, udp4(PEER_VTEP, VTEP, pod_v4(2), pod_v4(1), 63, 10), DropReason::TunnelSource),
        (PEER, 1, udp4(PEER_VTEP, VTEP, REMOTE, "10.244.2.10".parse().unwrap(), 63, 10), DropReason::NotForUs),
        (PEER, 1, arp_request(PEER_VTEP, REMOTE, pod_v4(1)), DropReason::UnsupportedType),
        (
            PEER,
            1,
            udp4(PEER_VTEP, Mac::BROADCAST, REMOTE, "255.255.255.255".parse().unwrap(), 63, 10),
            DropReason::UnsupportedType,
        ),
    ];
    for (peer, vni, inner, reason) in cases {
        let mut bed = Bed::new(Mode::Routed, 2);
        assert_eq!(bed.node_sends(peer, vni, &inner), [], "{reason:?}");
        bed.assert_only(0, reason, 1);
        assert_eq!(bed.forwarder.fdb(), []);
    }
}

#[test]
fn each_reserved_bit_of_the_tunnel_header_is_refused() {
    let inner = udp4(PEER_VTEP, VTEP, REMOTE, pod_v4(1), 63, 10);
    for bit in 0..64 {
        let is_vni = (32..56).contains(&bit);
        if is_vni {
            continue;
        }
        let mut bed = Bed::new(Mode::Routed, 1);
        let mut bytes = VxlanHeader::new(Vni::new(1).unwrap()).as_bytes().to_vec();
        bytes[bit / 8] ^= 0x80 >> (bit % 8);
        bytes.extend_from_slice(&inner);
        assert_eq!(bed.underlay_brings(PEER, &bytes), [], "bit {bit}");
        bed.assert_only(0, DropReason::TunnelHeader, 1);
    }
}

#[test]
fn the_gateway_and_known_pods_are_answered_with_their_own_mac() {
    let mut bed = Bed::new(Mode::Routed, 2);
    let gateway = bed.tables.gateway;
    for (target, mac) in [(gateway.ipv4.unwrap(), GATEWAY), (pod_v4(2), pod_mac(2))] {
        let out = bed.pod_sends(1, &arp_request(pod_mac(1), pod_v4(1), target));
        assert_eq!(out[0].0, 1);
        let (arp, _) = Arp::read_from_prefix(&out[0].1[14..]).unwrap();
        assert_eq!(arp.op.get(), REPLY);
        assert_eq!((arp.sha, arp.sender(), arp.tha, arp.target()), (mac, target, pod_mac(1), pod_v4(1)));
    }
    let link_local = GATEWAY.link_local();
    for (target, mac, flags) in
        [(gateway.ipv6.unwrap(), GATEWAY, 0xe0), (link_local, GATEWAY, 0xe0), (pod_v6(2), pod_mac(2), 0x60)]
    {
        let out = bed.pod_sends(1, &solicitation(pod_mac(1), pod_v6(1), target));
        assert_eq!(out[0].0, 1);
        assert_sound(&out[0].1);
        let (message, option) = Neighbor::parse(&out[0].1[54..]).unwrap();
        assert_eq!((message.target(), option, message.flags()), (target, Some(mac), flags));
    }
    bed.assert_only(1, DropReason::Answered, 5);
}

#[test]
fn duplicate_detection_and_probes_are_never_answered() {
    let mut bed = Bed::new(Mode::Routed, 2);
    let questions = [
        arp_request(pod_mac(1), Ipv4Addr::UNSPECIFIED, pod_v4(1)),
        arp_request(pod_mac(1), pod_v4(1), pod_v4(1)),
        solicitation(pod_mac(1), Ipv6Addr::UNSPECIFIED, pod_v6(1)),
        solicitation(pod_mac(1), Ipv6Addr::UNSPECIFIED, pod_mac(1).link_local()),
    ];
    for question in questions {
        assert_eq!(bed.pod_sends(1, &question), [(2, question.clone())]);
    }
    bed.assert_conserved();
}

#[test]
fn a_pod_speaks_for_nobody_else() {
    let other = pod_v4(2);
    let (m1, m2) = (pod_mac(1), pod_mac(2));
    let dhcp_offer = |mac: Mac| {
        let builder = PacketBuilder::ethernet2(mac.0, [0xff; 6]).ipv4(pod_v4(1).octets(), [255; 4], 64).udp(67, 68);
        let mut bytes = Vec::new();
        builder.write(&mut bytes, &[0; 240]).unwrap();
        bytes
    };
    let mut router_advertisement = advertisement(m1, m1.link_local(), m1.link_local(), m1);
    router_advertisement[54] = 134;
    let mut lying_arp = arp_request(m1, pod_v4(1), "10.244.1.77".parse().unwrap());
    lying_arp[14 + 8..14 + 14].copy_from_slice(&m2.0);
    let cases = [
        (udp4(m2, GATEWAY, pod_v4(1), REMOTE, 64, 1), DropReason::SourceMac),
        (udp4(Mac([3, 0, 0, 0, 0, 1]), GATEWAY, pod_v4(1), REMOTE, 64, 1), DropReason::SourceMac),
        (udp4(m1, GATEWAY, other, REMOTE, 64, 1), DropReason::SourceIp),
        (udp4(m1, m2, Ipv4Addr::UNSPECIFIED, other, 64, 1), DropReason::SourceIp),
        (udp6(m1, GATEWAY, pod_v6(2), REMOTE6, 64, 1), DropReason::SourceIp),
        (udp6(m1, m2, m2.link_local(), m2.link_local(), 64, 1), DropReason::SourceIp),
        (udp6(m1, m2, GATEWAY.link_local(), "ff02::1".parse().unwrap(), 64, 1), DropReason::SourceIp),
        (udp6(m1, GATEWAY, "fe80::77".parse().unwrap(), REMOTE6, 64, 1), DropReason::SourceIp),
        (arp_request(m1, other, "10.244.1.77".parse().unwrap()), DropReason::ArpSpoof),
        (lying_arp, DropReason::ArpSpoof),
        (advertisement(m1, pod_v6(1), pod_v6(2), m1), DropReason::NdSpoof),
        (advertisement(m1, pod_v6(1), pod_v6(1), m2), DropReason::NdSpoof),
        (advertisement(m1, pod_v6(1), GATEWAY.link_local(), m1), DropReason::NdSpoof),
        (solicitation(m1, Ipv6Addr::UNSPECIFIED, m2.link_local()), DropReason::NdSpoof),
        (router_advertisement, DropReason::RouterMessage),
        (dhcp_offer(m1), DropReason::DhcpServer),
    ];
    for (bytes, reason) in cases {
        let mut bed = Bed::new(Mode::Bridged, 2);
        assert_eq!(bed.pod_sends(1, &bytes), [], "{reason:?}");
        bed.assert_only(1, reason, 1);
        assert_eq!(bed.forwarder.fdb(), []);
    }
}

#[test]
fn link_local_protocols_pass() {
    let m1 = pod_mac(1);
    let passes = [
        udp6(m1, Mac([0x33, 0x33, 0, 0, 0, 1]), m1.link_local(), "ff02::1".parse().unwrap(), 1, 1),
        udp6(m1, Mac([0x33, 0x33, 0, 0, 0, 0x16]), Ipv6Addr::UNSPECIFIED, "ff02::16".parse().unwrap(), 1, 1),
        udp6(m1, pod_mac(2), m1.link_local(), pod_mac(2).link_local(), 64, 1),
        udp6(m1, pod_mac(2), "fe80::77".parse().unwrap(), pod_mac(2).link_local(), 64, 1),
        udp4(m1, Mac::BROADCAST, Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST, 64, 1),
    ];
    for bytes in passes {
        let mut bed = Bed::new(Mode::Routed, 2);
        assert_eq!(bed.pod_sends(1, &bytes), [(2, bytes.clone())]);
    }
}

#[test]
fn a_ping_to_the_gateway_is_answered_whole_or_in_fragments() {
    let mut bed = Bed::new(Mode::Routed, 1);
    let mut bytes = Vec::new();
    let gateway = bed.tables.gateway.ipv4.unwrap();
    let builder = PacketBuilder::ethernet2(pod_mac(1).0, GATEWAY.0).ipv4(pod_v4(1).octets(), gateway.octets(), 1);
    builder.icmpv4_echo_request(7, 9).write(&mut bytes, &[1; 1000]).unwrap();
    let out = bed.pod_sends(1, &bytes);
    assert_eq!(out.len(), 1);
    assert_sound(&out[0].1);
    assert_eq!((out[0].0, &out[0].1[..6], &out[0].1[6..12]), (1, &pod_mac(1).0[..], &GATEWAY.0[..]));
    assert_eq!(out[0].1[34], 0);

    // The same as three fragments.
    let icmp = &bytes[34..];
    let mut out = Vec::new();
    for (index, piece) in icmp.chunks(400).enumerate() {
        let mut header = etherparse::Ipv4Header::new(
            piece.len() as u16,
            64,
            etherparse::IpNumber::ICMP,
            pod_v4(1).octets(),
            gateway.octets(),
        )
        .unwrap();
        header.identification = 5;
        header.dont_fragment = false;
        header.more_fragments = index < 2;
        header.fragment_offset = etherparse::IpFragOffset::try_new((index * 50) as u16).unwrap();
        header.header_checksum = header.calc_header_checksum();
        let mut frame = bytes[..14].to_vec();
        header.write(&mut frame).unwrap();
        frame.extend_from_slice(piece);
        out = bed.pod_sends(1, &frame);
    }
    assert_eq!(out.len(), 1);
    assert_sound(&out[0].1);
    assert_eq!(out[0].1.len(), bytes.len());

    let mut bytes = Vec::new();
    let gateway = bed.tables.gateway.ipv6.unwrap();
    let builder = PacketBuilder::ethernet2(pod_mac(1).0, GATEWAY.0).ipv6(pod_v6(1).octets(), gateway.octets(), 64);
    builder.icmpv6_echo_request(7, 9).write(&mut bytes, &[1; 1000]).unwrap();
    let out = bed.pod_sends(1, &bytes);
    assert_sound(&out[0].1);
    assert_eq!(out[0].1[54], 129);
    bed.assert_only(1, DropReason::Answered, 5);
}

#[test]
fn a_router_must_not_forward_a_packet_whose_ttl_would_become_zero() {
    for ttl in [0, 1] {
        let mut bed = Bed::new(Mode::Routed, 1);
        let sent = udp4(pod_mac(1), GATEWAY, pod_v4(1), REMOTE, ttl, 100);
        let out = bed.pod_sends(1, &sent);
        assert_eq!(out[0].0, 1);
        assert_sound(&out[0].1);
        assert_eq!(out[0].1[26..30], bed.tables.gateway.ipv4.unwrap().octets());
        assert_eq!(out[0].1[34..36], [11, 0]);
        assert_eq!(out[0].1[42..], sent[14..]);
        bed.assert_only(1, DropReason::TtlExceeded, 1);
        let sent = udp6(pod_mac(1), GATEWAY, pod_v6(1), REMOTE6, ttl, 100);
        let out = bed.pod_sends(1, &sent);
        assert_sound(&out[0].1);
        assert_eq!(out[0].1[54..56], [3, 0]);
        assert_eq!(out[0].1[62..], sent[14..]);
    }
}

#[test]
fn an_expired_packet_from_another_node_is_told_through_the_tunnel() {
    let mut bed = Bed::new(Mode::Routed, 1);
    let out = bed.node_sends(PEER, 1, &udp4(PEER_VTEP, VTEP, REMOTE, pod_v4(1), 1, 10));
    assert_eq!(out[0].0, UNDERLAY.0);
    let inner = &out[0].1[8..];
    assert_sound(inner);
    assert_eq!((&inner[..6], &inner[6..12]), (&PEER_VTEP.0[..], &VTEP.0[..]));
    assert_eq!(inner[26..30], bed.tables.gateway.ipv4.unwrap().octets());
    bed.assert_only(0, DropReason::TtlExceeded, 1);
}

#[test]
fn an_oversize_packet_is_told_the_mtu_and_no_error_follows_an_error() {
    let mut bed = Bed::new(Mode::Routed, 1);
    let sent = udp4(pod_mac(1), GATEWAY, pod_v4(1), REMOTE, 64, 1450 - 27);
    let out = bed.pod_sends(1, &sent);
    assert_eq!((out.len(), out[0].0), (1, 1));
    assert_sound(&out[0].1);
    assert_eq!(out[0].1[34..36], [3, 4]);
    assert_eq!(out[0].1[40..42], 1450u16.to_be_bytes());
    assert_eq!(out[0].1.len(), 14 + 576);
    bed.assert_only(1, DropReason::MtuExceeded, 1);

    let sent = udp6(pod_mac(1), GATEWAY, pod_v6(1), REMOTE6, 64, 1450 - 47);
    let out = bed.pod_sends(1, &sent);
    assert_sound(&out[0].1);
    assert_eq!(out[0].1[54..56], [2, 0]);
    assert_eq!(out[0].1[58..62], 1450u32.to_be_bytes());

    let mut error = Vec::new();
    let builder = PacketBuilder::ethernet2(pod_mac(1).0, GATEWAY.0).ipv4(pod_v4(1).octets(), REMOTE.octets(), 1);
    builder.icmpv4_raw(3, 1, [0; 4]).write(&mut error, &[0; 28]).unwrap();
    assert_eq!(bed.pod_sends(1, &error), []);
    bed.assert_conserved();
}

#[test]
fn icmp_errors_are_limited_per_port() {
    let mut bed = Bed::new(Mode::Routed, 1);
    let sent = udp4(pod_mac(1), GATEWAY, pod_v4(1), "192.0.2.1".parse().unwrap(), 64, 1);
    let errors: usize = (0..1000).map(|_| bed.pod_sends(1, &sent).len()).sum();
    assert_eq!(errors, RouterConfig::default().icmp_rate as usize);
    bed.assert_only(1, DropReason::NoRoute, 1000);
}

/// A superframe of `payload` bytes as a TAP hands it over.
fn superframe(bed: &Bed, payload: usize, size: u16, dst: Mac, to: Ipv4Addr, ttl: u8) -> Frame {
    let mut bytes = Vec::new();
    let builder =
        PacketBuilder::ethernet2(pod_mac(1).0, dst.0).ipv4(pod_v4(1).octets(), to.octets(), ttl).tcp(1, 2, 3, 4);
    builder.write(&mut bytes, &vec![0x77; payload]).unwrap();
    let pseudo = weft_encap::checksum::pseudo_v4(pod_v4(1), to, 6, 20 + payload as u32).fold();
    bytes[50..52].copy_from_slice(&pseudo.to_be_bytes());
    let mut frame = Frame::from_bytes(&bytes, PortId(1), &bed.pool).unwrap();
    let gso = Gso { kind: GsoKind::Tcp4, ecn: false, size, header_len: 0 };
    frame.offload = Offload { partial: Some(Partial { start: 34, offset: 16 }), gso: Some(gso), verified: false };
    frame
}

#[test]
fn a_superframe_passes_whole_and_is_measured_by_its_segments() {
    let mut bed = Bed::new(Mode::Routed, 2);
    let frame = superframe(&bed, 60_000, 1410, pod_mac(2), pod_v4(2), 64);
    let out = bed.give(frame);
    assert_eq!((out.len(), out[0].0), (1, PortId(2)));
    assert_eq!(out[0].1.len(), 54 + 60_000);
    assert_eq!(out[0].1.offload.gso.unwrap().header_len, 54);
    drop(out);
    let frame = superframe(&bed, 60_000, 1410, GATEWAY, REMOTE, 64);
    let out = bed.give(frame);
    assert_eq!((out.len(), out[0].0), (1, UNDERLAY));
    assert!(out[0].1.outer.is_some());
    drop(out);
    let frame = superframe(&bed, 60_000, 1411, GATEWAY, REMOTE, 64);
    assert_eq!(bed.pass(frame)[0].1[34..36], [3, 4]);
    assert_eq!(bed.dropped(1, DropReason::MtuExceeded), 1);
}

#[test]
fn an_error_about_a_superframe_quotes_its_first_segment_as_on_the_wire() {
    let mut bed = Bed::new(Mode::Routed, 1);
    let frame = superframe(&bed, 3000, 200, GATEWAY, REMOTE, 1);
    let out = bed.pass(frame);
    let quote = &out[0].1[42..];
    let mut ethernet = out[0].1[..14].to_vec();
    ethernet.extend_from_slice(quote);
    let packet = SlicedPacket::from_ethernet(&ethernet).unwrap();
    let (Some(NetSlice::Ipv4(ip)), Some(TransportSlice::Tcp(tcp))) = (packet.net, packet.transport) else { panic!() };
    assert_eq!(ip.header().total_len(), 240);
    assert_eq!(ip.header().to_header().calc_header_checksum(), ip.header().header_checksum());
    let sum = tcp.to_header().calc_checksum_ipv4(&ip.header().to_header(), tcp.payload()).unwrap();
    assert_eq!(tcp.checksum(), sum);
}

#[test]
fn offload_metadata_that_does_not_fit_the_headers_is_refused() {
    let change: [fn(&mut Offload); 7] = [
        |offload| offload.partial = None,
        |offload| offload.partial.as_mut().unwrap().start = 14,
        |offload| offload.partial.as_mut().unwrap().offset = 6,
        |offload| offload.gso.as_mut().unwrap().kind = GsoKind::Tcp6,
        |offload| offload.gso.as_mut().unwrap().kind = GsoKind::Udp,
        |offload| offload.gso.as_mut().unwrap().size = 0,
        |offload| *offload = Offload { partial: Some(Partial { start: 34, offset: 60_000 }), ..Offload::default() },
    ];
    for change in change {
        let mut bed = Bed::new(Mode::Routed, 2);
        let mut frame = superframe(&bed, 3000, 200, pod_mac(2), pod_v4(2), 64);
        change(&mut frame.offload);
        assert!(bed.pass(frame).is_empty());
        bed.assert_only(1, DropReason::BadOffload, 1);
    }
}

#[test]
fn in_bridged_mode_macs_are_learned_through_the_tunnel() {
    let mut bed = Bed::new(Mode::Bridged, 3);
    let remote = Ipv4Addr::new(10, 244, 2, 9);
    // The question goes to everybody, the answer teaches where it came from.
    let question = arp_request(pod_mac(1), pod_v4(1), remote);
    let out = bed.pod_sends(1, &question);
    assert_eq!(out.iter().map(|(port, _)| *port).collect::<Vec<_>>(), [0, 2, 3]);
    assert_eq!(out[0].1[8..], question);
    assert_eq!((&out[1].1, &out[2].1), (&question, &question));

    let unknown = udp4(pod_mac(1), REMOTE_MAC, pod_v4(1), remote, 64, 5);
    let out = bed.pod_sends(1, &unknown);
    assert_eq!(out.len(), 1, "an unknown MAC is on another node, for all local ones are known");
    let inner = udp4(REMOTE_MAC, pod_mac(1), remote, pod_v4(1), 64, 5);
    assert_eq!(bed.node_sends(PEER, 1, &inner), [(1, inner.clone())]);
    assert_eq!(bed.forwarder.fdb().len(), 1);
    let out = bed.pod_sends(1, &unknown);
    assert_eq!((out.len(), out[0].0), (1, 0));
    assert_eq!(out[0].1[8..], unknown);
    bed.assert_conserved();

    // Never from tunnel to tunnel, and a broadcast from a node stays here.
    assert_eq!(bed.node_sends(PEER, 1, &udp4(REMOTE_MAC, Mac([2, 7, 7, 7, 7, 7]), remote, pod_v4(9), 64, 5)), []);
    let out = bed.node_sends(PEER, 1, &udp4(REMOTE_MAC, Mac::BROADCAST, remote, Ipv4Addr::BROADCAST, 64, 5));
    assert_eq!(out.iter().map(|(port, _)| *port).collect::<Vec<_>>(), [1, 2, 3]);
    bed.assert_conserved();
}

#[test]
fn local_and_gateway_macs_and_addresses_never_come_through_the_tunnel() {
    let remote = Ipv4Addr::new(10, 244, 2, 9);
    let gateway = Bed::new(Mode::Bridged, 1).tables.gateway.ipv4.unwrap();
    let cases = [
        udp4(pod_mac(2), pod_mac(1), remote, pod_v4(1), 64, 5),
        udp4(GATEWAY, pod_mac(1), remote, pod_v4(1), 64, 5),
        udp4(VTEP, pod_mac(1), remote, pod_v4(1), 64, 5),
        udp4(REMOTE_MAC, pod_mac(1), pod_v4(2), pod_v4(1), 64, 5),
        udp4(REMOTE_MAC, pod_mac(1), gateway, pod_v4(1), 64, 5),
        arp_request(REMOTE_MAC, pod_v4(2), pod_v4(1)),
        arp_request(REMOTE_MAC, gateway, pod_v4(1)),
        advertisement(REMOTE_MAC, REMOTE6, pod_v6(2), REMOTE_MAC),
    ];
    for bytes in cases {
        let mut bed = Bed::new(Mode::Bridged, 2);
        assert_eq!(bed.node_sends(PEER, 1, &bytes), []);
        bed.assert_only(0, DropReason::TunnelSource, 1);
        assert_eq!(bed.forwarder.fdb(), []);
    }
    let mut bed = Bed::new(Mode::Bridged, 2);
    assert_eq!(bed.node_sends(PEER, 1, &udp4(REMOTE_MAC, GATEWAY, remote, pod_v4(1), 64, 5)), []);
    bed.assert_only(0, DropReason::NotForUs, 1);
}

#[test]
fn a_question_from_another_node_reaches_only_the_pod_it_is_about() {
    let mut bed = Bed::new(Mode::Bridged, 3);
    let question = arp_request(REMOTE_MAC, Ipv4Addr::new(10, 244, 2, 9), pod_v4(2));
    assert_eq!(bed.node_sends(PEER, 1, &question), [(2, question.clone())]);
    bed.assert_conserved();
}

#[test]
fn a_flow_follows_a_mac_that_moves_and_tables_that_change() {
    let mut bed = Bed::new(Mode::Bridged, 1);
    let second: IpAddr = "10.200.0.3".parse().unwrap();
    bed.tables.add_node(NodeId(1), Node { underlay: second, vtep_mac: Mac([2, 0xee, 0, 0, 0, 3]), ranges: vec![] });
    let remote = Ipv4Addr::new(10, 244, 2, 9);
    let inner = udp4(REMOTE_MAC, pod_mac(1), remote, pod_v4(1), 64, 5);
    let sent = udp4(pod_mac(1), REMOTE_MAC, pod_v4(1), remote, 64, 5);
    for peer in [PEER, second, PEER] {
        bed.node_sends(peer, 1, &inner);
        for _ in 0..2 {
            let frame = Frame::from_bytes(&sent, PortId(1), &bed.pool).unwrap();
            let out = bed.give(frame);
            assert_eq!(out[0].1.outer.unwrap().peer, peer);
        }
    }
    bed.tables.nodes[0] = None;
    bed.tables.members.remove(&PEER);
    bed.tables.epoch += 1;
    let frame = Frame::from_bytes(&sent, PortId(1), &bed.pool).unwrap();
    let out = bed.give(frame);
    assert_eq!(out[0].1.outer.unwrap().peer, second, "unknown again, so it goes to all nodes that are left");
}

#[test]
fn frames_that_contradict_themselves_end_here_by_name() {
    let good = udp4(pod_mac(1), pod_mac(2), pod_v4(1), pod_v4(2), 64, 20);
    let edit = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    let mut tagged = good[..12].to_vec();
    tagged.extend_from_slice(&[0x81, 0, 0, 5]);
    tagged.extend_from_slice(&good[12..]);
    let cases = [
        (edit(14, 0x44), DropReason::Malformed),
        (edit(14, 0x65), DropReason::Malformed),
        (edit(14, 0x4f), DropReason::Malformed),
        (edit(17, 200), DropReason::TooShort),
        (edit(17, 10), DropReason::Malformed),
        (edit(24, good[24] ^ 1), DropReason::BadIpv4Checksum),
        (tagged.clone(), DropReason::VlanTag),
        (tagged[..14].to_vec(), DropReason::VlanTag),
    ];
    for (bytes, reason) in cases {
        let mut bed = Bed::new(Mode::Routed, 2);
        assert_eq!(bed.pod_sends(1, &bytes), []);
        bed.assert_only(1, reason, 1);
    }
    for cut in 0..good.len() {
        let mut bed = Bed::new(Mode::Routed, 2);
        assert_eq!(bed.pod_sends(1, &good[..cut]), [], "cut at {cut}");
        bed.assert_conserved();
        assert_eq!(bed.forwarder.stats().of(PortId(1)).dropped_total(), 1);
    }
}

#[test]
fn padding_does_not_cross_the_tunnel() {
    let mut bed = Bed::new(Mode::Routed, 1);
    let mut sent = udp4(pod_mac(1), GATEWAY, pod_v4(1), REMOTE, 64, 1);
    sent.resize(60, 0xcc);
    assert_eq!(bed.pod_sends(1, &sent)[0].1[8..], udp4(VTEP, PEER_VTEP, pod_v4(1), REMOTE, 63, 1));
}

#[test]
fn floods_stay_within_the_budget_and_spare_other_ports() {
    let mut bed = Bed::new(Mode::Bridged, 4);
    let storm = udp4(pod_mac(1), Mac::BROADCAST, pod_v4(1), Ipv4Addr::BROADCAST, 64, 5);
    let copies: usize = (0..20_000).map(|_| bed.pod_sends(1, &storm).len()).sum();
    let rate = RouterConfig::default().flood_rate as usize;
    assert!((rate..rate + 8).contains(&copies), "{copies}");
    assert!(bed.dropped(1, DropReason::FloodBudget) > 0);
    let other = udp4(pod_mac(2), Mac::BROADCAST, pod_v4(2), Ipv4Addr::BROADCAST, 64, 5);
    assert_eq!(bed.pod_sends(2, &other).len(), 4);
    bed.assert_conserved();
}

#[test]
fn frames_to_unknown_macs_are_floods_whatever_they_carry() {
    let mut bed = Bed::new(Mode::Bridged, 1);
    let mut strange = EthHeader::new(REMOTE_MAC, pod_mac(1), 0x88b5).as_bytes().to_vec();
    strange.extend_from_slice(&[0; 46]);
    let copies: usize = (0..20_000).map(|_| bed.pod_sends(1, &strange).len()).sum();
    assert_eq!(copies, RouterConfig::default().flood_rate as usize);
    bed.assert_only(1, DropReason::FloodBudget, 20_000 - copies as u64);
}

#[test]
fn a_port_without_policy_forwards_nothing() {
    let mut bed = Bed::new(Mode::Routed, 2);
    let sent = udp4(pod_mac(1), pod_mac(2), pod_v4(1), pod_v4(2), 64, 20);
    assert_eq!(bed.pod_sends(9, &sent), []);
    bed.assert_only(9, DropReason::PortClosed, 1);
}

#[test]
fn a_checksum_to_be_filled_in_is_a_checksum() {
    let m1 = pod_mac(1);
    let udp = udp4(m1, Mac::BROADCAST, pod_v4(1), Ipv4Addr::BROADCAST, 64, 40);
    let advertised = advertisement(m1, pod_v6(1), pod_v6(1), m1);
    let cases = [
        (arp_request(m1, pod_v4(1), REMOTE), 20, 10),
        (udp.clone(), 34, 2),
        (udp.clone(), 36, 4),
        (udp.clone(), 14, 10),
        (advertised.clone(), 54, 0),
        (advertised.clone(), 54, 10),
        (advertised, 62, 2),
    ];
    for (bytes, start, offset) in cases {
        let mut bed = Bed::new(Mode::Bridged, 2);
        let mut frame = Frame::from_bytes(&bytes, PortId(1), &bed.pool).unwrap();
        frame.offload.partial = Some(Partial { start, offset });
        assert!(bed.pass(frame).is_empty(), "{start} + {offset}");
        bed.assert_only(1, DropReason::BadOffload, 1);
    }
    // Its own, and that of a packet in a tunnel that the pod itself made.
    for (start, offset) in [(34, 6), (34 + 8 + 20, 16)] {
        let mut bed = Bed::new(Mode::Bridged, 2);
        let mut frame = Frame::from_bytes(&udp, PortId(1), &bed.pool).unwrap();
        frame.offload.partial = Some(Partial { start, offset });
        assert_eq!(bed.pass(frame).len(), 2);
    }
}

/// The first fragment of an IPv6 packet whose fragmentable part is `rest` as far as it is there.
fn first_fragment(src: Mac, from: Ipv6Addr, next: u8, more: bool, rest: &[u8]) -> Vec<u8> {
    let mut bytes = EthHeader::new(Mac([0x33, 0x33, 0, 0, 0, 1]), src, 0x86dd).as_bytes().to_vec();
    let to = "ff02::1".parse().unwrap();
    bytes.extend_from_slice(weft_encap::ipv6::Ipv6Header::new(from, to, 44, 255, 8 + rest.len() as u16).as_bytes());
    bytes.extend_from_slice(&[next, 0, 0, u8::from(more), 0, 0, 0, 7]);
    bytes.extend_from_slice(rest);
    bytes
}

#[test]
fn nothing_hides_in_a_first_fragment() {
    let m1 = pod_mac(1);
    let lie = advertisement(m1, pod_v6(1), pod_v6(2), m1);
    let offer = [0x02, 0x23, 0x02, 0x22, 0, 100, 0, 0];
    let cases = [
        (first_fragment(m1, pod_v6(1), 58, true, &lie[54..]), DropReason::Malformed),
        (first_fragment(m1, pod_v6(1), 58, false, &lie[54..]), DropReason::Malformed),
        (first_fragment(m1, m1.link_local(), 58, true, &[]), DropReason::TooShort),
        (first_fragment(m1, m1.link_local(), 58, true, &[134, 0, 0, 0]), DropReason::TooShort),
        (first_fragment(m1, m1.link_local(), 17, true, &offer), DropReason::DhcpServer),
    ];
    for (bytes, reason) in cases {
        let mut bed = Bed::new(Mode::Bridged, 2);
        assert_eq!(bed.pod_sends(1, &bytes), []);
        bed.assert_only(1, reason, 1);
    }
}

#[test]
fn a_dhcp_offer_does_not_leave_a_pod_from_whichever_port() {
    for from in [67, 1067, 68] {
        for more_fragments in [false, true] {
            let mut header =
                etherparse::Ipv4Header::new(8, 64, etherparse::IpNumber::UDP, pod_v4(1).octets(), [255; 4]).unwrap();
            header.more_fragments = more_fragments;
            header.dont_fragment = false;
            header.header_checksum = header.calc_header_checksum();
            let mut bytes = EthHeader::new(Mac::BROADCAST, pod_mac(1), 0x0800).as_bytes().to_vec();
            header.write(&mut bytes).unwrap();
            let [high, low] = u16::to_be_bytes(from);
            bytes.extend_from_slice(&[high, low, 0, 68, 0, 8, 0, 0]);
            let mut bed = Bed::new(Mode::Bridged, 2);
            assert_eq!(bed.pod_sends(1, &bytes), []);
            bed.assert_only(1, DropReason::DhcpServer, 1);
        }
    }
}

#[test]
fn addresses_that_only_stand_for_ipv4_do_not_come_in() {
    let mut bed = Bed::new(Mode::Bridged, 1);
    let (from, to) = (Ipv4Addr::new(10, 244, 2, 5), pod_v4(1));
    bed.node_sends(PEER, 1, &udp4(REMOTE_MAC, VTEP, from, to, 64, 5));
    let mapped = udp6(REMOTE_MAC, VTEP, from.to_ipv6_mapped(), to.to_ipv6_mapped(), 64, 5);
    assert_eq!(bed.node_sends(PEER, 1, &mapped), []);
    assert_eq!(bed.dropped(0, DropReason::Malformed), 1);
}

#[test]
fn a_node_lends_no_local_mac_to_its_addresses() {
    let remote = Ipv4Addr::new(10, 244, 2, 9);
    for taken in [GATEWAY, pod_mac(1), VTEP] {
        let mut lie = arp_request(REMOTE_MAC, remote, pod_v4(2));
        lie[22..28].copy_from_slice(&taken.0);
        for bytes in [lie, advertisement(REMOTE_MAC, REMOTE6, REMOTE6, taken)] {
            let mut bed = Bed::new(Mode::Bridged, 2);
            assert_eq!(bed.node_sends(PEER, 1, &bytes), []);
            bed.assert_only(0, DropReason::TunnelSource, 1);
        }
    }
}

#[test]
fn questions_for_one_pod_do_not_use_up_the_budget_of_all_nodes() {
    let mut bed = Bed::new(Mode::Bridged, 2);
    let remote = Ipv4Addr::new(10, 244, 2, 9);
    let question = arp_request(REMOTE_MAC, remote, pod_v4(1));
    for _ in 0..50_000 {
        assert_eq!(bed.node_sends(PEER, 1, &question).len(), 1);
    }
    assert_eq!(bed.node_sends(PEER, 1, &udp4(REMOTE_MAC, Mac::BROADCAST, remote, Ipv4Addr::BROADCAST, 64, 5)).len(), 2);
}

#[test]
fn what_the_gateway_refuses_is_told_within_the_budget() {
    let mut bed = Bed::new(Mode::Routed, 1);
    let gateway = bed.tables.gateway.ipv4.unwrap();
    let closed = udp4(pod_mac(1), GATEWAY, pod_v4(1), gateway, 64, 5);
    let told: usize = (0..1000).map(|_| bed.pod_sends(1, &closed).len()).sum();
    assert_eq!(told, RouterConfig::default().icmp_rate as usize);
    let mut ping = Vec::new();
    let builder = PacketBuilder::ethernet2(pod_mac(1).0, GATEWAY.0).ipv4(pod_v4(1).octets(), gateway.octets(), 64);
    builder.icmpv4_echo_request(7, 9).write(&mut ping, &[1; 100]).unwrap();
    assert_eq!(bed.pod_sends(1, &ping).len(), 1, "pings are not held back by it");
    bed.assert_conserved();
}

#[test]
fn the_gateway_follows_the_mtu() {
    let mut bed = Bed::new(Mode::Routed, 1);
    let gateway = bed.tables.gateway.ipv4.unwrap();
    for mtu in [1450, 1400, 1450] {
        bed.tables.tunnel_mtu = mtu;
        let payload = 1410;
        let mut ping = Vec::new();
        let builder = PacketBuilder::ethernet2(pod_mac(1).0, GATEWAY.0).ipv4(pod_v4(1).octets(), gateway.octets(), 64);
        builder.icmpv4_echo_request(7, 9).write(&mut ping, &vec![1; payload]).unwrap();
        let out = bed.pod_sends(1, &ping);
        assert_eq!(out.len(), if mtu == 1450 { 1 } else { 2 });
        assert!(out.iter().all(|(_, bytes)| bytes.len() <= 14 + mtu as usize));
    }
}
