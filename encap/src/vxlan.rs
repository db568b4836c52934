//! VXLAN (RFC 7348), as strict as Linux.
//!
//! RFC 7348 section 5 says that reserved bits are ignored on receipt. Linux drops a packet with any of them set, and
//! so do we: a bit that nobody defined is either a bug or an extension (GBP, GPE) whose payload would be misread.

use core::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// UDP port given out by IANA. Flannel and old Linux use 8472.
pub const PORT: u16 = 4789;
/// `flags`: the VNI is valid. The only bit that may be set.
pub const FLAG_VNI: u8 = 0x08;

/// The VXLAN header, 8 bytes.
#[derive(Copy, Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct VxlanHeader {
    /// [`FLAG_VNI`] and seven reserved bits.
    pub flags: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// Which segment.
    pub vni: [u8; 3],
    /// Zero.
    pub reserved2: u8,
}

/// The length of [`VxlanHeader`].
pub const VXLAN_LEN: usize = size_of::<VxlanHeader>();

/// A VXLAN network identifier: 24 bits.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Vni(u32);

impl Vni {
    /// The greatest one.
    pub const MAX: Self = Self(0x00ff_ffff);

    /// `None` if the number needs more than 24 bits.
    pub const fn new(number: u32) -> Option<Self> {
        if number <= Self::MAX.0 { Some(Self(number)) } else { None }
    }

    /// The number, at most [`Vni::MAX`].
    pub const fn get(self) -> u32 {
        self.0
    }

    /// As on the wire.
    pub const fn to_bytes(self) -> [u8; 3] {
        let [_, a, b, c] = self.0.to_be_bytes();
        [a, b, c]
    }

    /// From the wire. Every value is a VNI.
    pub const fn from_bytes([a, b, c]: [u8; 3]) -> Self {
        Self(u32::from_be_bytes([0, a, b, c]))
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why a datagram is no VXLAN.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum VxlanError {
    /// Fewer than 8 bytes.
    Short,
    /// The flag that says "the VNI is valid" is not set.
    NotVxlan,
    /// One of the 39 reserved bits is set.
    ReservedBits,
}

impl fmt::Display for VxlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Short => "a VXLAN header is cut off",
            Self::NotVxlan => "a VXLAN header without a valid VNI",
            Self::ReservedBits => "a VXLAN header with reserved bits set",
        })
    }
}

impl std::error::Error for VxlanError {}

impl VxlanHeader {
    /// The header of every frame of this segment.
    pub const fn new(vni: Vni) -> Self {
        Self { flags: FLAG_VNI, reserved: [0; 3], vni: vni.to_bytes(), reserved2: 0 }
    }

    /// Reads the header in front of a frame.
    pub fn parse(bytes: &[u8]) -> Result<Vni, VxlanError> {
        let (header, _) = Self::ref_from_prefix(bytes).map_err(|_| VxlanError::Short)?;
        // RFC 7348 section 5: "the I flag MUST be set to 1 for a valid VXLAN Network ID (VNI)".
        if header.flags & FLAG_VNI == 0 {
            return Err(VxlanError::NotVxlan);
        }
        let vni = Vni::from_bytes(header.vni);
        if *header == Self::new(vni) { Ok(vni) } else { Err(VxlanError::ReservedBits) }
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;

    const GOLDEN: [u8; 8] = [0x08, 0, 0, 0, 0x12, 0x34, 0x56, 0];

    #[test]
    fn golden_header_goes_both_ways() {
        let vni = Vni::new(0x12_3456).unwrap();
        assert_eq!(VxlanHeader::parse(&GOLDEN), Ok(vni));
        let mut out = [0xa5; 10];
        VxlanHeader::new(vni).write_to_prefix(&mut out).unwrap();
        assert_eq!(out[..8], GOLDEN);
        assert_eq!(out[8..], [0xa5; 2]);
    }

    #[test]
    fn the_i_flag_must_be_set() {
        let mut bytes = GOLDEN;
        bytes[0] = 0;
        assert_eq!(VxlanHeader::parse(&bytes), Err(VxlanError::NotVxlan));
        // Whatever else is set.
        bytes[0] = 0xf7;
        assert_eq!(VxlanHeader::parse(&bytes), Err(VxlanError::NotVxlan));
    }

    #[test]
    fn each_of_the_39_reserved_bits_must_be_zero() {
        let mut reserved = 0;
        for bit in (0..64).filter(|bit| *bit != 4 && !(32..56).contains(bit)) {
            let mut bytes = GOLDEN;
            bytes[bit / 8] ^= 0x80 >> (bit % 8);
            assert_eq!(VxlanHeader::parse(&bytes), Err(VxlanError::ReservedBits), "bit {bit}");
            reserved += 1;
        }
        assert_eq!(reserved, 39);
    }

    #[test]
    fn a_header_that_is_cut_off_is_refused() {
        for len in 0..8 {
            assert_eq!(VxlanHeader::parse(&GOLDEN[..len]), Err(VxlanError::Short));
        }
    }

    #[test]
    fn a_vni_has_24_bits() {
        assert_eq!(Vni::new(1 << 24), None);
        assert_eq!(Vni::new((1 << 24) - 1), Some(Vni::MAX));
        assert_eq!(Vni::from_bytes(Vni::MAX.to_bytes()), Vni::MAX);
        assert_eq!(Vni::from_bytes([0x12, 0x34, 0x56]).get(), 0x12_3456);
    }
}
