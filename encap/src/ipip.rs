//! IP in IP (RFC 2003), and IPv6 on either side of it (RFC 2473, RFC 4213).
//!
//! There is no header: the outer packet's protocol says what the inner one is, and the inner one says so again in its first four bits.

use core::fmt;

use crate::eth::{ETHERTYPE_IPV4, ETHERTYPE_IPV6};
use crate::ip;

/// What is inside.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Inner {
    /// An IPv4 packet.
    V4,
    /// An IPv6 packet.
    V6,
}

/// Why a packet is not taken.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum IpipError {
    /// Nothing is inside.
    Short,
    /// The outer protocol is neither 4 nor 41.
    Protocol,
    /// The inner packet is of another version than the outer protocol says.
    Version,
}

impl fmt::Display for IpipError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Short => "an IP packet in IP is cut off",
            Self::Protocol => "a packet that is no IP in IP",
            Self::Version => "an inner packet of another IP version than its outer header says",
        })
    }
}

impl std::error::Error for IpipError {}

impl Inner {
    /// What is inside of an outer packet of this protocol (IPv4) or next header (IPv6).
    pub fn parse(protocol: u8, packet: &[u8]) -> Result<Self, IpipError> {
        let inner = match protocol {
            ip::IPIP => Self::V4,
            ip::IPV6 => Self::V6,
            _ => return Err(IpipError::Protocol),
        };
        let first = packet.first().ok_or(IpipError::Short)?;
        if first >> 4 == inner.version() { Ok(inner) } else { Err(IpipError::Version) }
    }

    /// For a packet with this EtherType; `None` if it is not IP.
    pub const fn of(ethertype: u16) -> Option<Self> {
        match ethertype {
            ETHERTYPE_IPV4 => Some(Self::V4),
            ETHERTYPE_IPV6 => Some(Self::V6),
            _ => None,
        }
    }

    /// The outer packet's protocol, or next header.
    pub const fn protocol(self) -> u8 {
        match self {
            Self::V4 => ip::IPIP,
            Self::V6 => ip::IPV6,
        }
    }

    /// The EtherType of the inner packet.
    pub const fn ethertype(self) -> u16 {
        match self {
            Self::V4 => ETHERTYPE_IPV4,
            Self::V6 => ETHERTYPE_IPV6,
        }
    }

    const fn version(self) -> u8 {
        match self {
            Self::V4 => 4,
            Self::V6 => 6,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outer_protocol_and_the_inner_version_agree() {
        for inner in [Inner::V4, Inner::V6] {
            let first = inner.version() << 4 | 5;
            assert_eq!(Inner::parse(inner.protocol(), &[first]), Ok(inner));
            assert_eq!(Inner::of(inner.ethertype()), Some(inner));
            assert_eq!(Inner::parse(inner.protocol(), &[first ^ 0x20]), Err(IpipError::Version));
        }
    }

    #[test]
    fn anything_else_is_refused() {
        assert_eq!(Inner::parse(ip::UDP, &[0x45]), Err(IpipError::Protocol));
        assert_eq!(Inner::parse(ip::IPIP, &[]), Err(IpipError::Short));
        assert_eq!(Inner::of(0x0806), None);
    }
}
