//! The host port: what leaves by it, what may enter by it, and what goes back by it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use etherparse::PacketBuilder;
use weft_encap::mac::Mac;
use weft_router::DropReason;
use weft_router::pace::Limits;
use weft_router::port::PortId;
use weft_router::tables::{Dhcp, Mode, Pod};

use crate::bed::*;

const HOST: u16 = 9;
const HOST_MAC: Mac = Mac([2, 0xcc, 0, 0, 0, 9]);
const HOST_V4: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 254);
const HOST_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 0, 0xfe);
const BEYOND: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const BEYOND6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

/// Two pods, another node, and this node itself on port 9.
fn bed(mode: Mode) -> Bed {
    let mut bed = Bed::new(mode, 2);
    let interface = Pod {
        mac: HOST_MAC,
        ipv4: vec![HOST_V4],
        ipv6: vec![HOST_V6],
        mtu: 1450,
        limits: Limits::default(),
        dhcp: Dhcp::default(),
    };
    bed.tables.add_host(PortId(HOST), interface);
    bed
}

/// A TCP segment with these flags, as `(source, destination)` of addresses and ports.
fn tcp(macs: (Mac, Mac), addresses: (IpAddr, IpAddr), ports: (u16, u16), ttl: u8, flags: &str) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(macs.0.0, macs.1.0);
    let builder = match addresses {
        (IpAddr::V4(src), IpAddr::V4(dst)) => builder.ipv4(src.octets(), dst.octets(), ttl),
        (IpAddr::V6(src), IpAddr::V6(dst)) => builder.ipv6(src.octets(), dst.octets(), ttl),
        other => panic!("{other:?}"),
    };
    let mut builder = builder.tcp(ports.0, ports.1, 7, 1000);
    if flags.contains('S') {
        builder = builder.syn();
    }
    if flags.contains('A') {
        builder = builder.ack(8);
    }
    let mut bytes = Vec::new();
    builder.write(&mut bytes, &[]).unwrap();
    bytes
}

fn udp(macs: (Mac, Mac), from: (Ipv4Addr, u16), to: (Ipv4Addr, u16)) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(macs.0.0, macs.1.0).ipv4(from.0.octets(), to.0.octets(), 64);
    let mut bytes = Vec::new();
    builder.udp(from.1, to.1).write(&mut bytes, &[0x5a; 20]).unwrap();
    bytes
}

fn echo(macs: (Mac, Mac), from: Ipv4Addr, to: Ipv4Addr, id: u16, is_reply: bool) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(macs.0.0, macs.1.0).ipv4(from.octets(), to.octets(), 64);
    let builder = if is_reply { builder.icmpv4_echo_reply(id, 1) } else { builder.icmpv4_echo_request(id, 1) };
    let mut bytes = Vec::new();
    builder.write(&mut bytes, &[0x5a; 20]).unwrap();
    bytes
}

/// The port by which each of these frames leaves.
#[track_caller]
fn way(bed: &mut Bed, port: u16, bytes: &[u8]) -> u16 {
    let out = bed.pod_sends(port, bytes);
    assert_eq!(out.len(), 1, "{out:02x?}");
    out[0].0
}

fn address(number: u8, v4: bool) -> IpAddr {
    if v4 { pod_v4(number).into() } else { pod_v6(number).into() }
}

#[test]
fn what_no_table_knows_leaves_by_the_host_port_and_comes_back_from_anybody() {
    for mode in [Mode::Routed, Mode::Bridged] {
        let mut bed = bed(mode);
        for _ in 0..2 {
            let sent = udp4(pod_mac(1), GATEWAY, pod_v4(1), BEYOND, 64, 10);
            assert_eq!(bed.pod_sends(1, &sent), [(HOST, udp4(GATEWAY, HOST_MAC, pod_v4(1), BEYOND, 63, 10))]);
            let sent = udp6(pod_mac(1), GATEWAY, pod_v6(1), BEYOND6, 64, 10);
            assert_eq!(bed.pod_sends(1, &sent), [(HOST, udp6(GATEWAY, HOST_MAC, pod_v6(1), BEYOND6, 63, 10))]);
            let back = udp4(HOST_MAC, GATEWAY, BEYOND, pod_v4(1), 64, 10);
            assert_eq!(bed.pod_sends(HOST, &back), [(1, udp4(GATEWAY, pod_mac(1), BEYOND, pod_v4(1), 63, 10))]);
        }
        // Its own addresses are neighbours', whatever the mode.
        let sent = udp4(pod_mac(1), HOST_MAC, pod_v4(1), HOST_V4, 64, 10);
        assert_eq!(bed.pod_sends(1, &sent), [(HOST, sent.clone())]);
        bed.assert_conserved();
    }
}

