//! Cuts a superframe into segments: many headers from one template, the payload stays where it is.
//!
//! The rules are those of Linux's `tcp_gso_segment`, `__udp_gso_segment` and `inet_gso_segment`: IPv4's id counts up,
//! TCP's sequence number moves on, FIN and PSH belong to the last segment, CWR to the first. Checksums come out
//! complete, whatever the template's held.
//!
//! What all segments share is summed once, in [`Segments::plan`]; writing a header is then a copy and a few additions.
//! The caller sums each segment's payload, since only it knows in how many pieces that lies.

use core::fmt;
use core::ops::Range;

use zerocopy::FromBytes;

use crate::checksum::{self, Sum};
use crate::ip;
use crate::ipv4::Ipv4Header;
use crate::ipv6::{self, IPV6_LEN, Ipv6Header};
use crate::offload::{Gso, GsoKind};
use crate::tcp::{CWR, FIN, PSH, TcpHeader};
use crate::udp::{UDP_LEN, UdpHeader};

/// How many segments one superframe may become. A superframe of 64 KiB stays below it down to segments of 64 bytes,
/// which is less than stacks send; without a bound, one write of a pod could cost 65,000 packets.
pub const MAX_SEGMENTS: usize = 1024;

/// Why a superframe cannot be cut.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum SegmentError {
    /// The headers are malformed, or do not begin and end where the caller says.
    Header,
    /// The headers are not of the kind that the superframe claims to be.
    Kind,
    /// IP's or UDP's length does not fit the payload.
    Length,
    /// There is no payload, or segments would have none.
    Empty,
    /// More than [`MAX_SEGMENTS`].
    TooMany,
    /// A fragment of a datagram: only whole ones can be cut.
    Fragment,
}

impl fmt::Display for SegmentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Header => "a superframe's headers are malformed",
            Self::Kind => "a superframe's headers are not of the kind it claims to be",
            Self::Length => "a superframe's length fields do not fit its payload",
            Self::Empty => "a superframe has no payload or a segment size of zero",
            Self::TooMany => "a superframe would become too many segments",
            Self::Fragment => "a superframe is a fragment",
        })
    }
}

impl std::error::Error for SegmentError {}

/// How a superframe becomes segments. Every segment's headers are as long as the superframe's.
#[derive(Clone, Debug)]
pub struct Segments {
    l3: usize,
    l4: usize,
    header_len: usize,
    payload_len: usize,
    size: usize,
    network: Network,
    transport: Transport,
}

/// IP's part of the template.
#[derive(Clone, Debug)]
enum Network {
    /// `sum` is that of the header without total length, id and checksum.
    V4 {
        id: u16,
        sum: Sum,
    },
    V6,
}

/// TCP's or UDP's part of the template. `sum` is that of the pseudo-header and the header without the words that
/// differ between segments.
#[derive(Clone, Debug)]
enum Transport {
    Tcp { seq: u32, flags: u8, sum: Sum },
    Udp { sum: Sum },
}

