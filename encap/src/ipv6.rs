//! The IPv6 header and the walk over its extension headers (RFC 8200).
//!
//! The walk stops at the first header that it does not know, and calls that the upper layer. ESP, mobility and the
//! like are upper layers to us: nothing behind them can be read or is worth reading. It also stops behind the header
//! of a fragment that is not the first, since what follows is the middle of something.

use core::fmt;
use core::net::Ipv6Addr;

use zerocopy::byteorder::network_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::ip;

/// The length of [`Ipv6Header`].
pub const IPV6_LEN: usize = size_of::<Ipv6Header>();

/// How many extension headers [`walk`]'s callers accept. RFC 8504 section 5.3 lets a node limit them; Linux's own
/// default for options is 8 too.
pub const MAX_EXTENSION_HEADERS: usize = 8;

/// The fixed IPv6 header, 40 bytes.
#[derive(Copy, Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Ipv6Header {
    /// Version (4 bits), traffic class (8), flow label (20).
    pub version_class_flow: U32,
    /// Length of everything behind this header, in bytes.
    pub payload_len: U16,
    /// What follows, see [`crate::ip`].
    pub next_header: u8,
    /// How many routers may still forward this.
    pub hop_limit: u8,
    /// Source address, see [`Ipv6Header::src`].
    pub src: [u8; 16],
    /// Destination address, see [`Ipv6Header::dst`].
    pub dst: [u8; 16],
}

impl Ipv6Header {
    /// A header with traffic class and flow label zero.
    pub fn new(src: Ipv6Addr, dst: Ipv6Addr, next_header: u8, hop_limit: u8, payload_len: u16) -> Self {
        Self {
            version_class_flow: 0x6000_0000.into(),
            payload_len: payload_len.into(),
            next_header,
            hop_limit,
            src: src.octets(),
            dst: dst.octets(),
        }
    }

    /// The version: 6, unless this is no IPv6 header.
    pub fn version(&self) -> u8 {
        (self.version_class_flow.get() >> 28) as u8
    }

    /// DSCP (high six bits) and ECN.
    pub fn traffic_class(&self) -> u8 {
        (self.version_class_flow.get() >> 20) as u8
    }

    /// The 20 bits of the flow label (RFC 6437).
    pub fn flow_label(&self) -> u32 {
        self.version_class_flow.get() & 0x000f_ffff
    }

    /// The source address.
    pub fn src(&self) -> Ipv6Addr {
        self.src.into()
    }

    /// The destination address.
    pub fn dst(&self) -> Ipv6Addr {
        self.dst.into()
    }
}

/// The Fragment extension header, 8 bytes (RFC 8200 section 4.5).
#[derive(Copy, Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct FragmentHeader {
    /// What the fragmentable part begins with.
    pub next_header: u8,
    /// Ignored.
    pub reserved: u8,
    /// Offset in units of eight bytes (13 bits), two reserved bits, "more fragments".
    pub offset_more: U16,
    /// Which datagram this belongs to.
    pub id: U32,
}

/// What a Fragment header said.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Where the piece begins in the fragmentable part, in bytes.
    pub offset: u16,
    /// Whether more pieces follow.
    pub more: bool,
    /// Which datagram this belongs to.
    pub id: u32,
}

impl From<&FragmentHeader> for Fragment {
    fn from(header: &FragmentHeader) -> Self {
        let offset_more = header.offset_more.get();
        Self { offset: offset_more & 0xfff8, more: offset_more & 1 != 0, id: header.id.get() }
    }
}

/// What lies behind the extension headers.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Upper {
    /// Its protocol, see [`crate::ip`]. For a fragment that is not the first: what its datagram's first one begins with.
    pub protocol: u8,
    /// Where it begins, in bytes from the end of the fixed header. Never beyond the end of the bytes given.
    pub offset: usize,
    /// The Fragment header, if there is one. Offset 0 without "more" is an atomic fragment (RFC 6946).
    pub fragment: Option<Fragment>,
    /// There is a Routing header: the destination in the fixed header need not be the last one, which is the one that
    /// checksums cover.
    pub routing: bool,
}

