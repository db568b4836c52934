//! Frames as pods send them.

use std::net::IpAddr;

use etherparse::{IpHeaders, PacketBuilder, PacketBuilderStep};
use weft_encap::checksum;
use weft_encap::ip;
use weft_encap::mac::Mac;
use weft_encap::offload::{Gso, GsoKind, Offload, Partial};
use weft_encap::tcp;

/// Length of Ethernet, IPv4 and TCP header.
pub const TCP_HEADERS: usize = 14 + 20 + 20;
/// Payload of a TCP segment inside a tunnel over an Ethernet of 1500 bytes.
pub const MSS: u16 = 1450 - 40;
/// Bytes of the smallest frame that Ethernet carries, as a port sees it: without the frame check sequence.
pub const SMALL: usize = 60;

/// Where a frame comes from and goes to.
#[derive(Copy, Clone, Debug)]
pub struct Ends {
    /// Source MAC.
    pub src_mac: Mac,
    /// Destination MAC.
    pub dst_mac: Mac,
    /// Source address.
    pub src: IpAddr,
    /// Destination address, of the same family.
    pub dst: IpAddr,
}

impl Ends {
    fn builder(&self) -> PacketBuilderStep<IpHeaders> {
        let eth = PacketBuilder::ethernet2(self.src_mac.0, self.dst_mac.0);
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => eth.ipv4(src.octets(), dst.octets(), 64),
            (IpAddr::V6(src), IpAddr::V6(dst)) => eth.ipv6(src.octets(), dst.octets(), 64),
            (src, dst) => panic!("{src} and {dst} are of two families"),
        }
    }

    fn ip_len(&self) -> usize {
        if self.src.is_ipv4() { 20 } else { 40 }
    }
}

/// A UDP datagram in the smallest frame that holds it: [`SMALL`] bytes, of IPv6 two more and no payload.
pub fn udp(ends: Ends, src_port: u16) -> Vec<u8> {
    let payload = SMALL.saturating_sub(14 + ends.ip_len() + 8);
    let mut bytes = Vec::with_capacity(SMALL + 2);
    ends.builder().udp(src_port, 53).write(&mut bytes, &vec![0x5a; payload]).expect("a vector takes it");
    bytes
}

/// A TCP segment with `payload` bytes and a complete checksum.
pub fn segment(ends: Ends, src_port: u16, seq: u32, payload: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(TCP_HEADERS + payload);
    let builder = ends.builder().tcp(src_port, 80, seq, 512).ack(1);
    builder.write(&mut bytes, &vec![0x5a; payload]).expect("a vector takes it");
    bytes
}

/// A TCP superframe of `count` segments over IPv4, its checksum partial, and what virtio's header would say about it.
pub fn superframe(ends: Ends, src_port: u16, count: usize) -> (Vec<u8>, Offload) {
    let (IpAddr::V4(src), IpAddr::V4(dst)) = (ends.src, ends.dst) else { panic!("{} is no IPv4 address", ends.src) };
    let payload = count * usize::from(MSS);
    let mut bytes = segment(ends, src_port, 1, payload);
    let (start, offset) = (14 + 20, tcp::CHECKSUM_OFFSET);
    let sum = checksum::pseudo_v4(src, dst, ip::TCP, (20 + payload) as u32).fold();
    bytes[start + offset..start + offset + 2].copy_from_slice(&sum.to_be_bytes());
    let partial = Partial { start: start as u16, offset: offset as u16 };
    let gso = Gso { kind: GsoKind::Tcp4, ecn: false, size: MSS, header_len: TCP_HEADERS as u16 };
    (bytes, Offload { partial: Some(partial), gso: Some(gso), verified: false })
}
