//! What leaves in the node's name, and what comes back, byte by byte.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
use weft_encap::checksum;
use weft_encap::mac::Mac;
use weft_encap::offload::{Gso, GsoKind, Partial};
use weft_router::DropReason;
use weft_router::frame::Frame;
use weft_router::pace::Limits;
use weft_router::path::Macs;
use weft_router::port::PortId;
use weft_router::tables::{Dhcp, GroupId, Masquerade, Mode, NextHop, NextHops, Pod, WayOut, came_back};

use crate::bed::*;

const HOST: u16 = 9;
const HOST_MAC: Mac = Mac([2, 0xcc, 0, 0, 0, 9]);
const UPLINK: u16 = 10;
const MACS: Macs = Macs { dst: Mac([2, 0xdd, 0, 0, 0, 1]), src: Mac([2, 0xde, 0, 0, 0, 1]) };
const NODE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 5);
const NODE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 5);
const SERVER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const SERVER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1);

fn bed() -> Bed {
    let mut bed = Bed::new(Mode::Routed, 2);
    let (ipv4, ipv6) = (vec![Ipv4Addr::new(10, 244, 1, 254)], Vec::new());
    let interface = Pod { mac: HOST_MAC, ipv4, ipv6, mtu: 1450, limits: Limits::default(), dhcp: Dhcp::default() };
    bed.tables.add_host(PortId(HOST), interface);
    bed.tables.add_uplink(PortId(UPLINK));
    let hop = NextHop { port: PortId(UPLINK), macs: MACS, mtu: 1500, weight: 1 };
    bed.tables.next_hops = Arc::new(vec![NextHops::new([hop])]);
    for net in ["0.0.0.0/0", "::/0"] {
        bed.tables.outside.insert(net.parse().unwrap(), GroupId(0));
    }
    let addresses = ["192.0.2.5/24", "2001:db8::5/64"].map(|net| net.parse().unwrap()).to_vec();
    let way = WayOut { port: PortId(UPLINK), mac: MACS.src, addresses };
    let own = vec![IpAddr::from(NODE), IpAddr::from(NODE6)];
    let masquerade = Masquerade::new(vec![way], &["10.96.0.0/12".parse().unwrap()], vec![PEER], own);
    bed.tables.masquerade = Some(Arc::new(masquerade));
    bed
}

fn udp(macs: (Mac, Mac), from: (IpAddr, u16), to: (IpAddr, u16), payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(macs.0.0, macs.1.0);
    let builder = match (from.0, to.0) {
        (IpAddr::V4(from), IpAddr::V4(to)) => builder.ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => builder.ipv6(from.octets(), to.octets(), 64),
        _ => unreachable!("one family"),
    };
    let mut bytes = Vec::new();
    builder.udp(from.1, to.1).write(&mut bytes, payload).unwrap();
    bytes
}

fn less_one_ttl(mut bytes: Vec<u8>) -> Vec<u8> {
    if bytes[14] >> 4 == 4 {
        bytes[22] -= 1;
        let sum = checksum::ipv4_header(&bytes[14..34]);
        bytes[24..26].copy_from_slice(&sum.to_be_bytes());
    } else {
        bytes[21] -= 1;
    }
    bytes
}

fn source_port(bytes: &[u8]) -> u16 {
    match SlicedPacket::from_ethernet(bytes).unwrap().transport.unwrap() {
        TransportSlice::Udp(udp) => udp.source_port(),
        TransportSlice::Tcp(tcp) => tcp.source_port(),
        other => panic!("{other:?}"),
    }
}

fn ends(v6: bool) -> [IpAddr; 3] {
    if v6 { [pod_v6(1).into(), NODE6.into(), SERVER6.into()] } else { [pod_v4(1).into(), NODE.into(), SERVER.into()] }
}