/// Why the extension headers cannot be walked.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum WalkError {
    /// The bytes end inside of an extension header.
    Truncated,
    /// More extension headers than the limit.
    TooMany,
    /// Hop-by-Hop Options anywhere but directly behind the fixed header.
    HopByHopMisplaced,
    /// A fragment of a fragment.
    FragmentTwice,
}

impl fmt::Display for WalkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Truncated => "an IPv6 extension header is cut off",
            Self::TooMany => "too many IPv6 extension headers",
            Self::HopByHopMisplaced => "IPv6 Hop-by-Hop Options do not come first",
            Self::FragmentTwice => "two IPv6 Fragment headers",
        })
    }
}

impl std::error::Error for WalkError {}

/// Finds the upper layer. `next` is the fixed header's next header, `bytes` is what follows the fixed header, `limit`
/// is the number of extension headers to accept (use [`MAX_EXTENSION_HEADERS`]).
pub fn walk(next: u8, bytes: &[u8], limit: usize) -> Result<Upper, WalkError> {
    let mut upper = Upper { protocol: next, offset: 0, fragment: None, routing: false };
    let mut headers = 0;
    loop {
        let rest = &bytes[upper.offset..];
        let (next, len) = match upper.protocol {
            // RFC 8200 section 4.1: "the Hop-by-Hop Options header ... is restricted to appear immediately after an
            // IPv6 header only".
            ip::HOP_BY_HOP if headers > 0 => return Err(WalkError::HopByHopMisplaced),
            ip::FRAGMENT if upper.fragment.is_some() => return Err(WalkError::FragmentTwice),
            ip::HOP_BY_HOP | ip::ROUTING | ip::DESTINATION => sized(rest, |units| (units + 1) * 8)?,
            // RFC 4302 section 2.2: the length is in words of four bytes, minus two.
            ip::AH => sized(rest, |units| (units + 2) * 4)?,
            ip::FRAGMENT => {
                let (header, _) = FragmentHeader::ref_from_prefix(rest).map_err(|_| WalkError::Truncated)?;
                upper.fragment = Some(header.into());
                (header.next_header, size_of::<FragmentHeader>())
            }
            _ => return Ok(upper),
        };
        if headers == limit {
            return Err(WalkError::TooMany);
        }
        headers += 1;
        upper.routing |= upper.protocol == ip::ROUTING;
        upper.protocol = next;
        upper.offset += len;
        if upper.fragment.is_some_and(|fragment| fragment.offset != 0) {
            return Ok(upper);
        }
    }
}

