//! Neighbour Discovery (RFC 4861): solicitations and advertisements, and the options behind them.
//!
//! An ND packet is valid as a whole or not at all, so [`Neighbor::parse`] looks at every option before it hands out
//! the one that counts. What it cannot see is the caller's to check: hop limit 255, checksum, addresses.

use core::fmt;
use core::net::Ipv6Addr;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::icmp::{IcmpHeader, v6};
use crate::mac::Mac;

/// Option: link-layer address of the sender (in solicitations).
pub const SOURCE_LINK_LAYER: u8 = 1;
/// Option: link-layer address of the target (in advertisements).
pub const TARGET_LINK_LAYER: u8 = 2;

/// First byte of an advertisement's `rest`: the sender is a router.
pub const ROUTER: u8 = 0x80;
/// First byte of an advertisement's `rest`: it answers a solicitation.
pub const SOLICITED: u8 = 0x40;
/// First byte of an advertisement's `rest`: replace what you know.
pub const OVERRIDE: u8 = 0x20;

/// A neighbour solicitation or advertisement without its options, 24 bytes.
#[derive(Copy, Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Neighbor {
    /// Type 135 or 136; the first byte of `rest` holds an advertisement's flags.
    pub icmp: IcmpHeader,
    /// The address asked for, or told about, see [`Neighbor::target`].
    pub target: [u8; 16],
}

/// The one option that solicitations and advertisements need, 8 bytes.
#[derive(Copy, Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct LinkLayerOption {
    /// [`SOURCE_LINK_LAYER`] or [`TARGET_LINK_LAYER`].
    pub kind: u8,
    /// Length in units of eight bytes: 1.
    pub units: u8,
    /// The address.
    pub mac: Mac,
}

/// A solicitation or advertisement with its link-layer address, 32 bytes: what a node sends.
#[derive(Copy, Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct NeighborMessage {
    /// Header and target. Its checksum is zero until the caller fills it in.
    pub neighbor: Neighbor,
    /// Whose address, and which.
    pub option: LinkLayerOption,
}

impl NeighborMessage {
    /// Who has `target`? Tell `mac`.
    pub fn solicitation(target: Ipv6Addr, mac: Mac) -> Self {
        Self::new(v6::NEIGHBOR_SOLICITATION, 0, target, SOURCE_LINK_LAYER, mac)
    }

    /// `target` is at `mac`. `flags` is made of [`ROUTER`], [`SOLICITED`] and [`OVERRIDE`].
    pub fn advertisement(flags: u8, target: Ipv6Addr, mac: Mac) -> Self {
        Self::new(v6::NEIGHBOR_ADVERTISEMENT, flags, target, TARGET_LINK_LAYER, mac)
    }

    fn new(kind: u8, flags: u8, target: Ipv6Addr, option: u8, mac: Mac) -> Self {
        Self {
            neighbor: Neighbor { icmp: IcmpHeader::new(kind, 0, [flags, 0, 0, 0]), target: target.octets() },
            option: LinkLayerOption { kind: option, units: 1, mac },
        }
    }
}

/// Why a packet is no valid solicitation or advertisement. RFC 4861 section 7.1: it is discarded silently.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum NdpError {
    /// Shorter than 24 bytes, or an option is cut off.
    Short,
    /// Neither a solicitation nor an advertisement, or its code is not zero.
    Kind,
    /// An option of length zero.
    EmptyOption,
    /// The target is a multicast address.
    MulticastTarget,
    /// A link-layer address that is not as long as a MAC.
    LinkLayerLength,
}

impl fmt::Display for NdpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Short => "a neighbour discovery packet is cut off",
            Self::Kind => "not a neighbour solicitation or advertisement",
            Self::EmptyOption => "a neighbour discovery option has length zero",
            Self::MulticastTarget => "a neighbour discovery target is a multicast address",
            Self::LinkLayerLength => "a link-layer address option does not hold a MAC address",
        })
    }
}

impl std::error::Error for NdpError {}

