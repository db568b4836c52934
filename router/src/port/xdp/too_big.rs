//! "Too big", said by a router between two nodes about a packet of ours.
//!
//! Anybody can send such a message, so it is believed only if it quotes a packet that was ours: from our address, to the tunnel's
//! port, longer than what it says is possible, and with a number that follows from a secret and the packet's flow ([`cookie`]): the
//! identification of IPv4, which means nothing where nothing is fragmented (RFC 6864 section 4.1), and the flow label of IPv6. No
//! path is shorter than its protocol allows (RFC 791, RFC 8200 section 5), whatever is said.

use std::hash::BuildHasher;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use foldhash::quality::FixedState;
use socket2::{Domain, Protocol, SockFilter, Socket, Type};
use weft_encap::checksum;
use weft_encap::ip::UDP;
use weft_encap::ipv4::{IPV4_LEN, Ipv4Header};
use weft_encap::ipv6::Ipv6Header;
use weft_encap::udp::UdpHeader;
use zerocopy::FromBytes;

use super::programs::Tunnel;

/// Every host can be sent packets of this length.
const LEAST_V4: u32 = 576;
/// So can every one by IPv6.
const LEAST_V6: u32 = 1280;
/// The bits of a flow label.
pub const FLOW_LABEL: u32 = 0x000f_ffff;

/// How long packets to a node may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooBig {
    /// The node.
    pub node: IpAddr,
    /// In bytes, the IP header included.
    pub mtu: u32,
}

/// What packets from a source port to a node are known by: nobody else can tell it.
#[inline]
pub fn cookie(tunnel: &Tunnel, node: IpAddr, source_port: u16) -> u32 {
    let hasher = FixedState::with_seed(tunnel.secret);
    let hash = match node {
        IpAddr::V4(node) => hasher.hash_one(u64::from(u32::from(node)) << 16 | u64::from(source_port)),
        IpAddr::V6(node) => hasher.hash_one((u128::from(node), source_port)),
    };
    (hash >> 32) as u32
}

/// A socket that is given such messages, for [`read_v4`] or [`read_v6`], in the calling thread's network namespace.
///
/// # Errors
/// `EPERM` without CAP_NET_RAW.
pub fn open(v4: bool) -> io::Result<OwnedFd> {
    let (domain, protocol) = if v4 { (Domain::IPV4, Protocol::ICMPV4) } else { (Domain::IPV6, Protocol::ICMPV6) };
    let socket = Socket::new(domain, Type::RAW.nonblocking(), Some(protocol))?;
    if v4 {
        // Other messages, pings for example, need not wake anybody: X = the IP header's length, A = type and code.
        let step = |code: u32, otherwise: u8, value: u32| SockFilter::new(code as u16, 0, otherwise, value);
        socket.attach_filter(&[
            step(libc::BPF_LDX | libc::BPF_B | libc::BPF_MSH, 0, 0),
            step(libc::BPF_LD | libc::BPF_H | libc::BPF_IND, 0, 0),
            step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, 0x0304),
            step(libc::BPF_RET | libc::BPF_K, 0, 0xffff),
            step(libc::BPF_RET | libc::BPF_K, 0, 0),
        ])?;
    }
    Ok(socket.into())
}

/// Reads an ICMP message with the IPv4 header before it; `None` if it is about something else, or not to be believed.
pub fn read_v4(packet: &[u8], tunnel: &Tunnel) -> Option<TooBig> {
    let icmp = packet.get(usize::from(packet.first()? & 0x0f) * 4..)?;
    if icmp.get(..2)? != [3, 4] || checksum::sum(icmp) != 0xffff {
        return None;
    }
    let mtu = u16::from_be_bytes(*icmp.get(6..)?.first_chunk()?).into();
    let (ip, rest) = Ipv4Header::read_from_prefix(icmp.get(8..)?).ok()?;
    let (udp, _) = UdpHeader::read_from_prefix(rest).ok()?;
    let node = IpAddr::from(ip.dst);
    let id = cookie(tunnel, node, udp.src_port.get()) as u16;
    let is_ours = ip.version_ihl == 0x45 && ip.protocol == UDP && ip.id.get() == id;
    let len = u32::from(ip.total_len.get());
    (is_ours && is_of(tunnel, ip.src.into(), &udp) && is_news(mtu, len))
        .then(|| TooBig { node, mtu: mtu.max(LEAST_V4) })
}

