//! Frames as pods send them.

use std::net::Ipv4Addr;

use etherparse::PacketBuilder;
use weft_encap::checksum;
use weft_encap::ip;
use weft_encap::mac::Mac;
use weft_encap::offload::{Gso, GsoKind, Offload, Partial};
use weft_encap::tcp;

/// Length of Ethernet, IPv4 and TCP header.
pub const TCP_HEADERS: usize = 14 + 20 + 20;
/// Payload of a TCP segment inside a tunnel over an Ethernet of 1500 bytes.
pub const MSS: u16 = 1450 - 40;

/// Where a frame comes from and goes to.
#[derive(Copy, Clone, Debug)]
pub struct Ends {
    /// Source MAC.
    pub src_mac: Mac,
    /// Destination MAC.
    pub dst_mac: Mac,
    /// Source address.
    pub src: Ipv4Addr,
    /// Destination address.
    pub dst: Ipv4Addr,
}

/// A UDP datagram in a frame of `len` bytes in all (without the frame check sequence, which no port sees).
pub fn udp(ends: Ends, src_port: u16, len: usize) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(ends.src_mac.0, ends.dst_mac.0)
        .ipv4(ends.src.octets(), ends.dst.octets(), 64)
        .udp(src_port, 53);
    let payload = vec![0x5a; len - 14 - 20 - 8];
    let mut bytes = Vec::with_capacity(len);
    builder.write(&mut bytes, &payload).expect("a vector takes it");
    bytes
}

/// A TCP segment with `payload` bytes and a complete checksum.
pub fn segment(ends: Ends, seq: u32, payload: usize) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(ends.src_mac.0, ends.dst_mac.0)
        .ipv4(ends.src.octets(), ends.dst.octets(), 64)
        .tcp(40_000, 80, seq, 512)
        .ack(1);
    let mut bytes = Vec::with_capacity(TCP_HEADERS + payload);
    builder.write(&mut bytes, &vec![0x5a; payload]).expect("a vector takes it");
    bytes
}

/// A TCP superframe of `count` segments, its checksum partial, and what virtio's header would say about it.
pub fn superframe(ends: Ends, count: usize) -> (Vec<u8>, Offload) {
    let payload = count * usize::from(MSS);
    let mut bytes = segment(ends, 1, payload);
    let (start, offset) = (14 + 20, tcp::CHECKSUM_OFFSET);
    let sum = checksum::pseudo_v4(ends.src, ends.dst, ip::TCP, (20 + payload) as u32).fold();
    bytes[start + offset..start + offset + 2].copy_from_slice(&sum.to_be_bytes());
    let partial = Partial { start: start as u16, offset: offset as u16 };
    let gso = Gso { kind: GsoKind::Tcp4, ecn: false, size: MSS, header_len: TCP_HEADERS as u16 };
    (bytes, Offload { partial: Some(partial), gso: Some(gso), verified: false })
}