/// Next header and length of an extension header whose second byte tells its length.
fn sized(rest: &[u8], bytes_of: impl Fn(usize) -> usize) -> Result<(u8, usize), WalkError> {
    let [next, units, ..] = *rest else { return Err(WalkError::Truncated) };
    let len = bytes_of(usize::from(units));
    if len > rest.len() { Err(WalkError::Truncated) } else { Ok((next, len)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: [u8; 40] = [
        0x6b, 0x81, 0x23, 0x45, 0x00, 0x08, 17, 64, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xfd, 0, 0, 0,
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2,
    ];

    #[test]
    fn golden_header_parses() {
        let header = Ipv6Header::ref_from_bytes(&GOLDEN).unwrap();
        assert_eq!((header.version(), header.traffic_class(), header.flow_label()), (6, 0xb8, 0x12345));
        assert_eq!((header.payload_len.get(), header.next_header, header.hop_limit), (8, ip::UDP, 64));
        assert_eq!(header.src(), "fd00::1".parse::<Ipv6Addr>().unwrap());
        assert_eq!(header.dst(), "fd00::2".parse::<Ipv6Addr>().unwrap());
    }

    #[test]
    fn golden_header_is_written() {
        let mut out = [0xa5; 42];
        let mut header = Ipv6Header::new("fd00::1".parse().unwrap(), "fd00::2".parse().unwrap(), ip::UDP, 64, 8);
        assert_eq!(header.version_class_flow.get(), 0x6000_0000);
        header.version_class_flow = 0x6b81_2345.into();
        header.write_to_prefix(&mut out).unwrap();
        assert_eq!(out[..40], GOLDEN);
        assert_eq!(out[40..], [0xa5; 2]);
    }

    /// Extension headers one after the other, each of eight bytes but for the last byte of its length.
    fn chain(kinds: &[u8], last: u8) -> (u8, Vec<u8>) {
        let mut bytes = Vec::new();
        for next in kinds.iter().skip(1).chain([&last]) {
            bytes.extend([*next, 0, 0, 0, 0, 0, 0, 0]);
        }
        (*kinds.first().unwrap_or(&last), bytes)
    }

    fn walk_chain(kinds: &[u8], last: u8) -> Result<Upper, WalkError> {
        let (next, bytes) = chain(kinds, last);
        walk(next, &bytes, MAX_EXTENSION_HEADERS)
    }

    #[test]
    fn without_extension_headers_the_upper_layer_comes_first() {
        let upper = Upper { protocol: ip::TCP, offset: 0, fragment: None, routing: false };
        assert_eq!(walk(ip::TCP, &[1, 2, 3], 0), Ok(upper));
        assert_eq!(walk(ip::TCP, &[], 0), Ok(upper));
    }

    #[test]
    fn extension_headers_are_walked_in_the_order_they_appear() {
        let upper = walk_chain(&[ip::HOP_BY_HOP, ip::DESTINATION, ip::ROUTING, ip::FRAGMENT], ip::UDP).unwrap();
        assert_eq!((upper.protocol, upper.offset, upper.routing), (ip::UDP, 32, true));
        assert_eq!(upper.fragment, Some(Fragment { offset: 0, more: false, id: 0 }));
    }

    #[test]
    fn lengths_are_in_units_of_eight_octets_not_including_the_first() {
        let mut bytes = [0; 24];
        bytes[..2].copy_from_slice(&[ip::UDP, 2]);
        assert_eq!(walk(ip::DESTINATION, &bytes, 8).unwrap().offset, 24);
        assert_eq!(walk(ip::DESTINATION, &bytes[..23], 8), Err(WalkError::Truncated));
        // RFC 4302 section 2.2: AH counts in units of four octets, minus two.
        assert_eq!(walk(ip::AH, &bytes, 8).unwrap().offset, 16);
    }

    #[test]
    fn hop_by_hop_options_appear_immediately_after_the_fixed_header_only() {
        assert_eq!(walk_chain(&[ip::DESTINATION, ip::HOP_BY_HOP], ip::UDP), Err(WalkError::HopByHopMisplaced));
        assert_eq!(walk_chain(&[ip::HOP_BY_HOP, ip::HOP_BY_HOP], ip::UDP), Err(WalkError::HopByHopMisplaced));
    }

    #[test]
    fn the_limit_counts_extension_headers() {
        let kinds = [ip::DESTINATION; 9];
        assert_eq!(walk_chain(&kinds[..8], ip::UDP).unwrap().offset, 64);
        assert_eq!(walk_chain(&kinds, ip::UDP), Err(WalkError::TooMany));
    }

    #[test]
    fn a_fragment_that_is_not_the_first_ends_the_walk() {
        let bytes = [ip::DESTINATION, 0, 0x05, 0xa9, 0xde, 0xad, 0xbe, 0xef, 0xff, 0xff];
        let upper = walk(ip::FRAGMENT, &bytes, 8).unwrap();
        assert_eq!((upper.protocol, upper.offset), (ip::DESTINATION, 8));
        assert_eq!(upper.fragment, Some(Fragment { offset: 1448, more: true, id: 0xdead_beef }));
    }

    #[test]
    fn a_fragment_has_no_fragments() {
        assert_eq!(walk_chain(&[ip::FRAGMENT, ip::FRAGMENT], ip::UDP), Err(WalkError::FragmentTwice));
    }

    #[test]
    fn what_cannot_be_read_is_the_upper_layer() {
        for protocol in [ip::NO_NEXT, ip::ESP, ip::ICMPV6, 135, 253] {
            let upper = walk_chain(&[ip::DESTINATION], protocol).unwrap();
            assert_eq!((upper.protocol, upper.offset), (protocol, 8));
        }
    }

    #[test]
    fn each_cut_within_a_header_is_noticed() {
        let (next, bytes) = chain(&[ip::HOP_BY_HOP, ip::FRAGMENT, ip::AH], ip::UDP);
        for len in 0..bytes.len() {
            assert_eq!(walk(next, &bytes[..len], 8), Err(WalkError::Truncated), "{len}");
        }
        assert!(walk(next, &bytes, 8).is_ok());
    }
}