/// Reads an ICMPv6 message, likewise. Its checksum is the kernel's to check.
pub fn read_v6(icmp: &[u8], tunnel: &Tunnel) -> Option<TooBig> {
    if icmp.first()? != &2 {
        return None;
    }
    let mtu = u32::from_be_bytes(*icmp.get(4..)?.first_chunk()?);
    let (ip, rest) = Ipv6Header::read_from_prefix(icmp.get(8..)?).ok()?;
    let (udp, _) = UdpHeader::read_from_prefix(rest).ok()?;
    let node = IpAddr::from(ip.dst);
    let label = cookie(tunnel, node, udp.src_port.get()) & FLOW_LABEL;
    let is_ours = ip.version() == 6 && ip.next_header == UDP && ip.version_class_flow.get() & FLOW_LABEL == label;
    let len = 40 + u32::from(ip.payload_len.get());
    (is_ours && is_of(tunnel, ip.src.into(), &udp) && is_news(mtu, len))
        .then(|| TooBig { node, mtu: mtu.max(LEAST_V6) })
}

fn is_of(tunnel: &Tunnel, from: IpAddr, udp: &UdpHeader) -> bool {
    tunnel.addresses.contains(&from) && udp.dst_port.get() == tunnel.port
}

/// A packet that is no longer than what is possible was not refused for that. Zero is what routers say that know no better.
fn is_news(mtu: u32, len: u32) -> bool {
    (IPV4_LEN as u32..len).contains(&mtu)
}

#[cfg(test)]
mod tests {
    use super::super::outer::{self, NextHop};
    use super::*;
    use crate::frame::Outer;
    use weft_encap::mac::Mac;

    const NODES: [[&str; 2]; 2] = [["10.200.0.1", "10.200.0.2"], ["fd00::1", "fd00::2"]];

    fn tunnel() -> Tunnel {
        let addresses = NODES.map(|[here, _]| here.parse().unwrap()).to_vec();
        Tunnel { addresses, port: 8472, vlan: None, secret: 0x1234_5678_9abc_def0 }
    }

    /// The IP packet that a frame to the other node begins with.
    fn sent(family: usize, len: usize) -> Vec<u8> {
        let [here, there] = NODES[family].map(|node| node.parse().unwrap());
        let hop = NextHop { source: Mac([2; 6]), target: Mac([4; 6]), vlan: None, mtu: 9_000 };
        let outer = Outer { entropy: 77, ..Outer::vxlan(there) };
        let (prefix, _) = outer::write(&hop, here, &outer, &tunnel(), len).unwrap();
        prefix[14..].to_vec()
    }

    /// What a router says about it.
    fn told(family: usize, quoted: &[u8], mtu: u32) -> Vec<u8> {
        if family == 1 {
            return [&[2, 0, 0, 0][..], &mtu.to_be_bytes(), quoted].concat();
        }
        let mut icmp = [&[3, 4, 0, 0, 0, 0][..], &(mtu as u16).to_be_bytes(), quoted].concat();
        let sum = !checksum::sum(&icmp);
        icmp[2..4].copy_from_slice(&sum.to_be_bytes());
        let header = Ipv4Header::new([10, 9, 9, 9].into(), [10, 200, 0, 1].into(), 1, 64, icmp.len() as u16);
        [zerocopy::IntoBytes::as_bytes(&header), &icmp].concat()
    }

    fn read(family: usize, message: &[u8]) -> Option<u32> {
        let read = if family == 0 { read_v4(message, &tunnel()) } else { read_v6(message, &tunnel()) };
        read.map(|told| {
            assert_eq!(told.node, NODES[family][1].parse::<IpAddr>().unwrap());
            told.mtu
        })
    }

    #[test]
    fn what_quotes_a_packet_of_ours_is_believed_down_to_what_the_protocol_allows() {
        for (family, least) in [(0, 576), (1, 1280)] {
            let quoted = sent(family, 1_450);
            assert_eq!(read(family, &told(family, &quoted, 1_400)), Some(1_400));
            assert_eq!(read(family, &told(family, &quoted, 100)), Some(least));
            assert_eq!(read(family, &told(family, &quoted, 0)), None);
            assert_eq!(read(family, &told(family, &quoted, 1_600)), None, "the packet is shorter");
        }
    }

    #[test]
    fn a_quoted_packet_that_is_not_ours_changes_nothing() {
        for family in [0, 1] {
            let quoted = sent(family, 1_450);
            // Length, TTL, header checksum and traffic class may change on the way; the UDP checksum is whatever it was.
            let ip = [20, 40][family];
            let free: &[usize] = if family == 0 { &[1, 2, 3, 6, 7, 8, 10, 11] } else { &[0, 1, 4, 5, 7] };
            for at in (0..ip + 4).filter(|at| !free.contains(at)) {
                let mut other = quoted.clone();
                other[at] ^= 0x04;
                assert_eq!(read(family, &told(family, &other, 1_400)), None, "byte {at} of family {family}");
            }
            let message = told(family, &quoted, 1_400);
            let whole = message.len() - 2;
            (0..whole).for_each(|len| assert_eq!(read(family, &message[..len.min(whole - 2)]), None, "{len} bytes"));
            let mut wrong = message;
            wrong[[20, 0][family]] = 11;
            assert_eq!(read(family, &wrong), None);
        }
    }
}
