//! The UDP header (RFC 768).

use zerocopy::byteorder::network_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The length of [`UdpHeader`].
pub const UDP_LEN: usize = size_of::<UdpHeader>();
/// Where the checksum lies in the header.
pub const CHECKSUM_OFFSET: usize = 6;

/// The UDP header, 8 bytes.
#[derive(Copy, Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct UdpHeader {
    /// Source port.
    pub src_port: U16,
    /// Destination port.
    pub dst_port: U16,
    /// Length of header and payload, in bytes; malformed below 8.
    pub len: U16,
    /// Over pseudo-header, header and payload; zero means none (over IPv4 only).
    pub checksum: U16,
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;

    const GOLDEN: [u8; 8] = [0x30, 0x39, 0, 53, 0, 9, 0xbe, 0xef];

    #[test]
    fn golden_header_goes_both_ways() {
        let header = UdpHeader::read_from_bytes(&GOLDEN).unwrap();
        assert_eq!((header.src_port.get(), header.dst_port.get()), (12345, 53));
        assert_eq!((header.len.get(), header.checksum.get()), (9, 0xbeef));
        let mut out = [0xa5; 10];
        header.write_to_prefix(&mut out).unwrap();
        assert_eq!(out[..8], GOLDEN);
        assert_eq!(out[8..], [0xa5; 2]);
        assert_eq!(header.checksum.as_bytes(), &GOLDEN[CHECKSUM_OFFSET..]);
    }
}
