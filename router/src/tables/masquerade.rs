//! As whom, and by which interfaces, packets of pods leave the cluster.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use prefix_trie::PrefixSet;
use weft_encap::mac::Mac;

use crate::port::PortId;

/// First bytes of the MACs by which the host port's frames say that they came by an uplink: locally administered, and on no wire.
const CAME_BACK: [u8; 4] = [0x0a, 0x77, 0x65, 0x66];

/// The MAC that frames are given which an uplink leads to the host port, and which they keep if they are not for a pod.
pub fn came_back(uplink: PortId) -> Mac {
    let [a, b, c, d] = CAME_BACK;
    let [high, low] = uplink.0.to_be_bytes();
    Mac([a, b, c, d, high, low])
}

/// Which uplink frames with this MAC came by.
pub fn came_by(mac: Mac) -> Option<PortId> {
    let [a, b, c, d, high, low] = mac.0;
    ([a, b, c, d] == CAME_BACK).then(|| PortId(u16::from_be_bytes([high, low])))
}

/// An interface that leads out of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WayOut {
    /// Its port.
    pub port: PortId,
    /// Its MAC.
    pub mac: Mac,
    /// The node's addresses on it, with the networks that they are in; of each family, packets leave as the first that fits.
    pub addresses: Vec<IpNet>,
}

/// What leaves as whom.
#[derive(Clone, Debug, Default)]
pub struct Masquerade {
    ways: Vec<WayOut>,
    kept4: PrefixSet<Ipv4Net>,
    kept6: PrefixSet<Ipv6Net>,
    nodes: Vec<IpAddr>,
    own: Vec<IpAddr>,
}

impl Masquerade {
    /// By these interfaces, the preferred one first. Packets to what is `kept` go to this node's kernel as they are, but for other `nodes`'
    /// own addresses; and so do those to its `own` addresses.
    pub fn new(ways: Vec<WayOut>, kept: &[IpNet], mut nodes: Vec<IpAddr>, mut own: Vec<IpAddr>) -> Masquerade {
        nodes.sort_unstable();
        own.sort_unstable();
        let (mut kept4, mut kept6) = (PrefixSet::new(), PrefixSet::new());
        for net in kept {
            match net {
                IpNet::V4(net) => kept4.insert(net.trunc()),
                IpNet::V6(net) => kept6.insert(net.trunc()),
            };
        }
        Masquerade { ways, kept4, kept6, nodes, own }
    }

    /// The interfaces.
    pub fn ways(&self) -> &[WayOut] {
        &self.ways
    }

    /// Whether this is one of the node's addresses.
    pub fn is_own(&self, address: IpAddr) -> bool {
        self.own.binary_search(&address).is_ok()
    }

    /// Whether packets to this address leave in the node's name.
    pub fn covers(&self, to: IpAddr) -> bool {
        let kept = match to {
            IpAddr::V4(to) => self.kept4.get_lpm(&Ipv4Net::from(to)).is_some(),
            IpAddr::V6(to) => self.kept6.get_lpm(&Ipv6Net::from(to)).is_some(),
        };
        !self.is_own(to) && (!kept || self.nodes.binary_search(&to).is_ok())
    }

    /// The interface of a port.
    pub fn way(&self, port: PortId) -> Option<&WayOut> {
        self.ways.iter().find(|way| way.port == port)
    }

    /// As whom packets leave to this address by a port, or by the kernel if it is none: as an address that shares a network with it, else as the
    /// interface's first.
    pub fn source(&self, to: IpAddr, port: Option<PortId>) -> Option<IpAddr> {
        let ways = || self.ways.iter().filter(|way| port.is_none_or(|port| way.port == port));
        let addresses = || ways().flat_map(|way| &way.addresses).filter(|net| is_of_family(net.addr(), to));
        let shared = addresses().find(|net| net.contains(&to));
        shared.or_else(|| addresses().next()).map(IpNet::addr)
    }
}

fn is_of_family(address: IpAddr, other: IpAddr) -> bool {
    address.is_ipv4() == other.is_ipv4() && !is_link_local(address)
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => Ipv4Addr::is_link_local(&address),
        IpAddr::V6(address) => Ipv6Addr::is_unicast_link_local(&address),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn masquerade() -> Masquerade {
        let way = |port, addresses: &[&str]| WayOut {
            port: PortId(port),
            mac: Mac::ZERO,
            addresses: addresses.iter().map(|net| net.parse().unwrap()).collect(),
        };
        let ways = vec![
            way(7, &["192.0.2.5/24", "198.51.100.5/24", "fe80::5/64", "2001:db8::5/64"]),
            way(8, &["10.9.0.5/16"]),
        ];
        let list = |addresses: &[&str]| addresses.iter().map(|address| address.parse().unwrap()).collect();
        Masquerade::new(
            ways,
            &["10.0.0.0/8".parse().unwrap()],
            list(&["10.9.0.6"]),
            list(&["192.0.2.5", "10.9.0.5", "127.0.0.1"]),
        )
    }

    #[test]
    fn what_is_kept_goes_to_the_kernel_but_other_nodes_do_not() {
        let masquerade = masquerade();
        let covers = |address: &str| masquerade.covers(address.parse().unwrap());
        assert!(covers("203.0.113.1") && covers("2001:db8:1::1") && covers("10.9.0.6"));
        assert!(!covers("10.96.0.1") && !covers("192.0.2.5") && !covers("10.9.0.5"));
    }

    #[test]
    fn packets_leave_as_the_address_that_is_nearest() {
        let masquerade = masquerade();
        let source = |to: &str, port: Option<u16>| {
            masquerade.source(to.parse().unwrap(), port.map(PortId)).map(|address| address.to_string())
        };
        assert_eq!(source("203.0.113.1", Some(7)).as_deref(), Some("192.0.2.5"));
        assert_eq!(source("198.51.100.9", Some(7)).as_deref(), Some("198.51.100.5"));
        assert_eq!(source("2001:db8:1::1", Some(7)).as_deref(), Some("2001:db8::5"), "never a link-local one");
        assert_eq!(source("10.9.3.3", None).as_deref(), Some("10.9.0.5"));
        assert_eq!(source("2001:db8:1::1", Some(8)), None);
    }

    #[test]
    fn the_mac_names_the_uplink() {
        assert_eq!(came_by(came_back(PortId(0x1234))), Some(PortId(0x1234)));
        assert_eq!(came_by(Mac([2, 0x77, 0x65, 0x66, 0, 1])), None);
    }
}
