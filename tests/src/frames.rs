//! Frames made by other hands than the router's.
//!
//! What `etherparse` can build is built by it; ARP, neighbour discovery and odd things are put together byte by byte, with a checksum
//! of this module's own. Nothing here uses the headers of `weft-encap`, so that a mistake there does not cancel itself out.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::{IpFragOffset, IpHeaders, IpNumber, Ipv4Header, Ipv6FlowLabel, Ipv6Header, PacketBuilder};
use weft_encap::mac::Mac;

/// The Ethernet addresses of a frame.
#[derive(Copy, Clone, Debug)]
pub struct L2 {
    /// Source.
    pub src: Mac,
    /// Destination.
    pub dst: Mac,
}

/// Source and destination of a packet.
#[derive(Copy, Clone, Debug)]
pub struct L3 {
    /// Source.
    pub src: IpAddr,
    /// Destination.
    pub dst: IpAddr,
    /// TTL or hop limit.
    pub ttl: u8,
}

impl L3 {
    /// With a TTL of 64.
    pub fn new(src: impl Into<IpAddr>, dst: impl Into<IpAddr>) -> L3 {
        L3 { src: src.into(), dst: dst.into(), ttl: 64 }
    }

    /// With another TTL.
    pub fn ttl(self, ttl: u8) -> L3 {
        L3 { ttl, ..self }
    }

    fn headers(self) -> IpHeaders {
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let header = Ipv4Header::new(0, self.ttl, IpNumber::UDP, src.octets(), dst.octets());
                IpHeaders::Ipv4(header.expect("an empty payload fits"), Default::default())
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let (source, destination) = (src.octets(), dst.octets());
                let header = Ipv6Header {
                    hop_limit: self.ttl,
                    source,
                    destination,
                    flow_label: Ipv6FlowLabel::ZERO,
                    ..Ipv6Header::default()
                };
                IpHeaders::Ipv6(header, Default::default())
            }
            _ => panic!("both addresses are of one family: {self:?}"),
        }
    }
}

/// A UDP datagram.
pub fn udp(l2: L2, l3: L3, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(l2.src.0, l2.dst.0).ip(l3.headers()).udp(ports.0, ports.1);
    let mut frame = Vec::new();
    builder.write(&mut frame, payload).expect("it fits");
    frame
}

/// A TCP segment with ACK set.
pub fn tcp(l2: L2, l3: L3, ports: (u16, u16), seq: u32, payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(l2.src.0, l2.dst.0).ip(l3.headers()).tcp(ports.0, ports.1, seq, 4096).ack(7);
    let mut frame = Vec::new();
    builder.write(&mut frame, payload).expect("it fits");
    frame
}

/// A ping, ICMP or ICMPv6 by the family of its addresses.
pub fn ping(l2: L2, l3: L3, id: u16, seq: u16, payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(l2.src.0, l2.dst.0).ip(l3.headers());
    let mut frame = Vec::new();
    match l3.src {
        IpAddr::V4(_) => builder.icmpv4_echo_request(id, seq).write(&mut frame, payload),
        IpAddr::V6(_) => builder.icmpv6_echo_request(id, seq).write(&mut frame, payload),
    }
    .expect("it fits");
    frame
}

/// An IPv4 fragment of UDP with any offset (in units of 8 bytes) and identification.
pub fn fragment(l2: L2, src: Ipv4Addr, dst: Ipv4Addr, id: u16, offset: u16, more: bool, payload: &[u8]) -> Vec<u8> {
    let mut header =
        Ipv4Header::new(payload.len() as u16, 64, IpNumber::UDP, src.octets(), dst.octets()).expect("it fits");
    header.dont_fragment = false;
    header.more_fragments = more;
    header.identification = id;
    header.fragment_offset = IpFragOffset::try_new(offset).expect("13 bits");
    header.header_checksum = header.calc_header_checksum();
    let mut frame = ethernet(l2, 0x0800, &[]);
    header.write_raw(&mut frame).expect("a vector takes it");
    frame.extend_from_slice(payload);
    frame
}

/// Any Ethernet frame.
pub fn ethernet(l2: L2, ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [&l2.dst.0[..], &l2.src.0, &ethertype.to_be_bytes(), payload].concat()
}

