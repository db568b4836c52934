//! A five-tuple in one direction.
//!
//! [`FlowKey::of`] and [`FlowKey::reversed`] are its only makers. IPv4 addresses are kept in their IPv4-mapped form (RFC 4291,
//! section 2.5.5.2), so that one table serves both families. A fragment has no ports, not even the first: all fragments of
//! a datagram must take the same path, and most do not carry them.

use std::net::{IpAddr, Ipv6Addr};

use crate::packet::Ip;

/// A five-tuple in one direction.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct FlowKey {
    src: [u8; 16],
    dst: [u8; 16],
    src_port: u16,
    dst_port: u16,
    protocol: u8,
}

impl FlowKey {
    /// The flow that a packet belongs to.
    pub fn of(ip: &Ip) -> FlowKey {
        let (src_port, dst_port) = ip.ports.unwrap_or((0, 0));
        FlowKey { src: mapped(ip.src), dst: mapped(ip.dst), src_port, dst_port, protocol: ip.protocol }
    }

    /// The same flow seen from the other side.
    pub fn reversed(&self) -> FlowKey {
        FlowKey { src: self.dst, dst: self.src, src_port: self.dst_port, dst_port: self.src_port, ..*self }
    }

    /// Source address.
    pub fn src(&self) -> IpAddr {
        Ipv6Addr::from(self.src).to_canonical()
    }

    /// Destination address.
    pub fn dst(&self) -> IpAddr {
        Ipv6Addr::from(self.dst).to_canonical()
    }

    /// Source and destination port; zeros if the packets have none.
    pub fn ports(&self) -> (u16, u16) {
        (self.src_port, self.dst_port)
    }

    /// Protocol number.
    pub fn protocol(&self) -> u8 {
        self.protocol
    }
}

fn mapped(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}
