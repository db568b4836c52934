//! Geneve (RFC 8926).
//!
//! We send no options. Of received ones each is checked to lie inside the header, and is skipped, unless it says that it must be
//! understood. Unlike VXLAN's, its reserved bits are ignored on receipt, as the RFC wants and as Open vSwitch does.

use core::fmt;

use zerocopy::byteorder::network_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::vxlan::Vni;

/// UDP port given out by IANA.
pub const PORT: u16 = 6081;
/// `protocol`: an Ethernet frame follows ("Trans Ether Bridging").
pub const PROTOCOL_ETHERNET: u16 = 0x6558;

/// `version_options`: length of the options in units of 4 bytes.
const OPTIONS: u8 = 0x3f;
/// `flags`: a control packet, for the endpoint itself.
const FLAG_CONTROL: u8 = 0x80;
/// `flags`: there is an option that must be understood.
const FLAG_CRITICAL: u8 = 0x40;
/// `kind` of an option: it must be understood.
const OPTION_CRITICAL: u8 = 0x80;
/// `len` of an option: length of its data in units of 4 bytes.
const OPTION_LEN: u8 = 0x1f;

/// The fixed header, 8 bytes.
#[derive(Copy, Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct GeneveHeader {
    /// Two bits of version, six of the options' length in units of 4 bytes.
    pub version_options: u8,
    /// Control, critical, and six reserved bits.
    pub flags: u8,
    /// EtherType of what follows.
    pub protocol: U16,
    /// Which segment.
    pub vni: [u8; 3],
    /// Zero.
    pub reserved: u8,
}

/// The length of [`GeneveHeader`].
pub const GENEVE_LEN: usize = size_of::<GeneveHeader>();

/// The head of an option, 4 bytes.
#[derive(Copy, Clone, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct OptionHeader {
    class: U16,
    kind: u8,
    len: u8,
}

/// A header that was read.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Geneve {
    /// Which segment.
    pub vni: Vni,
    /// EtherType of what follows.
    pub protocol: u16,
    /// Bytes of fixed header and options: 8 to 260.
    pub len: usize,
}

/// Why a datagram is not taken.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum GeneveError {
    /// The header, or its options, are cut off.
    Short,
    /// Another version than 0.
    Version,
    /// A control packet; we know none.
    Control,
    /// An option that must be understood, and is not.
    Critical,
    /// The options do not fill the length that the header gives them.
    Options,
}

impl fmt::Display for GeneveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Short => "a Geneve header is cut off",
            Self::Version => "a Geneve header of an unknown version",
            Self::Control => "a Geneve control packet, of which none is known",
            Self::Critical => "a Geneve option that must be understood, and is not",
            Self::Options => "Geneve options that do not fill their length",
        })
    }
}

impl std::error::Error for GeneveError {}

impl GeneveHeader {
    /// The header, without options, of every Ethernet frame of this segment.
    pub const fn new(vni: Vni) -> Self {
        Self {
            version_options: 0,
            flags: 0,
            protocol: U16::from_bytes(PROTOCOL_ETHERNET.to_be_bytes()),
            vni: vni.to_bytes(),
            reserved: 0,
        }
    }

    /// How long header and options are by the first byte of these, which say nothing else about them: for whoever has to find what is
    /// behind, and leaves judging to [`GeneveHeader::parse`].
    pub fn claimed_len(bytes: &[u8]) -> usize {
        GENEVE_LEN + usize::from(bytes.first().unwrap_or(&0) & OPTIONS) * 4
    }

    /// Reads header and options in front of a frame.
    pub fn parse(bytes: &[u8]) -> Result<Geneve, GeneveError> {
        let (header, rest) = Self::ref_from_prefix(bytes).map_err(|_| GeneveError::Short)?;
        // RFC 8926 section 3.4: "Packets received by a tunnel endpoint with an unknown version MUST be dropped."
        if header.version_options & !OPTIONS != 0 {
            return Err(GeneveError::Version);
        }
        let len = usize::from(header.version_options & OPTIONS) * 4;
        let options = rest.get(..len).ok_or(GeneveError::Short)?;
        // Section 3.4: "Tunnel endpoints MUST NOT forward the payload" of a control packet.
        if header.flags & FLAG_CONTROL != 0 {
            return Err(GeneveError::Control);
        }
        check_options(options, header.flags & FLAG_CRITICAL != 0)?;
        Ok(Geneve { vni: Vni::from_bytes(header.vni), protocol: header.protocol.get(), len: GENEVE_LEN + len })
    }
}

