//! The IPv4 header (RFC 791).

use core::net::Ipv4Addr;

use zerocopy::byteorder::network_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::checksum;

/// `flags_fragment`: do not fragment.
pub const DONT_FRAGMENT: u16 = 0x4000;
/// `flags_fragment`: more fragments follow.
pub const MORE_FRAGMENTS: u16 = 0x2000;
/// `flags_fragment`: the offset, in units of eight bytes.
pub const FRAGMENT_OFFSET: u16 = 0x1fff;

/// The length of [`Ipv4Header`], which is the shortest an IPv4 header can be.
pub const IPV4_LEN: usize = size_of::<Ipv4Header>();

/// The fixed part of the IPv4 header, 20 bytes; up to 40 bytes of options follow it.
#[derive(Copy, Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Ipv4Header {
    /// Version (high four bits) and header length in words of four bytes.
    pub version_ihl: u8,
    /// DSCP (high six bits) and ECN.
    pub tos: u8,
    /// Length of header and payload, in bytes.
    pub total_len: U16,
    /// Which datagram a fragment belongs to.
    pub id: U16,
    /// Three flags and the fragment offset.
    pub flags_fragment: U16,
    /// How many routers may still forward this.
    pub ttl: u8,
    /// What follows, see [`crate::ip`].
    pub protocol: u8,
    /// Over the header, options included.
    pub checksum: U16,
    /// Source address, see [`Ipv4Header::src`].
    pub src: [u8; 4],
    /// Destination address, see [`Ipv4Header::dst`].
    pub dst: [u8; 4],
}

impl Ipv4Header {
    /// A header without options, ready to send: "don't fragment" is set and the id is zero, as RFC 6864 section 4.1
    /// allows for datagrams that are never fragmented, and the checksum is in place.
    pub fn new(src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, ttl: u8, payload_len: u16) -> Self {
        let mut header = Self {
            version_ihl: 0x45,
            tos: 0,
            total_len: payload_len.saturating_add(20).into(),
            id: 0.into(),
            flags_fragment: DONT_FRAGMENT.into(),
            ttl,
            protocol,
            checksum: 0.into(),
            src: src.octets(),
            dst: dst.octets(),
        };
        header.checksum = checksum::ipv4_header(header.as_bytes()).into();
        header
    }

    /// The version: 4, unless this is no IPv4 header.
    pub fn version(&self) -> u8 {
        self.version_ihl >> 4
    }

    /// Length of the header with its options, in bytes: 0 to 60, and malformed below 20.
    pub fn ihl(&self) -> usize {
        usize::from(self.version_ihl & 0x0f) * 4
    }

    /// The two bits of explicit congestion notification (RFC 3168).
    pub fn ecn(&self) -> u8 {
        self.tos & 0x03
    }

    /// Whether routers must not fragment this.
    pub fn dont_fragment(&self) -> bool {
        self.flags_fragment.get() & DONT_FRAGMENT != 0
    }

    /// Whether more fragments of the same datagram follow.
    pub fn more_fragments(&self) -> bool {
        self.flags_fragment.get() & MORE_FRAGMENTS != 0
    }

    /// Where in its datagram this fragment begins, in bytes.
    pub fn fragment_offset(&self) -> usize {
        usize::from(self.flags_fragment.get() & FRAGMENT_OFFSET) * 8
    }

    /// Whether this is a piece of a datagram, first and last included.
    pub fn is_fragment(&self) -> bool {
        self.flags_fragment.get() & (MORE_FRAGMENTS | FRAGMENT_OFFSET) != 0
    }

    /// The source address.
    pub fn src(&self) -> Ipv4Addr {
        self.src.into()
    }

    /// The destination address.
    pub fn dst(&self) -> Ipv4Addr {
        self.dst.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ip;

    const GOLDEN: [u8; 20] =
        [0x45, 0x00, 0x00, 0x1e, 0x00, 0x00, 0x40, 0x00, 0x40, 0x11, 0x26, 0xcd, 10, 0, 0, 1, 10, 0, 0, 2];

    #[test]
    fn golden_header_parses() {
        let header = Ipv4Header::ref_from_bytes(&GOLDEN).unwrap();
        assert_eq!((header.version(), header.ihl(), header.tos, header.ecn()), (4, 20, 0, 0));
        assert_eq!((header.total_len.get(), header.id.get()), (30, 0));
        assert!(header.dont_fragment());
        assert!(!header.is_fragment());
        assert_eq!((header.ttl, header.protocol, header.checksum.get()), (64, ip::UDP, 0x26cd));
        assert_eq!((header.src(), header.dst()), (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2)));
        assert!(checksum::verify_ipv4_header(&GOLDEN));
    }

    #[test]
    fn golden_header_is_written() {
        let mut out = [0xa5; 22];
        Ipv4Header::new(Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2), ip::UDP, 64, 10)
            .write_to_prefix(&mut out)
            .unwrap();
        assert_eq!(out[..20], GOLDEN);
        assert_eq!(out[20..], [0xa5; 2]);
    }

    #[test]
    fn the_fragment_offset_is_measured_in_units_of_eight_octets() {
        let mut header = Ipv4Header::read_from_bytes(&GOLDEN).unwrap();
        header.flags_fragment = (MORE_FRAGMENTS | 185).into();
        assert!(header.more_fragments());
        assert!(header.is_fragment());
        assert!(!header.dont_fragment());
        assert_eq!(header.fragment_offset(), 1480);
        header.flags_fragment = 185.into();
        assert!(header.is_fragment());
        header.flags_fragment = MORE_FRAGMENTS.into();
        assert!(header.is_fragment());
    }
}