#[test]
fn a_datagram_leaves_as_the_node_and_its_answer_finds_the_pod() {
    for v6 in [false, true] {
        let mut bed = bed();
        let [pod, node, server] = ends(v6);
        // The first takes the thorough way, the others the short one; the result is the same.
        for round in 0..3 {
            let sent = bed.pod_sends(1, &udp((pod_mac(1), GATEWAY), (pod, 5353), (server, 53), &[round; 9]));
            let [(by, bytes)] = &sent[..] else { panic!("{sent:?}") };
            let port = source_port(bytes);
            assert!(port >= 61_000);
            let expected = less_one_ttl(udp((MACS.src, MACS.dst), (node, port), (server, 53), &[round; 9]));
            assert_eq!((*by, bytes), (UPLINK, &expected));
            let back = udp((MACS.dst, came_back(PortId(UPLINK))), (server, 53), (node, port), &[7; 5]);
            let answer = bed.pod_sends(HOST, &back);
            let expected = less_one_ttl(udp((GATEWAY, pod_mac(1)), (server, 53), (pod, 5353), &[7; 5]));
            assert_eq!(answer, [(1, expected)]);
        }
        bed.assert_conserved();
    }
}

#[test]
fn what_belongs_to_nobody_goes_back_to_the_kernel_as_it_came() {
    let mut bed = bed();
    let [pod, node, server] = ends(false);
    let sent = bed.pod_sends(1, &udp((pod_mac(1), GATEWAY), (pod, 1), (server, 53), &[]));
    let port = source_port(&sent[0].1);
    for (from, to) in [((server, 54), (node, port)), ((server, 53), (node, port ^ 1)), ((PEER, 53), (node, port))] {
        let stray = udp((MACS.dst, came_back(PortId(UPLINK))), from, to, &[1]);
        assert_eq!(bed.pod_sends(HOST, &stray), [(HOST, stray)]);
    }
    bed.assert_conserved();
}

#[test]
fn what_is_kept_and_the_nodes_own_addresses_go_to_the_kernel_untranslated() {
    let mut bed = bed();
    for to in [Ipv4Addr::new(10, 96, 0, 1), NODE] {
        let sent = bed.pod_sends(1, &udp4(pod_mac(1), GATEWAY, pod_v4(1), to, 64, 20));
        assert_eq!(sent, [(HOST, udp4(GATEWAY, HOST_MAC, pod_v4(1), to, 63, 20))]);
    }
    let IpAddr::V4(peer) = PEER else { unreachable!() };
    let sent = bed.pod_sends(1, &udp4(pod_mac(1), GATEWAY, pod_v4(1), peer, 64, 20));
    assert_eq!(sent[0].0, UPLINK, "another node's own address is outside");
    // Other pods of the cluster are not.
    let sent = bed.pod_sends(1, &udp4(pod_mac(1), GATEWAY, pod_v4(1), REMOTE, 64, 20));
    assert_eq!(sent[0].0, 0);
    bed.assert_conserved();
}

#[test]
fn without_a_next_hop_the_kernel_gets_the_translated_packet() {
    let mut bed = bed();
    bed.tables.next_hops = Arc::new(vec![NextHops::none()]);
    let sent = bed.pod_sends(1, &udp4(pod_mac(1), GATEWAY, pod_v4(1), SERVER, 64, 20));
    let [(HOST, bytes)] = &sent[..] else { panic!("{sent:?}") };
    assert_eq!(bytes[26..30], NODE.octets());
    assert_sound(bytes);
    bed.assert_conserved();
}

#[test]
fn a_superframe_stays_whole_and_its_partial_sum_covers_no_ports() {
    let mut bed = bed();
    let mut bytes = Vec::new();
    let builder = PacketBuilder::ethernet2(pod_mac(1).0, GATEWAY.0).ipv4(pod_v4(1).octets(), SERVER.octets(), 64);
    builder.tcp(4000, 443, 1, 100).ack(5).write(&mut bytes, &[3; 4000]).unwrap();
    let len = (bytes.len() - 34) as u32;
    let partial = |src| checksum::pseudo_v4(src, SERVER, 6, len).fold().to_be_bytes();
    bytes[50..52].copy_from_slice(&partial(pod_v4(1)));
    for _ in 0..2 {
        let mut frame = Frame::from_bytes(&bytes, PortId(1), &bed.pool).unwrap();
        frame.offload.partial = Some(Partial { start: 34, offset: 16 });
        frame.offload.gso = Some(Gso { kind: GsoKind::Tcp4, ecn: false, size: 1400, header_len: 54 });
        let mut sent = bed.give(frame);
        let (port, frame) = sent.pop().unwrap();
        assert_eq!((port, sent.len()), (PortId(UPLINK), 0));
        let head = frame.to_vec();
        assert_eq!((head.len(), &head[50..52]), (bytes.len(), &partial(NODE)[..]));
        assert!(frame.offload.gso.is_some_and(|gso| gso.size == 1400) && frame.offload.partial.is_some());
        bed.forwarder.stats().sent(frame, port, 1);
    }
    bed.assert_conserved();
}

