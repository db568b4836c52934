//! Another parser's opinion: what the router reads in a frame is what `etherparse` reads in it.

use std::net::IpAddr;

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use weft_router::PortId;
use weft_router::frame::Frame;
use weft_router::packet::{Ip, Network, Packet};
use weft_router::path::Sender;
use weft_router::pool::Pool;
use weft_tests::frames::{self, L2, L3};
use weft_tests::hostile::{Hostile, seeds};
use weft_tests::memory::{GATEWAY, pod_mac, pod4, pod6};
use weft_tests::random::Random;

fn read(bytes: &[u8], pool: &Pool) -> Option<(Packet, Vec<u8>)> {
    let mut frame = Frame::from_bytes(bytes, PortId(1), pool)?;
    let packet = Packet::parse(&mut frame, Sender::Port(PortId(1))).ok()?;
    Some((packet, frame.to_vec()))
}

/// Source, destination, protocol, whether it is a fragment, ports.
type Opinion = (IpAddr, IpAddr, u8, bool, Option<(u16, u16)>);

/// `None` if `etherparse` cannot read the frame.
fn second_opinion(bytes: &[u8]) -> Option<Opinion> {
    let packet = SlicedPacket::from_ethernet(bytes).ok()?;
    let (src, dst, protocol, fragmented) = match packet.net.as_ref()? {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            (
                header.source_addr().into(),
                header.destination_addr().into(),
                header.protocol().0,
                ip.is_payload_fragmented(),
            )
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header();
            let payload = ip.payload();
            (
                header.source_addr().into(),
                header.destination_addr().into(),
                payload.ip_number.0,
                ip.is_payload_fragmented(),
            )
        }
        NetSlice::Arp(_) => return None,
    };
    let ports = match packet.transport {
        Some(TransportSlice::Udp(udp)) => Some((udp.source_port(), udp.destination_port())),
        Some(TransportSlice::Tcp(tcp)) => Some((tcp.source_port(), tcp.destination_port())),
        _ => None,
    };
    Some((src, dst, protocol, fragmented, ports))
}

#[track_caller]
fn agree(ip: &Ip, frame: &[u8]) {
    let Some((src, dst, protocol, fragmented, ports)) = second_opinion(frame) else {
        // It reads authentication headers and the like more strictly; then there is no second opinion.
        return;
    };
    assert_eq!((ip.src, ip.dst, ip.fragment.is_some()), (src, dst, fragmented), "{frame:02x?}");
    if ports.is_some() && ip.ports.is_some() {
        assert_eq!((ip.protocol, ip.ports), (protocol, ports), "{frame:02x?}");
    }
}

#[test]
fn what_was_accepted_is_read_alike_by_another_parser() {
    let pool = Pool::new(8, 2).unwrap();
    let mut hostile = Hostile::new(0x5eed_0005);
    let mut compared = 0;
    for _ in 0..300_000 {
        let input = hostile.frame();
        let bytes = if input.outer.is_some() { input.bytes.get(8..).unwrap_or_default() } else { &input.bytes };
        let Some((packet, accepted)) = read(bytes, &pool) else { continue };
        if let Network::Ip(ip) = packet.network {
            agree(&ip, &accepted);
            compared += usize::from(second_opinion(&accepted).is_some());
        }
    }
    assert!(compared > 50_000, "only {compared} frames were compared");
}

#[test]
fn every_frame_that_another_library_builds_is_accepted_and_read_as_it_was_built() {
    let pool = Pool::new(8, 2).unwrap();
    let mut random = Random::new(0x5eed_0006);
    let l2 = L2 { src: pod_mac(1), dst: GATEWAY };
    for _ in 0..20_000 {
        let l3 = if random.once_in(2) { L3::new(pod4(1), pod4(2)) } else { L3::new(pod6(1), pod6(2)) };
        let l3 = l3.ttl(random.byte());
        let ports = (random.number() as u16, random.number() as u16);
        let len = random.below(3000);
        let payload = random.bytes(len);
        let (frame, with_ports) = match random.below(3) {
            0 => (frames::udp(l2, l3, ports, &payload), true),
            1 => (frames::tcp(l2, l3, ports, random.number() as u32, &payload), true),
            _ => (frames::ping(l2, l3, ports.0, ports.1, &payload), false),
        };
        let (packet, accepted) = read(&frame, &pool).expect("it is well-formed");
        assert_eq!(accepted, frame);
        let ip = packet.ip().expect("it is IP");
        assert_eq!((ip.src, ip.dst, ip.ttl, ip.ports), (l3.src, l3.dst, l3.ttl, with_ports.then_some(ports)));
        assert_eq!(ip.size as usize, frame.len() - 14);
        agree(ip, &frame);
    }
}

#[test]
fn well_formed_frames_of_every_kind_are_accepted() {
    let pool = Pool::new(8, 2).unwrap();
    for seed in seeds() {
        let bytes = if seed.outer.is_some() { &seed.bytes[8..] } else { &seed.bytes[..] };
        assert!(read(bytes, &pool).is_some(), "{seed:?}");
    }
}
