//! Ethernet II and the 802.1Q tag.
//!
//! Pods' ports are untagged; the tag is known here so that a tagged frame can be told from a malformed one.

use zerocopy::byteorder::network_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::mac::Mac;

/// IPv4 (RFC 894).
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// ARP (RFC 826).
pub const ETHERTYPE_ARP: u16 = 0x0806;
/// A customer VLAN tag follows (IEEE 802.1Q).
pub const ETHERTYPE_VLAN: u16 = 0x8100;
/// IPv6 (RFC 2464).
pub const ETHERTYPE_IPV6: u16 = 0x86dd;
/// A service VLAN tag follows (IEEE 802.1ad).
pub const ETHERTYPE_QINQ: u16 = 0x88a8;

/// The Ethernet header, 14 bytes.
#[derive(Copy, Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct EthHeader {
    /// Who shall receive the frame.
    pub dst: Mac,
    /// Who sent it.
    pub src: Mac,
    /// What follows; below 1536 it is a length (IEEE 802.3), which nothing here speaks.
    pub ethertype: U16,
}

/// The length of [`EthHeader`].
pub const ETH_LEN: usize = size_of::<EthHeader>();

impl EthHeader {
    /// A header from its three fields.
    pub fn new(dst: Mac, src: Mac, ethertype: u16) -> Self {
        Self { dst, src, ethertype: ethertype.into() }
    }
}

/// What follows an ethertype of [`ETHERTYPE_VLAN`] or [`ETHERTYPE_QINQ`], 4 bytes.
#[derive(Copy, Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct VlanTag {
    /// Priority (3 bits), drop eligible (1 bit), VLAN id (12 bits).
    pub tci: U16,
    /// What follows the tag.
    pub ethertype: U16,
}

impl VlanTag {
    /// The VLAN id: 0 is a priority tag, 4095 is reserved.
    pub fn id(&self) -> u16 {
        self.tci.get() & 0x0fff
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: [u8; 14] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x86, 0xdd];

    #[test]
    fn golden_header_parses() {
        let (header, rest) = EthHeader::ref_from_prefix(&GOLDEN).unwrap();
        assert_eq!(header.dst, Mac([2, 0, 0, 0, 0, 1]));
        assert_eq!(header.src, Mac([2, 0, 0, 0, 0, 2]));
        assert_eq!(header.ethertype.get(), ETHERTYPE_IPV6);
        assert!(rest.is_empty());
        assert!(EthHeader::ref_from_prefix(&GOLDEN[..13]).is_err());
    }

    #[test]
    fn golden_header_is_written() {
        let mut out = [0xa5; 16];
        let header = EthHeader::new(Mac([2, 0, 0, 0, 0, 1]), Mac([2, 0, 0, 0, 0, 2]), ETHERTYPE_IPV6);
        header.write_to_prefix(&mut out).unwrap();
        assert_eq!(out[..14], GOLDEN);
        assert_eq!(out[14..], [0xa5; 2]);
    }

    #[test]
    fn the_vlan_id_is_the_low_twelve_bits() {
        let tag = VlanTag::read_from_bytes(&[0xbf, 0xff, 0x08, 0x00]).unwrap();
        assert_eq!(tag.id(), 4095);
        assert_eq!(tag.ethertype.get(), ETHERTYPE_IPV4);
    }
}