/// The contents of an ARP message.
#[derive(Copy, Clone, Debug)]
pub struct ArpFields {
    /// 1 is a request, 2 a reply.
    pub op: u16,
    /// Sender's MAC.
    pub sha: Mac,
    /// Sender's address.
    pub spa: Ipv4Addr,
    /// Target's MAC.
    pub tha: Mac,
    /// Target's address.
    pub tpa: Ipv4Addr,
}

/// An ARP message.
pub fn arp(l2: L2, fields: ArpFields) -> Vec<u8> {
    let ArpFields { op, sha, spa, tha, tpa } = fields;
    let head = [0, 1, 8, 0, 6, 4];
    let body = [&head[..], &op.to_be_bytes(), &sha.0, &spa.octets(), &tha.0, &tpa.octets()].concat();
    ethernet(l2, 0x0806, &body)
}

/// Who has `target`? Tell the sender; by broadcast.
pub fn arp_request(sender: Mac, spa: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let l2 = L2 { src: sender, dst: Mac::BROADCAST };
    arp(l2, ArpFields { op: 1, sha: sender, spa, tha: Mac::ZERO, tpa: target })
}

/// An ICMPv6 message with its checksum filled in; `body` begins with type, code and two bytes for the checksum.
pub fn icmp6(l2: L2, src: Ipv6Addr, dst: Ipv6Addr, hop_limit: u8, body: &[u8]) -> Vec<u8> {
    let mut body = body.to_vec();
    let len = (body.len() as u32).to_be_bytes();
    let pseudo = [&src.octets()[..], &dst.octets(), &len, &[0, 0, 0, 58]].concat();
    body[2..4].fill(0);
    let sum = internet_checksum(&[&pseudo[..], &body].concat());
    body[2..4].copy_from_slice(&sum.to_be_bytes());
    let [.., high, low] = len;
    let head = [0x60, 0, 0, 0, high, low, 58, hop_limit];
    ethernet(l2, 0x86dd, &[&head[..], &src.octets(), &dst.octets(), &body].concat())
}

/// A neighbour solicitation to `dst`, with a source link-layer option if `option` is given.
pub fn solicitation(l2: L2, src: Ipv6Addr, dst: Ipv6Addr, target: Ipv6Addr, option: Option<Mac>) -> Vec<u8> {
    icmp6(l2, src, dst, 255, &discovery(135, 0, target, option.map(|mac| (1, mac))))
}

/// A neighbour advertisement to `dst`, with a target link-layer option.
pub fn advertisement(l2: L2, src: Ipv6Addr, dst: Ipv6Addr, target: Ipv6Addr, mac: Mac) -> Vec<u8> {
    icmp6(l2, src, dst, 255, &discovery(136, 0x60, target, Some((2, mac))))
}

fn discovery(kind: u8, flags: u8, target: Ipv6Addr, option: Option<(u8, Mac)>) -> Vec<u8> {
    let mut body = vec![kind, 0, 0, 0, flags, 0, 0, 0];
    body.extend_from_slice(&target.octets());
    if let Some((kind, mac)) = option {
        body.extend_from_slice(&[kind, 1]);
        body.extend_from_slice(&mac.0);
    }
    body
}

/// Who has `target`? By multicast to its solicited-node group, from the sender's own address.
pub fn solicit(sender: Mac, src: Ipv6Addr, target: Ipv6Addr) -> Vec<u8> {
    let group = solicited_node(target);
    let option = (!src.is_unspecified()).then_some(sender);
    solicitation(L2 { src: sender, dst: group_mac(group) }, src, group, target, option)
}

/// RFC 4291, section 2.7.1.
pub fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b] = address.segments();
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | (a & 0xff), b)
}

/// RFC 2464, section 7.
pub fn group_mac(group: Ipv6Addr) -> Mac {
    let [.., a, b, c, d] = group.octets();
    Mac([0x33, 0x33, a, b, c, d])
}

/// A VXLAN header.
pub fn vxlan(vni: u32) -> [u8; 8] {
    let [_, a, b, c] = vni.to_be_bytes();
    [8, 0, 0, 0, a, b, c, 0]
}

/// RFC 1071.
pub fn internet_checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Puts the right IPv4 header checksum into a frame whose header may be damaged otherwise; does nothing if that is not there.
pub fn fix_ipv4_checksum(frame: &mut [u8]) {
    let Some(header) = frame.get_mut(14..) else { return };
    let len = header.first().map_or(0, |first| usize::from(first & 15) * 4);
    if len < 20 || header.len() < len {
        return;
    }
    header[10..12].fill(0);
    let sum = internet_checksum(&header[..len]);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
}
