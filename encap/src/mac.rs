//! Ethernet addresses.
//!
//! Read RFC 7042 for the two special bits of the first octet (group, locally administered) and RFC 4291
//! appendix A for how an interface identifier, and with it a link-local address, is made of a MAC.

use core::fmt;
use core::net::{Ipv4Addr, Ipv6Addr};
use core::str::FromStr;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A MAC address, in the order of its octets on the wire.
#[derive(
    Copy, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(transparent)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// `ff:ff:ff:ff:ff:ff`, every station of the segment.
    pub const BROADCAST: Self = Self([0xff; 6]);
    /// `00:00:00:00:00:00`, which is nobody's address.
    pub const ZERO: Self = Self([0; 6]);

    /// Whether the group bit is set. Broadcast is included.
    pub const fn is_multicast(self) -> bool {
        self.0[0] & 0x01 != 0
    }

    /// Whether this is [`Mac::BROADCAST`].
    pub fn is_broadcast(self) -> bool {
        self == Self::BROADCAST
    }

    /// Whether a station may send from this address: neither a group nor all zero.
    pub fn is_unicast(self) -> bool {
        !self.is_multicast() && self != Self::ZERO
    }

    /// Whether the address was made up locally rather than assigned by a maker of hardware.
    pub const fn is_local(self) -> bool {
        self.0[0] & 0x02 != 0
    }

    /// The link-local IPv6 address that stateless configuration gives to this MAC.
    ///
    /// RFC 4291 appendix A: insert 0xFFFE in the middle and complement the universal/local bit.
    pub fn link_local(self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.0;
        Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 0x02, b, c, 0xff, 0xfe, d, e, f])
    }

    /// The group address for an IPv4 multicast group: `01:00:5e` and the low 23 bits (RFC 1112 section 6.4).
    pub const fn of_group_v4(group: Ipv4Addr) -> Self {
        let [_, b, c, d] = group.octets();
        Self([0x01, 0x00, 0x5e, b & 0x7f, c, d])
    }

    /// The group address for an IPv6 multicast group: `33:33` and the low 32 bits (RFC 2464 section 7).
    pub const fn of_group_v6(group: Ipv6Addr) -> Self {
        let [.., a, b, c, d] = group.octets();
        Self([0x33, 0x33, a, b, c, d])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<[u8; 6]> for Mac {
    fn from(octets: [u8; 6]) -> Self {
        Self(octets)
    }
}

/// The text is not six pairs of hexadecimal digits with colons between them.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct MacError;

impl fmt::Display for MacError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a MAC address: write six pairs of hexadecimal digits, as in 0a:00:00:12:34:56")
    }
}

impl std::error::Error for MacError {}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let mut octets = [0; 6];
        let mut pairs = text.split(':');
        for octet in &mut octets {
            let pair = pairs.next().ok_or(MacError)?;
            // `from_str_radix` alone would take "+1" and "1".
            if pair.len() != 2 || !pair.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(MacError);
            }
            *octet = u8::from_str_radix(pair, 16).map_err(|_| MacError)?;
        }
        match pairs.next() {
            None => Ok(Self(octets)),
            Some(_) => Err(MacError),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn group_addresses_have_the_low_bit_of_the_first_octet() {
        assert!(Mac([0x01, 0, 0x5e, 0, 0, 1]).is_multicast());
        assert!(Mac::BROADCAST.is_multicast());
        assert!(Mac::BROADCAST.is_broadcast());
        assert!(!Mac::BROADCAST.is_unicast());
        assert!(!Mac::ZERO.is_multicast());
        assert!(!Mac::ZERO.is_unicast());
        assert!(Mac([0x02, 0, 0, 0, 0, 1]).is_unicast());
        assert!(Mac([0x02, 0, 0, 0, 0, 1]).is_local());
        assert!(!Mac([0x00, 0x1b, 0x21, 0, 0, 1]).is_local());
    }

    #[test]
    fn the_interface_identifier_is_the_mac_with_fffe_and_the_local_bit_complemented() {
        // The example of RFC 4291 appendix A is 34-56-78-9A-BC-DE.
        let mac = Mac([0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde]);
        assert_eq!(mac.link_local(), "fe80::3656:78ff:fe9a:bcde".parse::<Ipv6Addr>().unwrap());
        assert_eq!(Mac([2, 0, 0, 0, 0, 1]).link_local(), "fe80::ff:fe00:1".parse::<Ipv6Addr>().unwrap());
    }

    #[test]
    fn multicast_groups_map_to_group_addresses() {
        assert_eq!(Mac::of_group_v4(Ipv4Addr::new(224, 129, 2, 3)), Mac([1, 0, 0x5e, 1, 2, 3]));
        assert_eq!(Mac::of_group_v6("ff02::1:ff12:3456".parse().unwrap()), Mac([0x33, 0x33, 0xff, 0x12, 0x34, 0x56]));
    }

    #[test]
    fn text_goes_both_ways() {
        let mac = Mac([0x0a, 0xb0, 0x00, 0x12, 0x34, 0xff]);
        assert_eq!(mac.to_string(), "0a:b0:00:12:34:ff");
        assert_eq!(format!("{mac:?}"), "0a:b0:00:12:34:ff");
        assert_eq!("0A:b0:00:12:34:fF".parse(), Ok(mac));
        for wrong in [
            "",
            "0a",
            "0a:b0:00:12:34",
            "0a:b0:00:12:34:ff:00",
            "0a:b0:00:12:34:f",
            "+a:b0:00:12:34:ff",
            "é:b0:00:12:34:ff",
        ] {
            assert_eq!(wrong.parse::<Mac>(), Err(MacError), "{wrong}");
        }
    }
}
