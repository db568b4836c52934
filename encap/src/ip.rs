//! What IPv4 and IPv6 share: protocol numbers (IANA "Assigned Internet Protocol Numbers").

/// IPv6 Hop-by-Hop Options, only ever directly after the fixed header.
pub const HOP_BY_HOP: u8 = 0;
/// ICMP for IPv4.
pub const ICMP: u8 = 1;
/// Group membership for IPv4.
pub const IGMP: u8 = 2;
/// IPv4 inside of IP.
pub const IPIP: u8 = 4;
/// TCP.
pub const TCP: u8 = 6;
/// UDP.
pub const UDP: u8 = 17;
/// IPv6 inside of IP.
pub const IPV6: u8 = 41;
/// IPv6 Routing.
pub const ROUTING: u8 = 43;
/// IPv6 Fragment.
pub const FRAGMENT: u8 = 44;
/// Generic Routing Encapsulation.
pub const GRE: u8 = 47;
/// IPsec, encrypted.
pub const ESP: u8 = 50;
/// IPsec, authenticated only.
pub const AH: u8 = 51;
/// ICMP for IPv6.
pub const ICMPV6: u8 = 58;
/// IPv6: nothing follows.
pub const NO_NEXT: u8 = 59;
/// IPv6 Destination Options.
pub const DESTINATION: u8 = 60;
/// SCTP.
pub const SCTP: u8 = 132;
