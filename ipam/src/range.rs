//! Ranges and range sets: from where addresses are given.
//!
//! The rules are those of the host-local plugin, because its configuration is what operators have: a range is a
//! subnet, optionally narrowed by a first and a last address, and a gateway that is never given. A *range set* is
//! several ranges of one family, out of which an attachment gets one address; dual stack is two sets.
//!
//! | field | if absent | must |
//! |---|---|---|
//! | `subnet` | – | have no host bits, and room: at most /30 or /126 |
//! | `range_start` | network + 1 | lie in the subnet |
//! | `range_end` | broadcast − 1 (IPv4), last address (IPv6) | lie in the subnet, not before `range_start` |
//! | `gateway` | network + 1 | be of the subnet's family; it may lie outside, as a link-local one does |
//!
//! Stricter than host-local in one point only: a `range_start` that is the network address, or a `range_end` that is
//! the IPv4 broadcast address, is accepted but means the address beside it. The network address is never given.
//! IPv4 addresses written as IPv6 (`::ffff:10.0.0.1`) are IPv4 addresses.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// Addresses of one subnet that can be given: valid by construction.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Range {
    subnet: IpNet,
    start: IpAddr,
    end: IpAddr,
    gateway: IpAddr,
}

impl Range {
    /// A whole subnet: from network + 1 to its end, without the gateway, which is network + 1.
    pub fn whole(subnet: IpNet) -> Result<Self, RangeError> {
        Self::new(subnet, None, None, None)
    }

    /// A range by the fields of host-local's configuration; the module's table says what an absent one means.
    pub fn new(
        subnet: IpNet,
        range_start: Option<IpAddr>,
        range_end: Option<IpAddr>,
        gateway: Option<IpAddr>,
    ) -> Result<Self, RangeError> {
        check_subnet(subnet)?;
        let v4 = is_v4(subnet.addr());
        let first = to_number(subnet.network()) + 1;
        let last = to_number(subnet.broadcast()) - u128::from(v4);
        let bound = |field, given: Option<IpAddr>, default: u128| match given.map(|a| a.to_canonical()) {
            None => Ok(default),
            Some(address) if subnet.contains(&address) => Ok(to_number(address)),
            Some(address) => Err(RangeError::Outside { field, address, subnet }),
        };
        let start = bound("rangeStart", range_start, first)?.max(first);
        let end = bound("rangeEnd", range_end, last)?.min(last);
        if start > end {
            return Err(RangeError::Reversed { start: to_address(start, v4), end: to_address(end, v4) });
        }
        let gateway = gateway.map_or(to_address(first, v4), |g| g.to_canonical());
        if is_v4(gateway) != v4 {
            return Err(RangeError::Gateway { gateway, subnet });
        }
        Ok(Self { subnet, start: to_address(start, v4), end: to_address(end, v4), gateway })
    }

    /// The on-link prefix.
    pub fn subnet(&self) -> IpNet {
        self.subnet
    }

    /// The first address that can be given, unless it is the gateway.
    pub fn start(&self) -> IpAddr {
        self.start
    }

    /// The last address that can be given.
    pub fn end(&self) -> IpAddr {
        self.end
    }

    /// The gateway, which is never given.
    pub fn gateway(&self) -> IpAddr {
        self.gateway
    }

    /// Whether `address` lies between start and end, both included. The gateway counts as well.
    pub fn contains(&self, address: IpAddr) -> bool {
        is_v4(address) == is_v4(self.start) && self.start <= address && address <= self.end
    }

    /// How many addresses can be given in all, without the gateway; saturates at `u64::MAX`.
    pub fn size(&self) -> u64 {
        let (start, end) = self.bounds();
        // A range has at most 2^126 addresses more than one, so that neither step overflows.
        let size = (end - start).saturating_add(1) - u128::from(self.contains(self.gateway));
        u64::try_from(size).unwrap_or(u64::MAX)
    }

    /// Whether the two have an address in common.
    pub fn overlaps(&self, other: &Range) -> bool {
        is_v4(self.start) == is_v4(other.start) && self.start <= other.end && other.start <= self.end
    }

