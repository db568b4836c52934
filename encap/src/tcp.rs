//! The TCP header (RFC 9293).

use zerocopy::byteorder::network_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The sender is done.
pub const FIN: u8 = 0x01;
/// Opens a connection.
pub const SYN: u8 = 0x02;
/// Kills a connection.
pub const RST: u8 = 0x04;
/// Hand this to the application at once.
pub const PSH: u8 = 0x08;
/// The acknowledgement number counts.
pub const ACK: u8 = 0x10;
/// The urgent pointer counts.
pub const URG: u8 = 0x20;
/// Congestion was experienced (RFC 3168).
pub const ECE: u8 = 0x40;
/// The congestion window was reduced (RFC 3168).
pub const CWR: u8 = 0x80;

/// The length of [`TcpHeader`], which is the shortest a TCP header can be.
pub const TCP_LEN: usize = size_of::<TcpHeader>();
/// Where the checksum lies in the header.
pub const CHECKSUM_OFFSET: usize = 16;

/// The fixed part of the TCP header, 20 bytes; up to 40 bytes of options follow it.
#[derive(Copy, Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct TcpHeader {
    /// Source port.
    pub src_port: U16,
    /// Destination port.
    pub dst_port: U16,
    /// Number of the first byte of the payload.
    pub seq: U32,
    /// Number of the next byte that the sender expects.
    pub ack: U32,
    /// Header length in words of four bytes (high four bits) and reserved bits, the lowest of which is AccECN's.
    pub data_offset: u8,
    /// [`FIN`] to [`CWR`].
    pub flags: u8,
    /// Receive window, unscaled.
    pub window: U16,
    /// Over pseudo-header, header and payload.
    pub checksum: U16,
    /// Where urgent data ends, if [`URG`].
    pub urgent: U16,
}

impl TcpHeader {
    /// Length of the header with its options, in bytes: 0 to 60, and malformed below 20.
    pub fn header_len(&self) -> usize {
        usize::from(self.data_offset >> 4) * 4
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;

    const GOLDEN: [u8; 20] =
        [0x30, 0x39, 0, 80, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xfe, 0x50, 0x18, 0x02, 0x00, 0xbe, 0xef, 0, 0];

    #[test]
    fn golden_header_goes_both_ways() {
        let header = TcpHeader::read_from_bytes(&GOLDEN).unwrap();
        assert_eq!((header.src_port.get(), header.dst_port.get()), (12345, 80));
        assert_eq!((header.seq.get(), header.ack.get()), (1, u32::MAX - 1));
        assert_eq!((header.header_len(), header.flags), (20, ACK | PSH));
        assert_eq!((header.window.get(), header.checksum.get(), header.urgent.get()), (512, 0xbeef, 0));
        let mut out = [0xa5; 22];
        header.write_to_prefix(&mut out).unwrap();
        assert_eq!(out[..20], GOLDEN);
        assert_eq!(out[20..], [0xa5; 2]);
    }

    #[test]
    fn the_checksum_lies_where_the_constant_says() {
        let header = TcpHeader::ref_from_bytes(&GOLDEN).unwrap();
        assert_eq!(header.checksum.as_bytes(), &GOLDEN[CHECKSUM_OFFSET..CHECKSUM_OFFSET + 2]);
    }
}
