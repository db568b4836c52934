//! Generic Routing Encapsulation (RFC 2784), with the key of RFC 2890.
//!
//! It lies directly in IP (protocol 47), and carries IP packets, or Ethernet frames as `gretap` and Open vSwitch do. The key tells
//! tunnels between the same two nodes apart. We send no checksum, for what is inside has its own, and no sequence number; a
//! received checksum is verified, a received sequence number is not looked at.

use core::fmt;

use zerocopy::byteorder::network_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::checksum::Sum;

/// `protocol`: an Ethernet frame follows ("Trans Ether Bridging").
pub const PROTOCOL_ETHERNET: u16 = 0x6558;

/// `flags`: a checksum follows (RFC 2784).
pub const FLAG_CHECKSUM: u16 = 0x8000;
/// `flags`: a key follows (RFC 2890).
pub const FLAG_KEY: u16 = 0x2000;
/// `flags`: a sequence number follows (RFC 2890).
pub const FLAG_SEQUENCE: u16 = 0x1000;
/// `flags`: version.
const VERSION: u16 = 0x0007;
/// `flags`: bits 1, 4 and 5, of RFC 1701's routing.
const MUST_BE_ZERO: u16 = 0x4c00;

/// The fixed header, 4 bytes.
#[derive(Copy, Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct GreHeader {
    /// Which optional fields follow, and the version.
    pub flags: U16,
    /// EtherType of what follows.
    pub protocol: U16,
}

/// The length of [`GreHeader`].
pub const GRE_LEN: usize = size_of::<GreHeader>();
/// The length with a key.
pub const GRE_KEY_LEN: usize = GRE_LEN + size_of::<U32>();

/// A header that was read.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Gre {
    /// EtherType of what follows.
    pub protocol: u16,
    /// Which tunnel.
    pub key: Option<u32>,
    /// Whether there was a checksum; [`verify`] says if it is right.
    pub checksum: bool,
    /// Bytes of the header: 4 to 16.
    pub len: usize,
}

/// Why a packet is not taken.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum GreError {
    /// The header, or one of the fields that it announces, is cut off.
    Short,
    /// Another version than 0; version 1 is PPTP's.
    Version,
    /// RFC 1701's routing, or a bit that nobody defined.
    Flags,
}

impl fmt::Display for GreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Short => "a GRE header is cut off",
            Self::Version => "a GRE header of another version than 0",
            Self::Flags => "a GRE header with flags of source routing",
        })
    }
}

impl std::error::Error for GreError {}

impl GreHeader {
    /// Reads the header in front of a packet or frame.
    pub fn parse(bytes: &[u8]) -> Result<Gre, GreError> {
        let (header, rest) = Self::ref_from_prefix(bytes).map_err(|_| GreError::Short)?;
        let flags = header.flags.get();
        // RFC 2784 section 2.3.1: "The Version Number field MUST contain the value zero."
        if flags & VERSION != 0 {
            return Err(GreError::Version);
        }
        // Section 2.3: "A receiver MUST discard a packet where any of bits 1-5 are non-zero, unless that receiver implements RFC
        // 1701", of which RFC 2890 took bits 2 and 3. Bits 6 to 12 "MUST be ignored on receipt".
        if flags & MUST_BE_ZERO != 0 {
            return Err(GreError::Flags);
        }
        let mut rest = rest;
        let mut word = |present: bool| {
            if !present {
                return Ok(None);
            }
            let (word, after) = U32::ref_from_prefix(rest).map_err(|_| GreError::Short)?;
            rest = after;
            Ok(Some(word.get()))
        };
        let checksum = word(flags & FLAG_CHECKSUM != 0)?.is_some();
        let key = word(flags & FLAG_KEY != 0)?;
        word(flags & FLAG_SEQUENCE != 0)?;
        Ok(Gre { protocol: header.protocol.get(), key, checksum, len: bytes.len() - rest.len() })
    }

    /// Writes the header without key, or with.
    ///
    /// # Panics
    /// If `out` is not [`GRE_LEN`] or [`GRE_KEY_LEN`] bytes long, as the key demands.
    pub fn write(protocol: u16, key: Option<u32>, out: &mut [u8]) {
        let flags = if key.is_some() { FLAG_KEY } else { 0 };
        let header = Self { flags: flags.into(), protocol: protocol.into() };
        out[..GRE_LEN].copy_from_slice(header.as_bytes());
        match key {
            Some(key) => out[GRE_LEN..].copy_from_slice(&key.to_be_bytes()),
            None => assert_eq!(out.len(), GRE_LEN, "without a key the header is as long as this"),
        }
    }
}

/// Whether the checksum over header and payload, in pieces, is right (RFC 2784 section 2.5). For a header that has one.
pub fn verify<'a>(slices: impl Iterator<Item = &'a [u8]>) -> bool {
    // What is added up includes the checksum itself.
    let mut sum = Sum::new();
    for slice in slices {
        sum.add(slice);
    }
    sum.fold() == 0xffff
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum;

    #[test]
    fn golden_headers_go_both_ways() {
        let plain = [0, 0, 0x08, 0x00];
        assert_eq!(GreHeader::parse(&plain), Ok(Gre { protocol: 0x0800, key: None, checksum: false, len: 4 }));
        let mut out = [0xa5; GRE_LEN];
        GreHeader::write(0x0800, None, &mut out);
        assert_eq!(out, plain);
        let keyed = [0x20, 0, 0x65, 0x58, 0, 0, 0x12, 0x34];
        let key = Some(0x1234);
        assert_eq!(GreHeader::parse(&keyed), Ok(Gre { protocol: PROTOCOL_ETHERNET, key, checksum: false, len: 8 }));
        let mut out = [0xa5; GRE_KEY_LEN];
        GreHeader::write(PROTOCOL_ETHERNET, key, &mut out);
        assert_eq!(out, keyed);
    }

    #[test]
    fn optional_fields_come_in_their_order() {
        let bytes = [0xb0, 0, 0x86, 0xdd, 1, 1, 0, 0, 2, 2, 2, 2, 3, 3, 3, 3, 0x60];
        let read = GreHeader::parse(&bytes).unwrap();
        assert_eq!(read, Gre { protocol: 0x86dd, key: Some(0x0202_0202), checksum: true, len: 16 });
        for len in 0..16 {
            assert_eq!(GreHeader::parse(&bytes[..len]), Err(GreError::Short), "{len} bytes");
        }
    }

    #[test]
    fn any_of_bits_1_to_5_but_key_and_sequence_is_refused() {
        for bit in [1, 4, 5] {
            let flags = 0x8000u16 >> bit;
            let [a, b] = flags.to_be_bytes();
            assert_eq!(GreHeader::parse(&[a, b, 8, 0]), Err(GreError::Flags), "bit {bit}");
        }
        assert_eq!(GreHeader::parse(&[0x03, 0xf8, 8, 0]).map(|read| read.len), Ok(4), "bits 6 to 12");
    }

    #[test]
    fn only_version_0_is_known() {
        for version in 1..8 {
            assert_eq!(GreHeader::parse(&[0, version, 8, 0]), Err(GreError::Version));
        }
    }

    #[test]
    fn a_checksum_covers_header_and_payload() {
        let mut bytes = vec![0x80, 0, 0x08, 0x00, 0, 0, 0, 0, 0x45, 1, 2, 3, 4];
        let sum = !checksum::sum(&bytes);
        bytes[4..6].copy_from_slice(&sum.to_be_bytes());
        assert!(verify(bytes.chunks(5)));
        bytes[12] ^= 1;
        assert!(!verify(bytes.chunks(5)));
    }
}