    /// How many of its addresses, the gateway not counted, lie in one of `nets` or more; saturates as [`Self::size`] does.
    pub(crate) fn count_in(&self, nets: &[IpNet]) -> u64 {
        let (start, end) = self.bounds();
        let of_family = nets.iter().filter(|net| is_v4(net.addr()) == self.is_v4());
        let mut parts: Vec<(u128, u128)> = of_family
            .map(|net| (to_number(net.network()).max(start), to_number(net.broadcast()).min(end)))
            .filter(|(from, to)| from <= to)
            .collect();
        parts.sort_unstable();
        let (mut count, mut next) = (0_u128, start);
        for (from, to) in parts {
            let from = from.max(next);
            if from <= to {
                count = count.saturating_add(to - from).saturating_add(1);
                next = to.saturating_add(1);
            }
        }
        let gateway = self.contains(self.gateway) && nets.iter().any(|net| net.contains(&self.gateway));
        u64::try_from(count - u128::from(gateway)).unwrap_or(u64::MAX).min(self.size())
    }

    pub(crate) fn is_v4(&self) -> bool {
        is_v4(self.start)
    }

    pub(crate) fn bounds(&self) -> (u128, u128) {
        (to_number(self.start), to_number(self.end))
    }
}

impl fmt::Display for Range {
    /// `10.1.0.0/24`, or `10.1.0.0/24 (10.1.0.10 to 10.1.0.20)` if it was narrowed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.subnet)?;
        match Range::whole(self.subnet) {
            Ok(whole) if whole.start == self.start && whole.end == self.end => Ok(()),
            _ => write!(f, " ({} to {})", self.start, self.end),
        }
    }
}

fn check_subnet(subnet: IpNet) -> Result<(), RangeError> {
    if subnet.prefix_len() + 2 > subnet.max_prefix_len() {
        return Err(RangeError::TooSmall { subnet });
    }
    if subnet != subnet.trunc() {
        return Err(RangeError::HostBits { subnet, network: subnet.trunc() });
    }
    if is_v4(subnet.addr().to_canonical()) != is_v4(subnet.addr()) {
        return Err(RangeError::Mapped { subnet });
    }
    Ok(())
}

/// Ranges of one family out of which an attachment gets one address: valid by construction.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RangeSet(Vec<Range>);

impl RangeSet {
    /// A set of at least one range; all of one family, none overlapping another.
    pub fn new(ranges: Vec<Range>) -> Result<Self, RangeError> {
        let first = ranges.first().ok_or(RangeError::Empty)?;
        if let Some(other) = ranges.iter().find(|r| r.is_v4() != first.is_v4()) {
            return Err(RangeError::Families { first: first.subnet, other: other.subnet });
        }
        for (i, a) in ranges.iter().enumerate() {
            if let Some(b) = ranges[i + 1..].iter().find(|b| a.overlaps(b)) {
                return Err(RangeError::Overlap { first: a.to_string(), other: b.to_string() });
            }
        }
        Ok(Self(ranges))
    }

    /// The ranges, in the order in which they are used up.
    pub fn ranges(&self) -> &[Range] {
        &self.0
    }

    /// The range that holds `address`.
    pub fn range_of(&self, address: IpAddr) -> Option<&Range> {
        self.0.iter().find(|r| r.contains(address))
    }

    /// What tells this set from others when the place of the round is remembered: the start of its first range.
    pub(crate) fn key(&self) -> IpAddr {
        self.0[0].start
    }
}

impl From<Range> for RangeSet {
    fn from(range: Range) -> Self {
        Self(vec![range])
    }
}

impl fmt::Display for RangeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, range) in self.0.iter().enumerate() {
            write!(f, "{}{range}", if i > 0 { ", " } else { "" })?;
        }
        Ok(())
    }
}

