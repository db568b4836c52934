//! What leaves in the node's name, and what comes back, byte by byte.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
use weft_encap::checksum;
use weft_encap::mac::Mac;
use weft_encap::offload::{Gso, GsoKind, Partial};
use weft_router::forward::{Forwarder, Memory};
use weft_router::frame::Frame;
use weft_router::pace::Limits;
use weft_router::path::Macs;
use weft_router::port::PortId;
use weft_router::snat::Snat;
use weft_router::tables::{Dhcp, GroupId, Masquerade, Mode, NextHop, NextHops, Pod, WayOut, came_back};

use weft_router::{DropReason, RouterConfig};

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
    bed_with(RouterConfig::default()).0
}

/// The same, and the table of sessions.
fn bed_with(config: RouterConfig) -> (Bed, Arc<Snat>) {
    let memory = Memory::new(&config);
    let snat = Arc::clone(&memory.snat);
    let mut bed = Bed::new(Mode::Routed, 2);
    bed.forwarder = Forwarder::sharing(memory, &config);
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
    (bed, snat)
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

fn random(seed: u64) -> impl FnMut(usize) -> usize {
    let mut state = seed;
    move |below| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    }
}

/// A small reference: who was let out has a session, and nobody else.
#[test]
fn a_packet_that_is_refused_leaves_no_session() {
    let config = RouterConfig {
        masquerade: weft_router::snat::Limits { per_pod: 400, ..Default::default() },
        ..RouterConfig::default()
    };
    let (mut bed, snat) = bed_with(config);
    let mut random = random(11);
    let (mut out, mut refused) = (std::collections::BTreeSet::new(), [0; 3]);
    for _ in 0..4000 {
        let v6 = random(2) == 0;
        let [pod, _, server] = ends(v6);
        let from = (pod, 1 + random(2000) as u16);
        let ttl = [0, 1, 2, 64][random(4)];
        let len = [10, 1400, 1480][random(3)];
        let mut bytes = udp((pod_mac(1), GATEWAY), from, (server, 53), &vec![1; len]);
        set_ttl(&mut bytes, ttl);
        let is_long = bytes.len() - 14 > 1500;
        let before = snat.usage().sessions;
        let sent = bed.pod_sends(1, &bytes);
        let left = sent.iter().any(|(port, _)| *port == UPLINK);
        if left {
            assert!(ttl > 1 && !is_long);
            out.insert(from);
        } else {
            assert_eq!(snat.usage().sessions, before, "ttl {ttl}, {len} bytes");
            refused[if ttl <= 1 {
                0
            } else if is_long {
                1
            } else {
                2
            }] += 1;
        }
        assert_eq!(snat.usage().sessions, out.len());
    }
    assert!(refused.iter().all(|count| *count > 50), "{refused:?}: too old, too long, too many");
    assert_eq!(bed.dropped(1, DropReason::MasqueradeQuota), refused[2]);
    bed.assert_conserved();
}

fn set_ttl(bytes: &mut [u8], ttl: u8) {
    if bytes[14] >> 4 == 6 {
        bytes[21] = ttl;
        return;
    }
    bytes[22] = ttl;
    let sum = checksum::ipv4_header(&bytes[14..34]);
    bytes[24..26].copy_from_slice(&sum.to_be_bytes());
}

/// Two pods' sockets that a server outside has told of each other: their outer ports.
fn two_sockets(bed: &mut Bed, v6: bool) -> [(IpAddr, u16); 2] {
    let [_, node, server] = ends(v6);
    [1, 2].map(|number| {
        let (pod, mac) = (address(number, v6), pod_mac(number));
        let sent =
            bed.pod_sends(number.into(), &udp((mac, GATEWAY), (pod, 5000 + u16::from(number)), (server, 3478), &[]));
        (node, source_port(&sent[0].1))
    })
}

fn address(number: u8, v6: bool) -> IpAddr {
    if v6 { pod_v6(number).into() } else { pod_v4(number).into() }
}

