//! L3: where an address is, by longest prefix.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use prefix_trie::PrefixMap;

use crate::drop_reason::DropReason;
use crate::tables::Via;

/// Finds the way to an address.
///
/// # Errors
/// `NotForwardable` for addresses that no router forwards to (RFC 1812, section 5.3.7; RFC 4291, sections 2.5.2 to 2.7), `NoRoute` if no
/// prefix covers it.
pub fn find(dst: IpAddr, v4: &PrefixMap<Ipv4Net, Via>, v6: &PrefixMap<Ipv6Net, Via>) -> Result<Via, DropReason> {
    let found = match dst {
        IpAddr::V4(dst) if !is_forwardable_v4(dst) => return Err(DropReason::NotForwardable),
        IpAddr::V6(dst) if !is_forwardable_v6(dst) => return Err(DropReason::NotForwardable),
        IpAddr::V4(dst) => v4.get_lpm(&Ipv4Net::from(dst)).map(|(_, via)| *via),
        IpAddr::V6(dst) => v6.get_lpm(&Ipv6Net::from(dst)).map(|(_, via)| *via),
    };
    found.ok_or(DropReason::NoRoute)
}

fn is_forwardable_v4(address: Ipv4Addr) -> bool {
    let reserved = address.octets()[0] == 0 || address.octets()[0] >= 240;
    !(reserved || address.is_loopback() || address.is_link_local() || address.is_multicast())
}

fn is_forwardable_v6(address: Ipv6Addr) -> bool {
    !(address.is_unspecified() || address.is_loopback() || address.is_unicast_link_local() || address.is_multicast())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tables::NodeId;

    #[test]
    fn the_longest_prefix_wins() {
        let mut v4 = PrefixMap::new();
        v4.insert("10.244.0.0/16".parse().unwrap(), Via::Node(NodeId(1)));
        v4.insert("10.244.3.0/24".parse().unwrap(), Via::Local);
        let v6 = PrefixMap::new();
        let find = |address: &str| find(address.parse().unwrap(), &v4, &v6);
        assert_eq!(find("10.244.3.9"), Ok(Via::Local));
        assert_eq!(find("10.244.4.9"), Ok(Via::Node(NodeId(1))));
        assert_eq!(find("10.245.0.1"), Err(DropReason::NoRoute));
        assert_eq!(find("2001:db8::1"), Err(DropReason::NoRoute));
    }

    #[test]
    fn addresses_that_no_router_forwards_to_are_refused() {
        let mut v4 = PrefixMap::new();
        v4.insert("0.0.0.0/0".parse().unwrap(), Via::Local);
        let mut v6 = PrefixMap::new();
        v6.insert("::/0".parse().unwrap(), Via::Local);
        for address in
            ["0.0.0.0", "127.0.0.1", "169.254.1.1", "224.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "ff02::1"]
        {
            assert_eq!(find(address.parse().unwrap(), &v4, &v6), Err(DropReason::NotForwardable), "{address}");
        }
    }
}