impl Segments {
    /// Checks a superframe's headers and sums up what its segments share.
    ///
    /// `headers` is everything from the Ethernet header to the end of the transport header, options included, with
    /// IP at `l3` and TCP or UDP at `l4`; `payload_len` is what follows. The headers' own lengths must agree. Of
    /// `gso`, kind and size count.
    pub fn plan(headers: &[u8], l3: usize, l4: usize, payload_len: usize, gso: &Gso) -> Result<Self, SegmentError> {
        let size = usize::from(gso.size);
        if payload_len == 0 || size == 0 {
            return Err(SegmentError::Empty);
        }
        if payload_len.div_ceil(size) > MAX_SEGMENTS {
            return Err(SegmentError::TooMany);
        }
        let network_header = headers.get(l3..l4).ok_or(SegmentError::Header)?;
        let transport_header = &headers[l4..];
        let (network, announced, pseudo) = match (gso.kind, network_header.first().map(|byte| byte >> 4)) {
            (GsoKind::Tcp4, Some(4)) => plan_v4(network_header, ip::TCP)?,
            (GsoKind::Tcp6, Some(6)) => plan_v6(network_header, ip::TCP)?,
            (GsoKind::Udp, Some(4)) => plan_v4(network_header, ip::UDP)?,
            (GsoKind::Udp, Some(6)) => plan_v6(network_header, ip::UDP)?,
            _ => return Err(SegmentError::Kind),
        };
        if announced != Some(transport_header.len() + payload_len) {
            return Err(SegmentError::Length);
        }
        let transport = match gso.kind {
            GsoKind::Tcp4 | GsoKind::Tcp6 => plan_tcp(transport_header, pseudo)?,
            GsoKind::Udp => plan_udp(transport_header, payload_len, pseudo)?,
        };
        Ok(Self { l3, l4, header_len: headers.len(), payload_len, size, network, transport })
    }

    /// How many segments, at least 1.
    pub fn count(&self) -> usize {
        self.payload_len.div_ceil(self.size)
    }

    /// Length of each segment's headers, in bytes.
    pub fn header_len(&self) -> usize {
        self.header_len
    }

    /// Where segment `i`'s payload lies in the superframe's payload. Empty beyond the last.
    pub fn payload(&self, i: usize) -> Range<usize> {
        let start = i.saturating_mul(self.size).min(self.payload_len);
        start..(start + self.size).min(self.payload_len)
    }

    /// Writes segment `i`'s headers to `out[..header_len]`. `headers` is what the plan was made of, `payload_sum` is
    /// the sum ([`checksum::sum`]) of this segment's payload.
    ///
    /// # Panics
    ///
    /// If `headers` or `out` is shorter than [`Segments::header_len`].
    pub fn write(&self, i: usize, headers: &[u8], payload_sum: u16, out: &mut [u8]) {
        let out = &mut out[..self.header_len];
        out.copy_from_slice(&headers[..self.header_len]);
        let (network, transport) = out[self.l3..].split_at_mut(self.l4 - self.l3);
        // Both fit: the plan compared the superframe's own 16-bit length fields with these lengths.
        let transport_len = (transport.len() + self.payload(i).len()) as u16;
        self.write_network(i, network, transport_len);
        self.write_transport(i, transport, transport_len, payload_sum);
    }

    fn write_network(&self, i: usize, bytes: &mut [u8], transport_len: u16) {
        match &self.network {
            Network::V4 { id, sum } => {
                let len = bytes.len() as u16 + transport_len;
                let (header, _) = Ipv4Header::mut_from_prefix(bytes).expect("the plan read this header");
                let id = id.wrapping_add(i as u16);
                header.total_len = len.into();
                header.id = id.into();
                header.checksum = sum.clone().add_word(len).add_word(id).finish().into();
            }
            Network::V6 => {
                // IPv6 does not count its fixed header.
                let len = (bytes.len() - IPV6_LEN) as u16 + transport_len;
                let (header, _) = Ipv6Header::mut_from_prefix(bytes).expect("the plan read this header");
                header.payload_len = len.into();
            }
        }
    }

    fn write_transport(&self, i: usize, bytes: &mut [u8], len: u16, payload_sum: u16) {
        match &self.transport {
            Transport::Tcp { seq, flags, sum } => {
                let (header, _) = TcpHeader::mut_from_prefix(bytes).expect("the plan read this header");
                let seq = seq.wrapping_add((i * self.size) as u32);
                let flags = self.flags(i, *flags);
                header.seq = seq.into();
                header.flags = flags;
                let mut sum = *sum;
                sum.add_word(len).add_word((seq >> 16) as u16).add_word(seq as u16).add_word(flags.into());
                header.checksum = sum.add_word(payload_sum).finish().into();
            }
            Transport::Udp { sum } => {
                let (header, _) = UdpHeader::mut_from_prefix(bytes).expect("the plan read this header");
                header.len = len.into();
                // The length counts twice: in the pseudo-header and in the header.
                let mut sum = *sum;
                sum.add_word(len).add_word(len).add_word(payload_sum);
                header.checksum = sum.finish_nonzero().into();
            }
        }
    }