/// What is wrong with a range or a set of them. The messages use the names of host-local's configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// A /31, /32, /127 or /128 has no address to give beside network and gateway.
    #[error("subnet {subnet} is too small to give addresses from; use /30 (IPv4), /126 (IPv6) or larger")]
    TooSmall {
        /// The subnet.
        subnet: IpNet,
    },
    /// The subnet is an address with a prefix length, not a network.
    #[error("subnet {subnet} has host bits set; did you mean {network}?")]
    HostBits {
        /// The subnet.
        subnet: IpNet,
        /// The network that it lies in.
        network: IpNet,
    },
    /// An IPv4 subnet in IPv6 clothes.
    #[error("subnet {subnet} is IPv4 mapped into IPv6; write it as IPv4")]
    Mapped {
        /// The subnet.
        subnet: IpNet,
    },
    /// `rangeStart` or `rangeEnd` is not in the subnet.
    #[error("{field} {address} is not in subnet {subnet}")]
    Outside {
        /// `rangeStart` or `rangeEnd`.
        field: &'static str,
        /// The address.
        address: IpAddr,
        /// The subnet.
        subnet: IpNet,
    },
    /// The range ends before it starts, or holds nothing but the network or broadcast address.
    #[error("rangeStart {start} is after rangeEnd {end}")]
    Reversed {
        /// The first address.
        start: IpAddr,
        /// The last address.
        end: IpAddr,
    },
    /// The gateway is of another family than the subnet.
    #[error("gateway {gateway} is not of the same family as subnet {subnet}")]
    Gateway {
        /// The gateway.
        gateway: IpAddr,
        /// The subnet.
        subnet: IpNet,
    },
    /// A set without ranges.
    #[error("ranges: a range set is empty; give it a range or remove it")]
    Empty,
    /// A set mixes IPv4 and IPv6.
    #[error("ranges: {first} and {other} are of different families; put them into range sets of their own")]
    Families {
        /// A subnet of the set.
        first: IpNet,
        /// One of the other family.
        other: IpNet,
    },
    /// Two ranges have addresses in common.
    #[error("ranges: {first} and {other} overlap")]
    Overlap {
        /// A range.
        first: String,
        /// The one that it overlaps.
        other: String,
    },
}

pub(crate) fn is_v4(address: IpAddr) -> bool {
    matches!(address, IpAddr::V4(_))
}

pub(crate) fn to_number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(a) => u128::from(u32::from(a)),
        IpAddr::V6(a) => u128::from(a),
    }
}

