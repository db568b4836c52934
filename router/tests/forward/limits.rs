//! What is limited per port.

use std::net::Ipv4Addr;

use etherparse::PacketBuilder;
use weft_encap::eth::EthHeader;
use weft_encap::mac::Mac;
use weft_encap::zerocopy::IntoBytes;
use weft_router::tables::Mode;
use weft_router::{DropReason, RouterConfig};

use crate::bed::*;

#[test]
fn icmp_errors_are_limited_per_port() {
    let mut bed = Bed::new(Mode::Routed, 1);
    let sent = udp4(pod_mac(1), GATEWAY, pod_v4(1), "192.0.2.1".parse().unwrap(), 64, 1);
    let errors: usize = (0..1000).map(|_| bed.pod_sends(1, &sent).len()).sum();
    assert_eq!(errors, RouterConfig::default().icmp_rate as usize);
    bed.assert_only(1, DropReason::NoRoute, 1000);
}

#[test]
fn a_flow_is_told_once_a_second_how_long_its_packets_may_be_and_none_that_is_longer_passes() {
    let mut bed = Bed::new(Mode::Routed, 2);
    let long = |number: u8| udp4(pod_mac(1), GATEWAY, pod_v4(1), pod_v4(number), 64, 1500);
    let mut told = 0;
    for step in 0..3000 {
        bed.now = bed.now + std::time::Duration::from_millis(1);
        let sent = bed.pod_sends(1, &long(2));
        assert!(sent.iter().all(|(port, bytes)| *port == 1 && bytes[34..36] == [3, 4] && bytes.len() <= 14 + 576));
        told += sent.len();
        // Another flow is told for itself.
        assert_eq!(
            bed.pod_sends(1, &udp6(pod_mac(1), GATEWAY, pod_v6(1), pod_v6(2), 64, 1500)).len(),
            usize::from(step % 1000 == 0)
        );
    }
    assert_eq!(told, 3);
    // What is new is told at once: the way has become narrower still.
    let sent = |bed: &mut Bed| bed.node_sends(PEER, 1, &udp4(PEER_VTEP, VTEP, REMOTE, pod_v4(2), 64, 1500)).len();
    assert_eq!((sent(&mut bed), sent(&mut bed)), (1, 0));
    bed.tables.epoch += 1;
    let mut narrow = bed.tables.clone();
    narrow.remove_pod(weft_router::port::PortId(2));
    let pod = weft_router::tables::Pod {
        mac: pod_mac(2),
        ipv4: vec![pod_v4(2)],
        ipv6: vec![],
        mtu: 1300,
        limits: weft_router::pace::Limits::default(),
        dhcp: weft_router::tables::Dhcp::default(),
    };
    narrow.add_pod(weft_router::port::PortId(2), pod);
    bed.tables = narrow;
    assert_eq!((sent(&mut bed), sent(&mut bed)), (1, 0));
    bed.assert_only(1, DropReason::MtuExceeded, 6000);
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