#[test]
fn a_wrong_checksum_stays_wrong() {
    let mut bed = bed();
    let [pod, _, server] = ends(false);
    let mut bytes = udp((pod_mac(1), GATEWAY), (pod, 1), (server, 53), &[9; 9]);
    bytes[40] ^= 0x10;
    let (_, sent) = bed.pod_sends(1, &bytes).pop().unwrap();
    let sum = checksum::verify(checksum::pseudo_v4(NODE, SERVER, 17, (sent.len() - 34) as u32), &sent[34..]);
    assert!(!sum);
}

/// A router's error about a packet of ours, which quotes it as it left.
fn error_about(sent: &[u8], to: Ipv4Addr) -> Vec<u8> {
    let mut message = vec![3, 4, 0, 0, 0, 0, 5, 0];
    message.extend_from_slice(&sent[14..14 + 28]);
    let sum = checksum::Sum::new().add(&message).finish();
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut bytes = Vec::new();
    let eth =
        PacketBuilder::ethernet2(MACS.dst.0, came_back(PortId(UPLINK)).0).ipv4([198, 51, 100, 1], to.octets(), 64);
    eth.write(&mut bytes, etherparse::IpNumber::ICMP, &message).unwrap();
    bytes
}

#[test]
fn an_error_about_what_left_finds_its_pod_and_quotes_what_that_sent() {
    let mut bed = bed();
    let original = udp4(pod_mac(1), GATEWAY, pod_v4(1), SERVER, 64, 20);
    let (_, sent) = bed.pod_sends(1, &original).pop().unwrap();
    let told = bed.pod_sends(HOST, &error_about(&sent, NODE));
    let [(1, bytes)] = &told[..] else { panic!("{told:?}") };
    assert_sound(bytes);
    assert_eq!(bytes[30..34], pod_v4(1).octets());
    let quoted = &bytes[42..];
    assert_eq!(quoted[12..16], pod_v4(1).octets());
    assert_eq!(quoted[20..22], original[34..36], "the port that the pod used");
    assert_eq!(quoted[26..28], original[40..42], "and the checksum that it wrote");
    assert!(checksum::verify_ipv4_header(&quoted[..20]));
    // One that quotes what nobody sent is the kernel's.
    let mut other = sent.clone();
    other[37] ^= 1;
    let stray = error_about(&other, NODE);
    assert_eq!(bed.pod_sends(HOST, &stray), [(HOST, stray)]);
    bed.assert_conserved();
}

