//! What tells packets apart: the five-tuple, and all that a path may depend on.
//!
//! [`FlowKey`] is a five-tuple in one direction; [`FlowKey::of`] and [`FlowKey::reversed`] make it of packets. IPv4 addresses are kept in
//! their IPv4-mapped form (RFC 4291, section 2.5.5.2), so that one type serves both families. A fragment has no ports, not
//! even the first: all fragments of a datagram must take the same path, and most do not carry them.
//!
//! A [`Signature`] is a five-tuple and, beside it, who sent the packet and the two MACs. Two whole packets with the same signature go
//! the same way under the same tables, which is what the flow cache rests on: a check that looks at anything else must
//! be made for each packet.

use std::net::{IpAddr, Ipv6Addr};

use weft_encap::eth::{ETHERTYPE_IPV4, ETHERTYPE_IPV6};
use weft_encap::mac::Mac;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::packet::{Ip, Packet, Quote};
use crate::path::Sender;
use crate::port::PortId;
use crate::tables::NodeId;

/// A five-tuple in one direction.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct FlowKey {
    src: [u8; 16],
    dst: [u8; 16],
    src_port: u16,
    dst_port: u16,
    protocol: u8,
}

impl FlowKey {
    /// The flow that a packet belongs to.
    pub fn of(ip: &Ip) -> FlowKey {
        let (src_port, dst_port) = ip.ports.unwrap_or((0, 0));
        FlowKey { src: mapped(ip.src), dst: mapped(ip.dst), src_port, dst_port, protocol: ip.protocol }
    }

    /// The conversation that a packet belongs to, where pings are told apart by their identifiers.
    pub fn of_conversation(ip: &Ip) -> FlowKey {
        let ports = ip.ports.or(ip.echo.map(|echo| (echo, echo))).unwrap_or((0, 0));
        FlowKey { src_port: ports.0, dst_port: ports.1, ..FlowKey::of(ip) }
    }

    /// The same, also of a first fragment; none if it names no ports or identifier.
    pub fn of_named(ip: &Ip) -> Option<FlowKey> {
        ip.named.map(|(src_port, dst_port)| FlowKey { src_port, dst_port, ..FlowKey::of(ip) })
    }

    /// That of the packet which an ICMP error is about.
    pub fn of_quote(quote: &Quote) -> FlowKey {
        let (src_port, dst_port) = quote.ports.unwrap_or((0, 0));
        FlowKey { src: mapped(quote.src), dst: mapped(quote.dst), src_port, dst_port, protocol: quote.protocol }
    }

    /// That between two ends, where no packet is at hand.
    pub fn between(protocol: u8, src: (IpAddr, u16), dst: (IpAddr, u16)) -> FlowKey {
        FlowKey { src: mapped(src.0), dst: mapped(dst.0), src_port: src.1, dst_port: dst.1, protocol }
    }

    /// The one that its fragments belong to.
    pub fn of_fragments(&self) -> FlowKey {
        FlowKey { src_port: 0, dst_port: 0, ..*self }
    }

    /// A hash for tables. `seed` keeps outsiders from choosing it.
    pub fn hash(&self, seed: &Seed) -> u64 {
        let word = |bytes: &[u8; 16], at: usize| u64::from_ne_bytes(std::array::from_fn(|byte| bytes[at + byte]));
        let last = u64::from(self.src_port) | u64::from(self.dst_port) << 16 | u64::from(self.protocol) << 32;
        let [s, t, u, v] = seed.0;
        let mut hash =
            fold(word(&self.src, 0) ^ s, word(&self.src, 8) ^ t) ^ fold(word(&self.dst, 0) ^ u, word(&self.dst, 8) ^ v);
        hash = fold(hash.rotate_left(23) ^ s, last ^ hash ^ u);
        hash ^ hash >> 32
    }

    /// The same flow seen from the other side.
    pub fn reversed(&self) -> FlowKey {
        FlowKey { src: self.dst, dst: self.src, src_port: self.dst_port, dst_port: self.src_port, ..*self }
    }

