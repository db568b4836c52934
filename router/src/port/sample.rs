//! Frames for the tests of ports: as a pod's stack hands them over, and what must come of them.

use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
use std::net::{IpAddr, Ipv4Addr};
use weft_encap::offload::{Gso, GsoKind, Offload, Partial};

use crate::frame::Outer;
use crate::port::memory::Packet;

const MAC_A: [u8; 6] = [2, 0, 0, 0, 0, 1];
const MAC_B: [u8; 6] = [2, 0, 0, 0, 0, 2];
const TTL: u8 = 64;
const TUNNEL: [u8; 8] = [8, 0, 0, 0, 0, 0, 1, 0];

/// A TCP over IPv4 superframe and its payload; not to be cut if `size` is 0.
pub(crate) fn tcp4(len: usize, size: u16) -> (Packet, Vec<u8>) {
    let payload = payload(len);
    let builder = PacketBuilder::ethernet2(MAC_A, MAC_B).ipv4([10, 0, 0, 1], [10, 0, 0, 2], TTL).tcp(1000, 80, 7, 512);
    let mut bytes = Vec::new();
    builder.ack(9).psh().write(&mut bytes, &payload).unwrap();
    (unfinished(bytes, 34, 16, GsoKind::Tcp4, size, 54), payload)
}

/// The same over IPv6.
pub(crate) fn tcp6(len: usize, size: u16) -> (Packet, Vec<u8>) {
    let payload = payload(len);
    let (from, to) = ([0xfd; 16], [0xfc; 16]);
    let builder = PacketBuilder::ethernet2(MAC_A, MAC_B).ipv6(from, to, TTL).tcp(1000, 80, 7, 512);
    let mut bytes = Vec::new();
    builder.ack(9).write(&mut bytes, &payload).unwrap();
    (unfinished(bytes, 54, 16, GsoKind::Tcp6, size, 74), payload)
}

/// A UDP superframe, or a single datagram if `size` is 0.
pub(crate) fn udp4(len: usize, size: u16) -> (Packet, Vec<u8>) {
    let payload = payload(len);
    let builder = PacketBuilder::ethernet2(MAC_A, MAC_B).ipv4([10, 0, 0, 1], [10, 0, 0, 2], TTL).udp(1000, 53);
    let mut bytes = Vec::new();
    builder.write(&mut bytes, &payload).unwrap();
    (unfinished(bytes, 34, 6, GsoKind::Udp, size, 42), payload)
}

/// A frame with a VXLAN header in front of it.
pub(crate) fn tunnelled(inner: &Packet) -> Packet {
    let bytes = [&TUNNEL[..], &inner.bytes].concat();
    let outer = Outer { entropy: 5, ..Outer::vxlan(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2))) };
    Packet { bytes, offload: inner.offload, outer: Some(outer) }
}

/// The payload of a frame whose headers and checksums are right to the last bit.
pub(crate) fn verified_payload(bytes: &[u8]) -> Vec<u8> {
    let packet = SlicedPacket::from_ethernet(bytes).unwrap();
    let net = packet.net.as_ref().unwrap();
    let (expected, found, payload) = match (net, packet.transport.as_ref().unwrap()) {
        (etherparse::NetSlice::Ipv4(ip), TransportSlice::Tcp(tcp)) => {
            assert_eq!(ip.header().to_header().calc_header_checksum(), ip.header().header_checksum());
            let header = ip.header().to_header();
            (tcp.to_header().calc_checksum_ipv4(&header, tcp.payload()).unwrap(), tcp.checksum(), tcp.payload())
        }
        (etherparse::NetSlice::Ipv4(ip), TransportSlice::Udp(udp)) => {
            assert_eq!(ip.header().to_header().calc_header_checksum(), ip.header().header_checksum());
            let header = ip.header().to_header();
            assert_eq!(usize::from(udp.length()), 8 + udp.payload().len());
            (udp.to_header().calc_checksum_ipv4(&header, udp.payload()).unwrap(), udp.checksum(), udp.payload())
        }
        (etherparse::NetSlice::Ipv6(ip), TransportSlice::Tcp(tcp)) => {
            let header = ip.header().to_header();
            (tcp.to_header().calc_checksum_ipv6(&header, tcp.payload()).unwrap(), tcp.checksum(), tcp.payload())
        }
        other => panic!("no sample looks like {other:?}"),
    };
    assert_eq!(found, expected);
    payload.to_vec()
}

/// Bytes without a period that a stride could fit.
pub(crate) fn payload(len: usize) -> Vec<u8> {
    (0..len as u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// Replaces the checksum by the pseudo-header's sum.
fn unfinished(mut bytes: Vec<u8>, start: u16, offset: u16, kind: GsoKind, size: u16, header_len: u16) -> Packet {
    let field = usize::from(start + offset);
    let found = u16::from_be_bytes([bytes[field], bytes[field + 1]]);
    bytes[field..field + 2].fill(0);
    // What the checksum sums beside the pseudo-header is taken out of it again.
    let mut rest = weft_encap::checksum::Sum::new();
    rest.add(&bytes[usize::from(start)..]);
    let mut pseudo = weft_encap::checksum::Sum::new();
    pseudo.add_word(!found).add_word(!rest.fold());
    bytes[field..field + 2].copy_from_slice(&pseudo.fold().to_be_bytes());
    let gso = (size > 0).then_some(Gso { kind, ecn: false, size, header_len });
    Packet { bytes, offload: Offload { partial: Some(Partial { start, offset }), gso, verified: false }, outer: None }
}
