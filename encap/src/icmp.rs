//! ICMP for IPv4 (RFC 792) and IPv6 (RFC 4443): one layout, two sets of numbers.

use zerocopy::byteorder::network_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The first 8 bytes of any ICMP message. The checksum of [`v6`] covers a pseudo-header, that of [`v4`] does not.
#[derive(Copy, Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct IcmpHeader {
    /// The type, see [`v4`] and [`v6`].
    pub kind: u8,
    /// What it means depends on the type.
    pub code: u8,
    /// Over the whole message.
    pub checksum: U16,
    /// What it means depends on the type.
    pub rest: [u8; 4],
}

/// The length of [`IcmpHeader`].
pub const ICMP_LEN: usize = size_of::<IcmpHeader>();
/// Where the checksum lies in the header.
pub const CHECKSUM_OFFSET: usize = 2;

impl IcmpHeader {
    /// A header whose checksum is still zero.
    pub fn new(kind: u8, code: u8, rest: [u8; 4]) -> Self {
        Self { kind, code, checksum: 0.into(), rest }
    }

    /// Identifier and sequence number of an echo.
    pub fn echo(&self) -> (u16, u16) {
        let [a, b, c, d] = self.rest;
        (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
    }
}

/// Numbers of ICMP for IPv4.
pub mod v4 {
    /// Type: the answer to a ping.
    pub const ECHO_REPLY: u8 = 0;
    /// Type: unreachable, see the codes `UNREACHABLE_…`.
    pub const UNREACHABLE: u8 = 3;
    /// Type: send elsewhere.
    pub const REDIRECT: u8 = 5;
    /// Type: a ping.
    pub const ECHO_REQUEST: u8 = 8;
    /// Type: TTL or reassembly time ran out.
    pub const TIME_EXCEEDED: u8 = 11;
    /// Type: a header field is wrong.
    pub const PARAMETER_PROBLEM: u8 = 12;

    /// Code of [`UNREACHABLE`]: no route.
    pub const UNREACHABLE_NET: u8 = 0;
    /// Code of [`UNREACHABLE`]: no such host.
    pub const UNREACHABLE_HOST: u8 = 1;
    /// Code of [`UNREACHABLE`]: no such protocol.
    pub const UNREACHABLE_PROTOCOL: u8 = 2;
    /// Code of [`UNREACHABLE`]: nobody listens.
    pub const UNREACHABLE_PORT: u8 = 3;
    /// Code of [`UNREACHABLE`]: too big and must not be fragmented; the low half of `rest` is the MTU (RFC 1191).
    pub const FRAGMENTATION_NEEDED: u8 = 4;
    /// Code of [`UNREACHABLE`]: forbidden by policy (RFC 1812).
    pub const PROHIBITED: u8 = 13;
    /// Code of [`TIME_EXCEEDED`]: the TTL ran out on the way.
    pub const TTL_EXCEEDED: u8 = 0;
    /// Code of [`TIME_EXCEEDED`]: fragments are missing.
    pub const REASSEMBLY_EXCEEDED: u8 = 1;