#[test]
fn fragments_leave_and_return_by_what_their_first_one_says() {
    let mut bed = bed();
    let whole = udp4(pod_mac(1), GATEWAY, pod_v4(1), SERVER, 64, 48);
    let piece = |from: usize, to: usize, more: bool, whole: &[u8]| {
        let mut bytes = whole[..34].to_vec();
        bytes.extend_from_slice(&whole[34 + from..34 + to]);
        bytes[16..18].copy_from_slice(&((20 + to - from) as u16).to_be_bytes());
        bytes[18..20].copy_from_slice(&77_u16.to_be_bytes());
        bytes[20..22].copy_from_slice(&((from / 8) as u16 | if more { 0x2000 } else { 0 }).to_be_bytes());
        let sum = checksum::ipv4_header(&bytes[14..34]);
        bytes[24..26].copy_from_slice(&sum.to_be_bytes());
        bytes
    };
    let pieces = [piece(0, 24, true, &whole), piece(24, 40, true, &whole), piece(40, 56, false, &whole)];
    assert_eq!(bed.pod_sends(1, &pieces[1]), [], "nobody knows whose it is");
    let sent: Vec<Vec<u8>> = pieces.iter().flat_map(|piece| bed.pod_sends(1, piece)).map(|(_, sent)| sent).collect();
    assert_eq!(sent.len(), 3);
    assert!(sent.iter().all(|sent| sent[26..30] == NODE.octets()));
    let mut datagram = sent[0][..34].to_vec();
    sent.iter().for_each(|sent| datagram.extend_from_slice(&sent[34..]));
    assert!(checksum::verify(checksum::pseudo_v4(NODE, SERVER, 17, 56), &datagram[34..]), "put together it is right");
    assert_eq!(bed.pod_sends(1, &pieces[1]), [], "the last one was the end");
    // The way back.
    let port = u16::from_be_bytes([datagram[34], datagram[35]]);
    let back = udp((MACS.dst, came_back(PortId(UPLINK))), (SERVER.into(), 2222), (NODE.into(), port), &[4; 48]);
    for piece in [piece(0, 24, true, &back), piece(24, 56, false, &back)] {
        let got = bed.pod_sends(HOST, &piece);
        // By the kernel, which may have to cut them.
        assert_eq!((got.len(), got[0].0, &got[0].1[30..34]), (1, HOST, &pod_v4(1).octets()[..]));
    }
    assert_eq!(bed.dropped(1, DropReason::UnknownPiece), 2);
    bed.assert_conserved();
}

#[test]
fn a_ping_leaves_with_an_identifier_of_its_own() {
    let mut bed = bed();
    let mut bytes = Vec::new();
    let builder = PacketBuilder::ethernet2(pod_mac(1).0, GATEWAY.0).ipv4(pod_v4(1).octets(), SERVER.octets(), 64);
    builder.icmpv4_echo_request(7, 1).write(&mut bytes, &[1; 32]).unwrap();
    let (_, sent) = bed.pod_sends(1, &bytes).pop().unwrap();
    assert_sound(&sent);
    let id = u16::from_be_bytes([sent[38], sent[39]]);
    assert!(id >= 61_000);
    let mut back = Vec::new();
    let builder =
        PacketBuilder::ethernet2(MACS.dst.0, came_back(PortId(UPLINK)).0).ipv4(SERVER.octets(), NODE.octets(), 64);
    builder.icmpv4_echo_reply(id, 1).write(&mut back, &[1; 32]).unwrap();
    let (to, got) = bed.pod_sends(HOST, &back).pop().unwrap();
    assert_sound(&got);
    assert_eq!((to, &got[38..40]), (1, &7_u16.to_be_bytes()[..]));
    bed.assert_conserved();
}

#[test]
fn what_is_too_long_for_a_pod_is_answered_by_the_uplink_it_came_by() {
    let mut bed = bed();
    let [pod, node, server] = ends(false);
    let (_, sent) = bed.pod_sends(1, &udp((pod_mac(1), GATEWAY), (pod, 1), (server, 53), &[])).pop().unwrap();
    let mut long = udp((MACS.dst, came_back(PortId(UPLINK))), (server, 53), (node, source_port(&sent)), &[0; 1440]);
    // What may be fragmented the kernel cuts.
    long[20] &= !0x40;
    let sum = checksum::ipv4_header(&long[14..34]);
    long[24..26].copy_from_slice(&sum.to_be_bytes());
    let cut = bed.pod_sends(HOST, &long);
    let [(HOST, bytes)] = &cut[..] else { panic!("{cut:?}") };
    assert_eq!((&bytes[..6], &bytes[30..34], bytes.len()), (&HOST_MAC.0[..], &pod_v4(1).octets()[..], long.len()));
    long[20] |= 0x40;
    let sum = checksum::ipv4_header(&long[14..34]);
    long[24..26].copy_from_slice(&sum.to_be_bytes());
    let told = bed.pod_sends(HOST, &long);
    let [(UPLINK, bytes)] = &told[..] else { panic!("{told:?}") };
    assert_sound(bytes);
    assert_eq!((&bytes[..6], &bytes[26..34]), (&MACS.dst.0[..], &[NODE.octets(), SERVER.octets()].concat()[..]));
    assert_eq!(bytes[42..42 + 20], long[14..34], "it quotes what was sent");
    bed.assert_conserved();
}