#[test]
fn the_host_port_speaks_with_its_own_mac_and_claims_no_other_neighbours_name() {
    let mut bed = bed(Mode::Routed);
    bed.pod_sends(HOST, &udp4(pod_mac(1), GATEWAY, pod_v4(1), pod_v4(2), 64, 10));
    assert_eq!(bed.dropped(HOST, DropReason::SourceMac), 1);
    bed.pod_sends(HOST, &arp_request(HOST_MAC, pod_v4(1), pod_v4(2)));
    assert_eq!(bed.dropped(HOST, DropReason::ArpSpoof), 1);
    bed.pod_sends(HOST, &advertisement(HOST_MAC, HOST_V6, pod_v6(2), HOST_MAC));
    assert_eq!(bed.dropped(HOST, DropReason::NdSpoof), 1);
    // It asks in the name of whichever of its addresses it is about to use.
    assert_eq!(bed.pod_sends(HOST, &arp_request(HOST_MAC, BEYOND, pod_v4(2)))[0].0, HOST);
    // A pod is not believed to be the node, nor a node to be a pod of ours.
    bed.pod_sends(1, &udp4(pod_mac(1), pod_mac(2), HOST_V4, pod_v4(2), 64, 10));
    assert_eq!(bed.dropped(1, DropReason::SourceIp), 1);
    bed.assert_conserved();
}

#[test]
fn the_host_port_gets_nothing_back_that_it_sent_and_nothing_that_other_nodes_route() {
    let mut bed = bed(Mode::Routed);
    let out = bed.pod_sends(HOST, &udp4(HOST_MAC, GATEWAY, HOST_V4, BEYOND, 64, 10));
    assert_eq!(out.iter().map(|(port, _)| *port).collect::<Vec<_>>(), [HOST], "an ICMP error");
    assert_eq!(bed.dropped(HOST, DropReason::NoRoute), 1);
    bed.node_sends(PEER, 1, &udp4(PEER_VTEP, VTEP, REMOTE, BEYOND, 63, 10));
    assert_eq!(bed.dropped(UNDERLAY.0, DropReason::NoRoute), 1);
    bed.assert_conserved();
}

#[test]
fn what_another_node_says_in_its_own_name_goes_by_this_nodes_kernel() {
    for mode in [Mode::Routed, Mode::Bridged] {
        let mut bed = bed(mode);
        let IpAddr::V4(peer) = PEER else { panic!("{PEER}") };
        let mut node = bed.tables.nodes[0].clone().expect("there is a peer");
        node.addresses.push(BEYOND6.into());
        Arc::make_mut(&mut bed.tables.nodes)[0] = Some(node);
        // In routed mode nobody looks at the inner MACs, in bridged mode it is the pod's.
        let to = if mode == Mode::Routed { VTEP } else { pod_mac(1) };
        for _ in 0..2 {
            let said = udp4(PEER_VTEP, to, peer, pod_v4(1), 63, 10);
            assert_eq!(bed.node_sends(PEER, 1, &said), [(HOST, udp4(GATEWAY, HOST_MAC, peer, pod_v4(1), 62, 10))]);
            let said = udp6(PEER_VTEP, to, BEYOND6, pod_v6(1), 63, 10);
            assert_eq!(bed.node_sends(PEER, 1, &said), [(HOST, udp6(GATEWAY, HOST_MAC, BEYOND6, pod_v6(1), 62, 10))]);
        }
        // The kernel has it from there, translated or not, and the node's own addresses are reached at once.
        let back = udp4(HOST_MAC, GATEWAY, peer, pod_v4(1), 61, 10);
        assert_eq!(bed.pod_sends(HOST, &back), [(1, udp4(GATEWAY, pod_mac(1), peer, pod_v4(1), 60, 10))]);
        let to = if mode == Mode::Routed { VTEP } else { HOST_MAC };
        assert_eq!(bed.node_sends(PEER, 1, &udp4(PEER_VTEP, to, peer, HOST_V4, 63, 10))[0].0, HOST);
        bed.assert_conserved();
    }
}

#[test]
fn another_node_may_speak_as_itself() {
    let mut bed = bed(Mode::Routed);
    let IpAddr::V4(peer) = PEER else { panic!("{PEER}") };
    let out = bed.node_sends(PEER, 1, &udp4(PEER_VTEP, VTEP, peer, pod_v4(1), 63, 10));
    assert_eq!(out[0].0, HOST);
    for stranger in [Ipv4Addr::new(10, 200, 0, 3), BEYOND] {
        let out = bed.node_sends(PEER, 1, &udp4(PEER_VTEP, VTEP, stranger, pod_v4(1), 63, 10));
        assert_eq!(out.len(), 0);
    }
    assert_eq!(bed.dropped(UNDERLAY.0, DropReason::TunnelSource), 2);
    bed.assert_conserved();
}

