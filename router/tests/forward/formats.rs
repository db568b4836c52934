//! Tunnel formats: what each peer is sent, what is taken in, and by which name the rest ends.

use weft_encap::format::Format;
use weft_encap::ip;
use weft_router::DropReason;
use weft_router::frame::{Frame, Outer};
use weft_router::port::PortId;
use weft_router::port::raw::dress;
use weft_router::tables::{Mode, NodeId};

use crate::bed::*;

const TUNNEL: u16 = 9;

/// A bed whose other node is sent this format.
fn bed(mode: Mode, format: Format) -> Bed {
    let mut bed = Bed::new(mode, 2);
    for format in Format::ALL {
        bed.tables.add_tunnel(if format == Format::Vxlan { UNDERLAY } else { PortId(TUNNEL) }, format);
    }
    let mut node = bed.tables.node(NodeId(0)).unwrap().clone();
    node.encap = format;
    bed.tables.add_node(NodeId(0), node);
    bed
}

/// From the other node to pod 1, without Ethernet header.
fn inner(v6: bool) -> Vec<u8> {
    let frame = match v6 {
        false => udp4(PEER_VTEP, VTEP, REMOTE, pod_v4(1), 64, 100),
        true => udp6(PEER_VTEP, VTEP, REMOTE6, pod_v6(1), 64, 100),
    };
    frame[14..].to_vec()
}

/// What lies behind the outer IP header, and that header's protocol.
fn packet(format: Format, v6: bool) -> (u8, Vec<u8>) {
    let (ethertype, ip) = (if v6 { [0x86, 0xdd] } else { [0x08, 0] }, inner(v6));
    let ethernet = [&VTEP.0[..], &PEER_VTEP.0, &ethertype, &ip].concat();
    match format {
        Format::Vxlan | Format::Geneve => panic!("it lies behind UDP"),
        Format::Gre => (ip::GRE, [&[0, 0], &ethertype[..], &ip].concat()),
        Format::Gretap => (ip::GRE, [&[0, 0, 0x65, 0x58], &ethernet[..]].concat()),
        Format::Ipip => (if v6 { ip::IPV6 } else { ip::IPIP }, ip),
    }
}

impl Bed {
    fn raw_brings(&mut self, protocol: u8, packet: &[u8]) -> Vec<(u16, Vec<u8>)> {
        let mut frame = Frame::from_bytes(packet, PortId(TUNNEL), &self.pool).unwrap();
        dress(&mut frame, protocol, 1450).unwrap();
        frame.outer = frame.outer.map(|outer| Outer { peer: PEER, ..outer });
        self.pass(frame)
    }

    fn geneve_brings(&mut self, packet: &[u8]) -> Vec<(u16, Vec<u8>)> {
        let mut frame = Frame::from_bytes(packet, PortId(TUNNEL), &self.pool).unwrap();
        frame.outer = Some(Outer { format: Format::Geneve, ..Outer::vxlan(PEER) });
        self.pass(frame)
    }
}

#[test]
fn each_peer_is_sent_its_own_format_by_its_own_port() {
    let expected: [(Format, u16, usize, [&[u8]; 2]); 5] = [
        (Format::Vxlan, 0, 8, [&[8, 0, 0, 0, 0, 0, 1, 0]; 2]),
        (Format::Geneve, TUNNEL, 8, [&[0, 0, 0x65, 0x58, 0, 0, 1, 0]; 2]),
        (Format::Gre, TUNNEL, 4, [&[0, 0, 0x08, 0], &[0, 0, 0x86, 0xdd]]),
        (Format::Gretap, TUNNEL, 4, [&[0, 0, 0x65, 0x58]; 2]),
        (Format::Ipip, TUNNEL, 1, [&[4], &[41]]),
    ];
    for (format, port, base, headers) in expected {
        let mut bed = bed(Mode::Routed, format);
        let frames = [
            udp4(pod_mac(1), GATEWAY, pod_v4(1), REMOTE, 64, 100),
            udp6(pod_mac(1), GATEWAY, pod_v6(1), REMOTE6, 64, 100),
        ];
        // The second time the flow is known.
        for (frame, header) in frames.iter().zip(headers).cycle().take(4) {
            let frame = Frame::from_bytes(frame, PortId(1), &bed.pool).unwrap();
            let len = frame.len();
            let sent = bed.give(frame);
            let [(to, frame)] = &sent[..] else { panic!("{format}: {sent:?}") };
            assert_eq!((to.0, frame.len()), (port, len + base), "{format}");
            assert_eq!(frame.outer.map(|outer| (outer.format, outer.base)), Some((format, base as u16)));
            assert_eq!(frame.head()[..base], *header, "{format}");
        }
    }
}

#[test]
fn whatever_it_sends_itself_a_node_takes_in_all_formats() {
    for (format, v6) in [Format::Gre, Format::Gretap, Format::Ipip].into_iter().flat_map(|f| [(f, false), (f, true)]) {
        let mut bed = bed(Mode::Routed, Format::Vxlan);
        let (protocol, packet) = packet(format, v6);
        for _ in 0..3 {
            let got = bed.raw_brings(protocol, &packet);
            let [(1, frame)] = &got[..] else { panic!("{format}: {got:?}") };
            assert_eq!(frame[..12], [pod_mac(1).0, GATEWAY.0].concat());
            assert_eq!(frame.len(), 14 + inner(v6).len());
        }
        bed.assert_conserved();
    }
}

