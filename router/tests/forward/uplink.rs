//! What leaves without a tunnel, by an uplink: to which next hop, and what becomes of it while none is known.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;

use etherparse::PacketBuilder;
use weft_encap::mac::Mac;
use weft_router::DropReason;
use weft_router::pace::Limits;
use weft_router::path::Macs;
use weft_router::port::PortId;
use weft_router::tables::{Dhcp, GroupId, Mode, NextHop, NextHops, Pod, Via};

use crate::bed::*;

const HOST: u16 = 9;
const HOST_MAC: Mac = Mac([2, 0xcc, 0, 0, 0, 9]);
const UPLINKS: [u16; 2] = [10, 11];
const FAR: Ipv4Addr = Ipv4Addr::new(10, 244, 7, 9);

fn next_hop(port: u16) -> NextHop {
    let macs = Macs { dst: Mac([2, 0xdd, 0, 0, 0, port as u8]), src: Mac([2, 0xde, 0, 0, 0, port as u8]) };
    NextHop { port: PortId(port), macs, mtu: 1500, weight: 1 }
}

/// Two pods, and a route to 10.244.7.0/24 and fd00:10:244:7::/64 by both uplinks.
fn bed() -> Bed {
    let mut bed = Bed::new(Mode::Routed, 2);
    UPLINKS.into_iter().for_each(|port| bed.tables.add_uplink(PortId(port)));
    lead(&mut bed, &UPLINKS);
    for range in ["10.244.7.0/24", "fd00:10:244:7::/64"] {
        bed.tables.add_route(range.parse().unwrap(), Via::Uplink(GroupId(0)));
    }
    bed
}

/// New tables, in which these are the next hops.
fn lead(bed: &mut Bed, ports: &[u16]) {
    bed.tables.epoch += 1;
    bed.tables.next_hops = Arc::new(vec![NextHops::new(ports.iter().map(|port| next_hop(*port)))]);
}

fn add_host(bed: &mut Bed) {
    let (ipv4, ipv6) = (vec![Ipv4Addr::new(10, 244, 1, 254)], Vec::new());
    let interface = Pod { mac: HOST_MAC, ipv4, ipv6, mtu: 1450, limits: Limits::default(), dhcp: Dhcp::default() };
    bed.tables.add_host(PortId(HOST), interface);
}

fn flow(port: u16) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(pod_mac(1).0, GATEWAY.0).ipv4(pod_v4(1).octets(), FAR.octets(), 64);
    let mut bytes = Vec::new();
    builder.udp(port, 53).write(&mut bytes, &[1; 20]).unwrap();
    bytes
}

/// By which uplinks the frames of this flow leave.
fn ways(bed: &mut Bed, port: u16) -> BTreeSet<u16> {
    let frames: Vec<_> = (0..3).flat_map(|_| bed.pod_sends(1, &flow(port))).collect();
    assert_eq!(frames.len(), 3);
    frames.into_iter().map(|(by, _)| by).collect()
}

#[test]
fn it_goes_to_the_next_hops_mac_with_one_ttl_less() {
    let mut bed = bed();
    lead(&mut bed, &UPLINKS[..1]);
    let sent = bed.pod_sends(1, &udp4(pod_mac(1), GATEWAY, pod_v4(1), FAR, 64, 20));
    let next = next_hop(UPLINKS[0]).macs;
    assert_eq!(sent, [(UPLINKS[0], udp4(next.src, next.dst, pod_v4(1), FAR, 63, 20))]);
    let far = "fd00:10:244:7::9".parse().unwrap();
    let sent = bed.pod_sends(1, &udp6(pod_mac(1), GATEWAY, pod_v6(1), far, 64, 20));
    assert_eq!(sent, [(UPLINKS[0], udp6(next.src, next.dst, pod_v6(1), far, 63, 20))]);
    bed.assert_conserved();
}

