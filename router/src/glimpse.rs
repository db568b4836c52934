//! A quick look at a frame: enough to recognise a flow that is known.
//!
//! Almost every frame is a plain TCP or UDP packet of a flow that was decided before. [`glimpse`] reads its headers once, in
//! place, and makes the same checks of the single packet that [`Packet::parse`](crate::packet::Packet::parse) makes: lengths, the IPv4
//! checksum, offload metadata. What it cannot read at a glance (options, extension headers, fragments, other
//! protocols) and whatever is wrong it leaves to the thorough way, which also finds the name for it: `None` is never the
//! end of a frame.

use weft_encap::eth::{ETH_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6};
use weft_encap::ip;
use weft_encap::ipv4::IPV4_LEN;
use weft_encap::ipv6::IPV6_LEN;
use weft_encap::offload::{GsoKind, Offload};
use weft_encap::tcp::{self, TCP_LEN};
use weft_encap::udp::{self, UDP_LEN};

use crate::flow::Signature;
use crate::frame::Frame;
use crate::path::Sender;

/// What a glimpse of a frame shows.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Glimpse {
    /// What its path depends on.
    pub signature: Signature,
    /// Where its Ethernet header is: behind the tunnel header, if it came by one.
    pub start: u16,
    /// Bytes from the Ethernet header to the end of the IP packet; what follows is padding.
    pub len: u32,
    /// Bytes of the largest L3 packet that goes on a wire for it.
    pub wire_size: u32,
    /// Bytes of all headers, if it is a superframe.
    pub header_len: u16,
    /// TTL or hop limit.
    pub ttl: u8,
    /// It is IPv4, with a header checksum.
    pub v4: bool,
}

/// Looks at the frame whose Ethernet header is at `start`.
#[inline]
pub fn glimpse(frame: &Frame, start: usize, sender: Sender) -> Option<Glimpse> {
    let bytes = frame.head().get(start..)?;
    let eth = bytes.first_chunk::<ETH_LEN>()?;
    let (l4, v4) = match u16::from_be_bytes([eth[12], eth[13]]) {
        ETHERTYPE_IPV4 => (ETH_LEN + IPV4_LEN, true),
        ETHERTYPE_IPV6 => (ETH_LEN + IPV6_LEN, false),
        _ => return None,
    };
    let network = bytes.get(ETH_LEN..l4)?;
    let (total, protocol, ttl) = if v4 { read_v4(network.try_into().ok()?)? } else { read_v6(network.try_into().ok()?)? };
    let len = ETH_LEN + total;
    if len + start > frame.len() {
        return None;
    }
    let transport = &bytes[l4..];
    let (header, checksum) = read_transport(transport, protocol, len.checked_sub(l4)?)?;
    let header_len = l4 + header;
    let wire_size = read_offload(&frame.offload, (l4, checksum, protocol, v4), header_len, (bytes.len(), len))?;
    let ports = Some(*transport.first_chunk::<4>()?);
    let signature = if v4 {
        Signature::v4(sender, eth, *network[12..].first_chunk::<8>()?, protocol, ports)
    } else {
        Signature::v6(sender, eth, network[8..].first_chunk::<32>()?, protocol, ports)
    };
    let (start, len, header_len) = (start as u16, len as u32, header_len as u16);
    Some(Glimpse { signature, start, len, wire_size, header_len, ttl, v4 })
}

/// Total length, protocol and TTL of an IPv4 header that has no options, is correct and is no fragment's.
#[inline]
fn read_v4(header: &[u8; IPV4_LEN]) -> Option<(usize, u8, u8)> {
    let word = |at: usize| u64::from(u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]));
    // RFC 1071: the ones' complement sum of a header with a correct checksum is all ones, in either byte order.
    let sum = word(0) + word(4) + word(8) + word(12) + word(16);
    let sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let more_or_offset = u16::from_be_bytes([header[6], header[7]]) & 0x3fff;
    let plain = header[0] == 0x45 && more_or_offset == 0 && sum == 0xffff;
    let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
    plain.then_some((total, header[9], header[8]))
}

/// Length in all, next header and hop limit of an IPv6 header.
#[inline]
fn read_v6(header: &[u8; IPV6_LEN]) -> Option<(usize, u8, u8)> {
    let total = IPV6_LEN + usize::from(u16::from_be_bytes([header[4], header[5]]));
    (header[0] >> 4 == 6).then_some((total, header[6], header[7]))
}

/// Length of the transport header and offset of its checksum; `len` is what IP gives it.
#[inline]
fn read_transport(bytes: &[u8], protocol: u8, len: usize) -> Option<(usize, usize)> {
    match protocol {
        ip::TCP => {
            let header = usize::from(bytes.first_chunk::<TCP_LEN>()?[12] >> 4) * 4;
            (header >= TCP_LEN && header <= len).then_some((header, tcp::CHECKSUM_OFFSET))
        }
        ip::UDP => {
            let bytes = bytes.first_chunk::<UDP_LEN>()?;
            let datagram = usize::from(u16::from_be_bytes([bytes[4], bytes[5]]));
            (datagram >= UDP_LEN && datagram <= len).then_some((UDP_LEN, udp::CHECKSUM_OFFSET))
        }
        _ => None,
    }
}

/// Bytes of the largest L3 packet, if what is still to be done fits the headers. `lengths` are those of the head from
/// the Ethernet header on, and of the whole packet from there.
#[inline]
fn read_offload(
    offload: &Offload,
    (l4, checksum, protocol, v4): (usize, usize, u8, bool),
    header_len: usize,
    (head, len): (usize, usize),
) -> Option<u32> {
    let whole = (len - ETH_LEN) as u32;
    let Some(partial) = offload.partial else {
        return offload.gso.is_none().then_some(whole);
    };
    if (usize::from(partial.start), usize::from(partial.offset)) != (l4, checksum) {
        return None;
    }
    let Some(gso) = offload.gso else { return Some(whole) };
    let fits = match gso.kind {
        GsoKind::Tcp4 => protocol == ip::TCP && v4,
        GsoKind::Tcp6 => protocol == ip::TCP && !v4,
        GsoKind::Udp => protocol == ip::UDP,
    };
    let usable = fits && gso.size > 0 && header_len <= head && header_len < len;
    usable.then(|| whole.min((header_len - ETH_LEN) as u32 + u32::from(gso.size)))
}