#[test]
fn geneve_is_taken_with_options_that_may_be_skipped_and_without() {
    let frame = udp4(PEER_VTEP, VTEP, REMOTE, pod_v4(1), 64, 100);
    let mut bed = bed(Mode::Routed, Format::Vxlan);
    let plain = [&[0, 0, 0x65, 0x58, 0, 0, 1, 0][..], &frame].concat();
    let options = [&[2, 0, 0x65, 0x58, 0, 0, 1, 0, 1, 2, 3, 1, 9, 9, 9, 9][..], &frame].concat();
    for packet in [&plain, &options, &plain] {
        assert_eq!(bed.geneve_brings(packet).len(), 1);
    }
    bed.assert_conserved();
}

#[test]
fn each_tunnel_header_that_is_not_ours_has_its_name() {
    let frame = udp4(PEER_VTEP, VTEP, REMOTE, pod_v4(1), 64, 100);
    let with = |header: &[u8]| [header, &frame[..]].concat();
    let geneve = [
        (with(&[0x40, 0, 0x65, 0x58, 0, 0, 1, 0]), DropReason::TunnelHeader),
        (with(&[0, 0x80, 0x65, 0x58, 0, 0, 1, 0]), DropReason::TunnelHeader),
        (with(&[0, 0x40, 0x65, 0x58, 0, 0, 1, 0]), DropReason::TunnelOption),
        (with(&[1, 0, 0x65, 0x58, 0, 0, 1, 0, 1, 2, 0x83, 0]), DropReason::TunnelOption),
        (with(&[0, 0, 0x08, 0x00, 0, 0, 1, 0]), DropReason::TunnelPayload),
        (with(&[0, 0, 0x65, 0x58, 0, 0, 2, 0]), DropReason::WrongVni),
        (vec![0, 0, 0x65], DropReason::TunnelHeader),
    ];
    for (packet, reason) in geneve {
        let mut bed = bed(Mode::Routed, Format::Vxlan);
        assert!(bed.geneve_brings(&packet).is_empty());
        bed.assert_only(TUNNEL, reason, 1);
    }
    let gre = [
        (with(&[0, 1, 0x65, 0x58]), DropReason::TunnelHeader),
        (with(&[0x40, 0, 0x65, 0x58]), DropReason::TunnelHeader),
        (with(&[0x20, 0, 0x65, 0x58, 0, 0, 0, 7]), DropReason::WrongVni),
        (with(&[0, 0, 0x88, 0x47]), DropReason::TunnelPayload),
        (vec![0, 0, 0x65], DropReason::TunnelHeader),
    ];
    for (packet, reason) in gre {
        let mut bed = bed(Mode::Routed, Format::Vxlan);
        assert!(bed.raw_brings(ip::GRE, &packet).is_empty());
        bed.assert_only(TUNNEL, reason, 1);
    }
    let mut bed = bed(Mode::Routed, Format::Vxlan);
    assert!(bed.raw_brings(ip::IPV6, &inner(false)).is_empty());
    bed.assert_only(TUNNEL, DropReason::TunnelHeader, 1);
}

#[test]
fn a_gre_key_is_none_zero_or_the_network_identifier_and_a_checksum_is_right() {
    let frame = udp4(PEER_VTEP, VTEP, REMOTE, pod_v4(1), 64, 100);
    let mut bed = bed(Mode::Routed, Format::Vxlan);
    for key in [0, 1] {
        let packet = [&[0x30, 0, 0x65, 0x58, 0, 0, 0, key, 0, 0, 0, 9][..], &frame].concat();
        assert_eq!(bed.raw_brings(ip::GRE, &packet).len(), 1);
    }
    let mut packet = [&[0x80, 0, 0x65, 0x58, 0, 0, 0, 0][..], &frame].concat();
    let sum = !weft_encap::checksum::sum(&packet);
    packet[4..6].copy_from_slice(&sum.to_be_bytes());
    assert_eq!(bed.raw_brings(ip::GRE, &packet).len(), 1);
    packet[4] ^= 1;
    let mut wrong = Frame::from_bytes(&packet, PortId(TUNNEL), &bed.pool).unwrap();
    assert_eq!(dress(&mut wrong, ip::GRE, 1450), Err(DropReason::TunnelHeader));
    drop(wrong);
    bed.assert_conserved();
}

#[test]
fn bridged_mode_takes_no_ip_without_ethernet() {
    for format in [Format::Gre, Format::Ipip] {
        let mut bed = bed(Mode::Bridged, Format::Vxlan);
        let (protocol, packet) = packet(format, false);
        assert!(bed.raw_brings(protocol, &packet).is_empty());
        bed.assert_only(TUNNEL, DropReason::TunnelPayload, 1);
    }
}

#[test]
fn a_stranger_is_no_member_by_any_format() {
    let mut bed = bed(Mode::Routed, Format::Vxlan);
    for format in [Format::Gre, Format::Gretap, Format::Ipip] {
        let (protocol, packet) = packet(format, false);
        let mut frame = Frame::from_bytes(&packet, PortId(TUNNEL), &bed.pool).unwrap();
        dress(&mut frame, protocol, 1450).unwrap();
        frame.outer = frame.outer.map(|outer| Outer { peer: "10.200.0.66".parse().unwrap(), ..outer });
        assert!(bed.pass(frame).is_empty());
    }
    bed.assert_only(TUNNEL, DropReason::NotMember, 3);
}
