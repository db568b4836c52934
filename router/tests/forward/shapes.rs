//! Superframes, and what is still to be done to a frame.

use std::net::Ipv4Addr;

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use weft_encap::mac::Mac;
use weft_encap::offload::{Gso, GsoKind, Offload, Partial};
use weft_router::DropReason;
use weft_router::frame::Frame;
use weft_router::port::PortId;
use weft_router::tables::Mode;

use crate::bed::*;

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
