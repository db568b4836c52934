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
