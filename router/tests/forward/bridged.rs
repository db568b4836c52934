//! One segment over all nodes: learning, and who may claim what.

use std::net::{IpAddr, Ipv4Addr};

use weft_encap::mac::Mac;
use weft_router::DropReason;
use weft_router::frame::Frame;
use weft_router::port::PortId;
use weft_router::tables::{Mode, Node, NodeId};

use crate::bed::*;

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
    bed.tables.add_node(NodeId(1), Node::new(second, Mac([2, 0xee, 0, 0, 0, 3]), vec![]));
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
    std::sync::Arc::make_mut(&mut bed.tables.nodes)[0] = None;
    std::sync::Arc::make_mut(&mut bed.tables.members).remove(&PEER);
    bed.tables.epoch += 1;
    let frame = Frame::from_bytes(&sent, PortId(1), &bed.pool).unwrap();
    let out = bed.give(frame);
    assert_eq!(out[0].1.outer.unwrap().peer, second, "unknown again, so it goes to all nodes that are left");
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