/// Section 3.5: "Packets in which the total length of all options is not equal to the 'Opt Len' in the base header are invalid
/// and MUST be silently dropped"; and one with an unknown critical option "MUST be dropped".
fn check_options(mut options: &[u8], critical: bool) -> Result<(), GeneveError> {
    let mut found = false;
    while !options.is_empty() {
        let (option, rest) = OptionHeader::ref_from_prefix(options).map_err(|_| GeneveError::Options)?;
        found |= option.kind & OPTION_CRITICAL != 0;
        options = rest.get(usize::from(option.len & OPTION_LEN) * 4..).ok_or(GeneveError::Options)?;
    }
    if critical || found { Err(GeneveError::Critical) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: [u8; 8] = [0, 0, 0x65, 0x58, 0x12, 0x34, 0x56, 0];

    /// The golden header with these options behind it.
    fn with(options: &[u8]) -> Vec<u8> {
        let mut bytes = [&GOLDEN, options].concat();
        bytes[0] = u8::try_from(options.len() / 4).unwrap();
        bytes
    }

    #[test]
    fn golden_header_goes_both_ways() {
        let vni = Vni::new(0x12_3456).unwrap();
        assert_eq!(GeneveHeader::parse(&GOLDEN), Ok(Geneve { vni, protocol: PROTOCOL_ETHERNET, len: 8 }));
        let mut out = [0xa5; 10];
        GeneveHeader::new(vni).write_to_prefix(&mut out).unwrap();
        assert_eq!(out, [&GOLDEN[..], &[0xa5; 2]].concat()[..]);
    }

    #[test]
    fn options_that_may_be_skipped_are() {
        let bytes = with(&[0x01, 0x02, 0x03, 0x01, 9, 9, 9, 9, 0xff, 0xff, 0x00, 0xe0]);
        assert_eq!(GeneveHeader::parse(&bytes).unwrap().len, 20);
        assert_eq!(GeneveHeader::claimed_len(&bytes), 20);
        assert_eq!(GeneveHeader::parse(&with(&[0; 252])).unwrap().len, 260);
    }

    #[test]
    fn an_option_that_must_be_understood_ends_it() {
        let mut bytes = with(&[0x01, 0x02, 0x83, 0x00]);
        assert_eq!(GeneveHeader::parse(&bytes), Err(GeneveError::Critical), "though the header does not say so");
        bytes[1] = FLAG_CRITICAL;
        assert_eq!(GeneveHeader::parse(&bytes), Err(GeneveError::Critical));
        bytes[10] = 3;
        assert_eq!(GeneveHeader::parse(&bytes), Err(GeneveError::Critical), "though no option is");
    }

    #[test]
    fn options_fill_their_length_exactly() {
        assert_eq!(GeneveHeader::parse(&with(&[0, 0, 0, 1])), Err(GeneveError::Options));
        assert_eq!(GeneveHeader::parse(&with(&[0, 0, 0, 2, 0, 0, 0, 0])), Err(GeneveError::Options));
    }

    #[test]
    fn versions_and_control_packets_that_nobody_defined_are_refused() {
        for version in 1..4u8 {
            let mut bytes = GOLDEN;
            bytes[0] = version << 6;
            assert_eq!(GeneveHeader::parse(&bytes), Err(GeneveError::Version));
        }
        let mut bytes = GOLDEN;
        bytes[1] = FLAG_CONTROL;
        assert_eq!(GeneveHeader::parse(&bytes), Err(GeneveError::Control));
    }

    #[test]
    fn reserved_bits_are_ignored() {
        let mut bytes = GOLDEN;
        (bytes[1], bytes[7]) = (0x3f, 0xff);
        assert_eq!(GeneveHeader::parse(&bytes), GeneveHeader::parse(&GOLDEN));
    }

    #[test]
    fn what_is_cut_off_is_refused() {
        let bytes = with(&[0, 0, 0, 1, 0, 0, 0, 0]);
        for len in 0..bytes.len() {
            assert_eq!(GeneveHeader::parse(&bytes[..len]), Err(GeneveError::Short), "{len} bytes");
        }
    }
}