    /// Source address.
    pub fn src(&self) -> IpAddr {
        Ipv6Addr::from(self.src).to_canonical()
    }

    /// Destination address.
    pub fn dst(&self) -> IpAddr {
        Ipv6Addr::from(self.dst).to_canonical()
    }

    /// Source and destination port; zeros if the packets have none.
    pub fn ports(&self) -> (u16, u16) {
        (self.src_port, self.dst_port)
    }

    /// Protocol number.
    pub fn protocol(&self) -> u8 {
        self.protocol
    }
}

/// All that a packet's path depends on, as words to be compared and hashed quickly. They hold the headers' own bytes in
/// the machine's order of a `u64`: two words of Ethernet header (bytes 0 to 7 and 6 to 13), the addresses (IPv4: both in the
/// first word), and ports, sender, protocol.
#[derive(Copy, Clone, Debug, Default, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Signature([u64; 7]);

impl PartialEq for Signature {
    /// Word by word, where a derived one calls a function for each comparison.
    #[inline(always)]
    fn eq(&self, other: &Signature) -> bool {
        let differing = |words: std::ops::Range<usize>| {
            let pairs = self.0[words.clone()].iter().zip(&other.0[words]);
            pairs.fold(0, |differing, (mine, theirs)| differing | (mine ^ theirs))
        };
        // IPv4 has its addresses in the first of the four words for them, and zeros in the others.
        differing(0..3) | differing(6..7) == 0 && differing(3..6) == 0
    }
}

/// Marks in the last byte of a signature. A pod's is never zero, nor a node's, so no packet has the signature of zeros.
const FROM_POD: u8 = 1;
const FROM_NODE: u8 = 2;
const HAS_PORTS: u8 = 4;

impl Signature {
    /// An IPv4 packet's. `eth` is its Ethernet header, `addresses` source and destination, `ports` likewise, all as on the wire.
    #[inline(always)]
    pub fn v4(sender: Sender, eth: &[u8; 14], addresses: [u8; 8], protocol: u8, ports: Option<[u8; 4]>) -> Signature {
        let [first, second] = ethernet(eth);
        let last = Signature::last(sender, protocol, ports);
        Signature([first, second, u64::from_ne_bytes(addresses), 0, 0, 0, last])
    }

    /// An IPv6 packet's; `addresses` are source and destination, in network byte order.
    #[inline(always)]
    pub fn v6(sender: Sender, eth: &[u8; 14], addresses: &[u8; 32], protocol: u8, ports: Option<[u8; 4]>) -> Signature {
        let [first, second] = ethernet(eth);
        let word = |at: usize| u64::from_ne_bytes(std::array::from_fn(|byte| addresses[at + byte]));
        let last = Signature::last(sender, protocol, ports);
        Signature([first, second, word(0), word(8), word(16), word(24), last])
    }

