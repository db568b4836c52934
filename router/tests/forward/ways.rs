//! Where frames go, and what is said to their senders.

use std::net::{Ipv4Addr, Ipv6Addr};

use etherparse::PacketBuilder;
use weft_encap::arp::{Arp, REPLY};
use weft_encap::mac::Mac;
use weft_encap::ndp::Neighbor;
use weft_encap::vxlan::{Vni, VxlanHeader};
use weft_encap::zerocopy::FromBytes;
use weft_router::DropReason;
use weft_router::tables::Mode;

use crate::bed::*;

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
fn padding_does_not_cross_the_tunnel() {
    let mut bed = Bed::new(Mode::Routed, 1);
    let mut sent = udp4(pod_mac(1), GATEWAY, pod_v4(1), REMOTE, 64, 1);
    sent.resize(60, 0xcc);
    assert_eq!(bed.pod_sends(1, &sent)[0].1[8..], udp4(VTEP, PEER_VTEP, pod_v4(1), REMOTE, 63, 1));
}

#[test]
fn a_port_without_policy_forwards_nothing() {
    let mut bed = Bed::new(Mode::Routed, 2);
    let sent = udp4(pod_mac(1), pod_mac(2), pod_v4(1), pod_v4(2), 64, 20);
    assert_eq!(bed.pod_sends(9, &sent), []);
    bed.assert_only(9, DropReason::PortClosed, 1);
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