/// RFC 4787, REQ-9: "A NAT MUST support 'Hairpinning'", and REQ-9a: "A NAT Hairpinning behavior MUST be 'External source IP address and port'".
#[test]
fn pods_reach_each_other_by_their_outer_ports_once_both_have_sent() {
    for v6 in [false, true] {
        let mut bed = bed();
        let outer = two_sockets(&mut bed, v6);
        let send = |bed: &mut Bed, number: u8, payload: &[u8]| {
            let from = (address(number, v6), 5000 + u16::from(number));
            bed.pod_sends(
                number.into(),
                &udp((pod_mac(number), GATEWAY), from, outer[usize::from(2 - number)], payload),
            )
        };
        assert_eq!(send(&mut bed, 1, &[1; 9]), [], "the other one has not sent yet");
        assert_eq!(bed.dropped(1, DropReason::Uninvited), 1);
        for (number, payload) in [(2, [2; 30]), (1, [1; 30]), (2, [3; 30]), (1, [4; 30])] {
            let other = 3 - number;
            let to = (address(other, v6), 5000 + u16::from(other));
            let expected = udp((GATEWAY, pod_mac(other)), outer[usize::from(number - 1)], to, &payload);
            assert_eq!(send(&mut bed, number, &payload), [(other.into(), less_one_ttl(expected))]);
        }
        // Another socket of the same pod was not asked.
        let stranger = udp((pod_mac(1), GATEWAY), (address(1, v6), 6000), outer[1], &[]);
        assert_eq!(bed.pod_sends(1, &stranger), []);
        assert_eq!(bed.dropped(1, DropReason::Uninvited), 2);
        // What would be too long for the other one is refused as everywhere, and what is nobody's is the kernel's.
        assert!(send(&mut bed, 1, &[0; 1440]).iter().all(|(port, _)| *port == 1));
        let nobodys = (outer[1].0, if outer[1].1 == 65_535 { 61_000 } else { outer[1].1 + 1 });
        let nobodys = if nobodys == outer[0] { (nobodys.0, 1024) } else { nobodys };
        let sent = bed.pod_sends(1, &udp((pod_mac(1), GATEWAY), (address(1, v6), 5001), nobodys, &[]));
        assert_eq!((sent.len(), sent[0].0), (1, HOST));
        bed.assert_conserved();
    }
}

#[test]
fn a_pod_reaches_itself_by_its_outer_port() {
    let mut bed = bed();
    let outer = two_sockets(&mut bed, false);
    let me = (pod_v4(1).into(), 5001);
    let sent = bed.pod_sends(1, &udp((pod_mac(1), GATEWAY), me, outer[0], &[7]));
    assert_eq!(sent, [(1, less_one_ttl(udp((GATEWAY, pod_mac(1)), outer[0], me, &[7])))]);
    bed.assert_conserved();
}

/// RFC 5508, REQ-6: errors about hairpinned packets are translated in both directions.
#[test]
fn errors_and_fragments_turn_round_as_what_they_belong_to() {
    let mut bed = bed();
    let outer = two_sockets(&mut bed, false);
    let ends = |number: u8| (IpAddr::from(pod_v4(number)), 5000 + u16::from(number));
    bed.pod_sends(2, &udp((pod_mac(2), GATEWAY), ends(2), outer[0], &[]));
    let original = udp((pod_mac(1), GATEWAY), ends(1), outer[1], &[5; 40]);
    let (_, got) = bed.pod_sends(1, &original).pop().unwrap();
    // Nobody listens there.
    let mut message = vec![3, 3, 0, 0, 0, 0, 0, 0];
    message.extend_from_slice(&got[14..14 + 28]);
    let sum = checksum::Sum::new().add(&message).finish();
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut error = Vec::new();
    let builder = PacketBuilder::ethernet2(pod_mac(2).0, GATEWAY.0).ipv4(pod_v4(2).octets(), NODE.octets(), 64);
    builder.write(&mut error, etherparse::IpNumber::ICMP, &message).unwrap();
    let told = bed.pod_sends(2, &error);
    let [(1, bytes)] = &told[..] else { panic!("{told:?}") };
    assert_sound(bytes);
    assert_eq!(bytes[26..34], [NODE.octets(), pod_v4(1).octets()].concat());
    let quoted = &bytes[42..];
    assert_eq!(quoted[12..20], [pod_v4(1).octets(), NODE.octets()].concat());
    assert_eq!(quoted[20..28], original[34..42], "ports and checksum as the pod wrote them");
    // A datagram in two pieces.
    let whole = udp((pod_mac(1), GATEWAY), ends(1), outer[1], &[6; 48]);
    let piece = |from: usize, to: usize, more: bool| {
        let mut bytes = whole[..34].to_vec();
        bytes.extend_from_slice(&whole[34 + from..34 + to]);
        bytes[16..18].copy_from_slice(&((20 + to - from) as u16).to_be_bytes());
        bytes[18..20].copy_from_slice(&99_u16.to_be_bytes());
        bytes[20..22].copy_from_slice(&((from / 8) as u16 | if more { 0x2000 } else { 0 }).to_be_bytes());
        let sum = checksum::ipv4_header(&bytes[14..34]);
        bytes[24..26].copy_from_slice(&sum.to_be_bytes());
        bytes
    };
    let mut datagram = Vec::new();
    for piece in [piece(0, 24, true), piece(24, 56, false)] {
        let got = bed.pod_sends(1, &piece);
        let [(2, bytes)] = &got[..] else { panic!("{got:?}") };
        assert_eq!(bytes[26..34], [NODE.octets(), pod_v4(2).octets()].concat());
        datagram.extend_from_slice(&bytes[34..]);
    }
    assert!(checksum::verify(checksum::pseudo_v4(NODE, pod_v4(2), 17, 56), &datagram), "put together it is right");
    assert_eq!(datagram[..4], [outer[0].1.to_be_bytes(), 5002_u16.to_be_bytes()].concat());
    bed.assert_conserved();
}