#[test]
fn a_flow_stays_on_one_next_hop_and_many_use_all() {
    let mut bed = bed();
    let all: Vec<u16> = (0..64)
        .map(|number| {
            let ways = ways(&mut bed, 1000 + number);
            assert_eq!(ways.len(), 1);
            ways.into_iter().next().unwrap()
        })
        .collect();
    let first = all.iter().filter(|by| **by == UPLINKS[0]).count();
    assert!((20..=44).contains(&first), "{first} of 64 by the first");
    // The flow cache and the whole way agree, whatever the epoch.
    lead(&mut bed, &UPLINKS);
    for (number, by) in (0..64).zip(&all) {
        assert_eq!(ways(&mut bed, 1000 + number), [*by].into());
    }
    bed.assert_conserved();
}

#[test]
fn flows_of_a_next_hop_that_is_gone_move_at_once_and_others_stay() {
    let mut bed = bed();
    let before: Vec<_> = (0..32).map(|number| ways(&mut bed, 1000 + number)).collect();
    lead(&mut bed, &UPLINKS[1..]);
    (0..32).for_each(|number| assert_eq!(ways(&mut bed, 1000 + number), [UPLINKS[1]].into()));
    lead(&mut bed, &UPLINKS);
    let after: Vec<_> = (0..32).map(|number| ways(&mut bed, 1000 + number)).collect();
    assert_eq!(after, before);
}

#[test]
fn while_no_next_hop_is_known_the_nodes_kernel_routes() {
    let mut bed = bed();
    lead(&mut bed, &[]);
    assert!(bed.pod_sends(1, &flow(1)).is_empty());
    bed.assert_only(1, DropReason::NoNextHop, 1);
    add_host(&mut bed);
    bed.tables.epoch += 1;
    let sent = bed.pod_sends(1, &flow(1));
    assert_eq!(sent.len(), 1);
    assert_eq!((sent[0].0, &sent[0].1[..6]), (HOST, &HOST_MAC.0[..]));
    // What the kernel brings it cannot have back.
    let from_host = udp4(HOST_MAC, GATEWAY, Ipv4Addr::new(192, 0, 2, 1), FAR, 64, 20);
    assert!(bed.pod_sends(HOST, &from_host).is_empty());
    assert_eq!(bed.dropped(HOST, DropReason::NoNextHop), 1);
    lead(&mut bed, &UPLINKS[..1]);
    assert_eq!(ways(&mut bed, 1), [UPLINKS[0]].into());
}

#[test]
fn other_nodes_are_not_led_through_here() {
    let mut bed = bed();
    let inner = udp4(PEER_VTEP, VTEP, REMOTE, FAR, 64, 20);
    assert!(bed.node_sends(PEER, 1, &inner).is_empty());
    bed.assert_only(0, DropReason::NotForUs, 1);
}

#[test]
fn nothing_enters_by_an_uplink() {
    let mut bed = bed();
    assert!(bed.pod_sends(UPLINKS[0], &flow(1)).is_empty());
    bed.assert_only(UPLINKS[0], DropReason::PortClosed, 1);
}

#[test]
fn what_is_longer_than_the_uplink_takes_is_refused_with_an_error() {
    let mut bed = bed();
    lead(&mut bed, &UPLINKS[..1]);
    let sent = bed.pod_sends(1, &udp4(pod_mac(1), GATEWAY, pod_v4(1), FAR, 64, 1473));
    assert_eq!(sent.len(), 1);
    let (port, error) = &sent[0];
    assert_eq!((*port, &error[34..36], &error[40..42]), (1, &[3, 4][..], &1500_u16.to_be_bytes()[..]));
    assert_sound(error);
}

#[test]
fn replies_to_what_came_plainly_from_a_peer_leave_by_the_uplink() {
    let mut bed = bed();
    add_host(&mut bed);
    // As the node's kernel forwards it.
    let brought = udp4(HOST_MAC, GATEWAY, FAR, pod_v4(1), 60, 20);
    assert_eq!(bed.pod_sends(HOST, &brought).len(), 1);
    let builder = PacketBuilder::ethernet2(pod_mac(1).0, GATEWAY.0).ipv4(pod_v4(1).octets(), FAR.octets(), 64);
    let mut reply = Vec::new();
    builder.udp(2222, 1111).write(&mut reply, &[1; 20]).unwrap();
    let sent = bed.pod_sends(1, &reply);
    assert_eq!(sent.len(), 1);
    assert!(UPLINKS.contains(&sent[0].0), "{}", sent[0].0);
}