impl Neighbor {
    /// Reads a solicitation or advertisement from its ICMP header to the end of its options. The second value is the
    /// link-layer address that belongs to its kind: the source's in a solicitation, the target's in an advertisement.
    pub fn parse(bytes: &[u8]) -> Result<(&Self, Option<Mac>), NdpError> {
        let (neighbor, rest) = Self::ref_from_prefix(bytes).map_err(|_| NdpError::Short)?;
        let wanted = match (neighbor.icmp.kind, neighbor.icmp.code) {
            (v6::NEIGHBOR_SOLICITATION, 0) => SOURCE_LINK_LAYER,
            (v6::NEIGHBOR_ADVERTISEMENT, 0) => TARGET_LINK_LAYER,
            _ => return Err(NdpError::Kind),
        };
        // RFC 4861 sections 7.1.1 and 7.1.2: "Target Address is not a multicast address".
        if neighbor.target().is_multicast() {
            return Err(NdpError::MulticastTarget);
        }
        let mut mac = None;
        for option in options(rest) {
            let option = option?;
            if option.kind == wanted && mac.is_none() {
                mac = Some(option.mac().ok_or(NdpError::LinkLayerLength)?);
            }
        }
        Ok((neighbor, mac))
    }

    /// The target address.
    pub fn target(&self) -> Ipv6Addr {
        self.target.into()
    }

    /// The flags of an advertisement: [`ROUTER`], [`SOLICITED`], [`OVERRIDE`].
    pub fn flags(&self) -> u8 {
        self.icmp.rest[0]
    }
}

/// One option.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct NdpOption<'a> {
    /// Its type.
    pub kind: u8,
    /// What follows type and length: 6 bytes, 14, 22 …
    pub body: &'a [u8],
}

impl NdpOption<'_> {
    /// The body as a link-layer address.
    pub fn mac(&self) -> Option<Mac> {
        self.body.try_into().ok().map(Mac)
    }
}

/// The options in `bytes`, in order. Ends after the first error.
pub fn options(bytes: &[u8]) -> Options<'_> {
    Options { rest: bytes }
}

/// See [`options`].
#[derive(Clone, Debug)]
pub struct Options<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Options<'a> {
    type Item = Result<NdpOption<'a>, NdpError>;

    fn next(&mut self) -> Option<Self::Item> {
        let bytes = core::mem::take(&mut self.rest);
        match *bytes {
            [] => None,
            // RFC 4861 section 4.6: "Nodes MUST silently discard an ND packet that contains an option with length zero."
            [_, 0, ..] => Some(Err(NdpError::EmptyOption)),
            [kind, units, ..] if bytes.len() >= usize::from(units) * 8 => {
                let (option, rest) = bytes.split_at(usize::from(units) * 8);
                self.rest = rest;
                Some(Ok(NdpOption { kind, body: &option[2..] }))
            }
            _ => Some(Err(NdpError::Short)),
        }
    }
}