    /// Whether this type reports an error, so that no error may be sent about it (RFC 1122 section 3.2.2).
    pub fn is_error(kind: u8) -> bool {
        matches!(kind, UNREACHABLE | 4 | REDIRECT | TIME_EXCEEDED | PARAMETER_PROBLEM)
    }
}

/// Numbers of ICMP for IPv6.
pub mod v6 {
    /// Type: unreachable, see the codes.
    pub const UNREACHABLE: u8 = 1;
    /// Type: too big; `rest` is the MTU.
    pub const PACKET_TOO_BIG: u8 = 2;
    /// Type: hop limit or reassembly time ran out.
    pub const TIME_EXCEEDED: u8 = 3;
    /// Type: a header field is wrong.
    pub const PARAMETER_PROBLEM: u8 = 4;
    /// Type: a ping.
    pub const ECHO_REQUEST: u8 = 128;
    /// Type: the answer to a ping.
    pub const ECHO_REPLY: u8 = 129;
    /// Type: multicast listener query (RFC 2710).
    pub const LISTENER_QUERY: u8 = 130;
    /// Type: multicast listener report (RFC 2710).
    pub const LISTENER_REPORT: u8 = 131;
    /// Type: multicast listener done (RFC 2710).
    pub const LISTENER_DONE: u8 = 132;
    /// Type: who is a router? (RFC 4861)
    pub const ROUTER_SOLICITATION: u8 = 133;
    /// Type: I am a router (RFC 4861).
    pub const ROUTER_ADVERTISEMENT: u8 = 134;
    /// Type: who has this address? (RFC 4861)
    pub const NEIGHBOR_SOLICITATION: u8 = 135;
    /// Type: I have this address (RFC 4861).
    pub const NEIGHBOR_ADVERTISEMENT: u8 = 136;
    /// Type: send elsewhere (RFC 4861).
    pub const REDIRECT: u8 = 137;
    /// Type: multicast listener report, version 2 (RFC 3810).
    pub const LISTENER_REPORT_V2: u8 = 143;

    /// Code of [`UNREACHABLE`]: no route.
    pub const UNREACHABLE_ROUTE: u8 = 0;
    /// Code of [`UNREACHABLE`]: forbidden by policy.
    pub const PROHIBITED: u8 = 1;
    /// Code of [`UNREACHABLE`]: no such neighbour.
    pub const UNREACHABLE_ADDRESS: u8 = 3;
    /// Code of [`UNREACHABLE`]: nobody listens.
    pub const UNREACHABLE_PORT: u8 = 4;
    /// Code of [`TIME_EXCEEDED`]: the hop limit ran out on the way.
    pub const HOP_LIMIT_EXCEEDED: u8 = 0;
    /// Code of [`TIME_EXCEEDED`]: fragments are missing.
    pub const REASSEMBLY_EXCEEDED: u8 = 1;

    /// Whether this type reports an error, so that no error may be sent about it (RFC 4443 section 2.4 e).
    pub fn is_error(kind: u8) -> bool {
        kind < 128
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;

    const GOLDEN: [u8; 8] = [8, 0, 0xbe, 0xef, 0x12, 0x34, 0x00, 0x07];

    #[test]
    fn golden_header_goes_both_ways() {
        let header = IcmpHeader::read_from_bytes(&GOLDEN).unwrap();
        assert_eq!((header.kind, header.code, header.checksum.get()), (v4::ECHO_REQUEST, 0, 0xbeef));
        assert_eq!(header.echo(), (0x1234, 7));
        let mut out = [0xa5; 10];
        let mut made = IcmpHeader::new(v4::ECHO_REQUEST, 0, [0x12, 0x34, 0, 7]);
        assert_eq!(made.checksum.get(), 0);
        made.checksum = 0xbeef.into();
        made.write_to_prefix(&mut out).unwrap();
        assert_eq!(out[..8], GOLDEN);
        assert_eq!(out[8..], [0xa5; 2]);
    }

    #[test]
    fn an_icmp_error_must_not_be_sent_about_an_icmp_error() {
        for kind in [v4::UNREACHABLE, v4::TIME_EXCEEDED, v4::PARAMETER_PROBLEM, v4::REDIRECT] {
            assert!(v4::is_error(kind));
        }
        assert!(!v4::is_error(v4::ECHO_REQUEST) && !v4::is_error(v4::ECHO_REPLY));
        // RFC 4443 section 2.1: error messages have a zero in the high bit of the type.
        assert!(v6::is_error(v6::PACKET_TOO_BIG) && v6::is_error(127));
        assert!(!v6::is_error(v6::ECHO_REQUEST) && !v6::is_error(v6::NEIGHBOR_SOLICITATION));
    }
}