#[test]
fn who_comes_by_the_kernel_is_answered_by_the_kernel() {
    let mut bed = bed();
    // A published port: the kernel has translated the destination, and is to translate the answer.
    for (client, pod) in
        [(IpAddr::from(SERVER), IpAddr::from(pod_v4(1))), (SERVER6.into(), pod_v6(1).into()), (PEER, pod_v4(1).into())]
    {
        let asked = udp((HOST_MAC, GATEWAY), (client, 40_000), (pod, 80), b"asked");
        let answer = udp((pod_mac(1), GATEWAY), (pod, 80), (client, 40_000), b"answer");
        for _ in 0..2 {
            assert_eq!(bed.pod_sends(HOST, &asked)[0].0, 1);
            let out = bed.pod_sends(1, &answer);
            assert_eq!(out[0].0, HOST);
            assert_eq!(source_port(&out[0].1), 80);
        }
        // What the pod begins itself leaves in the node's name all the same, to wherever.
        let own = udp((pod_mac(1), GATEWAY), (pod, 81), (client, 40_000), b"own");
        assert_eq!(bed.pod_sends(1, &own)[0].0, UPLINK);
        // And what came back for it by way of the kernel takes nothing away from it.
        let around = udp((HOST_MAC, GATEWAY), (client, 40_000), (pod, 81), b"around");
        assert_eq!(bed.pod_sends(HOST, &around)[0].0, 1);
        assert_eq!(bed.pod_sends(1, &own)[0].0, UPLINK);
    }
    bed.assert_conserved();
}

#[test]
fn a_protocol_without_ports_does_not_leave() {
    let mut bed = bed();
    let mut bytes = Vec::new();
    let builder = PacketBuilder::ethernet2(pod_mac(1).0, GATEWAY.0).ipv4(pod_v4(1).octets(), SERVER.octets(), 64);
    builder.write(&mut bytes, etherparse::IpNumber(132), &[0; 40]).unwrap();
    assert_eq!(bed.pod_sends(1, &bytes), []);
    bed.assert_only(1, DropReason::NotMasqueraded, 1);
}

#[test]
fn whatever_pods_and_outsiders_send_nothing_is_lost_and_nothing_panics() {
    let mut bed = bed();
    let [pod, node, server] = ends(false);
    let (_, sent) = bed.pod_sends(1, &udp((pod_mac(1), GATEWAY), (pod, 1), (server, 53), &[1; 60])).pop().unwrap();
    let answer = udp((MACS.dst, came_back(PortId(UPLINK))), (server, 53), (node, source_port(&sent)), &[2; 60]);
    let templates = [
        (1, udp((pod_mac(1), GATEWAY), (pod, 1), (server, 53), &[1; 60])),
        (1, udp((pod_mac(1), GATEWAY), (pod_v6(1).into(), 1), (SERVER6.into(), 53), &[1; 60])),
        (HOST, answer),
        (HOST, error_about(&sent, NODE)),
    ];
    let mut state = 7_u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for round in 0..30_000_u64 {
        let (port, mut bytes) = templates[random(templates.len())].clone();
        for _ in 0..random(4) {
            let at = 14 + random(bytes.len() - 14);
            bytes[at] = random(256) as u8;
        }
        if random(8) == 0 {
            bytes.truncate(14 + random(bytes.len() - 14));
        }
        // Most shall get past the check of the header.
        if bytes.len() >= 34 && bytes[14] == 0x45 && random(8) > 0 {
            let sum = checksum::ipv4_header(&bytes[14..34]);
            bytes[24..26].copy_from_slice(&sum.to_be_bytes());
        }
        bed.now = bed.now + std::time::Duration::from_millis(1);
        bed.pod_sends(port, &bytes);
        if round % 4096 == 0 {
            bed.forwarder.tick(bed.now);
        }
    }
    bed.assert_conserved();
}