#[test]
fn a_reply_to_what_the_host_port_brought_goes_back_by_it() {
    for (mode, v4) in [(Mode::Routed, true), (Mode::Routed, false), (Mode::Bridged, true), (Mode::Bridged, false)] {
        let mut bed = bed(mode);
        let (one, two) = (address(1, v4), address(2, v4));
        let brought = |flags| tcp((HOST_MAC, GATEWAY), (one, two), (5000, 80), 62, flags);
        // In bridged mode a reply is addressed to the other pod's MAC, in routed mode of the same node as well.
        let reply = |flags| tcp((pod_mac(2), pod_mac(1)), (two, one), (80, 5000), 64, flags);
        assert_eq!(way(&mut bed, 2, &reply("SA")), 1, "nothing is known of the connection");
        assert_eq!(way(&mut bed, HOST, &brought("S")), 2);
        let out = bed.pod_sends(2, &reply("SA"));
        assert_eq!(out, [(HOST, tcp((GATEWAY, HOST_MAC), (two, one), (80, 5000), 63, "SA"))]);
        for _ in 0..3 {
            assert_eq!(way(&mut bed, HOST, &brought("A")), 2);
            assert_eq!(way(&mut bed, 2, &reply("A")), HOST);
        }
        // The same two pods, other ports: a connection of their own.
        let direct = tcp((pod_mac(2), pod_mac(1)), (two, one), (80, 5001), 64, "A");
        assert_eq!(way(&mut bed, 2, &direct), 1);
        bed.assert_conserved();
    }
}

#[test]
fn a_connection_that_begins_anew_without_the_host_port_is_answered_without_it() {
    let mut bed = bed(Mode::Routed);
    let (one, two) = (address(1, true), address(2, true));
    let brought = |flags| tcp((HOST_MAC, GATEWAY), (one, two), (5000, 80), 62, flags);
    let direct = |flags| tcp((pod_mac(1), pod_mac(2)), (one, two), (5000, 80), 64, flags);
    let reply = |flags| tcp((pod_mac(2), pod_mac(1)), (two, one), (80, 5000), 64, flags);
    for _ in 0..2 {
        assert_eq!((way(&mut bed, 1, &direct("S")), way(&mut bed, 2, &reply("SA"))), (2, 1));
        assert_eq!((way(&mut bed, 1, &direct("A")), way(&mut bed, 2, &reply("A"))), (2, 1));
        assert_eq!((way(&mut bed, HOST, &brought("S")), way(&mut bed, 2, &reply("SA"))), (2, HOST));
        assert_eq!((way(&mut bed, HOST, &brought("A")), way(&mut bed, 2, &reply("A"))), (2, HOST));
    }
    bed.assert_conserved();
}

#[test]
fn datagrams_follow_each_change_although_nothing_marks_their_beginning() {
    let mut bed = bed(Mode::Routed);
    let (one, two) = ((pod_v4(1), 5000), (pod_v4(2), 53));
    let reply = udp((pod_mac(2), pod_mac(1)), two, one);
    for _ in 0..3 {
        let direct = udp((pod_mac(1), pod_mac(2)), one, two);
        for _ in 0..3 {
            assert_eq!((way(&mut bed, 1, &direct), way(&mut bed, 2, &reply)), (2, 1));
        }
        let brought = udp((HOST_MAC, GATEWAY), one, two);
        for _ in 0..3 {
            assert_eq!((way(&mut bed, HOST, &brought), way(&mut bed, 2, &reply)), (2, HOST));
        }
    }
    bed.assert_conserved();
}

#[test]
fn a_reply_from_another_node_goes_back_by_the_host_port() {
    for mode in [Mode::Routed, Mode::Bridged] {
        let mut bed = bed(mode);
        let out = bed.pod_sends(HOST, &udp((HOST_MAC, GATEWAY), (pod_v4(1), 5000), (REMOTE, 53)));
        assert_eq!(out[0].0, UNDERLAY.0);
        let macs = if mode == Mode::Routed { (PEER_VTEP, VTEP) } else { (REMOTE_MAC, pod_mac(1)) };
        for _ in 0..2 {
            let out = bed.node_sends(PEER, 1, &udp(macs, (REMOTE, 53), (pod_v4(1), 5000)));
            assert_eq!(out[0].0, HOST);
            let other = bed.node_sends(PEER, 1, &udp(macs, (REMOTE, 53), (pod_v4(1), 5001)));
            assert_eq!(other[0].0, 1);
        }
        bed.assert_conserved();
    }
}