    /// A packet's; `None` if it is not IP.
    pub fn of(packet: &Packet) -> Option<Signature> {
        let ip = packet.ip()?;
        let ports = ip.ports.map(|(src, dst)| {
            let ([a, b], [c, d]) = (src.to_be_bytes(), dst.to_be_bytes());
            [a, b, c, d]
        });
        let mut eth = [0; 14];
        eth[..6].copy_from_slice(&packet.dst.0);
        eth[6..12].copy_from_slice(&packet.src.0);
        eth[12..].copy_from_slice(&if ip.src.is_ipv4() { ETHERTYPE_IPV4 } else { ETHERTYPE_IPV6 }.to_be_bytes());
        match (ip.src, ip.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let mut addresses = [0; 8];
                addresses[..4].copy_from_slice(&src.octets());
                addresses[4..].copy_from_slice(&dst.octets());
                Some(Signature::v4(packet.sender, &eth, addresses, ip.protocol, ports))
            }
            (src, dst) => {
                let mut addresses = [0; 32];
                addresses[..16].copy_from_slice(&mapped(src));
                addresses[16..].copy_from_slice(&mapped(dst));
                Some(Signature::v6(packet.sender, &eth, &addresses, ip.protocol, ports))
            }
        }
    }

    #[inline(always)]
    fn last(sender: Sender, protocol: u8, ports: Option<[u8; 4]>) -> u64 {
        let (id, kind) = match sender {
            Sender::Port(port) => (port.0, FROM_POD),
            Sender::Node(node) => (node.0, FROM_NODE),
        };
        let (ports, kind) = ports.map_or((0, kind), |ports| (u32::from_be_bytes(ports), kind | HAS_PORTS));
        u64::from(ports) | u64::from(id) << 32 | u64::from(protocol) << 48 | u64::from(kind) << 56
    }

    /// A hash for tables and for spreading flows. `seed` keeps outsiders from choosing it.
    #[inline(always)]
    pub fn hash(&self, seed: &Seed) -> u64 {
        let [eth, src_eth, a, b, c, d, last] = self.0;
        let [s, t, u, v] = seed.0;
        let mut hash = fold(a ^ s, last ^ t) ^ fold(eth ^ u, src_eth ^ v).rotate_left(23);
        if (b | c | d) != 0 {
            hash = fold(hash ^ b, s ^ c) ^ fold(d ^ u, hash ^ t);
        }
        // The upper bits are the better ones, and both ends are used.
        hash ^ hash >> 32
    }

    /// Who sent the packets.
    pub fn sender(&self) -> Sender {
        let id = (self.0[6] >> 32) as u16;
        if self.kind() & FROM_NODE == 0 { Sender::Port(PortId(id)) } else { Sender::Node(NodeId(id)) }
    }

    /// Destination and source MAC.
    pub fn macs(&self) -> (Mac, Mac) {
        let (first, second) = (self.0[0].to_ne_bytes(), self.0[1].to_ne_bytes());
        (Mac(std::array::from_fn(|byte| first[byte])), Mac(std::array::from_fn(|byte| second[byte])))
    }

    /// The five-tuple.
    pub fn flow(&self) -> FlowKey {
        let [_, second, addresses @ .., last] = self.0;
        let bytes: [[u8; 8]; 4] = addresses.map(u64::to_ne_bytes);
        let ethertype = u16::from_be_bytes([second.to_ne_bytes()[6], second.to_ne_bytes()[7]]);
        let (src, dst) = if ethertype == ETHERTYPE_IPV4 {
            let [a, b, c, d, e, f, g, h] = bytes[0];
            (mapped(IpAddr::from([a, b, c, d])), mapped(IpAddr::from([e, f, g, h])))
        } else {
            let half = |from: usize| std::array::from_fn(|byte| bytes[from + byte / 8][byte % 8]);
            (half(0), half(2))
        };
        FlowKey { src, dst, src_port: (last >> 16) as u16, dst_port: last as u16, protocol: (last >> 48) as u8 }
    }

    /// The protocol number.
    #[inline(always)]
    pub fn protocol(&self) -> u8 {
        (self.0[6] >> 48) as u8
    }

    fn kind(&self) -> u8 {
        (self.0[6] >> 56) as u8
    }
}

/// What makes a hash unpredictable.
#[derive(Copy, Clone, Debug)]
pub struct Seed([u64; 4]);

impl Seed {
    /// Stretches a random number.
    pub fn new(seed: u64) -> Seed {
        // SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators).
        let mut state = seed;
        Seed(std::array::from_fn(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut word = state;
            word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            word ^ word >> 31
        }))
    }
}

/// Both halves of the product, one upon the other.
#[inline(always)]
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}

#[inline(always)]
fn ethernet(eth: &[u8; 14]) -> [u64; 2] {
    let word = |at: usize| u64::from_ne_bytes(std::array::from_fn(|byte| eth[at + byte]));
    [word(0), word(6)]
}

fn mapped(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}