/// The inverse of [`to_number`]; an IPv4 number is one that came from an IPv4 address, hence fits.
pub(crate) fn to_address(number: u128, v4: bool) -> IpAddr {
    if v4 { IpAddr::V4(Ipv4Addr::from(number as u32)) } else { IpAddr::V6(Ipv6Addr::from(number)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(subnet: &str, fields: [Option<&str>; 3]) -> Result<Range, RangeError> {
        let [start, end, gateway] = fields.map(|f| f.map(|f| f.parse().unwrap()));
        Range::new(subnet.parse().unwrap(), start, end, gateway)
    }

    fn said(subnet: &str, fields: [Option<&str>; 3]) -> String {
        range(subnet, fields).unwrap_err().to_string()
    }

    #[test]
    fn absent_fields_mean_what_they_mean_to_host_local() {
        for (subnet, start, end, gateway, size) in [
            ("10.1.2.0/24", "10.1.2.1", "10.1.2.254", "10.1.2.1", 253),
            ("10.1.2.0/30", "10.1.2.1", "10.1.2.2", "10.1.2.1", 1),
            ("fd00::/126", "fd00::1", "fd00::3", "fd00::1", 2),
            ("fd00::/64", "fd00::1", "fd00::ffff:ffff:ffff:ffff", "fd00::1", u64::MAX - 1),
            ("0.0.0.0/0", "0.0.0.1", "255.255.255.254", "0.0.0.1", (1 << 32) - 3),
            ("::/0", "::1", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "::1", u64::MAX),
        ] {
            let range = range(subnet, [None; 3]).unwrap();
            let found = [range.start, range.end, range.gateway].map(|a| a.to_string());
            assert_eq!(found, [start, end, gateway], "{subnet}");
            assert_eq!(range.size(), size, "{subnet}");
            assert_eq!(range.to_string(), subnet);
        }
    }

    #[test]
    fn given_fields_narrow_the_range() {
        let r = range("10.1.2.0/24", [Some("10.1.2.10"), Some("::ffff:10.1.2.20"), Some("10.1.2.15")]).unwrap();
        assert_eq!(r.to_string(), "10.1.2.0/24 (10.1.2.10 to 10.1.2.20)");
        assert_eq!(r.size(), 10);
        // Neither network nor broadcast address is given, even if they are named.
        let r = range("10.1.2.0/24", [Some("10.1.2.0"), Some("10.1.2.255"), Some("169.254.1.1")]).unwrap();
        assert_eq!((r.to_string(), r.size()), ("10.1.2.0/24".into(), 254));
    }

    #[test]
    fn what_lies_in_several_prefixes_is_counted_once_and_the_gateway_never() {
        let range = range("10.1.2.0/24", [None; 3]).unwrap();
        let count = |nets: &[&str]| range.count_in(&nets.iter().map(|net| net.parse().unwrap()).collect::<Vec<_>>());
        assert_eq!(count(&[]), 0);
        assert_eq!(count(&["10.1.2.1/32", "fd00::/8", "10.1.3.0/24"]), 0);
        assert_eq!(count(&["10.1.2.8/30", "10.1.2.10/32", "10.1.2.8/29", "10.1.2.200/32"]), 9);
        assert_eq!(count(&["10.0.0.0/8", "0.0.0.0/0", "10.1.2.0/25"]), range.size());
        let v6 = Range::whole("fd00::/64".parse().unwrap()).unwrap();
        assert_eq!(
            (v6.count_in(&["::/0".parse().unwrap()]), v6.count_in(&["fd00::/126".parse().unwrap()])),
            (v6.size(), 2)
        );
    }

    #[test]
    fn an_error_names_the_field() {
        let none = [None; 3];
        for subnet in ["10.0.0.0/31", "10.0.0.0/32", "fd00::/127", "fd00::/128"] {
            assert!(said(subnet, none).starts_with(&format!("subnet {subnet} is too small")));
        }
        assert_eq!(said("10.0.0.5/24", none), "subnet 10.0.0.5/24 has host bits set; did you mean 10.0.0.0/24?");
        assert!(said("::ffff:10.0.0.0/120", none).contains("write it as IPv4"));
        let net = "10.0.0.0/24";
        assert_eq!(said(net, [Some("10.0.1.1"), None, None]), "rangeStart 10.0.1.1 is not in subnet 10.0.0.0/24");
        assert_eq!(said(net, [None, Some("fd00::1"), None]), "rangeEnd fd00::1 is not in subnet 10.0.0.0/24");
        let reversed = said(net, [Some("10.0.0.9"), Some("10.0.0.8"), None]);
        assert_eq!(reversed, "rangeStart 10.0.0.9 is after rangeEnd 10.0.0.8");
        assert!(said(net, [Some("10.0.0.255"), None, None]).starts_with("rangeStart 10.0.0.255 is after"));
        assert!(said(net, [None, None, Some("fd00::1")]).starts_with("gateway fd00::1"));
    }

    #[test]
    fn a_set_is_of_one_family_and_its_ranges_do_not_overlap() {
        let set = |subnets: &[&str]| RangeSet::new(subnets.iter().map(|s| range(s, [None; 3]).unwrap()).collect());
        assert_eq!(set(&[]), Err(RangeError::Empty));
        assert!(matches!(set(&["10.0.0.0/24", "fd00::/64"]), Err(RangeError::Families { .. })));
        assert!(matches!(set(&["10.0.0.0/24", "10.1.0.0/24", "10.0.0.64/26"]), Err(RangeError::Overlap { .. })));
        assert_eq!(set(&["10.0.0.0/24", "10.0.1.0/24"]).unwrap().to_string(), "10.0.0.0/24, 10.0.1.0/24");
        let halves = [[Some("10.0.0.2"), Some("10.0.0.9"), None], [Some("10.0.0.10"), None, None]];
        assert!(RangeSet::new(halves.map(|f| range("10.0.0.0/24", f).unwrap()).to_vec()).is_ok());
    }
}