/// The group that everybody with this address listens to (RFC 4291 section 2.7.1).
pub fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = address.octets();
    Ipv6Addr::from([0xff, 0x02, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c])
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;

    const SOLICITATION: [u8; 32] =
        [135, 0, 0, 0, 0, 0, 0, 0, 0xfd, 0, 0, 0x10, 0x02, 0x44, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 1, 1, 2, 0, 0, 0, 0, 1];
    const ADVERTISEMENT: [u8; 32] = [
        136, 0, 0, 0, 0x60, 0, 0, 0, 0xfd, 0, 0, 0x10, 0x02, 0x44, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 2, 1, 2, 0, 0, 0, 0, 9,
    ];

    fn target() -> Ipv6Addr {
        "fd00:10:244:1::2".parse().unwrap()
    }

    #[test]
    fn golden_messages_parse() {
        let (neighbor, mac) = Neighbor::parse(&SOLICITATION).unwrap();
        assert_eq!((neighbor.icmp.kind, neighbor.flags(), neighbor.target()), (135, 0, target()));
        assert_eq!(mac, Some(Mac([2, 0, 0, 0, 0, 1])));
        let (neighbor, mac) = Neighbor::parse(&ADVERTISEMENT).unwrap();
        assert_eq!((neighbor.icmp.kind, neighbor.flags(), neighbor.target()), (136, SOLICITED | OVERRIDE, target()));
        assert_eq!(mac, Some(Mac([2, 0, 0, 0, 0, 9])));
    }

    #[test]
    fn golden_messages_are_written() {
        let mut out = [0xa5; 34];
        NeighborMessage::solicitation(target(), Mac([2, 0, 0, 0, 0, 1])).write_to_prefix(&mut out).unwrap();
        assert_eq!(out[..32], SOLICITATION);
        NeighborMessage::advertisement(SOLICITED | OVERRIDE, target(), Mac([2, 0, 0, 0, 0, 9]))
            .write_to_prefix(&mut out)
            .unwrap();
        assert_eq!(out[..32], ADVERTISEMENT);
        assert_eq!(out[32..], [0xa5; 2]);
    }

    #[test]
    fn the_link_layer_address_is_optional() {
        assert_eq!(Neighbor::parse(&SOLICITATION[..24]).unwrap().1, None);
    }

    #[test]
    fn the_link_layer_address_of_the_other_kind_does_not_count() {
        let mut bytes = SOLICITATION;
        bytes[24] = TARGET_LINK_LAYER;
        assert_eq!(Neighbor::parse(&bytes).unwrap().1, None);
    }

    #[test]
    fn nodes_must_silently_discard_a_packet_that_contains_an_option_with_length_zero() {
        let mut bytes = SOLICITATION;
        bytes[25] = 0;
        assert_eq!(Neighbor::parse(&bytes), Err(NdpError::EmptyOption));
        // Also behind the option that counts.
        let bytes = [&SOLICITATION[..], &[14, 0, 0, 0, 0, 0, 0, 0]].concat();
        assert_eq!(Neighbor::parse(&bytes), Err(NdpError::EmptyOption));
    }

    #[test]
    fn unknown_options_are_skipped() {
        let nonce = [14, 1, 1, 2, 3, 4, 5, 6];
        let bytes = [&SOLICITATION[..24], &nonce, &SOLICITATION[24..]].concat();
        assert_eq!(Neighbor::parse(&bytes).unwrap().1, Some(Mac([2, 0, 0, 0, 0, 1])));
        let all: Vec<_> = options(&bytes[24..]).map(|option| option.unwrap().kind).collect();
        assert_eq!(all, [14, SOURCE_LINK_LAYER]);
    }

    #[test]
    fn what_is_cut_off_is_refused() {
        for len in (0..24).chain(25..32) {
            assert_eq!(Neighbor::parse(&SOLICITATION[..len]), Err(NdpError::Short), "{len}");
        }
    }

    #[test]
    fn other_messages_and_codes_are_refused() {
        for (at, wrong) in [(0, v6::ROUTER_ADVERTISEMENT), (1, 1)] {
            let mut bytes = SOLICITATION;
            bytes[at] = wrong;
            assert_eq!(Neighbor::parse(&bytes), Err(NdpError::Kind));
        }
    }

    #[test]
    fn the_target_address_is_not_a_multicast_address() {
        let mut bytes = SOLICITATION;
        bytes[8] = 0xff;
        assert_eq!(Neighbor::parse(&bytes), Err(NdpError::MulticastTarget));
    }

    #[test]
    fn a_link_layer_address_of_another_length_is_refused() {
        let mut bytes = [&SOLICITATION[..], &[0; 8]].concat();
        bytes[25] = 2;
        assert_eq!(Neighbor::parse(&bytes), Err(NdpError::LinkLayerLength));
    }

    #[test]
    fn the_solicited_node_group_takes_the_low_24_bits() {
        let address: Ipv6Addr = "4037::01:800:200e:8c6c".parse().unwrap();
        assert_eq!(solicited_node(address), "ff02::1:ff0e:8c6c".parse::<Ipv6Addr>().unwrap());
    }
}