#[test]
fn pings_are_told_apart_and_errors_go_where_their_connection_goes() {
    let mut bed = bed(Mode::Routed);
    let brought = echo((HOST_MAC, GATEWAY), pod_v4(1), pod_v4(2), 7, false);
    let reply = |id| echo((pod_mac(2), pod_mac(1)), pod_v4(2), pod_v4(1), id, true);
    assert_eq!(way(&mut bed, HOST, &brought), 2);
    for _ in 0..2 {
        assert_eq!((way(&mut bed, 2, &reply(7)), way(&mut bed, 2, &reply(8))), (HOST, 1));
    }
    let unreachable = |quoted: &[u8]| {
        let builder = PacketBuilder::ethernet2(pod_mac(2).0, pod_mac(1).0);
        let builder = builder.ipv4(pod_v4(2).octets(), pod_v4(1).octets(), 64);
        let builder = builder.icmpv4_raw(3, 3, [0; 4]);
        let mut bytes = Vec::new();
        builder.write(&mut bytes, &quoted[14..42]).unwrap();
        bytes
    };
    let asked = udp((HOST_MAC, GATEWAY), (pod_v4(1), 5000), (pod_v4(2), 53));
    assert_eq!(way(&mut bed, 2, &unreachable(&asked)), 1);
    assert_eq!(way(&mut bed, HOST, &asked), 2);
    for _ in 0..2 {
        assert_eq!(way(&mut bed, 2, &unreachable(&asked)), HOST);
        let other = udp((HOST_MAC, GATEWAY), (pod_v4(1), 5000), (pod_v4(2), 54));
        assert_eq!(way(&mut bed, 2, &unreachable(&other)), 1);
        assert_eq!(way(&mut bed, 2, &unreachable(&[0x5a; 60])), 1, "a quote that makes no sense");
    }
    bed.assert_conserved();
}

#[test]
fn fragments_of_a_reply_go_back_as_well() {
    let mut bed = bed(Mode::Routed);
    let later = |from: u8, to: u8| {
        let mut bytes = udp((pod_mac(from), pod_mac(to)), (pod_v4(from), 53), (pod_v4(to), 5000));
        bytes[20..22].copy_from_slice(&[0x00, 0xb9]);
        bytes[24..26].copy_from_slice(&[0, 0]);
        let sum = weft_encap::checksum::Sum::new().add(&bytes[14..34]).finish();
        bytes[24..26].copy_from_slice(&sum.to_be_bytes());
        bytes
    };
    assert_eq!(way(&mut bed, 2, &later(2, 1)), 1);
    way(&mut bed, HOST, &udp((HOST_MAC, GATEWAY), (pod_v4(1), 5000), (pod_v4(2), 53)));
    assert_eq!(way(&mut bed, 2, &later(2, 1)), HOST);
    assert_eq!(way(&mut bed, 1, &later(1, 2)), 2, "the other direction is not a reply");
    bed.assert_conserved();
}

#[test]
fn what_comes_back_by_itself_is_not_remembered() {
    let mut bed = bed(Mode::Routed);
    for from in [HOST_V4, BEYOND] {
        way(&mut bed, HOST, &udp((HOST_MAC, GATEWAY), (from, 5000), (pod_v4(2), 53)));
        assert_eq!(way(&mut bed, 2, &udp((pod_mac(2), GATEWAY), (pod_v4(2), 53), (from, 5000))), HOST);
    }
    assert_eq!(bed.forwarder.returns().entries, 0);
    way(&mut bed, HOST, &udp((HOST_MAC, GATEWAY), (pod_v4(1), 5000), (pod_v4(2), 53)));
    assert_eq!(bed.forwarder.returns().entries, 2, "the conversation, and its fragments");
}

#[test]
fn a_long_silence_of_one_direction_forgets_nothing() {
    let mut bed = bed(Mode::Routed);
    let (one, two) = ((pod_v4(1), 5000), (pod_v4(2), 53));
    way(&mut bed, HOST, &udp((HOST_MAC, GATEWAY), one, two));
    let reply = udp((pod_mac(2), pod_mac(1)), two, one);
    for _ in 0..100 {
        bed.now.0 += 10_000_000_000;
        assert_eq!(way(&mut bed, 2, &reply), HOST);
    }
    // When both are silent for long it is over.
    bed.now.0 += 1_000_000_000_000;
    bed.tables.epoch += 1;
    assert_eq!(way(&mut bed, 2, &reply), 1);
}
