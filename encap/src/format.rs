//! The tunnel formats by name, and what each of them costs.
//!
//! A format says what stands between the outer IP header and the inner packet, or frame. Two of them carry IP packets alone, the others
//! Ethernet frames: GRE does either, so it has two names, of which `gretap` is Linux's for the one with Ethernet.

use core::fmt;
use core::str::FromStr;

use crate::eth::ETH_LEN;
use crate::geneve::GENEVE_LEN;
use crate::gre::GRE_LEN;
use crate::ipv4::IPV4_LEN;
use crate::ipv6::IPV6_LEN;
use crate::udp::UDP_LEN;
use crate::vxlan::VXLAN_LEN;

/// How packets are wrapped between two nodes.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Format {
    /// VXLAN, over UDP ([`crate::vxlan`]).
    #[default]
    Vxlan,
    /// Geneve, over UDP ([`crate::geneve`]).
    Geneve,
    /// GRE with an IP packet inside ([`crate::gre`]).
    Gre,
    /// GRE with an Ethernet frame inside.
    Gretap,
    /// IP in IP ([`crate::ipip`]).
    Ipip,
}

impl Format {
    /// All of them.
    pub const ALL: [Format; 5] = [Format::Vxlan, Format::Geneve, Format::Gre, Format::Gretap, Format::Ipip];

    /// How it is written.
    pub const fn name(self) -> &'static str {
        match self {
            Format::Vxlan => "vxlan",
            Format::Geneve => "geneve",
            Format::Gre => "gre",
            Format::Gretap => "gretap",
            Format::Ipip => "ipip",
        }
    }

    /// Whether Ethernet frames are inside; otherwise IP packets are, and nothing else can be.
    pub const fn carries_ethernet(self) -> bool {
        !matches!(self, Format::Gre | Format::Ipip)
    }

    /// What it adds to an IP packet of a pod, the outer IP header included, in bytes. Without options.
    pub const fn overhead(self, outer_is_v4: bool) -> u32 {
        let outer = if outer_is_v4 { IPV4_LEN } else { IPV6_LEN };
        let between = match self {
            Format::Vxlan => UDP_LEN + VXLAN_LEN + ETH_LEN,
            Format::Geneve => UDP_LEN + GENEVE_LEN + ETH_LEN,
            Format::Gre => GRE_LEN,
            Format::Gretap => GRE_LEN + ETH_LEN,
            Format::Ipip => 0,
        };
        (outer + between) as u32
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A word that is no format's name.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct UnknownFormat;

impl fmt::Display for UnknownFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no tunnel format has that name")
    }
}

impl std::error::Error for UnknownFormat {}

impl FromStr for Format {
    type Err = UnknownFormat;
    fn from_str(text: &str) -> Result<Format, UnknownFormat> {
        Format::ALL.into_iter().find(|format| format.name() == text).ok_or(UnknownFormat)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for format in Format::ALL {
            assert_eq!(format.name().parse(), Ok(format));
            assert_eq!(format.to_string(), format.name());
        }
        assert_eq!("VXLAN".parse::<Format>(), Err(UnknownFormat));
    }

    #[test]
    fn overheads_are_those_of_the_headers() {
        let all = Format::ALL.map(|format| [format.overhead(true), format.overhead(false)]);
        assert_eq!(all, [[50, 70], [50, 70], [24, 44], [38, 58], [20, 40]]);
    }
}