    /// RFC 3168 section 6.1.2: CWR goes out once, with the first new data. FIN and PSH come after all of the data.
    fn flags(&self, i: usize, flags: u8) -> u8 {
        let not_first = if i > 0 { CWR } else { 0 };
        let not_last = if i + 1 < self.count() { FIN | PSH } else { 0 };
        flags & !(not_first | not_last)
    }
}

/// The template, the length of the transport header and payload that the header announces, and the pseudo-header's
/// sum without its length.
type Planned = (Network, Option<usize>, Sum);

fn plan_v4(bytes: &[u8], protocol: u8) -> Result<Planned, SegmentError> {
    let (header, _) = Ipv4Header::ref_from_prefix(bytes).map_err(|_| SegmentError::Header)?;
    if header.ihl() != bytes.len() {
        return Err(SegmentError::Header);
    }
    if header.is_fragment() {
        return Err(SegmentError::Fragment);
    }
    if header.protocol != protocol {
        return Err(SegmentError::Kind);
    }
    let (len, id) = (header.total_len.get(), header.id.get());
    let mut sum = Sum::new();
    sum.add(bytes).add_word(!len).add_word(!id).add_word(!header.checksum.get());
    let announced = usize::from(len).checked_sub(bytes.len());
    Ok((Network::V4 { id, sum }, announced, checksum::pseudo_v4(header.src(), header.dst(), protocol, 0)))
}

fn plan_v6(bytes: &[u8], protocol: u8) -> Result<Planned, SegmentError> {
    let (header, extensions) = Ipv6Header::ref_from_prefix(bytes).map_err(|_| SegmentError::Header)?;
    let upper =
        ipv6::walk(header.next_header, extensions, ipv6::MAX_EXTENSION_HEADERS).map_err(|_| SegmentError::Header)?;
    if upper.fragment.is_some() {
        return Err(SegmentError::Fragment);
    }
    if upper.protocol != protocol {
        return Err(SegmentError::Kind);
    }
    // RFC 8200 section 8.1: with a Routing header, the pseudo-header's destination is not the one in the IPv6 header.
    if upper.offset != extensions.len() || upper.routing {
        return Err(SegmentError::Header);
    }
    let announced = usize::from(header.payload_len.get()).checked_sub(extensions.len());
    Ok((Network::V6, announced, checksum::pseudo_v6(header.src(), header.dst(), protocol, 0)))
}

fn plan_tcp(bytes: &[u8], mut sum: Sum) -> Result<Transport, SegmentError> {
    let (header, _) = TcpHeader::ref_from_prefix(bytes).map_err(|_| SegmentError::Header)?;
    if header.header_len() != bytes.len() {
        return Err(SegmentError::Header);
    }
    let (seq, flags) = (header.seq.get(), header.flags);
    sum.add(bytes).add_word(!header.checksum.get()).add_word(!u16::from(flags));
    sum.add_word(!((seq >> 16) as u16)).add_word(!(seq as u16));
    Ok(Transport::Tcp { seq, flags, sum })
}

fn plan_udp(bytes: &[u8], payload_len: usize, mut sum: Sum) -> Result<Transport, SegmentError> {
    let header = UdpHeader::ref_from_bytes(bytes).map_err(|_| SegmentError::Header)?;
    if usize::from(header.len.get()) != UDP_LEN + payload_len {
        return Err(SegmentError::Length);
    }
    sum.add(bytes).add_word(!header.checksum.get()).add_word(!header.len.get());
    Ok(Transport::Udp { sum })
}