/// CVE-2021-3773: whoever has the same ports as somebody else's conversation gets its answers.
#[test]
fn no_pod_gets_the_port_of_a_conversation_of_the_node() {
    let masquerade = weft_router::snat::Limits { first: 61_000, last: 61_099, ..Default::default() };
    let (mut bed, snat) = bed_with(RouterConfig { masquerade, ..RouterConfig::default() });
    let [pod, node, server] = ends(false);
    let answer = udp((MACS.dst, came_back(PortId(UPLINK))), (server, 53), (node, 61_042), &[1]);
    assert_eq!(bed.pod_sends(HOST, &answer), [(HOST, answer.clone())], "the kernel's");
    // The pod takes all that it can get.
    let mut ports = std::collections::BTreeSet::new();
    for port in 1..=100 {
        for (to, bytes) in bed.pod_sends(1, &udp((pod_mac(1), GATEWAY), (pod, port), (server, 53), &[])) {
            assert!(to == UPLINK && ports.insert(source_port(&bytes)));
        }
    }
    assert_eq!((ports.len(), ports.contains(&61_042)), (99, false));
    assert_eq!(bed.dropped(1, DropReason::MasqueradePorts), 1);
    assert_eq!(bed.pod_sends(HOST, &answer), [(HOST, answer.clone())], "still the kernel's");
    // Another pod gets its share all the same.
    bed.now = bed.now + std::time::Duration::from_secs(1);
    let other = udp((pod_mac(2), GATEWAY), (pod_v4(2).into(), 1), (server, 53), &[]);
    assert_eq!(bed.pod_sends(2, &other).len(), 1);
    assert!(snat.usage().taken_back > 0);
    bed.assert_conserved();
}

#[test]
fn outsiders_cannot_use_ports_up_by_sending_to_them() {
    let masquerade = weft_router::snat::Limits { first: 61_000, last: 61_099, ..Default::default() };
    let (mut bed, _) = bed_with(RouterConfig { masquerade, ..RouterConfig::default() });
    let [pod, node, server] = ends(false);
    for port in 61_000..61_100 {
        bed.pod_sends(HOST, &udp((MACS.dst, came_back(PortId(UPLINK))), (server, 53), (node, port), &[1]));
    }
    let sent = bed.pod_sends(1, &udp((pod_mac(1), GATEWAY), (pod, 1), (server, 53), &[]));
    assert_eq!((sent.len(), sent[0].0), (1, UPLINK));
    bed.assert_conserved();
}

/// Whatever the node's kernel, routers and other nodes send back, a packet ends, at the latest with its TTL.
#[test]
fn nothing_goes_round_for_ever() {
    let mut bed = bed();
    bed.tables.add_route("198.18.0.0/15".parse().unwrap(), weft_router::tables::Via::Uplink(GroupId(0)));
    let nobody = Ipv4Addr::new(10, 244, 1, 200);
    let kept = Ipv4Addr::new(10, 96, 0, 1);
    let learned = Ipv4Addr::new(198, 18, 0, 1);
    for to in [SERVER, NODE, kept, nobody, learned, REMOTE, pod_v4(1), pod_v4(2)] {
        let mut under_way = vec![(1, udp4(pod_mac(1), GATEWAY, pod_v4(1), to, 64, 20))];
        let mut passed = 0;
        while let Some((from, bytes)) = under_way.pop() {
            passed += 1;
            assert!(passed <= 3 * 64, "a packet to {to} goes round");
            let sent = if from == 0 { bed.node_sends(PEER, 1, &bytes) } else { bed.pod_sends(from, &bytes) };
            for (by, mut bytes) in sent {
                let inner = if by == 0 { bytes.split_off(8) } else { bytes };
                // Errors are for their receivers.
                if inner[22] <= 1 || inner[23] == 1 || by == 1 || by == 2 {
                    continue;
                }
                let mut again = less_one_ttl(inner);
                let (from, macs) = if by == 0 { (0, (PEER_VTEP, VTEP)) } else { (HOST, (HOST_MAC, GATEWAY)) };
                again[..6].copy_from_slice(&macs.1.0);
                again[6..12].copy_from_slice(&macs.0.0);
                under_way.push((from, again));
            }
        }
    }
    bed.assert_conserved();
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
    let mut random = random(7);
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
